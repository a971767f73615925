//! Every other member: a new handshake with each, how long it takes to answer, and whether it is like this host.

use std::sync::Arc;
use std::time::Duration;

use meshd_agent::record;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::Member as RosterMember;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::findings::{Findings, Verdict, some_of};
use crate::api::{Finding, code};
use crate::clock::Clock;
use crate::config::{Mode, ago};
use crate::control::serve::Pong;
use crate::daemon::Member;
use crate::task::Tasks;

/// How long a member has to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Members asked at once: a check of a large mesh must not be a burst on every network between.
const AT_ONCE: usize = 32;
/// A member whose clock is off by more disagrees about what is in date: certificates begin ten minutes early.
const CLOCKS_AGREE: Duration = Duration::from_secs(60);
/// An answer that takes longer, once there is a connection, makes every first connection slow.
const SLOW: Duration = Duration::from_secs(1);

/// What asking a member gave.
#[derive(Debug, Clone)]
pub(super) struct Met {
    pub(super) name: String,
    /// How long a handshake took that proved its key, or why there was none.
    pub(super) handshake: Result<Duration, String>,
    /// How long it takes to answer.
    pub(super) round_trip: Option<Duration>,
    /// How far its clock is ahead of ours, in milliseconds; older versions do not say.
    pub(super) ahead: Option<i64>,
    pub(super) version: Option<String>,
    pub(super) mode: Option<Mode>,
    /// Whether gossip hears it.
    pub(super) heard: bool,
    /// Whether it said that it stops.
    pub(super) stopped: bool,
}

/// Asks everybody, a bounded number at once.
pub(super) async fn ask(member: &Arc<Member>) -> Vec<Met> {
    let roster = member.membership.roster();
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut asked = Tasks::new();
    for other in roster.active().filter(|m| m.node() != member.me()) {
        let (member, places, other) = (member.clone(), places.clone(), other.clone());
        asked.spawn(async move {
            let _place = places.acquire().await;
            one(&member, &other).await
        });
    }
    let mut met = asked.join_all().await;
    met.sort_by(|a, b| a.name.cmp(&b.name));
    met
}

async fn one(member: &Member, other: &RosterMember) -> Met {
    let node = other.node();
    let (handshake, pong) = match timeout(PATIENCE, meet(member, node)).await {
        Ok(Ok((took, pong))) => (Ok(took), pong),
        Ok(Err(why)) => (Err(why), None),
        Err(_) => (Err("no answer in time".into()), None),
    };
    let catalog = member.catalog();
    let record = catalog.record(node);
    Met {
        name: other.name.to_string(),
        handshake,
        round_trip: pong.map(|(took, _)| took),
        ahead: pong.and_then(|(_, ahead)| ahead),
        version: record.map(|r| r.version.clone()),
        mode: record.map(|r| match r.mode {
            record::Mode::Permissive => Mode::Permissive,
            record::Mode::Strict => Mode::Strict,
            record::Mode::Audit => Mode::Audit,
        }),
        heard: member.hears(node),
        stopped: record.is_some_and(|r| r.presence == record::Presence::Stopped),
    }
}

/// How long an answer took, and how far the clock there is ahead.
type Answered = (Duration, Option<i64>);

/// A handshake of its own at the best address known, whatever links there are, and a question over a link.
async fn meet(member: &Member, node: NodeId) -> Result<(Duration, Option<Answered>), String> {
    let place = member.links.places(node).first().copied().ok_or("no address of it is known yet")?;
    let begun = Instant::now();
    let owner = member.links.prove(place).await.map_err(|e| e.to_string())?;
    let took = begun.elapsed();
    if owner != node {
        return Err(format!("another member answers at {place}"));
    }
    let (begun, sent) = (Instant::now(), Clock::system_millis());
    let answer = member.links.post(node, "/v1/ping", bytes::Bytes::new()).await.map_err(|e| e.to_string())?;
    let elapsed = begun.elapsed();
    let halfway = sent.saturating_add(u64::try_from(elapsed.as_millis()).unwrap_or(0) / 2);
    let pong: Option<Pong> = serde_json::from_slice(&answer).ok();
    let ahead = pong.map(|p| i64::try_from(p.time_millis).unwrap_or(i64::MAX).saturating_sub_unsigned(halfway));
    Ok((took, Some((elapsed, ahead))))
}

pub(super) fn findings(met: &[Met], own: Mode, port: u16) -> Vec<Finding> {
    let mut found = Findings::of("peers");
    let millis = |d: Duration| format!("{:.1} ms", d.as_secs_f64() * 1000.0);
    for m in met {
        let name = format!("{} answers and proves its key", m.name);
        let verdict = match (&m.handshake, m.round_trip) {
            (Ok(took), Some(trip)) if trip > SLOW => Verdict::warn(
                format!("handshake {}, but it took {} to answer", millis(*took), millis(trip)),
                "is that host, or the network, overloaded?",
            ),
            (Ok(took), trip) => Verdict::ok(format!(
                "handshake {}{}",
                millis(*took),
                trip.map_or(String::new(), |t| format!(", answer {}", millis(t)))
            )),
            (Err(_), _) if m.stopped => Verdict::warn("its daemon said that it stops", format!("start meshd on {}", m.name)),
            (Err(why), _) => Verdict::warn(why.clone(), format!("is meshd running there, and TCP {port} open between the two?")),
        };
        found.add(code::PEER, name, verdict);
    }
    if met.is_empty() {
        found.ok(code::PEER, "members answer and prove their keys", "there are no others");
        return found.done();
    }
    let version = env!("CARGO_PKG_VERSION");
    let others =
        some_of(met.iter().filter_map(|m| Some(format!("{} has {}", m.name, m.version.as_deref().filter(|v| *v != version)?))));
    found.add(
        code::PEER_VERSION,
        "the members run one version",
        match others.is_empty() {
            true => Verdict::ok(version),
            false => {
                Verdict::warn(format!("this is {version}, {others}"), "install the same version everywhere when it suits you")
            }
        },
    );
    let others = some_of(met.iter().filter_map(|m| Some(format!("{} is {}", m.name, m.mode.filter(|mode| *mode != own)?))));
    found.add(
        code::PEER_MODE,
        "the members are in one mode",
        match others.is_empty() {
            true => Verdict::ok(own.to_string()),
            false => Verdict::warn(
                format!("this host is {own}, {others}"),
                "set the same `mode` everywhere, unless you are moving from one to the other",
            ),
        },
    );
    found.add(code::PEER_CLOCK, "the clocks of the members agree", clocks(met));
    found.done()
}

fn clocks(met: &[Met]) -> Verdict {
    let limit = i64::try_from(CLOCKS_AGREE.as_millis()).unwrap_or(i64::MAX);
    let off = met.iter().filter_map(|m| Some((m, m.ahead.filter(|a| a.saturating_abs() > limit)?)));
    let off = some_of(off.map(|(m, ahead)| {
        let way = if ahead > 0 { "ahead" } else { "behind" };
        format!("{} is {} {way}", m.name, ago(ahead.unsigned_abs() / 1000))
    }));
    let told: Vec<u64> = met.iter().filter_map(|m| Some(m.ahead?.unsigned_abs())).collect();
    match (off.is_empty(), told.iter().max()) {
        (false, _) => Verdict::warn(off, "set the clock of whoever is wrong, or let it synchronise (NTP)"),
        (true, Some(most)) => Verdict::ok(format!("within {} s", most.div_ceil(1000))),
        (true, None) => Verdict::ok("nobody said what his clock shows"),
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// A member that is as it should be.
    pub(in crate::check) fn met(name: &str) -> Met {
        Met {
            name: name.into(),
            handshake: Ok(Duration::from_millis(3)),
            round_trip: Some(Duration::from_millis(1)),
            ahead: Some(-4),
            version: Some(env!("CARGO_PKG_VERSION").into()),
            mode: Some(Mode::Permissive),
            heard: true,
            stopped: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::testing::met;
    use super::*;
    use crate::api::Level::Warn;

    #[track_caller]
    fn with(other: Met, expected: &[(&str, crate::api::Level)]) {
        assert_eq!(ill(&findings(&[met("a"), other], Mode::Permissive, 6374)), expected);
    }

    #[test]
    fn members_that_differ_are_named() {
        with(met("b"), &[]);
        assert!(ill(&findings(&[], Mode::Strict, 6374)).is_empty());
        with(Met { handshake: Err("refused".into()), round_trip: None, ahead: None, ..met("b") }, &[(code::PEER, Warn)]);
        with(Met { handshake: Err("refused".into()), stopped: true, ..met("b") }, &[(code::PEER, Warn)]);
        with(Met { round_trip: Some(Duration::from_secs(2)), ..met("b") }, &[(code::PEER, Warn)]);
        with(Met { version: Some("0.0.9".into()), ..met("b") }, &[(code::PEER_VERSION, Warn)]);
        with(Met { version: None, mode: None, ..met("b") }, &[]);
        with(Met { mode: Some(Mode::Strict), ..met("b") }, &[(code::PEER_MODE, Warn)]);
        for (ahead, text) in [(61_000, "b is 1m1s ahead"), (-3_600_000, "b is 1h behind")] {
            with(Met { ahead: Some(ahead), ..met("b") }, &[(code::PEER_CLOCK, Warn)]);
            let found = findings(&[Met { ahead: Some(ahead), ..met("b") }], Mode::Permissive, 6374);
            assert_eq!(found.last().unwrap().detail.as_deref(), Some(text));
        }
        with(Met { ahead: Some(60_000), ..met("b") }, &[]);
        with(Met { ahead: None, ..met("b") }, &[]);
    }
}
