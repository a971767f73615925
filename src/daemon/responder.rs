//! The mDNS responder of this daemon, kept alive.
//!
//! Owns the one [`Mdns`] of the process and starts another when it has ended, when port 5353 was taken, or when somebody floods its
//! cache or keeps it too busy. Invariant: whatever happens to a responder, the next one announces what the last one was told to announce. A
//! host without mDNS still has its other hints, so nothing here is ever fatal, and a flood costs no more than a few per cent of a core.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use meshd_agent::source::mdns::{MAX_CACHED, Mdns, MdnsConfig, MdnsError, News, Sightings, THREAD, Tag};
use meshd_ca::identity::MeshId;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout};

use crate::intercept::{process, socket};
use crate::task;

/// How long it stays silent after trouble, at first and at most. A flood costs this host a responder's start in each pause. Longer than the
/// second for which neighbours keep what said goodbye (RFC 6762 section 10.1): what comes back just as that ends may be forgotten with it.
const PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A responder that worked for this long had no trouble: the next pause is a short one again.
const WELL: Duration = Duration::from_secs(120);
/// How often it is looked at: how large its cache is, and what it costs. Both are without bound in between, so this is also the limit of
/// what a flood can cost.
const LOOK: Duration = Duration::from_secs(1);
/// How often it says again who is here. Neighbours that were cut off meanwhile have forgotten it, and ask once an hour by then; an answer to
/// questions that came more often would be larger than this by all that the neighbours know.
const AGAIN: Duration = Duration::from_secs(300);
/// More of a core than this, per cent, over the time between two looks is no announcement of anybody: some ten thousand packets a second.
const TOO_BUSY: u32 = 50;
/// How long it may take to say how large the cache is: it answers nobody while packets come faster than it can look at them.
const ANSWER: Duration = Duration::from_secs(10);

/// Why a responder was given up.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Start(#[from] MdnsError),
    #[error("UDP port {0} cannot be shared: {1}; another responder holds it for itself alone")]
    Port(u16, io::Error),
    #[error("it has ended")]
    Ended,
    #[error("its cache holds {0} records: somebody floods the local network")]
    Flooded(u64),
    #[error("more packets arrive than it can look at: somebody floods the local network")]
    Swamped,
    #[error("it takes {0} % of a core: somebody floods the local network")]
    Busy(u32),
}

/// What came of listening.
#[derive(Debug)]
pub(super) enum Heard {
    /// Of a neighbour.
    News(News),
    /// There is another responder now: of those who were there before nothing is known.
    Anew,
}

/// What the responder's thread cost so far, and when that was read.
#[derive(Debug, Clone, Copy)]
struct Cost {
    spent: Duration,
    at: Instant,
}

impl Cost {
    fn now() -> Self {
        Self { spent: process::cpu_time_of(THREAD), at: Instant::now() }
    }

    /// How much of a core it took from `before` until this, in per cent; nothing when hardly any time has passed.
    fn since(self, before: Self) -> u32 {
        let passed = self.at.saturating_duration_since(before.at);
        let spent = self.spent.saturating_sub(before.spent).as_micros() * 100;
        if passed < LOOK / 2 { 0 } else { u32::try_from(spent / passed.as_micros().max(1)).unwrap_or(u32::MAX) }
    }
}

/// A responder, or the intention to have one.
pub(super) struct Responder {
    config: MdnsConfig,
    announced: Option<MeshId>,
    running: Option<(Mdns, Sightings)>,
    /// The one before, as long as its thread is there: there is never more than one.
    ending: Option<JoinHandle<()>>,
    since: Instant,
    /// When it last said who is here.
    said: Instant,
    pause: Duration,
    look: Interval,
    cost: Cost,
}

impl Responder {
    /// Starts one; a failure is logged and tried again by [`Responder::next`].
    pub(super) fn new(config: MdnsConfig) -> Self {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (since, cost) = (Instant::now(), Cost::now());
        let mut responder =
            Self { config, announced: None, running: None, ending: None, since, said: since, pause: Duration::ZERO, look, cost };
        responder.start();
        responder
    }

    /// Announces this node as a member of `mesh`, or nothing any more.
    pub(super) fn announce(&mut self, mesh: Option<MeshId>) {
        self.announced = mesh;
        if let Some((mdns, _)) = &mut self.running
            && let Err(error) = tell(mdns, mesh)
        {
            tracing::warn!(%error, "cannot announce this host");
        }
    }

    /// Follows the interfaces.
    pub(super) fn use_interfaces(&mut self, names: BTreeSet<String>) {
        self.config.interfaces = names;
        if let Some((mdns, _)) = &mut self.running
            && let Err(error) = mdns.use_interfaces(self.config.interfaces.clone())
        {
            tracing::warn!(%error, "mDNS cannot follow the interfaces");
        }
    }

    /// What is heard next. Keeps the responder running meanwhile; cancel-safe.
    pub(super) async fn next(&mut self) -> Heard {
        loop {
            let Some((mdns, sightings)) = &mut self.running else {
                if let Some(ending) = &mut self.ending {
                    let _ = ending.await;
                    self.ending = None;
                    self.since = Instant::now();
                }
                sleep_until(self.since + self.pause).await;
                self.start();
                return Heard::Anew;
            };
            let trouble = tokio::select! {
                sighting = sightings.next() => match sighting {
                    Some(news) => return Heard::News(news),
                    None => Trouble::Ended,
                },
                _ = self.look.tick() => {
                    let now = Cost::now();
                    let busy = now.since(self.cost);
                    self.cost = now;
                    if self.said.elapsed() >= AGAIN {
                        self.said = Instant::now();
                        // One that has ended is noticed below.
                        let _ = mdns.repeat();
                    }
                    match () {
                        () if busy > TOO_BUSY => Trouble::Busy(busy),
                        () => match timeout(ANSWER, mdns.cached()).await {
                            Ok(Some(records)) if records > MAX_CACHED => Trouble::Flooded(records),
                            Ok(Some(_)) => continue,
                            Ok(None) => Trouble::Ended,
                            Err(_) => Trouble::Swamped,
                        },
                    }
                }
            };
            self.give_up(&trouble);
        }
    }

    fn start(&mut self) {
        let started = shared(self.config.udp_port)
            .map_err(|error| Trouble::Port(self.config.udp_port, error))
            .and_then(|()| Ok(Mdns::start(self.config.clone())?))
            .and_then(|(mut mdns, sightings)| {
                tell(&mut mdns, self.announced)?;
                Ok((mdns, sightings))
            });
        match started {
            Ok(running) => {
                self.running = Some(running);
                self.since = Instant::now();
                self.cost = Cost::now();
            }
            Err(trouble) => self.give_up(&trouble),
        }
    }

    fn give_up(&mut self, trouble: &Trouble) {
        // As long as packets come faster than it looks at them, its thread does not even hear that it is to end.
        if matches!(trouble, Trouble::Busy(_) | Trouble::Swamped | Trouble::Flooded(_))
            && let Err(error) = socket::deafen(self.config.udp_port)
        {
            tracing::warn!(%error, "cannot close the sockets of mDNS");
        }
        let well = self.running.is_some() && self.since.elapsed() > WELL;
        self.ending = self.running.take().map(|(mdns, _)| task::spawn(mdns.stop()));
        self.pause = if well { PAUSE } else { (self.pause * 2).clamp(PAUSE, LONGEST_PAUSE) };
        self.since = Instant::now();
        let again = self.pause.as_secs();
        tracing::warn!(%trouble, again_in_seconds = again, "mDNS was stopped; members are found through `peers` and known addresses");
    }
}

fn tell(mdns: &mut Mdns, mesh: Option<MeshId>) -> Result<(), MdnsError> {
    match mesh {
        Some(mesh) => mdns.announce(Some(Tag::of(mesh)?)),
        None => mdns.unannounce(),
    }
}

/// Whether the port can be had beside other responders (avahi, systemd-resolved). The library does not say when it cannot: it would be
/// deaf and dumb for ever.
fn shared(port: u16) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())
}

#[cfg(test)]
mod tests;
