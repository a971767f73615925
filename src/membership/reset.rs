//! The recovery key's word that sets the clock back, on this host: kept, obeyed once, and there to be passed on.
//!
//! Owns the file `reset`: the word, and whether it was obeyed. The plug may be pulled between the three writes: a word that was not obeyed to the end is
//! obeyed again at the next start, which changes nothing where it was.

use std::sync::Arc;

use meshd_ca::approval::Approvals;
use meshd_ca::clock::reset::{Reset, ResetError};
use meshd_ca::roster::{Roster, RosterError};
use meshd_ca::signed::Signed;
use meshd_ca::store::Store;
use meshd_ca::token::TokenTable;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{Membership, MembershipError};
use crate::clock::{self, Clock};

/// The file.
pub(super) const RESET: &str = "reset";

#[derive(Serialize, Deserialize)]
struct Saved {
    word: Signed,
    /// Whether the floor that follows from it is on the disk.
    obeyed: bool,
}

pub(super) fn bytes(word: &Reset, obeyed: bool) -> Vec<u8> {
    // Strings and numbers only: writing them to memory cannot fail.
    serde_json::to_vec(&Saved { word: word.signed().clone(), obeyed }).unwrap_or_default()
}

fn read(word: Signed, roster: &Roster) -> Result<Reset, ResetError> {
    let recovery = roster.recovery().ok_or(ResetError::Malformed)?;
    Reset::read(word, recovery.key(), roster.mesh())
}

/// Brings the clock into the era in which this host was in the mesh of this roster. One that is damaged is as good as none: the others have it.
pub(super) fn load(store: &Store, roster: &Roster, clock: &Clock) -> Option<Arc<Reset>> {
    clock.forget_era();
    let saved = store.load(RESET).ok().flatten()?;
    let saved: Saved = serde_json::from_slice(&saved.bytes).ok()?;
    // Of another mesh it says nothing.
    let word = read(saved.word, roster).ok()?;
    if saved.obeyed {
        clock.obeyed(&word);
    } else {
        clock.reset(&word);
        let written = store.save(clock::FILE, &clock.to_bytes()).and_then(|()| store.save(RESET, &bytes(&word, true)));
        if let Err(error) = written {
            tracing::debug!(%error, "that the clock was set back is not written yet");
        }
    }
    Some(Arc::new(word))
}

impl Membership {
    /// The last word of the recovery key about the clock, now and from now on.
    pub(crate) fn reset(&self) -> watch::Receiver<Option<Arc<Reset>>> {
        self.reset.subscribe()
    }

    /// Obeys the recovery key, which sets the clock back. Returns whether that was news. What was promised until a time of before ends with it: join
    /// tokens and codes that were approved.
    ///
    /// # Errors
    /// When it is not the word of the recovery key of this mesh, or cannot be saved.
    pub(crate) async fn set_back(&self, word: Signed) -> Result<bool, MembershipError> {
        let mut state = self.state.lock().await;
        if state.roster.recovery().is_none() {
            return Err(RosterError::NoRecovery.into());
        }
        let word = read(word, &state.roster)?;
        if word.era() <= self.clock.era() {
            return Ok(false);
        }
        self.save(RESET, bytes(&word, false)).await?;
        let before = self.clock.now();
        self.clock.reset(&word);
        tracing::warn!(%before, now = %self.clock.now(), "the recovery key set the clock of the mesh back");
        self.reset.send_replace(Some(Arc::new(word.clone())));
        if let Some(office) = &mut state.office {
            (office.tokens, office.approvals) = (TokenTable::default(), Approvals::default());
        }
        self.save_tokens(&mut state).await?;
        self.save(clock::FILE, self.clock.to_bytes()).await?;
        self.save(RESET, bytes(&word, true)).await?;
        Ok(true)
    }
}
