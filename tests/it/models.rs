//! The real models' blocks: tensors, and compute for each of their bytes.

use dgls_core::plan::{Link, Profile, Tensor, Times};

/// Elements of each tensor of a block.
type Block = Vec<u64>;

const HIDDEN: u64 = 3072;

fn linear(rows: u64, columns: u64) -> [u64; 2] {
    [rows * columns, rows]
}

/// A FLUX.1 double block; `HunyuanVideo` has the same.
fn double_block() -> Block {
    let stream = || {
        let mut parts = Vec::new();
        parts.extend(linear(6 * HIDDEN, HIDDEN));
        parts.extend(linear(3 * HIDDEN, HIDDEN));
        parts.extend([128, 128]);
        parts.extend(linear(HIDDEN, HIDDEN));
        parts.extend(linear(4 * HIDDEN, HIDDEN));
        parts.extend(linear(HIDDEN, 4 * HIDDEN));
        parts
    };
    [stream(), stream()].concat()
}

fn single_block() -> Block {
    let mut parts = linear(3 * HIDDEN, HIDDEN).to_vec();
    parts.extend(linear(7 * HIDDEN, HIDDEN));
    parts.extend(linear(HIDDEN, 5 * HIDDEN));
    parts.extend([128, 128]);
    parts
}

fn wan_block() -> Block {
    let (hidden, wide) = (5120, 13_824);
    let mut parts = vec![6 * hidden];
    for _ in 0..8 {
        parts.extend(linear(hidden, hidden));
    }
    parts.extend([hidden; 6]);
    parts.extend(linear(wide, hidden));
    parts.extend(linear(hidden, wide));
    parts
}

fn qwen_block() -> Block {
    let mut parts = Vec::new();
    for _ in 0..2 {
        parts.extend(linear(6 * HIDDEN, HIDDEN));
        parts.extend(linear(4 * HIDDEN, HIDDEN));
        parts.extend(linear(HIDDEN, 4 * HIDDEN));
    }
    for _ in 0..8 {
        parts.extend(linear(HIDDEN, HIDDEN));
    }
    parts.extend([128; 4]);
    parts
}

/// A real model at one size of picture or film.
pub(crate) struct Model {
    pub(crate) name: &'static str,
    blocks: Vec<Block>,
    /// FLOP for each byte of bf16 weights.
    intensity: f64,
}

/// All of them.
pub(crate) fn all() -> Vec<Model> {
    let flux = || [vec![double_block(); 19], vec![single_block(); 38]].concat();
    let hunyuan = || [vec![double_block(); 20], vec![single_block(); 40]].concat();
    let model = |name, blocks, intensity| Model { name, blocks, intensity };
    vec![
        model("FLUX 512", flux(), 907.0),
        model("FLUX 1024", flux(), 3141.0),
        model("Qwen-Image 1328", vec![qwen_block(); 60], 3304.0),
        model("WAN 2.1 14B, 1 frame", vec![wan_block(); 40], 1497.0),
        model("WAN 2.1 14B, 33 frames", vec![wan_block(); 40], 17_971.0),
        model("HunyuanVideo 33 frames", hunyuan(), 4351.0),
    ]
}

impl Model {
    /// The profile of its blocks with elements of `element_bytes`, at a rate and a link. Blocks of
    /// one model take equal time, which is so for these by their FLOPs.
    pub(crate) fn profile(&self, element_bytes: u64, tflops: f64, bytes_per_s: f64) -> Profile {
        let mut tensors = Vec::new();
        let mut elements = 0;
        for (block, parts) in (0..).zip(&self.blocks) {
            elements += parts.iter().sum::<u64>();
            tensors.extend(parts.iter().map(|n| Tensor { block, bytes: n * element_bytes }));
        }
        #[expect(clippy::cast_precision_loss, reason = "fewer than 2^53 bytes")]
        let seconds = 2.0 * elements as f64 * self.intensity / (tflops * 1e12);
        let uses = u32::try_from(self.blocks.len()).expect("60");
        Profile {
            tensors,
            order: (0..uses).collect(),
            min_stream_bytes: 64 << 10,
            times: Some(Times {
                compute_s: vec![seconds / f64::from(uses); self.blocks.len()],
                outside_s: 0.0,
                link: Link { bytes_per_s, latency_s: 5e-6 },
            }),
            ..Profile::default()
        }
    }
}
