//! What the daemon tells the people and programs on its own host.

mod authorities;
mod figures;
pub(crate) mod http;
pub(crate) mod local;
mod metrics;
mod process;
pub(crate) mod view;
