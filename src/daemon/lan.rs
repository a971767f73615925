//! The local network: our interfaces and addresses, and the neighbours that announce themselves.
//!
//! Owns the watch on the kernel's interfaces and what the mDNS responder saw. Everything a neighbour says is a hint: an address to knock at.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use meshd_agent::interfaces::{self, Interface, InterfaceAddress};
use meshd_agent::source::mdns::{MdnsConfig, News, Sighting};
use meshd_ca::identity::{MeshId, NodeId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::responder::{Heard, Responder};
use crate::config::Config;
use crate::intercept::netlink::NetlinkError;
use crate::intercept::rtnetlink::{Route, Watch};
use crate::task;

/// How often the interfaces are looked at when the kernel says nothing.
const LOOK: Duration = Duration::from_secs(30);
/// How soon a look follows another.
const SETTLE: Duration = Duration::from_millis(100);
/// Neighbours remembered.
const MAX_SEEN: usize = 256;
/// How long a neighbour is remembered of whom nothing was heard since mDNS was started anew. Whoever is there answers within seconds.
const UNHEARD: Duration = Duration::from_secs(300);

/// The addresses of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Addresses {
    /// Every one, of any scope.
    pub(crate) own: Arc<BTreeSet<IpAddr>>,
    /// Those that others may use.
    pub(crate) published: Arc<BTreeSet<IpAddr>>,
    /// Names of the interfaces that are LAN.
    pub(crate) lan: Arc<BTreeSet<String>>,
}

/// The view of the local network; ends with its last holder.
pub(crate) struct Lan {
    addresses: watch::Receiver<Addresses>,
    seen: Arc<Mutex<Seen>>,
    announce: mpsc::Sender<Option<MeshId>>,
    task: JoinHandle<()>,
}

impl Lan {
    /// Looks at the interfaces and starts mDNS, if the configuration wants it. Never fails: without interfaces or multicast a node
    /// still has its other hints.
    pub(crate) fn start(config: &Config, me: NodeId) -> Self {
        let only: BTreeSet<String> = config.interfaces.iter().cloned().collect();
        let (publish, addresses) = watch::channel(look(&only, &Addresses::default()));
        let (announce, wishes) = mpsc::channel(4);
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let mdns = config.mdns.then(|| MdnsConfig {
            udp_port: 5353,
            port: config.port,
            instance: me.to_string(),
            interfaces: (*addresses.borrow().lan).clone(),
        });
        let task = task::spawn(run(only, publish, mdns, wishes, seen.clone()));
        Self { addresses, seen, announce, task }
    }

    /// The addresses of this host, now and later.
    pub(crate) fn addresses(&self) -> watch::Receiver<Addresses> {
        self.addresses.clone()
    }

    /// Whether others could reach this host.
    pub(crate) fn has_address(&self) -> bool {
        !self.addresses.borrow().published.is_empty()
    }

    /// The neighbours that announce themselves now.
    pub(crate) fn seen(&self) -> Vec<Sighting> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.expire(Instant::now());
        seen.neighbours.values().map(|n| n.sighting.clone()).collect()
    }

    /// Ends before its last holder does: another process announces this node now.
    pub(crate) fn end(&self) {
        self.task.abort();
    }

    /// Announces this node as a member of `mesh`, or nothing any more.
    pub(crate) fn announce(&self, mesh: Option<MeshId>) {
        let _ = self.announce.try_send(mesh);
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(
    only: BTreeSet<String>,
    publish: watch::Sender<Addresses>,
    mdns: Option<MdnsConfig>,
    mut wishes: mpsc::Receiver<Option<MeshId>>,
    seen: Arc<Mutex<Seen>>,
) {
    let mut mdns = mdns.map(Responder::new);
    let mut watch =
        Watch::open().map_err(|error| tracing::warn!(%error, "cannot watch the interfaces; looking now and then")).ok();
    loop {
        tokio::select! {
            wish = wishes.recv() => match (wish, &mut mdns) {
                (Some(mesh), Some(mdns)) => mdns.announce(mesh),
                (Some(_), None) => {}
                (None, _) => return,
            },
            heard = next(&mut mdns) => {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                match heard {
                    Heard::News(News::Seen(sighting)) => seen.remember(sighting),
                    Heard::News(News::Gone(sighting)) => seen.forget(&sighting),
                    Heard::Anew => seen.doubt(Instant::now()),
                }
            }
            () = changed(&mut watch) => {
                tokio::time::sleep(SETTLE).await;
                let before = publish.borrow().clone();
                let now = look(&only, &before);
                if now != before {
                    tracing::info!(published = ?now.published, "addresses of this host changed");
                    if now.lan != before.lan && let Some(mdns) = &mut mdns {
                        mdns.use_interfaces((*now.lan).clone());
                    }
                    publish.send_replace(now);
                }
            }
        }
    }
}

async fn next(mdns: &mut Option<Responder>) -> Heard {
    match mdns {
        Some(m) => m.next().await,
        None => std::future::pending().await,
    }
}

async fn changed(watch: &mut Option<Watch>) {
    let quiet = tokio::time::sleep(LOOK);
    match watch {
        Some(w) => tokio::select! {
            _ = w.changed() => {}
            () = quiet => {}
        },
        None => quiet.await,
    }
}

/// The neighbours seen, by their first address: whoever announces himself under many names gains nothing.
#[derive(Debug, Default)]
struct Seen {
    neighbours: BTreeMap<SocketAddr, Neighbour>,
    count: u64,
}

#[derive(Debug)]
struct Neighbour {
    /// When it was told of, by order.
    at: u64,
    sighting: Sighting,
    /// Since when nobody listens for its end: it was heard by a responder that is gone.
    doubted: Option<Instant>,
}

impl Seen {
    /// Keeps a sighting. The one not told of for longest goes when there are too many: who came first must not keep out who comes now.
    fn remember(&mut self, sighting: Sighting) {
        let Some(first) = sighting.addresses.iter().min().copied() else { return };
        self.count += 1;
        // An announcement arrives in pieces, and under another tag in another life.
        self.neighbours.retain(|_, n| n.sighting.addresses.iter().any(|a| !sighting.addresses.contains(a)));
        self.neighbours.insert(first, Neighbour { at: self.count, sighting, doubted: None });
        if self.neighbours.len() > MAX_SEEN
            && let Some(oldest) = self.neighbours.iter().min_by_key(|(_, n)| n.at).map(|(address, _)| *address)
        {
            self.neighbours.remove(&oldest);
        }
    }

    /// Forgets one that is gone, also as it was known before it had the addresses it had last.
    fn forget(&mut self, gone: &Sighting) {
        self.neighbours
            .retain(|_, n| n.sighting.tag != gone.tag || n.sighting.addresses.iter().any(|a| !gone.addresses.contains(a)));
    }

    /// From `now` on everybody has to be heard of again.
    fn doubt(&mut self, now: Instant) {
        self.neighbours.values_mut().for_each(|n| n.doubted = n.doubted.or(Some(now)));
    }

    fn expire(&mut self, now: Instant) {
        self.neighbours.retain(|_, n| n.doubted.is_none_or(|since| now.saturating_duration_since(since) < UNHEARD));
    }
}

/// What there is now. A look that fails changes nothing: a host that is short of descriptors or memory for a moment has its addresses
/// still, and telling the others that it has none would end encryption with it.
fn look(only: &BTreeSet<String>, before: &Addresses) -> Addresses {
    match facts() {
        Ok(all) => {
            let lan = all.iter().filter(|i| interfaces::classify(i, &all).is_ok()).map(|i| i.name.clone());
            let lan = lan.filter(|name| only.is_empty() || only.contains(name)).collect();
            let chosen: Vec<Interface> = all.iter().filter(|i| only.is_empty() || only.contains(&i.name)).cloned().collect();
            Addresses {
                own: Arc::new(interfaces::own(&all)),
                published: Arc::new(interfaces::publishable(&chosen).into_iter().collect()),
                lan: Arc::new(lan),
            }
        }
        Err(error) => {
            tracing::warn!(%error, "cannot read the interfaces of this host");
            before.clone()
        }
    }
}

/// The interfaces of this host with their addresses, as the kernel lists them.
pub(crate) fn facts() -> Result<Vec<Interface>, NetlinkError> {
    let mut route = Route::open()?;
    let addresses = route.addresses()?;
    let links = route.links()?;
    Ok(links
        .into_iter()
        .map(|l| Interface {
            index: l.index,
            up: l.is_up(),
            multicast: l.is_multicast(),
            loopback: l.is_loopback(),
            kind: l.kind.clone(),
            master: l.master,
            addresses: addresses
                .iter()
                .filter(|a| a.index == l.index)
                .map(|a| InterfaceAddress { ip: a.ip, deprecated: a.is_deprecated(), tentative: a.is_tentative() })
                .collect(),
            name: l.name,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sighting(n: u32) -> Sighting {
        let ip = std::net::Ipv4Addr::from(0x0a00_0001 + n);
        Sighting { addresses: vec![SocketAddr::from((ip, 6374))], tag: None, version: 1 }
    }

    #[test]
    fn a_flood_does_not_keep_out_who_comes_after_it() {
        let mut seen = Seen::default();
        for n in 0..1000 {
            seen.remember(sighting(n));
        }
        assert_eq!(seen.neighbours.len(), MAX_SEEN);
        assert!(seen.neighbours.values().any(|n| n.sighting == sighting(999)), "the last one is not remembered");
        seen.remember(Sighting { addresses: Vec::new(), tag: None, version: 1 });
        assert_eq!(seen.neighbours.len(), MAX_SEEN);
    }

    #[test]
    fn who_is_gone_is_forgotten() {
        let (mut seen, begun) = (Seen::default(), Instant::now());
        let there = |seen: &Seen| seen.neighbours.values().map(|n| n.sighting.clone()).collect::<Vec<_>>();
        (1..4).for_each(|n| seen.remember(sighting(n)));
        // It was known by one address first, and has two now.
        let both = Sighting { addresses: [sighting(0), sighting(1)].map(|s| s.addresses[0]).to_vec(), ..sighting(1) };
        seen.remember(both.clone());
        seen.forget(&both);
        assert_eq!(there(&seen), [sighting(2), sighting(3)]);
        seen.forget(&Sighting { version: 2, addresses: both.addresses.clone(), tag: None });
        // Another responder: whoever is not heard of again within five minutes is not there any more.
        seen.doubt(begun);
        seen.remember(sighting(3));
        seen.expire(begun + UNHEARD / 2);
        seen.doubt(begun + UNHEARD / 2);
        assert_eq!(there(&seen), [sighting(2), sighting(3)]);
        seen.expire(begun + UNHEARD);
        assert_eq!(there(&seen), [sighting(3)], "doubted for long enough, and heard of since");
        seen.expire(begun + UNHEARD / 2 + UNHEARD);
        assert!(there(&seen).is_empty());
    }
}
