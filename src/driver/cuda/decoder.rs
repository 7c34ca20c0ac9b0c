//! Copies that are encoded on the link: through a buffer on the device, decoded by a kernel.
//!
//! The buffer has parts that take turns: while some wait to be decoded on a stream of its own, the
//! next one is copied to. A kernel that fills the device lets no other one in for milliseconds, so
//! there are as many parts as the link fills meanwhile.

use std::ffi::{CString, c_void};

use parking_lot::Mutex;

use super::api::{Api, Function, Module, Stream};
use super::batch::Batches;
use super::copies::copy_one;
use super::list::List;
use super::locks::Locks;
use super::stream::{CopyStream, EVENT_UNTIMED, Event};
use super::{H2d, Source};
use crate::codec::{self, Element};
use crate::error::{Error, Result};
use crate::units::{ALIGN_BYTES, align_up, index, narrow};

/// Bytes of a part, as far as that makes some, and as many as are ever worth it.
const PART_BYTES: u64 = 16 << 20;
const LEAST_PARTS: u64 = 2;
const MOST_PARTS: u64 = 8;
/// Segments of one launch, as in `kernels/decode.cu`.
const MOST_SEGMENTS: usize = 32;
const THREADS: u32 = 256;
/// Each warp of 32 threads decodes a tile.
const TILES_PER_BLOCK: u32 = THREADS / 32;

/// The kernel's text for any device from compute capability 7.0 on; `make ptx` writes it.
const PTX: &str = include_str!("kernels/decode.ptx");

/// The kernel's argument: `Batch` of `kernels/decode.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Batch {
    count: u32,
    /// Tiles of the segments before each.
    first_tile: [u32; MOST_SEGMENTS + 1],
    /// Of each the device address of the encoded bytes, and of the raw ones.
    segments: [[u64; 2]; MOST_SEGMENTS],
}

impl Batch {
    const EMPTY: Self =
        Self { count: 0, first_tile: [0; MOST_SEGMENTS + 1], segments: [[0; 2]; MOST_SEGMENTS] };
}

/// A part of the buffer.
#[derive(Debug)]
struct Part {
    /// Its copies have ended.
    copied: Event,
    /// It may be written again.
    decoded: Event,
}

/// How bytes come to the device as they are.
#[derive(Debug)]
pub(super) struct Link<'a> {
    pub(super) stream: &'a CopyStream,
    pub(super) batches: &'a Batches,
    pub(super) locks: &'a Mutex<Locks>,
}

/// Whose turn it is, and whether something was decoded since the last mark.
#[derive(Debug, Default)]
struct Turn {
    next: usize,
    decodes: bool,
}

/// The kernel, its stream, and the buffer. Work must have ended before it is dropped.
#[derive(Debug)]
pub(super) struct Decoder {
    api: &'static Api,
    parts: Vec<Part>,
    /// The copies so far, for a mark to wait for.
    copied: Event,
    turn: Mutex<Turn>,
    /// One alone: kernels that run beside each other here, or on more parts at once, made passes
    /// up to twice as long (H200, GEMMs of FLUX.1's size beside them).
    stream: CopyStream,
    buffer: u64,
    part_bytes: u64,
    function: Function,
    module: Module,
}

// SAFETY: modules and functions may be used from any thread of the context.
unsafe impl Send for Decoder {}
// SAFETY: as above.
unsafe impl Sync for Decoder {}

impl Decoder {
    /// Loads the kernel and sees that it decodes; a context is current. The buffer of `bytes` bytes
    /// at `buffer` is device memory that the caller keeps alive.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a buffer that is too small, the driver's error, or
    /// [`Error::Internal`] where the kernel decodes wrongly.
    pub(super) fn new(api: &'static Api, buffer: u64, bytes: u64) -> Result<Self> {
        let begin = align_up(buffer);
        let room = (buffer + bytes).saturating_sub(begin);
        let count = (room / PART_BYTES).clamp(LEAST_PARTS, MOST_PARTS);
        let part_bytes = room / count / ALIGN_BYTES * ALIGN_BYTES;
        // None is longer than its raw bytes; the room is that of any of bf16 all the same.
        let need = codec::most_encoded_bytes(Element::Bf16, codec::SEGMENT_BYTES) as u64;
        if part_bytes < need {
            let need = LEAST_PARTS * (need + ALIGN_BYTES);
            return Err(Error::Invalid(format!(
                "the buffer to decode from needs {need} bytes, got {bytes} bytes"
            )));
        }
        let event = || Event::new(api, EVENT_UNTIMED);
        let part = |_| Ok(Part { copied: event()?, decoded: event()? });
        let parts: Vec<Part> = (0..count).map(part).collect::<Result<_>>()?;
        let turn = Mutex::default();
        let (copied, stream) = (event()?, CopyStream::urgent(api)?);
        let (module, function) = load(api)?;
        let decoder =
            Self { api, parts, copied, turn, stream, buffer: begin, part_bytes, function, module };
        Element::ALL.into_iter().try_for_each(|element| decoder.try_out(element))?;
        Ok(decoder)
    }

    /// Enqueues copies from encoded sources; a context is current.
    pub(super) fn copy(&self, copies: &[H2d], link: &Link<'_>) -> Result<()> {
        let mut turn = self.turn.lock();
        let mut rest = copies;
        while !rest.is_empty() {
            let (mut bytes, part) = (0, turn.next);
            let fits = |copy: &&H2d| {
                bytes += copy.link_bytes();
                bytes <= self.part_bytes
            };
            let count = rest.iter().take(MOST_SEGMENTS).take_while(fits).count();
            if count == 0 {
                let found = rest[0].link_bytes();
                return Err(Error::Internal(format!("an encoded segment of {found} bytes")));
            }
            let (now, later) = rest.split_at(count);
            rest = later;
            turn.next = (part + 1) % self.parts.len();
            turn.decodes = true;
            self.copy_part(part, now, link)?;
        }
        Ok(())
    }

    fn copy_part(&self, part: usize, copies: &[H2d], link: &Link<'_>) -> Result<()> {
        let (place, events) = (self.buffer + part as u64 * self.part_bytes, &self.parts[part]);
        let mut batch = Batch { count: narrow(copies.len()), ..Batch::EMPTY };
        let mut encoded = List::<MOST_SEGMENTS>::new();
        let mut at = place;
        for (number, copy) in copies.iter().enumerate() {
            let Source::Encoded { address, bytes, element } = copy.source else {
                return Err(Error::Internal("a copy that is not encoded is not decoded".into()));
            };
            let tiles = narrow(index(copy.bytes / element.tile_bytes() as u64));
            batch.first_tile[number + 1] = batch.first_tile[number] + tiles;
            batch.segments[number] = [at, copy.target];
            let bytes = u64::from(bytes);
            let next = H2d { source: Source::Memory { address }, target: at, bytes };
            encoded.join(next, |address, bytes| link.locks.lock().cover(address, bytes));
            at += bytes;
        }
        events.decoded.hold(link.stream.raw)?;
        if !link.batches.copy(encoded.all(), link.stream)? {
            encoded.all().iter().try_for_each(|copy| copy_one(self.api, copy, link.stream))?;
        }
        events.copied.record(link.stream.raw)?;
        events.copied.hold(self.stream.raw)?;
        self.launch(&mut batch)?;
        events.decoded.record(self.stream.raw)
    }

    fn launch(&self, batch: &mut Batch) -> Result<()> {
        let blocks = batch.first_tile[index(batch.count)].div_ceil(TILES_PER_BLOCK);
        let mut arguments = [std::ptr::from_mut(batch).cast::<c_void>()];
        // SAFETY: the kernel takes one `Batch`, which the driver copies during the call. Sources
        // lie in the buffer, after the copies that this stream has just been made to wait for; the
        // engine checked the targets against the arena, and the link waited for their last use.
        let code = unsafe {
            (self.api.cuLaunchKernel)(
                self.function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                self.stream.raw,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.api.check("cuLaunchKernel", code)
    }

    /// The stream to mark the end of all copies on: this one's, made to wait for those on `link`,
    /// or, if nothing was decoded since the last mark, `link` itself.
    pub(super) fn end_of(&self, link: &CopyStream) -> Result<Stream> {
        if !std::mem::take(&mut self.turn.lock().decodes) {
            return Ok(link.raw);
        }
        self.copied.record(link.raw)?;
        self.copied.hold(self.stream.raw)?;
        Ok(self.stream.raw)
    }

    /// Makes `link` wait for all that was enqueued so far.
    pub(super) fn hold(&self, link: &CopyStream) -> Result<()> {
        let parts = self.parts.len();
        let last = (self.turn.lock().next + parts - 1) % parts;
        self.parts[last].decoded.hold(link.raw)
    }

    /// Blocks until all that was enqueued has been decoded.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }

    /// Decodes a segment with every bit pattern there is, in memory of its own, and compares.
    fn try_out(&self, element: Element) -> Result<()> {
        let raw: Vec<u8> = (0..=u16::MAX).flat_map(|bits| scattered(bits).to_le_bytes()).collect();
        let mut segment = Vec::new();
        if !codec::encode(element, &raw, &mut segment) {
            return Err(Error::Internal("all bit patterns are whole tiles".into()));
        }
        let (raw_bytes, bytes) = (raw.len(), segment.len());
        let memory = Memory::new(self.api, raw_bytes + bytes)?;
        let (target, source) = (memory.address, memory.address + raw_bytes as u64);
        let address = segment.as_ptr() as u64;
        let from = H2d { source: Source::Memory { address }, target: source, bytes: bytes as u64 };
        let stream = &self.stream;
        copy_one(self.api, &from, stream)?;
        let mut batch = Batch { count: 1, ..Batch::EMPTY };
        batch.first_tile[1] = narrow(raw_bytes / element.tile_bytes());
        batch.segments[0] = [source, target];
        self.launch(&mut batch)?;
        let mut found = vec![0_u8; raw_bytes];
        let place = found.as_mut_ptr().cast::<c_void>();
        // SAFETY: `found` has `raw_bytes` bytes and outlives the synchronisation below.
        let code = unsafe { (self.api.cuMemcpyDtoHAsync_v2)(place, target, raw_bytes, stream.raw) };
        self.api.check("cuMemcpyDtoHAsync", code)?;
        stream.synchronize()?;
        if std::hint::black_box(found) == raw {
            return Ok(());
        }
        Err(Error::Internal("the device decodes weights to other bytes than were encoded".into()))
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: loaded once in `new`; nothing of it runs any more.
        let _ = unsafe { (self.api.cuModuleUnload)(self.module) };
    }
}

/// Each number once, in an order in which frequent and rare exponents mix.
fn scattered(number: u16) -> u16 {
    number.wrapping_mul(0x9E37).rotate_left(7)
}

fn load(api: &'static Api) -> Result<(Module, Function)> {
    let text = CString::new(PTX).map_err(|_| Error::Internal("a NUL in the kernel".into()))?;
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the text ends in a NUL; writes one handle.
    let code = unsafe { (api.cuModuleLoadData)(&raw mut module, text.as_ptr().cast()) };
    api.check("cuModuleLoadData", code)?;
    // SAFETY: the module was just loaded; writes one handle.
    let code = unsafe { (api.cuModuleGetFunction)(&raw mut function, module, c"decode".as_ptr()) };
    api.check("cuModuleGetFunction", code).inspect_err(|_| {
        // SAFETY: as in `drop`.
        let _ = unsafe { (api.cuModuleUnload)(module) };
    })?;
    Ok((module, function))
}

/// Device memory outside of torch, for a moment.
struct Memory {
    api: &'static Api,
    address: u64,
}

impl Memory {
    fn new(api: &'static Api, bytes: usize) -> Result<Self> {
        Ok(Self { api, address: api.allocate(bytes)? })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // The stream that used it has been waited for, or failed.
        self.api.free(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_is_the_kernels() {
        assert_eq!(size_of::<Batch>(), 648);
        assert_eq!(std::mem::offset_of!(Batch, segments), 136);
        assert!(PTX.contains(".visible .entry decode("));
    }

    #[test]
    fn all_bit_patterns_are_tried() {
        let mut all: Vec<u16> = (0..=u16::MAX).map(scattered).collect();
        all.sort_unstable();
        assert!(all.iter().copied().eq(0..=u16::MAX));
    }
}
