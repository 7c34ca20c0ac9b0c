//! One seeded run of an engine on the simulated device: a model, a budget, and a caller who does
//! whatever callers do.

use std::collections::BTreeSet;
use std::sync::Arc;

use dgls_core::Error;
use dgls_core::driver::mutant::{Dropped, Mutant};
use dgls_core::driver::sim::{SimDevice, SimOptions};
use dgls_core::driver::{ComputeStream, Device};
use dgls_core::engine::{Adapt, Engine, Options, Spec};
use dgls_core::plan::Plan;

use crate::flaky::Flaky;
use crate::random::Random;
use crate::stack::{Stack, ahead, index};

const ARENA: u64 = 1 << 40;

/// Which sources the device does not take as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Staged {
    None,
    Half,
    All,
    Any,
}

/// What differs between tests.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) staged: Staged,
    pub(crate) faults: bool,
    pub(crate) dropped: Dropped,
    pub(crate) early: u64,
    /// Reloads, rebuilds, calls to see the numbers.
    pub(crate) meddling: bool,
}

impl Setup {
    pub(crate) fn new(staged: Staged) -> Self {
        Self { staged, faults: false, dropped: Dropped::default(), early: 0, meddling: true }
    }
}

/// What a run found.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) seed: u64,
    pub(crate) violations: Vec<String>,
    /// How far ahead any plan of the run copies: 0 when nothing is streamed, 1 when copies wait for
    /// the use right before theirs, 2 when some are made beside it.
    pub(crate) ahead: u32,
    pub(crate) errors: u64,
    pub(crate) poisoned: bool,
    pub(crate) rebuilds: u64,
}

struct World {
    random: Random,
    stack: Stack,
    sim: Arc<SimDevice>,
    flaky: Arc<Flaky>,
    engine: Engine,
    plan: Plan,
    layout: Vec<(u32, Vec<u64>)>,
    arena: (u64, u64),
    next_arena: u64,
    budget: u64,
    stream: ComputeStream,
    /// Kernels of someone else use the arena: whoever changes the stream now has to wait for them,
    /// as for any tensor.
    occupied: bool,
    kernel_ns: u64,
    meddling: bool,
    entered: u64,
    errors: u64,
    faults_seen: u64,
    rebuilds: u64,
    poisoned: bool,
    ahead: u32,
}

/// Runs the seed and checks what holds at every moment; hazards are returned.
pub(crate) fn run(seed: u64, setup: &Setup) -> Outcome {
    let Some(mut world) = World::new(seed, setup) else {
        return Outcome { seed, errors: 1, ..Outcome::default() };
    };
    // Marks are made anew after five passes.
    let most = if world.random.chance(12) { 14 } else { 7 };
    for _ in 0..world.random.between(2, most) {
        world.pass();
        if world.poisoned {
            break;
        }
    }
    world.finish(seed)
}

impl World {
    /// `None` when the engine could not be made because of a fault.
    fn new(seed: u64, setup: &Setup) -> Option<Self> {
        let mut random = Random::new(seed);
        let stack = Stack::random(&mut random);
        let budget = stack.random_budget(&mut random);
        let staged = match setup.staged {
            Staged::Any => random.pick(&[Staged::None, Staged::Half, Staged::All]),
            other => other,
        };
        let sim = Arc::new(SimDevice::new(SimOptions {
            seed,
            arena: (ARENA, budget),
            jitter: true,
            ns_per_kib: random.pick(&[5, 40, 200]),
            latency_ns: random.pick(&[0, 1000, 10_000]),
            staged_from: match staged {
                Staged::None => None,
                Staged::Half => Some(stack.middle()),
                _ => Some(0),
            },
            ..SimOptions::default()
        }));
        let mut failing = BTreeSet::new();
        if setup.faults {
            let spread = random.pick(&[100, 1000]);
            failing.extend((0..random.between(1, 6)).map(|_| random.between(3, spread)));
        }
        let flaky = Arc::new(Flaky::new(Arc::clone(&sim) as _, failing));
        let device: Arc<dyn Device> = match setup.dropped {
            dropped if dropped == Dropped::default() => Arc::clone(&flaky) as _,
            dropped => Arc::new(Mutant::new(Arc::clone(&flaky) as _, dropped)),
        };
        let spec = Spec {
            profile: stack.profile.clone(),
            sources: stack.sources(),
            budget_bytes: budget,
            pinned_bytes: random.pick(&[0, 1 << 20]),
            ram_bytes: 0,
            page_cache_bytes: 0,
            staging_bytes: random.between(0, 4) << 16,
            trace_uses: 16,
            options: Options {
                poison: random.chance(50),
                timing: random.chance(50),
                early: setup.early,
                adapt: random.pick(&[Adapt::Off, Adapt::AtOnce, Adapt::Beside]),
                ..Options::default()
            },
            ..Spec::default()
        };
        let stream = ComputeStream(16);
        sim.occupy(stream, ARENA, budget, random.between(0, 300_000));
        let engine = match Engine::new(device, spec, ARENA, budget) {
            Ok(engine) => engine,
            Err(error) => {
                assert!(flaky.fired() > 0, "an engine within its budget: {error}");
                return None;
            }
        };
        let mut world = Self {
            kernel_ns: random.pick(&[5_000, 50_000, 400_000]),
            plan: engine.plan(),
            layout: engine.layout(),
            faults_seen: flaky.fired(),
            arena: (ARENA, budget),
            next_arena: 2 * ARENA,
            meddling: setup.meddling,
            entered: 0,
            errors: 0,
            rebuilds: 0,
            poisoned: false,
            ahead: 0,
            random,
            stack,
            sim,
            flaky,
            engine,
            budget,
            stream,
            occupied: true,
        };
        world.look();
        Some(world)
    }

    /// Takes the plan in force.
    fn look(&mut self) {
        self.plan = self.engine.plan();
        self.layout = self.engine.layout();
        assert!(self.plan.arena_bytes <= self.budget, "{:?} for {}", self.plan, self.budget);
        if self.plan.streamed_bytes > 0 {
            self.ahead = self.ahead.max(ahead(&self.plan));
        }
    }

    fn pass(&mut self) {
        let mut blocks = self.stack.profile.order.clone();
        match self.random.between(0, 9) {
            0 => blocks.reverse(),
            1 => self.random.shuffle(&mut blocks),
            2 => blocks.retain(|_| !self.random.chance(25)),
            3 => blocks = blocks.iter().flat_map(|&block| [block, block]).collect(),
            4 => {
                let length = self.random.index(20);
                let all = self.stack.tensors.len();
                let any = |_| u32::try_from(self.random.index(all)).expect("12");
                blocks = (0..length).map(any).collect();
            }
            5 => blocks.truncate(self.random.index(blocks.len() + 1)),
            _ => {}
        }
        let (begins, ends) = (self.random.chance(70), self.random.chance(70));
        if begins {
            self.engine.begin_pass();
        }
        if self.random.chance(30) {
            let stream = self.stream;
            let prefetched = self.engine.prefetch(stream);
            self.judge(prefetched);
            if self.poisoned {
                return;
            }
        }
        for block in blocks {
            self.use_block(block);
            if self.meddling && !self.poisoned {
                self.meddle();
            }
            if self.poisoned {
                return;
            }
        }
        if ends {
            self.engine.end_pass();
        }
        if self.meddling && self.engine.wants_rebuild() && self.random.chance(70) {
            let same = self.random.chance(80);
            let budget =
                if same { self.budget } else { self.stack.random_budget(&mut self.random) };
            self.rebuild(budget);
        }
    }

    fn use_block(&mut self, block: u32) {
        if !self.occupied && self.random.chance(5) {
            self.stream = ComputeStream(16 * self.random.between(1, 3));
        }
        let stream = self.stream;
        // An exception may be caught and the block tried again.
        for _ in 0..3 {
            let _: bool = self.engine.may_block(block);
            let entered = self.engine.enter(block, stream);
            if let Some(position) = self.judge(entered) {
                self.compute(block, position);
                let exited = self.engine.exit(stream);
                self.judge(exited);
                return;
            }
            if self.poisoned {
                return;
            }
        }
    }

    fn compute(&mut self, block: u32, position: u32) {
        self.entered += 1;
        self.occupied = false;
        let (found, offsets) = &self.layout[index(position)];
        assert_eq!(*found, block, "position {position}");
        let tensors = &self.stack.tensors[index(block)];
        assert_eq!(tensors.len(), offsets.len());
        let mut reads = Vec::new();
        for (&tensor, &offset) in tensors.iter().zip(offsets) {
            assert!(offset + self.stack.aligned(tensor) <= self.plan.arena_bytes);
            let address = self.arena.0 + offset;
            reads.push((address, self.stack.addresses[tensor], self.stack.bytes(tensor)));
        }
        let duration = self.random.between(0, 2 * self.kernel_ns);
        self.sim.compute(self.stream, &reads, duration);
    }

    fn meddle(&mut self) {
        match self.random.between(0, 99) {
            0..=2 => {
                let block = u32::try_from(self.random.index(self.stack.tensors.len())).expect("12");
                for &tensor in &self.stack.tensors[index(block)] {
                    self.sim.rewrite(self.stack.addresses[tensor], self.stack.bytes(tensor));
                }
                let reloaded = self.engine.reload(block);
                self.judge(reloaded);
            }
            3 | 4 => {
                let budget = self.stack.random_budget(&mut self.random);
                self.rebuild(budget);
            }
            5 => {
                let stats = self.engine.stats();
                assert_eq!(stats.counters.rebuilds, self.rebuilds);
                assert!(self.engine.records().len() <= 16);
            }
            6 => {
                let stream = self.stream;
                let prefetched = self.engine.prefetch(stream);
                self.judge(prefetched);
            }
            _ => {}
        }
    }

    /// Another budget in another arena; sometimes in the same one, or one that is impossible.
    fn rebuild(&mut self, budget: u64) {
        if self.random.chance(5) {
            let (least, _) = self.stack.budgets();
            match self.engine.rebuild(least - 1, self.arena.0, self.arena.1, self.stream) {
                Err(Error::BudgetTooSmall { .. }) => {}
                other => {
                    // The last error was final, which only the next call tells.
                    assert!(matches!(other, Err(Error::Poisoned(_))), "{other:?}");
                    self.judge(other);
                    return;
                }
            }
        }
        let keep = budget <= self.arena.1 && self.random.chance(60);
        let next = if keep { self.arena } else { (self.next_arena, budget) };
        if !keep {
            self.next_arena += ARENA;
            self.sim.add_arena(next.0, next.1);
            let duration = self.random.between(0, 300_000);
            self.sim.occupy(self.stream, next.0, next.1, duration);
            self.occupied = true;
        }
        let old = self.arena;
        let rebuilt = self.engine.rebuild(budget, next.0, next.1, self.stream);
        let done = self.judge(rebuilt).is_some();
        if done {
            self.rebuilds += 1;
            (self.arena, self.budget) = (next, budget);
        }
        if !keep {
            let unused = if done { old } else { next };
            // Memory that someone else's kernels use goes back in stream order.
            if !self.poisoned && !self.occupied {
                self.sim.retire_arena(unused.0, unused.1);
            }
        }
        self.look();
    }

    /// An error must come from a fault, and be final only if the engine says so.
    fn judge<T>(&mut self, result: dgls_core::Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let fired = self.flaky.fired();
                assert!(fired > 0, "without a fault: {error}");
                self.poisoned = matches!(error, Error::Poisoned(_));
                assert!(
                    self.poisoned || fired > self.faults_seen,
                    "{error} again, after {fired} faults"
                );
                self.faults_seen = fired;
                self.errors += 1;
                None
            }
        }
    }

    fn finish(self, seed: u64) -> Outcome {
        let stats = self.engine.stats();
        let counters = stats.counters;
        assert_eq!(counters.uses, self.entered);
        assert_eq!(counters.rebuilds, self.rebuilds);
        assert!(counters.on_demand <= counters.uses);
        assert!(counters.mispredicted <= counters.uses);
        assert!(self.flaky.fired() > 0 || counters.errors == 0);
        assert!(counters.uses == 0 || self.entered == 0 || stats.copies > 0);
        // The first call may be the one that fails for good; the next one says so.
        let _ = self.engine.reload(0);
        let poisoned = matches!(self.engine.reload(0), Err(Error::Poisoned(_)));
        let closed = self.engine.close();
        assert!(closed.is_ok() || self.flaky.fired() > 0, "{closed:?}");
        if closed.is_ok() && !poisoned && !self.occupied {
            self.sim.retire_arena(self.arena.0, self.arena.1);
        }
        self.engine.close().expect("closing twice does nothing");
        assert!(self.engine.enter(0, self.stream).is_err(), "closed");
        Outcome {
            seed,
            violations: self.sim.violations(),
            ahead: self.ahead,
            errors: self.errors,
            poisoned,
            rebuilds: self.rebuilds,
        }
    }
}
