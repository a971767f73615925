//! The table of settings: the one place that names each, says what it is for, reads it and shows it. The file's keys, the
//! variables of the environment, the flags and `meshd config show` all come from it.

use super::value::{Value, interface, port, zone};
use super::{Config, DRAINS, FOUND_AFTERS, KEEPALIVES, PeerAddress, SVID_LIFETIMES, UPGRADE_DRAINS, show_duration};

/// One setting.
#[derive(Debug)]
pub struct Key {
    /// Its name in the file; `MESHD_` and this in capitals is its variable.
    pub name: &'static str,
    /// Its flag, without the dashes in front.
    pub flag: &'static str,
    /// What the flag's help calls its value.
    pub placeholder: &'static str,
    /// What it is for, in one line.
    pub about: &'static str,
    pub(super) set: fn(&mut Config, &Value) -> Result<(), String>,
    pub(super) take: fn(&mut Config, &Config),
    show: fn(&Config) -> String,
}

impl Key {
    /// Its variable in the environment.
    pub fn variable(&self) -> String {
        format!("MESHD_{}", self.name.to_ascii_uppercase())
    }
    /// The key of this name.
    pub fn named(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|k| k.name == name)
    }
    /// Its value in `config`, as TOML; empty if it has none.
    pub fn show(&self, config: &Config) -> String {
        (self.show)(config)
    }
}

/// A TOML basic string: JSON's strings are a subset of them.
fn quoted(text: impl ToString) -> String {
    serde_json::Value::String(text.to_string()).to_string()
}
fn list<T: ToString>(items: &[T]) -> String {
    format!("[{}]", items.iter().map(quoted_ref).collect::<Vec<_>>().join(", "))
}
fn quoted_ref<T: ToString>(text: &T) -> String {
    quoted(text.to_string())
}
/// An empty text unsets a value that is optional.
fn optional<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, String> {
    if text.is_empty() { Ok(None) } else { parse(text).map(Some) }
}

macro_rules! key {
    ($name:ident, $flag:literal, $placeholder:literal, $about:literal, |$v:ident| $read:expr, |$c:ident| $show:expr) => {
        Key {
            name: stringify!($name),
            flag: $flag,
            placeholder: $placeholder,
            about: $about,
            set: |config, $v| {
                config.$name = $read?;
                Ok(())
            },
            take: |config, other| config.$name.clone_from(&other.$name),
            show: |$c| $show,
        }
    };
}

/// Every setting.
pub static KEYS: &[Key] = &[
    key!(host_name, "host-name", "NAME", "The name this host wishes for in the mesh", |v| v.parsed(), |c| quoted(&c.host_name)),
    key!(state_dir, "state-dir", "DIR", "Where keys and membership are kept", |v| v.directory(), |c| quoted(
        c.state_dir.display()
    )),
    key!(run_dir, "run-dir", "DIR", "Where the socket of the local API is", |v| v.directory(), |c| quoted(c.run_dir.display())),
    key!(port, "port", "PORT", "The TCP port members talk to", |v| port(v.one()?), |c| c.port.to_string()),
    key!(capture_port, "capture-port", "PORT", "The loopback port captured connections arrive at", |v| port(v.one()?), |c| c
        .capture_port
        .to_string()),
    key!(admin_port, "admin-port", "PORT", "The port of metrics and readiness", |v| port(v.one()?), |c| c.admin_port.to_string()),
    key!(
        admin_address,
        "admin-address",
        "ADDR",
        "The address that port is opened on; none: loopback only",
        |v| optional(v.one()?, |t| t.parse().map_err(|_| "expected an IP address, such as 0.0.0.0 for all".to_owned())),
        |c| c.admin_address.map_or(String::new(), quoted)
    ),
    key!(mode, "mode", "MODE", "What is done with plaintext: permissive, strict or audit", |v| v.choice(), |c| quoted(c.mode)),
    key!(
        peers,
        "peers",
        "ADDR,...",
        "Where members may be found when multicast does not reach",
        |v| v.all(str::parse::<PeerAddress>),
        |c| { list(&c.peers) }
    ),
    key!(authority, "authority", "BOOL", "Whether this host may be made an authority", |v| v.boolean(), |c| c
        .authority
        .to_string()),
    key!(
        zone,
        "zone",
        "ZONE",
        "Where this host stands: services of the same zone are preferred",
        |v| optional(v.one()?, zone),
        |c| c.zone.as_ref().map_or(String::new(), quoted)
    ),
    key!(
        trust_domain,
        "trust-domain",
        "NAME",
        "The trust domain of a mesh that is founded here; later it cannot change",
        |v| optional(v.one()?, |t| t.parse().map_err(|e: meshd_ca::identity::NameError| e.to_string())),
        |c| c.trust_domain.as_ref().map_or(String::new(), quoted)
    ),
    key!(skip_ports, "skip-ports", "PORT,...", "TCP ports that are never captured", |v| v.ports(), |c| format!(
        "[{}]",
        c.skip_ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ")
    )),
    key!(mdns, "mdns", "BOOL", "Whether to look for members by multicast DNS", |v| v.boolean(), |c| c.mdns.to_string()),
    key!(
        interfaces,
        "interfaces",
        "NAME,...",
        "Network interfaces that count as LAN; none: found automatically",
        |v| v.all(interface),
        |c| { list(&c.interfaces) }
    ),
    key!(svid_lifetime, "svid-lifetime", "TIME", "How long an SVID is valid", |v| v.within(SVID_LIFETIMES), |c| quoted(
        show_duration(c.svid_lifetime)
    )),
    key!(
        drain,
        "drain",
        "TIME",
        "How long open connections may go on after a request to stop",
        |v| v.within(DRAINS),
        |c| quoted(show_duration(c.drain))
    ),
    key!(
        upgrade_drain,
        "upgrade-drain",
        "TIME",
        "How long connections may go on in the process of before an upgrade",
        |v| v.within(UPGRADE_DRAINS),
        |c| quoted(show_duration(c.upgrade_drain))
    ),
    key!(
        keepalive,
        "keepalive",
        "TIME",
        "How long a connection is idle before the other end is probed",
        |v| v.within(KEEPALIVES),
        |c| quoted(show_duration(c.keepalive))
    ),
    key!(
        found_after,
        "found-after",
        "TIME",
        "How long a new host looks for a mesh before it founds one",
        |v| v.within(FOUND_AFTERS),
        |c| { quoted(show_duration(c.found_after)) }
    ),
    key!(
        fleet_token_file,
        "fleet-token-file",
        "FILE",
        "The fleet token; none: on the boot partition or in the state directory, if anywhere",
        |v| match v.one()? {
            "" => Ok(None),
            _ => v.directory().map(Some),
        },
        |c| c.fleet_token_file.as_ref().map_or(String::new(), |f| quoted(f.display()))
    ),
    key!(log_level, "log-level", "LEVEL", "How much is logged: error, warn, info, debug or trace", |v| v.choice(), |c| quoted(
        c.log_level
    )),
    key!(log_format, "log-format", "FORMAT", "In what form: text or json", |v| v.choice(), |c| quoted(c.log_format)),
    key!(access_log, "access-log", "FORM", "A line for each connection that has ended: off, text or json", |v| v.choice(), |c| {
        quoted(c.access_log)
    }),
];
