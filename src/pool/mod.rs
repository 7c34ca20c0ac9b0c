//! Fixed memory, made once: the arena on the device, page-locks and staging chunks on the host.

mod arena;
mod moves;
mod pins;
mod staging;

pub use arena::Arena;
pub use moves::{Move, copies, in_order};
pub use pins::{Pins, Span};
pub use staging::Staging;
