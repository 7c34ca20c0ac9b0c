//! What the schedule decides and the executor does, and what a schedule may be told.

use super::adapt::Adapt;
use crate::driver::EventSlot;

/// One thing to enqueue. The first group goes to the copy stream, in order; the second to the
/// compute stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Copy stream: forget the streamed copies that are not enqueued yet; their uses will not come.
    Cancel,
    /// Copy stream: wait for *done*.
    WaitDone(EventSlot),
    /// Copy stream, ahead of all that the staging thread still has to do: wait for *done* before
    /// its event is marked again, on another compute stream.
    Join(EventSlot),
    /// Copy stream: wait for all copies so far, those that are decoded too: no use of what they
    /// brought will order them.
    WaitDecoded,
    /// Copy stream: mark where a stretch of a use's copies begins.
    CopyStart(EventSlot),
    /// Copy stream: the copy `copies[index]` of the program.
    Copy {
        /// Index into the program's copies.
        index: u32,
    },
    /// Copy stream: bring the resident tensors of a block.
    Load {
        /// The block.
        block: u32,
    },
    /// Copy stream: bring those resident tensors of a block that the plan before did not have in
    /// the same place.
    LoadMissing {
        /// The block.
        block: u32,
    },
    /// Copy stream: fill what a use has streamed with 0xFF.
    Poison {
        /// Position of the use in the program.
        position: u32,
    },
    /// Copy stream: mark *ready*.
    Ready {
        /// The use's events.
        slot: EventSlot,
        /// Counts the *ready* marks of an engine; an acquire names the one it needs.
        ticket: u64,
    },
    /// Compute stream: wait for *ready*, once it has been enqueued.
    Acquire {
        /// The use's events.
        slot: EventSlot,
        /// The *ready* that must have been enqueued before.
        ticket: u64,
        /// Whether to mark the times of the wait.
        timed: bool,
    },
    /// Compute stream: mark *done*.
    Release(EventSlot),
}

impl Command {
    /// Whether it stands for copies to the device.
    pub(super) fn copies(self) -> bool {
        matches!(self, Self::Copy { .. } | Self::Load { .. } | Self::LoadMissing { .. })
    }

    /// Whether the staging thread may run it: all of the copy stream but what goes ahead of it.
    pub(super) fn is_queued(self) -> bool {
        use Command::{Acquire, Cancel, Join, Release};
        !matches!(self, Acquire { .. } | Cancel | Join(_) | Release(_))
    }
}

/// What an engine may change about its schedule.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Fill the streamed bytes of a use with 0xFF when it is over.
    pub poison: bool,
    /// Mark times: in the first four passes, then in two of eight, later in two of 32; where
    /// nothing is streamed in three of 32.
    pub timing: bool,
    /// Look for better plans, with the times of those passes and of others where times changed.
    pub adapt: Adapt,
    /// Compare the bytes of each use with their host source before it begins. Slow.
    pub verify: bool,
    /// Test only: how many uses too early a copy is enqueued. 0 is the contract.
    pub early: u64,
}
