//! Which of the weights that are streamed go encoded, where not all of them have to.

use std::collections::BTreeSet;

use super::feed::Host;
use crate::engine::Spec;
use crate::plan::Plan;
use crate::units::index;

/// Parts of what is streamed: so many at most go encoded.
pub(in crate::engine) const EIGHTHS: u32 = 8;

/// For each tensor of `plan` whether it goes encoded: `eighths` of all bytes, spread over the order
/// in which they are used, those that are held first where that makes no difference to the spread.
fn picked(
    plan: &Plan,
    bytes: impl Fn(u32) -> u64,
    can_be: impl Fn(u32) -> bool,
    is_held: impl Fn(u32) -> bool,
    eighths: u32,
) -> Vec<bool> {
    let mut picks = vec![eighths >= EIGHTHS; plan.resident.len()];
    if eighths == 0 || eighths >= EIGHTHS {
        return picks;
    }
    let mut seen = BTreeSet::new();
    // What should have been picked so far and was not, in eighths of bytes.
    let mut owed: i128 = 0;
    for copy in &plan.program.copies {
        if !seen.insert(copy.tensor) {
            continue;
        }
        let whole = i128::from(EIGHTHS) * i128::from(bytes(copy.tensor));
        owed += i128::from(eighths) * i128::from(bytes(copy.tensor));
        let least = if is_held(copy.tensor) { 0 } else { whole / 2 };
        if can_be(copy.tensor) && owed >= least {
            picks[index(copy.tensor)] = true;
            owed -= whole;
        }
    }
    picks
}

impl Host {
    /// Says how many eighths of what `plan` streams come encoded, from the next copy that is
    /// enqueued on, as far as they are.
    pub(in crate::engine) fn pick(&mut self, spec: &Spec, plan: &Plan, eighths: u32) {
        let hopeless = self.hopeless.lock();
        let made_for = Some((eighths, hopeless.len()));
        if self.picked_for == made_for {
            return;
        }
        self.picked_for = made_for;
        let picks = {
            let codes = self.codes.read();
            let can_be =
                |tensor: u32| spec.element_of(tensor).is_some() && !hopeless.contains(&tensor);
            let bytes = |tensor: u32| spec.profile.tensors[index(tensor)].bytes;
            picked(plan, bytes, can_be, |tensor| codes.get(tensor).is_some(), eighths)
        };
        self.codes.write().set_picks(picks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Profile, Tensor, plan};

    const TENSORS: u32 = 64;

    fn streaming() -> Plan {
        let tensors = (0..TENSORS).map(|number| Tensor { block: number / 2, bytes: 1 << 20 });
        let order = (0..TENSORS / 2).collect();
        let profile = Profile { tensors: tensors.collect(), order, ..Profile::default() };
        plan(&profile, 4 << 20).expect("feasible")
    }

    fn picks(eighths: u32, can_be: fn(u32) -> bool, held: &[bool]) -> Vec<bool> {
        let held = |tensor: u32| held.get(index(tensor)).copied().unwrap_or(false);
        picked(&streaming(), |_| 1 << 20, can_be, held, eighths)
    }

    /// How many of each eight that follow each other are picked: the least and the most.
    fn in_a_row(picks: &[bool]) -> (usize, usize) {
        let counts = picks.windows(8).map(|some| some.iter().filter(|&&pick| pick).count());
        (counts.clone().min().unwrap_or(0), counts.max().unwrap_or(0))
    }

    #[test]
    fn so_many_eighths_are_spread_over_all() {
        for eighths in 0..=EIGHTHS {
            let picks = picks(eighths, |_| true, &[]);
            let wanted = index(eighths);
            assert_eq!(in_a_row(&picks), (wanted, wanted), "{eighths} eighths");
        }
    }

    #[test]
    fn what_cannot_be_encoded_is_made_up_for_by_what_can() {
        let picks = picks(3, |tensor| tensor % 2 == 0, &[]);
        assert!(picks.iter().skip(1).step_by(2).all(|&pick| !pick));
        let (least, most) = in_a_row(&picks);
        assert!(least >= 2 && most <= 4, "{least} to {most} of 8");
        let count = picks.iter().filter(|&&pick| pick).count();
        assert!(count.abs_diff(24) <= 1, "{count} of 64");
    }

    #[test]
    fn what_is_held_stays_picked_and_is_picked_first() {
        let before = picks(2, |_| true, &[]);
        assert_eq!(picks(2, |_| true, &before), before);
        let more = picks(5, |_| true, &before);
        let kept = std::iter::zip(&before, &more).filter(|&(&was, &is)| was && is).count();
        assert_eq!(kept, 16, "all that was encoded for two eighths");
        let shifted: Vec<bool> = (0..TENSORS).map(|number| number % 4 == 3).collect();
        let again = picks(2, |_| true, &shifted);
        let kept = std::iter::zip(&shifted, &again).filter(|&(&was, &is)| was && is).count();
        assert!(kept >= 15, "{kept} of 16 that were held");
        let (least, most) = in_a_row(&again);
        assert!(least >= 1 && most <= 3, "{least} to {most} of 8");
    }
}
