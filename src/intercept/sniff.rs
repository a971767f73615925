//! Every frame of a network namespace, for the demo and tests that prove what is on the wire; and the frames of one interface, for a
//! test that carries them elsewhere itself.
//!
//! Owns: one packet socket each. Invariant: a [`Sniffer`] sees all interfaces of the namespace it was opened in, both directions,
//! until dropped; a [`Port`] sees what arrives at its interface and nothing that left through it.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::netlink::set_option;
use std::os::fd::AsFd;

/// Largest frame kept whole; segmentation offload makes frames of up to 64 KiB on virtual links.
const FRAME: usize = 66_000;
/// Wanted queue, so that a burst is not lost.
const QUEUE_BYTES: libc::c_int = 16 << 20;

/// An open capture. Needs CAP_NET_RAW.
#[derive(Debug)]
pub struct Sniffer {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

/// One captured frame, starting with its link-layer header.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// Interface it was seen on.
    pub interface: u32,
    /// Whether this host sent it.
    pub outgoing: bool,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl Sniffer {
    /// Starts to capture in the current network namespace.
    ///
    /// # Errors
    /// `PermissionDenied` without CAP_NET_RAW.
    pub fn open() -> io::Result<Sniffer> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: socket(2) takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(all)) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just returned to us and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &QUEUE_BYTES)
            .or_else(|_| set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, &QUEUE_BYTES))?;
        Ok(Sniffer { fd, buffer: vec![0; FRAME] })
    }

    /// The next frame, or `None` when none came within `patience`.
    ///
    /// # Errors
    /// The system call's.
    pub fn next(&mut self, patience: Duration) -> io::Result<Option<Frame<'_>>> {
        if !readable(&self.fd, patience)? {
            return Ok(None);
        }
        // SAFETY: sockaddr_ll consists of integers, for which all zeroes is a value.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut from_len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the buffer, `from` and `from_len` live through the call and have the lengths that are passed.
        let got = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                self.buffer.as_mut_ptr().cast(),
                self.buffer.len(),
                libc::MSG_DONTWAIT,
                (&raw mut from).cast(),
                &raw mut from_len,
            )
        };
        match usize::try_from(got) {
            Ok(len) => Ok(Some(Frame {
                interface: u32::try_from(from.sll_ifindex).unwrap_or(0),
                outgoing: from.sll_pkttype == libc::PACKET_OUTGOING,
                bytes: &self.buffer[..len],
            })),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Reads frames until `silence` passed without one, and hands each to `each`.
    ///
    /// # Errors
    /// The system call's.
    pub fn drain(&mut self, silence: Duration, mut each: impl FnMut(Frame<'_>)) -> io::Result<()> {
        while let Some(frame) = self.next(silence)? {
            each(frame);
        }
        Ok(())
    }

    /// How many frames the kernel had to drop since this was last asked, because they were not read quickly enough.
    ///
    /// # Errors
    /// The system call's.
    pub fn lost(&self) -> io::Result<u64> {
        let mut counts = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: `counts` and `len` live through the call, and `len` is the size of `counts`.
        let got = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut counts).cast(),
                &raw mut len,
            )
        };
        if got < 0 { Err(io::Error::last_os_error()) } else { Ok(u64::from(counts.tp_drops)) }
    }
}

/// One interface as a plug: frames that arrive at it can be taken, and frames can be sent out of it.
#[derive(Debug)]
pub struct Port {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl Port {
    /// Opens the interface with this index in the current network namespace. Needs CAP_NET_RAW.
    ///
    /// # Errors
    /// The system call's.
    pub fn open(interface: u32) -> io::Result<Port> {
        // SAFETY: socket(2) takes no pointers. Protocol 0: nothing arrives before the socket is bound.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just returned to us and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let on: libc::c_int = 1;
        // What the sender left to the hardware (checksums, segments) travels along in front of the frame.
        set_option(fd.as_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, &on)?;
        set_option(fd.as_fd(), libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &on)?;
        set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, &QUEUE_BYTES)?;
        // SAFETY: sockaddr_ll consists of integers, for which all zeroes is a value.
        let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        at.sll_family = libc::AF_PACKET as u16;
        at.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        at.sll_ifindex = i32::try_from(interface).map_err(io::Error::other)?;
        // SAFETY: `at` lives through the call and has the length that is passed.
        let bound =
            unsafe { libc::bind(fd.as_raw_fd(), (&raw const at).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Port { fd, buffer: vec![0; FRAME] })
    }

    /// Another handle to the same plug, for another thread.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn another(&self) -> io::Result<Port> {
        Ok(Port { fd: self.fd.try_clone()?, buffer: vec![0; FRAME] })
    }

    /// The next frame that arrived, in the form that [`Port::send`] takes; `None` when none came within `patience`.
    ///
    /// # Errors
    /// The system call's.
    pub fn next(&mut self, patience: Duration) -> io::Result<Option<&[u8]>> {
        if !readable(&self.fd, patience)? {
            return Ok(None);
        }
        match rustix::net::recv(&self.fd, &mut self.buffer[..], rustix::net::RecvFlags::DONTWAIT) {
            Ok((got, _)) => Ok(Some(&self.buffer[..got])),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a frame of [`Port::next`] out of this interface.
    ///
    /// # Errors
    /// The system call's.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        rustix::net::send(&self.fd, frame, rustix::net::SendFlags::DONTWAIT)?;
        Ok(())
    }
}

fn readable(fd: &OwnedFd, patience: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let millis = libc::c_int::try_from(patience.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: `poll` is one pollfd that lives through the call.
    match unsafe { libc::poll(&raw mut poll, 1, millis) } {
        -1 => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
        ready => Ok(ready > 0),
    }
}
