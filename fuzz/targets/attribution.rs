//! Control group paths and the user database: nobody but root decides what a workload is called.
#![no_main]

use libfuzzer_sys::fuzz_target;
use meshd::intercept::Owner;
use meshd::intercept::attribution::{Users, read_path};
use meshd_fuzz::{Input, within};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let depth = usize::from(input.byte());
    let Ok(path) = std::str::from_utf8(input.piece()) else { return };
    let users = Users::parse(&String::from_utf8_lossy(input.0));
    // Directories down to this depth are root's.
    let is_roots = |directory: &str| directory.split('/').filter(|n| !n.is_empty()).count() < depth;
    let read = |path: &str| within(8192 + 16 * path.len(), || read_path(path, is_roots, &users));
    let owner = read(path);
    let names: Vec<&str> = path.split('/').filter(|n| !n.is_empty()).collect();
    if depth == 0 {
        assert_eq!(owner, Owner::Host, "a root that is not root's names somebody");
    }
    if names.first() == Some(&"user.slice") && depth > 0 {
        assert!(matches!(owner, Owner::User(_)), "{owner:?} out of a user's slice");
    }
    if let Owner::Unit(name) | Owner::Container(name) | Owner::User(name) | Owner::Pod(name) = &owner {
        assert!(!name.is_empty() && name.len() <= 255 && !name.contains('/'));
    }
    // What is below a place where others may write changes nothing.
    if names.len() > depth {
        let cut = names[..depth].join("/");
        assert_eq!(read(&cut), owner, "names that anybody can make were read");
        assert_eq!(read(&format!("{path}/nginx.service")), owner);
    }
    // Once a unit has its name, nothing below renames it.
    if matches!(owner, Owner::Unit(_) | Owner::Container(_) | Owner::Pod(_) | Owner::User(_)) {
        assert_eq!(read(&format!("{path}/docker-0123456789ab.scope")), owner);
    }
});
