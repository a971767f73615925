//! Two members of a mesh in one process, with everything of the data plane but the kernel's rules.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use meshd::identity::provider;
use meshd::identity::svids::{Issuance, Patience, Svids};
use meshd::identity::tls::DataTls;
use meshd::identity::verifier::{SvidVerifier, Trust};
use meshd::proxy::inbound::{self, Arrival};
use meshd::proxy::live::Limits;
use meshd::proxy::tunnel::{Input, Tunnel};
use meshd::proxy::{Connecting, Directory, Kernel, Member, OwnPorts, Proxy, Settings, socket};
use meshd_ca::identity::{HostName, MeshId, NodeId, SpiffeId, TrustDomain, Workload};
use meshd_ca::issue::{Issuer, Leaf};
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::Roster;
use meshd_ca::time::UnixTime;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Mesh time: it does not go on, so that nothing is renewed in between.
pub(crate) const NOW: UnixTime = UnixTime(1_800_000_000);
const YEAR: Duration = Duration::from_secs(365 * 86_400);
/// Where the members are.
const AT: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(127, 0, 1, 1)), IpAddr::V4(Ipv4Addr::new(127, 0, 1, 2))];

/// The trust of the mesh and what its authority signs.
pub(crate) struct Mesh {
    issuer: Issuer,
    pub(crate) roster: Roster,
    pub(crate) keys: Vec<PrivateKey>,
}

impl Mesh {
    /// A mesh of so many members, the first of which is the authority.
    pub(crate) fn of(members: usize) -> Result<Arc<Self>> {
        let keys = (0..members).map(|_| PrivateKey::generate()).collect::<Result<Vec<_>, _>>()?;
        let mesh = MeshId::from_bytes([7; 10]);
        let domain = TrustDomain::of(mesh);
        let issuer = Issuer::create(&domain, keys[0].public().node_id(), NOW, YEAR)?;
        let mut roster = Roster::found(mesh, domain, &keys[0], name(0), issuer.root_der().to_vec(), NOW)?;
        for (number, key) in keys.iter().enumerate().skip(1) {
            roster.admit(&keys[0], key.public(), &name(number), NOW)?;
        }
        Ok(Arc::new(Self { issuer, roster, keys }))
    }

    /// Member number so.
    pub(crate) fn node(&self, number: usize) -> NodeId {
        self.keys[number].public().node_id()
    }

    /// A certificate for a unit of a member.
    pub(crate) fn leaf(&self, number: usize) -> Result<Leaf> {
        let id = SpiffeId::new(self.roster.trust_domain().clone(), unit(number));
        Ok(self.issuer.issue(&id, self.keys[number].public(), self.node(number), YEAR / 365, NOW)?)
    }

    /// A verifier that puts AES first, or ChaCha20.
    pub(crate) fn verifier(&self, aes: bool) -> Arc<SvidVerifier> {
        let trust = Trust::from(Arc::new(self.roster.clone()));
        Arc::new(SvidVerifier::new(Arc::new(ArcSwap::from_pointee(trust)), Arc::new(|| NOW), provider::provider(aes)))
    }
}

fn name(number: usize) -> HostName {
    HostName::nearest(&format!("host-{number}"))
}

/// The workload that connects, and is connected to, on a member.
pub(crate) fn unit(number: usize) -> Workload {
    Workload::Unit(name(number), "some.service".into())
}

/// Issues at once.
struct Authority {
    mesh: Arc<Mesh>,
    holder: NodeId,
}

impl Issuance for Authority {
    type Error = Infallible;

    async fn issue(&self, wanted: &[(Workload, &PrivateKey)]) -> Result<Vec<Option<Leaf>>, Infallible> {
        let domain = self.mesh.roster.trust_domain();
        let one = |(workload, key): &(Workload, &PrivateKey)| {
            let id = SpiffeId::new(domain.clone(), workload.clone());
            self.mesh.issuer.issue(&id, key.public(), self.holder, YEAR / 365, NOW).ok()
        };
        Ok(wanted.iter().map(one).collect())
    }
}

/// One member.
pub(crate) struct Node {
    pub(crate) svids: Arc<Svids>,
    pub(crate) verifier: Arc<SvidVerifier>,
}

impl Node {
    /// Member number so, with its certificates.
    pub(crate) async fn new(mesh: &Arc<Mesh>, number: usize, aes: bool) -> Result<Self> {
        let verifier = mesh.verifier(aes);
        let svids = Svids::new(mesh.node(number), verifier.clone(), Patience::default());
        svids.set_listeners(&BTreeSet::from([unit(number)]));
        let mut changes = svids.changes();
        let (background, issuance) = (svids.clone(), Authority { mesh: mesh.clone(), holder: mesh.node(number) });
        tokio::spawn(async move { background.run(&issuance).await });
        changes.changed().await?;
        Ok(Self { svids, verifier })
    }
}

/// The kernel and the directory of a member: the other one, and one service there.
struct World {
    number: usize,
    other: Member,
    service: SocketAddr,
}

impl Kernel for World {
    fn original_dst(&self, _: &TcpStream) -> io::Result<SocketAddr> {
        Ok(self.service)
    }
    fn owner(&self, _: SocketAddr, _: SocketAddr) -> Option<Workload> {
        Some(unit(self.number))
    }
    fn mesh_socket(&self, _: IpAddr) -> io::Result<TcpSocket> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(AT[self.number], 0))?;
        Ok(socket)
    }
    fn connect_service(&self, client: SocketAddr, service: SocketAddr) -> Connecting {
        Box::pin(async move {
            let socket = TcpSocket::new_v4()?;
            socket.bind(SocketAddr::new(client.ip(), 0))?;
            socket.connect(service).await
        })
    }
    fn refuse(&self, _: SocketAddr) {}
    fn is_loopback(&self, ip: IpAddr) -> bool {
        ip == Ipv4Addr::LOCALHOST
    }
}

impl Directory for World {
    fn member_at(&self, ip: IpAddr) -> Option<Member> {
        (ip == AT[1 - self.number]).then_some(self.other)
    }
    fn is_own(&self, ip: IpAddr) -> bool {
        ip == AT[self.number]
    }
    fn expected(&self, _: NodeId, _: SocketAddr) -> Option<Workload> {
        Some(unit(1 - self.number))
    }
    fn listener(&self, service: SocketAddr) -> Option<Workload> {
        (service == self.service).then(|| unit(self.number))
    }
}

/// Two members, and a service on the second.
pub(crate) struct Pair {
    /// The data plane of the member that connects.
    pub(crate) client: Arc<Proxy>,
    /// The service.
    pub(crate) service: TcpListener,
}

impl Pair {
    /// Both ready.
    pub(crate) async fn new(mesh: &Arc<Mesh>) -> Result<Self> {
        let service = TcpListener::bind(SocketAddr::new(AT[1], 0)).await?;
        let door = TcpListener::bind(SocketAddr::new(AT[1], 0)).await?;
        let (at, mesh_port) = (service.local_addr()?, door.local_addr()?.port());
        let proxy = async |number: usize| {
            let node = Node::new(mesh, number, true).await?;
            let other = Member { node: mesh.node(1 - number), port: mesh_port, restarting: false };
            let world = Arc::new(World { number, other, service: at });
            let ports = OwnPorts { mesh: mesh_port, capture: 1, admin: None };
            // What is dialled ahead is none of what a connection takes.
            let settings = Settings { ports, ahead: false, ..Settings::default() };
            Ok::<_, anyhow::Error>(Proxy::new(world.clone(), world, node.svids, node.verifier, settings, Limits::default()))
        };
        let (client, server) = (proxy(0).await?, proxy(1).await?);
        let directory = server.directory.clone();
        let data = DataTls { svids: server.svids.clone(), listeners: Arc::new(move |at| directory.listener(at)) };
        tokio::spawn(async move {
            while let Ok((tcp, from)) = door.accept().await {
                let (data, server) = (data.clone(), server.clone());
                tokio::spawn(async move {
                    let chosen = data.choose(at, Some(&format!("p{}.meshd", at.port()))).await?;
                    let tunnel = Tunnel::answer(tcp, chosen.config, Input::empty()).await?;
                    let arrival = Arrival { tunnel, port: chosen.port, shown: chosen.shown };
                    inbound::serve(&server, arrival, from).await;
                    anyhow::Ok(())
                });
            }
        });
        Ok(Self { client, service })
    }

    /// A connection as the kernel hands it to the proxy, and the application's end of it.
    pub(crate) async fn captured(&self) -> Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind(SocketAddr::new(AT[0], 0)).await?;
        socket::application(&listener, self.client.settings.keepalive)?;
        let (app, captured) = tokio::join!(TcpStream::connect(listener.local_addr()?), listener.accept());
        Ok((app?, captured.context("no connection")?.0))
    }
}
