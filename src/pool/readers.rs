//! The threads that fill staging chunks, several at a time.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::RwLock;

use super::cache::Cache;
use super::choice::{Choice, Way};
use super::pack::Fill;
use crate::driver::{Device, Source};
use crate::error::{Error, Result};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex};

/// More never read faster, and each takes a stack.
const MOST_THREADS: usize = 8;
/// Reads wait for a disk, not for a processor: more of them than cores may be worth it.
const FEW_THREADS: usize = 4;

/// They copy and read, and call the driver.
const STACK_BYTES: usize = 512 << 10;

/// Learned by all readers of an engine, and kept when they are replaced.
pub type SharedChoice = Arc<parking_lot::Mutex<Choice>>;

/// What a machine's readers begin with.
pub fn new_choice() -> SharedChoice {
    let most = crate::units::narrow(most_threads());
    Arc::new(parking_lot::Mutex::new(Choice::new(most)))
}

fn most_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    cores.clamp(FEW_THREADS, MOST_THREADS)
}

/// A chunk to be filled.
#[derive(Debug)]
pub struct Job {
    /// Its number.
    pub chunk: u32,
    /// Its first byte.
    pub address: u64,
    /// What goes into it.
    pub fill: Arc<Fill>,
}

impl Job {
    /// Whether its bytes, or the first of them, come from a file.
    fn is_from_file(&self) -> bool {
        self.fill.reads.first().is_some_and(|read| matches!(read.source, Source::File { .. }))
    }
}

/// Told the number of a chunk, and how filling it ended.
pub type Told = dyn Fn(u32, Result<()>) + Send + Sync;

struct State {
    jobs: VecDeque<Job>,
    /// Threads that have a job.
    active: u32,
    /// Of those, the ones that read just now, since when any does, and what they have read since.
    reading: u32,
    since: Instant,
    bytes: u64,
    stop: bool,
}

struct Shared {
    device: Arc<dyn Device>,
    cache: Arc<RwLock<Cache>>,
    choice: SharedChoice,
    told: Box<Told>,
    state: Mutex<State>,
    work: Condvar,
}

/// The threads; they end when this is dropped.
pub struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Readers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Readers").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Readers {
    /// Starts as many threads as may be chosen.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the system refuses even one.
    pub fn start(
        device: Arc<dyn Device>,
        cache: Arc<RwLock<Cache>>,
        choice: SharedChoice,
        told: Box<Told>,
    ) -> Result<Self> {
        let state = State {
            jobs: VecDeque::new(),
            active: 0,
            reading: 0,
            since: Instant::now(),
            bytes: 0,
            stop: false,
        };
        let work = Condvar::new();
        let shared =
            Arc::new(Shared { device, cache, choice, told, state: Mutex::new(state), work });
        let mut readers = Self { shared, threads: Vec::new() };
        let most = readers.shared.choice.lock().most_threads();
        for number in 0..most {
            let shared = Arc::clone(&readers.shared);
            let thread =
                thread::Builder::new().name(format!("dgls-read-{number}")).stack_size(STACK_BYTES);
            match thread.spawn(move || shared.run()) {
                Ok(thread) => readers.threads.push(thread),
                Err(error) if readers.threads.is_empty() => {
                    return Err(Error::Invalid(format!("no reading thread started: {error}")));
                }
                Err(_) => break,
            }
        }
        Ok(readers)
    }

    /// Has a chunk filled. First waits, in a thread, for the copies out of it that are marked.
    pub fn submit(&self, job: Job) {
        self.shared.state.lock().jobs.push_back(job);
        self.shared.work.notify_one();
    }

    /// Takes back a job that no thread has begun; no one is told of it then.
    pub fn withdraw(&self, chunk: u32) -> bool {
        let mut state = self.shared.state.lock();
        let at = state.jobs.iter().position(|job| job.chunk == chunk);
        at.is_some_and(|at| state.jobs.remove(at).is_some())
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // If it panicked, `Telling` has told whoever waited.
            let _ = thread.join();
        }
    }
}

/// Tells how filling a chunk ended, also where the thread ends with it.
struct Telling<'a> {
    shared: &'a Shared,
    chunk: u32,
    done: Result<()>,
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        self.shared.state.lock().active -= 1;
        let ended = Err(Error::Internal("this is told once".into()));
        (self.shared.told)(self.chunk, std::mem::replace(&mut self.done, ended));
        self.shared.work.notify_one();
    }
}

/// A thread that reads; counted until it has ended, however that is.
struct Reading<'a> {
    shared: &'a Shared,
    job: &'a Job,
}

impl<'a> Reading<'a> {
    fn begin(shared: &'a Shared, job: &'a Job) -> Self {
        let mut state = shared.state.lock();
        if state.reading == 0 {
            state.since = Instant::now();
        }
        state.reading += 1;
        Self { shared, job }
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.shared.end(self.job);
    }
}

impl Shared {
    fn run(&self) {
        while let Some(job) = self.next() {
            let ended = || Error::Internal("a reading thread has ended".into());
            let mut telling = Telling { shared: self, chunk: job.chunk, done: Err(ended()) };
            let fill = || self.fill(&job);
            telling.done = catch_unwind(AssertUnwindSafe(fill))
                .unwrap_or_else(|_| Err(Error::Internal("a reading thread panicked".into())));
        }
    }

    fn next(&self) -> Option<Job> {
        let most = |job: &Job| self.choice.lock().threads(job.is_from_file());
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return None;
            }
            if state.jobs.front().is_some_and(|job| state.active < most(job)) {
                state.active += 1;
                if state.jobs.len() > 1 {
                    self.work.notify_one();
                }
                return state.jobs.pop_front();
            }
            self.work.wait(&mut state);
        }
    }

    fn fill(&self, job: &Job) -> Result<()> {
        self.device.wait_chunk(job.chunk)?;
        let reading = Reading::begin(self, job);
        let mut reads = job.fill.reads.iter();
        reads.try_for_each(|read| self.read(read.source, job.address + read.at, read.bytes))?;
        drop(reading);
        let cache = self.cache.read();
        for (at, piece) in &job.fill.pieces {
            let ((tensor, start), bytes) = (piece.part_of, piece.copy.bytes);
            if matches!(piece.copy.source, Source::File { .. }) {
                cache.keep(tensor, start, job.address + at, bytes);
            }
        }
        Ok(())
    }

    fn end(&self, job: &Job) {
        let mut state = self.state.lock();
        state.reading -= 1;
        state.bytes += job.fill.bytes();
        // Also in the middle of a long stretch, so that the number of threads is judged there.
        let now = Instant::now();
        let seconds = now.duration_since(state.since).as_secs_f64();
        let done = std::mem::take(&mut state.bytes);
        state.since = now;
        drop(state);
        self.choice.lock().note_all(job.is_from_file(), done, seconds);
    }

    fn read(&self, source: Source, address: u64, bytes: u64) -> Result<()> {
        let way = match source {
            Source::Memory { .. } | Source::Encoded { .. } => Way::Memory,
            Source::File { .. } => self.choice.lock().next_way(),
        };
        let way = match way {
            Way::Direct if self.device.read_directly(source, address, bytes)? => Way::Direct,
            Way::Direct => Way::Cached,
            way => {
                self.device.read(source, address, bytes)?;
                way
            }
        };
        self.choice.lock().note(way, bytes);
        Ok(())
    }
}
