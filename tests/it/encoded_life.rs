//! Goal: the encoded form of weights goes when it is of no use any more: when they change, become
//! resident, or the system wants memory back.
//! Method: whole passes on the host device; every byte of every block is compared.

use dgls_core::driver::host::HostOptions;
use dgls_core::driver::host::shim::page_bytes;
use dgls_core::engine::{Encode, Spec};

use crate::encoded::{BLOCKS, LINK, Rig, WORTH, always, model, streamed, trained, worth};
use crate::stack::{Stack, index};

#[test]
fn weights_that_change_are_encoded_anew() {
    let weights = model(7);
    let (least, _) = weights.stack.budgets();
    let rig = Rig::new(&weights, &always(&weights, least));
    for _ in 0..3 {
        rig.pass();
    }
    let worth = u64::from(BLOCKS) * WORTH;
    for (block, seed) in [(2, 70), (0, 71), (2, 72)] {
        let code_bytes = rig.stats().code_bytes;
        for &tensor in &weights.stack.tensors[index(block)] {
            weights.train(tensor, seed);
        }
        rig.engine.reload(block).expect("a block of the plan");
        let (_, decoded_bytes) = rig.pass();
        assert!(decoded_bytes >= worth - WORTH, "the others come encoded");
        let new_bytes = rig.stats().code_bytes;
        assert!(new_bytes <= code_bytes + 4 * page_bytes(), "the old form is not held");
        rig.pass();
        assert_eq!(rig.pass().1, worth);
    }
}

#[test]
fn encoded_weights_are_the_first_to_be_given_back() {
    let weights = model(8);
    let (least, _) = weights.stack.budgets();
    let mut rig = Rig::with(
        &weights,
        &always(&weights, least),
        HostOptions { copy_bytes_per_s: LINK, ..HostOptions::default() },
    );
    for _ in 0..3 {
        rig.pass();
    }
    let before = rig.stats();
    assert!(before.code_bytes > 0 && before.pinned_bytes > 0, "some MiB can be locked");
    rig.use_blocks(0..3);
    rig.engine.give_back(before.code_bytes);
    rig.use_blocks(3..BLOCKS);
    let after = rig.stats();
    assert_eq!((after.code_bytes, after.pinned_bytes), (0, before.pinned_bytes));
    assert_eq!(rig.engine.host_facts().given_back, (1, before.code_bytes));
    rig.engine.end_pass();
    for _ in 0..2 {
        assert_eq!(rig.pass(), (0, 0), "not again");
    }
    rig.rebuild(2 * least);
    for _ in 0..2 {
        assert_eq!(rig.pass(), (0, 0), "nor with another plan");
    }
    assert_eq!(rig.stats().code_bytes, 0);
    // Then the others.
    rig.engine.give_back(1);
    rig.pass();
    assert_eq!(rig.engine.host_facts().given_back.0, 2);
    assert!(rig.stats().pinned_bytes < before.pinned_bytes);
}

#[test]
fn what_becomes_resident_is_given_back_and_what_is_streamed_anew_is_encoded() {
    // So large that hardly any piece between two cuts is too small to be encoded.
    let weights = trained(Stack::uniform(BLOCKS, &[400_001, 1000, 262_144]), 9);
    let (least, all) = weights.stack.budgets();
    let mut rig = Rig::timeless(&weights, &always(&weights, 2 * least));
    for budget in [2 * least, 4 * least, least, 3 * least, all, least] {
        rig.rebuild(budget);
        let streamed = streamed(&rig);
        assert!(rig.stats().code_bytes <= streamed, "what is resident needs none");
        for _ in 0..2 {
            rig.pass();
            let code_bytes = rig.stats().code_bytes;
            assert!(code_bytes <= streamed, "{code_bytes} of {streamed}");
            assert!(code_bytes >= streamed / 2, "{code_bytes} of {streamed}");
        }
        rig.cycle();
        // What a plan before has cut elsewhere, too, has more edges.
        let (decoded_bytes, worth) = (rig.cycle().1, worth(&rig));
        assert!((worth * 3 / 4..=worth).contains(&decoded_bytes), "budget {budget}");
    }
    rig.engine.close().expect("nothing is wrong");
}

#[test]
fn so_many_eighths_of_what_is_streamed_go_encoded() {
    const TENSOR: u64 = 65_536;
    let weights = trained(Stack::uniform(32, &[TENSOR]), 10);
    let (least, all) = weights.stack.budgets();
    for eighths in 0..=8 {
        let spec = Spec { encode: Encode::Eighths(eighths), ..always(&weights, least) };
        let mut rig = Rig::timeless(&weights, &spec);
        for budget in [least, all / 4, least] {
            rig.rebuild(budget);
            for _ in 0..2 {
                rig.pass();
            }
            let wanted = streamed(&rig) * u64::from(eighths) / 8;
            for _ in 0..2 {
                let passes = u64::from(rig.engine.plan().program.passes);
                let decoded_bytes = rig.cycle().1;
                let difference = decoded_bytes.abs_diff(passes * wanted);
                assert!(difference <= passes * TENSOR, "{eighths}: {decoded_bytes}, {budget}");
            }
            let code_bytes = rig.stats().code_bytes;
            assert!(code_bytes <= wanted * 3 / 4 + 2 * TENSOR, "{code_bytes} for {wanted}");
        }
        assert_eq!(rig.stats().counters.errors, 0);
        rig.engine.close().expect("nothing is wrong");
    }
}
