//! Goal: a change of plan makes few calls of the driver, and no mark of the plan before is read.
//! Method: the device alone, on the fake driver, which counts calls.

use dgls_core::driver::cuda::{CudaDevice, CudaOptions};
use dgls_core::driver::{Device, EventSlot};

use crate::fake::Session;

fn timed_device() -> CudaDevice {
    let options = CudaOptions { timing: true, ..CudaOptions::default() };
    CudaDevice::new(options).expect("the fake driver")
}

#[test]
fn events_are_made_once_and_serve_later_plans_too() {
    let session = Session::new();
    let device = timed_device();
    let made = |slots: u32| {
        let before = session.get("ncalls");
        device.prepare(slots, 0).expect("no faults");
        session.get("ncalls") - before
    };
    assert!(made(100) > 700, "seven for each use");
    let again = made(40);
    assert!(again < 20, "{again} calls");
    assert_eq!(made(110), again + 70);
    drop(device);
    session.finish();
}

#[test]
fn a_start_that_was_marked_for_a_plan_before_times_nothing() {
    let session = Session::new();
    let device = timed_device();
    let (slot, compute) = (EventSlot(0), session.stream(0));
    device.prepare(1, 0).expect("no faults");
    device.mark_copy_start(slot).expect("no faults");
    device.mark_wait(slot, compute).expect("no faults");
    device.wait_ready(slot, compute, true).expect("no faults");
    device.quiesce(None).expect("no faults");
    device.prepare(1, 0).expect("no faults");
    device.mark_ready(slot).expect("no faults");
    device.mark_done(slot, compute).expect("no faults");
    session.synchronize();
    assert_eq!(device.times(slot), None);
    drop(device);
    session.finish();
}
