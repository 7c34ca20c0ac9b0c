//! Goal: between the calling thread, the staging thread and one that reads no command is lost, run
//! twice or run out of order, no wait for a *ready* ends before it is enqueued, none goes on for
//! ever, and no chunk is copied from before it is full or filled before it was copied from.
//! Method: every interleaving, by loom, on the real queues with a device that keeps books.
//! `make loom` runs it.

#[path = "../it/still.rs"]
mod still;

use std::sync::Arc;

use self::still::still;
use super::command::Command;
use super::copying::{CopySide, Lane, Moved, Stager, Weight};
use crate::driver::{ComputeStream, Device, EventSlot, Source, UseTimes};
use crate::error::{Error, Result};
use crate::plan::{Copy, Program};
use crate::pool::{Arena, Choice, Staging};
use crate::sync::{Mutex, may_switch};

/// What was enqueued on the copy stream, in order. Its lock is held by no one across a switch.
#[derive(Debug, Default)]
struct Books {
    enqueued: parking_lot::Mutex<Vec<String>>,
    /// The copy that is refused, once.
    refused: parking_lot::Mutex<Option<u64>>,
}

impl Books {
    fn note(&self, what: String) -> Result<()> {
        may_switch();
        self.enqueued.lock().push(what);
        Ok(())
    }

    fn said(&self) -> Vec<String> {
        self.enqueued.lock().clone()
    }
}

impl Device for Books {
    still!();

    fn copy(&self, source: Source, _target: u64, _bytes: u64) -> Result<()> {
        let Source::Memory { address } = source else { return Ok(()) };
        if *self.refused.lock() == Some(address) {
            *self.refused.lock() = None;
            return Err(Error::Invalid("refused".into()));
        }
        self.note(format!("copy {address}"))
    }
    fn wait_done(&self, slot: EventSlot) -> Result<()> {
        self.note(format!("wait {}", slot.0))
    }
    fn mark_ready(&self, slot: EventSlot) -> Result<()> {
        self.note(format!("ready {}", slot.0))
    }
    fn takes(&self, _source: Source, _page_locked: bool) -> bool {
        true
    }
    fn read(&self, source: Source, _address: u64, _bytes: u64) -> Result<()> {
        let Source::Memory { address } = source else { return Ok(()) };
        self.note(format!("read {address}"))
    }
    fn times(&self, _slot: EventSlot) -> Option<UseTimes> {
        None
    }
}

/// A staging thread whose copies 0, 1 and 2 come from the addresses 100, 200 and 300.
fn rig() -> (Arc<Books>, Stager) {
    rig_of(true, 0)
}

/// The same through one chunk, at the address 4096, that one thread fills.
fn staged_rig() -> (Arc<Books>, Stager) {
    rig_of(false, 1)
}

fn rig_of(direct: bool, readers: u32) -> (Arc<Books>, Stager) {
    let books = Arc::new(Books::default());
    let copy = |tensor| Copy { tensor, source_offset: 0, target_offset: 0, bytes: 8, wait: None };
    let source = |address| Weight { source: Source::Memory { address }, direct };
    let side = CopySide {
        device: Arc::clone(&books) as _,
        program: Arc::new(Program { copies: (0..3).map(copy).collect(), ..Program::default() }),
        weights: [100, 200, 300].map(source).to_vec(),
        arena: Arena::new(4096, 8, 8).expect("aligned"),
        staging: None,
        cache: Arc::default(),
        codes: Arc::default(),
        kept: Vec::new(),
        moved: Arc::new(Moved::default()),
    };
    let choice = Arc::new(parking_lot::Mutex::new(Choice::new(readers)));
    let staging = Staging::new(Arc::clone(&books) as _, 1, 4096).expect("a chunk");
    let lane = Arc::new(Mutex::new(Lane::new(side)));
    let stager =
        Stager::start(lane, Arc::clone(&books) as _, &staging, Arc::default(), choice, 8, 0);
    (books, stager.expect("a thread"))
}

fn model(body: impl Fn() + Sync + Send + 'static) {
    model_within(3, body);
}

fn model_within(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(body);
}

const fn ready(number: u32) -> Command {
    Command::Ready { slot: EventSlot(number), ticket: number as u64 }
}

#[test]
fn every_command_is_run_once_and_in_order() {
    model(|| {
        let (books, stager) = rig();
        for (index, number) in [(0, 1), (1, 2)] {
            stager.push([Command::Copy { index }]);
            stager.push([ready(number)]);
        }
        stager.wait_issued(1).expect("no faults");
        assert!(books.said().contains(&"ready 1".into()), "a wait for a mark to come");
        stager.wait_issued(2).expect("no faults");
        assert_eq!(books.said(), ["copy 100", "ready 1", "copy 200", "ready 2"]);
        drop(stager);
    });
}

#[test]
fn an_error_is_told_and_what_follows_is_not_run_until_a_reset() {
    model(|| {
        let (books, stager) = rig();
        *books.refused.lock() = Some(100);
        stager.push([Command::Copy { index: 0 }]);
        stager.push([Command::WaitDone(EventSlot(7))]);
        stager.push([ready(1)]);
        stager.wait_issued(1).expect_err("it was refused");
        assert!(!stager.is_idle());
        let waits = stager.reset();
        assert_eq!(waits, [EventSlot(7)], "waits order what comes later: none is lost");
        assert_eq!(books.said(), [""; 0]);
        stager.push([Command::Copy { index: 2 }]);
        stager.push([ready(2)]);
        stager.wait_issued(2).expect("no more faults");
        assert_eq!(books.said(), ["copy 300", "ready 2"]);
    });
}

#[test]
fn a_reset_at_any_moment_loses_no_wait_and_copies_nothing_without_it() {
    model(|| {
        let (books, stager) = rig();
        stager.push([Command::WaitDone(EventSlot(7))]);
        stager.push([Command::Copy { index: 0 }]);
        stager.push([Command::WaitDone(EventSlot(8))]);
        let left = stager.reset();
        let said = books.said();
        let at = |what: &str| said.iter().position(|said| said == what);
        assert!(at("copy 100").is_none() || at("wait 7").is_some(), "not ordered: {said:?}");
        let mut waits: Vec<String> = left.iter().map(|slot| format!("wait {}", slot.0)).collect();
        waits.extend(books.said().into_iter().filter(|said| said.starts_with("wait")));
        waits.sort();
        assert_eq!(waits, ["wait 7", "wait 8"]);
        assert!(stager.is_idle(), "nothing runs after a reset");
    });
}

#[test]
fn a_cancel_at_any_moment_drops_copies_and_no_wait() {
    model(|| {
        let (books, stager) = rig();
        stager.push([Command::Copy { index: 0 }]);
        stager.push([Command::WaitDone(EventSlot(7))]);
        stager.push([ready(1)]);
        stager.cancel();
        stager.push([Command::Copy { index: 1 }]);
        stager.push([ready(2)]);
        stager.wait_issued(2).expect("no faults");
        let said = books.said();
        let at = |what: &str| said.iter().position(|said| said == what);
        assert!(at("wait 7") < at("copy 200") && at("copy 200") < at("ready 2"), "{said:?}");
        assert!(at("wait 7").is_some() && at("ready 2").is_some(), "{said:?}");
    });
}

#[test]
fn a_chunk_is_copied_from_when_it_is_full_and_filled_when_it_was_copied_from() {
    // Two copies by three threads: three preemptions take minutes.
    model_within(2, || {
        let (books, stager) = staged_rig();
        stager.push([Command::Copy { index: 0 }, ready(1), Command::Copy { index: 1 }, ready(2)]);
        stager.wait_issued(2).expect("no faults");
        let all = ["read 100", "copy 4096", "ready 1", "read 200", "copy 4096", "ready 2"];
        let mut said = books.said();
        // The second read may begin before the first mark.
        let at = |said: &[String], what: &str| said.iter().position(|said| said == what);
        assert!(at(&said, "copy 4096") < at(&said, "read 200"), "{said:?}");
        assert!(at(&said, "copy 4096") < at(&said, "ready 1"), "{said:?}");
        if at(&said, "read 200") < at(&said, "ready 1") {
            said.swap(2, 3);
        }
        assert_eq!(said, all);
    });
}

#[test]
fn after_a_reset_no_thread_reads_and_the_chunk_is_free() {
    model(|| {
        let (books, stager) = staged_rig();
        stager.push([Command::WaitDone(EventSlot(7)), Command::Copy { index: 0 }, ready(1)]);
        let waits = stager.reset();
        let said = books.said();
        let at = |said: &[String], what: &str| said.iter().position(|said| said == what);
        assert!(waits.is_empty() == at(&said, "wait 7").is_some(), "{waits:?} {said:?}");
        assert!(waits.is_empty() || at(&said, "copy 4096").is_none(), "not ordered: {said:?}");
        stager.push([Command::Copy { index: 1 }, ready(2)]);
        stager.wait_issued(2).expect("no faults");
        let later = &books.said()[said.len()..];
        assert_eq!(later, ["read 200", "copy 4096", "ready 2"]);
    });
}

#[test]
fn after_a_cancel_what_was_read_for_nothing_is_not_copied_for_the_next() {
    model(|| {
        let (books, stager) = staged_rig();
        stager.push([Command::Copy { index: 0 }, ready(1)]);
        stager.cancel();
        stager.push([Command::Copy { index: 1 }, ready(2)]);
        stager.wait_issued(2).expect("no faults");
        let said = books.said();
        let last = said.iter().rposition(|said| said == "copy 4096");
        let at = |what: &str| said.iter().position(|said| said == what);
        assert!(at("read 200") < last && last < at("ready 2"), "{said:?}");
    });
}

#[test]
fn the_end_comes_at_any_moment() {
    for rig in [rig, staged_rig] {
        model(move || {
            let (_books, stager) = rig();
            stager.push([Command::Copy { index: 0 }]);
            drop(stager);
        });
    }
}
