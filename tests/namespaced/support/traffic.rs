//! Plain TCP between hosts of a lab, as an application does it that knows nothing of a mesh.
//!
//! Sockets are made inside a host's namespace and used from any thread. Everything has a time limit.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd::demo::lab::Host;
use socket2::{Domain, Protocol, Socket, Type};

/// How long one read, write or connect may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Both addresses of a host.
pub(crate) fn addresses(host: &Host) -> [IpAddr; 2] {
    [host.ipv4.into(), host.ipv6.into()]
}

/// Both addresses of a host with a port.
pub(crate) fn sockets(host: &Host, port: u16) -> [SocketAddr; 2] {
    addresses(host).map(|ip| SocketAddr::new(ip, port))
}

/// Connects from `host`.
pub(crate) fn connect(host: &Host, to: SocketAddr) -> io::Result<TcpStream> {
    connect_within(host, to, PATIENCE)
}

/// Connects from `host`, or gives up after `patience`.
pub(crate) fn connect_within(host: &Host, to: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    // The socket belongs to the namespace it is made in; waiting is done outside.
    let socket =
        host.within(|| Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))).map_err(io::Error::other)??;
    socket.connect_timeout(&to.into(), patience)?;
    limited(socket.into())
}

/// Connects from `host` with the client port `port`.
pub(crate) fn connect_from(host: &Host, port: u16, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = host
        .within(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            socket.bind(&SocketAddr::new(any, port).into())?;
            Ok::<_, io::Error>(socket)
        })
        .map_err(io::Error::other)??;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    limited(socket.into())
}

fn limited(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends a line and reads until the end.
pub(crate) fn ask(host: &Host, to: SocketAddr, question: &str) -> io::Result<String> {
    let mut stream = connect(host, to)?;
    stream.write_all(question.as_bytes())?;
    stream.write_all(b"\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Echoes on `listener` in tasks of the runtime around, for as long as that lives.
pub(crate) fn echo_all(listener: std::net::TcpListener) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    Ok(())
}

/// A listener of `host` on all its addresses, for a runtime of the caller's.
pub(crate) fn listen(host: &Host, port: u16) -> Result<TcpListener> {
    let listener = host.within(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from(([0u16; 8], port)).into())?;
        socket.listen(4096)?;
        socket.set_nonblocking(true)?;
        Ok::<_, io::Error>(TcpListener::from(socket))
    })?;
    listener.with_context(|| format!("listen on port {port}"))
}

/// A connection from `host`, of the caller's runtime.
pub(crate) async fn dial(host: &Host, to: SocketAddr) -> Result<tokio::net::TcpStream> {
    let socket = host.within(|| match to {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4(),
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6(),
    })??;
    socket.connect(to).await.with_context(|| format!("connect to {to}"))
}

/// A server on a host: one thread, and one more for each connection. Stops accepting when dropped.
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    clients: Arc<Mutex<Vec<SocketAddr>>>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on all addresses of `host`, both families, and gives each connection to `serve`.
    pub(crate) fn start(
        host: &Host,
        port: u16,
        serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Result<Server> {
        Server::on(host, SocketAddr::new(IpAddr::from([0; 16]), port), serve)
    }

    /// Listens on one address of `host`.
    pub(crate) fn on(
        host: &Host,
        address: SocketAddr,
        serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Result<Server> {
        let listener = host.within(|| {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(4096)?;
            Ok::<_, io::Error>(TcpListener::from(socket))
        })?;
        let listener = listener.with_context(|| format!("listen on {address}"))?;
        listener.set_nonblocking(true)?;
        let (stop, clients) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (stopped, seen, serve) = (stop.clone(), clients.clone(), Arc::new(serve));
        let accepting = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, from)) => {
                        seen.lock().unwrap().push(SocketAddr::new(from.ip().to_canonical(), from.port()));
                        let serve = serve.clone();
                        let _ = std::thread::Builder::new().stack_size(128 * 1024).spawn(move || {
                            let _ = stream.set_nonblocking(false).and_then(|()| limited(stream)).and_then(|s| serve(s));
                        });
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Ok(Server { stop, clients, accepting: Some(accepting) })
    }

    /// Answers every line with `prefix` and the line, and hangs up.
    pub(crate) fn answering(host: &Host, port: u16, prefix: &str) -> Result<Server> {
        let prefix = prefix.to_owned();
        Server::start(host, port, move |mut stream| {
            let line = read_line(&mut stream)?;
            stream.write_all(format!("{prefix}{line}").as_bytes())
        })
    }

    /// Sends back what it gets, until the end.
    pub(crate) fn echo(host: &Host, port: u16) -> Result<Server> {
        Server::patient_echo(host, port, PATIENCE)
    }

    /// The same, for clients that are silent for up to `patience`.
    pub(crate) fn patient_echo(host: &Host, port: u16, patience: Duration) -> Result<Server> {
        Server::start(host, port, move |mut stream| {
            stream.set_read_timeout(Some(patience))?;
            let mut buffer = vec![0; 16 * 1024];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(()),
                    n => stream.write_all(&buffer[..n])?,
                }
            }
        })
    }

    /// The addresses of the clients so far, as an application sees them.
    pub(crate) fn clients(&self) -> Vec<SocketAddr> {
        self.clients.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
    }
}

/// Reads up to and without a line feed.
pub(crate) fn read_line(stream: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < 64 * 1024 {
        stream.read_exact(&mut byte)?;
        if byte == [b'\n'] {
            break;
        }
        line.push(byte[0]);
    }
    String::from_utf8(line).map_err(io::Error::other)
}

/// Sends a word to an echo server over an open connection and expects it back.
pub(crate) fn echo(stream: &mut TcpStream, word: &str) -> Result<()> {
    stream.write_all(word.as_bytes()).context("write")?;
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer).context("read the echo")?;
    ensure!(answer == word.as_bytes(), "another echo came back");
    Ok(())
}

/// Bytes that are different at every place: 8-byte counters, mixed.
pub(crate) struct Pattern(u64);

impl Pattern {
    /// One that `seed` tells from others.
    pub(crate) fn new(seed: u64) -> Pattern {
        Pattern(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The next bytes. The length is a multiple of 8.
    pub(crate) fn fill(&mut self, block: &mut [u8]) {
        for word in block.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&(self.0 ^ (self.0 >> 29)).to_le_bytes());
        }
    }
}

const BLOCK: usize = 64 * 1024;

/// Sends `blocks` blocks of 64 KiB of a pattern.
pub(crate) fn send_pattern(stream: &mut TcpStream, seed: u64, blocks: u64) -> io::Result<()> {
    let (mut pattern, mut block) = (Pattern::new(seed), vec![0; BLOCK]);
    for _ in 0..blocks {
        pattern.fill(&mut block);
        stream.write_all(&block)?;
    }
    Ok(())
}

/// Receives `blocks` blocks and compares every byte with the pattern.
pub(crate) fn expect_pattern(stream: &mut TcpStream, seed: u64, blocks: u64) -> io::Result<()> {
    let (mut pattern, mut expected, mut block) = (Pattern::new(seed), vec![0; BLOCK], vec![0; BLOCK]);
    for number in 0..blocks {
        pattern.fill(&mut expected);
        stream.read_exact(&mut block)?;
        if block != expected {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("block {number} was changed on the way")));
        }
    }
    Ok(())
}
