//! Goal: no interleaving of host, copies and kernels reads a wrong byte, whatever the caller does.
//! Method: seeded runs on the simulated device; then the same runs with one wait taken out, which
//! must be found. `DGLS_SEEDS` multiplies the number of seeds.

use dgls_core::driver::mutant::Dropped;

use crate::watchdog::{factor, for_seeds};
use crate::world::{Outcome, Setup, Staged, run};

fn check(seeds: u64, setup: &Setup) -> Vec<Outcome> {
    let outcomes = {
        let setup = setup.clone();
        for_seeds(seeds * factor(), move |seed| run(seed, &setup))
    };
    for outcome in &outcomes {
        let (seed, violations) = (outcome.seed, &outcome.violations);
        assert!(violations.is_empty(), "seed {seed}: {violations:#?}");
    }
    outcomes
}

#[test]
fn direct_copies_never_show_a_wrong_byte() {
    let outcomes = check(3000, &Setup::new(Staged::None));
    assert!(outcomes.iter().filter(|o| o.ahead == 2).count() > 1000);
    assert!(outcomes.iter().map(|o| o.rebuilds).sum::<u64>() > 1000);
}

#[test]
fn staged_copies_never_show_a_wrong_byte() {
    check(8000, &Setup::new(Staged::Any));
}

#[test]
fn a_failed_call_is_told_and_never_shows_a_wrong_byte() {
    let direct = Setup { faults: true, ..Setup::new(Staged::None) };
    let staged = Setup { faults: true, ..Setup::new(Staged::Any) };
    for setup in [direct, staged] {
        let outcomes = check(1500, &setup);
        assert!(outcomes.iter().map(|o| o.errors).sum::<u64>() > 500);
        let poisoned = outcomes.iter().filter(|o| o.poisoned).count();
        assert!(poisoned < outcomes.len() / 4, "{poisoned} engines did not recover");
    }
}

/// Of the runs that copy far enough ahead, how many show a hazard.
fn share(setup: &Setup, least_ahead: u32) -> (usize, usize) {
    let setup = setup.clone();
    let outcomes = for_seeds(500, move |seed| run(seed, &setup));
    let runs: Vec<&Outcome> = outcomes.iter().filter(|o| o.ahead >= least_ahead).collect();
    let found = runs.iter().filter(|o| !o.violations.is_empty()).count();
    assert!(runs.len() > 200, "{} runs stream", runs.len());
    (found, runs.len())
}

#[test]
fn a_lost_wait_for_ready_is_found() {
    let dropped = Dropped { ready: true, ..Dropped::default() };
    let (found, runs) = share(&Setup { dropped, ..Setup::new(Staged::None) }, 2);
    assert!(found * 10 >= runs * 9, "in {found} of {runs} runs");
}

#[test]
fn a_lost_wait_for_done_is_found() {
    let dropped = Dropped { done: true, ..Dropped::default() };
    let (found, runs) = share(&Setup { dropped, ..Setup::new(Staged::None) }, 2);
    assert!(found * 10 >= runs * 9, "in {found} of {runs} runs");
}

#[test]
fn a_copy_that_is_enqueued_too_early_is_found() {
    let (found, runs) = share(&Setup { early: 1, ..Setup::new(Staged::None) }, 2);
    assert!(found * 10 >= runs * 9, "in {found} of {runs} runs");
}

#[test]
fn a_lost_wait_for_a_chunk_is_found() {
    let dropped = Dropped { chunk: true, ..Dropped::default() };
    let (found, runs) = share(&Setup { dropped, ..Setup::new(Staged::All) }, 1);
    assert!(found * 10 >= runs * 9, "in {found} of {runs} runs");
}
