//! Hosts made of network namespaces on one switch, on this machine, with no outside program.
//!
//! Owns the namespaces, the cables between them, the directories of the hosts and the processes inside. Invariant: when a [`Lab`]
//! and its [`Process`]es are dropped, after a panic too, nothing is left: a namespace lives as long as somebody holds it, a process
//! is killed with whoever started it. The demonstration and the namespaced tests are its users. Blocking; not for async code.

use std::fs::{DirBuilder, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::intercept::netlink::NetlinkError;
use crate::intercept::netns::{NetNs, NetNsError};
use crate::intercept::process;
use crate::intercept::rtnetlink::Route;

/// Most hosts of a lab: they are numbered in the last octet of their IPv4 address.
pub const MAX_HOSTS: usize = 200;
/// The interface of each host.
pub const INTERFACE: &str = "eth0";
/// The switch's own interface.
const BRIDGE: &str = "br0";
/// How often something that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Why a lab could not be built or used.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A namespace; the error says what is missing.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    /// The kernel refused an interface or an address.
    #[error("cannot {what}: {source}")]
    Network {
        /// What was attempted.
        what: String,
        /// What the kernel said.
        source: NetlinkError,
    },
    /// A file, a directory or a process.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// Not built for that many.
    #[error("a lab has 1 to {MAX_HOSTS} hosts")]
    Size,
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> LabError {
    let what = what.into();
    move |source| LabError::Io { what, source }
}
fn network(what: impl Into<String>) -> impl FnOnce(NetlinkError) -> LabError {
    let what = what.into();
    move |source| LabError::Network { what, source }
}

/// Hosts on a switch.
#[derive(Debug)]
pub struct Lab {
    switch: NetNs,
    hosts: Vec<Host>,
    dir: PathBuf,
}

impl Lab {
    /// Builds one with hosts of these names, addressed `192.168.77.1`, `fd77::1` and so on, interface `eth0`. The caller is root,
    /// or has called [`crate::intercept::netns::become_root`].
    ///
    /// # Errors
    /// [`LabError`]; nothing is left behind then.
    pub fn build(names: &[&str]) -> Result<Lab, LabError> {
        if names.is_empty() || names.len() > MAX_HOSTS {
            return Err(LabError::Size);
        }
        let switch = NetNs::create()?;
        let mut route = switch.run(Route::open)?.map_err(network("talk to the switch"))?;
        let bridge = route.add_bridge(BRIDGE).map_err(network("make the switch"))?;
        route.set_up(bridge).map_err(network("start the switch"))?;
        let mut lab = Lab { switch, hosts: Vec::new(), dir: private_directory()? };
        for (name, number) in names.iter().zip(1u8..) {
            let netns = NetNs::create()?;
            // Link-local addresses are usable at once, too. Without /proc/sys it takes a second longer, that is all.
            netns.run(|| std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").ok())?;
            let plug = format!("port{number}");
            let index =
                route.add_veth(&plug, INTERFACE, Some(netns.as_fd())).map_err(network(format!("plug {name} into the switch")))?;
            route.set_master(index, bridge).map_err(network("add a port to the switch"))?;
            route.set_up(index).map_err(network("start a port of the switch"))?;
            let dir = lab.dir.join(name);
            make_directory(&dir)?;
            File::create(dir.join("meshd.toml")).map_err(io_error("write a configuration file"))?;
            let host = Host {
                name: (*name).to_owned(),
                ipv4: Ipv4Addr::new(192, 168, 77, number),
                ipv6: Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(number)),
                netns,
                dir,
            };
            host.add_address(host.ipv4.into())?;
            host.add_address(host.ipv6.into())?;
            host.link_up()?;
            lab.hosts.push(host);
        }
        Ok(lab)
    }

    /// The hosts, in the order they were named.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The namespace of the switch: all frames pass here.
    pub fn switch(&self) -> &NetNs {
        &self.switch
    }

    /// A directory that exists as long as the lab. Others may pass through, not look in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn private_directory() -> Result<PathBuf, LabError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("meshd-lab-{}-{next}", std::process::id()));
        // An earlier process of this number may have been killed and have left it.
        if !dir.exists() {
            make_directory(&dir)?;
            return Ok(dir);
        }
    }
}

/// Fails when the path exists, so nobody can have prepared it for us.
fn make_directory(dir: &Path) -> Result<(), LabError> {
    DirBuilder::new().mode(0o711).create(dir).map_err(io_error(format!("make the directory {}", dir.display())))
}

/// One host of a lab.
#[derive(Debug, Clone)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its first IPv4 address, in a /24.
    pub ipv4: Ipv4Addr,
    /// Its first IPv6 address, in a /64.
    pub ipv6: Ipv6Addr,
    netns: NetNs,
    dir: PathBuf,
}

impl Host {
    /// Its network namespace.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// Its directory: `state`, `run` and `meshd.toml` of its daemon, logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Runs `action` on this thread inside the host's namespace and comes back. Sockets opened there stay there.
    ///
    /// # Errors
    /// [`LabError::NetNs`]: it was not run.
    pub fn within<T>(&self, action: impl FnOnce() -> T) -> Result<T, LabError> {
        Ok(self.netns.run(action)?)
    }

    /// Another namespace as a host of its own, such as a container of this one: what runs there logs below this host's directory.
    ///
    /// # Errors
    /// [`LabError::Io`] when there is such a directory already.
    pub fn elsewhere(&self, name: &str, netns: NetNs, ipv4: Ipv4Addr) -> Result<Host, LabError> {
        let dir = self.dir.join(name);
        make_directory(&dir)?;
        Ok(Host { name: name.to_owned(), ipv4, ipv6: Ipv6Addr::UNSPECIFIED, netns, dir })
    }

    fn route(&self) -> Result<(Route, u32), LabError> {
        let mut route = self.netns.run(Route::open)?.map_err(network(format!("talk to {}", self.name)))?;
        let index = route.index(INTERFACE).map_err(network(format!("find the interface of {}", self.name)))?;
        Ok((route, index))
    }

    /// Gives the host an address, in a /24 or /64.
    ///
    /// # Errors
    /// [`LabError::Network`]
    pub fn add_address(&self, ip: IpAddr) -> Result<(), LabError> {
        let (mut route, index) = self.route()?;
        route.add_address(index, ip, prefix(ip)).map_err(network(format!("give {} the address {ip}", self.name)))
    }

    /// Takes an address away.
    ///
    /// # Errors
    /// [`LabError::Network`]
    pub fn delete_address(&self, ip: IpAddr) -> Result<(), LabError> {
        let (mut route, index) = self.route()?;
        route.delete_address(index, ip, prefix(ip)).map_err(network(format!("take the address {ip} from {}", self.name)))
    }

    /// Plugs the cable in.
    ///
    /// # Errors
    /// [`LabError::Network`]
    pub fn link_up(&self) -> Result<(), LabError> {
        let (mut route, index) = self.route()?;
        route.set_up(index).map_err(network(format!("plug {} in", self.name)))
    }

    /// Pulls the cable out. The IPv6 addresses are gone then, as the kernel has it.
    ///
    /// # Errors
    /// [`LabError::Network`]
    pub fn link_down(&self) -> Result<(), LabError> {
        let (mut route, index) = self.route()?;
        route.set_down(index).map_err(network(format!("unplug {}", self.name)))
    }

    /// A command with this host's daemon as its daemon: `program` is a meshd. Nothing of the caller's meshd settings is inherited.
    pub fn meshd(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MESHD_") {
                command.env_remove(name);
            }
        }
        command.env("MESHD_STATE_DIR", self.dir.join("state"));
        command.env("MESHD_RUN_DIR", self.dir.join("run"));
        command.env("MESHD_CONFIG", self.dir.join("meshd.toml"));
        command.env("MESHD_HOST_NAME", &self.name);
        command
    }

    /// Starts a process on this host. What it prints is in `<log>.log` in the host's directory. It dies with the calling *thread*.
    ///
    /// # Errors
    /// [`LabError::Io`] when it cannot be started.
    pub fn spawn(&self, command: &mut Command, log: &str) -> Result<Process, LabError> {
        self.spawn_with(command, Stdio::null(), log)
    }

    /// The same with something to read.
    ///
    /// # Errors
    /// As [`Host::spawn`].
    pub fn spawn_with(&self, command: &mut Command, stdin: Stdio, log: &str) -> Result<Process, LabError> {
        let what = command.get_program().to_string_lossy().into_owned();
        let path = self.dir.join(format!("{log}.log"));
        let file =
            File::options().append(true).create(true).open(&path).map_err(io_error(format!("write {}", path.display())))?;
        let error = file.try_clone().map_err(io_error("share a log file"))?;
        command.stdin(stdin).stdout(file).stderr(error);
        process::die_with_parent(command);
        let child = self.netns.run(|| command.spawn())?.map_err(io_error(format!("start {what} on {}", self.name)))?;
        Ok(Process { child, log: path })
    }

    /// Runs a command on this host to its end, or until `patience` is over and it is killed, and returns what it printed.
    ///
    /// # Errors
    /// [`LabError::Io`] when it cannot be started or took too long (`TimedOut`).
    pub fn output(&self, command: &mut Command, patience: Duration) -> Result<Output, LabError> {
        let what = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        process::die_with_parent(command);
        let mut child = self.netns.run(|| command.spawn())?.map_err(io_error(format!("start {what} on {}", self.name)))?;
        // Its pipes are drained meanwhile: it must not wait for us while we wait for it.
        let (out, err) = (child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            let out = scope.spawn(|| read_all(out));
            let err = scope.spawn(|| read_all(err));
            let status = wait(&mut child, patience).map_err(io_error(format!("wait for {what}")))?;
            let Some(status) = status else {
                let _ = child.kill();
                let _ = child.wait();
                let late = io::Error::new(io::ErrorKind::TimedOut, format!("no end after {} s", patience.as_secs_f32()));
                return Err(io_error(format!("run {what} on {}", self.name))(late));
            };
            Ok(Output { status, stdout: out.join().unwrap_or_default(), stderr: err.join().unwrap_or_default() })
        })
    }
}

fn prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 24 } else { 64 }
}

fn read_all(pipe: Option<impl io::Read>) -> Vec<u8> {
    let mut text = Vec::new();
    if let Some(mut pipe) = pipe {
        let _ = pipe.read_to_end(&mut text);
    }
    text
}

fn wait(child: &mut Child, patience: Duration) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > end {
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
}

/// A process on a host, killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Its process id, valid until it was waited for.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to end (SIGTERM) and waits until it has. `None`: it has not within `patience`, and goes on.
    ///
    /// # Errors
    /// [`LabError::Io`]
    pub fn stop(&mut self, patience: Duration) -> Result<Option<ExitStatus>, LabError> {
        if self.running() {
            process::terminate(&self.child).map_err(io_error("end a process"))?;
        }
        self.wait(patience)
    }

    /// Waits until it ends by itself. `None`: it has not within `patience`.
    ///
    /// # Errors
    /// [`LabError::Io`]
    pub fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>, LabError> {
        wait(&mut self.child, patience).map_err(io_error("wait for a process"))
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What it printed so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
