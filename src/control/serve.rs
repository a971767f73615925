//! The answering side of the member API: what one member may ask another.
//!
//! Owns the routes, their size limits and who may use them. The caller's node key was proven by TLS; whether it is an active member is
//! asked at every request, so a banished node is refused on a connection that was opened before.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use meshd_agent::gossip::MAX_PACKET;
use meshd_ca::clock::statement::Question;
use meshd_ca::identity::{NodeId, Workload};
use meshd_ca::keys::{PublicKey, Signature, base64url};
use meshd_ca::merge::{MAX_WORD, Word};
use meshd_ca::roster::{Chain, Entry, MAX_MEMBERS, Member, Roster};
use meshd_ca::signed::Signed;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::server::TlsStream;

use super::budget::Budget;
use super::crowd::Crowd;
use super::gossip::Mailbox;
use super::key::{self, KeyRequest};
use super::link::{Hello, Links, MAX_HELLO, MOVED, Verdict};
use super::rewound::Rewound;
use super::waiting::Waiting;
use crate::clock::Clock;
use crate::identity::svids::MAX_WORKLOADS;
use crate::identity::verifier::peer_key;
use crate::membership::{Membership, MembershipError};
use crate::task;

/// The longest request body.
const MAX_BODY: usize = 1 << 20;
/// Requests in progress on one connection.
const MAX_STREAMS: u32 = 32;
/// The longest header of a request. Ours have some fifty bytes.
const MAX_HEADER: u32 = 8 << 10;
/// What may be under way to us on one connection, for all its requests together and for each.
const WINDOWS: (u32, u32) = (1 << 20, 256 << 10);
/// How long a request may take to arrive.
const BODY: Duration = Duration::from_secs(10);
/// Connections of one member: the one it needs, its probes of our addresses (`meshd_agent::addresses::MAX_PROBES`), and those of before that
/// have not ended yet.
const MAX_PER_MEMBER: usize = 48;
/// Connections of nodes that are no members, in all and from one source, and how long each has to become one.
const MAX_STRANGERS: usize = 64;
const MAX_STRANGERS_PER_SOURCE: usize = 8;
const INTRODUCTION: Duration = Duration::from_secs(10);
/// What somebody hears of whom nothing is known.
const NO_MEMBER: &str = "not an active member of this mesh";
/// SVIDs in one request.
pub(crate) const MAX_SVIDS: usize = 64;

/// SVIDs that one member may ask for at once, twice as many as it can hold, and how long it takes until it may have one more. It needs one
/// for each workload in a third of their life.
const SVIDS_AT_ONCE: u32 = 2 * MAX_WORKLOADS as u32;
const SVID_EVERY: Duration = Duration::from_millis(50);

/// A request for SVIDs: for each, what it names, the key it is for, and the proof that the asker holds that key.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SvidRequest {
    pub(crate) wanted: Vec<Wanted>,
}

/// One SVID wanted.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Wanted {
    pub(crate) workload: Workload,
    pub(crate) key: PublicKey,
    pub(crate) proof: Signature,
}

/// The answer: DER certificates in the order of the request, empty where the name was refused.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SvidAnswer {
    pub(crate) leaves: Vec<Certificate>,
}

/// The answer to a ping. Members of before answered with nothing, and read nothing.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Pong {
    /// What the system clock shows, in milliseconds since 1970.
    pub(crate) time_millis: u64,
}

/// The answer to a question for the time.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TimeAnswer {
    #[serde(flatten)]
    pub(crate) said: Signed,
    /// The last word of the recovery key about the clock, when the asker has not heard of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reset: Option<Signed>,
}

/// A code that a person typed on a member.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Approve {
    pub(crate) code: crate::api::Secret,
}

/// Whom it has let in so far.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Approved {
    pub(crate) admitted: Option<NodeId>,
}

/// The answer to an authority that wants to make this node one too: the root that it will sign with.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Prepared {
    pub(crate) root: Certificate,
}

/// A DER certificate in JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Certificate(#[serde(with = "base64url")] pub(crate) Vec<u8>);

/// What the holder of a workload key signs to prove that it has it.
pub(crate) fn possession(node: NodeId, workload: &Workload) -> Vec<u8> {
    format!("meshd svid request\0{node}\0{workload}").into_bytes()
}

/// Those who are connected.
pub(crate) struct Callers {
    members: Crowd<NodeId>,
    strangers: Crowd<IpAddr>,
    svids: Budget<NodeId>,
}

impl Default for Callers {
    fn default() -> Self {
        Self {
            members: Crowd::new(MAX_PER_MEMBER * MAX_MEMBERS, MAX_PER_MEMBER),
            strangers: Crowd::new(MAX_STRANGERS, MAX_STRANGERS_PER_SOURCE),
            svids: Budget::new(SVIDS_AT_ONCE, SVID_EVERY, MAX_MEMBERS),
        }
    }
}

impl Callers {
    /// Ends when a connection of this caller has to: a stranger's after a moment or when others want its place, a member's when the
    /// member opened many more.
    async fn enough(&self, membership: &Membership, node: NodeId, from: IpAddr) {
        if !membership.roster().is_active(node) {
            let (place, _) = self.strangers.enter(from);
            tokio::select! {
                () = sleep(INTRODUCTION) => {}
                () = place.lost() => return,
            }
        }
        if membership.roster().is_active(node) {
            let (place, _) = self.members.enter(node);
            place.lost().await;
        }
    }
}

impl Callers {
    /// Whether `node` may have `wanted` more SVIDs now. A request for none is one, too.
    fn ration(&self, node: NodeId, wanted: usize, now: Instant) -> Result<(), No> {
        if wanted > MAX_SVIDS {
            return Err(No(StatusCode::PAYLOAD_TOO_LARGE, format!("at most {MAX_SVIDS} SVIDs in one request")));
        }
        self.svids.take(node, wanted.max(1) as u32, now).map_err(|wait| {
            let seconds = wait.as_secs() + 1;
            tracing::warn!(%node, wanted, seconds, "refused to issue SVIDs: this member asks for too many");
            let why = format!("more than {SVIDS_AT_ONCE} SVIDs were asked for in a short time: ask again in {seconds} s");
            No(StatusCode::TOO_MANY_REQUESTS, why)
        })
    }
}

/// Answers what the far end of `stream` asks, until it goes.
pub(crate) async fn serve(stream: TlsStream<Rewound>, from: SocketAddr, api: Arc<Api>) {
    let caller = match peer_key(stream.get_ref().1) {
        Ok(key) => key,
        Err(error) => {
            tracing::debug!(%error, "a control connection without a node key");
            return;
        }
    };
    let enough = {
        let api = api.clone();
        async move { api.callers.enough(&api.membership, caller.node_id(), from.ip()).await }
    };
    let service = service_fn(move |request| {
        let api = api.clone();
        async move { Ok::<_, std::convert::Infallible>(api.answer(caller, from, request).await) }
    });
    let served = hyper::server::conn::http2::Builder::new(task::Executor)
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        .max_header_list_size(MAX_HEADER)
        .initial_connection_window_size(WINDOWS.0)
        .initial_stream_window_size(WINDOWS.1)
        .serve_connection(TokioIo::new(stream), service);
    let served = tokio::select! {
        served = served => served,
        () = enough => {
            tracing::debug!(node = %caller.node_id(), %from, "closed a control connection: too many, or no member's");
            return;
        }
    };
    if let Err(error) = served {
        // A probe hangs up as soon as it has seen our key: that is how most of them end.
        tracing::trace!(node = %caller.node_id(), %error, "control connection ended");
    }
}

/// What the routes need.
pub(crate) struct Api {
    pub(crate) membership: Arc<Membership>,
    pub(crate) links: Arc<Links>,
    pub(crate) gossip: Mailbox,
    /// The mesh port of this node.
    pub(crate) port: u16,
    /// How long the SVIDs live that this node issues, should it be an authority.
    pub(crate) svid_lifetime: Duration,
    /// Whether this node may be made an authority.
    pub(crate) authority: bool,
    pub(crate) callers: Callers,
    pub(crate) waiting: Arc<Waiting>,
}

/// A refusal: status and reason.
#[derive(Debug)]
struct No(StatusCode, String);

impl Api {
    async fn answer(&self, caller: PublicKey, from: SocketAddr, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (status, body) = match self.route(caller, from, request).await {
            Ok(body) => (StatusCode::OK, body),
            Err(No(status, why)) => {
                tracing::debug!(node = %caller.node_id(), %status, why, "refused a control request");
                (status, why.into())
            }
        };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = status;
        response
    }

    async fn route(&self, caller: PublicKey, from: SocketAddr, request: Request<Incoming>) -> Result<Bytes, No> {
        let node = caller.node_id();
        let (parts, body) = request.into_parts();
        if parts.method != Method::POST {
            return Err(No(StatusCode::METHOD_NOT_ALLOWED, "every call is a POST".into()));
        }
        // Strangers may only introduce themselves, and say that this mesh has moved; both is short.
        if !["/v1/hello", MOVED].contains(&parts.uri.path()) && !self.membership.roster().is_active(node) {
            return Err(self.no_member(node));
        }
        let limit = match parts.uri.path() {
            "/v1/hello" => MAX_HELLO,
            MOVED => MAX_WORD,
            // Hundreds may wait for the engine.
            "/v1/gossip" => MAX_PACKET,
            _ => MAX_BODY,
        };
        let late = |_| No(StatusCode::REQUEST_TIMEOUT, "the request did not arrive in time".into());
        let body = timeout(BODY, Limited::new(body, limit).collect()).await.map_err(late)?;
        let body = body.map_err(|e| No(StatusCode::BAD_REQUEST, e.to_string()))?.to_bytes();
        match parts.uri.path() {
            "/v1/hello" => self.hello(node, from, &body).await,
            MOVED => self.moved(node, &body).await,
            "/v1/gossip" => {
                self.gossip.packet(node, body);
                Ok(Bytes::new())
            }
            "/v1/ping" => to_json(&Pong { time_millis: Clock::system_millis() }),
            "/v1/time" => self.time(node, &body),
            "/v1/reset" => self.set_back(&body).await,
            "/v1/svid" => self.svid(node, &body).await,
            "/v1/approve" => self.approve(node, &body).await,
            "/v1/pending" => to_json(&self.waiting.list()),
            "/v1/authority" => self.prepare(node).await,
            key::PATH => self.replace(node, &body).await,
            "/v1/enroll" => self.enroll(node, &body).await,
            _ => Err(No(StatusCode::NOT_FOUND, "no such call; this meshd may be older than the one that asks".into())),
        }
    }

    /// What a node hears that is no member any more, and has nothing to show.
    fn no_member(&self, node: NodeId) -> No {
        verdict(&self.membership, node, &[]).unwrap_or_else(|| No(StatusCode::FORBIDDEN, NO_MEMBER.into()))
    }

    /// Somebody says that this mesh moves. Who that is does not matter: the word is signed.
    async fn moved(&self, node: NodeId, body: &[u8]) -> Result<Bytes, No> {
        let bad = |e: &dyn std::fmt::Display| No(StatusCode::FORBIDDEN, e.to_string());
        let word = Word::from_bytes(body).map_err(|e| bad(&e))?;
        if self.membership.hear_move(word).await.map_err(|e| bad(&e))? {
            tracing::info!(from = %node, "heard where this mesh moves");
        }
        Ok(Bytes::new())
    }

    async fn hello(&self, node: NodeId, mut from: SocketAddr, body: &[u8]) -> Result<Bytes, No> {
        let hello: Hello = parse(body)?;
        let by = hello.entry.member().by;
        let through: Vec<NodeId> = hello.chain.through().chain([by]).collect();
        if hello.entry.member().node() != node {
            return Err(No(StatusCode::FORBIDDEN, "that is the entry of another node".into()));
        }
        // Good whoever brings it.
        if let Some(word) = hello.overruling.filter(|w| self.membership.roster().is_recovery(w.member().by)) {
            // Perhaps that is no longer its last word.
            let roster = self.membership.roster();
            if let Some(later) = roster.later(&word) {
                return Err(gone(&roster, later.clone(), Chain::default()).unwrap_or_else(busy));
            }
            let new = self.membership.merge(word.clone()).await.map_err(|e| No(StatusCode::FORBIDDEN, e.to_string()))?;
            new.then(|| self.gossip.entry(word));
        }
        // An entry whose signer is not known is kept until he is: that is for members to hand over, not for anybody. One who was made an authority
        // while this host was away brings along what made it one.
        let known = {
            let roster = self.membership.roster();
            let signer = roster.member(by).is_some() || roster.is_recovery(by);
            roster.is_active(node) || signer || roster.follows(&hello.chain, &hello.entry)
        };
        if !known {
            return Err(stranger(&self.membership, &hello.entry, &through, NO_MEMBER));
        }
        let new = self.membership.introduced(hello.chain, hello.entry.clone()).await;
        new.map_err(|e| stranger(&self.membership, &hello.entry, &through, &e.to_string()))?
            .into_iter()
            .for_each(|entry| self.gossip.entry(entry));
        // A hello may also be a farewell: the entry by which the caller leaves.
        let roster = self.membership.roster();
        if !roster.is_active(node) {
            return Err(stranger(&self.membership, &hello.entry, &through, NO_MEMBER));
        }
        from.set_port(hello.port);
        self.links.called(node, from);
        to_json(&Hello::of(&roster, self.membership.me(), self.port).ok_or_else(busy)?)
    }

    fn time(&self, node: NodeId, body: &[u8]) -> Result<Bytes, No> {
        let question: Question = parse(body)?;
        let said = self.membership.time(node, &question).map_err(|e| No(StatusCode::FORBIDDEN, e.to_string()))?;
        // Whoever has not heard how the clock was set back hears it with the answer, which is of no use to it before.
        let reset = self.membership.reset().borrow().as_ref().filter(|r| r.era() > question.era()).map(|r| r.signed().clone());
        to_json(&TimeAnswer { said, reset })
    }

    async fn set_back(&self, body: &[u8]) -> Result<Bytes, No> {
        let word = parse(body)?;
        self.membership.set_back(word).await.map_err(|e| No(StatusCode::FORBIDDEN, e.to_string()))?;
        Ok(Bytes::new())
    }

    async fn approve(&self, node: NodeId, body: &[u8]) -> Result<Bytes, No> {
        let request: Approve = parse(body)?;
        let bad = |e: meshd_ca::approval::CodeError| No(StatusCode::BAD_REQUEST, e.to_string());
        let code = request.code.expose().parse().map_err(bad)?;
        let admitted = self.membership.approve(code).await.map_err(|e| No(StatusCode::FORBIDDEN, e.to_string()))?;
        tracing::info!(member = %node, ?admitted, "a member approves a host");
        to_json(&Approved { admitted })
    }

    /// Another authority is about to make this node one. Our root is worth nothing until its word about it is in the roster.
    async fn prepare(&self, node: NodeId) -> Result<Bytes, No> {
        if !self.membership.roster().member(node).is_some_and(Member::is_authority) {
            return Err(No(StatusCode::FORBIDDEN, "that is for authorities to ask".into()));
        }
        if !self.authority {
            return Err(No(
                StatusCode::FORBIDDEN,
                "the configuration of this host says that it is not to be an authority".into(),
            ));
        }
        let root = self.membership.prepare().await.map_err(|e| No(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))?;
        to_json(&Prepared { root: Certificate(root) })
    }

    /// A member asks for another node key, which it has.
    async fn replace(&self, node: NodeId, body: &[u8]) -> Result<Bytes, No> {
        let (request, roster): (KeyRequest, _) = (parse(body)?, self.membership.roster());
        let forbidden = |why: String| No(StatusCode::FORBIDDEN, why);
        if !request.is_proven(roster.mesh(), node) {
            return Err(forbidden("no proof of the new key".into()));
        }
        if !roster.member(self.membership.me()).is_some_and(Member::is_authority) {
            return Err(forbidden("this host is not an authority".into()));
        }
        let word = self.membership.replace(node, &request.key).await.map_err(|e| forbidden(e.to_string()))?;
        tracing::warn!(host = %word.member().name, old = %node, new = %request.key.node_id(), "a host has another node key, by its own wish");
        self.gossip.entry(word.clone());
        to_json(&word)
    }

    /// Another authority says until when hosts are let in with the fleet token, and hears what counts here.
    async fn enroll(&self, node: NodeId, body: &[u8]) -> Result<Bytes, No> {
        if !self.membership.roster().member(node).is_some_and(Member::is_authority) {
            return Err(No(StatusCode::FORBIDDEN, "that is for authorities to say".into()));
        }
        let window = self.membership.hear_window(parse(body)?).await;
        to_json(&window.map_err(|e| No(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))?)
    }

    async fn svid(&self, node: NodeId, body: &[u8]) -> Result<Bytes, No> {
        let request: SvidRequest = parse(body)?;
        self.callers.ration(node, request.wanted.len(), Instant::now())?;
        let mut wanted = Vec::with_capacity(request.wanted.len());
        for w in request.wanted {
            w.key
                .verify(&possession(node, &w.workload), &w.proof)
                .map_err(|_| No(StatusCode::FORBIDDEN, format!("no proof of the key for {}", w.workload)))?;
            wanted.push((w.workload, w.key));
        }
        let leaves = self
            .membership
            .issue(node, &wanted, self.svid_lifetime)
            .await
            .map_err(|e| match e {
                MembershipError::NotYet => No(StatusCode::SERVICE_UNAVAILABLE, e.to_string()),
                e => No(StatusCode::FORBIDDEN, e.to_string()),
            })?
            .into_iter()
            .map(|leaf| Certificate(leaf.map(|l| l.der).unwrap_or_default()))
            .collect();
        to_json(&SvidAnswer { leaves })
    }
}

fn busy() -> No {
    No(StatusCode::SERVICE_UNAVAILABLE, "busy or about to stop: try again".into())
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, No> {
    serde_json::from_slice(body).map_err(|e| No(StatusCode::BAD_REQUEST, e.to_string()))
}

fn to_json(value: &impl Serialize) -> Result<Bytes, No> {
    serde_json::to_vec(value).map(Into::into).map_err(|e| No(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
}

/// What a node hears that is no member any more, because gossip does not speak to it: the entry that says so, or that puts out somebody `through` whom
/// it has its place. It may not know; not even of having left, when its card holds what was on it before.
fn verdict(membership: &Membership, node: NodeId, through: &[NodeId]) -> Option<No> {
    let roster = membership.roster();
    let (entry, chain) = roster.verdict(node, through)?;
    gone(&roster, entry, chain)
}

fn gone(roster: &Roster, entry: Entry, chain: Chain) -> Option<No> {
    let taken_back = roster.taken_back(&entry, &chain);
    Some(No(StatusCode::GONE, serde_json::to_string(&Verdict { entry, chain, taken_back }).ok()?))
}

/// What a node hears that shows this entry of itself and is no member: the same, if that is of this mesh. What is said here means nothing in another one,
/// and whoever is of another one hears where that has moved instead, if it came here.
fn stranger(membership: &Membership, shown: &Entry, through: &[NodeId], why: &str) -> No {
    let here = membership.roster().is_of(shown);
    let verdict = here.then(|| verdict(membership, shown.member().node(), through)).flatten();
    let moved = || {
        let word = membership.last_word(shown)?;
        Some(No(StatusCode::PERMANENT_REDIRECT, String::from_utf8_lossy(&word.to_bytes()).into_owned()))
    };
    verdict.or_else(moved).unwrap_or_else(|| No(StatusCode::FORBIDDEN, why.to_owned()))
}

#[cfg(test)]
mod tests {
    use meshd_ca::identity::HostName;
    use meshd_ca::keys::PrivateKey;
    use meshd_ca::merge::Destination;
    use meshd_ca::store::Store;
    use meshd_ca::time::UnixTime;

    use super::*;

    /// A host of a mesh that moved here may have been a member here before. What is said of it here does not keep from it where its mesh is.
    #[tokio::test]
    async fn who_comes_late_hears_where_its_mesh_has_moved_and_who_is_out_here_that_it_is() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [(one, store), (two, elsewhere)] = [&dirs[0], &dirs[1]].map(|dir| {
            let store = Arc::new(Store::open(dir.path()).unwrap());
            (Arc::new(crate::membership::node_key(&store).unwrap()), store)
        });
        let (clock, name, late) = (Clock::new(UnixTime(0)), HostName::nearest("a"), PrivateKey::generate().unwrap());
        let found = |key: &Arc<PrivateKey>, store: &Arc<Store>| {
            Membership::found(key.clone(), store.clone(), clock.clone(), name.clone(), None, None).unwrap()
        };
        let (from, to) = (found(&one, &store), found(&two, &elsewhere));
        let mut ours = Roster::clone(&from.roster());
        ours.admit(&one, late.public(), &name, clock.now()).unwrap();
        let token = to.create_merge_token(Duration::from_secs(60), 8, &[]).await.unwrap();
        let destination = Destination {
            mesh: to.mesh(),
            authority: to.me(),
            token: token.token().id,
            secret: token.invitation(),
            hints: Vec::new(),
            until: clock.now(),
        };
        let word = from.declare_move(Some(destination)).await.unwrap();
        let mut theirs = Roster::clone(&to.roster());
        for key in [one.public(), late.public()] {
            theirs.admit(&two, key, &name, clock.now()).unwrap();
        }
        theirs.leave(&late).unwrap();
        let moved = Membership::adopt(one, store, clock.clone(), theirs.clone(), None).unwrap();

        let node = late.public().node_id();
        let No(status, body) = stranger(&moved, ours.entry(node).unwrap(), &[], "why");
        assert_eq!((status, Word::from_bytes(body.as_bytes())), (StatusCode::PERMANENT_REDIRECT, Ok(word)));
        let No(status, body) = stranger(&moved, theirs.entry(node).unwrap(), &[], "why");
        assert_eq!(status, StatusCode::GONE);
        assert_eq!(serde_json::from_str::<Verdict>(&body).unwrap().entry, *theirs.entry(node).unwrap());
        // Nobody came to that one, and nothing is known there of a third.
        for (membership, shown) in [(&to, &ours), (&moved, &*found(&two, &elsewhere).roster())] {
            let No(status, body) = stranger(membership, shown.active().find_map(|m| shown.entry(m.node())).unwrap(), &[], "why");
            assert_eq!((status, &*body), (StatusCode::FORBIDDEN, "why"));
        }
    }

    #[test]
    fn a_member_that_asks_for_too_many_svids_is_told_so_and_the_others_are_served() {
        let node = |n: u8| NodeId::from_bytes([n; 16]);
        let (callers, now) = (Callers::default(), Instant::now());
        assert_eq!(callers.ration(node(1), MAX_SVIDS + 1, now).unwrap_err().0, StatusCode::PAYLOAD_TOO_LARGE);
        // As many as it can hold, twice: a restart during which everything is renewed.
        for _ in 0..SVIDS_AT_ONCE as usize / MAX_SVIDS {
            callers.ration(node(1), MAX_SVIDS, now).unwrap();
        }
        for wanted in [0, 1, MAX_SVIDS] {
            let No(status, why) = callers.ration(node(1), wanted, now).unwrap_err();
            assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
            assert!(why.contains("more than 2048 SVIDs were asked for") && why.contains("ask again in "), "{why}");
        }
        callers.ration(node(2), MAX_SVIDS, now).unwrap();
        callers.ration(node(1), MAX_SVIDS, now + MAX_SVIDS as u32 * SVID_EVERY).unwrap();
        callers.ration(node(1), 1, now + MAX_SVIDS as u32 * SVID_EVERY).unwrap_err();
    }
}
