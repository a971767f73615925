//! How the demonstration looks: short lines, a tick for what was checked, colours on a terminal only.

use std::fmt::Display;
use std::io::IsTerminal;
use std::time::Duration;

use tokio::time::Instant;

/// The narrator: knows the time and counts what was checked.
#[derive(Debug)]
pub(super) struct Story {
    colours: bool,
    started: Instant,
    checked: u32,
}

impl Story {
    pub(super) fn begin() -> Story {
        Story { colours: std::io::stdout().is_terminal(), started: Instant::now(), checked: 0 }
    }

    fn paint(&self, code: &str, text: impl Display) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    pub(super) fn title(&self, text: &str) {
        println!("\n{}", self.paint("1", text));
    }

    /// What a person would type on a host.
    pub(super) fn typed(&self, host: &str, command: &str) {
        println!("  {} {command}", self.paint("36", format!("{host}$")));
    }

    /// What a command printed.
    pub(super) fn printed(&self, text: &str) {
        for line in text.trim_end().lines() {
            println!("    {line}");
        }
    }

    /// A claim that was checked.
    pub(super) fn holds(&mut self, claim: impl Display) {
        self.checked += 1;
        println!("  {} {claim}", self.paint("32", "✓"));
    }

    /// A claim that was checked, and how long it took.
    pub(super) fn holds_after(&mut self, claim: impl Display, time: Duration) {
        let time = self.paint("2", format!("{:.2} s", time.as_secs_f64()));
        self.holds(format!("{claim}  {time}"));
    }

    pub(super) fn remark(&self, text: impl Display) {
        println!("  {}", self.paint("2", text));
    }

    /// Bytes as an eavesdropper sees them.
    pub(super) fn wire(&self, bytes: &[u8], readable: bool) {
        let bytes = &bytes[..bytes.len().min(64)];
        let text: String = bytes.iter().map(|b| if (0x20..0x7f).contains(b) { char::from(*b) } else { '·' }).collect();
        println!("    {} {}", self.paint("2", "on the wire:"), self.paint(if readable { "31" } else { "32" }, text));
    }

    pub(super) fn end(&self) {
        let took = self.started.elapsed().as_secs_f64();
        println!("\n{}", self.paint("1", format!("{} claims, each checked, in {took:.1} s.", self.checked)));
    }
}
