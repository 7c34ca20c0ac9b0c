//! The copy stream's half: what the commands of it mean for the device. Runs in the calling thread,
//! or in the staging thread.

use std::sync::Arc;

use parking_lot::RwLock;

use super::moved::Moved;
use crate::driver::{Device, H2d, Source};
use crate::engine::command::Command;
use crate::error::{Error, Result};
use crate::plan::{Copy, Program};
use crate::pool::{Arena, Cache, Codes, Part, Piece, Staging};
use crate::units::{align_up, index};

/// Most copies that wait to be enqueued together.
const MOST_GATHERED: usize = 64;

/// Where the bytes of one tensor lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight {
    /// First byte.
    pub source: Source,
    /// Whether the device takes the source as it is; else it is staged.
    pub direct: bool,
}

/// The copy stream's half: runs in the calling thread, or in the staging thread.
#[derive(Debug)]
pub(in crate::engine) struct CopySide {
    pub(in crate::engine) device: Arc<dyn Device>,
    pub(in crate::engine) program: Arc<Program>,
    pub(in crate::engine) weights: Vec<Weight>,
    pub(in crate::engine) arena: Arena,
    pub(in crate::engine) staging: Option<Staging>,
    pub(in crate::engine) cache: Arc<RwLock<Cache>>,
    pub(in crate::engine) codes: Arc<RwLock<Codes>>,
    /// Resident tensors that the plan before had in the same place.
    pub(in crate::engine) kept: Vec<bool>,
    pub(in crate::engine) moved: Arc<Moved>,
}

/// Copies of one use, without an order: those that the device takes as they are, and the others.
#[derive(Debug, Default)]
pub(in crate::engine) struct Batch {
    pub(in crate::engine) direct: Vec<H2d>,
    pub(in crate::engine) staged: Vec<Piece>,
}

impl CopySide {
    fn copies_of(program: &Program, command: Command) -> &[Copy] {
        match command {
            Command::Copy { index: number } => &program.copies[index(number)..=index(number)],
            Command::Load { block } | Command::LoadMissing { block } => {
                &program.loads[index(block)]
            }
            _ => &[],
        }
    }

    fn skips(&self, command: Command, copy: Copy) -> bool {
        matches!(command, Command::LoadMissing { .. }) && self.kept[index(copy.tensor)]
    }

    fn copy_from(&self, source: Source, copy: Copy) -> H2d {
        let source = source.advanced(copy.source_offset);
        H2d { source, target: self.arena.at(copy.target_offset, copy.bytes), bytes: copy.bytes }
    }

    /// Calls `act` with a copy, or with its parts: what is encoded comes from there, the rest from
    /// `source`. Each is named by its tensor and its first byte there.
    fn each_from(
        &self,
        codes: &Codes,
        copy: Copy,
        source: Source,
        mut act: impl FnMut((u32, u64), H2d),
    ) {
        let Some(code) = codes.to_copy(copy.tensor) else {
            act((copy.tensor, copy.source_offset), self.copy_from(source, copy));
            return;
        };
        for Part { raw_offset, raw_bytes, encoded } in code.parts(copy.source_offset, copy.bytes) {
            let target_offset = copy.target_offset + (raw_offset - copy.source_offset);
            let part = Copy { source_offset: raw_offset, target_offset, bytes: raw_bytes, ..copy };
            act((copy.tensor, raw_offset), self.copy_from(encoded.unwrap_or(source), part));
        }
    }

    fn copy_all(&self, copies: &[H2d]) -> Result<()> {
        self.moved.add(copies);
        self.device.copy_batch(copies)
    }

    /// Runs a command that is no copy.
    fn run(&self, command: Command) -> Result<()> {
        match command {
            Command::WaitDone(slot) => self.device.wait_done(slot),
            Command::WaitDecoded => self.device.wait_decoded(),
            Command::CopyStart(slot) => self.device.mark_copy_start(slot),
            Command::Ready { slot, .. } => self.device.mark_ready(slot),
            Command::Poison { position } => self.poison(position),
            Command::Copy { .. }
            | Command::Load { .. }
            | Command::LoadMissing { .. }
            | Command::Cancel
            | Command::Join(_)
            | Command::Acquire { .. }
            | Command::Release(_) => Ok(()),
        }
    }

    fn poison(&self, position: u32) -> Result<()> {
        let used = &self.program.uses[index(position)];
        for copy in self.program.copies_of(used) {
            let bytes = align_up(copy.bytes);
            self.device.fill(self.arena.at(copy.target_offset, bytes), bytes, 0xFF)?;
        }
        Ok(())
    }
}

/// The copy side, and the copies that wait to be enqueued together.
///
/// None waits any more when another command is run, nor between two calls of the engine. So those
/// of one batch belong to one use, and none writes what another one writes.
#[derive(Debug)]
pub(in crate::engine) struct Lane {
    side: CopySide,
    gathered: Vec<H2d>,
    /// The last *ready* that was enqueued from here.
    issued: u64,
}

impl Lane {
    pub(in crate::engine) fn new(side: CopySide) -> Self {
        Self { side, gathered: Vec::with_capacity(MOST_GATHERED), issued: 0 }
    }

    /// What is known of the weights from now on.
    pub(in crate::engine) fn set_weights(&mut self, weights: Vec<Weight>) {
        self.side.weights = weights;
    }

    /// The chunks.
    pub(in crate::engine) fn staging(&mut self) -> &mut Option<Staging> {
        &mut self.side.staging
    }

    /// The ticket of the last *ready* that was enqueued.
    pub(in crate::engine) fn issued(&self) -> u64 {
        self.issued
    }

    /// Forgets what was gathered.
    pub(in crate::engine) fn forget(&mut self) {
        self.gathered.clear();
    }

    /// Runs a command to its end.
    pub(in crate::engine) fn run(&mut self, command: Command) -> Result<()> {
        self.take(command)?;
        self.enqueue()
    }

    /// Runs a command, but only gathers the copies, all of which the device takes as they are.
    pub(in crate::engine) fn take(&mut self, command: Command) -> Result<()> {
        if !command.copies() {
            self.side.run(command)?;
            if let Command::Ready { ticket, .. } = command {
                self.issued = ticket;
            }
            return Ok(());
        }
        let (side, gathered) = (&self.side, &mut self.gathered);
        let codes = side.codes.read();
        for &copy in CopySide::copies_of(&side.program, command) {
            if side.skips(command, copy) {
                continue;
            }
            let weight = side.weights[index(copy.tensor)];
            if !weight.direct {
                return Err(Error::Internal("a weight to stage, but no staging thread".into()));
            }
            let mut done = Ok(());
            side.each_from(&codes, copy, weight.source, |_, next| {
                if done.is_err() || join(side, gathered, next) {
                    return;
                }
                if gathered.len() == MOST_GATHERED {
                    done = side.copy_all(gathered);
                    gathered.clear();
                }
                gathered.push(next);
            });
            done?;
        }
        Ok(())
    }

    /// The copies of commands that nothing stands between, so that they have no order.
    pub(in crate::engine) fn expand(&self, commands: &[Command]) -> Batch {
        let mut batch = Batch::default();
        let (cache, codes) = (self.side.cache.read(), self.side.codes.read());
        for &command in commands {
            for &copy in CopySide::copies_of(&self.side.program, command) {
                if self.side.skips(command, copy) {
                    continue;
                }
                let weight = self.side.weights[index(copy.tensor)];
                // Arrived in RAM perhaps since the weights were looked at.
                let arrived = cache.source(copy.tensor).filter(|_| !weight.direct);
                let source = arrived.unwrap_or(weight.source);
                self.side.each_from(&codes, copy, source, |part_of, next| {
                    if !weight.direct && !next.source.is_encoded() {
                        batch.staged.push(Piece { copy: next, part_of });
                    } else if !join(&self.side, &mut batch.direct, next) {
                        batch.direct.push(next);
                    }
                });
            }
        }
        batch
    }

    /// Enqueues what was gathered.
    pub(in crate::engine) fn enqueue(&mut self) -> Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let done = self.side.copy_all(&self.gathered);
        self.gathered.clear();
        done
    }

    /// Enqueues copies, after all that came before and ahead of all that comes later.
    pub(in crate::engine) fn copy_all(&self, copies: &[H2d]) -> Result<()> {
        self.side.copy_all(copies)
    }

    /// Enqueues copies out of a chunk.
    pub(in crate::engine) fn copy_chunk(&self, chunk: u32, copies: &[H2d]) -> Result<()> {
        self.copy_all(copies)?;
        self.side.device.mark_chunk(chunk)
    }
}

/// Joins a copy to the last of some, if they are neighbours.
fn join(side: &CopySide, copies: &mut [H2d], next: H2d) -> bool {
    let Some(last) = copies.last_mut() else { return false };
    let bytes = last.bytes + next.bytes;
    let joins = last.meets(&next) && side.device.takes_as_one(last.source, bytes);
    if joins {
        last.bytes = bytes;
    }
    joins
}
