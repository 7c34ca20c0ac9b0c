//! The JSON form of inputs and plans, so that plans can be made and checked from outside.
//!
//! docs/plan-format.md is the description; unknown fields are errors. Every error names the field,
//! its value and what is allowed.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::bound::optimum_of;
use super::problem::{Manual, Problem, Slot};
use super::splits::{Splits, by_tensors};
use super::trial::Found;
use super::{Link, find_in};
use crate::error::{Error, Result};
use crate::units::{index, narrow};

const MOST_BLOCKS: usize = 10_000;
const MOST_TENSORS: usize = 1 << 20;
const MOST_BYTES: u64 = 1 << 62;

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
    let answer = match find_in(&mut problem, || inputs.problem()) {
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

/// `NaN` and `Infinity`, which some writers leave bare, as text: refused later by field.
fn quote_bare(text: &str) -> Cow<'_, str> {
    const BARE: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !BARE.iter().any(|bare| text.contains(bare)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut inside) = (text, false);
    while let Some(letter) = rest.chars().next() {
        let bare = BARE.iter().find(|bare| !inside && rest.starts_with(**bare));
        let taken = match (bare, letter) {
            (Some(bare), _) => {
                out.extend(["\"", bare, "\""]);
                bare.len()
            }
            (None, '\\') if inside => {
                let escaped = rest.chars().nth(1).map_or(0, char::len_utf8);
                out.push_str(&rest[..=escaped]);
                1 + escaped
            }
            (None, letter) => {
                inside ^= letter == '"';
                out.push(letter);
                letter.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    Cow::Owned(out)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Granularity {
    Tensor,
    Block,
    Bytes(u64),
}

#[derive(Debug)]
struct Inputs {
    /// Tensors of each block.
    blocks: Vec<Vec<u64>>,
    compute_s: Vec<f64>,
    budget_bytes: u64,
    link: Link,
    outside_s: f64,
    granularity: Granularity,
    resident: Option<Vec<bool>>,
    window: Option<u32>,
    verify: bool,
}

/// The fields of one object, with its name for messages.
struct Fields<'a> {
    name: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn new(name: String, value: &'a Value, known: &[&str]) -> Result<Self> {
        let Value::Object(map) = value else {
            let what = if name.is_empty() { "the inputs" } else { &name };
            return Err(refused(what, "an object", value));
        };
        match map.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(Error::Invalid(format!(
                "{} is not known; the fields are {}",
                path(&name, key),
                known.join(", ")
            ))),
            None => Ok(Self { name, map }),
        }
    }

    fn path(&self, key: &str) -> String {
        path(&self.name, key)
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    fn needed(&self, key: &str) -> Result<&'a Value> {
        self.get(key).ok_or_else(|| Error::Invalid(format!("{} is missing", self.path(key))))
    }

    fn whole(&self, key: &str, value: &Value, least: u64, most: u64) -> Result<u64> {
        whole(&self.path(key), value, least, most)
    }

    fn real(&self, key: &str, value: &Value, least: f64, most: f64) -> Result<f64> {
        let found = value.as_f64().filter(|real| (least..=most).contains(real));
        let allowed = format!("a number from {least} to {most:e}");
        found.ok_or_else(|| refused(&self.path(key), &allowed, value))
    }

    fn flag(&self, key: &str, otherwise: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(otherwise),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(refused(&self.path(key), "true or false", value)),
        }
    }
}

fn path(name: &str, key: &str) -> String {
    if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") }
}

fn refused(what: &str, allowed: &str, found: &Value) -> Error {
    let mut shown = found.to_string();
    if shown.len() > 60 {
        let cut = (0..=60).rev().find(|&at| shown.is_char_boundary(at)).unwrap_or(0);
        shown.truncate(cut);
        shown.push_str("...");
    }
    Error::Invalid(format!("{what} must be {allowed}, found {shown}"))
}

fn whole(what: &str, value: &Value, least: u64, most: u64) -> Result<u64> {
    let found = value.as_u64().filter(|number| (least..=most).contains(number));
    found.ok_or_else(|| refused(what, &format!("a whole number from {least} to {most}"), value))
}

fn list<'a>(what: &str, value: &'a Value) -> Result<&'a [Value]> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| refused(what, "a list", value))
}

const FIELDS: [&str; 10] = [
    "blocks",
    "budget_bytes",
    "h2d_bytes_per_s",
    "copy_latency_s",
    "outside_s",
    "granularity",
    "static_addresses",
    "resident",
    "prefetch",
    "verify",
];
const BLOCK_FIELDS: [&str; 4] = ["bytes", "compute_s", "count", "tensor_bytes"];

impl Inputs {
    fn read(value: &Value) -> Result<Self> {
        let fields = Fields::new(String::new(), value, &FIELDS)?;
        let granularity = read_granularity(&fields)?;
        let (blocks, compute_s) = read_blocks(&fields, granularity)?;
        let rate = fields.needed("h2d_bytes_per_s")?;
        let latency = fields.needed("copy_latency_s")?;
        let outside = fields.get("outside_s").map(|v| fields.real("outside_s", v, 0.0, 1e9));
        // Every plan of this form has static addresses; that they need not be changes nothing.
        fields.flag("static_addresses", true)?;
        let window = fields.get("prefetch").map(|v| fields.whole("prefetch", v, 0, 1 << 20));
        Ok(Self {
            budget_bytes: fields.whole(
                "budget_bytes",
                fields.needed("budget_bytes")?,
                0,
                MOST_BYTES,
            )?,
            link: Link {
                bytes_per_s: fields.real("h2d_bytes_per_s", rate, 1.0, 1e18)?,
                latency_s: fields.real("copy_latency_s", latency, 0.0, 1e6)?,
            },
            outside_s: outside.transpose()?.unwrap_or(0.0),
            granularity,
            resident: read_resident(&fields, blocks.len())?,
            window: window.transpose()?.map(|uses| u32::try_from(uses).unwrap_or(u32::MAX)),
            verify: fields.flag("verify", false)?,
            blocks,
            compute_s,
        })
    }

    fn problem(&self) -> Problem {
        let bytes: Vec<u64> = self.blocks.iter().map(|tensors| tensors.iter().sum()).collect();
        let (kinds, kind_of, tensors) = if let Granularity::Bytes(granule) = self.granularity {
            let kind = |&bytes: &u64| Splits::Granules { granule, bytes };
            (bytes.iter().map(kind).collect(), (0..bytes.len()).collect(), Vec::new())
        } else {
            let (kinds, kind_of) = by_tensors(&self.blocks, &[], 0, self.link.copy_bytes());
            (kinds, kind_of, self.blocks.clone())
        };
        let slot = |(block, &compute_s): (usize, &f64)| Slot { block, compute_s };
        Problem {
            slow: Vec::new(),
            kinds,
            kind_of,
            tensors,
            align_bytes: 1,
            bytes,
            uses: self.compute_s.iter().enumerate().map(slot).collect(),
            outside_s: self.outside_s,
            link: self.link,
            dormant: Vec::new(),
            budget_bytes: self.budget_bytes,
            manual: self.resident.clone().map(|resident| Manual { resident }),
            window: self.window,
            one_pass: true,
        }
    }
}

fn read_granularity(fields: &Fields) -> Result<Granularity> {
    match fields.get("granularity") {
        None => Ok(Granularity::Tensor),
        Some(Value::String(text)) if text == "tensor" => Ok(Granularity::Tensor),
        Some(Value::String(text)) if text == "block" => Ok(Granularity::Block),
        Some(value) => {
            let granule = value.as_u64().filter(|bytes| (1..=MOST_BYTES).contains(bytes));
            let allowed = "\"tensor\", \"block\" or a number of bytes from 1 to 2^62";
            granule.map(Granularity::Bytes).ok_or_else(|| refused("granularity", allowed, value))
        }
    }
}

fn read_blocks(fields: &Fields, granularity: Granularity) -> Result<(Vec<Vec<u64>>, Vec<f64>)> {
    let value = fields.needed("blocks")?;
    let entries = list("blocks", value)?;
    if entries.is_empty() {
        return Err(refused("blocks", "a list of at least one block", value));
    }
    let (mut blocks, mut compute_s) = (Vec::new(), Vec::new());
    let (mut total, mut tensors) = (0_u64, 0);
    for (number, entry) in entries.iter().enumerate() {
        let entry = Fields::new(format!("blocks[{number}]"), entry, &BLOCK_FIELDS)?;
        let bytes = entry.whole("bytes", entry.needed("bytes")?, 0, MOST_BYTES)?;
        let seconds = entry.real("compute_s", entry.needed("compute_s")?, 0.0, 1e9)?;
        let most = MOST_BLOCKS as u64;
        let count = entry.get("count").map(|v| entry.whole("count", v, 1, most)).transpose()?;
        let count = index(count.unwrap_or(1));
        let parts = match (entry.get("tensor_bytes"), granularity) {
            (Some(value), _) => {
                let parts = read_tensors(&entry.path("tensor_bytes"), value, bytes)?;
                if granularity == Granularity::Tensor { parts } else { vec![bytes] }
            }
            (None, _) => vec![bytes],
        };
        let parts: Vec<u64> = parts.into_iter().filter(|&bytes| bytes > 0).collect();
        tensors += parts.len() * count;
        total = match bytes.checked_mul(count as u64).and_then(|sum| sum.checked_add(total)) {
            Some(total) if total < MOST_BYTES => total,
            _ => return Err(Error::Invalid("blocks add up to 2^62 bytes or more".into())),
        };
        if blocks.len() + count > MOST_BLOCKS || tensors > MOST_TENSORS {
            return Err(Error::Invalid(format!(
                "blocks may be {MOST_BLOCKS} with {MOST_TENSORS} tensors, found more"
            )));
        }
        blocks.extend(std::iter::repeat_n(parts, count));
        compute_s.extend(std::iter::repeat_n(seconds, count));
    }
    Ok((blocks, compute_s))
}

fn read_tensors(what: &str, value: &Value, bytes: u64) -> Result<Vec<u64>> {
    let mut parts = Vec::new();
    let mut sum = 0_u64;
    for (number, part) in list(what, value)?.iter().enumerate() {
        let part = whole(&format!("{what}[{number}]"), part, 0, MOST_BYTES)?;
        sum = sum.saturating_add(part);
        parts.push(part);
    }
    if sum != bytes {
        let allowed = format!("sizes that add up to the block's {bytes} bytes");
        return Err(refused(what, &allowed, &json!(sum)));
    }
    Ok(parts)
}

fn read_resident(fields: &Fields, blocks: usize) -> Result<Option<Vec<bool>>> {
    let Some(value) = fields.get("resident") else { return Ok(None) };
    let mut resident = vec![false; blocks];
    for (number, block) in list("resident", value)?.iter().enumerate() {
        let block = whole(&format!("resident[{number}]"), block, 0, blocks as u64 - 1)?;
        resident[index(block)] = true;
    }
    Ok(Some(resident))
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
    if verify {
        answer["optimum_s"] = json!(optimum_of(problem)?);
    }
    Ok(answer)
}

/// The copies, with sources counted in the streamed bytes of their block.
fn copies(problem: &Problem, found: &Found) -> Vec<Value> {
    let place = |block: u32, tensor: u32| {
        let split = found.splits[index(block)];
        let before = problem.splits(index(block)).tensors(split).unwrap_or_default();
        let before = before.iter().filter(|&&other| other < tensor);
        before.map(|&other| problem.tensors[index(block)][index(other)]).sum::<u64>()
    };
    let copy = |step: &super::steps::Step| {
        let block = narrow(problem.uses[index(step.used)].block);
        json!({
            "block": block,
            "src": place(block, step.tensor) + step.source,
            "dst": step.target,
            "bytes": step.bytes,
            "wait": [step.wait.0, step.wait.1],
        })
    };
    found.steps.iter().map(copy).collect()
}
