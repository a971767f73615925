//! Parsing and merging of hostile announcements; two responders on a network of their own.

use std::process::Command;
use std::time::Duration;

use proptest::prelude::*;
use socket2::{Domain, Socket, Type};

use super::*;

fn mesh(n: u8) -> MeshId {
    MeshId::from_bytes([n; 10])
}

fn said(ips: &[&str], salt: u8) -> Heard {
    Heard {
        port: 6374,
        addresses: ips.iter().map(|s| (s.parse().unwrap(), 3)).collect(),
        version: Some(b"1".to_vec()),
        salt: Some(HEXLOWER.encode(&[salt; 8]).into_bytes()),
        mac: Some(b"00000000".to_vec()),
    }
}

#[test]
fn a_tag_is_recognised_by_its_mesh_only_and_never_twice_the_same() {
    let (a, b) = (Tag::of(mesh(1)).unwrap(), Tag::of(mesh(1)).unwrap());
    assert_ne!(a, b);
    for t in [a, b] {
        assert!(tag_matches(mesh(1), &t));
        assert!(!tag_matches(mesh(2), &t));
    }
    assert!(!tag_matches(mesh(1), &Tag { salt: b.salt, ..a }));
}

#[test]
fn addresses_that_lead_nowhere_are_dropped() {
    let h = said(&["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.251", "ff02::fb", "255.255.255.255", "::ffff:127.0.0.1"], 1);
    assert!(parse(&h).is_none());
    let h = said(&["127.0.0.1", "10.0.0.1", "fe80::5", "fd00::5"], 1);
    let (s, _) = parse(&h).unwrap();
    let expected: [SocketAddr; 3] =
        ["10.0.0.1:6374".parse().unwrap(), "[fe80::5%3]:6374".parse().unwrap(), "[fd00::5]:6374".parse().unwrap()];
    assert_eq!(s.addresses, expected, "link-local keeps its interface");
    let mut unscoped = said(&["fe80::5"], 1);
    unscoped.addresses[0].1 = 0;
    assert!(parse(&unscoped).is_none());
    assert!(parse(&Heard { port: 0, ..said(&["10.0.0.1"], 1) }).is_none());
}

#[test]
fn texts_that_are_not_ours() {
    for v in [&b""[..], b"0", b"+1", b"-1", b"1 ", b"65536", b"\xff", b"1.0"] {
        assert!(parse(&Heard { version: Some(v.to_vec()), ..said(&["10.0.0.1"], 1) }).is_none(), "{v:?}");
    }
    assert!(parse(&Heard { version: None, ..said(&["10.0.0.1"], 1) }).is_none());
    let later = Heard { version: Some(b"7".to_vec()), ..said(&["10.0.0.1"], 1) };
    assert_eq!(parse(&later).unwrap().0.version, 7);
    for m in [&b""[..], b"0000000", b"000000000", b"0000000g", b"ABCDEF00"] {
        let h = Heard { mac: Some(m.to_vec()), ..said(&["10.0.0.1"], 1) };
        assert_eq!(parse(&h).unwrap().0.tag, None, "{m:?}");
    }
}

#[test]
fn pieces_are_put_together_and_each_change_is_told_once() {
    let mut seen = Seen::default();
    let mut tell = |name: &str, h: &Heard| seen.resolved(name, h, Some([9; 8])).map(|s| s.addresses.len());
    assert_eq!(tell("a._meshd._tcp.local.", &said(&["10.0.0.1"], 1)), Some(1));
    assert_eq!(tell("a._meshd._tcp.local.", &said(&["10.0.0.1"], 1)), None);
    assert_eq!(tell("A._MESHD._tcp.local.", &said(&["fd00::1"], 1)), Some(2), "names have no case");
    assert_eq!(tell("a._meshd._tcp.local.", &said(&["10.0.0.1"], 1)), None);
    assert_eq!(tell("a._meshd._tcp.local.", &said(&["10.0.0.2"], 2)), Some(1), "another life");
    assert_eq!(tell("b._meshd._tcp.local.", &said(&["10.0.0.3"], 9)), None, "ourselves, under whatever name");
    assert_eq!(tell(&"x".repeat(10_000), &said(&["10.0.0.3"], 1)), None);
    seen.removed("a._meshd._tcp.LOCAL.");
    assert!(seen.instances.is_empty());
}

#[test]
fn a_flood_of_names_and_addresses_is_bounded() {
    let mut seen = Seen::default();
    for n in 0..1000 {
        seen.resolved(&format!("{n}"), &said(&["10.0.0.1"], 1), None);
    }
    assert_eq!(seen.instances.len(), MAX_SIGHTINGS);
    assert!(seen.instances.contains_key("999"));
    for n in 0..1000u32 {
        let ip = std::net::Ipv4Addr::from(0x0a00_0001 + n).to_string();
        seen.resolved("one", &said(&[&ip], 1), None);
    }
    let addresses = &seen.instances["one"].1.addresses;
    assert_eq!(addresses.len(), MAX_ADDRESSES);
    assert_eq!(addresses[0].ip(), IpAddr::from([10, 0, 3, 232]), "what was said last comes first");
}

fn bytes() -> impl Strategy<Value = Option<Vec<u8>>> {
    let hexes = prop::collection::vec(prop::sample::select(b"0123456789abcdefg".to_vec()), 0..20);
    prop::option::of(prop_oneof![prop::collection::vec(any::<u8>(), 0..300), hexes, Just(b"1".to_vec())])
}

fn anything() -> impl Strategy<Value = Heard> {
    (any::<u16>(), prop::collection::vec((any::<IpAddr>(), 0..4u32), 0..80), bytes(), bytes(), bytes())
        .prop_map(|(port, addresses, version, salt, mac)| Heard { port, addresses, version, salt, mac })
}

proptest! {
    #[test]
    fn whatever_is_said(all in prop::collection::vec(("\\PC{0,20}", anything()), 0..40)) {
        let mut seen = Seen::default();
        for (name, h) in &all {
            let Some(s) = seen.resolved(name, h, Some([7; 8])) else { continue };
            prop_assert!((1..=MAX_ADDRESSES).contains(&s.addresses.len()) && s.version > 0);
            for a in &s.addresses {
                prop_assert!(a.port() != 0 && !a.ip().is_loopback() && !a.ip().is_multicast() && !a.ip().is_unspecified());
                if let SocketAddr::V6(v6) = a && v6.ip().is_unicast_link_local() {
                    prop_assert!(v6.scope_id() != 0);
                }
            }
            prop_assert_eq!(seen.resolved(name, h, None), None, "told once");
        }
    }
}

/// Set in the copy of this test that runs inside a network namespace of its own.
const INSIDE: &str = "MESHD_TEST_INSIDE_NAMESPACE";

/// Two responders of one process find each other on a private interface, recognise the mesh, do not see themselves, and fall
/// silent on an interface that is no longer chosen.
#[test]
fn two_responders_find_each_other() {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let setup = "ip link set lo up && (ip link add lan0 type dummy || ip link add lan0 type veth peer name lan1 && \
                 ip link set lan1 up) && ip link set lan0 multicast on up && ip address add 10.77.0.1/24 dev lan0 && \
                 ip route add 224.0.0.0/4 dev lan0";
    let can = Command::new("unshare").args(["-Urn", "sh", "-c", setup]).output();
    if !can.as_ref().is_ok_and(|o| o.status.success()) {
        eprintln!("SKIPPED two_responders_find_each_other: no network namespace, or neither dummy nor veth in it: {can:?}");
        return;
    }
    let me = std::env::current_exe().unwrap();
    let name = "source::mdns::tests::two_responders_find_each_other";
    let run = format!("{setup} && exec \"$0\" --exact {name} --nocapture");
    let out = Command::new("unshare").args(["-Urn", "sh", "-c", &run]).arg(me).env(INSIDE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
}

async fn seen_by(sightings: &mut Sightings) -> Sighting {
    loop {
        if let News::Seen(sighting) = sightings.next().await.unwrap() {
            return sighting;
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn inside() {
    let config = |instance: &str, port| MdnsConfig {
        udp_port: 5353,
        port,
        instance: instance.into(),
        interfaces: BTreeSet::from(["lan0".to_owned()]),
    };
    let long = Duration::from_secs(60);
    let (mut a, mut sees_a) = Mdns::start(config("alpha", 6374)).unwrap();
    let (mut b, mut sees_b) = Mdns::start(config("beta", 7000)).unwrap();
    a.announce(Some(Tag::of(mesh(1)).unwrap())).unwrap();
    b.announce(None).unwrap();

    // What is first told of a host may be one of its addresses only.
    let whole = async {
        loop {
            let seen = seen_by(&mut sees_b).await;
            if seen.addresses.contains(&"10.77.0.1:6374".parse().unwrap()) {
                return seen;
            }
        }
    };
    let seen = tokio::time::timeout(long, whole).await.expect("beta sees alpha");
    assert!(tag_matches(mesh(1), &seen.tag.unwrap()) && !tag_matches(mesh(2), &seen.tag.unwrap()));
    assert_eq!(seen.version, VERSION);
    let seen = tokio::time::timeout(long, seen_by(&mut sees_a)).await.expect("alpha sees beta");
    assert!(seen.addresses.iter().all(|a| a.port() == 7000), "not itself: {seen:?}");
    assert_eq!(seen.tag, None);

    // It joins: the same name, another life.
    b.announce(Some(Tag::of(mesh(1)).unwrap())).unwrap();
    let tagged = async {
        loop {
            let s = seen_by(&mut sees_a).await;
            if s.tag.is_some_and(|t| tag_matches(mesh(1), &t)) {
                return;
            }
        }
    };
    tokio::time::timeout(long, tagged).await.expect("alpha sees the tag of beta");
    assert!((1..100).contains(&a.cached().await.unwrap()));

    // On no interface nothing is heard any more; back on it everything is.
    b.use_interfaces(BTreeSet::new()).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    a.announce(Some(Tag::of(mesh(3)).unwrap())).unwrap();
    let deaf = async {
        loop {
            let s = seen_by(&mut sees_b).await;
            assert!(!s.tag.is_some_and(|t| tag_matches(mesh(3), &t)), "{s:?}");
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(3), deaf).await.is_err());
    b.use_interfaces(BTreeSet::from(["lan0".to_owned()])).unwrap();
    let back = async { while !seen_by(&mut sees_b).await.tag.is_some_and(|t| tag_matches(mesh(3), &t)) {} };
    tokio::time::timeout(long, back).await.expect("beta hears alpha again");

    // Its goodbye is told.
    drop(b);
    let gone =
        async { while !matches!(sees_a.next().await, Some(News::Gone(s)) if s.addresses.iter().any(|a| a.port() == 7000)) {} };
    tokio::time::timeout(long, gone).await.expect("alpha hears that beta is gone");
    assert!(tokio::time::timeout(long, async { while sees_b.next().await.is_some() {} }).await.is_ok(), "the end is told");

    // Nobody asks any more, and it says once more who is there.
    let wire = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    wire.set_reuse_address(true).unwrap();
    wire.set_reuse_port(true).unwrap();
    wire.bind(&SocketAddr::from(([0, 0, 0, 0], 5353)).into()).unwrap();
    wire.join_multicast_v4(&[224, 0, 0, 251].into(), &[10, 77, 0, 1].into()).unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let wire = std::net::UdpSocket::from(wire);
    let mut packet = [0; 9000];
    let mut announced = || loop {
        let Ok(n) = wire.recv(&mut packet) else { return false };
        let (response, packet) = (packet[2] & 0x80 != 0, &packet[..n]);
        if response && packet.windows(5).any(|w| w == b"alpha") {
            return true;
        }
    };
    assert!(!announced(), "it speaks without being asked");
    a.repeat().unwrap();
    assert!(announced(), "alpha announces itself again");
    a.unannounce().unwrap();
}
