//! Daemons that stand still for a while, and whole meshes whose plug is pulled.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::State;
use rustix::process::{Pid, Signal, kill_process};

use super::{secured, trio};
use crate::support::mesh::{Mesh, SETTLED, Setup};
use crate::support::scenario::{Scenario, scenario};
use crate::support::ssh::Ssh;
use crate::support::traffic::{Server, addresses, connect, connect_within, echo, sockets};
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] =
    &[scenario!("edge", suspended_for_a_minute), scenario!("edge", power_pulled_and_back_in_any_order)];

fn signal(mesh: &Mesh, name: &str, what: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(mesh.at(name).pid()?)?).context("a process")?;
    Ok(kill_process(pid, what)?)
}

fn suspended_for_a_minute() -> Result<()> {
    let mesh = trio().start()?;
    let mut ssh = Ssh::open(&mesh)?;
    // One that waits for longer than the daemon stands still.
    let server = Server::patient_echo(mesh.host("b"), 8000, Duration::from_secs(120))?;
    let mut open = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    echo(&mut open, "before")?;
    signal(&mesh, "b", Signal::STOP)?;
    // b is strict: for as long as it stands still, nothing is said to it in the clear.
    let word = marker("suspended");
    let ((), report) = mesh.watched(&[&word], || {
        let end = tokio::time::Instant::now() + Duration::from_secs(60);
        while tokio::time::Instant::now() < end {
            for address in sockets(mesh.host("b"), 8000) {
                let heard =
                    connect_within(mesh.host("a"), address, Duration::from_secs(2)).map_err(Into::into).and_then(|mut s| {
                        s.set_read_timeout(Some(Duration::from_secs(2)))?;
                        echo(&mut s, &word)
                    });
                ensure!(heard.is_err(), "a daemon that stands still carried a connection");
            }
            ssh.goes_on()?;
            std::thread::sleep(Duration::from_secs(2));
        }
        Ok(())
    })?;
    equal!(report.hits[0], 0, "frames in plaintext");
    let captured = mesh.at("a").captured("b")?;
    ensure!(addresses(mesh.host("b")).iter().all(|ip| captured.contains(ip)), "a strict member was forgotten: {captured:?}");
    signal(&mesh, "b", Signal::CONT)?;
    // The kernel kept what was open alive.
    echo(&mut open, "after").context("the connection that was open all the time")?;
    drop(server);
    mesh.settled()?;
    eventually(SETTLED, "secured again", || secured(&mesh, 8010))?;
    ssh.goes_on()?;
    ssh.is_open(&mesh)
}

fn power_pulled_and_back_in_any_order() -> Result<()> {
    let mut mesh =
        Setup::of(&["a", "b", "c"]).configured("drain = \"1s\"").configured_on("b", "mode = \"strict\"").outsider("x").start()?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    // A second after it joined, what a member has is on its disk.
    for name in ["a", "b", "c"] {
        eventually(SETTLED, "the certificates are saved", || {
            ensure!(mesh.at(name).dir().join("state/svids").exists());
            Ok(())
        })?;
    }
    for (turn, order) in [["c", "b", "a"], ["b", "a", "c"]].into_iter().enumerate() {
        for name in ["a", "b", "c"] {
            mesh.at_mut(name).kill();
        }
        ssh.goes_on()?;
        ssh.is_open(&mesh)?;
        for (number, name) in order.into_iter().enumerate() {
            mesh.at_mut(name).start()?;
            mesh.at(name).until(State::Member)?;
            if number == 1 {
                // Two of three, in the first turn without the only authority: each knows and proves the other all the same.
                mesh.settled()?;
                let port = 8010 + 100 * u16::try_from(turn)?;
                mesh.secured_between(order[0], order[1], port)?;
                mesh.secured_between(order[1], order[0], port + 1)?;
            }
        }
        mesh.settled()?;
        let port = 8020 + 100 * u16::try_from(turn)?;
        for (number, (client, server)) in [("a", "b"), ("b", "c"), ("c", "a")].into_iter().enumerate() {
            mesh.secured_between(client, server, port + u16::try_from(number)?)?;
        }
    }
    ssh.goes_on()?;
    ssh.is_open(&mesh)
}
