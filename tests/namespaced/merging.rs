//! Two meshes become one because a person on each side wants it: under traffic, with hosts that come late, with pulled plugs, and in no other way.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{Authority, Level, Moving, State, TokenInfo, code};
use tokio::time::Instant;

use crate::checks::{check, detail_of};
use crate::fleet;
use crate::support::mesh::{Member, Mesh, SETTLED, Setup};
use crate::support::scenario::{Scenario, scenario};
use crate::support::traffic::{Server, ask, connect, echo, sockets};
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("merging", two_meshes_become_one_under_traffic_and_one_that_was_off_follows),
    scenario!("merging", pulled_plugs_leave_every_host_in_one_mesh_or_the_other),
    scenario!("merging", the_recovery_key_moves_a_mesh_whose_founder_is_gone),
];

/// Those that break something for `check`.
pub(crate) const CHECKS: &[Scenario] = &[
    scenario!("checks", nobody_is_moved_who_was_not_meant),
    scenario!("checks", two_settled_meshes_of_one_fleet_are_named_and_merged),
];

/// Starts these hosts as a mesh of their own. The first founds it: nothing is on the link to be seen meanwhile.
fn found(mesh: &mut Mesh, hosts: &[&str]) -> Result<()> {
    for (number, name) in hosts.iter().enumerate() {
        mesh.at_mut(name).start()?;
        mesh.at(name).until_answers()?;
        if number > 0 {
            let token = mesh.at(hosts[0]).token()?;
            mesh.at(name).cli(&["join", &token])?;
        }
        mesh.at(name).until(State::Member)?;
    }
    pairs(hosts, |from, to| mesh.at(from).until_captures(mesh.host(to)))
}

fn pairs(hosts: &[&str], mut each: impl FnMut(&str, &str) -> Result<()>) -> Result<()> {
    for from in hosts {
        for to in hosts.iter().filter(|to| *to != from) {
            each(from, to)?;
        }
    }
    Ok(())
}

/// Two meshes on one link that do not see each other before both are there.
fn two(mesh: &mut Mesh, ours: &[&str], theirs: &[&str]) -> Result<()> {
    found(mesh, ours)?;
    found(mesh, theirs)?;
    let of = |name: &str| Ok::<_, anyhow::Error>(mesh.at(name).status()?.mesh);
    ensure!(of(ours[0])? != of(theirs[0])?, "one mesh already");
    Ok(())
}

/// Where `found_after` is nothing, a host founds whatever it sees.
const ALONE: &str = "found_after = \"0s\"";

fn merge_token(member: &Member) -> Result<String> {
    Ok(member.cli(&["token", "create", "--merge"])?.trim().to_owned())
}

/// Waits until these hosts, and no others, are members of one mesh that this host is in, and secure their connections.
fn one_mesh(mesh: &Mesh, stays: &str, hosts: &[&str]) -> Result<()> {
    eventually(2 * SETTLED, "one mesh", || {
        let nodes = |name: &str| -> Result<Vec<_>> {
            let mut ids: Vec<_> = mesh.at(name).nodes()?.into_iter().map(|n| (n.id, n.name.to_string())).collect();
            ids.sort();
            Ok(ids)
        };
        let wanted = nodes(stays)?;
        ensure!(wanted.len() == hosts.len(), "{stays} knows {wanted:?}");
        for name in hosts {
            let known = nodes(name)?;
            ensure!(known == wanted, "{name} knows {known:?}, {stays} knows {wanted:?}");
        }
        Ok(())
    })?;
    pairs(hosts, |from, to| mesh.at(from).until_captures(mesh.host(to)))
}

/// Asks again and again until it is told to stop. Returns how often it was answered, and what happened where it was not.
fn asking(mesh: &Mesh, from: &str, to: &str, port: u16, (begun, stop): (Instant, &AtomicBool)) -> (usize, Vec<String>) {
    let (host, address) = (mesh.host(from).clone(), sockets(mesh.host(to), port)[0]);
    let (mut answered, mut failed) = (0, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let at = begun.elapsed();
        match ask(&host, address, "x") {
            Ok(answer) if answer == "got x" => answered += 1,
            other => failed.push(format!("{from} -> {to}, asked after {at:?}, until {:?}: {other:?}", begun.elapsed())),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    (answered, failed)
}

fn two_meshes_become_one_under_traffic_and_one_that_was_off_follows() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c", "d", "e"]).configured(ALONE).hosts()?;
    two(&mut mesh, &["a", "b", "c"], &["d", "e"])?;
    mesh.at_mut("c").stop()?;
    let server = Server::answering(mesh.host("b"), 8000, "got ")?;
    let patient = Server::patient_echo(mesh.host("b"), 8001, Duration::from_secs(60))?;
    // One that is open all the time, within the mesh that moves.
    let mut open = connect(mesh.host("a"), sockets(mesh.host("b"), 8001)[0])?;
    echo(&mut open, "before")?;
    let root = std::fs::read(mesh.at("a").dir().join("state/root.key"))?;
    let token = merge_token(mesh.at("d"))?;
    ensure!(token.starts_with("merge1-"), "{token}");
    let (stop, begun) = (AtomicBool::new(false), Instant::now());
    let (asked, took) = std::thread::scope(|scope| -> Result<_> {
        let within = scope.spawn(|| asking(&mesh, "a", "b", 8000, (begun, &stop)));
        let across = scope.spawn(|| asking(&mesh, "d", "b", 8000, (begun, &stop)));
        let done = (|| {
            std::thread::sleep(Duration::from_millis(500));
            let begun = Instant::now();
            let moving: Moving = mesh.at("a").json(&["merge", "--yes", &token])?;
            equal!((moving.invited, moving.from.members), (3, 3), "who may come");
            equal!(moving.to.context("no mesh")?.members, 2, "who is there");
            one_mesh_at(&mesh, "d", &["a", "b"])?;
            let took = begun.elapsed();
            pairs(&["a", "b", "d", "e"], |from, to| mesh.at(from).until_captures(mesh.host(to)))?;
            std::thread::sleep(Duration::from_millis(500));
            Ok(took)
        })();
        stop.store(true, Ordering::Relaxed);
        let asked = [within.join(), across.join()].map(|c| c.unwrap_or_default());
        Ok((asked, done?))
    })?;
    println!(
        "moved in {took:?}, all secured after {:?}; questions answered within and across: {:?}",
        begun.elapsed(),
        asked.each_ref().map(|(answered, _)| answered)
    );
    let failed = asked.map(|(_, failed)| failed).concat();
    let logs = || ["a", "b", "d"].map(|name| format!("{name} says:\n{}", mesh.at(name).log())).join("\n");
    ensure!(failed.is_empty(), "permissive hosts lose no connection: {failed:?}\n{}", logs());
    echo(&mut open, "after")?;
    drop((open, server, patient));
    pairs(&["a", "b", "d", "e"], |from, to| mesh.secured_between(from, to, 8002))?;
    // It may have been made an authority of the other mesh by now, with a root of that one.
    let now = std::fs::read(mesh.at("a").dir().join("state/root.key")).ok();
    ensure!(now != Some(root), "the root of the mesh that moved is still there");

    // The one that was off has heard nothing, and is told by those it knew.
    let listed: Vec<TokenInfo> = mesh.at("d").json(&["token", "list"])?;
    let merge = listed.first().and_then(|t| t.merge.clone()).context("the invitation is not listed")?;
    equal!((merge.hosts, merge.arrived), (3, 2), "who has come");
    ensure!(mesh.at("d").cli(&["token", "list"])?.contains("2 of 3 have come"), "people are not told");
    mesh.at_mut("c").start()?;
    one_mesh(&mesh, "d", &["a", "b", "c", "d", "e"])?;
    mesh.secured_between("c", "e", 8003)?;
    // And all of it is on disk.
    for name in ["a", "b", "c", "d", "e"] {
        mesh.at_mut(name).stop()?;
    }
    for name in ["a", "b", "c", "d", "e"] {
        mesh.at_mut(name).start()?;
    }
    one_mesh(&mesh, "d", &["a", "b", "c", "d", "e"])
}

/// Waits until these hosts are members of the mesh that this one is in.
fn one_mesh_at(mesh: &Mesh, stays: &str, hosts: &[&str]) -> Result<()> {
    eventually(SETTLED, "they have moved", || {
        let (domain, nodes) = (mesh.at(stays).status()?.trust_domain, mesh.at(stays).nodes()?);
        for name in hosts {
            let status = mesh.at(name).status()?;
            ensure!(status.state == State::Member && status.trust_domain == domain, "{name}: {status:?}");
            ensure!(nodes.iter().any(|n| Some(n.id) == status.node), "{stays} does not know {name}");
        }
        Ok(())
    })
}

fn nobody_is_moved_who_was_not_meant() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c", "d", "e"]).configured(ALONE).hosts()?;
    two(&mut mesh, &["a", "b", "c"], &["d", "e"])?;
    let no = |name: &str, words: &[&str], why: &str| -> Result<()> {
        let (ok, out, err) = mesh.at(name).try_cli(words)?;
        ensure!(!ok && err.contains(why), "{words:?} on {name}: {out}{err}");
        Ok(())
    };
    let token = merge_token(mesh.at("d"))?;
    // Not by a plain member, not by one of the same mesh, not with a token for a host, not where it does not lead, not as a host.
    no("b", &["merge", "--yes", &token], "no recovery key")?;
    no("d", &["merge", "--yes", &token], "made on this host")?;
    no("a", &["merge", "--yes", &mesh.at("d").token()?], "lets one host in, not a mesh")?;
    no("a", &["join", &token], "for a whole mesh")?;
    no("a", &["merge", &token], "not confirmed")?;
    no("e", &["token", "create", "--merge"], "not an authority")?;
    let mut typo = token.clone();
    typo.replace_range(20..21, if &token[20..21] == "a" { "b" } else { "a" });
    no("a", &["merge", "--yes", &typo], "typing error")?;
    let small = mesh.at("d").cli(&["token", "create", "--merge", "--uses", "2"])?;
    no("a", &["merge", "--yes", small.trim()], "fewer hosts")?;
    let revoked: Vec<TokenInfo> = mesh.at("d").json(&["token", "list"])?;
    for token in &revoked {
        mesh.at("d").cli(&["token", "revoke", &token.id])?;
    }
    no("a", &["merge", "--yes", &token], "revoked")?;
    // A host that was put out of the mesh that stays does not come in by another one: its key stays out.
    let id = mesh.at("c").status()?.node.context("no node")?;
    mesh.at("c").cli(&["leave", "--yes"])?;
    eventually(SETTLED, "it left", || {
        equal!(mesh.at("c").status()?.state, State::Left, "state");
        Ok(())
    })?;
    let join = mesh.at("d").token()?;
    mesh.at("c").cli(&["join", &join])?;
    mesh.at("c").until(State::Member)?;
    mesh.at("c").cli(&["leave", "--yes"])?;
    mesh.at("d").cli(&["banish", "--yes", &id.to_string()])?;
    let back = mesh.at("a").token()?;
    eventually(SETTLED, "it is back where it was", || mesh.at("c").cli(&["join", &back]))?;
    mesh.at("c").until(State::Member)?;
    let token = merge_token(mesh.at("d"))?;
    let moving: Moving = mesh.at("a").json(&["merge", "--yes", &token])?;
    equal!((moving.invited, moving.banished), (2, vec!["c".to_owned()]), "who may come");
    one_mesh_at(&mesh, "d", &["a", "b"])?;
    // It stays where it was, and its check says so.
    let found = eventually(2 * SETTLED, "check says that it could not follow", || {
        let found = check(mesh.at("c"), &[])?;
        let told = found.iter().any(|f| f.code == code::MOVING && f.level == Level::Warn);
        ensure!(told, "{}", detail_of(&found, code::MOVING));
        Ok(found)
    })?;
    crate::breakages::named([code::MOVING]);
    ensure!(detail_of(&found, code::MOVING).contains("banished"), "{}", detail_of(&found, code::MOVING));
    equal!(mesh.at("c").status()?.state, State::Member, "it is still a member of its mesh");
    ensure!(mesh.at("c").status()?.moving.is_some(), "status does not say so");
    ensure!(mesh.at("d").nodes()?.iter().all(|n| n.id != id || n.standing == meshd::api::Standing::Banished), "it came in");
    // The token was used by that mesh, and is of no use to another.
    no("a", &["merge", "--yes", &token], "one mesh already")
}

/// Kills the daemons in the middle of it, again and again, and starts them: each is in one mesh or the other, and in the end all are in one.
fn pulled_plugs_leave_every_host_in_one_mesh_or_the_other() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "d"]).configured(ALONE).hosts()?;
    two(&mut mesh, &["a", "b"], &["d"])?;
    let ids: Vec<_> = ["a", "b"].iter().map(|n| mesh.at(n).status().map(|s| (s.node, s.mesh))).collect::<Result<_>>()?;
    let stays = mesh.at("d").status()?.mesh;
    let token = merge_token(mesh.at("d"))?;
    let mut merge = mesh.at("a").meshd(std::path::Path::new(crate::support::mesh::MESHD));
    merge.args(["merge", "--yes", &token]);
    let mut merge = mesh.at("a").spawn(&mut merge, "merge")?;
    for round in 0u64..6 {
        std::thread::sleep(Duration::from_millis(30 + 70 * round));
        for name in ["a", "b", "d"].iter().skip(usize::from(round % 2 == 0)) {
            mesh.at_mut(name).kill();
        }
        for name in ["a", "b", "d"] {
            if !mesh.is_running(name) {
                mesh.at_mut(name).start()?;
            }
        }
        for ((node, was), name) in ids.iter().zip(["a", "b"]) {
            mesh.at(name).until(State::Member)?;
            let status = mesh.at(name).status()?;
            equal!(status.node, *node, "another identity");
            ensure!(status.mesh == *was || status.mesh == stays, "{name} is in a third mesh: {status:?}");
        }
        if merge.wait(Duration::from_millis(1))?.is_some() {
            // The person types it again if it was cut, as long as it was not done.
            if mesh.at("a").status()?.mesh != stays {
                let _ = mesh.at("a").try_cli(&["merge", "--yes", &token])?;
            }
        }
    }
    eventually(SETTLED, "the command is at its end", || {
        if mesh.at("a").status()?.mesh != stays && mesh.at("a").status()?.moving.is_none() {
            mesh.at("a").cli(&["merge", "--yes", &token])?;
        }
        Ok(())
    })?;
    one_mesh(&mesh, "d", &["a", "b", "d"])?;
    mesh.secured_between("a", "b", 8000)
}

/// Which of two founded the mesh that both are in.
fn founder(mesh: &Mesh, pair: [&'static str; 2]) -> Result<&'static str> {
    let founded = |name: &str| -> Result<bool> {
        let all: Vec<Authority> = mesh.at(name).json(&["authority", "list"])?;
        Ok(all.iter().any(|a| a.own && a.founder))
    };
    Ok(if founded(pair[0])? { pair[0] } else { pair[1] })
}

fn two_settled_meshes_of_one_fleet_are_named_and_merged() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c", "d"]).configured("found_after = \"0s\"\ndrain = \"0s\"").hosts()?;
    fleet::give(&mesh, &["a", "b", "c", "d"])?;
    // Each pair founds a mesh and is settled by hand before it meets the other.
    for pair in [["a", "b"], ["c", "d"]] {
        let away: Vec<&str> = ["a", "b", "c", "d"].into_iter().filter(|n| !pair.contains(n)).collect();
        for name in &away {
            mesh.host(name).link_down()?;
        }
        for name in pair {
            mesh.at_mut(name).start()?;
        }
        eventually(2 * SETTLED, "a pair", || {
            for name in pair {
                equal!(mesh.at(name).status()?.members.reachable, 2, "members in reach of {name}");
            }
            Ok(())
        })?;
        mesh.at(founder(&mesh, pair)?).cli(&["enroll", "close"])?;
        for name in &away {
            mesh.host(name).link_up()?;
            // The kernel took the IPv6 address with the link; whoever manages the network gives it back.
            mesh.host(name).add_address(mesh.host(name).ipv6.into())?;
        }
    }
    equal!(mesh.at("a").status()?.mesh, mesh.at("c").status()?.mesh, "one id");
    let found = eventually(2 * SETTLED, "the other mesh is named", || {
        let found = check(mesh.at("a"), &[])?;
        ensure!(found.iter().any(|f| f.code == code::FLEET_SPLIT && f.level == Level::Warn), "nothing is said");
        Ok(found)
    })?;
    crate::breakages::named([code::FLEET_SPLIT]);
    let remedy = found.iter().find(|f| f.code == code::FLEET_SPLIT).and_then(|f| f.hint.clone());
    ensure!(remedy.context("no remedy")?.contains("meshd merge"), "the remedy is another one");
    let token = merge_token(mesh.at(founder(&mesh, ["c", "d"])?))?;
    mesh.at(founder(&mesh, ["a", "b"])?).cli(&["merge", "--yes", &token])?;
    one_mesh(&mesh, "c", &["a", "b", "c", "d"])?;
    mesh.secured_between("a", "c", 8000)?;
    eventually(SETTLED, "nothing is named any more", || {
        let found = check(mesh.at("a"), &[])?;
        ensure!(found.iter().all(|f| f.code != code::FLEET_SPLIT || f.level == Level::Ok), "{found:?}");
        Ok(())
    })
}

fn the_recovery_key_moves_a_mesh_whose_founder_is_gone() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c", "d"]).configured(ALONE).hosts()?;
    two(&mut mesh, &["a", "b", "c"], &["d"])?;
    let paper = mesh.at("a").dir().join("paper");
    mesh.at("a").cli(&["recovery-key", "--file", &paper.display().to_string()])?;
    let key = std::fs::read(&paper)?;
    let file = mesh.at("b").dir().join("paper");
    std::fs::File::create(&file)?.write_all(&key)?;
    mesh.at_mut("a").stop()?;
    let token = merge_token(mesh.at("d"))?;
    let wrong = mesh.at("b").dir().join("wrong");
    std::fs::write(&wrong, "aaaa-".repeat(10).trim_end_matches('-'))?;
    let words = |paper: &std::path::Path| -> Vec<String> {
        ["merge", "--yes", "--recovery-key-file", &paper.display().to_string(), &token].map(str::to_owned).to_vec()
    };
    let run = |words: Vec<String>| mesh.at("b").try_cli(&words.iter().map(String::as_str).collect::<Vec<_>>());
    ensure!(!run(words(&wrong))?.0, "a wrong key moves a mesh");
    let (ok, out, err) = run(words(&file))?;
    ensure!(ok, "{out}{err}");
    one_mesh_at(&mesh, "d", &["b", "c"])?;
    // The founder hears it when it is back, and follows as any other.
    mesh.at_mut("a").start()?;
    one_mesh(&mesh, "d", &["a", "b", "c", "d"])?;
    let word = marker("x");
    let server = Server::answering(mesh.host("a"), 8000, "got ")?;
    equal!(ask(mesh.host("d"), sockets(mesh.host("a"), 8000)[0], &word)?, format!("got {word}"), "the answer");
    drop(server);
    Ok(())
}
