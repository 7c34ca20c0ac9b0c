//! Which tensors get a share of a budget that does not hold all of them. Pure.

/// Which of these sizes, in order of use, go into `budget_bytes`: spread evenly over the order, so
/// that a slow tier is read ahead while the link carries what a fast one holds; then whatever else
/// fits, largest first. Never a byte more than the budget.
pub fn spread(sizes: &[u64], budget_bytes: u64) -> Vec<bool> {
    let total: u128 = sizes.iter().map(|&bytes| u128::from(bytes)).sum();
    let mut taken = vec![false; sizes.len()];
    let mut left = budget_bytes;
    if total == 0 {
        return taken;
    }
    // What is owed to the order so far, times `total`.
    let mut owed = 0_u128;
    let mut given = 0_u128;
    for (take, &bytes) in taken.iter_mut().zip(sizes) {
        owed += u128::from(bytes) * u128::from(budget_bytes).min(total);
        let after = given + u128::from(bytes) * total;
        // Half of it ahead of what is owed, at most.
        if bytes <= left && after <= owed + u128::from(bytes) * total / 2 {
            (*take, given, left) = (true, after, left - bytes);
        }
    }
    let mut rest: Vec<usize> = (0..sizes.len()).filter(|&at| !taken[at]).collect();
    rest.sort_by_key(|&at| std::cmp::Reverse(sizes[at]));
    for at in rest {
        if sizes[at] <= left {
            (taken[at], left) = (true, left - sizes[at]);
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_spread_over_the_order() {
        let taken = spread(&[10; 9], 30);
        let at: Vec<usize> = (0..9).filter(|&at| taken[at]).collect();
        assert_eq!(at.len(), 3);
        assert!(at.windows(2).all(|pair| pair[1] - pair[0] == 3), "{at:?}");
    }

    #[test]
    fn never_a_byte_more_and_none_left_that_fits() {
        let mut random = 5_u64;
        for _ in 0..5000 {
            let mut below = |limit: u64| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (random >> 33) % limit
            };
            let sizes: Vec<u64> = (0..below(12)).map(|_| 1 + below(1000)).collect();
            let budget = below(6000);
            let taken = spread(&sizes, budget);
            let sum = |want: bool| {
                sizes.iter().zip(&taken).filter(move |(_, t)| **t == want).map(|(s, _)| *s)
            };
            let used: u64 = sum(true).sum();
            assert!(used <= budget, "{sizes:?} in {budget}");
            assert!(sum(false).all(|size| used + size > budget), "{sizes:?} in {budget}");
        }
        assert_eq!(spread(&[1 << 61, 1], 1 << 61), [true, false]);
    }
}
