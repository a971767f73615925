//! More than one authority: they come about by themselves, and the mesh outlives the loss of any of them, the founder included.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{Authority, AuthorityState, RootPhase, State};
use meshd_ca::bundle::RootId;
use tokio::time::Instant;

use crate::edge::admit;
use crate::support::mesh::{Mesh, SETTLED, Setup};
use crate::support::scenario::{Need, Scenario, scenario};
use crate::support::traffic::{Server, connect, echo, sockets};
use crate::support::{copy, equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("authorities", the_founder_is_gone_for_good_under_load),
    scenario!("authorities", added_and_removed_under_load),
    scenario!("authorities", a_root_is_replaced_under_load_and_twice_while_a_host_is_away),
    scenario!("authorities", an_authority_whose_maker_is_gone_introduces_itself_to_a_host_that_was_away),
    scenario!("authorities", a_banished_host_is_out_at_once_and_stays_out),
    scenario!("authorities", who_is_out_and_cannot_know_hears_it_from_whom_it_asks),
    scenario!("authorities", two_halves_of_which_nobody_can_tell_the_other_meet, Need::Program("ip"), Need::Program("nft")),
];

/// How long the mesh may take to make its authorities: half a minute for each is how long a host must have been there.
const MADE: Duration = Duration::from_secs(150);
/// The SVIDs of these scenarios, as in their configuration.
const LIFETIME: Duration = Duration::from_secs(20);
pub(crate) const PORT: u16 = 8000;

/// New connections in both directions between hosts, all the time, each of which must be served.
pub(crate) struct Load<'a> {
    mesh: &'a Mesh,
    done: AtomicBool,
    count: AtomicU64,
}

impl<'a> Load<'a> {
    pub(crate) fn new(mesh: &'a Mesh) -> Self {
        Self { mesh, done: AtomicBool::new(false), count: AtomicU64::new(0) }
    }

    /// How many there were.
    pub(crate) fn connections(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Connects again and again until `done`.
    fn run(&self, from: &str, to: &str) -> Result<()> {
        let targets = sockets(self.mesh.host(to), PORT);
        while !self.done.load(Ordering::Relaxed) {
            let n = self.count.fetch_add(1, Ordering::Relaxed);
            let what = || format!("connection {n}, {from} to {to}");
            let mut stream = connect(self.mesh.host(from), targets[n as usize % 2]).with_context(what)?;
            echo(&mut stream, &format!("word {n}")).with_context(what)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Runs `work` while connections are made between these hosts. All of them, and `work`, must succeed.
    pub(crate) fn during<T>(&self, pairs: &[(&'static str, &'static str)], work: impl FnOnce() -> Result<T>) -> Result<T> {
        std::thread::scope(|scope| {
            let clients: Vec<_> = pairs.iter().map(|(from, to)| scope.spawn(|| self.run(from, to))).collect();
            let done = work();
            self.done.store(true, Ordering::Relaxed);
            for client in clients {
                client.join().map_err(|_| anyhow::anyhow!("a client died"))??;
            }
            done
        })
    }
}

fn authorities(mesh: &Mesh, at: &str) -> Result<Vec<Authority>> {
    mesh.at(at).json(&["authority", "list"])
}

/// Waits until, as `at` sees it, exactly these sign and nothing is left of others.
pub(crate) fn until_signing(mesh: &Mesh, at: &str, names: &[&str]) -> Result<()> {
    eventually(MADE, &format!("{names:?} sign, as {at} sees it"), || {
        let all = authorities(mesh, at)?;
        let mut signing: Vec<&str> = all.iter().filter(|a| a.state == AuthorityState::Signing).map(|a| a.name.as_str()).collect();
        signing.sort_unstable();
        ensure!(signing == names && all.len() == names.len(), "only {signing:?} of {all:?}");
        Ok(())
    })
}

/// The serial numbers of the SVIDs that a host holds, and who issued them.
fn held(mesh: &Mesh, at: &str) -> Result<BTreeMap<String, String>> {
    let all = mesh.at(at).identities()?;
    ensure!(!all.is_empty() && all.iter().all(|i| i.expires_seconds >= 0), "{at} holds {all:?}");
    let name = |i: &meshd::api::Identity| i.issued_by.as_ref().map_or("nobody".into(), ToString::to_string);
    Ok(all.iter().map(|i| (i.serial.clone().unwrap_or_default(), name(i))).collect())
}

pub(crate) fn nothing_failed(mesh: &Mesh, hosts: &[&str]) -> Result<()> {
    for name in hosts {
        for edge in mesh.at(name).edges()?.iter().filter(|e| e.port == PORT) {
            ensure!(edge.failed == 0 && edge.secured, "{name}: {edge:?}");
        }
    }
    Ok(())
}

fn the_founder_is_gone_for_good_under_load() -> Result<()> {
    // Hosts that joined in the same second would be authorities by the order of their keys: c is to be the third one.
    let setup = Setup::of(&["a", "b", "c", "d", "e"]).configured("svid_lifetime = \"20s\"");
    let mut mesh = setup.configured_on("d", "authority = false").hosts()?;
    for name in ["a", "b", "c", "d"] {
        mesh.at_mut(name).start()?;
        mesh.at(name).until_answers()?;
        if name != "a" {
            let token = mesh.at("a").token()?;
            mesh.at(name).cli(&["join", &token])?;
        }
        mesh.at(name).until(State::Member)?;
    }
    mesh.settled()?;
    // Started now, because a host cannot be changed while the others are at work; it has no place in the mesh yet.
    let others = ["b", "c", "d"];
    let _servers = ["b", "c", "d", "e"].map(|name| Server::echo(mesh.host(name), PORT));
    // The authorities come about under load.
    let load = Load::new(&mesh);
    let pairs = [("b", "c"), ("c", "d"), ("d", "b")];
    load.during(&pairs, || until_signing(&mesh, "d", &["a", "b", "c"]))?;
    nothing_failed(&mesh, &others)?;
    let before = load.count.into_inner();
    for name in others {
        equal!(mesh.at(name).status()?.authority, name != "d", "whether {name} is an authority");
    }

    // The founder is gone: no last word, and nothing answers at its address any more.
    mesh.at_mut("a").kill();
    mesh.host("a").link_down()?;
    let gone = Instant::now();
    mesh.at_mut("e").start()?;
    let load = Load::new(&mesh);
    let pairs = [("b", "c"), ("c", "d"), ("d", "b"), ("d", "c"), ("b", "d")];
    let joined = load.during(&pairs, || {
        // A host joins through another authority.
        mesh.at("e").until_answers()?;
        let token = mesh.at("b").token()?;
        mesh.at("e").cli(&["join", &token])?;
        mesh.at("e").until(State::Member)?;
        let joined = gone.elapsed();
        for other in others {
            mesh.at("e").until_captures(mesh.host(other))?;
            mesh.at(other).until_captures(mesh.host("e"))?;
        }
        // Its first certificate may take a moment: it does not know yet which of the authorities is the dead one.
        eventually(SETTLED, "e has a certificate", || held(&mesh, "e"))?;
        // Everybody renews, more than once, until nothing is left that was issued while the founder was there.
        let members = ["b", "c", "d", "e"];
        let first: BTreeMap<_, _> = members.iter().map(|n| Ok((*n, held(&mesh, n)?))).collect::<Result<_>>()?;
        let mut waited = Duration::ZERO;
        while waited < 2 * LIFETIME {
            std::thread::sleep(Duration::from_millis(500));
            waited += Duration::from_millis(500);
            for name in members {
                held(&mesh, name)?;
            }
        }
        for name in members {
            let now = held(&mesh, name)?;
            let old = now.keys().find(|serial| first[name].contains_key(*serial));
            ensure!(old.is_none(), "{name} still holds {old:?}: not renewed");
            ensure!(now.values().all(|by| by == "b" || by == "c"), "{name} holds {now:?}");
        }
        Ok(joined)
    })?;
    println!(
        "{before} connections while authorities were made, {} after the founder was gone; a host joined {} ms after that",
        load.count.load(Ordering::Relaxed),
        joined.as_millis()
    );
    nothing_failed(&mesh, &["b", "c", "d"])?;
    for (from, to) in [("e", "b"), ("d", "e"), ("e", "c")] {
        for address in sockets(mesh.host(to), PORT) {
            echo(&mut connect(mesh.host(from), address)?, "hello")?;
        }
    }
    nothing_failed(&mesh, &["b", "c", "d", "e"])
}

fn added_and_removed_under_load() -> Result<()> {
    let mesh =
        Setup::of(&["a", "b", "c"]).configured("svid_lifetime = \"20s\"").configured_on("b", "authority = false").start()?;
    let (ok, _, err) = mesh.at("a").try_cli(&["authority", "add", "b"])?;
    ensure!(!ok && err.contains("configuration"), "b was made one: {err}");
    let (ok, _, err) = mesh.at("b").try_cli(&["authority", "add", "c"])?;
    ensure!(!ok && err.contains("run the command on a"), "b made one: {err}");
    let (ok, _, err) = mesh.at("a").try_cli(&["authority", "remove", "a"])?;
    ensure!(!ok && err.contains("only one"), "the only one was removed: {err}");
    let _servers = ["a", "b", "c"].map(|name| Server::echo(mesh.host(name), PORT));
    let load = Load::new(&mesh);
    let pairs = [("a", "b"), ("b", "c"), ("c", "a")];
    load.during(&pairs, || {
        mesh.at("a").cli(&["authority", "add", "c"])?;
        until_signing(&mesh, "b", &["a", "c"])?;
        // Both issue: c to itself at the least.
        eventually(2 * LIFETIME, "c issues to itself", || {
            let by = held(&mesh, "c")?;
            ensure!(by.values().any(|by| by == "c"), "{by:?}");
            Ok(())
        })?;
        let token = mesh.at("c").token()?;
        ensure!(!token.is_empty(), "an authority makes tokens");
        mesh.at("a").cli(&["authority", "remove", "c"])?;
        eventually(SETTLED, "c is told", || {
            ensure!(!mesh.at("c").status()?.authority, "c says that it is an authority");
            Ok(())
        })?;
        let (ok, _, _) = mesh.at("c").try_cli(&["token", "create"])?;
        ensure!(!ok, "c makes tokens");
        // Its root goes when nobody shows a certificate under it any more, and nobody notices.
        for name in ["a", "b", "c"] {
            until_signing(&mesh, name, &["a"])?;
        }
        let by = held(&mesh, "c")?;
        ensure!(by.values().all(|by| by == "a"), "c holds {by:?}");
        Ok(())
    })?;
    println!("{} connections while an authority came and went", load.count.load(Ordering::Relaxed));
    nothing_failed(&mesh, &["a", "b", "c"])?;
    // It does not come back by itself: somebody did not want it.
    std::thread::sleep(Duration::from_secs(5));
    until_signing(&mesh, "a", &["a"])
}

/// Roots, and how far each is.
type Phases = Vec<(RootId, RootPhase)>;

/// The roots of a, as `at` sees them, and whom they wait for.
fn roots(mesh: &Mesh, at: &str) -> Result<(Phases, Vec<String>)> {
    let a = authorities(mesh, at)?.into_iter().find(|a| a.name.as_str() == "a").context("no a")?;
    let waiting = a.waiting_for.iter().map(ToString::to_string).collect();
    Ok((a.roots.iter().map(|r| (r.id, r.phase)).collect(), waiting))
}

/// Waits until a has exactly the root `new`, as `names` see it, and prints the phases on the way.
fn until_replaced(mesh: &Mesh, names: &[&str], new: RootId) -> Result<Duration> {
    let (start, mut seen) = (Instant::now(), Vec::new());
    for name in names {
        eventually(MADE, &format!("the root is replaced, as {name} sees it"), || {
            let (now, waiting) = roots(mesh, name)?;
            let phases: Vec<RootPhase> = now.iter().map(|(_, phase)| *phase).collect();
            if seen.last() != Some(&phases) {
                seen.push(phases);
            }
            ensure!(now == [(new, RootPhase::Active)], "{now:?}, waits for {waiting:?}");
            Ok(())
        })?;
    }
    println!("replaced after {} ms by way of {seen:?}", start.elapsed().as_millis());
    Ok(start.elapsed())
}

fn rotate(mesh: &Mesh) -> Result<RootId> {
    Ok(mesh.at("a").json::<meshd::api::Rotation>(&["ca", "rotate"])?.root)
}

fn a_root_is_replaced_under_load_and_twice_while_a_host_is_away() -> Result<()> {
    let setup = Setup::of(&["a", "b", "c", "d"]).configured("svid_lifetime = \"20s\"\nauthority = false");
    let mut mesh = setup.start()?;
    let (ok, _, err) = mesh.at("b").try_cli(&["ca", "rotate"])?;
    ensure!(!ok && err.contains("not an authority"), "b replaced a root: {err}");
    let _servers = ["a", "b", "c", "d"].map(|name| Server::echo(mesh.host(name), PORT));
    let mut old = vec![roots(&mesh, "d")?.0[0].0];
    let count = {
        let load = Load::new(&mesh);
        load.during(&[("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")], || {
            let new = rotate(&mesh)?;
            until_replaced(&mesh, &["a", "b", "c", "d"], new)?;
            old.push(new);
            // Everybody goes on renewing under it.
            std::thread::sleep(LIFETIME);
            Ok(())
        })?;
        load.count.into_inner()
    };
    println!("{count} connections while the root was replaced");
    nothing_failed(&mesh, &["a", "b", "c", "d"])?;
    // One is switched off. It was heard a moment ago, so it is waited for, over a restart too.
    mesh.at_mut("d").kill();
    let new = rotate(&mesh)?;
    // Nobody is left that would tell a, which is to forget that it was heard, that it was there a moment ago.
    for name in ["a", "b", "c"] {
        eventually(SETTLED, &format!("{name} does not hear d"), || {
            let nodes = mesh.at(name).nodes()?;
            ensure!(nodes.iter().any(|n| n.name.as_str() == "d" && !n.reachable), "{nodes:?}");
            Ok(())
        })?;
    }
    let (now, waiting) = roots(&mesh, "a")?;
    ensure!(now == [(old[1], RootPhase::Active), (new, RootPhase::Preparing)] && waiting == ["d"], "{now:?}, {waiting:?}");
    let d = mesh.at("a").nodes()?.into_iter().find(|n| n.name.as_str() == "d").context("no d")?.id;
    mesh.at_mut("a").kill();
    // The silence of eight days, as the daemon writes it down.
    let silent = serde_json::to_vec(&BTreeMap::from([(d, 8 * 86_400u64)]))?;
    meshd_ca::store::Store::open(&mesh.at("a").dir().join("state"))?.save("silent", &silent)?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.settled()?;
    let load = Load::new(&mesh);
    load.during(&[("a", "b"), ("b", "c"), ("c", "a")], || {
        until_replaced(&mesh, &["a", "b", "c"], new)?;
        let newest = rotate(&mesh)?;
        until_replaced(&mesh, &["a", "b", "c"], newest)?;
        old.extend([new, newest]);
        Ok(())
    })?;
    println!("{} connections while it was replaced twice", load.count.load(Ordering::Relaxed));
    let failed: u64 = ["b", "c"]
        .iter()
        .map(|n| mesh.at(n).edges())
        .collect::<Result<Vec<_>>>()?
        .iter()
        .flatten()
        .filter(|e| e.port == PORT && e.peer.as_ref().is_some_and(|p| ["a", "b", "c"].contains(&p.as_str())))
        .map(|e| e.failed)
        .sum();
    equal!(failed, 0, "failed connections of those who were there");
    // It is back, and knows none of the roots that are believed by now.
    let back = Instant::now();
    mesh.at_mut("d").start()?;
    mesh.at("d").until(State::Member)?;
    mesh.settled()?;
    for (from, to) in [("d", "b"), ("b", "d"), ("d", "a"), ("c", "d")] {
        eventually(SETTLED, &format!("{from} to {to}"), || {
            echo(&mut connect(mesh.host(from), sockets(mesh.host(to), PORT)[0])?, "back")
        })?;
    }
    println!("a host that missed two roots is back, all its connections secured, after {} ms", back.elapsed().as_millis());
    equal!(roots(&mesh, "d")?.0, [(old[3], RootPhase::Active)], "the roots that d believes");
    // Of the old ones nothing is left.
    let state = std::fs::read_dir(mesh.at("a").dir().join("state"))?.flatten().map(|f| f.file_name());
    let keys = state.filter(|f| f.to_string_lossy().starts_with("root") && !f.to_string_lossy().contains("old")).count();
    ensure!(keys <= 3, "{keys} files of roots");
    Ok(())
}

fn a_banished_host_is_out_at_once_and_stays_out() -> Result<()> {
    // Members that are strict, so that nothing of a member's goes in plaintext meanwhile.
    let mesh = Setup::of(&["a", "b", "c"]).configured_on("b", "mode = \"strict\"").start()?;
    let _servers = ["a", "b", "c"].map(|name| Server::echo(mesh.host(name), PORT));
    let mut open = Vec::new();
    for (from, to) in [("c", "b"), ("b", "c"), ("c", "a")] {
        let mut stream = connect(mesh.host(from), sockets(mesh.host(to), PORT)[0])?;
        echo(&mut stream, "before")?;
        open.push((from, to, stream));
    }
    let (ok, _, err) = mesh.at("b").try_cli(&["banish", "--yes", "c"])?;
    ensure!(!ok && err.contains("not an authority"), "a plain member banished: {err}");
    let (ok, _, err) = mesh.at("a").try_cli(&["banish", "--yes", "a"])?;
    ensure!(!ok && err.contains("this host"), "{err}");
    let load = Load::new(&mesh);
    load.during(&[("a", "b"), ("b", "a")], || {
        mesh.at("a").cli(&["banish", "--yes", "c"])?;
        let banished = Instant::now();
        // What was open is cut, not ended: neither end can take it for the last word of the other.
        for (from, to, stream) in &mut open {
            let mut end = [0];
            let ended = std::io::Read::read(stream, &mut end);
            ensure!(ended.is_err(), "the connection from {from} to {to} ended with {ended:?}");
        }
        println!("connections of a banished host cut after {} ms", banished.elapsed().as_millis());
        mesh.at("c").until(State::Banished)?;
        for name in ["a", "b"] {
            eventually(SETTLED, &format!("{name} knows"), || {
                let nodes = mesh.at(name).nodes()?;
                let c = nodes.iter().find(|n| n.name.as_str() == "c").context("no c")?;
                equal!(c.standing, meshd::api::Standing::Banished, "c as {name} sees it");
                ensure!(c.captured.is_empty(), "{name} still captures {:?}", c.captured);
                Ok(())
            })?;
        }
        Ok(())
    })?;
    nothing_failed(&mesh, &["a"]).or_else(|_| {
        // The cut connections of c count as failed; those of the load do not.
        let failed = mesh.at("a").edges()?.into_iter().filter(|e| e.port == PORT && e.failed > 0);
        let others: Vec<_> = failed.filter(|e| e.peer.as_ref().is_some_and(|p| p.as_str() != "c")).collect();
        ensure!(others.is_empty(), "{others:?}");
        Ok(())
    })?;
    // Its key stays out, with a good token too.
    let token = mesh.at("a").token()?;
    let (ok, _, err) = mesh.at("c").try_cli(&["join", &token])?;
    ensure!(!ok && err.contains("banished"), "it joined, or was told something else: {err}");
    equal!(mesh.at("a").nodes()?.len(), 3, "nodes that a knows");
    Ok(())
}

/// b is off while a lets c in and makes it an authority, and a is gone when b is back: c is all there is, and b has never heard of it.
fn an_authority_whose_maker_is_gone_introduces_itself_to_a_host_that_was_away() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).configured_on("b", "authority = false").hosts()?;
    for name in ["a", "b", "c"] {
        mesh.at_mut(name).start()?;
        if name != "a" {
            admit(&mesh, name, &[])?;
        }
        mesh.at(name).until(State::Member)?;
        if name == "b" {
            mesh.settled()?;
            mesh.at_mut("b").kill();
        }
    }
    mesh.at("a").cli(&["authority", "add", "c"])?;
    eventually(SETTLED, "c stands", || {
        ensure!(mesh.at("c").status()?.authority, "{:?}", mesh.at("c").status()?);
        Ok(())
    })?;
    mesh.at_mut("a").kill();
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Member)?;
    let c_of_b = || {
        let all = authorities(&mesh, "b")?;
        all.into_iter().find(|a| a.name.as_str() == "c").context("b does not know of c")
    };
    eventually(2 * SETTLED, "b believes c", || {
        let c = c_of_b()?;
        ensure!(c.reachable && c.roots.iter().any(|root| root.believed_by >= 2), "{c:?}");
        Ok(())
    })?;
    // c signs when a has heard of its root too, and all of them are one mesh.
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.settled()?;
    until_signing(&mesh, "b", &["a", "c"])?;
    for (from, to, port) in [("b", "c", PORT), ("c", "b", PORT + 1)] {
        eventually(2 * SETTLED, "it is secured", || mesh.secured_between(from, to, port))?;
    }
    Ok(())
}

/// c is banished while it is off, by an authority that it never heard of, and a, who made that, is gone when it is back. d left, and its card holds what
/// was on it before.
fn who_is_out_and_cannot_know_hears_it_from_whom_it_asks() -> Result<()> {
    let plain = "authority = false";
    let mut mesh = Setup::of(&["a", "b", "c", "d"]).configured_on("c", plain).configured_on("d", plain).start()?;
    mesh.at_mut("c").kill();
    let state = mesh.at("d").dir().join("state");
    let kept = state.with_extension("kept");
    mesh.at_mut("d").stop()?;
    copy(&state, &kept)?;
    mesh.at_mut("d").start()?;
    mesh.at("d").until(State::Member)?;
    mesh.at("d").cli(&["leave", "--yes"])?;
    mesh.at("d").until(State::Left)?;
    mesh.at_mut("d").kill();
    std::fs::remove_dir_all(&state)?;
    std::fs::rename(&kept, &state)?;

    mesh.at("a").cli(&["authority", "add", "b"])?;
    eventually(SETTLED, "b stands", || {
        ensure!(mesh.at("b").status()?.authority, "{:?}", mesh.at("b").status()?);
        Ok(())
    })?;
    mesh.at("b").cli(&["banish", "--yes", "c"])?;
    mesh.at_mut("a").kill();
    for (name, state) in [("c", State::Banished), ("d", State::Left)] {
        mesh.at_mut(name).start()?;
        mesh.at(name).until(state)?;
    }
    Ok(())
}

/// The network is parted between two authorities, each lets two hosts in, and both are gone for good when it is whole again: neither half has ever heard
/// of the other, and in each somebody is heard.
fn two_halves_of_which_nobody_can_tell_the_other_meet() -> Result<()> {
    const HALVES: [[&str; 3]; 2] = [["a", "b", "c"], ["z", "d", "e"]];
    let mut setup = Setup::of(&["a", "z", "b", "c", "d", "e"]);
    for name in ["b", "c", "d", "e"] {
        setup = setup.configured_on(name, "authority = false");
    }
    let mut mesh = setup.hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("z").start()?;
    admit(&mesh, "z", &[])?;
    mesh.at("a").cli(&["authority", "add", "z"])?;
    until_signing(&mesh, "z", &["a", "z"])?;
    mesh.part(&HALVES[0], &HALVES[1])?;
    for [authority, others @ ..] in HALVES {
        for name in others {
            mesh.at_mut(name).start()?;
            mesh.at(name).until_answers()?;
            let token = mesh.at(authority).token()?;
            mesh.at(name).cli(&["join", &token])?;
            mesh.at(name).until(State::Member)?;
        }
        for (one, other) in [(others[0], others[1]), (others[1], others[0])] {
            mesh.at(one).until_captures(mesh.host(other))?;
            // Each has its certificates: nobody issues any afterwards.
            mesh.secured_between(one, other, PORT)?;
        }
        mesh.at_mut(authority).kill();
    }
    for [_, others @ ..] in HALVES {
        for name in others {
            equal!(mesh.at(name).nodes()?.len(), 4, "nodes that {name} knows");
        }
    }
    let whole = Instant::now();
    mesh.heal(HALVES.as_flattened())?;
    eventually(MADE, "all of them are one mesh", || {
        for name in ["b", "c", "d", "e"] {
            equal!(mesh.at(name).nodes()?.len(), 6, "nodes that {name} knows");
        }
        Ok(())
    })?;
    mesh.settled()?;
    println!("the halves have met after {} ms", whole.elapsed().as_millis());
    mesh.secured_between("b", "d", PORT)?;
    mesh.secured_between("e", "c", PORT)
}
