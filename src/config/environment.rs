//! The process environment, looked at once. The only code of meshd that reads it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

/// Prefix of the variables that are settings.
const PREFIX: &str = "MESHD_";
/// Names the configuration file.
const CONFIG: &str = "MESHD_CONFIG";
/// Names the stream that leads to the journal, systemd.exec(5).
const JOURNAL: &str = "JOURNAL_STREAM";

/// Names the descriptor that leads to the daemon whose place this process takes. No setting, hence without the prefix.
pub(crate) const LINE: &str = "_MESHD_LINE";

/// What the environment says to meshd.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    plain: bool,
    journal: Option<(u64, u64)>,
    ended_well: bool,
    line: Option<i32>,
}

impl Environment {
    /// The environment of this process.
    pub fn of_process() -> Self {
        Self::from_variables(std::env::vars_os())
    }

    /// An environment of these variables.
    pub fn from_variables(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut environment = Self::default();
        for (name, value) in variables {
            let (Some(name), value) = (name.to_str(), value.to_string_lossy()) else { continue };
            // https://no-color.org: present and not empty.
            if (name == "NO_COLOR" && !value.is_empty()) || (name == "TERM" && value == "dumb") {
                environment.plain = true;
            }
            if name == JOURNAL {
                environment.journal = value.split_once(':').and_then(|(dev, ino)| Some((dev.parse().ok()?, ino.parse().ok()?)));
            }
            if name == LINE {
                environment.line = value.parse().ok();
            }
            // systemd.exec(5): set for ExecStopPost=.
            environment.ended_well |= name == "SERVICE_RESULT" && value == "success";
            if name.starts_with(PREFIX) && !value.is_empty() && !is_service_link(&value) {
                environment.variables.insert(name.to_owned(), value.into_owned());
            }
        }
        environment
    }

    /// The file that `MESHD_CONFIG` names.
    pub fn config_file(&self) -> Option<PathBuf> {
        self.variables.get(CONFIG).map(PathBuf::from)
    }

    /// The other variables with the prefix `MESHD_`, by name.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().filter(|(n, _)| *n != CONFIG).map(|(n, v)| (n.as_str(), v.as_str()))
    }

    /// Device and inode of the stream that systemd connected to the journal, if any. A stream is that one only if it still has both.
    pub fn journal(&self) -> Option<(u64, u64)> {
        self.journal
    }

    /// Whether a service manager says that the service which has just ended did so by itself or as it was told to.
    pub fn ended_well(&self) -> bool {
        self.ended_well
    }

    /// The descriptor that leads to the daemon whose place this process is to take, if it was started for that.
    pub(crate) fn line(&self) -> Option<i32> {
        self.line
    }

    /// Whether colours are unwanted whatever the terminal (`NO_COLOR`, `TERM=dumb`).
    pub fn plain(&self) -> bool {
        self.plain
    }
}

/// Kubernetes sets `MESHD_PORT=tcp://10.43.0.7:6374` in every pod beside a Service named `meshd`: that is not our setting.
fn is_service_link(value: &str) -> bool {
    value.starts_with("tcp://") || value.starts_with("udp://") || value.starts_with("sctp://")
}
