//! The JSON form of inputs and plans, so that plans can be made and checked from outside.
//!
//! docs/plan-format.md is the description; unknown fields are errors. Every error names the field,
//! its value and what is allowed.

mod fields;
mod inputs;

use serde_json::{Value, json};

use self::fields::quote_bare;
use self::inputs::Inputs;
use super::bound::optimum_of;
use super::find_in;
use super::problem::Problem;
use super::trial::Found;
use crate::error::{Error, Result};
use crate::units::{index, narrow};

/// Plans from the documented inputs; returns the documented plan. Pure: reads no file.
///
/// # Errors
///
/// [`Error::Invalid`] with the field, what it may be and what was found. That no plan exists for
/// the budget is no error but an answer.
pub fn plan_json(inputs: &str) -> Result<String> {
    let value: Value = serde_json::from_str(&quote_bare(inputs))
        .map_err(|error| Error::Invalid(format!("the inputs are not JSON: {error}")))?;
    let inputs = Inputs::read(&value)?;
    let mut problem = inputs.problem();
    let answer = match find_in(&mut problem, || inputs.problem(), None) {
        Ok(found) => written(&problem, &found, inputs.verify)?,
        Err(Error::BudgetTooSmall { block, need_bytes, budget_bytes }) => json!({
            "infeasible": true,
            "block": block,
            "need_bytes": need_bytes,
            "budget_bytes": budget_bytes,
        }),
        Err(error) => return Err(error),
    };
    Ok(answer.to_string())
}

fn written(problem: &Problem, found: &Found, verify: bool) -> Result<Value> {
    let moved = |block: usize| problem.splits(block).bytes(found.splits[block]);
    let streamed: Vec<u64> = (0..problem.bytes.len()).map(moved).collect();
    let resident: Vec<u64> = problem.bytes.iter().zip(&streamed).map(|(all, s)| all - s).collect();
    let compute_s = problem.compute_s();
    let limit = match streamed.iter().sum::<u64>() {
        0 => "fits",
        _ if found.period_s > compute_s * 1.001 => "copy",
        _ => "compute",
    };
    let mut answer = json!({
        "resident_bytes": resident,
        "streamed_bytes": streamed,
        "buffer": { "kind": "arena", "bytes": found.ring_bytes },
        "copies": copies(problem, found),
        "period_s": found.period_s,
        "lower_bound_s": problem.lower_bound_s(),
        "limit": limit,
    });
    if found.passes > 1 {
        answer["passes"] = json!(found.passes);
    }
    if verify {
        answer["optimum_s"] = json!(optimum_of(problem)?);
    }
    Ok(answer)
}

/// The copies of a cycle, with sources counted in the streamed bytes of their block.
fn copies(problem: &Problem, found: &Found) -> Vec<Value> {
    let uses = narrow(problem.uses.len());
    let place = |block: u32, tensor: u32| {
        let split = found.splits[index(block)];
        let before = problem.splits(index(block)).tensors(split).unwrap_or_default();
        let before = before.iter().filter(|&&other| other < tensor);
        before.map(|&other| problem.tensors[index(block)][index(other)]).sum::<u64>()
    };
    let block_of = |used: u32| narrow(problem.uses[index(used % uses)].block);
    let copy = |step: &super::steps::Step| {
        let block = block_of(step.used);
        let (pass, (waited, cycles)) = (step.used / uses, step.wait);
        let mut copy = json!({
            "block": block,
            "src": place(block, step.tensor) + step.source,
            "dst": step.target,
            "bytes": step.bytes,
            "wait": [block_of(waited), cycles * found.passes + pass - waited / uses],
        });
        if found.passes > 1 {
            copy["pass"] = json!(pass);
        }
        copy
    };
    found.steps.iter().map(copy).collect()
}
