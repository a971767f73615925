//! How a group of checks says what it found.

use crate::api::{Finding, Level};

/// The findings of one group, as they are made.
#[derive(Debug)]
pub(crate) struct Findings {
    group: &'static str,
    found: Vec<Finding>,
}

/// How something is: what was seen, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As it should be.
    Ok(String),
    /// Works, and deserves a look.
    Warn(String, String),
    /// Does not work.
    Fail(String, String),
}

impl Verdict {
    pub(crate) fn ok(detail: impl Into<String>) -> Self {
        Self::Ok(detail.into())
    }
    pub(crate) fn warn(detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Warn(detail.into(), hint.into())
    }
    pub(crate) fn fail(detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Fail(detail.into(), hint.into())
    }
}

impl Findings {
    /// Of a group whose name people read.
    pub(crate) fn of(group: &'static str) -> Self {
        Self { group, found: Vec::new() }
    }

    /// Adds one: its code, what should be so, and how it is.
    pub(crate) fn add(&mut self, code: &str, name: impl Into<String>, verdict: Verdict) {
        let some = |text: String| Some(text).filter(|t| !t.is_empty());
        let (level, detail, hint) = match verdict {
            Verdict::Ok(detail) => (Level::Ok, some(detail), None),
            Verdict::Warn(detail, hint) => (Level::Warn, some(detail), some(hint)),
            Verdict::Fail(detail, hint) => (Level::Fail, some(detail), some(hint)),
        };
        self.found.push(Finding { group: self.group.into(), name: name.into(), level, detail, hint, code: code.into() });
    }

    pub(crate) fn ok(&mut self, code: &str, name: impl Into<String>, detail: impl Into<String>) {
        self.add(code, name, Verdict::ok(detail));
    }
    pub(crate) fn warn(&mut self, code: &str, name: impl Into<String>, detail: impl Into<String>, hint: impl Into<String>) {
        self.add(code, name, Verdict::warn(detail, hint));
    }
    pub(crate) fn fail(&mut self, code: &str, name: impl Into<String>, detail: impl Into<String>, hint: impl Into<String>) {
        self.add(code, name, Verdict::fail(detail, hint));
    }

    pub(crate) fn done(self) -> Vec<Finding> {
        self.found
    }
}

/// The first few of a list in words, and how many more there are.
pub(crate) fn some_of<T: ToString>(all: impl IntoIterator<Item = T>) -> String {
    const SHOWN: usize = 4;
    let all: Vec<String> = all.into_iter().map(|t| t.to_string()).collect();
    let shown = all[..all.len().min(SHOWN)].join(", ");
    match all.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// `1 member`, `2 members`.
pub(crate) fn count(n: usize, thing: &str) -> String {
    if n == 1 { format!("1 {thing}") } else { format!("{n} {thing}s") }
}

/// What the tests of every group ask of what a group found.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::api::code;

    /// The level of each code in the order found; every code is a known one, and whatever is not well has a hint.
    #[track_caller]
    pub(crate) fn levels(found: &[Finding]) -> Vec<(&str, Level)> {
        for f in found {
            assert!(code::ALL.contains(&f.code.as_str()), "{f:?} has an unknown code");
            assert!(f.level == Level::Ok || f.hint.is_some(), "{f:?} has no hint");
            assert!(!f.group.is_empty() && !f.name.is_empty(), "{f:?} is not readable");
        }
        found.iter().map(|f| (f.code.as_str(), f.level)).collect()
    }

    /// Those that are not well: code and level.
    #[track_caller]
    pub(crate) fn ill(found: &[Finding]) -> Vec<(&str, Level)> {
        levels(found).into_iter().filter(|(_, level)| *level != Level::Ok).collect()
    }

    /// With this change to the facts, exactly these are not well.
    #[track_caller]
    pub(crate) fn ill_with<F>(
        mut facts: F,
        change: impl FnOnce(&mut F),
        judge: impl FnOnce(&F) -> Vec<Finding>,
        expected: &[(&str, Level)],
    ) {
        change(&mut facts);
        assert_eq!(ill(&judge(&facts)), expected);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_numbers_are_readable() {
        assert_eq!(some_of(["a"]), "a");
        assert_eq!(some_of(1..=4), "1, 2, 3, 4");
        assert_eq!(some_of(1..=7), "1, 2, 3, 4 and 3 more");
        assert_eq!((count(1, "peer").as_str(), count(0, "peer").as_str()), ("1 peer", "0 peers"));
    }
}
