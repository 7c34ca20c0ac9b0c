//! The static copy list: addresses, and what each copy waits for.

use super::problem::Problem;
use super::trial::Found;
use super::{Plan, Profile};
use crate::units::{align_up, index, narrow};

/// A use whose *done* a copy waits for, because that use read the same device bytes before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// Position in the cycle.
    pub position: u32,
    /// 0: in this cycle, 1: in the one before.
    pub lag: u32,
}

/// One copy of the list: a tensor, or a part of one whose device bytes become free at another
/// time than the rest.
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

/// The cycle that the engine repeats: one pass, or a few where addresses alternate.
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

    /// The ring lies at the front of the arena, residents behind it, where they were before as far
    /// as that can be: `kept` names the place of those that lie in the arena already.
    pub(super) fn compile(
        profile: &Profile,
        problem: &Problem,
        found: &Found,
        kept: Option<&Plan>,
    ) -> Self {
        let mut numbers = vec![Vec::new(); problem.bytes.len()];
        for (number, tensor) in profile.tensors.iter().enumerate() {
            numbers[index(tensor.block)].push(number);
        }
        let resident = residents(profile, problem, &found.splits, &numbers);
        let homes = homes(profile, &resident, found.ring_bytes, problem.budget_bytes, kept);
        let mut loads = vec![Vec::new(); problem.bytes.len()];
        for (number, tensor) in profile.tensors.iter().enumerate() {
            if resident[number] {
                loads[index(tensor.block)].push(whole(number, tensor.bytes, homes[number]));
            }
        }
        let passes = found.passes;
        let mut program =
            Self { cycle: narrow(profile.order.len()) * passes, passes, loads, ..Self::default() };
        let mut steps = found.steps.as_slice();
        for (position, &block) in profile.order.repeat(index(passes)).iter().enumerate() {
            let of_use = steps.partition_point(|step| index(step.used) <= position);
            let numbers = &numbers[index(block)];
            let first = narrow(program.copies.len());
            let mut offsets: Vec<u64> = numbers.iter().map(|&number| homes[number]).collect();
            for step in &steps[..of_use] {
                let number = numbers[index(step.tensor)];
                offsets[index(step.tensor)] = step.target - step.source;
                let left = profile.tensors[number].bytes - step.source;
                program.copies.push(Copy {
                    tensor: narrow(number),
                    source_offset: step.source,
                    target_offset: step.target,
                    bytes: step.bytes.min(left),
                    wait: Some(Wait { position: step.wait.0, lag: step.wait.1 }),
                });
            }
            steps = &steps[of_use..];
            let copies = first..narrow(program.copies.len());
            program.uses.push(Use { block, copies, offsets });
        }
        let dormant = |block: &usize| !profile.order.contains(&narrow(*block));
        for block in (0..numbers.len()).filter(dormant) {
            program.add_dormant(profile, narrow(block), &numbers[block], &resident, &homes);
        }
        program
    }

    /// A dormant use takes the front of the ring and waits for whatever ran last: no static wait.
    fn add_dormant(
        &mut self,
        profile: &Profile,
        block: u32,
        numbers: &[usize],
        resident: &[bool],
        homes: &[u64],
    ) {
        let (mut next, first) = (0, narrow(self.copies.len()));
        let mut offsets = Vec::with_capacity(numbers.len());
        for &number in numbers {
            if resident[number] {
                offsets.push(homes[number]);
            } else {
                let bytes = profile.tensors[number].bytes;
                self.copies.push(whole(number, bytes, next));
                offsets.push(next);
                next += align_up(bytes);
            }
        }
        let copies = first..narrow(self.copies.len());
        self.uses.push(Use { block, copies, offsets });
    }

    /// The place of each resident tensor.
    pub(crate) fn homes(&self, tensors: usize) -> Vec<Option<u64>> {
        let mut homes = vec![None; tensors];
        for load in self.loads.iter().flatten() {
            homes[index(load.tensor)] = Some(load.target_offset);
        }
        homes
    }
}

fn whole(number: usize, bytes: u64, target_offset: u64) -> Copy {
    Copy { tensor: narrow(number), source_offset: 0, target_offset, bytes, wait: None }
}

/// For each tensor whether it stays on the device.
pub(super) fn residents(
    profile: &Profile,
    problem: &Problem,
    splits: &[u64],
    numbers: &[Vec<usize>],
) -> Vec<bool> {
    let mut resident = vec![true; profile.tensors.len()];
    for (block, numbers) in numbers.iter().enumerate() {
        for &tensor in problem.splits(block).tensors(splits[block]).unwrap_or_default() {
            resident[numbers[index(tensor)]] = false;
        }
    }
    resident
}

/// The place of each resident tensor. Those that lie in the arena already stay where they are, if
/// that is behind the ring; the others take the gaps, where they fit best. For what no gap has
/// room for, as little as possible of the end of the arena is laid out anew.
fn homes(
    profile: &Profile,
    resident: &[bool],
    ring_bytes: u64,
    budget_bytes: u64,
    kept: Option<&Plan>,
) -> Vec<u64> {
    let bytes = |number: usize| align_up(profile.tensors[number].bytes);
    let mut places = vec![None; resident.len()];
    for load in kept.iter().flat_map(|plan| plan.program.loads.iter().flatten()) {
        let (number, start) = (index(load.tensor), load.target_offset);
        let inside = start >= ring_bytes && start + bytes(number) <= budget_bytes;
        places[number] = Some(start).filter(|_| resident[number] && inside);
    }
    let mut stay: Vec<(u64, usize)> =
        places.iter().enumerate().filter_map(|(number, place)| Some(((*place)?, number))).collect();
    stay.sort_unstable();
    loop {
        // Whatever lies from `end` on is laid out anew, behind what stays.
        let end = stay.last().map_or(ring_bytes, |&(start, number)| start + bytes(number));
        let mut gaps = Vec::new();
        let mut next = ring_bytes;
        for &(start, number) in &stay {
            gaps.extend((start > next).then_some((next, start - next)));
            next = start + bytes(number);
        }
        let mut homes = vec![0; resident.len()];
        for &(start, number) in &stay {
            homes[number] = start;
        }
        let stays = |number: usize| stay.binary_search(&(homes[number], number)).is_ok();
        let mut missing: Vec<usize> =
            (0..resident.len()).filter(|&n| resident[n] && !stays(n)).collect();
        missing.sort_by_key(|&number| std::cmp::Reverse(bytes(number)));
        let mut next = end;
        for number in missing {
            homes[number] = take_gap(&mut gaps, bytes(number)).unwrap_or_else(|| {
                next += bytes(number);
                next - bytes(number)
            });
        }
        if next <= budget_bytes || stay.is_empty() {
            return homes;
        }
        // A sixteenth at a time: 16 layouts at most, whatever the number of tensors.
        stay.truncate(stay.len() - stay.len().div_ceil(16).max(1));
    }
}

/// Takes the smallest gap that is large enough.
fn take_gap(gaps: &mut Vec<(u64, u64)>, bytes: u64) -> Option<u64> {
    let fits = gaps.iter().enumerate().filter(|(_, (_, room))| *room >= bytes);
    let at = fits.min_by_key(|(_, (_, room))| *room)?.0;
    let (start, room) = gaps[at];
    if room == bytes {
        gaps.swap_remove(at);
    } else {
        gaps[at] = (start + bytes, room - bytes);
    }
    Some(start)
}
