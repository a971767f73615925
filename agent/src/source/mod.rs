//! Sources of hints.

pub mod mdns;
pub mod static_file;
