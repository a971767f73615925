//! The words of the local API: JSON over HTTP/1 on the Unix socket `<run_dir>/meshd.sock`.
//!
//! Shared by the daemon, which answers, and the command line, which asks ([`crate::local`]); and what `-o json` prints, so a field
//! here is a promise: fields are added, never renamed or given another meaning. Owns no socket and decides nothing.
//!
//! | endpoint | answer |
//! | --- | --- |
//! | `GET /v1/status` | [`Status`] |
//! | `GET /v1/nodes` | array of [`Node`] |
//! | `GET /v1/services` | array of [`Service`] |
//! | `GET /v1/edges` | array of [`Edge`] |
//! | `GET /v1/identity` | array of [`Identity`] |
//! | `GET /v1/resolve?address=ADDR:PORT` | [`Resolve`] |
//! | `GET /v1/check` | array of [`Finding`] |
//! | `GET /v1/authorities` | array of [`Authority`] |
//! | `POST /v1/authorities` [`Appointment`] | [`Done`] |
//! | `DELETE /v1/authorities/NODE` | [`Done`] |
//! | `POST /v1/rotation` | [`Rotation`] |
//! | `POST /v1/banish` [`Banishment`] | [`Done`] |
//! | `GET /v1/roster` | the roster, as members give it to each other |
//! | `POST /v1/roster` [`RecoveryWords`] | [`Done`] |
//! | `POST /v1/recover` | [`NewRoot`] |
//! | `GET /v1/clock` | [`MeshTime`] |
//! | `POST /v1/clock` [`ClockWord`] | [`Done`] |
//! | `GET /v1/tokens` | array of [`TokenInfo`] |
//! | `POST /v1/tokens` [`NewToken`] | [`CreatedToken`] |
//! | `DELETE /v1/tokens/ID` | [`Done`] |
//! | `POST /v1/join` [`JoinRequest`] | [`Joined`] |
//! | `POST /v1/leave` | [`Done`] |
//! | `POST /v1/merge` [`MergeRequest`] | [`Moving`] |
//! | `POST /v1/move` [`MoveRequest`] | [`Done`] |
//! | `GET /v1/enroll` | [`Enrolment`] |
//! | `POST /v1/enroll` [`EnrolmentWish`] | [`Enrolment`] |
//! | `POST /v1/upgrade` | [`Upgraded`] |
//! | `POST /v1/key` | [`KeyRotated`] |
//! | `GET /v1/log-level` | [`LogLevel`] |
//! | `PUT /v1/log-level` [`LogLevel`] | [`LogLevel`] |
//!
//! Whatever is not `GET`, and `/v1/tokens` and `/v1/roster` as a whole, is for root and the daemon's own user only: the daemon asks the kernel who
//! is calling (`SO_PEERCRED`, unix(7)). A refusal is a status of 4xx or 5xx with an [`ErrorBody`].
//!
//! Times are whole seconds: absolute ones since 1970 on the mesh's clock, relative ones are named `..._seconds`.

pub mod code;

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use meshd_ca::bundle::RootId;
use meshd_ca::clock::Era;
use meshd_ca::identity::{HostName, MeshId, NodeId, SpiffeId, TrustDomain, Workload};
use meshd_ca::keys::base64url;
use meshd_ca::merge::Word;
use meshd_ca::roster::Entry;
use meshd_ca::signed::Signed;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::config::Mode;

/// Name of the socket inside the run directory.
pub const SOCKET: &str = "meshd.sock";
/// Response header with the version of the daemon, so that a command of another version can say so.
pub const VERSION_HEADER: &str = "meshd-version";
/// Longest request body the daemon reads, in bytes.
pub const MAX_REQUEST: usize = 64 * 1024;
/// Longest answer a command reads, in bytes: the edges of a large mesh fit many times.
pub const MAX_ANSWER: usize = 32 * 1024 * 1024;

/// The bounds of [`Edge::durations`], in milliseconds.
pub const DURATION_BOUNDS_MS: [u64; 12] = crate::proxy::edges::durations::BOUNDS_MS;

/// Paths of the endpoints.
pub mod path {
    /// [`super::Status`].
    pub const STATUS: &str = "/v1/status";
    /// [`super::Node`]s.
    pub const NODES: &str = "/v1/nodes";
    /// [`super::Service`]s.
    pub const SERVICES: &str = "/v1/services";
    /// [`super::Edge`]s.
    pub const EDGES: &str = "/v1/edges";
    /// [`super::Identity`]s.
    pub const IDENTITY: &str = "/v1/identity";
    /// [`super::Resolve`], with `?address=ADDR:PORT`.
    pub const RESOLVE: &str = "/v1/resolve";
    /// [`super::Finding`]s.
    pub const CHECK: &str = "/v1/check";
    /// [`super::TokenInfo`]s, a [`super::NewToken`] posted, `/ID` deleted.
    pub const TOKENS: &str = "/v1/tokens";
    /// [`super::Authority`]s, a [`super::Appointment`] posted, `/NODE` deleted.
    pub const AUTHORITIES: &str = "/v1/authorities";
    /// An empty body posted; [`super::Rotation`].
    pub const ROTATION: &str = "/v1/rotation";
    /// A [`super::Banishment`] posted.
    pub const BANISH: &str = "/v1/banish";
    /// The roster as a document; [`super::RecoveryWords`] posted.
    pub const ROSTER: &str = "/v1/roster";
    /// An empty body posted; [`super::NewRoot`].
    pub const RECOVER: &str = "/v1/recover";
    /// [`super::MeshTime`]; a [`super::ClockWord`] posted.
    pub const CLOCK: &str = "/v1/clock";
    /// [`super::JoinRequest`] posted.
    pub const JOIN: &str = "/v1/join";
    /// A [`super::MergeRequest`] posted; [`super::Moving`].
    pub const MERGE: &str = "/v1/merge";
    /// A [`super::MoveRequest`] posted.
    pub const MOVE: &str = "/v1/move";
    /// [`super::Pending`] hosts.
    pub const PENDING: &str = "/v1/pending";
    /// [`super::ApproveRequest`] posted.
    pub const APPROVE: &str = "/v1/approve";
    /// [`super::Enrolment`], and a [`super::EnrolmentWish`] posted.
    pub const ENROLL: &str = "/v1/enroll";
    /// An empty body posted.
    pub const LEAVE: &str = "/v1/leave";
    /// An empty body posted; [`super::Upgraded`].
    pub const UPGRADE: &str = "/v1/upgrade";
    /// An empty body posted; [`super::KeyRotated`].
    pub const KEY: &str = "/v1/key";
    /// [`super::LogLevel`], to be read and to be put.
    pub const LOG_LEVEL: &str = "/v1/log-level";
}

/// Where a node is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Just started: it looks for a mesh, and founds one if there is none.
    New,
    /// It sees a mesh and has no token for it.
    Pending,
    /// It redeems a token.
    Joining,
    /// It is in the roster.
    Member,
    /// It left.
    Left,
    /// It was put out.
    Banished,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::New => "new",
            Self::Pending => "pending",
            Self::Joining => "joining",
            Self::Member => "member",
            Self::Left => "left",
            Self::Banished => "banished",
        })
    }
}

/// Where a node stands in the roster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// A member.
    Active,
    /// It left by itself and may come back.
    Left,
    /// It was put out and may not.
    Banished,
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Active => "active",
            Self::Left => "left",
            Self::Banished => "banished",
        })
    }
}

/// This node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Where it is in its life.
    pub state: State,
    /// Why it is not a member yet, or any more.
    pub reason: Option<String>,
    /// What to type on a member to let this host in (`meshd approve`): only while it waits, and only for root.
    #[serde(default)]
    pub code: Option<Secret>,
    /// Why the fleet token that this host has is of no use, if that is so.
    #[serde(default)]
    pub fleet_token: Option<String>,
    /// The mesh it is a member of, or sees.
    pub mesh: Option<MeshId>,
    /// Where that mesh moves, and why this host has not followed yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving: Option<String>,
    /// The trust domain of that mesh.
    pub trust_domain: Option<TrustDomain>,
    /// This node's id.
    pub node: Option<NodeId>,
    /// Its name in the mesh, or the one it will wish for.
    pub host_name: HostName,
    /// Version of the daemon.
    pub version: String,
    /// What it accepts in plaintext.
    pub mode: Mode,
    /// Whether connections are taken.
    pub capture: Capture,
    /// Which clock certificates are judged by.
    pub clock: Clock,
    /// Whether this node may admit others and sign.
    pub authority: bool,
    /// Counts of the members, this one included.
    pub members: Members,
    /// How long the daemon has been running, in seconds.
    pub uptime_seconds: u64,
    /// The process that answers.
    #[serde(default)]
    pub pid: u32,
    /// Processes of before an upgrade that still have connections.
    #[serde(default)]
    pub older: Vec<Older>,
}

/// A process of before an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Older {
    /// Its process id.
    pub pid: u32,
    /// Connections it still has.
    pub connections: u32,
}

/// What an upgrade came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgraded {
    /// Version of the daemon that serves now.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// The process of before, and the connections that stay with it until they end.
    pub older: Older,
}

/// What a new node key came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRotated {
    /// The id of the key of before.
    pub old: NodeId,
    /// The id of the key that this host has now.
    pub node: NodeId,
    /// The process that has it.
    pub upgraded: Upgraded,
}

/// Whether the kernel hands connections to the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capture {
    /// Whether it does.
    pub on: bool,
    /// Why it does not, or a remark.
    pub why: Option<String>,
}

/// The clock that certificates are judged by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// Where it comes from: `system`, `signed` or `floor`.
    pub source: String,
    /// Its time, in seconds since 1970.
    pub now: u64,
    /// Why this source.
    pub why: Option<String>,
}

/// Counts of members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// In the roster and active.
    pub active: u32,
    /// Of these, heard from.
    pub reachable: u32,
}

/// One host of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its id: a hash of its key.
    pub id: NodeId,
    /// Its name in the mesh.
    pub name: HostName,
    /// Whether it is the node that answers.
    pub own: bool,
    /// Where it stands in the roster.
    pub standing: Standing,
    /// Whether it may admit others and sign.
    pub authority: bool,
    /// Whether it is heard from.
    pub reachable: bool,
    /// The addresses it says it has.
    pub addresses: Vec<IpAddr>,
    /// The addresses to which connections from here are secured.
    pub captured: Vec<IpAddr>,
    /// The addresses somebody else claims too, or answers at.
    pub contested: Vec<IpAddr>,
    /// The zone it says it is in.
    pub zone: Option<String>,
    /// What it accepts in plaintext; none until its record is known.
    pub mode: Option<Mode>,
    /// Version of its daemon; none until its record is known.
    pub version: Option<String>,
    /// How many ports it listens on.
    pub listeners: u32,
    /// How long ago it was heard from, in seconds; none if not yet.
    pub last_seen_seconds: Option<u64>,
}

/// Something that listens on a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Name of the host it is on.
    pub host: HostName,
    /// That host's node id.
    pub node: NodeId,
    /// The addresses it listens on, as others reach them.
    pub addresses: Vec<IpAddr>,
    /// Its TCP port.
    pub port: u16,
    /// The identity expected there.
    pub id: SpiffeId,
}

/// Which end of a connection this node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Another host connected here.
    Inbound,
    /// A process here connected to another host.
    Outbound,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Inbound => "in",
            Self::Outbound => "out",
        })
    }
}

/// Who talked to whom, secured or why not. One line for any number of connections alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edge {
    /// Which end is here.
    pub direction: Direction,
    /// The identity of the client, if known.
    pub client: Option<SpiffeId>,
    /// The identity of the server, if known.
    pub server: Option<SpiffeId>,
    /// The other host's name, if it is a member.
    pub peer: Option<HostName>,
    /// The other host's address.
    pub address: IpAddr,
    /// The port of the service.
    pub port: u16,
    /// Whether the bytes went through mutual TLS.
    pub secured: bool,
    /// Why they did not, or what went wrong last.
    pub reason: Option<String>,
    /// Connections open now.
    pub open: u64,
    /// Connections ever, these included.
    pub total: u64,
    /// Connections that failed or were cut.
    pub failed: u64,
    /// Bytes that came from the other host.
    pub bytes_in: u64,
    /// Bytes that went to the other host.
    pub bytes_out: u64,
    /// How long ago there was a connection, in seconds.
    pub last_seen_seconds: u64,
    /// How many of the connections that ended lasted not longer than each of [`DURATION_BOUNDS_MS`] and longer than the one before; the last
    /// number is of those that lasted longer than all.
    #[serde(default)]
    pub durations: Vec<u64>,
}

/// An SVID this node holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Whose it is.
    pub workload: Workload,
    /// The same with the trust domain.
    pub id: SpiffeId,
    /// Serial number, hexadecimal.
    pub serial: Option<String>,
    /// Valid from, in seconds since 1970.
    pub not_before: u64,
    /// Valid until, in seconds since 1970.
    pub not_after: u64,
    /// How long it is still valid, in seconds; negative when it is over.
    pub expires_seconds: i64,
    /// In how many seconds it is renewed; negative when that is overdue.
    pub renewal_seconds: i64,
    /// Name of the authority that issued it.
    pub issued_by: Option<HostName>,
}

/// What would happen to a connection to an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolve {
    /// The address asked about.
    pub address: IpAddr,
    /// The port asked about.
    pub port: u16,
    /// The member that has the address.
    pub node: Option<NodeId>,
    /// That member's name.
    pub host: Option<HostName>,
    /// The identity expected there.
    pub id: Option<SpiffeId>,
    /// Whether a connection from here would be secured.
    pub secured: bool,
    /// Why, or why not.
    pub why: String,
}

/// How a finding is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, and deserves a look.
    Warn,
    /// Does not work.
    Fail,
}

/// One line of `meshd check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is about: findings of one group are printed together, in the order given.
    pub group: String,
    /// What was looked at, as a statement that is true when all is well.
    pub name: String,
    /// How it is.
    pub level: Level,
    /// What was seen.
    pub detail: Option<String>,
    /// What to do.
    pub hint: Option<String>,
    /// One of [`code::ALL`]: a heading of `docs/checks.md`.
    pub code: String,
}

/// Whether hosts are let in with the fleet token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// Whether they are.
    pub open: bool,
    /// For how many seconds still, while the mesh is up.
    pub left_seconds: u64,
    /// How many other authorities could not be told of a change, and go on as before until they are heard again.
    pub unreached: u32,
}

/// A wish to let hosts in with the fleet token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolmentWish {
    /// For how many seconds from now on; 0 to let nobody in.
    pub seconds: u64,
}

/// A join token as its authority remembers it: without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenInfo {
    /// What `token revoke` takes.
    pub id: String,
    /// How many hosts may still join with it.
    pub uses_left: u32,
    /// In how many seconds it ends; of one that has invited hosts, until when they may come.
    pub expires_seconds: u64,
    /// Whom it has invited, if it is for a whole mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<Invited>,
}

/// The hosts of another mesh that are to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invited {
    /// Their mesh; none while the token was not used.
    pub mesh: Option<MeshId>,
    /// How many were invited; before that, how many at most.
    pub hosts: u32,
    /// How many of them are members now.
    pub arrived: u32,
}

/// A wish for a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewToken {
    /// How long it is good for, in seconds.
    pub lifetime_seconds: u64,
    /// How many hosts may join with it.
    pub uses: u32,
    /// Where the authority can be found by hosts that multicast does not reach; empty: the daemon names its own addresses.
    #[serde(default)]
    pub hints: Vec<SocketAddr>,
    /// Whether it is for a whole mesh, of as many hosts at most.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub merge: bool,
}

/// A new join token. Does not print its secret by accident: `Debug` hides it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreatedToken {
    /// What `token revoke` takes.
    pub id: String,
    /// The token itself.
    pub token: Secret,
    /// How many hosts may join with it.
    pub uses: u32,
    /// In how many seconds it ends.
    pub expires_seconds: u64,
}

impl fmt::Debug for CreatedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CreatedToken").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A token in text. `Debug` hides it, and it is wiped when dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// The text itself, for whoever has to send or print it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}
impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}
impl From<Secret> for String {
    fn from(secret: Secret) -> Self {
        secret.0.to_string()
    }
}
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How far an authority is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthorityState {
    /// It admits hosts and signs certificates.
    Signing,
    /// It admits hosts; it signs as soon as every member that was heard lately believes its root.
    Preparing,
    /// It does neither any more, and certificates it signed are still in use.
    Retiring,
}

/// An authority of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// Its node id.
    pub id: NodeId,
    /// Its name.
    pub name: HostName,
    /// Whether it is the node that answers.
    pub own: bool,
    /// Whether it founded the mesh.
    pub founder: bool,
    /// How far it is.
    pub state: AuthorityState,
    /// Whether it is heard from.
    pub reachable: bool,
    /// Its root certificates.
    pub roots: Vec<RootCertificate>,
    /// The members that do not say that they believe all of them, or that still show a certificate under one that drains.
    pub waiting_for: Vec<HostName>,
}

/// How far a root is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootPhase {
    /// It signs as soon as every member that was heard lately believes it.
    Preparing,
    /// It signs.
    Active,
    /// It signs no more; it goes when nobody shows a certificate under it.
    Draining,
}

/// The new root of an authority that rotates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// Its name.
    pub root: RootId,
}

/// A root certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootCertificate {
    /// Its name: 16 hexadecimal digits of its SHA-256.
    pub id: RootId,
    /// How far it is.
    pub phase: RootPhase,
    /// Its last second, in seconds since 1970.
    pub not_after: u64,
    /// How many members say that they believe it.
    pub believed_by: u32,
    /// How many members have certificates that it signed.
    pub shown_by: u32,
}

/// A wish to make a member an authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appointment {
    /// Its name or id.
    pub node: String,
}

/// A wish to put a member out for ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Banishment {
    /// Its name or id.
    pub node: String,
}

/// What the recovery key of the mesh signed, for everybody. The key itself stays with the command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryWords {
    /// The entries, in the order in which the others are to hear them.
    pub entries: Vec<Entry>,
}

/// What a host knows of the time of its mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshTime {
    /// Mesh time, in seconds since 1970.
    pub now: u64,
    /// Nothing was signed in the mesh at a later time than this, as far as is known there.
    pub beyond: u64,
    /// The last word of the recovery key about the clock.
    pub era: Era,
}

/// The recovery key's word that sets the clock of the mesh back. The key itself stays with the command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockWord {
    /// As it is handed on (`meshd_ca::clock::reset`).
    pub reset: Signed,
}

/// The root that a host would have as an authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewRoot {
    /// The host.
    pub node: NodeId,
    /// The root certificate (DER).
    #[serde(with = "base64url")]
    pub root: Vec<u8>,
}

/// A wish to join the mesh a token is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The token.
    pub token: Secret,
}

/// How a join ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The mesh.
    pub mesh: MeshId,
    /// This host's name there.
    pub name: HostName,
    /// Whether it was a member already, so that nothing was done.
    pub already: bool,
}

/// A step of moving this mesh into another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeRequest {
    /// The token of the other mesh; none to stay after all.
    pub token: Option<Secret>,
    /// What to do.
    pub step: MergeStep,
}

/// What is wanted of a merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MergeStep {
    /// To know what it would be. Nothing is changed on either side.
    Look,
    /// All hosts of this mesh move.
    Move,
    /// Those that have not moved yet do not.
    Stay,
}

/// One of the two meshes of a merge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshSide {
    /// Its id. Meshes of one fleet have the same.
    pub mesh: MeshId,
    /// Its founder.
    pub founder: NodeId,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// How many members it has.
    pub members: u32,
}

/// A host that will have another name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renamed {
    /// The one it has.
    pub name: String,
    /// The one it gets.
    pub becomes: HostName,
}

/// Bytes that the recovery key is to sign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsigned(#[serde(with = "base64url")] pub Vec<u8>);

/// What a merge is, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// The mesh that moves.
    pub from: MeshSide,
    /// The one that stays.
    pub to: Option<MeshSide>,
    /// How many hosts are invited there that are no members of it yet.
    pub invited: u32,
    /// The hosts that are banished there, and stay outside.
    pub banished: Vec<String>,
    /// The hosts that get another name.
    pub renamed: Vec<Renamed>,
    /// For how many seconds they are invited.
    pub ends_seconds: u64,
    /// What is left to be signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsigned: Option<Unsigned>,
}

/// The word of the recovery key that this mesh moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveRequest {
    /// The word.
    pub word: Word,
}

/// The code of a host that waits, typed by a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApproveRequest {
    /// The code.
    pub code: Secret,
}

/// Whom a code has let in so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approved {
    /// The node, once it has come.
    pub node: Option<NodeId>,
    /// Its name in the mesh, once that is known here.
    pub name: Option<HostName>,
}

/// A host that asks to be let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The name it wishes for.
    pub name: HostName,
    /// Its node id.
    pub node: NodeId,
    /// Where it asked from.
    pub address: IpAddr,
    /// For how many seconds it has been asking.
    pub waiting_seconds: u64,
}

/// How much the daemon logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLevel {
    /// The level.
    pub level: crate::config::LogLevel,
}

/// Done, and nothing to add.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// Why a request was refused, in words for the person who made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What did not happen.
    pub what: String,
    /// Why.
    pub why: Option<String>,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}
impl std::error::Error for ErrorBody {}
