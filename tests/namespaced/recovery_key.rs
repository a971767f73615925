//! The recovery key of a mesh: taken from the founder, used against it when it is stolen, and when nobody is left who could let a host in.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{Authority, AuthorityState, Standing, State, code};
use meshd_ca::recovery::RecoveryKey;

use crate::checks::{check, detail_of};
use crate::support::mesh::{Mesh, SETTLED, Setup};
use crate::support::scenario::{Scenario, scenario};
use crate::support::traffic::{Server, connect, echo, sockets};
use crate::support::{equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("recovery", a_stolen_founder_is_put_out),
    scenario!("recovery", who_is_out_with_a_founder_that_is_taken_back_is_named),
    scenario!("recovery", all_authorities_are_gone),
];

/// The SVIDs of these scenarios, as in their configuration.
const LIFETIME: Duration = Duration::from_secs(20);
/// How long a new root may wait for members that are not there any more, and the news to be old.
const BELIEVED: Duration = Duration::from_secs(120);
const PORT: u16 = 8000;

/// Starts these hosts one after the other, as members of the mesh of the first.
fn bring_up(mesh: &mut Mesh, names: &[&'static str]) -> Result<()> {
    for name in names {
        mesh.at_mut(name).start()?;
        mesh.at(name).until_answers()?;
        if *name != names[0] {
            join(mesh, name, names[0])?;
        }
        mesh.at(name).until(State::Member)?;
    }
    Ok(())
}

fn join(mesh: &Mesh, name: &str, through: &str) -> Result<()> {
    let token = mesh.at(through).token()?;
    mesh.at(name).cli(&["join", &token])?;
    mesh.at(name).until(State::Member)
}

/// Waits until, as `at` sees it, these sign; others may be there that do not.
fn until_signing(mesh: &Mesh, at: &str, names: &[&str]) -> Result<()> {
    eventually(BELIEVED, &format!("{names:?} sign, as {at} sees it"), || {
        let all: Vec<Authority> = mesh.at(at).json(&["authority", "list"])?;
        let mut signing: Vec<&str> = all.iter().filter(|a| a.state == AuthorityState::Signing).map(|a| a.name.as_str()).collect();
        signing.sort_unstable();
        ensure!(signing == names, "{all:?}");
        Ok(())
    })
}

/// Waits until these hosts hold nothing but what `by` issued.
fn until_renewed(mesh: &Mesh, names: &[&str], by: &str) -> Result<()> {
    for name in names {
        eventually(2 * LIFETIME, &format!("{name} has renewed"), || {
            let held = mesh.at(name).identities()?;
            let good = |i: &meshd::api::Identity| i.expires_seconds > 0 && i.issued_by.as_ref().is_some_and(|n| n.as_str() == by);
            ensure!(!held.is_empty() && held.iter().all(good), "{name} holds {held:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Every file below a directory.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { all.extend(files(&path)?) } else { all.push(path) }
    }
    Ok(all)
}

/// Whether the text is in a file below the state directory.
fn on_disk(mesh: &Mesh, name: &str, text: &str) -> Result<bool> {
    let files = files(&mesh.at(name).dir().join("state"))?;
    let found = |file: &PathBuf| fs::read(file).is_ok_and(|bytes| bytes.windows(text.len()).any(|w| w == text.as_bytes()));
    Ok(files.iter().any(found))
}

/// Takes the key from the founder into a file. Returns the path, and what it says.
fn take(mesh: &Mesh, founder: &str) -> Result<(String, String)> {
    let key = mesh.at(founder).dir().join("paper.txt");
    let path = key.display().to_string();
    mesh.at(founder).cli(&["recovery-key", "--file", &path])?;
    equal!(fs::metadata(&key)?.permissions().mode() & 0o777, 0o600, "the mode of the recovery key");
    Ok((path, fs::read_to_string(&key)?.trim().to_owned()))
}

fn a_stolen_founder_is_put_out() -> Result<()> {
    let setup = Setup::of(&["a", "b", "c", "d"]).configured("svid_lifetime = \"20s\"").configured_on("c", "authority = false");
    let mut mesh = setup.hosts()?;
    bring_up(&mut mesh, &["a", "b", "c"])?;
    mesh.settled()?;

    // The paper is on the founder until somebody takes it, by a person or into a file, and once.
    let (ok, out, err) = mesh.at("b").try_cli(&["recovery-key", "--file", "x"])?;
    ensure!(!ok && err.contains("not on this host: a founded"), "{out}{err}");
    let (ok, out, err) = mesh.at("a").try_cli(&["recovery-key", "--yes"])?;
    ensure!(!ok && err.contains("no terminal"), "it was shown to nobody: {out}{err}");
    ensure!(detail_of(&check(mesh.at("a"), &[])?, code::RECOVERY_KEY).starts_with("not yet"), "nothing is said of the key");
    let (paper, text) = take(&mesh, "a")?;
    ensure!(text.parse::<RecoveryKey>().is_ok() && !on_disk(&mesh, "a", &text)?, "it is still on the disk");
    let (ok, _, err) = mesh.at("a").try_cli(&["recovery-key", "--file", "y"])?;
    ensure!(!ok && err.contains("until somebody took it"), "{err}");
    ensure!(detail_of(&check(mesh.at("a"), &[])?, code::RECOVERY_KEY).starts_with("it was taken"), "check still says so");
    // Backups of the founder need nobody from now on, and the same paper opens them.
    let backup = mesh.at("a").dir().join("a.meshd").display().to_string();
    mesh.at("a").cli(&["backup", &backup])?;
    let opened = meshd_ca::backup::Backup::open(&fs::read(&backup)?, &text.parse()?)?;
    ensure!(!opened.files.contains_key("recovery"), "{:?}", opened.files.keys());

    mesh.at("a").cli(&["authority", "add", "b"])?;
    until_signing(&mesh, "c", &["a", "b"])?;
    let _servers = ["a", "b", "c", "d"].map(|name| Server::echo(mesh.host(name), PORT));
    let mut open = Vec::new();
    for (from, to) in [("a", "c"), ("c", "a"), ("b", "a")] {
        let mut stream = connect(mesh.host(from), sockets(mesh.host(to), PORT)[0])?;
        echo(&mut stream, "before")?;
        open.push((from, to, stream));
    }
    // The founder had let both in; who is put out is the founder alone.
    let mut stays = connect(mesh.host("c"), sockets(mesh.host("b"), PORT)[0])?;
    echo(&mut stays, "before")?;

    // Its card is stolen. The other authority is not enough, and neither is another paper.
    let wrong = mesh.at("b").dir().join("wrong.txt").display().to_string();
    fs::write(&wrong, &*RecoveryKey::generate()?.to_text())?;
    let (ok, _, err) = mesh.at("b").try_cli(&["banish", "--yes", "a"])?;
    ensure!(!ok && err.contains("takes the recovery key") && err.contains("--recovery-key-file"), "{err}");
    // Nor is it, or a plain member, against another authority: the founder is one remedy, and the key the other.
    let (ok, _, err) = mesh.at("c").try_cli(&["banish", "--yes", "b"])?;
    ensure!(!ok && err.contains("run the command on a") && err.contains("--recovery-key-file"), "{err}");
    let (ok, _, err) = mesh.at("c").try_cli(&["banish", "--yes", "--recovery-key-file", &wrong, "a"])?;
    ensure!(!ok && err.contains("not the recovery key of this mesh"), "{err}");
    equal!(mesh.at("a").status()?.state, State::Member, "what a is");
    // From a plain member.
    mesh.at("c").cli(&["banish", "--yes", "--recovery-key-file", &paper, "a"])?;
    for (from, to, stream) in &mut open {
        let ended = stream.read(&mut [0]);
        ensure!(ended.is_err(), "the connection from {from} to {to} ended with {ended:?}");
    }
    mesh.at("a").until(State::Banished)?;
    for name in ["b", "c"] {
        eventually(SETTLED, &format!("{name} knows"), || {
            let nodes = mesh.at(name).nodes()?;
            let a = nodes.iter().find(|n| n.name.as_str() == "a").context("no a")?;
            equal!((a.standing, a.captured.len()), (Standing::Banished, 0), "a as {name} sees it");
            Ok(())
        })?;
    }
    until_signing(&mesh, "c", &["b"])?;
    echo(&mut stays, "after").context("a connection between two others was cut")?;

    // The mesh goes on without its founder: it lets hosts in, and everybody renews.
    mesh.at_mut("d").start()?;
    mesh.at("d").until_answers()?;
    join(&mesh, "d", "b")?;
    until_renewed(&mesh, &["b", "c", "d"], "b")?;
    for (from, to) in [("d", "c"), ("c", "b"), ("b", "d")] {
        mesh.at(from).until_captures(mesh.host(to))?;
        echo(&mut connect(mesh.host(from), sockets(mesh.host(to), PORT)[0])?, "hello").context(format!("{from} to {to}"))?;
    }

    // The card is found in a coat.
    let (ok, _, err) = mesh.at("b").try_cli(&["unbanish", "a"])?;
    ensure!(!ok && err.contains("no recovery key"), "{err}");
    let token = mesh.at("b").token()?;
    ensure!(!mesh.at("a").try_cli(&["join", &token])?.0, "a banished host joined");
    mesh.at("d").cli(&["unbanish", "--recovery-key-file", &paper, "a"])?;
    eventually(SETTLED, "b knows that it is back", || {
        let nodes = mesh.at("b").nodes()?;
        let a = nodes.iter().find(|n| n.name.as_str() == "a").context("no a")?;
        equal!(a.standing, Standing::Active, "a as b sees it");
        Ok(())
    })?;
    join(&mesh, "a", "b")?;
    ensure!(!mesh.at("a").status()?.authority, "it has its office back");
    mesh.at("a").until_captures(mesh.host("c"))?;
    mesh.at("c").until_captures(mesh.host("a"))?;
    mesh.at("a").until_captures(mesh.host("d"))?;
    // At once: what it has kept is of the root that nobody believes any more, and it waits for another certificate rather than show that.
    for (from, to) in [("c", "a"), ("a", "d")] {
        echo(&mut connect(mesh.host(from), sockets(mesh.host(to), PORT)[0])?, "again")
            .context(format!("{from} to {to}, again"))?;
    }
    for name in ["a", "b", "c", "d"] {
        ensure!(!mesh.at(name).log().contains(&text) && !on_disk(&mesh, name, &text)?, "the key is on {name}");
    }
    Ok(())
}

/// A stolen founder, in a part of the mesh of its own, has put a host out before it is put out itself. Taken back its ban counts again: whoever types the key hears so first.
fn who_is_out_with_a_founder_that_is_taken_back_is_named() -> Result<()> {
    let setup = Setup::of(&["a", "b", "c", "d"]).configured("authority = false");
    let mut mesh = setup.hosts()?;
    bring_up(&mut mesh, &["a", "b", "c", "d"])?;
    let (paper, _) = take(&mesh, "a")?;
    let stands = |at: &str, name: &str, standing: Standing| {
        eventually(SETTLED, &format!("{name} is {standing:?} at {at}"), || {
            let nodes = mesh.at(at).nodes()?;
            let node = nodes.iter().find(|n| n.name.as_str() == name).context("it is not there")?;
            equal!(node.standing, standing, "what it is");
            Ok(())
        })
    };
    mesh.part(&["a", "d"], &["b", "c"])?;
    mesh.at("a").cli(&["banish", "--yes", "b"])?;
    stands("d", "b", Standing::Banished)?;
    mesh.at("c").cli(&["banish", "--yes", "--recovery-key-file", &paper, "a"])?;
    mesh.heal(&["a", "b", "c", "d"])?;
    for (name, standing) in [("a", Standing::Banished), ("b", Standing::Active)] {
        stands("d", name, standing)?;
    }

    let (ok, _, err) = mesh.at("d").try_cli(&["unbanish", "--recovery-key-file", &paper, "a"])?;
    ensure!(!ok && err.contains("no terminal") && err.contains("--yes"), "{err}");
    for (name, standing) in [("a", Standing::Banished), ("b", Standing::Active)] {
        stands("d", name, standing)?;
    }
    let said = mesh.at("d").cli(&["unbanish", "--yes", "--recovery-key-file", &paper, "a"])?;
    ensure!(said.contains("out of the mesh with that: b"), "{said}");
    for at in ["c", "d"] {
        stands(at, "a", Standing::Active)?;
        stands(at, "b", Standing::Banished)?;
    }
    mesh.at("b").until(State::Banished)?;
    let said = mesh.at("c").cli(&["unbanish", "--recovery-key-file", &paper, "b"])?;
    ensure!(!said.contains("out of the mesh"), "{said}");
    stands("d", "b", Standing::Active)
}

fn all_authorities_are_gone() -> Result<()> {
    let setup = Setup::of(&["a", "b", "c", "d"]).configured("svid_lifetime = \"20s\"");
    let setup = ["b", "c", "d"].into_iter().fold(setup, |setup, name| setup.configured_on(name, "authority = false"));
    let mut mesh = setup.hosts()?;
    bring_up(&mut mesh, &["a", "b", "c"])?;
    mesh.settled()?;
    let (paper, text) = take(&mesh, "a")?;
    let _servers = ["b", "c", "d"].map(|name| Server::echo(mesh.host(name), PORT));
    mesh.at_mut("a").kill();
    mesh.host("a").link_down()?;
    eventually(SETTLED, "c does not hear a", || {
        let all: Vec<Authority> = mesh.at("c").json(&["authority", "list"])?;
        ensure!(all.iter().all(|a| !a.reachable), "{all:?}");
        Ok(())
    })?;
    let (ok, _, err) = mesh.at("c").try_cli(&["token", "create"])?;
    ensure!(!ok && err.contains("not an authority"), "{err}");
    let (ok, _, err) = mesh.at("c").try_cli(&["recover", "--yes"])?;
    ensure!(!ok && err.contains("no recovery key"), "{err}");
    let recovered: serde_json::Value = mesh.at("c").json(&["recover", "--yes", "--recovery-key-file", &paper])?;
    equal!(recovered, serde_json::json!({ "removed": ["a"] }), "what recover says");
    // A host joins before anything is signed, and everybody has certificates of the new authority as soon as its root is believed.
    eventually(SETTLED, "c is an authority", || {
        ensure!(mesh.at("c").status()?.authority, "{:?}", mesh.at("c").status()?);
        Ok(())
    })?;
    mesh.at_mut("d").start()?;
    mesh.at("d").until_answers()?;
    join(&mesh, "d", "c")?;
    until_signing(&mesh, "b", &["c"])?;
    until_renewed(&mesh, &["b", "c", "d"], "c")?;
    for (from, to) in [("b", "c"), ("c", "b"), ("d", "b"), ("b", "d")] {
        mesh.at(from).until_captures(mesh.host(to))?;
        echo(&mut connect(mesh.host(from), sockets(mesh.host(to), PORT)[0])?, "hello")?;
    }
    let again = mesh.at("c").cli(&["recover", "--yes", "--recovery-key-file", &paper])?;
    ensure!(again.starts_with("nothing is to be done: this host is an authority"), "{again}");
    until_signing(&mesh, "b", &["c"])?;
    // Over a restart, too.
    mesh.at_mut("c").stop()?;
    mesh.at_mut("c").start()?;
    mesh.at("c").until(State::Member)?;
    ensure!(mesh.at("c").status()?.authority && !mesh.at("c").token()?.is_empty(), "the office is lost");
    for name in ["b", "c", "d"] {
        ensure!(!mesh.at(name).log().contains(&text) && !on_disk(&mesh, name, &text)?, "the key is on {name}");
    }
    Ok(())
}
