//! `meshd check`: looks at this host the way a careful operator would, and says what to do about what it finds.
//!
//! One file for each group of checks. Each has its facts as a plain struct, one function that reads them, and one that decides, which
//! is pure: that is what is tested from facts. Owns the findings and their wording; every code has a section in `docs/checks.md`.
//! Invariant: looks only. Nothing is repaired, and what is tried out (an nft table, a socket, one mDNS question) is gone at once.
//!
//! The daemon answers for itself and its member ([`of_daemon`]); without one the command looks at what can be seen from outside
//! ([`of_host`]). The groups run at the same time, each within [`PATIENCE`], and few checks at once.

mod addresses;
mod backup;
mod clock;
mod coverage;
mod findings;
mod firewall;
mod fleet;
mod identity;
mod kernel;
mod mesh;
mod network;
mod packets;
mod peers;
mod permissions;
mod ports;
mod proc;
mod process;
mod processor;
mod recovery;
mod rules;
mod state;
mod udp;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hyper::StatusCode;
use meshd_agent::interfaces::{self, Interface};
use meshd_agent::source::mdns::tag_matches;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::admin::view;
use crate::api::{Finding, code};
use crate::config::Config;
use crate::control::link::LinkError;
use crate::daemon::{Daemon, Member, Phase, acquire, lan};
use crate::intercept::nft::{self, Ruleset};
use crate::task::{self, Tasks};
use findings::Findings;

/// Whatever is in use to this many per cent is nearly full.
const LIMIT_NEAR: u64 = 80;
/// How long a group may take: a peer that does not answer takes five seconds, a module that is loaded some of them.
const PATIENCE: Duration = Duration::from_secs(15);
/// So soon after the others were heard a mesh has made the authorities it makes by itself.
const SOON: Duration = Duration::from_secs(600);
/// A host that has heard where its mesh moves is there after so long.
const FOLLOWING: Duration = Duration::from_secs(10);
/// Hosts asked whether they are of this mesh.
const MAX_RIVALS: usize = 8;
/// Anybody on the host may ask for a check, and it is work for the other members too: so many at once, the others wait.
static AT_ONCE: Semaphore = Semaphore::const_new(2);

/// Who asks: that decides what missing rights mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// The daemon, about itself.
    Daemon,
    /// A command that found no daemon.
    Command,
}

/// What is well and what is not with a running daemon, group by group.
pub(crate) async fn of_daemon(daemon: &Arc<Daemon>) -> Vec<Finding> {
    let _turn = AT_ONCE.acquire().await;
    let member = daemon.member();
    let interfaces = Arc::new(lan::facts().unwrap_or_default());
    let config = Arc::new(daemon.config().clone());
    let some = member.as_ref().ok().cloned();
    let met = within_peers(some.clone());
    let rivals = rivals(daemon, some.as_deref());
    let window = match &some {
        Some(member) if member.membership.is_authority().await => member.membership.window().await,
        _ => None,
    };
    let (
        process,
        permissions,
        kernel,
        ports,
        rules,
        firewall,
        clock,
        state,
        kept,
        fleet,
        paper,
        met,
        rivals,
        addresses,
        network,
        coverage,
    ) = tokio::join!(
        reading("daemon", {
            let (uptime, counters) = (daemon.uptime().as_secs(), some.as_deref().map(counters));
            move || [process::findings(&process::Facts::read(uptime, counters)), process::others(By::Daemon)].concat()
        }),
        reading("permissions", {
            let config = config.clone();
            move || permissions::findings(&permissions::Facts::read(&config, By::Daemon))
        }),
        reading("kernel", {
            let config = config.clone();
            move || kernel::findings(&kernel::Facts::read(&config))
        }),
        reading("ports", {
            let (config, member) = (config.clone(), some.is_some());
            let closed = daemon.admin_trouble().all().into_iter().map(|(address, why)| format!("{address}: {why}")).collect();
            move || ports::findings(&ports::Facts { closed, ..ports::Facts::read(&config, By::Daemon, member) })
        }),
        reading("rules", {
            let member = some.clone();
            move || member.map(|m| rules::findings(&m.rules.examine())).unwrap_or_default()
        }),
        reading("firewall", {
            let peers = some.as_ref().map(|m| m.book.latest().captured.keys().copied().collect()).unwrap_or_default();
            let (config, interfaces) = (config.clone(), interfaces.clone());
            move || firewall::findings(&firewalls(ruleset(), &config, &interfaces, peers))
        }),
        reading("clock", {
            let clock = daemon.clock().clone();
            move || clock::findings(&clock::Facts::read(Some(&clock)))
        }),
        reading("state", {
            let (path, store) = (config.state_dir.clone(), daemon.store().clone());
            move || state::findings(&state::Facts::read(&path, By::Daemon, Some((store.noticed(), store.narrowed()))))
        }),
        reading("state", {
            let (path, member) = (config.state_dir.clone(), some.clone());
            move || backup::findings(member.and_then(|m| backup::Facts::read(&path, &m)).as_ref())
        }),
        reading("fleet", {
            let (config, member) = (config.clone(), some.is_some());
            move || fleet::findings(&fleet::Facts::read(&config, member, window))
        }),
        reading("mesh", {
            let (path, member) = (config.state_dir.clone(), some.clone());
            move || recovery::findings(member.and_then(|m| recovery::Facts::read(&path, &m)).as_ref())
        }),
        met,
        rivals,
        reading("addresses", {
            let (member, port) = (some.clone(), config.port);
            let published: Vec<IpAddr> = daemon.lan().addresses().borrow().published.iter().copied().collect();
            move || member.map(|m| addresses::findings(&addresses::Facts::read(&m, &published), port)).unwrap_or_default()
        }),
        reading("network", {
            let (config, interfaces, heard) = (config.clone(), interfaces.clone(), daemon.lan().seen().len());
            move || network::findings(&network::Facts::read(&config, &interfaces, Some(heard)))
        }),
        reading("coverage", {
            let (member, config) = (some.clone(), config.clone());
            move || {
                coverage::findings(&coverage::Facts {
                    containers: coverage::containers(&interfaces),
                    member: member.map(|m| covered(&m, &config)),
                })
            }
        }),
    );
    let mut found = [process, permissions, kernel, ports, rules, firewall, clock, state, kept].concat();
    match (member, met) {
        (Ok(member), Ok(met)) => {
            found.extend(mesh::findings(&mesh::Facts { rivals, ..in_mesh(daemon, &member, &met) }, &met));
            found.extend(paper);
            found.extend(identity::findings(&identity::Facts::read(&member)));
            found.extend(peers::findings(&met, config.mode, config.port));
        }
        (Ok(_), Err(late)) => found.extend(late),
        (Err(no), _) => {
            let left = matches!(daemon.phase(), Phase::Left | Phase::Banished);
            found.extend(mesh::no_member(no.1.why, no.1.remedy, left));
        }
    }
    [found, fleet, addresses, network, coverage].concat()
}

/// What can be said of this host without a daemon: whether one could work here.
pub(crate) async fn of_host(config: &Config) -> Vec<Finding> {
    let config = Arc::new(config.clone());
    let interfaces = Arc::new(lan::facts().unwrap_or_default());
    let with = |config: &Arc<Config>| config.clone();
    let (process, permissions, kernel, ports, rules, firewall, clock, state, fleet, network, coverage) = tokio::join!(
        reading("daemon", || process::others(By::Command)),
        reading("permissions", {
            let config = with(&config);
            move || permissions::findings(&permissions::Facts::read(&config, By::Command))
        }),
        reading("kernel", {
            let config = with(&config);
            move || kernel::findings(&kernel::Facts::read(&config))
        }),
        reading("ports", {
            let config = with(&config);
            move || ports::findings(&ports::Facts::read(&config, By::Command, false))
        }),
        reading("rules", || rules::leftovers(ruleset().as_ref())),
        reading("firewall", {
            let (config, interfaces) = (with(&config), interfaces.clone());
            move || firewall::findings(&firewalls(ruleset(), &config, &interfaces, Vec::new()))
        }),
        reading("clock", || clock::findings(&clock::Facts::read(None))),
        reading("state", {
            let path = config.state_dir.clone();
            move || state::findings(&state::Facts::read(&path, By::Command, None))
        }),
        reading("fleet", {
            let config = with(&config);
            move || fleet::findings(&fleet::Facts::read(&config, joined(&config), None))
        }),
        reading("network", {
            let (config, interfaces) = (with(&config), interfaces.clone());
            move || network::findings(&network::Facts::read(&config, &interfaces, None))
        }),
        reading("coverage", {
            move || coverage::findings(&coverage::Facts { containers: coverage::containers(&interfaces), member: None })
        }),
    );
    [process, permissions, kernel, ports, rules, firewall, clock, state, fleet, network, coverage].concat()
}

/// Whether a daemon that is not running now was in a mesh.
fn joined(config: &Config) -> bool {
    config.state_dir.join(crate::membership::ROSTER).exists()
}

/// Runs one group where it may block, within its time.
fn reading(group: &'static str, read: impl FnOnce() -> Vec<Finding> + Send + 'static) -> impl Future<Output = Vec<Finding>> {
    within_patience(group, task::blocking(read))
}

async fn within_patience(group: &'static str, reading: JoinHandle<Vec<Finding>>) -> Vec<Finding> {
    match timeout(PATIENCE, reading).await {
        Ok(Ok(found)) => found,
        Ok(Err(_)) => unfinished(group, "a defect of meshd ended it"),
        Err(_) => unfinished(group, "it took too long"),
    }
}

fn unfinished(group: &'static str, why: &str) -> Vec<Finding> {
    let mut found = Findings::of(group);
    found.warn(code::DAEMON, "this group was looked at", why, "look again; if it stays so, report it with the log of meshd");
    found.done()
}

async fn within_peers(member: Option<Arc<Member>>) -> Result<Vec<peers::Met>, Vec<Finding>> {
    let Some(member) = member else { return Ok(Vec::new()) };
    let everybody = member.membership.roster().active().count();
    // A large mesh of hosts that are all gone is asked in rounds.
    let patience = PATIENCE + Duration::from_millis(everybody as u64 * 200);
    timeout(patience, peers::ask(&member)).await.map_err(|_| unfinished("peers", "it took too long"))
}

fn counters(member: &Member) -> process::Counters {
    let (front, proxy) = (&member.door, &member.proxy);
    process::Counters {
        panics: proxy.panics(),
        accepted: front.accepted.load(Relaxed),
        crowded: front.crowded.load(Relaxed),
        failed: front.failed.load(Relaxed),
        overloads: proxy.live.overloads(),
        open: proxy.live.count(),
        limits: proxy.live.limits(),
        dropped: proxy.edges.dropped(),
    }
}

/// The tables of this network namespace, where this user may see them.
fn ruleset() -> Option<Ruleset> {
    nft::ruleset().ok()
}

fn firewalls(ruleset: Option<Ruleset>, config: &Config, all: &[Interface], peers: Vec<IpAddr>) -> firewall::Facts {
    let names: Vec<String> = interfaces::lan(all).into_iter().collect();
    firewall::Facts::read(ruleset, config.port, names, interfaces::publishable(all), peers)
}

fn covered(member: &Member, config: &Config) -> coverage::Covered {
    let (book, roster, catalog) = (member.book.latest(), member.membership.roster(), member.catalog());
    let skip: BTreeSet<u16> = member.skip_ports().clone();
    let ways = coverage::Ways {
        members: book.captured.keys().copied().collect(),
        mesh_port: config.port,
        capture_port: config.capture_port,
        skip: skip.clone(),
    };
    let others = catalog.records().map(|r| r.record()).filter(|r| r.node != member.me());
    let services = others.flat_map(|r| r.listeners.iter().map(move |l| (r.node, l.port)));
    let name = |node| roster.member(node).map_or_else(String::new, |m| m.name.to_string());
    let counted = config.mode != crate::config::Mode::Permissive;
    coverage::Covered {
        mode: config.mode,
        plaintext: counted.then(|| member.rules.counters().map(|c| c.plaintext)).flatten(),
        older: ways.look(),
        skipped: services.filter(|(_, port)| skip.contains(port)).map(|(node, port)| (name(node), port)).collect(),
        udp: ways.udp(),
    }
}

/// Who on the LAN announces this mesh, answers, and is none of its members. Only who was given the id of a mesh can announce it so.
async fn rivals(daemon: &Daemon, member: Option<&Member>) -> Vec<SocketAddr> {
    let Some(member) = member else { return Vec::new() };
    if member.membership.unsettled().await.is_some_and(|(_, side)| side.founder == member.me()) {
        // One of the two gives way, by itself.
        return Vec::new();
    }
    let seen = acquire::strangers(daemon.lan(), member, member.mesh());
    let mut asked = Tasks::new();
    for address in seen.into_iter().filter_map(|s| s.addresses.first().copied()).take(MAX_RIVALS) {
        let links = member.links.clone();
        asked.spawn(async move { (address, links.prove(address).await) });
    }
    let mut rivals = Vec::new();
    while let Some(answer) = asked.join_next().await {
        if let Ok((address, Err(LinkError::Refused(_, StatusCode::FORBIDDEN, _) | LinkError::Stranger(..)))) = answer {
            rivals.push(address);
        }
    }
    rivals.sort_unstable();
    rivals
}

fn in_mesh(daemon: &Daemon, member: &Member, met: &[peers::Met]) -> mesh::Facts {
    let (roster, catalog) = (member.membership.roster(), member.catalog());
    let moment = member.authorities.moment();
    let name = |node| roster.member(node).map_or_else(String::new, |m| m.name.to_string());
    let answers = |name: &str| met.iter().any(|m| m.name == name && m.handshake.is_ok());
    let known: BTreeSet<IpAddr> = catalog.records().flat_map(|r| r.record().addresses.iter().map(|a| a.ip)).collect();
    let own = member.own_addresses();
    let strangers = daemon.lan().seen().into_iter().filter(|s| s.tag.is_some_and(|t| !tag_matches(roster.mesh(), &t)));
    mesh::Facts {
        name: member.membership.name().to_string(),
        trust_domain: roster.trust_domain().to_string(),
        seats: roster.members().count(),
        bytes: roster.to_bytes().len(),
        authorities: roster.authorities().map(|m| m.name.to_string()).collect(),
        reach: roster.authorities().any(|m| m.node() == member.me() || member.hears(m.node()) || answers(m.name.as_str())),
        signing: moment.view().signing().into_iter().map(name).collect(),
        wanted: moment.view().wanted(),
        coming: moment.view().coming(SOON),
        rivals: Vec::new(),
        moving: view::moving(member).filter(|_| member.moving.now().is_some_and(|(since, _)| since >= FOLLOWING)),
        // What a member announced in an earlier life is remembered too.
        strangers: strangers
            .filter(|s| !s.addresses.iter().any(|a| known.contains(&a.ip()) || own.contains(&a.ip())))
            .filter_map(|s| s.addresses.first().copied())
            .collect(),
    }
}
