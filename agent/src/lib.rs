//! What runs where in a meshd mesh: signed records, the gossip that spreads them, the catalog they merge into, the sources it is
//! discovered from, and which addresses are captured.
//!
//! No sockets here but those of the discovery sources, and no TLS: connections are handed in, time is a parameter or comes back
//! as a delay to wait. What gossip decides is decided the same way in the daemon and in a simulation of a thousand nodes.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod addresses;
pub mod authorities;
pub mod cache;
pub mod catalog;
pub mod gossip;
pub mod interfaces;
pub mod record;
pub mod rotation;
pub mod source;
