//! Tunnels that carry one connection after another: who may use one again, and what happens when it is not as it was.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use meshd_ca::identity::Workload;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use super::lab::{B, Lab, Node, Options, failures, lab, lab_with, soon};
use super::{PATIENCE, all, echo, middleman, reset};
use crate::identity::tls::server_name;
use crate::intercept::socket::{Finish, finish};
use crate::proxy::live::{Cut, Limits};
use crate::proxy::tunnel::Tunnel;

/// One connection through `front` to a service that echoes.
async fn question(front: SocketAddr, words: &[u8]) {
    let mut app = TcpStream::connect(front).await.unwrap();
    app.write_all(words).await.unwrap();
    app.shutdown().await.unwrap();
    assert_eq!(all(&mut app).await, words);
}

/// So many connections through `front` at once, each answered before any ends.
async fn crowd(front: SocketAddr, many: u8) {
    let mut open = Vec::new();
    for n in 0..many {
        let mut app = TcpStream::connect(front).await.unwrap();
        app.write_all(&[n]).await.unwrap();
        assert_eq!(app.read_u8().await.unwrap(), n);
        open.push(app);
    }
    for mut app in open {
        app.shutdown().await.unwrap();
        all(&mut app).await;
    }
}

async fn rested(node: &Node, tunnels: usize) {
    soon("tunnels at rest", || node.proxy.pool.count() == tunnels).await;
}

fn no_failure(lab: &Lab) {
    for edge in lab.a.edges().iter().chain(&lab.b.edges()) {
        assert_eq!(edge.failed(), 0, "{edge:?}");
    }
}

#[tokio::test]
async fn one_tunnel_carries_one_connection_after_another() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    for n in 0..50u8 {
        question(front, &[n; 100]).await;
        rested(&lab.a, 1).await;
    }
    assert_eq!(lab.a.proxy.pool.reused(), 49);
    soon("all counted", || lab.b.edges()[0].figures.clean == 50).await;
    let edges = [lab.a.edges(), lab.b.edges()];
    assert!(edges.iter().all(|e| e.len() == 1 && e[0].total == 50 && e[0].figures.open == 0), "{edges:?}");
    assert_eq!((lab.a.proxy.live.count(), lab.b.proxy.live.count()), (0, 0));
    assert_eq!(lab.b.world.connected.lock().unwrap().len(), 50, "each is a connection of its own to the service");
    no_failure(&lab);
}

#[tokio::test]
async fn connections_at_once_have_tunnels_of_their_own_and_leave_them_to_the_next() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    for _ in 0..3 {
        crowd(front, 10).await;
        rested(&lab.a, 10).await;
    }
    assert_eq!(lab.a.proxy.pool.reused(), 20);
    no_failure(&lab);
}

#[tokio::test]
async fn another_workload_and_another_service_have_other_tunnels() {
    let lab = lab().await;
    let ((one, at_one), (two, at_two)) = (lab.service().await, lab.service().await);
    tokio::spawn(echo(one));
    tokio::spawn(echo(two));
    question(lab.a.capture(at_one).await, b"x").await;
    rested(&lab.a, 1).await;
    question(lab.a.capture(at_two).await, b"x").await;
    rested(&lab.a, 2).await;
    *lab.a.world.owner.lock().unwrap() = Some(lab.a.unit("server"));
    question(lab.a.capture(at_one).await, b"x").await;
    rested(&lab.a, 3).await;
    assert_eq!(lab.a.proxy.pool.reused(), 0);
    let sources: Vec<_> = lab.b.edges().into_iter().map(|e| e.key.source.clone().unwrap().workload).collect();
    assert!(sources.contains(&lab.a.unit("client")) && sources.contains(&lab.a.unit("server")), "{sources:?}");
}

#[tokio::test]
async fn tunnels_at_rest_end_with_the_trust_in_the_peer() {
    let mut lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    question(front, b"x").await;
    rested(&lab.a, 1).await;
    // The dialler's side.
    assert_eq!(lab.a.proxy.cut(lab.b.id, Cut::Banished), 0, "no connection was open");
    rested(&lab.a, 0).await;
    question(front, b"x").await;
    rested(&lab.a, 1).await;
    // The other side: the tunnel is cut, and there will be no new one.
    lab.mesh.roster.banish(&lab.mesh.key, lab.a.id).unwrap();
    lab.b.trust.store(std::sync::Arc::new(lab.mesh.trust()));
    assert_eq!(lab.b.proxy.cut(lab.a.id, Cut::Banished), 1);
    let before = lab.b.world.connected.lock().unwrap().len();
    reset(&mut TcpStream::connect(front).await.unwrap()).await;
    assert_eq!(lab.b.world.connected.lock().unwrap().len(), before);
}

#[tokio::test]
async fn a_banished_peer_is_refused_on_a_tunnel_that_is_still_up() {
    let mut lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    question(front, b"x").await;
    rested(&lab.a, 1).await;
    // Trust is gone, the cut is still to come.
    lab.mesh.roster.banish(&lab.mesh.key, lab.a.id).unwrap();
    lab.b.trust.store(std::sync::Arc::new(lab.mesh.trust()));
    let mut app = TcpStream::connect(front).await.unwrap();
    let _ = app.write_all(b"still me").await;
    reset(&mut app).await;
    assert_eq!(lab.b.world.connected.lock().unwrap().len(), 1, "delivered for a banished member");
}

#[tokio::test]
async fn a_port_that_changed_hands_is_asked_for_again_and_nothing_fails() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    question(front, b"x").await;
    rested(&lab.a, 1).await;
    lab.b.world.listeners.lock().unwrap().insert(at.port(), lab.b.unit("other"));
    question(front, b"the same words, said once").await;
    assert_eq!(lab.a.proxy.pool.reused(), 1, "the old tunnel was asked");
    let shown: Vec<_> = lab.a.edges().into_iter().map(|e| e.key.destination.clone().unwrap().workload).collect();
    assert!(shown.contains(&Workload::Node(lab.b.id)), "the new owner has no SVID yet: {shown:?}");
    assert_eq!(lab.b.world.connected.lock().unwrap().len(), 2, "delivered twice");
    assert!(lab.a.edges().iter().all(|e| e.failed() == 0), "{:?}", lab.a.edges());
}

#[tokio::test]
async fn a_service_that_has_its_own_certificate_by_now_shows_it() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    // Nobody has seen yet who listens there: the node vouches for it.
    let owner = lab.b.world.listeners.lock().unwrap().remove(&at.port()).unwrap();
    question(front, b"x").await;
    rested(&lab.a, 1).await;
    soon("the other end rests", || lab.b.proxy.live.count() == 0).await;
    lab.b.world.listeners.lock().unwrap().insert(at.port(), owner.clone());
    question(front, b"the same words, said once").await;
    for edges in [lab.a.edges(), lab.b.edges()] {
        let shown: Vec<_> = edges.into_iter().map(|e| e.key.destination.clone().unwrap().workload).collect();
        assert!(shown.contains(&Workload::Node(lab.b.id)) && shown.contains(&owner), "{shown:?}");
    }
    assert_eq!(lab.b.world.connected.lock().unwrap().len(), 2, "delivered twice");
    no_failure(&lab);
}

#[tokio::test]
async fn what_is_used_again_and_again_has_a_tunnel_ahead_of_the_next_connection() {
    let lab = lab_with(Options { ahead: true, ..Options::default() }).await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    for _ in 0..2 {
        question(front, b"x").await;
        rested(&lab.a, 1).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(lab.a.proxy.pool.ahead(), 0, "it may be all there is to ask");
    for _ in 0..20 {
        question(front, b"x").await;
        soon("one ahead", || lab.a.proxy.pool.ahead() == 1 && lab.a.proxy.pool.count() == 2).await;
    }
    // Two at once, after the other side has waited for longer than a header may take.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let reused = lab.a.proxy.pool.reused();
    crowd(front, 2).await;
    assert_eq!(lab.a.proxy.pool.reused(), reused + 2, "the second had to wait for a handshake");
    // And there is another one ahead of a third.
    rested(&lab.a, 3).await;
    // Each connection came to the service once, and what was dialled ahead never.
    assert_eq!(lab.b.world.connected.lock().unwrap().len(), 24);
    soon("all at rest", || lab.a.proxy.live.count() + lab.b.proxy.live.count() == 0).await;
    no_failure(&lab);
}

/// One that is gone before it is looked at: the process that dialled it was replaced, say.
#[tokio::test]
async fn a_tunnel_that_ends_before_its_first_connection_is_no_failure() {
    let lab = lab().await;
    let (_service, at) = lab.service().await;
    let svid = lab.a.svids.own().unwrap();
    for reset in [true, false] {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(lab.a.ip, 0)).unwrap();
        let wire = socket.connect(lab.b.mesh).await.unwrap();
        wire.set_nodelay(true).unwrap();
        let name = server_name(at.port().try_into().unwrap());
        let mut tunnel = Tunnel::dial(wire, svid.client().clone(), name).await.unwrap();
        // Nobody else has a turn until it is gone.
        tunnel.settle().await.unwrap();
        if reset {
            finish(tunnel.wire(), Finish::Reset).unwrap();
        }
        drop(tunnel);
    }
    sleep(Duration::from_millis(300)).await;
    no_failure(&lab);
}

#[tokio::test]
async fn nothing_is_dialled_ahead_toward_a_member_that_is_about_to_go() {
    let lab = lab_with(Options { ahead: true, ..Options::default() }).await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    lab.a.world.members.lock().unwrap().get_mut(&B).unwrap().restarting = true;
    for _ in 0..6 {
        question(front, b"x").await;
        rested(&lab.a, 1).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((lab.a.proxy.pool.ahead(), lab.a.proxy.pool.count()), (0, 1));
    no_failure(&lab);
}

#[tokio::test]
async fn a_renewed_certificate_ends_the_tunnels_of_the_old_one() {
    let lab = lab_with(Options { lifetime: Duration::from_secs(2), ..Options::default() }).await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    let issued = || lab.a.issuance.issued.load(Ordering::Relaxed) + lab.b.issuance.issued.load(Ordering::Relaxed);
    let begin = issued();
    let mut connections = 0;
    while issued() < begin + 24 {
        question(front, b"x").await;
        connections += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let fresh = connections - lab.a.proxy.pool.reused();
    assert!(fresh >= 2 && lab.a.proxy.pool.reused() > fresh, "{fresh} of {connections}");
    no_failure(&lab);
}

/// A second stream in a tunnel whose wire is cut once the service has it: nobody knows what the service did with it.
#[tokio::test]
async fn what_may_have_been_delivered_is_not_said_again() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    let (via, cut) = middleman(lab.b.mesh).await;
    lab.a.knows(B, lab.b.id, via.port());
    let front = lab.a.capture(at).await;
    let serve = async |listener: &TcpListener| listener.accept().await.unwrap().0;
    let mut app = TcpStream::connect(front).await.unwrap();
    app.write_all(b"POST /one").await.unwrap();
    app.shutdown().await.unwrap();
    let mut service = serve(&listener).await;
    assert_eq!(all(&mut service).await, b"POST /one");
    drop(service);
    all(&mut app).await;
    rested(&lab.a, 1).await;
    let mut app = TcpStream::connect(front).await.unwrap();
    app.write_all(b"POST /two").await.unwrap();
    let mut service = serve(&listener).await;
    service.read_exact(&mut [0; 9]).await.unwrap();
    cut.notify_one();
    assert_eq!(reset(&mut app).await, b"");
    assert_eq!(reset(&mut service).await, b"");
    assert_eq!(lab.a.proxy.pool.reused(), 1);
    assert!(timeout(Duration::from_millis(300), listener.accept()).await.is_err(), "said twice");
    assert!(lab.a.edges().iter().any(|e| failures(e, "tunnel-broken") == 1), "{:?}", lab.a.edges());
}

#[tokio::test]
async fn a_tunnel_that_its_peer_closed_meanwhile_is_not_used() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let (via, cut) = middleman(lab.b.mesh).await;
    lab.a.knows(B, lab.b.id, via.port());
    let front = lab.a.capture(at).await;
    question(front, b"x").await;
    rested(&lab.a, 1).await;
    cut.notify_one();
    soon("the end has arrived", || {
        lab.a.proxy.pool.sweep(Instant::now());
        lab.a.proxy.pool.count() == 0
    })
    .await;
    lab.a.knows(B, lab.b.id, lab.b.mesh.port());
    question(front, b"y").await;
    assert_eq!(lab.a.proxy.pool.reused(), 0);
    no_failure(&lab);
}

#[tokio::test]
async fn tunnels_at_rest_take_no_place_from_connections() {
    let limits = Limits { all: 4, resting: 2, ..Limits::default() };
    let lab = lab_with(Options { limits, ..Options::default() }).await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    for _ in 0..3 {
        // As many at once as there may be, and hardly any of their tunnels can rest.
        crowd(front, 4).await;
        soon("all at rest or gone", || lab.a.proxy.live.count() + lab.b.proxy.live.count() == 0).await;
        assert!(lab.a.proxy.pool.count() <= 2);
    }
    assert_eq!((lab.a.proxy.live.overloads(), lab.b.proxy.live.overloads()), (0, 0));
    no_failure(&lab);
}

#[tokio::test]
async fn tunnels_at_rest_do_not_hold_up_a_drain() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    question(front, b"x").await;
    rested(&lab.a, 1).await;
    let (a, b) = (&lab.a.proxy, &lab.b.proxy);
    let both = async { tokio::join!(a.drain(PATIENCE), b.drain(PATIENCE)) };
    assert_eq!(timeout(Duration::from_secs(3), both).await.expect("a drain that waits for nobody"), (0, 0));
    assert_eq!(lab.a.proxy.pool.count(), 0);
}

#[tokio::test]
async fn a_peer_that_is_gone_is_noticed_by_a_side_that_only_sends_or_only_receives() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    let front = lab.a.capture(at).await;
    // The application has said everything and waits for an answer when it dies.
    let mut app = TcpStream::connect(front).await.unwrap();
    app.write_all(b"question").await.unwrap();
    app.shutdown().await.unwrap();
    let (mut service, _) = listener.accept().await.unwrap();
    assert_eq!(all(&mut service).await, b"question");
    super::super::socket::application(&app, Duration::from_secs(9)).unwrap();
    drop(app);
    let told = timeout(PATIENCE, service.ready(tokio::io::Interest::ERROR)).await;
    told.expect("the service is told before it says a word").unwrap();
    assert!(service.take_error().unwrap().is_some());
}

#[tokio::test]
async fn a_tunnel_that_is_watched_at_rest_is_as_before_in_use() {
    let lab = lab().await;
    let (listener, at) = lab.service().await;
    tokio::spawn(echo(listener));
    let front = lab.a.capture(at).await;
    question(front, b"x").await;
    rested(&lab.a, 1).await;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    lab.a.proxy.pool.sweep(Instant::now());
    question(front, b"y").await;
    rested(&lab.a, 1).await;
    assert_eq!(lab.a.proxy.pool.reused(), 1);
}
