//! Drives the sans-I/O gossip engine of `meshd_agent::gossip`: gives it packets and timers, sends what it wants sent.
//!
//! Owns the one engine of the process, in one task. Everybody else has a [`Mailbox`]. Every queue is bounded; what does not fit is
//! dropped, because the engine repairs what a lost packet missed. Timers alone are never dropped: each is a task that waits for its place.

use std::sync::Arc;

use bytes::Bytes;
use meshd_agent::catalog::Catalog;
use meshd_agent::gossip::{Gossip, Output, Timer};
use meshd_agent::record::SignedRecord;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::Entry;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::link::Links;
use crate::membership::Membership;
use crate::task;

/// Messages waiting for the engine.
const QUEUE: usize = 512;
/// Packets being sent at once.
const MAX_SENDING: usize = 64;

enum Message {
    Packet(NodeId, Bytes),
    Session(NodeId),
    Publish(Box<SignedRecord>),
    Restore(Vec<SignedRecord>),
    Entry(Box<Entry>),
    Timer(Timer),
    Leave(oneshot::Sender<()>),
}

/// The way to the gossip task. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Mailbox(mpsc::Sender<Message>);

/// The other end of a [`Mailbox`].
pub(crate) struct Inbox(mpsc::Receiver<Message>, mpsc::WeakSender<Message>);

impl Mailbox {
    /// A mailbox and what it leads to, for [`Task::run`].
    pub(crate) fn new() -> (Self, Inbox) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let inbox = Inbox(receiver, sender.downgrade());
        (Self(sender), inbox)
    }
    /// A packet that `from` sent.
    pub(crate) fn packet(&self, from: NodeId, packet: Bytes) {
        let _ = self.0.try_send(Message::Packet(from, packet));
    }
    /// A link to `node` was opened from here: compare what both know.
    pub(crate) fn session(&self, node: NodeId) {
        let _ = self.0.try_send(Message::Session(node));
    }
    /// This node's new record.
    pub(crate) async fn publish(&self, record: SignedRecord) {
        let _ = self.0.send(Message::Publish(Box::new(record))).await;
    }
    /// Records from a cache: verified, and older than what anybody says now.
    pub(crate) async fn restore(&self, records: Vec<SignedRecord>) {
        let _ = self.0.send(Message::Restore(records)).await;
    }
    /// A roster entry that is news here, to be passed on.
    pub(crate) fn entry(&self, entry: Entry) {
        let _ = self.0.try_send(Message::Entry(Box::new(entry)));
    }
    /// Tells the others that this node is going; returns when that has been sent.
    pub(crate) async fn leave(&self) {
        let (sender, receiver) = oneshot::channel();
        if self.0.send(Message::Leave(sender)).await.is_ok() {
            let _ = receiver.await;
        }
    }
}

/// What the gossip task works with.
pub(crate) struct Task {
    pub(crate) engine: Gossip,
    pub(crate) membership: Arc<Membership>,
    pub(crate) links: Arc<Links>,
    pub(crate) catalog: watch::Sender<Arc<Catalog>>,
    /// Told which node is heard, or no longer.
    pub(crate) heard: Box<dyn Fn(NodeId, bool) + Send + Sync>,
    /// Told the sequence that this node's next record has to be above.
    pub(crate) outrun: watch::Sender<u64>,
}

impl Task {
    /// Runs the engine until every [`Mailbox`] is gone.
    pub(crate) async fn run(mut self, inbox: Inbox) {
        let Inbox(mut inbox, back) = inbox;
        let places = Arc::new(Semaphore::new(MAX_SENDING));
        let mut roster = self.membership.watch();
        self.engine.set_roster(roster.borrow_and_update().clone());
        loop {
            self.act(&places, &back).await;
            tokio::select! {
                changed = roster.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = roster.borrow_and_update().clone();
                    self.engine.set_roster(now);
                }
                message = inbox.recv() => match message {
                    Some(Message::Leave(done)) => {
                        self.engine.leave();
                        self.act(&places, &back).await;
                        // Every place is free again when everything has been sent.
                        let _ = places.acquire_many(u32::try_from(MAX_SENDING).unwrap_or(u32::MAX)).await;
                        let _ = done.send(());
                        return;
                    }
                    Some(message) => self.take(message),
                    None => return,
                }
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Packet(from, packet) => {
                if let Err(refused) = self.engine.receive(from, &packet) {
                    tracing::debug!(node = %from, %refused, "a gossip packet was not taken");
                }
            }
            Message::Session(node) => self.engine.announce(node),
            Message::Publish(record) => self.engine.publish(*record),
            Message::Restore(records) => self.engine.restore(records.into_iter().map(Arc::new)),
            Message::Entry(entry) => self.engine.offer(&entry),
            Message::Timer(timer) => self.engine.timer(timer),
            Message::Leave(_) => {}
        }
    }

    /// Does what the engine wants done.
    async fn act(&mut self, places: &Arc<Semaphore>, back: &mpsc::WeakSender<Message>) {
        for output in self.engine.drain() {
            match output {
                Output::Send { to, packet } => self.send(places, to, packet),
                Output::After { delay, timer } => {
                    let back = back.clone();
                    task::spawn(async move {
                        tokio::time::sleep(delay).await;
                        if let Some(back) = back.upgrade() {
                            let _ = back.send(Message::Timer(timer)).await;
                        }
                    });
                }
                Output::Records(_) => {
                    self.catalog.send_replace(Arc::new(self.engine.catalog()));
                }
                Output::Roster(entry) => {
                    if let Err(error) = self.membership.merge(entry).await {
                        tracing::warn!(%error, "a roster entry was not kept");
                    }
                }
                Output::Up(node) => (self.heard)(node, true),
                Output::Down(node) => (self.heard)(node, false),
                Output::Outrun(sequence) => {
                    self.outrun.send_replace(sequence);
                }
            }
        }
    }

    /// In a task of its own, so that a slow member delays nobody.
    fn send(&self, places: &Arc<Semaphore>, to: NodeId, packet: Bytes) {
        let Ok(place) = places.clone().try_acquire_owned() else { return };
        let links = self.links.clone();
        task::spawn(async move {
            if let Err(error) = links.post(to, "/v1/gossip", packet).await {
                tracing::debug!(node = %to, %error, "a gossip packet was lost");
            }
            drop(place);
        });
    }
}
