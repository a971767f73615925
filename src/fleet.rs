//! The file of the fleet token on this host: where it may be, making it, reading it, and removing it when it has done its work.
//!
//! It lies where whoever wrote the card could put it, on a partition without owners or permissions. So it is read with bounds and believed
//! only when its check characters fit, and a link or a pipe in its place is not touched. What is in it decides [`meshd_ca::fleet`].

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use meshd_ca::fleet::{FILE, FleetToken, MAX_FILE};
use rustix::fs::{Mode, OFlags};
use zeroize::Zeroizing;

use crate::config::Config;

/// Where the boot partition of a Raspberry Pi is mounted, today and before 2023, and what the file is called there.
const ON_CARDS: [&str; 2] = ["/boot/firmware/meshd-fleet.token", "/boot/meshd-fleet.token"];

/// The file, and what is in it or why that is of no use.
pub(crate) struct Card {
    pub(crate) path: PathBuf,
    pub(crate) token: Result<FleetToken, String>,
}

impl Card {
    /// What is wrong with it, in words for people.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.token.as_ref().err().map(|why| format!("{} is not used: {why}", self.path.display()))
    }
}

/// What to do about one that cannot be used.
pub(crate) const REMEDY: &str = "put the file there again as `meshd fleet create` made it, or remove it, and restart meshd";

/// The fleet token of this host, if there is one: the first file that exists.
pub(crate) fn find(config: &Config) -> Option<Card> {
    let places = match &config.fleet_token_file {
        Some(path) => vec![path.clone()],
        None => ON_CARDS.iter().map(PathBuf::from).chain([config.state_dir.join(FILE)]).collect(),
    };
    let path = places.into_iter().find(|path| path.symlink_metadata().is_ok())?;
    let token = read(&path).map_err(|e| e.to_string()).and_then(|b| FleetToken::from_file(&b).map_err(|e| e.to_string()));
    Some(Card { path, token })
}

fn read(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = open(path, OFlags::RDONLY)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE + 2));
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A plain file and nothing that would lead elsewhere or never end.
fn open(path: &Path, how: OFlags) -> io::Result<File> {
    let flags = how | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let not_plain = || io::Error::other("it is no plain file");
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NXIO) => return Err(not_plain()),
        opened => File::from(opened?),
    };
    if file.metadata()?.is_file() { Ok(file) } else { Err(not_plain()) }
}

/// Makes the file there: a new one, for its owner alone where the file system knows owners.
///
/// # Errors
/// When a file of that name exists, or it cannot be written; nothing is left then.
pub(crate) fn create(path: &Path, text: &str) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).and_then(|()| sync_above(path));
    if written.is_err() {
        let _ = std::fs::remove_file(path);
    }
    written
}

/// Overwrites the file, gives it another name and removes it, so that neither a look at the file system nor at what it has deleted shows
/// the token. Flash keeps old blocks all the same: what protects is that the token is taken for a day only.
///
/// # Errors
/// The first step that failed; the steps after it are not tried, so that the file is still what it was, or empty of its token.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let mut file = open(path, OFlags::WRONLY)?;
    let length = file.metadata()?.len().min(MAX_FILE as u64);
    file.write_all(&vec![b'#'; usize::try_from(length).unwrap_or(MAX_FILE)])?;
    file.sync_all()?;
    let gone = path.with_extension("gone");
    std::fs::rename(path, &gone)?;
    std::fs::remove_file(&gone)?;
    sync_above(path)
}

fn sync_above(path: &Path) -> io::Result<()> {
    let above = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(above)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn config(dir: &Path) -> Config {
        let mut config = Config::defaults();
        config.state_dir = dir.to_owned();
        config
    }

    #[test]
    fn a_file_is_made_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, token) = (dir.path().join(FILE), FleetToken::generate().unwrap());
        assert!(find(&config(dir.path())).is_none());
        create(&path, &token.to_text()).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(create(&path, "x").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let card = find(&config(dir.path())).unwrap();
        assert!(card.trouble().is_none() && card.token == Ok(token));
        // What somebody still reads who has opened it before.
        let mut before = File::open(&path).unwrap();
        remove(&path).unwrap();
        let mut left = String::new();
        before.read_to_string(&mut left).unwrap();
        assert!(!left.is_empty() && left.bytes().all(|b| b == b'#'), "{left}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_plain_file_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join(FILE), dir.path().join("other"));
        create(&other, &FleetToken::generate().unwrap().to_text()).unwrap();
        let before = std::fs::read(&other).unwrap();
        let refused = |why: &str| {
            let card = find(&config(dir.path())).unwrap();
            let trouble = card.trouble().unwrap();
            assert!(trouble.contains(FILE) && trouble.contains(why), "{trouble}");
            remove(&path).unwrap_err();
        };
        std::os::unix::fs::symlink(&other, &path).unwrap();
        refused("no plain file");
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        refused("no plain file");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        refused("");
        std::fs::remove_dir(&path).unwrap();
        std::fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        assert!(find(&config(dir.path())).unwrap().trouble().unwrap().contains("does not hold a fleet token"));
        assert_eq!(std::fs::read(&other).unwrap(), before);
    }
}
