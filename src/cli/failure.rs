//! How a command ends: exit codes, and failures in the form what - why - what to do.

use std::fmt;
use std::process::ExitCode;

use super::screen::plain;
use crate::api::ErrorBody;
use crate::config::ConfigError;
use crate::local::LocalError;

/// What to do about a lack of rights.
pub(super) const AS_ROOT: &str = "run the command as root (sudo), or as the user that meshd runs as";

/// How a command ended, as the shell sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done, or the answer is yes.
    Ok = 0,
    /// Failed, or the answer is no.
    Failed = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// The daemon is not reachable.
    Unreachable = 3,
    /// Not permitted.
    Denied = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command failed, in words for the person who gave it.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    what: String,
    why: Option<String>,
    remedy: Option<String>,
}

impl Failure {
    /// A failure of which no more is known than what did not happen.
    pub fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self { exit, what: what.into(), why: None, remedy: None }
    }
    pub(super) fn why(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }
    pub(super) fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
    /// As a finding of `meshd check` says it: what and why, and what to do.
    pub(super) fn detail_and_hint(self) -> (String, Option<String>) {
        let detail = self.why.map_or(self.what.clone(), |why| format!("{}: {why}", self.what));
        (detail, self.remedy)
    }
    /// That something could not be read.
    pub(super) fn unreadable(what: &str, error: &std::io::Error) -> Self {
        let exit = if error.kind() == std::io::ErrorKind::PermissionDenied { Exit::Denied } else { Exit::Failed };
        Self::new(exit, format!("cannot read {what}")).why(error.to_string())
    }
    fn of_body(exit: Exit, body: ErrorBody) -> Self {
        Self { exit, what: body.what, why: body.why, remedy: body.remedy }
    }
}

/// Three lines at most; nothing in them can steer a terminal.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = |text: &str| text.lines().map(plain).collect::<Vec<_>>().join("\n         ");
        write!(f, "error: {}", lines(&self.what))?;
        if let Some(why) = &self.why {
            write!(f, "\n    why: {}", lines(why))?;
        }
        if let Some(remedy) = &self.remedy {
            write!(f, "\n  to do: {}", lines(remedy))?;
        }
        Ok(())
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let remedy = match &error {
            ConfigError::Read { .. } => "correct the path or its permissions; without a file the defaults hold",
            ConfigError::Long { .. } | ConfigError::Syntax { .. } | ConfigError::Unknown { .. } => "correct the file",
            ConfigError::Value { .. } | ConfigError::Conflict(_) => {
                "correct the value where it is set; docs/cli.md lists the settings"
            }
        };
        let exit = match &error {
            ConfigError::Read { cause, .. } if cause.kind() == std::io::ErrorKind::PermissionDenied => Exit::Denied,
            _ => Exit::Usage,
        };
        Self::new(exit, "the configuration is not valid").why(error.to_string()).remedy(remedy)
    }
}

impl From<LocalError> for Failure {
    fn from(error: LocalError) -> Self {
        let (exit, remedy) = match error {
            LocalError::Refused { denied, body } => return Self::of_body(if denied { Exit::Denied } else { Exit::Failed }, body),
            LocalError::NotRunning { .. } => (
                Exit::Unreachable,
                "start it (`systemctl start meshd`, or `meshd run`); if it runs with another --run-dir or MESHD_RUN_DIR, say so here too",
            ),
            LocalError::Permission { .. } => (Exit::Denied, AS_ROOT),
            LocalError::Connection { .. } => (Exit::Unreachable, "look at the daemon's log (`journalctl -u meshd`)"),
            LocalError::Silent { .. } => {
                (Exit::Unreachable, "look at the daemon's log (`journalctl -u meshd`); restart it if it hangs")
            }
            LocalError::Version { .. } => (
                Exit::Unreachable,
                "`sudo meshd upgrade` goes over to the installed version (`systemctl restart meshd` where it cannot)",
            ),
            LocalError::Garbled { .. } => {
                (Exit::Unreachable, "see which program has that socket open (`ss -xlp`), and restart meshd")
            }
        };
        Self::new(exit, error.to_string()).remedy(remedy)
    }
}

/// From the daemon's own entry points: the outermost words say what, the causes below say why.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let error = match error.downcast::<ErrorBody>() {
            Ok(body) => return Self::of_body(Exit::Failed, body),
            Err(error) => error,
        };
        let what = error.to_string();
        // Many libraries repeat their cause in their own text.
        let mut said = what.clone();
        let mut causes = Vec::new();
        for cause in error.chain().skip(1).map(ToString::to_string) {
            if !said.contains(&cause) {
                said.push_str(&cause);
                causes.push(cause);
            }
        }
        let failure = Self::new(Exit::Failed, what);
        if causes.is_empty() { failure } else { failure.why(causes.join(": ")) }
    }
}
