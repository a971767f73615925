//! Small files that survive power cuts: two generations each, checksummed, replaced atomically, readable by their owner only.
//!
//! For what must not be lost: keys, roster, tokens, clock floor. A file NAME is written whole to a new file, flushed to the disk,
//! and renamed over the old one, which lives on as `NAME.previous`; at every moment in between a complete generation is there under
//! one of the two names. A reader takes the newest generation whose checksum fits, and says so when that is not the newest
//! that was written.
//!
//! One [`Store`] owns its directory: a lock keeps out a second daemon or command. Not here: what the bytes mean.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use thiserror::Error;
use zeroize::Zeroizing;

use crate::keys::sha256;

/// Longest content of a file in bytes.
pub const MAX_FILE: usize = 32 << 20;
/// The first bytes of every file, with the version of the format.
const MAGIC: [u8; 8] = *b"meshd\0s1";
/// Magic, generation, length, SHA-256 of all the rest.
const HEADER: usize = 8 + 8 + 8 + 32;
const LOCK: &str = "lock";
const PREVIOUS: &str = ".previous";
const TEMPORARY: &str = ".new";

/// What can go wrong with a state directory.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Another process has the directory.
    #[error("{} is in use: is meshd running already?", .0.display())]
    Busy(PathBuf),
    /// The directory is no state directory, but holds something: its mode is not ours to change.
    #[error("{} holds other things and is open to other users: give meshd a directory of its own", .0.display())]
    Foreign(PathBuf),
    /// The system refused something.
    #[error("{}: {source}; is the disk full, read-only or failing, or is this not root?", path.display())]
    Io {
        /// What it was about.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else than a file has the name of one: reading it could wait for ever, never end, or lead out of the directory.
    #[error("{} is {what}, not a file: remove it, or put back what was there", path.display())]
    NotFile {
        /// What has the name.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A file is there, but neither generation of it can be used.
    #[error("{} is damaged, and so is the generation before it: restore it from a backup, or remove both to start over", .0.display())]
    Damaged(PathBuf),
    /// A name has 1 to 64 characters of `a-z`, `0-9` and `-`, may have one `.` in the middle, and is not `lock`.
    #[error("not the name of a state file")]
    Name,
    /// The content is longer than [`MAX_FILE`].
    #[error("too long for a state file")]
    TooLong,
}

/// What a file holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Its content.
    pub bytes: Zeroizing<Vec<u8>>,
    /// Whether the newest generation was lost or damaged, and this is the one before it.
    pub fallback: bool,
    /// Whether others than the owner could read or write it. They cannot any more; whether they did is not known.
    pub exposed: bool,
}

/// A state directory, owned by this process until dropped.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    narrowed: bool,
    noticed: Mutex<Noticed>,
    _lock: File,
}

/// What was not as it should be with the files so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Noticed {
    /// The newest generation was lost or damaged ([`Loaded::fallback`]).
    pub fallback: BTreeSet<String>,
    /// Others than the owner could read or write it ([`Loaded::exposed`]).
    pub exposed: BTreeSet<String>,
    /// Why the last [`Store::save`] failed; none when it succeeded.
    pub unwritten: Option<String>,
}

/// One step of replacing a file. Doing only the first of them, as a power cut does, must leave a complete generation.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Op<'a> {
    /// Make a new file with these bytes and flush it to the disk.
    Write(PathBuf, &'a [u8]),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    /// Flush the directory to the disk.
    SyncDir,
}

impl Store {
    /// Takes a directory, made for its owner alone when it is not there. What an interrupted write left behind is removed. On a
    /// read-only disk a directory that was in use before can be read; every save fails.
    ///
    /// # Errors
    /// [`StoreError::Busy`] when another process has it; [`StoreError::Foreign`] when others may enter it and it holds something
    /// but was never a state directory; [`StoreError::Io`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Io { path: dir.into(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        let path = dir.join(LOCK);
        is_file(&path)?;
        let handle = File::open(dir).map_err(failed)?;
        let ours = path.exists() || fs::read_dir(dir).map_err(failed)?.next().is_none();
        if !ours && is_open(&handle).map_err(failed)? {
            return Err(StoreError::Foreign(dir.into()));
        }
        let narrowed = narrow(&handle, 0o700).map_err(failed)?;
        let at_lock = |source| StoreError::Io { path: path.clone(), source };
        let lock = match OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path) {
            // A card that has become read-only is no reason to be no member any more: what is on it can be read.
            Err(e) if e.kind() == ErrorKind::ReadOnlyFilesystem => File::open(&path),
            opened => opened,
        }
        .map_err(at_lock)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Busy(dir.into())),
            Err(TryLockError::Error(e)) => return Err(at_lock(e)),
        }
        for entry in fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_str().is_some_and(|name| name.ends_with(TEMPORARY)) {
                let path = entry.path();
                is_file(&path)?;
                match fs::remove_file(&path) {
                    Err(e) if e.kind() == ErrorKind::ReadOnlyFilesystem => {}
                    removed => removed.map_err(|source| StoreError::Io { path, source })?,
                }
            }
        }
        Ok(Self { dir: dir.into(), narrowed, noticed: Mutex::default(), _lock: lock })
    }

    /// Whether others than the owner could enter the directory until it was opened.
    pub fn narrowed(&self) -> bool {
        self.narrowed
    }

    /// What was noticed about the files that were loaded and saved so far.
    pub fn noticed(&self) -> Noticed {
        self.noticed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The newest usable generation of a file; `None` when there is no such file.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when there is one but no generation of it can be used: that is not the same as none, and must not
    /// be taken for a first start. [`StoreError::Name`], [`StoreError::Io`].
    pub fn load(&self, name: &str) -> Result<Option<Loaded>, StoreError> {
        let [path, previous] = self.paths(name)?;
        let (newest, before) = (Generation::read(&path)?, Generation::read(&previous)?);
        let exposed = newest.exposed || before.exposed;
        let loaded = |g: Complete, fallback: bool| {
            let mut noticed = self.noticed.lock().unwrap_or_else(PoisonError::into_inner);
            // Names are few: only files that exist get here.
            fallback.then(|| noticed.fallback.insert(name.to_owned()));
            exposed.then(|| noticed.exposed.insert(name.to_owned()));
            Ok(Some(Loaded { bytes: g.bytes, fallback, exposed }))
        };
        match (newest.found, before.found) {
            (Found::Good(a), Found::Good(b)) if b.number > a.number => loaded(b, true),
            (Found::Good(a), _) => loaded(a, false),
            (_, Found::Good(b)) => loaded(b, true),
            (Found::Nothing, Found::Nothing) => Ok(None),
            (Found::Other(error), _) | (_, Found::Other(error)) => Err(error),
            (Found::Unreadable(source), _) | (_, Found::Unreadable(source)) => Err(StoreError::Io { path, source }),
            _ => Err(StoreError::Damaged(path)),
        }
    }

    /// Replaces a file. When this returns, the new content is on the disk; when it fails, or the power does, the old one still is.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], [`StoreError::Name`], [`StoreError::Io`].
    pub fn save(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let saved = self.write(name, bytes);
        self.noticed.lock().unwrap_or_else(PoisonError::into_inner).unwritten = saved.as_ref().err().map(ToString::to_string);
        saved
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        if bytes.len() > MAX_FILE {
            return Err(StoreError::TooLong);
        }
        let [path, previous] = self.paths(name)?;
        let (newest, before) = (Generation::read(&path)?, Generation::read(&previous)?);
        let number = newest.number().max(before.number()).saturating_add(1);
        let content = Zeroizing::new(encode(number, bytes));
        // A damaged file must not push out the good generation before it.
        let keep = newest.number() > before.number();
        self.run(&self.replace(path, previous, &content, keep))
    }

    fn replace<'a>(&self, path: PathBuf, previous: PathBuf, content: &'a [u8], keep: bool) -> Vec<Op<'a>> {
        let mut new = path.clone().into_os_string();
        new.push(TEMPORARY);
        let new = PathBuf::from(new);
        let mut ops = vec![Op::Write(new.clone(), content)];
        if keep {
            ops.push(Op::Rename(path.clone(), previous));
        }
        ops.extend([Op::Rename(new, path), Op::SyncDir]);
        ops
    }

    /// Removes a file, both generations. That there is none is no error.
    ///
    /// # Errors
    /// [`StoreError::Name`], [`StoreError::Io`].
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let [path, previous] = self.paths(name)?;
        // The old one first: if only one of the two removals is done, the file must not come back as it was long ago.
        self.run(&[Op::Remove(previous), Op::SyncDir, Op::Remove(path), Op::SyncDir])
    }

    fn paths(&self, name: &str) -> Result<[PathBuf; 2], StoreError> {
        let part = |p: &str| !p.is_empty() && p.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        let (stem, extension) = name.split_once('.').map_or((name, None), |(s, e)| (s, Some(e)));
        let ours = [LOCK, &PREVIOUS[1..], &TEMPORARY[1..]];
        let clash = name == LOCK || extension.is_some_and(|e| ours.contains(&e));
        if name.len() > 64 || clash || !part(stem) || !extension.is_none_or(part) {
            return Err(StoreError::Name);
        }
        Ok([self.dir.join(name), self.dir.join(format!("{name}{PREVIOUS}"))])
    }

    fn run(&self, ops: &[Op<'_>]) -> Result<(), StoreError> {
        for op in ops {
            let (path, result) = match op {
                Op::Write(path, bytes) => (path, write(path, bytes)),
                Op::Rename(from, to) => (to, fs::rename(from, to)),
                Op::Remove(path) => (path, absent(fs::remove_file(path))),
                Op::SyncDir => (&self.dir, File::open(&self.dir).and_then(|d| d.sync_all())),
            };
            result.map_err(|source| StoreError::Io { path: path.clone(), source })?;
        }
        Ok(())
    }
}

/// Whether there is a file of this name; links are not followed.
///
/// # Errors
/// [`StoreError::NotFile`] for everything else that may have the name. Nobody else may change the directory, so what is there now is what
/// is opened next.
fn is_file(path: &Path) -> Result<bool, StoreError> {
    let kind = match fs::symlink_metadata(path) {
        Ok(found) => found.file_type(),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(StoreError::Io { path: path.into(), source }),
    };
    let what = match kind {
        _ if kind.is_file() => return Ok(true),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_symlink() => "a symbolic link",
        _ if kind.is_fifo() => "a pipe",
        _ => "a device or socket",
    };
    Err(StoreError::NotFile { path: path.into(), what })
}

fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Left behind by a failed write of this process; the lock keeps others out.
    absent(fs::remove_file(path))?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half a file would only make a full disk fuller.
        let _ = fs::remove_file(path);
    }
    written
}

fn is_open(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.permissions().mode() & 0o077 != 0)
}

/// Takes away what others may do with it. Returns whether they could.
fn narrow(file: &File, mode: u32) -> io::Result<bool> {
    let open = is_open(file)?;
    if open {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    Ok(open)
}

/// The bytes of a file with this content.
fn encode(number: u64, bytes: &[u8]) -> Vec<u8> {
    let head = [&MAGIC[..], &number.to_be_bytes(), &(bytes.len() as u64).to_be_bytes()].concat();
    let sum = sha256(&[&head, bytes]);
    [&head[..], &sum, bytes].concat()
}

/// Reads a file. Its length must be the one that its first bytes promise before a byte of the content is read, so that garbage of any
/// size costs nothing.
fn read_whole(file: &mut File) -> io::Result<Option<(u64, Zeroizing<Vec<u8>>)>> {
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    if !(HEADER..=HEADER + MAX_FILE).contains(&length) {
        return Ok(None);
    }
    let mut head = [0; HEADER];
    file.read_exact(&mut head)?;
    let promised = head[16..24].try_into().map(u64::from_be_bytes).ok();
    if head[..8] != MAGIC || promised != Some((length - HEADER) as u64) {
        return Ok(None);
    }
    // Room for all of it, so that no copy of a secret is left behind when it grows.
    let mut bytes = Zeroizing::new(Vec::with_capacity(length + 1));
    bytes.extend_from_slice(&head);
    file.take((length - HEADER + 1) as u64).read_to_end(&mut bytes)?;
    Ok(decode(&bytes).map(|(number, content)| (number, Zeroizing::new(content.to_vec()))))
}

/// Reads a file's bytes: its generation and its content, or `None` if a single bit of it is not as it was written.
pub fn decode(file: &[u8]) -> Option<(u64, &[u8])> {
    let (head, rest) = file.split_at_checked(24)?;
    let (sum, bytes) = rest.split_first_chunk::<32>()?;
    let (magic, numbers) = head.split_first_chunk::<8>()?;
    let (number, length) = numbers.split_first_chunk::<8>()?;
    let whole = *magic == MAGIC && u64::from_be_bytes(length.try_into().ok()?) == bytes.len() as u64;
    (whole && sha256(&[head, bytes]) == *sum).then(|| (u64::from_be_bytes(*number), bytes))
}

struct Complete {
    number: u64,
    bytes: Zeroizing<Vec<u8>>,
}

enum Found {
    Nothing,
    Good(Complete),
    Damaged,
    /// The disk gave an error: as good as damaged where the other generation is whole.
    Unreadable(io::Error),
    /// No file: the same.
    Other(StoreError),
}

struct Generation {
    found: Found,
    exposed: bool,
}

impl Generation {
    fn read(path: &Path) -> Result<Self, StoreError> {
        if let Err(other) = is_file(path) {
            return Ok(Self { found: Found::Other(other), exposed: false });
        }
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Self { found: Found::Nothing, exposed: false }),
            Err(e) => return Ok(Self { found: Found::Unreadable(e), exposed: false }),
        };
        let exposed = narrow(&file, 0o600).map_err(|source| StoreError::Io { path: path.into(), source })?;
        let found = match read_whole(&mut file) {
            Err(e) => Found::Unreadable(e),
            Ok(Some((number, bytes))) => Found::Good(Complete { number, bytes }),
            Ok(None) => Found::Damaged,
        };
        Ok(Self { found, exposed })
    }

    /// The generation; 0, which none has, if it cannot be used.
    fn number(&self) -> u64 {
        if let Found::Good(g) = &self.found { g.number } else { 0 }
    }
}

#[cfg(test)]
mod tests;
