//! Secrets that a person gives as an argument, in a file or on standard input: bounded, and wiped when they were used.

use std::convert::Infallible;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use zeroize::Zeroizing;

use super::Failure;
use crate::api::Secret;

/// Longest text that can hold a token or a key, in bytes.
const MAX_TEXT: u64 = 4096;

/// What is not to be seen in the daemon's log or in an error.
pub(super) fn argument(text: &str) -> Result<Secret, Infallible> {
    Ok(text.to_owned().into())
}

/// The text of a file; `what` it is to hold is said in the error.
pub(super) fn in_file(path: &Path, what: &str) -> Result<Zeroizing<String>, Failure> {
    let what = format!("{what} from {}", path.display());
    let mut file = File::open(path).map_err(|e| Failure::unreadable(&what, &e))?;
    read(&mut file, &what)
}

/// All that `from` says, `what` it is.
pub(super) fn read(from: &mut impl Read, what: &str) -> Result<Zeroizing<String>, Failure> {
    let mut text = Zeroizing::new(String::new());
    from.take(MAX_TEXT).read_to_string(&mut text).map_err(|e| Failure::unreadable(what, &e))?;
    Ok(text)
}
