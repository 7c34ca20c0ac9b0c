//! A small ring of page-locked chunks that feeds copies whose source the device cannot read.

use std::sync::Arc;

use crate::driver::Device;
use crate::error::Result;

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
        // Copies out of the chunks may still be in flight. The chunks are given back in any case,
        // a panic's as well.
        self.device.finish_reads();
        for &address in &self.chunks {
            self.device.free_chunk(address, self.chunk_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Source;
    use crate::driver::host::shim::{self, Pages};
    use crate::driver::host::{HostDevice, HostOptions};

    #[test]
    fn a_chunk_goes_when_the_copies_out_of_it_have_ended() {
        let bytes = 1 << 20;
        let options = HostOptions { copy_bytes_per_s: 64 << 20, ..HostOptions::default() };
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(options).expect("a thread"));
        let (arena, eighth) = (Pages::new(bytes).expect("host memory"), bytes / 8);
        let staging = Staging::new(Arc::clone(&device), 1, bytes).expect("a chunk");
        let address = staging.chunks()[0];
        shim::fill(address, 7, bytes);
        for part in 0..8 {
            let (source, target) = (address + part * eighth, arena.address() + part * eighth);
            device.copy(Source::Memory { address: source }, target, eighth).expect("no faults");
        }
        device.flush();
        drop(staging);
        let mut last = [0_u8];
        shim::copy(last.as_mut_ptr() as u64, arena.address() + bytes - 1, 1);
        assert_eq!(last, [7], "the last copy had not begun");
    }
}
