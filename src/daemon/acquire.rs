//! From no mesh to a mesh: look, found, wait, or join.
//!
//! The rule that matters: a host without a token never joins by itself and never founds a second mesh beside one it can see. What is
//! seen is only a hint, so a liar on the LAN can make a new host wait, and nothing else.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use meshd_agent::source::mdns::{Sighting, tag_matches};
use meshd_ca::identity::MeshId;
use meshd_ca::join::{JoinError, Joined};
use meshd_ca::keys::PrivateKey;
use meshd_ca::token::JoinToken;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::kernel::Marked;
use super::lan::Lan;
use super::{Daemon, GONE, Member, Phase, Place, Request, Stop, successor};
use crate::admin::local::No;
use crate::api::{self, Done};
use crate::config::Config;
use crate::control::join::{self, JoinFailure, Ticket};
use crate::control::link::Dial;
use crate::identity::provider;
use crate::identity::tls::NodeTls;
use crate::membership::Membership;

/// How long a join looks for the mesh of its token on the LAN when the token's own addresses do not answer.
const SEARCH: Duration = Duration::from_secs(6);
/// How often a host without a token asks to be let in, in its first minutes of waiting and later.
const ASK: Duration = Duration::from_secs(4);
const ASK_LATER: Duration = Duration::from_secs(25);
const EAGER: Duration = Duration::from_secs(600);
/// Whom it asks at most each time.
const MAX_ASKED: usize = 16;
/// How long a host that has no address waits for its network before it founds a mesh all the same.
const NO_NETWORK: Duration = Duration::from_secs(30);
/// How often the LAN is looked at while searching.
const STEP: Duration = Duration::from_millis(100);

/// Waits, looks and asks until this node has a place in a mesh; `None` when the process is told to stop first.
pub(super) async fn acquire(
    daemon: &Arc<Daemon>,
    inbox: &mut mpsc::Receiver<Request>,
    stop: &mut Stop,
) -> anyhow::Result<Option<Place>> {
    let gone = daemon.store.load(GONE)?.map(|saved| saved.bytes.to_vec());
    match gone.as_deref() {
        Some(b"banished") => daemon.enter(Phase::Banished),
        Some(_) => daemon.enter(Phase::Left),
        None => daemon.enter(Phase::New),
    }
    let config = daemon.config();
    let mut patience = Patience { begun: Instant::now(), network: None };
    let mut asking = pin!(ask(daemon, None));
    loop {
        let idle = daemon.phase();
        let waiting = matches!(idle, Phase::Pending(_));
        let looking = gone.is_none() && matches!(idle, Phase::New);
        tokio::select! {
            _ = stop.asked() => return Ok(None),
            request = inbox.recv() => match request {
                Some(Request::Join(token, reply)) => {
                    daemon.enter(Phase::Joining);
                    match redeem(&daemon.config(), &daemon.lan, &daemon.key, &token).await {
                        Ok(joined) => {
                            let (place, answer) = adopt(daemon, joined)?;
                            let _ = reply.send(Ok(answer));
                            return Ok(Some(place));
                        }
                        Err(failure) => {
                            tracing::warn!(%failure, "could not join");
                            daemon.enter(idle);
                            let _ = reply.send(Err(no(&failure)));
                        }
                    }
                }
                Some(Request::Leave(reply)) => {
                    let _ = reply.send(Ok(Done {}));
                }
                Some(Request::Upgrade(reply)) => {
                    let _ = reply.send(Err(successor::no("this host is in no mesh and has no connections to keep: restart it instead")));
                }
                None => return Ok(None),
            },
            joined = &mut asking, if waiting => {
                tracing::info!(mesh = %joined.0.roster.mesh(), "approved");
                return Ok(Some(adopt(daemon, joined)?.0));
            }
            seen = look(daemon, &mut patience), if looking => match seen {
                Some(address) => {
                    tracing::info!(%address, "a mesh is there and this host has no token for it: waiting");
                    daemon.enter(Phase::Pending(format!("a mesh answers at {address}, and this host has no token for it")));
                }
                None => {
                    let name = config.host_name.clone();
                    let membership = Membership::found(
                        daemon.key.clone(), daemon.store.clone(), daemon.clock.clone(), name, config.trust_domain.clone(),
                    )?;
                    tracing::info!(mesh = %membership.roster().mesh(), "no mesh seen: founded one");
                    return Ok(Some((membership, Vec::new())));
                }
            },
        }
    }
}

/// How long a new host looks for a mesh: from when on there is a network to look at, which on Wi-Fi is long after the start.
struct Patience {
    begun: Instant,
    network: Option<Instant>,
}

impl Patience {
    fn is_over(&mut self, daemon: &Daemon) -> bool {
        if self.network.is_none() && daemon.lan.has_address() {
            self.network = Some(Instant::now());
        }
        let found_after = daemon.config().found_after;
        self.network.map_or(self.begun + NO_NETWORK.max(found_after), |up| up + found_after) <= Instant::now()
    }
}

/// Looks for any mesh until `patience` is over.
async fn look(daemon: &Daemon, patience: &mut Patience) -> Option<SocketAddr> {
    let mut peers = peer_addresses(&daemon.config()).await;
    loop {
        if let Some(seen) = daemon.lan.seen().iter().find_map(|s| s.addresses.first().copied()) {
            return Some(seen);
        }
        // A configured peer that answers is a mesh that can be seen.
        if let Some(peer) = peers.pop()
            && let Ok(Ok(_)) = tokio::time::timeout(Duration::from_secs(1), Marked.dial(peer)).await
        {
            return Some(peer);
        }
        if patience.is_over(daemon) && peers.is_empty() {
            return None;
        }
        sleep(STEP).await;
    }
}

/// Who is on the LAN and not of this mesh.
pub(super) fn strangers(lan: &Lan, own: Option<MeshId>) -> impl Iterator<Item = Sighting> {
    lan.seen().into_iter().filter(move |s| own.is_none_or(|own| s.tag.is_some_and(|tag| !tag_matches(own, &tag))))
}

/// Asks whoever can be seen to let this host in, until somebody has typed its code there. `own` is what it is a member as meanwhile; one
/// that is not alone asks nobody.
pub(super) async fn ask(daemon: &Daemon, own: Option<&Member>) -> (Joined, SocketAddr) {
    let begun = Instant::now();
    loop {
        if own.is_none_or(Member::is_alone) {
            let config = daemon.config();
            let peers = peer_addresses(&config).await.into_iter().map(|peer| vec![peer]);
            let seen = strangers(&daemon.lan, own.map(Member::mesh)).map(|s| s.addresses);
            let candidates: Vec<Vec<SocketAddr>> = seen.chain(peers).take(MAX_ASKED).collect();
            if let Some(joined) = ask_once(daemon, &config, &candidates).await {
                return joined;
            }
        }
        let pause = if begun.elapsed() < EAGER { ASK } else { ASK_LATER };
        // Hosts that were switched on together do not ask together for ever.
        let jitter = meshd_ca::keys::random().map_or(0, u16::from_be_bytes);
        sleep(pause.mul_f64(0.8 + 0.4 * f64::from(jitter) / f64::from(u16::MAX))).await;
    }
}

/// Asks each of `candidates` at the first of its addresses where it answers.
async fn ask_once(daemon: &Daemon, config: &Config, candidates: &[Vec<SocketAddr>]) -> Option<(Joined, SocketAddr)> {
    let tls = NodeTls::new(&provider::provider(provider::has_aes()), &daemon.key).ok()?.join_client;
    for addresses in candidates {
        for address in addresses {
            let ticket = Ticket::Code(&daemon.code);
            match join::join(ticket, &[*address], &daemon.key, &config.host_name, tls.clone(), &Marked).await {
                Ok(joined) => return Some((joined, *address)),
                Err(failure) => {
                    tracing::debug!(%failure, "asked to be let in");
                    if matches!(failure, JoinFailure::Refused(..)) {
                        break;
                    }
                }
            }
        }
    }
    None
}

/// Takes the place that a join has granted, which was found `through` an address.
pub(super) fn adopt(daemon: &Daemon, (joined, through): (Joined, SocketAddr)) -> anyhow::Result<(Place, api::Joined)> {
    let (membership, answer) = super::settle(&daemon.key, &daemon.store, &daemon.clock, joined)?;
    Ok(((membership, vec![through]), answer))
}

/// The configured addresses of other members. Names are looked up each time: they may not have been known at boot.
pub(super) async fn peer_addresses(config: &Config) -> Vec<SocketAddr> {
    let mut addresses = Vec::new();
    for peer in &config.peers {
        match tokio::net::lookup_host((peer.host(), peer.port())).await {
            Ok(found) => addresses.extend(found.take(4)),
            Err(error) => tracing::warn!(peer = peer.host(), %error, "a configured peer has no address"),
        }
    }
    addresses
}

/// What a token means to a node that is a member already: the same mesh is no work, an own mesh of one is given up for it, any other is
/// refused.
pub(super) fn already(current: Option<&Membership>, token: &JoinToken) -> anyhow::Result<Option<api::Joined>> {
    let Some(current) = current else { return Ok(None) };
    let roster = current.roster();
    if roster.mesh() == token.mesh {
        return Ok(Some(api::Joined { mesh: token.mesh, name: current.name(), already: true }));
    }
    if roster.active().count() > 1 {
        anyhow::bail!("this host is a member of mesh {} with others; `meshd leave` first", roster.mesh());
    }
    Ok(None)
}

/// Carries out a join: first the addresses in the token, then configured peers, then whoever on the LAN shows the tag of that mesh.
pub(super) async fn redeem(
    config: &Config,
    lan: &Lan,
    key: &PrivateKey,
    token: &JoinToken,
) -> Result<(Joined, SocketAddr), JoinFailure> {
    let tls =
        NodeTls::new(&provider::provider(provider::has_aes()), key).map_err(|e| JoinFailure::Local(e.to_string()))?.join_client;
    let dial = Marked;
    let peers = peer_addresses(config).await;
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut failure = JoinFailure::NoAddress;
    let end = Instant::now() + SEARCH;
    loop {
        let on_lan =
            lan.seen().into_iter().filter(|s| s.tag.is_some_and(|t| tag_matches(token.mesh, &t))).flat_map(|s| s.addresses);
        let known = token.hints.iter().copied().chain(peers.iter().copied());
        let fresh: Vec<_> = known.chain(on_lan).filter(|a| !tried.contains(a)).collect();
        for address in fresh {
            if tried.contains(&address) {
                continue;
            }
            tried.push(address);
            match join::join(Ticket::Token(token), &[address], key, &config.host_name, tls.clone(), &dial).await {
                Ok(joined) => return Ok((joined, address)),
                // Another member, or somebody who copies the announcement of one: the authority may still answer elsewhere.
                Err(other @ JoinFailure::Refused(_, JoinError::WrongAuthority(_))) => {
                    failure = join::more_telling(failure, other);
                }
                Err(refused @ JoinFailure::Refused(..)) => return Err(refused),
                Err(other) => failure = join::more_telling(failure, other),
            }
        }
        if Instant::now() >= end || !config.mdns {
            return Err(failure);
        }
        sleep(STEP).await;
    }
}

pub(super) fn no(failure: &JoinFailure) -> No {
    No::new(
        StatusCode::BAD_GATEWAY,
        "could not join",
        failure,
        "a token works once, for the time it was made for; make a new one with `meshd token create`",
    )
}
