//! Tries candidates: gives each addresses and waits, runs it in exact time, and keeps the best.

use std::collections::HashSet;

use super::level::streamed;
use super::place::{Item, Items, Placement, smallest_ring};
use super::problem::Problem;
use super::search::near::Near;
use super::steps::{Clock, Compiler, Step};
use crate::units::{index, narrow, real};

/// Of plans within this of the fastest, the one with the most lookahead is taken: jitter of a
/// link or of kernels costs more than this where the ring is tight.
pub(super) const SLACK: f64 = 0.003;
/// Lookahead beyond so many of the largest streamed blocks serves nothing.
const MOST_RING: f64 = 4.0;
/// Cycles that a candidate, and the plan, are run for at most before they repeat themselves.
const CYCLES: usize = 40;
const CYCLES_FINAL: usize = 400;

/// A plan as the search knows it.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// For each block, its split.
    pub(super) splits: Vec<u64>,
    pub(super) steps: Vec<Step>,
    pub(super) ring_bytes: u64,
    pub(super) turns: u32,
    /// Passes in one cycle of `steps`.
    pub(super) passes: u32,
    /// Seconds of a pass in exact simulation, with the problem's times.
    pub(super) period_s: f64,
    /// The same, with a share of what the change from the plan in force brings.
    cost_s: f64,
    /// The ring in blocks: `ring_bytes` over the most bytes of any use.
    lookahead: f64,
}

impl Found {
    /// Everything stays.
    pub(super) fn resident(problem: &Problem) -> Self {
        Self {
            splits: vec![0; problem.bytes.len()],
            steps: Vec::new(),
            ring_bytes: 0,
            turns: 0,
            passes: 1,
            period_s: problem.compute_s(),
            cost_s: problem.compute_s(),
            lookahead: 0.0,
        }
    }
}

/// The candidates tried so far.
pub(super) struct Trial<'a> {
    pub(super) problem: &'a Problem,
    /// What is on the device already.
    pub(super) near: Option<&'a Near>,
    /// The shortest period so far.
    pub(super) best_s: f64,
    /// The least `cost_s` so far.
    least_s: f64,
    compiler: Compiler,
    clock: Clock,
    steps: Vec<Step>,
    pool: Vec<Found>,
    tried: HashSet<(Vec<u64>, u32, u32)>,
}

impl<'a> Trial<'a> {
    pub(super) fn new(problem: &'a Problem, near: Option<&'a Near>) -> Self {
        Self {
            problem,
            near,
            best_s: f64::INFINITY,
            least_s: f64::INFINITY,
            compiler: Compiler::default(),
            clock: Clock::default(),
            steps: Vec::new(),
            pool: Vec::new(),
            tried: HashSet::new(),
        }
    }

    /// The fastest candidate so far.
    pub(super) fn fastest(&self) -> Option<&Found> {
        self.pool.iter().min_by(|a, b| a.period_s.total_cmp(&b.period_s))
    }

    /// Bytes that the residents leave for the ring.
    fn room(&self, splits: &[u64]) -> Option<u64> {
        let moved: u64 = (0..splits.len()).map(|b| streamed(self.problem, splits, b)).sum();
        self.problem.budget_bytes.checked_sub(self.problem.total_bytes() - moved)
    }

    pub(super) fn items(&self, splits: &[u64], passes: u32) -> Items {
        let mut items = Items { may_cut: self.problem.tensors.is_empty(), ..Items::default() };
        for _ in 0..passes {
            for slot in &self.problem.uses {
                let first = items.all.len();
                let split = splits[slot.block];
                match self.problem.splits(slot.block).tensors(split) {
                    Some(tensors) => items.all.extend(tensors.iter().map(|&tensor| Item {
                        tensor,
                        bytes: self.problem.tensors[slot.block][index(tensor)],
                    })),
                    None if split > 0 => {
                        let bytes = streamed(self.problem, splits, slot.block);
                        items.all.push(Item { tensor: 0, bytes });
                    }
                    None => {}
                }
                items.of_use.push(first..items.all.len());
            }
        }
        items
    }

    /// Places, compiles and times one residency, in turns and on two sides; `None` if it does not
    /// fit the budget.
    pub(super) fn consider(&mut self, splits: Vec<u64>, turns: u32, passes: u32) -> Option<f64> {
        let key = (splits, turns, passes);
        if self.tried.contains(&key) {
            return None;
        }
        self.tried.insert(key.clone());
        let splits = key.0;
        let room = self.aligned_room(&splits)?;
        let held = self.held(&splits);
        if held > room {
            return None;
        }
        let items = self.items(&splits, passes);
        let most = items.most_of_use();
        let few = most <= room && room < 2 * most + most / 4;
        let sides = (few && self.tried.insert((splits.clone(), 0, passes))).then(|| {
            let mut placement = Placement::default();
            placement.alternate(&items, room.min(2 * most));
            (room.min(2 * most), placement)
        });
        let in_turns = smallest_ring(&items, turns, room, self.problem.align_bytes);
        let times = [sides, in_turns].into_iter().flatten().map(|(ring_bytes, placement)| {
            let ring_bytes = ring_bytes.max(held.next_multiple_of(self.problem.align_bytes));
            self.time(&splits, &items, ring_bytes, turns, passes, &placement)
        });
        times.reduce(f64::min)
    }

    /// Few uses that stream whole blocks: from two sides on, each goes to other places in the room
    /// for as long as that helps; at the ends, and beside those that run up to `near` uses before
    /// or after it.
    pub(super) fn try_places(&mut self, splits: &[u64], near: usize) {
        let Some(room) = self.aligned_room(splits) else {
            return;
        };
        let items = self.items(splits, 1);
        let sizes: Vec<u64> = items
            .of_use
            .iter()
            .map(|range| items.all[range.clone()].iter().map(|item| item.bytes).sum())
            .collect();
        let held = self.held(splits);
        let most = sizes.iter().copied().max().unwrap_or(0);
        if most.max(held) > room || most == 0 {
            return;
        }
        let mut placement = Placement::default();
        // At the front and at the back by turns, beginning with either, and all at the front.
        for start in 0..3 {
            let side = |(at, &bytes): (usize, &u64)| {
                if start < 2 && at % 2 == start { room - bytes } else { 0 }
            };
            let mut offsets: Vec<u64> = sizes.iter().enumerate().map(side).collect();
            let mut best_s = f64::INFINITY;
            for _ in 0..3 {
                let before_s = best_s;
                for at in 0..sizes.len() {
                    for place in places(&sizes, &offsets, at, room, near) {
                        let kept = std::mem::replace(&mut offsets[at], place);
                        placement.lay(&items, &offsets);
                        let period_s = self.time(splits, &items, room, 1, 1, &placement);
                        if period_s < best_s { best_s = period_s } else { offsets[at] = kept }
                    }
                }
                if best_s >= before_s {
                    break;
                }
            }
        }
    }

    /// Whole alignments of [`Trial::room`].
    pub(super) fn aligned_room(&self, splits: &[u64]) -> Option<u64> {
        let align_bytes = self.problem.align_bytes;
        self.room(splits).map(|room| room / align_bytes * align_bytes)
    }

    /// The most that a block streams which no pass uses: the ring has to hold that too.
    fn held(&self, splits: &[u64]) -> u64 {
        let dormant = self.problem.dormant.iter();
        dormant.map(|&block| streamed(self.problem, splits, block)).max().unwrap_or(0)
    }

    /// The period of one candidate, which joins the pool if it may be among the best.
    fn time(
        &mut self,
        splits: &[u64],
        items: &Items,
        ring_bytes: u64,
        turns: u32,
        passes: u32,
        placement: &Placement,
    ) -> f64 {
        let uses = narrow(items.of_use.len());
        let least_cut = 2 * self.problem.link.copy_bytes();
        let window = self.problem.window;
        self.compiler.compile(&placement.pieces, uses, window, least_cut, &mut self.steps);
        let period_s = self.clock.period_s(self.problem, &self.steps, passes, CYCLES);
        let share_s = self.near.map_or(0.0, |near| near.share_s(self.problem, splits));
        self.best_s = self.best_s.min(period_s);
        self.least_s = self.least_s.min(period_s + share_s);
        let (best_s, least_s) = (self.best_s * (1.0 + SLACK), self.least_s * (1.0 + SLACK));
        if period_s <= best_s || period_s + share_s <= least_s {
            let lookahead = real(ring_bytes) / real(items.most_of_use().max(1));
            self.pool.push(Found {
                splits: splits.to_vec(),
                steps: self.steps.clone(),
                ring_bytes,
                turns,
                passes,
                period_s,
                cost_s: period_s + share_s,
                lookahead,
            });
        }
        period_s
    }

    /// The most lookahead among the fastest, timed exactly; what the change to a plan brings counts
    /// with its time. Cycles of several passes only where they gain more than the slack.
    pub(super) fn choose(mut self) -> Option<Found> {
        let fastest = |pool: &[Found], passes: fn(u32) -> bool| {
            let of = pool.iter().filter(|found| passes(found.passes));
            of.map(|found| found.cost_s).fold(f64::INFINITY, f64::min)
        };
        let one = fastest(&self.pool, |passes| passes == 1);
        if one <= fastest(&self.pool, |passes| passes > 1) * (1.0 + SLACK) {
            self.pool.retain(|found| found.passes == 1);
        }
        let limit = fastest(&self.pool, |_| true) * (1.0 + SLACK);
        let most = self.problem.window.map_or(MOST_RING, |w| f64::from(w) + 1.0).min(MOST_RING);
        let good = |found: &&Found| found.cost_s <= limit && found.lookahead <= most + 1e-9;
        let most_ahead = self.pool.iter().filter(good).max_by(|a, b| {
            let by_bytes = |found: &Found| found.steps.iter().map(|step| step.bytes).sum::<u64>();
            let ahead = a.lookahead.total_cmp(&b.lookahead);
            ahead.then_with(|| by_bytes(b).cmp(&by_bytes(a)))
        });
        let by_cost = |a: &&Found, b: &&Found| a.cost_s.total_cmp(&b.cost_s);
        let found = most_ahead.or_else(|| self.pool.iter().min_by(by_cost))?.clone();
        let mut found = self.fill(&found).unwrap_or(found);
        self.join(&mut found);
        found.period_s =
            self.clock.period_s(self.problem, &found.steps, found.passes, CYCLES_FINAL);
        Some(found)
    }

    /// Joins the parts of tensors that were cut for nothing: fewer copies in the same time.
    fn join(&mut self, found: &mut Found) {
        let mut best_s = self.clock.period_s(self.problem, &found.steps, found.passes, CYCLES);
        let mut at = 0;
        while at + 1 < found.steps.len() {
            let (first, second) = (found.steps[at], found.steps[at + 1]);
            let later = found.steps[at + 1].wait; // in order of when they become free
            let joined = join(first, second).map(|step| Step { wait: later, ..step });
            let Some(joined) = joined else {
                at += 1;
                continue;
            };
            let mut steps = found.steps.clone();
            steps.splice(at..at + 2, [joined]);
            let period_s = self.clock.period_s(self.problem, &steps, found.passes, CYCLES);
            if period_s <= best_s * (1.0 + 1e-9) {
                (found.steps, best_s) = (steps, period_s);
            } else {
                at += 1;
            }
        }
    }

    /// What the budget still leaves over keeps more tensors resident, as long as that costs no
    /// time; but no block whole, which would change who waits for whom.
    fn fill(&mut self, found: &Found) -> Option<Found> {
        if self.problem.manual.is_some() {
            return None;
        }
        let mut spare = self.room(&found.splits)?.checked_sub(found.ring_bytes)?;
        let mut splits = found.splits.clone();
        for (block, split) in splits.iter_mut().enumerate() {
            let kind = self.problem.splits(block);
            let before = kind.bytes(*split);
            let mut less = kind.within(before.saturating_sub(spare)).max(1);
            if before > 0 && kind.bytes(less) + spare < before {
                less += 1;
            }
            if before > 0 && less < *split {
                spare -= before - kind.bytes(less);
                *split = less;
            }
        }
        let (limit, most) = (found.period_s * (1.0 + 1e-9), found.cost_s * (1.0 + 1e-9));
        let before = self.pool.len();
        self.consider(splits, found.turns, found.passes)?;
        let mut new = self.pool.drain(before.min(self.pool.len())..);
        new.find(|filled| filled.period_s <= limit && filled.cost_s <= most)
    }
}

/// Where one of some uses may lie: at an end of the room, or beside another one `near` it.
fn places(sizes: &[u64], offsets: &[u64], at: usize, room: u64, near: usize) -> Vec<u64> {
    let mut places = vec![0, room - sizes[at]];
    let beside = |other: &usize| {
        let apart = at.abs_diff(*other);
        *other != at && apart.min(sizes.len() - apart) <= near
    };
    for other in (0..sizes.len()).filter(beside) {
        let (start, end) = (offsets[other], offsets[other] + sizes[other]);
        places.extend([end, start.saturating_sub(sizes[at])]);
    }
    places.retain(|&place| place + sizes[at] <= room);
    places
}

/// Two parts of a tensor, one behind the other, as one.
fn join(a: Step, b: Step) -> Option<Step> {
    let (first, second) = if a.source < b.source { (a, b) } else { (b, a) };
    let neighbours = (a.used, a.tensor) == (b.used, b.tensor)
        && first.source + first.bytes == second.source
        && first.target + first.bytes == second.target;
    neighbours.then(|| Step { bytes: first.bytes + second.bytes, ..first })
}
