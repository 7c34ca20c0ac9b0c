//! The fence around all that C++ may call: a panic becomes an error there.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};

/// Turns a panic into an error. What was thrown is leaked: to drop it may panic once more.
pub(crate) fn fence<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let error = Error::Internal(text.unwrap_or("a panic without a message").into());
        std::mem::forget(panic);
        Err(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    #[test]
    fn what_panics_when_it_is_dropped_stays_inside() {
        let error = fence::<()>(|| std::panic::panic_any(Bomb)).expect_err("it panics");
        assert_eq!(error, Error::Internal("a panic without a message".into()));
    }

    #[test]
    fn a_panic_becomes_an_error() {
        let error = fence::<()>(|| panic!("a panic for a test")).expect_err("it panics");
        assert_eq!(error.to_string(), "internal error (please report it): a panic for a test");
    }
}
