//! Goal: weights that are kept encoded arrive as they are, and take no more than their budget.
//! Method: whole passes on the host device, which decodes in its copy thread, with encoding at the
//! end of each pass; every byte of every block is compared.

use std::collections::BTreeSet;
use std::sync::Arc;

use dgls_core::codec::Element;
use dgls_core::driver::host::shim::{Pages, WeightFile, page_bytes};
use dgls_core::driver::host::{HostDevice, HostOptions};
use dgls_core::driver::{ComputeStream, Device};
use dgls_core::engine::{Adapt, Encode, Engine, Options, Spec, Stats};
use dgls_core::plan::Copy;

use crate::adaptation::real;
use crate::flaky::Flaky;
use crate::random::Random;
use crate::stack::{Stack, index};
use crate::watchdog::for_seeds;
use crate::weights::{Scratch, Weights};

pub(crate) const COMPUTE: ComputeStream = ComputeStream(0);
pub(crate) const BLOCKS: u32 = 6;
pub(crate) const LINK: u64 = 4 << 30;
/// Odd, less than a tile, a tile (whose encoded form is larger), and some whole tiles.
const SIZES: [u64; 4] = [150_001, 1000, 2048, 65_536];
/// Of a block, the bytes that are worth encoding: whole tiles of the first and the last tensor.
pub(crate) const WORTH: u64 = 150_001 / 2048 * 2048 + 65_536;

pub(crate) fn model(seed: u64) -> Weights {
    trained(Stack::uniform(BLOCKS, &SIZES), seed)
}

pub(crate) fn trained(stack: Stack, seed: u64) -> Weights {
    let weights = Weights::new(stack, seed);
    for tensor in 0..weights.stack.profile.tensors.len() {
        weights.train(tensor, seed);
    }
    weights
}

/// The engine is dropped before its arena.
pub(crate) struct Rig<'a> {
    pub(crate) engine: Engine,
    arena: Pages,
    weights: &'a Weights,
}

/// Everything is encoded at once, with room for all of it.
pub(crate) fn always(weights: &Weights, budget_bytes: u64) -> Spec {
    Spec {
        profile: weights.stack.profile.clone(),
        sources: weights.in_memory(),
        budget_bytes,
        pinned_bytes: 1 << 30,
        staging_bytes: 1 << 18,
        encode: Encode::ALWAYS,
        encodable: vec![Some(Element::Bf16); weights.stack.profile.tensors.len()],
        encoded_bytes: 1 << 30,
        options: Options { adapt: Adapt::AtOnce, poison: true, ..Options::default() },
        ..Spec::default()
    }
}

impl<'a> Rig<'a> {
    pub(crate) fn new(weights: &'a Weights, spec: &Spec) -> Self {
        Self::with(weights, spec, HostOptions::default())
    }

    pub(crate) fn with(weights: &'a Weights, spec: &Spec, options: HostOptions) -> Self {
        Self::on(Arc::new(HostDevice::new(options).expect("a thread")), weights, spec)
    }

    /// Where no time can ever be read, so that plans do not depend on any.
    pub(crate) fn timeless(weights: &'a Weights, spec: &Spec) -> Self {
        let inner = Arc::new(HostDevice::new(HostOptions::default()).expect("a thread"));
        let device = Flaky::new(inner, BTreeSet::new());
        device.go_ahead(1 << 40);
        Self::on(Arc::new(device), weights, spec)
    }

    fn on(device: Arc<dyn Device>, weights: &'a Weights, spec: &Spec) -> Self {
        let (budget, arena) = (spec.budget_bytes, Pages::new(spec.budget_bytes));
        let arena = arena.expect("host memory");
        let engine = Engine::new(device, spec.clone(), arena.address(), budget).expect("feasible");
        Self { engine, arena, weights }
    }

    /// Runs a pass, and returns how many bytes of it were encoded, and to how many they decoded.
    pub(crate) fn pass(&self) -> (u64, u64) {
        let before = self.engine.stats();
        self.weights.pass(&self.engine, self.arena.address()).expect("no faults");
        let after = self.engine.stats();
        assert_eq!(after.code_bytes % page_bytes(), 0);
        let encoded_bytes = after.encoded_bytes - before.encoded_bytes;
        assert!(encoded_bytes <= after.bytes - before.bytes);
        (encoded_bytes, after.decoded_bytes - before.decoded_bytes)
    }

    /// As [`Rig::pass`], of a whole cycle of the plan.
    pub(crate) fn cycle(&self) -> (u64, u64) {
        let passes = (0..self.engine.plan().program.passes).map(|_| self.pass());
        passes.fold((0, 0), |sums, (encoded, decoded)| (sums.0 + encoded, sums.1 + decoded))
    }

    pub(crate) fn stats(&self) -> Stats {
        self.engine.stats()
    }

    pub(crate) fn use_blocks(&self, blocks: std::ops::Range<u32>) {
        for block in blocks {
            let used = self.weights.use_block(&self.engine, self.arena.address(), block);
            used.expect("no faults");
        }
    }

    pub(crate) fn rebuild(&mut self, budget: u64) {
        let arena = Pages::new(budget).expect("host memory");
        let rebuilt = self.engine.rebuild(budget, arena.address(), budget, COMPUTE);
        rebuilt.expect("feasible");
        self.arena = arena;
    }
}

/// What of a cycle of passes comes encoded: the whole tiles between two places at which a copy may
/// begin, if they are at least 64 KiB.
pub(crate) fn worth(rig: &Rig<'_>) -> u64 {
    let program = rig.engine.plan().program;
    let uses = &program.uses[..index(program.cycle)];
    let tiles = |copy: &Copy| {
        let end = copy.source_offset + copy.bytes;
        let of_tensor = program.copies.iter().filter(|other| other.tensor == copy.tensor);
        let mut cuts: Vec<u64> = of_tensor.map(|other| other.source_offset).collect();
        cuts.retain(|&cut| copy.source_offset <= cut && cut < end);
        cuts.push(end);
        cuts.sort_unstable();
        cuts.dedup();
        let between = cuts.windows(2).map(|pair| {
            let whole = pair[1].saturating_sub(pair[0].next_multiple_of(2048)) / 2048 * 2048;
            if whole >= 1 << 16 { whole } else { 0 }
        });
        between.sum::<u64>()
    };
    uses.iter().flat_map(|used| program.copies_of(used)).map(tiles).sum()
}

/// The bytes of whole tiles that are streamed in a pass and worth encoding.
pub(crate) fn streamed(rig: &Rig<'_>) -> u64 {
    let plan = rig.engine.plan();
    let tensors = std::iter::zip(&rig.weights.stack.profile.tensors, &plan.resident);
    let bytes = tensors.filter(|&(_, &resident)| !resident).map(|(tensor, _)| tensor.bytes);
    bytes.filter(|&bytes| bytes > 60_000).map(|bytes| bytes / 2048 * 2048).sum()
}

/// Whether about all of the streamed weights came encoded: a staging thread may have looked at
/// those of a block before or after a pass ended.
fn is_all(decoded_bytes: u64) -> bool {
    let all = u64::from(BLOCKS) * WORTH;
    (all - WORTH..=all + WORTH).contains(&decoded_bytes)
}

#[test]
fn from_the_second_pass_on_weights_come_encoded() {
    let weights = model(1);
    let (least, all) = weights.stack.budgets();
    for budget in [least, 2 * least, all / 2] {
        let rig = Rig::new(&weights, &always(&weights, budget));
        let (worth, streamed) = (worth(&rig), streamed(&rig));
        assert!(budget > least || worth == u64::from(BLOCKS) * WORTH);
        assert_eq!(rig.stats().code_bytes, 0);
        assert_eq!(rig.pass(), (0, 0), "nothing is encoded before a pass has ended");
        let code_bytes = rig.stats().code_bytes;
        assert!(0 < code_bytes && code_bytes < streamed, "{code_bytes} of {streamed}");
        // What comes early comes raw in the first of them.
        rig.pass();
        for _ in 0..3 {
            let (encoded_bytes, decoded_bytes) = rig.cycle();
            assert_eq!(decoded_bytes, worth, "all but edges and small tensors");
            assert!(encoded_bytes <= worth * 8 / 10);
        }
        rig.use_blocks(2..4);
        rig.use_blocks(0..1);
        rig.pass();
        assert_eq!(rig.stats().code_bytes, code_bytes, "once");
        assert_eq!(rig.stats().counters.errors, 0);
        rig.engine.close().expect("nothing is wrong");
    }
}

#[test]
fn a_large_tensor_comes_in_several_segments_and_an_edge() {
    let weights = trained(Stack::uniform(2, &[(4 << 20) + 200_001]), 2);
    let (least, _) = weights.stack.budgets();
    let rig = Rig::new(&weights, &always(&weights, least));
    let whole = ((4 << 20) + 200_001) / 2048 * 2048;
    for _ in 0..2 {
        rig.pass();
    }
    let (encoded_bytes, decoded_bytes) = rig.pass();
    assert_eq!(decoded_bytes, 2 * whole);
    assert!(encoded_bytes < whole * 16 / 10);
}

#[test]
fn any_model_has_the_right_bytes() {
    for_seeds(20, |seed| {
        let mut random = Random::new(seed);
        let weights = trained(Stack::random(&mut random), seed);
        for tensor in 0..weights.stack.profile.tensors.len() {
            if random.chance(30) {
                weights.rewrite(tensor, seed);
            }
        }
        let encoded_bytes = weights.bytes() * random.between(0, 4) / 4;
        let budget = weights.stack.random_budget(&mut random);
        let rig = Rig::new(&weights, &Spec { encoded_bytes, ..always(&weights, budget) });
        for _ in 0..4 {
            for _ in 0..random.between(3, 10) {
                let block = random.index(weights.stack.tensors.len());
                let block = u32::try_from(block).expect("12");
                if random.chance(10) {
                    let tensors = &weights.stack.tensors[index(block)];
                    for &tensor in tensors {
                        weights.train(tensor, random.next());
                    }
                    rig.engine.reload(block).expect("a block of the plan");
                }
                rig.use_blocks(block..block + 1);
            }
            rig.engine.end_pass();
        }
    });
}

#[test]
fn from_a_file_and_from_its_copies_weights_are_encoded_too() {
    let weights = model(3);
    let file = Scratch::new(&weights.contents());
    let (least, _) = weights.stack.budgets();
    for ram_bytes in [0, weights.bytes() / 2] {
        let sources = weights.in_file();
        let spec = Spec { sources, ram_bytes, ..always(&weights, least) };
        let open = WeightFile::open(file.text()).expect("just written");
        let files = [open].into_iter().collect();
        let rig = Rig::with(&weights, &spec, HostOptions { files, copy_bytes_per_s: 0 });
        rig.pass();
        rig.pass();
        assert!(is_all(rig.pass().1));
    }
}

#[test]
fn what_becomes_no_smaller_is_tried_once() {
    let weights = Weights::new(Stack::uniform(BLOCKS, &SIZES), 4);
    let (least, _) = weights.stack.budgets();
    let rig = Rig::new(&weights, &always(&weights, least));
    for _ in 0..2 {
        assert_eq!(rig.pass(), (0, 0));
    }
    assert_eq!(rig.stats().code_bytes, 0);
    // A second try would find these; nobody says that they have changed.
    (0..weights.stack.profile.tensors.len()).for_each(|tensor| weights.train(tensor, 4));
    for _ in 0..2 {
        for block in 0..BLOCKS {
            rig.engine.enter(block, COMPUTE).expect("no faults");
            rig.engine.exit(COMPUTE).expect("no faults");
        }
        rig.engine.end_pass();
    }
    assert_eq!((rig.stats().passes, rig.stats().code_bytes), (4, 0));
}

#[test]
fn no_more_than_the_budget_is_held() {
    let weights = model(5);
    let (least, _) = weights.stack.budgets();
    let all = u64::from(BLOCKS) * WORTH;
    for encoded_bytes in [0, 4096, 100_000, 200_000, all / 2 + 77, all] {
        let rig = Rig::new(&weights, &Spec { encoded_bytes, ..always(&weights, least) });
        for _ in 0..3 {
            rig.pass();
            let code_bytes = rig.stats().code_bytes;
            assert!(code_bytes <= encoded_bytes, "{code_bytes} of {encoded_bytes}");
            assert_eq!(code_bytes > 0, encoded_bytes >= 65_536);
        }
        let (_, decoded_bytes) = rig.pass();
        assert_eq!(decoded_bytes > 0, encoded_bytes >= 65_536);
        assert!(decoded_bytes < all || encoded_bytes == all);
    }
}

#[test]
fn whole_pages_count_of_small_tensors_too() {
    let weights = trained(Stack::uniform(BLOCKS, &[6144]), 5);
    let (least, _) = weights.stack.budgets();
    for encoded_bytes in [6144, 3 * 8192 - 1, 3 * 8192] {
        let rig = Rig::new(&weights, &Spec { encoded_bytes, ..always(&weights, least) });
        rig.pass();
        let code_bytes = rig.stats().code_bytes;
        assert!(code_bytes <= encoded_bytes, "{code_bytes} of {encoded_bytes}");
        rig.pass();
    }
}

#[test]
fn nothing_is_encoded_unasked() {
    let weights = model(6);
    let (least, _) = weights.stack.budgets();
    let spec = always(&weights, least);
    let off = Spec { encode: Encode::Off, ..spec.clone() };
    let none = Spec { encodable: Vec::new(), ..spec.clone() };
    // Nothing is timed, so that nothing is known of the link.
    let options = Options { adapt: Adapt::Off, ..spec.options };
    let untimed = Spec { encode: Encode::WhereCopiesDecide, options, ..spec.clone() };
    for spec in [off, none, untimed] {
        let rig = Rig::new(&weights, &spec);
        for _ in 0..3 {
            assert_eq!(rig.pass(), (0, 0), "{:?}", spec.encode);
        }
        assert_eq!(rig.stats().code_bytes, 0, "{:?}", spec.encode);
    }
    // One tensor of each block.
    let fourth = |tensor: usize| (tensor % SIZES.len() == 3).then_some(Element::Bf16);
    let encodable = (0..spec.encodable.len()).map(fourth).collect();
    let rig = Rig::new(&weights, &Spec { encodable, ..spec });
    rig.pass();
    rig.pass();
    assert_eq!(rig.pass().1, u64::from(BLOCKS) * 65_536);
}

#[test]
fn fp8_and_bf16_go_encoded_side_by_side() {
    let weights = model(7);
    let (least, _) = weights.stack.budgets();
    let mut spec = always(&weights, least);
    // The last tensor of each block.
    let fp8: Vec<usize> = (0..spec.encodable.len()).filter(|n| n % SIZES.len() == 3).collect();
    for &tensor in &fp8 {
        spec.encodable[tensor] = Some(Element::Fp8);
        weights.train_as(Element::Fp8, tensor, 8);
    }
    let rig = Rig::new(&weights, &spec);
    rig.pass();
    let (encoded, decoded) = rig.pass();
    assert_eq!(decoded, u64::from(BLOCKS) * WORTH);
    let of_bf16 = decoded - 65_536 * fp8.len() as u64;
    let share = real(encoded) / (0.69 * real(of_bf16) + 0.76 * real(decoded - of_bf16));
    assert!((0.9..1.1).contains(&share), "{encoded} bytes for {decoded}");
}

#[test]
fn where_copies_decide_weights_are_encoded_once_that_is_known() {
    let weights = model(6);
    let (least, _) = weights.stack.budgets();
    let mut spec = always(&weights, least);
    (spec.encode, spec.options.timing, spec.trace_uses) = (Encode::WhereCopiesDecide, true, 100);
    // Blocks take next to no time to compute.
    let options = HostOptions { copy_bytes_per_s: 256 << 20, ..HostOptions::default() };
    let rig = Rig::with(&weights, &spec, options);
    assert_eq!(rig.pass(), (0, 0));
    for pass in 0.. {
        if rig.stats().code_bytes > 0 {
            break;
        }
        assert!(pass < 20, "never");
        rig.pass();
    }
    rig.pass();
    assert!(rig.pass().1 > 0);
}

#[test]
fn edges_are_staged_and_the_rest_comes_encoded() {
    let weights = model(10);
    let (least, _) = weights.stack.budgets();
    // Over a link, with page-locks for none of the weights, or for some.
    for pinned_bytes in [0, 200_000] {
        let options = HostOptions { copy_bytes_per_s: LINK, ..HostOptions::default() };
        let spec = Spec { pinned_bytes, ..always(&weights, least) };
        let rig = Rig::with(&weights, &spec, options);
        assert!(rig.stats().staging_bytes > 0);
        rig.pass();
        rig.pass();
        for _ in 0..3 {
            assert!(is_all(rig.pass().1), "{pinned_bytes} pinned");
        }
        rig.use_blocks(3..5);
        rig.use_blocks(1..2);
        rig.pass();
        assert!(rig.stats().pinned_bytes <= pinned_bytes);
        assert_eq!(rig.stats().counters.errors, 0);
        rig.engine.close().expect("nothing is wrong");
    }
}
