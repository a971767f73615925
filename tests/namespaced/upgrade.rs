//! Upgrades: a daemon leaves its work to another process, and no connection is cut.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::demo::lab::Host;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::manager::Manager;
use crate::support::mesh::{MESHD, Mesh, Setup};
use crate::support::scenario::{Need, Scenario, scenario};
use crate::support::traffic::{Pattern, Server, connect, dial, echo, echo_all, listen, sockets};
use crate::support::{equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("upgrade", open_connections_and_new_ones_go_on_across_two_upgrades_of_both_hosts),
    scenario!("upgrade", a_transfer_goes_on_at_both_ends),
    scenario!("upgrade", a_broken_program_changes_nothing, Need::Program("bash")),
    scenario!("upgrade", a_banished_host_loses_what_an_older_process_carries),
    scenario!("upgrade", an_older_process_outlives_the_new_one_and_still_obeys),
    scenario!("upgrade", a_stop_is_one_for_all_and_the_bound_is_kept),
    scenario!("upgrade", the_service_manager_follows),
];

const PATIENCE: Duration = Duration::from_secs(20);
/// Connections that stay open, in each direction.
const KEPT: usize = 250;

fn pair() -> Result<Mesh> {
    Setup::of(&["a", "b"]).start()
}

/// One that stays open: a word every now and then, each another, each answered.
async fn keep(host: Host, to: SocketAddr, number: u64, over: Arc<AtomicBool>, open: Arc<AtomicUsize>) -> Result<u64> {
    let mut stream = dial(&host, to).await?;
    let mut count = 0u64;
    while !over.load(Ordering::Relaxed) || count < 3 {
        let word = (number << 32 | count).to_be_bytes();
        let mut answer = [0; 8];
        timeout(PATIENCE, stream.write_all(&word)).await.context("not taken")?.context("write")?;
        timeout(PATIENCE, stream.read_exact(&mut answer)).await.context("no answer")?.context("read")?;
        equal!(word, answer, "an answer");
        if count == 0 {
            open.fetch_add(1, Ordering::Relaxed);
        }
        count += 1;
        sleep(Duration::from_millis(150 + number % 50)).await;
    }
    stream.shutdown().await?;
    equal!(timeout(PATIENCE, stream.read(&mut [0; 8])).await.context("no end")??, 0, "bytes after the end");
    Ok(count)
}

/// New connections, one after the other.
async fn load(host: Host, to: [SocketAddr; 2], over: Arc<AtomicBool>, done: Arc<AtomicU64>) -> Result<u64> {
    let mut number = 0u64;
    while !over.load(Ordering::Relaxed) {
        let one = async {
            let mut stream = dial(&host, to[(number % 2) as usize]).await?;
            stream.write_all(&number.to_be_bytes()).await?;
            let mut answer = [0; 8];
            stream.read_exact(&mut answer).await?;
            equal!(answer, number.to_be_bytes(), "an answer");
            stream.shutdown().await?;
            equal!(stream.read(&mut answer).await?, 0, "bytes after the end");
            Ok::<_, anyhow::Error>(())
        };
        timeout(PATIENCE, one).await.context("too slow").flatten().with_context(|| format!("new connection {number}"))?;
        number += 1;
        done.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_millis(4)).await;
    }
    Ok(number)
}

fn open_connections_and_new_ones_go_on_across_two_upgrades_of_both_hosts() -> Result<()> {
    meshd::intercept::process::raise_file_limit()?;
    let mesh = pair()?;
    let listeners = ["a", "b"].map(|name| listen(mesh.host(name), 8000));
    let hosts = ["a", "b"].map(|name| mesh.host(name).clone());
    let mesh = Arc::new(std::sync::Mutex::new(mesh));
    let over = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (open, opened) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
    let (words, new) = runtime.block_on(async {
        for listener in listeners {
            echo_all(listener?)?;
        }
        let mut kept = JoinSet::new();
        for (from, to) in [(0, 1), (1, 0)] {
            for number in 0..KEPT {
                let to = sockets(&hosts[to], 8000)[number % 2];
                let (host, over, open) = (hosts[from].clone(), over.clone(), open.clone());
                let name = host.name.clone();
                kept.spawn(
                    async move { keep(host, to, number as u64, over, open).await.with_context(|| format!("{name} {number}")) },
                );
            }
        }
        let mut new = JoinSet::new();
        for (from, to) in [(0, 1), (1, 0)] {
            let (host, to) = (hosts[from].clone(), sockets(&hosts[to], 8000));
            new.spawn(load(host, to, over.clone(), opened.clone()));
        }
        let all = async {
            while open.load(Ordering::Relaxed) < 2 * KEPT {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, all).await.with_context(|| format!("only {} connections are open", open.load(Ordering::Relaxed)))?;
        let upgrading = {
            let (mesh, opened) = (mesh.clone(), opened.clone());
            tokio::task::spawn_blocking(move || -> Result<()> {
                let mut mesh = mesh.lock().unwrap();
                for (round, name) in ["a", "b", "a", "b"].into_iter().enumerate() {
                    let before = opened.load(Ordering::Relaxed);
                    let done = mesh.at_mut(name).upgrade()?;
                    println!(
                        "upgrade {round} of {name}: {} connections stay, {} new ones meanwhile",
                        done.older.connections,
                        opened.load(Ordering::Relaxed) - before
                    );
                    if round < 2 {
                        ensure!(done.older.connections as usize >= 2 * KEPT, "only {done:?}");
                    }
                    equal!(mesh.at(name).status()?.pid, done.pid, "the process that answers");
                    std::thread::sleep(Duration::from_secs(2));
                }
                Ok(())
            })
        };
        let upgraded = upgrading.await?;
        over.store(true, Ordering::Relaxed);
        let (mut words, mut failed) = (0, Vec::new());
        while let Some(done) = kept.join_next().await {
            match done? {
                Ok(count) => words += count,
                Err(error) => failed.push(error),
            }
        }
        let mut many = 0;
        while let Some(done) = new.join_next().await {
            match done? {
                Ok(count) => many += count,
                Err(error) => failed.push(error),
            }
        }
        upgraded?;
        if let Some(first) = failed.first() {
            anyhow::bail!("{} failed, the first: {first:#}", failed.len());
        }
        Ok((words, many))
    })?;
    println!("{} connections exchanged {words} words, {new} new ones", 2 * KEPT);
    ensure!(new > 500, "only {new} new connections");
    drop(runtime);
    let mut mesh = Arc::into_inner(mesh).context("still used")?.into_inner().unwrap();
    for name in ["a", "b"] {
        // Nothing is open any more: the processes of before end by themselves.
        mesh.at_mut(name).older_ended_well(PATIENCE).with_context(|| mesh.at(name).log())?;
        eventually(PATIENCE, "no older processes", || {
            let older = mesh.at(name).status()?.older;
            ensure!(older.is_empty(), "{older:?}");
            Ok(())
        })?;
        let failed: Vec<_> = mesh.at(name).edges()?.into_iter().filter(|e| e.failed > 0).collect();
        ensure!(failed.is_empty(), "{failed:?}");
    }
    mesh.secured_between("a", "b", 8001)
}

/// How many MB a long transfer is, and how many a second.
fn transfer() -> (u64, u64) {
    let of = |name: &str, usual| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(usual);
    (of("MESHD_TEST_TRANSFER_MB", 300), of("MESHD_TEST_TRANSFER_MB_PER_SECOND", 40))
}

const BLOCK: usize = 64 * 1024;
const BLOCKS_PER_MB: u64 = 16;

/// Sends a pattern to whoever comes, at a limited rate.
fn sender(mesh: &Mesh, name: &str, port: u16) -> Result<Server> {
    let (total, rate) = transfer();
    Server::start(mesh.host(name), port, move |mut stream| {
        let (mut pattern, mut block) = (Pattern::new(7), vec![0; BLOCK]);
        let began = tokio::time::Instant::now();
        for number in 0..total * BLOCKS_PER_MB {
            pattern.fill(&mut block);
            stream.write_all(&block)?;
            let due = Duration::from_micros(number * 1_000_000 / (rate * BLOCKS_PER_MB));
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
        Ok(())
    })
}

fn a_transfer_goes_on_at_both_ends() -> Result<()> {
    let mut mesh = pair()?;
    let server = sender(&mesh, "b", 8000)?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    let (total, rate) = transfer();
    let received = Arc::new(AtomicU64::new(0));
    let counted = received.clone();
    let began = tokio::time::Instant::now();
    let reading = std::thread::spawn(move || -> Result<()> {
        let (mut pattern, mut expected, mut block) = (Pattern::new(7), vec![0; BLOCK], vec![0; BLOCK]);
        for number in 0..total * BLOCKS_PER_MB {
            pattern.fill(&mut expected);
            stream.read_exact(&mut block).with_context(|| format!("block {number}"))?;
            ensure!(block == expected, "block {number} was changed on the way");
            counted.store(number + 1, Ordering::Relaxed);
        }
        equal!(stream.read(&mut block)?, 0, "bytes after the end");
        Ok(())
    });
    // One third done at least, as it should be by then.
    eventually(Duration::from_secs(total / rate + 60), "a third", || {
        ensure!(received.load(Ordering::Relaxed) > total * BLOCKS_PER_MB / 3, "not yet");
        Ok(())
    })?;
    for name in ["a", "b"] {
        let done = mesh.at_mut(name).upgrade()?;
        println!("{name} upgraded at {} MB", received.load(Ordering::Relaxed) / BLOCKS_PER_MB);
        equal!(done.older.connections, 1, "connections that stay");
    }
    let upgraded_at = received.load(Ordering::Relaxed);
    ensure!(upgraded_at < total * BLOCKS_PER_MB, "over before the upgrades were");
    ensure!(mesh.at_mut("a").older_run()? && mesh.at_mut("b").older_run()?, "an older process is gone before its connection");
    reading.join().map_err(|_| anyhow::anyhow!("the reader died"))??;
    println!("{total} MB in {:.1} s", began.elapsed().as_secs_f64());
    for name in ["a", "b"] {
        mesh.at_mut(name).older_ended_well(PATIENCE)?;
    }
    drop(server);
    Ok(())
}

/// A copy of the program that a daemon is to run from, so that it can be replaced.
fn installed(mesh: &Mesh, name: &str) -> Result<PathBuf> {
    let path = mesh.host(name).dir().join("meshd");
    // By another process: a child that a scenario beside this one is about to start would hold a descriptor that this one writes with, and a program
    // that somebody may write to cannot be run.
    ensure!(Command::new("cp").arg(MESHD).arg(&path).status()?.success(), "no copy of the program");
    Ok(path)
}

/// As install(1) does: another file of the same name.
fn install(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, bytes)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(mode))?;
    Ok(std::fs::rename(&new, path)?)
}

fn a_broken_program_changes_nothing() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    let program = installed(&mesh, "a")?;
    let words = program.to_str().context("a path")?.to_owned();
    mesh.bring_up(|member| if member.name == "a" { member.start_through(&words, &["run"]) } else { member.start() })?;
    let server = Server::patient_echo(mesh.host("b"), 8000, Duration::from_secs(120))?;
    let mut kept = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    echo(&mut kept, "before")?;
    let (pid, descriptors) = (mesh.at("a").pid()?, mesh.at("a").descriptors()?);
    let mut refused = |mesh: &Mesh, why: &str| -> Result<()> {
        let (ok, out, err) = mesh.at("a").try_cli(&["upgrade"])?;
        ensure!(!ok && err.contains("goes on as before") && err.contains(why), "{why}: {out}{err}");
        equal!((mesh.at("a").status()?.pid, mesh.at("a").status()?.older.len()), (pid, 0), "process, older ones");
        echo(&mut kept, why)?;
        let mut new = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[1])?;
        echo(&mut new, why)
    };
    install(&program, b"#!/bin/sh\nexit 1\n", 0o755)?;
    refused(&mesh, "ended before it was ready")?;
    install(&program, b"#!/bin/sh\nexit 1\n", 0o644)?;
    refused(&mesh, "Permission denied")?;
    install(&program, b"\x7fELF of another machine", 0o755)?;
    refused(&mesh, "ended before it was ready")?;
    std::fs::remove_file(&program)?;
    refused(&mesh, "No such file")?;
    install(
        &program,
        format!("#!/bin/sh\necho $$ > {}/hung\nexec sleep 600\n", mesh.host("a").dir().display()).as_bytes(),
        0o755,
    )?;
    refused(&mesh, "said nothing")?;
    let hung = std::fs::read_to_string(mesh.host("a").dir().join("hung"))?;
    eventually(PATIENCE, "the hung program is gone", || {
        // Dead and not waited for is gone.
        let state = std::fs::read_to_string(format!("/proc/{}/stat", hung.trim())).unwrap_or_default();
        ensure!(state.is_empty() || state.contains(") Z "), "{state}");
        Ok(())
    })?;
    // A good one that does not like the configuration says so.
    install(&program, &std::fs::read(MESHD)?, 0o755)?;
    mesh.at("a").configure("of_another_version = true")?;
    // Not by the command, which would not like it either.
    mesh.at("a").signal("USR2")?;
    eventually(PATIENCE, "the new program says why", || {
        let log = mesh.at("a").log();
        ensure!(
            log.contains("does not start: error: the configuration is not valid") && log.contains("of_another_version"),
            "{log}"
        );
        Ok(())
    })?;
    mesh.at("a").configure("")?;
    equal!(mesh.at("a").status()?.pid, pid, "the process that serves");
    eventually(PATIENCE, "nothing is left open", || {
        let now = mesh.at("a").descriptors()?;
        ensure!(now <= descriptors + 4, "{now} descriptors, {descriptors} before");
        Ok(())
    })?;
    // One that fails when everything is its own already: it is taken back, and open connections do not notice.
    let late = "#!/bin/bash\nprintf '{\"word\":\"ready\",\"version\":\"9.9.9\"}' >&$_MESHD_LINE\nsleep 1\n";
    install(&program, late.as_bytes(), 0o755)?;
    let (ok, out, err) = mesh.at("a").try_cli(&["upgrade"])?;
    ensure!(!ok && err.contains("meshd 9.9.9 was started and could not take over"), "{out}{err}");
    echo(&mut kept, "after all of it")?;
    let status = mesh.at("a").status()?;
    equal!((status.pid, status.capture.on), (pid, true), "after a failure that came late");
    equal!(status.older.iter().map(|o| (o.pid, o.connections)).collect::<Vec<_>>(), vec![(pid, 1)], "what is left of before");
    mesh.settled()?;
    mesh.secured_between("a", "b", 8001)?;
    mesh.secured_between("b", "a", 8002)?;
    // And the next one that is good is taken; what was left twice is carried on.
    install(&program, &std::fs::read(MESHD)?, 0o755)?;
    let done = mesh.at_mut("a").upgrade()?;
    equal!(done.older.connections, 1, "connections that stay");
    echo(&mut kept, "after an upgrade")?;
    drop(kept);
    mesh.at_mut("a").older_ended_well(PATIENCE)?;
    drop(server);
    Ok(())
}

/// Whether a connection is cut within a moment.
fn is_cut(stream: &mut TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let error = stream.read(&mut [0; 1]).err().context("a clean end, or bytes")?;
    equal!(error.kind(), std::io::ErrorKind::ConnectionReset, "how it ended");
    Ok(())
}

fn a_banished_host_loses_what_an_older_process_carries() -> Result<()> {
    let mut mesh = pair()?;
    let servers = [Server::echo(mesh.host("a"), 8000)?, Server::echo(mesh.host("b"), 8000)?];
    // Two generations, and both directions.
    let mut open = Vec::new();
    for round in 0..2 {
        for (from, to) in [("a", "b"), ("b", "a")] {
            let mut stream = connect(mesh.host(from), sockets(mesh.host(to), 8000)[round])?;
            echo(&mut stream, "before")?;
            open.push(stream);
        }
        mesh.at_mut("a").upgrade()?;
    }
    for stream in &mut open {
        echo(stream, "after")?;
    }
    equal!(mesh.at("a").status()?.older.len(), 2, "older processes");
    mesh.at("a").cli(&["banish", "b", "--yes"])?;
    for stream in &mut open {
        is_cut(stream)?;
    }
    mesh.at_mut("a").older_ended_well(PATIENCE)?;
    drop(servers);
    Ok(())
}

fn an_older_process_outlives_the_new_one_and_still_obeys() -> Result<()> {
    let mut mesh = pair()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    echo(&mut stream, "before")?;
    mesh.at_mut("a").upgrade()?;
    mesh.at_mut("a").kill();
    echo(&mut stream, "without anybody")?;
    // Nothing of it is in the way of a start, as a service manager would do it.
    mesh.at_mut("a").start()?;
    mesh.at("a").until_answers()?;
    mesh.settled()?;
    mesh.secured_between("a", "b", 8001)?;
    echo(&mut stream, "beside a new one")?;
    mesh.at("a").cli(&["banish", "b", "--yes"])?;
    is_cut(&mut stream)?;
    mesh.at_mut("a").older_ended_well(PATIENCE)?;
    drop(server);
    Ok(())
}

fn a_stop_is_one_for_all_and_the_bound_is_kept() -> Result<()> {
    let mut mesh =
        Setup::of(&["a", "b"]).configured_on("a", "drain = \"3s\"").configured_on("b", "upgrade_drain = \"4s\"").start()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    echo(&mut stream, "before")?;
    mesh.at_mut("a").upgrade()?;
    mesh.at_mut("a").upgrade()?;
    let began = tokio::time::Instant::now();
    mesh.at_mut("a").stop()?;
    let took = began.elapsed();
    ensure!(took > Duration::from_millis(2500), "the connection of an older process did not have its time: {took:?}");
    is_cut(&mut stream)?;
    mesh.at_mut("a").older_ended_well(Duration::from_secs(1))?;
    // Its own bound ends a connection, too.
    mesh.at_mut("a").start()?;
    mesh.at("a").until_answers()?;
    mesh.settled()?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    echo(&mut stream, "before")?;
    mesh.at_mut("b").upgrade()?;
    is_cut(&mut stream)?;
    mesh.at_mut("b").older_ended_well(PATIENCE)?;
    drop(server);
    Ok(())
}

fn the_service_manager_follows() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    let mut manager = Manager::new(mesh.host("a").dir())?;
    manager.watchdog = Some(Duration::from_secs(2));
    mesh.bring_up(|member| if member.name == "a" { member.start_under(&mut manager, &[]) } else { member.start() })?;
    manager.until("READY=1", PATIENCE)?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    echo(&mut stream, "before")?;
    manager.said.clear();
    // By signal, as `systemctl kill -s USR2` sends it.
    mesh.at("a").signal("USR2")?;
    manager.until("READY=1", PATIENCE)?;
    let main = manager.said.iter().position(|l| l.starts_with("MAINPID=")).with_context(|| format!("{:?}", manager.said))?;
    let pid: u32 = manager.said[main]["MAINPID=".len()..].parse()?;
    equal!(mesh.at("a").status()?.pid, pid, "the main process");
    mesh.at_mut("a").begot(pid)?;
    ensure!(Some(main) < manager.position("READY=1"), "ready before it is the service: {:?}", manager.said);
    ensure!(!manager.said.iter().any(|l| l.starts_with("STOPPING") || l.starts_with("FDSTORE")), "{:?}", manager.said);
    equal!(manager.kept.len(), 1, "descriptors kept");
    // What was said meanwhile is none of it.
    manager.listen(Duration::from_millis(50), None)?;
    manager.said.clear();
    manager.listen(Duration::from_secs(4), None)?;
    let fed = manager.said.iter().filter(|l| *l == "WATCHDOG=1").count();
    // One process feeds it, four times in each period.
    ensure!((4..=10).contains(&fed), "fed {fed} times in two periods");
    echo(&mut stream, "after")?;
    drop(stream);
    mesh.at_mut("a").older_ended_well(PATIENCE)?;
    manager.said.clear();
    mesh.at_mut("a").stop()?;
    manager.listen(Duration::from_millis(300), None)?;
    ensure!(manager.position("STOPPING=1").is_some() && manager.kept.is_empty(), "{:?} {:?}", manager.said, manager.kept);
    drop(server);
    Ok(())
}
