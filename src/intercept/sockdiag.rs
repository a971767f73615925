//! Who owns a socket, and who listens where, by `NETLINK_SOCK_DIAG`.
//!
//! Owns: one netlink socket, bound to the network namespace it was opened in. Does not own: what a cgroup is called
//! ([`super::cgroup`]). Invariant: an answer is only believed if it describes the connection that was asked for. Layout:
//! `linux/inet_diag.h`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use super::message::{self, Builder, attributes};
use super::netlink::{Family, NetlinkError, Socket};

/// `SOCK_DIAG_BY_FAMILY`
const BY_FAMILY: u16 = 20;
/// `INET_DIAG_SKV6ONLY`
const V6ONLY: u16 = 11;
/// `INET_DIAG_CGROUP_ID`, since Linux 5.9.
const CGROUP: u16 = 21;
/// `struct inet_diag_msg`
const MESSAGE: usize = 72;
/// `TCP_LISTEN`
const LISTEN: u8 = 10;
/// `TCP_ESTABLISHED`
const ESTABLISHED: u8 = 1;
/// Established, FIN-WAIT-1 and -2, CLOSE-WAIT, LAST-ACK, CLOSING.
const CONNECTED: u32 = 1 << ESTABLISHED | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// How often a dump that was disturbed is repeated.
const DUMP_TRIES: usize = 5;
/// Bound on listeners; a host with more is not described completely.
const MAX_LISTENERS: usize = 8192;
/// Bound on connections listed.
const MAX_CONNECTIONS: usize = 65_536;

/// A socket as the kernel describes it. IPv4-mapped addresses are given as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketInfo {
    /// Its own end.
    pub local: SocketAddr,
    /// The far end, as the application believes; unspecified for a listener.
    pub remote: SocketAddr,
    /// User that opened it. Only meaningful while a process holds it (`inode` not 0).
    pub uid: u32,
    /// Inode in the socket file system, 0 when no process holds it any more.
    pub inode: u32,
    /// Control group (v2) in which it was opened; `None` on kernels before 5.9.
    pub cgroup: Option<u64>,
    /// An IPv6 listener that takes no IPv4; only a question for one on `::`.
    pub v6only: bool,
}

/// A connection as the kernel lists it. IPv4-mapped addresses are given as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// Its own end.
    pub local: SocketAddr,
    /// The far end, as the program that opened it believes.
    pub remote: SocketAddr,
    /// Whether both directions are open.
    pub established: bool,
}

/// Looks up sockets in one network namespace. Lookups take microseconds and never wait.
#[derive(Debug)]
pub struct SockDiag(Mutex<Socket>);

impl SockDiag {
    /// Opens one for the current network namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Open`]
    pub fn open() -> Result<SockDiag, NetlinkError> {
        Ok(SockDiag(Mutex::new(Socket::open(Family::SockDiag)?)))
    }

    /// The TCP socket with exactly this source and destination, in its own view: a redirected client still believes in the
    /// original destination. `None` when there is none (any more).
    ///
    /// # Errors
    /// [`NetlinkError`]; EPERM does not occur, reading is free.
    pub fn find(&self, source: SocketAddr, destination: SocketAddr) -> Result<Option<SocketInfo>, NetlinkError> {
        let (source, destination) = (canonical(source), canonical(destination));
        let mut request = Builder::new();
        request.message(BY_FAMILY, 0, &request_head(source, destination, u32::MAX), |_| {});
        let answer = match self.lock().ask(request) {
            Ok((_, payload)) => parse(&payload),
            Err(e) if e.errno() == Some(libc::ENOENT) => None,
            Err(e) => return Err(e),
        };
        // Without the connection itself the kernel offers a listener that would take it.
        let found = answer.filter(|(state, info)| *state != LISTEN && info.local == source && info.remote == destination);
        Ok(found.map(|(_, info)| info))
    }

    /// Every TCP listener, of loopback too.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn listeners(&self) -> Result<Vec<SocketInfo>, NetlinkError> {
        let found = self.all(1 << LISTEN, MAX_LISTENERS)?;
        Ok(found.into_iter().map(|(_, info)| info).collect())
    }

    /// Every TCP connection that a program may still use, half-closed ones included.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn connections(&self) -> Result<Vec<Connection>, NetlinkError> {
        let found = self.all(CONNECTED, MAX_CONNECTIONS)?;
        let connection =
            |(state, i): (u8, SocketInfo)| Connection { local: i.local, remote: i.remote, established: state == ESTABLISHED };
        Ok(found.into_iter().map(connection).collect())
    }

    fn all(&self, states: u32, limit: usize) -> Result<Vec<(u8, SocketInfo)>, NetlinkError> {
        let mut socket = self.lock();
        for _ in 0..DUMP_TRIES {
            match dump(&mut socket, states, limit) {
                Err(NetlinkError::Changing) => {}
                other => return other,
            }
        }
        Err(NetlinkError::Changing)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Socket> {
        // Exchanges are numbered; one that was left half-way does not disturb the next.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn dump(socket: &mut Socket, states: u32, limit: usize) -> Result<Vec<(u8, SocketInfo)>, NetlinkError> {
    let mut found = Vec::new();
    for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        let any = SocketAddr::new(any, 0);
        let mut request = Builder::new();
        request.message(BY_FAMILY, message::DUMP, &request_head(any, any, states), |_| {});
        let dumped = socket.dump(request, |kind, payload| {
            if kind == BY_FAMILY && found.len() < limit {
                found.extend(parse(payload));
            }
            Ok(())
        });
        match dumped {
            // No IPv6 in this kernel.
            Err(e) if any.is_ipv6() && e.errno() == Some(libc::ENOENT) => {}
            other => other?,
        }
    }
    Ok(found)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// `struct inet_diag_req_v2`
fn request_head(source: SocketAddr, destination: SocketAddr, states: u32) -> Vec<u8> {
    let family = if source.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut head = vec![family as u8, libc::IPPROTO_TCP as u8, 0, 0];
    head.extend_from_slice(&states.to_ne_bytes());
    head.extend_from_slice(&source.port().to_be_bytes());
    head.extend_from_slice(&destination.port().to_be_bytes());
    for address in [source, destination] {
        match address.ip() {
            IpAddr::V4(ip) => {
                head.extend_from_slice(&ip.octets());
                head.extend_from_slice(&[0; 12]);
            }
            IpAddr::V6(ip) => head.extend_from_slice(&ip.octets()),
        }
    }
    head.extend_from_slice(&[0; 4]); // any interface
    head.extend_from_slice(&[0xff; 8]); // INET_DIAG_NOCOOKIE
    head
}

/// State and description.
pub(super) fn parse(payload: &[u8]) -> Option<(u8, SocketInfo)> {
    let head: &[u8; MESSAGE] = payload.get(..MESSAGE)?.try_into().ok()?;
    let port = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
    let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let address = |at: usize| -> Option<IpAddr> {
        match i32::from(head[0]) {
            libc::AF_INET => Some(Ipv4Addr::new(head[at], head[at + 1], head[at + 2], head[at + 3]).into()),
            libc::AF_INET6 => {
                let octets: [u8; 16] = head.get(at..at + 16)?.try_into().ok()?;
                Some(IpAddr::from(octets).to_canonical())
            }
            _ => None,
        }
    };
    let mut info = SocketInfo {
        local: SocketAddr::new(address(8)?, port(4)),
        remote: SocketAddr::new(address(24)?, port(6)),
        uid: word(64),
        inode: word(68),
        cgroup: None,
        v6only: false,
    };
    for attr in attributes(payload.get(MESSAGE..)?) {
        match attr.kind {
            CGROUP => info.cgroup = attr.u64(),
            V6ONLY => info.v6only = attr.value.first().is_some_and(|flag| *flag != 0),
            _ => {}
        }
    }
    Some((head[1], info))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn finds_its_own_sockets_and_no_others() {
        let diag = SockDiag::open().unwrap();
        for bind in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(bind) else { continue };
            let mut to = listener.local_addr().unwrap();
            if to.ip().is_unspecified() {
                to.set_ip("127.0.0.1".parse().unwrap()); // through a dual-stack listener
            }
            let client = TcpStream::connect(to).unwrap();
            let found = diag.find(client.local_addr().unwrap(), to).unwrap().unwrap();
            assert_eq!((found.local, found.remote), (client.local_addr().unwrap(), to));
            assert_eq!(found.uid, crate::intercept::process::effective_uid());
            // The listener must not be offered for a connection that does not exist.
            let stranger = SocketAddr::new(client.local_addr().unwrap().ip(), 1);
            assert_eq!(diag.find(stranger, to).unwrap(), None);
            let listening = listener.local_addr().unwrap();
            let listed = diag.listeners().unwrap();
            let listed = listed.iter().find(|l| l.local == listening).unwrap();
            // One IPv6 address is IPv6 only by nature; "::" takes both unless told otherwise.
            assert_eq!(listed.v6only, bind == "[::1]:0");
        }
    }

    #[test]
    fn a_mapped_client_is_found_by_its_ipv4_addresses() {
        let diag = SockDiag::open().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let mapped: SocketAddr = format!("[::ffff:127.0.0.1]:{}", to.port()).parse().unwrap();
        let client = TcpStream::connect(mapped).unwrap();
        let (_, peer) = listener.accept().unwrap();
        let found = diag.find(peer, to).unwrap().unwrap();
        assert_eq!(found.local, peer);
        assert_eq!(diag.find(client.local_addr().unwrap(), mapped).unwrap(), Some(found));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), family in 0u8..12) {
            parse(&bytes);
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() { *first = family; }
            parse(&bytes);
        }
    }
}
