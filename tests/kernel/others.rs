//! Beside other people's rules, and without privilege.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::process::Command;

use meshd::intercept::message::{self, Builder};
use meshd::intercept::netlink::{Family, NetlinkError, Socket};
use meshd::intercept::netns::NetNs;
use meshd::intercept::nft::Condition;
use meshd::intercept::rtnetlink::Route;
use meshd::intercept::socket::{self, Mark};
use meshd::intercept::{Enforcement, Ownership, RuleConfig};

use crate::world::{Host, MOMENT, Need, Outcome, PATIENCE, Test, World, accept, assert_refused, at, ip, output, talk};

pub(crate) const TESTS: &[Test] = &[
    Test { name: "somebody_elses_flush_leaves_our_table", needs: &[], run: flushed },
    Test { name: "nft_reads_our_table", needs: &[Need::Nft], run: printed },
    Test { name: "beside_a_firewall_with_one_port_open", needs: &[Need::Nft], run: firewall },
    Test { name: "beside_a_published_container_port", needs: &[Need::Nft], run: published },
    Test { name: "the_same_without_privilege", needs: &[Need::Root], run: unprivileged },
];

const BEGIN: u16 = 0x10;
const END: u16 = 0x11;
const DELETE_TABLE: u16 = 10 << 8 | 2;
const NEW_ELEMENTS: u16 = 10 << 8 | 12;

/// What another program sends: one change in a transaction.
fn change(kind: u16, family: u8, body: impl FnOnce(&mut Builder)) -> Result<(), NetlinkError> {
    let mut request = Builder::new();
    request.message(BEGIN, 0, &[0, 0, 0, 10], |_| {});
    request.message(kind, message::CREATE, &[family, 0, 0, 0], body);
    request.acknowledge_last();
    request.message(END, 0, &[0, 0, 0, 10], |_| {});
    Socket::open(Family::Netfilter)?.execute(request)
}

fn flushed() -> Outcome {
    let world = World::new();
    let capture = world.a.install(&RuleConfig::default());
    capture.set_peers(&BTreeSet::from(world.b.addresses()))?;
    if capture.ownership() == Ownership::Open {
        return Err("this kernel has no table owners (5.12)".into());
    }
    // `nft flush ruleset`: delete every table of every family.
    world.a.run(|| change(DELETE_TABLE, 0, |_| {}))?;
    assert_eq!(world.a.verify(&capture), Condition::Intact);
    let deleted = world.a.run(|| change(DELETE_TABLE, 1, |m| _ = m.str(1, "meshd"))).unwrap_err();
    assert_eq!(deleted.errno(), Some(1), "EPERM");
    let added = world.a.run(|| {
        change(NEW_ELEMENTS, 1, |m| {
            m.str(1, "meshd").str(2, "peers4").nest(3, |m| {
                m.nest(1, |m| {
                    m.nest(1, |m| {
                        m.attr(1, &[10, 77, 0, 99]);
                    });
                });
            });
        })
    });
    assert_eq!(added.unwrap_err().errno(), Some(1), "EPERM");
    assert_eq!(world.a.verify(&capture), Condition::Intact);
    assert_refused(world.a.connect(at(world.b.v4, 80)), "still captured");
    world.a.run(|| capture.remove())?;
    world.a.assert_clean();
    Ok(())
}

fn nft(host: &Host, rules: &str) -> Result<String, Box<dyn std::error::Error>> {
    let output = host.run(|| output(Command::new("nft").arg(rules)))?;
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout)?),
        false => Err(format!("nft {rules}: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

fn printed() -> Outcome {
    let world = World::new();
    let capture = world.a.install(&RuleConfig { enforcement: Enforcement::Strict, ..RuleConfig::default() });
    capture.set_peers(&BTreeSet::from(world.b.addresses()))?;
    capture.refuse(at(world.b.v4, 80), PATIENCE)?;
    capture.refuse(at(world.b.v6, 81), PATIENCE)?;
    let text = nft(&world.a, "list table inet meshd")?;
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for expected in [
        "type ipv4_addr . inet_service size 4096 flags timeout elements = { 10.77.0.2 . 80",
        "type ipv6_addr . inet_service size 4096 flags timeout elements = { fd77::2 . 81",
        "set skip { type inet_service elements = { 22, 6374 } }",
        "type nat hook output priority -110",
        "fib daddr type local return",
        "ip daddr @peers4 counter name \"captured\" redirect to :6375",
        "ip6 daddr @peers6 counter name \"captured\" redirect to :6375",
        "fib daddr type != local counter name \"leaks\" drop",
        "ip daddr . th dport @refused4 counter name \"refused\" reject with tcp reset",
        "ip6 saddr @peers6 counter name \"plaintext\" reject with tcp reset",
    ] {
        assert!(words.contains(expected), "{expected}\nis not in\n{text}");
    }
    Ok(())
}

fn firewall() -> Outcome {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    nft(
        a,
        "add table inet ufw; add chain inet ufw input { type filter hook input priority 0; policy drop; }; \
         add rule inet ufw input iif lo accept; add rule inet ufw input ct state established,related accept; \
         add rule inet ufw input meta l4proto ipv6-icmp accept; add rule inet ufw input tcp dport 6374 accept",
    )?;
    let capture = a.install(&RuleConfig::default());
    capture.set_peers(&BTreeSet::from(b.addresses()))?;
    for (own, peer) in [(a.v4, b.v4), (a.v6, b.v6)] {
        let mesh = a.listen(own, 6374);
        let _tunnel = b.connect(at(own, 6374))?;
        assert!(accept(&mesh, PATIENCE).is_some());
        let server = a.listen(own, 80);
        let _mine = a.run(|| runtime.block_on(socket::connect_as(at(peer, 0), at(own, 80), Mark::Service)))?;
        assert_eq!(accept(&server, PATIENCE).ok_or("not delivered")?.1.ip(), peer);
        // The firewall still does what it is there for.
        let direct = b.run(|| std::net::TcpStream::connect_timeout(&at(own, 80), MOMENT));
        assert_eq!(direct.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    }
    Ok(())
}

fn published() -> Outcome {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // A container behind a bridge address of host a, port 8080 published as docker does.
    let container = NetNs::create()?;
    a.run(|| {
        let mut route = Route::open().unwrap();
        let link = route.add_veth("docker0", "eth0", Some(container.as_fd())).unwrap();
        route.add_address(link, ip("172.30.0.1"), 24).unwrap();
        route.set_up(link).unwrap();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    });
    container.run(|| {
        let mut route = Route::open().unwrap();
        let link = route.index("eth0").unwrap();
        route.add_address(link, ip("172.30.0.2"), 24).unwrap();
        route.set_up(link).unwrap();
        route.add_default_route(ip("172.30.0.1")).unwrap();
    })?;
    nft(
        a,
        "add table ip docker; add chain ip docker pre { type nat hook prerouting priority -100; }; \
         add chain ip docker out { type nat hook output priority -100; }; \
         add rule ip docker pre fib daddr type local tcp dport 8080 dnat to 172.30.0.2:80; \
         add rule ip docker out fib daddr type local tcp dport 8080 dnat to 172.30.0.2:80",
    )?;
    let capture = a.install(&RuleConfig::default());
    capture.set_peers(&BTreeSet::from(b.addresses()))?;
    let server = container.run(|| std::net::TcpListener::bind("172.30.0.2:80"))??;
    // From outside, and delivered by us: the container sees the same client.
    let mut direct = b.connect(at(a.v4, 8080))?;
    let (mut served, seen) = accept(&server, PATIENCE).ok_or("the published port does not work")?;
    assert_eq!(seen.ip(), b.v4);
    talk(&mut direct, &mut served)?;
    let mine = a.run(|| runtime.block_on(socket::connect_as(at(b.v4, 0), at(a.v4, 8080), Mark::Service)))?;
    let mut mine = mine.into_std()?;
    mine.set_nonblocking(false)?;
    let (mut served, seen) = accept(&server, PATIENCE).ok_or("not delivered")?;
    assert_eq!(seen.ip(), b.v4);
    talk(&mut mine, &mut served)?;
    assert_eq!(capture.counters()?.leaks_prevented, 0);
    Ok(())
}

/// Runs this whole program again as nobody, who becomes root of a user namespace.
fn unprivileged() -> Outcome {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    // Where nobody can read it.
    let place = tempfile::tempdir()?;
    let program = place.path().join("kernel");
    std::fs::copy(std::env::current_exe()?, &program)?;
    for path in [place.path(), &program] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    let mut command = Command::new(&program);
    command.args(["--test-threads", "2"]).env_remove("MESHD_REQUIRE_ALL").uid(NOBODY).gid(NOBODY).current_dir("/");
    let output = output(&mut command)?;
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    if complained.contains("cannot become root in a new user namespace") {
        eprintln!("SKIPPED in part: this system grants no unprivileged user namespaces");
        return Ok(());
    }
    assert!(output.status.success(), "{said}\n{complained}");
    assert!(said.contains("a_service_sees_its_clients_address"), "{said}");
    Ok(())
}
