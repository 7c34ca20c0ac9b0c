//! The search where a pass has too many uses for the linear program, as where layers are streamed
//! one at a time: neighbours are solved for as groups, and what a group should stream is spread
//! over its uses.
//!
//! The family alone may be 7 % behind there: single uses are whole tensors, of unlike sizes and
//! times, and what its level cuts off of one is lost to those beside it. Here what one streams too
//! much or too little is made up for by the next ones.

use std::ops::Range;

use super::{Search, streamed_at_most};
use crate::plan::bound::{Group, solution_of_groups};
use crate::plan::level::diffuse;
use crate::plan::problem::Slot;
use crate::plan::trial::SLACK;
use crate::units::{real, whole};

/// So many groups, about: fine ones know more of when bytes are wanted, coarse ones leave more to
/// choose.
const GROUPS: [f64; 2] = [40.0, 80.0];
/// The uses of the largest sizes stay, of one size more each time: a ring has to hold the largest.
const SIZES: usize = 4;
/// How much of what a group streams is spread by compute, the rest by size.
const BY_COMPUTE: [f64; 3] = [0.0, 0.5, 1.0];
/// Whole tensors need a larger ring than the optimum has: shares of all to stream beyond it.
const EXCESS: [f64; 8] = [0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05];
/// The best so many are rounded in other ways too: bytes that error diffusion starts with, as
/// shares of the largest use's.
const ROUNDED_ANEW: usize = 4;
const PHASES: [f64; 7] = [-0.5, -0.375, -0.25, -0.125, 0.125, 0.25, 0.375];

/// Bytes wanted of each block, and the most of one that runs.
struct Wanted {
    bytes: Vec<f64>,
    largest: f64,
}

impl Search<'_> {
    /// Rounds what groups of uses should stream to whole tensors.
    pub(super) fn many(&mut self) {
        let problem = self.problem();
        let ran = problem.bytes.len() - problem.dormant.len();
        let good = self.trial.best_s <= problem.lower_bound_s() * (1.0 + SLACK);
        if good || problem.uses.len() != ran {
            return; // the program counts the bytes of a block that runs twice twice
        }
        let missing = real(problem.total_bytes().saturating_sub(problem.budget_bytes));
        let ways = GROUPS.map(|count| self.neighbours(count));
        let mut found: Vec<(f64, Wanted)> = Vec::new();
        for largest in self.largest_sizes() {
            let most = self.most_of_uses(largest);
            if most.iter().sum::<f64>() <= missing {
                break;
            }
            for groups in &ways {
                let made: Vec<Group> = groups.iter().map(|of| self.group(of, &most)).collect();
                // Where so much stays, there may be no room for the rest.
                let Ok((_, copied)) = solution_of_groups(problem, &made) else { continue };
                for by_compute in BY_COMPUTE {
                    let spread = self.spread(groups, &copied, &most, by_compute);
                    for excess in EXCESS {
                        let bytes = spread.iter().map(|bytes| bytes * (1.0 + excess)).collect();
                        let wanted = Wanted { bytes, largest: real(largest) };
                        let period_s = self.round(&wanted, 0.0);
                        found.extend(period_s.map(|period_s| (period_s, wanted)));
                    }
                }
            }
        }
        found.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (_, wanted) in found.iter().take(ROUNDED_ANEW) {
            for phase in PHASES {
                self.round(wanted, phase);
            }
        }
    }

    /// The largest sizes that uses can stream, descending.
    fn largest_sizes(&self) -> Vec<u64> {
        let problem = self.problem();
        let most = |slot: &Slot| streamed_at_most(problem, slot.block);
        let mut sizes: Vec<u64> = problem.uses.iter().map(most).filter(|&most| most > 0).collect();
        sizes.sort_unstable_by_key(|&bytes| std::cmp::Reverse(bytes));
        sizes.dedup();
        sizes.truncate(SIZES);
        sizes
    }

    /// What each use may stream where none streams more than `largest`.
    fn most_of_uses(&self, largest: u64) -> Vec<f64> {
        let problem = self.problem();
        let most = |slot: &Slot| {
            let splits = problem.splits(slot.block);
            real(splits.bytes(splits.within(largest)))
        };
        problem.uses.iter().map(most).collect()
    }

    /// About `count` groups of neighbouring uses, of equal sums of their shares of all bytes and of
    /// all compute.
    fn neighbours(&self, count: f64) -> Vec<Range<usize>> {
        let problem = self.problem();
        let (bytes, compute_s) = (real(problem.total_bytes()), problem.compute_s());
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let (mut groups, mut first, mut sum) = (Vec::new(), 0, 0.0_f64);
        for (at, slot) in problem.uses.iter().enumerate() {
            let before = sum;
            let of_bytes = share(real(problem.bytes[slot.block]), bytes);
            sum += (of_bytes + share(slot.compute_s, compute_s)) * count / 2.0;
            if before.floor() < sum.floor() || at + 1 == problem.uses.len() {
                groups.push(first..at + 1);
                first = at + 1;
            }
        }
        groups
    }

    fn group(&self, of: &Range<usize>, most: &[f64]) -> Group {
        let bytes: f64 = most[of.clone()].iter().sum();
        let largest = most[of.clone()].iter().copied().fold(0.0, f64::max);
        let parts = if largest > 0.0 { bytes / largest } else { 1.0 };
        let compute_s = self.problem().uses[of.clone()].iter().map(|slot| slot.compute_s).sum();
        Group { bytes, parts, compute_s }
    }

    /// Bytes wanted of each block: what is `copied` of each group, spread over its uses.
    fn spread(
        &self,
        groups: &[Range<usize>],
        copied: &[f64],
        most: &[f64],
        by_compute: f64,
    ) -> Vec<f64> {
        let problem = self.problem();
        let mut wanted = vec![0.0; problem.bytes.len()];
        for (group, copied) in groups.iter().zip(copied) {
            let uses = || group.clone().filter(|&at| most[at] > 0.0);
            let bytes: f64 = uses().map(|at| most[at]).sum();
            let compute_s: f64 = uses().map(|at| problem.uses[at].compute_s).sum();
            let per_second = if compute_s > 0.0 { by_compute / compute_s } else { 0.0 };
            let per_byte = (1.0 - per_second * compute_s) / bytes;
            for at in uses() {
                let Slot { block, compute_s } = problem.uses[at];
                wanted[block] = copied * (per_byte * most[at] + per_second * compute_s);
            }
        }
        wanted
    }

    /// The shorter period of two rings: the largest that the budget allows, and one that is passed
    /// once more.
    fn round(&mut self, wanted: &Wanted, phase: f64) -> Option<f64> {
        let mut splits = diffuse(self.problem(), &wanted.bytes, phase * wanted.largest);
        self.settle_dormant(&mut splits, whole(wanted.largest));
        let items = self.trial.items(&splits, 1);
        let copy_s = self.problem().link.seconds(items.bytes());
        if copy_s > self.trial.best_s * (1.0 + SLACK) {
            return None;
        }
        let least = self.least_turns(&splits, &items)?;
        let periods = [least, least + 1].map(|turns| self.trial.consider(splits.clone(), turns, 1));
        periods.into_iter().flatten().reduce(f64::min)
    }
}
