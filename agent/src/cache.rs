//! What may be lost: the last known records of the members, and where each was last reached. The only file that names sled.
//!
//! Owns one small database and its end: whatever is wrong with it, the daemon starts, at worst with an empty one. Keys, roster,
//! bundle, clock floor, strictness and record sequences are *not* in here; they are state, and sled's flush is not durable on
//! Linux (`sync_file_range`) and its recovery may panic on a damaged file. Invariant: no error or panic of sled leaves this
//! file other than as a [`CacheError`], and what is read is bounded and unverified: whoever uses it checks signatures as if it
//! came from the network.
//!
//! sled is run without its timer: nothing is written to the card until [`Cache::flush`], and [`Cache`] writes only what changed.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;
use std::{fs, io, thread};

use meshd_ca::identity::NodeId;
use thiserror::Error;

/// The name of the database in its directory.
pub const DIRECTORY: &str = "cache";
/// Nodes held of each kind, as many as a roster may have.
pub const MAX_NODES: usize = 4096;
/// Longest record in bytes: its 32 KiB with the signature and encoding around it.
pub const MAX_RECORD: usize = 64 * 1024;
/// Addresses held per node.
pub const MAX_ADDRESSES: usize = 64;
/// Corrupt databases that are kept for a look.
pub const MAX_SET_ASIDE: usize = 2;
/// A database that has grown beyond this, by garbage that sled did not collect, is made anew.
const MAX_DISK: u64 = 64 << 20;
/// How long opening may take before the database counts as corrupt. An SD card of a thousand nodes takes a second or two.
const OPENING: Duration = Duration::from_secs(30);
/// How often a lock that another process holds is tried again, a fifth of a second apart: one that was just killed holds it yet.
const LOCK_TRIES: usize = 10;

/// Why the cache does not work. Nothing depends on it: the caller goes on without, and says so.
#[derive(Debug, Error)]
pub enum CacheError {
    /// The directory or a file in it cannot be used; the database itself may be fine.
    #[error("the cache in {} cannot be used: {reason}; check the owner, mode and free space of that directory, or remove it", path.display())]
    Unusable {
        /// Where it is.
        path: PathBuf,
        /// What the system or sled said.
        reason: String,
    },
    /// The database broke while it was in use; the next start sets it aside.
    #[error("the cache is broken: {0}; it is rebuilt when meshd starts again")]
    Broken(String),
}

/// Last known records and addresses, by node.
pub struct Cache {
    db: sled::Db,
    records: sled::Tree,
    addresses: sled::Tree,
    set_aside: Option<(PathBuf, String)>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("set_aside", &self.set_aside).finish_non_exhaustive()
    }
}

impl Cache {
    /// Opens or makes the database `cache` in `dir`. A corrupt one is renamed to `cache.corrupt-N`, of which the newest
    /// [`MAX_SET_ASIDE`] stay, and an empty one takes its place. Blocks, for seconds at worst: call it off the hot path.
    ///
    /// # Errors
    /// [`CacheError::Unusable`] when the directory cannot be written, another process has the database, or a new one cannot be
    /// made either.
    pub fn open(dir: &Path) -> Result<Self, CacheError> {
        let path = dir.join(DIRECTORY);
        let unusable = |reason: String| CacheError::Unusable { path: path.clone(), reason };
        fs::create_dir_all(dir).map_err(|e| unusable(e.to_string()))?;
        if size(&path) > MAX_DISK {
            fs::remove_dir_all(&path).map_err(|e| unusable(e.to_string()))?;
        }
        match Self::try_open(&path) {
            Ok(cache) => Ok(cache),
            Err(Trouble::System(reason)) => Err(unusable(reason)),
            Err(Trouble::Corrupt(reason)) => {
                let aside = set_aside(dir, &path).map_err(|e| unusable(format!("{reason}; {e}")))?;
                match Self::try_open(&path) {
                    Ok(cache) => Ok(Self { set_aside: Some((aside, reason)), ..cache }),
                    Err(Trouble::System(again) | Trouble::Corrupt(again)) => Err(unusable(again)),
                }
            }
        }
    }

    /// Where a corrupt database was moved to when this one was opened, and what was wrong with it.
    pub fn set_aside(&self) -> Option<(&Path, &str)> {
        self.set_aside.as_ref().map(|(path, reason)| (path.as_path(), reason.as_str()))
    }

    /// Keeps the bytes of a signed record; returns whether that changed anything. Longer ones than [`MAX_RECORD`], and those of
    /// more nodes than [`MAX_NODES`], are not kept.
    ///
    /// # Errors
    /// [`CacheError::Broken`].
    pub fn put_record(&self, node: NodeId, bytes: &[u8]) -> Result<bool, CacheError> {
        if bytes.len() > MAX_RECORD {
            return Ok(false);
        }
        put(&self.records, node, bytes)
    }

    /// Every record held, unverified. What cannot be read is left out.
    pub fn records(&self) -> Vec<(NodeId, Vec<u8>)> {
        entries(&self.records, |v| (v.len() <= MAX_RECORD).then(|| v.to_vec()))
    }

    /// Keeps where a node was last reached, the first [`MAX_ADDRESSES`]; returns whether that changed anything.
    ///
    /// # Errors
    /// [`CacheError::Broken`].
    pub fn put_addresses(&self, node: NodeId, addresses: &[SocketAddr]) -> Result<bool, CacheError> {
        let lines: Vec<String> = addresses.iter().take(MAX_ADDRESSES).map(ToString::to_string).collect();
        put(&self.addresses, node, lines.join("\n").as_bytes())
    }

    /// Where nodes were last reached. What cannot be read is left out.
    pub fn addresses(&self) -> Vec<(NodeId, Vec<SocketAddr>)> {
        let parse = |v: &[u8]| {
            let text = std::str::from_utf8(v).ok()?;
            let all: Vec<SocketAddr> = text.lines().take(MAX_ADDRESSES).filter_map(|l| l.parse().ok()).collect();
            (!all.is_empty()).then_some(all)
        };
        entries(&self.addresses, parse)
    }

    /// Forgets a node: it left or is banished.
    ///
    /// # Errors
    /// [`CacheError::Broken`].
    pub fn forget(&self, node: NodeId) -> Result<(), CacheError> {
        guarded(|| {
            self.records.remove(node.as_bytes())?;
            self.addresses.remove(node.as_bytes()).map(drop)
        })
    }

    /// Writes what is not on disk yet. Blocks.
    ///
    /// # Errors
    /// [`CacheError::Broken`].
    pub fn flush(&self) -> Result<(), CacheError> {
        guarded(|| self.db.flush().map(drop))
    }

    /// Opens the database and reads all of it, on a thread of its own that may panic or hang without harm to ours.
    fn try_open(path: &Path) -> Result<Self, Trouble> {
        let (done, result) = mpsc::channel();
        let config = sled::Config::new()
            .path(path)
            .mode(sled::Mode::LowSpace)
            .cache_capacity(1 << 20)
            .segment_size(128 << 10)
            .flush_every_ms(None);
        let open = move || {
            // A receiver that has given up lets the database go again.
            let _ = done.send(catch_unwind(AssertUnwindSafe(|| read_through(&config))));
        };
        let thread = thread::Builder::new().name("cache".into()).spawn(open);
        thread.map_err(|e| Trouble::System(format!("no thread: {e}")))?;
        match result.recv_timeout(OPENING) {
            Ok(Ok(Ok(cache))) => Ok(cache),
            Ok(Ok(Err(e))) => Err(trouble(&e)),
            Ok(Err(_)) | Err(mpsc::RecvTimeoutError::Disconnected) => Err(Trouble::Corrupt("sled panicked".into())),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(Trouble::Corrupt("sled did not finish".into())),
        }
    }
}

/// Why a database did not open.
enum Trouble {
    /// It is unreadable, not damaged: another process has it, or the file system refuses.
    System(String),
    Corrupt(String),
}

fn trouble(e: &sled::Error) -> Trouble {
    match e {
        sled::Error::Io(io) if is_lock(e) || refused(io.kind()) => Trouble::System(io.to_string()),
        e => Trouble::Corrupt(e.to_string()),
    }
}

fn refused(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(kind, PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull)
}

/// sled tells a held lock by its text only.
fn is_lock(e: &sled::Error) -> bool {
    matches!(e, sled::Error::Io(io) if io.to_string().contains("acquire lock"))
}

fn read_through(config: &sled::Config) -> Result<Cache, sled::Error> {
    let mut tries = 0;
    let db = loop {
        match config.open() {
            Err(e) if is_lock(&e) && tries < LOCK_TRIES => {
                tries += 1;
                thread::sleep(Duration::from_millis(200));
            }
            other => break other?,
        }
    };
    let (records, addresses) = (db.open_tree("records")?, db.open_tree("addresses")?);
    for entry in records.iter().chain(addresses.iter()) {
        entry?;
    }
    Ok(Cache { db, records, addresses, set_aside: None })
}

/// Runs something of sled's; a panic is an error.
fn guarded<T>(f: impl FnOnce() -> Result<T, sled::Error>) -> Result<T, CacheError> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result.map_err(|e| CacheError::Broken(e.to_string())),
        Err(_) => Err(CacheError::Broken("sled panicked".into())),
    }
}

fn put(tree: &sled::Tree, node: NodeId, value: &[u8]) -> Result<bool, CacheError> {
    guarded(|| match tree.get(node.as_bytes())? {
        Some(old) if old == value => Ok(false),
        None if tree.len() >= MAX_NODES => Ok(false),
        _ => tree.insert(node.as_bytes(), value).map(|_| true),
    })
}

fn entries<T>(tree: &sled::Tree, parse: impl Fn(&[u8]) -> Option<T>) -> Vec<(NodeId, T)> {
    let mut out = Vec::new();
    let read = guarded(|| {
        for entry in tree.iter().take(MAX_NODES) {
            let (key, value) = entry?;
            if let Ok(id) = <[u8; 16]>::try_from(&key[..])
                && let Some(value) = parse(&value)
            {
                out.push((NodeId::from_bytes(id), value));
            }
        }
        Ok(())
    });
    if let Err(error) = read {
        tracing::warn!(%error, "part of the cache cannot be read");
    }
    out
}

/// Bytes in the files of a directory, two levels deep: sled's layout.
fn size(path: &Path) -> u64 {
    let files = |p: &Path| fs::read_dir(p).into_iter().flatten().flatten();
    let top = files(path).chain(files(&path.join("blobs")));
    top.filter_map(|f| f.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
}

/// Renames a corrupt database to `cache.corrupt-N` and removes the oldest of those there are.
fn set_aside(dir: &Path, path: &Path) -> io::Result<PathBuf> {
    let number = |f: fs::DirEntry| f.file_name().to_str()?.strip_prefix("cache.corrupt-")?.parse::<u32>().ok();
    let mut there: Vec<u32> = fs::read_dir(dir)?.flatten().filter_map(number).collect();
    there.sort_unstable();
    let of = |n: u32| dir.join(format!("cache.corrupt-{n}"));
    let new = of(there.last().map_or(1, |n| n.saturating_add(1)));
    fs::rename(path, &new)?;
    let surplus = (there.len() + 1).saturating_sub(MAX_SET_ASIDE);
    for n in there.into_iter().take(surplus) {
        let old = of(n);
        if fs::remove_dir_all(&old).is_err() {
            fs::remove_file(&old)?;
        }
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(n: u16) -> NodeId {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&n.to_be_bytes());
        NodeId::from_bytes(id)
    }

    fn filled(dir: &Path, nodes: u16) {
        let c = Cache::open(dir).unwrap();
        for n in 0..nodes {
            c.put_record(node(n), &vec![n as u8; 700]).unwrap();
            c.put_addresses(node(n), &[SocketAddr::from(([10, 0, 0, n as u8], 6374))]).unwrap();
        }
        c.flush().unwrap();
    }

    fn aside(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|n| n.starts_with("cache.corrupt-")).collect();
        names.sort();
        names
    }

    #[test]
    fn what_was_put_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let reached: Vec<SocketAddr> = ["10.0.0.1:6374", "[fd00::1]:7", "[fe80::1%3]:6374"].map(|s| s.parse().unwrap()).into();
        {
            let c = Cache::open(dir.path()).unwrap();
            assert!(c.put_record(node(1), b"one").unwrap());
            assert!(!c.put_record(node(1), b"one").unwrap(), "nothing changed");
            assert!(c.put_record(node(1), b"two").unwrap());
            assert!(c.put_record(node(2), &vec![7; MAX_RECORD]).unwrap());
            assert!(!c.put_record(node(3), &vec![7; MAX_RECORD + 1]).unwrap());
            assert!(c.put_addresses(node(1), &reached).unwrap());
            assert!(!c.put_addresses(node(1), &reached).unwrap());
            c.put_record(node(4), b"gone").unwrap();
            c.forget(node(4)).unwrap();
            c.flush().unwrap();
        }
        let c = Cache::open(dir.path()).unwrap();
        assert_eq!(c.records(), [(node(1), b"two".to_vec()), (node(2), vec![7; MAX_RECORD])]);
        assert_eq!(c.addresses(), [(node(1), reached)]);
        assert!(c.set_aside().is_none() && aside(dir.path()).is_empty());
    }

    #[test]
    fn a_panic_inside_is_an_error() {
        let broken = guarded(|| -> Result<(), sled::Error> { panic!("as sled does on a damaged page") });
        assert!(matches!(broken, Err(CacheError::Broken(_))));
    }

    #[test]
    fn it_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let c = Cache::open(dir.path()).unwrap();
        for n in 0..MAX_NODES as u16 {
            assert!(c.put_record(node(n), b"x").unwrap());
        }
        assert!(!c.put_record(node(60_000), b"x").unwrap());
        assert!(c.put_record(node(5), b"y").unwrap(), "those that are there still change");
        let many: Vec<SocketAddr> = (1..200).map(|p| SocketAddr::from(([10, 0, 0, 1], p))).collect();
        c.put_addresses(node(1), &many).unwrap();
        assert_eq!(c.addresses()[0].1.len(), MAX_ADDRESSES);
    }

    #[test]
    fn one_that_is_in_use_or_unreadable_is_not_taken_for_corrupt() {
        let dir = tempfile::tempdir().unwrap();
        let first = Cache::open(dir.path()).unwrap();
        first.put_record(node(1), b"one").unwrap();
        assert!(matches!(Cache::open(dir.path()), Err(CacheError::Unusable { .. })));
        assert!(aside(dir.path()).is_empty());
        drop(first);
        assert_eq!(Cache::open(dir.path()).unwrap().records().len(), 1);

        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(matches!(Cache::open(&file), Err(CacheError::Unusable { .. })));
    }

    #[test]
    fn rubbish_in_its_place_is_set_aside_and_the_oldest_removed() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..5 {
            let path = dir.path().join("cache");
            let _ = fs::remove_dir_all(&path);
            fs::write(&path, [0xa5; 5000]).unwrap();
            let c = Cache::open(dir.path()).unwrap();
            assert!(c.set_aside().is_some());
            assert!(c.records().is_empty());
            assert!(c.put_record(node(1), b"works").unwrap());
        }
        assert_eq!(aside(dir.path()), ["cache.corrupt-4", "cache.corrupt-5"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        /// Bits flipped, blocks overwritten and tails cut off in any file: it opens, and what it then holds works.
        #[test]
        fn a_garbled_database_never_keeps_us_from_starting(
            hits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..3u8, any::<u8>()), 1..6),
        ) {
            let dir = tempfile::tempdir().unwrap();
            filled(dir.path(), 40);
            let inside = dir.path().join("cache");
            let mut files: Vec<PathBuf> = fs::read_dir(&inside).unwrap().map(|f| f.unwrap().path()).filter(|p| p.is_file()).collect();
            files.sort();
            for (file, at, how, with) in hits {
                let file = file.get(&files);
                let mut bytes = fs::read(file).unwrap();
                if bytes.is_empty() {
                    continue;
                }
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] ^= with | 1,
                    1 => bytes[at..].iter_mut().take(4096).for_each(|b| *b = with),
                    _ => bytes.truncate(at),
                }
                fs::write(file, bytes).unwrap();
            }
            let c = Cache::open(dir.path()).unwrap();
            prop_assert!(c.records().len() <= 40 && c.addresses().len() <= 40);
            for (n, bytes) in c.records() {
                prop_assert_eq!(&bytes, &vec![n.as_bytes()[1]; 700], "a checksum would have caught it");
            }
            prop_assert!(c.put_record(node(999), b"new").unwrap());
            c.flush().unwrap();
            drop(c);
            let again = Cache::open(dir.path()).unwrap();
            prop_assert!(again.records().contains(&(node(999), b"new".to_vec())));
        }
    }
}
