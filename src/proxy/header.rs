//! The first bytes of a tunnel of wire version `meshd/1`: the dialler's header, and the one-byte verdict of the dialled.
//!
//! Owns the byte layout and its limits, nothing else: no sockets, no time. A [`Header`] that was decoded is valid; whatever is
//! not exactly a header is refused, and decoding never allocates.
//!
//! Header: a 16-bit length, then that many bytes of fields. A field is its kind (1 byte), its length (1 byte) and its value; no
//! kind appears twice; numbers are big-endian.
//!
//! | kind | value | |
//! | --- | --- | --- |
//! | 1 | destination port, 2 bytes | required |
//! | 2 | destination address, 4 or 16 bytes | what the application dialled; none = the address the tunnel arrives at |
//! | 3 | client's port, 2 bytes, and address, 4 or 16 bytes | a hint for logs, never believed |
//! | 4 | flags, 1 byte: 1 = the client's port was below 1024 | unknown flags are ignored |
//!
//! Room for extension: an unknown kind below 128 is skipped, one from 128 up is refused (its sender needs it understood).

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most bytes of fields a header may have.
pub const MAX_HEADER: usize = 512;
/// Bytes of the length in front of the fields.
pub const PREFIX: usize = 2;

/// The longest header that we make: port, address, client and flags.
const LONGEST: usize = PREFIX + 4 + 18 + 20 + 3;

const PORT: u8 = 1;
const ADDRESS: u8 = 2;
const CLIENT: u8 = 3;
const FLAGS: u8 = 4;
const FIRST_CRITICAL: u8 = 128;
const LOW_PORT: u8 = 1;

/// What the dialling node asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The port the application dialled.
    pub port: NonZeroU16,
    /// The address the application dialled, canonical (never an IPv4-mapped IPv6 address).
    pub address: Option<IpAddr>,
    /// The application's own address and port, as its host saw them. Unauthenticated detail: good for a log line only.
    pub client: Option<SocketAddr>,
    /// The application's port was below 1024, which only root may take there; services such as NFS insist on it.
    pub low_port: bool,
}

/// Why bytes are not a header. The peer is broken, hostile, or newer in a way it should not have used with `meshd/1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// The announced length is zero or above [`MAX_HEADER`].
    #[error("a header of {0} bytes; 1 to 512 are allowed")]
    Length(usize),
    /// A field reaches past the end.
    #[error("a header whose fields do not fill it exactly")]
    Truncated,
    /// The value of a known field is impossible.
    #[error("an impossible value in header field {0}")]
    Value(u8),
    /// A field appears twice.
    #[error("header field {0} appears twice")]
    Twice(u8),
    /// No destination port.
    #[error("a header without a destination port")]
    NoPort,
    /// A field this version must understand and does not.
    #[error("header field {0} is of a newer meshd; update this host")]
    Unknown(u8),
}

impl Header {
    /// The header as it goes on the wire, length first.
    pub fn encode(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(LONGEST);
        b.extend([0; PREFIX]);
        b.extend([PORT, 2]);
        b.extend(self.port.get().to_be_bytes());
        if let Some(ip) = self.address {
            b.push(ADDRESS);
            put(&mut b, &[], ip);
        }
        if let Some(client) = self.client {
            b.push(CLIENT);
            put(&mut b, &client.port().to_be_bytes(), client.ip());
        }
        if self.low_port {
            b.extend([FLAGS, 1, LOW_PORT]);
        }
        // At most LONGEST: the length fits.
        let length = (b.len() - PREFIX) as u16;
        b[..PREFIX].copy_from_slice(&length.to_be_bytes());
        b
    }

    /// How many bytes of fields follow the first two bytes of a header.
    ///
    /// # Errors
    /// [`HeaderError::Length`] when that is zero or above [`MAX_HEADER`].
    pub fn length(prefix: [u8; PREFIX]) -> Result<usize, HeaderError> {
        match u16::from_be_bytes(prefix) as usize {
            n if (1..=MAX_HEADER).contains(&n) => Ok(n),
            n => Err(HeaderError::Length(n)),
        }
    }

    /// The header in exactly these bytes of fields (without the length in front).
    ///
    /// # Errors
    /// Every way in which they are not a header, see [`HeaderError`].
    pub fn decode(mut fields: &[u8]) -> Result<Self, HeaderError> {
        if fields.is_empty() || fields.len() > MAX_HEADER {
            return Err(HeaderError::Length(fields.len()));
        }
        let (mut port, mut address, mut client, mut flags) = (None, None, None, None);
        while let [kind, length, rest @ ..] = fields {
            let (value, rest) = rest.split_at_checked(*length as usize).ok_or(HeaderError::Truncated)?;
            let wrong = HeaderError::Value(*kind);
            let fresh = match *kind {
                PORT => {
                    let p = <[u8; 2]>::try_from(value).map_err(|_| wrong)?;
                    port.replace(NonZeroU16::new(u16::from_be_bytes(p)).ok_or(wrong)?).is_none()
                }
                ADDRESS => address.replace(take(value).ok_or(wrong)?).is_none(),
                CLIENT => {
                    let (p, ip) = value.split_first_chunk::<2>().ok_or(wrong)?;
                    client.replace(SocketAddr::new(take(ip).ok_or(wrong)?, u16::from_be_bytes(*p))).is_none()
                }
                FLAGS => match value {
                    [f] => flags.replace(*f).is_none(),
                    _ => return Err(wrong),
                },
                FIRST_CRITICAL.. => return Err(HeaderError::Unknown(*kind)),
                _ => true,
            };
            if !fresh {
                return Err(HeaderError::Twice(*kind));
            }
            fields = rest;
        }
        if !fields.is_empty() {
            return Err(HeaderError::Truncated);
        }
        let low_port = flags.is_some_and(|f| f & LOW_PORT != 0);
        Ok(Self { port: port.ok_or(HeaderError::NoPort)?, address, client, low_port })
    }
}

fn put(b: &mut Vec<u8>, before: &[u8], ip: IpAddr) {
    let (v4, v6);
    let octets: &[u8] = match ip.to_canonical() {
        IpAddr::V4(a) => {
            v4 = a.octets();
            &v4
        }
        IpAddr::V6(a) => {
            v6 = a.octets();
            &v6
        }
    };
    b.push((before.len() + octets.len()) as u8);
    b.extend(before);
    b.extend(octets);
}

/// An address from 4 or 16 bytes; none when it is one no connection can go to, or not canonical.
fn take(octets: &[u8]) -> Option<IpAddr> {
    let ip = match *octets {
        [a, b, c, d] => IpAddr::from([a, b, c, d]),
        _ => IpAddr::from(<[u8; 16]>::try_from(octets).ok()?),
    };
    (ip == ip.to_canonical() && !ip.is_unspecified() && !ip.is_multicast()).then_some(ip)
}

/// The first byte that comes back through a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The service accepted; its bytes follow.
    Accepted,
    /// Nothing was delivered to any service.
    Refused(Refusal),
}

/// Why the dialled node delivered nothing. Authenticated by the tunnel, so a connection refused this way may be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// Nobody listens on the port, or the service did not accept.
    #[error("the port is closed there")]
    Closed,
    /// A policy of the dialled node forbids it.
    #[error("a policy of that host forbids it")]
    Policy,
    /// The dialled node holds as many connections as it is willing to.
    #[error("that host holds too many connections already")]
    Overload,
    /// Another workload than the one whose SVID was shown listens on the port by now.
    #[error("another workload has taken the port meanwhile; dial again")]
    IdentityChanged,
    /// The dialled node does not serve that address or port through the mesh.
    #[error("that host does not serve this address and port through the mesh")]
    NotServed,
    /// The dialled node is about to stop.
    #[error("meshd on that host is stopping")]
    Draining,
    /// The dialled node did not understand the header.
    #[error("meshd on that host did not understand the request; do the versions match?")]
    Malformed,
    /// A code of a newer meshd.
    #[error("that host refused for reason {0}, which this meshd does not know")]
    Other(u8),
}

impl Verdict {
    /// The verdict as its byte on the wire.
    pub fn encode(self) -> u8 {
        match self {
            Self::Accepted => 0,
            Self::Refused(r) => match r {
                Refusal::Closed => 1,
                Refusal::Policy => 2,
                Refusal::Overload => 3,
                Refusal::IdentityChanged => 4,
                Refusal::NotServed => 5,
                Refusal::Draining => 6,
                Refusal::Malformed => 7,
                Refusal::Other(n) => n.max(8),
            },
        }
    }

    /// The verdict with this byte. Every byte is one: 0 is the only acceptance.
    pub fn decode(byte: u8) -> Self {
        Self::Refused(match byte {
            0 => return Self::Accepted,
            1 => Refusal::Closed,
            2 => Refusal::Policy,
            3 => Refusal::Overload,
            4 => Refusal::IdentityChanged,
            5 => Refusal::NotServed,
            6 => Refusal::Draining,
            7 => Refusal::Malformed,
            n => Refusal::Other(n),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn port(p: u16) -> NonZeroU16 {
        NonZeroU16::new(p).unwrap()
    }

    #[test]
    fn layout_is_fixed() {
        let h = Header {
            port: port(0x1234),
            address: Some("10.0.0.1".parse().unwrap()),
            client: Some("[fd00::2]:9".parse().unwrap()),
            low_port: true,
        };
        let mut want = vec![0, 33, 1, 2, 0x12, 0x34, 2, 4, 10, 0, 0, 1, 3, 18, 0, 9, 0xfd];
        want.extend([0; 14]);
        want.extend([2, 4, 1, 1]);
        assert_eq!(h.encode(), want);
    }

    #[test]
    fn everything_else_is_refused() {
        use HeaderError::*;
        for (bytes, why) in [
            (&[][..], Length(0)),
            (&[0; MAX_HEADER + 1], Length(MAX_HEADER + 1)),
            (&[1], Truncated),
            (&[1, 2, 0], Truncated),
            (&[1, 2, 0, 80, 9], Truncated),
            (&[1, 2, 0, 0], Value(1)),
            (&[1, 3, 0, 80, 0], Value(1)),
            (&[1, 2, 0, 80, 1, 2, 0, 80], Twice(1)),
            (&[1, 2, 0, 80, 2, 4, 0, 0, 0, 0], Value(2)),
            (&[1, 2, 0, 80, 2, 4, 224, 0, 0, 1], Value(2)),
            (&[1, 2, 0, 80, 2, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1], Value(2)),
            (&[1, 2, 0, 80, 3, 1, 0], Value(3)),
            (&[1, 2, 0, 80, 4, 2, 0, 0], Value(4)),
            (&[4, 1, 1], NoPort),
            (&[1, 2, 0, 80, 128, 0], Unknown(128)),
        ] {
            assert_eq!(Header::decode(bytes), Err(why), "{bytes:?}");
        }
        // Unknown fields and flags that are not critical are skipped.
        let h = Header::decode(&[1, 2, 0, 80, 127, 3, 9, 9, 9, 4, 1, 0xfe]).unwrap();
        assert_eq!(h, Header { port: port(80), address: None, client: None, low_port: false });
        assert_eq!(Header::length([0, 0]), Err(Length(0)));
        assert_eq!(Header::length([2, 1]), Err(Length(513)));
        assert_eq!(Header::length([2, 0]), Ok(512));
    }

    fn addresses() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
            .prop_filter("one to connect to", |ip| {
                !ip.is_multicast() && !ip.to_canonical().is_unspecified() && *ip == ip.to_canonical()
            })
    }

    proptest! {
        #[test]
        fn round_trip(
            p in 1u16..,
            address in proptest::option::of(addresses()),
            client in proptest::option::of((addresses(), any::<u16>())),
            low_port: bool,
        ) {
            let h = Header { port: port(p), address, client: client.map(SocketAddr::from), low_port };
            let b = h.encode();
            let n = Header::length([b[0], b[1]]).unwrap();
            prop_assert_eq!(n, b.len() - PREFIX);
            prop_assert_eq!(Header::decode(&b[PREFIX..]), Ok(h));
            // Cut anywhere, it is no header, or it is one with fewer fields.
            for cut in 0..n {
                if let Ok(less) = Header::decode(&b[PREFIX..PREFIX + cut]) {
                    prop_assert_eq!(less.port, h.port);
                    prop_assert_ne!(less, h);
                }
            }
        }

        #[test]
        fn any_bytes_are_answered(b in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(h) = Header::decode(&b) {
                let again = h.encode();
                prop_assert_eq!(Header::decode(&again[PREFIX..]), Ok(h));
            }
        }

        #[test]
        fn verdicts(b: u8) {
            prop_assert_eq!(Verdict::decode(b).encode(), b);
        }
    }
}
