//! Asks the authorities for the time and saves the clock floor.
//!
//! Owns when: soon after the start, every ten minutes, and at once when something shows that clocks have changed: the system clock was set,
//! the authorities are others, or a certificate is of another time. What the answers are worth says `meshd_ca::clock`. Moments are
//! compared by the time since boot, which goes on in suspend.

use std::sync::Arc;
use std::time::Duration;

use meshd_ca::clock::statement::{Question, StatementError};
use meshd_ca::clock::{AGREEMENT, Era, Said};
use meshd_ca::identity::NodeId;
use meshd_ca::keys::PublicKey;
use meshd_ca::time::UnixTime;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::clock::{self, Clock};
use crate::control::link::Links;
use crate::control::serve::TimeAnswer;
use crate::intercept::process::since_boot;
use crate::membership::Membership;
use crate::task::Tasks;

/// How often it is looked whether it is time.
const LOOK: Duration = Duration::from_secs(1);
/// How often authorities are asked.
const EVERY: Duration = Duration::from_secs(600);
/// How soon again, when one did not answer, at first; then later and later, but no later than that when none did.
const AGAIN: Duration = Duration::from_secs(1);
const LATER: Duration = Duration::from_secs(60);
/// No sooner than that, whatever happens.
const PAUSE: Duration = Duration::from_secs(2);
/// How long an answer may take: it may be that old.
const ANSWER: Duration = Duration::from_secs(4);
/// How much the floor grows before it is written: an SD card is worn by writes.
const WRITE: Duration = Duration::from_secs(3600);

/// What the task works with.
pub(super) struct Timekeeper {
    pub(super) membership: Arc<Membership>,
    pub(super) links: Arc<Links>,
    pub(super) clock: Clock,
}

impl Timekeeper {
    /// Asks for ever.
    pub(super) async fn run(self) {
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut roster, mut reset) = (self.membership.watch(), self.membership.reset());
        let (mut last, mut next, mut again) = (None, Duration::ZERO, AGAIN);
        let (mut offset, mut authorities) = (Clock::offset(), Vec::new());
        let mut saved = self.clock.floor();
        loop {
            let now = tokio::select! {
                _ = tick.tick() => false,
                () = self.clock.doubted() => true,
                // What was said of before says nothing any more.
                changed = reset.changed() => if changed.is_err() { return } else { true },
                changed = roster.changed() => if changed.is_err() { return } else { false },
            };
            let all = self.authorities();
            // The system clock was set, or others say now what time it is, this host perhaps.
            let set = Clock::offset().abs_diff(offset) > AGREEMENT.as_secs();
            if now || set || all != authorities {
                (offset, next, again) = (Clock::offset(), Duration::ZERO, AGAIN);
                authorities.clone_from(&all);
            }
            let boot = since_boot();
            if boot < next || last.is_some_and(|last| boot.saturating_sub(last) < PAUSE) {
                continue;
            }
            let era = self.clock.era();
            let mut said = self.ask(&all).await;
            if self.clock.era() != era {
                // An answer was that the clock was set back: the others are of before.
                said.clear();
            }
            let before = self.clock.told();
            let own = all.iter().any(|(node, _)| *node == self.membership.me());
            self.clock.agree(&said, own);
            let after = self.clock.told();
            if after.why != before.why || after.time.distance(before.time) > AGREEMENT {
                let why = self.clock.why();
                tracing::info!(source = after.why.as_str(), time = %after.time, why, "mesh time");
            }
            last = Some(since_boot());
            let complete = said.len() + usize::from(own) == all.len();
            // What one says alone is followed, but only two together say when there is no way back: the other one may just be starting.
            let latest = if said.is_empty() { LATER } else { EVERY };
            let (pause, more) = if complete { (EVERY, AGAIN) } else { (again.min(latest), 2 * again) };
            (next, again) = (since_boot() + pause, more.min(latest));
            self.save(&mut saved).await;
        }
    }

    /// The authorities, this node among them if it is one.
    fn authorities(&self) -> Vec<(NodeId, PublicKey)> {
        self.membership.roster().authorities().map(|m| (m.node(), m.key)).collect()
    }

    async fn ask(&self, all: &[(NodeId, PublicKey)]) -> Vec<Said> {
        let mut asked = Tasks::new();
        let other = |node| node != self.membership.me() && self.links.knows(node);
        for (node, key) in all.iter().copied().filter(|(node, _)| other(*node)) {
            let (links, membership, era) = (self.links.clone(), self.membership.clone(), self.clock.era());
            asked.spawn(async move {
                let answer = timeout(ANSWER, ask_one(&links, &membership, era, (node, &key))).await;
                answer.unwrap_or_else(|_| Err("no answer in time".into())).map_err(|why| (node, why))
            });
        }
        let mut said = Vec::new();
        while let Some(answer) = asked.join_next().await {
            match answer {
                Ok(Ok(time)) => said.push(time),
                Ok(Err((node, why))) => tracing::debug!(%node, why, "an authority did not say what time it is"),
                Err(error) => tracing::debug!(%error, "an authority was not asked"),
            }
        }
        said
    }

    async fn save(&self, saved: &mut UnixTime) {
        let floor = self.clock.floor();
        // Set back, which was written then.
        *saved = floor.min(*saved);
        if floor.since(*saved) < WRITE {
            return;
        }
        match self.membership.save(clock::FILE, self.clock.to_bytes()).await {
            Ok(()) => *saved = floor,
            Err(error) => tracing::warn!(%error, "the clock floor could not be saved"),
        }
    }
}

async fn ask_one(links: &Links, membership: &Membership, era: Era, (node, key): (NodeId, &PublicKey)) -> Result<Said, String> {
    let question = Question::within(era).map_err(|e| e.to_string())?;
    let body = serde_json::to_vec(&question).map_err(|e| e.to_string())?;
    let answer = links.post(node, "/v1/time", body).await.map_err(|e| e.to_string())?;
    let answer: TimeAnswer = serde_json::from_slice(&answer).map_err(|e| e.to_string())?;
    let said = question.read(&answer.said, key, membership.roster().mesh(), membership.me());
    if said == Err(StatementError::OtherEra) {
        let own = membership.reset().borrow().clone();
        match (answer.reset, own) {
            (Some(word), _) => drop(membership.set_back(word).await.map_err(|e| e.to_string())?),
            // The other one has not heard of it.
            (None, Some(word)) => {
                let body = serde_json::to_vec(word.signed()).map_err(|e| e.to_string())?;
                links.post(node, "/v1/reset", body).await.map_err(|e| e.to_string())?;
                membership.clock().doubt();
            }
            (None, None) => {}
        }
    }
    said.map_err(|e| e.to_string())
}
