//! Chooses how files are read and by how many threads, from what reads took. Pure.
//!
//! Where the page cache has no room for all that a pass reads, reads go past it: what is read in
//! the same order again and again is gone from a cache before its turn comes, and whatever else
//! the cache held with it. Where it has room, both ways are tried, after one pass through it: it
//! says nothing of a cache how long it takes to fill it. How many reads at a time are faster
//! depends on the disk. So every way is tried with every number of threads, on the reads that are
//! to be made anyway and by turns, as a disk that others use too changes while they are.

use crate::units::real;

/// Bytes of one try.
const TRY_BYTES: u64 = 64 << 20;
/// Tries of each way and number of threads; of those in the slower half only the first one.
const ROUNDS: usize = 3;
/// What more threads have to gain.
const GAIN: f64 = 1.05;
/// All is tried again after so many bytes.
const AGAIN_BYTES: u64 = 32 << 30;
/// Share of the newest rate.
const NEW: f64 = 0.2;

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

/// What was learned of the reads of one engine.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    memory: Search,
    file: Search,
    /// Bytes read each way.
    bytes: [u64; 3],
    /// Bytes that go through the page cache before the ways are judged.
    warming_bytes: u64,
    most_threads: u32,
}

impl Choice {
    /// For at most `most_threads` threads.
    pub fn new(most_threads: u32) -> Self {
        let search = |ways: &[Way]| Search::new(ways, most_threads);
        let (memory, file) = (search(&[Way::Memory]), search(&[Way::Direct]));
        Self { memory, file, most_threads, ..Self::default() }
    }

    /// The page cache has room for the `bytes` bytes that each pass reads from files.
    pub fn warm(&mut self, bytes: u64) {
        self.warming_bytes = bytes;
        self.file = Search::new(&[Way::Cached, Way::Direct], self.most_threads);
    }

    /// How the next read of a file goes, if both ways can be had.
    pub fn next_way(&self) -> Way {
        if self.warming_bytes > 0 { Way::Cached } else { self.file.way() }
    }

    /// The faster way to read a file, as far as is known.
    pub fn preferred(&self) -> Way {
        let refused = self.bytes[Way::Direct as usize] == 0;
        if refused { Way::Cached } else { self.file.best().map_or(Way::Cached, |arm| arm.way) }
    }

    /// So many bytes were read.
    pub fn note(&mut self, way: Way, bytes: u64) {
        self.bytes[way as usize] += bytes;
        if way == Way::Cached {
            self.warming_bytes = self.warming_bytes.saturating_sub(bytes);
        }
    }

    /// `bytes` bytes were read in `seconds` in which at least one thread read: from files, or from
    /// memory.
    pub fn note_all(&mut self, from_file: bool, bytes: u64, seconds: f64) {
        match from_file {
            true if self.warming_bytes > 0 => {}
            true => self.file.note(bytes, seconds),
            false => self.memory.note(bytes, seconds),
        }
    }

    /// How many threads there may be.
    pub fn most_threads(&self) -> u32 {
        self.most_threads
    }

    /// How many threads may read at a time: from files, or from memory.
    pub fn threads(&self, from_file: bool) -> u32 {
        if from_file { self.file.width() } else { self.memory.width() }
    }

    /// Bytes per second that all threads together read from memory.
    pub fn memory_bytes_per_s(&self) -> Option<f64> {
        self.memory.bytes_per_s()
    }

    /// Bytes per second that all threads together read from files.
    pub fn file_bytes_per_s(&self) -> Option<f64> {
        self.file.bytes_per_s()
    }

    /// Bytes read so far: from memory, through the page cache, and past it.
    pub fn bytes(&self) -> [u64; 3] {
        self.bytes
    }
}

/// One way with one number of threads, and what it came to.
#[derive(Debug, Clone, Copy)]
struct Arm {
    way: Way,
    width: u32,
    bytes: f64,
    seconds: f64,
}

impl Arm {
    fn bytes_per_s(&self) -> f64 {
        if self.seconds > 0.0 { self.bytes / self.seconds } else { 0.0 }
    }
}

/// Tries all arms once, the faster half some times more, and keeps to the best.
#[derive(Debug, Clone, Default)]
struct Search {
    /// Those that are still tried; afterwards the best one alone.
    arms: Vec<Arm>,
    /// All that there are.
    all: Vec<Arm>,
    now: usize,
    rounds: usize,
    bytes: u64,
    seconds: f64,
    /// Bytes since the search was over.
    kept_bytes: u64,
}

impl Search {
    fn new(ways: &[Way], most: u32) -> Self {
        let wider = std::iter::successors(Some(2), |width| Some(2 * width));
        let mut widths: Vec<u32> = wider.take_while(|&width| width < most).collect();
        widths.extend([most.max(1), 1]);
        widths.dedup();
        let arm = |width| move |&way: &Way| Arm { way, width, bytes: 0.0, seconds: 0.0 };
        let all: Vec<Arm> = widths.into_iter().flat_map(|w| ways.iter().map(arm(w))).collect();
        Self::over(all)
    }

    fn over(all: Vec<Arm>) -> Self {
        Self { arms: all.clone(), all, ..Self::default() }
    }

    fn way(&self) -> Way {
        self.arms.get(self.now).map_or(Way::Cached, |arm| arm.way)
    }

    fn width(&self) -> u32 {
        self.arms.get(self.now).map_or(1, |arm| arm.width)
    }

    fn note(&mut self, bytes: u64, seconds: f64) {
        (self.bytes, self.seconds) = (self.bytes + bytes, self.seconds + seconds);
        if self.bytes < TRY_BYTES || self.seconds <= 0.0 || self.arms.is_empty() {
            return;
        }
        let (bytes, seconds) = (std::mem::take(&mut self.bytes), std::mem::take(&mut self.seconds));
        if self.rounds == ROUNDS {
            self.keep(bytes, seconds);
            return;
        }
        let arm = &mut self.arms[self.now];
        (arm.bytes, arm.seconds) = (arm.bytes + real(bytes), arm.seconds + seconds);
        self.now += 1;
        if self.now == self.arms.len() {
            (self.now, self.rounds) = (0, self.rounds + 1);
            if self.rounds == 1 {
                self.drop_slower_half();
            } else if self.rounds == ROUNDS {
                self.arms = self.best().into_iter().collect();
            }
        }
    }

    /// The arm that was chosen goes on; what it comes to is known better.
    fn keep(&mut self, bytes: u64, seconds: f64) {
        let arm = &mut self.arms[0];
        let new = seconds / real(bytes);
        let old = arm.seconds / arm.bytes;
        (arm.bytes, arm.seconds) = (1.0, old + NEW * (new - old));
        self.kept_bytes += bytes;
        if self.kept_bytes >= AGAIN_BYTES {
            *self = Self::over(std::mem::take(&mut self.all));
        }
    }

    fn drop_slower_half(&mut self) {
        self.arms.sort_by(|a, b| b.bytes_per_s().total_cmp(&a.bytes_per_s()));
        self.arms.truncate(self.arms.len().div_ceil(2));
    }

    /// Of those that are as fast as the fastest, the one with the fewest threads. But one alone
    /// leaves the disk idle between two reads: it has to be faster.
    fn best(&self) -> Option<Arm> {
        let tried = self.arms.iter().copied().filter(|arm| arm.seconds > 0.0);
        let rate = |alone: bool| {
            let rates = tried.clone().filter(move |arm| (arm.width == 1) == alone);
            rates.map(|arm| arm.bytes_per_s()).fold(0.0, f64::max)
        };
        let (one, several) = (rate(true), rate(false));
        let alone = one > GAIN * several;
        let counts = |arm: &Arm| {
            let best = if alone { one } else { several / GAIN };
            (arm.width == 1) == alone && arm.bytes_per_s() >= best
        };
        let fewest = tried.clone().filter(counts).map(|arm| arm.width).min()?;
        let these = tried.filter(counts).filter(|arm| arm.width == fewest);
        these.max_by(|a, b| a.bytes_per_s().total_cmp(&b.bytes_per_s()))
    }

    fn bytes_per_s(&self) -> Option<f64> {
        self.best().map(|arm| arm.bytes_per_s())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads of 4 MiB at so many GB/s for each way and number of threads; bytes read each way.
    fn run(choice: &mut Choice, reads: u64, rate: impl Fn(Way, u32) -> f64) -> [u64; 3] {
        let before = choice.bytes();
        for number in 0..reads {
            let (way, threads) = (choice.next_way(), choice.threads(true));
            // A disk that others use half of the time.
            let shared = if number / 5 % 2 == 0 { 1.0 } else { 0.5 };
            choice.note(way, 4 << 20);
            choice.note_all(true, 4 << 20, real(4 << 20) / (rate(way, threads) * shared * 1e9));
        }
        let after = choice.bytes();
        [0, 1, 2].map(|at| (after[at] - before[at]) >> 22)
    }

    fn wide(threads: u32) -> f64 {
        f64::from(threads.min(4))
    }

    #[test]
    fn the_faster_way_is_found_and_again_after_a_while() {
        // Judged when the cache is full: at once.
        let direct_is_fast = |way, n| if way == Way::Direct { 3.0 * wide(n) } else { 1.0 };
        let cached_is_fast = |way, n| if way == Way::Direct { wide(n) } else { 5.0 * wide(n) };
        let mut choice = Choice::new(8);
        choice.warm(0);
        assert_eq!(choice.file_bytes_per_s(), None);
        let [_, cached, _] = run(&mut choice, 600, direct_is_fast);
        assert_eq!((choice.preferred(), choice.threads(true)), (Way::Direct, 4));
        assert!(cached < 100, "{cached} reads of 16 in each of four tries");
        assert_eq!(run(&mut choice, 1000, direct_is_fast), [0, 0, 1000]);
        let rate = choice.file_bytes_per_s().expect("known") / 1e9;
        assert!((6.0..12.0).contains(&rate), "{rate} of a disk that is shared at times");
        run(&mut choice, 9000, cached_is_fast);
        assert_eq!(choice.preferred(), Way::Cached, "the file is in the page cache now");
    }

    #[test]
    fn a_way_that_is_fast_with_two_threads_only_is_found() {
        // Measured on a virtual disk: one reader is slow through the cache, and fast past it.
        let rate = |way, threads| match (way, threads) {
            (Way::Cached, 1) => 0.7,
            (Way::Cached, 2) => 2.7,
            (Way::Cached, _) => 2.1,
            (_, 1) => 1.8,
            _ => 1.6,
        };
        let mut choice = Choice::new(8);
        choice.warm(0);
        run(&mut choice, 600, rate);
        assert_eq!((choice.preferred(), choice.threads(true)), (Way::Cached, 2));
    }

    #[test]
    fn what_no_cache_can_hold_is_read_past_it() {
        let mut choice = Choice::new(4);
        assert_eq!(
            run(&mut choice, 300, |way, _| if way == Way::Cached { 9.0 } else { 1.0 }),
            [0, 0, 300]
        );
    }

    #[test]
    fn a_cache_is_judged_when_it_is_full() {
        let mut choice = Choice::new(4);
        choice.warm(100 << 22);
        assert_eq!(run(&mut choice, 100, |_, _| 1.0), [0, 100, 0]);
        assert_eq!(choice.file_bytes_per_s(), None);
        let warm = |way, _| if way == Way::Direct { 1.0 } else { 5.0 };
        let [_, cached, direct] = run(&mut choice, 1000, warm);
        assert!(cached > 900 && direct >= 48, "{cached} through it, {direct} past it");
        assert_eq!(choice.preferred(), Way::Cached);
    }

    #[test]
    fn where_no_read_goes_past_the_cache_none_is_said_to() {
        let mut choice = Choice::new(4);
        for _ in 0..1000 {
            choice.note(Way::Cached, 4 << 20);
            choice.note_all(true, 4 << 20, 1e-3);
        }
        assert_eq!(choice.preferred(), Way::Cached);
    }

    fn settle(rate_of: fn(u32) -> f64, most: u32) -> u32 {
        let mut choice = Choice::new(most);
        for _ in 0..400 {
            choice.note_all(false, 4 << 20, real(4 << 20) / (rate_of(choice.threads(false)) * 1e9));
        }
        choice.threads(false)
    }

    #[test]
    fn as_many_threads_read_as_are_faster() {
        assert_eq!(settle(f64::from, 8), 8);
        assert_eq!(settle(|threads| f64::from(threads.min(4)), 8), 4);
        assert_eq!(settle(|_| 5.0, 8), 2);
        assert_eq!(settle(|threads| 8.0 / f64::from(threads), 8), 1);
        assert_eq!(settle(f64::from, 1), 1);
        assert_eq!(settle(f64::from, 6), 6);
    }
}
