use std::time::Duration;

use proptest::prelude::*;

use super::super::tests::{Desk, desk_of};
use super::*;
use crate::merge::Host;
use crate::token::TokenError;

const NOW: UnixTime = UnixTime(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);

fn key() -> PrivateKey {
    PrivateKey::generate().unwrap()
}

fn id(k: &PrivateKey) -> NodeId {
    k.public().node_id()
}

fn name(s: &str) -> HostName {
    s.parse().unwrap()
}

/// The mesh that stays; the roster of the one that moves, with its hosts' keys, the founder's first.
fn two() -> (Desk, Roster, Vec<PrivateKey>) {
    let desk = desk_of(key(), MeshId::from_bytes(random().unwrap()));
    let keys: Vec<PrivateKey> = (0..3).map(|_| key()).collect();
    let mut roster = desk_of(PrivateKey::from_pkcs8(keys[0].pkcs8()).unwrap(), MeshId::from_bytes(random().unwrap())).roster;
    roster.admit(&keys[0], keys[1].public(), &name("two"), NOW).unwrap();
    roster.admit(&keys[0], keys[2].public(), &name("three"), NOW).unwrap();
    (desk, roster, keys)
}

impl Desk {
    fn merge_token(&mut self, limit: u32) -> MergeToken {
        self.tokens.create_for_merge(self.roster.mesh(), self.key.public(), NOW, HOUR, limit, vec![]).unwrap()
    }
}

fn wire(joiner: &PrivateKey, authority: &PrivateKey) -> (Channel, Channel) {
    let (exporter, mine, theirs) = (random().unwrap(), *joiner.public(), *authority.public());
    (Channel { exporter, mine, theirs }, Channel { exporter, mine: theirs, theirs: mine })
}

/// Presents a token for a mesh; `meddle` may change each message, numbered from 1.
fn present(
    desk: &mut Desk,
    token: &MergeToken,
    by: &PrivateKey,
    offer: &Offer,
    now: UnixTime,
    mut meddle: impl FnMut(usize, &mut Vec<u8>),
) -> Result<Answer, JoinError> {
    let (mine, theirs) = wire(by, &desk.key);
    let (mut suitor, mut message) = Suitor::start(token.clone(), mine, name("one"), offer)?;
    let mut admission = Admission::start(theirs);
    for n in [1, 3] {
        meddle(n, &mut message);
        assert!(message.len() <= admission.limit());
        let mut reply = match admission.receive(&message, desk, now)? {
            Step::Send(reply) => reply,
            Step::Finish(reply, admitted) => {
                assert_eq!(admitted.brings.is_some_and(|n| n > 0), admitted.by_hand());
                reply
            }
            Step::Done(_) => panic!("an authority always answers"),
        };
        meddle(n + 1, &mut reply);
        assert!(reply.len() <= suitor.limit());
        match suitor.receive(&reply)? {
            Step::Send(next) => message = next,
            Step::Done(answer) => return Ok(answer),
            Step::Finish(..) => panic!("nothing to send at the end"),
        }
    }
    panic!("it has four messages");
}

fn join(desk: &mut Desk, token: &JoinToken, by: &PrivateKey, wish: &str, now: UnixTime) -> Result<Joined, JoinError> {
    let (mine, theirs) = wire(by, &desk.key);
    let (mut joiner, mut message) = Joiner::start(token.clone(), mine, name(wish))?;
    let mut admission = Admission::start(theirs);
    loop {
        let (Step::Send(reply) | Step::Finish(reply, _)) = admission.receive(&message, desk, now)? else {
            panic!("an authority always answers")
        };
        match joiner.receive(&reply)? {
            Step::Send(next) => message = next,
            Step::Done(joined) => return Ok(joined),
            Step::Finish(..) => panic!("nothing to send at the end"),
        }
    }
}

fn invited(token: &MergeToken) -> JoinToken {
    JoinToken { secret: token.invitation(), ..token.token().clone() }
}

fn refused<T: std::fmt::Debug>(result: Result<T, JoinError>, reason: Reason) {
    assert_eq!(result.err(), Some(JoinError::Refused(reason)));
}

#[test]
fn a_mesh_moves_host_by_host_under_the_names_that_are_free() {
    let (mut desk, mut theirs, keys) = two();
    let resident = key();
    let by = PrivateKey::from_pkcs8(desk.key.pkcs8()).unwrap();
    desk.roster.admit(&by, resident.public(), &name("two"), NOW).unwrap();
    let token = desk.merge_token(3);
    let before = (desk.roster.digest(), desk.tokens.to_bytes());
    // A look changes nothing, however often.
    for _ in 0..3 {
        let looked = present(&mut desk, &token, &keys[0], &Offer::of(&theirs, true), NOW, |_, _| {}).unwrap();
        assert_eq!((looked.members, looked.invited, looked.mesh), (2, 3, Mesh::of(&desk.roster)));
        let renamed: Vec<_> = looked.renamed.iter().map(|h| h.node).collect();
        assert_eq!(renamed.len(), 2, "the founder, who is called as ours, and two: {:?}", looked.renamed);
        assert!(renamed.contains(&id(&keys[0])) && renamed.contains(&id(&keys[1])));
    }
    assert_eq!((desk.roster.digest(), desk.tokens.to_bytes()), before);
    refused(join(&mut desk, &invited(&token), &keys[1], "two", NOW), Reason::ForMesh);
    let answer = present(&mut desk, &token, &keys[0], &Offer::of(&theirs, false), NOW, |_, _| {}).unwrap();
    assert_eq!(desk.roster.active().count(), 2, "being invited is not being in");
    // The plug was pulled: the same host hears the same again, whatever it says now; and nobody else.
    let late = key();
    theirs.admit(&keys[0], late.public(), &name("late"), NOW).unwrap();
    let again = present(&mut desk, &token, &keys[0], &Offer::of(&theirs, false), NOW + HOUR, |_, _| {}).unwrap();
    assert_eq!((again.until, again.invited), (answer.until, 3));
    refused(present(&mut desk, &token, &keys[1], &Offer::of(&theirs, false), NOW, |_, _| {}), Reason::Used);
    // A week later too.
    let week = NOW + 7 * 24 * HOUR;
    for (n, wish) in [(2, "three"), (0, "one"), (1, "two"), (1, "two")] {
        let joined = join(&mut desk, &invited(&token), &keys[n], wish, week).unwrap();
        assert!(joined.roster.is_active(id(&keys[n])));
        let expected = answer.renamed.iter().find(|h| h.node == id(&keys[n])).map_or(name(wish), |h| h.name.clone());
        assert_eq!(joined.name, expected, "as it was foretold");
    }
    assert_eq!(desk.roster.member(id(&resident)).unwrap().name, name("two"), "no name was taken over");
    assert!(!desk.roster.member(id(&keys[0])).unwrap().is_authority());
    // Who was no member then, and who is none at all.
    refused(join(&mut desk, &invited(&token), &late, "late", week), Reason::NotInvited);
    refused(join(&mut desk, &invited(&token), &key(), "x", week), Reason::NotInvited);
    refused(join(&mut desk, &invited(&token), &keys[1], "two", NOW + 31 * 24 * HOUR), Reason::Expired);
}

#[test]
fn nothing_else_than_what_two_people_meant() {
    let (mut desk, theirs, keys) = two();
    let offer = Offer::of(&theirs, false);
    // Tokens of one kind are none of the other, as text and as what they are.
    let (for_host, for_mesh) =
        (desk.tokens.create(desk.roster.mesh(), desk.key.public(), NOW, HOUR, 1, vec![]).unwrap(), desk.merge_token(3));
    assert_eq!(for_host.to_text().parse::<MergeToken>(), Err(TokenError::ForHost));
    assert_eq!(for_mesh.to_text().parse::<JoinToken>(), Err(TokenError::ForMerge));
    assert_eq!(for_mesh.to_text().parse(), Ok(for_mesh.clone()));
    let disguised = for_host.text("merge1-").parse::<MergeToken>().unwrap();
    refused(present(&mut desk, &disguised, &keys[0], &offer, NOW, |_, _| {}), Reason::ForHost);
    refused(join(&mut desk, for_mesh.token(), &keys[0], "x", NOW), Reason::ForMesh);
    // Too late, taken back, guessed at, for more hosts than it is for.
    refused(present(&mut desk, &for_mesh, &keys[0], &offer, NOW + 2 * HOUR, |_, _| {}), Reason::Expired);
    let small = desk.merge_token(2);
    refused(present(&mut desk, &small, &keys[0], &offer, NOW, |_, _| {}), Reason::TooMany);
    assert!(desk.tokens.revoke(small.token().id));
    refused(present(&mut desk, &small, &keys[0], &offer, NOW, |_, _| {}), Reason::Revoked);
    let wrong = JoinToken { secret: Zeroizing::new([0; 20]), ..desk.merge_token(3).token().clone() };
    let wrong = wrong.text("merge1-").parse::<MergeToken>().unwrap();
    for _ in 0..crate::token::MAX_FAILURES {
        refused(present(&mut desk, &wrong, &keys[0], &offer, NOW, |_, _| {}), Reason::WrongProof);
    }
    refused(present(&mut desk, &wrong, &keys[0], &offer, NOW, |_, _| {}), Reason::Burned);
    // Another authority than the token says, this very one, and its own mesh.
    let rogue = desk_of(key(), desk.roster.mesh());
    let (mine, _) = wire(&keys[0], &rogue.key);
    assert!(
        matches!(Suitor::start(for_mesh.clone(), mine, name("x"), &offer), Err(JoinError::WrongAuthority(n)) if n == id(&rogue.key))
    );
    let own = Offer::of(&desk.roster, false);
    refused(present(&mut desk, &for_mesh, &keys[0], &own, NOW, |_, _| {}), Reason::SameMesh);
    // Another mesh of the same fleet has the same id, and is another mesh.
    let sibling = desk_of(PrivateKey::from_pkcs8(keys[0].pkcs8()).unwrap(), desk.roster.mesh());
    assert!(present(&mut desk, &for_mesh, &keys[0], &Offer::of(&sibling.roster, true), NOW, |_, _| {}).is_ok());
    // What was taken back lets nobody in any more.
    present(&mut desk, &for_mesh, &keys[0], &offer, NOW, |_, _| {}).unwrap();
    assert!(desk.tokens.revoke(for_mesh.token().id));
    refused(join(&mut desk, &invited(&for_mesh), &keys[1], "x", NOW), Reason::Revoked);
    assert_eq!(desk.roster.members().count(), 1);
}

#[test]
fn who_is_banished_stays_out_and_who_left_comes_back_under_its_name() {
    let (mut desk, theirs, keys) = two();
    let by = PrivateKey::from_pkcs8(desk.key.pkcs8()).unwrap();
    for (n, called) in [(1, "bad"), (2, "good")] {
        desk.roster.admit(&by, keys[n].public(), &name(called), NOW).unwrap();
    }
    desk.roster.banish(&by, id(&keys[1])).unwrap();
    desk.roster.leave(&keys[2]).unwrap();
    let token = desk.merge_token(3);
    refused(present(&mut desk, &token, &keys[1], &Offer::of(&theirs, false), NOW, |_, _| {}), Reason::Banished);
    let answer = present(&mut desk, &token, &keys[0], &Offer::of(&theirs, false), NOW, |_, _| {}).unwrap();
    assert_eq!((answer.banished, answer.invited), (vec![id(&keys[1])], 2));
    refused(join(&mut desk, &invited(&token), &keys[1], "two", NOW), Reason::Banished);
    assert_eq!(join(&mut desk, &invited(&token), &keys[2], "three", NOW).unwrap().name, name("good"));
    // Also one that is banished between its invitation and its coming.
    desk.roster.banish(&by, id(&keys[2])).unwrap();
    refused(join(&mut desk, &invited(&token), &keys[2], "three", NOW), Reason::Banished);
    assert!(!desk.roster.is_active(id(&keys[1])) && !desk.roster.is_active(id(&keys[2])));
}

#[test]
fn the_table_is_bounded_and_read_back() {
    let (mut desk, theirs, keys) = two();
    let mut last = None;
    for _ in 0..crate::token::MAX_MERGES {
        let token = desk.merge_token(3);
        present(&mut desk, &token, &keys[0], &Offer::of(&theirs, false), NOW, |_, _| {}).unwrap();
        last = Some(token);
    }
    let create = |desk: &mut Desk, now, limit| {
        desk.tokens.create_for_merge(desk.roster.mesh(), desk.key.public(), now, HOUR, limit, vec![])
    };
    assert_eq!(create(&mut desk, NOW, 3).err(), Some(TokenError::Merges));
    assert_eq!(create(&mut desk, NOW, 0).err(), Some(TokenError::Hosts));
    assert_eq!(create(&mut desk, NOW, 1025).err(), Some(TokenError::Hosts));
    // It is not forgotten while hosts may come by it, however many other tokens are made.
    let last = last.unwrap();
    for n in 0..2 * crate::token::MAX_TOKENS as u64 {
        let token =
            desk.tokens.create(desk.roster.mesh(), desk.key.public(), NOW + Duration::from_secs(n), HOUR, 1, vec![]).unwrap();
        desk.tokens.revoke(token.id);
    }
    desk.tokens = TokenTable::from_bytes(&desk.tokens.to_bytes()).unwrap();
    let week = NOW + 20 * 24 * HOUR;
    join(&mut desk, &invited(&last), &keys[1], "x", week).unwrap();
    // Wrong proofs of one that is invited are not the others' loss.
    let wrong = JoinToken { secret: Zeroizing::new([0; 20]), ..invited(&last) };
    for _ in 0..10 {
        refused(join(&mut desk, &wrong, &keys[2], "x", week), Reason::WrongProof);
    }
    join(&mut desk, &invited(&last), &keys[2], "y", week).unwrap();
    assert!(create(&mut desk, NOW + 31 * 24 * HOUR, 3).is_ok(), "they are over");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a man in the middle changes, nobody is invited and nothing is believed.
    #[test]
    fn no_changed_message_invites_anybody(at in any::<prop::sample::Index>(), message in 1usize..5, bit in 0u8..8) {
        let (mut desk, theirs, keys) = two();
        let token = desk.merge_token(3);
        let before = desk.tokens.list(NOW);
        let ended = present(&mut desk, &token, &keys[0], &Offer::of(&theirs, false), NOW, |n, bytes| {
            if n == message {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
        });
        prop_assert!(ended.is_err());
        if message < 4 {
            prop_assert_eq!(desk.tokens.list(NOW), before);
        }
        prop_assert_eq!(desk.roster.members().count(), 1);
    }

    /// Only those join that were listed, and only those were listed that are not banished.
    #[test]
    fn exactly_those_who_were_listed_come_in(listed in prop::collection::vec(any::<bool>(), 6), out in prop::collection::vec(any::<bool>(), 6)) {
        let mut desk = desk_of(key(), MeshId::from_bytes([7; 10]));
        let by = PrivateKey::from_pkcs8(desk.key.pkcs8()).unwrap();
        let (presenter, keys): (PrivateKey, Vec<PrivateKey>) = (key(), (0..6).map(|_| key()).collect());
        for k in keys.iter().zip(&out).filter(|(_, out)| **out).map(|(k, _)| k) {
            desk.roster.admit(&by, k.public(), &name("x"), NOW).unwrap();
            desk.roster.banish(&by, id(k)).unwrap();
        }
        let hosts = keys.iter().zip(&listed).filter(|(_, l)| **l).map(|(k, _)| Host { node: id(k), name: name("x") }).collect();
        let from = Mesh { id: MeshId::from_bytes([8; 10]), founder: id(&presenter) };
        let token = desk.merge_token(6);
        present(&mut desk, &token, &presenter, &Offer { look: false, from, hosts }, NOW, |_, _| {}).unwrap();
        for ((k, listed), out) in keys.iter().zip(&listed).zip(&out) {
            let joined = join(&mut desk, &invited(&token), k, "x", NOW).is_ok();
            prop_assert_eq!(joined, *listed && !out);
            prop_assert_eq!(desk.roster.is_active(id(k)), *listed && !out);
        }
        prop_assert!(join(&mut desk, &invited(&token), &presenter, "x", NOW).is_err());
    }
}
