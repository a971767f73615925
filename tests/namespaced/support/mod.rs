//! What the scenarios share: a mesh of real daemons, plain traffic, and what to expect of both.

pub(crate) mod air;
pub(crate) mod manager;
pub(crate) mod mesh;
pub(crate) mod role;
pub(crate) mod scenario;
pub(crate) mod ssh;
pub(crate) mod traffic;
pub(crate) mod units;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::Instant;

/// How many times slower than others this machine is (`MESHD_TEST_SLOWER`): a processor that is emulated.
pub(crate) fn slower() -> u32 {
    std::env::var("MESHD_TEST_SLOWER").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Asks again and again until the answer is yes, and fails with the last reason when `patience` is over.
pub(crate) fn eventually<T>(patience: Duration, what: &str, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let patience = patience * slower();
    let end = Instant::now() + patience;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > end => {
                return Err(error).with_context(|| format!("not within {} s: {what}", patience.as_secs()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// A text that nobody else sends, to be looked for on the link.
pub(crate) fn marker(name: &str) -> String {
    use std::hash::{BuildHasher, Hasher};
    let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    format!("plain-{name}-{random:016x}")
}

/// `ensure!` with both values in the message.
macro_rules! equal {
    ($left:expr, $right:expr, $($what:tt)+) => {
        match (&$left, &$right) {
            (left, right) => anyhow::ensure!(left == right, "{}: {left:?} is not {right:?}", format!($($what)+)),
        }
    };
}
pub(crate) use equal;

/// Copies a directory, with everything about its files.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = Command::new("cp").arg("-aT").args([from, to]).status()?;
    ensure!(copied.success(), "cp ended with {copied}");
    Ok(())
}
