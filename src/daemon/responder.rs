//! The mDNS responder of this daemon, kept alive.
//!
//! Owns the one [`Mdns`] of the process and starts another when it has ended, when port 5353 was taken, or when somebody floods its
//! cache. Invariant: whatever happens to a responder, the next one announces what the last one was told to announce. A host without
//! mDNS still has its other hints, so nothing here is ever fatal.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use meshd_agent::source::mdns::{MAX_CACHED, Mdns, MdnsConfig, MdnsError, Sighting, Sightings, Tag};
use meshd_ca::identity::MeshId;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout};

/// How long it stays silent after trouble, at first and at most. A flood costs this host a responder's start in each pause.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A responder that worked for this long had no trouble: the next pause is a short one again.
const WELL: Duration = Duration::from_secs(120);
/// How often the cache is looked at. It grows without bound in between, so this is also the limit of what a flood can cost.
const LOOK: Duration = Duration::from_secs(2);
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
}

/// A responder, or the intention to have one.
pub(super) struct Responder {
    config: MdnsConfig,
    announced: Option<MeshId>,
    running: Option<(Mdns, Sightings)>,
    /// The one before, as long as its thread is there: there is never more than one.
    ending: Option<JoinHandle<()>>,
    since: Instant,
    pause: Duration,
    look: Interval,
}

impl Responder {
    /// Starts one; a failure is logged and tried again by [`Responder::next`].
    pub(super) fn new(config: MdnsConfig) -> Self {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut responder =
            Self { config, announced: None, running: None, ending: None, since: Instant::now(), pause: Duration::ZERO, look };
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

    /// The next new or changed sighting. Keeps the responder running meanwhile; cancel-safe.
    pub(super) async fn next(&mut self) -> Sighting {
        loop {
            let Some((mdns, sightings)) = &mut self.running else {
                if let Some(ending) = &mut self.ending {
                    let _ = ending.await;
                    self.ending = None;
                    self.since = Instant::now();
                }
                sleep_until(self.since + self.pause).await;
                self.start();
                continue;
            };
            let trouble = tokio::select! {
                sighting = sightings.next() => match sighting {
                    Some(sighting) => return sighting,
                    None => Trouble::Ended,
                },
                _ = self.look.tick() => match timeout(ANSWER, mdns.cached()).await {
                    Ok(Some(records)) if records > MAX_CACHED => Trouble::Flooded(records),
                    Ok(Some(_)) => continue,
                    Ok(None) => Trouble::Ended,
                    Err(_) => Trouble::Swamped,
                },
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
            }
            Err(trouble) => self.give_up(&trouble),
        }
    }

    fn give_up(&mut self, trouble: &Trouble) {
        let well = self.running.is_some() && self.since.elapsed() > WELL;
        self.ending = self.running.take().map(|(mdns, _)| tokio::spawn(mdns.stop()));
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
