//! Device and host memory, copies and fills.

use std::ffi::c_void;

use super::{Out, put};
use crate::codes::{Answer, Code, INVALID_VALUE};
use crate::driver::{Driver, call, give_back};
use crate::knobs::Knob;
use crate::work::{Direction, Span, Work};

/// Allocates device memory.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(pointer: Out<'_, usize>, bytes: usize) -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        let pointer = pointer.ok_or(INVALID_VALUE)?;
        pointer.write(driver.memory.alloc_device(bytes, driver.knobs.size(Knob::Vram))?);
        Ok(())
    })
}

/// Frees device memory once all streams have done their work.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(pointer: usize) -> Code {
    give_back(|driver| {
        driver.streams.synchronize();
        driver.memory.free_device(pointer)
    })
}

/// Allocates device memory, at once rather than in the stream's order.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocAsync(pointer: Out<'_, usize>, bytes: usize, stream: usize) -> Code {
    call(|driver| {
        driver.stream(stream)?;
        let capacity = driver.knobs.size(Knob::Vram);
        put(pointer, driver.memory.alloc_device(bytes, capacity)?)
    })
}

/// Frees device memory in the stream's order.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(pointer: usize, stream: usize) -> Code {
    give_back(|driver| {
        driver.stream(stream)?.push(Work::FreeDevice(pointer));
        Ok(())
    })
}

/// Allocates page-locked host memory; null for 0 bytes.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostAlloc(pointer: Out<'_, usize>, bytes: usize, flags: u32) -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        let pointer = pointer.ok_or(INVALID_VALUE)?;
        driver.knobs.fault(Knob::FailAllocIn)?;
        let limit = driver.knobs.size(Knob::PinCapacity);
        pointer.write(driver.memory.alloc_host(bytes, flags, limit)?);
        Ok(())
    })
}

/// Frees memory of `cuMemHostAlloc` once all streams have done their work.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(pointer: usize) -> Code {
    give_back(|driver| {
        driver.streams.synchronize();
        driver.memory.free_host(pointer)
    })
}

/// Page-locks memory in place; 712 if a part of it already is registered.
#[cfg_attr(not(feature = "missing-symbol"), unsafe(no_mangle))]
pub extern "C" fn cuMemHostRegister_v2(pointer: usize, bytes: usize, flags: u32) -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        driver.knobs.fault(Knob::FailRegisterIn)?;
        let limit = driver.knobs.size(Knob::PinCapacity);
        driver.memory.register(pointer, bytes, flags, limit)
    })
}

/// Undoes `cuMemHostRegister_v2` once all streams have done their work.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(pointer: usize) -> Code {
    give_back(|driver| {
        driver.streams.synchronize();
        driver.memory.unregister(pointer)
    })
}

/// Enqueues a copy from host to device; blocks until it is done if the source is not page-locked.
/// A source that is in part page-locked is refused, one in two registered ranges as well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    target: usize,
    source: *const c_void,
    bytes: usize,
    stream: usize,
) -> Code {
    call(|driver| {
        driver.knobs.fault(Knob::FailCopyIn)?;
        let source = source.expose_provenance();
        copy(driver, Direction::HostToDevice, Span { source, target, bytes }, stream)
    })
}

/// Enqueues a copy from device to host; blocks until it is done if the target is not page-locked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    target: *mut c_void,
    source: usize,
    bytes: usize,
    stream: usize,
) -> Code {
    call(|driver| {
        let target = target.expose_provenance();
        copy(driver, Direction::DeviceToHost, Span { source, target, bytes }, stream)
    })
}

/// Enqueues a copy within the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    target: usize,
    source: usize,
    bytes: usize,
    stream: usize,
) -> Code {
    call(|driver| {
        let stream = driver.stream(stream)?;
        let span = checked(Span { source, target, bytes })?;
        stream.push(Work::Move(span));
        Ok(())
    })
}

/// Enqueues a fill with one byte value.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(
    target: usize,
    value: u8,
    bytes: usize,
    stream: usize,
) -> Code {
    call(|driver| {
        let stream = driver.stream(stream)?;
        if target == 0 && bytes != 0 {
            return Err(INVALID_VALUE);
        }
        stream.push(Work::Fill { target, value, bytes });
        Ok(())
    })
}

pub(super) fn copy(driver: &Driver, direction: Direction, span: Span, stream: usize) -> Answer {
    let stream = driver.stream(stream)?;
    let span = checked(span)?;
    let host = match direction {
        Direction::HostToDevice => span.source,
        Direction::DeviceToHost => span.target,
    };
    let page_locked = driver.memory.is_page_locked(host, span.bytes)?;
    let inward = direction == Direction::HostToDevice && span.bytes > 0;
    let ticket = stream.push(Work::Copy { direction, span });
    let ticket = if inward && driver.knobs.is_due(Knob::FlipCopyIn) {
        stream.push(Work::Flip(span.target + span.bytes / 2))
    } else {
        ticket
    };
    if !page_locked {
        stream.wait_for(ticket);
    }
    driver.health()
}

fn checked(span: Span) -> Result<Span, Code> {
    let somewhere = span.source != 0 && span.target != 0;
    if somewhere || span.bytes == 0 { Ok(span) } else { Err(INVALID_VALUE) }
}

#[cfg(test)]
mod tests {
    use std::ptr;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::api::{cuMemGetInfo_v2, cuStreamDestroy_v2, cuStreamQuery, cuStreamSynchronize};
    use crate::codes::{ALREADY_REGISTERED, INVALID_HANDLE, NOT_READY, OUT_OF_MEMORY, SUCCESS};
    use crate::driver::driver;
    use crate::testing::{Gate, ask, new_stream, session, set, value};

    /// Copies the host bytes at `source` to the host bytes at `target`, which stand for the device.
    fn h2d(target: &mut [u8], source: *const u8, stream: usize) -> Code {
        let address = target.as_mut_ptr().expose_provenance();
        // SAFETY: the tests keep both ranges until the stream is synchronised.
        unsafe { cuMemcpyHtoDAsync_v2(address, source.cast(), target.len(), stream) }
    }

    fn host_block(bytes: usize) -> *mut u8 {
        let address = ask(|out| cuMemHostAlloc(out, bytes, 1)).unwrap_or_default();
        ptr::with_exposed_provenance_mut(address)
    }

    #[test]
    fn a_page_locked_copy_is_asynchronous_and_reads_its_source_late() {
        let _session = session();
        let (stream, source) = (new_stream(), host_block(4));
        let mut target = [0; 4];
        // SAFETY: the block has four bytes.
        unsafe { source.write_bytes(1, 4) };
        let gate = Gate::on(stream);
        assert_eq!(h2d(&mut target, source, stream), SUCCESS);
        assert_eq!((cuStreamQuery(stream), value("ncopies")), (NOT_READY, 0));
        // SAFETY: the block has four bytes, and the gate still holds the copy back.
        unsafe { source.write_bytes(2, 4) };
        gate.open();
        assert_eq!((cuStreamSynchronize(stream), target), (SUCCESS, [2; 4]));
        assert_eq!((value("ncopies"), value("h2d_bytes")), (1, 4));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
        assert_eq!(cuMemFreeHost(source.addr()), SUCCESS);
    }

    #[test]
    fn a_pageable_copy_is_done_when_the_call_returns() {
        let _session = session();
        set("lat_us", 1000);
        let (stream, mut target) = (new_stream(), [0; 4]);
        assert_eq!(h2d(&mut target, [7; 4].as_ptr(), stream), SUCCESS);
        assert_eq!((target, cuStreamQuery(stream)), ([7; 4], SUCCESS));
        let mut back = [0_u8; 4];
        let source = target.as_ptr().expose_provenance();
        // SAFETY: both arrays have four bytes and outlive the call, which waits for the copy.
        let code = unsafe { cuMemcpyDtoHAsync_v2(back.as_mut_ptr().cast(), source, 4, stream) };
        assert_eq!((code, back), (SUCCESS, [7; 4]));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn the_nth_copy_to_the_device_fails() {
        let _session = session();
        let (stream, mut target) = (new_stream(), [0; 1]);
        set("fail_code", 719);
        set("fail_copy_in", 2);
        let codes = [1_u8, 2, 3].map(|byte| h2d(&mut target, &raw const byte, stream));
        assert_eq!((codes, target), ([SUCCESS, 719, SUCCESS], [3]));
        assert_eq!((value("ncopies"), value("fail_copy_in")), (2, 0));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
        assert_eq!(h2d(&mut target, [4].as_ptr(), stream), INVALID_HANDLE);
    }

    #[test]
    fn a_byte_of_the_nth_copy_to_the_device_is_changed() {
        let _session = session();
        let (stream, mut target) = (new_stream(), [0; 3]);
        set("flip_copy_in", 2);
        for expected in [[1, 2, 3], [1, !2, 3], [1, 2, 3]] {
            assert_eq!(h2d(&mut target, [1, 2, 3].as_ptr(), stream), SUCCESS);
            assert_eq!(target, expected);
        }
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn copies_check_their_pointers_only_if_there_is_something_to_copy() {
        let _session = session();
        let (stream, mut target) = (new_stream(), [0; 1]);
        assert_eq!(h2d(&mut target, ptr::null(), stream), INVALID_VALUE);
        assert_eq!(h2d(&mut [], ptr::null(), stream), SUCCESS);
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn host_memory_is_limited_counted_and_fails_when_told() {
        let _session = session();
        set("pin_cap", 8192);
        assert_eq!(ask(|out| cuMemHostAlloc(out, 8193, 1)), Err(OUT_OF_MEMORY));
        let block = host_block(5000);
        assert_eq!((value("pinned"), value("host_ranges")), (8192, 1));
        assert_eq!(cuMemFreeHost(block.addr()), SUCCESS);
        set("fail_alloc_in", 1);
        assert_eq!(ask(|out| cuMemHostAlloc(out, 1, 1)), Err(OUT_OF_MEMORY));
        set("fail_register_in", 1);
        let memory = [0_u8; 64];
        let register = || cuMemHostRegister_v2(memory.as_ptr().addr(), 64, 1);
        assert_eq!(
            [register(), register(), register()],
            [INVALID_VALUE, SUCCESS, ALREADY_REGISTERED]
        );
        assert_eq!(cuMemHostUnregister(memory.as_ptr().addr()), SUCCESS);
        assert_eq!((value("pinned"), value("host_ranges")), (0, 0));
    }

    #[test]
    fn device_memory_is_freed_in_the_streams_order() {
        let _session = session();
        set("vram", 4096);
        let stream = new_stream();
        let block = ask(|out| cuMemAllocAsync(out, 4096, stream)).unwrap_or_default();
        let free = || ask(|free| cuMemGetInfo_v2(free, Some(&mut std::mem::MaybeUninit::uninit())));
        let gate = Gate::on(stream);
        assert_eq!((cuMemFreeAsync(block, stream), free()), (SUCCESS, Ok(0)));
        gate.open();
        assert_eq!((cuStreamSynchronize(stream), free()), (SUCCESS, Ok(4096)));
        assert_eq!(cuMemFree_v2(block), INVALID_VALUE);
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn fills_and_moves_are_ordered_like_copies() {
        let _session = session();
        let stream = new_stream();
        let block = ask(|out| cuMemAlloc_v2(out, 16)).unwrap_or_default();
        // SAFETY: the block has 16 bytes and lives until it is freed below.
        assert_eq!(unsafe { cuMemsetD8Async(block, 9, 8, stream) }, SUCCESS);
        // SAFETY: as above.
        assert_eq!(unsafe { cuMemcpyDtoDAsync_v2(block + 8, block, 8, stream) }, SUCCESS);
        assert_eq!(cuStreamSynchronize(stream), SUCCESS);
        // SAFETY: the stream is done, so nobody writes the block.
        let last = unsafe { ptr::with_exposed_provenance::<u8>(block + 15).read() };
        assert_eq!((last, value("used")), (9, 512));
        assert_eq!((cuMemFree_v2(block), value("used")), (SUCCESS, 0));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn freeing_memory_waits_for_all_streams() {
        let _session = session();
        let (stream, mut target, memory) = (new_stream(), [0; 1], [7_u8; 64]);
        let registered = memory.as_ptr();
        let free: [(*const u8, &dyn Fn(*const u8) -> Code); 2] = [
            (host_block(1), &|block| cuMemFreeHost(block.addr())),
            (registered, &|block| cuMemHostUnregister(block.addr())),
        ];
        assert_eq!(cuMemHostRegister_v2(registered.expose_provenance(), 64, 1), SUCCESS);
        for (done, (source, free)) in (1..).zip(free) {
            let gate = Gate::on(stream);
            assert_eq!(h2d(&mut target, source, stream), SUCCESS);
            assert_eq!(value("ncopies"), done - 1);
            let freed = open_later(&gate, || (free(source), value("ncopies")));
            assert_eq!(freed, (SUCCESS, done));
        }
        let block = ask(|out| cuMemAlloc_v2(out, 1)).unwrap_or_default();
        let gate = Gate::on(stream);
        let freed = open_later(&gate, || (cuMemFree_v2(block), cuStreamQuery(stream)));
        assert_eq!(freed, (SUCCESS, SUCCESS));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    /// Runs `call`, and opens `gate` late enough for a call that does not wait to be seen.
    fn open_later<T>(gate: &Gate, call: impl FnOnce() -> T) -> T {
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::park_timeout(Duration::from_millis(30));
                gate.open();
            });
            call()
        })
    }

    #[test]
    fn each_direction_has_an_engine_of_its_own() {
        let _session = session();
        let (upward, downward, block) = (new_stream(), new_stream(), host_block(2));
        let mut target = [0; 1];
        let busy = driver().engines[Direction::HostToDevice as usize].lock();
        assert_eq!(h2d(&mut target, block, upward), SUCCESS);
        let source = block.addr();
        // SAFETY: the block has two bytes and lives until it is freed below.
        let copied =
            unsafe { cuMemcpyDtoHAsync_v2(block.wrapping_add(1).cast(), source, 1, downward) };
        assert_eq!((copied, cuStreamSynchronize(downward)), (SUCCESS, SUCCESS));
        assert_eq!((value("ncopies"), cuStreamQuery(upward)), (1, NOT_READY));
        drop(busy);
        assert_eq!((cuStreamSynchronize(upward), value("ncopies")), (SUCCESS, 2));
        assert_eq!(cuMemFreeHost(block.addr()), SUCCESS);
        assert_eq!((cuStreamDestroy_v2(upward), cuStreamDestroy_v2(downward)), (SUCCESS, SUCCESS));
    }
}
