//! What one malicious member can and cannot do. It holds a valid key and speaks to everybody; packets are built here by hand, from
//! the description of the format, not by the code under test.
//!
//! A failing seed is printed; `FLEET_SEED=<seed>` runs that one alone.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sim;

use std::sync::Arc;
use std::time::Duration;

use data_encoding::BASE64URL_NOPAD;
use meshd_agent::gossip::{MAX_PACKET, Refused};
use meshd_agent::record::{Listener, MAX_RECORD, MAX_SEQUENCE, NodeRecord, SignedRecord, Version};
use meshd_ca::identity::{NodeId, Workload};
use meshd_ca::keys::{PrivateKey, sha256};
use meshd_ca::roster::Entry;
use meshd_ca::signed::Signed;
use rand::RngExt;
use sim::{Fleet, for_seeds};

const fn s(n: u64) -> Duration {
    Duration::from_secs(n)
}
const STEP: Duration = Duration::from_millis(250);
/// The number of the malicious member, and of the one it is after.
const M: usize = 5;
const V: usize = 9;
const N: usize = 20;

fn item(table: u8, key: [u8; 16], version: Version) -> Vec<u8> {
    [&[table][..], &key, &version.sequence.to_be_bytes(), &version.tag.to_be_bytes()].concat()
}

fn record_item(node: NodeId, version: Version) -> Vec<u8> {
    item(1, *node.as_bytes(), version)
}

fn offer(items: &[Vec<u8>]) -> Vec<u8> {
    [&[4][..], &items.concat()].concat()
}

fn body(item: &[u8], bytes: &[u8]) -> Vec<u8> {
    [&[6, 0][..], item, &(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

fn signed_record(key: &PrivateKey, payload: Vec<u8>) -> Vec<u8> {
    let signed = Signed::new(key, "record", payload).unwrap();
    [&signed.signature.as_bytes()[..], &signed.payload].concat()
}

/// The version these bytes have, or would have if their sequence were this.
fn version(bytes: &[u8], sequence: u64) -> Version {
    Version { sequence, tag: u64::from_be_bytes(sha256(&[bytes])[..8].try_into().unwrap()) }
}

fn life(node: NodeId, generation: u64, renewal: u16) -> Vec<u8> {
    [&node.as_bytes()[..], &generation.to_be_bytes(), &renewal.to_be_bytes()].concat()
}

/// A SWIM packet: `kind` 6 announces, 8 gossips.
fn swim(src: &[u8], dst: &[u8], kind: u8, members: &[Vec<u8>], news: &[Vec<u8>]) -> Vec<u8> {
    let mut out = [&[0][..], src, &[0, 0], dst, &[kind]].concat();
    if kind != 6 {
        out.extend((members.len() as u16).to_be_bytes());
        out.extend(members.concat());
        for n in news {
            out.extend((n.len() as u16).to_be_bytes());
            out.extend(n);
        }
    }
    out
}

const ALIVE: u8 = 0;
const DOWN: u8 = 2;

fn member(life: Vec<u8>, incarnation: u16, state: u8) -> Vec<u8> {
    [&life[..], &incarnation.to_be_bytes(), &[state]].concat()
}

/// A fleet at rest in which node M is a puppet that everybody has met, and what each other node's life is.
fn fleet(seed: u64) -> (Fleet, Vec<Vec<u8>>) {
    let mut f = Fleet::running(N, seed, s(2));
    f.until(s(60), STEP, Fleet::converged);
    f.run(s(5));
    f.crash(M, false);
    f.puppets.insert(M, Vec::new());
    let me = life(f.nodes[M].id, 1, 0);
    for i in (0..N).filter(|i| *i != M) {
        let hello = swim(&me, &life(f.nodes[i].id, 0, 0), 6, &[], &[]);
        assert!(f.inject(M, i, &hello));
    }
    f.run(s(1));
    let mut lives = vec![Vec::new(); N];
    for (from, packet) in f.puppets[&M].iter().filter(|(_, p)| p[0] == 0) {
        lives[*from] = packet[1..27].to_vec();
    }
    assert!(lives.iter().enumerate().all(|(i, l)| i == M || l.len() == 26), "everybody answered");
    (f, lives)
}

/// Sends to all others; how many took it.
fn to_all(f: &mut Fleet, packet: &[u8]) -> usize {
    (0..N).filter(|i| *i != M).filter(|i| f.inject(M, *i, packet)).count()
}

/// What everybody believes of everybody but M.
fn beliefs(f: &Fleet) -> Vec<Vec<(NodeId, Version)>> {
    let m = f.nodes[M].id;
    let of = |g: &meshd_agent::gossip::Gossip| {
        g.catalog().records().map(|r| (r.record().node, r.version())).filter(|(n, _)| *n != m).collect()
    };
    f.alive().map(|(_, g)| of(g)).collect()
}

/// Everybody but M agrees about everything but M.
fn at_peace(f: &Fleet) -> bool {
    let others: Vec<NodeId> = (0..N).filter(|i| *i != M).map(|i| f.nodes[i].id).collect();
    f.alive().all(|(i, g)| others.iter().all(|n| *n == f.nodes[i].id || g.up().contains(n)))
        && f.records_agree()
        && f.rosters_agree()
}

#[test]
fn forged_and_replayed_records_change_nothing() {
    for_seeds(5, |seed| {
        let (mut f, _) = fleet(seed);
        let (m, v) = (f.nodes[M].id, f.nodes[V].id);
        let old = f.nodes[0].gossip.as_ref().unwrap().record(v).unwrap().bytes().clone();
        f.change(V);
        f.run(s(5));
        let before = beliefs(&f);
        let high = f.nodes[V].sequence + 10;
        let record = f.record_of(V, high);

        let forged = signed_record(&f.nodes[M].key, serde_json::to_vec(&record).unwrap());
        let absurd = serde_json::to_string(&record)
            .unwrap()
            .replace(&format!("\"sequence\":{high}"), &format!("\"sequence\":{}", u64::MAX));
        assert!(absurd.contains("18446744073709551615"));
        let absurd = signed_record(&f.nodes[M].key, absurd.into_bytes());
        // Its own record, with somebody else's workload, and one that is too long.
        let theft = Listener { port: 443, ip: None, workload: Workload::Host(f.nodes[V].name.clone()) };
        let theft = NodeRecord { listeners: vec![theft], ..f.record_of(M, 50) };
        let theft = signed_record(&f.nodes[M].key, serde_json::to_vec(&theft).unwrap());
        let long = signed_record(&f.nodes[M].key, vec![b' '; MAX_RECORD]);
        let mut damaged = old.to_vec();
        damaged[100] ^= 1;
        let attacks = [
            (v, version(&forged, high), forged.clone()),
            (m, version(&forged, high), forged),
            (v, version(&absurd, u64::MAX), absurd.clone()),
            (v, version(&absurd, MAX_SEQUENCE), absurd),
            (v, version(&old, 1), old.to_vec()),
            (v, version(&old, high), old.to_vec()),
            (v, version(&damaged, high), damaged),
            (m, version(&theft, 50), theft),
            (m, version(&long, 50), long),
        ];
        for (node, version, bytes) in &attacks {
            to_all(&mut f, &body(&record_item(*node, *version), bytes));
            f.run(s(11)); // so that it is listened to again
        }
        assert_eq!(beliefs(&f), before);
        assert!(f.alive().all(|(_, g)| g.record(m).is_none_or(|r| r.record().listeners.len() == 2)));
        assert!(f.known_everywhere(V), "still what it says itself");
    });
}

#[test]
fn an_absurd_sequence_of_its_own_harms_itself_only() {
    for_seeds(3, |seed| {
        let (mut f, _) = fleet(seed);
        let before = beliefs(&f);
        let last = f.record_of(M, MAX_SEQUENCE);
        let last = SignedRecord::sign(&f.nodes[M].key, last).unwrap();
        let packet = body(&record_item(f.nodes[M].id, last.version()), last.bytes());
        to_all(&mut f, &packet);
        f.run(s(70));
        let m = f.nodes[M].id;
        assert!(f.alive().all(|(_, g)| g.record(m).unwrap().version().sequence == MAX_SEQUENCE), "it was believed");
        assert_eq!(beliefs(&f), before);
        f.change(V);
        f.until(s(5), STEP, |f| f.known_everywhere(V));
        f.until(s(60), STEP, |f| f.alive().all(|(_, g)| g.up().len() >= N - 2));
    });
}

#[test]
fn offers_that_are_never_honoured_delay_nobody_and_pile_up_nowhere() {
    for_seeds(3, |seed| {
        let (mut f, _) = fleet(seed);
        let mut worst = 0;
        for round in 0..60u64 {
            // Every node, absurd sequences and plausible ones; roster entries that do not exist.
            let mut items = Vec::new();
            for n in 0..N {
                for k in 0..25u64 {
                    let sequence =
                        [u64::MAX, MAX_SEQUENCE, f.nodes[n].sequence + 1][k as usize % 3].wrapping_sub(k / 3 * (k % 2));
                    items.push(record_item(f.nodes[n].id, Version { sequence, tag: round * 100 + k }));
                }
            }
            for k in 0..500u64 {
                items.push(item(
                    0,
                    sha256(&[&round.to_be_bytes(), &k.to_be_bytes()])[..16].try_into().unwrap(),
                    Version::default(),
                ));
            }
            for part in items.chunks(1000) {
                to_all(&mut f, &offer(part));
            }
            if round % 10 == 3 {
                f.run(s(2));
                f.change(V);
                // It is the first to claim that it has the new record, and gives it to nobody: others are asked in the end.
                let v = f.nodes[V].id;
                let new = f.nodes[V].gossip.as_ref().unwrap().record(v).unwrap().version();
                assert_eq!(new.sequence, f.nodes[V].sequence);
                to_all(&mut f, &offer(&[record_item(v, new)]));
                let took = f.until(s(10), STEP, |f| f.known_everywhere(V));
                assert!(took <= s(4), "a change took {took:?}");
            }
            f.run(Duration::from_millis(500));
            worst = worst.max(f.alive().map(|(_, g)| g.backlog()).max().unwrap());
        }
        assert!(worst <= 5_000, "{worst} items waiting");
        f.run(s(3 * 60));
        f.until(s(60), STEP, at_peace);
    });
}

#[test]
fn made_up_words_about_lives_are_outlived() {
    for_seeds(5, |seed| {
        let (mut f, lives) = fleet(seed);
        let me = life(f.nodes[M].id, 1, 0);
        let v = f.nodes[V].id;
        let generation = u64::from_be_bytes(lives[V][16..24].try_into().unwrap());
        let ports: Vec<u16> = f.nodes.iter().map(|n| n.port).collect();
        for (generation, renewal, incarnation, state) in [
            (generation, 0, 0, DOWN),
            (generation, u16::MAX, 0, DOWN),
            (generation + 1, 0, 0, DOWN),
            (MAX_SEQUENCE, u16::MAX, u16::MAX, DOWN),
            (u64::MAX, u16::MAX, u16::MAX, ALIVE),
            (generation, 40_000, u16::MAX, ALIVE),
        ] {
            let word = member(life(v, generation, renewal), incarnation, state);
            for i in (0..N).filter(|i| *i != M) {
                // The victim hears of it last, by itself.
                if i != V {
                    f.inject(M, i, &swim(&me, &lives[i], 8, std::slice::from_ref(&word), &[]));
                }
            }
            let took = f.until(s(30), STEP, |f| f.alive().all(|(i, g)| i == V || g.up().contains(&v)) && f.records_agree());
            assert!(took <= s(15), "it took {took:?} to be believed alive");
            f.run(s(15));
        }
        let fooled = f.nodes.iter().filter(|n| n.downs.iter().any(|(_, d)| *d == v)).count();
        assert!(fooled > N / 2, "hearsay was heard: by {fooled}");
        assert_eq!(ports, f.nodes.iter().map(|n| n.port).collect::<Vec<_>>());
        assert!(f.nodes[V].outruns <= 6, "{} new records", f.nodes[V].outruns);
        // It still can go down and be noticed.
        f.crash(V, false);
        f.until(s(40), STEP, |f| f.alive().all(|(_, g)| !g.up().contains(&v)));
    });
}

#[test]
fn strangers_and_who_was_banished_are_no_members_whatever_is_said() {
    for_seeds(3, |seed| {
        let (mut f, lives) = fleet(seed);
        let me = life(f.nodes[M].id, 1, 0);
        let stranger = PrivateKey::generate().unwrap().public().node_id();
        let v = f.nodes[V].id;
        let mut roster = meshd_ca::roster::Roster::clone(&f.nodes[0].roster);
        let entry = roster.banish(&f.nodes[0].key, v).unwrap().remove(0);
        f.nodes[0].roster = Arc::new(roster);
        f.with(0, |g| g.offer(&entry));
        f.run(s(5));
        f.crash(V, false);
        let words: Vec<Vec<u8>> = [stranger, v]
            .iter()
            .flat_map(|n| (0..20u64).map(|g| member(life(*n, g, g as u16), 0, ALIVE)).collect::<Vec<_>>())
            .collect();
        for (i, life) in lives.iter().enumerate().filter(|(i, _)| *i != M) {
            f.inject(M, i, &swim(&me, life, 8, &words, &[]));
        }
        f.run(s(20));
        assert!(f.alive().all(|(_, g)| !g.up().contains(&v) && !g.up().contains(&stranger) && !g.roster().is_active(v)));
        let packet = swim(&life(v, 9, 9), &lives[0], 8, &[], &[]);
        assert_eq!(f.with(0, |g| g.receive(v, &packet)), Some(Err(Refused::Stranger(v))));
        assert_eq!(f.with(0, |g| g.receive(stranger, &packet)), Some(Err(Refused::Stranger(stranger))));
        // In another's name.
        let packet = swim(&lives[1], &lives[0], 8, &[], &[]);
        let m = f.nodes[M].id;
        assert_eq!(f.with(0, |g| g.receive(m, &packet)), Some(Err(Refused::Malformed)));
    });
}

#[test]
fn a_plain_member_cannot_change_the_roster() {
    for_seeds(2, |seed| {
        let (mut f, lives) = fleet(seed);
        let me = life(f.nodes[M].id, 1, 0);
        let before = f.nodes[0].gossip.as_ref().unwrap().roster().digest();
        let entry = f.nodes[0].roster.entry(f.nodes[V].id).unwrap().to_bytes();
        let signed: Signed = serde_json::from_slice(&entry).unwrap();
        let mut genuine = 0;
        for round in 0..100u64 {
            let mut payload: serde_json::Value = serde_json::from_slice(&signed.payload).unwrap();
            payload["standing"] = ["banished", "left", "active"][round as usize % 3].into();
            payload["version"] = [2 + round, u64::MAX][round as usize % 2].into();
            payload["signer"] = BASE64URL_NOPAD.encode(f.nodes[M].key.public().point()).into();
            let forged = Signed::new(&f.nodes[M].key, "roster", serde_json::to_vec(&payload).unwrap()).unwrap();
            let forged = serde_json::to_vec(&forged).unwrap();
            genuine += usize::from(Entry::from_bytes(&forged).is_ok());
            let news = [&[0][..], &forged].concat();
            for (i, life) in lives.iter().enumerate().filter(|(i, _)| *i != M) {
                f.inject(M, i, &swim(&me, life, 8, &[], std::slice::from_ref(&news)));
            }
            f.run(Duration::from_millis(700));
        }
        assert_eq!(genuine, 100, "they are well-formed: only the signer has no say");
        assert!(f.alive().all(|(_, g)| g.roster().digest() == before));
        f.until(s(60), STEP, at_peace);
    });
}

#[test]
fn garbage_is_refused_and_its_sender_silenced_for_a_while() {
    for_seeds(3, |seed| {
        let (mut f, lives) = fleet(seed);
        let before = beliefs(&f);
        let m = f.nodes[M].id;
        assert_eq!(f.with(0, |g| g.receive(m, &vec![0; MAX_PACKET + 1])), Some(Err(Refused::Malformed)));
        assert_eq!(f.with(0, |g| g.receive(m, &[])), Some(Err(Refused::Malformed)));
        (0..30).for_each(|_| _ = f.inject(M, 0, &[99]));
        assert_eq!(f.with(0, |g| g.receive(m, &offer(&[]))), Some(Err(Refused::Muted(m))));
        f.run(s(15));
        for _ in 0..3_000 {
            let len = f.rng.random_range(0..200);
            let mut packet: Vec<u8> = (0..len).map(|_| f.rng.random()).collect();
            // Half of them look right at first.
            if len > 0 && f.rng.random_range(0..2) == 0 {
                packet[0] = f.rng.random_range(0..7);
                packet = [swim(&life(m, 1, 0), &lives[0], f.rng.random_range(0..11), &[], &[]), packet].concat();
            }
            f.inject(M, 0, &packet);
        }
        assert_eq!(f.with(0, |g| g.receive(m, &offer(&[]))), Some(Err(Refused::Muted(m))));
        f.run(s(15));
        assert_eq!(f.with(0, |g| g.receive(m, &offer(&[]))), Some(Ok(())));
        assert_eq!(beliefs(&f), before);
        f.until(s(60), STEP, at_peace);
    });
}

#[test]
fn what_a_member_can_make_others_send_is_bounded() {
    for_seeds(2, |seed| {
        let (mut f, lives) = fleet(seed);
        // It asks for everything, over and over.
        let keys: Vec<u8> = (0..N).flat_map(|i| [&[1][..], f.nodes[i].id.as_bytes()].concat()).collect();
        let want = [&[5][..], &keys].concat();
        f.reset_traffic();
        for _ in 0..20_000 {
            f.inject(M, 0, &want);
        }
        let given = f.nodes[0].traffic.sent_bytes;
        assert!(given <= (8 << 20) + (1 << 20), "{given} bytes given");
        // It changes its own record a hundred times a second: others pass on what one honest node might say.
        f.run(s(20));
        f.reset_traffic();
        for k in 0..2_000u64 {
            let record = SignedRecord::sign(&f.nodes[M].key, f.record_of(M, 1_000 + k)).unwrap();
            let item = record_item(f.nodes[M].id, record.version());
            to_all(&mut f, &body(&item, record.bytes()));
            f.run(Duration::from_millis(10));
        }
        let most = f.nodes.iter().enumerate().filter(|(i, _)| *i != M).map(|(_, n)| n.traffic.sent).max().unwrap();
        assert!(most <= 20 * 60, "a node sent {most} packets in 20 s");
        // It tells one that it is down, as fast as it can. 10 is that word, with nothing behind it.
        f.run(s(20));
        f.reset_traffic();
        let (me, v) = (life(f.nodes[M].id, 1, 0), f.nodes[V].id);
        f.puppets.insert(M, Vec::new());
        for _ in 0..2_000 {
            let last = f.puppets[&M].iter().rev().find(|(from, p)| *from == V && p[0] == 0).map(|(_, p)| p[1..27].to_vec());
            let now = last.unwrap_or_else(|| lives[V].clone());
            f.inject(M, V, &[&[0][..], &me, &[0, 0], &now, &[10]].concat());
            f.inject(M, V, &swim(&me, &now, 8, &vec![member(now.clone(), 0, DOWN); 100], &[]));
            f.run(Duration::from_millis(10));
        }
        let most = f.nodes.iter().enumerate().filter(|(i, _)| *i != M).map(|(_, n)| n.traffic.sent).max().unwrap();
        assert!(most <= 120, "a node sent {most} packets in 20 s, and 30 without this");
        f.until(s(60), STEP, |f| f.alive().all(|(i, g)| i == V || g.up().contains(&v)));
    });
}
