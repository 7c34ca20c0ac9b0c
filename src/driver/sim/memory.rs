//! The books of the simulated memory: who wrote which bytes, until when, and who reads them.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Error;

/// Host ranges that are page-locked, and how many there ever were.
#[derive(Debug, Default)]
pub(super) struct Locks {
    ranges: BTreeSet<(u64, u64)>,
    ever: u64,
}

impl Locks {
    pub(super) fn add(&mut self, address: u64, bytes: u64, allowed: bool) -> Result<(), Error> {
        if !allowed {
            let reason = "this simulated device page-locks nothing".into();
            return Err(Error::PageLock { bytes, reason });
        }
        self.ranges.insert((address, bytes));
        self.ever += 1;
        Ok(())
    }

    pub(super) fn remove(&mut self, address: u64, bytes: u64) {
        self.ranges.remove(&(address, bytes));
    }

    pub(super) fn counts(&self) -> (usize, u64) {
        (self.ranges.len(), self.ever)
    }
}

/// A range that is read for a while.
#[derive(Debug, Clone, Copy)]
pub(super) struct Read {
    pub(super) address: u64,
    pub(super) bytes: u64,
    pub(super) start: u64,
    pub(super) end: u64,
}

/// Bytes that were written together.
#[derive(Debug, Clone, Copy)]
struct Written {
    end_address: u64,
    /// The source of the first byte; `None` for poison.
    source: Option<u64>,
    /// When the write was over.
    done: u64,
}

/// Ranges by their first byte, and the reads that may still be going on.
#[derive(Debug, Default)]
pub(super) struct Memory {
    written: BTreeMap<u64, Written>,
    reads: Vec<Read>,
}

impl Memory {
    /// Bytes are overwritten from `start` to `end`.
    pub(super) fn write(
        &mut self,
        address: u64,
        bytes: u64,
        source: Option<u64>,
        start: u64,
        end: u64,
    ) -> Result<(), String> {
        let last = address + bytes;
        self.cut(address, last);
        self.written.insert(address, Written { end_address: last, source, done: end });
        let clash = self.reads.iter().find(|read| {
            read.address < last && address < read.address + read.bytes && start < read.end
        });
        let found = clash.map(|read| {
            format!(
                "{address}..{last} is overwritten at {start} while it is read until {}",
                read.end
            )
        });
        self.reads.retain(|read| read.end > start);
        found.map_or(Ok(()), Err)
    }

    /// Removes what was known of a range, splitting what reaches over its ends.
    fn cut(&mut self, first: u64, last: u64) {
        let from = self.written.range(..first).next_back().map_or(first, |(&start, _)| start);
        let touched: Vec<(u64, Written)> =
            self.written.range(from..last).map(|(&start, &written)| (start, written)).collect();
        for (start, written) in touched.into_iter().filter(|(_, w)| w.end_address > first) {
            self.written.remove(&start);
            if start < first {
                self.written.insert(start, Written { end_address: first, ..written });
            }
            if written.end_address > last {
                let source = written.source.map(|source| source + (last - start));
                self.written.insert(last, Written { source, ..written });
            }
        }
    }

    /// Bytes are read; each must be the one that `source` names and must have arrived.
    pub(super) fn read(&mut self, read: Read, source: Option<u64>) -> Result<(), String> {
        self.reads.push(read);
        let last = read.address + read.bytes;
        let from = self.written.range(..=read.address).next_back();
        let first = from.map_or(read.address, |(&start, _)| start);
        let mut covered = read.address;
        for (&start, written) in self.written.range(first..last) {
            if start > covered || written.end_address <= covered {
                continue;
            }
            let expected = source.map(|source| source + (covered - read.address));
            let found = written.source.map(|source| source + (covered - start));
            if found != expected {
                return Err(format!("byte {covered} is {found:?}, not {expected:?}"));
            }
            if written.done > read.start {
                let (done, start) = (written.done, read.start);
                return Err(format!("byte {covered} arrives at {done}, is read at {start}"));
            }
            covered = written.end_address;
            if covered >= last {
                return Ok(());
            }
        }
        Err(format!("byte {covered} was never written"))
    }

    /// Someone reads a range, whatever it holds.
    pub(super) fn note_read(&mut self, read: Read) {
        self.reads.push(read);
    }

    /// The source of a range that was written as one.
    pub(super) fn origin(&self, address: u64, bytes: u64) -> Option<u64> {
        let (&start, written) = self.written.range(..=address).next_back()?;
        (written.end_address >= address + bytes).then_some(())?;
        written.source.map(|source| source + (address - start))
    }
}

impl Memory {
    /// The parts of a range that were written together: where each begins, its size and source;
    /// `None` where a byte was never written.
    pub(super) fn parts(&self, address: u64, bytes: u64) -> Option<Vec<(u64, u64, Option<u64>)>> {
        let mut parts = Vec::new();
        let mut next = address;
        while next < address + bytes {
            let (&start, written) = self.written.range(..=next).next_back()?;
            let end = written.end_address.min(address + bytes);
            if end <= next {
                return None;
            }
            parts.push((next, end - next, written.source.map(|source| source + (next - start))));
            next = end;
        }
        Some(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_of_two_neighbours_checks_both() {
        let mut memory = Memory::default();
        memory.write(0, 10, Some(100), 0, 5).expect("nobody reads");
        memory.write(10, 10, Some(110), 5, 9).expect("nobody reads");
        let read = |start| Read { address: 5, bytes: 10, start, end: start + 10 };
        memory.read(read(9), Some(105)).expect("105..115");
        memory.read(read(8), Some(105)).expect_err("the second half arrives at 9");
        memory.read(read(9), Some(106)).expect_err("another source");
    }

    #[test]
    fn a_write_under_a_read_is_found() {
        let mut memory = Memory::default();
        memory.write(0, 10, Some(100), 0, 5).expect("nobody reads");
        memory.read(Read { address: 0, bytes: 10, start: 5, end: 20 }, Some(100)).expect("there");
        memory.write(8, 4, Some(0), 19, 25).expect_err("read until 20");
        memory.write(0, 4, Some(0), 20, 25).expect("the read is over");
    }
}
