//! `meshd check`: a healthy pair is green, and whatever is broken for real is named, with nothing else beside it.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{Finding, Level, State, code};
use meshd::intercept::rtnetlink::{LOOPBACK, Route};
use tokio::time::Instant;

use crate::breakages::named;
use crate::rules::container;
use crate::support::mesh::{MESHD, Member, Mesh, SETTLED, Setup};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::traffic::{Server, ask, connect, echo, sockets};
use crate::support::{equal, eventually};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("checks", a_healthy_pair_is_green_within_two_seconds),
    scenario!("checks", before_the_first_start),
    scenario!("checks", waiting_until_nothing_fails),
    scenario!("checks", capabilities_by_name, Need::Program("setpriv")),
    scenario!("checks", ports_that_others_have),
    scenario!("checks", loopback_and_the_lan_are_down),
    scenario!("checks", a_range_of_source_ports_that_takes_ours),
    scenario!("checks", sysctls_that_matter_and_that_do_not),
    scenario!("checks", rules_that_somebody_changes),
    scenario!("checks", what_a_killed_daemon_leaves),
    scenario!("checks", firewalls, Need::Program("nft")),
    scenario!("checks", the_state_directory),
    scenario!("checks", a_full_and_a_read_only_disk, Need::Program("unshare"), Need::Program("mount")),
    scenario!("checks", no_member_yet_and_no_member_any_more),
    scenario!("checks", members_that_do_not_answer),
    scenario!("checks", members_that_differ),
    scenario!("checks", certificates_that_nobody_renews),
    scenario!("checks", traffic_that_is_not_covered),
    scenario!("checks", plaintext_of_a_member),
    scenario!("checks", containers),
    scenario!("checks", another_mesh_on_the_lan),
    scenario!("checks", another_daemon_on_this_host),
    scenario!("checks", limits_and_strangers_at_the_door, Need::Program("prlimit")),
];

/// What `check` with these words finds on a host, whatever its exit status.
pub(crate) fn check(member: &Member, words: &[&str]) -> Result<Vec<Finding>> {
    let (ok, out, err) = member.try_cli(&[&["check", "-o", "json"], words].concat())?;
    let found: Vec<Finding> = serde_json::from_str(&out).with_context(|| format!("check printed {out}{err}"))?;
    equal!(ok, found.iter().all(|f| f.level != Level::Fail), "the exit status of {found:#?}");
    Ok(found)
}

/// The codes of what is not well.
fn ill(found: &[Finding]) -> BTreeSet<&str> {
    found.iter().filter(|f| f.level != Level::Ok).map(|f| f.code.as_str()).collect()
}

/// Exactly these codes are not well, and all others are.
fn exactly(found: &[Finding], codes: &[&str], what: &str) -> Result<()> {
    equal!(ill(found), codes.iter().copied().collect::<BTreeSet<&str>>(), "{what}");
    named(codes.iter().copied());
    Ok(())
}

/// Waits until exactly these codes are not well, and all others are.
pub(crate) fn only(member: &Member, words: &[&str], codes: &[&str]) -> Result<Vec<Finding>> {
    let wanted: BTreeSet<&str> = codes.iter().copied().collect();
    eventually(SETTLED, &format!("check on {} names {codes:?} alone", member.name), || {
        let found = check(member, words)?;
        let bad: Vec<&Finding> = found.iter().filter(|f| f.level != Level::Ok).collect();
        ensure!(ill(&found) == wanted, "it names {bad:#?}");
        named(codes.iter().copied());
        Ok(found)
    })
}

/// Waits until these codes are among what is not well.
pub(crate) fn among(member: &Member, codes: &[&str]) -> Result<Vec<Finding>> {
    eventually(SETTLED, &format!("check on {} names {codes:?}", member.name), || {
        let found = check(member, &[])?;
        let bad = ill(&found);
        ensure!(codes.iter().all(|c| bad.contains(c)), "it names {bad:?}");
        named(codes.iter().copied());
        Ok(found)
    })
}

fn level_of(found: &[Finding], code: &str) -> Option<Level> {
    found.iter().filter(|f| f.code == code).map(|f| f.level).max()
}

pub(crate) fn detail_of<'a>(found: &'a [Finding], code: &str) -> &'a str {
    let ill = found.iter().filter(|f| f.code == code).max_by_key(|f| f.level);
    ill.and_then(|f| f.detail.as_deref()).unwrap_or_default()
}

fn a_healthy_pair_is_green_within_two_seconds() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    for name in ["a", "b"] {
        let found = only(mesh.at(name), &[], &[])?;
        let seen: BTreeSet<&str> = found.iter().map(|f| f.code.as_str()).collect();
        // A daemon is not asked what only a command has to find out, and a mesh without a fleet token not about its fleet.
        let missing: Vec<&&str> = code::ALL.iter().filter(|c| !seen.contains(**c)).collect();
        // Only the founder is asked where the recovery key is.
        let mut unasked = vec![&code::LEFTOVERS, &code::FLEET_TOKEN, &code::ENROLLMENT];
        if name != "a" {
            unasked.insert(1, &code::RECOVERY_KEY);
        }
        equal!(missing, unasked, "what was not looked at");
        // The machine may be busy with other tests: the best of a few counts.
        let took = (0..5).map(|_| {
            let begun = Instant::now();
            Ok((mesh.at(name).cli(&["check", "-o", "short"])?, begun.elapsed()))
        });
        let took: Vec<(String, Duration)> = took.collect::<Result<_>>()?;
        let well = took.iter().filter(|(out, _)| out == "all is well\n").map(|(_, took)| *took);
        let best = well.min().with_context(|| format!("the short form: {took:?}"))?;
        println!("check on {name}: {best:?} with {} findings", found.len());
        ensure!(best < Duration::from_secs(2), "{best:?}");
    }
    Ok(())
}

fn before_the_first_start() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    only(mesh.at("a"), &["--pre"], &[])?;
    ensure!(!mesh.at("a").dir().join("state").exists(), "a look has made the state directory");
    // Without a daemon the same is looked at, beside the finding that there is none.
    let found = only(mesh.at("a"), &[], &[code::DAEMON])?;
    ensure!(found.iter().any(|f| f.code == code::NFT_REDIRECT), "only {found:#?}");
    // With one, its ports are taken and its rules are there: it is no first start.
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let found = check(mesh.at("a"), &["--pre"])?;
    exactly(&found, &[code::OTHER_MESHD, code::PORT_CAPTURE, code::PORT_MESH, code::PORT_ADMIN], "with a daemon")?;
    ensure!(detail_of(&found, code::PORT_MESH).contains("meshd (pid "), "{found:#?}");
    Ok(())
}

fn waiting_until_nothing_fails() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    let begun = Instant::now();
    let (ok, ..) = mesh.at("a").try_cli(&["check", "--wait", "2s"])?;
    ensure!(!ok && begun.elapsed() >= Duration::from_secs(2), "it did not wait: {:?}", begun.elapsed());
    let mut waiting = mesh.at("a").meshd(Path::new(MESHD));
    waiting.args(["check", "-o", "short", "--wait", "30s"]);
    let mut waiting = mesh.at("a").spawn(&mut waiting, "waiting")?;
    std::thread::sleep(Duration::from_millis(1500));
    ensure!(waiting.running(), "it gave up: {}", waiting.log());
    mesh.at_mut("a").start()?;
    let status = waiting.wait(Duration::from_secs(40))?;
    ensure!(status.is_some_and(|s| s.success()), "{status:?}: {}", waiting.log());
    // Progress is for terminals.
    equal!(waiting.log(), "all is well\n", "what it printed");
    Ok(())
}

fn capabilities_by_name() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    let without = |mesh: &Mesh, bounds: &str| -> Result<Vec<Finding>> {
        let mut asked = mesh.at("a").meshd(command("setpriv").get_program().as_ref());
        asked.args([&format!("--bounding-set={bounds}"), "--", MESHD, "check", "--pre", "-o", "json"]);
        let output = mesh.at("a").output(&mut asked, Duration::from_secs(30))?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
    };
    // CAP_NET_RAW alone would be enough for transparent sockets. What only CAP_NET_ADMIN may ask is not known, and not guessed.
    let found = without(&mesh, "-net_admin,-net_raw")?;
    let unknown = [code::KERNEL, code::LEFTOVERS, code::FIREWALL_PORT, code::TRANSPARENT];
    exactly(&found, &[&[code::CAP_NET_ADMIN], &unknown[..]].concat(), "without CAP_NET_ADMIN")?;
    equal!(level_of(&found, code::CAP_NET_ADMIN), Some(Level::Fail), "the level of it");
    equal!(level_of(&found, code::KERNEL), Some(Level::Warn), "what is not known");
    exactly(&without(&mesh, "-net_bind_service")?, &[code::CAP_NET_BIND_SERVICE], "without one")?;
    // A daemon says it of itself.
    mesh.at_mut("a").start_through("setpriv", &["--bounding-set=-net_bind_service,-dac_read_search", "--"])?;
    mesh.at("a").until(State::Member)?;
    only(mesh.at("a"), &[], &[code::CAP_NET_BIND_SERVICE, code::CAP_DAC_READ_SEARCH])?;
    Ok(())
}

fn ports_that_others_have() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).configured("admin_port = 7003").hosts()?;
    let taken = |port| mesh.host("a").within(|| TcpListener::bind(("127.0.0.1", port)));
    let (capture, admin) = (taken(6375)??, taken(7003)??);
    let found = only(mesh.at("a"), &["--pre"], &[code::PORT_CAPTURE, code::PORT_ADMIN])?;
    let own = format!("(pid {})", std::process::id());
    ensure!(detail_of(&found, code::PORT_CAPTURE).contains(&own), "the program is not named: {found:#?}");
    equal!(level_of(&found, code::PORT_ADMIN), Some(Level::Warn), "the admin port can be done without");
    drop(capture);
    let mesh_port = taken(6374)??;
    only(mesh.at("a"), &["--pre"], &[code::PORT_MESH, code::PORT_ADMIN])?;
    drop(mesh_port);
    drop(admin);
    // The same port of multicast DNS, by somebody who does not share it.
    let responder = mesh.host("a").within(|| UdpSocket::bind("0.0.0.0:5353"))??;
    let found = only(mesh.at("a"), &["--pre"], &[code::RESPONDER])?;
    ensure!(detail_of(&found, code::RESPONDER).contains(&own), "{found:#?}");
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    only(mesh.at("a"), &[], &[code::RESPONDER])?;
    drop(responder);
    Ok(())
}

fn loopback_and_the_lan_are_down() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).hosts()?;
    mesh.host("a").within(|| Route::open()?.set_down(LOOPBACK))??;
    only(mesh.at("a"), &["--pre"], &[code::LOOPBACK])?;
    mesh.host("a").within(|| Route::open()?.set_up(LOOPBACK))??;
    only(mesh.at("a"), &["--pre"], &[])?;
    mesh.host("b").link_down()?;
    only(mesh.at("b"), &["--pre"], &[code::MDNS])?;
    let mut mesh = Setup::of(&["c"]).hosts()?;
    mesh.at_mut("c").start()?;
    mesh.at("c").until(State::Member)?;
    mesh.host("c").link_down()?;
    mesh.host("c").delete_address(mesh.host("c").ipv4.into())?;
    only(mesh.at("c"), &[], &[code::MDNS, code::ADDRESS_OWN])?;
    Ok(())
}

fn set(mesh: &Mesh, host: &str, name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{}", name.replace('.', "/"));
    mesh.host(host).within(|| std::fs::write(&path, value))?.with_context(|| format!("{path} = {value}"))
}

fn a_range_of_source_ports_that_takes_ours() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    set(&mesh, "a", "ipv4.ip_local_port_range", "1024 65535")?;
    only(mesh.at("a"), &[], &[code::PORT_RANGE])?;
    set(&mesh, "a", "ipv4.ip_local_reserved_ports", "6374-6376")?;
    only(mesh.at("a"), &[], &[])?;
    Ok(())
}

/// Settings that people change for proxies and routers, in every combination that has a reason to hurt: none does, so none is
/// checked. One does, and is.
fn sysctls_that_matter_and_that_do_not() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    let settings: [&[(&str, &str)]; 6] = [
        &[("rp_filter", "1")],
        &[("rp_filter", "2"), ("accept_local", "0")],
        &[("rp_filter", "1"), ("src_valid_mark", "1")],
        &[("rp_filter", "0"), ("route_localnet", "1"), ("src_valid_mark", "0")],
        &[("forwarding", "1"), ("accept_local", "1"), ("route_localnet", "0")],
        &[("forwarding", "0"), ("send_redirects", "0"), ("accept_redirects", "0"), ("log_martians", "1")],
    ];
    for (number, set_of) in (0u16..).zip(settings) {
        for host in ["a", "b"] {
            for (name, value) in set_of {
                for interface in ["all", "lo", "eth0"] {
                    set(&mesh, host, &format!("ipv4.conf.{interface}.{name}"), value)?;
                }
            }
            let (odd, even) = (number % 2, 1 - number % 2);
            for (name, value) in [("ip_nonlocal_bind", odd), ("fwmark_reflect", odd), ("ip_early_demux", even)] {
                set(&mesh, host, &format!("ipv4.{name}"), &value.to_string())?;
            }
        }
        mesh.secured_between("a", "b", 8000 + number).with_context(|| format!("with {set_of:?}"))?;
        mesh.secured_between("b", "a", 8100 + number).with_context(|| format!("with {set_of:?}"))?;
    }
    only(mesh.at("a"), &[], &[])?;
    set(&mesh, "b", "ipv4.tcp_fwmark_accept", "1")?;
    only(mesh.at("b"), &[], &[code::FWMARK_ACCEPT])?;
    let server = Server::answering(mesh.host("b"), 8200, "got ")?;
    let asked = ask(mesh.host("a"), sockets(mesh.host("b"), 8200)[0], "x");
    ensure!(asked.is_err(), "it makes no difference any more, and need not be checked: {asked:?}");
    set(&mesh, "b", "ipv4.tcp_fwmark_accept", "0")?;
    only(mesh.at("b"), &[], &[])?;
    // A port that was just found closed is refused for a moment.
    let asked = || Ok(ask(mesh.host("a"), sockets(mesh.host("b"), 8200)[0], "x")?);
    equal!(eventually(SETTLED, "the service answers again", asked)?, "got x", "the answer");
    drop(server);
    Ok(())
}

fn rules_that_somebody_changes() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    mesh.host("a").within(|| Route::open()?.delete_policy_route())??;
    // At once or when it was repaired: it is told either way.
    let found = only(mesh.at("a"), &[], &[code::POLICY_ROUTE])?;
    eventually(SETTLED, "it is repaired, and told that it was", || {
        let found = check(mesh.at("a"), &[])?;
        ensure!(detail_of(&found, code::POLICY_ROUTE).contains("repaired"), "{found:#?}");
        Ok(())
    })?;
    drop(found);
    mesh.secured_between("b", "a", 8000)?;
    only(mesh.at("b"), &[], &[])?;
    Ok(())
}

fn what_a_killed_daemon_leaves() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).configured("mode = \"strict\"").hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    only(mesh.at("a"), &[], &[])?;
    mesh.at_mut("a").kill();
    let found = only(mesh.at("a"), &["--pre"], &[code::LEFTOVERS])?;
    ensure!(detail_of(&found, code::LEFTOVERS).contains("table inet meshd"), "{found:#?}");
    mesh.at("a").cli(&["cleanup"])?;
    only(mesh.at("a"), &["--pre"], &[])?;
    Ok(())
}

fn firewalls() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    let server = Server::answering(mesh.host("b"), 8000, "got ")?;
    let b = mesh.at("b");
    let with = |rules: &str, codes: &[&str]| -> Result<Vec<Finding>> {
        b.nft(&format!("table inet fw {{ chain input {{ type filter hook input priority 0; policy accept; {rules}; }}; }}"))?;
        let found = only(b, &[], codes).with_context(|| rules.to_owned())?;
        b.nft("delete table inet fw")?;
        Ok(found)
    };
    with("ct state established,related accept; iif lo accept; tcp dport { 22, 6374 } accept; udp dport 5353 accept", &[])?;
    with("ip saddr 192.168.77.0/24 tcp dport 8000 accept; tcp dport 8001 drop", &[code::FIREWALL_SOURCE])?;
    with("iifname lo ip saddr != 127.0.0.0/8 drop", &[code::FIREWALL_DELIVERY])?;
    with("udp dport 5353 drop", &[code::MULTICAST])?;
    // What is open is not touched, so the others stay well, while the port is closed for new connections.
    let found = with(
        "tcp dport 6374 ct state new ip daddr 192.168.77.2 meta length 65000-65535 drop; ct state established accept",
        &[code::FIREWALL_PORT],
    )?;
    equal!(level_of(&found, code::FIREWALL_PORT), Some(Level::Warn), "a rule that is not understood");
    b.nft("table inet fw { chain input { type filter hook input priority 0; policy drop; iif lo accept; udp dport 5353 accept; ct state established,related accept; }; }")?;
    let found = only(b, &[], &[code::FIREWALL_PORT])?;
    equal!(level_of(&found, code::FIREWALL_PORT), Some(Level::Fail), "a port that is closed");
    ensure!(detail_of(&found, code::FIREWALL_PORT).contains("from 192.168.77.1"), "{found:#?}");
    // The other side cannot make a new connection.
    among(mesh.at("a"), &[code::PEER])?;
    drop(server);
    Ok(())
}

fn the_state_directory() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let state = mesh.at("a").dir().join("state");
    let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    only(mesh.at("a"), &[], &[])?;
    mode(&state, 0o755)?;
    only(mesh.at("a"), &[], &[code::STATE_MODE])?;
    mode(&state, 0o700)?;
    mode(&state.join("node.key"), 0o644)?;
    let found = only(mesh.at("a"), &[], &[code::STATE_MODE])?;
    ensure!(detail_of(&found, code::STATE_MODE).contains("node.key"), "{found:#?}");
    // The next start closes it, and says that it was open. A file whose newest generation is damaged has another.
    mesh.at("a").cli(&["token", "create"])?;
    mesh.at_mut("a").stop()?;
    mode(&state.join("node.key"), 0o644)?;
    let file = state.join("tokens.other");
    let mut bytes = std::fs::read(&file)?;
    bytes.truncate(bytes.len() / 2);
    std::fs::write(&file, bytes)?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    only(mesh.at("a"), &[], &[code::STATE_MODE, code::STATE_FILES])?;
    Ok(())
}

fn a_full_and_a_read_only_disk() -> Result<()> {
    let mesh = Setup::of(&["a"]).hosts()?;
    let state = mesh.at("a").dir().join("state");
    std::fs::create_dir(&state)?;
    let on = |options: &str| -> Result<Vec<Finding>> {
        let mut asked = mesh.at("a").meshd(command("unshare").get_program().as_ref());
        let script = format!("mount -t tmpfs -o {options} disk \"$1\" && exec \"$0\" check --pre -o json");
        asked.args(["--mount", "sh", "-c", &script, MESHD]).arg(&state);
        let output = mesh.at("a").output(&mut asked, Duration::from_secs(30))?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
    };
    exactly(&on("mode=700,size=64m")?, &[], "a disk with room")?;
    let found = on("mode=700,size=4m")?;
    exactly(&found, &[code::DISK], "a small disk")?;
    equal!(level_of(&found, code::DISK), Some(Level::Fail), "a disk with next to no room");
    equal!(level_of(&on("mode=700,size=20m")?, code::DISK), Some(Level::Warn), "a disk with little room");
    exactly(&on("mode=700,size=64m,nr_inodes=1")?, &[code::DISK], "a disk that takes no file")?;
    exactly(&on("mode=700,size=64m,ro")?, &[code::STATE], "a read-only disk")?;
    Ok(())
}

fn no_member_yet_and_no_member_any_more() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Pending)?;
    let found = only(mesh.at("b"), &[], &[code::MEMBER])?;
    equal!(level_of(&found, code::MEMBER), Some(Level::Fail), "a host without a token");
    let token = mesh.at("a").token()?;
    mesh.at("b").cli(&["join", &token])?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    only(mesh.at("b"), &[], &[])?;
    mesh.at("b").cli(&["leave", "--yes"])?;
    mesh.at("b").until(State::Left)?;
    let found = only(mesh.at("b"), &[], &[code::MEMBER])?;
    equal!(level_of(&found, code::MEMBER), Some(Level::Warn), "a host that left");
    Ok(())
}

fn members_that_do_not_answer() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).start()?;
    mesh.at_mut("a").kill();
    // The handshake fails at once, gossip notices within seconds, and half a minute of silence is told of the addresses.
    among(mesh.at("b"), &[code::PEER, code::AUTHORITY])?;
    eventually(3 * SETTLED, "addresses at which nobody answers are told", || {
        let found = check(mesh.at("b"), &[])?;
        ensure!(ill(&found).contains(code::ADDRESS_SILENT), "{:?}", ill(&found));
        named([code::ADDRESS_SILENT]);
        Ok(())
    })?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.settled()?;
    only(mesh.at("b"), &[], &[])?;
    // A stop is told, and known from a failure.
    mesh.at_mut("a").stop()?;
    eventually(SETTLED, "a stop is told", || {
        let found = check(mesh.at("b"), &[])?;
        ensure!(detail_of(&found, code::PEER).contains("said that it stops"), "{found:#?}");
        Ok(())
    })
}

fn members_that_differ() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured_on("b", "mode = \"audit\"").start()?;
    for name in ["a", "b"] {
        only(mesh.at(name), &[], &[code::PEER_MODE])?;
    }
    // A program that was replaced while it runs.
    mesh.at_mut("a").stop()?;
    let copy = mesh.at("a").dir().join("meshd");
    // By another process: a file that this one had open for writing could not be run while a thread beside it starts something.
    ensure!(std::process::Command::new("cp").arg(MESHD).arg(&copy).status()?.success(), "no copy of the program");
    mesh.at_mut("a").start_through(copy.to_str().context("a path in UTF-8")?, &["run", "--mode", "audit"])?;
    mesh.at("a").until(State::Member)?;
    mesh.settled()?;
    only(mesh.at("a"), &[], &[])?;
    std::fs::remove_file(&copy)?;
    only(mesh.at("a"), &[], &[code::VERSION])?;
    Ok(())
}

fn certificates_that_nobody_renews() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured("svid_lifetime = \"9s\"").start()?;
    mesh.at_mut("a").kill();
    among(mesh.at("b"), &[code::SVID, code::AUTHORITY])?;
    eventually(SETTLED, "a certificate that has ended is a failure", || {
        let found = check(mesh.at("b"), &[])?;
        equal!(level_of(&found, code::SVID), Some(Level::Fail), "its level");
        Ok(())
    })
}

fn traffic_that_is_not_covered() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured_on("a", "skip_ports = [22, 8001]").hosts()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let mut old = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[1])?;
    echo(&mut old, "before there was a mesh")?;
    mesh.bring_up(Member::start)?;
    // Secured ones beside it are not taken for old ones, at neither end.
    let mut new: Vec<_> =
        sockets(mesh.host("b"), 8000).into_iter().map(|to| connect(mesh.host("a"), to)).collect::<Result<_, _>>()?;
    new.iter_mut().try_for_each(|s| echo(s, "secured"))?;
    for name in ["a", "b"] {
        let found = only(mesh.at(name), &[], &[code::OLDER])?;
        let detail = detail_of(&found, code::OLDER);
        ensure!(detail.starts_with("1 is older") && detail.contains("]:8000"), "{detail}");
    }
    drop(old);
    for name in ["a", "b"] {
        only(mesh.at(name), &[], &[])?;
    }
    drop(new);
    // UDP to a member.
    let udp = mesh.host("a").within(|| UdpSocket::bind("0.0.0.0:0"))??;
    udp.connect(sockets(mesh.host("b"), 9000)[0])?;
    let found = only(mesh.at("a"), &[], &[code::UDP])?;
    ensure!(detail_of(&found, code::UDP).contains("192.168.77.2:9000"), "{found:#?}");
    drop(udp);
    // A service on a port that is never captured.
    let skipped = Server::answering(mesh.host("b"), 8001, "got ")?;
    only(mesh.at("a"), &[], &[code::SKIP_PORTS])?;
    only(mesh.at("b"), &[], &[])?;
    drop((skipped, server));
    Ok(())
}

fn plaintext_of_a_member() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).configured("mode = \"audit\"").configured_on("b", "skip_ports = [22, 8000]").start()?;
    let server = Server::answering(mesh.host("a"), 8000, "got ")?;
    equal!(ask(mesh.host("b"), sockets(mesh.host("a"), 8000)[0], "x")?, "got x", "the answer");
    let found = only(mesh.at("a"), &[], &[code::PLAINTEXT])?;
    ensure!(detail_of(&found, code::PLAINTEXT).starts_with("1 connection"), "{found:#?}");
    drop(server);
    Ok(())
}

fn containers() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    let inside = container(mesh.host("b"))?;
    let found = only(mesh.at("b"), &[], &[code::CONTAINERS])?;
    ensure!(detail_of(&found, code::CONTAINERS).starts_with("docker0 (1 port)"), "{found:#?}");
    only(mesh.at("a"), &[], &[])?;
    drop(inside);
    Ok(())
}

fn another_mesh_on_the_lan() -> Result<()> {
    let mut mesh = Setup::of(&["a", "c"]).configured_on("c", "found_after = \"0s\"").hosts()?;
    for name in ["a", "c"] {
        mesh.at_mut(name).start()?;
        mesh.at(name).until(State::Member)?;
    }
    for (name, other) in [("a", "c"), ("c", "a")] {
        let found = only(mesh.at(name), &[], &[code::OTHER_MESH])?;
        let host = mesh.host(other);
        let detail = detail_of(&found, code::OTHER_MESH);
        // Its link-local address will do, too.
        ensure!(detail.contains(&host.ipv4.to_string()) || detail.contains(':'), "{detail}");
    }
    // It says goodbye, and is not a mesh on the LAN any more.
    mesh.at_mut("c").stop()?;
    only(mesh.at("a"), &[], &[])?;
    Ok(())
}

fn another_daemon_on_this_host() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    only(mesh.at("a"), &[], &[])?;
    let host = mesh.host("a");
    let mut second = host.meshd(Path::new(MESHD));
    second.env("MESHD_STATE_DIR", host.dir().join("state2")).env("MESHD_RUN_DIR", host.dir().join("run2"));
    second.args(["run", "--port", "7001", "--capture-port", "7002", "--admin-port", "7003", "--found-after", "5m"]);
    let second = host.spawn(&mut second, "second")?;
    let found = only(mesh.at("a"), &[], &[code::OTHER_MESHD])?;
    ensure!(detail_of(&found, code::OTHER_MESHD).contains(&format!("(pid {})", second.pid())), "{found:#?}");
    drop(second);
    only(mesh.at("a"), &[], &[])?;
    Ok(())
}

fn limits_and_strangers_at_the_door() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).outsider("x").hosts()?;
    mesh.at_mut("a").start_through("prlimit", &["--nofile=400:400", "--"])?;
    mesh.at("a").until(State::Member)?;
    only(mesh.at("a"), &[], &[code::FILES])?;
    for _ in 0..40 {
        let mut stranger = connect(mesh.host("x"), sockets(mesh.host("a"), 6374)[0])?;
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    }
    eventually(SETTLED, "all have failed", || {
        let found = only(mesh.at("a"), &[], &[code::FILES, code::HANDSHAKES])?;
        ensure!(detail_of(&found, code::HANDSHAKES).contains("40 handshakes failed"), "{found:#?}");
        Ok(())
    })?;
    // A variable that is no setting.
    let mut asked = mesh.at("a").meshd(Path::new(MESHD));
    asked.args(["check", "-o", "json"]).env("MESHD_SKIP_PORT", "1");
    let output = mesh.at("a").output(&mut asked, Duration::from_secs(30))?;
    let found: Vec<Finding> = serde_json::from_slice(&output.stdout)?;
    ensure!(ill(&found).contains(code::CONFIG_NOTES), "{found:#?}");
    named([code::CONFIG_NOTES]);
    Ok(())
}
