//! How hosts come in, stay out, and leave, by the command line alone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{Pending, Standing, State};

use crate::support::mesh::{Member, Mesh, SETTLED, SHOWN, Setup};
use crate::support::scenario::{Scenario, scenario};
use crate::support::traffic::{Server, ask, sockets};
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("joining", a_host_alone_founds_and_others_join_with_tokens),
    scenario!("joining", without_a_token_a_host_beside_a_mesh_stays_pending),
    scenario!("joining", a_host_without_a_token_is_approved_on_any_member),
    scenario!("joining", of_two_meshes_of_one_the_approved_one_is_given_up),
    scenario!("joining", wrong_used_revoked_and_ended_tokens_open_nothing),
    scenario!("joining", a_token_works_before_the_first_start),
    scenario!("joining", where_multicast_does_not_reach_the_token_leads),
    scenario!("joining", whoever_else_answers_first_does_not_end_a_join),
    scenario!("joining", traffic_goes_on_while_a_host_joins),
    scenario!("joining", everyone_comes_back_after_a_restart),
    scenario!("joining", the_founder_may_be_away),
    scenario!("joining", who_leaves_is_an_ordinary_host),
];

fn a_host_alone_founds_and_others_join_with_tokens() -> Result<()> {
    let mesh = Setup::of(&["a", "b", "c"]).start()?;
    let statuses: Vec<_> = ["a", "b", "c"].iter().map(|n| mesh.at(n).status()).collect::<Result<_>>()?;
    ensure!(statuses.iter().all(|s| s.mesh == statuses[0].mesh && s.mesh.is_some()), "not one mesh: {statuses:?}");
    equal!(statuses.iter().map(|s| s.authority).collect::<Vec<_>>(), vec![true, false, false], "who is the authority");
    for name in ["a", "b", "c"] {
        let mut names: Vec<String> = mesh.at(name).nodes()?.iter().map(|n| n.name.to_string()).collect();
        names.sort();
        equal!(names, vec!["a".to_owned(), "b".into(), "c".into()], "nodes that {name} knows");
        let (ok, ..) = mesh.at(name).try_cli(&["status"])?;
        ensure!(ok, "status of a member is not success");
    }
    let token = mesh.at("a").token()?;
    ensure!(token.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "not one plain word: {token}");
    Ok(())
}

fn without_a_token_a_host_beside_a_mesh_stays_pending() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Pending)?;
    // Longer than it would look around before founding.
    std::thread::sleep(Duration::from_secs(6));
    let status = mesh.at("b").status()?;
    equal!(status.state, State::Pending, "state");
    ensure!(status.reason.is_some(), "it does not say why");
    let (ok, ..) = mesh.at("b").try_cli(&["status"])?;
    ensure!(!ok, "status of a pending host is success");
    equal!(mesh.at("a").nodes()?.len(), 1, "nodes");
    // It talks as ever, both ways.
    let server = Server::answering(mesh.host("b"), 8000, "got ")?;
    let word = marker("pending");
    mesh.readable(&word, || Ok(ask(mesh.host("a"), sockets(mesh.host("b"), 8000)[0], &word)?))?;
    drop(server);
    // What it waits for may go and come back, and it says so.
    let says = |mesh: &Mesh, what: &str| {
        eventually(SETTLED, &format!("it says: {what}"), || {
            let reason = mesh.at("b").status()?.reason.unwrap_or_default();
            ensure!(reason.contains(what), "{reason}");
            Ok(())
        })
    };
    says(&mesh, "a mesh answers at ")?;
    mesh.at_mut("a").stop()?;
    says(&mesh, "not there any more")?;
    mesh.at_mut("a").start()?;
    says(&mesh, "a mesh answers at ")?;
    mesh.at("a").until(State::Member)?;
    let token = mesh.at("a").token()?;
    mesh.at("b").cli(&["join", &token])?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("a", "b", 8001)
}

/// The code that a host shows to its root.
fn code(member: &Member) -> Result<String> {
    let shown = || member.status()?.code.map(|c| c.expose().to_owned()).context("no code is shown");
    eventually(SHOWN, "a code", shown)
}

fn a_host_without_a_token_is_approved_on_any_member() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c", "d"]).hosts()?;
    for name in ["a", "b"] {
        mesh.at_mut(name).start()?;
        if name == "b" {
            let token = mesh.at("a").token()?;
            mesh.at("b").until_answers()?;
            mesh.at("b").cli(&["join", &token])?;
        }
        mesh.at(name).until(State::Member)?;
    }
    mesh.at("a").until_captures(mesh.host("b"))?;
    equal!(mesh.at("b").cli(&["pending"])?, "no host waits\n".to_owned(), "who waits");
    for name in ["c", "d"] {
        mesh.at_mut(name).start()?;
        mesh.at(name).until(State::Pending)?;
    }
    let (shown, other) = (code(mesh.at("c"))?, code(mesh.at("d"))?);
    ensure!(shown != other, "two hosts show the same code");
    ensure!(mesh.at("c").try_cli(&["status"])?.1.contains(&format!("meshd approve {shown}")), "status does not say what to do");
    // Any member knows who waits, and that no code was typed yet.
    eventually(SHOWN, "both wait", || {
        let waiting: Vec<Pending> = mesh.at("b").json(&["pending"])?;
        let mut names: Vec<String> = waiting.iter().map(|w| format!("{} {}", w.name, w.address)).collect();
        names.sort();
        equal!(names, ["c", "d"].map(|n| format!("{n} {}", mesh.host(n).ipv4)).to_vec(), "who waits");
        Ok(())
    })?;
    // A code that nobody shows lets nobody in.
    let (ok, out, err) = mesh.at("b").try_cli(&["approve", "--wait", "9s", "aaaa-bbbb-cccc-dddd"])?;
    ensure!(!ok && err.contains("no host has come with this code yet"), "{out}{err}");
    let (ok, out, err) = mesh.at("b").try_cli(&["approve", "aaaa-bbbb-cccc-ddd1"])?;
    ensure!(!ok && err.contains("no '1'"), "{out}{err}");
    equal!(mesh.at("a").nodes()?.len(), 2, "nodes");
    // The right one, in capitals and without its hyphens, on a member that is no authority.
    let typed = shown.replace('-', "").to_uppercase();
    equal!(mesh.at("b").cli(&["approve", &typed])?, "c is a member now\n".to_owned(), "what is said");
    mesh.at("c").until(State::Member)?;
    ensure!(mesh.at("c").status()?.code.is_none(), "a member shows a code");
    equal!(mesh.at("d").status()?.state, State::Pending, "the other host");
    mesh.at("c").until_captures(mesh.host("b"))?;
    mesh.at("b").until_captures(mesh.host("c"))?;
    let server = Server::answering(mesh.host("b"), 8000, "got ")?;
    let word = marker("approved");
    let (_, report) = mesh.watched(&[&word], || Ok(ask(mesh.host("c"), (mesh.host("b").ipv4, 8000).into(), &word)?))?;
    ensure!(report.hits.iter().all(|h| *h == 0), "what was said is on the wire");
    drop(server);
    // What was typed is in no log.
    for name in ["a", "b", "c"] {
        let log = mesh.at(name).log().to_lowercase().replace('-', "");
        ensure!(!log.contains(&shown.replace('-', "")), "the log of {name} has the code");
    }
    Ok(())
}

fn of_two_meshes_of_one_the_approved_one_is_given_up() -> Result<()> {
    // Switched on in the same second: neither sees the other in time.
    let mut mesh = Setup::of(&["a", "b"]).configured("found_after = \"0s\"").hosts()?;
    for name in ["a", "b"] {
        mesh.at_mut(name).start()?;
    }
    for name in ["a", "b"] {
        mesh.at(name).until(State::Member)?;
    }
    ensure!(mesh.at("a").status()?.mesh != mesh.at("b").status()?.mesh, "they are in one mesh already");
    let shown = code(mesh.at("b"))?;
    mesh.at("a").cli(&["approve", &shown])?;
    eventually(SETTLED, "one mesh", || {
        let (a, b) = (mesh.at("a").status()?, mesh.at("b").status()?);
        ensure!(a.mesh == b.mesh && a.members.active == 2 && b.members.active == 2, "{a:?} {b:?}");
        equal!((a.authority, b.authority), (true, false), "who is the authority");
        ensure!(a.code.is_none() && b.code.is_none(), "a code is still shown");
        Ok(())
    })?;
    mesh.settled()
}

fn wrong_used_revoked_and_ended_tokens_open_nothing() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    for name in ["b", "c"] {
        mesh.at_mut(name).start()?;
        mesh.at(name).until(State::Pending)?;
    }
    let refused = |token: &str, what: &str| -> Result<()> {
        let (ok, out, err) = mesh.at("c").try_cli(&["join", token])?;
        ensure!(!ok, "{what} token was accepted: {out}{err}");
        ensure!(!err.trim().is_empty(), "nothing is said about {what} token");
        ensure!(mesh.at("c").status()?.state != State::Member, "{what} token made a member");
        Ok(())
    };
    let used = mesh.at("a").token()?;
    mesh.at("b").cli(&["join", &used])?;
    mesh.at("b").until(State::Member)?;
    refused(&used, "a used")?;
    // The same host may repeat itself: an answer may get lost.
    mesh.at("b").cli(&["join", &used])?;

    let ended = mesh.at("a").token_of(&["--lifetime", "1s"])?;
    std::thread::sleep(Duration::from_millis(2500));
    refused(&ended, "an ended")?;

    let revoked = mesh.at("a").token()?;
    let tokens: Vec<meshd::api::TokenInfo> = mesh.at("a").json(&["token", "list"])?;
    for token in &tokens {
        mesh.at("a").cli(&["token", "revoke", &token.id])?;
    }
    refused(&revoked, "a revoked")?;

    let good = mesh.at("a").token()?;
    let mut wrong = good.clone().into_bytes();
    let middle = wrong.len() / 2;
    wrong[middle] = if wrong[middle] == b'a' { b'b' } else { b'a' };
    refused(&String::from_utf8(wrong)?, "a mistyped")?;
    refused("nonsense", "a nonsensical")?;
    equal!(mesh.at("a").nodes()?.len(), 2, "nodes");
    let (plain, ..) = mesh.at("b").try_cli(&["token", "create"])?;
    ensure!(!plain, "a host that is no authority makes tokens");

    mesh.at("c").cli(&["join", &good])?;
    mesh.at("c").until(State::Member)
}

fn a_token_works_before_the_first_start() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let token = mesh.at("a").token()?;
    let file = mesh.at("b").dir().join("token");
    std::fs::write(&file, format!("{token}\n"))?;
    mesh.at("b").cli(&["join", "--token-file", &file.display().to_string()])?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("b", "a", 8000)
}

fn where_multicast_does_not_reach_the_token_leads() -> Result<()> {
    let mesh = Setup::of(&["a", "b", "c"]).configured("mdns = false").start()?;
    mesh.secured_between("b", "c", 8000)?;
    mesh.secured_between("c", "a", 8001)
}

/// A member that is no authority, at the first address that is tried.
fn whoever_else_answers_first_does_not_end_a_join() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Pending)?;
    let token = mesh.at("a").token()?;
    mesh.at("b").cli(&["join", &token])?;
    mesh.at_mut("c").start()?;
    mesh.at("c").until(State::Pending)?;
    let [other, authority] = ["b", "a"].map(|name| format!("{}:6374", mesh.host(name).ipv4));
    let token = mesh.at("a").token_of(&["--hint", &other, "--hint", &authority])?;
    mesh.at("c").cli(&["join", &token])?;
    mesh.at("c").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("c", "b", 8000)
}

/// Connections in both directions, from before the first daemon knows the second until all are secured: none may fail.
fn traffic_goes_on_while_a_host_joins() -> Result<()> {
    for _ in 0..3 {
        let mut mesh = Setup::of(&["a", "b"]).hosts()?;
        mesh.at_mut("a").start()?;
        mesh.at("a").until(State::Member)?;
        mesh.at_mut("b").start()?;
        mesh.at("b").until(State::Pending)?;
        let (_in_a, _in_b) = (Server::answering(mesh.host("a"), 8000, "a ")?, Server::answering(mesh.host("b"), 8000, "b ")?);
        let token = mesh.at("a").token()?;
        let done = AtomicBool::new(false);
        let (asked, joined) = std::thread::scope(|scope| {
            let traffic: Vec<_> = [("a", "b"), ("b", "a")]
                .into_iter()
                .flat_map(|(from, to)| sockets(mesh.host(to), 8000).map(|at| (from, at)))
                .map(|(from, at)| {
                    let (mesh, done) = (&mesh, &done);
                    scope.spawn(move || -> Result<u32> {
                        let mut asked = 0;
                        while !done.load(Ordering::Relaxed) {
                            let answer =
                                ask(mesh.host(from), at, "x").with_context(|| format!("{from} to {at}, number {asked}"))?;
                            ensure!(answer.ends_with(" x"), "{from} got {answer:?} from {at}");
                            asked += 1;
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        Ok(asked)
                    })
                })
                .collect();
            let join = || -> Result<()> {
                mesh.at("b").cli(&["join", &token])?;
                mesh.at("b").until(State::Member)?;
                mesh.settled()?;
                eventually(Duration::from_secs(10), "an edge", || {
                    ensure!(mesh.at("a").edges()?.iter().any(|e| e.secured && e.port == 8000), "not secured yet");
                    Ok(())
                })
            };
            let joined = join();
            done.store(true, Ordering::Relaxed);
            let asked: Result<Vec<u32>> =
                traffic.into_iter().map(|t| t.join().map_err(|_| anyhow::anyhow!("a client died"))?).collect();
            (asked, joined)
        });
        joined?;
        ensure!(asked?.iter().all(|n| *n > 0), "a direction was never asked");
    }
    Ok(())
}

fn everyone_comes_back_after_a_restart() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).configured("drain = \"0s\"").start()?;
    let before: Vec<_> = ["a", "b", "c"].iter().map(|n| Ok(mesh.at(n).status()?.node)).collect::<Result<_>>()?;
    // One after the other, then all at once without a word.
    for name in ["a", "b", "c"] {
        mesh.at_mut(name).stop()?;
        mesh.at_mut(name).start()?;
        mesh.at(name).until(State::Member)?;
    }
    mesh.settled()?;
    mesh.secured_between("a", "c", 8000)?;
    for name in ["a", "b", "c"] {
        mesh.at_mut(name).kill();
    }
    for name in ["c", "b", "a"] {
        mesh.at_mut(name).start()?;
    }
    for name in ["a", "b", "c"] {
        mesh.at(name).until(State::Member)?;
    }
    mesh.settled()?;
    mesh.secured_between("a", "b", 8001)?;
    mesh.secured_between("b", "c", 8002)?;
    let after: Vec<_> = ["a", "b", "c"].iter().map(|n| Ok(mesh.at(n).status()?.node)).collect::<Result<_>>()?;
    equal!(after, before, "node ids after the restarts");
    Ok(())
}

fn the_founder_may_be_away() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).configured("drain = \"0s\"").start()?;
    mesh.at_mut("a").stop()?;
    mesh.secured_between("b", "c", 8000)?;
    mesh.at_mut("b").stop()?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Member)?;
    mesh.at("b").until_captures(mesh.host("c"))?;
    mesh.at("c").until_captures(mesh.host("b"))?;
    mesh.secured_between("c", "b", 8001).context("after a member restarted without any authority in reach")?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("a", "b", 8002)
}

fn who_leaves_is_an_ordinary_host() -> Result<()> {
    let mesh = Setup::of(&["a", "b", "c"]).start()?;
    mesh.at("c").cli(&["leave", "--yes"])?;
    mesh.at("c").until(State::Left)?;
    for name in ["a", "b"] {
        eventually(Duration::from_secs(10), "everyone knows who left", || {
            let nodes = mesh.at(name).nodes()?;
            let c = nodes.iter().find(|n| n.name.as_str() == "c");
            ensure!(c.is_none_or(|c| c.standing == Standing::Left && c.captured.is_empty()), "{name} shows {c:?}");
            Ok(())
        })?;
    }
    let server = Server::answering(mesh.host("c"), 8000, "got ")?;
    for address in sockets(mesh.host("c"), 8000) {
        let word = marker("left");
        mesh.readable(&word, || Ok(ask(mesh.host("a"), address, &word)?))?;
    }
    drop(server);
    mesh.secured_between("a", "b", 8001)?;
    // It may come back with a new token.
    let token = mesh.at("a").token()?;
    mesh.at("c").cli(&["join", &token])?;
    mesh.at("c").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("c", "a", 8002)
}
