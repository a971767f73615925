//! `meshd check`: what is right and wrong with this host, group by group, with what to do.

use std::fmt::Write as _;

use clap::Args;

use super::screen::{Colour, Screen, plain};
use super::{Around, Exit, Failure, Output};
use crate::api::{Finding, Level, code};
use crate::config::Config;
use crate::local::{Local, LocalError};

const EXAMPLES: &str = "\
Looks only, changes nothing. Exit status 1 if anything failed; warnings do not count. Works without a daemon too: then that is \
the finding.

Examples:
  meshd check
  meshd check -o json | jq '.[] | select(.level != \"ok\")'";

/// Where each code of a finding is explained.
const EXPLAINED: &str = concat!(env!("CARGO_PKG_REPOSITORY"), "/blob/main/docs/cli.md#");

/// Check this host and its mesh, and say what to do about what is wrong
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Check {
    #[command(flatten)]
    output: Output,
}

impl Check {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let screen = around.screen(self.output);
        let (mut findings, config) = configuration(around.config(Vec::new()));
        if let Some(config) = config {
            match Local::new(config.socket()).check().await {
                Ok(found) => findings.extend(found),
                Err(error) => findings.push(no_answer(error)),
            }
        }
        screen.show(&findings, || text(&findings, &screen))?;
        let failed = findings.iter().any(|f| f.level == Level::Fail);
        Ok(if failed { Exit::Failed } else { Exit::Ok })
    }
}

fn configuration(config: Result<Config, crate::config::ConfigError>) -> (Vec<Finding>, Option<Config>) {
    let finding = |level, detail: Option<String>, hint: &str| Finding {
        group: "configuration".into(),
        name: "the configuration is valid".into(),
        level,
        detail,
        hint: Some(hint.to_owned()).filter(|h| !h.is_empty()),
        code: code::CONFIG.into(),
    };
    match config {
        Err(error) => (vec![finding(Level::Fail, Some(error.to_string()), "correct it: nothing else was looked at")], None),
        Ok(config) if config.notes().is_empty() => (vec![finding(Level::Ok, None, "")], Some(config)),
        Ok(config) => {
            (vec![finding(Level::Warn, Some(config.notes().join("; ")), "correct the name, or unset it")], Some(config))
        }
    }
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

/// The findings by group, in the order in which the groups first appear, and a last line that sums up.
fn text(findings: &[Finding], screen: &Screen) -> String {
    let mut groups: Vec<&str> = Vec::new();
    for finding in findings {
        if !groups.contains(&finding.group.as_str()) {
            groups.push(&finding.group);
        }
    }
    let mut text = String::new();
    for group in groups {
        let title = plain(group);
        let _ = writeln!(text, "{}\n{}", screen.paint(Colour::Bold, &title), "-".repeat(title.chars().count()));
        for finding in findings.iter().filter(|f| f.group == group) {
            one(&mut text, finding, screen);
        }
        text.push('\n');
    }
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    let (warnings, failures) = (count(Level::Warn), count(Level::Fail));
    let verdict = match (failures, warnings) {
        (0, 0) => screen.paint(Colour::Green, "all is well"),
        (0, _) => screen.paint(Colour::Yellow, &format!("works, with {warnings} to look at")),
        _ => screen.paint(Colour::Red, &format!("{failures} failed, {warnings} to look at")),
    };
    let _ = writeln!(text, "{verdict}");
    text
}

fn one(text: &mut String, finding: &Finding, screen: &Screen) {
    let mark = match finding.level {
        Level::Ok => screen.paint(Colour::Green, "√"),
        Level::Warn => screen.paint(Colour::Yellow, "‼"),
        Level::Fail => screen.paint(Colour::Red, "×"),
    };
    let name = plain(&finding.name);
    let detail = finding.detail.as_deref().map(plain).filter(|d| !d.is_empty());
    if finding.level == Level::Ok {
        let detail = detail.map_or(String::new(), |d| format!(" ({d})"));
        let _ = writeln!(text, "{mark} {name}{detail}");
        return;
    }
    let _ = writeln!(text, "{mark} {name}");
    let hint = finding.hint.as_deref().map(plain).filter(|h| !h.is_empty());
    let known = code::ALL.contains(&finding.code.as_str()).then(|| format!("{EXPLAINED}{}", finding.code));
    for line in [detail, hint, known].into_iter().flatten() {
        let _ = writeln!(text, "    {line}");
    }
}
