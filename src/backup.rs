//! This host's state as a backup, and back: what belongs into one, and what has to change so that the old state can be lived with.
//!
//! A restored host is the same node with the same office. What must not go back does not: the numbers of its records jump ahead of all that it can have
//! used since, and its join tokens are not restored, because one of them may have been used since. Everything else that is old is brought up to date by the
//! others. Nothing here can know whether the original still lives: two hosts with one key would take each other's place again and again.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use meshd_ca::backup::{Backup, Content, SealingKey};
use meshd_ca::identity::NodeId;
use meshd_ca::keys::PrivateKey;
use meshd_ca::recovery::RecoveryKey;
use meshd_ca::roster::Roster;
use meshd_ca::store::{Health, Store, survey};
use meshd_ca::time::UnixTime;
use zeroize::Zeroizing;

use crate::daemon::{GONE, SEQUENCE};
use crate::membership::fleet::FLEET;
use crate::membership::{KEY, ROSTER, TOKENS};

pub(crate) mod last;

/// The directory in the state directory that is not locked by the daemon, and the file in it: what seals backups.
pub(crate) const DIRECTORY: &str = "backup";
const SEALING: &str = "key";
/// What is asked for again, counted again, or must not come back.
const LEFT_OUT: [&str; 5] = [TOKENS, FLEET, "svids", "silent", GONE];
/// What [`GONE`] says while files are being put back: a host whose plug is pulled then must not begin a life of its own.
const RESTORING: &[u8] = b"restoring";
/// How far the numbers of records jump: more than a host uses that says something new every second for a century.
const JUMP: u64 = 1 << 32;
/// How often a state that a daemon is writing to is read until it holds still.
const ATTEMPTS: usize = 10;

/// What seals backups of this node on this host, if that is known yet.
///
/// # Errors
/// When the file is there and cannot be read.
pub(crate) fn sealing_key(state: &Path, node: NodeId) -> anyhow::Result<Option<SealingKey>> {
    let Some(saved) = Store::open(&state.join(DIRECTORY))?.load(SEALING)? else { return Ok(None) };
    // Of an earlier life of this host it is of no use.
    let Some(key) = saved.bytes.strip_prefix(node.as_bytes()) else { return Ok(None) };
    Ok(Some(SealingKey::from_bytes(key)?))
}

/// Keeps what seals backups of this node from now on, and returns it.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn keep(state: &Path, node: NodeId, recovery: &RecoveryKey) -> anyhow::Result<SealingKey> {
    let key = recovery.sealing(node);
    let bytes = Zeroizing::new([node.as_bytes(), &key.as_bytes()[..]].concat());
    Store::open(&state.join(DIRECTORY))?.save(SEALING, &bytes)?;
    Ok(key)
}

/// The state as it is now, also while a daemon runs.
///
/// # Errors
/// When the host is in no mesh, or a file is damaged.
pub(crate) fn collect(state: &Path, now: UnixTime) -> anyhow::Result<Backup> {
    let missing = "this host is in no mesh: there is nothing to keep";
    ensure!(state.exists(), "{missing}");
    // Files belong together: what is read must have been on the disk at one moment.
    let mut files = read(state)?;
    let mut attempts = 0;
    loop {
        let again = read(state)?;
        if again == files {
            break;
        }
        attempts += 1;
        ensure!(attempts < ATTEMPTS, "the state changes too fast to be read: try again in a moment");
        files = again;
    }
    let node = node(&files)?.context(missing)?;
    let roster = roster(&files)?.context(missing)?;
    ensure!(roster.is_active(node), "{missing}");
    let host = roster.member(node).map(|m| m.name.clone()).context(missing)?;
    Ok(Backup { node, host, mesh: roster.mesh(), made: now, files })
}

type Files = BTreeMap<String, Content>;

fn read(state: &Path) -> anyhow::Result<Files> {
    let mut files = Files::new();
    for file in survey(state)?.files {
        match (file.health, &file.content) {
            _ if LEFT_OUT.contains(&file.name.as_str()) => {}
            (Health::Good | Health::Older, Some(content)) => drop(files.insert(file.name, content[..].into())),
            _ => bail!("{} is damaged: see `meshd state verify`", file.name),
        }
    }
    Ok(files)
}

fn node(files: &Files) -> anyhow::Result<Option<NodeId>> {
    let Some(key) = files.get(KEY) else { return Ok(None) };
    Ok(Some(PrivateKey::from_pkcs8(key.bytes())?.public().node_id()))
}

fn roster(files: &Files) -> anyhow::Result<Option<Roster>> {
    Ok(files.get(ROSTER).map(|roster| Roster::from_bytes(roster.bytes())).transpose()?)
}

/// Makes a backup the state of this host. What was there is gone then; the plug may be pulled at any moment.
///
/// # Errors
/// When a daemon runs, the host is in a mesh with others, the backup is not whole, or the disk cannot be written.
pub(crate) fn restore(state: &Path, backup: &Backup) -> anyhow::Result<()> {
    let whole = node(&backup.files)? == Some(backup.node)
        && roster(&backup.files)?.is_some_and(|r| r.mesh() == backup.mesh && r.is_active(backup.node));
    ensure!(whole, "the backup is of another version of meshd");
    let store = Store::open(state)?;
    let unfinished = store.load(GONE)?.is_some_and(|gone| *gone.bytes == RESTORING);
    if let Some(saved) = store.load(ROSTER)?.filter(|_| !unfinished) {
        let others = Roster::from_bytes(&saved.bytes)?.active().count() > 1;
        ensure!(!others, "this host is a member of a mesh with others: `meshd leave` first");
    }
    store.save(GONE, RESTORING)?;
    for file in survey(state)?.files {
        if file.name != GONE && !backup.files.contains_key(&file.name) {
            store.remove(&file.name)?;
        }
    }
    // The roster of before and that of the backup must not meet the other's key.
    store.remove(ROSTER)?;
    for (name, content) in backup.files.iter().filter(|(name, _)| ![ROSTER, SEQUENCE, GONE].contains(&name.as_str())) {
        store.save(name, content.bytes())?;
    }
    let last = backup.files.get(SEQUENCE).and_then(|s| std::str::from_utf8(s.bytes()).ok()?.trim().parse().ok()).unwrap_or(0_u64);
    store.save(SEQUENCE, last.saturating_add(JUMP).to_string().as_bytes())?;
    let roster = backup.files.get(ROSTER).context("the backup has no roster")?;
    store.save(ROSTER, roster.bytes())?;
    last::remember(state, backup)?;
    Ok(store.remove(GONE)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use meshd_ca::identity::HostName;

    use super::*;
    use crate::clock::Clock;
    use crate::membership::{Membership, node_key};

    const NOW: UnixTime = UnixTime(1_800_000_000);

    fn found(dir: &Path) -> (Arc<Store>, Arc<PrivateKey>, Membership) {
        let store = Arc::new(Store::open(dir).unwrap());
        let key = Arc::new(node_key(&store).unwrap());
        let (name, clock) = (HostName::nearest("kitchen"), Clock::new(NOW));
        let membership = Membership::found(key.clone(), store.clone(), clock, name, None, None).unwrap();
        (store, key, membership)
    }

    #[tokio::test]
    async fn a_restored_host_is_the_same_member_and_nothing_goes_back() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (store, key, membership) = found(from.path());
        membership.create_token(std::time::Duration::from_secs(60), 1, &[]).await.unwrap();
        store.save(SEQUENCE, b"3000").unwrap();
        let node = key.public().node_id();
        assert_eq!(sealing_key(from.path(), node).unwrap(), None);
        let recovery = RecoveryKey::generate().unwrap();
        let sealing = keep(from.path(), node, &recovery).unwrap();
        assert_eq!(sealing_key(from.path(), node).unwrap().as_ref(), Some(&sealing), "beside a running daemon");
        assert_eq!(sealing_key(from.path(), NodeId::from_bytes([9; 16])).unwrap(), None);
        let sealed = collect(from.path(), NOW).unwrap().seal(&sealing).unwrap();
        assert!(restore(from.path(), &collect(from.path(), NOW).unwrap()).is_err(), "a daemon runs");

        let backup = Backup::open(&sealed, &recovery).unwrap();
        // A new host that has founded a mesh of its own meanwhile.
        drop(found(to.path()));
        restore(to.path(), &backup).unwrap();
        let store = Arc::new(Store::open(to.path()).unwrap());
        assert_eq!(node_key(&store).unwrap().public(), key.public());
        let again = Membership::load(key, store.clone(), Clock::new(NOW)).unwrap().unwrap();
        assert_eq!(again.roster().digest(), membership.roster().digest());
        assert_eq!(*again.signs().borrow(), *membership.signs().borrow());
        assert!(again.tokens().await.unwrap().is_empty(), "a token came back");
        assert_eq!(&store.load(SEQUENCE).unwrap().unwrap().bytes[..], (3000 + JUMP).to_string().as_bytes());
        assert_eq!(store.load(GONE).unwrap(), None);
    }

    #[tokio::test]
    async fn the_last_backup_is_remembered_here_and_where_it_was_restored_and_what_happens_since_is_seen() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (_store, key, membership) = found(from.path());
        let (node, mesh) = (key.public().node_id(), membership.roster().mesh());
        let last = |dir: &Path| last::last(dir, mesh, node).unwrap();
        assert_eq!(last(from.path()), None);
        let now = |m: &Membership| last::Weight::of(&m.roster(), node);
        let kept = |m: &Membership| {
            last::remember(from.path(), &collect(from.path(), NOW).unwrap()).unwrap();
            let last = last(from.path()).unwrap();
            assert_eq!((last.made, last.weight.since(&now(m))), (NOW, vec![]));
            last
        };
        kept(&membership);
        assert!(last::last(from.path(), mesh, NodeId::from_bytes([9; 16])).unwrap().is_none(), "another life of the host");
        let other = meshd_ca::identity::MeshId::from_bytes([9; 10]);
        assert!(last::last(from.path(), other, node).unwrap().is_none());
        // A host that is let in is nothing, one that is put out is.
        let guest = PrivateKey::generate().unwrap();
        let mut roster = (*membership.roster()).clone();
        roster.admit(&key, guest.public(), &HostName::nearest("b"), NOW).unwrap();
        membership.merge(roster.entry(guest.public().node_id()).unwrap().clone()).await.unwrap();
        let since = |m: &Membership| last(from.path()).unwrap().weight.since(&now(m));
        assert!(since(&membership).is_empty());
        membership.banish(guest.public().node_id()).await.unwrap();
        assert_eq!(since(&membership), ["a host was banished, or taken back"]);
        kept(&membership);
        // A root that is to follow counts from when the others hear of it, and a backup of that day has the keys of both.
        membership.prepare_next().await.unwrap();
        assert!(since(&membership).is_empty());
        membership.publish_next().await.unwrap();
        assert_eq!(since(&membership), ["this host has another root"]);
        kept(&membership);
        membership.activate_next().await.unwrap();
        assert!(since(&membership).is_empty());
        let last_one = kept(&membership);
        restore(to.path(), &collect(from.path(), NOW).unwrap()).unwrap();
        assert_eq!(last(to.path()), Some(last_one));
        // What cannot be read is no reason to say that there is none.
        for name in ["made", "made.other"] {
            fs::write(to.path().join(DIRECTORY).join(name), b"torn").unwrap();
        }
        assert!(last::last(to.path(), mesh, node).is_err());
    }

    #[tokio::test]
    async fn a_member_with_others_is_not_overwritten_and_a_newcomer_has_nothing_to_keep() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        drop(found(from.path()));
        let backup = collect(from.path(), NOW).unwrap();
        for nothing in [to.path().into(), to.path().join("missing")] {
            let refused = collect(&nothing, NOW).unwrap_err().to_string();
            assert!(refused.contains("nothing to keep"), "{}: {refused}", nothing.display());
        }
        let (store, key, membership) = found(to.path());
        let mut roster = (*membership.roster()).clone();
        roster.admit(&key, PrivateKey::generate().unwrap().public(), &HostName::nearest("b"), NOW).unwrap();
        store.save(ROSTER, &roster.to_bytes()).unwrap();
        drop((store, membership));
        assert!(restore(to.path(), &backup).unwrap_err().to_string().contains("with others"));
        let kept = Store::open(to.path()).unwrap();
        assert_eq!(node_key(&kept).unwrap().public(), key.public());
    }
}
