//! The service manager: what systemd is told, and what it keeps for us over a restart.
//!
//! Owns the protocols of sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3); home of the crate `sd-notify`. Without a service manager
//! all of it does nothing. Invariants: nothing here waits for the manager, since a manager that does not read must not hold up a
//! connection; and the watchdog is fed by the beat of the daemon's own loop, never by a thread that would go on alone.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::intercept::process;

/// Messages that may wait for the manager to read; what does not fit is lost, as it would be with a manager that is gone.
const QUEUE: usize = 16;
/// How long the last messages of a process may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often a long piece of work shows that it is alive.
const STEP: Duration = Duration::from_secs(1);
/// However short the manager's patience is: a loop this old is not stuck yet.
const SLACK: Duration = Duration::from_secs(5);

/// The manager of this process, if it has one. Copies speak to the same.
#[derive(Clone)]
pub(crate) struct Manager {
    messages: Option<SyncSender<Message>>,
    /// What keeps the messages back until the manager listens to this process.
    held: Arc<Mutex<Option<SyncSender<()>>>>,
    kept: Arc<Mutex<HashMap<String, OwnedFd>>>,
}

struct Message {
    text: String,
    fd: Option<OwnedFd>,
    sent: Option<SyncSender<()>>,
}

impl Manager {
    /// Whoever started this process, by its environment. Call it once: it takes over the descriptors that were kept. A process that `waits`
    /// is not the main one of its service yet, and nobody else is listened to: what it says is kept until [`Manager::lead`].
    pub(crate) fn of_process(waits: bool) -> Self {
        let kept = sd_notify::listen_fds_with_names()
            .map(|fds| fds.filter_map(|(fd, name)| Some((name, process::inherited(fd)?))).collect::<HashMap<_, _>>());
        let kept = kept.unwrap_or_else(|error| {
            tracing::warn!(%error, "what the service manager kept cannot be used");
            HashMap::new()
        });
        let (lead, led) = sync_channel(1);
        if !waits {
            let _ = lead.send(());
        }
        Self { messages: messenger(led), held: Arc::new(Mutex::new(Some(lead))), kept: Arc::new(Mutex::new(kept)) }
    }

    /// From here on this is the main process of the service.
    pub(crate) fn lead(&self) {
        if let Some(held) = self.held.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = held.try_send(());
        }
    }

    /// Another process is the main one of the service from here on, and this one says nothing any more.
    pub(crate) fn pass_on(&self, pid: u32) {
        self.tell(&[NotifyState::MainPid(pid)]);
        self.flush();
    }

    /// Gives back what was taken, or came from the process before this one.
    pub(crate) fn put(&self, name: &str, fd: OwnedFd) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), fd);
    }

    /// The daemon does what it is for.
    pub(crate) fn ready(&self) {
        self.tell(&[NotifyState::Ready]);
    }

    /// What it is doing, in one line for a person.
    pub(crate) fn status(&self, status: &str) {
        // A line ends a message: nothing that came from elsewhere may add another.
        let line: String = status.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        self.tell(&[NotifyState::Status(&line)]);
    }

    /// It reads its configuration again; over with [`Manager::ready`].
    pub(crate) fn reloading(&self) {
        let now = i128::try_from(process::monotonic().as_micros()).unwrap_or(i128::MAX);
        self.tell(&[NotifyState::Reloading, NotifyState::MonotonicUsec(now)]);
    }

    /// It stops, which takes this long at most.
    pub(crate) fn stopping(&self, at_most: Duration) {
        self.tell(&[NotifyState::Stopping]);
        self.patience(at_most);
    }

    /// Starting or stopping takes this much longer than the unit says.
    pub(crate) fn patience(&self, at_most: Duration) {
        let usec = u32::try_from(at_most.as_micros()).unwrap_or(u32::MAX);
        self.tell(&[NotifyState::ExtendTimeoutUsec(usec)]);
    }

    /// Has a copy of a descriptor kept for the next process of this service.
    pub(crate) fn keep(&self, name: &str, fd: OwnedFd) {
        // Without FDPOLL=0 the manager drops a socket that reports an error, which a full netlink queue does.
        let text = [NotifyState::FdStore.to_string(), NotifyState::FdName(name).to_string(), "FDPOLL=0".into()].join("\n");
        self.send(Message { text, fd: Some(fd), sent: None });
    }

    /// Has it closed.
    pub(crate) fn forget(&self, name: &str) {
        self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
    }

    /// What the process before this one had kept under this name. Once.
    pub(crate) fn take(&self, name: &str) -> Option<OwnedFd> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(name)
    }

    /// Feeds the watchdog as long as `pulse` beats; ends at once if there is no watchdog.
    pub(crate) async fn watchdog(self, pulse: Arc<Pulse>) {
        let Some(period) = sd_notify::watchdog_enabled().filter(|period| !period.is_zero()) else { return };
        feed(period, &pulse, || self.tell(&[NotifyState::Watchdog])).await;
    }

    /// Waits a moment until everything said so far is with the manager.
    pub(crate) fn flush(&self) {
        let (sent, heard) = sync_channel(1);
        self.send(Message { text: String::new(), fd: None, sent: Some(sent) });
        let _ = heard.recv_timeout(FAREWELL);
    }

    fn tell(&self, states: &[NotifyState<'_>]) {
        let text = states.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        self.send(Message { text, fd: None, sent: None });
    }

    fn send(&self, message: Message) {
        if let Some(messages) = &self.messages {
            let _ = messages.try_send(message);
        }
    }
}

/// A thread that talks to the manager, if there is one. Sending waits while the manager does not read.
fn messenger(led: Receiver<()>) -> Option<SyncSender<Message>> {
    std::env::var_os("NOTIFY_SOCKET")?;
    let (messages, inbox) = sync_channel::<Message>(QUEUE);
    let talk = move || {
        if led.recv().is_err() {
            return;
        }
        for Message { text, fd, sent } in inbox {
            let state = [NotifyState::Custom(&text)];
            let told = match (&fd, text.is_empty()) {
                (_, true) => Ok(()),
                (Some(fd), _) => sd_notify::notify_with_fds(&state, &[fd.as_fd()]),
                (None, _) => sd_notify::notify(&state),
            };
            if let Err(error) = told {
                tracing::debug!(%error, "the service manager cannot be told");
            }
            if let Some(sent) = sent {
                let _ = sent.try_send(());
            }
        }
    };
    std::thread::Builder::new().name("notify".into()).spawn(talk).ok()?;
    Some(messages)
}

/// The beat of the daemon's own loop, which everything else depends on.
#[derive(Debug)]
pub(crate) struct Pulse {
    started: Instant,
    /// Milliseconds after `started`.
    last: AtomicU64,
}

impl Pulse {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), last: AtomicU64::new(0) }
    }

    /// The loop has come round.
    pub(crate) fn beat(&self) {
        self.last.store(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Work that takes longer than a round and waits for others meanwhile. It beats as long as it is waiting, and not while it holds its
    /// thread.
    pub(crate) async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            self.beat();
            if let Ok(done) = timeout(STEP, &mut work).await {
                return done;
            }
        }
    }

    /// How long ago the last beat was.
    fn age(&self) -> Duration {
        self.started.elapsed().saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)))
    }
}

/// Calls `alive` several times in each `period`, but not while the pulse is older than half of it.
async fn feed(period: Duration, pulse: &Pulse, mut alive: impl FnMut()) {
    let mut tick = interval((period / 4).max(Duration::from_millis(1)));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        match pulse.age() {
            age if age <= (period / 2).max(SLACK) => alive(),
            age => tracing::error!(seconds = age.as_secs(), "the daemon's own loop is stuck; the service manager will notice"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    const PERIOD: Duration = Duration::from_secs(20);

    async fn fed(lasts: Duration, pulse: &Arc<Pulse>) -> usize {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        let _ = timeout(lasts, feed(PERIOD, pulse, move || _ = counted.fetch_add(1, Ordering::Relaxed))).await;
        count.load(Ordering::Relaxed)
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_while_the_loop_beats_and_starves_when_it_hangs() {
        let pulse = Arc::new(Pulse::new());
        let beating = pulse.clone();
        let beats = tokio::spawn(async move { beating.during(std::future::pending::<()>()).await });
        assert!(fed(PERIOD * 2, &pulse).await >= 8);
        beats.abort();
        let _ = beats.await;
        // Half a period is the patience with a loop; nothing comes after it.
        tokio::time::sleep(PERIOD / 2 + Duration::from_secs(1)).await;
        assert_eq!(fed(PERIOD * 3, &pulse).await, 0);
        pulse.beat();
        assert!(fed(PERIOD / 2, &pulse).await >= 1);
    }

    #[test]
    fn a_loop_that_holds_its_thread_starves_the_watchdog_although_other_threads_run() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
        runtime.block_on(async {
            let pulse = Arc::new(Pulse::new());
            let beating = pulse.clone();
            // As a deadlock or an endless loop would: the work never gives its thread back.
            let (go, stuck) = std::sync::mpsc::channel::<()>();
            let (begun, begins) = tokio::sync::oneshot::channel();
            let hung = tokio::spawn(async move {
                let work = async move {
                    let _ = begun.send(());
                    _ = tokio::task::block_in_place(|| stuck.recv());
                };
                beating.during(work).await;
            });
            begins.await.unwrap();
            tokio::time::sleep(SLACK + Duration::from_millis(200)).await;
            let count = Arc::new(AtomicUsize::new(0));
            let counted = count.clone();
            let feeding = feed(Duration::from_millis(200), &pulse, move || _ = counted.fetch_add(1, Ordering::Relaxed));
            let _ = timeout(Duration::from_millis(500), feeding).await;
            assert_eq!(count.load(Ordering::Relaxed), 0);
            drop(go);
            let _ = hung.await;
        });
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        let manager = Manager { messages: None, held: Arc::default(), kept: Arc::default() };
        manager.ready();
        manager.flush();
        assert!(manager.take("rules").is_none());
    }
}
