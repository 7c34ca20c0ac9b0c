//! Memory: allocated device blocks, and the host ranges that are page-locked.

use std::alloc::{self, Layout};
use std::collections::BTreeMap;
use std::ptr;

use parking_lot::Mutex;

use crate::codes::{
    ALREADY_REGISTERED, Answer, Code, INVALID_VALUE, NOT_REGISTERED, OUT_OF_MEMORY,
};
use crate::maps::{Access, access};

const DEVICE_ALIGNMENT: usize = 512;
const PAGE_BYTES: usize = 4096;
/// `PORTABLE`, `DEVICEMAP` and `WRITECOMBINED`.
const ALLOC_FLAGS: u32 = 7;
/// `PORTABLE`, `DEVICEMAP`, `IOMEMORY` and `READ_ONLY`.
const REGISTER_FLAGS: u32 = 15;
const REGISTER_READ_ONLY: u32 = 8;
/// Fresh device memory holds this, so that a read before the first copy shows.
const FRESH: u8 = 0xCD;

/// Memory of our own, given back when dropped.
struct Block {
    address: usize,
    layout: Layout,
}

impl Block {
    fn new(bytes: usize, alignment: usize) -> Result<Self, Code> {
        let layout =
            Layout::from_size_align(bytes, alignment).map_err(|_| OUT_OF_MEMORY)?.pad_to_align();
        if layout.size() == 0 {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the layout's size is not 0.
        let pointer = unsafe { alloc::alloc(layout) };
        if pointer.is_null() {
            return Err(OUT_OF_MEMORY);
        }
        Ok(Self { address: pointer.expose_provenance(), layout })
    }

    fn fill(&self, value: u8) {
        let pointer = ptr::with_exposed_provenance_mut::<u8>(self.address);
        // SAFETY: the block is `layout.size()` bytes long and nobody else knows it yet.
        unsafe { pointer.write_bytes(value, self.layout.size()) }
    }

    fn bytes(&self) -> u64 {
        self.layout.size() as u64
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let pointer = ptr::with_exposed_provenance_mut::<u8>(self.address);
        // SAFETY: `alloc` gave out `address` for this layout, and it is given back only here.
        unsafe { alloc::dealloc(pointer, self.layout) }
    }
}

/// A page-locked host range: allocated here if it has a block, else registered.
struct HostRange {
    bytes: usize,
    locked_bytes: u64,
    block: Option<Block>,
}

/// Everything allocated or registered, by address.
///
/// Invariant: host ranges do not overlap.
#[derive(Default)]
pub(crate) struct Memory {
    device: Mutex<BTreeMap<usize, Block>>,
    host: Mutex<BTreeMap<usize, HostRange>>,
}

impl Memory {
    pub(crate) fn alloc_device(&self, bytes: usize, capacity: u64) -> Result<usize, Code> {
        let mut blocks = self.device.lock();
        let used: u64 = blocks.values().map(Block::bytes).sum();
        if capacity.saturating_sub(used) < bytes as u64 {
            return Err(OUT_OF_MEMORY);
        }
        let block = Block::new(bytes, DEVICE_ALIGNMENT)?;
        block.fill(FRESH);
        let address = block.address;
        blocks.insert(address, block);
        Ok(address)
    }

    pub(crate) fn free_device(&self, address: usize) -> Answer {
        if address == 0 {
            return Ok(());
        }
        self.device.lock().remove(&address).map(drop).ok_or(INVALID_VALUE)
    }

    /// Bytes of device memory allocated here.
    pub(crate) fn used(&self) -> u64 {
        self.device.lock().values().map(Block::bytes).sum()
    }

    /// Allocates page-locked memory, with whatever bytes it held; null for 0 bytes.
    pub(crate) fn alloc_host(&self, bytes: usize, flags: u32, limit: u64) -> Result<usize, Code> {
        if flags & !ALLOC_FLAGS != 0 {
            return Err(INVALID_VALUE);
        }
        if bytes == 0 {
            return Ok(0);
        }
        let mut ranges = self.host.lock();
        let locked_bytes = lockable(&ranges, 0, bytes, limit)?;
        let block = Block::new(bytes, PAGE_BYTES)?;
        let address = block.address;
        ranges.insert(address, HostRange { bytes, locked_bytes, block: Some(block) });
        Ok(address)
    }

    pub(crate) fn free_host(&self, address: usize) -> Answer {
        if address == 0 {
            return Ok(());
        }
        let mut ranges = self.host.lock();
        match ranges.get(&address) {
            Some(HostRange { block: Some(_), .. }) => ranges.remove(&address),
            _ => return Err(INVALID_VALUE),
        };
        Ok(())
    }

    /// Page-locks memory that is already there.
    pub(crate) fn register(&self, address: usize, bytes: usize, flags: u32, limit: u64) -> Answer {
        let end = address.checked_add(bytes).ok_or(INVALID_VALUE)?;
        if address == 0 || bytes == 0 || flags & !REGISTER_FLAGS != 0 {
            return Err(INVALID_VALUE);
        }
        let mut ranges = self.host.lock();
        // Ranges do not overlap, so the last one that begins before `end` reaches furthest.
        match ranges.range(..end).next_back() {
            Some((start, range)) if address < start + range.bytes => {
                let allocated = range.block.is_some();
                return Err(if allocated { INVALID_VALUE } else { ALREADY_REGISTERED });
            }
            _ => {}
        }
        match access(address, bytes) {
            Access::ReadWrite => {}
            Access::Read if flags & REGISTER_READ_ONLY != 0 => {}
            Access::Read | Access::None => return Err(INVALID_VALUE),
        }
        let locked_bytes = lockable(&ranges, address, bytes, limit)?;
        ranges.insert(address, HostRange { bytes, locked_bytes, block: None });
        Ok(())
    }

    pub(crate) fn unregister(&self, address: usize) -> Answer {
        let mut ranges = self.host.lock();
        match ranges.range(..=address).next_back() {
            Some((&start, HostRange { block: None, .. })) if start == address => {
                ranges.remove(&address);
                Ok(())
            }
            Some((start, range)) if address < start + range.bytes => Err(INVALID_VALUE),
            _ if address == 0 => Err(INVALID_VALUE),
            _ => Err(NOT_REGISTERED),
        }
    }

    /// Whether one page-locked range holds all of `bytes` bytes at `address`; 1 if it holds the
    /// first ones only.
    pub(crate) fn is_page_locked(&self, address: usize, bytes: usize) -> Result<bool, Code> {
        let ranges = self.host.lock();
        let before = ranges.range(..=address).next_back();
        match before.map(|(start, range)| range.bytes.saturating_sub(address - start)) {
            None | Some(0) => Ok(false),
            Some(left) if left < bytes => Err(INVALID_VALUE),
            Some(_) => Ok(true),
        }
    }

    /// Bytes of whole pages that are page-locked; a page in two ranges counts twice.
    pub(crate) fn pinned(&self) -> u64 {
        pinned(&self.host.lock())
    }

    pub(crate) fn host_ranges(&self) -> usize {
        self.host.lock().len()
    }
}

fn pinned(ranges: &BTreeMap<usize, HostRange>) -> u64 {
    ranges.values().map(|range| range.locked_bytes).sum()
}

/// The bytes of the pages that hold the range, if `limit` still has room for them.
fn lockable(
    ranges: &BTreeMap<usize, HostRange>,
    address: usize,
    bytes: usize,
    limit: u64,
) -> Result<u64, Code> {
    let first = address / PAGE_BYTES;
    let end = (address.checked_add(bytes).ok_or(INVALID_VALUE)?).div_ceil(PAGE_BYTES);
    let needed = (end - first) as u64 * PAGE_BYTES as u64;
    if limit.saturating_sub(pinned(ranges)) < needed { Err(OUT_OF_MEMORY) } else { Ok(needed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLENTY: u64 = 1 << 40;

    /// Page-aligned memory of four pages, and its address.
    fn pages() -> (Block, usize) {
        let block = Block::new(4 * PAGE_BYTES, PAGE_BYTES).unwrap_or_else(|code| panic!("{code}"));
        block.fill(0);
        let address = block.address;
        (block, address)
    }

    #[test]
    fn registering_takes_any_range_that_overlaps_no_other() {
        let (memory, (_pages, at)) = (Memory::default(), pages());
        let register = |address, bytes| memory.register(address, bytes, 1, PLENTY);
        assert_eq!(register(at + 100, 5000), Ok(()));
        for (address, bytes) in [(at + 100, 5000), (at + 200, 1), (at, 101), (at, 16384)] {
            assert_eq!(register(address, bytes), Err(ALREADY_REGISTERED), "{bytes}");
        }
        assert_eq!(register(at, 100), Ok(()));
        assert_eq!(register(at + 5100, 100), Ok(()));
        assert_eq!(memory.host_ranges(), 3);
    }

    #[test]
    fn registering_refuses_nothing_null_and_unmapped() {
        let (memory, (_pages, at)) = (Memory::default(), pages());
        for (address, bytes, flags) in
            [(at, 0, 1), (0, 4096, 1), (at, usize::MAX, 1), (8, 8, 1), (at, 8, 0x100)]
        {
            let answer = memory.register(address, bytes, flags, PLENTY);
            assert_eq!(answer, Err(INVALID_VALUE), "{address} {bytes} {flags}");
        }
        assert_eq!(memory.pinned(), 0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn registering_memory_that_cannot_be_written_needs_the_read_only_flag() {
        static CONSTANT: [u8; 64] = [7; 64];
        let memory = Memory::default();
        let address = CONSTANT.as_ptr().addr();
        assert_eq!(memory.register(address, 64, 1, PLENTY), Err(INVALID_VALUE));
        assert_eq!(memory.register(address, 64, 1 | REGISTER_READ_ONLY, PLENTY), Ok(()));
    }

    #[test]
    fn whole_pages_count_against_the_limit() {
        let (memory, (_pages, at)) = (Memory::default(), pages());
        assert_eq!(memory.register(at + 4000, 200, 1, 8191), Err(OUT_OF_MEMORY));
        assert_eq!(memory.register(at + 4000, 200, 1, 8192), Ok(()));
        assert_eq!(memory.pinned(), 8192);
        assert_eq!(memory.alloc_host(1, 1, 8192 + 4095), Err(OUT_OF_MEMORY));
        assert!(memory.alloc_host(1, 1, 8192 + 4096).is_ok_and(|address| address != 0));
        assert_eq!(memory.unregister(at + 4000), Ok(()));
        assert_eq!(memory.pinned(), 4096);
    }

    #[test]
    fn what_was_allocated_is_freed_and_what_was_registered_is_unregistered() {
        let (memory, (_pages, at)) = (Memory::default(), pages());
        let allocated = memory.alloc_host(8192, 1, PLENTY).unwrap_or_default();
        assert_eq!(memory.register(at, 4096, 1, PLENTY), Ok(()));
        assert_eq!(memory.register(allocated, 4096, 1, PLENTY), Err(INVALID_VALUE));
        assert_eq!(memory.unregister(allocated), Err(INVALID_VALUE));
        assert_eq!(memory.unregister(at + 8), Err(INVALID_VALUE));
        assert_eq!(memory.free_host(at), Err(INVALID_VALUE));
        assert_eq!(memory.unregister(at), Ok(()));
        assert_eq!(memory.unregister(at), Err(NOT_REGISTERED));
        assert_eq!(memory.free_host(allocated), Ok(()));
        assert_eq!(memory.free_host(allocated), Err(INVALID_VALUE));
        assert_eq!(memory.free_host(0), Ok(()));
        assert_eq!(memory.pinned(), 0);
    }

    #[test]
    fn only_ranges_within_one_page_locked_range_are_page_locked() {
        let (memory, (_pages, at)) = (Memory::default(), pages());
        assert_eq!(memory.register(at + 64, 128, 1, PLENTY), Ok(()));
        assert_eq!(memory.register(at + 192, 64, 1, PLENTY), Ok(()));
        assert_eq!(memory.is_page_locked(at + 64, 128), Ok(true));
        assert_eq!(memory.is_page_locked(at + 200, 56), Ok(true));
        assert_eq!(memory.is_page_locked(at + 63, 1), Ok(false));
        assert_eq!(memory.is_page_locked(at + 256, 1), Ok(false));
        // In two ranges, though they touch; and beyond the last one.
        assert_eq!(memory.is_page_locked(at + 128, 128), Err(INVALID_VALUE));
        assert_eq!(memory.is_page_locked(at + 200, 57), Err(INVALID_VALUE));
    }

    #[test]
    fn device_memory_is_limited_and_starts_out_marked() {
        let memory = Memory::default();
        assert_eq!(memory.alloc_device(0, PLENTY), Err(INVALID_VALUE));
        assert_eq!(memory.alloc_device(1025, 1024), Err(OUT_OF_MEMORY));
        let address = memory.alloc_device(1024, 1024).unwrap_or_default();
        // SAFETY: the block is 1024 bytes long and lives until it is freed below.
        let last = unsafe { ptr::with_exposed_provenance::<u8>(address + 1023).read() };
        assert_eq!((last, memory.used()), (FRESH, 1024));
        assert_eq!(memory.alloc_device(1, 1024), Err(OUT_OF_MEMORY));
        assert_eq!(memory.free_device(address), Ok(()));
        assert_eq!(memory.free_device(address), Err(INVALID_VALUE));
        assert_eq!(memory.used(), 0);
    }
}
