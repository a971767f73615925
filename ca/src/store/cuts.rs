//! The store when the plug is pulled between any two system calls, the process is killed, or one call fails (`power.rs`).

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::power::{Acts, Recorder, Tear};
use super::*;

/// What is done with a store.
#[derive(Debug, Clone)]
enum Do {
    Save(&'static str, Vec<u8>),
    Remove(&'static str),
    /// A stop and a start.
    Reopen,
    /// The disk loses what is in a place of a file.
    Garble(&'static str),
}

/// What was done, and when: the content of a file is this one from an act on, or was on the way to be since another.
struct Step {
    begun: usize,
    done: usize,
    name: &'static str,
    content: Option<Vec<u8>>,
}

const NAMES: [&str; 2] = ["roster", "tokens"];

/// Lives through all of it on a new disk.
fn live(what: &[Do]) -> (Acts, Vec<Step>) {
    let dir = tempfile::tempdir().unwrap();
    let (root, state) = (dir.path(), dir.path().join("a/state"));
    let recorder = Recorder::new(root, &[]);
    let count = || recorder.acts().0.len();
    let mut store = Some(Store::open_on(&state, Box::new(recorder.clone())).unwrap());
    let mut steps = Vec::new();
    for what in what {
        let (begun, open) = (count(), store.as_ref().unwrap());
        let (name, content) = match what {
            Do::Save(name, bytes) => {
                open.save(name, bytes).unwrap();
                (*name, Some(bytes.clone()))
            }
            Do::Remove(name) => {
                open.remove(name).unwrap();
                (*name, None)
            }
            Do::Reopen => {
                drop(store.take());
                store = Some(Store::open_on(&state, Box::new(recorder.clone())).unwrap());
                continue;
            }
            Do::Garble(place) => {
                let path = state.join(place);
                recorder.remove(&path).unwrap();
                let mut file = recorder.create(&path).unwrap();
                recorder.write(&mut file, &path, b"garbage").unwrap();
                recorder.sync_file(&file, &path).unwrap();
                recorder.sync_dir(&state).unwrap();
                let name = place.split('.').next().unwrap();
                let name = NAMES.into_iter().find(|n| *n == name).unwrap();
                let left = open.load(name).unwrap().map(|l| l.bytes.to_vec());
                // Whoever reads it then acts on what is left.
                (name, left)
            }
        };
        steps.push(Step { begun, done: count(), name, content });
    }
    (recorder.acts(), steps)
}

/// What may be the content of a file after so many acts.
fn allowed(steps: &[Step], name: &str, done: usize) -> BTreeSet<Option<Vec<u8>>> {
    let mut allowed = BTreeSet::from([None]);
    for step in steps.iter().filter(|s| s.name == name && s.begun < done) {
        if step.done <= done {
            allowed.clear();
        }
        allowed.insert(step.content.clone());
    }
    allowed
}

/// A store whose own flushes cost nothing.
fn open(state: &Path) -> Store {
    Recorder::new(state, &[]).open(state)
}

fn contents(state: &Path) -> [Option<Vec<u8>>; 2] {
    let store = open(state);
    NAMES.map(|name| store.load(name).unwrap_or_else(|e| panic!("{name}: {e}")).map(|l| l.bytes.to_vec()))
}

/// Pulls the plug at every act; and kills the process there, lets the next one read, and pulls the plug then. Returns how many different ruins there were.
fn survives(what: &[Do], tear: Tear) -> usize {
    let (acts, steps) = live(what);
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("a/state");
    let mut ruins = 0;
    for done in 0..=acts.0.len() {
        for ruin in acts.ruins(done, tear) {
            ruins += 1;
            ruin.lay(dir.path());
            let found = contents(&state);
            for (name, found) in NAMES.into_iter().zip(&found) {
                let allowed = allowed(&steps, name, done);
                assert!(
                    allowed.contains(found),
                    "{name} is {found:?}, not of {allowed:?}\nafter {:?}\nfrom {ruin:?}",
                    &acts.0[..done]
                );
            }
            assert!(!fs::read_dir(&state).unwrap().any(|e| e.unwrap().path().to_str().unwrap().ends_with(TEMPORARY)));
            // It goes on from there.
            let store = open(&state);
            store.save("roster", b"next").unwrap();
            assert_eq!(store.load("roster").unwrap().map(|l| l.bytes.to_vec()), Some(b"next".to_vec()));
        }
        acts.running(done).lay(dir.path());
        let again = Recorder::new(dir.path(), &acts.0[..done]);
        let store = Store::open_on(&state, Box::new(again.clone())).unwrap();
        let read = NAMES.map(|name| store.load(name).unwrap().map(|l| l.bytes.to_vec()));
        drop(store);
        let all = again.acts();
        for ruin in all.ruins(all.0.len(), tear) {
            ruin.lay(dir.path());
            assert_eq!(contents(&state), read, "what was read after {:?} is gone", &acts.0[..done]);
        }
        acts.running(done).lay(dir.path());
        let again = Recorder::new(dir.path(), &acts.0[..done]);
        Store::open_on(&state, Box::new(again.clone())).unwrap().save("roster", b"again").unwrap();
        let all = again.acts();
        for ruin in all.ruins(all.0.len(), tear) {
            ruin.lay(dir.path());
            assert_eq!(contents(&state)[0], Some(b"again".to_vec()), "what was written after {:?} is gone", &acts.0[..done]);
        }
    }
    ruins
}

fn save(bytes: &[u8]) -> Do {
    Do::Save("roster", bytes.to_vec())
}

#[test]
fn a_power_cut_at_any_act_leaves_the_old_or_the_new() {
    let lives: [&[Do]; 5] = [
        &[save(b"one"), save(b"two"), save(b"three"), save(b"four")],
        &[save(b"one"), Do::Remove("roster"), save(b"two"), save(b"three"), Do::Remove("roster"), Do::Remove("roster")],
        &[save(b"one"), Do::Save("tokens", b"t".to_vec()), Do::Reopen, save(b"two"), Do::Remove("tokens")],
        &[save(b"one"), save(b"two"), Do::Garble("roster"), save(b"three"), save(b"four")],
        &[save(b"one"), save(b"two"), Do::Garble("roster.other"), Do::Reopen, save(b"three"), Do::Remove("roster")],
    ];
    let ruins: usize = lives.iter().map(|life| survives(life, Tear::Everywhere)).sum();
    assert!(ruins > 2000, "only {ruins} ruins were tried");
}

/// A disk that is full at one call: the old or the new is there, what failed was said to have failed, and the next attempt is as good as any.
#[test]
fn a_call_that_fails_is_an_error_and_leaves_the_old_or_the_new() {
    for calls in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let recorder = Recorder::new(dir.path(), &[]);
        let store = Store::open_on(&state, Box::new(recorder.clone())).unwrap();
        store.save("roster", b"one").unwrap();
        store.save("roster", b"two").unwrap();
        recorder.fail_after(calls);
        let saved = store.save("roster", b"three");
        if !recorder.failed() {
            assert!(calls >= 5 && saved.is_ok(), "{calls}");
            break;
        }
        assert!(saved.is_err() && store.noticed().unwritten.is_some(), "call {calls} failed and nobody said so");
        let left = store.load("roster").unwrap().unwrap();
        assert!(matches!(&left.bytes[..], b"two" | b"three") && !left.fallback, "call {calls}");
        store.save("roster", b"four").unwrap();
        let acts = recorder.acts();
        for ruin in acts.ruins(acts.0.len(), Tear::Everywhere) {
            ruin.lay(dir.path());
            assert_eq!(contents(&state)[0], Some(b"four".to_vec()), "call {calls}");
        }
    }
}

fn doing() -> impl Strategy<Value = Do> {
    let name = prop_oneof![Just("roster"), Just("tokens")];
    prop_oneof![
        4 => (name.clone(), prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(name, bytes)| Do::Save(name, bytes)),
        1 => name.prop_map(Do::Remove),
        1 => Just(Do::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn no_life_can_be_cut_so_that_something_is_lost(life in prop::collection::vec(doing(), 1..8)) {
        survives(&life, Tear::Here);
    }
}
