//! Goal: what is decoded never lands on what came after it, whatever the caller does.
//! Method: engines on the fake driver whose decodes are slow and whose kernels are slower, beside
//! blocks that come raw; the order of use changes, and weights change while their old form is on
//! its way.

use dgls_core::driver::mutant::Dropped;

use crate::cuda_fake::{Rig, Setup};
use crate::encoded_cuda::Buffer;
use crate::fake::Session;
use crate::random::Random;
use crate::stack::{Stack, index};
use crate::weights::Weights;

const BLOCKS: u32 = 6;
const DECODE_US: i64 = 6000;
const KERNEL_US: u64 = 9000;

/// Two blocks can be encoded, the others not.
fn model() -> Weights {
    let weights = Weights::new(Stack::uniform(BLOCKS, &[40_960, 32_768]), 3);
    for tensor in 0..weights.stack.profile.tensors.len() {
        if weights.stack.profile.tensors[tensor].block % 3 == 0 {
            weights.train(tensor, 3);
        }
    }
    weights
}

/// Runs with everything encoded that can be; counts reads of wrong bytes.
fn wrong(
    pinned_bytes: u64,
    decoded: bool,
    act: impl Fn(&mut Rig<'_>, &Weights, &Session),
) -> usize {
    let session = Session::new();
    let weights = model();
    // All blocks lie in the same place, one after the other.
    let (least, _) = weights.stack.budgets();
    let buffer = Buffer::new(0);
    let decode_buffer = Some(buffer.place());
    let dropped = Dropped { decoded, ..Dropped::default() };
    let setup = Setup { pinned_bytes, dropped, decode_buffer, ..Setup::new(&weights, least) };
    let mut rig = Rig::new(&weights, &setup, None).expect("it decodes");
    for _ in 0..2 {
        for block in 0..BLOCKS {
            rig.use_block(&session, block, session.stream(0), 0).expect("no faults");
        }
        rig.engine.end_pass();
    }
    assert_eq!(rig.wrong(&session), 0);
    session.set("decode_us", DECODE_US);
    act(&mut rig, &weights, &session);
    let wrong = rig.wrong(&session);
    assert!(rig.engine.stats().decoded_bytes > 0);
    drop(rig);
    session.finish();
    wrong
}

/// Weights change while the device reads the old form of a block.
fn changes(pinned_bytes: u64, decoded: bool) -> usize {
    wrong(pinned_bytes, decoded, |rig, weights, session| {
        for block in 0..3 {
            rig.use_block(session, block, session.stream(0), 0).expect("no faults");
        }
        for &tensor in &weights.stack.tensors[index(3)] {
            weights.train(tensor, 77);
        }
        rig.engine.reload(3).expect("a block of the plan");
        rig.use_block(session, 3, session.stream(0), KERNEL_US).expect("no faults");
    })
}

#[test]
fn weights_that_change_on_their_way_arrive_changed() {
    for pinned_bytes in [1 << 30, 0] {
        assert_eq!(changes(pinned_bytes, false), 0, "{pinned_bytes} pinned");
    }
    assert_ne!(changes(1 << 30, true), 0, "without the wait");
}

#[test]
fn blocks_in_another_order_have_their_bytes() {
    let mut random = Random::new(9);
    for pinned_bytes in [1 << 30, 0] {
        for _ in 0..5 {
            let order = [0; 7].map(|_| u32::try_from(random.index(6)).expect("6"));
            let found = wrong(pinned_bytes, false, |rig, _, session| {
                for &block in &order {
                    let used = rig.use_block(session, block, session.stream(0), KERNEL_US);
                    used.expect("no faults");
                }
            });
            assert_eq!(found, 0, "order {order:?}, {pinned_bytes} pinned");
        }
    }
}
