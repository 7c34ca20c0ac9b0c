//! What streams do: copies with a modelled time, waits, markers, delays, and the test kernels.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use crate::codes::{Answer, LAUNCH_FAILED};
use crate::decode::Batch;
use crate::driver::{Driver, driver};
use crate::event::Marker;
use crate::knobs::Knob;

/// `CUhostFn`.
pub type HostFunction = unsafe extern "C" fn(*mut c_void);

/// Between host and device; each direction has one copy engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    HostToDevice,
    DeviceToHost,
}

/// A range of bytes to read and one to write.
///
/// Addresses, so that they can go to the worker's thread. Who makes a span promises what the driver
/// API asks of the caller: both ranges stay valid until the stream has passed the work.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    pub(crate) source: usize,
    pub(crate) target: usize,
    pub(crate) bytes: usize,
}

impl Span {
    pub(crate) fn copy(self) {
        let source = ptr::with_exposed_provenance::<u8>(self.source);
        let target = ptr::with_exposed_provenance_mut::<u8>(self.target);
        // SAFETY: both ranges are valid (see `Span`); they may overlap.
        unsafe { ptr::copy(source, target, self.bytes) }
    }

    /// A copy through a buffer of our own: read now, written by the returned function.
    fn sample(self) -> impl FnOnce() {
        let mut buffer = vec![0_u8; self.bytes];
        let sample = buffer.as_mut_ptr().expose_provenance();
        Self { target: sample, ..self }.copy();
        move || Self { source: buffer.as_ptr().expose_provenance(), ..self }.copy()
    }
}

/// One entry of a stream's queue.
pub(crate) enum Work {
    Copy {
        direction: Direction,
        span: Span,
    },
    /// Device to device; takes no modelled time.
    Move(Span),
    Fill {
        target: usize,
        value: u8,
        bytes: usize,
    },
    /// Changes one byte.
    Flip(usize),
    Wait(Arc<Marker>),
    Mark(Arc<Marker>),
    Call {
        function: HostFunction,
        argument: usize,
    },
    Delay(Duration),
    /// A slow kernel that reads at its end.
    ReadLate {
        span: Span,
        delay: Duration,
    },
    /// The kernel `fill`: `count` words of `value`.
    FillWords {
        target: usize,
        count: u32,
        value: u32,
    },
    /// The kernel `decode`, slow: it reads and writes at its end.
    Decode(Box<Batch>),
    /// Any other kernel: it fails.
    FailingKernel,
    FreeDevice(usize),
}

impl Work {
    pub(crate) fn run(self) {
        let driver = driver();
        match self {
            Self::Copy { direction, span } => run_copy(driver, direction, span),
            Self::Move(span) => {
                span.copy();
                driver.counters.copies.fetch_add(1, SeqCst);
            }
            Self::Fill { target, value, bytes } => {
                let target = ptr::with_exposed_provenance_mut::<u8>(target);
                // SAFETY: the caller of `cuMemsetD8Async` keeps the range valid until here.
                unsafe { target.write_bytes(value, bytes) }
            }
            Self::Flip(target) => {
                let target = ptr::with_exposed_provenance_mut::<u8>(target);
                // SAFETY: in the range of the copy before it, which the caller keeps valid.
                let byte = unsafe { target.read() };
                // SAFETY: as above.
                unsafe { target.write(!byte) }
            }
            Self::Wait(marker) => marker.wait(),
            Self::Mark(marker) => marker.reach(),
            Self::Call { function, argument } => {
                let argument = ptr::with_exposed_provenance_mut(argument);
                // SAFETY: the caller of `cuLaunchHostFunc` made the pair, for one call from here.
                unsafe { function(argument) }
            }
            Self::Delay(duration) => pass(duration),
            Self::ReadLate { span, delay } => read_late(span, || pass(delay)),
            Self::FillWords { target, count, value } => fill_words(target, count, value),
            Self::Decode(batch) => {
                let delay = Duration::from_micros(driver.knobs.size(Knob::DecodeUs));
                decode_late(&batch, || pass(delay)).unwrap_or_else(|code| driver.knobs.stick(code));
            }
            Self::FailingKernel => driver.knobs.stick(LAUNCH_FAILED),
            // A failure here has no caller to go to: a real driver would make it sticky.
            Self::FreeDevice(address) => {
                driver.memory.free_device(address).unwrap_or_else(|code| driver.knobs.stick(code));
            }
        }
    }
}

fn run_copy(driver: &Driver, direction: Direction, span: Span) {
    let _engine = driver.engines[direction as usize].lock();
    transfer(direction, span, || pass(driver.knobs.copy_time(span.bytes)));
    driver.counters.copies.fetch_add(1, SeqCst);
    if direction == Direction::HostToDevice {
        driver.counters.h2d_bytes.fetch_add(span.bytes as u64, SeqCst);
    }
}

// A real copy reads and writes all through its interval. Tests get the extremes: a late H2D meets
// a source that was reused too early and a reader that did not wait; an early D2H sample meets a
// producer that was not waited for.
fn transfer(direction: Direction, span: Span, interval: impl FnOnce()) {
    match direction {
        Direction::HostToDevice => {
            interval();
            span.copy();
        }
        Direction::DeviceToHost => {
            let deliver = span.sample();
            interval();
            deliver();
        }
    }
}

fn read_late(span: Span, interval: impl FnOnce()) {
    interval();
    span.copy();
}

fn decode_late(batch: &Batch, interval: impl FnOnce()) -> Answer {
    interval();
    batch.decode()
}

fn fill_words(target: usize, count: u32, value: u32) {
    let target = ptr::with_exposed_provenance_mut::<u32>(target);
    for index in 0..count as usize {
        let word = target.wrapping_add(index);
        // SAFETY: the launch's arguments are those of `fill`, which writes `count` words.
        unsafe { word.write_unaligned(value) }
    }
}

fn pass(duration: Duration) {
    if !duration.is_zero() {
        thread::sleep(duration);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::testing::plain_segment;

    /// Runs `work` on one byte 1 → 0, while `source` becomes 2 within the interval; the target
    /// within the interval, and at the end.
    fn observe(work: impl FnOnce(Span, &dyn Fn())) -> (u8, u8) {
        let (source, target, within) = (Cell::new(1_u8), Cell::new(0_u8), Cell::new(0));
        let address = |byte: &Cell<u8>| byte.as_ptr().expose_provenance();
        let span = Span { source: address(&source), target: address(&target), bytes: 1 };
        work(span, &|| {
            source.set(2);
            within.set(target.get());
        });
        (within.get(), target.get())
    }

    #[test]
    fn h2d_reads_and_lands_at_the_end_of_its_interval() {
        let seen = observe(|span, interval| transfer(Direction::HostToDevice, span, interval));
        assert_eq!(seen, (0, 2));
    }

    #[test]
    fn d2h_samples_at_the_start_and_lands_at_the_end_of_its_interval() {
        let seen = observe(|span, interval| transfer(Direction::DeviceToHost, span, interval));
        assert_eq!(seen, (0, 1));
    }

    #[test]
    fn a_slow_read_sees_what_was_overwritten_meanwhile() {
        assert_eq!(observe(|span, interval| read_late(span, interval)), (0, 2));
    }

    #[test]
    fn a_decode_reads_and_writes_at_the_end_of_its_interval() {
        let (mut slot, next) = (plain_segment(&[1]), plain_segment(&[2]));
        let (mut target, mut within) = ([0_u16; 1024], 0_u16);
        let batch = Batch::of(&slot, &mut target);
        let address = |bytes: &[u8]| bytes.as_ptr().expose_provenance();
        let overwrite = Span {
            source: address(&next),
            target: slot.as_mut_ptr().expose_provenance(),
            bytes: next.len(),
        };
        let look = Span {
            source: target.as_mut_ptr().expose_provenance(),
            target: (&raw mut within).expose_provenance(),
            bytes: 2,
        };
        let decoded = decode_late(&batch, || {
            overwrite.copy();
            look.copy();
        });
        assert_eq!((decoded, within, target), (Ok(()), 0, [6 << 7; 1024]));
    }
}
