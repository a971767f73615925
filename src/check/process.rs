//! The daemon as a process: what runs, what it may use, and what went wrong in it.

use super::findings::{Findings, Verdict, some_of};
use super::proc::{Process, other_daemons, own_descriptors};
use super::{By, LIMIT_NEAR};
use crate::api::{Finding, code};
use crate::proxy::live;

/// Fewer open files than this are too few for a host with some services: a connection takes two.
const FEW_FILES: u64 = 1024;
/// A machine with less memory left than this, in bytes, soon kills somebody.
const LITTLE_MEMORY: u64 = 16 << 20;
/// Failed handshakes below this are port scans and hosts that went to sleep.
const SOME_HANDSHAKES: u64 = 20;

/// What there is to know of a running daemon.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    /// Whether the program's file was replaced or removed since it was started.
    pub(super) replaced: bool,
    pub(super) uptime_seconds: u64,
    /// Open files, and how many there may be.
    pub(super) files: (u64, u64),
    /// Bytes in memory, and how many the unit may have.
    pub(super) resident: u64,
    pub(super) memory_limit: Option<u64>,
    /// Bytes the machine has left.
    pub(super) memory_left: Option<u64>,
    /// Of a member.
    pub(super) counters: Option<Counters>,
}

/// What a member counted since it was started.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counters {
    pub(super) panics: u64,
    /// On the mesh port: connections, those that found no place, handshakes that failed.
    pub(super) accepted: u64,
    pub(super) crowded: u64,
    pub(super) failed: u64,
    /// Connections of applications: those refused for want of room, and those open now.
    pub(super) overloads: u64,
    pub(super) open: usize,
    /// How many of them there may be.
    pub(super) limits: live::Limits,
    /// Edges that had to be left out of the table.
    pub(super) dropped: u64,
}

impl Facts {
    /// Of this process.
    pub(super) fn read(uptime_seconds: u64, counters: Option<Counters>) -> Self {
        let exe = std::fs::read_link("/proc/self/exe").unwrap_or_default();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let (status, meminfo) = (read("/proc/self/status"), read("/proc/meminfo"));
        Self {
            replaced: exe.to_string_lossy().ends_with(" (deleted)"),
            uptime_seconds,
            files: (own_descriptors() as u64, limit),
            resident: kib(&status, "VmRSS:").unwrap_or(0),
            memory_limit: memory_limit(&read("/proc/self/cgroup")),
            memory_left: kib(&meminfo, "MemAvailable:"),
            counters,
        }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The bytes in a line such as `VmRSS:  1234 kB`.
fn kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|l| l.strip_prefix(name))?;
    value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The lowest limit of the unit and of what it is in (cgroup2).
fn memory_limit(cgroup: &str) -> Option<u64> {
    let path = cgroup.lines().find_map(|l| l.strip_prefix("0::"))?;
    let mount = crate::intercept::cgroup::Cgroups::open().ok()?.mount().to_owned();
    let own = mount.join(path.trim_start_matches('/'));
    let up = own.ancestors().take_while(|dir| dir.starts_with(&mount));
    up.filter_map(|dir| std::fs::read_to_string(dir.join("memory.max")).ok()?.trim().parse().ok()).min()
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("daemon");
    let version = env!("CARGO_PKG_VERSION");
    found.ok(code::DAEMON, "meshd answers", format!("version {version}, up {} s", facts.uptime_seconds));
    found.add(
        code::VERSION,
        "what runs is what is installed",
        match facts.replaced {
            false => Verdict::ok(""),
            true => Verdict::warn(
                "the program was replaced or removed since the daemon was started",
                "`sudo meshd upgrade` goes over to the installed version (`systemctl restart meshd` where it cannot)",
            ),
        },
    );
    let (open, limit) = facts.files;
    let hint = "raise LimitNOFILE= of the unit, or `ulimit -n` where meshd is started by hand";
    found.add(
        code::FILES,
        "the daemon may open enough files",
        match () {
            () if limit < FEW_FILES || open * 100 >= limit.saturating_mul(LIMIT_NEAR) => {
                Verdict::warn(format!("{open} of {limit} are open, and a connection takes two"), hint)
            }
            () => Verdict::ok(format!("{open} of {limit} are open")),
        },
    );
    found.add(code::MEMORY, "the daemon has enough memory", memory(facts));
    if let Some(c) = &facts.counters {
        counters(c, &mut found);
    }
    found.done()
}

fn memory(facts: &Facts) -> Verdict {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let used = mib(facts.resident);
    match (facts.memory_limit, facts.memory_left) {
        (Some(limit), _) if facts.resident.saturating_mul(100) >= limit.saturating_mul(LIMIT_NEAR) => {
            Verdict::warn(format!("{used} of the {} its unit may have", mib(limit)), "raise MemoryMax= of the unit")
        }
        (_, Some(left)) if left < LITTLE_MEMORY => {
            Verdict::warn(format!("the machine has {} left", mib(left)), "see what uses it (`ps aux --sort -rss`)")
        }
        (Some(limit), _) => Verdict::ok(format!("{used} of {}", mib(limit))),
        (None, _) => Verdict::ok(used),
    }
}

fn counters(c: &Counters, found: &mut Findings) {
    found.add(
        code::PANICS,
        "no connection ended by a defect of meshd",
        match c.panics {
            0 => Verdict::ok(""),
            n => Verdict::warn(
                format!("{n} did"),
                "report it with the lines that say `panicked` in the log (`journalctl -u meshd`)",
            ),
        },
    );
    let detail = format!("{} connections, {} handshakes failed, {} found no place", c.accepted, c.failed, c.crowded);
    let handshakes = match () {
        () if c.crowded > 0 => {
            Verdict::warn(detail, "somebody opens very many connections to the mesh port: the log says from where at level debug")
        }
        () if c.failed >= SOME_HANDSHAKES && c.failed * 2 > c.accepted => {
            Verdict::warn(detail, "is a program that is no meshd sent to the mesh port? The log says from where at level debug")
        }
        () => Verdict::ok(detail),
    };
    found.add(code::HANDSHAKES, "handshakes on the mesh port succeed", handshakes);
    let most = c.limits.all.min(c.limits.both);
    let overload = match (c.overloads, c.dropped) {
        (0, 0) => Verdict::ok(format!("{} open, {most} may be", c.open)),
        (0, edges) => Verdict::warn(
            format!("there was room for every connection, but {edges} were not shown as edges"),
            "`meshd edges` is not complete; nothing else is lost",
        ),
        (n, _) => Verdict::warn(
            format!("{n} were refused: there may be {most}, and {} with one member in each direction", c.limits.per_peer),
            "does an application open connections and never close them? `meshd edges` shows which",
        ),
    };
    found.add(code::OVERLOAD, "there was room for every connection", overload);
}

/// Another daemon in this network namespace. `asker` is not one of them.
pub(super) fn others(asker: By) -> Vec<Finding> {
    judge_others(asker, &other_daemons())
}

fn judge_others(asker: By, others: &[Process]) -> Vec<Finding> {
    let mut found = Findings::of("daemon");
    let name = "no other meshd runs in this network namespace";
    let who = some_of(others);
    found.add(code::OTHER_MESHD, name, match (others.is_empty(), asker) {
        (true, _) => Verdict::ok(""),
        (false, By::Daemon) => Verdict::warn(
            format!("{who} does too, and only one of them can capture"),
            "stop one of them; several on one machine need a network namespace each",
        ),
        (false, By::Command) => Verdict::fail(
            format!("{who} runs here"),
            "if that is the one you mean, say where its socket is (--run-dir or MESHD_RUN_DIR); else stop it before another starts",
        ),
    });
    found.done()
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::*;
    use crate::api::Level::{Fail, Warn};

    fn well() -> Facts {
        Facts {
            files: (40, 4096),
            resident: 14 << 20,
            memory_left: Some(1 << 30),
            counters: Some(Counters { accepted: 10, ..Counters::default() }),
            ..Facts::default()
        }
    }

    #[track_caller]
    fn with(change: impl FnOnce(&mut Facts, &mut Counters), expected: &[(&str, crate::api::Level)]) {
        let mut facts = well();
        let mut counters = facts.counters.unwrap();
        change(&mut facts, &mut counters);
        facts.counters = Some(counters);
        assert_eq!(ill(&findings(&facts)), expected);
    }

    #[test]
    fn limits_and_counters() {
        with(|_, _| {}, &[]);
        with(|f, _| f.replaced = true, &[(code::VERSION, Warn)]);
        with(|f, _| f.files = (20, 256), &[(code::FILES, Warn)]);
        with(|f, _| f.files = (3500, 4096), &[(code::FILES, Warn)]);
        with(|f, _| f.files = (3500, u64::MAX), &[]);
        with(|f, _| f.memory_limit = Some(16 << 20), &[(code::MEMORY, Warn)]);
        with(|f, _| f.memory_limit = Some(64 << 20), &[]);
        with(|f, _| f.memory_left = Some(LITTLE_MEMORY - 1), &[(code::MEMORY, Warn)]);
        with(|_, c| c.panics = 1, &[(code::PANICS, Warn)]);
        with(|_, c| c.crowded = 1, &[(code::HANDSHAKES, Warn)]);
        with(|_, c| (c.accepted, c.failed) = (39, 20), &[(code::HANDSHAKES, Warn)]);
        with(|_, c| (c.accepted, c.failed) = (19, 19), &[]);
        with(|_, c| (c.accepted, c.failed) = (4000, 20), &[]);
        with(|_, c| c.overloads = 1, &[(code::OVERLOAD, Warn)]);
        with(|_, c| c.dropped = 1, &[(code::OVERLOAD, Warn)]);
    }

    #[test]
    fn another_daemon_is_named() {
        let other = [Process { pid: 4711, name: "meshd".into() }];
        assert!(ill(&judge_others(By::Daemon, &[])).is_empty());
        assert_eq!(ill(&judge_others(By::Daemon, &other)), [(code::OTHER_MESHD, Warn)]);
        assert_eq!(ill(&judge_others(By::Command, &other)), [(code::OTHER_MESHD, Fail)]);
        assert!(judge_others(By::Command, &other)[0].detail.as_ref().unwrap().contains("4711"));
    }

    #[test]
    fn this_process_is_read() {
        let facts = Facts::read(7, None);
        assert!(facts.resident > 1 << 20 && facts.files.0 > 0 && facts.memory_left.is_some(), "{facts:?}");
        assert_eq!(kib("VmRSS:\t    1234 kB\n", "VmRSS:"), Some(1234 * 1024));
    }
}
