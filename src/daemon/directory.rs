//! Who is where, as the data plane asks it: answered from the newest snapshots, without waiting.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use meshd_agent::catalog::Catalog;
use meshd_agent::record::{Listener, Presence};
use meshd_ca::identity::{NodeId, Workload};
use tokio::sync::watch;
use tokio::time::Instant;

use super::addresses::{Book, News};
use super::before::Bound;
use super::lan::Addresses;
use crate::proxy;

/// The snapshots that answer.
pub(crate) struct Snapshots {
    pub(crate) book: Book,
    pub(crate) catalog: watch::Receiver<Arc<Catalog>>,
    pub(crate) addresses: watch::Receiver<Addresses>,
    /// What listens on this host, newest first look; ahead of our own record, which others see.
    pub(crate) listeners: Arc<ArcSwap<Vec<Listener>>>,
    /// Who was bound where in the process before this one: its rules still capture, and nothing is proven anew yet. That it is the
    /// member is proven by each handshake. Until then.
    pub(crate) carried: (Bound, Instant),
}

impl Snapshots {
    /// What is carried and not over.
    pub(crate) fn carried(&self) -> Bound {
        if Instant::now() < self.carried.1 { self.carried.0.clone() } else { Bound::new() }
    }
}

impl proxy::Directory for Snapshots {
    fn member_at(&self, ip: IpAddr) -> Option<proxy::Member> {
        let (carried, until) = &self.carried;
        let latest = self.book.latest();
        let leaving = || latest.leaving.get(&ip).filter(|(_, until)| Instant::now() < *until).map(|(bound, _)| bound);
        let proven = latest.captured.get(&ip).or_else(leaving).map(|bound| (bound.node, bound.port));
        let (node, port) = proven.or_else(|| carried.get(&ip).copied().filter(|_| Instant::now() < *until))?;
        let restarting = self.catalog.borrow().record(node).is_some_and(|r| r.presence == Presence::Restarting);
        Some(proxy::Member { node, port, restarting })
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        self.addresses.borrow().own.contains(&ip)
    }

    fn expected(&self, node: NodeId, service: SocketAddr) -> Option<Workload> {
        self.catalog.borrow().listener(node, service.ip(), service.port()).map(|l| l.workload.clone())
    }

    fn suspect(&self, ip: IpAddr) {
        self.book.tell(News::Suspect(ip));
    }

    fn listener(&self, service: SocketAddr) -> Option<Workload> {
        let listeners = self.listeners.load();
        let on = |at: Option<IpAddr>| listeners.iter().find(|l| l.port == service.port() && l.ip == at);
        on(Some(service.ip())).or_else(|| on(None)).map(|l| l.workload.clone())
    }
}
