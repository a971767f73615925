//! Lines as they reach the reader, in each style.

use std::io::Write;

use super::allowance::BURST;
use super::*;

#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) const PLAIN: Style = Style { format: LogFormat::Text, colours: false, journal: false };

/// What `say` says in a style at `info`.
pub(crate) fn said(style: Style, say: impl FnOnce()) -> String {
    let paper = Paper::default();
    let to = {
        let paper = paper.clone();
        move || paper.clone()
    };
    let (allowance, registry) = (Arc::default(), tracing_subscriber::registry().with(targets(LogLevel::Info)));
    match style.format {
        LogFormat::Text => tracing::subscriber::with_default(registry.with(text(style, allowance, to)), say),
        LogFormat::Json => tracing::subscriber::with_default(registry.with(structured(style, allowance, to)), say),
    }
    let text = paper.0.lock().unwrap().clone();
    String::from_utf8(text).unwrap()
}

#[test]
fn for_people_with_time_and_level() {
    let line = said(PLAIN, || tracing::warn!(error = %"it broke", "cannot go on"));
    let (time, rest) = line.split_once(' ').unwrap();
    assert!(time.ends_with('Z') && time.contains('T'), "{line}");
    assert_eq!(rest.trim_start(), "WARN meshd::logging::tests: cannot go on error=it broke\n");
}

#[test]
fn for_the_journal_with_a_priority_and_neither_time_nor_colour() {
    let lines = said(Style { colours: true, journal: true, ..PLAIN }, || {
        tracing::error!("a");
        tracing::warn!("b");
        tracing::info!(n = 1, "c");
        tracing::debug!("not heard");
    });
    let expected = "<3>meshd::logging::tests: a\n<4>meshd::logging::tests: b\n<6>meshd::logging::tests: c n=1\n";
    assert_eq!(lines, expected);
}

#[test]
fn colours_only_where_wanted() {
    assert!(said(Style { colours: true, ..PLAIN }, || tracing::warn!("x")).contains("\x1b["));
    assert!(!said(PLAIN, || tracing::warn!("x")).contains('\x1b'));
}

#[test]
fn an_event_is_one_line_whoever_chose_its_words() {
    let hostile = "x\n<0>forged: all is well\r\x1b[2J\u{9b}31m\u{7f}";
    for journal in [false, true] {
        let lines = said(Style { journal, ..PLAIN }, || {
            tracing::warn!(name = hostile, shown = %hostile, debug = ?hostile, "{hostile}");
        });
        assert_eq!(lines.lines().count(), 1, "{lines:?}");
        assert!(!lines.trim_end().chars().any(char::is_control), "{lines:?}");
    }
    for journal in [false, true] {
        let style = Style { format: LogFormat::Json, journal, colours: true };
        let lines = said(style, || tracing::warn!(name = hostile, shown = %hostile, "{hostile}"));
        assert_eq!(lines.lines().count(), 1, "{lines:?}");
        let line = if journal { lines.strip_prefix("<4>").unwrap() } else { &lines };
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!((&value["message"], &value["name"], &value["shown"]), (&hostile.into(), &hostile.into(), &hostile.into()));
    }
}

#[test]
fn a_line_has_an_end() {
    let line = said(PLAIN, || tracing::warn!(name = "x".repeat(100_000), after = 1, "long"));
    assert!(line.ends_with("x…\n") && line.chars().count() < MAX_FIELDS + 200, "{} characters", line.chars().count());
}

#[test]
fn json_has_everything() {
    let line =
        said(Style { format: LogFormat::Json, ..PLAIN }, || tracing::info!(count = 3, on = true, why = %"because", "changed"));
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    let keys: Vec<_> = value.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["count", "level", "message", "on", "target", "timestamp", "why"]);
    assert_eq!((&value["count"], &value["on"], &value["level"]), (&3.into(), &true.into(), &"INFO".into()));
    let time = value["timestamp"].as_str().unwrap();
    assert!(time.ends_with('Z') && time.len() == "2026-01-01T00:00:00.000000Z".len(), "{time}");
}

/// In JSON the fields stand beside these: an object would have one of them twice.
#[test]
fn no_event_has_a_field_that_is_named_like_a_part_of_the_line() {
    fn sources(dir: &std::path::Path, into: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            if entry.is_dir() {
                sources(&entry, into);
            } else if entry.extension().is_some_and(|e| e == "rs") {
                into.push(entry);
            }
        }
    }
    let (root, mut files) = (std::path::Path::new(env!("CARGO_MANIFEST_DIR")), Vec::new());
    ["src", "agent/src", "ca/src"].iter().for_each(|dir| sources(&root.join(dir), &mut files));
    let mut events = 0;
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for level in ["error", "warn", "info", "debug", "trace"] {
            for event in text.split(&format!("tracing::{level}!(")).skip(1) {
                let event = event.split(");").next().unwrap_or(event);
                events += 1;
                for part in ["timestamp", "level", "message", "target"] {
                    let named = [format!("{part} = "), format!("%{part},"), format!("?{part},")]
                        .iter()
                        .any(|n| event.starts_with(n.as_str()) || event.contains(&format!(" {n}")));
                    assert!(!named, "{}: tracing::{level}!({event})", file.display());
                }
            }
        }
    }
    assert!(events > 50, "only {events} events found");
}

#[test]
fn a_flood_is_cut_and_said_to_be() {
    for format in [LogFormat::Text, LogFormat::Json] {
        let lines = said(Style { format, ..PLAIN }, || {
            for n in 0..10_000 {
                tracing::info!(n, "a stranger knocks");
            }
            tracing::info!("something else");
        });
        assert_eq!(lines.lines().count(), BURST as usize + 1, "another place has an allowance of its own");
    }
    // When the allowance comes back, the number is told: in the same form as all else.
    for (format, journal) in [(LogFormat::Text, true), (LogFormat::Json, false), (LogFormat::Json, true)] {
        let style = Style { format, journal, colours: false };
        let mut text = String::new();
        let line = Line { format: (), journal, json: format == LogFormat::Json, allowance: Arc::default() };
        let about = tracing::callsite!(name: "x", kind: tracing::metadata::Kind::EVENT, level: Level::INFO, fields: );
        line.confess(&mut Writer::new(&mut text), tracing::Callsite::metadata(about), 7).unwrap();
        assert_eq!(text.lines().count(), 1, "{style:?} {text}");
        assert!(text.contains("7 lines like the next one were left out"), "{text}");
        let bare = text.strip_prefix("<6>").unwrap_or(&text);
        assert_eq!(bare.len() < text.len(), journal, "{text}");
        if format == LogFormat::Json {
            let value: serde_json::Value = serde_json::from_str(bare).unwrap();
            assert_eq!((&value["left_out"], value["level"].as_str()), (&7.into(), Some("INFO")));
        }
    }
}

#[test]
fn a_level_is_changed_while_the_log_is_in_use() {
    let paper = Paper::default();
    let to = {
        let paper = paper.clone();
        move || paper.clone()
    };
    let (filter, handle) = reload::Layer::new(targets(LogLevel::Info));
    let log =
        Log { level: Arc::new(Mutex::new(LogLevel::Info)), reload: Some(handle), allowance: Arc::default(), journal: false };
    let registry = tracing_subscriber::registry().with(filter).with(text(PLAIN, Arc::default(), to));
    tracing::subscriber::with_default(registry, || {
        let say = |n: u32| tracing::debug!("number {n}");
        say(1);
        assert!(log.set_level(LogLevel::Debug));
        say(2);
        assert!(log.set_level(LogLevel::Error));
        say(3);
    });
    assert_eq!(log.level(), LogLevel::Error);
    let text = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
    assert!(!text.contains("number 1") && text.contains("number 2") && !text.contains("number 3"), "{text}");
    // A log that somebody else set up.
    let foreign = Log { reload: None, ..log };
    assert!(!foreign.set_level(LogLevel::Info));
    assert_eq!(foreign.level(), LogLevel::Error);
}
