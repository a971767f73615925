//! From another member to a service of this host.
//!
//! One tunnel is one call of `carry`, read from top to bottom. Invariant: a service is connected to only for a verified, active
//! member, at the address the member dialled, and never on a port of ours; whoever gets nothing is told why inside the tunnel.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use meshd_ca::identity::Workload;
use meshd_ca::verify::Peer;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use super::access::Entry;
use super::edges::{Direction, Key, OpenEdge};
use super::header::{Header, PREFIX, Refusal};
use super::outbound::canonical;
use super::relay::{self, Plain, Relay, Role};
use super::{Fault, Proxy, socket};
use crate::identity::tls::Tunnel;

/// How long a refusal may take to reach the peer.
const REFUSAL: Duration = Duration::from_secs(2);

/// Serves one tunnel that was dialled from `from` until it ends, and says in the log why if it failed. To be called in a task of its
/// own.
pub async fn serve(proxy: &Proxy, tunnel: Tunnel, from: SocketAddr) {
    let _counted = proxy.panic_guard();
    let mut entry = proxy.settings.access.begin(Direction::Inbound, proxy.now());
    let result = carry(proxy, tunnel, canonical(from), &mut entry).await;
    entry.end(&result);
    if let Err(fault) = result {
        proxy.edges.fault(Direction::Inbound, fault.reason());
        tracing::debug!(%fault, "inbound connection ended");
    }
}

/// # Errors
/// Why the peer was refused or its connection broke.
async fn carry(proxy: &Proxy, mut tunnel: Tunnel, client: SocketAddr, entry: &mut Entry) -> Result<(), Fault> {
    let tcp = tunnel.stream.get_ref().0;
    socket::tunnel(tcp, proxy.settings.keepalive).map_err(Fault::Tunnel)?;
    let arrived_at = canonical(tcp.local_addr().map_err(Fault::Tunnel)?);
    entry.ends(client, SocketAddr::new(arrived_at.ip(), tunnel.port.map_or(0, Into::into)));
    let peer = proxy.verifier.peer(tunnel.stream.get_ref().1)?;
    let key = key(&tunnel, &peer, client);
    entry.between(&key, Some(peer.holder), true);
    let ticket = match proxy.live.enter(Direction::Inbound, peer.holder) {
        Ok(ticket) => ticket,
        Err(fault) => {
            let why = if matches!(fault, Fault::Draining) { Refusal::Draining } else { Refusal::Overload };
            proxy.edges.fail(key, Some(peer.holder), fault.reason(), proxy.now());
            refuse(&mut tunnel.stream, why).await;
            return Err(fault);
        }
    };
    // Again, now that a banishment would find us in the registry.
    let peer = proxy.verifier.peer(tunnel.stream.get_ref().1)?;
    let edge = proxy.edges.open(key, peer.holder, proxy.now());
    let result = ticket.run(deliver(proxy, tunnel, arrived_at, client, &edge)).await;
    entry.bytes(edge.bytes());
    edge.settle(&result, proxy.now());
    result
}

fn key(tunnel: &Tunnel, peer: &Peer, client: SocketAddr) -> Key {
    let (source, destination) = (Some(peer.id.clone()), Some(tunnel.shown.id().clone()));
    Key { direction: Direction::Inbound, source, destination, address: client.ip(), port: tunnel.port.map_or(0, Into::into) }
}

async fn deliver(
    proxy: &Proxy,
    mut tunnel: Tunnel,
    arrived_at: SocketAddr,
    client: SocketAddr,
    edge: &OpenEdge,
) -> Result<(), Fault> {
    let header = timeout(proxy.settings.header, read_header(&mut tunnel.stream)).await;
    let service = match header.unwrap_or(Err(Fault::Timeout("header"))) {
        Ok(header) => match admit(proxy, &tunnel, &header, arrived_at) {
            Ok(service) => open(proxy, service, client, &header).await,
            Err(why) => Err(Fault::Refused(why)),
        },
        Err(fault) => Err(fault),
    };
    match service {
        Ok(mut service) => Plain.relay(&mut service, tunnel.stream.into(), Role::Dialled, edge.meter()).await,
        Err(fault) => {
            match fault {
                Fault::Refused(why) => refuse(&mut tunnel.stream, why).await,
                Fault::Header(_) => refuse(&mut tunnel.stream, Refusal::Malformed).await,
                _ => {}
            }
            Err(fault)
        }
    }
}

async fn read_header(stream: &mut TlsStream<TcpStream>) -> Result<Header, Fault> {
    let mut prefix = [0; PREFIX];
    stream.read_exact(&mut prefix).await.map_err(Fault::Tunnel)?;
    let mut fields = vec![0; Header::length(prefix)?];
    stream.read_exact(&mut fields).await.map_err(Fault::Tunnel)?;
    Ok(Header::decode(&fields)?)
}

/// Where to connect, or why not.
fn admit(proxy: &Proxy, tunnel: &Tunnel, header: &Header, arrived_at: SocketAddr) -> Result<SocketAddr, Refusal> {
    let ip = arrived_at.ip();
    if header.address.is_some_and(|a| a != ip) || proxy.kernel.is_loopback(ip) {
        return Err(Refusal::NotServed);
    }
    if proxy.settings.ports.contain(header.port.get()) {
        return Err(Refusal::NotServed);
    }
    let service = SocketAddr::new(ip, header.port.get());
    // The node vouches for all its workloads; one workload for no other.
    let shown = &tunnel.shown.id().workload;
    let vouched = matches!(shown, Workload::Node(_)) || proxy.directory.listener(service).is_none_or(|w| w == *shown);
    if tunnel.port != Some(header.port) || !vouched {
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
async fn refuse(stream: &mut TlsStream<TcpStream>, why: Refusal) {
    let _ = timeout(REFUSAL, relay::refuse(stream, why)).await;
}
