//! Goal: the copies of one call reach the driver together and right, whatever driver it is.
//! Method: the CUDA device on the fake driver, which counts its calls and copies the last one of a
//! batch first; older drivers, drivers that refuse, and batches that go wrong.

use std::sync::Arc;

use dgls_core::driver::cuda::{CudaDevice, CudaOptions};
use dgls_core::driver::host::shim::{self, Pages};
use dgls_core::driver::mutant::Batches;
use dgls_core::driver::{Device, H2d, Source};
use dgls_core::{Error, Result};

use crate::cuda_fake::{Rig, Setup, in_a_child, model};
use crate::fake::Session;
use crate::stack::Stack;
use crate::weights::{Weights, bytes_at};

const BLOCKS: u32 = 6;

/// Weights of `count` tensors in each block, which lie apart in the arena.
fn many(count: usize) -> Weights {
    Weights::new(Stack::uniform(BLOCKS, &vec![5001; count]), 11)
}

/// Calls of the driver, copies that were enqueued, and batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Calls {
    all: i64,
    copies: i64,
    batches: i64,
}

fn calls(session: &Session, rig: &Rig<'_>) -> Calls {
    let copies = i64::try_from(rig.engine.stats().copies).expect("a count");
    Calls { all: session.get("ncalls"), copies, batches: session.get("nbatches") }
}

/// What the third of three passes costs, after all bytes were found right.
fn third_pass(session: &Session, weights: &Weights, setup: &Setup) -> Result<Calls> {
    let copied_before = session.get("ncopies");
    let mut rig = Rig::new(weights, setup, None)?;
    let mut before = calls(session, &rig);
    for pass in 0..3 {
        if pass == 2 {
            before = calls(session, &rig);
        }
        for block in 0..BLOCKS {
            rig.use_block(session, block, session.stream(0), 0)?;
        }
    }
    let after = calls(session, &rig);
    assert_eq!(rig.wrong(session), 0);
    rig.engine.close()?;
    assert!(session.get("ncopies") - copied_before >= after.copies, "each reached the driver");
    Ok(Calls {
        all: after.all - before.all,
        copies: after.copies - before.copies,
        batches: after.batches - before.batches,
    })
}

#[test]
fn the_copies_of_a_use_are_one_call() {
    let session = Session::new();
    session.set("lat_us", 20);
    let weights = many(20);
    let (least, _) = weights.stack.budgets();
    let setup = Setup::new(&weights, least);
    let together = third_pass(&session, &weights, &setup).expect("no faults");
    session.set("driver", 12_040);
    let apart = third_pass(&session, &weights, &setup).expect("no faults");
    assert_eq!(together.copies, apart.copies);
    assert_eq!(together.copies, i64::from(BLOCKS) * 20, "all are streamed");
    assert_eq!((together.batches, apart.batches), (i64::from(BLOCKS), 0));
    assert_eq!(apart.all - together.all, apart.copies - together.batches);
    session.finish();
}

#[test]
fn more_copies_than_fit_one_batch_are_several() {
    let session = Session::new();
    let weights = many(150);
    let (least, _) = weights.stack.budgets();
    let calls = third_pass(&session, &weights, &Setup::new(&weights, least));
    let calls = calls.expect("no faults");
    assert_eq!((calls.copies, calls.batches), (900, 18), "64 + 64 + 22 for each block");
    session.finish();
}

#[test]
fn a_driver_that_refuses_is_asked_once() {
    let session = Session::new();
    let weights = many(5);
    let (least, _) = weights.stack.budgets();
    let setup = Setup::new(&weights, least);
    session.set("fail_code", 801);
    session.set("fail_copy_in", 3);
    let calls = third_pass(&session, &weights, &setup).expect("single copies do it");
    assert_eq!((calls.copies, calls.batches), (30, 0));
    assert_eq!((session.get("nbatches"), session.get("fail_copy_in")), (1, 0));
    session.finish();
}

#[test]
fn batches_can_be_turned_off() {
    let variables = [("DGLS_ALLOW_FAKE", "1"), ("DGLS_TEST_SINGLE_COPIES", "1")];
    if in_a_child("batches::batches_can_be_turned_off", &variables) {
        let session = Session::new();
        let weights = many(5);
        let (least, _) = weights.stack.budgets();
        let setup = Setup::new(&weights, least);
        let calls = third_pass(&session, &weights, &setup).expect("no faults");
        assert_eq!((calls.copies, calls.batches), (30, 0));
        session.finish();
    }
}

/// Reads of two passes that are wrong, and all, with slow copies or slow kernels.
fn wrong_reads(session: &Session, batches: Batches, lat_us: i64, kernel_us: u64) -> (usize, usize) {
    let weights = model();
    let (least, _) = weights.stack.budgets();
    session.set("lat_us", lat_us);
    let setup = Setup { batches, ..Setup::new(&weights, 2 * least) };
    let mut rig = Rig::new(&weights, &setup, None).expect("no faults");
    for block in (0..6).chain(0..6) {
        rig.use_block(session, block, session.stream(0), kernel_us).expect("no faults");
    }
    (rig.wrong(session), 36)
}

#[test]
fn a_lost_copy_of_a_batch_shows() {
    let session = Session::new();
    let (wrong, all) = wrong_reads(&session, Batches::Short, 0, 0);
    assert!(wrong >= all / 4, "{wrong} of {all}");
    session.finish();
}

#[test]
fn a_batch_on_another_stream_shows() {
    let session = Session::new();
    for (lat_us, kernel_us) in [(3000, 0), (100, 3000)] {
        let (wrong, all) = wrong_reads(&session, Batches::Right, lat_us, kernel_us);
        assert_eq!(wrong, 0, "of {all}");
        let other = CudaDevice::new(CudaOptions::default()).expect("the fake driver");
        let astray = Batches::Astray(Arc::new(other));
        let (wrong, all) = wrong_reads(&session, astray, lat_us, kernel_us);
        assert!(wrong >= all / 4, "{wrong} of {all}, copies of {lat_us} us");
    }
    session.finish();
}

/// Tensors whose sizes leave no gap in the arena, as in one flat buffer.
fn flat() -> Weights {
    Weights::new(Stack::uniform(BLOCKS, &[4096, 8192, 256, 12_288]), 5)
}

#[test]
fn neighbours_within_one_page_lock_are_one_copy() {
    let session = Session::new();
    let weights = flat();
    let (least, _) = weights.stack.budgets();
    let mut setup = Setup::new(&weights, least);
    let apart = third_pass(&session, &weights, &setup).expect("no faults");
    assert_eq!(apart.copies, 24, "each tensor is a page-lock of its own");

    // A view that overlaps all tensors of block 0 makes one page-lock of them.
    setup.sources[23] = setup.sources[0].advanced(4000);
    let joined = third_pass(&session, &weights, &setup).expect("no faults");
    assert_eq!(joined.copies, 21, "block 0 is one copy");
    session.finish();
}

/// A device with page-locked weights and memory to copy them to.
struct Bench {
    device: Arc<dyn Device>,
    weights: Weights,
    target: Pages,
}

impl Bench {
    fn new() -> Self {
        let weights = flat();
        let device = CudaDevice::new(CudaOptions::default()).expect("the fake driver");
        device.prepare(1, 0).expect("no faults");
        let target = Pages::new(weights.bytes()).expect("host memory");
        Self { device: Arc::new(device), weights, target }
    }

    /// A copy of a range of the weights to the same place of the target.
    fn copy(&self, from: u64, bytes: u64) -> H2d {
        let source = Source::Memory { address: self.weights.address(0) + from };
        H2d { source, target: self.target.address() + from, bytes }
    }

    fn is_right(&self, from: u64, bytes: u64) -> bool {
        let (source, target) = (self.weights.address(0), self.target.address());
        bytes_at(target + from, bytes) == bytes_at(source + from, bytes)
    }
}

#[test]
fn one_copy_or_none_is_no_batch_and_an_empty_one_is_left_out() {
    let session = Session::new();
    let bench = Bench::new();
    let (all, base) = (bench.weights.bytes(), bench.weights.address(0));
    bench.device.page_lock(base, all).expect("no faults");
    let run = |copies: &[H2d]| {
        bench.device.copy_batch(copies).expect("no faults");
        bench.device.quiesce(None).expect("no faults");
        session.get("nbatches")
    };
    assert_eq!(run(&[]), 0);
    assert_eq!(run(&[bench.copy(0, 100)]), 0);
    assert_eq!(run(&[bench.copy(100, 0), bench.copy(100, 100)]), 0);
    assert_eq!(run(&[bench.copy(200, 50), bench.copy(250, 0), bench.copy(300, 100)]), 1);
    assert!(bench.is_right(0, 250));
    assert!(bench.is_right(300, 100));
    bench.device.page_unlock(base, all);
    drop(bench);
    session.finish();
}

#[test]
fn a_device_takes_any_number_of_copies() {
    let session = Session::new();
    let bench = Bench::new();
    let (all, base) = (bench.weights.bytes(), bench.weights.address(0));
    bench.device.page_lock(base, all).expect("no faults");
    for count in [63, 64, 65, 129, 130] {
        let before = session.get("nbatches");
        let copies: Vec<H2d> = (0..count).map(|at| bench.copy(at * 1000, 999)).collect();
        bench.device.copy_batch(&copies).expect("no faults");
        bench.device.quiesce(None).expect("no faults");
        assert!((0..count).all(|at| bench.is_right(at * 1000, 999)), "{count} copies");
        // A last one alone is no batch.
        let batches = i64::try_from(count / 64 + u64::from(count % 64 > 1)).expect("few");
        assert_eq!(session.get("nbatches") - before, batches, "{count} copies");
        shim::fill(bench.target.address(), 0, bench.target.bytes());
    }
    bench.device.page_unlock(base, all);
    drop(bench);
    session.finish();
}

#[test]
fn a_copy_within_two_page_locks_is_refused() {
    let session = Session::new();
    let bench = Bench::new();
    let base = bench.weights.address(0);
    bench.device.page_lock(base, 4096).expect("no faults");
    bench.device.page_lock(base + 4096, 4096).expect("no faults");
    let takes = |from, bytes| bench.device.takes_as_one(bench.copy(from, bytes).source, bytes);
    assert!(takes(0, 4096));
    assert!(takes(5000, 3192));
    assert!(!takes(0, 4097));
    let across = [bench.copy(0, 4097), bench.copy(5000, 100)];
    let error = bench.device.copy_batch(&across).expect_err("as the driver would");
    assert!(matches!(error, Error::Driver { call: "cuMemcpyBatchAsync", code: 1, .. }), "{error}");
    bench.device.quiesce(None).expect("no faults");
    bench.device.page_unlock(base, 4096);
    bench.device.page_unlock(base + 4096, 4096);
    drop(bench);
    session.finish();
}
