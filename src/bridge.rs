//! What C++ may call. Every body runs inside the fence: a panic that reached cxx would abort the
//! process, and with it the host application.
#![expect(unsafe_code, reason = "the code that cxx generates")]
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::multiple_unsafe_ops_per_block,
    reason = "the generated half; each item of ours is documented"
)]

mod codec;
mod facts;
mod making;
mod probes;

use codec::{check_stream, decode_stream, encode_stream};
use probes::{cuda_driver_version, measure_copy, measure_page_lock};

use crate::driver::ComputeStream;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::fence::fence;
use crate::plan::{Profile, Tensor, plan};

#[cxx::bridge(namespace = "dgls")]
mod ffi {
    /// One tensor of a block.
    #[derive(Debug, Clone)]
    struct TensorSpec {
        block: u32,
        bytes: u64,
        /// Index into the files, or -1: `place` is an address.
        file: i32,
        /// Address, or offset in the file.
        place: u64,
    }

    /// See `engine::Spec` and `engine::Options`.
    #[derive(Debug, Clone)]
    struct EngineSpec {
        /// CUDA ordinal, or -1 for the host device.
        device: i32,
        arena_address: u64,
        arena_bytes: u64,
        budget_bytes: u64,
        tensors: Vec<TensorSpec>,
        order: Vec<u32>,
        files: Vec<String>,
        min_stream_bytes: u64,
        pinned_bytes: u64,
        ram_bytes: u64,
        page_cache_bytes: u64,
        staging_bytes: u64,
        /// When to encode: 0 never, 1 where copies decide, 2 always.
        encode: u8,
        /// Numbers of the tensors that may be encoded, of bf16 and of fp8 (e4m3).
        encodable: Vec<u32>,
        encodable_fp8: Vec<u32>,
        encoded_bytes: u64,
        locked_bytes: u64,
        /// Device memory to decode from; of 0 bytes on the host device.
        decode_address: u64,
        decode_bytes: u64,
        trace_uses: u64,
        /// A name for each tensor, or none at all.
        names: Vec<String>,
        verify: bool,
        copy_bytes_per_s: u64,
        poison: bool,
        /// Look for better plans beside the model.
        adapt: bool,
        /// `resident_blocks` stay whole and all others are streamed whole.
        manual: bool,
        resident_blocks: Vec<u32>,
        /// Uses that are copied ahead at most; negative: the planner chooses.
        window: i64,
        /// Test only, a sum: 1 no wait for ready, 2 none for done, 4 copies one use too early,
        /// 8 a byte of every 211th copy changed.
        faults: u32,
    }

    /// See `plan::Plan`.
    #[derive(Debug, Clone)]
    struct PlanFacts {
        resident: Vec<u8>,
        resident_bytes: u64,
        streamed_bytes: u64,
        ring_bytes: u64,
        arena_bytes: u64,
        least_bytes: u64,
        passes: u32,
        /// Predicted seconds of a pass, and the bound of any policy; negative where no times are
        /// known.
        period_s: f64,
        bound_s: f64,
    }

    /// Where the tensors of one position of the program lie in the arena.
    #[derive(Debug, Clone)]
    struct UseLayout {
        block: u32,
        offsets: Vec<u64>,
    }

    /// See `engine::Stats`.
    #[derive(Debug, Clone)]
    struct StatsFacts {
        uses: u64,
        on_demand: u64,
        mispredicted: u64,
        rebuilds: u64,
        adopted: u64,
        errors: u64,
        verified_bytes: u64,
        mismatches: u64,
        passes: u64,
        bytes: u64,
        copies: u64,
        pinned_bytes: u64,
        pin_failures: u64,
        staging_bytes: u64,
        encoded_bytes: u64,
        decoded_bytes: u64,
        code_bytes: u64,
    }

    /// See `engine::Record`; times in nanoseconds.
    #[derive(Debug, Clone)]
    struct RecordFacts {
        number: u64,
        block: u32,
        bytes: u64,
        stretch_bytes: u64,
        copy_start_ns: u64,
        copy_end_ns: u64,
        wait_ns: u64,
        start_ns: u64,
        end_ns: u64,
    }

    extern "Rust" {
        type Handle;
        fn make_plan(
            tensors: &Vec<TensorSpec>,
            order: &Vec<u32>,
            budget_bytes: u64,
            min_stream_bytes: u64,
        ) -> Result<PlanFacts>;
        fn plan_json(inputs: &CxxString) -> Result<String>;
        fn make_engine(spec: &EngineSpec) -> Result<Box<Handle>>;
        fn enter(self: &Handle, block: u32, stream: u64) -> Result<u32>;
        fn may_block(self: &Handle, block: u32) -> bool;
        fn exit(self: &Handle, stream: u64) -> Result<()>;
        fn prefetch(self: &Handle, stream: u64) -> Result<()>;
        fn begin_pass(self: &Handle) -> Result<()>;
        fn end_pass(self: &Handle) -> Result<()>;
        fn reload(self: &Handle, block: u32) -> Result<()>;
        fn wants_rebuild(self: &Handle) -> bool;
        fn rebuild(self: &Handle, budget: u64, address: u64, bytes: u64, stream: u64)
        -> Result<()>;
        fn vacate(self: &Handle) -> Result<()>;
        fn plan_for(self: &Handle, budget_bytes: u64) -> Result<PlanFacts>;
        fn plan_in_force(self: &Handle) -> Result<PlanFacts>;
        fn layout(self: &Handle) -> Result<Vec<UseLayout>>;
        fn order(self: &Handle) -> Result<Vec<u32>>;
        fn stats(self: &Handle) -> Result<StatsFacts>;
        fn host_facts(self: &Handle) -> Result<Vec<u64>>;
        fn give_back(self: &Handle, bytes: u64);
        fn last_errors(self: &Handle) -> Result<Vec<String>>;
        fn records(self: &Handle) -> Result<Vec<RecordFacts>>;
        fn close(self: &Handle) -> Result<()>;
        fn cuda_driver_version() -> Result<i32>;
        fn measure_copy(device: i32, bytes: u64, repeats: u32, page_locked: bool) -> Result<f64>;
        fn measure_page_lock(device: i32, max_bytes: u64) -> Result<u64>;
        fn encode_stream(raw: &[u8]) -> Result<Vec<u8>>;
        /// What `decode_stream` would refuse for its sizes.
        fn check_stream(encoded: &[u8], elements: u64) -> Result<()>;
        fn decode_stream(encoded: &[u8], raw: &mut [u8]) -> Result<()>;
        /// Test only: a panic inside the fence.
        fn panic_for_test() -> Result<()>;
    }
}

/// An engine, shared by the hooks of a model and whoever made it.
#[derive(Debug)]
pub struct Handle {
    engine: Engine,
}

fn profile_of(tensors: &[ffi::TensorSpec], order: &[u32], min_stream_bytes: u64) -> Profile {
    let tensor = |spec: &ffi::TensorSpec| Tensor { block: spec.block, bytes: spec.bytes };
    Profile {
        tensors: tensors.iter().map(tensor).collect(),
        order: order.to_vec(),
        min_stream_bytes,
        ..Profile::default()
    }
}

#[expect(clippy::ptr_arg, reason = "cxx passes a rust::Vec")]
fn make_plan(
    tensors: &Vec<ffi::TensorSpec>,
    order: &Vec<u32>,
    budget_bytes: u64,
    min_stream_bytes: u64,
) -> Result<ffi::PlanFacts> {
    fence(|| {
        let profile = profile_of(tensors, order, min_stream_bytes);
        Ok(facts::of_plan(&plan(&profile, budget_bytes)?))
    })
}

fn plan_json(inputs: &cxx::CxxString) -> Result<String> {
    fence(|| {
        let inputs = inputs.to_str().map_err(|_| Error::Invalid("the inputs are not UTF-8".into()));
        crate::plan::plan_json(inputs?)
    })
}

fn make_engine(spec: &ffi::EngineSpec) -> Result<Box<Handle>> {
    fence(|| Ok(Box::new(Handle { engine: making::engine(spec)? })))
}

fn panic_for_test() -> Result<()> {
    fence(|| panic!("a panic for a test"))
}

impl Handle {
    fn enter(&self, block: u32, stream: u64) -> Result<u32> {
        fence(|| self.engine.enter(block, ComputeStream(stream)))
    }

    fn may_block(&self, block: u32) -> bool {
        self.engine.may_block(block)
    }

    fn exit(&self, stream: u64) -> Result<()> {
        fence(|| self.engine.exit(ComputeStream(stream)))
    }

    fn prefetch(&self, stream: u64) -> Result<()> {
        fence(|| self.engine.prefetch(ComputeStream(stream)))
    }

    fn begin_pass(&self) -> Result<()> {
        fence(|| {
            self.engine.check_files()?;
            self.engine.begin_pass();
            Ok(())
        })
    }

    fn end_pass(&self) -> Result<()> {
        fence(|| {
            self.engine.end_pass();
            Ok(())
        })
    }

    fn reload(&self, block: u32) -> Result<()> {
        fence(|| self.engine.reload(block))
    }

    fn wants_rebuild(&self) -> bool {
        self.engine.wants_rebuild()
    }

    fn rebuild(&self, budget_bytes: u64, address: u64, bytes: u64, stream: u64) -> Result<()> {
        fence(|| self.engine.rebuild(budget_bytes, address, bytes, ComputeStream(stream)))
    }

    fn vacate(&self) -> Result<()> {
        fence(|| self.engine.vacate())
    }

    fn plan_for(&self, budget_bytes: u64) -> Result<ffi::PlanFacts> {
        fence(|| Ok(facts::of_plan(&self.engine.plan_for(budget_bytes)?)))
    }

    fn plan_in_force(&self) -> Result<ffi::PlanFacts> {
        fence(|| Ok(facts::of_plan(&self.engine.forecast())))
    }

    fn layout(&self) -> Result<Vec<ffi::UseLayout>> {
        fence(|| {
            let layout = self.engine.layout().into_iter();
            Ok(layout.map(|(block, offsets)| ffi::UseLayout { block, offsets }).collect())
        })
    }

    fn order(&self) -> Result<Vec<u32>> {
        fence(|| Ok(self.engine.order()))
    }

    fn stats(&self) -> Result<ffi::StatsFacts> {
        fence(|| Ok(facts::of_stats(&self.engine.stats())))
    }

    fn host_facts(&self) -> Result<Vec<u64>> {
        fence(|| Ok(self.engine.host_facts().numbers().to_vec()))
    }

    fn give_back(&self, bytes: u64) {
        self.engine.give_back(bytes);
    }

    fn last_errors(&self) -> Result<Vec<String>> {
        fence(|| Ok(self.engine.last_errors()))
    }

    fn records(&self) -> Result<Vec<ffi::RecordFacts>> {
        fence(|| {
            let records = self.engine.records();
            Ok(records.iter().map(facts::of_record).collect())
        })
    }

    fn close(&self) -> Result<()> {
        fence(|| self.engine.close())
    }
}
