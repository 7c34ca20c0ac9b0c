//! Plans near the one in force: what it has on the device need not be brought.
//!
//! Other residents may be as good by their period, and cost gigabytes over the link: there are many
//! ways to the same sums. So the best plan found is followed, block by block, by what the plan in
//! force streams and a few tensors more or less; what a plan brings counts as a part of its period.

use std::collections::HashMap;
use std::rc::Rc;

use super::{FINE_EXCESS, Search};
use crate::plan::level::{diffuse_from, streamed};
use crate::plan::problem::Problem;
use crate::plan::{InForce, Profile};
use crate::units::{index, narrow, real};

/// By how much of a step the sum over blocks may be off before it is taken.
const RELUCTANCE: [f64; 2] = [1.0, 0.5];

/// What the plan in force streams.
#[derive(Debug)]
pub(in crate::plan) struct Near {
    /// For each block, for each of its tensors whether it is streamed.
    streamed: Vec<Vec<bool>>,
    /// Passes in which what is brought has to pay.
    passes: f64,
}

impl Near {
    /// `None` where the plan in force has other tensors.
    pub(in crate::plan) fn new(profile: &Profile, before: &InForce<'_>) -> Option<Self> {
        if before.plan.resident.len() != profile.tensors.len() {
            return None;
        }
        let mut streamed = vec![Vec::new(); profile.blocks()];
        for (tensor, stays) in std::iter::zip(&profile.tensors, &before.plan.resident) {
            streamed[index(tensor.block)].push(!stays);
        }
        Some(Self { streamed, passes: before.passes.max(1.0) })
    }

    /// What is streamed now and stays with `splits` has to be brought: what that adds to each of
    /// the passes in which it has to pay, seconds.
    pub(in crate::plan) fn share_s(&self, problem: &Problem, splits: &[u64]) -> f64 {
        let of_block = |(block, streamed): (usize, &Vec<bool>)| -> u64 {
            let then = problem.splits(block).tensors(splits[block]).unwrap_or_default();
            let stays = |&tensor: &usize| streamed[tensor] && !then.contains(&narrow(tensor));
            let tensors = (0..streamed.len()).filter(stays);
            tensors.map(|tensor| problem.tensors[block][tensor]).sum()
        };
        let brought: u64 = self.streamed.iter().enumerate().map(of_block).sum();
        real(brought) / problem.link.bytes_per_s / self.passes
    }

    /// The splits of the plan in force; `None` if the problem has other ones.
    fn splits(&self, problem: &Problem) -> Option<Vec<u64>> {
        let of_block = |(block, streamed): (usize, &Vec<bool>)| {
            let splits = problem.splits(block);
            let count = streamed.iter().filter(|&&streamed| streamed).count();
            let is_it = |set: &[u32]| {
                set.len() == count && set.iter().all(|&tensor| streamed[index(tensor)])
            };
            (0..splits.count()).find(|&split| splits.tensors(split).is_some_and(is_it))
        };
        self.streamed.iter().enumerate().map(of_block).collect()
    }
}

/// For each block the splits that stream all of what `start` streams of it, or nothing besides.
fn nested(problem: &Problem, start: &[u64]) -> Vec<Rc<[u64]>> {
    let mut known: HashMap<(usize, u64), Rc<[u64]>> = HashMap::new();
    let of_block = |(block, &split): (usize, &u64)| {
        let splits = problem.splits(block);
        let tensors = |split: u64| splits.tensors(split).unwrap_or_default();
        let within = |small: &[u32], large: &[u32]| small.iter().all(|one| large.contains(one));
        let this = tensors(split);
        let related = |&other: &u64| within(tensors(other), this) || within(this, tensors(other));
        let ways = known.entry((problem.kind_of[block], split));
        Rc::clone(ways.or_insert_with(|| (0..splits.count()).filter(related).collect()))
    };
    start.iter().enumerate().map(of_block).collect()
}

impl Search<'_> {
    /// Follows the fastest plan found by ones that are near the plan in force.
    pub(super) fn follow(&mut self) {
        let problem = self.problem();
        let Some(start) = self.trial.near.and_then(|near| near.splits(problem)) else { return };
        let Some(best) = self.trial.fastest().cloned() else { return };
        let ways = nested(problem, &start);
        for reluctance in RELUCTANCE {
            // Another of its `ways` only where the sum so far is off by more than that step.
            let pick = |block: usize, want: f64| {
                let bytes = |split: u64| real(problem.splits(block).bytes(split));
                let off = |split: u64| (bytes(split) - want).abs();
                let before = start[block];
                let nearest =
                    ways[block].iter().copied().min_by(|&a, &b| off(a).total_cmp(&off(b)));
                nearest
                    .filter(|&near| off(before) > reluctance * (bytes(near) - bytes(before)).abs())
                    .or(Some(before))
            };
            for excess in FINE_EXCESS {
                let bytes = |block| real(streamed(problem, &best.splits, block)) * (1.0 + excess);
                let wanted: Vec<f64> = (0..start.len()).map(bytes).collect();
                let splits = diffuse_from(problem, start.clone(), &wanted, 0.0, pick);
                for turns in best.turns.saturating_sub(1).max(1)..=best.turns + 2 {
                    self.trial.consider(splits.clone(), turns, best.passes);
                }
            }
        }
    }
}
