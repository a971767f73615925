//! Pulled plugs on a real file system: what ext4 makes of its journal when only that is on the disk which was flushed to it.
//!
//! The state directory of a host is an ext4 in a file, through a loop device. ext4 commits nothing by itself for minutes and does
//! not help with renames, so the file holds what a card would hold that loses everything not flushed. Every state in which the file rests while the
//! host joins, becomes an authority, makes a token, banishes and leaves is kept; later the host starts from each of them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{Authority, AuthorityState, Standing, State, TokenInfo};
use meshd_ca::identity::NodeId;

use super::admit;
use crate::support::mesh::{Member, SETTLED, Setup, run_on};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::{equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[scenario!(
    "edge",
    power_cut_on_a_real_file_system,
    Need::Root,
    Need::Program("unshare"),
    Need::Program("strace"),
    Need::Program("mkfs.ext4")
)];

/// What was done and acknowledged when a state of the disk was seen. Each holds for all that follow.
const ANSWERS: usize = 1;
const MEMBER: usize = 2;
const SIGNS: usize = 3;
const TOKEN: usize = 4;
const BANISHED: usize = 5;
const LEAVES: usize = 6;
const LEFT: usize = 7;

/// How long the disk must not change to count as resting. Each flush and rename of the daemon is followed by ten times that.
const REST: Duration = Duration::from_millis(3);
const CALLS: &str = "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat";

/// Starts the daemon on a disk in the file `image`. With `slowly` every state of it can be seen.
fn start(member: &mut Member, image: &Path, slowly: bool) -> Result<()> {
    let state = member.dir().join("state").display().to_string();
    let image = image.display().to_string();
    let script = "mkdir -p \"$0\" && mount -o loop,commit=300,data=writeback,noauto_da_alloc \"$1\" \"$0\" && shift && \
                  { rmdir \"$0/lost+found\" 2>/dev/null; chmod 700 \"$0\" && exec \"$@\"; }";
    let on_disk = ["--mount", "sh", "-c", script, &state, &image];
    if !slowly {
        return member.start_through("unshare", &on_disk);
    }
    let inject = format!("inject={CALLS}:delay_exit={}", 10 * REST.as_micros());
    let trace = format!("trace={CALLS}");
    // -D: the daemon is the child, and strace its child.
    let strace = ["-D", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject, "unshare"];
    member.start_through("strace", &[&strace[..], &on_disk].concat())
}

/// Keeps each state in which `image` rests in a file of its own, with what was `done` by then, until it is told to `stop`; also the same state
/// when more was done.
fn watch(image: &Path, done: &AtomicUsize, stop: &AtomicBool) -> Result<Vec<(usize, PathBuf)>> {
    let (mut seen, mut last) = (Vec::new(), (0, Vec::new()));
    loop {
        let over = stop.load(Ordering::SeqCst);
        let now = (done.load(Ordering::SeqCst), std::fs::read(image)?);
        std::thread::sleep(REST);
        if now == last || now.1 != std::fs::read(image)? {
            if over {
                return Ok(seen);
            }
            continue;
        }
        let path = image.with_extension(seen.len().to_string());
        std::fs::write(&path, &now.1)?;
        seen.push((now.0, path));
        last = now;
    }
}

fn power_cut_on_a_real_file_system() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).configured_on("b", "found_after = \"5m\"\ndrain = \"1s\"").hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("c").start()?;
    admit(&mesh, "c", &[])?;

    let image = mesh.at("b").dir().join("disk");
    std::fs::File::create(&image)?.set_len(8 << 20)?;
    run_on(mesh.host("b"), command("mkfs.ext4").args(["-q", "-b", "1024", "-J", "size=1"]).arg(&image))?;
    let (done, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let now = |what| done.store(what, Ordering::SeqCst);
    start(mesh.at_mut("b"), &image, true)?;
    let (lived, seen) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&image, &done, &stop));
        let live = || {
            let b = mesh.at("b");
            let node = b.until_answers()?.node.context("no node id")?;
            now(ANSWERS);
            admit(&mesh, "b", &[])?;
            now(MEMBER);
            eventually(SETTLED, "a hears of b", || mesh.at("a").cli(&["authority", "add", "b"]))?;
            eventually(2 * SETTLED, "b signs", || signs(b))?;
            now(SIGNS);
            b.token()?;
            now(TOKEN);
            b.cli(&["banish", "--yes", "c"])?;
            now(BANISHED);
            // Renewals and acknowledgements, which nobody asked for.
            std::thread::sleep(Duration::from_secs(2));
            now(LEAVES);
            b.cli(&["leave", "--yes"])?;
            b.until(State::Left)?;
            now(LEFT);
            std::thread::sleep(10 * REST);
            anyhow::Ok(node)
        };
        let lived = live();
        stop.store(true, Ordering::SeqCst);
        (lived, watcher.join())
    });
    let node = lived?;
    let seen = seen.ok().context("the watcher panicked")??;
    // Nobody is there to say it again.
    for name in ["a", "b", "c"] {
        mesh.at_mut(name).kill();
    }
    for phase in [0, ANSWERS, MEMBER, SIGNS, TOKEN, BANISHED, LEAVES, LEFT] {
        ensure!(phase == 0 || seen.iter().any(|(by_then, _)| *by_then == phase), "no state of the disk was seen after {phase}");
    }
    println!("{} states of the disk", seen.len());
    for (number, (by_then, image)) in seen.iter().enumerate() {
        start(mesh.at_mut("b"), image, false)?;
        judge(mesh.at("b"), *by_then, node)
            .with_context(|| format!("the plug was pulled at state {number}, after step {by_then}: {}", mesh.at("b").log()))?;
        mesh.at_mut("b").kill();
        std::fs::remove_file(image)?;
    }
    Ok(())
}

fn signs(b: &Member) -> Result<()> {
    let all: Vec<Authority> = b.json(&["authority", "list"])?;
    ensure!(all.iter().any(|a| a.own && a.state == AuthorityState::Signing), "{all:?}");
    Ok(())
}

/// The host has started from a disk on which was what it had done `by_then`, and perhaps the next step.
fn judge(b: &Member, by_then: usize, node: NodeId) -> Result<()> {
    let status = b.until_answers()?;
    if by_then >= ANSWERS {
        equal!(status.node, Some(node), "who it is");
    }
    let settled = |state| {
        eventually(SETTLED, "it knows what it is", || {
            equal!(b.status()?.state, state, "its state");
            Ok(())
        })
    };
    match by_then {
        0 | ANSWERS => return Ok(()),
        MEMBER..LEAVES => settled(State::Member)?,
        LEAVES => return Ok(()),
        _ => return settled(State::Left),
    }
    if by_then >= SIGNS {
        eventually(SETTLED, "it signs", || signs(b))?;
    }
    if by_then >= TOKEN {
        let good: Vec<TokenInfo> = b.json(&["token", "list"])?;
        equal!(good.len(), 1, "tokens that are good");
    }
    if by_then >= BANISHED {
        let nodes = b.nodes()?;
        ensure!(nodes.iter().any(|n| n.name.as_str() == "c" && n.standing == Standing::Banished), "{nodes:?}");
    }
    Ok(())
}
