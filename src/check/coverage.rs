//! Traffic that is not secured, and why: what the rules do not cover, and what they do not cover yet.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use meshd_agent::interfaces::{self, Interface, NotLan};

use super::findings::{Findings, Verdict, count, some_of};
use super::udp::{self, UdpSocket};
use crate::api::{Finding, code};
use crate::config::Mode;
use crate::intercept::sockdiag::{Connection, SockDiag};

/// What is never captured, and nobody wonders.
const SSH: u16 = 22;

/// What there is to know.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    /// Networks of containers, and how many ports each has.
    pub(super) containers: Vec<(String, usize)>,
    /// Of a member.
    pub(super) member: Option<Covered>,
}

/// What a member covers, and what goes on beside it.
#[derive(Debug, Clone, Default)]
pub(super) struct Covered {
    pub(super) mode: Mode,
    /// Connections of members in plaintext since the start; not counted in permissive mode.
    pub(super) plaintext: Option<u64>,
    /// Connections with members that did not come through us: own end, far end.
    pub(super) older: Vec<(SocketAddr, SocketAddr)>,
    /// Services of members on ports that are never captured here.
    pub(super) skipped: Vec<(String, u16)>,
    /// UDP sockets that are connected to members.
    pub(super) udp: Vec<UdpSocket>,
}

/// What tells connections that are secured from others.
#[derive(Debug, Clone, Default)]
pub(super) struct Ways {
    /// Addresses of members.
    pub(super) members: BTreeSet<IpAddr>,
    pub(super) mesh_port: u16,
    pub(super) capture_port: u16,
    /// Ports that are never captured.
    pub(super) skip: BTreeSet<u16>,
}

impl Ways {
    /// Established connections with members, of applications of this host, that have no part of ours. A captured connection has its
    /// other end in us, on the capture port; one that was delivered has its other end in us, with the client's address.
    pub(super) fn unsecured(&self, all: &[Connection]) -> Vec<(SocketAddr, SocketAddr)> {
        let captured: BTreeSet<SocketAddr> =
            all.iter().filter(|c| c.local.port() == self.capture_port).map(|c| c.remote).collect();
        let ends: BTreeSet<(SocketAddr, SocketAddr)> = all.iter().map(|c| (c.local, c.remote)).collect();
        let spared = |port| port == self.mesh_port || self.skip.contains(&port);
        all.iter()
            .filter(|c| c.established && self.members.contains(&c.remote.ip()))
            .filter(|c| !spared(c.local.port()) && !spared(c.remote.port()))
            .filter(|c| !captured.contains(&c.local) && !ends.contains(&(c.remote, c.local)))
            .map(|c| (c.local, c.remote))
            .collect()
    }

    /// The same of this host, now. A connection that is just being taken over is looked at twice.
    pub(super) fn look(&self) -> Vec<(SocketAddr, SocketAddr)> {
        let Ok(diag) = SockDiag::open() else { return Vec::new() };
        let look = || self.unsecured(&diag.connections().unwrap_or_default());
        let first = look();
        if first.is_empty() {
            return first;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        let second: BTreeSet<_> = look().into_iter().collect();
        first.into_iter().filter(|c| second.contains(c)).collect()
    }

    /// UDP sockets of this host that are connected to members.
    pub(super) fn udp(&self) -> Vec<UdpSocket> {
        udp::sockets().into_iter().filter(|s| self.members.contains(&s.remote.ip())).collect()
    }
}

/// Networks inside this host that have containers or virtual machines in them.
pub(super) fn containers(all: &[Interface]) -> Vec<(String, usize)> {
    let ports = |of: &Interface| all.iter().filter(|i| i.up && i.master == Some(of.index)).count();
    let inside = all.iter().filter(|i| interfaces::classify(i, all) == Err(NotLan::Container));
    // Calico has an interface for each pod; the tunnels between nodes have no containers of their own.
    let count = |i: &Interface| if i.name.starts_with("cali") { 1 } else { ports(i) };
    inside.map(|i| (i.name.clone(), count(i))).filter(|(_, n)| *n > 0).collect()
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("coverage");
    if let Some(member) = &facts.member {
        covered(member, &mut found);
    }
    let networks = some_of(facts.containers.iter().map(|(name, n)| format!("{name} ({})", count(*n, "port"))));
    found.add(code::CONTAINERS, "no containers are left out", match networks.is_empty() {
        true => Verdict::ok(""),
        false => Verdict::warn(
            format!("{networks}: what containers and virtual machines open themselves is in plaintext"),
            "run what must be secured on the host's own network (`--network host`); their published ports are covered for clients that are members",
        ),
    });
    found.done()
}

fn covered(member: &Covered, found: &mut Findings) {
    let refused = if member.mode == Mode::Strict { "refused" } else { "let in" };
    found.add(code::PLAINTEXT, "members do not connect in plaintext", match member.plaintext {
        None => Verdict::ok("not counted in permissive mode"),
        Some(0) => Verdict::ok(""),
        Some(n) => Verdict::warn(
            format!("{} from addresses of members came in plaintext and {} {refused} since meshd started", count(usize::try_from(n).unwrap_or(usize::MAX), "connection"), if n == 1 { "was" } else { "were" }),
            "is meshd running there, and does it capture? Containers there, and connections older than meshd, are not covered",
        ),
    });
    let older = some_of(member.older.iter().map(|(local, remote)| format!("{local} with {remote}")));
    found.add(
        code::OLDER,
        "open connections with members are secured",
        match older.is_empty() {
            true => Verdict::ok(""),
            false => Verdict::warn(
                format!(
                    "{} older than capture: {older}",
                    if member.older.len() == 1 { "1 is".to_owned() } else { format!("{} are", member.older.len()) }
                ),
                "restart the program that opened it: a new connection is secured",
            ),
        },
    );
    let skipped =
        some_of(member.skipped.iter().filter(|(_, port)| *port != SSH).map(|(host, port)| format!("{host} port {port}")));
    found.add(
        code::SKIP_PORTS,
        "no service is on a port that is never captured",
        match skipped.is_empty() {
            true => Verdict::ok(""),
            false => Verdict::warn(
                format!("{skipped}: connections to it are in plaintext"),
                "take the port out of `skip_ports`, unless that is meant",
            ),
        },
    );
    let udp = some_of(member.udp.iter().map(|s| format!("{} with {}", s.local, s.remote)));
    found.add(
        code::UDP,
        "no program speaks UDP with a member",
        match udp.is_empty() {
            true => Verdict::ok("UDP is never secured"),
            false => {
                Verdict::warn(format!("{udp}: UDP is not secured"), "let the program use TCP, or secure itself (DTLS, QUIC)")
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::*;
    use crate::api::Level::Warn;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }
    fn open(local: &str, remote: &str) -> Connection {
        Connection { local: address(local), remote: address(remote), established: true }
    }

    #[test]
    fn connections_of_ours_are_told_from_others() {
        let ways = Ways {
            members: ["192.168.77.2".parse().unwrap(), "fd77::2".parse().unwrap()].into(),
            mesh_port: 6374,
            capture_port: 6375,
            skip: [22].into(),
        };
        let ours = [
            // Captured: the application's socket, and our end of it.
            open("192.168.77.1:40000", "192.168.77.2:80"),
            open("127.0.0.1:6375", "192.168.77.1:40000"),
            // The tunnel, and SSH.
            open("192.168.77.1:40001", "192.168.77.2:6374"),
            open("192.168.77.1:22", "192.168.77.2:50000"),
            // Delivered: the service's socket, and ours that shows the client's address.
            open("192.168.77.1:8000", "192.168.77.2:50001"),
            open("192.168.77.2:50001", "192.168.77.1:8000"),
            // With somebody who is no member, and within the host.
            open("192.168.77.1:40002", "192.168.77.9:80"),
            open("127.0.0.1:1", "127.0.0.1:2"),
        ];
        assert_eq!(ways.unsecured(&ours), []);
        let mut all = ours.to_vec();
        all.push(open("[fd77::1]:40003", "[fd77::2]:80"));
        all.push(open("192.168.77.1:8000", "192.168.77.2:50002"));
        all.push(Connection { established: false, ..open("192.168.77.1:40004", "192.168.77.2:80") });
        let found = ways.unsecured(&all);
        assert_eq!(
            found,
            [
                (address("[fd77::1]:40003"), address("[fd77::2]:80")),
                (address("192.168.77.1:8000"), address("192.168.77.2:50002"))
            ]
        );
    }

    #[test]
    fn what_is_not_covered_is_said() {
        let with = |member: Covered| ill_codes(&Facts { containers: vec![], member: Some(member) });
        assert!(with(Covered::default()).is_empty());
        assert_eq!(with(Covered { plaintext: Some(3), mode: Mode::Strict, ..Covered::default() }), [code::PLAINTEXT]);
        assert!(with(Covered { plaintext: Some(0), mode: Mode::Audit, ..Covered::default() }).is_empty());
        let pair = (address("192.168.77.1:1"), address("192.168.77.2:2"));
        assert_eq!(with(Covered { older: vec![pair], ..Covered::default() }), [code::OLDER]);
        assert!(with(Covered { skipped: vec![("b".into(), 22)], ..Covered::default() }).is_empty());
        assert_eq!(with(Covered { skipped: vec![("b".into(), 8000)], ..Covered::default() }), [code::SKIP_PORTS]);
        let udp = vec![UdpSocket { local: pair.0, remote: pair.1, inode: 1 }];
        assert_eq!(with(Covered { udp, ..Covered::default() }), [code::UDP]);
        assert_eq!(ill_codes(&Facts { containers: vec![("docker0".into(), 2)], member: None }), [code::CONTAINERS]);
    }

    fn ill_codes(facts: &Facts) -> Vec<String> {
        ill(&findings(facts))
            .into_iter()
            .map(|(code, level)| {
                assert_eq!(level, Warn);
                code.to_owned()
            })
            .collect()
    }

    #[test]
    fn networks_of_containers() {
        let link = |name: &str, index, master| Interface {
            name: name.into(),
            index,
            master,
            up: true,
            multicast: true,
            ..Interface::default()
        };
        let mut all = vec![
            link("eth0", 2, None),
            link("docker0", 3, None),
            link("veth1", 4, Some(3)),
            link("br0", 5, None),
            link("veth2", 6, Some(5)),
        ];
        assert_eq!(containers(&all), [("docker0".to_owned(), 1)]);
        all[2].up = false;
        assert_eq!(containers(&all), [], "a bridge without anybody on it");
    }
}
