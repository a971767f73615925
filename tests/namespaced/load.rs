//! Many connections: short ones in a row, idle ones at once, and downloads that nobody reads. What they cost and whom they hold up.
//!
//! `MESHD_TEST_CONNECTIONS` says how many short and idle ones; the whole story is 100,000.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::support::mesh::{Mesh, Setup};
use crate::support::scenario::{Scenario, scenario};
use crate::support::traffic::{dial, echo_all, listen, sockets};
use crate::support::{equal, eventually, slower};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("load", short_connections_in_a_row_use_nothing_up),
    scenario!("load", idle_connections_cost_little_and_wake_at_once),
    scenario!("load", downloads_that_nobody_reads_hold_up_nobody),
];

/// Long enough for anything on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(20);
/// Workers that open one short connection after another.
const AT_ONCE: usize = 16;
/// The most that an idle connection may cost one daemon. In a build for tests, whose futures are not as tight as a release's.
const IDLE_KIB: u64 = 8;
/// What a daemon may do while nobody wants anything of it: how often a thread of it wakes up in a second, and how much of a core.
const MOST_WAKEUPS: f64 = 120.0;
const MOST_CPU: f64 = 0.05;
/// TIME_WAIT between two daemons that is no exhaustion: a handshake now and then.
const FEW: usize = 500;

fn connections(usual: usize) -> usize {
    std::env::var("MESHD_TEST_CONNECTIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

fn run<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// Says the eight bytes it gets back, and closes first, as a web server does.
async fn answer_once(mut stream: TcpStream) -> std::io::Result<()> {
    let mut word = [0; 8];
    stream.read_exact(&mut word).await?;
    stream.write_all(&word).await?;
    stream.shutdown().await?;
    // Until the client has closed as well.
    stream.read(&mut word).await.map(drop)
}

/// One short connection.
async fn ask_once(mesh: &Mesh, to: SocketAddr, number: u64) -> Result<()> {
    let mut stream = dial(mesh.host("a"), to).await?;
    stream.write_all(&number.to_be_bytes()).await?;
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.context("no answer")??;
    equal!(answer, number.to_be_bytes().to_vec(), "an answer");
    Ok(())
}

/// How many connections with the mesh port a host remembers in TIME_WAIT.
fn waiting(mesh: &Mesh, name: &str) -> Result<usize> {
    const MESH_PORT: &str = ":18E6";
    let own =
        |file: &str| std::fs::read_to_string(format!("/proc/{}/net/{file}", mesh.at(name).pid()?)).map_err(anyhow::Error::from);
    let tables = own("tcp")? + &own("tcp6")?;
    let waits = |line: &&str| {
        let fields: Vec<_> = line.split_whitespace().take(4).collect();
        matches!(fields[..], [_, from, to, "06"] if from.ends_with(MESH_PORT) || to.ends_with(MESH_PORT))
    };
    Ok(tables.lines().filter(waits).count())
}

fn short_connections_in_a_row_use_nothing_up() -> Result<()> {
    let mesh = Arc::new(Setup::of(&["a", "b"]).start()?);
    let listener = listen(mesh.host("b"), 8000)?;
    let to = sockets(mesh.host("b"), 8000)[0];
    let many = connections(10_000) as u64;
    let before = [mesh.at("a").descriptors()?, mesh.at("b").descriptors()?];
    let took = run(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer_once(stream));
            }
        });
        let began = Instant::now();
        let mut workers = JoinSet::new();
        for worker in 0..AT_ONCE as u64 {
            let mesh = mesh.clone();
            workers.spawn(async move {
                for number in (worker..many).step_by(AT_ONCE) {
                    ask_once(&mesh, to, number).await.with_context(|| format!("connection {number}"))?;
                }
                Ok::<_, anyhow::Error>(())
            });
        }
        while let Some(done) = workers.join_next().await {
            done??;
        }
        Ok(began.elapsed())
    })?;
    println!("{many} short connections in {:.1} s", took.as_secs_f64());
    for name in ["a", "b"] {
        let waiting = waiting(&mesh, name)?;
        ensure!(waiting < FEW, "{waiting} connections between the daemons in TIME_WAIT on {name}");
    }
    for (name, before) in ["a", "b"].into_iter().zip(before) {
        // What is kept for the next ones, and no more: a worker may begin the next one before the tunnels of the last ones are at rest.
        let most = before + 3 * AT_ONCE;
        let back = || match mesh.at(name).descriptors()? {
            now if now <= most => Ok(()),
            now => anyhow::bail!("{now} descriptors of {name}, {before} before"),
        };
        eventually(Duration::from_secs(10), "descriptors back to the start", back)?;
    }
    // The first ones may still have spoken as the node.
    let edges: Vec<_> = mesh.at("a").edges()?.into_iter().filter(|e| e.port == 8000).collect();
    let (total, failed): (u64, u64) = (edges.iter().map(|e| e.total).sum(), edges.iter().map(|e| e.failed).sum());
    equal!((failed, edges.iter().all(|e| e.secured)), (0, true), "failures, secured");
    // What was asked of a tunnel that its peer was just closing is asked again in another, and counted again.
    ensure!((many..=many + many / 100).contains(&total), "{total} connections counted of {many}");
    Ok(())
}

/// A word and its echo.
async fn answered(stream: &mut TcpStream) -> Result<()> {
    let mut word = [7; 16];
    stream.write_all(&word).await?;
    timeout(PATIENCE, stream.read_exact(&mut word)).await.context("no answer")??;
    Ok(())
}

/// What a process does while nobody wants anything of it, for each second.
#[derive(Clone, Copy)]
struct Rest {
    /// How often one of its threads slept and was woken.
    wakeups: f64,
    /// For how long, of a core.
    cpu: f64,
}

impl std::fmt::Display for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} wake-ups a second, {:.2} % of a core", self.wakeups, self.cpu * 100.0)
    }
}

/// Looks at both daemons for some time.
async fn at_rest(mesh: &Mesh, lasts: Duration) -> Result<[Rest; 2]> {
    let look = || -> Result<Vec<(u64, u64)>> { ["a", "b"].iter().map(|name| mesh.at(name).sleeps()).collect() };
    let (before, began) = (look()?, Instant::now());
    sleep(lasts).await;
    let (after, took) = (look()?, began.elapsed().as_secs_f64());
    Ok([0, 1]
        .map(|n| Rest { wakeups: (after[n].0 - before[n].0) as f64 / took, cpu: (after[n].1 - before[n].1) as f64 / 1e9 / took }))
}

fn idle_connections_cost_little_and_wake_at_once() -> Result<()> {
    // Both ends of each are in this process, and two sockets in each daemon.
    let many = connections(2_000).min(25_000);
    let files = 3 * many as u64 + 10_000;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if limit.current.is_some_and(|now| now < files) {
        let more = rustix::process::Rlimit { current: Some(files), maximum: limit.maximum.map(|most| most.max(files)) };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, more).context("more files are needed")?;
    }
    let mesh = Setup::of(&["a", "b"]).start()?;
    let listener = listen(mesh.host("b"), 8000)?;
    let to = sockets(mesh.host("b"), 8000);
    let wait = Duration::from_secs(std::env::var("MESHD_TEST_IDLE_SECONDS").ok().and_then(|n| n.parse().ok()).unwrap_or(5));
    if wait > Duration::from_secs(60) {
        // As after days: the kernel forgets a connection of which it hears nothing.
        for name in ["a", "b"] {
            let file = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
            mesh.host(name).within(|| std::fs::write(file, "45"))?.context("shorten the memory of connections")?;
        }
    }
    run(async {
        echo_all(listener)?;
        // Nobody connects: what the daemons do for themselves.
        let quiet = at_rest(&mesh, wait).await?;
        // The first ones pay for what is there once.
        let mut open = Vec::new();
        for number in 0..100 {
            open.push(dial(mesh.host("a"), to[number % 2]).await?);
            answered(open.last_mut().context("just pushed")?).await?;
        }
        let before = [mesh.at("a").kib("VmRSS:")?, mesh.at("b").kib("VmRSS:")?];
        let began = Instant::now();
        // Some at once: a processor that is emulated takes its time for a handshake.
        let mut opening = JoinSet::new();
        for number in 0..many {
            if opening.len() == 8 {
                open.push(opening.join_next().await.context("just spawned")???);
            }
            let (host, to) = (mesh.host("a").clone(), to[number % 2]);
            opening.spawn(async move {
                let mut stream = timeout(PATIENCE, dial(&host, to)).await.context("no connection")??;
                answered(&mut stream).await.map(|()| stream)
            });
            if number % 5000 == 4999 {
                println!("{} connections after {:.0} s", number + 1, began.elapsed().as_secs_f64());
            }
        }
        while let Some(opened) = opening.join_next().await {
            open.push(opened??);
        }
        sleep(Duration::from_secs(1)).await;
        let idle = at_rest(&mesh, wait).await?;
        for ((name, before), (quiet, idle)) in ["a", "b"].into_iter().zip(before).zip(quiet.into_iter().zip(idle)) {
            let now = mesh.at(name).kib("VmRSS:")?;
            let each = now.saturating_sub(before) as f64 / many as f64;
            println!("{name}: {before} KiB, with {many} idle connections more {now} KiB: {each:.1} KiB each");
            ensure!(each <= IDLE_KIB as f64, "{each:.1} KiB for an idle connection at {name}");
            println!("{name} at rest: {quiet}; with {} idle connections: {idle}", open.len());
            ensure!(
                idle.wakeups <= quiet.wakeups * 1.5 + 5.0,
                "{name} wakes up for connections that carry nothing: {idle}, {quiet} without"
            );
            ensure!(idle.wakeups <= MOST_WAKEUPS && idle.cpu <= MOST_CPU * f64::from(slower()), "{name} is not at rest: {idle}");
        }
        let mut slowest = Duration::ZERO;
        for stream in &mut open {
            let began = Instant::now();
            answered(stream).await?;
            slowest = slowest.max(began.elapsed());
        }
        println!("the slowest first answer after that took {:.1} ms", slowest.as_secs_f64() * 1e3);
        ensure!(slowest < Duration::from_secs(1) * slower(), "an idle connection took {slowest:?} to wake");
        Ok(())
    })
}

/// Small requests over connections of their own, each 20th on a new one. When each was due is where its time begins, however late it was sent.
async fn requests(mesh: &Arc<Mesh>, from: &'static str, to: SocketAddr, lasts: Duration) -> Result<Duration> {
    const RATE: u64 = 1000;
    let number_of = (lasts.as_secs_f64() * RATE as f64) as u64;
    let mut due = interval(Duration::from_micros(1_000_000 / RATE));
    due.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut asked = JoinSet::new();
    let mut kept: Vec<TcpStream> = Vec::new();
    let (mut took, mut failed) = (Vec::new(), Vec::new());
    let end = |done: Result<(Duration, Option<TcpStream>)>, kept: &mut Vec<TcpStream>, took: &mut Vec<_>, failed: &mut Vec<_>| {
        match done {
            Ok((time, stream)) => {
                took.push(time);
                kept.extend(stream);
            }
            Err(error) => failed.push(error),
        }
    };
    for number in 0..number_of {
        let began = due.tick().await;
        let (mesh, stream) = (mesh.clone(), if number % 20 == 0 { None } else { kept.pop() });
        asked.spawn(async move {
            let mut stream = match stream {
                Some(stream) => stream,
                None => timeout(PATIENCE, dial(mesh.host(from), to)).await.context("no connection")??,
            };
            stream.write_all(&number.to_be_bytes()).await?;
            let mut answer = [0; 8];
            timeout(PATIENCE, stream.read_exact(&mut answer)).await.context("no answer")??;
            equal!(u64::from_be_bytes(answer), number, "an answer");
            Ok::<_, anyhow::Error>((began.elapsed(), (number % 20 != 0).then_some(stream)))
        });
        while let Some(done) = asked.try_join_next() {
            end(done?, &mut kept, &mut took, &mut failed);
        }
    }
    while let Some(done) = asked.join_next().await {
        end(done?, &mut kept, &mut took, &mut failed);
    }
    if let Some(first) = failed.first() {
        anyhow::bail!("{} of {number_of} requests failed, the first: {first:#}", failed.len());
    }
    took.sort_unstable();
    Ok(took[took.len() * 99 / 100])
}

/// Answers words with themselves, and one of ones with a download without an end. Counts what it sent of those.
async fn words_and_downloads(listener: std::net::TcpListener, sent: Arc<AtomicU64>) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    while let Ok((mut stream, _)) = listener.accept().await {
        let sent = sent.clone();
        tokio::spawn(async move {
            let mut word = [0; 8];
            while stream.read_exact(&mut word).await.is_ok() {
                if word == [0xff; 8] {
                    // More than all buffers on the way hold.
                    while let Ok(bytes) = stream.write(&[1; 64 * 1024]).await {
                        sent.fetch_add(bytes as u64, Ordering::Relaxed);
                    }
                }
                if stream.write_all(&word).await.is_err() {
                    return;
                }
            }
        });
    }
    Ok(())
}

/// What the kernel holds for all TCP sockets of this machine.
fn tcp_memory() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/net/sockstat")?;
    let line = text.lines().find_map(|line| line.strip_prefix("TCP:")).context("no line about TCP")?;
    let pages: u64 = line.split_whitespace().skip_while(|w| *w != "mem").nth(1).context("no pages")?.parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}

/// Two pairs of hosts, the same but for the downloads between c and d, are asked in turns of a second. So whatever else the machine does hits
/// both; what is compared are the medians of the turns' 99th percentiles, and only when they differ three times in a row is it not the machine.
/// Traffic that is held up by its neighbours, such as behind a window that all share, waits for ever and fails whatever the machine does.
fn downloads_that_nobody_reads_hold_up_nobody() -> Result<()> {
    const DOWNLOADS: usize = 80;
    const TURNS: usize = 5;
    const TRIES: usize = 3;
    /// What a machine that runs other scenarios beside this one does to a request at any time: below it there is nothing to compare.
    const NOISE: Duration = Duration::from_millis(10);
    let mesh = Arc::new(Setup::of(&["a", "b", "c", "d"]).start()?);
    let listeners = ["b", "d"].map(|name| listen(mesh.host(name), 8000));
    let (quiet, beside) = (sockets(mesh.host("b"), 8000)[0], sockets(mesh.host("d"), 8000)[0]);
    let sent = Arc::new(AtomicU64::new(0));
    run(async {
        for listener in listeners {
            tokio::spawn(words_and_downloads(listener?, sent.clone()));
        }
        let kernel = tcp_memory()?;
        let began = Instant::now();
        let mut downloads = Vec::new();
        for _ in 0..DOWNLOADS {
            let mut stream = dial(mesh.host("c"), beside).await?;
            stream.write_all(&[0xff; 8]).await?;
            downloads.push(stream);
        }
        // Until all buffers on the way are full, through two daemons.
        let mut before = 0;
        while before == 0 || before != sent.load(Ordering::Relaxed) {
            before = sent.load(Ordering::Relaxed);
            sleep(Duration::from_secs(1)).await;
        }
        println!(
            "{DOWNLOADS} downloads stand still after {:.1} MB each and {:.0} s; {} MiB of the kernel's",
            before as f64 / 1e6 / DOWNLOADS as f64,
            began.elapsed().as_secs_f64(),
            tcp_memory()?.saturating_sub(kernel) >> 20
        );
        for number in 1..=TRIES {
            let mut times = [Vec::new(), Vec::new()];
            for _ in 0..TURNS {
                times[0].push(requests(&mesh, "a", quiet, Duration::from_secs(1)).await.context("without downloads")?);
                times[1].push(requests(&mesh, "c", beside, Duration::from_secs(1)).await.context("beside downloads")?);
            }
            let shown = times.each_ref().map(|t| t.iter().map(|t| format!("{:.1}", t.as_secs_f64() * 1e3)).collect::<Vec<_>>());
            let [quiet, beside] = times.map(|mut times| {
                times.sort_unstable();
                times[times.len() / 2]
            });
            println!(
                "p99 {:.1} ms, beside {DOWNLOADS} downloads {:.1} ms (turns: {:?})",
                quiet.as_secs_f64() * 1e3,
                beside.as_secs_f64() * 1e3,
                shown
            );
            if beside <= 2 * quiet.max(NOISE) {
                break;
            }
            ensure!(number < TRIES, "p99 {beside:?} beside downloads that nobody reads, {quiet:?} without");
        }
        for name in ["c", "d"] {
            let memory = mesh.at(name).kib("VmRSS:")?;
            ensure!(memory < 128 * 1024, "{memory} KiB for {DOWNLOADS} downloads that stand still");
        }
        // They stood still, and are whole: the first bytes are there at once.
        for stream in &mut downloads {
            let mut some = [0; 1000];
            timeout(PATIENCE, stream.read_exact(&mut some)).await.context("a download that is stuck")??;
            ensure!(some.iter().all(|b| *b == 1), "other bytes than were sent");
        }
        Ok(())
    })
}
