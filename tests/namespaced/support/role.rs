//! This test program as a process of its own: the smallest server and the smallest client, for scenarios about processes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use seccompiler::{BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule};

/// The first argument that makes this program play a role.
pub(crate) const WORD: &str = "play-role";

/// A process that listens on `address`, greets everyone with `greeting` and hangs up.
pub(crate) fn greeter(address: SocketAddr, greeting: &str) -> Command {
    command(&["greet", &address.to_string(), greeting])
}

/// A process that listens on `address` and answers every HTTP request with a short text.
pub(crate) fn web(address: SocketAddr) -> Command {
    command(&["web", &address.to_string()])
}

/// A process that listens on `address` and accepts, but never reads nor writes.
pub(crate) fn deaf(address: SocketAddr) -> Command {
    command(&["deaf", &address.to_string()])
}

/// A process that connects to `address` and prints what it hears until the end.
pub(crate) fn listener(address: SocketAddr) -> Command {
    command(&["hear", &address.to_string()])
}

/// A process that opens `count` connections to a Unix socket, says so, and sends a byte on each now and then.
pub(crate) fn holder(socket: &Path, count: usize) -> Command {
    command(&["hold", &socket.to_string_lossy(), &count.to_string()])
}

/// `inner` in a sandbox that forbids netlink, as a systemd unit has it whose `RestrictAddressFamilies=` does not name AF_NETLINK.
pub(crate) fn without_netlink(inner: &Command) -> Command {
    let mut command = command(&["without-netlink"]);
    command.arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap_or_default());
    command.arg(WORD).args(words);
    command
}

/// Plays the role that `words` say.
pub(crate) fn run(words: &[String]) -> ExitCode {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["greet", address, greeting] => greet(address, greeting),
        ["web", address] => serve(address),
        ["deaf", address] => sit(address),
        ["hear", address] => hear(address),
        ["hold", socket, count] => hold(socket, count),
        ["without-netlink", program, words @ ..] => {
            Err(forbid_netlink().err().unwrap_or_else(|| Command::new(program).args(words).exec()))
        }
        _ => Err(std::io::Error::other("no such role")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn forbid_netlink() -> std::io::Result<()> {
    let family = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::AF_NETLINK as u64);
    let rule = family.and_then(|c| SeccompRule::new(vec![c])).map_err(std::io::Error::other)?;
    let refused = SeccompAction::Errno(libc::EAFNOSUPPORT as u32);
    let processor = std::env::consts::ARCH.try_into().map_err(std::io::Error::other)?;
    let filter = SeccompFilter::new([(libc::SYS_socket, vec![rule])].into(), SeccompAction::Allow, refused, processor);
    let program: BpfProgram = filter.and_then(TryInto::try_into).map_err(std::io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(std::io::Error::other)
}

fn greet(address: &str, greeting: &str) -> std::io::Result<()> {
    let listener = TcpListener::bind(address)?;
    loop {
        let (mut stream, _) = listener.accept()?;
        let _ = stream.write_all(greeting.as_bytes());
    }
}

fn serve(address: &str) -> std::io::Result<()> {
    let listener = TcpListener::bind(address)?;
    loop {
        let (mut stream, _) = listener.accept()?;
        let (mut request, mut some) = (Vec::new(), [0; 1024]);
        while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < 64 * 1024 {
            match stream.read(&mut some) {
                Ok(n) if n > 0 => request.extend_from_slice(&some[..n]),
                _ => break,
            }
        }
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n");
    }
}

fn sit(address: &str) -> std::io::Result<()> {
    let listener = TcpListener::bind(address)?;
    let mut open = Vec::new();
    loop {
        open.push(listener.accept()?);
    }
}

fn hold(socket: &str, count: &str) -> std::io::Result<()> {
    let count: usize = count.parse().map_err(std::io::Error::other)?;
    let mut open: Vec<UnixStream> = (0..count).map(|_| UnixStream::connect(socket)).collect::<Result<_, _>>()?;
    println!("holding");
    loop {
        // Those that were closed meanwhile are opened again.
        for stream in &mut open {
            if stream.write_all(b"P").is_err() {
                *stream = UnixStream::connect(socket)?;
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

fn hear(address: &str) -> std::io::Result<()> {
    let mut heard = String::new();
    TcpStream::connect(address)?.read_to_string(&mut heard)?;
    println!("{heard}");
    Ok(())
}
