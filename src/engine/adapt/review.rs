//! Looks for a better plan beside the model, and judges whether to change to it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::Mutex;

use crate::engine::copying::{Locker, rest};
use crate::plan::{InForce, Plan, Profile, period_s, plan_after};
use crate::pool::{Move, Pins, copies, in_order};
use crate::units::{align_up, index, narrow, real, whole};

/// Share of a pass that a change has to save: less is noise.
const LEAST_SAVED: f64 = 0.0075;

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

/// What a better plan is looked for to.
#[derive(Debug)]
pub(in crate::engine) struct Question {
    /// With times.
    pub(in crate::engine) profile: Profile,
    pub(in crate::engine) budget_bytes: u64,
    /// The plan in force.
    pub(in crate::engine) plan: Plan,
    /// Passes that it ran so far.
    pub(in crate::engine) passes: u64,
    /// Passes that are expected of the next one, whatever this one lasted.
    pub(in crate::engine) horizon: f64,
    /// Seconds for which the device has nothing to do while a plan is taken up.
    pub(in crate::engine) pause_s: f64,
    /// For each tensor what its first copy takes longer, seconds; empty: nothing.
    pub(in crate::engine) reading_s: Vec<f64>,
    /// Page-locks what the plan streams and the one in force does not, beside the model that runs.
    pub(in crate::engine) locker: Locker,
}

/// A better plan, and the page-locks that it needs besides those that there are.
#[derive(Debug)]
pub(in crate::engine) struct Proposal {
    pub(in crate::engine) plan: Plan,
    pub(in crate::engine) pins: Pins,
}

impl Proposal {
    /// Bytes that it has page-locked.
    pub(in crate::engine) fn pinned(&self) -> u64 {
        self.pins.bytes()
    }
}

/// How a search ended.
#[derive(Debug)]
enum Outcome {
    Better(Box<Proposal>),
    /// None pays in the passes that are expected; to be asked again after so many of the plan in
    /// force.
    Later(u64),
    Nothing,
}

/// One search under way, or its outcome.
#[derive(Debug, Default)]
pub(in crate::engine) struct Review {
    outcome: Arc<Mutex<Option<Outcome>>>,
    thread: Option<JoinHandle<()>>,
    /// Whether what comes of the search is wanted still.
    is_wanted: Arc<AtomicBool>,
    /// Passes of the plan in force after which the next search is due.
    due: Option<u64>,
}

impl Review {
    /// Whether a search is under way, or its outcome was not taken yet.
    pub(in crate::engine) fn is_open(&self) -> bool {
        self.thread.is_some() || self.outcome.lock().is_some()
    }

    /// Whether the last search found that another is due once the plan in force has run so many
    /// passes.
    pub(in crate::engine) fn is_due(&self, passes: u64) -> bool {
        self.due.is_some_and(|due| passes >= due) && !self.is_open()
    }

    /// Starts a search.
    pub(in crate::engine) fn start(&mut self, adapt: Adapt, question: Question) {
        self.start_as(adapt, question, Arc::new(AtomicBool::new(true)));
    }

    fn start_as(&mut self, adapt: Adapt, question: Question, is_wanted: Arc<AtomicBool>) {
        let outcome = Arc::clone(&self.outcome);
        self.is_wanted = Arc::clone(&is_wanted);
        self.due = None;
        let work = move || {
            // A panic leaves nothing behind, page-locks neither, and the plan in force stays.
            let found = catch_unwind(AssertUnwindSafe(move || {
                let plan = match better(&question) {
                    Ok(plan) => plan,
                    Err(passes) => return Outcome::Later(passes),
                };
                let pins = question.locker.lock(&plan, &mut |took| {
                    if adapt == Adapt::Beside {
                        rest((Instant::now(), took), &is_wanted);
                    }
                    is_wanted.load(Ordering::Relaxed)
                });
                Outcome::Better(Box::new(Proposal { plan, pins }))
            }));
            *outcome.lock() = Some(found.unwrap_or(Outcome::Nothing));
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
    pub(in crate::engine) fn take(&mut self) -> Option<Proposal> {
        let outcome = self.outcome.lock().take()?;
        self.join();
        match outcome {
            _ if !self.is_wanted.load(Ordering::Relaxed) => None,
            Outcome::Better(found) => Some(*found),
            Outcome::Later(passes) => {
                self.due = Some(passes);
                None
            }
            Outcome::Nothing => None,
        }
    }

    /// What comes of a search that is under way is dropped, with its page-locks; it locks no more.
    /// Does not block.
    pub(in crate::engine) fn discard(&mut self) {
        self.call_off();
        self.outcome.lock().take_if(|outcome| matches!(outcome, Outcome::Better(_)));
    }

    /// Blocks until no search is under way, and forgets its outcome.
    pub(in crate::engine) fn stop(&mut self) {
        self.call_off();
        self.join();
        self.outcome.lock().take();
    }

    fn call_off(&self) {
        self.is_wanted.store(false, Ordering::Relaxed);
        self.thread.iter().for_each(|thread| thread.thread().unpark());
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
        self.stop();
    }
}

/// A plan that is worth the change: what it saves in some passes is more than what it costs.
///
/// How long the run goes on nobody knows, so what does not pay in the passes that are expected is
/// judged again when the plan in force has run as many as it takes: then no more was lost by having
/// waited than the change costs, however long the run is. Where no plan is known to pay in twice
/// the passes either, after those.
///
/// # Errors
///
/// None is; the passes of the plan in force after which to ask again.
fn better(question: &Question) -> Result<Plan, u64> {
    let passes = real(question.passes).max(question.horizon);
    let search = |passes: f64| -> Option<(Plan, f64)> {
        let in_force = InForce { plan: &question.plan, passes };
        let found = plan_after(&question.profile, question.budget_bytes, Some(in_force)).ok()?;
        let needed = passes_to_pay(question, &found)?;
        Some((found, needed))
    };
    let pays = |(_, needed): &(Plan, f64)| *needed < passes;
    let (found, needed) = search(passes)
        .filter(pays)
        .or_else(|| search(2.0 * passes))
        .ok_or_else(|| whole(2.0 * passes))?;
    if needed < passes { Ok(found) } else { Err(whole(needed) + 1) }
}

/// Passes in which a plan saves what the change to it takes once: to bring what newly stays, to
/// read what is newly streamed from a file, to fill the ring again, and to leave the device idle
/// meanwhile. `None` if what it saves is noise.
fn passes_to_pay(question: &Question, after: &Plan) -> Option<f64> {
    let Question { profile, plan: before, .. } = question;
    let link = profile.times.as_ref()?.link;
    let now_s = period_s(profile, before).ok()?;
    let saved_s = now_s - after.period_s?;
    if saved_s <= LEAST_SAVED * now_s {
        return None;
    }
    let kept = transition(profile, before, after, true, &|_| true).kept;
    let new = (0..profile.tensors.len()).filter(|&number| after.resident[number] && !kept[number]);
    let brought: u64 = new.map(|number| align_up(profile.tensors[number].bytes)).sum();
    let most = after
        .program
        .uses
        .iter()
        .map(|used| after.program.copies_of(used).iter().map(|copy| copy.bytes).sum::<u64>());
    let fill = most.max().unwrap_or(0);
    let read = |&(number, _): &(usize, &f64)| before.resident[number] && !after.resident[number];
    let reading_s = question.reading_s.iter().enumerate().filter(read);
    let reading_s: f64 = reading_s.map(|(_, &seconds)| seconds).sum();
    let cost_s = real(brought + fill) / link.bytes_per_s + reading_s + question.pause_s;
    Some(cost_s / saved_s)
}

/// How residents get from one plan's places to another's.
#[derive(Debug, Default)]
pub(in crate::engine) struct Transition {
    /// For each tensor, whether it is at its new place already or will be after `moves`.
    pub(in crate::engine) kept: Vec<bool>,
    /// In an order in which none overwrites what has yet to be moved.
    pub(in crate::engine) moves: Vec<Move>,
}

/// The residents of `before` that `after` keeps, in the same arena or in another one; `loaded` says
/// of which blocks they have arrived.
pub(in crate::engine) fn transition(
    profile: &Profile,
    before: &Plan,
    after: &Plan,
    same_arena: bool,
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
    if !same_arena {
        return Transition { kept, moves: wanted };
    }
    let (mut moves, dropped) = in_order(wanted);
    let far = |one: &Move| copies(*one).is_some();
    for one in dropped.iter().chain(moves.iter().filter(|one| !far(one))) {
        kept[index(one.tensor)] = false;
    }
    moves.retain(far);
    Transition { kept, moves }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Source;
    use crate::driver::host::{HostDevice, HostOptions};
    use crate::driver::sim::{SimDevice, SimOptions};
    use crate::engine::Spec;
    use crate::engine::adapt::tuner::PASSES;
    use crate::engine::copying::Host;
    use crate::plan::{Link, Tensor, Times, plan};

    /// Blocks of which a few take much longer than the plan in force was made for.
    fn question(pause_s: f64, passes: u64) -> Question {
        let tensors = (0..96).map(|number| Tensor { block: number / 4, bytes: 1 << 20 }).collect();
        let profile = Profile { tensors, order: (0..24).collect(), ..Profile::default() };
        let before = plan(&profile, 40 << 20).expect("feasible");
        let times = Times {
            compute_s: (0..24).map(|use_| if use_ < 4 { 4e-3 } else { 1e-4 }).collect(),
            outside_s: 0.0,
            link: Link { bytes_per_s: 10e9, latency_s: 0.0 },
        };
        let device = HostDevice::new(HostOptions::default()).expect("a thread");
        let spec = Spec { profile: profile.clone(), ..Spec::default() };
        Question {
            profile: Profile { times: Some(times), ..profile },
            budget_bytes: 40 << 20,
            plan: before,
            passes,
            horizon: PASSES,
            pause_s,
            reading_s: Vec::new(),
            locker: Host::new(Arc::new(device)).locker(&spec),
        }
    }

    /// With page-locks, as a GPU needs them.
    fn question_of_a_gpu() -> (Question, Arc<SimDevice>) {
        let options = SimOptions { staged_from: Some(0), lockable: true, ..SimOptions::default() };
        let device = Arc::new(SimDevice::new(options));
        let free = question(0.0, 0);
        let address = |number: u64| Source::Memory { address: (1 << 40) + (number << 20) };
        let sources = (0..96).map(address).collect();
        let pinned_bytes = u64::MAX;
        let profile = free.profile.clone();
        let spec = Spec { profile, sources, pinned_bytes, ..Spec::default() };
        let locker = Host::new(Arc::clone(&device) as _).locker(&spec);
        (Question { locker, ..free }, device)
    }

    #[test]
    fn a_search_that_nobody_wants_any_more_locks_no_more() {
        let (question, device) = question_of_a_gpu();
        let streamed = {
            let plan = better(&question).expect("a better one");
            plan.resident.iter().filter(|&&stays| !stays).count()
        };
        let mut review = Review::default();
        review.start(Adapt::AtOnce, question);
        assert_eq!(device.page_locks().0, streamed);
        assert!(review.take().is_some());

        let (question, device) = question_of_a_gpu();
        let mut review = Review::default();
        review.start_as(Adapt::AtOnce, question, Arc::new(AtomicBool::new(false)));
        assert_eq!(device.page_locks(), (1, 1), "the first one was under way");
        assert!(review.take().is_none());
        assert_eq!(device.page_locks().0, 0);

        let (question, _) = question_of_a_gpu();
        let mut review = Review::default();
        review.start(Adapt::AtOnce, question);
        let is_wanted = Arc::clone(&review.is_wanted);
        assert!(is_wanted.load(Ordering::Relaxed));
        review.stop();
        assert!(!is_wanted.load(Ordering::Relaxed), "before it waits for the thread");
    }

    #[test]
    fn a_change_has_to_pay_in_as_many_passes_as_the_last_plan_lasted() {
        let free = question(0.0, 0);
        let after = better(&free).expect("a better one");
        let now_s = period_s(&free.profile, &free.plan).expect("timed");
        let saved_s = now_s - after.period_s.expect("timed");
        for (pause_s, passes, pays) in [
            (0.5 * PASSES * saved_s, 0, true),
            (1.1 * PASSES * saved_s, 0, false),
            (1.1 * PASSES * saved_s, 100, true),
            (101.0 * saved_s, 100, false),
        ] {
            let found = better(&question(pause_s, passes));
            assert_eq!(found.is_ok(), pays, "{pause_s} s after {passes} passes");
        }
        let reads =
            |seconds: f64| better(&Question { reading_s: vec![seconds; 96], ..question(0.0, 0) });
        assert!(reads(1e-6).is_ok() && reads(PASSES * saved_s).is_err(), "what is read counts");
        let unsure = Question { horizon: 5.0, ..question(0.5 * PASSES * saved_s, 0) };
        assert!(better(&unsure).is_err(), "the last plans did not last");
    }

    #[test]
    fn what_does_not_pay_yet_is_judged_again_when_it_does() {
        let free = question(0.0, 0);
        let now_s = period_s(&free.profile, &free.plan).expect("timed");
        let saved_s = now_s - better(&free).expect("a better one").period_s.expect("timed");
        for wanted in [1.3, 1.9, 7.0] {
            let pause_s = wanted * PASSES * saved_s;
            let passes = better(&question(pause_s, 0)).expect_err("too early");
            assert!(real(passes) >= wanted * PASSES, "{passes} passes");
            assert!(better(&question(pause_s, passes)).is_ok(), "after {passes} passes");
            assert!(better(&question(pause_s, passes * 9 / 10)).is_err(), "not much sooner");
        }
        let best = Question { plan: better(&free).expect("a better one"), ..question(0.0, 30) };
        assert_eq!(better(&best).expect_err("the best"), 60, "times may change");
    }
}
