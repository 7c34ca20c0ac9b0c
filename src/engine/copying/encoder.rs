//! Encodes what a plan streams, beside the model that runs: it takes less time on the link then.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::early::rest;
use super::feed::Host;
use super::picks::EIGHTHS;
use crate::codec::{self, Element};
use crate::driver::{Device, Source};
use crate::engine::Spec;
use crate::plan::Plan;
use crate::pool::{Code, Codes, each_in_threads, whole_pages};
use crate::units::{index, narrow};

/// A segment is kept if it is at least this much smaller, in percent: less is not worth a kernel.
const LEAST_SAVED_PERCENT: u64 = 9;
const MOST_THREADS: usize = 8;
/// Smaller pieces of a larger tensor go as they are.
const LEAST_PIECE_BYTES: u64 = 64 << 10;

/// When weights are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encode {
    /// Never.
    #[default]
    Off,
    /// Once passes were timed, as many as it takes for the compute and not the link to decide how
    /// long they take; where it decides anyway, none.
    WhereCopiesDecide,
    /// From the first pass on, so many eighths of what is streamed.
    Eighths(u32),
}

impl Encode {
    /// All of what is streamed, from the first pass on.
    pub const ALWAYS: Self = Self::Eighths(EIGHTHS);
}

/// A tensor to encode.
#[derive(Debug, Clone)]
pub(in crate::engine) struct Task {
    tensor: u32,
    element: Element,
    source: Source,
    bytes: u64,
    /// Where copies of the plan begin within it, ascending.
    cuts: Vec<u64>,
    /// How often its weights had changed when it was given.
    changes: u64,
}

/// Encodes in threads of its own.
#[derive(Debug, Default)]
pub(in crate::engine) struct Encoder {
    thread: Option<JoinHandle<()>>,
    is_wanted: Arc<AtomicBool>,
}

/// What the threads work with.
#[derive(Debug)]
struct Work {
    device: Arc<dyn Device>,
    codes: Arc<RwLock<Codes>>,
    /// Tensors that do not become smaller, or that the system has no memory for.
    hopeless: Arc<Mutex<Vec<u32>>>,
    most_bytes: u64,
    is_wanted: Arc<AtomicBool>,
    /// Memory to encode in, to be used again: new pages take the system a while.
    raw: Mutex<Vec<Vec<u8>>>,
    encoded: Mutex<Vec<Vec<u8>>>,
}

/// A run of a tensor's bytes, where it begins there, and its segment.
type Encoded = (u64, u64, Vec<u8>);

impl Host {
    /// What of `plan` is to go encoded and is not yet, and can be.
    pub(in crate::engine) fn to_encode(&self, spec: &Spec, plan: &Plan) -> Vec<Task> {
        let (cache, codes) = (self.cache.read(), self.codes.read());
        let hopeless = self.hopeless.lock();
        let room = self.code_room.saturating_sub(codes.bytes());
        let task = |(number, &source): (usize, &Source)| {
            let (tensor, bytes) = (narrow(number), spec.profile.tensors[number].bytes);
            let element = spec.element_of(tensor)?;
            let can_be = !plan.resident[number]
                && codes.is_picked(tensor)
                && codes.get(tensor).is_none()
                && whole_pages(bytes) <= room
                && !hopeless.contains(&tensor);
            let source = cache.source(tensor).unwrap_or(source);
            let changes = codes.changes(tensor);
            can_be.then(|| Task { tensor, element, source, bytes, cuts: Vec::new(), changes })
        };
        let mut tasks: Vec<Task> = spec.sources.iter().enumerate().filter_map(task).collect();
        if !tasks.is_empty() {
            let mut cuts = cuts(plan);
            for task in &mut tasks {
                task.cuts = cuts.remove(&task.tensor).unwrap_or_default();
            }
        }
        tasks
    }
}

/// Where copies of a plan begin within tensors.
fn cuts(plan: &Plan) -> BTreeMap<u32, Vec<u64>> {
    let mut cuts: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for copy in &plan.program.copies {
        cuts.entry(copy.tensor).or_default().push(copy.source_offset);
    }
    for places in cuts.values_mut() {
        places.sort_unstable();
        places.dedup();
    }
    cuts
}

/// The runs of whole tiles to encode of `bytes` bytes, each with its first byte: no copy that
/// begins at one of the `cuts` needs a part of one. Small ones are left out.
fn pieces(element: Element, bytes: u64, cuts: &[u64]) -> Vec<(u64, u64)> {
    let (tile, most) = (element.tile_bytes() as u64, codec::SEGMENT_BYTES as u64);
    let mut pieces = Vec::new();
    let least = LEAST_PIECE_BYTES.min(bytes / tile * tile).max(tile);
    let ends = cuts.iter().copied().filter(|&cut| cut > 0 && cut < bytes).chain([bytes]);
    let mut start: u64 = 0;
    for end in ends {
        let mut at = start.next_multiple_of(tile);
        while at + least <= end {
            let piece = ((end - at) / tile * tile).min(most);
            pieces.push((at, piece));
            at += piece;
        }
        start = end;
    }
    pieces
}

impl Encoder {
    /// Encodes `tasks`, within what the host may hold. Does nothing while it still does.
    pub(in crate::engine) fn start(&mut self, host: &Host, tasks: Vec<Task>) {
        if !self.is_idle() || tasks.is_empty() {
            return;
        }
        self.stop();
        self.is_wanted = Arc::new(AtomicBool::new(true));
        let work = host.work(Arc::clone(&self.is_wanted));
        // Where the system refuses a thread, weights go as they are.
        let thread = std::thread::Builder::new().name("dgls-encode".into());
        self.thread = thread.spawn(move || work.run(tasks, rest)).ok();
    }

    /// Encodes `tasks` in the calling thread: for tests, where time is not to matter.
    pub(in crate::engine) fn run_here(host: &Host, tasks: Vec<Task>) {
        host.work(Arc::new(AtomicBool::new(true))).run(tasks, |_, _| ());
    }

    /// Whether nothing is being encoded.
    pub(in crate::engine) fn is_idle(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Blocks until nothing is being encoded; ends within a segment.
    pub(in crate::engine) fn stop(&mut self) {
        self.is_wanted.store(false, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It cannot have panicked outside of its fence.
            let _ = thread.join();
        }
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Host {
    /// Whether encoded forms of weights before a change are held still.
    pub(in crate::engine) fn has_retired(&self) -> bool {
        self.codes.read().has_retired()
    }

    /// Gives back what was encoded before weights changed; nothing reads it any more.
    pub(in crate::engine) fn give_retired_back(&self) {
        self.codes.write().keep(|_, _| true);
    }

    /// Gives back all that is of no use to a plan; nothing reads any of it any more.
    pub(super) fn keep_codes(&self, plan: &Plan) {
        let cuts = cuts(plan);
        self.codes.write().keep(|number, code| {
            let cuts = cuts.get(&narrow(number)).map_or(&[][..], Vec::as_slice);
            !plan.resident[number] && !code.is_cut_at(cuts)
        });
    }

    /// The weights of a tensor have changed: it may be encoded anew.
    pub(in crate::engine) fn changed(&self, tensor: u32) {
        self.codes.write().changed(tensor);
        self.hopeless.lock().retain(|&other| other != tensor);
    }

    /// Gives back what is encoded, of which nothing reads any more. Returns how many bytes.
    pub(in crate::engine) fn give_codes_back(&mut self) -> u64 {
        let bytes = self.codes.write().keep(|_, _| false);
        self.code_room = 0;
        if bytes > 0 {
            self.given_back = (self.given_back.0 + 1, self.given_back.1 + bytes);
        }
        bytes
    }

    fn work(&self, is_wanted: Arc<AtomicBool>) -> Work {
        Work {
            device: Arc::clone(&self.device),
            codes: Arc::clone(&self.codes),
            hopeless: Arc::clone(&self.hopeless),
            most_bytes: self.code_room,
            is_wanted,
            raw: Mutex::default(),
            encoded: Mutex::default(),
        }
    }
}

impl Work {
    fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Relaxed)
    }

    fn run(&self, tasks: Vec<Task>, rest: impl Fn((Instant, Duration), &AtomicBool)) {
        // A panic leaves nothing behind: those weights go as they are.
        let _ = catch_unwind(AssertUnwindSafe(|| {
            let left = |work: &Self| work.most_bytes.saturating_sub(work.codes.read().bytes());
            // When the last one was page-locked, and what that took.
            let mut last = (Instant::now(), Duration::ZERO);
            for task in tasks {
                // It becomes smaller, or is not kept.
                if !self.is_wanted() || left(self) < whole_pages(task.bytes) {
                    continue;
                }
                let segments = self.encode(&task);
                if !self.is_wanted() {
                    return;
                }
                let code = segments.map(|segments| {
                    rest(last, &self.is_wanted);
                    let made = Code::new(&self.device, task.element, &segments, threads());
                    self.encoded.lock().extend(segments.into_iter().map(|(.., encoded)| encoded));
                    made
                });
                match code {
                    Some(Ok((code, took))) => {
                        last = (Instant::now(), took);
                        let refused = self.codes.write().put(task.tensor, code, task.changes);
                        drop(refused); // unlocks, for which nobody is to wait
                    }
                    Some(Err(_)) | None => self.hopeless.lock().push(task.tensor),
                }
            }
        }));
    }

    /// The segments of a tensor that become smaller, several at a time; `None` if there are none,
    /// or it cannot be read.
    fn encode(&self, task: &Task) -> Option<Vec<Encoded>> {
        let pieces = pieces(task.element, task.bytes, &task.cuts);
        let done = Mutex::new(Vec::with_capacity(pieces.len()));
        each_in_threads(pieces.len(), threads(), |number| {
            if self.is_wanted() {
                let (offset, bytes) = pieces[number];
                if let Some(encoded) = self.encode_one(task, offset, bytes) {
                    done.lock().push((offset, bytes, encoded));
                }
            }
        });
        let mut segments = done.into_inner();
        segments.sort_unstable_by_key(|&(offset, ..)| offset);
        (!segments.is_empty()).then_some(segments)
    }

    fn encode_one(&self, task: &Task, offset: u64, bytes: u64) -> Option<Vec<u8>> {
        let mut raw = self.raw.lock().pop().unwrap_or_default();
        raw.resize(index(bytes), 0);
        self.device.read(task.source.advanced(offset), raw.as_mut_ptr() as u64, bytes).ok()?;
        let raw = std::hint::black_box(raw);
        let mut encoded = self.encoded.lock().pop().unwrap_or_default();
        encoded.clear();
        encoded.reserve(codec::most_encoded_bytes(task.element, raw.len()));
        let most = bytes - bytes * LEAST_SAVED_PERCENT / 100;
        let is_encoded = codec::encode(task.element, &raw, &mut encoded);
        self.raw.lock().push(raw);
        if is_encoded && encoded.len() as u64 <= most {
            return Some(encoded);
        }
        self.encoded.lock().push(encoded);
        None
    }
}

/// A fourth of the processor: the model's own threads have work, too.
fn threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / 4).clamp(1, MOST_THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_tiles_and_end_where_a_copy_may() {
        let (tile, most) = (2048, codec::SEGMENT_BYTES as u64);
        let pieces = |bytes, cuts: &[u64]| super::pieces(Element::Bf16, bytes, cuts);
        assert_eq!(super::pieces(Element::Fp8, 3 * tile - 1, &[]), [(0, 3 * tile - 1024)]);
        assert_eq!(pieces(tile - 1, &[0]), []);
        assert_eq!(pieces(3 * tile + 1, &[]), [(0, 3 * tile)], "small, but all there is");
        assert_eq!(pieces(most + most / 2, &[0]), [(0, most), (most, most / 2)]);
        let cut = most / 2 + 3;
        let found = pieces(most, &[0, cut]);
        let second = most / 2 + tile;
        assert_eq!(found, [(0, most / 2), (second, most - second)], "a tile goes as it is");
        let near = most - LEAST_PIECE_BYTES / 2;
        assert_eq!(pieces(most, &[0, near]).len(), 1, "what is left is small");
    }
}
