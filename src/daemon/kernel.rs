//! The kernel as the data plane and the control plane want to see it: sockets with our marks, owners of sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::identity::{HostName, Workload};
use tokio::net::{TcpSocket, TcpStream};

use super::rules::Rules;
use crate::control::link::Dial;
use crate::intercept::sockdiag::{SockDiag, SocketInfo};
use crate::intercept::socket::{self, Mark};
use crate::intercept::{Attribution, Owner};
use crate::proxy::Kernel;

/// How long the kernel itself refuses a port that was just found closed: long enough for the second look of a health check.
const REFUSE_FOR: Duration = Duration::from_secs(2);

/// Opens control connections: marked, so that they are never captured.
pub(crate) struct Marked;

impl Dial for Marked {
    fn dial(&self, to: SocketAddr) -> Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>> {
        Box::pin(async move {
            let stream = socket::outgoing(to.ip(), Mark::Mesh)?.connect(to).await?;
            socket::prepare(&stream)?;
            Ok(stream)
        })
    }
}

/// Who owns a socket, in the words of the mesh.
pub(crate) struct Owners {
    host: HostName,
    attribution: Attribution,
}

impl Owners {
    pub(crate) fn new(host: HostName) -> Self {
        Self { host, attribution: Attribution::open() }
    }

    /// The workload of a socket. Pods have no identity on a bare host: they are the host's.
    pub(crate) fn workload(&self, socket: &SocketInfo) -> Workload {
        let host = self.host.clone();
        match self.attribution.owner(socket) {
            Owner::Unit(unit) => Workload::Unit(host, unit.into()),
            Owner::Container(name) => Workload::Container(host, name.into()),
            Owner::User(name) => Workload::User(host, name.into()),
            Owner::Pod(_) | Owner::Host => Workload::Host(host),
        }
    }
}

/// This host's kernel.
pub(crate) struct HostKernel {
    pub(crate) owners: Arc<Owners>,
    pub(crate) diag: SockDiag,
    pub(crate) rules: Arc<Rules>,
}

impl Kernel for HostKernel {
    fn original_dst(&self, app: &TcpStream) -> io::Result<SocketAddr> {
        socket::original_destination(app, app.local_addr()?)
    }

    fn owner(&self, client: SocketAddr, destination: SocketAddr) -> Option<Workload> {
        match self.diag.find(client, destination) {
            Ok(found) => found.map(|socket| self.owners.workload(&socket)),
            Err(error) => {
                tracing::warn!(%error, "cannot ask the kernel who owns a socket");
                None
            }
        }
    }

    fn mesh_socket(&self, source: IpAddr) -> io::Result<TcpSocket> {
        let socket = socket::outgoing(source, Mark::Mesh)?;
        socket.bind(SocketAddr::new(source, 0))?;
        Ok(socket)
    }

    fn connect_service(
        &self,
        client: SocketAddr,
        service: SocketAddr,
    ) -> Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>> {
        Box::pin(socket::connect_as(client, service, Mark::Service))
    }

    fn refuse(&self, destination: SocketAddr) {
        self.rules.refuse(destination, REFUSE_FOR);
    }
}
