//! What the engine tells, in the shapes that C++ may see.

use super::ffi;
use crate::engine::{Record, Stats};
use crate::plan::Plan;

pub(super) fn of_plan(plan: &Plan) -> ffi::PlanFacts {
    ffi::PlanFacts {
        resident: plan.resident.iter().map(|&resident| u8::from(resident)).collect(),
        resident_bytes: plan.resident_bytes,
        streamed_bytes: plan.streamed_bytes,
        ring_bytes: plan.ring_bytes,
        arena_bytes: plan.arena_bytes,
        least_bytes: plan.least_bytes,
        passes: plan.program.passes,
        period_s: plan.period_s.unwrap_or(-1.0),
        bound_s: plan.bound_s.unwrap_or(-1.0),
    }
}

pub(super) fn of_stats(stats: &Stats) -> ffi::StatsFacts {
    let counters = stats.counters;
    ffi::StatsFacts {
        uses: counters.uses,
        on_demand: counters.on_demand,
        mispredicted: counters.mispredicted,
        rebuilds: counters.rebuilds,
        adopted: counters.adopted,
        errors: counters.errors,
        verified_bytes: counters.verified_bytes,
        mismatches: counters.mismatches,
        passes: stats.passes,
        bytes: stats.bytes,
        copies: stats.copies,
        pinned_bytes: stats.pinned_bytes,
        pin_failures: stats.pin_failures,
        staging_bytes: stats.staging_bytes,
        encoded_bytes: stats.encoded_bytes,
        decoded_bytes: stats.decoded_bytes,
        code_bytes: stats.code_bytes,
    }
}

pub(super) fn of_record(record: &Record) -> ffi::RecordFacts {
    ffi::RecordFacts {
        number: record.number,
        block: record.block,
        bytes: record.bytes,
        stretch_bytes: record.stretch_bytes,
        copy_start_ns: record.times.copy_start_ns,
        copy_end_ns: record.times.copy_end_ns,
        wait_ns: record.times.wait_ns,
        start_ns: record.times.start_ns,
        end_ns: record.times.end_ns,
    }
}
