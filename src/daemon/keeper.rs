//! Keeps this node's own record true: looks at listeners and addresses, signs and publishes when something changed.
//!
//! Owns the record's sequence, which only grows, over restarts too: the file is ahead of what was used, so a pulled plug never makes a
//! node repeat itself.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use meshd_agent::record::{self, Address, Listener, MAX_ADDRESSES, MAX_ROOTS, NodeRecord, Presence, Roots, SignedRecord};
use meshd_ca::bundle::RootId;
use meshd_ca::identity::Workload;
use meshd_ca::keys::PrivateKey;
use meshd_ca::store::{Store, StoreError};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::kernel::Owners;
use super::lan::Addresses;
use super::listeners;
use crate::config::{Config, Mode};
use crate::control::gossip::Mailbox;
use crate::identity::svids::Svids;
use crate::intercept::sockdiag::SockDiag;
use crate::task;

/// How often the listeners of this host are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// The file: the highest sequence that may have been used.
pub(crate) const SEQUENCE: &str = "sequence";
/// How far the file is ahead: one write in so many changes.
const STEP: u64 = 1000;

/// What the record is made from.
pub(crate) struct Keeper {
    pub(crate) key: Arc<PrivateKey>,
    pub(crate) owners: Arc<Owners>,
    pub(crate) diag: SockDiag,
    pub(crate) config: watch::Receiver<Arc<Config>>,
    pub(crate) addresses: watch::Receiver<Addresses>,
    pub(crate) presence: watch::Receiver<Presence>,
    /// The presence that was published last.
    pub(crate) told: watch::Sender<Option<Presence>>,
    /// A sequence that somebody has seen of us and that the next record must be above.
    pub(crate) outrun: watch::Receiver<u64>,
    pub(crate) mailbox: Mailbox,
    pub(crate) svids: Arc<Svids>,
    /// Where the newest listeners are put for the data plane.
    pub(crate) looked: Arc<ArcSwap<Vec<Listener>>>,
    pub(crate) sequence: Sequence,
    pub(crate) port: u16,
    pub(crate) zone: Option<String>,
    /// The root this node signs with.
    pub(crate) signs: watch::Receiver<Option<RootId>>,
}

impl Keeper {
    /// Looks and publishes until the daemon ends the task.
    pub(crate) async fn run(mut self) {
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut published: Option<NodeRecord> = None;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                changed = self.addresses.changed() => if changed.is_err() { return },
                changed = self.presence.changed() => if changed.is_err() { return },
                changed = self.signs.changed() => if changed.is_err() { return },
                changed = self.outrun.changed() => {
                    if changed.is_err() { return }
                    self.sequence.outrun(*self.outrun.borrow_and_update());
                    published = None;
                }
            }
            let except = listeners::except(&self.config.borrow());
            match listeners::look(&self.diag, &self.owners, &except) {
                Ok(found) => self.listeners(found),
                Err(error) => tracing::warn!(%error, "cannot see what listens on this host"),
            }
            let draft = self.draft();
            if published.as_ref().is_some_and(|old| NodeRecord { sequence: 0, ..old.clone() } == draft) {
                continue;
            }
            match self.publish(draft).await {
                Ok(record) => {
                    self.told.send_replace(Some(record.presence));
                    published = Some(record);
                }
                Err(error) => tracing::error!(%error, "this node's record could not be published"),
            }
        }
    }

    fn listeners(&mut self, found: Vec<Listener>) {
        let now = self.looked.load();
        if **now == found {
            return;
        }
        let workloads: BTreeSet<Workload> = found.iter().map(|l| l.workload.clone()).collect();
        tracing::debug!(listeners = found.len(), workloads = workloads.len(), "listeners changed");
        self.svids.set_listeners(&workloads);
        self.looked.store(Arc::new(found));
    }

    /// The record as it should be now, with sequence 0.
    fn draft(&mut self) -> NodeRecord {
        let addresses = self.addresses.borrow_and_update().published.clone();
        NodeRecord {
            node: self.key.public().node_id(),
            sequence: 0,
            port: self.port,
            addresses: addresses.iter().take(MAX_ADDRESSES).map(|ip| Address { ip: *ip, shared: false }).collect(),
            zone: self.zone.clone(),
            mode: match self.config.borrow().mode {
                Mode::Permissive => record::Mode::Permissive,
                Mode::Strict => record::Mode::Strict,
                Mode::Audit => record::Mode::Audit,
            },
            presence: *self.presence.borrow_and_update(),
            listeners: (**self.looked.load()).clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            roots: Roots {
                trusted: self.svids.trusted().into_iter().take(MAX_ROOTS).collect(),
                shown: self.svids.shown().into_iter().take(MAX_ROOTS).collect(),
                signs: *self.signs.borrow_and_update(),
            },
        }
    }

    async fn publish(&mut self, draft: NodeRecord) -> anyhow::Result<NodeRecord> {
        let record = NodeRecord { sequence: self.sequence.next().await?, ..draft };
        let signed = SignedRecord::sign(&self.key, record.clone())?;
        self.mailbox.publish(signed).await;
        Ok(record)
    }
}

/// Numbers that only grow, over restarts too.
pub(crate) struct Sequence {
    store: Arc<Store>,
    last: u64,
    saved: u64,
}

impl Sequence {
    /// Goes on after whatever may have been used before.
    pub(crate) fn load(store: Arc<Store>) -> Result<Self, StoreError> {
        let last = match store.load(SEQUENCE)? {
            Some(saved) => String::from_utf8_lossy(&saved.bytes).trim().parse().unwrap_or(0),
            None => 0,
        };
        Ok(Self { store, last, saved: last })
    }

    /// Goes on above `seen`.
    pub(crate) fn outrun(&mut self, seen: u64) {
        self.last = self.last.max(seen);
    }

    /// The next number; its bound is on disk before it is used. On a disk that cannot be written it is used all the same: a node that
    /// repeats itself after the next start is told so by whoever has seen more of it ([`Sequence::outrun`]), and one that says
    /// nothing is lost to the others.
    pub(crate) async fn next(&mut self) -> anyhow::Result<u64> {
        if self.last >= self.saved {
            let (store, saved) = (self.store.clone(), self.last + STEP);
            match task::blocking(move || store.save(SEQUENCE, saved.to_string().as_bytes())).await? {
                Ok(()) => self.saved = saved,
                Err(error) => tracing::warn!(%error, "the number of this node's record could not be saved; going on"),
            }
        }
        self.last += 1;
        Ok(self.last)
    }
}
