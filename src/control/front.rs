//! The mesh port: the only port a member opens.
//!
//! Owns the way from a TCP connection to a finished TLS handshake of one of three kinds, told apart by ALPN: application data,
//! control, join. Bounds what strangers may cost: handshakes in progress and connections waiting for theirs, for each source
//! address and in all, and the time each may take. What a connection may do afterwards is decided by who gets it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::crowd::Crowd;
use super::rewound::Rewound;
use crate::identity::tls::{ALPN_CONTROL, ALPN_DATA, ALPN_JOIN, ALPN_STREAMS, DataTls, NodeTls};
use crate::intercept::process::file_limit;
use crate::proxy::inbound::Arrival;
use crate::proxy::tunnel::{Input, Tunnel};

/// How long a client may take for its first byte, and then for its handshake.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a handshake may take while others wait for its place.
const HURRY: Duration = Duration::from_secs(2);
/// How long a connection that has spoken may wait for its handshake.
const WAIT: Duration = Duration::from_secs(30);
/// Handshakes in progress at once from one source address: as many as keep every core busy. And in all: rustls holds up to 64 KiB of a
/// message that never ends.
pub(crate) const MAX_HANDSHAKES_PER_SOURCE: usize = 64;
pub(crate) const MAX_HANDSHAKES: usize = 512;
/// Connections that have not finished their handshake, each of a few kilobytes: from one source, and in all. Less where the limit on
/// open files is low: half of it stays for members.
pub(crate) const MAX_WAITING_PER_SOURCE: usize = 4096;
pub(crate) const MAX_WAITING: usize = 8192;

/// What arrived on the mesh port, its handshake done.
pub(crate) enum Arrived {
    /// `meshd/1` or `meshd/2`: application connections.
    Data(Arrival),
    /// `meshd-ctl/1`: the member API.
    Control(Box<TlsStream<Rewound>>),
    /// `meshd-join/1`: somebody who wants to become a member.
    Join(Box<TlsStream<Rewound>>),
}

/// The TLS of the mesh port.
#[derive(Clone)]
pub(crate) struct Configs {
    pub(crate) data: DataTls,
    pub(crate) node: NodeTls,
}

/// Counters of the mesh port, for `status` and metrics.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Connections accepted.
    pub(crate) accepted: AtomicU64,
    /// Closed at once because too many handshakes were in progress.
    pub(crate) crowded: AtomicU64,
    /// Handshakes that failed or took too long.
    pub(crate) failed: AtomicU64,
}

/// Accepts on `listener` for ever and hands every finished handshake to `serve` in a task of its own.
pub(crate) async fn accept<F, S>(listener: Arc<TcpListener>, configs: Configs, door: Door, counters: Arc<Counters>, serve: F)
where
    F: Fn(Arrived, SocketAddr) -> S + Clone + Send + Sync + 'static,
    S: Future<Output = ()> + Send + 'static,
{
    loop {
        let (tcp, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors or memory, or a connection that died in the queue: neither ends the daemon.
                tracing::warn!(%error, "cannot accept on the mesh port");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        counters.accepted.fetch_add(1, Relaxed);
        let (place, pushed) = door.waiting.enter(from.ip());
        if pushed {
            counters.crowded.fetch_add(1, Relaxed);
        }
        let (configs, door, counters, serve) = (configs.clone(), door.clone(), counters.clone(), serve.clone());
        tokio::spawn(async move {
            let done = tokio::select! {
                done = door.pass(tcp, from.ip(), &configs) => done,
                () = place.lost() => Err(io::Error::other("others needed its place")),
            };
            drop((place, door));
            match done {
                // In a task of its own: this one keeps room for a handshake for as long as it lives.
                Ok(arrived) => drop(tokio::spawn(serve(arrived, from))),
                Err(error) => {
                    counters.failed.fetch_add(1, Relaxed);
                    tracing::debug!(%from, %error, "no handshake");
                }
            }
        });
    }
}

/// What strangers may cost on the way in, for all listeners of the mesh port together.
#[derive(Clone)]
pub(crate) struct Door {
    waiting: Crowd<IpAddr>,
    handshakes: Arc<Semaphore>,
    sources: Arc<Mutex<HashMap<IpAddr, Weak<Semaphore>>>>,
}

impl Door {
    /// One for this process and its limit on open files.
    pub(crate) fn new() -> Self {
        let most = usize::try_from(file_limit() / 2).unwrap_or(MAX_WAITING).min(MAX_WAITING);
        Self {
            waiting: Crowd::new(most, MAX_WAITING_PER_SOURCE.min(most / 2)),
            handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
            sources: Arc::default(),
        }
    }

    /// From an accepted connection to a finished handshake.
    async fn pass(&self, tcp: TcpStream, from: IpAddr, configs: &Configs) -> io::Result<Arrived> {
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        // Who says nothing has no place to keep others from, and costs little: the rest is made when there is a byte.
        if timeout(HANDSHAKE_TIMEOUT, tcp.peek(&mut [0])).await.map_err(late)?? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let source = self.source(from);
        let places = async { (source.acquire().await, self.handshakes.acquire().await) };
        // A burst of one member waits for itself, not for others.
        let _places = timeout(WAIT, places).await.map_err(late)?;
        let mut work = Box::pin(handshake(tcp, configs));
        match timeout(HURRY, &mut work).await {
            Ok(done) => done,
            Err(late) if self.handshakes.available_permits() == 0 => Err(late.into()),
            Err(_) => timeout(HANDSHAKE_TIMEOUT - HURRY, work).await.map_err(late)?,
        }
    }

    /// The places of one source, as long as somebody there wants one.
    fn source(&self, from: IpAddr) -> Arc<Semaphore> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = sources.get(&from).and_then(Weak::upgrade) {
            return there;
        }
        if sources.len() >= MAX_WAITING {
            sources.retain(|_, there| there.strong_count() > 0);
        }
        let new = Arc::new(Semaphore::new(MAX_HANDSHAKES_PER_SOURCE));
        sources.insert(from, Arc::downgrade(&new));
        new
    }
}

pub(crate) async fn handshake(tcp: TcpStream, configs: &Configs) -> io::Result<Arrived> {
    tcp.set_nodelay(true)?;
    let arrived_at = tcp.local_addr()?;
    let mut input = Input::empty();
    let (protocol, name) = hello(&tcp, &mut input).await?;
    Ok(match protocol {
        Some(ALPN_DATA | ALPN_STREAMS) => {
            let chosen = configs.data.choose(arrived_at, name.as_deref()).await.map_err(std::io::Error::other)?;
            let tunnel = Tunnel::answer(tcp, chosen.config, input).await?;
            Arrived::Data(Arrival { tunnel, port: chosen.port, shown: chosen.shown })
        }
        Some(ALPN_CONTROL) => {
            let acceptor = TlsAcceptor::from(configs.node.control_server.clone());
            Arrived::Control(Box::new(acceptor.accept(Rewound::new(input.bytes(), tcp)).await?))
        }
        Some(ALPN_JOIN) => {
            let acceptor = TlsAcceptor::from(configs.node.join_server.clone());
            Arrived::Join(Box::new(acceptor.accept(Rewound::new(input.bytes(), tcp)).await?))
        }
        _ => return Err(std::io::Error::other("none of our protocols was offered")),
    })
}

/// What the dialler asks for in its ClientHello, which stays in `input`: the best of our protocols, and the name.
pub(crate) async fn hello(tcp: &TcpStream, input: &mut Input) -> std::io::Result<(Option<&'static [u8]>, Option<String>)> {
    let mut acceptor = Acceptor::default();
    loop {
        let before = input.bytes().len();
        input.more(tcp).await?;
        acceptor.read_tls(&mut &input.bytes()[before..])?;
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let said = accepted.client_hello();
                let offered: Vec<&[u8]> = said.alpn().map(Iterator::collect).unwrap_or_default();
                let known = [ALPN_STREAMS, ALPN_DATA, ALPN_CONTROL, ALPN_JOIN];
                return Ok((known.into_iter().find(|k| offered.contains(k)), said.server_name().map(str::to_owned)));
            }
            Err((error, mut alert)) => {
                let mut bytes = Vec::new();
                if alert.write(&mut bytes).is_ok() {
                    // Best effort: whoever sends garbage may not be listening.
                    let _ = tcp.try_write(&bytes);
                }
                return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_source_waits_for_itself_and_is_forgotten() {
        let door = Door::new();
        let (a, b): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let source = door.source(a);
        let places: Vec<_> = (0..MAX_HANDSHAKES_PER_SOURCE).map(|_| source.try_acquire().unwrap()).collect();
        assert!(door.source(a).try_acquire().is_err(), "more handshakes than one source may have at once");
        assert!(door.source(b).try_acquire().is_ok(), "another source waits for the first");
        drop(places);
        drop(source);
        let addresses = (0..MAX_WAITING as u32 + 10).map(|n| IpAddr::from((n + 1).to_be_bytes()));
        addresses.for_each(|ip| drop(door.source(ip)));
        assert!(door.sources.lock().unwrap().len() <= MAX_WAITING, "those who are gone are remembered");
    }
}
