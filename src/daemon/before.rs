//! What was before this process: the daemon whose place it takes, and older ones that still have connections.
//!
//! Owns the lines to them. They obey: whom the mesh puts out is put out there too, and a stop is one for all. What an upgrade left behind in
//! this very process because the next one failed late is treated in the same way.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use meshd_ca::identity::NodeId;
use meshd_ca::roster::{Member, Roster, Standing};
use meshd_ca::store::Store;
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::rules::KEPT;
use crate::api;
use crate::clock::Clock;
use crate::config::Config;
use crate::membership::{self, Membership};
use crate::proxy::Proxy;
use crate::proxy::live::Cut;
use crate::succession::{Line, MAX_NODES, Word};
use crate::systemd::Manager;
use crate::task;

/// How long the process before this may take to hand over after this one said that it is ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long an older process may be deaf.
const DEAF: Duration = Duration::from_secs(10);
/// Older processes at once: each costs the memory of a daemon.
pub(super) const MAX_OLDER: usize = 16;
/// Names on the line of the lock of the state directory and of the local API's socket; and what stands before the process id of an older one.
pub(super) const LOCK: &str = "lock";
pub(super) const API: &str = "api";
const OLDER: &str = "older ";
/// The same of a file in memory with the proven addresses: whoever captures them must know at once whom to expect there.
const BOUND: &str = "bound";

/// Who is bound to an address, and its mesh port.
pub(super) type Bound = BTreeMap<IpAddr, (NodeId, u16)>;

/// Proven addresses, to be handed over.
///
/// # Errors
/// The system has no memory for it.
pub(super) fn bound(bound: &Bound) -> std::io::Result<(String, OwnedFd)> {
    let mut file = File::from(memfd_create(BOUND, MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(bound)?)?;
    Ok((BOUND.to_owned(), file.into()))
}

fn read_bound(fd: OwnedFd) -> std::io::Result<Bound> {
    let mut file = File::from(fd);
    file.rewind()?;
    Ok(serde_json::from_reader(std::io::BufReader::new(file))?)
}

/// The daemon whose place this process takes.
pub struct Predecessor(Arc<Line>);

impl Predecessor {
    /// It is at the other end of this descriptor, which was inherited.
    ///
    /// # Errors
    /// There is none.
    pub fn at(fd: OwnedFd) -> std::io::Result<Self> {
        Ok(Self(Arc::new(Line::of(fd)?)))
    }

    /// Says that this process cannot take over, and why.
    pub async fn refuse(&self, why: String) {
        let _ = self.0.say(&Word::Failed { why }, &[]).await;
    }

    /// Looks whether this program can go on with what is there, says so, and returns when everything is its own.
    ///
    /// # Errors
    /// It cannot, or is not needed any more.
    pub(super) async fn meet(&self, config: &Config) -> anyhow::Result<Legacy> {
        look(config)?;
        let word = Word::Ready { version: env!("CARGO_PKG_VERSION").into() };
        self.0.say(&word, &[]).await.context("the daemon that started this one is gone")?;
        let heard = timeout(PATIENCE, self.0.hear()).await.context("the daemon that started this one did not hand over")?;
        let Some((Word::TakeOver { names, pid }, fds)) = heard else {
            bail!("the daemon that started this one goes on by itself");
        };
        Ok(Legacy { pid, line: self.0.clone(), descriptors: names.into_iter().zip(fds).collect() })
    }
}

/// Reads all that must be there, as a start does, and changes nothing.
fn look(config: &Config) -> anyhow::Result<()> {
    let store = Arc::new(Store::look_at(&config.state_dir));
    let key = Arc::new(membership::node_key(&store).context("cannot read the node key")?);
    let clock = Clock::load(&store)?;
    Membership::load(key, store, clock)?.context("this host is not a member")?;
    Ok(())
}

/// What the process before this one has left it.
pub(super) struct Legacy {
    pid: u32,
    line: Arc<Line>,
    descriptors: BTreeMap<String, OwnedFd>,
}

impl Legacy {
    /// The lock of the state directory.
    ///
    /// # Errors
    /// It was not handed over.
    pub(super) fn take_lock(&mut self) -> anyhow::Result<File> {
        Ok(self.descriptors.remove(LOCK).context("the state directory was not handed over")?.into())
    }
}

/// Connections that are left to end, and nothing comes after them.
pub(crate) struct Kept {
    pub(super) proxy: Arc<Proxy>,
    /// Whether nobody is on the way in any more: what was accepted has its handshake before it is a connection.
    pub(super) quiet: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Kept {
    pub(super) fn is_over(&self) -> bool {
        (self.quiet)() && self.proxy.live.is_empty()
    }
}

/// Everything that was before.
#[derive(Clone, Default)]
pub(crate) struct Before(Arc<State>);

#[derive(Default)]
struct State {
    processes: Mutex<Vec<Process>>,
    kept: Mutex<Vec<Kept>>,
    /// The newest of the processes, until it was told that this one serves.
    waits: Mutex<Option<Arc<Line>>>,
    gone: Notify,
    bound: Mutex<Bound>,
}

struct Process {
    pid: u32,
    line: Arc<Line>,
    open: Arc<AtomicU32>,
    listening: JoinHandle<()>,
}

impl Before {
    /// Whether there is no room for another older process.
    pub(super) fn is_full(&self) -> bool {
        self.processes().len() >= MAX_OLDER
    }

    /// What was left to this process besides its lock: returns what is not for the part of the daemon that is here.
    pub(super) fn inherit(&self, legacy: Legacy, manager: &Manager) -> BTreeMap<String, OwnedFd> {
        *self.0.waits.lock().unwrap_or_else(PoisonError::into_inner) = Some(legacy.line.clone());
        self.add(legacy.pid, legacy.line, Some(manager.clone()));
        self.take(legacy.descriptors, manager)
    }

    /// The same for what nobody wanted, or without what is not there.
    pub(super) fn take(&self, mut descriptors: BTreeMap<String, OwnedFd>, manager: &Manager) -> BTreeMap<String, OwnedFd> {
        if let Some(rules) = descriptors.remove(KEPT) {
            manager.put(KEPT, rules);
        }
        if let Some(Err(error)) = descriptors.remove(BOUND).map(|fd| read_bound(fd).map(|bound| *self.bound() = bound)) {
            tracing::warn!(%error, "the proven addresses were not handed over: each waits for a new proof");
        }
        let older: Vec<String> = descriptors.keys().filter(|name| name.starts_with(OLDER)).cloned().collect();
        for name in older {
            let (Some(fd), Ok(pid)) = (descriptors.remove(&name), name[OLDER.len()..].parse()) else { continue };
            match Line::of(fd) {
                Ok(line) => self.add(pid, Arc::new(line), None),
                Err(error) => tracing::warn!(%error, pid, "an older process cannot be reached"),
            }
        }
        descriptors
    }

    /// Listens to an older process until it ends. The one before this says to `manager` from when on this one is the service.
    fn add(&self, pid: u32, line: Arc<Line>, manager: Option<Manager>) {
        let open = Arc::<AtomicU32>::default();
        let (before, told, ear) = (self.clone(), open.clone(), line.clone());
        let listening = task::spawn(async move {
            while let Some((word, _)) = ear.hear().await {
                match (word, &manager) {
                    (Word::Open { connections }, _) => told.store(connections, Ordering::Relaxed),
                    (Word::Lead, Some(manager)) => manager.lead(),
                    _ => {}
                }
            }
            if let Some(manager) = manager {
                manager.lead();
            }
            tracing::info!(pid, "an older process has ended");
            before.processes().retain(|p| p.pid != pid);
            before.0.gone.notify_waiters();
        });
        self.processes().push(Process { pid, line, open, listening });
    }

    /// Tells the process before this one that this one serves. Once.
    pub(super) async fn serves(&self) {
        let line = self.0.waits.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(line) = line {
            let _ = line.say(&Word::Serving, &[]).await;
        }
    }

    /// Keeps connections of this process that are left to end.
    pub(super) fn keep(&self, kept: Kept) {
        self.kept().push(kept);
    }

    /// The lines to the older processes, for the next one, and what is kept here. Nobody listens here any more.
    ///
    /// # Errors
    /// Too many open files; nothing has changed then.
    pub(super) fn duplicate(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        self.processes().iter().map(|p| Ok((format!("{OLDER}{}", p.pid), p.line.duplicate()?))).collect()
    }

    /// Listens to nobody any more: another process does.
    pub(super) fn let_go(&self) {
        self.processes().drain(..).for_each(|p| p.listening.abort());
    }

    /// What is kept here, and is no more.
    pub(super) fn kept_here(&self) -> Vec<Kept> {
        std::mem::take(&mut *self.kept())
    }

    /// Ends the connections with those who are no members.
    pub(crate) fn cut(&self, roster: &Roster) {
        self.kept().retain(|kept| !kept.is_over());
        for kept in &*self.kept() {
            cut(&kept.proxy, inactive(roster));
        }
        let nodes: Vec<(NodeId, bool)> = inactive(roster).map(|(node, why)| (node, why == Cut::Banished)).collect();
        for line in self.processes().iter().map(|p| p.line.clone()).filter(|_| !nodes.is_empty()) {
            let nodes = nodes.clone();
            task::spawn(async move {
                for some in nodes.chunks(MAX_NODES) {
                    let word = Word::Gone { nodes: some.to_vec() };
                    match timeout(DEAF, line.say(&word, &[])).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return,
                        Err(_) => {
                            return tracing::error!("an older process does not listen: banished hosts stay connected to it");
                        }
                    }
                }
            });
        }
    }

    /// Lets all connections end, for `patience` at most, and returns when the older processes have ended.
    pub(crate) async fn stop(&self, patience: Duration) {
        let lines: Vec<_> = self.processes().iter().map(|p| p.line.clone()).collect();
        for line in lines {
            let _ = timeout(DEAF, line.say(&Word::Stop, &[])).await;
        }
        let kept = self.kept_here();
        let here = async {
            for kept in &kept {
                kept.proxy.drain(patience).await;
            }
        };
        let others = async {
            loop {
                let change = self.0.gone.notified();
                if self.processes().is_empty() {
                    return;
                }
                change.await;
            }
        };
        // Theirs is the same patience, and a moment to end.
        let _ = timeout(patience + Duration::from_secs(2), async { tokio::join!(here, others) }).await;
    }

    /// For `status`.
    pub(crate) fn view(&self) -> Vec<api::Older> {
        let mut older: Vec<api::Older> =
            self.processes().iter().map(|p| api::Older { pid: p.pid, connections: p.open.load(Ordering::Relaxed) }).collect();
        let here: usize = self.kept().iter().map(|kept| kept.proxy.live.count()).sum();
        if here > 0 {
            older.push(api::Older { pid: std::process::id(), connections: u32::try_from(here).unwrap_or(u32::MAX) });
        }
        older
    }

    /// Who was bound where when this process took over.
    pub(super) fn bound(&self) -> MutexGuard<'_, Bound> {
        self.0.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn processes(&self) -> MutexGuard<'_, Vec<Process>> {
        self.0.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn kept(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those of a roster that are no members any more, and why not.
pub(super) fn inactive(roster: &Roster) -> impl Iterator<Item = (NodeId, Cut)> {
    // A host that got another key has done nothing wrong.
    let gone = roster.members().map(Member::node).filter(|node| !roster.is_host_active(*node));
    let banished = |node| roster.member(roster.current(node)).is_some_and(|m| m.standing == Standing::Banished);
    gone.map(move |node| (node, if banished(node) { Cut::Banished } else { Cut::Left }))
}

/// Ends the connections with `nodes`.
pub(super) fn cut(proxy: &Proxy, nodes: impl Iterator<Item = (NodeId, Cut)>) {
    for (node, why) in nodes {
        let cut = proxy.cut(node, why);
        if cut > 0 {
            tracing::info!(%node, cut, "cut the connections of a node that is no member any more");
        }
    }
}
