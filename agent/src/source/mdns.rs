//! mDNS.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use meshd_ca::identity::MeshId;
use thiserror::Error;

/// A mark on an announcement that only who knows the mesh id recognises: a salt and a 32-bit MAC of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    salt: [u8; 8],
    mac: [u8; 4],
}

/// Why there is no mDNS.
#[derive(Debug, Error)]
pub enum MdnsError {
    /// The responder could not be started or has ended.
    #[error("mDNS does not work on this host: {0}")]
    Responder(String),
}

/// What to announce, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MdnsConfig {
    /// The UDP port: 5353 except in tests.
    pub udp_port: u16,
    /// The mesh port to announce.
    pub port: u16,
    /// The instance name; nothing in it has a meaning.
    pub instance: String,
    /// Names of the interfaces to use.
    pub interfaces: BTreeSet<String>,
}

/// A member, or what says it is one, seen on the LAN: a hint where to dial, nothing more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// Where it says it listens.
    pub addresses: Vec<SocketAddr>,
    /// Its mesh, for those who know it.
    pub tag: Option<Tag>,
    /// The protocol version that it announces.
    pub version: u16,
}

/// A running responder and browser.
#[derive(Debug)]
pub struct Mdns {}

/// The sightings of a running browser.
#[derive(Debug)]
pub struct Sightings {}

impl Tag {
    /// A tag of `mesh` under a fresh salt.
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn of(mesh: MeshId) -> Result<Self, meshd_ca::keys::KeyError> {
        let _ = mesh;
        todo!()
    }
}

/// Whether `tag` is of `mesh`.
pub fn tag_matches(mesh: MeshId, tag: &Tag) -> bool {
    let _ = (mesh, tag);
    todo!()
}

impl Mdns {
    /// Starts to browse. Nothing is announced yet.
    ///
    /// # Errors
    /// [`MdnsError`] when the responder's thread cannot be made.
    pub fn start(config: MdnsConfig) -> Result<(Self, Sightings), MdnsError> {
        let _ = config;
        todo!()
    }
    /// Announces us, with the tag of our mesh once there is one.
    ///
    /// # Errors
    /// [`MdnsError`] when the responder has ended.
    pub fn announce(&mut self, tag: Option<Tag>) -> Result<(), MdnsError> {
        let _ = tag;
        todo!()
    }
    /// Takes the announcement back.
    ///
    /// # Errors
    /// [`MdnsError`] when the responder has ended.
    pub fn unannounce(&mut self) -> Result<(), MdnsError> {
        todo!()
    }
    /// Changes the interfaces in use.
    ///
    /// # Errors
    /// [`MdnsError`] when the responder has ended.
    pub fn use_interfaces(&mut self, names: BTreeSet<String>) -> Result<(), MdnsError> {
        let _ = names;
        todo!()
    }
}

impl Sightings {
    /// The next new or changed sighting; none when the responder has ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<Sighting> {
        todo!()
    }
}
