//! Compiles a residency into the static copy list: addresses, and what each copy waits for.

use super::Profile;
use super::residency::Choice;
use crate::units::{align_up, index, narrow};

/// A use whose *done* a copy waits for, because that use read the same device bytes before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// Position in the cycle.
    pub position: u32,
    /// 0: in this cycle, 1: in the one before.
    pub lag: u32,
}

/// One copy of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    /// The tensor.
    pub tensor: u32,
    /// First byte within the tensor.
    pub source_offset: u64,
    /// First byte within the arena.
    pub target_offset: u64,
    /// Bytes to copy.
    pub bytes: u64,
    /// `None` when nothing else ever lies there.
    pub wait: Option<Wait>,
}

/// One place in the cycle: a block with its copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// The block that runs.
    pub block: u32,
    /// Its copies of each pass, as a range of [`Program::copies`].
    pub copies: std::ops::Range<u32>,
    /// Arena offset of each tensor of the block, resident or streamed, in the profile's order.
    pub offsets: Vec<u64>,
}

/// The cycle that the engine repeats: one pass, or two where addresses alternate.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Program {
    /// The uses of the cycle in order, then one for each dormant block.
    pub uses: Vec<Use>,
    /// How many of the uses are in the cycle.
    pub cycle: u32,
    /// All copies in order of use.
    pub copies: Vec<Copy>,
    /// For each block, the copies that bring its resident tensors once.
    pub loads: Vec<Vec<Copy>>,
    /// Passes in one cycle.
    pub passes: u32,
}

impl Program {
    /// Bytes of the copies of one pass.
    pub fn streamed_bytes(&self) -> u64 {
        let cycle = self.uses.iter().take(index(self.cycle));
        let copies = cycle.flat_map(|used| self.copies_of(used));
        copies.map(|copy| align_up(copy.bytes)).sum::<u64>() / u64::from(self.passes.max(1))
    }

    /// The copies of a use, as part of the list.
    pub fn copies_of(&self, used: &Use) -> &[Copy] {
        &self.copies[index(used.copies.start)..index(used.copies.end)]
    }

    /// Residents lie behind the slots, in order of tensors; streamed ones in their use's slot.
    pub(super) fn compile(profile: &Profile, choice: &Choice) -> Self {
        let slots = u64::from(choice.slots);
        let mut tensors = vec![Vec::new(); profile.blocks()];
        for (number, tensor) in profile.tensors.iter().enumerate() {
            tensors[index(tensor.block)].push(number);
        }
        let mut next = slots * choice.slot_bytes;
        let mut home = vec![0; profile.tensors.len()];
        let mut loads = vec![Vec::new(); profile.blocks()];
        for (number, tensor) in profile.tensors.iter().enumerate() {
            if choice.resident[number] {
                home[number] = next;
                loads[index(tensor.block)].push(whole(number, tensor.bytes, next, None));
                next += align_up(tensor.bytes);
            }
        }
        let streams = |block: u32| tensors[index(block)].iter().any(|&n| !choice.resident[n]);
        let per_pass = profile.order.iter().filter(|&&block| streams(block)).count();
        let passes = if choice.slots == 2 && per_pass % 2 == 1 { 2 } else { 1 };

        let mut order: Vec<u32> = profile.order.repeat(index(passes));
        let cycle = order.len();
        let dormant = |block: &u32| !profile.order.contains(block);
        order.extend((0..narrow(profile.blocks())).filter(dormant));
        let streamed: Vec<usize> = (0..cycle).filter(|&u| streams(order[u])).collect();
        let mut program =
            Self { uses: Vec::new(), cycle: narrow(cycle), copies: Vec::new(), loads, passes };
        let mut turn = 0;
        for (position, &block) in order.iter().enumerate() {
            // A dormant use takes the first slot and waits for whatever ran last: no static wait.
            let turns = position < cycle && streams(block);
            let slot = if turns { turn as u64 % slots } else { 0 };
            let wait = turns.then(|| wait_of(&streamed, turn, index(choice.slots)));
            turn += usize::from(turns);
            let mut offset = slot * choice.slot_bytes;
            let first = narrow(program.copies.len());
            let mut offsets = Vec::with_capacity(tensors[index(block)].len());
            for &number in &tensors[index(block)] {
                if choice.resident[number] {
                    offsets.push(home[number]);
                } else {
                    let bytes = profile.tensors[number].bytes;
                    offsets.push(offset);
                    program.copies.push(whole(number, bytes, offset, wait));
                    offset += align_up(bytes);
                }
            }
            let copies = first..narrow(program.copies.len());
            program.uses.push(Use { block, copies, offsets });
        }
        program
    }
}

fn whole(number: usize, bytes: u64, target_offset: u64, wait: Option<Wait>) -> Copy {
    Copy { tensor: narrow(number), source_offset: 0, target_offset, bytes, wait }
}

/// The streamed use `turn` takes the slot of the one `slots` turns before.
fn wait_of(streamed: &[usize], turn: usize, slots: usize) -> Wait {
    if turn >= slots {
        Wait { position: narrow(streamed[turn - slots]), lag: 0 }
    } else {
        let before = streamed.len() + turn - slots.min(streamed.len() + turn);
        Wait { position: narrow(streamed[before]), lag: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Tensor, plan};
    use super::*;

    fn profile(sizes: &[u64]) -> Profile {
        let tensors = (0..).zip(sizes).map(|(block, &bytes)| Tensor { block, bytes }).collect();
        Profile { tensors, order: (0..narrow(sizes.len())).collect(), min_stream_bytes: 0 }
    }

    #[test]
    fn a_copy_waits_for_the_use_that_had_its_slot() {
        let plan = plan(&profile(&[1024; 6]), 2048).expect("two slots");
        let waits: Vec<_> =
            plan.program.copies.iter().map(|c| c.wait.map(|w| (w.position, w.lag))).collect();
        assert_eq!(
            waits,
            [Some((4, 1)), Some((5, 1)), Some((0, 0)), Some((1, 0)), Some((2, 0)), Some((3, 0))]
        );
        assert_eq!(plan.program.passes, 1);
    }

    #[test]
    fn an_odd_cycle_is_written_out_twice() {
        let plan = plan(&profile(&[1024; 5]), 2048).expect("two slots, nothing to spare");
        assert_eq!(plan.program.passes, 2);
        assert_eq!(plan.program.uses.len(), 10);
        assert_eq!(plan.streamed_bytes, 5 * 1024);
        let slot = |u: usize| plan.program.uses[u].offsets[0];
        assert_ne!(slot(0), slot(5));
    }

    #[test]
    fn a_block_outside_of_the_order_is_dormant() {
        let mut sizes = profile(&[1024; 4]);
        sizes.order = vec![0, 2];
        let plan = plan(&sizes, 2048).expect("two slots");
        assert_eq!(plan.program.cycle, 2);
        assert_eq!(plan.program.uses.iter().map(|u| u.block).collect::<Vec<_>>(), [0, 2, 1, 3]);
        assert_eq!(plan.streamed_bytes, 2048);
    }

    #[test]
    fn no_two_tensors_of_a_use_overlap() {
        let mut sizes = profile(&[]);
        for block in 0..4 {
            sizes.tensors.extend([700, 300, 5000].map(|bytes| Tensor { block, bytes }));
            sizes.order.push(block);
        }
        let plan = plan(&sizes, 16_000).expect("fits partly");
        for used in &plan.program.uses {
            let bytes = [768, 512, 5120];
            for a in 0..3 {
                assert!(used.offsets[a] + bytes[a] <= plan.arena_bytes());
                for b in 0..a {
                    let (x, y) = (used.offsets[a], used.offsets[b]);
                    assert!(x + bytes[a] <= y || y + bytes[b] <= x, "tensors {a} and {b}");
                }
            }
        }
    }
}
