//! Clocks that were ahead and that everybody followed, and the recovery key, which sets the mesh back.
//!
//! The floor is for ever: without the key a mesh that two authorities led into the next year stays there until that has come, whatever its hosts' clocks
//! show by then.

use anyhow::{Context, Result, ensure};
use meshd::api::{State, code};
use meshd_ca::recovery::RecoveryKey;
use meshd_ca::store::decode;

use super::{admit, clocks};
use crate::authorities::until_signing;
use crate::checks::{among, check};
use crate::support::eventually;
use crate::support::mesh::{Mesh, SETTLED, Setup};
use crate::support::scenario::{Need, Scenario, scenario};

pub(crate) const SCENARIOS: &[Scenario] =
    &[scenario!("edge", two_authorities_were_ahead_and_the_recovery_key_sets_the_mesh_back, Need::FakeTime)];

const DAY: u64 = 86_400;

/// The time that it is, beside what the hosts take for it.
#[allow(clippy::disallowed_methods)]
fn now() -> Result<u64> {
    Ok(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs())
}

/// Waits until these go by a time that is so many days from now, whatever their own clocks show.
fn until_at(mesh: &Mesh, names: &[&str], days: u64) -> Result<()> {
    let now = now()?;
    for name in names {
        eventually(2 * SETTLED, &format!("{name} is {days} days ahead"), || {
            let clock = mesh.at(name).status()?.clock;
            ensure!(clock.now.abs_diff(now + days * DAY) < 600, "{clock:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Waits until a host has on its disk that it does not go back.
fn until_floor(mesh: &Mesh, name: &str) -> Result<()> {
    eventually(SETTLED, &format!("the floor of {name}"), || {
        let floors = ["clock", "clock.other"].into_iter().filter_map(|file| {
            let bytes = std::fs::read(mesh.at(name).dir().join("state").join(file)).ok()?;
            std::str::from_utf8(decode(&bytes)?.1).ok()?.parse::<u64>().ok()
        });
        ensure!(floors.max().context("no floor")? > now()? + 89 * DAY, "{name} may go back");
        Ok(())
    })
}

/// Each secures its connections to the next one.
fn around(mesh: &Mesh, port: u16) -> Result<()> {
    for ((from, to), port) in [("a", "b"), ("b", "c"), ("c", "a")].into_iter().zip(port..) {
        eventually(2 * SETTLED, &format!("{from} to {to} is secured"), || mesh.secured_between(from, to, port))?;
    }
    Ok(())
}

fn two_authorities_were_ahead_and_the_recovery_key_sets_the_mesh_back() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).configured("drain = \"1s\"").configured_on("c", "authority = false").hosts()?;
    for name in ["a", "b", "c"] {
        clocks::start(&mut mesh, name, clocks::RIGHT)?;
        if name != "a" {
            admit(&mesh, name, &[])?;
        }
        mesh.at(name).until(State::Member)?;
    }
    mesh.settled()?;
    let paper = mesh.at("a").dir().join("paper").display().to_string();
    mesh.at("a").cli(&["recovery-key", "--file", &paper])?;
    mesh.at("a").cli(&["authority", "add", "b"])?;
    until_signing(&mesh, "a", &["a", "b"])?;
    let back = |words: &[&str]| mesh_back(&mesh, "c", words);
    let refused = back(&["--recovery-key-file", &paper])?.unwrap_err();
    ensure!(refused.contains("it is not ahead here"), "{refused}");

    // Both authorities are a quarter ahead. Everybody follows the first one, and when the second says the same there is no way back: that is
    // what is written down.
    for name in ["a", "b"] {
        mesh.at_mut(name).kill();
    }
    clocks::start(&mut mesh, "a", "+90d")?;
    until_at(&mesh, &["a", "c"], 90)?;
    clocks::start(&mut mesh, "b", "+90d")?;
    around(&mesh, 8000)?;
    until_at(&mesh, &["a", "b", "c"], 90)?;
    for name in ["a", "b", "c"] {
        until_floor(&mesh, name)?;
    }
    mesh.at("a").token()?;
    for name in ["a", "b"] {
        clocks::set(&mesh, name, clocks::RIGHT)?;
    }
    for name in ["a", "b", "c"] {
        eventually(SETTLED, "its own clock does not count", || {
            ensure!(mesh.at(name).status()?.clock.source != "system", "the clock of {name}");
            Ok(())
        })?;
    }
    until_at(&mesh, &["a", "b", "c"], 90)?;
    among(mesh.at("c"), &[code::CLOCK])?;

    // One of them is off when a person sets the mesh back, on a plain member. Another key cannot, and none neither.
    mesh.at_mut("b").kill();
    let back = |words: &[&str]| mesh_back(&mesh, "c", words);
    let wrong = mesh.at("c").dir().join("wrong").display().to_string();
    std::fs::write(&wrong, &*RecoveryKey::generate()?.to_text())?;
    for (words, why) in [(&["--recovery-key-file", &wrong][..], "not the recovery key of this mesh"), (&[], "no recovery key")] {
        let refused = back(words)?.unwrap_err();
        ensure!(refused.contains(why), "{refused}");
    }
    until_at(&mesh, &["a", "c"], 90)?;
    let said = back(&["--recovery-key-file", &paper])?.map_err(anyhow::Error::msg)?;
    ensure!(said.contains("\"from\"") && said.contains("\"to\""), "{said}");
    until_at(&mesh, &["a", "c"], 0)?;
    let tokens: Vec<serde_json::Value> = mesh.at("a").json(&["token", "list"])?;
    ensure!(tokens.is_empty(), "a token of before is good for a quarter of a year: {tokens:?}");
    let refused = back(&["--recovery-key-file", &paper])?.unwrap_err();
    ensure!(refused.contains("it is not ahead here"), "{refused}");
    // The other authority is back, with a floor that is ahead; it hears of it and leads nobody away.
    clocks::start(&mut mesh, "b", clocks::RIGHT)?;
    mesh.at("b").until(State::Member)?;
    until_at(&mesh, &["b"], 0)?;
    mesh.settled()?;
    around(&mesh, 8100)?;
    // All of that is on the disk.
    for name in ["a", "b", "c"] {
        mesh.at_mut(name).kill();
    }
    for name in ["b", "c", "a"] {
        clocks::start(&mut mesh, name, clocks::RIGHT)?;
        mesh.at(name).until(State::Member)?;
    }
    until_at(&mesh, &["a", "b", "c"], 0)?;
    mesh.settled()?;
    around(&mesh, 8200)?;
    for name in ["a", "b", "c"] {
        let found = check(mesh.at(name), &[])?;
        ensure!(found.iter().all(|f| f.code != code::CLOCK || f.level == meshd::api::Level::Ok), "{name}: {found:#?}");
    }
    Ok(())
}

/// What `recover --clock` on a host says when it works, or else.
fn mesh_back(mesh: &Mesh, name: &str, words: &[&str]) -> Result<Result<String, String>> {
    let (ok, out, err) = mesh.at(name).try_cli(&[&["recover", "--clock", "--yes", "-o", "json"], words].concat())?;
    Ok(if ok { Ok(out) } else { Err(err) })
}
