//! The table: what it catches, what it leaves alone, how it comes, changes and goes.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use meshd::intercept::nft::{self, Condition};
use meshd::intercept::rtnetlink::Route;
use meshd::intercept::sniff::Sniffer;
use meshd::intercept::sockdiag::SockDiag;
use meshd::intercept::socket::{self, Mark};
use meshd::intercept::{Capture, Enforcement, InterceptError, Ownership, RuleConfig};

use crate::world::{MOMENT, Outcome, PATIENCE, Test, World, accept, assert_refused, at, crash, ip, talk};

pub(crate) const TESTS: &[Test] = &[
    Test { name: "install_replace_remove_leaves_nothing", needs: &[], run: install_replace_remove },
    Test { name: "older_connections_survive_installation_and_removal", needs: &[], run: older_connections },
    Test { name: "members_are_captured_and_the_rest_is_not", needs: &[], run: captured },
    Test { name: "strict_resets_plaintext_of_members_only", needs: &[], run: strict },
    Test { name: "audit_counts_and_accepts", needs: &[], run: audit },
    Test { name: "a_refused_port_is_rejected_until_it_expires", needs: &[], run: refused },
    Test { name: "the_table_has_one_owner", needs: &[], run: owner },
    Test { name: "a_persistent_table_fails_closed_and_is_taken_over", needs: &[], run: persistent },
    Test { name: "an_open_table_is_watched_and_repaired", needs: &[], run: watched },
    Test { name: "borrowed_sources_do_not_leave", needs: &[], run: leak },
    Test { name: "ten_thousand_peers", needs: &[], run: many },
    Test { name: "every_expression_is_probed", needs: &[], run: probed },
];

fn install_replace_remove() -> Outcome {
    let world = World::new();
    world.a.assert_clean();
    let capture = world.a.install(&RuleConfig::default());
    assert_eq!(capture.can_borrow_addresses(), (true, true));
    capture.set_peers(&BTreeSet::from(world.b.addresses()))?;
    assert_eq!(world.a.verify(&capture), Condition::Intact);
    drop(world.b.listen(world.b.v4, 80));
    // Nobody listens on the capture port: the redirect shows as a refusal, and is counted.
    assert_refused(world.a.connect(at(world.b.v4, 80)), "captured");
    assert_eq!(capture.counters()?.captured, 1);

    let strict = RuleConfig { enforcement: Enforcement::Strict, ..RuleConfig::default() };
    world.a.run(|| capture.replace(&strict))?;
    assert_eq!(capture.config(), strict);
    assert_eq!(world.a.verify(&capture), Condition::Intact);
    assert_eq!(capture.peers(), BTreeSet::from(world.b.addresses()));
    assert_eq!(capture.counters()?.captured, 1, "counts go on");
    assert_refused(world.a.connect(at(world.b.v6, 80)), "still captured");
    assert_eq!(capture.counters()?.captured, 2);
    world.a.run(|| capture.remove())?;
    world.a.assert_clean();

    // A crash: the socket is closed, nothing else happens. The table goes, rule and route are left to `cleanup`.
    let crashed = world.a.install(&RuleConfig::default());
    crashed.set_peers(&BTreeSet::from(world.b.addresses()))?;
    crash(crashed);
    let server = world.b.listen(world.b.v4, 80);
    let _open = world.a.connect(at(world.b.v4, 80))?;
    assert!(accept(&server, PATIENCE).is_some());
    assert!(world.a.run(nft::cleanup)?, "the route was left");
    world.a.assert_clean();
    Ok(())
}

fn older_connections() -> Outcome {
    let world = World::new();
    for (from, to) in [(world.a.v4, world.b.v4), (world.a.v6, world.b.v6)] {
        let server = world.b.listen(to, 80);
        let mut client = world.a.connect(at(to, 80))?;
        let (mut served, _) = accept(&server, PATIENCE).ok_or("no connection")?;
        talk(&mut client, &mut served)?;
        // Both ends start: one captures, the other refuses plaintext. Ours is older than either.
        let capture = world.a.install(&RuleConfig::default());
        capture.set_peers(&BTreeSet::from([to]))?;
        let strict = world.b.install(&RuleConfig { enforcement: Enforcement::Strict, ..RuleConfig::default() });
        strict.set_peers(&BTreeSet::from([from]))?;
        talk(&mut client, &mut served)?;
        talk(&mut served, &mut client)?;
        assert_refused(world.a.connect(at(to, 80)), "a new one is captured");
        world.a.run(|| capture.remove())?;
        world.b.run(|| strict.remove())?;
        talk(&mut client, &mut served)?;
    }
    Ok(())
}

fn captured() -> Outcome {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    let capture = a.install(&RuleConfig::default());
    // Our own addresses among the members' must not make us talk to ourselves.
    capture.set_peers(&BTreeSet::from([b.v4, b.v6, a.v4, a.v6]))?;
    let diag = a.run(SockDiag::open)?;
    for (own, to, loopback) in [(a.v4, b.v4, Ipv4Addr::LOCALHOST.into()), (a.v6, b.v6, IpAddr::from(Ipv6Addr::LOCALHOST))] {
        let before = capture.counters()?.captured;
        let proxy = a.run(|| socket::listen(at(loopback, 6375), Mark::Mesh))?.into_std()?;
        let direct = b.listen(to, 80);

        let client = a.connect(at(to, 80))?;
        let (taken, peer) = accept(&proxy, PATIENCE).ok_or("not captured")?;
        assert_eq!(socket::original_destination(&taken, taken.local_addr()?)?, at(to, 80));
        assert_eq!(peer, client.local_addr()?);
        // The client's socket still believes in its destination, which is how its owner is found.
        let found = diag.find(peer, at(to, 80))?.ok_or("the client's socket was not found")?;
        assert_eq!(found.remote, at(to, 80));
        assert_ne!(found.inode, 0);
        assert_eq!(capture.counters()?.captured, before + 1);

        // A socket of an IPv6 program that talks IPv4.
        if let IpAddr::V4(v4) = to {
            let mapped = SocketAddr::new(v4.to_ipv6_mapped().into(), 80);
            let client = a.connect(mapped)?;
            let (_taken, peer) = accept(&proxy, PATIENCE).ok_or("the mapped client was not captured")?;
            assert_eq!(client.local_addr()?.port(), peer.port());
            assert!(diag.find(peer, at(to, 80))?.is_some());
        }

        // Our own connections, skipped ports, own addresses, addresses that are no member's.
        let marked = a.run(|| socket::outgoing(to, Mark::Mesh))?;
        let marked = runtime.block_on(marked.connect(at(to, 80)))?;
        assert!(accept(&direct, PATIENCE).is_some(), "our own connection was captured");
        drop(marked);
        for (host, ip, port) in [(b, to, 22), (b, to, 6374), (a, own, 80)] {
            let server = host.listen(ip, port);
            let _client = a.connect(at(ip, port))?;
            assert!(accept(&server, PATIENCE).is_some(), "{ip} port {port} was captured");
        }
        assert!(accept(&proxy, Duration::ZERO).is_none());

        // A connection dialled to the proxy itself names the proxy: the caller can tell.
        let _direct = a.connect(at(loopback, 6375))?;
        let (taken, _) = accept(&proxy, PATIENCE).ok_or("no connection")?;
        let original = socket::original_destination(&taken, taken.local_addr()?);
        assert!(original.is_err() || original? == at(loopback, 6375));
    }
    let server = b.listen(b.other, 80);
    let _client = a.connect(at(b.other, 80))?;
    assert!(accept(&server, PATIENCE).is_some(), "not a member");
    // A member that left is reached directly again.
    capture.set_peers(&BTreeSet::from([b.v6]))?;
    let server = b.listen(b.v4, 81);
    let _client = a.connect(at(b.v4, 81))?;
    assert!(accept(&server, PATIENCE).is_some());
    Ok(())
}

fn strict() -> Outcome {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let capture = a.install(&RuleConfig { enforcement: Enforcement::Strict, ..RuleConfig::default() });
    capture.set_peers(&BTreeSet::from(b.addresses()))?;
    for (from, own) in [(b.v4, a.v4), (b.v6, a.v6)] {
        let before = capture.counters()?.plaintext;
        let server = a.listen(own, 80);
        assert_refused(b.connect_from(from, at(own, 80)), "plaintext of a member");
        assert_eq!(capture.counters()?.plaintext, before + 1);
        assert!(accept(&server, Duration::ZERO).is_none());
        for port in [22, 6374] {
            let server = a.listen(own, port);
            let _client = b.connect_from(from, at(own, port))?;
            assert!(accept(&server, PATIENCE).is_some(), "port {port} is for everybody");
        }
        // What comes over loopback is ours.
        let _client = a.connect(at(own, 80))?;
        assert!(accept(&server, PATIENCE).is_some());
    }
    let server = a.listen(a.v4, 82);
    let _client = b.connect_from(b.other, at(a.v4, 82))?;
    assert!(accept(&server, PATIENCE).is_some(), "a stranger is none of our business");
    a.run(|| capture.replace(&RuleConfig::default()))?;
    let _client = b.connect_from(b.v4, at(a.v4, 82))?;
    assert!(accept(&server, PATIENCE).is_some(), "permissive again");
    Ok(())
}

fn audit() -> Outcome {
    let world = World::new();
    let capture = world.a.install(&RuleConfig { enforcement: Enforcement::Audit, ..RuleConfig::default() });
    capture.set_peers(&BTreeSet::from(world.b.addresses()))?;
    for (from, own) in [(world.b.v4, world.a.v4), (world.b.v6, world.a.v6), (world.b.other, world.a.v4)] {
        let server = world.a.listen(own, 80);
        let mut client = world.b.connect_from(from, at(own, 80))?;
        let (mut served, _) = accept(&server, PATIENCE).ok_or("refused")?;
        talk(&mut client, &mut served)?;
    }
    assert_eq!(capture.counters()?.plaintext, 2);
    Ok(())
}

fn refused() -> Outcome {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    let capture = a.install(&RuleConfig::default());
    capture.set_peers(&BTreeSet::from(b.addresses()))?;
    let lasts = Duration::from_secs(2);
    for (to, loopback) in [(b.v4, ip("127.0.0.1")), (b.v6, ip("::1"))] {
        let proxy = a.listen(loopback, 6375);
        let server = b.listen(to, 80);
        let before = capture.counters()?;
        assert!(capture.refuse(at(to, 80), lasts)?);
        // Saying it again, as another connection does that ended at the same time, is fine.
        assert!(capture.refuse(at(to, 80), lasts)?);
        assert_refused(a.connect(at(to, 80)), "refused a moment ago");
        let after = capture.counters()?;
        assert_eq!((after.refused, after.captured), (before.refused + 1, before.captured));
        // Another port of the same host, and our own connections, are not meant.
        let _other = a.connect(at(to, 81))?;
        assert!(accept(&proxy, PATIENCE).is_some());
        let own = a.run(|| socket::outgoing(to, Mark::Mesh))?;
        let _own = runtime.block_on(own.connect(at(to, 80)))?;
        assert!(accept(&server, PATIENCE).is_some());
        std::thread::sleep(lasts + MOMENT);
        let _client = a.connect(at(to, 80))?;
        assert!(accept(&proxy, PATIENCE).is_some(), "it expired");
    }
    // A bounded number: more are not an error.
    let mut full = false;
    for port in 1..=5000u16 {
        full = !capture.refuse(at(b.v4, port), Duration::from_secs(60))?;
        if full {
            break;
        }
    }
    assert!(full, "the refused set has no bound");
    Ok(())
}

fn owner() -> Outcome {
    let world = World::new();
    let first = world.a.install(&RuleConfig::default());
    if first.ownership() == Ownership::Open {
        return Err("this kernel has no table owners (5.12)".into());
    }
    let second = world.a.run(|| Capture::install(&RuleConfig::default())).unwrap_err();
    assert!(matches!(second, InterceptError::Occupied), "{second:?}");
    assert!(second.to_string().contains("another meshd is running in this network namespace"));
    let cleanup = world.a.run(nft::cleanup).unwrap_err();
    assert!(matches!(cleanup, InterceptError::Occupied), "{cleanup:?}");
    assert_eq!(world.a.verify(&first), Condition::Intact);
    // Another namespace is another matter.
    let elsewhere = world.b.install(&RuleConfig::default());
    world.b.run(|| elsewhere.remove())?;
    crash(first);
    let second = world.a.install(&RuleConfig::default());
    assert_eq!(world.a.verify(&second), Condition::Intact);
    world.a.run(|| second.remove())?;
    world.a.assert_clean();
    Ok(())
}

fn persistent() -> Outcome {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let config = RuleConfig { ownership: Ownership::Persistent, ..RuleConfig::default() };
    let capture = a.install(&config);
    if capture.ownership() != Ownership::Persistent {
        // The rules are there all the same, with what the kernel can.
        assert_eq!(a.verify(&capture), Condition::Intact);
        eprintln!("SKIPPED in part: this kernel has no persistent tables (6.9)");
        return Ok(());
    }
    capture.set_peers(&BTreeSet::from(b.addresses()))?;
    let server = b.listen(b.v4, 80);
    crash(capture);
    assert_refused(a.connect(at(b.v4, 80)), "nothing goes out in plaintext");
    assert!(accept(&server, Duration::ZERO).is_none());
    // The next one takes over, whether it wants to persist or not.
    for ownership in [Ownership::Persistent, Ownership::Owned] {
        let next = a.install(&RuleConfig { ownership, ..config.clone() });
        assert_eq!(next.ownership(), ownership);
        assert_eq!(a.verify(&next), Condition::Intact);
        next.set_peers(&BTreeSet::from([b.v4]))?;
        crash(next);
    }
    let _client = a.connect(at(b.v4, 80))?;
    assert!(accept(&server, PATIENCE).is_some(), "the last one did not persist");
    // And what persists can be cleaned away.
    crash(a.install(&config));
    assert!(a.run(nft::cleanup)?);
    a.assert_clean();
    Ok(())
}

fn watched() -> Outcome {
    let world = World::new();
    let a = &world.a;
    // As on a kernel without owners: others can change it, so it is watched.
    let capture = a.install(&RuleConfig { ownership: Ownership::Open, ..RuleConfig::default() });
    assert_eq!(capture.ownership(), Ownership::Open);
    capture.set_peers(&BTreeSet::from([world.b.v4]))?;
    assert_eq!(a.verify(&capture), Condition::Intact);
    a.run(|| Route::open()?.delete_policy_route())?;
    assert_eq!(a.verify(&capture), Condition::RouteMissing);
    a.run(|| capture.replace(&capture.config()))?;
    assert_eq!(a.verify(&capture), Condition::Intact);
    // A second one replaces the table: same text, different table.
    let other = a.install(&RuleConfig { ownership: Ownership::Open, ..RuleConfig::default() });
    other.set_peers(&BTreeSet::from([world.b.v4]))?;
    assert_eq!(a.verify(&capture), Condition::TableChanged);
    assert_eq!(a.verify(&other), Condition::Intact);
    a.run(|| other.remove())?;
    assert_eq!(a.verify(&capture), Condition::TableChanged);
    a.run(|| capture.replace(&capture.config()))?;
    assert_eq!(a.verify(&capture), Condition::Intact);
    assert_refused(a.connect(at(world.b.v4, 80)), "captured again");
    a.run(|| capture.remove())?;
    a.assert_clean();
    Ok(())
}

fn leak() -> Outcome {
    let (guarded, open) = (World::new(), World::new());
    let capture = guarded.a.install(&RuleConfig::default());
    for (borrowed, to) in [(ip("10.9.9.9"), guarded.b.v4), (ip("fd99::9"), guarded.b.v6)] {
        let before = capture.counters()?.leaks_prevented;
        assert!(!leaves(&guarded, borrowed, to)?, "a borrowed source left the host");
        assert!(capture.counters()?.leaks_prevented > before);
        // Otherwise this test would not see what it looks for.
        assert!(leaves(&open, borrowed, to)?, "without rules it leaves");
    }
    Ok(())
}

/// Whether the far end of the link hears a connection that is dialled to it with a borrowed source.
fn leaves(world: &World, borrowed: IpAddr, to: IpAddr) -> Result<bool, Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    let mut sniffer = world.b.run(Sniffer::open)?;
    let socket = world.a.run(|| socket::outgoing_as(borrowed, Mark::Service))?;
    let tried = runtime.block_on(async { tokio::time::timeout(MOMENT, socket.connect(at(to, 80))).await });
    assert!(!matches!(tried, Ok(Ok(_))), "connected");
    let octets = match borrowed {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut found = false;
    sniffer.drain(MOMENT, |frame| found |= frame.bytes.windows(octets.len()).any(|window| window == octets))?;
    Ok(found)
}

fn many() -> Outcome {
    let world = World::new();
    let v4 = (0..6000u32).map(|i| IpAddr::from(Ipv4Addr::from(0x0b00_0000 + i)));
    let v6 = (0..6000u128).map(|i| IpAddr::from(Ipv6Addr::from((0xfd00u128 << 112) + i)));
    let peers: BTreeSet<IpAddr> = v4.chain(v6).collect();
    let capture = world.a.install(&RuleConfig::default());
    capture.set_peers(&peers)?;
    assert_eq!(world.a.verify(&capture), Condition::Intact);
    world.a.run(|| capture.replace(&RuleConfig { enforcement: Enforcement::Audit, ..RuleConfig::default() }))?;
    assert_eq!(capture.peers(), peers);
    assert_eq!(world.a.verify(&capture), Condition::Intact);
    let few: BTreeSet<IpAddr> = peers.iter().copied().skip(5999).take(3).chain([world.b.v4]).collect();
    capture.set_peers(&few)?;
    assert_eq!(world.a.verify(&capture), Condition::Intact);
    assert_refused(world.a.connect(at(world.b.v4, 80)), "captured");
    // What must never be captured is left out, whoever says so.
    capture.set_peers(&BTreeSet::from([ip("127.0.0.1"), ip("::1"), ip("fe80::1"), ip("224.0.0.1"), world.b.v4]))?;
    assert_eq!(capture.peers(), BTreeSet::from([world.b.v4]));
    assert_eq!(world.a.verify(&capture), Condition::Intact);
    let too_many: BTreeSet<IpAddr> = (0..70_000u32).map(|i| IpAddr::from(Ipv4Addr::from(0x0b00_0000 + i))).collect();
    assert!(matches!(capture.set_peers(&too_many), Err(InterceptError::TooManyPeers(70_000))));
    Ok(())
}

fn probed() -> Outcome {
    let world = World::new();
    let probes = world.a.run(nft::probe)?;
    for probe in &probes {
        if let Err(error) = &probe.result {
            assert!(probe.optional, "{} ({}): {error}", probe.name, probe.purpose);
            eprintln!("this kernel lacks {} ({}): {error}", probe.name, probe.purpose);
        }
    }
    assert_eq!(probes.len(), 9);
    world.a.assert_clean();
    Ok(())
}
