//! From no mesh to a mesh: look, found, wait, or join.
//!
//! The rule that matters: a host without a token never joins by itself and never founds a second mesh beside one it can see. What is
//! seen is only a hint, so a liar on the LAN can make a new host wait, and nothing else. A host with a fleet token looks for the mesh of its
//! fleet only, asks to be let in by itself, and founds that mesh where it sees none of it. Hosts that did so at the same moment find
//! each other afterwards ([`ask`]), and all but one give their mesh up.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use meshd_agent::source::mdns::{Sighting, tag_matches};
use meshd_ca::fleet::{FleetKey, FleetToken, Side};
use meshd_ca::identity::MeshId;
use meshd_ca::join::{JoinError, Joined, Wish};
use meshd_ca::keys::PrivateKey;
use meshd_ca::token::JoinToken;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::kernel::Marked;
use super::lan::Lan;
use super::{BANISHED, Daemon, Member, Phase, Place, REPLACED, Request, Stop, successor};
use crate::admin::local::No;
use crate::api::{self, Done};
use crate::config::Config;
use crate::control::join::{self, JoinFailure, Ticket};
use crate::control::link::Dial;
use crate::fleet;
use crate::identity::provider;
use crate::identity::tls::NodeTls;
use crate::membership::Membership;
use crate::recovery;

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
/// How many times longer a host with a fleet token looks: once, and as long again multiplied by a number below 1 that its key decides. So
/// of cards that are switched on together, most find the mesh of the first.
const FLEET: u32 = 5;
/// For how long nobody of the fleet must be seen until a host that waits for its mesh looks for it anew, and founds it perhaps.
const UNSEEN: Duration = Duration::from_secs(20);
/// For how long a founder must not be heard until those who are in its mesh look for another one of the fleet.
const ORPHANED: Duration = Duration::from_secs(10);
/// How often the LAN is looked at while searching.
const STEP: Duration = Duration::from_millis(100);

/// Waits, looks and asks until this node has a place in a mesh; `None` when the process is told to stop first.
pub(super) async fn acquire(
    daemon: &Arc<Daemon>,
    inbox: &mut mpsc::Receiver<Request>,
    stop: &mut Stop,
) -> anyhow::Result<Option<Place>> {
    let gone = super::past(&daemon.store)?.map(|(why, _)| why);
    match gone.as_deref() {
        Some(BANISHED | REPLACED) => daemon.enter(Phase::Banished),
        Some(_) => daemon.enter(Phase::Left),
        None => daemon.enter(Phase::New),
    }
    let config = daemon.config();
    let fleet = if gone.is_some() { None } else { fleet_token(&config) };
    let mut patience = Patience::new(daemon, fleet.is_some());
    let mut asking = pin!(ask(daemon, None, fleet.as_ref()));
    let mut answers_at = None;
    loop {
        let idle = daemon.phase();
        let waiting = matches!(idle, Phase::Pending(_));
        let looking = gone.is_none() && matches!(idle, Phase::New);
        tokio::select! {
            _ = stop.asked() => return Ok(None),
            request = inbox.recv() => match request {
                Some(Request::Join(token, reply)) => {
                    daemon.enter(Phase::Joining);
                    match redeem(&daemon.config(), &daemon.lan, &daemon.key, &super::wish(&daemon.config(), &daemon.store), &token).await {
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
                let by_fleet = joined.0.fleet.is_some();
                tracing::info!(mesh = %joined.0.roster.mesh(), by_fleet, "let in");
                return Ok(Some(adopt(daemon, joined)?.0));
            }
            () = unseen(daemon, fleet.as_ref()), if waiting && fleet.is_some() => {
                tracing::info!("no mesh of this host's fleet is there any more: looking again");
                patience = Patience::new(daemon, true);
                daemon.enter(Phase::New);
            }
            seen = moved(daemon, fleet.as_ref(), answers_at), if waiting => {
                answers_at = seen;
                daemon.enter(Phase::Pending(waits_for(seen, fleet.is_some())));
            }
            seen = look(daemon, &mut patience, fleet.as_ref()), if looking => match seen {
                Some(address) => {
                    tracing::info!(%address, by_fleet = fleet.is_some(), "a mesh is there: waiting to be let in");
                    answers_at = Some(address);
                    daemon.enter(Phase::Pending(waits_for(answers_at, fleet.is_some())));
                }
                None => {
                    let name = config.host_name.clone();
                    let (key, store, clock) = (daemon.key.clone(), daemon.store.clone(), daemon.clock.clone());
                    let recovery = Some(recovery::prepare(&config.state_dir)?);
                    let membership = match &fleet {
                        Some(token) => Membership::found_fleet(key, store, clock, name, token, recovery)?,
                        None => Membership::found(key, store, clock, name, config.trust_domain.clone(), recovery)?,
                    };
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
    look: Duration,
}

impl Patience {
    fn new(daemon: &Daemon, fleet: bool) -> Self {
        let mut look = daemon.config().found_after;
        if fleet {
            let [of_key, ..] = *daemon.node().as_bytes();
            look = (look * FLEET).mul_f64(1.0 + f64::from(of_key) / 256.0);
        }
        Self { begun: Instant::now(), network: None, look }
    }

    fn is_over(&mut self, daemon: &Daemon) -> bool {
        if self.network.is_none() && daemon.lan.has_address() {
            self.network = Some(Instant::now());
        }
        self.network.map_or(self.begun + NO_NETWORK.max(self.look), |up| up + self.look) <= Instant::now()
    }
}

/// The fleet token of this host, if it has one that can be used.
fn fleet_token(config: &Config) -> Option<FleetToken> {
    let card = fleet::find(config)?;
    if let Some(trouble) = card.trouble() {
        tracing::warn!("{trouble}; going on without it: {}", fleet::REMEDY);
    }
    card.token.ok()
}

/// Removes the fleet token of this host once it is in the mesh of that fleet, however it came there.
pub(super) fn spend(config: &Config, membership: &Membership) {
    let Some(card) = fleet::find(config) else { return };
    let path = card.path.display();
    match &card.token {
        Ok(token) if token.mesh() == membership.roster().mesh() => match fleet::remove(&card.path) {
            Ok(()) => tracing::info!(%path, "the fleet token has done its work and was removed"),
            Err(error) => {
                tracing::warn!(%path, %error, "the fleet token could not be removed: whoever has this card has the token")
            }
        },
        Ok(_) => tracing::warn!(%path, "a fleet token is there, and this host is a member of another mesh"),
        Err(why) => tracing::warn!(%path, why, "the fleet token there cannot be used"),
    }
}

/// Whether a neighbour may be of the mesh that this host looks for. A tag that has not been heard yet may be the right one.
fn ours(fleet: Option<&FleetToken>, sighting: &Sighting) -> bool {
    fleet.is_none_or(|f| sighting.tag.is_none_or(|tag| tag_matches(f.mesh(), &tag)))
}

/// Ends when nobody of the fleet's mesh was seen for a while: those that were there have been switched off, or it was a lie. Where
/// addresses of members are configured, the mesh is known to be there some day.
async fn unseen(daemon: &Daemon, fleet: Option<&FleetToken>) {
    let mut last = Instant::now();
    while last.elapsed() < UNSEEN {
        if !daemon.config().peers.is_empty() || daemon.lan.seen().iter().any(|s| ours(fleet, s)) {
            last = Instant::now();
        }
        sleep(Duration::from_secs(1)).await;
    }
}

/// Why a host waits, if the mesh that it saw answers there, or nowhere any more.
fn waits_for(answers_at: Option<SocketAddr>, fleet: bool) -> String {
    match answers_at {
        Some(address) if fleet => format!("a mesh answers at {address}, which has not let this host in with its fleet token yet"),
        Some(address) => format!("a mesh answers at {address}, and this host has no token for it"),
        None => {
            "the mesh that was seen is not there any more: this host waits for it; restart meshd here to look for another, or found one".into()
        }
    }
}

/// Ends when the mesh that was seen at `before` is not seen there any more, or anywhere again, and says where it is now.
async fn moved(daemon: &Daemon, fleet: Option<&FleetToken>, before: Option<SocketAddr>) -> Option<SocketAddr> {
    loop {
        sleep(Duration::from_secs(1)).await;
        let seen = daemon.lan.seen().into_iter().filter(|s| ours(fleet, s)).flat_map(|s| s.addresses);
        let seen: Vec<SocketAddr> = seen.collect();
        let now = before.filter(|b| seen.contains(b)).or(seen.first().copied());
        // What was configured need not announce itself.
        if now != before && (now.is_some() || daemon.config().peers.is_empty()) {
            return now;
        }
    }
}

/// Looks for any mesh until `patience` is over; with a fleet token, for that of the fleet.
async fn look(daemon: &Daemon, patience: &mut Patience, fleet: Option<&FleetToken>) -> Option<SocketAddr> {
    let mut peers = peer_addresses(&daemon.config()).await;
    loop {
        if let Some(seen) = daemon.lan.seen().iter().filter(|s| ours(fleet, s)).find_map(|s| s.addresses.first().copied()) {
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

/// Who is on the LAN and not known as a member of the mesh of `own`: it may be one of another founder of its fleet.
pub(super) fn others(lan: &Lan, own: &Member) -> Vec<Sighting> {
    let (mesh, alone) = (own.mesh(), own.is_alone());
    let mut others = strangers(lan, own, mesh);
    let of_another = |s: &Sighting| s.tag.is_some_and(|tag| !tag_matches(mesh, &tag));
    others.extend(lan.seen().into_iter().filter(|s| alone && of_another(s)));
    others
}

/// Who is on the LAN, announces the mesh `id`, and is not known as a member of the own one.
pub(crate) fn strangers(lan: &Lan, own: &Member, id: MeshId) -> Vec<Sighting> {
    let catalog = own.catalog();
    let known =
        |ip| own.own_addresses().contains(&ip) || catalog.records().any(|r| r.record().addresses.iter().any(|a| a.ip == ip));
    let of_it = |s: &Sighting| s.tag.is_some_and(|tag| tag_matches(id, &tag));
    lan.seen().into_iter().filter(|s| of_it(s) && !s.addresses.iter().any(|a| known(a.ip()))).collect()
}

/// Which mesh of its fleet `own` may still leave for another one: if it founded that mesh, or the founder is not there any more.
async fn may_leave(own: &Member, begun: Instant) -> Option<(FleetKey, Side)> {
    let (key, side) = own.membership.unsettled().await?;
    let orphaned = || begun.elapsed() > ORPHANED && own.last_heard(side.founder).is_none_or(|silent| silent > ORPHANED);
    (side.founder == own.me() || orphaned()).then_some((key, side))
}

/// Asks whoever can be seen to let this host in: with its fleet token, and until somebody has typed its code there. `own` is what it is a
/// member as meanwhile; one that is not alone and may not leave asks nobody.
pub(super) async fn ask(daemon: &Daemon, own: Option<&Member>, fleet: Option<&FleetToken>) -> (Joined, SocketAddr) {
    let begun = Instant::now();
    loop {
        let leaves = match own {
            Some(own) => may_leave(own, begun).await,
            None => None,
        };
        let alone = own.is_none_or(Member::is_alone);
        if alone || leaves.is_some() {
            let config = daemon.config();
            let of_fleet = match (own, &leaves, fleet) {
                (Some(own), Some((key, side)), _) => Some((own.mesh(), key.clone(), Some((*side, &*own.membership)))),
                (None, _, Some(token)) => Some((token.mesh(), token.key(), None)),
                _ => None,
            };
            // Only those can be of the fleet that announce its mesh, or announce nothing.
            let may_be = |s: &Sighting| {
                let mesh = of_fleet.as_ref().map(|(mesh, ..)| *mesh);
                mesh.is_some_and(|mesh| s.tag.is_none_or(|tag| tag_matches(mesh, &tag)))
            };
            let seen = own.map_or_else(|| daemon.lan.seen(), |own| others(&daemon.lan, own));
            let seen = seen.into_iter().map(|s| (may_be(&s), s.addresses));
            let peers = peer_addresses(&config).await.into_iter().map(|peer| (of_fleet.is_some(), vec![peer]));
            let mut candidates: Vec<(bool, Vec<SocketAddr>)> = seen.chain(peers).collect();
            // Among many there may be few authorities.
            some_of(&mut candidates, MAX_ASKED);
            let of_fleet = of_fleet.as_ref().map(|(mesh, key, leaves)| Ticket::Fleet(*mesh, key, *leaves));
            let code = alone.then_some(Ticket::Code(&daemon.code));
            let with = |(fleet, addresses)| (of_fleet.filter(|_| fleet).into_iter().chain(code).collect(), addresses);
            let candidates: Vec<Candidate<'_>> = candidates.into_iter().map(with).collect();
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

/// Leaves so many of these at most, not the same ones each time.
pub(super) fn some_of<T>(all: &mut Vec<T>, most: usize) {
    let first = meshd_ca::keys::random().map_or(0, u32::from_be_bytes) as usize % all.len().max(1);
    all.rotate_left(first);
    all.truncate(most);
}

/// With what somebody is asked, and where he may be.
type Candidate<'a> = (Vec<Ticket<'a>>, Vec<SocketAddr>);

/// Asks each of `candidates` at the first of its addresses where it answers.
async fn ask_once(daemon: &Daemon, config: &Config, candidates: &[Candidate<'_>]) -> Option<(Joined, SocketAddr)> {
    let tls = NodeTls::new(&provider::provider(provider::has_aes()), &daemon.key).ok()?.join_client;
    let wish = super::wish(config, &daemon.store);
    for (tickets, addresses) in candidates {
        'addresses: for address in addresses {
            for ticket in tickets {
                match join::join(*ticket, &[*address], &daemon.key, &wish, tls.clone(), &Marked).await {
                    Ok(joined) => return Some((joined, *address)),
                    Err(failure) => {
                        tracing::debug!(%failure, "asked to be let in");
                        if !matches!(failure, JoinFailure::Refused(..)) {
                            continue 'addresses;
                        }
                    }
                }
            }
            break;
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

/// Carries out a join.
pub(super) async fn redeem(
    config: &Config,
    lan: &Lan,
    key: &PrivateKey,
    wish: &Wish,
    token: &JoinToken,
) -> Result<(Joined, SocketAddr), JoinFailure> {
    let tls = join_tls(key)?;
    seek(config, lan, token, |address| {
        let tls = tls.clone();
        Box::pin(async move { join::join(Ticket::Token(token), &[address], key, wish, tls, &Marked).await })
    })
    .await
}

/// How a connection for a join is made.
pub(super) fn join_tls(key: &PrivateKey) -> Result<Arc<rustls::ClientConfig>, JoinFailure> {
    let tls = NodeTls::new(&provider::provider(provider::has_aes()), key).map_err(|e| JoinFailure::Local(e.to_string()))?;
    Ok(tls.join_client)
}

/// What is tried at an address.
type Attempt<'a, T> = std::pin::Pin<Box<dyn Future<Output = Result<T, JoinFailure>> + Send + 'a>>;

/// Looks for the authority that a token leads to: first at the addresses in the token, then at configured peers, then at whoever on the LAN shows the
/// tag of that mesh.
pub(super) async fn seek<'a, T>(
    config: &Config,
    lan: &Lan,
    token: &JoinToken,
    attempt: impl Fn(SocketAddr) -> Attempt<'a, T>,
) -> Result<(T, SocketAddr), JoinFailure> {
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
            match attempt(address).await {
                Ok(done) => return Ok((done, address)),
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
