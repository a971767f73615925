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
