//! This node's live credentials, and TLS as meshd speaks it.
//!
//! - [`provider`]: which cryptography, in which order. The only file that names a provider.
//! - [`verifier`]: whom we believe: SVIDs for data, bare node keys for control and join.
//! - [`tls`]: the rustls configurations of data, control and join.
//! - [`svids`]: the certificates of this node and its workloads, issued ahead of need and renewed early.
//!
//! TLS 1.3 only, both sides authenticated, no tickets, no resumption (rustls does not verify again on resumption), no early data.

pub mod provider;
pub mod svids;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod tls;
pub mod traffic;
pub mod verifier;
