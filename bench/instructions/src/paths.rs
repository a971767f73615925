//! The hot paths: what is done for every record, every connection and every peer. Each is warm before it is counted.

use std::hint::black_box;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use anyhow::{Context, Result};
use meshd::identity::tls::server_name;
use meshd::identity::traffic::{HEADER, Kind, MAX_DATA, TRAILER, Traffic};
use meshd::proxy::edges::{Direction, Edges, Key, OpenEdge};
use meshd::proxy::header::{Header, PREFIX};
use meshd::proxy::live::{Limits, Live};
use meshd::proxy::outbound;
use meshd::proxy::pool;
use meshd::proxy::tunnel::{Input, Role, Said, Stream, Tunnel};
use meshd_agent::catalog::Catalog;
use meshd_agent::record::{Address, Listener, Mode, NodeRecord, Presence, Roots, SignedRecord};
use meshd_ca::identity::SpiffeId;
use meshd_ca::verify::verify_svid;
use rustls::ConnectionTrafficSecrets;
use rustls::crypto::cipher::{AeadKey, Iv};
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use tokio::time::Instant;

use crate::lab::{Mesh, NOW, Node, Pair, unit};
use crate::pipe::{Pipe, pipe};

/// Who counts.
pub(crate) trait Measure {
    /// Whether a path whose name starts like this is counted at all.
    fn wants(&self, start: &str) -> bool;

    /// Counts `work`, which does the same so many `times`.
    fn path(&mut self, name: &str, times: u64, work: impl FnMut());
}

/// So often is a path taken that is short.
const TURNS: u64 = 256;
/// And one that is long.
const FEW: u64 = 16;
/// What is asked and answered over a tunnel.
const WORDS: usize = 128;

/// Measures all of them, always in the same order.
///
/// # Errors
/// When what they need cannot be made.
pub(crate) fn all(runtime: &Runtime, measure: &mut impl Measure) -> Result<()> {
    for (suite, aes) in [("aes256gcm", true), ("chacha20poly1305", false)] {
        for length in [64, MAX_DATA] {
            records(measure, suite, aes, length)?;
        }
    }
    headers(measure)?;
    if measure.wants("catalog:") {
        catalog(measure, &*Mesh::of(50)?)?;
    }
    let mesh = Mesh::of(2)?;
    trust(measure, &mesh)?;
    registry(measure, &mesh);
    if measure.wants("tunnel:") {
        for (suite, aes) in [("aes128gcm", true), ("chacha20poly1305", false)] {
            runtime.block_on(tunnels(measure, &mesh, suite, aes))?;
        }
    }
    if measure.wants("sockets:") || measure.wants("pool:") {
        sockets(runtime, measure, &mesh)?;
    }
    Ok(())
}

/// Does it a few times, then has it counted.
fn warm(measure: &mut impl Measure, name: &str, times: u64, mut work: impl FnMut()) {
    if !measure.wants(name) {
        return;
    }
    (0..4).for_each(|_| work());
    measure.path(name, times, || (0..times).for_each(|_| work()));
}

fn traffic(aes: bool) -> Result<Traffic> {
    let iv = Iv::from([9; 12]);
    Ok(Traffic::new((
        0,
        match aes {
            // Of 32 bytes, as all keys that can be made outside rustls.
            true => ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([7; 32]), iv },
            false => ConnectionTrafficSecrets::Chacha20Poly1305 { key: AeadKey::from([7; 32]), iv },
        },
    ))?)
}

fn records(measure: &mut impl Measure, suite: &str, aes: bool, length: usize) -> Result<()> {
    let mut room = vec![0; HEADER + length + TRAILER];
    let mut from = traffic(aes)?;
    warm(measure, &format!("seal:{suite}:{length}"), TURNS, || {
        _ = black_box(from.seal(Kind::Data, black_box(&mut room), length))
    });
    // Each is opened once, in the order in which they were sealed.
    let (mut from, mut to) = (traffic(aes)?, traffic(aes)?);
    let mut sealed = Vec::new();
    for _ in 0..TURNS + 4 {
        from.seal(Kind::Data, &mut room, length)?;
        sealed.push(room.clone());
    }
    let mut next = sealed.iter_mut();
    let mut failed = 0;
    warm(measure, &format!("open:{suite}:{length}"), TURNS, || {
        failed += u64::from(next.next().is_none_or(|record| black_box(to.open(record)).is_err()));
    });
    anyhow::ensure!(failed == 0, "a record was not opened");
    Ok(())
}

fn header() -> Result<Header> {
    let port = NonZeroU16::new(443).context("a port")?;
    Ok(Header { port, address: Some([10, 0, 0, 2].into()), client: Some(([10, 0, 0, 1], 40_000).into()), low_port: false })
}

fn headers(measure: &mut impl Measure) -> Result<()> {
    let header = header()?;
    warm(measure, "header:encode", TURNS, || _ = black_box(black_box(&header).encode()));
    let wire = header.encode();
    warm(measure, "header:decode", TURNS, || _ = black_box(Header::decode(black_box(&wire[PREFIX..]))));
    Ok(())
}

/// Who is at an address and what listens there: fifty members with twenty listeners each.
fn catalog(measure: &mut impl Measure, mesh: &Mesh) -> Result<()> {
    let at = |number: usize| IpAddr::from([10, 0, 0, number as u8 + 1]);
    let mut records = Vec::new();
    for (number, key) in mesh.keys.iter().enumerate() {
        let listener = |port| Listener { port, ip: None, workload: unit(number) };
        let record = NodeRecord {
            node: mesh.node(number),
            sequence: 1,
            port: 6374,
            addresses: vec![Address { ip: at(number), shared: false }],
            zone: None,
            mode: Mode::Permissive,
            presence: Presence::Running,
            listeners: (8000..8020).map(listener).collect(),
            version: "0.1.0".into(),
            roots: Roots::default(),
        };
        records.push(Arc::new(SignedRecord::sign(key, record)?));
    }
    let catalog = Catalog::new(records, &mesh.roster);
    let (mut found, members) = (0, mesh.keys.len() as u64);
    let mut look_up = || {
        for number in 0..mesh.keys.len() {
            let ip = black_box(at(number));
            found += catalog.at(ip).iter().filter(|node| catalog.listener(**node, ip, 8010).is_some()).count();
        }
    };
    look_up();
    measure.path("catalog:look-up", members, look_up);
    anyhow::ensure!(found > 0, "nothing listens there");
    Ok(())
}

/// Whose certificate it is: looked at anew, and known.
fn trust(measure: &mut impl Measure, mesh: &Mesh) -> Result<()> {
    let leaf = mesh.leaf(1)?;
    let chain = [CertificateDer::from(leaf.der.clone())];
    let verifier = mesh.verifier(true);
    let trust = verifier.trust();
    verify_svid(&chain, &trust.bundle, &trust.roster, NOW)?;
    warm(measure, "svid:verify", FEW, || _ = black_box(verify_svid(black_box(&chain), &trust.bundle, &trust.roster, NOW)));
    warm(measure, "svid:known", TURNS, || _ = black_box(verifier.identify(black_box(&chain))));
    Ok(())
}

/// An edge between the units of the first two members.
fn edge(mesh: &Mesh) -> Key {
    let id = |number| Some(SpiffeId::new(mesh.roster.trust_domain().clone(), unit(number)));
    Key { direction: Direction::Outbound, source: id(0), destination: id(1), address: [10, 0, 0, 2].into(), port: 443 }
}

/// What every connection is entered in.
fn registry(measure: &mut impl Measure, mesh: &Mesh) {
    let (live, edges) = (Live::new(Limits::default()), Edges::default());
    let (node, key) = (mesh.node(1), edge(mesh));
    warm(measure, "live:enter-leave", TURNS, || drop(black_box(live.enter(Direction::Outbound, node))));
    warm(measure, "edges:open-settle", TURNS, || edges.open(key.clone(), node, NOW).settle(&Ok(()), NOW));
}

/// What applications say.
static SAID: [u8; 1 << 16] = [7; 1 << 16];

async fn say(to: &Pipe, length: usize) {
    let mut left = length;
    while left > 0 {
        match to.try_write_vectored(&[std::io::IoSlice::new(&SAID[..left.min(SAID.len())])]) {
            Ok(n) => left -= n,
            Err(_) => _ = std::future::poll_fn(|context| to.poll_writable(context)).await,
        }
    }
}

async fn hear(from: &Pipe, length: usize, room: &mut [u8]) {
    let mut left = length;
    while left > 0 {
        match from.try_read(room) {
            Ok(0) => return,
            Ok(n) => left -= n,
            Err(_) => _ = std::future::poll_fn(|context| from.poll_readable(context)).await,
        }
    }
}

/// Both ends of a tunnel, with all of the record layer and the relay, and queues in memory in place of sockets.
struct Ends {
    dialler: Box<Tunnel<Pipe>>,
    dialled: Box<Tunnel<Pipe>>,
    edges: [OpenEdge; 2],
}

impl Ends {
    /// Shakes hands. The dialler's last flight leaves with its first stream, so the first stream is part of it.
    async fn new(nodes: &[Node; 2], edges: [OpenEdge; 2]) -> Result<Self> {
        let (a, b) = pipe();
        let own = |number: usize| nodes[number].svids.own().context("no certificate");
        let (client, server) = (own(0)?.client().clone(), own(1)?.server().clone());
        let header = header()?;
        let dialling = async {
            let mut dialler = Tunnel::dial(a, client, server_name(header.port)).await?;
            let (app, captured) = pipe();
            app.end()?;
            dialler.carry(&captured, Role::Dialler(header), &mut Said::default(), edges[0].meter()).await?;
            anyhow::Ok(dialler)
        };
        let answering = async {
            let mut dialled = Tunnel::answer(b, server, Input::empty()).await?;
            let (app, delivered) = pipe();
            app.end()?;
            dialled.header().await?;
            dialled.carry(&delivered, Role::Dialled, &mut Said::default(), edges[1].meter()).await?;
            anyhow::Ok(dialled)
        };
        let (dialler, dialled) = tokio::try_join!(dialling, answering)?;
        Ok(Self { dialler, dialled, edges })
    }

    /// One stream, of which `client` is the application and `service` the service.
    async fn stream(&mut self, client: impl AsyncFnOnce(&Pipe), service: impl AsyncFnOnce(&Pipe)) -> Result<()> {
        let ((app, captured), (served, delivered)) = (pipe(), pipe());
        let header = header()?;
        let Self { dialler, dialled, edges } = self;
        let client = async {
            client(&app).await;
            Ok(app.end()?)
        };
        let service = async {
            service(&served).await;
            Ok(served.end()?)
        };
        let out = async { Ok(dialler.carry(&captured, Role::Dialler(header), &mut Said::default(), edges[0].meter()).await?) };
        let into = async {
            dialled.header().await?;
            Ok(dialled.carry(&delivered, Role::Dialled, &mut Said::default(), edges[1].meter()).await?)
        };
        tokio::try_join!(client, service, out, into).map(|_: ((), (), (), ())| ())
    }
}

/// What a tunnel does, its two ends together.
async fn tunnels(measure: &mut impl Measure, mesh: &Arc<Mesh>, suite: &str, aes: bool) -> Result<()> {
    let nodes = [Node::new(mesh, 0, aes).await?, Node::new(mesh, 1, aes).await?];
    let edges = Edges::default();
    let both = || [(); 2].map(|()| edges.open(edge(mesh), mesh.node(1), NOW));
    let mut ends = Ends::new(&nodes, both()).await?;
    // Nothing in here waits for anything but the other end: there is no need of a runtime.
    let mut failed = 0;
    let mut run = |result: Option<Result<()>>| failed += u64::from(!matches!(result, Some(Ok(()))));
    warm(measure, &format!("tunnel:{suite}:open-ask-answer-close"), FEW, || {
        let client = async |app: &Pipe| {
            say(app, WORDS).await;
            hear(app, WORDS, &mut [0; WORDS]).await;
        };
        let service = async |app: &Pipe| {
            hear(app, WORDS, &mut [0; WORDS]).await;
            say(app, WORDS).await;
        };
        run(at_once(ends.stream(client, service)));
    });
    // In one stream: what opens and closes it is a 512th of each.
    const ASKED: u64 = 2 * TURNS;
    let ask = || {
        let client = async |app: &Pipe| {
            for _ in 0..ASKED {
                say(app, WORDS).await;
                hear(app, WORDS, &mut [0; WORDS]).await;
            }
        };
        let service = async |app: &Pipe| {
            for _ in 0..ASKED {
                hear(app, WORDS, &mut [0; WORDS]).await;
                say(app, WORDS).await;
            }
        };
        run(at_once(ends.stream(client, service)));
    };
    measure.path(&format!("tunnel:{suite}:ask-answer"), ASKED, ask);
    const MEGABYTES: u64 = 4;
    let mut room = vec![0; SAID.len()];
    let move_on = || {
        let length = (MEGABYTES << 20) as usize;
        run(at_once(ends.stream(async |app| say(app, length).await, async |app| hear(app, length, &mut room).await)));
    };
    measure.path(&format!("tunnel:{suite}:megabyte"), MEGABYTES, move_on);
    if aes {
        let mut shake = || run(at_once(async { Ends::new(&nodes, both()).await.map(drop) }));
        measure.path("tunnel:handshake", FEW, || (0..FEW).for_each(|_| shake()));
    }
    anyhow::ensure!(failed == 0, "{failed} streams failed");
    Ok(())
}

/// A short connection over both hosts' whole data plane, on a tunnel that is used again, over sockets; client and service are part of it.
fn sockets(runtime: &Runtime, measure: &mut impl Measure, mesh: &Arc<Mesh>) -> Result<()> {
    let pair = runtime.block_on(Pair::new(mesh))?;
    let mut failed = 0;
    let one = async || {
        let (mut app, captured) = pair.captured().await?;
        let client = async {
            app.write_all(&[7; WORDS]).await?;
            app.shutdown().await?;
            app.read_to_end(&mut Vec::with_capacity(WORDS)).await.map(|_| ())
        };
        let service = async {
            let (mut stream, _) = pair.service.accept().await?;
            stream.read_to_end(&mut Vec::with_capacity(WORDS)).await?;
            stream.write_all(&[7; WORDS]).await
        };
        let carried = async {
            outbound::serve(pair.client.clone(), captured).await;
            Ok(())
        };
        tokio::try_join!(client, service, carried)?;
        anyhow::Ok(())
    };
    const CONNECTIONS: u64 = 64;
    warm(measure, "sockets:short-connection", CONNECTIONS, || failed += u64::from(runtime.block_on(one()).is_err()));
    anyhow::ensure!(failed == 0, "{failed} connections failed");
    // The first for what comes next.
    runtime.block_on(one())?;
    let reused = pair.client.pool.reused();
    anyhow::ensure!(reused >= CONNECTIONS || !measure.wants("sockets:short-connection"), "tunnels were not used again");
    // The tunnel of those is at rest: what it is to take it and give it back.
    runtime.block_on(async {
        let (_, captured) = pair.captured().await?;
        let client = captured.peer_addr()?.ip();
        let at: SocketAddr = pair.service.local_addr()?;
        let svid = pair.client.svids.for_client(&unit(0)).await.context("no certificate")?;
        let member = pair.client.directory.member_at(at.ip()).context("no member")?;
        let key = pool::Key { client, node: member.node, port: member.port, service: at, source: unit(0) };
        let mut held = 0;
        warm(measure, "pool:take-give", TURNS, || {
            if let Some(tunnel) = pair.client.pool.take(&key, &svid, Instant::now()).tunnel {
                held += 1;
                pair.client.pool.give(key.clone(), tunnel, svid.clone(), Instant::now());
            }
        });
        anyhow::ensure!(held == TURNS + 4 || !measure.wants("pool:take-give"), "no tunnel was at rest");
        Ok(())
    })
}

/// Runs what never waits for long, in one go: none when it waits nevertheless.
fn at_once<T>(work: impl Future<Output = T>) -> Option<T> {
    let mut work = std::pin::pin!(work);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    // What wakes is polled anyway: all of them are in here.
    for _ in 0..100_000 {
        if let std::task::Poll::Ready(done) = work.as_mut().poll(&mut context) {
            return Some(done);
        }
    }
    None
}
