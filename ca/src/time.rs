//! Points in time, as whole seconds. Owns no clock: every function that needs the time takes it as a parameter.
//!
//! Arithmetic saturates: a hostile or dead clock can give a wrong time, never a panic or a wrap-around.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Seconds since 1970-01-01 00:00:00 UTC, without leap seconds (POSIX time).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixTime(pub u64);

impl UnixTime {
    /// The last second that an X.509 date can hold (9999-12-31 23:59:59 UTC, RFC 5280 §4.1.2.5).
    pub const MAX_CERTIFICATE: Self = Self(253_402_300_799);

    /// How long ago `earlier` was; zero when it is not earlier.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(self.0.saturating_sub(earlier.0))
    }

    /// How far apart the two are, whichever is the earlier one.
    pub fn distance(self, other: Self) -> Duration {
        Duration::from_secs(self.0.abs_diff(other.0))
    }
}

impl Add<Duration> for UnixTime {
    type Output = Self;
    fn add(self, d: Duration) -> Self {
        Self(self.0.saturating_add(d.as_secs()))
    }
}

impl Sub<Duration> for UnixTime {
    type Output = Self;
    fn sub(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(d.as_secs()))
    }
}

impl From<UnixTime> for rustls_pki_types::UnixTime {
    fn from(t: UnixTime) -> Self {
        Self::since_unix_epoch(Duration::from_secs(t.0))
    }
}

impl From<rustls_pki_types::UnixTime> for UnixTime {
    fn from(t: rustls_pki_types::UnixTime) -> Self {
        Self(t.as_secs())
    }
}

/// RFC 3339 in UTC (`2026-01-31T12:00:00Z`); the bare number of seconds beyond the year 9999.
impl fmt::Display for UnixTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let calendar = i64::try_from(self.0).ok().and_then(|s| ::time::OffsetDateTime::from_unix_timestamp(s).ok());
        match calendar {
            Some(t) => {
                let (y, mo, d) = (t.year(), u8::from(t.month()), t.day());
                write!(f, "{y:04}-{mo:02}-{d:02}T{:02}:{:02}:{:02}Z", t.hour(), t.minute(), t.second())
            }
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates_and_text_is_rfc_3339() {
        assert_eq!(UnixTime(5) - Duration::from_secs(9), UnixTime(0));
        assert_eq!(UnixTime(u64::MAX) + Duration::from_secs(1), UnixTime(u64::MAX));
        assert_eq!(UnixTime(7).since(UnixTime(9)), Duration::ZERO);
        assert_eq!(UnixTime(7).distance(UnixTime(9)), Duration::from_secs(2));
        assert_eq!(UnixTime(0).to_string(), "1970-01-01T00:00:00Z");
        assert_eq!(UnixTime(1_709_210_096).to_string(), "2024-02-29T12:34:56Z");
        assert_eq!(UnixTime::MAX_CERTIFICATE.to_string(), "9999-12-31T23:59:59Z");
        assert_eq!(UnixTime(u64::MAX).to_string(), u64::MAX.to_string());
    }
}
