//! What is shipped around the program: the builds for other architectures say the same everywhere.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

fn read(path: &str) -> String {
    std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[test]
fn cross_builds_what_the_script_builds() {
    let cross: toml::Table = read("Cross.toml").parse().unwrap();
    let targets: BTreeSet<&str> = cross["target"].as_table().unwrap().keys().map(String::as_str).collect();
    let wanted = ["x86_64-unknown-linux-musl", "aarch64-unknown-linux-musl", "armv7-unknown-linux-musleabihf"];
    assert_eq!(targets, BTreeSet::from(wanted));
    assert_eq!(cross["build"]["env"]["passthrough"][0].as_str(), Some("SOURCE_DATE_EPOCH"));
    // Two of them share a line in the script.
    let script = read("scripts/build-static");
    for part in ["x86_64 | aarch64", "$1-unknown-linux-musl", "armv7-unknown-linux-musleabihf"] {
        assert!(script.contains(part), "the script does not build {part}");
    }
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    assert!(manifest["profile"].get("dist").is_some() && script.contains("profile=dist"), "no profile for what is shipped");
    // Settings here would also count inside the containers of cross, where the compilers have other names.
    assert!(!std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(".cargo").exists(), ".cargo/config.toml collides with cross");
}

/// A file that is no part of anything looks like tests, and none of it is ever run.
#[test]
fn every_source_file_is_part_of_something() {
    fn sources(dir: &std::path::Path, all: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, all);
            } else if path.extension().is_some_and(|e| e == "rs") {
                all.push(path);
            }
        }
    }
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = Vec::new();
    ["src", "ca/src", "agent/src", "tests", "agent/tests"].iter().for_each(|dir| sources(&root.join(dir), &mut all));
    let text: String = all.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let alone: Vec<_> = all
        .iter()
        .filter(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap();
            // Those that cargo finds, and those that have the name of their directory.
            let top = ["tests", "agent/tests"].iter().any(|dir| path.parent() == Some(&root.join(dir)));
            let known = [format!("mod {name};"), format!("{name}.rs\"]")];
            !top && !["main", "lib", "mod"].contains(&name) && !known.iter().any(|k| text.contains(k))
        })
        .collect();
    assert!(all.len() > 200 && alone.is_empty(), "{alone:?} of {}", all.len());
}
