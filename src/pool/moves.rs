//! In which order residents go to their new places within the arena, so that none is overwritten
//! before it has gone.

/// One resident, or a part of one, that goes elsewhere in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// Which one.
    pub tensor: u32,
    /// Arena offset of its first byte now.
    pub from: u64,
    /// Arena offset of its first byte afterwards.
    pub to: u64,
    /// Size.
    pub bytes: u64,
}

/// The moves in an order in which they can be made one after the other, and those that were left
/// out because they stand in each other's way: their tensors have to be brought again.
pub fn in_order(mut pending: Vec<Move>) -> (Vec<Move>, Vec<Move>) {
    let (mut ordered, mut dropped) = (Vec::with_capacity(pending.len()), Vec::new());
    pending.retain(|one| one.from != one.to);
    while !pending.is_empty() {
        let before = ordered.len();
        let mut at = 0;
        while at < pending.len() {
            let one = pending[at];
            let blocked = |(other, next): (usize, &Move)| {
                other != at && overlap(one.to, one.bytes, next.from, next.bytes)
            };
            if pending.iter().enumerate().any(blocked) {
                at += 1;
            } else {
                ordered.push(pending.swap_remove(at));
            }
        }
        if ordered.len() == before {
            // A cycle: the smallest one makes room for the others.
            let smallest = (0..pending.len()).min_by_key(|&at| pending[at].bytes);
            dropped.extend(smallest.map(|at| pending.swap_remove(at)));
        }
    }
    (ordered, dropped)
}

/// The copies of one move, none of which reads what it writes; `None` where they would be many and
/// small, because a tensor moves by little.
pub fn copies(one: Move) -> Option<impl Iterator<Item = Move>> {
    const MOST: u64 = 64;
    let step = one.from.abs_diff(one.to).min(one.bytes).max(1);
    let parts = one.bytes.div_ceil(step);
    (parts <= MOST).then(|| {
        (0..parts).map(move |part| {
            // Towards the front the first bytes go first, towards the back the last ones.
            let part = if one.to < one.from { part } else { parts - 1 - part };
            let start = part * step;
            Move {
                from: one.from + start,
                to: one.to + start,
                bytes: step.min(one.bytes - start),
                ..one
            }
        })
    })
}

fn overlap(a: u64, a_bytes: u64, b: u64, b_bytes: u64) -> bool {
    a < b + b_bytes && b < a + a_bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes the moves in an arena whose bytes are named; returns what lies where afterwards.
    fn run(arena: &mut [u32], moves: &[Move]) {
        for one in moves {
            for part in copies(*one).expect("few parts") {
                let range = |start: u64| {
                    let start = usize::try_from(start).expect("small");
                    start..start + usize::try_from(part.bytes).expect("small")
                };
                assert!(!overlap(part.from, part.bytes, part.to, part.bytes), "{part:?}");
                let bytes = arena[range(part.from)].to_vec();
                arena[range(part.to)].copy_from_slice(&bytes);
            }
        }
    }

    #[test]
    fn every_byte_arrives_whatever_the_places() {
        let mut random = 7_u64;
        let mut below = |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % limit
        };
        let (mut all_moved, mut all_dropped) = (0, 0);
        for _ in 0..2000 {
            // Tensors one behind the other in two orders, with gaps.
            let sizes: Vec<u64> = (0..6).map(|_| 4 + below(5)).collect();
            let mut places = [[0; 6]; 2];
            for place in &mut places {
                let mut order: Vec<usize> = (0..6).collect();
                order.sort_by_key(|_| below(1000));
                let mut next = below(8);
                for tensor in order {
                    place[tensor] = next;
                    next += sizes[tensor] + below(4);
                }
            }
            let moves: Vec<Move> = (0..6_u32)
                .zip(sizes.iter().zip(places[0].iter().zip(&places[1])))
                .map(|(tensor, (&bytes, (&from, &to)))| Move { tensor, from, to, bytes })
                .collect();
            let mut arena = vec![u32::MAX; 100];
            for one in &moves {
                let start = usize::try_from(one.from).expect("small");
                let end = start + usize::try_from(one.bytes).expect("small");
                arena[start..end].fill(one.tensor);
            }
            let (ordered, dropped) = in_order(moves.clone());
            run(&mut arena, &ordered);
            for one in moves.iter().filter(|one| !dropped.contains(one)) {
                let start = usize::try_from(one.to).expect("small");
                let end = start + usize::try_from(one.bytes).expect("small");
                assert!(arena[start..end].iter().all(|&byte| byte == one.tensor), "{one:?}");
            }
            all_moved += ordered.len();
            all_dropped += dropped.len();
        }
        assert!(all_dropped < all_moved, "{all_dropped} dropped, {all_moved} moved");
    }

    #[test]
    fn a_small_shift_of_a_large_tensor_is_too_many_copies() {
        let one = Move { tensor: 0, from: 0, to: 256, bytes: 1 << 20 };
        assert!(copies(one).is_none());
        assert_eq!(copies(Move { to: 1 << 15, ..one }).expect("few").count(), 32);
        assert_eq!(copies(Move { to: 1 << 20, ..one }).expect("one").count(), 1);
    }
}
