//! Runs models whose weights do not fit on the device: copies each block's weights in just before
//! the block runs, while the block before it computes.
//!
//! In reading order: [`plan`] decides once what lives where, [`engine`] decides and does what has
//! to be enqueued at each block, [`pool`] holds the memory, [`codec`] makes weights smaller on
//! their way, [`driver`] is the device. Only `bridge.rs` is known to C++.

mod bridge;
pub mod codec;
pub mod driver;
pub mod engine;
mod error;
mod fence;
pub mod plan;
pub mod pool;
pub mod probe;
mod sync;
mod units;

pub use error::{Error, Result};
pub use units::{ALIGN_BYTES, align_up};
