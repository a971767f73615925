use proptest::prelude::*;

use super::*;
use crate::identity::base32;
use crate::issue::Issuer;
use crate::recovery::{Recovery, RecoveryKey};
use crate::roster::RosterError;

const NOW: UnixTime = UnixTime(1_800_000_000);

fn key() -> PrivateKey {
    PrivateKey::generate().unwrap()
}

fn id(k: &PrivateKey) -> NodeId {
    k.public().node_id()
}

fn name(s: &str) -> HostName {
    s.parse().unwrap()
}

fn found(mesh: u8, founder: &PrivateKey, recovery: Option<Recovery>) -> Roster {
    let mesh = MeshId::from_bytes([mesh; 10]);
    let domain = TrustDomain::of(mesh);
    let root = Issuer::create(&domain, id(founder), NOW, INVITED).unwrap().root_der().to_vec();
    Roster::found_with(recovery, (mesh, domain), founder, name("one"), root, NOW).unwrap()
}

fn to(n: u8) -> Destination {
    Destination {
        mesh: Mesh { id: MeshId::from_bytes([n; 10]), founder: NodeId::from_bytes([n; 16]) },
        authority: NodeId::from_bytes([n; 16]),
        token: base32().encode(&[n; 5]).parse().unwrap(),
        secret: Zeroizing::new([n; 20]),
        hints: vec![([10, 0, 0, n], 6374).into()],
        until: NOW + INVITED,
    }
}

fn word(by: &PrivateKey, from: Mesh, to: Option<Destination>, version: u64) -> Word {
    Word::sign(by, Word::unsigned(by.public(), from, to, version)).unwrap()
}

#[test]
fn only_the_recovery_key_moves_a_mesh_or_its_founder_where_there_is_none_and_no_word_counts_in_another() {
    let (f, member, stranger) = (key(), key(), key());
    let paper = RecoveryKey::generate().unwrap();
    let recovery = Recovery::new(&paper).unwrap();
    let signing = recovery.open(&paper).unwrap();
    let (mut with, mut without) = (found(1, &f, Some(recovery)), found(1, &f, None));
    let from = Mesh::of(&with);
    for (roster, above) in [(&mut with, &signing), (&mut without, &f)] {
        roster.admit(&f, member.public(), &name("two"), NOW).unwrap();
        // Also one that the founder has made an authority says nothing.
        let root = Issuer::create(roster.trust_domain(), id(&member), NOW, INVITED).unwrap().root_der().to_vec();
        roster.grant(&f, id(&member), vec![root]).unwrap();
        for by in [&f, &signing, &member, &stranger] {
            let word = word(by, from, Some(to(9)), 1);
            let believed = id(by) == id(above);
            assert_eq!(word.believed_in(roster), if believed { Ok(()) } else { Err(WordError::NotAbove) });
            assert_eq!(Word::from_bytes(&word.to_bytes()).unwrap(), word);
            assert_eq!((word.to().unwrap().token().mesh, word.version()), (to(9).mesh.id, 1));
        }
    }
    // The later word counts.
    let mut words = Words::default();
    let ours = word(&signing, from, Some(to(9)), 1);
    assert!(words.hear(ours.clone(), from) && words.moving(&with) == Some(&ours));
    assert!(words.hear(word(&signing, from, None, 2), from) && words.moving(&with).is_none());
    assert!(!words.hear(ours.clone(), from));
    let moves = word(&signing, from, Some(to(8)), 3);
    assert!(words.hear(moves.clone(), from) && words.moving(&with) == Some(&moves));
    // Where the roster says otherwise by now, it counts for nothing.
    assert!(words.moving(&without).is_none());
    // Another mesh, and another one of the same fleet, even if both were founded by one key.
    for other in [found(2, &f, None), found(1, &stranger, None)] {
        assert_eq!(ours.believed_in(&other), Err(WordError::ForeignMesh));
    }
    // One who says that he is the founder of a mesh that has another one.
    let claim = word(&stranger, Mesh { founder: id(&stranger), ..from }, Some(to(9)), 1);
    assert_eq!(claim.believed_in(&found(1, &f, None)), Err(WordError::ForeignMesh));
}

/// Of one fleet all meshes have the same id: what is signed in one counts in no other, also when its signer has an office in both.
#[test]
fn what_was_signed_in_one_mesh_of_a_fleet_counts_in_no_other() {
    let (f, g, member) = (key(), key(), key());
    let (mut ours, mut theirs) = (found(1, &f, None), found(1, &g, None));
    // The founder of the one is a member of the other, and an authority.
    theirs.admit(&g, f.public(), &name("moved"), NOW).unwrap();
    let root = Issuer::create(theirs.trust_domain(), id(&f), NOW, INVITED).unwrap().root_der().to_vec();
    theirs.grant(&g, id(&f), vec![root]).unwrap();
    ours.admit(&f, member.public(), &name("two"), NOW).unwrap();
    let digest = theirs.digest();
    for entry in ours.entries() {
        assert_eq!(theirs.merge(entry.clone()), Err(RosterError::ForeignMesh), "{:?}", entry.member());
    }
    let farewell = ours.leave(&member).unwrap();
    assert_eq!(theirs.merge(farewell), Err(RosterError::ForeignMesh));
    assert_eq!(theirs.digest(), digest);
}

#[test]
fn words_are_bounded_and_nothing_may_be_changed() {
    let f = key();
    let from = Mesh::of(&found(1, &f, None));
    let good = word(&f, from, Some(Destination { hints: vec![([0x20; 16], 6374).into(); 4], ..to(9) }), u64::MAX);
    assert!(good.to_bytes().len() < MAX_WORD / 2, "{}", good.to_bytes().len());
    let sign = |to, by: &PrivateKey| Word::sign(&f, Word::unsigned(by.public(), from, Some(to), 1));
    assert_eq!(sign(Destination { mesh: from, ..to(9) }, &f), Err(WordError::Itself));
    assert_eq!(sign(Destination { hints: vec![([10, 0, 0, 1], 1).into(); 5], ..to(9) }, &f), Err(WordError::Malformed));
    assert_eq!(sign(to(9), &key()), Err(WordError::Key(KeyError::Signature)));
    for bad in [&b""[..], b"{}", b"[]", &vec![b' '; MAX_WORD + 1]] {
        assert_eq!(Word::from_bytes(bad), Err(WordError::Malformed));
    }
    let bytes = good.to_bytes();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        assert!(Word::from_bytes(&changed).is_err(), "byte {at}");
    }
    let shown = format!("{good:?} {:?}", good.to());
    assert!(!shown.contains("secret") && !shown.contains("payload"), "{shown}");
}

#[test]
fn the_word_about_ones_own_mesh_outlives_all_others() {
    let (f, mut words) = (key(), Words::default());
    let meshes: Vec<Mesh> = (1..=9).map(|n| Mesh { id: MeshId::from_bytes([n; 10]), founder: id(&f) }).collect();
    for mesh in &meshes {
        assert!(words.hear(word(&f, *mesh, Some(to(100)), 1), meshes[2]));
    }
    assert_eq!(words.all().map(Word::from).collect::<Vec<_>>(), [&meshes[2..3], &meshes[6..]].concat());
    assert_eq!(Words::from_bytes(&words.to_bytes()), Ok(words.clone()));
    let mut twice = words.clone();
    twice.0[1] = twice.0[0].clone();
    assert_eq!(Words::from_bytes(&twice.to_bytes()), Err(WordError::Malformed));
    assert!(Words::from_bytes(&vec![b' '; MAX_WORDS * (MAX_WORD + 2)]).is_err());
}

proptest! {
    /// Whoever heard the same words believes the same one, whatever the order and however often.
    #[test]
    fn hearing_is_a_semilattice(
        said in prop::collection::vec((0u64..4, prop::option::of(1u8..4)), 1..8),
        order in prop::collection::vec(any::<prop::sample::Index>(), 8..20),
    ) {
        let f = key();
        let from = Mesh { id: MeshId::from_bytes([1; 10]), founder: id(&f) };
        let all: Vec<Word> =
            said.iter().map(|(version, n)| word(&f, from, n.map(|n| to(100 + n)), *version)).collect();
        let mut straight = Words::default();
        for w in &all {
            straight.hear(w.clone(), from);
        }
        let mut mixed = Words::default();
        for at in &order {
            mixed.hear(at.get(&all).clone(), from);
        }
        for w in all.iter().rev() {
            mixed.hear(w.clone(), from);
        }
        prop_assert_eq!(&mixed, &straight);
        for w in &all {
            prop_assert!(!mixed.hear(w.clone(), from), "no news");
        }
        // The later one counts.
        prop_assert_eq!(straight.of(from).map(Word::version), said.iter().map(|(version, _)| *version).max());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), payload in ".{0,200}") {
        let _ = Word::from_bytes(&bytes);
        let _ = Words::from_bytes(&bytes);
        prop_assert!(Word::sign(&key(), payload.into_bytes()).is_err());
    }
}
