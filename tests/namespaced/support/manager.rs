//! A service manager for one daemon, as far as the daemon can tell: it is told things on a socket and keeps descriptors.
//!
//! The protocols are those of sd_notify(3) and sd_listen_fds(3), with real sockets and a real process.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::time::Instant;

use super::mesh::MESHD;

/// Stands in for systemd.
pub(crate) struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    /// What the daemon had kept: name and descriptor.
    pub(crate) kept: Vec<(String, OwnedFd)>,
    /// Every line the daemon said, in order.
    pub(crate) said: Vec<String>,
    /// `WATCHDOG_USEC`.
    pub(crate) watchdog: Option<Duration>,
}

impl Manager {
    /// Listens in `dir`.
    pub(crate) fn new(dir: &Path) -> Result<Manager> {
        let path = dir.join("notify");
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path)?;
        Ok(Manager { socket, path, kept: Vec::new(), said: Vec::new(), watchdog: None })
    }

    /// `meshd`, a command that starts the daemon, as a service of this manager: the command, and what has to be its standard input.
    pub(crate) fn service(&mut self, meshd: &Command) -> Result<(Command, Stdio)> {
        self.said.clear();
        let mut command = Command::new("/bin/sh");
        // What was kept arrives as descriptor 3, where the daemon looks for it.
        let (script, stdin) = match self.kept.first() {
            None => ("exec \"$@\"".to_owned(), Stdio::null()),
            Some((name, fd)) => {
                ensure!(self.kept.len() == 1, "only one descriptor can be handed over here");
                let listen = format!("export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES={name}; exec \"$@\" 3<&0 </dev/null");
                (listen, Stdio::from(fd.try_clone()?))
            }
        };
        command.arg("-c").arg(script).arg("service").arg(meshd.get_program()).args(meshd.get_args());
        for (name, value) in meshd.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.env("NOTIFY_SOCKET", &self.path);
        if let Some(period) = self.watchdog {
            command.env("WATCHDOG_USEC", period.as_micros().to_string());
        }
        Ok((command, stdin))
    }

    /// Reads what the daemon says for a time, or until it has said the line `until`; whether it has.
    pub(crate) fn listen(&mut self, lasts: Duration, until: Option<&str>) -> Result<bool> {
        let end = Instant::now() + lasts;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.socket.set_read_timeout(Some(left))?;
            let mut text = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut text)];
            let bytes = match recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) => got.bytes,
                Err(Errno::AGAIN) => continue,
                Err(e) => return Err(e.into()),
            };
            let mut fds: Vec<OwnedFd> = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            let lines: Vec<String> = String::from_utf8_lossy(&text[..bytes]).lines().map(str::to_owned).collect();
            let has = |line: &str| lines.iter().any(|l| l == line);
            let name = lines.iter().find_map(|l| l.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
            if has("FDSTORE=1") {
                self.kept.extend(fds.pop().map(|fd| (name, fd)));
            } else if has("FDSTOREREMOVE=1") {
                self.kept.retain(|(kept, _)| *kept != name);
            }
            let over = until.is_some_and(has);
            self.said.extend(lines);
            if over {
                return Ok(true);
            }
        }
    }

    /// Waits for a line.
    pub(crate) fn until(&mut self, line: &str, patience: Duration) -> Result<()> {
        ensure!(self.listen(patience, Some(line))?, "the daemon did not say {line} within {patience:?}, only {:?}", self.said);
        Ok(())
    }

    /// Where in what was said the line first is.
    pub(crate) fn position(&self, line: &str) -> Option<usize> {
        self.said.iter().position(|l| l == line)
    }
}

/// The command that starts the daemon of `host`, with what `before` says in front of it.
pub(crate) fn daemon(host: &meshd::demo::lab::Host, before: &[&str]) -> Command {
    let meshd = host.meshd(Path::new(MESHD));
    let words: Vec<&str> = before.iter().copied().chain([MESHD, "run"]).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    for (name, value) in meshd.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}
