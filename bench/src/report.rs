//! From measurements to tables. Figures of one round are compared with those of the same round only: a machine is never as busy twice.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::load::Outcome;

/// One workload over one plane in one round, or what it keeps in memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measurement {
    /// Which round.
    pub(crate) round: u32,
    /// The plane, as it is called on the command line.
    pub(crate) plane: String,
    /// The workload.
    pub(crate) load: String,
    /// What the client saw.
    pub(crate) outcome: Outcome,
    /// CPU seconds of the plane on both hosts.
    pub(crate) cpu: f64,
    /// Resident KiB on the client's and the service's host: idle, and with connections held.
    pub(crate) memory: Option<Memory>,
}

/// See [`Measurement::memory`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// Just started.
    pub(crate) idle: (f64, f64),
    /// With `count` connections that carry nothing.
    pub(crate) held: (f64, f64),
    /// How many.
    pub(crate) count: usize,
    /// Microseconds until the slowest of them answered after they had rested.
    pub(crate) slowest: f64,
}

type Figure = fn(&Measurement) -> f64;

fn rate(m: &Measurement) -> f64 {
    m.outcome.done as f64 / m.outcome.seconds
}
fn gigabits(m: &Measurement) -> f64 {
    rate(m) * 8e-9
}
fn per_gigabyte(m: &Measurement) -> f64 {
    m.cpu / (m.outcome.done as f64 / 1e9)
}
fn per_request(m: &Measurement) -> f64 {
    m.cpu * 1e3 / m.outcome.done as f64
}
fn p50(m: &Measurement) -> f64 {
    m.outcome.p50 / 1e3
}
fn p99(m: &Measurement) -> f64 {
    m.outcome.p99 / 1e3
}
fn failed(m: &Measurement) -> f64 {
    m.outcome.failed as f64
}

/// A column: its name, its figure, decimals, and whether ratios to `direct` and to `reference` follow.
type Column = (&'static str, Figure, usize, bool, bool);

const BULK: &[Column] = &[("Gbit/s", gigabits, 2, true, false), ("CPU s/GB", per_gigabyte, 2, false, true)];
const SHORT: &[Column] = &[
    ("connections/s", rate, 0, true, false),
    ("p50 ms", p50, 2, false, false),
    ("p99 ms", p99, 2, false, false),
    ("failed", failed, 0, false, false),
    ("CPU ms each", per_request, 3, false, true),
];
const REQUESTS: &[Column] = &[
    ("requests/s", rate, 0, true, false),
    ("p50 ms", p50, 3, true, false),
    ("p99 ms", p99, 3, true, false),
    ("failed", failed, 0, false, false),
    ("CPU ms each", per_request, 3, false, true),
];

const TABLES: &[(&str, &str, &[Column])] = &[
    ("bulk1", "Bulk, one stream", BULK),
    ("bulk8", "Bulk, eight streams", BULK),
    ("short", "A connection for each request, 32 at a time", SHORT),
    ("fixed", "1,000 requests a second over 16 connections, open loop", REQUESTS),
    ("saturated", "Requests over 32 connections, closed loop", REQUESTS),
    ("beside", "200 new connections a second beside 80 downloads that nobody reads", SHORT),
];

/// All tables, in Markdown. CPU counts the plane's processes on both hosts.
pub(crate) fn tables(all: &[Measurement]) -> String {
    let mut text = String::new();
    for (load, title, columns) in TABLES {
        let rows = by_plane(all, |m| m.load == *load);
        if rows.is_empty() {
            continue;
        }
        let _ = write!(text, "### {title}\n\n| |");
        for (name, _, _, direct, reference) in *columns {
            let _ = write!(text, " {name} |");
            text.push_str(if *direct { " of direct |" } else { "" });
            text.push_str(if *reference { " of reference |" } else { "" });
        }
        let cells = columns.iter().map(|c| 1 + usize::from(c.3) + usize::from(c.4)).sum::<usize>();
        let _ = writeln!(text, "\n| --- |{}", " --- |".repeat(cells));
        for (plane, rounds) in &rows {
            let _ = write!(text, "| {plane} |");
            for (_, figure, decimals, direct, reference) in *columns {
                let figures: Vec<f64> = rounds.values().map(|m| figure(m)).collect();
                let _ = write!(text, " {}{} |", show(median(&figures), *decimals), range(&figures, *decimals));
                for base in
                    [(*direct, "direct"), (*reference, "reference")].into_iter().filter_map(|(is, base)| is.then_some(base))
                {
                    let _ = write!(text, " {} |", show(ratio(&rows, plane, base, *figure), 2));
                }
            }
            text.push('\n');
        }
        text.push('\n');
    }
    text.push_str(&memory(all));
    text
}

type Rows<'a> = BTreeMap<String, BTreeMap<u32, &'a Measurement>>;

fn by_plane(all: &[Measurement], is: impl Fn(&Measurement) -> bool) -> Rows<'_> {
    let mut rows = Rows::new();
    for m in all.iter().filter(|m| is(m)) {
        rows.entry(m.plane.clone()).or_default().insert(m.round, m);
    }
    rows
}

/// The median of the ratios, each of two figures of one round.
fn ratio(rows: &Rows<'_>, plane: &str, base: &str, figure: Figure) -> f64 {
    let (Some(ours), Some(theirs)) = (rows.get(plane), rows.get(base)) else { return f64::NAN };
    let ratios: Vec<f64> = ours.iter().filter_map(|(round, m)| Some(figure(m) / figure(theirs.get(round)?))).collect();
    median(&ratios)
}

fn memory(all: &[Measurement]) -> String {
    let rows = by_plane(all, |m| m.memory.is_some());
    if rows.is_empty() {
        return String::new();
    }
    let mut text = "### Memory, client's host / service's host\n\n| | idle MiB | with connections held MiB | KiB each | slowest answer after rest, ms |\n| --- | --- | --- | --- | --- |\n".to_owned();
    for (plane, rounds) in &rows {
        let of = |figure: fn(&Memory) -> f64| {
            median(&rounds.values().filter_map(|m| m.memory.as_ref().map(figure)).collect::<Vec<_>>())
        };
        let mib = |k: f64| show(k / 1024.0, 1);
        let _ = writeln!(
            text,
            "| {plane} | {} / {} | {} / {} | {} / {} | {} |",
            mib(of(|m| m.idle.0)),
            mib(of(|m| m.idle.1)),
            mib(of(|m| m.held.0)),
            mib(of(|m| m.held.1)),
            show(of(|m| (m.held.0 - m.idle.0) / m.count as f64), 1),
            show(of(|m| (m.held.1 - m.idle.1) / m.count as f64), 1),
            show(of(|m| m.slowest / 1e3), 1),
        );
    }
    text
}

/// What meshd's data plane is meant to reach, and whether it did here: name, figure, and the most or least it may be.
pub(crate) fn targets(all: &[Measurement]) -> String {
    let of = |load: &str, base: &str, figure: Figure| ratio(&by_plane(all, |m| m.load == load), "meshd", base, figure);
    let held = all
        .iter()
        .filter(|m| m.plane == "meshd")
        .filter_map(|m| m.memory)
        .map(|m| ((m.held.0 - m.idle.0) / m.count as f64).max((m.held.1 - m.idle.1) / m.count as f64));
    let most = [
        ("bulk, one stream: CPU per byte, of the reference", of("bulk1", "reference", per_gigabyte), 0.65),
        ("bulk, eight streams: CPU per byte, of the reference", of("bulk8", "reference", per_gigabyte), 0.75),
        ("short connections: CPU each, of the reference", of("short", "reference", per_request), 0.22),
        ("requests over kept connections: CPU each, of the reference", of("saturated", "reference", per_request), 0.85),
        ("a connection that carries nothing: KiB on a host", median(&held.collect::<Vec<_>>()), 5.0),
    ];
    let least = [("short connections a second, of direct", of("short", "direct", rate), 0.45)];
    let rows = most
        .into_iter()
        .map(|row| (row, "at most", row.1 <= row.2))
        .chain(least.into_iter().map(|row| (row, "at least", row.1 >= row.2)));
    let mut text = String::new();
    for ((name, figure, limit), word, met) in rows.filter(|((_, figure, _), ..)| figure.is_finite()) {
        let _ = writeln!(text, "{} {name}: {}, {word} {limit}", if met { "met   " } else { "MISSED" }, show(figure, 2));
    }
    text
}

/// The one in the middle; of an even number the lower one.
fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// From the least to the most, behind the median; nothing for one figure.
fn range(figures: &[f64], decimals: usize) -> String {
    if figures.len() < 2 {
        return String::new();
    }
    let (least, most) = figures.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), f| (a.min(*f), b.max(*f)));
    format!(" ({}..{})", show(least, decimals), show(most, decimals))
}

fn show(figure: f64, decimals: usize) -> String {
    if figure.is_finite() { format!("{figure:.decimals$}") } else { "-".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(round: u32, plane: &str, load: &str, done: u64, cpu: f64) -> Measurement {
        let outcome = Outcome { seconds: 2.0, done, ..Outcome::default() };
        Measurement { round, plane: plane.into(), load: load.into(), outcome, cpu, memory: None }
    }

    #[test]
    fn ratios_are_those_of_one_round() {
        // A machine that was busy in the second round: the medians alone would say 1.5.
        let all = [
            one(1, "reference", "bulk1", 1_000_000_000, 2.0),
            one(1, "meshd", "bulk1", 1_000_000_000, 1.0),
            one(2, "reference", "bulk1", 1_000_000_000, 6.0),
            one(2, "meshd", "bulk1", 1_000_000_000, 3.0),
        ];
        let text = tables(&all);
        assert!(text.contains("| meshd | 4.00 (4.00..4.00) | - | 1.00 (1.00..3.00) | 0.50 |"), "{text}");
        assert!(targets(&all).contains("met    bulk, one stream: CPU per byte, of the reference: 0.50, at most 0.65"));
        assert!(targets(&all[..2]).contains("0.50") && targets(&all[..1]).is_empty());
        let slow = [one(1, "reference", "short", 100, 1.0), one(1, "meshd", "short", 100, 0.5)];
        assert!(targets(&slow).starts_with("MISSED short"), "{}", targets(&slow));
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.0);
        assert!(median(&[]).is_nan());
    }
}
