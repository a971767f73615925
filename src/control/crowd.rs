//! How many may be at a door at once, and who has to go when it is too many.
//!
//! Owns counting, nothing else. Everybody who comes is let in, and whoever was there for longest makes room: of the same source when that
//! one has its share, otherwise of the source that has most. So nobody keeps others out: a source that takes all it can get is in the way
//! of itself, and one of a thousand sources that came for a moment is through before it is its turn to go.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Those at one door, by source. Cheap to clone.
pub(crate) struct Crowd<S> {
    most: usize,
    per_source: usize,
    state: Arc<Mutex<State<S>>>,
}

struct State<S> {
    next: u64,
    total: usize,
    sources: HashMap<S, BTreeMap<u64, Arc<Notify>>>,
}

/// A place in the crowd, until dropped.
pub(crate) struct Place<S: Copy + Eq + Hash> {
    crowd: Crowd<S>,
    source: S,
    number: u64,
    go: Arc<Notify>,
}

impl<S> Clone for Crowd<S> {
    fn clone(&self) -> Self {
        Self { most: self.most, per_source: self.per_source, state: self.state.clone() }
    }
}

impl<S: Copy + Eq + Hash> Crowd<S> {
    /// Room for `most` in all and `per_source` of each source; one at the least.
    pub(crate) fn new(most: usize, per_source: usize) -> Self {
        let state = State { next: 0, total: 0, sources: HashMap::new() };
        Self { most: most.max(1), per_source: per_source.max(1), state: Arc::new(Mutex::new(state)) }
    }

    /// Lets one in, and says whether another had to go for it.
    pub(crate) fn enter(&self, source: S) -> (Place<S>, bool) {
        let mut state = self.state();
        let own = state.sources.get(&source).map_or(0, BTreeMap::len);
        let pushed = if own >= self.per_source {
            state.push_out(source)
        } else if state.total >= self.most {
            let heaviest = state.sources.iter().max_by_key(|(_, there)| (there.len(), there.keys().next().map(|n| Reverse(*n))));
            heaviest.map(|(source, _)| *source).is_some_and(|source| state.push_out(source))
        } else {
            false
        };
        let (number, go) = (state.next, Arc::<Notify>::default());
        state.next += 1;
        state.total += 1;
        state.sources.entry(source).or_default().insert(number, go.clone());
        drop(state);
        (Place { crowd: self.clone(), source, number, go }, pushed)
    }

    fn state(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Copy + Eq + Hash> State<S> {
    /// The oldest of a source has to go.
    fn push_out(&mut self, source: S) -> bool {
        let oldest = self.sources.get(&source).and_then(|there| there.keys().next().copied());
        oldest.and_then(|number| self.remove(source, number)).map(|go| go.notify_one()).is_some()
    }

    fn remove(&mut self, source: S, number: u64) -> Option<Arc<Notify>> {
        let there = self.sources.get_mut(&source)?;
        let go = there.remove(&number)?;
        self.total -= 1;
        if there.is_empty() {
            self.sources.remove(&source);
        }
        Some(go)
    }
}

impl<S: Copy + Eq + Hash> Place<S> {
    /// Waits until another needs the place.
    pub(crate) async fn lost(&self) {
        self.go.notified().await;
    }
}

impl<S: Copy + Eq + Hash> Drop for Place<S> {
    fn drop(&mut self) {
        self.crowd.state().remove(self.source, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{Duration, timeout};

    async fn gone(place: &Place<u8>) -> bool {
        timeout(Duration::from_millis(1), place.lost()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_who_takes_most_makes_room_for_the_others() {
        let crowd = Crowd::new(6, 4);
        let mut greedy: Vec<_> = (0..4).map(|_| crowd.enter(1).0).collect();
        assert!(!gone(&greedy[0]).await);
        // Its own share is used up: its oldest goes, and nobody else's.
        let (next, pushed) = crowd.enter(1);
        greedy.push(next);
        assert!(pushed && gone(&greedy[0]).await && !gone(&greedy[1]).await);
        let modest: Vec<_> = (2..5).map(|source| crowd.enter(source).0).collect();
        assert!(gone(&greedy[1]).await, "the crowd is full: it makes room");
        for place in &modest {
            assert!(!gone(place).await);
        }
        assert_eq!(crowd.state().total, 6);
        drop((greedy, modest));
        assert!(crowd.state().sources.is_empty() && crowd.state().total == 0, "somebody who is gone is remembered");
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_sources_do_not_keep_one_out() {
        let crowd = Crowd::new(3, 2);
        let (a, b, c) = (crowd.enter(1).0, crowd.enter(2).0, crowd.enter(3).0);
        let (_d, pushed) = crowd.enter(4);
        assert!(pushed && gone(&a).await && !gone(&b).await && !gone(&c).await, "the oldest goes");
    }
}
