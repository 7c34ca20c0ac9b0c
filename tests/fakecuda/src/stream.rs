//! Streams: a queue of work and the thread that does it, in order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};

use crate::codes::{Code, OUT_OF_MEMORY};
use crate::handles::Handles;
use crate::work::Work;

/// The handles of the NULL stream: null, `CU_STREAM_LEGACY` and `CU_STREAM_PER_THREAD`.
const NULL_HANDLES: [usize; 3] = [0, 1, 2];

/// A queue served by one worker thread, which ends when the closed queue is empty.
pub(crate) struct Stream {
    priority: i32,
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Invariant: `finished <= pushed`; the difference is the work queued or running.
#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    pushed: u64,
    finished: u64,
    closed: bool,
}

/// A piece of work's place in its stream.
#[derive(Clone, Copy)]
pub(crate) struct Ticket(u64);

impl Stream {
    pub(crate) fn start(priority: i32) -> Result<Arc<Self>, Code> {
        let queue = Mutex::new(Queue::default());
        let stream = Arc::new(Self { priority, queue, changed: Condvar::new() });
        let served = Arc::clone(&stream);
        thread::Builder::new()
            .name("fakecuda stream".into())
            .spawn(move || served.serve())
            .map_err(|_| OUT_OF_MEMORY)?;
        Ok(stream)
    }

    pub(crate) fn priority(&self) -> i32 {
        self.priority
    }

    pub(crate) fn push(&self, work: Work) -> Ticket {
        let mut queue = self.queue.lock();
        queue.work.push_back(work);
        queue.pushed += 1;
        self.changed.notify_all();
        Ticket(queue.pushed)
    }

    /// Blocks until the work that holds `ticket`, and all before it, is done.
    pub(crate) fn wait_for(&self, ticket: Ticket) {
        self.changed.wait_while(&mut self.queue.lock(), |queue| queue.finished < ticket.0);
    }

    /// Blocks until all work pushed so far is done.
    pub(crate) fn synchronize(&self) {
        let ticket = Ticket(self.queue.lock().pushed);
        self.wait_for(ticket);
    }

    pub(crate) fn is_idle(&self) -> bool {
        let queue = self.queue.lock();
        queue.finished == queue.pushed
    }

    /// Lets the worker end once it has done what is queued.
    fn close(&self) {
        self.queue.lock().closed = true;
        self.changed.notify_all();
    }

    fn serve(&self) {
        while let Some(work) = self.next() {
            work.run();
            self.queue.lock().finished += 1;
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Work> {
        let mut queue = self.queue.lock();
        self.changed.wait_while(&mut queue, |queue| queue.work.is_empty() && !queue.closed);
        queue.work.pop_front()
    }
}

/// All streams of the process.
pub(crate) struct Streams {
    null: Arc<Stream>,
    named: Handles<Stream>,
    /// Destroyed streams whose work may still be under way.
    closing: Mutex<Vec<Arc<Stream>>>,
}

impl Streams {
    /// # Panics
    ///
    /// If the operating system has no thread for the NULL stream.
    pub(crate) fn new() -> Self {
        let null = Stream::start(0).unwrap_or_else(|_| panic!("fakecuda: no thread to start"));
        Self { null, named: Handles::new(), closing: Mutex::default() }
    }

    pub(crate) fn create(&self, priority: i32) -> Result<usize, Code> {
        Stream::start(priority).map(|stream| self.named.insert(stream))
    }

    pub(crate) fn is_null(handle: usize) -> bool {
        NULL_HANDLES.contains(&handle)
    }

    pub(crate) fn find(&self, handle: usize) -> Result<Arc<Stream>, Code> {
        if Self::is_null(handle) { Ok(Arc::clone(&self.null)) } else { self.named.find(handle) }
    }

    /// Takes the handle away; work under way goes on.
    pub(crate) fn destroy(&self, handle: usize) -> Result<(), Code> {
        let stream = self.named.remove(handle)?;
        stream.close();
        let mut closing = self.closing.lock();
        closing.retain(|stream| !stream.is_idle());
        closing.push(stream);
        Ok(())
    }

    pub(crate) fn count(&self) -> usize {
        self.named.count()
    }

    /// Blocks until all work pushed so far to any stream, destroyed ones included, is done.
    pub(crate) fn synchronize(&self) {
        let closing = self.closing.lock().clone();
        for stream in self.named.all().iter().chain(&closing).chain([&self.null]) {
            stream.synchronize();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Marker;

    fn new_stream() -> Arc<Stream> {
        Stream::start(0).unwrap_or_else(|code| panic!("{code}"))
    }

    #[test]
    fn synchronize_waits_only_for_work_pushed_before() {
        let stream = new_stream();
        let gate = Arc::new(Marker::default());
        let ticket = stream.push(Work::Mark(Arc::default()));
        stream.push(Work::Wait(Arc::clone(&gate)));
        stream.wait_for(ticket);
        assert!(!stream.is_idle());
        gate.reach();
        stream.synchronize();
        assert!(stream.is_idle());
        stream.close();
    }

    #[test]
    fn a_closed_stream_finishes_what_is_queued() {
        let stream = new_stream();
        let (gate, end) = (Arc::new(Marker::default()), Arc::new(Marker::default()));
        stream.push(Work::Wait(Arc::clone(&gate)));
        stream.push(Work::Mark(Arc::clone(&end)));
        stream.close();
        assert!(!end.is_reached());
        gate.reach();
        end.wait();
        stream.synchronize();
    }
}
