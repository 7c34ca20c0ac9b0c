//! What the staging thread has before it: commands, the steps that they became, and chunks.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::driver::{EventSlot, H2d};
use crate::engine::command::Command;
use crate::error::{Error, Result};
use crate::pool::Fill;
use crate::units::{index, narrow};

/// What the copy stream is given next.
#[derive(Debug)]
pub(super) enum Step {
    /// A command that is no copy.
    Run(Command),
    /// Copies that the device takes as they are.
    Copies { copies: Vec<H2d>, lasting: bool },
    /// Copies out of a chunk, which has a number once it is being filled.
    Chunk { fill: Arc<Fill>, chunk: Option<u32>, lasting: bool, dropped: bool },
}

/// What the thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It takes what comes.
    Runs,
    /// It begins nothing: somebody empties everything, and waits for what is under way.
    Halts,
    /// It ends when it has ended what is under way.
    Stops,
    /// It is no more: whoever waited for it would wait for ever.
    Ended,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) queue: VecDeque<Command>,
    pub(super) steps: VecDeque<Step>,
    pub(super) free: Vec<u32>,
    /// For each chunk how filling it ended.
    pub(super) filled: Vec<Option<Result<()>>>,
    pub(super) busy: bool,
    pub(super) phase: Phase,
    /// What is being looked at outside of the lock will not come.
    pub(super) cancelled: bool,
    /// The last *ready* that is enqueued on the copy stream.
    pub(super) issued_ticket: u64,
    /// The first error since the last reset; no later ticket is ever issued.
    pub(super) error: Option<Error>,
}

/// What becomes of the first step.
pub(super) enum First {
    /// It can be run.
    Is(Step),
    /// There is none, or its chunk is not full.
    Waits,
    /// It will not be run: no one needs it, or it could not be read.
    Dropped,
}

impl State {
    pub(super) fn new(chunks: usize, capacity: usize, issued_ticket: u64) -> Self {
        Self {
            queue: VecDeque::with_capacity(capacity * 2),
            steps: VecDeque::new(),
            free: (0..narrow(chunks)).rev().collect(),
            filled: vec![None; chunks],
            busy: false,
            phase: Phase::Runs,
            cancelled: false,
            issued_ticket,
            error: None,
        }
    }

    /// From one phase to another, unless the thread is in a third.
    pub(super) fn turn(&mut self, from: Phase, to: Phase) {
        if self.phase == from {
            self.phase = to;
        }
    }

    /// Drops the copies of uses that will not come; see `Stager::cancel`.
    pub(super) fn cancel(&mut self) {
        let keep = |command: &Command| {
            use Command::{Load, LoadMissing, WaitDecoded, WaitDone};
            matches!(command, WaitDone(_) | WaitDecoded | Load { .. } | LoadMissing { .. })
        };
        self.cancelled = true;
        self.queue.retain(keep);
        self.steps.retain_mut(|step| match step {
            Step::Run(command) => keep(command),
            Step::Copies { lasting, .. } => *lasting,
            Step::Chunk { lasting, chunk, dropped, .. } => {
                *dropped |= !*lasting;
                *lasting || chunk.is_some()
            }
        });
    }

    pub(super) fn has_run(&self) -> bool {
        self.queue.is_empty() && self.steps.is_empty() && !self.busy
    }

    /// Whether no step is under way, and no chunk is being filled.
    pub(super) fn is_still(&self) -> bool {
        let fills = self.filled.len() - self.free.len();
        let ended = self.filled.iter().filter(|filled| filled.is_some()).count();
        !self.busy && fills == ended
    }

    /// Empties everything; the chunks that are being filled are free when they are full.
    pub(super) fn take_waits(&mut self) -> Vec<EventSlot> {
        let wait = |command: &Command| match command {
            Command::WaitDone(slot) => Some(*slot),
            _ => None,
        };
        let mut waits: Vec<EventSlot> = Vec::new();
        for step in std::mem::take(&mut self.steps) {
            match step {
                Step::Run(command) => waits.extend(wait(&command)),
                Step::Chunk { chunk: Some(chunk), .. } => match self.filled[index(chunk)].take() {
                    Some(_) => self.free.push(chunk),
                    None => self.steps.push_back(Step::Chunk {
                        fill: Arc::default(),
                        chunk: Some(chunk),
                        lasting: false,
                        dropped: true,
                    }),
                },
                Step::Copies { .. } | Step::Chunk { .. } => {}
            }
        }
        waits.extend(self.queue.drain(..).filter_map(|command| wait(&command)));
        waits
    }

    /// The first step, if nothing has to be waited for.
    pub(super) fn first_step(&mut self) -> First {
        let Some(Step::Chunk { chunk, dropped, .. }) = self.steps.front() else {
            return self.steps.pop_front().map_or(First::Waits, First::Is);
        };
        let (Some(chunk), dropped) = (*chunk, *dropped) else { return First::Waits };
        match self.filled[index(chunk)].take() {
            None => First::Waits,
            Some(Ok(())) if !dropped => self.steps.pop_front().map_or(First::Waits, First::Is),
            Some(done) => {
                self.steps.pop_front();
                self.free.push(chunk);
                self.error = done.err().filter(|_| !dropped);
                First::Dropped
            }
        }
    }

    /// The first commands of the queue as work: copies that nothing stands between, which may be
    /// read together, or as steps the commands that are none.
    pub(super) fn take_copies(&mut self) -> Vec<Command> {
        while let Some(&command) = self.queue.front() {
            if lasting(command).is_some() {
                break;
            }
            self.queue.pop_front();
            self.steps.push_back(Step::Run(command));
        }
        let kind = self.queue.front().and_then(|&command| lasting(command));
        let alike = self.queue.iter().take_while(|&&command| lasting(command) == kind).count();
        self.queue.drain(..alike).collect()
    }
}

/// Of a command that copies, whether its bytes are needed whatever comes.
pub(super) fn lasting(command: Command) -> Option<bool> {
    match command {
        Command::Copy { .. } => Some(false),
        Command::Load { .. } | Command::LoadMissing { .. } => Some(true),
        _ => None,
    }
}
