//! What a host has on its disk, and when the plug is pulled.
//!
//! One field for each file (or pair of files that mean something together only) of the state directory. A write happens whole or not at
//! all, because `meshd_ca::store` has two generations of each file; what may be cut is the row of writes of one operation, and the
//! fuse does that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use meshd_agent::record::SignedRecord;
use meshd_ca::bundle::RootId;
use meshd_ca::clock::Reset;
use meshd_ca::identity::NodeId;
use meshd_ca::issue::Issuer;
use meshd_ca::roster::Roster;
use meshd_ca::time::UnixTime;

use super::life::Svid;

/// Why the world goes no further on a host, or at all.
#[derive(Debug)]
pub(crate) enum Halt {
    /// The power of the host was cut before a write.
    Cut,
    /// A law was broken: the run has failed.
    Broken(String),
}

/// What most steps return.
pub(crate) type Res<T = ()> = Result<T, Halt>;

/// The state directory.
#[derive(Default)]
pub(crate) struct Disk {
    pub(crate) roster: Option<Arc<Roster>>,
    /// The version of its own last word in the mesh that it left.
    pub(crate) past: u64,
    pub(crate) floor: UnixTime,
    /// The last word of the recovery key about the clock, and whether the floor that follows from it is written.
    pub(crate) reset: Option<(Arc<Reset>, bool)>,
    /// Two places for a root key and its certificate.
    pub(crate) roots: [Option<Arc<Issuer>>; 2],
    pub(crate) signs: Option<RootId>,
    pub(crate) tokens: Option<Vec<u8>>,
    pub(crate) svid: Option<Svid>,
    pub(crate) sequence: u64,
    pub(crate) sequences: BTreeMap<NodeId, u64>,
    pub(crate) cache: Vec<Arc<SignedRecord>>,
    pub(crate) silent: BTreeMap<NodeId, Duration>,
    /// How many writes are done before the power is cut; none when it stays.
    pub(crate) fuse: Option<u32>,
}

impl Disk {
    /// One write of the real shells, synced when this returns.
    pub(crate) fn write(&mut self, change: impl FnOnce(&mut Self)) -> Res {
        match &mut self.fuse {
            Some(0) => return Err(Halt::Cut),
            Some(left) => *left -= 1,
            None => {}
        }
        change(self);
        Ok(())
    }

    /// Removes what an office consists of, file by file, in the order in which the daemon does.
    pub(crate) fn clear_office(&mut self) -> Res {
        self.write(|d| d.roots[0] = None)?;
        self.write(|d| d.roots[1] = None)?;
        self.write(|d| d.tokens = None)?;
        self.write(|d| d.signs = None)
    }

    /// Forgets the mesh, as the host `me` does that left or was put out.
    pub(crate) fn forget(&mut self, me: NodeId) -> Res {
        let past = self.roster.as_ref().and_then(|r| r.member(me)).map_or(0, |m| m.version);
        self.write(|d| d.past = past)?;
        self.write(|d| d.roster = None)?;
        self.clear_office()
    }
}
