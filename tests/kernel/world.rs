//! Two hosts on a link, and traffic between them.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use libtest_mimic::Failed;
use meshd::intercept::netns::NetNs;
use meshd::intercept::nft::Condition;
use meshd::intercept::rtnetlink::Route;
use meshd::intercept::{Capture, ROUTE_TABLE, RuleConfig};

pub(crate) type Outcome = Result<(), Box<dyn std::error::Error>>;

pub(crate) struct Test {
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [Need],
    pub(crate) run: fn() -> Outcome,
}

/// What a test needs beyond namespaces.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Root of the machine and control groups that can be made.
    Cgroups,
    /// Root of the machine.
    Root,
    /// The program `nft`.
    Nft,
}

/// First word of the command line of a child of a test.
pub(crate) const CHILD: &str = "--child";

pub(crate) fn missing(needs: &[Need], privileged: bool) -> Option<String> {
    needs.iter().find_map(|need| match need {
        Need::Root | Need::Cgroups if !privileged => Some("needs real root".into()),
        Need::Root => None,
        Need::Cgroups => super::owners::cannot_make_groups(),
        Need::Nft => output(Command::new("nft").arg("--version")).err().map(|_| "needs the program nft (nftables)".into()),
    })
}

/// Tests change the namespace of their thread; the runner's own threads must not.
pub(crate) fn in_own_thread(run: fn() -> Outcome) -> Result<(), Failed> {
    let result = std::thread::spawn(move || run().map_err(|e| e.to_string())).join();
    match result {
        Ok(result) => result.map_err(Failed::from),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough for a packet, short enough to wait for nothing.
pub(crate) const MOMENT: Duration = Duration::from_millis(400);

/// Held while a child is made. Between fork and exec a child has copies of all our sockets, and a table lives as long as any
/// copy of the socket that owns it.
static FORKING: Mutex<()> = Mutex::new(());

/// Starts a child. Nothing else may start one.
pub(crate) fn spawn(command: &mut Command) -> io::Result<Child> {
    let _forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Runs a program to its end.
pub(crate) fn output(command: &mut Command) -> io::Result<Output> {
    spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?.wait_with_output()
}

/// What the death of the process does to the rules: their socket is closed.
pub(crate) fn crash(capture: Capture) {
    let _forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
    drop(capture);
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// A host with an address of each family.
pub(crate) struct Host {
    pub(crate) netns: NetNs,
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
    /// A second address, for a stranger or a neighbour.
    pub(crate) other: IpAddr,
}

/// Two hosts, one link.
pub(crate) struct World {
    pub(crate) a: Host,
    pub(crate) b: Host,
}

impl World {
    pub(crate) fn new() -> World {
        let host = |n: u8| Host {
            netns: NetNs::create().expect("a namespace"),
            v4: ip(&format!("10.77.0.{n}")),
            v6: ip(&format!("fd77::{n}")),
            other: ip(&format!("10.77.0.1{n}")),
        };
        let (a, b) = (host(1), host(2));
        a.run(|| Route::open().unwrap().add_veth("wire", "wire", Some(b.netns.as_fd())).unwrap());
        for host in [&a, &b] {
            host.run(|| {
                let mut route = Route::open().unwrap();
                let wire = route.index("wire").unwrap();
                route.set_up(wire).unwrap();
            });
        }
        for host in [&a, &b] {
            host.run(|| {
                let mut route = Route::open().unwrap();
                let wire = route.index("wire").unwrap();
                // IPv6 sets an interface up anew when its carrier comes, and takes its addresses away for a moment.
                while !route.links().unwrap().iter().any(|link| link.index == wire && link.is_running()) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                route.add_address(wire, host.v4, 24).unwrap();
                route.add_address(wire, host.other, 24).unwrap();
                route.add_address(wire, host.v6, 64).unwrap();
                // Until then the kernel does not take it for an address of its own, and rules that ask get a no.
                while route.addresses().unwrap().iter().any(|a| a.index == wire && a.is_tentative()) {
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
        }
        World { a, b }
    }
}

impl Host {
    pub(crate) fn run<T>(&self, f: impl FnOnce() -> T) -> T {
        self.netns.run(f).expect("to enter the namespace")
    }

    pub(crate) fn addresses(&self) -> [IpAddr; 2] {
        [self.v4, self.v6]
    }

    pub(crate) fn install(&self, config: &RuleConfig) -> Capture {
        self.run(|| Capture::install(config)).expect("to install")
    }

    pub(crate) fn listen(&self, ip: IpAddr, port: u16) -> TcpListener {
        self.run(|| TcpListener::bind(at(ip, port))).expect("to listen")
    }

    pub(crate) fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&to, PATIENCE))
    }

    /// Connects from one of several own addresses.
    pub(crate) fn connect_from(&self, from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        self.run(|| {
            let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
            socket.bind(&at(from, 0).into())?;
            socket.connect_timeout(&to.into(), PATIENCE)?;
            Ok(socket.into())
        })
    }

    pub(crate) fn verify(&self, capture: &Capture) -> Condition {
        self.run(|| capture.verify()).expect("to verify")
    }

    /// Nothing of meshd is left in the kernel.
    pub(crate) fn assert_clean(&self) {
        self.run(|| {
            assert!(!meshd::intercept::nft::cleanup().expect("to look"), "something was left");
            let mut route = Route::open().unwrap();
            assert_eq!(route.has_policy_route().unwrap(), (false, false));
            assert!(route.routes().unwrap().iter().all(|r| r.table != ROUTE_TABLE));
        });
    }
}

/// Accepts within a time.
pub(crate) fn accept(listener: &TcpListener, patience: Duration) -> Option<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true).unwrap();
    let step = Duration::from_millis(5);
    let mut left = patience;
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return Some((stream, peer));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && left > step => {
                std::thread::sleep(step);
                left -= step;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
            Err(e) => panic!("accept: {e}"),
        }
    }
}

/// Both directions carry bytes.
pub(crate) fn talk(one: &mut TcpStream, two: &mut TcpStream) -> io::Result<()> {
    let mut buffer = [0; 4];
    one.set_read_timeout(Some(PATIENCE))?;
    two.set_read_timeout(Some(PATIENCE))?;
    one.write_all(b"ping")?;
    two.read_exact(&mut buffer)?;
    assert_eq!(&buffer, b"ping");
    two.write_all(b"pong")?;
    one.read_exact(&mut buffer)?;
    assert_eq!(&buffer, b"pong");
    Ok(())
}

pub(crate) fn assert_refused(result: io::Result<TcpStream>, what: &str) {
    match result {
        Err(e) => assert_eq!(e.kind(), io::ErrorKind::ConnectionRefused, "{what}"),
        Ok(_) => panic!("{what}: connected"),
    }
}
