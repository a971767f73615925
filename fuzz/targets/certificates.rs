//! Certificates a peer may show: no change to an honest one makes it somebody else's, and nothing else is believed.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use meshd_ca::bundle::{Bundle, Root};
use meshd_ca::identity::{SpiffeId, Workload};
use meshd_ca::issue::node_certificate;
use meshd_ca::keys::{PrivateKey, PublicKey};
use meshd_ca::verify::{node_key, serial, verify_svid};
use meshd_fuzz::{Input, NOW, WORLD, within};
use rustls_pki_types::CertificateDer;

static BUNDLE: LazyLock<Bundle> = LazyLock::new(|| WORLD.roster.bundle());
static LEAF: LazyLock<(SpiffeId, Vec<u8>)> = LazyLock::new(|| {
    let id = SpiffeId::new(WORLD.roster.trust_domain().clone(), Workload::Node(WORLD.node(1)));
    let key = PrivateKey::generate().expect("random bytes");
    let leaf = WORLD.issuer.issue(&id, key.public(), WORLD.node(1), Duration::from_secs(3600), NOW).expect("a leaf");
    (id, leaf.der)
});
static NODE: LazyLock<Vec<u8>> = LazyLock::new(|| node_certificate(&WORLD.keys[1]).expect("a certificate"));

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let der = match input.byte() % 4 {
        0 => input.0.to_vec(),
        1 => input.edit(&LEAF.1),
        2 => input.edit(&NODE),
        _ => input.edit(WORLD.issuer.root_der()),
    };
    let chain = [CertificateDer::from(&der[..])];
    let verified = within(128 * 1024 + 64 * der.len(), || verify_svid(&chain, &BUNDLE, &WORLD.roster, NOW));
    if let Ok(peer) = verified {
        assert!(peer.id == LEAF.0 && peer.holder == WORLD.node(1), "a changed certificate is {peer:?}");
    } else {
        assert!(der != LEAF.1);
    }
    if let Ok(key) = within(64 * 1024 + 16 * der.len(), || node_key(&chain[0])) {
        assert_eq!(PublicKey::from_spki(&key.spki()), Ok(key));
    }
    let _ = serial(&der);
    if let Some(root) = Root::parse(&der, WORLD.node(0)) {
        assert!(root.der == der && root.not_before <= root.not_after || root.der == der);
    }
    if let Ok(key) = PrivateKey::from_pkcs8(&der) {
        assert!(key.sign(b"x").is_ok_and(|s| key.public().verify(b"x", &s).is_ok()));
    }
});
