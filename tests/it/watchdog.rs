//! Runs a body for many seeds on two threads and names the seed that fails, or that hangs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// No seed takes a thousandth of this; one that does waits for something that never comes.
const HANG: Duration = Duration::from_secs(120);
const THREADS: u64 = 2;

/// How many times as many seeds to run: `DGLS_SEEDS=100 cargo test` for a night.
pub(crate) fn factor() -> u64 {
    let text = std::env::var("DGLS_SEEDS").unwrap_or_else(|_| "1".into());
    text.parse().expect("DGLS_SEEDS is a whole number")
}

/// Runs `body` for each seed of `0..seeds` and gives back what it returned, in order of end.
pub(crate) fn for_seeds<T: Send + 'static>(
    seeds: u64,
    body: impl Fn(u64) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let (body, next) = (Arc::new(body), Arc::new(AtomicU64::new(0)));
    let running: Arc<[AtomicU64; 2]> = Arc::default();
    let (sender, receiver) = channel();
    for thread in 0..usize::try_from(THREADS).expect("2") {
        let (body, next) = (Arc::clone(&body), Arc::clone(&next));
        let (running, sender) = (Arc::clone(&running), sender.clone());
        std::thread::spawn(move || {
            loop {
                let seed = next.fetch_add(1, Ordering::SeqCst);
                if seed >= seeds {
                    return;
                }
                running[thread].store(seed, Ordering::SeqCst);
                let result = catch_unwind(AssertUnwindSafe(|| body(seed)));
                if sender.send((seed, result)).is_err() {
                    return;
                }
            }
        });
    }
    drop(sender);
    let mut results = Vec::new();
    loop {
        match receiver.recv_timeout(HANG) {
            Ok((_, Ok(result))) => results.push(result),
            Ok((seed, Err(_))) => panic!("seed {seed} failed; its message stands above"),
            Err(RecvTimeoutError::Disconnected) => return results,
            Err(RecvTimeoutError::Timeout) => {
                let seeds = running.each_ref().map(|seed| seed.load(Ordering::SeqCst));
                panic!("one of the seeds {seeds:?} hangs");
            }
        }
    }
}
