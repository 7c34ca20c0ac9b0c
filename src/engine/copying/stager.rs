//! The staging thread: enqueues, in order, commands of the copy stream that wait for a chunk.
//!
//! Commands become *steps*. What has to be staged is handed to the reading threads as soon as a
//! chunk is free, so that they read ahead of the copies, in the order of the plan; a step that has
//! a chunk to wait for is enqueued when it is the first and its chunk is full. While there are
//! steps, every command of the copy stream goes through here. After an error nothing more is run
//! until [`Stager::reset`]: what follows may depend on what failed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::RwLock;

use super::lane::{Batch, Lane};
use super::steps::{First, Phase, State, Step, lasting};
use crate::driver::{Device, EventSlot};
use crate::engine::command::Command;
use crate::error::{Error, Result};
use crate::pool::{Cache, Job, Readers, SharedChoice, Staging, pack};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex};
use crate::units::index;

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    ran: Condvar,
    chunks: Vec<u64>,
    chunk_bytes: u64,
}

/// The thread, its queue, and the threads that read for it.
#[derive(Debug)]
pub(in crate::engine) struct Stager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread has to do outside of the lock.
enum Work {
    Expand(Vec<Command>),
    Step(Step),
}

impl Stager {
    /// `issued_ticket` is of the last *ready* that the calling thread has enqueued.
    pub(in crate::engine) fn start(
        lane: Arc<Mutex<Lane>>,
        device: Arc<dyn Device>,
        staging: &Staging,
        cache: Arc<RwLock<Cache>>,
        choice: SharedChoice,
        capacity: usize,
        issued_ticket: u64,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(staging.chunks().len(), capacity, issued_ticket)),
            work: Condvar::new(),
            ran: Condvar::new(),
            chunks: staging.chunks().to_vec(),
            chunk_bytes: staging.chunk_bytes(),
        });
        let told = {
            let shared = Arc::clone(&shared);
            Box::new(move |chunk, done| shared.filled(chunk, done))
        };
        let readers = Readers::start(Arc::clone(&device), cache, choice, told)?;
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("dgls-staging".into())
                .spawn(move || shared.run(&lane, device.as_ref(), &readers))
                .map_err(|e| Error::Invalid(format!("the staging thread did not start: {e}")))?
        };
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Adds commands, which the thread sees all at once.
    pub(in crate::engine) fn push(&self, commands: impl IntoIterator<Item = Command>) {
        self.shared.state.lock().queue.extend(commands);
        self.shared.work.notify_one();
    }

    /// Whether everything that was pushed has run, so that the calling thread may use the copy
    /// stream itself.
    pub(in crate::engine) fn is_idle(&self) -> bool {
        let state = self.shared.state.lock();
        state.has_run() && state.error.is_none() && state.phase == Phase::Runs
    }

    /// The calling thread has enqueued a *ready* itself, while this one was idle.
    pub(in crate::engine) fn note_issued(&self, ticket: u64) {
        self.shared.state.lock().issued_ticket = ticket;
    }

    /// Blocks until the *ready* with this ticket is enqueued: a wait for it would be a no-op
    /// before.
    pub(in crate::engine) fn wait_issued(&self, ticket: u64) -> Result<()> {
        let mut state = self.shared.state.lock();
        while state.issued_ticket < ticket {
            if let Some(error) = &state.error {
                return Err(error.clone());
            }
            if state.phase == Phase::Ended {
                return Err(Error::Internal("the staging thread has ended".into()));
            }
            if state.has_run() {
                return Err(Error::Internal(format!("copies {ticket} were never asked for")));
            }
            self.shared.ran.wait(&mut state);
        }
        Ok(())
    }

    /// Blocks until everything that was pushed has run, or an error stops it: then no thread reads
    /// any host weights.
    pub(in crate::engine) fn wait_idle(&self) {
        let mut state = self.shared.state.lock();
        while !(state.phase == Phase::Ended
            || state.has_run()
            || (state.error.is_some() && state.is_still()))
        {
            self.shared.ran.wait(&mut state);
        }
    }

    /// Drops the copies of uses that will not come. Loads stay, since residents are needed
    /// whatever comes; waits stay, since they order what comes later. What a thread is reading
    /// already is read to its end, and then dropped.
    pub(in crate::engine) fn cancel(&self) {
        self.shared.state.lock().cancel();
    }

    /// Drops everything, the error as well, and gives back what was to be waited for.
    /// Blocks until the step and the reads under way have ended.
    pub(in crate::engine) fn reset(&self) -> Vec<EventSlot> {
        let mut state = self.shared.state.lock();
        // What is looked at just now becomes steps, which nothing orders without the waits.
        state.turn(Phase::Runs, Phase::Halts);
        let mut waits = state.take_waits();
        while !(state.phase == Phase::Ended || state.is_still()) {
            self.shared.ran.wait(&mut state);
        }
        // The step under way may have been a wait that failed.
        waits.extend(state.take_waits());
        state.turn(Phase::Halts, Phase::Runs);
        state.error = None;
        waits
    }
}

impl Drop for Stager {
    fn drop(&mut self) {
        self.shared.state.lock().phase = Phase::Stops;
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.take() {
            // If it panicked, `Ended` has told whoever waited.
            let _ = thread.join();
        }
    }
}

/// Tells whoever waits that the thread is no more, however it ended.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        (state.phase, state.busy) = (Phase::Ended, false);
        self.0.ran.notify_all();
    }
}

impl Shared {
    fn run(&self, lane: &Mutex<Lane>, device: &dyn Device, readers: &Readers) {
        let _told = Ended(self);
        while let Some(work) = self.next(readers) {
            match work {
                Work::Expand(commands) => {
                    let lasting = commands.first().and_then(|&c| lasting(c)) == Some(true);
                    let expand = || Ok(self.steps_of(lane.lock().expand(&commands), lasting));
                    let steps = fenced(expand);
                    self.add(steps, lasting);
                }
                Work::Step(step) => {
                    let done = fenced(|| self.perform(&step, lane));
                    self.note(step, done);
                    // Nobody else tells the device that there is work.
                    device.flush();
                }
            }
        }
    }

    fn steps_of(&self, batch: Batch, lasting: bool) -> Vec<Step> {
        let direct =
            (!batch.direct.is_empty()).then_some(Step::Copies { copies: batch.direct, lasting });
        let fills = pack(batch.staged, self.chunk_bytes).into_iter();
        let chunk =
            |fill| Step::Chunk { fill: Arc::new(fill), chunk: None, lasting, dropped: false };
        direct.into_iter().chain(fills.map(chunk)).collect()
    }

    fn add(&self, steps: Result<Vec<Step>>, lasting: bool) {
        let mut state = self.state.lock();
        state.busy = false;
        match steps {
            Ok(_) if state.cancelled && !lasting => {}
            Ok(steps) => state.steps.extend(steps),
            Err(error) => {
                state.error.get_or_insert(error);
            }
        }
        self.ran.notify_all();
    }

    fn perform(&self, step: &Step, lane: &Mutex<Lane>) -> Result<()> {
        match step {
            Step::Run(command) => lane.lock().run(*command),
            Step::Copies { copies, .. } => lane.lock().copy_all(copies),
            Step::Chunk { fill, chunk: Some(chunk), dropped: false, .. } => {
                let copies = fill.copies(self.chunks[index(*chunk)]);
                lane.lock().copy_chunk(*chunk, &copies)
            }
            Step::Chunk { .. } => Ok(()),
        }
    }

    /// Blocks until there is something to do; `None` when the thread has to end.
    fn next(&self, readers: &Readers) -> Option<Work> {
        let mut state = self.state.lock();
        loop {
            if state.phase == Phase::Stops {
                return None;
            }
            if state.error.is_none() && state.phase == Phase::Runs {
                // Reads are begun before anything is waited for.
                let copies = state.take_copies();
                if !copies.is_empty() {
                    (state.busy, state.cancelled) = (true, false);
                    return Some(Work::Expand(copies));
                }
                self.hand_out(&mut state, readers);
                match state.first_step() {
                    First::Is(step) => {
                        state.busy = true;
                        return Some(Work::Step(step));
                    }
                    First::Dropped => {
                        self.ran.notify_all();
                        continue;
                    }
                    First::Waits => {}
                }
            }
            self.work.wait(&mut state);
        }
    }

    /// Gives free chunks to the first steps that need one.
    fn hand_out(&self, state: &mut State, readers: &Readers) {
        let State { steps, free, .. } = state;
        for step in steps {
            if let Step::Chunk { fill, chunk: chunk @ None, .. } = step {
                let Some(number) = free.pop() else { return };
                *chunk = Some(number);
                let address = self.chunks[index(number)];
                readers.submit(Job { chunk: number, address, fill: Arc::clone(fill) });
            }
        }
    }

    fn filled(&self, chunk: u32, done: Result<()>) {
        self.state.lock().filled[index(chunk)] = Some(done);
        self.work.notify_one();
        self.ran.notify_all();
    }

    fn note(&self, step: Step, done: Result<()>) {
        let mut state = self.state.lock();
        state.busy = false;
        if let Step::Chunk { chunk: Some(chunk), .. } = step {
            state.free.push(chunk);
        }
        match (done, step) {
            (Ok(()), Step::Run(Command::Ready { ticket, .. })) => state.issued_ticket = ticket,
            (Ok(()), _) => {}
            (Err(error), step) => {
                // A wait that failed is still to be waited for.
                if let Step::Run(_) = step {
                    state.steps.push_front(step);
                }
                state.error = Some(error);
            }
        }
        self.ran.notify_all();
    }
}

/// Turns a panic into an error.
fn fenced<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(act))
        .unwrap_or_else(|_| Err(Error::Internal("the staging thread panicked".into())))
}
