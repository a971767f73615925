//! Moving into another mesh (`meshd_ca::merge`): asking it, telling the own hosts, following, and telling those who come late.
//!
//! A host gives its mesh up only when the place in the other one is on its disk, so it is in one of the two at every moment. Until then it is a member
//! of its own mesh as ever, and tries again and again.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::StatusCode;
use meshd_ca::identity::NodeId;
use meshd_ca::join::{JoinError, Joined, Wish};
use meshd_ca::merge::{Answer, Destination, Mesh, Offer, Word};
use meshd_ca::roster::Roster;
use meshd_ca::token::MergeToken;
use tokio::time::{Instant, sleep, timeout};

use super::kernel::Marked;
use super::{Daemon, Member, acquire};
use crate::admin::local::No;
use crate::api::{self, MergeStep, MoveRequest, Moving, Unsigned};
use crate::control::join::{self, JoinFailure};
use crate::control::link::MOVED;
use crate::membership::MembershipError;
use crate::task::Tasks;

/// How long a host waits between two tries to follow: soon at first.
const PAUSES: [Duration; 5] = [
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(10),
    Duration::from_secs(30),
];
/// How long the members that are there may take to hear where the mesh moves, and how many are told by one.
const TELLING: Duration = Duration::from_secs(2);
const MAX_TOLD: usize = 64;
/// How often it is looked for hosts that are behind, when the same address is told again, and how many at once.
const LOOK: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_secs(60);
const MAX_LATE: usize = 16;

/// Why this host has not followed yet, for whoever asks.
#[derive(Default)]
pub(crate) struct Trouble(Mutex<Option<(Instant, String)>>);

impl Trouble {
    /// What it is, and since when.
    pub(crate) fn now(&self) -> Option<(Duration, String)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(since, why)| (since.elapsed(), why.clone()))
    }

    fn set(&self, why: Option<String>) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = now.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        *now = why.map(|why| (since, why));
    }
}

/// Waits until this mesh moves and this host was let in where it moves.
pub(super) async fn follow(daemon: &Daemon, member: &Member) -> (Joined, SocketAddr) {
    let (mut words, mut roster) = (member.membership.words(), member.membership.watch());
    let mut told: Option<Word> = None;
    let mut tries = 0;
    loop {
        words.mark_unchanged();
        roster.mark_unchanged();
        let word = member.membership.moves();
        let Some((word, to)) = word.as_ref().and_then(|w| Some((w, w.to()?))) else {
            member.moving.set(None);
            // Who may say so is told by the roster.
            let changed = tokio::select! { changed = words.changed() => changed, changed = roster.changed() => changed };
            if changed.is_err() {
                std::future::pending::<()>().await;
            }
            continue;
        };
        if told.as_ref() != Some(word) {
            tracing::warn!(to = %to.mesh.id, "this mesh moves into another one");
            member.moving.set(Some("it was just heard".into()));
            tell_members(member, word).await;
            (told, tries) = (Some(word.clone()), 0);
        }
        let (config, wish) = (daemon.config(), Wish::from(member.membership.name()));
        let token = to.token();
        let pause = PAUSES[tries.min(PAUSES.len() - 1)];
        let trial = async {
            match acquire::redeem(&config, &daemon.lan, &daemon.key, &wish, &token).await {
                Ok((joined, at)) if to.is(&joined.roster) => return Some((joined, at)),
                Ok(_) => member.moving.set(Some("who answers there is of another mesh than the word says".into())),
                // Others of that mesh answered, and the one who was asked for did not.
                Err(JoinFailure::Refused(_, JoinError::WrongAuthority(_))) => {
                    let authority = to.authority;
                    member.moving.set(Some(format!("the authority that made the token ({authority}) does not answer")));
                }
                Err(failure) => member.moving.set(Some(failure.to_string())),
            }
            sleep(pause).await;
            None
        };
        tokio::select! {
            done = trial => match done {
                Some(joined) => return joined,
                None => tries += 1,
            },
            // A later word counts at once.
            _ = words.changed() => {}
        }
    }
}

/// Tells the members that are there, a bounded number; each of them does the same.
async fn tell_members(member: &Member, word: &Word) {
    let roster = member.membership.roster();
    let mut there: Vec<NodeId> = roster.active().map(|m| m.node()).filter(|n| *n != member.me() && member.hears(*n)).collect();
    // Not everybody tells the same ones first.
    let after = there.partition_point(|n| *n < member.me());
    there.rotate_left(after);
    let mut telling = Tasks::new();
    for node in there.into_iter().take(MAX_TOLD) {
        let (links, word) = (member.links.clone(), word.to_bytes());
        telling.spawn(async move { links.post(node, MOVED, word).await });
    }
    let _ = timeout(TELLING, async { while telling.join_next().await.is_some() {} }).await;
}

/// Tells hosts on the LAN that still announce a mesh which this host came from, where it has moved. For ever.
pub(super) async fn tell_late(daemon: Arc<Daemon>, member: Arc<Member>) {
    let mut told: HashMap<SocketAddr, Instant> = HashMap::new();
    loop {
        sleep(LOOK).await;
        told.retain(|_, at| at.elapsed() < AGAIN);
        for word in member.membership.former() {
            let late = acquire::strangers(&daemon.lan, &member, word.from().id).into_iter();
            let addresses = late.filter_map(|s| s.addresses.first().copied()).filter(|a| !told.contains_key(a));
            for address in addresses.take(MAX_LATE).collect::<Vec<_>>() {
                told.insert(address, Instant::now());
                match member.links.tell(address, &word).await {
                    Ok(()) => tracing::info!(%address, "told a host where its mesh has moved"),
                    Err(error) => tracing::debug!(%address, %error, "could not tell a host where its mesh has moved"),
                }
            }
        }
    }
}

/// `POST /v1/merge`: looks what it would be to move, moves, or stays after all.
pub(crate) async fn merge(daemon: &Daemon, request: api::MergeRequest) -> Result<Moving, No> {
    const WHAT: &str = "this mesh does not move";
    let member = daemon.member()?;
    let membership = &member.membership;
    let roster = membership.roster();
    if roster.recovery().is_none() && !roster.founded_by(member.me()) {
        let why = "it was founded without a recovery key, so only the host that founded it can say so";
        return Err(No::new(StatusCode::FORBIDDEN, WHAT, why, "run the command there: `meshd authority list` names it"));
    }
    let from = side(&roster);
    let mut moving =
        Moving { from, to: None, invited: 0, banished: Vec::new(), renamed: Vec::new(), ends_seconds: 0, unsigned: None };
    let to = match request.token {
        None if request.step == MergeStep::Stay => None,
        None => return Err(No::new(StatusCode::BAD_REQUEST, WHAT, "no token was given", "")),
        Some(token) => {
            let remedy = "on an authority of the mesh that stays: `meshd token create --merge`";
            let bad = |e| No::new(StatusCode::BAD_REQUEST, "that is no token for a merge", e, remedy);
            let token: MergeToken = token.expose().trim().parse().map_err(bad)?;
            let asked = ask(daemon, &member, &token, request.step == MergeStep::Look).await;
            let (answer, at) = asked.map_err(|e| No::new(StatusCode::BAD_GATEWAY, WHAT, e, remedy))?;
            show(&mut moving, &answer, &roster, &member);
            Some(destination(&token, &answer, at))
        }
    };
    let failed = |e: MembershipError| No::new(StatusCode::CONFLICT, WHAT, e, "");
    match request.step {
        MergeStep::Look => {}
        MergeStep::Move | MergeStep::Stay => match roster.recovery() {
            Some(recovery) => {
                let unsigned = Word::unsigned(recovery.key(), Mesh::of(&roster), to, membership.next_word());
                moving.unsigned = Some(Unsigned(unsigned));
            }
            None => {
                membership.declare_move(to).await.map_err(failed)?;
                stays_told(&member).await;
            }
        },
    }
    Ok(moving)
}

/// `POST /v1/move`: the word of the recovery key.
pub(crate) async fn declared(daemon: &Daemon, request: MoveRequest) -> Result<api::Done, No> {
    let member = daemon.member()?;
    let failed = |e: MembershipError| No::new(StatusCode::CONFLICT, "this mesh does not move", e, "");
    member.membership.say_move(request.word).await.map_err(failed)?;
    stays_told(&member).await;
    Ok(api::Done {})
}

/// That a mesh stays after all is told by who says it; where it moves, by everybody who follows.
async fn stays_told(member: &Member) {
    let word = member.membership.words().borrow().of(member.membership.mesh()).cloned();
    if let Some(word) = word.filter(|w| w.to().is_none()) {
        tell_members(member, &word).await;
    }
}

async fn ask(daemon: &Daemon, member: &Member, token: &MergeToken, look: bool) -> Result<(Answer, SocketAddr), JoinFailure> {
    let tls = acquire::join_tls(&daemon.key)?;
    let (offer, config) = (Offer::of(&member.membership.roster(), look), daemon.config());
    let (offer, name, key) = (&offer, &member.membership.name(), &*daemon.key);
    acquire::seek(&config, &daemon.lan, token.token(), |address| {
        let tls = tls.clone();
        Box::pin(async move { join::offer(token, address, key, name.clone(), offer, tls, &Marked).await })
    })
    .await
}

fn destination(token: &MergeToken, answer: &Answer, at: SocketAddr) -> Destination {
    let parts = token.token();
    // Where it was just reached stands first.
    let mut hints = vec![at];
    hints.extend(parts.hints.iter().copied().filter(|h| *h != at));
    hints.truncate(meshd_ca::token::MAX_HINTS);
    Destination {
        mesh: answer.mesh,
        authority: NodeId::from_bytes(parts.pin),
        token: parts.id,
        secret: token.invitation(),
        hints,
        until: answer.until,
    }
}

fn side(roster: &Roster) -> api::MeshSide {
    let members = u32::try_from(roster.active().count()).unwrap_or(u32::MAX);
    let founder = roster.founder();
    api::MeshSide { mesh: roster.mesh(), founder, trust_domain: roster.trust_domain().clone(), members }
}

fn show(moving: &mut Moving, answer: &Answer, roster: &Roster, member: &Member) {
    let name = |node: NodeId| roster.member(node).map_or_else(|| node.to_string(), |m| m.name.to_string());
    let renamed = answer.renamed.iter().map(|h| api::Renamed { name: name(h.node), becomes: h.name.clone() });
    let (mesh, trust_domain) = (answer.mesh, answer.trust_domain.clone());
    moving.to = Some(api::MeshSide { mesh: mesh.id, founder: mesh.founder, trust_domain, members: answer.members });
    moving.invited = answer.invited;
    moving.banished = answer.banished.iter().map(|n| name(*n)).collect();
    moving.renamed = renamed.collect();
    moving.ends_seconds = answer.until.since(member.now()).as_secs();
}
