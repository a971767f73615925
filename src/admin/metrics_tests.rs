//! The text of metrics: to the byte where it is short, by its rules where it is long.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr};

use meshd_ca::identity::NodeId;
use meshd_ca::time::UnixTime;

use super::*;
use crate::proxy::Fault;
use crate::proxy::edges::{Edges, Reason};
use crate::proxy::header::Refusal;

const PEER: NodeId = NodeId::from_bytes([7; 16]);
const NOW: UnixTime = UnixTime(1_800_000_000);

fn key(direction: Direction, address: impl Into<IpAddr>, port: u16) -> Key {
    let (source, destination) = ("spiffe://mesh/host/a/user/anna", "spiffe://mesh/host/b/unit/web.service");
    Key {
        direction,
        source: Some(source.parse().unwrap()),
        destination: Some(destination.parse().unwrap()),
        address: address.into(),
        port,
    }
}

fn page(edges: &Edges) -> Page {
    let sums = [Direction::Outbound, Direction::Inbound].map(|direction| Sum {
        direction,
        other: edges.other(direction),
        durations: edges.durations(direction),
    });
    Page { families: Vec::new(), edges: edges.snapshot(NOW), sums: sums.into() }
}

fn text(page: Page, format: Format) -> String {
    let mut text = String::new();
    render(page, format, &mut text).unwrap();
    text
}

/// Every sample by its name and labels, and every declared metric with its type. Fails on whatever a scraper would not take.
fn parsed(text: &str) -> (BTreeMap<String, f64>, BTreeMap<String, String>) {
    let (mut samples, mut types) = (BTreeMap::new(), BTreeMap::new());
    let mut helped = BTreeSet::new();
    for line in text.lines() {
        if line == "# EOF" {
            continue;
        } else if let Some(rest) = line.strip_prefix("# HELP ") {
            assert!(helped.insert(rest.split_once(' ').unwrap().0.to_owned()), "described twice: {line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(helped.contains(name), "no help: {line}");
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "declared twice: {line}");
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "twice: {series}");
        }
    }
    (samples, types)
}

#[test]
fn an_edge_to_the_byte() {
    let edges = Edges::default();
    edges.fail(key(Direction::Outbound, [10, 0, 0, 2], 80), Some(PEER), Reason::Unreachable, NOW);
    let open = edges.open(key(Direction::Outbound, [10, 0, 0, 2], 80), PEER, NOW);
    open.meter().sent.add(900);
    open.meter().received.add(20);
    edges.open(key(Direction::Outbound, [10, 0, 0, 2], 80), PEER, NOW).settle(&Err(Fault::Refused(Refusal::Closed)), NOW);
    let mut page = page(&edges);
    page.sums.clear();
    let ids = r#"client_id="spiffe://mesh/host/a/user/anna",server_id="spiffe://mesh/host/b/unit/web.service""#;
    let target = r#"target_addr="10.0.0.2:80",target_ip="10.0.0.2",target_port="80""#;
    let labels = format!(r#"direction="outbound",peer="dst",{target},tls="true",{ids}"#);
    let bare = format!(r#"direction="outbound",peer="src",{target},tls="no_identity",{ids},no_tls_reason="unreachable""#);
    let expected = format!(
        r#"# HELP tcp_open_total Connections that were opened
# TYPE tcp_open_total counter
tcp_open_total{{{labels}}} 2
tcp_open_total{{{bare}}} 1
# HELP tcp_close_total Connections that have ended
# TYPE tcp_close_total counter
tcp_close_total{{{labels},errno="",reason=""}} 0
tcp_close_total{{{labels},errno="ECONNRESET",reason="refused-closed"}} 1
tcp_close_total{{{bare},errno="ECONNRESET",reason="unreachable"}} 1
# HELP tcp_open_connections Connections that are open
# TYPE tcp_open_connections gauge
tcp_open_connections{{{labels}}} 1
# HELP tcp_read_bytes_total Bytes of applications that came from the peer
# TYPE tcp_read_bytes_total counter
tcp_read_bytes_total{{{labels}}} 20
# HELP tcp_write_bytes_total Bytes of applications that went to the peer
# TYPE tcp_write_bytes_total counter
tcp_write_bytes_total{{{labels}}} 900
"#
    );
    assert_eq!(text(page, Format::Prometheus), expected);
}

#[test]
fn openmetrics_declares_counters_without_their_suffix_and_ends() {
    let edges = Edges::default();
    edges.open(key(Direction::Inbound, [10, 0, 0, 1], 80), PEER, NOW).settle(&Ok(()), NOW);
    let mut some = page(&edges);
    some.counter("meshd_x_total", "X", 7_u64);
    some.counter("process_cpu_seconds_total", "Y", 1.5);
    some.gauge("meshd_y", "Y", true);
    let text = text(some, Format::OpenMetrics);
    let (samples, types) = parsed(&text);
    assert!(text.ends_with("# EOF\n"));
    assert_eq!((types["meshd_x"].as_str(), samples["meshd_x_total"]), ("counter", 7.0));
    assert_eq!((types["process_cpu_seconds"].as_str(), samples["process_cpu_seconds_total"]), ("counter", 1.5));
    assert_eq!((types["meshd_y"].as_str(), samples["meshd_y"]), ("gauge", 1.0));
    assert_eq!(types["tcp_connection_duration_ms"], "histogram");
    assert!(types.contains_key("tcp_open") && !types.contains_key("tcp_open_total"), "{types:?}");
    let inbound = r#"direction="inbound",peer="src",client_ip="10.0.0.1",target_port="80",tls="true""#;
    assert_eq!(samples.iter().filter(|(s, n)| s.contains(inbound) && **n == 1.0).count(), 2, "opened and closed: {text}");
}

#[test]
fn what_comes_from_elsewhere_cannot_leave_its_label() {
    let mut page = Page::default();
    page.gauges("meshd_z", "Z", "of", [("a\"} 1\nmeshd_forged 1\\".to_owned(), 1_u64)]);
    for format in [Format::Prometheus, Format::OpenMetrics] {
        let mut again = Page::default();
        std::mem::swap(&mut again, &mut page);
        page.gauges("meshd_z", "Z", "of", [("a\"} 1\nmeshd_forged 1\\".to_owned(), 1_u64)]);
        let text = text(again, format);
        assert!(text.contains(r#"meshd_z{of="a\"} 1\nmeshd_forged 1\\"} 1"#), "{text}");
        assert!(!text.lines().any(|l| l.starts_with("meshd_forged")), "{text}");
    }
}

#[test]
fn durations_are_cumulative_and_agree_with_their_count() {
    let edges = Edges::default();
    for _ in 0..3 {
        edges.open(key(Direction::Outbound, [10, 0, 0, 2], 80), PEER, NOW).settle(&Ok(()), NOW);
    }
    let (samples, _) = parsed(&text(page(&edges), Format::Prometheus));
    let of = |what: &str| -> Vec<(&String, f64)> {
        let (name, labels) = (format!("tcp_connection_duration_ms_{what}{{"), r#"direction="outbound",peer="dst",tls="true""#);
        samples.iter().filter(|(s, _)| s.starts_with(&name) && s.contains(labels)).map(|(s, n)| (s, *n)).collect()
    };
    assert_eq!(of("bucket").len(), 13);
    assert_eq!(of("bucket").iter().find(|(s, _)| s.contains(r#"le="+Inf""#)).map(|(_, n)| *n), Some(3.0));
    assert_eq!(of("count").iter().map(|(_, n)| *n).collect::<Vec<_>>(), [3.0]);
    assert!(of("sum").iter().all(|(_, n)| *n >= 0.0));
}

#[test]
fn what_has_no_place_is_one_series() {
    let edges = Edges::new(2);
    let held: Vec<_> = (1..=9).map(|p| edges.open(key(Direction::Inbound, [10, 0, 0, 1], p), PEER, NOW)).collect();
    let (samples, _) = parsed(&text(page(&edges), Format::Prometheus));
    let open: Vec<_> = samples.iter().filter(|(s, _)| s.starts_with("tcp_open_connections{")).collect();
    assert_eq!(open.len(), 3, "{open:?}");
    let other = r#"tcp_open_connections{direction="inbound",peer="src",tls="true",client_id="other",server_id="other"}"#;
    assert_eq!(samples[other], 7.0);
    assert_eq!(open.iter().map(|(_, n)| **n).sum::<f64>(), held.len() as f64);
}

#[test]
fn refused_at_the_door_is_opened_and_closed_for_a_peer() {
    let edges = Edges::default();
    edges.fail(key(Direction::Inbound, [10, 0, 0, 1], 80), Some(PEER), Reason::Overload, NOW);
    let (samples, _) = parsed(&text(page(&edges), Format::Prometheus));
    let of = |start: &str, part: &str| samples.iter().find(|(s, _)| s.starts_with(start) && s.contains(part)).map(|(_, n)| *n);
    assert_eq!(of("tcp_open_total{", r#"tls="true""#), Some(1.0));
    assert_eq!(of("tcp_close_total{", r#"errno="ECONNRESET",reason="overload""#), Some(1.0));
    assert!(!samples.keys().any(|s| s.contains("no_identity")), "{samples:?}");
}

#[test]
fn ten_thousand_edges_are_one_page_without_a_series_twice() {
    let edges = Edges::new(10_000);
    for n in 0..10_000_u32 {
        let direction = if n % 2 == 0 { Direction::Outbound } else { Direction::Inbound };
        let open = edges.open(key(direction, Ipv4Addr::from(0x0a00_0000 | (n / 100)), 1000 + (n % 100) as u16), PEER, NOW);
        open.meter().sent.add(n as usize);
        open.settle(&Ok(()), NOW);
    }
    let begun = tokio::time::Instant::now();
    let whole = page(&edges);
    let read = begun.elapsed();
    let text = text(whole, Format::Prometheus);
    let written = begun.elapsed();
    println!("10,000 edges: read in {read:?}, {} bytes in {written:?}", text.len());
    let (samples, _) = parsed(&text);
    assert_eq!(samples.keys().filter(|s| s.starts_with("tcp_open_total{")).count(), 10_000);
    let bytes: f64 = samples.iter().filter(|(s, _)| s.starts_with("tcp_write_bytes_total{")).map(|(_, n)| *n).sum();
    assert_eq!(bytes, (0..10_000_u32).map(f64::from).sum::<f64>());
    // A machine that is busy with other tests, unoptimised: what takes longer is no mere delay.
    assert!(written < std::time::Duration::from_secs(10), "{written:?}");
}

#[test]
fn the_format_a_client_prefers() {
    use Format::{OpenMetrics, Prometheus};
    let scraper = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                   text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
    for (accept, format) in [
        ("", Prometheus),
        ("*/*", Prometheus),
        ("text/html, */*;q=0.8", Prometheus),
        (scraper, OpenMetrics),
        ("application/openmetrics-text; version=\"1.0.0\"; charset=utf-8", OpenMetrics),
        ("application/openmetrics-text;version=0.0.1", Prometheus),
        ("application/openmetrics-text;q=0", Prometheus),
        ("text/plain;version=0.0.4;q=0.9, application/openmetrics-text;q=0.5", Prometheus),
        ("text/plain;version=0.0.4;q=0.5, Application/OpenMetrics-Text;Q=0.9", OpenMetrics),
        ("application/openmetrics-text;q=zero", Prometheus),
        (";;,=,;q=", Prometheus),
    ] {
        assert_eq!(Format::negotiated(accept), format, "{accept}");
    }
    let kinds: HashSet<_> = [OpenMetrics, Prometheus].map(Format::content_type).into();
    assert_eq!(kinds.len(), 2);
}
