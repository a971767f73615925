//! What carries the connections: nothing, meshd, relays to compare with, and what people use today. Each is started anew on both hosts for
//! each round, with two threads or processes where it lets one choose, and mutual TLS 1.3 that is verified at both ends.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use meshd::demo::lab::{Host, Lab, Process};
use tokio::time::Instant;

use crate::certificates::NAME;
use crate::processes::Side;
use crate::serve::{ANSWER_ONCE, REPLY, REQUEST};

/// Where the service listens, where clients find a proxy that is not transparent, and where that one finds its peer.
const SERVICE: u16 = 9000;
const NEAR: u16 = 9100;
const FAR: u16 = 9443;
/// How long one may take until it carries a connection.
const READY: Duration = Duration::from_secs(30);

/// One way to carry connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Plane {
    /// Nothing in between.
    Direct,
    /// A relay on each host that only copies.
    Relay,
    /// The simplest relay with mutual TLS that meshd's own libraries make.
    Reference,
    /// meshd.
    Meshd,
    /// HAProxy on both hosts.
    Haproxy,
    /// nginx's stream module on both hosts.
    Nginx,
    /// stunnel on both hosts.
    Stunnel,
}

/// What planes are started with.
pub(crate) struct World {
    /// Two hosts: the client's, the service's.
    pub(crate) lab: Lab,
    /// This program, which has the service, the relays and the load in it.
    pub(crate) me: PathBuf,
    /// The meshd to measure.
    pub(crate) meshd: PathBuf,
    /// Certificates for the others.
    pub(crate) certificates: PathBuf,
}

/// A plane at work.
pub(crate) struct Running {
    /// Where clients connect.
    pub(crate) target: SocketAddr,
    /// What it runs on the client's host.
    pub(crate) client: Side,
    /// What it runs on the service's host.
    pub(crate) server: Side,
    // In this order: what is in between ends before the service.
    between: Vec<Process>,
    _service: Process,
}

impl Plane {
    /// What is missing to start it.
    pub(crate) fn missing(self, world: &World) -> Option<String> {
        let needs: &[(&str, &str)] = match self {
            Self::Direct | Self::Relay | Self::Reference => &[],
            Self::Meshd => return (!world.meshd.exists()).then(|| format!("{} is not there", world.meshd.display())),
            Self::Haproxy => &[("haproxy", "haproxy")],
            Self::Nginx => &[("nginx", "nginx-light"), (NGINX_STREAM, "libnginx-mod-stream")],
            Self::Stunnel => &[("stunnel", "stunnel4")],
        };
        needs.iter().find(|(file, _)| find(file).is_none()).map(|(file, package)| format!("no {file}: apt install {package}"))
    }

    /// Starts it, and the service behind it, and waits until it carries a connection.
    ///
    /// # Errors
    /// When it does not within half a minute; with what it printed.
    pub(crate) fn start(self, world: &World) -> Result<Running> {
        let [a, b] = world.lab.hosts() else { bail!("two hosts") };
        let mut serve = Command::new(&world.me);
        serve.args(["role", "serve"]).arg(format!("0.0.0.0:{SERVICE}"));
        let service = b.spawn(&mut serve, "service")?;
        let (near, far) = (SocketAddr::from((Ipv4Addr::LOCALHOST, NEAR)), SocketAddr::from((b.ipv4, FAR)));
        let behind = SocketAddr::from((Ipv4Addr::LOCALHOST, SERVICE));
        let mut target = near;
        let between = match self {
            Self::Direct => {
                target = (b.ipv4, SERVICE).into();
                Vec::new()
            }
            Self::Meshd => {
                target = (b.ipv4, SERVICE).into();
                mesh(world, a, b, target)?
            }
            Self::Relay => vec![relay(world, a, near, far, "none")?, relay(world, b, far, behind, "none")?],
            Self::Reference => vec![relay(world, a, near, far, "out")?, relay(world, b, far, behind, "in")?],
            Self::Haproxy | Self::Nginx | Self::Stunnel => {
                let at = |host: &Host, from, to, out| self.proxy(world, host, from, to, out);
                vec![at(a, near, far, true)?, at(b, far, behind, false)?]
            }
        };
        let sides = match &between[..] {
            [client, server] => (Side(vec![client.pid()]), Side(vec![server.pid()])),
            _ => (Side::default(), Side::default()),
        };
        let running = Running { target, client: sides.0, server: sides.1, between, _service: service };
        running.until_ready(a)?;
        Ok(running)
    }

    fn proxy(self, world: &World, host: &Host, from: SocketAddr, to: SocketAddr, out: bool) -> Result<Process> {
        let c = world.certificates.display();
        let dir = host.dir().display();
        let (name, text) = match (self, out) {
            (Self::Haproxy, true) => (
                "haproxy",
                format!(
                    "{HAPROXY}bind {from}\nserver there {to} ssl crt {c}/both.pem ca-file {c}/ca.pem verify required verifyhost {NAME} sni str({NAME}) ssl-min-ver TLSv1.3\n"
                ),
            ),
            (Self::Haproxy, false) => (
                "haproxy",
                format!(
                    "{HAPROXY}bind {from} ssl crt {c}/both.pem ca-file {c}/ca.pem verify required ssl-min-ver TLSv1.3\nserver there {to}\n"
                ),
            ),
            (Self::Nginx, true) => (
                "nginx",
                nginx(
                    &dir.to_string(),
                    &format!(
                        "listen {from}; proxy_pass {to}; proxy_ssl on; proxy_ssl_protocols TLSv1.3; proxy_ssl_certificate {c}/cert.pem; proxy_ssl_certificate_key {c}/key.pem; proxy_ssl_trusted_certificate {c}/ca.pem; proxy_ssl_verify on; proxy_ssl_name {NAME};"
                    ),
                ),
            ),
            (Self::Nginx, false) => (
                "nginx",
                nginx(
                    &dir.to_string(),
                    &format!(
                        "listen {from} ssl; proxy_pass {to}; ssl_protocols TLSv1.3; ssl_certificate {c}/cert.pem; ssl_certificate_key {c}/key.pem; ssl_client_certificate {c}/ca.pem; ssl_verify_client on;"
                    ),
                ),
            ),
            (_, true) => (
                "stunnel",
                format!(
                    "{STUNNEL}client = yes\naccept = {from}\nconnect = {to}\ncert = {c}/both.pem\nCAfile = {c}/ca.pem\nverifyChain = yes\ncheckHost = {NAME}\n"
                ),
            ),
            (_, false) => (
                "stunnel",
                format!(
                    "{STUNNEL}accept = {from}\nconnect = {to}\ncert = {c}/both.pem\nCAfile = {c}/ca.pem\nverifyChain = yes\n"
                ),
            ),
        };
        let file = host.dir().join(format!("{name}.conf"));
        std::fs::write(&file, text)?;
        let mut command = Command::new(find(name).with_context(|| format!("no {name}"))?);
        match name {
            "haproxy" => command.args(["-db", "-f"]).arg(&file),
            "nginx" => command.arg("-c").arg(&file).arg("-p").arg(host.dir()),
            _ => command.arg(&file),
        };
        Ok(host.spawn(&mut command, name)?)
    }
}

const HAPROXY: &str =
    "global\nmaxconn 9000\nnbthread 2\ndefaults\nmode tcp\ntimeout connect 5s\ntimeout client 1h\ntimeout server 1h\nlisten l\n";
const STUNNEL: &str = "foreground = yes\npid =\ndebug = 3\n[l]\nsslVersion = TLSv1.3\n";
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

fn nginx(dir: &str, server: &str) -> String {
    format!(
        "load_module {NGINX_STREAM};\nuser root;\ndaemon off;\nworker_processes 2;\nworker_rlimit_nofile 65536;\npid {dir}/nginx.pid;\nerror_log {dir}/nginx-error.log;\n\
         events {{ worker_connections 20000; }}\nstream {{ server {{ {server} proxy_timeout 1h; tcp_nodelay on; }} }}\n"
    )
}

/// Where a program or file is.
fn find(name: &str) -> Option<PathBuf> {
    if name.starts_with('/') {
        return Some(PathBuf::from(name)).filter(|p| p.exists());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    places.map(|place| place.join(name)).find(|file| file.exists())
}

fn relay(world: &World, host: &Host, listen: SocketAddr, to: SocketAddr, tls: &str) -> Result<Process> {
    let mut command = Command::new(&world.me);
    command.args(["role", "relay", &listen.to_string(), &to.to_string(), "--tls", tls]).arg(&world.certificates);
    Ok(host.spawn(&mut command, "relay")?)
}

/// A mesh of the two hosts, as a person makes it.
fn mesh(world: &World, a: &Host, b: &Host, service: SocketAddr) -> Result<Vec<Process>> {
    let cli = |host: &Host, words: &[&str]| -> Result<String> {
        let output = host.output(host.meshd(&world.meshd).args(words), READY)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(output.status.success(), "meshd {} on {}: {}", words[0], host.name, text(&output.stderr));
        Ok(text(&output.stdout))
    };
    let mut daemons = Vec::new();
    for host in [a, b] {
        std::fs::remove_dir_all(host.dir().join("state"))
            .or_else(|e| if e.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
        daemons.push(host.spawn(host.meshd(&world.meshd).arg("run"), "meshd")?);
        if host.name == a.name {
            patiently(|| cli(a, &["status"]).map(|_| ()))?;
        }
    }
    let token = cli(a, &["token", "create"])?;
    patiently(|| cli(b, &["join", token.trim()]).map(|_| ()))?;
    patiently(|| cli(a, &["resolve", &service.to_string()]).map(|_| ()))?;
    Ok(daemons)
}

fn patiently<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + READY;
    loop {
        match attempt() {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(100)),
            done => return done,
        }
    }
}

impl Running {
    fn until_ready(&self, client: &Host) -> Result<()> {
        let once = || -> Result<()> {
            let mut stream = client.within(|| TcpStream::connect_timeout(&self.target, Duration::from_secs(2)))??;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            stream.write_all(&[ANSWER_ONCE])?;
            stream.write_all(&[b'?'; REQUEST])?;
            Ok(stream.read_exact(&mut [0; REPLY])?)
        };
        patiently(once).with_context(|| self.between.iter().map(Process::log).collect::<String>())
    }
}

/// The daemon of a mesh is stopped as its users stop it; the others are killed when they are dropped.
impl Drop for Running {
    fn drop(&mut self) {
        for process in &mut self.between {
            let _ = process.stop(Duration::from_secs(20));
        }
    }
}

/// Where this program lies, and the meshd beside it.
///
/// # Errors
/// When the system does not tell.
pub(crate) fn programs() -> Result<(PathBuf, PathBuf)> {
    let me = std::env::current_exe()?;
    let meshd = me.parent().unwrap_or(Path::new("")).join("meshd");
    Ok((me, meshd))
}
