//! The realities of small hosts: bad networks, moving addresses, full disks, little memory, pulled plugs, wrong clocks.
//!
//! Each scenario really makes the condition, with one permissive and one strict member and a host that is none, and proves three
//! things: members' traffic is secured as soon as it can be, what cannot work fails instead of leaking, and nobody is ever locked
//! out of SSH.

pub(crate) mod addresses;
pub(crate) mod clocks;
pub(crate) mod cuts;
pub(crate) mod network;
pub(crate) mod power;
pub(crate) mod resources;
pub(crate) mod set_back;

use anyhow::Result;
use meshd::api::State;

use crate::support::mesh::{Mesh, Setup};

/// `a`, permissive and the authority; `b`, strict; `x`, no member.
fn trio() -> Setup {
    Setup::of(&["a", "b"]).configured("drain = \"1s\"").configured_on("b", "mode = \"strict\"").outsider("x")
}

/// Starts `a`, which founds, and lets the started member `name` in.
pub(crate) fn admit(mesh: &Mesh, name: &str, token: &[&str]) -> Result<()> {
    let token = mesh.at("a").token_of(token)?;
    mesh.at(name).until_answers()?;
    mesh.at(name).cli(&["join", &token])?;
    mesh.at(name).until(State::Member)
}

/// Traffic between the two members is secured, both ways and in both families.
fn secured(mesh: &Mesh, port: u16) -> Result<()> {
    mesh.secured_between("a", "b", port)?;
    mesh.secured_between("b", "a", port + 1)
}
