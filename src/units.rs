//! Sizes and alignment that every folder agrees on.

/// Every tensor in the arena starts at a multiple of this many bytes: what kernels with vector
/// loads and the allocator of torch itself assume.
pub const ALIGN_BYTES: u64 = 256;

/// Rounds up to [`ALIGN_BYTES`]; saturates at the end of the range.
pub fn align_up(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(ALIGN_BYTES).unwrap_or(u64::MAX)
}

/// A number that indexes memory; every index of ours was checked against a `Vec` before.
///
/// # Panics
///
/// On a target whose addresses are shorter than the number.
pub(crate) fn index(number: impl TryInto<usize>) -> usize {
    number.try_into().ok().expect("an index fits the address space")
}

/// A count as the 32 bit number that crosses the bridge.
///
/// # Panics
///
/// If there are more than 2^32 - 1 things; `Program` refuses such a model first.
pub(crate) fn narrow(count: usize) -> u32 {
    u32::try_from(count).expect("a count of blocks, tensors or copies fits 32 bits")
}

/// A size as a real number. Exact below 2^53 bytes, 8 PiB.
#[expect(clippy::cast_precision_loss, reason = "sizes beyond 8 PiB may lose their last bytes")]
pub(crate) fn real(bytes: u64) -> f64 {
    bytes as f64
}

/// A count as a real number.
pub(crate) fn count(items: usize) -> f64 {
    real(items as u64)
}

/// The whole bytes of a size; 0 for what is negative or no number.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, which is what is wanted"
)]
pub(crate) fn whole(bytes: f64) -> u64 {
    bytes as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_rounds_up_and_never_wraps() {
        assert_eq!(align_up(0), 0);
        assert_eq!(align_up(1), 256);
        assert_eq!(align_up(256), 256);
        assert_eq!(align_up(u64::MAX), u64::MAX);
    }
}
