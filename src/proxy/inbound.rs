//! From another member to a service of this host.
//!
//! One tunnel is one call of `carry`, read from top to bottom; in it one stream after another. Invariant: a service is connected to only for a
//! verified, active member, at the address the member dialled, and never on a port of ours; whoever gets nothing is told why inside
//! the tunnel.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::identity::Workload;
use meshd_ca::verify::Peer;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::access::{AccessLog, Entry};
use super::edges::{Direction, Key, OpenEdge};
use super::header::{Header, Refusal};
use super::live::{Live, Ticket};
use super::outbound::canonical;
use super::tunnel::{Role, Said, Tunnel, Version};
use super::{Fault, Proxy, socket};
use crate::identity::svids::Svid;

/// How long a refusal may take to reach the peer.
const REFUSAL: Duration = Duration::from_secs(2);

/// A header that leaves with the end of the handshake is there by then, even if the network lost it once.
const TOGETHER: Duration = Duration::from_secs(1);

/// A tunnel that a peer dialled, the handshake done and the peer's SVID verified in it.
pub struct Arrival {
    /// The TLS connection.
    pub tunnel: Box<Tunnel>,
    /// The port in the SNI.
    pub port: Option<NonZeroU16>,
    /// The SVID that was shown for it.
    pub shown: Arc<Svid>,
}

/// Serves one tunnel that was dialled from `from`, one stream after another, until it ends, and says in the log why a stream failed. To
/// be called in a task of its own.
pub async fn serve(proxy: &Proxy, mut arrival: Arrival, from: SocketAddr) {
    let _counted = proxy.panic_guard();
    // Dialled ahead of its first connection, perhaps: until that comes there is none, also where it is gone already.
    let ahead = arrival.tunnel.version() == Version::Two && arrival.tunnel.is_silent();
    let begin = |log: &AccessLog| log.begin(Direction::Inbound, proxy.now());
    let mut entry = if ahead { begin(&AccessLog::default()) } else { begin(&proxy.settings.access) };
    let (mut ticket, ends) = match enter(proxy, &mut arrival, canonical(from), ahead, &mut entry).await {
        Ok(entered) => entered,
        Err(fault) => return ended(proxy, entry, &Err(fault)),
    };
    if ahead {
        if !Box::pin(first(proxy, &mut ticket, &mut arrival, ends.here)).await {
            return;
        }
        entry = begin(&proxy.settings.access);
        if let Err(fault) = ticket.wake() {
            let fault = turned_away(proxy, &mut arrival, ends.client, &mut entry, fault).await;
            return ended(proxy, entry, &Err(fault));
        }
    }
    loop {
        let result = stream(proxy, &ticket, &mut arrival, &ends, &mut entry).await;
        ended(proxy, entry, &result);
        if result.is_err() || !Box::pin(rest(proxy, &mut ticket, &mut arrival, ends.here)).await {
            return;
        }
        entry = begin(&proxy.settings.access);
    }
}

/// Between whom a tunnel is.
struct Ends {
    client: SocketAddr,
    here: SocketAddr,
}

fn ended(proxy: &Proxy, mut entry: Entry, result: &Result<(), Fault>) {
    entry.end(result);
    if let Err(fault) = result {
        proxy.edges.fault(Direction::Inbound, fault.reason());
        tracing::debug!(%fault, "inbound connection ended");
    }
}

/// Registers the tunnel, with a place unless it was dialled `ahead`, and says where it arrived.
///
/// # Errors
/// Why the peer was refused.
async fn enter<'a>(
    proxy: &'a Proxy,
    arrival: &mut Arrival,
    client: SocketAddr,
    ahead: bool,
    entry: &mut Entry,
) -> Result<(Ticket<'a>, Ends), Fault> {
    let wire = arrival.tunnel.wire();
    socket::tunnel(wire, proxy.settings.keepalive).map_err(Fault::Tunnel)?;
    let arrived_at = canonical(wire.local_addr().map_err(Fault::Tunnel)?);
    entry.ends(client, SocketAddr::new(arrived_at.ip(), arrival.port.map_or(0, Into::into)));
    let peer = proxy.verifier.identify(&[arrival.tunnel.peer()])?;
    let enter = if ahead { Live::enter_ahead } else { Live::enter };
    match enter(&proxy.live, Direction::Inbound, peer.holder) {
        Ok(ticket) => {
            ticket.watch(arrival.tunnel.wire());
            Ok((ticket, Ends { client, here: arrived_at }))
        }
        Err(fault) => Err(turned_away(proxy, arrival, client, entry, fault).await),
    }
}

/// Tells the peer that there is no place for its stream, and notes it. Returns why.
async fn turned_away(proxy: &Proxy, arrival: &mut Arrival, client: SocketAddr, entry: &mut Entry, fault: Fault) -> Fault {
    if let Ok(peer) = proxy.verifier.identify(&[arrival.tunnel.peer()]) {
        let key = key(arrival, &peer, client);
        entry.between(&key, Some(peer.holder), true);
        proxy.edges.fail(key, Some(peer.holder), fault.reason(), proxy.now());
    }
    let why = if matches!(fault, Fault::Draining) { Refusal::Draining } else { Refusal::Overload };
    refuse(&mut arrival.tunnel, why).await;
    fault
}

/// Waits for the first stream of a tunnel in which nothing came with the handshake: a header that was only late, or, of a tunnel that was
/// dialled ahead, much later, after [`rest`]. One that ends before has carried nothing: no connection failed.
async fn first(proxy: &Proxy, ticket: &mut Ticket<'_>, arrival: &mut Arrival, arrived_at: SocketAddr) -> bool {
    match timeout(TOGETHER, arrival.tunnel.stirs()).await {
        Ok(more) => more,
        Err(_) => !ticket.rest() || rest(proxy, ticket, arrival, arrived_at).await,
    }
}

/// Waits for the next stream. Not in `meshd/1`, not when another SVID would be shown by now (it was renewed, or the port is another
/// workload's) or too many wait, and not when the tunnel ends, is cut or drained, or stays idle for too long.
async fn rest(proxy: &Proxy, ticket: &mut Ticket<'_>, arrival: &mut Arrival, arrived_at: SocketAddr) -> bool {
    if arrival.tunnel.version() == Version::One {
        return false;
    }
    let shown = |arrival: &Arrival| {
        let listener = arrival.port.and_then(|p| proxy.directory.listener(SocketAddr::new(arrived_at.ip(), p.get())));
        proxy.svids.shown_for(listener.as_ref()).is_some_and(|now| Arc::ptr_eq(&now, &arrival.shown))
    };
    let room = shown(arrival) && ticket.rest();
    let next = {
        let stirs = timeout(proxy.settings.idle * 2, arrival.tunnel.stirs());
        let next = pin!(async { Ok(room && stirs.await.unwrap_or(false)) });
        tokio::select! {
            biased;
            next = ticket.run(next) => next.unwrap_or(false),
            () = proxy.live.closing() => false,
        }
    };
    // Asked again: meanwhile the service's own SVID may have come in place of the node's. The peer tries again in a tunnel that shows it.
    let next = next && shown(arrival);
    if !next {
        let _ = timeout(REFUSAL, arrival.tunnel.close()).await;
    } else if let Err(fault) = ticket.wake() {
        proxy.edges.fault(Direction::Inbound, fault.reason());
        refuse(&mut arrival.tunnel, Refusal::Overload).await;
        return false;
    }
    next
}

/// One stream, from its header to its end.
///
/// # Errors
/// Why the peer was refused or its stream broke; the tunnel is of no use then.
async fn stream(proxy: &Proxy, ticket: &Ticket<'_>, arrival: &mut Arrival, ends: &Ends, entry: &mut Entry) -> Result<(), Fault> {
    let edge = begin(proxy, arrival, ends, entry)?;
    let result = deliver(proxy, ticket, arrival, ends, &edge).await;
    entry.bytes(edge.bytes());
    edge.settle(&result, proxy.now());
    result
}

/// Apart, so that what the edge is looked up by is not kept for as long as the connection lives.
fn begin(proxy: &Proxy, arrival: &Arrival, ends: &Ends, entry: &mut Entry) -> Result<OpenEdge, Fault> {
    entry.ends(ends.client, SocketAddr::new(ends.here.ip(), arrival.port.map_or(0, Into::into)));
    // Anew with every stream, and now that a banishment would find us in the registry.
    let peer = proxy.verifier.identify(&[arrival.tunnel.peer()])?;
    let key = key(arrival, &peer, ends.client);
    entry.between(&key, Some(peer.holder), true);
    Ok(proxy.edges.open(key, peer.holder, proxy.now()))
}

fn key(arrival: &Arrival, peer: &Peer, client: SocketAddr) -> Key {
    let (source, destination) = (Some(peer.id.clone()), Some(arrival.shown.id().clone()));
    Key { direction: Direction::Inbound, source, destination, address: client.ip(), port: arrival.port.map_or(0, Into::into) }
}

async fn deliver(proxy: &Proxy, ticket: &Ticket<'_>, arrival: &mut Arrival, ends: &Ends, edge: &OpenEdge) -> Result<(), Fault> {
    // Boxed: of what this needs nothing is kept for as long as the connection lives.
    let service = ticket.run(Box::pin(service(proxy, arrival, ends))).await?;
    let mut said = Said::default();
    ticket.run(pin!(arrival.tunnel.carry(&service, Role::Dialled, &mut said, edge.meter()))).await?;
    socket::ended(&service).map_err(Fault::App)
}

/// A connection to the service that the header asks for, or the word to the peer why there is none.
///
/// # Errors
/// Why there is none.
async fn service(proxy: &Proxy, arrival: &mut Arrival, ends: &Ends) -> Result<TcpStream, Fault> {
    let header = timeout(proxy.settings.header, arrival.tunnel.header()).await;
    let service = match header.unwrap_or(Err(Fault::Timeout("header"))) {
        Ok(header) => match admit(proxy, arrival, &header, ends.here) {
            Ok(service) => open(proxy, service, ends.client, &header).await,
            Err(why) => Err(Fault::Refused(why)),
        },
        Err(fault) => Err(fault),
    };
    match service {
        Err(Fault::Refused(why)) => refuse(&mut arrival.tunnel, why).await,
        Err(Fault::Header(_)) => refuse(&mut arrival.tunnel, Refusal::Malformed).await,
        _ => {}
    }
    service
}

/// Where to connect, or why not.
fn admit(proxy: &Proxy, arrival: &Arrival, header: &Header, arrived_at: SocketAddr) -> Result<SocketAddr, Refusal> {
    let ip = arrived_at.ip();
    if header.address.is_some_and(|a| a != ip) || proxy.kernel.is_loopback(ip) {
        return Err(Refusal::NotServed);
    }
    if proxy.settings.ports.contain(header.port.get()) {
        return Err(Refusal::NotServed);
    }
    let service = SocketAddr::new(ip, header.port.get());
    // The node vouches for all its workloads; one workload for no other.
    let shown = &arrival.shown.id().workload;
    let vouched = matches!(shown, Workload::Node(_)) || proxy.directory.listener(service).is_none_or(|w| w == *shown);
    if arrival.port != Some(header.port) || !vouched {
        return Err(Refusal::IdentityChanged);
    }
    Ok(service)
}

/// A connection to the service that resets unless it ends well. To the service it comes from the client's address.
async fn open(proxy: &Proxy, service: SocketAddr, client: SocketAddr, header: &Header) -> Result<TcpStream, Fault> {
    let hint = header.client.map_or(0, |c| c.port());
    let port = if header.low_port { hint.clamp(1, 1023) } else { 0 };
    let connect = async {
        let connecting = proxy.kernel.connect_service(SocketAddr::new(client.ip(), port), service);
        let tcp = timeout(proxy.settings.service, connecting).await.map_err(|_| io::ErrorKind::TimedOut)??;
        socket::application(&tcp, proxy.settings.keepalive)?;
        Ok(tcp)
    };
    connect.await.map_err(|error: io::Error| {
        if error.kind() != io::ErrorKind::ConnectionRefused {
            tracing::debug!(%service, %client, %error, "the service cannot be connected to");
        }
        // That we have no socket left says nothing about the service.
        let ours = matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM));
        Fault::Refused(if ours { Refusal::Overload } else { Refusal::Closed })
    })
}

/// Says why nothing was delivered. That the peer may not hear it changes nothing.
async fn refuse(tunnel: &mut Tunnel, why: Refusal) {
    let _ = timeout(REFUSAL, tunnel.refuse(why)).await;
}
