//! Goal: layers that are streamed one at a time, some hundreds in a pass, are planned no worse than
//! their blocks and near the optimum, although the linear program is not solved for so many.
//! Method: FLUX.1 and Qwen-Image by layers with the FLOPs of each, beside the same by blocks and
//! the exact linear program; most where copies take as long as the compute, as anything else is
//! lost there.

use dgls_core::plan::{Link, Profile, Tensor, Times, optimum_s, plan};

const HIDDEN: u64 = 3072;

/// The weight of a layer, in elements, and its FLOPs in a pass with those of an attention after it.
#[derive(Clone, Copy)]
struct Layer {
    elements: u64,
    flops: u64,
}

fn linear(inputs: u64, outputs: u64, tokens: u64) -> Layer {
    let elements = inputs * HIDDEN * outputs * HIDDEN;
    Layer { elements, flops: 2 * elements * tokens }
}

fn with_attention(layer: Layer, tokens: u64) -> Layer {
    Layer { flops: layer.flops + 4 * tokens * tokens * HIDDEN, ..layer }
}

type Block = Vec<Layer>;

fn flux(doubles: usize, singles: usize, tokens: u64) -> Vec<Block> {
    let (text, image) = (512, tokens - 512);
    let mut double = vec![linear(1, 6, 1), linear(1, 6, 1), linear(1, 3, image)];
    double.push(with_attention(linear(1, 3, text), tokens));
    for tokens in [image, text] {
        double.extend([linear(1, 1, tokens), linear(1, 4, tokens), linear(4, 1, tokens)]);
    }
    let into = with_attention(linear(1, 7, tokens), tokens);
    let single = vec![linear(1, 3, 1), into, linear(5, 1, tokens)];
    [vec![double; doubles], vec![single; singles]].concat()
}

fn qwen(blocks: usize, tokens: u64) -> Vec<Block> {
    let (text, image) = (256, tokens - 256);
    let mut block = vec![linear(1, 6, 1), linear(1, 6, 1)];
    for tokens in [image, text] {
        block.extend([linear(1, 1, tokens); 3]);
    }
    let last = block.pop().expect("eight layers");
    block.push(with_attention(last, tokens));
    block.extend([linear(1, 1, image), linear(1, 1, text)]);
    for tokens in [image, text] {
        block.extend([linear(1, 4, tokens), linear(4, 1, tokens)]);
    }
    vec![block; blocks]
}

#[expect(clippy::cast_precision_loss, reason = "fewer than 2^53 bytes and PFLOPs")]
fn real(number: u64) -> f64 {
    number as f64
}

/// In bf16, with so much of it on the device, over a link that takes `ratio` times as long for the
/// rest as the compute of a pass does.
fn profile(blocks: &[Block], by_layer: bool, budget: u64, ratio: f64) -> Profile {
    let link = Link { bytes_per_s: 55e9, latency_s: 8e-6 };
    let flops: u64 = blocks.iter().flatten().map(|layer| layer.flops).sum();
    let missing = total_bytes(blocks) - budget;
    let per_flop = real(missing) / link.bytes_per_s / ratio / real(flops);
    let layers = || blocks.iter().flatten().map(std::slice::from_ref);
    let uses: Vec<&[Layer]> =
        if by_layer { layers().collect() } else { blocks.iter().map(Vec::as_slice).collect() };
    let seconds =
        |used: &&[Layer]| used.iter().map(|layer| real(layer.flops) * per_flop).sum::<f64>();
    let tensors = (0..).zip(&uses).flat_map(|(block, used)| {
        used.iter().map(move |layer| Tensor { block, bytes: 2 * layer.elements })
    });
    Profile {
        tensors: tensors.collect(),
        order: (0..u32::try_from(uses.len()).expect("1000")).collect(),
        times: Some(Times { compute_s: uses.iter().map(seconds).collect(), outside_s: 0.0, link }),
        ..Profile::default()
    }
}

fn total_bytes(blocks: &[Block]) -> u64 {
    blocks.iter().flatten().map(|layer| 2 * layer.elements).sum()
}

fn period_s(profile: &Profile, budget: u64) -> f64 {
    plan(profile, budget).expect("enough").period_s.expect("timed")
}

#[test]
fn layers_are_planned_no_worse_than_their_blocks() {
    for tokens in [1024, 4608] {
        for blocks in [flux(19, 38, tokens), qwen(60, tokens)] {
            for quarters in 1..=3 {
                for ratio in [1.0, 1.15, 2.0] {
                    let budget = total_bytes(&blocks) * quarters / 4;
                    let by_layer = period_s(&profile(&blocks, true, budget, ratio), budget);
                    let by_block = period_s(&profile(&blocks, false, budget, ratio), budget);
                    assert!(
                        by_layer <= by_block,
                        "{by_layer} s by layers, {by_block} s by blocks: {} of them, {tokens} \
                         tokens, {quarters} of 4 on the device, ratio {ratio}",
                        blocks.len()
                    );
                }
            }
        }
    }
}

/// The optimum cuts weights anywhere and copies without latency.
#[test]
fn layers_are_planned_near_the_optimum() {
    let mut ratios = Vec::new();
    for blocks in [flux(6, 20, 4608), qwen(8, 4608)] {
        for quarters in 1..=3 {
            for ratio in [1.0, 1.15, 2.0] {
                let budget = total_bytes(&blocks) * quarters / 4;
                let profile = profile(&blocks, true, budget, ratio);
                assert!(profile.order.len() > 100, "the linear program is solved");
                let optimum = optimum_s(&profile, budget).expect("one use each");
                ratios.push(period_s(&profile, budget) / optimum);
            }
        }
    }
    let mean = ratios.iter().sum::<f64>() / real(ratios.len() as u64);
    assert!(mean <= 1.03 && ratios.iter().all(|&ratio| ratio <= 1.05), "{ratios:?}");
}
