//! Weights with bytes to tell apart, in memory and in a file, and a look at what arrived.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use dgls_core::codec::Element;
use dgls_core::driver::Source;
use dgls_core::driver::host::shim::{Pages, copy};
use dgls_core::engine::Engine;

use crate::random::Random;
use crate::stack::{Stack, index};

/// A model's weights, one tensor behind the other.
pub(crate) struct Weights {
    pub(crate) stack: Stack,
    pages: Pages,
    offsets: Vec<u64>,
}

impl Weights {
    pub(crate) fn new(stack: Stack, seed: u64) -> Self {
        let mut end = 0;
        let mut offsets = Vec::new();
        for tensor in &stack.profile.tensors {
            offsets.push(end);
            end += tensor.bytes;
        }
        let weights = Self { stack, pages: Pages::new(end).expect("host memory"), offsets };
        for tensor in 0..weights.offsets.len() {
            weights.rewrite(tensor, seed);
        }
        weights
    }

    /// Puts other bytes into a tensor.
    pub(crate) fn rewrite(&self, tensor: usize, seed: u64) {
        let mut random = Random::new(seed ^ (tensor as u64) << 32);
        let bytes = usize::try_from(self.stack.bytes(tensor)).expect("small");
        let mut fresh: Vec<u8> = Vec::with_capacity(bytes + 8);
        while fresh.len() < bytes {
            fresh.extend(random.next().to_le_bytes());
        }
        copy(self.address(tensor), fresh.as_ptr() as u64, bytes as u64);
    }

    /// Puts bytes into a tensor that look like trained bf16 weights: few exponents are frequent.
    pub(crate) fn train(&self, tensor: usize, seed: u64) {
        self.train_as(Element::Bf16, tensor, seed);
    }

    /// As [`Weights::train`], with such elements.
    pub(crate) fn train_as(&self, element: Element, tensor: usize, seed: u64) {
        let fresh = trained_as(element, self.stack.bytes(tensor), seed ^ (tensor as u64) << 32);
        copy(self.address(tensor), fresh.as_ptr() as u64, self.stack.bytes(tensor));
    }

    pub(crate) fn address(&self, tensor: usize) -> u64 {
        self.pages.address() + self.offsets[tensor]
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pages.bytes()
    }

    pub(crate) fn in_memory(&self) -> Vec<Source> {
        (0..self.offsets.len())
            .map(|tensor| Source::Memory { address: self.address(tensor) })
            .collect()
    }

    pub(crate) fn in_file(&self) -> Vec<Source> {
        self.offsets.iter().map(|&offset| Source::File { file: 0, offset }).collect()
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        bytes_at(self.pages.address(), self.pages.bytes())
    }

    pub(crate) fn tensor(&self, tensor: usize) -> Vec<u8> {
        bytes_at(self.address(tensor), self.stack.bytes(tensor))
    }

    /// The tensors of a block and where the plan's `position` has them in the arena.
    pub(crate) fn places(
        &self,
        layout: &[(u32, Vec<u64>)],
        position: u32,
    ) -> impl Iterator<Item = (usize, u64)> {
        let (block, offsets) = &layout[index(position)];
        self.stack.tensors[index(*block)].clone().into_iter().zip(offsets.clone())
    }

    /// Enters a block on a device whose kernels are the calling thread, compares, and leaves it.
    pub(crate) fn use_block(
        &self,
        engine: &Engine,
        arena: u64,
        block: u32,
    ) -> dgls_core::Result<()> {
        let compute = dgls_core::driver::ComputeStream(0);
        let position = engine.enter(block, compute)?;
        let layout = engine.layout();
        assert_eq!(layout[index(position)].0, block);
        for (tensor, offset) in self.places(&layout, position) {
            let found = bytes_at(arena + offset, self.stack.bytes(tensor));
            assert!(found == self.tensor(tensor), "tensor {tensor} of block {block}");
        }
        engine.exit(compute)
    }

    /// A whole pass in order.
    pub(crate) fn pass(&self, engine: &Engine, arena: u64) -> dgls_core::Result<()> {
        engine.begin_pass();
        for &block in &self.stack.profile.order {
            self.use_block(engine, arena, block)?;
        }
        engine.end_pass();
        Ok(())
    }
}

/// What the weights of a random model are that are to be encoded: a third of all, half of it fp8.
pub(crate) fn element_of(seed: u64) -> Option<Element> {
    (seed % 3 == 1).then_some(if seed / 8 % 2 == 0 { Element::Bf16 } else { Element::Fp8 })
}

/// So many bytes of weights, half of which have the greatest exponent, a fourth the next one, and
/// so on.
pub(crate) fn trained_as(element: Element, bytes: u64, seed: u64) -> Vec<u8> {
    let bytes = usize::try_from(bytes).expect("small");
    let mut random = Random::new(seed);
    let mut fresh: Vec<u8> = Vec::with_capacity(bytes + 8);
    while fresh.len() < bytes {
        for word in random.next().to_le_bytes().chunks_exact(4) {
            let &[sign, mantissa, other, more] = word else { unreachable!("four of eight") };
            let zeros = u16::from(other | 0x80).trailing_zeros() + u32::from(more & 1);
            let zeros = u8::try_from(zeros).expect("at most 8");
            if element == Element::Fp8 {
                fresh.push(sign & 0x80 | (9 - zeros) << 3 | mantissa & 0x07);
                continue;
            }
            let exponent = u16::from(121 - zeros);
            let bits = u16::from(sign & 1) << 15 | exponent << 7 | u16::from(mantissa & 0x7F);
            fresh.extend(bits.to_le_bytes());
        }
    }
    fresh.truncate(bytes);
    fresh
}

/// A copy of what lies at an address.
pub(crate) fn bytes_at(address: u64, bytes: u64) -> Vec<u8> {
    let found = vec![0_u8; usize::try_from(bytes).expect("small")];
    let found = std::hint::black_box(found);
    copy(found.as_ptr() as u64, address, bytes);
    std::hint::black_box(found)
}

/// A file in the temporary folder, removed on drop.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(contents: &[u8]) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::SeqCst);
        let name = format!("dgls-it-{}-{count}.bin", std::process::id());
        let scratch = Self(std::env::temp_dir().join(name));
        std::fs::write(&scratch.0, contents).expect("the temporary folder is writable");
        scratch
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn text(&self) -> &str {
        self.0.to_str().expect("a UTF-8 path")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
