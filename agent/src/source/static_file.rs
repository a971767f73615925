//! `peers = [...]` of the configuration: hosts that multicast does not reach.
//!
//! Owns the grammar of an entry. Names are refused rather than resolved: a resolver is the C library's, which a static binary does
//! not carry, or a server on the network, which is one more thing that must be up before the mesh is. Invariant: what comes out
//! can be dialled as it is.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use thiserror::Error;

/// Entries at most.
pub const MAX_PEERS: usize = 1024;

/// Why an entry is not a peer. The entry is repeated as far as it fits on a line: the operator wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PeerError {
    /// A host name.
    #[error(
        "peers: {0:?} is a name, and meshd resolves none: write its address (`getent ahosts NAME` shows it); other addresses of \
         the host are found from there"
    )]
    Name(String),
    /// A name that multicast DNS answers for.
    #[error("peers: {0:?} is found by mDNS without an entry: remove it, or write its address if multicast does not reach it")]
    Local(String),
    /// Port 0, or none where a colon promises one.
    #[error("peers: {0:?} has no valid port: write ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT with a port from 1 to 65535")]
    Port(String),
    /// An address at which no other host can be.
    #[error("peers: {0:?} is not the address of another host: write one on which that host listens")]
    Address(String),
    /// `fe80::...` says nothing without an interface.
    #[error("peers: {0:?} is link-local, which means another host on every link: write a global or private address")]
    LinkLocal(String),
    /// Nothing of the above.
    #[error("peers: {0:?} is not an address: write ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT")]
    Malformed(String),
    /// More than [`MAX_PEERS`].
    #[error("peers: more than {MAX_PEERS} entries: a few are enough, the others are learnt from them")]
    TooMany,
}

/// Where to dial for the `peers` of the configuration, each once, in order; `port` is used where an entry names none.
///
/// # Errors
/// [`PeerError`] for the first entry that is not an address.
pub fn hints(peers: &[String], port: u16) -> Result<Vec<SocketAddr>, PeerError> {
    if peers.len() > MAX_PEERS {
        return Err(PeerError::TooMany);
    }
    let mut seen = BTreeSet::new();
    let mut out = Vec::with_capacity(peers.len());
    for p in peers {
        let at = parse(p.trim(), port)?;
        if seen.insert(at) {
            out.push(at);
        }
    }
    Ok(out)
}

fn parse(s: &str, port: u16) -> Result<SocketAddr, PeerError> {
    let shown: String = s.chars().take(80).collect();
    let bare = s.strip_prefix('[').and_then(|s| s.strip_suffix(']')).unwrap_or(s);
    let at = match (bare.parse::<IpAddr>(), s.parse::<SocketAddr>()) {
        (Ok(ip), _) => SocketAddr::new(ip, port),
        (_, Ok(at)) => at,
        _ => return Err(why_not(s, shown)),
    };
    let ip = at.ip().to_canonical();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast() || v4.octets()[0] == 0);
    if at.port() == 0 {
        Err(PeerError::Port(shown))
    } else if matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
        Err(PeerError::LinkLocal(shown))
    } else if ip.is_unspecified() || ip.is_multicast() || broadcast {
        Err(PeerError::Address(shown))
    } else {
        Ok(SocketAddr::new(ip, at.port()))
    }
}

/// What is wrong with an entry that is no address.
fn why_not(s: &str, shown: String) -> PeerError {
    let host = s.rsplit_once(':').map_or(s, |(host, _)| host);
    let is_address = |h: &str| h.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok();
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let label = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let numeric = name.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if s.contains('%') {
        PeerError::LinkLocal(shown)
    } else if is_address(host) {
        PeerError::Port(shown)
    } else if name.is_empty() || numeric || s.contains('/') || !name.bytes().all(label) {
        PeerError::Malformed(shown)
    } else if name.ends_with(".local") {
        PeerError::Local(shown)
    } else {
        PeerError::Name(shown)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses() {
        for (entry, expected) in [
            ("192.168.1.5", "192.168.1.5:6374"),
            (" 192.168.1.5 ", "192.168.1.5:6374"),
            ("192.168.1.5:7000", "192.168.1.5:7000"),
            ("fd00::5", "[fd00::5]:6374"),
            ("[fd00::5]", "[fd00::5]:6374"),
            ("[fd00::5]:7000", "[fd00::5]:7000"),
            ("::ffff:10.0.0.1", "10.0.0.1:6374"),
            ("127.0.0.1:7001", "127.0.0.1:7001"), // a port forwarded through ssh
        ] {
            assert_eq!(hints(&[entry.into()], 6374), Ok(vec![expected.parse().unwrap()]), "{entry}");
        }
        let twice = ["10.0.0.2", "10.0.0.1:6374", "10.0.0.2:6374"].map(String::from);
        let once: Vec<SocketAddr> = ["10.0.0.2:6374", "10.0.0.1:6374"].map(|s| s.parse().unwrap()).into();
        assert_eq!(hints(&twice, 6374), Ok(once));
    }

    #[test]
    fn everything_else_says_what_to_write() {
        type Kind = fn(String) -> PeerError;
        let table: [(&str, Kind); 17] = [
            ("nas", PeerError::Name),
            ("nas.example.org:7000", PeerError::Name),
            ("pi4.local", PeerError::Local),
            ("Pi4.LOCAL.:6374", PeerError::Local),
            ("192.168.1.5:0", PeerError::Port),
            ("192.168.1.5:70000", PeerError::Port),
            ("192.168.1.5:", PeerError::Port),
            ("[fd00::5]:x", PeerError::Port),
            ("fe80::1", PeerError::LinkLocal),
            ("[fe80::1]:6374", PeerError::LinkLocal),
            ("fe80::1%eth0", PeerError::LinkLocal),
            ("0.0.0.0", PeerError::Address),
            ("224.0.0.251", PeerError::Address),
            ("ff02::fb", PeerError::Address),
            ("", PeerError::Malformed),
            ("192.168.1.300", PeerError::Malformed),
            ("https://nas/", PeerError::Malformed),
        ];
        for (entry, kind) in table {
            assert_eq!(hints(&["10.0.0.1".into(), entry.into()], 6374), Err(kind(entry.into())), "{entry}");
        }
        assert_eq!(hints(&vec![String::new(); MAX_PEERS + 1], 1), Err(PeerError::TooMany));
        let long = hints(&["x".repeat(10_000)], 1).unwrap_err().to_string();
        assert!(long.len() < 400 && long.contains("getent"), "{long}");
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_an_error(s in "\\PC{0,40}", port in 1u16..) {
            if let Ok(at) = hints(&[s], port) {
                prop_assert!(at[0].port() != 0 && !at[0].ip().is_multicast() && !at[0].ip().is_unspecified());
            }
        }

        #[test]
        fn what_we_print_is_read_back(ip: std::net::IpAddr, port in 1u16..) {
            let at = SocketAddr::new(ip, port);
            if let Ok(back) = hints(&[at.to_string()], 6374) {
                prop_assert_eq!(back, [SocketAddr::new(ip.to_canonical(), port)]);
            }
        }
    }
}
