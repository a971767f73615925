//! Values as they are written, before a key gives them a type; and the parsers that the keys share.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use super::{Choice, MAX_LIST, parse_duration, show_duration};

/// Longest single value, in bytes.
const MAX_VALUE: usize = 4096;

/// A value as written: text for one, or a list. Numbers and booleans of TOML are their text.
#[derive(Debug)]
pub(super) enum Value {
    /// From the environment or a flag: a key that takes a list splits it at commas.
    Text(String),
    /// A scalar of TOML.
    One(String),
    /// An array of TOML.
    Many(Vec<String>),
}

impl Value {
    pub(super) fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    pub(super) fn toml(value: &toml::Value) -> Result<Self, String> {
        let scalar = |v: &toml::Value| match v {
            toml::Value::String(s) => Ok(s.clone()),
            toml::Value::Integer(n) => Ok(n.to_string()),
            toml::Value::Boolean(b) => Ok(b.to_string()),
            other => Err(format!("expected a string, a number, true or false, not a TOML {}", other.type_str())),
        };
        match value {
            toml::Value::Array(items) => Ok(Self::Many(items.iter().map(scalar).collect::<Result<_, _>>()?)),
            other => Ok(Self::One(scalar(other)?)),
        }
    }

    /// The single value.
    pub(super) fn one(&self) -> Result<&str, String> {
        match self {
            Self::Text(s) | Self::One(s) if s.len() <= MAX_VALUE => Ok(s.trim()),
            Self::Text(_) | Self::One(_) => Err(format!("longer than {MAX_VALUE} bytes")),
            Self::Many(_) => Err("expected one value, not a list".into()),
        }
    }

    /// The list of values.
    fn list(&self) -> Result<Vec<&str>, String> {
        let items: Vec<&str> = match self {
            Self::Text(s) => s.split(',').map(str::trim).filter(|s| !s.is_empty()).collect(),
            Self::One(_) => return Err("expected a list, such as [\"...\"]".into()),
            Self::Many(items) => items.iter().map(|s| s.trim()).collect(),
        };
        match items.iter().find(|i| i.len() > MAX_VALUE) {
            Some(_) => Err(format!("an entry is longer than {MAX_VALUE} bytes")),
            None if items.len() > MAX_LIST => Err(format!("more than {MAX_LIST} entries")),
            None => Ok(items),
        }
    }

    /// The list, each entry parsed.
    pub(super) fn all<T, E: ToString>(&self, parse: impl Fn(&str) -> Result<T, E>) -> Result<Vec<T>, String> {
        self.list()?.into_iter().map(|item| parse(item).map_err(|e| format!("{item:?}: {}", e.to_string()))).collect()
    }

    pub(super) fn parsed<T: std::str::FromStr<Err: ToString>>(&self) -> Result<T, String> {
        self.one()?.parse().map_err(|e: T::Err| e.to_string())
    }

    pub(super) fn choice<T: Choice>(&self) -> Result<T, String> {
        choose(self.one()?)
    }

    pub(super) fn boolean(&self) -> Result<bool, String> {
        match self.one()? {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err("expected true or false".into()),
        }
    }

    pub(super) fn directory(&self) -> Result<PathBuf, String> {
        let path = PathBuf::from(self.one()?);
        if path.is_absolute() { Ok(path) } else { Err("expected an absolute path, one that begins with /".into()) }
    }

    pub(super) fn within(&self, [least, most]: [Duration; 2]) -> Result<Duration, String> {
        let d = parse_duration(self.one()?).map_err(|e| e.to_string())?;
        match (least..=most).contains(&d) {
            true => Ok(d),
            false => Err(format!("expected {} to {}", show_duration(least), show_duration(most))),
        }
    }

    pub(super) fn ports(&self) -> Result<BTreeSet<u16>, String> {
        Ok(self.all(port)?.into_iter().collect())
    }
}

/// The choice that a word stands for.
pub(crate) fn choose<T: Choice>(word: &str) -> Result<T, String> {
    let words = || T::ALL.iter().map(|(w, _)| *w);
    T::ALL.iter().find(|(w, _)| *w == word).map(|(_, v)| *v).ok_or_else(|| {
        let like = nearest(word, words()).map_or(String::new(), |w| format!(", did you mean {w:?}?"));
        format!("expected one of {}{like}", words().collect::<Vec<_>>().join(", "))
    })
}

/// A TCP port.
pub(super) fn port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|p| *p != 0).ok_or_else(|| "expected a TCP port, 1 to 65535".to_owned())
}

/// A zone: what fits in a record and in a label of a metric.
pub(super) fn zone(text: &str) -> Result<String, String> {
    let fine = (1..=63).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if fine { Ok(text.to_owned()) } else { Err("expected 1 to 63 characters of a-z, A-Z, 0-9, '-', '_' and '.'".into()) }
}

/// The name of a network interface: what the kernel takes (`dev_valid_name` of net/core/dev.c), and printable.
pub(super) fn interface(text: &str) -> Result<String, String> {
    let fine = (1..=15).contains(&text.len())
        && text != "."
        && text != ".."
        && text.bytes().all(|b| b.is_ascii_graphic() && !b"/:".contains(&b));
    if fine { Ok(text.to_owned()) } else { Err("expected the name of a network interface, such as eth0".into()) }
}

/// The first two names that share a number.
pub(super) fn unique<'a>(named: &[(&'a str, u16)]) -> Option<(&'a str, &'a str)> {
    named.iter().enumerate().find_map(|(i, (a, x))| named[i + 1..].iter().find(|(_, y)| x == y).map(|(b, _)| (*a, *b)))
}

/// The word among `known` that `word` most probably was meant to be, if any is near enough.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |w: &str| w.to_ascii_lowercase().replace(['-', '.'], "_");
    if word.len() > 60 {
        return None;
    }
    let word = plain(word);
    let ranked = known.map(|k| (distance(&word, &plain(k)), k));
    ranked.min_by_key(|(d, _)| *d).filter(|(d, k)| *d <= 2.min(k.len() / 2)).map(|(_, k)| k)
}

/// Damerau-Levenshtein distance with adjacent swaps (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = change.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}
