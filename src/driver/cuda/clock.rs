//! Turns events into nanoseconds on one time line.
//!
//! The driver gives differences as 32 bit floats of milliseconds: within 8 s of the origin they
//! are good to 1 µs. So the origin moves along.

use super::api::Stream;
use super::stream::Event;
use crate::error::Result;

/// Differences beyond this many milliseconds lose microseconds.
const RENEW_MS: f64 = 8000.0;

/// An origin that is renewed.
#[derive(Debug)]
pub(super) struct Clock {
    origin: Event,
    origin_ns: f64,
    next: Event,
    next_is_recorded: bool,
}

impl Clock {
    /// Takes two timed events and records the first on `stream`.
    pub(super) fn start(origin: Event, next: Event, stream: Stream) -> Result<Self> {
        origin.record(stream)?;
        Ok(Self { origin, origin_ns: 0.0, next, next_is_recorded: false })
    }

    /// When `event` passed, in nanoseconds; `None` while it has not.
    pub(super) fn read(&mut self, event: &Event, stream: Stream) -> Option<u64> {
        self.advance();
        let milliseconds = event.since(&self.origin)?;
        if milliseconds > RENEW_MS && !self.next_is_recorded {
            self.next_is_recorded = self.next.record(stream).is_ok();
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "nanoseconds since the device was made: positive, below 2^63"
        )]
        let ns = (self.origin_ns + milliseconds * 1e6).max(0.0) as u64;
        Some(ns)
    }

    fn advance(&mut self) {
        if !self.next_is_recorded || !self.next.passed() {
            return;
        }
        if let Some(milliseconds) = self.next.since(&self.origin) {
            self.origin_ns += milliseconds * 1e6;
            std::mem::swap(&mut self.origin, &mut self.next);
            self.next_is_recorded = false;
        }
    }
}
