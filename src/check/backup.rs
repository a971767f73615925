//! The last backup of this host, where there is something in its state that no other host could give back.

use std::path::Path;
use std::time::Duration;

use super::findings::{Findings, Verdict};
use crate::api::{Finding, code};
use crate::backup::last::{Last, Weight, last};
use crate::clock::Clock;
use crate::config::ago;
use crate::daemon::Member;

/// How long a mesh may be without a backup: the day on which it is set up.
const SET_UP: Duration = Duration::from_secs(86_400);

/// What is lost with this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// Nothing that a token for a new host does not make good.
    Member,
    /// An office that others have too.
    Office,
    /// The only office there is.
    OnlyOffice,
    /// The founder's word, in a mesh without a recovery key.
    Founder,
}

/// What there is to know.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) loss: Loss,
    pub(super) members: usize,
    /// How long this host has been a member.
    pub(super) age: Duration,
    /// The last backup, or why that cannot be said.
    pub(super) last: Result<Option<Last>, String>,
    /// What a backup would hold now.
    pub(super) now: Weight,
    /// For how long it has been there by the system clock; none when that shows an earlier time.
    pub(super) made: Option<Duration>,
}

impl Facts {
    pub(super) fn read(state: &Path, member: &Member) -> Option<Self> {
        let (roster, me) = (member.membership.roster(), member.me());
        let own = roster.member(me)?;
        let others_sign = member.authorities.moment().view().signing().into_iter().any(|n| n != me);
        let last = last(state, roster.mesh(), me).map_err(|e| e.to_string());
        let system = Clock::system_time();
        Some(Self {
            loss: match (own.is_authority(), others_sign) {
                _ if roster.founded_by(me) && roster.recovery().is_none() => Loss::Founder,
                (true, false) => Loss::OnlyOffice,
                (true, true) => Loss::Office,
                (false, _) => Loss::Member,
            },
            members: roster.active().count(),
            age: member.now().since(own.since),
            made: last.as_ref().ok().and_then(Option::as_ref).filter(|l| l.made <= system).map(|l| system.since(l.made)),
            last,
            now: Weight::of(&roster, me),
        })
    }
}

pub(super) fn findings(facts: Option<&Facts>) -> Vec<Finding> {
    let Some(facts) = facts else { return Vec::new() };
    let mut found = Findings::of("state");
    found.add(code::BACKUP, "what only this host has is in a backup", verdict(facts));
    found.done()
}

fn verdict(facts: &Facts) -> Verdict {
    const MAKE: &str = "`sudo meshd backup FILE`, to something that is not lost together with this host";
    let last = match &facts.last {
        Ok(last) => last.as_ref(),
        Err(why) => return Verdict::warn(format!("it cannot be told when the last one was made: {why}"), MAKE),
    };
    let said = last.map_or_else(
        || "there is none".into(),
        |last| match facts.made {
            Some(time) => format!("made {} ago", ago(time.as_secs())),
            None => format!("made at {}, which is ahead of the system clock", last.made),
        },
    );
    let lost = match facts.loss {
        Loss::Member => return Verdict::ok(format!("{said}; nothing is lost with this host: another one joins in its place")),
        Loss::Office => return Verdict::ok(format!("{said}; nothing is lost with this host: other authorities sign")),
        Loss::OnlyOffice => "this is the only authority that signs",
        Loss::Founder => "this host founded the mesh, which has no recovery key",
    };
    // With one host, or on the first day, it could as well be founded anew.
    let late = facts.members > 1 && facts.age >= SET_UP;
    match last.map(|last| last.weight.since(&facts.now)) {
        None if late => Verdict::warn(format!("{said}, and {lost}: with its disk the mesh is lost"), MAKE),
        None => Verdict::ok(format!("{said} yet: {MAKE}")),
        Some(since) if since.is_empty() => Verdict::ok(said),
        Some(since) => Verdict::warn(format!("{said}, and since then {}; {lost}", since.join(", ")), MAKE),
    }
}

#[cfg(test)]
mod tests {
    use meshd_ca::identity::NodeId;

    use super::*;
    use crate::api::Level;
    use crate::backup::last::testing::{of, weight};

    const DAY: Duration = SET_UP;

    fn facts(loss: Loss) -> Facts {
        let last = Ok(None);
        Facts { loss, members: 2, age: 2 * DAY, last, now: weight(&[1], 0), made: Some(DAY) }
    }

    #[track_caller]
    fn says(facts: &Facts, level: Level, what: &str) {
        let found = findings(Some(facts)).pop().unwrap();
        let detail = found.detail.clone().unwrap_or_default();
        assert!(found.level == level && detail.contains(what), "{found:?}");
    }

    #[test]
    fn a_backup_is_missed_where_something_would_be_lost() {
        assert!(findings(None).is_empty());
        for (loss, what) in [(Loss::Member, "joins in its place"), (Loss::Office, "other authorities sign")] {
            says(&facts(loss), Level::Ok, what);
            says(
                &Facts { last: Ok(Some(of(NodeId::from_bytes([1; 16]), weight(&[2], 1)))), ..facts(loss) },
                Level::Ok,
                "made 1d ago",
            );
        }
        for (loss, what) in [(Loss::OnlyOffice, "only authority"), (Loss::Founder, "no recovery key")] {
            says(&facts(loss), Level::Warn, what);
            says(&Facts { age: DAY - Duration::from_secs(1), ..facts(loss) }, Level::Ok, "there is none yet");
            says(&Facts { members: 1, ..facts(loss) }, Level::Ok, "there is none yet");
            says(&Facts { last: Err("torn".into()), ..facts(loss) }, Level::Warn, "torn");
        }
    }

    #[test]
    fn a_backup_is_as_good_as_what_it_holds() {
        let with = |roots: &[u8], rest| Facts {
            last: Ok(Some(of(NodeId::from_bytes([1; 16]), weight(roots, rest)))),
            ..facts(Loss::OnlyOffice)
        };
        says(&with(&[1], 0), Level::Ok, "made 1d ago");
        says(&with(&[1, 2], 0), Level::Ok, "made 1d ago");
        says(&with(&[2], 0), Level::Warn, "this host has another root");
        says(&with(&[1], 1), Level::Warn, "other hosts are authorities, a host was banished");
        says(&Facts { made: None, ..with(&[1], 0) }, Level::Ok, "ahead of the system clock");
    }
}
