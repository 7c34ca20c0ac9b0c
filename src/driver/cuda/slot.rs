//! The events of one use of a block.

use std::sync::atomic::{AtomicBool, Ordering};

use super::api::Api;
use super::stream::{EVENT_TIMED, EVENT_UNTIMED, Event};
use crate::error::Result;

/// The events of one use. Those that order the streams carry no times: an event with one costs the
/// device and the host several times as much, and few uses are timed.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) ready: Event,
    pub(super) done: Event,
    pub(super) timed: Option<Timed>,
    /// The use's copies are timed, since their start was marked; its compute, since its arrival.
    pub(super) times_copies: AtomicBool,
    pub(super) times_compute: AtomicBool,
}

/// The events whose times are read.
#[derive(Debug)]
pub(super) struct Timed {
    pub(super) copy_start: Event,
    pub(super) copy_end: Event,
    pub(super) wait: Event,
    pub(super) start: Event,
    pub(super) end: Event,
}

impl Slot {
    /// The events of one use; with `timing`, those too whose times are read.
    pub(super) fn new(api: &'static Api, timing: bool) -> Result<Self> {
        let timed = || Event::new(api, EVENT_TIMED);
        let made = || {
            Ok(Timed {
                copy_start: timed()?,
                copy_end: timed()?,
                wait: timed()?,
                start: timed()?,
                end: timed()?,
            })
        };
        Ok(Self {
            ready: Event::new(api, EVENT_UNTIMED)?,
            done: Event::new(api, EVENT_UNTIMED)?,
            timed: timing.then(made).transpose()?,
            times_copies: AtomicBool::new(false),
            times_compute: AtomicBool::new(false),
        })
    }

    /// No start was marked.
    pub(super) fn reset(&self) {
        self.times_copies.store(false, Ordering::Relaxed);
        self.times_compute.store(false, Ordering::Relaxed);
    }

    /// The timed events, if `flag` is up; it is taken down.
    pub(super) fn timed_now(&self, flag: &AtomicBool) -> Option<&Timed> {
        self.timed.as_ref().filter(|_| flag.swap(false, Ordering::Relaxed))
    }
}
