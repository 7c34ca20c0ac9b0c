//! Goal: a plan keeps every promise that the engine relies on, for any model and any budget.
//! Method: seeded random models; every address, wait and sum of the plan is checked.

use dgls_core::plan::{
    Copy, InForce, Plan, Profile, Tensor, Use, check as legal, plan, plan_after,
};
use dgls_core::{Error, align_up};

use crate::adaptation::real;
use crate::models::all;
use crate::random::Random;
use crate::stack::{Stack, index};

const SEEDS: u64 = 1500;

/// Checks what must hold for any plan.
fn check(profile: &Profile, budget: u64, plan: &Plan) {
    assert!(plan.arena_bytes <= budget, "{} of {budget} bytes", plan.arena_bytes);
    assert_eq!(plan.resident.len(), profile.tensors.len());
    legal(profile, plan).unwrap_or_else(|illegal| panic!("{illegal}"));
    for used in plan.program.uses.iter().skip(index(plan.program.cycle)) {
        assert!(!profile.order.contains(&used.block), "only dormant blocks stand behind");
        dormant(profile, plan, used);
    }
}

/// A dormant use has all its bytes at once, apart from the residents.
fn dormant(profile: &Profile, plan: &Plan, used: &Use) {
    let range = |copy: &Copy| {
        assert_eq!(copy.bytes, profile.tensors[index(copy.tensor)].bytes);
        (copy.target_offset, copy.target_offset + align_up(copy.bytes))
    };
    let program = &plan.program;
    let residents = program.loads.iter().flatten().map(range);
    let streamed = program.copies_of(used).iter().map(range);
    let mut live: Vec<(u64, u64)> = residents.chain(streamed).collect();
    live.sort_unstable();
    assert!(live.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{live:?}");
    assert!(live.last().is_none_or(|last| last.1 <= plan.arena_bytes));
    let mut found: Vec<(u32, u64)> = program
        .copies_of(used)
        .iter()
        .chain(&program.loads[index(used.block)])
        .map(|copy| (copy.tensor, copy.target_offset))
        .collect();
    found.sort_unstable();
    let numbers = (0..).zip(&profile.tensors).filter(|(_, tensor)| tensor.block == used.block);
    let wanted: Vec<(u32, u64)> =
        numbers.map(|(number, _)| number).zip(used.offsets.iter().copied()).collect();
    assert_eq!(found, wanted, "each tensor is brought to where the block looks for it");
}

#[test]
fn every_plan_keeps_its_promises() {
    for seed in 0..SEEDS {
        let mut random = Random::new(seed);
        let stack = Stack::random(&mut random);
        let budget = stack.random_budget(&mut random);
        let made = plan(&stack.profile, budget).unwrap_or_else(|error| panic!("{seed}: {error}"));
        check(&stack.profile, budget, &made);
    }
}

#[test]
fn a_budget_is_refused_exactly_when_the_largest_block_does_not_fit() {
    for seed in 0..SEEDS {
        let stack = Stack::random(&mut Random::new(seed));
        let (least, _) = stack.budgets();
        let error = plan(&stack.profile, least - 1).expect_err("one byte less");
        assert!(
            matches!(error, Error::BudgetTooSmall { need_bytes, .. } if need_bytes == least),
            "{seed}: {error}"
        );
        assert_eq!(plan(&stack.profile, least).expect("just enough").least_bytes, least);
    }
}

#[test]
fn a_model_that_fits_streams_nothing() {
    for seed in 0..SEEDS {
        let stack = Stack::random(&mut Random::new(seed));
        let (_, all) = stack.budgets();
        let made = plan(&stack.profile, all).expect("everything fits");
        assert_eq!((made.streamed_bytes, made.ring_bytes), (0, 0));
        assert!(made.resident.iter().all(|&resident| resident));
        if stack.blocks() > 1 {
            let made = plan(&stack.profile, all - 1).expect("all but one byte");
            assert!(made.resident.iter().any(|&resident| !resident));
        }
    }
}

#[test]
fn small_tensors_stay_where_the_budget_allows_it() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let mut stack = Stack::random(&mut random);
        stack.profile.min_stream_bytes = 30_000;
        let small = |tensor: &Tensor| align_up(tensor.bytes) < 30_000;
        let (_, all) = stack.budgets();
        let mut large = vec![0; stack.profile.blocks()];
        for tensor in stack.profile.tensors.iter().filter(|tensor| !small(tensor)) {
            large[index(tensor.block)] += align_up(tensor.bytes);
        }
        let kept: u64 = all - large.iter().sum::<u64>();
        // Enough for all small tensors beside two slots for all the rest of any block.
        let budget = kept + 2 * large.iter().max().unwrap_or(&0);
        let Ok(made) = plan(&stack.profile, budget) else { continue };
        let tensors = stack.profile.tensors.iter().zip(&made.resident);
        assert!(tensors.filter(|(tensor, _)| small(tensor)).all(|(_, &resident)| resident));
        assert_eq!(made.slots() > 0, budget < all);
    }
}

/// What no policy can avoid is `W - M`; slots cost their own size in bytes streamed.
#[test]
fn little_more_is_streamed_than_the_budget_forces() {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let kinds = random.between(1, 2);
        let kinds: Vec<Vec<u64>> = (0..kinds)
            .map(|_| (0..random.between(8, 20)).map(|_| random.between(1000, 90_000)).collect())
            .collect();
        let mut profile = Profile::default();
        for block in 0..u32::try_from(random.between(16, 60)).expect("60") {
            let sizes = &kinds[index(block) % kinds.len()];
            profile.tensors.extend(sizes.iter().map(|&bytes| Tensor { block, bytes }));
            profile.order.push(block);
        }
        let all: u64 = profile.block_bytes().iter().sum();
        let least = profile.block_bytes().into_iter().max().expect("blocks");
        let budget = random.between(3 * least, all - 1);
        let made = plan(&profile, budget).expect("feasible");
        check(&profile, budget, &made);
        let forced = all - budget + made.ring_bytes;
        assert!(
            made.streamed_bytes <= forced + forced / 20 + 2 * least,
            "seed {seed}: {} streamed, {forced} forced",
            made.streamed_bytes
        );
    }
}

#[test]
fn large_models_are_planned() {
    let mut random = Random::new(7);
    let sizes: Vec<u64> = (0..24).map(|_| random.between(1 << 10, 60 << 20)).collect();
    let sixty = Stack::uniform(60, &sizes).profile;
    let mut many = Profile::default();
    for block in 0..400 {
        for _ in 0..random.between(1, 24) {
            many.tensors.push(Tensor { block, bytes: random.between(1 << 10, 60 << 20) });
        }
        many.order.push(block);
    }
    for profile in [sixty, many] {
        let all: u64 = profile.block_bytes().iter().sum();
        let made = plan(&profile, all / 3).expect("a third fits");
        assert!(made.streamed_bytes > all / 2);
        assert!(made.arena_bytes <= all / 3);
    }
}

/// What a plan may get wrong, each in a plan that is right otherwise.
#[test]
fn a_plan_that_is_not_legal_is_found() {
    let stack = Stack::uniform(8, &[4096, 1024, 2048]);
    let right = plan(&stack.profile, 24 << 10).expect("fits in part");
    assert!(right.streamed_bytes > 0 && right.resident_bytes > 0);
    let wrong = |what: &str, act: &dyn Fn(&mut Plan)| {
        let mut plan = right.clone();
        act(&mut plan);
        let found = legal(&stack.profile, &plan).expect_err(what);
        assert!(found.contains(what), "{what}: {found}");
    };
    legal(&stack.profile, &right).expect("nothing is wrong with it");
    let last = right.program.copies.len() - 1;
    wrong("not waited for", &|plan| {
        plan.program.copies.iter_mut().for_each(|copy| copy.wait = None);
    });
    wrong("waits for itself or a later one", &|plan| {
        let wait = plan.program.copies[0].wait.as_mut().expect("the ring goes around");
        (wait.position, wait.lag) = (3, 0);
    });
    wrong("misses bytes", &|plan| plan.program.uses[2].copies.end -= 1);
    wrong("misses bytes", &|plan| plan.program.uses[3].offsets[0] += 256);
    wrong("misses bytes", &|plan| plan.program.copies[last].bytes -= 256);
    let bytes_of = |copy: &Copy| stack.bytes(index(copy.tensor));
    let ends = |copy: &Copy| copy.source_offset + copy.bytes == bytes_of(copy);
    let end = right.program.copies.iter().position(ends).expect("every tensor ends");
    wrong("beyond its tensor", &|plan| plan.program.copies[end].bytes += 1);
    wrong("out of the arena", &|plan| plan.program.copies[0].target_offset = plan.arena_bytes);
    wrong("overwrites resident", &|plan| {
        plan.program.copies[0].target_offset = plan.ring_bytes;
    });
    wrong("out of order", &|plan| plan.program.uses.swap(0, 1));
    wrong("residents are not", &|plan| plan.resident[0] = !plan.resident[0]);
    let block = right.program.loads.iter().position(|loads| !loads.is_empty()).expect("residents");
    wrong("lies over another one", &|plan| {
        let other = plan.program.loads[7][0].target_offset;
        plan.program.loads[block][0].target_offset = other;
    });
    wrong("not brought whole", &|plan| plan.program.loads[block][0].bytes -= 1);
}

fn in_force(plan: &Plan) -> InForce<'_> {
    InForce { plan, passes: 20.0 }
}

#[test]
fn a_plan_after_another_is_legal_and_not_much_slower() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let stack = Stack::random(&mut random);
        let (least, all) = stack.budgets();
        let before = plan(&stack.profile, random.between(least, all)).expect("feasible");
        let budget = random.between(least, all);
        let after = plan_after(&stack.profile, budget, Some(in_force(&before))).expect("feasible");
        check(&stack.profile, budget, &after);
        let anew = plan(&stack.profile, budget).expect("feasible");
        let (Some(after_s), Some(anew_s)) = (after.period_s, anew.period_s) else { continue };
        let rate = stack.profile.times.as_ref().expect("it has a period").link.bytes_per_s;
        let spared_s = real(brought(&stack.profile, &before, &anew)) / rate / 20.0;
        assert!(after_s <= 1.007 * (anew_s + spared_s), "{after_s} s, {anew_s} s anew");
    }
}

/// Bytes that stay with `after` and are streamed with `before`.
fn brought(profile: &Profile, before: &Plan, after: &Plan) -> u64 {
    let new = |&number: &usize| after.resident[number] && !before.resident[number];
    (0..profile.tensors.len()).filter(new).map(|number| profile.tensors[number].bytes).sum()
}

/// Real models that were planned for before anything was known of them, over the link of a GPU.
#[test]
fn what_a_better_plan_brings_counts_with_what_it_saves() {
    let (mut all_near, mut all_anew) = (0, 0);
    for model in all() {
        let profile = model.profile(2, 450.0, 55e9);
        let bytes: u64 = profile.block_bytes().iter().sum();
        for budget in [bytes * 15 / 100, bytes / 4, bytes / 2] {
            let untimed = Profile { times: None, ..profile.clone() };
            let before = plan(&untimed, budget).expect("feasible");
            let after = |passes| {
                let in_force = InForce { plan: &before, passes };
                let after = plan_after(&profile, budget, Some(in_force)).expect("feasible");
                check(&profile, budget, &after);
                (after.period_s.expect("timed"), brought(&profile, &before, &after))
            };
            let ((near_s, near), (anew_s, anew)) = (after(20.0), after(1e9));
            let total_s = |period_s: f64, bytes| 20.0 * period_s + real(bytes) / 55e9;
            assert!(
                total_s(near_s, near) <= 1.003 * total_s(anew_s, anew),
                "{}: {near_s} s and {near} bytes, else {anew_s} s and {anew} bytes",
                model.name
            );
            (all_near, all_anew) = (all_near + near, all_anew + anew);
        }
    }
    assert!(3 * all_near < all_anew, "{all_near} of {all_anew} bytes are brought");
}

/// A real model's budget grows, or its blocks turn out to take longer.
#[test]
fn a_plan_after_another_moves_little_more_than_the_difference() {
    let (mut all_stayed, mut all_both) = (0, 0);
    for model in all() {
        let slow = model.profile(2, 60.0, 25e9);
        let fast = model.profile(2, 400.0, 25e9);
        for (profile, gigabytes) in [(&fast, 8), (&fast, 9), (&slow, 8)] {
            let before = plan(&fast, 8_000_000_000).expect("feasible");
            let budget = gigabytes * 1_000_000_000;
            let after = plan_after(profile, budget, Some(in_force(&before))).expect("feasible");
            check(profile, budget, &after);
            let place = |plan: &Plan| {
                let mut places = vec![None; profile.tensors.len()];
                for load in plan.program.loads.iter().flatten() {
                    places[index(load.tensor)] = Some(load.target_offset);
                }
                places
            };
            let (old, new) = (place(&before), place(&after));
            let bytes_of = |which: &dyn Fn(usize) -> bool| -> u64 {
                let tensors = (0..old.len()).filter(|&t| which(t));
                tensors.map(|t| profile.tensors[t].bytes).sum()
            };
            let both = bytes_of(&|t| old[t].is_some() && new[t].is_some());
            let stayed = bytes_of(&|t| old[t].is_some() && old[t] == new[t]);
            (all_stayed, all_both) = (all_stayed + stayed, all_both + both);
        }
    }
    assert!(all_stayed * 10 > all_both * 7, "{all_stayed} of {all_both} bytes stay");
}
