//! Command in, device call out: the only place where the schedule meets the device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::command::Command;
use super::stager::Stager;
use crate::driver::{ComputeStream, Device, H2d, Source};
use crate::error::{Error, Result};
use crate::plan::{Copy, Program};
use crate::pool::{Arena, Staging};
use crate::sync::{Mutex, MutexGuard};
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

/// Bytes and number of the copies enqueued so far; read without stopping who counts.
#[derive(Debug, Default)]
pub(super) struct Moved {
    bytes: AtomicU64,
    copies: AtomicU64,
}

impl Moved {
    fn add(&self, bytes: u64, copies: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.copies.fetch_add(copies, Ordering::Relaxed);
    }

    /// Bytes and copies.
    pub(super) fn sums(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.copies.load(Ordering::Relaxed))
    }
}

/// The copy stream's half: runs in the calling thread, or in the staging thread.
#[derive(Debug)]
pub(super) struct CopySide {
    pub(super) device: Arc<dyn Device>,
    pub(super) program: Arc<Program>,
    pub(super) weights: Vec<Weight>,
    pub(super) arena: Arena,
    pub(super) staging: Option<Staging>,
    /// Resident tensors that the plan before had in the same place.
    pub(super) kept: Vec<bool>,
    pub(super) moved: Arc<Moved>,
}

impl CopySide {
    /// Runs a command that is no copy.
    fn run(&self, command: Command) -> Result<()> {
        match command {
            Command::WaitDone(slot) => self.device.wait_done(slot),
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
pub(super) struct Lane {
    side: CopySide,
    gathered: Vec<H2d>,
}

impl Lane {
    pub(super) fn new(side: CopySide) -> Self {
        Self { side, gathered: Vec::with_capacity(MOST_GATHERED) }
    }

    /// Runs a command to its end.
    pub(super) fn run(&mut self, command: Command) -> Result<()> {
        self.take(command)?;
        self.enqueue()
    }

    /// Runs a command, but only gathers the copies that the device takes as they are.
    fn take(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Copy { index: number } => self.copy(self.side.program.copies[index(number)]),
            Command::Load { block } => {
                let program = Arc::clone(&self.side.program);
                program.loads[index(block)].iter().try_for_each(|&copy| self.copy(copy))
            }
            Command::LoadMissing { block } => {
                let program = Arc::clone(&self.side.program);
                for &load in &program.loads[index(block)] {
                    if !self.side.kept[index(load.tensor)] {
                        self.copy(load)?;
                    }
                }
                Ok(())
            }
            other => self.side.run(other),
        }
    }

    fn copy(&mut self, copy: Copy) -> Result<()> {
        let weight = self.side.weights[index(copy.tensor)];
        let source = weight.source.advanced(copy.source_offset);
        let target = self.side.arena.at(copy.target_offset, copy.bytes);
        if weight.direct {
            return self.gather(H2d { source, target, bytes: copy.bytes });
        }
        self.enqueue()?;
        self.side.moved.add(copy.bytes, 1);
        match &mut self.side.staging {
            Some(staging) => staging.copy(source, target, copy.bytes),
            None => Err(Error::Internal("a weight to stage, but no staging chunks".into())),
        }
    }

    /// Joins neighbours to one copy.
    fn gather(&mut self, next: H2d) -> Result<()> {
        if let Some(last) = self.gathered.last_mut() {
            let bytes = last.bytes + next.bytes;
            if last.meets(&next) && self.side.device.takes_as_one(last.source, bytes) {
                last.bytes = bytes;
                return Ok(());
            }
        }
        if self.gathered.len() == MOST_GATHERED {
            self.enqueue()?;
        }
        self.gathered.push(next);
        Ok(())
    }

    /// Enqueues what was gathered.
    fn enqueue(&mut self) -> Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let bytes = self.gathered.iter().map(|copy| copy.bytes).sum();
        self.side.moved.add(bytes, self.gathered.len() as u64);
        let done = self.side.device.copy_batch(&self.gathered);
        self.gathered.clear();
        done
    }
}

/// Who runs the copy side's commands of one call.
enum Runner<'a> {
    Here(MutexGuard<'a, Lane>),
    Thread(&'a Stager),
}

impl Runner<'_> {
    fn enqueue(&mut self) -> Result<()> {
        match self {
            Self::Here(lane) => lane.enqueue(),
            Self::Thread(_) => Ok(()),
        }
    }
}

/// Runs commands; hands the copy side to the staging thread while that has work.
#[derive(Debug)]
pub(super) struct Executor {
    device: Arc<dyn Device>,
    lane: Arc<Mutex<Lane>>,
    stager: Option<Stager>,
    staged_copies: Vec<bool>,
    staged_loads: Vec<bool>,
}

impl Executor {
    /// # Errors
    ///
    /// [`Error::Invalid`] when the system refuses the staging thread.
    pub(super) fn new(copy_side: CopySide, capacity: usize) -> Result<Self> {
        let indirect = |copy: &Copy| !copy_side.weights[index(copy.tensor)].direct;
        let program = &copy_side.program;
        let staged_copies: Vec<bool> = program.copies.iter().map(indirect).collect();
        let staged_loads: Vec<bool> =
            program.loads.iter().map(|loads| loads.iter().any(indirect)).collect();
        let any = staged_copies.iter().chain(&staged_loads).any(|&s| s);
        if any && copy_side.staging.is_none() {
            return Err(Error::Internal("weights to stage, but no staging chunks".into()));
        }
        let device = Arc::clone(&copy_side.device);
        let lane = Arc::new(Mutex::new(Lane::new(copy_side)));
        let stager = if any { Some(Stager::start(Arc::clone(&lane), capacity)?) } else { None };
        Ok(Self { device, lane, stager, staged_copies, staged_loads })
    }

    fn needs_staging(&self, command: Command) -> bool {
        match command {
            Command::Copy { index: number } => self.staged_copies[index(number)],
            Command::Load { block } | Command::LoadMissing { block } => {
                self.staged_loads[index(block)]
            }
            _ => false,
        }
    }

    /// Runs `commands` in order. Blocks only in an acquire whose copies the staging thread has
    /// not enqueued yet (and, on the host device, until they have arrived).
    ///
    /// # Errors
    ///
    /// The first error; what follows it was not run.
    pub(super) fn run(&self, commands: &[Command], compute: ComputeStream) -> Result<()> {
        let queue = self.stager.as_ref().filter(|stager| {
            commands.iter().any(|&command| self.needs_staging(command)) || !stager.is_idle()
        });
        let mut runner = queue.map_or_else(|| Runner::Here(self.lane.lock()), Runner::Thread);
        for &command in commands {
            use Command::{Copy, Load, LoadMissing};
            if !matches!(command, Copy { .. } | Load { .. } | LoadMissing { .. }) {
                runner.enqueue()?;
            }
            match command {
                Command::Acquire { slot, ticket, timed } => {
                    if timed {
                        // Before the host blocks: its waiting is a stall like any other.
                        self.device.mark_wait(slot, compute)?;
                    }
                    if let Some(stager) = &self.stager {
                        stager.wait_issued(ticket)?;
                    }
                    self.device.wait_ready(slot, compute, timed)?;
                }
                Command::Release(slot) => self.device.mark_done(slot, compute)?,
                Command::Join(slot) => self.device.wait_done(slot)?,
                Command::Cancel => queue.iter().for_each(|stager| stager.cancel()),
                copy_side => match &mut runner {
                    Runner::Thread(stager) => stager.push(copy_side),
                    Runner::Here(lane) => self.run_here(lane, copy_side)?,
                },
            }
        }
        runner.enqueue()?;
        drop(runner);
        self.device.flush();
        Ok(())
    }

    /// Whether the staging thread has nothing to do.
    pub(super) fn is_idle(&self) -> bool {
        self.stager.as_ref().is_none_or(Stager::is_idle)
    }

    /// Runs a command of the copy side in the calling thread; the staging thread is idle.
    fn run_here(&self, lane: &mut Lane, command: Command) -> Result<()> {
        lane.take(command)?;
        if let (Some(stager), Command::Ready { ticket, .. }) = (&self.stager, command) {
            stager.note_issued(ticket);
        }
        Ok(())
    }

    /// After an error: drops the copies that are not enqueued yet, but not the waits.
    ///
    /// # Errors
    ///
    /// The device's error; then nothing is known of what still runs.
    pub(super) fn recover(&self) -> Result<()> {
        let queued = self.stager.as_ref().map_or_else(Vec::new, Stager::reset);
        // Something is left only where a panic came between.
        self.lane.lock().gathered.clear();
        queued.into_iter().try_for_each(|slot| self.device.wait_done(slot))
    }

    /// Ends the staging thread; otherwise as [`Executor::recover`].
    ///
    /// # Errors
    ///
    /// As [`Executor::recover`].
    pub(super) fn stop(&mut self) -> Result<()> {
        let recovered = self.recover();
        self.stager = None;
        recovered
    }

    /// Takes the staging chunks, of an executor that has stopped.
    pub(super) fn take_staging(&self) -> Option<Staging> {
        self.lane.lock().side.staging.take()
    }
}
