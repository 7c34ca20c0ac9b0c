//! Reads the inputs of the form and checks every one of them.

use serde_json::{Value, json};

use super::fields::{Fields, list, refused, whole};
use crate::error::{Error, Result};
use crate::plan::Link;
use crate::plan::problem::{Manual, Problem, Slot};
use crate::plan::splits::{Splits, by_tensors};
use crate::units::index;

const MOST_BLOCKS: usize = 10_000;
const MOST_TENSORS: usize = 1 << 20;
const MOST_BYTES: u64 = 1 << 62;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Granularity {
    Tensor,
    Block,
    Bytes(u64),
}

#[derive(Debug)]
pub(super) struct Inputs {
    /// Tensors of each block.
    blocks: Vec<Vec<u64>>,
    compute_s: Vec<f64>,
    budget_bytes: u64,
    link: Link,
    outside_s: f64,
    granularity: Granularity,
    resident: Option<Vec<bool>>,
    window: Option<u32>,
    one_pass: bool,
    pub(super) verify: bool,
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
    pub(super) fn read(value: &Value) -> Result<Self> {
        let fields = Fields::new(String::new(), value, &FIELDS)?;
        let granularity = read_granularity(&fields)?;
        let (blocks, compute_s) = read_blocks(&fields, granularity)?;
        let rate = fields.needed("h2d_bytes_per_s")?;
        let latency = fields.needed("copy_latency_s")?;
        let outside = fields.get("outside_s").map(|v| fields.real("outside_s", v, 0.0, 1e9));
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
            one_pass: fields.flag("static_addresses", true)?,
            verify: fields.flag("verify", false)?,
            blocks,
            compute_s,
        })
    }

    pub(super) fn problem(&self) -> Problem {
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
            one_pass: self.one_pass,
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
