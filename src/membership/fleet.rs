//! What this node keeps of its fleet: the key, how long the mesh has been up, and until when others are let in with the fleet token.
//!
//! Owns the file `fleet`, and that this node does not leave its mesh for another one of the fleet while it lets somebody in
//! ([`Membership::begin_to_leave`]). A node that is no authority forgets the key as soon as its mesh is settled.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use meshd_ca::fleet::{Fleet, FleetKey, Side, Window};
use meshd_ca::identity::NodeId;
use meshd_ca::join::Reception;
use meshd_ca::roster::{Member, Roster, Standing};
use meshd_ca::store::Store;
use tokio::time::Instant;

use super::{Membership, MembershipError, State};

/// The file.
pub(crate) const FLEET: &str = "fleet";
/// How often it is written while nothing changes but the time. What is lost by a pulled plug is that much; a card is worn by writes.
const WRITE: Duration = Duration::from_secs(600);
/// How soon after a start: a host that is switched off again and again shall not be young for ever.
const FIRST: Duration = Duration::from_secs(60);

/// The fleet, and since when its time was not counted.
pub(super) struct Keeping {
    fleet: Fleet,
    counted: Instant,
    write: Instant,
}

impl Keeping {
    pub(super) fn new(fleet: Fleet) -> Self {
        let now = Instant::now();
        Self { fleet, counted: now, write: now + FIRST }
    }

    /// What is kept, by what it would be now.
    fn now(&mut self) -> &mut Fleet {
        let now = Instant::now();
        self.fleet.pass(now - self.counted);
        self.counted = now;
        &mut self.fleet
    }

    /// The same, once it is known whether this mesh may still give way.
    pub(super) fn reception(&mut self, roster: &Roster, me: NodeId) -> Reception {
        let (founder, alone) = (roster.founder(), roster.active().count() == 1);
        let fleet = self.now();
        fleet.settle(alone, founder == me);
        let side = Side { founder, settled: fleet.is_settled() };
        Reception { key: fleet.key().clone(), side, terms: fleet.terms(), founder: founder == me }
    }
}

/// What was saved. One that is damaged is as good as none: hosts are let in by tokens and codes then.
pub(super) fn load(store: &Store) -> Option<Keeping> {
    let saved = store.load(FLEET).map_err(|e| e.to_string()).transpose()?;
    let fleet = saved.and_then(|saved| Fleet::from_bytes(&saved.bytes).map_err(|e| e.to_string()));
    match fleet {
        Ok(fleet) => Some(Keeping::new(fleet)),
        Err(error) => {
            tracing::warn!(%error, "nobody is let in with the fleet token by this host any more");
            None
        }
    }
}

/// While it lives, nobody is let in: this node may be about to leave.
pub(crate) struct Leaving<'a>(&'a AtomicBool);

impl Leaving<'_> {
    /// It has left: nobody is let in here any more.
    pub(crate) fn done(self) {
        std::mem::forget(self);
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Membership {
    /// The key of the fleet and which of its meshes this is, while this node may leave it for another one.
    pub(crate) async fn unsettled(&self) -> Option<(FleetKey, Side)> {
        let mut state = self.state.lock().await;
        let State { roster, fleet, .. } = &mut *state;
        let here = fleet.as_mut()?.reception(roster, self.me());
        (!here.side.settled).then_some((here.key, here.side))
    }

    /// Lets nobody in from now on, because this node is about to leave its mesh, `side` of its fleet; none if it may not do that any
    /// more. Whoever was let in before counts in what is decided.
    pub(crate) async fn begin_to_leave(&self, side: Side) -> Option<Leaving<'_>> {
        let mut state = self.state.lock().await;
        let State { roster, fleet, .. } = &mut *state;
        let now = fleet.as_mut()?.reception(roster, self.me()).side;
        if now != side || self.leaving.swap(true, Ordering::Relaxed) {
            return None;
        }
        Some(Leaving(&self.leaving))
    }

    /// Until when hosts are let in with the fleet token, as this node counts it; none if it knows of no fleet.
    pub(crate) async fn window(&self) -> Option<Window> {
        Some(self.state.lock().await.fleet.as_mut()?.now().window())
    }

    /// Lets hosts in with the fleet token for `time`, none if that is nothing.
    ///
    /// # Errors
    /// When this node is no authority or knows of no fleet, or it could not be saved.
    pub(crate) async fn enrol(&self, time: Duration) -> Result<Window, MembershipError> {
        let mut state = self.state.lock().await;
        let State { office, fleet, .. } = &mut *state;
        let Some((fleet, _)) = fleet.as_mut().zip(office.as_ref()) else {
            drop(state);
            return Err(self.enrol_refusal().await);
        };
        let window = fleet.now().open(time);
        self.save_fleet(&mut state).await?;
        Ok(window)
    }

    /// Why this node has no say about it.
    pub(crate) async fn enrol_refusal(&self) -> MembershipError {
        let state = self.state.lock().await;
        let founder = state.roster.member(state.roster.founder()).map_or_else(String::new, |m| m.name.to_string());
        match state.office {
            None => self.not_authority(&state.roster),
            Some(_) => MembershipError::NoFleet(founder),
        }
    }

    /// Hears what another authority counts; returns what then counts here.
    pub(crate) async fn hear_window(&self, window: Window) -> Result<Window, MembershipError> {
        let mut state = self.state.lock().await;
        let Some(fleet) = &mut state.fleet else { return Ok(window) };
        let news = fleet.now().hear(window);
        let now = fleet.now().window();
        if news {
            tracing::info!(
                open = now.is_open(),
                seconds = now.left.as_secs(),
                "another authority says until when the fleet token is good"
            );
            self.save_fleet(&mut state).await?;
        }
        Ok(now)
    }

    /// Closes the window because somebody was put out: what he has may still hold the fleet token.
    pub(super) async fn close_window(&self, state: &mut State) {
        let Some(fleet) = &mut state.fleet else { return };
        fleet.now().stay();
        if fleet.now().window().is_open() {
            fleet.now().open(Duration::ZERO);
            tracing::warn!(
                "a host was banished: nobody is let in with the fleet token any more (`meshd enroll open` lets hosts in again)"
            );
        }
        // It is closed, whatever the disk says, and written as soon as that is possible.
        if let Err(error) = self.save_fleet(state).await {
            tracing::warn!(%error, "that could not be saved; trying again");
        }
    }

    /// A person has let somebody in: this is the mesh that is meant, and it does not give way any more.
    pub(super) async fn stay(&self, state: &mut State) -> Result<(), MembershipError> {
        match state.fleet.as_mut().is_some_and(|fleet| fleet.now().stay()) {
            true => self.save_fleet(state).await,
            false => Ok(()),
        }
    }

    /// Does what time has made due: to be called every few seconds.
    pub(crate) async fn tend_fleet(&self) -> Result<(), MembershipError> {
        let mut state = self.state.lock().await;
        let me = self.me();
        let State { roster, fleet, .. } = &mut *state;
        let Some(keeping) = fleet else { return Ok(()) };
        let (was, before) = (keeping.now().is_settled(), keeping.now().window().is_open());
        let side = keeping.reception(roster, me).side;
        let banished = roster.members().any(|m| m.standing == Standing::Banished);
        if banished && !side.settled {
            keeping.now().stay();
        }
        let authority = roster.member(me).is_some_and(Member::is_authority);
        if keeping.now().is_settled() && !authority {
            *fleet = None;
            self.store.remove(FLEET)?;
            return Ok(());
        }
        let due = keeping.write <= Instant::now();
        if due || was != keeping.now().is_settled() || before != keeping.now().window().is_open() {
            self.save_fleet(&mut state).await?;
        }
        Ok(())
    }

    async fn save_fleet(&self, state: &mut State) -> Result<(), MembershipError> {
        let Some(keeping) = &mut state.fleet else { return Ok(()) };
        let bytes = keeping.now().to_bytes();
        // Tried again soon if it fails.
        keeping.write = Instant::now() + FIRST;
        self.save(FLEET, bytes.to_vec()).await?;
        if let Some(keeping) = &mut state.fleet {
            keeping.write = Instant::now() + WRITE;
        }
        Ok(())
    }
}
