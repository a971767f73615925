//! The life of connections between two nodes, end to end, without privileges: only the kernel's part is played.

mod differential;
mod lab;
mod reference;
mod reuse;
mod stalled;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use meshd_ca::identity::Workload;
use meshd_ca::keys::PrivateKey;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Member;
use super::edges::Direction;
use super::header::{Header, Refusal, Verdict};
use super::live::{Cut, Limits};
use crate::identity::tls::server_name;
use lab::{A, B, Lab, Node, Options, failures, lab, lab_with, soon};

/// More than an emulated processor needs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Reads to the end, which must be a clean one.
async fn all(s: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut v = Vec::new();
    timeout(PATIENCE, s.read_to_end(&mut v)).await.expect("an end in time").expect("a clean end");
    v
}

/// Reads to the end, which must be a reset; what came before it.
async fn reset(s: &mut TcpStream) -> Vec<u8> {
    let mut v = Vec::new();
    let e = timeout(PATIENCE, s.read_to_end(&mut v)).await.expect("an end in time").expect_err("a reset, not a clean end");
    assert_eq!(e.kind(), ErrorKind::ConnectionReset);
    v
}

async fn echo(listener: TcpListener) {
    loop {
        let (mut s, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            let (mut r, mut w) = s.split();
            let _ = tokio::io::copy(&mut r, &mut w).await;
            let _ = w.shutdown().await;
        });
    }
}

fn pattern(n: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..n).map(|_| next()).collect()
}

/// A peer that speaks the protocol by hand.
async fn by_hand(from: &Node, to: &Node, sni: u16) -> TlsStream<TcpStream> {
    let svid = from.svids.own().unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(from.ip, 0)).unwrap();
    let tcp = socket.connect(to.mesh).await.unwrap();
    let mut config = (**svid.client()).clone();
    config.alpn_protocols = vec![crate::identity::tls::ALPN_DATA.to_vec()];
    TlsConnector::from(Arc::new(config)).connect(server_name(sni.try_into().unwrap()), tcp).await.unwrap()
}

fn ask(port: u16) -> Header {
    Header { port: NonZeroU16::new(port).unwrap(), address: None, client: None, low_port: false }
}

async fn verdict(s: &mut TlsStream<TcpStream>) -> Verdict {
    Verdict::decode(timeout(PATIENCE, s.read_u8()).await.unwrap().unwrap())
}

#[tokio::test]
async fn echo_with_both_identities_on_both_edges() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    let mut app = lab.a.dial(at).await;
    app.write_all(b"hello").await.unwrap();
    let (mut service, client) = listener.accept().await.unwrap();
    assert_eq!(client.ip(), A, "the service sees the client's address");
    let mut got = [0; 5];
    service.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"hello");
    service.write_all(b"hello yourself").await.unwrap();
    drop(service);
    assert_eq!(all(&mut app).await, b"hello yourself");
    drop(app);
    soon("both edges closed", || [&lab.a, &lab.b].iter().all(|n| n.edges().len() == 1 && n.edges()[0].figures.open == 0)).await;
    let domain = lab.mesh.roster.trust_domain().clone();
    let id = |w| Some(meshd_ca::identity::SpiffeId::new(domain.clone(), w));
    for (node, other, direction, bytes) in
        [(&lab.a, &lab.b, Direction::Outbound, (14, 5)), (&lab.b, &lab.a, Direction::Inbound, (5, 14))]
    {
        let e = &node.edges()[0];
        assert_eq!((e.key.direction, e.key.address, e.key.port, e.peer), (direction, other.ip, at.port(), Some(other.id)));
        assert_eq!((&e.key.source, &e.key.destination), (&id(lab.a.unit("client")), &id(lab.b.unit("server"))));
        assert_eq!((e.secured, e.reason, e.figures.open, e.total, e.failed()), (true, None, 0, 1, 0));
        assert_eq!((e.figures.bytes_in, e.figures.bytes_out), bytes);
    }
    assert_eq!((lab.a.proxy.live.count(), lab.b.proxy.live.count()), (0, 0));
}

#[tokio::test]
async fn a_server_that_speaks_first_is_not_waited_for() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    let mut app = lab.a.dial(at).await;
    let (mut service, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    service.write_all(b"220 ready\r\n").await.unwrap();
    let mut banner = [0; 11];
    timeout(PATIENCE, app.read_exact(&mut banner)).await.unwrap().unwrap();
    assert_eq!(&banner, b"220 ready\r\n");
}

#[tokio::test]
async fn half_close_is_kept_in_both_directions() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    // The client has said everything; the answer is long and late.
    let mut app = lab.a.dial(at).await;
    app.write_all(b"question").await.unwrap();
    app.shutdown().await.unwrap();
    let (mut service, _) = listener.accept().await.unwrap();
    assert_eq!(all(&mut service).await, b"question");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let answer = pattern(3 << 20, 7);
    let (sent, received) = tokio::join!(
        async {
            service.write_all(&answer).await.unwrap();
            drop(service);
        },
        all(&mut app)
    );
    let () = sent;
    assert!(received == answer);
    // The service has said everything; the client goes on.
    let mut app = lab.a.dial(at).await;
    let (mut service, _) = listener.accept().await.unwrap();
    service.shutdown().await.unwrap();
    assert_eq!(all(&mut app).await, b"");
    app.write_all(b"late").await.unwrap();
    app.shutdown().await.unwrap();
    assert_eq!(all(&mut service).await, b"late");
    soon("no failure", || lab.a.edges().iter().all(|e| e.figures.open == 0 && e.failed() == 0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn big_transfers_in_both_directions_at_once_arrive_unchanged() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    let (up, down) = (pattern(24 << 20, 1), pattern(24 << 20, 2));
    let app = lab.a.dial(at).await;
    let (service, _) = listener.accept().await.unwrap();
    let transfer = async |s: TcpStream, bytes: &[u8]| {
        let (mut r, mut w) = s.into_split();
        let write = async {
            // Pieces of all sizes, so that buffers are hit at every offset.
            let mut rest = bytes;
            let mut n = 1;
            while !rest.is_empty() {
                let (now, later) = rest.split_at(n.min(rest.len()));
                w.write_all(now).await.unwrap();
                rest = later;
                n = (n * 7 + 3) % 200_000 + 1;
            }
            w.shutdown().await.unwrap();
        };
        tokio::join!(write, all(&mut r)).1
    };
    let (at_app, at_service) = tokio::join!(transfer(app, &up), transfer(service, &down));
    assert!(at_service == up && at_app == down);
    soon("counted", || lab.a.edges()[0].figures.bytes_out == 24 << 20 && lab.a.edges()[0].figures.bytes_in == 24 << 20).await;
}

#[tokio::test]
async fn a_closed_port_is_a_reset_and_the_kernel_learns_of_it() {
    let lab = lab().await;
    let at = lab.service().await.1; // the listener is gone again
    let mut app = lab.a.dial(at).await;
    app.write_all(b"anyone?").await.ok();
    assert_eq!(reset(&mut app).await, b"");
    assert_eq!(*lab.a.world.refused.lock().unwrap(), [at]);
    let e = &lab.a.edges()[0];
    assert_eq!((e.secured, e.reason, e.failed()), (true, Some("refused-closed"), 1));
    soon("the other side", || lab.b.edges()[0].reason == Some("refused-closed")).await;
}

#[tokio::test]
async fn a_server_killed_in_mid_stream_is_a_reset_after_what_it_said() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    let mut app = lab.a.dial(at).await;
    let (mut service, _) = listener.accept().await.unwrap();
    service.write_all(b"half an ans").await.unwrap();
    let mut got = [0; 11];
    app.read_exact(&mut got).await.unwrap();
    super::socket::application(&service, Duration::from_secs(9)).unwrap();
    drop(service);
    assert_eq!(reset(&mut app).await, b"");
    assert_eq!(lab.a.edges()[0].reason, Some("tunnel-broken"));
    soon("the cause at its own end", || lab.b.edges()[0].reason == Some("application-reset")).await;
}

#[tokio::test]
async fn an_application_that_dies_is_a_reset_at_the_service() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    let mut app = lab.a.dial(at).await;
    app.write_all(b"begun").await.unwrap();
    let (mut service, _) = listener.accept().await.unwrap();
    let mut got = [0; 5];
    service.read_exact(&mut got).await.unwrap();
    super::socket::application(&app, Duration::from_secs(9)).unwrap();
    drop(app);
    assert_eq!(reset(&mut service).await, b"");
}

#[tokio::test]
async fn urgent_bytes_are_bytes_and_hold_nothing_up() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    let mut app = lab.a.dial(at).await;
    app.write_all(b"first").await.unwrap();
    let (mut service, _) = listener.accept().await.unwrap();
    let mut got = [0; 5];
    service.read_exact(&mut got).await.unwrap();
    for outward in [true, false] {
        let (from, to) = if outward { (&app, &mut service) } else { (&service, &mut app) };
        let from = SockRef::from(from);
        from.send(b"abc").unwrap();
        from.send_out_of_band(b"!").unwrap();
        from.send(b"and the rest").unwrap();
        let mut got = [0; 16];
        to.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"abc!and the rest");
    }
}

#[tokio::test]
async fn who_does_not_read_for_long_is_waited_for() {
    // Silence of a second and six probes: whoever is gone is given up after seven.
    let lab = lab_with(Options { keepalive: Duration::from_secs(1), ..Options::default() }).await;
    let looks = [&lab.a, &lab.b].map(|node| tokio::spawn(node.proxy.clone().look_after()));
    let (listener, at) = lab.service().await;
    let mut app = lab.a.dial(at).await;
    app.write_all(b"all of it").await.unwrap();
    let (mut service, _) = listener.accept().await.unwrap();
    let mut asked = [0; 9];
    service.read_exact(&mut asked).await.unwrap();
    const MUCH: usize = 64 << 20;
    let answer = tokio::spawn(async move {
        service.write_all(&vec![7; MUCH]).await.unwrap();
        service
    });
    tokio::time::sleep(Duration::from_secs(15)).await;
    let mut got = vec![0; MUCH];
    app.read_exact(&mut got).await.unwrap();
    assert!(got.iter().all(|b| *b == 7));
    answer.await.unwrap();
    assert!(lab.a.edges().iter().chain(&lab.b.edges()).all(|e| e.failed() == 0));
    looks.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Passes bytes on between whoever connects and `to`, until told to end both sides with a FIN.
async fn middleman(to: SocketAddr) -> (SocketAddr, Arc<tokio::sync::Notify>) {
    let listener = TcpListener::bind(SocketAddr::new(to.ip(), 0)).await.unwrap();
    let (at, cut) = (listener.local_addr().unwrap(), Arc::new(tokio::sync::Notify::new()));
    let told = cut.clone();
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(to).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            () = told.notified() => {}
        }
        let _ = (near.shutdown().await, far.shutdown().await);
        tokio::time::sleep(Duration::from_secs(60)).await;
    });
    (at, cut)
}

#[tokio::test]
async fn a_fin_without_close_notify_is_a_reset_at_both_ends() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    let (via, cut) = middleman(lab.b.mesh).await;
    lab.a.knows(B, lab.b.id, via.port());
    let mut app = lab.a.dial(at).await;
    let (mut service, _) = listener.accept().await.unwrap();
    service.write_all(b"so far").await.unwrap();
    app.read_exact(&mut [0; 6]).await.unwrap();
    cut.notify_one();
    assert_eq!(reset(&mut app).await, b"");
    assert_eq!(reset(&mut service).await, b"");
}

#[tokio::test]
async fn garbage_and_silence_on_the_mesh_port_harm_nobody() {
    let lab = lab_with(Options { header: Duration::from_millis(500), ..Options::default() }).await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    for garbage in
        [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 9000], pattern(9000, 3), [&[22, 3, 1, 0x3f, 0xff][..], &[7; 9000]].concat()]
    {
        let mut s = TcpStream::connect(lab.b.mesh).await.unwrap();
        let _ = s.write_all(&garbage).await;
        let _ = s.shutdown().await;
        let mut v = Vec::new();
        let _ = timeout(PATIENCE, s.read_to_end(&mut v)).await.expect("an end in time");
    }
    assert_eq!(lab.b.handshakes_failed.load(Ordering::Relaxed), 4);
    let port = at.port();
    // A member that is broken: each gets its answer, none reaches the service.
    for (bytes, answer) in [
        (&[0, 0][..], Some(Refusal::Malformed)),
        (&[0xff, 0xff, 1, 2], Some(Refusal::Malformed)),
        (&[0, 4, 1, 2, 0, 0], Some(Refusal::Malformed)),
        (&[0, 2, 200, 0], Some(Refusal::Malformed)),
        (&[0], None),
        (&[0, 30, 1, 2, 0, 80], None),
        (&[], None),
    ] {
        let mut s = by_hand(&lab.a, &lab.b, port).await;
        s.write_all(bytes).await.unwrap();
        s.flush().await.unwrap();
        match answer {
            Some(why) => {
                assert_eq!(verdict(&mut s).await, Verdict::Refused(why));
                assert_eq!(all(&mut s).await, b"");
            }
            // Slow or silent: out after the deadline, without a clean end.
            None => assert!(timeout(PATIENCE, s.read_u8()).await.unwrap().is_err()),
        }
    }
    // Drop by drop does not buy time either: the deadline is for the whole header.
    let mut s = by_hand(&lab.a, &lab.b, port).await;
    let drip = async {
        for b in [2, 0].into_iter().chain(std::iter::repeat(9)) {
            if s.write_all(&[b]).await.is_err() || s.flush().await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, drip).await.expect("cut off");
    assert!(lab.b.world.connected.lock().unwrap().is_empty());
    soon("all gone", || lab.b.proxy.live.count() == 0).await;
    let mut app = lab.a.dial(at).await;
    app.write_all(b"still here").await.unwrap();
    app.shutdown().await.unwrap();
    assert_eq!(all(&mut app).await, b"still here");
}

#[tokio::test]
async fn what_must_not_be_asked_for_is_refused_inside_the_tunnel() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let (port, mesh) = (at.port(), lab.b.mesh.port());
    let mut elsewhere = ask(port);
    elsewhere.address = Some(A);
    for (sni, header, why) in [
        (mesh, ask(mesh), Refusal::NotServed),
        (1, ask(1), Refusal::NotServed),
        (2, ask(2), Refusal::NotServed),
        (port, elsewhere, Refusal::NotServed),
        (port, ask(port ^ 1), Refusal::IdentityChanged),
    ] {
        let mut s = by_hand(&lab.a, &lab.b, sni).await;
        s.write_all(&header.encode()).await.unwrap();
        s.write_all(b"and some bytes that nobody will read").await.unwrap();
        s.flush().await.unwrap();
        assert_eq!(verdict(&mut s).await, Verdict::Refused(why), "{header:?}");
        assert_eq!(all(&mut s).await, b"");
    }
    assert!(lab.b.world.connected.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_port_that_changed_hands_after_the_handshake_is_refused() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let owner = |w: Workload| lab.b.world.listeners.lock().unwrap().insert(at.port(), w);
    let mut s = by_hand(&lab.a, &lab.b, at.port()).await;
    assert_eq!(lab.a.verifier.peer(s.get_ref().1).unwrap().id.workload, lab.b.unit("server"));
    owner(lab.b.unit("other"));
    s.write_all(&ask(at.port()).encode()).await.unwrap();
    s.flush().await.unwrap();
    assert_eq!(verdict(&mut s).await, Verdict::Refused(Refusal::IdentityChanged));
    // The next one is shown the node's own SVID (the new owner has none yet), which vouches for all its workloads.
    let mut app = lab.a.dial(at).await;
    app.write_all(b"x").await.unwrap();
    app.shutdown().await.unwrap();
    assert_eq!(all(&mut app).await, b"x");
}

#[tokio::test]
async fn low_client_ports_stay_low_and_others_are_the_kernels() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    for (low_port, hint, asked) in [(true, 700, 700), (true, 40_000, 1023), (true, 0, 1), (false, 700, 0)] {
        let client = Some(SocketAddr::new(A, hint));
        let mut s = by_hand(&lab.a, &lab.b, at.port()).await;
        s.write_all(&Header { client, low_port, ..ask(at.port()) }.encode()).await.unwrap();
        s.write_all(b"x").await.unwrap();
        s.flush().await.unwrap();
        assert_eq!(verdict(&mut s).await, Verdict::Accepted);
        let (client, service) = lab.b.world.connected.lock().unwrap().pop().unwrap();
        assert_eq!((client, service), (SocketAddr::new(A, asked), at));
    }
}

#[tokio::test]
async fn another_member_at_the_address_is_a_reset_before_a_byte_was_said() {
    let mut lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let stranger = PrivateKey::generate().unwrap();
    lab.mesh.admit(&stranger, "c");
    lab.a.knows(B, stranger.public().node_id(), lab.b.mesh.port());
    let mut app = lab.a.dial(at).await;
    app.write_all(b"secret").await.unwrap();
    assert_eq!(reset(&mut app).await, b"");
    let e = &lab.a.edges()[0];
    assert_eq!((e.secured, e.reason), (false, Some("wrong-peer")));
    assert!(lab.b.world.connected.lock().unwrap().is_empty());
    assert!(lab.a.world.refused.lock().unwrap().is_empty());
}

#[tokio::test]
async fn nobody_and_no_mesh_at_the_address_are_resets() {
    let lab = lab().await;
    let mut app = lab.a.dial("127.0.1.9:80".parse().unwrap()).await;
    reset(&mut app).await;
    // Something listens that is no meshd, and answers in plaintext.
    let plain = TcpListener::bind(SocketAddr::new(B, 0)).await.unwrap();
    lab.a.knows(B, lab.b.id, plain.local_addr().unwrap().port());
    tokio::spawn(echo(plain));
    let mut app = lab.a.dial(SocketAddr::new(B, 80)).await;
    app.write_all(b"secret").await.unwrap();
    assert_eq!(reset(&mut app).await, b"");
    let reasons: Vec<_> = lab.a.edges().iter().map(|e| (e.secured, e.reason.unwrap())).collect();
    assert_eq!(reasons.len(), 2);
    assert!(reasons.contains(&(false, "no-member")) && reasons.contains(&(false, "handshake")), "{reasons:?}");
}

#[tokio::test]
async fn whoever_dials_the_capture_port_himself_gets_a_reset() {
    let lab = lab().await;
    for to in ["127.0.0.1:6375".parse().unwrap(), SocketAddr::new(A, 80), SocketAddr::new(B, lab.a.mesh.port())] {
        reset(&mut lab.a.dial(to).await).await;
    }
    assert!(lab.a.edges().is_empty());
}

#[tokio::test]
async fn a_banished_peer_is_cut_at_once_and_stays_out() {
    let mut lab = lab().await;
    let (listener, at) = lab.service().await;
    let mut app = lab.a.dial(at).await;
    app.write_all(b"x").await.unwrap();
    let (mut service, _) = listener.accept().await.unwrap();
    service.read_u8().await.unwrap();
    let idle = by_hand(&lab.a, &lab.b, at.port()).await;
    soon("both there", || lab.b.proxy.live.count() == 2).await;

    lab.mesh.roster.banish(&lab.mesh.key, lab.a.id).unwrap();
    lab.b.trust.store(Arc::new(lab.mesh.trust()));
    assert_eq!(lab.b.proxy.live.cut(lab.a.id, Cut::Banished), 2);
    assert_eq!(reset(&mut service).await, b"");
    reset(&mut app).await;
    let (mut idle, why) = (idle, lab.b.edges().iter().map(|e| e.reason).collect::<Vec<_>>());
    assert!(timeout(PATIENCE, idle.read_u8()).await.unwrap().is_err());
    soon("gone", || lab.b.proxy.live.count() == 0).await;
    assert!(why.contains(&Some("cut-banished")), "{why:?}");

    let mut app = lab.a.dial(at).await;
    reset(&mut app).await;
    let e = &lab.a.edges()[0];
    assert!(!e.secured && failures(e, "handshake") > 0, "{e:?}");
    assert_eq!(lab.b.handshakes_failed.load(Ordering::Relaxed), 1);
    // The other direction: what B still believes to be A's address.
    let mut app = lab.b.dial(SocketAddr::new(A, 80)).await;
    reset(&mut app).await;
    let edges = lab.b.edges();
    let out = edges.iter().find(|e| e.key.direction == Direction::Outbound).unwrap();
    assert_eq!((out.secured, out.reason), (false, Some("handshake")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewal_every_second_fails_no_connection() {
    let lab = lab_with(Options { lifetime: Duration::from_secs(2), ..Options::default() }).await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    let mut long = TcpStream::connect(front).await.unwrap();
    let begin = tokio::time::Instant::now();
    let mut done = 0;
    while begin.elapsed() < Duration::from_secs(8) {
        let each = (0..8).map(|_| async move {
            let mut app = TcpStream::connect(front).await.unwrap();
            app.write_all(b"ping").await.unwrap();
            app.shutdown().await.unwrap();
            assert_eq!(all(&mut app).await, b"ping");
        });
        let mut set: tokio::task::JoinSet<()> = each.collect();
        while let Some(r) = set.join_next().await {
            r.unwrap();
            done += 1;
        }
        long.write_all(b"p").await.unwrap();
        assert_eq!(long.read_u8().await.unwrap(), b'p');
    }
    assert!(done > 100, "{done}");
    for node in [&lab.a, &lab.b] {
        assert!(node.issuance.issued.load(Ordering::Relaxed) >= 3 * 5, "renewed again and again");
        assert_eq!(node.svids.fallbacks(), 0);
        assert!(node.edges().iter().all(|e| e.failed() == 0), "{:?}", node.edges());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_at_once() {
    crate::intercept::process::raise_file_limit().unwrap();
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    let mut set = tokio::task::JoinSet::new();
    for i in 0..1000u64 {
        set.spawn(async move {
            let mut app = TcpStream::connect(front).await.unwrap();
            let bytes = pattern(1000, i);
            app.write_all(&bytes).await.unwrap();
            let mut got = vec![0; 1000];
            app.read_exact(&mut got).await.unwrap();
            assert!(got == bytes);
            app
        });
    }
    let mut open = Vec::new();
    while let Some(app) = set.join_next().await {
        open.push(app.unwrap());
    }
    assert_eq!((lab.a.proxy.live.count(), lab.b.proxy.live.count()), (1000, 1000));
    assert_eq!((lab.a.edges()[0].figures.open, lab.b.edges()[0].figures.open), (1000, 1000));
    for mut app in open {
        app.shutdown().await.unwrap();
        assert_eq!(all(&mut app).await, b"");
    }
    soon("all ended", || lab.a.proxy.live.count() + lab.b.proxy.live.count() == 0).await;
    assert_eq!((lab.a.edges()[0].failed(), lab.b.edges()[0].failed()), (0, 0));
}

#[tokio::test]
async fn too_many_connections_of_a_peer_are_told_so() {
    let lab = lab_with(Options { limits: Limits { all: 10, per_peer: 2, ..Limits::default() }, ..Options::default() }).await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut s = by_hand(&lab.a, &lab.b, at.port()).await;
        s.write_all(&ask(at.port()).encode()).await.unwrap();
        s.write_all(b"x").await.unwrap();
        assert_eq!(verdict(&mut s).await, Verdict::Accepted);
        held.push(s);
    }
    let mut app = lab.a.dial(at).await;
    app.write_all(b"x").await.unwrap();
    reset(&mut app).await;
    assert_eq!(lab.a.edges()[0].reason, Some("refused-overload"));
    assert_eq!(lab.b.proxy.live.overloads(), 1);
    assert_eq!(lab.b.edges().iter().map(|e| failures(e, "overload")).sum::<u64>(), 1);
    held.clear();
    soon("room again", || lab.b.proxy.live.count() == 0).await;
    let mut app = lab.a.dial(at).await;
    app.shutdown().await.unwrap();
    assert_eq!(all(&mut app).await, b"");
}

#[tokio::test]
async fn a_panic_ends_one_connection_and_is_counted() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    let mut other = TcpStream::connect(front).await.unwrap();
    other.write_all(b"1").await.unwrap();
    other.read_u8().await.unwrap();
    lab.a.world.panics.store(true, Ordering::Relaxed);
    reset(&mut TcpStream::connect(front).await.unwrap()).await;
    lab.a.world.panics.store(false, Ordering::Relaxed);
    soon("counted", || lab.a.proxy.panics() == 1).await;
    other.write_all(b"2").await.unwrap();
    assert_eq!(other.read_u8().await.unwrap(), b'2');
    let mut next = TcpStream::connect(front).await.unwrap();
    next.shutdown().await.unwrap();
    assert_eq!(all(&mut next).await, b"");
    assert_eq!(lab.a.proxy.panics(), 1);
}

#[tokio::test]
async fn connections_to_a_member_that_restarts_are_held_for_a_moment() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let gone = TcpListener::bind(SocketAddr::new(B, 0)).await.unwrap().local_addr().unwrap().port();
    let member = |port, restarting| Member { node: lab.b.id, port, restarting };
    let become_ = |m| lab.a.world.members.lock().unwrap().insert(B, m);
    become_(member(gone, true));
    let mut app = lab.a.dial(at).await;
    app.write_all(b"patience").await.unwrap();
    app.shutdown().await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    become_(member(lab.b.mesh.port(), false));
    assert_eq!(all(&mut app).await, b"patience");
    // One that does not come back in time, and one that never said it would.
    for (restarting, least, most) in [(true, 1.8, 5.0), (false, 0.0, 1.0)] {
        become_(member(gone, restarting));
        let begin = tokio::time::Instant::now();
        reset(&mut lab.a.dial(at).await).await;
        let took = begin.elapsed().as_secs_f64();
        assert!((least..most).contains(&took), "{restarting}: {took}");
    }
    assert!(lab.a.edges().iter().any(|e| failures(e, "unreachable") == 2), "{:?}", lab.a.edges());
}

#[tokio::test]
async fn drain_lets_connections_end_and_resets_the_rest() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    let mut apps = Vec::new();
    for _ in 0..2 {
        let mut app = TcpStream::connect(front).await.unwrap();
        app.write_all(b"x").await.unwrap();
        app.read_u8().await.unwrap();
        apps.push(app);
    }
    let (mut stays, mut ends) = (apps.pop().unwrap(), apps.pop().unwrap());
    let proxy = lab.a.proxy.clone();
    let drain = tokio::spawn(async move { proxy.live.drain(Duration::from_secs(1)).await });
    soon("no longer accepting", || std::net::TcpStream::connect(front).is_err()).await;
    ends.write_all(b"bye").await.unwrap();
    ends.shutdown().await.unwrap();
    assert_eq!(all(&mut ends).await, b"bye");
    assert_eq!(reset(&mut stays).await, b"");
    assert_eq!(drain.await.unwrap(), 1);
    // A peer that did not hear of it is told.
    lab.b.proxy.live.drain(Duration::ZERO).await;
    let mut s = by_hand(&lab.a, &lab.b, at.port()).await;
    assert_eq!(verdict(&mut s).await, Verdict::Refused(Refusal::Draining));
}

#[tokio::test]
async fn an_unknown_owner_speaks_as_the_node_and_no_certificate_is_a_reset() {
    let lab: Lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    *lab.a.world.owner.lock().unwrap() = None;
    let mut app = lab.a.dial(at).await;
    app.shutdown().await.unwrap();
    assert_eq!(all(&mut app).await, b"");
    assert_eq!(lab.b.edges()[0].key.source.as_ref().unwrap().workload, Workload::Node(lab.a.id));
    lab.a.issuance.down.store(true, Ordering::Relaxed);
    lab.mesh.clock.add(Duration::from_secs(80 * 3600));
    reset(&mut lab.a.dial(at).await).await;
    assert!(lab.a.edges().iter().any(|e| e.reason == Some("no-svid") && !e.secured));
}

/// What a connection keeps for as long as it lives, but for the kernel's part and what the allocator rounds up.
#[tokio::test]
async fn what_a_connection_keeps_is_small() {
    fn size<F>(_: impl FnOnce() -> F) -> usize {
        size_of::<F>()
    }
    fn never<T>() -> T {
        unreachable!("only its type counts")
    }
    let Lab { a, .. } = lab().await;
    let outbound = size(|| super::outbound::serve(a.proxy.clone(), never()));
    let inbound = size(|| super::inbound::serve(&a.proxy, never(), never()));
    let tunnel = size_of::<super::tunnel::Tunnel>();
    // The allocator's sizes are 896, 1,024, 1,280, 1,536 and so on. Around the first one there is a task, which takes 200 bytes more.
    assert!(outbound <= 1336 && inbound <= 1536 && tunnel <= 896, "outbound {outbound}, inbound {inbound}, tunnel {tunnel}");
}
