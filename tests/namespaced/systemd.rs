//! meshd as a service: what it tells a service manager, what it has kept over a restart, and the unit files themselves.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use meshd::api::State;
use meshd::config::Mode;
use meshd::demo::units::Units;
use tokio::time::Instant;

use crate::support::manager::Manager;
use crate::support::mesh::{Mesh, SETTLED, Setup, run_on};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::traffic::{Server, ask, connect, connect_within, sockets};
use crate::support::units::inside;
use crate::support::{equal, eventually, marker, role};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("systemd", ready_is_said_when_it_serves_and_stopping_when_it_stops),
    scenario!("systemd", a_host_that_waits_for_a_token_is_ready),
    scenario!("systemd", a_restart_opens_no_window),
    scenario!("systemd", a_killed_daemon_opens_no_window_while_its_socket_is_kept),
    scenario!("systemd", a_foreign_descriptor_is_not_used),
    scenario!("systemd", a_frozen_daemon_misses_the_watchdog),
    scenario!("systemd", reload_applies_what_it_can_and_names_the_rest),
    scenario!("systemd", the_capabilities_of_the_unit_are_enough, Need::Root, Need::Program("setpriv"), Need::Cgroups),
    scenario!("systemd", the_units_are_valid_and_confined, Need::Program("systemd-analyze")),
    scenario!(
        "systemd",
        the_unit_works_under_systemd,
        Need::Root,
        Need::Cgroups,
        Need::Program("systemd-analyze"),
        Need::Program("nft")
    ),
    scenario!(
        "systemd",
        the_strict_unit_works_under_systemd,
        Need::Root,
        Need::Cgroups,
        Need::Program("systemd-analyze"),
        Need::Program("nft")
    ),
    scenario!("systemd", the_strict_unit_is_the_other_one_before_the_network),
];

const PATIENCE: Duration = Duration::from_secs(30);

/// Starts the daemon of `name` under `manager` and waits until it is ready.
fn start(mesh: &mut Mesh, name: &str, manager: &mut Manager) -> Result<()> {
    mesh.at_mut(name).start_under(manager, &[])?;
    manager.until("READY=1", PATIENCE)
}

fn ready_is_said_when_it_serves_and_stopping_when_it_stops() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).configured("found_after = \"2s\"").hosts()?;
    let mut manager = Manager::new(mesh.host("a").dir())?;
    let began = Instant::now();
    start(&mut mesh, "a", &mut manager)?;
    // It answers long before, and has no place in life yet.
    ensure!(began.elapsed() >= Duration::from_secs(2), "ready while it looks for a mesh: {:?}", manager.said);
    let looking = manager.position("STATUS=looking for a mesh").context("it did not say that it looks for a mesh")?;
    ensure!(Some(looking) < manager.position("READY=1"), "{:?}", manager.said);
    equal!(mesh.at("a").status()?.state, State::Member, "state of a daemon that is ready");
    let stored = manager.position("FDSTORE=1").context("nothing was kept")?;
    ensure!(stored < manager.position("READY=1").unwrap_or(0), "kept after it was ready: {:?}", manager.said);
    ensure!(manager.kept.len() == 1 && manager.kept[0].0 == "rules", "kept: {:?}", manager.kept);
    manager.listen(Duration::from_secs(3), Some("STATUS=a: 1 of 1 members in reach, 0 addresses secured"))?;
    mesh.at_mut("a").stop()?;
    manager.listen(Duration::from_millis(300), None)?;
    ensure!(manager.position("STOPPING=1").is_some(), "it stopped without a word: {:?}", manager.said);
    ensure!(manager.kept.is_empty(), "a daemon that stops leaves {:?} with the service manager", manager.kept);
    Ok(())
}

fn a_host_that_waits_for_a_token_is_ready() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let address = mesh.host("a").ipv4;
    mesh.at("b").configure(&format!("peers = [\"{address}\"]"))?;
    let mut manager = Manager::new(mesh.host("b").dir())?;
    start(&mut mesh, "b", &mut manager)?;
    equal!(mesh.at("b").status()?.state, State::Pending, "state of a daemon that is ready");
    ensure!(manager.said.iter().any(|l| l.starts_with("STATUS=waiting for")), "{:?}", manager.said);
    // Joined, it takes up its work without being started again.
    let token = mesh.at("a").token()?;
    mesh.at("b").cli(&["join", &token])?;
    ensure!(manager.listen(PATIENCE, Some("STATUS=b: 2 of 2 members in reach, 2 addresses secured"))?, "{:?}", manager.said);
    Ok(())
}

/// Two members, the first under a manager, and both proven to each other.
fn managed_pair() -> Result<(Mesh, Manager)> {
    let mut mesh = Setup::of(&["a", "b"]).configured("drain = \"1s\"").hosts()?;
    let mut manager = Manager::new(mesh.host("a").dir())?;
    start(&mut mesh, "a", &mut manager)?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until_answers()?;
    let token = mesh.at("a").token()?;
    mesh.at("b").cli(&["join", &token])?;
    mesh.settled()?;
    Ok((mesh, manager))
}

/// While `action` runs, both hosts ask each other without pause over both families. Nothing of it may be readable on the link, before,
/// in and after the moment in which there is no daemon.
fn without_a_window(mesh: &mut Mesh, action: impl FnOnce(&mut Mesh) -> Result<()>) -> Result<()> {
    let word = marker("window");
    let servers = [Server::answering(mesh.host("a"), 8000, "got ")?, Server::answering(mesh.host("b"), 8000, "got ")?];
    let hosts = [mesh.host("a").clone(), mesh.host("b").clone()];
    let (over, answered, refused) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let ((), report) = mesh.watched_mut(&[&word], |mesh| {
        std::thread::scope(|scope| {
            for (client, server) in [(0, 1), (1, 0)] {
                for to in sockets(&hosts[server], 8000) {
                    let (client, word, over, answered, refused) = (&hosts[client], &word, &over, &answered, &refused);
                    scope.spawn(move || {
                        while !over.load(Ordering::Relaxed) {
                            match ask(client, to, word) {
                                Ok(_) => answered.fetch_add(1, Ordering::Relaxed),
                                Err(_) => refused.fetch_add(1, Ordering::Relaxed),
                            };
                            std::thread::sleep(Duration::from_millis(2));
                        }
                    });
                }
            }
            let done = action(mesh);
            over.store(true, Ordering::Relaxed);
            done
        })
    })?;
    drop(servers);
    let (answered, refused) = (answered.into_inner(), refused.into_inner());
    ensure!(answered > 50 && refused > 0, "{answered} answered, {refused} refused: this test saw no restart");
    equal!(report.hits[0], 0, "frames in plaintext ({answered} answered, {refused} refused)");
    Ok(())
}

fn a_restart_opens_no_window() -> Result<()> {
    let (mut mesh, mut manager) = managed_pair()?;
    let fd = manager.kept.len();
    equal!(fd, 1, "descriptors kept");
    without_a_window(&mut mesh, |mesh| {
        std::thread::sleep(Duration::from_millis(500));
        mesh.at("a").signal("USR1")?;
        mesh.at_mut("a").ended_well(Duration::from_secs(20))?;
        manager.listen(Duration::from_millis(100), None)?;
        equal!(manager.kept.len(), 1, "descriptors kept over a restart");
        // Nobody serves: what the application opens is refused, because the rules are still there.
        let to = sockets(mesh.host("b"), 8000)[0];
        let refused = connect_within(mesh.host("a"), to, Duration::from_secs(2));
        ensure!(refused.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused), "not captured without a daemon");
        std::thread::sleep(Duration::from_secs(1));
        start(mesh, "a", &mut manager)?;
        mesh.settled()?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    })?;
    ensure!(manager.position("FDSTORE=1").is_none(), "the socket was not taken over: {:?}", manager.said);
    mesh.secured_between("a", "b", 8001)?;
    mesh.secured_between("b", "a", 8002)
}

fn a_killed_daemon_opens_no_window_while_its_socket_is_kept() -> Result<()> {
    let (mut mesh, mut manager) = managed_pair()?;
    without_a_window(&mut mesh, |mesh| {
        std::thread::sleep(Duration::from_millis(300));
        mesh.at_mut("a").kill();
        std::thread::sleep(Duration::from_millis(500));
        start(mesh, "a", &mut manager)?;
        mesh.settled()
    })?;
    // A manager that gives up closes what it kept: the permissive host works in plaintext then.
    mesh.at_mut("a").kill();
    manager.kept.clear();
    let word = marker("open");
    let server = Server::answering(mesh.host("b"), 8003, "got ")?;
    // A child that another scenario is about to start may hold a copy of the socket for a moment more.
    eventually(SETTLED, "a's rules are gone", || {
        mesh.readable(&word, || Ok(ask(mesh.host("a"), sockets(mesh.host("b"), 8003)[0], &word)?)).map(drop)
    })?;
    drop(server);
    Ok(())
}

fn a_foreign_descriptor_is_not_used() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    let mut manager = Manager::new(mesh.host("a").dir())?;
    let (ours, _) = std::os::unix::net::UnixStream::pair()?;
    manager.kept.push(("rules".into(), ours.into()));
    start(&mut mesh, "a", &mut manager)?;
    manager.listen(Duration::from_millis(200), None)?;
    ensure!(manager.position("FDSTORE=1").is_some(), "it did not make a socket of its own: {:?}", manager.said);
    ensure!(mesh.at("a").status()?.capture.on, "no capture");
    Ok(())
}

fn a_frozen_daemon_misses_the_watchdog() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    let mut manager = Manager::new(mesh.host("a").dir())?;
    let period = Duration::from_secs(2);
    manager.watchdog = Some(period);
    start(&mut mesh, "a", &mut manager)?;
    let fed = |manager: &mut Manager, lasts| {
        manager.said.clear();
        manager.listen(lasts, None)?;
        Ok::<_, anyhow::Error>(manager.said.iter().filter(|l| *l == "WATCHDOG=1").count())
    };
    let count = fed(&mut manager, period * 2)?;
    ensure!(count >= 4, "fed {count} times in two periods");
    mesh.at("a").signal("STOP")?;
    manager.listen(Duration::from_millis(200), None)?;
    equal!(fed(&mut manager, period * 2)?, 0, "times a frozen daemon fed its watchdog");
    mesh.at("a").signal("CONT")?;
    ensure!(fed(&mut manager, period * 2)? >= 2, "not fed after it went on");
    Ok(())
}

fn reload_applies_what_it_can_and_names_the_rest() -> Result<()> {
    let (mut mesh, mut manager) = managed_pair()?;
    let reload = |mesh: &Mesh, manager: &mut Manager, lines: &str| {
        mesh.at("a").configure(lines)?;
        manager.said.clear();
        mesh.at("a").signal("HUP")?;
        manager.until("RELOADING=1", PATIENCE)?;
        manager.until("READY=1", PATIENCE)?;
        let when = manager.said.iter().find_map(|l| l.strip_prefix("MONOTONIC_USEC=")).context("no time of the reload")?;
        ensure!(when.parse::<u64>()? > 0, "reloaded at {when}");
        Ok::<_, anyhow::Error>(())
    };
    // What is not valid changes nothing.
    reload(&mesh, &mut manager, "mode = \"strikt\"")?;
    mesh.at("a").configure("")?;
    equal!(mesh.at("a").status()?.mode, Mode::Permissive, "mode after a reload of nonsense");
    ensure!(mesh.at("a").log().contains("not valid"), "nobody was told: {}", mesh.at("a").log());
    reload(
        &mesh,
        &mut manager,
        "mode = \"strict\"\nskip_ports = [22, 8005]\nport = 7000\nlog_level = \"debug\"\ndrain = \"1s\"",
    )?;
    let status = mesh.at("a").status()?;
    equal!((status.mode, status.capture.on), (Mode::Strict, true), "after a reload");
    let log = mesh.at("a").log();
    ensure!(log.contains("need a restart") && log.contains("settings=\"port\""), "the port is not named: {log}");
    // The mesh still works, at the port it had.
    mesh.secured_between("b", "a", 8001)?;
    mesh.secured_between("a", "b", 8002)?;
    eventually(PATIENCE, "the log is more talkative", || {
        // Something to say: somebody who comes to the mesh port and goes again.
        drop(connect(mesh.host("b"), sockets(mesh.host("a"), 6374)[0])?);
        ensure!(mesh.at("a").log().contains("DEBUG"), "no debug lines: {}", mesh.at("a").log());
        Ok(())
    })?;
    eventually(PATIENCE, "b knows that a is strict", || {
        let nodes = mesh.at("b").nodes()?;
        ensure!(nodes.iter().any(|n| n.name.as_str() == "a" && n.mode == Some(Mode::Strict)), "{nodes:?}");
        Ok(())
    })?;
    // A port that is skipped now goes in plaintext, and plaintext from a member to another port is reset.
    let word = marker("skipped");
    let server = Server::answering(mesh.host("b"), 8005, "got ")?;
    mesh.readable(&word, || Ok(ask(mesh.host("a"), sockets(mesh.host("b"), 8005)[0], &word)?))?;
    drop(server);
    mesh.at_mut("b").kill();
    let server = Server::answering(mesh.host("a"), 8006, "got ")?;
    ensure!(ask(mesh.host("b"), sockets(mesh.host("a"), 8006)[0], "x").is_err(), "a strict host takes plaintext from a member");
    drop(server);
    Ok(())
}

fn unit(path: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(path);
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

const UNITS: [&str; 2] = ["meshd.service", "strict/meshd.service"];

fn the_capabilities_of_the_unit_are_enough() -> Result<()> {
    let text = unit(UNITS[0])?;
    let line = text.lines().find_map(|l| l.strip_prefix("CapabilityBoundingSet=")).context("no bounding set")?;
    let rights: Vec<String> = line.split(' ').map(|c| format!("+{}", c.trim_start_matches("CAP_").to_lowercase())).collect();
    let bounding = format!("--bounding-set=-all,{}", rights.join(","));
    let confined = ["setpriv", "--no-new-privs", "--inh-caps=-all", &bounding];
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    mesh.bring_up(|member| {
        let mut manager = Manager::new(member.dir())?;
        member.start_under(&mut manager, &confined)
    })?;
    let held = std::fs::read_to_string(format!("/proc/{}/status", mesh.at("a").pid()?))?;
    let held = held.lines().find_map(|l| l.strip_prefix("CapEff:")).context("no capabilities")?.trim().to_owned();
    // CAP_NET_BIND_SERVICE is 10, CAP_NET_ADMIN is 12.
    equal!(held, format!("{:016x}", 1 << 10 | 1 << 12), "capabilities of the daemon");
    mesh.secured_between("a", "b", 8000)?;
    // Units are still told apart, although the tree of control groups has to be walked for it.
    let mut units = Units::find().context("no cgroups")?;
    let name = format!("meshd-test-{}-confined.service", std::process::id());
    let cgroup = units.cgroup(&format!("system.slice/{name}"))?;
    let greeter = role::greeter("[::]:8001".parse()?, "hi");
    let serving = mesh.host("b").spawn(&mut inside(&cgroup, &greeter), "greeter")?;
    let to = sockets(mesh.host("b"), 8001)[0];
    eventually(SETTLED, "the unit of the server is known", || {
        let resolved = mesh.at("a").resolve(to)?;
        equal!(resolved.id.map(|id| id.workload.to_string()), Some(format!("/host/b/unit/{name}")), "expected at {to}");
        Ok(())
    })?;
    let heard = run_on(mesh.host("a"), &mut inside(&cgroup, &role::listener(to)))?;
    equal!(heard.trim(), "hi", "greeting");
    eventually(SETTLED, "the unit of the client is known", || {
        let edges = mesh.at("b").edges()?;
        let from = edges.iter().find(|e| e.port == 8001 && e.secured).and_then(|e| Some(e.client.as_ref()?.workload.to_string()));
        equal!(from, Some(format!("/host/a/unit/{name}")), "client of the greeter");
        Ok(())
    })?;
    drop(serving);
    // A client port below 1024 needs CAP_NET_BIND_SERVICE on the other side.
    let server = Server::answering(mesh.host("b"), 8002, "got ")?;
    let mut low = crate::support::traffic::connect_from(mesh.host("a"), 601, sockets(mesh.host("b"), 8002)[0])?;
    std::io::Write::write_all(&mut low, b"x\n")?;
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut low, &mut answer)?;
    ensure!(server.clients().iter().all(|c| c.port() < 1024), "the server saw {:?}", server.clients());
    Ok(())
}

fn the_units_are_valid_and_confined() -> Result<()> {
    let dir = std::env::temp_dir().join(format!("meshd-units-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let checked = UNITS.iter().try_for_each(|name| {
        // The program is where it is only on a host that has it installed.
        let file: PathBuf = dir.join("meshd.service");
        std::fs::write(&file, unit(name)?.replace("/usr/local/bin/meshd", env!("CARGO_BIN_EXE_meshd")))?;
        let analyze = |words: &[&str]| -> Result<String> {
            let output = command("systemd-analyze").args(words).arg(&file).output()?;
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            ensure!(output.status.success(), "systemd-analyze {words:?} of {name}: {text}");
            Ok(text)
        };
        let remarks = analyze(&["verify", "--man=no", "--recursive-errors=no"])?;
        ensure!(!remarks.contains("meshd.service:"), "{name}: {remarks}");
        // In tenths: 2.0 at most.
        let report = analyze(&["security", "--offline=yes", "--no-pager", "--threshold=20"])?;
        let exposure = report.lines().last().context("no verdict")?;
        ensure!(exposure.contains("exposure level"), "{exposure}");
        println!("{name}: {exposure}");
        Ok(())
    });
    std::fs::remove_dir_all(&dir)?;
    checked
}

/// Starts, restarts, reloads, kills, freezes and stops it under a systemd of its own; the script says what must hold.
fn boot(unit: &str) -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut script = Command::new(here.join("tests/systemd/boot"));
    let output = script.arg(env!("CARGO_BIN_EXE_meshd")).arg(here.join("systemd").join(unit)).output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{unit}: {text}");
    ensure!(text.contains("ok: nothing is left"), "the script ended early: {text}");
    Ok(())
}

fn the_unit_works_under_systemd() -> Result<()> {
    boot(UNITS[0])
}

fn the_strict_unit_works_under_systemd() -> Result<()> {
    boot(UNITS[1])
}

fn the_strict_unit_is_the_other_one_before_the_network() -> Result<()> {
    let settings = |text: &str| -> Vec<String> {
        text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_owned).collect()
    };
    let (plain, strict) = (settings(&unit(UNITS[0])?), settings(&unit(UNITS[1])?));
    let only = |a: &[String], b: &[String]| a.iter().filter(|l| !b.contains(l)).cloned().collect::<Vec<_>>();
    equal!(only(&plain, &strict), ["After=network.target"], "lines of the ordinary unit alone");
    let added = ["Before=network-pre.target", "Wants=network-pre.target", "Environment=MESHD_MODE=strict"];
    equal!(only(&strict, &plain), added, "lines of the strict unit alone");
    // The switch is known to the program.
    let shown = Command::new(env!("CARGO_BIN_EXE_meshd")).args(["config", "show"]).env("MESHD_MODE", "strict").output()?;
    if !String::from_utf8_lossy(&shown.stdout).contains("mode = \"strict\"") {
        bail!("MESHD_MODE does not make it strict");
    }
    Ok(())
}
