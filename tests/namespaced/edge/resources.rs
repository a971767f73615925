//! Hosts that are short of something: disk, descriptors, memory, cores.

use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::State;
use tokio::time::Instant;

use super::{admit, secured, trio};
use crate::support::mesh::{MESHD, Member, Mesh, Setup, run_on};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::ssh::Ssh;
use crate::support::traffic::{Server, connect_within, echo, expect_pattern, send_pattern, sockets};
use crate::support::{equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("edge", a_full_disk, Need::Program("unshare")),
    scenario!("edge", a_disk_that_is_full_at_the_start, Need::Program("unshare")),
    scenario!("edge", a_disk_that_becomes_read_only, Need::Program("unshare"), Need::Program("nsenter")),
    scenario!("edge", with_128_files, Need::Program("prlimit")),
    scenario!("edge", on_one_core, Need::Program("taskset")),
    scenario!("edge", in_64_megabytes_with_500_connections, Need::Memory),
    scenario!("edge", ten_members_stay_small),
];

/// Shell words that run what follows them with a small file system of its own in `dir`, which is made from what is there.
fn small_disk(dir: &Path) -> Vec<String> {
    let script = "mkdir -p \"$0\" && mount -t tmpfs -o size=4m,mode=700 small \"$0\" && exec \"$@\"";
    ["-m", "sh", "-c", script].into_iter().map(str::to_owned).chain([dir.display().to_string()]).collect()
}

/// The state directory as the daemon sees it.
fn seen(member: &Member) -> Result<PathBuf> {
    let dir = member.dir().join("state");
    Ok(PathBuf::from(format!("/proc/{}/root{}", member.pid()?, dir.display())))
}

/// Leaves no byte on the file system of `dir`.
fn fill(dir: &Path) -> Result<()> {
    let mut file = std::fs::File::create(dir.join("filler"))?;
    let mut block = vec![0; 64 * 1024];
    while !block.is_empty() {
        if file.write_all(&block).is_err() {
            block.truncate(block.len() / 2);
        }
    }
    ensure!(std::fs::write(dir.join("more"), [0; 8192]).is_err(), "the disk is not full");
    Ok(())
}

fn a_full_disk() -> Result<()> {
    let mut mesh = trio().hosts()?;
    for name in ["a", "b"] {
        let words = small_disk(&mesh.at(name).dir().join("state"));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        mesh.at_mut(name).start_through("unshare", &words)?;
        if name == "a" {
            mesh.at("a").until(State::Member)?;
        } else {
            admit(&mesh, "b", &[])?;
        }
    }
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    for name in ["a", "b"] {
        fill(&seen(mesh.at(name))?)?;
    }
    // What needs the disk says why it cannot be done; traffic, new listeners and new addresses do not need it.
    let (ok, out, err) = mesh.at("a").try_cli(&["token", "create"])?;
    ensure!(!ok && err.contains("disk full"), "a token that cannot be kept: {out}{err}");
    secured(&mesh, 8010)?;
    let extra = "192.168.77.60".parse()?;
    mesh.host("b").add_address(extra)?;
    mesh.at("a").until_captured("b", &[extra])?;
    let (_, report, _) = mesh.at("a").try_cli(&["check"])?;
    ensure!(report.contains("check-state") && report.contains("disk full"), "check says nothing of the disk: {report}");
    ssh.goes_on()?;
    ssh.is_open(&mesh)?;
    // There is room again.
    for name in ["a", "b"] {
        std::fs::remove_file(seen(mesh.at(name))?.join("filler"))?;
        let _ = std::fs::remove_file(seen(mesh.at(name))?.join("more"));
    }
    mesh.at("a").token()?;
    let (_, report, _) = mesh.at("a").try_cli(&["check"])?;
    ensure!(!report.contains("disk full"), "check goes on about the disk: {report}");
    secured(&mesh, 8020)
}

/// Shell words as [`small_disk`], with a disk that is full already.
fn full_disk(dir: &Path) -> Vec<String> {
    let script = "mkdir -p \"$0\" && mount -t tmpfs -o size=4m,mode=700 full \"$0\" && \
                  { ! [ -d \"$0.kept\" ] || cp -a \"$0.kept/.\" \"$0\"; } && \
                  { head -c 16m /dev/zero > \"$0/filler\" 2>/dev/null || true; } && exec \"$@\"";
    ["-m", "sh", "-c", script].into_iter().map(str::to_owned).chain([dir.display().to_string()]).collect()
}

/// The first start of a host, and a later one, on a disk without room for a byte.
fn a_disk_that_is_full_at_the_start() -> Result<()> {
    let mut mesh = trio().hosts()?;
    let words = |mesh: &Mesh, name: &str| full_disk(&mesh.at(name).dir().join("state"));
    let full = words(&mesh, "a");
    let full: Vec<&str> = full.iter().map(String::as_str).collect();
    // A host that has no key yet cannot be anybody: it says why and what to do, and ends, so that a service manager tries again.
    mesh.at_mut("a").start_through("unshare", &full)?;
    let status = mesh.at_mut("a").ended(Duration::from_secs(20))?.context("it goes on without a key")?;
    ensure!(!status.success(), "it ended well");
    let log = mesh.at("a").log();
    ensure!(log.contains("No space left") && log.contains("is the disk full"), "it does not say why, or what to do: {log}");
    ensure!(!mesh.at("a").dir().join("run/meshd.sock").exists(), "it left its socket");
    // There is room.
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let token = mesh.at("a").token()?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until_answers()?;
    mesh.at("b").cli(&["join", &token])?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    // A member is started again on a disk that has filled up meanwhile: it serves, and remembers nothing new.
    mesh.at_mut("b").stop()?;
    let state = mesh.at("b").dir().join("state");
    std::fs::rename(&state, state.with_extension("kept"))?;
    let full = words(&mesh, "b");
    mesh.at_mut("b").start_through("unshare", &full.iter().map(String::as_str).collect::<Vec<_>>())?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    secured(&mesh, 8000)?;
    let (ok, report, _) = mesh.at("b").try_cli(&["check"])?;
    ensure!(!ok && report.contains("check-disk"), "check says nothing of the disk: {report}");
    std::fs::remove_file(seen(mesh.at("b"))?.join("filler"))?;
    eventually(Duration::from_secs(30), "what could not be saved is saved", || {
        let (_, report, _) = mesh.at("b").try_cli(&["check"])?;
        ensure!(!report.contains("check-state"), "{report}");
        Ok(())
    })?;
    secured(&mesh, 8010)
}

fn a_disk_that_becomes_read_only() -> Result<()> {
    let mut mesh = trio().start()?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    let read_only = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\"";
    for name in ["a", "b"] {
        // What is on the card stays readable; the daemon is started on it.
        mesh.at_mut(name).kill();
        let state = mesh.at(name).dir().join("state").display().to_string();
        let script = format!("{read_only} && exec \"$@\"");
        mesh.at_mut(name).start_through("unshare", &["-m", "sh", "-c", &script, &state])?;
        eventually(Duration::from_secs(5), "nothing can be written", || {
            ensure!(std::fs::write(seen(mesh.at(name))?.join("probe"), "x").is_err());
            Ok(())
        })?;
    }
    for name in ["a", "b"] {
        mesh.at(name).until(State::Member)?;
    }
    mesh.settled()?;
    secured(&mesh, 8010)?;
    let (ok, out, err) = mesh.at("a").try_cli(&["token", "create"])?;
    ensure!(!ok && err.contains("read-only"), "a token that cannot be kept: {out}{err}");
    for name in ["a", "b"] {
        let (_, report, _) = mesh.at(name).try_cli(&["check"])?;
        ensure!(report.contains("check-state"), "check on {name} says nothing of the disk: {report}");
        ensure!(mesh.at(name).log().contains("could not be saved"), "{}", mesh.at(name).log());
    }
    ssh.goes_on()?;
    ssh.is_open(&mesh)?;
    // Repaired, and read-only again while it runs.
    let state = mesh.at("a").dir().join("state").display().to_string();
    let inside = |mesh: &Mesh, script: &str| -> Result<()> {
        let pid = mesh.at("a").pid()?.to_string();
        run_on(mesh.host("a"), command("nsenter").args(["-m", "-t", &pid, "sh", "-c", script, &state])).map(drop)
    };
    inside(&mesh, "mount -o remount,bind,rw \"$0\"")?;
    mesh.at("a").token()?;
    inside(&mesh, "mount -o remount,bind,ro \"$0\"")?;
    let (ok, ..) = mesh.at("a").try_cli(&["token", "create"])?;
    ensure!(!ok, "a token was kept on a disk that cannot be written");
    secured(&mesh, 8020)?;
    inside(&mesh, "mount -o remount,bind,rw \"$0\"")?;
    mesh.at("a").token()?;
    // A host that has never been anybody cannot start like this, and says why.
    let empty = mesh.host("x").dir().join("state").display().to_string();
    let script = format!("mkdir -p \"$0\" && {read_only} && exec \"$@\"");
    let mut new = mesh.host("x").meshd(Path::new(command("unshare").get_program()));
    new.args(["-m", "sh", "-c", &script, &empty, MESHD, "run"]);
    let output = mesh.host("x").output(&mut new, Duration::from_secs(20))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && said.contains("read-only"), "{said}");
    ssh.goes_on()
}

/// Connections of `client` to an echo server of `server` that stay open: those that work, and how many were refused. None may hang.
fn crowd(mesh: &Mesh, client: &str, server: &str, port: u16, size: usize) -> Result<(Vec<TcpStream>, usize)> {
    let (mut open, mut refused) = (Vec::new(), 0);
    for number in 0..size {
        let address = sockets(mesh.host(server), port)[number % 2];
        let begun = Instant::now();
        match connect_within(mesh.host(client), address, Duration::from_secs(10)).map_err(Into::into).and_then(|mut stream| {
            echo(&mut stream, "one of many")?;
            anyhow::Ok(stream)
        }) {
            Ok(stream) => open.push(stream),
            Err(_) => {
                refused += 1;
                ensure!(begun.elapsed() < Duration::from_secs(15), "a refusal took {} s", begun.elapsed().as_secs());
            }
        }
    }
    Ok((open, refused))
}

fn with_128_files() -> Result<()> {
    let mut mesh = trio().hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start_through("prlimit", &["--nofile=128:128"])?;
    admit(&mesh, "b", &[])?;
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    for (client, server) in [("a", "b"), ("b", "a")] {
        let echoing = Server::echo(mesh.host(server), 8000)?;
        let (mut open, refused) = crowd(&mesh, client, server, 8000, 60)?;
        ensure!(open.len() >= 20 && refused > 0, "{client} to {server}: {} open, {refused} refused", open.len());
        // The daemon is as well as ever: it answers, has its addresses, and those who are in go on.
        open.iter_mut().try_for_each(|stream| echo(stream, "still here"))?;
        ensure!(!mesh.at("b").captured("a")?.is_empty() && !mesh.at("a").captured("b")?.is_empty());
        ssh.goes_on()?;
        ssh.is_open(&mesh)?;
        let log = mesh.at("b").log();
        ensure!(!log.contains("Too many open files"), "it ran out of files all the same: {log}");
        drop((open, echoing));
        eventually(Duration::from_secs(10), "there is room again", || {
            let echoing = Server::echo(mesh.host(server), 8001)?;
            let (open, refused) = crowd(&mesh, client, server, 8001, 10)?;
            drop(echoing);
            equal!((open.len(), refused), (10, 0), "connections");
            Ok(())
        })?;
        // A tunnel that finds no room to rest counts until its peer has heard so, two seconds at most.
        std::thread::sleep(Duration::from_millis(2500));
    }
    secured(&mesh, 8010)
}

fn on_one_core() -> Result<()> {
    let mut mesh = trio().hosts()?;
    for name in ["a", "b"] {
        mesh.at_mut(name).start_through("taskset", &["-c", "0"])?;
        if name == "a" {
            mesh.at("a").until(State::Member)?;
        } else {
            admit(&mesh, "b", &[])?;
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", mesh.at(name).pid()?))?;
        ensure!(status.contains("Cpus_allowed_list:\t0\n"), "{status}");
    }
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    // Eight transfers at once and the command line beside them.
    let server = Server::start(mesh.host("b"), 8010, |mut stream| send_pattern(&mut stream, 3, 64))?;
    std::thread::scope(|scope| -> Result<()> {
        let transfers: Vec<_> = (0..8)
            .map(|number| {
                let address = sockets(mesh.host("b"), 8010)[number % 2];
                let client = mesh.host("a");
                scope.spawn(move || expect_pattern(&mut connect_within(client, address, Duration::from_secs(20))?, 3, 64))
            })
            .collect();
        mesh.at("b").status()?;
        ssh.goes_on()?;
        for transfer in transfers {
            transfer.join().map_err(|_| anyhow::anyhow!("a client died"))??;
        }
        Ok(())
    })?;
    drop(server);
    ssh.is_open(&mesh)
}

/// A memory cgroup of this test: version 2, or 1.
pub(crate) struct Memory(PathBuf);

impl Memory {
    /// Where one can be made; none when this machine has no memory controller that we may use.
    pub(crate) fn find() -> Option<(PathBuf, &'static str)> {
        let two = PathBuf::from("/sys/fs/cgroup");
        let one = two.join("memory");
        let controllers = std::fs::read_to_string(two.join("cgroup.subtree_control")).unwrap_or_default();
        let probe = |dir: PathBuf, file: &'static str| {
            let trial = dir.join(format!("meshd-probe-{}", std::process::id()));
            let found = std::fs::create_dir(&trial).is_ok() && trial.join(file).exists();
            let _ = std::fs::remove_dir(&trial);
            found.then_some((dir, file))
        };
        if controllers.split_whitespace().any(|c| c == "memory") {
            return probe(two, "memory.max");
        }
        probe(one, "memory.limit_in_bytes")
    }

    fn new(name: &str, bytes: u64) -> Result<Memory> {
        let (dir, file) = Memory::find().context("no memory controller")?;
        let group = dir.join(format!("meshd-{}-{name}", std::process::id()));
        std::fs::create_dir(&group)?;
        let memory = Memory(group);
        std::fs::write(memory.0.join(file), bytes.to_string())?;
        Ok(memory)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Empty by now: the mesh is dropped first.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A value of `/proc/PID/status` in KiB.
fn in_64_megabytes_with_500_connections() -> Result<()> {
    let groups = [Memory::new("a", 64 << 20)?, Memory::new("b", 64 << 20)?];
    let mut mesh = trio().hosts()?;
    for (name, group) in ["a", "b"].into_iter().zip(&groups) {
        let place = group.0.join("cgroup.procs").display().to_string();
        mesh.at_mut(name).start_through("sh", &["-c", "echo 0 > \"$0\" && exec \"$@\"", &place])?;
        if name == "a" {
            mesh.at("a").until(State::Member)?;
        } else {
            admit(&mesh, "b", &[])?;
        }
    }
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let (mut open, refused) = crowd(&mesh, "a", "b", 8000, 500)?;
    equal!((open.len(), refused), (500, 0), "connections");
    open.iter_mut().try_for_each(|stream| echo(stream, &"x".repeat(20_000)))?;
    for name in ["a", "b"] {
        let member = mesh.at(name);
        let most = member.kib("VmHWM:")?;
        ensure!(most < 64 * 1024, "{name} used {most} KiB");
        member.status()?;
    }
    ssh.goes_on()?;
    ssh.is_open(&mesh)?;
    drop((open, server));
    secured(&mesh, 8010)?;
    drop(mesh);
    Ok(())
}

/// What a daemon of a mesh of ten may keep in memory. Those that are shipped: the budget that README.md states. A build for tests is
/// larger by its code alone, and only shown not to grow without bound.
const SMALL: u64 = if option_env!("MESHD_TEST_PROGRAM").is_some() { 10 * 1024 } else { 40 * 1024 };

fn ten_members_stay_small() -> Result<()> {
    const NAMES: [&str; 10] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    let mesh = Setup::of(&NAMES).start()?;
    let servers = NAMES.into_iter().map(|name| Server::echo(mesh.host(name), 8000)).collect::<Result<Vec<_>>>()?;
    // What came up with the mesh is over: idle from here on.
    std::thread::sleep(Duration::from_secs(20));
    let used = |name: &&str| -> Result<(u64, u64)> { Ok((mesh.at(name).kib("VmRSS:")?, mesh.at(name).kib("RssAnon:")?)) };
    let used = NAMES.iter().map(used).collect::<Result<Vec<_>>>()?;
    let (all, own) = used[1..].iter().max().copied().unwrap_or_default();
    println!(
        "mesh of ten, idle, resident KiB (of them not of files): authority {} ({}), largest member {all} ({own})",
        used[0].0, used[0].1
    );
    for (name, (all, _)) in NAMES.iter().zip(&used) {
        ensure!(*all <= SMALL, "{name} keeps {all} KiB, allowed are {SMALL}");
    }
    drop(servers);
    Ok(())
}
