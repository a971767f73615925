//! Neighbours by multicast DNS (RFC 6762, RFC 6763): `_meshd._tcp.local.`. The only file that names `mdns-sd`.
//!
//! Owns the announcement of this host and the sightings of others. Invariant: what comes out is a bounded list of addresses that
//! can be dialled, each change once; whatever a packet said, nothing in it is believed. An announcement tells strangers that
//! meshd runs here and on which port. Which mesh it belongs to is visible only to those who know the mesh's id: the
//! [`Tag`] is a MAC under a salt that is new with every announcement, so that nobody else can tell two meshes apart or follow
//! one of them.
//!
//! The library shares port 5353 with avahi or systemd-resolved on the same host (`SO_REUSEADDR`, `SO_REUSEPORT`).
//! It runs one thread of its own. Its cache knows no limit, so a flood of records is answered from outside: see [`MAX_CACHED`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::{Arc, Mutex, PoisonError};

use data_encoding::HEXLOWER;
use mdns_sd::{IfKind, IfPredicate, Receiver, ResolvedService, ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};
use meshd_ca::identity::{HostName, MeshId};
use meshd_ca::keys::{KeyError, derive, mac, random, same};
use thiserror::Error;

/// The service type.
const SERVICE: &str = "_meshd._tcp.local.";
/// The protocol version that we announce.
pub const VERSION: u16 = 1;
/// Instances remembered, so that each change is told once; the one not heard of for longest goes first.
pub const MAX_SIGHTINGS: usize = 256;
/// Addresses of one sighting.
pub const MAX_ADDRESSES: usize = 32;
/// When the library's cache holds more records than this somebody floods the LAN: drop the [`Mdns`] and start another.
pub const MAX_CACHED: u64 = 16_384;
/// What the library calls its thread.
pub const THREAD: &str = "mDNS_daemon";
/// Longest instance name remembered, in bytes; DNS allows 63 for the label and as much again for escapes.
const MAX_NAME: usize = 256;

/// Why there is no mDNS.
#[derive(Debug, Error)]
pub enum MdnsError {
    /// The responder could not be started, or its thread has ended.
    #[error("mDNS does not work on this host: {0}; members are still found through `peers` and remembered addresses")]
    Responder(#[from] mdns_sd::Error),
    /// No random bytes for a salt.
    #[error("mDNS announcement: {0}")]
    Random(#[from] KeyError),
}

/// A mark on an announcement that only who knows the mesh's id recognises: a salt and a 32-bit MAC of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    salt: [u8; 8],
    mac: [u8; 4],
}

impl Tag {
    /// A tag of `mesh` under a fresh salt.
    ///
    /// # Errors
    /// [`KeyError::Random`] when the system has no random bytes.
    pub fn of(mesh: MeshId) -> Result<Self, KeyError> {
        let salt = random()?;
        Ok(Self { salt, mac: mac_of(mesh, &salt) })
    }
}

/// Whether `tag` is of `mesh`. One tag in four thousand million is by chance.
pub fn tag_matches(mesh: MeshId, tag: &Tag) -> bool {
    same(&mac_of(mesh, &tag.salt), &tag.mac)
}

fn mac_of(mesh: MeshId, salt: &[u8; 8]) -> [u8; 4] {
    let key = derive(mesh.as_bytes(), b"", b"meshd mdns tag");
    let [a, b, c, d, ..] = mac(&key, &[salt]);
    [a, b, c, d]
}

/// What to announce, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MdnsConfig {
    /// The UDP port: 5353, except in tests.
    pub udp_port: u16,
    /// The mesh port to announce.
    pub port: u16,
    /// The instance name, cut to a host name. It must differ from that of every other host on the LAN and has no meaning.
    pub instance: String,
    /// Names of the interfaces to use, see [`crate::interfaces::lan`].
    pub interfaces: BTreeSet<String>,
}

/// A host that says it runs meshd: a hint where to dial, nothing more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// Where it says it listens, what it said last first; link-local IPv6 with the interface on which it was heard.
    pub addresses: Vec<SocketAddr>,
    /// Its mesh, for those who know it; none while it has none.
    pub tag: Option<Tag>,
    /// The protocol version that it announces.
    pub version: u16,
}

/// What was heard of a neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// It is new, or says something else than before.
    Seen(Sighting),
    /// It said goodbye, or has not been heard of for as long as its announcement was good (two minutes, asked for again before).
    Gone(Sighting),
}

/// A running responder and browser; both end when it is dropped, with a goodbye on the LAN.
pub struct Mdns {
    daemon: ServiceDaemon,
    port: u16,
    instance: HostName,
    shared: Arc<Mutex<Shared>>,
    announced: Option<ServiceInfo>,
}

/// What the library's thread, [`Mdns`] and [`Sightings`] share.
#[derive(Debug, Default)]
struct Shared {
    interfaces: BTreeSet<String>,
    /// The salt of our announcement, by which we know ourselves whatever the library renamed us to.
    salt: Option<[u8; 8]>,
}

fn locked(shared: &Mutex<Shared>) -> std::sync::MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Mdns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mdns")
            .field("instance", &self.instance)
            .field("announced", &self.announced.is_some())
            .finish_non_exhaustive()
    }
}

impl Mdns {
    /// Starts to browse. Nothing is announced yet.
    ///
    /// # Errors
    /// [`MdnsError::Responder`] when the responder's thread cannot be made. That a socket cannot be opened shows only in nothing
    /// being seen.
    pub fn start(config: MdnsConfig) -> Result<(Self, Sightings), MdnsError> {
        let MdnsConfig { udp_port, port, instance, interfaces } = config;
        let daemon = ServiceDaemon::new_with_port(udp_port)?;
        let shared = Arc::new(Mutex::new(Shared { interfaces, salt: None }));
        let chosen = shared.clone();
        // One predicate that reads the current choice: the library keeps every selection it was ever given.
        let unwanted = IfPredicate::new(move |i| !locked(&chosen).interfaces.contains(&i.name));
        daemon.disable_interface(IfKind::Predicate(unwanted))?;
        let events = daemon.browse(SERVICE)?;
        let sightings = Sightings { daemon: daemon.clone(), events, shared: shared.clone(), seen: Seen::default() };
        Ok((Self { daemon, port, instance: HostName::nearest(&instance), shared, announced: None }, sightings))
    }

    /// Announces this host, with the tag of its mesh once it has one. Replaces an earlier announcement.
    ///
    /// # Errors
    /// [`MdnsError`] when the responder has ended or there is no salt.
    pub fn announce(&mut self, tag: Option<Tag>) -> Result<(), MdnsError> {
        let salt = match tag {
            Some(t) => t.salt,
            None => random()?,
        };
        let mut txt = vec![("v".to_owned(), VERSION.to_string()), ("s".to_owned(), HEXLOWER.encode(&salt))];
        txt.extend(tag.map(|t| ("m".to_owned(), HEXLOWER.encode(&t.mac))));
        // A host name of our own: the host's is avahi's to answer for.
        let host = format!("{}.local.", self.instance);
        let info = ServiceInfo::new(SERVICE, self.instance.as_str(), &host, "", self.port, &txt[..])?.enable_addr_auto();
        locked(&self.shared).salt = Some(salt);
        self.daemon.register(info.clone())?;
        self.announced = Some(info);
        Ok(())
    }

    /// Says once more what is announced, if anything is: for neighbours that were cut off when it was said and ask ever more rarely.
    ///
    /// # Errors
    /// [`MdnsError::Responder`] when the responder has ended.
    pub fn repeat(&self) -> Result<(), MdnsError> {
        Ok(self.announced.clone().map_or(Ok(()), |info| self.daemon.register(info))?)
    }

    /// Takes the announcement back, if there is one.
    ///
    /// # Errors
    /// [`MdnsError::Responder`] when the responder has ended.
    pub fn unannounce(&mut self) -> Result<(), MdnsError> {
        if let Some(info) = &self.announced {
            self.daemon.unregister(info.get_fullname())?;
            self.announced = None;
        }
        Ok(())
    }

    /// Changes the interfaces in use, for browsing and for the announcement.
    ///
    /// # Errors
    /// [`MdnsError::Responder`] when the responder has ended.
    pub fn use_interfaces(&mut self, names: BTreeSet<String>) -> Result<(), MdnsError> {
        locked(&self.shared).interfaces = names;
        // An empty selection changes nothing by itself but has the predicate asked again.
        self.daemon.disable_interface(Vec::<IfKind>::new())?;
        // The library asks ever more rarely, and on an interface that came back not at once: begin the search anew, see `Sightings::next`.
        Ok(self.daemon.stop_browse(SERVICE)?)
    }

    /// Ends it and waits until its thread is gone. That may take long: while more packets arrive than it can look at, it looks at nothing
    /// else. Whoever owns the sockets' process can make them deaf.
    pub async fn stop(self) {
        if let Ok(ended) = self.daemon.shutdown() {
            let _ = ended.recv_async().await;
        }
    }

    /// How many records the library holds now; compare with [`MAX_CACHED`]. None when the responder has ended. Waits as long as the
    /// responder is too busy with packets to answer.
    pub async fn cached(&self) -> Option<u64> {
        let metrics = self.daemon.get_metrics().ok()?.recv_async().await.ok()?;
        Some(metrics.iter().filter(|(k, _)| k.starts_with("cached-")).filter_map(|(_, n)| u64::try_from(*n).ok()).sum())
    }
}

impl Drop for Mdns {
    fn drop(&mut self) {
        // The library says goodbye for everything that is registered.
        let _ = self.daemon.shutdown();
    }
}

/// The sightings of a running browser.
pub struct Sightings {
    daemon: ServiceDaemon,
    events: Receiver<ServiceEvent>,
    shared: Arc<Mutex<Shared>>,
    seen: Seen,
}

impl std::fmt::Debug for Sightings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sightings").field("seen", &self.seen.instances.len()).finish_non_exhaustive()
    }
}

impl Sightings {
    /// The next new, changed or ended sighting; none when the responder has ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<News> {
        loop {
            match self.events.recv_async().await {
                Ok(ServiceEvent::ServiceResolved(service)) => {
                    let own = locked(&self.shared).salt;
                    if let Some(sighting) = self.seen.resolved(&service.fullname, &heard(&service), own) {
                        return Some(News::Seen(sighting));
                    }
                }
                Ok(ServiceEvent::ServiceRemoved(_, name)) => {
                    if let Some(sighting) = self.seen.removed(&name) {
                        return Some(News::Gone(sighting));
                    }
                }
                Ok(_) => {}
                // The library drops a subscriber that is a thousand events behind; when the responder has ended this fails.
                Err(_) => self.events = self.daemon.browse(SERVICE).ok()?,
            }
        }
    }
}

/// What an announcement said, before it is looked at.
#[derive(Debug, Clone, Default)]
struct Heard {
    port: u16,
    /// Addresses, and for IPv6 the index of the interface on which each was heard.
    addresses: Vec<(IpAddr, u32)>,
    version: Option<Vec<u8>>,
    salt: Option<Vec<u8>>,
    mac: Option<Vec<u8>>,
}

fn heard(service: &ResolvedService) -> Heard {
    let text = |key: &str| service.get_property_val(key).flatten().map(<[u8]>::to_vec);
    let address = |a: &ScopedIp| match a {
        ScopedIp::V6(v6) => (IpAddr::V6(*v6.addr()), v6.scope_id().index),
        other => (other.to_ip_addr(), 0),
    };
    // The library's set has no order; ours makes what is cut off the same each time.
    let addresses: BTreeSet<(IpAddr, u32)> = service.addresses.iter().map(address).collect();
    let addresses = addresses.into_iter().collect();
    Heard { port: service.port, addresses, version: text("v"), salt: text("s"), mac: text("m") }
}

/// The sighting in an announcement, and its salt; none if it is not one of ours or leads nowhere.
fn parse(h: &Heard) -> Option<(Sighting, Option<[u8; 8]>)> {
    let version = std::str::from_utf8(h.version.as_deref()?).ok()?;
    let version = version.parse().ok().filter(|v| *v > 0 && version.bytes().all(|b| b.is_ascii_digit()))?;
    let salt = h.salt.as_deref().and_then(hex);
    let mac = h.mac.as_deref().and_then(hex);
    let tag = salt.zip(mac).map(|(salt, mac)| Tag { salt, mac });
    let addresses: Vec<SocketAddr> = h.addresses.iter().filter_map(|&(ip, scope)| dialable(ip, scope, h.port)).collect();
    let found = !addresses.is_empty();
    found.then(|| (Sighting { addresses: merged(addresses, &[]), tag, version }, salt))
}

fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    HEXLOWER.decode(text.get(..2 * N).filter(|t| t.len() == text.len())?).ok()?.try_into().ok()
}

fn dialable(ip: IpAddr, scope: u32, port: u16) -> Option<SocketAddr> {
    let ip = ip.to_canonical();
    let none = ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || port == 0;
    match ip {
        _ if none => None,
        IpAddr::V4(v4) if v4.is_broadcast() || v4.octets()[0] == 0 => None,
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            (scope != 0).then(|| SocketAddr::V6(SocketAddrV6::new(v6, port, 0, scope)))
        }
        ip => Some(SocketAddr::new(ip, port)),
    }
}

/// The addresses said now, then those said before, each once and no more than [`MAX_ADDRESSES`].
fn merged(now: Vec<SocketAddr>, before: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut seen = BTreeSet::new();
    let all = now.into_iter().chain(before.iter().copied());
    all.filter(|a| seen.insert(*a)).take(MAX_ADDRESSES).collect()
}

/// What was seen, by instance. An announcement arrives in pieces, often with one address each: they are put together here.
#[derive(Debug, Default)]
struct Seen {
    instances: BTreeMap<String, (u64, Sighting)>,
    clock: u64,
}

impl Seen {
    /// Takes in an announcement; gives the whole sighting if it is new or changed. `own` is the salt of our own.
    fn resolved(&mut self, name: &str, heard: &Heard, own: Option<[u8; 8]>) -> Option<Sighting> {
        let (mut sighting, salt) = parse(heard)?;
        if name.len() > MAX_NAME || (salt.is_some() && salt == own) {
            return None;
        }
        self.clock += 1;
        let name = name.to_ascii_lowercase();
        let before = self.instances.get(&name).map(|(_, s)| s);
        // Another tag is another life of that host: nothing is left of the one before.
        if let Some(b) = before.filter(|b| b.tag == sighting.tag) {
            sighting.addresses = merged(sighting.addresses, &b.addresses);
        }
        let same = |b: &Sighting| {
            let set = |s: &Sighting| s.addresses.iter().copied().collect::<BTreeSet<_>>();
            b.tag == sighting.tag && b.version == sighting.version && set(b) == set(&sighting)
        };
        let known = before.is_some_and(same);
        self.instances.insert(name, (self.clock, sighting.clone()));
        if self.instances.len() > MAX_SIGHTINGS
            && let Some(oldest) = self.instances.iter().min_by_key(|(_, (at, _))| *at).map(|(n, _)| n.clone())
        {
            self.instances.remove(&oldest);
        }
        (!known).then_some(sighting)
    }

    fn removed(&mut self, name: &str) -> Option<Sighting> {
        self.instances.remove(&name.to_ascii_lowercase()).map(|(_, sighting)| sighting)
    }
}

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
mod tests;
