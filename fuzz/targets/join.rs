//! Joining, both sides: whatever somebody without the token's secret says or changes, nobody is admitted and no mesh is believed.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use meshd_ca::approval::{ApprovalCode, Approvals};
use meshd_ca::join::{Admission, Channel, Joiner, MAX_MESSAGE, Step};
use meshd_ca::keys::PrivateKey;
use meshd_ca::token::{JoinToken, TokenTable};
use meshd_fuzz::{Desk, Input, NOW, WORLD, host, within};

static TABLE: LazyLock<(JoinToken, Vec<u8>)> = LazyLock::new(|| {
    let mut table = TokenTable::default();
    let hour = Duration::from_secs(3600);
    let token = table.create(WORLD.roster.mesh(), WORLD.keys[0].public(), NOW, hour, 1, vec![]).expect("a token");
    (token, table.to_bytes().to_vec())
});
static CODE: LazyLock<ApprovalCode> = LazyLock::new(|| ApprovalCode::generate().expect("random bytes"));
static NEW: LazyLock<PrivateKey> = LazyLock::new(|| PrivateKey::generate().expect("random bytes"));

fn sides() -> (Channel, Channel) {
    let (mine, theirs) = (*NEW.public(), *WORLD.keys[0].public());
    let exporter = [9; 32];
    (Channel { exporter, mine, theirs }, Channel { exporter, mine: theirs, theirs: mine })
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (token, table) = (&TABLE.0, &TABLE.1);
    let tokens = TokenTable::from_bytes(table).expect("our own table");
    let mut desk = Desk { roster: WORLD.roster.clone(), tokens, approvals: Approvals::default() };
    desk.approvals.approve(CODE.clone(), NOW);
    let (of_joiner, of_authority) = sides();
    match input.byte() % 3 {
        // A rogue authority, to a host with a token and to one that shows a code.
        0 => {
            let (mut joiner, _) = match input.byte() % 2 {
                0 => Joiner::start(token.clone(), of_joiner, host(9)).expect("the pinned authority"),
                _ => Joiner::ask(CODE.clone(), of_joiner, host(9)).expect("another node"),
            };
            while !input.is_empty() {
                let message = input.piece();
                match within(64 * 1024 + 8 * message.len(), || joiner.receive(message)) {
                    // The proof alone, once the mesh is named.
                    Ok(Step::Send(proof)) => assert_eq!(proof.len(), 33),
                    Ok(_) => panic!("a mesh was believed without proof"),
                    Err(_) => {}
                }
            }
        }
        // A stranger who knows which token there is, at most.
        1 => {
            let mut admission = Admission::start(of_authority);
            while !input.is_empty() {
                let message = input.piece();
                let message = replace(message, b"aaaaaaaa", token.id.to_string().as_bytes());
                match within(64 * 1024 + 8 * message.len(), || admission.receive(&message, &mut desk, NOW)) {
                    Ok(Step::Send(challenge)) => assert!(challenge.len() <= MAX_MESSAGE),
                    Ok(_) => panic!("somebody was admitted without proof"),
                    Err(error) => assert!(error.refusal().len() <= MAX_MESSAGE),
                }
            }
            assert_eq!(desk.roster.digest(), WORLD.roster.digest());
        }
        // A man in the middle.
        _ => {
            let (mut joiner, hello) = Joiner::start(token.clone(), of_joiner, host(9)).expect("the pinned authority");
            let mut admission = Admission::start(of_authority);
            let (mut tampered, mut said) = (false, hello);
            for _ in 0..4 {
                let heard = input.edit(&said);
                tampered |= heard != said;
                let before = desk.roster.digest();
                said = match admission.receive(&heard, &mut desk, NOW) {
                    Ok(Step::Send(reply)) => reply,
                    Ok(Step::Finish(reply, admitted)) => {
                        assert!(!tampered, "somebody was admitted over a connection that was tampered with");
                        assert_eq!(admitted.node, NEW.public().node_id());
                        reply
                    }
                    Ok(Step::Done(_)) => panic!("done without an answer"),
                    Err(error) => {
                        assert_eq!(desk.roster.digest(), before, "a refused join changed the roster");
                        error.refusal()
                    }
                };
                let heard = input.edit(&said);
                tampered |= heard != said;
                said = match joiner.receive(&heard) {
                    Ok(Step::Send(reply)) => reply,
                    Ok(Step::Done(joined)) => {
                        assert!(!tampered, "a mesh was believed over a connection that was tampered with");
                        assert!(joined.roster.is_active(NEW.public().node_id()));
                        return;
                    }
                    Ok(Step::Finish(..)) => panic!("a joiner has nothing to save before it sends"),
                    Err(_) => return,
                };
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
