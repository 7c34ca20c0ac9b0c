//! The certificate: the exact optimum over all policies, as a linear program.
//!
//! Take any policy, rotating residency included, and average over passes. For the use `i` let
//! `s` be the bytes of it that are copied between two uses, `h` the streamed bytes that are on the
//! device when it starts, `a` those copied while it computes, `g` those copied in the stall after
//! it. Then, in bytes,
//!
//! ```text
//! h[i+1] = h[i] + a[i] - s[i] + g[i]      (around the pass)
//! h[i] >= s[i],   0 <= a[i] <= rate * compute[i],   0 <= s[i] <= bytes[i]
//! total - sum(s) + h[i] + a[i] <= budget
//! period = compute + sum(g) / rate
//! ```
//!
//! All of it is linear, so the averages satisfy it; and a static plan that cuts tensors anywhere
//! and copies without latency reaches it. So no policy is faster than the solution.

use microlp::{ComparisonOp, OptimizationDirection, Problem as Lp, SolveOutcome, Variable};

use super::problem::{Problem, Slot};
use super::{Profile, Result};
use crate::error::Error;
use crate::units::real;

/// Seconds of a pass that no policy can beat within `budget_bytes`; see the head of this file.
///
/// Exact where every block runs once in a pass. Takes about 5 ms for 60 blocks.
///
/// # Errors
///
/// [`Error::Invalid`] without times or where a block runs twice, [`Error::BudgetTooSmall`].
pub fn optimum_s(profile: &Profile, budget_bytes: u64) -> Result<f64> {
    profile.check()?;
    let mut seen = vec![false; profile.blocks()];
    let twice = profile
        .order
        .iter()
        .any(|&block| std::mem::replace(&mut seen[crate::units::index(block)], true));
    if profile.times.is_none() || twice {
        return Err(Error::Invalid(
            "the optimum needs times, and every block at most once in a pass".into(),
        ));
    }
    optimum_of(&Problem::new(profile, budget_bytes, 0))
}

/// As [`optimum_s`].
pub(super) fn optimum_of(problem: &Problem) -> Result<f64> {
    Ok(solution_of(problem)?.0)
}

/// Neighbouring uses that the linear program takes for one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    /// Bytes that may be streamed of it.
    pub(super) bytes: f64,
    /// In so many equal parts, which come and go one after the other; 1 for a single use.
    pub(super) parts: f64,
    pub(super) compute_s: f64,
}

/// The optimum, and the streamed bytes of each use with which it is reached.
pub(super) fn solution_of(problem: &Problem) -> Result<(f64, Vec<f64>)> {
    let group = |slot: &Slot| Group {
        bytes: real(problem.bytes[slot.block]),
        parts: 1.0,
        compute_s: slot.compute_s,
    };
    solution_of_groups(problem, &problem.uses.iter().map(group).collect::<Vec<_>>())
}

/// As [`solution_of`], of all uses in groups: about the optimum, and the streamed bytes of each.
pub(super) fn solution_of_groups(problem: &Problem, groups: &[Group]) -> Result<(f64, Vec<f64>)> {
    let compute_s = problem.compute_s();
    let total: u64 = problem.uses.iter().map(|slot| problem.bytes[slot.block]).sum();
    if total <= problem.budget_bytes || groups.is_empty() {
        return Ok((compute_s, vec![0.0; groups.len()]));
    }
    // In units of the largest block, so that the solver sees numbers near 1.
    let unit = real(problem.largest().1);
    let rate = problem.link.bytes_per_s / unit;
    let of_group = |group: &Group| Room {
        bytes: group.bytes / unit,
        parts: group.parts,
        beside: group.compute_s * rate,
    };
    let mut rooms: Vec<Room> = groups.iter().map(of_group).collect();
    if problem.outside_s > 0.0 {
        rooms.push(Room { bytes: 0.0, parts: 1.0, beside: problem.outside_s * rate });
    }
    let missing = (real(problem.budget_bytes) - real(total)) / unit;
    let (stall, copied) = solve(&rooms, missing)?;
    let copied = copied.into_iter().take(groups.len()).map(|share| share * unit).collect();
    Ok((compute_s + stall / rate, copied))
}

/// A group in units: what may be streamed of it, and what can be copied beside it.
struct Room {
    bytes: f64,
    parts: f64,
    beside: f64,
}

/// The least sum of stalls, and what is copied for each group; in units.
fn solve(rooms: &[Room], missing: f64) -> Result<(f64, Vec<f64>)> {
    let uses = rooms.len();
    let mut lp = Lp::new(OptimizationDirection::Minimize);
    let mut add = |cost: f64, most: f64| -> Variable { lp.add_var(cost, (0.0, most)) };
    let copied: Vec<Variable> = rooms.iter().map(|room| add(0.0, room.bytes)).collect();
    let beside: Vec<Variable> = rooms.iter().map(|room| add(0.0, room.beside)).collect();
    let stalled: Vec<Variable> = rooms.iter().map(|_| add(1.0, f64::INFINITY)).collect();
    let held: Vec<Variable> = rooms.iter().map(|_| add(0.0, f64::INFINITY)).collect();
    // One more variable for the sum keeps the rows short.
    let sum = add(0.0, f64::INFINITY);
    let mut row: Vec<(Variable, f64)> = copied.iter().map(|&one| (one, 1.0)).collect();
    row.push((sum, -1.0));
    lp.add_constraint(&row, ComparisonOp::Eq, 0.0);
    for i in 0..uses {
        let next = held[(i + 1) % uses];
        let mut flow = vec![(held[i], -1.0), (beside[i], -1.0), (copied[i], 1.0)];
        flow.push((stalled[i], -1.0));
        if uses > 1 {
            flow.push((next, 1.0));
        } else {
            flow.remove(0);
        }
        lp.add_constraint(&flow, ComparisonOp::Eq, 0.0);
        // The first part is there when it starts, and the ring has room for what comes beside the
        // first, and beside the last when all before it have gone.
        let part = 1.0 / rooms[i].parts;
        lp.add_constraint([(copied[i], part), (held[i], -1.0)], ComparisonOp::Le, 0.0);
        let fits = [(held[i], 1.0), (beside[i], part), (sum, -1.0)];
        lp.add_constraint(fits, ComparisonOp::Le, missing);
        if part < 1.0 {
            let gone = part - 1.0;
            let fits = [(held[i], 1.0), (beside[i], 1.0), (copied[i], gone), (sum, -1.0)];
            lp.add_constraint(fits, ComparisonOp::Le, missing);
        }
    }
    match lp.solve() {
        Ok(SolveOutcome::Solution(solution)) => {
            let copied = copied.iter().map(|&one| solution[one]).collect();
            Ok((solution.objective(), copied))
        }
        Ok(SolveOutcome::Interrupted(_)) => Err(Error::Internal("the solver was stopped".into())),
        Err(error) => Err(Error::Internal(format!("the linear program has no solution: {error}"))),
    }
}
