//! What was counted, its form in a file, and when a path has grown.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

/// Instructions beyond which a path has grown, in thousandths of what it took before. Two builds of one source in two places differed by 1.4 %: what the
/// compiler inlines depends on how it divides the crate.
const LIMIT: u64 = 20;
/// The same where it is not the same each time: how often the kernel says "not yet", which ids the keys of a run have.
const LIMIT_VARYING: u64 = 30;
/// So many more are none in a short path, for the same reason: 29 were seen.
const SLACK: u64 = 60;
/// Allocations of one turn: what a table does now and then when it grows is none.
const ALLOCATION: f64 = 0.5;

/// What one turn of a path takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Counts {
    pub(crate) instructions: u64,
    pub(crate) allocations: f64,
}

/// All paths.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    paths: Vec<(String, Counts)>,
}

impl Ledger {
    /// Puts a path behind the others.
    pub(crate) fn add(&mut self, name: &str, counts: Counts) {
        self.paths.push((name.to_owned(), counts));
    }

    /// A table of this beside what was `before`, and how many paths have grown or are not in both.
    pub(crate) fn beside(&self, before: &Self) -> (String, usize) {
        let mut old: BTreeMap<&str, Counts> = before.paths.iter().map(|(name, counts)| (name.as_str(), *counts)).collect();
        let (mut text, mut grown) = (String::new(), 0);
        for (name, now) in &self.paths {
            let (word, then) = match old.remove(name.as_str()) {
                Some(then) if grew(name, then, *now) => ("GREW", Some(then)),
                Some(then) if grew(name, *now, then) => ("less", Some(then)),
                Some(then) => ("", Some(then)),
                None => ("NEW", None),
            };
            grown += usize::from(matches!(word, "GREW" | "NEW"));
            let change = then.map_or(String::new(), |then| {
                let percent = now.instructions as f64 / then.instructions as f64 * 100.0 - 100.0;
                let allocations = now.allocations - then.allocations;
                format!("{percent:+8.2} % {allocations:+6.2}")
            });
            let _ = writeln!(text, "{name:<34} {:>9} {:>7.2} {change:>17}  {word}", now.instructions, now.allocations);
        }
        for name in old.keys() {
            grown += 1;
            let _ = writeln!(text, "{name:<34} GONE");
        }
        (text, grown)
    }
}

fn grew(name: &str, before: Counts, now: Counts) -> bool {
    let varies = ["sockets:", "catalog:"].iter().any(|start| name.starts_with(start));
    let limit = if varies { LIMIT_VARYING } else { LIMIT };
    now.instructions > before.instructions + before.instructions * limit / 1000 + SLACK
        || now.allocations >= before.allocations + ALLOCATION
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "# What one turn of each hot path takes: its name, instructions, allocations. Written by bench/counts --accept."
        )?;
        self.paths.iter().try_for_each(|(name, c)| writeln!(f, "{name:<34} {:>9} {:>7.2}", c.instructions, c.allocations))
    }
}

impl FromStr for Ledger {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut ledger = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [name, instructions, allocations] = words[..] else { anyhow::bail!("not a path and its counts: {line}") };
            let number = || format!("not counts: {line}");
            let counts = Counts {
                instructions: instructions.parse().with_context(number)?,
                allocations: allocations.parse().with_context(number)?,
            };
            ensure!(ledger.paths.iter().all(|(other, _)| other != name), "{name} is there twice");
            ledger.add(name, counts);
        }
        Ok(ledger)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(paths: &[(&str, u64, f64)]) -> Ledger {
        let paths = paths.iter().map(|(name, instructions, allocations)| {
            (name.to_string(), Counts { instructions: *instructions, allocations: *allocations })
        });
        Ledger { paths: paths.collect() }
    }

    #[test]
    fn is_read_as_it_was_written() {
        let one = ledger(&[("seal", 1234, 0.0), ("open", 5, 1.25)]);
        assert_eq!(one.to_string().parse::<Ledger>().unwrap().paths, one.paths);
        for wrong in ["seal 1", "seal one 2", "seal 1 2\nseal 1 2"] {
            assert!(wrong.parse::<Ledger>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_grew_is_told() {
        let before = ledger(&[("seal", 1000, 0.0), ("open", 1000, 2.0), ("sockets:x", 1000, 1.0)]);
        let grown = |now: &[(&str, u64, f64)]| ledger(now).beside(&before).1;
        assert_eq!(grown(&[("seal", 1080, 0.0), ("open", 900, 2.1), ("sockets:x", 1090, 1.0)]), 0);
        assert_eq!(grown(&[("seal", 1081, 0.0), ("open", 900, 2.5), ("sockets:x", 1091, 1.0)]), 3);
        // What nobody compared is no less a change.
        assert_eq!(grown(&[("seal", 1000, 0.0), ("other", 1, 0.0), ("sockets:x", 1, 0.0)]), 2);
    }
}
