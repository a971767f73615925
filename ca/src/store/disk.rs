//! What a [`Store`](super::Store) asks of the file system: a method for each system call that changes something.
//!
//! Every method is the real thing. Tests override them to write down in which order it happens, and to pull the plug in between.

use std::fmt::Debug;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// The system calls that change a state directory. What fails, fails with the error of the system.
#[allow(clippy::missing_errors_doc)] // all the same: above
pub trait Disk: Debug + Send + Sync {
    /// Makes a directory for its owner alone. That it is there already is no error.
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)
    }

    /// Makes a new file for its owner alone.
    fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    }

    /// Writes all the bytes to the file that was made as `path`.
    fn write(&self, file: &mut File, _path: &Path, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    /// Returns when the content of the file that was made as `path` is on the disk. Its name may not be.
    fn sync_file(&self, file: &File, _path: &Path) -> io::Result<()> {
        file.sync_all()
    }

    /// Gives a file another name; whatever had that name is gone.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    /// Returns when the names in a directory are on the disk as they are.
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}

/// The file system.
#[derive(Debug)]
pub(super) struct System;

impl Disk for System {}
