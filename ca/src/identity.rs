//! Names: the mesh, its nodes, its hosts and its workloads, as SPIFFE ids.
//!
//! Owns the grammar of every identity in a mesh. A value of one of these types is always valid: the only way in is a parser
//! that refuses everything else, so no later code checks a name again.
//!
//! Sources: SPIFFE-ID §2 (trust domain and path character sets), X509-SVID §2.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use data_encoding::{Encoding, Specification};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use zeroize::Zeroizing;

/// Longest SPIFFE id in bytes (SPIFFE-ID §2.3).
pub const MAX_SPIFFE_ID: usize = 2048;
/// Longest path segment in bytes that we make or accept.
pub const MAX_SEGMENT: usize = 255;

/// Why a text is not a name. The text itself is not repeated: it may be hostile and long.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NameError {
    /// Not the length or alphabet of a mesh or node id.
    #[error("not an id: expected {expected} characters of a-z and 2-7")]
    Id {
        /// How many characters the id has.
        expected: usize,
    },
    /// A host name has 1 to 63 characters of `a-z`, `0-9` and `-`, and neither starts nor ends with `-` (RFC 1123 label).
    #[error("not a host name: 1 to 63 characters of a-z, 0-9 and '-', not at the ends")]
    Host,
    /// A trust domain has 1 to 255 characters of `a-z`, `0-9`, `.`, `-`, `_`.
    #[error("not a trust domain: 1 to 255 characters of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain,
    /// Not a SPIFFE id at all: scheme, length, or a character that SPIFFE forbids.
    #[error("not a SPIFFE id")]
    Spiffe,
    /// A SPIFFE id whose path is none of the kinds a mesh issues.
    #[error("not a path that a mesh issues")]
    Path,
}

/// RFC 4648 base32 in lower case without padding.
pub(crate) fn base32() -> &'static Encoding {
    use std::sync::OnceLock;
    static E: OnceLock<Encoding> = OnceLock::new();
    E.get_or_init(|| {
        let mut s = Specification::new();
        s.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
        #[allow(clippy::expect_used)] // a constant specification: it is valid or no test passes
        s.encoding().expect("a valid base32 specification")
    })
}

/// A secret as a person copies it: base32 in groups of four, `abcd-efgh-ijkl-mnop`.
pub(crate) fn grouped(secret: &[u8]) -> Zeroizing<String> {
    let plain = Zeroizing::new(base32().encode(secret));
    // Room for all of it, so that no copy is left behind when it grows.
    let mut text = Zeroizing::new(String::with_capacity(plain.len() * 5 / 4));
    for (at, character) in plain.chars().enumerate() {
        if at > 0 && at % 4 == 0 {
            text.push('-');
        }
        text.push(character);
    }
    text
}

macro_rules! id {
    ($name:ident, $bytes:literal, $chars:literal, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $bytes]);

        impl $name {
            /// The id with these bytes.
            pub const fn from_bytes(bytes: [u8; $bytes]) -> Self {
                Self(bytes)
            }
            /// The bytes of the id.
            pub const fn as_bytes(&self) -> &[u8; $bytes] {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&base32().encode(&self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl FromStr for $name {
            type Err = NameError;
            fn from_str(s: &str) -> Result<Self, NameError> {
                let wrong = NameError::Id { expected: $chars };
                if s.len() != $chars {
                    return Err(wrong);
                }
                let v = base32().decode(s.as_bytes()).map_err(|_| wrong.clone())?;
                Ok(Self(v.try_into().map_err(|_| wrong)?))
            }
        }
        text_serde!($name);
    };
}

macro_rules! text_serde {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(MeshId, 10, 16, "A mesh: 80 random bits, written as 16 base32 characters. Stable for the life of the mesh.");
id!(
    NodeId,
    16,
    26,
    "A node: the first 128 bits of the SHA-256 of its public key (see [`crate::keys::PublicKey::node_id`]), 26 base32 characters."
);

/// The name of a host in its mesh: one RFC 1123 label in lower case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostName(Arc<str>);

impl HostName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The nearest valid name to what a host calls itself: lower case, first label, other characters become `-`; `host` when
    /// nothing is left.
    pub fn nearest(wish: &str) -> Self {
        let label = wish.split('.').next().unwrap_or_default().to_ascii_lowercase();
        let s: String = label.chars().take(63).map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let s = s.trim_matches('-');
        s.parse().unwrap_or_else(|_| Self("host".into()))
    }

    /// This name with `-suffix` after it, cut so that the whole stays a valid label.
    pub fn with_suffix(&self, suffix: &str) -> Self {
        let suffix = Self::nearest(suffix).0;
        let room = 62usize.saturating_sub(suffix.len());
        let stem: String = self.0.chars().take(room).collect();
        Self::nearest(&format!("{}-{suffix}", stem.trim_end_matches('-')))
    }
}

impl FromStr for HostName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let ok = (1..=63).contains(&s.len())
            && s.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
            && !s.starts_with('-')
            && !s.ends_with('-');
        if ok { Ok(Self(s.into())) } else { Err(NameError::Host) }
    }
}
impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
text_serde!(HostName);

/// A SPIFFE trust domain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The trust domain a mesh has unless its founder chose another: `m<mesh id>.meshd.internal`.
    pub fn of(mesh: MeshId) -> Self {
        Self(format!("m{mesh}.meshd.internal").into())
    }
    /// The trust domain as text, without a scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl FromStr for TrustDomain {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let ok = (1..=255).contains(&s.len()) && s.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'));
        if ok { Ok(Self(s.into())) } else { Err(NameError::TrustDomain) }
    }
}
impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
text_serde!(TrustDomain);

/// What a connection belongs to: the path of a SPIFFE id.
///
/// The texts inside are the *unescaped* names (`getty@tty1.service`); the path carries them escaped, see [`escape`]. They are shared, as
/// those of all names in here: every connection has copies of the ids at its ends.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Workload {
    /// `/node/<id>`: the daemon itself.
    Node(NodeId),
    /// `/host/<host>`: a process of the host that is in no unit, container or session.
    Host(HostName),
    /// `/host/<host>/unit/<unit>`: a systemd unit.
    Unit(HostName, Arc<str>),
    /// `/host/<host>/container/<name>`: a container of a bare host.
    Container(HostName, Arc<str>),
    /// `/host/<host>/user/<name>`: whatever runs below a user's slice.
    User(HostName, Arc<str>),
    /// `/svc/<name>`: granted by the operator, independent of the host.
    Service(Arc<str>),
    /// `/ns/<namespace>/sa/<account>`: a Kubernetes service account.
    ServiceAccount(Arc<str>, Arc<str>),
}

impl Workload {
    /// The host this workload is tied to, if it is tied to one by name.
    pub fn host(&self) -> Option<&HostName> {
        match self {
            Self::Host(h) | Self::Unit(h, _) | Self::Container(h, _) | Self::User(h, _) => Some(h),
            Self::Node(_) | Self::Service(_) | Self::ServiceAccount(..) => None,
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(id) => write!(f, "/node/{id}"),
            Self::Host(h) => write!(f, "/host/{h}"),
            Self::Unit(h, n) => write!(f, "/host/{h}/unit/{}", escape(n)),
            Self::Container(h, n) => write!(f, "/host/{h}/container/{}", escape(n)),
            Self::User(h, n) => write!(f, "/host/{h}/user/{}", escape(n)),
            Self::Service(n) => write!(f, "/svc/{}", escape(n)),
            Self::ServiceAccount(ns, sa) => write!(f, "/ns/{}/sa/{}", escape(ns), escape(sa)),
        }
    }
}

impl FromStr for Workload {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        if s.len() > MAX_SPIFFE_ID {
            return Err(NameError::Spiffe);
        }
        let path = s.strip_prefix('/').ok_or(NameError::Path)?;
        let parts: Vec<&str> = path.splitn(6, '/').collect();
        if parts.iter().any(|p| p.is_empty() || *p == "." || *p == ".." || p.len() > MAX_SEGMENT) {
            return Err(NameError::Spiffe);
        }
        let host = |h: &str| h.parse::<HostName>().map_err(|_| NameError::Path);
        Ok(match parts.as_slice() {
            ["node", id] => Self::Node(id.parse().map_err(|_| NameError::Path)?),
            ["host", h] => Self::Host(host(h)?),
            ["host", h, "unit", n] => Self::Unit(host(h)?, unescape(n)?.into()),
            ["host", h, "container", n] => Self::Container(host(h)?, unescape(n)?.into()),
            ["host", h, "user", n] => Self::User(host(h)?, unescape(n)?.into()),
            ["svc", n] => Self::Service(unescape(n)?.into()),
            ["ns", ns, "sa", sa] => Self::ServiceAccount(unescape(ns)?.into(), unescape(sa)?.into()),
            _ => return Err(NameError::Path),
        })
    }
}
text_serde!(Workload);

/// A whole identity: `spiffe://<trust domain><workload>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    /// The mesh it belongs to.
    pub trust_domain: TrustDomain,
    /// What it names there.
    pub workload: Workload,
}

impl SpiffeId {
    /// The id of `workload` in `trust_domain`.
    pub fn new(trust_domain: TrustDomain, workload: Workload) -> Self {
        Self { trust_domain, workload }
    }
}
impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}{}", self.trust_domain, self.workload)
    }
}
impl FromStr for SpiffeId {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        if s.len() > MAX_SPIFFE_ID {
            return Err(NameError::Spiffe);
        }
        let rest = s.strip_prefix("spiffe://").ok_or(NameError::Spiffe)?;
        let (td, _) = rest.split_once('/').ok_or(NameError::Spiffe)?;
        Ok(Self { trust_domain: td.parse()?, workload: rest[td.len()..].parse()? })
    }
}
text_serde!(SpiffeId);

/// `name` with every byte outside `[A-Za-z0-9.-]` as `_xx` (lower-case hexadecimal): reversible, and inside the characters SPIFFE
/// allows. A name that is `.` or `..` or empty, which SPIFFE forbids as a segment, is escaped too.
pub fn escape(name: &str) -> String {
    let dots = !name.is_empty() && name.bytes().all(|b| b == b'.') && name.len() <= 2;
    let mut out = String::with_capacity(name.len());
    for b in name.bytes() {
        if b.is_ascii_alphanumeric() || b == b'-' || (b == b'.' && !dots) {
            out.push(b as char);
        } else {
            out.push_str(&format!("_{b:02x}"));
        }
    }
    if out.is_empty() { "_".into() } else { out }
}

/// The inverse of [`escape`]. Refuses what `escape` never makes, so that one name has exactly one path.
///
/// # Errors
/// [`NameError::Path`] for a malformed escape, an escape that was not needed, a forbidden byte, or bytes that are not UTF-8.
pub fn unescape(segment: &str) -> Result<String, NameError> {
    if segment == "_" {
        return Ok(String::new());
    }
    let b = segment.as_bytes();
    let mut out = Vec::with_capacity(b.len());
    let mut i = 0;
    while i < b.len() {
        if b[i] == b'_' {
            let hex = segment.get(i + 1..i + 3).ok_or(NameError::Path)?;
            out.push(u8::from_str_radix(hex, 16).map_err(|_| NameError::Path)?);
            i += 3;
        } else {
            out.push(b[i]);
            i += 1;
        }
    }
    let name = String::from_utf8(out).map_err(|_| NameError::Path)?;
    if escape(&name) == segment { Ok(name) } else { Err(NameError::Path) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_round_trip_and_nothing_else_parses() {
        let h: HostName = "pi-1".parse().unwrap();
        for w in [
            Workload::Node(NodeId::from_bytes([7; 16])),
            Workload::Host(h.clone()),
            Workload::Unit(h.clone(), "getty@tty1.service".into()),
            Workload::Container(h.clone(), "web_1".into()),
            Workload::User(h, "anna".into()),
            Workload::Service("db".into()),
            Workload::ServiceAccount("default".into(), "web".into()),
        ] {
            assert_eq!(w.to_string().parse::<Workload>(), Ok(w));
        }
        for bad in [
            "",
            "/",
            "/host",
            "/host/",
            "/host/A",
            "/host/a/unit",
            "/host/a/unit/",
            "/host/a/unit/b/c",
            "/host/../unit/x",
            "/svc/a%20",
            "/svc/_41",
            "/svc/_4G",
            "host/a",
            "/node/x",
            "/ns/a/sa",
            "/host/a/",
        ] {
            assert!(bad.parse::<Workload>().is_err(), "{bad}");
        }
    }

    #[test]
    fn spiffe_ids_are_strict() {
        let td = TrustDomain::of(MeshId::from_bytes([0; 10]));
        let id = SpiffeId::new(td, Workload::Service("db".into()));
        assert_eq!(id.to_string(), "spiffe://maaaaaaaaaaaaaaaa.meshd.internal/svc/db");
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in [
            "spiffe://",
            "spiffe://x",
            "spiffe://X/svc/a",
            "http://x/svc/a",
            "SPIFFE://x/svc/a",
            "spiffe://a@b/svc/a",
            "spiffe://a:1/svc/a",
            "spiffe:///svc/a",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn host_names() {
        assert_eq!(HostName::nearest("Raspberry Pi.local").as_str(), "raspberry-pi");
        assert_eq!(HostName::nearest("---").as_str(), "host");
        assert_eq!(HostName::nearest("pi").with_suffix("k3j2").as_str(), "pi-k3j2");
        assert!(HostName::nearest(&"a".repeat(200)).with_suffix("zz").as_str().len() <= 63);
    }

    proptest! {
        #[test]
        fn escape_is_reversible(s in ".{0,60}") {
            let e = escape(&s);
            prop_assert!(e.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')));
            prop_assert!(!matches!(e.as_str(), "." | ".." | ""));
            prop_assert_eq!(unescape(&e), Ok(s));
        }
        #[test]
        fn parsers_never_panic(s in ".{0,80}") {
            let _ = s.parse::<SpiffeId>();
            let _ = s.parse::<Workload>();
            let _ = unescape(&s);
            let h = HostName::nearest(&s);
            prop_assert!(h.as_str().parse::<HostName>().is_ok());
        }
    }
}
