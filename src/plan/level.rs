//! How many bytes each block should stream, before whole tensors are picked.
//!
//! The family `s_i = clamp(alpha + beta * c_i, 0, b_i)` holds the optimum over all policies where
//! blocks differ little, and comes within 1 % of it elsewhere: `beta` 0 is the water level, a
//! negative one streams less where compute is long (copies are the limit), a positive one more
//! (compute is).

use super::problem::Problem;
use crate::units::{count, index, real};

/// What a member of the family is made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Goal {
    /// Streamed bytes for each second of compute.
    pub(super) beta: f64,
    /// How often a pass goes around the ring.
    pub(super) turns: f64,
    /// Only every so many-th block is streamed.
    pub(super) stride: usize,
    /// Device bytes to plan for; tensors never add up to just the budget.
    pub(super) memory: f64,
    /// Bytes are wanted in proportion to the `bias`-th power of how fast they come.
    pub(super) bias: i32,
    /// Blocks that stay whole: one, where an odd number of streamed uses would not take turns.
    pub(super) whole: Option<usize>,
}

/// Streamed bytes wanted of each block; `None` if all that may be streamed is not enough.
/// `slow` says of each block how many times as long as over the link its bytes take, or nothing.
pub(super) fn wanted(
    problem: &Problem,
    means: &[f64],
    slow: &[f64],
    goal: Goal,
) -> Option<Vec<f64>> {
    let family = Family::new(problem, means, slow, goal);
    let slope = goal.beta.abs() * means.iter().copied().fold(0.0, f64::max);
    let most = family.caps.iter().copied().fold(0.0, f64::max);
    let least_share = family.shares.iter().copied().fold(1.0, f64::min);
    let (mut low, mut high) = (-slope - 1.0, (most + 1.0) / least_share + slope);
    if family.memory(high) > goal.memory {
        return None;
    }
    for _ in 0..if family.shares.is_empty() { 50 } else { 100 } {
        let middle = f64::midpoint(low, high);
        if family.memory(middle) > goal.memory { low = middle } else { high = middle }
    }
    Some((0..family.caps.len()).map(|block| family.at(block, high)).collect())
}

struct Family<'a> {
    goal: Goal,
    means: &'a [f64],
    /// The most that each block may stream; 0 where it is not to.
    caps: Vec<f64>,
    counts: Vec<f64>,
    /// What of the level each block streams; empty: all of it.
    shares: Vec<f64>,
    total: f64,
}

impl<'a> Family<'a> {
    fn new(problem: &Problem, means: &'a [f64], slow: &[f64], goal: Goal) -> Self {
        let mut counts = vec![0.0; problem.bytes.len()];
        let mut caps = vec![0.0; problem.bytes.len()];
        let mut found = 0;
        for slot in &problem.uses {
            counts[slot.block] += 1.0;
            if counts[slot.block] > 1.0 {
                continue;
            }
            let splits = problem.splits(slot.block);
            if found % goal.stride == 0 {
                caps[slot.block] = real(splits.bytes(splits.last()));
            }
            found += usize::from(splits.last() > 0);
        }
        if let Some(block) = goal.whole {
            caps[block] = 0.0;
        }
        let slow = if goal.bias == 0 { &[] } else { slow };
        let shares = slow.iter().map(|slow| slow.powi(-goal.bias)).collect();
        Self { goal, means, caps, counts, shares, total: real(problem.total_bytes()) }
    }

    fn at(&self, block: usize, alpha: f64) -> f64 {
        let share = self.shares.get(block).copied().unwrap_or(1.0);
        (share * (alpha + self.goal.beta * self.means[block])).clamp(0.0, self.caps[block])
    }

    /// Residents and ring.
    fn memory(&self, alpha: f64) -> f64 {
        let (mut kept, mut moved) = (self.total, 0.0);
        for block in 0..self.caps.len() {
            let streamed = self.at(block, alpha);
            kept -= streamed;
            moved += streamed * self.counts[block];
        }
        kept + moved / self.goal.turns
    }
}

/// Mean seconds of a use of each block.
pub(super) fn mean_compute(problem: &Problem) -> Vec<f64> {
    let mut sums = vec![(0.0, 0_usize); problem.bytes.len()];
    for slot in &problem.uses {
        sums[slot.block].0 += slot.compute_s;
        sums[slot.block].1 += 1;
    }
    sums.into_iter().map(|(sum, uses)| sum / count(uses.max(1))).collect()
}

/// Error diffusion: for each block the split nearest to what is wanted and to what the blocks
/// before it left over, so that sums over any stretch of blocks stay close to what is wanted.
/// Starts with `phase` bytes left over. Blocks that no pass uses are left at split 0.
pub(super) fn diffuse(problem: &Problem, wanted: &[f64], phase: f64) -> Vec<u64> {
    let nearest =
        |block: usize, want| (wanted[block] > 0.0).then(|| problem.splits(block).nearest(want));
    diffuse_from(problem, vec![0; problem.bytes.len()], wanted, phase, nearest)
}

/// As [`diffuse`], from other splits on, and with the split that `pick` has for a block and what is
/// wanted of it; `None` leaves it as it is, and what was left over to the next one.
pub(super) fn diffuse_from(
    problem: &Problem,
    mut splits: Vec<u64>,
    wanted: &[f64],
    phase: f64,
    pick: impl Fn(usize, f64) -> Option<u64>,
) -> Vec<u64> {
    let mut seen = vec![false; problem.bytes.len()];
    let mut carry = phase;
    for slot in &problem.uses {
        if std::mem::replace(&mut seen[slot.block], true) {
            continue;
        }
        let want = wanted[slot.block] + carry;
        if let Some(split) = pick(slot.block, want) {
            splits[slot.block] = split;
            carry = want - real(streamed(problem, &splits, slot.block));
        }
    }
    splits
}

/// Streamed bytes of a block.
pub(super) fn streamed(problem: &Problem, splits: &[u64], block: usize) -> u64 {
    problem.splits(block).bytes(splits[index(block)])
}
