//! Copies in RAM of what a file holds: each byte is read once, on its way to the device.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::Span;
use crate::driver::Source;
use crate::driver::host::shim::{self, Pages};
use crate::units::index;

/// The copy of one tensor.
#[derive(Debug)]
struct Slot {
    pages: Pages,
    bytes: u64,
    /// What has arrived: ranges, ascending, apart.
    have: Mutex<Vec<(u64, u64)>>,
    full: AtomicBool,
}

/// The copies of one engine, by tensor.
#[derive(Debug, Default)]
pub struct Cache {
    slots: Vec<Option<Slot>>,
    held_bytes: u64,
    /// How many slots have become full so far.
    filled: AtomicU64,
}

impl Cache {
    /// Makes room for the tensors with these sizes, where a size is given, and takes over what
    /// `before` holds of them. Rooms that the system refuses are left out: those tensors are read
    /// from the file. Never holds more than before and after need: what goes, goes first.
    pub fn new(sizes: &[Option<u64>], before: Self) -> Self {
        let mut slots = before.slots;
        slots.resize_with(sizes.len(), || None);
        let fits = |slot: &Slot, size: Option<u64>| size == Some(slot.bytes);
        for (slot, &size) in slots.iter_mut().zip(sizes) {
            *slot = slot.take().filter(|slot| fits(slot, size));
        }
        for (slot, bytes) in slots.iter_mut().zip(sizes) {
            if let (None, Some(bytes)) = (&slot, *bytes) {
                let made = Pages::new(bytes).ok();
                *slot = made.map(|pages| Slot {
                    pages,
                    bytes,
                    have: Mutex::new(Vec::new()),
                    full: AtomicBool::new(false),
                });
            }
        }
        let mut cache = Self { slots, held_bytes: 0, filled: before.filled };
        cache.count();
        cache
    }

    fn count(&mut self) {
        let held = self.slots.iter().flatten().map(|slot| whole_pages(slot.bytes));
        self.held_bytes = held.sum();
    }

    /// Whether a tensor has room here.
    pub fn has(&self, tensor: u32) -> bool {
        self.slot(tensor).is_some()
    }

    fn slot(&self, tensor: u32) -> Option<&Slot> {
        self.slots.get(index(tensor)).and_then(Option::as_ref)
    }

    /// Where a tensor lies here, arrived or not.
    pub fn span(&self, tensor: u32) -> Option<Span> {
        self.slot(tensor).map(|slot| Span { address: slot.pages.address(), bytes: slot.bytes })
    }

    /// Where a tensor can be read from; `None` while it has not arrived as a whole.
    pub fn source(&self, tensor: u32) -> Option<Source> {
        let slot = self.slot(tensor).filter(|slot| slot.full.load(Ordering::Acquire))?;
        Some(Source::Memory { address: slot.pages.address() })
    }

    /// `bytes` bytes at `address` are those of a tensor from `start` on.
    pub fn keep(&self, tensor: u32, start: u64, address: u64, bytes: u64) {
        let Some(slot) = self.slot(tensor) else { return };
        if slot.full.load(Ordering::Acquire) || start + bytes > slot.bytes {
            return;
        }
        // Two threads may bring the same bytes: under the lock one writes after the other, and none
        // once they are read.
        let mut have = slot.have.lock();
        if slot.full.load(Ordering::Acquire) {
            return;
        }
        shim::copy(slot.pages.address() + start, address, bytes);
        add(&mut have, start, start + bytes);
        if have.as_slice() == [(0, slot.bytes)] {
            slot.full.store(true, Ordering::Release);
            self.filled.fetch_add(1, Ordering::Release);
        }
    }

    /// Gives the pages of a tensor back; nothing reads them any more. Returns how many bytes.
    pub fn drop_slot(&mut self, tensor: u32) -> u64 {
        let gone = self.slots.get_mut(index(tensor)).and_then(Option::take);
        self.count();
        gone.map_or(0, |slot| whole_pages(slot.bytes))
    }

    /// The tensors that have room here.
    pub fn tensors(&self) -> impl DoubleEndedIterator<Item = u32> + '_ {
        let numbered = self.slots.iter().enumerate();
        numbered.filter(|(_, slot)| slot.is_some()).map(|(n, _)| crate::units::narrow(n))
    }

    /// Bytes of whole pages held.
    pub fn bytes(&self) -> u64 {
        self.held_bytes
    }

    /// How many tensors have arrived so far, those that are gone again included.
    pub fn filled(&self) -> u64 {
        self.filled.load(Ordering::Acquire)
    }
}

/// What an allocation of `bytes` bytes takes of the machine.
pub fn whole_pages(bytes: u64) -> u64 {
    bytes.next_multiple_of(shim::page_bytes())
}

/// Adds a range to ranges that are ascending and apart.
fn add(have: &mut Vec<(u64, u64)>, start: u64, end: u64) {
    let first = have.partition_point(|range| range.1 < start);
    let last = first + have[first..].partition_point(|range| range.0 <= end);
    let met = &have[first..last];
    let start = met.first().map_or(start, |range| range.0.min(start));
    let end = met.last().map_or(end, |range| range.1.max(end));
    have.splice(first..last, [(start, end)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_meet_are_one() {
        let mut have = Vec::new();
        for (start, end) in [(10, 20), (30, 40), (0, 5), (20, 30), (5, 6)] {
            add(&mut have, start, end);
        }
        assert_eq!(have, [(0, 6), (10, 40)]);
        add(&mut have, 2, 12);
        assert_eq!(have, [(0, 40)]);
    }

    #[test]
    fn a_tensor_is_there_when_its_last_byte_is_and_not_because_a_part_came_twice() {
        let cache = Cache::new(&[None, Some(100)], Cache::default());
        let bytes = vec![7_u8; 100];
        let address = bytes.as_ptr() as u64;
        cache.keep(1, 0, address, 50);
        cache.keep(1, 0, address, 50);
        assert_eq!((cache.source(1), cache.filled()), (None, 0));
        cache.keep(1, 50, address, 50);
        let span = cache.span(1).expect("it has room");
        assert_eq!(cache.source(1), Some(Source::Memory { address: span.address }));
        assert!(!cache.has(0) && cache.filled() == 1);
        let found = vec![0_u8; 100];
        shim::copy(found.as_ptr() as u64, span.address, 100);
        assert_eq!(std::hint::black_box(found), bytes);
    }

    #[test]
    fn what_arrived_is_taken_over_and_counted_in_whole_pages() {
        let page = shim::page_bytes();
        let before = Cache::new(&[Some(page + 1), Some(8), None], Cache::default());
        assert_eq!(before.bytes(), 3 * page);
        let bytes = [1_u8; 8];
        before.keep(1, 0, bytes.as_ptr() as u64, 8);
        let mut after = Cache::new(&[None, Some(8), Some(8)], before);
        assert!(after.source(1).is_some() && after.source(2).is_none());
        assert_eq!(after.bytes(), 2 * page);
        assert_eq!(after.drop_slot(1), page);
        assert_eq!((after.bytes(), after.source(1)), (page, None));
    }
}
