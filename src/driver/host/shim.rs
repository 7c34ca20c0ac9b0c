//! Safe names for the C shim: page-locks, positioned reads and raw copies of host memory.
#![expect(
    unsafe_code,
    reason = "calls C functions on raw addresses; the only such file of the host"
)]

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};

use super::shim_sys as sys;
use crate::error::{Error, Result};

/// Reads past the page cache begin and end at multiples of this, in the file and in memory.
pub const SECTOR_BYTES: u64 = 4096;

fn reason(code: i32) -> String {
    std::io::Error::from_raw_os_error(code).to_string()
}

/// Bytes in a page of memory.
pub fn page_bytes() -> u64 {
    // SAFETY: takes nothing, reads a constant of the system.
    unsafe { sys::dgls_host_page_bytes() }
}

/// Keeps a range in physical memory.
///
/// # Errors
///
/// [`Error::PageLock`] with the system's reason, usually `RLIMIT_MEMLOCK`.
pub fn lock(address: u64, bytes: u64) -> Result<()> {
    // SAFETY: mlock checks the range and fails on unmapped addresses; it writes nothing.
    match unsafe { sys::dgls_host_lock(address, bytes) } {
        0 => Ok(()),
        code => Err(Error::PageLock { bytes, reason: reason(code) }),
    }
}

/// Undoes [`lock`]; a range that is not locked is left alone.
pub fn unlock(address: u64, bytes: u64) {
    // SAFETY: munlock checks the range and fails on unmapped addresses; it writes nothing.
    let _ = unsafe { sys::dgls_host_unlock(address, bytes) };
}

/// Whole pages that go back to the system on drop.
#[derive(Debug)]
pub struct Pages {
    address: u64,
    bytes: u64,
}

impl Pages {
    /// Allocates `bytes` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::PageLock`] when there is no memory.
    pub fn new(bytes: u64) -> Result<Self> {
        // SAFETY: allocates; 0 means that there was no memory and is checked.
        match unsafe { sys::dgls_host_allocate(bytes) } {
            0 => Err(Error::PageLock { bytes, reason: "out of host memory".into() }),
            address => Ok(Self { address, bytes }),
        }
    }

    /// First byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the address came from dgls_host_allocate and is freed once, here.
        unsafe { sys::dgls_host_free(self.address, self.bytes) }
    }
}

/// A file of weights, open for reading.
#[derive(Debug)]
pub struct WeightFile {
    handle: i64,
    /// The same file for reads past the page cache; none where those are not to be had.
    direct: Option<i64>,
    refuses_direct: AtomicBool,
    name: String,
    identity: (u64, i64),
}

impl WeightFile {
    /// Opens a file and remembers its size and time of change.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] with the system's reason.
    pub fn open(path: &str) -> Result<Self> {
        let name = path.rsplit(['/', '\\']).next().unwrap_or(path).to_owned();
        let refused = |reason| Error::Read { file: name.clone(), offset: 0, bytes: 0, reason };
        let path = CString::new(path).map_err(|_| refused("the path holds a NUL byte".into()))?;
        let mut handle = -1;
        // SAFETY: the path is a NUL-terminated string that outlives the call; `handle` is ours.
        let code = unsafe { sys::dgls_host_open(path.as_ptr(), &raw mut handle) };
        if code != 0 {
            return Err(refused(reason(code)));
        }
        let refuses_direct = AtomicBool::new(false);
        let mut file = Self { handle, direct: None, refuses_direct, name, identity: (0, 0) };
        file.identity = file.identity_now()?;
        let mut direct = -1;
        // SAFETY: the handle is open; the target is ours.
        let code = unsafe { sys::dgls_host_open_direct(handle, &raw mut direct) };
        file.direct = (code == 0).then_some(direct);
        Ok(file)
    }

    fn identity_now(&self) -> Result<(u64, i64)> {
        let (mut bytes, mut modified_ns) = (0, 0);
        // SAFETY: the handle is open for as long as `self` lives; both targets are ours.
        let code =
            unsafe { sys::dgls_host_identity(self.handle, &raw mut bytes, &raw mut modified_ns) };
        match code {
            0 => Ok((bytes, modified_ns)),
            code => Err(self.refused(0, 0, reason(code))),
        }
    }

    /// Refuses a file that was written to since it was opened.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] with both sizes.
    pub fn check_unchanged(&self) -> Result<()> {
        let identity = self.identity_now()?;
        if identity == self.identity {
            return Ok(());
        }
        let (before, now) = (self.identity.0, identity.0);
        let sizes = format!("opened with {before} bytes, now {now} bytes");
        Err(self.refused(0, 0, format!("the file changed while in use ({sizes})")))
    }

    fn refused(&self, offset: u64, bytes: u64, reason: String) -> Error {
        Error::Read { file: self.name.clone(), offset, bytes, reason }
    }

    /// Size in bytes when the file was opened.
    pub fn bytes(&self) -> u64 {
        self.identity.0
    }

    /// Reads a range into host memory. Blocks.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] on a system error, a short read, or a file that changed since it was
    /// opened: other bytes than the plan was made for must not become weights.
    pub fn read_at(&self, offset: u64, address: u64, bytes: u64) -> Result<()> {
        let mut found = 0;
        // SAFETY: the handle is open; the caller of the device owns [address, address + bytes).
        let code =
            unsafe { sys::dgls_host_read_at(self.handle, offset, address, bytes, &raw mut found) };
        self.check(offset, bytes, code, found)
    }

    /// Whether reads past the page cache are to be had.
    pub fn reads_directly(&self) -> bool {
        self.direct.is_some() && !self.refuses_direct.load(Ordering::Relaxed)
    }

    /// As [`WeightFile::read_at`], past the page cache and of whole sectors: writes also what lies
    /// before and behind the range, out to multiples of [`SECTOR_BYTES`]. `address` has to have the
    /// place within its sector that `offset` has. Where the file system refuses, the range is read
    /// through the page cache, and so it will be from then on. Says whether it was read directly.
    ///
    /// # Errors
    ///
    /// As [`WeightFile::read_at`].
    pub fn read_directly(&self, offset: u64, address: u64, bytes: u64) -> Result<bool> {
        let before = offset % SECTOR_BYTES;
        let handle = self.direct.filter(|_| self.reads_directly());
        if let (Some(handle), true) = (handle, address % SECTOR_BYTES == before) {
            let sectors = (before + bytes).next_multiple_of(SECTOR_BYTES);
            let mut found = 0;
            // SAFETY: the handle is open; the caller owns the sectors around the range.
            let code = unsafe {
                let (from, to) = (offset - before, address - before);
                sys::dgls_host_read_at(handle, from, to, sectors, &raw mut found)
            };
            // Behind the end of a file a read of whole sectors may be refused.
            if code == 0 || found >= before + bytes {
                self.check(offset, bytes, 0, found.saturating_sub(before).min(bytes))?;
                return Ok(true);
            }
            // Most likely sectors of another size. An error of the disk comes again below.
            self.refuses_direct.store(true, Ordering::Relaxed);
        }
        self.read_at(offset, address, bytes).map(|()| false)
    }

    /// What became of a read of `bytes` bytes that found so many.
    fn check(&self, offset: u64, bytes: u64, code: i32, found: u64) -> Result<()> {
        // Looked at after the read, so that no change before its end goes unseen.
        let identity = self.identity_now()?;
        if identity != self.identity {
            let found = format!(
                "the file changed while in use (opened with {} bytes, now {} bytes)",
                self.identity.0, identity.0
            );
            return Err(self.refused(offset, bytes, found));
        }
        match code {
            0 if found == bytes => Ok(()),
            0 => Err(self.refused(offset, bytes, format!("the file ended after {found} bytes"))),
            code => Err(self.refused(offset, bytes, reason(code))),
        }
    }
}

impl Drop for WeightFile {
    fn drop(&mut self) {
        for handle in self.direct.into_iter().chain([self.handle]) {
            // SAFETY: the handle was opened by this shim and is closed once, here.
            unsafe { sys::dgls_host_close(handle) }
        }
    }
}

/// Copies host memory; the ranges do not overlap: one is in the arena or a chunk, one is not.
pub fn copy(target: u64, source: u64, bytes: u64) {
    // SAFETY: the engine checked `target` against the arena, and `source` is a weight that the
    // owner of the engine keeps alive.
    unsafe { sys::dgls_host_copy(target, source, bytes) }
}

/// Fills host memory.
pub fn fill(target: u64, value: u8, bytes: u64) {
    // SAFETY: the engine checked `target` against the arena.
    unsafe { sys::dgls_host_fill(target, value, bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named_without_its_folder() {
        let error = WeightFile::open("/nowhere/weights.safetensors").expect_err("no such file");
        let text = error.to_string();
        assert!(text.contains(" of weights.safetensors failed"), "{text}");
    }

    #[test]
    fn a_read_beyond_the_end_says_how_much_there_was() {
        let path = std::env::temp_dir().join(format!("dgls-shim-{}", std::process::id()));
        std::fs::write(&path, [7_u8; 100]).expect("the temporary folder is writable");
        let file = WeightFile::open(path.to_str().expect("a UTF-8 path")).expect("just written");
        let pages = Pages::new(4096).expect("4 KiB");
        let error = file.read_at(90, pages.address(), 20).expect_err("10 bytes are there");
        assert!(error.to_string().contains("ended after 10 bytes"), "{error}");
        file.read_at(90, pages.address(), 10).expect("within the file");
        std::fs::write(&path, [7_u8; 50]).expect("writable");
        let error = file.read_at(0, pages.address(), 10).expect_err("the file changed");
        assert!(error.to_string().contains("changed while in use"), "{error}");
        std::fs::remove_file(path).expect("ours");
    }
}
