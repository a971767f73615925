//! Tunnels that are used again, against a list of those that may be: streams with random ends, in tunnels out of the pool and new ones;
//! peers that go away or close, certificates that are renewed, time that passes. Every stream is carried as it should be, and who is taken
//! is who the list says.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, atomic::Ordering};
use std::task::{Context, Waker};
use std::time::Duration;
use std::{io, pin::pin};

use meshd_ca::identity::{NodeId, Workload};
use meshd_ca::time::UnixTime;
use tokio::time::Instant;

use super::super::{Dice, End, Script, Seen, header, judge};
use super::{DRY, Sim, connected, every_seed, made, roomy, run, stream};
use crate::proxy::Fault;
use crate::proxy::edges::{self, Direction, Edges};
use crate::proxy::header::Refusal;
use crate::proxy::pool::{Key, Pool, Resting};
use crate::proxy::tunnel::{Role, Said, Tunnel, Version, dry};

/// The dialler's end, by its number.
struct Kept {
    number: usize,
    tunnel: Box<Tunnel<Sim>>,
}

impl Resting for Kept {
    fn is_quiet(&self) -> bool {
        self.tunnel.is_quiet()
    }
    fn watch(&self) -> io::Result<()> {
        Ok(())
    }
    fn ready(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }
}

/// One in the list.
struct Rest {
    number: usize,
    key: usize,
    svid: usize,
    since: Duration,
}

const KEYS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(60);

fn key(number: usize) -> Key {
    let node = NodeId::from_bytes([number as u8; 16]);
    Key { client: [10, 0, 0, 1].into(), node, port: 6374, service: ([10, 0, 0, 2], 80).into(), source: Workload::Node(node) }
}

/// A tunnel between two ends that have just shaken hands.
fn fresh(seed: u64, dice: &mut Dice, steps: &Arc<AtomicU64>) -> (Box<Tunnel<Sim>>, Box<Tunnel<Sim>>) {
    let ((a, b), keys) = (connected(dice, 0, steps), made(dice));
    roomy(seed, &a.link);
    let mut ends = (Tunnel::made(a, Version::Two, keys), Tunnel::made(b, Version::Two, keys.other()));
    if dice.roll(3) == 0 {
        ends.0.renew_after(1 + dice.roll(10) as u64);
        ends.1.renew_after(1 + dice.roll(10) as u64);
    }
    ends
}

/// Lets it do what it can now, and no more.
fn begin(work: impl Future) {
    let mut work = pin!(work);
    for _ in 0..50 {
        if work.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
            return;
        }
    }
}

/// A stream in a tunnel that its peer closes in the same moment: it is said again in another one, and delivered once.
fn crossed(
    (what, steps, seed): (&dyn Fn() -> String, &Arc<AtomicU64>, u64),
    dice: &mut Dice,
    (mut dialler, mut dialled): (Box<Tunnel<Sim>>, Box<Tunnel<Sim>>),
    (client, service): (&Script, &Script),
) -> Seen<Sim> {
    let edges = Edges::default();
    let key =
        edges::Key { direction: Direction::Outbound, source: None, destination: None, address: [10, 0, 0, 1].into(), port: 1 };
    let edge = edges.open(key, NodeId::from_bytes([1; 16]), UnixTime(0));
    let bytes = client.bytes.len() + service.bytes.len();
    let ((app, captured), (served, delivered)) = (connected(dice, bytes, steps), connected(dice, bytes, steps));
    for end in [&captured, &delivered] {
        end.resets.store(true, Ordering::Relaxed);
    }
    let (mut again, answer) = fresh(seed, dice, steps);
    let dial = async {
        let mut said = Said::kept();
        let first = dialler.carry(&captured, Role::Dialler(header()), &mut said, edge.meter()).await;
        drop(dialler);
        // As the proxy does it: only upon the peer's own word, and with everything that the application said.
        let Err(Fault::Refused(Refusal::Draining)) = first else { return first.map(|()| again) };
        assert!(said.is_whole(), "{}: more was taken than is kept", what());
        said.let_go();
        again.carry(&captured, Role::Dialler(header()), &mut said, edge.meter()).await?;
        captured.resets.store(false, Ordering::Relaxed);
        Ok(again)
    };
    let close = async {
        let _ = dialled.close().await;
        drop(dialled);
    };
    let answering = async {
        let mut end = End::Ours(answer);
        end.carry(delivered, Role::Dialled).await.map(|()| end)
    };
    let all = async { tokio::join!(client.act(app), service.act(served), dial, answering, close) };
    let (client, service, dialler, dialled, ()) = run(what, steps, all, || panic!("{} hangs", what()));
    Seen { client, service, dialler: dialler.map(End::Ours), dialled }
}

/// Returns how often a tunnel was used again.
fn schedule(seed: u64) -> u64 {
    dry(DRY[seed as usize / 2 % DRY.len()], seed);
    let mut dice = Dice::new(seed ^ 0x706f_6f6c);
    let steps = Arc::new(AtomicU64::new(0));
    let room = 1 + dice.roll(6);
    let pool = Pool::<Kept, usize>::new(PATIENCE, PATIENCE, room);
    let (start, mut now) = (Instant::now(), Duration::ZERO);
    let keys: [Key; KEYS] = std::array::from_fn(key);
    let mut svids: [Arc<usize>; KEYS] = std::array::from_fn(|_| Arc::new(0));
    // The list, and the other ends of all tunnels that are up.
    let mut rests: Vec<Rest> = Vec::new();
    let mut others: BTreeMap<usize, Box<Tunnel<Sim>>> = BTreeMap::new();
    let mut held: Vec<(Kept, usize, Arc<usize>, bool)> = Vec::new();
    for number in 0..8 + dice.roll(25) {
        let which = dice.roll(KEYS);
        let what = || format!("seed {seed}, step {number}");
        match dice.roll(12) {
            0..=3 => {
                let mut expected = None;
                while let Some(last) = rests.iter().rposition(|r| r.key == which) {
                    let rest = rests.remove(last);
                    if rest.svid == *svids[which] && now - rest.since < PATIENCE && others.contains_key(&rest.number) {
                        expected = Some(rest.number);
                        break;
                    }
                    others.remove(&rest.number);
                }
                let taken = pool.take(&keys[which], &svids[which], start + now).tunnel;
                assert_eq!(taken.as_ref().map(|t| t.number), expected, "{}: taken", what());
                let used = taken.is_some();
                let tunnel = taken.unwrap_or_else(|| {
                    let (dialler, dialled) = fresh(seed, &mut dice, &steps);
                    others.insert(number, dialled);
                    Kept { number, tunnel: dialler }
                });
                held.push((tunnel, which, svids[which].clone(), used));
            }
            4..=8 if !held.is_empty() => {
                let (Kept { number, tunnel }, which, svid, used) = held.swap_remove(dice.roll(held.len()));
                let Some(other) = others.remove(&number) else { continue };
                let (mut client, mut service) = (Script::short(&mut dice), Script::short(&mut dice));
                let seen = if used && dice.roll(4) == 0 {
                    (client.resets, service.resets) = (None, None);
                    // What fits one record is kept.
                    client.cut(8_000);
                    crossed((&what, &steps, seed), &mut dice, (tunnel, other), (&client, &service))
                } else {
                    let (dialler, dialled) = (async { Ok(End::Ours(tunnel)) }, async { Ok(End::Ours(other)) });
                    let whole = stream(&mut dice, &steps, (&client, &service), dialler, dialled);
                    run(&what, &steps, whole, || panic!("{} hangs: {client:?}; {service:?}", what()))
                };
                judge(&what(), &client, &service, &seen);
                // Both ends believe the same, as judged: so both keep theirs, or neither.
                if let (Ok(End::Ours(tunnel)), Ok(End::Ours(other))) = (seen.dialler, seen.dialled) {
                    if rests.len() < room {
                        rests.push(Rest { number, key: which, svid: *svid, since: now });
                        others.insert(number, other);
                    }
                    pool.give(keys[which].clone(), Kept { number, tunnel }, svid, start + now);
                }
            }
            9 if !rests.is_empty() => {
                // The other end goes, or closes with a word.
                let chosen = rests[dice.roll(rests.len())].number;
                if let Some(mut other) = others.remove(&chosen)
                    && dice.roll(2) == 0
                {
                    begin(other.close());
                }
            }
            10 => now += Duration::from_secs(dice.roll(40) as u64),
            11 if dice.roll(2) == 0 => svids[which] = Arc::new(*svids[which] + 1),
            _ => {
                pool.sweep(start + now);
                rests.retain(|r| {
                    let stays = now - r.since < PATIENCE && others.contains_key(&r.number);
                    if !stays {
                        others.remove(&r.number);
                    }
                    stays
                });
            }
        }
        assert_eq!(pool.count(), rests.len(), "{}", what());
    }
    pool.reused()
}

#[test]
fn a_tunnel_is_used_again_where_the_list_says_so_and_carries_what_it_should() {
    let reused = every_seed(400, schedule);
    println!("{reused} used again");
    assert!(reused > 0);
}
