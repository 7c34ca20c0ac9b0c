//! Goal: the bytes are right wherever they come from, no budget of host memory is passed by a
//! byte, and memory that the system wants back is given back in the middle of a pass.
//! Method: whole passes of random models on the host device, from memory, from files and with
//! copies of those, over a modelled link and without one; every byte of every block is compared.
#![expect(clippy::cast_precision_loss, reason = "shares of some megabytes")]

use std::sync::Arc;

use dgls_core::driver::ComputeStream;
use dgls_core::driver::host::shim::{Pages, WeightFile, page_bytes};
use dgls_core::driver::host::{HostDevice, HostOptions};
use dgls_core::engine::{Engine, Options, Spec};

use crate::random::Random;
use crate::stack::Stack;
use crate::watchdog::for_seeds;
use crate::weights::{Scratch, Weights};

const LINK: u64 = 4 << 30;

fn model(seed: u64) -> Weights {
    Weights::new(Stack::uniform(8, &[300_001, 37, 165_537, 40_000, 96_000]), seed)
}

/// The engine is dropped before its arena.
struct Rig {
    engine: Engine,
    arena: Pages,
}

fn rig(weights: &Weights, file: Option<&Scratch>, copy_bytes_per_s: u64, spec: &Spec) -> Rig {
    let files = file.map(|file| WeightFile::open(file.text()).expect("just written"));
    let options = HostOptions { files: files.into_iter().collect(), copy_bytes_per_s };
    let device = Arc::new(HostDevice::new(options).expect("a thread"));
    let arena = Pages::new(spec.budget_bytes).expect("host memory");
    let sources = if file.is_some() { weights.in_file() } else { weights.in_memory() };
    let options = Options { poison: true, timing: true, ..Options::default() };
    let profile = weights.stack.profile.clone();
    let budget_bytes = spec.budget_bytes;
    let spec = Spec { profile, sources, options, trace_uses: 100, ..spec.clone() };
    let engine = Engine::new(device, spec, arena.address(), budget_bytes).expect("feasible");
    Rig { engine, arena }
}

impl Rig {
    fn passes(&self, weights: &Weights, count: usize) {
        for _ in 0..count {
            weights.pass(&self.engine, self.arena.address()).expect("no faults");
        }
    }
}

/// What this process has locked, in bytes.
fn locked_now() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("known");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[test]
fn any_model_from_any_tier_has_the_right_bytes_within_its_budgets() {
    for_seeds(40, |seed| {
        let mut random = Random::new(seed);
        let weights = Weights::new(Stack::random(&mut random), seed);
        let file = random.chance(70).then(|| Scratch::new(&weights.contents()));
        let share = |random: &mut Random| weights.bytes() * random.between(0, 5) / 4;
        let (pinned_bytes, ram_bytes) = (share(&mut random), share(&mut random));
        let staging_bytes = [4096, 1 << 16, 5 << 16, 1 << 20][random.index(4)];
        let link = if random.chance(50) { LINK } else { 0 };
        let budget_bytes = weights.stack.random_budget(&mut random);
        let spec = Spec { budget_bytes, pinned_bytes, ram_bytes, staging_bytes, ..Spec::default() };
        let rig = rig(&weights, file.as_ref(), link, &spec);
        for round in 0..3 {
            for _ in 0..random.between(5, 20) {
                let block = random.next() % u64::from(weights.stack.blocks());
                let block = u32::try_from(block).expect("12");
                weights.use_block(&rig.engine, rig.arena.address(), block).expect("no faults");
            }
            let (stats, facts) = (rig.engine.stats(), rig.engine.host_facts());
            assert!(stats.pinned_bytes <= pinned_bytes, "{} of {pinned_bytes}", stats.pinned_bytes);
            assert!(facts.cached_bytes <= ram_bytes, "{} of {ram_bytes}", facts.cached_bytes);
            assert!(stats.staging_bytes <= staging_bytes, "{stats:?} of {staging_bytes}");
            match round {
                0 => rig.engine.give_back(random.between(1, weights.bytes())),
                _ => rig.engine.end_pass(),
            }
        }
        rig.engine.close().expect("nothing is wrong");
    });
}

#[test]
fn copies_are_read_once_and_the_rest_in_every_pass() {
    let weights = model(1);
    let file = Scratch::new(&weights.contents());
    let (least, _) = weights.stack.budgets();
    let spec = Spec { budget_bytes: 2 * least, staging_bytes: 1 << 20, ..Spec::default() };
    let streamed = rig(&weights, Some(&file), 0, &spec).engine.plan().streamed_bytes;
    for (ram_bytes, from_file) in [(0, 1.0), (streamed / 2, 0.5), (2 * streamed, 0.0)] {
        let rig = rig(&weights, Some(&file), 0, &Spec { ram_bytes, ..spec.clone() });
        rig.passes(&weights, 2);
        let before = rig.engine.host_facts();
        rig.passes(&weights, 4);
        let after = rig.engine.host_facts();
        let read = |at: usize| after.read_bytes[at] - before.read_bytes[at];
        let share = (read(1) + read(2)) as f64 / (4 * streamed) as f64;
        assert!(
            (share - from_file).abs() < 0.15,
            "{share} of what is streamed, {from_file} wanted"
        );
        let planned = after.pass_bytes[2] as f64 / streamed as f64;
        assert!((planned - from_file).abs() < 0.15, "{planned}, {after:?}");
        assert!(after.cached_bytes <= ram_bytes && after.cached_bytes % page_bytes() == 0);
        assert!(ram_bytes == 0 || after.cached_bytes + 400_000 > ram_bytes.min(streamed));
    }
}

/// Over a link: page-locked copies are taken as they are.
#[test]
fn page_locked_copies_need_no_chunk() {
    let weights = model(2);
    let file = Scratch::new(&weights.contents());
    let (least, _) = weights.stack.budgets();
    let all = 2 * weights.bytes();
    let rig = rig(
        &weights,
        Some(&file),
        LINK,
        &Spec {
            budget_bytes: 2 * least,
            staging_bytes: 1 << 20,
            ram_bytes: all,
            pinned_bytes: all,
            ..Spec::default()
        },
    );
    rig.passes(&weights, 3);
    let before = rig.engine.host_facts();
    rig.passes(&weights, 3);
    let after = rig.engine.host_facts();
    if rig.engine.stats().pin_failures > 0 {
        return; // an unprivileged user may lock little: then there is nothing to see
    }
    assert_eq!(after.read_bytes, before.read_bytes, "nothing goes through a chunk any more");
    assert_eq!(after.pass_bytes[1..], [0, 0]);
    assert_eq!(rig.engine.stats().pinned_bytes > 0, locked_now() > 0);
}

#[test]
fn memory_is_given_back_in_the_middle_of_a_pass() {
    let weights = model(3);
    let file = Scratch::new(&weights.contents());
    let (least, _) = weights.stack.budgets();
    for from_file in [true, false] {
        let file = from_file.then_some(&file);
        // With the smallest budget nothing is resident: all is page-locked, and no thread stages.
        let budget_bytes = if from_file { 2 * least } else { least };
        let all = 2 * weights.bytes();
        let rig = rig(
            &weights,
            file,
            LINK,
            &Spec {
                budget_bytes,
                staging_bytes: 1 << 20,
                ram_bytes: all,
                pinned_bytes: all,
                ..Spec::default()
            },
        );
        rig.passes(&weights, 3);
        let before = (rig.engine.stats(), rig.engine.host_facts());
        assert!(before.0.pinned_bytes > 0, "the test needs a few hundred KiB of page-locks");
        assert_eq!(before.0.staging_bytes > 0, from_file);
        let address = rig.arena.address();
        for block in 0..4 {
            weights.use_block(&rig.engine, address, block).expect("no faults");
        }
        rig.engine.give_back(500_000);
        for block in 4..8 {
            weights.use_block(&rig.engine, address, block).expect("no faults");
        }
        let some = (rig.engine.stats(), rig.engine.host_facts());
        assert_eq!(some.1.given_back.0, 1);
        assert!(some.1.given_back.1 >= 500_000, "{:?}", some.1);
        assert!(some.0.pinned_bytes > 0 && some.0.pinned_bytes < before.0.pinned_bytes);
        assert_eq!(some.1.cached_bytes < before.1.cached_bytes, from_file);
        rig.engine.give_back(u64::MAX);
        rig.passes(&weights, 2);
        let none = (rig.engine.stats(), rig.engine.host_facts());
        assert_eq!((none.0.pinned_bytes, none.1.cached_bytes), (0, 0));
        assert_eq!(none.1.pass_bytes[0], 0, "all of it is staged");
        // A plan made anew takes nothing of it again.
        rig.engine
            .rebuild(budget_bytes, address, budget_bytes, ComputeStream(0))
            .expect("feasible");
        rig.passes(&weights, 2);
        let after = (rig.engine.stats(), rig.engine.host_facts());
        assert_eq!((after.0.pinned_bytes, after.1.cached_bytes), (0, 0));
        assert_eq!(after.0.counters.errors, 0);
    }
}
