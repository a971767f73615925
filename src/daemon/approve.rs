//! Letting hosts in that have no token: who waits, and whose code was typed.
//!
//! Works on every member: one that is no authority passes the code on to those that are, over connections pinned to their node keys.

use hyper::StatusCode;
use meshd_ca::approval::ApprovalCode;
use meshd_ca::identity::NodeId;
use meshd_ca::roster;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Member;
use crate::admin::local::No;
use crate::api;
use crate::control::serve::{Approve, Approved};
use crate::control::waiting::Asker;
use crate::task::Tasks;

/// `POST /v1/approve`: takes the code, again and again until it has let a host in.
pub(crate) async fn approve(member: &Member, request: api::ApproveRequest) -> Result<api::Approved, No> {
    let code: ApprovalCode = request.code.expose().parse().map_err(|e| {
        No::new(StatusCode::BAD_REQUEST, "that is not the code of a host", e, "`sudo meshd status` on that host shows it")
    })?;
    let mut admitted = member.membership.approve(code.clone()).await.ok();
    let body = Approve { code: code.to_text().to_string().into() };
    for answer in others::<Approved>(member, "/v1/approve", &body).await {
        admitted = Some(admitted.flatten().or(answer.admitted));
    }
    let Some(admitted) = admitted else { return Err(none_in_reach("the code could not be passed on")) };
    let roster = member.membership.roster();
    Ok(api::Approved { node: admitted, name: admitted.and_then(|node| roster.member(node)).map(|m| m.name.clone()) })
}

/// `GET /v1/pending`: the hosts that wait, as every authority in reach sees them.
pub(crate) async fn pending(member: &Member) -> Result<Vec<api::Pending>, No> {
    let own = member.membership.is_authority().await;
    let mut all: Vec<Asker> = if own { member.waiting.list() } else { Vec::new() };
    let answers = others::<Vec<Asker>>(member, "/v1/pending", &()).await;
    if !own && answers.is_empty() {
        return Err(none_in_reach("cannot tell who waits"));
    }
    for asker in answers.into_iter().flatten() {
        match all.iter_mut().find(|a| a.node == asker.node) {
            Some(known) => known.seconds = known.seconds.max(asker.seconds),
            None => all.push(asker),
        }
    }
    let roster = member.membership.roster();
    all.retain(|a| !roster.is_active(a.node));
    all.sort_by_key(|a| std::cmp::Reverse(a.seconds));
    Ok(all
        .into_iter()
        .map(|a| api::Pending { name: a.name, node: a.node, address: a.address, waiting_seconds: a.seconds })
        .collect())
}

fn none_in_reach(what: &str) -> No {
    No::new(
        StatusCode::SERVICE_UNAVAILABLE,
        what,
        "no authority of this mesh can be reached",
        "`meshd nodes` shows which hosts are; start meshd there",
    )
}

/// What the other authorities answer, those that do.
pub(super) async fn others<T: DeserializeOwned + Send + 'static>(
    member: &Member,
    path: &'static str,
    body: &impl Serialize,
) -> Vec<T> {
    let Ok(body) = serde_json::to_vec(body) else { return Vec::new() };
    let mut asked = Tasks::new();
    let authorities = member.membership.roster();
    for authority in authorities.authorities().map(roster::Member::node).filter(|n| *n != member.me()) {
        let (links, body) = (member.links.clone(), body.clone());
        asked.spawn(async move { (authority, links.post(authority, path, body).await) });
    }
    let mut answers = Vec::new();
    while let Some(done) = asked.join_next().await {
        let Ok((authority, answer)) = done else { continue };
        match answer.map_err(|e| e.to_string()).and_then(|a| serde_json::from_slice(&a).map_err(|e| e.to_string())) {
            Ok(answer) => answers.push(answer),
            Err(error) => unanswered(authority, path, &error),
        }
    }
    answers
}

fn unanswered(authority: NodeId, path: &str, error: &str) {
    tracing::warn!(%authority, path, error, "an authority did not answer");
}
