//! The mesh port: the only port a member opens.
//!
//! Owns the way from a TCP connection to a finished TLS handshake of one of three kinds, told apart by ALPN: application data,
//! control, join. Bounds what strangers may cost: handshakes in progress and connections waiting for theirs, for each source
//! address and in all, and the time each may take. What a connection may do afterwards is decided by who gets it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use crate::identity::tls::{ALPN_CONTROL, ALPN_DATA, ALPN_JOIN, DataTls, NodeTls, Tunnel};

/// How long a handshake may take from the accepted connection to the client's Finished.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes in progress at once from one source address, each of about 30 KiB: as many as keep every core busy.
pub(crate) const MAX_HANDSHAKES_PER_SOURCE: usize = 64;
/// Connections that wait for their handshake, each of about a kilobyte: from one source, and in all.
pub(crate) const MAX_WAITING_PER_SOURCE: usize = 4096;
pub(crate) const MAX_WAITING: usize = 8192;

/// What arrived on the mesh port, its handshake done.
pub(crate) enum Arrived {
    /// `meshd/1`: one application connection.
    Data(Tunnel),
    /// `meshd-ctl/1`: the member API.
    Control(TlsStream<TcpStream>),
    /// `meshd-join/1`: somebody who wants to become a member.
    Join(TlsStream<TcpStream>),
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
pub(crate) async fn accept<F, S>(listener: TcpListener, configs: Configs, counters: Arc<Counters>, serve: F)
where
    F: Fn(Arrived, SocketAddr) -> S + Clone + Send + Sync + 'static,
    S: Future<Output = ()> + Send + 'static,
{
    let crowd = Crowd::default();
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
        let Some(waiting) = crowd.enter(from.ip()) else {
            counters.crowded.fetch_add(1, Relaxed);
            continue;
        };
        let (configs, counters, serve) = (configs.clone(), counters.clone(), serve.clone());
        tokio::spawn(async move {
            let done = match waiting.place().await {
                Some(_place) => tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(tcp, &configs)).await,
                None => return,
            };
            drop(waiting);
            match done {
                Ok(Ok(arrived)) => serve(arrived, from).await,
                Ok(Err(error)) => {
                    counters.failed.fetch_add(1, Relaxed);
                    tracing::debug!(%from, %error, "handshake failed");
                }
                Err(_) => {
                    counters.failed.fetch_add(1, Relaxed);
                    tracing::debug!(%from, "handshake took too long");
                }
            }
        });
    }
}

async fn handshake(tcp: TcpStream, configs: &Configs) -> std::io::Result<Arrived> {
    tcp.set_nodelay(true)?;
    let arrived_at = tcp.local_addr()?;
    let hello = LazyConfigAcceptor::new(Acceptor::default(), tcp).await?;
    let (offers, name) = {
        let said = hello.client_hello();
        let offered: Vec<&[u8]> = said.alpn().map(Iterator::collect).unwrap_or_default();
        let known = [ALPN_DATA, ALPN_CONTROL, ALPN_JOIN];
        (known.into_iter().find(|k| offered.contains(k)), said.server_name().map(str::to_owned))
    };
    Ok(match offers {
        Some(ALPN_DATA) => {
            let chosen = configs.data.choose(arrived_at, name.as_deref()).await.map_err(std::io::Error::other)?;
            let stream = hello.into_stream(chosen.config).await?;
            Arrived::Data(Tunnel { stream, port: chosen.port, shown: chosen.shown })
        }
        Some(ALPN_CONTROL) => Arrived::Control(hello.into_stream(configs.node.control_server.clone()).await?),
        Some(ALPN_JOIN) => Arrived::Join(hello.into_stream(configs.node.join_server.clone()).await?),
        _ => return Err(std::io::Error::other("none of our protocols was offered")),
    })
}

/// Who is in the middle of a handshake, and who waits for a place: a burst of one member waits for itself, not for others.
#[derive(Default, Clone)]
struct Crowd(Arc<Mutex<HashMap<IpAddr, Source>>>);

struct Source {
    places: Arc<Semaphore>,
    connections: usize,
}

/// A connection that is counted until its handshake is over.
struct Waiting(Crowd, IpAddr, Arc<Semaphore>);

impl Crowd {
    fn enter(&self, from: IpAddr) -> Option<Waiting> {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sources.values().map(|s| s.connections).sum::<usize>() >= MAX_WAITING {
            return None;
        }
        let source = sources
            .entry(from)
            .or_insert_with(|| Source { places: Arc::new(Semaphore::new(MAX_HANDSHAKES_PER_SOURCE)), connections: 0 });
        if source.connections >= MAX_WAITING_PER_SOURCE {
            return None;
        }
        source.connections += 1;
        Some(Waiting(self.clone(), from, source.places.clone()))
    }
}

impl Waiting {
    async fn place(&self) -> Option<SemaphorePermit<'_>> {
        self.2.acquire().await.ok()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut sources = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = sources.get_mut(&self.1) {
            source.connections -= 1;
            if source.connections == 0 {
                sources.remove(&self.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_source_cannot_take_every_place() {
        let crowd = Crowd::default();
        let a: IpAddr = "192.0.2.1".parse().unwrap();
        let waiting: Vec<_> = (0..MAX_WAITING_PER_SOURCE).map(|_| crowd.enter(a).unwrap()).collect();
        assert!(crowd.enter(a).is_none(), "one source waits without bound");
        let mut places = Vec::new();
        for w in &waiting[..MAX_HANDSHAKES_PER_SOURCE] {
            places.push(w.place().await.unwrap());
        }
        let more = tokio::time::timeout(Duration::from_millis(20), waiting[MAX_HANDSHAKES_PER_SOURCE].place()).await.is_err();
        assert!(more, "more handshakes than one source may have at once");
        let other = crowd.enter("192.0.2.2".parse().unwrap()).unwrap();
        let place = other.place().await.is_some();
        assert!(place, "another source waits for the first");
        drop(places);
        drop((waiting, other));
        assert!(crowd.0.lock().unwrap().is_empty(), "somebody who is gone is remembered");
    }
}
