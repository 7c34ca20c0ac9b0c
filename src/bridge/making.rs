//! An engine, made of what C++ says of it.

use std::sync::Arc;

use super::{ffi, profile_of};
use crate::codec::Element;
use crate::driver::cuda::{CudaDevice, CudaOptions};
use crate::driver::host::files::Files;
use crate::driver::host::shim::WeightFile;
use crate::driver::host::{HostDevice, HostOptions};
use crate::driver::mutant::{Dropped, Mutant};
use crate::driver::{Device, Source};
use crate::engine::{Adapt, Encode, Engine, Options, Spec};
use crate::error::{Error, Result};
use crate::plan::Profile;
use crate::units::index;

fn files(spec: &ffi::EngineSpec) -> Result<Files> {
    spec.files.iter().map(|path| WeightFile::open(path)).collect()
}

/// Where weights are encoded only if that is of use, a device that does not decode is of use too.
fn cuda(spec: &ffi::EngineSpec) -> Result<CudaDevice> {
    let make = |decode_buffer| {
        let timing = spec.trace_uses > 0 || spec.adapt;
        let files = files(spec)?;
        CudaDevice::new(CudaOptions { ordinal: spec.device, files, timing, decode_buffer })
    };
    let buffer = (spec.decode_bytes > 0).then_some((spec.decode_address, spec.decode_bytes));
    match (make(buffer), encode(spec)) {
        (Err(error), Encode::WhereCopiesDecide) if buffer.is_some() && !error.is_sticky() => {
            make(None)
        }
        (device, _) => device,
    }
}

fn device(spec: &ffi::EngineSpec) -> Result<Arc<dyn Device>> {
    let device: Arc<dyn Device> = if spec.device < 0 {
        let (files, copy_bytes_per_s) = (files(spec)?, spec.copy_bytes_per_s);
        Arc::new(HostDevice::new(HostOptions { files, copy_bytes_per_s })?)
    } else {
        Arc::new(cuda(spec)?)
    };
    let (ready, done) = (spec.faults & 1 != 0, spec.faults & 2 != 0);
    let dropped = Dropped { ready, done, ..Dropped::default() };
    Ok(match spec.faults & 0b1011 {
        0 => device,
        faults => Arc::new(Mutant::new(device, dropped).corrupting(211 * u64::from(faults / 8))),
    })
}

fn encode(spec: &ffi::EngineSpec) -> Encode {
    match spec.encode {
        0 => Encode::Off,
        1 => Encode::WhereCopiesDecide,
        _ => Encode::ALWAYS,
    }
}

/// For each tensor what it may be encoded as.
fn encodable(spec: &ffi::EngineSpec) -> Result<Vec<Option<Element>>> {
    let mut encodable = vec![None; spec.tensors.len()];
    let named = [
        ("encodable", &spec.encodable, Element::Bf16),
        ("encodable_fp8", &spec.encodable_fp8, Element::Fp8),
    ];
    for (name, numbers, element) in named {
        for &number in numbers {
            let Some(found) = encodable.get_mut(index(number)) else {
                let count = spec.tensors.len();
                return Err(Error::Invalid(format!("{name} names tensor {number} of {count}")));
            };
            if found.replace(element).is_some_and(|other| other != element) {
                let both = "both in encodable and in encodable_fp8; a tensor is one of them";
                return Err(Error::Invalid(format!("tensor {number} is {both}")));
            }
        }
    }
    Ok(encodable)
}

/// See `ffi::EngineSpec`.
///
/// # Errors
///
/// Those of [`Engine::new`] and of the device.
pub(super) fn engine(spec: &ffi::EngineSpec) -> Result<Engine> {
    let source = |tensor: &ffi::TensorSpec| match u32::try_from(tensor.file) {
        Ok(file) => Source::File { file, offset: tensor.place },
        Err(_) => Source::Memory { address: tensor.place },
    };
    let profile = Profile {
        resident_blocks: spec.manual.then(|| spec.resident_blocks.clone()),
        window_uses: u32::try_from(spec.window).ok(),
        one_pass: !spec.adapt,
        ..profile_of(&spec.tensors, &spec.order, spec.min_stream_bytes)
    };
    let engine_spec = Spec {
        profile,
        sources: spec.tensors.iter().map(source).collect(),
        names: spec.names.clone(),
        budget_bytes: spec.budget_bytes,
        pinned_bytes: spec.pinned_bytes,
        ram_bytes: spec.ram_bytes,
        page_cache_bytes: spec.page_cache_bytes,
        staging_bytes: spec.staging_bytes,
        encode: encode(spec),
        encodable: encodable(spec)?,
        encoded_bytes: spec.encoded_bytes,
        locked_bytes: spec.locked_bytes,
        trace_uses: usize::try_from(spec.trace_uses.min(1 << 20)).unwrap_or(0),
        options: Options {
            poison: spec.poison,
            timing: spec.trace_uses > 0,
            adapt: if spec.adapt { Adapt::Beside } else { Adapt::Off },
            verify: spec.verify,
            early: u64::from(spec.faults & 4 != 0),
        },
    };
    Engine::new(device(spec)?, engine_spec, spec.arena_address, spec.arena_bytes)
}
