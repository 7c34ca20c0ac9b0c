//! What a device of a test does where the test does not look: nothing, and it succeeds.

/// Methods of `Device`, for a device that keeps its own of those that are not here.
macro_rules! still {
    () => {
        fn prepare(&self, _slots: u32, _chunks: u32) -> Result<()> {
            Ok(())
        }
        fn copy_within(&self, _from: u64, _to: u64, _bytes: u64) -> Result<()> {
            Ok(())
        }
        fn fill(&self, _target: u64, _bytes: u64, _value: u8) -> Result<()> {
            Ok(())
        }
        fn mark_copy_start(&self, _slot: EventSlot) -> Result<()> {
            Ok(())
        }
        fn mark_wait(&self, _slot: EventSlot, _compute: ComputeStream) -> Result<()> {
            Ok(())
        }
        fn wait_ready(&self, _slot: EventSlot, _stream: ComputeStream, _timed: bool) -> Result<()> {
            Ok(())
        }
        fn mark_done(&self, _slot: EventSlot, _compute: ComputeStream) -> Result<()> {
            Ok(())
        }
        fn allocate_chunk(&self, _bytes: u64) -> Result<u64> {
            Ok(4096)
        }
        fn free_chunk(&self, _address: u64, _bytes: u64) {}
        fn finish_reads(&self) {}
        fn mark_chunk(&self, _chunk: u32) -> Result<()> {
            Ok(())
        }
        fn wait_chunk(&self, _chunk: u32) -> Result<()> {
            Ok(())
        }
        fn page_lock(&self, _address: u64, _bytes: u64) -> Result<()> {
            Ok(())
        }
        fn page_unlock(&self, _address: u64, _bytes: u64) {}
        fn quiesce(&self, _last: Option<EventSlot>) -> Result<()> {
            Ok(())
        }
    };
}

pub(crate) use still;
