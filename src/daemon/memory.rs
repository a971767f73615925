//! What this node remembers of the others over a restart: their last records (a cache that may be lost) and the highest sequence of each
//! (state that may not, or an old record could be shown to us as new).
//!
//! Writes little: soon after the start, then every ten minutes if something changed, and at the end. An SD card is worn by writes.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use meshd_agent::cache::{Cache, MAX_RECORD};
use meshd_agent::catalog::Catalog;
use meshd_agent::record::SignedRecord;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::Roster;
use meshd_ca::store::Store;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::control::gossip::Mailbox;
use crate::intercept::process::die_with_parent;
use crate::membership::Membership;
use crate::task;

/// The file of the sequences.
const SEQUENCES: &str = "sequences";
/// How long the first changes gather before they are written; a node that has just joined is worth remembering soon.
const FIRST: Duration = Duration::from_secs(5);
/// How long later changes gather.
const LATER: Duration = Duration::from_secs(600);

/// The highest sequences of before. A file that cannot be read is none: the cost is that old records could be shown as new.
pub(crate) fn sequences(store: &Store) -> BTreeMap<NodeId, u64> {
    match store.load(SEQUENCES) {
        Ok(Some(saved)) => serde_json::from_slice(&saved.bytes).unwrap_or_else(|error| {
            tracing::warn!(%error, "the sequences of before cannot be read");
            BTreeMap::new()
        }),
        Ok(None) => BTreeMap::new(),
        Err(error) => {
            tracing::warn!(%error, "the sequences of before cannot be read");
            BTreeMap::new()
        }
    }
}

/// Gives the engine what is remembered, then keeps the memory up to date until `stop` says that it is time to write for the last time.
///
/// The database is open only while it is read or written, and in a process of its own: it costs some 20 MiB of memory that its libraries
/// do not give back, and a daemon of 10 MiB is the aim.
pub(crate) async fn remember(
    store: Arc<Store>,
    directory: PathBuf,
    membership: Arc<Membership>,
    mailbox: Mailbox,
    mut catalog: watch::Receiver<Arc<Catalog>>,
    mut stop: watch::Receiver<bool>,
) {
    let (roster, me, from) = (membership.roster(), membership.me(), directory.clone());
    match task::blocking(move || read(&from, me, &roster)).await {
        Ok(Ok(records)) => mailbox.restore(records).await,
        Ok(Err(error)) => tracing::warn!(%error, "going on without the records of before"),
        Err(error) => tracing::warn!(%error, "going on without the records of before"),
    }
    let mut written = Versions::new();
    let mut pause = FIRST;
    loop {
        let mut last = tokio::select! {
            changed = catalog.changed() => changed.is_err(),
            _ = stop.wait_for(|s| *s) => true,
        };
        if !last {
            last = timeout(pause, stop.wait_for(|s| *s)).await.is_ok();
        }
        pause = LATER;
        let now = catalog.borrow_and_update().clone();
        let (store, directory, known) = (store.clone(), directory.clone(), written.clone());
        let writing = task::blocking(move || write(&directory, &store, &now, known));
        match writing.await {
            Ok(Ok(versions)) => written = versions,
            Ok(Err(error)) => tracing::warn!(%error, "what is known of the others could not be written"),
            Err(error) => tracing::warn!(%error, "what is known of the others could not be written"),
        }
        if last {
            return;
        }
    }
}

type Versions = BTreeMap<NodeId, u64>;

fn read(directory: &Path, me: NodeId, roster: &Roster) -> anyhow::Result<Vec<SignedRecord>> {
    let child = child("read", directory).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let done = child.wait_with_output()?;
    anyhow::ensure!(done.status.success(), "the cache could not be read: {}", done.status);
    let (mut bytes, mut records) = (done.stdout.as_slice(), Vec::new());
    while let Some((node, record)) = frame(&mut bytes)? {
        if node != me
            && let Ok(record) = SignedRecord::parse(&record, roster)
        {
            records.push(record);
        }
    }
    Ok(records)
}

/// Writes what is newer than `known`, and returns what is known then.
fn write(directory: &Path, store: &Store, catalog: &Catalog, mut known: Versions) -> anyhow::Result<Versions> {
    let news: Vec<_> =
        catalog.records().filter(|r| known.get(&r.record().node).is_none_or(|k| *k < r.record().sequence)).collect();
    if news.is_empty() {
        return Ok(known);
    }
    let mut child = child("write", directory).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    if let Some(mut pipe) = child.stdin.take() {
        for record in news {
            put_frame(&mut pipe, record.record().node, record.bytes())?;
            known.insert(record.record().node, record.record().sequence);
        }
    }
    let status = child.wait()?;
    anyhow::ensure!(status.success(), "the cache could not be written: {status}");
    store.save(SEQUENCES, &serde_json::to_vec(&known)?)?;
    Ok(known)
}

/// This program again, as the one that has the database open: its memory, and a panic of the database's own, end with it.
fn child(what: &str, directory: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("remember").arg(what).arg(directory);
    die_with_parent(&mut command);
    command
}

/// What the child does: `read` the records of the cache in `directory` to standard output, or `write` those of standard input.
pub(crate) fn work(what: &str, directory: &Path) -> anyhow::Result<()> {
    let cache = Cache::open(directory)?;
    if let Some((path, why)) = cache.set_aside() {
        eprintln!("meshd: the cache was corrupt ({why}); it is kept as {} and made anew", path.display());
    }
    if what == "read" {
        let mut out = std::io::stdout().lock();
        for (node, record) in cache.records() {
            put_frame(&mut out, node, &record)?;
        }
        return Ok(out.flush()?);
    }
    let mut input = std::io::stdin().lock();
    while let Some((node, record)) = frame(&mut input)? {
        cache.put_record(node, &record)?;
    }
    Ok(cache.flush()?)
}

fn put_frame(to: &mut impl Write, node: NodeId, record: &[u8]) -> std::io::Result<()> {
    let length = u32::try_from(record.len()).map_err(std::io::Error::other)?;
    to.write_all(node.as_bytes())?;
    to.write_all(&length.to_be_bytes())?;
    to.write_all(record)
}

/// The next frame; none at the end.
pub(crate) fn frame(from: &mut impl Read) -> std::io::Result<Option<(NodeId, Vec<u8>)>> {
    let mut node = [0; 16];
    match from.read_exact(&mut node) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_RECORD {
        return Err(std::io::Error::other("a record of the cache is too long"));
    }
    let mut record = vec![0; length];
    from.read_exact(&mut record)?;
    Ok(Some((NodeId::from_bytes(node), record)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_and_damage_is_an_error() {
        let (a, b) = (NodeId::from_bytes([1; 16]), NodeId::from_bytes([2; 16]));
        let mut pipe = Vec::new();
        put_frame(&mut pipe, a, b"one").unwrap();
        put_frame(&mut pipe, b, b"").unwrap();
        let mut whole = pipe.as_slice();
        assert_eq!(frame(&mut whole).unwrap(), Some((a, b"one".to_vec())));
        assert_eq!(frame(&mut whole).unwrap(), Some((b, Vec::new())));
        assert_eq!(frame(&mut whole).unwrap(), None);
        assert!(frame(&mut &pipe[..21]).is_err());
        pipe[16] = 0xff;
        assert!(frame(&mut pipe.as_slice()).is_err());
    }
}
