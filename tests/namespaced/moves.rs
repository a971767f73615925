//! Addresses that move, and daemons that die: never a byte in plaintext to or from the wrong host.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::support::mesh::{SETTLED, Setup, run_on};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::traffic::{Server, ask, connect, connect_within, expect_pattern, read_line, sockets};
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("moves", a_new_address_is_secured_and_a_dropped_one_released),
    scenario!("moves", an_address_moves_to_a_non_member, Need::Program("ip")),
    scenario!("moves", an_address_moves_to_another_member, Need::Program("ip")),
    scenario!("moves", an_impostor_at_a_members_address_gets_nothing),
    scenario!("moves", a_killed_daemon_leaks_nothing_with_a_borrowed_source),
    scenario!("moves", a_vanished_client_daemon_leaks_nothing),
];

/// Addresses that hosts have besides their first ones.
const EXTRA: [&str; 2] = ["192.168.77.50", "fd77::50"];

fn extra() -> Result<[IpAddr; 2]> {
    Ok([EXTRA[0].parse()?, EXTRA[1].parse()?])
}

/// What the gratuitous ARP of a DHCP client or keepalived does: the neighbour forgets where the address was. Without it the kernel takes
/// up to a minute to notice by itself.
fn announced(mesh: &crate::support::mesh::Mesh, ip: IpAddr) -> Result<()> {
    run_on(mesh.host("a"), command("ip").args(["neigh", "flush", "to", &ip.to_string()])).map(|_| ())
}

/// The switch and the neighbours take a moment to notice who has an address now.
fn eventually_answered(mesh: &crate::support::mesh::Mesh, ip: IpAddr, port: u16, expected: &str) -> Result<()> {
    eventually(SETTLED, &format!("{ip} answers as {expected}"), || {
        let host = mesh.host("a");
        let mut stream = connect_within(host, SocketAddr::new(ip, port), Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"x\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        equal!(answer, format!("{expected} x"), "answer at {ip}");
        Ok(())
    })
}

fn a_new_address_is_secured_and_a_dropped_one_released() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    let server = Server::answering(mesh.host("b"), 8000, "b ")?;
    for ip in extra()? {
        mesh.host("b").add_address(ip)?;
        mesh.at("a").until_captured("b", &[ip])?;
        let word = marker("added");
        mesh.encrypted(&word, || Ok(ask(mesh.host("a"), SocketAddr::new(ip, 8000), &word)?))?;
        mesh.host("b").delete_address(ip)?;
        eventually(SETTLED, "a dropped address is released", || {
            let captured = mesh.at("a").captured("b")?;
            ensure!(!captured.contains(&ip), "{captured:?}");
            Ok(())
        })?;
    }
    drop(server);
    Ok(())
}

fn an_address_moves_to_a_non_member() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).outsider("x").start()?;
    let servers = (Server::answering(mesh.host("b"), 8000, "b ")?, Server::answering(mesh.host("x"), 8000, "x ")?);
    for ip in extra()? {
        mesh.host("b").add_address(ip)?;
        mesh.at("a").until_captured("b", &[ip])?;
        eventually_answered(&mesh, ip, 8000, "b")?;
        mesh.host("b").delete_address(ip)?;
        mesh.host("x").add_address(ip)?;
        announced(&mesh, ip)?;
        eventually_answered(&mesh, ip, 8000, "x")?;
        let word = marker("moved");
        mesh.readable(&word, || Ok(ask(mesh.host("a"), SocketAddr::new(ip, 8000), &word)?))?;
        mesh.host("x").delete_address(ip)?;
    }
    drop(servers);
    Ok(())
}

fn an_address_moves_to_another_member() -> Result<()> {
    let mesh = Setup::of(&["a", "b", "c"]).start()?;
    let servers = (Server::answering(mesh.host("b"), 8000, "b ")?, Server::answering(mesh.host("c"), 8000, "c ")?);
    for ip in extra()? {
        mesh.host("b").add_address(ip)?;
        mesh.at("a").until_captured("b", &[ip])?;
        eventually_answered(&mesh, ip, 8000, "b")?;
        mesh.host("b").delete_address(ip)?;
        mesh.host("c").add_address(ip)?;
        announced(&mesh, ip)?;
        mesh.at("a").until_captured("c", &[ip])?;
        eventually_answered(&mesh, ip, 8000, "c")?;
        let word = marker("moved");
        mesh.encrypted(&word, || Ok(ask(mesh.host("a"), SocketAddr::new(ip, 8000), &word)?))?;
        let expected = mesh.at("a").resolve(SocketAddr::new(ip, 8000))?;
        ensure!(expected.host.as_ref().is_some_and(|h| h.as_str() == "c"), "resolve says {expected:?}");
        mesh.host("c").delete_address(ip)?;
    }
    drop(servers);
    Ok(())
}

/// A member's cable is pulled and a stranger takes its address: within the time in which the member may come back, the stranger
/// hears nothing, however often we try.
fn an_impostor_at_a_members_address_gets_nothing() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).outsider("x").start()?;
    let ip = IpAddr::from(mesh.host("b").ipv4);
    mesh.host("b").link_down()?;
    mesh.host("x").add_address(ip)?;
    let server = Server::answering(mesh.host("x"), 8000, "impostor ")?;
    let word = marker("impostor");
    let ((), report) = mesh.watched(&[&word], || {
        for _ in 0..8 {
            let heard =
                connect_within(mesh.host("a"), SocketAddr::new(ip, 8000), Duration::from_secs(1)).and_then(|mut stream| {
                    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
                    stream.write_all(format!("{word}\n").as_bytes())?;
                    read_line(&mut stream)
                });
            ensure!(heard.is_err(), "the impostor answered: {heard:?}");
        }
        Ok(())
    })?;
    equal!(report.hits[0], 0, "frames with what was meant for b");
    equal!(server.clients().len(), 0, "connections the impostor got");
    Ok(())
}

/// The daemon at the server's end speaks with the client's address. When it is killed in the middle of transfers, what the service
/// still has to say must not go out to the real owner of that address.
fn a_killed_daemon_leaks_nothing_with_a_borrowed_source() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).start()?;
    let word = marker("borrowed");
    let (up, down) = (word.repeat(200), word.clone());
    let server = Server::start(mesh.host("b"), 8000, move |mut stream| {
        let text = down.repeat(200);
        let mut reading = stream.try_clone()?;
        std::thread::spawn(move || std::io::copy(&mut reading, &mut std::io::sink()));
        loop {
            stream.write_all(text.as_bytes())?;
        }
    })?;
    let clients: Vec<_> = sockets(mesh.host("b"), 8000).into_iter().cycle().take(8).collect();
    let host = mesh.host("a").clone();
    let capture_from_b = {
        let texts = [word.as_str()];
        let texts: Vec<&[u8]> = texts.iter().map(|t| t.as_bytes()).collect();
        meshd::demo::capture::Capture::start(mesh.lab(), &texts)?
    };
    let mut threads = Vec::new();
    for address in clients {
        let (mut stream, up) = (connect(&host, address)?, up.clone());
        let mut writing = stream.try_clone()?;
        threads.push(std::thread::spawn(move || while writing.write_all(up.as_bytes()).is_ok() {}));
        threads.push(std::thread::spawn(move || drop(std::io::copy(&mut stream, &mut std::io::sink()))));
    }
    std::thread::sleep(Duration::from_secs(2));
    mesh.at_mut("b").kill();
    // Time for retransmissions of everything that was on its way.
    std::thread::sleep(Duration::from_secs(6));
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a client died"))?;
    }
    drop(server);
    let report = capture_from_b.stop()?;
    // Such a capture may lose frames under this load: the flows it saw tell the truth all the same.
    ensure!(report.frames > 1000, "only {} frames were seen", report.frames);
    equal!(report.hits[0], 0, "frames with plaintext");
    let plain: Vec<_> = report.flows.iter().filter(|((from, to), _)| from.port() == 8000 || to.port() == 8000).collect();
    ensure!(plain.iter().all(|(_, flow)| flow.bytes == 0), "payload of the service on the link: {plain:?}");
    ensure!(plain.iter().all(|(_, flow)| flow.attempts == 0), "connections to the service on the link: {plain:?}");
    Ok(())
}

fn a_vanished_client_daemon_leaks_nothing() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).start()?;
    let word = marker("vanished");
    let text = word.clone();
    let server = Server::start(mesh.host("b"), 8000, move |mut stream| {
        loop {
            stream.write_all(text.as_bytes())?;
        }
    })?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    let mut buffer = vec![0; 1 << 16];
    stream.read_exact(&mut buffer).context("the transfer begins")?;
    let capture = meshd::demo::capture::Capture::start(mesh.lab(), &[word.as_bytes()])?;
    mesh.at_mut("a").kill();
    // The application goes on talking on the connection it had.
    for _ in 0..30 {
        let _ = stream.write_all(word.as_bytes());
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(server);
    let report = capture.stop()?;
    equal!(report.hits[0], 0, "frames with plaintext");
    if expect_pattern(&mut stream, 0, 1 << 20).is_ok() {
        bail!("the connection goes on without a daemon");
    }
    Ok(())
}
