//! The local API: answers the command line on a Unix socket.
//!
//! Owns the socket, the routes and who may use them: anybody on the host may look, except at tokens and the roster; only root and the daemon's own user
//! may change anything. The kernel says who is calling (`SO_PEERCRED`). The answers themselves are put together in [`super::view`].

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::{authorities, view};
use crate::api::{self, ErrorBody, path};
use crate::check;
use crate::control::crowd::Crowd;
use crate::daemon::{Daemon, approve, enrolment, merge, rekey, set_back};
use crate::http1::{self, Text};
use crate::intercept::process::effective_uid;
use crate::task;

/// Connections answered at once, and of one user.
const MAX_CONNECTIONS: usize = 64;
const MAX_PER_USER: usize = 16;
/// How long a request may take to arrive, and a connection in all: longer than the longest that the command line waits.
const ARRIVAL: Duration = Duration::from_secs(10);
const CONNECTION: Duration = Duration::from_secs(150);
/// The longest header of a request.
const MAX_HEADER: usize = 16 << 10;

/// The socket file; removed when dropped, unless another process goes on with it.
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    passed_on: AtomicBool,
}

impl Socket {
    /// Makes the run directory and the socket in it. A socket file that a dead daemon left is replaced: the lock on the state directory
    /// has already shown that no other daemon uses this one.
    pub(crate) fn bind(run_dir: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(run_dir)?;
        let path = run_dir.join(api::SOCKET);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
        Ok(Self { listener, path, passed_on: AtomicBool::new(false) })
    }

    /// Goes on with the one of the process before this.
    pub(crate) fn inherit(run_dir: &Path, fd: OwnedFd) -> std::io::Result<Self> {
        let listener = UnixListener::from_std(fd.into())?;
        Ok(Self { listener, path: run_dir.join(api::SOCKET), passed_on: AtomicBool::new(false) })
    }

    /// The same once more, for the next process.
    pub(crate) fn duplicate(&self) -> std::io::Result<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned()
    }

    /// The file is the next process's.
    pub(crate) fn pass_on(&self) {
        self.passed_on.store(true, Ordering::Relaxed);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.passed_on.load(Ordering::Relaxed) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Answers until the task is dropped.
pub(crate) async fn serve(socket: Arc<Socket>, daemon: Arc<Daemon>) {
    let crowd = Crowd::new(MAX_CONNECTIONS, MAX_PER_USER);
    loop {
        let stream = match socket.listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the local socket");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let user = stream.peer_cred().map(|c| c.uid()).ok();
        // No user keeps another one out, whatever he opens and does not use.
        let (place, _) = crowd.enter(user);
        let daemon = daemon.clone();
        task::spawn(async move {
            tokio::select! {
                ended = timeout(CONNECTION, converse(stream, user, daemon)) => match ended {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "local connection ended"),
                    Err(_) => tracing::debug!("a local connection took too long"),
                },
                () = place.lost() => tracing::debug!(user, "a user has too many local connections"),
            }
        });
    }
}

async fn converse(stream: UnixStream, user: Option<u32>, daemon: Arc<Daemon>) -> hyper::Result<()> {
    let trusted = user.is_some_and(|uid| uid == 0 || uid == effective_uid());
    let limits = http1::Limits { head: ARRIVAL, head_size: MAX_HEADER, keep_alive: false };
    http1::serve(stream, limits, move |request| {
        let daemon = daemon.clone();
        async move { answer(&daemon, trusted, request).await }
    })
    .await
}

/// A refusal.
pub(crate) struct No(pub(crate) StatusCode, pub(crate) ErrorBody);

impl No {
    pub(crate) fn new(status: StatusCode, what: impl Into<String>, why: impl ToString, remedy: &str) -> Self {
        let remedy = (!remedy.is_empty()).then(|| remedy.to_owned());
        Self(status, ErrorBody { what: what.into(), why: Some(why.to_string()).filter(|w| !w.is_empty()), remedy })
    }
}

async fn answer(daemon: &Arc<Daemon>, trusted: bool, request: Request<Incoming>) -> Response<Text> {
    let (status, body) = match route(daemon, trusted, request).await {
        Ok(body) => (StatusCode::OK, body),
        Err(No(status, body)) => (status, serde_json::to_vec(&body).unwrap_or_default().into()),
    };
    let mut response = Response::new(Text::Whole(Some(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(HeaderName::from_static(api::VERSION_HEADER), HeaderValue::from_static(env!("CARGO_PKG_VERSION")));
    response
}

async fn route(daemon: &Arc<Daemon>, trusted: bool, request: Request<Incoming>) -> Result<Bytes, No> {
    let (parts, body) = request.into_parts();
    let asked = parts.uri.path();
    let authority = asked.strip_prefix(path::AUTHORITIES).and_then(|p| p.strip_prefix('/'));
    let token_id = asked.strip_prefix(path::TOKENS).and_then(|p| p.strip_prefix('/'));
    let secret = asked.starts_with(path::TOKENS) || asked == path::ROSTER;
    if !trusted && (parts.method != Method::GET || secret) {
        return Err(No::new(
            StatusCode::FORBIDDEN,
            "not allowed",
            "only root and the user that meshd runs as may do that",
            "run the command with sudo",
        ));
    }
    // Here and not where it is read, which would be in the program once for each. Who only looks has nothing to say.
    let body = if parts.method == Method::GET { Bytes::new() } else { arrived(body).await? };
    match (&parts.method, asked) {
        (&Method::GET, path::STATUS) => {
            let mut status = view::status(daemon).await;
            // Whoever knows the code could be let in instead.
            status.code = daemon.code().filter(|_| trusted).map(|code| code.to_text().to_string().into());
            json(&status)
        }
        (&Method::GET, path::NODES) => json(&view::nodes(&*daemon.member()?)),
        (&Method::GET, path::SERVICES) => json(&view::services(&*daemon.member()?)),
        (&Method::GET, path::EDGES) => json(&view::edges(&*daemon.member()?)),
        (&Method::GET, path::IDENTITY) => json(&view::identities(&*daemon.member()?)),
        (&Method::GET, path::RESOLVE) => {
            let address = parts.uri.query().and_then(address_in).ok_or_else(|| {
                No::new(
                    StatusCode::BAD_REQUEST,
                    "cannot resolve",
                    "that is not an address and port",
                    "give ADDR:PORT, [ADDR]:PORT for IPv6",
                )
            })?;
            json(&view::resolve(&*daemon.member()?, address))
        }
        (&Method::GET, path::CHECK) => json(&check::of_daemon(daemon).await),
        (&Method::GET, path::TOKENS) => json(&view::tokens(&*daemon.member()?).await?),
        (&Method::POST, path::TOKENS) => json(&view::create_token(&*daemon.member()?, read(&body)?).await?),
        (&Method::DELETE, _) if token_id.is_some() => {
            json(&view::revoke_token(&*daemon.member()?, token_id.unwrap_or_default()).await?)
        }
        (&Method::GET, path::AUTHORITIES) => json(&authorities::list(&*daemon.member()?)),
        (&Method::POST, path::AUTHORITIES) => json(&authorities::add(&*daemon.member()?, read(&body)?).await?),
        (&Method::DELETE, _) if authority.is_some() => {
            json(&authorities::remove(&*daemon.member()?, authority.unwrap_or_default()).await?)
        }
        (&Method::POST, path::ROTATION) => json(&authorities::rotate(&*daemon.member()?).await?),
        (&Method::POST, path::BANISH) => json(&authorities::banish(&*daemon.member()?, read(&body)?).await?),
        (&Method::GET, path::ROSTER) => Ok(daemon.member()?.membership.roster().to_bytes().into()),
        (&Method::POST, path::ROSTER) => json(&authorities::recovered(&*daemon.member()?, read(&body)?).await?),
        (&Method::POST, path::RECOVER) => json(&authorities::prepare(&*daemon.member()?).await?),
        (&Method::GET, path::CLOCK) => json(&set_back::time(&*daemon.member()?)),
        (&Method::POST, path::CLOCK) => json(&set_back::set_back(&*daemon.member()?, read(&body)?).await?),
        (&Method::POST, path::JOIN) => json(&daemon.join(read(&body)?).await?),
        (&Method::GET, path::PENDING) => json(&approve::pending(&*daemon.member()?).await?),
        (&Method::POST, path::APPROVE) => json(&approve::approve(&*daemon.member()?, read(&body)?).await?),
        (&Method::GET, path::ENROLL) => json(&enrolment::status(&*daemon.member()?).await?),
        (&Method::POST, path::ENROLL) => json(&enrolment::set(&*daemon.member()?, read(&body)?).await?),
        (&Method::POST, path::UPGRADE) => json(&daemon.upgrade().await?),
        (&Method::POST, path::KEY) => json(&rekey::rotate(daemon).await?),
        (&Method::POST, path::MERGE) => json(&merge::merge(daemon, read(&body)?).await?),
        (&Method::POST, path::MOVE) => json(&merge::declared(daemon, read(&body)?).await?),
        (&Method::POST, path::LEAVE) => json(&daemon.leave().await?),
        (&Method::GET, path::LOG_LEVEL) => json(&api::LogLevel { level: daemon.log().level() }),
        (&Method::PUT, path::LOG_LEVEL) => {
            let wish: api::LogLevel = read(&body)?;
            if !daemon.log().set_level(wish.level) {
                return Err(No::new(StatusCode::CONFLICT, "cannot change the log level", "the log is not meshd's own", ""));
            }
            tracing::warn!(now = %wish.level, "the log level was changed");
            json(&wish)
        }
        _ => Err(No::new(
            StatusCode::NOT_FOUND,
            "unknown request",
            "the command may be of another version than the daemon",
            "restart meshd after an upgrade",
        )),
    }
}

fn unreadable(why: impl ToString) -> No {
    No::new(StatusCode::BAD_REQUEST, "cannot read the request", why, "")
}

async fn arrived(body: Incoming) -> Result<Bytes, No> {
    let read = timeout(ARRIVAL, Limited::new(body, api::MAX_REQUEST).collect()).await;
    Ok(read.map_err(|_| unreadable("it did not arrive in time"))?.map_err(unreadable)?.to_bytes())
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, No> {
    serde_json::from_slice(body).map_err(unreadable)
}

fn json(value: &impl Serialize) -> Result<Bytes, No> {
    serde_json::to_vec(value).map(Into::into).map_err(|e| No::new(StatusCode::INTERNAL_SERVER_ERROR, "cannot answer", e, ""))
}

/// The address and port in the query `address=...`.
pub(crate) fn address_in(query: &str) -> Option<SocketAddr> {
    decode(query.strip_prefix("address=")?).parse().ok()
}

/// The few characters of an address that a query escapes.
fn decode(text: &str) -> String {
    text.replace("%5B", "[").replace("%5D", "]").replace("%3A", ":").replace("%5b", "[").replace("%5d", "]").replace("%3a", ":")
}
