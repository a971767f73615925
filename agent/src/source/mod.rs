//! Where hints come from: places where a member might be.
//!
//! A hint says where to dial, never whom to trust. Invariant: nothing in here is believed; what comes of a hint is decided by the
//! handshake that follows it (see [`crate::addresses`]). Each source has its own file, and a library that it needs is named
//! nowhere else.

pub mod mdns;
pub mod static_file;
