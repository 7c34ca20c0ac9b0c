//! Goal: entering and leaving a block allocates nothing, once the first passes are over.
//! Method: a global allocator that counts for each thread, around every call of an engine.
#![expect(unsafe_code, reason = "an allocator; it only counts and passes on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dgls_core::Result;
use dgls_core::driver::host::shim::{Pages, fill};
use dgls_core::driver::host::{HostDevice, HostOptions};
use dgls_core::driver::{ComputeStream, Device, EventSlot, Source, UseTimes};
use dgls_core::engine::{Engine, Options, Spec};

use crate::stack::Stack;
use crate::still::still;

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that ends has no counter any more, and no one asks for it.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

/// A device that does nothing, and so allocates nothing.
#[derive(Debug, Default)]
struct Idle {
    copies: AtomicU64,
    staged: bool,
}

impl Device for Idle {
    still!();

    fn copy(&self, _source: Source, _target: u64, _bytes: u64) -> Result<()> {
        self.copies.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn wait_done(&self, _slot: EventSlot) -> Result<()> {
        Ok(())
    }
    fn mark_ready(&self, _slot: EventSlot) -> Result<()> {
        Ok(())
    }
    fn takes(&self, _source: Source, _page_locked: bool) -> bool {
        !self.staged
    }
    fn read(&self, _source: Source, _address: u64, _bytes: u64) -> Result<()> {
        Ok(())
    }
    fn times(&self, _slot: EventSlot) -> Option<UseTimes> {
        Some(UseTimes::default())
    }
}

/// Allocations of this thread in `passes` passes, after two to warm up.
fn measure(device: Arc<dyn Device>, sources: Vec<Source>, arena: u64, passes: u32) -> u64 {
    let stack = model();
    let spec = Spec {
        profile: stack.profile.clone(),
        sources,
        budget_bytes: BUDGET,
        trace_uses: 32,
        staging_bytes: 1 << 20,
        options: Options { timing: true, poison: true, early: 0, ..Options::default() },
        ..Spec::default()
    };
    let engine = Engine::new(device, spec, arena, BUDGET).expect("feasible");
    assert!(engine.plan().streamed_bytes > 0);
    let compute = ComputeStream(1);
    let mut before = 0;
    for pass in 0..passes {
        if pass == 2 {
            before = allocations();
        }
        engine.begin_pass();
        for &block in &stack.profile.order {
            // Every third pass comes in another order, with a block left out.
            if pass % 3 == 2 && block == 1 {
                continue;
            }
            let block = if pass % 3 == 2 { 7 - block } else { block };
            engine.enter(block, compute).expect("no faults");
            engine.exit(compute).expect("no faults");
        }
        engine.end_pass();
    }
    allocations() - before
}

const BUDGET: u64 = 5 << 17;

fn model() -> Stack {
    Stack::uniform(8, &[1 << 16, 1 << 15, 1 << 16])
}

#[test]
fn the_counter_counts() {
    let before = allocations();
    drop(std::hint::black_box(Box::new(5)));
    assert_eq!(allocations() - before, 1);
}

#[test]
fn enter_and_exit_allocate_nothing() {
    for staged in [false, true] {
        let device = Arc::new(Idle { staged, ..Idle::default() });
        let found = measure(Arc::clone(&device) as _, model().sources(), 1 << 20, 40);
        assert_eq!(found, 0, "staged: {staged}");
        assert!(device.copies.load(Ordering::Relaxed) > 0);
    }
}

#[test]
fn the_host_device_allocates_nothing_in_the_calling_thread() {
    let (weights, arena) =
        (Pages::new(1 << 21).expect("2 MiB"), Pages::new(BUDGET).expect("1 MiB"));
    fill(weights.address(), 1, weights.bytes());
    fill(arena.address(), 0, arena.bytes());
    let model = model();
    let mut place = weights.address();
    let sources = model.profile.tensors.iter().map(|tensor| {
        let source = Source::Memory { address: place };
        place += tensor.bytes;
        source
    });
    let device = Arc::new(HostDevice::new(HostOptions::default()).expect("a thread"));
    assert_eq!(measure(device, sources.collect(), arena.address(), 40), 0);
}
