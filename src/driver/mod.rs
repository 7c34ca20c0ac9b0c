//! The device boundary: what the engine asks of a device, and the three that answer.
//!
//! Each engine owns one device value: one copy stream, its events, its staging chunks. Every
//! call enqueues and returns unless its doc says that it blocks.

pub mod cuda;
pub mod host;
pub mod mutant;
pub mod sim;

use crate::codec::Element;
use crate::error::Result;

/// One pair of events, *ready* and *done*, of one use of a block. The engine alternates between
/// two sets, so that the times of one pass can be read while the next is enqueued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventSlot(pub u32);

/// The stream on which the caller's kernels run: torch's current one, looked up at each call.
/// The host device computes on the calling thread and ignores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ComputeStream(pub u64);

/// Where the bytes of one copy come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Host memory that the device can read by itself: page-locked, or any memory for a device
    /// that copies with the processor.
    Memory {
        /// First byte.
        address: u64,
    },
    /// A range of an open file.
    File {
        /// Index into the files that the device was made with.
        file: u32,
        /// First byte.
        offset: u64,
    },
    /// Page-locked host memory that holds one encoded segment (`crate::codec`), for a device that
    /// [`Device::decodes`]. It can only be copied as a whole.
    Encoded {
        /// First byte.
        address: u64,
        /// Encoded bytes.
        bytes: u32,
        /// What they decode to.
        element: Element,
    },
}

impl Source {
    /// The same source, `bytes` further on; an encoded one has no other places.
    #[must_use]
    pub fn advanced(self, bytes: u64) -> Self {
        match self {
            Self::Memory { address } => Self::Memory { address: address + bytes },
            Self::File { file, offset } => Self::File { file, offset: offset + bytes },
            Self::Encoded { .. } => self,
        }
    }

    /// Whether it is encoded.
    pub fn is_encoded(self) -> bool {
        matches!(self, Self::Encoded { .. })
    }
}

/// One copy to the device, among others of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct H2d {
    /// Where the bytes come from.
    pub source: Source,
    /// First byte on the device.
    pub target: u64,
    /// Size.
    pub bytes: u64,
}

impl H2d {
    /// Whether `next` begins where this one ends, in the source and on the device.
    #[must_use]
    pub fn meets(&self, next: &Self) -> bool {
        !self.source.is_encoded()
            && self.source.advanced(self.bytes) == next.source
            && self.target + self.bytes == next.target
    }

    /// What goes over the link for it.
    pub fn link_bytes(&self) -> u64 {
        match self.source {
            Source::Encoded { bytes, .. } => u64::from(bytes),
            Source::Memory { .. } | Source::File { .. } => self.bytes,
        }
    }
}

/// When the marks of one use were passed, in nanoseconds since the device was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UseTimes {
    /// The copy stream began the last stretch of copies of the use: those enqueued at once.
    pub copy_start_ns: u64,
    /// The copy stream finished the last copy of the use: *ready*.
    pub copy_end_ns: u64,
    /// The compute stream arrived at the wait for *ready*.
    pub wait_ns: u64,
    /// The compute stream went on: the block began.
    pub start_ns: u64,
    /// The block ended: *done*.
    pub end_ns: u64,
}

/// A device with one copy stream of its own.
///
/// A wait on an event that was never recorded is a no-op, as in CUDA. Whoever waits must know
/// that the record was enqueued before.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// Has events for `slots` uses and `chunks` staging chunks; those of before count as never
    /// marked. Nothing may be under way.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`] when the driver refuses an event.
    fn prepare(&self, slots: u32, chunks: u32) -> Result<()>;

    /// Copy stream: enqueues a copy of `bytes` bytes to the device address `target`.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`] or [`crate::Error::Read`], at once or from a later call.
    fn copy(&self, source: Source, target: u64, bytes: u64) -> Result<()>;

    /// Copy stream: enqueues a copy within device memory; the ranges do not overlap.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn copy_within(&self, from: u64, to: u64, bytes: u64) -> Result<()>;

    /// Copy stream: enqueues several copies, after all that came before and ahead of all that comes
    /// later. Among themselves they have no order: none may write what another one reads or writes.
    /// Those from encoded sources end with the next [`Device::mark_ready`], or
    /// [`Device::wait_decoded`]; until then later work does not wait for them.
    ///
    /// # Errors
    ///
    /// As [`Device::copy`]; some of the copies may have been enqueued.
    fn copy_batch(&self, copies: &[H2d]) -> Result<()> {
        copies.iter().try_for_each(|copy| self.copy(copy.source, copy.target, copy.bytes))
    }

    /// Whether [`Source::Encoded`] is taken: the bytes are decoded on the device.
    fn decodes(&self) -> bool {
        false
    }

    /// Whether one copy may read all of `bytes` bytes of `source`, which `copy` takes in parts.
    fn takes_as_one(&self, _source: Source, _bytes: u64) -> bool {
        true
    }

    /// Copy stream: enqueues a fill with `value`; used to poison freed bytes.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn fill(&self, target: u64, bytes: u64, value: u8) -> Result<()>;

    /// Copy stream: enqueues a wait for the *done* of a use.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn wait_done(&self, slot: EventSlot) -> Result<()>;

    /// Copy stream: what comes later waits for all copies so far, those from encoded sources too. A
    /// use orders them as well: its *ready* and its *done*.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn wait_decoded(&self) -> Result<()> {
        Ok(())
    }

    /// Copy stream: marks the time at which the copies of a use begin.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn mark_copy_start(&self, slot: EventSlot) -> Result<()>;

    /// Copy stream: marks *ready*, after the last copy of a use.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn mark_ready(&self, slot: EventSlot) -> Result<()>;

    /// Compute stream: marks the time at which a use is arrived at.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn mark_wait(&self, slot: EventSlot, compute: ComputeStream) -> Result<()>;

    /// Compute stream: waits for *ready*; with `timed`, marks the time afterwards.
    ///
    /// The host device blocks the calling thread here: its compute is the calling thread.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`], or the error of the copy that was waited for.
    fn wait_ready(&self, slot: EventSlot, compute: ComputeStream, timed: bool) -> Result<()>;

    /// Compute stream: marks *done*, after the last kernel of a use.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn mark_done(&self, slot: EventSlot, compute: ComputeStream) -> Result<()>;

    /// What was enqueued may begin: a device that starts work by itself does nothing here.
    fn flush(&self) {}

    /// Whether `wait_ready` would block the calling thread now.
    fn blocks_host(&self, _slot: EventSlot) -> bool {
        false
    }

    /// Whether `copy` takes this source as it is; else it goes through a staging chunk.
    fn takes(&self, source: Source, page_locked: bool) -> bool;

    /// Allocates page-locked memory for one staging chunk and returns its address.
    ///
    /// # Errors
    ///
    /// [`crate::Error::PageLock`].
    fn allocate_chunk(&self, bytes: u64) -> Result<u64>;

    /// Gives back what [`Device::allocate_chunk`] returned, after [`Device::finish_reads`].
    fn free_chunk(&self, address: u64, bytes: u64);

    /// Blocks until nothing that was enqueued reads host memory, which is about to be given back.
    /// Does so even where [`Device::quiesce`] fails.
    fn finish_reads(&self);

    /// Looks at the files that sources lie in, and reads nothing.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Read`] for one that changed since it was opened.
    fn check_files(&self) -> Result<()> {
        Ok(())
    }

    /// Reads `bytes` bytes of `source` into host memory at `address`. Blocks.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Read`].
    fn read(&self, source: Source, address: u64, bytes: u64) -> Result<()>;

    /// As [`Device::read`]; a file is read past the page cache where that can be, in whole sectors:
    /// what lies before and behind the range is written as well, out to multiples of
    /// [`host::shim::SECTOR_BYTES`]. Says whether it was read so.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Read`].
    fn read_directly(&self, source: Source, address: u64, bytes: u64) -> Result<bool> {
        self.read(source, address, bytes).map(|()| false)
    }

    /// Copy stream: marks the end of the copy that reads staging chunk `chunk`.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn mark_chunk(&self, chunk: u32) -> Result<()>;

    /// Blocks until the last mark of `chunk` has passed; does not where none was made.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`].
    fn wait_chunk(&self, chunk: u32) -> Result<()>;

    /// Compute stream: reads device memory into host memory at `address`, as a kernel enqueued now
    /// would see it. Blocks until it is there.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`], or [`crate::Error::Invalid`] for a device without bytes.
    fn read_back(&self, _from: u64, _address: u64, _bytes: u64, _on: ComputeStream) -> Result<()> {
        Err(crate::Error::Invalid("this device cannot be read back".into()))
    }

    /// Page-locks host memory in place, at its exact size rounded out to pages.
    ///
    /// # Errors
    ///
    /// [`crate::Error::PageLock`]; the failure is cleared, so that later calls are not blamed.
    fn page_lock(&self, address: u64, bytes: u64) -> Result<()>;

    /// Undoes [`Device::page_lock`].
    fn page_unlock(&self, address: u64, bytes: u64);

    /// The times of a use whose marks have all passed; `None` while one has not. Never blocks.
    fn times(&self, slot: EventSlot) -> Option<UseTimes>;

    /// Blocks until the copy stream is empty and the *done* of `last`, if any, has passed.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Driver`]; what may still be in flight then is not known.
    fn quiesce(&self, last: Option<EventSlot>) -> Result<()>;
}
