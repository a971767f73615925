//! What the mesh must leave alone: hosts that are no members, what is not TCP, SSH, a host's own addresses and loopback.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::support::mesh::{Setup, run_on};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::traffic::{Server, ask, sockets};
use crate::support::{equal, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("untouched", non_members_talk_as_ever),
    scenario!("untouched", udp_and_ping, Need::Program("ping")),
    scenario!("untouched", ssh_and_ports_that_are_to_be_skipped),
    scenario!("untouched", own_addresses_and_loopback),
];

fn non_members_talk_as_ever() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).outsider("x").start()?;
    let servers = ["a", "b", "x"].map(|name| Server::answering(mesh.host(name), 8000, "got "));
    for (client, server) in [("x", "a"), ("a", "x"), ("x", "b"), ("b", "x")] {
        for address in sockets(mesh.host(server), 8000) {
            let word = marker("stranger");
            let answer = mesh.readable(&word, || Ok(ask(mesh.host(client), address, &word)?))?;
            equal!(answer, format!("got {word}"), "{client} to {address}");
        }
    }
    drop(servers);
    // And the members meanwhile.
    mesh.secured_between("a", "b", 8001)
}

fn udp_and_ping() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    let (a, b) = (mesh.host("a"), mesh.host("b"));
    for address in sockets(b, 5000) {
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = |host: &meshd::demo::lab::Host, port| -> Result<UdpSocket> {
            let socket = host.within(|| UdpSocket::bind(SocketAddr::new(any, port)))??;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            Ok(socket)
        };
        let (client, server) = (socket(a, 0)?, socket(b, 5000)?);
        let word = marker("udp");
        mesh.readable(&word, || {
            client.send_to(word.as_bytes(), address)?;
            let mut buffer = [0; 200];
            let (n, from) = server.recv_from(&mut buffer)?;
            server.send_to(&buffer[..n], from)?;
            let n = client.recv(&mut buffer)?;
            equal!(&buffer[..n], word.as_bytes(), "datagram");
            Ok(())
        })?;
        let ip = address.ip().to_string();
        run_on(a, command("ping").args(["-c", "2", "-i", "0.2", "-W", "2", &ip])).context("ping")?;
    }
    Ok(())
}

fn ssh_and_ports_that_are_to_be_skipped() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).configured("skip_ports = [22, 8022]").start()?;
    for port in [22, 8022] {
        let server = Server::answering(mesh.host("b"), port, "SSH-2.0 ")?;
        for address in sockets(mesh.host("b"), port) {
            let word = marker("ssh");
            mesh.readable(&word, || Ok(ask(mesh.host("a"), address, &word)?))?;
        }
        ensure!(!mesh.at("a").has_edge(port)?, "port {port} went through the mesh");
        drop(server);
    }
    mesh.secured_between("a", "b", 2222)
}

fn own_addresses_and_loopback() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    let a = mesh.host("a");
    let server = Server::answering(a, 8000, "got ")?;
    let own = sockets(a, 8000).into_iter().chain(["127.0.0.1:8000".parse()?, "[::1]:8000".parse()?]);
    for address in own {
        let answer = ask(a, address, "myself").with_context(|| address.to_string())?;
        equal!(answer, "got myself", "answer at {address}");
        let client = server.clients().last().copied();
        ensure!(client.is_some_and(|c| c.ip() == address.ip()), "the server at {address} sees {client:?}");
    }
    ensure!(!mesh.at("a").has_edge(8000)?, "a connection to itself went through the mesh");
    // Whoever dials the daemon's own capture port gets nothing out of it, and no loop either.
    let capture = SocketAddr::new([127, 0, 0, 1].into(), meshd::config::CAPTURE_PORT);
    let answer = ask(a, capture, "hello");
    ensure!(
        matches!(&answer, Ok(text) if text.is_empty()) || answer.is_err_and(|e| e.kind() != io::ErrorKind::TimedOut),
        "it talks"
    );
    mesh.secured_between("b", "a", 8001)
}
