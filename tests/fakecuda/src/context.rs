//! Primary contexts: their reference counts, and the calling thread's current one.

use std::cell::Cell;
use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::codes::{Answer, CONTEXT_IS_DESTROYED, INVALID_CONTEXT};

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(NONE) };
}

const NONE: usize = 0;
/// Device d's context has the handle `FIRST + d`.
const FIRST: usize = 0xC0DE_0000;

/// How often each device's primary context is retained.
#[derive(Default)]
pub(crate) struct Contexts {
    references: Mutex<BTreeMap<usize, u64>>,
}

impl Contexts {
    pub(crate) fn retain(&self, device: usize) -> usize {
        *self.references.lock().entry(FIRST + device).or_default() += 1;
        FIRST + device
    }

    pub(crate) fn release(&self, device: usize) -> Answer {
        match self.references.lock().get_mut(&(FIRST + device)) {
            Some(count) if 0 < *count => *count -= 1,
            _ => return Err(INVALID_CONTEXT),
        }
        Ok(())
    }

    pub(crate) fn is_active(&self, device: usize) -> bool {
        self.check(FIRST + device).is_ok()
    }

    pub(crate) fn count(&self) -> u64 {
        self.references.lock().values().sum()
    }

    /// Makes `context` the calling thread's current one; 0 is none.
    pub(crate) fn set_current(&self, context: usize) -> Answer {
        if context != NONE {
            self.check(context)?;
        }
        CURRENT.set(context);
        Ok(())
    }

    pub(crate) fn current() -> usize {
        CURRENT.get()
    }

    /// Fails unless the calling thread has a current context that is alive.
    pub(crate) fn require_current(&self) -> Answer {
        self.check(CURRENT.get())
    }

    fn check(&self, context: usize) -> Answer {
        match self.references.lock().get(&context) {
            Some(0) => Err(CONTEXT_IS_DESTROYED),
            Some(_) => Ok(()),
            None => Err(INVALID_CONTEXT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_lives_from_the_first_retain_to_the_last_release() {
        let contexts = Contexts::default();
        assert_eq!(contexts.release(1), Err(INVALID_CONTEXT));
        assert_eq!(contexts.set_current(FIRST + 1), Err(INVALID_CONTEXT));
        let context = contexts.retain(1);
        assert_eq!(contexts.retain(1), context);
        assert!(!contexts.is_active(0));
        assert_eq!(contexts.release(1), Ok(()));
        assert!(contexts.is_active(1));
        assert_eq!(contexts.release(1), Ok(()));
        assert_eq!(contexts.release(1), Err(INVALID_CONTEXT));
        assert_eq!(contexts.count(), 0);
    }

    #[test]
    fn each_thread_has_its_own_current_context() {
        let contexts = Contexts::default();
        let context = contexts.retain(0);
        assert_eq!(contexts.set_current(context), Ok(()));
        let elsewhere =
            std::thread::scope(|scope| scope.spawn(|| contexts.require_current()).join());
        assert_eq!(elsewhere.ok(), Some(Err(INVALID_CONTEXT)));
        assert_eq!(contexts.require_current(), Ok(()));
        assert_eq!(contexts.release(0), Ok(()));
        assert_eq!(contexts.require_current(), Err(CONTEXT_IS_DESTROYED));
        assert_eq!(contexts.set_current(NONE), Ok(()));
        assert_eq!(contexts.require_current(), Err(INVALID_CONTEXT));
    }
}
