//! Decides which candidates are tried: members of the family, their neighbours, and the optimum
//! over all policies, rounded to tensors.

mod coarse;
mod many;
pub(super) mod near;

use self::near::Near;
use super::bound::solution_of;
use super::level::{Goal, diffuse, mean_compute, wanted};
use super::place::{Items, Placement};
use super::problem::Problem;
use super::trial::{Found, SLACK, Trial};
use crate::units::{count, index, narrow, real, whole};

/// Sizes of the ring that are tried, in such blocks.
const RINGS: [f64; 16] =
    [1.0, 1.12, 1.25, 1.4, 1.5, 1.65, 1.8, 2.0, 2.2, 2.4, 2.7, 3.0, 3.5, 4.0, 5.0, 7.0];
const FEW_TURNS: [u32; 6] = [2, 3, 4, 6, 8, 12];
/// Tensors never add up to just the budget: shares of the missing bytes to stream beyond them.
const EXCESS: [f64; 8] = [0.0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16];
const FINE_EXCESS: [f64; 6] = [0.0, 0.0015, 0.004, 0.008, 0.015, 0.03];
/// Bytes that error diffusion starts with, as shares of the largest block's.
const PHASES: [f64; 5] = [0.0, 0.2, 0.4, -0.2, -0.4];
/// Members whose neighbours are tried.
const REFINED: usize = 3;
/// Blocks with so few splits are searched one by one.
const COARSE: u64 = 4;
/// So few blocks are tried in every residency and in many places.
const VERY_FEW: usize = 6;
/// Up to so many whole blocks are laid anew.
const MOST_LAID_ANEW: usize = 32;
/// Uses up to which the linear program is solved: 3 ms for 60, 130 ms for 400.
const MOST_FOR_LP: usize = 100;
/// Uses up to which every number of turns is tried.
const FEW: usize = 24;
/// Uses of a cycle of several passes, and its passes.
const LONGEST_CYCLE: usize = 96;
const MOST_PASSES: u32 = 8;

/// The smallest budget for the caller's choice of residents: those, and one slot.
pub(super) fn manual_bytes(problem: &Problem) -> u64 {
    let stays = |block: usize| problem.manual.as_ref().is_some_and(|m| m.resident[block]);
    let (mut kept, mut most) = (0, 0);
    for (block, &bytes) in problem.bytes.iter().enumerate() {
        let streamed = if stays(block) { 0 } else { streamed_at_most(problem, block) };
        kept += bytes - streamed;
        most = most.max(streamed);
    }
    kept + most
}

fn streamed_at_most(problem: &Problem, block: usize) -> u64 {
    problem.splits(block).bytes(problem.splits(block).last())
}

/// One member of the family.
#[derive(Debug, Clone, Copy)]
struct Member {
    beta: f64,
    turns: u32,
    passes: u32,
    stride: usize,
    bias: i32,
    whole: Option<usize>,
}

struct Search<'a> {
    trial: Trial<'a>,
    means: Vec<f64>,
    slow: Vec<f64>,
}

/// The best plan for a problem that does not fit as a whole, but whose largest block does; `None`
/// where too little may be streamed. `near` tells what is on the device already.
pub(super) fn search(problem: &Problem, near: Option<&Near>) -> Option<Found> {
    let (means, slow) = (mean_compute(problem), problem.slow_blocks());
    let mut search = Search { trial: Trial::new(problem, near), means, slow };
    if let Some(manual) = &problem.manual {
        let whole = |block: usize| {
            if manual.resident[block] { 0 } else { problem.splits(block).last() }
        };
        let splits: Vec<u64> = (0..problem.bytes.len()).map(whole).collect();
        (1..=search.most_passes()).for_each(|passes| search.every_ring(&splits, passes));
    } else {
        search.family();
        search.follow();
    }
    search.trial.choose()
}

impl<'a> Search<'a> {
    fn problem(&self) -> &'a Problem {
        self.trial.problem
    }

    fn family(&mut self) {
        let problem = self.problem();
        let uses = problem.uses.len();
        let copies_s = problem.link.latency_s * count(uses);
        let missing = problem.total_bytes().saturating_sub(problem.budget_bytes);
        let strides: &[usize] = if copies_s > 0.005 * problem.link.seconds(problem.total_bytes()) {
            &[1, 2, 3, 4, 6, 8]
        } else {
            &[1]
        };
        for &stride in strides {
            self.stride(stride, 1, missing);
        }
        let mut enough_s = 0.0;
        if uses <= MOST_FOR_LP && self.trial.best_s > problem.lower_bound_s() * 1.01 {
            // The solver may fail, on numbers that differ by many orders of magnitude.
            let optimum = solution_of(problem).ok();
            if let Some((optimum_s, copied)) = &optimum {
                enough_s = optimum_s * (1.0 + SLACK);
                self.round_optimum(copied, 1);
            }
            for passes in 2..=self.most_passes() {
                if self.trial.best_s <= enough_s {
                    break;
                }
                self.stride(1, passes, missing);
                if let Some((_, copied)) = &optimum {
                    self.round_optimum(copied, passes);
                }
            }
        }
        if uses > MOST_FOR_LP {
            self.many();
        }
        let coarse = problem.kinds.iter().all(|kind| kind.count() <= COARSE);
        if coarse && uses <= MOST_FOR_LP && self.trial.best_s > problem.lower_bound_s() * 1.01 {
            self.climb();
            if uses <= MOST_LAID_ANEW && self.trial.best_s > enough_s * 1.01 {
                self.lay_anew(enough_s);
            }
            if uses <= VERY_FEW && problem.bytes.len() <= VERY_FEW {
                self.every_residency();
            }
        }
        // Small budgets: everything is streamed, through all the memory there is.
        self.every_ring(&self.all_streamed(), 1);
    }

    /// Passes that a cycle may have: the more, the less a ring costs that is passed a whole number
    /// of times.
    fn most_passes(&self) -> u32 {
        let uses = self.problem().uses.len().max(1);
        if self.problem().one_pass { 1 } else { narrow(LONGEST_CYCLE / uses).clamp(1, MOST_PASSES) }
    }

    /// All betas and numbers of turns; then the neighbours of the best.
    fn stride(&mut self, stride: usize, passes: u32, missing: u64) {
        let problem = self.problem();
        let blocks = self.means.iter().filter(|&&mean| mean > 0.0).count().max(3);
        let spread = real(missing) * count(blocks) / count(blocks - 2);
        let compute_s = self.means.iter().sum::<f64>();
        let even =
            if compute_s > 0.0 { spread.min(real(problem.total_bytes())) / compute_s } else { 0.0 };
        let rate = problem.link.bytes_per_s;
        let betas = [0.0, even, -rate, -rate / 2.0, even / 2.0, 1.5 * even];
        // Where all uses take equal time, all betas are one.
        let first_s = problem.uses.first().map_or(0.0, |slot| slot.compute_s);
        let even_uses =
            problem.uses.iter().all(|slot| (slot.compute_s - first_s).abs() < 1e-3 * first_s);
        let betas = if compute_s > 0.0 && !even_uses { &betas[..] } else { &betas[..1] };
        let uses = problem.uses.len().div_ceil(stride) * index(passes);
        let turns = if uses <= FEW { (1..=narrow(uses)).collect() } else { turns_of(uses) };
        let mut found: Vec<(f64, Member)> = Vec::new();
        let odd = if uses % 2 == 1 { self.smallest_once() } else { None };
        // Equal bytes of all, equal seconds, and first what comes fast.
        let biases: &[i32] = if self.slow.is_empty() { &[0] } else { &[0, 1, 8] };
        let spared: &[Option<usize>] = if odd.is_some() { &[None, odd] } else { &[None] };
        for &beta in betas {
            for &turns in &turns {
                for (&whole, &bias) in
                    spared.iter().flat_map(|w| biases.iter().map(move |b| (w, b)))
                {
                    let member = Member { beta, turns, passes, stride, bias, whole };
                    let period_s = self.member(member, &EXCESS, &[0.0], 1);
                    found.extend(period_s.map(|period_s| (period_s, member)));
                }
            }
        }
        found.sort_by(|a, b| a.0.total_cmp(&b.0));
        // The best of each slope: neighbours of one another lead to the same plans.
        let mut slopes: Vec<(u64, i32, Option<usize>)> = Vec::new();
        found.retain(|(_, member)| {
            let slope = (member.beta.to_bits(), member.bias, member.whole);
            let new = !slopes.contains(&slope);
            slopes.extend(new.then_some(slope));
            new
        });
        for (_, member) in found.into_iter().take(REFINED) {
            for turns in member.turns.saturating_sub(1).max(1)..=member.turns + 1 {
                self.member(Member { turns, ..member }, &FINE_EXCESS, &PHASES, 3);
            }
        }
    }

    /// Rounds the optimum over all policies to whole tensors: where blocks differ much in size and
    /// time, the family may miss it by 3 %.
    fn round_optimum(&mut self, copied: &[f64], passes: u32) {
        let problem = self.problem();
        let mut wanted = vec![0.0; problem.bytes.len()];
        for (slot, bytes) in problem.uses.iter().zip(copied) {
            wanted[slot.block] = *bytes;
        }
        let most = wanted.iter().copied().fold(0.0, f64::max);
        // The ring is what is streamed beyond what does not fit.
        let moved: f64 = problem.uses.iter().map(|slot| wanted[slot.block]).sum();
        let kept = real(problem.total_bytes()) - wanted.iter().sum::<f64>();
        let ring = (real(problem.budget_bytes) - kept).max(1.0);
        let turns = f64::from(passes) * moved / ring;
        let turns = u32::try_from(whole(turns)).unwrap_or(u32::MAX).max(1);
        let near = turns.saturating_sub(1).max(1)..=turns.saturating_add(2);
        for excess in [0.0, 0.005, 0.01, 0.02, 0.03, 0.05] {
            let more: Vec<f64> = wanted.iter().map(|bytes| bytes * (1.0 + excess)).collect();
            for phase in [0.0, 0.25, -0.25] {
                let mut splits = diffuse(problem, &more, phase * most);
                self.settle_dormant(&mut splits, whole(most));
                for turns in near.clone() {
                    self.trial.consider(splits.clone(), turns, passes);
                }
            }
        }
    }

    /// The smallest block that runs an odd number of times: without it the rest take turns evenly.
    fn smallest_once(&self) -> Option<usize> {
        let mut counts = vec![0_usize; self.problem().bytes.len()];
        self.problem().uses.iter().for_each(|slot| counts[slot.block] += 1);
        let once = (0..counts.len()).filter(|&block| counts[block] % 2 == 1);
        once.min_by_key(|&block| self.problem().bytes[block])
    }

    /// The period of a member of the family, if it fits the budget and may be among the best: the
    /// shortest of the first `most` excesses that fit.
    fn member(
        &mut self,
        member: Member,
        excesses: &[f64],
        phases: &[f64],
        most: usize,
    ) -> Option<f64> {
        let Member { beta, turns, passes, stride, bias, whole: spared } = member;
        let budget = real(self.problem().budget_bytes);
        let missing = real(self.problem().total_bytes()) - budget;
        let per_pass = f64::from(turns) / f64::from(passes);
        let mut best: Option<f64> = None;
        let mut fitted = 0;
        for excess in excesses {
            let memory = budget - excess * missing;
            let goal = Goal { beta, turns: per_pass, stride, memory, bias, whole: spared };
            let wanted = wanted(self.problem(), &self.means, &self.slow, goal);
            let Some(wanted) = wanted else { break };
            let moved: f64 = self.problem().uses.iter().map(|slot| wanted[slot.block]).sum();
            let copy_s = moved / self.problem().link.bytes_per_s;
            if copy_s.max(self.problem().compute_s()) > self.trial.best_s * (1.0 + SLACK) {
                break; // more excess only streams more
            }
            let largest = wanted.iter().copied().fold(0.0, f64::max);
            let ring = whole(moved / per_pass);
            let mut fits = false;
            for phase in phases {
                let mut splits = diffuse(self.problem(), &wanted, phase * largest);
                self.settle_dormant(&mut splits, ring);
                if let Some(period_s) = self.trial.consider(splits, turns, passes) {
                    best = Some(best.map_or(period_s, |best| best.min(period_s)));
                    fits = true;
                }
            }
            fitted += usize::from(fits);
            if fitted == most {
                break;
            }
        }
        best
    }

    /// What no pass uses streams as much as the ring holds.
    fn settle_dormant(&self, splits: &mut [u64], ring_bytes: u64) {
        for &block in &self.problem().dormant {
            splits[block] = self.problem().splits(block).within(ring_bytes);
        }
    }

    /// One residency through rings of every size that the budget allows.
    fn every_ring(&mut self, splits: &[u64], passes: u32) {
        let items = self.trial.items(splits, passes);
        let copies_s = self.problem().link.seconds(items.bytes()) / f64::from(passes);
        if copies_s > self.trial.best_s * (1.0 + SLACK) {
            return;
        }
        let Some(least) = self.least_turns(splits, &items) else { return };
        let uses = narrow(items.of_use.iter().filter(|range| !range.is_empty()).count());
        let all: Vec<u32> = (least..=uses.max(least)).collect();
        let step = all.len().div_ceil(40).max(1);
        for &turns in all.iter().step_by(step) {
            self.trial.consider(splits.to_vec(), turns, passes);
        }
    }

    /// How often the largest ring that the budget allows is passed; `None` where there is no room.
    fn least_turns(&self, splits: &[u64], items: &Items) -> Option<u32> {
        let room = self.trial.aligned_room(splits)?;
        let mut placement = Placement::default();
        (room >= items.most_of_use()).then(|| placement.fill(items, room))?;
        Some(placement.turns.max(1))
    }
}

/// Numbers of turns of a pass of many uses: for rings of a few blocks, and for passes in which only
/// a few blocks are streamed, whole.
fn turns_of(uses: usize) -> Vec<u32> {
    let ring = |ring: &f64| u32::try_from(whole((count(uses) / ring).round())).unwrap_or(u32::MAX);
    let mut turns: Vec<u32> = RINGS.iter().map(ring).chain(FEW_TURNS).collect();
    turns.sort_unstable_by_key(|&turns| std::cmp::Reverse(turns));
    turns.dedup();
    turns.retain(|&turns| turns >= 2);
    turns
}
