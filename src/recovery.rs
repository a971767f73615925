//! The recovery key of a mesh that this host founded, until a person takes it.
//!
//! Owns the file that it lies in: beside what seals backups, in a directory that the daemon does not lock, so that a command can show and erase it
//! whether the daemon runs or not. Nothing else on this host ever holds the key; what it is for is told in `meshd_ca::recovery`.

use std::path::Path;

use meshd_ca::recovery::{Recovery, RecoveryKey};
use meshd_ca::roster::Roster;
use meshd_ca::store::{Store, StoreError};

use crate::backup::DIRECTORY;
use crate::membership::ROSTER;

/// The file: the key as text.
const UNTAKEN: &str = "recovery";

/// Makes the recovery key of a mesh that is about to be founded, and keeps it until somebody takes it. One of before is gone then.
///
/// # Errors
/// When it cannot be written, or there is no randomness.
pub(crate) fn prepare(state: &Path) -> anyhow::Result<Recovery> {
    let key = RecoveryKey::generate()?;
    let recovery = Recovery::new(&key)?;
    Store::open(&state.join(DIRECTORY))?.save(UNTAKEN, key.to_text().as_bytes())?;
    Ok(recovery)
}

/// The recovery key of the mesh with this roster, if it was made here and nobody has taken it yet. Changes nothing.
///
/// # Errors
/// When the file cannot be read.
pub(crate) fn untaken(state: &Path, roster: &Roster) -> Result<Option<RecoveryKey>, StoreError> {
    let Some(recovery) = roster.recovery() else { return Ok(None) };
    let Some(saved) = Store::look_at(&state.join(DIRECTORY)).load(UNTAKEN)? else { return Ok(None) };
    let key: Option<RecoveryKey> = std::str::from_utf8(&saved.bytes).ok().and_then(|text| text.parse().ok());
    Ok(key.filter(|key| recovery.open(key).is_ok()))
}

/// The same, with the roster that is on the disk.
///
/// # Errors
/// When a file cannot be read, or this host is in no mesh.
pub(crate) fn untaken_on_disk(state: &Path) -> anyhow::Result<(Roster, Option<RecoveryKey>)> {
    let saved = Store::look_at(state).load(ROSTER)?.ok_or_else(|| anyhow::anyhow!("this host is in no mesh"))?;
    let roster = Roster::from_bytes(&saved.bytes)?;
    let key = untaken(state, &roster)?;
    Ok((roster, key))
}

/// Erases the key: somebody has it.
///
/// # Errors
/// When the disk cannot be written.
pub(crate) fn erase(state: &Path) -> Result<(), StoreError> {
    Store::open(&state.join(DIRECTORY))?.remove(UNTAKEN)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use meshd_ca::bundle::Root;
    use meshd_ca::identity::{HostName, MeshId, TrustDomain};
    use meshd_ca::issue::Issuer;
    use meshd_ca::keys::PrivateKey;
    use meshd_ca::time::UnixTime;

    use super::*;

    fn roster(recovery: Option<Recovery>) -> Roster {
        let (mesh, now, key) = (MeshId::from_bytes([1; 10]), UnixTime(1_800_000_000), PrivateKey::generate().unwrap());
        let domain = TrustDomain::of(mesh);
        let issuer = Issuer::create(&domain, key.public().node_id(), now, std::time::Duration::from_secs(86_400)).unwrap();
        assert!(Root::parse(issuer.root_der(), key.public().node_id()).is_some());
        Roster::found_with(recovery, (mesh, domain), &key, HostName::nearest("a"), issuer.root_der().to_vec(), now).unwrap()
    }

    #[test]
    fn the_key_is_there_for_its_mesh_until_it_is_taken_and_for_root_only() {
        let dir = tempfile::tempdir().unwrap();
        assert!(untaken_on_disk(dir.path()).is_err(), "in no mesh");
        let mesh = roster(Some(prepare(dir.path()).unwrap()));
        let key = untaken(dir.path(), &mesh).unwrap().expect("just made");
        assert!(mesh.recovery().unwrap().open(&key).is_ok());
        let mut files = 0;
        for file in std::fs::read_dir(dir.path().join(DIRECTORY)).unwrap() {
            let file = file.unwrap();
            assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", file.path());
            files += usize::from(std::fs::read(file.path()).unwrap().windows(49).any(|w| w == key.to_text().as_bytes()));
        }
        assert!(files >= 1);
        // Of another mesh, or one of before there were any, it is of no use.
        assert!(untaken(dir.path(), &roster(None)).unwrap().is_none());
        let other = tempfile::tempdir().unwrap();
        assert!(untaken(dir.path(), &roster(Some(prepare(other.path()).unwrap()))).unwrap().is_none());
        erase(dir.path()).unwrap();
        assert!(untaken(dir.path(), &mesh).unwrap().is_none());
        for file in std::fs::read_dir(dir.path().join(DIRECTORY)).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            assert!(!bytes.windows(49).any(|w| w == key.to_text().as_bytes()), "it is still there");
        }
    }
}
