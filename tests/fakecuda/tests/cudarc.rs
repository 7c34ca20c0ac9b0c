//! The library as its users meet it: loaded by path, then found by cudarc under its SONAME.
//!
//! Goal: cudarc's calls reach this library with the right signatures.
//! Method: one copy between two streams and one refused copy, through cudarc; then nothing is left.
#![cfg(not(feature = "missing-symbol"))]

use std::ffi::{CStr, c_char, c_void};

use cudarc::driver::DriverError;
use cudarc::driver::result::{self, event, stream};
use cudarc::driver::sys::{
    self, CUevent_flags::CU_EVENT_DEFAULT, CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
};
use libloading::Library;

const BYTES: usize = 4096;

/// The loaded library's control functions.
struct Control {
    set: unsafe extern "C" fn(*const c_char, i64) -> u32,
    get: unsafe extern "C" fn(*const c_char, *mut i64) -> u32,
    read: unsafe extern "C" fn(sys::CUstream, u64, usize, *mut c_void, u64) -> u32,
    _library: Library,
}

impl Control {
    fn load() -> Result<Self, libloading::Error> {
        // Cargo puts the shared library beside the tests.
        let path = std::env::current_exe().unwrap_or_default().with_file_name("libcuda.so");
        // SAFETY: loading runs no code of the library.
        let library = unsafe { Library::new(path) }?;
        // SAFETY: the signature the crate documents.
        let set = *unsafe { library.get(b"fakecuda_set\0") }?;
        // SAFETY: as above.
        let get = *unsafe { library.get(b"fakecuda_get\0") }?;
        // SAFETY: as above.
        let read = *unsafe { library.get(b"fakecuda_read\0") }?;
        Ok(Self { set, get, read, _library: library })
    }

    fn set(&self, key: &CStr, value: i64) {
        // SAFETY: the key is a C string.
        assert_eq!(unsafe { (self.set)(key.as_ptr(), value) }, 0, "{key:?}");
    }

    fn get(&self, key: &CStr) -> i64 {
        let mut value = -1;
        // SAFETY: a C string and a place for the value.
        assert_eq!(unsafe { (self.get)(key.as_ptr(), &raw mut value) }, 0, "{key:?}");
        value
    }
}

#[test]
fn cudarc_copies_through_it() -> Result<(), DriverError> {
    let control = Control::load().unwrap_or_else(|error| panic!("{error}"));
    // SAFETY: looking for the library runs no code of it.
    assert!(unsafe { sys::is_culib_present() });
    result::init()?;
    assert_eq!(result::device::get_count()?, 1);
    let device = result::device::get(0)?;
    assert_eq!(result::device::get_name(device)?, "dgls fake GPU");
    // SAFETY: the device is the one found above.
    let context = unsafe { result::primary_ctx::retain(device) }?;
    // SAFETY: the context is alive until its release below.
    unsafe { result::ctx::set_current(context) }?;
    assert_eq!(result::ctx::get_current()?, Some(context));
    assert_eq!(result::mem_get_info()?, (8 << 30, 8 << 30));

    copy_between_streams(&control)?;

    // SAFETY: retained above.
    unsafe { result::primary_ctx::release(device) }?;
    for key in [c"streams", c"events", c"host_ranges", c"pinned", c"used", c"refs"] {
        assert_eq!(control.get(key), 0, "{key:?}");
    }
    Ok(())
}

fn copy_between_streams(control: &Control) -> Result<(), DriverError> {
    let (mut slot, mut read) = (vec![0_u8; BYTES], vec![0_u8; BYTES]);
    let target = slot.as_mut_ptr() as sys::CUdeviceptr;
    // SAFETY: freed below.
    let source = unsafe { result::malloc_host(BYTES, sys::CU_MEMHOSTALLOC_PORTABLE) }?;
    // SAFETY: the source has `BYTES` bytes.
    unsafe { source.cast::<u8>().write_bytes(5, BYTES) };
    let slot_start = slot.as_mut_ptr().cast();
    // SAFETY: the slot lives until it is unregistered below.
    unsafe { sys::cuMemHostRegister_v2(slot_start, BYTES, sys::CU_MEMHOSTREGISTER_PORTABLE) }
        .result()?;
    let (least, _) = stream::get_priority_range()?;
    let h2d = stream::create_with_priority(stream::StreamKind::NonBlocking, least)?;
    let compute = stream::create(stream::StreamKind::NonBlocking)?;
    let (start, copied) = (event::create(CU_EVENT_DEFAULT)?, event::create(CU_EVENT_DEFAULT)?);
    control.set(c"lat_us", 2000);

    // SAFETY: all handles and ranges from here live until both streams are synchronised.
    unsafe { event::record(start, h2d) }?;
    // SAFETY: as above.
    unsafe { sys::cuMemcpyHtoDAsync_v2(target, source, BYTES, h2d) }.result()?;
    // SAFETY: as above.
    unsafe { event::record(copied, h2d) }?;
    // SAFETY: as above.
    unsafe { stream::wait_event(compute, copied, CU_EVENT_WAIT_DEFAULT) }?;
    // SAFETY: as above.
    assert_eq!(unsafe { (control.read)(compute, target, BYTES, read.as_mut_ptr().cast(), 10) }, 0);
    // SAFETY: as above.
    unsafe { stream::synchronize(compute) }?;
    assert_eq!((read, control.get(c"h2d_bytes")), (vec![5; BYTES], 4096));
    // SAFETY: both events are recorded and reached.
    assert!(0.0 < unsafe { event::elapsed(start, copied) }?);

    control.set(c"fail_copy_in", 1);
    // SAFETY: the copy is refused.
    let refused = unsafe { sys::cuMemcpyHtoDAsync_v2(target, source, BYTES, h2d) }.result();
    let error = refused.err().unwrap_or_else(|| panic!("the copy went through"));
    assert_eq!(error.error_name()?, c"CUDA_ERROR_INVALID_VALUE");

    for event in [start, copied] {
        // SAFETY: the event is not used any more.
        unsafe { event::destroy(event) }?;
    }
    for stream in [h2d, compute] {
        // SAFETY: the stream is not used any more.
        unsafe { stream::destroy(stream) }?;
    }
    // SAFETY: registered above.
    unsafe { sys::cuMemHostUnregister(slot_start) }.result()?;
    // SAFETY: allocated above.
    unsafe { result::free_host(source) }
}
