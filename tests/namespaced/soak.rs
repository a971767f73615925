//! Everything at once, for a minute in CI and for an hour by hand (`MESHD_TEST_SOAK_SECONDS=3600`): short and long connections whose bytes are
//! compared, beside renewals every few seconds, hosts that are upgraded, restarted, killed, and cut off from each other.
//!
//! Owns the rule of what may fail: a connection with a host that was killed, restarted or cut off for long, in that very time, and no other. An
//! upgrade and a cut of some seconds excuse nothing, and wrong bytes are never excused. Memory and descriptors are flat when the median of the
//! last quarter of the samples is that of the second quarter, with some room.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{Authority, AuthorityState};
use meshd::demo::lab::Host;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::support::eventually;
use crate::support::mesh::{Mesh, Setup};
use crate::support::scenario::{Need, Scenario, scenario};
use crate::support::traffic::{Pattern, dial, echo_all, listen, sockets};

pub(crate) const SCENARIOS: &[Scenario] = &[scenario!("soak", everything_at_once, Need::Program("nft"))];

/// a and b are upgraded in turns and cut off from each other for seconds; c is killed, and cut off from a for long; d is restarted; nothing
/// happens to e, whose process is the same from the beginning to the end.
const HOSTS: [&str; 5] = ["a", "b", "c", "d", "e"];
/// Who connects to whom, and how often at once.
const PAIRS: [(&str, &str, usize); 12] = [
    ("a", "b", 4),
    ("b", "a", 4),
    ("a", "e", 2),
    ("e", "a", 2),
    ("e", "b", 1),
    ("b", "e", 1),
    ("a", "c", 1),
    ("c", "b", 1),
    ("b", "c", 1),
    ("a", "d", 1),
    ("d", "b", 1),
    ("e", "d", 1),
];
/// And with connections that outlive a few upgrades. Never more than the processes of before that a daemon keeps.
const LONG: [(&str, &str, usize); 4] = [("a", "b", 1), ("b", "a", 1), ("a", "e", 1), ("e", "b", 1)];
/// How long a host may be without an answer, which it is for some seconds while it is cut off.
const PATIENCE: Duration = Duration::from_secs(30);
/// A cut that no connection may notice but by waiting.
const SHORT_CUT: Duration = Duration::from_secs(5);
/// A cut after which the hosts have given each other up.
const LONG_CUT: Duration = Duration::from_secs(45);
/// How long it may take until all is as before.
const REPAIRED: Duration = Duration::from_secs(60);
/// By how much the later median may be above the earlier.
const MORE_KIB: u64 = 2048;
const MORE_DESCRIPTORS: usize = 20;

fn lasts() -> Duration {
    Duration::from_secs(std::env::var("MESHD_TEST_SOAK_SECONDS").ok().and_then(|n| n.parse().ok()).unwrap_or(60))
}

/// What all clients share.
struct World {
    began: Instant,
    over: AtomicBool,
    done: AtomicU64,
    bytes: AtomicU64,
    failures: Mutex<Vec<Failure>>,
    troubles: Mutex<Vec<Trouble>>,
}

/// A connection that did not go as it should.
struct Failure {
    ends: [&'static str; 2],
    began: Duration,
    ended: Duration,
    wrong: bool,
    text: String,
}

/// A time in which connections with a host, or between two, may fail.
struct Trouble {
    what: &'static str,
    who: &'static str,
    with: Option<&'static str>,
    began: Duration,
    ended: Option<Duration>,
}

impl Trouble {
    fn excuses(&self, failure: &Failure) -> bool {
        let touched = failure.ends.contains(&self.who) && self.with.is_none_or(|other| failure.ends.contains(&other));
        touched && failure.ended >= self.began && self.ended.is_none_or(|ended| failure.began <= ended)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ends: [from, to], began, ended, text, .. } = self;
        write!(f, "{from} to {to}, from {:.1} s to {:.1} s: {text}", began.as_secs_f64(), ended.as_secs_f64())
    }
}

impl World {
    /// Does something to a host, or between two, after which connections may fail until all is as before.
    fn trouble<T>(
        &self,
        what: &'static str,
        who: &'static str,
        with: Option<&'static str>,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let began = self.began.elapsed();
        self.troubles.lock().unwrap().push(Trouble { what, who, with, began, ended: None });
        let done = work().with_context(|| format!("{what} {who}, at {:.0} s", began.as_secs_f64()))?;
        if let Some(last) = self.troubles.lock().unwrap().last_mut() {
            last.ended = Some(self.began.elapsed());
        }
        Ok(done)
    }

    /// Failures that nothing excuses, and how many there were for each kind of trouble.
    fn judge(&self) -> (Vec<String>, BTreeMap<&'static str, usize>) {
        let (failures, troubles) = (self.failures.lock().unwrap(), self.troubles.lock().unwrap());
        let (mut bad, mut excused) = (Vec::new(), BTreeMap::new());
        for failure in failures.iter() {
            match troubles.iter().find(|trouble| trouble.excuses(failure)) {
                Some(trouble) if !failure.wrong => *excused.entry(trouble.what).or_default() += 1,
                _ => bad.push(failure.to_string()),
            }
        }
        (bad, excused)
    }
}

enum Broke {
    Wrong(String),
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Broke {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// One connection: blocks that are different at every place, each sent back.
async fn one(world: &World, from: &Host, to: std::net::SocketAddr, seed: u64, rounds: u64, pause: Duration) -> Result<(), Broke> {
    let mut stream = timeout(PATIENCE, dial(from, to)).await.context("no connection")??;
    let mut pattern = Pattern::new(seed);
    for round in 0..rounds {
        let (mut sent, mut back) = ([0; 4096], [0; 4096]);
        pattern.fill(&mut sent);
        let exchange = async {
            stream.write_all(&sent).await?;
            stream.read_exact(&mut back).await
        };
        timeout(PATIENCE, exchange)
            .await
            .with_context(|| format!("too slow in round {round}"))?
            .with_context(|| format!("round {round}"))?;
        if sent != back {
            return Err(Broke::Wrong(format!("wrong bytes in round {round}")));
        }
        world.bytes.fetch_add(sent.len() as u64, Ordering::Relaxed);
        if world.over.load(Ordering::Relaxed) {
            break;
        }
        sleep(pause).await;
    }
    stream.shutdown().await?;
    match timeout(PATIENCE, stream.read(&mut [0; 8])).await.context("no end")?.context("at the end")? {
        0 => Ok(()),
        _ => Err(Broke::Wrong("bytes after the end".into())),
    }
}

/// One connection after the other.
async fn client(world: Arc<World>, ends: [&'static str; 2], hosts: [Host; 2], number: u64, long: bool) {
    let to = sockets(&hosts[1], 8000);
    let mut count = 0u64;
    while !world.over.load(Ordering::Relaxed) {
        let began = world.began.elapsed();
        let seed = number << 32 | count;
        let (rounds, pause) = match long {
            // 30 to 60 s.
            true => (100 + seed % 100, Duration::from_millis(300)),
            false => (1 + (number * 7 + count) % 20, Duration::from_millis(100)),
        };
        let (wrong, text) = match one(&world, &hosts[0], to[(count % 2) as usize], seed, rounds, pause).await {
            Ok(()) => (None, String::new()),
            Err(Broke::Wrong(text)) => (Some(true), text),
            Err(Broke::Failed(error)) => (Some(false), format!("{error:#}")),
        };
        if let Some(wrong) = wrong {
            let failure = Failure { ends, began, ended: world.began.elapsed(), wrong, text };
            world.failures.lock().unwrap().push(failure);
            sleep(Duration::from_millis(200)).await;
        } else {
            world.done.fetch_add(1, Ordering::Relaxed);
        }
        count += 1;
    }
}

/// KiB and descriptors of a process.
type Size = (u64, usize);

fn size(mesh: &Mesh, name: &str) -> Result<Size> {
    Ok((mesh.at(name).kib("VmRSS:")?, mesh.at(name).descriptors()?))
}

/// Compares the last quarter with the second one.
fn flat(what: &str, sizes: &[Size]) -> Result<String> {
    let (second, last) = (&sizes[sizes.len() / 4..sizes.len() / 2], &sizes[sizes.len() * 3 / 4..]);
    ensure!(!second.is_empty() && !last.is_empty(), "{what}: too few samples");
    let median = |sizes: &[Size]| {
        let (mut kib, mut files): (Vec<_>, Vec<_>) = sizes.iter().copied().unzip();
        kib.sort_unstable();
        files.sort_unstable();
        (kib[kib.len() / 2], files[files.len() / 2])
    };
    let (before, after) = (median(second), median(last));
    let most = sizes.iter().map(|s| s.0).max().unwrap_or(0);
    let shown = format!(
        "{what}: {} KiB and {} descriptors in the second quarter, {} and {} in the last, {most} KiB at most",
        before.0, before.1, after.0, after.1
    );
    ensure!(after.0 <= before.0 + MORE_KIB && after.1 <= before.1 + MORE_DESCRIPTORS, "it grows: {shown}");
    Ok(shown)
}

/// All packets from one host to the other are lost, in both directions; not those in which a service is told, on its own host, who connects.
fn cut(mesh: &Mesh, ends: [&str; 2]) -> Result<()> {
    for (here, there) in [(ends[0], ends[1]), (ends[1], ends[0])] {
        let other = mesh.host(there);
        let addresses = other.within(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6"))??;
        // The link's own addresses too, of the one interface that is not the loopback.
        let local = addresses.lines().filter(|line| line.starts_with("fe80")).filter_map(|line| line.get(..32));
        let local: String = local
            .map(|digits| {
                let groups: Vec<&str> = (0..8).map(|n| &digits[4 * n..4 * n + 4]).collect();
                format!(", {}", groups.join(":"))
            })
            .collect();
        mesh.at(here).nft(&format!(
            "table inet apart {{ chain in {{ type filter hook prerouting priority -400; policy accept; \
             iifname != lo ip saddr {} drop; iifname != lo ip6 saddr {{ {}{local} }} drop; }}; }}",
            other.ipv4, other.ipv6
        ))?;
    }
    Ok(())
}

fn heal(mesh: &Mesh, ends: [&str; 2]) -> Result<()> {
    ends.iter().try_for_each(|name| mesh.at(name).nft("delete table inet apart"))
}

/// Until these two capture each other.
fn together(mesh: &Mesh, ends: [&str; 2]) -> Result<()> {
    for (here, there) in [(ends[0], ends[1]), (ends[1], ends[0])] {
        let wanted = crate::support::traffic::addresses(mesh.host(there));
        eventually(REPAIRED, &format!("{here} captures {there} again"), || {
            let captured = mesh.at(here).captured(there)?;
            ensure!(wanted.iter().all(|ip| captured.contains(ip)), "only {captured:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// What was done to the hosts, and how large they were.
#[derive(Default)]
struct Done {
    upgrades: u64,
    kills: u64,
    restarts: u64,
    short_cuts: u64,
    long_cuts: u64,
    serials: BTreeMap<String, BTreeSet<String>>,
    young: [Vec<Size>; 2],
    steady: Vec<Size>,
}

/// One turn: an upgrade, and one thing more.
fn turn(world: &World, mesh: &mut Mesh, number: u64, done: &mut Done) -> Result<()> {
    for _ in 0..3 {
        std::thread::sleep(Duration::from_secs(1));
        done.steady.push(size(mesh, "e")?);
    }
    for svid in mesh.at("e").identities()? {
        ensure!(svid.expires_seconds >= 0, "the certificate of {} is over", svid.workload);
        done.serials.entry(svid.workload.to_string()).or_default().extend(svid.serial);
    }
    let which = (number % 2) as usize;
    let name = ["a", "b"][which];
    // What a process is after some seconds of the same work; each begins anew.
    done.young[which].push(size(mesh, name)?);
    mesh.at_mut(name).upgrade()?;
    done.upgrades += 1;
    match number % 4 {
        0 => {
            world.trouble("killed", "c", None, || {
                mesh.at_mut("c").kill();
                std::thread::sleep(Duration::from_secs(1));
                mesh.at_mut("c").start()?;
                mesh.at("c").until_answers()?;
                ["a", "b", "e"].iter().try_for_each(|name| together(mesh, [name, "c"]))
            })?;
            done.kills += 1;
        }
        1 => {
            let began = Instant::now();
            cut(mesh, ["a", "b"])?;
            std::thread::sleep(SHORT_CUT.saturating_sub(began.elapsed()));
            heal(mesh, ["a", "b"])?;
            done.short_cuts += 1;
        }
        2 => {
            world.trouble("restarted", "d", None, || {
                mesh.at_mut("d").stop()?;
                mesh.at_mut("d").start()?;
                mesh.at("d").until_answers()?;
                ["a", "b", "e"].iter().try_for_each(|name| together(mesh, [name, "d"]))
            })?;
            done.restarts += 1;
        }
        _ if number % 16 == 7 && lasts() > Duration::from_secs(120) => {
            world.trouble("cut off", "a", Some("c"), || {
                cut(mesh, ["a", "c"])?;
                std::thread::sleep(LONG_CUT);
                heal(mesh, ["a", "c"])?;
                together(mesh, ["a", "c"])
            })?;
            done.long_cuts += 1;
        }
        _ => {}
    }
    for name in ["a", "b"] {
        let left = mesh.at_mut(name).older_left()?;
        // None is older than a long connection.
        ensure!(left <= 12, "{left} processes of before on {name}");
    }
    Ok(())
}

fn everything_at_once() -> Result<()> {
    meshd::intercept::process::raise_file_limit()?;
    let mut mesh = Setup::of(&HOSTS).configured("svid_lifetime = \"15s\"").start()?;
    // A founder that is another process every few seconds never finds that it has heard somebody for long enough; and a host that is cut off from
    // its only authority has no certificate after a while, which would be no wonder.
    mesh.at("a").cli(&["authority", "add", "e"])?;
    eventually(REPAIRED, "e signs", || {
        let list: Vec<Authority> = mesh.at("c").json(&["authority", "list"])?;
        let signs = |authority: &Authority| authority.name.as_str() == "e" && authority.state == AuthorityState::Signing;
        ensure!(list.iter().any(signs), "{list:?}");
        Ok(())
    })?;
    let listeners: Vec<_> = HOSTS.iter().map(|name| listen(mesh.host(name), 8000)).collect::<Result<_>>()?;
    let world = Arc::new(World {
        began: Instant::now(),
        over: AtomicBool::new(false),
        done: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
        failures: Mutex::default(),
        troubles: Mutex::default(),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut clients = JoinSet::new();
    runtime.block_on(async {
        for listener in listeners {
            echo_all(listener)?;
        }
        let mut number = 0;
        for (pairs, long) in [(&PAIRS[..], false), (&LONG[..], true)] {
            for (from, to, many) in pairs {
                for _ in 0..*many {
                    let hosts = [mesh.host(from).clone(), mesh.host(to).clone()];
                    clients.spawn(client(world.clone(), [from, to], hosts, number, long));
                    number += 1;
                }
            }
        }
        Ok::<_, anyhow::Error>(())
    })?;
    let (mut done, mut number, end) = (Done::default(), 0, world.began + lasts());
    let mut worked = Ok(());
    while worked.is_ok() && Instant::now() < end {
        worked = turn(&world, &mut mesh, number, &mut done);
        number += 1;
        let bad = world.judge().0;
        if !bad.is_empty() {
            break;
        }
        if number % 50 == 0 {
            println!("{:.0} s: {} connections", world.began.elapsed().as_secs_f64(), world.done.load(Ordering::Relaxed));
        }
    }
    let took = world.began.elapsed();
    world.over.store(true, Ordering::Relaxed);
    runtime.block_on(async { while clients.join_next().await.is_some() {} });
    let (bad, excused) = world.judge();
    let renewals = done.serials.values().map(|serials| serials.len() - 1).max().unwrap_or(0);
    println!(
        "{:.0} s: {} connections, {} MB sent and compared, {} upgrades, {} kills, {} restarts, {} short cuts, {} long ones, {renewals} renewals; \
         excused failures: {excused:?}; others: {}",
        took.as_secs_f64(),
        world.done.load(Ordering::Relaxed),
        world.bytes.load(Ordering::Relaxed) / 1_000_000,
        done.upgrades,
        done.kills,
        done.restarts,
        done.short_cuts,
        done.long_cuts,
        bad.len(),
    );
    ensure!(bad.is_empty(), "{} connections failed for no reason: {:#?}", bad.len(), &bad[..bad.len().min(20)]);
    worked?;
    for (what, sizes) in [("e", &done.steady), ("new processes of a", &done.young[0]), ("new processes of b", &done.young[1])] {
        println!("{}", flat(what, sizes)?);
    }
    let (upgrades, seconds) = (done.upgrades as f64, took.as_secs_f64());
    ensure!(upgrades >= seconds / 30.0 && done.kills * done.restarts * done.short_cuts > 0, "not much of a soak");
    ensure!(seconds < 600.0 || done.long_cuts > 0, "no long cut");
    // They were looked at once in each turn, and are renewed more often.
    ensure!(2 * renewals as u64 >= number, "only {renewals} renewals seen in {number} turns");
    drop(runtime);
    let failed: Vec<_> =
        mesh.at("e").edges()?.into_iter().filter(|e| e.failed > 0 && e.peer.as_ref().is_none_or(|p| p.as_str() != "d")).collect();
    ensure!(failed.is_empty(), "e says that connections failed: {failed:?}");
    for name in ["a", "b"] {
        mesh.at_mut(name).older_ended_well(PATIENCE)?;
    }
    for name in HOSTS {
        ensure!(!mesh.at(name).log().contains("panicked"), "a panic on {name}: {}", mesh.at(name).log());
    }
    Ok(())
}
