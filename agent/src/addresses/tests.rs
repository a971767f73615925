//! The rules one by one, then random sequences of events against what must always hold.

use proptest::prelude::*;

use super::*;

const SECOND: Millis = 1000;

fn node(n: u8) -> NodeId {
    NodeId::from_bytes([n; 16])
}

fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

fn claimant(n: u8, sequence: u64, ips: &[&str]) -> Claimant {
    let addresses = ips.iter().map(|s| Claimed { ip: ip(s), shared: false }).collect();
    Claimant { node: node(n), sequence, port: 6374, strict: false, presence: Presence::Running, addresses }
}

fn strict(mut c: Claimant) -> Claimant {
    c.strict = true;
    c
}

fn shared(mut c: Claimant) -> Claimant {
    c.addresses.iter_mut().for_each(|a| a.shared = true);
    c
}

fn present(mut c: Claimant, presence: Presence) -> Claimant {
    c.presence = presence;
    c
}

const X: &str = "10.0.0.7";

/// A bench around [`Bindings`] whose network is a function.
struct Bench {
    b: Bindings,
    now: Millis,
}

impl Bench {
    fn new(claimants: &[Claimant]) -> Self {
        let mut b = Self { b: Bindings::new(node(99), []), now: 1_000_000 };
        b.update(claimants);
        b
    }
    fn update(&mut self, claimants: &[Claimant]) {
        self.b.update(claimants, &Own::default(), self.now);
    }
    /// Answers every probe with `n`.
    fn proved(&mut self, n: u8) {
        self.b.proved(ip(X), 6374, node(n), self.now);
    }
    fn owner(&self) -> Option<u8> {
        self.b.captured().get(&ip(X)).map(|b| b.node.as_bytes()[0])
    }
    /// Lets time pass; every dial meets `answer`.
    fn run(&mut self, time: Millis, answer: impl Fn(Millis) -> Result<u8, Failure>) {
        let end = self.now + time;
        while let Some(at) = self.b.next_due().filter(|&at| at <= end) {
            self.now = self.now.max(at);
            for p in self.b.due(self.now) {
                match answer(self.now) {
                    Ok(n) => self.b.proved(p.ip, p.port, node(n), self.now),
                    Err(why) => self.b.failed(p.ip, p.port, why, self.now),
                }
            }
        }
        self.now = end;
        self.b.due(end);
    }
    fn silent(&mut self, time: Millis) {
        self.run(time, |_| Err(Failure::Silence));
    }
}

#[test]
fn a_claim_alone_and_a_proof_alone_capture_nothing() {
    let mut t = Bench::new(&[claimant(1, 1, &[X]), claimant(2, 1, &["10.0.0.8"])]);
    assert!(t.b.captured().is_empty());
    t.proved(2); // answers at X, claims something else
    assert_eq!(t.owner(), None);
    t.b.proved(ip(X), 6375, node(1), t.now); // another port than it claims
    assert_eq!(t.owner(), None);
    let v = t.b.version();
    t.proved(1);
    assert_eq!(t.b.captured().get(&ip(X)), Some(&Bound { node: node(1), port: 6374 }));
    assert_eq!(t.b.version(), v + 1);
    t.proved(1);
    assert_eq!(t.b.version(), v + 1);
}

#[test]
fn one_that_is_heard_again_after_a_long_time_is_looked_for_at_once() {
    let mut t = Bench::new(&[claimant(1, 1, &[X])]);
    t.proved(1);
    t.b.heard(node(1), true, t.now);
    t.b.heard(node(1), false, t.now);
    t.silent(3600 * SECOND);
    assert_eq!(t.owner(), None);
    // Its addresses work a moment later than its word comes.
    t.b.heard(node(1), true, t.now);
    let up = t.now + 2 * SECOND;
    t.run(5 * SECOND, |now| if now < up { Err(Failure::Silence) } else { Ok(1) });
    assert_eq!(t.owner(), Some(1));
}

#[test]
fn another_key_of_the_same_host_has_its_addresses_without_a_moment_in_between() {
    for strict_one in [false, true] {
        let of =
            |n, sequence, ips: &[&str]| if strict_one { strict(claimant(n, sequence, ips)) } else { claimant(n, sequence, ips) };
        let mut t = Bench::new(&[of(1, 5, &[X])]);
        t.proved(1);
        let version = t.b.version();
        // Whoever answers is known by its new key before its record is.
        t.proved(2);
        assert_eq!(t.owner(), Some(1));
        t.b.replaced(node(1), node(2));
        t.update(&[of(2, 1, &[X])]);
        assert_eq!((t.owner(), t.b.version()), (Some(2), version + 1));
        assert_eq!(t.b.remember(), [(ip(X), node(2))]);
        t.run(60 * SECOND, |_| Ok(2));
        assert_eq!((t.owner(), t.b.warnings().len()), (Some(2), 0));
    }
    // What it does not claim under that key it has not.
    let mut t = Bench::new(&[claimant(1, 5, &[X])]);
    t.proved(1);
    t.b.replaced(node(1), node(2));
    t.update(&[claimant(2, 1, &["10.0.0.8"])]);
    assert_eq!(t.owner(), None);
    // Remembered of an earlier run.
    let mut b = Bindings::new(node(99), [(ip(X), node(1))]);
    b.replaced(node(1), node(2));
    b.update(&[strict(claimant(2, 1, &[X]))], &Own::default(), 1_000_000);
    assert_eq!(b.captured().get(&ip(X)).map(|b| b.node), Some(node(2)));
}

#[test]
fn kinds_of_addresses_that_never_enter() {
    for no in [
        "127.0.0.1",
        "127.9.9.9",
        "169.254.1.1",
        "224.0.0.251",
        "255.255.255.255",
        "0.0.0.0",
        "0.1.2.3",
        "240.0.0.1",
        "::",
        "::1",
        "fe80::1",
        "ff02::fb",
        "::ffff:10.0.0.1",
    ] {
        let mut t = Bench::new(&[claimant(1, 1, &[no])]);
        assert!(t.b.due(t.now).is_empty(), "{no} is not even dialled");
        t.b.proved(ip(no), 6374, node(1), t.now);
        assert!(t.b.captured().is_empty(), "{no}");
    }
    for yes in ["10.0.0.1", "192.168.1.1", "100.64.0.1", "8.8.8.8", "fd00::1", "2001:db8::1"] {
        assert!(is_capturable(ip(yes)), "{yes}");
    }
}

#[test]
fn own_addresses_leave_and_stay_out() {
    let mut t = Bench::new(&[claimant(1, 1, &[X])]);
    t.proved(1);
    assert_eq!(t.owner(), Some(1));
    let own = Own { addresses: BTreeSet::from([ip(X)]), strict: false };
    t.b.update(&[claimant(1, 1, &[X])], &own, t.now);
    assert_eq!(t.owner(), None);
    t.proved(1);
    assert_eq!(t.owner(), None);
    // When it is no longer ours it takes a new proof.
    t.update(&[claimant(1, 1, &[X])]);
    assert_eq!(t.owner(), None);
}

#[test]
fn our_own_claims_are_none() {
    let mut t = Bench::new(&[claimant(99, 1, &[X])]);
    t.proved(99);
    assert_eq!(t.owner(), None);
    assert!(t.b.due(t.now).is_empty());
}

#[test]
fn ourselves_at_the_other_end_keeps_an_address_out_but_frees_none() {
    let mut t = Bench::new(&[strict(claimant(1, 1, &[X]))]);
    t.run(200 * SECOND, |_| Ok(99));
    assert_eq!(t.owner(), None);
    t.proved(1);
    t.run(3600 * SECOND, |_| Ok(99));
    assert_eq!(t.owner(), Some(1), "reflecting our probe to ourselves must not downgrade a strict peer");
    assert_eq!(t.b.warnings()[0].found, Found::Ourselves);
}

#[test]
fn signed_words_free_at_once() {
    let ways: [&[Claimant]; 3] =
        [&[], &[claimant(1, 2, &["10.0.0.9"])], &[present(strict(claimant(1, 2, &[X])), Presence::Stopped)]];
    for way in ways {
        let mut t = Bench::new(&[strict(claimant(1, 1, &[X]))]);
        t.proved(1);
        t.update(way);
        assert_eq!(t.owner(), None, "{way:?}");
        assert!(t.b.warnings().is_empty());
        t.proved(1);
        assert_eq!(t.owner(), None, "{way:?}");
    }
}

#[test]
fn an_older_record_changes_nothing() {
    let mut t = Bench::new(&[claimant(1, 5, &[X])]);
    t.proved(1);
    t.update(&[claimant(1, 4, &[])]);
    assert_eq!(t.owner(), Some(1));
    t.update(&[claimant(1, 6, &[])]);
    assert_eq!(t.owner(), None);
}

#[test]
fn a_changed_port_is_followed() {
    let mut t = Bench::new(&[claimant(1, 1, &[X])]);
    t.proved(1);
    let mut moved = claimant(1, 2, &[X]);
    moved.port = 7000;
    t.update(&[moved]);
    assert_eq!(t.b.captured().get(&ip(X)), Some(&Bound { node: node(1), port: 7000 }));
    assert_eq!(t.b.due(t.now), [Probe { ip: ip(X), port: 7000, expect: node(1) }]);
}

#[test]
fn contested_stays_with_the_first_and_moves_when_it_is_dropped() {
    let (a, b) = (claimant(1, 1, &[X]), claimant(2, 1, &[X]));
    let mut t = Bench::new(&[a.clone(), b.clone()]);
    t.proved(1);
    t.proved(2);
    assert_eq!(t.owner(), Some(1));
    assert_eq!(t.b.contested(), [Contested { ip: ip(X), owner: node(1), challenger: node(2), since: t.now }]);
    // No moment in which X is plaintext.
    t.update(&[claimant(1, 2, &[]), b]);
    assert_eq!(t.owner(), Some(2));
    assert!(t.b.contested().is_empty());
}

#[test]
fn a_challenge_is_forgotten_when_it_is_not_repeated() {
    let mut t = Bench::new(&[claimant(1, 1, &[X]), claimant(2, 1, &[X])]);
    t.proved(1);
    t.proved(2);
    t.run(CHALLENGE + SECOND, |_| Ok(1));
    assert!(t.b.contested().is_empty());
    t.update(&[claimant(1, 2, &[]), claimant(2, 1, &[X])]);
    assert_eq!(t.owner(), None, "a proof that old does not count");
}

#[test]
fn shared_addresses_rebind_at_once() {
    let mut t = Bench::new(&[shared(claimant(1, 1, &[X])), shared(claimant(2, 1, &[X]))]);
    t.proved(1);
    t.proved(2);
    assert_eq!(t.owner(), Some(2));
    t.proved(1);
    assert_eq!(t.owner(), Some(1));
    // One side's word is not enough.
    t.update(&[claimant(1, 2, &[X]), shared(claimant(2, 1, &[X]))]);
    t.proved(2);
    assert_eq!(t.owner(), Some(1));
    // When both say so the answer that is on record decides.
    t.update(&[shared(claimant(1, 3, &[X])), shared(claimant(2, 1, &[X]))]);
    assert_eq!(t.owner(), Some(2));
}

#[test]
fn the_operator_releases() {
    let both = [strict(claimant(1, 1, &[X])), claimant(2, 1, &[X])];
    let mut t = Bench::new(&both);
    assert_eq!(t.b.release(ip(X), t.now), None);
    t.proved(1);
    assert_eq!(t.b.release(ip(X), t.now), Some(node(1)));
    assert_eq!(t.owner(), None);
    t.proved(1);
    assert_eq!(t.owner(), Some(1), "it still answers there");
    t.proved(2);
    assert_eq!(t.b.release(ip(X), t.now), Some(node(1)));
    assert_eq!(t.owner(), Some(2), "the challenger has it at once");
}

#[test]
fn silence_frees_a_permissive_peer_after_half_a_minute() {
    let mut t = Bench::new(&[claimant(1, 1, &[X])]);
    t.proved(1);
    t.run(30 * SECOND, |_| Ok(1));
    t.b.suspect(ip(X), t.now);
    t.silent(29 * SECOND);
    assert_eq!(t.owner(), Some(1));
    assert!(t.b.warnings()[0].captured);
    t.silent(10 * SECOND);
    assert_eq!(t.owner(), None);
    let w = t.b.warnings();
    assert_eq!((w.len(), w[0].captured, w[0].owner), (1, false, node(1)));
    // Until it is back.
    t.run(70 * SECOND, |_| Ok(1));
    assert_eq!(t.owner(), Some(1));
    assert!(t.b.warnings().is_empty());
}

#[test]
fn silence_never_frees_where_either_side_is_strict() {
    let mut t = Bench::new(&[strict(claimant(1, 1, &[X]))]);
    t.proved(1);
    t.silent(30 * 86_400 * SECOND);
    assert_eq!(t.owner(), Some(1));
    assert_eq!(t.b.warnings().len(), 1);

    let mut t = Bench::new(&[]);
    let own = Own { strict: true, ..Own::default() };
    t.b.update(&[claimant(1, 1, &[X])], &own, t.now);
    t.proved(1);
    t.silent(86_400 * SECOND);
    assert_eq!(t.owner(), Some(1));
}

#[test]
fn silence_does_not_count_while_somebody_hears_the_peer() {
    let mut t = Bench::new(&[claimant(1, 1, &[X])]);
    t.proved(1);
    t.b.heard(node(1), true, t.now);
    t.silent(3600 * SECOND);
    assert_eq!(t.owner(), Some(1));
    t.b.heard(node(1), false, t.now);
    t.b.due(t.now);
    assert_eq!(t.owner(), None);
}

#[test]
fn a_strangers_key_is_worth_no_more_than_silence() {
    let mut t = Bench::new(&[strict(claimant(1, 1, &[X])), claimant(2, 1, &["10.0.0.8"])]);
    t.proved(1);
    for answer in [Err(Failure::Stranger), Ok(2)] {
        t.run(86_400 * SECOND, |_| answer);
        assert_eq!(t.owner(), Some(1), "{answer:?}");
    }
    assert_eq!(t.b.warnings()[0].found, Found::Member(node(2)));
    // And no less: a permissive one leaves by it, but not before its time.
    let mut t = Bench::new(&[claimant(1, 1, &[X])]);
    t.proved(1);
    t.b.suspect(ip(X), t.now);
    t.run(29 * SECOND, |_| Err(Failure::Stranger));
    assert_eq!(t.owner(), Some(1));
    t.run(70 * SECOND, |_| Err(Failure::Stranger));
    assert_eq!(t.owner(), None);
    assert_eq!(t.b.warnings()[0].found, Found::Stranger);
}

#[test]
fn a_newcomer_at_the_address_of_a_silent_permissive_member_gets_it_in_the_end() {
    let mut t = Bench::new(&[claimant(1, 1, &[X])]);
    t.proved(1);
    t.update(&[claimant(1, 1, &[X]), claimant(2, 1, &[X])]);
    t.run(20 * SECOND, |_| Ok(2));
    assert_eq!(t.owner(), Some(1));
    assert_eq!(t.b.contested().len(), 1);
    t.run(120 * SECOND, |_| Ok(2));
    assert_eq!(t.owner(), Some(2));
    assert_eq!(t.b.warnings()[0].owner, node(1));
    // A strict one keeps it.
    let both = [strict(claimant(1, 1, &[X])), claimant(2, 1, &[X])];
    let mut t = Bench::new(&both);
    t.proved(1);
    t.run(86_400 * SECOND, |_| Ok(2));
    assert_eq!(t.owner(), Some(1));
}

#[test]
fn our_own_suspend_is_not_the_peers_silence() {
    let mut t = Bench::new(&[claimant(1, 1, &[X])]);
    t.proved(1);
    t.b.suspect(ip(X), t.now + SECOND);
    t.silent(3 * SECOND);
    t.now += 86_400 * SECOND; // asleep
    t.silent(0);
    assert_eq!(t.owner(), Some(1), "one failed probe after waking up is not a day of silence");
    t.run(0, |_| Ok(1));
    assert_eq!(t.owner(), Some(1));
}

#[test]
fn an_announced_restart_is_not_silence_for_a_minute() {
    let c = claimant(1, 1, &[X]);
    let mut t = Bench::new(std::slice::from_ref(&c));
    t.proved(1);
    t.update(&[present(Claimant { sequence: 2, ..c }, Presence::Restarting)]);
    t.silent(RESTART + 25 * SECOND);
    assert_eq!(t.owner(), Some(1));
    t.silent(180 * SECOND);
    assert_eq!(t.owner(), None, "it did not come back");
}

#[test]
fn strict_bindings_survive_our_restart() {
    let claims = [strict(claimant(1, 1, &[X])), claimant(2, 1, &["10.0.0.8"])];
    let mut t = Bench::new(&claims);
    t.proved(1);
    t.b.proved(ip("10.0.0.8"), 6374, node(2), t.now);
    let kept = t.b.remember();
    assert_eq!(kept.len(), 2);

    let mut again = Bindings::new(node(99), kept.clone());
    assert!(again.captured().is_empty());
    assert_eq!(again.remember(), kept, "a crash before the records are known loses nothing");
    again.update(&claims, &Own::default(), 5);
    assert_eq!(again.captured().keys().copied().collect::<Vec<_>>(), [ip(X)], "the permissive one is probed first");

    let mut again = Bindings::new(node(99), kept.clone());
    again.update(&[strict(claimant(1, 2, &[]))], &Own::default(), 5);
    again.update(&[strict(claimant(1, 3, &[X]))], &Own::default(), 6);
    assert!(again.captured().is_empty(), "it had dropped the address meanwhile");

    let mut again = Bindings::new(node(99), kept);
    again.update(&claims, &Own { strict: true, ..Own::default() }, 5);
    assert_eq!(again.captured().len(), 2);
}

#[test]
fn probes_are_made_at_once_and_name_whom_to_expect() {
    let mut t = Bench::new(&[claimant(1, 1, &[X, "fd00::1"])]);
    let due = t.b.due(t.now);
    assert_eq!(due.len(), 2);
    assert!(due.iter().all(|p| p.expect == node(1)));
    due.iter().for_each(|p| t.b.proved(p.ip, p.port, p.expect, t.now));
    assert!(t.b.due(t.now + 59 * SECOND).is_empty());
    // A newer record that says nothing new about addresses is no reason to dial; one that does is.
    t.now += 5 * SECOND;
    t.update(&[claimant(1, 2, &[X, "fd00::1"])]);
    assert!(t.b.due(t.now).is_empty());
    t.update(&[claimant(1, 3, &[X])]);
    assert_eq!(t.b.due(t.now).len(), 1);
}

#[test]
fn the_tables_are_bounded_and_what_is_captured_is_kept_first() {
    let many = |n: u8, count: u32| {
        let addresses =
            (0..count).map(|i| Claimed { ip: IpAddr::from([10, n, (i >> 8) as u8, i as u8]), shared: false }).collect();
        Claimant { addresses, ..claimant(n, 1, &[]) }
    };
    let t = Bench::new(&[many(1, 1000)]);
    assert_eq!(t.b.slots.len(), MAX_PER_NODE);

    let wide = |n: u16| {
        let [a, b] = n.to_be_bytes();
        let mut id = [1; 16];
        (id[0], id[1]) = (a, b);
        let addresses = (0..MAX_PER_NODE as u8).map(|i| Claimed { ip: IpAddr::from([10, a, b, i]), shared: false }).collect();
        Claimant { node: NodeId::from_bytes(id), addresses, ..claimant(1, 1, &[]) }
    };
    let last = wide(0x0fff);
    let mut t = Bench::new(std::slice::from_ref(&last));
    t.b.proved(IpAddr::from([10, 0x0f, 0xff, 0]), 6374, last.node, t.now);
    let all: Vec<Claimant> = (0..0x1000).map(wide).collect();
    t.update(&all);
    assert_eq!(t.b.slots.len(), MAX_CLAIMS);
    assert_eq!(t.b.captured().len(), 1);
    assert!(t.b.due(t.now).len() <= MAX_PROBES);
}

// --- random sequences ---

const IPS: [&str; 5] = ["10.0.0.1", "10.0.0.2", "fd00::3", "127.0.0.5", "10.0.0.200"];
const OWN: usize = 4;
const PORTS: [u16; 2] = [6374, 7000];

/// Port, strict, presence; which addresses, and whether as shared.
type Said = (u16, bool, Presence, Vec<(usize, bool)>);

#[derive(Debug, Clone)]
enum Event {
    /// What node `n` publishes now; none = it left.
    Record {
        n: u8,
        record: Option<Said>,
    },
    Mode(bool),
    Proved(usize, u16, u8),
    Failed(usize, u16, Failure),
    Suspect(usize),
    Heard(u8, bool),
    Release(usize),
    Due,
    Pass(Millis),
    Quiet(u8),
}

fn event() -> impl Strategy<Value = Event> {
    let n = 1..4u8;
    let i = 0..IPS.len();
    let port = prop::sample::select(PORTS.to_vec());
    let presence = prop_oneof![4 => Just(Presence::Running), 1 => Just(Presence::Restarting), 1 => Just(Presence::Stopped)];
    let record = (port.clone(), any::<bool>(), presence, prop::collection::vec((i.clone(), any::<bool>()), 0..4));
    prop_oneof![
        3 => (n.clone(), prop::option::weighted(0.85, record)).prop_map(|(n, record)| Event::Record { n, record }),
        1 => any::<bool>().prop_map(Event::Mode),
        6 => (i.clone(), port.clone(), prop_oneof![6 => n.clone(), 1 => Just(99u8)]).prop_map(|(i, p, n)| Event::Proved(i, p, n)),
        4 => (i.clone(), port, prop_oneof![Just(Failure::Silence), Just(Failure::Stranger)])
            .prop_map(|(i, p, f)| Event::Failed(i, p, f)),
        1 => i.clone().prop_map(Event::Suspect),
        1 => (n.clone(), any::<bool>()).prop_map(|(n, up)| Event::Heard(n, up)),
        1 => i.prop_map(Event::Release),
        2 => Just(Event::Due),
        4 => (0..40_000u64).prop_map(Event::Pass),
        2 => n.prop_map(Event::Quiet),
    ]
}

/// What the events say, kept apart from how [`Bindings`] keeps it.
struct Model {
    b: Bindings,
    now: Millis,
    sequence: u64,
    own: Own,
    claims: BTreeMap<u8, Claimant>,
    heard: BTreeSet<u8>,
    /// Proofs by nodes that have claimed the address ever since, and when.
    proofs: BTreeMap<(usize, u8), Millis>,
}

impl Model {
    fn new() -> Self {
        let own = Own { addresses: BTreeSet::from([ip(IPS[OWN])]), strict: false };
        let b = Bindings::new(node(99), []);
        Self { b, now: 1, sequence: 0, own, claims: BTreeMap::new(), heard: BTreeSet::new(), proofs: BTreeMap::new() }
    }

    fn claim(&self, i: usize, n: u8) -> Option<(u16, bool)> {
        let c = self.claims.get(&n).filter(|c| c.presence != Presence::Stopped)?;
        let mut of: Vec<bool> = c.addresses.iter().filter(|a| a.ip == ip(IPS[i])).map(|a| a.shared).collect();
        of.sort_unstable();
        Some((c.port, *of.first()?))
    }

    fn strict(&self, n: u8) -> bool {
        self.own.strict || self.claims.get(&n).is_some_and(|c| c.strict)
    }

    fn update(&mut self) {
        let all: Vec<Claimant> = self.claims.values().cloned().collect();
        self.b.update(&all, &self.own, self.now);
        let gone: Vec<_> = self.proofs.keys().copied().filter(|&(i, n)| self.claim(i, n).is_none()).collect();
        gone.into_iter().for_each(|k| {
            self.proofs.remove(&k);
        });
    }

    fn apply(&mut self, e: &Event) {
        match e {
            Event::Record { n, record } => {
                self.sequence += 1;
                match record {
                    None => self.claims.remove(n),
                    Some((port, strict, presence, ips)) => {
                        let addresses = ips.iter().map(|&(i, shared)| Claimed { ip: ip(IPS[i]), shared }).collect();
                        let c = Claimant {
                            sequence: self.sequence,
                            port: *port,
                            strict: *strict,
                            presence: *presence,
                            addresses,
                            node: node(*n),
                        };
                        self.claims.insert(*n, c)
                    }
                };
                self.update();
            }
            Event::Mode(strict) => {
                self.own.strict = *strict;
                self.update();
            }
            Event::Proved(i, port, n) => {
                if self.claim(*i, *n).is_some_and(|(p, _)| p == *port) {
                    self.proofs.insert((*i, *n), self.now);
                }
                self.b.proved(ip(IPS[*i]), *port, node(*n), self.now);
            }
            Event::Failed(i, port, why) => self.b.failed(ip(IPS[*i]), *port, *why, self.now),
            Event::Suspect(i) => self.b.suspect(ip(IPS[*i]), self.now),
            Event::Heard(n, up) => {
                if *up {
                    self.heard.insert(*n)
                } else {
                    self.heard.remove(n)
                };
                self.b.heard(node(*n), *up, self.now);
            }
            Event::Release(i) => {
                self.b.release(ip(IPS[*i]), self.now);
            }
            Event::Due => assert!(self.b.due(self.now).len() <= MAX_PROBES),
            Event::Pass(t) => self.now += t,
            Event::Quiet(n) => {
                // Long silence of whatever `n` has.
                for _ in 0..6 {
                    self.now += 9_000;
                    for (i, at) in IPS.iter().enumerate() {
                        if let Some((port, _)) = self.claim(i, *n) {
                            self.b.failed(ip(at), port, Failure::Silence, self.now);
                        }
                    }
                }
            }
        }
    }

    /// Why the step from `before` to now is wrong, if it is.
    fn check(&self, e: &Event, before: &BTreeMap<IpAddr, Bound>, version: u64) {
        let after = self.b.captured();
        assert_eq!(version != self.b.version(), before != after, "the version tells changes");
        for (at, bound) in after {
            let i = IPS.iter().position(|s| ip(s) == *at).unwrap();
            let n = bound.node.as_bytes()[0];
            assert!(is_capturable(*at) && i != OWN && n != 99);
            assert_eq!(self.claim(i, n).map(|(p, _)| p), Some(bound.port), "{at} is claimed by its owner, at this port");
            assert!(self.proofs.contains_key(&(i, n)), "{at} was proved by its owner while it claimed it");
        }
        for (at, bound) in before {
            let i = IPS.iter().position(|s| ip(s) == *at).unwrap();
            let old = bound.node.as_bytes()[0];
            let new = after.get(at).map(|b| b.node.as_bytes()[0]);
            let Some((_, old_shared)) = self.claim(i, old) else { continue };
            if new == Some(old) || matches!(e, Event::Release(_)) {
                continue;
            }
            if let Some(new) = new
                && old_shared
                && self.claim(i, new).is_some_and(|(_, shared)| shared)
            {
                continue;
            }
            // What is left is silence.
            assert!(!self.strict(old), "a strict binding never leaves by silence");
            assert!(!self.heard.contains(&old), "somebody hears it");
            let proved = self.proofs[&(i, old)];
            assert!(self.now - proved >= SILENCE, "it answered {} ms ago", self.now - proved);
        }
        for c in self.b.contested() {
            assert_ne!(c.owner, c.challenger);
            assert_eq!(after.get(&c.ip).map(|b| b.node), Some(c.owner));
        }
        for w in self.b.warnings() {
            assert_eq!(after.get(&w.ip).is_some_and(|b| b.node == w.owner), w.captured);
            assert!(self.claims.contains_key(&w.owner.as_bytes()[0]), "no warning about who is gone");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens(events in prop::collection::vec(event(), 1..120)) {
        let mut m = Model::new();
        for e in &events {
            let (before, version) = (m.b.captured().clone(), m.b.version());
            m.apply(e);
            m.check(e, &before, version);
        }
    }

    /// Once one node alone claims an address and answers there, it has it within two minutes, whatever went before.
    #[test]
    fn it_converges_after_the_old_owner_drops(events in prop::collection::vec(event(), 1..60)) {
        let mut m = Model::new();
        events.iter().for_each(|e| m.apply(e));
        m.sequence += 1;
        m.claims = BTreeMap::from([(1, claimant(1, m.sequence, &[])), (2, claimant(2, m.sequence, &[IPS[0]]))]);
        m.update();
        let mut t = Bench { b: m.b, now: m.now };
        t.run(120 * SECOND, |_| Ok(2));
        let has: Vec<_> = t.b.captured().iter().map(|(ip, b)| (*ip, b.node)).collect();
        prop_assert_eq!(has, [(ip(IPS[0]), node(2))]);
        prop_assert!(t.b.warnings().is_empty() && t.b.contested().is_empty());
    }
}
