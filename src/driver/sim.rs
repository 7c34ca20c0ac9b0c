//! The simulated device: seeded, virtual time, fault switches. For tests.
//!
//! Streams are in order and know when each of their operations begins and ends, so a hazard is
//! found by order of waits, not by luck of timing: a copy over bytes that a block still reads, a
//! block that reads bytes which have not arrived, a chunk that is filled while it is copied from.

mod memory;

use std::collections::{BTreeMap, HashMap};

use parking_lot::Mutex;

use self::memory::{Locks, Memory, Read};
use super::{ComputeStream, Device, EventSlot, H2d, Source, UseTimes};
use crate::error::{Error, Result};
use crate::units::index;

/// How many times as fast as over the link bytes move within the device.
const WITHIN: u64 = 20;

/// How the simulated device behaves.
#[derive(Debug, Clone, Default)]
pub struct SimOptions {
    /// Seeds the delays of the host, the copies and the kernels.
    pub seed: u64,
    /// First byte and size of the first arena; a copy outside of all arenas is a violation.
    pub arena: (u64, u64),
    /// Delays are random; else copies take exactly their time and the host takes none.
    pub jitter: bool,
    /// Nanoseconds for each KiB copied.
    pub ns_per_kib: u64,
    /// Nanoseconds for each copy, whatever its size.
    pub latency_ns: u64,
    /// Sources above this address have to be staged, or page-locked.
    pub staged_from: Option<u64>,
    /// Whether memory can be page-locked.
    pub lockable: bool,
}

#[derive(Debug, Default)]
struct Marks {
    ready_ns: Option<u64>,
    done_ns: Option<u64>,
    times: UseTimes,
}

#[derive(Debug)]
struct State {
    options: SimOptions,
    random: u64,
    host_ns: u64,
    copy_ns: u64,
    compute_ns: HashMap<u64, u64>,
    marks: Vec<Marks>,
    chunk_ns: Vec<u64>,
    arenas: Vec<(u64, u64)>,
    memory: Memory,
    host_memory: Memory,
    /// Host ranges that were written again, by first byte: their end, and how often.
    rewritten: BTreeMap<u64, (u64, u64)>,
    chunk_next: u64,
    locks: Locks,
    violations: Vec<String>,
}

/// A device that only keeps books.
#[derive(Debug)]
pub struct SimDevice {
    state: Mutex<State>,
}

impl SimDevice {
    /// A device with empty memory.
    pub fn new(options: SimOptions) -> Self {
        let random = options.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        Self {
            state: Mutex::new(State {
                arenas: vec![options.arena],
                options,
                random,
                host_ns: 0,
                copy_ns: 0,
                compute_ns: HashMap::new(),
                marks: Vec::new(),
                chunk_ns: Vec::new(),
                memory: Memory::default(),
                host_memory: Memory::default(),
                rewritten: BTreeMap::new(),
                chunk_next: 1 << 60,
                locks: Locks::default(),
                violations: Vec::new(),
            }),
        }
    }

    /// The kernels of a block: reads each `(address, source, bytes)`, expecting the bytes that the
    /// source address holds now, for `duration_ns`.
    pub fn compute(&self, compute: ComputeStream, reads: &[(u64, u64, u64)], duration_ns: u64) {
        let mut state = self.state.lock();
        state.host_works();
        let start = state.host_ns.max(state.compute_ns.get(&compute.0).copied().unwrap_or(0));
        let end = start + duration_ns;
        state.compute_ns.insert(compute.0, end);
        for &(address, source, bytes) in reads {
            let origin = state.origin(source, bytes);
            let found = state.memory.read(Read { address, bytes, start, end }, Some(origin));
            state.violations.extend(found.err());
        }
    }

    /// Kernels of someone else: they use a range for `duration_ns`, whatever it holds.
    pub fn occupy(&self, compute: ComputeStream, address: u64, bytes: u64, duration_ns: u64) {
        let mut state = self.state.lock();
        state.host_works();
        let start = state.host_ns.max(state.compute_ns.get(&compute.0).copied().unwrap_or(0));
        let end = start + duration_ns;
        state.compute_ns.insert(compute.0, end);
        state.memory.note_read(Read { address, bytes, start, end });
    }

    /// The host writes other bytes to a source, all of a tensor; copies taken before are old.
    pub fn rewrite(&self, address: u64, bytes: u64) {
        let mut state = self.state.lock();
        state.rewritten.entry(address).or_insert((address + bytes, 0)).1 += 1;
    }

    /// Copies that are enqueued from now on take another time.
    pub fn set_link(&self, ns_per_kib: u64, latency_ns: u64) {
        let mut state = self.state.lock();
        state.options.ns_per_kib = ns_per_kib;
        state.options.latency_ns = latency_ns;
    }

    /// Page-locked ranges, and how many there ever were.
    pub fn page_locks(&self) -> (usize, u64) {
        self.state.lock().locks.counts()
    }

    /// Another arena: copies may go there from now on.
    pub fn add_arena(&self, address: u64, bytes: u64) {
        self.state.lock().arenas.push((address, bytes));
    }

    /// An arena is given back: no copy may go there any more, and no kernel of ours may be
    /// reading it still.
    pub fn retire_arena(&self, address: u64, bytes: u64) {
        let mut state = self.state.lock();
        state.arenas.retain(|&arena| arena != (address, bytes));
        let now = state.host_ns;
        let (start, end) = (now, now);
        let found = state.memory.write(address, bytes.max(1), None, start, end);
        state.violations.extend(found.err());
    }

    /// Hazards found so far.
    pub fn violations(&self) -> Vec<String> {
        self.state.lock().violations.clone()
    }

    /// Virtual time at which a stream is free, in nanoseconds.
    pub fn compute_free_ns(&self, compute: ComputeStream) -> u64 {
        self.state.lock().compute_ns.get(&compute.0).copied().unwrap_or(0)
    }
}

impl State {
    fn random(&mut self) -> u64 {
        // xorshift64 (Marsaglia 2003): enough for delays.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn host_works(&mut self) {
        if self.options.jitter {
            let step = if self.random() % 16 == 0 { 20_000 } else { 300 };
            self.host_ns += self.random() % step;
        }
    }

    fn check(&mut self, target: u64, bytes: u64) {
        let holds = |&(first, size): &(u64, u64)| first <= target && target + bytes <= first + size;
        if !self.arenas.iter().any(holds) {
            self.violations.push(format!("copy of {bytes} bytes to {target} is out of the arena"));
        }
    }

    /// Names the bytes that a host range holds: its address, and how often it was written again.
    fn origin(&self, address: u64, bytes: u64) -> u64 {
        const GENERATION: u64 = 1 << 48;
        match self.rewritten.range(..=address).next_back() {
            Some((_, &(end, times))) if address + bytes <= end => address + times * GENERATION,
            _ => address,
        }
    }

    /// A copy that is `faster` than one over the link.
    fn write(&mut self, target: u64, bytes: u64, source: Option<u64>, faster: u64) -> (u64, u64) {
        self.host_works();
        self.check(target, bytes);
        let start = self.host_ns.max(self.copy_ns);
        let mut took = self.options.latency_ns + bytes * self.options.ns_per_kib / 1024 / faster;
        if self.options.jitter {
            took = took / 2 + self.random() % (took + 1);
        }
        let end = start + took;
        self.copy_ns = end;
        let found = self.memory.write(target, bytes, source, start, end);
        self.violations.extend(found.err());
        (start, end)
    }
}

impl Device for SimDevice {
    fn prepare(&self, slots: u32, chunks: u32) -> Result<()> {
        let mut state = self.state.lock();
        state.marks.clear();
        state.marks.resize_with(index(slots), Marks::default);
        state.chunk_ns = vec![0; index(chunks)];
        Ok(())
    }

    fn copy(&self, source: Source, target: u64, bytes: u64) -> Result<()> {
        let mut state = self.state.lock();
        let Source::Memory { address } = source else {
            return Err(Error::Invalid("the simulated device reads no files".into()));
        };
        // What lies in a chunk is known by where it was read from.
        let origin = state.host_memory.origin(address, bytes);
        let origin = origin.unwrap_or_else(|| state.origin(address, bytes));
        let (start, end) = state.write(target, bytes, Some(origin), 1);
        let chunk = Read { address, bytes, start, end };
        state.host_memory.note_read(chunk);
        Ok(())
    }

    fn copy_within(&self, from: u64, to: u64, bytes: u64) -> Result<()> {
        let mut state = self.state.lock();
        let Some(parts) = state.memory.parts(from, bytes) else {
            state.violations.push(format!("{bytes} bytes at {from} are moved, and never arrived"));
            return Ok(());
        };
        for (address, bytes, origin) in parts {
            let (start, end) = state.write(to + (address - from), bytes, origin, WITHIN);
            state.memory.note_read(Read { address, bytes, start, end });
        }
        Ok(())
    }

    fn copy_batch(&self, copies: &[H2d]) -> Result<()> {
        let mut targets: Vec<_> = copies.iter().map(|copy| (copy.target, copy.bytes)).collect();
        targets.sort_unstable();
        let meet = |pair: &&[(u64, u64)]| pair[1].0 < pair[0].0 + pair[0].1;
        if let Some(pair) = targets.windows(2).find(meet) {
            let found = format!("copies of one batch, which has no order, overlap: {pair:?}");
            self.state.lock().violations.push(found);
        }
        copies.iter().rev().try_for_each(|copy| self.copy(copy.source, copy.target, copy.bytes))
    }

    fn takes_as_one(&self, source: Source, bytes: u64) -> bool {
        // A range is known by its first byte, so that what was written again is copied alone.
        let state = self.state.lock();
        let Source::Memory { address } = source else { return false };
        let last = state.rewritten.range(..address + bytes).next_back();
        last.is_none_or(|(_, &(end, _))| end <= address)
    }

    fn fill(&self, target: u64, bytes: u64, _value: u8) -> Result<()> {
        self.state.lock().write(target, bytes, None, WITHIN);
        Ok(())
    }

    fn wait_done(&self, slot: EventSlot) -> Result<()> {
        let mut state = self.state.lock();
        state.host_works();
        if let Some(done_ns) = state.marks[index(slot.0)].done_ns {
            state.copy_ns = state.copy_ns.max(done_ns);
        }
        Ok(())
    }

    fn mark_copy_start(&self, slot: EventSlot) -> Result<()> {
        let mut state = self.state.lock();
        let now = state.copy_ns.max(state.host_ns);
        state.marks[index(slot.0)].times.copy_start_ns = now;
        Ok(())
    }

    fn mark_ready(&self, slot: EventSlot) -> Result<()> {
        let mut state = self.state.lock();
        state.host_works();
        let now = state.copy_ns.max(state.host_ns);
        let marks = &mut state.marks[index(slot.0)];
        marks.ready_ns = Some(now);
        marks.times.copy_end_ns = now;
        Ok(())
    }

    fn mark_wait(&self, slot: EventSlot, compute: ComputeStream) -> Result<()> {
        let mut state = self.state.lock();
        let free = state.compute_ns.get(&compute.0).copied().unwrap_or(0);
        state.marks[index(slot.0)].times.wait_ns = free.max(state.host_ns);
        Ok(())
    }

    fn wait_ready(&self, slot: EventSlot, compute: ComputeStream, timed: bool) -> Result<()> {
        let mut state = self.state.lock();
        state.host_works();
        let host_ns = state.host_ns;
        let ready = state.marks[index(slot.0)].ready_ns;
        let free = state.compute_ns.entry(compute.0).or_insert(0);
        let arrived = (*free).max(host_ns);
        if let Some(ready_ns) = ready {
            *free = arrived.max(ready_ns);
        }
        let start = (*free).max(arrived);
        if timed {
            state.marks[index(slot.0)].times.start_ns = start;
        }
        Ok(())
    }

    fn mark_done(&self, slot: EventSlot, compute: ComputeStream) -> Result<()> {
        let mut state = self.state.lock();
        state.host_works();
        let free = state.compute_ns.get(&compute.0).copied().unwrap_or(0);
        let now = state.host_ns.max(free);
        let marks = &mut state.marks[index(slot.0)];
        marks.done_ns = Some(now);
        marks.times.end_ns = now;
        Ok(())
    }

    fn takes(&self, source: Source, page_locked: bool) -> bool {
        let staged_from = self.state.lock().options.staged_from;
        match (source, staged_from) {
            (Source::Memory { address }, Some(from)) => page_locked || address < from,
            (Source::Memory { .. }, None) => true,
            (Source::File { .. } | Source::Encoded { .. }, _) => false,
        }
    }

    fn allocate_chunk(&self, bytes: u64) -> Result<u64> {
        let mut state = self.state.lock();
        let address = state.chunk_next;
        state.chunk_next += bytes;
        Ok(address)
    }

    fn free_chunk(&self, _address: u64, _bytes: u64) {}

    fn finish_reads(&self) {}

    fn read(&self, source: Source, address: u64, bytes: u64) -> Result<()> {
        let mut state = self.state.lock();
        state.host_works();
        let Source::Memory { address: from } = source else {
            return Err(Error::Invalid("the simulated device reads no files".into()));
        };
        let (now, origin) = (state.host_ns, state.origin(from, bytes));
        let found = state.host_memory.write(address, bytes, Some(origin), now, now);
        state.violations.extend(found.err());
        Ok(())
    }

    fn mark_chunk(&self, chunk: u32) -> Result<()> {
        let mut state = self.state.lock();
        state.chunk_ns[index(chunk)] = state.copy_ns;
        Ok(())
    }

    fn wait_chunk(&self, chunk: u32) -> Result<()> {
        let mut state = self.state.lock();
        state.host_ns = state.host_ns.max(state.chunk_ns[index(chunk)]);
        Ok(())
    }

    fn page_lock(&self, address: u64, bytes: u64) -> Result<()> {
        let mut state = self.state.lock();
        let allowed = state.options.lockable;
        state.locks.add(address, bytes, allowed)
    }

    fn page_unlock(&self, address: u64, bytes: u64) {
        self.state.lock().locks.remove(address, bytes);
    }

    fn times(&self, slot: EventSlot) -> Option<UseTimes> {
        Some(self.state.lock().marks[index(slot.0)].times)
    }

    fn quiesce(&self, last: Option<EventSlot>) -> Result<()> {
        let mut state = self.state.lock();
        let done = last.and_then(|slot| state.marks[index(slot.0)].done_ns).unwrap_or(0);
        state.host_ns = state.host_ns.max(state.copy_ns).max(done);
        Ok(())
    }
}
