//! The bytes of netlink messages: a builder and a parser, both pure.
//!
//! Layout: `linux/netlink.h`; integers in host order unless a family says otherwise, everything aligned to four bytes.
//! Invariant: the parser never panics and never reads outside its input, whatever the input is; a length that does not fit
//! ends the iteration.

/// `NLM_F_REQUEST`
const REQUEST: u16 = 1;
/// `NLM_F_ACK`: answer even when nothing is wrong.
pub(super) const ACK: u16 = 4;
/// `NLM_F_EXCL`: fail when the object exists.
pub const EXCLUSIVE: u16 = 0x200;
/// `NLM_F_CREATE`
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`: at the end of a list.
pub const APPEND: u16 = 0x800;
/// `NLM_F_DUMP`: every object.
pub const DUMP: u16 = 0x300;
/// `NLM_F_DUMP_INTR`: the table changed while it was dumped.
pub const DUMP_INTERRUPTED: u16 = 0x10;
/// `NLM_F_CAPPED`: an error does not repeat the request's payload.
const CAPPED: u16 = 0x100;
/// `NLM_F_ACK_TLVS`: an error carries attributes.
const ERROR_ATTRIBUTES: u16 = 0x200;

/// `NLMSG_ERROR`
const ERROR: u16 = 2;
/// `NLMSG_DONE`
const DONE: u16 = 3;
/// `NLA_F_NESTED`
const NESTED: u16 = 0x8000;
const HEADER: usize = 16;

/// Largest value of one attribute, bytes: its length field has 16 bits and counts the attribute's own header.
pub const MAX_ATTRIBUTE: usize = 65_531;

/// Builds one or more messages, one after another.
///
/// An attribute larger than [`MAX_ATTRIBUTE`] cannot be expressed; [`Builder::finish`] returns `None` then, so that a cut
/// message never reaches the kernel.
#[derive(Debug, Default)]
pub struct Builder {
    bytes: Vec<u8>,
    messages: u32,
    last: usize,
    acknowledged: Option<u32>,
    oversized: bool,
}

impl Builder {
    /// An empty builder.
    pub fn new() -> Builder {
        Builder::default()
    }

    /// Appends one message: `kind` and `flags` for the header, `head` the family's fixed part, `body` adds attributes.
    /// Sequence numbers count from `0`; [`super::netlink::Socket`] adds its own base when it sends.
    pub fn message(&mut self, kind: u16, flags: u16, head: &[u8], body: impl FnOnce(&mut Builder)) -> &mut Builder {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&self.messages.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(head);
        self.pad();
        body(self);
        match u32::try_from(self.bytes.len() - start) {
            Ok(len) => self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes()),
            Err(_) => self.oversized = true,
        }
        self.messages += 1;
        self.last = start;
        self
    }

    /// Appends an attribute with raw bytes.
    pub fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Builder {
        let start = self.open(kind);
        self.bytes.extend_from_slice(value);
        self.close(start);
        self
    }

    /// Appends a zero-terminated string.
    pub fn str(&mut self, kind: u16, value: &str) -> &mut Builder {
        let start = self.open(kind);
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.close(start);
        self
    }

    /// Appends an integer in host order (rtnetlink, sock_diag).
    pub fn u32(&mut self, kind: u16, value: u32) -> &mut Builder {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Appends an integer in network order (netfilter).
    pub fn be32(&mut self, kind: u16, value: u32) -> &mut Builder {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends an integer in network order (netfilter).
    pub fn be64(&mut self, kind: u16, value: u64) -> &mut Builder {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends an attribute that contains attributes.
    pub fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Builder)) -> &mut Builder {
        let start = self.open(kind | NESTED);
        body(self);
        self.close(start);
        self
    }

    /// Appends fixed bytes inside an attribute (a nested structure such as `ifinfomsg`).
    pub fn raw(&mut self, value: &[u8]) -> &mut Builder {
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Asks for an acknowledgement of the message added last.
    pub fn acknowledge_last(&mut self) -> &mut Builder {
        if let Some(flags) = u16_at(&self.bytes, self.last + 6) {
            self.bytes[self.last + 6..self.last + 8].copy_from_slice(&(flags | ACK).to_ne_bytes());
            self.acknowledged = self.messages.checked_sub(1);
        }
        self
    }

    /// Position of the message that [`Builder::acknowledge_last`] marked.
    pub fn acknowledged(&self) -> Option<u32> {
        self.acknowledged
    }

    /// How many messages were added.
    pub fn messages(&self) -> u32 {
        self.messages
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The messages with `base` added to their sequence numbers; `None` if something did not fit its length field.
    pub fn finish(mut self, base: u32) -> Option<Vec<u8>> {
        if self.oversized {
            return None;
        }
        let mut at = 0;
        while at + HEADER <= self.bytes.len() {
            let len = u32_at(&self.bytes, at)? as usize;
            let sequence = u32_at(&self.bytes, at + 8)?.wrapping_add(base);
            self.bytes[at + 8..at + 12].copy_from_slice(&sequence.to_ne_bytes());
            at += align(len.max(HEADER));
        }
        Some(self.bytes)
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        start
    }

    fn close(&mut self, start: usize) {
        match u16::try_from(self.bytes.len() - start) {
            Ok(len) => self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes()),
            Err(_) => self.oversized = true,
        }
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(align(self.bytes.len()), 0);
    }
}

/// One received message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Type of the message, as its family numbers them.
    pub kind: u16,
    /// `NLM_F_*`
    pub flags: u16,
    /// Sequence number of the request it answers.
    pub sequence: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

/// What a message means to the exchange it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content<'a> {
    /// An object of the family.
    Object(&'a [u8]),
    /// The request was carried out.
    Acknowledged,
    /// The end of a dump.
    Done,
    /// The request was refused: positive errno and the kernel's own words, if it had any.
    Refused(i32, Option<String>),
    /// Nothing of interest (`NLMSG_NOOP`, or an error too short to hold its code).
    Nothing,
}

impl<'a> Message<'a> {
    /// Tells answers and acknowledgements apart.
    pub fn content(&self) -> Content<'a> {
        match self.kind {
            ERROR => match i32_at(self.payload, 0) {
                Some(0) => Content::Acknowledged,
                Some(code) => Content::Refused(code.saturating_neg(), self.explanation(4)),
                None => Content::Nothing,
            },
            // A dump that fails half-way reports the error in its last message.
            DONE => match i32_at(self.payload, 0) {
                Some(code) if code < 0 => Content::Refused(code.saturating_neg(), None),
                _ => Content::Done,
            },
            kind if kind < 16 => Content::Nothing,
            _ => Content::Object(self.payload),
        }
    }

    /// The text of an extended acknowledgement (`NLMSGERR_ATTR_MSG`), behind the echoed request.
    fn explanation(&self, code: usize) -> Option<String> {
        if self.flags & ERROR_ATTRIBUTES == 0 {
            return None;
        }
        let echoed = match self.flags & CAPPED {
            0 => align(u32_at(self.payload, code)? as usize).max(HEADER),
            _ => HEADER,
        };
        let rest = self.payload.get(code.checked_add(echoed)?..)?;
        let text = attributes(rest).find(|a| a.kind == 1)?.value;
        let text = text.split(|byte| *byte == 0).next()?;
        let text: String = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(200).collect();
        (!text.is_empty()).then_some(text)
    }
}

/// The messages of one datagram. Stops at the first length that cannot be true.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(bytes, 0)? as usize;
        if len < HEADER {
            return None;
        }
        let message = Message {
            kind: u16_at(bytes, 4)?,
            flags: u16_at(bytes, 6)?,
            sequence: u32_at(bytes, 8)?,
            payload: bytes.get(HEADER..len)?,
        };
        bytes = bytes.get(align(len)..).unwrap_or_default();
        Some(message)
    })
}

/// One attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// Type without the two flag bits.
    pub kind: u16,
    /// Its bytes; a nested attribute's value is again a list of attributes.
    pub value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// The attributes inside.
    pub fn nested(&self) -> impl Iterator<Item = Attribute<'a>> + use<'a> {
        attributes(self.value)
    }

    /// Host-order integer.
    pub fn u32(&self) -> Option<u32> {
        u32_at(self.value, 0)
    }

    /// Host-order integer.
    pub fn u64(&self) -> Option<u64> {
        Some(u64::from_ne_bytes(self.value.get(..8)?.try_into().ok()?))
    }

    /// Network-order integer.
    pub fn be32(&self) -> Option<u32> {
        self.u32().map(u32::from_be)
    }

    /// Network-order integer.
    pub fn be64(&self) -> Option<u64> {
        self.u64().map(u64::from_be)
    }

    /// Zero-terminated text.
    pub fn str(&self) -> Option<&'a str> {
        std::str::from_utf8(self.value.split(|byte| *byte == 0).next()?).ok()
    }
}

/// A list of attributes. Stops at the first length that cannot be true.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    std::iter::from_fn(move || {
        let len = u16_at(bytes, 0)? as usize;
        let kind = u16_at(bytes, 2)? & 0x3fff;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(align(len)..).unwrap_or_default();
        Some(Attribute { kind, value })
    })
}

const fn align(len: usize) -> usize {
    len.saturating_add(3) & !3
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    u32_at(bytes, at).map(u32::cast_signed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_built_is_what_is_parsed() {
        let mut builder = Builder::new();
        builder.message(20, DUMP, &[1, 2, 3], |m| {
            m.str(3, "lo").nest(7, |n| {
                n.be32(1, 9).attr(2, &[5]);
            });
        });
        builder.message(21, ACK, &[], |_| {});
        let bytes = builder.finish(40).unwrap();
        let parsed: Vec<_> = messages(&bytes).collect();
        assert_eq!(parsed.len(), 2);
        assert_eq!((parsed[0].kind, parsed[0].sequence, parsed[1].sequence), (20, 40, 41));
        assert_eq!(&parsed[0].payload[..4], &[1, 2, 3, 0]);
        let attrs: Vec<_> = attributes(&parsed[0].payload[4..]).collect();
        assert_eq!(attrs[0].str(), Some("lo"));
        let inner: Vec<_> = attrs[1].nested().collect();
        assert_eq!((inner[0].be32(), inner[1].value), (Some(9), &[5u8][..]));
    }

    #[test]
    fn an_attribute_that_does_not_fit_is_not_sent() {
        let mut builder = Builder::new();
        builder.message(20, 0, &[], |m| {
            m.attr(1, &vec![0; MAX_ATTRIBUTE + 1]);
        });
        assert_eq!(builder.finish(0), None);
        let mut builder = Builder::new();
        builder.message(20, 0, &[], |m| {
            m.attr(1, &vec![0; MAX_ATTRIBUTE]);
        });
        assert!(builder.finish(0).is_some());
    }

    /// A refusal as the kernel writes it: errno, the request's header, one text attribute.
    fn refusal(flags: u16, code: i32, echoed: u32, text: &str) -> Vec<u8> {
        let mut builder = Builder::new();
        builder.message(ERROR, flags, &code.to_ne_bytes(), |m| {
            m.raw(&echoed.to_ne_bytes()).raw(&[0; 12]).str(1, text);
        });
        builder.finish(0).unwrap()
    }

    #[test]
    fn a_refusal_carries_the_kernels_words() {
        let bytes = refusal(CAPPED | ERROR_ATTRIBUTES, -22, 4000, "no such hook");
        let content = messages(&bytes).next().unwrap().content();
        assert_eq!(content, Content::Refused(22, Some("no such hook".into())));
        // Without the flag the rest is the echoed request, not a text.
        let bytes = refusal(0, -22, 16, "no such hook");
        assert_eq!(messages(&bytes).next().unwrap().content(), Content::Refused(22, None));
        // The most negative code must not overflow.
        let bytes = refusal(ERROR_ATTRIBUTES, i32::MIN, u32::MAX, "x");
        assert_eq!(messages(&bytes).next().unwrap().content(), Content::Refused(i32::MAX, None));
    }

    fn walk(bytes: &[u8], depth: u8) -> usize {
        attributes(bytes)
            .map(|a| {
                let _ = (a.u32(), a.be64(), a.str());
                a.value.len() + if depth > 0 { walk(a.value, depth - 1) } else { 0 }
            })
            .sum()
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            for message in messages(&bytes) {
                prop_assert!(message.payload.len() + HEADER <= bytes.len());
                let _ = message.content();
                walk(message.payload, 4);
            }
            walk(&bytes, 4);
        }

        #[test]
        fn damaged_messages_are_parsed_without_panic(at in 0usize..200, with in any::<u8>(), cut in 0usize..200) {
            let mut bytes = refusal(CAPPED | ERROR_ATTRIBUTES, -1, 16, "some words");
            bytes.extend(refusal(ERROR_ATTRIBUTES, -1, 16, "more words"));
            let len = bytes.len();
            bytes[at % len] = with;
            bytes.truncate(len - cut % len);
            for message in messages(&bytes) {
                let _ = message.content();
                walk(message.payload, 4);
            }
        }
    }
}
