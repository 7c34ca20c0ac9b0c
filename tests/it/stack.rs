//! Random models: blocks of tensors, an order of use, and where the weights lie.

use dgls_core::align_up;
use dgls_core::driver::Source;
use dgls_core::plan::{Plan, Profile, Tensor, Use};

use crate::random::Random;

/// First byte of the host weights; the arenas lie far above.
const HOST: u64 = 1 << 30;

#[derive(Debug, Clone)]
pub(crate) struct Stack {
    pub(crate) profile: Profile,
    /// Host address of each tensor.
    pub(crate) addresses: Vec<u64>,
    /// The tensors of each block, in the profile's order.
    pub(crate) tensors: Vec<Vec<usize>>,
}

impl Stack {
    /// 1 to 12 blocks of 1 to 6 tensors; some blocks are equal, some repeat, some are dormant.
    pub(crate) fn random(random: &mut Random) -> Self {
        let blocks = u32::try_from(random.between(1, 12)).expect("12");
        let few: Vec<u64> = (0..3).map(|_| random.between(1, 90_000)).collect();
        let pattern: Vec<u64> = (0..random.between(1, 6)).map(|_| random.pick(&few)).collect();
        let mut tensors = Vec::new();
        for block in 0..blocks {
            let sizes = match random.between(0, 2) {
                0 => pattern.clone(),
                1 => (0..random.between(1, 6)).map(|_| random.pick(&few)).collect(),
                _ => (0..random.between(1, 6)).map(|_| random.between(1, 150_000)).collect(),
            };
            tensors.extend(sizes.into_iter().map(|bytes| Tensor { block, bytes }));
        }
        let mut order: Vec<u32> = (0..blocks).filter(|_| !random.chance(8)).collect();
        for _ in 0..random.between(0, 2) {
            if random.chance(40) {
                let at = random.index(order.len() + 1);
                order.insert(at, random.index(index(blocks)).try_into().expect("12"));
            }
        }
        if random.chance(20) {
            random.shuffle(&mut order);
        }
        let min_stream_bytes = random.pick(&[0, 0, 1000, 40_000]);
        Self::new(Profile { tensors, order, min_stream_bytes, ..Profile::default() }, 0)
    }

    /// `blocks` blocks that all have tensors of these sizes, used in order. They lie apart, so that
    /// each is a copy of its own.
    pub(crate) fn uniform(blocks: u32, sizes: &[u64]) -> Self {
        let tensor = |block| sizes.iter().map(move |&bytes| Tensor { block, bytes });
        let tensors = (0..blocks).flat_map(tensor).collect();
        Self::new(Profile { tensors, order: (0..blocks).collect(), ..Profile::default() }, 64)
    }

    pub(crate) fn new(profile: Profile, gap_bytes: u64) -> Self {
        let mut next = HOST;
        let mut addresses = Vec::new();
        let mut tensors = vec![Vec::new(); profile.blocks()];
        for (number, tensor) in profile.tensors.iter().enumerate() {
            addresses.push(next);
            next += tensor.bytes + gap_bytes;
            tensors[index(tensor.block)].push(number);
        }
        Self { profile, addresses, tensors }
    }

    pub(crate) fn sources(&self) -> Vec<Source> {
        self.addresses.iter().map(|&address| Source::Memory { address }).collect()
    }

    pub(crate) fn blocks(&self) -> u32 {
        u32::try_from(self.tensors.len()).expect("12")
    }

    /// The smallest budget that works, and the one that holds everything.
    pub(crate) fn budgets(&self) -> (u64, u64) {
        let bytes = self.profile.block_bytes();
        (bytes.iter().copied().max().unwrap_or(0), bytes.iter().sum())
    }

    pub(crate) fn random_budget(&self, random: &mut Random) -> u64 {
        let (least, all) = self.budgets();
        match random.between(0, 9) {
            0 => least,
            1 => all,
            2 => random.between(least, all.min(2 * least)),
            _ => random.between(least, all),
        }
    }

    /// Address of the byte in the middle of the weights.
    pub(crate) fn middle(&self) -> u64 {
        self.addresses[self.addresses.len() / 2]
    }

    pub(crate) fn bytes(&self, tensor: usize) -> u64 {
        self.profile.tensors[tensor].bytes
    }

    pub(crate) fn aligned(&self, tensor: usize) -> u64 {
        align_up(self.bytes(tensor))
    }
}

/// A block as an index of memory.
pub(crate) fn index(block: u32) -> usize {
    usize::try_from(block).expect("32 bits fit")
}

/// How far ahead a plan copies: 0 when nothing is streamed, 1 when copies wait for the use right
/// before theirs, 2 when some are made beside it.
pub(crate) fn ahead(plan: &Plan) -> u32 {
    let program = &plan.program;
    let of_use = |(position, used): (u32, &Use)| {
        let copies = program.copies_of(used).iter().filter_map(|copy| copy.wait);
        let ahead = copies.map(|wait| position + wait.lag * program.cycle - wait.position);
        ahead.max().map_or(0, |uses| uses.min(2))
    };
    let cycle = (0..program.cycle).zip(&program.uses);
    cycle.map(of_use).max().unwrap_or(0)
}
