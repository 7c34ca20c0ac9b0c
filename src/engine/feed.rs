//! How weights reach the device: page-locked in place, or through staging chunks.

use std::sync::Arc;

use super::Spec;
use super::executor::Weight;
use crate::driver::{Device, Source};
use crate::error::Result;
use crate::plan::{Plan, Tensor};
use crate::pool::{Pins, Span, Staging};

/// Most bytes of one staging chunk: enough for the full rate of a link. At least two chunks fit the
/// budget, so that one is read while the other is copied.
const CHUNK_BYTES: u64 = 16 << 20;
const LEAST_CHUNK_BYTES: u64 = 64 << 10;
const MOST_CHUNKS: u32 = 64;

/// Page-locks what is copied in every pass, largest first; residents are copied once. What is
/// locked already stays locked as far as it is still streamed, or the budget leaves room for it.
pub(super) fn lock_streamed(
    device: &Arc<dyn Device>,
    spec: &Spec,
    plan: &Plan,
    before: Option<Pins>,
) -> Pins {
    let mut spans: Vec<Span> = Vec::new();
    for (number, source) in spec.sources.iter().enumerate() {
        if let (Source::Memory { address }, false) = (source, plan.resident[number]) {
            if !device.takes(*source, false) {
                let bytes = spec.profile.tensors[number].bytes;
                spans.push(Span { address: *address, bytes });
            }
        }
    }
    spans.sort_by_key(|span| std::cmp::Reverse(span.bytes));
    let page = crate::driver::host::shim::page_bytes();
    let mut pins = before.unwrap_or_else(|| Pins::none(Arc::clone(device)));
    pins.lock(&spans, spec.pinned_bytes, page);
    pins
}

/// Where each weight lies, and whether the device takes it from there.
pub(super) fn weights_of(device: &dyn Device, spec: &Spec, pins: &Pins) -> Vec<Weight> {
    let weight = |(&source, tensor): (&Source, &Tensor)| {
        let locked = match source {
            Source::Memory { address } => pins.covers(Span { address, bytes: tensor.bytes }),
            Source::File { .. } => false,
        };
        Weight { source, direct: device.takes(source, locked) }
    };
    std::iter::zip(&spec.sources, &spec.profile.tensors).map(weight).collect()
}

/// The chunks that there are, or new ones; none when the device takes every weight as it is.
pub(super) fn staging_for(
    device: &Arc<dyn Device>,
    spec: &Spec,
    weights: &[Weight],
    existing: Option<Staging>,
) -> Result<Option<Staging>> {
    if weights.iter().all(|weight| weight.direct) {
        return Ok(None);
    }
    if existing.is_some() {
        return Ok(existing);
    }
    let half = spec.staging_bytes / 2 / LEAST_CHUNK_BYTES * LEAST_CHUNK_BYTES;
    let chunk_bytes = half.clamp(LEAST_CHUNK_BYTES, CHUNK_BYTES);
    let count = u32::try_from(spec.staging_bytes / chunk_bytes).unwrap_or(u32::MAX);
    Staging::new(Arc::clone(device), count.clamp(1, MOST_CHUNKS), chunk_bytes).map(Some)
}
