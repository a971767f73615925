//! Namespaces, links, addresses, routes, notifications and the packet capture: what the lab and the demo are built from.

use std::os::fd::AsFd;
use std::time::Duration;

use meshd::intercept::netns::NetNs;
use meshd::intercept::rtnetlink::{Route, Watch};
use meshd::intercept::sniff::Sniffer;

use crate::world::{MOMENT, Outcome, PATIENCE, Test, World, accept, at, ip, output, talk};

pub(crate) const TESTS: &[Test] = &[
    Test { name: "a_thread_comes_back_from_a_namespace", needs: &[], run: back },
    Test { name: "bridge_of_three_hosts_with_a_router", needs: &[], run: bridge },
    Test { name: "addresses_are_described", needs: &[], run: described },
    Test { name: "changes_are_announced", needs: &[], run: announced },
    Test { name: "frames_are_seen", needs: &[], run: frames },
];

fn back() -> Outcome {
    let home = NetNs::current()?;
    let other = NetNs::create()?;
    assert_ne!(home.inode(), other.inode());
    assert_eq!(NetNs::current()?.inode(), home.inode(), "making one does not move us");
    assert_eq!(other.run(|| NetNs::current().unwrap().inode())?, other.inode());
    assert_eq!(NetNs::current()?.inode(), home.inode());
    // Nested, and through a panic.
    let third = NetNs::create()?;
    let inside = other.run(|| (third.run(|| NetNs::current().unwrap().inode()).unwrap(), NetNs::current().unwrap().inode()))?;
    assert_eq!(inside, (third.inode(), other.inode()));
    let hook = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| other.run(|| std::panic::resume_unwind(Box::new(7)))));
    assert!(hook.is_err());
    assert_eq!(NetNs::current()?.inode(), home.inode());
    // A child started inside lives inside; a thread too.
    let child = other.run(|| output(std::process::Command::new("readlink").arg("/proc/self/ns/net")))??;
    assert_eq!(String::from_utf8(child.stdout)?.trim(), format!("net:[{}]", other.inode()));
    let thread = other.run(|| std::thread::spawn(|| NetNs::current().unwrap().inode()))?;
    assert_eq!(thread.join().unwrap(), other.inode());
    // Loopback works at once.
    other.run(|| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    })?;
    Ok(())
}

fn bridge() -> Outcome {
    let switch = NetNs::create()?;
    let hosts: Vec<NetNs> = (0..3).map(|_| NetNs::create()).collect::<Result<_, _>>()?;
    switch.run(|| {
        let mut route = Route::open().unwrap();
        let bridge = route.add_bridge("lan").unwrap();
        route.set_up(bridge).unwrap();
        route.add_address(bridge, ip("10.78.0.254"), 24).unwrap();
        for (n, host) in hosts.iter().enumerate() {
            let port = route.add_veth(&format!("port{n}"), "eth0", Some(host.as_fd())).unwrap();
            route.set_mtu(port, 1400).unwrap();
            route.set_master(port, bridge).unwrap();
            route.set_up(port).unwrap();
        }
        let links = route.links().unwrap();
        let named = |name: &str| links.iter().find(|link| link.name == name).unwrap();
        assert_eq!(named("lan").kind.as_deref(), Some("bridge"));
        let port = named("port1");
        assert_eq!((port.kind.as_deref(), port.master, port.mtu), (Some("veth"), Some(bridge), 1400));
        assert!(port.is_up() && port.is_multicast() && !port.is_loopback() && port.mac.is_some());
        assert_eq!(route.add_bridge("lan").unwrap_err().errno(), Some(libc_eexist()));
    })?;
    for (n, host) in hosts.iter().enumerate() {
        host.run(|| {
            let mut route = Route::open().unwrap();
            let link = route.index("eth0").unwrap();
            for (ip, prefix) in [(format!("10.78.0.{}", n + 1), 24), (format!("fd78::{}", n + 1), 64)] {
                route.add_address(link, ip.parse().unwrap(), prefix).unwrap();
            }
            route.set_up(link).unwrap();
            route.add_default_route(ip("10.78.0.254")).unwrap();
            let default = route.routes().unwrap().into_iter().find(|r| r.prefix == 0 && r.gateway.is_some()).unwrap();
            assert_eq!((default.gateway, default.interface), (Some(ip("10.78.0.254")), Some(link)));
        })?;
    }
    for to in ["10.78.0.3", "fd78::3"].map(ip) {
        let server = hosts[2].run(|| std::net::TcpListener::bind(at(to, 80)))??;
        let mut client = hosts[0].run(|| std::net::TcpStream::connect_timeout(&at(to, 80), PATIENCE))??;
        let (mut served, _) = accept(&server, PATIENCE).ok_or("not connected")?;
        talk(&mut client, &mut served)?;
    }
    switch.run(|| {
        let mut route = Route::open().unwrap();
        let port = route.index("port0").unwrap();
        route.delete_link(port).unwrap();
        assert!(route.index("port0").is_err());
    })?;
    hosts[0].run(|| assert!(Route::open().unwrap().index("eth0").is_err(), "both ends of a pair go"))?;
    Ok(())
}

/// `EEXIST`; the tests have no libc of their own.
fn libc_eexist() -> i32 {
    17
}

fn described() -> Outcome {
    let world = World::new();
    world.a.run(|| {
        let mut route = Route::open().unwrap();
        let wire = route.index("wire").unwrap();
        let own: Vec<_> = route.addresses().unwrap().into_iter().filter(|a| a.index == wire).collect();
        for (ip, prefix) in [(world.a.v4, 24), (world.a.v6, 64), (world.a.other, 24)] {
            let found = own.iter().find(|a| a.ip == ip).unwrap();
            assert_eq!((found.prefix, found.scope), (prefix, 0));
            assert!(!found.is_tentative() && !found.is_deprecated() && !found.is_temporary(), "{found:?}");
        }
        route.delete_address(wire, world.a.other, 24).unwrap();
        assert!(route.addresses().unwrap().iter().all(|a| a.ip != world.a.other));
        assert!(route.delete_address(wire, world.a.other, 24).is_err());
        // Adding and removing the policy route may be repeated.
        for _ in 0..2 {
            route.add_policy_route().unwrap();
            assert_eq!(route.has_policy_route().unwrap(), (true, true));
        }
        for _ in 0..2 {
            route.delete_policy_route().unwrap();
            assert_eq!(route.has_policy_route().unwrap(), (false, false));
        }
        route.set_down(wire).unwrap();
        assert!(!route.links().unwrap().iter().any(|link| link.index == wire && link.is_up()));
    });
    Ok(())
}

fn announced() -> Outcome {
    let world = World::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    let mut watch = world.a.run(Watch::open)?;
    runtime.block_on(async {
        // Whatever was under way (IPv6 settles) comes to rest.
        while tokio::time::timeout(Duration::from_secs(2), watch.changed()).await.is_ok() {}
        world.a.run(|| {
            let mut route = Route::open().unwrap();
            let wire = route.index("wire").unwrap();
            route.add_address(wire, ip("10.77.5.5"), 32).unwrap();
        });
        let seen = tokio::time::timeout(PATIENCE, watch.changed()).await??;
        assert!(seen.notifications > 0);
        // What happens elsewhere is not announced here.
        while tokio::time::timeout(MOMENT, watch.changed()).await.is_ok() {}
        let elsewhere = NetNs::create()?;
        elsewhere.run(|| Route::open().unwrap().add_bridge("elsewhere").unwrap())?;
        assert!(tokio::time::timeout(MOMENT, watch.changed()).await.is_err());
        Ok(())
    })
}

fn frames() -> Outcome {
    let world = World::new();
    let mut sniffer = world.b.run(Sniffer::open)?;
    let server = world.b.listen(world.b.v4, 80);
    let mut client = world.a.connect(at(world.b.v4, 80))?;
    let (mut served, _) = accept(&server, PATIENCE).ok_or("not connected")?;
    talk(&mut client, &mut served)?;
    let (mut ping, mut pong) = (0, 0);
    sniffer.drain(MOMENT, |frame| {
        assert!(frame.interface > 0);
        let has = |text: &[u8]| frame.bytes.windows(text.len()).any(|window| window == text);
        ping += u32::from(has(b"ping") && !frame.outgoing);
        pong += u32::from(has(b"pong") && frame.outgoing);
    })?;
    assert!(ping > 0 && pong > 0, "both directions");
    Ok(())
}
