//! The cache: what may be lost.

use std::net::SocketAddr;
use std::path::Path;

use meshd_ca::identity::NodeId;
use thiserror::Error;

/// Why the cache does not work. Nothing depends on it: go on without.
#[derive(Debug, Error)]
pub enum CacheError {
    /// The directory.
    #[error("the cache in {0} cannot be opened: {1}")]
    Open(String, String),
}

/// Last known records and addresses.
#[derive(Debug)]
pub struct Cache {}

impl Cache {
    /// Opens or makes the cache below `dir`; a corrupt one is set aside. Blocks: call it off the hot path.
    ///
    /// # Errors
    /// [`CacheError`] when neither an old nor a new database can be opened.
    pub fn open(dir: &Path) -> Result<Self, CacheError> {
        let _ = dir;
        todo!()
    }
    /// Keeps the bytes of a signed record; returns whether they were new.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn put_record(&self, node: NodeId, bytes: &[u8]) -> Result<bool, CacheError> {
        let _ = (node, bytes);
        todo!()
    }
    /// Every record held, unverified: whoever reads them checks them like bytes from the network.
    pub fn records(&self) -> Vec<(NodeId, Vec<u8>)> {
        todo!()
    }
    /// Keeps where a node was last reached.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn put_addresses(&self, node: NodeId, addresses: &[SocketAddr]) -> Result<bool, CacheError> {
        let _ = (node, addresses);
        todo!()
    }
    /// Where nodes were last reached.
    pub fn addresses(&self) -> Vec<(NodeId, Vec<SocketAddr>)> {
        todo!()
    }
    /// Forgets a node.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn forget(&self, node: NodeId) -> Result<(), CacheError> {
        let _ = node;
        todo!()
    }
    /// Writes what is not on disk yet.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn flush(&self) -> Result<(), CacheError> {
        todo!()
    }
}
