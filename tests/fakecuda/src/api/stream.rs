//! Streams.

use std::ffi::c_void;

use super::device::GREATEST_PRIORITY;
use super::{Out, put};
use crate::codes::{Code, INVALID_VALUE, NOT_READY};
use crate::driver::{call, give_back};
use crate::knobs::Knob;
use crate::stream::Streams;
use crate::work::{HostFunction, Work};

const NON_BLOCKING: u32 = 1;
const WAIT_EXTERNAL: u32 = 1;

/// Creates a stream of priority 0.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(stream: Out<'_, usize>, flags: u32) -> Code {
    cuStreamCreateWithPriority(stream, flags, 0)
}

/// Creates a stream; the priority is clamped to the range, and only remembered.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreateWithPriority(
    stream: Out<'_, usize>,
    flags: u32,
    priority: i32,
) -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        let stream = stream.ok_or(INVALID_VALUE)?;
        if NON_BLOCKING < flags {
            return Err(INVALID_VALUE);
        }
        driver.knobs.fault(Knob::FailStreamCreate)?;
        stream.write(driver.streams.create(priority.clamp(GREATEST_PRIORITY, 0))?);
        Ok(())
    })
}

/// The priority a stream was created with.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetPriority(stream: usize, priority: Out<'_, i32>) -> Code {
    call(|driver| put(priority, driver.stream(stream)?.priority()))
}

/// Takes the handle away and returns at once; the stream ends when its work is done.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: usize) -> Code {
    give_back(|driver| driver.streams.destroy(stream))
}

/// Blocks until the work enqueued so far is done.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: usize) -> Code {
    call(|driver| {
        driver.stream(stream)?.synchronize();
        driver.health()
    })
}

/// 600 while there is work under way.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: usize) -> Code {
    call(|driver| if driver.stream(stream)?.is_idle() { Ok(()) } else { Err(NOT_READY) })
}

/// Makes the stream's later work wait for the event's latest record, if there is one.
///
/// On the NULL stream it blocks the calling thread: its code is that stream's work.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, flags: u32) -> Code {
    call(|driver| {
        let target = driver.stream(stream)?;
        let event = driver.events.find(event)?;
        if WAIT_EXTERNAL < flags {
            return Err(INVALID_VALUE);
        }
        driver.knobs.fault(Knob::FailWaitIn)?;
        let Some(marker) = event.latest() else { return Ok(()) };
        if Streams::is_null(stream) && driver.knobs.is_on(Knob::NullSync) {
            marker.wait();
        } else {
            target.push(Work::Wait(marker));
        }
        driver.health()
    })
}

/// Enqueues a call of `function` on the stream's thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    stream: usize,
    function: Option<HostFunction>,
    argument: *mut c_void,
) -> Code {
    call(|driver| {
        let function = function.ok_or(INVALID_VALUE)?;
        let argument = argument.expose_provenance();
        driver.stream(stream)?.push(Work::Call { function, argument });
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::api::{cuCtxSetCurrent, cuCtxSynchronize, cuEventQuery, cuEventRecord};
    use crate::codes::{INVALID_CONTEXT, INVALID_HANDLE, SUCCESS};
    use crate::testing::{Gate, ask, new_event, new_stream, session, set, value};

    unsafe extern "C" fn count(counter: *mut c_void) {
        // SAFETY: the tests below pass an `AtomicUsize` that outlives the stream's work.
        let counter = unsafe { &*counter.cast::<AtomicUsize>() };
        counter.fetch_add(1, SeqCst);
    }

    fn launch(stream: usize, counter: &AtomicUsize) {
        let argument = std::ptr::from_ref(counter).cast_mut().cast();
        // SAFETY: `count` takes an `AtomicUsize`; the test synchronises before it goes.
        let code = unsafe { cuLaunchHostFunc(stream, Some(count), argument) };
        assert_eq!(code, SUCCESS);
    }

    #[test]
    fn a_stream_is_idle_when_its_work_is_done() {
        let _session = session();
        let (stream, counter) = (new_stream(), AtomicUsize::new(0));
        let gate = Gate::on(stream);
        launch(stream, &counter);
        assert_eq!((cuStreamQuery(stream), counter.load(SeqCst)), (NOT_READY, 0));
        gate.open();
        assert_eq!(cuStreamSynchronize(stream), SUCCESS);
        assert_eq!((cuStreamQuery(stream), counter.load(SeqCst)), (SUCCESS, 1));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn destroying_a_busy_stream_neither_waits_nor_drops_its_work() {
        let _session = session();
        let (stream, counter) = (new_stream(), AtomicUsize::new(0));
        let gate = Gate::on(stream);
        launch(stream, &counter);
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
        assert_eq!((value("streams"), counter.load(SeqCst)), (0, 0));
        for code in [cuStreamQuery(stream), cuStreamSynchronize(stream), cuStreamDestroy_v2(stream)]
        {
            assert_eq!(code, INVALID_HANDLE);
        }
        gate.open();
        assert_eq!((cuCtxSynchronize(), counter.load(SeqCst)), (SUCCESS, 1));
    }

    #[test]
    fn streams_run_side_by_side_and_events_order_them() {
        let _session = session();
        let (first, second, event) = (new_stream(), new_stream(), new_event());
        let (early, late) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let gate = Gate::on(first);
        assert_eq!(cuEventRecord(event, first), SUCCESS);
        launch(second, &early);
        assert_eq!(cuStreamSynchronize(second), SUCCESS);
        assert_eq!(cuStreamWaitEvent(second, event, 0), SUCCESS);
        launch(second, &late);
        assert_eq!((early.load(SeqCst), late.load(SeqCst)), (1, 0));
        gate.open();
        assert_eq!((cuStreamSynchronize(second), late.load(SeqCst)), (SUCCESS, 1));
        assert_eq!((cuStreamDestroy_v2(first), cuStreamDestroy_v2(second)), (SUCCESS, SUCCESS));
    }

    #[test]
    fn a_wait_of_the_null_stream_blocks_the_caller() {
        let _session = session();
        let (stream, event) = (new_stream(), new_event());
        let gate = Gate::on(stream);
        assert_eq!(cuEventRecord(event, stream), SUCCESS);
        thread::scope(|scope| {
            scope.spawn(|| {
                // Long enough for a wait that does not block to be seen below.
                thread::park_timeout(Duration::from_millis(50));
                gate.open();
            });
            assert_eq!((cuStreamWaitEvent(0, event, 0), cuEventQuery(event)), (SUCCESS, SUCCESS));
        });
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn without_null_sync_the_null_stream_is_a_stream_like_others() {
        let _session = session();
        set("null_sync", 0);
        let (stream, event) = (new_stream(), new_event());
        let gate = Gate::on(stream);
        assert_eq!(cuEventRecord(event, stream), SUCCESS);
        assert_eq!(cuStreamWaitEvent(0, event, 0), SUCCESS);
        assert_eq!(cuStreamQuery(0), NOT_READY);
        gate.open();
        assert_eq!((cuStreamSynchronize(0), cuEventQuery(event)), (SUCCESS, SUCCESS));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn a_thread_without_a_context_can_use_streams_but_not_create_them() {
        let _session = session();
        let (stream, event) = (new_stream(), new_event());
        thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(ask(|out| cuStreamCreate(out, 1)), Err(INVALID_CONTEXT));
                assert_eq!(cuEventRecord(event, stream), SUCCESS);
                assert_eq!(cuStreamWaitEvent(stream, event, 0), SUCCESS);
                assert_eq!(cuStreamWaitEvent(0, event, 0), INVALID_CONTEXT);
                assert_eq!(cuStreamSynchronize(stream), SUCCESS);
                assert_eq!(cuCtxSetCurrent(0), SUCCESS);
            });
        });
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn priorities_are_clamped_and_flags_checked() {
        let _session = session();
        let stream = ask(|out| cuStreamCreateWithPriority(out, NON_BLOCKING, -99));
        let stream = stream.unwrap_or_default();
        assert_eq!(ask(|out| cuStreamGetPriority(stream, out)), Ok(GREATEST_PRIORITY));
        assert_eq!(ask(|out| cuStreamCreate(out, 8)), Err(INVALID_VALUE));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn creating_and_waiting_fail_when_told() {
        let _session = session();
        let (stream, event) = (new_stream(), new_event());
        set("fail_code", 700);
        set("fail_stream_create", 1);
        set("fail_wait_in", 2);
        assert_eq!(ask(|out| cuStreamCreate(out, 1)), Err(700));
        assert_eq!(cuStreamWaitEvent(stream, event, 0), SUCCESS);
        assert_eq!(cuStreamWaitEvent(stream, event, 0), 700);
        assert_eq!((cuStreamDestroy_v2(stream), value("streams")), (SUCCESS, 0));
    }

    #[test]
    fn streams_are_destroyed_under_a_sticky_error_too() {
        let _session = session();
        let stream = new_stream();
        set("sticky", 719);
        assert_eq!((cuStreamDestroy_v2(stream), value("streams")), (719, 0));
    }
}
