//! Configuration: defaults, then the file, then `MESHD_*` in the environment, then flags, into one validated [`Config`].
//!
//! Owns every default, every limit of a setting and every look at the process environment. Nothing needs to be configured: a file
//! is optional and a missing key is its default. A [`Config`] is valid, and remembers where each value came from ([`Config::origin`]).
//! Does not act on any setting.

mod duration;
mod environment;
mod keys;
mod value;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use meshd_ca::identity::{HostName, TrustDomain};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub(crate) use duration::ago;
pub use duration::{DurationError, parse_duration, show_duration};
pub use environment::Environment;
pub(crate) use environment::LINE;
pub use keys::{KEYS, Key};
pub(crate) use value::choose;
pub use value::nearest;
use value::{Value, unique};

/// Where the configuration file is unless `MESHD_CONFIG` or `--config` says otherwise. It need not exist.
pub const FILE: &str = "/etc/meshd/meshd.toml";
/// Longest configuration file, in bytes.
pub const MAX_FILE: u64 = 64 * 1024;
/// Default of `state_dir`: keys and roster.
pub const STATE_DIR: &str = "/var/lib/meshd";
/// Default of `run_dir`: the socket of the local API.
pub const RUN_DIR: &str = "/run/meshd";
/// Default of `port`: the only TCP port a member opens to others (MESH on a keypad).
pub const PORT: u16 = 6374;
/// Default of `capture_port`: where the kernel hands captured connections over, on loopback.
pub const CAPTURE_PORT: u16 = 6375;
/// Default of `admin_port`: metrics and readiness, on loopback unless `admin_address` is set.
pub const ADMIN_PORT: u16 = 6376;
/// Default of `skip_ports`: never captured. SSH, so that nobody locks himself out.
pub const SKIP_PORTS: [u16; 1] = [22];
/// Default of `svid_lifetime`: 72 hours.
pub const SVID_LIFETIME: Duration = Duration::from_secs(72 * 3600);
/// Shortest and longest `svid_lifetime`.
pub const SVID_LIFETIMES: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(30 * 86_400)];
/// Default of `drain`: how long open connections may go on after a request to stop.
pub const DRAIN: Duration = Duration::from_secs(30);
/// Shortest and longest `drain`.
pub const DRAINS: [Duration; 2] = [Duration::ZERO, Duration::from_secs(600)];
/// Default of `upgrade_drain`: how long connections may go on in the process of before an upgrade.
pub const UPGRADE_DRAIN: Duration = Duration::from_secs(86_400);
/// Shortest and longest `upgrade_drain`.
pub const UPGRADE_DRAINS: [Duration; 2] = [Duration::ZERO, Duration::from_secs(30 * 86_400)];
/// Default of `keepalive`: how long a connection is idle before the other end is asked whether it is there.
pub const KEEPALIVE: Duration = Duration::from_secs(30);
/// Shortest and longest `keepalive`.
pub const KEEPALIVES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3600)];
/// Default of `found_after`: how long a new host looks for a mesh before it founds one.
pub const FOUND_AFTER: Duration = Duration::from_secs(2);
/// Shortest and longest `found_after`.
pub const FOUND_AFTERS: [Duration; 2] = [Duration::ZERO, Duration::from_secs(300)];
/// Most entries of a list (`peers`, `skip_ports`, `interfaces`).
pub const MAX_LIST: usize = 256;
/// Longest path of a Unix socket, in bytes: `sun_path` of unix(7) without its final zero.
const MAX_SOCKET_PATH: usize = 107;

/// What a member does with plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Accepts it from anyone; the host works if meshd does not.
    #[default]
    Permissive,
    /// Refuses it from members, and fails closed.
    Strict,
    /// Accepts it and reports what strict would refuse.
    Audit,
}

/// How much the daemon says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What needs somebody to act.
    Error,
    /// And what deserves a look.
    Warn,
    /// And what happens to the mesh.
    #[default]
    Info,
    /// And what happens to connections.
    Debug,
    /// Everything.
    Trace,
}

/// How the daemon says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Whether there is a line for each connection that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccessLog {
    /// No.
    #[default]
    Off,
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A setting that is one word of a few. The words are those of the file, of the environment and of the flags.
pub(crate) trait Choice: Copy + PartialEq + 'static {
    /// The words and what they mean.
    const ALL: &'static [(&'static str, Self)];
}
impl Choice for Mode {
    const ALL: &'static [(&'static str, Self)] =
        &[("permissive", Self::Permissive), ("strict", Self::Strict), ("audit", Self::Audit)];
}
impl Choice for LogLevel {
    const ALL: &'static [(&'static str, Self)] =
        &[("error", Self::Error), ("warn", Self::Warn), ("info", Self::Info), ("debug", Self::Debug), ("trace", Self::Trace)];
}
impl Choice for LogFormat {
    const ALL: &'static [(&'static str, Self)] = &[("text", Self::Text), ("json", Self::Json)];
}
impl Choice for AccessLog {
    const ALL: &'static [(&'static str, Self)] = &[("off", Self::Off), ("text", Self::Text), ("json", Self::Json)];
}
macro_rules! choice_text {
    ($($name:ident)*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(Self::ALL.iter().find(|(_, v)| v == self).map_or("", |(w, _)| w))
            }
        }
    )*};
}
choice_text!(Mode LogLevel LogFormat AccessLog);

/// Where a peer may be found: an address or a DNS name, and the port. Only a hint: nothing said there is believed without proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    host: String,
    port: u16,
}

impl PeerAddress {
    /// The address, without brackets, or the name.
    pub fn host(&self) -> &str {
        &self.host
    }
    /// The port, [`PORT`] if none was written.
    pub fn port(&self) -> u16 {
        self.port
    }
    /// The address, unless it is a name that has to be looked up.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}
impl FromStr for PeerAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "expected an address or a name, with or without a port: 192.168.1.7, [fd00::7]:6374, pi-7.local".to_owned();
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self { host: ip.to_string(), port: PORT });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().ok().filter(|p| *p != 0).ok_or_else(wrong)?),
            None => (text, PORT),
        };
        if let Some(v6) = host.strip_prefix('[') {
            let ip: std::net::Ipv6Addr = v6.strip_suffix(']').and_then(|v6| v6.parse().ok()).ok_or_else(wrong)?;
            return Ok(Self { host: ip.to_string(), port });
        }
        let label =
            |l: &str| (1..=63).contains(&l.len()) && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        let numeric = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let valid = match numeric {
            true => host.parse::<IpAddr>().is_ok(),
            false => host.len() <= 253 && host.trim_end_matches('.').split('.').all(label),
        };
        if valid { Ok(Self { host: host.to_owned(), port }) } else { Err(wrong()) }
    }
}
impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// This variable of the environment.
    Environment(String),
    /// This flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) => write!(f, "environment, {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// Why there is no valid configuration. Each says where the wrong value is and what would be right.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file was named and cannot be read, or the default one exists and cannot.
    #[error("cannot read the configuration file {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The file is longer than [`MAX_FILE`].
    #[error("the configuration file {} is longer than {MAX_FILE} bytes: is it the right file?", path.display())]
    Long {
        /// The file.
        path: PathBuf,
    },
    /// The file is not TOML.
    #[error("{} is not valid TOML: {cause}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        cause: String,
    },
    /// A key that no version knows, or a misspelt one.
    #[error("{}: there is no setting {key:?}{}", path.display(), hint.as_ref().map_or_else(
        || "; `meshd config show` lists them".to_owned(), |h| format!(", did you mean {h:?}?")))]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The key in it.
        key: String,
        /// The setting that looks most like it.
        hint: Option<&'static str>,
    },
    /// A value that the setting cannot have.
    #[error("{key} ({origin}): {cause}")]
    Value {
        /// The setting.
        key: &'static str,
        /// Where the value is.
        origin: Origin,
        /// What is wrong with it and what is expected.
        cause: String,
    },
    /// Two values that cannot go together.
    #[error("{0}")]
    Conflict(String),
}

/// Every setting of the daemon and of the command line, valid.
#[derive(Debug, Clone)]
pub struct Config {
    /// The name this host wishes for in the mesh.
    pub host_name: HostName,
    /// Where keys, roster and cache are.
    pub state_dir: PathBuf,
    /// Where the socket of the local API is.
    pub run_dir: PathBuf,
    /// The port members talk to.
    pub port: u16,
    /// The loopback port captured connections arrive at.
    pub capture_port: u16,
    /// The port of metrics and readiness.
    pub admin_port: u16,
    /// Where that port is opened; none: on loopback only.
    pub admin_address: Option<IpAddr>,
    /// What is done with plaintext.
    pub mode: Mode,
    /// Where members may be found when multicast does not reach.
    pub peers: Vec<PeerAddress>,
    /// Whether this host may be made an authority.
    pub authority: bool,
    /// Where this host stands, for services that prefer their own zone.
    pub zone: Option<String>,
    /// The trust domain of a mesh that is founded here; none: derived from its id.
    pub trust_domain: Option<TrustDomain>,
    /// TCP ports that are never captured.
    pub skip_ports: BTreeSet<u16>,
    /// Whether to look for members by multicast DNS.
    pub mdns: bool,
    /// Network interfaces that count as LAN; empty: found by themselves.
    pub interfaces: Vec<String>,
    /// How long an SVID is valid.
    pub svid_lifetime: Duration,
    /// How long open connections may go on after a request to stop.
    pub drain: Duration,
    /// How long connections may go on in the process of before an upgrade.
    pub upgrade_drain: Duration,
    /// How long a connection is idle before the other end is probed.
    pub keepalive: Duration,
    /// How long a new host looks for a mesh before it founds one.
    pub found_after: Duration,
    /// Where the fleet token is; none: in one of the usual places, if anywhere.
    pub fleet_token_file: Option<PathBuf>,
    /// How much is logged.
    pub log_level: LogLevel,
    /// In what form.
    pub log_format: LogFormat,
    /// Whether each connection is logged when it has ended.
    pub access_log: AccessLog,
    origins: Vec<Origin>,
    notes: Vec<String>,
}

impl Config {
    /// The defaults on this host.
    pub fn defaults() -> Self {
        Self {
            host_name: HostName::nearest(&rustix::system::uname().nodename().to_string_lossy()),
            state_dir: STATE_DIR.into(),
            run_dir: RUN_DIR.into(),
            port: PORT,
            capture_port: CAPTURE_PORT,
            admin_port: ADMIN_PORT,
            admin_address: None,
            mode: Mode::default(),
            peers: Vec::new(),
            authority: true,
            zone: None,
            trust_domain: None,
            skip_ports: SKIP_PORTS.into(),
            mdns: true,
            interfaces: Vec::new(),
            svid_lifetime: SVID_LIFETIME,
            drain: DRAIN,
            upgrade_drain: UPGRADE_DRAIN,
            keepalive: KEEPALIVE,
            found_after: FOUND_AFTER,
            fleet_token_file: None,
            log_level: LogLevel::default(),
            log_format: LogFormat::default(),
            access_log: AccessLog::default(),
            origins: vec![Origin::Default; KEYS.len()],
            notes: Vec::new(),
        }
    }

    /// The configuration of this process: the file named by `file` (a flag), by `MESHD_CONFIG` or by default; `environment`; `flags`.
    ///
    /// # Errors
    /// [`ConfigError`]. A file that was named must exist, the default one need not.
    pub fn load(file: Option<&Path>, environment: &Environment, flags: &[(&Key, String)]) -> Result<Self, ConfigError> {
        let named = file.map(Path::to_owned).or_else(|| environment.config_file());
        let path = named.clone().unwrap_or_else(|| FILE.into());
        let mut config = Self::defaults();
        if let Some(text) = read(&path, named.is_some())? {
            config.apply_file(&path, &text)?;
        }
        config.apply_environment(environment)?;
        for (key, text) in flags {
            config.set(key.name, &Value::text(text), Origin::Flag(format!("--{}", key.flag)))?;
        }
        config.validate()?;
        Ok(config)
    }

    /// The defaults with what a file of this text says: for the fuzzers.
    ///
    /// # Errors
    /// As [`Config::load`].
    #[cfg(feature = "fuzzing")]
    #[doc(hidden)]
    pub fn of_text(text: &str) -> Result<Self, ConfigError> {
        let mut config = Self::defaults();
        config.apply_file(Path::new(FILE), text)?;
        config.validate()?;
        Ok(config)
    }

    /// This configuration with the settings of these names as `other` has them.
    pub fn with(&self, other: &Config, names: &[&str]) -> Config {
        let mut merged = self.clone();
        for (at, key) in KEYS.iter().enumerate().filter(|(_, key)| names.contains(&key.name)) {
            (key.take)(&mut merged, other);
            merged.origins[at].clone_from(&other.origins[at]);
        }
        merged
    }

    /// Applies what a file says.
    fn apply_file(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| ConfigError::Syntax {
            path: path.into(),
            cause: e.to_string().trim_end().to_owned(),
        })?;
        for (name, value) in &table {
            let Some(key) = KEYS.iter().find(|k| k.name == name) else {
                let hint = nearest(name, KEYS.iter().map(|k| k.name));
                return Err(ConfigError::Unknown { path: path.into(), key: name.chars().take(60).collect(), hint });
            };
            let origin = Origin::File(path.into());
            let value =
                Value::toml(value).map_err(|cause| ConfigError::Value { key: key.name, origin: origin.clone(), cause })?;
            self.set(key.name, &value, origin)?;
        }
        Ok(())
    }

    /// Applies what the environment says, and notes variables that look like misspelt settings.
    fn apply_environment(&mut self, environment: &Environment) -> Result<(), ConfigError> {
        for (name, text) in environment.settings() {
            match KEYS.iter().find(|k| k.variable() == name) {
                Some(key) => self.set(key.name, &Value::text(text), Origin::Environment(name.to_owned()))?,
                None => {
                    let known: Vec<String> = KEYS.iter().map(Key::variable).collect();
                    if let Some(like) = nearest(name, known.iter().map(String::as_str)) {
                        self.notes.push(format!("{name} is in the environment and means nothing; did you mean {like}?"));
                    }
                }
            }
        }
        Ok(())
    }

    fn set(&mut self, name: &str, value: &Value, origin: Origin) -> Result<(), ConfigError> {
        let Some(at) = KEYS.iter().position(|k| k.name == name) else { return Ok(()) };
        let key = &KEYS[at];
        (key.set)(self, value).map_err(|cause| ConfigError::Value { key: key.name, origin: origin.clone(), cause })?;
        self.origins[at] = origin;
        Ok(())
    }

    /// What no key can check alone.
    fn validate(&self) -> Result<(), ConfigError> {
        let ports = [("port", self.port), ("capture_port", self.capture_port), ("admin_port", self.admin_port)];
        if let Some((a, b)) = unique(&ports) {
            let port = self.port_of(a);
            return Err(ConfigError::Conflict(format!("{a} and {b} are both {port}: give each its own port")));
        }
        let socket = self.socket();
        let length = socket.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            return Err(ConfigError::Conflict(format!(
                "run_dir is too long: {} has {length} bytes and the kernel takes {MAX_SOCKET_PATH} for a socket; choose a shorter one",
                socket.display()
            )));
        }
        Ok(())
    }

    fn port_of(&self, name: &str) -> u16 {
        match name {
            "port" => self.port,
            "capture_port" => self.capture_port,
            _ => self.admin_port,
        }
    }

    /// Where the value of the setting `name` came from.
    pub fn origin(&self, name: &str) -> &Origin {
        KEYS.iter().position(|k| k.name == name).and_then(|at| self.origins.get(at)).unwrap_or(&Origin::Default)
    }

    /// Remarks for a person, such as a variable that looks like a misspelt setting.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The socket of the local API.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join(crate::api::SOCKET)
    }
}

/// The text of the file; none if it is not there and nobody `named` it.
fn read(path: &Path, named: bool) -> Result<Option<String>, ConfigError> {
    use std::io::Read as _;
    let fail = |cause| ConfigError::Read { path: path.into(), cause };
    let file = match std::fs::File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !named => return Ok(None),
        other => other.map_err(fail)?,
    };
    let mut text = String::new();
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(fail)?;
    if text.len() as u64 > MAX_FILE {
        return Err(ConfigError::Long { path: path.into() });
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests;
