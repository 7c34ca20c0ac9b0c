//! The exported functions: the driver API's table of C symbols, and the test control.

mod batch;
mod control;
mod device;
mod event;
mod memory;
mod module;
mod stream;

use std::mem::MaybeUninit;

pub use batch::*;
pub use control::*;
pub use device::*;
pub use event::*;
pub use memory::*;
pub use module::*;
pub use stream::*;

use crate::codes::{Answer, INVALID_VALUE};

/// Where a call writes its answer: a C pointer that is null or valid for one `T`.
pub type Out<'a, T> = Option<&'a mut MaybeUninit<T>>;

fn put<T>(out: Out<'_, T>, value: T) -> Answer {
    out.ok_or(INVALID_VALUE)?.write(value);
    Ok(())
}
