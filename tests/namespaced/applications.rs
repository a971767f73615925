//! Real programs, unchanged: each talks to itself on another host over IPv4 and IPv6, nothing of it can be read on the link, both
//! ends show the same two SVIDs, and the server sees the client's own address.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::demo::lab::{Host, Process};

use crate::support::mesh::{Mesh, Setup, run_on};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::traffic::addresses;
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("applications", nginx_and_curl, Need::Program("nginx"), Need::Program("curl")),
    scenario!("applications", redis, Need::Program("redis-server"), Need::Program("redis-cli")),
    scenario!(
        "applications",
        mariadb_where_the_server_speaks_first,
        Need::Program("mariadbd"),
        Need::Program("mariadb"),
        Need::Program("mariadb-install-db")
    ),
    scenario!("applications", postgresql, Need::Root, Need::Program("initdb"), Need::Program("postgres"), Need::Program("psql")),
    scenario!("applications", iperf3_moves_gigabytes, Need::Program("iperf3")),
];

/// How long a server may take until it answers.
const START: Duration = Duration::from_secs(60);

fn two() -> Result<Mesh> {
    Setup::of(&["a", "b"]).start()
}

fn directory(host: &Host, name: &str) -> Result<PathBuf> {
    let dir = host.dir().join(name);
    std::fs::create_dir(&dir)?;
    Ok(dir)
}

fn until_listens(host: &Host, port: u16, process: &mut Process) -> Result<()> {
    let done = eventually(START, "the server listens", || {
        ensure!(process.running(), "it ended");
        crate::support::traffic::connect(host, (host.ipv4, port).into())?;
        Ok(())
    });
    done.with_context(|| process.log())
}

fn nginx_and_curl() -> Result<()> {
    let mesh = two()?;
    let (a, b) = (mesh.host("a"), mesh.host("b"));
    let dir = directory(b, "nginx")?;
    let secret = marker("nginx");
    std::fs::write(dir.join("page.txt"), format!("{secret}\n").repeat(20_000))?;
    std::fs::write(
        dir.join("nginx.conf"),
        format!(
            "daemon off; user root; pid {0}/pid; error_log {0}/error.log;
             events {{ worker_connections 512; }}
             http {{ access_log {0}/access.log; client_body_temp_path {0}/t1; proxy_temp_path {0}/t2; fastcgi_temp_path {0}/t3;
               uwsgi_temp_path {0}/t4; scgi_temp_path {0}/t5;
               server {{ listen 0.0.0.0:80; listen [::]:80; root {0}; }} }}",
            dir.display()
        ),
    )?;
    let mut nginx = b.spawn(command("nginx").arg("-p").arg(&dir).arg("-c").arg(dir.join("nginx.conf")), "nginx")?;
    until_listens(b, 80, &mut nginx)?;
    mesh.encrypted(&secret, || {
        for url in [format!("http://{}/page.txt", b.ipv4), format!("http://[{}]/page.txt", b.ipv6)] {
            // Three requests over one connection, then one over another.
            let text = run_on(a, command("curl").args(["--silent", "--fail", "--max-time", "20", &url, &url, &url]))?;
            equal!(text.matches(secret.as_str()).count(), 60_000, "lines of the page over {url}");
            run_on(a, command("curl").args(["--silent", "--fail", "--max-time", "20", "--http1.0", &url]))?;
        }
        Ok(())
    })?;
    mesh.both_ends_agree("a", "b", 80)?;
    let log = std::fs::read_to_string(dir.join("access.log"))?;
    for ip in addresses(a) {
        let lines = log.lines().filter(|l| l.starts_with(&format!("{ip} "))).count();
        equal!(lines, 4, "requests from {ip} in nginx's log");
    }
    Ok(())
}

fn redis() -> Result<()> {
    let mesh = two()?;
    let (a, b) = (mesh.host("a"), mesh.host("b"));
    let dir = directory(b, "redis")?;
    let words = ["--port", "6379", "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "", "--dir"];
    let mut redis = b.spawn(command("redis-server").args(words).arg(&dir), "redis")?;
    until_listens(b, 6379, &mut redis)?;
    let secret = marker("redis");
    mesh.encrypted(&secret, || {
        for ip in addresses(b).map(|ip| ip.to_string()) {
            let ask = |words: &[&str]| run_on(a, command("redis-cli").args(["-h", &ip]).args(words));
            equal!(ask(&["SET", "recipe", &secret])?.trim(), "OK", "SET over {ip}");
            equal!(ask(&["GET", "recipe"])?.trim(), secret, "GET over {ip}");
            let pong = ask(&["-r", "200", "PING"])?;
            equal!(pong.lines().filter(|l| *l == "PONG").count(), 200, "pings over {ip}");
        }
        Ok(())
    })?;
    let clients = run_on(a, command("redis-cli").args(["-h", &b.ipv6.to_string(), "CLIENT", "LIST"]))?;
    ensure!(clients.contains(&format!("addr=[{}]", a.ipv6)), "redis does not see the client's address: {clients}");
    mesh.both_ends_agree("a", "b", 6379)
}

fn mariadb_where_the_server_speaks_first() -> Result<()> {
    let mesh = two()?;
    let (a, b) = (mesh.host("a"), mesh.host("b"));
    let dir = directory(b, "mariadb")?;
    let data = dir.join("data");
    let mut install = command("mariadb-install-db");
    install.args(["--no-defaults", "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"]);
    run_on(b, install.arg(format!("--datadir={}", data.display())))?;
    let init = dir.join("init.sql");
    std::fs::write(
        &init,
        "CREATE DATABASE kitchen;\nCREATE USER 'cook'@'%' IDENTIFIED BY 'salt';\nGRANT ALL ON *.* TO 'cook'@'%';\n",
    )?;
    let mut server = command("mariadbd");
    server.args(["--no-defaults", "--user=root", "--bind-address=*", "--port=3306", "--skip-name-resolve", "--skip-ssl"]);
    server.args(["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"]);
    server.arg(format!("--datadir={}", data.display())).arg(format!("--socket={}", dir.join("sock").display()));
    server.arg(format!("--pid-file={}", dir.join("pid").display())).arg(format!("--init-file={}", init.display()));
    let mut mariadb = b.spawn(&mut server, "mariadb")?;
    until_listens(b, 3306, &mut mariadb)?;
    let secret = marker("mariadb");
    mesh.encrypted(&secret, || {
        for (from, to) in addresses(a).into_iter().zip(addresses(b)) {
            let ask = |sql: &str| {
                let mut client = command("mariadb");
                client.args(["--no-defaults", "--batch", "--skip-column-names", "--skip-ssl", "-ucook", "-psalt"]);
                run_on(a, client.arg(format!("-h{to}")).args(["kitchen", "-e", sql]))
            };
            ask(&format!("CREATE OR REPLACE TABLE t (word TEXT); INSERT INTO t VALUES ('{secret}')"))?;
            equal!(ask("SELECT word FROM t")?.trim(), secret, "the row over {to}");
            equal!(ask("SELECT USER()")?.trim(), format!("cook@{from}"), "the client as MariaDB sees it");
            equal!(ask("SELECT REPEAT('x', 3000000)")?.len(), 3_000_001, "a long answer over {to}");
        }
        Ok(())
    })?;
    mesh.both_ends_agree("a", "b", 3306)
}

fn postgresql() -> Result<()> {
    let mesh = two()?;
    let (a, b) = (mesh.host("a"), mesh.host("b"));
    let dir = directory(b, "postgres")?;
    // It refuses to run as root.
    let nobody = 65_534;
    std::os::unix::fs::chown(&dir, Some(nobody), Some(nobody))?;
    let as_nobody = |program: &str| -> Command {
        use std::os::unix::process::CommandExt;
        let mut command = command(program);
        command.uid(nobody).gid(nobody).current_dir(&dir);
        command
    };
    let data = dir.join("data");
    run_on(b, as_nobody("initdb").args(["--no-sync", "--auth=trust", "--username=cook", "-D"]).arg(&data))?;
    let mut rules = std::fs::File::options().append(true).open(data.join("pg_hba.conf"))?;
    writeln!(rules, "host all all samenet trust")?;
    let mut server = as_nobody("postgres");
    server.arg("-D").arg(&data).arg("-k").arg(&dir).args(["-c", "listen_addresses=*", "-c", "fsync=off", "-p", "5432"]);
    let mut postgres = b.spawn(&mut server, "postgres")?;
    until_listens(b, 5432, &mut postgres)?;
    let secret = marker("postgres");
    let ask = |ip: &str, sql: &str| {
        run_on(a, command("psql").args(["-X", "-q", "-A", "-t", "-h", ip, "-U", "cook", "-d", "postgres", "-c", sql]))
    };
    eventually(START, "PostgreSQL takes questions", || ask(&b.ipv4.to_string(), "SELECT 1"))?;
    mesh.encrypted(&secret, || {
        for (from, to) in addresses(a).into_iter().zip(addresses(b)) {
            let to = to.to_string();
            equal!(ask(&to, &format!("SELECT '{secret}'"))?.trim(), secret, "the row over {to}");
            equal!(ask(&to, "SELECT host(inet_client_addr())")?.trim(), from.to_string(), "the client as PostgreSQL sees it");
            equal!(ask(&to, "SELECT repeat('x', 3000000)")?.trim().len(), 3_000_000, "a long answer over {to}");
        }
        Ok(())
    })?;
    mesh.both_ends_agree("a", "b", 5432)
}

/// How many megabytes the big transfers move, `MESHD_TEST_MEGABYTES`.
pub(crate) fn megabytes() -> u64 {
    std::env::var("MESHD_TEST_MEGABYTES").ok().and_then(|v| v.parse().ok()).unwrap_or(512)
}

fn iperf3_moves_gigabytes() -> Result<()> {
    let mesh = two()?;
    let (a, b) = (mesh.host("a"), mesh.host("b"));
    let mut moved = 0;
    for (ip, reverse) in [(b.ipv4.to_string(), false), (b.ipv6.to_string(), true)] {
        let mut server = b.spawn(command("iperf3").args(["-s", "-1", "-J"]), "iperf3")?;
        // Connecting would be its one client: wait until its port is taken.
        eventually(START, "iperf3 listens", || {
            let table = run_on(b, Command::new("cat").args(["/proc/self/net/tcp", "/proc/self/net/tcp6"]))?;
            // "sl local_address rem_address st ...", st 0A for a socket that listens
            let listens = |line: &str| {
                let words: Vec<&str> = line.split_whitespace().collect();
                matches!(words[..], [_, local, _, "0A", ..] if local.ends_with(&format!(":{:04X}", 5201)))
            };
            ensure!(table.lines().any(listens), "it does not");
            Ok(())
        })?;
        let bytes = (megabytes() << 20).to_string();
        let mut client = command("iperf3");
        client.args(["-c", &ip, "-J", "-n", &bytes, "-P", "4"]).args(reverse.then_some("-R"));
        let seen: serde_json::Value = serde_json::from_str(&run_on(a, &mut client)?)?;
        let (sent, received) = (seen["end"]["sum_sent"]["bytes"].as_u64(), seen["end"]["sum_received"]["bytes"].as_u64());
        let (sent, received) = (sent.context("no bytes sent")?, received.context("no bytes received")?);
        let wanted = megabytes() << 20;
        ensure!(sent >= wanted && received <= sent, "{wanted} wanted, {sent} sent, {received} received");
        // The receiver stops counting when the sender says that it is done: what is in the buffers of four connections then is
        // not counted. That every byte arrives is for `every_byte_arrives_in_order` to show.
        ensure!(received > sent / 2, "{sent} sent, only {received} received");
        moved += received;
        server.wait(Duration::from_secs(10))?.context("the server does not end")?;
        let speed = seen["end"]["sum_received"]["bits_per_second"].as_f64().unwrap_or_default() / 1e9;
        println!("iperf3 over {ip}{}: {} MB at {speed:.2} Gbit/s", if reverse { ", backwards" } else { "" }, sent >> 20);
    }
    mesh.both_ends_agree("a", "b", 5201)?;
    let total: u64 = mesh.at("b").edges()?.iter().filter(|e| e.port == 5201).map(|e| e.bytes_in + e.bytes_out).sum();
    ensure!(total >= moved, "{moved} bytes were received, the edges show only {total}");
    Ok(())
}
