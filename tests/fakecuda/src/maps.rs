//! How the process has mapped a range of addresses, which decides whether it can be page-locked.

/// What the process may do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// A part of the range is not mapped, or not readable.
    None,
    Read,
    ReadWrite,
}

/// The access to all of `bytes` bytes at `address`.
#[cfg(target_os = "linux")]
pub(crate) fn access(address: usize, bytes: usize) -> Access {
    std::fs::read_to_string("/proc/self/maps")
        .map_or(Access::ReadWrite, |maps| access_in(&maps, address, bytes))
}

/// Assumed: only Linux lists its mappings in a file.
#[cfg(not(target_os = "linux"))]
pub(crate) fn access(_address: usize, _bytes: usize) -> Access {
    Access::ReadWrite
}

#[cfg(any(target_os = "linux", test))]
fn access_in(maps: &str, address: usize, bytes: usize) -> Access {
    let end = address.saturating_add(bytes);
    let mut next = address;
    let mut access = Access::ReadWrite;
    for mapping in maps.lines().filter_map(parse) {
        if mapping.end <= next {
            continue;
        }
        if next < mapping.start || !mapping.permissions.starts_with('r') {
            return Access::None;
        }
        if !mapping.permissions.starts_with("rw") {
            access = Access::Read;
        }
        next = mapping.end;
        if end <= next {
            return access;
        }
    }
    Access::None
}

#[cfg(any(target_os = "linux", test))]
struct Mapping<'a> {
    start: usize,
    end: usize,
    permissions: &'a str,
}

#[cfg(any(target_os = "linux", test))]
fn parse(line: &str) -> Option<Mapping<'_>> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let address = |digits| usize::from_str_radix(digits, 16).ok();
    Some(Mapping { start: address(start)?, end: address(end)?, permissions: rest })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
1000-3000 r--p 00000000 08:01 12 /a/file
3000-4000 rw-p 00000000 00:00 0
6000-7000 rw-p 00000000 00:00 0 [heap]
7000-8000 ---p 00000000 00:00 0
";

    #[test]
    fn a_range_has_the_least_access_of_its_mappings() {
        let cases = [
            (0x3000, 0x1000, Access::ReadWrite),
            (0x3FFF, 1, Access::ReadWrite),
            (0x1800, 0x100, Access::Read),
            (0x2FFF, 2, Access::Read),
            (0x3FFF, 2, Access::None),
            (0x0FFF, 2, Access::None),
            (0x6FFF, 2, Access::None),
            (0x9000, 1, Access::None),
        ];
        for (address, bytes, expected) in cases {
            assert_eq!(access_in(MAPS, address, bytes), expected, "{address:#x} + {bytes}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_can_write_its_heap_and_not_its_constants() {
        static CONSTANT: [u8; 64] = [7; 64];
        let heap = [0_u8; 64].to_vec();
        assert_eq!(access(heap.as_ptr().addr(), heap.len()), Access::ReadWrite);
        assert_eq!(access(CONSTANT.as_ptr().addr(), CONSTANT.len()), Access::Read);
        assert_eq!(access(8, 8), Access::None);
    }
}
