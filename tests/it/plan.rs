//! Goal: a plan keeps every promise that the engine relies on, for any model and any budget.
//! Method: seeded random models; every address, wait and sum of the plan is checked.

use std::collections::BTreeMap;

use dgls_core::plan::{Copy, Plan, Profile, Tensor, plan};
use dgls_core::{Error, align_up};

use crate::random::Random;
use crate::stack::{Stack, index};

const SEEDS: u64 = 1500;

/// Checks what must hold for any plan.
fn check(profile: &Profile, budget: u64, plan: &Plan) {
    assert!(plan.arena_bytes() <= budget, "{} of {budget} bytes", plan.arena_bytes());
    assert_eq!(plan.resident.len(), profile.tensors.len());
    let program = &plan.program;
    assert_eq!(index(program.cycle), index(program.passes) * profile.order.len());
    for (position, used) in program.uses.iter().enumerate() {
        if position < index(program.cycle) {
            assert_eq!(used.block, profile.order[position % profile.order.len()]);
        } else {
            assert!(!profile.order.contains(&used.block), "only dormant blocks stand behind");
        }
        let of_block = |(_, tensor): &(usize, &Tensor)| tensor.block == used.block;
        let tensors = profile.tensors.iter().enumerate().filter(of_block);
        let places: Vec<(usize, u64)> =
            tensors.zip(&used.offsets).map(|((n, _), &offset)| (n, offset)).collect();
        assert_eq!(places.len(), used.offsets.len());
        let found = program.copies_of(used).iter().chain(&program.loads[index(used.block)]);
        let mut found: Vec<(usize, u64)> = found.map(place).collect();
        found.sort_unstable();
        let mut wanted = places.clone();
        wanted.sort_unstable();
        assert_eq!(found, wanted, "each tensor has one copy, to where the block looks for it");
        for copy in program.copies_of(used) {
            assert!(!plan.resident[index(copy.tensor)]);
        }
    }
    let loads = program.loads.iter().flatten();
    assert!(loads.clone().all(|load| plan.resident[index(load.tensor)]));
    disjoint(profile, plan);
    waits(plan);
}

fn place(copy: &Copy) -> (usize, u64) {
    assert_eq!(copy.source_offset, 0);
    (index(copy.tensor), copy.target_offset)
}

/// Residents, and what one use streams, lie apart; what two uses share is ordered by a wait.
fn disjoint(profile: &Profile, plan: &Plan) {
    let range = |copy: &Copy| {
        let bytes = profile.tensors[index(copy.tensor)].bytes;
        assert_eq!(copy.bytes, bytes);
        assert_eq!(copy.target_offset % 256, 0);
        (copy.target_offset, copy.target_offset + align_up(bytes))
    };
    let residents: Vec<(u64, u64)> = plan.program.loads.iter().flatten().map(range).collect();
    for used in &plan.program.uses {
        let streamed = plan.program.copies_of(used).iter().map(range);
        let mut live: Vec<(u64, u64)> = residents.iter().copied().chain(streamed).collect();
        live.sort_unstable();
        assert!(live.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{live:?}");
        assert!(live.last().is_none_or(|last| last.1 <= plan.arena_bytes()));
    }
}

/// Two cycles written out: a copy waits for the last use before it that had any of its bytes.
fn waits(plan: &Plan) {
    let program = &plan.program;
    let cycle = index(program.cycle);
    for (position, used) in program.uses.iter().enumerate().take(cycle) {
        for copy in program.copies_of(used) {
            let (start, end) = (copy.target_offset, copy.target_offset + align_up(copy.bytes));
            let overlaps = |position: usize| {
                let other = &program.uses[position % cycle];
                program.copies_of(other).iter().any(|other| {
                    other.target_offset < end && start < other.target_offset + align_up(other.bytes)
                })
            };
            let last = (0..cycle + position).rev().find(|&before| overlaps(before));
            let Some(wait) = copy.wait else {
                panic!("a copy of the cycle waits, at the latest for itself one cycle before");
            };
            let waited = cycle + index(wait.position) - index(wait.lag) * cycle;
            assert!(waited < cycle + position, "a wait for what comes later");
            assert!(last.is_some_and(|last| last <= waited), "{position}: {wait:?}, not {last:?}");
        }
    }
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
        assert_eq!((made.streamed_bytes, made.slots), (0, 0));
        assert!(made.resident.iter().all(|&resident| resident));
        if stack.blocks() > 1 {
            let made = plan(&stack.profile, all - 1).expect("all but one byte");
            assert!(made.resident.iter().any(|&resident| !resident));
        }
    }
}

/// By more than a tensor, between plans of one kind: two slots take more bytes than one and overlap
/// better; an even number of streamed uses takes more than an odd one and keeps addresses.
#[test]
fn more_budget_never_streams_more() {
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let mut stack = Stack::random(&mut random);
        stack.profile.min_stream_bytes = 0;
        let (least, all) = stack.budgets();
        let tensor_bytes = stack.profile.tensors.iter().map(|tensor| align_up(tensor.bytes));
        let largest = tensor_bytes.max().expect("tensors");
        let mut fewest = BTreeMap::new();
        for step in 0..=40 {
            let budget = least + (all - least) * step / 40;
            let made = plan(&stack.profile, budget).expect("feasible");
            let kind = (made.slots, made.program.passes);
            let fewest = fewest.entry(kind).or_insert(made.streamed_bytes);
            assert!(
                made.streamed_bytes <= *fewest + largest,
                "seed {seed}: {budget} bytes stream {}, fewer bytes {fewest}",
                made.streamed_bytes
            );
            *fewest = made.streamed_bytes.min(*fewest);
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
        assert_eq!(made.slots, if budget < all { 2 } else { 0 });
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
        let forced = all - budget + u64::from(made.slots) * made.slot_bytes;
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
        assert!(made.arena_bytes() <= all / 3);
    }
}
