use std::path::Path;

use meshd_ca::join::{Channel, Joiner};
use meshd_ca::recovery::RecoveryKey;
use meshd_ca::verify::verify_svid;
use rustls_pki_types::CertificateDer;

use super::*;
use crate::logging::tests::{PLAIN, said};

/// The membership that a daemon finds in `dir` after a restart.
fn restarted(dir: &Path) -> Membership {
    let store = Arc::new(Store::open(dir).unwrap());
    let key = Arc::new(node_key(&store).unwrap());
    Membership::load(key, store, Clock::new(meshd_ca::time::UnixTime(0))).unwrap().unwrap()
}

/// It signs what its own roster believes, and says with which root.
async fn signs(m: &Membership) -> RootId {
    let key = PrivateKey::generate().unwrap();
    let wanted = [(Workload::Node(m.me()), *key.public())];
    let leaf = m.issue(m.me(), &wanted, Duration::from_secs(60)).await.unwrap().remove(0).unwrap();
    let chain = [CertificateDer::from(leaf.der)];
    let peer = verify_svid(&chain, &m.bundle(), &m.roster(), m.clock.now()).unwrap();
    assert_eq!(Some(peer.root), *m.signs().borrow());
    assert_eq!(Some(peer.root), m.roots().await.map(|r| r.active));
    peer.root
}

fn copy(from: &Path, to: &Path) {
    for file in std::fs::read_dir(from).unwrap().flatten() {
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

/// What is on the disk when the plug is pulled during a step from `before` to `after` that writes or removes these files one after the
/// other: after each of them a daemon starts, signs, and brings the rotation to its end.
async fn pulled_between(before: &Path, after: &Path, files: &[&str]) {
    for done in 0..=files.len() {
        let dir = tempfile::tempdir().unwrap();
        copy(before, dir.path());
        for name in &files[..done] {
            for file in [(*name).to_owned(), format!("{name}.other")] {
                let (new, here) = (after.join(&file), dir.path().join(&file));
                match new.exists() {
                    true => drop(std::fs::copy(new, here).unwrap()),
                    false => drop(std::fs::remove_file(here)),
                }
            }
        }
        let m = restarted(dir.path());
        let (id, was) = (m.me(), signs(&m).await);
        if m.roots().await.unwrap().next.is_some() {
            m.publish_next().await.unwrap();
            m.activate_next().await.unwrap();
            assert_ne!(signs(&m).await, was);
        }
        let roots = m.roots().await.unwrap();
        let old: Vec<RootId> = roots.published.iter().copied().filter(|r| *r != roots.active).collect();
        m.drop_roots(&old).await.unwrap();
        drop(m);
        let m = restarted(dir.path());
        let roots = m.roots().await.unwrap();
        assert_eq!((m.me(), signs(&m).await), (id, roots.active));
        assert_eq!((roots.published, roots.next), (vec![roots.active], None), "after {done} of {files:?}");
        let keys = ROOTS.iter().filter(|(key, _)| dir.path().join(key).exists()).count();
        assert_eq!(keys, 1, "after {done} of {files:?} the key of the old root is there");
    }
}

/// Whatever a member asks for besides its own names, and everything once it is banished, is refused, and the log says who asked and why not.
#[test]
fn names_that_a_node_may_not_have_are_refused_and_logged() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let store = Arc::new(Store::open(dir.path()).unwrap());
    let key = Arc::new(node_key(&store).unwrap());
    let m = Membership::found(key, store, Clock::new(meshd_ca::time::UnixTime(0)), HostName::nearest("a"), None, None).unwrap();
    let (guest, name) = (PrivateKey::generate().unwrap(), HostName::nearest("b"));
    let (node, unit) = (guest.public().node_id(), |host: &HostName| Workload::Unit(host.clone(), "nginx.service".into()));
    let mut roster = Roster::clone(&m.roster());
    roster.admit(&m.key, guest.public(), &name, m.clock.now()).unwrap();
    let entry = roster.entry(node).unwrap().clone();
    runtime.block_on(m.merge(entry)).unwrap();

    let host = m.name();
    let own = [Workload::Node(node), Workload::Host(name.clone()), unit(&name)];
    let others = [
        (Workload::Node(m.me()), "node"),
        (Workload::Host(host.clone()), "host"),
        (unit(&host), "host"),
        (Workload::Container(host.clone(), "web".into()), "host"),
        (Workload::User(host, "anna".into()), "host"),
        (Workload::Service("db".into()), "grant"),
        (Workload::ServiceAccount("default".into(), "web".into()), "cluster"),
    ];
    let ask = |all: &[Workload]| {
        let wanted: Vec<_> = all.iter().map(|w| (w.clone(), *guest.public())).collect();
        let mut leaves = Vec::new();
        let log = said(PLAIN, || leaves = runtime.block_on(m.issue(node, &wanted, Duration::from_secs(60))).unwrap());
        (leaves, log.lines().map(str::to_owned).collect::<Vec<_>>())
    };
    let refused = |all: &[Workload], why: &dyn Fn(usize) -> &'static str| {
        let (leaves, log) = ask(all);
        assert!(leaves.len() == all.len() && leaves.iter().all(Option::is_none), "{leaves:?}");
        assert_eq!(log.len(), all.len(), "{log:#?}");
        for (n, (workload, line)) in all.iter().zip(&log).enumerate() {
            for part in ["WARN", "refused to issue an SVID", &node.to_string(), &format!("workload={workload}"), why(n)] {
                assert!(line.contains(part), "no {part}: {line}");
            }
        }
    };
    assert!(ask(&own).0.iter().all(Option::is_some));
    let (foreign, why): (Vec<_>, Vec<_>) = others.into_iter().unzip();
    refused(&foreign, &|n| why[n]);
    runtime.block_on(m.banish(node)).unwrap();
    refused(&[&own[..], &foreign].concat(), &|_| "not an active member");
}

#[tokio::test]
async fn a_rotation_survives_a_pulled_plug_at_every_file() {
    let dirs: Vec<_> = (0..5).map(|_| tempfile::tempdir().unwrap()).collect();
    let live = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(live.path()).unwrap());
    let key = Arc::new(node_key(&store).unwrap());
    let clock = Clock::new(meshd_ca::time::UnixTime(0));
    let m = Membership::found(key, store, clock, HostName::nearest("a"), None, None).unwrap();
    let first = signs(&m).await;
    let snapshot = |n: usize| copy(live.path(), dirs[n].path());
    snapshot(0);
    let next = m.prepare_next().await.unwrap();
    assert_eq!(m.prepare_next().await.unwrap(), next, "one at a time");
    assert_eq!(signs(&m).await, first);
    snapshot(1);
    m.publish_next().await.unwrap();
    assert_eq!(signs(&m).await, first);
    snapshot(2);
    m.activate_next().await.unwrap();
    assert_eq!(signs(&m).await, next);
    assert!(matches!(m.prepare_next().await, Err(MembershipError::Rotating)), "the old one is still believed");
    snapshot(3);
    m.drop_roots(&[first]).await.unwrap();
    assert_eq!(signs(&m).await, next);
    snapshot(4);
    let [(key, root), (key2, root2)] = ROOTS;
    for (step, files) in [&[key2, root2][..], &[ROSTER], &[SIGNS, root, key], &[ROSTER]].into_iter().enumerate() {
        pulled_between(dirs[step].path(), dirs[step + 1].path(), files).await;
    }
    // And the next one, in the other place.
    m.prepare_next().await.unwrap();
    m.publish_next().await.unwrap();
    m.activate_next().await.unwrap();
    let last = signs(&m).await;
    assert_ne!(last, next);
    assert!(matches!(m.prepare_next().await, Err(MembershipError::Rotating)), "the old one is still believed");
    // Until it has ended itself, years later: it signs nothing, so nothing is waited for.
    m.clock.within(&Bundle { roots: vec![], ..m.bundle() });
    m.clock.raise(m.clock.now() + ROOT_LIFETIME + Duration::from_secs(86_400));
    assert_eq!(m.roots().await.unwrap().left, Duration::ZERO);
    m.prepare_next().await.unwrap();
    m.publish_next().await.unwrap();
    m.activate_next().await.unwrap();
    assert!(![last, next].contains(&signs(&m).await));
    m.drop_roots(&[last, next]).await.unwrap();
    assert_eq!(m.roots().await.unwrap().published, vec![signs(&m).await]);
}

#[tokio::test]
async fn nobody_is_let_in_by_a_host_that_is_about_to_leave() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(dir.path()).unwrap());
    let key = Arc::new(node_key(&store).unwrap());
    let clock = Clock::new(meshd_ca::time::UnixTime(0));
    let token = FleetToken::generate().unwrap();
    let m = Membership::found_fleet(key.clone(), store, clock, HostName::nearest("a"), &token, None).unwrap();
    let guest = PrivateKey::generate().unwrap();
    let wire =
        |mine: &PrivateKey, theirs: &PrivateKey| Channel { exporter: [7; 32], mine: *mine.public(), theirs: *theirs.public() };
    let hello = |by_fleet| {
        let (channel, name) = (wire(&guest, &key), HostName::nearest("pi"));
        match by_fleet {
            true => Joiner::of_fleet(token.mesh(), token.key(), None, channel, name),
            false => Joiner::ask(ApprovalCode::generate().unwrap(), channel, name),
        }
    };
    let answer = async |by_fleet| {
        let mut admission = Admission::start(wire(&key, &guest));
        m.admit(&mut admission, &hello(by_fleet).unwrap().1).await.unwrap().map(drop)
    };
    let (_, side) = m.unsettled().await.unwrap();
    let leaving = m.begin_to_leave(side).await.unwrap();
    assert!(m.begin_to_leave(side).await.is_none(), "twice at once");
    for by_fleet in [true, false] {
        assert_eq!(answer(by_fleet).await, Err(JoinError::Refused(Reason::Busy)));
    }
    drop(leaving);
    assert_eq!(answer(true).await, Ok(()));
    assert_eq!(answer(false).await, Err(JoinError::Refused(Reason::NotApproved)));
}

#[tokio::test]
async fn who_stays_is_vouched_for_first_and_who_is_not_yet_is_no_stranger() {
    let (founder, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = Arc::new(Store::open(founder.path()).unwrap());
    let key = Arc::new(node_key(&store).unwrap());
    let clock = || Clock::new(meshd_ca::time::UnixTime(0));
    let m = Membership::found(key.clone(), store, clock(), HostName::nearest("a"), None, None).unwrap();
    let store = Arc::new(Store::open(dir.path()).unwrap());
    let guest = Arc::new(node_key(&store).unwrap());
    // Another authority lets it in.
    let other = PrivateKey::generate().unwrap();
    let mut roster = Roster::clone(&m.roster());
    let (now, node) = (m.clock.now(), other.public().node_id());
    let issuer = Issuer::create(roster.trust_domain(), node, now, Duration::from_secs(3600)).unwrap();
    roster.admit(&key, other.public(), &HostName::nearest("b"), now).unwrap();
    roster.grant(&key, node, vec![issuer.root_der().to_vec()]).unwrap();
    roster.admit(&other, guest.public(), &HostName::nearest("c"), now).unwrap();
    for entry in roster.entries().cloned().collect::<Vec<_>>() {
        m.merge(entry).await.unwrap();
    }
    let here = Membership::adopt(guest.clone(), store.clone(), clock(), roster, None).unwrap();
    let mut words = m.banish(node).await.unwrap();
    let ban = words.pop().unwrap();
    assert_eq!((ban.member().node(), ban.member().standing), (node, Standing::Banished), "the last word");
    assert_eq!(words.iter().map(|e| e.member().node()).collect::<Vec<_>>(), [here.me()]);
    // It hears them the other way round, and the plug is pulled in between.
    here.merge(ban).await.unwrap();
    assert!(here.roster().member(here.me()).is_none());
    drop(here);
    let here = Membership::load(guest, store, clock()).unwrap().expect("a host without a word about it is still of its mesh");
    here.merge(words.remove(0)).await.unwrap();
    assert!(here.roster().is_active(here.me()));
}

#[tokio::test(start_paused = true)]
async fn an_authority_outlives_the_founder_that_made_it_in_whatever_order_it_hears_of_that() {
    let (founder, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let clock = || Clock::new(meshd_ca::time::UnixTime(0));
    let paper = RecoveryKey::generate().unwrap();
    let store = Arc::new(Store::open(founder.path()).unwrap());
    let key = Arc::new(node_key(&store).unwrap());
    let recovery = Some(Recovery::new(&paper).unwrap());
    let m = Membership::found(key.clone(), store, clock(), HostName::nearest("a"), None, recovery).unwrap();
    let mut roster = Roster::clone(&m.roster());
    let store = Arc::new(Store::open(dir.path()).unwrap());
    let other = Arc::new(node_key(&store).unwrap());
    roster.admit(&key, other.public(), &HostName::nearest("b"), m.clock.now()).unwrap();
    let here = Membership::adopt(other.clone(), store.clone(), clock(), roster.clone(), None).unwrap();
    let root = here.prepare().await.unwrap();
    here.merge(roster.grant(&key, here.me(), vec![root]).unwrap()).await.unwrap();
    here.assume().await.unwrap().expect("it stands");
    here.begin_to_sign().await.unwrap();
    let signs = *here.signs().borrow();
    assert!(signs.is_some());

    let mut roster = Roster::clone(&here.roster());
    assert!(here.recovered(&[here.roster().entry(here.me()).unwrap().clone()]).await.is_err(), "not the recovery key's word");
    let signing = roster.recovery().unwrap().open(&paper).unwrap();
    let mut words = roster.banish(&signing, key.public().node_id()).unwrap();
    let ban = words.pop().unwrap();
    let alone = here.recovered(std::slice::from_ref(&ban)).await;
    assert!(matches!(alone, Err(MembershipError::Outside)) && here.is_authority().await, "nobody would vouch for it: {alone:?}");
    here.merge(ban).await.unwrap();
    here.assume().await.unwrap();
    assert!(!here.is_authority().await && here.signs().borrow().is_none(), "nobody vouches for it");
    here.recovered(&words).await.unwrap();
    here.assume().await.unwrap();
    assert!(here.is_authority().await);
    assert_eq!(*here.signs().borrow(), signs, "the same root, and it signs");
    assert_eq!(here.bundle().roots.len(), 1);

    // Where it is meant, the keys are gone soon.
    let mut roster = Roster::clone(&here.roster());
    let end = roster.retire(&signing, here.me(), true).unwrap();
    here.recovered(&[end]).await.unwrap();
    here.assume().await.unwrap();
    assert!(store.load(ROOT_KEY).unwrap().is_some());
    tokio::time::advance(REGRET).await;
    here.assume().await.unwrap();
    assert!(store.load(ROOT_KEY).unwrap().is_none());
}

#[tokio::test]
async fn a_clock_that_is_set_back_survives_a_pulled_plug_at_every_file() {
    let (dir, paper) = (tempfile::tempdir().unwrap(), RecoveryKey::generate().unwrap());
    let store = Arc::new(Store::open(dir.path()).unwrap());
    let key = Arc::new(node_key(&store).unwrap());
    let clock = Clock::new(meshd_ca::time::UnixTime(0));
    let recovery = Some(Recovery::new(&paper).unwrap());
    let m = Membership::found(key, store.clone(), clock, HostName::nearest("a"), None, recovery).unwrap();
    let right = m.clock.now();
    let ahead = right + Duration::from_secs(90 * 86_400);
    m.clock.raise(ahead);
    store.save(clock::FILE, &m.clock.to_bytes()).unwrap();
    m.create_token(Duration::from_secs(60), 1, &[]).await.unwrap();
    let signing = m.roster().recovery().unwrap().open(&paper).unwrap();
    let word = Reset::sign(&signing, m.roster().mesh(), m.clock.era(), right, m.clock.beyond()).unwrap();
    let thief = Reset::sign(&PrivateKey::generate().unwrap(), m.roster().mesh(), m.clock.era(), right, ahead).unwrap();
    assert!(m.set_back(thief.signed().clone()).await.is_err(), "not the recovery key's word");
    let before = tempfile::tempdir().unwrap();
    copy(dir.path(), before.path());
    assert!(m.set_back(word.signed().clone()).await.unwrap());
    assert!(!m.set_back(word.signed().clone()).await.unwrap(), "once");
    let near = |m: &Membership| m.clock.now().distance(right) < Duration::from_secs(60);
    assert!(near(&m) && m.tokens().await.unwrap().is_empty());
    assert_eq!(m.reset().borrow().as_deref(), Some(&word));
    drop((m, store));
    // The first file decides: without it the clock is where it was and the word can be given again, with it it is obeyed.
    for done in 0..=3 {
        let cut = tempfile::tempdir().unwrap();
        copy(before.path(), cut.path());
        for name in &[reset::RESET, TOKENS, clock::FILE][..done] {
            for file in [(*name).to_owned(), format!("{name}.other")] {
                let (from, to) = (dir.path().join(&file), cut.path().join(&file));
                // Written twice: as it was after the first time, which was not the end.
                match *name == reset::RESET {
                    true => drop(Store::open(cut.path()).unwrap().save(name, &reset::bytes(&word, false))),
                    false if from.exists() => drop(std::fs::copy(from, to).unwrap()),
                    false => {}
                }
            }
        }
        let store = Arc::new(Store::open(cut.path()).unwrap());
        let key = Arc::new(node_key(&store).unwrap());
        let m = Membership::load(key, store.clone(), Clock::load(&store).unwrap()).unwrap().unwrap();
        assert_eq!(near(&m), done > 0, "after {done} files");
        assert_eq!(m.set_back(word.signed().clone()).await.unwrap(), done == 0);
        assert!(near(&m));
        drop(m);
        let clock = Clock::load(&store).unwrap();
        assert!(clock.floor().distance(right) < Duration::from_secs(60), "the floor on the disk");
    }
}

/// An office that hung from somebody who was put out, and another one: what the host said of the first is the later word, and names a root that it has not
/// any more.
#[tokio::test(start_paused = true)]
async fn an_authority_that_is_made_anew_says_which_root_it_has_now() {
    let (founder, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let clock = || Clock::new(meshd_ca::time::UnixTime(0));
    let key = Arc::new(node_key(&Store::open(founder.path()).unwrap()).unwrap());
    let store = Arc::new(Store::open(founder.path()).unwrap());
    let m = Membership::found(key.clone(), store, clock(), HostName::nearest("a"), None, None).unwrap();
    let (thief, store) = (PrivateKey::generate().unwrap(), Arc::new(Store::open(dir.path()).unwrap()));
    let (thief_id, me) = (thief.public().node_id(), Arc::new(node_key(&store).unwrap()));
    let mut roster = Roster::clone(&m.roster());
    let now = m.clock.now();
    for (k, name) in [(thief.public(), "t"), (me.public(), "b")] {
        roster.admit(&key, k, &HostName::nearest(name), now).unwrap();
    }
    let issuer = meshd_ca::issue::Issuer::create(roster.trust_domain(), thief_id, now, Duration::from_secs(86_400)).unwrap();
    roster.grant(&key, thief_id, vec![issuer.root_der().to_vec()]).unwrap();
    let here = Membership::adopt(me, store.clone(), clock(), roster.clone(), None).unwrap();
    let first = here.prepare().await.unwrap();
    here.merge(roster.grant(&thief, here.me(), vec![first.clone()]).unwrap()).await.unwrap();
    here.assume().await.unwrap().expect("it stands");
    here.begin_to_sign().await.unwrap();
    here.prepare_next().await.unwrap();
    here.publish_next().await.unwrap();
    // Where that was not heard of, the thief is put out.
    let mut elsewhere = Roster::clone(&m.roster());
    for entry in roster.entries().filter(|e| e.member().by == m.me()).cloned() {
        elsewhere.merge(entry).unwrap();
    }
    for entry in elsewhere.banish(&key, thief_id).unwrap() {
        here.merge(entry).await.unwrap();
    }
    here.assume().await.unwrap();
    tokio::time::advance(REGRET).await;
    here.assume().await.unwrap();
    assert!(!here.is_authority().await && store.load(ROOT_KEY).unwrap().is_none());

    let second = here.prepare().await.unwrap();
    assert_ne!(second, first);
    here.merge(elsewhere.grant(&key, here.me(), vec![second.clone()]).unwrap()).await.unwrap();
    assert!(!here.roster().member(here.me()).unwrap().roots.contains(&second), "the later word names what it had");
    here.assume().await.unwrap().expect("it says what it has");
    assert_eq!(here.roster().member(here.me()).unwrap().roots.last(), Some(&second));
    here.begin_to_sign().await.unwrap();
    assert_eq!(*here.signs().borrow(), Some(RootId::of(&second)));
    assert!(here.assume().await.unwrap().is_none(), "once");
}
