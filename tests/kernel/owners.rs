//! Whose a live socket is: real processes in real control groups.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

use meshd::intercept::cgroup::{self, Cgroups, OwnCgroup};
use meshd::intercept::process::die_with_parent;
use meshd::intercept::sockdiag::SockDiag;
use meshd::intercept::socket::{self, Mark};
use meshd::intercept::{Attribution, Capture, Owner, RuleConfig};

use crate::world::{CHILD, Host, Need, Outcome, PATIENCE, Test, World, accept, at, spawn};

pub(crate) const TESTS: &[Test] = &[
    Test { name: "live_sockets_are_attributed", needs: &[Need::Cgroups], run: attributed },
    Test { name: "a_user_cannot_imitate_a_unit_or_container", needs: &[Need::Cgroups], run: imitated },
    Test { name: "our_own_group_is_not_captured", needs: &[Need::Cgroups], run: own },
];

const CONTAINER: &str = "4f3c2b1a0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a";
/// A user that nobody is.
const UID: u32 = 54_321;

/// Why groups cannot be made here.
pub(crate) fn cannot_make_groups() -> Option<String> {
    let cgroups = match Cgroups::open() {
        Ok(cgroups) => cgroups,
        Err(error) => return Some(error.to_string()),
    };
    let name = format!("meshd-try-{}.slice", std::process::id());
    let made = Group::new(cgroups.mount(), &name);
    made.err().map(|error| format!("cannot make a control group: {error}"))
}

/// A control group that is removed at the end; the ones above it too if they were made for it.
pub(crate) struct Group {
    path: PathBuf,
    made: Vec<PathBuf>,
}

impl Group {
    fn new(mount: &Path, path: &str) -> std::io::Result<Group> {
        let mut group = Group { path: mount.to_owned(), made: Vec::new() };
        for name in path.split('/') {
            group.path.push(name);
            if !group.path.exists() {
                fs::create_dir(&group.path)?;
                group.made.push(group.path.clone());
            }
        }
        Ok(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            // The kernel takes a moment to notice that a process is gone.
            for _ in 0..100 {
                if fs::remove_dir(path).is_ok() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}

/// A process of its own in a group.
pub(crate) struct Process {
    pub(crate) child: Child,
    input: Option<ChildStdin>,
    said: String,
}

impl Process {
    pub(crate) fn start(host: &Host, group: Option<&Group>, words: &[&str]) -> std::io::Result<Process> {
        let mut command = Command::new(std::env::current_exe()?);
        die_with_parent(command.arg(CHILD).args(words).stdin(Stdio::piped()).stdout(Stdio::piped()));
        let mut child = host.run(|| spawn(&mut command))?;
        let mut process = Process { input: child.stdin.take(), said: String::new(), child };
        if let Some(group) = group {
            fs::write(group.path.join("cgroup.procs"), process.child.id().to_string())?;
        }
        if let Some(input) = &mut process.input {
            input.write_all(b"go\n")?;
        }
        if let Some(output) = process.child.stdout.take() {
            BufReader::new(output).read_line(&mut process.said)?;
        }
        Ok(process)
    }

    fn address(&self) -> Result<SocketAddr, String> {
        self.said.trim().parse().map_err(|e| format!("the child said {:?}: {e}", self.said))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.wait();
    }
}

/// What a child does once it was moved into its group; holds until its input ends.
pub(crate) fn child(words: &[String]) -> ExitCode {
    let mut line = String::new();
    let mut input = BufReader::new(std::io::stdin());
    if input.read_line(&mut line).is_err() {
        return ExitCode::FAILURE;
    }
    let to = |text: &String| text.parse::<SocketAddr>().expect("an address");
    let mut held: (Option<TcpStream>, Option<TcpListener>) = (None, None);
    match words {
        [role, address] if role == "connect" => match TcpStream::connect_timeout(&to(address), PATIENCE) {
            Ok(stream) => {
                println!("{}", stream.local_addr().expect("connected"));
                held.0 = Some(stream);
            }
            Err(error) => println!("{error}"),
        },
        [role, address] if role == "listen" => {
            let listener = TcpListener::bind(to(address)).expect("to listen");
            println!("{}", listener.local_addr().expect("bound"));
            held.1 = Some(listener);
        }
        [role, own, peer] if role == "deliver" => return deliver(to(own), to(peer)),
        [role] if role == "own" => println!("{:?}", Cgroups::open().expect("groups").own()),
        _ => return ExitCode::FAILURE,
    }
    let _ = input.read_line(&mut line);
    drop(held);
    ExitCode::SUCCESS
}

/// A proxy in small: rules, and a connection to a service on behalf of a peer. Reads what the service says until it is killed.
fn deliver(own: SocketAddr, peer: SocketAddr) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let capture = Capture::install(&RuleConfig::default()).expect("to install");
    capture.set_peers(&std::collections::BTreeSet::from([peer.ip()])).expect("to set peers");
    runtime.block_on(async {
        let mut stream = socket::connect_as(peer, own, Mark::Service).await.expect("to connect");
        println!("{}", stream.local_addr().expect("connected"));
        let mut buffer = vec![0; 65_536];
        while tokio::io::AsyncReadExt::read(&mut stream, &mut buffer).await.is_ok_and(|len| len > 0) {}
    });
    ExitCode::FAILURE
}

struct Scene {
    world: World,
    cgroups: Cgroups,
    attribution: Attribution,
    base: String,
    proxy: TcpListener,
    _capture: Capture,
}

impl Scene {
    fn new(name: &str) -> Result<Scene, Box<dyn std::error::Error>> {
        let cgroups = Cgroups::open()?;
        let world = World::new();
        let capture = world.a.install(&RuleConfig::default());
        capture.set_peers(&std::collections::BTreeSet::from([world.b.v4]))?;
        Ok(Scene {
            proxy: world.a.listen("127.0.0.1".parse()?, 6375),
            _capture: capture,
            world,
            cgroups,
            attribution: Attribution::open(),
            base: format!("meshd{name}{}.slice", std::process::id()),
        })
    }

    fn group(&self, path: &str) -> std::io::Result<Group> {
        Group::new(self.cgroups.mount(), &path.replace("BASE", &self.base))
    }

    /// A client that is captured, and a listener, both in a group: whose are they?
    fn owner_in(&self, group: &Group) -> Result<Owner, Box<dyn std::error::Error>> {
        let (a, b) = (&self.world.a, &self.world.b);
        let diag = a.run(SockDiag::open)?;

        let client = Process::start(a, Some(group), &["connect", &at(b.v4, 80).to_string()])?;
        let (_taken, peer) = accept(&self.proxy, PATIENCE).ok_or("not captured")?;
        assert_eq!(client.address()?, peer);
        let found = diag.find(peer, at(b.v4, 80))?.ok_or("the client was not found")?;
        let owner = self.attribution.owner(&found);

        let listener = Process::start(a, Some(group), &["listen", "10.77.0.1:0"])?;
        let listening = listener.address()?;
        let found = diag.listeners()?.into_iter().find(|l| l.local == listening).ok_or("the listener was not found")?;
        assert_eq!(self.attribution.owner(&found), owner, "client and listener of one group");
        Ok(owner)
    }
}

fn attributed() -> Outcome {
    let scene = Scene::new("who")?;
    let container = format!("BASE/docker-{CONTAINER}.scope");
    for (path, expected) in [
        ("BASE/web.service", Owner::Unit("web.service".into())),
        ("BASE/BASE-x.slice/we\\x2db@1.service/nested", Owner::Unit("we\\x2db@1.service".into())),
        (container.as_str(), Owner::Container(CONTAINER.into())),
        ("BASE", Owner::Host),
    ] {
        let group = scene.group(path)?;
        assert_eq!(scene.owner_in(&group)?, expected, "{path}");
    }
    Ok(())
}

fn imitated() -> Outcome {
    let scene = Scene::new("imitate")?;
    let give = |path: &str| -> std::io::Result<Group> {
        let group = scene.group(path)?;
        std::os::unix::fs::chown(&group.path, Some(UID), Some(UID))?;
        Ok(group)
    };
    // Below the user's own slice, whatever it is called.
    let _session = scene.group(&format!("user.slice/user-{UID}.slice"))?;
    let delegated = format!("user.slice/user-{UID}.slice/user@{UID}.service");
    let _delegated = give(&delegated)?;
    for name in ["app.slice/nginx.service".to_owned(), format!("docker-{CONTAINER}.scope"), "system.slice/sshd.service".into()] {
        let group = scene.group(&format!("{delegated}/{name}"))?;
        assert_eq!(scene.owner_in(&group)?, Owner::User(UID.to_string()), "{name}");
    }
    // Below a system unit that was delegated to the user.
    let _unit = give("BASE/job.service")?;
    let group = scene.group(&format!("BASE/job.service/docker-{CONTAINER}.scope"))?;
    assert_eq!(scene.owner_in(&group)?, Owner::Unit("job.service".into()));
    drop(group);
    // In a slice of system units that was given to the user, or that anybody in a group may write.
    let _slice = give("BASE/BASE-given.slice")?;
    let group = scene.group("BASE/BASE-given.slice/nginx.service")?;
    assert_eq!(scene.owner_in(&group)?, Owner::Host);
    let open = scene.group("BASE/BASE-open.slice")?;
    fs::set_permissions(&open.path, std::os::unix::fs::PermissionsExt::from_mode(0o775))?;
    let group = scene.group("BASE/BASE-open.slice/nginx.service")?;
    assert_eq!(scene.owner_in(&group)?, Owner::Host);
    Ok(())
}

fn own() -> Outcome {
    let scene = Scene::new("own")?;
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let group = scene.group("BASE/meshd.service")?;
    let own = OwnCgroup { level: 2, id: cgroup::id_of(&group.path)? };
    let one = Process::start(a, Some(&group), &["own"])?;
    assert_eq!(one.said.trim(), format!("{:?}", Some(own)));
    let two = Process::start(a, Some(&group), &["own"])?;
    assert_eq!(two.said.trim(), "None", "somebody else is in it");
    drop((one, two));

    let capture = a.install(&RuleConfig { own_cgroup: Some(own), ..RuleConfig::default() });
    capture.set_peers(&std::collections::BTreeSet::from(b.addresses()))?;
    let other = scene.group("BASE/web.service")?;
    for (to, loopback) in [(b.v4, "127.0.0.1".parse()?), (b.v6, "::1".parse()?)] {
        let proxy = a.listen(loopback, 6375);
        let server = b.listen(to, 80);
        let _ours = Process::start(a, Some(&group), &["connect", &at(to, 80).to_string()])?;
        assert!(accept(&server, PATIENCE).is_some(), "our own group was captured");
        let _theirs = Process::start(a, Some(&other), &["connect", &at(to, 80).to_string()])?;
        assert!(accept(&proxy, PATIENCE).is_some(), "another group was not captured");
    }
    Ok(())
}
