//! The admin port, metrics and logs: what real daemons tell about real traffic.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use meshd::api::{Finding, Level, LogLevel, State};
use meshd::config::ADMIN_PORT;
use meshd::demo::lab::Host;

use crate::support::mesh::{MESHD, Mesh, SHOWN, Setup};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::traffic::{Server, ask, connect, connect_within, echo, sockets};
use crate::support::{equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("admin", metrics_of_both_ends_count_what_was_sent),
    scenario!("admin", every_metric_is_in_the_documentation),
    scenario!("admin", promtool_takes_the_metrics, Need::Program("promtool")),
    scenario!("admin", ready_only_as_a_member_that_captures),
    scenario!("admin", other_hosts_see_the_port_only_when_it_is_opened_and_through_the_mesh),
    scenario!("admin", a_page_in_a_browser_and_other_methods_get_nothing),
    scenario!("admin", the_log_level_is_changed_while_it_runs),
    scenario!("admin", who_is_not_root_may_look_at_the_log_level_only, Need::Root),
    scenario!("admin", lines_for_the_journal_carry_their_level_and_json_is_json),
    scenario!("admin", a_connection_is_one_line_of_the_access_log),
    scenario!("admin", a_port_that_is_taken_is_a_warning),
    scenario!("admin", a_stranger_cannot_flood_the_log),
];

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Asks `host` at `to`: the status and the text of the answer.
fn asked(host: &Host, to: IpAddr, request: &str) -> Result<(u16, String)> {
    let mut stream = connect(host, SocketAddr::new(to, ADMIN_PORT))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer:?}"))?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).with_context(|| format!("no status: {head}"))?;
    Ok((status, body.to_owned()))
}

fn get(host: &Host, path: &str) -> Result<(u16, String)> {
    // Without the pieces of HTTP/1.1, which this reader would have to put together.
    asked(host, LOOPBACK, &format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n"))
}

/// The samples of a host's metrics by name and labels.
fn metrics(host: &Host) -> Result<BTreeMap<String, f64>> {
    let (status, text) = get(host, "/metrics")?;
    equal!(status, 200, "status");
    samples(&text)
}

fn samples(text: &str) -> Result<BTreeMap<String, f64>> {
    let lines = text.lines().filter(|l| !l.starts_with('#'));
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').with_context(|| format!("no sample: {line}"))?;
            Ok((series.to_owned(), value.parse()?))
        })
        .collect()
}

/// The sum of the series of `name` that have all of `labels`.
fn sum(samples: &BTreeMap<String, f64>, name: &str, labels: &[(&str, &str)]) -> f64 {
    let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{v}\"")).collect();
    let name = format!("{name}{{");
    let fits = |series: &str| {
        let Some(inside) = series.strip_prefix(&name).and_then(|s| s.strip_suffix('}')) else { return false };
        let inside: Vec<&str> = inside.split(',').collect();
        labels.iter().all(|l| inside.contains(&l.as_str()))
    };
    samples.iter().filter(|(series, _)| fits(series)).map(|(_, value)| value).sum()
}

/// One connection over which a word of `size` bytes goes there and back, ended by its client.
fn there_and_back(host: &Host, to: SocketAddr, size: usize) -> Result<()> {
    let mut stream = connect(host, to)?;
    echo(&mut stream, &"x".repeat(size))?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    ensure!(rest.is_empty(), "more came back than was sent");
    Ok(())
}

fn metrics_of_both_ends_count_what_was_sent() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    let (a, b) = (mesh.at("a"), mesh.at("b"));
    let to = sockets(b, 8000)[0];
    let server = Server::echo(b, 8000)?;
    for _ in 0..3 {
        there_and_back(a, to, 1000)?;
    }
    let mut held = connect(a, to)?;
    echo(&mut held, "held")?;
    // One way is not the other: six bytes there, nine back.
    let answering = Server::answering(b, 8002, "got ")?;
    equal!(ask(a, sockets(b, 8002)[0], "hello")?, "got hello", "the answer");
    // Nobody listens there.
    let closed = sockets(b, 8001)[0];
    let _ = connect(a, closed).and_then(|mut s| s.read(&mut [0]));

    let edge = a.edge(meshd::api::Direction::Outbound, b.ipv4.into(), 8000)?;
    let client = edge.client.context("no client")?.to_string();
    // The first connection may have met the certificate of the node, later ones that of the service: the workload is the host's.
    let target = to.to_string();
    let (a_ip, b_ip) = (a.ipv4.to_string(), b.ipv4.to_string());
    let out = [("direction", "outbound"), ("peer", "dst"), ("tls", "true"), ("target_addr", target.as_str())];
    let exact = [("target_ip", b_ip.as_str()), ("target_port", "8000"), ("client_id", client.as_str())];
    let out: Vec<_> = out.into_iter().chain(exact).collect();
    let inward = [("direction", "inbound"), ("peer", "src"), ("tls", "true"), ("client_ip", a_ip.as_str())];
    let inward: Vec<_> = inward.into_iter().chain([("target_port", "8000"), ("client_id", client.as_str())]).collect();
    eventually(SHOWN, "both ends have counted", || {
        for (host, labels) in [(a, &out), (b, &inward)] {
            let seen = metrics(host)?;
            let of = |name: &str, labels: &[(&str, &str)]| sum(&seen, name, labels);
            equal!(of("tcp_open_total", labels), 4.0, "opened, {}", host.name);
            equal!(of("tcp_close_total", &[labels.as_slice(), &[("errno", "")]].concat()), 3.0, "ended well, {}", host.name);
            equal!(of("tcp_close_total", labels), 3.0, "ended, {}", host.name);
            equal!(of("tcp_open_connections", labels), 1.0, "open, {}", host.name);
            equal!(of("tcp_read_bytes_total", labels), 3004.0, "bytes from the peer, {}", host.name);
            equal!(of("tcp_write_bytes_total", labels), 3004.0, "bytes to the peer, {}", host.name);
            let lasted = of("tcp_connection_duration_ms_count", &labels[..3]);
            ensure!(lasted >= 3.0, "{lasted} durations on {}", host.name);
            equal!(of("meshd_members", &[("standing", "active")]), 2.0, "members");
            let ends: Vec<f64> = seen.iter().filter(|(s, _)| s.starts_with("identity_cert_exp")).map(|(_, v)| *v).collect();
            ensure!(
                !ends.is_empty() && ends.iter().all(|t| *t > seen["process_start_time_seconds"]),
                "certificates end at {ends:?}"
            );
            equal!((seen["meshd_ready"], seen["meshd_capture_on"], seen["meshd_panics_total"]), (1.0, 1.0, 0.0), "health");
            ensure!(seen["process_resident_memory_bytes"] > 1e6 && seen["process_open_fds"] > 5.0, "no figures of the process");
        }
        for (host, there, back) in
            [(a, "tcp_write_bytes_total", "tcp_read_bytes_total"), (b, "tcp_read_bytes_total", "tcp_write_bytes_total")]
        {
            let (seen, labels) = (metrics(host)?, [("target_port", "8002")]);
            equal!((sum(&seen, there, &labels), sum(&seen, back, &labels)), (6.0, 9.0), "bytes there and back, {}", host.name);
        }
        let seen = metrics(a)?;
        equal!(sum(&seen, "outbound_tcp_errors_total", &[("error", "refused-closed")]), 1.0, "refused ports");
        let closed = closed.to_string();
        let labels = [("target_addr", closed.as_str()), ("errno", "ECONNRESET"), ("reason", "refused-closed")];
        equal!(sum(&seen, "tcp_close_total", &labels), 1.0, "the reset at a closed port");
        ensure!(seen["meshd_captured_connections_total"] >= 5.0, "captured: {}", seen["meshd_captured_connections_total"]);
        ensure!(metrics(b)?["meshd_mesh_connections_total"] >= 5.0, "the mesh port counts nothing");
        Ok(())
    })?;
    // The same in a few words.
    let rows: serde_json::Value = serde_json::from_str(&a.cli(&["stat", "--window", "200ms", "-o", "json"])?)?;
    let of = |port: u16| rows.as_array().and_then(|rows| rows.iter().find(|r| r["port"] == port)).cloned().unwrap_or_default();
    let (fine, refused) = (of(8000), of(8001));
    equal!((&fine["open"], &fine["success_rate"], &fine["peer"]), (&1.into(), &1.0.into(), &"b".into()), "the service in stat");
    ensure!(fine["p50_ms"].is_u64(), "no durations in {fine}");
    equal!(refused["success_rate"], 0.0, "the closed port in stat");
    drop((held, server, answering));
    Ok(())
}

/// `docs/metrics.md` and the daemon agree on the names: nothing is missing on either side.
fn every_metric_is_in_the_documentation() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    there_and_back(mesh.host("a"), sockets(mesh.host("b"), 8000)[0], 10)?;
    // Both kinds of error have a sample each: a's connection to a port nobody listens on is refused by b.
    let _ = connect(mesh.host("a"), sockets(mesh.host("b"), 8001)[0]).and_then(|mut s| s.read(&mut [0]));
    let text = eventually(SHOWN, "an error on both sides", || {
        let texts = ["a", "b"].map(|n| get(mesh.host(n), "/metrics"));
        let text = texts.into_iter().map(|t| Ok(t?.1)).collect::<Result<String>>()?;
        ensure!(text.contains("outbound_tcp_errors_total{") && text.contains("inbound_tcp_errors_total{"), "{text}");
        Ok(text)
    })?;
    let told: std::collections::BTreeSet<&str> =
        text.lines().filter_map(|l| l.strip_prefix("# TYPE ")).filter_map(|l| l.split(' ').next()).collect();
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md"))?;
    let documented: std::collections::BTreeSet<&str> = page
        .lines()
        .filter_map(|l| l.strip_prefix("| `"))
        .filter_map(|l| l.split('`').next())
        .filter(|n| n.contains('_'))
        .collect();
    let (missing, stale): (Vec<_>, Vec<_>) =
        (told.difference(&documented).collect(), documented.difference(&told).filter(|n| !OTHERS.contains(n)).collect());
    ensure!(missing.is_empty() && stale.is_empty(), "not documented: {missing:?}; documented and not there: {stale:?}");
    drop(server);
    Ok(())
}

/// Names in the tables of `docs/metrics.md` that are labels, or fields of the access log.
const OTHERS: [&str; 9] = [
    "client_id",
    "server_id",
    "client_ip",
    "target_addr",
    "target_ip",
    "target_port",
    "no_tls_reason",
    "bytes_in",
    "duration_ms",
];

fn promtool_takes_the_metrics() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    mesh.secured_between("a", "b", 8000)?;
    let _ = connect(mesh.host("a"), sockets(mesh.host("b"), 8001)[0]).and_then(|mut s| s.read(&mut [0]));
    for name in ["a", "b"] {
        let (_, text) = get(mesh.host(name), "/metrics")?;
        ensure!(text.contains("tcp_open_total{"), "no connection in {text}");
        let mut promtool = command("promtool");
        promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = promtool.spawn()?;
        running.stdin.take().context("no standard input")?.write_all(text.as_bytes())?;
        let output = running.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        // Its only remark is about a name of Linkerd's, which dashboards know: 3 means remarks, 1 that it cannot read the text.
        let expected = "tcp_connection_duration_ms metric names should not contain abbreviated units";
        let remarks: Vec<&str> = said.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        ensure!(matches!(output.status.code(), Some(0 | 3)), "promtool ended with {}: {said}", output.status);
        ensure!(remarks.iter().all(|r| *r == expected), "promtool says of {name}: {said}");
    }
    Ok(())
}

fn ready_only_as_a_member_that_captures() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    for name in ["a", "b"] {
        mesh.at_mut(name).start()?;
        mesh.at(name).until(if name == "a" { State::Member } else { State::Pending })?;
    }
    let ready = |mesh: &Mesh, name: &str| get(mesh.host(name), "/ready");
    eventually(SHOWN, "the founder is ready", || {
        equal!(ready(&mesh, "a")?, (200, "ready\n".to_owned()), "/ready");
        Ok(())
    })?;
    let (status, why) = ready(&mesh, "b")?;
    ensure!(status == 503 && why.starts_with("not ready: this host is not a member of a mesh: "), "{status} {why}");
    equal!(get(mesh.host("b"), "/live")?, (200, "live\n".to_owned()), "/live");
    equal!(metrics(mesh.host("b"))?["meshd_ready"], 0.0, "meshd_ready");
    let token = mesh.at("a").token()?;
    mesh.at("b").cli(&["join", &token])?;
    eventually(SHOWN, "ready after the join", || {
        equal!(ready(&mesh, "b")?.0, 200, "/ready");
        Ok(())
    })?;
    equal!(metrics(mesh.host("b"))?["meshd_ready"], 1.0, "meshd_ready");
    mesh.at("b").cli(&["leave", "--yes"])?;
    eventually(SHOWN, "not ready after it left", || {
        let (status, why) = ready(&mesh, "b")?;
        ensure!(status == 503 && why.contains("it left"), "{status} {why}");
        Ok(())
    })
}

fn other_hosts_see_the_port_only_when_it_is_opened_and_through_the_mesh() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).configured_on("b", "admin_address = \"0.0.0.0\"").outsider("x").start()?;
    let request = |name: &str| format!("GET /live HTTP/1.0\r\nHost: {name}\r\n\r\n");
    // From the mesh: secured, with identities at both ends.
    let (a, b) = (mesh.at("a"), mesh.at("b"));
    equal!(asked(a, b.ipv4.into(), &request("b"))?, (200, "live\n".to_owned()), "what a hears of b");
    let edge = a.edge(meshd::api::Direction::Outbound, b.ipv4.into(), ADMIN_PORT)?;
    ensure!(edge.secured && edge.failed == 0, "{edge:?}");
    ensure!(b.edge(meshd::api::Direction::Inbound, a.ipv4.into(), ADMIN_PORT)?.secured, "not secured at b");
    // From elsewhere: as opened.
    equal!(asked(mesh.host("x"), b.ipv4.into(), &request("b.local"))?.0, 200, "what x hears of b");
    // On loopback only, which is what nobody else reaches, through the mesh or not.
    for from in ["b", "x"] {
        let answer = asked(mesh.host(from), a.ipv4.into(), &request("a"));
        ensure!(answer.is_err(), "{from} hears of a: {answer:?}");
    }
    Ok(())
}

fn a_page_in_a_browser_and_other_methods_get_nothing() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let a = mesh.host("a");
    for (request, status) in [
        ("GET /metrics HTTP/1.1\r\nHost: evil.example:6376\r\nConnection: close\r\n\r\n", 421),
        ("GET http://evil.example/metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 421),
        ("PUT /log-level HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nConnection: close\r\n\r\ntrace", 405),
        ("POST /metrics HTTP/1.0\r\n\r\n", 405),
        ("GET /v1/tokens HTTP/1.0\r\n\r\n", 404),
        ("GET /../../etc/shadow HTTP/1.0\r\n\r\n", 404),
        ("GET /log-level HTTP/1.0\r\n\r\n", 200),
    ] {
        equal!(asked(a, LOOPBACK, request)?.0, status, "{request:?}");
    }
    equal!(get(a, "/log-level")?.1, "info\n", "the level after the attempt");
    // A head without an end, and one that is too long.
    let long = format!("GET / HTTP/1.0\r\nX: {}\r\n\r\n", "x".repeat(64 * 1024));
    let answer = asked(a, LOOPBACK, &long);
    ensure!(!matches!(answer, Ok((200, _))), "a head of 64 KiB was taken: {answer:?}");
    let mut slow = connect(a, SocketAddr::new(LOOPBACK, ADMIN_PORT))?;
    slow.write_all(b"GET /live HTTP/1.1\r\n")?;
    let begun = tokio::time::Instant::now();
    let _ = slow.read_to_end(&mut Vec::new());
    ensure!(begun.elapsed() < Duration::from_secs(18), "a head may take {:?}", begun.elapsed());
    // Nobody is kept out by those who only hold the port: they are sent away.
    let _idle: Vec<TcpStream> =
        (0..40).map(|_| connect(a, SocketAddr::new(LOOPBACK, ADMIN_PORT))).collect::<std::io::Result<_>>()?;
    eventually(Duration::from_secs(30), "an answer beside idle connections", || {
        equal!(get(a, "/live")?.0, 200, "/live");
        Ok(())
    })
}

fn the_log_level_is_changed_while_it_runs() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    let (a, b) = (mesh.at("a"), mesh.at("b"));
    let level =
        |words: &[&str]| -> Result<String> { Ok(b.json::<LogLevel>(&[&["log-level"], words].concat())?.level.to_string()) };
    let debugs = || b.log().lines().filter(|l| l.contains("DEBUG")).count();
    let fail = || {
        // Nobody listens there, and b says so at debug.
        let _ = connect_within(a, sockets(b, 8001)[0], Duration::from_secs(5)).and_then(|mut s| s.read(&mut [0]));
    };
    fail();
    equal!((level(&[])?.as_str(), debugs()), ("info", 0), "the level at first, and lines of debug");
    equal!(level(&["debug"])?, "debug", "the level after the change");
    eventually(SHOWN, "lines of debug", || {
        fail();
        ensure!(debugs() > 0, "{}", b.log());
        Ok(())
    })?;
    equal!(get(b, "/log-level")?.1, "debug\n", "the level over HTTP");
    equal!(level(&["info"])?, "info", "the level after the change back");
    std::thread::sleep(Duration::from_millis(300));
    let before = debugs();
    fail();
    std::thread::sleep(Duration::from_secs(1));
    equal!(debugs(), before, "lines of debug after the change back");
    let (ok, _, err) = b.try_cli(&["log-level", "debgu"])?;
    ensure!(!ok && err.contains("did you mean \"debug\""), "{err}");
    Ok(())
}

fn who_is_not_root_may_look_at_the_log_level_only() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let a = mesh.host("a");
    // Nothing but the daemon itself is in the way of another user.
    let lab = a.dir().parent().context("no directory")?;
    for dir in [lab, a.dir(), &a.dir().join("run")] {
        std::fs::set_permissions(dir, Permissions::from_mode(0o755))?;
    }
    let program = a.dir().join("program");
    // By another process: a child that a scenario beside this one is about to start would hold a descriptor that this one writes with, and a program
    // that somebody may write to cannot be run.
    ensure!(Command::new("cp").arg(MESHD).arg(&program).status()?.success(), "no copy of the program");
    let run = |words: &[&str]| -> Result<(Option<i32>, String)> {
        let mut command = a.meshd(&program);
        command.args(words).uid(NOBODY).gid(NOBODY).current_dir("/");
        let output = a.output(&mut command, Duration::from_secs(30))?;
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        Ok((output.status.code(), said.into_owned()))
    };
    equal!(run(&["log-level"])?, (Some(0), "info\n".to_owned()), "what another user sees");
    let (code, said) = run(&["log-level", "trace"])?;
    ensure!(code == Some(4) && said.contains("not allowed"), "{code:?} {said}");
    equal!(get(a, "/log-level")?.1, "info\n", "the level after the attempt");
    Ok(())
}

/// A user who is not root.
const NOBODY: u32 = 65534;

fn lines_for_the_journal_carry_their_level_and_json_is_json() -> Result<()> {
    let mesh = Setup::of(&["a"]).hosts()?;
    let a = mesh.at("a");
    for (form, journal) in [("text", true), ("text", false), ("json", false), ("json", true)] {
        let name = format!("{form}-{journal}");
        let path = a.dir().join(format!("{name}.log"));
        std::fs::write(&path, "")?;
        let file = std::fs::metadata(&path)?;
        // Somebody else's stream is not the journal, though the variable is inherited.
        let inode = if journal { file.ino() } else { file.ino() + 1 };
        let mut command = a.meshd(std::path::Path::new(MESHD));
        command.args(["run", "--log-format", form]).env("JOURNAL_STREAM", format!("{}:{inode}", file.dev()));
        let mut daemon = a.spawn(&mut command, &name)?;
        a.until(State::Member)?;
        ensure!(daemon.stop(Duration::from_secs(45))?.is_some_and(|s| s.success()), "the daemon ended badly");
        let log = std::fs::read_to_string(&path)?;
        ensure!(log.lines().count() >= 3, "hardly a line in {log:?}");
        for line in log.lines() {
            let bare = line.strip_prefix("<6>").or_else(|| line.strip_prefix("<4>"));
            equal!(bare.is_some(), journal, "a priority in {line:?}");
            let bare = bare.unwrap_or(line);
            if form == "json" {
                let line: serde_json::Value = serde_json::from_str(bare).with_context(|| format!("no JSON: {bare}"))?;
                for field in ["timestamp", "level", "message", "target"] {
                    ensure!(line[field].is_string(), "no {field} in {bare}");
                }
            } else {
                equal!(bare.starts_with("meshd::"), journal, "neither time nor level in {line:?}");
            }
        }
    }
    Ok(())
}

fn a_connection_is_one_line_of_the_access_log() -> Result<()> {
    let forms =
        Setup::of(&["a", "b", "c"]).configured_on("a", "access_log = \"json\"").configured_on("b", "access_log = \"text\"");
    let mut mesh = forms.start()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let to = sockets(mesh.host("b"), 8000)[0];
    let mut stream = connect(mesh.host("a"), to)?;
    let from = stream.local_addr()?;
    echo(&mut stream, "twelve bytes")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let _ = stream.read_to_end(&mut Vec::new());
    let _ = connect(mesh.host("a"), sockets(mesh.host("b"), 8001)[0]).and_then(|mut s| s.read(&mut [0]));
    there_and_back(mesh.host("c"), to, 5)?;

    let line = eventually(SHOWN, "the line at a", || {
        let log = mesh.at("a").log();
        let line = log.lines().find(|l| l.contains("\"duration_ms\"") && l.contains(&format!("{to}\"")));
        line.map(str::to_owned).with_context(|| format!("none in {log}"))
    })?;
    let line: serde_json::Value = serde_json::from_str(&line)?;
    let ends = (line["client"].as_str(), line["server"].as_str(), line["direction"].as_str());
    equal!(ends, (Some(from.to_string().as_str()), Some(to.to_string().as_str()), Some("outbound")), "from where to where");
    equal!((&line["bytes_in"], &line["bytes_out"], &line["secured"]), (&12.into(), &12.into(), &true.into()), "what passed");
    ensure!(line["reason"].is_null() && line["duration_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{line}");
    for id in ["client_id", "server_id"] {
        ensure!(line[id].as_str().is_some_and(|id| id.starts_with("spiffe://")), "{line}");
    }
    eventually(SHOWN, "the refusal at a", || {
        ensure!(mesh.at("a").log().contains("\"reason\":\"refused-closed\""), "{}", mesh.at("a").log());
        Ok(())
    })?;
    let from_c = mesh.host("c").ipv4.to_string();
    eventually(SHOWN, "the lines at b", || {
        let log = mesh.at("b").log();
        let lines: Vec<&str> = log.lines().filter(|l| l.starts_with("access ") && l.contains("direction=inbound")).collect();
        equal!(lines.len(), 3, "lines in {log}");
        let c = lines.iter().find(|l| l.contains(&format!(" client={from_c}:"))).context("nothing of c")?;
        for part in [&format!(" server={to} "), " bytes_in=5 bytes_out=5 ", " secured=true ", " reason=-"] {
            ensure!(c.contains(part), "no {part:?} in {c}");
        }
        Ok(())
    })?;
    ensure!(!mesh.at("c").log().contains("duration_ms"), "the access log is not off by default");
    // What was said last is not lost when the daemon stops.
    let mut last = connect(mesh.host("a"), to)?;
    echo(&mut last, "unfinished")?;
    let before = mesh.at("a").log().matches("\"duration_ms\"").count();
    drop(server);
    drop(last);
    mesh.at_mut("a").stop()?;
    equal!(mesh.at("a").log().matches("\"duration_ms\"").count(), before + 1, "lines after the stop");
    Ok(())
}

fn a_port_that_is_taken_is_a_warning() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    let squatter = Server::on(mesh.host("a"), SocketAddr::new(LOOPBACK, ADMIN_PORT), |_| Ok(()))?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let finding = eventually(SHOWN, "a finding", || {
        let (_, out, _) = mesh.at("a").try_cli(&["check", "-o", "json"])?;
        let findings: Vec<Finding> = serde_json::from_str(&out)?;
        let ports = findings.into_iter().find(|f| f.code == "check-port-admin" && f.level == Level::Warn);
        ports.with_context(|| format!("none in {out}"))
    })?;
    ensure!(finding.detail.as_ref().is_some_and(|d| d.contains("127.0.0.1:6376")), "{finding:?}");
    ensure!(mesh.at("a").log().contains("the admin port cannot be opened"), "nothing in the log");
    drop(squatter);
    eventually(Duration::from_secs(30), "the port is opened when it is free", || match get(mesh.host("a"), "/live") {
        Ok((200, _)) => Ok(()),
        other => bail!("{other:?}"),
    })?;
    let (_, out, _) = mesh.at("a").try_cli(&["check", "-o", "json"])?;
    let findings: Vec<Finding> = serde_json::from_str(&out)?;
    ensure!(!findings.iter().any(|f| f.code == "check-port-admin" && f.level != Level::Ok), "{out}");
    Ok(())
}

fn a_stranger_cannot_flood_the_log() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let token = mesh.at("a").token()?;
    let tokens: Vec<meshd::api::TokenInfo> = mesh.at("a").json(&["token", "list"])?;
    for token in &tokens {
        mesh.at("a").cli(&["token", "revoke", &token.id])?;
    }
    let begun = tokio::time::Instant::now();
    for _ in 0..40 {
        let (ok, out, err) = mesh.at("b").try_cli(&["join", &token])?;
        ensure!(!ok, "a revoked token was taken: {out}{err}");
    }
    // A burst of twenty, and one more for each minute that this took.
    let most = 20 + usize::try_from(begun.elapsed().as_secs() / 60)?;
    let lines = mesh.at("a").log().lines().filter(|l| l.contains("a join failed")).count();
    ensure!((1..=most).contains(&lines), "{lines} lines of 40 attempts");
    let left_out = metrics(mesh.host("a"))?["meshd_log_lines_left_out_total"];
    equal!(left_out, (40 - lines) as f64, "lines that were left out");
    Ok(())
}
