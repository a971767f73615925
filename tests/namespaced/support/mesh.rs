//! A mesh of real daemons on the hosts of a lab, driven by the command line as a person would.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use meshd::api::{Direction, Edge, Identity, Node, Resolve, State, Status, Upgraded};
use meshd::demo::capture::{Capture, Report};
use meshd::demo::lab::{Host, Lab, Process};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::manager::{self, Manager};
use super::scenario::command;
use super::traffic::{self, Server, addresses};
use super::{eventually, marker, slower};

/// The program under test: the one built with the tests, or one that is shipped (`MESHD_TEST_PROGRAM` when the tests are built).
pub(crate) const MESHD: &str = match option_env!("MESHD_TEST_PROGRAM") {
    Some(program) => program,
    None => env!("CARGO_BIN_EXE_meshd"),
};
/// How long a command may take.
const COMMAND: Duration = Duration::from_secs(30);
/// How long members may take to know and prove each other.
pub(crate) const SETTLED: Duration = Duration::from_secs(30);
/// How long it may take until an edge or a node is shown as it is.
pub(crate) const SHOWN: Duration = Duration::from_secs(10);

/// Hosts, some of them members of one mesh.
pub(crate) struct Mesh {
    // Before the lab: daemons are killed before their directories go.
    members: Vec<Member>,
    lab: Lab,
}

/// How a mesh is to be.
pub(crate) struct Setup {
    members: Vec<&'static str>,
    outsiders: Vec<&'static str>,
    configuration: Vec<(Option<&'static str>, &'static str)>,
}

impl Setup {
    /// Hosts that are members; the first one founds.
    pub(crate) fn of(members: &[&'static str]) -> Setup {
        Setup { members: members.to_vec(), outsiders: Vec::new(), configuration: Vec::new() }
    }

    /// And a host without a daemon.
    pub(crate) fn outsider(mut self, name: &'static str) -> Setup {
        self.outsiders.push(name);
        self
    }

    /// Lines of the configuration file of every member.
    pub(crate) fn configured(mut self, lines: &'static str) -> Setup {
        self.configuration.push((None, lines));
        self
    }

    /// Lines of the configuration file of one member.
    pub(crate) fn configured_on(mut self, member: &'static str, lines: &'static str) -> Setup {
        self.configuration.push((Some(member), lines));
        self
    }

    /// Builds the hosts and starts nothing.
    pub(crate) fn hosts(self) -> Result<Mesh> {
        let names: Vec<&str> = self.members.iter().chain(&self.outsiders).copied().collect();
        let lab = Lab::build(&names)?;
        let members: Vec<Member> = lab
            .hosts()
            .iter()
            .take(self.members.len())
            .map(|h| Member { host: h.clone(), daemon: None, older: Vec::new() })
            .collect();
        for member in &members {
            let lines = self.configuration.iter().filter(|(who, _)| who.is_none_or(|w| w == member.name));
            let mut lines: String = lines.map(|(_, lines)| format!("{lines}\n")).collect();
            // However late the first one is heard on a busy machine, the others do not found a mesh of their own.
            if member.name != self.members[0] && !lines.contains("found_after") {
                lines.push_str("found_after = \"30s\"\n");
            }
            member.configure(&lines)?;
        }
        Ok(Mesh { members, lab })
    }

    /// Builds the hosts, founds the mesh, joins the others, and waits until all secure their connections to all.
    pub(crate) fn start(self) -> Result<Mesh> {
        let mut mesh = self.hosts()?;
        mesh.bring_up(Member::start)?;
        Ok(mesh)
    }
}

impl Mesh {
    /// The member of that name.
    pub(crate) fn at(&self, name: &str) -> &Member {
        self.members.iter().find(|m| m.name == name).expect("a member of this name")
    }

    /// The same, to start and stop its daemon.
    pub(crate) fn at_mut(&mut self, name: &str) -> &mut Member {
        self.members.iter_mut().find(|m| m.name == name).expect("a member of this name")
    }

    /// Whether that host has a running daemon.
    pub(crate) fn is_running(&self, name: &str) -> bool {
        self.members.iter().any(|m| m.name == name && m.daemon.is_some())
    }

    /// Any host of that name.
    pub(crate) fn host(&self, name: &str) -> &Host {
        self.lab.hosts().iter().find(|h| h.name == name).expect("a host of this name")
    }

    /// Starts every member in its turn, joins all to the first, and waits until all secure their connections to all.
    pub(crate) fn bring_up(&mut self, mut start: impl FnMut(&mut Member) -> Result<()>) -> Result<()> {
        for number in 0..self.members.len() {
            start(&mut self.members[number])?;
            self.members[number].until_answers()?;
            if number > 0 {
                let token = self.members[0].token()?;
                self.members[number].cli(&["join", &token])?;
            }
            self.members[number].until(State::Member)?;
        }
        self.settled()
    }

    /// The hosts and their switch.
    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Parts these from those: neither hears anything of the other, running or not.
    pub(crate) fn part(&self, these: &[&str], those: &[&str]) -> Result<()> {
        for (half, other) in [(these, those), (those, these)] {
            let mut macs = Vec::new();
            for name in other {
                let link = run_on(self.at(name), command("ip").args(["-o", "link", "show", "dev", "eth0"]))?;
                macs.push(link.split_whitespace().skip_while(|w| *w != "link/ether").nth(1).context("no link/ether")?.to_owned());
            }
            let deaf = format!(
                "table inet parted {{ chain in {{ type filter hook prerouting priority -300; ether saddr {{ {} }} drop; }}; }}",
                macs.join(", ")
            );
            half.iter().try_for_each(|name| self.at(name).nft(&deaf))?;
        }
        Ok(())
    }

    /// Ends what [`Mesh::part`] began on these.
    pub(crate) fn heal(&self, names: &[&str]) -> Result<()> {
        names.iter().try_for_each(|name| self.at(name).nft("delete table inet parted"))
    }

    /// Waits until every running member secures its connections to every other.
    pub(crate) fn settled(&self) -> Result<()> {
        let running = || self.members.iter().filter(|m| m.daemon.is_some());
        for member in running() {
            for other in running().filter(|o| o.name != member.name) {
                let says = || format!("{} says:\n{}", other.name, other.log_end());
                member.until_captures(&other.host).with_context(says)?;
            }
        }
        Ok(())
    }

    /// Captures the link while `action` runs and looks for `texts`. Fails when the capture is not complete.
    pub(crate) fn watched<T>(&self, texts: &[&str], action: impl FnOnce() -> Result<T>) -> Result<(T, Report)> {
        let texts: Vec<&[u8]> = texts.iter().map(|t| t.as_bytes()).collect();
        let capture = Capture::start(&self.lab, &texts)?;
        let done = action();
        let report = capture.stop()?;
        let done = done?;
        ensure!(report.lost == 0, "{} frames were too fast for the capture", report.lost);
        Ok((done, report))
    }

    /// The same with an action that starts and stops daemons.
    pub(crate) fn watched_mut<T>(&mut self, texts: &[&str], action: impl FnOnce(&mut Mesh) -> Result<T>) -> Result<(T, Report)> {
        let texts: Vec<&[u8]> = texts.iter().map(|t| t.as_bytes()).collect();
        let capture = Capture::start(&self.lab, &texts)?;
        let done = action(self);
        let report = capture.stop()?;
        let done = done?;
        ensure!(report.lost == 0, "{} frames were too fast for the capture", report.lost);
        Ok((done, report))
    }

    /// Runs `action`, which must move `text` between hosts, and proves that it was nowhere on the link while the mesh port was used.
    pub(crate) fn encrypted<T>(&self, text: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
        let (done, report) = self.watched(&[text], action)?;
        ensure!(report.hits[0] == 0, "the text was on the link in {} frames: {}", report.hits[0], shown(&report));
        let meshed = report.payload(|from, to| from.port() == meshd::config::PORT || to.port() == meshd::config::PORT);
        ensure!(meshed > text.len() as u64, "only {meshed} bytes went through the mesh port");
        Ok(done)
    }

    /// Runs `action`, which must move `text` between hosts, and proves that it was readable on the link.
    pub(crate) fn readable<T>(&self, text: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
        let (done, report) = self.watched(&[text], action)?;
        ensure!(report.hits[0] > 0, "the text was not on the link ({} frames seen)", report.frames);
        Ok(done)
    }

    /// One question and answer from `client` to `server`, both families, must be secured: nothing to read on the link, and the same
    /// two SVIDs at both ends.
    pub(crate) fn secured_between(&self, client: &str, server: &str, port: u16) -> Result<()> {
        let secret = marker("word");
        let answering = Server::answering(self.host(server), port, "got ")?;
        self.encrypted(&secret, || {
            for address in traffic::sockets(self.host(server), port) {
                let answer = traffic::ask(self.host(client), address, &secret).with_context(|| format!("ask {address}"))?;
                ensure!(answer == format!("got {secret}"), "wrong answer {answer:?}");
            }
            Ok(())
        })?;
        drop(answering);
        self.both_ends_agree(client, server, port)
    }

    /// Both ends of the connections of `client` to `port` of `server` show them secured, with the same two SVIDs.
    pub(crate) fn both_ends_agree(&self, client: &str, server: &str, port: u16) -> Result<()> {
        let (client, server) = (self.at(client), self.at(server));
        for (from, to) in addresses(client).into_iter().zip(addresses(server)) {
            let out = client.edge(Direction::Outbound, to, port)?;
            let inward = server.edge(Direction::Inbound, from, port)?;
            for edge in [&out, &inward] {
                ensure!(edge.secured, "not secured: {edge:?}");
                let ids = (edge.client.as_ref(), edge.server.as_ref());
                let (Some(c), Some(s)) = ids else { bail!("an end is not known: {edge:?}") };
                for (id, host) in [(c, client), (s, server)] {
                    let path = id.workload.to_string();
                    let own = id.workload.host().is_some_and(|h| h.as_str() == host.name);
                    ensure!(own || path.starts_with("/node/"), "{path} is not of {}", host.name);
                }
            }
            ensure!((&out.client, &out.server) == (&inward.client, &inward.server), "the ends differ: {out:?} and {inward:?}");
            ensure!(out.peer.as_ref().is_some_and(|p| p.as_str() == server.name), "wrong peer: {out:?}");
            ensure!(inward.peer.as_ref().is_some_and(|p| p.as_str() == client.name), "wrong peer: {inward:?}");
        }
        Ok(())
    }
}

fn shown(report: &Report) -> String {
    let seen = report.excerpts.iter().flatten().next();
    seen.map_or_else(String::new, |bytes| bytes.escape_ascii().to_string())
}

/// A host with a daemon that may run.
pub(crate) struct Member {
    host: Host,
    daemon: Option<Daemon>,
    /// Processes of before an upgrade.
    older: Vec<Daemon>,
}

/// The process of a daemon.
enum Daemon {
    /// This program started it.
    Started(Process),
    /// Another daemon did; it has become this program's child (`PR_SET_CHILD_SUBREAPER`).
    Begot(Begot),
}

/// A process that is this program's child, and is killed when dropped.
struct Begot {
    pid: Pid,
    ended: Option<ExitStatus>,
}

impl Daemon {
    fn pid(&self) -> u32 {
        match self {
            Self::Started(process) => process.pid(),
            Self::Begot(begot) => begot.pid.as_raw_nonzero().get().cast_unsigned(),
        }
    }

    fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        match self {
            Self::Started(process) => Ok(process.wait(patience)?),
            Self::Begot(begot) => begot.wait(patience),
        }
    }

    fn stop(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        match self {
            Self::Started(process) => Ok(process.stop(patience)?),
            Self::Begot(begot) => {
                if begot.ended.is_none() {
                    kill_process(begot.pid, Signal::TERM)?;
                }
                begot.wait(patience)
            }
        }
    }

    fn kill(&mut self) {
        match self {
            Self::Started(process) => process.kill(),
            Self::Begot(begot) => begot.kill(),
        }
    }
}

impl Begot {
    fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let end = Instant::now() + patience;
        while self.ended.is_none() {
            match waitpid(Some(self.pid), WaitOptions::NOHANG)? {
                Some((_, status)) => self.ended = Some(ExitStatus::from_raw(status.as_raw())),
                None if Instant::now() > end => return Ok(None),
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        Ok(self.ended)
    }

    fn kill(&mut self) {
        if self.ended.is_none() {
            let _ = kill_process(self.pid, Signal::KILL);
            let _ = self.wait(Duration::from_secs(10));
        }
    }
}

impl Drop for Begot {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Deref for Member {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Member {
    /// Writes the configuration file of the daemon; it counts from the next start.
    pub(crate) fn configure(&self, lines: &str) -> Result<()> {
        Ok(std::fs::write(self.dir().join("meshd.toml"), lines)?)
    }

    /// Starts the daemon.
    pub(crate) fn start(&mut self) -> Result<()> {
        let mut command = self.host.meshd(Path::new(MESHD));
        command.arg("run");
        self.daemon = Some(Daemon::Started(self.host.spawn(&mut command, "meshd")?));
        Ok(())
    }

    /// Starts the daemon through another program that runs it (`prlimit`, `setpriv`), or as another copy of it.
    pub(crate) fn start_through(&mut self, program: &str, words: &[&str]) -> Result<()> {
        let through = command(program).get_program().to_owned();
        let mut command = self.host.meshd(Path::new(&through));
        command.args(words);
        if !words.contains(&"run") {
            command.args([MESHD, "run"]);
        }
        self.daemon = Some(Daemon::Started(self.host.spawn(&mut command, "meshd")?));
        Ok(())
    }

    /// Starts the daemon as a service of `manager`; `before` are words in front of its command.
    pub(crate) fn start_under(&mut self, manager: &mut Manager, before: &[&str]) -> Result<()> {
        let (mut command, stdin) = manager.service(&manager::daemon(&self.host, before))?;
        self.daemon = Some(Daemon::Started(self.host.spawn_with(&mut command, stdin, "meshd")?));
        Ok(())
    }

    /// The process id of the daemon.
    pub(crate) fn pid(&self) -> Result<u32> {
        Ok(self.daemon.as_ref().with_context(|| format!("no daemon runs on {}", self.host.name))?.pid())
    }

    /// A size in KiB in what the kernel says of the daemon (`VmRSS:`, `VmHWM:`).
    pub(crate) fn kib(&self, key: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        let line = status.lines().find(|l| l.starts_with(key)).context("a line")?;
        Ok(line.split_whitespace().nth(1).context("a value")?.parse()?)
    }

    /// How often a thread of the daemon has slept, and for how many nanoseconds all of them have run.
    pub(crate) fn sleeps(&self) -> Result<(u64, u64)> {
        let (mut sleeps, mut nanoseconds) = (0, 0);
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.pid()?))? {
            let thread = thread?.path();
            let read = |name| std::fs::read_to_string(thread.join(name));
            // A thread may be gone by now.
            let (Ok(status), Ok(stat)) = (read("status"), read("schedstat")) else { continue };
            let slept = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).context("a line")?;
            sleeps += slept.trim().parse::<u64>()?;
            nanoseconds += stat.split_whitespace().next().context("a time")?.parse::<u64>()?;
        }
        Ok((sleeps, nanoseconds))
    }

    /// How many files the daemon has open.
    pub(crate) fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()?))?.count())
    }

    /// Sends the daemon a signal, named as kill(1) has it.
    pub(crate) fn signal(&self, name: &str) -> Result<()> {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.pid()?.to_string()).status()?;
        ensure!(status.success(), "kill -{name} failed");
        Ok(())
    }

    /// Waits for a clean end of the daemon.
    pub(crate) fn ended_well(&mut self, patience: Duration) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { bail!("no daemon runs on {}", self.host.name) };
        match daemon.wait(patience)? {
            Some(status) if status.success() => Ok(()),
            other => bail!("the daemon of {} ended with {other:?}:\n{}", self.host.name, self.log()),
        }
    }

    /// Stops the daemon as systemd does, and expects a clean end.
    pub(crate) fn stop(&mut self) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { bail!("no daemon runs on {}", self.host.name) };
        match daemon.stop(Duration::from_secs(45))? {
            Some(status) if status.success() => Ok(()),
            other => bail!("the daemon of {} ended with {other:?}:\n{}", self.host.name, self.log()),
        }
    }

    /// Has the daemon go over to the program on disk; the process of before is an older one from now on.
    pub(crate) fn upgrade(&mut self) -> Result<Upgraded> {
        let done: Upgraded = self.json(&["upgrade"])?;
        self.begot(done.pid)?;
        Ok(done)
    }

    /// The daemon is this process now, and the one of before is an older one.
    pub(crate) fn begot(&mut self, pid: u32) -> Result<()> {
        let pid = Pid::from_raw(pid.cast_signed()).context("a process id")?;
        self.older.extend(self.daemon.replace(Daemon::Begot(Begot { pid, ended: None })));
        Ok(())
    }

    /// Waits until all processes of before have ended well.
    pub(crate) fn older_ended_well(&mut self, patience: Duration) -> Result<()> {
        for mut daemon in self.older.drain(..) {
            match daemon.wait(patience)? {
                Some(status) if status.success() => {}
                other => bail!("an older daemon of {}: {other:?}", self.host.name),
            }
        }
        Ok(())
    }

    /// How many processes of before still run. Those that do not must have ended well, and are forgotten.
    pub(crate) fn older_left(&mut self) -> Result<usize> {
        for mut daemon in std::mem::take(&mut self.older) {
            match daemon.wait(Duration::ZERO)? {
                Some(status) if status.success() => {}
                None => self.older.push(daemon),
                other => bail!("an older daemon of {}: {other:?}", self.host.name),
            }
        }
        Ok(self.older.len())
    }

    /// Whether every process of before still runs.
    pub(crate) fn older_run(&mut self) -> Result<bool> {
        for daemon in &mut self.older {
            if daemon.wait(Duration::ZERO)?.is_some() {
                return Ok(false);
            }
        }
        Ok(!self.older.is_empty())
    }

    /// Kills the daemon so that it can do nothing about it (SIGKILL).
    pub(crate) fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill();
        }
    }

    /// Waits until the daemon ends by itself. None: it has not, and goes on.
    pub(crate) fn ended(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let Some(daemon) = self.daemon.as_mut() else { bail!("no daemon runs on {}", self.host.name) };
        let status = daemon.wait(patience)?;
        if status.is_some() {
            self.daemon = None;
        }
        Ok(status)
    }

    /// What the daemon logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir().join("meshd.log")).unwrap_or_default()
    }

    /// The last lines of that.
    fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// Runs a command of the command line here, and expects it to succeed. Returns what it printed.
    pub(crate) fn cli(&self, words: &[&str]) -> Result<String> {
        let (ok, out, err) = self.try_cli(words)?;
        ensure!(ok, "meshd {words:?} on {} failed: {out}{err}\nits daemon says:\n{}", self.host.name, self.log_end());
        Ok(out)
    }

    /// Runs a command of the command line here: whether it succeeded, what it printed and what it complained about.
    pub(crate) fn try_cli(&self, words: &[&str]) -> Result<(bool, String, String)> {
        let mut command = self.host.meshd(Path::new(MESHD));
        command.args(words);
        let output = self.host.output(&mut command, COMMAND * slower())?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((output.status.success(), text(output.stdout), text(output.stderr)))
    }

    /// The same, as data.
    pub(crate) fn json<T: DeserializeOwned>(&self, words: &[&str]) -> Result<T> {
        let out = self.cli(&[words, &["-o", "json"]].concat())?;
        serde_json::from_str(&out).with_context(|| format!("meshd {words:?} -o json printed {out}"))
    }

    /// A new join token: the line that is one word and long.
    pub(crate) fn token(&self) -> Result<String> {
        self.token_of(&[])
    }

    /// The same with more words, such as `--uses 2`.
    pub(crate) fn token_of(&self, words: &[&str]) -> Result<String> {
        let out = self.cli(&[&["token", "create"], words].concat())?;
        let token = out.lines().find(|l| l.len() >= 40 && !l.contains(' '));
        Ok(token.with_context(|| format!("no token in {out:?}"))?.to_owned())
    }

    /// What the daemon says of itself; asked as data, because the exit status says no more than "member or not".
    pub(crate) fn status(&self) -> Result<Status> {
        let (_, out, err) = self.try_cli(&["status", "-o", "json"])?;
        serde_json::from_str(&out).with_context(|| format!("meshd status -o json printed {out}{err}"))
    }

    /// Waits until the daemon answers.
    pub(crate) fn until_answers(&self) -> Result<Status> {
        eventually(SETTLED, "the daemon answers", || self.status()).with_context(|| self.log_end())
    }

    /// Waits until the daemon is in this state of its life.
    pub(crate) fn until(&self, state: State) -> Result<()> {
        eventually(SETTLED, &format!("{} is {state}", self.host.name), || {
            let status = self.status()?;
            ensure!(status.state == state, "it is {}: {:?}", status.state, status.reason);
            Ok(())
        })
        .with_context(|| self.log_end())
    }

    /// Waits until connections from here to all addresses of `other` are secured.
    pub(crate) fn until_captures(&self, other: &Host) -> Result<()> {
        self.until_captured(&other.name, &addresses(other))
    }

    /// Waits until connections from here to these addresses of the member `name` are secured.
    pub(crate) fn until_captured(&self, name: &str, wanted: &[IpAddr]) -> Result<()> {
        eventually(SETTLED, &format!("{} captures {name}", self.host.name), || {
            let captured = self.captured(name)?;
            ensure!(wanted.iter().all(|ip| captured.contains(ip)), "only {captured:?}");
            Ok(())
        })
        .with_context(|| self.log_end())
    }

    /// The addresses of the member `name` to which connections from here are secured.
    pub(crate) fn captured(&self, name: &str) -> Result<BTreeSet<IpAddr>> {
        let nodes = self.nodes()?;
        let node = nodes.iter().find(|n| n.name.as_str() == name).with_context(|| format!("no {name} in {nodes:?}"))?;
        Ok(node.captured.iter().copied().collect())
    }

    /// The nodes it knows.
    pub(crate) fn nodes(&self) -> Result<Vec<Node>> {
        self.json(&["nodes"])
    }

    /// The edges it shows.
    pub(crate) fn edges(&self) -> Result<Vec<Edge>> {
        self.json(&["edges"])
    }

    /// The SVIDs it holds.
    pub(crate) fn identities(&self) -> Result<Vec<Identity>> {
        self.json(&["identity"])
    }

    /// What it expects at an address.
    pub(crate) fn resolve(&self, address: SocketAddr) -> Result<Resolve> {
        self.json(&["resolve", &address.to_string()])
    }

    /// Waits until it shows an edge with a connection.
    pub(crate) fn edge(&self, direction: Direction, peer: IpAddr, port: u16) -> Result<Edge> {
        eventually(SHOWN, &format!("{} shows the edge {direction} {peer} port {port}", self.host.name), || {
            let edges = self.edges()?;
            let edge = edges.iter().find(|e| e.direction == direction && e.address == peer && e.port == port && e.total > 0);
            edge.cloned().with_context(|| format!("only {edges:#?}"))
        })
    }

    /// Whether it shows any edge of this port.
    pub(crate) fn has_edge(&self, port: u16) -> Result<bool> {
        Ok(self.edges()?.iter().any(|e| e.port == port))
    }

    /// Applies an nft script on this host, as another firewall would.
    pub(crate) fn nft(&self, script: &str) -> Result<()> {
        let file = self.dir().join("script.nft");
        std::fs::write(&file, script)?;
        run_on(self, command("nft").arg("-f").arg(&file)).map(drop)
    }
}

/// Runs somebody else's program on a host to its successful end, and returns what it printed.
pub(crate) fn run_on(host: &Host, program: &mut Command) -> Result<String> {
    let output = host.output(program, Duration::from_secs(120))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{:?} on {} ended with {}: {text}{}",
        program.get_program(),
        host.name,
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(text)
}
