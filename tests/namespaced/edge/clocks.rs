//! Clocks that are wrong at boot, and are set while the daemon runs.
//!
//! The kernel cannot give one host another time of day (time namespaces move the monotonic clocks only), and the daemon has no back
//! door for it. libfaketime stands between the daemon and the C library: what it says is read again from a file at every call. This
//! works for the test build, which is linked dynamically.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use meshd::api::State;

use super::{admit, secured, trio};
use crate::support::mesh::{Mesh, SETTLED};
use crate::support::scenario::{Need, Scenario, faketime, scenario};
use crate::support::ssh::Ssh;
use crate::support::traffic::{Server, ask, sockets};
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("edge", founded_in_1970_and_set_right, Need::FakeTime),
    scenario!("edge", founded_in_the_future_and_set_right, Need::FakeTime),
    scenario!("edge", a_member_that_boots_with_a_wrong_clock, Need::FakeTime),
];

/// The time that `libfaketime` shows a host's daemon: an absolute one from which it runs on, or an offset.
pub(crate) const IN_1970: &str = "@1970-01-01 00:02:00";
pub(crate) const AHEAD: &str = "+60y";
pub(crate) const RIGHT: &str = "+0";

fn file(mesh: &Mesh, name: &str) -> PathBuf {
    mesh.host(name).dir().join("time")
}

/// Changes the time that the daemon of `name` sees.
pub(crate) fn set(mesh: &Mesh, name: &str, time: &str) -> Result<()> {
    Ok(std::fs::write(file(mesh, name), time)?)
}

/// Starts the daemon of `name` at another time of day.
pub(crate) fn start(mesh: &mut Mesh, name: &str, time: &str) -> Result<()> {
    set(mesh, name, time)?;
    let library = faketime().context("libfaketime")?;
    let words = [
        format!("LD_PRELOAD={}", library.display()),
        format!("FAKETIME_TIMESTAMP_FILE={}", file(mesh, name).display()),
        "FAKETIME_NO_CACHE=1".to_owned(),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    mesh.at_mut(name).start_through("env", &words)
}

/// Secured within the time in which a clock that was set is noticed and certificates are issued anew.
fn comes_right(mesh: &Mesh, port: u16) -> Result<()> {
    eventually(SETTLED, "secured again", || secured(mesh, port))
}

fn founded_in_1970_and_set_right() -> Result<()> {
    let mut mesh = trio().hosts()?;
    start(&mut mesh, "a", IN_1970)?;
    mesh.at("a").until(State::Member)?;
    equal!(mesh.at("a").status()?.clock.source, "floor", "the clock of a");
    start(&mut mesh, "b", IN_1970)?;
    admit(&mesh, "b", &[])?;
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    for name in ["a", "b"] {
        set(&mesh, name, RIGHT)?;
    }
    comes_right(&mesh, 8010)?;
    equal!(mesh.at("a").status()?.clock.source, "system", "the clock of a");
    let (_, report, _) = mesh.at("a").try_cli(&["check"])?;
    ensure!(!report.contains("check-clock") && !report.contains('×'), "{report}");
    // One of them spends a year in a drawer: its certificates have ended long ago when it is back, and so has what it remembers.
    mesh.at_mut("b").kill();
    set(&mesh, "a", "+1y")?;
    start(&mut mesh, "b", "+1y")?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    comes_right(&mesh, 8020)?;
    ssh.goes_on()?;
    ssh.is_open(&mesh)
}

fn founded_in_the_future_and_set_right() -> Result<()> {
    let mut mesh = trio().hosts()?;
    start(&mut mesh, "a", AHEAD)?;
    mesh.at("a").until(State::Member)?;
    set(&mesh, "a", RIGHT)?;
    mesh.at_mut("b").start()?;
    admit(&mesh, "b", &[])?;
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    comes_right(&mesh, 8000)?;
    ssh.goes_on()?;
    ssh.is_open(&mesh)
}

fn a_member_that_boots_with_a_wrong_clock() -> Result<()> {
    let mut mesh = trio().start()?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    // In 1970 it goes by what the authority signed when it joined.
    mesh.at_mut("b").kill();
    start(&mut mesh, "b", IN_1970)?;
    mesh.at("b").until(State::Member)?;
    equal!(mesh.at("b").status()?.clock.source, "floor", "the clock of b");
    mesh.settled()?;
    comes_right(&mesh, 8010)?;
    // In the future every certificate has ended. Nothing is said in the clear, and it is over when the clock is set.
    mesh.at_mut("b").kill();
    start(&mut mesh, "b", AHEAD)?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    let word = marker("future");
    let servers = (Server::answering(mesh.host("a"), 8020, "got ")?, Server::answering(mesh.host("b"), 8020, "got ")?);
    let ((), report) = mesh.watched(&[&word], || {
        for (from, to) in [("a", "b"), ("b", "a")] {
            for address in sockets(mesh.host(to), 8020) {
                let heard = ask(mesh.host(from), address, &word);
                ensure!(heard.is_err(), "{from} to {address}: {heard:?}");
            }
        }
        Ok(())
    })?;
    equal!(report.hits[0], 0, "frames in plaintext");
    drop(servers);
    let (ok, report, _) = mesh.at("b").try_cli(&["check"])?;
    ensure!(!ok && report.contains("check-bundle"), "check does not see it: {report}");
    ssh.goes_on()?;
    ssh.is_open(&mesh)?;
    set(&mesh, "b", RIGHT)?;
    comes_right(&mesh, 8030)?;
    ssh.goes_on()
}
