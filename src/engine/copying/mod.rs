//! How weights reach the device: from where, through what, and by which thread.

mod early;
mod feed;
mod lane;
mod stager;
mod steps;
mod tiers;

pub(super) use early::Locker;
pub(super) use feed::Host;
pub(super) use lane::{CopySide, Lane, Moved};
pub(super) use stager::Stager;

pub use lane::Weight;
pub use tiers::HostFacts;
