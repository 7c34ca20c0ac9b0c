//! Goal: copies run beside kernels as far as slots and link allow; nothing waits without a reason.
//! Method: the simulated device without jitter; its period against the closed form for two equal
//! slots, and against the max-plus recursion of the plan's own waits.

use std::sync::Arc;

use dgls_core::driver::ComputeStream;
use dgls_core::driver::sim::{SimDevice, SimOptions};
use dgls_core::engine::{Engine, Options, Record, Spec};
use dgls_core::plan::Program;

use crate::random::Random;
use crate::stack::{Stack, index};

const ARENA: u64 = 1 << 40;
const COMPUTE: ComputeStream = ComputeStream(7);
/// Passes that are run at least.
const PASSES: u32 = 24;

/// As many whole cycles in the first half of a run as in the second.
fn passes_of(program: &Program) -> u32 {
    PASSES.next_multiple_of(2 * program.passes)
}

struct Run {
    engine: Engine,
    period_ns: f64,
    streamed_bytes: u64,
    violations: Vec<String>,
}

#[derive(Clone, Copy)]
struct Link {
    ns_per_kib: u64,
    latency_ns: u64,
}

impl Link {
    fn copy_ns(self, bytes: u64) -> u64 {
        self.latency_ns + bytes * self.ns_per_kib / 1024
    }
}

/// Runs the blocks in order; each computes for its own time.
fn run(stack: &Stack, budget: u64, link: Link, kernel_ns: &[u64]) -> Run {
    let sim = Arc::new(SimDevice::new(SimOptions {
        arena: (ARENA, budget),
        ns_per_kib: link.ns_per_kib,
        latency_ns: link.latency_ns,
        ..SimOptions::default()
    }));
    let spec = Spec {
        profile: stack.profile.clone(),
        sources: stack.sources(),
        budget_bytes: budget,
        trace_uses: 4096,
        options: Options { timing: true, ..Options::default() },
        ..Spec::default()
    };
    let engine = Engine::new(Arc::clone(&sim) as _, spec, ARENA, budget).expect("feasible");
    let layout = engine.layout();
    let mut ends = Vec::new();
    let mut moved = Vec::new();
    let passes = passes_of(&engine.plan().program);
    for _ in 0..passes {
        engine.begin_pass();
        for &block in &stack.profile.order {
            let position = engine.enter(block, COMPUTE).expect("no faults");
            let offsets = &layout[index(position)].1;
            let tensors = stack.tensors[index(block)].iter().zip(offsets);
            let reads: Vec<_> = tensors
                .map(|(&tensor, offset)| {
                    (ARENA + offset, stack.addresses[tensor], stack.bytes(tensor))
                })
                .collect();
            sim.compute(COMPUTE, &reads, kernel_ns[index(block)]);
            engine.exit(COMPUTE).expect("no faults");
        }
        engine.end_pass();
        ends.push(sim.compute_free_ns(COMPUTE));
        moved.push(engine.stats().bytes);
    }
    let half = index(passes / 2);
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of a simulation")]
    let period_ns = (ends[ends.len() - 1] - ends[half - 1]) as f64 / f64::from(passes / 2);
    let streamed_bytes = (moved[moved.len() - 1] - moved[half - 1]) / u64::from(passes / 2);
    Run { engine, period_ns, streamed_bytes, violations: sim.violations() }
}

/// When each use ends if nothing waits but for what the plan says: the best that the plan allows.
#[expect(clippy::cast_precision_loss, reason = "nanoseconds of a simulation")]
fn recursion(program: &Program, link: Link, kernel_ns: &[u64]) -> f64 {
    let cycle = index(program.cycle);
    let cycles = index(passes_of(program) / program.passes);
    let mut done: Vec<u64> = Vec::new();
    let mut copied = 0;
    for number in 0..cycle * cycles {
        let used = &program.uses[number % cycle];
        for copy in program.copies_of(used) {
            let waited = copy.wait.and_then(|wait| {
                let cycle_of_wait = (number / cycle).checked_sub(index(wait.lag))?;
                Some(done[cycle_of_wait * cycle + index(wait.position)])
            });
            copied = copied.max(waited.unwrap_or(0)) + link.copy_ns(copy.bytes);
        }
        let free = done.last().copied().unwrap_or(0);
        done.push(free.max(copied) + kernel_ns[index(used.block)]);
    }
    let half = done.len() / 2;
    (done[done.len() - 1] - done[half - 1]) as f64 / f64::from(passes_of(program) / 2)
}

fn assert_close(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() <= 0.01 * expected, "{what}: {found} ns, not {expected} ns");
}

#[test]
fn two_equal_slots_reach_the_closed_form() {
    const BLOCKS: u32 = 10;
    let stack = Stack::uniform(BLOCKS, &[1 << 20; 4]);
    let block_bytes = 4 << 20;
    let link = Link { ns_per_kib: 40, latency_ns: 10_000 };
    for streamed_tensors in 1..=4_u64 {
        // Each block streams as many tensors as the slots hold.
        let streamed = streamed_tensors << 20;
        let budget = u64::from(BLOCKS) * (block_bytes - streamed) + 2 * streamed;
        for percent in [20, 60, 95, 105, 150, 400] {
            let copy_ns = streamed_tensors * link.copy_ns(1 << 20);
            let kernel_ns = copy_ns * percent / 100;
            let run = run(&stack, budget, link, &vec![kernel_ns; index(BLOCKS)]);
            assert_eq!(run.engine.plan().ring_bytes, 2 * streamed);
            // schedule.md, "n equal slots, uniform": with n = 2 and every block streaming alike
            // the larger of compute and copies, since a slot's own turn takes (c + k) for 2 uses.
            let expected = BLOCKS * u32::try_from(kernel_ns.max(copy_ns)).expect("below 4 s");
            let what = format!("{streamed_tensors} tensors at {percent} %");
            assert_close(run.period_ns, f64::from(expected), &what);
            assert_eq!(run.streamed_bytes, u64::from(BLOCKS) * streamed);
            assert!(run.violations.is_empty(), "{:?}", run.violations);
        }
    }
}

#[test]
fn any_model_in_order_runs_as_its_plan_allows() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let mut stack = Stack::random(&mut random);
        stack.profile.order = (0..stack.blocks()).collect();
        let budget = stack.random_budget(&mut random);
        let link = Link { ns_per_kib: random.between(1, 200), latency_ns: random.between(0, 9000) };
        let mean = random.between(1000, 4_000_000);
        let kernel_ns: Vec<u64> =
            (0..stack.blocks()).map(|_| random.between(mean / 2, mean)).collect();
        let run = run(&stack, budget, link, &kernel_ns);
        let plan = run.engine.plan();
        let expected = recursion(&plan.program, link, &kernel_ns);
        assert_close(run.period_ns, expected, &format!("seed {seed}"));
        assert!(run.violations.is_empty(), "seed {seed}: {:?}", run.violations);

        let cycle = plan.program.uses.iter().take(index(plan.program.cycle));
        let copies = cycle.flat_map(|used| plan.program.copies_of(used));
        let per_cycle: u64 = copies.map(|copy| copy.bytes).sum();
        assert_eq!(run.streamed_bytes * u64::from(plan.program.passes), per_cycle, "seed {seed}");
        let counters = run.engine.stats().counters;
        assert_eq!((counters.on_demand, counters.mispredicted), (1, 0), "only the first use");
        assert!(!run.engine.wants_rebuild());
        check_records(&run.engine.records(), &stack, seed);
    }
}

/// Times are marked in the first four cycles and in two of eight later on, without gaps.
fn check_records(records: &[Record], stack: &Stack, seed: u64) {
    let order = &stack.profile.order;
    assert!(records.len() >= 4 * order.len(), "seed {seed}: {} records", records.len());
    for (place, record) in records.iter().enumerate() {
        let at = usize::try_from(record.number).expect("small");
        assert_eq!(record.block, order[at % order.len()], "seed {seed}");
        assert!(place >= 4 * order.len() || at == place, "seed {seed}: a gap at {place}");
        let times = record.times;
        assert!(times.wait_ns <= times.start_ns);
        assert!(times.copy_end_ns <= times.start_ns, "seed {seed}: {record:?}");
        assert!(times.start_ns < times.end_ns);
        assert!(record.bytes == 0 || times.copy_start_ns < times.copy_end_ns);
    }
    assert!(records.windows(2).all(|pair| pair[0].number < pair[1].number));
    assert!(records.windows(2).all(|pair| pair[0].times.end_ns <= pair[1].times.start_ns));
}
