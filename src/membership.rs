//! What this node is in its mesh: its key, the roster, and - on an authority - the office: root key and tokens.
//!
//! Owns the one mutable roster of the process and its file. Everything else reads immutable snapshots from [`Membership::watch`].
//! A change is on disk before anybody is told that it happened. Files of the state directory: `node.key`, `roster`, `root.key`,
//! `root.crt`, `tokens`, each in two generations (`meshd_ca::store`).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::approval::{ApprovalCode, Approvals};
use meshd_ca::bundle::Bundle;
use meshd_ca::identity::{HostName, MeshId, NodeId, SpiffeId, TrustDomain, Workload};
use meshd_ca::issue::{Issuer, Leaf, may_hold};
use meshd_ca::join::{Admission, Admitted, Authority, JoinError, Reason, Step};
use meshd_ca::keys::{self, PrivateKey, PublicKey};
use meshd_ca::roster::{Entry, Member, Roster, RosterError};
use meshd_ca::store::{Store, StoreError};
use meshd_ca::token::{JoinToken, TokenInfo, TokenTable};
use thiserror::Error;
use tokio::sync::{Mutex, watch};

use crate::clock::Clock;

/// How long a root lives: ten years (design section 4).
pub(crate) const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

const KEY: &str = "node.key";
const ROSTER: &str = "roster";
const ROOT_KEY: &str = "root.key";
const ROOT_CERTIFICATE: &str = "root.crt";
const TOKENS: &str = "tokens";

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
    /// Only an authority can do that.
    #[error("this host is not an authority of its mesh: run the command on {0}")]
    NotAuthority(String),
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
}

struct State {
    roster: Roster,
    office: Option<Office>,
}

struct Office {
    issuer: Issuer,
    tokens: TokenTable,
    /// In memory only: a person types again after a restart.
    approvals: Approvals,
}

/// Borrows the state as the join protocol wants to see an authority.
struct Desk<'a> {
    key: &'a PrivateKey,
    roster: &'a mut Roster,
    tokens: &'a mut TokenTable,
    approvals: &'a mut Approvals,
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
}

/// The node key of this state directory, made and saved at the first call.
///
/// # Errors
/// When the directory cannot be read or written, or the key file is damaged in both generations.
pub(crate) fn node_key(store: &Store) -> Result<PrivateKey, MembershipError> {
    if let Some(saved) = store.load(KEY)? {
        return Ok(PrivateKey::from_pkcs8(&saved.bytes)?);
    }
    let key = PrivateKey::generate()?;
    store.save(KEY, key.pkcs8())?;
    Ok(key)
}

impl Membership {
    /// Founds a mesh with this node as its first member and authority.
    pub(crate) fn found(
        key: Arc<PrivateKey>,
        store: Arc<Store>,
        clock: Clock,
        name: HostName,
        trust_domain: Option<TrustDomain>,
    ) -> Result<Self, MembershipError> {
        let mesh = MeshId::from_bytes(keys::random()?);
        let trust_domain = trust_domain.unwrap_or_else(|| TrustDomain::of(mesh));
        let issuer = Issuer::create(&trust_domain, key.public().node_id(), clock.now(), ROOT_LIFETIME)?;
        let roster = Roster::found(mesh, trust_domain, &key, name, issuer.root_der().to_vec())?;
        let (root_key, root_der) = issuer.to_parts();
        // The roster comes last: without it the other files mean nothing and the next start founds anew.
        store.save(ROOT_KEY, root_key)?;
        store.save(ROOT_CERTIFICATE, root_der)?;
        let tokens = TokenTable::default();
        store.save(TOKENS, &tokens.to_bytes())?;
        store.save(ROSTER, &roster.to_bytes())?;
        Ok(Self::with(key, store, clock, roster, Some(Office { issuer, tokens, approvals: Approvals::default() })))
    }

    /// The membership saved in `store`, if there is one and this node is active in it.
    pub(crate) fn load(key: Arc<PrivateKey>, store: Arc<Store>, clock: Clock) -> Result<Option<Self>, MembershipError> {
        let Some(saved) = store.load(ROSTER)? else { return Ok(None) };
        let roster = Roster::from_bytes(&saved.bytes)?;
        let me = key.public().node_id();
        if !roster.is_active(me) {
            return Ok(None);
        }
        let office =
            match (roster.member(me).is_some_and(Member::is_authority), store.load(ROOT_KEY)?, store.load(ROOT_CERTIFICATE)?) {
                (true, Some(root_key), Some(root_der)) => {
                    let tokens = match store.load(TOKENS)? {
                        Some(saved) => TokenTable::from_bytes(&saved.bytes)?,
                        None => TokenTable::default(),
                    };
                    Some(Office {
                        issuer: Issuer::from_parts(&root_key.bytes, &root_der.bytes)?,
                        tokens,
                        approvals: Approvals::default(),
                    })
                }
                _ => None,
            };
        Ok(Some(Self::with(key, store, clock, roster, office)))
    }

    /// Takes the place in another mesh that a join has just granted. An own root of before is dropped.
    pub(crate) fn adopt(key: Arc<PrivateKey>, store: Arc<Store>, clock: Clock, roster: Roster) -> Result<Self, MembershipError> {
        store.save(ROSTER, &roster.to_bytes())?;
        for old in [ROOT_KEY, ROOT_CERTIFICATE, TOKENS] {
            store.remove(old)?;
        }
        Ok(Self::with(key, store, clock, roster, None))
    }

    /// Forgets the mesh; the node key stays, so that a later join finds the same node.
    pub(crate) fn forget(store: &Store) -> Result<(), StoreError> {
        for name in [ROSTER, ROOT_KEY, ROOT_CERTIFICATE, TOKENS] {
            store.remove(name)?;
        }
        Ok(())
    }

    fn with(key: Arc<PrivateKey>, store: Arc<Store>, clock: Clock, roster: Roster, office: Option<Office>) -> Self {
        let (sender, _) = watch::channel(Arc::new(roster.clone()));
        Self { key, store, clock, state: Mutex::new(State { roster, office }), roster: sender }
    }

    /// This node's id.
    pub(crate) fn me(&self) -> NodeId {
        self.key.public().node_id()
    }

    /// This node's key.
    pub(crate) fn key(&self) -> &Arc<PrivateKey> {
        &self.key
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

    /// Whether this node holds an authority's root key.
    pub(crate) async fn is_authority(&self) -> bool {
        self.state.lock().await.office.is_some()
    }

    /// Adds an entry somebody else signed. Returns whether it changed anything.
    pub(crate) async fn merge(&self, entry: Entry) -> Result<bool, MembershipError> {
        let mut state = self.state.lock().await;
        if !state.roster.merge(entry)? {
            return Ok(false);
        }
        self.save_roster(&state.roster).await?;
        Ok(true)
    }

    /// One step of somebody's join. What the answer depends on is on disk when this returns.
    pub(crate) async fn admit(
        &self,
        admission: &mut Admission,
        message: &[u8],
    ) -> Result<Result<Step<Admitted>, JoinError>, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office } = &mut *state;
        // Hosts without a token ask every member they see.
        let Some(office) = office else { return Ok(Err(JoinError::Refused(Reason::NotAuthority))) };
        let (roster_before, tokens_before) = (roster.digest(), office.tokens.to_bytes());
        let mut desk = Desk { key: &self.key, roster, tokens: &mut office.tokens, approvals: &mut office.approvals };
        let step = admission.receive(message, &mut desk, self.clock.now());
        let tokens = office.tokens.to_bytes();
        if *tokens != *tokens_before {
            self.save(TOKENS, tokens.to_vec()).await?;
        }
        if roster.digest() != roster_before {
            self.save_roster(roster).await?;
        }
        Ok(step)
    }

    /// Notes that a person typed the code of a host that waits. Returns whom it has let in already.
    pub(crate) async fn approve(&self, code: ApprovalCode) -> Result<Option<NodeId>, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office } = &mut *state;
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
        let State { roster, office } = &mut *state;
        let Some(office) = office else { return Err(self.not_authority(roster)) };
        let token = office.tokens.create(roster.mesh(), self.key.public(), self.clock.now(), lifetime, uses, hints.to_vec())?;
        let bytes = office.tokens.to_bytes();
        self.save(TOKENS, bytes.to_vec()).await?;
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
        let State { roster, office } = &mut *state;
        let Some(office) = office else { return Err(self.not_authority(roster)) };
        let Ok(id) = id.parse() else { return Ok(false) };
        let found = office.tokens.revoke(id);
        if found {
            let bytes = office.tokens.to_bytes();
            self.save(TOKENS, bytes.to_vec()).await?;
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

    /// Declares that this node leaves, and returns the signed entry for the others.
    pub(crate) async fn leave(&self) -> Result<Entry, MembershipError> {
        let mut state = self.state.lock().await;
        let entry = state.roster.leave(&self.key)?;
        self.save_roster(&state.roster).await?;
        Ok(entry)
    }

    async fn save_roster(&self, roster: &Roster) -> Result<(), MembershipError> {
        self.save(ROSTER, roster.to_bytes()).await?;
        self.roster.send_replace(Arc::new(roster.clone()));
        Ok(())
    }

    /// Writes a state file on a thread that may block: an SD card can take half a second to sync.
    pub(crate) async fn save(&self, name: &'static str, bytes: Vec<u8>) -> Result<(), MembershipError> {
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
