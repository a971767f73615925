//! The LAN: interfaces on which members can be found, whether multicast passes on them, who else answers on its port.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use meshd_agent::interfaces::{self, Interface, NotLan};
use tokio::time::Instant;

use super::findings::{Findings, Verdict, count, some_of};
use super::proc::{Process, holders, own_sockets};
use super::udp;
use crate::api::{Finding, code};
use crate::config::Config;
use crate::intercept::socket::multicast;

/// RFC 6762 §3
const GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const PORT: u16 = 5353;
/// How long a host may take to hear its own question: it does not leave the host.
const ECHO: Duration = Duration::from_millis(400);
/// Interfaces on which multicast is tried.
const MAX_TRIED: usize = 8;

/// What there is to know.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) mdns: bool,
    /// Whether hosts are named in the configuration, for where multicast does not reach.
    pub(super) named: bool,
    /// The LAN's interfaces with an IPv4 address each, if they have one.
    pub(super) lan: Vec<(String, Option<Ipv4Addr>)>,
    /// The other interfaces, and why they are not.
    pub(super) not_lan: Vec<(String, NotLan)>,
    /// How many neighbours were heard; of a running daemon.
    pub(super) heard: Option<usize>,
    /// On each interface on which it was tried: whether our own question came back.
    pub(super) echo: Vec<(String, Echo)>,
    /// Other programs with sockets on the port.
    pub(super) responders: Vec<Process>,
}

/// What came of a question on an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Echo {
    Heard,
    Silence,
    /// Somebody has the port for himself.
    PortTaken,
    Failed(String),
}

impl Facts {
    /// `heard`: how many neighbours a running daemon has heard.
    pub(super) fn read(config: &Config, all: &[Interface], heard: Option<usize>) -> Self {
        let wanted = |i: &&Interface| config.interfaces.is_empty() || config.interfaces.contains(&i.name);
        let v4 = |i: &Interface| i.addresses.iter().find_map(|a| if let IpAddr::V4(ip) = a.ip { Some(ip) } else { None });
        let lan: Vec<_> =
            all.iter().filter(wanted).filter(|i| interfaces::classify(i, all).is_ok()).map(|i| (i.name.clone(), v4(i))).collect();
        let tried = lan.iter().filter(|_| config.mdns).filter_map(|(name, ip)| Some((name.clone(), (*ip)?))).take(MAX_TRIED);
        let asking: Vec<_> = tried.map(|(name, ip)| (name, std::thread::spawn(move || echo(ip, PORT)))).collect();
        let own = own_sockets();
        let there: BTreeSet<u64> = udp::sockets().into_iter().filter(|s| s.local.port() == PORT).map(|s| s.inode).collect();
        let mut responders: Vec<Process> =
            holders(&there.difference(&own).copied().collect()).into_iter().map(|(_, p)| p).collect();
        responders.sort_by_key(|p| p.pid);
        responders.dedup();
        let failed = || Echo::Failed("it could not be tried".into());
        Self {
            mdns: config.mdns,
            named: !config.peers.is_empty(),
            not_lan: all.iter().filter_map(|i| Some((i.name.clone(), interfaces::classify(i, all).err()?))).collect(),
            echo: asking.into_iter().map(|(name, asked)| (name, asked.join().unwrap_or_else(|_| failed()))).collect(),
            lan,
            heard,
            responders,
        }
    }
}

/// Asks for members on the interface that has this address, as any mDNS querier does, and listens for the question itself.
fn echo(interface: Ipv4Addr, port: u16) -> Echo {
    let asked = (|| -> io::Result<bool> {
        let socket = multicast(GROUP, interface, port)?;
        socket.set_read_timeout(Some(ECHO / 4))?;
        let question = question();
        socket.send_to(&question, SocketAddr::from((GROUP, port)))?;
        let end = Instant::now() + ECHO;
        let mut buffer = [0; 1500];
        // On a busy host it is this thread that is late: what has come is read all the same, unless it never ends.
        loop {
            match socket.recv_from(&mut buffer) {
                Ok((length, _)) if buffer[..length] == question => return Ok(true),
                Ok(_) if Instant::now() < end + ECHO => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if Instant::now() >= end {
                        return Ok(false);
                    }
                }
                Ok(_) => return Ok(false),
                Err(e) => return Err(e),
            }
        }
    })();
    match asked {
        Ok(true) => Echo::Heard,
        Ok(false) => Echo::Silence,
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => Echo::PortTaken,
        Err(e) => Echo::Failed(e.to_string()),
    }
}

/// `_meshd._tcp.local. PTR?` (RFC 1035 §4.1)
fn question() -> Vec<u8> {
    let mut packet = vec![0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["_meshd", "_tcp", "local", ""] {
        packet.push(label.len() as u8);
        packet.extend_from_slice(label.as_bytes());
    }
    packet.extend_from_slice(&[0, 12, 0, 1]);
    packet
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("network");
    let name = "members can be found on the local network";
    if !facts.mdns {
        found.add(
            code::MDNS,
            name,
            match facts.named {
                true => Verdict::ok("mDNS is switched off, and `peers` names members"),
                false => Verdict::ok("mDNS is switched off"),
            },
        );
        return found.done();
    }
    let names = some_of(facts.lan.iter().map(|(name, _)| name));
    found.add(
        code::MDNS,
        name,
        match names.is_empty() {
            true => {
                let why = some_of(
                    facts.not_lan.iter().filter(|(_, why)| *why != NotLan::Loopback).map(|(name, why)| format!("{name}: {why}")),
                );
                let why = if why.is_empty() { "there is no interface but loopback".into() } else { why };
                Verdict::warn(format!("no interface is a LAN ({why})"), "connect the host, or name members with `peers`")
            }
            false => Verdict::ok(format!(
                "{names}{}",
                facts.heard.map_or(String::new(), |n| format!(", {} heard", count(n, "neighbour")))
            )),
        },
    );
    let taken = facts.echo.iter().any(|(_, e)| *e == Echo::PortTaken);
    let tell = |wanted: fn(&Echo) -> bool| some_of(facts.echo.iter().filter(|(_, e)| wanted(e)).map(|(name, _)| name));
    let silent = tell(|e| *e == Echo::Silence);
    let failed = some_of(
        facts.echo.iter().filter_map(|(name, e)| if let Echo::Failed(why) = e { Some(format!("{name}: {why}")) } else { None }),
    );
    let hint = "let UDP port 5353 through the firewall in both directions, or name members with `peers`";
    found.add(
        code::MULTICAST,
        "multicast passes",
        match (silent.is_empty(), failed.is_empty()) {
            (false, _) => Verdict::warn(format!("this host does not hear its own question on {silent}"), hint),
            (_, false) => Verdict::warn(failed, hint),
            _ if taken => Verdict::ok("not tried: the port is taken"),
            _ => Verdict::ok(tell(|e| *e == Echo::Heard)),
        },
    );
    let who = some_of(&facts.responders);
    let name = "meshd can share UDP port 5353";
    found.add(
        code::RESPONDER,
        name,
        match (taken, who.is_empty()) {
            (true, _) => Verdict::warn(
                format!("{} has it and does not share it", if who.is_empty() { "another program" } else { &who }),
                "end that program or have it share the port (SO_REUSEPORT), or name members with `peers`",
            ),
            (false, true) => Verdict::ok(""),
            (false, false) => Verdict::ok(format!("with {who}")),
        },
    );
    found.done()
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill_with;
    use super::*;
    use crate::api::Level::Warn;

    fn well() -> Facts {
        Facts {
            mdns: true,
            named: false,
            lan: vec![("eth0".into(), Some(Ipv4Addr::new(192, 168, 77, 1)))],
            not_lan: vec![("lo".into(), NotLan::Loopback)],
            heard: Some(1),
            echo: vec![("eth0".into(), Echo::Heard)],
            responders: vec![],
        }
    }

    #[track_caller]
    fn with(change: impl FnOnce(&mut Facts), expected: &[(&str, crate::api::Level)]) {
        ill_with(well(), change, findings, expected);
    }

    #[test]
    fn lans_multicast_and_responders() {
        with(|_| {}, &[]);
        with(|f| (f.mdns, f.lan) = (false, vec![]), &[]);
        with(|f| (f.lan, f.echo, f.not_lan) = (vec![], vec![], vec![("eth0".into(), NotLan::Down)]), &[(code::MDNS, Warn)]);
        with(|f| f.echo[0].1 = Echo::Silence, &[(code::MULTICAST, Warn)]);
        with(|f| f.echo[0].1 = Echo::Failed("no route".into()), &[(code::MULTICAST, Warn)]);
        with(|f| f.echo[0].1 = Echo::PortTaken, &[(code::RESPONDER, Warn)]);
        let avahi = || vec![Process { pid: 7, name: "avahi-daemon".into() }];
        with(|f| f.responders = avahi(), &[]);
        let mut taken = well();
        (taken.responders, taken.echo[0].1) = (avahi(), Echo::PortTaken);
        assert!(findings(&taken).last().unwrap().detail.as_ref().unwrap().starts_with("avahi-daemon (pid 7) has it"));
    }

    #[test]
    fn the_question_is_one_that_mdns_knows() {
        let packet = question();
        assert_eq!(packet.len(), 12 + 7 + 5 + 6 + 1 + 4);
        assert_eq!(&packet[12..19], b"\x06_meshd");
    }
}
