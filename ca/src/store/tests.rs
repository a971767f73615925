use super::*;

fn open() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

fn load(store: &Store, name: &str) -> Option<(Vec<u8>, bool)> {
    store.load(name).unwrap().map(|l| (l.bytes.to_vec(), l.fallback))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// The files of a directory, without the lock.
fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|n| n != LOCK);
    names.sort();
    names
}

#[test]
fn what_was_saved_last_is_loaded() {
    let (dir, store) = open();
    assert_eq!(load(&store, "roster"), None);
    for content in [&b"one"[..], b"two", b"", &[7; 100_000]] {
        store.save("roster", content).unwrap();
        assert_eq!(load(&store, "roster"), Some((content.to_vec(), false)));
    }
    assert_eq!(files(dir.path()), ["roster", "roster.other"]);
    for name in ["roster", "roster.other", LOCK] {
        assert_eq!(mode(&dir.path().join(name)), 0o600, "{name}");
    }
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(load(&store, "roster"), Some((vec![7; 100_000], false)));
    store.remove("roster").unwrap();
    store.remove("roster").unwrap();
    assert_eq!((load(&store, "roster"), files(dir.path())), (None, vec![]));
}

#[test]
fn one_process_owns_a_directory() {
    let (dir, store) = open();
    assert!(matches!(Store::open(dir.path()), Err(StoreError::Busy(_))));
    drop(store);
    assert!(Store::open(dir.path()).is_ok());
}

#[test]
fn a_lock_passes_from_one_to_the_next_and_never_to_two() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let before = Store::open(dir.path()).unwrap();
    before.save("roster", b"one").unwrap();
    let looking = Store::look_at(dir.path());
    assert_eq!(*looking.load("roster").unwrap().unwrap().bytes, b"one");
    assert!(matches!(looking.save("roster", b"x"), Err(StoreError::HandedOver(_))));
    let lock = before.hand_over().unwrap();
    assert!(before.hand_over().is_none());
    assert!(matches!(before.save("roster", b"x"), Err(StoreError::HandedOver(_))));
    assert!(matches!(before.remove("roster"), Err(StoreError::HandedOver(_))));
    assert!(matches!(Store::open(dir.path()), Err(StoreError::Busy(_))), "free while it is passed on");
    // The lock of another directory is none.
    let foreign = Store::open(other.path()).unwrap();
    assert!(matches!(Store::go_on(dir.path(), foreign.hand_over().unwrap()), Err(StoreError::Busy(_))));
    let copy = lock.try_clone().unwrap();
    let after = Store::go_on(dir.path(), lock).unwrap();
    after.save("roster", b"two").unwrap();
    assert_eq!(*before.load("roster").unwrap().unwrap().bytes, b"two");
    // Taken back, it is as before.
    drop(after);
    before.take_back(copy);
    before.save("roster", b"three").unwrap();
    assert!(matches!(Store::open(dir.path()), Err(StoreError::Busy(_))));
    drop(before);
    assert!(Store::open(dir.path()).is_ok());
}

#[test]
fn a_directory_is_made_for_its_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b");
    let store = Store::open(&path).unwrap();
    assert!(mode(&path) == 0o700 && !store.narrowed());
    drop(store);
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    let store = Store::open(&path).unwrap();
    assert!(mode(&path) == 0o700 && store.narrowed());
    // Somebody's directory is left alone, as it is.
    let other = dir.path().join("etc");
    fs::create_dir(&other).unwrap();
    fs::set_permissions(&other, Permissions::from_mode(0o755)).unwrap();
    fs::write(other.join("passwd.new"), b"x").unwrap();
    assert!(matches!(Store::open(&other), Err(StoreError::Foreign(_))));
    assert_eq!((mode(&other), files(&other)), (0o755, vec!["passwd.new".to_string()]));
}

#[test]
fn a_file_others_could_read_is_mended_and_said_so() {
    let (dir, store) = open();
    store.save("key", b"secret").unwrap();
    assert!(!store.load("key").unwrap().unwrap().exposed);
    for bits in [0o640, 0o604, 0o622] {
        fs::set_permissions(dir.path().join("key"), Permissions::from_mode(bits)).unwrap();
        assert!(store.load("key").unwrap().unwrap().exposed);
        assert_eq!(mode(&dir.path().join("key")), 0o600);
        assert!(!store.load("key").unwrap().unwrap().exposed);
    }
}

#[test]
fn names_stay_inside_the_directory() {
    let (_dir, store) = open();
    let long = "a".repeat(65);
    for bad in ["", ".", "..", "../x", "a/b", "a.b.c", "A", "lock", "a.other", "a.new", ".a", "a.", "a b", "ä", &long] {
        assert!(matches!(store.load(bad), Err(StoreError::Name)), "{bad}");
        assert!(matches!(store.save(bad, b"x"), Err(StoreError::Name)), "{bad}");
        assert!(matches!(store.remove(bad), Err(StoreError::Name)), "{bad}");
    }
    for good in ["a", "node-key", "root.crt", &long[1..]] {
        assert!(store.save(good, b"x").is_ok(), "{good}");
    }
}

#[test]
fn a_file_torn_at_any_byte_falls_back() {
    let (dir, store) = open();
    store.save("roster", b"old").unwrap();
    store.save("roster", b"new").unwrap();
    let path = dir.path().join("roster.other");
    let whole = fs::read(&path).unwrap();
    for n in 0..whole.len() {
        fs::write(&path, &whole[..n]).unwrap();
        assert_eq!(load(&store, "roster"), Some((b"old".to_vec(), true)), "{n} bytes");
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    assert_eq!(load(&store, "roster"), Some((b"old".to_vec(), true)), "longer than written");
    // Of the second generation nothing is left to tell that there was one; of later ones there is.
    fs::write(&path, &whole).unwrap();
    store.save("roster", b"newer").unwrap();
    fs::remove_file(dir.path().join("roster")).unwrap();
    assert_eq!(load(&store, "roster"), Some((b"new".to_vec(), true)));
}

#[test]
fn every_flipped_bit_is_noticed_in_either_generation() {
    let (dir, store) = open();
    store.save("roster", b"old").unwrap();
    store.save("roster", b"new").unwrap();
    for (name, want, newest) in [("roster.other", b"old", true), ("roster", b"new", false)] {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut garbled = whole.clone();
            garbled[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, garbled).unwrap();
            let (bytes, fallback) = load(&store, "roster").unwrap();
            assert_eq!(bytes, want, "{name}, bit {bit}");
            // A damaged one is taken at its word about which it was, where that can be read.
            assert!(fallback == newest || (64..128).contains(&bit) || bit < 64 && fallback, "{name}, bit {bit}");
        }
        fs::write(&path, whole).unwrap();
    }
}

#[test]
fn damaged_is_not_the_same_as_absent() {
    let (dir, store) = open();
    fs::write(dir.path().join("key"), b"").unwrap();
    assert!(matches!(store.load("key"), Err(StoreError::Damaged(_))));
    fs::rename(dir.path().join("key"), dir.path().join("key.other")).unwrap();
    assert!(matches!(store.load("key"), Err(StoreError::Damaged(_))));
    store.save("key", b"again").unwrap();
    assert_eq!(load(&store, "key"), Some((b"again".to_vec(), true)), "what was in the other may have been newer");
    store.save("key", b"and again").unwrap();
    assert_eq!(load(&store, "key"), Some((b"and again".to_vec(), false)));
    fs::create_dir(dir.path().join("dir")).unwrap();
    assert!(matches!(store.load("dir"), Err(StoreError::NotFile { .. })), "what cannot be read is not absent either");
}

/// Each would otherwise be followed, waited for without end, or made another mode of.
#[test]
fn what_is_no_file_is_refused_by_name_and_left_alone() {
    let (dir, store) = open();
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("shadow");
    fs::write(&target, b"secret").unwrap();
    fs::set_permissions(&target, Permissions::from_mode(0o644)).unwrap();
    let path = dir.path().join("key");
    type Make<'a> = (&'a str, &'a dyn Fn(&Path));
    let make: [Make<'_>; 3] = [
        ("a symbolic link", &|p| std::os::unix::fs::symlink(&target, p).unwrap()),
        ("a pipe", &|p| assert!(std::process::Command::new("mkfifo").arg(p).status().unwrap().success())),
        ("a directory", &|p| fs::create_dir(p).unwrap()),
    ];
    for (what, make) in make {
        make(&path);
        let error = store.load("key").unwrap_err().to_string();
        assert!(error.contains(what) && error.contains(path.to_str().unwrap()), "{error}");
        assert_eq!(mode(&target), 0o644, "{what}: the mode of something else was changed");
        fs::rename(&path, dir.path().join("key.other")).unwrap();
        assert!(matches!(store.load("key"), Err(StoreError::NotFile { .. })), "{what} as the other generation");
        // A good one is of use all the same.
        fs::write(&path, encode(1, b"x")).unwrap();
        assert_eq!(load(&store, "key"), Some((b"x".to_vec(), true)));
        fs::remove_file(&path).unwrap();
        let other = dir.path().join("key.other");
        fs::remove_file(&other).or_else(|_| fs::remove_dir(&other)).unwrap();
    }
    drop(store);
    for name in ["lock", "key.new"] {
        let path = dir.path().join(name);
        let _ = fs::remove_file(&path);
        fs::create_dir(&path).unwrap();
        let error = Store::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        fs::remove_dir(&path).unwrap();
    }
}

#[test]
fn garbage_of_any_size_is_not_read() {
    let (dir, store) = open();
    let path = dir.path().join("roster");
    for length in [1, HEADER as u64 - 1, HEADER as u64 + 1, MAX_FILE as u64, 1 << 40] {
        let file = fs::File::create(&path).unwrap();
        file.set_len(length).unwrap();
        assert!(matches!(store.load("roster"), Err(StoreError::Damaged(p)) if p == path), "{length}");
    }
    // Nor one that promises more than there is.
    let mut short = encode(1, b"whole");
    short[16..24].copy_from_slice(&(1u64 << 62).to_be_bytes());
    fs::write(&path, short).unwrap();
    assert!(matches!(store.load("roster"), Err(StoreError::Damaged(_))));
}

#[test]
fn a_damaged_file_does_not_push_out_the_good_one() {
    for damaged in ["roster", "roster.other"] {
        let (dir, store) = open();
        store.save("roster", b"one").unwrap();
        store.save("roster", b"two").unwrap();
        let good = if damaged == "roster" { b"two" } else { b"one" };
        fs::write(dir.path().join(damaged), b"torn").unwrap();
        store.save("roster", b"three").unwrap();
        assert_eq!(load(&store, "roster"), Some((b"three".to_vec(), false)));
        fs::write(dir.path().join(damaged), b"torn").unwrap();
        assert_eq!(load(&store, "roster"), Some((good.to_vec(), true)), "{damaged}");
    }
}

#[test]
fn the_higher_generation_wins_under_whatever_name() {
    let (dir, store) = open();
    for names in [["roster", "roster.other"], ["roster.other", "roster"]] {
        fs::write(dir.path().join(names[0]), encode(4, b"old")).unwrap();
        fs::write(dir.path().join(names[1]), encode(5, b"new")).unwrap();
        assert_eq!(load(&store, "roster"), Some((b"new".to_vec(), false)));
        store.save("roster", b"newest").unwrap();
        assert_eq!(load(&store, "roster"), Some((b"newest".to_vec(), false)));
        assert_eq!(load_number(&dir.path().join(names[0])), 6, "the older one is replaced");
        assert_eq!(load_number(&dir.path().join(names[1])), 5);
    }
    // A number that leaves room for no other is none.
    fs::write(dir.path().join("roster"), encode(u64::MAX, b"end")).unwrap();
    store.save("roster", b"after the end").unwrap();
    assert_eq!(load(&store, "roster"), Some((b"after the end".to_vec(), false)));
}

fn load_number(path: &Path) -> u64 {
    decode(&fs::read(path).unwrap()).unwrap().0
}

#[test]
fn a_left_over_of_this_process_is_no_obstacle() {
    let (dir, store) = open();
    fs::write(dir.path().join("roster.new"), b"from a write that failed").unwrap();
    store.save("roster", b"x").unwrap();
    assert_eq!(load(&store, "roster"), Some((b"x".to_vec(), false)));
}

#[test]
fn files_are_bounded() {
    let (dir, store) = open();
    assert!(matches!(store.save("roster", &vec![0; MAX_FILE + 1]), Err(StoreError::TooLong)));
    let long = File::create(dir.path().join("roster")).unwrap();
    long.set_len(1 << 40).unwrap();
    assert!(matches!(store.load("roster"), Err(StoreError::Damaged(_))));
}

#[test]
fn a_failed_write_leaves_the_old_content() {
    let (dir, store) = open();
    store.save("roster", b"old").unwrap();
    fs::create_dir(dir.path().join("roster.new")).unwrap(); // nothing can be written there
    assert!(matches!(store.save("roster", b"new"), Err(StoreError::Io { .. })));
    assert_eq!(load(&store, "roster"), Some((b"old".to_vec(), false)));
}

proptest::proptest! {
    #[test]
    fn decoding_never_panics_and_inverts_encoding(junk in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), number in 1..u64::MAX) {
        let _ = decode(&junk);
        let file = encode(number, &junk);
        proptest::prop_assert_eq!(decode(&file), Some((number, &junk[..])));
    }
}
