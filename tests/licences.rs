//! Every package that is built in has a licence that `deny.toml` allows and comes from crates.io.
//!
//! Owns a small reader of SPDX expressions (`AND`, `OR`, `/`, parentheses; SPDX 2.3 annex D); the list itself is `deny.toml`'s. So
//! the rule holds on every machine that runs the tests, with or without cargo-deny. Fails when a new dependency breaks it.

// Helpers of tests are tests, but clippy's exception sees functions with #[test] only.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::process::Command;

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

fn allowed() -> BTreeSet<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/deny.toml")).unwrap();
    let deny: toml::Value = toml::from_str(&text).unwrap();
    deny["licenses"]["allow"].as_array().unwrap().iter().map(|l| l.as_str().unwrap().to_owned()).collect()
}

/// Whether the licence expression can be met with licences of `allowed` alone. Anything unreadable is not.
fn permitted(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    either(&words, &mut at, allowed).unwrap_or(false) && at == words.len()
}

fn either(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> Option<bool> {
    let mut met = both(words, at, allowed)?;
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= both(words, at, allowed)?;
    }
    Some(met)
}

fn both(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> Option<bool> {
    let mut met = one(words, at, allowed)?;
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed)?;
    }
    Some(met)
}

fn one(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> Option<bool> {
    let word = *words.get(*at)?;
    *at += 1;
    if word == "(" {
        let met = either(words, at, allowed)?;
        (words.get(*at) == Some(&")")).then_some(())?;
        *at += 1;
        return Some(met);
    }
    if words.get(*at) == Some(&"WITH") {
        let exception = words.get(*at + 1)?;
        *at += 2;
        return Some(allowed.contains(&format!("{word} WITH {exception}")));
    }
    Some(allowed.contains(word))
}

#[test]
fn expressions_are_read_as_spdx_says() {
    let some: BTreeSet<String> = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(String::from).into();
    for good in
        ["MIT", "GPL-3.0 OR MIT", "GPL-3.0/MIT", "MIT AND ISC", "(MIT OR X) AND ISC", "Apache-2.0 WITH LLVM-exception OR X"]
    {
        assert!(permitted(good, &some), "{good}");
    }
    for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND GPL-3.0", "Apache-2.0 OR X", "(MIT", "MIT ISC", "OR MIT"] {
        assert!(!permitted(bad, &some), "{bad}");
    }
}

#[test]
fn every_dependency_may_be_built_in() {
    let out = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--manifest-path",
            concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"),
        ])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let allowed = allowed();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50, "cargo metadata lists only {} packages", packages.len());
    let wrong: Vec<String> = packages
        .iter()
        .filter(|p| {
            let source = p["source"].as_str();
            !permitted(p["license"].as_str().unwrap_or(""), &allowed) || source.is_some_and(|s| s != CRATES_IO)
        })
        .map(|p| format!("{} {}: licence {}, source {}", p["name"], p["version"], p["license"], p["source"]))
        .collect();
    assert!(wrong.is_empty(), "deny.toml does not allow:\n{}", wrong.join("\n"));
}
