use proptest::prelude::*;

use super::*;

const NOW: UnixTime = UnixTime(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const YEAR: Duration = Duration::from_secs(365 * 86_400);
const BOOT: Duration = Duration::from_secs(1000);

fn clock() -> MeshClock {
    MeshClock { ends: (NOW + YEAR * 9, NOW + YEAR * 10), ..MeshClock::new(NOW, BOOT) }
}

fn by_clock(time: UnixTime) -> Said {
    Said { time, clock: true, agreed: EARLIEST }
}

fn by_floor(time: UnixTime) -> Said {
    Said { time, clock: false, agreed: EARLIEST }
}

fn said(said: Said) -> (UnixTime, bool) {
    (said.time, said.clock)
}

fn tell(clock: &MeshClock, system: UnixTime, boot: Duration) -> (UnixTime, &'static str) {
    let told = clock.tell(system, boot);
    (told.time, told.why.as_str())
}

#[test]
fn without_an_authority_the_system_clock_counts_where_it_can_be_right() {
    let clock = clock();
    assert_eq!(tell(&clock, UnixTime(0), BOOT), (NOW, "floor"));
    assert_eq!(tell(&clock, NOW - YEAR, BOOT + HOUR), (NOW + HOUR, "floor"), "the floor goes on");
    assert_eq!(tell(&clock, NOW + HOUR, BOOT), (NOW + HOUR, "system"));
    assert_eq!(tell(&clock, NOW + YEAR * 73, BOOT), (NOW, "floor"), "no root is valid then");
    assert_eq!(MeshClock::new(UnixTime(0), BOOT).floor(), EARLIEST);
}

#[test]
fn what_an_authority_says_runs_on_and_the_system_clock_counts_where_it_agrees() {
    let mut clock = clock();
    clock.agree(&[by_clock(NOW + HOUR)], None, BOOT);
    let boot = BOOT + HOUR;
    for wrong in [UnixTime(0), NOW + YEAR * 73, NOW + DAY, NOW - YEAR] {
        assert_eq!(tell(&clock, wrong, boot), (NOW + HOUR * 2, "signed"), "{wrong}");
    }
    let off = NOW + HOUR * 2 + AGREEMENT;
    assert_eq!(tell(&clock, off, boot), (off, "system"));
    assert_eq!(tell(&clock, off + Duration::from_secs(1), boot), (NOW + HOUR * 2, "signed"));
    assert_eq!(clock.tell(off, boot).asked, Some(HOUR));
    // Below the floor it does not lead, also where an authority says so.
    let mut low = super::tests::clock();
    low.agree(&[by_clock(NOW - YEAR)], None, BOOT);
    assert_eq!(tell(&low, NOW - YEAR, boot), (NOW + HOUR, "floor"));
}

#[test]
fn the_median_of_those_who_have_a_clock() {
    let after = |others: &[Said], own| {
        let mut clock = clock();
        clock.agree(others, own, BOOT);
        tell(&clock, UnixTime(0), BOOT)
    };
    let (right, ahead) = (NOW + DAY, NOW + YEAR * 5);
    assert_eq!(after(&[by_clock(right), by_clock(ahead), by_clock(right + HOUR)], None), (right + HOUR, "signed"));
    assert_eq!(after(&[by_clock(ahead), by_clock(right)], None), (right, "signed"), "the lower of two");
    assert_eq!(after(&[by_clock(right)], Some(ahead)), (right, "signed"), "an authority whose own clock is ahead");
    assert_eq!(after(&[by_clock(right), by_floor(NOW + DAY * 20)], None), (right, "signed"), "a floor is no clock");
    assert_eq!(after(&[by_clock(NOW + YEAR * 73), by_clock(right)], None), (right, "signed"), "no root is valid then");
    // None has a clock: the latest floor, but not one that is far beyond the others.
    assert_eq!(after(&[by_floor(NOW + HOUR), by_floor(NOW + DAY)], None), (NOW + DAY, "signed"));
    assert_eq!(after(&[by_floor(NOW + HOUR), by_floor(NOW + DAY), by_floor(NOW + YEAR)], None), (NOW + DAY, "signed"));
}

#[test]
fn an_authority_that_is_alone_goes_by_its_own_clock_unless_others_said_otherwise() {
    let mut alone = clock();
    alone.agree(&[], Some(NOW + DAY), BOOT);
    assert_eq!(tell(&alone, NOW + DAY, BOOT), (NOW + DAY, "system"));
    assert_eq!(said(alone.say(NOW + DAY, BOOT)), (NOW + DAY, true));
    // Not set, or forged beyond every root: it has no clock, and says so.
    for wrong in [UnixTime(0), NOW + YEAR * 73] {
        alone.agree(&[], Some(wrong), BOOT + HOUR);
        assert_eq!(said(alone.say(wrong, BOOT + HOUR)), (NOW + DAY + HOUR, false));
    }
    // With a floor of another's it goes on, until its own clock is set.
    let mut cold = clock();
    cold.agree(&[by_floor(NOW + HOUR)], Some(UnixTime(0)), BOOT);
    assert_eq!(said(cold.say(UnixTime(0), BOOT)), (NOW + HOUR, false));
    cold.agree(&[by_floor(NOW + HOUR)], Some(NOW + DAY * 40), BOOT);
    assert_eq!(said(cold.say(NOW + DAY * 40, BOOT)), (NOW + DAY * 40, true));
    // What others read off their clocks holds for a day against its own alone, and against floors.
    let mut forged = clock();
    forged.agree(&[by_clock(NOW)], Some(NOW + YEAR * 5), BOOT);
    forged.agree(&[], Some(NOW + YEAR * 5), BOOT + HOUR);
    forged.agree(&[by_floor(NOW)], None, BOOT + HOUR);
    assert_eq!(tell(&forged, NOW + YEAR * 5, BOOT + HOUR), (NOW + HOUR, "signed"));
    assert!(!forged.say(NOW + YEAR * 5, BOOT + HOUR).clock, "it does not say what others said as its own");
    forged.agree(&[], Some(NOW + YEAR * 5), BOOT + STALE);
    assert_eq!(tell(&forged, NOW + YEAR * 5, BOOT + STALE), (NOW + YEAR * 5, "system"));
    assert!(forged.floor() <= NOW + LONE_STEP + STALE);
}

/// No battery and no network time: weeks later the plug of the only authority is pulled, and the others go on.
#[test]
fn an_authority_that_leads_by_its_floor_keeps_the_time_that_passes() {
    let dead = UnixTime(0);
    let (mut authority, mut member, mut boot) = (clock(), clock(), BOOT);
    for _ in 0..80 {
        boot += DAY;
        authority.agree(&[], Some(dead), boot);
        member.agree(&[authority.say(dead, boot)], None, boot);
    }
    let restarted = MeshClock { ends: authority.ends, ..MeshClock::new(authority.floor(), BOOT) };
    assert_eq!(tell(&restarted, dead, BOOT), (NOW + DAY * 80, "floor"));
    assert_eq!(tell(&member, dead, boot).0, NOW + DAY * 80);
    // One whose own clock can be right goes by that; one that is ahead of the others' clocks does not run away from them.
    let mut ahead = clock();
    ahead.raise(NOW + DAY * 20, BOOT);
    ahead.agree(&[by_clock(NOW)], Some(NOW), BOOT + DAY);
    assert_eq!(ahead.floor(), NOW + DAY * 20);
}

#[test]
fn one_authority_raises_the_floor_by_a_month_at_most_however_often_it_speaks() {
    let mut clock = clock();
    assert!(clock.hear(NOW + HOUR, BOOT) && !clock.hear(NOW + HOUR, BOOT) && !clock.hear(NOW, BOOT));
    assert!(!clock.hear(NOW + YEAR, BOOT));
    for n in 1..100 {
        clock.agree(&[by_clock(NOW + DAY * 25 * n)], None, BOOT);
    }
    assert_eq!(clock.floor(), NOW + DAY * 25);
    // The time that passes is not a step.
    assert!(clock.hear(NOW + LONE_STEP + HOUR, BOOT + HOUR));
    assert!(!clock.hear(NOW + LONE_STEP + HOUR * 2, BOOT + HOUR));
    // A second authority stands behind it, or the operator: it counts from there.
    assert!(clock.agree(&[by_clock(NOW + YEAR), by_clock(NOW + YEAR + AGREEMENT)], None, BOOT));
    assert_eq!(clock.floor(), NOW + YEAR);
    assert!(clock.hear(NOW + YEAR + LONE_STEP, BOOT) && !clock.hear(NOW + YEAR + LONE_STEP + HOUR, BOOT));
    assert!(clock.raise(NOW + YEAR * 2, BOOT));
    assert!(!clock.agree(&[by_clock(NOW + YEAR * 3), by_clock(NOW + YEAR * 3 + HOUR)], None, BOOT), "these two do not agree");
}

#[test]
fn the_floor_stays_below_the_end_of_every_root() {
    let mut clock = clock();
    assert!(clock.raise(UnixTime(u64::MAX), BOOT));
    assert_eq!(clock.floor(), NOW + YEAR * 9 - Duration::from_secs(1));
}

proptest! {
    #[test]
    fn the_system_clock_never_raises_the_floor_and_mesh_time_is_never_below_it(
        floor in any::<u64>(), system in any::<u64>(), boot in any::<u64>(), said in any::<(u64, bool)>(), end in any::<u64>()
    ) {
        let boot = Duration::from_secs(boot);
        let mut clock = MeshClock::new(UnixTime(floor), boot);
        clock.ends = (UnixTime(end), UnixTime(end));
        let before = clock.floor();
        for system in [UnixTime(system), UnixTime(0), UnixTime(u64::MAX)] {
            prop_assert!(clock.tell(system, boot).time >= before);
            clock.say(system, boot);
        }
        prop_assert_eq!(clock.floor(), before);
        clock.agree(&[Said { time: UnixTime(said.0), clock: said.1, agreed: EARLIEST }], None, boot);
        prop_assert!(clock.floor() >= before && clock.floor() <= before + LONE_STEP);
        prop_assert!(clock.tell(UnixTime(system), boot).time >= clock.floor());
    }
}

#[test]
fn what_two_authorities_know_to_be_agreed_upon_counts_for_all() {
    // Both followed clocks that were ahead, and cannot go back; here and on a third the clocks are right.
    let ahead = Said { time: NOW + DAY * 90, clock: false, agreed: NOW + DAY * 90 };
    let right = by_clock(NOW);
    let with = |others: &[Said], own| {
        let mut clock = clock();
        clock.agree(others, own, BOOT);
        tell(&clock, NOW + HOUR, BOOT + HOUR)
    };
    assert_eq!(with(&[ahead, right], None), (NOW + HOUR, "system"), "the word of one");
    assert_eq!(with(&[ahead, ahead, right], None), (NOW + DAY * 90 + HOUR, "floor"));
    assert_eq!(with(&[ahead, right], Some(NOW)), (NOW + HOUR, "system"), "on an authority, too");
    assert_eq!(with(&[ahead, ahead], Some(NOW)), (NOW + DAY * 90 + HOUR, "floor"));
    // What differs by less than clocks may is no reason to leave one's own.
    let near = Said { agreed: NOW + AGREEMENT, ..right };
    assert_eq!(with(&[near, near, right], None), (NOW + HOUR, "system"));
}

/// One that lies lifts the floors of two others by what one may, and no further: neither takes the other's for agreed upon.
#[test]
fn who_was_lifted_by_one_alone_stands_behind_nothing() {
    let (mut a, mut b) = (clock(), clock());
    for round in 0..5 {
        let boot = BOOT + HOUR * round;
        let lie = by_clock(a.floor() + DAY * 30);
        let (said_a, said_b) = (a.say(UnixTime(0), boot), b.say(UnixTime(0), boot));
        a.agree(&[lie, said_b], None, boot);
        b.agree(&[lie, said_a], None, boot);
        assert!(a.floor().max(b.floor()) <= NOW + DAY * 31, "round {round}: {} {}", a.floor(), b.floor());
    }
    assert!(a.floor() > NOW + DAY * 29, "the lie was heard");
}

fn set_back(last: Era, time: UnixTime, void: UnixTime) -> Reset {
    let key = crate::keys::PrivateKey::generate().unwrap();
    Reset::sign(&key, crate::identity::MeshId::from_bytes([1; 10]), last, time, void).unwrap()
}

#[test]
fn the_recovery_key_sets_a_clock_back_once_and_nothing_of_before_leads_it_away_again() {
    // Two followed clocks that were ahead, and are alone with that.
    let ahead = NOW + DAY * 90;
    let mut clock = clock();
    clock.agree(&[by_clock(ahead), by_clock(ahead)], None, BOOT);
    assert_eq!(tell(&clock, NOW, BOOT), (ahead, "signed"));
    clock.agree(&[by_clock(NOW)], None, BOOT);
    assert_eq!(tell(&clock, NOW, BOOT), (ahead, "floor"));
    let void = clock.beyond(NOW, BOOT);
    assert_eq!(void, ahead + LONE_STEP);
    let reset = set_back(Era::default(), NOW + HOUR, void);
    assert!(clock.reset(&reset, BOOT + HOUR));
    assert_eq!((clock.floor(), clock.era()), (NOW + HOUR, reset.era()));
    assert_eq!(tell(&clock, NOW + HOUR * 2, BOOT + HOUR * 2), (NOW + HOUR * 2, "system"));
    assert_eq!(clock.say(NOW, BOOT + HOUR).agreed, NOW + HOUR, "it does not say that it knows of more");
    // Certificates of before, also of hosts that were further ahead, by what one authority can.
    for old in [NOW + DAY, ahead, void] {
        assert!(!clock.hear(old, BOOT + HOUR), "{old}");
    }
    // The same word again does nothing, after the floor was raised.
    clock.raise(NOW + DAY, BOOT + HOUR);
    assert!(!clock.reset(&reset, BOOT + HOUR));
    let older = set_back(Era::default(), NOW, void);
    assert!(!clock.reset(&older, BOOT + HOUR), "nor does one of before");
    assert_eq!(clock.floor(), NOW + DAY);
    // Authorities lead on as before: one by a month, two without a bound.
    assert!(clock.agree(&[by_clock(NOW + DAY * 2)], None, BOOT + HOUR));
    assert!(!clock.agree(&[by_clock(NOW + DAY * 40)], None, BOOT + HOUR));
    assert!(clock.agree(&[by_clock(NOW + DAY * 40), by_clock(NOW + DAY * 40)], None, BOOT + HOUR));
    // And again, for whatever reason.
    let again = set_back(reset.era(), NOW + DAY, NOW + DAY * 80);
    assert!(clock.reset(&again, BOOT + HOUR) && clock.floor() == NOW + DAY);
}

#[test]
fn who_hears_late_that_the_clock_was_set_back_loses_nothing_that_was_signed_since() {
    let reset = set_back(Era::default(), NOW + HOUR, NOW + DAY * 120);
    // Joined a year later: the time that it was given is none of those that are void.
    let mut late = clock();
    late.raise(NOW + YEAR, BOOT);
    assert!(late.reset(&reset, BOOT));
    assert_eq!((late.floor(), late.era()), (NOW + YEAR, reset.era()));
    // It had been off, and knows of an earlier time: the person stands behind this one.
    let mut cold = clock();
    assert!(cold.reset(&reset, BOOT));
    assert_eq!(cold.floor(), NOW + HOUR);
    // Not beyond a root, and not before there was a meshd.
    let mut short = MeshClock { ends: (NOW, NOW), ..clock() };
    short.reset(&reset, BOOT);
    assert_eq!(short.floor(), NOW - Duration::from_secs(1));
    // Over a restart the era goes on with the floor that was saved; in another mesh there was none.
    let mut restarted = MeshClock::new(NOW + DAY, BOOT);
    restarted.obeyed(&reset);
    assert!(!restarted.reset(&reset, BOOT) && !restarted.hear(NOW + DAY * 2, BOOT));
    assert_eq!(restarted.floor(), NOW + DAY);
    restarted.forget_era();
    assert_eq!(restarted.era(), Era::default());
    assert!(restarted.hear(NOW + DAY * 2, BOOT));
}
