//! What runs every block: enter, exit, and the state between them.

mod adapt;
mod command;
mod copying;
mod core;
mod encoding;
mod executor;
mod order;
mod relief;
mod schedule;
mod trace;
mod verify;

#[cfg(all(test, loom))]
#[path = "../../tests/loom/stager.rs"]
mod stager_model;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

pub use adapt::{Adapt, News, PassTimes, Reason, Tuner};
pub use command::{Command, Options};
pub use copying::{Encode, HostFacts, Weight};
pub use order::Order;
pub use schedule::{Entered, Schedule};
pub use trace::{Counters, Record, Trace};

use self::core::{Before, Core};
use crate::codec::Element;
use crate::driver::{ComputeStream, Device, Source};
use crate::error::{Error, Result};
use crate::fence::fence;
use crate::plan::{Plan, Profile, bound_s, period_s, plan};
use crate::pool::Arena;
use crate::units::index;

/// What an engine is made with.
#[derive(Debug, Clone, Default)]
pub struct Spec {
    /// Sizes, blocks, and the order to begin with.
    pub profile: Profile,
    /// Where each tensor of the profile lies.
    pub sources: Vec<Source>,
    /// A name for each tensor, for messages; may be empty.
    pub names: Vec<String>,
    /// Device bytes for block weights.
    pub budget_bytes: u64,
    /// Most host bytes to page-lock in place.
    pub pinned_bytes: u64,
    /// Most bytes of whole pages that hold copies of what the files hold, page-locked or not.
    pub ram_bytes: u64,
    /// What the system's page cache has room for.
    pub page_cache_bytes: u64,
    /// Page-locked bytes for staging, when something needs it.
    pub staging_bytes: u64,
    /// When to encode weights, so that less goes over the link.
    pub encode: Encode,
    /// For each tensor what it is encoded as, if it is worth a try: bf16 or fp8, and not small.
    /// Empty: none is.
    pub encodable: Vec<Option<Element>>,
    /// Most bytes of whole pages that hold encoded weights, page-locked beside the others.
    pub encoded_bytes: u64,
    /// Most host bytes to page-lock: those in place and those that hold encoded weights. Those in
    /// place come first. 0: as much as either may take.
    pub locked_bytes: u64,
    /// Uses that the trace keeps.
    pub trace_uses: usize,
    /// See [`Options`].
    pub options: Options,
}

impl Spec {
    /// What a tensor is encoded as, if it may be.
    pub(crate) fn element_of(&self, tensor: u32) -> Option<Element> {
        self.encodable.get(index(tensor)).copied().flatten()
    }
}

/// One model's engine on one device. Shared between threads; one block runs at a time.
#[derive(Debug)]
pub struct Engine {
    core: Mutex<Core>,
    wants_rebuild: AtomicBool,
    /// Host bytes that the next block is to give back first.
    lacking: AtomicU64,
}

/// Numbers for a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Counts of events.
    pub counters: Counters,
    /// Passes that ended.
    pub passes: u64,
    /// Bytes copied to the device, as they went over the link.
    pub bytes: u64,
    /// Number of copies.
    pub copies: u64,
    /// Host bytes page-locked in place.
    pub pinned_bytes: u64,
    /// Page-locks that were refused.
    pub pin_failures: u64,
    /// Page-locked bytes of the staging chunks.
    pub staging_bytes: u64,
    /// Of the bytes copied those that were encoded.
    pub encoded_bytes: u64,
    /// What those were decoded to.
    pub decoded_bytes: u64,
    /// Bytes of whole pages that hold encoded weights.
    pub code_bytes: u64,
}

impl Engine {
    /// Plans for the budget, page-locks, and prepares `device`; copies nothing yet.
    ///
    /// The arena is device memory of at least the plan's size, kept alive by the caller.
    ///
    /// # Errors
    ///
    /// Those of [`plan`], of the device, and of a source that does not match the profile.
    pub fn new(
        device: Arc<dyn Device>,
        spec: Spec,
        arena_address: u64,
        arena_bytes: u64,
    ) -> Result<Self> {
        if spec.sources.len() != spec.profile.tensors.len() {
            return Err(Error::Invalid(format!(
                "{} tensors need as many sources, got {}",
                spec.profile.tensors.len(),
                spec.sources.len()
            )));
        }
        let plan = plan(&spec.profile, spec.budget_bytes)?;
        let arena = Arena::new(arena_address, arena_bytes, plan.arena_bytes)?;
        let core = Core::new(device, spec, plan, arena, Before::default())?;
        Ok(Self {
            core: Mutex::new(core),
            wants_rebuild: AtomicBool::new(false),
            lacking: AtomicU64::new(0),
        })
    }

    /// Plans anew, for another budget and for the order and the times learned so far, in the same
    /// arena or in a new one, which kernels on `compute` may have used before. Residents that stay
    /// are moved on the device. Blocks until all work of this engine on the device has ended.
    ///
    /// # Errors
    ///
    /// As [`Engine::new`]; the engine goes on with its old plan in its old arena then. If the
    /// device refuses that as well, the engine is poisoned.
    pub fn rebuild(
        &self,
        budget_bytes: u64,
        address: u64,
        bytes: u64,
        compute: ComputeStream,
    ) -> Result<()> {
        self.core.lock().call_vacant(|core| {
            core.rebuild(budget_bytes, (address, bytes), compute)?;
            self.wants_rebuild.store(core.wants_rebuild(), Ordering::Release);
            Ok(())
        })
    }

    /// Gives the arena up, so that its memory may be freed before a smaller one is made. Blocks
    /// until nothing uses it any more. Blocks are refused until [`Engine::rebuild`].
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] while a block runs, or the device's error.
    pub fn vacate(&self) -> Result<()> {
        self.core.lock().call(Core::vacate)
    }

    /// What [`Engine::rebuild`] would plan for `budget_bytes`, with the order learned so far.
    ///
    /// # Errors
    ///
    /// Those of [`plan`].
    pub fn plan_for(&self, budget_bytes: u64) -> Result<Plan> {
        let core = self.core.lock();
        plan(&core.best_profile(), budget_bytes)
    }

    /// Whether the order of use turned out to be another one than planned for, or a better plan
    /// was found for what was measured: [`Engine::rebuild`] takes it up, best between passes.
    pub fn wants_rebuild(&self) -> bool {
        self.wants_rebuild.load(Ordering::Acquire)
    }

    /// Whether [`Engine::enter`] may block the calling thread now, so that a caller who holds a
    /// lock of its own gives that up first.
    pub fn may_block(&self, block: u32) -> bool {
        self.lacking.load(Ordering::Relaxed) > 0
            || self.core.try_lock().is_none_or(|core| core.may_block(block))
    }

    /// `block` begins on `compute`. After this returns, kernels enqueued on `compute` find its
    /// weights at the offsets of the returned position.
    ///
    /// # Errors
    ///
    /// [`Error::Poisoned`] after a lost device, [`Error::Misuse`] out of turn, or the error of
    /// the copies; the block has not begun then.
    pub fn enter(&self, block: u32, compute: ComputeStream) -> Result<u32> {
        self.core.lock().call(|core| {
            if self.lacking.load(Ordering::Relaxed) > 0 {
                // An error of the device will come again in what follows, and be told then.
                let _ = core.give_back(self.lacking.swap(0, Ordering::Relaxed));
            }
            let entered = core.enter(block, compute);
            self.wants_rebuild.store(core.wants_rebuild(), Ordering::Release);
            entered
        })
    }

    /// The running block has ended on `compute`, by itself or by an exception: all that it
    /// enqueued elsewhere, `compute` waits for. Does nothing after [`Engine::close`].
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] when none runs, or the device's error; no block runs any more then.
    pub fn exit(&self, compute: ComputeStream) -> Result<()> {
        let mut core = self.core.lock();
        if core.is_closed() { Ok(()) } else { core.call(|core| core.exit(compute)) }
    }

    /// Whether what is still to be read from files can be: best asked before a pass.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] for a file that changed since it was opened. The engine goes on: a pass
    /// would be told the same at its first read.
    pub fn check_files(&self) -> Result<()> {
        self.core.lock().check_files()
    }

    /// A pass of the whole model begins.
    pub fn begin_pass(&self) {
        self.core.lock().order.begin();
    }

    /// A pass of the whole model has ended.
    pub fn end_pass(&self) {
        let mut core = self.core.lock();
        // Refused where no pass can have run. A panic leaves the engine shut.
        let _ = core.call_vacant(|core| {
            core.order.end();
            core.pass_ended();
            Ok(())
        });
        self.wants_rebuild.store(core.wants_rebuild(), Ordering::Release);
    }

    /// The host weights of `block` were changed in place: what the device has of them is old.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] for an unknown block.
    pub fn reload(&self, block: u32) -> Result<()> {
        self.core.lock().call(|core| core.reload(block))
    }

    /// Starts the copies of the first uses before the first block is entered. Does nothing while
    /// a block runs.
    ///
    /// # Errors
    ///
    /// As [`Engine::enter`].
    pub fn prefetch(&self, compute: ComputeStream) -> Result<()> {
        self.core.lock().call(|core| core.prefetch(compute))
    }

    /// Arena offset of every tensor at every position of the program, position by position.
    pub fn layout(&self) -> Vec<(u32, Vec<u64>)> {
        let core = self.core.lock();
        core.plan.program.uses.iter().map(|u| (u.block, u.offsets.clone())).collect()
    }

    /// The order of use that the plan in force was made for.
    pub fn order(&self) -> Vec<u32> {
        self.core.lock().spec.profile.order.clone()
    }

    /// The plan in force.
    pub fn plan(&self) -> Plan {
        self.core.lock().plan.clone()
    }

    /// The plan in force, with what it should take by the times measured so far.
    pub fn forecast(&self) -> Plan {
        let (mut plan, profile, budget_bytes) = {
            let core = self.core.lock();
            (core.plan.clone(), core.best_profile(), core.spec.budget_bytes)
        };
        if let Ok(period_s) = period_s(&profile, &plan) {
            plan.period_s = Some(period_s);
            plan.bound_s = bound_s(&profile, budget_bytes).ok();
        }
        plan
    }

    /// The system runs short of `bytes` bytes of memory: page-locks and copies are given back, as
    /// many as there are, before the next block begins. Never blocks.
    pub fn give_back(&self, bytes: u64) {
        self.lacking.fetch_max(bytes, Ordering::Relaxed);
    }

    /// What host memory is held and used.
    pub fn host_facts(&self) -> HostFacts {
        self.core.lock().host_facts()
    }

    /// Counts so far.
    pub fn stats(&self) -> Stats {
        self.core.lock().stats()
    }

    /// What the last errors said, oldest first.
    pub fn last_errors(&self) -> Vec<String> {
        self.core.lock().errors.texts()
    }

    /// The timed uses, oldest first, with those whose marks have passed meanwhile.
    pub fn records(&self) -> Vec<Record> {
        self.core.lock().records()
    }

    /// Ends all work on the device and gives host memory back. Blocks. Later calls are refused; a
    /// second one does nothing.
    ///
    /// # Errors
    ///
    /// The device's error; the engine is closed all the same.
    pub fn close(&self) -> Result<()> {
        let mut core = self.core.lock();
        if core.is_closed() { Ok(()) } else { core.close() }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // An error here has no one to go to, and a panic would end the process; the device is
        // released either way.
        let _ = fence(|| self.close());
    }
}
