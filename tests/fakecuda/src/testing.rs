//! What unit tests of the exported functions share: one driver at a time, and gates.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::api::{
    Out, cuCtxSetCurrent, cuDevicePrimaryCtxRelease_v2, cuDevicePrimaryCtxRetain, cuEventCreate,
    cuInit, cuStreamCreate, fakecuda_get, fakecuda_set,
};
use crate::codes::{Code, SUCCESS};
use crate::driver::driver;
use crate::event::Marker;
use crate::work::Work;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The process's driver, up and reset, with a context for this thread.
pub(crate) struct Session {
    _alone: MutexGuard<'static, ()>,
}

pub(crate) fn session() -> Session {
    let alone = ONE_AT_A_TIME.lock();
    assert_eq!(cuInit(0), SUCCESS);
    let context = ask(|out| cuDevicePrimaryCtxRetain(out, 0));
    assert_eq!(context.map(|context| cuCtxSetCurrent(context)), Ok(SUCCESS));
    set("reset", 0);
    Session { _alone: alone }
}

impl Drop for Session {
    fn drop(&mut self) {
        driver().streams.synchronize();
        set("reset", 0);
        cuCtxSetCurrent(0);
        cuDevicePrimaryCtxRelease_v2(0);
    }
}

/// Calls a function that answers through a pointer.
pub(crate) fn ask<T: Copy>(call: impl FnOnce(Out<'_, T>) -> Code) -> Result<T, Code> {
    let mut answer = MaybeUninit::uninit();
    match call(Some(&mut answer)) {
        // SAFETY: a call that succeeds has written its answer.
        SUCCESS => Ok(unsafe { answer.assume_init() }),
        code => Err(code),
    }
}

pub(crate) fn set(key: &str, value: i64) {
    let key = CString::new(key).unwrap_or_default();
    // SAFETY: the key is a C string.
    assert_eq!(unsafe { fakecuda_set(key.as_ptr(), value) }, SUCCESS, "{key:?}");
}

pub(crate) fn value(key: &str) -> i64 {
    let key = CString::new(key).unwrap_or_default();
    // SAFETY: the key is a C string.
    ask(|out| unsafe { fakecuda_get(key.as_ptr(), out) }).unwrap_or_else(|code| panic!("{code}"))
}

pub(crate) fn new_stream() -> usize {
    ask(|out| cuStreamCreate(out, 1)).unwrap_or_else(|code| panic!("{code}"))
}

pub(crate) fn new_event() -> usize {
    ask(|out| cuEventCreate(out, 0)).unwrap_or_else(|code| panic!("{code}"))
}

/// An encoded segment of one tile for each base: every element is the base and 4, with sign and
/// mantissa 0. After its last part there is room for a group of codes and some escapes.
pub(crate) fn plain_segment(bases: &[u8]) -> Vec<u8> {
    let table = 256 + 1280 * bases.len();
    let second = table + (8 * bases.len()).next_multiple_of(256);
    let mut segment = vec![0; second + 512];
    let numbers = [0x3157_4744, bases.len(), second, second + 256];
    for (word, number) in segment.chunks_exact_mut(4).zip(numbers) {
        word.copy_from_slice(&number.to_le_bytes()[..4]);
    }
    for (words, base) in segment[table..].chunks_exact_mut(8).zip(bases) {
        words[7] = *base;
    }
    segment
}

/// Holds a stream back until it is opened, at the latest when it is dropped.
pub(crate) struct Gate(Arc<Marker>);

impl Gate {
    pub(crate) fn on(stream: usize) -> Self {
        let marker = Arc::new(Marker::default());
        let stream = driver().streams.find(stream).unwrap_or_else(|code| panic!("{code}"));
        stream.push(Work::Wait(Arc::clone(&marker)));
        Self(marker)
    }

    pub(crate) fn open(&self) {
        self.0.reach();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}
