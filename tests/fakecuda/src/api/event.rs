//! Events.

use super::{Out, put};
use crate::codes::{Code, INVALID_VALUE, NOT_READY};
use crate::driver::{call, give_back};
use crate::event::Event;
use crate::knobs::Knob;

/// Creates an event, which counts as complete until it is recorded.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: Out<'_, usize>, flags: u32) -> Code {
    call(|driver| {
        driver.contexts.require_current()?;
        let event = event.ok_or(INVALID_VALUE)?;
        event.write(driver.events.insert(Event::new(flags)?.into()));
        Ok(())
    })
}

/// Moves the event to the present end of the stream.
#[cfg_attr(not(feature = "missing-symbol"), unsafe(no_mangle))]
pub extern "C" fn cuEventRecord(event: usize, stream: usize) -> Code {
    call(|driver| {
        let event = driver.events.find(event)?;
        let stream = driver.stream(stream)?;
        driver.knobs.fault(Knob::FailRecordIn)?;
        event.record(&stream);
        Ok(())
    })
}

/// 600 until the event's latest record is reached.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: usize) -> Code {
    call(|driver| if driver.events.find(event)?.is_complete() { Ok(()) } else { Err(NOT_READY) })
}

/// Blocks until the event's latest record is reached.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: usize) -> Code {
    call(|driver| {
        if let Some(marker) = driver.events.find(event)?.latest() {
            marker.wait();
        }
        driver.health()
    })
}

/// Milliseconds between two events: 600 until both are reached, 400 if one has no time.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventElapsedTime(milliseconds: Out<'_, f32>, start: usize, end: usize) -> Code {
    call(|driver| {
        let (start, end) = (driver.events.find(start)?, driver.events.find(end)?);
        put(milliseconds, start.milliseconds_until(&end)?)
    })
}

/// Takes the handle away and returns at once; waits on the event go on.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: usize) -> Code {
    give_back(|driver| driver.events.remove(event).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{cuStreamDestroy_v2, cuStreamQuery, cuStreamSynchronize, cuStreamWaitEvent};
    use crate::codes::{INVALID_HANDLE, SUCCESS};
    use crate::testing::{Gate, ask, new_event, new_stream, session, set, value};

    #[test]
    fn a_new_event_is_complete_and_nobody_waits_for_it() {
        let _session = session();
        let (stream, event) = (new_stream(), new_event());
        assert_eq!((cuEventQuery(event), cuEventSynchronize(event)), (SUCCESS, SUCCESS));
        assert_eq!(cuStreamWaitEvent(stream, event, 0), SUCCESS);
        assert_eq!((cuStreamQuery(stream), cuStreamDestroy_v2(stream)), (SUCCESS, SUCCESS));
    }

    #[test]
    fn elapsed_time_needs_two_reached_records() {
        let _session = session();
        let (stream, start, end) = (new_stream(), new_event(), new_event());
        let elapsed = || ask(|out| cuEventElapsedTime(out, start, end));
        assert_eq!(cuEventRecord(start, stream), SUCCESS);
        assert_eq!(elapsed(), Err(INVALID_HANDLE));
        let gate = Gate::on(stream);
        assert_eq!(cuEventRecord(end, stream), SUCCESS);
        assert_eq!((cuEventQuery(end), elapsed()), (NOT_READY, Err(NOT_READY)));
        gate.open();
        assert_eq!((cuEventSynchronize(end), cuEventQuery(end)), (SUCCESS, SUCCESS));
        assert!(elapsed().is_ok_and(|milliseconds| 0.0 <= milliseconds));
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn a_wait_keeps_the_record_it_saw() {
        let _session = session();
        let (first, second, event) = (new_stream(), new_stream(), new_event());
        assert_eq!(cuEventRecord(event, first), SUCCESS);
        assert_eq!(cuStreamWaitEvent(second, event, 0), SUCCESS);
        let gate = Gate::on(first);
        assert_eq!(cuEventRecord(event, first), SUCCESS);
        assert_eq!((cuStreamSynchronize(second), cuEventQuery(event)), (SUCCESS, NOT_READY));
        gate.open();
        assert_eq!((cuStreamDestroy_v2(first), cuStreamDestroy_v2(second)), (SUCCESS, SUCCESS));
    }

    #[test]
    fn an_event_can_be_destroyed_while_streams_hold_its_record() {
        let _session = session();
        let (first, second, event) = (new_stream(), new_stream(), new_event());
        let gate = Gate::on(first);
        assert_eq!(cuEventRecord(event, first), SUCCESS);
        assert_eq!(cuStreamWaitEvent(second, event, 0), SUCCESS);
        assert_eq!(cuEventDestroy_v2(event), SUCCESS);
        assert_eq!(
            (cuEventQuery(event), cuEventDestroy_v2(event)),
            (INVALID_HANDLE, INVALID_HANDLE)
        );
        assert_eq!(cuStreamQuery(second), NOT_READY);
        gate.open();
        assert_eq!(cuStreamSynchronize(second), SUCCESS);
        assert_eq!((cuStreamDestroy_v2(first), cuStreamDestroy_v2(second)), (SUCCESS, SUCCESS));
    }

    #[test]
    fn a_failed_record_leaves_the_event_as_it_was() {
        let _session = session();
        let (stream, event) = (new_stream(), new_event());
        let gate = Gate::on(stream);
        set("fail_record_in", 1);
        assert_eq!((cuEventRecord(event, stream), cuEventQuery(event)), (INVALID_VALUE, SUCCESS));
        assert_eq!((cuEventRecord(event, stream), cuEventQuery(event)), (SUCCESS, NOT_READY));
        gate.open();
        assert_eq!(cuStreamDestroy_v2(stream), SUCCESS);
    }

    #[test]
    fn living_events_are_counted() {
        let _session = session();
        let (before, event) = (value("events"), new_event());
        assert_eq!(value("events"), before + 1);
        assert_eq!((cuEventDestroy_v2(event), value("events")), (SUCCESS, before));
    }
}
