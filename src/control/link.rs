//! The calling side of the member API: one HTTP/2 connection to each member in use, proven by its node key.
//!
//! Owns dialling, the pool, and the hello that every connection begins with. A link exists only when the handshake proved the node key the
//! roster (or the entry that the hello brought) says is an active member's. No date is looked at: a link works with a wrong clock and
//! after a year in a drawer.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http2::SendRequest;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use meshd_ca::identity::NodeId;
use meshd_ca::merge::Word;
use meshd_ca::roster::{Chain, Entry, Roster};
use rustls::ClientConfig;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use crate::identity::tls::NodeTls;
use crate::identity::verifier::peer_key;
use crate::membership::Membership;
use crate::task;

/// How long a connection may take to be there; Wi-Fi that sleeps needs more than a second.
pub(crate) const DIAL_TIMEOUT: Duration = Duration::from_secs(4);
/// How long an answer may take.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A link that carried nothing for so long is closed.
pub(crate) const IDLE: Duration = Duration::from_secs(90);
/// Links kept at most; the one unused for longest goes first.
pub(crate) const MAX_LINKS: usize = 64;
/// Callers remembered: as many as a mesh has members.
const MAX_CALLERS: usize = 4096;
/// The longest hello. Whoever answers at an address may be anybody until it has been read.
pub(crate) const MAX_HELLO: usize = 32 << 10;
/// The longest answer read.
pub(crate) const MAX_ANSWER: usize = 4 << 20;

/// Where a word that a mesh moves is handed in.
pub(crate) const MOVED: &str = "/v1/moved";

/// Why a member could not be asked.
#[derive(Debug, Error)]
pub(crate) enum LinkError {
    /// Nobody answers there.
    #[error("cannot reach {0}: {1}")]
    Connect(SocketAddr, std::io::Error),
    /// Nobody answers there in time.
    #[error("no answer from {0} in time")]
    Timeout(SocketAddr),
    /// No address is known for the member.
    #[error("no address of {0} is known yet")]
    NoAddress(NodeId),
    /// Somebody answers who is not an active member, or not the one expected.
    #[error("{0} is answered by {1}, which is not {2}")]
    Stranger(SocketAddr, NodeId, String),
    /// This very host answers there: a NAT that leads back.
    #[error("{0} leads back to this host")]
    Itself(SocketAddr, NodeId),
    /// The connection broke, or what came is not what was asked for.
    #[error("the connection to {0} failed: {1}")]
    Broken(NodeId, String),
    /// The member shows the entry by which this node was put out, or left.
    #[error("{0} says that this host is no member any more")]
    Out(NodeId, Box<Verdict>),
    /// The node shows the word by which this mesh moves.
    #[error("{0} says that this mesh has moved into another one")]
    Moved(NodeId, Box<Word>),
    /// The member answered, and said no.
    #[error("{0} refused: {1} {2}")]
    Refused(NodeId, StatusCode, String),
}

/// The first thing two members tell each other on a link: their roster entries, so that a member that has just joined is known to whomever
/// it talks to.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) entry: Entry,
    /// The mesh port, so that whoever was called can call back before it has the caller's record.
    pub(crate) port: u16,
    /// What made the signer of the entry an authority, for one who was away when that happened and hears nobody else.
    #[serde(default, skip_serializing_if = "Chain::is_empty")]
    pub(crate) chain: Chain,
    /// One after the other, the recovery key's words by which it does not count that this node was put out, for one who has not heard them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) overruling: Option<Entry>,
}

/// What a node hears that is no member any more: the entry that says so, or that puts out somebody through whom it has its place, and what made
/// its signer an authority, if the node was away then.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) entry: Entry,
    #[serde(default, skip_serializing_if = "Chain::is_empty")]
    pub(crate) chain: Chain,
    /// That those were taken back who say so, if they were banished for a time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) taken_back: Vec<Entry>,
}

impl Hello {
    /// What this node shows of itself; none when it is not in its roster.
    pub(crate) fn of(roster: &Roster, me: NodeId, port: u16) -> Option<Self> {
        let hello = Self { entry: roster.introduction(me)?.clone(), port, chain: roster.chain(me), overruling: None };
        let short = serde_json::to_vec(&hello).is_ok_and(|bytes| bytes.len() <= MAX_HELLO);
        Some(if short { hello } else { Self { chain: Chain::default(), ..hello } })
    }
}

/// Opens TCP connections that carry meshd's mark, so that they are never captured.
pub(crate) trait Dial: Send + Sync {
    fn dial(&self, to: SocketAddr) -> std::pin::Pin<Box<dyn Future<Output = std::io::Result<TcpStream>> + Send>>;
}

#[derive(Clone)]
struct Link {
    send: SendRequest<Full<Bytes>>,
    address: SocketAddr,
    used: Instant,
}

/// Where a member may be reached, best first.
pub(crate) type Whereabouts = Box<dyn Fn(NodeId) -> Vec<SocketAddr> + Send + Sync>;

/// The pool of links.
pub(crate) struct Links {
    membership: Arc<Membership>,
    tls: Arc<ClientConfig>,
    dial: Arc<dyn Dial>,
    whereabouts: Whereabouts,
    open: Mutex<HashMap<NodeId, Link>>,
    opening: Mutex<HashMap<NodeId, Arc<tokio::sync::Mutex<()>>>>,
    opened: tokio::sync::mpsc::Sender<NodeId>,
    port: u16,
    /// Where the last hello of each member came from.
    callers: Mutex<HashMap<NodeId, SocketAddr>>,
}

impl Links {
    /// A pool that tells `opened` about every new link.
    pub(crate) fn new(
        membership: Arc<Membership>,
        tls: Arc<ClientConfig>,
        dial: Arc<dyn Dial>,
        whereabouts: Whereabouts,
        opened: tokio::sync::mpsc::Sender<NodeId>,
        port: u16,
    ) -> Self {
        Self {
            membership,
            tls,
            dial,
            whereabouts,
            open: Mutex::default(),
            opening: Mutex::default(),
            opened,
            port,
            callers: Mutex::default(),
        }
    }

    /// Posts `body` to a member and returns what it answers.
    pub(crate) async fn post(&self, to: NodeId, path: &'static str, body: impl Into<Bytes>) -> Result<Bytes, LinkError> {
        self.call(to, Method::POST, path, body.into()).await
    }

    async fn call(&self, to: NodeId, method: Method, path: &'static str, body: Bytes) -> Result<Bytes, LinkError> {
        let link = self.link(to).await?;
        match timeout(CALL_TIMEOUT, exchange(link.send, to, method, path, body, MAX_ANSWER)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                if matches!(error, LinkError::Broken(..)) {
                    self.close(to);
                }
                self.heed(&error).await;
                Err(error)
            }
            Err(_) => {
                self.close(to);
                Err(LinkError::Timeout(link.address))
            }
        }
    }

    /// Hands somebody at `address` the word that its mesh has moved, whoever it is: it judges that word itself.
    pub(crate) async fn tell(&self, address: SocketAddr, word: &Word) -> Result<(), LinkError> {
        let told = async {
            let (owner, send) = self.connect(address, None).await?;
            exchange(send, owner, Method::POST, MOVED, word.to_bytes().into(), MAX_HELLO).await
        };
        timeout(DIAL_TIMEOUT, told).await.map_err(|_| LinkError::Timeout(address))?.map(drop)
    }

    /// Believes that this node is out, or that its mesh has moved, if somebody has signed it who may: nobody else tells it.
    async fn heed(&self, error: &LinkError) {
        let (me, roster) = (self.membership.me(), self.membership.roster());
        match error {
            LinkError::Moved(_, word) => {
                if let Err(error) = self.membership.hear_move(Word::clone(word)).await {
                    tracing::debug!(%error, "a word that this mesh moves was not believed");
                }
            }
            LinkError::Out(_, verdict) => {
                for word in verdict.taken_back.iter().filter(|w| roster.is_recovery(w.member().by)) {
                    if let Err(error) = self.membership.introduced(Chain::default(), word.clone()).await {
                        tracing::debug!(%error, "a word of the recovery key was not believed");
                    }
                }
                let mine = roster.introduction(me).map(Entry::member);
                let (by, earlier) = (mine.map(|m| m.by), mine.and_then(|m| m.replaces));
                let through = roster.chain(me);
                let about = verdict.entry.member().node();
                let mut whom = [me].into_iter().chain(by).chain(earlier).chain(through.through());
                // What the recovery key says is good whoever brings it.
                let recovery = roster.is_recovery(verdict.entry.member().by);
                if !recovery && verdict.entry.member().replaces != Some(me) && !whom.any(|n| n == about) {
                    return;
                }
                if let Err(error) = self.membership.introduced(verdict.chain.clone(), verdict.entry.clone()).await {
                    tracing::debug!(%error, "that this host is out was not believed");
                }
            }
            _ => {}
        }
    }

    /// Finds out which member answers at `address`, by its key. Keeps the connection as the link to it when there is none yet.
    pub(crate) async fn prove(&self, address: SocketAddr) -> Result<NodeId, LinkError> {
        let (owner, link) = self.open_at(address, None).await?;
        self.keep(owner, link);
        Ok(owner)
    }

    /// A member said hello from here: a hint where it may be called back.
    pub(crate) fn called(&self, node: NodeId, from: SocketAddr) {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.len() < MAX_CALLERS || callers.contains_key(&node) {
            callers.insert(node, from);
        }
    }

    /// Tells a member that this node has left; it passes that on.
    pub(crate) async fn farewell(&self, to: NodeId, entry: Entry) {
        let body =
            serde_json::to_vec(&Hello { entry, port: self.port, chain: Chain::default(), overruling: None }).unwrap_or_default();
        // Its answer is a refusal: we are no member any more.
        let _ = self.post(to, "/v1/hello", body).await;
    }

    /// Whether there is a link to a member, or an address to open one to.
    pub(crate) fn knows(&self, node: NodeId) -> bool {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&node);
        open || !self.places(node).is_empty()
    }

    /// Where a member may be, best first.
    pub(crate) fn places(&self, node: NodeId) -> Vec<SocketAddr> {
        let mut places = (self.whereabouts)(node);
        let caller = self.callers.lock().unwrap_or_else(PoisonError::into_inner).get(&node).copied();
        places.extend(caller.filter(|c| !places.contains(c)));
        places
    }

    /// Closes the link to a member: it left, was banished, or does not answer.
    pub(crate) fn close(&self, node: NodeId) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&node);
    }

    /// The members with an open link.
    pub(crate) fn linked(&self) -> Vec<NodeId> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// Closes the links that have carried nothing for [`IDLE`] or whose far end is gone.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        self.open.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, l| !l.send.is_closed() && now - l.used < IDLE);
        self.opening.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, gate| Arc::strong_count(gate) > 1);
    }

    async fn link(&self, to: NodeId) -> Result<Link, LinkError> {
        if let Some(link) = self.ready(to) {
            return Ok(link);
        }
        // One dialler for each member; whoever waited finds the link that the first one made.
        let gate = self.opening.lock().unwrap_or_else(PoisonError::into_inner).entry(to).or_default().clone();
        let _turn = gate.lock().await;
        if let Some(link) = self.ready(to) {
            return Ok(link);
        }
        let mut last = LinkError::NoAddress(to);
        for address in self.places(to) {
            match self.open_at(address, Some(to)).await {
                Ok((_, link)) => {
                    self.keep(to, link.clone());
                    return Ok(link);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn ready(&self, to: NodeId) -> Option<Link> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let link = open.get_mut(&to)?;
        if link.send.is_closed() {
            open.remove(&to);
            return None;
        }
        link.used = Instant::now();
        Some(link.clone())
    }

    fn keep(&self, node: NodeId, link: Link) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.get(&node).is_some_and(|l| !l.send.is_closed()) {
            return;
        }
        if open.len() >= MAX_LINKS
            && let Some(oldest) = open.iter().min_by_key(|(_, l)| l.used).map(|(n, _)| *n)
        {
            open.remove(&oldest);
        }
        open.insert(node, link);
        // A full queue only means that this session's exchange of digests comes with the next periodic one.
        let _ = self.opened.try_send(node);
    }

    async fn open_at(&self, address: SocketAddr, expect: Option<NodeId>) -> Result<(NodeId, Link), LinkError> {
        timeout(DIAL_TIMEOUT, self.handshake(address, expect)).await.map_err(|_| LinkError::Timeout(address))?
    }

    async fn handshake(&self, address: SocketAddr, expect: Option<NodeId>) -> Result<(NodeId, Link), LinkError> {
        let (owner, mut send) = self.connect(address, expect).await?;
        self.hello(&mut send, owner).await?;
        if !self.membership.roster().is_active(owner) {
            return Err(LinkError::Stranger(address, owner, "an active member of this mesh".into()));
        }
        Ok((owner, Link { send, address, used: Instant::now() }))
    }

    /// A connection to whoever answers at `address`, by the key that it proves.
    async fn connect(
        &self,
        address: SocketAddr,
        expect: Option<NodeId>,
    ) -> Result<(NodeId, SendRequest<Full<Bytes>>), LinkError> {
        let failed = |e: std::io::Error| LinkError::Connect(address, e);
        let tcp = self.dial.dial(address).await.map_err(failed)?;
        let name = NodeTls::server_name();
        let tls = TlsConnector::from(self.tls.clone()).connect(name, tcp).await.map_err(failed)?;
        let key = peer_key(tls.get_ref().1).map_err(|e| failed(std::io::Error::other(e)))?;
        let owner = key.node_id();
        if owner == self.membership.me() {
            return Err(LinkError::Itself(address, owner));
        }
        if let Some(expected) = expect.filter(|n| *n != owner) {
            return Err(LinkError::Stranger(address, owner, format!("the {expected} expected there")));
        }
        let (send, connection) = hyper::client::conn::http2::Builder::new(task::Executor)
            .timer(TokioTimer::new())
            .keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(10))
            .handshake(TokioIo::new(tls))
            .await
            .map_err(|e| LinkError::Broken(owner, e.to_string()))?;
        task::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(node = %owner, %error, "link ended");
            }
        });
        Ok((owner, send))
    }

    async fn hello(&self, send: &mut SendRequest<Full<Bytes>>, owner: NodeId) -> Result<(), LinkError> {
        let broken = |e: String| LinkError::Broken(owner, e);
        let mut mine = Hello::of(&self.membership.roster(), self.membership.me(), self.port)
            .ok_or_else(|| broken("this host is not in its roster".into()))?;
        let mut words: Option<VecDeque<Entry>> = None;
        let answer = loop {
            let body = serde_json::to_vec(&mine).map_err(|e| broken(e.to_string()))?;
            let error = match exchange(send.clone(), owner, Method::POST, "/v1/hello", body.into(), MAX_HELLO).await {
                Ok(answer) => break answer,
                Err(error) => error,
            };
            self.heed(&error).await;
            let LinkError::Out(_, verdict) = &error else { return Err(error) };
            let known = || self.membership.roster().overruling(&verdict.entry, &verdict.chain).into_iter().cloned().collect();
            mine.overruling = Some(words.get_or_insert_with(known).pop_front().ok_or(error)?);
        };
        let theirs: Hello = serde_json::from_slice(&answer).map_err(|e| broken(e.to_string()))?;
        self.membership.introduced(theirs.chain, theirs.entry).await.map_err(|e| broken(e.to_string()))?;
        Ok(())
    }
}

async fn exchange(
    mut send: SendRequest<Full<Bytes>>,
    to: NodeId,
    method: Method,
    path: &'static str,
    body: Bytes,
    limit: usize,
) -> Result<Bytes, LinkError> {
    let broken = |e: String| LinkError::Broken(to, e);
    let request = Request::builder()
        .method(method)
        .uri(format!("https://mesh{path}"))
        .body(Full::new(body))
        .map_err(|e| broken(e.to_string()))?;
    send.ready().await.map_err(|e| broken(e.to_string()))?;
    let answer = send.send_request(request).await.map_err(|e| broken(e.to_string()))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), limit).collect().await.map_err(|e| broken(e.to_string()))?.to_bytes();
    if status.is_success() {
        Ok(body)
    } else if status == StatusCode::GONE
        && let Ok(verdict) = serde_json::from_slice(&body)
    {
        Err(LinkError::Out(to, Box::new(verdict)))
    } else if status == StatusCode::PERMANENT_REDIRECT
        && let Ok(word) = Word::from_bytes(&body)
    {
        Err(LinkError::Moved(to, Box::new(word)))
    } else {
        let what: String = String::from_utf8_lossy(&body).chars().take(200).filter(|c| !c.is_control()).collect();
        Err(LinkError::Refused(to, status, what))
    }
}
