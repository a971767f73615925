//! Disks that die: backups, hosts that come back from them, and a look at what is on a disk.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use meshd::api::State;
use meshd_ca::recovery::RecoveryKey;
use meshd_ca::store::decode;

use crate::support::equal;
use crate::support::mesh::{Member, Setup};
use crate::support::scenario::{Scenario, scenario};

pub(crate) const SCENARIOS: &[Scenario] =
    &[scenario!("recovery", a_host_comes_back_from_its_backup), scenario!("recovery", what_is_on_the_disk)];

/// The states that `meshd state verify` shows, by file, and whether it is content.
fn verify(member: &Member) -> Result<(bool, Vec<(String, String)>)> {
    let (good, out, _) = member.try_cli(&["state", "verify", "-o", "json"])?;
    let shown: Vec<serde_json::Value> = serde_json::from_str(&out).with_context(|| out.clone())?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Ok((good, shown.iter().map(|file| (text(&file["file"]), text(&file["state"]))).collect()))
}

fn a_host_comes_back_from_its_backup() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).start()?;
    mesh.settled()?;
    let dir = mesh.at("a").dir().to_owned();
    let path = |name: &str| dir.join(name).display().to_string();
    let (key, wrong, file) = (path("key.txt"), path("wrong.txt"), path("a.meshd"));
    let text = RecoveryKey::generate()?.to_text();
    fs::write(&key, &*text)?;
    fs::write(&wrong, &*RecoveryKey::generate()?.to_text())?;

    // A recovery key is shown to a person or to nobody.
    let (made, out, error) = mesh.at("a").try_cli(&["backup", &file])?;
    ensure!(!made && out.is_empty() && error.contains("no recovery key"), "{out}{error}");
    mesh.at("a").cli(&["backup", "--recovery-key-file", &key, &file])?;
    // From now on nobody is needed, and a file that is something else is left alone.
    mesh.at("a").cli(&["backup", &file])?;
    ensure!(
        !mesh.at("a").try_cli(&["backup", &key])?.0 && fs::read_to_string(&key)? == *text,
        "a file of somebody was overwritten"
    );
    equal!(fs::metadata(&file)?.permissions().mode() & 0o777, 0o600, "the mode of the backup");
    let (good, files) = verify(mesh.at("a"))?;
    ensure!(good && files.iter().all(|(_, state)| state == "good") && files.len() >= 6, "{files:?}");

    // The card dies. Nothing but the backup is left.
    let before = mesh.at("a").status()?;
    let token = mesh.at("a").token()?;
    mesh.at_mut("a").kill();
    fs::remove_dir_all(dir.join("state"))?;
    let (restored, _, error) = mesh.at("a").try_cli(&["restore", "--recovery-key-file", &wrong, "--yes", &file])?;
    ensure!(!restored && error.contains("does not open") && !dir.join("state").exists(), "{error}");
    ensure!(!mesh.at("a").try_cli(&["restore", "--recovery-key-file", &key, &file])?.0, "nobody was asked");
    let (taken, _, error) = mesh.at("b").try_cli(&["restore", "--recovery-key-file", &key, "--yes", &file])?;
    ensure!(!taken && error.contains("in use"), "b is running: {error}");
    mesh.at("a").cli(&["restore", "--recovery-key-file", &key, "--yes", &file])?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let after = mesh.at("a").status()?;
    equal!((&after.node, &after.host_name, after.authority), (&before.node, &before.host_name, true), "who it is");
    mesh.settled()?;
    mesh.secured_between("a", "b", 8000)?;
    mesh.secured_between("b", "a", 8001)?;
    // A token of before the loss is gone with the disk, new ones are made, and the next backup asks for nothing.
    let tokens = mesh.at("a").cli(&["token", "list"])?;
    ensure!(tokens.contains("no tokens"), "{tokens}");
    mesh.at("a").token()?;
    mesh.at("a").cli(&["backup", &file])?;
    let log = mesh.at("a").log();
    ensure!(!log.contains(text.as_str()) && !log.contains(token.trim()), "a secret is in the log");
    Ok(())
}

fn what_is_on_the_disk() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).start()?;
    let state = mesh.at("a").dir().join("state");
    mesh.at("a").token()?;
    ensure!(verify(mesh.at("a"))?.0, "a disk that works");
    mesh.at_mut("a").stop()?;
    let of = |files: &[(String, String)], name: &str| files.iter().find(|(file, _)| file == name).map(|(_, state)| state.clone());
    // The second generation of the tokens is cut in half; the node key has no other; and somebody left a file.
    let both = [state.join("tokens"), state.join("tokens.other")];
    let number = |path: &PathBuf| decode(&fs::read(path).unwrap_or_default()).map(|(number, _)| number);
    let newest = both.iter().max_by_key(|path| number(path)).context("no tokens")?;
    let bytes = fs::read(newest)?;
    fs::write(newest, &bytes[..bytes.len() / 2])?;
    let whole = fs::read(state.join("node.key"))?;
    fs::write(state.join("node.key"), b"")?;
    fs::write(state.join("Notes"), b"mine")?;
    let listing = |dir| -> Result<Vec<_>> { Ok(fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?) };
    let there = listing(&state)?;
    let (good, files) = verify(mesh.at("a"))?;
    for (name, wanted) in [("tokens", "older"), ("node.key", "torn"), ("roster", "good"), ("Notes", "unknown")] {
        equal!(of(&files, name).as_deref(), Some(wanted), "{name}");
    }
    ensure!(!good && there == listing(&state)?, "it changed something, or was content");
    ensure!(!mesh.at("a").try_cli(&["backup", "x"])?.0, "a damaged state was kept");
    fs::write(state.join("node.key"), whole)?;
    fs::write(newest, bytes)?;
    ensure!(verify(mesh.at("a"))?.0, "what is unknown is no fault");
    Ok(())
}
