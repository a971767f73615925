//! The access log: one line for each connection that has ended. Off unless asked for.
//!
//! Owns the line's two forms and its way out: a bounded queue and a thread that writes, so that no connection ever waits for a slow
//! log. Lines that find the queue full are dropped and counted. Names in a line are addresses and SPIFFE ids, which have no
//! characters that could end a line.

use std::fmt;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use meshd_ca::identity::{NodeId, SpiffeId};
use meshd_ca::time::UnixTime;
use serde::Serialize;
use tokio::time::Instant;

use super::Fault;
use super::edges::{Direction, Key, Reason};

/// Lines that wait to be written, each of about 300 bytes.
const QUEUE: usize = 4096;
/// Lines written at once.
const BATCH: usize = 64;

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `name=value` pairs, for people and `grep`.
    Text,
    /// A JSON object.
    Json,
}

/// Where lines go. Cheap to clone; the default is nowhere.
#[derive(Clone, Default)]
pub struct AccessLog(Option<Arc<Sink>>);

struct Sink {
    form: Form,
    /// In front of each line: the level of sd-daemon(3), where the journal reads.
    prefix: &'static str,
    queue: SyncSender<Message>,
    dropped: AtomicU64,
}

enum Message {
    Line(String),
    Flush(SyncSender<()>),
}

impl AccessLog {
    /// A log that a thread of its own writes to `out`, each line after `prefix`.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub fn start(form: Form, prefix: &'static str, out: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (queue, lines) = sync_channel(QUEUE);
        std::thread::Builder::new().name("access-log".into()).spawn(move || write(&lines, out))?;
        Ok(Self(Some(Arc::new(Sink { form, prefix, queue, dropped: AtomicU64::new(0) }))))
    }

    /// How many lines were dropped because they came faster than they could be written.
    pub fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |sink| sink.dropped.load(Relaxed))
    }

    /// Waits until what was said so far is written, but not longer than `patience`. To be called outside the runtime.
    pub fn flush(&self, patience: Duration) {
        let (done, written) = sync_channel(1);
        if let Some(sink) = &self.0
            && sink.queue.try_send(Message::Flush(done)).is_ok()
        {
            let _ = written.recv_timeout(patience);
        }
    }

    /// A connection begins.
    pub(super) fn begin(&self, direction: Direction, now: UnixTime) -> Entry {
        Entry(self.0.as_ref().map(|sink| {
            let line = Line {
                time: now.to_string(),
                direction,
                client: None,
                server: None,
                client_id: None,
                server_id: None,
                peer: None,
                secured: false,
                bytes_in: 0,
                bytes_out: 0,
                duration_ms: 0.0,
                reason: Some(Reason::Panic.as_str()),
            };
            Box::new(Open { sink: sink.clone(), at: now, begun: Instant::now(), line })
        }))
    }
}

impl fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "AccessLog(on)" } else { "AccessLog(off)" })
    }
}

impl Sink {
    fn say(&self, line: &Line) {
        let text = match self.form {
            Form::Text => format!("{}{line}\n", self.prefix),
            Form::Json => match serde_json::to_string(line) {
                Ok(json) => format!("{}{json}\n", self.prefix),
                Err(_) => return,
            },
        };
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Message::Line(text)) {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

/// Writes until nobody can send any more. A log that cannot be written is nobody's reason to stop.
fn write(lines: &Receiver<Message>, mut out: impl Write) {
    while let Ok(first) = lines.recv() {
        let mut batch = String::new();
        let mut flushed = Vec::new();
        for message in std::iter::once(first).chain(lines.try_iter().take(BATCH - 1)) {
            match message {
                Message::Line(line) => batch.push_str(&line),
                Message::Flush(done) => flushed.push(done),
            }
        }
        let _ = out.write_all(batch.as_bytes()).and_then(|()| out.flush());
        for done in flushed {
            let _ = done.try_send(());
        }
    }
}

/// One connection: its line is written when this is dropped. Nothing but a null pointer when the log is off.
pub(super) struct Entry(Option<Box<Open>>);

struct Open {
    sink: Arc<Sink>,
    at: UnixTime,
    begun: Instant,
    line: Line,
}

impl Entry {
    /// From where to where, as the two applications see it.
    pub(super) fn ends(&mut self, client: SocketAddr, server: SocketAddr) {
        if let Some(open) = &mut self.0 {
            (open.line.client, open.line.server) = (Some(client), Some(server));
        }
    }

    /// Who talks to whom, and the member at the other end; whether both have proven it.
    pub(super) fn between(&mut self, key: &Key, peer: Option<NodeId>, secured: bool) {
        if let Some(open) = &mut self.0 {
            let line = &mut open.line;
            (line.client_id, line.server_id) = (key.source.clone(), key.destination.clone());
            (line.peer, line.secured) = (peer, secured);
        }
    }

    /// How much went to the other host, and came from it.
    pub(super) fn bytes(&mut self, (sent, received): (u64, u64)) {
        if let Some(open) = &mut self.0 {
            (open.line.bytes_out, open.line.bytes_in) = (sent, received);
        }
    }

    /// How it ended.
    pub(super) fn end(&mut self, result: &Result<(), Fault>) {
        if let Some(open) = &mut self.0 {
            open.line.reason = result.as_ref().err().map(|fault| fault.reason().as_str());
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let took = self.begun.elapsed();
        self.line.time = UnixTime(self.at.0.saturating_add(took.as_secs())).to_string();
        self.line.duration_ms = (took.as_secs_f64() * 1e6).round() / 1e3;
        self.sink.say(&self.line);
    }
}

#[derive(Debug, Clone, Serialize)]
struct Line {
    time: String,
    direction: Direction,
    client: Option<SocketAddr>,
    server: Option<SocketAddr>,
    client_id: Option<SpiffeId>,
    server_id: Option<SpiffeId>,
    peer: Option<NodeId>,
    secured: bool,
    bytes_in: u64,
    bytes_out: u64,
    duration_ms: f64,
    reason: Option<&'static str>,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn or_dash<T: ToString>(value: Option<&T>) -> String {
            value.map_or_else(|| "-".into(), ToString::to_string)
        }
        let direction = match self.direction {
            Direction::Outbound => "outbound",
            Direction::Inbound => "inbound",
        };
        write!(
            f,
            "access time={} direction={direction} client={} server={} client_id={} server_id={} peer={} secured={} bytes_in={} \
             bytes_out={} duration_ms={} reason={}",
            self.time,
            or_dash(self.client.as_ref()),
            or_dash(self.server.as_ref()),
            or_dash(self.client_id.as_ref()),
            or_dash(self.server_id.as_ref()),
            or_dash(self.peer.as_ref()),
            self.secured,
            self.bytes_in,
            self.bytes_out,
            self.duration_ms,
            self.reason.unwrap_or("-"),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Paper {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn key() -> Key {
        Key {
            direction: Direction::Outbound,
            source: Some("spiffe://mesh/host/a/user/anna".parse().unwrap()),
            destination: None,
            address: [10, 0, 0, 2].into(),
            port: 80,
        }
    }

    fn one(form: Form, prefix: &'static str) -> String {
        let paper = Paper::default();
        let log = AccessLog::start(form, prefix, paper.clone()).unwrap();
        let mut entry = log.begin(Direction::Outbound, UnixTime(1_800_000_000));
        entry.ends("10.0.0.1:4242".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        entry.between(&key(), None, true);
        entry.bytes((7, 9));
        entry.end(&Err(Fault::NoSvid));
        drop(entry);
        log.flush(Duration::from_secs(10));
        paper.text()
    }

    #[test]
    fn both_forms_say_everything() {
        let text = one(Form::Text, "<6>");
        let start = "<6>access time=2027-01-15T08:00:00Z direction=outbound client=10.0.0.1:4242 server=10.0.0.2:80 \
                     client_id=spiffe://mesh/host/a/user/anna server_id=- peer=- secured=true bytes_in=9 bytes_out=7 duration_ms=";
        assert!(text.starts_with(start) && text.ends_with(" reason=no-svid\n"), "{text}");

        let json: serde_json::Value = serde_json::from_str(&one(Form::Json, "")).unwrap();
        let fields = [
            "bytes_in",
            "bytes_out",
            "client",
            "client_id",
            "direction",
            "duration_ms",
            "peer",
            "reason",
            "secured",
            "server",
            "server_id",
            "time",
        ];
        assert_eq!(json.as_object().unwrap().keys().collect::<Vec<_>>(), fields);
        assert_eq!(
            (&json["reason"], &json["bytes_out"], &json["peer"]),
            (&"no-svid".into(), &7.into(), &serde_json::Value::Null)
        );
    }

    #[test]
    fn a_connection_that_ends_without_a_word_was_a_panic() {
        let paper = Paper::default();
        let log = AccessLog::start(Form::Text, "", paper.clone()).unwrap();
        drop(log.begin(Direction::Inbound, UnixTime(0)));
        let mut fine = log.begin(Direction::Inbound, UnixTime(0));
        fine.end(&Ok(()));
        drop(fine);
        log.flush(Duration::from_secs(10));
        let lines: Vec<String> = paper.text().lines().map(str::to_owned).collect();
        assert!(lines.len() == 2 && lines[0].ends_with("reason=panic") && lines[1].ends_with("reason=-"), "{lines:?}");
    }

    #[test]
    fn a_log_that_is_stuck_holds_nobody_up() {
        struct Stuck(Arc<Mutex<()>>);
        impl Write for Stuck {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let _wait = self.0.lock().unwrap();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let gate = Arc::new(Mutex::new(()));
        let held = gate.lock().unwrap();
        let log = AccessLog::start(Form::Text, "", Stuck(gate.clone())).unwrap();
        for _ in 0..QUEUE + 2 * BATCH {
            drop(log.begin(Direction::Inbound, UnixTime(0)));
        }
        assert!((1..=2 * BATCH as u64).contains(&log.dropped()), "{}", log.dropped());
        drop(held);
        assert!(AccessLog::default().begin(Direction::Inbound, UnixTime(0)).0.is_none(), "off costs something");
    }
}
