//! Drives `meshd_agent::addresses`: makes the dials it wants, tells it how they went, and puts its answer into the kernel.
//!
//! Owns the one [`Bindings`] of the process, in one task. Readers get snapshots from [`Book`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use meshd_agent::addresses::{Bindings, Bound, Claimant, Claimed, Contested, Failure, Own, Presence, Probe, Warning};
use meshd_agent::catalog::Catalog;
use meshd_agent::record;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::Roster;
use meshd_ca::store::{Store, StoreError};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::lan::Addresses;
use super::member::Heard;
use super::rules::Rules;
use crate::config::{Config, Mode};
use crate::control::link::{LinkError, Links};
use crate::intercept::process::since_boot;
use crate::task;

/// News waiting for the task.
const QUEUE: usize = 256;
/// The file of what was bound where.
const FILE: &str = "bindings";
/// How often everything is looked at even if nothing happens.
const LOOK: Duration = Duration::from_secs(5);

/// How long after a failed write the next is tried, in milliseconds.
const RETRY: u64 = 15_000;
/// For how long a connection may come that the kernel captured before the capture set lost its address.
const LATE: Duration = Duration::from_secs(1);

/// What the task is told besides the catalog.
pub(crate) enum News {
    /// Gossip hears a node, or no longer does.
    Heard(NodeId, bool),
    /// A connection to this address went wrong.
    Suspect(IpAddr),
    /// A probe came back.
    Probed(Probe, Result<NodeId, LinkError>),
}

/// What the others may know of the addresses.
#[derive(Debug, Clone, Default)]
pub(crate) struct Snapshot {
    /// The capture set.
    pub(crate) captured: BTreeMap<IpAddr, Bound>,
    /// Who was bound at addresses that are not captured any more, and until when: the kernel may have handed a connection over before it heard that.
    pub(crate) leaving: BTreeMap<IpAddr, (Bound, Instant)>,
    /// Addresses that two members answer for.
    pub(crate) contested: Vec<Contested>,
    /// Addresses whose owner does not answer.
    pub(crate) warnings: Vec<Warning>,
}

/// What [`Snapshot::leaving`] is when the capture set becomes this.
fn leaving(before: &Snapshot, captured: &BTreeMap<IpAddr, Bound>, now: Instant) -> BTreeMap<IpAddr, (Bound, Instant)> {
    let earlier = before.leaving.iter().filter(|(_, (_, until))| now < *until).map(|(ip, left)| (*ip, *left));
    let just = before.captured.iter().map(|(ip, bound)| (*ip, (*bound, now + LATE)));
    earlier.chain(just).filter(|(ip, _)| !captured.contains_key(ip)).collect()
}

/// Everybody else's side of the task.
#[derive(Clone)]
pub(crate) struct Book {
    news: mpsc::Sender<News>,
    latest: watch::Receiver<Arc<Snapshot>>,
}

impl Book {
    /// Tells the task something; dropped when it is behind, since it looks at everything again by itself.
    pub(crate) fn tell(&self, news: News) {
        let _ = self.news.try_send(news);
    }
    /// The state now.
    pub(crate) fn latest(&self) -> Arc<Snapshot> {
        self.latest.borrow().clone()
    }
}

/// What the task works with.
pub(crate) struct Task {
    pub(crate) me: NodeId,
    pub(crate) config: watch::Receiver<Arc<Config>>,
    pub(crate) links: Arc<Links>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) catalog: watch::Receiver<Arc<Catalog>>,
    pub(crate) roster: watch::Receiver<Arc<Roster>>,
    pub(crate) own: watch::Receiver<Addresses>,
    pub(crate) heard: Arc<Heard>,
    pub(crate) store: Arc<Store>,
}

/// The task's side of a [`Book`].
pub(crate) struct Side {
    news: mpsc::Sender<News>,
    inbox: mpsc::Receiver<News>,
    publish: watch::Sender<Arc<Snapshot>>,
}

/// A book with nothing in it, and the side that fills it.
pub(crate) fn book() -> (Book, Side) {
    let (news, inbox) = mpsc::channel(QUEUE);
    let (publish, latest) = watch::channel(Arc::default());
    (Book { news: news.clone(), latest }, Side { news, inbox, publish })
}

impl Side {
    /// Fills the book until the channels of `task` end.
    pub(crate) async fn run(self, task: Task) {
        task.run(self.news, self.inbox, self.publish).await;
    }
}

impl Task {
    async fn run(mut self, news: mpsc::Sender<News>, mut inbox: mpsc::Receiver<News>, publish: watch::Sender<Arc<Snapshot>>) {
        let mut bindings = Bindings::new(self.me, remembered(&self.store));
        let (mut saved, mut again) = (bindings.version(), 0);
        self.update(&mut bindings);
        loop {
            for probe in bindings.due(now()) {
                let (links, news) = (self.links.clone(), news.clone());
                task::spawn(async move {
                    let owner = links.prove(SocketAddr::new(probe.ip, probe.port)).await;
                    let _ = news.send(News::Probed(probe, owner)).await;
                });
            }
            self.show(&bindings, &publish);
            if bindings.version() != saved && now() >= again {
                let version = bindings.version();
                match self.save(&bindings).await {
                    true => saved = version,
                    false => again = now() + RETRY,
                }
            }
            let pause = bindings.next_due().map_or(LOOK, |at| Duration::from_millis(at.saturating_sub(now()))).min(LOOK);
            tokio::select! {
                changed = self.catalog.changed() => match changed {
                    Ok(()) => self.update(&mut bindings),
                    Err(_) => return,
                },
                changed = self.own.changed() => match changed {
                    Ok(()) => self.update(&mut bindings),
                    Err(_) => return,
                },
                Some(first) = inbox.recv() => {
                    take(&mut bindings, first);
                    while let Ok(more) = inbox.try_recv() {
                        take(&mut bindings, more);
                    }
                }
                () = tokio::time::sleep(pause) => self.update(&mut bindings),
            }
        }
    }

    /// Remembers who was bound where: a strict member stays captured over our restart without a new handshake. Whether that is on disk.
    async fn save(&self, bindings: &Bindings) -> bool {
        let remembered = bindings.remember();
        let store = self.store.clone();
        let written = task::blocking(move || {
            let bytes = serde_json::to_vec(&remembered).map_err(std::io::Error::other)?;
            store.save(FILE, &bytes).map_err(std::io::Error::other)
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(%error, "the proven addresses could not be saved; trying again");
            return false;
        }
        true
    }

    fn update(&mut self, bindings: &mut Bindings) {
        // News may have been dropped when there was much of it; this makes up for it.
        for (node, up) in self.heard.all() {
            bindings.heard(node, up, now());
        }
        let catalog = self.catalog.borrow_and_update().clone();
        let own = self.own.borrow_and_update().clone();
        let strict = self.config.borrow().mode == Mode::Strict;
        let claimants: Vec<Claimant> = catalog.records().map(|r| claimant(r.record())).filter(|c| c.node != self.me).collect();
        let roster = self.roster.borrow().clone();
        for (old, new) in roster.replaced().filter(|(old, new)| catalog.record(*old).is_none() && catalog.record(*new).is_some())
        {
            bindings.replaced(old, new);
        }
        bindings.update(&claimants, &Own { addresses: (*own.own).clone(), strict }, now());
    }

    fn show(&self, bindings: &Bindings, publish: &watch::Sender<Arc<Snapshot>>) {
        let before = publish.borrow().clone();
        let snapshot = Snapshot {
            captured: bindings.captured().clone(),
            leaving: leaving(&before, bindings.captured(), Instant::now()),
            contested: bindings.contested(),
            warnings: bindings.warnings(),
        };
        if before.captured != snapshot.captured {
            // Readers first: a connection that the kernel hands over must find its member.
            publish.send_replace(Arc::new(snapshot));
            let set: BTreeSet<IpAddr> = bindings.captured().keys().copied().collect();
            tracing::info!(addresses = set.len(), "capture set changed");
            self.rules.peers(set);
        } else if before.contested != snapshot.contested || before.warnings != snapshot.warnings {
            for w in snapshot.warnings.iter().filter(|w| !before.warnings.contains(w)) {
                tracing::warn!(address = %w.ip, owner = %w.owner, captured = w.captured, found = ?w.found, "a member does not answer at its address");
            }
            for c in snapshot.contested.iter().filter(|c| !before.contested.contains(c)) {
                tracing::warn!(address = %c.ip, owner = %c.owner, challenger = %c.challenger, "two members answer for one address");
            }
            publish.send_replace(Arc::new(snapshot));
        }
    }
}

/// What was bound where when it was last saved; nothing if that cannot be read, which only means new handshakes.
pub(crate) fn remembered(store: &Store) -> Vec<(IpAddr, NodeId)> {
    match store.load(FILE) {
        Ok(Some(saved)) => serde_json::from_slice(&saved.bytes).unwrap_or_default(),
        Ok(None) => Vec::new(),
        Err(error) => {
            tracing::warn!(%error, "the proven addresses of before cannot be read");
            Vec::new()
        }
    }
}

/// Forgets it.
pub(crate) fn forget(store: &Store) -> Result<(), StoreError> {
    store.remove(FILE)
}

fn take(bindings: &mut Bindings, news: News) {
    match news {
        News::Heard(node, up) => bindings.heard(node, up, now()),
        News::Suspect(ip) => bindings.suspect(ip, now()),
        News::Probed(probe, Ok(owner)) => bindings.proved(probe.ip, probe.port, owner, now()),
        News::Probed(probe, Err(error)) => {
            tracing::debug!(address = %probe.ip, expected = %probe.expect, %error, "a probe proved nobody");
            match error {
                // Our own key answered, or another key did: that is a proof too, of somebody unexpected.
                LinkError::Itself(_, me) => bindings.proved(probe.ip, probe.port, me, now()),
                LinkError::Stranger(..) | LinkError::Refused(..) => {
                    bindings.failed(probe.ip, probe.port, Failure::Stranger, now())
                }
                _ => bindings.failed(probe.ip, probe.port, Failure::Silence, now()),
            }
        }
    }
}

fn claimant(record: &record::NodeRecord) -> Claimant {
    Claimant {
        node: record.node,
        sequence: record.sequence,
        port: record.port,
        strict: record.mode == record::Mode::Strict,
        presence: match record.presence {
            record::Presence::Running => Presence::Running,
            record::Presence::Restarting => Presence::Restarting,
            record::Presence::Stopped => Presence::Stopped,
        },
        addresses: record.addresses.iter().map(|a| Claimed { ip: a.ip, shared: a.shared }).collect(),
    }
}

fn now() -> u64 {
    u64::try_from(since_boot().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use meshd_ca::keys::PrivateKey;

    use super::*;

    #[test]
    fn who_is_not_captured_any_more_is_known_for_a_moment() {
        let [a, b] = [1, 2].map(|n| IpAddr::from([10, 0, 0, n]));
        let bound = Bound { node: PrivateKey::generate().unwrap().public().node_id(), port: 6374 };
        let now = Instant::now();
        let both = Snapshot { captured: [(a, bound), (b, bound)].into(), ..Snapshot::default() };
        let one =
            Snapshot { captured: [(b, bound)].into(), leaving: leaving(&both, &[(b, bound)].into(), now), ..Snapshot::default() };
        assert_eq!(one.leaving, [(a, (bound, now + LATE))].into());
        let none = leaving(&one, &BTreeMap::new(), now + LATE / 2);
        assert_eq!(none.keys().copied().collect::<Vec<_>>(), [a, b]);
        assert_eq!(leaving(&one, &BTreeMap::new(), now + LATE), [(b, (bound, now + 2 * LATE))].into());
        assert_eq!(leaving(&one, &[(a, bound), (b, bound)].into(), now), BTreeMap::new(), "it is back");
    }
}
