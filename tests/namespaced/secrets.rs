//! Secrets stay where they belong: not in a log at its most talkative, not in an argument or a variable of any process, not in a file that others may
//! read, not in a core dump.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use data_encoding::{BASE32_NOPAD, BASE64, BASE64URL_NOPAD, HEXLOWER};
use meshd::api::{KeyRotated, State};
use meshd_ca::recovery::RecoveryKey;
use meshd_ca::store::decode;

use crate::fleet;
use crate::support::eventually;
use crate::support::mesh::{Mesh, SETTLED, Setup};
use crate::support::scenario::{Scenario, scenario};

pub(crate) const SCENARIOS: &[Scenario] = &[scenario!("secrets", are_nowhere_but_where_they_belong)];

/// A secret: what it is called here, and the forms in which it may not be seen, without hyphens and in small letters.
struct Secret {
    name: String,
    forms: Vec<Vec<u8>>,
}

impl Secret {
    /// A word that people copy.
    fn word(name: impl Into<String>, text: &str) -> Self {
        let plain = text.trim().replace('-', "").to_lowercase();
        // The end: what is before it may be public, as in a join token.
        let end = &plain[plain.len() - plain.len().min(28)..];
        Self { name: name.into(), forms: vec![end.as_bytes().to_vec()] }
    }

    /// Bytes, as they are and as programs print them.
    fn bytes(name: impl Into<String>, bytes: &[u8]) -> Self {
        let mut forms = vec![bytes.to_vec(), HEXLOWER.encode(bytes).into_bytes(), BASE32_NOPAD.encode(bytes).into_bytes()];
        // In the middle of something longer it may begin at any of three places of base64.
        for skip in 0..3 {
            let aligned = &bytes[skip..skip + (bytes.len() - skip) / 3 * 3];
            forms.extend([BASE64.encode(aligned).into_bytes(), BASE64URL_NOPAD.encode(aligned).into_bytes()]);
        }
        let list: Vec<String> = bytes.iter().map(u8::to_string).collect();
        forms.push(list.join(", ").into_bytes());
        let raw = forms.remove(0);
        Self { name: name.into(), forms: forms.iter().map(|f| plain(f)).chain([raw]).collect() }
    }

    fn is_in(&self, text: &[u8]) -> bool {
        let plain = plain(text);
        self.forms.iter().any(|form| [text, &plain].iter().any(|t| t.windows(form.len()).any(|w| w == form)))
    }
}

fn plain(text: &[u8]) -> Vec<u8> {
    text.iter().filter(|b| **b != b'-').map(u8::to_ascii_lowercase).collect()
}

/// Every file below `dir`.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => all.extend(files(&entry.path())?),
            kind if kind.is_file() => all.push(entry.path()),
            _ => {}
        }
    }
    Ok(all)
}

/// What is in a file; nothing of one that is gone by now: the daemons write meanwhile.
fn read(path: &Path) -> Result<Vec<u8>> {
    match fs::read(path) {
        Err(gone) if gone.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        read => read.with_context(|| format!("read {}", path.display())),
    }
}

/// What the arguments and variables of all processes were, looked at again and again until it is told to `stop`.
fn watch(stop: &AtomicBool) -> BTreeSet<Vec<u8>> {
    let mut seen = BTreeSet::new();
    while !stop.load(Ordering::SeqCst) {
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            for what in ["cmdline", "environ"] {
                seen.extend(fs::read(process.path().join(what)));
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    seen
}

fn are_nowhere_but_where_they_belong() -> Result<()> {
    let trace = "log_level = \"trace\"\ndrain = \"1s\"";
    let mut mesh = Setup::of(&["a", "b", "c", "d"]).configured(trace).hosts()?;
    let stop = AtomicBool::new(false);
    let (lived, seen) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&stop));
        let lived = live(&mut mesh);
        stop.store(true, Ordering::SeqCst);
        (lived, watcher.join())
    });
    let (secrets, put) = lived?;
    let seen = seen.ok().context("the watcher panicked")?;
    ensure!(seen.iter().any(|words| words.windows(7).any(|w| w == b"approve")), "the watcher has not seen a command");
    for secret in &secrets {
        ensure!(!seen.iter().any(|words| secret.is_in(words)), "{} was an argument or a variable of a process", secret.name);
    }
    let mut logged = 0;
    for path in files(mesh.lab().dir())? {
        let bytes = read(&path)?;
        let holds: Vec<&str> = secrets.iter().filter(|s| s.is_in(&bytes)).map(|s| s.name.as_str()).collect();
        let mode = fs::metadata(&path).map_or(0, |m| m.permissions().mode() & 0o777);
        logged += usize::from(String::from_utf8_lossy(&bytes).contains("TRACE"));
        let kept = put.contains(&path) || path.components().any(|c| c.as_os_str() == "state");
        ensure!(holds.is_empty() || (kept && mode & 0o077 == 0), "{} (mode {mode:o}) has {holds:?}", path.display());
    }
    ensure!(logged >= 4, "the daemons said less than they can");
    for name in ["a", "b", "c", "d"] {
        let limits = fs::read_to_string(format!("/proc/{}/limits", mesh.at(name).pid()?))?;
        let core = limits.lines().find(|l| l.starts_with("Max core file size")).context("no limit of core files")?;
        ensure!(core.split_whitespace().filter(|w| *w == "0").count() == 2, "{name} may leave a core file: {core}");
    }
    Ok(())
}

/// In PKCS#8 the private key of P-256 is these bytes (RFC 5915, as ring writes it).
fn private_half(pkcs8: &[u8]) -> Result<Vec<u8>> {
    Ok(pkcs8.get(36..68).context("too short for a key")?.to_vec())
}

/// Brings a mesh up with every kind of secret. Returns them, and the files that a person put one into.
fn live(mesh: &mut Mesh) -> Result<(Vec<Secret>, Vec<PathBuf>)> {
    let mut secrets = Vec::new();
    // The same file on two cards; a join token in a file; a code that a person types.
    secrets.push(Secret::word("the fleet token", &fleet::give(mesh, &["a", "b"])?));
    for name in ["a", "b"] {
        mesh.at_mut(name).start()?;
        mesh.at(name).until(State::Member)?;
    }
    let token = mesh.at("a").token()?;
    let path = mesh.at("c").dir().join("token.txt");
    fs::write(&path, &token)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    mesh.at_mut("c").start()?;
    mesh.at("c").until_answers()?;
    mesh.at("c").cli(&["join", "--token-file", &path.display().to_string()])?;
    mesh.at("c").until(State::Member)?;
    secrets.push(Secret::word("a join token", &token));
    ensure!(secrets[1].is_in(&fs::read(&path)?), "what is looked for is not found where it is");
    mesh.at_mut("d").start()?;
    mesh.at("d").until(State::Pending)?;
    let code = mesh.at("d").status()?.code.context("no code")?;
    mesh.at("b").cli(&["approve", "--wait", "30s", code.expose()])?;
    mesh.at("d").until(State::Member)?;
    mesh.settled()?;
    mesh.secured_between("a", "c", 8000)?;
    mesh.secured_between("d", "b", 8001)?;
    eventually(SETTLED, "b is heard of", || mesh.at("a").cli(&["authority", "add", "b"]))?;
    eventually(2 * SETTLED, "b has a root", || {
        ensure!(mesh.at("b").dir().join("state/root.key").exists());
        Ok(())
    })?;
    let kept = mesh.at("a").dir().join("recovery.txt");
    mesh.at("a").cli(&["recovery-key", "--file", &kept.display().to_string()])?;
    let recovery: RecoveryKey = fs::read_to_string(&kept)?.trim().parse()?;
    secrets.push(Secret::word("the recovery key", &recovery.to_text()));
    let backup = mesh.at("c").dir().join("c.meshd");
    mesh.at("c").cli(&["backup", "--recovery-key-file", &kept.display().to_string(), &backup.display().to_string()])?;
    // A key that was replaced is one all the same, and on no disk any more.
    let path_of_key = mesh.at("d").dir().join("state/node.key");
    let old = private_half(decode(&fs::read(&path_of_key)?).context("node.key of d is damaged")?.1)?;
    let rotated: KeyRotated = mesh.at("d").json(&["rotate-key", "--yes"])?;
    mesh.at_mut("d").begot(rotated.upgraded.pid)?;
    let old = Secret::bytes("the key that d had", &old);
    for file in files(&mesh.at("d").dir().join("state"))? {
        ensure!(!old.is_in(&read(&file)?), "the old key is in {}", file.display());
    }
    secrets.push(old);
    // The keys that the hosts made themselves.
    for name in ["a", "b", "c", "d"] {
        let state = mesh.at(name).dir().join("state");
        for file in ["node.key", "root.key", "backup/key", "fleet"] {
            let Ok(bytes) = fs::read(state.join(file)) else { continue };
            let (_, content) = decode(&bytes).with_context(|| format!("{file} of {name} is damaged"))?;
            let key = match file {
                "fleet" => {
                    let saved: serde_json::Value = serde_json::from_slice(content)?;
                    BASE64URL_NOPAD.decode(saved["key"].as_str().context("no key")?.as_bytes())?
                }
                // Behind the node that it is of.
                "backup/key" => content[content.len().saturating_sub(32)..].to_vec(),
                _ => private_half(content)?,
            };
            let secret = Secret::bytes(format!("{file} of {name}"), &key);
            ensure!(secret.is_in(&bytes), "what is looked for is not found where it is");
            secrets.push(secret);
        }
    }
    mesh.at("a").cli(&["banish", "--recovery-key-file", &kept.display().to_string(), "--yes", "b"])?;
    ensure!(secrets.len() > 3 + 4 + 2 + 2, "there are only {} secrets", secrets.len());
    Ok((secrets, vec![path, kept]))
}
