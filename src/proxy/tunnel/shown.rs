//! The certificates that peers have shown, each in memory once however many tunnels show it: a service has one certificate and may have
//! thousands of connections.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use rustls_pki_types::CertificateDer;

/// From so many on it is looked at which ones are still in use.
const FEW: usize = 64;

/// One certificate.
pub(super) struct Shown(Arc<[u8]>);

static ALL: LazyLock<Mutex<Kept>> = LazyLock::new(Mutex::default);

#[derive(Default)]
struct Kept {
    known: HashSet<Arc<[u8]>>,
    /// How many there were when it was last looked at which ones are in use.
    used: usize,
}

impl Kept {
    fn keep(&mut self, der: &[u8]) -> Arc<[u8]> {
        if let Some(known) = self.known.get(der) {
            return known.clone();
        }
        // Each look is paid for by as many that were added since.
        if self.known.len() >= FEW.max(2 * self.used) {
            self.known.retain(|der| Arc::strong_count(der) > 1);
            self.used = self.known.len();
        }
        let new: Arc<[u8]> = der.into();
        self.known.insert(new.clone());
        new
    }
}

impl Shown {
    pub(super) fn new(certificate: &CertificateDer<'_>) -> Self {
        Self(ALL.lock().unwrap_or_else(PoisonError::into_inner).keep(certificate))
    }

    pub(super) fn der(&self) -> CertificateDer<'_> {
        CertificateDer::from(&*self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_certificate_is_kept_once_and_for_as_long_as_somebody_has_it() {
        let mut kept = Kept::default();
        let one = kept.keep(b"one");
        assert!(Arc::ptr_eq(&one, &kept.keep(b"one")));
        for n in 0..10 * FEW {
            kept.keep(&n.to_be_bytes());
            assert!(kept.known.len() <= FEW, "certificates that nobody has any more");
        }
        assert!(Arc::ptr_eq(&one, &kept.keep(b"one")));
        // Those in use are not looked through again and again.
        let many: Vec<_> = (0..10 * FEW).map(|n| kept.keep(&n.to_be_bytes())).collect();
        assert!(kept.known.len() > many.len() && kept.used > FEW);
    }
}
