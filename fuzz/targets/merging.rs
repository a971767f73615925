//! A mesh that moves: whatever somebody without the token says or changes, nobody is invited, no answer and no word is believed.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use meshd_ca::approval::Approvals;
use meshd_ca::identity::{MeshId, NodeId};
use meshd_ca::join::{Admission, Channel, MAX_MESSAGE, Step, Suitor};
use meshd_ca::keys::PrivateKey;
use meshd_ca::merge::{Mesh, Offer, Word, Words};
use meshd_ca::token::{MergeToken, TokenTable};
use meshd_fuzz::{Desk, Input, NOW, WORLD, host, within};

static TABLE: LazyLock<(MergeToken, Vec<u8>)> = LazyLock::new(|| {
    let (mut table, hour) = (TokenTable::default(), Duration::from_secs(3600));
    let token = table.create_for_merge(WORLD.roster.mesh(), WORLD.keys[0].public(), NOW, hour, 8, vec![]).expect("a token");
    (token, table.to_bytes().to_vec())
});
static NEW: LazyLock<PrivateKey> = LazyLock::new(|| PrivateKey::generate().expect("random bytes"));

fn sides() -> (Channel, Channel) {
    let (exporter, mine, theirs) = ([9; 32], *NEW.public(), *WORLD.keys[0].public());
    (Channel { exporter, mine, theirs }, Channel { exporter, mine: theirs, theirs: mine })
}

fn elsewhere() -> Mesh {
    Mesh { id: MeshId::from_bytes([8; 10]), founder: NodeId::from_bytes([8; 16]) }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (token, table) = (&TABLE.0, &TABLE.1);
    let tokens = TokenTable::from_bytes(table).expect("our own table");
    let mut desk = Desk { roster: WORLD.roster.clone(), tokens, approvals: Approvals::default() };
    let (of_suitor, of_authority) = sides();
    let offer = Offer { look: false, from: elsewhere(), hosts: Vec::new() };
    match input.byte() % 4 {
        // A rogue authority.
        0 => {
            let (mut suitor, _) = Suitor::start(token.clone(), of_suitor, host(9), &offer).expect("the pinned authority");
            while !input.is_empty() {
                let message = input.piece();
                match within(64 * 1024 + 8 * message.len(), || suitor.receive(message)) {
                    Ok(Step::Send(proof)) => assert!(proof.len() > 33),
                    Ok(_) => panic!("an answer was believed without proof"),
                    Err(_) => {}
                }
            }
        }
        // A stranger who knows which token there is, at most.
        1 => {
            let mut admission = Admission::start(of_authority);
            while !input.is_empty() {
                let message = replace(input.piece(), b"aaaaaaaa", token.token().id.to_string().as_bytes());
                match within(64 * 1024 + 8 * message.len(), || admission.receive(&message, &mut desk, NOW)) {
                    Ok(Step::Send(challenge)) => assert!(challenge.len() <= MAX_MESSAGE),
                    Ok(_) => panic!("somebody was invited without proof"),
                    Err(error) => assert!(error.refusal().len() <= MAX_MESSAGE),
                }
            }
            assert!(desk.tokens.list(NOW).iter().all(|t| t.used_by.is_empty()));
            assert_eq!(desk.roster.digest(), WORLD.roster.digest());
        }
        // Words of whomever, in the form of words and not.
        2 => {
            let bytes = WORLD.named(input.0);
            let word = within(64 * 1024 + 16 * bytes.len(), || Word::from_bytes(&bytes));
            assert!(word.is_err(), "believed without a key: {word:?}");
            let _ = within(64 * 1024 + 16 * bytes.len(), || Words::from_bytes(&bytes));
            // What a plain member signs is read, and believed by nobody.
            if let Ok(word) = Word::sign(&WORLD.keys[1], bytes) {
                assert!(word.believed_in(&WORLD.roster).is_err());
                assert_eq!(Word::from_bytes(&word.to_bytes()), Ok(word));
            }
        }
        // An honest word, changed on its way.
        _ => {
            let unsigned = Word::unsigned(WORLD.keys[0].public(), Mesh::of(&WORLD.roster), None, 7);
            let honest = Word::sign(&WORLD.keys[0], unsigned).expect("the founder");
            assert_eq!(honest.believed_in(&WORLD.roster), Ok(()));
            let bytes = input.edit(&honest.to_bytes());
            match Word::from_bytes(&bytes) {
                // JSON has more than one spelling; what was signed has one.
                Ok(word) => assert_eq!((word.from(), word.to(), word.version()), (honest.from(), None, 7)),
                Err(_) => assert!(bytes != honest.to_bytes()),
            }
        }
    }
});

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    if let Some(at) = out.windows(from.len()).position(|w| w == from) {
        out[at..at + from.len()].copy_from_slice(to);
    }
    out
}
