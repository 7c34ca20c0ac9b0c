//! Modules and kernel launches.

use std::ffi::{CStr, c_char, c_void};

use super::{Out, put};
use crate::codes::{Code, INVALID_VALUE};
use crate::driver::{call, give_back};
use crate::module::{Function, Module};
use crate::work::Work;

/// Loads a module from PTX text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: Out<'_, usize>, image: *const c_char) -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        if image.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller passes PTX, which is text ended by a null byte.
        let image = unsafe { CStr::from_ptr(image) };
        put(module, driver.modules.insert(Module::new(image.to_string_lossy().into()).into()))
    })
}

/// The module's kernel `name`; 500 if the image has no such entry.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: Out<'_, usize>,
    module: usize,
    name: *const c_char,
) -> Code {
    call(|driver| {
        if name.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller passes text ended by a null byte.
        let name = unsafe { CStr::from_ptr(name) };
        let module = driver.modules.find(module)?;
        put(function, module.function(&name.to_string_lossy(), &driver.functions)?)
    })
}

/// Unloads a module and its kernels.
#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: usize) -> Code {
    give_back(|driver| {
        driver.modules.remove(module)?.unload(&driver.functions);
        Ok(())
    })
}

/// Enqueues a kernel: `fill` fills, any other makes 719 sticky when the stream comes to it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    _grid_x: u32,
    _grid_y: u32,
    _grid_z: u32,
    _block_x: u32,
    _block_y: u32,
    _block_z: u32,
    _shared_bytes: u32,
    stream: usize,
    arguments: *const *const c_void,
    _extra: *const *const c_void,
) -> Code {
    call(|driver| {
        let function = driver.functions.find(function)?;
        let stream = driver.stream(stream)?;
        stream.push(match *function {
            Function::Other => Work::FailingKernel,
            Function::Fill if arguments.is_null() => return Err(INVALID_VALUE),
            // SAFETY: the caller passes `fill`'s three arguments.
            Function::Fill => unsafe { fill(arguments) },
        });
        Ok(())
    })
}

/// # Safety
///
/// `arguments` points to pointers to `fill`'s arguments: the target, the count and the value.
unsafe fn fill(arguments: *const *const c_void) -> Work {
    // SAFETY: the caller's promise: three valid pointers.
    let [target, count, value] = unsafe { arguments.cast::<[*const c_void; 3]>().read() };
    // SAFETY: the first argument is a device pointer.
    let target = unsafe { target.cast::<usize>().read() };
    // SAFETY: the second argument is a 32-bit count.
    let count = unsafe { count.cast::<u32>().read() };
    // SAFETY: the third argument is a 32-bit value.
    let value = unsafe { value.cast::<u32>().read() };
    Work::FillWords { target, count, value }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;
    use crate::api::{cuStreamDestroy_v2, cuStreamSynchronize};
    use crate::codes::{INVALID_HANDLE, LAUNCH_FAILED, NOT_FOUND, SUCCESS};
    use crate::testing::{ask, new_stream, session, set};

    const IMAGE: &CStr = c".visible .entry fill() {} .visible .entry crash() {}";

    fn load() -> usize {
        // SAFETY: the image is a C string.
        ask(|out| unsafe { cuModuleLoadData(out, IMAGE.as_ptr()) }).unwrap_or_default()
    }

    fn function(module: usize, name: &CStr) -> Result<usize, Code> {
        // SAFETY: the name is a C string.
        ask(|out| unsafe { cuModuleGetFunction(out, module, name.as_ptr()) })
    }

    fn launch(function: usize, stream: usize, arguments: &[*const c_void]) -> Code {
        let arguments = arguments.as_ptr();
        // SAFETY: the tests pass what the kernel takes.
        unsafe { cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, arguments, ptr::null()) }
    }

    #[test]
    fn fill_writes_its_words() {
        let _session = session();
        let (stream, module, mut words) = (new_stream(), load(), [0_u32; 4]);
        let (target, count, value) = (words.as_mut_ptr().expose_provenance(), 3_u32, 5_u32);
        let arguments =
            [(&raw const target).cast(), (&raw const count).cast(), (&raw const value).cast()];
        let fill = function(module, c"fill").unwrap_or_default();
        assert_eq!(launch(fill, stream, &arguments), SUCCESS);
        assert_eq!((cuStreamSynchronize(stream), words), (SUCCESS, [5, 5, 5, 0]));
        assert_eq!((cuModuleUnload(module), cuStreamDestroy_v2(stream)), (SUCCESS, SUCCESS));
        assert_eq!(launch(fill, stream, &arguments), INVALID_HANDLE);
    }

    #[test]
    fn another_kernel_fails_when_it_runs_and_the_failure_stays() {
        let _session = session();
        let (stream, module) = (new_stream(), load());
        assert_eq!(function(module, c"absent"), Err(NOT_FOUND));
        let crash = function(module, c"crash").unwrap_or_default();
        assert_eq!(launch(crash, stream, &[]), SUCCESS);
        assert_eq!(cuStreamSynchronize(stream), LAUNCH_FAILED);
        assert_eq!(cuStreamDestroy_v2(stream), LAUNCH_FAILED);
        set("sticky", 0);
        assert_eq!(cuModuleUnload(module), SUCCESS);
    }
}
