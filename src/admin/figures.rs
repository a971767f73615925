//! What is measured, read from the running parts at the moment somebody asks.
//!
//! Owns the choice and the names of the metrics that are not made of edges (docs/metrics.md has them all). Counts nothing itself.
//! Reads the kernel's counters and `/proc`: to be called where blocking for some milliseconds is fine.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use meshd_ca::roster::Standing;

use super::metrics::{Page, Sum};
use super::process;
use crate::daemon::{Daemon, Member, Phase};
use crate::proxy::edges::Direction;
use crate::proxy::tunnel::lent;

/// Everything there is to measure now.
pub(super) fn page(daemon: &Daemon) -> Page {
    let mut page = Page::default();
    page.info(
        "meshd_build_info",
        "This program",
        vec![
            ("version", env!("CARGO_PKG_VERSION").into()),
            ("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)),
        ],
    );
    let state = match daemon.phase() {
        Phase::New => "new",
        Phase::Pending(_) => "pending",
        Phase::Joining => "joining",
        Phase::Member(_) => "member",
        Phase::Left => "left",
        Phase::Banished => "banished",
    };
    page.info("meshd_state", "Where this host is in its life", vec![("state", state.into())]);
    page.gauge("meshd_ready", "Whether this host is ready, as /ready says", readiness(daemon).is_ok());
    page.gauge(
        "meshd_clock_is_system",
        "Whether certificates are judged by the system's clock",
        daemon.clock().source() == "system",
    );
    page.counter(
        "meshd_log_lines_left_out_total",
        "Log lines left out because there were too many of the same",
        daemon.log().left_out(),
    );
    page.counter(
        "meshd_access_log_lines_dropped_total",
        "Lines of the access log dropped because it was slow",
        daemon.access().dropped(),
    );
    if let Phase::Member(member) = daemon.phase() {
        of_member(&mut page, &member);
    }
    process::measure(&mut page, daemon.clock().now());
    page
}

fn of_member(page: &mut Page, member: &Member) {
    kernel(page, member);
    mesh(page, member);
    identity(page, member);
    proxy(page, member);
}

fn kernel(page: &mut Page, member: &Member) {
    page.gauge("meshd_capture_on", "Whether connections to members are captured", member.rules.state().on);
    if let Some(counted) = member.rules.counters() {
        page.counter("meshd_captured_connections_total", "Connections to members that were captured", counted.captured);
        let help = "Connections that the kernel refused because the port was closed a moment before";
        page.counter("meshd_refused_connections_total", help, counted.refused);
        let help = "Packets stopped that would have left this host with another host's address";
        page.counter("meshd_leaks_prevented_total", help, counted.leaks_prevented);
        let help = "Connections in plaintext from members, in the modes that look for them";
        page.counter("meshd_plaintext_connections_total", help, counted.plaintext);
    }
    let book = member.book.latest();
    page.gauge("meshd_captured_addresses", "Addresses to which connections are captured", book.captured.len());
    page.gauge("meshd_contested_addresses", "Addresses that two members answer for", book.contested.len());
    page.gauge("meshd_silent_addresses", "Addresses of members where nobody answers", book.warnings.len());
}

fn mesh(page: &mut Page, member: &Member) {
    let roster = member.membership.roster();
    let mut standings = BTreeMap::from([("active", 0_u64), ("left", 0), ("banished", 0)]);
    for m in roster.members() {
        let standing = match m.standing {
            Standing::Active => "active",
            Standing::Left => "left",
            Standing::Banished => "banished",
            Standing::Replaced => continue,
        };
        *standings.entry(standing).or_default() += 1;
    }
    let standings = standings.into_iter().map(|(standing, count)| (standing.to_owned(), count));
    page.gauges("meshd_members", "Hosts in the roster, this one included", "standing", standings);
    let reachable = roster.active().filter(|m| m.node() == member.me() || member.hears(m.node())).count();
    page.gauge("meshd_members_reachable", "Active members that are heard, this one included", reachable);
    page.gauge("meshd_links", "Open control connections to members", member.links.linked().len());
    let count = |n: &std::sync::atomic::AtomicU64| n.load(Relaxed);
    let door = &member.door;
    page.counter("meshd_mesh_connections_total", "Connections accepted on the mesh port", count(&door.accepted));
    let help = "Connections to the mesh port closed at once because too many handshakes were in progress";
    page.counter("meshd_mesh_connections_crowded_total", help, count(&door.crowded));
    page.counter(
        "meshd_mesh_handshakes_failed_total",
        "Handshakes on the mesh port that failed or took too long",
        count(&door.failed),
    );
}

fn identity(page: &mut Page, member: &Member) {
    let held = member.svids.held();
    page.gauge("meshd_svids", "Certificates this host holds", held.len());
    let ends = held.into_iter().map(|h| (h.leaf.id.to_string(), h.leaf.not_after.0));
    let help = "When a certificate of this host ends, in seconds since 1970";
    page.gauges("identity_cert_expiration_timestamp_seconds", help, "id", ends);
    let help = "Certificates that could not be had, each attempt counted";
    page.counter("meshd_svid_failures_total", help, member.svids.failures());
    let help = "Connections for which the certificate of the node stood in for a workload's";
    page.counter("meshd_svid_fallbacks_total", help, member.svids.fallbacks());
    if let Some(end) = member.membership.bundle().roots.iter().map(|r| r.not_after.0).max() {
        page.gauge("meshd_root_expiration_timestamp_seconds", "When the last root of the mesh ends, in seconds since 1970", end);
    }
}

fn proxy(page: &mut Page, member: &Member) {
    let proxy = &member.proxy;
    let faults = proxy.edges.faults();
    let of =
        |direction| faults.iter().filter(move |(d, ..)| *d == direction).map(|(_, reason, count)| ((*reason).to_owned(), *count));
    let help = "Connections of peers that failed, by reason";
    page.counters("inbound_tcp_errors_total", help, "error", of(Direction::Inbound));
    let help = "Connections of this host to members that failed, by reason";
    page.counters("outbound_tcp_errors_total", help, "error", of(Direction::Outbound));
    page.gauge("meshd_connections", "Connections of applications carried at this moment", proxy.live.count());
    page.counter("meshd_connections_overload_total", "Connections refused because there were too many", proxy.live.overloads());
    let help = "Tunnels to other members that wait for the next connection of the same workload to the same service";
    page.gauge("meshd_tunnels_idle", help, proxy.pool.count());
    page.counter(
        "meshd_tunnels_reused_total",
        "Connections that found such a tunnel and needed no handshake",
        proxy.pool.reused(),
    );
    page.counter("meshd_tunnels_ahead_total", "Tunnels dialled ahead of the connection that would need one", proxy.pool.ahead());
    let lent = lent();
    page.gauge("meshd_buffer_bytes", "Bytes of buffers for what connections have in hand at this moment", lent.bytes);
    page.gauge("meshd_buffer_bytes_max", "The most that may be", lent.bound);
    let help = "Times there was no buffer left, and a record was carried without";
    page.counter("meshd_buffers_refused_total", help, lent.refused);
    page.counter("meshd_panics_total", "Connections ended by a defect of meshd", proxy.panics());
    page.edges = proxy.edges.snapshot(member.now());
    page.gauge("meshd_edges", "Pairs of talkers that have series of their own", page.edges.len());
    let help = "Times a new pair of talkers found no place: an idle one was forgotten for it, or it was counted under other";
    page.counter("meshd_edges_dropped_total", help, proxy.edges.dropped());
    page.sums = [Direction::Outbound, Direction::Inbound]
        .map(|direction| Sum { direction, other: proxy.edges.other(direction), durations: proxy.edges.durations(direction) })
        .into();
}

/// Whether this host does what it is for: a member with a certificate, and connections captured.
///
/// # Errors
/// What is missing.
pub(super) fn readiness(daemon: &Daemon) -> Result<(), String> {
    let member =
        daemon.member().map_err(|no| [Some(no.1.what), no.1.why].into_iter().flatten().collect::<Vec<_>>().join(": "))?;
    if member.proxy.live.is_draining() {
        return Err("meshd is stopping".into());
    }
    if member.svids.own().is_none() {
        return Err("this node has no certificate yet that others believe".into());
    }
    let capture = member.rules.state();
    match (capture.on, capture.why) {
        (true, _) => Ok(()),
        (false, why) => {
            Err(format!("connections are not captured: {}", why.unwrap_or_else(|| "the rules are not in place".into())))
        }
    }
}
