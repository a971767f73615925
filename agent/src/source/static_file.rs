//! `peers = [...]`.

use std::net::SocketAddr;

use thiserror::Error;

/// Why an entry is not a peer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PeerError {
    /// A name.
    #[error("{0:?} is a name")]
    Name(String),
}

/// Where to dial for the peers in the configuration; `port` is used where an entry has none.
///
/// # Errors
/// [`PeerError`] for the first entry that is not an address.
pub fn hints(peers: &[String], port: u16) -> Result<Vec<SocketAddr>, PeerError> {
    let _ = (peers, port);
    todo!()
}
