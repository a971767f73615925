//! Looks after the authorities of the mesh: takes and gives up this node's own office, makes others authorities where the mesh lacks them,
//! and ends what is left of those that retired.
//!
//! Owns when; what is to be done says `meshd_agent::authorities`, what may be done says the roster. Every node runs it: one that is no
//! authority waits to be made one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::StatusCode;
use meshd_agent::authorities::{CONTESTED, Hearing, View};
use meshd_agent::catalog::Catalog;
use meshd_agent::rotation::Step;
use meshd_ca::bundle::RootId;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::{Entry, Member as RosterMember, Roster};
use meshd_ca::store::Store;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::member::Heard;
use crate::clock::Clock;
use crate::control::gossip::Mailbox;
use crate::control::link::{LinkError, Links};
use crate::control::serve::Prepared;
use crate::membership::{Membership, MembershipError, ROOT_LIFETIME};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);
/// How long a member that would not or could not become an authority is left alone, and one that did not answer.
const REFUSED: Duration = Duration::from_secs(3600);
const UNREACHED: Duration = Duration::from_secs(60);
/// The file: how long each authority that is silent was not heard by earlier lives of this daemon, in seconds; on an authority, each member.
const SILENT: &str = "silent";
/// How long news takes to reach everybody, and whoever was signing something to be done with it.
const NEWS: Duration = Duration::from_secs(12);
/// How long those whom a banished authority had let in are vouched for before the others hear that it is out: gossip keeps no order, and for a moment
/// they would be nobody's members.
pub(crate) const AHEAD: Duration = Duration::from_secs(2);
/// How often that is written while one is silent. An SD card is worn by writes.
const WRITE: Duration = Duration::from_secs(3600);

/// How everybody is heard: as this life of the daemon knows, which has `listening` behind it; or is silent since one `before`; or since it was met, which
/// is noted.
fn hearing(
    roster: &Roster,
    heard: Vec<(NodeId, bool, Duration)>,
    before: &BTreeMap<NodeId, Duration>,
    listening: Duration,
    met: &mut BTreeMap<NodeId, Duration>,
) -> BTreeMap<NodeId, Hearing> {
    let known = |(node, up, time)| (node, if up { Hearing::Up(time) } else { Hearing::Silent(time) });
    let mut all: BTreeMap<NodeId, Hearing> = heard.into_iter().map(known).collect();
    // Who left and comes again is met again.
    met.retain(|node, _| roster.is_active(*node));
    for node in roster.active().map(RosterMember::node) {
        let since = *met.entry(node).or_insert(listening);
        let silence = before.get(&node).map_or(listening - since, |before| *before + listening);
        all.entry(node).or_insert(Hearing::Silent(silence));
    }
    all
}

/// What the task and whoever asks about authorities work with.
pub(crate) struct Authorities {
    membership: Arc<Membership>,
    links: Arc<Links>,
    mailbox: Mailbox,
    catalog: watch::Receiver<Arc<Catalog>>,
    heard: Arc<Heard>,
    clock: Clock,
    /// The longest a certificate lives.
    lifetime: Duration,
    since: Instant,
    /// Silence of authorities from before this daemon was started.
    before: BTreeMap<NodeId, Duration>,
    /// How long this daemon had listened when it first knew of a member.
    met: Mutex<BTreeMap<NodeId, Duration>>,
    refused: Mutex<HashMap<NodeId, Instant>>,
}

/// What everything is decided from, of one moment.
pub(crate) struct Moment {
    me: NodeId,
    roster: Arc<Roster>,
    catalog: Arc<Catalog>,
    heard: BTreeMap<NodeId, Hearing>,
    listening: Duration,
    now: meshd_ca::time::UnixTime,
}

impl Moment {
    /// The same for the rules.
    pub(crate) fn view(&self) -> View<'_> {
        let Self { me, roster, catalog, heard, listening, now } = self;
        View { me: *me, roster, catalog, heard, listening: *listening, now: *now }
    }
}

impl Authorities {
    /// Goes on where an earlier daemon left off.
    pub(crate) fn new(
        membership: Arc<Membership>,
        links: Arc<Links>,
        mailbox: Mailbox,
        catalog: watch::Receiver<Arc<Catalog>>,
        heard: Arc<Heard>,
        (clock, store, lifetime): (Clock, &Store, Duration),
    ) -> Self {
        let before = match store.load(SILENT) {
            Ok(Some(saved)) => serde_json::from_slice::<BTreeMap<NodeId, u64>>(&saved.bytes).unwrap_or_default(),
            // The cost of losing it is a week more until a dead authority is replaced.
            _ => BTreeMap::new(),
        };
        let before = before.into_iter().map(|(node, seconds)| (node, Duration::from_secs(seconds))).collect();
        let (since, met, refused) = (Instant::now(), Mutex::default(), Mutex::default());
        Self { membership, links, mailbox, catalog, heard, clock, lifetime, since, before, met, refused }
    }

    /// What is known now.
    pub(crate) fn moment(&self) -> Moment {
        let listening = self.since.elapsed();
        let roster = self.membership.roster();
        let heard = {
            let mut met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
            hearing(&roster, self.heard.since(), &self.before, listening, &mut met)
        };
        let (me, catalog, now) = (self.membership.me(), self.catalog.borrow().clone(), self.clock.now());
        Moment { me, roster, catalog, heard, listening, now }
    }

    /// Looks for ever.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut roster = self.membership.watch();
        let (mut written, mut silent) = (Instant::now(), self.before.keys().copied().collect());
        let mut retiring: HashMap<NodeId, Instant> = HashMap::new();
        let mut contested: HashMap<NodeId, Instant> = HashMap::new();
        let mut activated = Instant::now();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                changed = roster.changed() => if changed.is_err() { return },
            }
            roster.borrow_and_update();
            if let Err(error) = self.own_office().await {
                tracing::warn!(%error, "this host's office as an authority could not be taken or given up; trying again");
            }
            let moment = self.moment();
            if self.membership.signs().borrow().is_some()
                && let Some(node) = moment.view().appoint(&self.refused())
            {
                match self.appoint(node).await {
                    Ok(()) => tracing::info!(%node, "made a member an authority, so that the mesh outlives the loss of one"),
                    Err(error) => tracing::debug!(%node, error = %error.1, "a member was not made an authority; trying another"),
                }
            }
            self.stand_behind(&moment, &mut contested).await;
            self.end_retired(&moment, &mut retiring).await;
            if let Err(error) = self.rotate(&moment, &mut activated).await {
                tracing::warn!(%error, "this authority's root could not be replaced further; trying again");
            }
            if written.elapsed() >= WRITE {
                written = Instant::now();
                self.write(&moment, &mut silent).await;
            }
        }
    }

    async fn own_office(&self) -> Result<(), MembershipError> {
        if let Some(entry) = self.membership.assume().await? {
            self.mailbox.entry(entry);
        }
        if let Some(root) = self.membership.prepared().await
            && self.moment().view().waiting_for(root).is_empty()
        {
            self.membership.begin_to_sign().await?;
            tracing::info!(%root, "this authority signs from now on: everybody who was here lately believes its root");
        }
        Ok(())
    }

    /// The next step of the rotation of this node's root, if one is due.
    async fn rotate(&self, moment: &Moment, activated: &mut Instant) -> Result<(), MembershipError> {
        let Some(roots) = self.membership.roots().await else { return Ok(()) };
        match moment.view().next_step(&roots, ROOT_LIFETIME / 2, self.lifetime) {
            Some(Step::Prepare) => self.begin_rotation().await.map(drop)?,
            Some(Step::Publish) => {
                if let Some(entry) = self.membership.publish_next().await? {
                    tracing::info!(root = ?roots.next.map(|r| r.to_string()), "a new root of this authority is known from now on");
                    self.mailbox.entry(entry);
                }
            }
            Some(Step::Activate) => {
                self.membership.activate_next().await?;
                *activated = Instant::now();
                tracing::info!(root = ?roots.next.map(|r| r.to_string()), "this authority signs with its new root from now on");
            }
            Some(Step::Retire(old)) if activated.elapsed() >= NEWS => {
                let entry = self.membership.drop_roots(&old).await?;
                tracing::info!(root = %roots.active, "nobody shows a certificate under the old root any more: it is gone");
                self.mailbox.entry(entry);
            }
            Some(Step::Retire(_)) | None => {}
        }
        Ok(())
    }

    /// Begins to replace this node's root; without an effect while that goes on. Returns the name of the new one.
    ///
    /// # Errors
    /// When this node does not sign, or the new root could not be made or saved.
    pub(crate) async fn begin_rotation(&self) -> Result<RootId, MembershipError> {
        let root = self.membership.prepare_next().await?;
        tracing::info!(%root, "a new root of this authority was made");
        Ok(root)
    }

    fn refused(&self) -> BTreeSet<NodeId> {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.retain(|_, until| *until > Instant::now());
        refused.keys().copied().collect()
    }

    /// Makes a member an authority: asks it for its root, and makes that known.
    ///
    /// # Errors
    /// When it does not answer or does not want to, or the roster does not allow it.
    pub(crate) async fn appoint(&self, node: NodeId) -> Result<(), Box<(StatusCode, String)>> {
        let after = |pause, status, why: String| {
            let until = Instant::now() + pause;
            self.refused.lock().unwrap_or_else(PoisonError::into_inner).insert(node, until);
            Box::new((status, why))
        };
        let refused = |status, why| after(REFUSED, status, why);
        let answer = self.links.post(node, "/v1/authority", bytes::Bytes::new()).await.map_err(|e| match e {
            LinkError::Refused(_, status, why) => refused(status, why),
            other => after(UNREACHED, StatusCode::BAD_GATEWAY, other.to_string()),
        })?;
        let prepared: Prepared = serde_json::from_slice(&answer)
            .map_err(|e| refused(StatusCode::BAD_GATEWAY, format!("its answer cannot be read: {e}")))?;
        let entry =
            self.membership.appoint(node, prepared.root.0).await.map_err(|e| refused(StatusCode::CONFLICT, e.to_string()))?;
        self.mailbox.entry(entry);
        Ok(())
    }

    /// Stands behind an authority that others made, if this host is the founder; see [`meshd_ca::roster::Roster::confirm`].
    ///
    /// # Errors
    /// When it could not be saved.
    pub(crate) async fn confirm(&self, node: NodeId) -> Result<(), MembershipError> {
        self.membership.confirm(node).await?.into_iter().for_each(|entry| self.mailbox.entry(entry));
        Ok(())
    }

    /// On the founder: stands behind the authorities that others made, when nobody has put them out for a while.
    async fn stand_behind(&self, moment: &Moment, contested: &mut HashMap<NodeId, Instant>) {
        let now = moment.view().unconfirmed();
        contested.retain(|node, _| now.contains(node));
        for node in now {
            if contested.entry(node).or_insert_with(Instant::now).elapsed() < CONTESTED {
                continue;
            }
            match self.confirm(node).await {
                Ok(()) => tracing::info!(%node, "the founder stands behind an authority that others made"),
                Err(error) => {
                    tracing::warn!(%error, "the founder could not stand behind an authority that others made; trying again")
                }
            }
        }
    }

    /// Ends the office of an authority.
    ///
    /// # Errors
    /// When the roster does not allow it, or it could not be saved.
    pub(crate) async fn retire(&self, node: NodeId) -> Result<(), MembershipError> {
        let entry = self.membership.retire(node, true).await?;
        self.mailbox.entry(entry);
        Ok(())
    }

    /// Puts a member out for ever and tells the others. Everything that ends with that follows from the roster.
    ///
    /// # Errors
    /// When the roster does not allow it, or it could not be saved.
    pub(crate) async fn banish(&self, node: NodeId) -> Result<(), MembershipError> {
        let words = self.membership.banish(node).await?;
        tracing::warn!(%node, "banished");
        self.tell(words).await;
        Ok(())
    }

    /// Takes in what the recovery key signed, and tells the others. Everything that begins or ends with that follows from the roster.
    ///
    /// # Errors
    /// When it is not the recovery key's word, or it could not be saved.
    pub(crate) async fn recovered(&self, words: Vec<Entry>) -> Result<(), MembershipError> {
        self.membership.recovered(&words).await?;
        for member in words.iter().map(Entry::member) {
            tracing::warn!(node = %member.node(), standing = ?member.standing, "the recovery key was used");
        }
        self.tell(words).await;
        Ok(())
    }

    /// Tells the others, the last word some time after the rest: it may put somebody out, and those who are vouched for instead stay without a break.
    async fn tell(&self, mut words: Vec<Entry>) {
        let last = words.pop();
        let whom = |entry: &Entry| entry.member().node();
        let others = words.iter().any(|entry| Some(whom(entry)) != last.as_ref().map(whom));
        words.into_iter().for_each(|entry| self.mailbox.entry(entry));
        if others {
            sleep(AHEAD).await;
        }
        last.into_iter().for_each(|entry| self.mailbox.entry(entry));
    }

    /// Takes the roots of authorities that retired out of the bundle when nobody needs them any more. The one who ended the office does
    /// it.
    async fn end_retired(&self, moment: &Moment, retiring: &mut HashMap<NodeId, Instant>) {
        let mine = |m: &&RosterMember| m.retired && !m.roots.is_empty() && m.by == moment.me;
        let now: Vec<&RosterMember> = moment.roster.active().filter(mine).collect();
        retiring.retain(|node, _| now.iter().any(|m| m.node() == *node));
        for member in now {
            let since = *retiring.entry(member.node()).or_insert_with(Instant::now);
            let roots: Vec<RootId> = member.roots.iter().map(|der| RootId::of(der)).collect();
            let unused = moment.view().may_show(&roots, self.lifetime).is_empty();
            // The news has to reach everybody first, and the authority itself, which may be signing something.
            if since.elapsed() < NEWS || !unused {
                continue;
            }
            match self.membership.retire(member.node(), false).await {
                Ok(entry) => {
                    tracing::info!(node = %member.node(), "nobody shows a certificate of a retired authority any more: its root is gone");
                    self.mailbox.entry(entry);
                }
                Err(error) => tracing::warn!(%error, "the root of a retired authority could not be removed; trying again"),
            }
        }
    }

    /// Remembers how long authorities have been silent: a host that is switched off every night notices a dead one all the same. An
    /// authority remembers it of everybody, because a rotation waits for who was heard lately.
    async fn write(&self, moment: &Moment, known: &mut BTreeSet<NodeId>) {
        let silent: BTreeMap<NodeId, u64> = moment
            .roster
            .active()
            .filter(|m| m.is_authority() || moment.roster.member(moment.me).is_some_and(RosterMember::is_authority))
            .filter_map(|m| match moment.heard.get(&m.node()) {
                Some(Hearing::Silent(time)) => Some((m.node(), time.as_secs())),
                _ => None,
            })
            .collect();
        if silent.is_empty() && known.is_empty() {
            return;
        }
        *known = silent.keys().copied().collect();
        let bytes = serde_json::to_vec(&silent).unwrap_or_default();
        if let Err(error) = self.membership.save(SILENT, bytes).await {
            tracing::debug!(%error, "the silence of authorities was not saved");
        }
    }
}

#[cfg(test)]
mod tests {
    use meshd_ca::identity::{MeshId, TrustDomain};
    use meshd_ca::issue::Issuer;
    use meshd_ca::keys::PrivateKey;
    use meshd_ca::time::UnixTime;

    use super::*;

    #[test]
    fn whom_nobody_heard_is_silent_since_it_is_known_of_over_restarts_and_whatever_the_clocks_say() {
        let (hour, now) = (Duration::from_secs(3600), UnixTime(1_800_000_000));
        let [me, heard, gone, late] = [(); 4].map(|()| PrivateKey::generate().unwrap());
        let id = |key: &PrivateKey| key.public().node_id();
        let mesh = MeshId::from_bytes([1; 10]);
        let root = Issuer::create(&TrustDomain::of(mesh), id(&me), now, 1000 * hour).unwrap().root_der().to_vec();
        let mut roster = Roster::found(mesh, TrustDomain::of(mesh), &me, "me".parse().unwrap(), root, now).unwrap();
        // Years ahead, as it turned out.
        let mut admit = |key: &PrivateKey| roster.admit(&me, key.public(), &"pi".parse().unwrap(), now + 50_000 * hour).map(drop);
        admit(&heard).and_then(|()| admit(&gone)).unwrap();

        let (mut met, mut written) = (BTreeMap::new(), BTreeMap::new());
        hearing(&roster, Vec::new(), &written, Duration::ZERO, &mut met);
        roster.admit(&me, late.public(), &"pi".parse().unwrap(), now).unwrap();
        let all = hearing(&roster, vec![(id(&heard), true, hour)], &written, 5 * hour, &mut met);
        let expected =
            [(&heard, Hearing::Up(hour)), (&gone, Hearing::Silent(5 * hour)), (&late, Hearing::Silent(Duration::ZERO))];
        expected.iter().for_each(|(key, how)| assert_eq!(all.get(&id(key)), Some(how)));

        // Out, and in again.
        let with_late = roster.clone();
        roster.banish(&me, id(&late)).unwrap();
        hearing(&roster, Vec::new(), &written, 6 * hour, &mut met);
        let all = hearing(&with_late, Vec::new(), &written, 7 * hour, &mut met);
        assert_eq!(all.get(&id(&late)), Some(&Hearing::Silent(Duration::ZERO)));
        roster = with_late;

        // Written, and started again.
        written.insert(id(&gone), 5 * hour);
        let all = hearing(&roster, Vec::new(), &written, hour, &mut BTreeMap::new());
        assert_eq!(all.get(&id(&gone)), Some(&Hearing::Silent(6 * hour)));
        assert_eq!(all.get(&id(&late)), Some(&Hearing::Silent(Duration::ZERO)));
    }
}
