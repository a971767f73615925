//! Failure detection: the `foca` engine, its identities and its packets.
//!
//! Owns what is on the wire inside a SWIM packet and takes packets apart before the engine sees them: news is handled by
//! [`super::Gossip`], updates about members are filtered there, and only the rest is put together again and handed in. So the
//! engine never holds anything that the roster does not.

use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use foca::{
    BroadcastHandler, Foca, Header, Identity, Invalidates, Member, Message, Notification, PeriodicParams, Runtime, State,
};
use meshd_ca::identity::NodeId;
use rand::rngs::SmallRng;
use thiserror::Error;

use super::wire::{Item, Key, MAX_PACKET, Reader, Table};

/// How often a node probes one other.
pub(super) const PROBE_PERIOD: Duration = Duration::from_millis(1500);
const PROBE_RTT: Duration = Duration::from_millis(500);
const GOSSIP_EVERY: Duration = Duration::from_millis(250);
const FANOUT: NonZeroUsize = NonZeroUsize::new(3).unwrap();

/// A life of a node. A later life wins over an earlier one, whatever was said of that.
///
/// Anybody may say that a life ended; the node then takes the next one. So that nobody can claim a life that the node could not
/// go beyond, the generation must be a sequence the node itself has signed a record for, see [`super::Gossip`]; within one,
/// renewals are few and free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) node: NodeId,
    pub(super) generation: u64,
    pub(super) renewal: u16,
}

impl Life {
    fn order(&self) -> (u64, u16) {
        (self.generation, self.renewal)
    }
}

impl Identity for Life {
    type Addr = NodeId;

    /// Doubles, so that a node is past any forged renewal in sixteen steps at most; then it needs a new generation.
    fn renew(&self) -> Option<Self> {
        let renewal = self.renewal.saturating_mul(2).saturating_add(1);
        (renewal > self.renewal).then_some(Self { renewal, ..*self })
    }
    fn addr(&self) -> NodeId {
        self.node
    }
    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.order() > adversary.order()
    }
}

/// Something new that travels along with failure detection.
pub(super) enum News<'a> {
    /// A record exists, and the sender has it.
    Record(Item),
    /// A roster entry, whole: few, small and urgent.
    Entry(&'a [u8]),
}

impl<'a> News<'a> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Record(item) => item.put(&mut out),
            Self::Entry(bytes) => {
                out.put_u8(Table::Roster as u8);
                out.put_slice(bytes);
            }
        }
        out
    }

    fn decode(bytes: &'a [u8]) -> Option<Self> {
        match bytes.split_first()? {
            (0, entry) => (!entry.is_empty()).then_some(Self::Entry(entry)),
            _ => {
                let mut r = Reader(bytes);
                let item = Item::take(&mut r)?;
                r.0.is_empty().then_some(Self::Record(item))
            }
        }
    }
}

/// A SWIM packet taken apart.
pub(super) struct Packet<'a> {
    pub(super) header: Header<Life>,
    pub(super) members: Vec<Member<Life>>,
    pub(super) news: Vec<News<'a>>,
}

impl<'a> Packet<'a> {
    /// None where it is malformed.
    pub(super) fn parse(data: &'a [u8]) -> Option<Self> {
        let mut r = Reader(data);
        let header = take_header(&mut r)?;
        let (mut members, mut news) = (Vec::new(), Vec::new());
        match header.message {
            Message::Announce | Message::TurnUndead => return r.0.is_empty().then_some(Self { header, members, news }),
            Message::Broadcast => return None,
            _ => {}
        }
        if !r.0.is_empty() {
            for _ in 0..r.u16()? {
                members.push(take_member(&mut r)?);
            }
            while !r.0.is_empty() {
                news.push(News::decode(r.sized()?)?);
            }
        }
        Some(Self { header, members, news })
    }

    /// How often the packet says that a node is down.
    pub(super) fn doubts(&self, node: NodeId) -> u32 {
        let down = self.members.iter().filter(|m| m.id().node == node && m.state() == State::Down).count();
        u32::from(self.header.message == Message::TurnUndead).saturating_add(u32::try_from(down).unwrap_or(u32::MAX))
    }

    /// The node a probe is made for or asked for by way of a third.
    pub(super) fn third(&self) -> Option<NodeId> {
        match &self.header.message {
            Message::PingReq { target: t, .. } | Message::IndirectAck { target: t, .. } => Some(t.node),
            Message::IndirectPing { origin: o, .. } | Message::ForwardedAck { origin: o, .. } => Some(o.node),
            _ => None,
        }
    }
}

/// What the engine wants done.
#[derive(Default)]
pub(super) struct Wishes {
    pub(super) sends: Vec<(NodeId, Bytes)>,
    pub(super) timers: Vec<(Duration, foca::Timer<Life>)>,
    pub(super) notes: Vec<Note>,
}

/// What the engine noticed.
pub(super) enum Note {
    Up(NodeId),
    Down(NodeId),
    /// This life ended and has no renewal left.
    Ended,
}

impl Runtime<Life> for Wishes {
    fn notify(&mut self, notification: Notification<'_, Life>) {
        match notification {
            Notification::MemberUp(l) => self.notes.push(Note::Up(l.node)),
            Notification::MemberDown(l) => self.notes.push(Note::Down(l.node)),
            Notification::Defunct => self.notes.push(Note::Ended),
            _ => {}
        }
    }
    fn send_to(&mut self, to: Life, data: &[u8]) {
        self.sends.push((to.node, super::wire::Message::Swim(data).encode()));
    }
    fn submit_after(&mut self, event: foca::Timer<Life>, after: Duration) {
        self.timers.push((after, event));
    }
}

/// The engine with what it wants done since it was last asked. Its errors are about packets that were checked before, or timers
/// of a life that is over: nothing anybody could act on.
pub(super) struct Swim {
    foca: Foca<Life, Wire, SmallRng, Handler>,
    pub(super) wishes: Wishes,
    size: usize,
}

impl Swim {
    pub(super) fn new(life: Life, rng: SmallRng) -> Self {
        Self { foca: Foca::with_custom_broadcast(life, config(1), rng, Wire, Handler), wishes: Wishes::default(), size: 1 }
    }

    pub(super) fn life(&self) -> Life {
        *self.foca.identity()
    }

    /// Starts another life.
    pub(super) fn live(&mut self, life: Life) {
        let _ = self.foca.change_identity(life, &mut self.wishes);
    }

    /// Takes the head of a packet. What it says of other members goes by way of [`Swim::apply`], so that it is not lost where
    /// the engine does not answer the sender, for instance because it was thought down.
    pub(super) fn receive(&mut self, header: &Header<Life>) {
        let mut data = Vec::with_capacity(3 * LIFE + 4);
        put_header(header, &mut data);
        let _ = self.foca.handle_data(&data, &mut self.wishes);
    }

    /// Takes what is said of members, after it was filtered.
    pub(super) fn apply(&mut self, members: impl IntoIterator<Item = Member<Life>>) {
        let _ = self.foca.apply_many(members.into_iter(), true, &mut self.wishes);
    }

    pub(super) fn timer(&mut self, timer: foca::Timer<Life>) {
        let _ = self.foca.handle_timer(timer, &mut self.wishes);
    }

    /// Asks a node to take us in, whichever of its lives it is in.
    pub(super) fn announce(&mut self, node: NodeId) {
        let _ = self.foca.announce(Life { node, generation: 0, renewal: 0 }, &mut self.wishes);
    }

    /// Says goodbye.
    pub(super) fn leave(&mut self) {
        let _ = self.foca.leave_cluster(&mut self.wishes);
    }

    pub(super) fn spread(&mut self, news: &News<'_>) {
        let _ = self.foca.add_broadcast(&news.encode());
    }

    /// Forgets the nodes that are not to be kept; those that were up are noticed as down.
    pub(super) fn retain(&mut self, keep: impl Fn(NodeId) -> bool) {
        let gone: Vec<Life> = self.foca.iter_membership_state().map(|m| *m.id()).filter(|l| !keep(l.node)).collect();
        for life in gone {
            let _ = self.foca.apply_many(std::iter::once(Member::down(life)), false, &mut self.wishes);
            let _ = self.foca.handle_timer(foca::Timer::RemoveDown(life), &mut self.wishes);
        }
    }

    /// Adapts patience and persistence to how many nodes there are.
    pub(super) fn resize(&mut self) {
        let size = self.foca.num_members() + 1;
        if size != self.size {
            self.size = size;
            let _ = self.foca.set_config(config(size));
        }
    }
}

/// How long a suspected node has to answer, among `size` nodes: word of the suspicion and of its refutation must have time to
/// spread.
pub(super) fn patience(size: usize) -> Duration {
    let log = (size.max(1) as f64).log10().max(1.0);
    Duration::from_millis((5_000.0 * log) as u64)
}

/// How often each node repeats a piece of news: a node misses all of these with a chance of about e^-repeats.
fn repeats(size: usize) -> NonZeroU8 {
    let r = 4.0 + 2.5 * (size as f64 + 1.0).ln();
    NonZeroU8::new(r.min(100.0) as u8).unwrap_or(NonZeroU8::MIN)
}

fn config(size: usize) -> foca::Config {
    foca::Config {
        probe_period: PROBE_PERIOD,
        probe_rtt: PROBE_RTT,
        num_indirect_probes: FANOUT,
        max_transmissions: repeats(size),
        suspect_to_down_after: patience(size),
        // Never forgotten: there are no more than the roster has, and a partition may last.
        remove_down_after: None,
        max_packet_size: NonZeroUsize::MIN.saturating_add(MAX_PACKET - 2), // one byte is the kind
        notify_down_members: true,
        // A feed grows with the mesh; what it would find is found by `Gossip`'s tick and by synchronisation.
        periodic_announce: None,
        periodic_announce_to_down_members: None,
        periodic_gossip: Some(PeriodicParams { frequency: GOSSIP_EVERY, num_members: FANOUT }),
    }
}

/// What news is about: later news about the same replaces it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Topic(Table, Key);

impl Invalidates for Topic {
    fn invalidates(&self, other: &Self) -> bool {
        self == other
    }
}

#[derive(Debug, Error)]
#[error("news that was not made here")]
pub(super) struct NotNews;

/// Names news that [`super::Gossip`] has judged already.
struct Handler;

impl BroadcastHandler<Life> for Handler {
    type Key = Topic;
    type Error = NotNews;
    fn receive_item(&mut self, data: &[u8], _sender: Option<&Life>) -> Result<Option<Topic>, NotNews> {
        match News::decode(data).ok_or(NotNews)? {
            News::Record(item) => Ok(Some(Topic(item.table, item.key))),
            News::Entry(entry) => Ok(Some(Topic(Table::Roster, super::sync::entry_key(entry)))),
        }
    }
}

#[derive(Debug, Error)]
#[error("not a SWIM packet, or no room for one")]
pub(super) struct Garbled;

/// Fixed-width encoding, all numbers in network order.
struct Wire;

const LIFE: usize = 26;
const MEMBER: usize = LIFE + 3;

fn put_life(l: &Life, out: &mut impl BufMut) {
    out.put_slice(l.node.as_bytes());
    out.put_u64(l.generation);
    out.put_u16(l.renewal);
}

fn take_life(r: &mut Reader<'_>) -> Option<Life> {
    Some(Life { node: NodeId::from_bytes(r.array()?), generation: r.u64()?, renewal: r.u16()? })
}

fn put_member(m: &Member<Life>, out: &mut impl BufMut) {
    put_life(m.id(), out);
    out.put_u16(m.incarnation());
    out.put_u8(match m.state() {
        State::Alive => 0,
        State::Suspect => 1,
        State::Down => 2,
    });
}

fn take_member(r: &mut Reader<'_>) -> Option<Member<Life>> {
    let (life, incarnation) = (take_life(r)?, r.u16()?);
    let state = match r.u8()? {
        0 => State::Alive,
        1 => State::Suspect,
        2 => State::Down,
        _ => return None,
    };
    Some(Member::new(life, incarnation, state))
}

fn put_header(h: &Header<Life>, out: &mut impl BufMut) {
    put_life(&h.src, out);
    out.put_u16(h.src_incarnation);
    put_life(&h.dst, out);
    let (kind, third, number) = match &h.message {
        Message::Ping(n) => (0, None, Some(*n)),
        Message::Ack(n) => (1, None, Some(*n)),
        Message::PingReq { target, probe_number } => (2, Some(target), Some(*probe_number)),
        Message::IndirectPing { origin, probe_number } => (3, Some(origin), Some(*probe_number)),
        Message::IndirectAck { target, probe_number } => (4, Some(target), Some(*probe_number)),
        Message::ForwardedAck { origin, probe_number } => (5, Some(origin), Some(*probe_number)),
        Message::Announce => (6, None, None),
        Message::Feed => (7, None, None),
        Message::Gossip => (8, None, None),
        Message::Broadcast => (9, None, None),
        Message::TurnUndead => (10, None, None),
    };
    out.put_u8(kind);
    if let Some(life) = third {
        put_life(life, out);
    }
    if let Some(n) = number {
        out.put_u8(n);
    }
}

fn take_header(r: &mut Reader<'_>) -> Option<Header<Life>> {
    let (src, src_incarnation, dst) = (take_life(r)?, r.u16()?, take_life(r)?);
    let message = match r.u8()? {
        0 => Message::Ping(r.u8()?),
        1 => Message::Ack(r.u8()?),
        2 => Message::PingReq { target: take_life(r)?, probe_number: r.u8()? },
        3 => Message::IndirectPing { origin: take_life(r)?, probe_number: r.u8()? },
        4 => Message::IndirectAck { target: take_life(r)?, probe_number: r.u8()? },
        5 => Message::ForwardedAck { origin: take_life(r)?, probe_number: r.u8()? },
        6 => Message::Announce,
        7 => Message::Feed,
        8 => Message::Gossip,
        9 => Message::Broadcast,
        10 => Message::TurnUndead,
        _ => return None,
    };
    Some(Header { src, src_incarnation, dst, message })
}

/// Reads from the engine's buffer, which is contiguous, and moves it on by what was read.
fn read<T>(mut buf: impl Buf, take: impl FnOnce(&mut Reader<'_>) -> Option<T>) -> Result<T, Garbled> {
    let mut r = Reader(buf.chunk());
    let before = r.0.len();
    let value = take(&mut r).ok_or(Garbled)?;
    let read = before - r.0.len();
    buf.advance(read);
    Ok(value)
}

impl foca::Codec<Life> for Wire {
    type Error = Garbled;

    fn encode_header(&mut self, header: &Header<Life>, mut buf: impl BufMut) -> Result<(), Garbled> {
        if buf.remaining_mut() < 3 * LIFE + 4 {
            return Err(Garbled);
        }
        put_header(header, &mut buf);
        Ok(())
    }
    fn decode_header(&mut self, buf: impl Buf) -> Result<Header<Life>, Garbled> {
        read(buf, take_header)
    }
    fn encode_member(&mut self, member: &Member<Life>, mut buf: impl BufMut) -> Result<(), Garbled> {
        if buf.remaining_mut() < MEMBER {
            return Err(Garbled);
        }
        put_member(member, &mut buf);
        Ok(())
    }
    fn decode_member(&mut self, buf: impl Buf) -> Result<Member<Life>, Garbled> {
        read(buf, take_member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn life() -> impl Strategy<Value = Life> {
        (any::<[u8; 16]>(), any::<u64>(), any::<u16>()).prop_map(|(n, generation, renewal)| Life {
            node: NodeId::from_bytes(n),
            generation,
            renewal,
        })
    }

    proptest! {
        #[test]
        fn packets_round_trip(src in life(), dst in life(), third in life(), inc: u16, n: u8, kind in 0usize..9) {
            let message = [
                Message::Ping(n), Message::Ack(n), Message::PingReq { target: third, probe_number: n },
                Message::IndirectPing { origin: third, probe_number: n }, Message::IndirectAck { target: third, probe_number: n },
                Message::ForwardedAck { origin: third, probe_number: n }, Message::Feed, Message::Gossip, Message::Announce,
            ][kind].clone();
            let members = if kind == 8 { vec![] } else { vec![Member::new(third, inc, State::Suspect), Member::down(dst)] };
            let header = Header { src, src_incarnation: inc, dst, message };
            let mut bytes = Vec::new();
            put_header(&header, &mut bytes);
            if !members.is_empty() {
                bytes.put_u16(members.len() as u16);
                members.iter().for_each(|m| put_member(m, &mut bytes));
            }
            let packet = Packet::parse(&bytes).unwrap();
            prop_assert_eq!(packet.header, header);
            prop_assert_eq!(packet.members, members);
        }

        #[test]
        fn garbage_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Packet::parse(&bytes);
        }
    }

    #[test]
    fn a_life_is_renewed_sixteen_times_and_each_wins() {
        let mut l = Life { node: NodeId::from_bytes([1; 16]), generation: 3, renewal: 0 };
        let mut steps = 0;
        while let Some(next) = l.renew() {
            assert!(next.win_addr_conflict(&l) && !l.win_addr_conflict(&next));
            l = next;
            steps += 1;
        }
        assert_eq!((steps, l.renewal), (16, u16::MAX));
        assert!(Life { generation: 4, renewal: 0, ..l }.win_addr_conflict(&l));
    }
}
