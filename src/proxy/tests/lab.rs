//! Two or more nodes in one process, over loopback addresses, with a kernel and a directory that tests write themselves.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use meshd_ca::identity::{NodeId, Workload};
use meshd_ca::keys::PrivateKey;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::PATIENCE;
use crate::control::front;
use crate::identity::svids::Svids;
use crate::identity::testing::{Mesh, TestIssuance, issued, name};
use crate::identity::tls::DataTls;
use crate::identity::verifier::{SvidVerifier, Trust};
use crate::proxy::edges::EdgeView;
use crate::proxy::inbound::Arrival;
use crate::proxy::live::Limits;
use crate::proxy::tunnel::{Input, Tunnel};
use crate::proxy::{Connecting, Directory, Kernel, Member, OwnPorts, Proxy, Settings, inbound, outbound};

pub(super) const A: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 1, 1));
pub(super) const B: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 1, 2));

/// The kernel and the directory of one node.
pub(super) struct World {
    ip: IpAddr,
    pub(super) destinations: Mutex<HashMap<SocketAddr, SocketAddr>>,
    pub(super) owner: Mutex<Option<Workload>>,
    pub(super) panics: AtomicBool,
    pub(super) refused: Mutex<Vec<SocketAddr>>,
    pub(super) connected: Mutex<Vec<(SocketAddr, SocketAddr)>>,
    pub(super) members: Mutex<HashMap<IpAddr, Member>>,
    pub(super) listeners: Mutex<HashMap<u16, Workload>>,
}

impl Kernel for World {
    fn original_dst(&self, app: &TcpStream) -> io::Result<SocketAddr> {
        let at = app.local_addr()?;
        self.destinations.lock().unwrap().get(&at).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
    fn owner(&self, _: SocketAddr, _: SocketAddr) -> Option<Workload> {
        assert!(!self.panics.load(Ordering::Relaxed), "a defect");
        self.owner.lock().unwrap().clone()
    }
    fn mesh_socket(&self, _: IpAddr) -> io::Result<TcpSocket> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(self.ip, 0))?;
        // As on a network: segments of 64 KiB, which only loopback has, are not sent into a smaller window.
        socket2::SockRef::from(&socket).set_tcp_mss(1448)?;
        Ok(socket)
    }
    fn connect_service(&self, client: SocketAddr, service: SocketAddr) -> Connecting {
        self.connected.lock().unwrap().push((client, service));
        Box::pin(async move {
            let socket = TcpSocket::new_v4()?;
            socket.bind(SocketAddr::new(client.ip(), 0))?;
            socket.connect(service).await
        })
    }
    fn refuse(&self, destination: SocketAddr) {
        self.refused.lock().unwrap().push(destination);
    }
    fn is_loopback(&self, ip: IpAddr) -> bool {
        ip == Ipv4Addr::LOCALHOST
    }
}

impl Directory for World {
    fn member_at(&self, ip: IpAddr) -> Option<Member> {
        self.members.lock().unwrap().get(&ip).copied()
    }
    fn is_own(&self, ip: IpAddr) -> bool {
        ip == self.ip
    }
    fn expected(&self, _: NodeId, _: SocketAddr) -> Option<Workload> {
        Some(Workload::Service("expected".into()))
    }
    fn listener(&self, service: SocketAddr) -> Option<Workload> {
        self.listeners.lock().unwrap().get(&service.port()).cloned()
    }
}

pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) ip: IpAddr,
    pub(super) name: String,
    pub(super) world: Arc<World>,
    pub(super) trust: Arc<ArcSwap<Trust>>,
    pub(super) verifier: Arc<SvidVerifier>,
    pub(super) issuance: Arc<TestIssuance>,
    pub(super) svids: Arc<Svids>,
    pub(super) proxy: Arc<Proxy>,
    pub(super) mesh: SocketAddr,
    pub(super) handshakes_failed: Arc<AtomicU64>,
}

impl Node {
    pub(super) fn unit(&self, unit: &str) -> Workload {
        Workload::Unit(name(&self.name), unit.into())
    }

    /// An address to which an application connects as if it were `destination`, captured.
    pub(super) async fn capture(&self, destination: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        self.world.destinations.lock().unwrap().insert(at, destination);
        tokio::spawn(outbound::accept(self.proxy.clone(), Arc::new(listener)));
        at
    }

    /// An application's captured connection to `destination`.
    pub(super) async fn dial(&self, destination: SocketAddr) -> TcpStream {
        TcpStream::connect(self.capture(destination).await).await.unwrap()
    }

    pub(super) fn edges(&self) -> Vec<EdgeView> {
        self.proxy.edges.snapshot(self.verifier.now())
    }

    pub(super) fn knows(&self, ip: IpAddr, node: NodeId, port: u16) {
        self.world.members.lock().unwrap().insert(ip, Member { node, port, restarting: false });
    }

    async fn new(mesh: &Mesh, key: &PrivateKey, name: &str, ip: IpAddr, lab: &Options) -> Self {
        let (trust, verifier) = mesh.verifier(true);
        let id = key.public().node_id();
        let issuance = Arc::new(mesh.issuance(id, lab.lifetime));
        let host = crate::identity::testing::name(name);
        let workloads = ["client", "server"].map(|u| Workload::Unit(host.clone(), u.into()));
        let svids = issued(id, &verifier, issuance.clone(), &workloads).await;
        let listener = TcpListener::bind(SocketAddr::new(ip, 0)).await.unwrap();
        let at = listener.local_addr().unwrap();
        let world = Arc::new(World {
            ip,
            destinations: Mutex::default(),
            owner: Mutex::new(Some(workloads[0].clone())),
            panics: AtomicBool::new(false),
            refused: Mutex::default(),
            connected: Mutex::default(),
            members: Mutex::default(),
            listeners: Mutex::default(),
        });
        let settings = Settings {
            ports: OwnPorts { mesh: at.port(), capture: 1, admin: Some(2) },
            dial: PATIENCE,
            handshake: PATIENCE,
            header: lab.header,
            keepalive: lab.keepalive,
            ahead: lab.ahead,
            hold: Duration::from_secs(2),
            ..Settings::default()
        };
        let proxy = Proxy::new(world.clone(), world.clone(), svids.clone(), verifier.clone(), settings, lab.limits);
        let handshakes_failed = Arc::new(AtomicU64::new(0));
        let looked_up = world.clone();
        let data = DataTls { svids: svids.clone(), listeners: Arc::new(move |a| Directory::listener(&*looked_up, a)) };
        tokio::spawn(door(listener, data, proxy.clone(), handshakes_failed.clone()));
        let name = name.to_owned();
        Self { id, ip, name, world, trust, verifier, issuance, svids, proxy, mesh: at, handshakes_failed }
    }
}

/// The mesh port, for data only.
async fn door(listener: TcpListener, data: DataTls, proxy: Arc<Proxy>, failed: Arc<AtomicU64>) {
    loop {
        let (tcp, from) = listener.accept().await.unwrap();
        let (data, proxy, failed) = (data.clone(), proxy.clone(), failed.clone());
        tokio::spawn(async move {
            let arrived_at = tcp.local_addr().unwrap();
            let shake = async {
                let mut input = Input::empty();
                let (_, name) = front::hello(&tcp, &mut input).await?;
                let chosen = data.choose(arrived_at, name.as_deref()).await.unwrap();
                let tunnel = Tunnel::answer(tcp, chosen.config, input).await?;
                io::Result::Ok(Arrival { tunnel, port: chosen.port, shown: chosen.shown })
            };
            match shake.await {
                Ok(tunnel) => inbound::serve(&proxy, tunnel, from).await,
                Err(_) => drop(failed.fetch_add(1, Ordering::Relaxed)),
            }
        });
    }
}

pub(super) struct Options {
    pub(super) lifetime: Duration,
    pub(super) limits: Limits,
    pub(super) header: Duration,
    pub(super) keepalive: Duration,
    /// Tunnels are dialled ahead: then there are more than were asked for.
    pub(super) ahead: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            lifetime: Duration::from_secs(72 * 3600),
            limits: Limits::default(),
            header: PATIENCE,
            keepalive: Settings::default().keepalive,
            ahead: false,
        }
    }
}

/// Two members that know each other.
pub(super) struct Lab {
    pub(super) mesh: Mesh,
    pub(super) a: Node,
    pub(super) b: Node,
}

pub(super) async fn lab() -> Lab {
    lab_with(Options::default()).await
}

pub(super) async fn lab_with(options: Options) -> Lab {
    let mut mesh = Mesh::found();
    let (ka, kb) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    mesh.admit(&ka, "a");
    mesh.admit(&kb, "b");
    let a = Node::new(&mesh, &ka, "a", A, &options).await;
    let b = Node::new(&mesh, &kb, "b", B, &options).await;
    a.knows(B, b.id, b.mesh.port());
    b.knows(A, a.id, a.mesh.port());
    Lab { mesh, a, b }
}

impl Lab {
    /// A service of unit `server` on node B.
    pub(super) async fn service(&self) -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind(SocketAddr::new(B, 0)).await.unwrap();
        let at = listener.local_addr().unwrap();
        self.b.world.listeners.lock().unwrap().insert(at.port(), self.b.unit("server"));
        (listener, at)
    }
}

/// How often connections of an edge failed for a reason.
pub(super) fn failures(edge: &EdgeView, reason: &str) -> u64 {
    [&edge.figures.unsecured, &edge.figures.broken].iter().filter_map(|f| f.get(reason)).sum()
}

/// Tries until it holds, for a few seconds.
pub(super) async fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}
