//! From an application of this host to a service on another member.
//!
//! One connection is one call of `carry`, read from top to bottom. Invariant: toward a member's address there is a tunnel with
//! that member or a reset, never plaintext.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::identity::{SpiffeId, Workload};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use super::access::Entry;
use super::edges::{Direction, Key, OpenEdge};
use super::header::{Header, Refusal};
use super::live::Ticket;
use super::tunnel::{Role, Said, Tunnel, Version};
use super::{Fault, Member, Proxy, pool, socket};
use crate::identity::svids::Svid;
use crate::identity::tls::server_name;

/// How often a member that announced a restart is tried.
const HOLD_STEP: Duration = Duration::from_millis(200);
/// How long a tunnel that is dialled ahead leaves the processor to the connection that it comes after.
const AHEAD_AFTER: Duration = Duration::from_millis(20);

/// Takes captured connections from `listener`, each into a task of its own, until a drain begins or another process takes them.
pub fn accept(proxy: Arc<Proxy>, listener: Arc<TcpListener>) -> impl Future<Output = ()> + Send {
    // Inherited by what is accepted, and set before anything is: no connection is without it for a moment, and none pays for it.
    let ready = socket::application(&*listener, proxy.settings.keepalive);
    async move {
        match ready {
            Ok(()) => accept_all(&proxy, &listener).await,
            Err(error) => tracing::error!(%error, "captured connections cannot be made ready and are not taken"),
        }
    }
}

async fn accept_all(proxy: &Arc<Proxy>, listener: &TcpListener) {
    loop {
        let accepted = tokio::select! {
            a = listener.accept() => a,
            () = proxy.live.closing() => return,
        };
        match accepted {
            Ok((app, _)) => {
                tokio::spawn(serve(proxy.clone(), app));
            }
            Err(error) => {
                // No descriptors or memory, or a connection that was gone already: neither ends the listener.
                tracing::warn!(%error, "cannot accept a captured connection");
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Carries one captured connection until it ends, and says in the log why if it failed. It resets when dropped ([`socket::application`]).
// Not an `async fn`: that keeps its arguments twice, for as long as the connection lives.
#[allow(clippy::manual_async_fn)]
pub fn serve(proxy: Arc<Proxy>, mut app: TcpStream) -> impl Future<Output = ()> + Send {
    async move {
        let _counted = proxy.panic_guard();
        let mut entry = proxy.settings.access.begin(Direction::Outbound, proxy.now());
        let result = carry(&proxy, &mut app, &mut entry).await;
        entry.end(&result);
        if let Err(fault) = result {
            proxy.edges.fault(Direction::Outbound, fault.reason());
            match fault {
                Fault::WrongPeer { .. } | Fault::NotCaptured(_) => tracing::warn!(%fault, "outbound connection reset"),
                _ => tracing::debug!(%fault, "outbound connection reset"),
            }
        }
    }
}

/// What is known of a connection before its peer is.
#[derive(Clone)]
struct Call {
    client: SocketAddr,
    destination: SocketAddr,
    port: NonZeroU16,
    member: Member,
    workload: Workload,
}

/// # Errors
/// Why the application got a reset.
#[allow(clippy::manual_async_fn)] // as `serve`
fn carry(proxy: &Arc<Proxy>, app: &mut TcpStream, entry: &mut Entry) -> impl Future<Output = Result<(), Fault>> {
    async move {
        let call = call(proxy, app, entry)?;
        let ticket = match proxy.live.enter(Direction::Outbound, call.member.node) {
            Ok(ticket) => ticket,
            Err(fault) => return Err(call.failed(proxy, entry, fault)),
        };
        let (mut said, mut fresh) = (Said::default(), false);
        loop {
            let (mut secured, used) = match secure(proxy, &ticket, &call, entry, fresh).await {
                Ok(secured) => secured,
                Err(fault) => {
                    if matches!(fault, Fault::Unreachable(_) | Fault::Timeout(_) | Fault::Handshake(_) | Fault::WrongPeer { .. })
                    {
                        proxy.directory.suspect(call.destination.ip());
                    }
                    return Err(call.failed(proxy, entry, fault));
                }
            };
            match used {
                true => said = Said::kept(),
                false => said.let_go(),
            }
            ticket.watch(secured.tunnel.wire());
            let carried = secured.tunnel.carry(app, Role::Dialler(call.header()), &mut said, secured.edge.meter());
            let result = ticket.run(pin!(carried)).await;
            let again = used && undelivered(&result, &said);
            let result = ended(proxy, &call, secured, app, entry, result, again);
            if !again {
                return result;
            }
            fresh = true;
        }
    }
}

/// Looks at what was captured. In here and in [`ended`] nothing waits: what only they need is not kept for as long as the connection lives.
///
/// # Errors
/// Why it cannot be carried.
fn call(proxy: &Proxy, app: &TcpStream, entry: &mut Entry) -> Result<Call, Fault> {
    let client = canonical(app.peer_addr().map_err(Fault::App)?);
    let destination = canonical(proxy.kernel.original_dst(app).map_err(|e| Fault::NotCaptured(e.to_string()))?);
    entry.ends(client, destination);
    let port = guard(proxy, destination)?;
    // Asked at once, while the application's socket surely exists.
    let workload = proxy.kernel.owner(client, destination);
    let workload = workload.unwrap_or_else(|| Workload::Node(proxy.node()));
    if let Some(member) = proxy.directory.member_at(destination.ip()) {
        return Ok(Call { client, destination, port, member, workload });
    }
    let fault = Fault::NoMember(destination.ip());
    let source = Some(proxy.id(workload));
    let key = Key { direction: Direction::Outbound, source, destination: None, address: destination.ip(), port: port.get() };
    entry.between(&key, None, false);
    proxy.edges.fail(key, None, fault.reason(), proxy.now());
    Err(fault)
}

/// After a stream: keeps the tunnel if it can be used again, and counts. What is tried `again` has not failed.
fn ended(
    proxy: &Proxy,
    call: &Call,
    secured: Secured,
    app: &TcpStream,
    entry: &mut Entry,
    result: Result<(), Fault>,
    again: bool,
) -> Result<(), Fault> {
    let Secured { svid, tunnel, edge } = secured;
    let result = result.and_then(|()| socket::ended(app).map_err(Fault::App));
    if let Err(Fault::Refused(Refusal::Closed)) = result {
        // Before the application sees its reset: its next attempt is refused by the kernel.
        proxy.kernel.refuse(call.destination);
    }
    if result.is_ok() && tunnel.version() == Version::Two {
        // The member may have come back at another port while this was held.
        let port = tunnel.wire().peer_addr().map_or(call.member.port, |at| at.port());
        proxy.pool.give(pool::Key { port, ..call.pooled() }, tunnel, svid, Instant::now());
    }
    entry.bytes(edge.bytes());
    edge.settle(if again { &Ok(()) } else { &result }, proxy.now());
    result
}

/// The peer's authenticated word that a used tunnel's stream reached nobody, while everything the application said is still here.
fn undelivered(result: &Result<(), Fault>, said: &Said) -> bool {
    matches!(result, Err(Fault::Refused(Refusal::IdentityChanged | Refusal::Draining))) && said.is_whole()
}

/// A tunnel to the member that the address is bound to and nobody else, with the application's connection in it.
struct Secured {
    svid: Arc<Svid>,
    tunnel: Box<Tunnel>,
    edge: OpenEdge,
}

/// A tunnel for the connection, and whether it was used before; a `fresh` one was not.
///
/// # Errors
/// Why there is none.
async fn secure(
    proxy: &Arc<Proxy>,
    ticket: &Ticket<'_>,
    call: &Call,
    entry: &mut Entry,
    fresh: bool,
) -> Result<(Secured, bool), Fault> {
    let found = if fresh { None } else { again(proxy, call).await };
    let (used, (svid, tunnel, peer)) = match found {
        Some(found) => (true, found),
        // Boxed: of what a handshake needs nothing is kept for as long as the connection lives.
        None => (false, ticket.run(Box::pin(connect(proxy, call))).await?),
    };
    let key = call.secured(svid.id(), peer);
    entry.between(&key, Some(call.member.node), true);
    let edge = proxy.edges.open(key, call.member.node, proxy.now());
    Ok((Secured { svid, tunnel, edge }, used))
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

/// A tunnel, what was shown in it, and who answered.
type Found = (Arc<Svid>, Box<Tunnel>, SpiffeId);

/// A tunnel that was used before, its peer looked at anew: trust may have changed since.
async fn again(proxy: &Arc<Proxy>, call: &Call) -> Option<Found> {
    let svid = proxy.svids.for_client(&call.workload).await?;
    let key = call.pooled();
    let pool::Found { tunnel, ahead } = proxy.pool.take(&key, &svid, Instant::now());
    if ahead {
        dial_ahead(Ahead { proxy: proxy.clone(), key: Some(key) }, call);
    }
    let tunnel = tunnel?;
    let peer = proxy.verifier.identify(&[tunnel.peer()]).ok()?;
    proxy.verifier.is_host(peer.holder, call.member.node).then_some((svid, tunnel, peer.id))
}

/// Dials a tunnel for the next connection like this one, not if there are many already or the member is about to go.
fn dial_ahead(ahead: Ahead, call: &Call) {
    let live = &ahead.proxy.live;
    let room = ahead.proxy.settings.ahead && !live.is_draining() && live.count() < live.limits().both / 4 * 3;
    if room && !call.member.restarting {
        let call = call.clone();
        tokio::spawn(async move { ahead.dial(&call).await });
    }
}

/// A tunnel being dialled before there is a connection for it. However that ends the pool is told.
struct Ahead {
    proxy: Arc<Proxy>,
    key: Option<pool::Key>,
}

impl Ahead {
    async fn dial(mut self, call: &Call) {
        let proxy = self.proxy.clone();
        let _counted = proxy.panic_guard();
        // The connection of this moment first.
        sleep(AHEAD_AFTER).await;
        // Among the connections, so that it is cut with them.
        let Ok(ticket) = proxy.live.enter_ahead(Direction::Outbound, call.member.node) else { return };
        let dialled = ticket.run(Box::pin(async {
            let (svid, mut tunnel, _) = connect(&proxy, call).await?;
            tunnel.settle().await?;
            Ok::<_, Fault>((svid, tunnel))
        }));
        match dialled.await {
            Ok((svid, tunnel)) if tunnel.version() == Version::Two => {
                if let Some(key) = self.key.take() {
                    proxy.pool.give_ahead(key, tunnel, svid, Instant::now());
                }
            }
            Ok(_) => {}
            Err(fault) => tracing::debug!(%fault, "no tunnel ahead"),
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            self.proxy.pool.not_ahead(key, Instant::now());
        }
    }
}

async fn connect(proxy: &Proxy, call: &Call) -> Result<Found, Fault> {
    let svid = proxy.svids.for_client(&call.workload).await.ok_or(Fault::NoSvid)?;
    let tcp = dial(proxy, call).await?;
    let handshake = Tunnel::dial(tcp, svid.client().clone(), server_name(call.port));
    let tunnel = timeout(proxy.settings.handshake, handshake).await;
    let tunnel = tunnel.map_err(|_| Fault::Timeout("handshake"))?.map_err(Fault::Handshake)?;
    let peer = proxy.verifier.identify(&[tunnel.peer()])?;
    if !proxy.verifier.is_host(peer.holder, call.member.node) {
        return Err(Fault::WrongPeer { expected: call.member.node, found: peer.holder });
    }
    Ok((svid, tunnel, peer.id))
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
    fn pooled(&self) -> pool::Key {
        let Member { node, port, .. } = self.member;
        pool::Key { client: self.client.ip(), node, port, service: self.destination, source: self.workload.clone() }
    }

    fn header(&self) -> Header {
        let Self { client, destination, port, .. } = *self;
        Header { port, address: Some(destination.ip()), client: Some(client), low_port: client.port() < 1024 }
    }

    fn secured(&self, source: &SpiffeId, peer: SpiffeId) -> Key {
        self.key(source.clone(), Some(peer))
    }

    /// Notes that there was no tunnel, and why.
    fn failed(&self, proxy: &Proxy, entry: &mut Entry, fault: Fault) -> Fault {
        let key = self.unsecured(proxy);
        entry.between(&key, Some(self.member.node), false);
        proxy.edges.fail(key, Some(self.member.node), fault.reason(), proxy.now());
        fault
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
