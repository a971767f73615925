//! The admin port: metrics, readiness and the log level over HTTP/1, for whoever can reach it. It only tells and changes nothing: on
//! loopback every local user can reach it, and nothing says who is asking. What changes something goes through the Unix socket
//! ([`super::local`]).
//!
//! Owns the listeners, the limits of a connection and the routes. A port that is taken is tried again and is not the end of the
//! daemon. A request that names another host than this one is refused: a web page could make a browser here send it (DNS rebinding).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};

use super::figures;
use super::metrics::{self, Format};
use crate::daemon::Daemon;
use crate::http1::{self, Piece, Text};
use crate::intercept::socket::Mark;
use crate::task::{self, Tasks};

/// Connections served at once; the next ones wait.
const MAX_CONNECTIONS: usize = 32;
/// Pages of metrics written at once, each of which needs a thread and the figures of every edge.
const MAX_PAGES: usize = 4;
/// How long the head of a request may take, and how long a connection may be idle.
const HEAD: Duration = Duration::from_secs(10);
/// How long a connection may last in all, whatever it does.
const LIFETIME: Duration = Duration::from_secs(60);
/// Most bytes of a request's head.
const MAX_HEAD: usize = 16 * 1024;
/// When a port that was taken is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// Bytes of metrics that are sent together.
const CHUNK: usize = 32 * 1024;
const TEXT: &str = "text/plain; charset=utf-8";

const INDEX: &str = "meshd\n\n/metrics    for Prometheus\n/live       200 if meshd runs\n/ready      200 if this host is a member that captures \
                     connections, 503 if not\n/log-level  how much is logged\n";

/// What keeps the port from being open, by address.
#[derive(Debug, Default)]
pub(crate) struct Trouble(Mutex<BTreeMap<SocketAddr, String>>);

impl Trouble {
    /// The addresses that could not be opened, and why.
    pub(crate) fn all(&self) -> Vec<(SocketAddr, String)> {
        let trouble = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.iter().map(|(address, why)| (*address, why.clone())).collect()
    }

    /// Returns whether that is news.
    fn note(&self, address: SocketAddr, why: Option<String>) -> bool {
        let mut trouble = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => trouble.insert(address, why.clone()) != Some(why),
            None => trouble.remove(&address).is_some(),
        }
    }
}

/// Opens the port and answers until the task is dropped.
pub(crate) async fn serve(daemon: Arc<Daemon>) {
    let addresses: Vec<IpAddr> = match daemon.config().admin_address {
        Some(address) => vec![address],
        None => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
    };
    let limits =
        Arc::new(Limits { connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)), pages: Arc::new(Semaphore::new(MAX_PAGES)) });
    // A set, so that all of them end with this task.
    let mut doors = Tasks::new();
    for ip in addresses {
        let optional = daemon.config().admin_address.is_none() && ip.is_ipv6();
        doors.spawn(door(daemon.clone(), limits.clone(), SocketAddr::new(ip, daemon.config().admin_port), optional));
    }
    while doors.join_next().await.is_some() {}
}

struct Limits {
    connections: Arc<Semaphore>,
    pages: Arc<Semaphore>,
}

/// One listener. Without IPv6 on this host there is none for it, and that is fine.
async fn door(daemon: Arc<Daemon>, limits: Arc<Limits>, address: SocketAddr, optional: bool) {
    let listener = loop {
        match daemon.doors().open(address, Mark::None) {
            Ok(listener) => break listener,
            Err(error) if optional && error.kind() != std::io::ErrorKind::AddrInUse => return,
            Err(error) => {
                if daemon.admin_trouble().note(address, Some(error.to_string())) {
                    tracing::warn!(%error, %address, "no metrics: the admin port cannot be opened; trying again");
                }
                sleep(AGAIN).await;
            }
        }
    };
    if daemon.admin_trouble().note(address, None) {
        tracing::info!(%address, "the admin port is open now");
    }
    accept(&listener, &daemon, &limits).await;
}

async fn accept(listener: &TcpListener, daemon: &Arc<Daemon>, limits: &Arc<Limits>) {
    // Connections end with the listener.
    let mut served = Tasks::new();
    loop {
        let Ok(place) = limits.connections.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let (daemon, limits) = (daemon.clone(), limits.clone());
                served.spawn(async move {
                    match timeout(LIFETIME, converse(stream, daemon, limits)).await {
                        Ok(Err(error)) => tracing::debug!(%from, %error, "admin connection ended"),
                        Err(_) => tracing::debug!(%from, "admin connection took too long"),
                        Ok(Ok(())) => {}
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the admin port");
                sleep(Duration::from_millis(50)).await;
            }
        }
        while served.try_join_next().is_some() {}
    }
}

async fn converse(stream: TcpStream, daemon: Arc<Daemon>, limits: Arc<Limits>) -> hyper::Result<()> {
    let each = http1::Limits { head: HEAD, head_size: MAX_HEAD, keep_alive: true };
    http1::serve(stream, each, move |request| {
        let (daemon, limits) = (daemon.clone(), limits.clone());
        async move { answer(&daemon, &limits, &request).await }
    })
    .await
}

async fn answer(daemon: &Arc<Daemon>, limits: &Limits, request: &Request<Incoming>) -> Response<Text> {
    // The name it wished for, and the one it has.
    let mut own = vec![daemon.config().host_name.to_string()];
    own.extend(daemon.member().ok().map(|member| member.membership.name().to_string()));
    if !is_here(request.headers(), request.uri(), &own) {
        let why = "the request names another host; use an address of this one, its name, or localhost\n";
        return plain(StatusCode::MISDIRECTED_REQUEST, why);
    }
    let path = request.uri().path();
    if !matches!(path, "/" | "/metrics" | "/live" | "/ready" | "/log-level") {
        return plain(StatusCode::NOT_FOUND, "there is /metrics, /live, /ready and /log-level\n");
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut no =
            plain(StatusCode::METHOD_NOT_ALLOWED, "this port only tells; to change the log level: meshd log-level LEVEL\n");
        no.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return no;
    }
    match path {
        "/metrics" => page(daemon, limits, request.headers()).await,
        "/live" => plain(StatusCode::OK, "live\n"),
        "/ready" => match figures::readiness(daemon) {
            Ok(()) => plain(StatusCode::OK, "ready\n"),
            Err(why) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        },
        "/log-level" => plain(StatusCode::OK, format!("{}\n", daemon.log().level())),
        _ => plain(StatusCode::OK, INDEX),
    }
}

async fn page(daemon: &Arc<Daemon>, limits: &Limits, headers: &HeaderMap) -> Response<Text> {
    let accept: Vec<&str> = headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()).collect();
    let format = Format::negotiated(&accept.join(","));
    let Ok(place) = limits.pages.clone().acquire_owned().await else {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "meshd is stopping\n");
    };
    let (send, receive) = mpsc::channel(2);
    let daemon = daemon.clone();
    task::blocking(move || {
        let mut out = Chunks { send, pending: String::with_capacity(CHUNK) };
        // Fails only when nobody reads any more.
        if metrics::render(figures::page(&daemon), format, &mut out).is_ok() {
            out.end();
        }
        drop(place);
    });
    response(StatusCode::OK, format.content_type(), Text::Pieces(receive))
}

fn plain(status: StatusCode, text: impl Into<String>) -> Response<Text> {
    response(status, TEXT, Text::Whole(Some(Bytes::from(text.into()))))
}

fn response(status: StatusCode, kind: &'static str, text: Text) -> Response<Text> {
    let mut response = Response::new(text);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    response
}

/// Whether a request is meant for this host: it names an address, `localhost`, or the host's own name. Only a name that somebody
/// else owns can be turned against a browser on this host.
fn is_here(headers: &HeaderMap, uri: &Uri, own: &[String]) -> bool {
    let fine = |authority: &str| {
        let name = match authority.strip_prefix('[') {
            Some(rest) => return rest.split_once(']').is_some_and(|(ip, _)| ip.parse::<Ipv6Addr>().is_ok()),
            None => authority.rsplit_once(':').map_or(authority, |(name, _)| name),
        };
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let bare = name.strip_suffix(".local").unwrap_or(&name);
        name.parse::<IpAddr>().is_ok() || name == "localhost" || own.iter().any(|own| own == bare)
    };
    // An absolute URI overrides the header (RFC 9112 §3.2.2); every name that is there must be ours. Without any (HTTP/1.0), no browser asks.
    let hosts = headers.get_all(HOST).iter().map(|host| host.to_str().unwrap_or("?"));
    hosts.chain(uri.authority().map(|a| a.as_str())).all(fine)
}

/// Collects what is written and sends it in pieces. Waits while the reader is slow: for a thread that may.
struct Chunks {
    send: mpsc::Sender<Piece>,
    pending: String,
}

impl Chunks {
    fn send(&mut self) -> fmt::Result {
        let piece = std::mem::replace(&mut self.pending, String::with_capacity(CHUNK));
        self.send.blocking_send(Piece::Next(piece.into())).map_err(|_| fmt::Error)
    }

    fn end(mut self) {
        if self.pending.is_empty() || self.send().is_ok() {
            let _ = self.send.blocking_send(Piece::End);
        }
    }
}

impl fmt::Write for Chunks {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.pending.push_str(text);
        if self.pending.len() >= CHUNK - 1024 { self.send() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use http_body_util::BodyExt;

    use super::*;

    fn here(host: Option<&str>, uri: &str) -> bool {
        let mut headers = HeaderMap::new();
        if let Some(host) = host {
            headers.insert(HOST, HeaderValue::from_str(host).unwrap());
        }
        is_here(&headers, &uri.parse().unwrap(), &["pi-7".to_owned()])
    }

    #[test]
    fn only_names_of_this_host_are_answered() {
        for host in [
            "localhost",
            "LOCALHOST:6376",
            "127.0.0.1",
            "127.0.0.1:6376",
            "[::1]:6376",
            "[fd00::7]",
            "192.0.2.7:6376",
            "pi-7",
            "pi-7:6376",
            "Pi-7.local:6376",
            "localhost.:6376",
        ] {
            assert!(here(Some(host), "/metrics"), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:6376",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "pi-7.evil.example",
            "",
            "[::1",
            "[evil]",
            "pi-8.local",
            ":6376",
        ] {
            assert!(!here(Some(host), "/metrics"), "{host}");
        }
        assert!(here(None, "/metrics"));
        assert!(!here(Some("localhost"), "http://evil.example/metrics"));
        assert!(!here(Some("evil.example"), "http://localhost/metrics"));
    }

    #[tokio::test]
    async fn a_page_comes_in_pieces_and_one_that_was_cut_is_an_error() {
        for whole in [true, false] {
            let (send, receive) = mpsc::channel(2);
            let writer = tokio::task::spawn_blocking(move || {
                let mut out = Chunks { send, pending: String::new() };
                for n in 0..20_000 {
                    writeln!(out, "line {n}").unwrap();
                }
                if whole {
                    out.end();
                }
            });
            let body = Text::Pieces(receive).collect().await;
            writer.await.unwrap();
            assert_eq!(body.is_ok(), whole);
            if let Ok(body) = body {
                let text = String::from_utf8(body.to_bytes().into()).unwrap();
                assert_eq!(text.lines().count(), 20_000);
                assert!(text.ends_with("line 19999\n"));
            }
        }
    }

    #[tokio::test]
    async fn a_reader_that_leaves_ends_the_writing() {
        let (send, receive) = mpsc::channel(2);
        drop(receive);
        let done = tokio::task::spawn_blocking(move || {
            let mut out = Chunks { send, pending: String::new() };
            (0..1_000_000).find(|_| out.write_str("some line of text\n").is_err())
        });
        assert!(done.await.unwrap().unwrap() < 10_000);
    }
}
