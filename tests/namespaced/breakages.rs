//! What `meshd check` names, continued: things that take more than a switch to break. A kernel whose table is full, clocks, versions,
//! addresses that two hosts have, rosters, certificates.
//!
//! [`UNBROKEN`] are the findings that no scenario can bring about, with the reason; every other code is seen in `checks`, here, or in `merging`, and
//! [`whole`] says so at the end of a run.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::api::{Finding, Level, State, code};
use meshd::demo::units::Units;
use meshd_ca::identity::HostName;
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::Roster;
use meshd_ca::store::Store;
use meshd_ca::time::UnixTime;

use crate::authorities::until_signing;
use crate::checks::{among, check, detail_of, only};
use crate::edge::clocks;
use crate::support::manager::Manager;
use crate::support::mesh::{MESHD, Member, Mesh, SETTLED, Setup, run_on};
use crate::support::scenario::{Need, Scenario, command, scenario};
use crate::support::traffic::{Server, connect, echo, sockets};
use crate::support::units::inside;
use crate::support::{equal, eventually, role};

pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!(
        "checks",
        a_machine_without_units_memory_and_room_for_connections,
        Need::Root,
        Need::Cgroups,
        Need::Program("unshare")
    ),
    scenario!("checks", tables_of_the_older_iptables, Need::Program("iptables-legacy")),
    scenario!("checks", rules_that_their_own_socket_takes_away),
    scenario!("checks", clocks_that_are_wrong, Need::FakeTime),
    scenario!("checks", members_of_two_versions),
    scenario!("checks", an_address_that_two_have, Need::Program("ip")),
    scenario!("checks", a_member_that_is_heard_of_and_not_reached, Need::Program("nft")),
    scenario!("checks", a_member_that_answers_and_is_not_heard, Need::Program("nft")),
    scenario!("checks", one_authority_is_left),
    scenario!("checks", a_recovery_key_that_cannot_be_read),
    scenario!("checks", a_mesh_of_before_there_were_recovery_keys),
    scenario!("checks", a_backup_that_was_never_made_and_one_that_is_old, Need::FakeTime),
    scenario!("checks", workloads_without_certificates, Need::Cgroups),
    scenario!("checks", a_defect_that_ends_a_connection, Need::Root, Need::Program("gdb")),
    scenario!("checks", a_sandbox_without_netlink),
    scenario!("checks", more_connections_than_there_is_room_for, Need::Program("prlimit")),
    scenario!("checks", a_roster_that_is_nearly_full),
    scenario!("checks", fleet_tokens_that_are_torn_or_left_and_a_window_that_is_open),
];

/// A module of the kernel, which tests share with everything else on the machine.
const GUEST: &str = "`scripts/guest-demo` takes the module away from a kernel of its own, and sees it named";
/// Another processor, or another size of pages.
const EMULATED: &str = "`scripts/emulated-check` runs the static program there, and sees it named";
/// A kernel before 5.12 or 6.9.
const OLDER: &str = "`scripts/guest-demo` runs a daemon on such a kernel, and sees it named";

/// What takes another kernel or another processor to break. CI has them.
pub(crate) const UNBROKEN: &[(&str, &str)] = &[
    (code::NFT_REDIRECT, GUEST),
    (code::NFT_FIB, GUEST),
    (code::NFT_REJECT, GUEST),
    (code::NFT_CONNTRACK, GUEST),
    (code::NFT_COUNTERS, GUEST),
    (code::NFT_OWNER, OLDER),
    (code::NFT_PERSIST, OLDER),
    (code::RULES_OWNER, OLDER),
    (code::SOCK_DIAG, GUEST),
    (code::PAGE_SIZE, EMULATED),
    (code::CIPHERS, EMULATED),
];

/// The codes that a scenario has broken the thing of, and seen named.
static NAMED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Notes that `check` named these, and that they were expected.
pub(crate) fn named<'a>(codes: impl IntoIterator<Item = &'a str>) {
    NAMED.lock().unwrap().extend(codes.into_iter().map(str::to_owned));
}

/// The scenarios that have passed in this run.
static RAN: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

/// Notes that a scenario has passed.
pub(crate) fn ran(scenario: &'static str) {
    RAN.lock().unwrap().insert(scenario);
}

/// Whether every scenario that breaks something for `check` has passed: none was filtered out, skipped, or failed.
pub(crate) fn all_ran() -> bool {
    let ran = RAN.lock().unwrap();
    crate::checks::SCENARIOS.iter().chain(SCENARIOS).chain(crate::merging::CHECKS).all(|s| ran.contains(s.name))
}

/// After every scenario of the checks has passed: whether each code was named, or has a reason why not.
pub(crate) fn whole() -> Result<()> {
    let named = NAMED.lock().unwrap();
    let excused = |c: &str| UNBROKEN.iter().any(|(code, _)| *code == c);
    let neither: Vec<&&str> = code::ALL.iter().filter(|c| !named.contains(**c) && !excused(c)).collect();
    ensure!(neither.is_empty(), "nothing was broken to see these named, and UNBROKEN has no reason for it: {neither:?}");
    let both: Vec<&str> = UNBROKEN.iter().map(|(code, _)| *code).filter(|c| named.contains(*c)).collect();
    ensure!(both.is_empty(), "these are in UNBROKEN, and were broken: {both:?}");
    Ok(())
}

fn a_machine_without_units_memory_and_room_for_connections() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let of_units = |line: &&str| line.split(' ').nth(2) == Some("cgroup2");
    let cgroups = mounts.lines().filter(of_units).filter_map(|l| l.split(' ').nth(1)).collect::<Vec<_>>().join(" ");
    // Another view of /proc/meminfo, as containers have it.
    let memory = mesh.host("a").dir().join("meminfo");
    std::fs::write(&memory, "MemTotal:  65536 kB\nMemFree:  4096 kB\nMemAvailable:  9000 kB\n")?;
    let script = format!("umount -l {cgroups} && mount --bind \"$0\" /proc/meminfo && exec \"$@\"");
    let memory = memory.to_string_lossy().into_owned();
    mesh.at_mut("a").start_through("unshare", &["--mount", "sh", "-c", &script, &memory])?;
    mesh.at("a").until(State::Member)?;
    let found = only(mesh.at("a"), &[], &[code::CGROUPS, code::MEMORY])?;
    equal!(detail_of(&found, code::MEMORY), "the machine has 8.8 MiB left", "what it says of the memory");
    // Answers that nobody waits for: each is a connection to the kernel for half a minute, and every namespace has a count of its own.
    let most: u32 = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max")?.trim().parse()?;
    let socket = mesh.host("a").within(|| UdpSocket::bind("0.0.0.0:0"))??;
    for number in 0..most / 100 * 85 {
        let [_, b, c, d] = number.to_be_bytes();
        // An error that came back for an earlier one.
        let _ = socket.send_to(b"x", (std::net::Ipv4Addr::new(127, 1 + b, c, d.max(1)), 9 + u16::from(d == 0)));
    }
    let found = only(mesh.at("a"), &[], &[code::CGROUPS, code::MEMORY, code::CONNTRACK])?;
    ensure!(detail_of(&found, code::CONNTRACK).ends_with(&format!("of {most}")), "{found:#?}");
    Ok(())
}

fn fleet_tokens_that_are_torn_or_left_and_a_window_that_is_open() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).configured("found_after = \"0s\"").hosts()?;
    let word = crate::fleet::give(&mesh, &["a"])?;
    // A file that a card has damaged: the host goes on without it, and says so everywhere.
    let torn = word.replacen("fleet1-", "fleet1-0", 1);
    crate::fleet::put(mesh.at("a"), torn.as_bytes())?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let found = only(mesh.at("a"), &[], &[code::FLEET_TOKEN])?;
    ensure!(detail_of(&found, code::FLEET_TOKEN).contains("fleet.token: the fleet token in it is not complete"), "{found:#?}");
    let said = mesh.at("a").status()?.fleet_token.context("nothing in status")?;
    ensure!(said.contains("fleet.token is not used"), "{said}");
    ensure!(
        mesh.at("a").log().contains("going on without it") && !mesh.at("a").log().contains(&word[7..20]),
        "{}",
        mesh.at("a").log()
    );
    mesh.at("a").cli(&["leave", "--yes"])?;
    mesh.at_mut("a").stop()?;
    // Another start of another life, in which it is whole, and cannot be removed.
    std::fs::remove_dir_all(mesh.at("a").dir().join("state"))?;
    crate::fleet::put(mesh.at("a"), word.as_bytes())?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let found = only(mesh.at("a"), &[], &[])?;
    ensure!(detail_of(&found, code::ENROLLMENT).contains("let in for"), "{found:#?}");
    crate::fleet::put(mesh.at("a"), word.as_bytes())?;
    let found = only(mesh.at("a"), &[], &[code::FLEET_TOKEN])?;
    ensure!(detail_of(&found, code::FLEET_TOKEN).contains("is still there"), "{found:#?}");
    mesh.at("a").cli(&["enroll", "open", "2h"])?;
    let found = only(mesh.at("a"), &[], &[code::FLEET_TOKEN, code::ENROLLMENT])?;
    ensure!(detail_of(&found, code::ENROLLMENT).starts_with("open for 1h"), "{found:#?}");
    mesh.at("a").cli(&["enroll", "close"])?;
    only(mesh.at("a"), &[], &[code::FLEET_TOKEN])?;
    // The next start removes what was left.
    mesh.at_mut("a").stop()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    only(mesh.at("a"), &[], &[]).map(drop)
}

fn tables_of_the_older_iptables() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    only(mesh.at("a"), &[], &[])?;
    run_on(mesh.host("a"), command("iptables-legacy").args(["-w", "-A", "INPUT", "-p", "tcp", "--dport", "23", "-j", "DROP"]))?;
    let found = only(mesh.at("a"), &[], &[code::IPTABLES])?;
    ensure!(detail_of(&found, code::IPTABLES).contains("filter"), "{found:#?}");
    Ok(())
}

fn rules_that_their_own_socket_takes_away() -> Result<()> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    let mut manager = Manager::new(mesh.host("a").dir())?;
    mesh.at_mut("a").start_under(&mut manager, &[])?;
    manager.until("FDSTORE=1", SETTLED)?;
    mesh.at("a").until(State::Member)?;
    only(mesh.at("a"), &[], &[])?;
    // The kernel lets nobody change a table but the socket it belongs to. The service manager has that socket, too.
    let (_, socket) = manager.kept.first().context("the service manager was given no socket")?;
    let message = |kind: u16, family: u8, resource: u16, attribute: &[u8]| {
        let length = 20 + attribute.len() as u32;
        let header = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &1u16.to_ne_bytes(), &[0; 8]].concat();
        [&header[..], &[family, 0], &resource.to_be_bytes(), attribute].concat()
    };
    // NFNL_MSG_BATCH_BEGIN and _END around NFT_MSG_DELTABLE with NFTA_TABLE_NAME (linux/netfilter/nfnetlink.h, nf_tables.h).
    let name = [&10u16.to_ne_bytes()[..], &1u16.to_ne_bytes(), b"meshd\0", &[0; 2]].concat();
    let batch = [message(0x10, 0, 10, &[]), message(10 << 8 | 2, 1, 0, &name), message(0x11, 0, 10, &[])].concat();
    rustix::net::send(socket, &batch, rustix::net::SendFlags::empty())?;
    let found = only(mesh.at("a"), &[], &[code::CAPTURE])?;
    ensure!(detail_of(&found, code::CAPTURE).contains("changed the rules"), "{found:#?}");
    eventually(SETTLED, "it is repaired, and told that it was", || {
        let found = check(mesh.at("a"), &[])?;
        ensure!(detail_of(&found, code::CAPTURE).contains("they were repaired"), "{found:#?}");
        Ok(())
    })
}

fn clocks_that_are_wrong() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b", "c"]).configured("authority = false").start()?;
    for name in ["a", "b"] {
        mesh.at_mut(name).stop()?;
        clocks::start(&mut mesh, name, clocks::RIGHT)?;
        mesh.at(name).until(State::Member)?;
    }
    mesh.settled()?;
    clocks::asked(&mesh, "b")?;
    only(mesh.at("b"), &[], &[])?;
    clocks::set(&mesh, "b", "+4m")?;
    let found = only(mesh.at("b"), &[], &[code::PEER_CLOCK])?;
    let detail = detail_of(&found, code::PEER_CLOCK);
    let about = ["a is 4m behind", "a is 3m59s behind", "a is 4m1s behind"];
    ensure!(about.iter().any(|t| detail.starts_with(t)), "{detail}");
    clocks::set(&mesh, "b", "-2h")?;
    let found = only(mesh.at("b"), &[], &[code::CLOCK, code::PEER_CLOCK])?;
    let detail = detail_of(&found, code::CLOCK);
    ensure!(["the system clock is 1h", "the system clock is 2h"].iter().any(|t| detail.contains(t)), "{found:#?}");
    clocks::set(&mesh, "b", clocks::IN_1970)?;
    only(mesh.at("b"), &[], &[code::CLOCK, code::CLOCK_SET, code::PEER_CLOCK])?;
    // Beyond the end of every root: it is not believed, and nothing else is wrong.
    clocks::set(&mesh, "b", clocks::AHEAD)?;
    only(mesh.at("b"), &[], &[code::CLOCK, code::PEER_CLOCK])?;
    // Ten years are the life of a root. What the only authority says is the time. It replaces its root, but c was here a moment ago and does
    // not say that it believes the new one.
    mesh.at_mut("c").kill();
    clocks::set(&mesh, "b", clocks::RIGHT)?;
    let authorities: Vec<meshd::api::Authority> = mesh.at("a").json(&["authority", "list"])?;
    let left = authorities[0].roots[0].not_after - mesh.at("a").status()?.clock.now;
    clocks::set(&mesh, "a", &format!("+{}", left - 30 * 86_400))?;
    // b hears of it by the first certificate that does not fit.
    let _server = Server::echo(mesh.host("a"), 8000)?;
    let follows = |patience| {
        eventually(patience, "b follows", || {
            let mut stream = connect(mesh.host("b"), sockets(mesh.host("a"), 8000)[0])?;
            echo(&mut stream, "word")
        })
    };
    follows(SETTLED)?;
    among(mesh.at("b"), &[code::ROOT_END, code::PEER_CLOCK])?;
    clocks::set(&mesh, "a", &format!("+{}", left - 30))?;
    follows(SETTLED)?;
    among(mesh.at("b"), &[code::BUNDLE])?;
    // What it signed with has ended: it waits for those only who were there a minute ago. c learns of the new root when it is back.
    follows(3 * SETTLED)
}

fn members_of_two_versions() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).start()?;
    mesh.at_mut("b").stop()?;
    // The same program, which says that it is another version: its first bytes are changed wherever they are, in texts and instructions.
    let (own, copy) = (env!("CARGO_PKG_VERSION"), mesh.at("b").dir().join("meshd"));
    let first = &own[..4];
    let changed: String = first.chars().map(|c| if c == '.' { '.' } else { '9' }).collect();
    let other = own.replacen(first, &changed, 1);
    let script = format!("s/{}/{changed}/g", first.replace('.', "\\."));
    let file = std::fs::File::create(mesh.at("b").dir().join("copy"))?;
    ensure!(Command::new("sed").env("LC_ALL", "C").args([&script, MESHD]).stdout(file).status()?.success(), "sed");
    // By another process: see `members_that_differ`.
    let install = Command::new("install").args(["-m", "755"]).arg(mesh.at("b").dir().join("copy")).arg(&copy).status()?;
    ensure!(install.success(), "no copy of the program");
    mesh.at_mut("b").start_through(copy.to_str().context("a path in UTF-8")?, &["run"])?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    let found = only(mesh.at("a"), &[], &[code::PEER_VERSION])?;
    equal!(detail_of(&found, code::PEER_VERSION), format!("this is {own}, b has {other}"), "what it says");
    // And the command that asks is not what runs.
    let found = only(mesh.at("b"), &[], &[code::VERSION, code::PEER_VERSION])?;
    ensure!(detail_of(&found, code::VERSION).contains(&other), "{found:#?}");
    Ok(())
}

fn an_address_that_two_have() -> Result<()> {
    let mesh = Setup::of(&["a", "b", "c"]).start()?;
    let (a, c) = (mesh.at("a"), mesh.at("c"));
    let both = "192.168.77.50".parse()?;
    mesh.host("b").add_address(both)?;
    a.until_captured("b", &[both])?;
    c.add_address(both)?;
    // Who is found at it is a matter of chance: here a finds the other one.
    let link = run_on(c, command("ip").args(["-o", "link", "show", "dev", "eth0"]))?;
    let mac = link.split_whitespace().skip_while(|w| *w != "link/ether").nth(1).context("no link/ether")?;
    run_on(a, command("ip").args(["neigh", "replace", &both.to_string(), "lladdr", mac, "nud", "permanent", "dev", "eth0"]))?;
    let found = eventually(2 * SETTLED, "two answer at the address", || {
        let found = check(a, &[])?;
        ensure!(detail_of(&found, code::ADDRESS) == "192.168.77.50 is answered by b and c", "{found:#?}");
        Ok(found)
    })?;
    named([code::ADDRESS]);
    drop(found);
    Ok(())
}

/// New connections to the mesh port of `member` from the host at `from` are dropped.
fn closed(member: &Member, from: &Member) -> Result<()> {
    let (v4, v6) = (from.ipv4, from.ipv6);
    member.nft(&format!(
        "table inet fw {{ chain input {{ type filter hook input priority 0; policy accept; \
         ip saddr {v4} tcp dport 6374 drop; ip6 saddr {v6} tcp dport 6374 drop; ip6 saddr fe80::/10 tcp dport 6374 drop; }}; }}"
    ))
}

fn a_member_that_is_heard_of_and_not_reached() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    // a reaches b at a link-local address only, which is nothing that could be captured.
    let (v4, v6) = (mesh.at("b").ipv4, mesh.at("b").ipv6);
    mesh.at("b").nft(&format!(
        "table inet fw {{ chain input {{ type filter hook input priority 0; policy accept; \
         ip daddr {v4} tcp dport 6374 drop; ip6 daddr {v6} tcp dport 6374 drop; }}; }}"
    ))?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until_answers()?;
    let token = mesh.at("a").token()?;
    mesh.at("b").cli(&["join", &token])?;
    mesh.at("b").until(State::Member)?;
    let found = among(mesh.at("a"), &[code::ADDRESS_MISSING])?;
    ensure!(detail_of(&found, code::ADDRESS_MISSING).starts_with("none of b has answered"), "{found:#?}");
    among(mesh.at("b"), &[code::FIREWALL_PORT])?;
    mesh.at("b").nft("delete table inet fw")?;
    only(mesh.at("a"), &[], &[]).map(drop)
}

/// b, which answers, cannot call a.
fn a_member_that_answers_and_is_not_heard() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    closed(mesh.at("a"), mesh.at("b"))?;
    let unheard = || among(mesh.at("a"), &[code::GOSSIP, code::FIREWALL_PORT]);
    let found = eventually(2 * SETTLED, "a does not hear b any more", unheard)?;
    ensure!(detail_of(&found, code::GOSSIP).starts_with("b: answers, but"), "{found:#?}");
    ensure!(found.iter().all(|f| f.code != code::PEER || f.level == Level::Ok), "a reaches b: {found:#?}");
    mesh.at("a").nft("delete table inet fw")?;
    eventually(2 * SETTLED, "it passes by itself", || only(mesh.at("a"), &[], &[])).map(drop)
}

fn one_authority_is_left() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).start()?;
    mesh.at("a").cli(&["authority", "add", "b"])?;
    until_signing(&mesh, "a", &["a", "b"])?;
    only(mesh.at("a"), &[], &[])?;
    mesh.at("a").cli(&["authority", "remove", "b"])?;
    let found = among(mesh.at("a"), &[code::AUTHORITIES])?;
    ensure!(detail_of(&found, code::AUTHORITIES).starts_with("1 of 2 sign"), "{found:#?}");
    Ok(())
}

fn a_recovery_key_that_cannot_be_read() -> Result<()> {
    let mesh = Setup::of(&["a"]).start()?;
    only(mesh.at("a"), &[], &[])?;
    let directory = mesh.at("a").dir().join("state/backup");
    for name in ["recovery", "recovery.other"] {
        std::fs::write(directory.join(name), b"torn")?;
    }
    let found = only(mesh.at("a"), &[], &[code::RECOVERY_KEY])?;
    ensure!(detail_of(&found, code::RECOVERY_KEY).contains("is damaged"), "{found:#?}");
    let (taken, _, error) = mesh.at("a").try_cli(&["recovery-key", "--file", "x"])?;
    ensure!(!taken && error.contains("is damaged"), "{error}");
    Ok(())
}

/// A mesh of one host that does not run, what is on its disk, its key and its roster.
fn founded_and_stopped() -> Result<(Mesh, Store, PrivateKey, Roster)> {
    let mut mesh = Setup::of(&["a"]).hosts()?;
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("a").stop()?;
    let store = Store::open(&mesh.at("a").dir().join("state"))?;
    let load = |name: &str| Ok::<_, anyhow::Error>(store.load(name)?.with_context(|| format!("no {name}"))?.bytes);
    let (key, roster) = (PrivateKey::from_pkcs8(&load("node.key")?)?, Roster::from_bytes(&load("roster")?)?);
    Ok((mesh, store, key, roster))
}

/// Founded by a version that made no recovery key: it never has one, and every way to it says so.
fn a_mesh_of_before_there_were_recovery_keys() -> Result<()> {
    let (mut mesh, store, key, made) = founded_and_stopped()?;
    let root = store.load("root.crt")?.context("no root")?.bytes.to_vec();
    let then = UnixTime(1_768_000_000);
    let mut old = Roster::found(made.mesh(), made.trust_domain().clone(), &key, HostName::nearest("a"), root, then)?;
    old.admit(&key, PrivateKey::generate()?.public(), &HostName::nearest("b"), then)?;
    store.save("roster", &old.to_bytes())?;
    drop(store);
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let found = among(mesh.at("a"), &[code::RECOVERY_KEY, code::BACKUP])?;
    ensure!(detail_of(&found, code::RECOVERY_KEY).contains("made none, and none can be added"), "{found:#?}");
    ensure!(detail_of(&found, code::BACKUP).contains("this host founded the mesh, which has no recovery key"), "{found:#?}");
    for words in
        [&["recovery-key", "--file", "x"][..], &["recover", "--yes"], &["recover", "--clock", "--yes"], &["unbanish", "b"]]
    {
        let (ok, _, error) = mesh.at("a").try_cli(words)?;
        ensure!(!ok && (error.contains("without a recovery key") || words.contains(&"--clock")), "{words:?}: {error}");
    }
    Ok(())
}

fn a_backup_that_was_never_made_and_one_that_is_old() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).configured("authority = false").hosts()?;
    clocks::start(&mut mesh, "a", clocks::RIGHT)?;
    mesh.at("a").until(State::Member)?;
    mesh.at_mut("b").start()?;
    mesh.at("b").until_answers()?;
    let token = mesh.at("a").token()?;
    mesh.at("b").cli(&["join", &token])?;
    mesh.settled()?;
    let found = only(mesh.at("a"), &[], &[])?;
    ensure!(detail_of(&found, code::BACKUP).starts_with("there is none yet"), "{found:#?}");
    ensure!(detail_of(&check(mesh.at("b"), &[])?, code::BACKUP).contains("another one joins in its place"), "of a member");
    // A day later nobody has thought of it.
    clocks::set(&mesh, "a", "+25h")?;
    let found = among(mesh.at("a"), &[code::BACKUP])?;
    ensure!(
        detail_of(&found, code::BACKUP).starts_with("there is none, and this is the only authority that signs"),
        "{found:#?}"
    );
    let file = |name: &str| mesh.at("a").dir().join(name).display().to_string();
    mesh.at("a").cli(&["recovery-key", "--file", &file("paper")])?;
    let keep = || {
        mesh.at("a").cli(&["backup", &file("a.meshd")])?;
        let found = check(mesh.at("a"), &[])?;
        ensure!(detail_of(&found, code::BACKUP).starts_with("made 1d1h ago"), "{found:#?}");
        ensure!(found.iter().all(|f| f.code != code::BACKUP || f.level == Level::Ok), "{found:#?}");
        Ok(())
    };
    keep()?;
    // What a host that was restored from it would not know.
    mesh.at("a").cli(&["banish", "--yes", "b"])?;
    let found = among(mesh.at("a"), &[code::BACKUP])?;
    ensure!(detail_of(&found, code::BACKUP).contains("since then a host was banished"), "{found:#?}");
    keep()?;
    mesh.at("a").cli(&["authority", "rotate"])?;
    let found = among(mesh.at("a"), &[code::BACKUP])?;
    ensure!(detail_of(&found, code::BACKUP).contains("since then this host has another root"), "{found:#?}");
    keep()?;
    // Where that cannot be told, it is not said that there is none.
    for name in ["made", "made.other"] {
        std::fs::write(mesh.at("a").dir().join("state/backup").join(name), b"torn")?;
    }
    let found = among(mesh.at("a"), &[code::BACKUP])?;
    ensure!(detail_of(&found, code::BACKUP).contains("is damaged"), "{found:#?}");
    Ok(())
}

fn workloads_without_certificates() -> Result<()> {
    let mut units = Units::find().context("no cgroups")?;
    let mut mesh = Setup::of(&["a", "b", "c"]).start()?;
    let _server = mesh.host("c").spawn(&mut role::greeter("[::]:8000".parse()?, "hi"), "greeter")?;
    mesh.at_mut("a").kill();
    // Units that start while no authority is there.
    let cgroup = units.cgroup(&format!("system.slice/meshd-test-{}-late.service", std::process::id()))?;
    let to = sockets(mesh.host("c"), 8000)[0];
    for _ in 0..12 {
        run_on(mesh.host("b"), &mut inside(&cgroup, &role::listener(to)))?;
    }
    let found = among(mesh.at("b"), &[code::SVID_FALLBACK, code::AUTHORITY])?;
    ensure!(detail_of(&found, code::SVID_FALLBACK).starts_with("the node's own stood in 1"), "{found:#?}");
    Ok(())
}

fn more_connections_than_there_is_room_for() -> Result<()> {
    let mut mesh = Setup::of(&["a", "b"]).start()?;
    mesh.at_mut("b").stop()?;
    mesh.at_mut("b").start_through("prlimit", &["--nofile=128:128", "--"])?;
    mesh.at("b").until(State::Member)?;
    mesh.settled()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    // Three quarters of (128 - 64), two each.
    let to = sockets(mesh.host("b"), 8000)[0];
    let mut open = (0..24).map(|_| connect(mesh.host("a"), to)).collect::<Result<Vec<_>, _>>()?;
    open.iter_mut().try_for_each(|s| echo(s, "there is room"))?;
    let one_more = connect(mesh.host("a"), to).map_err(Into::into).and_then(|mut s| echo(&mut s, "there is none"));
    ensure!(one_more.is_err(), "there was room for one more");
    let found = among(mesh.at("b"), &[code::OVERLOAD, code::FILES])?;
    ensure!(detail_of(&found, code::OVERLOAD).starts_with("1 were refused"), "{found:#?}");
    open.iter_mut().try_for_each(|s| echo(s, "and those that are open go on"))?;
    drop(server);
    // A configuration that is none.
    let mut asked = mesh.at("a").meshd(Path::new(MESHD));
    asked.args(["check", "-o", "json"]).env("MESHD_MODE", "lenient");
    let output = mesh.at("a").output(&mut asked, Duration::from_secs(30))?;
    let found: Vec<Finding> = serde_json::from_slice(&output.stdout)?;
    ensure!(!output.status.success() && detail_of(&found, code::CONFIG).contains("MESHD_MODE"), "{found:#?}");
    named([code::CONFIG]);
    Ok(())
}

/// meshd has no known way to panic, so a debugger makes one: where a stream is about to be let in, the process goes on in the function
/// that says that a `None` was unwrapped.
fn a_defect_that_ends_a_connection() -> Result<()> {
    let admit = symbol("_ZN5meshd5proxy7inbound5admit17h")?;
    let first_argument = if cfg!(target_arch = "aarch64") { "$x0" } else { "$rdi" };
    let mesh = Setup::of(&["a", "b"]).start()?;
    let _server = Server::echo(mesh.host("b"), 8000)?;
    let to = sockets(mesh.host("b"), 8000)[0];
    echo(&mut connect(mesh.host("a"), to)?, "before")?;
    // A place in the source to say, as `core::panic::Location` has it: the text and its length with a zero byte, the line, the column.
    // It is put where the stack will not be.
    let script = format!(
        "set language c\n\
         set breakpoint pending off\n\
         break *'{admit}'\n\
         echo ready\\n\n\
         continue\n\
         set $place = (unsigned long) ($sp - 400000)\n\
         set {{char[9]}} ($place + 32) = \"debugger\"\n\
         set {{unsigned long}} $place = $place + 32\n\
         set {{unsigned long}} ($place + 8) = 9\n\
         set {{unsigned int}} ($place + 16) = 1\n\
         set {{unsigned int}} ($place + 20) = 1\n\
         set {first_argument} = $place\n\
         set $pc = (unsigned long) &'core::option::unwrap_failed'\n\
         detach\n"
    );
    let path = mesh.host("b").dir().join("panic.gdb");
    std::fs::write(&path, script)?;
    let pid = mesh.at("b").pid()?.to_string();
    let mut gdb = command("gdb");
    gdb.args(["-nx", "-batch", "-p", &pid, "-x"]).arg(&path);
    let mut debugger = mesh.host("b").spawn(&mut gdb, "gdb")?;
    eventually(SETTLED, "the debugger is there", || {
        ensure!(debugger.log().contains("ready"), "{}", debugger.log());
        Ok(())
    })?;
    let cut = connect(mesh.host("a"), to).map_err(Into::into).and_then(|mut s| echo(&mut s, "during"));
    ensure!(cut.is_err(), "the connection went on: {}", debugger.log());
    debugger.wait(SETTLED)?.context("the debugger goes on")?;
    let found = only(mesh.at("b"), &[], &[code::PANICS])?;
    equal!(detail_of(&found, code::PANICS), "1 did", "how many connections");
    ensure!(mesh.at("b").log().contains("panicked"), "{}", mesh.at("b").log());
    echo(&mut connect(mesh.host("a"), to)?, "after")
}

/// The name that a function has in the program's table of symbols: a hash follows the part that is known.
fn symbol(known: &str) -> Result<String> {
    let program = std::fs::read(MESHD)?;
    let at = program.windows(known.len()).position(|w| w == known.as_bytes());
    let name = at.and_then(|at| program[at..].split(|b| *b == 0).next()).context("the program has no symbols")?;
    Ok(String::from_utf8(name.to_owned())?)
}

fn a_sandbox_without_netlink() -> Result<()> {
    let mesh = Setup::of(&["a"]).hosts()?;
    let mut asked = mesh.host("a").meshd(Path::new(MESHD));
    asked.args(["check", "--pre", "-o", "json"]);
    let output = mesh.host("a").output(&mut role::without_netlink(&asked), SETTLED)?;
    let found: Vec<Finding> = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    for code in [code::KERNEL, code::POLICY_ROUTING, code::LOOPBACK, code::SOCK_DIAG] {
        let it = found.iter().find(|f| f.code == code).with_context(|| format!("nothing of {code}"))?;
        let said = format!("{} {}", it.detail.as_deref().unwrap_or_default(), it.hint.as_deref().unwrap_or_default());
        ensure!(it.level != Level::Ok && said.to_lowercase().contains("netlink"), "{it:#?}");
    }
    named([code::POLICY_ROUTING]);
    Ok(())
}

fn a_roster_that_is_nearly_full() -> Result<()> {
    let (mut mesh, store, key, mut roster) = founded_and_stopped()?;
    // Thousands of hosts came and left in the course of the years; each keeps its place.
    for number in 0..3300 {
        let host = PrivateKey::generate()?;
        roster.admit(&key, host.public(), &HostName::nearest(&format!("pi-{number}")), UnixTime(1_800_000_000))?;
        roster.leave(&host)?;
    }
    store.save("roster", &roster.to_bytes())?;
    drop(store);
    mesh.at_mut("a").start()?;
    mesh.at("a").until(State::Member)?;
    let found = only(mesh.at("a"), &[], &[code::ROSTER])?;
    ensure!(detail_of(&found, code::ROSTER).starts_with("3301 members of at most 4096"), "{found:#?}");
    Ok(())
}
