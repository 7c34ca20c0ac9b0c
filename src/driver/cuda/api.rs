//! The driver functions we call, looked up once through cudarc's loader.
//!
//! cudarc's own wrappers panic on a missing symbol and turn result codes into a Rust enum, where
//! a code of a newer driver would be undefined behaviour; so the table keeps codes as numbers.

use std::ffi::{CStr, c_char, c_void};

use cudarc::driver::sys;
use once_cell::sync::OnceCell;

use crate::error::{Error, Result};

pub(super) type Context = sys::CUcontext;
pub(super) type Stream = sys::CUstream;
pub(super) type EventHandle = sys::CUevent;
pub(super) type Module = sys::CUmodule;
pub(super) type Function = sys::CUfunction;

macro_rules! table {
    ($($name:ident($($argument:ty),*);)*) => {
        /// One function pointer for each symbol.
        #[allow(non_snake_case, reason = "the driver's own names")]
        #[derive(Debug)]
        pub(super) struct Api {
            $(pub(super) $name: unsafe extern "system" fn($($argument),*) -> u32,)*
        }

        impl Api {
            fn load() -> Result<Self> {
                Ok(Self {
                    $($name: {
                        let symbol = concat!(stringify!($name), "\0");
                        // SAFETY: the type is the one of cuda.h for this symbol.
                        unsafe { find(symbol) }?
                    },)*
                })
            }
        }
    };
}

table! {
    cuInit(u32);
    cuDriverGetVersion(*mut i32);
    cuGetErrorName(u32, *mut *const c_char);
    cuDeviceGetCount(*mut i32);
    cuDeviceGet(*mut i32, i32);
    cuDevicePrimaryCtxRetain(*mut Context, i32);
    cuDevicePrimaryCtxRelease_v2(i32);
    cuCtxGetCurrent(*mut Context);
    cuCtxSetCurrent(Context);
    cuCtxGetStreamPriorityRange(*mut i32, *mut i32);
    cuStreamCreateWithPriority(*mut Stream, u32, i32);
    cuStreamDestroy_v2(Stream);
    cuStreamSynchronize(Stream);
    cuStreamWaitEvent(Stream, EventHandle, u32);
    cuEventCreate(*mut EventHandle, u32);
    cuEventDestroy_v2(EventHandle);
    cuEventRecord(EventHandle, Stream);
    cuEventQuery(EventHandle);
    cuEventSynchronize(EventHandle);
    cuEventElapsedTime(*mut f32, EventHandle, EventHandle);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, Stream);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, Stream);
    cuMemcpyDtoDAsync_v2(u64, u64, usize, Stream);
    cuMemsetD8Async(u64, u8, usize, Stream);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemHostAlloc(*mut *mut c_void, usize, u32);
    cuMemFreeHost(*mut c_void);
    cuMemHostRegister_v2(*mut c_void, usize, u32);
    cuMemHostUnregister(*mut c_void);
    cuModuleLoadData(*mut Module, *const c_void);
    cuModuleGetFunction(*mut Function, Module, *const c_char);
    cuModuleUnload(Module);
    cuLaunchKernel(
        Function,
        u32,
        u32,
        u32,
        u32,
        u32,
        u32,
        u32,
        Stream,
        *mut *mut c_void,
        *mut *mut c_void
    );
}

/// # Safety
///
/// `T` must be the type of the function that `symbol` names; the name ends in a NUL.
pub(super) unsafe fn find<T: Copy>(symbol: &str) -> Result<T> {
    // SAFETY: the library was found present before.
    let library = unsafe { sys::culib() };
    // SAFETY: the caller vouches for the type.
    match unsafe { library.get::<T>(symbol.as_bytes()) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(Error::NoDriver(format!(
            "the driver library lacks {}; a driver for CUDA 11.2 or newer is needed",
            symbol.trim_end_matches('\0')
        ))),
    }
}

/// The table, looked up at the first call.
///
/// # Errors
///
/// [`Error::NoDriver`] with the reason, from then on at every call.
pub(super) fn api() -> Result<&'static Api> {
    static API: OnceCell<Result<Api>> = OnceCell::new();
    API.get_or_init(probe).as_ref().map_err(Clone::clone)
}

fn probe() -> Result<Api> {
    // SAFETY: opens and closes the library; nothing else runs.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver("libcuda was not found; install the NVIDIA driver".into()));
    }
    // SAFETY: only the presence of the symbol is asked for; it is never called.
    let fake = unsafe { find::<*const c_void>("fakecuda_set\0") }.is_ok();
    if fake && std::env::var_os("DGLS_ALLOW_FAKE").is_none() {
        return Err(Error::NoDriver(
            "the library that was found is a fake for tests; set DGLS_ALLOW_FAKE=1 to use it"
                .into(),
        ));
    }
    let api = Api::load()?;
    // SAFETY: cuInit may be called at any time, any number of times.
    match unsafe { (api.cuInit)(0) } {
        0 => Ok(api),
        34 => Err(Error::NoDriver(
            "the library that was found is the toolkit's stub; remove it from the search path"
                .into(),
        )),
        code => Err(Error::NoDriver(format!("cuInit failed with {code} ({})", api.name(code)))),
    }
}

impl Api {
    /// The driver's name of a result code.
    fn name(&self, code: u32) -> String {
        let mut text = std::ptr::null();
        // SAFETY: writes a pointer to a static string, or null for a code it does not know.
        let known = unsafe { (self.cuGetErrorName)(code, &raw mut text) } == 0 && !text.is_null();
        if !known {
            return "unknown to this driver".into();
        }
        // SAFETY: the driver's strings are static and end in a NUL.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// Allocates device memory outside of torch; the context is current.
    ///
    /// # Errors
    ///
    /// The driver's error.
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut address = 0;
        // SAFETY: writes one address.
        let code = unsafe { (self.cuMemAlloc_v2)(&raw mut address, bytes) };
        self.check("cuMemAlloc", code)?;
        Ok(address)
    }

    /// Frees what [`Api::allocate`] gave.
    pub(super) fn free(&self, address: u64) {
        // SAFETY: the driver refuses what it did not give, or was given back.
        let _ = unsafe { (self.cuMemFree_v2)(address) };
    }

    /// A result code as a result.
    pub(super) fn check(&self, call: &'static str, code: u32) -> Result<()> {
        match code {
            0 => Ok(()),
            code => Err(Error::Driver { call, code, name: self.name(code) }),
        }
    }
}

/// The driver's version, 12090 for 12.9.
///
/// # Errors
///
/// [`Error::NoDriver`] with the reason when there is no usable driver or no device.
pub fn driver_version() -> Result<i32> {
    let api = api()?;
    let (mut version, mut devices) = (0, 0);
    // SAFETY: both write one number.
    api.check("cuDriverGetVersion", unsafe { (api.cuDriverGetVersion)(&raw mut version) })?;
    // SAFETY: as above.
    let code = unsafe { (api.cuDeviceGetCount)(&raw mut devices) };
    match (code, devices) {
        (0, 1..) => Ok(version),
        (0, _) => Err(Error::NoDriver(format!("driver {version} is there, but no device"))),
        (code, _) => Err(Error::NoDriver(format!(
            "cuDeviceGetCount failed with {code} ({})",
            api.name(code)
        ))),
    }
}
