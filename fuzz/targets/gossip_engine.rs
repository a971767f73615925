//! The gossip engine of a member that two others talk to, one of them as the input says: what it keeps, believes and sends is bounded, and
//! nothing is kept that its author did not sign.
#![no_main]

use bytes::{BufMut, Bytes};
use libfuzzer_sys::fuzz_target;
use meshd_agent::gossip::{Gossip, GossipConfig, MAX_PACKET, Output};
use meshd_agent::record::SignedRecord;
use meshd_ca::keys::PrivateKey;
use meshd_fuzz::{Input, NOW, WORLD, host, within};

/// Of one packet: eight megabytes are what one peer may ask for in ten seconds.
const MOST_SENT: usize = 9 << 20;
const MOST_KEPT: usize = 3 * 4096;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let world = &*WORLD;
    let me = world.node(0);
    let mut engine = Gossip::new(GossipConfig::default(), me, world.roster(), 1);
    engine.publish(world.signed(0, 1));
    let (mut timers, mut own) = (Vec::new(), 1);
    let mut steps = 0;
    while !input.is_empty() && steps < 64 {
        steps += 1;
        let what = input.byte();
        let from = world.node(1 + usize::from(what >> 4) % 2);
        match what % 8 {
            0..=3 => {
                let packet = world.named(input.piece());
                let _ = within(4 << 20, || engine.receive(from, &packet));
            }
            4 => {
                let record = world.signed(usize::from(input.byte()) % 3, 1 + input.short() as u64);
                let body = input.edit(record.bytes());
                let _ = engine.receive(from, &bodies(&record, &body));
            }
            5 => timers.drain(..).collect::<Vec<_>>().into_iter().for_each(|t| engine.timer(t)),
            6 => {
                own += u64::from(input.byte());
                engine.publish(world.signed(0, own));
            }
            _ => {
                let mut roster = world.roster.clone();
                let Ok(key) = PrivateKey::generate() else { return };
                let _ = roster.admit(&world.keys[0], key.public(), &host(usize::from(input.byte())), NOW);
                if let Some(entry) = roster.entry(key.public().node_id()) {
                    let mut packet = vec![6, 0, 0];
                    packet.put_slice(&[0; 32]);
                    let bytes = entry.to_bytes();
                    packet.put_u16(bytes.len() as u16);
                    packet.put_slice(&bytes);
                    let _ = engine.receive(from, &input.edit(&packet));
                }
            }
        }
        let mut sent = 0;
        for output in engine.drain() {
            match output {
                Output::Send { to, packet } => {
                    assert!(to != me && engine.roster().is_active(to), "something is sent to a stranger");
                    assert!(packet.len() <= MAX_PACKET);
                    sent += packet.len();
                }
                Output::After { timer, .. } => {
                    timers.push(timer);
                    assert!(timers.len() <= 4096, "timers without end");
                }
                Output::Roster(entry) => assert!(engine.roster().member(entry.member().node()).is_some()),
                _ => {}
            }
        }
        assert!(sent <= MOST_SENT, "{sent} bytes for one packet");
        assert!(engine.backlog() <= MOST_KEPT);
    }
    for record in engine.catalog().records() {
        assert_eq!(SignedRecord::parse(record.bytes(), engine.roster()).as_ref(), Ok(&**record));
    }
    assert!(engine.up().iter().all(|n| engine.roster().is_active(*n)));
});

/// A message that hands a record over.
fn bodies(record: &SignedRecord, body: &[u8]) -> Bytes {
    let mut packet = vec![6, 0, 1];
    packet.put_slice(record.record().node.as_bytes());
    packet.put_u64(record.version().sequence);
    packet.put_u64(record.version().tag);
    packet.put_u16(u16::try_from(body.len()).unwrap_or(u16::MAX));
    packet.put_slice(body);
    packet.into()
}
