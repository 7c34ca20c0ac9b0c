//! A small ring of page-locked chunks that feeds copies whose source the device cannot read.

use std::sync::Arc;

use crate::driver::{Device, Source};
use crate::error::Result;
use crate::fence::fence;

/// The chunks, used in turn. A chunk is filled again only after the copy out of it has passed.
#[derive(Debug)]
pub struct Staging {
    device: Arc<dyn Device>,
    chunks: Vec<u64>,
    chunk_bytes: u64,
    next: usize,
}

impl Staging {
    /// Allocates `count` chunks of `chunk_bytes` bytes each.
    ///
    /// # Errors
    ///
    /// [`crate::Error::PageLock`] when not even one chunk can be had; fewer than asked for are
    /// accepted, since one is enough to be correct.
    pub fn new(device: Arc<dyn Device>, count: u32, chunk_bytes: u64) -> Result<Self> {
        let mut staging = Self { device, chunks: Vec::new(), chunk_bytes, next: 0 };
        for _ in 0..count.max(1) {
            match staging.device.allocate_chunk(chunk_bytes) {
                Ok(address) => staging.chunks.push(address),
                Err(error) if staging.chunks.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(staging)
    }

    /// How many chunks there are.
    pub fn count(&self) -> u32 {
        crate::units::narrow(self.chunks.len())
    }

    /// Page-locked bytes held.
    pub fn bytes(&self) -> u64 {
        self.chunk_bytes * self.chunks.len() as u64
    }

    /// Fills chunks from `source` and enqueues a copy out of each. Blocks while all chunks are
    /// in flight, and while the source is read.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Read`] or [`crate::Error::Driver`].
    pub fn copy(&mut self, source: Source, target: u64, bytes: u64) -> Result<()> {
        let mut moved = 0;
        while moved < bytes {
            let part = self.chunk_bytes.min(bytes - moved);
            let (chunk, address) = (crate::units::narrow(self.next), self.chunks[self.next]);
            self.device.wait_chunk(chunk)?;
            self.device.read(source.advanced(moved), address, part)?;
            self.device.copy(Source::Memory { address }, target + moved, part)?;
            self.device.mark_chunk(chunk)?;
            self.next = (self.next + 1) % self.chunks.len();
            moved += part;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Copies out of the chunks may still be in flight. An error here was told already, by the
        // call that caused it; the chunks are given back in any case, a panic's as well.
        let _ = fence(|| self.device.quiesce(None));
        for &address in &self.chunks {
            self.device.free_chunk(address, self.chunk_bytes);
        }
    }
}
