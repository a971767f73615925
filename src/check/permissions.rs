//! What the process may do: the capabilities it needs, by name.

use super::By;
use super::findings::{Findings, Verdict};
use crate::api::{Finding, code};
use crate::config::Config;

/// Numbers of `linux/capability.h`.
const DAC_READ_SEARCH: u32 = 2;
const NET_BIND_SERVICE: u32 = 10;
const NET_ADMIN: u32 = 12;

/// What there is to know.
pub(super) struct Facts {
    /// The effective set, if the kernel says.
    pub(super) effective: Option<u64>,
    /// Whether one of the daemon's own ports is below 1024.
    pub(super) low_port: bool,
    /// Whose set it is.
    pub(super) by: By,
}

impl Facts {
    pub(super) fn read(config: &Config, by: By) -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let low_port = [config.port, config.capture_port, config.admin_port].iter().any(|p| *p < 1024);
        Self { effective: effective(&status), low_port, by }
    }
}

/// The effective set in a `/proc/PID/status`.
fn effective(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("permissions");
    let judge = |bit: u32, without: Verdict| match facts.effective {
        Some(set) if set & 1 << bit != 0 => Verdict::ok(""),
        Some(_) => without,
        None => Verdict::warn("cannot tell: /proc/self/status is not readable", "mount /proc"),
    };
    let grant = |name: &str| match facts.by {
        By::Daemon => format!("start meshd as root, or give its unit {name} (AmbientCapabilities=)"),
        By::Command => "this command was asked, not the daemon: repeat it with sudo, as the daemon will run".to_owned(),
    };
    let nothing_works = "connections can neither be captured nor delivered without it";
    found.add(
        code::CAP_NET_ADMIN,
        "CAP_NET_ADMIN is there",
        judge(NET_ADMIN, Verdict::fail(nothing_works, grant("CAP_NET_ADMIN"))),
    );
    let low = if facts.low_port {
        Verdict::fail("a port of the daemon itself is below 1024", grant("CAP_NET_BIND_SERVICE"))
    } else {
        Verdict::warn(
            "services that insist on a client port below 1024, such as NFS, refuse secured connections",
            grant("CAP_NET_BIND_SERVICE"),
        )
    };
    found.add(code::CAP_NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE is there", judge(NET_BIND_SERVICE, low));
    let slower = Verdict::warn("workloads are looked up more slowly, by walking the cgroup tree", grant("CAP_DAC_READ_SEARCH"));
    found.add(code::CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH is there", judge(DAC_READ_SEARCH, slower));
    found.done()
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::{ill, levels};
    use super::*;
    use crate::api::Level::{Fail, Ok, Warn};

    fn with(effective: u64, low_port: bool) -> Vec<Finding> {
        findings(&Facts { effective: Some(effective), low_port, by: By::Daemon })
    }

    #[test]
    fn each_capability_is_named() {
        let all = 1 << NET_ADMIN | 1 << NET_BIND_SERVICE | 1 << DAC_READ_SEARCH;
        assert_eq!(
            levels(&with(all, true)),
            [(code::CAP_NET_ADMIN, Ok), (code::CAP_NET_BIND_SERVICE, Ok), (code::CAP_DAC_READ_SEARCH, Ok)]
        );
        assert_eq!(ill(&with(all & !(1 << NET_ADMIN), false)), [(code::CAP_NET_ADMIN, Fail)]);
        assert_eq!(ill(&with(all & !(1 << NET_BIND_SERVICE), false)), [(code::CAP_NET_BIND_SERVICE, Warn)]);
        assert_eq!(ill(&with(all & !(1 << NET_BIND_SERVICE), true)), [(code::CAP_NET_BIND_SERVICE, Fail)]);
        assert_eq!(ill(&with(all & !(1 << DAC_READ_SEARCH), false)), [(code::CAP_DAC_READ_SEARCH, Warn)]);
        assert_eq!(ill(&findings(&Facts { effective: None, low_port: false, by: By::Command })).len(), 3);
    }

    #[test]
    fn the_set_is_read_from_the_status_of_a_process() {
        assert_eq!(effective("Name:\tmeshd\nCapPrm:\t00000000000000ff\nCapEff:\t0000000000001404\n"), Some(0x1404));
        assert_eq!(effective("CapEff:\tx\n"), None);
        assert!(Facts::read(&Config::defaults(), By::Command).effective.is_some());
    }
}
