//! What lives where? Pure: sizes and an order in, residency and a static copy list out.
//!
//! Stage 0, which needs no timing: every block streams about as many bytes as any other (the
//! *water level*), in whole tensors, through two equal slots. Within 2.7 % of the optimum on
//! FLUX, WAN, `HunyuanVideo` and Qwen-Image when blocks take equal time.

mod program;
mod residency;

pub use program::{Copy, Program, Use, Wait};

use crate::error::{Error, Result};
use crate::units::{align_up, index};

/// One tensor of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// The block that reads it.
    pub block: u32,
    /// Its size; zero is refused.
    pub bytes: u64,
}

/// What a plan is made from.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    /// Every tensor that is resident or streamed.
    pub tensors: Vec<Tensor>,
    /// Block indices in order of use in one pass; a block that runs twice stands there twice, and
    /// one that does not stand there is dormant: planned for, never prefetched.
    pub order: Vec<u32>,
    /// Tensors smaller than this stay resident wherever the budget allows: a copy has a latency.
    pub min_stream_bytes: u64,
}

impl Profile {
    /// One more than the highest block index.
    pub fn blocks(&self) -> usize {
        let named = self.tensors.iter().map(|t| t.block).chain(self.order.iter().copied());
        named.max().map_or(0, |block| index(block) + 1)
    }

    /// Aligned bytes of each block.
    pub fn block_bytes(&self) -> Vec<u64> {
        let mut bytes = vec![0_u64; self.blocks()];
        for tensor in &self.tensors {
            let sum = &mut bytes[index(tensor.block)];
            *sum = sum.saturating_add(align_up(tensor.bytes));
        }
        bytes
    }

    fn check(&self) -> Result<()> {
        const LIMIT: usize = 1 << 24;
        if self.tensors.len() > LIMIT || self.order.len() > LIMIT {
            return Err(Error::Invalid(format!(
                "a plan takes up to {LIMIT} tensors and uses, got {} and {}",
                self.tensors.len(),
                self.order.len()
            )));
        }
        let mut sum = 0_u64;
        for (number, tensor) in self.tensors.iter().enumerate() {
            if tensor.bytes == 0 {
                return Err(Error::Invalid(format!("tensor {number} has 0 bytes")));
            }
            sum = match sum.checked_add(align_up(tensor.bytes)) {
                Some(sum) if sum < 1 << 62 => sum,
                _ => return Err(Error::Invalid("the tensors add up to 2^62 bytes or more".into())),
            };
        }
        match self.blocks() {
            blocks if blocks > LIMIT => {
                Err(Error::Invalid(format!("a plan takes up to {LIMIT} blocks, got {blocks}")))
            }
            _ => Ok(()),
        }
    }
}

/// The fixed answer: residency, slots, addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// For each tensor: whether it stays on the device.
    pub resident: Vec<bool>,
    /// Aligned bytes that stay on the device.
    pub resident_bytes: u64,
    /// Aligned bytes copied in each pass.
    pub streamed_bytes: u64,
    /// Slots: 0 when nothing is streamed, 2 where the budget allows, else 1.
    pub slots: u32,
    /// Size of one slot.
    pub slot_bytes: u64,
    /// The smallest budget with which a plan exists.
    pub least_bytes: u64,
    /// The static copy list.
    pub program: Program,
}

impl Plan {
    /// Device bytes that the plan takes: residents and slots.
    pub fn arena_bytes(&self) -> u64 {
        self.resident_bytes + u64::from(self.slots) * self.slot_bytes
    }
}

/// Makes a plan for `budget_bytes` of device memory for block weights.
///
/// # Errors
///
/// [`Error::BudgetTooSmall`] exactly when the largest block does not fit;
/// [`Error::Invalid`] on a profile that makes no sense.
///
/// # Panics
///
/// If the plan exceeds the budget, which no input can bring about.
pub fn plan(profile: &Profile, budget_bytes: u64) -> Result<Plan> {
    profile.check()?;
    let choice = residency::choose(profile, budget_bytes)?;
    let program = Program::compile(profile, &choice);
    let sum = |wanted: bool| {
        let bytes = |tensor: &Tensor| align_up(tensor.bytes);
        let kept = profile.tensors.iter().zip(&choice.resident);
        kept.filter(|(_, resident)| **resident == wanted).map(|(t, _)| bytes(t)).sum::<u64>()
    };
    let plan = Plan {
        resident_bytes: sum(true),
        streamed_bytes: program.streamed_bytes(),
        slots: choice.slots,
        slot_bytes: choice.slot_bytes,
        least_bytes: profile.block_bytes().into_iter().max().unwrap_or(0),
        resident: choice.resident,
        program,
    };
    assert!(plan.arena_bytes() <= budget_bytes, "{plan:?} for {budget_bytes} bytes");
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(blocks: &[&[u64]]) -> Profile {
        let mut profile = Profile::default();
        for (block, tensors) in (0_u32..).zip(blocks) {
            profile.tensors.extend(tensors.iter().map(|&bytes| Tensor { block, bytes }));
            profile.order.push(block);
        }
        profile
    }

    #[test]
    fn a_model_that_fits_streams_nothing() {
        let plan = plan(&profile(&[&[256, 512], &[1024]]), 1792).expect("1792 bytes fit");
        assert!(plan.resident.iter().all(|&r| r));
        assert_eq!(plan.streamed_bytes, 0);
        assert_eq!(plan.slots, 0);
    }

    #[test]
    fn too_small_a_budget_names_the_largest_block() {
        let error = plan(&profile(&[&[256], &[1024, 256]]), 1279).expect_err("1280 are needed");
        let expected = Error::BudgetTooSmall { block: 1, need_bytes: 1280, budget_bytes: 1279 };
        assert_eq!(error, expected);
        plan(&profile(&[&[256], &[1024, 256]]), 1280).expect("the smallest budget works");
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let error = plan(&profile(&[&[1 << 61], &[1 << 61]]), 1 << 20).expect_err("2^62 bytes");
        assert!(error.to_string().contains("2^62"), "{error}");
    }
}
