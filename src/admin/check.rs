//! `GET /v1/check`: looks at this member the way a careful operator would, and says what to do about what it finds.
//!
//! Owns the findings and their wording; each code has a section in `docs/cli.md`. Looks only: nothing is repaired here.

use std::time::Duration;

use meshd_ca::roster::Member as RosterMember;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::api::{Finding, Level, code};
use crate::daemon::{Daemon, Member, Phase};

/// How long a member has to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// What was found, in the order of the groups.
pub(crate) async fn findings(daemon: &Daemon) -> Vec<Finding> {
    let mut found = Vec::new();
    found.push(ok("daemon", "meshd answers", code::DAEMON, Some(format!("version {}", env!("CARGO_PKG_VERSION")))));
    found.extend(admin_port(daemon));
    found.push(clock(daemon));
    found.extend(state(daemon));
    let member = match daemon.member() {
        Ok(member) => member,
        Err(no) => {
            let left = matches!(daemon.phase(), Phase::Left | Phase::Banished);
            let level = if left { Level::Warn } else { Level::Fail };
            found.push(finding("mesh", "this host is a member", level, code::MEMBER, no.1.why, no.1.remedy));
            return found;
        }
    };
    let roster = member.membership.roster();
    found.push(ok(
        "mesh",
        "this host is a member",
        code::MEMBER,
        Some(format!("{} in {}", member.membership.name(), roster.trust_domain())),
    ));
    found.push(capture(&member));
    found.extend(plaintext(&member));
    found.push(bundle(&member));
    found.extend(svids(&member));
    found.push(authority(&member));
    found.extend(peers(&member).await);
    found.extend(addresses(&member));
    found.push(mdns(daemon));
    found
}

/// Where the admin port could not be opened.
fn admin_port(daemon: &Daemon) -> Vec<Finding> {
    let name = "metrics and readiness are served on the admin port";
    let trouble = daemon.admin_trouble().all();
    let closed = trouble.into_iter().map(|(address, why)| {
        finding(
            "daemon",
            name,
            Level::Warn,
            code::PORTS,
            Some(format!("{address} cannot be opened: {why}")),
            Some("stop the other program, or set admin_port or admin_address; it is tried again every 10 s".into()),
        )
    });
    closed.collect()
}

fn clock(daemon: &Daemon) -> Finding {
    match daemon.clock().source() {
        "system" => ok(
            "host",
            "the clock can be used",
            code::CLOCK,
            Some("the system clock, which is not behind anything an authority signed".into()),
        ),
        _ => finding(
            "host",
            "the clock can be used",
            Level::Warn,
            code::CLOCK,
            Some("the system clock is behind what an authority has signed: certificates are judged by that floor instead".into()),
            Some("set the clock, or let it synchronise (NTP)".into()),
        ),
    }
}

/// Only what is wrong: that the disk takes what is written is no news.
fn state(daemon: &Daemon) -> Option<Finding> {
    daemon.unwritten().map(|why| {
        finding(
            "host",
            "the state directory can be written",
            Level::Warn,
            code::STATE,
            Some(why),
            Some("make room on the disk, or make it writable; meshd goes on meanwhile and tries again".into()),
        )
    })
}

fn capture(member: &Member) -> Finding {
    let state = member.rules.state();
    if state.on {
        let counters = member.rules.counters().unwrap_or_default();
        let addresses = member.book.latest().captured.len();
        return ok(
            "kernel",
            "connections to members are captured",
            code::CAPTURE,
            Some(format!("{addresses} addresses, {} connections so far", counters.captured)),
        );
    }
    finding(
        "kernel",
        "connections to members are captured",
        Level::Fail,
        code::CAPTURE,
        state.why,
        Some(
            "meshd needs CAP_NET_ADMIN and a kernel with nf_tables; connections from this host to members are in plaintext"
                .into(),
        ),
    )
}

/// What strict mode resets and audit mode lets pass: connections of members that are not secured.
fn plaintext(member: &Member) -> Option<Finding> {
    let count = member.rules.counters()?.plaintext;
    (count > 0).then(|| {
        finding(
            "kernel",
            "members do not connect in plaintext",
            Level::Warn,
            code::CAPTURE,
            Some(format!("{count} connections in plaintext came from addresses of members since meshd started")),
            Some(
                "is meshd running there, and does it capture? Containers and connections older than meshd are not covered".into(),
            ),
        )
    })
}

fn bundle(member: &Member) -> Finding {
    let now = member.now();
    let bundle = member.membership.bundle();
    let dead = bundle.roots.iter().filter(|r| !r.in_date(now)).count();
    let ends = bundle.roots.iter().map(|r| r.not_after.since(now)).max().unwrap_or_default();
    if bundle.roots.is_empty() || ends.is_zero() {
        return finding(
            "identity",
            "the roots of the mesh are in date",
            Level::Fail,
            code::BUNDLE,
            Some("no root is in date".into()),
            Some("check the clocks of the authorities".into()),
        );
    }
    let level = if dead > 0 { Level::Warn } else { Level::Ok };
    finding(
        "identity",
        "the roots of the mesh are in date",
        level,
        code::BUNDLE,
        Some(format!("{} roots, {dead} out of date, {} days left", bundle.roots.len(), ends.as_secs() / 86_400)),
        None,
    )
}

fn svids(member: &Member) -> Vec<Finding> {
    let now = member.now();
    let all = member.svids.held();
    let name = "certificates are in date and renewed in time";
    let mut found: Vec<Finding> = all
        .iter()
        .filter(|s| now > s.renew_at && s.leaf.not_after.since(now) < s.leaf.not_after.since(s.renew_at) / 2)
        .map(|s| {
            let left = s.leaf.not_after.since(now);
            let level = if left.is_zero() { Level::Fail } else { Level::Warn };
            finding(
                "identity",
                name,
                level,
                code::SVID,
                Some(format!("{} ends in {} s and was not renewed", s.leaf.id.workload, left.as_secs())),
                Some("look whether an authority is in reach; the log of meshd says why renewal fails".into()),
            )
        })
        .collect();
    if all.is_empty() {
        found.push(finding(
            "identity",
            name,
            Level::Fail,
            code::SVID,
            Some("this node has no certificate yet".into()),
            Some("look whether an authority is in reach".into()),
        ));
    } else if found.is_empty() {
        found.push(ok("identity", name, code::SVID, Some(format!("{} certificates", all.len()))));
    }
    found
}

fn authority(member: &Member) -> Finding {
    let roster = member.membership.roster();
    let name = "an authority is in reach";
    let names: Vec<String> = roster.authorities().map(|m| m.name.to_string()).collect();
    let heard = roster.authorities().any(|m| m.node() == member.me() || member.hears(m.node()));
    if heard {
        return ok("mesh", name, code::AUTHORITY, Some(names.join(", ")));
    }
    finding(
        "mesh",
        name,
        Level::Warn,
        code::AUTHORITY,
        Some(format!("{} cannot be heard: certificates are not renewed and nobody can join meanwhile", names.join(", "))),
        Some("start meshd there, or look at the network between".into()),
    )
}

/// One real handshake and request to every other member, all at once.
async fn peers(member: &Member) -> Vec<Finding> {
    let roster = member.membership.roster();
    let mut asked = JoinSet::new();
    for other in roster.active().map(RosterMember::node).filter(|n| *n != member.me()) {
        let links = member.links.clone();
        asked.spawn(async move {
            let begun = Instant::now();
            let answer = match timeout(PATIENCE, links.post(other, "/v1/ping", bytes::Bytes::new())).await {
                Ok(answer) => answer.map(|_| begun.elapsed()).map_err(|e| e.to_string()),
                Err(_) => Err("no answer in time".into()),
            };
            (other, answer)
        });
    }
    let mut found = Vec::new();
    while let Some(Ok((node, answer))) = asked.join_next().await {
        let who = roster.member(node).map_or_else(|| node.to_string(), |m| m.name.to_string());
        let name = format!("{who} answers and proves its key");
        found.push(match answer {
            Ok(took) => ok("peers", &name, code::PEER, Some(format!("in {:.1} ms", took.as_secs_f64() * 1000.0))),
            Err(why) => finding(
                "peers",
                &name,
                Level::Warn,
                code::PEER,
                Some(why),
                Some("is meshd running there, and TCP 6374 open between the two?".into()),
            ),
        });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn addresses(member: &Member) -> Vec<Finding> {
    let book = member.book.latest();
    let name = "addresses belong to one member each, and it answers";
    let mut found: Vec<Finding> = book
        .contested
        .iter()
        .map(|c| {
            finding(
                "addresses",
                name,
                Level::Warn,
                code::ADDRESS,
                Some(format!("{} is answered by two members", c.ip)),
                Some("give each host an address of its own".into()),
            )
        })
        .chain(book.warnings.iter().map(|w| {
            let what = if w.captured { "connections to it fail" } else { "connections to it are in plaintext" };
            finding(
                "addresses",
                name,
                Level::Warn,
                code::ADDRESS,
                Some(format!("nobody answers at {}: {what}", w.ip)),
                Some("is meshd running there, and TCP 6374 open?".into()),
            )
        }))
        .collect();
    if found.is_empty() {
        found.push(ok("addresses", name, code::ADDRESS, Some(format!("{} captured", book.captured.len()))));
    }
    found
}

fn mdns(daemon: &Daemon) -> Finding {
    let lan = daemon.lan().addresses().borrow().lan.clone();
    let name = "members can be found on the local network";
    if !daemon.config().mdns {
        return ok("network", name, code::MDNS, Some("mDNS is switched off".into()));
    }
    if lan.is_empty() {
        return finding(
            "network",
            name,
            Level::Warn,
            code::MDNS,
            Some("no interface is a LAN: up, with multicast and an address".into()),
            Some("connect the host, or name members with `peers`".into()),
        );
    }
    let names: Vec<String> = lan.iter().cloned().collect();
    ok("network", name, code::MDNS, Some(names.join(", ")))
}

fn ok(group: &str, name: &str, code: &str, detail: Option<String>) -> Finding {
    finding(group, name, Level::Ok, code, detail, None)
}

fn finding(group: &str, name: &str, level: Level, code: &str, detail: Option<String>, hint: Option<String>) -> Finding {
    Finding { group: group.into(), name: name.into(), level, detail, hint, code: code.into() }
}
