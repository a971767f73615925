//! The log of the daemon, on standard error. The only home of `tracing-subscriber`.
//!
//! Owns how a line looks, how much is said (which may change while the daemon runs) and how much of the same may be said: what others can
//! cause must not fill a disk, so every place in the code that logs has an allowance of its own. Where standard error
//! is the journal, lines carry their level as sd-daemon(3) wants it and neither time nor colour, which the journal adds. Says
//! nothing of its own accord.

mod allowance;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::json;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{DefaultFields, Format, Full, Json, JsonFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{self, LogFormat, LogLevel};
use crate::intercept::process::since_boot;
use crate::proxy::access::{AccessLog, Form};
use allowance::{Allowance, Answer};

/// How the log is to be.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Lines for people, or JSON.
    pub format: LogFormat,
    /// Whether they may have colours.
    pub colours: bool,
    /// Whether the journal reads them.
    pub journal: bool,
}

/// The log of this process. Cheap to clone.
#[derive(Clone)]
pub struct Log {
    level: Arc<Mutex<LogLevel>>,
    reload: Option<reload::Handle<Targets, Registry>>,
    allowance: Arc<Allowance>,
    journal: bool,
}

impl Log {
    /// Sends the log to standard error from now on. A log that was set up before, by a test or an embedding program, stays, and its
    /// level cannot be changed here.
    pub fn start(level: LogLevel, style: Style) -> Self {
        let allowance = Arc::new(Allowance::default());
        let (filter, handle) = reload::Layer::new(targets(level));
        let registry = tracing_subscriber::registry().with(filter);
        let set = match style.format {
            LogFormat::Text => registry.with(text(style, allowance.clone(), io::stderr)).try_init(),
            LogFormat::Json => registry.with(structured(style, allowance.clone(), io::stderr)).try_init(),
        };
        Self { level: Arc::new(Mutex::new(level)), reload: set.is_ok().then_some(handle), allowance, journal: style.journal }
    }

    /// How much is said.
    pub fn level(&self) -> LogLevel {
        *self.level.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes how much is said, at once. `false` when the log is not ours to change.
    pub fn set_level(&self, level: LogLevel) -> bool {
        let mut current = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = self.reload.as_ref().is_some_and(|handle| handle.reload(targets(level)).is_ok());
        if changed {
            *current = level;
        }
        changed
    }

    /// The access log that goes to the same place, as wished.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub fn access(&self, wish: config::AccessLog) -> io::Result<AccessLog> {
        let form = match wish {
            config::AccessLog::Off => return Ok(AccessLog::default()),
            config::AccessLog::Text => Form::Text,
            config::AccessLog::Json => Form::Json,
        };
        AccessLog::start(form, if self.journal { "<6>" } else { "" }, io::stderr())
    }

    /// How many lines were left out because there were too many of the same.
    pub fn left_out(&self) -> u64 {
        self.allowance.left_out()
    }
}

/// What of the program is heard at a level. What libraries say below a warning is for their authors; with `trace` they may.
fn targets(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let others = if level == LevelFilter::TRACE { level } else { level.min(LevelFilter::WARN) };
    Targets::new().with_default(others).with_target("meshd", level)
}

type Layer<S, N, E, W> = tracing_subscriber::fmt::Layer<S, N, E, W>;

fn text<S, W>(style: Style, allowance: Arc<Allowance>, to: W) -> Layer<S, OneLine, Line<Format<Full>>, W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    let format = Format::default().with_level(!style.journal);
    // Off, and of the same type as on.
    let format = if style.journal { format.without_time().with_timer(SystemTime) } else { format };
    let line = Line { format, journal: style.journal, json: false, allowance };
    let layer = tracing_subscriber::fmt::layer().with_ansi(style.colours && !style.journal);
    layer.event_format(line).fmt_fields(OneLine(DefaultFields::new())).with_writer(to)
}

fn structured<S, W>(style: Style, allowance: Arc<Allowance>, to: W) -> Layer<S, JsonFields, Line<Format<Json>>, W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    // A reader of JSON wants whole objects, wherever they come from.
    let format = Format::default().json().flatten_event(true);
    let line = Line { format, journal: style.journal, json: true, allowance };
    tracing_subscriber::fmt::layer().with_ansi(false).event_format(line).fmt_fields(JsonFields::new()).with_writer(to)
}

/// A line with its level in front where the journal reads, and only while there is an allowance for it.
struct Line<F> {
    format: F,
    journal: bool,
    json: bool,
    allowance: Arc<Allowance>,
}

impl<F> Line<F> {
    fn begin(&self, writer: &mut Writer<'_>, level: Level) -> fmt::Result {
        // Levels of syslog(3), as sd-daemon(3) writes them.
        let priority = match level {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        if self.journal { write!(writer, "<{priority}>") } else { Ok(()) }
    }

    /// Says how many lines like the next one were left out.
    fn confess(&self, writer: &mut Writer<'_>, of: &Metadata<'_>, count: u64) -> fmt::Result {
        self.begin(writer, *of.level())?;
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let message = format!("{count} lines like the next one were left out");
        let (level, target) = (of.level().as_str(), of.target());
        if self.json {
            let line = json!({"timestamp": time, "level": level, "message": message, "left_out": count, "target": target});
            writeln!(writer, "{line}")
        } else if self.journal {
            writeln!(writer, "{target}: {message}")
        } else {
            writeln!(writer, "{time} {level:>5} {target}: {message}")
        }
    }
}

impl<S, N, F> FormatEvent<S, N> for Line<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let about = event.metadata();
        match self.allowance.ask(about, since_boot()) {
            Answer::No => return Ok(()),
            Answer::Yes { left_out: 0 } => {}
            Answer::Yes { left_out } => self.confess(&mut writer, about, left_out)?,
        }
        self.begin(&mut writer, *about.level())?;
        self.format.format_event(context, writer, event)
    }
}

/// Most characters of an event's fields.
const MAX_FIELDS: usize = 4096;

/// Fields in which no control character is left, so that an event stays one line of bounded length and steers no terminal, whoever
/// chose its words.
struct OneLine(DefaultFields);

impl<'w> FormatFields<'w> for OneLine {
    fn format_fields<R: tracing_subscriber::field::RecordFields>(&self, mut writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut plain = Plain { to: &mut writer, room: MAX_FIELDS };
        self.0.format_fields(Writer::new(&mut plain), fields)
    }
}

struct Plain<'a, 'w> {
    to: &'a mut Writer<'w>,
    room: usize,
}

impl fmt::Write for Plain<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match self.room {
                0 => return Ok(()),
                1 => self.to.write_char('…')?,
                _ if c.is_control() => write!(self.to, "{}", c.escape_default())?,
                _ => self.to.write_char(c)?,
            }
            self.room -= 1;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
