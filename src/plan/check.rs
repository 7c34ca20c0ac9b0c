//! Proves a plan legal: every byte arrives before its use, none is overwritten while it is used,
//! and no copy waits for what comes later.
//!
//! Three cycles are written out. Shares no code with what made the plan.

use std::collections::BTreeMap;

use super::program::Use;
use super::{Plan, Profile};
use crate::units::{align_up, index};

const CYCLES: u64 = 3;

/// Whose bytes lie in a range of the arena: the tensor's from `source` on, for use `number`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    end: u64,
    tensor: u32,
    source: u64,
    /// Endless number of the use; `None` for a resident.
    number: Option<u64>,
}

/// The arena: first byte of each range, and what it holds.
#[derive(Debug, Default)]
struct Arena {
    held: BTreeMap<u64, Held>,
}

impl Arena {
    /// Takes out what lies in `start..end`.
    fn clear(&mut self, start: u64, end: u64) -> Vec<Held> {
        let before_end = self.held.range(..end).rev().map(|(&first, &held)| (first, held));
        let found: Vec<(u64, Held)> = before_end.take_while(|(_, held)| held.end > start).collect();
        for &(first, held) in &found {
            self.held.remove(&first);
            if first < start {
                self.held.insert(first, Held { end: start, ..held });
            }
            if held.end > end {
                let source = held.source + (end - first);
                self.held.insert(end, Held { source, ..held });
            }
        }
        found.into_iter().map(|(_, held)| held).collect()
    }

    /// Whether all of a tensor lies at `start`, brought for use `number`.
    fn holds(&self, start: u64, bytes: u64, tensor: u32, number: Option<u64>) -> bool {
        let mut next = start;
        for (&first, held) in self.held.range(start..start + bytes) {
            let right = first == next && held.tensor == tensor && held.number == number;
            if !right || held.source != first - start {
                return false;
            }
            next = held.end;
        }
        next >= start + bytes
    }
}

/// Checks a plan; the message says what is wrong with it.
///
/// # Errors
///
/// The first thing that is not legal.
pub fn check(profile: &Profile, plan: &Plan) -> std::result::Result<(), String> {
    let program = &plan.program;
    let cycle = u64::from(program.cycle);
    if index(program.cycle) != profile.order.len() * index(program.passes) {
        return Err(format!("{cycle} uses in {} passes of another order", program.passes));
    }
    let mut tensors = vec![Vec::new(); profile.blocks()];
    for (number, tensor) in (0..).zip(&profile.tensors) {
        tensors[index(tensor.block)].push(number);
    }
    let mut arena = Arena::default();
    place_residents(profile, plan, &mut arena)?;
    // The latest use that the copy stream has waited for, as its number plus one.
    let mut waited = 0;
    for number in 0..CYCLES * cycle {
        let used = &program.uses[index(number % cycle)];
        if used.block != profile.order[index(number % cycle) % profile.order.len()] {
            return Err(format!("use {number} is of block {}, out of order", used.block));
        }
        for copy in program.copies_of(used) {
            if let Some(wait) = copy.wait {
                let at = (number / cycle).checked_sub(u64::from(wait.lag));
                let at = at.map(|lap| lap * cycle + u64::from(wait.position));
                if at.is_some_and(|at| at >= number) {
                    return Err(format!("use {number} waits for itself or a later one"));
                }
                waited = waited.max(at.map_or(0, |at| at + 1));
            }
            bring(profile, plan, &mut arena, copy, number, waited)?;
        }
        deliver(profile, &arena, used, &tensors[index(used.block)], plan, number)?;
    }
    Ok(())
}

fn place_residents(
    profile: &Profile,
    plan: &Plan,
    arena: &mut Arena,
) -> std::result::Result<(), String> {
    let mut loaded = vec![false; profile.tensors.len()];
    for (block, loads) in (0..).zip(&plan.program.loads) {
        for load in loads {
            let tensor = profile.tensors[index(load.tensor)];
            let whole = load.source_offset == 0 && load.bytes == tensor.bytes;
            if tensor.block != block || !whole || load.wait.is_some() {
                return Err(format!("tensor {} is not brought whole, once", load.tensor));
            }
            let (start, end) = (load.target_offset, load.target_offset + align_up(load.bytes));
            if end > plan.arena_bytes || !arena.clear(start, end).is_empty() {
                return Err(format!("tensor {} lies over another one", load.tensor));
            }
            let held = Held { end, tensor: load.tensor, source: 0, number: None };
            arena.held.insert(start, held);
            loaded[index(load.tensor)] = true;
        }
    }
    if loaded == plan.resident { Ok(()) } else { Err("residents are not those loaded".into()) }
}

fn bring(
    profile: &Profile,
    plan: &Plan,
    arena: &mut Arena,
    copy: &super::Copy,
    number: u64,
    waited: u64,
) -> std::result::Result<(), String> {
    let bytes = profile.tensors[index(copy.tensor)].bytes;
    let last = copy.source_offset + copy.bytes == bytes;
    if copy.source_offset + copy.bytes > bytes || (!last && copy.bytes != align_up(copy.bytes)) {
        return Err(format!("{copy:?} goes beyond its tensor or is cut between"));
    }
    let (start, end) = (copy.target_offset, copy.target_offset + align_up(copy.bytes));
    if end > plan.arena_bytes || start != align_up(start) {
        return Err(format!("{copy:?} is out of the arena"));
    }
    for before in arena.clear(start, end) {
        match before.number {
            None => return Err(format!("{copy:?} overwrites resident {}", before.tensor)),
            Some(by) if by == number => {
                return Err(format!("{copy:?} overwrites its own use {number}"));
            }
            Some(by) if by >= waited => {
                return Err(format!(
                    "{copy:?} of use {number} overwrites use {by}, not waited for"
                ));
            }
            Some(_) => {}
        }
    }
    let (tensor, source) = (copy.tensor, copy.source_offset);
    arena.held.insert(start, Held { end, tensor, source, number: Some(number) });
    Ok(())
}

fn deliver(
    profile: &Profile,
    arena: &Arena,
    used: &Use,
    tensors: &[u32],
    plan: &Plan,
    number: u64,
) -> std::result::Result<(), String> {
    if used.offsets.len() != tensors.len() {
        return Err(format!("use {number} has {} offsets", used.offsets.len()));
    }
    for (&tensor, &offset) in tensors.iter().zip(&used.offsets) {
        let by = (!plan.resident[index(tensor)]).then_some(number);
        if !arena.holds(offset, profile.tensors[index(tensor)].bytes, tensor, by) {
            return Err(format!("use {number} misses bytes of tensor {tensor}"));
        }
    }
    Ok(())
}
