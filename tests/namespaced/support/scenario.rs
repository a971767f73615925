//! A scenario: a name, what it needs of the machine, and what it does.

use std::path::{Path, PathBuf};

use meshd::demo::units::Units;

use crate::edge::resources::Memory;

/// One test.
pub(crate) struct Scenario {
    /// Its name, `topic::what_holds`.
    pub(crate) name: &'static str,
    /// What the machine must have.
    pub(crate) needs: &'static [Need],
    /// What it does.
    pub(crate) run: fn() -> anyhow::Result<()>,
}

/// Something a machine may lack.
pub(crate) enum Need {
    /// A program that is not ours.
    Program(&'static str),
    /// Being root outside any user namespace: processes of several users.
    Root,
    /// A cgroup2 tree in which units can be imitated.
    Cgroups,
    /// libfaketime: another time of day for one process.
    FakeTime,
    /// A memory cgroup that can be limited.
    Memory,
}

/// The scenario of a function, named after its module and itself.
macro_rules! scenario {
    ($topic:literal, $run:ident $(, $need:expr)*) => {
        $crate::support::scenario::Scenario {
            name: concat!($topic, "::", stringify!($run)),
            needs: &[$($need),*],
            run: $run,
        }
    };
}
pub(crate) use scenario;

/// Whether a skip is a failure here.
pub(crate) fn required() -> bool {
    std::env::var_os("MESHD_REQUIRE_ALL").is_some_and(|v| v == "1")
}

/// What of `needs` this machine lacks.
pub(crate) fn missing(needs: &[Need]) -> Option<String> {
    needs.iter().find_map(|need| match need {
        Need::Program(name) => program(name).is_none().then(|| format!("{name} is not installed")),
        Need::Root => (!really_root()).then(|| "it must be run as root".to_owned()),
        Need::FakeTime => faketime().is_none().then(|| "libfaketime is not installed".to_owned()),
        Need::Memory => Memory::find().is_none().then(|| "no memory cgroup that can be made".to_owned()),
        Need::Cgroups => Units::find().is_none().then(|| "no cgroup2 tree that can be written".to_owned()),
    })
}

/// Root of the machine, not of a user namespace only: every user id is mapped to itself.
fn really_root() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Where a program is, also outside `PATH` where Debian puts servers.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.extend(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from));
    if let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") {
        places.extend(versions.flatten().map(|v| v.path().join("bin")));
    }
    places.into_iter().map(|place| place.join(name)).find(|file| executable(file))
}

/// Where libfaketime is.
pub(crate) fn faketime() -> Option<PathBuf> {
    let libraries = std::fs::read_dir("/usr/lib").ok()?.flatten().map(|dir| dir.path());
    libraries.map(|dir| dir.join("faketime/libfaketime.so.1")).find(|file| file.is_file())
}

fn executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// A command of a program that a [`Need::Program`] names.
pub(crate) fn command(name: &str) -> std::process::Command {
    std::process::Command::new(program(name).unwrap_or_else(|| PathBuf::from(name)))
}
