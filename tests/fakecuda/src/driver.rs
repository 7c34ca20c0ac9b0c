//! The one driver of the process: its state, and the door that every call passes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

use crate::codes::{
    Answer, Code, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, NOT_INITIALIZED, SUCCESS,
};
use crate::context::Contexts;
use crate::event::Event;
use crate::handles::Handles;
use crate::knobs::{Knob, Knobs};
use crate::memory::Memory;
use crate::module::{Function, Module};
use crate::stream::{Stream, Streams};

/// All state of the driver.
pub(crate) struct Driver {
    pub(crate) knobs: Knobs,
    pub(crate) counters: Counters,
    pub(crate) contexts: Contexts,
    pub(crate) streams: Streams,
    pub(crate) events: Handles<Event>,
    pub(crate) memory: Memory,
    pub(crate) modules: Handles<Module>,
    pub(crate) functions: Handles<Function>,
    /// Held while a copy is under way, one per [`Direction`](crate::work::Direction).
    pub(crate) engines: [Mutex<()>; 2],
    initialized: AtomicBool,
}

/// What has happened since the last reset.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) calls: AtomicU64,
    pub(crate) copies: AtomicU64,
    pub(crate) batches: AtomicU64,
    pub(crate) h2d_bytes: AtomicU64,
}

/// The driver of this process.
pub(crate) fn driver() -> &'static Driver {
    static DRIVER: LazyLock<Driver> = LazyLock::new(Driver::new);
    &DRIVER
}

/// Runs a driver call: counts it, and runs `body` if nothing stands against it.
pub(crate) fn call(body: impl FnOnce(&Driver) -> Answer) -> Code {
    let driver = driver();
    code(driver.enter().and_then(|()| body(driver)))
}

/// Runs a driver call that gives something back.
///
/// `body` runs even under a sticky error, so that what is left over afterwards was leaked by the
/// caller and not by the fault.
pub(crate) fn give_back(body: impl FnOnce(&Driver) -> Answer) -> Code {
    let driver = driver();
    let entered = driver.enter();
    let done = body(driver);
    code(entered.and(done))
}

/// Runs a call that is not part of the driver's API: it is neither counted nor failed.
pub(crate) fn control(body: impl FnOnce(&Driver) -> Answer) -> Code {
    code(body(driver()))
}

fn code(answer: Answer) -> Code {
    answer.err().unwrap_or(SUCCESS)
}

impl Driver {
    fn new() -> Self {
        Self {
            knobs: Knobs::new(),
            counters: Counters::default(),
            contexts: Contexts::default(),
            streams: Streams::new(),
            events: Handles::new(),
            memory: Memory::default(),
            modules: Handles::new(),
            functions: Handles::new(),
            engines: Default::default(),
            initialized: AtomicBool::new(false),
        }
    }

    pub(crate) fn initialize(&self) -> Answer {
        self.knobs.code(Knob::InitCode)?;
        if self.knobs.number(Knob::Devices) == 0 {
            return Err(NO_DEVICE);
        }
        self.initialized.store(true, SeqCst);
        Ok(())
    }

    /// The sticky error, if there is one: also what a call that waited for work must look at again.
    pub(crate) fn health(&self) -> Answer {
        self.knobs.code(Knob::Sticky)
    }

    /// Checks that `device` exists.
    pub(crate) fn device(&self, device: i32) -> Result<usize, Code> {
        let exists = device < self.knobs.number(Knob::Devices);
        usize::try_from(device).ok().filter(|_| exists).ok_or(INVALID_DEVICE)
    }

    /// The stream of `handle`. Only the NULL stream needs a current context: it has none itself.
    pub(crate) fn stream(&self, handle: usize) -> Result<Arc<Stream>, Code> {
        if Streams::is_null(handle) {
            self.contexts.require_current()?;
        }
        self.streams.find(handle)
    }

    /// Sets `key` for `fakecuda_set`.
    pub(crate) fn set(&self, key: &str, value: i64) -> Answer {
        if key != "reset" {
            return self.knobs.set(key, value);
        }
        self.knobs.reset();
        let Counters { calls, copies, batches, h2d_bytes } = &self.counters;
        for counter in [calls, copies, batches, h2d_bytes] {
            counter.store(0, SeqCst);
        }
        Ok(())
    }

    /// Reads `key` for `fakecuda_get`: a counter, a live quantity or a knob.
    pub(crate) fn value(&self, key: &str) -> Result<i64, Code> {
        let value = match key {
            "ncalls" => self.counters.calls.load(SeqCst),
            "ncopies" => self.counters.copies.load(SeqCst),
            "nbatches" => self.counters.batches.load(SeqCst),
            "h2d_bytes" => self.counters.h2d_bytes.load(SeqCst),
            "used" => self.memory.used(),
            "pinned" => self.memory.pinned(),
            "host_ranges" => self.memory.host_ranges() as u64,
            "refs" => self.contexts.count(),
            "streams" => self.streams.count() as u64,
            "events" => self.events.count() as u64,
            "modules" => self.modules.count() as u64,
            _ => return self.knobs.value(key),
        };
        i64::try_from(value).map_err(|_| INVALID_VALUE)
    }

    fn enter(&self) -> Answer {
        self.counters.calls.fetch_add(1, SeqCst);
        self.health()?;
        if self.initialized.load(SeqCst) { Ok(()) } else { Err(NOT_INITIALIZED) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codes::INVALID_CONTEXT;

    #[test]
    fn a_driver_without_devices_does_not_come_up() {
        let driver = Driver::new();
        assert_eq!(driver.enter(), Err(NOT_INITIALIZED));
        assert_eq!(driver.set("devices", 0), Ok(()));
        assert_eq!(driver.initialize(), Err(NO_DEVICE));
        assert_eq!(driver.enter(), Err(NOT_INITIALIZED));
        assert_eq!(driver.set("reset", 0), Ok(()));
        assert_eq!(driver.set("init_code", 803), Ok(()));
        assert_eq!(driver.initialize(), Err(803));
        assert_eq!(driver.set("reset", 0), Ok(()));
        assert_eq!(driver.initialize(), Ok(()));
        assert_eq!(driver.enter(), Ok(()));
    }

    #[test]
    fn a_reset_turns_faults_and_counters_off_and_leaves_what_is_alive() {
        let driver = Driver::new();
        driver.contexts.retain(0);
        assert_eq!(driver.set("sticky", 700), Ok(()));
        assert_eq!(driver.set("lat_us", 5), Ok(()));
        assert_eq!(driver.enter(), Err(700));
        let values = |keys: [&str; 4]| keys.map(|key| driver.value(key));
        let keys = ["sticky", "lat_us", "ncalls", "refs"];
        assert_eq!(values(keys), [Ok(700), Ok(5), Ok(1), Ok(1)]);
        assert_eq!(driver.set("reset", 0), Ok(()));
        assert_eq!(values(keys), [Ok(0), Ok(0), Ok(0), Ok(1)]);
        assert_eq!(driver.value("reset"), Err(INVALID_VALUE));
    }

    #[test]
    fn devices_and_the_null_stream_are_checked() {
        let driver = Driver::new();
        assert_eq!(driver.set("devices", 2), Ok(()));
        let found = [-1, 0, 1, 2].map(|device| driver.device(device));
        assert_eq!(found, [Err(INVALID_DEVICE), Ok(0), Ok(1), Err(INVALID_DEVICE)]);
        for handle in [0, 1, 2] {
            assert_eq!(driver.stream(handle).err(), Some(INVALID_CONTEXT));
        }
    }
}
