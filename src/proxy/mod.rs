//! The data plane: what happens to one TCP connection between two members.
//!
//! # Life of a connection
//!
//! On the host of the application ([`outbound`]):
//!
//! 1. The application connects to a member's address; the kernel hands the connection to us. From here on whatever goes wrong
//!    reaches the application as a reset, because its socket resets unless both directions ended cleanly ([`socket`]).
//! 2. [`Kernel::original_dst`] says where it wanted to go; our own ports, loopback and our own addresses are refused.
//! 3. [`Kernel::owner`] says which workload it is, [`Directory::member_at`] which member is bound to the address. The workload's
//!    SVID comes from [`crate::identity::svids::Svids`].
//! 4. A tunnel that waits for such a connection is taken from the [`pool`], or we dial *the same address* at the member's mesh port,
//!    from the application's own source address, and shake hands: SNI `p<port>.meshd`, ALPN `meshd/2` or `meshd/1`. The holder of the
//!    certificate shown must be that member, with every connection anew. There is no plaintext fallback.
//! 5. The header ([`header`]) leaves together with whatever the application has said by then, and the relay ([`tunnel`]) starts.
//!    Nothing waits for an answer, so a server that speaks first is served as it is.
//!
//! On the host of the service ([`inbound`]):
//!
//! 1. The SNI chose the SVID that was shown. The header must name the same port, and the port must still belong to that SVID;
//!    otherwise the peer is told so ([`header::Refusal`]) inside the tunnel: nothing was delivered, and it knows.
//! 2. We connect to *the address the tunnel arrived at* and the port, bound to the client's address, so that the service sees the
//!    real client and what it did not open to the network stays unreachable.
//! 3. The relay starts. "Accepted" travels in front of the service's first bytes or end.
//!
//! An empty record (`meshd/1`: `close_notify`) ends a direction, the other goes on; after both the tunnel takes the next connection. A
//! tunnel that ends in between was cut, and the application or service gets
//! a reset. Each connection is one task: a panic ends that connection and is counted. All live ones are in [`live`], so that a
//! banished peer is cut at once; what they were is in [`edges`], and, if wanted, in a line of its own ([`access`]).
//!
//! The kernel and the catalog come in through [`Kernel`] and [`Directory`]: this module has no rules, no netlink and no gossip.

pub mod access;
pub mod edges;
pub mod header;
pub mod inbound;
pub mod live;
pub mod outbound;
pub mod pool;
pub mod socket;
#[cfg(test)]
mod tests;
pub mod tunnel;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use meshd_ca::identity::{NodeId, SpiffeId, Workload};
use meshd_ca::time::UnixTime;
use meshd_ca::verify::VerifyError;
use thiserror::Error;
use tokio::net::{TcpSocket, TcpStream};

use crate::identity::svids::Svids;
use crate::identity::verifier::SvidVerifier;
use edges::{Edges, Reason};
use header::{HeaderError, Refusal};
use live::{Cut, Live};
use pool::Pool;

/// A connection being made.
pub type Connecting = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

/// What the data plane needs from the kernel. All calls are quick (microseconds) and do not wait.
pub trait Kernel: Send + Sync + 'static {
    /// Where the application of this captured connection wanted to go (`SO_ORIGINAL_DST`).
    ///
    /// # Errors
    /// When the connection was not redirected to us.
    fn original_dst(&self, app: &TcpStream) -> io::Result<SocketAddr>;

    /// The workload of the local socket that connects from `client` to `destination` (sock_diag, then its cgroup); none when it
    /// cannot be told, for instance because the process is gone.
    fn owner(&self, client: SocketAddr, destination: SocketAddr) -> Option<Workload>;

    /// A socket for a connection to a member's mesh port: marked as our own, bound to `source` with a port of the kernel's choice.
    ///
    /// # Errors
    /// When there are no sockets left, or `source` is not an address of this host any more.
    fn mesh_socket(&self, source: IpAddr) -> io::Result<TcpSocket>;

    /// A connection to a local service that looks as if `client` had made it: marked, transparent, bound to that address. With
    /// a client port below 1024 the port is below 1024 too; above, or 0, it is of the kernel's choice.
    ///
    /// # Errors
    /// When the service does not accept, there are no sockets or low ports left, or the kernel does not allow it.
    fn connect_service(&self, client: SocketAddr, service: SocketAddr) -> Connecting;

    /// Lets the kernel itself refuse connections to `destination` for a moment: the port was closed there just now.
    fn refuse(&self, destination: SocketAddr);

    /// Whether an address never leaves the host.
    fn is_loopback(&self, ip: IpAddr) -> bool {
        ip.is_loopback()
    }
}

/// What the data plane needs to know about the mesh, answered from the snapshot of this moment.
pub trait Directory: Send + Sync + 'static {
    /// The member that an address is bound to by a handshake we made; none when it is nobody's.
    fn member_at(&self, ip: IpAddr) -> Option<Member>;

    /// Whether an address is this host's own.
    fn is_own(&self, ip: IpAddr) -> bool;

    /// The workload that `node` says it runs at an address and port.
    fn expected(&self, node: NodeId, service: SocketAddr) -> Option<Workload>;

    /// A tunnel to `ip` could not be had: whoever looks after the addresses may want to look there again.
    fn suspect(&self, _ip: IpAddr) {}

    /// The workload of this host that listens at an address and port, not counting what listens on loopback only.
    fn listener(&self, service: SocketAddr) -> Option<Workload>;
}

/// The member at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Whose certificate is expected there.
    pub node: NodeId,
    /// Its mesh port.
    pub port: u16,
    /// It announced that it will be back in a moment: hold connections briefly instead of failing them.
    pub restarting: bool,
}

/// The ports that never carry an application's connection.
#[derive(Debug, Clone, Copy)]
pub struct OwnPorts {
    /// What peers dial.
    pub mesh: u16,
    /// Where the kernel sends captured connections.
    pub capture: u16,
    /// Metrics and readiness, unless they are open to other hosts: what is on loopback is not for peers.
    pub admin: Option<u16>,
}

impl OwnPorts {
    /// Whether peers are never led to `port` of this host.
    pub fn contain(&self, port: u16) -> bool {
        self.carry(port) || self.admin == Some(port)
    }

    /// Whether `port` is one that carries the mesh itself, on this host as on others with the same settings.
    pub fn carry(&self, port: u16) -> bool {
        [self.mesh, self.capture].contains(&port)
    }
}

impl Default for OwnPorts {
    fn default() -> Self {
        Self { mesh: 6374, capture: 6375, admin: Some(6376) }
    }
}

/// The limits and patience of the data plane.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Our own ports.
    pub ports: OwnPorts,
    /// For the TCP connection to a member. The default outlasts three lost SYNs: Wi-Fi that just woke up.
    pub dial: Duration,
    /// For a TLS handshake.
    pub handshake: Duration,
    /// For the header after the handshake.
    pub header: Duration,
    /// For the local service to accept.
    pub service: Duration,
    /// How long a connection to a member that announced a restart is held.
    pub hold: Duration,
    /// Silence on a connection before the kernel asks whether its other end is alive. Below the 60 s after which conntrack
    /// forgets a half-closed connection, so that waiting for a long answer does not lose it.
    pub keepalive: Duration,
    /// Where a line is written for each connection that has ended.
    pub access: access::AccessLog,
    /// How long a tunnel that carries nothing is kept by the side that dialled; the other side waits twice as long, so that it is
    /// the dialler who closes and no header crosses an end.
    pub idle: Duration,
    /// Whether a tunnel is dialled ahead of its connection to where one is used after the other.
    pub ahead: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ports: OwnPorts::default(),
            dial: Duration::from_secs(10),
            handshake: Duration::from_secs(10),
            header: Duration::from_secs(5),
            service: Duration::from_secs(5),
            hold: Duration::from_secs(5),
            keepalive: Duration::from_secs(30),
            access: access::AccessLog::default(),
            idle: Duration::from_secs(60),
            ahead: true,
        }
    }
}

/// The data plane of one node.
pub struct Proxy {
    /// The kernel's side.
    pub kernel: Arc<dyn Kernel>,
    /// Who is where.
    pub directory: Arc<dyn Directory>,
    /// Our own credentials.
    pub svids: Arc<Svids>,
    /// Whom we believe.
    pub verifier: Arc<SvidVerifier>,
    /// Limits and patience.
    pub settings: Settings,
    /// The connections of this moment.
    pub live: Live,
    /// What they were.
    pub edges: Edges,
    /// Tunnels that wait for their next use.
    pub pool: Pool,
    panics: AtomicU64,
}

impl Proxy {
    /// A data plane without connections.
    pub fn new(
        kernel: Arc<dyn Kernel>,
        directory: Arc<dyn Directory>,
        svids: Arc<Svids>,
        verifier: Arc<SvidVerifier>,
        settings: Settings,
        limits: live::Limits,
    ) -> Arc<Self> {
        let pool = Pool::new(settings.idle, settings.keepalive, limits.resting);
        let (live, edges) = (Live::new(limits), Edges::default());
        Arc::new(Self { kernel, directory, svids, verifier, settings, live, edges, pool, panics: AtomicU64::new(0) })
    }

    /// How many connections ended by a panic of ours since the start: each is a defect worth a report.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    /// Ends every connection with `peer` at once, see [`Live::cut`], and closes the tunnels that wait for their next use.
    pub fn cut(&self, peer: NodeId, why: Cut) -> usize {
        let cut = self.live.cut(peer, why);
        self.pool.clear(peer);
        cut
    }

    /// Ends connections whose peer is gone, see [`Live::look_after`]. Never returns.
    pub async fn look_after(self: Arc<Self>) {
        self.live.look_after(socket::patience(self.settings.keepalive)).await;
    }

    /// Takes no new connections and lets the live ones end, see [`Live::drain`].
    pub async fn drain(&self, patience: Duration) -> usize {
        self.pool.close();
        self.live.drain(patience).await
    }

    /// Leaves what is new to another process, see [`Live::retire`], and closes the tunnels that wait for their next use.
    pub fn retire(&self) {
        self.pool.close();
        self.live.retire();
    }

    /// Mesh time.
    fn now(&self) -> UnixTime {
        self.verifier.now()
    }

    /// This node.
    fn node(&self) -> NodeId {
        self.svids.node()
    }

    /// The whole identity of a workload of this mesh.
    fn id(&self, workload: Workload) -> SpiffeId {
        SpiffeId::new(self.verifier.trust().bundle.trust_domain.clone(), workload)
    }

    /// Counts the panic that unwinds through its holder.
    fn panic_guard(&self) -> PanicGuard<'_> {
        PanicGuard(&self.panics)
    }
}

struct PanicGuard<'a>(&'a AtomicU64);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Why a connection did not end the way its two applications meant it to.
#[derive(Debug, Error)]
pub enum Fault {
    /// It was not one that the kernel captured for us: somebody dialled our port, or loopback or this host's own address came in.
    #[error("not a captured connection to another host: {0}")]
    NotCaptured(String),
    /// The address is no member's by now.
    #[error("no member is bound to {0}; it may have moved or left: connect again")]
    NoMember(IpAddr),
    /// This node has no SVID yet, not even its own.
    #[error("this node has no certificate yet; `meshd check` says why")]
    NoSvid,
    /// The member did not answer.
    #[error("cannot reach the mesh port: {0}; is meshd running there, and the port open?")]
    Unreachable(io::Error),
    /// Something took longer than it may.
    #[error("no {0} in time")]
    Timeout(&'static str),
    /// TLS with the peer failed: a certificate was not accepted, or it is no meshd.
    #[error("the handshake failed: {0}")]
    Handshake(io::Error),
    /// The peer's certificate is no longer believed.
    #[error("the peer's certificate is not accepted: {0}")]
    Identity(#[from] VerifyError),
    /// Another member than the one bound to the address answered.
    #[error("{found} answered where {expected} was expected; two hosts may share the address")]
    WrongPeer {
        /// The member bound to the address.
        expected: NodeId,
        /// The holder of the certificate shown.
        found: NodeId,
    },
    /// The peer's first bytes are not a header.
    #[error("the peer sent no valid header: {0}")]
    Header(#[from] HeaderError),
    /// The node of the service refused; nothing was delivered.
    #[error("{0}")]
    Refused(Refusal),
    /// The tunnel ended before the peer said whether it accepted.
    #[error("the tunnel ended without an answer")]
    NoVerdict,
    /// The application or service broke its connection off.
    #[error("the application's side broke: {0}")]
    App(io::Error),
    /// The tunnel was cut: without close_notify, by a reset, or with garbage in it.
    #[error("the tunnel broke: {0}")]
    Tunnel(io::Error),
    /// We cut it.
    #[error("{0}")]
    Cut(Cut),
    /// Too many connections.
    #[error("too many connections")]
    Overload,
    /// We are stopping and take no new ones.
    #[error("meshd is stopping")]
    Draining,
}

impl Fault {
    /// The kind of fault, for counting.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotCaptured(_) => Reason::NotCaptured,
            Self::NoMember(_) => Reason::NoMember,
            Self::NoSvid => Reason::NoSvid,
            Self::Unreachable(_) => Reason::Unreachable,
            Self::Timeout(_) => Reason::Timeout,
            Self::Handshake(_) | Self::Identity(_) => Reason::Handshake,
            Self::WrongPeer { .. } => Reason::WrongPeer,
            Self::Header(_) => Reason::Header,
            Self::Refused(r) => Reason::Refused(*r),
            Self::App(_) => Reason::App,
            Self::NoVerdict | Self::Tunnel(_) => Reason::Tunnel,
            Self::Cut(c) => Reason::Cut(*c),
            Self::Overload => Reason::Overload,
            Self::Draining => Reason::Draining,
        }
    }
}
