//! The staging thread: enqueues copies whose source has to be read into a chunk first.
//!
//! While it has work, every command of the copy stream goes through it, in order. After an error
//! it runs nothing more until [`Stager::reset`]: what follows may depend on what failed.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::command::Command;
use super::executor::Lane;
use crate::driver::EventSlot;
use crate::error::{Error, Result};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex};

#[derive(Debug)]
struct State {
    queue: VecDeque<Command>,
    busy: bool,
    stop: bool,
    /// The thread is no more: whoever waited for it would wait for ever.
    ended: bool,
    /// The last *ready* that is enqueued on the copy stream.
    issued_ticket: u64,
    /// The first error since the last reset; no later ticket is ever issued.
    error: Option<Error>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    ran: Condvar,
}

/// The thread and its queue.
#[derive(Debug)]
pub(super) struct Stager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Stager {
    pub(super) fn start(lane: Arc<Mutex<Lane>>, capacity: usize) -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queue: VecDeque::with_capacity(capacity * 2),
                busy: false,
                stop: false,
                ended: false,
                issued_ticket: 0,
                error: None,
            }),
            work: Condvar::new(),
            ran: Condvar::new(),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("dgls-staging".into())
                .spawn(move || shared.run(&lane))
                .map_err(|e| Error::Invalid(format!("the staging thread did not start: {e}")))?
        };
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(super) fn push(&self, command: Command) {
        self.shared.state.lock().queue.push_back(command);
        self.shared.work.notify_one();
    }

    /// Whether everything that was pushed has run, so that the calling thread may use the copy
    /// stream itself.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.shared.state.lock();
        state.queue.is_empty() && !state.busy && state.error.is_none() && !state.ended
    }

    /// The calling thread has enqueued a *ready* itself, while this one was idle.
    pub(super) fn note_issued(&self, ticket: u64) {
        self.shared.state.lock().issued_ticket = ticket;
    }

    /// Blocks until the *ready* with this ticket is enqueued: a wait for it would be a no-op
    /// before.
    pub(super) fn wait_issued(&self, ticket: u64) -> Result<()> {
        let mut state = self.shared.state.lock();
        while state.issued_ticket < ticket {
            if let Some(error) = &state.error {
                return Err(error.clone());
            }
            if state.ended {
                return Err(Error::Internal("the staging thread has ended".into()));
            }
            if state.queue.is_empty() && !state.busy {
                return Err(Error::Internal(format!("copies {ticket} were never asked for")));
            }
            self.shared.ran.wait(&mut state);
        }
        Ok(())
    }

    /// Drops the copies of uses that will not come. Loads stay, since residents are needed
    /// whatever comes; waits stay, since they order what comes later.
    pub(super) fn cancel(&self) {
        let keep = |command: &Command| {
            use Command::{Load, LoadMissing, WaitDone};
            matches!(command, WaitDone(_) | Load { .. } | LoadMissing { .. })
        };
        self.shared.state.lock().queue.retain(keep);
    }

    /// Drops everything, the error as well, and gives back what was to be waited for.
    /// Blocks until the command under way has ended.
    pub(super) fn reset(&self) -> Vec<EventSlot> {
        let wait = |command: Command| match command {
            Command::WaitDone(slot) => Some(slot),
            _ => None,
        };
        let mut state = self.shared.state.lock();
        let mut waits: Vec<EventSlot> = state.queue.drain(..).filter_map(wait).collect();
        while state.busy {
            self.shared.ran.wait(&mut state);
        }
        // The command under way may have been a wait that failed.
        waits.extend(state.queue.drain(..).filter_map(wait));
        state.error = None;
        waits
    }
}

impl Drop for Stager {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
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
        (state.ended, state.busy) = (true, false);
        self.0.ran.notify_all();
    }
}

impl Shared {
    fn run(&self, lane: &Mutex<Lane>) {
        let _told = Ended(self);
        while let Some(command) = self.next() {
            let run = || lane.lock().run(command);
            let done = catch_unwind(AssertUnwindSafe(run))
                .unwrap_or_else(|_| Err(Error::Internal("the staging thread panicked".into())));
            self.note(command, done);
        }
    }

    /// Blocks until there is a command to run; `None` when the thread has to end.
    fn next(&self) -> Option<Command> {
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return None;
            }
            if state.error.is_none() {
                if let Some(command) = state.queue.pop_front() {
                    state.busy = true;
                    return Some(command);
                }
            }
            self.work.wait(&mut state);
        }
    }

    fn note(&self, command: Command, done: Result<()>) {
        let mut state = self.state.lock();
        state.busy = false;
        match (done, command) {
            (Ok(()), Command::Ready { ticket, .. }) => state.issued_ticket = ticket,
            (Ok(()), _) => {}
            (Err(error), command) => {
                state.queue.push_front(command);
                state.error = Some(error);
            }
        }
        self.ran.notify_all();
    }
}
