//! This node's live credentials: an SVID for itself and for each workload that listens or connects here.
//!
//! Owns the keys, when each certificate is renewed, and which are still needed. Who issues comes in as [`Issuance`]. Every SVID
//! has a key of its own, new with every renewal, which never leaves this process except through [`Svids::export`].
//!
//! Invariant: a renewal that fails changes nothing; the old SVID is shown until it ends. Look-ups on the way of a connection take
//! no lock.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use meshd_ca::bundle::{Root, RootId};
use meshd_ca::identity::{NodeId, SpiffeId, Workload};
use meshd_ca::issue::Leaf;
use meshd_ca::keys::{PrivateKey, base64url, random};
use meshd_ca::time::UnixTime;
use meshd_ca::verify::root_of;
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use zeroize::Zeroizing;

use super::tls::{self, TlsError};
use super::verifier::SvidVerifier;

/// How many workloads have an SVID at most, listeners and clients together. Beyond it the node's own stands in.
pub const MAX_WORKLOADS: usize = 1024;
/// How many of them may be listeners.
pub const MAX_LISTENERS: usize = 512;
/// How many SVIDs are asked for at once.
const BATCH: usize = 64;
/// Patience with one request for SVIDs.
const ISSUE: Duration = Duration::from_secs(15);
/// The first pause after a failed request; each further one is twice as long.
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Requests for the node's own SVID that may fail before connections stop waiting for it.
const HOPELESS: u32 = 2;
/// The longest pause while there is no SVID to show.
const RETRY_WITHOUT: Duration = Duration::from_secs(30);
/// The longest pause while the old one still serves.
const RETRY_WITH: Duration = Duration::from_secs(300);
/// A certificate whose issue lies further in our future than this was issued under a clock that is no longer believed.
const CLOCK_WENT_BACK: Duration = Duration::from_secs(600);

/// Who signs this node's SVIDs.
pub trait Issuance: Send + Sync + 'static {
    /// Why none could be had. Nothing has changed then.
    type Error: fmt::Display + Send;

    /// SVIDs for these workloads over these keys, in the same order; none where the authority refuses the name. The keys are
    /// handed in for a proof of possession and stay here.
    fn issue(&self, wanted: &[(Workload, &PrivateKey)]) -> impl Future<Output = Result<Vec<Option<Leaf>>, Self::Error>> + Send;
}

/// Why a certificate that was issued is not taken, or saved ones cannot be read.
#[derive(Debug, Error)]
pub enum SvidError {
    /// It names somebody else.
    #[error("the certificate is for {0}, which was not asked for; is the authority's meshd of the same version?")]
    OtherName(SpiffeId),
    /// It has ended by our clock.
    #[error("the certificate ended at {0} by this host's clock; `meshd check` says which clock is used")]
    Ended(UnixTime),
    /// It does not fit its key.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Saved bytes that [`Svids::export`] never wrote.
    #[error("the saved certificates cannot be read; they will be issued anew")]
    Saved,
}

/// One certificate with its key, ready for handshakes.
pub struct Svid {
    leaf: Leaf,
    /// What signed it, if that was believed when it was taken.
    root: Option<RootId>,
    issued: UnixTime,
    key: PrivateKey,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Svid {
    fn new(leaf: Leaf, issued: UnixTime, key: PrivateKey, verifier: &Arc<SvidVerifier>) -> Result<Self, TlsError> {
        let shown = tls::certified(leaf.der.clone(), &key)?;
        let (client, server) = (tls::data_client(verifier, shown.clone())?, tls::data_server(verifier, shown)?);
        let root = root_of(&leaf.der, &verifier.trust().bundle);
        Ok(Self { leaf, root, issued, key, client, server })
    }

    /// Whom it names.
    pub fn id(&self) -> &SpiffeId {
        &self.leaf.id
    }
    /// The certificate.
    pub fn leaf(&self) -> &Leaf {
        &self.leaf
    }
    /// Dials with it.
    pub fn client(&self) -> &Arc<ClientConfig> {
        &self.client
    }
    /// Accepts with it.
    pub fn server(&self) -> &Arc<ServerConfig> {
        &self.server
    }
}

/// A certificate this node holds.
#[derive(Debug, Clone)]
pub struct Held {
    /// The certificate.
    pub leaf: Leaf,
    /// When the next one is asked for.
    pub renew_at: UnixTime,
    /// The root that signed it, if that was believed when the certificate was taken.
    pub root: Option<RootId>,
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Svid({} until {})", self.leaf.id, self.leaf.not_after)
    }
}

/// How patient [`Svids`] are.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// How long a connection waits for the SVID of a client that was never seen before.
    pub client: Duration,
    /// How long a connection, in or out, waits for the node's own SVID: others dial as soon as they know the node.
    pub own: Duration,
    /// After how long without a connection a client's SVID is no longer renewed.
    pub forget: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { client: Duration::from_millis(500), own: Duration::from_secs(5), forget: Duration::from_secs(3600) }
    }
}

/// One workload that has, or is to get, an SVID.
struct Slot {
    svid: ArcSwapOption<Svid>,
    /// The node itself, or a listener: kept whether connections come or not.
    kept: AtomicBool,
    seen: AtomicU64,
    plan: Mutex<Plan>,
}

#[derive(Default)]
struct Plan {
    renew_at: UnixTime,
    retry_at: Option<Instant>,
    failures: u32,
}

impl Slot {
    fn new(kept: bool, now: UnixTime) -> Arc<Self> {
        Arc::new(Self {
            svid: ArcSwapOption::empty(),
            kept: AtomicBool::new(kept),
            seen: AtomicU64::new(now.0),
            plan: Mutex::default(),
        })
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn valid(&self, now: UnixTime) -> Option<Arc<Svid>> {
        self.svid.load_full().filter(|s| now <= s.leaf.not_after)
    }

    fn idle(&self, now: UnixTime) -> Option<Duration> {
        let seen = UnixTime(self.seen.load(Ordering::Relaxed));
        (!self.kept.load(Ordering::Relaxed)).then(|| now.since(seen))
    }

    /// How long until it is to be issued or renewed, when these are the roots that everybody believes.
    fn due_in(&self, now: UnixTime, instant: Instant, roots: &BTreeSet<RootId>) -> Duration {
        let plan = self.plan();
        let retry = plan.retry_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(instant));
        let renew = match &*self.svid.load() {
            None => Duration::ZERO,
            Some(s) if now + CLOCK_WENT_BACK < s.issued => Duration::ZERO,
            // Its authority left or was put out: nobody believes it any more.
            Some(s) if s.root.is_none_or(|r| !roots.contains(&r)) => Duration::ZERO,
            Some(_) => plan.renew_at.since(now),
        };
        retry.max(renew)
    }

    fn failed(&self, now: UnixTime, instant: Instant) {
        let mut plan = self.plan();
        let longest = match self.valid(now) {
            None => RETRY_WITHOUT,
            Some(s) => RETRY_WITH.min(s.leaf.not_after.since(now) / 8).max(FIRST_RETRY),
        };
        let pause = FIRST_RETRY.saturating_mul(1 << plan.failures.min(16)).min(longest);
        plan.failures += 1;
        plan.retry_at = Some(instant + jitter(pause));
    }

    fn succeeded(&self, svid: Svid) {
        // A third, so that two whole attempts at a later time remain. A second at the least: mesh time has no smaller step.
        let wait = jitter(svid.leaf.not_after.since(svid.issued) / 3).max(Duration::from_secs(1));
        *self.plan() = Plan { renew_at: svid.issued + wait, ..Plan::default() };
        self.svid.store(Some(Arc::new(svid)));
    }
}

/// A span that is up to a tenth longer or shorter, so that a mesh that started together does not renew together.
fn jitter(span: Duration) -> Duration {
    let r = random::<1>().map_or(127, |[b]| b);
    span.mul_f64(0.9 + 0.2 * f64::from(r) / 255.0)
}

type Slots = HashMap<Workload, Arc<Slot>>;

/// All SVIDs of this node.
pub struct Svids {
    id: NodeId,
    node: Workload,
    own: Arc<Slot>,
    verifier: Arc<SvidVerifier>,
    patience: Patience,
    /// Replaced as a whole, by one writer at a time.
    slots: ArcSwap<Slots>,
    writer: Mutex<()>,
    wish: Notify,
    issued: watch::Sender<u64>,
    fallbacks: AtomicU64,
    failures: AtomicU64,
}

impl Svids {
    /// No SVIDs yet, and the wish for the node's own.
    pub fn new(id: NodeId, verifier: Arc<SvidVerifier>, patience: Patience) -> Arc<Self> {
        let (node, own) = (Workload::Node(id), Slot::new(true, verifier.now()));
        let slots = Slots::from([(node.clone(), own.clone())]);
        Arc::new(Self {
            id,
            node,
            own,
            verifier,
            patience,
            slots: ArcSwap::from_pointee(slots),
            writer: Mutex::new(()),
            wish: Notify::new(),
            issued: watch::channel(0).0,
            fallbacks: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        })
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.id
    }

    /// The node's own SVID, as long as it is good.
    pub fn own(&self) -> Option<Arc<Svid>> {
        self.good(&self.own)
    }

    /// An SVID that is in date and of a root that is believed: the peer believes the same, or soon will.
    fn good(&self, slot: &Slot) -> Option<Arc<Svid>> {
        slot.valid(self.verifier.now()).filter(|s| s.root.is_some_and(|root| self.verifier.believes(root)))
    }

    /// The SVID to show for a listener, or the node's own where the listener's workload is unknown or has none yet. A node that
    /// has none that would be believed, because it has just joined or the authority that signed them was put out, waits a moment for its own.
    pub async fn for_listener(&self, workload: Option<&Workload>) -> Option<Arc<Svid>> {
        let Some(workload) = workload else { return self.own_in_time().await };
        let slot = self.slots.load().get(workload).cloned();
        match slot.and_then(|s| self.good(&s)) {
            Some(svid) => Some(svid),
            None => self.stand_in().await,
        }
    }

    /// What [`Svids::for_listener`] would say now, without waiting.
    pub fn shown_for(&self, workload: Option<&Workload>) -> Option<Arc<Svid>> {
        let slot = workload.and_then(|w| self.slots.load().get(w).cloned());
        slot.and_then(|s| self.good(&s)).or_else(|| self.own())
    }

    /// The SVID to dial with for a workload. The first connection of a workload waits a moment for it to be issued; where that
    /// takes too long or failed before, the node's own stands in, which is counted.
    pub async fn for_client(&self, workload: &Workload) -> Option<Arc<Svid>> {
        let mut issued = self.issued.subscribe();
        let Some(slot) = self.client_slot(workload) else { return self.stand_in().await };
        let deadline = Instant::now() + self.patience.client;
        loop {
            issued.borrow_and_update();
            if let Some(svid) = self.good(&slot) {
                return Some(svid);
            }
            let hopeless = slot.plan().failures > 0;
            if hopeless || !matches!(timeout_at(deadline, issued.changed()).await, Ok(Ok(()))) {
                return self.stand_in().await;
            }
        }
    }

    async fn stand_in(&self) -> Option<Arc<Svid>> {
        self.fallbacks.fetch_add(1, Ordering::Relaxed);
        self.own_in_time().await
    }

    async fn own_in_time(&self) -> Option<Arc<Svid>> {
        if let Some(own) = self.own() {
            return Some(own);
        }
        let mut issued = self.issued.subscribe();
        let deadline = Instant::now() + self.patience.own;
        loop {
            issued.borrow_and_update();
            if let Some(own) = self.own() {
                return Some(own);
            }
            let hopeless = self.own.plan().failures > HOPELESS;
            if hopeless || !matches!(timeout_at(deadline, issued.changed()).await, Ok(Ok(()))) {
                // Better than none: the peer may not have heard yet that its root is not believed any more.
                return self.own.valid(self.verifier.now());
            }
        }
    }

    /// The slot of a client, made if it is new and there is room.
    fn client_slot(&self, workload: &Workload) -> Option<Arc<Slot>> {
        let now = self.verifier.now();
        if let Some(slot) = self.slots.load().get(workload) {
            slot.seen.store(now.0, Ordering::Relaxed);
            return Some(slot.clone());
        }
        let slot = self.change(|slots| {
            if slots.len() >= MAX_WORKLOADS && !slots.contains_key(workload) {
                // The longest unused client makes room, unless even that one is in use.
                let (idle, oldest) = slots.iter().filter_map(|(w, s)| Some((s.idle(now)?, w.clone()))).max()?;
                if idle < Duration::from_secs(60) {
                    return None;
                }
                slots.remove(&oldest);
            }
            Some(slots.entry(workload.clone()).or_insert_with(|| Slot::new(false, now)).clone())
        })?;
        self.wish.notify_one();
        Some(slot)
    }

    fn change<T>(&self, f: impl FnOnce(&mut Slots) -> T) -> T {
        let _one = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slots = Slots::clone(&self.slots.load());
        let result = f(&mut slots);
        self.slots.store(Arc::new(slots));
        result
    }

    /// Says which workloads listen here by now; their SVIDs are issued ahead of the first connection. The first
    /// [`MAX_LISTENERS`] count.
    pub fn set_listeners(&self, workloads: &BTreeSet<Workload>) {
        let now = self.verifier.now();
        let wanted = || workloads.iter().take(MAX_LISTENERS);
        let slots = self.slots.load();
        let same = slots.iter().all(|(w, s)| *w == self.node || s.kept.load(Ordering::Relaxed) == workloads.contains(w))
            && wanted().all(|w| slots.contains_key(w));
        if same {
            return;
        }
        self.change(|slots| {
            for (_, slot) in slots.iter().filter(|(w, _)| **w != self.node && !workloads.contains(w)) {
                if slot.kept.swap(false, Ordering::Relaxed) {
                    slot.seen.store(now.0, Ordering::Relaxed);
                }
            }
            for w in wanted() {
                slots.entry(w.clone()).or_insert_with(|| Slot::new(true, now)).kept.store(true, Ordering::Relaxed);
            }
        });
        self.wish.notify_one();
    }

    /// Issues, renews and forgets, for as long as it is polled. All times are compared anew each round, and no round is more than
    /// a few seconds away: a host that slept for a week renews at once.
    pub async fn run(&self, issuance: &impl Issuance) -> Infallible {
        loop {
            while self.round(issuance).await {}
            let pause = self.next_round().clamp(Duration::from_millis(100), Duration::from_secs(5));
            let _ = timeout(pause, self.wish.notified()).await;
        }
    }

    fn next_round(&self) -> Duration {
        let (now, instant, roots) = (self.verifier.now(), Instant::now(), self.trusted());
        self.slots.load().values().map(|s| s.due_in(now, instant, &roots)).min().unwrap_or(Duration::MAX)
    }

    /// The roots that peers are verified against now.
    pub fn trusted(&self) -> BTreeSet<RootId> {
        self.verifier.trust().bundle.roots.iter().map(Root::id).collect()
    }

    /// The roots that signed the certificates held now.
    pub fn shown(&self) -> BTreeSet<RootId> {
        self.slots.load().values().filter_map(|s| s.svid.load_full()?.root).collect()
    }

    /// Looks at once what is due: the roots have changed.
    pub fn trust_changed(&self) {
        self.wish.notify_one();
    }

    /// Asks for what is due. Returns whether there was so much that more is due already.
    async fn round(&self, issuance: &impl Issuance) -> bool {
        let (now, instant, roots) = (self.verifier.now(), Instant::now(), self.trusted());
        self.forget(now);
        let due = |(_, s): &(&Workload, &Arc<Slot>)| s.due_in(now, instant, &roots).is_zero();
        let slots = self.slots.load_full();
        // The node's own first: it stands in for all others.
        let mut due: Vec<_> = slots.iter().filter(due).map(|(w, s)| (w.clone(), s.clone())).collect();
        due.sort_by_key(|(w, _)| *w != self.node);
        let more = due.len() > BATCH;
        due.truncate(BATCH);
        if due.is_empty() {
            return false;
        }
        let Ok(keys) = due.iter().map(|_| PrivateKey::generate()).collect::<Result<Vec<_>, _>>() else {
            tracing::error!("the operating system gives no random bytes: no certificate can be renewed");
            sleep(FIRST_RETRY).await;
            return false;
        };
        let wanted: Vec<_> = due.iter().zip(&keys).map(|((w, _), k)| (w.clone(), k)).collect();
        let answer = timeout(ISSUE, issuance.issue(&wanted)).await;
        drop(wanted);
        let (now, instant) = (self.verifier.now(), Instant::now());
        let leaves = match answer {
            Ok(Ok(leaves)) => leaves,
            Ok(Err(error)) => return self.all_failed(&due, &error.to_string()),
            Err(_) => return self.all_failed(&due, "no answer in time"),
        };
        let mut leaves = leaves.into_iter();
        for ((workload, slot), key) in due.into_iter().zip(keys) {
            let taken = match leaves.next().flatten() {
                Some(leaf) => self.take(&workload, key, leaf, now).map_err(|e| e.to_string()),
                None => Err("the authority refuses the name".into()),
            };
            match taken {
                Ok(svid) => slot.succeeded(svid),
                Err(error) => {
                    tracing::warn!(%workload, %error, "no certificate");
                    self.failures.fetch_add(1, Ordering::Relaxed);
                    slot.failed(now, instant);
                }
            }
        }
        self.issued.send_modify(|n| *n += 1);
        more
    }

    fn all_failed(&self, due: &[(Workload, Arc<Slot>)], error: &str) -> bool {
        tracing::warn!(error, workloads = due.len(), "certificates could not be issued; trying again");
        self.failures.fetch_add(due.len() as u64, Ordering::Relaxed);
        let (now, instant) = (self.verifier.now(), Instant::now());
        due.iter().for_each(|(_, slot)| slot.failed(now, instant));
        // Those who wait for one of these need not wait longer.
        self.issued.send_modify(|n| *n += 1);
        false
    }

    fn take(&self, workload: &Workload, key: PrivateKey, leaf: Leaf, now: UnixTime) -> Result<Svid, SvidError> {
        let wanted = SpiffeId::new(self.verifier.trust().bundle.trust_domain.clone(), workload.clone());
        if leaf.id != wanted {
            return Err(SvidError::OtherName(leaf.id));
        }
        if leaf.not_after <= now {
            return Err(SvidError::Ended(leaf.not_after));
        }
        Ok(Svid::new(leaf, now, key, &self.verifier)?)
    }

    fn forget(&self, now: UnixTime) {
        let stale = |s: &Slot| s.idle(now).is_some_and(|idle| idle > self.patience.forget);
        if self.slots.load().values().any(|s| stale(s)) {
            self.change(|slots| slots.retain(|_, s| !stale(s)));
        }
    }

    /// Changes whenever certificates were issued or could not be: the moment to [`Svids::export`].
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.issued.subscribe()
    }

    /// How often the node's own SVID stood in for a workload's.
    pub fn fallbacks(&self) -> u64 {
        self.fallbacks.load(Ordering::Relaxed)
    }

    /// How many certificates could not be had, each attempt counted.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// All certificates of this moment, sorted by workload.
    pub fn held(&self) -> Vec<Held> {
        let slots = self.slots.load();
        let held = slots.values().filter_map(|s| Some((s.svid.load_full()?, s.plan().renew_at)));
        let mut held: Vec<_> = held.map(|(svid, renew_at)| Held { leaf: svid.leaf.clone(), renew_at, root: svid.root }).collect();
        held.sort_by(|a, b| a.leaf.id.cmp(&b.leaf.id));
        held
    }

    /// All certificates with their keys, to be kept over a restart: a secret.
    pub fn export(&self) -> Zeroizing<Vec<u8>> {
        let saved: Vec<_> = self.slots.load().values().filter_map(|s| s.svid.load_full()).map(|s| Saved::from(&*s)).collect();
        // Plain text and numbers: writing them cannot fail.
        Zeroizing::new(serde_json::to_vec(&saved).unwrap_or_default())
    }

    /// Takes back what [`Svids::export`] gave, except what has ended, fits no key or belongs to another mesh or node. Returns how
    /// many certificates that were.
    ///
    /// # Errors
    /// [`SvidError::Saved`] when the bytes are something else.
    pub fn import(&self, bytes: &[u8]) -> Result<usize, SvidError> {
        let saved: Vec<Saved> = serde_json::from_slice(bytes).map_err(|_| SvidError::Saved)?;
        let (now, trust) = (self.verifier.now(), self.verifier.trust());
        let mut taken = 0;
        // Saved under an earlier key of this host: good until there are others, which is to be soon.
        let earlier = saved.iter().any(|s| matches!(s.id.workload, Workload::Node(node) if node != self.id));
        for s in saved.into_iter().take(MAX_WORKLOADS) {
            let workload = s.id.workload.clone();
            let foreign =
                s.id.trust_domain != trust.bundle.trust_domain || matches!(workload, Workload::Node(node) if node != self.id);
            if foreign || s.not_after <= now {
                continue;
            }
            let leaf = Leaf { der: s.certificate.clone(), id: s.id.clone(), not_before: s.not_before, not_after: s.not_after };
            let Ok(key) = PrivateKey::from_pkcs8(&s.key) else { continue };
            let Ok(svid) = Svid::new(leaf, s.issued, key, &self.verifier) else { continue };
            let slot = self.change(|slots| slots.entry(workload).or_insert_with(|| Slot::new(false, now)).clone());
            slot.succeeded(svid);
            if earlier {
                slot.plan().renew_at = now;
            }
            taken += 1;
        }
        self.issued.send_modify(|n| *n += 1);
        Ok(taken)
    }
}

/// The form on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    id: SpiffeId,
    issued: UnixTime,
    not_before: UnixTime,
    not_after: UnixTime,
    #[serde(with = "base64url")]
    certificate: Vec<u8>,
    #[serde(with = "base64url")]
    key: Vec<u8>,
}

impl From<&Svid> for Saved {
    fn from(s: &Svid) -> Self {
        let Leaf { der, id, not_before, not_after } = s.leaf.clone();
        Self { id, issued: s.issued, not_before, not_after, certificate: der, key: s.key.pkcs8().to_vec() }
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.key);
    }
}
