//! Which worlds are run, and what is said about one that fails.
//!
//! `MESHD_SIM_SEED=n` runs one seed, `MESHD_SIM_SEEDS=n` the first `n`, or with `MESHD_SIM_FIRST=m` those from `m` on. Everything that happens
//! follows from the seed, to the last byte: random numbers are drawn from it and signatures are toys (`meshd_ca::keys::simulated`). With
//! [`Keys::Real`] they are what they are outside, and then of two statements that are of equal rank in a roster another one may win in another run of
//! the same seed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use meshd_ca::keys::{PrivateKey, simulated};

/// How many keys there are in the process.
pub(crate) const KEYS: usize = 128;
/// What happened in a world, in order.
pub(crate) type Log = Rc<RefCell<Vec<String>>>;

/// What the hosts of a world sign with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keys {
    Toys,
    Real,
}

impl Keys {
    /// A key of the process.
    pub(crate) fn get(self, n: usize) -> &'static PrivateKey {
        static TOYS: OnceLock<Vec<PrivateKey>> = OnceLock::new();
        static REAL: OnceLock<Vec<PrivateKey>> = OnceLock::new();
        let make = || {
            let mut keys: Vec<_> = (0..KEYS).map(|_| PrivateKey::generate().unwrap()).collect();
            keys.sort_by_key(|k| k.public().node_id());
            keys
        };
        let pool = match self {
            Self::Toys => TOYS.get_or_init(|| {
                let _playing = simulated::begin(0);
                make()
            }),
            Self::Real => REAL.get_or_init(make),
        };
        // Neighbours in the order of ids are not neighbours in time.
        &pool[n * 37 % KEYS]
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|s| s.parse().unwrap_or_else(|_| panic!("{name} is not a number: {s}")))
}

/// Runs a world for each seed, `count` of them unless the environment says otherwise, on all processors. Panics with the events of the first that
/// fails.
pub(crate) fn run<T: Send>(what: &str, keys: Keys, count: u64, world: impl Fn(u64, Log) -> Result<T, String> + Sync) -> Vec<T> {
    let (first, last) = match number("MESHD_SIM_SEED") {
        Some(seed) => (seed, seed),
        None => {
            let first = number("MESHD_SIM_FIRST").unwrap_or(1);
            (first, first + number("MESHD_SIM_SEEDS").unwrap_or(count) - 1)
        }
    };
    let (next, outcomes) = (AtomicU64::new(first), Mutex::new((BTreeMap::new(), BTreeMap::new())));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > last {
                return;
            }
            let outcome = one(seed, keys, &world);
            let mut outcomes = outcomes.lock().unwrap();
            match outcome {
                Ok(done) => drop(outcomes.0.insert(seed, done)),
                Err(why) => {
                    outcomes.1.insert(seed, why);
                    next.store(last + 1, Ordering::Relaxed);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let others = std::thread::available_parallelism().map_or(1, usize::from).min(last as usize) - 1;
        (0..others).for_each(|_| drop(scope.spawn(work)));
        work();
    });
    let (done, failed) = outcomes.into_inner().unwrap();
    if let Some((seed, why)) = failed.first_key_value() {
        panic!("{why}\nrun it again: MESHD_SIM_SEED={seed} cargo test -p meshd-agent --test trust_sim {what}");
    }
    done.into_values().collect()
}

fn one<T>(seed: u64, keys: Keys, world: impl Fn(u64, Log) -> Result<T, String>) -> Result<T, String> {
    let log = Log::default();
    let _playing = (keys == Keys::Toys).then(|| simulated::begin(seed));
    let why = match catch_unwind(AssertUnwindSafe(|| world(seed, log.clone()))) {
        Ok(Ok(outcome)) => return Ok(outcome),
        Ok(Err(why)) => why,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            format!("a panic: {}", text.unwrap_or("without a word"))
        }
    };
    Err(format!("{}\n\nseed {seed}: {why}", log.borrow().join("\n")))
}
