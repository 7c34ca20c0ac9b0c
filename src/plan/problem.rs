//! What a search for a plan works on: blocks, their splits, uses and times, checked once.

use super::splits::{Splits, by_tensors};
use super::{Link, Profile};
use crate::units::{ALIGN_BYTES, align_up, count, index, real};

/// Where nothing was measured, only ratios matter: any rate will do, and a copy costs as much as
/// this share of what a use streams.
const ASSUMED_BYTES_PER_S: f64 = 20e9;
const ASSUMED_LATENCY: f64 = 1e-3;

/// One use of a block in a pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Slot {
    pub(super) block: usize,
    /// Seconds of compute from the beginning of this use to where the next one could begin.
    pub(super) compute_s: f64,
}

/// Blocks whose residency is decided by the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Manual {
    /// For each block: whether it stays whole; else it is streamed whole.
    pub(super) resident: Vec<bool>,
}

/// The input of a search. Sizes are bytes, times seconds.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    /// The different ways to split, and which of them each block has.
    pub(super) kinds: Vec<Splits>,
    pub(super) kind_of: Vec<usize>,
    /// Bytes of each tensor of each block, as they lie in the arena; empty where any byte may be
    /// streamed.
    pub(super) tensors: Vec<Vec<u64>>,
    /// For each tensor of each block how many times as long as over the link its bytes take; no
    /// block where all come at the rate of the link.
    pub(super) slow: Vec<Vec<f64>>,
    /// Every tensor starts at a multiple of this in the arena.
    pub(super) align_bytes: u64,
    /// Bytes of each block.
    pub(super) bytes: Vec<u64>,
    /// The uses of one pass, in order.
    pub(super) uses: Vec<Slot>,
    /// Compute of a pass outside of its blocks.
    pub(super) outside_s: f64,
    pub(super) link: Link,
    /// Blocks that no pass uses: planned for, never prefetched.
    pub(super) dormant: Vec<usize>,
    pub(super) budget_bytes: u64,
    pub(super) manual: Option<Manual>,
    /// At most this many uses are copied ahead of the running one.
    pub(super) window: Option<u32>,
    /// Every byte has the same address in every pass.
    pub(super) one_pass: bool,
}

impl Problem {
    /// The problem of a profile; tensors below `min_stream_bytes` stay.
    pub(super) fn new(profile: &Profile, budget_bytes: u64, min_stream_bytes: u64) -> Self {
        let mut tensors = vec![Vec::new(); profile.blocks()];
        for tensor in &profile.tensors {
            tensors[index(tensor.block)].push(align_up(tensor.bytes));
        }
        let bytes: Vec<u64> = tensors.iter().map(|sizes: &Vec<u64>| sizes.iter().sum()).collect();
        let mut slow = vec![Vec::new(); if profile.slow.is_empty() { 0 } else { bytes.len() }];
        for (tensor, &times) in profile.tensors.iter().zip(&profile.slow) {
            slow[index(tensor.block)].push(times);
        }
        let missing = bytes.iter().sum::<u64>().saturating_sub(budget_bytes);
        let even_s = real(missing) / ASSUMED_BYTES_PER_S / count(profile.order.len().max(1));
        let assumed =
            Link { bytes_per_s: ASSUMED_BYTES_PER_S, latency_s: ASSUMED_LATENCY * even_s };
        let link = profile.times.as_ref().map_or(assumed, |times| times.link);
        let (kinds, kind_of) = by_tensors(&tensors, &slow, min_stream_bytes, link.copy_bytes());
        let manual = profile.resident_blocks.as_ref().map(|blocks| {
            let mut resident = vec![false; bytes.len()];
            for &block in blocks {
                resident[index(block)] = true;
            }
            Manual { resident }
        });
        // Where no block is ever used, any may come: all are planned for as if they were in order.
        let all: Vec<u32> = (0..crate::units::narrow(bytes.len())).collect();
        let order = if profile.order.is_empty() { &all } else { &profile.order };
        let mut problem = Self {
            kinds,
            kind_of,
            tensors,
            slow,
            align_bytes: ALIGN_BYTES,
            // Before anything was measured every use computes alike, and a pass as long as its
            // copies take, which is where a bad plan loses the most.
            uses: order.iter().map(|&b| Slot { block: index(b), compute_s: even_s }).collect(),
            dormant: Vec::new(),
            outside_s: 0.0,
            link,
            bytes,
            budget_bytes,
            manual,
            window: profile.window_uses,
            one_pass: profile.one_pass,
        };
        let used = |block: &usize| problem.uses.iter().any(|slot| slot.block == *block);
        problem.dormant = (0..problem.bytes.len()).filter(|block| !used(block)).collect();
        if let Some(times) = &profile.times {
            for (slot, &seconds) in problem.uses.iter_mut().zip(&times.compute_s) {
                slot.compute_s = seconds;
            }
            problem.outside_s = times.outside_s;
        }
        problem
    }

    /// The ways to split a block.
    pub(super) fn splits(&self, block: usize) -> &Splits {
        &self.kinds[self.kind_of[block]]
    }

    /// Seconds of one copy of a block's tensor.
    pub(super) fn copy_s(&self, block: usize, tensor: u32, bytes: u64) -> f64 {
        let slow = self.slow.get(block).map_or(1.0, |slow| slow[index(tensor)]);
        self.link.latency_s + slow * real(bytes) / self.link.bytes_per_s
    }

    /// For each block how many times as long as over the link its bytes take together; none where
    /// all blocks are alike.
    pub(super) fn slow_blocks(&self) -> Vec<f64> {
        let mean = |(sizes, slow): (&Vec<u64>, &Vec<f64>)| {
            let bytes: u64 = sizes.iter().sum();
            let costs = sizes.iter().zip(slow).map(|(&bytes, slow)| real(bytes) * slow);
            if bytes == 0 { 1.0 } else { costs.sum::<f64>() / real(bytes) }
        };
        let means: Vec<f64> = self.tensors.iter().zip(&self.slow).map(mean).collect();
        let first = means.first().copied().unwrap_or(1.0);
        let alike = means.iter().all(|mean| (mean - first).abs() < 0.01 * first);
        if alike { Vec::new() } else { means }
    }

    /// Bytes of all blocks.
    pub(super) fn total_bytes(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// Compute of one pass.
    pub(super) fn compute_s(&self) -> f64 {
        self.outside_s + self.uses.iter().map(|slot| slot.compute_s).sum::<f64>()
    }

    /// No policy whatever is faster: compute, and the bytes that do not fit must cross the link.
    pub(super) fn lower_bound_s(&self) -> f64 {
        let used: u64 = {
            let mut seen = vec![false; self.bytes.len()];
            let first = |slot: &&Slot| !std::mem::replace(&mut seen[slot.block], true);
            self.uses.iter().filter(first).map(|slot| self.bytes[slot.block]).sum()
        };
        let missing = used.saturating_sub(self.budget_bytes);
        self.compute_s().max(self.least_cost(missing) / self.link.bytes_per_s)
    }

    /// What `missing` bytes cost at least, in bytes over the link: the fastest come.
    fn least_cost(&self, missing: u64) -> f64 {
        let used = |block: &usize| !self.dormant.contains(block);
        let blocks = (0..self.slow.len()).filter(used);
        let pairs = blocks.flat_map(|b| std::iter::zip(&self.slow[b], &self.tensors[b]));
        let mut pairs: Vec<(f64, u64)> = pairs.map(|(&slow, &bytes)| (slow, bytes)).collect();
        pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (mut left, mut cost) = (missing, 0.0);
        for (slow, bytes) in pairs {
            let taken = bytes.min(left);
            left -= taken;
            cost += slow * real(taken);
        }
        cost + real(left)
    }

    /// The block that needs the most, and its bytes.
    pub(super) fn largest(&self) -> (usize, u64) {
        let pairs = self.bytes.iter().copied().enumerate();
        pairs.max_by_key(|&(block, bytes)| (bytes, std::cmp::Reverse(block))).unwrap_or((0, 0))
    }
}
