//! `meshd stat`: how the services of this host and those it talks to are doing.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use meshd_ca::identity::{HostName, SpiffeId};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::screen::{Colour, bytes};
use super::table::{Cell, Table};
use super::{Around, Exit, Failure, Output};
use crate::api::{DURATION_BOUNDS_MS, Direction, Edge};
use crate::config::{parse_duration, show_duration};

const EXAMPLES: &str = "\
CONN/S, IN/S and OUT/S are what happened while the command looked. SUCCESS is the share of connections that ended as their applications \
meant them to, or are still open, and P50, P95 and P99 are how long those lasted that have ended, not more than: since the edge is known, \
which is at least an hour.

Examples:
  meshd stat
  meshd stat --window 30s
  meshd stat -o json | jq '.[] | select(.success_rate < 0.99)'";

/// Shortest and longest look.
const WINDOWS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(600)];

/// Show connections, success rate, bytes and durations of services
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Stat {
    /// How long to look
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = window)]
    window: Duration,
    #[command(flatten)]
    output: Output,
}

fn window(text: &str) -> Result<Duration, String> {
    let [least, most] = WINDOWS;
    let window = parse_duration(text).map_err(|e| e.to_string())?;
    let fine = (least..=most).contains(&window);
    fine.then_some(window).ok_or_else(|| format!("expected {} to {}", show_duration(least), show_duration(most)))
}

impl Stat {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let screen = around.screen(self.output);
        let local = around.local()?;
        let before = local.edges().await?;
        let begun = Instant::now();
        sleep(self.window).await;
        let after = local.edges().await?;
        let rows = rows(&before, &after, begun.elapsed());
        screen.show(&rows, || table(&rows).render(&screen, "no connections yet"))?;
        Ok(Exit::Ok)
    }
}

/// A service and who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Of {
    inbound: bool,
    server: Option<SpiffeId>,
    port: u16,
    peer: Option<HostName>,
}

impl Of {
    fn edge(edge: &Edge) -> Self {
        let (server, peer) = (edge.server.clone(), edge.peer.clone());
        Self { inbound: edge.direction == Direction::Inbound, server, port: edge.port, peer }
    }
}

/// What all edges of one service and peer add up to.
#[derive(Debug, Default, Clone)]
struct Sum {
    open: u64,
    total: u64,
    failed: u64,
    bytes_in: u64,
    bytes_out: u64,
    durations: Vec<u64>,
}

impl Sum {
    fn add(&mut self, edge: &Edge) {
        self.open += edge.open;
        self.total += edge.total;
        self.failed += edge.failed;
        self.bytes_in += edge.bytes_in;
        self.bytes_out += edge.bytes_out;
        self.durations.resize(self.durations.len().max(edge.durations.len()), 0);
        self.durations.iter_mut().zip(&edge.durations).for_each(|(sum, n)| *sum += n);
    }

    /// The bound of the bucket in which the share `q` of all durations is reached; none above the last bound, or without any.
    fn quantile_ms(&self, q: f64) -> Option<u64> {
        let all: u64 = self.durations.iter().sum();
        let rank = (all as f64 * q).ceil().max(1.0) as u64;
        let mut seen = 0;
        let at = self.durations.iter().position(|n| {
            seen += n;
            seen >= rank
        })?;
        DURATION_BOUNDS_MS.get(at).copied()
    }
}

/// One line of the answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    direction: Direction,
    server: Option<SpiffeId>,
    port: u16,
    peer: Option<HostName>,
    open: u64,
    connections_per_second: f64,
    /// Since the edge is known.
    success_rate: Option<f64>,
    bytes_in_per_second: f64,
    bytes_out_per_second: f64,
    /// Not more than; none above an hour, or when none has ended.
    p50_ms: Option<u64>,
    p95_ms: Option<u64>,
    p99_ms: Option<u64>,
}

fn sums(edges: &[Edge]) -> BTreeMap<Of, Sum> {
    edges.iter().fold(BTreeMap::new(), |mut sums: BTreeMap<Of, Sum>, edge| {
        sums.entry(Of::edge(edge)).or_default().add(edge);
        sums
    })
}

fn rows(before: &[Edge], after: &[Edge], window: Duration) -> Vec<Row> {
    let before = sums(before);
    let rate = |then: u64, now: u64| (now.saturating_sub(then) as f64 / window.as_secs_f64() * 10.0).round() / 10.0;
    let row = |(of, now): (Of, Sum)| {
        let then = before.get(&of).cloned().unwrap_or_default();
        Row {
            direction: if of.inbound { Direction::Inbound } else { Direction::Outbound },
            open: now.open,
            connections_per_second: rate(then.total, now.total),
            success_rate: (now.total > 0).then(|| now.total.saturating_sub(now.failed) as f64 / now.total as f64),
            bytes_in_per_second: rate(then.bytes_in, now.bytes_in),
            bytes_out_per_second: rate(then.bytes_out, now.bytes_out),
            p50_ms: now.quantile_ms(0.5),
            p95_ms: now.quantile_ms(0.95),
            p99_ms: now.quantile_ms(0.99),
            server: of.server,
            port: of.port,
            peer: of.peer,
        }
    };
    sums(after).into_iter().map(row).collect()
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        "DIR", "SERVICE", ">PORT", "PEER", ">OPEN", ">CONN/S", ">SUCCESS", ">IN/S", ">OUT/S", ">P50", ">P95", ">P99",
    ]);
    for row in rows {
        let success = match row.success_rate {
            None => "-".into(),
            Some(rate) => {
                let colour = if rate < 0.99 { Colour::Red } else { Colour::Green };
                // Never rounded up to a hundred: one failure in a thousand is one.
                Cell::coloured(format!("{:.2}%", (rate * 10_000.0).floor() / 100.0), colour)
            }
        };
        let lasted = |ms: Option<u64>| -> Cell { ms.map_or("-".into(), |ms| show_duration(Duration::from_millis(ms)).into()) };
        table.row([
            row.direction.into(),
            row.server.as_ref().map_or("-".into(), |id| Cell::from(&id.workload)),
            row.port.into(),
            row.peer.as_ref().map_or("-".into(), Cell::from),
            row.open.into(),
            row.connections_per_second.into(),
            success,
            bytes(row.bytes_in_per_second as u64).into(),
            bytes(row.bytes_out_per_second as u64).into(),
            lasted(row.p50_ms),
            lasted(row.p95_ms),
            lasted(row.p99_ms),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(port: u16, total: u64, failed: u64, durations: &[(usize, u64)]) -> Edge {
        let mut counts = vec![0; DURATION_BOUNDS_MS.len() + 1];
        durations.iter().for_each(|(at, n)| counts[*at] = *n);
        Edge {
            direction: Direction::Outbound,
            client: None,
            server: Some("spiffe://mesh/host/b/unit/web.service".parse().unwrap()),
            peer: Some("b".parse().unwrap()),
            address: [10, 0, 0, 2].into(),
            port,
            secured: true,
            reason: None,
            open: 1,
            total,
            failed,
            bytes_in: total * 1000,
            bytes_out: 0,
            last_seen_seconds: 0,
            durations: counts,
        }
    }

    #[test]
    fn edges_of_a_service_and_peer_are_one_row() {
        let before = [edge(80, 10, 0, &[]), edge(80, 5, 0, &[])];
        let after = [edge(80, 20, 1, &[(0, 50), (3, 45)]), edge(80, 5, 0, &[(12, 5)]), edge(81, 0, 0, &[])];
        let rows = rows(&before, &after, Duration::from_secs(2));
        assert_eq!(rows.len(), 2);
        let row = &rows[0];
        assert_eq!((row.port, row.open, row.connections_per_second), (80, 2, 5.0));
        assert_eq!((row.bytes_in_per_second, row.success_rate), (5000.0, Some(0.96)));
        assert_eq!((row.p50_ms, row.p95_ms, row.p99_ms), (Some(1), Some(50), None));
        assert_eq!((rows[1].success_rate, rows[1].p50_ms), (None, None));
    }

    #[test]
    fn a_daemon_that_was_started_again_in_between_gives_no_negative_rate() {
        let rows = rows(&[edge(80, 100, 0, &[])], &[edge(80, 1, 0, &[])], Duration::from_secs(1));
        assert_eq!((rows[0].connections_per_second, rows[0].bytes_in_per_second), (0.0, 0.0));
    }

    #[test]
    fn one_failure_in_many_is_not_a_hundred_percent() {
        let rows = rows(&[], &[edge(80, 1_000_000, 1, &[])], Duration::from_secs(1));
        let text = table(&rows).render(&super::super::screen::Screen::fixed(false, None), "");
        assert!(text.contains("99.99%"), "{text}");
    }
}
