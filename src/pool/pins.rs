//! Host weights that are page-locked in place, at their exact size, within a budget.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::driver::Device;

/// After so many refusals the limit of the system is taken to be reached.
const MOST_REFUSALS: u64 = 4;

/// A range of host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub address: u64,
    /// Size.
    pub bytes: u64,
}

impl Span {
    /// Whether both have a byte in common.
    pub fn meets(&self, other: &Self) -> bool {
        self.address < other.address + other.bytes && other.address < self.address + self.bytes
    }
}

/// The page-locked ranges of one engine; unlocked on drop.
///
/// Not a byte more than the tensors is registered. The driver refuses a copy of a range that is
/// registered in part, so rounding out to pages would break the copies of whatever else lies in
/// the last one (seen as "invalid argument" on the next tensor the caller made). Spans that
/// overlap are locked as one, since a byte can be registered once only.
#[derive(Debug)]
pub struct Pins {
    device: Arc<dyn Device>,
    locked: Vec<Span>,
    failed: u64,
}

impl Pins {
    /// Nothing is page-locked.
    pub fn none(device: Arc<dyn Device>) -> Self {
        Self { device, locked: Vec::new(), failed: 0 }
    }

    /// Locks `spans`, in their order of worth, until `budget_bytes` of whole pages are spent. What
    /// is locked already is not locked again; what no span needs is unlocked only where the budget
    /// has no room for both.
    ///
    /// Never fails: what cannot be locked goes through staging, and is counted. One refusal may be
    /// about one range, which someone else has locked; after a few nothing more is tried, since
    /// where the limit is reached all would fail, and each costs time.
    pub fn lock(&mut self, spans: &[Span], budget_bytes: u64, page: u64) {
        self.lock_while(spans, budget_bytes, page, &mut |_| true);
    }

    /// As [`Pins::lock`], as long as `goes_on`, which is told after each range what it took.
    pub fn lock_while(
        &mut self,
        spans: &[Span],
        budget_bytes: u64,
        page: u64,
        goes_on: &mut dyn FnMut(Duration) -> bool,
    ) {
        let ranges = merge(spans, budget_bytes, page);
        let pages = |range: &Span| page_bytes(range.address, range.address + range.bytes, page);
        let missing: Vec<Span> = ranges.iter().copied().filter(|&r| !self.covers(r)).collect();
        if missing.is_empty() {
            return;
        }
        let needed: u64 = missing.iter().map(pages).fold(0, u64::saturating_add);
        let held = |pins: &Self| pins.locked.iter().map(pages).fold(0, u64::saturating_add);
        if held(self).saturating_add(needed) > budget_bytes || self.overlaps(&missing) {
            let within = |locked: &Span, range: &Span| {
                range.address <= locked.address
                    && locked.address + locked.bytes <= range.address + range.bytes
            };
            let used = |locked: &Span| ranges.iter().any(|range| within(range, locked));
            let (stay, go): (Vec<Span>, Vec<Span>) = self.locked.iter().copied().partition(used);
            self.locked = stay;
            for range in go {
                self.device.page_unlock(range.address, range.bytes);
            }
        }
        let mut left = budget_bytes.saturating_sub(held(self));
        let mut refused = 0;
        for range in missing {
            if pages(&range) > left || self.overlaps(&[range]) {
                continue;
            }
            let begun = Instant::now();
            if self.device.page_lock(range.address, range.bytes).is_err() {
                self.failed += 1;
                refused += 1;
                if refused == MOST_REFUSALS {
                    break;
                }
                continue;
            }
            left -= pages(&range);
            self.locked.push(range);
            if !goes_on(begun.elapsed()) {
                break;
            }
        }
        self.locked.sort_by_key(|range| range.address);
    }

    /// Whether any of the ranges shares bytes with what is locked: a byte is registered once only.
    fn overlaps(&self, ranges: &[Span]) -> bool {
        ranges.iter().any(|range| self.locked.iter().any(|locked| range.meets(locked)))
    }

    /// Takes over what others have locked, which shares no byte with what is locked here.
    pub fn absorb(&mut self, mut other: Self) {
        self.locked.append(&mut other.locked);
        self.locked.sort_by_key(|range| range.address);
    }

    /// Unlocks everything, because staging needs the room; counts as a refusal.
    pub fn give_up(&mut self) {
        for range in self.locked.drain(..) {
            self.device.page_unlock(range.address, range.bytes);
        }
        self.failed += 1;
    }

    /// Unlocks every range that shares bytes with one of the spans. Returns how many bytes that
    /// were.
    pub fn release(&mut self, spans: &[Span]) -> u64 {
        let meets = |range: &Span| spans.iter().any(|span| span.meets(range));
        let (go, stay): (Vec<Span>, Vec<Span>) = self.locked.iter().partition(|range| meets(range));
        self.locked = stay;
        for range in &go {
            self.device.page_unlock(range.address, range.bytes);
        }
        go.iter().map(|range| range.bytes).sum()
    }

    /// The page-locked ranges, by address.
    pub fn spans(&self) -> &[Span] {
        &self.locked
    }

    /// What the system locks for the ranges: whole pages of `page` bytes.
    pub fn page_bytes(&self, page: u64) -> u64 {
        let pages = |range: &Span| page_bytes(range.address, range.address + range.bytes, page);
        self.locked.iter().map(pages).sum()
    }

    /// Whether a whole span is page-locked.
    pub fn covers(&self, span: Span) -> bool {
        let next = self.locked.partition_point(|range| range.address <= span.address);
        next > 0 && {
            let range = self.locked[next - 1];
            span.address + span.bytes <= range.address + range.bytes
        }
    }

    /// Page-locked bytes.
    pub fn bytes(&self) -> u64 {
        self.locked.iter().map(|range| range.bytes).sum()
    }

    /// How many requests the system refused.
    pub fn failed(&self) -> u64 {
        self.failed
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        for range in &self.locked {
            self.device.page_unlock(range.address, range.bytes);
        }
    }
}

/// Bytes of the pages that a range touches: what the system locks for it.
fn page_bytes(start: u64, end: u64, page: u64) -> u64 {
    end.checked_next_multiple_of(page).map_or(u64::MAX, |end| end - start / page * page)
}

/// The spans that fit the budget, by address; those that overlap are joined.
fn merge(spans: &[Span], budget_bytes: u64, page: u64) -> Vec<Span> {
    let mut taken = Vec::new();
    let mut left = budget_bytes;
    for span in spans.iter().filter(|span| span.bytes > 0) {
        let Some(end) = span.address.checked_add(span.bytes) else { continue };
        let pages = page_bytes(span.address, end, page);
        if pages <= left {
            left -= pages;
            taken.push((span.address, end));
        }
    }
    taken.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in taken {
        match merged.last_mut() {
            Some(last) if start < last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged.into_iter().map(|(start, end)| Span { address: start, bytes: end - start }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_a_byte_more_than_the_tensors_is_registered() {
        let spans = [Span { address: 4000, bytes: 200 }, Span { address: 4300, bytes: 100 }];
        assert_eq!(merge(&spans, 1 << 20, 4096), spans);
    }

    #[test]
    fn spans_that_overlap_are_locked_as_one() {
        let spans = [Span { address: 4000, bytes: 200 }, Span { address: 4100, bytes: 200 }];
        assert_eq!(merge(&spans, 1 << 20, 4096), [Span { address: 4000, bytes: 300 }]);
    }

    #[test]
    fn the_budget_counts_whole_pages() {
        let spans = [Span { address: 0, bytes: 4096 }, Span { address: 40_960, bytes: 1 }];
        assert_eq!(merge(&spans, 8191, 4096), [Span { address: 0, bytes: 4096 }]);
        assert_eq!(merge(&spans, 8192, 4096).len(), 2);
    }
}
