//! The tour of the README, followed to the letter on two hosts: every command as it is written, every line as it is printed.
//!
//! A session is a login on a host: a shell whose output is a file, with the program as `./meshd` and a `sudo` that is root already.
//! What a reader sees differently (a token, a count of bytes, his own name) is listed in [`MAY_VARY`]; nothing else is forgiven.

use std::io::{PipeWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use meshd::demo::lab::{Host, Process};
use meshd::demo::units::Units;

use crate::support::mesh::{MESHD, Mesh, Setup};
use crate::support::scenario::{Need, Scenario, scenario};
use crate::support::units::inside;
use crate::support::{equal, eventually, role};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!(
        "tour",
        the_readme_says_what_happens,
        Need::Cgroups,
        Need::Program("curl"),
        Need::Program("nft"),
        Need::Program("setpriv")
    ),
    scenario!("tour", troubleshooting_shows_what_happens, Need::Cgroups, Need::Program("curl"), Need::Program("setpriv")),
];

/// How long a person takes between two commands: what only looks is right by then.
const A_MOMENT: Duration = Duration::from_secs(15);
/// How long a command may take.
const COMMAND: Duration = Duration::from_secs(30);

/// What differs from one mesh, one user or one moment to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A token, cut off in print.
    Token,
    /// The code of a host that waits, also as part of a command.
    Code,
    /// The id of a mesh, also as part of a trust domain.
    Mesh,
    /// The id of a node.
    Node,
    /// Some bytes: a number and a unit.
    Bytes,
    /// How long ago something was.
    Ago,
    /// The version of the program.
    Version,
    /// Who is logged in.
    User,
}

/// In what the commands that have these words print, these and no others.
const MAY_VARY: &[(&str, &[Kind])] = &[
    ("meshd token create", &[Kind::Token]),
    ("meshd join", &[Kind::Mesh]),
    ("meshd nodes", &[Kind::Ago, Kind::Version]),
    ("meshd edges", &[Kind::Bytes, Kind::Ago, Kind::User, Kind::Node]),
    ("meshd status", &[Kind::Code, Kind::Node, Kind::Ago, Kind::Version]),
    ("meshd pending", &[Kind::Ago, Kind::Node]),
    ("meshd resolve", &[Kind::Mesh]),
];

/// Commands that change something: done once. The others may be repeated, as a person looks twice.
const ONCE: [&str; 5] = ["meshd run", "meshd token create", "meshd join", "meshd approve", "curl"];

/// One command of a transcript, on which host, and what is printed next.
#[derive(Debug)]
struct Step {
    host: String,
    command: String,
    printed: Vec<String>,
    /// The text above the block it is in.
    prose: String,
}

/// The transcripts in a section of a document: indented blocks that begin with a command on a host.
fn transcripts(file: &str, section: &str) -> Result<Vec<Step>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(&path)?;
    let heading = format!("## {section}");
    let inner = text.lines().skip_while(|l| *l != heading).skip(1).take_while(|l| !l.starts_with("## "));
    let (mut steps, mut prose, mut transcript, mut indented) = (Vec::<Step>::new(), String::new(), false, false);
    for line in inner {
        let Some(printed) = line.strip_prefix("    ") else {
            if indented && !line.is_empty() {
                prose.clear();
            }
            indented &= line.is_empty();
            prose.push_str(line);
            prose.push(' ');
            continue;
        };
        let prompt = printed.split_once("$ ").filter(|(host, _)| ["kitchen", "cellar"].contains(host));
        if let Some((host, command)) = prompt {
            transcript = true;
            steps.push(Step { host: host.into(), command: command.into(), printed: Vec::new(), prose: prose.clone() });
        } else {
            transcript &= indented;
            if let Some(step) = steps.last_mut().filter(|_| transcript) {
                step.printed.push(printed.to_owned());
            }
        }
        indented = true;
    }
    ensure!(!steps.is_empty(), "{file} has no transcripts under {heading:?}");
    Ok(steps)
}

/// The code in a word, if there is one: four times four characters, whatever is around it.
fn code(word: &str) -> Option<&str> {
    let code = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
    let group = |g: &str| g.len() == 4 && g.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    (code.len() == 19 && code.split('-').all(group)).then_some(code)
}

/// The words of a line with whatever may vary replaced by what it is.
fn general(line: &str, kinds: &[Kind]) -> Vec<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut out = Vec::new();
    for (at, word) in words.iter().enumerate() {
        let next = words.get(at + 1).copied().unwrap_or_default();
        let before = at.checked_sub(1).map_or("", |b| words[b]);
        out.push(kinds.iter().fold((*word).to_owned(), |word, kind| kind.replace(&word, before, next)));
    }
    out
}

impl Kind {
    fn replace(self, word: &str, before: &str, next: &str) -> String {
        const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
        let number = |w: &str| w.starts_with(|c: char| c.is_ascii_digit()) && w.parse::<f64>().is_ok();
        let id = |w: &str, length| w.len() == length && w.bytes().all(|b| b.is_ascii_lowercase() || (b'2'..=b'7').contains(&b));
        let with = |part: &str| word.replacen(part, &format!("<{self:?}>"), 1);
        match self {
            Kind::Token if word.starts_with("mesh1-") => with(word),
            Kind::Code => code(word).map_or_else(|| word.into(), with),
            Kind::Mesh if id(word, 16) => with(word),
            Kind::Mesh => match word.strip_prefix("spiffe://").and_then(|rest| rest.split_once(".meshd.internal/")) {
                Some((mesh, _)) => with(mesh),
                None => word.into(),
            },
            Kind::Node => match word.strip_prefix("/node/").unwrap_or(word) {
                node if id(node, 26) => with(node),
                _ => word.into(),
            },
            Kind::Bytes if number(word) && UNITS.contains(&next) => with(word),
            Kind::Bytes if number(before) && UNITS.contains(&word) => with(word),
            Kind::Ago if word.strip_suffix(['s', 'm', 'h']).is_some_and(number) => with(word),
            Kind::Version if word.trim_end_matches(',') == env!("CARGO_PKG_VERSION") => with(env!("CARGO_PKG_VERSION")),
            Kind::User => match word.split_once("/user/") {
                Some((_, user)) if !user.is_empty() => with(user),
                _ => word.into(),
            },
            _ => word.into(),
        }
    }
}

/// Nothing, if `printed` is what is `written`; else where they differ.
fn compare(written: &[String], printed: &[String], kinds: &[Kind]) -> Result<()> {
    let same_length = written.iter().zip(printed).all(|(w, p)| w.chars().count() == p.chars().count());
    for (number, line) in written.iter().enumerate() {
        let real = printed.get(number).map_or("nothing", String::as_str);
        equal!(general(line, kinds), general(real, kinds), "line {number}, {line:?} is written, {real:?} is printed; all of it");
        // As wide as written: then the columns are where they are written, too.
        let columns = |l: &str| l.char_indices().map(|(at, c)| (c == ' ').then_some(at)).collect::<Vec<_>>();
        ensure!(!same_length || columns(line) == columns(real), "the columns of {line:?} are not those of {real:?}");
    }
    ensure!(written.len() >= printed.len(), "more is printed than written: {:?}", &printed[written.len()..]);
    Ok(())
}

/// A shell on a host.
struct Session {
    shell: Process,
    stdin: PipeWriter,
    commands: usize,
    /// How much of the output was looked at.
    read: usize,
}

impl Session {
    /// Logs in on `host`, in the cgroup of a login session, where there is a program `meshd` in the working directory.
    fn open(host: &Host, cgroup: &Path) -> Result<Session> {
        let home = host.dir().join("home");
        std::fs::create_dir(&home)?;
        std::os::unix::fs::symlink(MESHD, home.join("meshd"))?;
        let bin = home.join("bin");
        std::fs::create_dir(&bin)?;
        std::os::unix::fs::symlink(MESHD, bin.join("meshd"))?;
        // Root needs no sudo. What it starts ends with the session, were the test to end with it. Written by a process of its own: see `cp`
        // in the checks.
        let write = r#"printf '#!/bin/sh\nexec setpriv --pdeathsig KILL -- "$@"\n' > "$0" && chmod 755 "$0""#;
        ensure!(Command::new("/bin/sh").args(["-c", write]).arg(bin.join("sudo")).status()?.success(), "no sudo");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = [bin].into_iter().chain(std::env::split_paths(&path)).chain([PathBuf::from("/usr/sbin")]);
        let (stdin, writer) = std::io::pipe()?;
        let shell = inside(cgroup, &Command::new("/bin/sh"));
        let mut command = host.meshd(Path::new(shell.get_program()));
        command.args(shell.get_args()).current_dir(&home).env("PATH", std::env::join_paths(places)?);
        let shell = host.spawn_with(&mut command, Stdio::from(stdin), "session")?;
        Ok(Session { shell, stdin: writer, commands: 0, read: 0 })
    }

    /// Types a command and returns the lines it printed, without those that a daemon in the background logged meanwhile.
    fn run(&mut self, command: &str) -> Result<Vec<String>> {
        self.commands += 1;
        let prompt = format!("-- prompt {} --\n", self.commands);
        writeln!(self.stdin, "{command}\necho; echo '{}'", prompt.trim_end())?;
        let new = eventually(COMMAND, &format!("`{command}` ends"), || {
            let log = self.shell.log();
            let end = log[self.read..].find(&prompt).context("not yet")?;
            let new = log[self.read..self.read + end].to_owned();
            self.read += end + prompt.len();
            Ok(new)
        })?;
        // The empty line is ours, whether the command's last line was ended or not.
        let lines: Vec<String> = new.lines().filter(|l| !is_log(l)).map(str::to_owned).collect();
        let more = lines.iter().rposition(|l| !l.is_empty()).map_or(0, |last| last + 1);
        Ok(lines[..more].to_vec())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The daemon in the background first, in good order.
        let _ = writeln!(self.stdin, "kill $!; wait; exit");
        let _ = self.shell.wait(Duration::from_secs(10));
    }
}

/// Whether a line is of a daemon's log: `2026-01-31T12:00:00.000000Z  INFO meshd…`.
fn is_log(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let time = words.next().is_some_and(|w| w.len() == 27 && w.ends_with('Z') && w.as_bytes()[10] == b'T');
    time && words.next().is_some_and(|w| ["INFO", "WARN", "ERROR"].contains(&w))
}

/// Two hosts with somebody logged in on each.
struct Tour {
    // Dropped first to last: whatever runs, then the cgroups it is in, then the hosts.
    kitchen: Session,
    cellar: Session,
    services: Vec<Process>,
    units: Units,
    mesh: Mesh,
    token: String,
    code: String,
}

impl Tour {
    fn start() -> Result<Tour> {
        let mut units = Units::find().context("no cgroups")?;
        let mesh = Setup::of(&["kitchen", "cellar"]).hosts()?;
        // The machine has root for certain; what another user would see differs by the name only.
        let login = units.cgroup("user.slice/user-0.slice/session-1.scope")?;
        let open = |name| Session::open(mesh.host(name), &login);
        Ok(Tour {
            kitchen: open("kitchen")?,
            cellar: open("cellar")?,
            services: Vec::new(),
            units,
            mesh,
            token: String::new(),
            code: String::new(),
        })
    }

    /// What the reader is told there is beside meshd: a web server.
    fn web(&mut self) -> Result<()> {
        let cgroup = self.units.cgroup("system.slice/web.service")?;
        let mut server = inside(&cgroup, &role::web("[::]:8000".parse()?));
        self.services.push(self.mesh.host("cellar").spawn(&mut server, "web")?);
        Ok(())
    }

    /// And a firewall.
    fn firewall(&mut self) -> Result<()> {
        self.mesh.at("kitchen").nft(
            "table inet fw { chain input { type filter hook input priority 0; policy drop; iif lo accept; \
             ct state established,related accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; \
             udp dport 5353 accept; }; }",
        )
    }

    fn follow(&mut self, step: &Step) -> Result<()> {
        let kinds: Vec<Kind> = MAY_VARY
            .iter()
            .filter(|(words, _)| step.command.contains(words))
            .flat_map(|(_, kinds)| kinds.iter().copied())
            .collect();
        // The reader has a token and a code of his own; in print the token is cut off.
        let words = step.command.split(' ').map(|w| match w {
            token if token.starts_with("mesh1-") => self.token.as_str(),
            word if code(word).is_some() => self.code.as_str(),
            word => word,
        });
        let command = words.collect::<Vec<_>>().join(" ");
        let session = if step.host == "kitchen" { &mut self.kitchen } else { &mut self.cellar };
        let mut once = || {
            let printed = session.run(&command)?;
            if let Some(token) = printed.iter().find(|l| l.starts_with("mesh1-")) {
                self.token.clone_from(token);
            }
            if let Some(code) = printed.iter().flat_map(|l| l.split(' ')).find_map(code) {
                code.clone_into(&mut self.code);
            }
            compare(&step.printed, &printed, &kinds).with_context(|| printed.join("\n"))
        };
        let done = if ONCE.iter().any(|w| step.command.contains(w)) {
            once()
        } else {
            eventually(A_MOMENT, "it prints what is written", once)
        }
        .with_context(|| format!("{}$ {}", step.host, step.command));
        if step.command.contains("meshd run") {
            // As long as it takes to type the next command.
            let member = self.mesh.at(&step.host);
            eventually(A_MOMENT, "the daemon listens", || {
                ensure!(member.dir().join("run/meshd.sock").exists());
                Ok(())
            })?;
        }
        done
    }
}

/// Words of a text, and how what they say is brought about.
type Scene = (&'static str, fn(&mut Tour) -> Result<()>);

/// Follows the transcripts of a section. `scene`: words of the text, and what they say is there when the block below begins.
fn follow(file: &str, section: &str, tour: &mut Tour, scene: &[Scene]) -> Result<usize> {
    let steps = transcripts(file, section)?;
    let mut left: Vec<_> = scene.iter().collect();
    for step in &steps {
        while let Some(at) = left.iter().position(|(words, _)| step.prose.contains(words)) {
            left.remove(at).1(tour).with_context(|| format!("set up: {}", step.prose))?;
        }
        tour.follow(step).with_context(|| format!("{file} is not what happens"))?;
    }
    if let [(words, _), ..] = left[..] {
        bail!("{file} says nothing of {words:?} any more: change the scenario with it");
    }
    Ok(steps.len())
}

fn the_readme_says_what_happens() -> Result<()> {
    let mut tour = Tour::start()?;
    let scene: [Scene; 2] = [
        ("`web.service` on cellar listens on port 8000", Tour::web),
        ("a firewall on kitchen that drops what it does not know", Tour::firewall),
    ];
    let steps = follow("README.md", "Five minutes on two hosts", &mut tour, &scene)?;
    ensure!(steps >= 10, "only {steps} commands were found");
    Ok(())
}

fn troubleshooting_shows_what_happens() -> Result<()> {
    let mut tour = Tour::start()?;
    let scene: [Scene; 3] = [
        ("A host that sees a mesh and has no token", |tour| {
            tour.kitchen.run("sudo meshd run &")?;
            eventually(A_MOMENT, "a mesh is founded", || tour.mesh.at("kitchen").token())?;
            tour.cellar.run("sudo meshd run &").map(drop)
        }),
        ("192.168.77.2 is a member, 192.168.77.3 is not", |tour| {
            tour.web()?;
            tour.mesh.at("kitchen").until_captures(tour.mesh.host("cellar"))
        }),
        ("Secured, and nothing listens on the port there", |tour| {
            tour.kitchen.run("curl -s http://192.168.77.2:9999/").map(drop)
        }),
    ];
    let steps = follow("docs/troubleshooting.md", "What it looks like", &mut tour, &scene)?;
    ensure!(steps >= 4, "only {steps} commands were found");
    Ok(())
}
