//! Fixed memory, made once: the arena on the device, page-locks, copies and staging chunks on the
//! host, weights in their encoded form; and the threads that fill the chunks.

mod arena;
mod cache;
mod choice;
mod codes;
mod moves;
mod pack;
mod pins;
mod readers;
mod share;
mod staging;

pub use arena::Arena;
pub use cache::{Cache, whole_pages};
pub use choice::{Choice, Way};
pub use codes::{Code, Codes, Part, each_in_threads};
pub use moves::{Move, copies, in_order};
pub use pack::{Fill, Piece, Read, pack};
pub use pins::{Pins, Span};
pub use readers::{Job, Readers, SharedChoice, Told, new_choice};
pub use share::spread;
pub use staging::Staging;
