//! Asking a person at the terminal: a secret without echo, and yes or no.

use std::io::{self, IsTerminal, Read, Write};

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use super::failure::{Exit, Failure};

/// Longest line that is read, in bytes: more than a terminal gives in one line.
const MAX_LINE: usize = 4096;
/// What Ctrl-C types.
const INTERRUPT: u8 = 3;

/// Whether somebody can be asked.
pub(super) fn somebody_is_there() -> bool {
    io::stdin().is_terminal()
}

/// The terminal's settings, restored when dropped.
struct Quiet(Termios);

impl Quiet {
    fn begin() -> rustix::io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut quiet = before.clone();
        // Ctrl-C must not end the process while the echo is off: it ends the line instead.
        quiet.local_modes -= LocalModes::ECHO | LocalModes::ISIG;
        quiet.special_codes[SpecialCodeIndex::VEOL] = INTERRUPT;
        tcsetattr(io::stdin(), OptionalActions::Flush, &quiet)?;
        Ok(Self(before))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Asks for a secret; what is typed does not show.
///
/// # Errors
/// When the terminal does not do as told, or the person gives up.
pub(super) fn secret(prompt: &str) -> Result<Zeroizing<String>, Failure> {
    let failed = |e: io::Error| Failure::new(Exit::Failed, "cannot read from the terminal").why(e.to_string());
    let mut err = io::stderr();
    write!(err, "{prompt}").and_then(|()| err.flush()).map_err(failed)?;
    let quiet = Quiet::begin().map_err(|e| failed(e.into()))?;
    let line = line();
    drop(quiet);
    let _ = writeln!(err);
    let line = line.map_err(failed)?;
    match line.contains(char::from(INTERRUPT)) {
        true => Err(Failure::new(Exit::Failed, "given up")),
        false => Ok(line),
    }
}

/// Asks for a line that everybody may see.
///
/// # Errors
/// When standard input cannot be read.
pub(super) fn line_of(prompt: &str) -> Result<Zeroizing<String>, Failure> {
    let failed = |e: io::Error| Failure::new(Exit::Failed, "cannot read from the terminal").why(e.to_string());
    let mut err = io::stderr();
    write!(err, "{prompt}").and_then(|()| err.flush()).map_err(failed)?;
    line().map_err(failed)
}

/// Asks a question; only a word that begins with `y` is yes.
///
/// # Errors
/// When standard input cannot be read.
pub(super) fn yes(question: &str) -> Result<bool, Failure> {
    Ok(line_of(&format!("{question} [y/N] "))?.trim().to_ascii_lowercase().starts_with('y'))
}

/// # Errors
/// When nobody is there to be asked.
pub(super) fn attended() -> Result<(), Failure> {
    match somebody_is_there() {
        true => Ok(()),
        false => Err(Failure::new(Exit::Usage, "not confirmed")
            .why("there is no terminal to ask for confirmation")
            .remedy("add --yes")),
    }
}

/// Asks whether something that cannot be undone is meant.
///
/// # Errors
/// When it is not, or nobody is there to say so.
pub(super) fn confirm(question: &str) -> Result<(), Failure> {
    attended()?;
    match yes(question)? {
        true => Ok(()),
        false => Err(Failure::new(Exit::Failed, "nothing was changed")),
    }
}

/// One line as the terminal gives it.
fn line() -> io::Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new([0; MAX_LINE]);
    let mut filled = 0;
    while filled < MAX_LINE {
        let n = io::stdin().lock().read(&mut bytes[filled..])?;
        filled += n;
        if n == 0 || matches!(bytes[filled - 1], b'\n' | INTERRUPT) {
            break;
        }
    }
    Ok(Zeroizing::new(String::from_utf8_lossy(&bytes[..filled]).into_owned()))
}
