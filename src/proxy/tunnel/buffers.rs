//! Buffers that are borrowed while bytes are in hand and given back when there are none.
//!
//! Owns how large they are, how many large ones there may be at once and how many are kept for the next one who asks. An idle
//! connection holds none.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::identity::traffic::{HEADER, MAX_DATA, TRAILER};

/// Room for one full record as we seal it.
pub(super) const SLOT: usize = HEADER + MAX_DATA + TRAILER;
/// Records in a large buffer: what one system call moves.
pub(super) const SLOTS: usize = 8;
/// Room behind the records, for one that ends a direction, and for the padding a peer may add to a full record.
pub(super) const SPARE: usize = 256;
/// Large buffers in use at once over all connections (32 MiB); beyond it small ones do.
const MAX_LARGE: usize = 256;
/// Buffers of each size that are kept when nobody uses them (0.25 and 1 MiB).
const KEPT_SMALL: usize = 16;
const KEPT_LARGE: usize = 8;

static SMALL: Shelf = Shelf::new(SLOT + SPARE, KEPT_SMALL);
static LARGE: Shelf = Shelf::new(SLOTS * SLOT + SPARE, KEPT_LARGE);

struct Shelf {
    size: usize,
    keep: usize,
    free: Mutex<Vec<Box<[u8]>>>,
    out: AtomicUsize,
}

impl Shelf {
    const fn new(size: usize, keep: usize) -> Self {
        Self { size, keep, free: Mutex::new(Vec::new()), out: AtomicUsize::new(0) }
    }

    fn take(&'static self) -> Buffer {
        self.out.fetch_add(1, Ordering::Relaxed);
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
    /// One record's.
    pub(super) fn small() -> Self {
        SMALL.take()
    }

    /// [`SLOTS`] records', or a small one where all large ones are in use.
    pub(super) fn large() -> Self {
        if LARGE.out.load(Ordering::Relaxed) < MAX_LARGE { LARGE.take() } else { SMALL.take() }
    }

    /// How many full records fit.
    pub(super) fn slots(&self) -> usize {
        self.bytes.len() / SLOT
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.shelf.out.fetch_sub(1, Ordering::Relaxed);
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
