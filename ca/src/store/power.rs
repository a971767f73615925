//! Power cuts: writes down what is really asked of the disk, and says what may be left of it when the plug is pulled.
//!
//! [`Recorder`] does everything on a real file system and notes it. [`Acts::ruins`] gives every directory that may be found after the first so many acts:
//! what was flushed is there; of what was not, each name may have been changed or not, whatever the order, and a rename may have done
//! only one of its two halves (ext4 and xfs keep the order and do renames whole, f2fs keeps no order, vfat neither); content that was not
//! flushed may be torn at any byte, be zeros, or not be there. Flushing a file does not flush its name.
//!
//! Also part of the tests of the daemon, which are about the real callers (`src/daemon/power.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Debug, Formatter};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Disk, Store, StoreError};

/// What was asked of the disk, or said to somebody. Paths are below the root of the recorder.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Act {
    MakeDir(PathBuf),
    Create(PathBuf),
    Write(PathBuf, Vec<u8>),
    SyncFile(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    SyncDir(PathBuf),
    /// From here on somebody counts on this.
    #[allow(dead_code)] // by the daemon's tests
    Told(String),
}

impl Debug for Act {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeDir(path) => write!(f, "make {}", path.display()),
            Self::Create(path) => write!(f, "create {}", path.display()),
            Self::Write(path, bytes) => write!(f, "write {} {}", path.display(), bytes.len()),
            Self::SyncFile(path) => write!(f, "sync {}", path.display()),
            Self::Rename(from, to) => write!(f, "rename {} {}", from.display(), to.display()),
            Self::Remove(path) => write!(f, "remove {}", path.display()),
            Self::SyncDir(path) => write!(f, "sync {}/", path.display()),
            Self::Told(what) => write!(f, "told {what}"),
        }
    }
}

/// Writes down what is asked of a real directory. Clones write into the same list.
#[derive(Debug, Clone)]
pub(super) struct Recorder {
    root: PathBuf,
    log: Arc<Mutex<Log>>,
}

#[derive(Debug, Default)]
struct Log {
    acts: Vec<Act>,
    /// How many acts are still done before one fails, as on a full disk.
    failing: Option<usize>,
}

impl Recorder {
    /// Opens a store here. The fork of another test may hold the lock of the one before for a moment longer, until it is another program.
    pub(super) fn open(&self, state: &Path) -> Store {
        loop {
            match Store::open_on(state, Box::new(self.clone())) {
                Err(StoreError::Busy(_)) => std::thread::sleep(std::time::Duration::from_millis(5)),
                opened => return opened.unwrap(),
            }
        }
    }

    /// For what happens below `root`, which is on the disk already and stays there. `acts` were before.
    pub(super) fn new(root: &Path, acts: &[Act]) -> Self {
        Self { root: root.into(), log: Arc::new(Mutex::new(Log { acts: acts.to_vec(), failing: None })) }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }

    /// Notes that somebody was told something which must be true for ever.
    #[allow(dead_code)] // by the daemon's tests
    pub(super) fn told(&self, what: &str) {
        self.log().acts.push(Act::Told(what.into()));
    }

    /// Lets the act after so many more fail, and no other.
    pub(super) fn fail_after(&self, acts: usize) {
        self.log().failing = Some(acts);
    }

    /// Whether that act was reached.
    pub(super) fn failed(&self) -> bool {
        self.log().failing.is_none()
    }

    /// All there was.
    pub(super) fn acts(&self) -> Acts {
        Acts(self.log().acts.clone())
    }

    fn below(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap_or(path).to_owned()
    }

    fn note(&self, act: Act) -> io::Result<()> {
        let mut log = self.log();
        match &mut log.failing {
            Some(0) => {
                log.failing = None;
                return Err(io::ErrorKind::StorageFull.into());
            }
            Some(more) => *more -= 1,
            None => {}
        }
        log.acts.push(act);
        Ok(())
    }
}

/// What is done for real without anybody watching.
#[derive(Debug)]
struct Real;
impl Disk for Real {}

impl Disk for Recorder {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.note(Act::MakeDir(self.below(path)))?;
        Real.make_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<File> {
        self.note(Act::Create(self.below(path)))?;
        Real.create(path)
    }
    fn write(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.note(Act::Write(self.below(path), bytes.to_vec()))?;
        Real.write(file, path, bytes)
    }
    fn sync_file(&self, _file: &File, path: &Path) -> io::Result<()> {
        // For real it would only take time.
        self.note(Act::SyncFile(self.below(path)))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.note(Act::Rename(self.below(from), self.below(to)))?;
        Real.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        if path.exists() {
            self.note(Act::Remove(self.below(path)))?;
        }
        Real.remove(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.note(Act::SyncDir(self.below(path)))
    }
}

/// How finely content that was not flushed is torn.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tear {
    /// At every byte.
    Everywhere,
    /// At its ends, in the middle and in the first bytes.
    Here,
}

/// A list of acts, in their order.
#[derive(Debug, Clone)]
pub(super) struct Acts(pub(super) Vec<Act>);

/// What may be found: directories, and files with their content.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ruin {
    dirs: BTreeSet<PathBuf>,
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Ruin {
    /// Makes it what is below `root`, and nothing else.
    pub(super) fn lay(&self, root: &Path) {
        for entry in fs::read_dir(root).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        for dir in &self.dirs {
            Real.make_dir(&root.join(dir)).unwrap();
        }
        for (path, bytes) in &self.files {
            let mut file = Real.create(&root.join(path)).unwrap();
            Real.write(&mut file, path, bytes).unwrap();
        }
    }
}

/// What happened to a name and was perhaps not flushed.
#[derive(Debug, Clone)]
enum Change {
    Dir(PathBuf),
    /// The name is that of the file with this number.
    Is(PathBuf, usize),
    Gone(PathBuf),
}

impl Change {
    fn path(&self) -> &Path {
        match self {
            Self::Dir(path) | Self::Is(path, _) | Self::Gone(path) => path,
        }
    }
}

/// A file system in the middle of its work.
#[derive(Debug, Default)]
struct Model {
    /// As it is to the running system.
    names: BTreeMap<PathBuf, usize>,
    dirs: BTreeSet<PathBuf>,
    /// As it surely is on the disk.
    kept: BTreeMap<PathBuf, usize>,
    kept_dirs: BTreeSet<PathBuf>,
    /// The difference, in order.
    changes: Vec<Change>,
    /// The content of each file there ever was, and whether it was flushed.
    files: Vec<(Vec<u8>, bool)>,
}

impl Model {
    fn after(acts: &[Act]) -> Self {
        let mut model = Self::default();
        for act in acts {
            model.act(act);
        }
        model
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::MakeDir(path) => {
                self.dirs.insert(path.clone());
                self.changes.push(Change::Dir(path.clone()));
            }
            Act::Create(path) => {
                self.files.push((Vec::new(), false));
                self.names.insert(path.clone(), self.files.len() - 1);
                self.changes.push(Change::Is(path.clone(), self.files.len() - 1));
            }
            Act::Write(path, bytes) => {
                let file = &mut self.files[self.names[path]];
                file.0.extend_from_slice(bytes);
                file.1 = false;
            }
            Act::SyncFile(path) => self.files[self.names[path]].1 = true,
            Act::Rename(from, to) => {
                let file = self.names.remove(from).unwrap();
                self.names.insert(to.clone(), file);
                self.changes.extend([Change::Is(to.clone(), file), Change::Gone(from.clone())]);
            }
            Act::Remove(path) => {
                self.names.remove(path).unwrap();
                self.changes.push(Change::Gone(path.clone()));
            }
            Act::SyncDir(dir) => {
                let (flushed, rest): (Vec<_>, Vec<_>) =
                    std::mem::take(&mut self.changes).into_iter().partition(|c| c.path().parent() == Some(dir));
                flushed.iter().for_each(|c| apply(c, &mut self.kept, &mut self.kept_dirs));
                self.changes = rest;
            }
            Act::Told(_) => {}
        }
    }

    fn ruins(&self, tear: Tear, found: &mut BTreeSet<Ruin>) {
        assert!(self.changes.len() <= 12, "more than can be tried was not flushed: {:?}", self.changes);
        for chosen in 0..1_u32 << self.changes.len() {
            let (mut names, mut dirs) = (self.kept.clone(), self.kept_dirs.clone());
            let applied = self.changes.iter().enumerate().filter(|(at, _)| chosen >> at & 1 == 1);
            applied.for_each(|(_, change)| apply(change, &mut names, &mut dirs));
            // Without its directory nothing is there.
            dirs =
                dirs.iter().filter(|d| d.ancestors().skip(1).all(|a| a == Path::new("") || dirs.contains(a))).cloned().collect();
            names.retain(|path, _| path.parent().is_none_or(|dir| dir == Path::new("") || dirs.contains(dir)));
            let torn: Vec<usize> = names.values().copied().filter(|file| !self.files[*file].1).collect();
            let longest = torn.iter().map(|file| self.files[*file].0.len()).max();
            for cut in cuts(longest, tear) {
                let content = |file: &usize| {
                    let (bytes, flushed) = &self.files[*file];
                    if *flushed { bytes.clone() } else { cut.of(bytes) }
                };
                let files = names.iter().map(|(path, file)| (path.clone(), content(file))).collect();
                found.insert(Ruin { dirs: dirs.clone(), files });
            }
        }
    }

    /// As the next process finds it when only this one was killed.
    fn running(&self) -> Ruin {
        let files = self.names.iter().map(|(path, file)| (path.clone(), self.files[*file].0.clone())).collect();
        Ruin { dirs: self.dirs.clone(), files }
    }
}

fn apply(change: &Change, names: &mut BTreeMap<PathBuf, usize>, dirs: &mut BTreeSet<PathBuf>) {
    match change {
        Change::Dir(path) => drop(dirs.insert(path.clone())),
        Change::Is(path, file) => drop(names.insert(path.clone(), *file)),
        Change::Gone(path) => drop(names.remove(path)),
    }
}

/// What becomes of content that was not flushed.
enum Cut {
    At(usize),
    /// The length is there, the bytes from here on are not.
    Zeros(usize),
}

impl Cut {
    fn of(&self, bytes: &[u8]) -> Vec<u8> {
        match *self {
            Self::At(at) => bytes[..at.min(bytes.len())].to_vec(),
            Self::Zeros(from) => {
                let mut bytes = bytes.to_vec();
                bytes.iter_mut().skip(from).for_each(|b| *b = 0);
                bytes
            }
        }
    }
}

fn cuts(longest: Option<usize>, tear: Tear) -> Vec<Cut> {
    let Some(longest) = longest else { return vec![Cut::At(0)] };
    let places: BTreeSet<usize> = match tear {
        Tear::Everywhere => (0..=longest).collect(),
        Tear::Here => {
            [0, 1, 24, 56, longest / 2, longest.saturating_sub(1), longest].into_iter().filter(|at| *at <= longest).collect()
        }
    };
    places.into_iter().flat_map(|at| [Cut::At(at), Cut::Zeros(at)]).collect()
}

impl Acts {
    /// Everything that may be found when the plug is pulled after the first `done` acts.
    pub(super) fn ruins(&self, done: usize, tear: Tear) -> BTreeSet<Ruin> {
        let mut found = BTreeSet::new();
        Model::after(&self.0[..done]).ruins(tear, &mut found);
        found
    }

    /// What is found when the process is killed after the first `done` acts, and the system goes on.
    pub(super) fn running(&self, done: usize) -> Ruin {
        Model::after(&self.0[..done]).running()
    }

    /// What somebody counts on after the first `done` acts.
    #[allow(dead_code)] // by the daemon's tests
    pub(super) fn told(&self, done: usize) -> Vec<&str> {
        self.0[..done].iter().filter_map(|a| if let Act::Told(what) = a { Some(what.as_str()) } else { None }).collect()
    }
}
