//! Small files that survive power cuts: two generations each, checksummed, replaced atomically, readable by their owner only.
//!
//! For what must not be lost: keys, roster, tokens, clock floor. A file has two places, `NAME` and `NAME.other`, and a generation is
//! written to each in turn: whole to a new file, flushed to the disk, renamed over the *older* of the two, and the directory flushed. So no
//! step ever touches the newest generation, and it does not matter in which order a file system remembers names, nor whether a rename is one step to it.
//! A reader takes the higher of the generations whose checksum fits, and says so when the other may have been higher.
//!
//! What [`Store::load`] gives is on the disk, also where the process that wrote it was killed before it could see to that: [`Store::open`] flushes.
//! The model in `power.rs` pulls the plug between any two system calls ([`Disk`]).
//!
//! One [`Store`] owns its directory: a lock keeps out a second daemon or command, and may pass from one process to the next
//! ([`Store::hand_over`]). Not here: what the bytes mean.

mod disk;
mod survey;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use zeroize::Zeroizing;

use crate::keys::sha256;
pub use disk::Disk;
use disk::System;
pub use survey::{Health, Place, Survey, Surveyed, survey};

/// Longest content of a file in bytes.
pub const MAX_FILE: usize = 32 << 20;
/// The first bytes of every file, with the version of the format.
const MAGIC: [u8; 8] = *b"meshd\0s1";
/// Magic, generation, length, SHA-256 of all the rest.
const HEADER: usize = 8 + 8 + 8 + 32;
const LOCK: &str = "lock";
const OTHER: &str = ".other";
const TEMPORARY: &str = ".new";

/// What can go wrong with a state directory.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Another process has the directory.
    #[error("{} is in use: is meshd running already?", .0.display())]
    Busy(PathBuf),
    /// This process has handed the directory over to another, or only looks at it.
    #[error("{} is another process's: nothing is written to it any more", .0.display())]
    HandedOver(PathBuf),
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
    #[error("{} is damaged, and so is its other generation: restore it from a backup, or remove both to start over", .0.display())]
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
    /// Whether the other generation is lost or damaged and may have been newer: this is perhaps the one before it.
    pub fallback: bool,
    /// Whether others than the owner could read or write it. They cannot any more; whether they did is not known.
    pub exposed: bool,
}

/// A state directory, owned by this process until dropped.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    disk: Box<dyn Disk>,
    narrowed: bool,
    noticed: Mutex<Noticed>,
    /// Held while something is written. None: the directory is another process's, and can be read.
    lock: Mutex<Option<File>>,
}

/// What was not as it should be with the files so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Noticed {
    /// A generation was lost or damaged that may have been the newest ([`Loaded::fallback`]).
    pub fallback: BTreeSet<String>,
    /// Others than the owner could read or write it ([`Loaded::exposed`]).
    pub exposed: BTreeSet<String>,
    /// Why the last [`Store::save`] failed; none when it succeeded.
    pub unwritten: Option<String>,
}

impl Store {
    /// Takes a directory, made for its owner alone when it is not there. What an interrupted write left behind is removed. On a
    /// read-only disk a directory that was in use before can be read; every save fails.
    ///
    /// # Errors
    /// [`StoreError::Busy`] when another process has it; [`StoreError::Foreign`] when others may enter it and it holds something
    /// but was never a state directory; [`StoreError::Io`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_on(dir, Box::new(System))
    }

    /// As [`Store::open`], with system calls that somebody watches.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on(dir: &Path, disk: Box<dyn Disk>) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Io { path: dir.into(), source };
        make(dir, disk.as_ref()).map_err(failed)?;
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
        Self::begin(dir, disk, lock, narrowed)
    }

    /// Goes on with a directory whose lock another process has handed over ([`Store::hand_over`]).
    ///
    /// # Errors
    /// [`StoreError::Busy`] when that is not the lock of this directory, or somebody else holds it; [`StoreError::Io`].
    pub fn go_on(dir: &Path, lock: File) -> Result<Self, StoreError> {
        let path = dir.join(LOCK);
        let same = || Ok((fs::symlink_metadata(&path)?, lock.metadata()?));
        let (there, ours) = same().map_err(|source| StoreError::Io { path: path.clone(), source })?;
        if (there.dev(), there.ino()) != (ours.dev(), ours.ino()) {
            return Err(StoreError::Busy(dir.into()));
        }
        Self::begin(dir, Box::new(System), lock, false)
    }

    /// The directory of another process, to be read only.
    pub fn look_at(dir: &Path) -> Self {
        Self { dir: dir.into(), disk: Box::new(System), narrowed: false, noticed: Mutex::default(), lock: Mutex::new(None) }
    }

    /// Gives the lock away: when this returns, nothing is being written and nothing will be. None when it was given away before.
    pub fn hand_over(&self) -> Option<File> {
        self.writing().take()
    }

    /// Takes the lock back that nobody wanted.
    pub fn take_back(&self, lock: File) {
        *self.writing() = Some(lock);
    }

    fn writing(&self) -> MutexGuard<'_, Option<File>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(dir: &Path, disk: Box<dyn Disk>, lock: File, narrowed: bool) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Io { path: dir.into(), source };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Busy(dir.into())),
            Err(TryLockError::Error(source)) => return Err(StoreError::Io { path: dir.join(LOCK), source }),
        }
        for entry in fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_str().is_some_and(|name| name.ends_with(TEMPORARY)) {
                let path = entry.path();
                is_file(&path)?;
                match disk.remove(&path) {
                    Err(e) if e.kind() == ErrorKind::ReadOnlyFilesystem => {}
                    removed => removed.map_err(|source| StoreError::Io { path, source })?,
                }
            }
        }
        // A process that was killed has perhaps renamed and not flushed. What is read now is acted upon, so it has to stay.
        let unwritten = flush(dir, disk.as_ref()).err().map(|source| failed(source).to_string());
        let noticed = Mutex::new(Noticed { unwritten, ..Noticed::default() });
        Ok(Self { dir: dir.into(), disk, narrowed, noticed, lock: Mutex::new(Some(lock)) })
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
        let [path, other] = self.paths(name)?;
        let (a, b) = (Generation::read(&path)?, Generation::read(&other)?);
        let exposed = a.exposed || b.exposed;
        let loaded = |g: Complete, fallback: bool| {
            let mut noticed = self.noticed.lock().unwrap_or_else(PoisonError::into_inner);
            // Names are few: only files that exist get here.
            fallback.then(|| noticed.fallback.insert(name.to_owned()));
            exposed.then(|| noticed.exposed.insert(name.to_owned()));
            Ok(Some(Loaded { bytes: g.bytes, fallback, exposed }))
        };
        match choose([a.found, b.found]) {
            Ok((complete, fallback)) => loaded(complete, fallback),
            Err(Found::Nothing) => Ok(None),
            Err(Found::Other(error)) => Err(error),
            Err(Found::Unreadable(source)) => Err(StoreError::Io { path, source }),
            Err(_) => Err(StoreError::Damaged(path)),
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
        let writing = self.writing();
        let _ours = writing.as_ref().ok_or_else(|| StoreError::HandedOver(self.dir.clone()))?;
        let places = self.paths(name)?;
        let (older, newest) = in_order(&places)?;
        let content = Zeroizing::new(encode(newest.number + 1, bytes));
        let mut new = places[0].clone().into_os_string();
        new.push(TEMPORARY);
        let new = PathBuf::from(new);
        self.put(&new, &content).map_err(|source| StoreError::Io { path: new.clone(), source })?;
        let renamed = self.disk.rename(&new, older.path).and_then(|()| self.disk.sync_dir(&self.dir));
        renamed.map_err(|source| StoreError::Io { path: older.path.into(), source })
    }

    fn put(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        // Left behind by a failed write of this process; the lock keeps others out.
        absent(self.disk.remove(path))?;
        let mut file = self.disk.create(path)?;
        let written = self.disk.write(&mut file, path, bytes).and_then(|()| self.disk.sync_file(&file, path));
        if written.is_err() {
            // Half a file would only make a full disk fuller.
            let _ = self.disk.remove(path);
        }
        written
    }

    /// Removes a file, both generations. That there is none is no error.
    ///
    /// # Errors
    /// [`StoreError::Name`], [`StoreError::Io`].
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let writing = self.writing();
        let _ours = writing.as_ref().ok_or_else(|| StoreError::HandedOver(self.dir.clone()))?;
        let places = self.paths(name)?;
        let (older, newest) = in_order(&places)?;
        // The old one first: if only one of the two removals is done, the file must not come back as it was long ago.
        for path in [older.path, newest.path] {
            let removed = absent(self.disk.remove(path)).and_then(|()| self.disk.sync_dir(&self.dir));
            removed.map_err(|source| StoreError::Io { path: path.into(), source })?;
        }
        Ok(())
    }

    fn paths(&self, name: &str) -> Result<[PathBuf; 2], StoreError> {
        if !is_name(name) {
            return Err(StoreError::Name);
        }
        Ok([self.dir.join(name), self.dir.join(format!("{name}{OTHER}"))])
    }
}

/// Whether a state file may have this name.
fn is_name(name: &str) -> bool {
    let part = |p: &str| !p.is_empty() && p.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    let (stem, extension) = name.split_once('.').map_or((name, None), |(s, e)| (s, Some(e)));
    let ours = [LOCK, &OTHER[1..], &TEMPORARY[1..]];
    let clash = name == LOCK || extension.is_some_and(|e| ours.contains(&e));
    name.len() <= 64 && !clash && part(stem) && extension.is_none_or(part)
}

/// A place of a file, and the generation that is there: 0, which none has, if it is of no use.
struct Numbered<'a> {
    path: &'a Path,
    number: u64,
}

/// The two places of a file, that of the newest generation last. Something damaged is older than everything: it must never push
/// out what is good.
fn in_order(places: &[PathBuf; 2]) -> Result<(Numbered<'_>, Numbered<'_>), StoreError> {
    let [a, b] = places;
    let (a, b) = (
        Numbered { path: a, number: Generation::read(a)?.number() },
        Numbered { path: b, number: Generation::read(b)?.number() },
    );
    Ok(if a.number > b.number { (b, a) } else { (a, b) })
}

/// Makes a directory and those above it, and sees to it that they are still there after a power cut: else all that is written below is lost.
fn make(dir: &Path, disk: &dyn Disk) -> io::Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
    for path in missing.iter().rev() {
        // What it is made in is perhaps as new, and a process was killed before this line.
        flush(above(above(path)), disk)?;
        disk.make_dir(path)?;
        flush(above(path), disk)?;
    }
    // Whoever made it, perhaps a moment ago. Where we may not look it is not ours to flush.
    flush(above(dir), disk)
}

fn above(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Flushes the names of a directory, where that can be done.
fn flush(dir: &Path, disk: &dyn Disk) -> io::Result<()> {
    match disk.sync_dir(dir) {
        Err(e) if matches!(e.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied | ErrorKind::InvalidInput) => {
            Ok(())
        }
        flushed => flushed,
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
fn read_whole(file: &mut File) -> io::Result<Found> {
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    if length < HEADER {
        return Ok(Found::Damaged { claims: None });
    }
    let mut head = [0; HEADER];
    file.read_exact(&mut head)?;
    let number = |at: usize| head[at..at + 8].try_into().map(u64::from_be_bytes).ok();
    let damaged = Found::Damaged { claims: number(8).filter(|_| head[..8] == MAGIC) };
    if length > HEADER + MAX_FILE || head[..8] != MAGIC || number(16) != Some((length - HEADER) as u64) {
        return Ok(damaged);
    }
    // Room for all of it, so that no copy of a secret is left behind when it grows.
    let mut bytes = Zeroizing::new(Vec::with_capacity(length + 1));
    bytes.extend_from_slice(&head);
    file.take((length - HEADER + 1) as u64).read_to_end(&mut bytes)?;
    let complete = |(number, content): (u64, &[u8])| Found::Good(Complete { number, bytes: Zeroizing::new(content.to_vec()) });
    Ok(decode(&bytes).map_or(damaged, complete))
}

/// Reads a file's bytes: its generation and its content, or `None` if a single bit of it is not as it was written.
pub fn decode(file: &[u8]) -> Option<(u64, &[u8])> {
    let (head, rest) = file.split_at_checked(24)?;
    let (sum, bytes) = rest.split_first_chunk::<32>()?;
    let (magic, numbers) = head.split_first_chunk::<8>()?;
    let (number, length) = numbers.split_first_chunk::<8>()?;
    let number = u64::from_be_bytes(*number);
    // Numbers begin at 1, and none can follow the last one.
    let whole =
        *magic == MAGIC && u64::from_be_bytes(length.try_into().ok()?) == bytes.len() as u64 && (1..u64::MAX).contains(&number);
    (whole && sha256(&[head, bytes]) == *sum).then_some((number, bytes))
}

struct Complete {
    number: u64,
    bytes: Zeroizing<Vec<u8>>,
}

enum Found {
    Nothing,
    Good(Complete),
    Damaged {
        /// The generation that it says it is, if that much of it is left.
        claims: Option<u64>,
    },
    /// The disk gave an error: as good as damaged where the other generation is whole.
    Unreadable(io::Error),
    /// No file: the same.
    Other(StoreError),
}

impl Found {
    /// Whether what is of no use may have been newer than this generation. Both places are in use from the second one on.
    fn may_be_newer_than(&self, number: u64) -> bool {
        match self {
            Self::Nothing => number > 1,
            Self::Damaged { claims } => claims.is_none_or(|claimed| claimed >= number),
            _ => true,
        }
    }
}

/// The newest of what is in the two places, and whether the other may have been newer; else what says most about why there is none.
fn choose([a, b]: [Found; 2]) -> Result<(Complete, bool), Found> {
    match (a, b) {
        (Found::Good(a), Found::Good(b)) => Ok((if b.number > a.number { b } else { a }, false)),
        (Found::Good(good), lost) | (lost, Found::Good(good)) => {
            let fallback = lost.may_be_newer_than(good.number);
            Ok((good, fallback))
        }
        (other @ Found::Other(_), _) | (_, other @ Found::Other(_)) => Err(other),
        (unreadable @ Found::Unreadable(_), _) | (_, unreadable @ Found::Unreadable(_)) => Err(unreadable),
        (Found::Nothing, rest) | (rest, _) => Err(rest),
    }
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
        let found = read_whole(&mut file).unwrap_or_else(Found::Unreadable);
        Ok(Self { found, exposed })
    }

    /// The generation; 0, which none has, if it cannot be used.
    fn number(&self) -> u64 {
        if let Found::Good(g) = &self.found { g.number } else { 0 }
    }
}

#[cfg(test)]
mod cuts;
#[cfg(test)]
mod power;
#[cfg(test)]
mod tests;
