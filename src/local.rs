//! The command line's side of the local API: one request over the daemon's Unix socket.
//!
//! Owns the connection, its time limits and the words for what can go wrong with it. An answer is bounded
//! ([`crate::api::MAX_ANSWER`]) and parsed into the types of [`crate::api`]; what is then printed is the business of [`crate::cli`].

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap};
use hyper::{Method, Request, StatusCode};
use meshd_ca::roster::Roster;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::api::{
    Appointment, ApproveRequest, Approved, Authority, Banishment, ClockWord, CreatedToken, Done, Edge, Enrolment, EnrolmentWish,
    ErrorBody, Finding, Identity, JoinRequest, Joined, KeyRotated, LogLevel, MAX_ANSWER, MergeRequest, MeshTime, MoveRequest,
    Moving, NewRoot, NewToken, Node, Pending, RecoveryWords, Resolve, Rotation, Service, Status, TokenInfo, Upgraded,
    VERSION_HEADER, path,
};
use crate::http1;

/// How long the daemon may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long it may take to say what it knows.
const LOOK: Duration = Duration::from_secs(15);
/// How long it may take for what involves other hosts: joining, leaving, a check of every member.
const WORK: Duration = Duration::from_secs(120);
/// Version of this command.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Why the daemon did not answer, or answered no.
#[derive(Debug, Error)]
pub enum LocalError {
    /// No socket, or one that a daemon left behind that is gone.
    #[error("meshd is not running (nothing answers on {})", socket.display())]
    NotRunning {
        /// The socket.
        socket: PathBuf,
    },
    /// The socket cannot be reached by this user.
    #[error("no permission to use {}", socket.display())]
    Permission {
        /// The socket.
        socket: PathBuf,
    },
    /// Another failure of the connection.
    #[error("cannot talk to meshd on {}: {cause}", socket.display())]
    Connection {
        /// The socket.
        socket: PathBuf,
        /// What the system or the HTTP library said.
        cause: String,
    },
    /// It accepted the request and said nothing.
    #[error("meshd did not answer within {} s", limit.as_secs())]
    Silent {
        /// How long it had.
        limit: Duration,
    },
    /// It does not know the request, or answers in words this command does not know.
    #[error("the running meshd is version {daemon}, this command is version {VERSION}, and they do not understand each other")]
    Version {
        /// The daemon's version, in its own words.
        daemon: String,
    },
    /// The answer is not what the API promises, though the versions are the same: not meshd, or a defect.
    #[error("what answers on {} does not speak meshd's language: {cause}", socket.display())]
    Garbled {
        /// The socket.
        socket: PathBuf,
        /// What was wrong with the answer.
        cause: String,
    },
    /// It refused, and said why.
    #[error("{}", body.what)]
    Refused {
        /// Whether because of who asks.
        denied: bool,
        /// Its words.
        body: ErrorBody,
    },
}

/// The daemon of this host, as seen through its socket.
#[derive(Debug, Clone)]
pub struct Local {
    socket: PathBuf,
}

impl Local {
    /// The daemon that answers on `socket`. Nothing is connected yet.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// What this node is and how it is.
    ///
    /// # Errors
    /// [`LocalError`], here and below.
    pub async fn status(&self) -> Result<Status, LocalError> {
        self.look(path::STATUS).await
    }
    /// The hosts of the mesh.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn nodes(&self) -> Result<Vec<Node>, LocalError> {
        self.look(path::NODES).await
    }
    /// What listens on them.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn services(&self) -> Result<Vec<Service>, LocalError> {
        self.look(path::SERVICES).await
    }
    /// Who talked to whom.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn edges(&self) -> Result<Vec<Edge>, LocalError> {
        self.look(path::EDGES).await
    }
    /// The SVIDs this node holds.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn identity(&self) -> Result<Vec<Identity>, LocalError> {
        self.look(path::IDENTITY).await
    }
    /// What would happen to a connection to `address`.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn resolve(&self, address: SocketAddr) -> Result<Resolve, LocalError> {
        self.look(&format!("{}?address={address}", path::RESOLVE)).await
    }
    /// What is right and wrong with this node. Talks to every member: takes a while.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn check(&self) -> Result<Vec<Finding>, LocalError> {
        self.ask(Method::GET, path::CHECK, Bytes::new(), WORK).await
    }
    /// The tokens this authority made that are still known.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn tokens(&self) -> Result<Vec<TokenInfo>, LocalError> {
        self.look(path::TOKENS).await
    }
    /// Makes a token.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn create_token(&self, wish: &NewToken) -> Result<CreatedToken, LocalError> {
        self.ask(Method::POST, path::TOKENS, self.json(wish)?, LOOK).await
    }
    /// Ends a token. `id` has no characters but letters, digits and `-`.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn revoke_token(&self, id: &str) -> Result<Done, LocalError> {
        self.ask(Method::DELETE, &format!("{}/{id}", path::TOKENS), Bytes::new(), LOOK).await
    }
    /// The hosts that admit others and sign.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn authorities(&self) -> Result<Vec<Authority>, LocalError> {
        self.look(path::AUTHORITIES).await
    }
    /// Makes a member an authority.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn appoint(&self, wish: &Appointment) -> Result<Done, LocalError> {
        self.ask(Method::POST, path::AUTHORITIES, self.json(wish)?, WORK).await
    }
    /// Ends the office of an authority. `node` has no characters but letters, digits and `-`.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn retire(&self, node: &str) -> Result<Done, LocalError> {
        self.ask(Method::DELETE, &format!("{}/{node}", path::AUTHORITIES), Bytes::new(), LOOK).await
    }
    /// Begins to replace the root of this host, an authority.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn rotate(&self) -> Result<Rotation, LocalError> {
        self.ask(Method::POST, path::ROTATION, Bytes::new(), WORK).await
    }
    /// Puts a member out for ever.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn banish(&self, wish: &Banishment) -> Result<Done, LocalError> {
        self.ask(Method::POST, path::BANISH, self.json(wish)?, LOOK).await
    }
    /// The roster of the mesh.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn roster(&self) -> Result<Roster, LocalError> {
        let document: serde_json::Value = self.look(path::ROSTER).await?;
        Roster::from_bytes(document.to_string().as_bytes()).map_err(|e| self.garbled(e))
    }
    /// Hands in what the recovery key signed.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn recovered(&self, words: &RecoveryWords) -> Result<Done, LocalError> {
        self.ask(Method::POST, path::ROSTER, self.json(words)?, WORK).await
    }
    /// The root that this host has, or would have, as an authority.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn new_root(&self) -> Result<NewRoot, LocalError> {
        self.ask(Method::POST, path::RECOVER, Bytes::new(), LOOK).await
    }
    /// What the host knows of the time of its mesh.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn mesh_time(&self) -> Result<MeshTime, LocalError> {
        self.look(path::CLOCK).await
    }
    /// Hands in that the recovery key sets the clock back.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn set_back(&self, word: &ClockWord) -> Result<Done, LocalError> {
        self.ask(Method::POST, path::CLOCK, self.json(word)?, WORK).await
    }
    /// Joins the mesh that a token is for.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn join(&self, request: &JoinRequest) -> Result<Joined, LocalError> {
        self.ask(Method::POST, path::JOIN, self.json(request)?, WORK).await
    }
    /// Looks what it would be to move this mesh into another one, moves it, or stays after all.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn merge(&self, request: &MergeRequest) -> Result<Moving, LocalError> {
        self.ask(Method::POST, path::MERGE, self.json(request)?, WORK).await
    }
    /// Hands in what the recovery key says of that.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn declare_move(&self, request: &MoveRequest) -> Result<Done, LocalError> {
        self.ask(Method::POST, path::MOVE, self.json(request)?, WORK).await
    }
    /// Passes on the code of a host that waits. Asked again, it says whether the host has come.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn approve(&self, request: &ApproveRequest) -> Result<Approved, LocalError> {
        self.ask(Method::POST, path::APPROVE, self.json(request)?, LOOK).await
    }
    /// The hosts that wait to be approved.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn pending(&self) -> Result<Vec<Pending>, LocalError> {
        self.look(path::PENDING).await
    }
    /// Whether hosts are let in with the fleet token.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn enrolment(&self) -> Result<Enrolment, LocalError> {
        self.look(path::ENROLL).await
    }
    /// Changes that.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn enrol(&self, wish: &EnrolmentWish) -> Result<Enrolment, LocalError> {
        self.ask(Method::POST, path::ENROLL, self.json(wish)?, LOOK).await
    }
    /// Leaves the mesh.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn leave(&self) -> Result<Done, LocalError> {
        self.ask(Method::POST, path::LEAVE, Bytes::new(), WORK).await
    }

    /// Has the daemon start the program that is on disk now and leave the work to it.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn upgrade(&self) -> Result<Upgraded, LocalError> {
        self.ask(Method::POST, path::UPGRADE, Bytes::new(), WORK).await
    }

    /// Gives the host another node key.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn rotate_key(&self) -> Result<KeyRotated, LocalError> {
        self.ask(Method::POST, path::KEY, Bytes::new(), WORK).await
    }

    /// How much the daemon logs.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn log_level(&self) -> Result<LogLevel, LocalError> {
        self.look(path::LOG_LEVEL).await
    }
    /// Changes how much the daemon logs, until it is started again.
    ///
    /// # Errors
    /// [`LocalError`].
    pub async fn set_log_level(&self, wish: LogLevel) -> Result<LogLevel, LocalError> {
        self.ask(Method::PUT, path::LOG_LEVEL, self.json(&wish)?, LOOK).await
    }

    fn look<T: DeserializeOwned>(&self, path: &str) -> impl Future<Output = Result<T, LocalError>> {
        self.ask(Method::GET, path, Bytes::new(), LOOK)
    }

    /// In the program once for every answer: what does not depend on that is in [`Self::answer`].
    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes, limit: Duration) -> Result<T, LocalError> {
        let (bytes, other) = self.answer(method, path, body, limit).await?;
        serde_json::from_slice(&bytes).map_err(|e| other.unwrap_or_else(|| self.garbled(e)))
    }

    /// What the daemon answers when all is well, and what to say if that cannot be read because it is of another version.
    async fn answer(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<(Bytes, Option<LocalError>), LocalError> {
        let connect = timeout(CONNECT, UnixStream::connect(&self.socket)).await;
        let stream = connect.map_err(|_| LocalError::Silent { limit: CONNECT })?.map_err(|e| self.unreachable(&e))?;
        let exchange = self.exchange(stream, method, path, body);
        let (status, headers, bytes) = timeout(limit, exchange).await.map_err(|_| LocalError::Silent { limit })??;
        let daemon = headers.get(VERSION_HEADER).and_then(|v| v.to_str().ok());
        let other = daemon.filter(|v| *v != VERSION).map(|v| LocalError::Version { daemon: v.chars().take(40).collect() });
        if status.is_success() { Ok((bytes, other)) } else { Err(self.refusal(status, &bytes, other)) }
    }

    async fn exchange(
        &self,
        stream: UnixStream,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, HeaderMap, Bytes), LocalError> {
        let request = Request::builder().method(method).uri(path).header(HOST, "meshd").header(CONTENT_TYPE, "application/json");
        let request = request.body(Full::new(body)).map_err(|e| self.connection(e))?;
        let (mut sender, connection) = http1::ask(stream).await.map_err(|e| self.connection(e))?;
        let answer = async {
            let (parts, body) = sender.send_request(request).await.map_err(|e| self.connection(e))?.into_parts();
            let bytes = Limited::new(body, MAX_ANSWER).collect().await.map_err(|e| self.connection(e))?.to_bytes();
            Ok((parts.status, parts.headers, bytes))
        };
        // The connection is driven beside the answer, and an error of it shows in the answer.
        tokio::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            _ = connection => answer.await,
        }
    }

    fn refusal(&self, status: StatusCode, bytes: &[u8], other: Option<LocalError>) -> LocalError {
        match (serde_json::from_slice::<ErrorBody>(bytes), other) {
            (_, Some(other)) if status == StatusCode::NOT_FOUND => other,
            (Ok(body), _) => {
                let denied = matches!(status, StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED);
                LocalError::Refused { denied, body }
            }
            (Err(_), Some(other)) => other,
            (Err(_), None) => self.garbled(format!("status {}", status.as_u16())),
        }
    }

    fn json(&self, value: &impl Serialize) -> Result<Bytes, LocalError> {
        serde_json::to_vec(value).map(Into::into).map_err(|e| self.connection(e))
    }

    fn unreachable(&self, error: &std::io::Error) -> LocalError {
        let socket = self.socket.clone();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => LocalError::NotRunning { socket },
            ErrorKind::PermissionDenied => LocalError::Permission { socket },
            _ => self.connection(error),
        }
    }

    fn connection(&self, cause: impl ToString) -> LocalError {
        LocalError::Connection { socket: self.socket.clone(), cause: cause.to_string() }
    }

    fn garbled(&self, cause: impl ToString) -> LocalError {
        LocalError::Garbled { socket: self.socket.clone(), cause: cause.to_string() }
    }
}
