//! Goal: the real CUDA device gives every block its bytes, in order, and gives everything back.
//! Method: the device on a fake driver whose copies and kernels are slow and happen at the worst
//! moment; then the same with one wait taken out, which must show.

use std::process::Command;
use std::sync::Arc;

use dgls_core::codec::Element;
use dgls_core::driver::cuda::{CudaDevice, CudaOptions, driver_version};
use dgls_core::driver::host::shim::{Pages, WeightFile};
use dgls_core::driver::mutant::{Batches, Dropped, Mutant};
use dgls_core::driver::{ComputeStream, Device, Source};
use dgls_core::engine::{Adapt, Encode, Engine, Options, Spec};
use dgls_core::{Error, Result, probe};

use crate::fake::{Seen, Session, load};
use crate::random::Random;
use crate::stack::{Stack, index};
use crate::weights::{Scratch, Weights, bytes_at};

/// An engine on the fake driver, with the weights and the arena that it uses.
pub(crate) struct Rig<'a> {
    pub(crate) engine: Engine,
    arena: Pages,
    weights: &'a Weights,
    sources: Vec<Source>,
    seen: Vec<(usize, Seen)>,
}

#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) sources: Vec<Source>,
    pub(crate) budget: u64,
    pub(crate) pinned_bytes: u64,
    pub(crate) dropped: Dropped,
    pub(crate) batches: Batches,
    pub(crate) timing: bool,
    /// Device memory to decode from: weights are encoded at the end of the first pass then.
    pub(crate) decode_buffer: Option<(u64, u64)>,
    /// How much of what is streamed is.
    pub(crate) eighths: u32,
}

impl Setup {
    pub(crate) fn new(weights: &Weights, budget: u64) -> Self {
        Self {
            sources: weights.in_memory(),
            budget,
            pinned_bytes: 1 << 30,
            dropped: Dropped::default(),
            batches: Batches::Right,
            timing: false,
            decode_buffer: None,
            eighths: 8,
        }
    }
}

pub(crate) fn model() -> Weights {
    Weights::new(Stack::uniform(6, &[70_001, 130_000, 4096]), 3)
}

impl<'a> Rig<'a> {
    pub(crate) fn new(weights: &'a Weights, setup: &Setup, file: Option<&Scratch>) -> Result<Self> {
        let files = file.map(|file| WeightFile::open(file.text()).expect("just written"));
        let device: Arc<dyn Device> = Arc::new(CudaDevice::new(CudaOptions {
            ordinal: 0,
            files: files.into_iter().collect(),
            timing: setup.timing,
            decode_buffer: setup.decode_buffer,
        })?);
        let device = match (setup.dropped, &setup.batches) {
            (dropped, Batches::Right) if dropped == Dropped::default() => device,
            (dropped, batches) => {
                Arc::new(Mutant::new(device, dropped).with_batches(batches.clone()))
            }
        };
        let (encode, adapt) = match setup.decode_buffer {
            Some(_) => (Encode::Eighths(setup.eighths), Adapt::AtOnce),
            None => (Encode::Off, Adapt::default()),
        };
        let spec = Spec {
            profile: weights.stack.profile.clone(),
            sources: setup.sources.clone(),
            encode,
            encodable: vec![Some(Element::Bf16); setup.sources.len()],
            encoded_bytes: 1 << 30,
            budget_bytes: setup.budget,
            pinned_bytes: setup.pinned_bytes,
            ram_bytes: 0,
            page_cache_bytes: 0,
            staging_bytes: 3 << 16,
            trace_uses: 100,
            options: Options { timing: setup.timing, adapt, ..Options::default() },
            ..Spec::default()
        };
        let arena = Pages::new(setup.budget).expect("host memory");
        let engine = Engine::new(device, spec, arena.address(), setup.budget)?;
        Ok(Self { engine, arena, weights, sources: setup.sources.clone(), seen: Vec::new() })
    }

    /// Runs a block whose kernels take `microseconds` each and read at their end.
    pub(crate) fn use_block(
        &mut self,
        session: &Session,
        block: u32,
        compute: ComputeStream,
        microseconds: u64,
    ) -> Result<()> {
        let position = self.engine.enter(block, compute)?;
        let layout = self.engine.layout();
        assert_eq!(layout[index(position)].0, block);
        for (tensor, offset) in self.weights.places(&layout, position) {
            let bytes = self.weights.stack.bytes(tensor);
            let from = self.arena.address() + offset;
            self.seen.push((tensor, session.read(compute, from, bytes, microseconds)));
        }
        self.engine.exit(compute)
    }

    /// Goes on in an arena of another size.
    pub(crate) fn rebuild(&mut self, session: &Session, budget: u64) {
        let arena = Pages::new(budget).expect("host memory");
        let rebuilt = self.engine.rebuild(budget, arena.address(), budget, session.stream(0));
        rebuilt.expect("feasible");
        session.synchronize();
        self.arena = arena;
    }

    /// Waits for all kernels and counts those that read wrong bytes.
    pub(crate) fn wrong(&mut self, session: &Session) -> usize {
        session.synchronize();
        let wrong = |(tensor, seen): &(usize, Seen)| match self.sources[*tensor] {
            Source::Memory { address } => {
                seen.bytes() != bytes_at(address, self.weights.stack.bytes(*tensor))
            }
            Source::File { .. } | Source::Encoded { .. } => {
                seen.bytes() != self.weights.tensor(*tensor)
            }
        };
        let count = self.seen.iter().filter(|seen| wrong(seen)).count();
        self.seen.clear();
        count
    }
}

#[test]
fn page_locked_staged_and_from_a_file_every_byte_is_right() {
    let session = Session::new();
    let weights = model();
    let file = Scratch::new(&weights.contents());
    let (least, all) = weights.stack.budgets();
    session.set("lat_us", 100);
    session.set("bw_mbps", 2000);
    let mut random = Random::new(5);
    for budget in [least, 2 * least, all / 2, all] {
        for (pinned_bytes, from_file) in [(1 << 30, false), (400_000, false), (0, false), (0, true)]
        {
            let sources = if from_file { weights.in_file() } else { weights.in_memory() };
            let timing = random.chance(50);
            let setup = Setup { sources, pinned_bytes, timing, ..Setup::new(&weights, budget) };
            let mut rig = Rig::new(&weights, &setup, Some(&file)).expect("no faults");
            let order = &weights.stack.profile.order;
            for _ in 0..2 {
                for &block in order {
                    let stream = session.stream(random.index(3));
                    rig.use_block(&session, block, stream, 300).expect("no faults");
                }
                // A host that is two passes ahead would move marks that have not passed yet.
                session.synchronize();
            }
            let records = rig.engine.records();
            assert_eq!(records.len(), if timing { 12 } else { 0 });
            assert!(records.iter().all(|r| r.times.copy_end_ns <= r.times.start_ns));
            assert!(records.iter().all(|r| r.times.start_ns < r.times.end_ns));
            for block in [5, 1, 1, 3, 2, 4, 0] {
                let stream = session.stream(random.index(3));
                rig.use_block(&session, block, stream, 300).expect("no faults");
            }
            assert_eq!(rig.wrong(&session), 0, "budget {budget}, {pinned_bytes} pinned");
            let stats = rig.engine.stats();
            assert_eq!(stats.counters.uses, 19);
            assert_eq!(stats.pin_failures, 0);
            let page_locked = u64::try_from(session.get("pinned")).expect("a count");
            assert!(stats.pinned_bytes + stats.staging_bytes <= page_locked);
            assert!(page_locked <= pinned_bytes + stats.staging_bytes, "counted in whole pages");
            assert!(pinned_bytes < weights.bytes() || budget == all || stats.pinned_bytes > 0);
            rig.engine.close().expect("no faults");
            assert_eq!(session.get("host_ranges"), 0, "a closed engine holds no host memory");
        }
    }
    session.finish();
}

/// The share of reads that are wrong in two passes.
fn wrong_reads(dropped: Dropped, lat_us: i64, kernel_us: u64, pinned_bytes: u64) -> (usize, usize) {
    let session = Session::new();
    let weights = model();
    let (least, _) = weights.stack.budgets();
    session.set("lat_us", lat_us);
    let setup = Setup { pinned_bytes, dropped, ..Setup::new(&weights, 2 * least) };
    let mut rig = Rig::new(&weights, &setup, None).expect("no faults");
    for _ in 0..2 {
        for block in 0..6 {
            rig.use_block(&session, block, session.stream(0), kernel_us).expect("no faults");
        }
    }
    let wrong = rig.wrong(&session);
    drop(rig);
    session.finish();
    (wrong, 36)
}

#[test]
fn a_lost_wait_for_done_shows() {
    // Slow kernels, fast copies: the next weights arrive while the old ones are read.
    let (wrong, all) = wrong_reads(Dropped::default(), 100, 3000, 1 << 30);
    assert_eq!(wrong, 0, "of {all}");
    let dropped = Dropped { done: true, ..Dropped::default() };
    let (wrong, all) = wrong_reads(dropped, 100, 3000, 1 << 30);
    assert!(wrong >= all / 4, "{wrong} of {all}");
}

#[test]
fn a_lost_wait_for_ready_shows() {
    // Slow copies, fast kernels: the weights have not arrived when they are read.
    let (wrong, all) = wrong_reads(Dropped::default(), 3000, 0, 1 << 30);
    assert_eq!(wrong, 0, "of {all}");
    let dropped = Dropped { ready: true, ..Dropped::default() };
    let (wrong, all) = wrong_reads(dropped, 3000, 0, 1 << 30);
    assert!(wrong >= all / 4, "{wrong} of {all}");
}

#[test]
fn a_lost_wait_for_a_chunk_shows() {
    let (wrong, all) = wrong_reads(Dropped::default(), 2000, 0, 0);
    assert_eq!(wrong, 0, "of {all}");
    let dropped = Dropped { chunk: true, ..Dropped::default() };
    let (wrong, all) = wrong_reads(dropped, 2000, 0, 0);
    assert!(wrong >= all / 4, "{wrong} of {all}");
}

#[test]
fn tensors_that_share_memory_are_locked_once() {
    let session = Session::new();
    let weights = model();
    let (least, _) = weights.stack.budgets();
    let mut setup = Setup::new(&weights, 2 * least);
    // Tied weights, and views that overlap in part, within a block and across blocks.
    setup.sources[4] = setup.sources[1];
    setup.sources[7] = setup.sources[1].advanced(4097);
    setup.sources[9] = setup.sources[10].advanced(256);
    setup.sources[15] = setup.sources[9];
    let mut rig = Rig::new(&weights, &setup, None).expect("no faults");
    assert_eq!(rig.engine.stats().pin_failures, 0);
    for block in (0..6).chain([3, 1, 5, 0]) {
        rig.use_block(&session, block, session.stream(0), 50).expect("no faults");
    }
    assert_eq!(rig.wrong(&session), 0);
    rig.engine.rebuild(least, rig.arena.address(), least, session.stream(0)).expect("feasible");
    rig.engine.close().expect("no faults");
    assert_eq!(session.get("host_ranges"), 0);
    drop(rig);
    session.finish();
}

#[test]
fn a_new_plan_waits_for_all_kernels_of_the_old_one() {
    let session = Session::new();
    let weights = model();
    let (least, all) = weights.stack.budgets();
    session.set("lat_us", 100);
    let mut rig = Rig::new(&weights, &Setup::new(&weights, 2 * least), None).expect("no faults");
    for budget in [all, least, 2 * least] {
        for block in 0..6 {
            let stream = session.stream(index(block) % 2);
            rig.use_block(&session, block, stream, 1000).expect("no faults");
        }
        let arena = Pages::new(budget).expect("host memory");
        rig.engine.rebuild(budget, arena.address(), budget, session.stream(0)).expect("feasible");
        // Who still read the old arena would see this.
        dgls_core::driver::host::shim::fill(rig.arena.address(), 0, rig.arena.bytes());
        rig.arena = arena;
        assert_eq!(rig.wrong(&session), 0);
    }
    drop(rig);
    session.finish();
}

#[test]
fn the_callers_context_stays_current() {
    let session = Session::new();
    session.set("devices", 2);
    let other = session.retain(1);
    let weights = model();
    let (least, _) = weights.stack.budgets();
    session.set_context(other);
    let setup = Setup { timing: true, pinned_bytes: 0, ..Setup::new(&weights, 2 * least) };
    let rig = Rig::new(&weights, &setup, None).expect("no faults");
    assert_eq!(session.context(), other);
    for block in 0..6 {
        rig.engine.enter(block, session.stream(0)).expect("no faults");
        assert_eq!(session.context(), other);
        rig.engine.exit(session.stream(0)).expect("no faults");
        assert_eq!(session.context(), other);
    }
    rig.engine.records();
    rig.engine.close().expect("no faults");
    drop(rig);
    assert_eq!(session.context(), other);
    session.release(1);
    session.set_context(session.retain(0));
    session.release(0);
    session.finish();
}

#[test]
fn the_machine_is_measured_and_left_as_it_was() {
    let session = Session::new();
    session.set("bw_mbps", 1000);
    for page_locked in [false, true] {
        let rate = probe::measure_copy(0, 1 << 20, 2, page_locked).expect("no faults");
        assert!(rate > 0.0 && rate <= 1e9, "{rate} bytes/s over a link of 1e9");
        assert_eq!((session.get("used"), session.get("pinned")), (0, 0));
    }
    session.set("pin_cap", 100 << 20);
    assert_eq!(probe::measure_page_lock(0, 1 << 30).expect("no faults"), 100 << 20);
    assert_eq!(probe::measure_page_lock(0, 10 << 20).expect("no faults"), 10 << 20);
    session.finish();
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    let session = Session::new();
    let made = CudaDevice::new(CudaOptions { ordinal: 3, ..CudaOptions::default() });
    let error = made.map(drop).expect_err("one device");
    assert!(matches!(error, Error::Driver { call: "cuDeviceGet", code: 101, .. }), "{error}");
    session.set("devices", 0);
    let error = driver_version().expect_err("no device");
    assert_eq!(error.to_string(), "no usable CUDA driver: driver 12090 is there, but no device");
    CudaDevice::new(CudaOptions::default()).map(drop).expect_err("no device");
    session.finish();
}

/// Runs this test in a process of its own, where the driver has not been looked for yet.
pub(crate) fn in_a_child(test: &str, variables: &[(&str, &str)]) -> bool {
    if std::env::var_os("DGLS_IT_CHILD").is_some() {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.args([test, "--exact", "--nocapture"]).env("DGLS_IT_CHILD", "1");
    command.env_remove("DGLS_ALLOW_FAKE").envs(variables.iter().copied());
    let output = command.output().expect("the test binary runs");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    false
}

#[test]
fn a_fake_is_refused_without_permission() {
    if in_a_child("cuda_fake::a_fake_is_refused_without_permission", &[]) {
        let _library = load();
        let error = driver_version().expect_err("a fake");
        assert!(error.to_string().contains("is a fake for tests"), "{error}");
        let again = driver_version().expect_err("the answer is kept");
        assert_eq!(error, again);
    }
}

#[test]
fn a_driver_without_devices_is_an_error() {
    let variables = [("DGLS_ALLOW_FAKE", "1"), ("FAKECUDA_DEVICES", "0")];
    if in_a_child("cuda_fake::a_driver_without_devices_is_an_error", &variables) {
        let _library = load();
        let error = driver_version().expect_err("no device");
        assert!(error.to_string().contains("cuInit failed with 100"), "{error}");
    }
}

#[test]
fn the_toolkits_stub_is_named() {
    let variables = [("DGLS_ALLOW_FAKE", "1"), ("FAKECUDA_INIT", "34")];
    if in_a_child("cuda_fake::the_toolkits_stub_is_named", &variables) {
        let _library = load();
        let error = driver_version().expect_err("a stub");
        assert!(error.to_string().contains("toolkit's stub"), "{error}");
    }
}
