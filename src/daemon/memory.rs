//! What this node remembers of the others over a restart: their last records (a cache that may be lost) and the highest sequence of each
//! (state that may not, or an old record could be shown to us as new).
//!
//! Writes little: soon after the start, then every ten minutes if something changed, and at the end. An SD card is worn by writes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use meshd_agent::cache::{Cache, CacheError};
use meshd_agent::catalog::Catalog;
use meshd_agent::record::SignedRecord;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::Roster;
use meshd_ca::store::Store;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::control::gossip::Mailbox;
use crate::membership::Membership;

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
/// The database is open only while it is read or written: it costs some 40 MiB of memory while it is, and a daemon of 10 MiB is the aim.
pub(crate) async fn remember(
    store: Arc<Store>,
    directory: PathBuf,
    membership: Arc<Membership>,
    mailbox: Mailbox,
    mut catalog: watch::Receiver<Arc<Catalog>>,
    mut stop: watch::Receiver<bool>,
) {
    let (roster, me, from) = (membership.roster(), membership.me(), directory.clone());
    match tokio::task::spawn_blocking(move || read(&from, me, &roster)).await {
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
        let writing = tokio::task::spawn_blocking(move || write(&directory, &store, &now, known));
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

fn read(directory: &Path, me: NodeId, roster: &Roster) -> Result<Vec<SignedRecord>, CacheError> {
    let cache = Cache::open(directory)?;
    if let Some((path, why)) = cache.set_aside() {
        tracing::warn!(path = %path.display(), why, "the cache was corrupt: it is set aside and made anew");
    }
    let others = cache.records().into_iter().filter(|(node, _)| *node != me);
    Ok(others.filter_map(|(_, bytes)| SignedRecord::parse(&bytes, roster).ok()).collect())
}

/// Writes what is newer than `known`, and returns what is known then.
fn write(directory: &Path, store: &Store, catalog: &Catalog, mut known: Versions) -> anyhow::Result<Versions> {
    let news: Vec<_> =
        catalog.records().filter(|r| known.get(&r.record().node).is_none_or(|k| *k < r.record().sequence)).collect();
    if news.is_empty() {
        return Ok(known);
    }
    let cache = Cache::open(directory)?;
    for record in news {
        cache.put_record(record.record().node, record.bytes())?;
        known.insert(record.record().node, record.record().sequence);
    }
    cache.flush()?;
    store.save(SEQUENCES, &serde_json::to_vec(&known)?)?;
    Ok(known)
}
