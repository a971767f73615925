//! Setting the clock of the mesh back with the recovery key: what this host knows of the time, and handing the word on.
//!
//! Every member in reach is told at once. Who is not hears it with the next answer to its question for the time, or with the next question when it is an
//! authority (`daemon/timekeeper.rs`).

use hyper::StatusCode;
use meshd_ca::roster;

use super::Member;
use crate::admin::local::No;
use crate::api::{ClockWord, Done, MeshTime};
use crate::task::Tasks;

/// `GET /v1/clock`.
pub(crate) fn time(member: &Member) -> MeshTime {
    let clock = member.membership.clock();
    MeshTime { now: clock.now().0, beyond: clock.beyond().0, era: clock.era() }
}

/// `POST /v1/clock`.
pub(crate) async fn set_back(member: &Member, word: ClockWord) -> Result<Done, No> {
    const WHAT: &str = "the clock is not set back";
    let body = serde_json::to_vec(&word.reset).unwrap_or_default();
    let refused = |why: String| No::new(StatusCode::CONFLICT, WHAT, why, "");
    match member.membership.set_back(word.reset).await {
        Ok(true) => {}
        Ok(false) => return Err(refused("it was set back again meanwhile".into())),
        Err(error) => return Err(refused(error.to_string())),
    }
    let roster = member.membership.roster();
    let mut told = Tasks::new();
    for node in roster.active().map(roster::Member::node).filter(|n| *n != member.me() && member.links.knows(*n)) {
        let (links, body) = (member.links.clone(), body.clone());
        told.spawn(async move { (node, links.post(node, "/v1/reset", body).await) });
    }
    while let Some(done) = told.join_next().await {
        if let Ok((node, Err(error))) = done {
            tracing::info!(%node, %error, "a member was not told that the clock was set back; it hears so when it asks for the time");
        }
    }
    Ok(Done {})
}
