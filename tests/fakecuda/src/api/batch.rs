//! Batches of copies, and the lookup by name and version that leads to them.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::atomic::Ordering::SeqCst;

use super::memory::copy;
use super::{Out, put};
use crate::codes::{Answer, Code, INVALID_VALUE};
use crate::driver::{Driver, call, control};
use crate::knobs::Knob;
use crate::work::{Direction, Span};

/// The versions that have the `cuMemcpyBatchAsync` below: CUDA 13 has another one.
const FIRST_VERSION: i32 = 12_080;
const NEXT_VERSION: i32 = 13_000;

const FOUND: u32 = 0;
const SYMBOL_NOT_FOUND: u32 = 1;
const VERSION_NOT_SUFFICIENT: u32 = 2;

const STREAM_ORDER: u32 = 1;
/// The NULL stream takes no batches, by either of these handles.
const LEGACY_STREAMS: [usize; 2] = [0, 1];

/// `CUmemcpyAttributes`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    source_order: u32,
    source_hint: [i32; 2],
    target_hint: [i32; 2],
    flags: u32,
}

/// Writes the address of a function, or null, and why. Knows batches only.
#[cfg_attr(not(feature = "missing-symbol"), unsafe(no_mangle))]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    function: Out<'_, *const c_void>,
    version: i32,
    _flags: u64,
    status: Out<'_, u32>,
) -> Code {
    control(|driver| {
        if symbol.is_null() || driver.knobs.number(Knob::DriverVersion) < version {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller passes text ended by a null byte.
        let found = match unsafe { CStr::from_ptr(symbol) }.to_bytes() {
            b"cuMemcpyBatchAsync" if version < FIRST_VERSION => VERSION_NOT_SUFFICIENT,
            b"cuMemcpyBatchAsync" if version < NEXT_VERSION => FOUND,
            _ => SYMBOL_NOT_FOUND,
        };
        let address = cuMemcpyBatchAsync as *const c_void;
        put(function, if found == FOUND { address } else { ptr::null() })?;
        if let Some(status) = status {
            status.write(found);
        }
        Ok(())
    })
}

/// Enqueues copies from host to device, the last one first; those before one that fails are
/// enqueued, and its index is written.
// Not exported: the real library's symbol may be of another version, so no one may take it.
pub unsafe extern "C" fn cuMemcpyBatchAsync(
    targets: *const usize,
    sources: *const usize,
    sizes: *const usize,
    count: usize,
    attributes: *const Attributes,
    first_copies: *const usize,
    attribute_count: usize,
    failed: Out<'_, usize>,
    stream: usize,
) -> Code {
    call(|driver| {
        driver.counters.batches.fetch_add(1, SeqCst);
        let lists = [targets, sources, sizes, first_copies];
        let missing = lists.iter().any(|list| list.is_null()) || attributes.is_null();
        if missing || count == 0 || attribute_count != 1 || LEGACY_STREAMS.contains(&stream) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller's list has one entry.
        let attributes = unsafe { attributes.read() };
        // SAFETY: as above.
        let first_copy = unsafe { first_copies.read() };
        if attributes.source_order != STREAM_ORDER || attributes.flags > 1 || first_copy != 0 {
            return Err(INVALID_VALUE);
        }
        let span = |at: usize| {
            // SAFETY: the caller's list has `count` entries.
            let entry = |list: *const usize| unsafe { list.wrapping_add(at).read() };
            Span { source: entry(sources), target: entry(targets), bytes: entry(sizes) }
        };
        let spans: Vec<Span> = (0..count).map(span).collect();
        let mut good = 0;
        let checked = spans.iter().try_for_each(|span| {
            check(driver, span)?;
            good += 1;
            Ok(())
        });
        for &span in spans[..good].iter().rev() {
            copy(driver, Direction::HostToDevice, span, stream)?;
        }
        if let (Err(_), Some(failed)) = (checked, failed) {
            failed.write(good);
        }
        checked
    })
}

/// One copy of a batch; unlike alone, it may not be empty.
fn check(driver: &Driver, span: &Span) -> Answer {
    driver.knobs.fault(Knob::FailCopyIn)?;
    let something = span.source != 0 && span.target != 0 && span.bytes != 0;
    if something { Ok(()) } else { Err(INVALID_VALUE) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{cuMemFreeHost, cuMemHostAlloc, cuStreamDestroy_v2, cuStreamSynchronize};
    use crate::codes::SUCCESS;
    use crate::testing::{Gate, ask, new_stream, session, set, value};

    const IN_ORDER: Attributes =
        Attributes { source_order: 1, source_hint: [0; 2], target_hint: [0; 2], flags: 0 };

    /// A batch of single bytes; also the index that was written.
    fn batch(
        targets: &[usize],
        sources: &[usize],
        sizes: &[usize],
        stream: usize,
    ) -> (Code, usize) {
        let (count, first) = (targets.len(), 0);
        let (targets, sources, sizes) = (targets.as_ptr(), sources.as_ptr(), sizes.as_ptr());
        let mut failed = std::mem::MaybeUninit::new(usize::MAX);
        let out = Some(&mut failed);
        // SAFETY: the lists have `count` entries; the tests keep the ranges until the stream is
        // synchronised.
        let code = unsafe {
            let first = &raw const first;
            cuMemcpyBatchAsync(targets, sources, sizes, count, &IN_ORDER, first, 1, out, stream)
        };
        // SAFETY: it was written at the start.
        (code, unsafe { failed.assume_init() })
    }

    fn addresses(bytes: &mut [u8]) -> Vec<usize> {
        bytes.iter_mut().map(|byte| (&raw mut *byte).expose_provenance()).collect()
    }

    fn source() -> (usize, Vec<usize>) {
        let address = ask(|out| cuMemHostAlloc(out, 3, 1)).unwrap_or_default();
        for at in 0..3 {
            let byte = ptr::with_exposed_provenance_mut::<u8>(address + usize::from(at));
            // SAFETY: the block has three bytes.
            unsafe { byte.write(at + 1) };
        }
        (address, (address..address + 3).collect())
    }

    #[test]
    fn a_batch_is_asynchronous_and_in_its_streams_order() {
        let _session = session();
        let (stream, mut target) = (new_stream(), [0; 3]);
        let (block, sources) = source();
        let targets = addresses(&mut target);
        let gate = Gate::on(stream);
        assert_eq!(batch(&targets, &sources, &[1; 3], stream).0, SUCCESS);
        assert_eq!((value("ncopies"), value("nbatches")), (0, 1));
        gate.open();
        assert_eq!((cuStreamSynchronize(stream), target), (SUCCESS, [1, 2, 3]));
        assert_eq!((value("ncopies"), value("h2d_bytes")), (3, 3));
        assert_eq!((cuStreamDestroy_v2(stream), cuMemFreeHost(block)), (SUCCESS, SUCCESS));
    }

    #[test]
    fn the_nth_copy_of_a_batch_fails() {
        let _session = session();
        let (stream, mut target) = (new_stream(), [0; 3]);
        let (block, sources) = source();
        let targets = addresses(&mut target);
        set("fail_copy_in", 2);
        set("fail_code", 2);
        assert_eq!(batch(&targets, &sources, &[1; 3], stream), (2, 1));
        assert_eq!((cuStreamSynchronize(stream), target), (SUCCESS, [1, 0, 0]));
        assert_eq!((cuStreamDestroy_v2(stream), cuMemFreeHost(block)), (SUCCESS, SUCCESS));
    }

    #[test]
    fn empty_copies_and_the_null_stream_are_refused() {
        let _session = session();
        let (stream, mut target) = (new_stream(), [0; 3]);
        let (block, sources) = source();
        let targets = addresses(&mut target);
        assert_eq!(batch(&targets, &sources, &[1, 1, 0], stream), (INVALID_VALUE, 2));
        assert_eq!(batch(&targets, &sources, &[1; 3], 0).0, INVALID_VALUE);
        assert_eq!(batch(&targets, &sources, &[1; 3], 1).0, INVALID_VALUE);
        assert_eq!(batch(&[], &[], &[], stream).0, INVALID_VALUE);
        assert_eq!((cuStreamSynchronize(stream), target), (SUCCESS, [1, 2, 0]));
        assert_eq!((cuStreamDestroy_v2(stream), cuMemFreeHost(block)), (SUCCESS, SUCCESS));
    }

    #[test]
    fn the_function_is_found_by_its_version_alone() {
        let _session = session();
        let look = |name: &CStr, version| {
            let mut status = std::mem::MaybeUninit::new(9);
            let out = Some(&mut status);
            // SAFETY: the name is a C string.
            let found = ask(|address| unsafe {
                cuGetProcAddress_v2(name.as_ptr(), address, version, 0, out)
            });
            let found = found.map(|address| !address.is_null());
            // SAFETY: it was written at the start.
            (found, unsafe { status.assume_init() })
        };
        assert_eq!(look(c"cuMemcpyBatchAsync", 12_080), (Ok(true), FOUND));
        assert_eq!(look(c"cuMemcpyBatchAsync", 12_040), (Ok(false), VERSION_NOT_SUFFICIENT));
        assert_eq!(look(c"cuMemcpyBatchAsync_v2", 12_080), (Ok(false), SYMBOL_NOT_FOUND));
        set("driver", 12_040);
        assert_eq!(look(c"cuMemcpyBatchAsync", 12_080), (Err(INVALID_VALUE), 9));
        set("driver", 13_000);
        assert_eq!(look(c"cuMemcpyBatchAsync", 12_080), (Ok(true), FOUND));
        assert_eq!(look(c"cuMemcpyBatchAsync", 13_000), (Ok(false), SYMBOL_NOT_FOUND));
    }
}
