//! The built `meshd` as a person or a script uses it, against a stand-in for the daemon on a Unix socket: what is printed, where, and
//! the exit code. Needs no privileges and no network.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "cli/daemon.rs"]
mod daemon;
#[path = "cli/golden.rs"]
mod golden;

use meshd_ca::identity::{HostName, MeshId, TrustDomain};
use meshd_ca::issue::Issuer;
use meshd_ca::keys::PrivateKey;
use meshd_ca::recovery::{Recovery, RecoveryKey};
use meshd_ca::roster::Roster;
use meshd_ca::time::UnixTime;
use std::path::Path;

use daemon::{Daemon, HOSTILE, Ran, command, run};
use meshd::api::{Joined, code};

fn text(ran: &Ran) -> &str {
    &ran.out
}

#[test]
fn status_in_text_and_json() {
    let daemon = Daemon::start();
    let ran = daemon.run(&["status"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(text(&ran), golden::STATUS);
    let ran = daemon.run(&["status", "-o", "json"]);
    assert_eq!((ran.code, text(&ran)), (0, golden::STATUS_JSON));
}

#[test]
fn status_shows_the_processes_of_before_an_upgrade() {
    let daemon = Daemon::start();
    daemon.edit("/v1/status", |status| status["older"] = serde_json::json!([{"pid": 4100, "connections": 3}]));
    let ran = daemon.run(&["status"]);
    assert!(ran.out.ends_with("older         process 4100 of before an upgrade still has 3 connections\n"), "{ran:?}");
}

#[test]
fn status_is_a_failure_until_the_host_is_a_member() {
    let daemon = Daemon::start();
    daemon.edit("/v1/status", |status| {
        status["state"] = "pending".into();
        status["reason"] = "a mesh is in sight and there is no token for it".into();
    });
    let ran = daemon.run(&["status"]);
    assert_eq!(ran.code, 1);
    assert!(ran.out.starts_with("state         pending: a mesh is in sight and there is no token for it\n"), "{ran:?}");
    assert_eq!(daemon.run(&["status", "-o", "json"]).code, 1);
}

#[test]
fn nodes_services_edges_identity() {
    let daemon = Daemon::start();
    for (verb, expected) in
        [("nodes", golden::NODES), ("services", golden::SERVICES), ("edges", golden::EDGES), ("identity", golden::IDENTITY)]
    {
        let ran = daemon.run(&[verb]);
        assert_eq!((ran.code, text(&ran), ran.err.as_str()), (0, expected, ""), "{verb}");
        // JSON: an array of objects, and every field the daemon sent.
        let ran = daemon.run(&[verb, "--output", "json"]);
        let shown: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(shown, daemon.answer(&format!("/v1/{verb}")), "{verb}");
        assert!(shown.as_array().unwrap().iter().all(serde_json::Value::is_object));
    }
    let ran = daemon.run(&["edges", "--insecure", "-o", "json"]);
    assert_eq!(serde_json::from_str::<Vec<serde_json::Value>>(&ran.out).unwrap().len(), 1);
}

#[test]
fn stat_adds_up_and_looks_twice() {
    let daemon = Daemon::start();
    let ran = daemon.run(&["stat", "--window", "100ms"]);
    assert_eq!((ran.code, text(&ran), ran.err.as_str()), (0, golden::STAT, ""));
    assert_eq!(daemon.asked().iter().filter(|(_, path, _)| path == "/v1/edges").count(), 2);
    let ran = daemon.run(&["stat", "--window", "100ms", "-o", "json"]);
    let rows: Vec<serde_json::Value> = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((rows.len(), &rows[0]["p95_ms"], &rows[1]["success_rate"]), (2, &60_000.into(), &0.0.into()));
    assert_eq!(daemon.run(&["stat", "--window", "1d"]).code, 2);
}

#[test]
fn the_log_level_is_shown_and_changed() {
    let daemon = Daemon::start();
    let ran = daemon.run(&["log-level"]);
    assert_eq!((ran.code, text(&ran)), (0, "info\n"));
    assert_eq!(daemon.last(), ("GET".into(), "/v1/log-level".into(), String::new()));
    daemon.run(&["log-level", "debug", "-o", "json"]);
    assert_eq!(daemon.last(), ("PUT".into(), "/v1/log-level".into(), r#"{"level":"debug"}"#.into()));
    let asked = daemon.asked().len();
    let ran = daemon.run(&["log-level", "wran"]);
    assert!(ran.code == 2 && ran.err.contains("did you mean \"warn\"?"), "{ran:?}");
    assert_eq!(daemon.asked().len(), asked, "a misspelt level went to the daemon");
    daemon.refuse("/v1/log-level", 403, "not allowed", "only root may do that");
    assert_eq!(daemon.run(&["log-level", "debug"]).code, 4);
}

#[test]
fn nothing_to_list_is_said() {
    let daemon = Daemon::start();
    for (verb, nothing) in [("nodes", "no hosts\n"), ("edges", "no connections yet\n"), ("services", "no services\n")] {
        daemon.edit(&format!("/v1/{verb}"), |list| *list = serde_json::json!([]));
        assert_eq!(daemon.run(&[verb]).out, nothing);
        assert_eq!(daemon.run(&[verb, "-o", "json"]).out, "[]\n");
    }
}

#[test]
fn resolve_prints_the_identity_alone() {
    let daemon = Daemon::start();
    let ran = daemon.run(&["resolve", "192.0.2.2:80"]);
    assert_eq!((ran.code, text(&ran)), (0, "spiffe://maaaaaaaaaaaaaaaa.meshd.internal/host/pi-2/unit/nginx.service\n"));
    assert_eq!(ran.err, "on pi-2: the member proved the address\n");
    assert_eq!(daemon.last(), ("GET".into(), "/v1/resolve?address=192.0.2.2:80".into(), String::new()));
    daemon.run(&["resolve", "[2001:db8::2]:80"]);
    assert_eq!(daemon.last().1, "/v1/resolve?address=[2001:db8::2]:80");

    // Known, and not secured: no identity is promised.
    daemon.edit("/v1/resolve", |answer| {
        answer["secured"] = false.into();
        answer["why"] = "port 22 is never captured".into();
    });
    let ran = daemon.run(&["resolve", "192.0.2.2:22"]);
    assert_eq!((ran.code, text(&ran)), (1, ""));
    assert_eq!(ran.err, "error: a connection to 192.0.2.2:22 is not secured\n    why: port 22 is never captured\n");
    let ran = daemon.run(&["resolve", "192.0.2.2:22", "-o", "json"]);
    assert_eq!(ran.code, 1);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&ran.out).unwrap()["secured"], false);
}

#[test]
fn check_groups_marks_hints_and_fails() {
    let daemon = Daemon::start();
    let ran = daemon.run(&["check"]);
    assert_eq!((ran.code, text(&ran)), (1, golden::CHECK));
    let ran = daemon.run(&["check", "-o", "json"]);
    let findings: Vec<meshd::api::Finding> = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((ran.code, findings.len()), (1, 6));
    let ran = daemon.run(&["check", "-o", "short"]);
    assert_eq!((ran.code, text(&ran)), (1, golden::CHECK_SHORT));
    daemon.edit("/v1/check", |list| list.as_array_mut().unwrap().retain(|f| f["level"] != "fail"));
    let ran = daemon.run(&["check"]);
    assert_eq!(ran.code, 0);
    assert!(ran.out.ends_with("\nworks, with 1 to look at\n"), "{ran:?}");
    // What JSON has is a promise: these fields, in this order, and no others taken away.
    let ran = daemon.run(&["check", "-o", "json"]);
    let first = "[\n  {\n    \"group\": \"configuration\",\n    \"name\": \"the configuration is valid\",\n    \"level\": \"ok\",\n    \
                 \"detail\": null,\n    \"hint\": null,\n    \"code\": \"check-config\"\n  },";
    assert!(ran.out.starts_with(first), "{ran:?}");
}

#[test]
fn check_tells_another_version_and_waits() {
    let daemon = Daemon::start();
    daemon.edit("/v1/check", |list| list.as_array_mut().unwrap().retain(|f| f["level"] == "ok"));
    assert_eq!(daemon.run(&["check", "-o", "short", "--wait", "1m"]).out, "all is well\n");
    daemon.edit("/v1/status", |status| status["version"] = "0.0.1".into());
    let ran = daemon.run(&["check"]);
    assert_eq!(ran.code, 0);
    assert!(ran.out.contains("‼ this command and the daemon are of one version\n    the daemon is version 0.0.1, "), "{ran:?}");
    assert!(ran.out.contains("docs/checks.md#check-version\n"), "{ran:?}");
    let ran = daemon.run(&["check", "--wait", "soon"]);
    assert!(ran.code == 2 && ran.err.contains("90s"), "{ran:?}");
}

#[test]
fn check_without_a_daemon_says_so_and_a_wrong_configuration_is_a_finding() {
    let dir = tempfile::tempdir().unwrap();
    let ran = run(&mut command(dir.path(), &["check"]));
    assert_eq!(ran.code, 1);
    assert!(
        ran.out.contains("√ the configuration is valid\n") && ran.out.contains("× meshd answers\n    meshd is not running"),
        "{ran:?}"
    );
    // What can be seen without one is looked at too.
    assert!(
        ["permissions", "kernel", "ports", "firewall", "state"].iter().all(|g| ran.out.contains(&format!("\n{g}\n---"))),
        "{ran:?}"
    );
    let pre = run(&mut command(dir.path(), &["check", "--pre"]));
    assert!(!pre.out.contains("meshd answers") && pre.out.contains("\nkernel\n---"), "{pre:?}");
    let ran = run(command(dir.path(), &["check", "--pre"]).env("MESHD_PROT", "7"));
    assert!(ran.out.contains("‼ no setting in the environment is misspelt\n    MESHD_PROT"), "{ran:?}");
    std::fs::write(dir.path().join("meshd.toml"), "prot = 1").unwrap();
    let ran = run(&mut command(dir.path(), &["check"]));
    assert_eq!(ran.code, 1);
    assert!(ran.out.contains("× the configuration is valid\n") && ran.out.contains("did you mean \"port\"?"), "{ran:?}");
}

#[test]
fn tokens() {
    let daemon = Daemon::start();
    let ran = daemon.run(&["token", "create", "--lifetime", "1h30m", "--uses", "3", "--hint", "[2001:db8::1]:6374"]);
    // The token alone, on a line of its own.
    assert_eq!((ran.code, text(&ran)), (0, "mesh1-qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq\n"));
    assert!(ran.err.starts_with("Good for 3 hosts, for 1h30m."), "{ran:?}");
    let (method, path, body) = daemon.last();
    assert_eq!((method.as_str(), path.as_str()), ("POST", "/v1/tokens"));
    let wish: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(wish, serde_json::json!({"lifetime_seconds": 5400, "uses": 3, "hints": ["[2001:db8::1]:6374"]}));
    let ran = daemon.run(&["token", "create", "-o", "json"]);
    assert_eq!(ran.err, "");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&ran.out).unwrap()["id"], "tok1");

    assert_eq!(daemon.run(&["token", "list"]).out, "ID    USES LEFT  ENDS IN\ntok1          1   59m10s\n");
    assert_eq!(daemon.run(&["token", "revoke", "tok1"]).out, "revoked tok1\n");
    assert_eq!(daemon.last().0, "DELETE");
    assert_eq!(daemon.last().1, "/v1/tokens/tok1");
    for bad in [["token", "revoke", "../join"], ["token", "revoke", "a?b"]] {
        assert_eq!(daemon.run(&bad).code, 2);
    }
    for bad in ["0s", "500ms", "1000d", "90"] {
        assert_eq!(daemon.run(&["token", "create", "--lifetime", bad]).code, 2, "{bad}");
    }
}

const TOKEN: &str = "mesh1-s3cretsecretsecretsecretsecretsecretsecret";

#[test]
fn join_takes_the_token_from_anywhere_and_never_repeats_it() {
    let daemon = Daemon::start();
    let file = daemon.dir().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let calls =
        [(vec!["join", TOKEN], ""), (vec!["join", "-"], TOKEN), (vec!["join", "--token-file", file.to_str().unwrap()], "")];
    for (args, input) in calls {
        let ran = daemon.run_with(&args, input);
        assert_eq!((ran.code, text(&ran), ran.err.as_str()), (0, "joined mesh aaaaaaaaaaaaaaaa as pi-1\n", ""), "{args:?}");
        let (method, path, body) = daemon.last();
        assert_eq!((method.as_str(), path.as_str(), body), ("POST", "/v1/join", format!("{{\"token\":\"{TOKEN}\"}}")));
    }
    // Twice is not an error.
    daemon.edit("/v1/join", |joined| joined["already"] = true.into());
    let ran = daemon.run(&["join", TOKEN]);
    assert_eq!((ran.code, text(&ran)), (0, "this host is a member of mesh aaaaaaaaaaaaaaaa already, as pi-1\n"));
    let joined: Joined = serde_json::from_str(&daemon.run(&["join", TOKEN, "-o", "json"]).out).unwrap();
    assert!(joined.already);
    // Refused, misspelt, and missing.
    daemon.refuse("/v1/join", 409, "cannot join", "the token was used up");
    let ran = daemon.run(&["join", TOKEN]);
    assert_eq!((ran.code, ran.err.as_str()), (1, "error: cannot join\n    why: the token was used up\n  to do: make another\n"));
    let ran = daemon.run(&["join", &format!("{TOKEN} x")]);
    assert_eq!(ran.code, 2);
    assert!(!ran.err.contains("s3cret"), "{ran:?}");
    let ran = daemon.run_with(&["join"], "");
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("--token-file"), "{ran:?}");
    assert_eq!(daemon.run(&["join", "--token-file", "/nonexistent"]).code, 1);
}

#[test]
fn leave_wants_a_yes() {
    let daemon = Daemon::start();
    let ran = daemon.run(&["leave"]);
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("add --yes"), "{ran:?}");
    assert!(daemon.asked().is_empty());
    let ran = daemon.run(&["leave", "--yes"]);
    assert_eq!((ran.code, text(&ran)), (0, "this host is no longer a member\n"));
    assert_eq!(daemon.last().0, "POST");
}

/// Of a mesh of one.
fn roster(recovery: Option<Recovery>) -> serde_json::Value {
    let (mesh, key, now) = (MeshId::from_bytes([1; 10]), PrivateKey::generate().unwrap(), UnixTime(1_800_000_000));
    let domain = TrustDomain::of(mesh);
    let issuer = Issuer::create(&domain, key.public().node_id(), now, std::time::Duration::from_secs(86_400)).unwrap();
    let root = issuer.root_der().to_vec();
    let roster = Roster::found_with(recovery, (mesh, domain), &key, HostName::nearest("pi"), root, now).unwrap();
    serde_json::from_slice(&roster.to_bytes()).unwrap()
}

#[test]
fn a_mesh_moves_only_when_its_person_has_seen_what_that_means() {
    let daemon = Daemon::start();
    let asked = || serde_json::from_str::<serde_json::Value>(&daemon.last().2).unwrap();
    let ran = daemon.run(&["token", "create", "--merge"]);
    assert!(ran.code == 0 && ran.err.starts_with("Good for a mesh of at most 3 hosts"), "{ran:?}");
    assert_eq!(asked(), serde_json::json!({"lifetime_seconds": 3600, "uses": 64, "hints": [], "merge": true}));

    let ran = daemon.run(&["merge", TOKEN]);
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("add --yes"), "{ran:?}");
    assert_eq!(asked(), serde_json::json!({"token": TOKEN, "step": "look"}));
    // It takes the recovery key of a mesh that has one, and there is nobody to be asked for it.
    let paper = RecoveryKey::generate().unwrap();
    daemon.serve("/v1/roster", &roster(Some(Recovery::new(&paper).unwrap())));
    let ran = daemon.run(&["merge", "--yes", TOKEN]);
    assert!(ran.code == 2 && ran.err.contains("--recovery-key-file"), "{ran:?}");
    assert!(daemon.asked().iter().all(|(_, path, body)| path != "/v1/merge" || body.contains("look")), "it moved");
    daemon.serve("/v1/roster", &roster(None));
    let ran = daemon.run(&["merge", "--yes", TOKEN]);
    assert!(ran.code == 0 && text(&ran).contains("move into mesh bbbbbbbbbbbbbbbb"), "{ran:?}");
    assert_eq!(asked()["step"], "move");
    assert!(!format!("{ran:?}").contains(TOKEN));
    assert_eq!(daemon.run(&["merge", "--yes", "--cancel"]).code, 0);
    assert_eq!(asked(), serde_json::json!({"token": null, "step": "stay"}));
    assert_eq!(daemon.run(&["merge", "--cancel", TOKEN]).code, 2);
}

#[test]
fn cleanup_spares_a_running_daemon() {
    let daemon = Daemon::start();
    let ran = daemon.run(&["cleanup"]);
    assert_eq!(ran.code, 1);
    assert!(ran.err.contains("meshd is running"), "{ran:?}");
}

#[test]
fn refusals_keep_the_daemons_words() {
    let daemon = Daemon::start();
    daemon.refuse("/v1/tokens", 403, "not allowed", "only root may do that");
    let ran = daemon.run(&["token", "create"]);
    assert_eq!((ran.code, ran.err.as_str()), (4, "error: not allowed\n    why: only root may do that\n  to do: make another\n"));
    daemon.refuse("/v1/nodes", 409, "this host is not a member of a mesh", "it left");
    assert_eq!(daemon.run(&["nodes"]).code, 1);
}

#[test]
fn another_version_is_named() {
    let daemon = Daemon::start();
    daemon.version("99.0.0");
    // Understood all the same: nothing is said.
    assert_eq!(daemon.run(&["nodes"]).code, 0);
    daemon.edit("/v1/nodes", |nodes| *nodes = serde_json::json!({"something": "else"}));
    let ran = daemon.run(&["nodes"]);
    assert_eq!(ran.code, 3);
    assert!(ran.err.contains("version 99.0.0") && ran.err.contains("restart meshd"), "{ran:?}");
    daemon.refuse("/v1/edges", 404, "unknown request", "");
    let ran = daemon.run(&["edges"]);
    assert!(ran.code == 3 && ran.err.contains("version 99.0.0"), "{ran:?}");
    daemon.version(env!("CARGO_PKG_VERSION"));
    let ran = daemon.run(&["nodes"]);
    assert!(ran.code == 3 && ran.err.contains("does not speak meshd's language"), "{ran:?}");
}

#[test]
fn no_daemon_a_dead_one_and_no_permission() {
    let dir = tempfile::tempdir().unwrap();
    let ran = run(&mut command(dir.path(), &["status"]));
    assert_eq!((ran.code, text(&ran)), (3, ""));
    assert!(ran.err.starts_with("error: meshd is not running") && ran.err.contains("systemctl start meshd"), "{ran:?}");
    // A socket file whose daemon is gone.
    std::fs::create_dir_all(dir.path().join("run")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("run/meshd.sock")).unwrap());
    assert_eq!(run(&mut command(dir.path(), &["nodes"])).code, 3);
    // A socket that only others may use: as root nothing is forbidden, so the command is run as somebody else.
    let daemon = Daemon::start();
    daemon.forbid();
    let ran = run(&mut daemon.as_nobody(&["status"]));
    assert_eq!(ran.code, 4, "{ran:?}");
    assert!(ran.err.starts_with("error: no permission to use") && ran.err.contains("sudo"), "{ran:?}");
}

#[test]
fn hostile_answers_do_not_reach_the_terminal() {
    let daemon = Daemon::start();
    daemon.edit("/v1/status", |s| {
        s["reason"] = HOSTILE.into();
        s["version"] = HOSTILE.into();
        s["capture"]["why"] = HOSTILE.into();
        s["clock"]["source"] = HOSTILE.into();
    });
    daemon.edit("/v1/nodes", |n| {
        n[0]["zone"] = HOSTILE.into();
        n[0]["version"] = HOSTILE.into();
    });
    daemon.edit("/v1/edges", |e| e[0]["reason"] = HOSTILE.into());
    daemon.edit("/v1/identity", |i| i[0]["serial"] = HOSTILE.into());
    daemon.edit("/v1/resolve", |r| r["why"] = HOSTILE.into());
    daemon.edit("/v1/check", |c| {
        for field in ["group", "name", "detail", "hint", "code"] {
            c[2][field] = HOSTILE.into();
        }
    });
    daemon.edit("/v1/tokens", |t| t[0]["id"] = HOSTILE.into());
    daemon.refuse("/v1/services", 500, HOSTILE, HOSTILE);
    let verbs: [&[&str]; 9] = [
        &["status"],
        &["nodes"],
        &["edges"],
        &["identity"],
        &["resolve", "192.0.2.2:80"],
        &["check"],
        &["token", "list"],
        &["services"],
        &["leave", "--yes"],
    ];
    daemon.refuse("/v1/leave", 500, HOSTILE, HOSTILE);
    for verb in verbs {
        for output in ["text", "json"] {
            let ran = daemon.run(&[verb, &["-o", output]].concat());
            let all = format!("{}{}", ran.out, ran.err);
            assert!(all.contains("owned"), "{verb:?} did not print it at all: {ran:?}");
            let bad: Vec<char> = all.chars().filter(|c| *c != '\n' && (c.is_control() || *c == '\u{202e}')).collect();
            assert!(bad.is_empty(), "{verb:?} {output}: {bad:?}");
        }
    }
    // A host name cannot even be such a text.
    daemon.edit("/v1/nodes", |n| n[0]["name"] = HOSTILE.into());
    let ran = daemon.run(&["nodes"]);
    assert!(ran.code == 3 && !ran.err.contains('\x1b'), "{ran:?}");
}

#[test]
fn settings_and_their_origins() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("meshd.toml");
    std::fs::write(&file, "mode = \"audit\"\nzone = \"attic\"\n").unwrap();
    let mut show = command(dir.path(), &["config", "show", "-o", "json", "--port", "7001"]);
    let ran = run(show.env("MESHD_DRAIN", "5s"));
    assert_eq!(ran.code, 0, "{ran:?}");
    let rows: Vec<serde_json::Value> = serde_json::from_str(&ran.out).unwrap();
    let row = |key: &str| rows.iter().find(|r| r["key"] == key).unwrap().clone();
    let parts = |key: &str| (row(key)["value"].clone(), row(key)["origin"].clone(), row(key)["place"].clone());
    assert_eq!(parts("mode"), ("\"audit\"".into(), "file".into(), file.to_str().unwrap().into()));
    assert_eq!(parts("drain"), ("\"5s\"".into(), "environment".into(), "MESHD_DRAIN".into()));
    assert_eq!(parts("port"), ("7001".into(), "flag".into(), "--port".into()));
    assert_eq!(parts("keepalive"), ("\"30s\"".into(), "default".into(), serde_json::Value::Null));
    assert_eq!(row("trust_domain")["value"], serde_json::Value::Null);
    // The text is a configuration file that means the same.
    let ran = run(command(dir.path(), &["config", "show", "--port", "7001"]).env("MESHD_HOST", "x"));
    assert!(ran.out.contains("zone = \"attic\"") && ran.out.contains("# flag --port"), "{ran:?}");
    std::fs::write(&file, &ran.out).unwrap();
    let again = run(&mut command(dir.path(), &["config", "show"])).out;
    let values = |text: &str| text.lines().map(|l| l.split("  #").next().unwrap().trim_end().to_owned()).collect::<Vec<_>>();
    assert_eq!(values(&again), values(&ran.out));
    assert!(!again.contains("# flag"), "{again}");
}

#[test]
fn wrong_usage_and_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let usage: [&[&str]; 7] = [
        &[],
        &["frobnicate"],
        &["resolve", "pi-2"],
        &["resolve", "2001:db8::1"],
        &["status", "-o", "yaml"],
        &["join", "x", "--token-file", "y"],
        &["token"],
    ];
    for args in usage {
        assert_eq!(run(&mut command(dir.path(), args)).code, 2, "{args:?}");
    }
    let ran = run(command(dir.path(), &["status"]).env("MESHD_MODE", "strct"));
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("mode (environment, MESHD_MODE)") && ran.err.contains("did you mean \"strict\"?"), "{ran:?}");
    assert_eq!(run(command(dir.path(), &["status"]).env("MESHD_CONFIG", "/nonexistent")).code, 2);
    assert_eq!(run(&mut command(dir.path(), &["run", "--port", "0"])).code, 2);
    assert_eq!(run(&mut command(dir.path(), &["run", "--port", "6376"])).code, 2);
}

#[test]
fn help_version_completions_manual() {
    let dir = tempfile::tempdir().unwrap();
    for args in [vec!["--help"], vec!["run", "--help"], vec!["token", "create", "--help"], vec!["edges", "-h"]] {
        let ran = run(&mut command(dir.path(), &args));
        assert_eq!(ran.code, 0, "{args:?}");
        assert!(args.len() == 1 || ran.out.contains("Examples:"), "{args:?}: {}", ran.out);
    }
    let all = run(&mut command(dir.path(), &["run", "--help"])).out;
    for key in meshd::config::KEYS {
        assert!(all.contains(&format!("--{}", key.flag)), "run has no flag for {}", key.name);
    }
    let ran = run(&mut command(dir.path(), &["version", "-o", "json"]));
    let version: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((&version["version"], &version["crypto"]), (&env!("CARGO_PKG_VERSION").into(), &"ring".into()));
    for shell in ["bash", "zsh", "fish"] {
        assert!(run(&mut command(dir.path(), &["completions", shell])).out.contains("resolve"), "{shell}");
    }
    assert_eq!(run(&mut command(dir.path(), &["man", "--dir", dir.path().to_str().unwrap()])).code, 0);
    assert!(dir.path().join("meshd-token-create.1").exists());
}

#[test]
fn a_reader_that_stops_early_is_no_failure() {
    use std::process::Stdio;
    let dir = tempfile::tempdir().unwrap();
    let mut child = command(dir.path(), &["completions", "zsh"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let end = child.wait_with_output().unwrap();
    assert_eq!((end.status.code(), end.stderr), (Some(0), Vec::new()));
}

/// The codes of findings, their sections in the manual, and the places that produce them are the same.
#[test]
fn every_finding_has_a_section_a_place_and_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let manual = read("docs/checks.md");
    let sections: Vec<&str> = manual.lines().filter_map(|l| l.strip_prefix("### ")).collect();
    assert_eq!(sections, code::ALL, "sections and codes, in the order of the groups");
    // `NAME = "check-name";`
    let list = read("src/api/code.rs");
    let names: Vec<(&str, &str)> = list
        .lines()
        .filter_map(|l| l.trim().split_once(" = \""))
        .filter_map(|(name, code)| Some((name, code.strip_suffix("\";")?)))
        .collect();
    assert_eq!(names.len(), code::ALL.len());
    let scenarios = read("tests/namespaced/checks.rs") + &read("tests/namespaced/breakages.rs");
    let (mut places, mut tests) = (read("src/cli/check.rs"), scenarios + &read("tests/cli.rs"));
    for file in std::fs::read_dir(root.join("src/check")).unwrap().flatten().filter(|f| f.path().is_file()) {
        let text = std::fs::read_to_string(file.path()).unwrap();
        let (place, test) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
        places.push_str(place);
        tests.push_str(test);
    }
    let used = |text: &str, name: &str| {
        let word = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        text.match_indices(&format!("code::{name}")).any(|(at, found)| !word(text[at + found.len()..].chars().next()))
    };
    for (name, code) in names {
        assert!(used(&places, name), "nothing produces {code}");
        // Those of a table of expressions are tested by going through it.
        let by_table = code.starts_with("check-nft-") && tests.contains("in EXPRESSIONS");
        assert!(by_table || used(&tests, name) || tests.contains(code), "no test breaks {code}");
    }
}

#[test]
fn the_manual_explains_every_setting_and_command() {
    let manual = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md")).unwrap();
    for key in meshd::config::KEYS {
        assert!(manual.contains(&format!("| `{}` |", key.name)), "no setting {}", key.name);
    }
}
