//! Initialisation, devices, contexts and the texts of codes.

use std::ffi::c_char;
use std::ptr;

use super::{Out, put};
use crate::codes::{Code, INVALID_VALUE, describe};
use crate::context::Contexts;
use crate::driver::{call, control, give_back};
use crate::knobs::Knob;

const NAME: &[u8] = b"dgls fake GPU\0";
/// As on every NVIDIA GPU of the last years.
const LEAST_PRIORITY: i32 = 0;
pub(super) const GREATEST_PRIORITY: i32 = -5;

const ASYNC_ENGINE_COUNT: u32 = 40;
const COMPUTE_CAPABILITY_MAJOR: u32 = 75;
const COMPUTE_CAPABILITY_MINOR: u32 = 76;

/// Brings the driver up; `flags` must be 0.
#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: u32) -> Code {
    control(|driver| if flags == 0 { driver.initialize() } else { Err(INVALID_VALUE) })
}

/// The driver's CUDA version; works before `cuInit`.
#[unsafe(no_mangle)]
pub extern "C" fn cuDriverGetVersion(version: Out<'_, i32>) -> Code {
    control(|driver| put(version, driver.knobs.number(Knob::DriverVersion)))
}

/// A code's name; null and 1 for an unknown code.
#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(error: Code, name: Out<'_, *const c_char>) -> Code {
    control(|_| {
        let described = describe(error);
        put(name, described.as_ref().map_or(ptr::null(), |found| found.name.as_ptr()))?;
        described.map(drop).ok_or(INVALID_VALUE)
    })
}

/// A code's text; null and 1 for an unknown code.
#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(error: Code, text: Out<'_, *const c_char>) -> Code {
    control(|_| {
        let described = describe(error);
        put(text, described.as_ref().map_or(ptr::null(), |found| found.text.as_ptr()))?;
        described.map(drop).ok_or(INVALID_VALUE)
    })
}

/// The number of devices.
#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: Out<'_, i32>) -> Code {
    call(|driver| put(count, driver.knobs.number(Knob::Devices)))
}

/// The device with number `ordinal`.
#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(device: Out<'_, i32>, ordinal: i32) -> Code {
    call(|driver| {
        driver.device(ordinal)?;
        put(device, ordinal)
    })
}

/// Writes as much of the device's name as `length` bytes hold, ended by a null byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: i32, device: i32) -> Code {
    call(|driver| {
        driver.device(device)?;
        let room = usize::try_from(length).unwrap_or(0).min(NAME.len());
        if name.is_null() || room == 0 {
            return Err(INVALID_VALUE);
        }
        let name = name.cast::<u8>();
        // SAFETY: the caller's buffer has `length` bytes and `room` is no more than that.
        unsafe { ptr::copy_nonoverlapping(NAME.as_ptr(), name, room) };
        let last = name.wrapping_add(room - 1);
        // SAFETY: `last` is one of the `room` bytes just written.
        unsafe { last.write(0) };
        Ok(())
    })
}

/// The device's memory in bytes.
#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceTotalMem_v2(bytes: Out<'_, usize>, device: i32) -> Code {
    call(|driver| {
        driver.device(device)?;
        put(bytes, usize::try_from(driver.knobs.size(Knob::Vram)).map_err(|_| INVALID_VALUE)?)
    })
}

/// An attribute of the device: compute capability 8.6, two copy engines, 1 for all else.
#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(value: Out<'_, i32>, attribute: u32, device: i32) -> Code {
    call(|driver| {
        driver.device(device)?;
        let answer = match attribute {
            ASYNC_ENGINE_COUNT => 2,
            COMPUTE_CAPABILITY_MAJOR => 8,
            COMPUTE_CAPABILITY_MINOR => 6,
            _ => 1,
        };
        put(value, answer)
    })
}

/// Adds a reference to the device's primary context.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: Out<'_, usize>, device: i32) -> Code {
    call(|driver| {
        let device = driver.device(device)?;
        let context = context.ok_or(INVALID_VALUE)?;
        context.write(driver.contexts.retain(device));
        Ok(())
    })
}

/// Takes a reference away; without one it is 201.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> Code {
    give_back(|driver| driver.contexts.release(driver.device(device)?))
}

/// Whether the device's primary context is alive.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxGetState(
    device: i32,
    flags: Out<'_, u32>,
    active: Out<'_, i32>,
) -> Code {
    call(|driver| {
        let device = driver.device(device)?;
        put(flags, 0)?;
        put(active, driver.contexts.is_active(device).into())
    })
}

/// Makes `context` the calling thread's current one; null takes it away.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: usize) -> Code {
    call(|driver| driver.contexts.set_current(context))
}

/// The calling thread's current context, or null.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetCurrent(context: Out<'_, usize>) -> Code {
    call(|_| put(context, Contexts::current()))
}

/// Blocks until all streams have done their work, destroyed ones included.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        driver.streams.synchronize();
        driver.health()
    })
}

/// The numerically greatest (least urgent) and smallest (most urgent) stream priority.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetStreamPriorityRange(least: Out<'_, i32>, greatest: Out<'_, i32>) -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        put(least, LEAST_PRIORITY)?;
        put(greatest, GREATEST_PRIORITY)
    })
}

/// The bytes of device memory that are free, and that there are.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetInfo_v2(free: Out<'_, usize>, total: Out<'_, usize>) -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        let vram = driver.knobs.size(Knob::Vram);
        let left = vram.saturating_sub(driver.memory.used());
        put(free, usize::try_from(left).map_err(|_| INVALID_VALUE)?)?;
        put(total, usize::try_from(vram).map_err(|_| INVALID_VALUE)?)
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;
    use crate::codes::{INVALID_CONTEXT, INVALID_DEVICE, SUCCESS};
    use crate::testing::{ask, session, set, value};

    #[test]
    fn the_device_describes_itself() {
        let _session = session();
        set("vram", 1 << 20);
        set("driver", 13_000);
        assert_eq!(ask(|out| cuDriverGetVersion(out)), Ok(13_000));
        assert_eq!(ask(|out| cuDeviceGetCount(out)), Ok(1));
        assert_eq!(ask(|out| cuDeviceGet(out, 1)), Err(INVALID_DEVICE));
        assert_eq!(ask(|out| cuDeviceTotalMem_v2(out, 0)), Ok(1 << 20));
        assert_eq!(ask(|out| cuDeviceGetAttribute(out, COMPUTE_CAPABILITY_MAJOR, 0)), Ok(8));
        assert_eq!(cuDeviceGetCount(None), INVALID_VALUE);
    }

    #[test]
    fn a_name_is_cut_to_its_buffer() {
        let _session = session();
        let mut buffer = [1; 8];
        // SAFETY: the buffer has eight bytes.
        let code = unsafe { cuDeviceGetName(buffer.as_mut_ptr(), 8, 0) };
        // SAFETY: the call above ended the name within the buffer.
        let name = unsafe { CStr::from_ptr(buffer.as_ptr()) };
        assert_eq!((code, name), (SUCCESS, c"dgls fa"));
        // SAFETY: nothing is written to a buffer without room.
        assert_eq!(unsafe { cuDeviceGetName(buffer.as_mut_ptr(), 0, 0) }, INVALID_VALUE);
    }

    #[test]
    fn unknown_codes_have_no_name() {
        let name = ask(|out| cuGetErrorName(712, out)).unwrap_or(ptr::null());
        // SAFETY: names are static C strings.
        let name = unsafe { CStr::from_ptr(name) };
        assert_eq!(name, c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED");
        assert_eq!(ask(|out| cuGetErrorString(4242, out)), Err(INVALID_VALUE));
    }

    #[test]
    fn the_primary_context_is_counted_and_current_per_thread() {
        let _session = session();
        let context = ask(|out| cuCtxGetCurrent(out)).unwrap_or_default();
        assert_eq!(ask(|out| cuDevicePrimaryCtxRetain(out, 0)), Ok(context));
        assert_eq!(value("refs"), 2);
        assert_eq!(cuDevicePrimaryCtxRelease_v2(0), SUCCESS);
        let active = ask(|active| {
            cuDevicePrimaryCtxGetState(0, Some(&mut std::mem::MaybeUninit::uninit()), active)
        });
        assert_eq!(active, Ok(1));
        assert_eq!(cuCtxSetCurrent(0), SUCCESS);
        assert_eq!(cuCtxSynchronize(), INVALID_CONTEXT);
        assert_eq!(cuCtxSetCurrent(0xBAD), INVALID_CONTEXT);
        assert_eq!(cuCtxSetCurrent(context), SUCCESS);
    }

    #[test]
    fn a_sticky_error_is_every_calls_answer_until_it_is_taken_off() {
        let _session = session();
        set("sticky", 719);
        assert_eq!(ask(|out| cuDeviceGetCount(out)), Err(719));
        assert_eq!(cuCtxSynchronize(), 719);
        assert_eq!(ask(|out| cuDriverGetVersion(out)), Ok(12_090));
        set("sticky", 0);
        assert_eq!(cuCtxSynchronize(), SUCCESS);
    }
}
