//! The local API about authorities: who they are, changing that, and what they may do about other members. What may be done is decided by
//! the roster.

use hyper::StatusCode;
use meshd_agent::record::NodeRecord;
use meshd_agent::rotation::{Phase, phase};
use meshd_ca::bundle::{Root, RootId};
use meshd_ca::roster;

use super::local::No;
use crate::api::{
    Appointment, Authority, AuthorityState, Banishment, Done, NewRoot, RecoveryWords, RootCertificate, RootPhase, Rotation,
};
use crate::daemon::Member;

/// `GET /v1/authorities`.
pub(crate) fn list(member: &Member) -> Vec<Authority> {
    let (roster, catalog) = (member.membership.roster(), member.catalog());
    let says = |says: &dyn Fn(&NodeRecord) -> bool| {
        let all = roster.active().filter(|m| catalog.record(m.node()).is_some_and(says));
        u32::try_from(all.count()).unwrap_or(u32::MAX)
    };
    let of = |m: &roster::Member| {
        let node = m.node();
        let roots: Vec<Root> = m.roots.iter().filter_map(|der| Root::parse(der, node)).collect();
        let ids: Vec<RootId> = roots.iter().map(Root::id).collect();
        let believes = |r: &NodeRecord| ids.iter().all(|id| r.roots.trusted.contains(id));
        let active = catalog.record(node).and_then(|r| r.roots.signs);
        let signs = active.is_some_and(|id| ids.contains(&id));
        let far = |id| match phase(&ids, active, id) {
            _ if m.retired => RootPhase::Draining,
            Phase::Preparing => RootPhase::Preparing,
            Phase::Active => RootPhase::Active,
            Phase::Draining => RootPhase::Draining,
        };
        let drains = |r: &NodeRecord| r.roots.shown.iter().any(|id| ids.contains(id) && far(*id) == RootPhase::Draining);
        Authority {
            id: node,
            name: m.name.clone(),
            own: node == member.me(),
            founder: node == roster.founder(),
            state: match (m.retired, signs) {
                (true, _) => AuthorityState::Retiring,
                (false, true) => AuthorityState::Signing,
                (false, false) => AuthorityState::Preparing,
            },
            reachable: node == member.me() || member.hears(node),
            waiting_for: roster
                .active()
                .filter(|m| !catalog.record(m.node()).is_some_and(|r| believes(r) && !drains(r)))
                .map(|m| m.name.clone())
                .collect(),
            roots: roots
                .iter()
                .map(|root| RootCertificate {
                    id: root.id(),
                    phase: far(root.id()),
                    not_after: root.not_after.0,
                    believed_by: says(&|r| r.roots.trusted.contains(&root.id())),
                    shown_by: says(&|r| r.roots.shown.contains(&root.id())),
                })
                .collect(),
        }
    };
    let mut all: Vec<Authority> = roster.active().filter(|m| !m.roots.is_empty()).map(of).collect();
    all.sort_by(|a, b| (!a.founder, &a.name).cmp(&(!b.founder, &b.name)));
    all
}

/// `POST /v1/authorities`.
pub(crate) async fn add(member: &Member, wish: Appointment) -> Result<Done, No> {
    const WHAT: &str = "it was not made an authority";
    let roster = member.membership.roster();
    let other = roster.named(&wish.node).ok_or_else(|| unknown(WHAT))?;
    if other.is_authority() {
        let confirmed = member.authorities.confirm(other.node()).await;
        return confirmed.map(|()| Done {}).map_err(|error| No::new(StatusCode::CONFLICT, WHAT, error, ""));
    }
    if member.membership.signs().borrow().is_none() {
        let names: Vec<String> = roster.authorities().map(|m| m.name.to_string()).collect();
        let remedy = format!("run the command on {}", names.join(" or "));
        return Err(No::new(StatusCode::CONFLICT, WHAT, "this host is not an authority that signs", &remedy));
    }
    if other.node() == member.me() {
        return Err(No::new(
            StatusCode::CONFLICT,
            WHAT,
            "this host itself cannot be asked",
            "run the command on another authority",
        ));
    }
    match member.authorities.appoint(other.node()).await {
        Ok(()) => Ok(Done {}),
        Err(why) => Err(No::new(why.0, WHAT, why.1, "it has to run and be in reach: `meshd nodes` shows it")),
    }
}

/// `DELETE /v1/authorities/NODE`.
pub(crate) async fn remove(member: &Member, node: &str) -> Result<Done, No> {
    const WHAT: &str = "it is an authority still";
    let roster = member.membership.roster();
    let other = roster.named(node).ok_or_else(|| unknown("no authority was removed"))?;
    let rest = roster.authorities().filter(|m| m.node() != other.node());
    let signing = rest.filter(|m| member.catalog().record(m.node()).is_some_and(|r| r.roots.signs.is_some())).count();
    if other.is_authority() && signing == 0 {
        let why = "it is the only one that signs: nobody could renew a certificate";
        return Err(No::new(StatusCode::CONFLICT, WHAT, why, "`meshd authority add` another one first"));
    }
    match member.authorities.retire(other.node()).await {
        Ok(()) => Ok(Done {}),
        Err(error) => Err(No::new(StatusCode::CONFLICT, WHAT, error, "")),
    }
}

/// `POST /v1/rotation`.
pub(crate) async fn rotate(member: &Member) -> Result<Rotation, No> {
    match member.authorities.begin_rotation().await {
        Ok(root) => Ok(Rotation { root }),
        Err(error) => Err(No::new(StatusCode::CONFLICT, "the root is not replaced", error, "")),
    }
}

/// `POST /v1/banish`.
pub(crate) async fn banish(member: &Member, wish: Banishment) -> Result<Done, No> {
    const WHAT: &str = "it is not banished";
    let roster = member.membership.roster();
    let other = roster.named(&wish.node).ok_or_else(|| unknown(WHAT))?;
    if other.node() == member.me() {
        return Err(No::new(StatusCode::CONFLICT, WHAT, "that is this host", "`meshd leave` takes it out of the mesh"));
    }
    match member.authorities.banish(other.node()).await {
        Ok(()) => Ok(Done {}),
        Err(error) => Err(No::new(StatusCode::CONFLICT, WHAT, error, "")),
    }
}

/// `POST /v1/roster`.
pub(crate) async fn recovered(member: &Member, words: RecoveryWords) -> Result<Done, No> {
    match member.authorities.recovered(words.entries).await {
        Ok(()) => Ok(Done {}),
        Err(error) => Err(No::new(StatusCode::CONFLICT, "the recovery key was not obeyed", error, "")),
    }
}

/// `POST /v1/recover`: the root of this host, with which the recovery key may make it an authority.
pub(crate) async fn prepare(member: &Member) -> Result<NewRoot, No> {
    match member.membership.prepare().await {
        Ok(root) => Ok(NewRoot { node: member.me(), root }),
        Err(error) => Err(No::new(StatusCode::INTERNAL_SERVER_ERROR, "this host has no root", error, "")),
    }
}

fn unknown(what: &str) -> No {
    No::new(StatusCode::NOT_FOUND, what, "there is no such member", "`meshd nodes` shows those there are")
}
