//! Clocks that are wrong at boot, and are set while the daemon runs.
//!
//! The kernel cannot give one host another time of day (time namespaces move the monotonic clocks only), and the daemon has no back
//! door for it. libfaketime stands between the daemon and the C library: what it says is read again from a file at every call. This
//! works for the test build, which is linked dynamically.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::State;
use tokio::time::Instant;

use super::{admit, secured, trio};
use crate::support::mesh::{Mesh, SETTLED, Setup};
use crate::support::scenario::{Need, Scenario, faketime, scenario};
use crate::support::ssh::Ssh;
use crate::support::{equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("edge", founded_in_1970_and_set_right, Need::FakeTime),
    scenario!("edge", founded_in_the_future_and_set_right, Need::FakeTime),
    scenario!("edge", a_member_that_boots_with_a_wrong_clock, Need::FakeTime),
    scenario!("edge", one_host_is_73_years_ahead, Need::FakeTime),
    scenario!("edge", the_whole_mesh_wakes_up_in_1970, Need::FakeTime),
    scenario!("edge", after_a_year_one_authority_knows_the_time, Need::FakeTime),
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

/// Waits until the daemon of `name` has asked an authority for the time.
pub(crate) fn asked(mesh: &Mesh, name: &str) -> Result<()> {
    eventually(SETTLED, "an authority was asked for the time", || {
        let clock = mesh.at(name).status()?.clock;
        ensure!(clock.why.as_ref().is_some_and(|why| why.contains("authorities were asked")), "{clock:?}");
        Ok(())
    })
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
    // In 1970 it goes by what the authority signed when it joined, and then by what it signs now.
    mesh.at_mut("b").kill();
    start(&mut mesh, "b", IN_1970)?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    asked(&mesh, "b")?;
    equal!(mesh.at("b").status()?.clock.source, "signed", "the clock of b");
    comes_right(&mesh, 8010)?;
    // In the future every certificate would have ended, and every root. It does not believe that.
    mesh.at_mut("b").kill();
    start(&mut mesh, "b", AHEAD)?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    comes_right(&mesh, 8020)?;
    let (_, report, _) = mesh.at("b").try_cli(&["check"])?;
    ensure!(report.contains("check-clock") && report.contains("ahead") && !report.contains('×'), "{report}");
    ssh.goes_on()?;
    ssh.is_open(&mesh)?;
    set(&mesh, "b", RIGHT)?;
    eventually(SETTLED, "its own clock counts again", || {
        equal!(mesh.at("b").status()?.clock.source, "system", "the clock of b");
        Ok(())
    })?;
    comes_right(&mesh, 8030)?;
    ssh.goes_on()
}

/// Three hosts whose SVIDs live for 20 s, at the right time, that make more authorities than the first one only if they are `free` to.
fn short_lived(free: bool) -> Result<Mesh> {
    let setup = Setup::of(&["a", "b", "c"]).configured("drain = \"1s\"\nsvid_lifetime = \"20s\"");
    let setup = if free { setup } else { setup.configured("authority = false") };
    let mut mesh = setup.hosts()?;
    for name in ["a", "b", "c"] {
        start(&mut mesh, name, RIGHT)?;
        if name != "a" {
            admit(&mesh, name, &[])?;
        }
        mesh.at(name).until(State::Member)?;
    }
    mesh.settled()?;
    all_secured(&mesh, 8000)?;
    Ok(mesh)
}

/// Each secures its connections to each.
fn all_secured(mesh: &Mesh, port: u16) -> Result<()> {
    let pairs = [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("a", "c"), ("c", "a")];
    pairs.into_iter().zip(port..).try_for_each(|((from, to), port)| {
        eventually(SETTLED, "secured", || mesh.secured_between(from, to, port)).with_context(|| format!("{from} to {to}"))
    })
}

/// A forged clock on one host, the only authority and then a member, while it runs and when it starts: it bricks nothing, also
/// for later.
fn one_host_is_73_years_ahead() -> Result<()> {
    let mut mesh = short_lived(false)?;
    for (turn, name) in ["a", "b"].into_iter().enumerate() {
        let port = 8100 + 100 * u16::try_from(turn)?;
        set(&mesh, name, "+73y")?;
        // Longer than the SVIDs live: all have been renewed since.
        std::thread::sleep(Duration::from_secs(25));
        all_secured(&mesh, port)?;
        let now = mesh.at("c").status()?.clock.now;
        let off = mesh.at(name).status()?.clock.now.abs_diff(now);
        ensure!(off < 300, "the clocks of {name} and c are {off} s apart");
        mesh.at_mut(name).kill();
        start(&mut mesh, name, "+73y")?;
        mesh.at(name).until(State::Member)?;
        mesh.settled()?;
        all_secured(&mesh, port + 10)?;
        set(&mesh, name, RIGHT)?;
        eventually(SETTLED, "its own clock counts again", || {
            equal!(mesh.at(name).status()?.clock.source, "system", "the clock");
            Ok(())
        })?;
        all_secured(&mesh, port + 20)?;
        let (_, report, _) = mesh.at(name).try_cli(&["check"])?;
        ensure!(!report.contains("check-clock") && !report.contains('×'), "{report}");
    }
    Ok(())
}

/// All of it was off for longer than any certificate lives, and nobody knows what time it is: in each order of starting, everybody talks
/// to everybody again, and nobody did anything.
fn the_whole_mesh_wakes_up_in_1970() -> Result<()> {
    let mut mesh = short_lived(true)?;
    for (turn, order) in [["a", "b", "c"], ["c", "b", "a"], ["b", "a", "c"]].into_iter().enumerate() {
        for name in ["a", "b", "c"] {
            mesh.at_mut(name).kill();
        }
        std::thread::sleep(Duration::from_secs(25));
        let woken = Instant::now();
        for name in order {
            start(&mut mesh, name, IN_1970)?;
            mesh.at(name).until(State::Member)?;
        }
        let started = woken.elapsed();
        mesh.settled()?;
        all_secured(&mesh, 8100 + 100 * u16::try_from(turn)?)?;
        println!(
            "woken in 1970 as {}: the last one started after {} ms, every pair secured and checked after {} ms",
            order.join(" "),
            started.as_millis(),
            woken.elapsed().as_millis()
        );
        for name in order {
            ensure!(mesh.at(name).status()?.clock.source != "system", "{name} believes that it is 1970");
        }
    }
    // And when the network brings the time.
    for name in ["b", "c", "a"] {
        set(&mesh, name, RIGHT)?;
    }
    all_secured(&mesh, 8400)?;
    for name in ["a", "b", "c"] {
        eventually(SETTLED, "its own clock counts again", || {
            equal!(mesh.at(name).status()?.clock.source, "system", "the clock");
            Ok(())
        })?;
    }
    Ok(())
}

/// A year later every certificate has ended. One host gets the time from somewhere, the others wake up in 1970, in any order.
fn after_a_year_one_authority_knows_the_time() -> Result<()> {
    let mut mesh = short_lived(false)?;
    for (turn, order) in [["a", "b", "c"], ["c", "b", "a"]].into_iter().enumerate() {
        for name in ["a", "b", "c"] {
            mesh.at_mut(name).kill();
        }
        let woken = Instant::now();
        for name in order {
            start(&mut mesh, name, if name == "a" { "+1y" } else { IN_1970 })?;
            mesh.at(name).until(State::Member)?;
        }
        mesh.settled()?;
        all_secured(&mesh, 8100 + 100 * u16::try_from(turn)?)?;
        println!("a year later, as {}: every pair secured and checked after {} ms", order.join(" "), woken.elapsed().as_millis());
        for name in ["b", "c"] {
            equal!(mesh.at(name).status()?.clock.source, "signed", "the clock");
            let off = mesh.at(name).status()?.clock.now.abs_diff(mesh.at("a").status()?.clock.now);
            ensure!(off < 300, "the clocks of {name} and a are {off} s apart");
        }
    }
    Ok(())
}
