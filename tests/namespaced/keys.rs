//! Another node key for a host: under traffic, with answers that are lost, and for those who may not have one.

use std::io::{ErrorKind, Read};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{KeyRotated, State};
use meshd_ca::identity::NodeId;

use crate::authorities::{Load, PORT, nothing_failed};
use crate::support::mesh::{Mesh, SETTLED, Setup};
use crate::support::scenario::{Scenario, scenario};
use crate::support::traffic::{Server, addresses, connect, echo, sockets};
use crate::support::{copy, equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("keys", a_host_gets_other_keys_under_load),
    scenario!("keys", an_answer_that_was_lost_is_made_up_for),
    scenario!("keys", who_may_not_and_who_has_an_old_one_are_told),
];

const PATIENCE: Duration = Duration::from_secs(20);

fn rotate(mesh: &Mesh, at: &str) -> Result<KeyRotated> {
    mesh.at(at).json(&["rotate-key", "--yes"])
}

/// Waits until the others know a host by this key and nothing else, and go to all its addresses as before.
fn until_known(mesh: &Mesh, name: &'static str, node: NodeId, by: &[&str]) -> Result<()> {
    for other in by {
        eventually(SETTLED, &format!("{other} knows {name} as {node}"), || {
            let nodes = mesh.at(other).nodes()?;
            let known: Vec<_> = nodes.iter().filter(|n| n.name.as_str() == name).collect();
            let [one] = known[..] else { anyhow::bail!("{known:?}") };
            ensure!(one.id == node && one.reachable && !one.addresses.is_empty(), "{one:?}");
            for address in addresses(mesh.host(name)) {
                ensure!(one.captured.contains(&address), "{address} is not captured: {one:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Starts a host again, with a copy kept of what is on its disk at this moment. Returns where its state is, and the copy.
fn kept(mesh: &mut Mesh, name: &str) -> Result<(PathBuf, PathBuf)> {
    let state = mesh.at(name).dir().join("state");
    let kept = state.with_extension("kept");
    mesh.at_mut(name).stop()?;
    copy(&state, &kept)?;
    mesh.at_mut(name).start()?;
    mesh.at(name).until(State::Member)?;
    mesh.settled()?;
    Ok((state, kept))
}

/// The key of a host is replaced twice while connections are made in all directions and others stay open; then the host is banished.
fn a_host_gets_other_keys_under_load() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).start()?;
    let servers: Vec<Server> = ["a", "b", "c"].iter().map(|h| Server::echo(mesh.host(h), PORT)).collect::<Result<_>>()?;
    let mut open = Vec::new();
    for (from, to) in [("a", "b"), ("b", "a"), ("c", "b")] {
        let mut stream = connect(mesh.host(from), sockets(mesh.host(to), PORT)[0])?;
        echo(&mut stream, "word before")?;
        open.push(stream);
    }
    let first = mesh.at("a").nodes()?.iter().find(|n| n.name.as_str() == "b").context("no b")?.id;
    let pairs = [("a", "b"), ("b", "a"), ("c", "b"), ("b", "c")];
    let mut pids = Vec::new();
    let load = Load::new(&mesh);
    // Not one of them on the link as it is, not for a moment.
    let (one, two) = mesh.encrypted("word ", || {
        load.during(&pairs, || {
            std::thread::sleep(Duration::from_secs(2));
            let one = rotate(&mesh, "b")?;
            until_known(&mesh, "b", one.node, &["a", "c"])?;
            pids.push(one.upgraded.pid);
            std::thread::sleep(Duration::from_secs(3));
            let two = rotate(&mesh, "b")?;
            until_known(&mesh, "b", two.node, &["a", "c"])?;
            pids.push(two.upgraded.pid);
            std::thread::sleep(Duration::from_secs(3));
            Ok((one, two))
        })
    })?;
    println!("{} connections while the key was replaced twice", load.connections());
    equal!((one.old, one.node), (first, two.old), "the keys");
    ensure!(one.upgraded.older.connections >= 3, "connections that stay: {one:?}");
    nothing_failed(&mesh, &["a", "b", "c"])?;
    for stream in &mut open {
        echo(stream, "word after")?;
    }
    // Its certificates are of the key that it has.
    let own = format!("/node/{}", two.node);
    eventually(SETTLED, "an SVID of the new key", || {
        let all = mesh.at("b").identities()?;
        ensure!(all.iter().any(|i| i.id.workload.to_string() == own), "{all:?}");
        Ok(())
    })?;
    for (from, to) in pairs {
        mesh.secured_between(from, to, PORT + 1)?;
    }
    pids.into_iter().try_for_each(|pid| mesh.at_mut("b").begot(pid))?;
    // Put out under the key it has, it loses what began under the first.
    mesh.at("a").cli(&["banish", "b", "--yes"])?;
    for stream in &mut open {
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let error = stream.read(&mut [0; 1]).err().context("a clean end, or bytes")?;
        equal!(error.kind(), ErrorKind::ConnectionReset, "how it ended");
    }
    mesh.at("b").until(State::Banished)?;
    mesh.at_mut("b").older_ended_well(PATIENCE)?;
    drop(servers);
    Ok(())
}

/// The plug was pulled when the authority had signed and the host had not heard it: it has the new key, and believes that it has the old one.
fn an_answer_that_was_lost_is_made_up_for() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).start()?;
    let (state, kept) = kept(&mut mesh, "b")?;
    let done = rotate(&mesh, "b")?;
    mesh.at_mut("b").begot(done.upgraded.pid)?;
    until_known(&mesh, "b", done.node, &["a"])?;
    mesh.at_mut("b").kill();
    mesh.at_mut("b").older_ended_well(PATIENCE)?;
    std::fs::copy(state.join("node.key"), kept.join("next.key"))?;
    std::fs::remove_dir_all(&state)?;
    std::fs::rename(&kept, &state)?;

    mesh.at_mut("b").start()?;
    let first = mesh.at("b").until_answers()?.pid;
    let pid = eventually(3 * SETTLED, "another process goes on with the new key", || {
        let status = mesh.at("b").status()?;
        ensure!(status.pid != first && status.state == State::Member, "{status:?}");
        Ok(status.pid)
    })?;
    mesh.at_mut("b").begot(pid)?;
    until_known(&mesh, "b", done.node, &["a"])?;
    ensure!(!state.join("next.key").exists(), "the key is still to come");
    mesh.secured_between("a", "b", PORT)?;
    mesh.secured_between("b", "a", PORT)?;
    mesh.at_mut("b").older_ended_well(PATIENCE)
}

fn who_may_not_and_who_has_an_old_one_are_told() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).configured_on("c", "authority = false").start()?;
    let refused = |at: &str, why: &str| {
        let (done, _, error) = mesh.at(at).try_cli(&["rotate-key", "--yes"])?;
        ensure!(!done && error.contains(why), "{at}: {error}");
        Ok(())
    };
    refused("a", "the key of the founder cannot be replaced")?;
    mesh.at("a").cli(&["authority", "add", "b"])?;
    eventually(SETTLED, "b stands", || {
        ensure!(mesh.at("b").status()?.authority, "{:?}", mesh.at("b").status()?);
        Ok(())
    })?;
    refused("b", "end its office first")?;

    // A backup, or a copy of the card, of before.
    let (state, kept) = kept(&mut mesh, "c")?;
    let done = rotate(&mesh, "c")?;
    mesh.at_mut("c").begot(done.upgraded.pid)?;
    until_known(&mesh, "c", done.node, &["a", "b"])?;
    mesh.at_mut("c").kill();
    mesh.at_mut("c").older_ended_well(PATIENCE)?;
    let current = state.with_extension("current");
    std::fs::rename(&state, &current)?;
    std::fs::rename(&kept, &state)?;
    mesh.at_mut("c").start()?;
    mesh.at("c").until(State::Banished)?;
    ensure!(mesh.at("c").log().contains("replaced by one that is not here"), "{}", mesh.at("c").log());
    let token = mesh.at("a").token()?;
    let (joined, _, error) = mesh.at("c").try_cli(&["join", &token])?;
    ensure!(!joined && error.contains("banished"), "{error}");
    // The right card is the member that it was.
    mesh.at_mut("c").stop()?;
    std::fs::remove_dir_all(&state)?;
    std::fs::rename(&current, &state)?;
    mesh.at_mut("c").start()?;
    mesh.at("c").until(State::Member)?;
    until_known(&mesh, "c", done.node, &["a", "b"])
}
