//! A stand-in for the daemon: a real HTTP server on a Unix socket that answers what a test told it to, and remembers what it was asked.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use meshd::api::{SOCKET, VERSION_HEADER};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What a hostile member could put where text is free: clears the screen, sets the title, hides and turns text around.
pub(crate) const HOSTILE: &str = "\x1b[2J\x1b]0;owned\x07\u{9b}31m\u{7f}\u{202e}\r\nowned\0";
/// Some user that is not root.
const NOBODY: u32 = 65534;

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// `meshd` with the state, run directory and configuration in `dir`, and nothing else from this environment.
pub(crate) fn command(dir: &Path, args: &[&str]) -> Command {
    program(env!("CARGO_BIN_EXE_meshd").as_ref(), dir, args)
}

fn program(program: &Path, dir: &Path, args: &[&str]) -> Command {
    let config = dir.join("meshd.toml");
    if !config.exists() {
        fs::write(&config, "").unwrap();
    }
    let mut command = Command::new(program);
    command.args(args).env_clear().current_dir("/").stdin(Stdio::null());
    command.env("MESHD_STATE_DIR", dir.join("state")).env("MESHD_RUN_DIR", dir.join("run")).env("MESHD_CONFIG", config);
    command
}

/// Runs it to its end.
pub(crate) fn run(command: &mut Command) -> Ran {
    let output = loop {
        match command.output() {
            // A copy of the program that was just written: another test's fork may hold the file open for writing a moment longer.
            Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(std::time::Duration::from_millis(10))
            }
            output => break output.unwrap(),
        }
    };
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
}

type Answers = BTreeMap<String, (u16, Value)>;
type Asked = (String, String, String);

struct Script {
    answers: Answers,
    asked: Vec<Asked>,
    version: String,
}

/// The stand-in. It ends with the test.
pub(crate) struct Daemon {
    dir: TempDir,
    script: Arc<Mutex<Script>>,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(dir.path().join("run").join(SOCKET)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let answers = answers();
        let script = Arc::new(Mutex::new(Script { answers, asked: Vec::new(), version: env!("CARGO_PKG_VERSION").into() }));
        let shared = script.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let shared = shared.clone();
                    let service = service_fn(move |request| answer(shared.clone(), request));
                    tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
                }
            });
        });
        Self { dir, script }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        run(&mut command(self.dir(), args))
    }
    /// Runs it with `input` on its standard input.
    pub(crate) fn run_with(&self, args: &[&str], input: &str) -> Ran {
        let mut command = command(self.dir(), args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A command that does not read its input is no failure of the test.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }

    /// Changes an answer.
    pub(crate) fn edit(&self, path: &str, change: impl FnOnce(&mut Value)) {
        change(&mut self.script.lock().unwrap().answers.get_mut(path).unwrap().1);
    }
    /// Answers with this from now on.
    pub(crate) fn serve(&self, path: &str, answer: &Value) {
        self.script.lock().unwrap().answers.insert(path.into(), (200, answer.clone()));
    }
    /// Answers with a refusal from now on.
    pub(crate) fn refuse(&self, path: &str, status: u16, what: &str, why: &str) {
        let body = json!({"what": what, "why": why, "remedy": "make another"});
        self.script.lock().unwrap().answers.insert(path.into(), (status, body));
    }
    /// Says it is of this version.
    pub(crate) fn version(&self, version: &str) {
        self.script.lock().unwrap().version = version.into();
    }
    pub(crate) fn answer(&self, path: &str) -> Value {
        self.script.lock().unwrap().answers[path].1.clone()
    }
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.script.lock().unwrap().asked.clone()
    }
    /// The last request: method, path with query, body.
    pub(crate) fn last(&self) -> Asked {
        self.asked().pop().unwrap()
    }

    /// Lets nobody but the owner near the socket, while the configuration stays readable.
    pub(crate) fn forbid(&self) {
        fs::set_permissions(self.dir(), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(self.dir().join("run").join(SOCKET), Permissions::from_mode(0o000)).unwrap();
    }
    /// The command as a user who is not root, from a copy that this user can reach.
    pub(crate) fn as_nobody(&self, args: &[&str]) -> Command {
        let copy = self.dir().join("meshd");
        fs::copy(env!("CARGO_BIN_EXE_meshd"), &copy).unwrap();
        let mut command = program(&copy, self.dir(), args);
        if fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0) {
            command.uid(NOBODY);
        }
        command
    }
}

async fn answer(
    script: Arc<Mutex<Script>>,
    request: Request<hyper::body::Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = String::from_utf8(body.collect().await.unwrap().to_bytes().into()).unwrap();
    let mut script = script.lock().unwrap();
    let method = parts.method.to_string();
    script.asked.push((method.clone(), parts.uri.path_and_query().unwrap().to_string(), body));
    let path = parts.uri.path();
    let fallback = (404, json!({"what": "unknown request", "why": null, "remedy": null}));
    let (status, value) = match (method.as_str(), script.answers.get(path)) {
        ("POST", Some((200, _))) if path == "/v1/tokens" => &script.answers["POST /v1/tokens"],
        ("DELETE", _) if path.starts_with("/v1/tokens/") => &(200, json!({})),
        (_, Some(found)) => found,
        (_, None) => &fallback,
    };
    let response = Response::builder().status(*status).header(VERSION_HEADER, &script.version);
    Ok(response.body(Full::new(value.to_string().into())).unwrap())
}

/// A mesh of three: this authority, a member in reach, one that is not.
fn answers() -> Answers {
    const DOMAIN: &str = "spiffe://maaaaaaaaaaaaaaaa.meshd.internal";
    let ids = ["a", "b", "c"].map(|c| c.repeat(25) + "a");
    let node = |at: usize, name: &str| {
        json!({
            "id": ids[at], "name": name, "own": at == 0, "standing": "active", "authority": at == 0, "reachable": at < 2,
            "addresses": [format!("192.0.2.{}", at + 1)], "captured": [], "contested": [], "zone": null, "mode": "permissive",
            "version": "0.1.0", "listeners": at, "last_seen_seconds": at * 100
        })
    };
    let mut nodes = json!([node(0, "pi-1"), node(1, "pi-2"), node(2, "attic")]);
    nodes[0]["zone"] = "shed".into();
    nodes[1]["addresses"] = json!(["192.0.2.2", "2001:db8::2"]);
    nodes[1]["captured"] = json!(["192.0.2.2"]);
    nodes[2]["contested"] = json!(["192.0.2.3"]);
    nodes[2]["mode"] = Value::Null;
    nodes[2]["version"] = Value::Null;
    nodes[2]["last_seen_seconds"] = Value::Null;
    let ok = |value: Value| (200, value);
    let list = [
        (
            "/v1/status",
            ok(json!({
                "state": "member", "reason": null, "mesh": "aaaaaaaaaaaaaaaa", "trust_domain": "maaaaaaaaaaaaaaaa.meshd.internal",
                "node": ids[0], "host_name": "pi-1", "version": "0.1.0", "mode": "permissive",
                "capture": {"on": true, "why": null}, "clock": {"source": "floor", "now": 1_800_000_000, "why": "the system clock is behind"},
                "authority": true, "members": {"active": 3, "reachable": 2}, "uptime_seconds": 3700, "pid": 4242, "older": []
            })),
        ),
        ("/v1/nodes", ok(nodes)),
        (
            "/v1/services",
            ok(json!([
                {"host": "pi-2", "node": ids[1], "addresses": ["192.0.2.2", "2001:db8::2"], "port": 80, "id": format!("{DOMAIN}/host/pi-2/unit/nginx.service")},
                {"host": "pi-2", "node": ids[1], "addresses": ["192.0.2.2"], "port": 5432, "id": format!("{DOMAIN}/host/pi-2/unit/postgresql_4016-main.service")},
            ])),
        ),
        (
            "/v1/edges",
            ok(json!([
                {
                    "direction": "outbound", "client": format!("{DOMAIN}/host/pi-1/user/anna"), "server": format!("{DOMAIN}/host/pi-2/unit/nginx.service"),
                    "peer": "pi-2", "address": "192.0.2.2", "port": 80, "secured": true, "reason": null, "open": 1, "total": 12, "failed": 0,
                    "bytes_in": 1_572_864, "bytes_out": 900, "last_seen_seconds": 3,
                    "durations": [10, 80, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 2]
                },
                {
                    "direction": "inbound", "client": null, "server": format!("{DOMAIN}/host/pi-1"), "peer": null, "address": "2001:db8::99",
                    "port": 8080, "secured": false, "reason": "not a member", "open": 0, "total": 1, "failed": 1, "bytes_in": 0,
                    "bytes_out": 0, "last_seen_seconds": 90, "durations": []
                },
            ])),
        ),
        (
            "/v1/identity",
            ok(json!([
                {
                    "workload": "/host/pi-1", "id": format!("{DOMAIN}/host/pi-1"), "serial": "0badcafe", "not_before": 1_800_000_000,
                    "not_after": 1_800_259_200, "expires_seconds": 259_200, "renewal_seconds": 86_400, "issued_by": "pi-1"
                },
                {
                    "workload": "/host/pi-1/user/anna", "id": format!("{DOMAIN}/host/pi-1/user/anna"), "serial": null, "not_before": 1_700_000_000,
                    "not_after": 1_700_259_200, "expires_seconds": -5, "renewal_seconds": -200, "issued_by": null
                },
            ])),
        ),
        (
            "/v1/resolve",
            ok(json!({
                "address": "192.0.2.2", "port": 80, "node": ids[1], "host": "pi-2", "id": format!("{DOMAIN}/host/pi-2/unit/nginx.service"),
                "secured": true, "why": "the member proved the address"
            })),
        ),
        (
            "/v1/check",
            ok(json!([
                {"group": "daemon", "name": "meshd answers", "level": "ok", "detail": "version 0.1.0", "hint": null, "code": "check-daemon"},
                {"group": "mesh", "name": "this host is a member", "level": "ok", "detail": null, "hint": null, "code": "check-member"},
                {"group": "peers", "name": "attic answers", "level": "fail", "detail": "no answer in time", "hint": "is meshd running there?", "code": "check-peer"},
                {"group": "mesh", "name": "an authority is in reach", "level": "warn", "detail": null, "hint": "start it", "code": "of-a-later-version"},
            ])),
        ),
        ("/v1/tokens", ok(json!([{"id": "tok1", "uses_left": 1, "expires_seconds": 3550}]))),
        (
            "POST /v1/tokens",
            ok(
                json!({"id": "tok1", "token": "mesh1-qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq", "uses": 3, "expires_seconds": 5400}),
            ),
        ),
        ("/v1/join", ok(json!({"mesh": "aaaaaaaaaaaaaaaa", "name": "pi-1", "already": false}))),
        ("/v1/leave", ok(json!({}))),
        (
            "/v1/merge",
            ok(json!({
                "from": {"mesh": "aaaaaaaaaaaaaaaa", "founder": ids[0], "trust_domain": "maaaaaaaaaaaaaaaa", "members": 3},
                "to": {"mesh": "bbbbbbbbbbbbbbbb", "founder": ids[1], "trust_domain": "mbbbbbbbbbbbbbbbb", "members": 2},
                "invited": 2, "banished": ["attic"], "renamed": [{"name": "pi-1", "becomes": "pi-1-aaaa"}], "ends_seconds": 2_592_000
            })),
        ),
        ("/v1/log-level", ok(json!({"level": "info"}))),
    ];
    list.into_iter().map(|(path, answer)| (path.to_owned(), answer)).collect()
}
