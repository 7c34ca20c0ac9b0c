//! The search where blocks can hardly be split: single blocks change, or swap, what they stream,
//! and are laid anew beside each other.

use super::Search;
use crate::units::{count, whole};

/// Rounds over all blocks, at most.
const ROUNDS: usize = 8;
/// So many residencies are laid anew, each block beside so many before and behind it.
const LAID_ANEW: usize = 8;
const NEAR: usize = 3;

impl Search<'_> {
    /// Where blocks can hardly be split, sums of what is wanted say little of single blocks: from
    /// the fastest plan, and from none at all, blocks change their split for as long as that helps.
    pub(super) fn climb(&mut self) {
        let problem = self.problem();
        let blocks = problem.bytes.len();
        let found = self.trial.fastest().map(|found| found.splits.clone());
        let fastest = (found.unwrap_or_else(|| vec![0; blocks]), self.trial.best_s);
        for (mut splits, mut best_s) in [fastest, (self.all_streamed(), f64::INFINITY)] {
            best_s = self.every_turn(&splits).unwrap_or(best_s).min(best_s);
            for _ in 0..ROUNDS {
                let before_s = best_s;
                for block in 0..blocks {
                    for split in 0..problem.splits(block).count() {
                        let kept = std::mem::replace(&mut splits[block], split);
                        match self.every_turn(&splits).filter(|_| split != kept) {
                            Some(period_s) if period_s < best_s => best_s = period_s,
                            _ => splits[block] = kept,
                        }
                    }
                    for other in self.alike(&splits, block) {
                        splits.swap(block, other);
                        match self.every_turn(&splits) {
                            Some(period_s) if period_s < best_s => best_s = period_s,
                            _ => splits.swap(block, other),
                        }
                    }
                }
                if best_s >= before_s {
                    break;
                }
            }
        }
    }

    /// The nearest blocks of the same sizes, before and behind, that are split in another way.
    fn alike(&self, splits: &[u64], block: usize) -> impl Iterator<Item = usize> + use<> {
        let kind_of = &self.problem().kind_of;
        let other =
            |&other: &usize| kind_of[other] == kind_of[block] && splits[other] != splits[block];
        let before = (0..block).rev().find(other);
        let behind = (block + 1..splits.len()).find(other);
        [before, behind].into_iter().flatten()
    }

    /// Where so many of the smallest blocks stay, the others go to places of their own: a ring
    /// wastes its end on whole blocks of unlike sizes.
    pub(super) fn lay_anew(&mut self, enough_s: f64) {
        let problem = self.problem();
        let mut order: Vec<usize> = (0..problem.bytes.len()).collect();
        order.sort_by_key(|&block| problem.bytes[block]);
        let mut splits = self.all_streamed();
        let mut found = Vec::new();
        for block in order {
            splits[block] = 0;
            found.extend(self.every_turn(&splits).map(|period_s| (period_s, splits.clone())));
        }
        found.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (_, splits) in found.into_iter().take(LAID_ANEW) {
            if self.trial.best_s <= enough_s {
                break;
            }
            self.trial.try_places(&splits, NEAR);
        }
    }

    pub(super) fn all_streamed(&self) -> Vec<u64> {
        (0..self.problem().bytes.len()).map(|block| self.problem().splits(block).last()).collect()
    }

    /// Every residency of a few whole blocks, in all sorts of places.
    pub(super) fn every_residency(&mut self) {
        let blocks = self.problem().bytes.len();
        for set in 0..1_u64 << blocks {
            let last = |block: usize| self.problem().splits(block).last();
            let splits: Vec<u64> =
                (0..blocks).map(|block| last(block) * (set >> block & 1)).collect();
            self.trial.try_places(&splits, usize::MAX);
        }
    }

    /// The shortest period of a residency, through rings of one to four of its uses.
    fn every_turn(&mut self, splits: &[u64]) -> Option<f64> {
        let streamed = self.problem().uses.iter().filter(|slot| splits[slot.block] > 0).count();
        let mut best: Option<f64> = None;
        for ring in [1.0, 1.5, 2.0, 3.0, 4.0] {
            let turns = u32::try_from(whole((count(streamed) / ring).ceil())).unwrap_or(u32::MAX);
            let period_s = self.trial.consider(splits.to_vec(), turns.max(1), 1);
            best = [best, period_s].into_iter().flatten().reduce(f64::min);
        }
        best
    }
}
