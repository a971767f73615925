//! The stand-in for SSH: plain TCP servers on port 22 that nobody may ever be locked out of.
//!
//! Whatever a scenario does to a mesh, permissive or strict: connections to port 22 that were open go on, new ones are made, from
//! members and others, and they are on the link as they are - not captured, not reset, not secured.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::demo::lab::Host;

use super::mesh::Mesh;
use super::traffic::{Server, connect_within, echo, sockets};
use super::{eventually, marker};

/// The port.
const PORT: u16 = 22;
/// How long a session may be silent: longer than any scenario takes.
const IDLE: Duration = Duration::from_secs(600);
/// How long a new connection may take. Wi-Fi loses two SYNs in a row now and then.
const LOGIN: Duration = Duration::from_secs(8);

/// A server on port 22 of every host, and a login between each two of them that stays open.
pub(crate) struct Ssh {
    _servers: Vec<Server>,
    logins: Vec<(String, TcpStream)>,
}

impl Ssh {
    /// Starts the servers and logs in.
    pub(crate) fn open(mesh: &Mesh) -> Result<Ssh> {
        let hosts = mesh.lab().hosts();
        let servers = hosts.iter().map(|host| Server::patient_echo(host, PORT, IDLE)).collect::<Result<_>>()?;
        let mut ssh = Ssh { _servers: servers, logins: Vec::new() };
        for (from, to) in pairs(hosts) {
            let address = SocketAddr::new(to.ipv4.into(), PORT);
            let stream = connect_within(from, address, LOGIN).with_context(|| format!("{} logs in at {address}", from.name))?;
            ssh.logins.push((format!("{} to {}", from.name, to.name), stream));
        }
        ssh.goes_on()?;
        Ok(ssh)
    }

    /// The logins of before are as they were.
    pub(crate) fn goes_on(&mut self) -> Result<()> {
        self.logins.iter_mut().try_for_each(|(who, stream)| {
            echo(stream, "still logged in").with_context(|| format!("the SSH session from {who} was lost"))
        })
    }

    /// The logins at `host` are over for a good reason, such as that its address is gone.
    pub(crate) fn forget(&mut self, host: &str) {
        self.logins.retain(|(who, _)| !who.split(" to ").any(|end| end == host));
    }

    /// Everybody can log in anew everywhere, at the hosts' own addresses, and is not captured.
    pub(crate) fn is_open(&self, mesh: &Mesh) -> Result<()> {
        let doors: Vec<_> =
            pairs(mesh.lab().hosts()).flat_map(|(from, to)| sockets(to, PORT).map(|door| (from, door.ip()))).collect();
        self.is_open_at(mesh, &doors)
    }

    /// The same for these clients and addresses.
    pub(crate) fn is_open_at(&self, mesh: &Mesh, doors: &[(&Host, IpAddr)]) -> Result<()> {
        let words: Vec<String> = doors.iter().map(|_| marker("ssh")).collect();
        let texts: Vec<&str> = words.iter().map(String::as_str).collect();
        let ((), report) = mesh.watched(&texts, || {
            for ((from, ip), word) in doors.iter().zip(&words) {
                let door = SocketAddr::new(*ip, PORT);
                let login = connect_within(from, door, LOGIN).map_err(Into::into).and_then(|mut stream| echo(&mut stream, word));
                login.with_context(|| format!("{} is locked out at {door}", from.name))?;
            }
            Ok(())
        })?;
        for ((from, ip), hits) in doors.iter().zip(&report.hits) {
            ensure!(*hits > 0, "SSH from {} to {ip} is not on the link as it is: it was captured", from.name);
        }
        for member in mesh.lab().hosts() {
            if mesh.is_running(&member.name) {
                ensure!(!mesh.at(&member.name).has_edge(PORT)?, "{} had something to do with port 22", member.name);
            }
        }
        Ok(())
    }

    /// Both, as soon as the network lets it.
    pub(crate) fn comes_back(&self, mesh: &Mesh, within: Duration) -> Result<()> {
        eventually(within, "SSH is back", || self.is_open(mesh))
    }
}

fn pairs(hosts: &[Host]) -> impl Iterator<Item = (&Host, &Host)> {
    hosts.iter().flat_map(move |from| hosts.iter().filter(|to| to.name != from.name).map(move |to| (from, to)))
}
