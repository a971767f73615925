//! From an application of this host to a service on another member.
//!
//! One connection is one call of `carry`, read from top to bottom. Invariant: toward a member's address there is a tunnel with
//! that member or a reset, never plaintext.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::identity::{SpiffeId, Workload};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::{TlsConnector, TlsStream};

use super::access::Entry;
use super::edges::{Direction, Key};
use super::header::{Header, Refusal};
use super::relay::{Plain, Relay, Role};
use super::{Fault, Member, Proxy, socket};
use crate::identity::svids::Svid;
use crate::identity::tls::{ALPN_DATA, server_name};

/// How often a member that announced a restart is tried.
const HOLD_STEP: Duration = Duration::from_millis(200);

/// Takes captured connections from `listener`, each into a task of its own, until a drain begins.
pub async fn accept(proxy: Arc<Proxy>, listener: TcpListener) {
    loop {
        let accepted = tokio::select! {
            a = listener.accept() => a,
            () = proxy.live.draining() => return,
        };
        match accepted {
            Ok((app, _)) => {
                let proxy = proxy.clone();
                tokio::spawn(async move { serve(&proxy, app).await });
            }
            Err(error) => {
                // No descriptors or memory, or a connection that was gone already: neither ends the listener.
                tracing::warn!(%error, "cannot accept a captured connection");
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Carries one captured connection until it ends, and says in the log why if it failed.
pub async fn serve(proxy: &Proxy, app: TcpStream) {
    let _counted = proxy.panic_guard();
    let mut entry = proxy.settings.access.begin(Direction::Outbound, proxy.now());
    let result = carry(proxy, app, &mut entry).await;
    entry.end(&result);
    if let Err(fault) = result {
        proxy.edges.fault(Direction::Outbound, fault.reason());
        match fault {
            Fault::WrongPeer { .. } | Fault::NotCaptured(_) => tracing::warn!(%fault, "outbound connection reset"),
            _ => tracing::debug!(%fault, "outbound connection reset"),
        }
    }
}

/// What is known of a connection before its peer is.
struct Call {
    client: SocketAddr,
    destination: SocketAddr,
    port: NonZeroU16,
    member: Member,
    workload: Workload,
}

/// # Errors
/// Why the application got a reset.
async fn carry(proxy: &Proxy, mut app: TcpStream, entry: &mut Entry) -> Result<(), Fault> {
    socket::application(&app, proxy.settings.keepalive).map_err(Fault::App)?;
    let client = canonical(app.peer_addr().map_err(Fault::App)?);
    let destination = canonical(proxy.kernel.original_dst(&app).map_err(|e| Fault::NotCaptured(e.to_string()))?);
    entry.ends(client, destination);
    let port = guard(proxy, destination)?;
    // Asked at once, while the application's socket surely exists.
    let workload = proxy.kernel.owner(client, destination);
    let workload = workload.unwrap_or_else(|| Workload::Node(proxy.node()));
    let Some(member) = proxy.directory.member_at(destination.ip()) else {
        let fault = Fault::NoMember(destination.ip());
        let source = Some(proxy.id(workload));
        let key = Key { direction: Direction::Outbound, source, destination: None, address: destination.ip(), port: port.get() };
        entry.between(&key, None, false);
        proxy.edges.fail(key, None, fault.reason(), proxy.now());
        return Err(fault);
    };
    let call = Call { client, destination, port, member, workload };
    let result = match proxy.live.enter(Direction::Outbound, member.node) {
        Ok(ticket) => ticket.run(connect(proxy, &call)).await.map(|secured| (ticket, secured)),
        Err(fault) => Err(fault),
    };
    let (ticket, (svid, tunnel, peer)) = match result {
        Ok(secured) => secured,
        Err(fault) => {
            let key = call.unsecured(proxy);
            entry.between(&key, Some(member.node), false);
            proxy.edges.fail(key, Some(member.node), fault.reason(), proxy.now());
            if matches!(fault, Fault::Unreachable(_) | Fault::Timeout(_) | Fault::Handshake(_) | Fault::WrongPeer { .. }) {
                proxy.directory.suspect(destination.ip());
            }
            return Err(fault);
        }
    };
    let key = call.secured(svid.id(), peer);
    entry.between(&key, Some(member.node), true);
    let edge = proxy.edges.open(key, member.node, proxy.now());
    let header = Header { port, address: Some(destination.ip()), client: Some(client), low_port: client.port() < 1024 };
    let result = ticket.run(Plain.relay(&mut app, tunnel, Role::Dialler(header), edge.meter())).await;
    if let Err(Fault::Refused(Refusal::Closed)) = result {
        // Before the application sees its reset: its next attempt is refused by the kernel.
        proxy.kernel.refuse(destination);
    }
    entry.bytes(edge.bytes());
    edge.settle(&result, proxy.now());
    result
}

/// Refuses what the kernel never captures: somebody dialled our port, or the rules are not what we think. Without this the proxy
/// could end up calling itself.
fn guard(proxy: &Proxy, destination: SocketAddr) -> Result<NonZeroU16, Fault> {
    let ip = destination.ip();
    let own = proxy.kernel.is_loopback(ip) || ip.is_unspecified() || ip.is_multicast() || proxy.directory.is_own(ip);
    match NonZeroU16::new(destination.port()) {
        Some(port) if !own && !proxy.settings.ports.carry(port.get()) => Ok(port),
        _ => Err(Fault::NotCaptured(destination.to_string())),
    }
}

type Secured = (Arc<Svid>, TlsStream<TcpStream>, SpiffeId);

/// A tunnel to the member that the address is bound to, and nobody else.
async fn connect(proxy: &Proxy, call: &Call) -> Result<Secured, Fault> {
    let svid = proxy.svids.for_client(&call.workload).await.ok_or(Fault::NoSvid)?;
    let tcp = dial(proxy, call).await?;
    let handshake = TlsConnector::from(svid.client().clone()).connect(server_name(call.port), tcp);
    let tls = timeout(proxy.settings.handshake, handshake).await;
    let tls = tls.map_err(|_| Fault::Timeout("handshake"))?.map_err(Fault::Handshake)?;
    if tls.get_ref().1.alpn_protocol() != Some(ALPN_DATA) {
        return Err(Fault::Handshake(io::Error::other("the peer does not speak meshd/1")));
    }
    let peer = proxy.verifier.peer(tls.get_ref().1)?;
    if peer.holder != call.member.node {
        return Err(Fault::WrongPeer { expected: call.member.node, found: peer.holder });
    }
    Ok((svid, tls.into(), peer.id))
}

/// Dials the member; one that announced a restart is tried again and again for a moment.
async fn dial(proxy: &Proxy, call: &Call) -> Result<TcpStream, Fault> {
    let deadline = Instant::now() + proxy.settings.hold;
    let mut member = call.member;
    loop {
        let fault = match dial_once(proxy, call.client.ip(), SocketAddr::new(call.destination.ip(), member.port)).await {
            Ok(tcp) => return Ok(tcp),
            Err(fault) => fault,
        };
        if !member.restarting || Instant::now() >= deadline {
            return Err(fault);
        }
        sleep(HOLD_STEP).await;
        match proxy.directory.member_at(call.destination.ip()) {
            Some(now) if now.node == member.node => member = Member { restarting: true, ..now },
            _ => return Err(Fault::NoMember(call.destination.ip())),
        }
    }
}

async fn dial_once(proxy: &Proxy, from: IpAddr, to: SocketAddr) -> Result<TcpStream, Fault> {
    let socket = proxy.kernel.mesh_socket(from).map_err(Fault::Unreachable)?;
    let tcp = timeout(proxy.settings.dial, socket.connect(to)).await;
    let tcp = tcp.map_err(|_| Fault::Timeout("answer from the mesh port"))?.map_err(Fault::Unreachable)?;
    socket::tunnel(&tcp, proxy.settings.keepalive).map_err(Fault::Unreachable)?;
    Ok(tcp)
}

impl Call {
    fn secured(&self, source: &SpiffeId, peer: SpiffeId) -> Key {
        self.key(source.clone(), Some(peer))
    }

    fn unsecured(&self, proxy: &Proxy) -> Key {
        let expected = proxy.directory.expected(self.member.node, self.destination);
        self.key(proxy.id(self.workload.clone()), expected.map(|w| proxy.id(w)))
    }

    fn key(&self, source: SpiffeId, destination: Option<SpiffeId>) -> Key {
        let (address, port) = (self.destination.ip(), self.port.get());
        Key { direction: Direction::Outbound, source: Some(source), destination, address, port }
    }
}

/// An IPv4 address that arrived on an IPv6 socket, as what it is.
pub(super) fn canonical(a: SocketAddr) -> SocketAddr {
    SocketAddr::new(a.ip().to_canonical(), a.port())
}
