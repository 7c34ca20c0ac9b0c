//! The change from one plan to another: what stays on the device goes to its new place.

use std::sync::Arc;
use std::time::Instant;

use super::review::transition;
use crate::driver::ComputeStream;
use crate::engine::Spec;
use crate::engine::copying::Host;
use crate::engine::core::{Before, Core};
use crate::error::{Error, Result};
use crate::plan::{InForce, plan_after};
use crate::pool::{Arena, Move, copies};
use crate::units::index;

impl Core {
    fn check_idle(&self) -> Result<()> {
        if let Some(block) = self.schedule.active_block() {
            return Err(Error::Misuse(format!("the plan cannot change while block {block} runs")));
        }
        Ok(())
    }

    /// Gives the arena up: nothing reads or writes it any more.
    pub(in crate::engine) fn vacate(&mut self) -> Result<()> {
        self.check_idle()?;
        self.stop().inspect_err(|error| self.poison(error.to_string()))?;
        self.schedule.forget();
        self.vacant = true;
        Ok(())
    }

    /// Plans anew for a budget and the order learned so far. What stays goes to its new place on
    /// the device, in the same arena or in another one, whose earlier users ran on `compute`.
    pub(in crate::engine) fn rebuild(
        &mut self,
        budget_bytes: u64,
        (address, bytes): (u64, u64),
        compute: ComputeStream,
    ) -> Result<()> {
        self.check_idle()?;
        let spec = Spec { budget_bytes, profile: self.best_profile(), ..self.spec.clone() };
        let same_arena = self.arena.at(0, 0) == address;
        let unchanged = budget_bytes == self.spec.budget_bytes && !self.order.has_learned();
        let proposal = self.proposal.take().filter(|_| unchanged && same_arena);
        let adopted = proposal.is_some();
        let (plan, pins) = if let Some(found) = proposal {
            (found.plan, Some(found.pins))
        } else {
            let passes = self.tuner.horizon();
            let before = same_arena.then_some(InForce { plan: &self.plan, passes });
            (plan_after(&spec.profile, budget_bytes, before)?, None)
        };
        let arena = Arena::new(address, bytes, plan.arena_bytes)?;
        // Residents that are not enqueued yet will be dropped.
        let arrived = !self.vacant && self.executor.is_idle();
        self.stop().inspect_err(|error| self.poison(error.to_string()))?;
        let idle_since = adopted.then(Instant::now);

        let device = Arc::clone(&self.device);
        let staging = self.executor.take_staging();
        let mut host = std::mem::replace(&mut self.host, Host::new(Arc::clone(&device)));
        if let Some(pins) = pins {
            host.absorb(pins);
        }
        let loaded = |block: u32| arrived && self.schedule.loaded()[index(block)];
        let transition = transition(&spec.profile, &self.plan, &plan, same_arena, &loaded);
        let moved = self.move_residents(&transition.moves, &arena, compute);
        let before = Before { host: Some(host), staging, kept: transition.kept };
        match moved.and_then(|()| Self::new(Arc::clone(&device), spec, plan, arena, before)) {
            Ok(next) => {
                self.order.take();
                self.counters.rebuilds += 1;
                self.counters.adopted += u64::from(adopted);
                self.replace_by(next);
                (self.idle_since, self.is_fresh) = (idle_since, adopted);
                Ok(())
            }
            Err(error) => {
                self.counters.errors += 1;
                self.errors.note(&error);
                let (spec, plan) = (self.spec.clone(), self.plan.clone());
                match Self::new(device, spec, plan, self.arena, Before::default()) {
                    Ok(old) => {
                        let vacant = self.vacant;
                        self.replace_by(old);
                        self.vacant = vacant;
                    }
                    Err(second) => self.poison(second.to_string()),
                }
                Err(error)
            }
        }
    }

    /// Residents go to their new places in `arena`. Nothing else runs; blocks until they are there,
    /// since a block that streams nothing waits for no copy.
    fn move_residents(&self, moves: &[Move], arena: &Arena, compute: ComputeStream) -> Result<()> {
        if moves.is_empty() {
            return Ok(());
        }
        let move_part = |part: Move| {
            let (from, to) = (self.arena.at(part.from, part.bytes), arena.at(part.to, part.bytes));
            self.device.copy_within(from, to, part.bytes)
        };
        if self.arena.at(0, 0) == arena.at(0, 0) {
            moves.iter().filter_map(|&one| copies(one)).flatten().try_for_each(move_part)?;
        } else {
            // Kernels may still use what has become the arena.
            let origin = self.schedule.origin();
            self.device.mark_done(origin, compute)?;
            self.device.quiesce(Some(origin))?;
            moves.iter().copied().try_for_each(move_part)?;
        }
        self.device.flush();
        self.device.quiesce(None)
    }

    /// Goes on as `next`, which has just been made; what was counted and learned stays.
    fn replace_by(&mut self, mut next: Self) {
        next.moved_before = self.moved();
        next.counters = self.counters;
        std::mem::swap(&mut next.order, &mut self.order);
        std::mem::swap(&mut next.errors, &mut self.errors);
        std::mem::swap(&mut next.tuner, &mut self.tuner);
        std::mem::swap(&mut next.slow, &mut self.slow);
        std::mem::swap(&mut next.balance, &mut self.balance);
        std::mem::swap(&mut next.seen, &mut self.seen);
        std::mem::swap(&mut next.life, &mut self.life);
        *self = next;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::driver::Source;
    use crate::driver::sim::{SimDevice, SimOptions};
    use crate::engine::adapt::Proposal;
    use crate::plan::{Profile, Tensor, plan};
    use crate::pool::Pins;

    const ARENA: u64 = 1 << 50;
    const BUDGET: u64 = 3 << 20;

    pub(in crate::engine::adapt) fn core() -> Core {
        let tensors = (0..8).map(|block| Tensor { block, bytes: 1 << 20 }).collect();
        let spec = Spec {
            profile: Profile { tensors, order: (0..8).collect(), ..Profile::default() },
            sources: (1..9).map(|at| Source::Memory { address: at << 30 }).collect(),
            budget_bytes: BUDGET,
            ..Spec::default()
        };
        let sim = SimDevice::new(SimOptions { arena: (ARENA, BUDGET), ..SimOptions::default() });
        let plan = plan(&spec.profile, BUDGET).expect("feasible");
        let arena = Arena::new(ARENA, BUDGET, plan.arena_bytes).expect("large enough");
        Core::new(Arc::new(sim), spec, plan, arena, Before::default()).expect("no faults")
    }

    #[test]
    fn the_pause_of_a_plan_that_is_taken_up_ends_with_the_first_block() {
        let (mut core, compute) = (core(), ComputeStream(7));
        core.enter(0, compute).expect("no faults");
        core.exit(compute).expect("no faults");
        assert_eq!(core.tuner.pause_s(), None);
        core.rebuild(BUDGET, (ARENA, BUDGET), compute).expect("feasible");
        core.enter(0, compute).expect("no faults");
        core.exit(compute).expect("no faults");
        assert_eq!(core.tuner.pause_s(), None, "that was someone's order");

        let pins = Pins::none(Arc::clone(&core.device));
        core.proposal = Some(Proposal { plan: core.plan.clone(), pins });
        core.rebuild(BUDGET, (ARENA, BUDGET), compute).expect("feasible");
        assert_eq!(core.counters.adopted, 1);
        let since = core.idle_since.expect("the device waits");
        core.enter(0, compute).expect("no faults");
        let pause_s = core.tuner.pause_s().expect("measured");
        assert!(0.0 < pause_s && pause_s <= since.elapsed().as_secs_f64());
        core.exit(compute).expect("no faults");
        core.enter(1, compute).expect("no faults");
        assert_eq!(core.tuner.pause_s(), Some(pause_s), "once");
    }
}
