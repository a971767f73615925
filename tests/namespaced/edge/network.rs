//! Networks as they are: no way out, no multicast, somebody else's mDNS, Wi-Fi, cables that are pulled.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::State;
use meshd::demo::lab::{Host, Process};

use super::{admit, secured, trio};
use crate::support::air::{Air, Weather};
use crate::support::mesh::{Mesh, SETTLED, Setup, run_on};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::ssh::Ssh;
use crate::support::traffic::{Server, addresses, ask, connect, connect_within, echo, expect_pattern, send_pattern, sockets};
use crate::support::{equal, eventually, marker};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("edge", without_a_default_route, Need::Program("ip")),
    scenario!("edge", without_multicast, Need::Program("ip"), Need::Program("nft")),
    scenario!("edge", beside_avahi, Need::Program("avahi-daemon"), Need::Program("unshare")),
    scenario!("edge", a_flood_of_mdns_records),
    scenario!("edge", more_mdns_than_a_core_can_look_at),
    scenario!("edge", wifi_that_loses_and_delays),
    scenario!("edge", an_interface_that_goes_down_and_up),
    scenario!("edge", a_host_that_is_faster_than_its_network),
];

/// A hint that leads nowhere: the new host has to find the mesh by itself.
const NOWHERE: [&str; 2] = ["--hint", "192.0.2.1:6374"];

/// One host founds, the other sees that there is a mesh and finds it by itself with its token.
fn meet(mesh: &mut Mesh) -> Result<()> {
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Pending)?;
    admit(mesh, "b", &NOWHERE)?;
    mesh.settled()
}

fn without_a_default_route() -> Result<()> {
    let mut mesh = trio().hosts()?;
    for host in mesh.lab().hosts() {
        for family in ["-4", "-6"] {
            let routes = run_on(host, command("ip").args([family, "route", "show", "default"]))?;
            equal!(routes.trim(), "", "default routes of {}", host.name);
        }
    }
    let beyond = connect_within(mesh.host("a"), "192.0.2.1:22".parse()?, Duration::from_secs(1));
    ensure!(beyond.is_err_and(|e| e.raw_os_error() == Some(101)), "there is a way out of this network");
    // Seen by multicast, which needs no route either.
    meet(&mut mesh)?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    ssh.goes_on()?;
    ssh.is_open(&mesh)
}

fn without_multicast() -> Result<()> {
    let mut mesh = trio().configured_on("b", "peers = [\"192.168.77.1\"]").hosts()?;
    run_on(mesh.host("b"), command("ip").args(["link", "set", "eth0", "multicast", "off"]))?;
    // As an access point with client isolation for multicast does it.
    mesh.at("a").nft(
        "table inet access_point { chain input { type filter hook input priority 0; udp dport 5353 drop; };
           chain output { type filter hook output priority 0; udp dport 5353 drop; }; }",
    )?;
    // A configured peer is enough to know that there is a mesh: nothing is founded beside it.
    meet(&mut mesh)?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    let (_, report, _) = mesh.at("b").try_cli(&["check"])?;
    ensure!(report.contains("check-mdns"), "check says nothing about multicast: {report}");
    // Where the others were is remembered: without peers, too.
    mesh.at_mut("b").stop()?;
    mesh.at("b").configure("mode = \"strict\"\ndrain = \"1s\"")?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    secured(&mesh, 8010)?;
    ssh.goes_on()?;
    ssh.is_open(&mesh)
}

/// An avahi-daemon on `host`, with files of its own. It answers on a Unix socket in its own file system.
struct Avahi(Process);

impl Avahi {
    fn start(host: &Host) -> Result<Avahi> {
        let file = host.dir().join("avahi.conf");
        let text = format!("[server]\nhost-name={}\nenable-dbus=no\nallow-interfaces=eth0\n[rlimits]\n", host.name);
        std::fs::write(&file, text)?;
        let program = command("avahi-daemon");
        let mut alone = command("unshare");
        alone.args(["-m", "sh", "-c", "mount -t tmpfs run /run && exec \"$0\" \"$@\""]).arg(program.get_program());
        alone.args(["--no-drop-root", "--no-chroot", "--no-rlimits", "-f"]).arg(&file);
        let avahi = Avahi(host.spawn(&mut alone, "avahi")?);
        eventually(SETTLED, "avahi answers", || avahi.resolve(&host.name)).with_context(|| avahi.0.log())?;
        Ok(avahi)
    }

    /// What it says a host's IPv4 address is.
    fn resolve(&self, name: &str) -> Result<String> {
        let socket = format!("/proc/{}/root/run/avahi-daemon/socket", self.0.pid());
        let mut stream = UnixStream::connect(&socket).with_context(|| socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(6)))?;
        stream.write_all(format!("RESOLVE-HOSTNAME-IPV4 {name}.local\n").as_bytes())?;
        let mut answer = vec![0; 256];
        let got = stream.read(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer[..got]).into_owned();
        ensure!(answer.starts_with('+'), "avahi says {answer:?}");
        answer.split_whitespace().last().map(str::to_owned).context("an address")
    }
}

fn beside_avahi() -> Result<()> {
    let mut mesh = trio().hosts()?;
    // One host has avahi first, the other one meshd.
    let on_a = Avahi::start(mesh.host("a"))?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Pending)?;
    let on_b = Avahi::start(mesh.host("b"))?;
    admit(&mesh, "b", &NOWHERE)?;
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    for (avahi, other) in [(&on_a, "b"), (&on_b, "a")] {
        let found =
            eventually(SETTLED, "avahi resolves the other host", || avahi.resolve(other)).with_context(|| avahi.0.log())?;
        equal!(found, mesh.host(other).ipv4.to_string(), "what avahi says of {other}");
    }
    for (name, avahi) in [("a", &on_a), ("b", &on_b)] {
        ensure!(!avahi.0.log().contains("conflict"), "avahi on {name} sees a conflict: {}", avahi.0.log());
        ensure!(!mesh.at(name).log().contains("mDNS was stopped"), "{}", mesh.at(name).log());
    }
    // meshd goes on when avahi ends, and the other way round.
    drop(on_a);
    mesh.at_mut("b").stop()?;
    equal!(on_b.resolve("b")?, mesh.host("b").ipv4.to_string(), "what avahi says without meshd");
    mesh.at_mut("b").start()?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    secured(&mesh, 8010)?;
    ssh.goes_on()?;
    ssh.is_open(&mesh)
}

/// Somebody announces instances that do not exist, thousands in a second. Discovery suffers, nothing else does, and it comes back.
fn a_flood_of_mdns_records() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"])
        .configured_on("b", "mode = \"strict\"")
        .configured_on("c", "found_after = \"30s\"")
        .outsider("x")
        .hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start()?;
    admit(&mesh, "b", &[])?;
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    // As long as it takes: a busy machine loses much of it.
    let noticed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flooding = scope.spawn(|| flood(mesh.host("x"), &noticed));
        let seen = eventually(SETTLED * 2, "the flood is noticed", || {
            let log = mesh.at("a").log();
            ensure!(log.contains("somebody floods the local network"), "{log}");
            Ok(())
        });
        noticed.store(true, Ordering::Relaxed);
        flooding.join().map_err(|_| anyhow::anyhow!("the flood died"))??;
        seen
    })?;
    secured(&mesh, 8000)?;
    ssh.goes_on()?;
    ssh.is_open(&mesh)?;
    // There are new responders, and they announce what the old ones did: a host that has nothing else to go by sees that there is a mesh.
    mesh.at_mut("c").start()?;
    mesh.at("c").until(State::Pending)?;
    admit(&mesh, "c", &[])?;
    mesh.settled()?;
    mesh.secured_between("c", "b", 8010)
}

/// Somebody sends as many packets as the cable takes, always the same: nothing piles up, and they are not worth a core.
fn more_mdns_than_a_core_can_look_at() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).outsider("x").hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let host = mesh.host("x");
    let (stop, lasts) = (AtomicBool::new(false), Duration::from_secs(20));
    let spent = || processor_time(mesh.at("a").pid()?);
    let spent = std::thread::scope(|scope| {
        let flooding = scope.spawn(|| {
            let socket = host.within(|| std::net::UdpSocket::bind((host.ipv4, 0)))??;
            socket2::SockRef::from(&socket).set_multicast_if_v4(&host.ipv4)?;
            let packet = instances(0);
            while !stop.load(Ordering::Relaxed) {
                // A full queue is no failure here.
                let _ = socket.send_to(&packet, "224.0.0.251:5353");
            }
            Ok::<_, anyhow::Error>(())
        });
        let before = spent()?;
        std::thread::sleep(lasts);
        let taken = spent()? - before;
        stop.store(true, Ordering::Relaxed);
        flooding.join().map_err(|_| anyhow::anyhow!("the flood died"))??;
        Ok::<_, anyhow::Error>(taken)
    })?;
    println!("a flood of {lasts:?} took {spent:?}");
    ensure!(spent < lasts / 2, "it took {spent:?} of {lasts:?}");
    // On a busy machine there may be no core to take half of.
    let log = mesh.at("a").log();
    ensure!(spent < lasts / 4 || log.contains("% of a core: somebody floods the local network"), "it was not noticed: {log}");
    // And mDNS comes back.
    mesh.at("a").cli(&["check", "-o", "short"]).map(drop)
}

/// `utime` and `stime` of proc_pid_stat(5).
fn processor_time(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let words = stat.rsplit_once(')').context("no name")?.1.split_whitespace().skip(11).take(2);
    let ticks = words.map(str::parse::<u64>).sum::<std::result::Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

/// An announcement of fifty instances, numbered from `first`.
fn instances(first: u32) -> Vec<u8> {
    let mut packet = vec![0, 0, 0x84, 0, 0, 0, 0, 50, 0, 0, 0, 0];
    for place in 0..50 {
        let name: &[u8] = if place == 0 { b"\x06_meshd\x04_tcp\x05local\0" } else { &[0xc0, 12] };
        packet.extend(name);
        packet.extend([0, 12, 0, 1, 0, 0, 0x11, 0x94, 0, 12, 9]); // PTR IN, 4500 s, 12 bytes: a label and a pointer
        packet.extend(format!("x{:08x}", first + place).bytes());
        packet.extend([0xc0, 12]);
    }
    packet
}

/// Announces ever more instances from `host`, until `stop`.
fn flood(host: &Host, stop: &AtomicBool) -> Result<()> {
    let socket = host.within(|| std::net::UdpSocket::bind((host.ipv4, 0)))??;
    socket2::SockRef::from(&socket).set_multicast_if_v4(&host.ipv4)?;
    for number in (0u32..).step_by(50).take_while(|_| !stop.load(Ordering::Relaxed)) {
        socket.send_to(&instances(number), "224.0.0.251:5353")?;
        // In bursts, so that some of it gets through on a busy machine, too.
        let pause = if number % 2500 == 0 { 200 } else { 1 };
        std::thread::sleep(Duration::from_millis(pause));
    }
    Ok(())
}

fn wifi_that_loses_and_delays() -> Result<()> {
    let mesh = trio().hosts()?;
    // One frame of twenty is lost in each direction, the others take 10 to 40 ms and overtake one another.
    let weather = Weather { lost: 50, delay: Duration::from_millis(10), jitter: Duration::from_millis(30) };
    let air = Air::instead_of_cable(mesh.lab(), "b", weather)?;
    let mut mesh = mesh;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start()?;
    admit(&mesh, "b", &[])?;
    mesh.settled()?;
    let mut ssh = Ssh::open(&mesh)?;
    secured(&mesh, 8000)?;
    // Many short ones and a long one: all whole, none in the clear.
    let word = marker("wifi");
    let (short, long) = (
        Server::answering(mesh.host("b"), 8010, "got ")?,
        Server::start(mesh.host("b"), 8011, |mut stream| send_pattern(&mut stream, 5, 16))?,
    );
    mesh.encrypted(&word, || {
        for _ in 0..10 {
            for address in sockets(mesh.host("b"), 8010) {
                equal!(ask(mesh.host("a"), address, &word)?, format!("got {word}"), "answer of {address}");
            }
        }
        let mut stream = connect(mesh.host("a"), sockets(mesh.host("b"), 8011)[0])?;
        Ok(expect_pattern(&mut stream, 5, 16)?)
    })?;
    drop((short, long));
    ssh.goes_on()?;
    ssh.comes_back(&mesh, SETTLED)?;
    let (carried, lost) = air.counts();
    ensure!(lost > 20 && carried > lost, "the air was clean: {carried} frames carried, {lost} lost");
    Ok(())
}

fn an_interface_that_goes_down_and_up() -> Result<()> {
    let mesh = trio().start()?;
    let mut ssh = Ssh::open(&mesh)?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    let mut open = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    echo(&mut open, "before")?;
    mesh.host("b").link_down()?;
    // What is asked meanwhile fails, and in no time that a person would call a hang.
    let word = marker("down");
    let ((), report) = mesh.watched(&[&word], || {
        for address in sockets(mesh.host("b"), 8000) {
            let heard = connect_within(mesh.host("a"), address, Duration::from_secs(4)).and_then(|mut stream| {
                stream.set_read_timeout(Some(Duration::from_secs(15)))?;
                stream.write_all(word.as_bytes())?;
                stream.read(&mut [0; 1])
            });
            ensure!(heard.as_ref().is_err_and(|e| e.kind() != std::io::ErrorKind::WouldBlock), "asked in vain: {heard:?}");
        }
        Ok(())
    })?;
    equal!(report.hits[0], 0, "frames in plaintext");
    mesh.host("b").link_up()?;
    // The kernel took the IPv6 address away, whoever manages the network gives it back.
    mesh.host("b").add_address(mesh.host("b").ipv6.into())?;
    echo(&mut open, "after").context("the connection that was open all the time")?;
    drop(server);
    ssh.goes_on()?;
    ssh.comes_back(&mesh, SETTLED)?;
    mesh.at("a").until_captured("b", &addresses(mesh.host("b")))?;
    mesh.settled()?;
    secured(&mesh, 8010)
}

/// For the other files of this topic.
pub(super) fn ip(mesh: &Mesh, host: &str, words: &[&str]) -> Result<String> {
    run_on(mesh.host(host), command("ip").args(words))
}

/// As on Wi-Fi: the daemon runs long before there is an address.
fn a_host_that_is_faster_than_its_network() -> Result<()> {
    let mut mesh = trio().hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.host("b").link_down()?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until_answers()?;
    // Much longer than a host with a network looks around before it founds.
    std::thread::sleep(Duration::from_secs(6));
    let status = mesh.at("b").status()?;
    equal!((status.state, status.reason.as_deref()), (State::New, Some("waiting for a network")), "without a network");
    mesh.host("b").link_up()?;
    // The kernel took it with the link.
    mesh.host("b").add_address(mesh.host("b").ipv6.into())?;
    mesh.at("b").until(State::Pending)?;
    let code = mesh.at("b").status()?.code.context("a code")?;
    mesh.at("a").cli(&["approve", code.expose()])?;
    mesh.settled()?;
    secured(&mesh, 8000)
}
