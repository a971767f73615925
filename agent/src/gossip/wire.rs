//! What gossip sends: one byte of kind, then fixed-width fields. Decoding allocates no more than the packet is long.

use bytes::{BufMut, Bytes};

use crate::record::Version;

/// Largest packet in bytes, sent or received.
pub const MAX_PACKET: usize = 48 * 1024;
/// Most items named in one message.
pub(super) const MAX_ITEMS: usize = 1024;
/// How many buckets a table's hashes come in.
pub(super) const BUCKETS: usize = 64;
/// What names an item in its table: a node id, or the start of the hash of a roster entry.
pub(super) type Key = [u8; 16];

/// The two things kept equal everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    /// Entries of the roster. First, because records are judged by it.
    Roster,
    /// Records of nodes.
    Records,
}

/// An item of a table by name. Roster entries never change, so their version is the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Item {
    pub(super) table: Table,
    pub(super) key: Key,
    pub(super) version: Version,
}

impl Item {
    pub(super) const LEN: usize = 33;

    pub(super) fn bucket(&self) -> usize {
        usize::from(self.key[0]) / (256 / BUCKETS)
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.put_u8(self.table as u8);
        out.put_slice(&self.key);
        out.put_u64(self.version.sequence);
        out.put_u64(self.version.tag);
    }

    pub(super) fn take(from: &mut Reader<'_>) -> Option<Self> {
        let table = from.table()?;
        Some(Self { table, key: from.array()?, version: Version { sequence: from.u64()?, tag: from.u64()? } })
    }
}

/// A message between two members.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message<'a> {
    /// Failure detection, and what travels with it.
    Swim(&'a [u8]),
    /// The hash of each table of the sender: where one differs, the receiver answers with [`Message::Buckets`].
    Root { roster: [u8; 32], records: [u8; 32] },
    /// The hashes of a table's buckets: the receiver answers with a [`Message::List`] of those that differ from its own.
    Buckets { table: Table, hashes: Vec<u128> },
    /// All items of the sender in the buckets of `mask`: the receiver asks for what is newer and offers what is not there.
    List { table: Table, mask: u64, items: Vec<Item> },
    /// Items the sender has and the receiver seems to lack.
    Offer(Vec<Item>),
    /// Asks for items.
    Want(Vec<(Table, Key)>),
    /// Items, asked for or fresh. `last` ends the answer to a [`Message::Want`].
    Bodies { last: bool, bodies: Vec<(Item, &'a [u8])> },
}

impl<'a> Message<'a> {
    pub(super) fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(128);
        match self {
            Self::Swim(data) => {
                out.put_u8(0);
                out.put_slice(data);
            }
            Self::Root { roster, records } => {
                out.put_u8(1);
                out.put_slice(roster);
                out.put_slice(records);
            }
            Self::Buckets { table, hashes } => {
                out.put_u8(2);
                out.put_u8(*table as u8);
                hashes.iter().for_each(|h| out.put_u128(*h));
            }
            Self::List { table, mask, items } => {
                out.put_u8(3);
                out.put_u8(*table as u8);
                out.put_u64(*mask);
                items.iter().for_each(|i| i.put(&mut out));
            }
            Self::Offer(items) => {
                out.put_u8(4);
                items.iter().for_each(|i| i.put(&mut out));
            }
            Self::Want(keys) => {
                out.put_u8(5);
                for (table, key) in keys {
                    out.put_u8(*table as u8);
                    out.put_slice(key);
                }
            }
            Self::Bodies { last, bodies } => {
                out.put_u8(6);
                out.put_u8(u8::from(*last));
                for (item, body) in bodies {
                    item.put(&mut out);
                    out.put_u16(u16::try_from(body.len()).unwrap_or(0));
                    out.put_slice(body);
                }
            }
        }
        out.into()
    }

    /// The message in a packet; none where it is malformed, has bytes to spare, or names more than [`MAX_ITEMS`].
    pub(super) fn decode(packet: &'a [u8]) -> Option<Self> {
        let mut r = Reader(packet);
        Some(match r.u8()? {
            0 => Self::Swim(r.0),
            1 => {
                let m = Self::Root { roster: r.array()?, records: r.array()? };
                r.end(m)?
            }
            2 => {
                let table = r.table()?;
                let hashes = (0..BUCKETS).map(|_| r.array().map(u128::from_be_bytes)).collect::<Option<_>>()?;
                r.end(Self::Buckets { table, hashes })?
            }
            3 => {
                let (table, mask) = (r.table()?, r.u64()?);
                let items = r.all(Item::take)?;
                Self::List { table, mask, items: items.iter().all(|i| i.table == table).then_some(items)? }
            }
            4 => Self::Offer(r.all(Item::take)?),
            5 => Self::Want(r.all(|r| Some((r.table()?, r.array()?)))?),
            6 => {
                let last = match r.u8()? {
                    0 => false,
                    1 => true,
                    _ => return None,
                };
                Self::Bodies { last, bodies: r.all(|r| Some((Item::take(r)?, r.sized()?)))? }
            }
            _ => return None,
        })
    }
}

/// A cursor over received bytes. Nothing it does panics.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }
    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[b]| b)
    }
    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }
    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
    fn table(&mut self) -> Option<Table> {
        match self.u8()? {
            0 => Some(Table::Roster),
            1 => Some(Table::Records),
            _ => None,
        }
    }
    /// Bytes behind a 16-bit length; at least one.
    pub(super) fn sized(&mut self) -> Option<&'a [u8]> {
        let len = usize::from(self.u16()?);
        let (head, rest) = self.0.split_at_checked(len).filter(|_| len > 0)?;
        self.0 = rest;
        Some(head)
    }
    fn all<T>(&mut self, mut one: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut out = Vec::new();
        while !self.0.is_empty() {
            if out.len() == MAX_ITEMS {
                return None;
            }
            out.push(one(self)?);
        }
        Some(out)
    }
    fn end<T>(&self, value: T) -> Option<T> {
        self.0.is_empty().then_some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn item() -> impl Strategy<Value = Item> {
        (any::<bool>(), any::<Key>(), any::<u64>(), any::<u64>()).prop_map(|(t, key, sequence, tag)| Item {
            table: if t { Table::Roster } else { Table::Records },
            key,
            version: Version { sequence, tag },
        })
    }

    proptest! {
        #[test]
        fn messages_round_trip(items in proptest::collection::vec(item(), 0..40), body in proptest::collection::vec(any::<u8>(), 1..300), last: bool, mask: u64) {
            let same: Vec<Item> = items.iter().map(|i| Item { table: Table::Records, ..*i }).collect();
            for m in [
                Message::Root { roster: [1; 32], records: [2; 32] },
                Message::Buckets { table: Table::Roster, hashes: vec![u128::from(mask) << 7; BUCKETS] },
                Message::List { table: Table::Records, mask, items: same },
                Message::Offer(items.clone()),
                Message::Want(items.iter().map(|i| (i.table, i.key)).collect()),
                Message::Bodies { last, bodies: items.iter().map(|i| (*i, &body[..])).collect() },
                Message::Swim(&body),
            ] {
                let bytes = m.encode();
                prop_assert_eq!(Message::decode(&bytes), Some(m));
            }
        }

        #[test]
        fn any_bytes_decode_to_themselves_or_not_at_all(bytes in proptest::collection::vec(any::<u8>(), 0..400), kind in 0u8..8) {
            let bytes = [&[kind][..], &bytes].concat();
            if let Some(m) = Message::decode(&bytes) {
                prop_assert_eq!(&m.encode()[..], &bytes[..]);
            }
        }
    }
}
