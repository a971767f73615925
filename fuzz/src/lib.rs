//! What the fuzz targets share: a bound on what an input may cost, a small mesh to talk about, and changes to honest bytes.

use std::alloc::System;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use meshd_agent::record::{Address, Listener, Mode, NodeRecord, Presence, Roots, SignedRecord};
use meshd_ca::approval::Approvals;
use meshd_ca::bundle::RootId;
use meshd_ca::identity::{HostName, MeshId, NodeId, TrustDomain, Workload};
use meshd_ca::issue::Issuer;
use meshd_ca::join::Authority;
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::Roster;
use meshd_ca::time::UnixTime;
use meshd_ca::token::TokenTable;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// The mesh time of every target.
pub const NOW: UnixTime = UnixTime(1_800_000_000);

/// Does something that may allocate at most so many bytes in all, freed ones counted.
pub fn within<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    let region = Region::new(ALLOCATOR);
    let done = work();
    let used = region.change().bytes_allocated;
    assert!(used <= bytes, "{used} bytes were allocated, {bytes} are allowed");
    done
}

/// A mesh of three hosts, the first of which is the authority. The keys are new in each process, so inputs name its members by
/// [`World::named`].
pub struct World {
    pub keys: Vec<PrivateKey>,
    pub roster: Roster,
    pub issuer: Issuer,
}

pub static WORLD: LazyLock<World> = LazyLock::new(|| {
    let keys: Vec<PrivateKey> = (0..3).map(|_| PrivateKey::generate().expect("random bytes")).collect();
    let mesh = MeshId::from_bytes([7; 10]);
    let domain = TrustDomain::of(mesh);
    let founder = keys[0].public().node_id();
    let issuer = Issuer::create(&domain, founder, NOW, Duration::from_secs(86_400 * 3650)).expect("an issuer");
    let mut roster = Roster::found(mesh, domain, &keys[0], host(0), issuer.root_der().to_vec(), NOW).expect("a roster");
    for (i, key) in keys.iter().enumerate().skip(1) {
        roster.admit(&keys[0], key.public(), &host(i), NOW).expect("room");
    }
    World { keys, roster, issuer }
});

/// The name of member `i`.
pub fn host(i: usize) -> HostName {
    HostName::nearest(&format!("host-{i}"))
}

impl World {
    pub fn roster(&self) -> Arc<Roster> {
        Arc::new(self.roster.clone())
    }

    pub fn node(&self, i: usize) -> NodeId {
        self.keys[i % self.keys.len()].public().node_id()
    }

    /// The bytes with the id of a member wherever its stand-in is: 16 times 0xf0 for the first, as bytes or as text.
    pub fn named(&self, bytes: &[u8]) -> Vec<u8> {
        let mut out = bytes.to_vec();
        for i in 0..self.keys.len() {
            let stand_in = NodeId::from_bytes([0xf0 + i as u8; 16]);
            for (from, to) in [
                (stand_in.as_bytes().to_vec(), self.node(i).as_bytes().to_vec()),
                (stand_in.to_string().into_bytes(), self.node(i).to_string().into_bytes()),
            ] {
                while let Some(at) = out.windows(from.len()).position(|w| w == from) {
                    out[at..at + from.len()].copy_from_slice(&to);
                }
            }
        }
        out
    }

    /// An honest record of member `i`.
    pub fn record(&self, i: usize, sequence: u64) -> NodeRecord {
        let node = self.node(i);
        NodeRecord {
            node,
            sequence,
            port: 6374,
            addresses: vec![Address { ip: [192, 168, 1, i as u8 + 1].into(), shared: false }],
            zone: Some("attic".into()),
            mode: Mode::Permissive,
            presence: Presence::Running,
            listeners: vec![Listener { port: 80, ip: None, workload: Workload::Node(node) }],
            version: "0.1.0".into(),
            roots: Roots { trusted: vec![RootId::of(self.issuer.root_der())], ..Roots::default() },
        }
    }

    pub fn signed(&self, i: usize, sequence: u64) -> SignedRecord {
        SignedRecord::sign(&self.keys[i % self.keys.len()], self.record(i % self.keys.len(), sequence)).expect("signs")
    }
}

/// Reads an input piece by piece; what is not there is zero.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub fn short(&mut self) -> usize {
        usize::from(self.byte()) << 8 | usize::from(self.byte())
    }

    /// Bytes behind a 16-bit length, or as many as there are.
    pub fn piece(&mut self) -> &'a [u8] {
        let length = self.short().min(self.0.len());
        let (piece, rest) = self.0.split_at(length);
        self.0 = rest;
        piece
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `honest` with changes: bits turned, bytes put in or taken out, cut short. Four bytes of input for each of up to eight.
    pub fn edit(&mut self, honest: &[u8]) -> Vec<u8> {
        let mut bytes = honest.to_vec();
        for _ in 0..self.byte() % 9 {
            let (what, at, with) = (self.byte(), self.short(), self.byte());
            let at = at % (bytes.len() + 1);
            match what % 4 {
                0 if at < bytes.len() => bytes[at] ^= with,
                1 => bytes.insert(at, with),
                2 if at < bytes.len() => drop(bytes.remove(at)),
                3 => bytes.truncate(at),
                _ => {}
            }
        }
        bytes
    }
}

/// The authority of the world, as a join sees it.
pub struct Desk {
    /// Its roster.
    pub roster: Roster,
    /// Its tokens.
    pub tokens: TokenTable,
    /// The codes that were typed.
    pub approvals: Approvals,
}

impl Authority for Desk {
    fn key(&self) -> &PrivateKey {
        &WORLD.keys[0]
    }
    fn approvals(&mut self) -> &mut Approvals {
        &mut self.approvals
    }
    fn tokens(&mut self) -> &mut TokenTable {
        &mut self.tokens
    }
    fn roster(&mut self) -> &mut Roster {
        &mut self.roster
    }
}
