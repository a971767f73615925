//! What an application may rely on in TCP holds through the mesh: bytes, ends, addresses, failures.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::applications::megabytes;
use crate::support::mesh::{Mesh, Setup};
use crate::support::scenario::{Scenario, scenario};
use crate::support::traffic::{
    Server, addresses, ask, connect, connect_from, dial, echo, echo_all, expect_pattern, listen, read_line, send_pattern, sockets,
};
use crate::support::{equal, eventually, marker, role};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("tcp", members_are_secured_both_ways_over_both_families),
    scenario!("tcp", every_byte_arrives_in_order),
    scenario!("tcp", two_thousand_connections_at_once),
    scenario!("tcp", half_close_then_a_long_answer),
    scenario!("tcp", the_server_may_speak_first_or_never),
    scenario!("tcp", idle_connections_outlive_keepalive),
    scenario!("tcp", a_dead_peer_is_noticed),
    scenario!("tcp", client_ports_below_1024_stay_there),
    scenario!("tcp", closed_ports_are_refused),
    scenario!("tcp", a_reset_is_a_reset),
    scenario!("tcp", a_killed_server_is_reset_then_refused),
    scenario!("tcp", a_killed_daemon_is_never_a_clean_end),
];

fn two() -> Result<Mesh> {
    Setup::of(&["a", "b"]).start()
}

/// Whether the far end was cut off, not closed in an orderly way.
fn cut(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe)
}

fn members_are_secured_both_ways_over_both_families() -> Result<()> {
    let mesh = Setup::of(&["a", "b", "c"]).start()?;
    for (client, server) in [("a", "b"), ("b", "a"), ("b", "c"), ("c", "a")] {
        mesh.secured_between(client, server, 8000).with_context(|| format!("{client} to {server}"))?;
    }
    let server = Server::answering(mesh.host("c"), 8100, "")?;
    for name in ["a", "b"] {
        for address in sockets(mesh.host("c"), 8100) {
            ask(mesh.host(name), address, "who am I")?;
        }
    }
    let seen: Vec<_> = server.clients().iter().map(SocketAddr::ip).collect();
    equal!(seen, [addresses(mesh.host("a")), addresses(mesh.host("b"))].concat(), "clients as the server sees them");
    Ok(())
}

fn every_byte_arrives_in_order() -> Result<()> {
    let mesh = two()?;
    // A quarter of the volume, four ways: up and down over IPv4 and IPv6, at the same time.
    let blocks = megabytes() * 4;
    let server = Server::start(mesh.host("b"), 8000, move |mut stream| {
        let mut reading = stream.try_clone()?;
        let receiver = std::thread::spawn(move || expect_pattern(&mut reading, 1, blocks));
        send_pattern(&mut stream, 2, blocks)?;
        stream.shutdown(Shutdown::Write)?;
        receiver.join().map_err(|_| std::io::Error::other("the receiver died"))?
    })?;
    std::thread::scope(|scope| {
        let clients = sockets(mesh.host("b"), 8000).map(|address| {
            let mesh = &mesh;
            scope.spawn(move || -> Result<()> {
                let mut stream = connect(mesh.host("a"), address)?;
                let mut writing = stream.try_clone()?;
                let sender = std::thread::spawn(move || {
                    send_pattern(&mut writing, 1, blocks).and_then(|()| writing.shutdown(Shutdown::Write))
                });
                expect_pattern(&mut stream, 2, blocks).with_context(|| format!("from {address}"))?;
                equal!(stream.read(&mut [0])?, 0, "the end after the last byte");
                sender.join().map_err(|_| anyhow::anyhow!("the sender died"))?.with_context(|| format!("to {address}"))
            })
        });
        clients.into_iter().try_for_each(|c| c.join().map_err(|_| anyhow::anyhow!("a client died"))?)
    })?;
    drop(server);
    mesh.both_ends_agree("a", "b", 8000)
}

fn two_thousand_connections_at_once() -> Result<()> {
    const CONNECTIONS: usize = 2000;
    meshd::intercept::process::raise_file_limit()?;
    let mesh = two()?;
    let listener = listen(mesh.host("b"), 8000)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mesh = Arc::new(mesh);
    runtime.block_on(async {
        echo_all(listener)?;
        let targets = sockets(mesh.host("b"), 8000);
        let (mut open, began) = (Vec::new(), tokio::time::Instant::now());
        for number in 0..CONNECTIONS {
            let (mesh, to) = (mesh.clone(), targets[number % 2]);
            open.push(tokio::spawn(async move {
                Ok::<_, anyhow::Error>((dial(mesh.host("a"), to).await?, format!("word {number:06}")))
            }));
        }
        let mut streams = Vec::new();
        for task in open {
            streams.push(tokio::time::timeout(Duration::from_secs(60), task).await.context("connecting takes too long")???);
        }
        println!("{CONNECTIONS} connections were open after {:.2} s", began.elapsed().as_secs_f64());
        // All of them are open now; each says something and hears it, twice.
        for _ in 0..2 {
            for (stream, word) in &mut streams {
                stream.write_all(word.as_bytes()).await.with_context(|| word.clone())?;
            }
            for (stream, word) in &mut streams {
                let mut answer = vec![0; word.len()];
                tokio::time::timeout(Duration::from_secs(60), stream.read_exact(&mut answer))
                    .await
                    .with_context(|| format!("no answer to {word}"))?
                    .with_context(|| word.clone())?;
                equal!(answer, word.as_bytes().to_vec(), "an answer");
            }
        }
        let open: u64 = mesh.at("a").edges()?.iter().filter(|e| e.port == 8000 && e.secured).map(|e| e.open).sum();
        equal!(open, CONNECTIONS as u64, "open connections that the edges show");
        Ok(())
    })
}

fn half_close_then_a_long_answer() -> Result<()> {
    let mesh = two()?;
    let server = Server::start(mesh.host("b"), 8000, |mut stream| {
        let mut question = Vec::new();
        stream.read_to_end(&mut question)?;
        std::thread::sleep(Duration::from_secs(2));
        stream.write_all(&(question.len() as u64).to_be_bytes())?;
        send_pattern(&mut stream, 5, 256)
    })?;
    for address in sockets(mesh.host("b"), 8000) {
        let mut stream = connect(mesh.host("a"), address)?;
        stream.write_all(&[7; 100_000])?;
        stream.shutdown(Shutdown::Write)?;
        let mut length = [0; 8];
        stream.read_exact(&mut length).with_context(|| format!("answer after the half-close over {address}"))?;
        equal!(u64::from_be_bytes(length), 100_000, "bytes the server got");
        expect_pattern(&mut stream, 5, 256)?;
        equal!(stream.read(&mut [0])?, 0, "a clean end");
    }
    drop(server);
    // The other way round: the server says all it has to say at once, then listens for long.
    let server = Server::start(mesh.host("b"), 8001, |mut stream| {
        stream.write_all(b"I am done")?;
        stream.shutdown(Shutdown::Write)?;
        expect_pattern(&mut stream, 6, 256)?;
        // A reset would tell the client that not all was read.
        stream.read_to_end(&mut Vec::new()).map(drop)
    })?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8001)[0])?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    equal!(said, "I am done", "what the server said");
    send_pattern(&mut stream, 6, 256)?;
    stream.shutdown(Shutdown::Write)?;
    drop(server);
    Ok(())
}

fn the_server_may_speak_first_or_never() -> Result<()> {
    let mesh = two()?;
    let banner = Server::start(mesh.host("b"), 25, |mut stream| {
        stream.write_all(b"220 b speaks first\r\n")?;
        let line = read_line(&mut stream)?;
        stream.write_all(format!("250 {line}\r\n").as_bytes())
    })?;
    for address in sockets(mesh.host("b"), 25) {
        let mut stream = connect(mesh.host("a"), address)?;
        equal!(read_line(&mut stream)?, "220 b speaks first\r", "the banner");
        stream.write_all(b"HELO\n")?;
        equal!(read_line(&mut stream)?, "250 HELO\r", "the answer");
    }
    drop(banner);
    // Nobody ever says anything: both sides just see the end.
    let silent = Server::start(mesh.host("b"), 26, |mut stream| stream.read_to_end(&mut Vec::new()).map(drop))?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 26)[0])?;
    stream.shutdown(Shutdown::Write)?;
    equal!(stream.read(&mut [0])?, 0, "the end of a silent connection");
    drop(silent);
    Ok(())
}

fn idle_connections_outlive_keepalive() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).configured("keepalive = \"1s\"").start()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let mut streams = Vec::new();
    for address in sockets(mesh.host("b"), 8000) {
        let mut stream = connect(mesh.host("a"), address)?;
        echo(&mut stream, "before")?;
        streams.push(stream);
    }
    // Longer than any multiple of the keepalive time after which a connection is given up.
    std::thread::sleep(Duration::from_secs(12));
    for stream in &mut streams {
        echo(stream, "after").context("after twelve idle seconds")?;
    }
    drop(server);
    Ok(())
}

fn a_dead_peer_is_noticed() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).configured("keepalive = \"1s\"").start()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    let mut asking = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    echo(&mut stream, "before")?;
    echo(&mut asking, "before")?;
    mesh.host("b").link_down()?;
    // One waits; the other has something on its way, which keepalive does not look after.
    asking.write_all(b"anybody there?")?;
    for mut stream in [stream, asking] {
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        match stream.read(&mut [0]) {
            Ok(0) => bail!("a dead peer was shown as a clean end"),
            Ok(_) => bail!("bytes out of nowhere"),
            Err(error) => ensure!(cut(&error) || error.kind() == ErrorKind::TimedOut, "{error}"),
        }
    }
    drop(server);
    Ok(())
}

fn client_ports_below_1024_stay_there() -> Result<()> {
    let mesh = two()?;
    let server = Server::answering(mesh.host("b"), 2049, "ok ")?;
    for address in sockets(mesh.host("b"), 2049) {
        let secret = marker("nfs");
        mesh.encrypted(&secret, || {
            let mut stream = connect_from(mesh.host("a"), 777, address)?;
            stream.write_all(format!("{secret}\n").as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            equal!(answer, format!("ok {secret}"), "answer over {address}");
            Ok(())
        })?;
    }
    let clients = server.clients();
    equal!(clients.len(), 2, "clients");
    for (client, ip) in clients.iter().zip(addresses(mesh.host("a"))) {
        ensure!(client.ip() == ip && client.port() < 1024, "the server sees {client}");
    }
    // And an ordinary port stays an ordinary port.
    ask(mesh.host("a"), sockets(mesh.host("b"), 2049)[0], "x")?;
    ensure!(server.clients().last().is_some_and(|c| c.port() >= 1024), "the server sees {:?}", server.clients().last());
    Ok(())
}

/// Connects and waits for the end: how it failed, if it did.
fn knock(mesh: &Mesh, address: SocketAddr) -> Result<ErrorKind> {
    let mut stream = match connect(mesh.host("a"), address) {
        Ok(stream) => stream,
        Err(error) => return Ok(error.kind()),
    };
    match stream.read(&mut [0]) {
        Ok(n) => bail!("the closed port {address} gave {n} bytes and no error"),
        Err(error) => Ok(error.kind()),
    }
}

fn closed_ports_are_refused() -> Result<()> {
    let mesh = two()?;
    for address in sockets(mesh.host("b"), 8999) {
        let first = knock(&mesh, address)?;
        ensure!(matches!(first, ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused), "the first attempt: {first}");
        let second = knock(&mesh, address)?;
        equal!(second, ErrorKind::ConnectionRefused, "the second attempt to {address}");
    }
    // The port opens: it must not stay refused.
    let server = Server::answering(mesh.host("b"), 8999, "now ")?;
    for address in sockets(mesh.host("b"), 8999) {
        let answer = eventually(Duration::from_secs(5), "an opened port is reached", || Ok(ask(mesh.host("a"), address, "x")?))?;
        equal!(answer, "now x", "answer");
    }
    drop(server);
    // A service that listens on loopback only is as closed as without a mesh.
    let private = Server::on(mesh.host("b"), "127.0.0.1:8998".parse()?, |mut s| s.write_all(b"private"))?;
    let seen = knock(&mesh, sockets(mesh.host("b"), 8998)[0])?;
    ensure!(matches!(seen, ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused), "a loopback service: {seen}");
    drop(private);
    Ok(())
}

fn reset(stream: TcpStream) -> std::io::Result<()> {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    drop(stream);
    Ok(())
}

fn a_reset_is_a_reset() -> Result<()> {
    let mesh = two()?;
    let server = Server::start(mesh.host("b"), 8000, |mut stream| {
        send_pattern(&mut stream, 9, 4)?;
        read_line(&mut stream)?;
        reset(stream)
    })?;
    for address in sockets(mesh.host("b"), 8000) {
        let mut stream = connect(mesh.host("a"), address)?;
        expect_pattern(&mut stream, 9, 4)?;
        stream.write_all(b"now\n")?;
        match stream.read(&mut [0]) {
            Ok(n) => bail!("the server reset the connection, the client over {address} saw {n} bytes and no error"),
            Err(error) => ensure!(cut(&error), "{error}"),
        }
    }
    drop(server);
    // The client resets: the server must not take it for a clean end.
    let (tell, told) = std::sync::mpsc::channel();
    let server = Server::start(mesh.host("b"), 8001, move |mut stream| {
        let seen = stream.read_to_end(&mut Vec::new());
        let _ = tell.send(seen.map_err(|e| e.kind()));
        Ok(())
    })?;
    let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8001)[0])?;
    stream.write_all(b"half a word")?;
    std::thread::sleep(Duration::from_millis(300));
    reset(stream)?;
    let seen = told.recv_timeout(Duration::from_secs(10)).context("the server does not notice the reset")?;
    equal!(seen, Err(ErrorKind::ConnectionReset), "what the server saw");
    drop(server);
    Ok(())
}

fn a_killed_server_is_reset_then_refused() -> Result<()> {
    let mesh = two()?;
    let b = mesh.host("b");
    let address = sockets(b, 8000)[0];
    let mut server = b.spawn(&mut role::deaf(address), "deaf")?;
    eventually(Duration::from_secs(5), "the server listens", || Ok(connect(b, address).map(drop)?))?;
    let mut stream = connect(mesh.host("a"), address)?;
    // It has not read all we said when it dies, so the kernel resets the connection.
    stream.write_all(&[1; 10_000])?;
    std::thread::sleep(Duration::from_millis(500));
    server.kill();
    match stream.read(&mut [0]) {
        Ok(n) => bail!("the server was killed, the client saw {n} bytes and no error"),
        Err(error) => ensure!(cut(&error), "{error}"),
    }
    let first = knock(&mesh, address)?;
    ensure!(matches!(first, ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused), "the first attempt: {first}");
    equal!(knock(&mesh, address)?, ErrorKind::ConnectionRefused, "the second attempt");
    Ok(())
}

fn a_killed_daemon_is_never_a_clean_end() -> Result<()> {
    for victim in ["b", "a"] {
        let mut mesh = two()?;
        let server = Server::start(mesh.host("b"), 8000, |mut stream| send_pattern(&mut stream, 3, u64::MAX))?;
        let mut streams = Vec::new();
        for address in sockets(mesh.host("b"), 8000) {
            let mut stream = connect(mesh.host("a"), address)?;
            expect_pattern(&mut stream, 3, 16)?;
            streams.push(stream);
        }
        mesh.at_mut(victim).kill();
        let mut buffer = vec![0; 1 << 20];
        for mut stream in streams {
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) if victim == "a" => break, // our own kernel closes the socket of the dead daemon
                    Ok(0) => bail!("the daemon of {victim} was killed, the client saw a clean end"),
                    Ok(_) => {}
                    Err(error) => {
                        ensure!(cut(&error), "{error}");
                        break;
                    }
                }
            }
        }
        drop(server);
    }
    Ok(())
}
