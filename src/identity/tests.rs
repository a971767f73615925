//! Handshakes and renewals against a real authority.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use meshd_ca::bundle::Root;
use meshd_ca::identity::Workload;
use meshd_ca::issue::Issuer;
use meshd_ca::keys::PrivateKey;
use meshd_ca::time::UnixTime;
use rustls::{ClientConnection, ConnectionCommon, HandshakeKind, ServerConnection, SideData};
use rustls_pki_types::CertificateDer;

use super::svids::{MAX_WORKLOADS, Patience, Svids};
use super::testing::{Mesh, issued, name};
use super::tls::{DataTls, NodeTls, server_name};
use super::verifier::{SvidVerifier, peer_key};
use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn unit(host: &str, unit: &str) -> Workload {
    Workload::Unit(name(host), unit.into())
}

/// Bytes back and forth until both are done or one refuses.
fn shake(c: &mut ClientConnection, s: &mut ServerConnection) -> Result<(), rustls::Error> {
    fn pass<A: SideData, B: SideData>(
        from: &mut ConnectionCommon<A>,
        to: &mut ConnectionCommon<B>,
    ) -> Result<bool, rustls::Error> {
        let mut bytes = Vec::new();
        while from.wants_write() {
            from.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            to.read_tls(&mut rest).unwrap();
            to.process_new_packets()?;
        }
        Ok(!bytes.is_empty())
    }
    while pass(c, s)? | pass(s, c)? {}
    Ok(())
}

#[tokio::test]
async fn svids_are_shown_by_port_believed_and_never_resumed() {
    let mut mesh = Mesh::found();
    let (ka, kb) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    mesh.admit(&ka, "a");
    mesh.admit(&kb, "b");
    let (a, b) = (ka.public().node_id(), kb.public().node_id());
    // One host has AES instructions, the other has not: the server without them decides.
    let ((_, va), (_, vb)) = (mesh.verifier(true), mesh.verifier(false));
    let sa = issued(a, &va, Arc::new(mesh.issuance(a, HOUR)), &[]).await;
    let sb = issued(b, &vb, Arc::new(mesh.issuance(b, HOUR)), &[unit("b", "nginx.service")]).await;
    let svid = sa.for_client(&unit("a", "curl.service")).await.unwrap();
    assert_eq!(svid.id().workload, unit("a", "curl.service"), "issued while the first connection waited");

    let data = DataTls { svids: sb, listeners: Arc::new(|at| (at.port() == 80).then(|| unit("b", "nginx.service"))) };
    let at = "10.0.0.2:6374".parse().unwrap();
    for (port, shown) in [(80, unit("b", "nginx.service")), (81, Workload::Node(b))] {
        let name = server_name(port.try_into().unwrap());
        let chosen = data.choose(at, Some(&name.to_str())).await.unwrap();
        assert_eq!((chosen.port.unwrap().get(), &chosen.shown.id().workload), (port, &shown));
        for _ in 0..2 {
            let mut c = ClientConnection::new(svid.client().clone(), name.clone()).unwrap();
            let mut s = ServerConnection::new(chosen.config.clone()).unwrap();
            shake(&mut c, &mut s).unwrap();
            let (to, from) = (va.peer(&c).unwrap(), vb.peer(&s).unwrap());
            assert_eq!((to.holder, &to.id.workload), (b, &shown));
            assert_eq!((from.holder, from.id.workload), (a, unit("a", "curl.service")));
            assert_eq!(c.handshake_kind(), Some(HandshakeKind::Full));
            let suite = c.negotiated_cipher_suite().unwrap().suite();
            assert_eq!(suite, rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256);
        }
    }
    assert_eq!(data.choose(at, Some("example.org")).await.unwrap().port, None);
}

#[tokio::test]
async fn what_was_believed_once_is_not_believed_for_ever() {
    let mut mesh = Mesh::found();
    let key = PrivateKey::generate().unwrap();
    mesh.admit(&key, "a");
    let a = key.public().node_id();
    let (trust, v) = mesh.verifier(true);
    let svids = issued(a, &v, Arc::new(mesh.issuance(a, HOUR)), &[]).await;
    let leaf = CertificateDer::from(svids.own().unwrap().leaf().der.clone());
    let chain = [leaf.clone()];
    assert!(v.identify(&chain).is_ok() && v.identify(&chain).is_ok());
    assert!(v.identify(&[]).is_err());
    assert!(v.identify(&[leaf.clone(), leaf]).is_err());
    mesh.roster.banish(&mesh.key, a).unwrap();
    trust.store(Arc::new(mesh.trust()));
    assert!(v.identify(&chain).is_err(), "banished");
    let mut mesh = Mesh::found();
    mesh.admit(&key, "a");
    trust.store(Arc::new(mesh.trust()));
    assert!(v.identify(&chain).is_err(), "another mesh");

    let (_, v) = mesh.verifier(true);
    let svids = issued(a, &v, Arc::new(mesh.issuance(a, Duration::from_secs(30))), &[]).await;
    let chain = [CertificateDer::from(svids.own().unwrap().leaf().der.clone())];
    assert!(v.identify(&chain).is_ok());
    mesh.clock.add(Duration::from_secs(40));
    assert!(v.identify(&chain).is_err(), "over");
}

#[tokio::test]
async fn a_good_certificate_of_another_time_says_what_time_it_is() {
    let mut mesh = Mesh::found();
    let (key, stranger) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    mesh.admit(&key, "a");
    let (a, begun) = (key.public().node_id(), mesh.clock.now());
    let (_, v) = mesh.verifier(true);
    // Issued a day later, by this mesh's root and by somebody else's.
    mesh.clock.add(24 * HOUR);
    let svids = issued(a, &v, Arc::new(mesh.issuance(a, HOUR)), &[]).await;
    let chain = [CertificateDer::from(svids.own().unwrap().leaf().der.clone())];
    let issued_at = mesh.clock.now();
    let id = svids.own().unwrap().id().clone();
    let year = Duration::from_secs(365 * 86_400);
    let forger = Issuer::create(&id.trust_domain, a, issued_at, year).unwrap();
    let forged = [CertificateDer::from(forger.issue(&id, stranger.public(), a, HOUR, issued_at).unwrap().der)];
    // A host whose clock is a day behind, and one whose clock is a day ahead.
    for (shows, heard) in [(begun, Some(Some(issued_at))), (issued_at + 24 * HOUR, Some(None))] {
        let (now, told) = (Arc::new(Mutex::new(shows)), Arc::new(Mutex::new(None)));
        let asked = now.clone();
        let trust = Arc::new(ArcSwap::from_pointee(mesh.trust()));
        let v = SvidVerifier::new(trust, Arc::new(move || *asked.lock().unwrap()), provider::provider(true));
        assert!(v.identify(&chain).is_err(), "nobody told us the time");
        let (set, tell) = (now.clone(), told.clone());
        let v = v.doubting(Arc::new(move |signed| {
            *tell.lock().unwrap() = Some(signed);
            *set.lock().unwrap() = issued_at;
        }));
        assert!(v.identify(&forged).is_err());
        assert_eq!(*told.lock().unwrap(), None, "a forged one says nothing");
        assert!(v.identify(&chain).is_ok(), "by the time that is right now");
        let told = told.lock().unwrap().map(|signed| signed.map(|s: UnixTime| s.distance(issued_at).as_secs() < 5));
        assert_eq!(told, heard.map(|h| h.map(|_| true)));
    }
}

#[test]
fn node_keys_are_proven_whatever_the_clock() {
    let crypto = provider::provider(true);
    let keys = [PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap()];
    let [a, b] = [0, 1].map(|i| NodeTls::new(&crypto, &keys[i]).unwrap());
    for (client, server, alpn) in
        [(&a.control_client, &b.control_server, tls::ALPN_CONTROL), (&a.join_client, &b.join_server, tls::ALPN_JOIN)]
    {
        let mut c = ClientConnection::new(client.clone(), NodeTls::server_name()).unwrap();
        let mut s = ServerConnection::new(server.clone()).unwrap();
        assert!(peer_key(&c).is_err());
        shake(&mut c, &mut s).unwrap();
        assert_eq!((peer_key(&c).unwrap(), peer_key(&s).unwrap()), (*keys[1].public(), *keys[0].public()));
        assert_eq!(c.alpn_protocol(), Some(alpn));
    }
    let mut c = ClientConnection::new(a.join_client.clone(), NodeTls::server_name()).unwrap();
    let mut s = ServerConnection::new(b.control_server.clone()).unwrap();
    assert!(shake(&mut c, &mut s).is_err(), "another protocol");
}

#[tokio::test]
async fn neither_end_takes_a_bare_node_key_for_an_svid() {
    let mut mesh = Mesh::found();
    let key = PrivateKey::generate().unwrap();
    mesh.admit(&key, "a");
    let a = key.public().node_id();
    let (_, v) = mesh.verifier(true);
    let svids = issued(a, &v, Arc::new(mesh.issuance(a, HOUR)), &[]).await;
    let own = svids.own().unwrap();
    let shown = tls::certified(meshd_ca::issue::node_certificate(&key).unwrap(), &key).unwrap();
    let (client, server) = (tls::data_client(&v, shown.clone()).unwrap(), tls::data_server(&v, shown).unwrap());
    for (c, s) in [(client, own.server().clone()), (own.client().clone(), server)] {
        let name = server_name(80.try_into().unwrap());
        let (mut c, mut s) = (ClientConnection::new(c, name).unwrap(), ServerConnection::new(s).unwrap());
        assert!(shake(&mut c, &mut s).is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn renewal_is_early_survives_an_outage_and_a_jump_of_the_clock() {
    let mut mesh = Mesh::found();
    let key = PrivateKey::generate().unwrap();
    mesh.admit(&key, "a");
    let a = key.public().node_id();
    let (_, v) = mesh.verifier(true);
    let issuance = Arc::new(mesh.issuance(a, 72 * HOUR));
    let svids = issued(a, &v, issuance.clone(), &[]).await;
    let held = &svids.held()[0];
    let wait = held.renew_at.since(mesh.clock.now()).as_secs_f64() / 3600.0;
    assert!((21.5..26.5).contains(&wait), "a third, give or take: {wait}");
    let first = svids.own().unwrap();

    issuance.down.store(true, Ordering::Relaxed);
    tokio::time::sleep(30 * HOUR).await;
    assert!(Arc::ptr_eq(&svids.own().unwrap(), &first), "the old one serves while no authority answers");
    let asked = issuance.asked.load(Ordering::Relaxed);
    assert!((20..=200).contains(&asked), "retried, but not hammered: {asked}");
    issuance.down.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(400)).await;
    let second = svids.own().unwrap();
    assert!(second.leaf().not_after > first.leaf().not_after && second.leaf().der != first.leaf().der);

    // Woken after a week: at once, without a long sleep that was started before.
    mesh.clock.add(7 * 24 * HOUR);
    assert!(svids.own().is_none());
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(svids.own().is_some());
}

#[tokio::test(start_paused = true)]
async fn lifetimes_of_seconds_never_leave_a_gap() {
    let mut mesh = Mesh::found();
    let key = PrivateKey::generate().unwrap();
    mesh.admit(&key, "a");
    let a = key.public().node_id();
    let (_, v) = mesh.verifier(true);
    let issuance = Arc::new(mesh.issuance(a, Duration::from_secs(2)));
    let svids = issued(a, &v, issuance.clone(), &[unit("a", "x")]).await;
    for _ in 0..600 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let own = svids.own().expect("always one that is good");
        assert!(v.identify(&[CertificateDer::from(own.leaf().der.clone())]).is_ok());
        assert_eq!(svids.for_listener(Some(&unit("a", "x"))).await.unwrap().id().workload, unit("a", "x"));
    }
    let n = issuance.issued.load(Ordering::Relaxed);
    assert!((40..=200).contains(&n), "two workloads, 30 s, about a second each: {n}");
    assert_eq!(svids.fallbacks(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_node_stands_in_and_idle_clients_are_forgotten() {
    let mut mesh = Mesh::found();
    let key = PrivateKey::generate().unwrap();
    mesh.admit(&key, "a");
    let a = key.public().node_id();
    let (_, v) = mesh.verifier(true);
    let issuance = Arc::new(mesh.issuance(a, 72 * HOUR));
    let svids = issued(a, &v, issuance.clone(), &[]).await;
    // The authority grants no such name.
    let refused = Workload::Service("db".into());
    for n in 1..=2 {
        assert_eq!(svids.for_client(&refused).await.unwrap().id().workload, Workload::Node(a));
        assert_eq!(svids.fallbacks(), n);
    }
    issuance.down.store(true, Ordering::Relaxed);
    assert_eq!(svids.for_client(&unit("a", "late")).await.unwrap().id().workload, Workload::Node(a));
    issuance.down.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(svids.for_client(&unit("a", "late")).await.unwrap().id().workload, unit("a", "late"));
    assert_eq!(svids.for_listener(Some(&unit("a", "unheard"))).await.unwrap().id().workload, Workload::Node(a));

    svids.set_listeners(&[unit("a", "web")].into());
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(svids.held().len(), 3);
    tokio::time::sleep(2 * HOUR).await;
    let left: Vec<_> = svids.held().into_iter().map(|h| h.leaf.id.workload).collect();
    assert_eq!(left, [Workload::Node(a), unit("a", "web")]);
    svids.set_listeners(&[].into());
    tokio::time::sleep(2 * HOUR).await;
    assert_eq!(svids.held().len(), 1);
}

/// Others dial a new member as soon as they know it, which is before its first SVID is there.
#[tokio::test(start_paused = true)]
async fn who_comes_before_the_first_svid_waits_for_it_but_not_in_vain() {
    let mut mesh = Mesh::found();
    let key = PrivateKey::generate().unwrap();
    mesh.admit(&key, "a");
    let a = key.public().node_id();
    let (_, v) = mesh.verifier(true);
    let issuance = Arc::new(mesh.issuance(a, HOUR));
    issuance.down.store(true, Ordering::Relaxed);
    let svids = Svids::new(a, v.clone(), Patience::default());
    let (working, asking) = (svids.clone(), issuance.clone());
    tokio::spawn(async move { working.run(&*asking).await });
    let data = DataTls { svids: svids.clone(), listeners: Arc::new(|_| None) };
    let up = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        issuance.down.store(false, Ordering::Relaxed);
    };
    let at = "10.0.0.2:6374".parse().unwrap();
    let late = unit("a", "curl");
    let (shown, dials, ()) = tokio::join!(data.choose(at, Some("p80.meshd")), svids.for_client(&late), up);
    assert_eq!(shown.unwrap().shown.id().workload, Workload::Node(a));
    assert_eq!(dials.unwrap().id().workload, Workload::Node(a));

    let nobody = Arc::new(mesh.issuance(a, HOUR));
    nobody.down.store(true, Ordering::Relaxed);
    let svids = Svids::new(a, v, Patience::default());
    let (working, began) = (svids.clone(), tokio::time::Instant::now());
    tokio::spawn(async move { working.run(&*nobody).await });
    assert!(svids.for_listener(None).await.is_none());
    assert!(began.elapsed() <= Duration::from_secs(5));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let began = tokio::time::Instant::now();
    assert!(svids.for_client(&late).await.is_none() && svids.for_listener(None).await.is_none());
    assert!(began.elapsed() < Duration::from_secs(1), "everybody waits although it was tried often enough");
}

/// The authority that signed the node's SVIDs was put out, in this life or while the node was off: nobody would believe what it has.
#[tokio::test(start_paused = true)]
async fn who_comes_while_the_root_is_not_believed_waits_for_another_svid_but_not_in_vain() {
    let mut mesh = Mesh::found();
    let key = PrivateKey::generate().unwrap();
    mesh.admit(&key, "a");
    let a = key.public().node_id();
    let (trust, v) = mesh.verifier(true);
    let (web, curl) = (unit("a", "web"), unit("a", "curl"));
    let issuance = Arc::new(mesh.issuance(a, HOUR));
    let svids = issued(a, &v, issuance.clone(), &[web.clone(), curl.clone()]).await;
    let (saved, before) = (svids.export(), svids.own().unwrap());

    // Another root in place of that one.
    let domain = mesh.roster.trust_domain().clone();
    let authority = mesh.key.public().node_id();
    mesh.issuer = Arc::new(Issuer::create(&domain, authority, mesh.clock.now(), 24 * HOUR).unwrap());
    let mut now = mesh.trust();
    now.bundle.roots = vec![Root::parse(mesh.issuer.root_der(), authority).unwrap()];
    issuance.down.store(true, Ordering::Relaxed);
    trust.store(Arc::new(now));
    svids.trust_changed();
    assert!(svids.own().is_none() && svids.shown_for(Some(&web)).is_none());
    // Nobody issues: what there is may be believed by who has not heard.
    assert!(Arc::ptr_eq(&svids.for_listener(Some(&web)).await.unwrap(), &before));

    let again = Svids::new(a, v.clone(), Patience::default());
    assert_eq!(again.import(&saved).unwrap(), 3);
    let (working, asking) = (again.clone(), mesh.issuance(a, HOUR));
    let up = async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        tokio::spawn(async move { working.run(&asking).await });
    };
    let (shown, dials, ()) = tokio::join!(again.for_listener(Some(&web)), again.for_client(&curl), up);
    for svid in [shown.unwrap(), dials.unwrap()] {
        assert!(v.identify(&[CertificateDer::from(svid.leaf().der.clone())]).is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn workloads_are_bounded() {
    let mesh = Mesh::found();
    let node = mesh.key.public().node_id();
    let (_, v) = mesh.verifier(true);
    let issuance = Arc::new(mesh.issuance(node, 72 * HOUR));
    let svids = issued(node, &v, issuance, &[]).await;
    let clients: Vec<_> = (0..MAX_WORKLOADS).map(|i| unit("authority", &i.to_string())).collect();
    for w in &clients[..MAX_WORKLOADS - 1] {
        svids.for_client(w).await.unwrap();
    }
    // Full, and all of them seen within the minute: the newcomer has to do with the node's.
    let w = &clients[MAX_WORKLOADS - 1];
    let crowded = svids.for_client(w).await.unwrap();
    assert_eq!(crowded.id().workload, Workload::Node(node));
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(svids.for_client(w).await.unwrap().id().workload, *w);
    assert!(svids.held().len() <= MAX_WORKLOADS);
}

#[tokio::test]
async fn saved_ones_come_back_unless_they_are_not_ours() {
    let mut mesh = Mesh::found();
    let key = PrivateKey::generate().unwrap();
    mesh.admit(&key, "a");
    let a = key.public().node_id();
    let (_, v) = mesh.verifier(true);
    let svids = issued(a, &v, Arc::new(mesh.issuance(a, HOUR)), &[unit("a", "web")]).await;
    let saved = svids.export();

    let again = Svids::new(a, v.clone(), Patience::default());
    assert!(again.own().is_none());
    assert_eq!(again.import(&saved).unwrap(), 2);
    assert_eq!(again.own().unwrap().leaf(), svids.own().unwrap().leaf());
    assert!(again.held()[1].renew_at > mesh.clock.now());
    assert!(again.import(b"garbage").is_err());

    let other = Svids::new(mesh.key.public().node_id(), v.clone(), Patience::default());
    assert_eq!(other.import(&saved).unwrap(), 1, "not another node's own");
    assert!(other.own().is_none());
    mesh.clock.add(2 * HOUR);
    assert_eq!(Svids::new(a, v, Patience::default()).import(&saved).unwrap(), 0, "over");
}
