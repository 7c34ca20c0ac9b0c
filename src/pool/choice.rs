//! Chooses how files are read and by how many threads, from what reads took. Pure.
//!
//! Whether the page cache helps depends on the machine, on the file system, and on whether the
//! model fits what memory is free; it may change while a model runs. So both ways are tried on the
//! reads that are to be made anyway: at first by turns, later once in a while. Where the page cache
//! has room for all that a pass reads, one pass goes through it before anything is judged: it says
//! nothing of a cache how long it takes to fill it.

use crate::units::real;

/// Reads of each way before one is preferred.
const TRIED: u64 = 8;
/// After that so many reads go the preferred way for each one that goes the other.
const PREFERRED: u64 = 160;
/// Shorter reads say more about a call than about a rate.
const LEAST_BYTES: u64 = 256 << 10;
/// Share of the newest read.
const NEW: f64 = 0.2;
/// Bytes after which a number of threads is judged.
const JUDGED_BYTES: u64 = 64 << 20;
/// What more threads have to gain.
const GAIN: f64 = 1.05;
/// Judged again after so many bytes.
const AGAIN_BYTES: u64 = 32 << 30;

/// How one read goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From memory.
    Memory,
    /// From a file through the page cache.
    Cached,
    /// From a file past the page cache.
    Direct,
}

/// A rate that is learned.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    s_per_byte: f64,
    reads: u64,
}

impl Rate {
    fn add(&mut self, bytes: u64, seconds: f64) {
        let new = seconds / real(bytes);
        let share = if self.reads == 0 { 1.0 } else { NEW };
        self.s_per_byte += share * (new - self.s_per_byte);
        self.reads += 1;
    }

    fn bytes_per_s(self) -> Option<f64> {
        (self.reads > 0 && self.s_per_byte > 0.0).then(|| self.s_per_byte.recip())
    }
}

/// What was learned of the reads of one engine.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    rates: [Rate; 3],
    /// Bytes read each way.
    bytes: [u64; 3],
    chosen: u64,
    /// Bytes that go through the page cache before the ways are judged.
    warming_bytes: u64,
    width: Width,
}

impl Choice {
    /// For at most `most_threads` threads.
    pub fn new(most_threads: u32) -> Self {
        Self { width: Width::new(most_threads), ..Self::default() }
    }

    /// The page cache has room for the `bytes` bytes that each pass reads from files.
    pub fn warm(&mut self, bytes: u64) {
        self.warming_bytes = bytes;
    }

    /// How the next read of a file goes, if both ways can be had.
    pub fn next_way(&mut self) -> Way {
        if self.warming_bytes > 0 {
            return Way::Cached;
        }
        self.chosen += 1;
        let [_, cached, direct] = self.rates;
        let fewer = if cached.reads < direct.reads { Way::Cached } else { Way::Direct };
        if cached.reads.min(direct.reads) < TRIED {
            return fewer;
        }
        match self.preferred() {
            Way::Cached if self.chosen % PREFERRED == 0 => Way::Direct,
            _ if self.chosen % PREFERRED == 0 => Way::Cached,
            way => way,
        }
    }

    /// The faster way to read a file, as far as is known.
    pub fn preferred(&self) -> Way {
        let [_, cached, direct] = self.rates;
        let faster = cached.reads == 0 || direct.s_per_byte < cached.s_per_byte;
        if direct.reads > 0 && faster { Way::Direct } else { Way::Cached }
    }

    /// A read took `seconds`, while so many others shared the source with it.
    pub fn note(&mut self, way: Way, bytes: u64, seconds: f64, shared_by: u32) {
        self.bytes[way as usize] += bytes;
        if way == Way::Cached && self.warming_bytes > 0 {
            self.warming_bytes = self.warming_bytes.saturating_sub(bytes);
            return;
        }
        if bytes >= LEAST_BYTES {
            self.rates[way as usize].add(bytes, seconds / f64::from(shared_by.max(1)));
        }
    }

    /// `bytes` bytes were read in `seconds` in which at least one thread read.
    pub fn note_all(&mut self, bytes: u64, seconds: f64) {
        let settled = self.rates[Way::Direct as usize].reads.min(TRIED)
            + self.rates[Way::Cached as usize].reads.min(TRIED);
        // While ways are tried the rate says nothing of threads.
        if settled == 0 || settled >= TRIED {
            self.width.note(bytes, seconds);
        }
    }

    /// How many threads there may be.
    pub fn most_threads(&self) -> u32 {
        self.width.most
    }

    /// How many threads may read at a time.
    pub fn threads(&self) -> u32 {
        self.width.now
    }

    /// Bytes per second that all threads together read from memory.
    pub fn memory_bytes_per_s(&self) -> Option<f64> {
        self.rates[Way::Memory as usize].bytes_per_s()
    }

    /// Bytes per second that all threads together read from files.
    pub fn file_bytes_per_s(&self) -> Option<f64> {
        self.rates[self.preferred() as usize].bytes_per_s()
    }

    /// Bytes read so far: from memory, through the page cache, and past it.
    pub fn bytes(&self) -> [u64; 3] {
        self.bytes
    }
}

/// How many threads read at a time: 2, 4, ... are tried for as long as each is faster, and 1.
#[derive(Debug, Clone, Default)]
struct Width {
    now: u32,
    most: u32,
    /// Tried so far, with bytes per second.
    tried: Vec<(u32, f64)>,
    /// The search is over.
    settled: bool,
    bytes: u64,
    seconds: f64,
}

impl Width {
    fn new(most: u32) -> Self {
        Self { now: most.clamp(1, 2), most, ..Self::default() }
    }

    fn note(&mut self, bytes: u64, seconds: f64) {
        (self.bytes, self.seconds) = (self.bytes + bytes, self.seconds + seconds);
        if self.settled {
            if self.bytes >= AGAIN_BYTES {
                *self = Self::new(self.most);
            }
            return;
        }
        if self.bytes < JUDGED_BYTES || self.seconds <= 0.0 {
            return;
        }
        self.tried.push((self.now, real(self.bytes) / self.seconds));
        (self.bytes, self.seconds) = (0, 0.0);
        self.now = self.next();
    }

    fn next(&mut self) -> u32 {
        let &(now, rate) = self.tried.last().unwrap_or(&(1, 0.0));
        let others = &self.tried[..self.tried.len().saturating_sub(1)];
        let before = others.iter().map(|&(_, rate)| rate).fold(0.0, f64::max);
        let wider = (2 * now).min(self.most);
        if rate > GAIN * before && wider > now {
            return wider;
        }
        let known = |width: u32| self.tried.iter().any(|&(tried, _)| tried == width);
        if !known(1) {
            return 1;
        }
        self.settled = true;
        // Of those that are as fast as the fastest, the fewest.
        let best = self.tried.iter().map(|&(_, rate)| rate).fold(0.0, f64::max);
        let fast = self.tried.iter().filter(|&&(_, rate)| rate * GAIN >= best);
        fast.map(|&(width, _)| width).min().unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads of 4 MiB, which take so long in each way.
    fn run(choice: &mut Choice, reads: u64, seconds: fn(Way) -> f64) -> [u64; 3] {
        let before = choice.bytes();
        for _ in 0..reads {
            let way = choice.next_way();
            choice.note(way, 4 << 20, seconds(way), 1);
        }
        let after = choice.bytes();
        [0, 1, 2].map(|at| (after[at] - before[at]) >> 22)
    }

    #[test]
    fn the_faster_way_is_found_and_the_other_tried_now_and_then() {
        let direct_is_fast = |way| if way == Way::Direct { 1e-3 } else { 3e-3 };
        let cached_is_fast = |way| if way == Way::Direct { 1e-3 } else { 2e-4 };
        let mut choice = Choice::new(4);
        assert_eq!(run(&mut choice, 16, direct_is_fast), [0, 8, 8]);
        assert_eq!(choice.preferred(), Way::Direct);
        let [_, cached, direct] = run(&mut choice, 1600, direct_is_fast);
        assert!((5..=15).contains(&cached) && direct > 1500, "{cached} of 1600");
        let rate = choice.file_bytes_per_s().expect("known");
        assert!((rate / (4_194_304.0 / 1e-3) - 1.0).abs() < 1e-6);
        run(&mut choice, 8000, cached_is_fast);
        assert_eq!(choice.preferred(), Way::Cached, "the file is in the page cache now");
    }

    #[test]
    fn a_cache_is_judged_when_it_is_full() {
        let mut choice = Choice::new(4);
        choice.warm(100 << 22);
        let cold = |way| if way == Way::Direct { 1e-3 } else { 3e-3 };
        assert_eq!(run(&mut choice, 100, cold), [0, 100, 0]);
        assert_eq!(choice.file_bytes_per_s(), None);
        let warm = |way| if way == Way::Direct { 1e-3 } else { 2e-4 };
        let [_, cached, direct] = run(&mut choice, 1000, warm);
        assert!(cached > 980 && direct >= 8, "{cached} through it, {direct} past it");
        assert_eq!(choice.preferred(), Way::Cached);
    }

    fn settle(rate_of: fn(u32) -> f64, most: u32) -> u32 {
        let mut choice = Choice::new(most);
        for _ in 0..200 {
            let rate = rate_of(choice.threads()) * 1e9;
            choice.note(Way::Memory, 4 << 20, 1e-3, 1);
            choice.note_all(4 << 20, f64::from(4 << 20) / rate);
        }
        choice.threads()
    }

    #[test]
    fn as_many_threads_read_as_are_faster() {
        assert_eq!(settle(f64::from, 8), 8);
        assert_eq!(settle(|threads| f64::from(threads.min(4)), 8), 4);
        assert_eq!(settle(|_| 5.0, 8), 1);
        assert_eq!(settle(|threads| 8.0 / f64::from(threads), 8), 1);
        assert_eq!(settle(f64::from, 1), 1);
        assert_eq!(settle(f64::from, 6), 6);
    }
}
