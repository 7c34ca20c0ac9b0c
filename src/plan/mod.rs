//! What lives where? Pure: sizes, an order and times in, residency and a static copy list out.
//!
//! Every block keeps some of its tensors on the device and streams the rest through a ring that a
//! pass goes around a whole number of times (*fractional residency*). That family reaches the
//! optimum over all policies, rotating residency included, but for the size of tensors. Members
//! of it are placed, compiled and run in exact time; the best one is the plan.
//!
//! In reading order: `problem` is what a search works on, `splits` how a block can be taken
//! apart, `level` how much each should stream, `place` gives addresses, `steps` waits and times,
//! `trial` picks the best of what `search` proposes (`search/many` where a pass has many uses,
//! `search/near` knows what is on the device already), `program` is the outcome, `check` proves it
//! legal, `bound` says how much better any plan could be, `form` is the JSON of it all.

mod bound;
mod check;
mod form;
mod level;
mod place;
mod problem;
mod program;
mod search;
mod splits;
mod steps;
mod trial;

pub use bound::optimum_s;
pub use check::check;
pub use form::plan_json;
pub use program::{Copy, Program, Use, Wait};

use self::problem::Problem;
use self::search::near::Near;
use self::search::search;
use self::trial::Found;
use crate::error::{Error, Result};
use crate::units::{align_up, index, narrow};

/// One tensor of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// The block that reads it.
    pub block: u32,
    /// Its size; zero is refused.
    pub bytes: u64,
}

/// The link that copies go over.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Bytes per second of a long copy.
    pub bytes_per_s: f64,
    /// Seconds that each copy takes besides.
    pub latency_s: f64,
}

/// What was measured, or is assumed.
#[derive(Debug, Clone, PartialEq)]
pub struct Times {
    /// For each use of the order: seconds from the beginning of its block to where the next one
    /// could begin.
    pub compute_s: Vec<f64>,
    /// Seconds of a pass outside of its blocks.
    pub outside_s: f64,
    /// The link.
    pub link: Link,
}

/// What a plan is made from.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    /// Every tensor that is resident or streamed.
    pub tensors: Vec<Tensor>,
    /// Block indices in order of use in one pass; a block that runs twice stands there twice, and
    /// one that does not stand there is dormant: planned for, never prefetched.
    pub order: Vec<u32>,
    /// Tensors smaller than this stay resident wherever the budget allows: a copy has a latency.
    pub min_stream_bytes: u64,
    /// Times; without them all uses are taken to be alike.
    pub times: Option<Times>,
    /// The caller's choice: these blocks stay whole, all others are streamed whole.
    pub resident_blocks: Option<Vec<u32>>,
    /// At most this many uses are copied ahead of the running one.
    pub window_uses: Option<u32>,
    /// For each tensor how many times as long as over the link its bytes take, 1 or more: they come
    /// from a slower place. Empty: all come at the rate of the link.
    pub slow: Vec<f64>,
    /// Every tensor has the same address in every pass, even where a cycle of several passes would
    /// be faster.
    pub one_pass: bool,
}

impl Profile {
    /// One more than the highest block index.
    pub fn blocks(&self) -> usize {
        let named = self.tensors.iter().map(|t| t.block).chain(self.order.iter().copied());
        named.max().map_or(0, |block| index(block) + 1)
    }

    /// Aligned bytes of each block.
    pub fn block_bytes(&self) -> Vec<u64> {
        let mut bytes = vec![0_u64; self.blocks()];
        for tensor in &self.tensors {
            let sum = &mut bytes[index(tensor.block)];
            *sum = sum.saturating_add(align_up(tensor.bytes));
        }
        bytes
    }

    fn check(&self) -> Result<()> {
        const LIMIT: usize = 1 << 24;
        // A block's number is the caller's: one tensor of block a million means a million blocks,
        // over which planning would take minutes.
        const MOST_BLOCKS: usize = 1 << 16;
        if self.tensors.len() > LIMIT || self.order.len() > LIMIT {
            return Err(Error::Invalid(format!(
                "a plan takes up to {LIMIT} tensors and uses, got {} and {}",
                self.tensors.len(),
                self.order.len()
            )));
        }
        let mut sum = 0_u64;
        for (number, tensor) in self.tensors.iter().enumerate() {
            if tensor.bytes == 0 {
                return Err(Error::Invalid(format!("tensor {number} has 0 bytes")));
            }
            sum = match sum.checked_add(align_up(tensor.bytes)) {
                Some(sum) if sum < 1 << 62 => sum,
                _ => return Err(Error::Invalid("the tensors add up to 2^62 bytes or more".into())),
            };
        }
        let blocks = self.blocks();
        if blocks > MOST_BLOCKS {
            let found = format!("a plan takes up to {MOST_BLOCKS} blocks, got {blocks}");
            return Err(Error::Invalid(found));
        }
        if let Some(resident) = &self.resident_blocks {
            if let Some(block) = resident.iter().find(|&&block| index(block) >= blocks) {
                return Err(Error::Invalid(format!(
                    "resident blocks must be in 0..{blocks}, got {block}"
                )));
            }
        }
        if !self.slow.is_empty() && self.slow.len() != self.tensors.len() {
            let (need, found) = (self.tensors.len(), self.slow.len());
            return Err(Error::Invalid(format!("slow needs {need} factors or none, got {found}")));
        }
        if let Some(slow) = self.slow.iter().find(|slow| !(1.0..1e9).contains(*slow)) {
            return Err(Error::Invalid(format!("slow must be 1 to 1e9, got {slow}")));
        }
        self.times.as_ref().map_or(Ok(()), |times| times.check(self.order.len()))
    }
}

impl Times {
    fn check(&self, uses: usize) -> Result<()> {
        let refuse = |what: String| Err(Error::Invalid(what));
        if self.compute_s.len() != uses {
            let found = self.compute_s.len();
            return refuse(format!("{uses} uses need as many times, got {found}"));
        }
        let fine = |seconds: f64| seconds.is_finite() && (0.0..1e9).contains(&seconds);
        if let Some(seconds) = self.compute_s.iter().find(|&&seconds| !fine(seconds)) {
            return refuse(format!("compute must be 0 to 1e9 seconds, got {seconds}"));
        }
        if !fine(self.outside_s) || !fine(self.link.latency_s) {
            let (outside, latency) = (self.outside_s, self.link.latency_s);
            return refuse(format!(
                "time outside and latency must be 0 to 1e9 seconds, got {outside} and {latency}"
            ));
        }
        let rate = self.link.bytes_per_s;
        if !(rate.is_finite() && (1.0..1e18).contains(&rate)) {
            return refuse(format!("the link must carry 1 to 1e18 bytes/s, got {rate}"));
        }
        Ok(())
    }
}

/// The fixed answer: residency, ring, addresses.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// For each tensor: whether it stays on the device.
    pub resident: Vec<bool>,
    /// Aligned bytes that stay on the device.
    pub resident_bytes: u64,
    /// Aligned bytes copied in each pass.
    pub streamed_bytes: u64,
    /// Size of the ring that they go through.
    pub ring_bytes: u64,
    /// End of what is used of the arena: residents may leave gaps when a plan follows another one.
    pub arena_bytes: u64,
    /// The smallest budget with which a plan exists.
    pub least_bytes: u64,
    /// Seconds of a pass by exact simulation; `None` without times.
    pub period_s: Option<f64>,
    /// No policy is faster; `None` without times.
    pub bound_s: Option<f64>,
    /// The static copy list.
    pub program: Program,
}

impl Plan {
    /// Uses of the largest size that the ring holds at a time; 0 when nothing is streamed.
    pub fn slots(&self) -> u32 {
        let of_use = |used: &Use| {
            self.program.copies_of(used).iter().map(|copy| align_up(copy.bytes)).sum::<u64>()
        };
        let most = self.program.uses.iter().map(of_use).max().unwrap_or(0);
        u32::try_from(self.ring_bytes.checked_div(most).unwrap_or(0)).unwrap_or(u32::MAX)
    }
}

/// A plan in force that another one is to follow.
#[derive(Debug, Clone, Copy)]
pub struct InForce<'a> {
    /// What it has on the device need not be brought.
    pub plan: &'a Plan,
    /// Passes in which what the change brings has to pay.
    pub passes: f64,
}

/// Makes a plan for `budget_bytes` of device memory for block weights.
///
/// # Errors
///
/// [`Error::BudgetTooSmall`] exactly when the largest block does not fit, or when the caller's
/// choice of residents and window does not; [`Error::Invalid`] on a profile that makes no sense.
pub fn plan(profile: &Profile, budget_bytes: u64) -> Result<Plan> {
    plan_after(profile, budget_bytes, None)
}

/// As [`plan`], but residents that the plan in force has on the device stay at their place as far
/// as they can, so that only the difference has to move; and of plans of which one is faster than
/// the other by less than its change takes longer, spread over `before.passes`, the other.
///
/// # Errors
///
/// As [`plan`].
///
/// # Panics
///
/// If the plan is not legal, which no input can bring about.
pub fn plan_after(
    profile: &Profile,
    budget_bytes: u64,
    before: Option<InForce<'_>>,
) -> Result<Plan> {
    profile.check()?;
    let (problem, found) = find(profile, budget_bytes, before.as_ref())?;
    let program = Program::compile(profile, &problem, &found, before.map(|before| before.plan));
    let loads = || program.loads.iter().flatten();
    let mut resident = vec![false; profile.tensors.len()];
    loads().for_each(|load| resident[index(load.tensor)] = true);
    let ends = loads().map(|load| load.target_offset + align_up(load.bytes));
    let timed = profile.times.is_some();
    let plan = Plan {
        resident_bytes: loads().map(|load| align_up(load.bytes)).sum(),
        streamed_bytes: program.streamed_bytes(),
        ring_bytes: found.ring_bytes,
        arena_bytes: ends.max().unwrap_or(0).max(found.ring_bytes),
        least_bytes: problem.largest().1,
        period_s: timed.then_some(found.period_s),
        bound_s: timed.then(|| problem.lower_bound_s()),
        resident,
        program,
    };
    assert!(plan.arena_bytes <= budget_bytes, "{} of {budget_bytes} bytes", plan.arena_bytes);
    if cfg!(debug_assertions) {
        check(profile, &plan).unwrap_or_else(|illegal| panic!("{illegal}"));
    }
    Ok(plan)
}

fn find(
    profile: &Profile,
    budget_bytes: u64,
    before: Option<&InForce<'_>>,
) -> Result<(Problem, Found)> {
    let mut problem = Problem::new(profile, budget_bytes, profile.min_stream_bytes);
    let all = || Problem::new(profile, budget_bytes, 0);
    let near = before.and_then(|before| Near::new(profile, before));
    let found = find_in(&mut problem, all, near.as_ref())?;
    Ok((problem, found))
}

/// Small tensors stay where the budget allows that; otherwise all of them may be streamed:
/// `problem` becomes the one that `all` makes then.
fn find_in(
    problem: &mut Problem,
    all: impl FnOnce() -> Problem,
    near: Option<&Near>,
) -> Result<Found> {
    if problem.total_bytes() <= problem.budget_bytes && problem.manual.is_none() {
        return Ok(Found::resident(problem));
    }
    let (block, largest_bytes) = problem.largest();
    let budget_bytes = problem.budget_bytes;
    let refused =
        |need_bytes| Error::BudgetTooSmall { block: narrow(block), need_bytes, budget_bytes };
    if largest_bytes > budget_bytes {
        return Err(refused(largest_bytes));
    }
    if let Some(found) = search(problem, near) {
        return Ok(found);
    }
    *problem = all();
    match search(problem, near) {
        Some(found) => Ok(found),
        None if problem.manual.is_some() => Err(refused(search::manual_bytes(problem))),
        None => Err(Error::Internal(format!("no plan for {budget_bytes} bytes"))),
    }
}

/// Seconds of a pass that no policy beats within `budget_bytes`: compute, and the bytes that do not
/// fit over the rate of the link.
///
/// # Errors
///
/// [`Error::Invalid`] when the profile has no times or makes no sense.
pub fn bound_s(profile: &Profile, budget_bytes: u64) -> Result<f64> {
    profile.check()?;
    if profile.times.is_none() {
        return Err(Error::Invalid("a bound needs times".into()));
    }
    Ok(Problem::new(profile, budget_bytes, u64::MAX).lower_bound_s())
}

/// The seconds of a pass that `plan` would take with the times of `profile`, by exact simulation.
///
/// # Errors
///
/// [`Error::Invalid`] when the profile has no times or is not the plan's.
pub fn period_s(profile: &Profile, plan: &Plan) -> Result<f64> {
    profile.check()?;
    if profile.times.is_none()
        || narrow(profile.order.len()) * plan.program.passes != plan.program.cycle
    {
        return Err(Error::Invalid("the plan was made for another order, or without times".into()));
    }
    let problem = Problem::new(profile, u64::MAX, u64::MAX); // no way to split is needed
    let mut counts = vec![0; problem.bytes.len()];
    let place = |tensor: &Tensor| {
        counts[index(tensor.block)] += 1;
        counts[index(tensor.block)] - 1
    };
    let places: Vec<u32> = profile.tensors.iter().map(place).collect();
    Ok(steps::period_of(&problem, &plan.program, &places))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(blocks: &[&[u64]]) -> Profile {
        let mut profile = Profile::default();
        for (block, tensors) in (0_u32..).zip(blocks) {
            profile.tensors.extend(tensors.iter().map(|&bytes| Tensor { block, bytes }));
            profile.order.push(block);
        }
        profile
    }

    #[test]
    fn a_model_that_fits_streams_nothing() {
        let plan = plan(&profile(&[&[256, 512], &[1024]]), 1792).expect("1792 bytes fit");
        assert!(plan.resident.iter().all(|&r| r));
        assert_eq!((plan.streamed_bytes, plan.ring_bytes), (0, 0));
    }

    #[test]
    fn too_small_a_budget_names_the_largest_block() {
        let error = plan(&profile(&[&[256], &[1024, 256]]), 1279).expect_err("1280 are needed");
        let expected = Error::BudgetTooSmall { block: 1, need_bytes: 1280, budget_bytes: 1279 };
        assert_eq!(error, expected);
        plan(&profile(&[&[256], &[1024, 256]]), 1280).expect("the smallest budget works");
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let error = plan(&profile(&[&[1 << 61], &[1 << 61]]), 1 << 20).expect_err("2^62 bytes");
        assert!(error.to_string().contains("2^62"), "{error}");
    }
}
