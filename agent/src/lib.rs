//! What runs where in a meshd mesh: signed records, gossip, the catalog and the sources it is discovered from.
//!
//! No TLS and no clock of its own: connections are handed in, time is a parameter.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod addresses;
pub mod cache;
pub mod interfaces;
pub mod source;
