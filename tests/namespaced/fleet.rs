//! Fleets: hosts that hold the same file become one mesh by themselves, for as long as it takes them, and nobody else does.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{Enrolment, Standing, State};

use crate::support::mesh::{Member, Mesh, SETTLED, Setup};
use crate::support::scenario::{Scenario, scenario};
use crate::support::{equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("fleet", founders_of_the_same_second_become_one_mesh),
    scenario!("fleet", cards_that_are_switched_on_together_found_one_mesh),
    scenario!("fleet", members_follow_a_founder_that_gives_way),
    scenario!("fleet", closed_meshes_and_other_fleets_let_nobody_in),
    scenario!("fleet", a_card_that_finds_nobody_any_more_founds_the_mesh),
];

/// Where the token of a host is.
fn card(member: &Member) -> PathBuf {
    member.dir().join("state/fleet.token")
}

/// A new fleet token, on these hosts of the mesh. Returns its word.
pub(crate) fn give(mesh: &Mesh, hosts: &[&str]) -> Result<String> {
    let first = mesh.at(hosts[0]);
    let file = first.dir().join("meshd-fleet.token");
    let _ = std::fs::remove_file(&file);
    first.cli(&["fleet", "create", &file.display().to_string()])?;
    for name in hosts {
        put(mesh.at(name), &std::fs::read(&file)?)?;
    }
    let text = std::fs::read_to_string(&file)?;
    std::fs::remove_file(&file)?;
    Ok(text.lines().find(|l| !l.starts_with('#')).context("no word in the file")?.to_owned())
}

/// A fleet token, or something in its place, where a host looks for it.
pub(crate) fn put(member: &Member, text: &[u8]) -> Result<()> {
    let (path, mode) = (card(member), Permissions::from_mode);
    let above = path.parent().context("a directory")?;
    std::fs::create_dir_all(above)?;
    std::fs::set_permissions(above, mode(0o700))?;
    std::fs::write(&path, text)?;
    Ok(std::fs::set_permissions(&path, mode(0o600))?)
}

/// Waits until these hosts, and no others, are one mesh.
fn one_mesh(mesh: &Mesh, hosts: &[&str]) -> Result<()> {
    eventually(3 * SETTLED, "one mesh", || {
        let mut all = hosts.iter().map(|name| mesh.at(name).status());
        let first = all.next().context("no host")??;
        for status in std::iter::once(Ok(first.clone())).chain(all) {
            let status = status?;
            ensure!(status.state == State::Member && status.mesh == first.mesh, "{status:?}");
            ensure!(
                status.members.active as usize == hosts.len() && status.members.reachable == status.members.active,
                "{status:?}"
            );
        }
        // One founder, so one roster: the same id is not enough.
        let nodes: Vec<_> = hosts
            .iter()
            .map(|name| -> Result<Vec<_>> {
                let mut ids: Vec<_> = mesh.at(name).nodes()?.into_iter().map(|n| (n.id, n.name, n.standing)).collect();
                ids.sort_by_key(|(id, ..)| *id);
                Ok(ids)
            })
            .collect::<Result<_>>()?;
        ensure!(nodes.iter().all(|n| *n == nodes[0]), "{nodes:?}");
        Ok(())
    })
}

/// The token is nowhere any more, and in nothing that was said.
fn spent(mesh: &Mesh, hosts: &[&str], word: &str) -> Result<()> {
    let plain: String = word.trim_start_matches("fleet1-").replace('-', "");
    for name in hosts {
        let member = mesh.at(name);
        ensure!(!card(member).exists(), "the token is still on {name}");
        let files = std::fs::read_dir(member.dir())?.chain(std::fs::read_dir(member.dir().join("state"))?).flatten();
        for file in files.filter(|f| f.path().is_file()) {
            // What is being written has another name by the time it is read.
            let (Ok(bytes), Ok(metadata)) = (std::fs::read(file.path()), file.metadata()) else { continue };
            let text = String::from_utf8_lossy(&bytes).to_lowercase().replace('-', "");
            ensure!(!text.contains(&plain[..24]), "the secret is in {}", file.path().display());
            let mode = metadata.permissions().mode() & 0o777;
            let state = file.path().parent().is_some_and(|p| p.ends_with("state"));
            ensure!(!state || mode & 0o077 == 0, "{} has mode {mode:o}", file.path().display());
        }
        for word in std::fs::read(format!("/proc/{}/cmdline", member.pid()?))?.split(|b| *b == 0) {
            ensure!(
                !String::from_utf8_lossy(word).replace('-', "").contains(&plain[..24]),
                "the secret is an argument on {name}"
            );
        }
    }
    Ok(())
}

fn start(mesh: &mut Mesh, hosts: &[&str]) -> Result<()> {
    hosts.iter().try_for_each(|name| mesh.at_mut(name).start())
}

/// None of them looks before it founds: so all do, and meet afterwards.
fn founders_of_the_same_second_become_one_mesh() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c", "d"]).configured("found_after = \"0s\"\ndrain = \"0s\"").hosts()?;
    let word = give(&mesh, &["a", "b", "c", "d"])?;
    start(&mut mesh, &["a", "b", "c"])?;
    for name in ["a", "b", "c"] {
        eventually(SETTLED, "it founds", || {
            ensure!(mesh.at(name).log().contains("no mesh seen: founded one"), "{}", mesh.at(name).log());
            Ok(())
        })?;
    }
    one_mesh(&mesh, &["a", "b", "c"])?;
    mesh.settled()?;
    mesh.secured_between("a", "b", 8000)?;
    mesh.secured_between("b", "c", 8001)?;
    mesh.secured_between("c", "a", 8002)?;
    // Whoever comes later with the file joins, and the file is gone.
    start(&mut mesh, &["d"])?;
    one_mesh(&mesh, &["a", "b", "c", "d"])?;
    mesh.settled()?;
    mesh.secured_between("d", "a", 8003)?;
    spent(&mesh, &["a", "b", "c", "d"], &word)?;
    // And it stays so.
    for name in ["a", "b", "c", "d"] {
        mesh.at_mut(name).stop()?;
    }
    start(&mut mesh, &["d", "c", "b", "a"])?;
    one_mesh(&mesh, &["a", "b", "c", "d"])
}

/// As they are where nobody configures anything: also their names are the same.
fn cards_that_are_switched_on_together_found_one_mesh() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).hosts()?;
    let word = give(&mesh, &["a", "b", "c"])?;
    for name in ["a", "b", "c"] {
        mesh.at_mut(name).start_through("env", &["MESHD_HOST_NAME=raspberrypi"])?;
    }
    one_mesh(&mesh, &["a", "b", "c"])?;
    let mut names: Vec<String> = mesh.at("a").nodes()?.into_iter().map(|n| n.name.to_string()).collect();
    names.sort();
    ensure!(names[0] == "raspberrypi" && names[1..].iter().all(|n| n.starts_with("raspberrypi-")), "{names:?}");
    spent(&mesh, &["a", "b", "c"], &word)
}

/// Two founders, each with members, that could not see each other.
fn members_follow_a_founder_that_gives_way() -> Result<()> {
    let hosts = ["a", "b", "c", "d"];
    let lines = "found_after = \"0s\"\ndrain = \"0s\"\nauthority = false";
    let mut mesh = Setup::of(&hosts).configured(lines).hosts()?;
    give(&mesh, &hosts)?;
    let apart = |mesh: &Mesh, from: &str, others: [&str; 2]| -> Result<()> {
        let drops: String = others
            .iter()
            .map(|other| {
                let other = mesh.at(other);
                format!("ip saddr {} drop; ip6 saddr {} drop; ", other.ipv4, other.ipv6)
            })
            .collect();
        let local = "ip6 saddr fe80::/10 tcp dport 6374 drop; udp dport 5353 ip6 saddr fe80::/10 drop; ";
        mesh.at(from).nft(&format!(
            "table inet apart {{ chain input {{ type filter hook input priority -300; policy accept; {drops}{local} }}; }}"
        ))
    };
    for (name, others) in [("a", ["c", "d"]), ("b", ["c", "d"]), ("c", ["a", "b"]), ("d", ["a", "b"])] {
        apart(&mesh, name, others)?;
    }
    start(&mut mesh, &hosts)?;
    one_mesh(&mesh, &["a", "b"])?;
    one_mesh(&mesh, &["c", "d"])?;
    equal!(mesh.at("a").status()?.mesh, mesh.at("c").status()?.mesh, "the ids of the two meshes");
    for name in hosts {
        mesh.at(name).nft("delete table inet apart")?;
    }
    one_mesh(&mesh, &hosts)?;
    mesh.settled()?;
    mesh.secured_between("a", "c", 8000)?;
    mesh.secured_between("d", "b", 8001)
}

fn closed_meshes_and_other_fleets_let_nobody_in() -> Result<()> {
    let hosts = ["a", "b", "c", "x", "d"];
    let mut setup = Setup::of(&hosts).configured("drain = \"0s\"\nauthority = false").configured_on("a", "found_after = \"0s\"");
    for name in &hosts[1..] {
        setup = setup.configured_on(name, "found_after = \"1s\"");
    }
    let mut mesh = setup.hosts()?;
    let word = give(&mesh, &["a", "b", "c", "d"])?;
    start(&mut mesh, &["a"])?;
    mesh.at("a").until(State::Member)?;
    start(&mut mesh, &["b", "c"])?;
    one_mesh(&mesh, &["a", "b", "c"])?;
    let (founder, other) = ("a", "b");
    let window: Enrolment = mesh.at(founder).json(&["enroll", "status"])?;
    ensure!(window.open && (86_000..86_400).contains(&window.left_seconds), "{window:?}");
    let (ok, out, err) = mesh.at(other).try_cli(&["enroll", "close"])?;
    ensure!(!ok && err.contains("is not an authority") && err.contains(&mesh.at(founder).name), "{out}{err}");
    // A host of another fleet has a mesh of its own.
    give(&mesh, &["x"])?;
    start(&mut mesh, &["x"])?;
    mesh.at("x").until(State::Member)?;
    ensure!(mesh.at("x").status()?.mesh != mesh.at(founder).status()?.mesh, "x is of another fleet");

    ensure!(mesh.at(founder).cli(&["enroll", "close"])?.starts_with("closed"), "what it says");
    start(&mut mesh, &["d"])?;
    mesh.at("d").until(State::Pending)?;
    // It has asked, is known to wait, and goes on waiting.
    eventually(SETTLED, "it waits to be approved", || {
        let waiting: Vec<meshd::api::Pending> = mesh.at(founder).json(&["pending"])?;
        ensure!(waiting.iter().any(|w| w.name.as_str() == "d"), "{waiting:?}");
        Ok(())
    })?;
    std::thread::sleep(Duration::from_secs(6));
    equal!(mesh.at("d").status()?.state, State::Pending, "the state of d");
    ensure!(mesh.at("d").status()?.code.is_some(), "it shows no code");
    equal!(mesh.at(founder).nodes()?.len(), 3, "nodes");
    // Opened again, it joins without anybody touching it.
    ensure!(mesh.at(founder).cli(&["enroll", "open", "10m"])?.starts_with("open"), "what it says");
    one_mesh(&mesh, &["a", "b", "c", "d"])?;
    spent(&mesh, &["a", "b", "c", "d"], &word)?;

    // The banished one stays out, with the file too, and with a new key nobody lets it in.
    let text = format!("{word}\n");
    mesh.at(founder).cli(&["banish", "--yes", other])?;
    mesh.at(other).until(State::Banished)?;
    let window: Enrolment = mesh.at(founder).json(&["enroll", "status"])?;
    ensure!(!window.open, "banishing leaves it open: {window:?}");
    mesh.at_mut(other).stop()?;
    put(mesh.at(other), text.as_bytes())?;
    mesh.at_mut(other).start()?;
    mesh.at(other).until(State::Banished)?;
    // Also one that forgets that it was, and asks while it is open again.
    mesh.at_mut(other).stop()?;
    for file in ["gone", "gone.other"] {
        let _ = std::fs::remove_file(mesh.at(other).dir().join("state").join(file));
    }
    mesh.at(founder).cli(&["enroll", "open"])?;
    mesh.at_mut(other).start()?;
    mesh.at(other).until(State::Pending)?;
    std::thread::sleep(Duration::from_secs(6));
    equal!(mesh.at(other).status()?.state, State::Pending, "the state of the banished one");
    let nodes = mesh.at(founder).nodes()?;
    ensure!(nodes.iter().any(|n| n.name.as_str() == other && n.standing == Standing::Banished), "{nodes:?}");
    Ok(())
}

/// The mesh that it saw is gone before it could join.
fn a_card_that_finds_nobody_any_more_founds_the_mesh() -> Result<()> {
    let setup = Setup::of(&["a", "b"]).configured("drain = \"0s\"").configured_on("a", "found_after = \"0s\"");
    let mut mesh = setup.configured_on("b", "found_after = \"2s\"").hosts()?;
    give(&mesh, &["a", "b"])?;
    start(&mut mesh, &["a"])?;
    mesh.at("a").until(State::Member)?;
    mesh.at("a").cli(&["enroll", "close"])?;
    start(&mut mesh, &["b"])?;
    mesh.at("b").until(State::Pending)?;
    mesh.at_mut("a").stop()?;
    eventually(3 * SETTLED, "b founds the mesh", || {
        equal!(mesh.at("b").status()?.state, State::Member, "the state of b");
        Ok(())
    })?;
    Ok(())
}
