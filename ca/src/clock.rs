//! The mesh clock.
use crate::time::UnixTime;
use std::time::Duration;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    System,
    Signed,
    Floor,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    pub time: UnixTime,
    pub why: Source,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshClock {
    floor: UnixTime,
}
impl MeshClock {
    pub fn new(_floor: UnixTime) -> Self {
        todo!()
    }
    pub fn now(&self, _system: UnixTime) -> UnixTime {
        todo!()
    }
    /// Mesh time and why, with the time since boot (suspend included) when known.
    pub fn tell(&self, _system: UnixTime, _boot: Option<Duration>) -> Told {
        todo!()
    }
    /// A lone authority's signed statement; false when it changed nothing (older, or more than 30 days ahead).
    pub fn raise(&mut self, _signed: UnixTime) -> bool {
        todo!()
    }
    /// A statement backed by the operator (joining, recovery) or a second authority: no limit.
    pub fn confirm(&mut self, _signed: UnixTime) -> bool {
        todo!()
    }
    /// The time an authority just signed, at this time since boot: mesh time runs on from here.
    pub fn anchor(&mut self, _signed: UnixTime, _boot: Duration) {
        todo!()
    }
    /// The floor to persist.
    pub fn floor(&self) -> UnixTime {
        self.floor
    }
}
