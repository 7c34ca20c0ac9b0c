//! The ways to split a block into what stays and what is streamed.

use std::collections::HashMap;

use crate::units::{index, narrow};

/// At most this many sums are kept for one block; more only refine a plan by a few bytes.
const SUMS: usize = 4096;

/// How finely a block can be split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Splits {
    /// Whole tensors: reachable sums of streamed bytes, ascending, each with one set that reaches
    /// it; the first streams nothing, the last all that may be streamed.
    Tensors(Vec<(u64, Vec<u32>)>),
    /// Any multiple of `granule`, and all of the block.
    Granules { granule: u64, bytes: u64 },
}

impl Splits {
    /// How many splits there are.
    pub(super) fn count(&self) -> u64 {
        match self {
            Self::Tensors(sums) => sums.len() as u64,
            Self::Granules { granule, bytes } => bytes.div_ceil(*granule) + 1,
        }
    }

    /// Streamed bytes of a split; ascending.
    pub(super) fn bytes(&self, split: u64) -> u64 {
        match self {
            Self::Tensors(sums) => sums[index(split)].0,
            Self::Granules { granule, bytes } => split.saturating_mul(*granule).min(*bytes),
        }
    }

    /// The split that streams the most.
    pub(super) fn last(&self) -> u64 {
        self.count() - 1
    }

    /// The split that streams as much as possible within `bytes`.
    pub(super) fn within(&self, bytes: u64) -> u64 {
        match self {
            Self::Tensors(sums) => sums.partition_point(|(sum, _)| *sum <= bytes) as u64 - 1,
            Self::Granules { granule, bytes: all } => {
                if bytes >= *all {
                    self.last()
                } else {
                    bytes / granule
                }
            }
        }
    }

    /// The split whose streamed bytes are nearest to `want`.
    pub(super) fn nearest(&self, want: f64) -> u64 {
        let below = self.within(crate::units::whole(want));
        let above = (below + 1).min(self.last());
        let distance = |split: u64| (crate::units::real(self.bytes(split)) - want).abs();
        if distance(above) < distance(below) { above } else { below }
    }

    /// The streamed tensors of a split, by their place in the block; `None` where any byte may be
    /// streamed.
    pub(super) fn tensors(&self, split: u64) -> Option<&[u32]> {
        match self {
            Self::Tensors(sums) => Some(&sums[index(split)].1),
            Self::Granules { .. } => None,
        }
    }
}

/// Splits by whole tensors; blocks with equal tensors share theirs. Returns the different ones,
/// and which of them each block has. Tensors below `min_stream_bytes` stay, and a copy more must
/// bring a sum `copy_bytes` nearer to what is wanted.
pub(super) fn by_tensors(
    blocks: &[Vec<u64>],
    slow: &[Vec<f64>],
    min_stream_bytes: u64,
    copy_bytes: u64,
) -> (Vec<Splits>, Vec<usize>) {
    let mut known: HashMap<(&[u64], Vec<u64>), usize> = HashMap::new();
    let mut kinds = Vec::new();
    let kind_of = blocks.iter().enumerate().map(|(block, sizes)| {
        let slow = slow.get(block).map_or(&[][..], Vec::as_slice);
        let bits = slow.iter().map(|slow| slow.to_bits()).collect();
        *known.entry((sizes.as_slice(), bits)).or_insert_with(|| {
            let sums = subset_sums(sizes, slow, min_stream_bytes);
            kinds.push(Splits::Tensors(with_few_copies(&sums, copy_bytes)));
            kinds.len() - 1
        })
    });
    let kind_of = kind_of.collect();
    (kinds, kind_of)
}

/// Sums of the tensors that may be streamed, ascending, each with one set that reaches it.
fn subset_sums(sizes: &[u64], slow: &[f64], min_stream_bytes: u64) -> Vec<(u64, Vec<u32>)> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    // Of equal tensors those that come fast are streamed first.
    order.sort_by(|&a, &b| {
        let slow = |at: usize| slow.get(at).copied().unwrap_or(1.0);
        sizes[b].cmp(&sizes[a]).then(slow(a).total_cmp(&slow(b)))
    });
    // A set is the set before it and one tensor more: sums are many, their sets are short.
    let mut nodes: Vec<(usize, u32)> = vec![(0, 0)];
    let mut sums: Vec<(u64, usize)> = vec![(0, 0)];
    for i in order.into_iter().filter(|&i| sizes[i] >= min_stream_bytes) {
        let first = nodes.len();
        nodes.extend(sums.iter().map(|&(_, node)| (node, narrow(i))));
        let with = sums.iter().enumerate().map(|(k, &(sum, _))| (sum + sizes[i], first + k));
        let with: Vec<(u64, usize)> = with.collect();
        // Stable: of equal sums the one with fewer copies stays.
        sums.extend(with);
        sums.sort_by_key(|&(sum, _)| sum);
        sums.dedup_by_key(|&mut (sum, _)| sum);
        sums = thin(sums, SUMS);
    }
    let set = |mut node: usize| {
        let mut set = Vec::new();
        while node != 0 {
            set.push(nodes[node].1);
            node = nodes[node].0;
        }
        set.sort_unstable();
        set
    };
    sums.into_iter().map(|(sum, node)| (sum, set(node))).collect()
}

/// Leaves out sums next to one that takes fewer copies, for each of which `copy_bytes` could be
/// copied; but neither the first nor the last.
fn with_few_copies(sums: &[(u64, Vec<u32>)], copy_bytes: u64) -> Vec<(u64, Vec<u32>)> {
    let last = sums.len() - 1;
    let worse = |a: usize, b: usize| {
        let (fewer, more) = (sums[b].1.len() as u64, sums[a].1.len() as u64);
        sums[a].0.abs_diff(sums[b].0) < more.saturating_sub(fewer).saturating_mul(copy_bytes)
    };
    let reach = |a: usize| copy_bytes.saturating_mul(sums[a].1.len() as u64);
    let kept = |&a: &usize| {
        let below = (0..a).rev().take_while(|&b| sums[a].0 - sums[b].0 < reach(a));
        let above = (a + 1..sums.len()).take_while(|&b| sums[b].0 - sums[a].0 < reach(a));
        a == 0 || a == last || !below.chain(above).any(|b| worse(a, b))
    };
    (0..sums.len()).filter(kept).map(|a| sums[a].clone()).collect()
}

/// Keeps at most `limit` entries, evenly, with the first and the last.
fn thin<T: Copy>(all: Vec<T>, limit: usize) -> Vec<T> {
    if all.len() <= limit {
        return all;
    }
    (0..limit).map(|k| all[k * (all.len() - 1) / (limit - 1)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sum_names_tensors_that_add_up_to_it() {
        let sizes = [700, 300, 300, 50];
        let (kinds, kind_of) = by_tensors(&[sizes.to_vec(), sizes.to_vec()], &[], 100, 0);
        assert_eq!((kinds.len(), kind_of), (1, vec![0, 0]));
        let splits = &kinds[0];
        let found: Vec<u64> = (0..splits.count()).map(|split| splits.bytes(split)).collect();
        assert_eq!(found, [0, 300, 600, 700, 1000, 1300], "50 is too small to be streamed");
        for split in 0..splits.count() {
            let set = splits.tensors(split).expect("whole tensors");
            assert_eq!(set.iter().map(|&i| sizes[index(i)]).sum::<u64>(), splits.bytes(split));
        }
        assert_eq!((splits.within(299), splits.within(650), splits.within(9999)), (0, 2, 5));
        assert_eq!((splits.nearest(640.0), splits.nearest(660.0), splits.nearest(-5.0)), (2, 3, 0));
    }

    #[test]
    fn sums_beyond_the_limit_are_thinned_out_evenly() {
        let sizes: Vec<u64> = (0..16).map(|i| 256 << i).collect();
        let (kinds, _) = by_tensors(std::slice::from_ref(&sizes), &[], 0, 0);
        assert_eq!(kinds[0].count(), 4096);
        assert_eq!(kinds[0].bytes(kinds[0].last()), sizes.iter().sum::<u64>());
    }

    #[test]
    fn a_copy_more_must_be_worth_it() {
        let sizes = [1000, 510, 500];
        let bytes = |copy_bytes| {
            let (kinds, _) = by_tensors(&[sizes.to_vec()], &[], 0, copy_bytes);
            (0..kinds[0].count()).map(|split| kinds[0].bytes(split)).collect::<Vec<_>>()
        };
        assert_eq!(bytes(0), [0, 500, 510, 1000, 1010, 1500, 1510, 2010]);
        assert_eq!(bytes(11), [0, 500, 510, 1000, 1500, 1510, 2010], "1010 takes two, 1000 one");
    }

    #[test]
    fn granules_end_with_the_whole_block() {
        let splits = Splits::Granules { granule: 100, bytes: 250 };
        assert_eq!((splits.count(), splits.last()), (4, 3));
        assert_eq!((0..4).map(|s| splits.bytes(s)).collect::<Vec<_>>(), [0, 100, 200, 250]);
        assert_eq!((splits.within(99), splits.within(249), splits.within(250)), (0, 2, 3));
        assert_eq!((splits.nearest(140.0), splits.nearest(230.0)), (1, 3));
    }
}
