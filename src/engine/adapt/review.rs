//! Looks for a better plan beside the model, and judges whether to change to it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use crate::plan::{Plan, Profile, period_s, plan_after};
use crate::pool::{Move, copies, in_order};
use crate::units::{align_up, index, narrow, real};

/// Passes over which a change has to pay. How many are left is not known: of a picture of 20 to 30
/// steps so many are, when a plan is found.
const PASSES: f64 = 16.0;
/// Share of a pass that a change has to save: less is noise.
const LEAST_SAVED: f64 = 0.01;

/// How plans are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Adapt {
    /// Never.
    #[default]
    Off,
    /// In a thread of their own; adopted between passes.
    Beside,
    /// At the end of a pass, in the calling thread: for tests, where time is not to matter.
    AtOnce,
}

/// How a search ended.
#[derive(Debug)]
enum Outcome {
    Better(Box<Plan>),
    Nothing,
}

/// One search under way, or its outcome.
#[derive(Debug, Default)]
pub(in crate::engine) struct Review {
    outcome: Arc<Mutex<Option<Outcome>>>,
    thread: Option<JoinHandle<()>>,
}

impl Review {
    /// Whether a search is under way, or its outcome was not taken yet.
    pub(in crate::engine) fn is_open(&self) -> bool {
        self.thread.is_some() || self.outcome.lock().is_some()
    }

    /// Starts a search. `profile` has times; `plan` is in force.
    pub(in crate::engine) fn start(
        &mut self,
        adapt: Adapt,
        profile: Profile,
        budget_bytes: u64,
        plan: Plan,
    ) {
        let outcome = Arc::clone(&self.outcome);
        let work = move || {
            // Pure: a panic leaves nothing behind, and the plan in force stays.
            let found = catch_unwind(AssertUnwindSafe(|| better(&profile, budget_bytes, &plan)));
            let found = found.ok().flatten().map(Box::new);
            *outcome.lock() = Some(found.map_or(Outcome::Nothing, Outcome::Better));
        };
        match adapt {
            Adapt::Off => {}
            Adapt::AtOnce => work(),
            // Where the system refuses a thread, the plan in force stays.
            Adapt::Beside => {
                let thread = std::thread::Builder::new().name("dgls-plan".into());
                self.thread = thread.spawn(work).ok();
            }
        }
    }

    /// The plan to change to, if a search has ended with one. Does not block.
    pub(in crate::engine) fn take(&mut self) -> Option<Plan> {
        let outcome = self.outcome.lock().take()?;
        self.join();
        match outcome {
            Outcome::Better(plan) => Some(*plan),
            Outcome::Nothing => None,
        }
    }

    /// Blocks until no search is under way, and forgets its outcome.
    pub(in crate::engine) fn stop(&mut self) {
        self.join();
        self.outcome.lock().take();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked outside of its fence.
            let _ = thread.join();
        }
    }
}

impl Drop for Review {
    fn drop(&mut self) {
        self.join();
    }
}

/// A plan that is worth the change: what it saves in some passes is more than it costs to bring
/// what newly stays and to fill the ring again.
fn better(profile: &Profile, budget_bytes: u64, before: &Plan) -> Option<Plan> {
    let link = profile.times.as_ref()?.link;
    let now_s = period_s(profile, before).ok()?;
    let after = plan_after(profile, budget_bytes, Some(before)).ok()?;
    let kept = transition(profile, before, &after, &|_| true).kept;
    let new = (0..profile.tensors.len()).filter(|&number| after.resident[number] && !kept[number]);
    let brought: u64 = new.map(|number| align_up(profile.tensors[number].bytes)).sum();
    let most = after
        .program
        .uses
        .iter()
        .map(|used| after.program.copies_of(used).iter().map(|copy| copy.bytes).sum::<u64>());
    let fill = most.max().unwrap_or(0);
    let cost_s = real(brought + fill) / link.bytes_per_s;
    let saved_s = now_s - after.period_s?;
    (saved_s > LEAST_SAVED * now_s && saved_s * PASSES > cost_s).then_some(after)
}

/// How residents get from one plan's places to another's, within one arena.
#[derive(Debug, Default)]
pub(in crate::engine) struct Transition {
    /// For each tensor, whether it is at its new place already or will be after `moves`.
    pub(in crate::engine) kept: Vec<bool>,
    /// In an order in which none overwrites what has yet to be moved.
    pub(in crate::engine) moves: Vec<Move>,
}

/// The residents of `before` that `after` keeps; `loaded` says of which blocks they have arrived.
pub(in crate::engine) fn transition(
    profile: &Profile,
    before: &Plan,
    after: &Plan,
    loaded: &dyn Fn(u32) -> bool,
) -> Transition {
    let tensors = profile.tensors.len();
    let (old, new) = (before.program.homes(tensors), after.program.homes(tensors));
    let mut kept = vec![false; tensors];
    let mut wanted = Vec::new();
    for (number, tensor) in profile.tensors.iter().enumerate() {
        if let (Some(from), Some(to), true) = (old[number], new[number], loaded(tensor.block)) {
            kept[number] = true;
            wanted.push(Move { tensor: narrow(number), from, to, bytes: tensor.bytes });
        }
    }
    let (mut moves, dropped) = in_order(wanted);
    let far = |one: &Move| copies(*one).is_some();
    for one in dropped.iter().chain(moves.iter().filter(|one| !far(one))) {
        kept[index(one.tensor)] = false;
    }
    moves.retain(far);
    Transition { kept, moves }
}
