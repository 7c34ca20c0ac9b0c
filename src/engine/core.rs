//! The state of an engine: keeps schedule, executor, memory and counts in step.

use std::sync::Arc;
use std::time::Instant;

use super::adapt::{Assembly, Balance, Proposal, Review, Tuner};
use super::command::Command;
use super::copying::{CopySide, Encode, Encoder, Host, Moved, MovedSums};
use super::encoding::Seen;
use super::executor::Executor;
use super::order::Order;
use super::schedule::Schedule;
use super::trace::{Counters, ErrorLog, Trace};
use super::verify::Verifier;
use super::{Spec, Stats};
use crate::driver::{ComputeStream, Device, EventSlot};
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::pool::{Arena, Staging};
use crate::units::index;

/// Whether the engine takes calls.
#[derive(Debug)]
pub(super) enum Life {
    Open,
    /// A call is under way. Only its caller sees this, unless the call panicked.
    Busy,
    /// Nothing is trusted any more, for this reason.
    Poisoned(String),
    /// With the numbers at the end.
    Closed(Stats),
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) spec: Spec,
    pub(super) plan: Plan,
    pub(super) order: Order,
    pub(super) device: Arc<dyn Device>,
    pub(super) arena: Arena,
    pub(super) schedule: Schedule,
    pub(super) executor: Executor,
    // Dropped after the executor: copies out of page-locked memory have ended then.
    pub(super) host: Host,
    pub(super) trace: Trace,
    pub(super) assembly: Assembly,
    pub(super) tuner: Tuner,
    pub(super) review: Review,
    pub(super) encoder: Encoder,
    /// How much is worth encoding, by the times of passes.
    pub(super) balance: Balance,
    pub(super) seen: Seen,
    /// A better plan for the present order and budget, to be adopted between passes.
    pub(super) proposal: Option<Proposal>,
    /// Since when the device has had nothing to do, because a better plan is taken up.
    pub(super) idle_since: Option<Instant>,
    /// A better plan was taken up, and its first pass has not been timed yet.
    pub(super) is_fresh: bool,
    pub(super) counters: Counters,
    pub(super) errors: ErrorLog,
    pub(super) verifier: Verifier,
    pub(super) commands: Vec<Command>,
    /// For each event slot, the number of the timed use whose times were not read yet.
    pub(super) unread: Vec<Option<u64>>,
    active_timed: Option<u64>,
    /// The stream of the last *done*.
    last_compute: ComputeStream,
    /// The stream on which the running block was entered.
    entered_on: ComputeStream,
    moved: Arc<Moved>,
    pub(super) moved_before: MovedSums,
    pub(super) staging_bytes: u64,
    /// For each tensor how many times as long as over the link its bytes take; empty: all alike.
    pub(super) slow: Vec<f64>,
    /// The arena was given back: no block may run until there is another one.
    pub(super) vacant: bool,
    pub(super) life: Life,
}

/// What a plan before leaves: memory, and residents in their place.
#[derive(Debug, Default)]
pub(super) struct Before {
    pub(super) host: Option<Host>,
    pub(super) staging: Option<Staging>,
    /// Empty, or for each tensor whether it lies where the plan has it.
    pub(super) kept: Vec<bool>,
}

impl Core {
    /// Page-locks, and makes everything that a plan needs. Nothing of an earlier plan runs any
    /// more; what it leaves is taken over where it still fits.
    pub(super) fn new(
        device: Arc<dyn Device>,
        spec: Spec,
        plan: Plan,
        arena: Arena,
        before: Before,
    ) -> Result<Self> {
        let Before { host, staging, kept } = before;
        let mut host = host.unwrap_or_else(|| Host::new(Arc::clone(&device)));
        host.prepare(&spec, &plan);
        let program = Arc::new(plan.program.clone());
        host.take_news();
        let mut weights = host.weights(&spec);
        let staging = match host.staging_for(&spec, &plan, &weights, staging) {
            Err(_) if host.give_up() => {
                weights = host.weights(&spec);
                host.staging_for(&spec, &plan, &weights, None)?
            }
            staging => staging?,
        };
        let slots = Schedule::event_slots(&program);
        // Also for chunks that are made only when page-locks are given back.
        device.prepare(slots, Host::chunks(&spec, &plan).0)?;
        let capacity = Schedule::most_commands(&program);
        let staging_bytes = staging.as_ref().map_or(0, Staging::bytes);
        let moved = Arc::new(Moved::default());
        let copy_side = CopySide {
            device: Arc::clone(&device),
            program: Arc::clone(&program),
            weights,
            arena,
            staging,
            cache: Arc::clone(&host.cache),
            codes: Arc::clone(&host.codes),
            kept: kept.clone(),
            moved: Arc::clone(&moved),
        };
        Ok(Self {
            device,
            schedule: Schedule::new(program, spec.options, &kept),
            executor: Executor::new(copy_side, Arc::clone(&host.choice), capacity)?,
            host,
            order: Order::new(spec.profile.order.clone()),
            trace: Trace::new(spec.trace_uses),
            assembly: Assembly::new(spec.profile.order.len()),
            tuner: Tuner::new(),
            review: Review::default(),
            encoder: Encoder::default(),
            balance: Balance::default(),
            seen: Seen::default(),
            proposal: None,
            idle_since: None,
            is_fresh: false,
            counters: Counters::default(),
            errors: ErrorLog::default(),
            verifier: Verifier::default(),
            commands: Vec::with_capacity(capacity),
            unread: vec![None; index(slots)],
            active_timed: None,
            last_compute: ComputeStream::default(),
            entered_on: ComputeStream::default(),
            moved,
            moved_before: MovedSums::default(),
            staging_bytes,
            vacant: false,
            slow: Vec::new(),
            life: Life::Open,
            spec,
            plan,
            arena,
        })
    }

    /// One call: refused where the engine takes none; if it panics, none is taken any more.
    ///
    /// # Errors
    ///
    /// Why the engine takes no calls, or the error of `act`.
    pub(super) fn call<T>(&mut self, act: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.vacant && self.is_open() {
            return Err(Error::Misuse(
                "the engine gave its memory back and has got no other".into(),
            ));
        }
        self.call_vacant(act)
    }

    /// As [`Core::call`], also where there is no arena.
    pub(super) fn call_vacant<T>(&mut self, act: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        match &self.life {
            Life::Open => self.life = Life::Busy,
            Life::Busy => return Err(Error::Poisoned("a call panicked".into())),
            Life::Poisoned(reason) => return Err(Error::Poisoned(reason.clone())),
            Life::Closed(_) => return Err(Error::Misuse("the engine is closed".into())),
        }
        let result = act(self);
        if matches!(self.life, Life::Busy) {
            self.life = Life::Open;
        }
        result
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.life, Life::Open | Life::Busy)
    }

    pub(super) fn is_closed(&self) -> bool {
        matches!(self.life, Life::Closed(_))
    }

    /// Refuses all later calls for `reason`.
    pub(super) fn poison(&mut self, reason: String) {
        self.schedule.forget();
        self.life = Life::Poisoned(reason);
    }

    /// Whether `enter` may have to wait for a copy.
    pub(super) fn may_block(&self, block: u32) -> bool {
        if self.spec.encode != Encode::Off && self.host.has_retired() {
            return true; // a pass that ends in `enter` waits for the copies under way
        }
        if self.schedule.expects_quiet(block) {
            return false;
        }
        let expected = self.schedule.expected(block);
        expected.is_none_or(|slot| !self.executor.is_idle() || self.device.blocks_host(slot))
    }

    pub(super) fn enter(&mut self, block: u32, compute: ComputeStream) -> Result<u32> {
        self.mark_origin(compute)?;
        if compute != self.last_compute {
            self.mark_unmarked()?;
            self.schedule.switch_stream();
        }
        let last = self.schedule.last_done();
        self.commands.clear();
        let entered = self.schedule.enter(block, &mut self.commands)?;
        self.forget_times(entered.slot);
        self.active_timed = entered.number.filter(|_| entered.timed);
        self.run(compute, last)?;
        if self.spec.options.verify {
            let checked = self.verify(entered.position, compute);
            checked.inspect_err(|error| self.failed(error, compute, last))?;
        }
        self.entered_on = compute;
        self.note_pause();
        let passes = self.order.passes();
        self.order.seen(block);
        if self.order.passes() > passes {
            self.pass_ended();
        }
        if entered.number.is_some_and(|number| self.schedule.polls(number)) {
            self.poll_times();
        }
        self.counters.uses += 1;
        self.counters.on_demand += u64::from(entered.on_demand);
        self.counters.mispredicted += u64::from(entered.skipped > 0 || entered.number.is_none());
        Ok(entered.position)
    }

    pub(super) fn exit(&mut self, compute: ComputeStream) -> Result<()> {
        let last = self.schedule.last_done();
        self.commands.clear();
        if compute != self.last_compute {
            // Uses before this one ran on another stream: what comes must wait for those as well.
            self.commands.extend(last.map(Command::Join));
        }
        let slot = self.schedule.exit(&mut self.commands)?;
        self.last_compute = compute;
        if let Some(number) = self.active_timed.take() {
            self.unread[index(slot.0)] = Some(number);
        }
        self.run(compute, last)
    }

    pub(super) fn prefetch(&mut self, compute: ComputeStream) -> Result<()> {
        if self.schedule.active_block().is_some() {
            return Ok(()); // `enter` has enqueued all that may come early
        }
        self.mark_origin(compute)?;
        let last = self.schedule.last_done();
        self.commands.clear();
        self.schedule.prefetch(&mut self.commands);
        self.run(compute, last)
    }

    pub(super) fn reload(&mut self, block: u32) -> Result<()> {
        if index(block) >= self.plan.program.loads.len() {
            return Err(Error::Misuse(format!("block {block} is not in the plan")));
        }
        self.mark_unmarked()?; // its kernels may still read what will be overwritten
        self.forget_codes(block);
        self.schedule.reload(block);
        Ok(())
    }

    /// Marks the end of the uses that had none, on the stream that they ran on.
    fn mark_unmarked(&mut self) -> Result<()> {
        let Some(slot) = self.schedule.unmarked() else { return Ok(()) };
        self.forget_times(slot);
        let compute = self.last_compute;
        let marked = self.device.mark_done(slot, compute);
        marked.inspect_err(|error| self.failed(error, compute, None))?;
        self.schedule.marked(slot);
        Ok(())
    }

    /// Kernels that ran before may still use the memory that became the arena.
    fn mark_origin(&mut self, compute: ComputeStream) -> Result<()> {
        if self.schedule.needs_origin() {
            let marked = self.device.mark_done(self.schedule.origin(), compute);
            marked.inspect_err(|error| self.failed(error, compute, None))?;
            self.schedule.marked_origin();
            self.last_compute = compute;
        }
        Ok(())
    }

    /// Runs the commands; `last` is the last *done* from before they were made.
    fn run(&mut self, compute: ComputeStream, last: Option<EventSlot>) -> Result<()> {
        self.read_times();
        let done = self.executor.run(&self.commands, compute);
        done.inspect_err(|error| self.failed(error, compute, last))
    }

    /// What is on the device is not known any more: bring all of it again, or refuse to go on.
    fn failed(&mut self, error: &Error, compute: ComputeStream, last: Option<EventSlot>) {
        self.counters.errors += 1;
        self.errors.note(error);
        self.active_timed = None;
        let settled =
            if error.is_sticky() { Err(error.clone()) } else { self.settle(compute, last) };
        self.schedule.forget();
        if let Err(reason) = settled {
            self.poison(reason.to_string());
        }
    }

    /// Blocks until nothing runs any more, on no stream that was ever named, although any of the
    /// last commands may not have been enqueued.
    fn settle(&self, compute: ComputeStream, last: Option<EventSlot>) -> Result<()> {
        self.executor.recover()?;
        let origin = self.schedule.origin();
        self.device.mark_done(origin, compute)?;
        self.device.quiesce(Some(origin))?;
        self.device.quiesce(last)
    }

    /// Blocks until nothing of this engine reads or writes on the device any more.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.review.stop();
        self.encoder.stop();
        self.proposal = None;
        let marked = self.mark_unmarked();
        let stopped = self.executor.stop();
        let running = self.schedule.active_block().map_or(Ok(()), |_| {
            let origin = self.schedule.origin();
            self.device.mark_done(origin, self.entered_on)?;
            self.device.quiesce(Some(origin))
        });
        let ended = self.device.quiesce(self.schedule.last_done());
        self.read_all_times();
        self.unread.fill(None);
        marked.and(stopped).and(running).and(ended)
    }

    /// Ends all work and gives the host memory back. An error that poisoned the engine was told
    /// already.
    pub(super) fn close(&mut self) -> Result<()> {
        // If this panics, no later call is to find the engine open.
        let before = std::mem::replace(&mut self.life, Life::Busy);
        let stopped = self.stop();
        let stats = self.stats();
        drop(self.executor.take_staging());
        self.host.clear();
        self.life = Life::Closed(stats);
        if matches!(before, Life::Poisoned(_)) { Ok(()) } else { stopped }
    }

    pub(super) fn moved(&self) -> MovedSums {
        self.moved.sums() + self.moved_before
    }

    pub(super) fn stats(&self) -> Stats {
        if let Life::Closed(stats) = &self.life {
            return *stats;
        }
        let MovedSums { bytes, copies, encoded_bytes, decoded_bytes } = self.moved();
        Stats {
            counters: self.counters,
            passes: self.order.passes(),
            bytes,
            copies,
            pinned_bytes: self.host.pinned().0 + self.proposal.as_ref().map_or(0, Proposal::pinned),
            pin_failures: self.host.pinned().1,
            staging_bytes: self.staging_bytes,
            encoded_bytes,
            decoded_bytes,
            code_bytes: self.host.codes.read().bytes(),
        }
    }
}
