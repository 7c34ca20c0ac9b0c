//! The host device: the arena is RAM, a worker thread copies, the caller's thread computes.
//!
//! It runs models bigger than RAM from a file on a machine without a GPU, and every test of the
//! Python side. Because kernels run on the calling thread, a use is over when it is marked done:
//! the only wait that can block is the one for *ready*.

pub mod files;
pub mod shim;
#[expect(unsafe_code, reason = "declarations of the C shim; called in shim.rs alone")]
#[allow(missing_docs, unreachable_pub, reason = "made by bindgen")]
mod shim_sys;
mod worker;

#[cfg(all(test, loom))]
#[path = "../../../tests/loom/worker.rs"]
mod worker_model;

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use self::files::Files;
use self::shim::Pages;
use self::worker::{Op, Shared};
use super::{ComputeStream, Device, EventSlot, Source, UseTimes};
use crate::error::{Error, Result};

/// What a host device is made with.
#[derive(Debug, Default)]
pub struct HostOptions {
    /// Files that [`Source::File`] indexes.
    pub files: Files,
    /// Slows copies down to this rate, in bytes per second, to model a link. Over a link, only
    /// page-locked memory is copied as it is. 0: as fast as it is, from any memory.
    pub copy_bytes_per_s: u64,
}

/// A device whose memory is RAM.
#[derive(Debug)]
pub struct HostDevice {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
    chunks: Mutex<Vec<Pages>>,
}

impl HostDevice {
    /// Starts the copy thread.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the system refuses a thread.
    pub fn new(options: HostOptions) -> Result<Self> {
        let shared = Arc::new(Shared::new(options));
        let worker = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("dgls-copy".into())
                .spawn(move || shared.run())
                .map_err(|e| Error::Invalid(format!("the copy thread did not start: {e}")))?
        };
        Ok(Self { shared, worker: Mutex::new(Some(worker)), chunks: Mutex::new(Vec::new()) })
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        self.shared.push(Op::Stop);
        self.shared.flush();
        if let Some(worker) = self.worker.lock().take() {
            // A panic of the worker has already been reported as an error of its copy.
            let _ = worker.join();
        }
    }
}

impl Device for HostDevice {
    fn prepare(&self, slots: u32, chunks: u32) -> Result<()> {
        self.shared.prepare(slots, chunks);
        Ok(())
    }

    fn copy(&self, source: Source, target: u64, bytes: u64) -> Result<()> {
        self.shared.push(Op::Copy { source, target, bytes });
        Ok(())
    }

    fn copy_within(&self, from: u64, to: u64, bytes: u64) -> Result<()> {
        self.copy(Source::Memory { address: from }, to, bytes)
    }

    fn fill(&self, target: u64, bytes: u64, value: u8) -> Result<()> {
        self.shared.push(Op::Fill { target, bytes, value });
        Ok(())
    }

    fn wait_done(&self, _slot: EventSlot) -> Result<()> {
        Ok(()) // marked done is done: the caller's thread computes, see the module's doc
    }

    fn mark_copy_start(&self, slot: EventSlot) -> Result<()> {
        self.shared.push(Op::CopyStart(slot));
        Ok(())
    }

    fn mark_ready(&self, slot: EventSlot) -> Result<()> {
        self.shared.mark_ready(slot);
        Ok(())
    }

    fn mark_wait(&self, slot: EventSlot, _compute: ComputeStream) -> Result<()> {
        self.shared.mark_wait(slot);
        Ok(())
    }

    fn wait_ready(&self, slot: EventSlot, _compute: ComputeStream, timed: bool) -> Result<()> {
        self.shared.wait_ready(slot, timed)
    }

    fn mark_done(&self, slot: EventSlot, _compute: ComputeStream) -> Result<()> {
        self.shared.mark_done(slot);
        Ok(())
    }

    fn flush(&self) {
        self.shared.flush();
    }

    fn blocks_host(&self, slot: EventSlot) -> bool {
        self.shared.is_pending(slot)
    }

    fn decodes(&self) -> bool {
        true
    }

    fn takes(&self, source: Source, page_locked: bool) -> bool {
        // Files are read ahead by several threads, into chunks.
        let in_memory = matches!(source, Source::Memory { .. });
        in_memory && (page_locked || !self.shared.is_link())
    }

    fn allocate_chunk(&self, bytes: u64) -> Result<u64> {
        let pages = Pages::new(bytes)?;
        let address = pages.address();
        self.chunks.lock().push(pages);
        Ok(address)
    }

    fn free_chunk(&self, address: u64, _bytes: u64) {
        self.chunks.lock().retain(|pages| pages.address() != address);
    }

    fn finish_reads(&self) {
        self.shared.drain();
    }

    fn check_files(&self) -> Result<()> {
        self.shared.files().check_unchanged()
    }

    fn read(&self, source: Source, address: u64, bytes: u64) -> Result<()> {
        self.shared.read(source, address, bytes)
    }

    fn read_directly(&self, source: Source, address: u64, bytes: u64) -> Result<bool> {
        self.shared.files().read_directly(source, address, bytes)
    }

    fn read_back(&self, from: u64, address: u64, bytes: u64, _on: ComputeStream) -> Result<()> {
        shim::copy(address, from, bytes);
        Ok(())
    }

    fn mark_chunk(&self, chunk: u32) -> Result<()> {
        self.shared.mark_chunk(chunk);
        Ok(())
    }

    fn wait_chunk(&self, chunk: u32) -> Result<()> {
        self.shared.wait_chunk(chunk);
        Ok(())
    }

    fn page_lock(&self, address: u64, bytes: u64) -> Result<()> {
        shim::lock(address, bytes)
    }

    fn page_unlock(&self, address: u64, bytes: u64) {
        shim::unlock(address, bytes);
    }

    fn times(&self, slot: EventSlot) -> Option<UseTimes> {
        self.shared.times(slot)
    }

    fn quiesce(&self, _last: Option<EventSlot>) -> Result<()> {
        self.shared.drain();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::shim::WeightFile;
    use super::*;

    fn device(files: Vec<WeightFile>) -> HostDevice {
        let options = HostOptions { files: files.into_iter().collect(), copy_bytes_per_s: 0 };
        let device = HostDevice::new(options).expect("a thread");
        device.prepare(4, 0).expect("the host device always can");
        device
    }

    #[test]
    fn a_copy_has_arrived_after_the_wait() {
        let device = device(Vec::new());
        let source = vec![5_u8; 1 << 20];
        let target = Pages::new(1 << 20).expect("1 MiB");
        let from = Source::Memory { address: source.as_ptr() as u64 };
        device.copy(from, target.address(), 1 << 20).expect("enqueued");
        device.mark_ready(EventSlot(1)).expect("enqueued");
        device.wait_ready(EventSlot(1), ComputeStream(0), true).expect("copied");
        let last = std::hint::black_box(vec![0_u8; 1]);
        shim::copy(last.as_ptr() as u64, target.address() + (1 << 20) - 1, 1);
        assert_eq!(std::hint::black_box(last), [5]);
        device.mark_done(EventSlot(1), ComputeStream(0)).expect("recorded");
        let times = device.times(EventSlot(1)).expect("all marks passed");
        assert!(times.copy_end_ns >= times.copy_start_ns);
        assert!(times.end_ns >= times.start_ns);
    }

    #[test]
    fn nobody_waits_for_a_thread_that_is_no_more() {
        let device = device(Vec::new());
        let (source, target) = (vec![5_u8; 1 << 20], Pages::new(1 << 20).expect("1 MiB"));
        let from = Source::Memory { address: source.as_ptr() as u64 };
        device.copy(from, target.address(), 1 << 20).expect("enqueued");
        // No such slot: the thread panics, and the marks after it never pass.
        device.mark_copy_start(EventSlot(99)).expect("enqueued");
        device.mark_ready(EventSlot(1)).expect("enqueued");
        device.flush();
        let waited = device.wait_ready(EventSlot(1), ComputeStream(0), true);
        assert_eq!(waited, Err(Error::Internal("the copy thread has ended".into())));
        device.quiesce(None).expect("nothing runs any more");
    }

    #[test]
    fn a_failed_read_is_told_at_its_own_use_and_at_no_other() {
        let path = std::env::temp_dir().join(format!("dgls-host-{}", std::process::id()));
        std::fs::write(&path, [1_u8; 64]).expect("writable");
        let file = WeightFile::open(path.to_str().expect("UTF-8")).expect("just written");
        let device = device(vec![file]);
        let target = Pages::new(128).expect("128 bytes");
        let address = target.address();
        let from = |offset| Source::File { file: 0, offset };
        device.copy(from(0), address, 64).expect("enqueued");
        device.mark_ready(EventSlot(0)).expect("enqueued");
        device.copy(from(0), address, 65).expect("enqueued");
        device.mark_ready(EventSlot(1)).expect("enqueued");
        device.wait_ready(EventSlot(0), ComputeStream(0), false).expect("64 bytes are there");
        device.wait_ready(EventSlot(1), ComputeStream(0), false).expect_err("65 are not");
        device.copy(from(0), address, 64).expect("enqueued");
        device.mark_ready(EventSlot(1)).expect("enqueued");
        device.wait_ready(EventSlot(1), ComputeStream(0), false).expect("a new copy, no error");
        std::fs::remove_file(path).expect("ours");
    }
}
