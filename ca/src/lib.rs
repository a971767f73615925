//! Who is who in a meshd mesh: identities, keys, roster, certificates and the rules of joining.
//!
//! No sockets and no clock of its own: time is a parameter, bytes come in and go out. What this package decides is decided the
//! same way in a test, in a simulation of a thousand nodes and on a Pi.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod bundle;
pub mod clock;
pub mod identity;
pub mod issue;
pub mod join;
pub mod keys;
pub mod roster;
pub mod signed;
pub mod store;
pub mod time;
pub mod token;
pub mod verify;
