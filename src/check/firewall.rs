//! Other packet filters of this host: whether they let the mesh through, and whether they rely on what it changes.
//!
//! That there are other rules the kernel says itself; what they say is read from the `nft` program, where there is one.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

use super::findings::{Findings, Verdict, some_of};
use super::packets::{Fate, Packet, Rules};
use crate::api::{Finding, code};
use crate::intercept::nft::{ForeignChain, Ruleset};
use crate::intercept::sockdiag::SockDiag;
use crate::intercept::{MARK_MESH, MARK_SERVICE};

/// How long `nft` may take for a table; one of some thousand rules takes a fraction of a second.
const PATIENCE: Duration = Duration::from_secs(3);
/// Tables read; docker, Kubernetes and a firewall together have less.
const MAX_TABLES: usize = 32;
/// `NFPROTO_*`, and what `nft` calls them.
const FAMILIES: [(u8, &str); 3] = [(1, "inet"), (2, "ip"), (10, "ip6")];
/// Longest listing read, in bytes.
const MAX_LISTING: u64 = 32 << 20;
/// Members whose way in and out is looked at.
const MAX_PEERS: usize = 32;
/// `NF_INET_*`: where a filter can get in the way.
const HOOKS: [u32; 3] = [0, 1, 3];

/// What there is to know.
pub(super) struct Facts {
    /// None where the kernel does not tell this user.
    pub(super) ruleset: Option<Ruleset>,
    /// What `nft` printed; none if there is no such program, or it failed.
    pub(super) rules: Option<Rules>,
    /// Tables of the older iptables, as far as they may be seen.
    pub(super) iptables: BTreeSet<String>,
    pub(super) mesh_port: u16,
    /// The LAN's interfaces.
    pub(super) interfaces: Vec<String>,
    /// Own addresses, and those of members (or, as long as none is known, of any neighbour).
    pub(super) own: Vec<IpAddr>,
    pub(super) peers: Vec<IpAddr>,
    /// Ports of services of this host.
    pub(super) services: BTreeSet<u16>,
}

impl Facts {
    /// `peers` are addresses of members, if any are known.
    pub(super) fn read(
        ruleset: Option<Ruleset>,
        mesh_port: u16,
        interfaces: Vec<String>,
        own: Vec<IpAddr>,
        peers: Vec<IpAddr>,
    ) -> Self {
        let others = ruleset.as_ref().is_some_and(|r| r.foreign.iter().any(in_the_way));
        let listeners = SockDiag::open().and_then(|d| d.listeners()).unwrap_or_default();
        let services = listeners.iter().filter(|l| !l.local.ip().is_loopback()).map(|l| l.local.port());
        let names = ["ip", "ip6"].map(|f| std::fs::read_to_string(format!("/proc/net/{f}_tables_names")).unwrap_or_default());
        Self {
            rules: ruleset.as_ref().filter(|_| others).and_then(|r| listings(&r.foreign)),
            ruleset,
            iptables: names.iter().flat_map(|n| n.lines()).map(str::to_owned).collect(),
            mesh_port,
            interfaces,
            peers: if peers.is_empty() { own.clone() } else { peers },
            own,
            services: services.filter(|p| *p != mesh_port).collect(),
        }
    }
}

fn in_the_way(chain: &ForeignChain) -> bool {
    HOOKS.contains(&chain.hook) && (chain.drops || chain.rules > 0)
}

/// The rules of every table that is in the way; none if one of them cannot be read. Table by table: nft 1.0.6 cannot list ours as JSON,
/// whose flags it does not know.
fn listings(chains: &[ForeignChain]) -> Option<Rules> {
    let tables: BTreeSet<(u8, &str)> = chains.iter().filter(|c| in_the_way(c)).map(|c| (c.family, c.table.as_str())).collect();
    let mut rules = Rules::default();
    for (family, table) in tables.into_iter().take(MAX_TABLES) {
        rules.add(&listing(family, table)?)?;
    }
    Some(rules)
}

/// What `nft -j list table` prints. The program reads its arguments as a script, so a name has to be no more than a name.
fn listing(family: u8, table: &str) -> Option<String> {
    let family = FAMILIES.iter().find(|(number, _)| *number == family)?.1;
    let plain = table.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
    if !plain || !table.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
        return None;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from));
    let program = places.map(|p| p.join("nft")).find(|p| p.is_file())?;
    let mut child = Command::new(program)
        .args(["-j", "list", "table", family, table])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let pipe = child.stdout.take()?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        pipe.take(MAX_LISTING).read_to_string(&mut text).ok().map(|_| text)
    });
    let end = Instant::now() + PATIENCE;
    let done = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status.success(),
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                break false;
            }
        }
    };
    reader.join().ok().flatten().filter(|_| done)
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("firewall");
    let (port, delivery, source) = match (&facts.ruleset, &facts.rules) {
        (None, _) => {
            let unknown = || Verdict::warn("cannot tell", "only root may ask: repeat the command with sudo");
            (unknown(), None, None)
        }
        (Some(ruleset), None) => {
            match some_of(ruleset.foreign.iter().filter(|c| in_the_way(c)).map(|c| format!("{} {}", c.table, c.name))) {
                none if none.is_empty() => (Verdict::ok("no other rules"), Some(Verdict::ok("")), Some(Verdict::ok(""))),
                chains => {
                    let hint =
                        format!("install `nft` so that they can be read, or see yourself that TCP {} is open", facts.mesh_port);
                    (
                        Verdict::warn(
                            format!("cannot tell: there are other rules ({chains}) and no `nft` program that lists them as JSON"),
                            hint,
                        ),
                        None,
                        None,
                    )
                }
            }
        }
        (Some(_), Some(rules)) => (port(facts, rules), Some(delivery(facts, rules)), Some(source(rules))),
    };
    found.add(code::FIREWALL_PORT, "other rules let the mesh port through", port);
    if let Some(delivery) = delivery {
        found.add(code::FIREWALL_DELIVERY, "other rules let deliveries on loopback through", delivery);
    }
    if let Some(source) = source {
        found.add(code::FIREWALL_SOURCE, "no other rule decides by a client's address", source);
    }
    let tables = some_of(&facts.iptables);
    found.add(
        code::IPTABLES,
        "there are no rules of the older iptables",
        match tables.is_empty() {
            true => Verdict::ok(""),
            false => Verdict::warn(
                format!("cannot tell what they do: tables {tables}"),
                format!(
                    "see with `iptables-legacy -S` that TCP {} is open; better, move to iptables-nft or nft",
                    facts.mesh_port
                ),
            ),
        },
    );
    found.done()
}

/// Every way between this host and the others, of one family.
fn ways(facts: &Facts) -> impl Iterator<Item = (IpAddr, IpAddr)> + '_ {
    let own = |peer: &IpAddr| facts.own.iter().copied().find(|o| o.is_ipv4() == peer.is_ipv4());
    facts.peers.iter().take(MAX_PEERS).filter_map(move |peer| Some((*peer, own(peer)?)))
}

/// The best of what becomes of a packet, over the interfaces it may take.
fn best(facts: &Facts, fate: impl Fn(&str) -> Fate) -> Fate {
    let fates: Vec<Fate> = facts.interfaces.iter().map(|i| fate(i)).collect();
    let any = |f| fates.contains(&f);
    match () {
        () if any(Fate::Passes) || fates.is_empty() => Fate::Passes,
        () if any(Fate::Unknown) => Fate::Unknown,
        () => Fate::Dropped,
    }
}

fn port(facts: &Facts, rules: &Rules) -> Verdict {
    let (mut closed, mut unknown) = (Vec::new(), false);
    for (peer, own) in ways(facts) {
        let inward = best(facts, |interface| {
            let packet = Packet {
                source: peer,
                destination: own,
                port: facts.mesh_port,
                input: interface.into(),
                output: String::new(),
                mark: 0,
            };
            rules.fate(&packet, &["prerouting", "input"])
        });
        let outward = best(facts, |interface| {
            let packet = Packet {
                source: own,
                destination: peer,
                port: facts.mesh_port,
                input: String::new(),
                output: interface.into(),
                mark: MARK_MESH,
            };
            rules.fate(&packet, &["output"])
        });
        for (fate, way) in [(inward, "from"), (outward, "to")] {
            match fate {
                Fate::Passes => {}
                Fate::Dropped => closed.push(format!("{way} {peer}")),
                Fate::Unknown => unknown = true,
            }
        }
    }
    let open = format!("open TCP {} between the hosts of the mesh", facts.mesh_port);
    match (some_of(&closed), unknown) {
        (closed, _) if !closed.is_empty() => Verdict::fail(format!("TCP {} is dropped {closed}", facts.mesh_port), open),
        (_, true) => Verdict::warn("cannot tell: some rules are not understood", format!("see yourself: {open}")),
        _ => Verdict::ok(format!("TCP {} is open", facts.mesh_port)),
    }
}

/// A service that the LAN may reach has to be reachable over loopback too: from there it is delivered to.
fn delivery(facts: &Facts, rules: &Rules) -> Verdict {
    let mut refused = BTreeSet::new();
    for (peer, own) in ways(facts) {
        for &port in &facts.services {
            let packet = |input: &str, output: &str, mark| Packet {
                source: peer,
                destination: own,
                port,
                input: input.into(),
                output: output.into(),
                mark,
            };
            let direct = best(facts, |interface| rules.fate(&packet(interface, "", 0), &["prerouting", "input"]));
            let out = rules.fate(&packet("", "lo", MARK_SERVICE), &["output"]);
            let inward = rules.fate(&packet("lo", "", MARK_SERVICE), &["prerouting", "input"]);
            if direct == Fate::Passes && [out, inward].contains(&Fate::Dropped) {
                refused.insert(port);
            }
        }
    }
    match some_of(&refused) {
        none if none.is_empty() => Verdict::ok(""),
        ports => Verdict::fail(
            format!("TCP {ports}: open to the LAN, but dropped on loopback with a client's address"),
            "accept what comes in on `lo`: secured connections are delivered there, from their client's address",
        ),
    }
}

fn source(rules: &Rules) -> Verdict {
    match some_of(rules.by_source()) {
        none if none.is_empty() => Verdict::ok(""),
        places => Verdict::warn(
            places,
            "a secured connection passes them on loopback, or by the mesh port: see that they still mean what you want",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::*;
    use crate::api::Level::{Fail, Warn};

    fn chain(drops: bool, rules: u32) -> ForeignChain {
        ForeignChain { family: 1, table: "f".into(), name: "input".into(), hook: 1, drops, rules }
    }

    fn facts(policy: &str, rules: &str) -> Facts {
        let head = r#"{"chain": {"family": "inet", "table": "f", "name": "input", "handle": 2, "type": "filter", "hook": "input", "prio": 0, "policy": "#;
        let rule = r#"{"rule": {"family": "inet", "table": "f", "chain": "input", "handle": 4, "expr": "#;
        let text = format!(r#"{{"nftables": [{head}"{policy}"}}}}, {rule}[{rules}]}}}}]}}"#);
        Facts {
            ruleset: Some(Ruleset { ours: vec![], foreign: vec![chain(policy == "drop", 1)] }),
            rules: Some(Rules::parse(&text).unwrap()),
            iptables: BTreeSet::new(),
            mesh_port: 6374,
            interfaces: vec!["eth0".into()],
            own: vec!["192.168.77.1".parse().unwrap(), "fd77::1".parse().unwrap()],
            peers: vec!["192.168.77.2".parse().unwrap(), "fd77::2".parse().unwrap()],
            services: BTreeSet::from([80]),
        }
    }

    const MESH: &str = r#"{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 6374}}"#;
    const LAN: &str = r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "192.168.77.0", "len": 24}}}}"#;

    #[test]
    fn the_mesh_port_is_open_closed_or_not_known() {
        assert!(ill(&findings(&facts("accept", &format!(r#"{MESH}, {{"accept": null}}"#)))).is_empty());
        assert!(ill(&findings(&facts("drop", &format!(r#"{MESH}, {{"accept": null}}"#)))).is_empty());
        assert_eq!(ill(&findings(&facts("drop", r#"{"counter": null}"#))), [(code::FIREWALL_PORT, Fail)]);
        assert_eq!(ill(&findings(&facts("accept", r#"{"xt": {}}, {"drop": null}"#))), [(code::FIREWALL_PORT, Warn)]);
        // Open for one family only, and by source.
        let some = findings(&facts("drop", &format!(r#"{MESH}, {LAN}, {{"accept": null}}"#)));
        assert_eq!(ill(&some), [(code::FIREWALL_PORT, Fail), (code::FIREWALL_SOURCE, Warn)]);
        assert!(some[0].detail.as_ref().unwrap().ends_with("from fd77::2"), "{some:?}");
    }

    #[test]
    fn deliveries_on_loopback() {
        let lo = r#"{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "lo"}}, {"drop": null}"#;
        assert_eq!(ill(&findings(&facts("accept", lo))), [(code::FIREWALL_DELIVERY, Fail)]);
        // Closed on both sides is what the operator wants.
        let all = facts("drop", &format!(r#"{MESH}, {{"accept": null}}"#));
        assert!(ill(&findings(&all)).is_empty());
    }

    #[test]
    fn a_table_whose_name_is_a_script_is_not_read() {
        for name in ["x; flush ruleset", "-f", "", "a\nb", "9"] {
            assert_eq!(listing(1, name), None);
        }
        assert_eq!(listing(7, "bridge"), None);
    }

    #[test]
    fn without_nft_the_answer_is_honest() {
        let with = |foreign| Facts {
            ruleset: Some(Ruleset { ours: vec![], foreign }),
            rules: None,
            ..facts("accept", r#"{"counter": null}"#)
        };
        assert!(ill(&findings(&with(vec![]))).is_empty());
        assert!(ill(&findings(&with(vec![chain(false, 0)]))).is_empty(), "an empty chain decides nothing");
        assert_eq!(ill(&findings(&with(vec![chain(true, 0)]))), [(code::FIREWALL_PORT, Warn)]);
        assert_eq!(ill(&findings(&Facts { ruleset: None, ..with(vec![]) })), [(code::FIREWALL_PORT, Warn)]);
        let old = Facts { iptables: ["filter".to_owned()].into(), ..with(vec![]) };
        assert_eq!(ill(&findings(&old)), [(code::IPTABLES, Warn)]);
    }
}
