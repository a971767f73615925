//! What the commands print about the mesh of [`super::daemon`], to the byte.

pub(crate) const STATUS: &str = "";
pub(crate) const STATUS_JSON: &str = "";
pub(crate) const NODES: &str = "";
pub(crate) const SERVICES: &str = "";
pub(crate) const EDGES: &str = "";
pub(crate) const IDENTITY: &str = "";
pub(crate) const CHECK: &str = "";
