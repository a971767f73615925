//! The way from this process to the next one: starts the program that is on disk now, and hands over when it is able to serve.
//!
//! Owns the order of an upgrade on the side that is there already. Until the next process has said that it serves, nothing is lost that could
//! not be taken back: this one goes on, and says why. Invariant: never do two processes write, accept, or talk to the kernel about the rules;
//! one that does not answer is dead before this one goes on.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use hyper::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::before::{self, Kept};
use super::{Daemon, Halt, Stop};
use crate::admin::local::{No, Socket};
use crate::api::{Older, Upgraded};
use crate::config::LINE;
use crate::intercept::process::beget;
use crate::succession::{Line, Word};
use crate::task;

/// How long the next process may take to read everything: the old one serves meanwhile.
const READY: Duration = Duration::from_secs(20);
/// How long it may take to serve once it has everything: new connections wait meanwhile.
const SERVES: Duration = Duration::from_secs(15);
/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_secs(5);

/// Who asked for an upgrade.
pub(super) type Reply = oneshot::Sender<Result<Upgraded, No>>;

/// How this process was started.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Program {
    /// To be asked at the start: later the file may be another one, and the kernel would name the one that is gone.
    pub(super) fn of_process() -> Self {
        let mut words = std::env::args_os();
        // As it was called, so that a symbolic link to a version may lead to another one by now.
        let called = words.next().map(PathBuf::from).filter(|path| path.components().count() > 1);
        let path = called.or_else(|| std::env::current_exe().ok()).unwrap_or_else(|| "meshd".into());
        Self { path, arguments: words.collect() }
    }
}

/// A process that is able to take over.
#[derive(Debug)]
pub(super) struct Successor {
    line: Line,
    pid: u32,
    version: String,
}

/// What is handed over, and what stays: a member that has stopped everything but its connections.
pub(super) struct Handover {
    pub(super) successor: Successor,
    pub(super) reply: Reply,
    /// By their names on the line.
    pub(super) descriptors: Vec<(String, OwnedFd)>,
    pub(super) kept: Option<Kept>,
}

/// Serves every SIGUSR2 from now on. How it went is in the log.
///
/// # Errors
/// The system refuses to watch for the signal.
pub(super) fn serve(daemon: Arc<Daemon>) -> std::io::Result<impl Future<Output = ()>> {
    let mut asked = signal(SignalKind::user_defined2())?;
    Ok(async move {
        while asked.recv().await.is_some() {
            if let Err(No(_, body)) = daemon.upgrade().await {
                tracing::error!(why = body.why, "not upgraded: {}", body.what);
            }
        }
    })
}

/// That nothing came of an upgrade.
pub(super) fn no(why: impl ToString) -> No {
    No::new(StatusCode::CONFLICT, "not upgraded: meshd goes on as before", why, "the log of meshd says more")
}

/// An upgrade whose next process is not ready yet, and who asked for it.
pub(super) type Upgrading = (Pin<Box<dyn Future<Output = anyhow::Result<Successor>> + Send>>, Reply);

/// What came of it, once there is one; it is over then.
pub(super) async fn started(upgrading: &mut Option<Upgrading>) -> (anyhow::Result<Successor>, Reply) {
    let started = match upgrading {
        Some((starting, _)) => starting.await,
        None => std::future::pending().await,
    };
    match upgrading.take() {
        Some((_, reply)) => (started, reply),
        None => std::future::pending().await,
    }
}

/// With the doors, once more, as long as somebody holds them.
pub(super) fn with_doors(
    daemon: &Daemon,
    started: anyhow::Result<Successor>,
) -> anyhow::Result<(Successor, Vec<(String, OwnedFd)>)> {
    Ok((started?, daemon.doors.duplicate()?.into_iter().collect()))
}

impl Successor {
    /// Starts the program and waits until it can take over. If this is not waited for to its end, the other process ends by itself.
    pub(super) async fn start(program: Program) -> anyhow::Result<Self> {
        let (line, there) = Line::pair().context("cannot make a line to the next process")?;
        let path = program.path.clone();
        let started = task::blocking(move || {
            let mut command = Command::new(&program.path);
            command.args(&program.arguments).env(LINE, there.as_raw_fd().to_string()).stdin(Stdio::null());
            // Both name this process, and mean the service.
            command.env_remove("WATCHDOG_PID").env_remove("LISTEN_PID");
            beget(&mut command, there.as_fd())
        });
        started.await?.with_context(|| format!("cannot start {}", path.display()))?;
        let pid = line.pid().context("the next process did not start")?;
        tracing::info!(pid, program = %path.display(), "upgrade: started the next process");
        match timeout(READY, line.hear()).await {
            Ok(Some((Word::Ready { version, .. }, _))) => Ok(Self { line, pid, version }),
            Ok(Some((Word::Failed { why }, _))) => bail!("{} does not start: {why}", path.display()),
            Ok(None) => bail!("{} ended before it was ready", path.display()),
            other => {
                kill(pid);
                let said = if other.is_err() { "nothing" } else { "something else" };
                bail!("{} said {said} in place of being ready within {} s", path.display(), READY.as_secs())
            }
        }
    }

    /// Gives everything away, and returns when the other process serves.
    ///
    /// # Errors
    /// It does not: it is gone, and everything is as it was given.
    pub(super) async fn take_over(&self, descriptors: &[(String, OwnedFd)]) -> anyhow::Result<()> {
        let names = descriptors.iter().map(|(name, _)| name.clone()).collect();
        let fds: Vec<_> = descriptors.iter().map(|(_, fd)| fd.as_fd()).collect();
        let why = match self.line.say(&Word::TakeOver { names, pid: std::process::id() }, &fds).await {
            Err(error) => format!("it is gone: {error}"),
            Ok(()) => match timeout(SERVES, self.line.hear()).await {
                Ok(Some((Word::Serving, _))) => return Ok(()),
                Ok(Some((Word::Failed { why }, _))) => why,
                Ok(_) => "it ended".into(),
                Err(_) => format!("it did not serve within {} s", SERVES.as_secs()),
            },
        };
        // Whatever it may still be doing: it must not do it beside this one.
        kill(self.pid);
        let gone = async { while self.line.hear().await.is_some() {} };
        if timeout(GONE, gone).await.is_err() {
            tracing::error!(pid = self.pid, "the process that should have taken over cannot be killed");
        }
        bail!("meshd {} was started and could not take over: {why}", self.version)
    }
}

/// Hands everything over that is not in `handover` already, and answers whoever asked. Returns the connections that stay here, and the line to
/// the process that serves now.
///
/// # Errors
/// It does not serve, and is gone; what has to be put back.
pub(super) async fn hand_over(
    daemon: &Daemon,
    socket: &Socket,
    mut handover: Handover,
    stop: &mut Stop,
) -> Result<(Vec<Kept>, Line), Box<Back>> {
    let Handover { successor, descriptors, .. } = &mut handover;
    daemon.save_floor();
    let lock = daemon.store.hand_over();
    let given = (|| {
        let lock = lock.as_ref().context("the state directory is not this process's")?;
        descriptors.push((before::LOCK.to_owned(), lock.try_clone()?.into()));
        descriptors.push((before::API.to_owned(), socket.duplicate()?));
        descriptors.extend(daemon.before.duplicate()?);
        Ok(())
    })();
    let taken = match given {
        Ok(()) => {
            // They are the other one's to listen to, from the first word on.
            daemon.before.let_go();
            successor.take_over(descriptors).await
        }
        Err(error) => {
            kill(successor.pid);
            Err(error)
        }
    };
    if let Err(error) = taken {
        return Err(Box::new(Back { error, lock, handover }));
    }
    let Handover { successor, reply, kept, descriptors } = handover;
    drop((lock, descriptors));
    socket.pass_on();
    daemon.manager.pass_on(successor.pid);
    if let Err(error) = successor.line.say(&Word::Lead, &[]).await {
        tracing::warn!(%error, "the next process is gone already");
    }
    let mut all = daemon.before.kept_here();
    all.extend(kept);
    let connections = u32::try_from(all.iter().map(|k| k.proxy.live.count()).sum::<usize>()).unwrap_or(u32::MAX);
    tracing::info!(version = successor.version, pid = successor.pid, connections, "upgraded: the next process serves");
    let older = Older { pid: std::process::id(), connections };
    let _ = reply.send(Ok(Upgraded { version: successor.version, pid: successor.pid, older }));
    // The service manager knew no better.
    if let Ok(halt) = timeout(Duration::ZERO, stop.asked()).await {
        signal_to(successor.pid, if halt == Halt::Restart { Signal::USR1 } else { Signal::TERM });
    }
    Ok((all, successor.line))
}

/// What nobody took.
pub(super) struct Back {
    error: anyhow::Error,
    lock: Option<File>,
    handover: Handover,
}

impl Back {
    /// Puts everything back to where it was, so that the member can begin again beside its connections.
    pub(super) fn settle(self, daemon: &Daemon) {
        let Handover { reply, descriptors, kept, .. } = self.handover;
        if let Some(lock) = self.lock {
            daemon.store.take_back(lock);
        }
        let mut descriptors: BTreeMap<String, OwnedFd> = descriptors.into_iter().collect();
        descriptors.retain(|name, _| ![before::LOCK, before::API].contains(&name.as_str()));
        daemon.doors.inherit(daemon.before.take(descriptors, &daemon.manager));
        kept.into_iter().for_each(|kept| daemon.before.keep(kept));
        let why = format!("{:#}", self.error);
        tracing::error!(why, "not upgraded: going on as before");
        let _ = reply.send(Err(no(why)));
    }
}

/// A process that holds its end of the line, and so is there.
fn kill(pid: u32) {
    signal_to(pid, Signal::KILL);
}

/// Sends a signal to a process that this one started.
fn signal_to(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        && let Err(error) = kill_process(pid, signal)
    {
        tracing::debug!(%error, "a process is gone");
    }
}
