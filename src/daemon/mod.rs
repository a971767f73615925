//! The daemon: wiring and the order of life.
//!
//! Owns the process from the first look at the state directory to the last byte of the last connection. A node is in one `Phase` at a
//! time; what changes the phase goes through one loop in [`run`], so no two changes ever race. Everything a phase started ends with it.

pub(crate) mod acquire;
mod addresses;
pub(crate) mod approve;
pub(crate) mod authorities;
mod before;
mod directory;
mod doors;
pub(crate) mod enrolment;
mod keeper;
mod kernel;
mod knock;
pub(crate) mod lan;
mod listeners;
mod member;
pub(crate) mod memory;
pub(crate) mod merge;
#[cfg(test)]
mod power;
pub(crate) mod rekey;
mod reload;
mod responder;
mod retired;
pub(crate) mod rules;
pub(crate) mod set_back;
mod successor;
mod tell;
mod timekeeper;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hyper::StatusCode;
use meshd_ca::approval::ApprovalCode;
use meshd_ca::identity::NodeId;
use meshd_ca::join::Wish;
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::Standing;
use meshd_ca::store::{Store, StoreError};
use meshd_ca::token::JoinToken;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::admin::http;
use crate::admin::local::{self, No, Socket};
use crate::api::{Done, JoinRequest, Joined, Upgraded};
use crate::clock::{self, Clock};
use crate::config::Config;
use crate::logging::Log;
use crate::membership::{self, Membership};
use crate::proxy::access::AccessLog;
use crate::systemd::{Manager, Pulse};
use crate::task;
use before::Before;
use successor::{Handover, Program};

pub(crate) use authorities::AHEAD;
pub use before::Predecessor;
pub(crate) use keeper::SEQUENCE;
pub(crate) use member::Member;
pub use reload::Reader;

/// The file that says why there is no roster: this host left, or was banished. Without it, no roster means a new host.
pub(crate) const GONE: &str = "gone";
/// How [`GONE`] begins.
const LEFT: &str = "left";
const BANISHED: &str = "banished";
const REPLACED: &str = "replaced";

/// What became of a host whose place another key has.
const TAKEN: &str = "the node key of this host was replaced by one that is not here: is this an old backup or a copy of a card? If it is neither, somebody \
                     else had the key: banish this host by its name. To join anew, empty the state directory";
/// How long the last lines of the access log may take.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Where this node is in its life.
#[derive(Clone)]
pub(crate) enum Phase {
    /// Looking for a mesh.
    New,
    /// Sees one, has no token; and why.
    Pending(String),
    /// Redeems a token.
    Joining,
    /// In the roster.
    Member(Arc<Member>),
    /// Left by its own wish.
    Left,
    /// Put out.
    Banished,
}

/// What the local API asks the loop to do.
enum Request {
    Join(JoinToken, oneshot::Sender<Result<Joined, No>>),
    Leave(oneshot::Sender<Result<Done, No>>),
    Upgrade(successor::Reply),
}

/// What every part of the daemon may know.
pub(crate) struct Daemon {
    config: watch::Sender<Arc<Config>>,
    manager: Manager,
    pulse: Arc<Pulse>,
    clock: Clock,
    key: Arc<PrivateKey>,
    /// What a person types on a member to let this host in.
    code: ApprovalCode,
    store: Arc<Store>,
    started: Instant,
    phase: watch::Sender<Phase>,
    requests: mpsc::Sender<Request>,
    lan: lan::Lan,
    log: Log,
    access: AccessLog,
    admin: http::Trouble,
    doors: doors::Doors,
    before: before::Before,
    program: successor::Program,
    /// How many files may be open at once.
    files: u64,
}

impl Daemon {
    /// The configuration as it is now: a reload changes some of it.
    pub(crate) fn config(&self) -> Arc<Config> {
        self.config.borrow().clone()
    }
    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }
    /// This node's id, which it has before it is in any mesh.
    pub(crate) fn node(&self) -> NodeId {
        self.key.public().node_id()
    }
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }
    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
    pub(crate) fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }
    /// The log, to be looked at and made to say more or less.
    pub(crate) fn log(&self) -> &Log {
        &self.log
    }
    /// Where connections that have ended are written down.
    pub(crate) fn access(&self) -> &AccessLog {
        &self.access
    }
    /// What keeps the admin port from being open.
    pub(crate) fn admin_trouble(&self) -> &http::Trouble {
        &self.admin
    }
    /// The listening sockets.
    pub(crate) fn doors(&self) -> &doors::Doors {
        &self.doors
    }
    /// The processes of before an upgrade.
    pub(crate) fn before(&self) -> &before::Before {
        &self.before
    }
    /// The interfaces and the neighbours seen on them.
    pub(crate) fn lan(&self) -> &lan::Lan {
        &self.lan
    }

    /// The running member, or a refusal that says what this node is instead.
    pub(crate) fn member(&self) -> Result<Arc<Member>, No> {
        let (why, remedy) = match self.phase() {
            Phase::Member(member) => return Ok(member),
            Phase::New => ("it is still looking for one".into(), "try again in a moment"),
            Phase::Pending(why) => (
                why,
                "`sudo meshd status` shows a code: `meshd approve CODE` on a member lets this host in; or `meshd join TOKEN` here",
            ),
            Phase::Joining => ("it is joining one".into(), "try again in a moment"),
            Phase::Left => ("it left".into(), "`meshd join TOKEN` brings it into a mesh"),
            Phase::Banished => (
                "it was banished, or its node key was replaced".into(),
                "such a key stays out; empty the state directory to start anew",
            ),
        };
        Err(No::new(StatusCode::CONFLICT, "this host is not a member of a mesh", why, remedy))
    }

    /// `POST /v1/join`.
    pub(crate) async fn join(&self, request: JoinRequest) -> Result<Joined, No> {
        let token: JoinToken = request.token.expose().trim().parse().map_err(|e| {
            No::new(StatusCode::BAD_REQUEST, "cannot join", e, "copy the whole word that `meshd token create` printed")
        })?;
        self.ask(|reply| Request::Join(token, reply)).await
    }

    /// `POST /v1/leave`.
    pub(crate) async fn leave(&self) -> Result<Done, No> {
        self.member()?;
        self.ask(Request::Leave).await
    }

    /// `POST /v1/upgrade`, and SIGUSR2.
    pub(crate) async fn upgrade(&self) -> Result<Upgraded, No> {
        self.ask(Request::Upgrade).await
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<Result<T, No>>) -> Request) -> Result<T, No> {
        let (reply, answer) = oneshot::channel();
        let stopping = || No::new(StatusCode::SERVICE_UNAVAILABLE, "meshd is stopping", "", "start it again first");
        self.requests.send(request(reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// The code of this host, while it can let this host in somewhere: it waits, or is alone and sees a mesh of others.
    pub(crate) fn code(&self) -> Option<&ApprovalCode> {
        let asks = match self.phase() {
            Phase::Pending(_) => true,
            Phase::Member(member) => member.is_alone() && !acquire::others(&self.lan, &member).is_empty(),
            _ => false,
        };
        asks.then_some(&self.code)
    }

    fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    fn save_floor(&self) {
        if let Err(error) = self.store.save(clock::FILE, &self.clock.to_bytes()) {
            tracing::warn!(%error, "the clock floor could not be saved");
        }
    }
}

/// A place in a mesh, and the addresses at which another member was found on the way to it.
type Place = (Membership, Vec<SocketAddr>);

/// How the phase of a member ended.
enum End {
    /// Somebody told the process to stop.
    Stop(Halt),
    /// It joined another mesh.
    Joined(Box<Place>),
    /// Its mesh moved into another one: that goes on, beside the connections that are open.
    Moved(Box<Place>),
    /// It left, and has answered whoever asked.
    Left,
    /// Others put it out.
    Banished,
    /// Another key than any of this host has its place.
    Replaced,
    /// Another process takes over.
    Upgrade(Box<Handover>),
}

/// What the process was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Halt {
    /// To stop: the host goes on without meshd.
    Stop,
    /// To make room for the next process: nothing may get through unsecured meanwhile.
    Restart,
}

/// Signals that end the daemon.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
    /// systemd's `RestartKillSignal`.
    restart: Signal,
}

impl Stop {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            restart: signal(SignalKind::user_defined1())?,
        })
    }

    async fn asked(&mut self) -> Halt {
        tokio::select! {
            _ = self.terminate.recv() => Halt::Stop,
            _ = self.interrupt.recv() => Halt::Stop,
            _ = self.restart.recv() => Halt::Restart,
        }
    }
}

/// Runs the daemon until it is told to stop, or another process has taken over and the last connection has ended. `log` is where it already
/// says what happens; `read` is asked for the configuration on SIGHUP; `predecessor` is the daemon whose place this one takes.
///
/// # Errors
/// When it cannot start: the state directory is not usable or used by another daemon, a port is taken, the kernel lacks something.
/// Once it runs, nothing but a signal ends it.
pub async fn run(config: Config, log: Log, read: Reader, predecessor: Option<&Predecessor>) -> anyhow::Result<()> {
    let program = Program::of_process();
    let manager = Manager::of_process(predecessor.is_some());
    // Before there is a key in memory.
    if let Err(error) = crate::intercept::process::forbid_dumps() {
        tracing::warn!(%error, "core dumps could not be forbidden: one would hold the keys of this node");
    }
    let mut stop = Stop::listen()?;
    let before = Before::default();
    let mut inherited = BTreeMap::new();
    let (store, key, clock) = match predecessor {
        None => open(Store::open(&config.state_dir), &config)?,
        Some(predecessor) => {
            let mut legacy = predecessor.meet(&config).await?;
            let opened = open(Store::go_on(&config.state_dir, legacy.take_lock()?), &config)?;
            inherited = before.inherit(legacy, &manager);
            opened
        }
    };
    let files = crate::intercept::process::raise_file_limit().unwrap_or_else(|error| {
        tracing::warn!(%error, "the limit of open files could not be raised");
        u64::MAX
    });
    let socket = match inherited.remove(before::API) {
        Some(fd) => Socket::inherit(&config.run_dir, fd),
        None => Socket::bind(&config.run_dir),
    };
    let socket = Arc::new(socket.with_context(|| {
        format!("cannot make the socket in {}; set run_dir to a directory that can be written", config.run_dir.display())
    })?);
    let access = log.access(config.access_log).context("cannot start the access log")?;
    let (requests, mut inbox) = mpsc::channel(16);
    let lan = lan::Lan::start(&config, key.public().node_id());
    let daemon = Arc::new(Daemon {
        config: watch::Sender::new(Arc::new(config)),
        manager,
        pulse: Arc::new(Pulse::new()),
        clock,
        key,
        code: ApprovalCode::generate().context("cannot make the code of this host")?,
        store,
        started: Instant::now(),
        phase: watch::Sender::new(Phase::New),
        requests,
        lan,
        log,
        access,
        admin: http::Trouble::default(),
        doors: doors::Doors::default(),
        before,
        program,
        files,
    });
    daemon.doors.inherit(inherited);
    let mut answering = Answering::start(&socket, &daemon);
    let beside = [
        task::spawn(reload::serve(daemon.clone(), read)?),
        task::spawn(successor::serve(daemon.clone())?),
        task::spawn(tell::tell(daemon.clone())),
        task::spawn(daemon.manager.clone().watchdog(daemon.pulse.clone())),
    ];
    let mut next = resume(&daemon.key, &daemon.store, &daemon.clock)?.map(|m| (m, Vec::new()));
    loop {
        let (membership, first) = match next.take() {
            Some(place) => place,
            None => match daemon.pulse.during(acquire::acquire(&daemon, &mut inbox, &mut stop)).await? {
                Some(place) => place,
                None => break,
            },
        };
        match member::run(&daemon, Arc::new(membership), first, &mut inbox, &mut stop).await? {
            End::Stop(_) => break,
            End::Joined(place) | End::Moved(place) => next = Some(*place),
            End::Left => gone(&daemon.store, daemon.node(), LEFT)?,
            End::Banished => gone(&daemon.store, daemon.node(), BANISHED)?,
            End::Replaced => {
                tracing::error!("{TAKEN}");
                gone(&daemon.store, daemon.node(), REPLACED)?;
            }
            End::Upgrade(handover) => {
                drop(answering);
                match daemon.pulse.during(successor::hand_over(&daemon, &socket, *handover, &mut stop)).await {
                    Ok((kept, line)) => {
                        beside.iter().for_each(tokio::task::JoinHandle::abort);
                        daemon.lan.end();
                        retired::stay(kept, line, &mut stop, &daemon.store, &daemon.config()).await;
                        last_lines(&daemon).await;
                        tracing::info!("the last connection of before the upgrade has ended");
                        return Ok(());
                    }
                    Err(back) => back.settle(&daemon),
                }
                answering = Answering::start(&socket, &daemon);
                next = resume(&daemon.key, &daemon.store, &daemon.clock)?.map(|m| (m, Vec::new()));
            }
        }
    }
    daemon.save_floor();
    drop(answering);
    last_lines(&daemon).await;
    beside.iter().for_each(tokio::task::JoinHandle::abort);
    daemon.manager.flush();
    tracing::info!("stopped");
    Ok(())
}

async fn last_lines(daemon: &Daemon) {
    let access = daemon.access.clone();
    let _ = task::blocking(move || access.flush(LAST_LINES)).await;
}

/// The tasks that answer on this host, as long as this lives. Requests that came are answered all the same.
struct Answering([tokio::task::JoinHandle<()>; 2]);

impl Answering {
    fn start(socket: &Arc<Socket>, daemon: &Arc<Daemon>) -> Self {
        Self([task::spawn(local::serve(socket.clone(), daemon.clone())), task::spawn(http::serve(daemon.clone()))])
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// Forgets the mesh, but not that there was one: a host that is new may found a mesh of its own. Nor the version of its last word in it.
fn gone(store: &Store, me: NodeId, why: &str) -> anyhow::Result<()> {
    let last = Membership::standing(store, me).ok().flatten().map_or(0, |(_, version)| version);
    store.save(GONE, format!("{why} {last}").as_bytes())?;
    Membership::forget(store)?;
    Ok(())
}

/// Why this host is in no mesh any more, if it was in one, and the version of the last word about it there.
fn past(store: &Store) -> Result<Option<(String, u64)>, StoreError> {
    let Some(saved) = store.load(GONE)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&saved.bytes);
    let (why, last) = text.split_once(' ').unwrap_or((&text, ""));
    Ok(Some((why.to_owned(), last.parse().unwrap_or(0))))
}

/// What this host says of itself when it joins.
fn wish(config: &Config, store: &Store) -> Wish {
    Wish { name: config.host_name.clone(), past: past(store).ok().flatten().map_or(0, |(_, last)| last) }
}

/// The membership of before, if this node is still a member. If it left or was put out and the plug was pulled before that was noted,
/// it is noted now.
fn resume(key: &Arc<PrivateKey>, store: &Arc<Store>, clock: &Clock) -> anyhow::Result<Option<Membership>> {
    let membership = Membership::load(key.clone(), store.clone(), clock.clone())?;
    if membership.is_none() {
        match Membership::standing(store, key.public().node_id())? {
            Some((Standing::Banished, _)) => gone(store, key.public().node_id(), BANISHED)?,
            // After an attempt to hand over to the process that has the new one.
            Some((Standing::Replaced, _)) if store.load(membership::NEXT_KEY)?.is_some() => {
                anyhow::bail!(
                    "this host has a new node key, and the process that should have gone on with it did not start: start meshd again"
                )
            }
            Some((Standing::Replaced, _)) => {
                tracing::error!("{TAKEN}");
                gone(store, key.public().node_id(), REPLACED)?;
            }
            Some(_) => gone(store, key.public().node_id(), LEFT)?,
            None => {}
        }
    }
    Ok(membership)
}

/// Takes the place that a join has granted. What it was granted with is on disk when this returns.
fn settle(
    key: &Arc<PrivateKey>,
    store: &Arc<Store>,
    clock: &Clock,
    joined: meshd_ca::join::Joined,
) -> anyhow::Result<(Membership, Joined)> {
    // Its roots first: the floor stays below their end, here as on the authority.
    clock.within(&joined.roster.bundle());
    clock.raise(joined.time);
    store.save(clock::FILE, &clock.to_bytes())?;
    let answer = Joined { mesh: joined.roster.mesh(), name: joined.name, already: false };
    let membership = Membership::adopt(key.clone(), store.clone(), clock.clone(), joined.roster, joined.fleet)?;
    store.remove(GONE)?;
    Ok((membership, answer))
}

fn open(store: Result<Store, StoreError>, config: &Config) -> anyhow::Result<(Arc<Store>, Arc<PrivateKey>, Clock)> {
    let store = store.with_context(|| format!("cannot use the state directory {}", config.state_dir.display()))?;
    let key = membership::take_node_key(&store).context("cannot read or make the node key")?;
    let clock = Clock::load(&store)?;
    Ok((Arc::new(store), Arc::new(key), clock))
}

/// Joins without a running daemon: the next `meshd run` starts as a member.
///
/// # Errors
/// When another process uses the state directory, or the join fails; says which and what to do.
pub async fn join_offline(config: &Config, token: &str) -> anyhow::Result<Joined> {
    let (store, key, clock) = open(Store::open(&config.state_dir), config)?;
    let token: JoinToken =
        token.trim().parse().context("cannot read the token: copy the whole word that `meshd token create` printed")?;
    let current = resume(&key, &store, &clock)?;
    if let Some(joined) = acquire::already(current.as_ref(), &token)? {
        return Ok(joined);
    }
    let lan = lan::Lan::start(config, key.public().node_id());
    let (joined, _) = acquire::redeem(config, &lan, &key, &wish(config, &store), &token).await?;
    Ok(settle(&key, &store, &clock, joined)?.1)
}

/// Removes whatever a daemon that is gone left in the kernel; says what was removed, one line each.
///
/// # Errors
/// What could not be removed.
pub async fn cleanup(_config: &Config) -> anyhow::Result<Vec<String>> {
    let removed = crate::intercept::nft::cleanup().context("cannot remove the capture rules; the command needs root")?;
    Ok(if removed { vec!["capture table, policy rule and route".into()] } else { Vec::new() })
}
