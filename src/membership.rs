//! What this node is in its mesh: its key, the roster, and - on an authority - the office: root key and tokens.
//!
//! Owns the one mutable roster of the process and its file. Everything else reads immutable snapshots from [`Membership::watch`].
//! A change is on disk before anybody is told that it happened. Files of the state directory: `node.key`, `next.key`, `roster`, `root.key`,
//! `root.crt`, `root2.key`, `root2.crt`, `tokens`, `signs`, `fleet`, `moves`, `reset`, each in two generations (`meshd_ca::store`).
//!
//! An office begins in steps, each of which may be the last before the plug is pulled: the root key is made and saved ([`Membership::prepare`]),
//! another authority makes the root known, this node takes the office and says itself which root it has ([`Membership::assume`]), and it signs with it
//! only when everybody believes it ([`Membership::begin_to_sign`]). So is a root replaced (`meshd_agent::rotation`): what the next step is, is read off the
//! roster, the key files and `signs`.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use meshd_ca::approval::{ApprovalCode, Approvals};
use meshd_ca::bundle::{Bundle, RootId};
use meshd_ca::clock::reset::{Reset, ResetError};
use meshd_ca::clock::statement::{Question, StatementError};
use meshd_ca::fleet::{Fleet, FleetToken};
use meshd_ca::identity::{HostName, MeshId, NodeId, SpiffeId, TrustDomain, Workload};
use meshd_ca::issue::{Issuer, Leaf, may_hold};
use meshd_ca::join::{Admission, Admitted, Authority, JoinError, Reason, Reception, Step};
use meshd_ca::keys::{self, PrivateKey, PublicKey};
use meshd_ca::merge::{WordError, Words};
use meshd_ca::recovery::Recovery;
use meshd_ca::roster::{Chain, Entry, MAX_ROOTS, Member, Roster, RosterError, Standing};
use meshd_ca::signed::Signed;
use meshd_ca::store::{Store, StoreError};
use meshd_ca::token::{JoinToken, TokenInfo, TokenTable};
use thiserror::Error;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use crate::clock::{self, Clock};
use fleet::{FLEET, Keeping};
pub(crate) use key::{KEY, NEXT_KEY, node_key, take_node_key};
use moves::MOVES;
use office::{Office, ROOTS, SIGNS};
use rotation::published;

pub(crate) mod fleet;
mod key;
pub(crate) mod moves;
mod office;
mod reset;
mod rotation;
#[cfg(test)]
mod tests;

/// How long a root lives: ten years (design section 4).
pub(crate) const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

pub(crate) const ROSTER: &str = "roster";
pub(crate) const ROOT_KEY: &str = "root.key";
pub(crate) const ROOT2_KEY: &str = "root2.key";
const ROOT_CERTIFICATE: &str = "root.crt";
const ROOT2_CERTIFICATE: &str = "root2.crt";
/// The certificates of the roots that this host has the keys of.
pub(crate) const ROOT_CERTIFICATES: [&str; 2] = [ROOT_CERTIFICATE, ROOT2_CERTIFICATE];
pub(crate) const TOKENS: &str = "tokens";
/// How long the keys of an office that was lost are kept, unused. When the authority that made it is banished, somebody else's word that it stands
/// may come a moment later.
const REGRET: Duration = Duration::from_secs(30);
/// What an office consists of on disk.
const OFFICE: [&str; 6] = [ROOT_KEY, ROOT_CERTIFICATE, ROOTS[1].0, ROOTS[1].1, TOKENS, SIGNS];

/// Why something about membership could not be done.
#[derive(Debug, Error)]
pub(crate) enum MembershipError {
    /// The state directory cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The roster refused it.
    #[error(transparent)]
    Roster(#[from] RosterError),
    /// A key could not be made or read.
    #[error("{0}: if the file is damaged, restore the state directory from a backup, or empty it and join again")]
    Key(#[from] keys::KeyError),
    /// A certificate could not be made.
    #[error(transparent)]
    Issue(#[from] meshd_ca::issue::IssueError),
    /// A token could not be made.
    #[error(transparent)]
    Token(#[from] meshd_ca::token::TokenError),
    /// Nobody would hear the recovery key from here.
    #[error(
        "as this host knows it, it is no member of its mesh, or would be none with that, and the others would not hear what it says: run the command on another one"
    )]
    Outside,
    /// Not the recovery key's word about the clock.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The mesh was given up for another one.
    #[error("this host has its place in another mesh by now")]
    Over,
    /// A word that a mesh moves was refused, or could not be made.
    #[error(transparent)]
    Word(#[from] WordError),
    /// A question for the time could not be answered.
    #[error(transparent)]
    Time(#[from] StatementError),
    /// Only an authority can do that.
    #[error("this host is not an authority of its mesh: run the command on {0}")]
    NotAuthority(String),
    /// The authority was not let in by the fleet token, or forgot it.
    #[error(
        "this authority knows of no fleet token of its mesh: run the command on another one, first of all on {0}, which founded the mesh"
    )]
    NoFleet(String),
    /// It is an authority whose root is not known to everybody yet.
    #[error("this authority is new and does not sign yet: members that were here lately have not heard of its root")]
    NotYet,
    /// The last rotation is not over.
    #[error("the root is being replaced already: `meshd authority list` shows how far it is")]
    Rotating,
    /// The thread that writes files died.
    #[error("the state could not be written: {0}")]
    Write(String),
}

/// This node's place in its mesh.
pub(crate) struct Membership {
    key: Arc<PrivateKey>,
    store: Arc<Store>,
    clock: Clock,
    state: Mutex<State>,
    roster: watch::Sender<Arc<Roster>>,
    signs: watch::Sender<Option<RootId>>,
    /// The last word of the recovery key about the clock.
    reset: watch::Sender<Option<Arc<Reset>>>,
    words: watch::Sender<Arc<Words>>,
    /// Whether this node is about to leave its mesh for another one of the fleet.
    leaving: AtomicBool,
    /// Whether its place is in another mesh by now.
    over: AtomicBool,
}

struct State {
    roster: Roster,
    office: Option<Office>,
    fleet: Option<Keeping>,
    words: Words,
    /// Since when this node has had no office, while the keys of its last one are on the disk still.
    lost: Option<Instant>,
    /// Files that are behind what is above, because writing them failed: nobody may be told what is in memory only.
    unsaved: HashSet<&'static str>,
}

/// Borrows the state as the join protocol wants to see an authority.
struct Desk<'a> {
    key: &'a PrivateKey,
    roster: &'a mut Roster,
    tokens: &'a mut TokenTable,
    approvals: &'a mut Approvals,
    fleet: Option<Reception>,
}

impl Authority for Desk<'_> {
    fn key(&self) -> &PrivateKey {
        self.key
    }
    fn approvals(&mut self) -> &mut Approvals {
        self.approvals
    }
    fn tokens(&mut self) -> &mut TokenTable {
        self.tokens
    }
    fn roster(&mut self) -> &mut Roster {
        self.roster
    }
    fn fleet(&self) -> Option<Reception> {
        self.fleet.clone()
    }
}

impl Membership {
    /// Founds a mesh with this node as its first member and authority.
    pub(crate) fn found(
        key: Arc<PrivateKey>,
        store: Arc<Store>,
        clock: Clock,
        name: HostName,
        trust_domain: Option<TrustDomain>,
        recovery: Option<Recovery>,
    ) -> Result<Self, MembershipError> {
        let mesh = MeshId::from_bytes(keys::random()?);
        let domain = trust_domain.unwrap_or_else(|| TrustDomain::of(mesh));
        Self::begin(key, store, clock, name, (mesh, domain, recovery), None)
    }

    /// Founds the mesh of a fleet. Others of it may do the same at this moment.
    pub(crate) fn found_fleet(
        key: Arc<PrivateKey>,
        store: Arc<Store>,
        clock: Clock,
        name: HostName,
        token: &FleetToken,
        recovery: Option<Recovery>,
    ) -> Result<Self, MembershipError> {
        let mesh = token.mesh();
        let charter = (mesh, TrustDomain::of(mesh), recovery);
        Self::begin(key, store, clock, name, charter, Some(Fleet::found(token.key())))
    }

    fn begin(
        key: Arc<PrivateKey>,
        store: Arc<Store>,
        clock: Clock,
        name: HostName,
        (mesh, trust_domain, recovery): (MeshId, TrustDomain, Option<Recovery>),
        fleet: Option<Fleet>,
    ) -> Result<Self, MembershipError> {
        let issuer = Issuer::create(&trust_domain, key.public().node_id(), clock.now(), ROOT_LIFETIME)?;
        let root = issuer.root_der().to_vec();
        let roster = Roster::found_with(recovery, (mesh, trust_domain), &key, name, root, clock.now())?;
        let (root_key, root_der) = issuer.to_parts();
        // The roster comes last: without it the other files mean nothing and the next start founds anew.
        store.save(ROOT_KEY, root_key)?;
        store.save(ROOT_CERTIFICATE, root_der)?;
        let tokens = TokenTable::default();
        store.save(TOKENS, &tokens.to_bytes())?;
        if let Some(fleet) = &fleet {
            store.save(FLEET, &fleet.to_bytes())?;
        }
        store.save(ROSTER, &roster.to_bytes())?;
        let office = Office { issuer, place: 0, next: None, tokens, approvals: Approvals::default(), signs: true };
        Ok(Self::with(key, store, clock, roster, Some(office), fleet.map(Keeping::new)))
    }

    /// The membership saved in `store`, if there is one and nobody has ended it. It may be that nobody vouches for it at the moment, see
    /// [`Roster::introduction`].
    pub(crate) fn load(key: Arc<PrivateKey>, store: Arc<Store>, clock: Clock) -> Result<Option<Self>, MembershipError> {
        let Some(saved) = store.load(ROSTER)? else { return Ok(None) };
        let roster = Roster::from_bytes(&saved.bytes)?;
        let me = key.public().node_id();
        let ended = match roster.member(me) {
            Some(member) => member.standing != Standing::Active,
            None => roster.introduction(me).is_none(),
        };
        if ended {
            return Ok(None);
        }
        if roster.member(me).is_some_and(|m| m.retired && m.roots.is_empty()) {
            // Pulled out before that was done.
            for name in OFFICE {
                store.remove(name)?;
            }
        }
        let mut office = match roster.member(me).is_some_and(Member::is_authority) {
            true => match Office::load(&store) {
                // As a member it is still of use, and others sign.
                Err(error) if roster.authorities().count() > 1 => {
                    tracing::error!(%error, "this authority cannot sign; going on as a member");
                    None
                }
                loaded => loaded?,
            },
            false => None,
        };
        if let Some(office) = &mut office {
            office.signs |= roster.founded_by(me);
            if let Err(error) = office.forget_old(&store, &published(&roster, me)) {
                tracing::warn!(%error, "what is left of an old root could not be removed");
            }
        }
        let fleet = fleet::load(&store);
        Ok(Some(Self::with(key, store, clock, roster, office, fleet)))
    }

    /// What the saved roster says of this node, and the version of that; none where there is none, or it does not know the node.
    pub(crate) fn standing(store: &Store, me: NodeId) -> Result<Option<(Standing, u64)>, MembershipError> {
        let Some(saved) = store.load(ROSTER)? else { return Ok(None) };
        Ok(Roster::from_bytes(&saved.bytes)?.member(me).map(|m| (m.standing, m.version)))
    }

    /// Takes the place in another mesh that a join has just granted, of this fleet if it was joined as one of it. An own root of before is
    /// dropped.
    pub(crate) fn adopt(
        key: Arc<PrivateKey>,
        store: Arc<Store>,
        clock: Clock,
        roster: Roster,
        fleet: Option<Fleet>,
    ) -> Result<Self, MembershipError> {
        // Of the same fleet as the mesh of before, if there was one: good with either roster.
        if let Some(fleet) = &fleet {
            store.save(FLEET, &fleet.to_bytes())?;
        }
        store.save(ROSTER, &roster.to_bytes())?;
        let fleets = fleet.is_none().then_some(FLEET);
        for old in OFFICE.into_iter().chain(fleets) {
            store.remove(old)?;
        }
        Ok(Self::with(key, store, clock, roster, None, fleet.map(Keeping::new)))
    }

    /// Forgets the mesh; the node key stays, so that a later join finds the same node.
    pub(crate) fn forget(store: &Store) -> Result<(), StoreError> {
        store.remove(ROSTER)?;
        for name in OFFICE.into_iter().chain([FLEET, MOVES, NEXT_KEY]) {
            store.remove(name)?;
        }
        Ok(())
    }

    fn with(
        key: Arc<PrivateKey>,
        store: Arc<Store>,
        clock: Clock,
        roster: Roster,
        office: Option<Office>,
        fleet: Option<Keeping>,
    ) -> Self {
        clock.within(&roster.bundle());
        let (reset, _) = watch::channel(reset::load(&store, &roster, &clock));
        let (sender, _) = watch::channel(Arc::new(roster.clone()));
        let signs = office.as_ref().filter(|o| o.signs).map(|o| RootId::of(o.issuer.root_der()));
        let (signs, _) = watch::channel(signs);
        let words = moves::load(&store);
        let (heard, _) = watch::channel(Arc::new(words.clone()));
        let state = Mutex::new(State { roster, office, fleet, words, lost: None, unsaved: HashSet::new() });
        Self {
            key,
            store,
            clock,
            state,
            roster: sender,
            signs,
            reset,
            words: heard,
            leaving: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }
    }

    /// This node's id.
    pub(crate) fn me(&self) -> NodeId {
        self.key.public().node_id()
    }

    /// This node's key.
    pub(crate) fn key(&self) -> &Arc<PrivateKey> {
        &self.key
    }

    /// The clock that this membership goes by.
    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The roster as it is now.
    pub(crate) fn roster(&self) -> Arc<Roster> {
        self.roster.borrow().clone()
    }

    /// Every roster from now on.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Roster>> {
        self.roster.subscribe()
    }

    /// The trust bundle of the roster as it is now.
    pub(crate) fn bundle(&self) -> Bundle {
        self.roster.borrow().bundle()
    }

    /// This node's name in the mesh.
    pub(crate) fn name(&self) -> HostName {
        self.roster.borrow().member(self.me()).map_or_else(|| HostName::nearest(""), |m| m.name.clone())
    }

    /// The root that this node signs with, if it does, now and from now on.
    pub(crate) fn signs(&self) -> watch::Receiver<Option<RootId>> {
        self.signs.subscribe()
    }

    /// Whether this node holds an authority's root key.
    pub(crate) async fn is_authority(&self) -> bool {
        self.state.lock().await.office.is_some()
    }

    /// Adds an entry somebody else signed. Returns whether it changed anything.
    pub(crate) async fn merge(&self, entry: Entry) -> Result<bool, MembershipError> {
        let mut state = self.state.lock().await;
        let banishes = entry.member().standing == Standing::Banished;
        let changed = state.roster.merge(entry)?;
        let unsaved = state.unsaved.contains(ROSTER);
        if changed || unsaved {
            self.save_roster(&mut state).await?;
        }
        if changed && banishes {
            self.close_window(&mut state).await;
        }
        Ok(changed || unsaved)
    }

    /// Takes in what a node shows of itself, and the grants that lead to whoever signed that, if they hang from an authority that is known here. Returns
    /// what was new, to be passed on.
    pub(crate) async fn introduced(&self, chain: Chain, entry: Entry) -> Result<Vec<Entry>, MembershipError> {
        let led = self.roster().follows(&chain, &entry);
        let mut new = Vec::new();
        for entry in chain.into_entries().into_iter().filter(|_| led).chain([entry]) {
            if self.merge(entry.clone()).await? {
                new.push(entry);
            }
        }
        Ok(new)
    }

    /// One step of somebody's join. What the answer depends on is on disk when this returns.
    pub(crate) async fn admit(
        &self,
        admission: &mut Admission,
        message: &[u8],
    ) -> Result<Result<Step<Admitted>, JoinError>, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office, fleet, words, unsaved, .. } = &mut *state;
        // Hosts without a token ask every member they see.
        let Some(office) = office else { return Ok(Err(JoinError::Refused(Reason::NotAuthority))) };
        if self.leaving.load(Ordering::Relaxed) {
            return Ok(Err(JoinError::Refused(Reason::Busy)));
        }
        if words.moving(roster).is_some() {
            return Ok(Err(JoinError::Refused(Reason::Moves)));
        }
        let fleet = fleet.as_mut().map(|f| f.reception(roster, self.me()));
        let (roster_before, tokens_before) = (roster.digest(), office.tokens.to_bytes());
        let mut desk = Desk { key: &self.key, roster, tokens: &mut office.tokens, approvals: &mut office.approvals, fleet };
        let now = self.clock.now();
        let step = admission.receive(message, &mut desk, now);
        if *office.tokens.to_bytes() != *tokens_before {
            unsaved.insert(TOKENS);
        }
        if roster.digest() != roster_before {
            unsaved.insert(ROSTER);
        }
        // The table first: a roster that is written without it would leave a token that admits one more.
        if state.unsaved.contains(TOKENS) {
            self.save_tokens(&mut state).await?;
        }
        if matches!(step, Ok(Step::Finish(..))) || state.unsaved.contains(ROSTER) {
            // The new member takes our time for its floor, with the operator behind it, also when it asks again because the answer was lost: we
            // must not forget it before that member does. A root that bounds it here may leave with this very change.
            self.clock.within(&state.roster.bundle());
            self.clock.raise(now);
            self.save(clock::FILE, self.clock.to_bytes()).await?;
        }
        if state.unsaved.contains(ROSTER) {
            self.save_roster(&mut state).await?;
        }
        if matches!(&step, Ok(Step::Finish(_, admitted)) if admitted.by_hand()) {
            self.stay(&mut state).await?;
        }
        Ok(step)
    }

    /// What time it is, signed in answer to the question of a member.
    pub(crate) fn time(&self, asker: NodeId, question: &Question) -> Result<Signed, MembershipError> {
        let roster = self.roster();
        if !roster.member(self.me()).is_some_and(Member::is_authority) {
            return Err(self.not_authority(&roster));
        }
        Ok(question.answer_within(self.clock.era(), &self.key, roster.mesh(), asker, self.clock.say())?)
    }

    /// Notes that a person typed the code of a host that waits. Returns whom it has let in already.
    pub(crate) async fn approve(&self, code: ApprovalCode) -> Result<Option<NodeId>, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office, .. } = &mut *state;
        let Some(office) = office else { return Err(self.not_authority(roster)) };
        Ok(office.approvals.approve(code, self.clock.now()))
    }

    /// A new join token that leads to these addresses.
    pub(crate) async fn create_token(
        &self,
        lifetime: Duration,
        uses: u32,
        hints: &[SocketAddr],
    ) -> Result<JoinToken, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office, .. } = &mut *state;
        let Some(office) = office else { return Err(self.not_authority(roster)) };
        let token = office.tokens.create(roster.mesh(), self.key.public(), self.clock.now(), lifetime, uses, hints.to_vec())?;
        self.save_tokens(&mut state).await?;
        Ok(token)
    }

    /// The tokens that could still be used, without their secrets.
    pub(crate) async fn tokens(&self) -> Result<Vec<TokenInfo>, MembershipError> {
        let state = self.state.lock().await;
        match &state.office {
            Some(office) => Ok(office.tokens.list(self.clock.now())),
            None => Err(self.not_authority(&state.roster)),
        }
    }

    /// Makes a token useless. Returns whether there was such a token.
    pub(crate) async fn revoke_token(&self, id: &str) -> Result<bool, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office, unsaved, .. } = &mut *state;
        let Some(office) = office else { return Err(self.not_authority(roster)) };
        let Ok(id) = id.parse() else { return Ok(false) };
        let found = office.tokens.revoke(id);
        if found || unsaved.contains(TOKENS) {
            self.save_tokens(&mut state).await?;
        }
        Ok(found)
    }

    /// Issues SVIDs to a member for names it may have; `None` where a name was refused, which is logged.
    pub(crate) async fn issue(
        &self,
        to: NodeId,
        wanted: &[(Workload, PublicKey)],
        lifetime: Duration,
    ) -> Result<Vec<Option<Leaf>>, MembershipError> {
        let state = self.state.lock().await;
        let Some(office) = &state.office else { return Err(self.not_authority(&state.roster)) };
        if !office.signs {
            return Err(MembershipError::NotYet);
        }
        let member = state.roster.member(to).filter(|_| state.roster.is_active(to));
        let mut leaves = Vec::with_capacity(wanted.len());
        for (workload, subject) in wanted {
            let refusal = match member {
                Some(member) => may_hold(member, workload).err().map(|r| r.to_string()),
                None => Some("the node is not an active member".into()),
            };
            if let Some(reason) = refusal {
                tracing::warn!(node = %to, %workload, %reason, "refused to issue an SVID");
                leaves.push(None);
                continue;
            }
            let id = SpiffeId::new(state.roster.trust_domain().clone(), workload.clone());
            let leaf = office.issuer.issue(&id, subject, to, lifetime, self.clock.now())?;
            tracing::info!(node = %to, %workload, until = leaf.not_after.0, "issued an SVID");
            leaves.push(Some(leaf));
        }
        Ok(leaves)
    }

    /// Makes a root for this node, which is to become an authority, and saves it; the same one at each call. Returns its certificate.
    pub(crate) async fn prepare(&self) -> Result<Vec<u8>, MembershipError> {
        let mut state = self.state.lock().await;
        if let Some(office) = &state.office {
            return Ok(office.issuer.root_der().to_vec());
        }
        state.lost = None;
        let (now, domain) = (self.clock.now(), state.roster.trust_domain().clone());
        // What is left of a root that was never made known, or is not of this mesh, is replaced.
        let saved = Office::load(&self.store).ok().flatten().map(|o| o.issuer);
        if let Some(saved) = saved.filter(|i| i.trust_domain() == &domain && i.not_after() > now + ROOT_LIFETIME / 2) {
            return Ok(saved.root_der().to_vec());
        }
        let issuer = Issuer::create(&domain, self.me(), now, ROOT_LIFETIME)?;
        let (key, root) = issuer.to_parts();
        // Tokens of an office that this node had in another mesh, if the plug was pulled before they were removed.
        self.store.remove(TOKENS)?;
        // A certificate without its key is of no use to anybody; a key without certificate is made again.
        self.store.remove(ROOT_CERTIFICATE)?;
        self.save(ROOT_KEY, key.to_vec()).await?;
        self.save(ROOT_CERTIFICATE, root.to_vec()).await?;
        Ok(root.to_vec())
    }

    /// Does what the roster says about this node's office: takes it when it was made an authority, and gives it up when it is none any
    /// more. Returns the entry by which it says which root it has, to be passed on.
    pub(crate) async fn assume(&self) -> Result<Option<Entry>, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office, lost, unsaved, .. } = &mut *state;
        let me = self.me();
        let Some(member) = roster.member(me).filter(|m| m.is_authority()).cloned() else {
            if office.take().is_some() {
                self.signs.send_replace(None);
                *lost = Some(Instant::now());
                tracing::warn!("this host is no authority any more");
            }
            if lost.is_some_and(|since| since.elapsed() >= REGRET) {
                for name in OFFICE {
                    self.store.remove(name)?;
                }
                *lost = None;
            }
            return Ok(None);
        };
        *lost = None;
        let known = |o: &Office| member.roots.iter().any(|root| root == o.issuer.root_der());
        // What it said of an earlier office, which ended, may be the later word, and names a root that it has not any more.
        let offered = |o: &Office| roster.is_offered(me, o.issuer.root_der());
        if office.is_none() {
            *office = Office::load(&self.store)?.filter(|o| known(o) || offered(o));
            let Some(office) = office else { return Ok(None) };
            tracing::info!(root = %RootId::of(office.issuer.root_der()), "this host was made an authority");
            if office.signs {
                self.signs.send_replace(Some(RootId::of(office.issuer.root_der())));
            }
        }
        let unsaid = office.as_ref().filter(|o| !known(o) && offered(o)).map(|o| o.issuer.root_der().to_vec());
        let said = unsaid.is_none() && member.by == me;
        if roster.founded_by(me) || said && !unsaved.contains(ROSTER) {
            return Ok(None);
        }
        let entry = match roster.entry(me).filter(|_| said) {
            // Signed before, when it could not be saved.
            Some(entry) => entry.clone(),
            None => {
                let mut roots: Vec<_> = member.roots.into_iter().chain(unsaid).collect();
                roots.drain(..roots.len().saturating_sub(MAX_ROOTS));
                roster.stand(&self.key, roots)?
            }
        };
        self.save_roster(&mut state).await?;
        Ok(Some(entry))
    }

    /// The root of an authority that does not sign yet.
    pub(crate) async fn prepared(&self) -> Option<RootId> {
        let state = self.state.lock().await;
        state.office.as_ref().filter(|o| !o.signs).map(|o| RootId::of(o.issuer.root_der()))
    }

    /// Signs with this node's root from now on: everybody who matters believes it.
    pub(crate) async fn begin_to_sign(&self) -> Result<(), MembershipError> {
        let mut state = self.state.lock().await;
        let Some(office) = &mut state.office else { return Ok(()) };
        let root = RootId::of(office.issuer.root_der());
        self.save(SIGNS, root.to_string().into_bytes()).await?;
        office.signs = true;
        self.signs.send_replace(Some(root));
        Ok(())
    }

    /// Makes a member with this root an authority; returns the entry to be passed on.
    pub(crate) async fn appoint(&self, node: NodeId, root: Vec<u8>) -> Result<Entry, MembershipError> {
        self.change(|roster, key| roster.grant(key, node, vec![root])).await
    }

    /// Stands behind an authority that others made, if this node founded the mesh; returns the entry to be passed on, if there is one.
    pub(crate) async fn confirm(&self, node: NodeId) -> Result<Option<Entry>, MembershipError> {
        let mut state = self.state.lock().await;
        self.change_roster(&mut state, |roster| roster.confirm(&self.key, node)).await
    }

    /// Ends the office of an authority; with `roots` false, also what is left of it. Returns the entry to be passed on.
    pub(crate) async fn retire(&self, node: NodeId, roots: bool) -> Result<Entry, MembershipError> {
        self.change(|roster, key| roster.retire(key, node, roots)).await
    }

    /// Puts a member out for ever. Returns the entries to be passed on: what the member had signed and is signed again by this node, and that one last.
    pub(crate) async fn banish(&self, node: NodeId) -> Result<Vec<Entry>, MembershipError> {
        let mut state = self.state.lock().await;
        let words = self.change_roster(&mut state, |roster| roster.banish(&self.key, node)).await?;
        self.close_window(&mut state).await;
        Ok(words)
    }

    /// Takes in what the recovery key signed, all of it or nothing; only where this host is a member with it. That somebody is out gets around
    /// by itself, and for whom the key vouches instead is heard from a member only: all would be strangers.
    pub(crate) async fn recovered(&self, words: &[Entry]) -> Result<(), MembershipError> {
        let mut state = self.state.lock().await;
        if words.iter().any(|w| !state.roster.is_recovery(w.member().by)) {
            return Err(RosterError::NeedsRecovery.into());
        }
        let mut after = state.roster.clone();
        words.iter().try_for_each(|w| after.merge(w.clone()).map(drop))?;
        if !after.is_active(self.me()) {
            return Err(MembershipError::Outside);
        }
        self.change_roster(&mut state, |roster| {
            *roster = after;
            Ok(())
        })
        .await?;
        if words.iter().any(|w| w.member().standing == Standing::Banished) {
            self.close_window(&mut state).await;
        }
        Ok(())
    }

    async fn change(
        &self,
        change: impl FnOnce(&mut Roster, &PrivateKey) -> Result<Entry, RosterError>,
    ) -> Result<Entry, MembershipError> {
        let mut state = self.state.lock().await;
        self.change_roster(&mut state, |roster| change(roster, &self.key)).await
    }

    /// Changes the roster, or leaves it as it was if that cannot be saved.
    async fn change_roster<T>(
        &self,
        state: &mut State,
        change: impl FnOnce(&mut Roster) -> Result<T, RosterError>,
    ) -> Result<T, MembershipError> {
        let mut roster = state.roster.clone();
        let done = change(&mut roster)?;
        let before = std::mem::replace(&mut state.roster, roster);
        let saved = self.save_roster(state).await;
        if saved.is_err() {
            state.roster = before;
        }
        saved.map(|()| done)
    }

    /// Declares that this node leaves, and returns the signed entry for the others.
    pub(crate) async fn leave(&self) -> Result<Entry, MembershipError> {
        self.change(Roster::leave).await
    }

    /// Writes the roster, and shows it to everybody when it is on disk.
    async fn save_roster(&self, state: &mut State) -> Result<(), MembershipError> {
        state.unsaved.insert(ROSTER);
        self.save(ROSTER, state.roster.to_bytes()).await?;
        state.unsaved.remove(ROSTER);
        self.clock.within(&state.roster.bundle());
        self.roster.send_replace(Arc::new(state.roster.clone()));
        Ok(())
    }

    async fn save_tokens(&self, state: &mut State) -> Result<(), MembershipError> {
        let Some(office) = &state.office else { return Ok(()) };
        let bytes = office.tokens.to_bytes();
        state.unsaved.insert(TOKENS);
        self.save(TOKENS, bytes.to_vec()).await?;
        state.unsaved.remove(TOKENS);
        Ok(())
    }

    /// Nothing of this mesh is written any more, or again: what its tasks still hear must not take the place of what another one wrote.
    pub(crate) async fn give_up(&self, over: bool) {
        // What is being written is written to the end.
        let _state = self.state.lock().await;
        self.over.store(over, Ordering::Relaxed);
    }

    /// Writes a state file on a thread that may block: an SD card can take half a second to sync.
    pub(crate) async fn save(&self, name: &'static str, bytes: Vec<u8>) -> Result<(), MembershipError> {
        if self.over.load(Ordering::Relaxed) {
            return Err(MembershipError::Over);
        }
        let store = self.store.clone();
        let bytes = zeroize::Zeroizing::new(bytes);
        tokio::task::spawn_blocking(move || store.save(name, &bytes))
            .await
            .map_err(|e| MembershipError::Write(e.to_string()))?
            .map_err(Into::into)
    }

    fn not_authority(&self, roster: &Roster) -> MembershipError {
        let names: Vec<String> = roster.authorities().map(|m| m.name.to_string()).collect();
        MembershipError::NotAuthority(if names.is_empty() { "an authority (none is known)".into() } else { names.join(" or ") })
    }
}
