//! Buffers that are borrowed while bytes are in hand and given back when there are none.
//!
//! Owns how large they are, how many bytes of them are lent at once over all connections of the process, and how many are kept for the
//! next one who asks. An idle connection holds none.
//!
//! The bound is a hard one, and nobody ever waits for a buffer: whoever gets no large one takes a small one, and whoever gets no small one
//! works without (`lean`). So those who hold theirs for ever, because an application does not read, keep nobody else from going on.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::identity::traffic::{HEADER, MAX_DATA, TRAILER};

/// Room for one full record as we seal it.
pub(super) const SLOT: usize = HEADER + MAX_DATA + TRAILER;
/// Records in a large buffer: what one system call moves.
pub(super) const SLOTS: usize = 8;
/// Room behind the records, for one that ends a direction, and for the padding a peer may add to a full record.
pub(super) const SPARE: usize = 256;
/// Buffers of each size that are kept when nobody uses them (0.25 and 1 MiB), beside what is lent.
const KEPT_SMALL: usize = 16;
const KEPT_LARGE: usize = 8;

const SMALL_SIZE: usize = SLOT + SPARE;
const LARGE_SIZE: usize = SLOTS * SLOT + SPARE;

/// Handshakes of ours at once that have a buffer; more wait for those to end or to fail. Peers' handshakes are bounded by the mesh port.
const DIALS: usize = 128;
/// Bytes that streams leave: for handshakes, ours and 512 of others, and for what 64 threads have at hand.
const LEFT: usize = (DIALS + 512 + 64) * SMALL_SIZE;
/// The least that may be lent, and the most: 16,000 connections that nobody reads from.
const LEAST: usize = 24 << 20;
const MOST: usize = 256 << 20;

static SMALL: Shelf = Shelf::new(SMALL_SIZE, KEPT_SMALL);
static LARGE: Shelf = Shelf::new(LARGE_SIZE, KEPT_LARGE);
static BUDGET: Budget = Budget::new(LEAST);
static DIALLING: Semaphore = Semaphore::const_new(DIALS);

#[cfg(test)]
thread_local! {
    /// What the connections of one test have in place of [`BUDGET`].
    static OWN: std::cell::Cell<Option<&'static Budget>> = const { std::cell::Cell::new(None) };
}

#[cfg(any(test, feature = "fuzzing"))]
thread_local! {
    /// How many of sixteen small buffers are not to be had, and what decides which.
    static DRY: std::cell::Cell<(u8, u64)> = const { std::cell::Cell::new((0, 0)) };
}

/// From now on the connections of this thread have so many buffers and no others: what is lent of these, and the most that was.
#[cfg(test)]
pub(crate) fn own(buffers: usize) -> impl Fn() -> (Lent, usize) {
    let budget: &'static Budget = Box::leak(Box::new(Budget::new(buffers * SMALL_SIZE + LEFT)));
    OWN.set(Some(budget));
    move || (budget.lent(), budget.most.load(Ordering::Relaxed))
}

/// From now on so many of sixteen small buffers that this thread asks for are not to be had.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn dry(sixteenths: u8, seed: u64) {
    DRY.set((sixteenths, seed));
}

#[cfg(any(test, feature = "fuzzing"))]
fn is_dry() -> bool {
    let (sixteenths, state) = DRY.get();
    let next = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    DRY.set((sixteenths, next));
    (next >> 60) < u64::from(sixteenths)
}

fn budget() -> &'static Budget {
    #[cfg(test)]
    if let Some(own) = OWN.get() {
        return own;
    }
    &BUDGET
}

/// Bounds what is lent in this process by a sixteenth of a machine's `memory`: 24 MiB at least, 256 at most.
pub fn bound_by(memory: u64) {
    let bound = usize::try_from(memory / 16).unwrap_or(MOST).clamp(LEAST, MOST);
    BUDGET.bound.store(bound, Ordering::Relaxed);
}

/// What is lent at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lent {
    /// Bytes of buffers.
    pub bytes: usize,
    /// The most they may be.
    pub bound: usize,
    /// How often a record was carried without a buffer, since there was none.
    pub refused: u64,
}

/// What is lent in this process.
pub fn lent() -> Lent {
    budget().lent()
}

/// What is lent, and the most it may be.
struct Budget {
    bound: AtomicUsize,
    out: AtomicUsize,
    refused: AtomicU64,
    #[cfg(test)]
    most: AtomicUsize,
}

impl Budget {
    const fn new(bound: usize) -> Self {
        Self {
            bound: AtomicUsize::new(bound),
            out: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
            #[cfg(test)]
            most: AtomicUsize::new(0),
        }
    }

    fn lent(&self) -> Lent {
        let of = |n: &AtomicUsize| n.load(Ordering::Relaxed);
        Lent { bytes: of(&self.out), bound: of(&self.bound), refused: self.refused.load(Ordering::Relaxed) }
    }

    /// Whether `size` more may be lent while no more than `most` is; counts it.
    fn lend(&self, size: usize, most: usize) -> bool {
        let more = |out: usize| (out + size <= most).then_some(out + size);
        let lent = self.out.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        lent.is_ok_and(|before| {
            self.note(before + size);
            true
        })
    }

    /// For a test: so much is lent.
    fn note(&self, _lent: usize) {
        #[cfg(test)]
        self.most.fetch_max(_lent, Ordering::Relaxed);
    }

    /// What streams may have together.
    fn streams(&self) -> usize {
        self.bound.load(Ordering::Relaxed).saturating_sub(LEFT)
    }
}

struct Shelf {
    size: usize,
    keep: usize,
    free: Mutex<Vec<Box<[u8]>>>,
}

impl Shelf {
    const fn new(size: usize, keep: usize) -> Self {
        Self { size, keep, free: Mutex::new(Vec::new()) }
    }

    /// A buffer, unless more than `most` would be lent then.
    fn take(&'static self, most: usize) -> Option<Buffer> {
        let budget = budget();
        budget.lend(self.size, most).then(|| self.hand_out())
    }

    fn hand_out(&'static self) -> Buffer {
        let kept = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Buffer { bytes: kept.unwrap_or_else(|| vec![0; self.size].into()), shelf: self }
    }
}

/// A borrowed buffer; dropping it gives it back.
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    shelf: &'static Shelf,
}

impl Buffer {
    /// One record's, if there is one to be had.
    pub(super) fn small() -> Option<Self> {
        #[cfg(any(test, feature = "fuzzing"))]
        if is_dry() {
            return None;
        }
        let taken = SMALL.take(budget().streams());
        if taken.is_none() {
            budget().refused.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// [`SLOTS`] records', as long as half of what streams may have is left for others.
    pub(super) fn larger() -> Option<Self> {
        LARGE.take(budget().streams() / 2)
    }

    /// A large one for who is `busy` if there is one, or else a small one.
    pub(super) fn fitting(busy: bool) -> Option<Self> {
        let large = if busy { Self::larger() } else { None };
        large.or_else(Self::small)
    }

    /// One record's, whatever is lent: for a handshake, which has a place and little time, or for what is done at once. Never for as long
    /// as somebody has to be waited for.
    pub(super) fn at_hand() -> Self {
        let budget = budget();
        let before = budget.out.fetch_add(SMALL_SIZE, Ordering::Relaxed);
        budget.note(before + SMALL_SIZE);
        SMALL.hand_out()
    }

    /// How many full records fit.
    pub(super) fn slots(&self) -> usize {
        self.bytes.len() / SLOT
    }
}

/// A place among the handshakes that this host begins, in the order in which they come.
pub(super) async fn dialling() -> Option<SemaphorePermit<'static>> {
    // It is never closed.
    DIALLING.acquire().await.ok()
}

impl Drop for Buffer {
    fn drop(&mut self) {
        budget().out.fetch_sub(self.shelf.size, Ordering::Relaxed);
        let mut free = self.shelf.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < self.shelf.keep {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_lent_than_may_be() {
        let lent = own(20);
        let large: Vec<_> = std::iter::from_fn(Buffer::larger).collect();
        assert_eq!(large.len(), 1, "half is left for others");
        let small: Vec<_> = std::iter::from_fn(Buffer::small).collect();
        assert!(Buffer::larger().is_none() && Buffer::fitting(true).is_none());
        assert!((10..20).contains(&small.len()), "{}", small.len());
        let now = lent().0;
        assert!(now.bytes + LEFT <= now.bound && now.refused > 1, "{now:?}");
        // A handshake, or what is done at once, needs none of these.
        drop(Buffer::at_hand());
        drop(large);
        assert!(Buffer::fitting(true).is_some_and(|b| b.slots() == 1), "a small one where there is no large one");
        drop(small);
        assert_eq!(lent().0.bytes, 0);
        assert!(lent().1 <= lent().0.bound);
    }
}
