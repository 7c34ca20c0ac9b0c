//! Goal: whatever fails, and however often, a block gets its own bytes or the caller gets an error
//! that says what failed; afterwards the engine works, or says for good why it does not; nothing
//! hangs, aborts or is leaked.
//! Method: random models with thousands of faults of all kinds by seed, on the host device and on
//! the fake driver, with every byte verified by the engine and compared here. In a process of its
//! own, whose threads and files are counted. `DGLS_SOAK_SECONDS` and `DGLS_SOAK_FAULTS` run for so
//! long and until so many faults instead, from `DGLS_SEED` on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use dgls_core::driver::cuda::{CudaDevice, CudaOptions};
use dgls_core::driver::host::shim::{Pages, WeightFile};
use dgls_core::driver::host::{HostDevice, HostOptions};
use dgls_core::driver::mutant::{Dropped, Mutant};
use dgls_core::driver::{ComputeStream, Device};
use dgls_core::engine::{Adapt, Encode, Engine, Options, Spec};
use dgls_core::{Error, Result};

use crate::cuda_fake::in_a_child;
use crate::encoded_cuda::Buffer;
use crate::fake::Session;
use crate::flaky::{Fault, Flaky, faults, fenced};
use crate::random::Random;
use crate::stack::{Stack, index};
use crate::watchdog::for_seeds;
use crate::weights::{Scratch, Weights, bytes_at, element_of};

const COMPUTE: ComputeStream = ComputeStream(0);
/// Models of one batch, and the faults that they have to meet at least.
const MODELS: u64 = 1000;
const FAULTS: u64 = 2000;

/// What a run, or all of them, came to.
#[derive(Debug, Default)]
struct Sums {
    models: u64,
    blocks: u64,
    verified_bytes: u64,
    told: u64,
    replans: u64,
    faults: BTreeMap<String, u64>,
}

impl Sums {
    fn count(&mut self, kind: &str, times: u64) {
        if times > 0 {
            *self.faults.entry(kind.to_owned()).or_default() += times;
        }
    }

    fn add(&mut self, other: &Self) {
        self.models += other.models;
        self.blocks += other.blocks;
        self.verified_bytes += other.verified_bytes;
        self.told += other.told;
        self.replans += other.replans;
        for (kind, &times) in &other.faults {
            self.count(kind, times);
        }
    }

    fn injected(&self) -> u64 {
        self.faults.values().sum()
    }
}

/// One model, its device and what is done to it.
struct World<'a> {
    random: Random,
    weights: &'a Weights,
    file: Option<Scratch>,
    flaky: Arc<Flaky>,
    engine: Engine,
    arena: Pages,
    _buffer: Option<Buffer>,
    budget: u64,
    sums: Sums,
    /// What the engine has to answer from now on.
    is_over: bool,
}

/// The device, with a byte of some copies changed, and with calls that fail.
fn device(
    random: &mut Random,
    on_cuda: bool,
    file: Option<&Scratch>,
    buffer: Option<&Buffer>,
) -> Result<Arc<Flaky>> {
    let files = file.map(|file| WeightFile::open(file.text()).expect("just written"));
    let files = files.into_iter().collect();
    let inner: Arc<dyn Device> = if on_cuda {
        let (timing, decode_buffer) = (random.chance(50), buffer.map(Buffer::place));
        Arc::new(CudaDevice::new(CudaOptions { ordinal: 0, files, timing, decode_buffer })?)
    } else {
        Arc::new(HostDevice::new(HostOptions { files, copy_bytes_per_s: 0 })?)
    };
    let every = if random.chance(25) { random.between(9, 60) } else { 0 };
    let mutant = Mutant::new(inner, Dropped::default()).corrupting(every);
    Ok(Arc::new(Flaky::with(Arc::new(mutant), faults(random))))
}

impl<'a> World<'a> {
    /// `None` if the engine could not be made, because of a fault.
    fn new(seed: u64, weights: &'a Weights, on_cuda: bool, sums: &mut Sums) -> Option<Self> {
        let mut random = Random::new(seed);
        let budget = weights.stack.random_budget(&mut random);
        let file = random.chance(40).then(|| Scratch::new(&weights.contents()));
        // Weights that were trained, and every second fake driver, are for decoding.
        let buffer = (seed % 8 == 7).then(|| Buffer::new(0));
        let flaky = device(&mut random, on_cuda, file.as_ref(), buffer.as_ref());
        let flaky = flaky.expect("no fault yet");
        let spec = Spec {
            profile: weights.stack.profile.clone(),
            sources: if file.is_some() { weights.in_file() } else { weights.in_memory() },
            budget_bytes: budget,
            pinned_bytes: random.pick(&[0, 1 << 17, 1 << 30]),
            staging_bytes: random.between(1, 4) << 16,
            ram_bytes: random.pick(&[0, 1 << 17, 1 << 30]),
            encode: Encode::Eighths(if seed % 5 == 3 { 3 } else { 8 }),
            encodable: vec![element_of(seed); weights.stack.profile.tensors.len()],
            encoded_bytes: 1 << 30,
            trace_uses: 16,
            options: Options {
                poison: random.chance(50),
                timing: random.chance(50),
                adapt: random.pick(&[Adapt::Off, Adapt::AtOnce, Adapt::Beside]),
                verify: true,
                early: 0,
            },
            ..Spec::default()
        };
        let arena = Pages::new(budget).expect("host memory");
        let device = Arc::clone(&flaky) as _;
        let made = fenced(|| Engine::new(device, spec, arena.address(), budget));
        let engine = match made {
            Some(Ok(engine)) => engine,
            failed => {
                sums.told += u64::from(failed.is_some());
                note(&flaky, sums);
                assert!(flaky.fired() > 0, "seed {seed}: no engine without a fault");
                return None;
            }
        };
        let sums = Sums { models: 1, ..Sums::default() };
        let is_over = false;
        Some(Self {
            random,
            weights,
            file,
            flaky,
            engine,
            arena,
            _buffer: buffer,
            budget,
            sums,
            is_over,
        })
    }

    /// One use; whatever it answers, the bytes are right or it says why not.
    fn use_block(&mut self, block: u32) {
        let answer = fenced(|| self.engine.enter(block, COMPUTE));
        let Some(position) = self.judge(answer) else { return };
        let layout = self.engine.layout();
        assert_eq!(layout[index(position)].0, block);
        for (tensor, offset) in self.weights.places(&layout, position) {
            let bytes = self.weights.stack.bytes(tensor);
            let found = bytes_at(self.arena.address() + offset, bytes);
            assert!(found == self.weights.tensor(tensor), "tensor {tensor} of block {block}");
        }
        self.sums.blocks += 1;
        let answer = fenced(|| self.engine.exit(COMPUTE));
        self.judge(answer);
    }

    /// The value, or `None` after an error that may be.
    fn judge<T>(&mut self, answer: Option<Result<T>>) -> Option<T> {
        match answer {
            Some(Ok(value)) => {
                assert!(!self.is_over, "a poisoned engine went on");
                Some(value)
            }
            Some(Err(error)) => {
                self.sums.told += 1;
                match &error {
                    Error::Poisoned(reason) => {
                        assert!(reason.len() > 5, "{reason}");
                        self.is_over = true;
                    }
                    Error::Driver { .. }
                    | Error::Read { .. }
                    | Error::PageLock { .. }
                    | Error::Corrupt { .. }
                    | Error::Internal(_) => assert!(!self.is_over, "{error} after the end"),
                    other => panic!("not an answer to a fault: {other}"),
                }
                None
            }
            None => {
                // A call that panicked is the last one.
                assert!(!self.is_over, "a panic after the end");
                let next = fenced(|| self.engine.prefetch(COMPUTE)).expect("no more panics");
                assert!(matches!(next, Err(Error::Poisoned(_))), "{next:?} after a panic");
                self.is_over = true;
                None
            }
        }
    }

    fn rebuild(&mut self) {
        let budget = self.weights.stack.random_budget(&mut self.random);
        let arena = Pages::new(budget).expect("host memory");
        let answer = fenced(|| self.engine.rebuild(budget, arena.address(), budget, COMPUTE));
        if self.judge(answer).is_some() {
            (self.arena, self.budget) = (arena, budget);
            self.sums.replans += 1;
        } else if self.is_over {
            // What a call that panicked left running may still write to either.
            std::mem::forget(arena);
        }
    }

    /// The file is shorter, or another one, for some uses; then it is as it was.
    fn meddle(&mut self) {
        let Some(file) = &self.file else { return };
        let path = file.path().to_owned();
        let contents = self.weights.contents();
        let stamp = std::fs::metadata(&path).and_then(|facts| facts.modified()).expect("there");
        if self.random.chance(50) {
            std::fs::write(&path, &contents[..contents.len() / 2]).expect("writable");
            self.sums.count("file truncated", 1);
        } else {
            std::fs::write(&path, vec![0; contents.len()]).expect("writable");
            self.sums.count("file rewritten", 1);
        }
        set_modified(&path, SystemTime::UNIX_EPOCH + Duration::from_secs(self.random.next() >> 40));
        let answer = fenced(|| self.engine.check_files());
        if let Some(Err(Error::Read { reason, .. })) = &answer {
            assert!(reason.contains("changed while in use"), "{reason}");
        }
        for _ in 0..self.random.between(1, 4) {
            self.any_use();
        }
        std::fs::write(&path, &contents).expect("writable");
        set_modified(&path, stamp);
    }

    fn any_use(&mut self) {
        let block = self.random.index(index(self.weights.stack.blocks()));
        self.use_block(u32::try_from(block).expect("12"));
    }

    fn pass(&mut self) {
        if fenced(|| self.engine.begin_pass()).is_none() {
            self.is_over = true;
        }
        for block in self.weights.stack.profile.order.clone() {
            if !self.is_over {
                self.use_block(block);
            }
        }
        if fenced(|| self.engine.end_pass()).is_none() {
            self.is_over = true;
        }
    }

    fn run(mut self) -> Sums {
        for _ in 0..self.random.between(2, 6) {
            match self.random.between(0, 9) {
                0 | 1 => self.rebuild(),
                2 => self.meddle(),
                3 | 4 => self.any_use(),
                _ => self.pass(),
            }
            if self.is_over {
                self.any_use(); // once more: it says so again
                break;
            }
        }
        let stats = self.engine.stats();
        self.sums.verified_bytes += stats.counters.verified_bytes;
        self.sums.count("byte changed on its way", stats.counters.mismatches);
        let fired = self.flaky.fired() + stats.counters.mismatches;
        let meddled = self.sums.faults.keys().any(|kind| kind.starts_with("file"));
        assert!(fired > 0 || meddled || self.sums.told == 0, "an error without a fault");
        drop(fenced(|| self.engine.close()));
        let refused = fenced(|| self.engine.enter(0, COMPUTE)).expect("it is closed");
        assert!(refused.is_err());
        note(&self.flaky, &mut self.sums);
        self.sums
    }
}

fn set_modified(path: &std::path::Path, time: SystemTime) {
    let file = std::fs::File::options().write(true).open(path).expect("there");
    file.set_modified(time).expect("ours");
}

fn note(flaky: &Flaky, sums: &mut Sums) {
    for kind in flaky.kinds() {
        let name = match kind {
            Fault::Refused => "call refused",
            Fault::OutOfMemory => "out of device memory",
            Fault::Lost => "device lost",
            Fault::Panics => "panic",
            Fault::Kills => "thread killed",
        };
        sums.count(name, 1);
    }
}

fn one(seed: u64) -> Sums {
    let mut random = Random::new(seed ^ 0xC4A05);
    let weights = Weights::new(Stack::random(&mut random), seed);
    if let Some(element) = element_of(seed) {
        let tensors = 0..weights.stack.profile.tensors.len();
        tensors.for_each(|tensor| weights.train_as(element, tensor, seed));
    }
    let mut sums = Sums::default();
    // Every fourth on the fake driver, of which there is one.
    let session = (seed % 4 == 3).then(Session::new);
    let world = World::new(seed, &weights, session.is_some(), &mut sums);
    if let Some(world) = world {
        sums.add(&world.run());
    }
    if let Some(session) = session {
        session.finish();
    }
    sums
}

/// Our threads and open files in this process.
fn held() -> (usize, usize) {
    let names =
        |path: &str| std::fs::read_dir(path).expect("Linux").filter_map(std::result::Result::ok);
    let ours = |task: &std::fs::DirEntry| {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        name.starts_with("dgls")
    };
    (names("/proc/self/task").filter(ours).count(), names("/proc/self/fd").count())
}

fn seconds(key: &str) -> Option<u64> {
    std::env::var(key).ok().map(|text| text.parse().expect("a whole number"))
}

#[test]
#[cfg(target_os = "linux")]
fn whatever_fails_the_bytes_are_right_or_it_is_told() {
    if !in_a_child("chaos::whatever_fails_the_bytes_are_right_or_it_is_told", &[]) {
        return;
    }
    std::panic::set_hook(Box::new(|info| {
        // Those that were injected are expected by the thousand.
        if info.location().is_none_or(|place| !place.file().ends_with("flaky.rs")) {
            eprintln!("{info}");
        }
    }));
    drop(Session::new()); // the driver stays loaded
    let before = held();
    let (begun, least) = (Instant::now(), seconds("DGLS_SOAK_FAULTS").unwrap_or(FAULTS));
    let limit = Duration::from_secs(seconds("DGLS_SOAK_SECONDS").unwrap_or(0));
    let first = seconds("DGLS_SEED").unwrap_or(0);
    let mut sums = Sums::default();
    let mut next = first;
    loop {
        let from = next;
        for found in for_seeds(MODELS, move |seed| one(from + seed)) {
            sums.add(&found);
        }
        next += MODELS;
        if begun.elapsed() > limit && sums.injected() >= least {
            break;
        }
    }
    let after = held();
    println!(
        "chaos: seeds {first}..{next}, {} models, {} blocks and {} MiB verified, {} replans; {} \
         faults, {} errors told: {:?}; wrong blocks 0, threads left {}, files left {}, objects of \
         the driver left 0",
        sums.models,
        sums.blocks,
        sums.verified_bytes >> 20,
        sums.replans,
        sums.injected(),
        sums.told,
        sums.faults,
        after.0 - before.0,
        after.1 - before.1,
    );
    assert_eq!(before, after, "threads and files");
    assert_eq!(sums.faults.len(), 8, "all kinds: {:?}", sums.faults);
}
