//! Addresses as small networks have them: renumbered by DHCP, temporary and deprecated IPv6 ones, two in one subnet.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::State;
use meshd::intercept::rtnetlink::Route;
use std::os::fd::AsFd;

use super::network::ip;
use super::{secured, trio};
use crate::support::mesh::{Mesh, SETTLED};
use crate::support::scenario::{Need, Scenario, scenario};
use crate::support::ssh::Ssh;
use crate::support::traffic::{Server, addresses, ask, connect, connect_within, echo, sockets};
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("edge", renumbered_while_connections_come_and_go),
    scenario!("edge", temporary_and_deprecated_ipv6_addresses, Need::Program("ip")),
    scenario!("edge", two_interfaces_in_one_subnet),
];

/// One question and answer to each of these addresses of the member `server`, secured.
fn secured_at(mesh: &Mesh, client: &str, server: &str, ips: &[IpAddr], port: u16) -> Result<()> {
    mesh.at(client).until_captured(server, ips)?;
    let word = marker("address");
    let answering = Server::answering(mesh.host(server), port, "got ")?;
    mesh.encrypted(&word, || {
        for ip in ips {
            let address = SocketAddr::new(*ip, port);
            // The neighbours take a moment to notice who has an address now.
            let asked = || Ok(ask(mesh.host(client), address, &word)?);
            equal!(eventually(SETTLED, "an answer", asked)?, format!("got {word}"), "answer of {address}");
        }
        Ok(())
    })?;
    drop(answering);
    Ok(())
}

fn renumbered_while_connections_come_and_go() -> Result<()> {
    let mesh = trio().start()?;
    let mut ssh = Ssh::open(&mesh)?;
    let server = Server::answering(mesh.host("b"), 8000, "got ")?;
    let (all, got, end) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let word = marker("renumbered");
    let old = addresses(mesh.host("b"));
    let new: [IpAddr; 2] = ["192.168.77.102".parse()?, "fd77::102".parse()?];
    // The client tries every address, always: what is strict must not hear a word of it in the clear, wherever it is just now.
    let ((), report) = mesh.watched(&[&word], || {
        std::thread::scope(|scope| {
            let clients: Vec<_> = old
                .iter()
                .chain(&new)
                .map(|ip| {
                    let (address, client) = (SocketAddr::new(*ip, 8000), mesh.host("a"));
                    let (all, got, end, word) = (&all, &got, &end, &word);
                    scope.spawn(move || {
                        while !end.load(Ordering::Relaxed) {
                            all.fetch_add(1, Ordering::Relaxed);
                            let answer = connect_within(client, address, Duration::from_millis(500)).and_then(|mut stream| {
                                use std::io::{Read, Write};
                                stream.set_read_timeout(Some(Duration::from_secs(2)))?;
                                stream.write_all(format!("{word}\n").as_bytes())?;
                                let mut text = String::new();
                                stream.read_to_string(&mut text)?;
                                Ok(text)
                            });
                            if answer.is_ok_and(|text| text == format!("got {word}")) {
                                got.fetch_add(1, Ordering::Relaxed);
                            }
                            std::thread::sleep(Duration::from_millis(20));
                        }
                    })
                })
                .collect();
            let moved = (|| {
                for (from, to) in [(old, new), (new, old)] {
                    std::thread::sleep(Duration::from_secs(1));
                    for (gone, came) in from.into_iter().zip(to) {
                        mesh.host("b").delete_address(gone)?;
                        mesh.host("b").add_address(came)?;
                    }
                    mesh.at("a").until_captured("b", &to)?;
                    let before = got.load(Ordering::Relaxed);
                    eventually(SETTLED, "connections arrive at the new addresses", || {
                        ensure!(got.load(Ordering::Relaxed) > before + 4);
                        Ok(())
                    })?;
                }
                anyhow::Ok(())
            })();
            end.store(true, Ordering::Relaxed);
            for client in clients {
                let _ = client.join();
            }
            moved
        })
    })?;
    equal!(report.hits[0], 0, "frames with what was meant for b, of {} tries", all.into_inner());
    drop(server);
    // The sessions at b went with its address and are back at the same one: TCP outlasts that.
    ssh.goes_on()?;
    ssh.is_open(&mesh)?;
    // The permissive one moves, too.
    let moved: IpAddr = "192.168.77.101".parse()?;
    mesh.host("a").delete_address(mesh.host("a").ipv4.into())?;
    mesh.host("a").add_address(moved)?;
    ssh.forget("a");
    secured_at(&mesh, "b", "a", &[moved], 8010)?;
    ssh.is_open_at(&mesh, &[(mesh.host("b"), moved), (mesh.host("x"), moved)])?;
    ssh.goes_on()
}

fn temporary_and_deprecated_ipv6_addresses() -> Result<()> {
    let mesh = trio().start()?;
    let mut ssh = Ssh::open(&mesh)?;
    // What a router advertisement does on a desktop: a lasting address, and temporary ones beside it that go out.
    mesh.host("a").within(|| std::fs::write("/proc/sys/net/ipv6/conf/eth0/use_tempaddr", "2"))??;
    ip(&mesh, "a", &["-6", "addr", "del", "fd77::1/64", "dev", "eth0"])?;
    ip(
        &mesh,
        "a",
        &["-6", "addr", "add", "fd77::1/64", "dev", "eth0", "mngtmpaddr", "preferred_lft", "3600", "valid_lft", "7200"],
    )?;
    let temporary = eventually(SETTLED, "the kernel makes a temporary address", || {
        let text = ip(&mesh, "a", &["-6", "-o", "addr", "show", "dev", "eth0", "temporary"])?;
        let word = text.split_whitespace().find(|w| w.contains("/64")).with_context(|| text.clone())?;
        Ok(word.trim_end_matches("/64").parse::<IpAddr>()?)
    })?;
    mesh.at("b").until_captured("a", &[mesh.host("a").ipv6.into(), temporary])?;
    // Out of it, and in to it.
    let server = Server::echo(mesh.host("b"), 8000)?;
    let mut out = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[1])?;
    equal!(out.local_addr()?.ip(), temporary, "the address that a uses");
    echo(&mut out, "out of a temporary address")?;
    let seen = server.clients();
    ensure!(seen.iter().any(|c| c.ip() == temporary), "b sees {seen:?}");
    secured_at(&mesh, "b", "a", &[temporary], 8001)?;
    // It is deprecated: nothing new goes out from it, but it is there, and others still know it.
    let address = format!("{temporary}/64");
    ip(&mesh, "a", &["-6", "addr", "change", &address, "dev", "eth0", "preferred_lft", "0", "valid_lft", "3600"])?;
    let shown = ip(&mesh, "a", &["-6", "addr", "show", "dev", "eth0", "deprecated"])?;
    ensure!(shown.contains(&temporary.to_string()), "it is not deprecated: {shown}");
    // More than the others take to hear of a change.
    std::thread::sleep(Duration::from_secs(4));
    echo(&mut out, "still")?;
    secured_at(&mesh, "b", "a", &[temporary], 8002)?;
    ssh.goes_on()?;
    ssh.is_open_at(&mesh, &[(mesh.host("b"), temporary), (mesh.host("x"), temporary)])?;
    // Gone.
    ip(&mesh, "a", &["-6", "addr", "del", &address, "dev", "eth0"])?;
    eventually(SETTLED, "it is released", || {
        ensure!(!mesh.at("b").captured("a")?.contains(&temporary));
        Ok(())
    })?;
    drop(server);
    // Whichever temporary address it uses by now.
    secured_at(&mesh, "a", "b", &addresses(mesh.host("b")), 8010)?;
    secured_at(&mesh, "b", "a", &addresses(mesh.host("a")), 8011)?;
    ssh.goes_on()?;
    ssh.is_open(&mesh)
}

fn two_interfaces_in_one_subnet() -> Result<()> {
    let mut mesh = trio().hosts()?;
    // Ethernet and Wi-Fi of one host, both in the switch.
    let second: [IpAddr; 2] = ["192.168.77.52".parse()?, "fd77::52".parse()?];
    let b = mesh.host("b").clone();
    mesh.lab().switch().run(|| -> Result<()> {
        let mut route = Route::open()?;
        let port = route.add_veth("second", "wlan0", Some(b.netns().as_fd()))?;
        let bridge = route.index("br0")?;
        route.set_master(port, bridge)?;
        Ok(route.set_up(port)?)
    })??;
    b.within(|| -> Result<()> {
        let mut route = Route::open()?;
        let wlan = route.index("wlan0")?;
        route.add_address(wlan, second[0], 24)?;
        route.add_address(wlan, second[1], 64)?;
        Ok(route.set_up(wlan)?)
    })??;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Pending)?;
    super::admit(&mesh, "b", &["--hint", "192.0.2.1:6374"])?;
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    secured_at(&mesh, "a", "b", &second, 8010)?;
    let doors: Vec<_> = second.iter().map(|ip| (mesh.host("x"), *ip)).collect();
    ssh.is_open_at(&mesh, &doors)?;
    // One of the two goes away and comes back.
    let wlan = |up| -> Result<()> {
        b.within(|| -> Result<()> {
            let mut route = Route::open()?;
            let wlan = route.index("wlan0")?;
            if up {
                route.set_up(wlan)?
            } else {
                route.set_down(wlan)?
            }
            Ok(())
        })?
    };
    wlan(false)?;
    eventually(SETTLED, "its addresses are released", || {
        let captured = mesh.at("a").captured("b")?;
        ensure!(second.iter().all(|ip| !captured.contains(ip)), "{captured:?}");
        Ok(())
    })?;
    secured(&mesh, 8020)?;
    wlan(true)?;
    secured_at(&mesh, "a", "b", &second[..1], 8030)?;
    let changes = mesh.at("b").log().matches("addresses of this host changed").count();
    ensure!(changes < 12, "b told of {changes} changes of its addresses: {}", mesh.at("b").log());
    ssh.goes_on()?;
    ssh.is_open(&mesh)
}
