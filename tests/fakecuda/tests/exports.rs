//! Which symbols the shared library exports.
//!
//! Goal: everything cudarc looks up for its users is there, or left out as the feature says.
//! Method: look the names up in the library that cargo built.

use std::ffi::CStr;

use libloading::Library;

const ALWAYS: [&CStr; 49] = [
    c"cuInit",
    c"cuDriverGetVersion",
    c"cuGetErrorName",
    c"cuGetErrorString",
    c"cuDeviceGet",
    c"cuDeviceGetCount",
    c"cuDeviceGetName",
    c"cuDeviceTotalMem_v2",
    c"cuDeviceGetAttribute",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuDevicePrimaryCtxGetState",
    c"cuCtxSetCurrent",
    c"cuCtxGetCurrent",
    c"cuCtxSynchronize",
    c"cuCtxGetStreamPriorityRange",
    c"cuStreamCreate",
    c"cuStreamCreateWithPriority",
    c"cuStreamGetPriority",
    c"cuStreamDestroy_v2",
    c"cuStreamSynchronize",
    c"cuStreamQuery",
    c"cuStreamWaitEvent",
    c"cuLaunchHostFunc",
    c"cuEventCreate",
    c"cuEventQuery",
    c"cuEventSynchronize",
    c"cuEventElapsedTime",
    c"cuEventDestroy_v2",
    c"cuMemGetInfo_v2",
    c"cuMemAlloc_v2",
    c"cuMemFree_v2",
    c"cuMemAllocAsync",
    c"cuMemFreeAsync",
    c"cuMemHostAlloc",
    c"cuMemFreeHost",
    c"cuMemHostUnregister",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemcpyDtoDAsync_v2",
    c"cuMemsetD8Async",
    c"cuModuleLoadData",
    c"cuModuleGetFunction",
    c"cuModuleUnload",
    c"cuLaunchKernel",
    c"fakecuda_set",
    c"fakecuda_get",
    c"fakecuda_busy",
    c"fakecuda_read",
];
const WITHOUT_THE_FEATURE: [&CStr; 3] =
    [c"cuMemHostRegister_v2", c"cuEventRecord", c"cuGetProcAddress_v2"];

#[test]
fn the_feature_decides_whether_three_symbols_are_there() {
    // Cargo puts the shared library beside the tests.
    let path = std::env::current_exe().unwrap_or_default().with_file_name("libcuda.so");
    // SAFETY: loading runs no code of the library.
    let library = unsafe { Library::new(&path) };
    let library = library.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let is_exported = |symbol: &CStr| {
        // SAFETY: the symbol is only looked up.
        unsafe { library.get::<*const ()>(symbol.to_bytes_with_nul()) }.is_ok()
    };
    for symbol in ALWAYS {
        assert!(is_exported(symbol), "{symbol:?}");
    }
    for symbol in WITHOUT_THE_FEATURE {
        assert_eq!(is_exported(symbol), !cfg!(feature = "missing-symbol"), "{symbol:?}");
    }
}
