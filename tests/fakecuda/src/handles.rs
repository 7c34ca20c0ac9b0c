//! Opaque handles: a handle names a live object, and a destroyed one is noticed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use parking_lot::Mutex;

use crate::codes::{Code, INVALID_HANDLE};

/// The live objects of one kind, by handle.
///
/// Handles are numbers, never addresses, and no number is given twice in a process, over all kinds:
/// a destroyed handle, or one of another kind, is found out instead of followed.
pub(crate) struct Handles<T> {
    live: Mutex<BTreeMap<usize, Arc<T>>>,
}

impl<T> Handles<T> {
    pub(crate) const fn new() -> Self {
        Self { live: Mutex::new(BTreeMap::new()) }
    }

    pub(crate) fn insert(&self, object: Arc<T>) -> usize {
        // 0, 1 and 2 name the NULL stream.
        static NEXT: AtomicUsize = AtomicUsize::new(0x1000);
        let handle = NEXT.fetch_add(0x10, Relaxed);
        self.live.lock().insert(handle, object);
        handle
    }

    pub(crate) fn find(&self, handle: usize) -> Result<Arc<T>, Code> {
        self.live.lock().get(&handle).cloned().ok_or(INVALID_HANDLE)
    }

    pub(crate) fn remove(&self, handle: usize) -> Result<Arc<T>, Code> {
        self.live.lock().remove(&handle).ok_or(INVALID_HANDLE)
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.live.lock().values().cloned().collect()
    }

    pub(crate) fn count(&self) -> usize {
        self.live.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_lives_until_it_is_removed_and_never_returns() {
        let (words, numbers) = (Handles::new(), Handles::new());
        let word = words.insert(Arc::new("a"));
        let number = numbers.insert(Arc::new(1));
        assert_eq!(words.find(word).as_deref(), Ok(&"a"));
        assert_eq!(words.find(number), Err(INVALID_HANDLE));
        assert!(words.remove(word).is_ok());
        assert_eq!(words.remove(word), Err(INVALID_HANDLE));
        assert_ne!(words.insert(Arc::new("b")), word);
        assert_eq!((words.count(), numbers.all().len()), (1, 1));
    }
}
