//! Copies to the device: as they are in batches, or through the decoder.

use std::ffi::c_void;

use super::api::Api;
use super::decoder::Link;
use super::list::List;
use super::stream::CopyStream;
use super::{CudaDevice, H2d, Source, batch};
use crate::error::{Error, Result};
use crate::units::index;

/// The copies of one call.
type Copies = List<{ batch::MOST }>;

/// The first byte of a source in memory.
///
/// # Errors
///
/// [`Error::Internal`] for a file.
pub(super) fn host_address(copy: &H2d) -> Result<u64> {
    match copy.source {
        Source::Memory { address } => Ok(address),
        Source::File { .. } | Source::Encoded { .. } => {
            Err(Error::Internal("only memory is copied as it is".into()))
        }
    }
}

/// Enqueues one copy on `stream`; the context is current.
pub(super) fn copy_one(api: &'static Api, copy: &H2d, stream: &CopyStream) -> Result<()> {
    let source = host_address(copy)?;
    // SAFETY: the engine checked the target against the arena, or it is the decoder's; the source
    // is page-locked and kept alive by the owner of the engine, or a staging chunk whose end is
    // marked.
    let code = unsafe {
        (api.cuMemcpyHtoDAsync_v2)(
            copy.target,
            index(source) as *const c_void,
            index(copy.bytes),
            stream.raw,
        )
    };
    api.check("cuMemcpyHtoDAsync", code)
}

impl CudaDevice {
    /// Enqueues copies, which have no order; the context is current.
    pub(super) fn copy_all(&self, copies: &[H2d]) -> Result<()> {
        let Some(decoder) = &self.decoder else { return self.copy_raw(copies) };
        let (stream, batches, locks) = (&self.copy_stream, &self.batches, &self.locks);
        let link = Link { stream, batches, locks };
        for part in copies.chunks(batch::MOST) {
            let (mut raw, mut encoded) = (Copies::new(), Copies::new());
            for &copy in part {
                if copy.source.is_encoded() { encoded.push(copy) } else { raw.push(copy) }
            }
            self.copy_raw(raw.all())?;
            decoder.copy(encoded.all(), &link)?;
        }
        Ok(())
    }

    /// Enqueues copies that are not encoded; the context is current.
    fn copy_raw(&self, copies: &[H2d]) -> Result<()> {
        for part in copies.chunks(batch::MOST) {
            if !self.batches.copy(part, &self.copy_stream)? {
                let copy = |copy| copy_one(self.primary.api, copy, &self.copy_stream);
                part.iter().try_for_each(copy)?;
            }
        }
        Ok(())
    }
}
