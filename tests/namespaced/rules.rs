//! The kernel rules: they come and go without breaking anything, live beside other firewalls, and leave nothing behind.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use meshd::api::State;
use meshd::demo::lab::Host;
use meshd::intercept::netns::NetNs;
use meshd::intercept::rtnetlink::Route;

use crate::support::mesh::{Member, Mesh, SETTLED, Setup, run_on};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::traffic::{Server, ask, connect, connect_within, echo, sockets};
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("rules", older_connections_survive_coming_and_going),
    scenario!("rules", killed_it_leaves_a_working_host_and_a_restart_takes_over, Need::Program("nft")),
    scenario!("rules", a_stop_hands_the_host_back_and_peers_know_at_once),
    scenario!("rules", beside_a_firewall_that_drops_all_but_the_mesh_port, Need::Program("nft")),
    scenario!("rules", beside_a_published_container_port, Need::Program("nft")),
    scenario!("rules", a_foreign_flush_changes_nothing, Need::Program("nft")),
    scenario!("rules", nothing_is_left_behind, Need::Program("nft"), Need::Program("ip")),
];

fn older_connections_survive_coming_and_going() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured("drain = \"1s\"").hosts()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let mut old = Vec::new();
    for address in sockets(mesh.host("b"), 8000) {
        let mut stream = connect(mesh.host("a"), address)?;
        echo(&mut stream, "before there was a mesh")?;
        old.push(stream);
    }
    let mut all_talk = |when: &str| old.iter_mut().try_for_each(|s| echo(s, "still there")).with_context(|| when.to_owned());
    for name in ["a", "b"] {
        mesh.at_mut(name).start()?;
        mesh.at(name).until_answers()?;
        if name == "b" {
            let token = mesh.at("a").token()?;
            mesh.at("b").cli(&["join", &token])?;
        }
        mesh.at(name).until(State::Member)?;
        all_talk("after a daemon started")?;
    }
    mesh.settled()?;
    all_talk("after capture began")?;
    mesh.secured_between("a", "b", 8001)?;
    all_talk("beside secured connections")?;
    mesh.at_mut("a").stop()?;
    all_talk("after one daemon stopped")?;
    mesh.at_mut("b").stop()?;
    all_talk("after both daemons stopped")?;
    drop(server);
    Ok(())
}

fn ask_readable(mesh: &Mesh, client: &str, server: &str, port: u16) -> Result<()> {
    let answering = Server::answering(mesh.host(server), port, "got ")?;
    for address in sockets(mesh.host(server), port) {
        let word = marker("open");
        mesh.readable(&word, || Ok(ask(mesh.host(client), address, &word)?)).with_context(|| format!("{client} to {address}"))?;
    }
    drop(answering);
    Ok(())
}

fn killed_it_leaves_a_working_host_and_a_restart_takes_over() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).outsider("x").start()?;
    mesh.secured_between("a", "b", 8000)?;
    mesh.at_mut("a").kill();
    // The rules went with the process: the permissive host talks plainly, with members and others. What is left, where the kernel can,
    // is the way of replies, which can neither send a connection elsewhere nor end one.
    let left = ruleset(mesh.host("a"))?;
    let tables: Vec<&str> = left.lines().filter(|line| line.starts_with("table ")).collect();
    ensure!(tables.is_empty() || tables == ["table inet meshd_replies {"], "rules of a killed daemon: {left}");
    ensure!(["redirect", "dnat", "reject", "drop"].iter().all(|verb| !left.contains(verb)), "rules of a killed daemon: {left}");
    ask_readable(&mesh, "a", "x", 8001)?;
    ask_readable(&mesh, "x", "a", 8002)?;
    ask_readable(&mesh, "a", "b", 8003)?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("a", "b", 8004)?;
    mesh.secured_between("b", "a", 8005)?;
    ask_readable(&mesh, "x", "a", 8006)?;
    mesh.at_mut("a").kill();
    mesh.at("a").cli(&["cleanup"])?;
    equal!(ruleset(mesh.host("a"))?, "", "rules after cleanup");
    Ok(())
}

fn a_stop_hands_the_host_back_and_peers_know_at_once() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured("drain = \"1s\"").start()?;
    mesh.at_mut("b").stop()?;
    // It said that it stops, so nobody waits for it behind a mesh port that is closed.
    let answering = Server::answering(mesh.host("b"), 8000, "got ")?;
    for address in sockets(mesh.host("b"), 8000) {
        let asked = || Ok(ask(mesh.host("a"), address, "x")?);
        let answer = eventually(Duration::from_secs(5), "a stopped member is an ordinary host", asked)?;
        equal!(answer, "got x", "answer");
    }
    drop(answering);
    ask_readable(&mesh, "b", "a", 8001)?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("a", "b", 8002)
}

fn beside_a_firewall_that_drops_all_but_the_mesh_port() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).outsider("x").start()?;
    mesh.at("b").nft(
        "table inet ufw { chain input { type filter hook input priority 0; policy drop;
           iif lo accept; ct state established,related accept; meta l4proto { icmp, ipv6-icmp } accept;
           tcp dport 6374 accept; udp dport 5353 accept; }; }",
    )?;
    mesh.secured_between("a", "b", 8000)?;
    mesh.secured_between("b", "a", 8001)?;
    let server = Server::answering(mesh.host("b"), 8002, "got ")?;
    for address in sockets(mesh.host("b"), 8002) {
        let dropped = connect_within(mesh.host("x"), address, Duration::from_secs(2));
        ensure!(
            dropped.is_err_and(|e| e.kind() == ErrorKind::TimedOut),
            "the firewall does not drop what others send to {address}"
        );
    }
    drop(server);
    Ok(())
}

/// A container behind a bridge of `host`, and its address.
pub(crate) fn container(host: &Host) -> Result<Host> {
    let netns = NetNs::create()?;
    let mut outer = host.netns().run(Route::open)??;
    let bridge = outer.add_bridge("docker0")?;
    let port = outer.add_veth("veth0", "eth0", Some(netns.as_fd()))?;
    outer.set_master(port, bridge)?;
    outer.add_address(bridge, "172.17.0.1".parse()?, 16)?;
    outer.set_up(port)?;
    outer.set_up(bridge)?;
    let mut inner = netns.run(Route::open)??;
    let index = inner.index("eth0")?;
    inner.add_address(index, "172.17.0.2".parse()?, 16)?;
    inner.set_up(index)?;
    inner.add_default_route("172.17.0.1".parse()?)?;
    host.netns().run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))??;
    host.elsewhere("container", netns, "172.17.0.2".parse()?).context("a directory for the container")
}

fn beside_a_published_container_port() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).outsider("x").start()?;
    let container = container(mesh.host("b"))?;
    mesh.at("b").nft(
        "table ip docker {
           chain prerouting { type nat hook prerouting priority -100; fib daddr type local tcp dport 8080 dnat to 172.17.0.2:80; }
           chain output { type nat hook output priority -100; ip daddr != 127.0.0.0/8 fib daddr type local tcp dport 8080 dnat to 172.17.0.2:80; }
           chain postrouting { type nat hook postrouting priority 100; ip saddr 172.17.0.0/16 oifname != docker0 masquerade; }; }",
    )?;
    let server = Server::answering(&container, 80, "container got ")?;
    let address = sockets(mesh.host("b"), 8080)[0];
    let secret = marker("docker");
    let answer = mesh.encrypted(&secret, || Ok(ask(mesh.host("a"), address, &secret)?))?;
    equal!(answer, format!("container got {secret}"), "answer of the container");
    let seen = server.clients();
    ensure!(seen.iter().all(|c| c.ip() == mesh.host("a").ipv4), "the container sees {seen:?}");
    let secret = marker("docker");
    mesh.readable(&secret, || Ok(ask(mesh.host("x"), address, &secret)?))?;
    // The container itself goes out as it always did.
    let outside = Server::answering(mesh.host("x"), 8001, "got ")?;
    equal!(ask(&container, sockets(mesh.host("x"), 8001)[0], "hello")?, "got hello", "what the container hears");
    drop((server, outside));
    Ok(())
}

fn a_foreign_flush_changes_nothing() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    for name in ["a", "b"] {
        mesh.at(name).nft("flush ruleset")?;
        let rules = ruleset(mesh.host(name))?;
        ensure!(rules.contains("table inet meshd"), "{name} has lost its rules: {rules}");
    }
    mesh.secured_between("a", "b", 8000)?;
    mesh.secured_between("b", "a", 8001)?;
    // Debian's nftables.service does both at its start.
    mesh.at("a").nft("flush ruleset\ntable inet filter { chain input { type filter hook input priority 0; }; }")?;
    mesh.secured_between("a", "b", 8002)
}

fn ruleset(host: &Host) -> Result<String> {
    run_on(host, command("nft").args(["list", "ruleset"]))
}

/// Everything of the host that the daemon might change: firewall, policy rules, routes.
fn state(host: &Host) -> Result<Vec<String>> {
    let ip = |words: &[&str]| -> Result<String> {
        let text = run_on(host, Command::new(command("ip").get_program()).args(words))?;
        // The kernel adds and ages link-local and multicast routes by itself.
        let ours = text.lines().filter(|l| !l.contains("fe80") && !l.contains("multicast") && !l.contains("ff00::/8"));
        Ok(ours.map(str::trim_end).collect::<Vec<_>>().join("\n"))
    };
    Ok(vec![
        ruleset(host)?,
        ip(&["rule"])?,
        ip(&["-6", "rule"])?,
        ip(&["route", "show", "table", "all"])?,
        ip(&["-6", "route", "show", "table", "all"])?,
    ])
}

fn nothing_is_left_behind() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured("drain = \"0s\"").hosts()?;
    let before = state(mesh.host("a"))?;
    mesh.bring_up(Member::start)?;
    mesh.secured_between("b", "a", 8000)?;
    ensure!(state(mesh.host("a"))? != before, "a running daemon shows nowhere: this test would see nothing");
    mesh.at_mut("a").stop()?;
    equal!(state(mesh.host("a"))?, before, "what a stopped daemon leaves");
    // A killed one cannot clean up; `cleanup` can.
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.settled()?;
    mesh.at_mut("a").kill();
    mesh.at("a").cli(&["cleanup"])?;
    equal!(state(mesh.host("a"))?, before, "what cleanup leaves");
    // Strict rules stay when the daemon is killed; that is what they are for.
    mesh.at("a").configure("mode = \"strict\"\ndrain = \"0s\"")?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.settled()?;
    mesh.at_mut("a").kill();
    mesh.at("a").cli(&["cleanup"])?;
    equal!(state(mesh.host("a"))?, before, "what cleanup leaves of strict rules");
    let Ok(()) = eventually(SETTLED, "cleanup may be repeated", || mesh.at("a").cli(&["cleanup"]).map(drop)) else {
        bail!("cleanup of a clean host fails")
    };
    Ok(())
}
