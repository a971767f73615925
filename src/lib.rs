//! meshd: transparent mutual TLS for every TCP connection between the hosts of a mesh, with no configuration.
//!
//! This library is the daemon and its command line; it is a library so that tests and fuzzers can drive its parts. `ARCHITECTURE.md`
//! says how the parts fit together; start reading at [`proxy`], which tells the life of a connection.

// drafts: admin clock control membership
pub mod api;
pub mod config;
#[path = "daemon_stub.rs"]
pub mod daemon;
pub mod demo;
pub mod identity;
pub mod intercept;
pub mod proxy;
