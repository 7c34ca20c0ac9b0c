//! The host side of an engine: which weights are page-locked, which have a copy in RAM, which come
//! from the file each time, and through which chunks.

use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::encoder::Encode;
use super::lane::Weight;
use crate::driver::host::shim::{SECTOR_BYTES, page_bytes};
use crate::driver::{Device, Source};
use crate::engine::Spec;
use crate::error::Result;
use crate::plan::{Plan, Tensor};
use crate::pool::{
    Cache, Codes, Pins, SharedChoice, Span, Staging, new_choice, spread, whole_pages,
};
use crate::units::{index, narrow};

/// Bytes of one staging chunk: enough for the full rate of a link, and so few that several threads
/// read at a time. At least two chunks fit the budget, so that one is read while the other is
/// copied.
const CHUNK_BYTES: u64 = 4 << 20;
const SMALL_CHUNK_BYTES: u64 = 64 << 10;
const CHUNKS: u64 = 8;
const MOST_CHUNKS: u64 = 64;

/// Page-locks, copies in RAM, and what the reading threads have learned.
#[derive(Debug)]
pub(in crate::engine) struct Host {
    pub(super) device: Arc<dyn Device>,
    // Dropped before the copies, some of which it locks.
    pub(super) pins: Pins,
    pub(in crate::engine) cache: Arc<RwLock<Cache>>,
    // As the copies.
    pub(in crate::engine) codes: Arc<RwLock<Codes>>,
    /// Bytes that encoded weights may take while this plan is in force.
    pub(super) code_room: u64,
    /// Tensors that encoding makes no smaller, or that there is no memory for.
    pub(super) hopeless: Arc<Mutex<Vec<u32>>>,
    /// The eighths that are to go encoded, and the hopeless tensors, when they were picked.
    pub(super) picked_for: Option<(u32, usize)>,
    pub(in crate::engine) choice: SharedChoice,
    /// Whether it was prepared for a plan before.
    is_prepared: bool,
    /// Copies that had arrived when the weights were looked at last.
    seen: u64,
    /// What is left of the budgets for page-locks and copies after some of it was given back.
    most: (u64, u64),
    pub(super) given_back: (u64, u64),
}

/// What is to be given back.
#[derive(Debug)]
pub(in crate::engine) struct Chosen {
    /// Tensors whose copies go.
    tensors: Vec<u32>,
    /// Page-locks that go.
    spans: Vec<Span>,
}

impl Chosen {
    pub(in crate::engine) fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.spans.is_empty()
    }
}

impl Host {
    /// Holds nothing yet.
    pub(in crate::engine) fn new(device: Arc<dyn Device>) -> Self {
        Self {
            pins: Pins::none(Arc::clone(&device)),
            device,
            cache: Arc::default(),
            codes: Arc::default(),
            code_room: 0,
            hopeless: Arc::default(),
            picked_for: None,
            choice: new_choice(),
            is_prepared: false,
            seen: 0,
            most: (u64::MAX, u64::MAX),
            given_back: (0, 0),
        }
    }

    /// Makes room for copies of what is streamed from files, and page-locks what is streamed, each
    /// within its budget. What is there already stays as far as it is still streamed. No thread
    /// reads host weights meanwhile.
    pub(in crate::engine) fn prepare(&mut self, spec: &Spec, plan: &Plan) {
        let streamed = |number: &usize| !plan.resident[*number];
        self.picked_for = None;
        if self.is_prepared {
            self.keep_codes(plan);
        } else {
            *self.codes.write() = Codes::new(spec.sources.len());
        }
        let all = 0..spec.sources.len();
        let sizes = self.copies(spec, all.clone().filter(streamed).collect());
        let mut cache = self.cache.write();
        let tensors: Vec<u32> = cache.tensors().filter(|&t| sizes[index(t)].is_none()).collect();
        let gone: Vec<Span> = tensors.iter().filter_map(|&tensor| cache.span(tensor)).collect();
        self.pins.release(&gone);
        let before = std::mem::take(&mut *cache);
        *cache = Cache::new(&sizes, before);
        let span = |number: usize| match (spec.sources[number], cache.span(narrow(number))) {
            (_, Some(span)) => Some(span),
            (Source::Memory { address }, None) => {
                Some(Span { address, bytes: spec.profile.tensors[number].bytes })
            }
            (Source::File { .. } | Source::Encoded { .. }, None) => None,
        };
        let takes =
            |span: &Span| self.device.takes(Source::Memory { address: span.address }, false);
        let spans: Vec<Span> =
            all.filter(streamed).filter_map(span).filter(|span| !takes(span)).collect();
        let filed = |number: &usize| {
            let in_file = matches!(spec.sources[*number], Source::File { .. });
            in_file && !plan.resident[*number] && !cache.has(narrow(*number))
        };
        let read = (0..spec.sources.len()).filter(filed);
        let read_bytes: u64 = read.map(|number| spec.profile.tensors[number].bytes).sum();
        drop(cache);
        // A little more, for what else is read meanwhile.
        if !self.is_prepared && read_bytes + read_bytes / 4 <= spec.page_cache_bytes {
            self.choice.lock().warm(read_bytes);
        }
        self.is_prepared = true;
        self.code_room = self.codes.read().bytes();
        let budget_bytes = self.lockable(spec);
        let pages: Vec<u64> = spans.iter().map(|&span| pages(span)).collect();
        let chosen = spread(&pages, budget_bytes);
        let (first, rest): (Vec<_>, Vec<_>) =
            std::iter::zip(spans, chosen).partition(|&(_, chosen)| chosen);
        // The rest for what may be refused, or shares its pages.
        let spans: Vec<Span> = first.into_iter().chain(rest).map(|(span, _)| span).collect();
        self.pins.lock(&spans, budget_bytes, page_bytes());
        // What is left is theirs, until the next plan may lock other weights in place.
        let left = all_locks(spec).saturating_sub(self.pins.page_bytes(page_bytes()));
        self.code_room = if spec.encode == Encode::Off { 0 } else { spec.encoded_bytes.min(left) };
    }

    /// How many bytes may be page-locked in place.
    pub(super) fn lockable(&self, spec: &Spec) -> u64 {
        let beside = all_locks(spec).saturating_sub(self.code_room);
        spec.pinned_bytes.min(self.most.0).min(beside)
    }

    /// For each tensor the size of its copy in RAM, if it is to have one.
    fn copies(&self, spec: &Spec, streamed: Vec<usize>) -> Vec<Option<u64>> {
        let mut sizes = vec![None; spec.sources.len()];
        let mut left = spec.ram_bytes.min(self.most.1);
        let filed = |number: &usize| matches!(spec.sources[*number], Source::File { .. });
        let cache = self.cache.read();
        let bytes_of = |number: usize| spec.profile.tensors[number].bytes;
        let (kept, new): (Vec<usize>, Vec<usize>) =
            streamed.into_iter().filter(filed).partition(|&n| cache.has(narrow(n)));
        for number in kept {
            if let Some(after) = left.checked_sub(whole_pages(bytes_of(number))) {
                (sizes[number], left) = (Some(bytes_of(number)), after);
            }
        }
        let pages: Vec<u64> = new.iter().map(|&number| whole_pages(bytes_of(number))).collect();
        for (number, _) in std::iter::zip(new, spread(&pages, left)).filter(|&(_, taken)| taken) {
            sizes[number] = Some(bytes_of(number));
        }
        sizes
    }

    /// Where each weight lies, and whether the device takes it from there.
    pub(in crate::engine) fn weights(&self, spec: &Spec) -> Vec<Weight> {
        let cache = self.cache.read();
        let weight = |(number, (&source, tensor)): (usize, (&Source, &Tensor))| {
            let source = cache.source(narrow(number)).unwrap_or(source);
            let locked = match source {
                Source::Memory { address } => {
                    self.pins.covers(Span { address, bytes: tensor.bytes })
                }
                Source::File { .. } | Source::Encoded { .. } => false,
            };
            Weight { source, direct: self.device.takes(source, locked) }
        };
        let tensors = std::iter::zip(&spec.sources, &spec.profile.tensors);
        tensors.enumerate().map(weight).collect()
    }

    /// Whether copies have arrived since this was asked last.
    pub(in crate::engine) fn take_news(&mut self) -> bool {
        let filled = self.cache.read().filled();
        std::mem::replace(&mut self.seen, filled) != filled
    }

    /// Gives everything back; no thread of ours reads it any more. Blocks until no copy does, also
    /// where the engine could not end them.
    pub(in crate::engine) fn clear(&mut self) {
        self.device.finish_reads();
        self.pins = Pins::none(Arc::clone(&self.device));
        *self.cache.write() = Cache::default();
        *self.codes.write() = Codes::default();
    }

    /// Gives all page-locks up, because staging needs the room.
    pub(in crate::engine) fn give_up(&mut self) -> bool {
        let held = self.pins.bytes() > 0;
        if held {
            self.pins.give_up();
        }
        held
    }

    /// Which copies and page-locks to give back to bring the system `bytes` bytes: copies first,
    /// since locks alone only let it swap.
    pub(in crate::engine) fn to_give_back(&self, bytes: u64) -> Chosen {
        let (mut tensors, mut found) = (Vec::new(), 0);
        let cache = self.cache.read();
        for tensor in cache.tensors().rev() {
            if found >= bytes {
                break;
            }
            let Some(span) = cache.span(tensor) else { continue };
            found += whole_pages(span.bytes);
            tensors.push(tensor);
        }
        let copies: Vec<Span> = cache.tensors().filter_map(|tensor| cache.span(tensor)).collect();
        let mut spans = Vec::new();
        for &span in self.pins.spans().iter().rev() {
            if found >= bytes {
                break;
            }
            if !copies.iter().any(|copy| copy.address == span.address) {
                found += pages(span);
                spans.push(span);
            }
        }
        Chosen { tensors, spans }
    }

    /// The weights when these are gone, before they are.
    pub(in crate::engine) fn weights_without(
        &self,
        spec: &Spec,
        Chosen { tensors, spans }: &Chosen,
    ) -> Vec<Weight> {
        let mut weights = self.weights(spec);
        for (number, weight) in weights.iter_mut().enumerate() {
            let bytes = spec.profile.tensors[number].bytes;
            if tensors.contains(&narrow(number)) {
                weight.source = spec.sources[number];
                weight.direct = self.device.takes(weight.source, false);
            } else if let Source::Memory { address } = weight.source {
                let meets = |span: &Span| {
                    span.address < address + bytes && address < span.address + span.bytes
                };
                if spans.iter().any(meets) {
                    weight.direct = self.device.takes(weight.source, false);
                }
            }
        }
        weights
    }

    /// Gives these back; nothing reads them any more. They are not taken again.
    pub(in crate::engine) fn give_back(&mut self, Chosen { tensors, spans }: &Chosen) {
        let mut cache = self.cache.write();
        let copies: Vec<Span> = tensors.iter().filter_map(|&tensor| cache.span(tensor)).collect();
        self.pins.release(&copies);
        let mut bytes: u64 = tensors.iter().map(|&tensor| cache.drop_slot(tensor)).sum();
        bytes += self.pins.release(spans);
        self.most = (self.pins.page_bytes(page_bytes()), cache.bytes());
        self.given_back = (self.given_back.0 + 1, self.given_back.1 + bytes);
    }

    /// How many chunks there may be, and of how many bytes: no more than can be read ahead of the
    /// ring, and of the residents a part.
    pub(in crate::engine) fn chunks(spec: &Spec, plan: &Plan) -> (u32, u64) {
        let least = SECTOR_BYTES.max(page_bytes());
        let whole = |bytes: u64| (bytes / least * least).max(least);
        let ahead = plan.ring_bytes.max(plan.arena_bytes / 4);
        let most = spec.staging_bytes.min(ahead.next_multiple_of(least));
        let bytes = whole(most / CHUNKS).clamp(SMALL_CHUNK_BYTES, CHUNK_BYTES);
        let bytes = bytes.min(whole(most / 2));
        (narrow(index((most / bytes).clamp(1, MOST_CHUNKS))), bytes)
    }

    /// The chunks that there are, or new ones; none when the device takes every weight as it is.
    pub(in crate::engine) fn staging_for(
        &self,
        spec: &Spec,
        plan: &Plan,
        weights: &[Weight],
        existing: Option<Staging>,
    ) -> Result<Option<Staging>> {
        if weights.iter().all(|weight| weight.direct) {
            return Ok(None);
        }
        let (count, bytes) = Self::chunks(spec, plan);
        let fits = |staging: &Staging| {
            staging.chunks().len() == index(count) && staging.chunk_bytes() == bytes
        };
        if existing.as_ref().is_some_and(fits) {
            return Ok(existing);
        }
        drop(existing);
        Staging::new(Arc::clone(&self.device), count, bytes).map(Some)
    }

    /// Page-locked bytes, and page-locks that were refused.
    pub(in crate::engine) fn pinned(&self) -> (u64, u64) {
        (self.pins.bytes(), self.pins.failed())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.clear();
    }
}

/// How many bytes may be page-locked in all.
fn all_locks(spec: &Spec) -> u64 {
    if spec.locked_bytes == 0 { u64::MAX } else { spec.locked_bytes }
}

/// Bytes of the pages that a span touches.
fn pages(span: Span) -> u64 {
    let page = page_bytes();
    (span.address + span.bytes).next_multiple_of(page) - span.address / page * page
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::driver::host::shim::{self, Pages};
    use crate::driver::host::{HostDevice, HostOptions};
    use crate::plan::{Profile, plan};

    /// Four blocks of 1 MiB, the first in memory and the others in a file.
    pub(in super::super) fn spec() -> Spec {
        let tensors = (0..4).map(|block| Tensor { block, bytes: 1 << 20 }).collect();
        let memory = Source::Memory { address: 1 << 30 };
        let file = |offset| Source::File { file: 0, offset };
        Spec {
            profile: Profile { tensors, order: (0..4).collect(), ..Profile::default() },
            sources: vec![memory, file(0), file(1 << 20), file(2 << 20)],
            budget_bytes: 2 << 20,
            ram_bytes: 1 << 20,
            ..Spec::default()
        }
    }

    #[test]
    fn chunks_never_take_more_than_their_budget_or_than_the_ring() {
        let mut spec = spec();
        let plan = plan(&spec.profile, spec.budget_bytes).expect("feasible");
        for staging_bytes in [4096, 5000, 1 << 16, 100_000, 1 << 20, 64 << 20, 1 << 40] {
            spec.staging_bytes = staging_bytes;
            let (count, bytes) = Host::chunks(&spec, &plan);
            assert!(u64::from(count) * bytes <= staging_bytes.min(plan.ring_bytes));
            assert!(count > 1 || staging_bytes < 8192, "one is read while the other is copied");
            assert_eq!(bytes % SECTOR_BYTES, 0);
        }
    }

    #[test]
    fn copies_in_ram_go_when_nothing_reads_them_any_more() {
        let options = HostOptions { copy_bytes_per_s: 64 << 20, ..HostOptions::default() };
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(options).expect("a thread"));
        let spec = spec();
        let plan = plan(&spec.profile, spec.budget_bytes).expect("feasible");
        let mut host = Host::new(Arc::clone(&device));
        host.prepare(&spec, &plan);
        let tensor = host.cache.read().tensors().next().expect("one fits");
        let span = host.cache.read().span(tensor).expect("it has room");
        shim::fill(span.address, 7, span.bytes);
        let (arena, eighth) = (Pages::new(span.bytes).expect("host memory"), span.bytes / 8);
        for at in (0..8).map(|part| part * eighth) {
            let source = Source::Memory { address: span.address + at };
            device.copy(source, arena.address() + at, eighth).expect("no faults");
        }
        device.flush();
        drop(host);
        let mut last = [0_u8];
        shim::copy(last.as_mut_ptr() as u64, arena.address() + span.bytes - 1, 1);
        assert_eq!(last, [7], "the last copy had not begun");
    }
}
