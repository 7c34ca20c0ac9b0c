//! Goal: a change is seen soon, whatever runs between the passes, and where everything changes all
//! the time little is made of it.
//! Method: real models on the simulated device, whose kernels change their times.

use dgls_core::engine::Adapt;

use crate::adaptation::{COMPUTE, GB, Run, Truth, exactly, with_times};
use crate::models::all;
use crate::random::Random;

/// Passes until another plan is taken up, after the kernels take three times as long; each takes up
/// to so many percent more or less. Between passes the device is busy for any time: with samplers,
/// or with other models.
fn passes_to_adopt(before: u32, percent: u64) -> u32 {
    let truth = Truth { kernel_ns: 3_000_000, double: 18, ns_per_kib: 41 };
    let after = Truth { kernel_ns: 9_000_000, ..truth };
    let mut profile = all()[0].profile(2, 150.0, 25e9);
    profile.times = None;
    let mut run = Run::new(&profile, 8 * GB, Adapt::AtOnce);
    let mut random = Random::new(u64::from(before));
    let mut others = Random::new(u64::from(before));
    let mut restless =
        |number: u64, _: u64| number * random.between(100 - percent, 100 + percent) / 100;
    let mut pass = |run: &mut Run, truth| {
        run.sim.compute(COMPUTE, &[], others.between(0, 3_000_000_000));
        run.pass(truth, &mut restless);
    };
    for _ in 0..before {
        pass(&mut run, truth);
    }
    let passes = passes_until_another_plan(&mut run, |run| pass(run, after));
    run.finish();
    passes
}

fn passes_until_another_plan(run: &mut Run, mut pass: impl FnMut(&mut Run)) -> u32 {
    let known = run.engine.stats().counters.adopted;
    let mut adopted = || {
        pass(run);
        run.engine.stats().counters.adopted > known
    };
    (1..40).find(|_| adopted()).expect("another plan")
}

#[test]
fn a_change_is_answered_soon_whatever_lies_between_the_passes() {
    for before in 8..17 {
        let passes = passes_to_adopt(before, 0);
        assert!(passes <= 4, "{passes} passes, after {before} before the change");
    }
}

#[test]
fn a_change_is_answered_soon_however_restless_passes_were() {
    for before in [36, 41, 46] {
        let passes = passes_to_adopt(before, 25);
        assert!(passes <= 4, "{passes} passes, after {before} restless ones");
    }
}

#[test]
fn a_change_is_answered_soon_after_passes_in_turns_with_another_model() {
    let few = Truth { kernel_ns: 2_400_000, double: 10, ns_per_kib: 19 };
    let many = Truth { kernel_ns: 9_450_000, ..few };
    let mut profile = all()[2].profile(2, 150.0, 25e9);
    profile.times = None;
    let mut run = Run::new(&profile, 6 * GB, Adapt::AtOnce);
    for pass in 0..40 {
        // The first of two passes finds a cold device.
        let slower = if pass >= 24 && pass % 2 == 0 { 117 } else { 100 };
        run.pass(few, &mut |number, percent| {
            if percent == 3 { number * slower / 100 } else { number }
        });
    }
    let passes = passes_until_another_plan(&mut run, |run| {
        run.pass(many, &mut exactly);
    });
    assert!(passes <= 4, "{passes} passes");
    run.finish();
}

#[test]
fn another_load_on_the_link_is_answered_soon_after_small_news_in_a_row() {
    let truth = Truth { kernel_ns: 6_000_000, double: 18, ns_per_kib: 20 };
    let after = Truth { ns_per_kib: 82, ..truth };
    let mut profile = all()[0].profile(2, 150.0, 25e9);
    profile.times = None;
    let mut run = Run::new(&profile, 8 * GB, Adapt::AtOnce);
    for pass in 0..46 {
        // One pass in nine takes a little longer.
        let slower = if pass % 9 == 8 { 108 } else { 100 };
        run.pass(truth, &mut |number, _| number * slower / 100);
    }
    let passes = passes_until_another_plan(&mut run, |run| {
        run.pass(after, &mut exactly);
    });
    assert!(passes <= 4, "{passes} passes");
    run.finish();
}

#[test]
fn pauses_after_some_passes_keep_no_better_plan_away() {
    let truth = Truth { kernel_ns: 2_350_000, double: 10, ns_per_kib: 19 };
    let mut profile = all()[1].profile(2, 150.0, 25e9);
    profile.times = None;
    for pause_ns in [0, 500_000_000] {
        let mut run = Run::new(&profile, 7 * GB, Adapt::AtOnce);
        for number in 0..12 {
            run.pass(truth, &mut exactly);
            if number % 3 == 1 {
                run.sim.compute(COMPUTE, &[], pause_ns);
            }
        }
        assert_eq!(run.engine.stats().counters.adopted, 1, "with pauses of {pause_ns} ns");
        run.finish();
    }
}

#[test]
fn a_host_that_is_four_passes_ahead_learns_as_well() {
    let truth = Truth { kernel_ns: 3_000_000, double: 18, ns_per_kib: 41 };
    let mut profile = all()[0].profile(2, 150.0, 25e9);
    profile.times = None;
    for ahead in [0, 1, 2, 4] {
        let mut run = Run::new(&profile, 8 * GB, Adapt::AtOnce);
        run.flaky.go_ahead(ahead * profile.order.len() as u64);
        run.mean(16, truth, &mut exactly);
        assert_eq!(run.engine.stats().counters.adopted, 1, "{ahead} passes ahead");
        run.finish();
    }
}

#[test]
fn what_the_first_block_tells_is_known_within_its_pass() {
    let truth = Truth { kernel_ns: 3_000_000, double: 18, ns_per_kib: 41 };
    let profile = all()[0].profile(2, 150.0, 25e9);
    let uses = profile.order.len();
    let mut run = Run::new(&with_times(&profile, truth), 8 * GB, Adapt::AtOnce);
    run.flaky.go_ahead(5);
    let timed = |run: &Run| run.engine.records().len();
    let mut quiet = 0;
    while quiet < 2 {
        let known = timed(&run);
        run.mean(1, truth, &mut exactly);
        quiet = if timed(&run) == known { quiet + 1 } else { 0 };
    }
    let slower = Truth { kernel_ns: 3 * truth.kernel_ns, ..truth };
    let slowly = |run: &Run, blocks: &[u32]| {
        for &block in blocks {
            run.engine.enter(block, COMPUTE).expect("no faults");
            run.sim.compute(COMPUTE, &[], slower.kernel(block));
            run.engine.exit(COMPUTE).expect("no faults");
        }
    };
    run.engine.begin_pass();
    let reads = run.flaky.reads();
    slowly(&run, &profile.order[..uses / 2]);
    assert!(run.flaky.reads() > reads, "times are read in the middle of a pass");
    let before = timed(&run);
    slowly(&run, &profile.order[uses / 2..]);
    run.engine.end_pass();
    assert_eq!(timed(&run), before, "in this pass only the first and the last use are timed");
    run.mean(1, slower, &mut exactly);
    assert!(timed(&run) + 5 >= before + uses, "in the next one all");
}

const CALM: Truth = Truth { kernel_ns: 4_000_000, double: 18, ns_per_kib: 41 };

/// The mean of so many times `some` passes, and plans taken up. Without adapting the plan is the
/// one for what `some` passes take on average.
fn restless(
    adapt: Adapt,
    seed: u64,
    times: u32,
    some: impl Fn(&mut Run, &mut Random) -> f64,
) -> (f64, u64) {
    let profile = all()[0].profile(2, 150.0, 25e9);
    let known = with_times(&profile, Truth { kernel_ns: 6_000_000, ..CALM });
    let mut run = Run::new(&known, 8 * GB, adapt);
    let mut random = Random::new(seed);
    let sum: f64 = (0..times).map(|_| some(&mut run, &mut random)).sum();
    run.finish();
    (sum / f64::from(times), run.engine.stats().counters.adopted)
}

/// A few passes whose kernels take another time than those of before.
fn few_alike(run: &mut Run, random: &mut Random) -> f64 {
    let truth = Truth { kernel_ns: random.between(4_000_000, 9_000_000), ..CALM };
    let passes = u32::try_from(random.between(2, 5)).expect("few");
    run.mean(passes, truth, &mut exactly)
}

/// A pass that is not like the one before, nor is the link in one of five.
fn never_alike(run: &mut Run, random: &mut Random) -> f64 {
    let kernels = random.between(100, 200);
    let link = if random.chance(20) { random.between(110, 160) } else { 100 };
    run.mean(1, CALM, &mut |number, percent| {
        number * (if percent == 3 { kernels } else { link }) / 100
    })
}

#[test]
fn where_times_change_all_the_time_few_plans_are_taken_up() {
    let (still, _) = restless(Adapt::Off, 5, 40, few_alike);
    let (adapting, adopted) = restless(Adapt::AtOnce, 5, 40, few_alike);
    assert!(adopted <= 15, "{adopted} plans in 40 changes");
    assert!(adapting <= 1.02 * still, "{adapting} ns, without {still}");
}

#[test]
fn where_no_two_passes_are_alike_few_plans_are_taken_up() {
    for seed in [0, 2] {
        let (still, _) = restless(Adapt::Off, seed, 100, never_alike);
        let (adapting, adopted) = restless(Adapt::AtOnce, seed, 100, never_alike);
        assert!(adopted <= 12, "{adopted} plans in 100 passes");
        assert!(adapting <= 1.02 * still, "{adapting} ns, without {still}");
    }
}

/// Passes whose times are known, each with its uses, after a change in pass 36; `odd` ones take
/// `percent` of the others.
fn known(ahead: u64, odd: &[u64], percent: u64) -> Vec<(u64, usize)> {
    let truth = Truth { kernel_ns: 3_000_000, double: 18, ns_per_kib: 20 };
    let after = Truth { kernel_ns: 6_000_000, ..truth };
    let mut profile = all()[0].profile(2, 150.0, 25e9);
    profile.times = None;
    let uses = profile.order.len() as u64;
    let mut run = Run::new(&profile, 8 * GB, Adapt::AtOnce);
    run.flaky.go_ahead(ahead * uses);
    run.mean(36, truth, &mut exactly);
    for pass in 36..48 {
        let slower = if odd.contains(&pass) { percent } else { 100 };
        run.pass(after, &mut |number, by| if by == 3 { number * slower / 100 } else { number });
    }
    let mut passes: Vec<(u64, usize)> = Vec::new();
    for number in run.engine.records().iter().map(|record| record.number / uses) {
        match passes.last_mut() {
            Some(last) if last.0 == number => last.1 += 1,
            _ => passes.push((number, 1)),
        }
    }
    run.finish();
    passes.into_iter().filter(|&(number, _)| number > 33).collect()
}

/// News come while the last pass that earlier news asked for runs, or before it was read.
#[test]
fn passes_that_news_asked_for_are_timed_to_their_end_whatever_comes_after_them() {
    let cases: [(u64, &[u64]); 6] =
        [(0, &[38]), (1, &[38]), (1, &[40]), (2, &[39]), (2, &[40]), (3, &[38, 41])];
    for (ahead, odd) in cases {
        for percent in [107, 130] {
            let passes = known(ahead, odd, percent);
            let whole = |&(_, uses): &(u64, usize)| uses == 57;
            assert!(passes.iter().all(whole), "{ahead} ahead, {odd:?}: {passes:?}");
            let first = passes.iter().take(3).map(|&(number, _)| number);
            assert!(first.eq(37 + ahead..40 + ahead), "{ahead} ahead, {odd:?}: {passes:?}");
            assert!(passes.len() >= 5, "{ahead} ahead, {odd:?}: {passes:?}");
        }
    }
}
