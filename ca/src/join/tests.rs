use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::fleet::FleetToken;
use crate::identity::TrustDomain;
use crate::issue::Issuer;

const NOW: UnixTime = UnixTime(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);

/// An authority with a mesh of its own.
pub(super) struct Desk {
    pub(super) key: PrivateKey,
    pub(super) tokens: TokenTable,
    approvals: Approvals,
    pub(super) roster: Roster,
    fleet: Option<Reception>,
}

impl Authority for Desk {
    fn key(&self) -> &PrivateKey {
        &self.key
    }
    fn approvals(&mut self) -> &mut Approvals {
        &mut self.approvals
    }
    fn tokens(&mut self) -> &mut TokenTable {
        &mut self.tokens
    }
    fn roster(&mut self) -> &mut Roster {
        &mut self.roster
    }
    fn fleet(&self) -> Option<Reception> {
        self.fleet.clone()
    }
}

fn desk() -> Desk {
    desk_of(PrivateKey::generate().unwrap(), MeshId::from_bytes(random().unwrap()))
}

pub(super) fn desk_of(key: PrivateKey, mesh: MeshId) -> Desk {
    let domain = TrustDomain::of(mesh);
    let root = Issuer::create(&domain, key.public().node_id(), NOW, 24 * HOUR).unwrap().root_der().to_vec();
    let roster = Roster::found(mesh, domain, &key, name("one"), root, NOW).unwrap();
    Desk { key, tokens: TokenTable::default(), approvals: Approvals::default(), roster, fleet: None }
}

impl Desk {
    fn token(&mut self, uses: u32) -> JoinToken {
        self.tokens.create(self.roster.mesh(), self.key.public(), NOW, HOUR, uses, vec![]).unwrap()
    }

    /// Nobody but the founder got in.
    fn untouched(&self) -> bool {
        self.roster.members().count() == 1
    }
}

fn name(s: &str) -> HostName {
    s.parse().unwrap()
}

/// Both ends of one honest TLS connection.
fn wire(joiner: &PublicKey, authority: &PublicKey) -> (Channel, Channel) {
    let exporter = random().unwrap();
    (Channel { exporter, mine: *joiner, theirs: *authority }, Channel { exporter, mine: *authority, theirs: *joiner })
}

#[derive(Debug, PartialEq)]
enum End {
    Joined(HostName),
    Joiner(JoinError),
    Authority(JoinError),
}

/// Runs a join between these two ends; `meddle` sees and may change each message, numbered from 1.
fn run(
    desk: &mut Desk,
    token: &JoinToken,
    (mine, theirs): (Channel, Channel),
    now: UnixTime,
    meddle: impl FnMut(usize, &mut Vec<u8>),
) -> (End, Option<Joined>) {
    converse(desk, Joiner::start(token.clone(), mine, name("pi")), theirs, now, meddle)
}

/// The same for a joiner that has begun, whatever it begins with.
fn converse(
    desk: &mut Desk,
    joiner: Result<(Joiner, Vec<u8>), JoinError>,
    theirs: Channel,
    now: UnixTime,
    mut meddle: impl FnMut(usize, &mut Vec<u8>),
) -> (End, Option<Joined>) {
    let mut admission = Admission::start(theirs);
    let (mut joiner, mut message) = match joiner {
        Ok(started) => started,
        Err(e) => return (End::Joiner(e), None),
    };
    for n in [1, 3] {
        meddle(n, &mut message);
        let mut reply = match admission.receive(&message, desk, now) {
            Ok(Step::Send(reply) | Step::Finish(reply, _)) => reply,
            Ok(Step::Done(_)) => panic!("an authority always answers"),
            Err(e) => return (End::Authority(e), None),
        };
        meddle(n + 1, &mut reply);
        match joiner.receive(&reply) {
            Ok(Step::Send(next)) => message = next,
            Ok(Step::Done(joined)) => return (End::Joined(joined.name.clone()), Some(joined)),
            Ok(Step::Finish(..)) => panic!("the joiner has nothing to send at the end"),
            Err(e) => return (End::Joiner(e), None),
        }
    }
    panic!("a join has four messages");
}

fn join(desk: &mut Desk, token: &JoinToken, key: &PrivateKey, now: UnixTime) -> End {
    let wire = wire(key.public(), desk.key.public());
    run(desk, token, wire, now, |_, _| {}).0
}

fn refused(reason: Reason) -> End {
    End::Authority(JoinError::Refused(reason))
}

#[test]
fn a_host_with_a_token_joins() {
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    let wire = wire(key.public(), desk.key.public());
    let (end, joined) = run(&mut desk, &token, wire, NOW + HOUR / 2, |_, _| {});
    assert_eq!(end, End::Joined(name("pi")));
    let joined = joined.unwrap();
    assert_eq!(joined.roster.digest(), desk.roster.digest());
    assert_eq!(joined.time, NOW + HOUR / 2);
    assert!(joined.roster.is_active(key.public().node_id()));
    assert_eq!(desk.tokens.list(NOW)[0].used_by, [key.public().node_id()]);
}

#[test]
fn a_second_host_of_the_same_name_gets_another() {
    let (mut desk, a, b) = (desk(), PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let token = desk.token(2);
    assert_eq!(join(&mut desk, &token, &a, NOW), End::Joined(name("pi")));
    let End::Joined(second) = join(&mut desk, &token, &b, NOW) else { panic!() };
    assert!(second.as_str().starts_with("pi-"));
}

#[test]
fn the_same_node_may_ask_again_and_nobody_else() {
    let (mut desk, key, other) = (desk(), PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    // The last answer is lost on the way.
    let ends = wire(key.public(), desk.key.public());
    let (end, _) = run(&mut desk, &token, ends, NOW, |n, m| {
        if n == 4 {
            m.clear()
        }
    });
    assert_eq!(end, End::Joiner(JoinError::Protocol));
    let before = desk.roster.digest();
    assert_eq!(join(&mut desk, &token, &key, NOW + 100 * HOUR), End::Joined(name("pi")), "also when it has expired");
    assert_eq!((desk.roster.digest(), desk.tokens.list(NOW)[0].used_by.len()), (before, 1));
    assert_eq!(join(&mut desk, &token, &other, NOW), refused(Reason::Used));
    // Once it has left, its token is as used as anybody's.
    desk.roster.leave(&key).unwrap();
    assert_eq!(join(&mut desk, &token, &key, NOW), refused(Reason::Used));
    let fresh = desk.token(1);
    assert_eq!(join(&mut desk, &fresh, &key, NOW), End::Joined(name("pi")));
}

#[test]
fn tokens_that_are_of_no_use() {
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    assert_eq!(join(&mut desk, &token, &key, NOW + HOUR), refused(Reason::Expired));
    let unknown = JoinToken { id: "aaaaaaaa".parse().unwrap(), ..token.clone() };
    assert_eq!(join(&mut desk, &unknown, &key, NOW), refused(Reason::UnknownToken));
    desk.tokens.revoke(token.id);
    assert_eq!(join(&mut desk, &token, &key, NOW), refused(Reason::Revoked));
    assert!(desk.untouched());
}

#[test]
fn a_token_revoked_or_used_during_the_handshake_admits_nobody() {
    for revoke in [true, false] {
        let (mut desk, a, b) = (desk(), PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let token = desk.token(1);
        let (mine, theirs) = wire(a.public(), desk.key.public());
        let (mut joiner, hello) = Joiner::start(token.clone(), mine, name("a")).unwrap();
        let mut admission = Admission::start(theirs);
        let Ok(Step::Send(challenge)) = admission.receive(&hello, &mut desk, NOW) else { panic!() };
        let Ok(Step::Send(proof)) = joiner.receive(&challenge) else { panic!() };
        if revoke {
            desk.tokens.revoke(token.id);
        } else {
            assert_eq!(join(&mut desk, &token, &b, NOW), End::Joined(name("pi")));
        }
        let want = if revoke { Reason::Revoked } else { Reason::Used };
        assert_eq!(admission.receive(&proof, &mut desk, NOW).unwrap_err(), JoinError::Refused(want));
        assert!(!desk.roster.is_active(a.public().node_id()));
    }
}

#[test]
fn a_wrong_secret_is_counted_and_burns_the_token() {
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    let guess = JoinToken { secret: Zeroizing::new([0; 20]), ..token.clone() };
    for _ in 0..crate::token::MAX_FAILURES {
        assert_eq!(join(&mut desk, &guess, &key, NOW), refused(Reason::WrongProof));
    }
    assert_eq!(join(&mut desk, &token, &key, NOW), refused(Reason::Burned), "even with the right secret");
    assert!(desk.untouched());
}

#[test]
fn a_banished_key_does_not_come_back() {
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(3);
    assert_eq!(join(&mut desk, &token, &key, NOW), End::Joined(name("pi")));
    let authority = PrivateKey::from_pkcs8(desk.key.pkcs8()).unwrap();
    desk.roster.banish(&authority, key.public().node_id()).unwrap();
    assert_eq!(join(&mut desk, &token, &key, NOW), refused(Reason::Banished), "with its old token");
    let fresh = desk.token(1);
    assert_eq!(join(&mut desk, &fresh, &key, NOW), refused(Reason::Banished), "nor with a new one");
    assert_eq!(desk.roster.active().count(), 1);
}

#[test]
fn nothing_is_said_to_a_responder_with_another_key() {
    let (mut desk, key, rogue) = (desk(), PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    let (mine, _) = wire(key.public(), rogue.public());
    assert_eq!(Joiner::start(token.clone(), mine, name("pi")).err(), Some(JoinError::WrongAuthority(rogue.public().node_id())));
    let (mine, _) = wire(desk.key.public(), desk.key.public());
    assert_eq!(Joiner::start(token, mine, name("pi")).err(), Some(JoinError::OwnToken));
}

#[test]
fn a_rogue_authority_with_the_right_key_but_no_secret_is_not_believed() {
    // The worst case: it even has the authority's node key, but not its table of tokens.
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    let (mine, theirs) = wire(key.public(), desk.key.public());
    let mut fake = self::desk();
    fake.key = PrivateKey::from_pkcs8(desk.key.pkcs8()).unwrap();
    fake.roster = desk.roster.clone();
    let (mut joiner, hello) = Joiner::start(token.clone(), mine.clone(), name("pi")).unwrap();
    let guess = Zeroizing::new([0; 20]);
    let proofs = Proofs::new(&guess[..], token.mesh, &theirs.exporter, key.public(), fake.key.public());
    let challenge = encode(CHALLENGE, &Challenge { mesh: Some(token.mesh), side: None, nonce: vec![0; 32] });
    let Ok(Step::Send(proof)) = joiner.receive(&challenge) else { panic!() };
    fake.roster.admit(&fake.key, key.public(), &name("pi"), NOW).unwrap();
    let roster = String::from_utf8(fake.roster.to_bytes()).unwrap();
    let welcome = Welcome { name: name("pi"), time: NOW, roster, fleet: None };
    let body = encode(WELCOME, &welcome);
    let mut said = Transcript::default();
    [&hello, &challenge, &proof].into_iter().for_each(|m| said.add(m));
    let message = [&[WELCOME][..], &proofs.of_authority(&said, &body[1..]), &body[1..]].concat();
    assert_eq!(joiner.receive(&message).unwrap_err(), JoinError::WrongProof);
    assert_eq!(joiner.receive(&message).unwrap_err(), JoinError::Protocol, "and there is no second try");
    // The joiner's own proof sent back to it is no proof of the authority's.
    let (mut joiner, _) = Joiner::start(token, mine, name("pi")).unwrap();
    let Ok(Step::Send(proof)) = joiner.receive(&challenge) else { panic!() };
    let mirrored = [&[WELCOME][..], &proof[1..], &body[1..]].concat();
    assert_eq!(joiner.receive(&mirrored).unwrap_err(), JoinError::WrongProof);
}

#[test]
fn a_man_in_the_middle_gets_nobody_in() {
    // It ends TLS on both sides and passes every message on unchanged. To get past the pin, let it have the authority's key
    // toward the joiner: only the exporters differ.
    let (mut desk, key, middle) = (desk(), PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    let (mine, _) = wire(key.public(), desk.key.public());
    let (_, theirs) = wire(key.public(), desk.key.public());
    assert_eq!(run(&mut desk, &token, (mine.clone(), theirs), NOW, |_, _| {}).0, refused(Reason::WrongProof));
    // Its own key toward the authority, with the same exporter, as if that were possible: the keys differ.
    let theirs = Channel { exporter: mine.exporter, mine: *desk.key.public(), theirs: *middle.public() };
    assert_eq!(run(&mut desk, &token, (mine, theirs), NOW, |_, _| {}).0, refused(Reason::WrongProof));
    assert!(desk.untouched());
}

#[test]
fn a_replayed_join_admits_nobody() {
    let (mut desk, key, thief) = (desk(), PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let token = desk.token(9);
    let mut heard = Vec::new();
    let ends = wire(key.public(), desk.key.public());
    let (mine, theirs) = ends.clone();
    assert_eq!(run(&mut desk, &token, ends, NOW, |_, m| heard.push(m.clone())).0, End::Joined(name("pi")));
    let before = desk.roster.digest();
    // Into a new connection, as another node; and, as if that were possible, into one with the same keys and exporter.
    let other = wire(thief.public(), desk.key.public()).1;
    for channel in [other, theirs] {
        let mut admission = Admission::start(channel);
        assert!(matches!(admission.receive(&heard[0], &mut desk, NOW), Ok(Step::Send(_))));
        assert_eq!(admission.receive(&heard[2], &mut desk, NOW).unwrap_err(), JoinError::Refused(Reason::WrongProof));
    }
    assert_eq!(desk.roster.digest(), before);
    // And toward the joiner: an old welcome answers no new hello.
    let (mut joiner, _) = Joiner::start(token, mine, name("pi")).unwrap();
    assert!(matches!(joiner.receive(&heard[1]), Ok(Step::Send(_))));
    assert_eq!(joiner.receive(&heard[3]).unwrap_err(), JoinError::WrongProof);
}

#[test]
fn a_join_relayed_to_another_authority_admits_nobody() {
    let (mut a, mut b, key) = (desk(), desk(), PrivateKey::generate().unwrap());
    let token = a.token(1);
    // B knows no such token.
    let exporter = random().unwrap();
    let mine = Channel { exporter, mine: *key.public(), theirs: *a.key.public() };
    let at_b = Channel { exporter, mine: *b.key.public(), theirs: *key.public() };
    assert_eq!(run(&mut b, &token, (mine.clone(), at_b.clone()), NOW, |_, _| {}).0, refused(Reason::UnknownToken));
    // Even with A's table and A's mesh, B is another key.
    b.tokens = a.tokens.clone();
    assert_eq!(run(&mut b, &token, (mine.clone(), at_b.clone()), NOW, |_, _| {}).0, End::Joiner(JoinError::WrongMesh));
    b.roster = a.roster.clone();
    assert_eq!(run(&mut b, &token, (mine, at_b), NOW, |_, _| {}).0, refused(Reason::WrongProof));
    assert!(a.untouched() && b.untouched());
}

#[test]
fn an_authority_that_is_none_any_more_admits_nobody() {
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    let own = PrivateKey::from_pkcs8(desk.key.pkcs8()).unwrap();
    desk.roster.leave(&own).unwrap();
    assert_eq!(join(&mut desk, &token, &key, NOW), refused(Reason::NotAuthority));
    assert!(desk.tokens.list(NOW)[0].used_by.is_empty());
}

#[test]
fn the_joiner_checks_what_an_honest_proof_covers() {
    // An authority that knows the secret but sends a roster without the joiner, of another mesh, or broken.
    let (mut desk, key, other) = (desk(), PrivateKey::generate().unwrap(), self::desk());
    let token = desk.token(1);
    let try_with = |roster: Vec<u8>, called: &str| {
        let (mine, _) = wire(key.public(), desk.key.public());
        let proofs = Proofs::new(&token.secret[..], token.mesh, &mine.exporter, key.public(), desk.key.public());
        let (mut joiner, hello) = Joiner::start(token.clone(), mine, name("pi")).unwrap();
        let challenge = encode(CHALLENGE, &Challenge { mesh: Some(token.mesh), side: None, nonce: vec![1; 32] });
        let Ok(Step::Send(proof)) = joiner.receive(&challenge) else { panic!() };
        let mut said = Transcript::default();
        [&hello, &challenge, &proof].into_iter().for_each(|m| said.add(m));
        let body =
            encode(WELCOME, &Welcome { name: name(called), time: NOW, roster: String::from_utf8(roster).unwrap(), fleet: None });
        joiner.receive(&[&[WELCOME][..], &proofs.of_authority(&said, &body[1..]), &body[1..]].concat())
    };
    assert_eq!(try_with(desk.roster.to_bytes(), "pi").unwrap_err(), JoinError::Roster(RosterError::NotMember));
    assert_eq!(try_with(other.roster.to_bytes(), "pi").unwrap_err(), JoinError::Roster(RosterError::ForeignMesh));
    assert_eq!(try_with(b"{}".to_vec(), "pi").unwrap_err(), JoinError::Roster(RosterError::Malformed));
    let mut with = desk.roster.clone();
    with.admit(&desk.key, key.public(), &name("pi"), NOW).unwrap();
    assert_eq!(try_with(with.to_bytes(), "boss").unwrap_err(), JoinError::Roster(RosterError::NotActive));
    assert!(try_with(with.to_bytes(), "pi").is_ok());
}

#[test]
fn a_refusal_says_why_and_cannot_do_more() {
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    for reason in [Reason::Expired, Reason::Used, Reason::Revoked, Reason::UnknownToken, Reason::Banished, Reason::Protocol] {
        for after_challenge in [false, true] {
            let (mine, theirs) = wire(key.public(), desk.key.public());
            let (mut joiner, hello) = Joiner::start(token.clone(), mine, name("pi")).unwrap();
            if after_challenge {
                let Ok(Step::Send(challenge)) = Admission::start(theirs).receive(&hello, &mut desk, NOW) else { panic!() };
                joiner.receive(&challenge).unwrap();
            }
            let refusal = JoinError::Refused(reason).refusal();
            assert_eq!(joiner.receive(&refusal).unwrap_err(), JoinError::Refused(reason));
            assert_eq!(joiner.receive(&refusal).unwrap_err(), JoinError::Protocol);
        }
    }
    assert_eq!(JoinError::WrongMesh.refusal(), JoinError::Refused(Reason::Protocol).refusal());
}

#[test]
fn messages_too_long_out_of_order_or_twice_end_the_join() {
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    let protocol = |n| {
        let side: fn(JoinError) -> End = if n % 2 == 1 { End::Authority } else { End::Joiner };
        side(JoinError::Protocol)
    };
    for n in 1..=3 {
        let ends = wire(key.public(), desk.key.public());
        let padded = |at, m: &mut Vec<u8>| {
            if at == n {
                m.resize(MAX_MESSAGE + 1, b' ')
            }
        };
        assert_eq!(run(&mut desk, &token, ends, NOW, padded).0, protocol(n), "message {n} too long");
        assert!(desk.untouched());
    }
    let ends = wire(key.public(), desk.key.public());
    let endless = |at, m: &mut Vec<u8>| {
        if at == 4 {
            m.resize(MAX_WELCOME + 1, b' ')
        }
    };
    let (end, _) = run(&mut desk, &token, ends, NOW, endless);
    assert_eq!(end, protocol(4));
    for n in 1..=4 {
        for kind in [HELLO, CHALLENGE, PROOF, WELCOME, 0] {
            let ends = wire(key.public(), desk.key.public());
            let renamed = |at, m: &mut Vec<u8>| {
                if at == n && m[0] != kind {
                    m[0] = kind
                } else if at == n {
                    m[0] = b'?'
                }
            };
            assert_eq!(run(&mut desk, &token, ends, NOW, renamed).0, protocol(n), "message {n} as {kind}");
        }
    }
    let (mine, theirs) = wire(key.public(), desk.key.public());
    let (joiner, hello) = Joiner::start(token, mine, name("pi")).unwrap();
    assert_eq!(joiner.limit(), MAX_MESSAGE);
    let mut admission = Admission::start(theirs);
    admission.receive(&hello, &mut desk, NOW).unwrap();
    assert_eq!(admission.receive(&hello, &mut desk, NOW).unwrap_err(), JoinError::Protocol);
    assert_eq!(admission.receive(&hello, &mut desk, NOW).unwrap_err(), JoinError::Protocol);
}

#[test]
fn the_secret_is_in_no_message() {
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    let mut all = Vec::new();
    let ends = wire(key.public(), desk.key.public());
    let (end, joined) = run(&mut desk, &token, ends, NOW, |_, m| all.extend_from_slice(m));
    assert!(matches!(end, End::Joined(_)));
    let text = data_encoding::BASE64URL_NOPAD.encode(&token.secret[..]);
    let base32 = crate::identity::base32().encode(&token.secret[..]);
    for form in [&token.secret[..], text.as_bytes(), base32.as_bytes()] {
        assert!(!all.windows(form.len()).any(|w| w == form));
    }
    assert!(!format!("{joined:?}").contains(&text));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever happens to one message on the way, nobody joins by it, nobody is admitted by it, and nothing panics.
    #[test]
    fn a_changed_message_never_joins(
        n in 1usize..=4,
        at in any::<proptest::sample::Index>(),
        bit in 0u8..8,
        cut in any::<proptest::sample::Index>(),
        how in 0u8..4,
        junk in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
        let token = desk.token(1);
        let ends = wire(key.public(), desk.key.public());
        let mut changed = true;
        let (end, joined) = run(&mut desk, &token, ends, NOW, |i, m| if i == n {
            let before = m.clone();
            match how {
                0 => { let at = at.index(m.len()); m[at] ^= 1 << bit }
                1 => m.truncate(cut.index(m.len())),
                2 => m.extend_from_slice(&junk),
                _ => *m = junk.clone(),
            }
            changed = *m != before;
        });
        if changed {
            prop_assert!(!matches!(end, End::Joined(_)), "{:?}", end);
            prop_assert!(joined.is_none());
            // A last message that is changed comes too late to keep the authority from admitting.
            prop_assert!(n == 4 || desk.untouched());
        }
    }

    /// Messages out of nothing, to both sides and at every step.
    #[test]
    fn no_bytes_make_a_side_panic(kind in prop_oneof![Just(HELLO), Just(CHALLENGE), Just(PROOF), Just(WELCOME), Just(REFUSAL), any::<u8>()],
                                  junk in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
        let token = desk.token(1);
        let message = [&[kind][..], &junk].concat();
        for skip in [false, true] {
            let (mine, theirs) = wire(key.public(), desk.key.public());
            let (mut joiner, hello) = Joiner::start(token.clone(), mine, name("pi")).unwrap();
            let mut admission = Admission::start(theirs);
            if skip {
                let Ok(Step::Send(challenge)) = admission.receive(&hello, &mut desk, NOW) else { panic!() };
                joiner.receive(&challenge).unwrap();
            }
            prop_assert!(joiner.receive(&message).is_err());
            prop_assert!(admission.receive(&message, &mut desk, NOW).is_err());
        }
        prop_assert!(desk.untouched());
    }
}

mod approval {
    use super::*;
    use crate::approval::LIFETIME;

    fn code() -> ApprovalCode {
        ApprovalCode::generate().unwrap()
    }

    fn ask(desk: &mut Desk, code: &ApprovalCode, key: &PrivateKey, now: UnixTime) -> End {
        let (mine, theirs) = wire(key.public(), desk.key.public());
        converse(desk, Joiner::ask(code.clone(), mine, name("pi")), theirs, now, |_, _| {}).0
    }

    #[test]
    fn a_host_whose_code_was_typed_is_admitted_and_no_other() {
        let (mut desk, key, other) = (desk(), PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let shown = code();
        assert_eq!(ask(&mut desk, &shown, &key, NOW), refused(Reason::NotApproved));
        assert!(desk.untouched());
        assert_eq!(desk.approvals.approve(shown.clone(), NOW), None);
        // Somebody who saw no code.
        assert_eq!(ask(&mut desk, &code(), &other, NOW), refused(Reason::NotApproved));
        assert!(desk.untouched());
        assert_eq!(ask(&mut desk, &shown, &key, NOW), End::Joined(name("pi")));
        assert_eq!(desk.approvals.approve(shown.clone(), NOW), Some(key.public().node_id()));
        // Its answer was lost: the same node may ask again, and nobody else may have the code.
        assert_eq!(ask(&mut desk, &shown, &key, NOW), End::Joined(name("pi")));
        assert_eq!(ask(&mut desk, &shown, &other, NOW), refused(Reason::CodeUsed));
        assert_eq!(desk.roster.members().count(), 2);
    }

    #[test]
    fn an_approval_ends() {
        let (mut desk, key, shown) = (desk(), PrivateKey::generate().unwrap(), code());
        desk.approvals.approve(shown.clone(), NOW);
        assert_eq!(ask(&mut desk, &shown, &key, NOW + LIFETIME), refused(Reason::NotApproved));
        assert!(desk.untouched());
    }

    #[test]
    fn a_banished_key_is_not_approved() {
        let (mut desk, key, shown) = (desk(), PrivateKey::generate().unwrap(), code());
        desk.approvals.approve(shown.clone(), NOW);
        assert_eq!(ask(&mut desk, &shown, &key, NOW), End::Joined(name("pi")));
        desk.roster.banish(&desk.key, key.public().node_id()).unwrap();
        desk.approvals.approve(code(), NOW);
        assert_eq!(ask(&mut desk, &shown, &key, NOW), refused(Reason::Banished));
    }

    #[test]
    fn nobody_asks_itself() {
        let desk = desk();
        let (mine, _) = wire(desk.key.public(), desk.key.public());
        assert!(matches!(Joiner::ask(code(), mine, name("pi")), Err(JoinError::OwnToken)));
    }

    /// A mesh in which nobody typed the code, but whose owner would like to have the host.
    #[test]
    fn a_rogue_mesh_cannot_adopt_a_host_that_waits() {
        let (mut rogue, key, shown) = (desk(), PrivateKey::generate().unwrap(), code());
        // It knows another code, and answers as if that were the host's.
        let guessed = code();
        rogue.approvals.approve(guessed.clone(), NOW);
        let (mine, theirs) = wire(key.public(), rogue.key.public());
        let (mut joiner, hello) = Joiner::ask(shown, mine, name("pi")).unwrap();
        let mut admission = Admission::start(theirs.clone());
        let Ok(Step::Send(challenge)) = admission.receive(&hello, &mut rogue, NOW) else { panic!() };
        let Ok(Step::Send(proof)) = joiner.receive(&challenge) else { panic!() };
        assert!(admission.receive(&proof, &mut rogue, NOW).is_err());
        // It puts the joiner in its roster and says welcome with the only keys it has.
        let said = Transcript(vec![sha256(&[&hello]), sha256(&[&challenge]), sha256(&[&proof])]);
        let proofs = Proofs::new(guessed.secret(), rogue.roster.mesh(), &theirs.exporter, key.public(), rogue.key.public());
        let admitted = rogue.roster.admit(&rogue.key, key.public(), &name("pi"), NOW).unwrap();
        let roster = String::from_utf8(rogue.roster.to_bytes()).unwrap();
        let body = encode(WELCOME, &Welcome { name: admitted, time: NOW, roster, fleet: None });
        let welcome = [&[WELCOME][..], &proofs.of_authority(&said, &body[1..]), &body[1..]].concat();
        assert_eq!(joiner.receive(&welcome).unwrap_err(), JoinError::WrongProof);
    }

    /// Somebody in the middle passes every message on: both see his key, so both proofs are worth nothing.
    #[test]
    fn a_code_cannot_be_relayed() {
        let (mut desk, key, shown) = (desk(), PrivateKey::generate().unwrap(), code());
        desk.approvals.approve(shown.clone(), NOW);
        let middle = PrivateKey::generate().unwrap();
        let (mine, _) = wire(key.public(), middle.public());
        let (_, theirs) = wire(middle.public(), desk.key.public());
        let end = converse(&mut desk, Joiner::ask(shown, mine, name("pi")), theirs, NOW, |_, _| {}).0;
        assert_eq!(end, refused(Reason::NotApproved));
        assert!(desk.untouched());
    }
}

fn fleet() -> FleetToken {
    FleetToken::generate().unwrap()
}

/// The founder of a mesh of that fleet.
fn founder(fleet: &FleetToken) -> Desk {
    let (key, mesh) = (PrivateKey::generate().unwrap(), fleet.mesh());
    let (domain, me) = (TrustDomain::of(mesh), key.public().node_id());
    let root = Issuer::create(&domain, me, NOW, 24 * HOUR).unwrap().root_der().to_vec();
    let roster = Roster::found(mesh, domain, &key, name("one"), root, NOW).unwrap();
    let side = Side { founder: me, settled: false };
    let terms = Fleet::found(fleet.key()).terms();
    let fleet = Some(Reception { key: fleet.key(), side, terms, founder: true });
    Desk { key, tokens: TokenTable::default(), approvals: Approvals::default(), roster, fleet }
}

impl Desk {
    fn reception(&mut self) -> &mut Reception {
        self.fleet.as_mut().unwrap()
    }
}

/// A host with the token of `fleet` asks `desk` to let it in, from the mesh that it `leaves` perhaps.
fn ask(desk: &mut Desk, fleet: &FleetToken, key: &PrivateKey, leaves: Option<Side>) -> (End, Option<Joined>) {
    let (mine, theirs) = wire(key.public(), desk.key.public());
    let joiner = Joiner::of_fleet(fleet.mesh(), fleet.key(), leaves, mine, name("pi"));
    converse(desk, joiner, theirs, NOW, |_, _| {})
}

#[test]
fn a_host_of_the_fleet_joins_and_one_of_another_does_not() {
    let (ours, key) = (fleet(), PrivateKey::generate().unwrap());
    let mut desk = founder(&ours);
    assert_eq!(ask(&mut desk, &fleet(), &key, None).0, refused(Reason::WrongProof));
    // Not even one that knows which mesh it is.
    let (mine, theirs) = wire(key.public(), desk.key.public());
    let joiner = Joiner::of_fleet(ours.mesh(), fleet().key(), None, mine, name("pi"));
    assert_eq!(converse(&mut desk, joiner, theirs, NOW, |_, _| {}).0, refused(Reason::WrongProof));
    assert!(desk.untouched());
    let (end, joined) = ask(&mut desk, &ours, &key, None);
    assert_eq!(end, End::Joined(name("pi")));
    let joined = joined.unwrap();
    assert!(joined.roster.is_active(key.public().node_id()));
    assert_eq!(joined.fleet.unwrap(), Fleet::found(ours.key()));
    // All cards have the same name at first.
    let End::Joined(second) = ask(&mut desk, &ours, &PrivateKey::generate().unwrap(), None).0 else { panic!() };
    assert!(second.as_str().starts_with("pi-"), "{second}");
    // A mesh that is of no fleet takes nobody so, and believes nobody.
    assert_eq!(ask(&mut self::desk(), &ours, &key, None).0, refused(Reason::NoFleet));
}

#[test]
fn a_mesh_without_the_fleets_key_is_not_believed() {
    let (ours, key) = (fleet(), PrivateKey::generate().unwrap());
    // It has another key and believes everybody: what it says back proves nothing.
    let mut rogue = founder(&ours);
    rogue.reception().key = fleet().key();
    let (mine, _) = wire(key.public(), rogue.key.public());
    let (mut joiner, hello) = Joiner::of_fleet(ours.mesh(), ours.key(), None, mine.clone(), name("pi")).unwrap();
    let side = rogue.reception().side;
    let challenge = encode(CHALLENGE, &Challenge { mesh: None, side: Some(side), nonce: vec![0; 32] });
    let Ok(Step::Send(proof)) = joiner.receive(&challenge) else { panic!() };
    let own = PrivateKey::from_pkcs8(rogue.key.pkcs8()).unwrap();
    rogue.roster.admit(&own, key.public(), &name("pi"), NOW).unwrap();
    let roster = String::from_utf8(rogue.roster.to_bytes()).unwrap();
    let terms = Some(rogue.reception().terms);
    let body = encode(WELCOME, &Welcome { name: name("pi"), time: NOW, roster, fleet: terms });
    let guess = Proofs::new(rogue.reception().key.secret(), ours.mesh(), &mine.exporter, key.public(), own.public());
    let mut said = Transcript::default();
    [&hello, &challenge, &proof].into_iter().for_each(|m| said.add(m));
    let message = [&[WELCOME][..], &guess.of_authority(&said, &body[1..]), &body[1..]].concat();
    assert_eq!(joiner.receive(&message).unwrap_err(), JoinError::WrongProof);
}

#[test]
fn a_closed_window_takes_nobody() {
    let (ours, key) = (fleet(), PrivateKey::generate().unwrap());
    let mut desk = founder(&ours);
    desk.reception().terms.window.left = Duration::ZERO;
    assert_eq!(ask(&mut desk, &ours, &key, None).0, refused(Reason::Closed));
    // Closed between the hello and the proof.
    let mut desk = founder(&ours);
    let (mine, theirs) = wire(key.public(), desk.key.public());
    let (mut joiner, hello) = Joiner::of_fleet(ours.mesh(), ours.key(), None, mine, name("pi")).unwrap();
    let mut admission = Admission::start(theirs);
    let Ok(Step::Send(challenge)) = admission.receive(&hello, &mut desk, NOW) else { panic!() };
    let Ok(Step::Send(proof)) = joiner.receive(&challenge) else { panic!() };
    desk.reception().terms.window.left = Duration::ZERO;
    assert_eq!(admission.receive(&proof, &mut desk, NOW).unwrap_err(), JoinError::Refused(Reason::Closed));
    assert!(desk.untouched());
}

#[test]
fn of_two_founders_the_one_with_the_lower_id_stays() {
    let ours = fleet();
    let (mut low, mut high) = (founder(&ours), founder(&ours));
    if low.reception().side.founder > high.reception().side.founder {
        std::mem::swap(&mut low, &mut high);
    }
    let (of_low, of_high) = (low.reception().side, high.reception().side);
    let keys = |desk: &Desk| PrivateKey::from_pkcs8(desk.key.pkcs8()).unwrap();
    let (low_key, high_key) = (keys(&low), keys(&high));
    // Its own side sees it, and nothing is proved.
    assert_eq!(ask(&mut high, &ours, &low_key, Some(of_low)).0, End::Joiner(JoinError::Stays));
    // One that lies about itself to get the other one to take it is seen by the other side, and that is so in the end what it proved.
    let lie = Side { founder: NodeId::from_bytes([0xff; 16]), ..of_low };
    assert_eq!(ask(&mut low, &ours, &high_key, Some(of_high)).0, End::Joined(name("pi")));
    assert_eq!(low.roster.active().count(), 2);
    assert_eq!(ask(&mut high, &ours, &low_key, Some(lie)).0, End::Joined(name("pi")), "whoever wants to leave may");
    // Settled ones stay, whatever their id, and others come to them.
    let (mut low, mut high) = (founder(&ours), founder(&ours));
    if low.reception().side.founder > high.reception().side.founder {
        std::mem::swap(&mut low, &mut high);
    }
    let (low_key, high_key) = (keys(&low), keys(&high));
    high.reception().side.settled = true;
    let (of_low, of_high) = (low.reception().side, high.reception().side);
    assert_eq!(ask(&mut low, &ours, &high_key, Some(of_high)).0, End::Joiner(JoinError::Stays));
    assert_eq!(ask(&mut high, &ours, &low_key, Some(of_low)).0, End::Joined(name("pi")));
    // Who answers for a mesh is its founder.
    let mut other = founder(&ours);
    other.reception().founder = false;
    other.reception().side = of_high;
    assert_eq!(ask(&mut other, &ours, &low_key, Some(of_low)).0, refused(Reason::NotAuthority));
    assert_eq!(ask(&mut other, &ours, &low_key, None).0, End::Joined(name("pi")), "a newcomer is taken by any authority");
}

#[test]
fn what_the_joiner_says_of_its_mesh_cannot_be_changed_on_the_way() {
    let (ours, key) = (fleet(), PrivateKey::generate().unwrap());
    let mut desk = founder(&ours);
    let (high, low) = (NodeId::from_bytes([0xff; 16]), NodeId::from_bytes([0; 16]));
    for n in [1, 2] {
        let (mine, theirs) = wire(key.public(), desk.key.public());
        let leaves = Some(Side { founder: high, settled: false });
        let joiner = Joiner::of_fleet(ours.mesh(), ours.key(), leaves, mine, name("pi"));
        let (end, _) = converse(&mut desk, joiner, theirs, NOW, |at, message| {
            if at == n {
                let text = String::from_utf8(message.clone()).unwrap();
                let (from, to) = if n == 1 { (high, low) } else { (desk_founder(&text), low) };
                *message = text.replace(&from.to_string(), &to.to_string()).into_bytes();
                assert_ne!(*message, text.into_bytes());
            }
        });
        assert_eq!(end, refused(Reason::WrongProof));
    }
    assert!(desk.untouched());
}

/// The id in the challenge of an authority.
fn desk_founder(challenge: &str) -> NodeId {
    let challenge: Challenge = serde_json::from_str(&challenge[1..]).unwrap();
    challenge.side.unwrap().founder
}

#[test]
fn a_banished_key_does_not_come_back_with_the_fleet_token() {
    let (ours, key) = (fleet(), PrivateKey::generate().unwrap());
    let mut desk = founder(&ours);
    assert_eq!(ask(&mut desk, &ours, &key, None).0, End::Joined(name("pi")));
    let authority = PrivateKey::from_pkcs8(desk.key.pkcs8()).unwrap();
    desk.roster.banish(&authority, key.public().node_id()).unwrap();
    for leaves in [None, Some(Side { founder: NodeId::from_bytes([0xff; 16]), settled: false })] {
        assert_eq!(ask(&mut desk, &ours, &key, leaves).0, refused(Reason::Banished));
    }
}

#[test]
fn a_join_of_the_fleet_is_worth_nothing_a_second_time_or_elsewhere() {
    let (ours, key, thief) = (fleet(), PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let (mut desk, mut other) = (founder(&ours), founder(&ours));
    let mut heard = Vec::new();
    let (mine, theirs) = wire(key.public(), desk.key.public());
    let joiner = Joiner::of_fleet(ours.mesh(), ours.key(), None, mine.clone(), name("pi"));
    let (end, _) = converse(&mut desk, joiner, theirs.clone(), NOW, |_, m| heard.push(m.clone()));
    assert_eq!(end, End::Joined(name("pi")));
    let before = desk.roster.digest();
    // Replayed by another node, and in a connection that is the same if that were possible.
    for channel in [wire(thief.public(), desk.key.public()).1, theirs] {
        let mut admission = Admission::start(channel);
        assert!(matches!(admission.receive(&heard[0], &mut desk, NOW), Ok(Step::Send(_))));
        assert_eq!(admission.receive(&heard[2], &mut desk, NOW).unwrap_err(), JoinError::Refused(Reason::WrongProof));
    }
    assert_eq!(desk.roster.digest(), before);
    // Relayed to another authority of the fleet, and past a man in the middle.
    let at_other = Channel { exporter: mine.exporter, mine: *other.key.public(), theirs: *key.public() };
    let joiner = Joiner::of_fleet(ours.mesh(), ours.key(), None, mine, name("pi"));
    assert_eq!(converse(&mut other, joiner, at_other, NOW, |_, _| {}).0, refused(Reason::WrongProof));
    let ((mine, _), (_, theirs)) = (wire(key.public(), other.key.public()), wire(key.public(), other.key.public()));
    let joiner = Joiner::of_fleet(ours.mesh(), ours.key(), None, mine, name("pi"));
    assert_eq!(converse(&mut other, joiner, theirs, NOW, |_, _| {}).0, refused(Reason::WrongProof));
    assert!(other.untouched());
    // An authority of the fleet that asks itself.
    let own = wire(other.key.public(), other.key.public()).0;
    assert_eq!(Joiner::of_fleet(ours.mesh(), ours.key(), None, own, name("pi")).err(), Some(JoinError::OwnToken));
}

#[test]
fn who_left_says_so_and_is_let_in_by_a_later_word() {
    let (mut desk, key) = (desk(), PrivateKey::generate().unwrap());
    let token = desk.token(1);
    let (mine, theirs) = wire(key.public(), desk.key.public());
    // This authority has never heard of the host, nor of its leaving.
    let wish = Wish { name: name("pi"), past: 7 };
    let (end, joined) = converse(&mut desk, Joiner::start(token, mine, wish), theirs, NOW, |_, _| {});
    assert_eq!(end, End::Joined(name("pi")));
    let member = joined.unwrap().roster.member(key.public().node_id()).unwrap().clone();
    assert!(member.standing == Standing::Active && member.version == 8, "{member:?}");
}
