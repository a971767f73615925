//! This host's place in its mesh: member, roster, an authority in reach, members heard, other meshes in sight.

use std::net::SocketAddr;

use meshd_ca::roster::{MAX_MEMBERS, MAX_ROSTER};

use super::LIMIT_NEAR;
use super::findings::{Findings, Verdict, count, some_of};
use super::peers::Met;
use crate::api::{Finding, code};

const MEMBER: &str = "this host is a member";

/// What there is to know of a member.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) name: String,
    pub(super) trust_domain: String,
    /// Everybody in the roster, active or not, and the size of the roster in bytes.
    pub(super) seats: usize,
    pub(super) bytes: usize,
    /// The authorities, and whether one of them is this host or answers.
    pub(super) authorities: Vec<String>,
    pub(super) reach: bool,
    /// Those of them that sign and are not gone for good, how many there should be, and whether another one is about to be made.
    pub(super) signing: Vec<String>,
    pub(super) wanted: usize,
    pub(super) coming: bool,
    /// Hosts on the LAN that announce this mesh, answer, and are not of its roster: those of another founder with the same fleet token.
    pub(super) rivals: Vec<SocketAddr>,
    /// Where this mesh moves, if this host could not follow at once.
    pub(super) moving: Option<String>,
    /// Hosts on the LAN that announce another mesh.
    pub(super) strangers: Vec<SocketAddr>,
}

/// Of a host that is none: why, and what to do; whether that is its own wish.
pub(super) fn no_member(why: Option<String>, remedy: Option<String>, wished: bool) -> Vec<Finding> {
    let mut found = Findings::of("mesh");
    let (why, remedy) = (why.unwrap_or_default(), remedy.unwrap_or_else(|| "`meshd join TOKEN` brings it into a mesh".into()));
    found.add(code::MEMBER, MEMBER, if wished { Verdict::warn(why, remedy) } else { Verdict::fail(why, remedy) });
    found.done()
}

pub(super) fn findings(facts: &Facts, met: &[Met]) -> Vec<Finding> {
    let mut found = Findings::of("mesh");
    found.ok(code::MEMBER, MEMBER, format!("{} in {}", facts.name, facts.trust_domain));
    let (seats, bytes) = (facts.seats as u64 * 100, facts.bytes as u64 * 100);
    let full = seats >= MAX_MEMBERS as u64 * LIMIT_NEAR || bytes >= MAX_ROSTER as u64 * LIMIT_NEAR;
    let detail = format!("{} of at most {MAX_MEMBERS}, {} bytes", count(facts.seats, "member"), facts.bytes);
    found.add(
        code::ROSTER,
        "the roster has room",
        match full {
            true => Verdict::warn(detail, "hosts that left keep their place: a mesh that is almost full is better split in two"),
            false => Verdict::ok(detail),
        },
    );
    let names = some_of(&facts.authorities);
    found.add(
        code::AUTHORITY,
        "an authority is in reach",
        match facts.reach {
            true => Verdict::ok(names),
            false => Verdict::warn(
                format!(
                    "{} cannot be heard: certificates are not renewed and nobody can join meanwhile",
                    if names.is_empty() { "none".into() } else { names }
                ),
                "start meshd there, or look at the network between",
            ),
        },
    );
    found.add(code::AUTHORITIES, "the mesh outlives the loss of an authority", authorities(facts));
    found.add(code::GOSSIP, "the members that answer are heard", gossip(met));
    found.add(
        code::FLEET_SPLIT,
        "the hosts of one fleet are one mesh",
        match some_of(&facts.rivals) {
            none if none.is_empty() => Verdict::ok(""),
            who => Verdict::warn(
                format!("{who}: of another mesh with the same fleet token, with a founder of its own; neither gives way to the other"),
                "`meshd token create --merge` on an authority of the one that is to stay, and `meshd merge` on a member of the other",
            ),
        },
    );
    found.add(
        code::MOVING,
        "this host is where its mesh is",
        match &facts.moving {
            None => Verdict::ok(""),
            Some(why) => Verdict::warn(
                format!("this mesh moves {why}"),
                "start meshd on the authority that made the token, or look at the network between; where it is gone for good: `meshd leave` here, and `meshd join` with a new token of that mesh",
            ),
        },
    );
    found.add(
        code::OTHER_MESH,
        "no other mesh is on the LAN",
        match some_of(&facts.strangers) {
            none if none.is_empty() => Verdict::ok(""),
            who => Verdict::warn(
                format!("{who}: members of another mesh, whose connections with this host are in plaintext"),
                "two by mistake? a host that is alone shows a code (`sudo meshd status`) to approve on the other side; else nothing is wrong",
            ),
        },
    );
    found.done()
}

fn authorities(facts: &Facts) -> Verdict {
    let of = format!("{} of {} sign", facts.signing.len(), facts.wanted);
    match (facts.signing.len(), facts.wanted) {
        (_, 0..2) => Verdict::ok("there are no others"),
        (2.., _) => Verdict::ok(format!("{of}: {}", some_of(&facts.signing))),
        _ if facts.coming => Verdict::ok(format!("{of}; another one is about to be made")),
        _ => Verdict::warn(
            format!("{of}: when that one is lost, no certificate is renewed and nobody joins"),
            "`meshd authority add NODE` on an authority makes another; choose a host that stays where it is",
        ),
    }
}

fn gossip(met: &[Met]) -> Verdict {
    let silent = some_of(met.iter().filter(|m| m.handshake.is_ok() && !m.heard).map(|m| &m.name));
    let heard = met.iter().filter(|m| m.heard).count();
    match silent.is_empty() {
        true if met.is_empty() => Verdict::ok("there are no others"),
        true => Verdict::ok(format!("{heard} of {}", met.len())),
        false => Verdict::warn(
            format!("{silent}: answers, but gossip does not hear it, so its addresses and services are not known"),
            "if that lasts longer than a minute, restart meshd there and look at its log",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::super::peers::testing::met;
    use super::*;
    use crate::api::Level::{Fail, Warn};

    fn well() -> Facts {
        Facts {
            name: "a".into(),
            trust_domain: "m.meshd.internal".into(),
            seats: 3,
            bytes: 2000,
            authorities: vec!["a".into()],
            reach: true,
            signing: vec!["a".into(), "b".into()],
            wanted: 3,
            coming: false,
            rivals: vec![],
            moving: None,
            strangers: vec![],
        }
    }

    #[test]
    fn members_rosters_and_neighbours() {
        assert!(ill(&findings(&well(), &[met("b")])).is_empty());
        assert!(ill(&findings(&well(), &[])).is_empty());
        assert_eq!(ill(&findings(&Facts { seats: 3300, ..well() }, &[])), [(code::ROSTER, Warn)]);
        assert_eq!(ill(&findings(&Facts { bytes: 14 << 20, ..well() }, &[])), [(code::ROSTER, Warn)]);
        assert_eq!(ill(&findings(&Facts { reach: false, ..well() }, &[])), [(code::AUTHORITY, Warn)]);
        assert_eq!(ill(&findings(&Facts { reach: false, authorities: vec![], ..well() }, &[])), [(code::AUTHORITY, Warn)]);
        let alone = Facts { signing: vec!["a".into()], ..well() };
        assert_eq!(ill(&findings(&alone, &[])), [(code::AUTHORITIES, Warn)]);
        assert!(ill(&findings(&Facts { coming: true, ..alone.clone() }, &[])).is_empty());
        assert!(ill(&findings(&Facts { wanted: 1, ..alone }, &[])).is_empty());
        let strangers = vec!["192.168.77.9:6374".parse().unwrap()];
        assert_eq!(ill(&findings(&Facts { strangers, ..well() }, &[])), [(code::OTHER_MESH, Warn)]);
        let rivals = vec!["192.168.77.9:6374".parse().unwrap()];
        assert_eq!(ill(&findings(&Facts { rivals, ..well() }, &[])), [(code::FLEET_SPLIT, Warn)]);
        assert_eq!(ill(&findings(&Facts { moving: Some("away".into()), ..well() }, &[])), [(code::MOVING, Warn)]);
        let unheard = Met { heard: false, ..met("b") };
        assert_eq!(ill(&findings(&well(), &[unheard.clone(), met("c")])), [(code::GOSSIP, Warn)]);
        // Who does not answer at all is another finding.
        let gone = Met { handshake: Err("no answer".into()), ..unheard };
        assert!(ill(&findings(&well(), &[gone])).is_empty());
    }

    #[test]
    fn a_host_that_is_no_member() {
        assert_eq!(ill(&no_member(Some("it left".into()), None, true)), [(code::MEMBER, Warn)]);
        assert_eq!(ill(&no_member(Some("no token".into()), Some("join".into()), false)), [(code::MEMBER, Fail)]);
    }
}
