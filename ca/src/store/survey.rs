//! A look at a state directory that changes nothing and needs no lock: which generations are there and whole.
//!
//! For people who want to know how their disk does, and for copies. A daemon may be writing meanwhile: a file is replaced as a whole, so what is
//! read is one generation or the next.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use zeroize::Zeroizing;

use super::{Complete, Found, LOCK, OTHER, StoreError, TEMPORARY, choose, is_file, is_name, read_whole};

/// What is in one of the two places of a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// Nothing.
    Empty,
    /// This generation, whole.
    Whole(u64),
    /// Something that is not exactly what was written.
    Torn,
    /// It cannot be read, and why.
    Unreadable(String),
}

/// What can be said of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// The newest generation is whole.
    Good,
    /// One generation is whole; the other one is lost and may have been newer.
    Older,
    /// No generation is of use.
    Torn,
}

/// A file of a state directory.
#[derive(Debug)]
pub struct Surveyed {
    /// Its name.
    pub name: String,
    /// `NAME` and `NAME.other`.
    pub places: [Place; 2],
    /// What follows from them.
    pub health: Health,
    /// The content that would be loaded; a secret perhaps.
    pub content: Option<Zeroizing<Vec<u8>>>,
}

/// Everything in a state directory.
#[derive(Debug, Default)]
pub struct Survey {
    /// What has the name of a state file, by name.
    pub files: Vec<Surveyed>,
    /// What an interrupted write left, or one that goes on now.
    pub unfinished: Vec<String>,
    /// Everything else but the lock.
    pub unknown: Vec<String>,
}

/// Looks at a state directory.
///
/// # Errors
/// [`StoreError::Io`] when the directory cannot be read.
pub fn survey(dir: &Path) -> Result<Survey, StoreError> {
    let failed = |source| StoreError::Io { path: dir.into(), source };
    let mut survey = Survey::default();
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let shown = entry.file_name().to_string_lossy().into_owned();
        let stem = shown.strip_suffix(OTHER).or_else(|| shown.strip_suffix(TEMPORARY)).unwrap_or(&shown);
        if shown == LOCK {
            continue;
        }
        if entry.file_type().map_err(failed)?.is_dir() || !is_name(stem) || shown == crate::fleet::FILE {
            survey.unknown.push(shown);
        } else if shown.ends_with(TEMPORARY) {
            survey.unfinished.push(shown);
        } else {
            names.insert(stem.to_owned());
        }
    }
    survey.files = names.into_iter().map(|name| look(dir, name)).collect();
    survey.unfinished.sort();
    survey.unknown.sort();
    Ok(survey)
}

fn look(dir: &Path, name: String) -> Surveyed {
    let found = [dir.join(&name), dir.join(format!("{name}{OTHER}"))].map(|path| read(&path));
    let places = [&found[0], &found[1]].map(|found| match found {
        Found::Nothing => Place::Empty,
        Found::Good(complete) => Place::Whole(complete.number),
        Found::Damaged { .. } => Place::Torn,
        Found::Unreadable(error) => Place::Unreadable(error.to_string()),
        Found::Other(error) => Place::Unreadable(error.to_string()),
    });
    let (health, content) = match choose(found) {
        Ok((Complete { bytes, .. }, false)) => (Health::Good, Some(bytes)),
        Ok((Complete { bytes, .. }, true)) => (Health::Older, Some(bytes)),
        Err(_) => (Health::Torn, None),
    };
    Surveyed { name, places, health, content }
}

fn read(path: &Path) -> Found {
    if let Err(other) = is_file(path) {
        return Found::Other(other);
    }
    match File::open(path).and_then(|mut file| read_whole(&mut file)) {
        Ok(found) => found,
        Err(e) if e.kind() == ErrorKind::NotFound => Found::Nothing,
        Err(e) => Found::Unreadable(e),
    }
}
