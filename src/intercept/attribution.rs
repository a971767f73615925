//! From a control group's path to the workload that a socket belongs to.
//!
//! Owns: the reading of paths, user names, and a bounded cache of results. Does not own: identities (which SPIFFE id an owner
//! has). Invariant: **nobody but root decides what a workload is called.** A path is read from the root downwards; the name of a
//! group counts only while every directory above it is root's, because whoever may write a directory may create any name in
//! it; and once a name has decided, nothing below it is looked at.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::sync::{Mutex, PoisonError};

use super::cgroup::Cgroups;
use super::sockdiag::SocketInfo;

/// Bound on cached owners; a full cache is emptied.
const MAX_CACHED: usize = 8192;
/// Bound on the user database, bytes.
const MAX_PASSWD: u64 = 1 << 20;
/// Longest name of a unit (systemd's own limit) and of anything else that becomes part of an identity.
const MAX_NAME: usize = 255;

/// To whom a connection or listener belongs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// A systemd system unit, with its suffix: `nginx.service`.
    Unit(String),
    /// A container: its engine's id in hexadecimal, or its name for LXC.
    Container(String),
    /// What a logged-in user runs: the name, or the number of a user without one.
    User(String),
    /// A Kubernetes pod: its UID.
    Pod(String),
    /// The host itself: everything else.
    Host,
}

/// Reads a control group's path (`/system.slice/nginx.service`), the same for every kernel and host. `is_roots` says whether only
/// root can create entries below a directory; `users` names users.
pub fn read_path(path: &str, is_roots: impl Fn(&str) -> bool, users: &Users) -> Owner {
    let mut names = path.split('/').filter(|name| !name.is_empty());
    let mut place = Place::Root;
    let mut above = String::from("/");
    loop {
        let Some(name) = names.next() else { return place.without_further_name() };
        // The directory that contains `name`: if somebody else may write it, the name is worth nothing.
        if !is_roots(&above) {
            return place.without_further_name();
        }
        place = match place.enter(unescape(name), users) {
            Step::Inside(place) => place,
            Step::Decided(owner) => return owner,
        };
        if above.len() > 1 {
            above.push('/');
        }
        above.push_str(name);
    }
}

/// Where in the tree the names read so far have led.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The root, or slices of units.
    Root,
    Slice,
    /// `user.slice`: whatever comes is a user's.
    Users,
    /// `kubepods`
    Pods,
    /// `docker`, `libpod_parent`, `lxc`: containers of engines that do without systemd.
    Engine,
}

enum Step {
    Inside(Place),
    Decided(Owner),
}

impl Place {
    /// What it is when the path ends here, or continues with names that do not count.
    fn without_further_name(self) -> Owner {
        match self {
            // Nobody's session in particular, but not the host's either.
            Place::Users => Owner::User(String::from("unknown")),
            _ => Owner::Host,
        }
    }

    fn enter(self, name: &str, users: &Users) -> Step {
        match self {
            Place::Users => Step::Decided(match user_slice(name) {
                Some(uid) => Owner::User(users.name(uid)),
                None => self.without_further_name(),
            }),
            Place::Pods => match pod(name) {
                Some(uid) => Step::Decided(Owner::Pod(uid)),
                None => Step::Inside(Place::Pods),
            },
            Place::Engine => Step::Decided(container_id(name).or_else(|| lxc_name(name)).map_or(Owner::Host, Owner::Container)),
            Place::Root => match name {
                "user.slice" => Step::Inside(Place::Users),
                "kubepods" | "kubepods.slice" => Step::Inside(Place::Pods),
                "docker" | "libpod_parent" | "lxc" => Step::Inside(Place::Engine),
                // The first process: what it holds on behalf of others is the host's.
                "init.scope" => Step::Decided(Owner::Host),
                _ => match name.strip_prefix("lxc.payload.").and_then(lxc_name) {
                    Some(name) => Step::Decided(Owner::Container(name)),
                    None => Place::unit(name, users),
                },
            },
            Place::Slice => Place::unit(name, users),
        }
    }

    /// A name below a slice of system units.
    fn unit(name: &str, users: &Users) -> Step {
        if name.strip_suffix(".slice").is_some_and(|_| is_unit_name(name)) {
            return Step::Inside(Place::Slice);
        }
        if let Some(id) = container_scope(name) {
            return Step::Decided(Owner::Container(id));
        }
        // A user's own service manager, wherever it was put: all below is the user's.
        if let Some(uid) = name.strip_prefix("user@").and_then(|rest| rest.strip_suffix(".service")).and_then(uid) {
            return Step::Decided(Owner::User(users.name(uid)));
        }
        let suffixes = [".service", ".scope", ".socket", ".mount", ".swap"];
        match suffixes.iter().any(|suffix| name.ends_with(suffix)) && is_unit_name(name) {
            true => Step::Decided(Owner::Unit(name.to_owned())),
            false => Step::Decided(Owner::Host),
        }
    }
}

/// systemd puts `_` before names that the kernel's own files could collide with.
fn unescape(name: &str) -> &str {
    name.strip_prefix('_').unwrap_or(name)
}

/// systemd.unit(5): "ASCII letters, digits, `:`, `-`, `_`, `.`, and `\`", and `@` for instances.
fn is_unit_name(name: &str) -> bool {
    name.len() <= MAX_NAME && !name.starts_with('.') && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b))
}

/// `user-1000.slice`
fn user_slice(name: &str) -> Option<u32> {
    uid(name.strip_prefix("user-")?.strip_suffix(".slice")?)
}

/// A number as systemd writes it: no sign, no leading zero.
fn uid(digits: &str) -> Option<u32> {
    let value: u32 = digits.parse().ok()?;
    (value.to_string() == digits).then_some(value)
}

/// `docker-<id>.scope`, `libpod-<id>.scope`, `cri-containerd-<id>.scope`, `crio-<id>.scope`
fn container_scope(name: &str) -> Option<String> {
    let name = name.strip_suffix(".scope")?;
    ["docker-", "libpod-", "cri-containerd-", "crio-"].iter().find_map(|engine| container_id(name.strip_prefix(engine)?))
}

/// An engine's id: 12 to 64 hexadecimal digits, with `libpod-` before it where podman does without systemd.
fn container_id(name: &str) -> Option<String> {
    let id = name.strip_prefix("libpod-").unwrap_or(name);
    let valid = (12..=64).contains(&id.len()) && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    valid.then(|| id.to_owned())
}

fn lxc_name(name: &str) -> Option<String> {
    let valid = !name.is_empty()
        && name.len() <= MAX_NAME
        && !name.starts_with(['.', '-'])
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    valid.then(|| name.to_owned())
}

/// The UID in `pod<uid>`, `kubepods-pod<uid>.slice` or `kubepods-burstable-pod<uid>.slice` (with `_` for `-`).
fn pod(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => ["kubepods-pod", "kubepods-burstable-pod", "kubepods-besteffort-pod"]
            .iter()
            .find_map(|prefix| slice.strip_prefix(prefix))?
            .replace('_', "-"),
        None => name.strip_prefix("pod")?.to_owned(),
    };
    // Static pods have a hash of 32 digits instead of a UUID.
    let valid = (32..=36).contains(&uid.len()) && uid.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b'-'));
    valid.then_some(uid)
}

/// Names of users.
#[derive(Debug, Default, Clone)]
pub struct Users(HashMap<u32, String>);

impl Users {
    /// Reads `/etc/passwd`; without one, users are numbers.
    pub fn load() -> Users {
        let mut text = Vec::new();
        match File::open("/etc/passwd").and_then(|file| file.take(MAX_PASSWD).read_to_end(&mut text)) {
            Ok(_) => Users::parse(&String::from_utf8_lossy(&text)),
            Err(_) => Users::default(),
        }
    }

    /// Reads passwd(5). Of several names for one number the first counts; a name that is a number is left out, because it would be
    /// taken for that user.
    pub fn parse(text: &str) -> Users {
        let mut users = HashMap::new();
        for line in text.lines() {
            let mut fields = line.split(':');
            let (Some(name), Some(number)) = (fields.next(), fields.nth(1)) else { continue };
            let named = !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
            if let (true, false, Some(number)) =
                (named && name != "unknown", name.bytes().all(|b| b.is_ascii_digit()), uid(number))
            {
                users.entry(number).or_insert_with(|| name.to_owned());
            }
        }
        Users(users)
    }

    /// The user's name, or the number.
    pub fn name(&self, uid: u32) -> String {
        self.0.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }
}

/// Says whose sockets are, for the life of the process. Cheap after the first look at a control group.
#[derive(Debug)]
pub struct Attribution {
    cgroups: Option<Cgroups>,
    users: Mutex<Users>,
    cache: Mutex<HashMap<u64, Owner>>,
}

impl Attribution {
    /// Works on any host; where control groups of version 2 are missing everything is [`Owner::Host`].
    pub fn open() -> Attribution {
        let cgroups = Cgroups::open().inspect_err(|error| tracing::warn!(%error, "workloads cannot be told apart"));
        Attribution { cgroups: cgroups.ok(), users: Mutex::new(Users::load()), cache: Mutex::default() }
    }

    /// Whether workloads can be told apart on this host.
    pub fn is_available(&self) -> bool {
        self.cgroups.is_some()
    }

    /// The control groups it reads.
    pub fn cgroups(&self) -> Option<&Cgroups> {
        self.cgroups.as_ref()
    }

    /// The owner of a socket; [`Owner::Host`] when its control group is gone or the kernel does not tell it (before 5.9).
    pub fn owner(&self, socket: &SocketInfo) -> Owner {
        let (Some(cgroups), Some(id)) = (&self.cgroups, socket.cgroup) else { return Owner::Host };
        let lock = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(owner) = lock().get(&id) {
            return owner.clone();
        }
        let Ok(path) = cgroups.path(id) else { return Owner::Host };
        let owner = self.read(cgroups, &path);
        let mut cache = lock();
        if cache.len() >= MAX_CACHED {
            cache.clear();
        }
        cache.insert(id, owner.clone());
        owner
    }

    fn read(&self, cgroups: &Cgroups, path: &str) -> Owner {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let owner = read_path(path, |directory| cgroups.is_roots(directory), &users);
        match &owner {
            // A user without a name may have been added since.
            Owner::User(name) if name.bytes().all(|b| b.is_ascii_digit()) => {
                *users = Users::load();
                read_path(path, |directory| cgroups.is_roots(directory), &users)
            }
            _ => owner,
        }
    }
}

#[cfg(test)]
#[path = "attribution_tests.rs"]
mod tests;
