//! Which worlds are run, and what is said about one that fails.
//!
//! `MESHD_SIM_SEED=n` runs one seed, `MESHD_SIM_SEEDS=n` the first `n`. Everything that happens is drawn from the seed. Two things are not,
//! because there is no way to ask for them: keys, which are made once in a process and put in the order of their ids, and the random
//! part of signatures. So of two statements that are of equal rank in a roster, another one may win in another run of the same seed.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::OnceLock;

use meshd_ca::keys::PrivateKey;

/// How many keys there are in the process.
pub(crate) const KEYS: usize = 128;
/// What happened in a world, in order.
pub(crate) type Log = Rc<RefCell<Vec<String>>>;

/// A key of the process.
pub(crate) fn key(n: usize) -> &'static PrivateKey {
    static POOL: OnceLock<Vec<PrivateKey>> = OnceLock::new();
    let pool = POOL.get_or_init(|| {
        let mut keys: Vec<_> = (0..KEYS).map(|_| PrivateKey::generate().unwrap()).collect();
        keys.sort_by_key(|k| k.public().node_id());
        keys
    });
    // Neighbours in the order of ids are not neighbours in time.
    &pool[n * 37 % KEYS]
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|s| s.parse().unwrap_or_else(|_| panic!("{name} is not a number: {s}")))
}

/// Runs a world for each seed, `count` of them unless the environment says otherwise. Panics with the events of the first that fails.
pub(crate) fn run<T>(what: &str, count: u64, world: impl Fn(u64, Log) -> Result<T, String>) -> Vec<T> {
    let seeds = match number("MESHD_SIM_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=number("MESHD_SIM_SEEDS").unwrap_or(count),
    };
    let mut done = Vec::new();
    for seed in seeds {
        let log = Log::default();
        let result = catch_unwind(AssertUnwindSafe(|| world(seed, log.clone())));
        let why = match result {
            Ok(Ok(outcome)) => {
                done.push(outcome);
                continue;
            }
            Ok(Err(why)) => why,
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
                format!("a panic: {}", text.unwrap_or("without a word"))
            }
        };
        let events = log.borrow().join("\n");
        panic!(
            "{events}\n\n{what}: seed {seed}: {why}\nrun it again: MESHD_SIM_SEED={seed} cargo test -p meshd-agent --test trust_sim {what}"
        );
    }
    done
}
