//! How weights reach the device: from where, through what, and by which thread.

mod early;
mod encoder;
mod feed;
mod lane;
mod moved;
mod picks;
mod stager;
mod steps;
mod tiers;

pub(super) use early::{Locker, rest};
pub(super) use encoder::Encoder;
pub(super) use feed::Host;
pub(super) use lane::{CopySide, Lane};
pub(super) use moved::{Moved, MovedSums};
pub(super) use picks::EIGHTHS;
pub(super) use stager::Stager;

pub use encoder::Encode;
pub use lane::Weight;
pub use tiers::HostFacts;
