//! A mesh made for a test: real keys, roster, authority and certificates, and a clock that tests set.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use meshd_ca::identity::{HostName, MeshId, NodeId, SpiffeId, TrustDomain, Workload};
use meshd_ca::issue::{Issuer, Leaf};
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::Roster;
use meshd_ca::time::UnixTime;
use tokio::time::Instant;

use super::provider;
use super::svids::{Issuance, Patience, Svids};
use super::verifier::{Now, SvidVerifier, Trust};

const START: u64 = 1_800_000_000;

/// Mesh time of a test: real seconds (tokio's clock) since it began, and what was added.
#[derive(Clone)]
pub(crate) struct TestClock(Instant, Arc<AtomicU64>);

impl TestClock {
    pub(crate) fn new() -> Self {
        Self(Instant::now(), Arc::new(AtomicU64::new(START)))
    }
    pub(crate) fn now(&self) -> UnixTime {
        UnixTime(self.1.load(Ordering::Relaxed) + self.0.elapsed().as_secs())
    }
    pub(crate) fn add(&self, d: Duration) {
        self.1.fetch_add(d.as_secs(), Ordering::Relaxed);
    }
    pub(crate) fn function(&self) -> Now {
        let c = self.clone();
        Arc::new(move || c.now())
    }
}

/// An authority and its roster.
pub(crate) struct Mesh {
    pub(crate) clock: TestClock,
    pub(crate) key: PrivateKey,
    pub(crate) issuer: Arc<Issuer>,
    pub(crate) roster: Roster,
}

impl Mesh {
    pub(crate) fn found() -> Self {
        let (clock, key) = (TestClock::new(), PrivateKey::generate().unwrap());
        let mesh = MeshId::from_bytes([3; 10]);
        let domain = TrustDomain::of(mesh);
        let year = Duration::from_secs(365 * 86_400);
        let issuer = Issuer::create(&domain, key.public().node_id(), clock.now(), year).unwrap();
        let roster = Roster::found(mesh, domain, &key, name("authority"), issuer.root_der().to_vec(), clock.now()).unwrap();
        Self { clock, key, issuer: Arc::new(issuer), roster }
    }

    pub(crate) fn admit(&mut self, key: &PrivateKey, wish: &str) -> HostName {
        self.roster.admit(&self.key, key.public(), &name(wish), self.clock.now()).unwrap()
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::from(Arc::new(self.roster.clone()))
    }

    pub(crate) fn verifier(&self, aes: bool) -> (Arc<ArcSwap<Trust>>, Arc<SvidVerifier>) {
        let trust = Arc::new(ArcSwap::from_pointee(self.trust()));
        (trust.clone(), Arc::new(SvidVerifier::new(trust, self.clock.function(), provider::provider(aes))))
    }

    pub(crate) fn issuance(&self, holder: NodeId, lifetime: Duration) -> TestIssuance {
        TestIssuance {
            issuer: self.issuer.clone(),
            domain: self.roster.trust_domain().clone(),
            clock: self.clock.clone(),
            holder,
            lifetime,
            down: AtomicBool::new(false),
            issued: AtomicU64::new(0),
            asked: AtomicU64::new(0),
        }
    }
}

pub(crate) fn name(s: &str) -> HostName {
    s.parse().unwrap()
}

/// Svids of a node with the node's own and those of `workloads` issued, and kept up in the background.
pub(crate) async fn issued(
    node: NodeId,
    v: &Arc<SvidVerifier>,
    issuance: Arc<TestIssuance>,
    workloads: &[Workload],
) -> Arc<Svids> {
    let svids = Svids::new(node, v.clone(), Patience::default());
    svids.set_listeners(&workloads.iter().cloned().collect());
    let mut changes = svids.changes();
    let background = svids.clone();
    tokio::spawn(async move { background.run(&*issuance).await });
    changes.changed().await.unwrap();
    svids
}

/// An authority that can be switched off.
pub(crate) struct TestIssuance {
    issuer: Arc<Issuer>,
    domain: TrustDomain,
    clock: TestClock,
    holder: NodeId,
    lifetime: Duration,
    pub(crate) down: AtomicBool,
    pub(crate) issued: AtomicU64,
    pub(crate) asked: AtomicU64,
}

impl Issuance for TestIssuance {
    type Error = &'static str;

    async fn issue(&self, wanted: &[(Workload, &PrivateKey)]) -> Result<Vec<Option<Leaf>>, &'static str> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(5)).await;
        if self.down.load(Ordering::Relaxed) {
            return Err("switched off");
        }
        let issue = |(w, key): &(Workload, &PrivateKey)| {
            if matches!(w, Workload::Service(_)) {
                return None;
            }
            self.issued.fetch_add(1, Ordering::Relaxed);
            let id = SpiffeId::new(self.domain.clone(), w.clone());
            Some(self.issuer.issue(&id, key.public(), self.holder, self.lifetime, self.clock.now()).unwrap())
        };
        Ok(wanted.iter().map(issue).collect())
    }
}
