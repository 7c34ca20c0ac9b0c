//! Goal: a driver call that fails is told by name and code; the engine works again or says that it
//! cannot; nothing is leaked.
//! Method: on the fake driver, every call of a run fails in turn, once; then all calls for good.

use dgls_core::driver::cuda::{CudaDevice, CudaOptions};
use dgls_core::driver::host::shim::Pages;
use dgls_core::{Error, Result};

use crate::cuda_fake::{Rig, Setup, model};
use crate::fake::Session;
use crate::weights::Weights;

/// What a run with one fault came to.
struct Run {
    fired: bool,
    error: Option<Error>,
    wrong: usize,
}

/// Two passes; a block that fails is tried once more, as after an exception that was caught.
fn run(session: &Session, weights: &Weights, setup: &Setup, key: &str, number: i64) -> Result<Run> {
    session.set("lat_us", 20);
    session.set(key, number);
    let mut rig = Rig::new(weights, setup, None)?;
    let mut error = None;
    for use_number in 0..12_u32 {
        let stream = session.stream(usize::from(use_number % 5 == 4));
        if let Err(first) = rig.use_block(session, use_number % 6, stream, 20) {
            assert!(error.is_none(), "one fault, one error: {first}, {error:?}");
            assert!(!matches!(first, Error::Poisoned(_)), "{first}");
            error = Some(first);
            rig.use_block(session, use_number % 6, stream, 20)?;
        }
    }
    let fired = session.get(key) == 0;
    session.set(key, 0);
    let wrong = rig.wrong(session);
    rig.engine.close()?;
    Ok(Run { fired, error, wrong })
}

/// Lets each call in turn fail, until a run has fewer calls of that kind. Returns how many failed
/// and how many of those were told.
fn every_call(key: &str, code: u32, calls: &[&str], pinned: u64, timing: bool) -> (u32, u32) {
    let session = Session::new();
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let setup = Setup { pinned_bytes: pinned, timing, ..Setup::new(&weights, 2 * least) };
    session.set("fail_code", i64::from(code));
    let (mut failed, mut told) = (0, 0);
    for number in 1.. {
        match run(&session, &weights, &setup, key, number) {
            Ok(run) => {
                assert_eq!(run.wrong, 0, "{key} {number}");
                if !run.fired {
                    break;
                }
                failed += 1;
                if let Some(error) = run.error {
                    told += 1;
                    let Error::Driver { call: found, code: found_code, .. } = &error else {
                        panic!("{error}")
                    };
                    assert!(calls.contains(found), "{key} {number}: {error}");
                    assert_eq!(*found_code, code, "{key} {number}");
                }
            }
            // Before the first block there is no engine to go on with.
            Err(Error::Driver { call: found, code: found_code, .. }) => {
                assert!(calls.contains(&found), "{key} {number}: {found}");
                assert_eq!(found_code, code, "{key} {number}");
                failed += 1;
                told += 1;
            }
            Err(error) => panic!("{key} {number}: {error}"),
        }
    }
    session.finish();
    (failed, told)
}

#[test]
fn a_failed_copy_is_told_and_made_up_for() {
    for pinned_bytes in [1 << 30, 400_000, 0] {
        for code in [1, 2] {
            // What comes alone is copied alone.
            let calls = ["cuMemcpyHtoDAsync", "cuMemcpyBatchAsync"];
            let (failed, told) = every_call("fail_copy_in", code, &calls, pinned_bytes, false);
            assert!(failed >= 12, "{failed} copies failed");
            assert!(told + 6 >= failed, "{told} of {failed} were told: prefetches at the end");
        }
    }
}

#[test]
fn a_failed_record_is_told_and_made_up_for() {
    for (pinned_bytes, timing) in [(1 << 30, false), (1 << 30, true), (0, false)] {
        let calls = ["cuEventRecord"];
        let (failed, told) = every_call("fail_record_in", 1, &calls, pinned_bytes, timing);
        assert!(failed >= 24, "{failed} records failed");
        assert!(told + 12 >= failed, "{told} of {failed} were told");
    }
}

#[test]
fn a_failed_wait_is_told_and_made_up_for() {
    for pinned_bytes in [1 << 30, 400_000, 0] {
        let calls = ["cuStreamWaitEvent"];
        let (failed, told) = every_call("fail_wait_in", 1, &calls, pinned_bytes, false);
        assert!(failed >= 24, "{failed} waits failed");
        assert!(told + 6 >= failed, "{told} of {failed} were told");
    }
}

#[test]
fn memory_that_cannot_be_page_locked_is_staged() {
    let session = Session::new();
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let setup = Setup::new(&weights, least); // no residents: those are not page-locked
    let all = Rig::new(&weights, &setup, None).expect("no faults").engine.stats();
    assert_eq!((all.pin_failures, all.staging_bytes), (0, 0));
    let run = |failures: u64| {
        let mut rig = Rig::new(&weights, &setup, None).expect("staging does it");
        for block in (0..6).chain(0..6) {
            rig.use_block(&session, block, session.stream(0), 0).expect("no more faults");
        }
        assert_eq!(rig.wrong(&session), 0);
        let stats = rig.engine.stats();
        assert_eq!(stats.pin_failures, failures);
        assert!(stats.staging_bytes > 0);
        stats.pinned_bytes
    };
    session.set("fail_register_in", 2);
    session.set("fail_code", 2);
    let pinned_bytes = run(1);
    assert!(0 < pinned_bytes && pinned_bytes < all.pinned_bytes, "all but one range");

    // Room for one tensor, but then for no chunk: staging comes first, since it can do it all.
    session.set("pin_cap", 19 << 12);
    assert_eq!(run(4 + 1), 0, "after four refusals no more is tried");
    session.set("pin_cap", 1 << 30);

    // Read-only memory is refused as an invalid value, and locked with the flag that says so.
    session.set("fail_register_in", 1);
    session.set("fail_code", 1);
    let rig = Rig::new(&weights, &setup, None).expect("no more faults");
    assert!(rig.engine.stats().pinned_bytes > 0);
    drop(rig);
    session.finish();
}

#[test]
fn staging_makes_do_with_fewer_chunks_but_not_with_none() {
    let session = Session::new();
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let setup = Setup { pinned_bytes: 0, ..Setup::new(&weights, 2 * least) };
    session.set("fail_alloc_in", 1);
    let error = Rig::new(&weights, &setup, None).map(drop).expect_err("no chunk at all");
    let Error::PageLock { bytes: 65_536, reason } = &error else { panic!("{error}") };
    assert!(reason.contains("cuMemHostAlloc failed with CUDA error 2"), "{reason}");

    session.set("fail_alloc_in", 2);
    let mut rig = Rig::new(&weights, &setup, None).expect("one chunk");
    assert_eq!(rig.engine.stats().staging_bytes, 1 << 16);
    for block in 0..6 {
        rig.use_block(&session, block, session.stream(0), 0).expect("no more faults");
    }
    assert_eq!(rig.wrong(&session), 0);
    drop(rig);
    session.finish();
}

#[test]
fn a_lost_context_is_final() {
    for (pinned_bytes, uses) in [(1 << 30, 0), (1 << 30, 3), (0, 0), (0, 3), (0, 9)] {
        let session = Session::new();
        let weights = model();
        let (least, _) = weights.stack.budgets();
        let setup = Setup { pinned_bytes, ..Setup::new(&weights, 2 * least) };
        let mut rig = Rig::new(&weights, &setup, None).expect("no faults");
        let stream = session.stream(0);
        for number in 0..uses {
            rig.use_block(&session, number % 6, stream, 0).expect("no faults");
        }
        assert_eq!(rig.wrong(&session), 0);
        session.set("sticky", 719);
        let errors: Vec<Error> = (uses..uses + 4)
            .filter_map(|number| rig.use_block(&session, number % 6, stream, 0).err())
            .collect();
        assert!(matches!(errors[0], Error::Driver { code: 719, .. }), "{}", errors[0]);
        assert!(errors.len() >= 2);
        assert!(errors[1..].iter().all(|error| matches!(error, Error::Poisoned(_))));
        let text = errors[1].to_string();
        assert!(text.contains("719") && text.contains("detach()"), "{text}");
        assert!(matches!(rig.engine.prefetch(stream), Err(Error::Poisoned(_))));
        assert!(matches!(rig.engine.exit(stream), Err(Error::Poisoned(_))));
        rig.engine.close().expect("the error was told already");
        drop(rig);
        session.finish();
    }
}

#[test]
fn a_device_that_cannot_be_made_leaks_nothing() {
    let session = Session::new();
    session.set("fail_stream_create", 1);
    let error = CudaDevice::new(CudaOptions::default()).map(drop).expect_err("no stream");
    assert!(
        matches!(error, Error::Driver { call: "cuStreamCreateWithPriority", code: 1, .. }),
        "{error}"
    );
    session.finish();
}

#[test]
fn a_plan_that_cannot_be_changed_stays() {
    let session = Session::new();
    let weights = model();
    let (least, all) = weights.stack.budgets();
    let setup = Setup { timing: true, ..Setup::new(&weights, all) };
    let mut rig = Rig::new(&weights, &setup, None).expect("no faults");
    let old = rig.engine.plan();
    let other = Pages::new(2 * least).expect("host memory");
    let stream = session.stream(0);
    for _ in 0..2 {
        for block in 0..6 {
            rig.use_block(&session, block, stream, 20).expect("no faults");
        }
        while rig.engine.may_block(0) {
            std::thread::yield_now(); // the staging thread has marks of its own to record
        }
        session.set("fail_record_in", 1);
        let refused = rig.engine.rebuild(2 * least, other.address(), 2 * least, stream);
        let error = refused.expect_err("the new events cannot be recorded");
        assert!(matches!(error, Error::Driver { call: "cuEventRecord", .. }), "{error}");
        assert_eq!(rig.engine.plan(), old);
    }
    for block in 0..6 {
        rig.use_block(&session, block, stream, 20).expect("it goes on with the old plan");
    }
    assert_eq!(rig.wrong(&session), 0);
    assert_eq!(rig.engine.stats().counters.rebuilds, 0);

    // Nor can the old plan be made again: there is no memory for its chunks.
    while rig.engine.may_block(0) {
        std::thread::yield_now();
    }
    session.set("fail_record_in", 1);
    session.set("pin_cap", 0);
    rig.engine.rebuild(2 * least, other.address(), 2 * least, stream).expect_err("as before");
    let error = rig.use_block(&session, 0, stream, 20).expect_err("no plan is left");
    assert!(matches!(error, Error::Poisoned(_)), "{error}");
    rig.engine.close().expect("the error was told already");
    drop(rig);
    session.finish();
}
