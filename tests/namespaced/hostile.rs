//! Strangers, members and local users who send garbage, too much, too slowly or nothing at all: it costs little, it is in nobody's way,
//! and nobody is taken for somebody.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::num::NonZeroU16;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use data_encoding::BASE64URL_NOPAD;
use meshd::api::State;
use meshd::config::PORT;
use meshd::demo::lab::Host;
use meshd::identity::provider::provider;
use meshd::identity::tls::{ALPN_DATA, NodeTls, server_name};
use meshd::identity::verifier::NodeKeyVerifier;
use meshd::intercept::process;
use meshd_ca::keys::{PrivateKey, random};
use meshd_ca::store;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::time::Instant;

use crate::support::mesh::{Member, Mesh, Setup};
use crate::support::scenario::{Need, Scenario, scenario};
use crate::support::traffic::{Server, ask, connect, connect_within, sockets};
use crate::support::{equal, eventually, role};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("hostile", strangers_on_the_mesh_port_delay_nobody),
    scenario!("hostile", ten_thousand_that_say_nothing_keep_nobody_out),
    scenario!("hostile", garbage_after_a_handshake_is_the_end_of_that_connection),
    scenario!("hostile", the_capture_port_and_mdns_take_anything),
    scenario!("hostile", no_user_keeps_others_off_the_local_socket, Need::Root, Need::Program("setpriv")),
    scenario!("hostile", damaged_state_is_named_and_costs_what_is_in_it),
];

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// What the daemon may grow by under attack, and keep of it: debug builds under load stay at about half of this.
const GROWTH: u64 = 96 << 20;
/// How long a connection between members may take while the daemon is under attack.
const DELAY: Duration = Duration::from_secs(10);

// ---- Measures

/// A figure of `/proc/PID/status`, in bytes.
fn memory(pid: u32, what: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix(what)).with_context(|| format!("no {what}"))?;
    Ok(line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// Asks `a` from `b` again and again while `attack` goes on: every question is answered, and in time.
fn served_meanwhile<T>(mesh: &Mesh, attack: impl FnOnce() -> Result<T>) -> Result<T> {
    let server = Server::answering(mesh.host("a"), 8000, "got ")?;
    let pid = mesh.at("a").pid()?;
    let before = memory(pid, "VmRSS")?;
    let done = AtomicBool::new(false);
    let (attacked, asked) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> Result<(u32, Duration)> {
            let (mut asked, mut worst) = (0, Duration::ZERO);
            loop {
                let last = done.load(Ordering::Relaxed);
                for to in sockets(mesh.host("a"), 8000) {
                    let begun = Instant::now();
                    let answer = ask(mesh.host("b"), to, "word").with_context(|| format!("question {asked}, to {to}"))?;
                    ensure!(answer == "got word", "answered {answer:?}");
                    worst = worst.max(begun.elapsed());
                    asked += 1;
                }
                if last {
                    return Ok((asked, worst));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let attacked = attack();
        done.store(true, Ordering::Relaxed);
        (attacked, asking.join().map_err(|_| anyhow::anyhow!("the client died")))
    });
    let peak = memory(pid, "VmHWM")?;
    let attacked = attacked?;
    let (asked, worst) = asked??;
    drop(server);
    ensure!(asked >= 4, "only {asked} questions");
    ensure!(worst < DELAY, "a connection between members took {worst:?}");
    ensure!(peak < before + GROWTH, "grew from {before} to {peak} bytes");
    let log = mesh.at("a").log();
    ensure!(!log.contains("panicked"), "a panic: {log}");
    println!("{asked} questions, the slowest {worst:?}; memory {} -> {} KiB at most", before >> 10, peak >> 10);
    Ok(attacked)
}

/// Reads and drops until the other end is gone.
fn until_gone(stream: &mut impl Read, tcp: &TcpStream, patience: Duration) -> Result<()> {
    tcp.set_read_timeout(Some(patience))?;
    let end = Instant::now() + patience;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Err(e) if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Ok(()),
            _ => ensure!(Instant::now() < end, "still open after {patience:?}"),
        }
    }
}

/// Writes what the other end takes, a gigabyte at most, and how much that was.
fn pour(stream: &mut impl Write) -> u64 {
    let block: Vec<u8> = garbage(64 * 1024);
    let mut poured = 0;
    while poured < 1 << 30 {
        match stream.write(&block) {
            Ok(n) => poured += n as u64,
            Err(_) => break,
        }
    }
    poured
}

fn garbage(length: usize) -> Vec<u8> {
    let seed = random::<8>().map_or(1, u64::from_be_bytes) | 1;
    let mut state = seed;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

// ---- Clients

fn node_tls(key: &PrivateKey) -> Result<NodeTls> {
    Ok(NodeTls::new(&provider(true), key)?)
}

/// A configuration that shows `shown`, or nothing, and takes what it is shown.
fn data_tls(shown: Option<(Vec<u8>, Vec<u8>)>) -> Result<Arc<ClientConfig>> {
    let crypto = provider(true);
    let builder = ClientConfig::builder_with_provider(crypto.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NodeKeyVerifier::new(crypto)));
    let mut config = match shown {
        Some((der, key)) => {
            builder.with_client_auth_cert(vec![CertificateDer::from(der)], PrivatePkcs8KeyDer::from(key).into())?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN_DATA.to_vec()];
    Ok(Arc::new(config))
}

/// Shakes hands with `to` from `host`. That the other side refuses the certificate shows only when it is read from.
fn shake(host: &Host, to: SocketAddr, config: Arc<ClientConfig>, port: u16) -> Result<Tls> {
    let name = server_name(NonZeroU16::new(port).context("a port")?);
    let mut tls = StreamOwned::new(ClientConnection::new(config, name)?, connect(host, to)?);
    while tls.conn.is_handshaking() {
        tls.conn.complete_io(&mut tls.sock)?;
    }
    Ok(tls)
}

/// The first bytes of an honest client.
fn hello(config: Arc<ClientConfig>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    ClientConnection::new(config, NodeTls::server_name())?.write_tls(&mut bytes)?;
    Ok(bytes)
}

/// What is in a state file.
fn state(member: &Member, name: &str) -> Result<Vec<u8>> {
    let file = fs::read(member.dir().join("state").join(name))?;
    Ok(store::decode(&file).with_context(|| format!("{name} is damaged"))?.1.to_vec())
}

/// A certificate of a member and its key, as its daemon has them.
fn svid(member: &Member) -> Result<(Vec<u8>, Vec<u8>)> {
    let saved: Vec<serde_json::Value> = serde_json::from_slice(&state(member, "svids")?)?;
    let field = |name: &str| Ok::<_, anyhow::Error>(BASE64URL_NOPAD.decode(saved[0][name].as_str().context("text")?.as_bytes())?);
    Ok((field("certificate")?, field("key")?))
}

/// Opens a connection from one address of `host` and leaves it at that.
fn from_address(host: &Host, source: IpAddr, to: SocketAddr) -> Result<Socket> {
    let socket = host.within(|| -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        Ok(socket)
    })??;
    socket.connect_timeout(&to.into(), Duration::from_secs(20))?;
    Ok(socket)
}

// ---- Scenarios

fn strangers_on_the_mesh_port_delay_nobody() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).outsider("x").configured("mdns = false").start()?;
    let (x, to) = (mesh.host("x"), SocketAddr::new(mesh.host("a").ipv4.into(), PORT));
    let key = PrivateKey::generate()?;
    let node = node_tls(&key)?;
    let hellos = [hello(node.control_client.clone())?, hello(node.join_client.clone())?, hello(data_tls(None)?)?];
    served_meanwhile(&mesh, || {
        // A byte a second, for as long as it is taken, beside all the rest.
        let mut slow: Vec<TcpStream> = (0..40).map(|_| connect(x, to)).collect::<io::Result<_>>()?;
        let begun = Instant::now();
        for bytes in hellos.iter().cloned().chain([garbage(1), garbage(600), garbage(70_000)]) {
            for (number, bytes) in broken(&bytes).into_iter().enumerate() {
                let mut stream = connect(x, to)?;
                let _ = stream.write_all(&bytes);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let tcp = stream.try_clone()?;
                until_gone(&mut stream, &tcp, Duration::from_secs(15)).with_context(|| format!("number {number}"))?;
            }
        }
        // A record that promises more and more of one hello, and plain garbage without end.
        for mut first in [vec![0x16, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff], garbage(9)] {
            let mut stream = connect(x, to)?;
            first.extend(garbage(0x4000 - 4));
            let _ = stream.write_all(&first);
            let poured = pour(&mut stream);
            ensure!(poured < 16 << 20, "took {poured} bytes of garbage");
        }
        let end = |name: &str, mut tls: Tls| -> Result<()> {
            let tcp = tls.sock.try_clone()?;
            until_gone(&mut tls, &tcp, Duration::from_secs(20)).with_context(|| name.to_owned())
        };
        // Without a certificate; with one of nobody.
        if let Ok(tls) = shake(x, to, data_tls(None)?, 8000) {
            end("without a certificate", tls)?;
        }
        let own = meshd_ca::issue::node_certificate(&key)?;
        if let Ok(tls) = shake(x, to, data_tls(Some((own, key.pkcs8().to_vec())))?, 8000) {
            end("a certificate of its own making", tls)?;
        }
        while !slow.is_empty() {
            slow.retain_mut(|s| s.write_all(&hellos[0][..1]).is_ok());
            ensure!(begun.elapsed() < Duration::from_secs(60), "{} are still there that send a byte a second", slow.len());
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    })?;
    equal!(mesh.at("a").nodes()?.len(), 2, "nodes");
    Ok(())
}

/// Cut off, with a bit turned, twice, and backwards.
fn broken(bytes: &[u8]) -> Vec<Vec<u8>> {
    let turned = (0..bytes.len()).step_by((bytes.len() / 24).max(1)).map(|at| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1 << (at % 8);
        bytes
    });
    let cut = (1..8).map(|part| bytes[..bytes.len() * part / 8].to_vec());
    let whole = [bytes.repeat(2), bytes.iter().rev().copied().collect()];
    turned.chain(cut).chain(whole).collect()
}

fn ten_thousand_that_say_nothing_keep_nobody_out() -> Result<()> {
    const SOURCES: u8 = 4;
    let limit = process::raise_file_limit()?;
    // Both ends may have to share one limit on this machine's files with other scenarios.
    let each = usize::try_from(limit.saturating_sub(4000) / u64::from(SOURCES))?.min(2500);
    ensure!(each >= 100, "a limit of {limit} open files is too low for this scenario");
    let mesh = Setup::of(&["a", "b"]).outsider("x").configured("mdns = false").start()?;
    let (x, to) = (mesh.host("x"), SocketAddr::new(mesh.host("a").ipv4.into(), PORT));
    let sources: Vec<IpAddr> = (0..SOURCES).map(|n| Ipv4Addr::new(192, 168, 77, 101 + n).into()).collect();
    sources.iter().try_for_each(|ip| x.add_address(*ip))?;
    served_meanwhile(&mesh, || {
        let held: Vec<Vec<Socket>> = std::thread::scope(|scope| {
            let crowds: Vec<_> = sources
                .iter()
                .map(|source| scope.spawn(|| (0..each).map(|_| from_address(x, *source, to)).collect::<Result<Vec<_>>>()))
                .collect();
            crowds.into_iter().map(|c| c.join().map_err(|_| anyhow::anyhow!("a thread died"))?).collect::<Result<_>>()
        })?;
        equal!(held.iter().map(Vec::len).sum::<usize>(), each * usize::from(SOURCES), "connections");
        // A new member is through in the middle of it.
        let token = mesh.at("a").token()?;
        ensure!(token.len() > 40);
        // Each is closed when its time is up, or earlier.
        let last = held.last().and_then(|h| h.last()).context("a connection")?;
        last.set_read_timeout(Some(Duration::from_secs(25)))?;
        let closed = (&*last).read(&mut [0]);
        ensure!(!matches!(&closed, Err(e) if e.kind() == io::ErrorKind::WouldBlock), "silence is waited for without end");
        Ok(())
    })
}

fn garbage_after_a_handshake_is_the_end_of_that_connection() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).outsider("x").configured("mdns = false").start()?;
    let (a, to) = (mesh.at("a"), SocketAddr::new(mesh.host("a").ipv4.into(), PORT));
    let pid = a.pid()?;
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let core = limits.lines().find(|l| l.starts_with("Max core file size")).context("no such limit")?;
    ensure!(core.split_whitespace().skip(4).take(2).eq(["0", "0"]), "{core}");
    eventually(Duration::from_secs(10), "the SVIDs of b are saved", || svid(mesh.at("b")))?;
    let stranger = node_tls(&PrivateKey::generate()?)?;
    let member = node_tls(&PrivateKey::from_pkcs8(&state(mesh.at("b"), "node.key")?)?)?;
    served_meanwhile(&mesh, || {
        let x = mesh.host("x");
        let ends = |name: &str, tls: &mut Tls, bytes: &[u8], patience: u64| -> Result<()> {
            let _ = tls.write_all(bytes).and_then(|()| tls.flush());
            let tcp = tls.sock.try_clone()?;
            until_gone(tls, &tcp, Duration::from_secs(patience)).with_context(|| name.to_owned())
        };
        // Joining: a length that promises four gigabytes, garbage, silence.
        for bytes in
            [vec![0xff; 4], garbage(3000), [&[0, 0, 0, 200][..], b"H{\"method\":\"token\",\"token\":", &[b'['; 180]].concat()]
        {
            ends("join", &mut shake(x, to, stranger.join_client.clone(), 1)?, &bytes, 20)?;
        }
        // Nobody is kept from joining by one who only opens doors.
        let silent: Vec<Tls> = (0..40).map(|_| shake(x, to, stranger.join_client.clone(), 1)).collect::<Result<_>>()?;
        // Control: no HTTP/2; frames that ask for much and give up at once; a header without end.
        ends("control", &mut shake(x, to, stranger.control_client.clone(), 1)?, &garbage(3000), 20)?;
        let strangers: Vec<Tls> = (0..40).map(|_| shake(x, to, stranger.control_client.clone(), 1)).collect::<Result<_>>()?;
        for (who, host) in [(&stranger, x), (&member, mesh.host("b"))] {
            for storm in [resets(4000), pings(20_000), headers(64 << 10), settings(20_000)] {
                let mut tls = shake(host, to, who.control_client.clone(), 1)?;
                let _ = tls.write_all(PREFACE).and_then(|()| tls.write_all(&storm)).and_then(|()| tls.flush());
            }
        }
        // A member: no header, one that is none, one that never ends, garbage without end.
        let data = data_tls(Some(svid(mesh.at("b"))?))?;
        for bytes in [vec![0xff; 600], vec![2, 0], garbage(700), vec![0, 4, 1, 2, 0, 0]] {
            ends("data", &mut shake(mesh.host("b"), to, data.clone(), 8000)?, &bytes, 20)?;
        }
        let poured = pour(&mut shake(mesh.host("b"), to, data.clone(), 8000)?);
        ensure!(poured < 32 << 20, "took {poured} bytes after a header that is none");
        // Strangers are gone by themselves.
        for (name, mut tls) in strangers.into_iter().map(|t| ("a stranger's", t)).chain(silent.into_iter().map(|t| ("a join", t)))
        {
            let tcp = tls.sock.try_clone()?;
            until_gone(&mut tls, &tcp, Duration::from_secs(25)).with_context(|| format!("{name} connection stays"))?;
        }
        Ok(())
    })?;
    equal!(a.nodes()?.len(), 2, "nodes");
    // The way in is as it was.
    mesh.secured_between("b", "a", 8001)
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// An HTTP/2 frame (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), body].concat()
}
/// Requests that are taken back at once (CVE-2023-44487).
fn resets(count: u32) -> Vec<u8> {
    // :method POST, :path /, :scheme https, as in the static table of HPACK.
    let ask = |stream| [frame(1, 4, stream, &[0x83, 0x84, 0x87]), frame(3, 0, stream, &[0, 0, 0, 8])].concat();
    (0..count).flat_map(|n| ask(2 * n + 1)).collect()
}
fn pings(count: u32) -> Vec<u8> {
    frame(6, 0, 0, &[7; 8]).repeat(count as usize)
}
fn settings(count: u32) -> Vec<u8> {
    frame(4, 0, 0, &[]).repeat(count as usize)
}
/// One header in pieces that never end (CVE-2024-27316).
fn headers(bytes: usize) -> Vec<u8> {
    let mut all = frame(1, 0, 1, &[0x83, 0x84, 0x87]);
    let piece = [&[0, 1, b'a', 0x7f, 0x81, 0x01][..], &[b'x'; 256]].concat();
    while all.len() < bytes {
        all.extend(frame(9, 0, 1, &piece));
    }
    all
}

fn the_capture_port_and_mdns_take_anything() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).outsider("x").start()?;
    served_meanwhile(&mesh, || {
        let capture = SocketAddr::from(([127, 0, 0, 1], meshd::config::CAPTURE_PORT));
        for number in 0..600 {
            let mut stream = match connect_within(mesh.host("a"), capture, Duration::from_secs(5)) {
                // Reset before we looked.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => continue,
                stream => stream.context("the capture port")?,
            };
            let _ = stream.write_all(&garbage(number % 200));
            let tcp = stream.try_clone()?;
            until_gone(&mut stream, &tcp, Duration::from_secs(10)).context("the capture port")?;
        }
        // Nobody outside of the host has anything there.
        let from_outside = connect_within(mesh.host("x"), sockets(mesh.host("a"), capture.port())[0], Duration::from_secs(5));
        ensure!(from_outside.is_err(), "the capture port is open to the network");
        let speaker = mesh.host("x").within(|| -> io::Result<std::net::UdpSocket> {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
            socket.set_reuse_address(true)?;
            socket.set_reuse_port(true)?;
            socket.bind(&SocketAddr::from(([0, 0, 0, 0], 5353)).into())?;
            let socket: std::net::UdpSocket = socket.into();
            SockRef::from(&socket).set_multicast_if_v4(&mesh.host("x").ipv4)?;
            Ok(socket)
        })??;
        let group = SocketAddr::from(([224, 0, 0, 251], 5353));
        for number in 0..3000u32 {
            let honest = announcement(number);
            let packet = match number % 4 {
                0 => garbage(1 + number as usize % 1400),
                1 => honest[..honest.len() * (1 + number as usize % 16) / 17].to_vec(),
                2 => broken(&honest).swap_remove(number as usize % 20),
                _ => honest,
            };
            mesh.host("x").within(|| speaker.send_to(&packet, group))??;
        }
        Ok(())
    })?;
    // Nothing of what was announced is a node, or captured.
    equal!(mesh.at("a").nodes()?.len(), 2, "nodes");
    ensure!(!mesh.at("b").captured("a")?.is_empty());
    Ok(())
}

/// Somebody who says that meshd runs there (RFC 6763): PTR, SRV, TXT and A.
fn announcement(number: u32) -> Vec<u8> {
    let label = |text: &str| [&[text.len() as u8][..], text.as_bytes()].concat();
    let service = [label("_meshd"), label("_tcp"), label("local"), vec![0]].concat();
    let instance = [label(&format!("liar-{number}")), service.clone()].concat();
    let host = [label(&format!("liar-{number}")), label("local"), vec![0]].concat();
    let record = |name: &[u8], kind: u8, data: &[u8]| {
        [name, &[0, kind, 0x80, 1, 0, 0, 0, 120], &(data.len() as u16).to_be_bytes(), data].concat()
    };
    let text = [label("v=1"), label(&format!("s={number:016x}")), label("m=00000000")].concat();
    let address = [10, 66, (number >> 8) as u8, number as u8];
    [
        vec![0, 0, 0x84, 0, 0, 0, 0, 4, 0, 0, 0, 0],
        record(&service, 12, &instance),
        record(&instance, 33, &[&[0, 0, 0, 0, 0x18, 0xe6][..], &host].concat()),
        record(&instance, 16, &text),
        record(&host, 1, &address),
    ]
    .concat()
}

fn no_user_keeps_others_off_the_local_socket() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).configured("mdns = false").start()?;
    let a = mesh.at("a");
    let path = a.dir().join("run").join("meshd.sock");
    served_meanwhile(&mesh, || {
        let reaches = |when: &str| -> Result<()> {
            let begun = Instant::now();
            a.cli(&["nodes"]).with_context(|| when.to_owned())?;
            ensure!(begun.elapsed() < DELAY, "{when}: took {:?}", begun.elapsed());
            Ok(())
        };
        // Another user opens all he can and says nothing, or a byte now and then.
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        let hold = role::holder(&path, 300);
        command.arg(hold.get_program()).args(hold.get_args());
        let other = a.spawn(&mut command, "holder")?;
        eventually(Duration::from_secs(20), "he holds them", || {
            ensure!(other.log().contains("holding"), "{}", other.log());
            Ok(())
        })?;
        reaches("while another user holds connections")?;
        // So do we, and still get through.
        let own: Vec<UnixStream> = (0..200).map(|_| UnixStream::connect(&path)).collect::<io::Result<_>>()?;
        reaches("while root holds connections")?;
        drop(own);
        let body =
            |length: &str| format!("POST /v1/join HTTP/1.1\r\nhost: meshd\r\ncontent-length: {length}\r\n\r\n").into_bytes();
        for bytes in [
            garbage(10_000),
            b"GET /v1/status HTTP/1.1\r\n".repeat(1000),
            body("99999999999999999999999"),
            [body("1000000"), garbage(500_000)].concat(),
            [body("10"), b"[[[[[[[[[[".to_vec()].concat(),
            [b"GET /v1/resolve?address=".to_vec(), vec![b'9'; 60_000], b" HTTP/1.1\r\n\r\n".to_vec()].concat(),
        ] {
            let mut stream = UnixStream::connect(&path)?;
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            let mut answer = Vec::new();
            match stream.take(1 << 20).read_to_end(&mut answer) {
                Ok(_) => {}
                Err(e) => ensure!(e.kind() != io::ErrorKind::WouldBlock, "no end after {} bytes", bytes.len()),
            }
            ensure!(!answer.starts_with(b"HTTP/1.1 200"), "garbage was answered with {}", answer.escape_ascii());
        }
        let mut stream = UnixStream::connect(&path)?;
        stream.write_all(&body("1073741824"))?;
        let poured = pour(&mut stream);
        ensure!(poured < 8 << 20, "took {poured} bytes of a body");
        drop(other);
        reaches("afterwards")
    })
}

fn damaged_state_is_named_and_costs_what_is_in_it() -> Result<()> {
    const MUST: [&str; 7] = ["node.key", "roster", "root.key", "root.crt", "tokens", "clock", "sequence"];
    const MAY: [&str; 3] = ["svids", "sequences", "bindings"];
    let mut mesh = Setup::of(&["a"]).configured("mdns = false\nfound_after = \"0s\"\ndrain = \"0s\"").start()?;
    let state = mesh.host("a").dir().join("state");
    eventually(Duration::from_secs(10), "its SVIDs are saved", || Ok(fs::metadata(state.join("svids"))?))?;
    mesh.at_mut("a").stop()?;
    let whole: Vec<(PathBuf, Vec<u8>)> = fs::read_dir(&state)?
        .map(|f| Ok(f?.path()))
        .filter(|f| f.as_ref().is_ok_and(|f: &PathBuf| f.is_file()))
        .map(|f: Result<PathBuf>| f.and_then(|f| Ok((f.clone(), fs::read(&f)?))))
        .collect::<Result<_>>()?;
    let restore = || -> Result<()> {
        // Also what a run in between has added.
        for entry in fs::read_dir(&state)? {
            let path = entry?.path();
            if path.file_name().is_none_or(|name| name != "cache" && name != "backup") {
                fs::remove_file(&path).or_else(|_| fs::remove_dir(&path))?;
            }
        }
        for (path, bytes) in &whole {
            fs::write(path, bytes)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        }
        Ok(())
    };
    let elsewhere = mesh.host("a").dir().join("elsewhere");
    fs::write(&elsewhere, b"not ours")?;
    fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o644))?;
    type Damage<'a> = (&'a str, Box<dyn Fn(&Path, &[u8]) -> Result<()> + 'a>);
    let damages: [Damage<'_>; 7] = [
        ("random", Box::new(|p, b| Ok(fs::write(p, garbage(b.len()))?))),
        (
            "a pipe",
            Box::new(|p, _| {
                fs::remove_file(p)?;
                Ok(rustix::fs::mkfifoat(rustix::fs::CWD, p, 0o600.into())?)
            }),
        ),
        ("truncated", Box::new(|p, b| Ok(fs::write(p, &b[..b.len() / 2])?))),
        ("huge", Box::new(|p, _| Ok(fs::File::create(p)?.set_len(1 << 30)?))),
        (
            "a symbolic link",
            Box::new(|p, _| {
                fs::remove_file(p)?;
                Ok(std::os::unix::fs::symlink(&elsewhere, p)?)
            }),
        ),
        (
            "a directory",
            Box::new(|p, _| {
                fs::remove_file(p)?;
                Ok(fs::create_dir(p)?)
            }),
        ),
        (
            "a turned bit",
            Box::new(|p, b| {
                let mut b = b.to_vec();
                let middle = b.len() / 2;
                b[middle] ^= 4;
                Ok(fs::write(p, b)?)
            }),
        ),
    ];
    // Every damage to the files of most weight, two to each of the others.
    let mut trials = Vec::new();
    for (place, name) in MUST.iter().chain(&MAY).enumerate() {
        let all = ["node.key", "svids"].contains(name);
        let some = if all { 0..damages.len() } else { place % damages.len()..place % damages.len() + 2 };
        trials.extend(some.map(|d| (*name, d % damages.len())));
    }
    for (name, damage) in trials {
        restore()?;
        let (what, damage) = &damages[damage];
        let files: Vec<&(PathBuf, Vec<u8>)> = whole
            .iter()
            .filter(|(p, _)| p.file_name().is_some_and(|f| f == name || f.to_str() == Some(&format!("{name}.other"))))
            .collect();
        if files.is_empty() {
            continue;
        }
        files.iter().try_for_each(|(path, bytes)| damage(path, bytes))?;
        let before = mesh.at("a").log().len();
        let member = mesh.at_mut("a");
        member.start()?;
        if MAY.contains(&name) {
            member.until(State::Member).with_context(|| format!("{name}: {what}"))?;
            let peak = memory(member.pid()?, "VmHWM")?;
            ensure!(peak < GROWTH, "{name}: {what}: took {} KiB", peak >> 10);
            member.stop()?;
        } else {
            let ended = member.ended(Duration::from_secs(20))?;
            let status = ended.with_context(|| format!("{name}: {what}: the daemon goes on"))?;
            ensure!(!status.success(), "{name}: {what}: ended well");
        }
        let log = member.log().split_off(before);
        ensure!(log.contains(&format!("state/{name}")), "{name}: {what}: is not named in {log}");
        ensure!(!log.contains("panicked"), "{name}: {what}: {log}");
        ensure!(fs::read(&elsewhere)? == b"not ours" && fs::metadata(&elsewhere)?.permissions().mode() & 0o777 == 0o644);
    }
    // The generation before serves, and a mode that others could read by is mended; both are said.
    restore()?;
    fs::write(state.join("roster"), garbage(5000))?;
    fs::set_permissions(state.join("node.key"), fs::Permissions::from_mode(0o644))?;
    if whole.iter().any(|(p, _)| p.ends_with("roster.other")) {
        mesh.at_mut("a").start()?;
        mesh.at("a").until(State::Member)?;
        mesh.at_mut("a").stop()?;
    }
    restore()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)
}
