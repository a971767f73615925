//! The local network: our interfaces and addresses, and the neighbours that announce themselves.
//!
//! Owns the watch on the kernel's interfaces and the mDNS responder. Everything a neighbour says is a hint: an address to knock at.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use meshd_agent::interfaces::{self, Interface, InterfaceAddress};
use meshd_agent::source::mdns::{Mdns, MdnsConfig, Sighting, Tag};
use meshd_ca::identity::{MeshId, NodeId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::config::Config;
use crate::intercept::netlink::NetlinkError;
use crate::intercept::rtnetlink::{Route, Watch};

/// How often the interfaces are looked at when the kernel says nothing.
const LOOK: Duration = Duration::from_secs(30);
/// How soon a look follows another.
const SETTLE: Duration = Duration::from_millis(100);
/// Neighbours remembered.
const MAX_SEEN: usize = 256;

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
    seen: Arc<Mutex<BTreeMap<String, Sighting>>>,
    announce: mpsc::Sender<Option<MeshId>>,
    task: JoinHandle<()>,
}

impl Lan {
    /// Looks at the interfaces and starts mDNS, if the configuration wants it. Never fails: without interfaces or multicast a node
    /// still has its other hints.
    pub(crate) fn start(config: &Config, me: NodeId) -> Self {
        let only: BTreeSet<String> = config.interfaces.iter().cloned().collect();
        let (publish, addresses) = watch::channel(look(&only));
        let (announce, wishes) = mpsc::channel(4);
        let seen: Arc<Mutex<BTreeMap<String, Sighting>>> = Arc::default();
        let mdns = config.mdns.then(|| MdnsConfig {
            udp_port: 5353,
            port: config.port,
            instance: me.to_string(),
            interfaces: (*addresses.borrow().lan).clone(),
        });
        let task = tokio::spawn(run(only, publish, mdns, wishes, seen.clone()));
        Self { addresses, seen, announce, task }
    }

    /// The addresses of this host, now and later.
    pub(crate) fn addresses(&self) -> watch::Receiver<Addresses> {
        self.addresses.clone()
    }

    /// The neighbours seen so far.
    pub(crate) fn seen(&self) -> Vec<Sighting> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
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
    seen: Arc<Mutex<BTreeMap<String, Sighting>>>,
) {
    let (mut mdns, mut sightings) = match mdns.map(Mdns::start) {
        Some(Ok((mdns, sightings))) => (Some(mdns), Some(sightings)),
        Some(Err(error)) => {
            tracing::warn!(%error, "going on without mDNS");
            (None, None)
        }
        None => (None, None),
    };
    let mut watch =
        Watch::open().map_err(|error| tracing::warn!(%error, "cannot watch the interfaces; looking now and then")).ok();
    loop {
        tokio::select! {
            wish = wishes.recv() => match (wish, &mut mdns) {
                (Some(mesh), Some(mdns)) => {
                    let done = match mesh {
                        Some(mesh) => mdns.announce(Tag::of(mesh).ok()),
                        None => mdns.unannounce(),
                    };
                    if let Err(error) = done {
                        tracing::warn!(%error, "cannot announce this host");
                    }
                }
                (Some(_), None) => {}
                (None, _) => return,
            },
            sighting = next(&mut sightings) => match sighting {
                Some(sighting) => remember(&seen, sighting),
                None => sightings = None,
            },
            () = changed(&mut watch) => {
                tokio::time::sleep(SETTLE).await;
                let now = look(&only);
                let before = publish.borrow().clone();
                if now != before {
                    tracing::info!(published = ?now.published, "addresses of this host changed");
                    if now.lan != before.lan && let Some(mdns) = &mut mdns
                        && let Err(error) = mdns.use_interfaces((*now.lan).clone()) {
                        tracing::warn!(%error, "mDNS cannot follow the interfaces");
                    }
                    publish.send_replace(now);
                }
            }
        }
    }
}

async fn next(sightings: &mut Option<meshd_agent::source::mdns::Sightings>) -> Option<Sighting> {
    match sightings {
        Some(s) => s.next().await,
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

fn remember(seen: &Mutex<BTreeMap<String, Sighting>>, sighting: Sighting) {
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    // One entry for each first address: whoever announces himself under many names gains nothing.
    let Some(first) = sighting.addresses.iter().min() else { return };
    let key = first.to_string();
    if seen.len() < MAX_SEEN || seen.contains_key(&key) {
        seen.insert(key, sighting);
    }
}

fn look(only: &BTreeSet<String>) -> Addresses {
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
            Addresses::default()
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
