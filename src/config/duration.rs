//! Lengths of time as people write them: `90s`, `1h30m`, `72h`. A number without a unit is refused: it would be guessed wrong.

use std::fmt::Write as _;
use std::time::Duration;

use thiserror::Error;

/// Units, longest first, in milliseconds.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Why a text is not a length of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DurationError {
    /// Not a number and a unit, once or several times.
    #[error("expected a length of time with a unit, such as 500ms, 90s, 15m, 72h or 7d")]
    Malformed,
    /// More than a century, or more than fits.
    #[error("longer than any length of time that makes sense here")]
    Long,
}

/// Longest length of time that is read, in milliseconds: a century.
const MAX: u64 = 100 * 365 * 86_400_000;

/// The length of time that `text` says: whole numbers with units, each unit at most once, from the longest to the shortest.
///
/// # Errors
/// [`DurationError`].
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    let mut rest = text.trim();
    let mut total = 0u64;
    let mut next_unit = 0;
    if rest.is_empty() {
        return Err(DurationError::Malformed);
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|n| *n > 0).ok_or(DurationError::Malformed)?;
        let number: u64 = rest[..digits].parse().map_err(|_| DurationError::Long)?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(rest.len());
        let unit = UNITS.iter().position(|(u, _)| *u == &rest[..letters]).ok_or(DurationError::Malformed)?;
        if unit < next_unit {
            return Err(DurationError::Malformed);
        }
        next_unit = unit + 1;
        rest = &rest[letters..];
        total = number.checked_mul(UNITS[unit].1).and_then(|n| n.checked_add(total)).ok_or(DurationError::Long)?;
        if total > MAX {
            return Err(DurationError::Long);
        }
    }
    Ok(Duration::from_millis(total))
}

/// `duration` in the form that [`parse_duration`] reads, to the millisecond.
pub fn show_duration(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, size) in UNITS {
        let n = rest / size;
        // 72h stays 72h: people compare it with what they wrote.
        if n == 0 || (unit == "d" && (rest < 7 * size || rest % size != 0)) {
            continue;
        }
        let _ = write!(text, "{n}{unit}");
        rest %= size;
    }
    if text.is_empty() { "0s".into() } else { text }
}

/// A length of time as a person says it, in one or two units: `4s`, `3m10s`, `2d4h`.
pub(crate) fn ago(seconds: u64) -> String {
    let (big, size, small, per) = match seconds {
        0..60 => return format!("{seconds}s"),
        60..3600 => ("m", 60, "s", 1),
        3600..86_400 => ("h", 3600, "m", 60),
        _ => ("d", 86_400, "h", 3600),
    };
    match seconds % size / per {
        0 => format!("{}{big}", seconds / size),
        rest => format!("{}{big}{rest}{small}", seconds / size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_people_write() {
        for (text, seconds) in [("90s", 90), ("72h", 259_200), ("1h30m", 5400), ("7d", 604_800), ("0s", 0), (" 2m ", 120)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(parse_duration("1s500ms"), Ok(Duration::from_millis(1500)));
        for bad in ["", " ", "90", "s", "-1s", "1.5h", "1y", "1m1h", "1s1s", "1 h", "٣s", "1h 30m"] {
            assert_eq!(parse_duration(bad), Err(DurationError::Malformed), "{bad:?}");
        }
        for long in ["99999999999999999999s", "18446744073709551615d", "40000d"] {
            assert_eq!(parse_duration(long), Err(DurationError::Long), "{long}");
        }
    }

    #[test]
    fn shows_what_was_written() {
        for text in ["500ms", "90s", "72h", "1h30m", "30d", "0s"] {
            let shown = show_duration(parse_duration(text).unwrap());
            assert_eq!(shown, if text == "90s" { "1m30s" } else { text });
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(ms in 0..MAX) {
            let d = Duration::from_millis(ms);
            prop_assert_eq!(parse_duration(&show_duration(d)), Ok(d));
        }
        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = parse_duration(&text);
        }
    }
}
