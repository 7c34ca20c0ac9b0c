//! The weight files of a device: reads of any source into host memory, through or past the page
//! cache.

use super::shim::{self, WeightFile};
use crate::codec::{self, Element};
use crate::driver::Source;
use crate::error::{Error, Result};
use crate::units::index;

/// Open files, as [`Source::File`] numbers them.
#[derive(Debug, Default)]
pub struct Files(Vec<WeightFile>);

impl FromIterator<WeightFile> for Files {
    fn from_iter<T: IntoIterator<Item = WeightFile>>(files: T) -> Self {
        Self(files.into_iter().collect())
    }
}

impl Files {
    fn get(&self, file: u32) -> Result<&WeightFile> {
        let found = self.0.get(index(file));
        found.ok_or_else(|| Error::Invalid(format!("weight file {file} is not open")))
    }

    /// Reads `bytes` bytes of `source` into host memory at `address`; blocks. Files are read
    /// through the page cache; what is encoded is decoded.
    ///
    /// # Errors
    ///
    /// [`Error::Read`].
    pub fn read(&self, source: Source, address: u64, bytes: u64) -> Result<()> {
        match source {
            Source::Memory { address: from } => {
                shim::copy(address, from, bytes);
                Ok(())
            }
            Source::File { file, offset } => self.get(file)?.read_at(offset, address, bytes),
            Source::Encoded { address: from, bytes: encoded, element } => {
                decode(element, (from, u64::from(encoded)), (address, bytes))
            }
        }
    }

    /// As [`crate::driver::Device::check_files`].
    ///
    /// # Errors
    ///
    /// [`Error::Read`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.0.iter().try_for_each(WeightFile::check_unchanged)
    }

    /// As [`crate::driver::Device::read_directly`].
    ///
    /// # Errors
    ///
    /// [`Error::Read`].
    pub fn read_directly(&self, source: Source, address: u64, bytes: u64) -> Result<bool> {
        match source {
            Source::Memory { .. } | Source::Encoded { .. } => {
                self.read(source, address, bytes).map(|()| false)
            }
            Source::File { file, offset } => self.get(file)?.read_directly(offset, address, bytes),
        }
    }
}

/// Decodes the segment at an address and of a size into the bytes at another.
fn decode(
    element: Element,
    (from, encoded): (u64, u64),
    (address, bytes): (u64, u64),
) -> Result<()> {
    let (mut segment, mut raw) = (vec![0_u8; index(encoded)], vec![0_u8; index(bytes)]);
    shim::copy(segment.as_mut_ptr() as u64, from, encoded);
    codec::decode(element, std::hint::black_box(&segment), &mut raw)
        .map_err(|found| Error::Internal(format!("an encoded segment: {found}")))?;
    shim::copy(address, std::hint::black_box(raw).as_ptr() as u64, bytes);
    Ok(())
}
