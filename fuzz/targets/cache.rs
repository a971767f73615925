//! The cache database with any damage to its files: it opens or is made anew, holds nothing that was not put there, and works.
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use meshd_agent::cache::{Cache, CacheError, MAX_NODES};
use meshd_ca::identity::NodeId;
use meshd_fuzz::Input;
use tempfile::TempDir;

fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }.expect("a directory")
}

/// The files of a database with forty records, relative to its directory.
static HONEST: LazyLock<Vec<(PathBuf, Vec<u8>)>> = LazyLock::new(|| {
    let dir = scratch();
    let cache = Cache::open(dir.path()).expect("a cache");
    for n in 0..40 {
        cache.put_record(NodeId::from_bytes([n; 16]), &vec![n; 700]).expect("room");
        cache.put_addresses(NodeId::from_bytes([n; 16]), &[([10, 0, 0, n], 6374).into()]).expect("room");
    }
    cache.flush().expect("a disk");
    drop(cache);
    let files = fs::read_dir(dir.path().join("cache")).expect("a directory").map(|f| f.expect("a file").path());
    files.filter(|p| p.is_file()).map(|p| (p.file_name().expect("a name").into(), fs::read(&p).expect("bytes"))).collect()
});

fuzz_target!(
    init: {
        // sled panics on some damage, on a thread of its own; that is what is caught, and what a fuzzer would abort at.
        std::panic::set_hook(Box::new(|panic| {
            if std::thread::current().name() != Some("cache") {
                eprintln!("{panic}");
            }
        }));
        let _ = HONEST.len();
    },
    |data: &[u8]| {
        let mut input = Input(data);
        let dir = scratch();
        fs::create_dir(dir.path().join("cache")).expect("a directory");
        for (name, bytes) in HONEST.iter() {
            fs::write(dir.path().join("cache").join(name), input.edit(bytes)).expect("writes");
        }
        let cache = match Cache::open(dir.path()) {
            Ok(cache) => cache,
            // Another process has it or the disk is full: neither is so.
            Err(CacheError::Unusable { reason, .. } | CacheError::Broken(reason)) => panic!("{reason}"),
        };
        let records = cache.records();
        assert!(records.len() <= MAX_NODES && cache.addresses().len() <= MAX_NODES);
        for (node, bytes) in records {
            assert_eq!(bytes, vec![node.as_bytes()[0]; 700], "damage became a record");
        }
        let new = NodeId::from_bytes([0xee; 16]);
        assert!(cache.put_record(new, b"new").expect("works"));
        cache.flush().expect("works");
        assert!(cache.records().contains(&(new, b"new".to_vec())));
    }
);
