//! The line between a daemon and the one that takes its place: a socket pair over which they agree, and over which descriptors pass.
//!
//! Owns the words and their form: one JSON object in one packet (`SOCK_SEQPACKET`). The two ends are of different versions, so words are
//! added and none is given another meaning; one that is not known is passed over. Decides nothing: the older side is
//! `daemon/successor.rs` and `daemon/retired.rs`, the newer one `daemon/before.rs`.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use meshd_ca::identity::NodeId;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType, recvmsg, sendmsg, socketpair, sockopt,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// The longest packet.
const MAX_PACKET: usize = 64 << 10;
/// Descriptors in one packet, at most: the doors, the socket of the rules, the lock, the lines to older processes.
pub(crate) const MAX_DESCRIPTORS: usize = 64;
/// Nodes in one [`Word::Gone`].
pub(crate) const MAX_NODES: usize = 512;

/// What one says to the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "word")]
pub(crate) enum Word {
    /// The newer: it has read configuration and state, and can take over.
    Ready {
        /// Its version.
        version: String,
    },
    /// The newer: it cannot, and ends.
    Failed {
        /// For a person.
        why: String,
    },
    /// The older: it has stopped writing and accepting. The descriptors that come with it, in this order.
    TakeOver {
        /// What each is.
        names: Vec<String>,
        /// Its own process id.
        pid: u32,
    },
    /// The newer: it serves.
    Serving,
    /// The older: the service manager knows the newer for the service now.
    Lead,
    /// The older, now and then: how many connections it still has.
    Open {
        /// So many.
        connections: u32,
    },
    /// The newer: these are no members any more.
    Gone {
        /// Up to [`MAX_NODES`], and of each whether it was banished.
        nodes: Vec<(NodeId, bool)>,
    },
    /// The newer: let connections end as before any stop, and go.
    Stop,
}

/// One end.
#[derive(Debug)]
pub(crate) struct Line(UnixDatagram);

impl Line {
    /// A line, and the other end of it, to be given to a process.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self::of(here)?, there))
    }

    /// The end that this descriptor is.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn of(fd: OwnedFd) -> io::Result<Self> {
        if sockopt::socket_type(&fd)? != SocketType::SEQPACKET {
            return Err(io::Error::other("not the line to another meshd"));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        // Packets as on a datagram socket, and an end as on a stream.
        UnixDatagram::from_std(fd.into()).map(Self)
    }

    /// The same end once more.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.0.as_fd().try_clone_to_owned()
    }

    /// Says a word, and passes descriptors.
    ///
    /// # Errors
    /// The other end is gone.
    pub(crate) async fn say(&self, word: &Word, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(word)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        self.0
            .async_io(Interest::WRITABLE, || {
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                    return Err(io::Error::other("more descriptors than one packet takes"));
                }
                sendmsg(&self.0, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
                Ok(())
            })
            .await
    }

    /// The next word that is known, with the descriptors that came with it; none when the other end is gone. Nothing is lost when it is
    /// not waited for to the end.
    pub(crate) async fn hear(&self) -> Option<(Word, Vec<OwnedFd>)> {
        loop {
            let (text, fds) = self.0.async_io(Interest::READABLE, || receive(self.0.as_fd())).await.ok()?;
            if text.is_empty() {
                return None;
            }
            match serde_json::from_slice(&text) {
                Ok(word) => return Some((word, fds)),
                Err(error) => tracing::debug!(%error, "another meshd said something that this one does not know"),
            }
        }
    }

    /// The process id that stands in the first packet, see [`crate::intercept::process::beget`].
    pub(crate) fn pid(&self) -> Option<u32> {
        let (bytes, _) = receive(self.0.as_fd()).ok()?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    }
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut text = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let bytes = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    text.truncate(bytes);
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok((text, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[tokio::test]
    async fn words_and_descriptors_arrive_and_unknown_words_are_passed_over() {
        let (here, there) = Line::pair().unwrap();
        let there = Line::of(there).unwrap();
        let (mut far, near) = std::os::unix::net::UnixStream::pair().unwrap();
        rustix::net::send(&here.0, b"{\"word\":\"of-later\",\"much\":7}", SendFlags::empty()).unwrap();
        let word = Word::TakeOver { names: vec!["door".into(), "lock".into()], pid: 7 };
        here.say(&word, &[near.as_fd(), near.as_fd()]).await.unwrap();
        let nodes = vec![(NodeId::from_bytes([0xff; 16]), false); MAX_NODES];
        here.say(&Word::Gone { nodes: nodes.clone() }, &[]).await.unwrap();
        drop((here, near));
        let (heard, mut fds) = there.hear().await.unwrap();
        assert_eq!((heard, fds.len()), (word, 2));
        let mut passed = std::os::unix::net::UnixStream::from(fds.remove(1));
        drop(fds);
        passed.write_all(b"through").unwrap();
        drop(passed);
        let mut text = String::new();
        far.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        assert_eq!(there.hear().await.unwrap().0, Word::Gone { nodes });
        assert!(there.hear().await.is_none() && there.say(&Word::Serving, &[]).await.is_err());
    }

    #[tokio::test]
    async fn another_descriptor_is_no_line() {
        let (other, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Line::of(other.into()).is_err());
        assert!(Line::of(std::fs::File::open("/dev/null").unwrap().into()).is_err());
    }
}
