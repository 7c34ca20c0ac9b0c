//! Modules and kernel launches.

use std::ffi::{CStr, c_char, c_void};

use super::{Out, put};
use crate::codes::{Code, INVALID_VALUE};
use crate::decode::Batch;
use crate::driver::{call, give_back};
use crate::knobs::Knob;
use crate::module::{Function, Module};
use crate::work::Work;

const DECODE_BLOCK: [u32; 3] = [256, 1, 1];

/// Loads a module from PTX text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: Out<'_, usize>, image: *const c_char) -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        if image.is_null() {
            return Err(INVALID_VALUE);
        }
        driver.knobs.fault(Knob::FailModuleIn)?;
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
        driver.knobs.fault(Knob::FailFunctionIn)?;
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

/// Enqueues a kernel: `fill` fills, `decode` decodes, any other makes 719 sticky when the
/// stream comes to it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    _shared_bytes: u32,
    stream: usize,
    arguments: *const *const c_void,
    _extra: *const *const c_void,
) -> Code {
    call(|driver| {
        let function = driver.functions.find(function)?;
        let stream = driver.stream(stream)?;
        driver.knobs.fault(Knob::FailLaunchIn)?;
        stream.push(match *function {
            Function::Other => Work::FailingKernel,
            _ if arguments.is_null() => return Err(INVALID_VALUE),
            Function::Decode => {
                // SAFETY: the caller passes `decode`'s argument.
                let batch = unsafe { decode(arguments) };
                let block = [block_x, block_y, block_z];
                // A batch that has no right grid crashes when it runs.
                let grid = [batch.blocks().unwrap_or(grid_x), 1, 1];
                if (grid, block) != ([grid_x, grid_y, grid_z], DECODE_BLOCK) {
                    return Err(INVALID_VALUE);
                }
                Work::Decode(batch)
            }
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

/// # Safety
///
/// `arguments` points to a pointer to `decode`'s argument, a [`Batch`] with what it promises.
unsafe fn decode(arguments: *const *const c_void) -> Box<Batch> {
    // SAFETY: the caller's promise: one valid pointer.
    let batch = unsafe { arguments.read() };
    // SAFETY: the argument is a batch, of which any bytes are one.
    Box::new(unsafe { batch.cast::<Batch>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use std::ptr;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::api::{
        cuEventDestroy_v2, cuEventRecord, cuMemFreeHost, cuMemHostAlloc, cuMemcpyHtoDAsync_v2,
        cuStreamDestroy_v2, cuStreamQuery, cuStreamSynchronize, cuStreamWaitEvent,
    };
    use crate::codes::{INVALID_HANDLE, LAUNCH_FAILED, NOT_FOUND, NOT_READY, SUCCESS};
    use crate::testing::{Gate, ask, new_event, new_stream, plain_segment, session, set, value};

    const IMAGE: &CStr =
        c".visible .entry fill() {} .visible .entry decode() {} .visible .entry crash() {}";

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

    /// `decode`'s argument, byte by byte.
    #[derive(Clone)]
    struct Argument([u8; 648]);

    impl Argument {
        fn new<const N: usize>(segments: [(&[u8], &mut [u16]); N]) -> Self {
            let mut argument = Self([0; 648]);
            argument.put(0, &N.to_le_bytes()[..4]);
            let mut tiles = 0_u32;
            for (index, (source, target)) in segments.into_iter().enumerate() {
                tiles += u32::from(source[4]);
                argument.put(8 + 4 * index, &tiles.to_le_bytes());
                let (source, target) = (source.as_ptr(), target.as_mut_ptr());
                argument.put(136 + 16 * index, &source.expose_provenance().to_le_bytes());
                argument.put(144 + 16 * index, &target.expose_provenance().to_le_bytes());
            }
            argument
        }

        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.0[at..][..bytes.len()].copy_from_slice(bytes);
        }

        fn launch(&self, grid: [u32; 3], block: [u32; 3], stream: usize) -> Code {
            let module = load();
            let decode = function(module, c"decode").unwrap_or_default();
            let ([x, y, z], [bx, by, bz]) = (grid, block);
            let arguments = [self.0.as_ptr().cast()];
            let (arguments, extra) = (arguments.as_ptr(), ptr::null());
            // SAFETY: the tests keep the segments until the stream is synchronised.
            let code =
                unsafe { cuLaunchKernel(decode, x, y, z, bx, by, bz, 0, stream, arguments, extra) };
            // It answers 719 if the kernel has failed already.
            cuModuleUnload(module);
            code
        }
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

    #[test]
    fn a_batch_is_copied_at_launch_and_decoded_in_its_streams_order() {
        let _session = session();
        let (stream, first, second) = (new_stream(), plain_segment(&[7]), plain_segment(&[30; 9]));
        let (mut left, mut right) = (vec![0; 1024], vec![0; 9 * 1024]);
        let mut argument = Argument::new([(&first, &mut left), (&second, &mut right)]);
        let gate = Gate::on(stream);
        let calls = value("ncalls");
        assert_eq!(argument.launch([2, 1, 1], [256, 1, 1], stream), SUCCESS);
        // Beside the launch, three calls for the module and its function.
        assert_eq!(value("ncalls"), calls + 4);
        argument.0.fill(0);
        assert_eq!((cuStreamQuery(stream), &left), (NOT_READY, &vec![0; 1024]));
        gate.open();
        assert_eq!(cuStreamSynchronize(stream), SUCCESS);
        assert_eq!((left, right), (vec![11 << 7; 1024], vec![34 << 7; 9 * 1024]));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn a_launch_with_a_wrong_grid_or_block_or_without_arguments_is_refused() {
        let _session = session();
        let (stream, segment, mut target) =
            (new_stream(), plain_segment(&[1; 9]), vec![0; 9 * 1024]);
        let argument = Argument::new([(&segment, &mut target)]);
        for grid in [[1, 1, 1], [3, 1, 1], [2, 2, 1], [2, 1, 2]] {
            assert_eq!(argument.launch(grid, [256, 1, 1], stream), INVALID_VALUE, "{grid:?}");
        }
        for block in [[128, 1, 1], [256, 2, 1], [256, 1, 2]] {
            assert_eq!(argument.launch([2, 1, 1], block, stream), INVALID_VALUE, "{block:?}");
        }
        let module = load();
        for name in [c"fill", c"decode"] {
            let function = function(module, name).unwrap_or_default();
            let none = ptr::null();
            // SAFETY: nothing is read from null.
            let code = unsafe {
                cuLaunchKernel(function, 2, 1, 1, 256, 1, 1, 0, stream, none, none.cast())
            };
            assert_eq!(code, INVALID_VALUE, "{name:?}");
        }
        assert_eq!((cuStreamSynchronize(stream), target[0]), (SUCCESS, 0));
        assert_eq!((cuModuleUnload(module), cuStreamDestroy_v2(stream)), (SUCCESS, SUCCESS));
    }

    #[test]
    fn a_wrong_batch_fails_when_it_runs_and_the_failure_stays() {
        let _session = session();
        let (stream, segment, mut target) = (new_stream(), plain_segment(&[1, 2]), [0; 2 * 1024]);
        let good = Argument::new([(&segment, &mut target)]);
        let garbage = vec![0; segment.len()];
        let address = garbage.as_ptr().expose_provenance().to_le_bytes();
        // No segment, too many, fewer tiles than the segment has, and a source that holds none.
        let wrong: [(usize, &[u8]); 4] = [(0, &[0]), (0, &[33]), (8, &[1]), (136, &address)];
        for (at, bytes) in wrong {
            let mut argument = good.clone();
            argument.put(at, bytes);
            assert_eq!(argument.launch([1, 1, 1], [256, 1, 1], stream), SUCCESS, "at {at}");
            assert_eq!(cuStreamSynchronize(stream), LAUNCH_FAILED, "at {at}: {bytes:?}");
            assert_eq!(cuStreamQuery(stream), LAUNCH_FAILED);
            set("sticky", 0);
        }
        assert_eq!(good.launch([1, 1, 1], [256, 1, 1], stream), SUCCESS);
        assert_eq!((cuStreamSynchronize(stream), target[1024]), (SUCCESS, 6 << 7));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn an_event_orders_a_decode_behind_the_copy_of_its_source() {
        let _session = session();
        let (copies, kernels, event) = (new_stream(), new_stream(), new_event());
        let (segment, mut slot, mut target) = (plain_segment(&[5]), plain_segment(&[1]), [0; 1024]);
        let argument = Argument::new([(&slot, &mut target)]);
        let host = ask(|out| cuMemHostAlloc(out, segment.len(), 0)).unwrap_or_default();
        let (source, slot) = (ptr::with_exposed_provenance_mut::<u8>(host), slot.as_mut_ptr());
        // SAFETY: the block has as many bytes as the segment.
        unsafe { source.copy_from(segment.as_ptr(), segment.len()) };
        let gate = Gate::on(copies);
        // SAFETY: source and slot outlive the copy, which is waited for below.
        let code = unsafe {
            cuMemcpyHtoDAsync_v2(slot.expose_provenance(), source.cast(), segment.len(), copies)
        };
        assert_eq!((code, cuEventRecord(event, copies)), (SUCCESS, SUCCESS));
        assert_eq!(cuStreamWaitEvent(kernels, event, 0), SUCCESS);
        assert_eq!(argument.launch([1, 1, 1], [256, 1, 1], kernels), SUCCESS);
        assert_eq!(cuStreamQuery(kernels), NOT_READY);
        gate.open();
        assert_eq!((cuStreamSynchronize(kernels), target), (SUCCESS, [9 << 7; 1024]));
        assert_eq!((cuEventDestroy_v2(event), cuMemFreeHost(host)), (SUCCESS, SUCCESS));
        assert_eq!((cuStreamDestroy_v2(copies), cuStreamDestroy_v2(kernels)), (SUCCESS, SUCCESS));
    }

    #[test]
    fn a_decode_takes_its_time() {
        let _session = session();
        let (stream, segment, mut target) = (new_stream(), plain_segment(&[5]), [0; 1024]);
        set("decode_us", 30_000);
        let start = Instant::now();
        let argument = Argument::new([(&segment, &mut target)]);
        assert_eq!(argument.launch([1, 1, 1], [256, 1, 1], stream), SUCCESS);
        assert_eq!((cuStreamSynchronize(stream), target), (SUCCESS, [9 << 7; 1024]));
        assert!(Duration::from_millis(30) <= start.elapsed());
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn loading_finding_and_launching_fail_when_told() {
        let _session = session();
        let (stream, module) = (new_stream(), load());
        // SAFETY: the image is a C string.
        let load = || ask(|out| unsafe { cuModuleLoadData(out, IMAGE.as_ptr()) });
        for code in [218, 221, 222] {
            set("fail_code", code.into());
            set("fail_module_in", 1);
            assert_eq!(
                (load(), load().map(|module| cuModuleUnload(module))),
                (Err(code), Ok(SUCCESS))
            );
        }
        set("fail_function_in", 2);
        let crash = function(module, c"crash").unwrap_or_default();
        assert_eq!(function(module, c"crash"), Err(222));
        set("fail_launch_in", 1);
        assert_eq!(launch(crash, stream, &[]), 222);
        assert_eq!((cuStreamSynchronize(stream), cuModuleUnload(module)), (SUCCESS, SUCCESS));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }
}
