//! Metrics as text, for Prometheus. The only home of `prometheus-client`.
//!
//! Owns the two text formats and the series that are made of edges; what is measured comes in as a [`Page`]. The names and labels of
//! what is counted for TCP connections are Linkerd's (docs/metrics.md). Written piece by piece: no answer is ever in memory as a whole.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::net::SocketAddr;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::proxy::edges::durations::{BOUNDS_MS, DurationsView};
use crate::proxy::edges::{Direction, EdgeView, Figures, Key};

/// A text format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Prometheus' own, version 0.0.4.
    Prometheus,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    /// What a client prefers that says this in `Accept` (RFC 9110 §12.5.1). Prometheus' own where it does not care.
    pub(crate) fn negotiated(accept: &str) -> Self {
        let mut best = (0.0, Self::Prometheus);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut quality, mut version) = (1.0_f32, None);
            for (name, value) in parts.filter_map(|p| p.split_once('=')) {
                match name.trim().to_ascii_lowercase().as_str() {
                    "q" => quality = value.trim().parse().unwrap_or(0.0),
                    "version" => version = Some(value.trim().trim_matches('"')),
                    _ => {}
                }
            }
            let format = match (kind.as_str(), version) {
                ("application/openmetrics-text", None | Some("1.0.0")) => Self::OpenMetrics,
                ("text/plain", None | Some("0.0.4")) | ("text/*" | "*/*", None) => Self::Prometheus,
                _ => continue,
            };
            if quality > best.0 {
                best = (quality, format);
            }
        }
        best.1
    }

    /// Its content type.
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Everything measured at one moment.
#[derive(Debug, Default)]
pub(crate) struct Page {
    pub(crate) families: Vec<Family>,
    pub(crate) edges: Vec<EdgeView>,
    pub(crate) sums: Vec<Sum>,
}

/// What is known of all connections of one direction.
#[derive(Debug)]
pub(crate) struct Sum {
    pub(crate) direction: Direction,
    /// Of edges that had no place in the table.
    pub(crate) other: Figures,
    pub(crate) durations: DurationsView,
}

/// A metric that is not made of edges.
#[derive(Debug)]
pub(crate) struct Family {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    samples: Vec<(Labels<'static>, Value)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

/// A value.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value {
    Whole(u64),
    Real(f64),
}

impl From<u64> for Value {
    fn from(n: u64) -> Self {
        Self::Whole(n)
    }
}
impl From<usize> for Value {
    fn from(n: usize) -> Self {
        Self::Whole(n as u64)
    }
}
impl From<bool> for Value {
    fn from(yes: bool) -> Self {
        Self::Whole(yes.into())
    }
}
impl From<f64> for Value {
    fn from(n: f64) -> Self {
        Self::Real(n)
    }
}

type Label<'a> = (&'static str, Cow<'a, str>);
type Labels<'a> = Vec<Label<'a>>;

impl Page {
    /// A metric that only grows; its name ends in `_total`.
    pub(crate) fn counter(&mut self, name: &'static str, help: &'static str, value: impl Into<Value>) {
        self.family(name, help, Kind::Counter, vec![(Vec::new(), value.into())]);
    }

    /// The same with a value for each value of a label.
    pub(crate) fn counters<V: Into<Value>>(
        &mut self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        values: impl IntoIterator<Item = (String, V)>,
    ) {
        self.family(name, help, Kind::Counter, labelled(label, values));
    }

    /// A metric that may go either way.
    pub(crate) fn gauge(&mut self, name: &'static str, help: &'static str, value: impl Into<Value>) {
        self.family(name, help, Kind::Gauge, vec![(Vec::new(), value.into())]);
    }

    /// The same with a value for each value of a label.
    pub(crate) fn gauges<V: Into<Value>>(
        &mut self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        values: impl IntoIterator<Item = (String, V)>,
    ) {
        self.family(name, help, Kind::Gauge, labelled(label, values));
    }

    /// A metric whose labels say it all.
    pub(crate) fn info(&mut self, name: &'static str, help: &'static str, labels: Vec<(&'static str, String)>) {
        let labels = labels.into_iter().map(|(k, v)| (k, v.into())).collect();
        self.family(name, help, Kind::Gauge, vec![(labels, Value::Whole(1))]);
    }

    fn family(&mut self, name: &'static str, help: &'static str, kind: Kind, samples: Vec<(Labels<'static>, Value)>) {
        self.families.push(Family { name, help, kind, samples });
    }
}

fn labelled<V: Into<Value>>(label: &'static str, values: impl IntoIterator<Item = (String, V)>) -> Vec<(Labels<'static>, Value)> {
    values.into_iter().map(|(of, value)| (vec![(label, of.into())], value.into())).collect()
}

/// Writes all of it.
///
/// # Errors
/// Those of `out`.
pub(crate) fn render(page: Page, format: Format, out: &mut impl Write) -> fmt::Result {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape { page, format }));
    encode_registry(out, &registry)?;
    if format == Format::OpenMetrics { encode_eof(out) } else { Ok(()) }
}

#[derive(Debug)]
struct Scrape {
    page: Page,
    format: Format,
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (page, format) = (&self.page, self.format);
        for family in page.families.iter().filter(|f| !f.samples.is_empty()) {
            let mut writer = Writer::begin(&mut encoder, family.name, family.help, family.kind, format)?;
            for (labels, value) in &family.samples {
                if labels.is_empty() { writer.only(*value)? } else { writer.sample(&labels.as_slice(), *value)? }
            }
        }
        connections(page, &mut encoder, format)
    }
}

/// The series of edges, and of what had no place among them.
fn connections(page: &Page, encoder: &mut DescriptorEncoder<'_>, format: Format) -> fmt::Result {
    let edges = page.edges.iter().map(|e| Series::of_edge(&e.key, &e.figures));
    let others = page.sums.iter().filter(|s| s.other.opened > 0 || !s.other.unsecured.is_empty());
    let all: Vec<Series<'_>> = edges.chain(others.map(|s| Series::of_others(s.direction, &s.other))).collect();

    let mut writer = Writer::begin(encoder, "tcp_open_total", "Connections that were opened", Kind::Counter, format)?;
    for s in &all {
        writer.sample(&s.labels.as_slice(), s.opened().into())?;
        for (reason, count) in s.unsecured() {
            writer.sample(&(s.bare.as_slice(), [("no_tls_reason", *reason)]), (*count).into())?;
        }
    }
    let mut writer = Writer::begin(encoder, "tcp_close_total", "Connections that have ended", Kind::Counter, format)?;
    for s in &all {
        // Always there, so that a rate can be taken from the first end on.
        writer.sample(&(s.labels.as_slice(), [("errno", ""), ("reason", "")]), s.figures.clean.into())?;
        for (reason, count) in s.broken() {
            // Whatever goes wrong is a reset to the application.
            writer.sample(&(s.labels.as_slice(), [("errno", "ECONNRESET"), ("reason", reason)]), count.into())?;
        }
        for (reason, count) in s.unsecured() {
            let end = [("no_tls_reason", *reason), ("errno", "ECONNRESET"), ("reason", reason)];
            writer.sample(&(s.bare.as_slice(), end), (*count).into())?;
        }
    }
    let mut writer = Writer::begin(encoder, "tcp_open_connections", "Connections that are open", Kind::Gauge, format)?;
    for s in &all {
        writer.sample(&s.labels.as_slice(), s.figures.open.into())?;
    }
    let mut writer =
        Writer::begin(encoder, "tcp_read_bytes_total", "Bytes of applications that came from the peer", Kind::Counter, format)?;
    for s in &all {
        writer.sample(&s.labels.as_slice(), s.figures.bytes_in.into())?;
    }
    let mut writer =
        Writer::begin(encoder, "tcp_write_bytes_total", "Bytes of applications that went to the peer", Kind::Counter, format)?;
    for s in &all {
        writer.sample(&s.labels.as_slice(), s.figures.bytes_out.into())?;
    }
    if page.sums.is_empty() {
        return Ok(());
    }
    let (name, help) = ("tcp_connection_duration_ms", "How long secured connections lasted that have ended, in milliseconds");
    let mut histogram = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    for sum in &page.sums {
        let labels = [("direction", word(sum.direction)), ("peer", peer(sum.direction)), ("tls", "true")];
        let bounds = BOUNDS_MS.iter().map(|ms| *ms as f64).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(sum.durations.counts).collect();
        let count = sum.durations.counts.iter().sum();
        let total = sum.durations.sum_us as f64 / 1000.0;
        histogram.encode_family(&labels)?.encode_histogram::<NoLabelSet>(total, count, &buckets, None)?;
    }
    Ok(())
}

/// One metric being written.
struct Writer<'e> {
    encoder: MetricEncoder<'e>,
    kind: Kind,
    format: Format,
}

impl<'e> Writer<'e> {
    fn begin(
        encoder: &'e mut DescriptorEncoder<'_>,
        name: &'static str,
        help: &str,
        kind: Kind,
        format: Format,
    ) -> Result<Self, fmt::Error> {
        // OpenMetrics declares a counter without `_total`, Prometheus' own format declares what the samples are called.
        let (name, metric) = match (kind, format) {
            (Kind::Counter, Format::OpenMetrics) => (name.strip_suffix("_total").unwrap_or(name), MetricType::Counter),
            (Kind::Counter, Format::Prometheus) => (name, MetricType::Counter),
            (Kind::Gauge, _) => (name, MetricType::Gauge),
        };
        Ok(Self { encoder: encoder.encode_descriptor(name, help, None, metric)?, kind, format })
    }

    fn sample(&mut self, labels: &impl EncodeLabelSet, value: Value) -> fmt::Result {
        let mut sample = self.encoder.encode_family(labels)?;
        put(&mut sample, self.kind, self.format, value)
    }

    /// The only sample of a metric without labels.
    fn only(&mut self, value: Value) -> fmt::Result {
        put(&mut self.encoder, self.kind, self.format, value)
    }
}

fn put(sample: &mut MetricEncoder<'_>, kind: Kind, format: Format, value: Value) -> fmt::Result {
    match (kind, format, value) {
        (Kind::Counter, Format::OpenMetrics, Value::Whole(n)) => sample.encode_counter::<NoLabelSet, _, u64>(&n, None),
        (Kind::Counter, Format::OpenMetrics, Value::Real(n)) => sample.encode_counter::<NoLabelSet, _, u64>(&n, None),
        // The encoder's counters would get a second `_total`: as a gauge the same line has the name as it is.
        (_, _, Value::Whole(n)) => sample.encode_gauge(&n),
        (_, _, Value::Real(n)) => sample.encode_gauge(&n),
    }
}

/// What is written for an edge: its labels, made once for all metrics.
struct Series<'a> {
    /// Of connections that were secured.
    labels: Labels<'a>,
    /// Of those that were not; what is missing is why.
    bare: Labels<'a>,
    direction: Direction,
    figures: &'a Figures,
}

impl<'a> Series<'a> {
    fn of_edge(key: &'a Key, figures: &'a Figures) -> Self {
        let id = |id: &Option<_>| Cow::Owned(id.as_ref().map_or_else(String::new, ToString::to_string));
        let port = Cow::Owned(key.port.to_string());
        let target = match key.direction {
            Direction::Outbound => vec![
                ("target_addr", Cow::Owned(SocketAddr::new(key.address, key.port).to_string())),
                ("target_ip", Cow::Owned(key.address.to_string())),
                ("target_port", port),
            ],
            Direction::Inbound => vec![("client_ip", Cow::Owned(key.address.to_string())), ("target_port", port)],
        };
        Self::new(key.direction, target, id(&key.source), id(&key.destination), figures)
    }

    fn of_others(direction: Direction, figures: &'a Figures) -> Self {
        Self::new(direction, Vec::new(), "other".into(), "other".into(), figures)
    }

    fn new(direction: Direction, target: Labels<'a>, client: Cow<'a, str>, server: Cow<'a, str>, figures: &'a Figures) -> Self {
        let with = |peer: &'static str, tls: &'static str| -> Labels<'a> {
            let first = [("direction", Cow::Borrowed(word(direction))), ("peer", Cow::Borrowed(peer))];
            let last = [("tls", Cow::Borrowed(tls)), ("client_id", client.clone()), ("server_id", server.clone())];
            first.into_iter().chain(target.clone()).chain(last).collect()
        };
        // Only our own applications' connections can fail before they are secured: what a peer sends us is, or never was one.
        Self { labels: with(peer(direction), "true"), bare: with("src", "no_identity"), direction, figures }
    }

    fn opened(&self) -> u64 {
        self.figures.opened + self.refused_at_once()
    }

    /// Connections of peers that were secured and refused before they were counted as open.
    fn refused_at_once(&self) -> u64 {
        if self.direction == Direction::Inbound { self.figures.unsecured.values().sum() } else { 0 }
    }

    /// Secured ones that failed, by reason.
    fn broken(&self) -> Vec<(&'static str, u64)> {
        let mut broken = self.figures.broken.clone();
        if self.direction == Direction::Inbound {
            for (reason, count) in &self.figures.unsecured {
                *broken.entry(reason).or_default() += count;
            }
        }
        broken.into_iter().collect()
    }

    /// Those that were never secured, by reason.
    fn unsecured(&self) -> impl Iterator<Item = (&&'static str, &u64)> {
        self.figures.unsecured.iter().filter(|_| self.direction == Direction::Outbound)
    }
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "outbound",
        Direction::Inbound => "inbound",
    }
}

/// On which side of this host the secured connection is, in Linkerd's words.
fn peer(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "dst",
        Direction::Inbound => "src",
    }
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
