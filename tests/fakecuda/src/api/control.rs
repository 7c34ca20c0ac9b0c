//! Test control: settings, faults, counters, and work that takes a given time.

use std::ffi::{CStr, c_char, c_void};
use std::time::Duration;

use super::{Out, put};
use crate::codes::{Code, INVALID_VALUE};
use crate::driver::control;
use crate::work::{Span, Work};

/// Sets the knob `key`; 1 if there is no such knob or it cannot take the value.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fakecuda_set(key: *const c_char, value: i64) -> Code {
    // SAFETY: the caller passes text ended by a null byte, or null.
    control(|driver| driver.set(unsafe { text(key) }?, value))
}

/// Reads the knob, counter or live quantity `key`; 1 if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fakecuda_get(key: *const c_char, value: Out<'_, i64>) -> Code {
    // SAFETY: the caller passes text ended by a null byte, or null.
    control(|driver| put(value, driver.value(unsafe { text(key) }?)?))
}

/// Enqueues a delay.
#[unsafe(no_mangle)]
pub extern "C" fn fakecuda_busy(stream: usize, microseconds: u64) -> Code {
    control(|driver| {
        let delay = Duration::from_micros(microseconds);
        driver.streams.find(stream)?.push(Work::Delay(delay));
        Ok(())
    })
}

/// Enqueues a slow kernel: a delay, then a copy of the device bytes at `source` to `target`.
///
/// Both ranges must stay valid until the stream has passed it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fakecuda_read(
    stream: usize,
    source: usize,
    bytes: usize,
    target: *mut c_void,
    microseconds: u64,
) -> Code {
    control(|driver| {
        if source == 0 || target.is_null() {
            return Err(INVALID_VALUE);
        }
        let span = Span { source, target: target.expose_provenance(), bytes };
        let delay = Duration::from_micros(microseconds);
        driver.streams.find(stream)?.push(Work::ReadLate { span, delay });
        Ok(())
    })
}

/// # Safety
///
/// `key` is null or a C string that lives as long as the result is used.
unsafe fn text<'a>(key: *const c_char) -> Result<&'a str, Code> {
    if key.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(key) }.to_str().map_err(|_| INVALID_VALUE)
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;
    use crate::api::{cuStreamDestroy_v2, cuStreamQuery, cuStreamSynchronize};
    use crate::codes::{INVALID_HANDLE, NOT_READY, SUCCESS};
    use crate::testing::{Gate, ask, new_stream, session, set, value};

    #[test]
    fn unknown_keys_are_refused() {
        let _session = session();
        for key in [c"nonsense".as_ptr(), c"\xff".as_ptr(), ptr::null()] {
            // SAFETY: the key is null or a C string.
            assert_eq!(unsafe { fakecuda_set(key, 1) }, INVALID_VALUE);
            // SAFETY: as above.
            assert_eq!(ask(|out| unsafe { fakecuda_get(key, out) }), Err(INVALID_VALUE));
        }
    }

    #[test]
    fn control_is_neither_counted_nor_failed() {
        let _session = session();
        let stream = new_stream();
        let calls = value("ncalls");
        set("sticky", 719);
        assert_eq!(fakecuda_busy(stream, 1), SUCCESS);
        assert_eq!(fakecuda_busy(3, 1), INVALID_HANDLE);
        assert_eq!(value("ncalls"), calls);
        set("sticky", 0);
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
        assert_eq!(value("ncalls"), calls + 1);
    }

    #[test]
    fn a_slow_read_runs_in_its_streams_order() {
        let _session = session();
        let (stream, source, mut target) = (new_stream(), [8_u8; 3], [0_u8; 3]);
        let gate = Gate::on(stream);
        let address = source.as_ptr().expose_provenance();
        // SAFETY: both arrays outlive the stream's work, which is waited for below.
        let code = unsafe { fakecuda_read(stream, address, 3, target.as_mut_ptr().cast(), 1) };
        assert_eq!((code, cuStreamQuery(stream)), (SUCCESS, NOT_READY));
        gate.open();
        assert_eq!((cuStreamSynchronize(stream), target), (SUCCESS, [8; 3]));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }
}
