//! Permissive, strict and audit: what becomes of plaintext from members and from others.

use std::io::{ErrorKind, Read};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use meshd::api::State;
use meshd::config::Mode;

use crate::support::mesh::{Mesh, Setup};
use crate::support::scenario::{Scenario, scenario};
use crate::support::traffic::{Server, ask, connect, sockets};
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("modes", strict_refuses_plaintext_of_members_only),
    scenario!("modes", strict_fails_closed),
    scenario!("modes", audit_lets_it_pass_and_tells),
];

/// A connection that is refused or reset, whichever way its client gets to know.
fn refused(mesh: &Mesh, client: &str, server: &str, port: u16) -> Result<()> {
    for address in sockets(mesh.host(server), port) {
        let seen = connect(mesh.host(client), address).and_then(|mut stream| stream.read(&mut [0]));
        match seen {
            Ok(_) => bail!("{client} got through to {address}"),
            Err(error) => {
                let kind = error.kind();
                ensure!(
                    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused),
                    "{client} to {address}: {error}"
                );
            }
        }
    }
    Ok(())
}

fn strict_refuses_plaintext_of_members_only() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured_on("b", "mode = \"strict\"").outsider("x").start()?;
    mesh.secured_between("a", "b", 8000)?;
    mesh.secured_between("b", "a", 8001)?;
    let modes: Vec<_> = mesh.at("a").nodes()?.iter().filter(|n| n.name.as_str() == "b").map(|n| n.mode).collect();
    equal!(modes, vec![Some(Mode::Strict)], "the mode that a knows of b");
    // SSH stays open to all: nobody is to lock himself out.
    let servers = (Server::answering(mesh.host("b"), 8002, "got ")?, Server::answering(mesh.host("b"), 22, "got ")?);
    for address in sockets(mesh.host("b"), 8002) {
        equal!(ask(mesh.host("x"), address, "x")?, "got x", "what a non-member hears at {address}");
    }
    // Without its daemon, the permissive member sends plaintext. The strict one does not take it.
    mesh.at_mut("a").kill();
    refused(&mesh, "a", "b", 8002)?;
    for address in sockets(mesh.host("b"), 22) {
        equal!(ask(mesh.host("a"), address, "x")?, "got x", "what a hears at {address}");
    }
    drop(servers);
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("a", "b", 8003)
}

fn strict_fails_closed() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured_on("b", "mode = \"strict\"").outsider("x").start()?;
    let word = marker("closed");
    let server = Server::answering(mesh.host("a"), 8000, "got ")?;
    mesh.at_mut("b").kill();
    let ((), report) = mesh.watched(&[&word], || {
        for address in sockets(mesh.host("a"), 8000) {
            ensure!(ask(mesh.host("b"), address, &word).is_err(), "a strict host without its daemon talks plainly to {address}");
        }
        Ok(())
    })?;
    equal!(report.hits[0], 0, "frames with plaintext");
    drop(server);
    // Those who are no members are not its business.
    let server = Server::answering(mesh.host("x"), 8001, "got ")?;
    for address in sockets(mesh.host("x"), 8001) {
        equal!(ask(mesh.host("b"), address, "x")?, "got x", "what a strict host without its daemon hears at {address}");
    }
    drop(server);
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("b", "a", 8002)
}

fn audit_lets_it_pass_and_tells() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured_on("b", "mode = \"audit\"").start()?;
    mesh.secured_between("a", "b", 8000)?;
    mesh.at_mut("a").kill();
    let server = Server::answering(mesh.host("b"), 8001, "got ")?;
    for address in sockets(mesh.host("b"), 8001) {
        let word = marker("audit");
        mesh.readable(&word, || Ok(ask(mesh.host("a"), address, &word)?))?;
    }
    drop(server);
    eventually(Duration::from_secs(10), "the plaintext is reported", || {
        let (_, report, _) = mesh.at("b").try_cli(&["check"])?;
        ensure!(report.contains("2 connections from addresses of members came in plaintext"), "{report}");
        Ok(())
    })
}
