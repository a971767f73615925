//! What an eavesdropper on the switch of a [`Lab`] sees.
//!
//! Owns one capturing thread and what it counted. Looks for given texts in whole frames and keeps a tally of every TCP flow; keeps
//! no traffic. Invariant: a frame the kernel could not queue for us is counted as lost, so "not seen" is never silence.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::lab::{Lab, LabError};
use crate::intercept::sniff::Sniffer;

/// How long the link must be silent before a capture that was asked to stop believes it has seen everything.
const SILENCE: Duration = Duration::from_millis(50);
/// How much of a frame with a text in it is kept to be shown.
const EXCERPT: usize = 96;
/// TCP flags.
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// One TCP segment in an Ethernet frame.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// Who sent it.
    pub from: SocketAddr,
    /// To whom.
    pub to: SocketAddr,
    /// The flags (RFC 9293 §3.1).
    pub flags: u8,
    /// What it carries.
    pub payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Reads an Ethernet II frame with IPv4 (RFC 791) or IPv6 (RFC 8200) without extension headers. `None` for anything else.
    pub fn parse(frame: &'a [u8]) -> Option<Segment<'a>> {
        let kind = u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?);
        let packet = frame.get(14..)?;
        let (source, destination, tcp): (IpAddr, IpAddr, &[u8]) = match kind {
            0x0800 => {
                let header = usize::from(packet.first()? & 0x0f) * 4;
                // A total length of 0 is a segmentation-offload frame of 64 KiB: the frame's own length counts.
                let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
                let packet = if total == 0 { packet } else { packet.get(..total)? };
                (*packet.get(9)? == 6).then_some(())?;
                let ip = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
                (ip(12)?, ip(16)?, packet.get(header..)?)
            }
            0x86dd => {
                let length = usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
                let packet = if length == 0 { packet } else { packet.get(..40 + length)? };
                (*packet.get(6)? == 6).then_some(())?;
                let ip = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
                (ip(8)?, ip(24)?, packet.get(40..)?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Segment {
            from: SocketAddr::new(source, port(0)?),
            to: SocketAddr::new(destination, port(2)?),
            flags: *tcp.get(13)?,
            payload: tcp.get(header..)?,
        })
    }
}

/// The tally of one direction of one TCP connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flow {
    /// Segments.
    pub segments: u64,
    /// Bytes of payload, repeated ones included.
    pub bytes: u64,
    /// Attempts to connect.
    pub attempts: u64,
    /// Resets.
    pub resets: u64,
}

/// What a capture saw.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Frames that entered the switch.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames the kernel had to drop because we read too slowly.
    pub lost: u64,
    /// TCP, by sender and receiver.
    pub flows: BTreeMap<(SocketAddr, SocketAddr), Flow>,
    /// In how many frames each wanted text was, in the order given.
    pub hits: Vec<u64>,
    /// The beginning of the payload of the first frame with each text.
    pub excerpts: Vec<Option<Vec<u8>>>,
    /// The beginning of the first TLS application data record to each address.
    pub sealed: BTreeMap<SocketAddr, Vec<u8>>,
}

impl Report {
    /// Bytes of payload of all flows that `wanted` says yes to, given sender and receiver.
    pub fn payload(&self, wanted: impl Fn(SocketAddr, SocketAddr) -> bool) -> u64 {
        self.flows.iter().filter(|((from, to), _)| wanted(*from, *to)).map(|(_, flow)| flow.bytes).sum()
    }

    fn take(&mut self, frame: &[u8], texts: &[Vec<u8>]) {
        self.frames += 1;
        self.bytes += frame.len() as u64;
        let segment = Segment::parse(frame);
        for (i, text) in texts.iter().enumerate() {
            if contains(frame, text) {
                self.hits[i] += 1;
                let seen = segment.map_or(frame, |s| s.payload);
                self.excerpts[i].get_or_insert_with(|| seen[..seen.len().min(EXCERPT)].to_vec());
            }
        }
        let Some(segment) = segment else { return };
        let flow = self.flows.entry((segment.from, segment.to)).or_default();
        flow.segments += 1;
        flow.bytes += segment.payload.len() as u64;
        flow.attempts += u64::from(segment.flags & (SYN | ACK) == SYN);
        flow.resets += u64::from(segment.flags & RST != 0);
        // Type 23 and the record version that TLS 1.2 and 1.3 both write (RFC 8446 §5.1).
        if segment.payload.starts_with(&[23, 3, 3]) {
            let seen = segment.payload;
            self.sealed.entry(segment.to).or_insert_with(|| seen[..seen.len().min(EXCERPT)].to_vec());
        }
    }
}

fn contains(frame: &[u8], text: &[u8]) -> bool {
    let Some(first) = text.first() else { return false };
    let mut rest = frame;
    while let Some(at) = rest.iter().position(|b| b == first) {
        rest = &rest[at..];
        if rest.starts_with(text) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

/// A running capture of everything that enters the switch of a lab.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<Report>>>,
}

impl Capture {
    /// Starts to look for `texts`.
    ///
    /// # Errors
    /// [`LabError`]: no capture without CAP_NET_RAW.
    pub fn start(lab: &Lab, texts: &[&[u8]]) -> Result<Capture, LabError> {
        let failed = |source| LabError::Io { what: "capture what is on the link".into(), source };
        let mut sniffer = lab.switch().run(Sniffer::open)?.map_err(failed)?;
        let texts: Vec<Vec<u8>> = texts.iter().map(|t| t.to_vec()).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        let thread = std::thread::Builder::new().name("capture".into()).spawn(move || {
            let mut report = Report { hits: vec![0; texts.len()], excerpts: vec![None; texts.len()], ..Report::default() };
            loop {
                match sniffer.next(SILENCE)? {
                    // A frame is seen where it enters the switch and again where it leaves.
                    Some(frame) if frame.outgoing => {}
                    Some(frame) => report.take(frame.bytes, &texts),
                    None if asked.load(Ordering::Acquire) => break,
                    None => {}
                }
            }
            report.lost = sniffer.lost()?;
            Ok(report)
        });
        Ok(Capture { stop, thread: Some(thread.map_err(failed)?) })
    }

    /// Ends the capture once the link is silent, and returns what it saw. Do not call it while somebody still talks.
    ///
    /// # Errors
    /// [`LabError::Io`] when it could not see everything.
    pub fn stop(mut self) -> Result<Report, LabError> {
        self.stop.store(true, Ordering::Release);
        let result = self.thread.take().map(JoinHandle::join);
        let failed = |source| LabError::Io { what: "capture what is on the link".into(), source };
        match result {
            Some(Ok(report)) => report.map_err(failed),
            _ => Err(failed(io::Error::other("the capturing thread died"))),
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u16, ip: &[u8], tcp: &[u8]) -> Vec<u8> {
        [&[0; 12][..], &kind.to_be_bytes(), ip, tcp].concat()
    }

    #[test]
    fn segments_of_both_families_are_read() {
        let tcp = [&[0x1f, 0x90, 0x00, 0x50][..], &[0; 8], &[0x50, 0x18], &[0; 6], b"hello"].concat();
        let mut v4 = vec![0x45, 0, 0, 45, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        let seen = frame(0x0800, &v4, &tcp);
        let s = Segment::parse(&seen).unwrap();
        assert_eq!((s.from, s.to), ("10.0.0.1:8080".parse().unwrap(), "10.0.0.2:80".parse().unwrap()));
        assert_eq!((s.flags, s.payload), (0x18, &b"hello"[..]));
        let padded = [seen.clone(), vec![0; 9]].concat();
        assert_eq!(Segment::parse(&padded).unwrap().payload, b"hello", "what the link adds is no payload");
        v4[9] = 17;
        assert!(Segment::parse(&frame(0x0800, &v4, &tcp)).is_none());

        let mut v6 = vec![0x60, 0, 0, 0, 0, 25, 6, 64];
        v6.extend([0xfd; 16]);
        v6.extend([0xfe; 16]);
        let seen = frame(0x86dd, &v6, &tcp);
        assert_eq!(Segment::parse(&seen).unwrap().payload, b"hello");
        for cut in 0..seen.len() - 5 {
            assert!(Segment::parse(&seen[..cut]).is_none(), "{cut}");
        }
    }

    #[test]
    fn texts_are_found_wherever_they_are() {
        for (frame, found) in [(&b"abcabd"[..], true), (b"abd", true), (b"ababd!", true), (b"abcab", false), (b"", false)] {
            assert_eq!(contains(frame, b"abd"), found, "{frame:?}");
        }
        assert!(!contains(b"abc", b""));
    }
}
