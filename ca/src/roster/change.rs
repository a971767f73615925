//! What its key lets somebody say about the members of a mesh: admitting, leaving, banishing, appointing, and taking any of that back.
//!
//! Each of these signs entries that win by the rules of the parent module, puts them into this roster, and gives them back to be passed on.

use std::collections::BTreeSet;

use super::entry::{Entry, Member, Standing};
use super::settle::free_name;
use super::{LEAD, MAX_PAST, RESERVED, Roster, RosterError, Seat};
use crate::identity::{HostName, NodeId};
use crate::keys::{PrivateKey, PublicKey};
use crate::time::UnixTime;

/// How often what a banished authority vouched for is gone through: its authorities, and theirs, come back before those whom they let in.
const PASSES: usize = 3;

impl Roster {
    /// Makes `joiner` an active member under a name nobody else has: `wish`, or `wish` with a part of its node id behind it.
    /// An active member keeps its name and nothing is signed; one that left comes back under its old name, and not as the
    /// authority it may have been: its root key is gone.
    ///
    /// # Errors
    /// [`RosterError::NotAuthority`], [`RosterError::Banished`], [`RosterError::Full`], [`RosterError::Exhausted`],
    /// [`RosterError::Key`].
    pub fn admit(
        &mut self,
        authority: &PrivateKey,
        joiner: &PublicKey,
        wish: &HostName,
        now: UnixTime,
    ) -> Result<HostName, RosterError> {
        self.admit_after(0, authority, joiner, wish, now)
    }

    /// The same for a node that says itself that its last word in this mesh had the version `past`, by which it left. This roster may not have
    /// heard it yet.
    ///
    /// # Errors
    /// As [`Roster::admit`].
    pub fn admit_after(
        &mut self,
        past: u64,
        authority: &PrivateKey,
        joiner: &PublicKey,
        wish: &HostName,
        now: UnixTime,
    ) -> Result<HostName, RosterError> {
        let by = self.authority(authority)?;
        let node = joiner.node_id();
        let past = past.min(MAX_PAST);
        let member = match self.seats.get(&node) {
            Some(seat) => match seat.member.standing {
                Standing::Active if seat.entry.member().version > past => return Ok(seat.member.name.clone()),
                Standing::Banished => return Err(RosterError::Banished),
                Standing::Replaced => return Err(RosterError::Replaced),
                Standing::Active | Standing::Left => {
                    let back = self.next(by, node, Standing::Active)?;
                    let version = back.version.max(past + 1);
                    Member { retired: self.granted.contains(&node), roots: Vec::new(), version, ..back }
                }
            },
            None if self.replaced.contains_key(&node) => return Err(RosterError::Replaced),
            None => Member {
                key: *joiner,
                name: free_name(&self.names, wish, node),
                standing: Standing::Active,
                roots: Vec::new(),
                retired: false,
                replaces: None,
                since: now,
                version: past + 1,
                by: node,
            },
        };
        self.put(Entry::sign(authority, self.place(), member)?)?;
        Ok(self.seats.get(&node).ok_or(RosterError::NotMember)?.member.name.clone())
    }

    /// Takes the owner of the key `me` out of the mesh. It may come back by joining again, under its old name.
    /// What an authority signed before it left stays valid; its roots leave the bundle.
    ///
    /// # Errors
    /// [`RosterError::NotMember`], [`RosterError::NotActive`], [`RosterError::Exhausted`], [`RosterError::Key`].
    pub fn leave(&mut self, me: &PrivateKey) -> Result<Entry, RosterError> {
        let seat = self.seats.get(&me.public().node_id()).ok_or(RosterError::NotMember)?;
        if seat.member.standing != Standing::Active {
            return Err(RosterError::NotActive);
        }
        let entry = Entry::sign(me, self.place(), self.next(me.public().node_id(), me.public().node_id(), Standing::Left)?)?;
        self.put(entry.clone())?;
        Ok(entry)
    }

    /// Throws `node` out. Only the recovery key takes that back; banishing twice gives the first entry again.
    ///
    /// When the word of `node` counted, everybody else stays what they are as far as is known here: what only it vouched for is signed again by
    /// `authority`. What it signs from now on, or signed unknown to us, is void; where the recovery key puts it out, so is whom it banished.
    /// Returns the entries to be passed on, the one that puts it out last: so those it had let in are vouched for before they hear of it.
    ///
    /// # Errors
    /// [`RosterError::NotAuthority`], [`RosterError::NotMember`], [`RosterError::Founder`], [`RosterError::NeedsRecovery`],
    /// [`RosterError::NeedsFounder`], [`RosterError::NeedsFounderOrRecovery`], [`RosterError::Exhausted`], [`RosterError::Key`].
    pub fn banish(&mut self, authority: &PrivateKey, node: NodeId) -> Result<Vec<Entry>, RosterError> {
        let node = self.current(node);
        let by = authority.public().node_id();
        let recovery = self.is_recovery(by);
        let seat = self.seats.get(&node).ok_or(RosterError::NotMember)?;
        // Who may do that is what everybody has to be told who may not, authority or not.
        if node == self.founder && !recovery {
            return Err(if self.recovery.is_some() { RosterError::NeedsRecovery } else { RosterError::Founder });
        }
        if self.is_protected(node) && !recovery && by != self.founder && seat.member.standing != Standing::Banished {
            return Err(self.needs_superior());
        }
        self.authority(authority)?;
        let above = recovery && self.heard.contains(&node) && !self.is_recovery(seat.entry.member().by);
        if seat.member.standing == Standing::Banished && !above {
            return Ok(vec![seat.other.as_deref().unwrap_or(&seat.entry).clone()]);
        }
        let mut after = self.clone();
        let ban = Entry::sign(authority, self.place(), self.next(by, node, Standing::Banished)?)?;
        after.put(ban.clone())?;
        let mut words = Vec::new();
        // Keys that took its place by the word of somebody who was put out since are members of their own, and out with it.
        let with = |after: &Self, n: NodeId| {
            after.seats.get(&n).and_then(|s| s.other.as_ref()).is_some_and(|o| o.bans() && o.slot().0 == node)
        };
        let out: BTreeSet<NodeId> = self.seats.keys().copied().filter(|n| *n == node || with(&after, *n)).collect();
        let passes = if out.iter().any(|n| self.heard.contains(n)) { PASSES } else { 0 };
        for pass in 0..passes {
            let lost: Vec<_> = self.seats.iter().filter(|(n, seat)| !out.contains(n) && !after.says(**n, seat)).collect();
            // Authorities first: with them most of what they signed themselves counts again.
            let offices: Vec<_> = lost.iter().filter(|(n, _)| self.heard.contains(n)).copied().collect();
            let chosen = if offices.is_empty() { lost } else { offices };
            for (subject, seat) in chosen {
                // Somebody's ban, or that it was replaced, had no effect on it while it had an office by the one who is put out.
                let banned = !is_out(seat.member.standing) && after.member(*subject).is_some_and(|m| is_out(m.standing));
                if seat.member.standing == Standing::Banished && seat.other.is_some() {
                    // It was out with another key, by words that are void now: on its own account, then.
                    let Member { standing, version, replaces, .. } = after.next(by, *subject, Standing::Banished)?;
                    let said = Member { standing, version, replaces, ..seat.entry.member().clone() };
                    let entry = Entry::sign(authority, self.place(), said)?;
                    after.insert(entry.clone());
                    words.push(entry);
                    continue;
                }
                // With the version that it had: what was said since, here or elsewhere, stays the later word. A later one only where that is not enough,
                // because of what else is said here.
                let said = seat.entry.member().clone();
                if !recovery && said.version >= RESERVED {
                    // A word of the recovery key is not for others to repeat.
                    continue;
                }
                let version = if pass == 0 && !banned { said.version } else { after.next_version(by, *subject)? };
                // That it was replaced says nothing else of the key that did so.
                let version_of_other = after.above_pardons(*subject);
                let other = seat.other.as_ref().map(|e| Member { version: version_of_other, ..e.member().clone() });
                for said in [Member { version, ..said }].into_iter().chain(other) {
                    let sign = if banned { Entry::pardon } else { Entry::sign };
                    // A word that had no effect has none from somebody stronger.
                    let replaces = said.replaces.filter(|old| !banned && self.replaced.contains_key(old));
                    let entry = sign(authority, self.place(), Member { replaces, ..said })?;
                    after.insert(entry.clone());
                    words.push(entry);
                }
            }
            after.settle();
        }
        // It would have put an end to its own office with that of the one that made it, and its word would count for nothing.
        if !recovery && !after.member(by).is_some_and(Member::is_authority) {
            return Err(self.needs_superior());
        }
        // Where it is not known yet that it has another key, it would be a member under the one before.
        words.extend(self.of(node).filter(|e| e.member().replaces.is_some() && self.counts(e)).map(|e| Entry::clone(e)));
        *self = after;
        words.push(ban);
        Ok(words)
    }

    /// Takes back that `node` was banished, by whomever. It is a member again, under its name if that is free, and no authority; what it had signed
    /// counts as if it had never been put out.
    ///
    /// # Errors
    /// [`RosterError::NeedsRecovery`] for every other key, [`RosterError::NotMember`], [`RosterError::NotBanished`], [`RosterError::Exhausted`],
    /// [`RosterError::Key`].
    pub fn unbanish(&mut self, recovery: &PrivateKey, node: NodeId) -> Result<Entry, RosterError> {
        let by = recovery.public().node_id();
        if !self.is_recovery(by) {
            return Err(if self.recovery.is_some() { RosterError::NeedsRecovery } else { RosterError::NoRecovery });
        }
        let seat = self.seats.get(&node).ok_or(RosterError::NotMember)?;
        if seat.member.standing != Standing::Banished {
            return Err(RosterError::NotBanished);
        }
        let retired = self.heard.contains(&node);
        loop {
            let member = Member { retired, roots: Vec::new(), ..self.next(by, node, Standing::Active)? };
            let entry = Entry::pardon(recovery, self.place(), member)?;
            self.put(entry.clone())?;
            // It was out with an earlier key as well, by a later word: a pardon of a version above that is all there is to say.
            if !self.is_banished(node) {
                return Ok(entry);
            }
        }
    }

    fn is_banished(&self, node: NodeId) -> bool {
        self.member(node).is_some_and(|m| m.standing == Standing::Banished)
    }

    /// Whether a node is here what this seat says.
    fn says(&self, node: NodeId, seat: &Seat) -> bool {
        self.seats.get(&node).is_some_and(|now| {
            let (said, then) = (now.entry.member(), seat.entry.member());
            let same = (&said.name, &said.roots, said.retired) == (&then.name, &then.roots, then.retired);
            same && now.member.standing == seat.member.standing
        })
    }

    /// Makes an active member an authority with these root certificates. Without an effect on one that is an authority already:
    /// about its roots only its own word counts, see [`Roster::stand`].
    ///
    /// # Errors
    /// [`RosterError::NotAuthority`], [`RosterError::NotMember`], [`RosterError::NotActive`]; [`RosterError::NeedsFounder`] for one
    /// whose office the founder took; [`RosterError::Malformed`] without roots, with more than [`MAX_ROOTS`](super::MAX_ROOTS), or with one that is
    /// no root certificate.
    pub fn grant(&mut self, authority: &PrivateKey, node: NodeId, roots: Vec<Vec<u8>>) -> Result<Entry, RosterError> {
        let by = self.authority(authority)?;
        let seat = self.seats.get(&node).ok_or(RosterError::NotMember)?;
        if seat.member.standing != Standing::Active {
            return Err(RosterError::NotActive);
        }
        if roots.is_empty() {
            return Err(RosterError::Malformed);
        }
        if by != self.founder && !self.is_recovery(by) && self.deposed(node).is_some() {
            return Err(self.needs_founder());
        }
        let mut member = Member { roots, retired: false, ..self.next(by, node, Standing::Active)? };
        if self.is_recovery(by) {
            member.version = member.version.max(member.version.saturating_add(LEAD).min(RESERVED - 1));
        }
        self.say(authority, member)
    }

    /// The founder or the recovery key stands behind an authority that others made: from then on no other authority puts it out. None where nothing
    /// is to be said, because the key is another one's or stands behind it already.
    ///
    /// # Errors
    /// [`RosterError::NotMember`] for one that is no authority, [`RosterError::Exhausted`], [`RosterError::Key`].
    pub fn confirm(&mut self, key: &PrivateKey, node: NodeId) -> Result<Option<Entry>, RosterError> {
        let by = key.public().node_id();
        let seat = self.seats.get(&node).filter(|s| s.member.is_authority()).ok_or(RosterError::NotMember)?;
        let founder = by == self.founder && self.member(by).is_some_and(Member::is_authority);
        if node == by || self.is_protected(node) || !(founder || self.is_recovery(by)) {
            return Ok(None);
        }
        let roots = seat.member.roots.clone();
        self.say(key, Member { roots, ..self.next(by, node, Standing::Active)? }).map(Some)
    }

    /// The owner of the key `me`, an authority, says which root certificates it has. From then on nobody but itself and the founder
    /// can change that.
    ///
    /// # Errors
    /// [`RosterError::NotAuthority`]; [`RosterError::Malformed`] as for [`Roster::grant`]; [`RosterError::Exhausted`],
    /// [`RosterError::Key`].
    pub fn stand(&mut self, me: &PrivateKey, roots: Vec<Vec<u8>>) -> Result<Entry, RosterError> {
        let node = self.authority(me)?;
        if roots.is_empty() {
            return Err(RosterError::Malformed);
        }
        self.say(me, Member { roots, ..self.next(node, node, Standing::Active)? })
    }

    /// Ends the office of an authority, by itself or by the founder. What it signed stays valid, and its roots are believed until
    /// this is said again with `roots` false, which is for when nobody shows a certificate under them any more.
    ///
    /// # Errors
    /// [`RosterError::NotMember`] for one that never was an authority, [`RosterError::NotActive`], [`RosterError::Founder`],
    /// [`RosterError::NeedsFounder`], [`RosterError::Exhausted`], [`RosterError::Key`].
    pub fn retire(&mut self, key: &PrivateKey, node: NodeId, roots: bool) -> Result<Entry, RosterError> {
        let by = key.public().node_id();
        let seat = self.seats.get(&node).filter(|s| s.entry.grants()).ok_or(RosterError::NotMember)?;
        if node == self.founder && !self.is_recovery(by) {
            return Err(RosterError::Founder);
        }
        if by != node && by != self.founder && !self.is_recovery(by) {
            return Err(self.needs_founder());
        }
        if seat.member.standing != Standing::Active {
            return Err(RosterError::NotActive);
        }
        let mut member = Member { retired: true, ..self.next(by, node, Standing::Active)? };
        if !roots {
            member.roots.clear();
        }
        self.say(key, member)
    }

    pub(super) fn say(&mut self, key: &PrivateKey, member: Member) -> Result<Entry, RosterError> {
        let entry = Entry::sign(key, self.place(), member)?;
        self.put(entry.clone())?;
        Ok(entry)
    }

    pub(super) fn needs_founder(&self) -> RosterError {
        match self.member(self.founder).filter(|m| m.standing == Standing::Active) {
            Some(founder) => RosterError::NeedsFounder(founder.name.clone()),
            None if self.recovery.is_some() => RosterError::NeedsRecovery,
            None => RosterError::NoRecovery,
        }
    }

    fn needs_superior(&self) -> RosterError {
        match self.needs_founder() {
            RosterError::NeedsFounder(founder) if self.recovery.is_some() => RosterError::NeedsFounderOrRecovery(founder),
            other => other,
        }
    }

    pub(super) fn authority(&self, key: &PrivateKey) -> Result<NodeId, RosterError> {
        let node = key.public().node_id();
        let may = self.is_recovery(node) || self.member(node).is_some_and(Member::is_authority);
        if may { Ok(node) } else { Err(RosterError::NotAuthority) }
    }

    /// The member as the next word of `by` says it. The name is the one that was signed, not the one it was given when two had the same.
    fn next(&self, by: NodeId, node: NodeId, standing: Standing) -> Result<Member, RosterError> {
        let signed = self.seats.get(&node).ok_or(RosterError::NotMember)?.entry.member();
        let version = match standing {
            // A ban wins whatever its version, until it is taken back.
            Standing::Banished => self.version(by, node, |e| e.bans() || e.pardons())?,
            _ if self.is_recovery(by) => self.next_version(by, node)?,
            _ => signed.version.checked_add(1).filter(|v| *v < RESERVED).ok_or(RosterError::Exhausted)?,
        };
        Ok(Member { standing, version, replaces: None, ..signed.clone() })
    }

    /// A version above all that counts about a node. What does not count is left out: its signer may have meant to use the numbers up. For the recovery
    /// key it is not, up to such numbers: it may count again, when that key takes its signer back.
    fn next_version(&self, by: NodeId, node: NodeId) -> Result<u64, RosterError> {
        let trusted = |e: &Entry| self.trusted.contains(&e.member().by) && !e.bans();
        let known = |e: &Entry| self.is_recovery(by) && e.member().version < MAX_PAST;
        self.version(by, node, |e| trusted(e) || e.is_farewell() || self.puts_out(e, node) || known(e))
    }

    fn version(&self, by: NodeId, node: NodeId, above: impl Fn(&Entry) -> bool) -> Result<u64, RosterError> {
        let inherited = self.seats.get(&node).and_then(|seat| seat.other.as_deref());
        let said = self.of(node).map(|e| &**e).filter(|e| above(e)).chain(inherited);
        let last = said.map(|e| e.member().version).max().unwrap_or(0);
        let next = last.checked_add(1).filter(|v| *v < RESERVED || self.is_recovery(by));
        next.ok_or(RosterError::Exhausted)
    }
}

/// Whether the key is nobody's, whatever was said of it before.
fn is_out(standing: Standing) -> bool {
    matches!(standing, Standing::Banished | Standing::Replaced)
}
