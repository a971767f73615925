//! Who is who on one host: units have their own SVIDs, and a user cannot imitate one.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::Direction;
use meshd::demo::lab::Host;
use meshd::demo::units::Units;

use crate::support::mesh::{Mesh, Setup, run_on};
use crate::support::scenario::{Need, Scenario, scenario};
use crate::support::traffic::sockets;
use crate::support::units::inside;
use crate::support::{equal, eventually, role};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("identities", two_units_of_a_host_are_two_clients, Need::Cgroups),
    scenario!("identities", two_units_of_a_host_are_two_servers, Need::Cgroups),
    scenario!("identities", a_user_imitates_nobody, Need::Cgroups),
];

/// A unit name nobody else uses, now or in a test beside this one.
fn unit(topic: &str, name: &str) -> String {
    format!("meshd-test-{}-{topic}-{name}.service", std::process::id())
}

fn hear(host: &Host, cgroup: &std::path::Path, to: std::net::SocketAddr) -> Result<()> {
    run_on(host, &mut inside(cgroup, &role::listener(to))).map(drop)
}

/// The identities of the clients that `server` saw at `port`.
fn clients(mesh: &Mesh, server: &str, port: u16) -> Result<Vec<String>> {
    let edges = mesh.at(server).edges()?;
    let inbound = edges.iter().filter(|e| e.direction == Direction::Inbound && e.port == port && e.secured);
    let mut ids: Vec<String> = inbound.filter_map(|e| Some(e.client.as_ref()?.workload.to_string())).collect();
    ids.sort();
    ids.dedup();
    Ok(ids)
}

fn two_units_of_a_host_are_two_clients() -> Result<()> {
    let mut units = Units::find().context("no cgroups")?;
    let mesh = Setup::of(&["a", "b"]).start()?;
    let (a, b) = (mesh.host("a"), mesh.host("b"));
    let address = "[::]:8000".parse()?;
    let _server = b.spawn(&mut role::greeter(address, "hi"), "greeter")?;
    let names = ["shop", "backup"].map(|n| unit("clients", n));
    for (name, to) in names.iter().zip(sockets(b, 8000)) {
        let cgroup = units.cgroup(&format!("system.slice/{name}"))?;
        eventually(Duration::from_secs(10), "a unit is served", || hear(a, &cgroup, to))?;
    }
    let expected: Vec<String> = {
        let mut ids: Vec<_> = names.iter().map(|n| format!("/host/a/unit/{n}")).collect();
        ids.sort();
        ids
    };
    eventually(Duration::from_secs(10), "b sees two clients", || {
        equal!(clients(&mesh, "b", 8000)?, expected, "clients that b saw");
        Ok(())
    })?;
    let held: Vec<String> = mesh.at("a").identities()?.iter().map(|i| i.workload.to_string()).collect();
    ensure!(expected.iter().all(|id| held.contains(id)), "a holds only {held:?}");
    Ok(())
}

fn two_units_of_a_host_are_two_servers() -> Result<()> {
    let mut units = Units::find().context("no cgroups")?;
    let mesh = Setup::of(&["a", "b"]).start()?;
    let (a, b) = (mesh.host("a"), mesh.host("b"));
    let names = ["web", "mail"].map(|n| unit("servers", n));
    let mut servers = Vec::new();
    for (name, port) in names.iter().zip([8001, 8002]) {
        let cgroup = units.cgroup(&format!("system.slice/{name}"))?;
        let greeter = role::greeter(format!("[::]:{port}").parse()?, name);
        servers.push(b.spawn(&mut inside(&cgroup, &greeter), name)?);
    }
    for (name, port) in names.iter().zip([8001, 8002]) {
        let expected = format!("/host/b/unit/{name}");
        for to in sockets(b, port) {
            eventually(Duration::from_secs(10), "resolve names the unit", || {
                let resolved = mesh.at("a").resolve(to)?;
                equal!(resolved.id.map(|id| id.workload.to_string()), Some(expected.clone()), "identity expected at {to}");
                Ok(())
            })?;
            // Until it has its certificate its host stands in for it.
            eventually(Duration::from_secs(10), "it shows its own certificate", || {
                let heard = run_on(a, &mut role::listener(to))?;
                equal!(heard.trim(), name, "greeting at {to}");
                let edge = mesh.at("a").edge(Direction::Outbound, to.ip(), port)?;
                let shown = edge.server.map(|id| id.workload.to_string());
                ensure!(edge.secured && shown.as_deref() == Some(expected.as_str()), "{to} showed {shown:?}");
                Ok(())
            })?;
        }
    }
    drop(servers);
    Ok(())
}

fn a_user_imitates_nobody() -> Result<()> {
    let mut units = Units::find().context("no cgroups")?;
    let mesh = Setup::of(&["a", "b"]).start()?;
    let (a, b) = (mesh.host("a"), mesh.host("b"));
    let _server = b.spawn(&mut role::greeter("[::]:8000".parse()?, "hi"), "greeter")?;
    // Subtrees as systemd delegates them to a user, who may make any cgroup below; and one below a unit that delegates.
    let session = format!("user.slice/user-65534.slice/user@65534.service/meshd-test-{}", std::process::id());
    let container = "0123456789abcdef".repeat(4);
    let imitations = [
        format!("{session}/nginx.service"),
        format!("{session}/docker-{container}.scope"),
        format!("{session}/system.slice/nginx.service"),
    ];
    for path in &imitations {
        let cgroup = units.cgroup(path)?;
        eventually(Duration::from_secs(10), "a user is served", || hear(a, &cgroup, sockets(b, 8000)[0]))?;
    }
    let outer = unit("imitation", "outer");
    let cgroup = units.cgroup(&format!("system.slice/{outer}/nginx.service"))?;
    hear(a, &cgroup, sockets(b, 8000)[0])?;
    let seen = eventually(Duration::from_secs(10), "b sees the clients", || {
        let seen = clients(&mesh, "b", 8000)?;
        ensure!(seen.len() >= 2, "only {seen:?}");
        Ok(seen)
    })?;
    equal!(seen.len(), 2, "b saw more than the user and the outer unit: {seen:?}");
    ensure!(seen.contains(&format!("/host/a/unit/{outer}")), "the outer unit is not among {seen:?}");
    ensure!(seen.iter().any(|id| id.starts_with("/host/a/user/")), "the user is not among {seen:?}");
    Ok(())
}
