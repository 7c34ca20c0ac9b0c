//! Copies with their waits, and the exact time that a cycle of them takes.

use std::ops::Range;

use super::place::Piece;
use super::problem::Problem;
use super::program::Program;
use crate::units::{align_up, index, narrow, real, whole};

/// One copy of a cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) used: u32,
    pub(super) tensor: u32,
    pub(super) source: u64,
    pub(super) target: u64,
    pub(super) bytes: u64,
    /// The use whose compute must have ended, and how many cycles before this one that was.
    pub(super) wait: (u32, u32),
}

/// Bytes of the ring, and who has them: the use, numbered from the cycle before on.
#[derive(Debug, Clone, Copy)]
struct Held {
    start: u64,
    end: u64,
    number: u32,
}

/// Turns addresses into waits: every byte waits for the use that had it last. A piece whose bytes
/// become free at different times is cut where that pays.
#[derive(Debug, Default)]
pub(super) struct Compiler {
    held: Vec<Held>,
    parts: Vec<(u32, Piece)>,
}

impl Compiler {
    /// The copies of a cycle of `uses` uses, in order. `window` uses at most are copied ahead;
    /// parts below `least_cut` bytes are not copied alone.
    pub(super) fn compile(
        &mut self,
        pieces: &[Piece],
        uses: u32,
        window: Option<u32>,
        least_cut: u64,
        steps: &mut Vec<Step>,
    ) {
        steps.clear();
        self.held.clear();
        for piece in pieces {
            self.take(piece, piece.used);
        }
        let mut rest = pieces;
        while let Some(first) = rest.first() {
            let of_use = rest.partition_point(|piece| piece.used <= first.used);
            self.compile_use(&rest[..of_use], uses, window, least_cut, steps);
            rest = &rest[of_use..];
        }
    }

    fn compile_use(
        &mut self,
        pieces: &[Piece],
        uses: u32,
        window: Option<u32>,
        least_cut: u64,
        steps: &mut Vec<Step>,
    ) {
        self.parts.clear();
        let number = pieces[0].used + uses;
        for piece in pieces {
            let first = self.parts.len();
            let at = self.held.partition_point(|held| held.end <= piece.target);
            let overlaps = |held: &&Held| held.start < piece.target_end();
            self.parts.extend(self.held[at..].iter().take_while(overlaps).map(|held| {
                let (start, end) = (held.start.max(piece.target), held.end.min(piece.target_end()));
                (held.number, piece.part(start, end))
            }));
            merge(&mut self.parts, first, least_cut);
        }
        for piece in pieces {
            self.take(piece, number);
        }
        // What becomes free first is copied first.
        self.parts.sort_by_key(|&(number, piece)| (number, piece.tensor, piece.source));
        for &(owner, piece) in &self.parts {
            let ahead = window.map_or(0, |window| number.saturating_sub(window + 1));
            let waited = owner.max(ahead);
            let wait = if waited < uses { (waited, 1) } else { (waited - uses, 0) };
            let Piece { used, tensor, source, target, bytes } = piece;
            steps.push(Step { used, tensor, source, target, bytes, wait });
        }
    }

    /// `number` has the bytes of a piece from now on.
    fn take(&mut self, piece: &Piece, number: u32) {
        let (start, end) = (piece.target, piece.target_end());
        let first = self.held.partition_point(|held| held.end <= start);
        let last = first + self.held[first..].partition_point(|held| held.start < end);
        let before =
            self.held.get(first).copied().filter(|held| held.start < start && first < last);
        let after = (first < last).then(|| self.held[last - 1]).filter(|held| held.end > end);
        let parts = [
            before.map(|held| Held { end: start, ..held }),
            Some(Held { start, end, number }),
            after.map(|held| Held { start: end, ..held }),
        ];
        // In place, since most pieces have room for as many parts as they replace.
        let mut at = first;
        for part in parts.into_iter().flatten() {
            if at < last {
                self.held[at] = part;
            } else {
                self.held.insert(at, part);
            }
            at += 1;
        }
        if at < last {
            self.held.drain(at..last);
        }
    }
}

impl Piece {
    fn target_end(&self) -> u64 {
        self.target + self.bytes
    }

    /// The part of it that lies in `start..end` of the ring.
    fn part(&self, start: u64, end: u64) -> Self {
        let source = self.source + (start - self.target);
        Self { source, target: start, bytes: end - start, ..*self }
    }
}

/// Joins neighbours, of one piece and by ascending address, that wait for the same use or of which
/// one is too small; both then wait for the later one.
fn merge(parts: &mut Vec<(u32, Piece)>, first: usize, least_cut: u64) {
    let mut kept = first;
    for at in first + 1..parts.len() {
        let (next, before) = (parts[at], &mut parts[kept]);
        let small = next.1.bytes.min(before.1.bytes) < least_cut;
        if next.0 == before.0 || small {
            before.0 = before.0.max(next.0);
            before.1.bytes += next.1.bytes;
        } else {
            kept += 1;
            parts[kept] = next;
        }
    }
    parts.truncate((kept + 1).min(parts.len()));
}

/// Runs cycles of a problem's uses in exact time: in order on one compute stream, the copies in
/// order on another, each as early as its wait allows.
#[derive(Debug, Default)]
pub(super) struct Clock {
    of_use: Vec<Range<usize>>,
    seconds: Vec<f64>,
    /// For each copy where in `done` the end of its wait is found, in even and in odd cycles.
    waits: Vec<[u32; 2]>,
    done: Vec<f64>,
    spans: Vec<f64>,
}

impl Clock {
    /// Seconds of one pass in the steady state; a cycle has `passes` of them.
    ///
    /// The system is max-plus linear, so cycles become periodic after finitely many; where that
    /// takes more than `most_cycles`, the mean of the later half is given.
    pub(super) fn period_s(
        &mut self,
        problem: &Problem,
        steps: &[Step],
        passes: u32,
        most_cycles: usize,
    ) -> f64 {
        let uses = problem.uses.len() * index(passes);
        self.load(problem, steps, uses);
        self.done.clear();
        self.done.resize(2 * uses, 0.0);
        self.spans.clear();
        let (mut compute, mut copy, mut last) = (0.0_f64, 0.0_f64, 0.0);
        for cycle in 0..most_cycles {
            let parity = cycle % 2;
            for used in 0..uses {
                for at in self.of_use[used].clone() {
                    copy = copy.max(self.done[index(self.waits[at][parity])]) + self.seconds[at];
                    compute = compute.max(copy);
                }
                let place = used % problem.uses.len();
                compute += problem.uses[place].compute_s;
                self.done[parity * uses + used] = compute;
                if place + 1 == problem.uses.len() {
                    compute += problem.outside_s;
                }
            }
            self.spans.push(compute - last);
            last = compute;
            if let Some(mean) = steady(&self.spans) {
                return mean / f64::from(passes);
            }
        }
        let later = &self.spans[self.spans.len() / 2..];
        later.iter().sum::<f64>() / crate::units::count(later.len()) / f64::from(passes)
    }

    fn load(&mut self, problem: &Problem, steps: &[Step], uses: usize) {
        self.of_use.clear();
        self.of_use.resize(uses, 0..0);
        self.seconds.clear();
        self.waits.clear();
        for (at, step) in steps.iter().enumerate() {
            let range = &mut self.of_use[index(step.used)];
            *range = if range.start == range.end { at..at + 1 } else { range.start..at + 1 };
            let block = problem.uses[index(step.used) % problem.uses.len()].block;
            self.seconds.push(problem.copy_s(block, step.tensor, step.bytes));
            let (before, lag) = step.wait;
            let other = narrow(uses);
            let pair = [before, before + other];
            self.waits.push(if lag == 0 { pair } else { [pair[1], pair[0]] });
        }
    }
}

/// Seconds of a pass of a program, with the problem's times.
/// `places` says of each tensor which one of its block it is.
pub(super) fn period_of(problem: &Problem, program: &Program, places: &[u32]) -> f64 {
    let mut steps = Vec::with_capacity(program.copies.len());
    for (used, of_use) in (0..program.cycle).zip(&program.uses) {
        steps.extend(program.copies_of(of_use).iter().map(|copy| Step {
            used,
            tensor: places[index(copy.tensor)],
            source: copy.source_offset,
            target: copy.target_offset,
            bytes: align_up(copy.bytes),
            wait: copy.wait.map_or((used, 1), |wait| (wait.position, wait.lag)),
        }));
    }
    Clock::default().period_s(problem, &steps, program.passes, 400)
}

/// The mean of a whole number of periods, if the last cycles repeat themselves.
fn steady(spans: &[f64]) -> Option<f64> {
    let same = |a: f64, b: f64| (a - b).abs() <= 1e-11 * a.abs();
    (1..=4).find_map(|period: usize| {
        let needed = 3 * period;
        let end = spans.len();
        if end < needed + period + 2 {
            return None;
        }
        let repeats = (end - needed..end).all(|at| same(spans[at], spans[at - period]));
        let last = &spans[end - period..];
        repeats.then(|| last.iter().sum::<f64>() / crate::units::count(period))
    })
}

impl super::Link {
    /// Seconds of one copy.
    pub(super) fn seconds(&self, bytes: u64) -> f64 {
        self.latency_s + real(bytes) / self.bytes_per_s
    }

    /// Bytes that cross the link in the latency of one copy.
    pub(super) fn copy_bytes(&self) -> u64 {
        whole(self.latency_s * self.bytes_per_s)
    }
}
