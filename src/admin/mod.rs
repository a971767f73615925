//! What the daemon tells the people and programs on its own host.

pub(crate) mod check;
pub(crate) mod local;
pub(crate) mod view;
