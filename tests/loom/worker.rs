//! Goal: between the calling thread and the host device's copy thread no mark is lost: a wait ends
//! when the bytes are there and not before, whoever copied them, and none goes on for ever.
//! Method: every interleaving of both, by loom, on the real queue. `make loom` runs it.

use std::sync::Arc;

use super::HostOptions;
use super::shim::{self, Pages};
use super::worker::{Op, Shared};
use crate::driver::{EventSlot, Source};
use crate::sync::thread::{self, JoinHandle};

/// More than is copied in the calling thread.
const LARGE: u64 = 40 << 10;

fn rig() -> (Arc<Shared>, JoinHandle<()>) {
    let shared = Arc::new(Shared::new(HostOptions::default()));
    let thread = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || shared.run())
    };
    shared.prepare(2, 0);
    (shared, thread)
}

fn model(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(body);
}

fn first_byte(pages: &Pages) -> u8 {
    let byte = std::sync::atomic::AtomicU8::new(0);
    shim::copy(byte.as_ptr() as u64, pages.address(), 1);
    byte.into_inner()
}

fn use_once(shared: &Shared, bytes: u64, value: u8) {
    let (source, target) = (Pages::new(bytes).expect("memory"), Pages::new(bytes).expect("memory"));
    shim::fill(source.address(), value, bytes);
    shim::fill(target.address(), 0, bytes);
    let from = Source::Memory { address: source.address() };
    shared.push(Op::Copy { source: from, target: target.address(), bytes });
    shared.flush();
    // The thread may be at it already, with nothing left in the queue.
    shared.mark_ready(EventSlot(0));
    shared.flush();
    shared.wait_ready(EventSlot(0), false).expect("no faults");
    assert_eq!(first_byte(&target), value, "the wait ended before the copy");
}

fn end(shared: &Shared, thread: JoinHandle<()>) {
    shared.drain();
    shared.push(Op::Stop);
    shared.flush();
    thread.join().expect("no panic");
}

#[test]
fn a_wait_ends_when_the_bytes_are_there() {
    model(|| {
        let (shared, thread) = rig();
        use_once(&shared, LARGE, 5);
        use_once(&shared, 64, 6);
        end(&shared, thread);
    });
}

#[test]
fn what_nobody_flushed_is_done_when_it_is_waited_for() {
    model(|| {
        let (shared, thread) = rig();
        let target = Pages::new(LARGE).expect("memory");
        shared.push(Op::Fill { target: target.address(), bytes: LARGE, value: 3 });
        shared.mark_ready(EventSlot(1));
        shared.wait_ready(EventSlot(1), false).expect("no faults");
        assert_eq!(first_byte(&target), 3);
        end(&shared, thread);
    });
}

#[test]
fn the_end_comes_at_any_moment() {
    model(|| {
        let (shared, thread) = rig();
        let target = Pages::new(LARGE).expect("memory");
        shared.push(Op::Fill { target: target.address(), bytes: LARGE, value: 3 });
        shared.flush();
        end(&shared, thread);
        assert_eq!(first_byte(&target), 3);
    });
}
