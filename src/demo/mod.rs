//! Three hosts made of namespaces on this machine, and the proof that what they say to each other is encrypted.
//!
//! Owns the order of the demonstration and its claims. Invariant: a claim is printed only after it was checked, and the first one
//! that does not hold ends the demonstration with an error. Everything else is real: daemons and commands are this very program,
//! the network is the kernel's. [`lab`], [`capture`] and [`units`] serve the namespaced tests too.

pub mod capture;
pub mod lab;
mod play;
mod story;
pub mod units;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use meshd_ca::identity::SpiffeId;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::api::{Direction, Edge, Node, Service, State, Status};
use crate::config;
use crate::intercept::netns;
use capture::{Capture, Report};
use lab::{Host, Lab, Process};
pub use play::play;
use story::Story;
use units::Units;

/// The members, and a host that is none.
const NAMES: [&str; 4] = ["kitchen", "cellar", "attic", "stranger"];
/// Where the demonstration's server listens.
const PORT: u16 = 8080;
/// The longest that anything may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often something awaited is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Runs the demonstration; with `keep` the hosts stay up until interrupted. To be called while the process has one thread.
///
/// # Errors
/// The first claim that did not hold, or what kept the hosts from being made.
pub fn run(keep: bool) -> Result<()> {
    let unprivileged = netns::become_root()?;
    let mut story = Story::begin();
    let lab = Lab::build(&NAMES)?;
    let interrupted = on_interrupt(lab.dir().to_owned())?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let units = if unprivileged { None } else { Units::find() };
    let mut demo = Demo { processes: Vec::new(), daemons: Vec::new(), units, program, lab, interrupted };
    let told = demo.tell(&mut story, unprivileged);
    if let Err(error) = told {
        return Err(error.context(demo.last_words()));
    }
    if keep {
        demo.keep(&mut story, unprivileged)?;
    }
    demo.part(&mut story)?;
    story.end();
    Ok(())
}

/// What to do about an interrupt: until somebody waits for it, it ends the process. The hosts' processes end with it.
struct Interrupt {
    wait: mpsc::Sender<()>,
    arrived: mpsc::Receiver<()>,
}

fn on_interrupt(dir: PathBuf) -> Result<Interrupt> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (wait, waiting) = mpsc::channel();
    let (arrive, arrived) = mpsc::channel();
    let (ready, armed) = mpsc::channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            let signals = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()));
            let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = signals else { return };
            let _ = ready.send(());
            loop {
                tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} _ = hangup.recv() => {} }
                if waiting.try_recv().is_ok() {
                    let _ = arrive.send(());
                } else {
                    let _ = std::fs::remove_dir_all(&dir);
                    std::process::exit(130);
                }
            }
        });
    })?;
    armed.recv().context("cannot listen to signals")?;
    Ok(Interrupt { wait, arrived })
}

/// The hosts and what runs on them. Fields are dropped in this order: processes before cgroups and directories.
struct Demo {
    processes: Vec<Process>,
    daemons: Vec<(usize, Process)>,
    units: Option<Units>,
    program: PathBuf,
    lab: Lab,
    interrupted: Interrupt,
}

impl Demo {
    fn tell(&mut self, story: &mut Story, unprivileged: bool) -> Result<()> {
        story.title("Three hosts, and a stranger, on one switch");
        for host in self.lab.hosts() {
            story.remark(format!("{:<9} {:<14} {}", host.name, host.ipv4, host.ipv6));
        }
        let how = if unprivileged { "in a user namespace, without any privilege" } else { "as root" };
        story.remark(format!("network namespaces of this machine, made {how}"));

        story.title("A mesh of the three");
        let begun = Instant::now();
        self.start_daemon(0)?;
        story.typed("kitchen", "meshd run");
        self.member(0)?;
        story.holds_after("no mesh in sight and no token: kitchen founds one", begun.elapsed());
        self.join(1, story)?;
        let (server_unit, client_unit) = self.unit_cgroups()?;
        self.serve(&server_unit)?;
        let begun = self.join(2, story)?;
        let first = self.first_secured(&client_unit)?;
        story.holds_after("attic's first mutually authenticated connection, counted from its `meshd run`", first - begun);
        self.all_captured()?;
        story.holds_after("everyone secures what it says to everyone, IPv4 and IPv6", begun.elapsed());
        self.shown(story)?;

        story.title("What an eavesdropper on the switch sees");
        self.members_talk(&client_unit, story)?;
        self.stranger_talks(story)?;
        self.memory(story);
        Ok(())
    }

    fn host(&self, number: usize) -> &Host {
        &self.lab.hosts()[number]
    }

    fn start_daemon(&mut self, number: usize) -> Result<()> {
        let host = self.host(number);
        let daemon = host.spawn(host.meshd(&self.program).arg("run"), "meshd")?;
        self.daemons.push((number, daemon));
        Ok(())
    }

    /// What a command prints. Its failure is ours.
    fn command(&self, number: usize, words: &[&str]) -> Result<String> {
        let host = self.host(number);
        let output = host.output(host.meshd(&self.program).args(words), PATIENCE)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`meshd {}` failed on {}: {text}{complaint}", words.join(" "), host.name);
        Ok(text)
    }

    fn ask<T: DeserializeOwned>(&self, number: usize, what: &str) -> Result<T> {
        let text = self.command(number, &[what, "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("`meshd {what} -o json` printed {text}"))
    }

    fn member(&self, number: usize) -> Result<()> {
        awaited("it is a member of the mesh", || {
            let status: Status = self.ask(number, "status")?;
            ensure!(status.state == State::Member, "{} is {}", self.host(number).name, status.state);
            Ok(())
        })
    }

    /// Starts a daemon with a token of the founder; returns when it was started.
    fn join(&mut self, number: usize, story: &mut Story) -> Result<Instant> {
        let name = self.host(number).name.clone();
        story.typed("kitchen", "meshd token create");
        let printed = self.command(0, &["token", "create"])?;
        let token = printed.lines().find(|line| line.len() >= 40 && !line.contains(' ')).context("no token was printed")?;
        let begun = Instant::now();
        self.start_daemon(number)?;
        awaited("its daemon answers", || {
            let up = self.host(number).dir().join("run").join(crate::api::SOCKET).exists();
            if up { Ok(()) } else { bail!("no socket") }
        })?;
        story.typed(&name, &format!("meshd run & meshd join {}…", token.get(..12).unwrap_or(token)));
        self.command(number, &["join", token])?;
        self.member(number)?;
        story.holds_after(format!("{name} is a member, counted from its `meshd run`"), begun.elapsed());
        Ok(begun)
    }

    /// The cgroups of the server and the client, `-` where none can be made.
    fn unit_cgroups(&mut self) -> Result<(String, String)> {
        let Some(units) = &mut self.units else { return Ok(("-".into(), "-".into())) };
        let mut unit = |name: &str| Ok::<_, std::io::Error>(units.cgroup(&format!("system.slice/{name}"))?.display().to_string());
        Ok((unit("demo-pantry.service")?, unit("demo-cook.service")?))
    }

    fn serve(&mut self, cgroup: &str) -> Result<()> {
        let any = SocketAddr::new(IpAddr::from([0; 16]), PORT).to_string();
        let host = self.host(1);
        let server = host.spawn(host.meshd(&self.program).args(["demo", "--play", "serve", cgroup, &any, "jam"]), "server")?;
        self.processes.push(server);
        let here = SocketAddr::new(self.host(1).ipv4.into(), PORT);
        awaited("the server answers on its own host", || self.fetch(1, "-", here, "hello").map(drop))
    }

    fn fetch(&self, number: usize, cgroup: &str, from: SocketAddr, text: &str) -> Result<String> {
        let answer = self.command(number, &["demo", "--play", "fetch", cgroup, &from.to_string(), text])?;
        ensure!(answer.contains(text), "the answer {answer:?} does not fit the question {text:?}");
        Ok(answer)
    }

    fn edge(&self, number: usize, direction: Direction, address: IpAddr) -> Result<Edge> {
        let edges: Vec<Edge> = self.ask(number, "edges")?;
        let name = &self.host(number).name;
        let edge = edges.into_iter().find(|e| e.direction == direction && e.address == address && e.port == PORT && e.total > 0);
        edge.with_context(|| format!("{name} shows no connection {direction} with {address}"))
    }

    fn first_secured(&self, cgroup: &str) -> Result<Instant> {
        let server = SocketAddr::new(self.host(1).ipv4.into(), PORT);
        awaited("a connection is secured", || {
            self.fetch(2, cgroup, server, "early")?;
            let done = Instant::now();
            ensure!(self.edge(2, Direction::Outbound, server.ip())?.secured, "it is not secured");
            Ok(done)
        })
    }

    fn all_captured(&self) -> Result<()> {
        for number in 0..3 {
            awaited("all addresses of all members are secured", || {
                let nodes: Vec<Node> = self.ask(number, "nodes")?;
                for other in self.lab.hosts().iter().take(3).filter(|h| h.name != self.host(number).name) {
                    let node = nodes.iter().find(|n| n.name.as_str() == other.name);
                    let captured = node.map(|n| n.captured.as_slice()).unwrap_or_default();
                    let all = [IpAddr::from(other.ipv4), other.ipv6.into()].iter().all(|ip| captured.contains(ip));
                    ensure!(all, "{} secures only {captured:?} of {}", self.host(number).name, other.name);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn shown(&self, story: &mut Story) -> Result<()> {
        let nodes: Vec<Node> = self.ask(0, "nodes")?;
        let reachable = nodes.iter().filter(|n| n.own || n.reachable).count();
        ensure!(nodes.len() == 3 && reachable == 3, "kitchen knows {} nodes and reaches {reachable}", nodes.len());
        story.typed("kitchen", "meshd nodes");
        story.printed(&self.command(0, &["nodes"])?);
        awaited("the server is in the catalog", || {
            let services: Vec<Service> = self.ask(0, "services")?;
            let found = services.iter().any(|s| s.host.as_str() == "cellar" && s.port == PORT);
            if found { Ok(()) } else { bail!("kitchen does not know of port {PORT} on cellar") }
        })?;
        story.typed("kitchen", "meshd services");
        story.printed(&self.command(0, &["services"])?);
        story.holds("three nodes, and cellar's server found by itself");
        Ok(())
    }

    fn members_talk(&self, cgroup: &str, story: &mut Story) -> Result<()> {
        let secret = secret("recipe");
        let (client, server) = (self.host(2), self.host(1));
        let pairs = [(IpAddr::from(client.ipv4), IpAddr::from(server.ipv4)), (client.ipv6.into(), server.ipv6.into())];
        let report = self.watched(&secret, || {
            for (client, server) in pairs {
                let answer = self.fetch(2, cgroup, SocketAddr::new(server, PORT), &secret)?;
                ensure!(answer.contains(&format!("for {client} ")), "the server saw another client: {answer:?}");
            }
            Ok(())
        })?;
        story.typed("attic", &format!("curl http://cellar:{PORT}/{secret}"));
        story.holds("answered over IPv4 and IPv6, and the server saw attic's real address");
        ensure!(report.hits == [0], "the request was readable on the link");
        let to_mesh = SocketAddr::new(server.ipv4.into(), config::PORT);
        let sealed = report.sealed.get(&to_mesh).context("no TLS record was seen on the mesh port")?;
        story.wire(sealed, false);
        story.holds(format!("neither request nor answer is in any of the {} frames", report.frames));

        let mut seen: Option<(SpiffeId, SpiffeId)> = None;
        for (client, server) in pairs {
            let ends = [self.edge(2, Direction::Outbound, server)?, self.edge(1, Direction::Inbound, client)?];
            for edge in ends {
                ensure!(edge.secured, "an edge is not secured: {edge:?}");
                let ids = edge.client.zip(edge.server).context("an end of an edge is not known")?;
                let expected = seen.get_or_insert_with(|| ids.clone());
                ensure!(*expected == ids, "the two ends disagree: {expected:?} and {ids:?}");
            }
        }
        let (client_id, server_id) = seen.context("no edges")?;
        let of = |id: &SpiffeId, host: &Host| id.workload.host().is_some_and(|h| h.as_str() == host.name);
        ensure!(of(&client_id, client) && of(&server_id, server), "{client_id} and {server_id} are not of attic and cellar");
        if self.units.is_some() {
            let named =
                client_id.to_string().ends_with("demo-cook.service") && server_id.to_string().ends_with("demo-pantry.service");
            ensure!(named, "{client_id} and {server_id} do not name the two units");
        }
        story.typed("attic", "meshd edges");
        story.printed(&self.command(2, &["edges"])?);
        story.holds("SECURED, and both ends saw the same two identities:");
        story.remark(format!("  client  {client_id}"));
        story.remark(format!("  server  {server_id}"));
        if self.units.is_none() {
            story.remark("  (one workload per host: no cgroups can be made here, as root each would be named after its unit)");
        }
        Ok(())
    }

    fn stranger_talks(&self, story: &mut Story) -> Result<()> {
        let secret = secret("gossip");
        let server = SocketAddr::new(self.host(1).ipv4.into(), PORT);
        let report = self.watched(&secret, || self.fetch(3, "-", server, &secret).map(drop))?;
        ensure!(report.hits.iter().all(|hits| *hits > 0), "the capture did not see the stranger's request: it proves nothing");
        story.typed("stranger", &format!("curl http://cellar:{PORT}/{secret}"));
        if let Some(Some(seen)) = report.excerpts.first() {
            story.wire(seen, true);
        }
        story.holds("a host that is no member is served as ever, and everyone can read along");
        Ok(())
    }

    fn watched(&self, text: &str, action: impl FnOnce() -> Result<()>) -> Result<Report> {
        let capture = Capture::start(&self.lab, &[text.as_bytes()])?;
        action()?;
        let report = capture.stop()?;
        ensure!(report.lost == 0, "{} frames were too fast for the capture", report.lost);
        Ok(report)
    }

    fn memory(&self, story: &Story) {
        let sizes: Vec<u64> = self.daemons.iter().filter_map(|(_, daemon)| resident(daemon.pid())).collect();
        if let Some(most) = sizes.iter().max() {
            story.remark(format!("each daemon takes up to {:.1} MiB of memory", *most as f64 / 1024.0));
        }
    }

    fn keep(&self, story: &mut Story, unprivileged: bool) -> Result<()> {
        story.title("The hosts stay up until Ctrl-C. To enter one:");
        for (number, host) in self.lab.hosts().iter().enumerate() {
            let daemon = self.daemons.iter().find(|(of, _)| *of == number);
            let file = daemon.map(|(_, daemon)| format!("/proc/{}/ns/net", daemon.pid()));
            let net = file.unwrap_or_else(|| {
                use std::os::fd::{AsFd, AsRawFd};
                format!("/proc/{}/fd/{}", std::process::id(), host.netns().as_fd().as_raw_fd())
            });
            let user = if unprivileged {
                format!("--preserve-credentials --user=/proc/{}/ns/user ", std::process::id())
            } else {
                String::new()
            };
            let dir = host.dir().display();
            let settings = format!("MESHD_RUN_DIR={dir}/run MESHD_STATE_DIR={dir}/state MESHD_CONFIG={dir}/meshd.toml");
            println!("  # {}\n  nsenter {user}--net={net} env {settings} ${{SHELL:-sh}}", host.name);
        }
        println!("  # the program itself: {}", self.program.display());
        self.interrupted.wait.send(()).context("the thread that listens to signals is gone")?;
        self.interrupted.arrived.recv().context("the thread that listens to signals is gone")?;
        Ok(())
    }

    fn part(mut self, story: &mut Story) -> Result<()> {
        story.title("The end");
        let begun = Instant::now();
        self.processes.clear();
        for (number, mut daemon) in std::mem::take(&mut self.daemons) {
            let name = &self.lab.hosts()[number].name;
            // After an interrupt at the terminal they have had their signal already.
            let status = daemon.stop(PATIENCE)?.with_context(|| format!("the daemon of {name} does not stop"))?;
            ensure!(status.success(), "the daemon of {name} ended with {status}: {}", daemon.log());
        }
        story.holds_after("all daemons stopped cleanly; their namespaces go with this process", begun.elapsed());
        Ok(())
    }

    /// What the daemons said last, for whoever has to find out why something does not hold.
    fn last_words(&self) -> String {
        let mut text = String::from("the demonstration failed; the daemons' last words:");
        for (number, daemon) in &self.daemons {
            let log = daemon.log();
            let lines: Vec<&str> = log.lines().collect();
            for line in &lines[lines.len().saturating_sub(8)..] {
                text.push_str(&format!("\n  {}: {line}", self.host(*number).name));
            }
        }
        text
    }
}

/// Asks until the answer is yes.
fn awaited<T>(what: &str, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > end => return Err(error.context(format!("does not hold: {what}"))),
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

/// A word nobody else sends.
fn secret(word: &str) -> String {
    use std::hash::{BuildHasher, Hasher};
    format!("{word}-{:016x}", std::collections::hash_map::RandomState::new().build_hasher().finish())
}

/// Resident memory of a process in KiB.
fn resident(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
}
