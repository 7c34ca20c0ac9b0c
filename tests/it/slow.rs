//! Goal: a plan knows that bytes from a slow place cost more: they stay on the device first, and
//! the time of a pass is predicted with them.
//! Method: models of which some tensors are so many times slower, against the same model planned
//! without that knowledge, in the same exact time.
#![expect(clippy::cast_precision_loss, reason = "shares of some megabytes")]

use dgls_core::plan::{Link, Plan, Profile, Tensor, Times, bound_s, check, period_s, plan};

use crate::random::Random;
use crate::stack::{Stack, index};

const RATE: f64 = 10e9;

fn profile(blocks: u32, sizes: &[u64], compute_s: f64) -> Profile {
    let tensors = (0..blocks).flat_map(|block| sizes.iter().map(move |&bytes| (block, bytes)));
    Profile {
        tensors: tensors.map(|(block, bytes)| Tensor { block, bytes }).collect(),
        order: (0..blocks).collect(),
        times: Some(Times {
            compute_s: vec![compute_s; index(blocks)],
            outside_s: 0.0,
            link: Link { bytes_per_s: RATE, latency_s: 5e-6 },
        }),
        ..Profile::default()
    }
}

/// The share of the bytes of some tensors that stays on the device.
fn kept(profile: &Profile, plan: &Plan, of: impl Fn(usize) -> bool) -> f64 {
    let (mut kept, mut all) = (0, 0);
    for (number, tensor) in profile.tensors.iter().enumerate().filter(|&(n, _)| of(n)) {
        all += tensor.bytes;
        kept += if plan.resident[number] { tensor.bytes } else { 0 };
    }
    kept as f64 / all as f64
}

#[test]
fn slow_blocks_stay_first() {
    let mut profile = profile(24, &[4 << 20, 4 << 20, 8 << 20, 1 << 20], 100e-6);
    let slow = |number: usize| profile.tensors[number].block % 3 == 0;
    let budget = 12 * (17 << 20);
    let before = plan(&profile, budget).expect("feasible");
    let aware = Profile {
        slow: (0..profile.tensors.len()).map(|n| if slow(n) { 8.0 } else { 1.0 }).collect(),
        ..profile.clone()
    };
    let after = plan(&aware, budget).expect("feasible");
    check(&aware, &after).expect("legal");
    assert!(kept(&profile, &before, slow) < 0.6);
    assert!(kept(&aware, &after, slow) > 0.95, "{}", kept(&aware, &after, slow));
    let (blind_s, aware_s) = (period_s(&aware, &before), period_s(&aware, &after));
    let (blind_s, aware_s) = (blind_s.expect("timed"), aware_s.expect("timed"));
    assert!(aware_s < 0.6 * blind_s, "{aware_s} of {blind_s}");
    let predicted_s = after.period_s.expect("timed");
    assert!((aware_s - predicted_s).abs() < 1e-6 * predicted_s, "the plan says the same");
    profile.slow.clear();
    assert!(bound_s(&aware, budget).expect("timed") <= aware_s);
}

/// Of equal tensors of one block the slow ones stay.
#[test]
fn slow_tensors_of_a_block_stay_first() {
    let mut profile = profile(16, &[4 << 20; 4], 100e-6);
    profile.slow = (0..64).map(|number| if number % 2 == 0 { 5.0 } else { 1.0 }).collect();
    let plan = plan(&profile, 10 * (16 << 20)).expect("feasible");
    let (slow, fast) =
        (kept(&profile, &plan, |n| n % 2 == 0), kept(&profile, &plan, |n| n % 2 == 1));
    assert!(slow > 0.9 && fast < 0.3, "{slow} of the slow, {fast} of the others");
}

/// A pass that only copies takes what its bytes take, each at its own rate.
#[test]
fn a_pass_takes_the_time_of_its_bytes() {
    let mut random = Random::new(1);
    for _ in 0..40 {
        let stack = Stack::random(&mut random);
        let mut profile = stack.profile.clone();
        profile.times = Some(Times {
            compute_s: vec![0.0; profile.order.len()],
            outside_s: 0.0,
            link: Link { bytes_per_s: RATE, latency_s: 0.0 },
        });
        let slow = profile.tensors.iter().map(|_| random.between(1, 9) as f64);
        profile.slow = slow.collect();
        let plan = plan(&profile, stack.random_budget(&mut random)).expect("feasible");
        check(&profile, &plan).expect("legal");
        let cycle = plan.program.uses.iter().take(index(plan.program.cycle));
        let copies = cycle.flat_map(|used| plan.program.copies_of(used));
        let seconds = |copy: &dgls_core::plan::Copy| {
            dgls_core::align_up(copy.bytes) as f64 * profile.slow[index(copy.tensor)] / RATE
        };
        let sum = copies.map(seconds).sum::<f64>() / f64::from(plan.program.passes);
        let period_s = plan.period_s.expect("timed");
        assert!((period_s - sum).abs() <= 1e-9 + 1e-6 * sum, "{period_s} of {sum}");
        let bound_s = plan.bound_s.expect("timed");
        assert!(bound_s <= period_s * (1.0 + 1e-9), "{bound_s} of {period_s}");
    }
}

#[test]
fn factors_that_make_no_sense_are_refused() {
    for (factors, text) in [
        (vec![1.0], "slow needs 8 factors or none, got 1"),
        (vec![0.5; 8], "slow must be 1 to 1e9, got 0.5"),
        (vec![f64::NAN; 8], "slow must be 1 to 1e9, got NaN"),
    ] {
        let profile = Profile { slow: factors, ..profile(8, &[1 << 20], 1e-3) };
        let error = plan(&profile, 4 << 20).expect_err("no sense");
        assert!(error.to_string().contains(text), "{error}");
    }
}
