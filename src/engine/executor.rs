//! Command in, device call out: the only place where the schedule meets the device.

use std::sync::Arc;

use parking_lot::RwLock;

use super::command::Command;
use super::copying::{CopySide, Lane, Stager, Weight};
use crate::driver::{ComputeStream, Device};
use crate::error::{Error, Result};
use crate::plan::{Copy, Program};
use crate::pool::{Cache, SharedChoice, Staging};
use crate::sync::{Mutex, MutexGuard};
use crate::units::index;

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
    program: Arc<Program>,
    lane: Arc<Mutex<Lane>>,
    stager: Option<Stager>,
    staged_copies: Vec<bool>,
    staged_loads: Vec<bool>,
    cache: Arc<RwLock<Cache>>,
    choice: SharedChoice,
    capacity: usize,
}

impl Executor {
    /// # Errors
    ///
    /// [`Error::Invalid`] when the system refuses the staging thread.
    pub(super) fn new(copy_side: CopySide, choice: SharedChoice, capacity: usize) -> Result<Self> {
        let weights = copy_side.weights.clone();
        let mut executor = Self {
            device: Arc::clone(&copy_side.device),
            program: Arc::clone(&copy_side.program),
            cache: Arc::clone(&copy_side.cache),
            lane: Arc::new(Mutex::new(Lane::new(copy_side))),
            stager: None,
            staged_copies: Vec::new(),
            staged_loads: Vec::new(),
            choice,
            capacity,
        };
        executor.update(weights)?;
        Ok(executor)
    }

    /// Takes note of where the weights are now. What is enqueued already comes from where they
    /// were.
    ///
    /// # Errors
    ///
    /// As [`Executor::new`].
    pub(super) fn update(&mut self, weights: Vec<Weight>) -> Result<()> {
        let staged = |copy: &Copy| !weights[index(copy.tensor)].direct;
        self.staged_copies = self.program.copies.iter().map(staged).collect();
        self.staged_loads =
            self.program.loads.iter().map(|loads| loads.iter().any(staged)).collect();
        let any = self.staged_copies.iter().chain(&self.staged_loads).any(|&staged| staged);
        let mut lane = self.lane.lock();
        let issued = lane.issued();
        if any && self.stager.is_none() {
            let Some(staging) = lane.staging() else {
                return Err(Error::Internal("weights to stage, but no staging chunks".into()));
            };
            self.stager = Some(Stager::start(
                Arc::clone(&self.lane),
                Arc::clone(&self.device),
                staging,
                Arc::clone(&self.cache),
                Arc::clone(&self.choice),
                self.capacity,
                issued,
            )?);
        }
        lane.set_weights(weights);
        Ok(())
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
        let mut rest = commands;
        while let Some((&command, after)) = rest.split_first() {
            if let Runner::Thread(stager) = &runner {
                let pushed = rest.iter().take_while(|command| command.is_queued()).count();
                if pushed > 0 {
                    stager.push(rest[..pushed].iter().copied());
                    rest = &rest[pushed..];
                    continue;
                }
            }
            rest = after;
            if !command.copies() {
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
                copy_side => {
                    if let Runner::Here(lane) = &mut runner {
                        self.run_here(lane, copy_side)?;
                    }
                }
            }
        }
        runner.enqueue()?;
        drop(runner);
        self.device.flush();
        Ok(())
    }

    /// Blocks until no host weights are read but by copies that are enqueued.
    pub(super) fn settle(&self) {
        self.stager.iter().for_each(Stager::wait_idle);
    }

    /// Whether there is a staging thread.
    pub(super) fn is_staging(&self) -> bool {
        self.stager.is_some()
    }

    /// Whether there are staging chunks.
    pub(super) fn has_staging(&self) -> bool {
        self.lane.lock().staging().is_some()
    }

    /// Gives the staging chunks that were not needed so far.
    pub(super) fn give_staging(&self, staging: Option<Staging>) {
        *self.lane.lock().staging() = staging;
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
        self.lane.lock().forget();
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
        self.lane.lock().staging().take()
    }
}
