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
