//! A small ring of page-locked chunks that feeds copies whose source the device cannot read.

use std::sync::Arc;

use crate::driver::Device;
use crate::error::Result;
use crate::fence::fence;

/// The chunks. One is filled again only after the copies out of it have passed.
#[derive(Debug)]
pub struct Staging {
    device: Arc<dyn Device>,
    chunks: Vec<u64>,
    chunk_bytes: u64,
}

impl Staging {
    /// Allocates `count` chunks of `chunk_bytes` bytes each.
    ///
    /// # Errors
    ///
    /// [`crate::Error::PageLock`] when not even one chunk can be had; fewer than asked for are
    /// accepted, since one is enough to be correct.
    pub fn new(device: Arc<dyn Device>, count: u32, chunk_bytes: u64) -> Result<Self> {
        let mut staging = Self { device, chunks: Vec::new(), chunk_bytes };
        for _ in 0..count.max(1) {
            match staging.device.allocate_chunk(chunk_bytes) {
                Ok(address) => staging.chunks.push(address),
                Err(error) if staging.chunks.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(staging)
    }

    /// The first byte of each chunk.
    pub fn chunks(&self) -> &[u64] {
        &self.chunks
    }

    /// Bytes of one chunk.
    pub fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// Page-locked bytes held.
    pub fn bytes(&self) -> u64 {
        self.chunk_bytes * self.chunks.len() as u64
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
