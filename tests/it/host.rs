//! Goal: the host device runs models from memory and from files, bigger than the arena, with the
//! right bytes or an error.
//! Method: whole passes on a real thread; every byte of every block is compared.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dgls_core::driver::host::shim::{Pages, WeightFile};
use dgls_core::driver::host::{HostDevice, HostOptions};
use dgls_core::driver::{ComputeStream, Source};
use dgls_core::engine::{Engine, Options, Spec};
use dgls_core::{Error, align_up};

use crate::random::Random;
use crate::stack::Stack;
use crate::watchdog::for_seeds;
use crate::weights::{Scratch, Weights, bytes_at};

const COMPUTE: ComputeStream = ComputeStream(0);

/// Odd sizes: tensors begin anywhere in the file.
fn model() -> Weights {
    Weights::new(Stack::uniform(9, &[100_001, 37, 65_537, 40_000]), 1)
}

/// Taken apart in this order, the engine is dropped before its arena.
struct Rig {
    arena: Pages,
    engine: Engine,
}

fn rig(weights: &Weights, sources: Vec<Source>, options: HostOptions, budget: u64) -> Rig {
    let arena = Pages::new(budget).expect("host memory");
    let spec = Spec {
        profile: weights.stack.profile.clone(),
        sources,
        budget_bytes: budget,
        trace_uses: 1000,
        options: Options { timing: true, poison: true, ..Options::default() },
        ..Spec::default()
    };
    let device = Arc::new(HostDevice::new(options).expect("a thread"));
    let engine = Engine::new(device, spec, arena.address(), budget).expect("feasible");
    Rig { arena, engine }
}

fn files(paths: &[&Scratch]) -> HostOptions {
    let open = |scratch: &&Scratch| WeightFile::open(scratch.text()).expect("just written");
    HostOptions { files: paths.iter().map(open).collect(), ..HostOptions::default() }
}

#[test]
fn from_memory_and_from_a_file_every_byte_is_right() {
    let weights = model();
    let file = Scratch::new(&weights.contents());
    let (least, all) = weights.stack.budgets();
    for budget in [least, 2 * least, all / 2, all] {
        let memory = rig(&weights, weights.in_memory(), HostOptions::default(), budget);
        let from_file = rig(&weights, weights.in_file(), files(&[&file]), budget);
        assert!(budget == all || budget < weights.bytes(), "the model is bigger than the arena");
        for Rig { arena, engine } in [memory, from_file] {
            for _ in 0..5 {
                weights.pass(&engine, arena.address()).expect("no faults");
            }
            for block in [3, 3, 8, 0, 5] {
                weights.use_block(&engine, arena.address(), block).expect("no faults");
            }
            let stats = engine.stats();
            assert_eq!(stats.counters.uses, 50);
            assert_eq!(stats.passes, 5);
            assert!(engine.records().len() >= 36, "four passes of nine blocks");
            engine.close().expect("nothing is wrong");
        }
    }
}

#[test]
fn any_model_has_the_right_bytes() {
    for_seeds(60, |seed| {
        let mut random = Random::new(seed);
        let weights = Weights::new(Stack::random(&mut random), seed);
        let budget = weights.stack.random_budget(&mut random);
        let Rig { arena, engine } =
            rig(&weights, weights.in_memory(), HostOptions::default(), budget);
        for _ in 0..40 {
            let block = random.next() % u64::from(weights.stack.blocks());
            let block = u32::try_from(block).expect("12");
            weights.use_block(&engine, arena.address(), block).expect("no faults");
        }
    });
}

#[test]
fn changed_weights_arrive_after_a_reload() {
    let weights = model();
    let (_, all) = weights.stack.budgets();
    for budget in [all / 3, all] {
        let Rig { arena, engine } =
            rig(&weights, weights.in_memory(), HostOptions::default(), budget);
        weights.pass(&engine, arena.address()).expect("no faults");
        for seed in 2..5 {
            for block in 0..weights.stack.blocks() {
                for &tensor in &weights.stack.tensors[crate::stack::index(block)] {
                    weights.rewrite(tensor, seed);
                }
                engine.reload(block).expect("a block of the plan");
            }
            weights.pass(&engine, arena.address()).expect("no faults");
        }
        assert!(matches!(engine.reload(9), Err(Error::Misuse(_))));
    }
}

/// Files differ in their time of change, however fast the test runs.
fn touch(scratch: &Scratch, seconds: u64) {
    let file = std::fs::File::options().write(true).open(scratch.path()).expect("there");
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000 + seconds);
    file.set_modified(time).expect("ours");
}

#[test]
fn a_file_that_changes_is_an_error_for_good() {
    let weights = model();
    let contents = weights.contents();
    let (least, _) = weights.stack.budgets();
    let file = Scratch::new(&contents);
    touch(&file, 0);
    let Rig { arena, engine } = rig(&weights, weights.in_file(), files(&[&file]), 2 * least);
    weights.pass(&engine, arena.address()).expect("no faults");
    for (seconds, text) in [(1, &contents[..1000]), (2, &contents[..])] {
        std::fs::write(file.path(), text).expect("writable");
        touch(&file, seconds);
        // What was prefetched before the change may still be used, two blocks at most.
        let mut errors = 0;
        for block in [0, 1, 2, 3, 4, 3] {
            match weights.use_block(&engine, arena.address(), block) {
                Ok(()) => assert_eq!(errors, 0, "block {block} after an error"),
                Err(Error::Read { reason, .. }) => {
                    assert!(reason.contains("changed while in use"), "{reason}");
                    errors += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert!(errors >= 3, "{errors} errors");
    }
    assert!(engine.stats().counters.errors >= 6);
    // Not a change: the very same time and length.
    touch(&file, 0);
    weights.pass(&engine, arena.address()).expect("the file is as it was");
    engine.close().expect("the device is whole");
}

#[test]
fn a_file_that_is_too_short_is_an_error_at_the_blocks_that_need_it() {
    let weights = model();
    let contents = weights.contents();
    let file = Scratch::new(&contents[..contents.len() - 1]);
    let (least, all) = weights.stack.budgets();
    for budget in [least, 2 * least, all] {
        let Rig { arena, engine } = rig(&weights, weights.in_file(), files(&[&file]), budget);
        for _ in 0..3 {
            for block in 0..8 {
                weights.use_block(&engine, arena.address(), block).expect("all of it is there");
            }
            let error = weights.use_block(&engine, arena.address(), 8).expect_err("a byte less");
            let Error::Read { bytes, reason, .. } = error else { panic!("{error}") };
            let expected = format!("ended after {} bytes", bytes - 1);
            assert!(reason.contains(&expected), "{reason}");
        }
        assert_eq!(engine.stats().counters.errors, 3);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn an_input_output_error_is_told_in_the_systems_words() {
    let weights = model();
    let (least, _) = weights.stack.budgets();
    // Whose first pages cannot be read: EIO.
    let file = WeightFile::open("/proc/self/mem").expect("Linux has it");
    let options = HostOptions { files: [file].into_iter().collect(), ..HostOptions::default() };
    let Rig { arena, engine } = rig(&weights, weights.in_file(), options, 2 * least);
    for _ in 0..3 {
        let error = weights.use_block(&engine, arena.address(), 0).expect_err("EIO");
        let Error::Read { file, reason, .. } = error else { panic!("{error}") };
        assert_eq!(file, "mem");
        assert!(reason.starts_with("Input/output error"), "{reason}");
    }
    engine.close().expect("the device is whole");
}

#[test]
fn a_file_that_changed_is_told_before_the_pass() {
    let weights = model();
    let (least, all) = weights.stack.budgets();
    for budget in [2 * least, all] {
        let file = Scratch::new(&weights.contents());
        touch(&file, 0);
        let Rig { arena, engine } = rig(&weights, weights.in_file(), files(&[&file]), budget);
        engine.check_files().expect("as it was opened");
        weights.pass(&engine, arena.address()).expect("no faults");
        touch(&file, 1);
        let told = engine.check_files();
        if budget == all {
            told.expect("every byte is on the device for good");
        } else {
            let Err(Error::Read { reason, .. }) = told else { panic!("{told:?}") };
            assert!(reason.contains("changed while in use"), "{reason}");
            assert_eq!(engine.last_errors().len(), 1);
        }
        touch(&file, 0);
        engine.check_files().expect("as it was opened");
        // What was read ahead meanwhile is told once.
        if let Err(error) = weights.pass(&engine, arena.address()) {
            assert!(error.to_string().contains("changed while in use"), "{error}");
            weights.pass(&engine, arena.address()).expect("as it was opened");
        }
    }
}

#[test]
fn a_file_that_is_not_open_is_an_error() {
    let weights = model();
    let (_, all) = weights.stack.budgets();
    let Rig { arena, engine } = rig(&weights, weights.in_file(), HostOptions::default(), all);
    let error = weights.use_block(&engine, arena.address(), 0).expect_err("no file 0");
    assert_eq!(error, Error::Invalid("weight file 0 is not open".into()));
}

#[test]
fn a_throttled_copy_takes_its_time() {
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let rate = 100 << 20;
    let options = HostOptions { copy_bytes_per_s: rate, ..HostOptions::default() };
    let Rig { arena, engine } = rig(&weights, weights.in_memory(), options, 2 * least);
    for _ in 0..2 {
        weights.pass(&engine, arena.address()).expect("no faults");
    }
    let records = engine.records();
    assert_eq!(records.len(), 18);
    for record in records {
        let times = record.times;
        assert!(
            times.copy_end_ns - times.copy_start_ns >= record.stretch_bytes * 1_000_000_000 / rate
        );
        assert!(times.copy_end_ns <= times.start_ns);
        assert!(times.wait_ns <= times.start_ns);
        assert!(times.start_ns <= times.end_ns);
    }
}

#[test]
fn a_new_plan_runs_in_a_new_arena_and_in_the_old_one() {
    let weights = model();
    let (least, all) = weights.stack.budgets();
    let Rig { mut arena, engine } =
        rig(&weights, weights.in_memory(), HostOptions::default(), 2 * least);
    for budget in [all, least, 3 * least, 2 * least] {
        weights.pass(&engine, arena.address()).expect("no faults");
        let before = engine.stats();
        let next = Pages::new(budget).expect("host memory");
        engine.rebuild(budget, next.address(), budget, COMPUTE).expect("feasible");
        arena = next;
        assert!(engine.plan().arena_bytes <= budget);
        assert_eq!(engine.stats().counters.rebuilds, before.counters.rebuilds + 1);
        assert_eq!(engine.stats().bytes, before.bytes, "what was copied stays counted");
    }
    // All residents are there already: only what is streamed is copied in the next pass.
    let budget = 4 * least;
    let mut copied = Vec::new();
    for _ in 0..2 {
        let next = Pages::new(budget).expect("host memory");
        engine.rebuild(budget, next.address(), budget, COMPUTE).expect("feasible");
        arena = next;
        let before = engine.stats().bytes;
        weights.pass(&engine, arena.address()).expect("no faults");
        copied.push(engine.stats().bytes - before);
    }
    let resident = engine.plan().resident_bytes;
    assert!(copied[1] + resident / 2 < copied[0], "{copied:?}, of which {resident} stay");

    // Without an arena no block runs; with another one all is brought again.
    engine.vacate().expect("idle");
    assert!(matches!(engine.enter(0, COMPUTE), Err(Error::Misuse(_))));
    assert!(matches!(engine.prefetch(COMPUTE), Err(Error::Misuse(_))));
    dgls_core::driver::host::shim::fill(arena.address(), 0xFF, arena.bytes());
    let too_small = engine.rebuild(least - 1, arena.address(), arena.bytes(), COMPUTE);
    assert!(matches!(too_small, Err(Error::BudgetTooSmall { .. })));
    assert!(matches!(engine.enter(0, COMPUTE), Err(Error::Misuse(_))), "there is no arena yet");
    engine.rebuild(2 * least, arena.address(), 2 * least, COMPUTE).expect("feasible");
    weights.pass(&engine, arena.address()).expect("no faults");
    weights.pass(&engine, arena.address()).expect("no faults");
    let old = engine.plan();
    let too_small = engine.rebuild(least - 1, arena.address(), arena.bytes(), COMPUTE);
    assert!(matches!(too_small, Err(Error::BudgetTooSmall { .. })));
    let short = engine.rebuild(all, arena.address(), align_up(least), COMPUTE);
    assert!(matches!(short, Err(Error::Invalid(_))));
    let entered = engine.enter(0, COMPUTE).expect("no faults");
    assert!(matches!(
        engine.rebuild(2 * least, arena.address(), 2 * least, COMPUTE),
        Err(Error::Misuse(_))
    ));
    assert!(matches!(engine.enter(1, COMPUTE), Err(Error::Misuse(_))));
    engine.exit(COMPUTE).expect("block 0 runs");
    assert!(matches!(engine.exit(COMPUTE), Err(Error::Misuse(_))));
    assert_eq!(engine.plan(), old, "refused calls change nothing, at position {entered}");
    weights.pass(&engine, arena.address()).expect("no faults");
}

#[test]
fn a_poisoned_slot_holds_no_old_weights() {
    let weights = Weights::new(Stack::uniform(4, &[1 << 16]), 1);
    let Rig { arena, engine } = rig(&weights, weights.in_memory(), HostOptions::default(), 1 << 16);
    let position = engine.enter(0, COMPUTE).expect("no faults");
    assert_eq!(engine.layout()[crate::stack::index(position)].1, [0]);
    engine.exit(COMPUTE).expect("no faults");
    engine.close().expect("the fill has passed");
    let found = bytes_at(arena.address(), 1 << 16);
    let old = bytes_at(weights.address(0), 1 << 16);
    let same = std::iter::zip(&found, &old).filter(|(a, b)| a == b).count();
    assert!(same < 1000, "{same} bytes are the old ones");
}

#[test]
fn several_threads_share_an_engine() {
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let Rig { arena, engine } =
        rig(&weights, weights.in_memory(), HostOptions::default(), 2 * least);
    let turn = parking_lot::Mutex::new(());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let _turn = turn.lock();
                    weights.pass(&engine, arena.address()).expect("no faults");
                }
            });
        }
        scope.spawn(|| {
            while engine.stats().passes < 10 {
                assert!(engine.records().len() <= 1000);
                assert!(!engine.wants_rebuild());
                std::thread::yield_now();
            }
        });
    });
    assert_eq!(engine.stats().counters.uses, 90);
}

#[test]
fn a_closed_engine_refuses_and_keeps_its_numbers() {
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let Rig { arena, engine } =
        rig(&weights, weights.in_memory(), HostOptions::default(), 2 * least);
    weights.pass(&engine, arena.address()).expect("no faults");
    engine.enter(0, COMPUTE).expect("no faults");
    let before = engine.stats();
    engine.close().expect("in the middle of a block");
    engine.close().expect("twice");
    drop(arena);
    assert_eq!(engine.stats().counters, before.counters);
    engine.exit(COMPUTE).expect("the hook of a block that still ran does no harm");
    assert!(matches!(engine.enter(1, COMPUTE), Err(Error::Misuse(_))));
    assert!(matches!(engine.prefetch(COMPUTE), Err(Error::Misuse(_))));
    assert!(matches!(engine.rebuild(least, 4096, least, COMPUTE), Err(Error::Misuse(_))));
}
