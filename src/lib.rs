//! meshd: transparent mutual TLS for every TCP connection between the hosts of a mesh, with no configuration.
//!
//! This library is the daemon and its command line; it is a library so that tests and fuzzers can drive its parts. `ARCHITECTURE.md`
//! says how the parts fit together; start reading at [`proxy`], which tells the life of a connection.

pub(crate) mod admin;
pub mod api;
pub(crate) mod backup;
pub(crate) mod check;
pub mod cli;
pub(crate) mod clock;
pub mod config;
pub(crate) mod control;
pub mod daemon;
pub mod demo;
pub(crate) mod fleet;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub(crate) mod http1;
pub mod identity;
pub mod intercept;
pub mod local;
pub mod logging;
pub(crate) mod membership;
pub mod proxy;
pub(crate) mod recovery;
pub(crate) mod succession;
pub(crate) mod systemd;
pub(crate) mod task;
