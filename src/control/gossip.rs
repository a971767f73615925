//! Drives the sans-I/O gossip engine of `meshd_agent::gossip`: gives it packets and timers, sends what it wants sent.
//!
//! Owns the one engine of the process, in one task. Everybody else has a [`Mailbox`]. Every queue is bounded; what does not fit is
//! dropped, because the engine repairs what a lost packet missed.

use std::sync::Arc;

use bytes::Bytes;
use meshd_agent::catalog::Catalog;
use meshd_agent::gossip::{Gossip, Output};
use meshd_agent::record::SignedRecord;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::{Entry, Roster};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::link::Links;
use crate::membership::Membership;

/// Messages waiting for the engine.
const QUEUE: usize = 512;
/// Packets being sent at once.
const MAX_SENDING: usize = 64;

enum Message {
    Packet(NodeId, Bytes),
    Reply(NodeId, Bytes, oneshot::Sender<Vec<u8>>),
    Apply(NodeId, Bytes),
    Session(NodeId),
    Publish(Box<SignedRecord>),
    Entry(Box<Entry>),
    Timer(meshd_agent::gossip::Timer),
    Leave(oneshot::Sender<()>),
}

/// The way to the gossip task. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Mailbox(mpsc::Sender<Message>);

impl Mailbox {
    /// A mailbox and what it leads to, for [`run`].
    pub(crate) fn new() -> (Self, Inbox) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender.clone()), Inbox(receiver, sender))
    }
    /// A packet that `from` sent.
    pub(crate) fn packet(&self, from: NodeId, packet: Bytes) {
        let _ = self.0.try_send(Message::Packet(from, packet));
    }
    /// The answer to a digest that `from` sent; `None` when the engine is busy or gone.
    pub(crate) async fn reply(&self, from: NodeId, digest: Bytes) -> Option<Vec<u8>> {
        let (sender, receiver) = oneshot::channel();
        self.0.try_send(Message::Reply(from, digest, sender)).ok()?;
        receiver.await.ok()
    }
    /// A link to `node` has opened: compare what both know.
    pub(crate) fn session(&self, node: NodeId) {
        let _ = self.0.try_send(Message::Session(node));
    }
    /// This node's new record.
    pub(crate) async fn publish(&self, record: SignedRecord) {
        let _ = self.0.send(Message::Publish(Box::new(record))).await;
    }
    /// A roster entry that is news here, to be passed on.
    pub(crate) fn entry(&self, entry: Entry) {
        let _ = self.0.try_send(Message::Entry(Box::new(entry)));
    }
    /// Tells the others that this node is going; returns when that is on its way.
    pub(crate) async fn leave(&self) {
        let (sender, receiver) = oneshot::channel();
        if self.0.send(Message::Leave(sender)).await.is_ok() {
            let _ = receiver.await;
        }
    }
}

/// The other end of a [`Mailbox`].
pub(crate) struct Inbox(mpsc::Receiver<Message>, mpsc::Sender<Message>);

/// What the gossip task works with.
pub(crate) struct Task {
    pub(crate) engine: Gossip,
    pub(crate) membership: Arc<Membership>,
    pub(crate) links: Arc<Links>,
    pub(crate) catalog: watch::Sender<Arc<Catalog>>,
    /// Told which node is heard, or no longer.
    pub(crate) heard: Box<dyn Fn(NodeId, bool) + Send + Sync>,
}

/// Runs the engine until every [`Mailbox`] is gone.
pub(crate) async fn run(mut task: Task, inbox: Inbox) {
    let Inbox(mut inbox, sender) = inbox;
    let mut roster = task.membership.watch();
    let mut sending = Sending { links: task.links.clone(), places: Arc::new(Semaphore::new(MAX_SENDING)), back: sender };
    task.engine.set_roster(roster.borrow_and_update().clone());
    task.act(&mut sending).await;
    loop {
        tokio::select! {
            changed = roster.changed() => {
                if changed.is_err() {
                    return;
                }
                let now: Arc<Roster> = roster.borrow_and_update().clone();
                task.engine.set_roster(now);
            }
            message = inbox.recv() => match message {
                Some(message) => task.take(message, &sending),
                None => return,
            }
        }
        task.act(&mut sending).await;
    }
}

/// The outgoing side: packets in tasks of their own, so that a slow member delays nobody.
struct Sending {
    links: Arc<Links>,
    places: Arc<Semaphore>,
    back: mpsc::Sender<Message>,
}

impl Sending {
    fn packet(&self, to: NodeId, packet: Bytes) {
        let Ok(place) = self.places.clone().try_acquire_owned() else { return };
        let links = self.links.clone();
        tokio::spawn(async move {
            if let Err(error) = links.post(to, "/v1/gossip", packet).await {
                tracing::debug!(node = %to, %error, "a gossip packet was lost");
            }
            drop(place);
        });
    }

    fn digest(&self, to: NodeId, digest: Bytes) {
        let (links, back) = (self.links.clone(), self.back.clone());
        tokio::spawn(async move {
            match links.post(to, "/v1/digest", digest).await {
                Ok(answer) => {
                    let _ = back.send(Message::Apply(to, answer)).await;
                }
                Err(error) => tracing::debug!(node = %to, %error, "could not compare what both know"),
            }
        });
    }
}
