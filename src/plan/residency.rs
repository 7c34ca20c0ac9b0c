//! Picks the resident tensors: the water level over whole tensors.
//!
//! Every byte of slot is a byte more to copy in each pass, so a plan wants all blocks to stream
//! the same amount `z` and the slots to be just that large. A level is feasible when
//! `W - sum(s_i) + slots * max(s_i) <= budget`, where `s_i <= z` is the largest sum of tensors
//! of block i. The smallest feasible levels are tried. Where tensors are too few to stop just at
//! the level, bytes would be left over: error diffusion gives them out evenly, block by block.

use std::collections::{BTreeSet, HashMap};

use super::Profile;
use crate::error::{Error, Result};
use crate::units::{align_up, index, narrow};

/// At most this many sums are kept for one block; more only refine a level by a few bytes.
const SUMS: usize = 4096;
/// At most this many levels are looked at, and this many feasible ones tried in full.
const LEVELS: usize = 4096;
const TRIED: usize = 16;

/// The residency, before addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) resident: Vec<bool>,
    pub(super) slots: u32,
    pub(super) slot_bytes: u64,
}

/// The ways to split one kind of block: reachable sums of streamed bytes, each with its tensors.
type Sums = Vec<(u64, Vec<u32>)>;

/// The blocks of a profile, with equal blocks sharing their sums.
struct Blocks {
    tensors: Vec<Vec<usize>>,
    kinds: Vec<Sums>,
    kind_of: Vec<usize>,
    uses: Vec<u64>,
    /// Blocks in order of first use, then the dormant ones.
    sequence: Vec<usize>,
    total_bytes: u64,
}

impl Blocks {
    fn new(profile: &Profile, min_stream_bytes: u64) -> Self {
        let mut tensors = vec![Vec::new(); profile.blocks()];
        for (number, tensor) in profile.tensors.iter().enumerate() {
            tensors[index(tensor.block)].push(number);
        }
        let mut known: HashMap<Vec<u64>, usize> = HashMap::new();
        let mut kinds = Vec::new();
        let kind_of = tensors
            .iter()
            .map(|numbers| {
                let sizes: Vec<u64> =
                    numbers.iter().map(|&n| align_up(profile.tensors[n].bytes)).collect();
                *known.entry(sizes).or_insert_with_key(|sizes| {
                    kinds.push(subset_sums(sizes, min_stream_bytes));
                    kinds.len() - 1
                })
            })
            .collect();
        let mut uses = vec![0; tensors.len()];
        for &block in &profile.order {
            uses[index(block)] += 1;
        }
        let mut sequence: Vec<usize> = profile.order.iter().map(|&block| index(block)).collect();
        sequence.extend(0..tensors.len());
        let mut seen = vec![false; tensors.len()];
        sequence.retain(|&block| !std::mem::replace(&mut seen[block], true));
        let total_bytes = profile.block_bytes().iter().sum();
        Self { tensors, kinds, kind_of, uses, sequence, total_bytes }
    }

    /// The ways to split a block, by ascending streamed bytes; the first streams nothing.
    fn splits(&self, block: usize) -> &Sums {
        &self.kinds[self.kind_of[block]]
    }

    /// For each block, which split streams the most within a level.
    fn at(&self, level: u64) -> Vec<usize> {
        let split = |block| self.splits(block).partition_point(|(sum, _)| *sum <= level) - 1;
        (0..self.tensors.len()).map(split).collect()
    }

    /// Streamed bytes of each block under an assignment of splits.
    fn streamed(&self, splits: &[usize]) -> Vec<u64> {
        splits.iter().enumerate().map(|(block, &split)| self.splits(block)[split].0).collect()
    }

    fn levels(&self) -> Vec<u64> {
        let all: BTreeSet<u64> =
            self.kinds.iter().flatten().map(|(sum, _)| *sum).filter(|&sum| sum > 0).collect();
        thin(all.into_iter().collect(), LEVELS)
    }
}

/// Sums of the tensors that may be streamed, ascending, each with one set that reaches it.
fn subset_sums(sizes: &[u64], min_stream_bytes: u64) -> Sums {
    let mut sums: Sums = vec![(0, Vec::new())];
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(sizes[i]));
    for i in order.into_iter().filter(|&i| sizes[i] >= min_stream_bytes) {
        let with: Sums = sums
            .iter()
            .map(|(sum, set)| {
                let mut set = set.clone();
                set.push(narrow(i));
                (sum + sizes[i], set)
            })
            .collect();
        sums.extend(with);
        sums.sort_by_key(|(sum, _)| *sum); // stable: of equal sums the one with fewer copies stays
        sums.dedup_by_key(|(sum, _)| *sum);
        sums = thin(sums, SUMS);
    }
    sums
}

/// Keeps at most `limit` entries, evenly, with the first and the last.
fn thin<T: Clone>(all: Vec<T>, limit: usize) -> Vec<T> {
    if all.len() <= limit {
        return all;
    }
    (0..limit).map(|k| all[k * (all.len() - 1) / (limit - 1)].clone()).collect()
}

/// Chooses residency and slots for a budget.
pub(super) fn choose(profile: &Profile, budget_bytes: u64) -> Result<Choice> {
    let block_bytes = profile.block_bytes();
    let total: u64 = block_bytes.iter().sum();
    if total <= budget_bytes {
        return Ok(Choice { resident: vec![true; profile.tensors.len()], slots: 0, slot_bytes: 0 });
    }
    let (block, &need_bytes) =
        block_bytes.iter().enumerate().max_by_key(|&(_, bytes)| bytes).unwrap_or((0, &0));
    if need_bytes > budget_bytes {
        return Err(Error::BudgetTooSmall { block: narrow(block), need_bytes, budget_bytes });
    }
    // Two slots before one, small tensors resident before everything streamed; the last always
    // works: all of every block through one slot of the largest block.
    let attempts = [(profile.min_stream_bytes, 2), (0, 2), (profile.min_stream_bytes, 1), (0, 1)];
    let found = attempts.into_iter().find_map(|(min_stream_bytes, slots)| {
        best_level(&Blocks::new(profile, min_stream_bytes), budget_bytes, slots)
    });
    found.ok_or_else(|| Error::Internal(format!("no plan for {budget_bytes} bytes")))
}

/// The assignment that streams the least in a pass; of equal ones the smallest slot.
fn best_level(blocks: &Blocks, budget_bytes: u64, slots: u32) -> Option<Choice> {
    let cost = |splits: &[usize]| {
        let streamed = blocks.streamed(splits);
        let kept = blocks.total_bytes - streamed.iter().sum::<u64>();
        let slot_bytes = streamed.iter().copied().max().unwrap_or(0);
        let memory = kept.checked_add(u64::from(slots) * slot_bytes)?;
        let per_pass: u64 = streamed.iter().zip(&blocks.uses).map(|(s, uses)| s * uses).sum();
        (memory <= budget_bytes).then_some((per_pass, slot_bytes))
    };
    let levels = blocks.levels().into_iter().map(|level| blocks.at(level));
    let feasible = levels.filter(|splits| cost(splits).is_some()).take(TRIED);
    let candidates = feasible.flat_map(|level| {
        let spread = (0..=4).map(|phase| diffuse(blocks, &level, budget_bytes, slots, phase));
        spread.collect::<Vec<_>>().into_iter().chain([level])
    });
    let evened = candidates.flat_map(|splits| {
        let even = make_even(blocks, &splits, slots);
        even.into_iter().chain([splits])
    });
    let evened = evened.filter_map(|splits| fill(blocks, splits, budget_bytes, slots));
    let (_, splits) = evened
        .filter_map(|splits| {
            cost(&splits).map(|found| ((is_odd(blocks, &splits, slots), found), splits))
        })
        .min_by_key(|&(found, _)| found)?;
    let mut resident = vec![true; blocks.tensors.iter().map(Vec::len).sum()];
    for (block, numbers) in blocks.tensors.iter().enumerate() {
        for &i in &blocks.splits(block)[splits[block]].1 {
            resident[numbers[index(i)]] = false;
        }
    }
    let slot_bytes = blocks.streamed(&splits).into_iter().max().unwrap_or(0);
    Some(Choice { resident, slots, slot_bytes })
}

/// Error diffusion: of what a level streams only as much as the budget needs, in even steps over
/// the order of use. `phase` quarters of a slot more are wanted at the beginning.
fn diffuse(
    blocks: &Blocks,
    level: &[usize],
    budget_bytes: u64,
    slots: u32,
    phase: u32,
) -> Vec<usize> {
    let most = blocks.streamed(level);
    let all = i128::from(most.iter().sum::<u64>()).max(1);
    let slot_bytes = i128::from(most.iter().copied().max().unwrap_or(0));
    let need =
        i128::from(blocks.total_bytes) + i128::from(slots) * slot_bytes - i128::from(budget_bytes);
    let mut carry = slot_bytes * i128::from(phase) / 4;
    let mut splits = level.to_vec();
    for &block in &blocks.sequence {
        let want = i128::from(most[block]) * need / all + carry;
        let distance = |split: &usize| (i128::from(blocks.splits(block)[*split].0) - want).abs();
        splits[block] = (0..=level[block]).min_by_key(distance).unwrap_or(0);
        carry = want - i128::from(blocks.splits(block)[splits[block]].0);
    }
    splits
}

/// What the budget still leaves over keeps more tensors resident, block by block; but no block
/// whole, which would change how many uses stream.
fn fill(
    blocks: &Blocks,
    mut splits: Vec<usize>,
    budget_bytes: u64,
    slots: u32,
) -> Option<Vec<usize>> {
    let streamed = blocks.streamed(&splits);
    let slot_bytes = streamed.iter().copied().max().unwrap_or(0);
    let kept = blocks.total_bytes - streamed.iter().sum::<u64>();
    let used = kept.checked_add(u64::from(slots) * slot_bytes)?;
    let mut spare = budget_bytes.checked_sub(used)?;
    for &block in &blocks.sequence {
        let sums = blocks.splits(block);
        let before = splits[block];
        if before > 0 {
            let least = sums[before].0.saturating_sub(spare);
            splits[block] = sums.partition_point(|(sum, _)| *sum < least).max(1);
            spare -= sums[before].0 - sums[splits[block]].0;
        }
    }
    Some(splits)
}

/// With two slots and an odd number of streamed uses, addresses change from pass to pass.
fn is_odd(blocks: &Blocks, splits: &[usize], slots: u32) -> bool {
    let uses = splits.iter().zip(&blocks.uses).filter(|(split, _)| **split > 0);
    slots == 2 && uses.map(|(_, uses)| uses).sum::<u64>() % 2 == 1
}

/// The parity rule: the block with the fewest streamed bytes that makes the number of uses even
/// stays whole, or, where the budget forbids that, one more block streams its smallest tensor.
fn make_even(blocks: &Blocks, splits: &[usize], slots: u32) -> Vec<Vec<usize>> {
    if !is_odd(blocks, splits, slots) {
        return Vec::new();
    }
    let bytes = |block: usize, split: usize| blocks.splits(block)[split].0;
    let odd = || (0..splits.len()).filter(|&block| blocks.uses[block] % 2 == 1);
    let whole = odd().filter(|&block| splits[block] > 0);
    let more = odd().filter(|&block| splits[block] == 0 && blocks.splits(block).len() > 1);
    let changes = [
        whole.min_by_key(|&block| bytes(block, splits[block])).map(|block| (block, 0)),
        more.min_by_key(|&block| bytes(block, 1)).map(|block| (block, 1)),
    ];
    let with = |(block, split): (usize, usize)| {
        let mut even = splits.to_vec();
        even[block] = split;
        even
    };
    changes.into_iter().flatten().map(with).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Tensor;
    use super::*;

    fn uniform(blocks: u32, tensors: &[u64]) -> Profile {
        let mut profile = Profile::default();
        for block in 0..blocks {
            profile.tensors.extend(tensors.iter().map(|&bytes| Tensor { block, bytes }));
            profile.order.push(block);
        }
        profile
    }

    #[test]
    fn the_level_is_the_least_that_fits() {
        // 8 blocks of 4 tensors of 1 KiB: 32 KiB. With s tensors streamed: 32 - 8 s + 2 s KiB.
        let choice = choose(&uniform(8, &[1024; 4]), 20 << 10).expect("fits");
        assert_eq!((choice.slots, choice.slot_bytes), (2, 2048));
        assert_eq!(choice.resident.iter().filter(|&&r| !r).count(), 16);
    }

    #[test]
    fn what_the_level_leaves_over_is_given_out_evenly() {
        // 8 blocks of one tensor: a level streams all of them, the budget asks for 5 of 8 KiB.
        let choice = choose(&uniform(8, &[1024]), 5 << 10).expect("fits");
        let streamed: Vec<usize> = (0..8).filter(|&b| !choice.resident[b]).collect();
        assert_eq!(streamed.len(), 6, "8 + 2 - 5 = 5 must be streamed, 6 make it even");
        let kept: Vec<usize> = (0..8).filter(|&b| choice.resident[b]).collect();
        assert!(kept[1] - kept[0] >= 3, "blocks {kept:?} are kept side by side");
    }

    #[test]
    fn small_tensors_stay_resident_until_the_budget_forbids_it() {
        let mut profile = uniform(8, &[4096, 256]);
        profile.min_stream_bytes = 1024;
        let choice = choose(&profile, 12 << 10).expect("2 slots of 4 KiB and 2 KiB of small ones");
        assert!(choice.resident.iter().skip(1).step_by(2).all(|&r| r));
        let choice = choose(&profile, 9 << 10).expect("2 slots of 4352 bytes");
        assert!(choice.resident.iter().skip(1).step_by(2).any(|&r| !r));
    }

    #[test]
    fn one_slot_when_two_do_not_fit() {
        let choice = choose(&uniform(4, &[4096]), 5000).expect("one slot");
        assert_eq!((choice.slots, choice.slot_bytes), (1, 4096));
    }

    #[test]
    fn an_odd_number_of_streamed_uses_keeps_one_block_whole() {
        let choice = choose(&uniform(7, &[1024; 2]), 12 << 10).expect("fits");
        let streamed = choice.resident.chunks(2).filter(|b| b.iter().any(|&r| !r)).count();
        assert_eq!(streamed % 2, 0);
    }
}
