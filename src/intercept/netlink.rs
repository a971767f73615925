//! A netlink socket: send a request, collect the answers, within a time.
//!
//! Owns: the socket and its sequence numbers. A socket belongs to the network namespace it was opened in, wherever it is used
//! later. Invariant: only messages that the kernel itself sent are looked at, and no exchange waits for longer than
//! [`ANSWER_TIMEOUT`] without a word from the kernel.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use super::message::{self, Builder, Content, Message};

/// How long the kernel may take for an answer; loading a module on first use is the slow case.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Larger than any datagram the kernel makes for us (it stops at 32 KiB).
const RECEIVE_BYTES: usize = 65_536;
/// Wanted size of the socket's queues; a large batch is one datagram.
const QUEUE_BYTES: libc::c_int = 4 << 20;
/// `ioctl` request of `linux/sockios.h`: the network namespace of a socket.
const SIOCGSKNS: libc::Ioctl = 0x894c;
/// Bound on the objects of one dump.
const MAX_OBJECTS: usize = 1 << 20;

/// Why an exchange with the kernel failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket could not be opened or configured: the kernel lacks this netlink family, or a sandbox forbids it.
    #[error("cannot open a netlink socket: {0}; allow AF_NETLINK in the service's sandbox")]
    Open(#[source] io::Error),
    /// Sending or receiving failed.
    #[error("netlink exchange failed: {0}")]
    Exchange(#[from] io::Error),
    /// No answer in time.
    #[error("the kernel did not answer within {} seconds; see the kernel log", ANSWER_TIMEOUT.as_secs())]
    Timeout,
    /// The kernel refused the request.
    #[error("the kernel refused the request: {}{}", io::Error::from_raw_os_error(*.errno), Explained(.explanation))]
    Refused {
        /// Positive error number.
        errno: i32,
        /// What the kernel added in words.
        explanation: Option<String>,
        /// Which message of the request, counted from 0.
        index: u32,
    },
    /// The answer is not what the protocol says, or exceeds its bounds.
    #[error("unexpected answer from the kernel: {0}")]
    Unexpected(&'static str),
    /// The table changed again and again while it was read.
    #[error("the kernel's table changed while it was read; try again")]
    Changing,
    /// The request itself is too large for the protocol.
    #[error("request too large for one netlink message")]
    Oversized,
}

impl NetlinkError {
    /// The error number of a refusal or a failed system call.
    pub fn errno(&self) -> Option<i32> {
        match self {
            NetlinkError::Refused { errno, .. } => Some(*errno),
            NetlinkError::Open(error) | NetlinkError::Exchange(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

struct Explained<'a>(&'a Option<String>);

impl std::fmt::Display for Explained<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(text) => write!(f, " ({text})"),
            None => Ok(()),
        }
    }
}

/// A netlink family (`linux/netlink.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Links, addresses, routes, rules.
    Route,
    /// Sockets and their owners.
    SockDiag,
    /// nftables.
    Netfilter,
}

impl Family {
    fn protocol(self) -> libc::c_int {
        match self {
            Family::Route => libc::NETLINK_ROUTE,
            Family::SockDiag => libc::NETLINK_SOCK_DIAG,
            Family::Netfilter => libc::NETLINK_NETFILTER,
        }
    }
}

/// An open socket of one family in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Open`] when the kernel lacks the family or a sandbox forbids it.
    pub fn open(family: Family) -> Result<Socket, NetlinkError> {
        Socket::subscribe(family, 0, false)
    }

    /// Goes on with a socket that another process of this program opened, was not sent to since, and left: its objects in the kernel
    /// are this one's from now on. `None` if it is no socket of that family, or of another network namespace than the current one.
    pub fn adopt(fd: OwnedFd, family: Family) -> Option<Socket> {
        let is = |name, wanted| option(fd.as_fd(), name).is_some_and(|value| value == wanted);
        if !is(libc::SO_DOMAIN, libc::AF_NETLINK) || !is(libc::SO_PROTOCOL, family.protocol()) || !is_of_this_network(fd.as_fd())
        {
            return None;
        }
        let mut socket = Socket { fd, sequence: 1, buffer: vec![0; RECEIVE_BYTES] };
        socket.discard_queued();
        Some(socket)
    }

    /// The same socket once more, for somebody who keeps it open when this process is gone.
    ///
    /// # Errors
    /// Too many open files.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// Opens a socket that also receives the notifications of `groups` (bit mask as in `sockaddr_nl`).
    pub(super) fn subscribe(family: Family, groups: u32, nonblocking: bool) -> Result<Socket, NetlinkError> {
        let blocking = if nonblocking { libc::SOCK_NONBLOCK } else { 0 };
        // SAFETY: socket(2) takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC | blocking, family.protocol()) };
        if fd < 0 {
            return Err(NetlinkError::Open(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just returned to us and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut address = kernel_address();
        address.nl_groups = groups;
        // SAFETY: `address` is a sockaddr_nl that lives through the call, and the length is its own.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_nl>() as _) };
        if bound < 0 {
            return Err(NetlinkError::Open(io::Error::last_os_error()));
        }
        let timeout = libc::timeval { tv_sec: ANSWER_TIMEOUT.as_secs() as _, tv_usec: 0 };
        set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout).map_err(NetlinkError::Open)?;
        // Older kernels lack these two; they only make errors shorter and clearer.
        let on: libc::c_int = 1;
        let _ = set_option(fd.as_fd(), libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, &on);
        let _ = set_option(fd.as_fd(), libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, &on);
        // FORCE goes over the system's limit and needs CAP_NET_ADMIN in the initial user namespace; without it the limit holds.
        for (force, plain) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
            let set = set_option(fd.as_fd(), libc::SOL_SOCKET, force, &QUEUE_BYTES);
            set.or_else(|_| set_option(fd.as_fd(), libc::SOL_SOCKET, plain, &QUEUE_BYTES)).map_err(NetlinkError::Open)?;
        }
        Ok(Socket { fd, sequence: 1, buffer: vec![0; RECEIVE_BYTES] })
    }

    /// Bytes that fit into one datagram to the kernel. Without privilege over the whole machine this is about 400 KiB.
    pub fn capacity(&self) -> usize {
        let bytes = option(self.fd.as_fd(), libc::SO_SNDBUF);
        bytes.map_or(64 << 10, |bytes| usize::try_from(bytes).unwrap_or(0).saturating_sub(4096))
    }

    /// Sends the messages and waits for the acknowledgement: of the message that was marked, or else of the last one.
    ///
    /// # Errors
    /// The first refusal among them, with its position; a timeout; an I/O error.
    pub fn execute(&mut self, mut request: Builder) -> Result<(), NetlinkError> {
        if request.acknowledged().is_none() {
            request.acknowledge_last();
        }
        let last = request.acknowledged().unwrap_or(0);
        self.exchange(request, last, &mut |_| Ok(Next::Wait))
    }

    /// Sends one dump request and hands every object's type and payload to `each`. A dump that was disturbed by a change
    /// is an error ([`NetlinkError::Changing`]); ask again.
    ///
    /// # Errors
    /// As [`Socket::execute`], and what `each` returns.
    pub fn dump(
        &mut self,
        request: Builder,
        mut each: impl FnMut(u16, &[u8]) -> Result<(), NetlinkError>,
    ) -> Result<(), NetlinkError> {
        let mut count = 0;
        self.exchange(request, 0, &mut |message| {
            if message.flags & message::DUMP_INTERRUPTED != 0 {
                return Err(NetlinkError::Changing);
            }
            if let Content::Object(payload) = message.content() {
                count += 1;
                if count > MAX_OBJECTS {
                    return Err(NetlinkError::Unexpected("endless dump"));
                }
                each(message.kind, payload)?;
            }
            Ok(Next::Wait)
        })
    }

    /// Sends one request with neither dump nor acknowledge flag and returns its one answer: type and payload.
    ///
    /// # Errors
    /// As [`Socket::execute`].
    pub fn ask(&mut self, request: Builder) -> Result<(u16, Vec<u8>), NetlinkError> {
        let mut answer = None;
        self.exchange(request, 0, &mut |message| {
            Ok(match message.content() {
                Content::Object(payload) => {
                    answer = Some((message.kind, payload.to_vec()));
                    Next::Stop
                }
                _ => Next::Wait,
            })
        })?;
        answer.ok_or(NetlinkError::Unexpected("no answer"))
    }

    /// Runs one exchange. It is over when message `last` is acknowledged, a dump is done, or something is refused.
    fn exchange(
        &mut self,
        request: Builder,
        last: u32,
        each: &mut dyn FnMut(&Message<'_>) -> Result<Next, NetlinkError>,
    ) -> Result<(), NetlinkError> {
        let base = self.sequence;
        self.sequence = base.wrapping_add(request.messages().max(1));
        let bytes = request.finish(base).ok_or(NetlinkError::Oversized)?;
        self.send(&bytes)?;
        let mut outcome = Ok(());
        loop {
            let len = match self.receive() {
                Ok(Some(len)) => len,
                Ok(None) => continue,
                Err(error) => return outcome.and(Err(error)),
            };
            let mut refused = None;
            for message in message::messages(&self.buffer[..len]) {
                let index = message.sequence.wrapping_sub(base);
                if index > last {
                    continue; // of an earlier exchange that timed out
                }
                match message.content() {
                    Content::Acknowledged if index == last => return outcome,
                    Content::Done => return outcome,
                    Content::Refused(errno, explanation) => {
                        refused = Some(NetlinkError::Refused { errno, explanation, index });
                        break;
                    }
                    _ if outcome.is_ok() => match each(&message) {
                        Ok(Next::Wait) => {}
                        Ok(Next::Stop) => return Ok(()),
                        Err(error) => outcome = Err(error),
                    },
                    _ => {}
                }
            }
            if let Some(refused) = refused {
                // A refused batch may never acknowledge its last message: take what is queued, do not wait.
                self.discard_queued();
                return outcome.and(Err(refused));
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        // SAFETY: pointer and length describe `bytes`, which lives through the call.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(sent) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) => Err(NetlinkError::Unexpected("request cut short")),
            Err(_) => Err(io::Error::last_os_error().into()),
        }
    }

    /// One datagram into the buffer; `None` if it did not come from the kernel.
    fn receive(&mut self) -> Result<Option<usize>, NetlinkError> {
        match self.receive_with(libc::MSG_TRUNC) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(NetlinkError::Timeout),
            Err(error) => Err(error.into()),
            Ok((len, _)) if len > self.buffer.len() => Err(NetlinkError::Unexpected("datagram too large")),
            Ok((len, from_kernel)) => Ok(from_kernel.then_some(len)),
        }
    }

    fn receive_with(&mut self, flags: libc::c_int) -> io::Result<(usize, bool)> {
        loop {
            let mut from = kernel_address();
            let mut from_len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
            // SAFETY: the buffer, `from` and `from_len` live through the call and have the lengths that are passed.
            let got = unsafe {
                libc::recvfrom(
                    self.fd.as_raw_fd(),
                    self.buffer.as_mut_ptr().cast(),
                    self.buffer.len(),
                    flags,
                    (&raw mut from).cast(),
                    &raw mut from_len,
                )
            };
            match usize::try_from(got) {
                Ok(got) => return Ok((got, from.nl_pid == 0)),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }

    fn discard_queued(&mut self) {
        while self.receive_with(libc::MSG_DONTWAIT | libc::MSG_TRUNC).is_ok() {}
    }

    /// Reads what is queued on a non-blocking socket: how many notifications, and whether some were lost.
    pub(super) fn drain(&mut self) -> io::Result<Drained> {
        let mut drained = Drained::default();
        loop {
            match self.receive_with(libc::MSG_DONTWAIT | libc::MSG_TRUNC) {
                Ok((_, from_kernel)) => drained.notifications += u32::from(from_kernel),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(drained),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => drained.lost = true,
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether an exchange has what it wants.
enum Next {
    Wait,
    Stop,
}

/// What a subscription delivered.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Datagrams received.
    pub notifications: u32,
    /// The queue overflowed, so more changed than was seen.
    pub lost: bool,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

fn kernel_address() -> libc::sockaddr_nl {
    // SAFETY: sockaddr_nl consists of integers, for which all zeroes is a value.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address
}

/// A number that the kernel keeps about a socket (`SOL_SOCKET`).
fn option(fd: BorrowedFd<'_>, name: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` and `len` live through the call and `len` is the size of `value`.
    let got = unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len) };
    (got == 0).then_some(value)
}

/// Whether a socket belongs to the network namespace this thread is in; the kernel tells it to whoever may administer that one.
fn is_of_this_network(socket: BorrowedFd<'_>) -> bool {
    // SAFETY: this request takes no argument and returns a new descriptor.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
    if fd < 0 {
        return false;
    }
    // SAFETY: the descriptor was just returned to us and nobody else owns it.
    let network = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let inode = network.metadata().map(|meta| meta.ino());
    super::netns::NetNs::current().is_ok_and(|here| inode.is_ok_and(|inode| inode == here.inode()))
}

/// `setsockopt` with a plain value.
pub(super) fn set_option<T: Copy>(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: pointer and length describe `value`, which lives through the call; the kernel only reads it.
    let set = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), size_of::<T>() as libc::socklen_t)
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
