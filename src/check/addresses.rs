//! Addresses: each of one member, each answered, every member reachable at one.

use std::net::IpAddr;
use std::sync::Arc;

use meshd_agent::record::Presence;

use super::findings::{Findings, Verdict, some_of};
use crate::api::{Finding, code};
use crate::daemon::Member;

/// What there is to know of a member.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    pub(super) captured: usize,
    /// Address and the two that answer there.
    pub(super) contested: Vec<(IpAddr, String, String)>,
    /// Addresses at which nobody answers, whose they are, and whether connections to them are still captured.
    pub(super) silent: Vec<(IpAddr, String, bool)>,
    /// Members that are up and publish addresses, none of which is captured.
    pub(super) missing: Vec<String>,
    /// What this host publishes.
    pub(super) own: Vec<IpAddr>,
}

impl Facts {
    pub(super) fn read(member: &Arc<Member>, published: &[IpAddr]) -> Self {
        let (book, roster, catalog) = (member.book.latest(), member.membership.roster(), member.catalog());
        let name = |node| roster.member(node).map_or_else(|| node.to_string(), |m| m.name.to_string());
        let up = catalog.records().map(|r| r.record()).filter(|r| r.node != member.me() && member.hears(r.node));
        let reachable = |node| book.captured.values().any(|b| b.node == node);
        Self {
            captured: book.captured.len(),
            contested: book.contested.iter().map(|c| (c.ip, name(c.owner), name(c.challenger))).collect(),
            silent: book.warnings.iter().map(|w| (w.ip, name(w.owner), w.captured)).collect(),
            missing: up
                .filter(|r| r.presence == Presence::Running && !r.addresses.is_empty() && !reachable(r.node))
                .map(|r| name(r.node))
                .collect(),
            own: published.to_vec(),
        }
    }
}

pub(super) fn findings(facts: &Facts, port: u16) -> Vec<Finding> {
    let mut found = Findings::of("addresses");
    let contested = some_of(facts.contested.iter().map(|(ip, a, b)| format!("{ip} is answered by {a} and {b}")));
    found.add(
        code::ADDRESS,
        "addresses belong to one member each",
        match contested.is_empty() {
            true => Verdict::ok(format!("{} captured", facts.captured)),
            false => Verdict::warn(contested, "give each host an address of its own"),
        },
    );
    let silent = some_of(facts.silent.iter().map(|(ip, owner, captured)| {
        format!("{ip} of {owner} ({})", if *captured { "connections to it fail" } else { "connections to it are in plaintext" })
    }));
    let hint = format!("is meshd running there, and TCP {port} open between the two?");
    found.add(
        code::ADDRESS_SILENT,
        "somebody answers at every captured address",
        match silent.is_empty() {
            true => Verdict::ok(""),
            false => Verdict::warn(format!("nobody answers at {silent}"), hint.clone()),
        },
    );
    found.add(
        code::ADDRESS_MISSING,
        "every member that is up has a captured address",
        match some_of(&facts.missing) {
            none if none.is_empty() => Verdict::ok(""),
            names => Verdict::warn(format!("none of {names} has answered: connections to it are in plaintext"), hint),
        },
    );
    found.add(
        code::ADDRESS_OWN,
        "this host has an address for others",
        match some_of(&facts.own) {
            none if none.is_empty() => Verdict::warn(
                "it has none but loopback and link-local ones, so nobody can connect to it",
                "connect the network, or wait for DHCP; link-local addresses are not captured",
            ),
            own => Verdict::ok(own),
        },
    );
    found.done()
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::*;
    use crate::api::Level::Warn;

    #[test]
    fn addresses_that_are_not_well() {
        let ip: IpAddr = "192.168.77.2".parse().unwrap();
        let well = || Facts { captured: 1, own: vec![ip], ..Facts::default() };
        assert!(ill(&findings(&well(), 6374)).is_empty());
        let contested = vec![(ip, "b".into(), "c".into())];
        assert_eq!(ill(&findings(&Facts { contested, ..well() }, 6374)), [(code::ADDRESS, Warn)]);
        let silent = vec![(ip, "b".to_owned(), false)];
        let found = findings(&Facts { silent, ..well() }, 6374);
        assert_eq!(ill(&found), [(code::ADDRESS_SILENT, Warn)]);
        assert!(found[1].detail.as_ref().unwrap().contains("in plaintext"));
        assert_eq!(ill(&findings(&Facts { missing: vec!["b".into()], ..well() }, 6374)), [(code::ADDRESS_MISSING, Warn)]);
        assert_eq!(ill(&findings(&Facts { own: vec![], ..well() }, 6374)), [(code::ADDRESS_OWN, Warn)]);
    }
}
