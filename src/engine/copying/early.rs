//! Page-locks for a plan that is not in force yet: to lock a gigabyte takes a tenth of a second,
//! better while the model runs than while the device waits for the change. Calls of the driver that
//! the model makes meanwhile wait for the one that locks, so there are rests between them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::feed::Host;
use crate::driver::host::shim::page_bytes;
use crate::driver::{Device, Source};
use crate::engine::Spec;
use crate::plan::Plan;
use crate::pool::{Pins, Span};

/// How many times as long as a tensor took to be page-locked the driver is left to the model. On an
/// H100 a pass of 120 ms took 87 ms more beside 94 ms of locks in a row.
const RESTS: u32 = 2;

/// What may be page-locked besides what is, as of when it was made. Until the plan is adopted, or
/// dropped, its engine locks nothing itself.
#[derive(Debug)]
pub(in crate::engine) struct Locker {
    device: Arc<dyn Device>,
    /// For each tensor where it lies in host memory, if it lies there.
    spans: Vec<Option<Span>>,
    locked: Vec<Span>,
    left_bytes: u64,
}

impl Host {
    /// For a plan to come.
    pub(in crate::engine) fn locker(&self, spec: &Spec) -> Locker {
        let span = |(source, bytes): (&Source, u64)| match *source {
            Source::Memory { address } => Some(Span { address, bytes }),
            Source::File { .. } | Source::Encoded { .. } => None,
        };
        let sizes = spec.profile.tensors.iter().map(|tensor| tensor.bytes);
        Locker {
            device: Arc::clone(&self.device),
            spans: std::iter::zip(&spec.sources, sizes).map(span).collect(),
            locked: self.pins.spans().to_vec(),
            left_bytes: self.lockable(spec).saturating_sub(self.pins.page_bytes(page_bytes())),
        }
    }

    /// Takes over what a [`Locker`] has locked since nothing was locked here.
    pub(in crate::engine) fn absorb(&mut self, pins: Pins) {
        self.pins.absorb(pins);
    }
}

impl Locker {
    /// Locks what `plan` streams, as much as there is room for, tensor by tensor as long as
    /// `goes_on`, which is told what the last one took. What is refused is tried again when the
    /// plan is adopted, and counted then.
    pub(in crate::engine) fn lock(
        self,
        plan: &Plan,
        goes_on: &mut dyn FnMut(Duration) -> bool,
    ) -> Pins {
        let lacks = |span: &Span| {
            let taken = self.device.takes(Source::Memory { address: span.address }, false);
            !taken && !self.locked.iter().any(|locked| locked.meets(span))
        };
        let streamed = std::iter::zip(&self.spans, &plan.resident).filter(|&(_, &stays)| !stays);
        let spans: Vec<Span> = streamed.filter_map(|(&span, _)| span).filter(lacks).collect();
        let mut pins = Pins::none(Arc::clone(&self.device));
        pins.lock_while(&spans, self.left_bytes, page_bytes(), goes_on);
        pins
    }
}

/// Leaves the driver to the model until a while after a call that ended then and took so long.
/// Whoever takes `is_wanted` back and unparks the thread ends that; a thread that helped and ended
/// meanwhile, which unparks it too, does not.
pub(in crate::engine) fn rest((ended, took): (Instant, Duration), is_wanted: &AtomicBool) {
    let lasts = RESTS * took;
    while is_wanted.load(Ordering::Relaxed)
        && let Some(left) = lasts.checked_sub(ended.elapsed())
        && !left.is_zero()
    {
        std::thread::park_timeout(left);
    }
}
