//! What the fuzzers call of the reading of announcements. No part of the API.

use std::net::IpAddr;

use super::{Heard, MAX_ADDRESSES, MAX_NAME, MAX_SIGHTINGS, Seen, Sighting};

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Table(Seen);

/// One announcement as the library hands it over: the port, each address with its interface, and the texts `v`, `s` and `m`.
#[derive(Debug, Clone)]
pub struct Announcement {
    /// The port of the service.
    pub port: u16,
    /// The addresses.
    pub addresses: Vec<(IpAddr, u32)>,
    /// The texts, in that order.
    pub texts: [Option<Vec<u8>>; 3],
}

impl Table {
    /// Takes in an announcement; `own` is the salt of our own.
    ///
    /// # Panics
    /// When what comes out leads nowhere, or more is remembered than may be.
    pub fn hear(&mut self, name: &str, said: &Announcement, own: Option<[u8; 8]>) -> Option<Sighting> {
        let [version, salt, mac] = said.texts.clone();
        let heard = Heard { port: said.port, addresses: said.addresses.clone(), version, salt, mac };
        let sighting = self.0.resolved(name, &heard, own);
        assert!(self.0.instances.len() <= MAX_SIGHTINGS && self.0.instances.keys().all(|name| name.len() <= MAX_NAME));
        for (_, seen) in self.0.instances.values() {
            assert!(!seen.addresses.is_empty() && seen.addresses.len() <= MAX_ADDRESSES && seen.version != 0);
            for at in &seen.addresses {
                let ip = at.ip();
                assert!(at.port() != 0 && ip == ip.to_canonical());
                assert!(!ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast());
            }
        }
        sighting
    }

    /// Takes in a goodbye.
    pub fn removed(&mut self, name: &str) {
        let _ = self.0.removed(name);
    }
}
