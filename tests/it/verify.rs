//! Goal: with `verify`, a block never runs on other bytes than its host source has: a byte that was
//! changed on its way is found, told with its place, and fetched again; right bytes are accepted.
//! Method: the host device and the fake driver, with bytes changed by a device around them, by the
//! driver, or by a wait taken out.

use std::sync::Arc;

use dgls_core::driver::cuda::{CudaDevice, CudaOptions};
use dgls_core::driver::host::shim::{Pages, WeightFile};
use dgls_core::driver::host::{HostDevice, HostOptions};
use dgls_core::driver::mutant::{Dropped, Mutant};
use dgls_core::driver::{ComputeStream, Device, Source};
use dgls_core::engine::{Engine, Options, Spec};
use dgls_core::{Error, Result};

use crate::fake::Session;
use crate::stack::Stack;
use crate::weights::{Scratch, Weights};

/// One tensor is larger than what is compared at once.
fn model() -> Weights {
    Weights::new(Stack::uniform(5, &[70_001, (1 << 20) + 9, 37]), 8)
}

struct Rig {
    // Dropped before its arena.
    engine: Engine,
    _arena: Pages,
}

fn rig(
    weights: &Weights,
    device: Arc<dyn Device>,
    sources: Vec<Source>,
    budget: u64,
    pinned_bytes: u64,
) -> Rig {
    let arena = Pages::new(budget).expect("host memory");
    let names = (0..weights.stack.profile.tensors.len()).map(|number| format!("weight.{number}"));
    let spec = Spec {
        profile: weights.stack.profile.clone(),
        sources,
        names: names.collect(),
        budget_bytes: budget,
        pinned_bytes,
        staging_bytes: 3 << 16,
        options: Options { verify: true, ..Options::default() },
        ..Spec::default()
    };
    let engine = Engine::new(device, spec, arena.address(), budget).expect("feasible");
    Rig { engine, _arena: arena }
}

fn host(file: Option<&Scratch>) -> Arc<dyn Device> {
    let files = file.map(|file| WeightFile::open(file.text()).expect("just written"));
    let options = HostOptions { files: files.into_iter().collect(), copy_bytes_per_s: 0 };
    Arc::new(HostDevice::new(options).expect("a thread"))
}

fn use_block(engine: &Engine, block: u32, stream: ComputeStream) -> Result<()> {
    engine.enter(block, stream)?;
    engine.exit(stream)
}

const COMPUTE: ComputeStream = ComputeStream(0);

#[test]
fn right_bytes_are_counted_and_accepted() {
    let weights = model();
    let file = Scratch::new(&weights.contents());
    let (least, all) = weights.stack.budgets();
    for (budget, passes) in [(least, 3), (2 * least, 2), (all, 2)] {
        for (sources, file) in [(weights.in_memory(), None), (weights.in_file(), Some(&file))] {
            let Rig { engine, .. } = &rig(&weights, host(file), sources, budget, 0);
            for block in (0..5).cycle().take(5 * passes) {
                use_block(engine, block, COMPUTE).expect("no faults");
            }
            let counters = engine.stats().counters;
            let each: u64 = weights.stack.profile.tensors.iter().map(|tensor| tensor.bytes).sum();
            assert_eq!(counters.verified_bytes, each * u64::try_from(passes).expect("3"));
            assert_eq!((counters.mismatches, counters.errors), (0, 0));
        }
    }
}

/// What is wrong with a use, if it is the one thing that may be.
fn told(weights: &Weights, error: Error) -> (u32, u64) {
    let text = error.to_string();
    let Error::Corrupt { block, tensor, offset, bytes, expected, found } = error else {
        panic!("{text}")
    };
    let number: usize = tensor.strip_prefix("weight.").expect("a name").parse().expect("one");
    assert!(weights.stack.tensors[crate::stack::index(block)].contains(&number), "{text}");
    assert_eq!(bytes, weights.stack.bytes(number));
    assert!(offset < bytes && expected != found, "{text}");
    for part in [format!("block {block}"), tensor, format!("{found:016x}"), format!("{offset}")] {
        assert!(text.contains(&part), "{text} has no {part}");
    }
    (block, offset)
}

#[test]
fn a_byte_that_changed_on_its_way_is_found_and_fetched_again() {
    let weights = model();
    let file = Scratch::new(&weights.contents());
    let (least, all) = weights.stack.budgets();
    for budget in [least, 2 * least, all] {
        for (sources, file) in [(weights.in_memory(), None), (weights.in_file(), Some(&file))] {
            // Rarer than the copies of one try, so that some try gets right bytes. Where all stays,
            // five blocks of three copies are brought once; files come in many pieces.
            let every = match (budget == all, file.is_some()) {
                (true, false) => 4,
                (true, true) => 61,
                (false, false) => 29,
                (false, true) => 211,
            };
            let mutant = Mutant::new(host(file), Dropped::default()).corrupting(every);
            let Rig { engine, .. } = &rig(&weights, Arc::new(mutant), sources, budget, 0);
            let mut found = 0;
            for block in (0..5).cycle().take(100) {
                let mut tries = 0;
                while let Err(error) = use_block(engine, block, COMPUTE) {
                    assert_eq!(told(&weights, error).0, block);
                    found += 1;
                    tries += 1;
                    assert!(tries < 9, "each try is another copy: {budget} of {all}, {every}");
                }
            }
            let counters = engine.stats().counters;
            assert_eq!((counters.mismatches, counters.errors), (found, found));
            assert!(found >= 1, "{found} in {budget} bytes");
            let texts = engine.last_errors();
            assert_eq!(texts.len() as u64, found.min(16));
            assert!(
                texts.iter().all(|text| text.contains("arrived with other bytes")),
                "{texts:?}"
            );
            assert_eq!(engine.stats().counters.uses, 100);
        }
    }
}

#[test]
fn whichever_copy_the_driver_spoils_it_is_found() {
    let weights = model();
    let (least, all) = weights.stack.budgets();
    for (budget, pinned_bytes) in [(2 * least, 1 << 30), (2 * least, 0), (all, 1 << 30)] {
        let (mut spoilt, mut found) = (0, 0);
        for number in (1..).step_by(if pinned_bytes == 0 { 5 } else { 1 }) {
            let session = Session::new();
            session.set("lat_us", 20);
            session.set("flip_copy_in", number);
            let device = Arc::new(CudaDevice::new(CudaOptions::default()).expect("no faults"));
            let rig = rig(&weights, device, weights.in_memory(), budget, pinned_bytes);
            for use_number in 0..10_u32 {
                let stream = session.stream(usize::from(use_number % 4 == 3));
                if let Err(error) = use_block(&rig.engine, use_number % 5, stream) {
                    assert_eq!(told(&weights, error).0, use_number % 5);
                    found += 1;
                    use_block(&rig.engine, use_number % 5, stream).expect("it was fetched again");
                }
            }
            let fired = session.get("flip_copy_in") == 0;
            spoilt += u64::from(fired);
            rig.engine.close().expect("no faults");
            drop(rig);
            session.finish();
            if !fired {
                break;
            }
        }
        assert!(found >= 3 && found <= spoilt && spoilt <= found + 8, "{found} of {spoilt}");
    }
}

#[test]
fn a_missing_wait_is_found() {
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let session = Session::new();
    session.set("lat_us", 3000);
    for ready in [false, true] {
        let device = Arc::new(CudaDevice::new(CudaOptions::default()).expect("no faults"));
        let dropped = Dropped { ready, ..Dropped::default() };
        let mutant = Arc::new(Mutant::new(device, dropped));
        let rig = rig(&weights, mutant, weights.in_memory(), 2 * least, 1 << 30);
        let stream = session.stream(0);
        let wrong = (0..5).filter(|&block| use_block(&rig.engine, block, stream).is_err()).count();
        assert!(if ready { wrong >= 4 } else { wrong == 0 }, "{wrong}, with the wait: {}", !ready);
        rig.engine.close().expect("no faults");
    }
    session.finish();
}
