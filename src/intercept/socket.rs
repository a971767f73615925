//! Sockets of a transparent proxy: marked before they do anything, made now or inside another namespace, used anywhere.
//!
//! Owns: the options of each kind of socket. Does not own: when to connect and what to send. Two rules follow from
//! [`Finish`]: a stream made here that is simply dropped sends RST, so that a crash or an error
//! never looks like a clean end; call [`clean`] before a clean close.

use std::io::{self, IoSliceMut};
use std::mem;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, SockFilter, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::netlink::set_option;
use super::{MARK_MESH, MARK_SERVICE};

/// Idle time after which a connection is probed.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// Time between probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Unanswered probes that end a connection.
const KEEPALIVE_PROBES: u32 = 3;
/// Sent data that stays unacknowledged for so long ends a connection (`TCP_USER_TIMEOUT`).
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);
/// Pending connections of a listener; the kernel's own limit (net.core.somaxconn) caps it.
const BACKLOG: i32 = 4096;
/// Source ports that only root may use and NFS insists on; lower ones belong to well-known services.
const RESERVED: std::ops::RangeInclusive<u16> = 512..=1023;
/// `TCP_INQ` and `TCP_CM_INQ` of linux/tcp.h (since Linux 4.18).
const TCP_INQ: libc::c_int = 36;
/// How many reserved source ports are tried before giving up.
const RESERVED_TRIES: usize = 64;

/// What the packets of a socket are marked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Our traffic with other members: never captured.
    Mesh,
    /// Our connections to local services: never captured, never leave the host.
    Service,
    /// No mark: works without any privilege, and such a connection *is* captured where rules say so. For tests.
    None,
}

impl Mark {
    fn apply(self, socket: &Socket) -> io::Result<()> {
        match self {
            Mark::Mesh => socket.set_mark(MARK_MESH),
            Mark::Service => socket.set_mark(MARK_SERVICE),
            Mark::None => Ok(()),
        }
    }
}

/// Opens a listener. An IPv6 one takes IPv6 only, so that both families can be bound side by side. Accepted sockets inherit the
/// mark.
///
/// # Errors
/// `AddrInUse`; `PermissionDenied` without CAP_NET_ADMIN (mark); `AddrNotAvailable` for IPv6 where it is disabled.
pub fn listen(address: SocketAddr, mark: Mark) -> io::Result<TcpListener> {
    let socket = open(address.ip())?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    mark.apply(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Opens a socket for a connection to `to`, to be connected by the caller. Belongs to the current network namespace.
///
/// # Errors
/// `PermissionDenied` without CAP_NET_ADMIN (mark).
pub fn outgoing(to: IpAddr, mark: Mark) -> io::Result<TcpSocket> {
    let socket = open(to)?;
    mark.apply(&socket)?;
    finish(&socket, Finish::Reset)?;
    Ok(TcpSocket::from_std_stream(socket.into()))
}

/// Opens a socket for a connection to a service of this host that shall see `peer` as its client: bound to the peer's address
/// (`IP_TRANSPARENT`), with a source port that the kernel picks when it is connected. Replies come back only while the
/// policy route and the capture table are installed.
///
/// # Errors
/// `PermissionDenied` without CAP_NET_ADMIN; `AddrNotAvailable` when `peer` cannot be a source address.
pub fn outgoing_as(peer: IpAddr, mark: Mark) -> io::Result<TcpSocket> {
    let socket = transparent(peer, mark)?;
    let on: libc::c_int = 1;
    // Without it the port would be fixed by bind(), before the destination is known, and run out early.
    set_option(socket.as_fd(), libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, &on)?;
    socket.bind(&SocketAddr::new(peer, 0).into())?;
    Ok(TcpSocket::from_std_stream(socket.into()))
}

/// Connects to a local service with the peer's address as source. A client port below 1024 stays below 1024, as services such
/// as NFS take it for a proof of privilege. Sockets belong to the network namespace in which this is called first polled;
/// inside a pod make the socket with [`outgoing_as`].
///
/// # Errors
/// As [`outgoing_as`], and those of connect(2); `AddrInUse` when no reserved port is free.
pub async fn connect_as(peer: SocketAddr, to: SocketAddr, mark: Mark) -> io::Result<TcpStream> {
    if peer.port() == 0 || peer.port() > *RESERVED.end() {
        return outgoing_as(peer.ip(), mark)?.connect(to).await;
    }
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in reserved_ports(peer.port()).take(RESERVED_TRIES) {
        let socket = transparent(peer.ip(), mark)?;
        // Two connections may share a port as long as their far ends differ.
        socket.set_reuse_address(true)?;
        let tried = match socket.bind(&SocketAddr::new(peer.ip(), port).into()) {
            Ok(()) => TcpSocket::from_std_stream(socket.into()).connect(to).await,
            Err(error) => Err(error),
        };
        match tried {
            Err(error) if matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable) => last = error,
            other => return other,
        }
    }
    Err(last)
}

/// Reserved ports, the wanted one first, then downwards from a moving start.
fn reserved_ports(wanted: u16) -> impl Iterator<Item = u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let span = RESERVED.end() - RESERVED.start() + 1;
    let start = NEXT.fetch_add(7, Ordering::Relaxed) % span;
    let rest = (0..span).map(move |i| RESERVED.end() - (start + i) % span);
    RESERVED.contains(&wanted).then_some(wanted).into_iter().chain(rest.filter(move |port| *port != wanted))
}

/// Where the client of a redirected connection wanted to go (`SO_ORIGINAL_DST`). For a connection that was dialled directly to the
/// listener it is the listener's own address: the caller must refuse that, or it would call itself.
///
/// # Errors
/// The kernel's when the connection is not tracked: nothing was redirected.
pub fn original_destination(stream: &impl AsFd, local: SocketAddr) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let address: SockAddr = if local.is_ipv4() { socket.original_dst_v4()? } else { socket.original_dst_v6()? };
    address.as_socket().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "original destination is no IP address"))
}

/// Sets what a connection has that lives as long as two hosts do: no delay, keepalive, a bound on unacknowledged data, RST when dropped.
///
/// # Errors
/// The system call's: the connection is already gone.
pub fn prepare(stream: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    finish(stream, Finish::Reset)
}

/// Has [`receive`] say whether it took all there is (`TCP_INQ`, tcp(7)). Inherited by what a listener accepts.
///
/// # Errors
/// The system call's.
pub fn tell_rest(stream: &impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    set_option(stream.as_fd(), libc::SOL_TCP, TCP_INQ, &on)
}

/// Reads what is there into one piece after another, without waiting. Returns the number of bytes, 0 at the end, and whether nothing was
/// left when the kernel looked: what comes later is an event of its own. A short read alone does not say that, because one stops in
/// front of urgent data. Never true without [`tell_rest`].
///
/// # Errors
/// The system call's, `WouldBlock` when there is nothing.
pub fn receive(stream: &impl AsFd, into: &mut [IoSliceMut<'_>]) -> io::Result<(usize, bool)> {
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        rest: libc::c_int,
    }
    // SAFETY: both are plain numbers and pointers, for which zero is a value.
    let (mut message, mut control): (libc::msghdr, Control) = unsafe { (mem::zeroed(), mem::zeroed()) };
    message.msg_iov = into.as_mut_ptr().cast();
    message.msg_iovlen = into.len() as _;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: an IoSliceMut is an iovec (its documentation says so), the pieces are exclusively borrowed, and `control` outlives the call.
    let read = unsafe { libc::recvmsg(stream.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    // size_t with glibc, socklen_t with musl.
    #[allow(clippy::unnecessary_cast)]
    let told = message.msg_controllen as usize >= mem::offset_of!(Control, rest) + size_of::<libc::c_int>()
        && control.header.cmsg_level == libc::SOL_TCP
        && control.header.cmsg_type == TCP_INQ;
    Ok((read, told && control.rest == 0))
}

/// How a connection stands with its other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Something was sent, or asked, that was not acknowledged yet.
    pub outstanding: bool,
    /// Since the last acknowledgement of anything.
    pub silence: Duration,
}

/// How the connection behind a descriptor stands with its other end (`TCP_INFO`, tcp(7)). That the other end has no room is not silence:
/// it answers whoever asks for some.
///
/// # Errors
/// The system call's, also where there is no connection behind it any more.
pub fn standing(socket: RawFd) -> io::Result<Standing> {
    // The beginning of struct tcp_info (linux/tcp.h), which does not change: eight narrow fields, then numbers of 32 bits.
    const UNACKED: usize = 6;
    const LAST_ACK_RECV: usize = 14;
    let mut info = [0u32; LAST_ACK_RECV + 1];
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes `length` bytes at most, and `info` is so large, aligned, and of numbers for which every value is one. Any
    // number will do for a descriptor.
    let got = unsafe { libc::getsockopt(socket, libc::SOL_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // tcpi_probes, those without an answer, is the fourth of the narrow ones.
    let probes = info[0].to_ne_bytes()[3];
    Ok(Standing { outstanding: info[UNACKED] > 0 || probes > 0, silence: Duration::from_millis(info[LAST_ACK_RECV].into()) })
}

/// How a stream ends when it is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// RST: the other side learns that something broke. How every stream made here begins.
    Reset,
    /// FIN: everything was said.
    Clean,
}

/// Chooses how the stream ends when it is dropped (`SO_LINGER`).
///
/// # Errors
/// The system call's.
pub fn finish(stream: &impl AsFd, how: Finish) -> io::Result<()> {
    SockRef::from(stream).set_linger(match how {
        Finish::Reset => Some(Duration::ZERO),
        Finish::Clean => None,
    })
}

/// Room in the kernel for more to be received before anything of it is read. What is there counts for more than its bytes, and with large
/// segments, as on loopback, the window may be shut with less than a record behind it.
///
/// # Errors
/// The system call's.
pub fn make_room(stream: &impl AsFd) -> io::Result<()> {
    /// Twice what segments that were put together count for until the last byte of them is read: 17 pieces of 32 KiB.
    const ROOM: libc::c_int = 1 << 20;
    const ANY: libc::c_int = 1;
    // The kernel makes its buffer fit what is to be waited for, as far as tcp_rmem allows, and leaves it so.
    set_option(stream.as_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, &ROOM)?;
    set_option(stream.as_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, &ANY)
}

/// Shorthand for `finish(stream, Finish::Clean)`.
///
/// # Errors
/// The system call's.
pub fn clean(stream: &impl AsFd) -> io::Result<()> {
    finish(stream, Finish::Clean)
}

/// A UDP socket on `port` that hears `group` on the interface with this address and sends there, its own words included. Shares the
/// port with whoever shares it (`SO_REUSEPORT`).
///
/// # Errors
/// `AddrInUse` when somebody has the port for himself; the kernel's when the interface cannot multicast.
pub fn multicast(group: Ipv4Addr, interface: Ipv4Addr, port: u16) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    socket.join_multicast_v4(&group, &interface)?;
    socket.set_multicast_if_v4(&interface)?;
    socket.set_multicast_loop_v4(true)?;
    // What travels further is not of this link (RFC 6762 §11).
    socket.set_multicast_ttl_v4(255)?;
    Ok(socket.into())
}

fn open(ip: IpAddr) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(SocketAddr::new(ip, 0)), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    Ok(socket)
}

fn transparent(peer: IpAddr, mark: Mark) -> io::Result<Socket> {
    let socket = open(peer)?;
    mark.apply(&socket)?;
    match peer {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    finish(&socket, Finish::Reset)?;
    Ok(socket)
}

/// Makes every UDP socket of this process at `port` deaf for good: the kernel drops what arrives for it, at next to no cost, and the rest
/// of the process is spared it. For the sockets of a library that has none of its own and is about to end.
///
/// # Errors
/// When the descriptors of this process cannot be listed; a socket that refuses is left as it is.
pub fn deafen(port: u16) -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|n| n.parse::<RawFd>().ok()) else { continue };
        // SAFETY: borrowed for one dup(2), which fails when another thread has closed it meanwhile. Whatever it is now, it is the copy that
        // is looked at before anything is done to it.
        let Ok(copy) = (unsafe { BorrowedFd::borrow_raw(number) }).try_clone_to_owned() else { continue };
        let socket = SockRef::from(&copy);
        let here = |s: &SockRef<'_>| s.local_addr().ok().and_then(|a| a.as_socket()).is_some_and(|a| a.port() == port);
        if socket.r#type().is_ok_and(|t| t == Type::DGRAM) && here(&socket) {
            // `ret #0`: no byte of any packet is let through (Documentation/networking/filter.rst).
            let _ = socket.attach_filter(&[SockFilter::new(0x06, 0, 0, 0)]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_reserved_port_is_tried_first_and_none_twice() {
        let ports: Vec<u16> = reserved_ports(700).collect();
        assert_eq!(ports[0], 700);
        assert_eq!(ports.iter().collect::<std::collections::BTreeSet<_>>().len(), 512);
        assert_eq!(ports.len(), 512);
        // Port 22 as a source would look like the service itself.
        assert!(reserved_ports(22).all(|port| RESERVED.contains(&port)));
    }

    #[tokio::test]
    async fn dropping_resets_and_cleaning_does_not() {
        use tokio::io::AsyncReadExt;
        let listener = listen("127.0.0.1:0".parse().unwrap(), Mark::None).unwrap();
        let to = listener.local_addr().unwrap();
        for how in [Finish::Reset, Finish::Clean] {
            let client = outgoing(to.ip(), Mark::None).unwrap().connect(to).await.unwrap();
            let (mut served, _) = listener.accept().await.unwrap();
            finish(&client, how).unwrap();
            drop(client);
            let read = served.read(&mut [0; 1]).await;
            match how {
                Finish::Reset => assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset),
                Finish::Clean => assert_eq!(read.unwrap(), 0),
            }
        }
    }

    #[tokio::test]
    async fn that_nothing_is_left_is_inherited_from_the_listener_and_not_said_in_front_of_urgent_data() {
        let listener = listen("127.0.0.1:0".parse().unwrap(), Mark::None).unwrap();
        let to = listener.local_addr().unwrap();
        let mut some = [0; 16];
        let mut next = async |told: bool, says: &[&[u8]]| {
            let client = outgoing(to.ip(), Mark::None).unwrap().connect(to).await.unwrap();
            for (nth, says) in says.iter().enumerate() {
                let urgent = if nth == 1 { libc::MSG_OOB } else { 0 };
                SockRef::from(&client).send_with_flags(says, urgent).unwrap();
            }
            let (served, _) = listener.accept().await.unwrap();
            served.readable().await.unwrap();
            let got = receive(&served, &mut [IoSliceMut::new(&mut some)]).unwrap();
            let rest = receive(&served, &mut [IoSliceMut::new(&mut some)]).ok();
            assert!(!got.1 || told);
            (got, rest, client)
        };
        assert_eq!(next(false, &[b"abc"]).await.0, (3, false));
        tell_rest(&listener).unwrap();
        assert_eq!(next(true, &[b"abc"]).await.0, (3, true));
        let (got, rest, _) = next(true, &[b"abc", b"!", b"def"]).await;
        assert_eq!((got, rest), ((3, false), Some((3, true))));
    }

    /// What is left of a segment counts for all of it and may keep the window shut. Who takes whole records only gets each of them all the same.
    #[test]
    fn there_is_room_for_a_record_behind_what_is_not_read_yet() {
        use std::io::Write;
        const RECORD: usize = 16_406;
        const RECORDS: usize = 600;
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                    let mut from = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                    let (to, _) = listener.accept().unwrap();
                    to.set_nonblocking(true).unwrap();
                    // For the writer: it must not wait for ever where this fails.
                    from.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
                    let writer = std::thread::spawn(move || from.write_all(&vec![7; RECORD * RECORDS]));
                    let (mut record, mut roomy) = (vec![0; RECORD], false);
                    for number in 0..RECORDS {
                        if number % 4 == 0 {
                            // The writer fills what there is.
                            std::thread::sleep(Duration::from_millis(2));
                        }
                        let begun = tokio::time::Instant::now();
                        while rustix::net::recv(&to, &mut record[..], rustix::net::RecvFlags::PEEK).map_or(0, |(_, n)| n) < RECORD
                        {
                            if !std::mem::replace(&mut roomy, true) {
                                make_room(&to).unwrap();
                            }
                            assert!(begun.elapsed() < Duration::from_secs(10), "record {number} does not come to its end");
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        assert_eq!(rustix::net::recv(&to, &mut record[..], rustix::net::RecvFlags::empty()).unwrap().1, RECORD);
                    }
                    writer.join().unwrap().unwrap();
                });
            }
        });
    }

    #[test]
    fn a_socket_that_was_made_deaf_hears_nothing_and_the_others_do() {
        let bound = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let (deaf, other, from) = (bound(), bound(), bound());
        deafen(deaf.local_addr().unwrap().port()).unwrap();
        for socket in [&deaf, &other] {
            from.send_to(b"x", socket.local_addr().unwrap()).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        }
        assert!(deaf.recv(&mut [0; 8]).is_err() && other.recv(&mut [0; 8]).is_ok());
    }
}
