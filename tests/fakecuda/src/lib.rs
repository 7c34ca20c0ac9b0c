//! A CUDA driver without a GPU: the driver API's calls on threads and host memory, for tests.
//!
//! The code under test is the real one: it loads `libcuda.so`, and this library answers. Its SONAME
//! is `libcuda.so`, so a process that has loaded it by path gives it to every later
//! `dlopen("libcuda.so")`. Torch asks for `libcuda.so.1` and never meets it. `cargo test` leaves
//! the library in `target/debug/deps`, which is on the tests' `LD_LIBRARY_PATH`: a crate with this
//! one as a dev-dependency finds it without loading it first, and never meets "no driver".
//!
//! The crate is also an `rlib`, for its own unit tests. A process that links the `rlib` *and* loads
//! the library holds two drivers with separate state: control the loaded one through the loaded
//! `fakecuda_set`.
//!
//! # Model
//!
//! * A device pointer is a host pointer. "Device" memory may be any memory of the process.
//! * A stream is a worker thread with a queue. Streams order work only through events; blocking
//!   streams are not ordered against the NULL stream.
//! * The NULL stream (handles 0, 1 and 2) stands for a compute stream whose kernels are code of the
//!   calling thread: a wait on it blocks the caller (`null_sync`).
//! * A copy takes `lat_us` plus its bytes over `bw_mbps`, one copy at a time per direction. It
//!   happens at the worst moment: D2H reads when its time begins, H2D reads and writes when its
//!   time ends. So a forgotten wait shows as wrong data.
//! * A copy from or to memory that is not page-locked returns when the copy is done. One that
//!   begins in a page-locked range has to end in it.
//! * A batch (`cuMemcpyBatchAsync`, of the 12.8 ABI) is enqueued last copy first, since within a
//!   batch no order is promised. It is found through `cuGetProcAddress_v2` alone, by whoever asks a
//!   driver of 12.8 or newer (`driver`) for a version that has this ABI.
//! * Calls that free host or device memory first wait for all streams; destroying a stream or an
//!   event waits for nothing. A destroyed handle is refused with 400.
//! * Two kernels do something: `fill`, and `decode`, which decodes what
//!   `docs/encoded-format.md` describes. It takes `decode_us`, reads and writes then, and fails
//!   where a segment breaks the format or has other tiles than the launch says. Any other kernel
//!   fails.
//! * Created, allocated or registered things need a current context (201), and so does the NULL
//!   stream; a call that names a stream or an event does not. Page-locking needs writable memory,
//!   or `CU_MEMHOSTREGISTER_READ_ONLY`.
//!
//! Codes and waits were compared with driver 13.0 on an H200. It differs in two things: it answers
//! 709 for a destroyed event and crashes on a destroyed stream, and it returns from a small
//! pageable copy as soon as it has staged the bytes.
//!
//! # Control
//!
//! ```c
//! uint32_t fakecuda_set(const char *key, int64_t value);   // 0, or 1: unknown key or bad value
//! uint32_t fakecuda_get(const char *key, int64_t *value);  // 0, or 1: unknown key
//! uint32_t fakecuda_busy(CUstream stream, uint64_t microseconds);
//! uint32_t fakecuda_read(CUstream stream, CUdeviceptr source, size_t bytes, void *target,
//!                        uint64_t microseconds);
//! ```
//!
//! `fakecuda_busy` enqueues a delay. `fakecuda_read` enqueues a slow kernel: a delay, and *then* a
//! copy of the device bytes to `target`, so it sees bytes that were overwritten while in use.
//! Neither these nor the other control calls are counted or failed. To hold a stream until the test
//! says so, enqueue a host function that blocks (`cuLaunchHostFunc`).
//!
//! | key | unit, range | start (environment) | meaning |
//! |---|---|---|---|
//! | `lat_us` | µs | 0 (`FAKECUDA_LAT_US`) | fixed time of each copy |
//! | `bw_mbps` | MB/s, 0: infinite | 0 (`FAKECUDA_BW_MBPS`) | a copy's speed, each direction |
//! | `decode_us` | µs | 0 (`FAKECUDA_DECODE_US`) | time of a decode, before it reads |
//! | `vram` | bytes | 8 GiB (`FAKECUDA_VRAM`) | device memory; `cuMemAlloc` beyond it is 2 |
//! | `pin_cap` | bytes | 64 GiB (`FAKECUDA_PIN`) | memory that may be page-locked; beyond it 2 |
//! | `devices` | count | 1 (`FAKECUDA_DEVICES`) | devices; with 0 `cuInit` is 100 |
//! | `driver` | as CUDA's, 1000 major + 10 minor | 12090 (`FAKECUDA_DRIVER`) | driver version |
//! | `null_sync` | 0, 1 | 1 (`FAKECUDA_NULL_SYNC`) | waits on the NULL stream block the caller |
//! | `init_code` | code, 0: off | 0 (`FAKECUDA_INIT`) | what `cuInit` answers |
//! | `sticky` | code, 0: off | 0 | what every call answers; freeing calls still free |
//! | `fail_code` | code, not 0 | 1 | what the faults below answer |
//! | `fail_copy_in` | n, ≤ 0: off | 0 | the n-th next H2D copy fails (1: the very next) |
//! | `flip_copy_in` | n | 0 | a byte in the middle of the n-th next H2D copy arrives changed |
//! | `fail_alloc_in` | n | 0 | the n-th next `cuMemHostAlloc` fails, always with 2 |
//! | `fail_register_in` | n | 0 | the n-th next `cuMemHostRegister_v2` fails |
//! | `fail_record_in` | n | 0 | the n-th next `cuEventRecord` fails |
//! | `fail_wait_in` | n | 0 | the n-th next `cuStreamWaitEvent` fails |
//! | `fail_stream_create` | n | 0 | the n-th next stream creation fails |
//! | `fail_module_in` | n | 0 | the n-th next `cuModuleLoadData` fails |
//! | `fail_function_in` | n | 0 | the n-th next `cuModuleGetFunction` fails |
//! | `fail_launch_in` | n | 0 | the n-th next `cuLaunchKernel` fails |
//! | `reset` | any (set only) | | all of the above to their start, the counters below to 0 |
//! | `ncalls` | count (get only) | | driver calls; not the ones about codes, version and `cuInit` |
//! | `ncopies` | count (get only) | | copies done, in any direction |
//! | `nbatches` | count (get only) | | calls for a batch |
//! | `h2d_bytes` | bytes (get only) | | bytes copied from host to device |
//!
//! The copies of a batch count one by one: with the one that fails the call fails, and those before
//! it are enqueued. A fault fires once and is then off: `fakecuda_get` shows 0. Codes outside this
//! library's table are refused, since callers that hold codes in an enum must not meet unknown
//! ones.
//!
//! Get only, and not touched by `reset`: `used` (bytes of device memory allocated here), `pinned`
//! (bytes of whole pages page-locked), `host_ranges` (allocated or registered host ranges), `refs`
//! (references to primary contexts), `streams`, `events` and `modules` (made and not destroyed).
//!
//! # Missing symbols
//!
//! With the feature `missing-symbol` the library exports neither `cuMemHostRegister_v2` nor
//! `cuEventRecord` nor `cuGetProcAddress_v2`. Build it into a target directory of its own: the file
//! name is the same.

#![allow(non_snake_case, reason = "exported functions carry the driver API's names")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the contract of each exported function is the driver API's own"
)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("a device pointer must fit a host pointer: 64-bit targets only");

mod api;
mod codes;
mod context;
mod decode;
mod driver;
mod event;
mod handles;
mod knobs;
mod maps;
mod memory;
mod module;
mod stream;
#[cfg(test)]
mod testing;
mod work;

pub use api::*;
pub use codes::*;
pub use work::HostFunction;
