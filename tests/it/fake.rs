//! The fake CUDA driver, as one test at a time holds it: its knobs, counters and streams.
#![expect(unsafe_code, reason = "calls the loaded library's functions")]

use std::ffi::{CString, c_char, c_void};
use std::sync::OnceLock;

use dgls_core::driver::ComputeStream;
use dgls_core::driver::host::shim::Pages;
use libloading::Library;
use parking_lot::{Mutex, MutexGuard};

use crate::weights::bytes_at;

macro_rules! functions {
    ($($name:ident($($argument:ty),*);)*) => {
        #[expect(non_snake_case, reason = "the driver's own names")]
        struct Fake {
            $($name: unsafe extern "C" fn($($argument),*) -> u32,)*
            _library: Library,
        }

        impl Fake {
            fn bind(library: Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $($name: {
                        let symbol = concat!(stringify!($name), "\0");
                        // SAFETY: the signature that the crate documents.
                        *unsafe { library.get(symbol.as_bytes()) }?
                    },)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    fakecuda_set(*const c_char, i64);
    fakecuda_get(*const c_char, *mut i64);
    fakecuda_read(u64, u64, u64, *mut c_void, u64);
    cuInit(u32);
    cuDevicePrimaryCtxRetain(*mut u64, i32);
    cuDevicePrimaryCtxRelease_v2(i32);
    cuCtxGetCurrent(*mut u64);
    cuCtxSetCurrent(u64);
    cuStreamCreate(*mut u64, u32);
    cuStreamDestroy_v2(u64);
    cuStreamSynchronize(u64);
}

/// Loads the library, so that everyone who asks for libcuda.so gets it.
pub(crate) fn load() -> Library {
    // Cargo puts the shared library beside the tests.
    let path = std::env::current_exe().expect("a path").with_file_name("libcuda.so");
    // SAFETY: loading runs no code of the library.
    unsafe { Library::new(path) }.unwrap_or_else(|error| panic!("{error}"))
}

fn fake() -> &'static Fake {
    static FAKE: OnceLock<Fake> = OnceLock::new();
    FAKE.get_or_init(|| {
        // SAFETY: all that reads the environment in this process does so through std, which locks.
        unsafe { std::env::set_var("DGLS_ALLOW_FAKE", "1") };
        let fake = Fake::bind(load()).unwrap_or_else(|error| panic!("{error}"));
        // SAFETY: no pointers.
        assert_eq!(unsafe { (fake.cuInit)(0) }, 0);
        fake
    })
}

/// What a test has to give back.
const LIVE: [&str; 7] = ["streams", "events", "modules", "host_ranges", "pinned", "used", "refs"];

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The driver, reset, with a context for this thread and two streams for kernels.
pub(crate) struct Session {
    fake: &'static Fake,
    streams: Vec<u64>,
    /// What others left behind, after a failure: no fault of this test.
    before: [i64; LIVE.len()],
    _alone: MutexGuard<'static, ()>,
}

/// A slow kernel's result: the bytes that it saw at its end.
pub(crate) struct Seen {
    target: Pages,
}

impl Seen {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        bytes_at(self.target.address(), self.target.bytes())
    }
}

fn answer(call: impl FnOnce(*mut u64) -> u32) -> u64 {
    let mut value = 0;
    assert_eq!(call(&raw mut value), 0);
    value
}

impl Session {
    pub(crate) fn new() -> Self {
        let alone = ONE_AT_A_TIME.lock();
        let mut session =
            Self { fake: fake(), streams: Vec::new(), before: [0; LIVE.len()], _alone: alone };
        session.set("reset", 0);
        session.before = LIVE.map(|key| session.get(key));
        session.set_context(session.retain(0));
        // SAFETY: writes one handle.
        let stream = || answer(|out| unsafe { (session.fake.cuStreamCreate)(out, 1) });
        session.streams = vec![stream(), stream()];
        session
    }

    pub(crate) fn set(&self, key: &str, value: i64) {
        let name = CString::new(key).expect("no NUL");
        // SAFETY: the key is a C string.
        assert_eq!(unsafe { (self.fake.fakecuda_set)(name.as_ptr(), value) }, 0, "{key}");
    }

    pub(crate) fn get(&self, key: &str) -> i64 {
        let name = CString::new(key).expect("no NUL");
        let mut value = -1;
        // SAFETY: a C string and a place for the value.
        let code = unsafe { (self.fake.fakecuda_get)(name.as_ptr(), &raw mut value) };
        assert_eq!(code, 0, "{key}");
        value
    }

    /// One of the two streams, or the NULL stream, whose kernels are this thread.
    pub(crate) fn stream(&self, number: usize) -> ComputeStream {
        ComputeStream(self.streams.get(number).copied().unwrap_or(0))
    }

    /// Enqueues a kernel of `microseconds` that reads at its end.
    pub(crate) fn read(&self, on: ComputeStream, from: u64, bytes: u64, microseconds: u64) -> Seen {
        let target = Pages::new(bytes).expect("host memory");
        let to = target.address() as *mut c_void;
        // SAFETY: both ranges live until the stream has been synchronised: see `Seen`'s users.
        let code = unsafe { (self.fake.fakecuda_read)(on.0, from, bytes, to, microseconds) };
        assert_eq!(code, 0);
        Seen { target }
    }

    /// Waits for all kernels.
    pub(crate) fn synchronize(&self) {
        for stream in self.streams.iter().chain(&[0]) {
            // SAFETY: the streams are ours.
            let code = unsafe { (self.fake.cuStreamSynchronize)(*stream) };
            assert_eq!(code, 0);
        }
    }

    pub(crate) fn retain(&self, device: i32) -> u64 {
        // SAFETY: writes one handle.
        answer(|out| unsafe { (self.fake.cuDevicePrimaryCtxRetain)(out, device) })
    }

    pub(crate) fn release(&self, device: i32) {
        // SAFETY: retained before.
        assert_eq!(unsafe { (self.fake.cuDevicePrimaryCtxRelease_v2)(device) }, 0);
    }

    pub(crate) fn context(&self) -> u64 {
        // SAFETY: writes one handle.
        answer(|out| unsafe { (self.fake.cuCtxGetCurrent)(out) })
    }

    pub(crate) fn set_context(&self, context: u64) {
        // SAFETY: the context is retained.
        assert_eq!(unsafe { (self.fake.cuCtxSetCurrent)(context) }, 0);
    }

    /// Ends the session; whatever was made in it must have been given back.
    pub(crate) fn finish(mut self) {
        self.close();
        for (key, before) in std::iter::zip(LIVE, self.before) {
            assert_eq!(self.get(key), before, "{key}");
        }
    }

    fn close(&mut self) {
        if self.streams.is_empty() {
            return;
        }
        self.set("reset", 0);
        self.synchronize();
        for stream in self.streams.drain(..) {
            // SAFETY: made in `new`, not used any more.
            assert_eq!(unsafe { (self.fake.cuStreamDestroy_v2)(stream) }, 0);
        }
        self.release(0);
        self.set_context(0);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.close();
        }
    }
}
