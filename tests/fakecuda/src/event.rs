//! Events: points in streams that have been reached or not.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::codes::{Code, INVALID_HANDLE, INVALID_VALUE, NOT_READY};
use crate::stream::Stream;
use crate::work::Work;

const DISABLE_TIMING: u32 = 2;
/// `BLOCKING_SYNC`, `DISABLE_TIMING` and `INTERPROCESS`.
const KNOWN_FLAGS: u32 = 7;

/// One place in a stream's queue, reached once.
#[derive(Default)]
pub(crate) struct Marker {
    reached: Mutex<Option<Instant>>,
    changed: Condvar,
}

impl Marker {
    pub(crate) fn reach(&self) {
        *self.reached.lock() = Some(Instant::now());
        self.changed.notify_all();
    }

    pub(crate) fn is_reached(&self) -> bool {
        self.time().is_some()
    }

    /// Blocks until the marker is reached.
    pub(crate) fn wait(&self) {
        self.changed.wait_while(&mut self.reached.lock(), |reached| reached.is_none());
    }

    fn time(&self) -> Option<Instant> {
        *self.reached.lock()
    }
}

/// An event: the marker of its latest record.
///
/// A record replaces the marker, so a wait enqueued earlier keeps the one it saw, and streams hold
/// markers, never events: an event can be destroyed while its marker is still queued.
pub(crate) struct Event {
    timed: bool,
    latest: Mutex<Option<Arc<Marker>>>,
}

impl Event {
    pub(crate) fn new(flags: u32) -> Result<Self, Code> {
        if flags & !KNOWN_FLAGS != 0 {
            return Err(INVALID_VALUE);
        }
        Ok(Self { timed: flags & DISABLE_TIMING == 0, latest: Mutex::new(None) })
    }

    pub(crate) fn record(&self, stream: &Stream) {
        let marker = Arc::new(Marker::default());
        *self.latest.lock() = Some(Arc::clone(&marker));
        stream.push(Work::Mark(marker));
    }

    /// What a wait on this event waits for now: nothing, before the first record.
    pub(crate) fn latest(&self) -> Option<Arc<Marker>> {
        self.latest.lock().clone()
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.latest().is_none_or(|marker| marker.is_reached())
    }

    /// Milliseconds from this event to `end`, negative if `end` came first.
    pub(crate) fn milliseconds_until(&self, end: &Self) -> Result<f32, Code> {
        if !self.timed || !end.timed {
            return Err(INVALID_HANDLE);
        }
        let start = self.latest().ok_or(INVALID_HANDLE)?;
        let end = end.latest().ok_or(INVALID_HANDLE)?;
        let (start, end) = start.time().zip(end.time()).ok_or(NOT_READY)?;
        let forward = end.saturating_duration_since(start);
        let backward = start.saturating_duration_since(end);
        Ok((forward.as_secs_f32() - backward.as_secs_f32()) * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reached_after(events: &[&Event]) {
        for event in events {
            let marker = Arc::new(Marker::default());
            marker.reach();
            *event.latest.lock() = Some(marker);
        }
    }

    #[test]
    fn elapsed_time_has_a_sign() {
        let (first, second) = (Event::new(0), Event::new(0));
        let (Ok(first), Ok(second)) = (first, second) else { panic!("plain events") };
        assert_eq!(first.milliseconds_until(&second), Err(INVALID_HANDLE));
        reached_after(&[&first, &second]);
        let forward = first.milliseconds_until(&second);
        assert!(forward.is_ok_and(|ms| 0.0 <= ms));
        assert_eq!(forward, second.milliseconds_until(&first).map(|ms| -ms));
    }

    #[test]
    fn events_without_timing_have_no_time() {
        let (timed, untimed) = (Event::new(0), Event::new(DISABLE_TIMING));
        let (Ok(timed), Ok(untimed)) = (timed, untimed) else { panic!("known flags") };
        reached_after(&[&timed, &untimed]);
        assert_eq!(timed.milliseconds_until(&untimed), Err(INVALID_HANDLE));
        assert_eq!(untimed.milliseconds_until(&timed), Err(INVALID_HANDLE));
    }

    #[test]
    fn unknown_flags_are_refused() {
        assert_eq!(Event::new(0x80).err(), Some(INVALID_VALUE));
    }
}
