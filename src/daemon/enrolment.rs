//! Until when hosts are let in with the fleet token: what is said about it here, and what the authorities tell each other.
//!
//! Each authority counts by itself how long that still goes on; what one is told, it passes on to the others at once, and whoever was away
//! hears it when it asks. Which word counts decides [`meshd_ca::fleet::Window`].

use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use meshd_ca::fleet::{MAX_ENROLMENT, Window};
use tokio::time::{MissedTickBehavior, interval};

use super::{Member, approve};
use crate::admin::local::No;
use crate::api;
use crate::membership::MembershipError;

/// How often what is kept is looked after.
const TICK: Duration = Duration::from_secs(5);
/// How often the authorities ask each other: after the first tick of a start, and then every so many.
const EXCHANGE: u32 = 60;

/// Looks after it for ever.
pub(super) async fn tend(member: Arc<Member>) {
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 0u32.. {
        tick.tick().await;
        if let Err(error) = member.membership.tend_fleet().await {
            tracing::warn!(%error, "what is known of the fleet could not be saved; trying again");
        }
        if number % EXCHANGE == 1
            && member.membership.is_authority().await
            && let Some(window) = member.membership.window().await
        {
            tell(&member, window).await;
        }
    }
}

/// Tells the other authorities, and hears what they say. Returns how many did not answer.
async fn tell(member: &Member, window: Window) -> usize {
    let roster = member.membership.roster();
    let all = roster.authorities().filter(|m| m.node() != member.me()).count();
    let answers = approve::others::<Window>(member, "/v1/enroll", &window).await;
    let unreached = all.saturating_sub(answers.len());
    for answer in answers {
        if let Err(error) = member.membership.hear_window(answer).await {
            tracing::warn!(%error, "until when the fleet token is good could not be saved; trying again");
        }
    }
    unreached
}

/// `GET /v1/enroll`.
pub(crate) async fn status(member: &Member) -> Result<api::Enrolment, No> {
    match member.membership.window().await {
        Some(window) if member.membership.is_authority().await => Ok(shown(window, 0)),
        // What other members keep for a while is not what counts.
        _ => Err(no(&member.membership.enrol_refusal().await)),
    }
}

/// `POST /v1/enroll`.
pub(crate) async fn set(member: &Member, wish: api::EnrolmentWish) -> Result<api::Enrolment, No> {
    let time = Duration::from_secs(wish.seconds).min(MAX_ENROLMENT);
    let window = member.membership.enrol(time).await.map_err(|e| no(&e))?;
    tracing::warn!(seconds = time.as_secs(), "until when hosts are let in with the fleet token was changed");
    let unreached = tell(member, window).await;
    Ok(shown(window, unreached))
}

fn shown(window: Window, unreached: usize) -> api::Enrolment {
    let left = window.left.as_secs();
    api::Enrolment { open: window.is_open(), left_seconds: left, unreached: u32::try_from(unreached).unwrap_or(u32::MAX) }
}

fn no(error: &MembershipError) -> No {
    No::new(StatusCode::CONFLICT, "cannot tell until when the fleet token is good", error, "")
}
