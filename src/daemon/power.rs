//! Pulled plugs: what this host is, and what others were told about it, when the power goes at any moment of founding, joining, admitting, being
//! made an authority, replacing keys and roots, banishing, leaving and coming back.
//!
//! Every system call of the real code is written down (`ca/src/store/power.rs`); after each, everything that the disk may hold is started from. A fact
//! that somebody was told is true then, or the next one that was on its way is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::identity::{HostName, NodeId};
use meshd_ca::join::{Admission, Channel, JoinError, Joined, Joiner, Reason, Step, Suitor};
use meshd_ca::keys::PrivateKey;
use meshd_ca::merge::{Answer, Destination, Offer};
use meshd_ca::roster::Roster;
use meshd_ca::store::{Disk, Store, StoreError};
use meshd_ca::time::UnixTime;
use meshd_ca::token::{JoinToken, MergeToken, TokenState};

use super::keeper::Sequence;
use super::{gone, past, resume, settle};
use crate::clock::Clock;
use crate::membership::{Membership, MembershipError, take_node_key};

// The store's own tests use the rest of it.
#[allow(dead_code)]
#[path = "../../ca/src/store/power.rs"]
mod cut;
use cut::{Acts, Recorder, Tear};

const START: UnixTime = UnixTime(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);

/// One host: its disk, and what was ever said about it.
struct Host {
    _dir: tempfile::TempDir,
    disk: Recorder,
    store: Arc<Store>,
    clock: Clock,
    key: Arc<PrivateKey>,
    membership: Option<Arc<Membership>>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Recorder::new(dir.path(), &[]);
        let store = Arc::new(disk.open(&dir.path().join("state")));
        let key = Arc::new(take_node_key(&store).unwrap());
        let host = Self { _dir: dir, disk, store, clock: Clock::new(START), key, membership: None };
        host.told("key", host.node());
        host
    }

    fn node(&self) -> NodeId {
        self.key.public().node_id()
    }

    fn told(&self, what: &str, is: impl ToString) {
        self.disk.told(&format!("{what}={}", is.to_string()));
    }

    fn member(&self) -> &Arc<Membership> {
        self.membership.as_ref().unwrap()
    }

    fn found(&mut self) {
        let name = HostName::nearest("founder");
        let membership = Membership::found(self.key.clone(), self.store.clone(), self.clock.clone(), name, None, None).unwrap();
        self.told("is", format!("member {}", membership.roster().mesh()));
        self.told("root", membership.signs().borrow().unwrap());
        self.told("signs", membership.signs().borrow().unwrap());
        self.membership = Some(Arc::new(membership));
    }

    async fn token(&self) -> JoinToken {
        let hint = SocketAddr::from(([127, 0, 0, 1], 6374));
        let token = self.member().create_token(HOUR, 1, &[hint]).await.unwrap();
        self.told(&format!("token {}", token.id), "good");
        token
    }

    /// Joins with a token, and takes the place.
    async fn join(&mut self, authority: &Self, token: &JoinToken) {
        let joined = handshake(authority, &self.key, token).await.unwrap().unwrap();
        authority.told(&format!("token {}", token.id), "used");
        authority.told(&format!("member {}", self.node()), "active");
        let (membership, _) = settle(&self.key, &self.store, &self.clock, joined).unwrap();
        self.told("is", format!("member {}", membership.roster().mesh()));
        self.membership = Some(Arc::new(membership));
    }

    /// Leaves, or does what follows from having been put out.
    fn goes(&mut self, why: &str) {
        gone(&self.store, self.node(), why).unwrap();
        self.told("root", "none");
        self.told("signs", "none");
        self.membership = None;
    }
}

/// The whole conversation of a host with an authority, over one connection.
async fn handshake(authority: &Host, key: &PrivateKey, token: &JoinToken) -> Result<Result<Joined, JoinError>, MembershipError> {
    let exporter = meshd_ca::keys::random().unwrap();
    let (mine, theirs) = (*key.public(), *authority.key.public());
    let (mut joiner, mut message) =
        Joiner::start(token.clone(), Channel { exporter, mine, theirs }, HostName::nearest("host")).unwrap();
    let mut admission = Admission::start(Channel { exporter, mine: theirs, theirs: mine });
    loop {
        let answer = match authority.member().admit(&mut admission, &message).await? {
            Ok(Step::Send(answer) | Step::Finish(answer, _)) => answer,
            Ok(Step::Done(_)) => unreachable!("an authority has the last word"),
            Err(refused) => return Ok(Err(refused)),
        };
        match joiner.receive(&answer) {
            Ok(Step::Send(next)) => message = next,
            Ok(Step::Finish(_, joined) | Step::Done(joined)) => return Ok(Ok(joined)),
            Err(error) => return Ok(Err(error)),
        }
    }
}

/// The tokens with which somebody new could join.
async fn open_tokens(membership: &Membership) -> BTreeSet<String> {
    let tokens = membership.tokens().await.unwrap_or_default();
    tokens.iter().filter(|t| t.state == TokenState::Open).map(|t| t.id.to_string()).collect()
}

type Facts = BTreeMap<String, String>;

/// A host that starts from what is on a disk.
fn start(root: &Path) -> Host {
    // Its own flushes cost nothing.
    let disk = Recorder::new(root, &[]);
    let store = Arc::new(disk.open(&root.join("state")));
    let key = Arc::new(take_node_key(&store).unwrap());
    let clock = Clock::load(&store).unwrap();
    let membership = resume(&key, &store, &clock).unwrap().map(Arc::new);
    Host { _dir: tempfile::tempdir().unwrap(), disk, store, clock, key, membership }
}

/// What a host knows that starts now, of the facts that anybody was ever told.
async fn facts(host: &Host, asked: &BTreeSet<String>) -> Facts {
    let membership = host.membership.as_ref();
    let mut office = (None, None);
    let mut good = BTreeSet::new();
    let mut invited = BTreeSet::new();
    if let Some(membership) = membership {
        // What it would do in its first second: take or give up its office.
        let _ = membership.assume().await.unwrap();
        office = (membership.prepared().await, *membership.signs().borrow());
        good = open_tokens(membership).await;
        let tokens = membership.tokens().await.unwrap_or_default();
        invited = tokens.into_iter().filter_map(|t| t.merge).flat_map(|m| m.nodes).map(|n| n.to_string()).collect();
    }
    let fact = |what: &str| {
        let (kind, id) = what.split_once(' ').unwrap_or((what, ""));
        let none = || "none".to_owned();
        match (kind, membership) {
            ("key", _) => host.node().to_string(),
            ("is", Some(membership)) => format!("member {}", membership.roster().mesh()),
            ("is", None) => past(&host.store).unwrap().map_or_else(none, |(why, _)| why),
            ("root", _) => office.1.or(office.0).map_or_else(none, |root| root.to_string()),
            ("signs", _) => office.1.map_or_else(none, |root| root.to_string()),
            ("token", _) => (if good.contains(id) { "good" } else { "used" }).to_owned(),
            (_, None) => none(),
            ("invited", _) => {
                if invited.contains(id) {
                    "yes".into()
                } else {
                    none()
                }
            }
            ("moves", Some(membership)) if membership.moves().is_some() => "yes".into(),
            ("moves", Some(membership)) => {
                if membership.former().is_empty() {
                    none()
                } else {
                    "no".into()
                }
            }
            (_, Some(membership)) => {
                let roster = membership.roster();
                let of = |m: &meshd_ca::roster::Member| match kind {
                    "member" => format!("{:?}", m.standing).to_lowercase(),
                    "authority" if m.is_authority() => "true".into(),
                    "authority" if m.retired => "false".into(),
                    "authority" => none(),
                    other => panic!("no fact: {other}"),
                };
                roster.members().find(|m| m.node().to_string() == id).map_or_else(none, of)
            }
        }
    };
    asked.iter().map(|what| (what.clone(), fact(what))).collect()
}

/// What may be true after so many acts: of each fact what was told last, or what was told next.
fn allowed(acts: &Acts, done: usize) -> BTreeMap<String, BTreeSet<String>> {
    let mut allowed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let all = acts.told(acts.0.len());
    let before = acts.told(done).len();
    for (at, told) in all.iter().enumerate() {
        let (what, is) = told.split_once('=').unwrap();
        let first = if what.starts_with("token") { "used" } else { "none" };
        let values = allowed.entry(what.into()).or_insert_with(|| BTreeSet::from([first.to_owned()]));
        if at < before {
            values.clear();
            values.insert(is.to_owned());
        } else if !all[before..at].iter().any(|t| t.split_once('=').unwrap().0 == what) {
            values.insert(is.to_owned());
        }
    }
    allowed
}

/// Pulls the plug of a host at every act of its life, and starts it from all that may be left. Returns how many ruins there were. What else has to
/// hold of a host that was started is asked of `more`.
async fn survives(host: &Host, more: impl AsyncFn(&Host, &Facts)) -> usize {
    let acts = host.disk.acts();
    let dir = tempfile::tempdir().unwrap();
    let mut ruins = 0;
    for done in 0..=acts.0.len() {
        let allowed = allowed(&acts, done);
        let asked: BTreeSet<String> = allowed.keys().cloned().collect();
        for ruin in acts.ruins(done, Tear::Here) {
            ruins += 1;
            ruin.lay(dir.path());
            let started = start(dir.path());
            let found = facts(&started, &asked).await;
            for (what, is) in &found {
                // A key that nobody was told may be any.
                let fresh = what == "key" && allowed[what].contains("none");
                assert!(
                    fresh || allowed[what].contains(is),
                    "{what} is {is}, not of {:?}\nafter {:?}",
                    allowed[what],
                    &acts.0[..done]
                );
            }
            more(&started, &found).await;
        }
    }
    ruins
}

/// Three hosts: a founder, one that becomes an authority and leaves, comes back, and one that is banished.
async fn lives() -> [Host; 3] {
    let (mut a, mut b, mut c) = (Host::new(), Host::new(), Host::new());
    let (second, third) = (b.node(), c.node());
    a.found();
    let token = a.token().await;
    b.join(&a, &token).await;
    let token = a.token().await;
    c.join(&a, &token).await;

    // B becomes an authority.
    let root = b.member().prepare().await.unwrap();
    let name = meshd_ca::bundle::RootId::of(&root);
    let entry = a.member().appoint(second, root).await.unwrap();
    a.told(&format!("authority {second}"), true);
    b.member().merge(entry).await.unwrap();
    let stands = b.member().assume().await.unwrap().unwrap();
    b.told("root", name);
    b.told(&format!("authority {second}"), true);
    a.member().merge(stands).await.unwrap();
    b.member().begin_to_sign().await.unwrap();
    b.told("signs", name);
    let taken_back = b.token().await;
    assert!(b.member().revoke_token(&taken_back.id.to_string()).await.unwrap());
    b.told(&format!("token {}", taken_back.id), "used");
    let kept = b.token().await;

    // C is put out.
    let entries = a.member().banish(third).await.unwrap();
    a.told(&format!("member {third}"), "banished");
    for host in [&b, &c] {
        for entry in &entries {
            host.member().merge(entry.clone()).await.unwrap();
        }
    }
    b.told(&format!("member {third}"), "banished");
    c.told("is", "banished");
    c.goes("banished");

    // B gives its office up, leaves and comes back.
    let entry = b.member().retire(second, false).await.unwrap();
    b.told(&format!("authority {second}"), false);
    b.told("root", "none");
    b.told("signs", "none");
    b.told(&format!("token {}", kept.id), "used");
    a.member().merge(entry).await.unwrap();
    a.told(&format!("authority {second}"), false);
    assert!(b.member().assume().await.unwrap().is_none());
    let left = b.member().leave().await.unwrap();
    b.told("is", "left");
    a.member().merge(left).await.unwrap();
    a.told(&format!("member {second}"), "left");
    // With its roster goes what it knew of others.
    b.told(&format!("authority {second}"), "none");
    b.told(&format!("member {third}"), "none");
    b.goes("left");
    let token = a.token().await;
    b.join(&a, &token).await;
    b.told(&format!("member {third}"), "banished");
    b.told(&format!("authority {second}"), false);
    [a, b, c]
}

#[tokio::test]
async fn a_pulled_plug_leaves_the_old_or_the_new_of_everything_anybody_was_told() {
    let mut ruins = 0;
    for host in lives().await {
        ruins += survives(&host, async |_, _| {}).await;
    }
    assert!(ruins > 1000, "only {ruins} ruins were tried");
}

/// A host gets another node key, and the plug is pulled: it has the old or the new one, and is the member that it was.
#[tokio::test]
async fn a_pulled_plug_leaves_the_old_or_the_new_node_key() {
    let (mut a, mut b) = (Host::new(), Host::new());
    a.found();
    let token = a.token().await;
    b.join(&a, &token).await;
    let (old, secret) = (b.node(), b.key.pkcs8().clone());
    let next = b.member().next_key().await.unwrap();
    let new = next.public().node_id();
    assert_eq!(b.member().next_key().await.unwrap().public().node_id(), new, "asked for again");
    assert!(b.member().has_next(new) && !b.member().has_next(old));
    let word = a.member().replace(old, next.public()).await.unwrap();
    a.told(&format!("member {old}"), "replaced");
    a.told(&format!("member {new}"), "active");
    b.member().merge(word).await.unwrap();
    // The next process.
    b.key = Arc::new(take_node_key(&b.store).unwrap());
    b.membership = resume(&b.key, &b.store, &b.clock).unwrap().map(Arc::new);
    b.told("key", b.node());
    assert_eq!((b.node(), b.member().me()), (new, new));
    for file in std::fs::read_dir(b._dir.path().join("state")).unwrap() {
        let (file, old) = (file.unwrap().path(), secret.windows(64).next().unwrap());
        assert!(!std::fs::read(&file).unwrap().windows(64).any(|w| w == old), "the old key is in {file:?}");
    }
    survives(&a, async |_, _| {}).await;
    let keys = [old, new].map(|node| node.to_string());
    let ruins = survives(&b, async |started, facts| {
        let Some(membership) = &started.membership else { return };
        assert!(keys.contains(&facts["key"]), "a third key");
        assert!(membership.roster().is_active(started.node()), "it runs with a key that is nobody's");
        assert_eq!(membership.name(), HostName::nearest("host"));
    })
    .await;
    assert!(ruins > 100, "{ruins}");
}

/// A root is replaced, and the plug is pulled: the old one signs or the new one, and the roster has the one that does.
#[tokio::test]
async fn a_pulled_plug_leaves_the_old_or_the_new_root() {
    let mut a = Host::new();
    a.found();
    let old = a.member().signs().borrow().unwrap();
    let next = a.member().prepare_next().await.unwrap();
    a.member().publish_next().await.unwrap();
    a.member().activate_next().await.unwrap();
    a.told("root", next);
    a.told("signs", next);
    a.member().drop_roots(&[old]).await.unwrap();
    let ruins = survives(&a, async |started, _| {
        let Some(membership) = &started.membership else { return };
        let roots = membership.roots().await.expect("it signs");
        assert!(roots.published.contains(&roots.active), "it signs with a root that nobody believes: {:?}", roots.published);
    })
    .await;
    assert!(ruins > 100, "{ruins}");
}

/// A token for one host, a plug that is pulled while that host is let in, and another host that has the token as well.
#[tokio::test]
async fn a_token_admits_one_host_whenever_the_plug_is_pulled() {
    let mut a = Host::new();
    a.found();
    let token = a.token().await;
    let (first, second) = (Arc::new(PrivateKey::generate().unwrap()), PrivateKey::generate().unwrap());
    let node = first.public().node_id();
    handshake(&a, &first, &token).await.unwrap().unwrap();
    a.told(&format!("token {}", token.id), "used");
    a.told(&format!("member {node}"), "active");
    survives(&a, async |started, facts| {
        let (table, member) = (&facts[&format!("token {}", token.id)], &facts[&format!("member {node}")]);
        if facts["is"] == "none" {
            return;
        }
        if member == "active" {
            assert_eq!(table, "used", "somebody is in, and the token is good for another");
        }
        let known = started.store.load("tokens").unwrap().unwrap();
        if !String::from_utf8_lossy(&known.bytes).contains(&token.id.to_string()) {
            return;
        }
        // The first asks again, as it does when it hears nothing; then nobody else gets in.
        let joined = handshake(started, &first, &token).await.unwrap();
        assert!(joined.is_ok_and(|j| j.roster.is_active(node)), "the host that used the token stays outside: {table}, {member}");
        let other = handshake(started, &second, &token).await.unwrap();
        assert!(matches!(other, Err(JoinError::Refused(Reason::Used))), "{other:?}");
    })
    .await;
}

/// A disk that is full for a moment, at each call of an admission: the host that asks again is told that it is in only when that is on the disk.
#[tokio::test]
async fn nobody_is_told_what_could_not_be_written() {
    for calls in 0.. {
        let mut a = Host::new();
        a.found();
        let token = a.token().await;
        let key = Arc::new(PrivateKey::generate().unwrap());
        let node = key.public().node_id();
        a.disk.fail_after(calls);
        if handshake(&a, &key, &token).await.is_ok() {
            assert!(calls >= 8 && !a.disk.failed(), "call {calls} failed and the host was told that it is in");
            break;
        }
        handshake(&a, &key, &token).await.unwrap().unwrap();
        let acts = a.disk.acts();
        let dir = tempfile::tempdir().unwrap();
        for ruin in acts.ruins(acts.0.len(), Tear::Here) {
            ruin.lay(dir.path());
            let started = start(dir.path());
            let roster = started.member().roster();
            assert!(roster.is_active(node), "call {calls}: told that it is in, and it is not");
            assert!(open_tokens(started.member()).await.is_empty(), "call {calls}: the token is still good");
        }
    }
}

/// Offices of another mesh do not come back: neither its tokens nor its root.
#[tokio::test]
async fn a_join_that_was_cut_short_leaves_no_token_of_the_mesh_before() {
    let (mut a, mut b) = (Host::new(), Host::new());
    a.found();
    b.found();
    let old = b.token().await;
    let (token, own) = (a.token().await, b.member().roster().mesh());
    let acts = b.disk.acts().0.len();
    b.join(&a, &token).await;
    let root = b.member().prepare().await.unwrap();
    let second = b.node();
    let entry = a.member().appoint(second, root).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let all = b.disk.acts();
    let mut promoted = 0;
    for done in acts..=all.0.len() {
        for ruin in all.ruins(done, Tear::Here) {
            ruin.lay(dir.path());
            let started = start(dir.path());
            let membership = started.member();
            if membership.roster().mesh() == own {
                assert!(membership.signs().borrow().is_some(), "its own mesh, but not its root, after {:?}", &all.0[acts..done]);
                continue;
            }
            let root = membership.prepare().await.unwrap();
            let entry = match entry.member().roots.contains(&root) {
                true => entry.clone(),
                false => a.member().appoint(second, root).await.unwrap(),
            };
            membership.merge(entry).await.unwrap();
            membership.assume().await.unwrap().unwrap();
            assert!(!open_tokens(membership).await.contains(&old.id.to_string()), "after {:?}", &all.0[acts..done]);
            promoted += 1;
        }
    }
    assert!(promoted > 10, "{promoted}");
}

/// Has the hosts of a mesh invited.
async fn invite(authority: &Host, key: &PrivateKey, token: &MergeToken, roster: &Roster) -> Answer {
    let exporter = meshd_ca::keys::random().unwrap();
    let (mine, theirs) = (*key.public(), *authority.key.public());
    let channel = Channel { exporter, mine, theirs };
    let offer = Offer::of(roster, false);
    let (mut suitor, mut message) = Suitor::start(token.clone(), channel, HostName::nearest("one"), &offer).unwrap();
    let mut admission = Admission::start(Channel { exporter, mine: theirs, theirs: mine });
    loop {
        let (Step::Send(answer) | Step::Finish(answer, _)) =
            authority.member().admit(&mut admission, &message).await.unwrap().unwrap()
        else {
            unreachable!("an authority has the last word")
        };
        match suitor.receive(&answer).unwrap() {
            Step::Send(next) => message = next,
            Step::Finish(_, answer) | Step::Done(answer) => return answer,
        }
    }
}

/// Every host of a mesh that moves is in that mesh or in the other, whenever the plug is pulled, and can still follow; those who were invited stay so.
#[tokio::test]
async fn a_plug_that_is_pulled_while_a_mesh_moves_leaves_each_host_in_one_of_the_two() {
    let (mut founder, mut member, mut stays) = (Host::new(), Host::new(), Host::new());
    founder.found();
    stays.found();
    let token = founder.token().await;
    member.join(&founder, &token).await;
    let token = stays.member().create_merge_token(HOUR, 8, &[]).await.unwrap();
    let id = token.token().id;
    stays.told(&format!("token {id}"), "good");
    let answer = invite(&stays, &founder.key, &token, &founder.member().roster()).await;
    stays.told(&format!("token {id}"), "used");
    for node in [founder.node(), member.node()] {
        stays.told(&format!("invited {node}"), "yes");
    }
    let to = Destination {
        mesh: answer.mesh,
        authority: stays.node(),
        token: id,
        secret: token.invitation(),
        hints: Vec::new(),
        until: answer.until,
    };
    let shown = founder.member().roster().entry(founder.node()).unwrap().clone();
    let word = founder.member().declare_move(Some(to.clone())).await.unwrap();
    founder.told("moves", "yes");
    assert!(member.member().hear_move(word.clone()).await.unwrap() && !member.member().hear_move(word).await.unwrap());
    member.told("moves", "yes");
    for host in [&mut member, &mut founder] {
        let joined = handshake(&stays, &host.key, &to.token()).await.unwrap().unwrap();
        stays.told(&format!("member {}", host.node()), "active");
        assert!(to.is(&joined.roster));
        let (membership, _) = settle(&host.key, &host.store, &host.clock, joined).unwrap();
        host.told("is", format!("member {}", membership.roster().mesh()));
        for (what, is) in [("root", "none"), ("signs", "none"), ("moves", "no")] {
            host.told(what, is);
        }
        host.membership = Some(Arc::new(membership));
    }
    survives(&stays, async |started, facts| {
        // What is started from a disk reads the clock of this machine.
        if facts[&format!("invited {}", member.node())] == "yes" && started.clock.now() < answer.until {
            handshake(started, &member.key, &to.token()).await.unwrap().unwrap();
        }
    })
    .await;
    for host in [&member, &founder] {
        survives(host, async |started, facts| {
            if facts["moves"] == "yes" {
                handshake(&stays, &started.key, &to.token()).await.unwrap().unwrap();
            }
            // Whoever has moved tells others where to.
            if facts["moves"] == "no" {
                let moved = started.member().mesh() == to.mesh;
                assert!(!moved || started.member().last_word(&shown).is_some(), "the word is lost");
            }
        })
        .await;
    }
}

/// Numbers of records never repeat, whenever the plug is pulled.
#[tokio::test]
async fn a_number_that_was_used_is_never_used_again() {
    let mut host = Host::new();
    host.found();
    let mut sequence = Sequence::load(host.store.clone()).unwrap();
    for _ in 0..2 {
        for _ in 0..1500 {
            let number = sequence.next().await.unwrap();
            if number % 250 == 1 {
                host.told("number", number);
            }
        }
        sequence = Sequence::load(host.store.clone()).unwrap();
    }
    let acts = host.disk.acts();
    let dir = tempfile::tempdir().unwrap();
    for done in 0..=acts.0.len() {
        let told = acts.told(done).iter().filter_map(|t| t.strip_prefix("number=")?.parse::<u64>().ok()).max().unwrap_or(0);
        for ruin in acts.ruins(done, Tear::Here) {
            ruin.lay(dir.path());
            let started = start(dir.path());
            let next = Sequence::load(started.store.clone()).unwrap().next().await.unwrap();
            assert!(next > told, "{next} after {told}");
        }
    }
}
