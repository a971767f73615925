//! What this node has heard of meshes that move into another one (`meshd_ca::merge`): its own, and those it came from.
//!
//! Owns the file `moves`. A word is on disk before anybody is told that it was heard. While the own mesh moves, this node lets nobody in. Words about
//! meshes of before stay, for hosts that were off meanwhile and ask here.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::merge::{Destination, Mesh, Word, WordError, Words};
use meshd_ca::roster::Entry;
use meshd_ca::store::Store;
use meshd_ca::token::MergeToken;
use tokio::sync::watch;

use super::{Membership, MembershipError, State};

/// The file.
pub(crate) const MOVES: &str = "moves";

/// What was saved. One that is damaged is as good as none: the word is heard again, or the hosts that ask are told by others.
pub(super) fn load(store: &Store) -> Words {
    let saved = store.load(MOVES).map_err(|e| e.to_string());
    let words =
        saved.and_then(|saved| saved.map_or(Ok(Words::default()), |s| Words::from_bytes(&s.bytes).map_err(|e| e.to_string())));
    words.unwrap_or_else(|error| {
        tracing::warn!(%error, "what this host knew of meshes that moved cannot be read and is not used");
        Words::default()
    })
}

impl Membership {
    /// The words that this node has believed, now and from now on.
    pub(crate) fn words(&self) -> watch::Receiver<Arc<Words>> {
        self.words.subscribe()
    }

    /// This mesh.
    pub(crate) fn mesh(&self) -> Mesh {
        Mesh::of(&self.roster())
    }

    /// Where this mesh moves, as far as this node has heard.
    pub(crate) fn moves(&self) -> Option<Word> {
        self.words.borrow().moving(&self.roster()).cloned()
    }

    /// What somebody is to know who shows himself as a member of another mesh: that it has moved here, or through here.
    pub(crate) fn last_word(&self, shown: &Entry) -> Option<Word> {
        let of_it = |mesh: Mesh| mesh.id == shown.mesh() && shown.founder().is_none_or(|f| f == mesh.founder);
        let own = self.mesh();
        self.words.borrow().all().find(|w| of_it(w.from()) && w.from() != own && w.to().is_some()).cloned()
    }

    /// The meshes that this node came from, and the words with which they moved.
    pub(crate) fn former(&self) -> Vec<Word> {
        let own = self.mesh();
        self.words.borrow().all().filter(|w| w.from() != own && w.to().is_some()).cloned().collect()
    }

    /// Hears that this mesh moves, or that it stays after all. Returns whether that is news.
    ///
    /// # Errors
    /// When it is about another mesh or not by somebody who may say so, or it could not be saved.
    pub(crate) async fn hear_move(&self, word: Word) -> Result<bool, MembershipError> {
        let mut state = self.state.lock().await;
        word.believed_in(&state.roster)?;
        let mut words = state.words.clone();
        if !words.hear(word, Mesh::of(&state.roster)) {
            // What could not be written when it was new.
            if state.unsaved.contains(MOVES) {
                self.save_words(&mut state).await?;
            }
            return Ok(false);
        }
        state.words = words;
        self.save_words(&mut state).await?;
        // A person has said which mesh is meant.
        self.stay(&mut state).await?;
        Ok(true)
    }

    async fn save_words(&self, state: &mut State) -> Result<(), MembershipError> {
        state.unsaved.insert(MOVES);
        self.save(MOVES, state.words.to_bytes().to_vec()).await?;
        state.unsaved.remove(MOVES);
        self.words.send_replace(Arc::new(state.words.clone()));
        Ok(())
    }

    /// The version of the next word about this mesh.
    pub(crate) fn next_word(&self) -> u64 {
        self.words.borrow().of(self.mesh()).map_or(1, |w| w.version().saturating_add(1))
    }

    /// Says that this mesh moves, or stays after all, as its founder.
    ///
    /// # Errors
    /// As [`Membership::say_move`].
    pub(crate) async fn declare_move(&self, to: Option<Destination>) -> Result<Word, MembershipError> {
        let unsigned = Word::unsigned(self.key.public(), self.mesh(), to, self.next_word());
        let word = Word::sign(&self.key, unsigned)?;
        self.say_move(word.clone()).await?;
        Ok(word)
    }

    /// Says what a person has just had signed.
    ///
    /// # Errors
    /// When the signer may not say so, a stronger word is known, or it could not be saved.
    pub(crate) async fn say_move(&self, word: Word) -> Result<(), MembershipError> {
        self.hear_move(word.clone()).await?;
        let counts = self.words.borrow().of(self.mesh()) == Some(&word);
        if counts { Ok(()) } else { Err(WordError::Overruled.into()) }
    }

    /// A new token for a mesh of at most `hosts` hosts, that leads to these addresses.
    pub(crate) async fn create_merge_token(
        &self,
        lifetime: Duration,
        hosts: u32,
        hints: &[SocketAddr],
    ) -> Result<MergeToken, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office, .. } = &mut *state;
        let Some(office) = office else { return Err(self.not_authority(roster)) };
        let (mesh, key, now) = (roster.mesh(), self.key.public(), self.clock.now());
        let token = office.tokens.create_for_merge(mesh, key, now, lifetime, hosts, hints.to_vec())?;
        self.save_tokens(&mut state).await?;
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use meshd_ca::identity::HostName;
    use meshd_ca::keys::PrivateKey;
    use meshd_ca::recovery::{Recovery, RecoveryKey};
    use meshd_ca::roster::Roster;

    use super::*;
    use crate::clock::Clock;
    use crate::membership::node_key;

    /// A state directory, its key and the clock of a host.
    fn host() -> (tempfile::TempDir, Arc<PrivateKey>, Arc<Store>, Clock) {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path()).unwrap());
        (dir, Arc::new(node_key(&store).unwrap()), store, Clock::new(meshd_ca::time::UnixTime(0)))
    }

    fn found(recovery: Option<Recovery>) -> (tempfile::TempDir, Arc<PrivateKey>, Membership) {
        let (dir, key, store, clock) = host();
        let m = Membership::found(key.clone(), store, clock, HostName::nearest("a"), None, recovery).unwrap();
        (dir, key, m)
    }

    #[tokio::test]
    async fn a_mesh_moves_by_the_word_of_its_recovery_key_and_of_nobody_else() {
        let paper = RecoveryKey::generate().unwrap();
        let (_at, key, founder) = found(Some(Recovery::new(&paper).unwrap()));
        let (_there, _, other) = found(None);
        let mut roster = Roster::clone(&founder.roster());
        let (_here, mine, store, clock) = host();
        roster.admit(&key, mine.public(), &HostName::nearest("b"), clock.now()).unwrap();
        let member = Membership::adopt(mine, store, clock, roster.clone(), None).unwrap();
        let token = other.create_merge_token(Duration::from_secs(60), 8, &[]).await.unwrap();
        let to = Destination {
            mesh: other.mesh(),
            authority: other.me(),
            token: token.token().id,
            secret: token.invitation(),
            hints: Vec::new(),
            until: other.clock().now(),
        };
        for m in [&founder, &member] {
            assert!(m.declare_move(Some(to.clone())).await.is_err() && m.moves().is_none());
        }
        let signing = roster.recovery().unwrap().open(&paper).unwrap();
        let says =
            |to, m: &Membership| Word::sign(&signing, Word::unsigned(signing.public(), m.mesh(), to, m.next_word())).unwrap();
        let moves = says(Some(to.clone()), &founder);
        founder.say_move(moves.clone()).await.unwrap();
        assert!(member.hear_move(moves.clone()).await.unwrap() && !member.hear_move(moves.clone()).await.unwrap());
        assert_eq!((member.moves(), founder.moves()), (Some(moves.clone()), Some(moves.clone())));
        let stays = says(None, &founder);
        for m in [&founder, &member] {
            m.say_move(stays.clone()).await.unwrap();
            assert!(m.moves().is_none());
        }
        let overruled = founder.say_move(moves).await;
        assert!(matches!(overruled, Err(MembershipError::Word(WordError::Overruled))), "{overruled:?}");
        // The founder of a mesh that has no such key says it itself.
        let elsewhere = Destination { mesh: founder.mesh(), ..to };
        assert!(other.declare_move(Some(elsewhere)).await.is_ok() && other.moves().is_some());

        // Nothing of a mesh that was given up takes the place of what the next one has written.
        other.give_up(true).await;
        let late = other.create_merge_token(Duration::from_secs(60), 8, &[]).await;
        assert!(matches!(late, Err(MembershipError::Over)), "{late:?}");
    }
}
