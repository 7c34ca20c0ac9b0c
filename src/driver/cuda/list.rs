//! A few copies on the stack: the hot path allocates nothing.

use super::{H2d, Source};

/// At most `MOST` copies.
#[derive(Debug)]
pub(super) struct List<const MOST: usize> {
    copies: [H2d; MOST],
    count: usize,
}

impl<const MOST: usize> List<MOST> {
    pub(super) fn new() -> Self {
        let nothing = H2d { source: Source::Memory { address: 0 }, target: 0, bytes: 0 };
        Self { copies: [nothing; MOST], count: 0 }
    }

    /// # Panics
    ///
    /// If it is full.
    pub(super) fn push(&mut self, copy: H2d) {
        self.copies[self.count] = copy;
        self.count += 1;
    }

    /// Joins a copy out of memory to the last one where it begins at its end, and one copy may read
    /// both: it is asked of the first byte and of how many there are.
    pub(super) fn join(&mut self, copy: H2d, is_one: impl Fn(u64, u64) -> bool) {
        if let Some(last) = self.copies[..self.count].last_mut()
            && last.meets(&copy)
            && let Source::Memory { address } = last.source
            && is_one(address, last.bytes + copy.bytes)
        {
            last.bytes += copy.bytes;
        } else {
            self.push(copy);
        }
    }

    pub(super) fn all(&self) -> &[H2d] {
        &self.copies[..self.count]
    }
}
