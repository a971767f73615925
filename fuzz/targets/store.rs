//! State files: a changed one is never taken for what was written, and saved SVIDs bring in nothing of another node or mesh.
#![no_main]

use std::sync::{Arc, LazyLock};

use arc_swap::ArcSwap;
use libfuzzer_sys::fuzz_target;
use meshd::identity::provider;
use meshd::identity::svids::{MAX_WORKLOADS, Patience, Svids};
use meshd::identity::verifier::{SvidVerifier, Trust};
use meshd_ca::identity::Workload;
use meshd_ca::store::{self, Store, StoreError};
use meshd_fuzz::{Input, NOW, WORLD, within};
use tempfile::TempDir;

const CONTENT: &[u8] = b"what was written last";

static DIR: LazyLock<(TempDir, Store, Vec<u8>)> = LazyLock::new(|| {
    let memory = std::path::Path::new("/dev/shm");
    let dir = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }.expect("a directory");
    let store = Store::open(dir.path()).expect("a store");
    store.save("file", CONTENT).expect("saves");
    let file = std::fs::read(dir.path().join("file")).expect("a file");
    (dir, store, file)
});
static VERIFIER: LazyLock<Arc<SvidVerifier>> = LazyLock::new(|| {
    let trust = Arc::new(ArcSwap::from_pointee(Trust::from(WORLD.roster())));
    Arc::new(SvidVerifier::new(trust, Arc::new(|| NOW), provider::provider(true)))
});

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (dir, store, honest) = &*DIR;
    match input.byte() % 3 {
        0 => {
            let file = input.edit(honest);
            assert_eq!(store::decode(&file).is_some(), file == *honest, "a changed file is taken");
            std::fs::write(dir.path().join("file"), &file).expect("writes");
            match within(8192 + 4 * file.len(), || store.load("file")) {
                Ok(Some(loaded)) => assert!(file == *honest && *loaded.bytes == CONTENT && !loaded.fallback),
                Ok(None) => panic!("a file that is there is not seen"),
                Err(StoreError::Damaged(path)) => assert!(file != *honest && path == dir.path().join("file")),
                Err(other) => panic!("{other}"),
            }
        }
        1 => {
            if let Some((_, content)) = store::decode(input.0) {
                assert!(content.len() < input.0.len());
            }
        }
        _ => {
            let bytes = WORLD.named(input.0);
            let svids = Svids::new(WORLD.node(0), VERIFIER.clone(), Patience::default());
            let Ok(taken) = within(1 << 20 | 64 * bytes.len(), || svids.import(&bytes)) else { return };
            let held = svids.held();
            assert!(taken <= MAX_WORKLOADS && held.len() <= taken);
            for held in held {
                assert_eq!(held.leaf.id.trust_domain, *WORLD.roster.trust_domain());
                assert!(held.leaf.not_after > NOW);
                assert!(!matches!(held.leaf.id.workload, Workload::Node(n) if n != WORLD.node(0)));
            }
        }
    }
});
