//! Whether this kernel can do what the data plane asks of it. Each expression is tried in a table that nobody ever sees.

use std::net::IpAddr;

use super::findings::{Findings, Verdict, some_of};
use super::{LIMIT_NEAR, processor};
use crate::api::{Finding, code};
use crate::config::{Config, Mode};
use crate::intercept::attribution::Attribution;
use crate::intercept::netlink::NetlinkError;
use crate::intercept::nft::{self, Probe};
use crate::intercept::rtnetlink::{LOOPBACK, Route};
use crate::intercept::sockdiag::SockDiag;
use crate::intercept::socket::{Mark, outgoing_as};

/// What a packet filter lacks is mostly a module that is not there.
const MODULES: &str = "install the kernel's module packages (on a Raspberry Pi, restart after a kernel upgrade)";
const ROOT: &str = "only root may ask: repeat the command with sudo";

/// What there is to know.
pub(super) struct Facts {
    /// Each expression that was tried, or why none could be.
    pub(super) probes: Result<Vec<Tried>, Refused>,
    pub(super) strict: bool,
    /// Policy routing for IPv4 and IPv6.
    pub(super) policy: Result<(bool, bool), String>,
    /// Transparent sockets for IPv4 and IPv6: what the kernel said.
    pub(super) transparent: (Result<(), String>, Result<(), String>),
    /// Whether the host has IPv6 at all.
    pub(super) ipv6: bool,
    /// TCP listeners, and how many of them came with their cgroup.
    pub(super) listeners: Result<(usize, usize), String>,
    /// Where the cgroup2 tree is.
    pub(super) cgroups: Option<String>,
    /// Tracked connections, and how many there may be.
    pub(super) conntrack: Option<(u64, u64)>,
    /// The source ports of outgoing connections, and those that are spared (`ip_local_reserved_ports`).
    pub(super) port_range: Option<(u16, u16)>,
    pub(super) reserved: String,
    /// The daemon's own ports.
    pub(super) ports: Vec<u16>,
    /// Whether accepted sockets take over the mark of what they accept (`tcp_fwmark_accept`).
    pub(super) fwmark_accept: bool,
    /// Whether `lo` is up and has 127.0.0.1.
    pub(super) loopback: Result<bool, String>,
}

/// One expression, and what the kernel said to it.
pub(super) struct Tried {
    pub(super) name: &'static str,
    pub(super) result: Result<(), String>,
}

/// Why not one expression could be tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refused {
    /// Nobody may ask but root.
    NotPermitted,
    /// There is no nf_tables, or nothing to ask it with.
    Absent(String),
}

impl Facts {
    pub(super) fn read(config: &Config) -> Self {
        let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse().ok();
        let conntrack = |name: &str| number(&format!("/proc/sys/net/netfilter/nf_conntrack_{name}"));
        let reserved = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let attribution = Attribution::open();
        let borrow =
            |peer: [u16; 8]| outgoing_as(IpAddr::from(peer).to_canonical(), Mark::Service).map(drop).map_err(|e| e.to_string());
        Self {
            probes: probes(),
            strict: config.mode == Mode::Strict,
            policy: Route::open().and_then(|mut r| r.can_route_by_policy()).map_err(|e| e.to_string()),
            // Addresses of documentation (RFC 5737, RFC 3849): nobody's, and bound only for a moment.
            transparent: (borrow([0, 0, 0, 0, 0, 0xffff, 0xc000, 0x0201]), borrow([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1])),
            ipv6: std::path::Path::new("/proc/net/if_inet6").exists(),
            listeners: SockDiag::open().and_then(|d| d.listeners()).map_err(|e| e.to_string()).map(|all| {
                let known = all.iter().filter(|l| l.cgroup.is_some()).count();
                (all.len(), known)
            }),
            cgroups: attribution.cgroups().map(|c| c.mount().display().to_string()),
            conntrack: conntrack("count").zip(conntrack("max")),
            port_range: ports(&range),
            reserved: reserved.trim().to_owned(),
            ports: vec![config.port, config.capture_port, config.admin_port],
            fwmark_accept: number("/proc/sys/net/ipv4/tcp_fwmark_accept").is_some_and(|n: u64| n != 0),
            loopback: loopback().map_err(|e| e.to_string()),
        }
    }
}

fn probes() -> Result<Vec<Tried>, Refused> {
    let probes = nft::probe().map_err(|e| Refused::Absent(e.to_string()))?;
    let errno = |p: &Probe| p.result.as_ref().err().and_then(NetlinkError::errno);
    let all = |what: &dyn Fn(i32) -> bool| probes.iter().all(|p| errno(p).is_some_and(what));
    if all(&|e| e == libc::EPERM || e == libc::EACCES) {
        return Err(Refused::NotPermitted);
    }
    if all(&|_| true) {
        let why = probes.first().and_then(|p| p.result.as_ref().err()).map(ToString::to_string).unwrap_or_default();
        return Err(Refused::Absent(why));
    }
    Ok(probes.into_iter().map(|p| Tried { name: p.name, result: p.result.map_err(|e| e.to_string()) }).collect())
}

fn ports(range: &str) -> Option<(u16, u16)> {
    let mut words = range.split_whitespace().map(str::parse);
    Some((words.next()?.ok()?, words.next()?.ok()?))
}

fn loopback() -> Result<bool, NetlinkError> {
    let mut route = Route::open()?;
    let up = route.links()?.iter().any(|l| l.index == LOOPBACK && l.is_up());
    Ok(up && route.addresses()?.iter().any(|a| a.index == LOOPBACK && a.ip.is_ipv4() && a.ip.is_loopback()))
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("kernel");
    packet_filter(facts, &mut found);
    routing(facts, &mut found);
    owners(facts, &mut found);
    limits(facts, &mut found);
    processor::judge(&processor::Facts::read(), &mut found);
    found.done()
}

/// Name of the probe, code, what it is, and what is lost without it. What the daemon does not use is not looked at.
const EXPRESSIONS: [(&str, &str, &str, &str); 5] = [
    ("redirect", code::NFT_REDIRECT, "nf_tables can redirect (nft_redir, nft_chain_nat)", "nothing is captured"),
    ("fib", code::NFT_FIB, "nf_tables can ask the routing table (nft_fib_inet)", "nothing is captured"),
    ("reject", code::NFT_REJECT, "nf_tables can reset connections (nft_reject_inet)", "nothing is captured"),
    ("ct mark", code::NFT_CONNTRACK, "nf_tables can mark connections (nft_ct)", "nothing is captured"),
    ("counters", code::NFT_COUNTERS, "nf_tables has named counters (nft_objref)", "nothing is captured"),
];

fn packet_filter(facts: &Facts, found: &mut Findings) {
    let name = "the kernel has nf_tables";
    let tried = match &facts.probes {
        Ok(tried) => tried,
        Err(Refused::NotPermitted) => return found.warn(code::KERNEL, name, "cannot tell", ROOT),
        Err(Refused::Absent(why)) => {
            return found.fail(code::KERNEL, name, format!("connections cannot be captured: {why}"), MODULES);
        }
    };
    let result = |name: &str| tried.iter().find(|t| t.name == name).map(|t| &t.result);
    // Since Linux 5.6 sets are in nf_tables itself, and with an older one nobody could be told apart (5.9).
    match result("sets") {
        Some(Err(why)) => found.fail(code::KERNEL, name, format!("it has no sets for the addresses of members: {why}"), MODULES),
        _ => found.ok(code::KERNEL, name, ""),
    }
    for (probe, code, name, lost) in EXPRESSIONS {
        found.add(
            code,
            name,
            match result(probe) {
                Some(Ok(())) => Verdict::ok(""),
                Some(Err(why)) => Verdict::fail(format!("{lost}: {why}"), MODULES),
                None => Verdict::warn("it was not tried", "report it: the program is not as it should be"),
            },
        );
    }
    let has = |name| result(name).is_some_and(Result::is_ok);
    found.add(
        code::NFT_OWNER,
        "rules can belong to a process (Linux 5.12)",
        match has("table owner") {
            true => Verdict::ok(""),
            false => Verdict::warn(
                "another program that clears its rules clears meshd's too, for up to two seconds",
                "use a newer kernel, or keep other programs from `flush ruleset`",
            ),
        },
    );
    let persist = match (has("table persist"), facts.strict) {
        (true, _) => Verdict::ok(""),
        (false, false) => Verdict::ok("no: a daemon that is killed in the middle of a transfer may let a frame of it out"),
        (false, true) => Verdict::warn(
            "if meshd is killed, its rules go too: this host is then not strict",
            "use a newer kernel; until then a restart by systemd keeps the gap short",
        ),
    };
    found.add(code::NFT_PERSIST, "rules can outlive their process (Linux 6.9)", persist);
}

fn routing(facts: &Facts, found: &mut Findings) {
    let own = "services see this host instead of their client";
    let hint = "use a kernel with CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES";
    let name = "the kernel has policy routing";
    found.add(
        code::POLICY_ROUTING,
        name,
        match &facts.policy {
            Ok((true, v6)) if *v6 || !facts.ipv6 => Verdict::ok(if *v6 { "IPv4, IPv6" } else { "IPv4; there is no IPv6 here" }),
            Ok((true, _)) => Verdict::warn(format!("not for IPv6: {own}"), hint),
            Ok((false, _)) => Verdict::fail(format!("not for IPv4: {own}"), hint),
            Err(why) => Verdict::warn(format!("cannot tell: {why}"), "allow AF_NETLINK in the unit's sandbox"),
        },
    );
    let name = "the kernel has transparent sockets";
    found.add(
        code::TRANSPARENT,
        name,
        match (&facts.transparent.0, &facts.transparent.1) {
            (Ok(()), Ok(())) => Verdict::ok("IPv4, IPv6"),
            (Ok(()), Err(_)) if !facts.ipv6 => Verdict::ok("IPv4; there is no IPv6 here"),
            (Err(why), _) if matches!(facts.probes, Err(Refused::NotPermitted)) => {
                Verdict::warn(format!("cannot tell: {why}"), ROOT)
            }
            (Ok(()), Err(why)) => Verdict::warn(format!("not for IPv6: {why}"), MODULES),
            (Err(why), _) => {
                Verdict::fail(format!("connections of members cannot be delivered: {why}"), "see whether CAP_NET_ADMIN is there")
            }
        },
    );
    let name = "services do not take over the mark of a connection";
    found.add(
        code::FWMARK_ACCEPT,
        name,
        match facts.fwmark_accept {
            false => Verdict::ok(""),
            true => Verdict::fail(
                "net.ipv4.tcp_fwmark_accept is on: what services answer to members carries meshd's own mark and is dropped",
                "`sysctl net.ipv4.tcp_fwmark_accept=0`, and take it out of /etc/sysctl.d",
            ),
        },
    );
    found.add(
        code::LOOPBACK,
        "the loopback interface is up",
        match &facts.loopback {
            Ok(true) => Verdict::ok(""),
            Ok(false) => Verdict::fail(
                "captured connections arrive on loopback, and so do deliveries to services",
                "`ip link set dev lo up`; 127.0.0.1/8 belongs on it",
            ),
            Err(why) => Verdict::warn(format!("cannot tell: {why}"), "allow AF_NETLINK in the unit's sandbox"),
        },
    );
}

fn owners(facts: &Facts, found: &mut Findings) {
    let name = "the kernel says whose a socket is";
    let lost = "every connection counts as the host's own";
    found.add(
        code::SOCK_DIAG,
        name,
        match &facts.listeners {
            Ok((0, _)) => Verdict::ok("nothing listens here yet"),
            Ok((_, 0)) => Verdict::warn(format!("it does not say its cgroup: {lost}"), "use Linux 5.9 or newer"),
            Ok((all, _)) => Verdict::ok(format!("{all} listeners")),
            Err(why) => Verdict::fail(
                format!("services are not found, and {lost}: {why}"),
                "load inet_diag and tcp_diag, and allow AF_NETLINK in the unit's sandbox",
            ),
        },
    );
    let name = "units are known by their cgroups";
    found.add(
        code::CGROUPS,
        name,
        match &facts.cgroups {
            Some(mount) => Verdict::ok(format!("cgroup2 at {mount}")),
            None => Verdict::warn(format!("there is no cgroup2 tree: {lost}"), "mount one at /sys/fs/cgroup (systemd does)"),
        },
    );
}

fn limits(facts: &Facts, found: &mut Findings) {
    let name = "the table of tracked connections has room";
    let hint = "raise net.netfilter.nf_conntrack_max; each secured connection takes two entries on each host";
    found.add(
        code::CONNTRACK,
        name,
        match facts.conntrack {
            None => Verdict::ok("connections are not tracked yet"),
            Some((count, max)) if max > 0 && count >= max => {
                Verdict::fail(format!("{count} of {max}: the kernel drops new connections"), hint)
            }
            Some((count, max)) if max > 0 && count * 100 >= max * LIMIT_NEAR => Verdict::warn(format!("{count} of {max}"), hint),
            Some((count, max)) => Verdict::ok(format!("{count} of {max}")),
        },
    );
    let name = "outgoing connections do not take the daemon's ports";
    let Some((low, high)) = facts.port_range else {
        return found.ok(code::PORT_RANGE, name, "");
    };
    let at_risk = facts.ports.iter().filter(|p| (low..=high).contains(p) && !spared(&facts.reserved, **p));
    found.add(
        code::PORT_RANGE,
        name,
        match some_of(at_risk) {
            none if none.is_empty() => Verdict::ok(format!("they use {low} to {high}")),
            ports => Verdict::warn(
                format!("they use {low} to {high}, so one may have {ports} just when meshd starts"),
                format!("`sysctl net.ipv4.ip_local_reserved_ports={}`", join(&facts.reserved, &ports)),
            ),
        },
    );
}

/// Whether a port is in a list such as `8080,9148-9150`.
fn spared(list: &str, port: u16) -> bool {
    list.split(',')
        .filter_map(|part| {
            let (from, to) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
            Some(from.parse().ok()?..=to.parse().ok()?)
        })
        .any(|range: std::ops::RangeInclusive<u16>| range.contains(&port))
}

fn join(list: &str, more: &str) -> String {
    let more = more.replace(", ", ",");
    if list.is_empty() { more } else { format!("{list},{more}") }
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::{ill_with, levels};
    use super::*;
    use crate::api::Level::{Fail, Ok as Fine, Warn};

    const PROBES: [&str; 8] = ["redirect", "fib", "reject", "ct mark", "sets", "counters", "table owner", "table persist"];

    fn well() -> Facts {
        Facts {
            probes: Ok(PROBES.map(|name| Tried { name, result: Ok(()) }).into()),
            strict: false,
            policy: Ok((true, true)),
            transparent: (Ok(()), Ok(())),
            ipv6: true,
            listeners: Ok((3, 3)),
            cgroups: Some("/sys/fs/cgroup".into()),
            conntrack: Some((10, 1000)),
            port_range: Some((32_768, 60_999)),
            reserved: String::new(),
            ports: vec![6374, 6375, 6376],
            fwmark_accept: false,
            loopback: Ok(true),
        }
    }

    #[track_caller]
    fn with(change: impl FnOnce(&mut Facts), expected: &[(&str, crate::api::Level)]) {
        ill_with(well(), change, findings, expected);
    }

    #[test]
    fn each_expression_has_a_code_of_its_own() {
        with(|_| {}, &[]);
        for (name, code, ..) in EXPRESSIONS {
            with(|f| lack(f, name), &[(code, Fail)]);
        }
        with(|f| lack(f, "sets"), &[(code::KERNEL, Fail)]);
        with(|f| lack(f, "table owner"), &[(code::NFT_OWNER, Warn)]);
        // Only what is strict has to outlive its process.
        with(|f| lack(f, "table persist"), &[]);
        with(
            |f| {
                lack(f, "table persist");
                f.strict = true;
            },
            &[(code::NFT_PERSIST, Warn)],
        );
        with(|f| f.probes = Err(Refused::Absent("no such file".into())), &[(code::KERNEL, Fail)]);
        with(|f| f.probes = Err(Refused::NotPermitted), &[(code::KERNEL, Warn)]);
    }

    fn lack(facts: &mut Facts, name: &str) {
        for tried in facts.probes.as_mut().unwrap_or_else(|_| unreachable!()) {
            if tried.name == name {
                tried.result = Err("No such file or directory".into());
            }
        }
    }

    /// What this kernel is asked and what the table of codes says are the same.
    #[test]
    fn everything_that_is_probed_is_judged() {
        if let Ok(probes) = nft::probe() {
            let names: Vec<&str> = probes.iter().map(|p| p.name).filter(|n| *n != "socket cgroupv2").collect();
            assert_eq!(names, PROBES);
        }
    }

    #[test]
    fn routing_and_sockets() {
        with(|f| f.policy = Ok((false, false)), &[(code::POLICY_ROUTING, Fail)]);
        with(|f| f.policy = Ok((true, false)), &[(code::POLICY_ROUTING, Warn)]);
        with(
            |f| {
                f.policy = Ok((true, false));
                f.transparent.1 = Err("no".into());
                f.ipv6 = false;
            },
            &[],
        );
        with(|f| f.policy = Err("no".into()), &[(code::POLICY_ROUTING, Warn)]);
        with(|f| f.transparent.0 = Err("no".into()), &[(code::TRANSPARENT, Fail)]);
        with(|f| f.transparent.1 = Err("no".into()), &[(code::TRANSPARENT, Warn)]);
        with(|f| f.fwmark_accept = true, &[(code::FWMARK_ACCEPT, Fail)]);
        with(|f| f.loopback = Ok(false), &[(code::LOOPBACK, Fail)]);
        with(|f| f.loopback = Err("no".into()), &[(code::LOOPBACK, Warn)]);
        with(|f| f.listeners = Err("no".into()), &[(code::SOCK_DIAG, Fail)]);
        with(|f| f.listeners = Ok((4, 0)), &[(code::SOCK_DIAG, Warn)]);
        with(|f| f.listeners = Ok((0, 0)), &[]);
        with(|f| f.cgroups = None, &[(code::CGROUPS, Warn)]);
    }

    #[test]
    fn tables_and_ports() {
        with(|f| f.conntrack = Some((799, 1000)), &[]);
        with(|f| f.conntrack = Some((800, 1000)), &[(code::CONNTRACK, Warn)]);
        with(|f| f.conntrack = Some((1000, 1000)), &[(code::CONNTRACK, Fail)]);
        with(|f| f.conntrack = None, &[]);
        with(|f| f.port_range = Some((1024, 65_535)), &[(code::PORT_RANGE, Warn)]);
        with(
            |f| {
                f.port_range = Some((1024, 65_535));
                f.reserved = "80,6374-6376".into();
            },
            &[],
        );
        with(
            |f| {
                f.port_range = Some((1024, 65_535));
                f.reserved = "6374-6375,x,".into();
            },
            &[(code::PORT_RANGE, Warn)],
        );
    }

    #[test]
    fn this_kernel_is_looked_at_without_harm() {
        let facts = Facts::read(&Config::defaults());
        assert!(facts.listeners.is_ok() && facts.policy.is_ok() && facts.port_range.is_some());
        assert_eq!(
            levels(&findings(&facts)).iter().filter(|(code, level)| *code == code::PAGE_SIZE && *level == Fine).count(),
            1
        );
    }
}
