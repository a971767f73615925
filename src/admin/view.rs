//! Puts together what the local API answers, from the snapshots of this moment. Decides nothing.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hyper::StatusCode;
use meshd_agent::record;
use meshd_ca::bundle::RootId;
use meshd_ca::identity::{HostName, NodeId, SpiffeId};
use meshd_ca::roster::{self, Roster};
use meshd_ca::time::UnixTime;
use meshd_ca::token::{Invitation, TokenState};

use super::local::No;
use crate::api::{
    Capture, Clock, CreatedToken, Direction, Done, Edge, Identity, Invited, Members, NewToken, Node, Resolve, Service, Standing,
    State, Status, TokenInfo,
};
use crate::config::Mode;
use crate::daemon::{Daemon, Member, Phase};
use crate::fleet;
use crate::identity::svids::Held;
use crate::membership::MembershipError;
use crate::proxy::edges;

/// `GET /v1/status`.
pub(crate) async fn status(daemon: &Daemon) -> Status {
    let phase = daemon.phase();
    let config = daemon.config();
    let mut status = Status {
        state: State::New,
        reason: None,
        code: None,
        fleet_token: fleet::find(&config).and_then(|card| card.trouble()),
        mesh: None,
        moving: None,
        trust_domain: None,
        node: Some(daemon.node()),
        host_name: config.host_name.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        mode: config.mode,
        capture: Capture { on: false, why: Some("not a member yet".into()) },
        clock: Clock { source: daemon.clock().source().into(), now: daemon.clock().now().0, why: Some(daemon.clock().why()) },
        authority: false,
        members: Members { active: 0, reachable: 0 },
        uptime_seconds: daemon.uptime().as_secs(),
        pid: std::process::id(),
        older: daemon.before().view(),
    };
    match phase {
        Phase::New if !daemon.lan().has_address() => status.reason = Some("waiting for a network".into()),
        Phase::New => status.reason = Some("looking for a mesh on this network".into()),
        Phase::Pending(reason) => (status.state, status.reason) = (State::Pending, Some(reason)),
        Phase::Joining => status.state = State::Joining,
        Phase::Left => {
            status.state = State::Left;
            status.reason = Some("this host left its mesh; `meshd join TOKEN` brings it into one".into());
        }
        Phase::Banished => {
            status.state = State::Banished;
            status.reason = Some("this host was banished from its mesh".into());
        }
        Phase::Member(member) => {
            let roster = member.membership.roster();
            status.state = State::Member;
            status.mesh = Some(roster.mesh());
            status.trust_domain = Some(roster.trust_domain().clone());
            status.moving = moving(&member);
            status.host_name = member.membership.name();
            status.authority = member.membership.is_authority().await;
            let active = roster.active().count();
            let reachable = roster.active().filter(|m| m.node() == member.me() || member.hears(m.node())).count();
            status.members = Members { active: count(active), reachable: count(reachable) };
            status.capture = member.rules.state();
        }
    }
    status
}

/// Where the mesh of a member moves, and why it has not followed yet.
pub(crate) fn moving(member: &Member) -> Option<String> {
    let word = member.membership.moves()?;
    let why = member.moving.now().map_or_else(String::new, |(_, why)| format!(": {why}"));
    Some(format!("into mesh {}, where this host is not let in yet{why}", word.to()?.mesh.id))
}

/// `GET /v1/nodes`.
pub(crate) fn nodes(member: &Member) -> Vec<Node> {
    let roster = member.membership.roster();
    let catalog = member.catalog();
    let book = member.book.latest();
    let mut nodes: Vec<Node> = roster
        .members()
        .filter_map(|m| {
            let id = m.node();
            let record = catalog.record(id);
            let standing = match m.standing {
                roster::Standing::Active => Standing::Active,
                roster::Standing::Left => Standing::Left,
                roster::Standing::Banished => Standing::Banished,
                // Earlier keys of a host are no hosts.
                roster::Standing::Replaced => return None,
            };
            Some(Node {
                id,
                name: m.name.clone(),
                own: id == member.me(),
                standing,
                authority: m.is_authority(),
                reachable: id == member.me() || member.hears(id),
                addresses: record.map(|r| r.addresses.iter().map(|a| a.ip).collect()).unwrap_or_default(),
                captured: book.captured.iter().filter(|(_, b)| b.node == id).map(|(ip, _)| *ip).collect(),
                contested: book.contested.iter().filter(|c| c.owner == id || c.challenger == id).map(|c| c.ip).collect(),
                zone: record.and_then(|r| r.zone.clone()),
                mode: record.map(|r| match r.mode {
                    record::Mode::Permissive => Mode::Permissive,
                    record::Mode::Strict => Mode::Strict,
                    record::Mode::Audit => Mode::Audit,
                }),
                version: record.map(|r| r.version.clone()),
                listeners: count(record.map_or(0, |r| r.listeners.len())),
                last_seen_seconds: if id == member.me() { Some(0) } else { member.last_heard(id).map(|d| d.as_secs()) },
            })
        })
        .collect();
    nodes.sort_by(|a, b| (!a.own, &a.name).cmp(&(!b.own, &b.name)));
    nodes
}

/// `GET /v1/services`.
pub(crate) fn services(member: &Member) -> Vec<Service> {
    let roster = member.membership.roster();
    let catalog = member.catalog();
    let mut services = Vec::new();
    for m in roster.active() {
        let Some(record) = catalog.record(m.node()) else { continue };
        for l in &record.listeners {
            services.push(Service {
                host: m.name.clone(),
                node: m.node(),
                addresses: l.ip.map_or_else(|| record.addresses.iter().map(|a| a.ip).collect(), |ip| vec![ip]),
                port: l.port,
                id: SpiffeId::new(roster.trust_domain().clone(), l.workload.clone()),
            });
        }
    }
    services.sort_by(|a, b| (&a.host, a.port, &a.addresses).cmp(&(&b.host, b.port, &b.addresses)));
    services
}

/// `GET /v1/edges`.
pub(crate) fn edges(member: &Member) -> Vec<Edge> {
    let roster = member.membership.roster();
    let now = member.now();
    let mut edges: Vec<Edge> = member
        .proxy
        .edges
        .snapshot(now)
        .into_iter()
        .map(|e| Edge {
            direction: match e.key.direction {
                edges::Direction::Inbound => Direction::Inbound,
                edges::Direction::Outbound => Direction::Outbound,
            },
            client: e.key.source.clone(),
            server: e.key.destination.clone(),
            peer: e.peer.and_then(|n| roster.member(n)).map(|m| m.name.clone()),
            address: e.key.address,
            port: e.key.port,
            secured: e.secured,
            reason: e.reason.map(str::to_owned),
            open: e.figures.open,
            total: e.total,
            failed: e.failed(),
            bytes_in: e.figures.bytes_in,
            bytes_out: e.figures.bytes_out,
            last_seen_seconds: now.since(e.last_seen).as_secs(),
            durations: e.figures.durations.counts.into(),
        })
        .collect();
    edges.sort_by_key(|e| (e.last_seen_seconds, e.port));
    edges
}

/// `GET /v1/identity`.
pub(crate) fn identities(member: &Member) -> Vec<Identity> {
    let now = member.now();
    let roster = member.membership.roster();
    let bundle = roster.bundle();
    let authority = |root: Option<RootId>| -> Option<HostName> {
        let root = bundle.roots.iter().find(|r| Some(r.id()) == root)?;
        roster.member(root.authority).map(|m| m.name.clone())
    };
    let difference = |then: UnixTime| i64::try_from(then.0).unwrap_or(i64::MAX).saturating_sub_unsigned(now.0);
    member
        .svids
        .held()
        .into_iter()
        .map(|Held { leaf, renew_at, root }| Identity {
            workload: leaf.id.workload.clone(),
            id: leaf.id,
            serial: meshd_ca::verify::serial(&leaf.der),
            not_before: leaf.not_before.0,
            not_after: leaf.not_after.0,
            expires_seconds: difference(leaf.not_after),
            renewal_seconds: difference(renew_at),
            issued_by: authority(root),
        })
        .collect()
}

/// `GET /v1/resolve`.
pub(crate) fn resolve(member: &Member, address: SocketAddr) -> Resolve {
    let ip = address.ip().to_canonical();
    let mut answer =
        Resolve { address: ip, port: address.port(), node: None, host: None, id: None, secured: false, why: String::new() };
    if member.own_addresses().contains(&ip) {
        answer.why = "an address of this host: it never leaves the host".into();
        return answer;
    }
    let book = member.book.latest();
    let Some(bound) = book.captured.get(&ip) else {
        let claimed: Vec<NodeId> = member.catalog().at(ip).to_vec();
        answer.why = match claimed.first() {
            Some(node) => {
                format!("{} claims it, but has not proved it in a handshake", name_of(&member.membership.roster(), *node))
            }
            None => "not the address of a member".into(),
        };
        return answer;
    };
    let roster = member.membership.roster();
    answer.node = Some(bound.node);
    answer.host = roster.member(bound.node).map(|m| m.name.clone());
    let workload = member.catalog().listener(bound.node, ip, address.port()).map(|l| l.workload.clone());
    let skipped = member.skip_ports().contains(&address.port()) || address.port() == bound.port;
    answer.secured = !skipped;
    answer.why = match (&workload, skipped) {
        (_, true) => format!("port {} is never captured", address.port()),
        (Some(_), false) => "the member proved the address and says who listens on the port".into(),
        (None, false) => "the member proved the address; nobody is known to listen on the port".into(),
    };
    if !skipped {
        answer.id = workload.map(|w| SpiffeId::new(roster.trust_domain().clone(), w));
    }
    answer
}

/// `GET /v1/tokens`.
pub(crate) async fn tokens(member: &Member) -> Result<Vec<TokenInfo>, No> {
    let now = member.now();
    let tokens = member.membership.tokens().await.map_err(|e| refused("cannot list the tokens", e))?;
    let roster = member.membership.roster();
    let invites =
        |t: &meshd_ca::token::TokenInfo| t.state != TokenState::Revoked && t.merge.as_ref().is_some_and(|m| m.runs(now));
    let invited = |m: Invitation| Invited {
        mesh: m.from.map(|from| from.id),
        hosts: m.from.map_or(m.limit, |_| count(m.nodes.len())),
        arrived: count(m.nodes.iter().filter(|n| roster.is_active(**n)).count()),
    };
    let ends = |t: &meshd_ca::token::TokenInfo| t.merge.as_ref().filter(|m| m.from.is_some()).map_or(t.expires, |m| m.until);
    Ok(tokens
        .into_iter()
        .filter(|t| t.state == TokenState::Open || invites(t))
        .map(|t| TokenInfo {
            id: t.id.to_string(),
            uses_left: t.uses.saturating_sub(count(t.used_by.len())),
            expires_seconds: ends(&t).since(now).as_secs(),
            merge: t.merge.map(invited),
        })
        .collect())
}

/// `POST /v1/tokens`.
pub(crate) async fn create_token(member: &Member, wish: NewToken) -> Result<CreatedToken, No> {
    let hints = if wish.hints.is_empty() { member.hints() } else { wish.hints };
    let lifetime = Duration::from_secs(wish.lifetime_seconds);
    let failed = |e| refused("cannot make a token", e);
    let (id, text) = if wish.merge {
        let token = member.membership.create_merge_token(lifetime, wish.uses, &hints).await.map_err(failed)?;
        (token.token().id, token.to_text())
    } else {
        let token = member.membership.create_token(lifetime, wish.uses, &hints).await.map_err(failed)?;
        (token.id, token.to_text())
    };
    Ok(CreatedToken {
        id: id.to_string(),
        token: text.to_string().into(),
        uses: wish.uses,
        expires_seconds: wish.lifetime_seconds,
    })
}

/// `DELETE /v1/tokens/ID`.
pub(crate) async fn revoke_token(member: &Member, id: &str) -> Result<Done, No> {
    let found = member.membership.revoke_token(id).await.map_err(|e| refused("cannot revoke the token", e))?;
    if found {
        return Ok(Done {});
    }
    Err(No::new(
        StatusCode::NOT_FOUND,
        "cannot revoke the token",
        "there is no such token",
        "`meshd token list` shows those there are",
    ))
}

fn refused(what: &str, error: MembershipError) -> No {
    No::new(StatusCode::CONFLICT, what, error, "")
}

fn name_of(roster: &Roster, node: NodeId) -> String {
    roster.member(node).map_or_else(|| node.to_string(), |m| m.name.to_string())
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The addresses others reach this host at, for the hints of a token.
pub(crate) fn reachable_at(addresses: &BTreeSet<IpAddr>, port: u16) -> Vec<SocketAddr> {
    let mut hints: Vec<_> = addresses.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
    hints.sort_by_key(|a| (a.is_ipv6(), *a));
    hints.truncate(4);
    hints
}
