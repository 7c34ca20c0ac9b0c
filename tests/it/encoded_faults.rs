//! Goal: an engine on a CUDA device that decodes has the right bytes, tells what fails, works
//! again, and leaks nothing.
//! Method: whole passes on the fake driver, whose launches fail in turn.

use dgls_core::engine::Stats;
use dgls_core::{Error, Result};

use crate::cuda_fake::{Rig, Setup};
use crate::encoded_cuda::Buffer;
use crate::fake::Session;
use crate::stack::Stack;
use crate::weights::Weights;

const BLOCKS: u32 = 4;

/// Some whole tiles and an edge, less than a tile, and whole tiles.
fn model() -> Weights {
    let weights = Weights::new(Stack::uniform(BLOCKS, &[40_001, 1000, 32_768]), 3);
    for tensor in 0..weights.stack.profile.tensors.len() {
        weights.train(tensor, 3);
    }
    weights
}

fn setup(weights: &Weights, buffer: &Buffer, budget: u64) -> Setup {
    Setup { decode_buffer: Some(buffer.place()), ..Setup::new(weights, budget) }
}

fn pass(rig: &mut Rig<'_>, session: &Session) -> Result<()> {
    for block in 0..BLOCKS {
        rig.use_block(session, block, session.stream(0), 0)?;
    }
    rig.engine.end_pass();
    Ok(())
}

/// An engine with everything encoded, one pass later.
fn encoded<'a>(weights: &'a Weights, setup: &Setup, session: &Session) -> Rig<'a> {
    let mut rig = Rig::new(weights, setup, None).expect("it decodes");
    pass(&mut rig, session).expect("no faults");
    pass(&mut rig, session).expect("no faults");
    assert!(rig.engine.stats().code_bytes > 0);
    rig
}

#[test]
fn page_locked_and_staged_every_byte_is_right() {
    let session = Session::new();
    let weights = model();
    let (least, all) = weights.stack.budgets();
    let buffer = Buffer::new(0);
    for (lat_us, decode_us) in [(0, 0), (300, 0), (0, 1000)] {
        let most = 1 << 30;
        for (budget, pinned_bytes, eighths) in [
            (least, most, 8),
            (least, most, 3),
            (least, 0, 8),
            (least, 0, 5),
            (2 * least, most, 8),
            (2 * least, most, 4),
            (all, most, 8),
        ] {
            let setup = Setup { pinned_bytes, eighths, ..setup(&weights, &buffer, budget) };
            let mut rig = Rig::new(&weights, &setup, None).expect("it decodes");
            session.set("lat_us", lat_us);
            session.set("decode_us", decode_us);
            for _ in 0..4 {
                pass(&mut rig, &session).expect("no faults");
            }
            for block in 0..BLOCKS {
                rig.use_block(&session, block, session.stream(1), 0).expect("no faults");
            }
            assert_eq!(rig.wrong(&session), 0, "budget {budget}, {pinned_bytes} pinned");
            let Stats { decoded_bytes, encoded_bytes, code_bytes, staging_bytes, .. } =
                rig.engine.stats();
            assert_eq!(decoded_bytes > 0, budget < all);
            assert!(encoded_bytes < decoded_bytes || budget == all);
            assert_eq!(code_bytes > 0, budget < all);
            assert!(pinned_bytes > 0 || staging_bytes > 0);
            let pinned = u64::try_from(session.get("pinned")).expect("a count");
            assert!(code_bytes + staging_bytes <= pinned);
            rig.engine.close().expect("no faults");
            assert_eq!((session.get("pinned"), session.get("host_ranges")), (0, 0));
        }
    }
    session.finish();
}

#[test]
fn with_a_new_plan_what_is_encoded_stays_locked_as_far_as_it_is_streamed() {
    let session = Session::new();
    let weights = model();
    let (least, all) = weights.stack.budgets();
    let buffer = Buffer::new(0);
    let mut rig = encoded(&weights, &setup(&weights, &buffer, least), &session);
    let held = rig.engine.stats().code_bytes;
    for (budget, left) in [(all, 0), (least, held)] {
        rig.rebuild(&session, budget);
        for _ in 0..3 {
            pass(&mut rig, &session).expect("no faults");
        }
        assert_eq!(rig.wrong(&session), 0, "budget {budget}");
        assert_eq!(rig.engine.stats().code_bytes, left);
    }
    rig.engine.give_back(u64::MAX);
    pass(&mut rig, &session).expect("no faults");
    assert_eq!((rig.wrong(&session), rig.engine.stats().code_bytes), (0, 0));
    let staging = i64::try_from(rig.engine.stats().staging_bytes).expect("a count");
    assert_eq!(session.get("pinned"), staging, "nothing else is locked any more");
    drop(rig);
    session.finish();
}

#[test]
fn a_failed_launch_is_told_and_made_up_for() {
    let session = Session::new();
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let buffer = Buffer::new(0);
    for (code, pinned_bytes) in [(1, 1 << 30), (701, 1 << 30), (2, 0)] {
        let setup = Setup { pinned_bytes, ..setup(&weights, &buffer, least) };
        let (mut failed, mut told) = (0, 0);
        for number in 1.. {
            let mut rig = encoded(&weights, &setup, &session);
            session.set("fail_code", code);
            session.set("fail_launch_in", number);
            let mut error = None;
            for block in (0..BLOCKS).chain(0..BLOCKS) {
                if let Err(first) = rig.use_block(&session, block, session.stream(0), 0) {
                    assert!(error.is_none(), "one fault, one error: {first}, {error:?}");
                    error = Some(first);
                    let again = rig.use_block(&session, block, session.stream(0), 0);
                    again.expect("it works again");
                }
            }
            let fired = session.get("fail_launch_in") == 0;
            session.set("fail_launch_in", 0);
            assert_eq!(rig.wrong(&session), 0, "launch {number}");
            rig.engine.close().expect("no faults");
            assert_eq!(session.get("pinned"), 0);
            if let Some(error) = error {
                let Error::Driver { call, code: found, .. } = &error else { panic!("{error}") };
                assert_eq!((*call, i64::from(*found)), ("cuLaunchKernel", code));
                told += 1;
            }
            if !fired {
                break;
            }
            failed += 1;
        }
        assert!(failed >= BLOCKS, "{failed} launches failed");
        assert!(told + 3 >= failed, "{told} of {failed} were told: what comes early at the end");
    }
    session.finish();
}

#[test]
fn weights_that_cannot_be_locked_encoded_come_raw() {
    let session = Session::new();
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let buffer = Buffer::new(0);
    let mut rig = Rig::new(&weights, &setup(&weights, &buffer, least), None).expect("it decodes");
    session.set("pin_cap", session.get("pinned") + 30_000);
    for _ in 0..4 {
        pass(&mut rig, &session).expect("no faults");
    }
    assert_eq!(rig.wrong(&session), 0);
    let Stats { code_bytes, decoded_bytes, pin_failures, counters, .. } = rig.engine.stats();
    assert!(0 < code_bytes && code_bytes <= 30_000, "{code_bytes}");
    assert!(decoded_bytes > 0);
    assert_eq!((pin_failures, counters.errors), (0, 0), "no error of the weights");
    drop(rig);
    session.finish();
}

#[test]
fn a_context_that_is_lost_while_it_decodes_is_final() {
    let session = Session::new();
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let buffer = Buffer::new(0);
    let mut rig = encoded(&weights, &setup(&weights, &buffer, least), &session);
    session.set("sticky", 719);
    let error = rig.use_block(&session, 0, session.stream(0), 0).expect_err("all calls fail");
    assert!(error.is_sticky(), "{error}");
    let error = rig.use_block(&session, 0, session.stream(0), 0).expect_err("for good");
    assert!(matches!(error, Error::Poisoned(_)), "{error}");
    rig.engine.close().expect("the error was told already");
    drop(rig);
    session.finish();
}
