//! The tunnel against the reference: under random schedules both ends see the same bytes and the same ends, whoever is at the other
//! end of the wire; and what is changed on the wire is never delivered and never a clean end.
//!
//! `MESHD_SCHEDULES` says how many for each pair of ends, `MESHD_SEED` with which to begin: a schedule that fails names its seed, so that
//! `MESHD_SCHEDULES=1 MESHD_SEED=n` is that one again.

mod simulated;

use std::num::NonZeroU16;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use meshd_ca::identity::NodeId;
use meshd_ca::time::UnixTime;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::lab::{Lab, lab};
use super::reference::Plain;
use super::{PATIENCE, pattern};
use crate::identity::tls::{ALPN_DATA, ALPN_STREAMS, server_name};
use crate::proxy::Fault;
use crate::proxy::edges::{Direction, Edges, Key};
use crate::proxy::header::{Header, PREFIX};
use crate::proxy::socket;
use crate::proxy::tunnel::{Input, Role, Said, Stream, Tunnel, Version};

/// What carries one end.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// rustls as it is, `meshd/1`.
    Reference,
    /// Ours, as a version that knows `meshd/1` only.
    One,
    /// Ours, `meshd/2` where the other end knows it.
    Two,
}

enum End<W = TcpStream> {
    Reference(Box<TlsStream<W>>),
    Ours(Box<Tunnel<W>>),
}

/// A connection as both the tunnel and rustls as it is know one.
pub(super) trait Wire: Stream + AsyncRead + AsyncWrite + Unpin {
    /// Dropping it is not a reset any more.
    fn ended(&self) -> io::Result<()>;
}

impl Wire for TcpStream {
    fn ended(&self) -> io::Result<()> {
        socket::ended(self)
    }
}

/// Who dials whom.
const PAIRS: [(Kind, Kind); 8] = [
    (Kind::Reference, Kind::One),
    (Kind::One, Kind::Reference),
    (Kind::One, Kind::One),
    (Kind::Two, Kind::Two),
    (Kind::Two, Kind::One),
    (Kind::One, Kind::Two),
    (Kind::Two, Kind::Reference),
    (Kind::Reference, Kind::Two),
];

/// A small generator: the same seed makes the same schedule.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        dice.roll(2);
        dice
    }

    fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % below
    }
}

/// How an application reads.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ear {
    Eager,
    /// Nothing for a while.
    Late,
    /// A little at a time, with pauses.
    Slow,
}

/// What one application does with its connection.
#[derive(Clone)]
struct Script {
    bytes: Vec<u8>,
    pieces: Vec<usize>,
    pauses: bool,
    ear: Ear,
    /// Breaks its connection off after so many pieces.
    resets: Option<usize>,
    /// Says its end only after it has heard the other's.
    ends_last: bool,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, pieces, pauses, ear, resets, ends_last } = self;
        let (bytes, pieces) = (bytes.len(), pieces.len());
        write!(f, "{bytes} bytes in {pieces} pieces, pauses: {pauses}, {ear:?}, resets: {resets:?}, ends last: {ends_last}")
    }
}

impl Script {
    fn new(dice: &mut Dice) -> Self {
        let total = match dice.roll(40) {
            0 => dice.roll(10 << 20),
            1..=4 => dice.roll(1 << 20),
            5..=9 => 0,
            10..=13 => 1,
            14..=18 => dice.roll(200),
            19..=23 => 16_384 - 32 + dice.roll(64),
            _ => dice.roll(60_000),
        };
        let bytes = pattern(total, dice.roll(1 << 30) as u64);
        let (mut pieces, mut left) = (Vec::new(), total);
        while left > 0 && pieces.len() < 200 {
            let most = [1, 100, 5_000, 70_000][dice.roll(4)];
            let piece = (1 + dice.roll(most)).min(left);
            pieces.push(piece);
            left -= piece;
        }
        pieces.extend((left > 0).then_some(left));
        let ear = [Ear::Eager, Ear::Eager, Ear::Eager, Ear::Late, Ear::Slow][dice.roll(5)];
        let resets = (dice.roll(8) == 0).then(|| dice.roll(pieces.len() + 1));
        Self { bytes, pieces, pauses: dice.roll(4) == 0, ear, resets, ends_last: false }
    }

    /// Says its piece while it listens. What it heard, and whether that ended cleanly.
    async fn play(&self, mut app: TcpStream) -> (Vec<u8>, bool) {
        if let Some(pieces) = self.resets {
            // The other one may do the same, and then nobody reads.
            let _ = timeout(Duration::from_millis(200), self.say(&mut app, pieces)).await;
            socket::application(&app, Duration::from_secs(9)).unwrap();
            return (Vec::new(), false);
        }
        let (mut from, mut to) = app.split();
        let heard = tokio::sync::Notify::new();
        let say = async {
            let said = self.say(&mut to, self.pieces.len()).await;
            if self.ends_last {
                heard.notified().await;
            }
            said && to.shutdown().await.is_ok()
        };
        let hear = async {
            let all = timeout(PATIENCE, self.hear(&mut from)).await.expect("an end in time");
            heard.notify_one();
            all
        };
        let (said, (heard, clean)) = tokio::join!(say, hear);
        // The kernel tells a reset once only: to whoever asks first.
        (heard, said && clean)
    }

    async fn say(&self, to: &mut (impl AsyncWriteExt + Unpin), pieces: usize) -> bool {
        let mut at = 0;
        for piece in &self.pieces[..pieces] {
            if to.write_all(&self.bytes[at..at + piece]).await.is_err() {
                return false;
            }
            at += piece;
            if self.pauses && at % 7 == 0 {
                sleep(Duration::from_millis(1)).await;
            }
        }
        true
    }

    async fn hear(&self, from: &mut (impl AsyncReadExt + Unpin)) -> (Vec<u8>, bool) {
        let mut heard = Vec::new();
        if self.ear == Ear::Late {
            sleep(Duration::from_millis(20)).await;
        }
        for _ in 0..if self.ear == Ear::Slow { 30 } else { 0 } {
            let mut some = [0; 3000];
            match from.read(&mut some).await {
                Ok(0) => return (heard, true),
                Ok(n) => heard.extend_from_slice(&some[..n]),
                Err(_) => return (heard, false),
            }
            sleep(Duration::from_millis(1)).await;
        }
        let clean = from.read_to_end(&mut heard).await.is_ok();
        (heard, clean)
    }
}

async fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a, b) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (a.unwrap(), b.unwrap().0)
}

/// An application's socket, and the other end of its connection as the proxy holds it.
async fn application() -> (TcpStream, TcpStream) {
    let (theirs, ours) = connected().await;
    socket::application(&ours, Duration::from_secs(9)).unwrap();
    (theirs, ours)
}

const PORT: u16 = 4000;

impl Kind {
    fn alpn(self) -> Vec<Vec<u8>> {
        let known: &[&[u8]] = if self == Self::Two { &[ALPN_STREAMS, ALPN_DATA] } else { &[ALPN_DATA] };
        known.iter().map(|k| k.to_vec()).collect()
    }

    async fn dial<W: Wire>(self, lab: &Lab, wire: W) -> io::Result<End<W>> {
        let mut config = (**lab.a.svids.own().unwrap().client()).clone();
        config.alpn_protocols = self.alpn();
        let (config, name) = (Arc::new(config), server_name(PORT.try_into().unwrap()));
        Ok(match self {
            Self::Reference => End::Reference(Box::new(TlsConnector::from(config).connect(name, wire).await?.into())),
            _ => End::Ours(Tunnel::dial(wire, config, name).await?),
        })
    }

    async fn answer<W: Wire>(self, lab: &Lab, wire: W) -> io::Result<End<W>> {
        let mut config = (**lab.b.svids.own().unwrap().server()).clone();
        config.alpn_protocols = self.alpn();
        let config = Arc::new(config);
        Ok(match self {
            Self::Reference => End::Reference(Box::new(TlsAcceptor::from(config).accept(wire).await?.into())),
            _ => End::Ours(Tunnel::answer(wire, config, Input::empty()).await?),
        })
    }
}

impl<W: Wire> End<W> {
    /// New keys after so many records; the reference at once, and it asks the other end for the same.
    fn renew(&mut self, after: u64) {
        match self {
            Self::Reference(tls) => match &mut **tls {
                TlsStream::Client(tls) => tls.get_mut().1.refresh_traffic_keys().unwrap(),
                TlsStream::Server(tls) => tls.get_mut().1.refresh_traffic_keys().unwrap(),
            },
            Self::Ours(tunnel) => tunnel.renew_after(after),
        }
    }

    /// Whether it can carry another stream after one that ended cleanly.
    fn lasts(&self) -> bool {
        matches!(self, Self::Ours(tunnel) if tunnel.version() == Version::Two)
    }

    /// One stream; the application's socket ends as the proxy would end it.
    async fn carry<A: Wire>(&mut self, app: A, role: Role) -> Result<(), Fault> {
        let edges = Edges::default();
        let key = Key { direction: Direction::Inbound, source: None, destination: None, address: [10, 0, 0, 1].into(), port: 1 };
        let edge = edges.open(key, NodeId::from_bytes([1; 16]), UnixTime(0));
        let mut app = app;
        match self {
            Self::Reference(tls) => {
                if matches!(role, Role::Dialled) {
                    let mut prefix = [0; PREFIX];
                    tls.read_exact(&mut prefix).await.map_err(Fault::Tunnel)?;
                    let mut fields = vec![0; Header::length(prefix).unwrap()];
                    tls.read_exact(&mut fields).await.map_err(Fault::Tunnel)?;
                }
                Plain.relay(&mut app, tls, role, edge.meter()).await?;
            }
            Self::Ours(tunnel) => {
                if matches!(role, Role::Dialled) {
                    tunnel.header().await?;
                }
                tunnel.carry(&app, role, &mut Said::default(), edge.meter()).await?;
            }
        }
        app.ended().map_err(Fault::App)
    }
}

fn header() -> Header {
    Header { port: NonZeroU16::new(PORT).unwrap(), address: None, client: None, low_port: false }
}

impl<W> fmt::Debug for Seen<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client: (a, clean_a), service: (b, clean_b), dialler, dialled } = self;
        write!(f, "client heard {}, cleanly: {clean_a}; service heard {}, cleanly: {clean_b}; ", a.len(), b.len())?;
        write!(f, "dialler: {:?}, dialled: {:?}", dialler.as_ref().err(), dialled.as_ref().err())
    }
}

/// What the two applications saw of one stream, and what is left of the tunnel: an end that fails drops its own, as the proxy does.
struct Seen<W = TcpStream> {
    client: (Vec<u8>, bool),
    service: (Vec<u8>, bool),
    dialler: Result<End<W>, Fault>,
    dialled: Result<End<W>, Fault>,
}

/// One stream. The ends come as promises: in a new tunnel the last flight of the handshake leaves with the header.
async fn stream(
    (client, service): (&Script, &Script),
    dialler: impl Future<Output = io::Result<End>>,
    dialled: impl Future<Output = io::Result<End>>,
) -> Seen {
    let ((app, captured), (served, delivered)) = (application().await, application().await);
    let carry = async |end: io::Result<End>, app, role| {
        let mut end = end.map_err(Fault::Handshake)?;
        end.carry(app, role).await.map(|()| end)
    };
    let (client, service, dialler, dialled) = tokio::join!(
        client.play(app),
        service.play(served),
        async { carry(dialler.await, captured, Role::Dialler(header())).await },
        async { carry(dialled.await, delivered, Role::Dialled).await },
    );
    Seen { client, service, dialler, dialled }
}

fn judge<W>(what: &str, client: &Script, service: &Script, seen: &Seen<W>) {
    let whole = client.resets.is_none() && service.resets.is_none();
    for (heard, other, me) in [(&seen.client, service, client), (&seen.service, client, service)] {
        assert!(other.bytes.starts_with(&heard.0), "{what}: other bytes than were sent");
        if whole {
            assert!(heard.1 && heard.0.len() == other.bytes.len(), "{what}: {} of {}", heard.0.len(), other.bytes.len());
        }
        if other.resets.is_some() && me.resets.is_none() {
            assert!(!heard.1, "{what}: a reset was shown as a clean end\n{client:?}\n{service:?}\n{seen:?}");
        }
    }
    assert_eq!((seen.dialler.is_ok(), seen.dialled.is_ok()), (whole, whole), "{what}: {seen:?}");
}

fn seeds(usual: u64) -> Range<u64> {
    let variable = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let first = variable("MESHD_SEED").unwrap_or(0);
    first..first + variable("MESHD_SCHEDULES").unwrap_or(usual)
}

/// Streams over one tunnel, one after another for as long as it lasts.
async fn schedule(lab: &Lab, pair: (Kind, Kind), seed: u64) {
    let mut dice = Dice::new(seed);
    let renewals = [(); 2].map(|()| (dice.roll(2) == 0).then(|| 1 + dice.roll(20) as u64));
    let (a, b) = connected().await;
    let dialler = async {
        let mut end = pair.0.dial(lab, a).await?;
        renewals[0].inspect(|after| end.renew(*after));
        Ok(end)
    };
    let dialled = async {
        let mut end = pair.1.answer(lab, b).await?;
        renewals[1].inspect(|after| end.renew(*after));
        Ok(end)
    };
    let streams = 1 + dice.roll(6);
    let scripts = |dice: &mut Dice| {
        let (mut client, mut service) = (Script::new(dice), Script::new(dice));
        let last = dice.roll(4);
        (client.ends_last, service.ends_last) = (last == 0, last == 1);
        (client, service)
    };
    let (client, service) = scripts(&mut dice);
    let what = |number| format!("seed {seed}, {pair:?}, stream {number}");
    let hangs = |number| move |_| panic!("seed {seed}, {pair:?}, stream {number} hangs");
    let mut seen = timeout(PATIENCE, stream((&client, &service), dialler, dialled)).await.unwrap_or_else(hangs(0));
    judge(&what(0), &client, &service, &seen);
    for number in 1..streams {
        let (Ok(dialler), Ok(dialled)) = (seen.dialler, seen.dialled) else { return };
        if !dialler.lasts() {
            return;
        }
        let (client, service) = scripts(&mut dice);
        let again = stream((&client, &service), async { Ok(dialler) }, async { Ok(dialled) });
        seen = timeout(PATIENCE, again).await.unwrap_or_else(hangs(number));
        judge(&what(number), &client, &service, &seen);
    }
}

/// Runs `one` with every pair of versions and every seed, the pairs beside each other.
async fn for_all<F: Future<Output = ()> + Send>(one: impl Fn(Arc<Lab>, (Kind, Kind), u64) -> F + Copy + Send + 'static) {
    let lab = Arc::new(lab().await);
    let run = |pair| {
        let lab = lab.clone();
        async move {
            for seed in seeds(40) {
                one(lab.clone(), pair, seed).await;
            }
        }
    };
    let mut pairs: JoinSet<()> = PAIRS.into_iter().map(run).collect();
    while let Some(done) = pairs.join_next().await {
        done.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnel_and_reference_do_the_same_under_random_schedules() {
    for_all(|lab, pair, seed| async move { schedule(&lab, pair, seed).await }).await;
}

/// What somebody on the wire does.
#[derive(Debug, Clone, Copy)]
enum Harm {
    Flip(u8),
    Drop(usize),
    Replay(usize),
    Insert(usize),
    Cut,
}

/// Passes bytes on both ways, harms those from `from` at offset `at`, and ends both sides a moment later: what is missing might
/// be waited for until then.
async fn tamper(mut from: TcpStream, mut to: TcpStream, at: usize, harm: Harm) {
    let (mut passed, mut buffer) = (0, vec![0; 16 * 1024]);
    let (mut fr, mut fw) = from.split();
    let (mut tr, mut tw) = to.split();
    let forth = async {
        loop {
            let n = match fr.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(n) => n,
            };
            let mut bytes = buffer[..n].to_vec();
            let harmed = (passed..passed + n).contains(&at);
            if harmed {
                let here = at - passed;
                match harm {
                    Harm::Flip(bit) => bytes[here] ^= 1 << bit,
                    Harm::Drop(many) => drop(bytes.drain(here..(here + many).min(n))),
                    Harm::Replay(many) => drop(bytes.splice(here..here, buffer[here.saturating_sub(many)..here].to_vec())),
                    Harm::Insert(many) => drop(bytes.splice(here..here, vec![23; many])),
                    Harm::Cut => bytes.truncate(here),
                }
            }
            passed += n;
            let written = tw.write_all(&bytes).await;
            if written.is_err() || (harmed && matches!(harm, Harm::Cut)) {
                break;
            }
            if harmed {
                let rest = tokio::io::copy(&mut fr, &mut tw);
                let _ = timeout(Duration::from_millis(300), rest).await;
                break;
            }
        }
        let _ = tw.shutdown().await;
    };
    let back = async {
        let _ = tokio::io::copy(&mut tr, &mut fw).await;
        let _ = fw.shutdown().await;
    };
    tokio::join!(forth, back);
}

/// More than any handshake of ours has in one direction. Of what is in front, some bytes are nobody's business: the version in
/// the header of a plaintext record.
const HANDSHAKE: usize = 3_000;

async fn harmed(lab: &Lab, pair: (Kind, Kind), seed: u64) {
    let mut dice = Dice::new(seed);
    // rustls as it is asserts in debug builds when it is asked again after a forgery: it only says, and ours listens.
    let up = dice.roll(2) == 0 && pair.1 != Kind::Reference || pair.0 == Kind::Reference;
    let at = if dice.roll(8) == 0 { dice.roll(HANDSHAKE) } else { HANDSHAKE + dice.roll(30_000) };
    let harm = match dice.roll(5) {
        0 => Harm::Flip(dice.roll(8) as u8),
        1 => Harm::Drop(1 + dice.roll(2_000)),
        // At the very beginning there is nothing to repeat.
        2 if at > HANDSHAKE => Harm::Replay(1 + dice.roll(2_000)),
        3 => Harm::Insert(1 + dice.roll(30)),
        _ => Harm::Cut,
    };
    let script = |bytes: Vec<u8>| Script {
        pieces: vec![bytes.len()],
        bytes,
        pauses: false,
        ear: Ear::Eager,
        resets: None,
        ends_last: false,
    };
    // Long enough that the harm is done in front of its end.
    let (long, short) = (script(pattern(50_000 + dice.roll(40_000), seed)), script(b"short".to_vec()));
    let (client, service) = if up { (&long, &short) } else { (&short, &long) };
    let ((a, near), (far, b)) = (connected().await, connected().await);
    let middle = tokio::spawn(if up { tamper(near, far, at, harm) } else { tamper(far, near, at, harm) });
    let seen = stream((client, service), pair.0.dial(lab, a), pair.1.answer(lab, b));
    let what = format!("seed {seed}, {pair:?}, {harm:?} at {at}, up: {up}");
    let seen = timeout(PATIENCE, seen).await.unwrap_or_else(|_| panic!("{what} hangs"));
    let (heard, end) = if up { (&seen.service, &seen.dialled) } else { (&seen.client, &seen.dialler) };
    assert!(long.bytes.starts_with(&heard.0), "{what}: other bytes than were sent");
    if heard.1 || end.is_ok() {
        assert!(at < HANDSHAKE && heard.1 && heard.0 == long.bytes, "{what}: {} bytes, clean: {}", heard.0.len(), heard.1);
    }
    middle.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_changed_on_the_wire_is_never_delivered_and_never_a_clean_end() {
    for_all(|lab, pair, seed| async move { harmed(&lab, pair, seed).await }).await;
}
