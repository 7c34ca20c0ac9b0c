//! Chooses the base of a tile.

use super::{Element, Groups};

/// One group of so many is looked at.
const SAMPLED: usize = 4;

/// 4 less than the first of the three neighbouring exponents that a sample has most of; at least 0,
/// or, of fp8, 16 more where it would be less.
pub(super) fn base(element: Element, exponents: &Groups) -> u8 {
    // Four counts, as neighbours are often equal and an addition waits for the one before; at most
    // 64 elements are in each.
    let mut parts = [[0_u8; 256]; 4];
    for group in exponents.iter().step_by(SAMPLED) {
        for (n, &exponent) in group.iter().enumerate() {
            parts[n % 4][usize::from(exponent)] += 1;
        }
    }
    let mut counts = [0_u16; 256];
    for (n, count) in counts.iter_mut().enumerate() {
        *count = parts.iter().map(|part| u16::from(part[n])).sum();
    }
    let mut threes = [0_u16; 254];
    for (n, three) in threes.iter_mut().enumerate() {
        *three = counts[n] + counts[n + 1] + counts[n + 2];
    }
    let most = threes.iter().copied().fold(0, u16::max);
    let first = threes.iter().zip(0_u8..).find(|(three, _)| **three == most);
    element.base_of(first.map_or(0, |(_, first)| first))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The base of exponents that come by turns.
    fn of(turns: &[u8]) -> u8 {
        let mut exponents = [[0; 8]; 128];
        let all = exponents.as_flattened_mut().iter_mut();
        all.zip(turns.iter().cycle()).for_each(|(exponent, &turn)| *exponent = turn);
        base(Element::Bf16, &exponents)
    }

    #[test]
    fn the_base_is_four_below_the_most_frequent_three() {
        assert_eq!(of(&[119, 120, 121, 121, 122, 122, 122]), 116);
        assert_eq!(of(&[118, 120, 122, 120, 122, 9, 200]), 116);
        // Alone, an exponent is the last of the first three that have it.
        assert_eq!(of(&[127]), 121);
    }

    #[test]
    fn at_the_ends_it_stays_a_byte() {
        assert_eq!(of(&[0]), 0);
        assert_eq!(of(&[4, 5, 6]), 0);
        assert_eq!(of(&[5, 6, 7]), 1);
        assert_eq!(of(&[255]), 249);
    }
}
