//! Standard output: text or JSON, colours only where they are wanted, and never a control character that somebody else chose.

pub(super) use crate::config::ago;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use super::failure::{Exit, Failure};

/// A colour, used only for what is also said in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colour {
    Green,
    Yellow,
    Red,
    Bold,
}

/// Where answers go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    /// JSON instead of text.
    pub(super) json: bool,
    colours: bool,
    /// Columns of the terminal; none if it is not one, and nothing is cut then.
    pub(super) width: Option<usize>,
}

impl Screen {
    /// Standard output of this process.
    pub(super) fn of_process(json: bool, plain: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        let width = if terminal { rustix::termios::tcgetwinsize(io::stdout()).ok() } else { None };
        Self { json, colours: terminal && !plain, width: width.map(|w| w.ws_col.into()).filter(|w| *w > 0) }
    }

    #[cfg(test)]
    pub(super) fn fixed(colours: bool, width: Option<usize>) -> Self {
        Self { json: false, colours, width }
    }

    /// `text` in a colour.
    pub(super) fn paint(&self, colour: Colour, text: &str) -> String {
        let code = match colour {
            Colour::Green => "32",
            Colour::Yellow => "33",
            Colour::Red => "31",
            Colour::Bold => "1",
        };
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Prints `value` as JSON, or what `text` makes of it.
    pub(super) fn show<T: Serialize + ?Sized>(&self, value: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
        if self.json { self.print(&json(value)?) } else { self.print(&text()) }
    }

    /// Prints `text`, which ends with a newline. A reader that has seen enough (`| head`) is no failure.
    pub(super) fn print(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::new(Exit::Failed, "cannot write to standard output").why(e.to_string()))
            }
            _ => Ok(()),
        }
    }
}

/// Prints a remark for people, beside the answer.
pub(super) fn remark(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Characters that steer a terminal or turn text around: C0, DEL, C1, and Unicode's invisible and bidirectional ones.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// `text` with each of these written out (`\u{1b}`), so that it is one line and does nothing.
pub(super) fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// `value` as indented JSON in which they are escaped. JSON leaves DEL and C1 as they are (RFC 8259 §7), terminals do not.
pub(super) fn json<T: Serialize + ?Sized>(value: &T) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::new(Exit::Failed, "cannot write the answer as JSON").why(e.to_string()))?;
    let mut out = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if c != '\n' && is_unsafe(c) {
            let mut units = [0; 2];
            out.extend(c.encode_utf16(&mut units).iter().map(|u| format!("\\u{u:04x}")));
        } else {
            out.push(c);
        }
    }
    out.push('\n');
    Ok(out)
}

/// A number of bytes in binary units: `17 B`, `1.5 KiB`, `20 MiB`.
pub(super) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"] {
        // 1023.96 KiB would be printed as 1024.0 KiB.
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" || value >= 99.95 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_steers_a_terminal() {
        assert_eq!(plain("a\x1b[2Jb\u{9b}c\nd\u{202e}e"), "a\\u{1b}[2Jb\\u{9b}c\\nd\\u{202e}e");
        assert_eq!(plain("pi-2 grün"), "pi-2 grün");
        let text = json(&["\x1b]0;x\x07", "\u{9b}2J", "\x7f", "\u{202e}", "\u{e0041}"]).unwrap();
        assert!(text.is_ascii(), "{text}");
        let back: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(back, ["\x1b]0;x\x07", "\u{9b}2J", "\x7f", "\u{202e}", "\u{e0041}"]);
    }

    #[test]
    fn times_and_sizes() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (60, "1m"), (190, "3m10s"), (7200, "2h"), (187_200, "2d4h")] {
            assert_eq!(ago(seconds), text);
        }
        for (n, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (u64::MAX, "16.0 EiB")]
        {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
    }

    proptest! {
        #[test]
        fn whatever_comes_in(text in any::<String>()) {
            prop_assert!(!plain(&text).chars().any(is_unsafe));
            let json = json(&text).unwrap();
            prop_assert!(!json.trim_end().chars().any(is_unsafe));
            prop_assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
        }
    }
}
