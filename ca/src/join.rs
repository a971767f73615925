//! The join handshake, on both sides, without sockets and without a clock on the joiner's side.
//!
//! It runs inside TLS 1.3 where both ends show self-signed certificates over their node keys: TLS proves that each end has its
//! key, and nothing more. Then, each message one kind byte and a body:
//!
//! | | from | body |
//! | --- | --- | --- |
//! | `H` | joiner | JSON: method, token id if there is one, nonce, wished name, the mesh of its fleet that it would leave |
//! | `C` | authority | JSON: mesh id, nonce; to one of a fleet, which of its meshes this is instead of the id |
//! | `P` | joiner | MAC under the joiner's key |
//! | `W` | authority | MAC under the authority's key, JSON: name, time, roster with the joiner in it, terms of the fleet |
//! | `R` | authority | JSON: why not. Not authenticated, so it can only end a join, never begin one |
//!
//! Both sides share a secret: that of a join token, an approval code that a person carried from the joiner to the mesh, or the key of
//! their fleet ([`crate::fleet`]), of which both know the mesh id without being told. Both MAC
//! keys are derived from it. Both MACs are over the TLS exporter of this connection, both node keys and
//! all messages before (`W` also over its own body), so a proof is worth nothing on another connection, to another authority, for
//! another key or a second time. With a token the joiner says nothing at all to an authority whose key is not the one pinned in it;
//! with a code or a fleet key it asks whoever it sees. It believes nothing before it has checked the authority's MAC. What a man in the middle can
//! learn are MACs under keys of 160 bits, 80 with a code.
//!
//! The authority redeems a token or a code before it answers, and the same node gets the same answer again if that answer was lost.

mod merging;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::approval::{ApprovalCode, Approvals};
use crate::fleet::{Fleet, FleetKey, Side, Terms, gives_way};
use crate::identity::{HostName, MeshId, NodeId};
use crate::keys::{KeyError, PrivateKey, PublicKey, base64url, derive, mac, random, same, sha256};
use crate::merge::MAX_OFFER;
use crate::roster::{MAX_ROSTER, Roster, RosterError, Standing};
use crate::time::UnixTime;
use crate::token::{Closed, JoinToken, TokenId, TokenState, TokenTable};
pub use merging::Suitor;

/// The ALPN protocol name of a join connection.
pub const ALPN: &[u8] = b"meshd-join/1";
/// The label of the TLS exporter (RFC 8446 §7.5) for [`Channel::exporter`]; no context.
pub const EXPORTER_LABEL: &[u8] = b"EXPERIMENTAL meshd join";
/// Longest message in bytes but for the last one, which carries the roster.
pub const MAX_MESSAGE: usize = 1024;
/// Longest last message in bytes.
pub const MAX_WELCOME: usize = MAX_ROSTER + MAX_ROSTER / 4;

/// Why an authority does not admit a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The authority has no such token.
    #[error("this authority does not know the token: make a new one with `meshd token create`")]
    UnknownToken,
    /// The token's time is over.
    #[error("the token has expired: make a new one with `meshd token create`")]
    Expired,
    /// The token has admitted all the nodes it was for.
    #[error("the token has been used already: make a new one with `meshd token create`")]
    Used,
    /// The operator took the token back.
    #[error("the token has been revoked: make a new one with `meshd token create`")]
    Revoked,
    /// The token was tried with wrong proofs.
    #[error("the token was burned after too many wrong proofs, somebody may have been guessing: make a new one")]
    Burned,
    /// The proof is wrong.
    #[error("the proof of having the token's secret is wrong: the connection may be tampered with")]
    WrongProof,
    /// The node key is banished.
    #[error("this node key is banished: remove the host's state directory to give it a new key, and make a new token")]
    Banished,
    /// The roster has no room.
    #[error("the mesh is full")]
    Full,
    /// The node that was asked is not an authority (any more).
    #[error("this node is not an authority any more: make a token on another one")]
    NotAuthority,
    /// The node has no token, and nobody has typed its code.
    #[error("nobody has approved this host yet: `meshd approve CODE` on a member, with the code that `meshd status` shows here")]
    NotApproved,
    /// The code has admitted another node.
    #[error("another host has used this code: restart meshd here for a new one, and find out which host that was")]
    CodeUsed,
    /// The authority is of no fleet, or knows nothing of it.
    #[error("whoever answers here knows of no fleet token")]
    NoFleet,
    /// The fleet token is not taken any more.
    #[error("this mesh takes no hosts with a fleet token any more: `meshd enroll open` on an authority, or `meshd approve CODE`")]
    Closed,
    /// The authority is about to leave its mesh for another one of its fleet.
    #[error("whoever answers here is busy: asked again in a moment")]
    Busy,
    /// Of two meshes of one fleet it is not the joiner's that gives way.
    #[error("of the two meshes of this fleet the other one gives way")]
    Stays,
    /// The token is for a whole mesh.
    #[error("the token is for a whole mesh: `meshd merge` takes it, on a host of the mesh that is to move")]
    ForMesh,
    /// The token is for a host.
    #[error("the token lets one host in, not a mesh: make one with `meshd token create --merge`")]
    ForHost,
    /// A mesh was invited, and this host was none of its members then.
    #[error(
        "this host was not among those that were to come when its mesh was merged: `meshd leave` here, and `meshd join` with a token of that mesh"
    )]
    NotInvited,
    /// A mesh cannot move into itself.
    #[error("both are one mesh already")]
    SameMesh,
    /// More hosts than the token is for.
    #[error("the token is for fewer hosts than that mesh has: make one with `meshd token create --merge --uses N`")]
    TooMany,
    /// The authority's mesh is about to be given up.
    #[error("this mesh is moving into another one and takes nobody in: ask that one")]
    Moves,
    /// The message was not understood; the versions may differ.
    #[error("the other side did not understand: are both of the same version of meshd?")]
    Protocol,
}

/// Why a join fails. Nothing was stored or believed then; on the authority's side, the table of tokens may have counted a
/// failure and must be saved.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum JoinError {
    /// Whoever answers is not the authority that made the token. Nothing was sent to it.
    #[error("whoever answers here is not the authority that made the token (it shows the key of {0})")]
    WrongAuthority(NodeId),
    /// The token leads to this very node.
    #[error("the token was made on this host: use it on another one")]
    OwnToken,
    /// A message that is too long, malformed, or not the one that was to come.
    #[error("the other side sent something else than the next message of a join: are both of the same version of meshd?")]
    Protocol,
    /// Of two meshes of one fleet it is not the own one that gives way, or they are the same.
    #[error("this host is where it belongs")]
    Stays,
    /// The authority is one of another mesh than the token.
    #[error("the token was made for another mesh than this authority is in")]
    WrongMesh,
    /// The authority's proof is wrong.
    #[error("the authority's proof of knowing the token is wrong: the connection may be tampered with")]
    WrongProof,
    /// What the authority proved to have sent is no roster that this node is in.
    #[error("the authority sent a roster that cannot be used: {0}")]
    Roster(RosterError),
    /// The authority does not admit the node.
    #[error("not admitted: {0}")]
    Refused(Reason),
    /// No randomness.
    #[error("join: {0}")]
    Key(#[from] KeyError),
}

impl JoinError {
    /// What the authority sends instead of its next message before it closes, so that the joiner can say why.
    pub fn refusal(&self) -> Vec<u8> {
        let reason = if let Self::Refused(reason) = self { *reason } else { Reason::Protocol };
        encode(REFUSAL, &reason)
    }
}

/// The TLS connection that a join runs in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channel {
    /// The exporter value for [`EXPORTER_LABEL`]: the same on both ends of one connection, and of no other.
    pub exporter: [u8; 32],
    /// The own node key, shown in this connection.
    pub mine: PublicKey,
    /// The other end's node key, which TLS proved it has.
    pub theirs: PublicKey,
}

/// What to do after a message.
#[derive(Debug)]
pub enum Step<T> {
    /// Send this and wait for the next message.
    Send(Vec<u8>),
    /// Done: save what changed, and only then send this.
    Finish(Vec<u8>, T),
    /// Done, with nothing to send.
    Done(T),
}

const HELLO: u8 = b'H';
const CHALLENGE: u8 = b'C';
const PROOF: u8 = b'P';
const WELCOME: u8 = b'W';
const REFUSAL: u8 = b'R';

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Method {
    Token,
    Approval,
    Fleet,
    Merge,
}

#[derive(Serialize, Deserialize)]
struct Hello {
    method: Method,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token: Option<TokenId>,
    #[serde(with = "base64url")]
    nonce: Vec<u8>,
    name: HostName,
    /// See [`Wish::past`].
    #[serde(default, skip_serializing_if = "is_zero")]
    past: u64,
    /// The mesh of its fleet that the joiner is in already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    leaves: Option<Side>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// One of the two: who is of the fleet knows its mesh id, and who is not is not told.
#[derive(Serialize, Deserialize)]
struct Challenge {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mesh: Option<MeshId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    side: Option<Side>,
    #[serde(with = "base64url")]
    nonce: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Welcome {
    name: HostName,
    time: UnixTime,
    roster: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fleet: Option<Terms>,
}

fn encode(kind: u8, body: &impl Serialize) -> Vec<u8> {
    let mut message = vec![kind];
    // Strings and numbers only: writing them to memory cannot fail.
    let _ = serde_json::to_writer(&mut message, body);
    message
}

/// The body of a message that must be of this kind and not longer than `limit`.
fn body(message: &[u8], kind: u8, limit: usize) -> Result<&[u8], JoinError> {
    match message {
        [k, body @ ..] if *k == kind && message.len() <= limit => Ok(body),
        _ => Err(JoinError::Protocol),
    }
}

fn decode<'a, T: Deserialize<'a>>(message: &'a [u8], kind: u8) -> Result<T, JoinError> {
    serde_json::from_slice(body(message, kind, MAX_MESSAGE)?).map_err(|_| JoinError::Protocol)
}

/// What the MACs of one handshake are made with.
struct Proofs {
    joiner: Zeroizing<[u8; 32]>,
    authority: Zeroizing<[u8; 32]>,
    /// Exporter, the joiner's key, the authority's key: fixed lengths, so one after the other is unambiguous.
    binding: Vec<u8>,
}

impl Proofs {
    fn new(secret: &[u8], mesh: MeshId, exporter: &[u8; 32], joiner: &PublicKey, authority: &PublicKey) -> Self {
        let salt = [&mesh.as_bytes()[..], authority.node_id().as_bytes()].concat();
        Self {
            joiner: derive(secret, &salt, b"meshd join 1 joiner"),
            authority: derive(secret, &salt, b"meshd join 1 authority"),
            binding: [&exporter[..], joiner.point(), authority.point()].concat(),
        }
    }

    fn of_joiner(&self, said: &Transcript) -> [u8; 32] {
        mac(&self.joiner, &[b"j", &self.binding, &said.hash()])
    }

    fn of_authority(&self, said: &Transcript, body: &[u8]) -> [u8; 32] {
        mac(&self.authority, &[b"a", &self.binding, &said.hash(), &sha256(&[body])])
    }
}

/// The hashes of the messages so far.
#[derive(Default)]
struct Transcript(Vec<[u8; 32]>);

impl Transcript {
    fn add(&mut self, message: &[u8]) {
        self.0.push(sha256(&[message]));
    }

    fn hash(&self) -> [u8; 32] {
        sha256(&self.0.iter().map(|h| &h[..]).collect::<Vec<_>>())
    }
}

/// What a joiner says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// The name that it would like to have.
    pub name: HostName,
    /// The version of its own last word in a mesh that it left, 0 when there is none. An authority that has not heard that word yet lets it in by a
    /// stronger one all the same; else the host would be out again as soon as the word arrives.
    pub past: u64,
}

/// The wish of one that never left a mesh.
impl From<HostName> for Wish {
    fn from(name: HostName) -> Self {
        Self { name, past: 0 }
    }
}

/// What a join brings the joiner.
#[derive(Debug, Clone)]
pub struct Joined {
    /// The roster, with this node in it.
    pub roster: Roster,
    /// The name this host has in the mesh.
    pub name: HostName,
    /// The authority's time, said in this very connection.
    pub time: UnixTime,
    /// What it keeps of its fleet, if it was let in by the fleet's key.
    pub fleet: Option<Fleet>,
}

/// The secret that the joiner shares with the mesh.
enum Ticket {
    Token(JoinToken),
    Code(ApprovalCode),
    Fleet { mesh: MeshId, key: FleetKey, leaves: Option<Side> },
}

enum JoinerState {
    Greeted,
    Proved(Box<Proofs>, MeshId),
    Over,
}

/// The joiner's side of one connection.
pub struct Joiner {
    ticket: Ticket,
    channel: Channel,
    said: Transcript,
    state: JoinerState,
}

impl Joiner {
    /// Begins a join. Returns the first message too.
    ///
    /// # Errors
    /// [`JoinError::WrongAuthority`] when the other end is not whom the token pins, [`JoinError::OwnToken`], [`JoinError::Key`].
    pub fn start(token: JoinToken, channel: Channel, wish: impl Into<Wish>) -> Result<(Self, Vec<u8>), JoinError> {
        let node = channel.theirs.node_id();
        if channel.mine == channel.theirs {
            return Err(JoinError::OwnToken);
        }
        if !same(node.as_bytes(), &token.pin) {
            return Err(JoinError::WrongAuthority(node));
        }
        Self::greet(Ticket::Token(token), channel, wish.into())
    }

    /// Asks whoever answers to be let in because a person has typed `code` in that mesh. Returns the first message too.
    ///
    /// # Errors
    /// [`JoinError::OwnToken`] when this very node answers, [`JoinError::Key`].
    pub fn ask(code: ApprovalCode, channel: Channel, wish: impl Into<Wish>) -> Result<(Self, Vec<u8>), JoinError> {
        if channel.mine == channel.theirs {
            return Err(JoinError::OwnToken);
        }
        Self::greet(Ticket::Code(code), channel, wish.into())
    }

    /// Asks whoever answers to be let in because both are of the fleet with this key, whose mesh is `mesh`. One that is in such a mesh
    /// already says which one it `leaves`, and does so only if that one gives way. Returns the first message too.
    ///
    /// # Errors
    /// [`JoinError::OwnToken`] when this very node answers, [`JoinError::Key`].
    pub fn of_fleet(
        mesh: MeshId,
        key: FleetKey,
        leaves: Option<Side>,
        channel: Channel,
        wish: impl Into<Wish>,
    ) -> Result<(Self, Vec<u8>), JoinError> {
        if channel.mine == channel.theirs {
            return Err(JoinError::OwnToken);
        }
        Self::greet(Ticket::Fleet { mesh, key, leaves }, channel, wish.into())
    }

    fn greet(ticket: Ticket, channel: Channel, Wish { name, past }: Wish) -> Result<(Self, Vec<u8>), JoinError> {
        let (method, token, leaves) = match &ticket {
            Ticket::Token(token) => (Method::Token, Some(token.id), None),
            Ticket::Code(_) => (Method::Approval, None, None),
            Ticket::Fleet { leaves, .. } => (Method::Fleet, None, *leaves),
        };
        let message = encode(HELLO, &Hello { method, token, nonce: random::<32>()?.to_vec(), name, past, leaves });
        let mut said = Transcript::default();
        said.add(&message);
        Ok((Self { ticket, channel, said, state: JoinerState::Greeted }, message))
    }

    /// Longest message that may come next, in bytes, so that a reader of frames can refuse a longer one unread.
    pub fn limit(&self) -> usize {
        if matches!(self.state, JoinerState::Proved(..)) { MAX_WELCOME } else { MAX_MESSAGE }
    }

    /// Takes the authority's next message.
    ///
    /// # Errors
    /// Why the join failed; a second call after that, or after the end, is [`JoinError::Protocol`].
    pub fn receive(&mut self, message: &[u8]) -> Result<Step<Joined>, JoinError> {
        let state = std::mem::replace(&mut self.state, JoinerState::Over);
        if message.first() == Some(&REFUSAL) && !matches!(state, JoinerState::Over) {
            return Err(JoinError::Refused(decode(message, REFUSAL)?));
        }
        match state {
            JoinerState::Greeted => self.prove(message),
            JoinerState::Proved(proofs, mesh) => self.believe(message, &proofs, mesh).map(Step::Done),
            JoinerState::Over => Err(JoinError::Protocol),
        }
    }

    fn prove(&mut self, message: &[u8]) -> Result<Step<Joined>, JoinError> {
        let challenge: Challenge = decode(message, CHALLENGE)?;
        let (mesh, secret) = match (&self.ticket, challenge.mesh, challenge.side) {
            (Ticket::Token(token), Some(mesh), _) if token.mesh != mesh => return Err(JoinError::WrongMesh),
            (Ticket::Token(token), Some(mesh), _) => (mesh, &token.secret[..]),
            (Ticket::Code(code), Some(mesh), _) => (mesh, code.secret()),
            (Ticket::Fleet { leaves: Some(mine), .. }, _, Some(theirs)) if !gives_way(*mine, theirs) => {
                return Err(JoinError::Stays);
            }
            (Ticket::Fleet { mesh, key, .. }, _, Some(_)) => (*mesh, key.secret()),
            _ => return Err(JoinError::Protocol),
        };
        self.said.add(message);
        let Channel { exporter, mine, theirs } = &self.channel;
        let proofs = Proofs::new(secret, mesh, exporter, mine, theirs);
        let proof = [&[PROOF][..], &proofs.of_joiner(&self.said)].concat();
        self.said.add(&proof);
        self.state = JoinerState::Proved(Box::new(proofs), mesh);
        Ok(Step::Send(proof))
    }

    fn believe(&self, message: &[u8], proofs: &Proofs, mesh: MeshId) -> Result<Joined, JoinError> {
        let (proof, body) = body(message, WELCOME, MAX_WELCOME)?.split_first_chunk::<32>().ok_or(JoinError::Protocol)?;
        if !same(proof, &proofs.of_authority(&self.said, body)) {
            return Err(JoinError::WrongProof);
        }
        let welcome: Welcome = serde_json::from_slice(body).map_err(|_| JoinError::Protocol)?;
        let roster = Roster::from_bytes(welcome.roster.as_bytes()).map_err(JoinError::Roster)?;
        if roster.mesh() != mesh {
            return Err(JoinError::Roster(RosterError::ForeignMesh));
        }
        let me = roster.member(self.channel.mine.node_id()).ok_or(JoinError::Roster(RosterError::NotMember))?;
        if me.standing != Standing::Active || me.name != welcome.name {
            return Err(JoinError::Roster(RosterError::NotActive));
        }
        let fleet = match &self.ticket {
            Ticket::Fleet { key, .. } => Some(Fleet::joined(key.clone(), welcome.fleet.ok_or(JoinError::Protocol)?)),
            _ => None,
        };
        Ok(Joined { roster, name: welcome.name, time: welcome.time, fleet })
    }
}

/// Who was admitted, and as what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// The node.
    pub node: NodeId,
    /// The name it has now.
    pub name: HostName,
    /// Whether by the key of the fleet, and not because a person wanted it.
    pub by_fleet: bool,
    /// Of one that speaks for a whole mesh: how many hosts that brings. It is not admitted itself.
    pub brings: Option<u32>,
}

impl Admitted {
    /// Whether a person has let somebody in by this.
    pub fn by_hand(&self) -> bool {
        !self.by_fleet && self.brings != Some(0)
    }
}

/// What an admission needs of an authority. When a step is [`Step::Finish`], the caller saves the table of tokens and the roster
/// before it sends the bytes; when [`Admission::receive`] fails, it saves the table, where a failure may be counted.
pub trait Authority {
    /// The authority's node key.
    fn key(&self) -> &PrivateKey;
    /// The codes that were typed in this mesh.
    fn approvals(&mut self) -> &mut Approvals;
    /// Its tokens.
    fn tokens(&mut self) -> &mut TokenTable;
    /// The roster.
    fn roster(&mut self) -> &mut Roster;
    /// What it knows of its fleet now, if it is of one.
    fn fleet(&self) -> Option<Reception> {
        None
    }
}

/// How an authority of a fleet receives others of it at one moment.
#[derive(Debug, Clone)]
pub struct Reception {
    /// The key of the fleet.
    pub key: FleetKey,
    /// Which of the meshes of the fleet the authority is of.
    pub side: Side,
    /// What a host that is let in is told.
    pub terms: Terms,
    /// Whether the authority founded that mesh. Only then it decides about hosts that leave another one for it.
    pub founder: bool,
}

impl Reception {
    /// Why a host that leaves this mesh of the fleet, or none, is not let in.
    fn refuses(&self, leaves: Option<Side>) -> Option<Reason> {
        match leaves {
            _ if !self.terms.window.is_open() => Some(Reason::Closed),
            Some(_) if !self.founder => Some(Reason::NotAuthority),
            _ => None,
        }
    }
}

/// What the joiner says it has.
#[derive(Clone, Copy)]
enum Claim {
    Token(TokenId),
    Code,
    Fleet(Option<Side>),
    Merge(TokenId),
}

/// What it has proved to have.
enum Used {
    Token(TokenId),
    Code(ApprovalCode),
    Fleet(Terms),
}

enum AdmissionState {
    Waiting,
    Challenged { claim: Claim, wish: Wish },
    Over,
}

/// Whether a node that has used a token may use it again: it is a member, and lost the answer; or the roster has never heard of it, because the plug
/// of the authority was pulled when the table of tokens was written and the roster was not. One that left or was banished may not.
fn may_repeat(roster: &Roster, node: NodeId) -> bool {
    roster.member(node).is_none_or(|m| m.standing == Standing::Active)
}

/// How an authority receives one of its fleet, if it does.
fn received(authority: &dyn Authority, leaves: Option<Side>) -> Result<Reception, JoinError> {
    let here = authority.fleet().ok_or(JoinError::Refused(Reason::NoFleet))?;
    here.refuses(leaves).map_or(Ok(here), |reason| Err(JoinError::Refused(reason)))
}

/// The authority's side of one connection.
pub struct Admission {
    channel: Channel,
    said: Transcript,
    state: AdmissionState,
    asks: Option<HostName>,
}

impl Admission {
    /// Waits for the joiner's first message.
    pub fn start(channel: Channel) -> Self {
        Self { channel, said: Transcript::default(), state: AdmissionState::Waiting, asks: None }
    }

    /// The name that a joiner without a token wishes for, once it has asked: somebody may want to approve it.
    pub fn asks(&self) -> Option<&HostName> {
        self.asks.as_ref()
    }

    /// Longest message that may come next, in bytes.
    pub fn limit(&self) -> usize {
        match self.state {
            AdmissionState::Challenged { claim: Claim::Merge(_), .. } => MAX_OFFER,
            _ => MAX_MESSAGE,
        }
    }

    /// Takes the joiner's next message, at the authority's mesh time.
    ///
    /// # Errors
    /// Why the node is not admitted; send [`JoinError::refusal`] and close. A further call is [`JoinError::Protocol`].
    pub fn receive(&mut self, message: &[u8], authority: &mut dyn Authority, now: UnixTime) -> Result<Step<Admitted>, JoinError> {
        match std::mem::replace(&mut self.state, AdmissionState::Over) {
            AdmissionState::Waiting => self.challenge(message, authority, now),
            AdmissionState::Challenged { claim, wish } => self.admit(message, claim, &wish, authority, now),
            AdmissionState::Over => Err(JoinError::Protocol),
        }
    }

    fn challenge(&mut self, message: &[u8], authority: &mut dyn Authority, now: UnixTime) -> Result<Step<Admitted>, JoinError> {
        let hello: Hello = decode(message, HELLO)?;
        if hello.nonce.len() != 32 {
            return Err(JoinError::Protocol);
        }
        self.not_banished(authority)?;
        let mut side = None;
        let claim = match (hello.method, hello.token) {
            (Method::Token, Some(token)) => {
                self.secret(token, authority, now)?;
                Claim::Token(token)
            }
            (Method::Merge, Some(token)) => {
                self.merging(token, authority, now)?;
                Claim::Merge(token)
            }
            (Method::Fleet, None) => {
                // One that has a mesh waits for nobody.
                self.asks = hello.leaves.is_none().then(|| hello.name.clone());
                side = Some(received(authority, hello.leaves)?.side);
                Claim::Fleet(hello.leaves)
            }
            (Method::Approval, None) => {
                self.asks = Some(hello.name.clone());
                // Which mesh this is need not be told to everybody who asks.
                if !authority.approvals().any(now) {
                    return Err(JoinError::Refused(Reason::NotApproved));
                }
                Claim::Code
            }
            _ => return Err(JoinError::Protocol),
        };
        self.said.add(message);
        let mesh = side.is_none().then(|| authority.roster().mesh());
        let reply = encode(CHALLENGE, &Challenge { mesh, side, nonce: random::<32>()?.to_vec() });
        self.said.add(&reply);
        self.state = AdmissionState::Challenged { claim, wish: Wish { name: hello.name, past: hello.past } };
        Ok(Step::Send(reply))
    }

    fn admit(
        &mut self,
        message: &[u8],
        claim: Claim,
        wish: &Wish,
        authority: &mut dyn Authority,
        now: UnixTime,
    ) -> Result<Step<Admitted>, JoinError> {
        self.not_banished(authority)?;
        if let Claim::Merge(token) = claim {
            return self.invite(message, token, wish, authority, now);
        }
        let proof = body(message, PROOF, MAX_MESSAGE)?;
        let Channel { exporter, mine, theirs } = &self.channel;
        let mesh = authority.roster().mesh();
        let proofs_with = |secret: &[u8]| Proofs::new(secret, mesh, exporter, theirs, mine);
        let proves = |proofs: &Proofs| same(proof, &proofs.of_joiner(&self.said));
        let node = theirs.node_id();
        let (proofs, used) = match claim {
            Claim::Merge(_) => return Err(JoinError::Protocol),
            Claim::Token(token) => {
                // Asked again: since the first message others may have used the token, and the operator may have taken it back.
                let proofs = proofs_with(&self.secret(token, authority, now)?[..]);
                if !proves(&proofs) {
                    authority.tokens().failed(token);
                    return Err(JoinError::Refused(Reason::WrongProof));
                }
                (proofs, Used::Token(token))
            }
            Claim::Code => match authority.approvals().find(now, |code| proves(&proofs_with(code.secret()))) {
                None => return Err(JoinError::Refused(Reason::NotApproved)),
                Some((_, Some(other))) if other != node => return Err(JoinError::Refused(Reason::CodeUsed)),
                Some((code, _)) => (proofs_with(code.secret()), Used::Code(code)),
            },
            Claim::Fleet(leaves) => {
                // Asked again, as a token is. What the joiner says of its mesh is part of what it proves.
                let here = received(authority, leaves)?;
                let proofs = proofs_with(here.key.secret());
                if !proves(&proofs) {
                    return Err(JoinError::Refused(Reason::WrongProof));
                }
                if leaves.is_some_and(|theirs| !gives_way(theirs, here.side)) {
                    return Err(JoinError::Refused(Reason::Stays));
                }
                (proofs, Used::Fleet(here.terms))
            }
        };
        self.said.add(message);
        let again = may_repeat(authority.roster(), node);
        let mut roster = authority.roster().clone();
        let name = roster.admit_after(wish.past, authority.key(), theirs, &wish.name, now).map_err(|e| match e {
            RosterError::Banished | RosterError::Replaced => JoinError::Refused(Reason::Banished),
            RosterError::NotAuthority => JoinError::Refused(Reason::NotAuthority),
            RosterError::Key(e) => JoinError::Key(e),
            _ => JoinError::Refused(Reason::Full),
        })?;
        let document = String::from_utf8(roster.to_bytes()).map_err(|_| JoinError::Protocol)?;
        *authority.roster() = roster;
        let fleet = match used {
            Used::Token(token) => {
                authority.tokens().redeemed(token, node, again);
                None
            }
            Used::Code(code) => {
                authority.approvals().admitted(&code, node);
                None
            }
            Used::Fleet(terms) => Some(terms),
        };
        let body = encode(WELCOME, &Welcome { name: name.clone(), time: now, roster: document, fleet });
        let proof = proofs.of_authority(&self.said, &body[1..]);
        let reply = [&[WELCOME][..], &proof, &body[1..]].concat();
        Ok(Step::Finish(reply, Admitted { node, name, by_fleet: fleet.is_some(), brings: None }))
    }

    fn not_banished(&self, authority: &mut dyn Authority) -> Result<(), JoinError> {
        match authority.roster().member(self.channel.theirs.node_id()).map(|m| m.standing) {
            Some(Standing::Banished | Standing::Replaced) => Err(JoinError::Refused(Reason::Banished)),
            _ => Ok(()),
        }
    }

    /// The secret with which this node may use the token now.
    fn secret(&self, token: TokenId, authority: &mut dyn Authority, now: UnixTime) -> Result<Zeroizing<[u8; 20]>, JoinError> {
        let node = self.channel.theirs.node_id();
        let again = may_repeat(authority.roster(), node).then_some(node);
        let tokens = authority.tokens();
        match tokens.merge(token).map(|m| m.from.is_some()) {
            None => tokens.usable(token, again, now).cloned().map_err(refusal),
            Some(true) => tokens.invited(token, node, now).map_err(|closed| match closed {
                Some(TokenState::Open) => JoinError::Refused(Reason::NotInvited),
                closed => refusal(closed),
            }),
            Some(false) => Err(JoinError::Refused(Reason::ForMesh)),
        }
    }
}

fn refusal(closed: Closed) -> JoinError {
    JoinError::Refused(match closed {
        None | Some(TokenState::Open) => Reason::UnknownToken,
        Some(TokenState::Used) => Reason::Used,
        Some(TokenState::Expired) => Reason::Expired,
        Some(TokenState::Revoked) => Reason::Revoked,
        Some(TokenState::Burned) => Reason::Burned,
    })
}

#[cfg(test)]
mod tests;
