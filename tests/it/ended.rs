//! Goal: no call waits for a staging thread that is no more, whatever it was doing when it ended;
//! the caller is told, and so is every later call.
//! Method: each call of a device in turn ends the thread that makes it, by a panic that gets out of
//! the thread's own fence; a watchdog names the one after which something hangs.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use dgls_core::Error;
use dgls_core::driver::Device;
use dgls_core::driver::cuda::{CudaDevice, CudaOptions};
use dgls_core::driver::host::shim::Pages;
use dgls_core::engine::{Engine, Spec};

use crate::cuda_fake::model;
use crate::fake::Session;
use crate::flaky::{Fault, Flaky};
use crate::watchdog::for_seeds;

/// Calls of three passes, about.
const CALLS: u64 = 320;

/// What the first call after the end was told, if the staging thread was what ended.
fn run(number: u64, fault: Fault) -> Option<Error> {
    let session = Session::new();
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let arena = Pages::new(2 * least).expect("host memory");
    let cuda = Arc::new(CudaDevice::new(CudaOptions::default()).expect("no faults"));
    let device: Arc<dyn Device> = Arc::new(Flaky::with(cuda, BTreeMap::from([(number, fault)])));
    let spec = Spec {
        profile: weights.stack.profile.clone(),
        sources: weights.in_memory(),
        budget_bytes: 2 * least,
        staging_bytes: 3 << 16, // nothing is page-locked: all of it goes through the thread
        ..Spec::default()
    };
    let mut told = None;
    let used = catch_unwind(AssertUnwindSafe(|| {
        let engine = Engine::new(device, spec, arena.address(), 2 * least)?;
        for block in (0..6).cycle().take(18) {
            let compute = session.stream(0);
            let answer = engine.enter(block, compute).and_then(|_| engine.exit(compute));
            if let (Err(error), None) = (&answer, &told) {
                told = Some(error.clone());
            } else if told.is_some() {
                let error = answer.expect_err("an engine without its thread goes on");
                assert!(matches!(error, Error::Poisoned(_)), "call {number}: {error}");
            }
        }
        engine.close()
    }));
    // A call of the calling thread: the fence around C++'s calls catches it.
    used.map_err(std::mem::forget).ok();
    session.finish();
    told
}

#[test]
fn nobody_waits_for_a_staging_thread_that_was_killed() {
    let said = for_seeds(CALLS, |number| run(number, Fault::Kills));
    let text = |error: &Error| error.to_string().contains("thread has ended");
    let ended = said.iter().flatten().filter(|error| text(error)).count();
    assert!(ended > 60, "{ended} of {CALLS}");
}

#[test]
fn a_panic_of_the_staging_thread_is_told() {
    let said = for_seeds(CALLS, |number| run(number, Fault::Panics));
    let text = |error: &Error| error.to_string().contains("thread panicked");
    let panicked = said.iter().flatten().filter(|error| text(error)).count();
    assert!(panicked > 60, "{panicked} of {CALLS}");
}
