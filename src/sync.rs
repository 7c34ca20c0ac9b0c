//! The locks and threads that the model checker has to see: the standard library's, or, with
//! `--cfg loom`, loom's with the same names.
//!
//! Not `parking_lot`'s: those keep all waiting threads of a process in one table. A fork inherits
//! the table with threads that it does not have, whose memory goes to new threads; one of those
//! that waited then followed what was left of it, and the fork crashed, once in some thirty forks.

use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;

#[cfg(loom)]
use loom::sync as primitives;
#[cfg(not(loom))]
use std::sync as primitives;

#[cfg(loom)]
pub(crate) use loom::thread;
#[cfg(not(loom))]
pub(crate) use std::thread;

/// A place, beside the locks, where the model checker lets another thread go on.
#[cfg(not(loom))]
pub(crate) fn may_switch() {}

#[cfg(loom)]
pub(crate) use loom::thread::yield_now as may_switch;

/// Does not mind if a thread panicked that held it, as `parking_lot`'s.
#[derive(Debug)]
pub(crate) struct Mutex<T>(primitives::Mutex<T>);

/// Empty only while a condition variable has it.
#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T>(Option<primitives::MutexGuard<'a, T>>);

#[derive(Debug)]
pub(crate) struct Condvar(primitives::Condvar);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(primitives::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("no condition variable has it")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("no condition variable has it")
    }
}

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(primitives::Condvar::new())
    }

    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.0.take().expect("no other condition variable has it");
        guard.0 = Some(self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}
