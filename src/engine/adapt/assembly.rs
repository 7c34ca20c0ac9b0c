//! Puts the times of single uses together to passes. Pure.

use super::tuner::{LATENCY_S, PassTimes};
use crate::engine::trace::Record;
use crate::units::{count, index, real};

/// Shorter copies say more about their latency than about the link.
const LONG_COPY_BYTES: u64 = 4 << 20;

/// What is known since a record came.
#[derive(Debug, Clone, PartialEq, Default)]
pub(in crate::engine) struct Found {
    /// Seconds that the first use of a pass took from its start to its end.
    pub(in crate::engine) first_s: Option<f64>,
    /// Seconds from the arrival at the first use of a pass to the end of its last.
    pub(in crate::engine) inside_s: Option<f64>,
    /// The times of a pass all of whose uses came.
    pub(in crate::engine) pass: Option<PassTimes>,
}

/// Puts the times of single uses together to passes.
#[derive(Debug, Default)]
pub(in crate::engine) struct Assembly {
    uses: usize,
    /// Of two passes, the records so far, by place; and the number of the first pass.
    first: u64,
    passes: [Vec<Option<Record>>; 2],
}

impl Assembly {
    pub(in crate::engine) fn new(uses: usize) -> Self {
        Self { uses, first: 0, passes: [vec![None; uses], vec![None; uses]] }
    }

    /// Takes a record; says what is known since. Records come in order.
    pub(in crate::engine) fn add(&mut self, record: &Record) -> Found {
        let mut found = Found::default();
        if self.uses == 0 || record.number / (self.uses as u64) < self.first {
            return found;
        }
        let pass = record.number / self.uses as u64;
        while pass > self.first + 1 {
            self.advance();
        }
        let place = index(record.number % self.uses as u64);
        self.passes[index(pass - self.first)][place] = Some(*record);
        if place == 0 {
            found.first_s = Some(seconds(record.times.start_ns, record.times.end_ns));
        }
        if place + 1 == self.uses {
            let begun = self.passes[index(pass - self.first)][0];
            found.inside_s = begun.map(|first| seconds(first.times.wait_ns, record.times.end_ns));
        }
        if pass > self.first && place == 0 {
            found.pass = self.complete(record.times.wait_ns);
            self.advance();
        }
        found
    }

    /// Passes that have ended.
    pub(in crate::engine) fn passes(&self) -> u64 {
        self.first
    }

    fn advance(&mut self) {
        self.first += 1;
        self.passes.swap(0, 1);
        self.passes[1].fill(None);
    }

    /// The first pass, if all of its uses came.
    fn complete(&self, next_ns: u64) -> Option<PassTimes> {
        let uses: Vec<&Record> =
            self.passes[0].iter().map(Option::as_ref).collect::<Option<_>>()?;
        let (first, last) = (uses.first()?.times, uses.last()?.times);
        let mut compute_s: Vec<f64> =
            uses.windows(2).map(|u| seconds(u[0].times.start_ns, u[1].times.wait_ns)).collect();
        compute_s.push(seconds(last.start_ns, last.end_ns));
        Some(PassTimes {
            compute_s,
            outside_s: seconds(last.end_ns, next_ns),
            inside_s: seconds(first.wait_ns, last.end_ns),
            copied: copied(&uses),
        })
    }
}

fn seconds(from_ns: u64, to_ns: u64) -> f64 {
    real(to_ns.saturating_sub(from_ns)) * 1e-9
}

/// Bytes and seconds of the long stretches of copies, without their latency.
fn copied(uses: &[&Record]) -> Option<(u64, f64)> {
    let most = uses.iter().map(|u| u.stretch_bytes).max()?;
    let long =
        |u: &&&Record| u.stretch_bytes > 0 && u.stretch_bytes >= LONG_COPY_BYTES.min(most / 2);
    let (mut bytes, mut busy_s) = (0, 0.0);
    for used in uses.iter().filter(long) {
        let times = used.times;
        bytes += used.stretch_cost;
        let took = seconds(times.copy_start_ns, times.copy_end_ns);
        busy_s += took - LATENCY_S.min(took / 2.0) * count(index(used.stretch_copies)).min(1e3);
    }
    (bytes > 0 && busy_s > 0.0).then_some((bytes, busy_s))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::UseTimes;

    #[test]
    fn a_pass_is_whole_or_nothing() {
        let record = |number: u64| Record {
            number,
            block: 0,
            bytes: 10,
            stretch_bytes: 8 << 20,
            stretch_cost: 8 << 20,
            stretch_copies: 1,
            times: UseTimes {
                copy_start_ns: number * 1000,
                copy_end_ns: number * 1000 + 900_000,
                wait_ns: number * 1000,
                start_ns: number * 1000 + 100,
                end_ns: number * 1000 + 800,
            },
        };
        let mut assembly = Assembly::new(3);
        let (mut found, mut firsts, mut insides) = (Vec::new(), Vec::new(), Vec::new());
        for number in (0..7).chain(8..13) {
            let news = assembly.add(&record(number));
            firsts.extend(news.first_s);
            insides.extend(news.inside_s);
            found.extend(news.pass.map(|pass| (number, pass)));
        }
        let numbers: Vec<u64> = found.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [3, 6, 12], "use 7 is missing, so pass 2 is");
        assert_eq!((firsts.len(), insides.len()), (5, 4), "also of a pass that is not whole");
        assert!(firsts.iter().all(|first_s| (first_s - 700e-9).abs() < 1e-12));
        assert!(insides.iter().all(|inside_s| (inside_s - 2800e-9).abs() < 1e-12));
        let pass = &found[0].1;
        assert!((pass.compute_s[0] - 900e-9).abs() < 1e-12, "to where the next could begin");
        assert!((pass.compute_s[2] - 700e-9).abs() < 1e-12, "to its end");
        assert!((pass.outside_s - 200e-9).abs() < 1e-12);
        assert!((pass.inside_s - 2800e-9).abs() < 1e-12);
        let (bytes, seconds) = pass.copied.expect("long copies");
        assert_eq!(bytes, 24 << 20);
        assert!((seconds - 3.0 * 895e-6).abs() < 1e-9);
    }
}
