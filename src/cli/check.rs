//! `meshd check`: what is right and wrong with this host, group by group, with what to do.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _, stderr};
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::time::{Instant, sleep};

use super::screen::{Colour, Screen, plain};
use super::{Around, Exit, Failure, Format, Output};
use crate::api::{Finding, Level, code};
use crate::check;
use crate::config::{Config, ConfigError, parse_duration};
use crate::local::{Local, LocalError};

const EXAMPLES: &str = "\
Looks only, changes nothing. Exit status 1 if anything failed; warnings do not count. Works without a daemon too: then that is \
a finding, beside everything that can be seen without one.

Examples:
  meshd check
  sudo meshd check --pre
  meshd check -o short --wait 1m
  meshd check -o json | jq '.[] | select(.level != \"ok\")'";

/// Where each code of a finding is explained.
const EXPLAINED: &str = concat!(env!("CARGO_PKG_REPOSITORY"), "/blob/main/docs/checks.md#");
/// How often a check that failed is repeated.
const AGAIN: Duration = Duration::from_secs(1);

/// Check this host and its mesh, and say what to do about what is wrong
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Check {
    /// Before the first start: check what can be checked without a daemon
    #[arg(long)]
    pre: bool,
    /// Repeat until nothing fails, for as long as this [default: once]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    wait: Option<Duration>,
    /// Print all of it, only what is not well (short), or JSON for programs
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Shape,
}

/// How the findings are printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Shape {
    /// For people, group by group: may change
    #[default]
    Text,
    /// One line for each finding that is not well, and the verdict
    Short,
    /// For programs: stable, see docs/cli.md
    Json,
}

impl Check {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let format = if self.output == Shape::Json { Format::Json } else { Format::Text };
        let screen = around.screen(Output { output: format });
        let end = self.wait.map(|wait| Instant::now() + wait);
        let mut progress = Progress::default();
        let findings = loop {
            let findings = self.look(around).await;
            let failed = findings.iter().filter(|f| f.level == Level::Fail);
            let left = end.map_or(Duration::ZERO, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() || failed.clone().next().is_none() {
                break findings;
            }
            progress.show(failed.map(|f| f.name.as_str()), left);
            sleep(AGAIN.min(left)).await;
        };
        progress.clear();
        match self.output {
            Shape::Short => screen.print(&short(&findings, &screen))?,
            Shape::Text | Shape::Json => screen.show(&findings, || text(&findings, &screen))?,
        }
        let failed = findings.iter().any(|f| f.level == Level::Fail);
        Ok(if failed { Exit::Failed } else { Exit::Ok })
    }

    async fn look(&self, around: &Around<'_>) -> Vec<Finding> {
        // Read anew each time: it may be what is being corrected.
        let (mut findings, config) = configuration(around.config(Vec::new()));
        let Some(config) = config else { return findings };
        if self.pre {
            findings.extend(check::of_host(&config).await);
            return findings;
        }
        let local = Local::new(config.socket());
        match local.check().await {
            Ok(found) => {
                let other = local.status().await.ok().and_then(|status| other_version(&status.version));
                findings.extend(other);
                findings.extend(found);
            }
            Err(error) => {
                // Somebody listens there and does not answer: what is in use is its own.
                let alone = matches!(error, LocalError::NotRunning { .. });
                findings.push(no_answer(error));
                if alone {
                    findings.extend(check::of_host(&config).await);
                }
            }
        }
        findings
    }
}

fn configuration(config: Result<Config, ConfigError>) -> (Vec<Finding>, Option<Config>) {
    let finding = |code: &str, name: &str, level, detail: Option<String>, hint: Option<&str>| Finding {
        group: "configuration".into(),
        name: name.into(),
        level,
        detail,
        hint: hint.map(str::to_owned),
        code: code.into(),
    };
    let valid = |level, detail, hint| finding(code::CONFIG, "the configuration is valid", level, detail, hint);
    match config {
        Err(error) => (vec![valid(Level::Fail, Some(error.to_string()), Some("correct it: nothing else was looked at"))], None),
        Ok(config) => {
            let notes = Some(config.notes().join("; ")).filter(|n| !n.is_empty());
            let (level, hint) =
                if notes.is_some() { (Level::Warn, Some("correct the name, or unset it")) } else { (Level::Ok, None) };
            let spelt = finding(code::CONFIG_NOTES, "no setting in the environment is misspelt", level, notes, hint);
            (vec![valid(Level::Ok, None, None), spelt], Some(config))
        }
    }
}

/// Another version than this command runs.
fn other_version(daemon: &str) -> Option<Finding> {
    let own = env!("CARGO_PKG_VERSION");
    (daemon != own).then(|| Finding {
        group: "daemon".into(),
        name: "this command and the daemon are of one version".into(),
        level: Level::Warn,
        detail: Some(format!("the daemon is version {daemon}, this command is version {own}")),
        hint: Some("`sudo meshd upgrade` goes over to the installed version (`systemctl restart meshd` where it cannot)".into()),
        code: code::VERSION.into(),
    })
}

fn no_answer(error: LocalError) -> Finding {
    let failure = Failure::from(error);
    let (detail, hint) = failure.detail_and_hint();
    Finding {
        group: "daemon".into(),
        name: "meshd answers".into(),
        level: Level::Fail,
        detail: Some(detail),
        hint,
        code: code::DAEMON.into(),
    }
}

/// What is waited for, on one line of the terminal; nothing where there is none.
#[derive(Default)]
struct Progress {
    shown: bool,
}

impl Progress {
    fn show<'a>(&mut self, failed: impl Iterator<Item = &'a str>, left: Duration) {
        let failed: Vec<&str> = failed.collect();
        let Some(first) = failed.first().filter(|_| stderr().is_terminal()) else { return };
        let more = if failed.len() > 1 { format!(" and {} more", failed.len() - 1) } else { String::new() };
        let first: String = plain(first).chars().take(50).collect();
        let _ = write!(stderr(), "\r\x1b[Kwaiting, {} s left: {first}{more}", left.as_secs());
        let _ = stderr().flush();
        self.shown = true;
    }

    fn clear(&self) {
        if self.shown {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }
}

/// The findings by group, in the order in which the groups first appear.
fn grouped(findings: &[Finding]) -> Vec<(&str, Vec<&Finding>)> {
    let mut groups: Vec<(&str, Vec<&Finding>)> = Vec::new();
    for finding in findings {
        match groups.iter_mut().find(|(name, _)| *name == finding.group) {
            Some((_, group)) => group.push(finding),
            None => groups.push((&finding.group, vec![finding])),
        }
    }
    groups
}

/// All of them, and a last line that sums up.
fn text(findings: &[Finding], screen: &Screen) -> String {
    let mut text = String::new();
    for (title, group) in grouped(findings) {
        let title = plain(title);
        let _ = writeln!(text, "{}\n{}", screen.paint(Colour::Bold, &title), "-".repeat(title.chars().count()));
        for finding in group {
            one(&mut text, finding, screen);
        }
        text.push('\n');
    }
    text + &verdict(findings, screen)
}

/// One line for each that is not well: mark, name, what was seen, where it is explained.
fn short(findings: &[Finding], screen: &Screen) -> String {
    let mut text = String::new();
    for finding in grouped(findings).into_iter().flat_map(|(_, group)| group).filter(|f| f.level != Level::Ok) {
        let detail = finding.detail.as_deref().map(plain).filter(|d| !d.is_empty());
        let detail = detail.map_or(String::new(), |d| format!(": {d}"));
        let link = explained(finding).map_or(String::new(), |link| format!(" {link}"));
        let _ = writeln!(text, "{} {}{detail}{link}", mark(finding.level, screen), plain(&finding.name));
    }
    text + &verdict(findings, screen)
}

fn verdict(findings: &[Finding], screen: &Screen) -> String {
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    let (warnings, failures) = (count(Level::Warn), count(Level::Fail));
    let verdict = match (failures, warnings) {
        (0, 0) => screen.paint(Colour::Green, "all is well"),
        (0, _) => screen.paint(Colour::Yellow, &format!("works, with {warnings} to look at")),
        _ => screen.paint(Colour::Red, &format!("{failures} failed, {warnings} to look at")),
    };
    verdict + "\n"
}

fn mark(level: Level, screen: &Screen) -> String {
    match level {
        Level::Ok => screen.paint(Colour::Green, "√"),
        Level::Warn => screen.paint(Colour::Yellow, "‼"),
        Level::Fail => screen.paint(Colour::Red, "×"),
    }
}

/// The address of the section that explains a finding, if this command knows one.
fn explained(finding: &Finding) -> Option<String> {
    code::ALL.contains(&finding.code.as_str()).then(|| format!("{EXPLAINED}{}", finding.code))
}

fn one(text: &mut String, finding: &Finding, screen: &Screen) {
    let (mark, name) = (mark(finding.level, screen), plain(&finding.name));
    let detail = finding.detail.as_deref().map(plain).filter(|d| !d.is_empty());
    if finding.level == Level::Ok {
        let detail = detail.map_or(String::new(), |d| format!(" ({d})"));
        let _ = writeln!(text, "{mark} {name}{detail}");
        return;
    }
    let _ = writeln!(text, "{mark} {name}");
    let hint = finding.hint.as_deref().map(plain).filter(|h| !h.is_empty());
    for line in [detail, hint, explained(finding)].into_iter().flatten() {
        let _ = writeln!(text, "    {line}");
    }
}
