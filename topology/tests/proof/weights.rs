//! Weights made from a tensor's name, so that a test needs no files and another program can make the same.

use tensorwire_topology::model::TensorSpec;

use super::group::Config;
use super::tensor::Tensor;

/// The first number of the sequence that belongs to a name: FNV-1a.
fn seed(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// The `i`-th number of a sequence: SplitMix64.
fn number(seed: u64, i: usize) -> u64 {
    let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// From -1 to 1.
pub(crate) fn uniform(name: &str, i: usize) -> f64 {
    (number(seed(name), i) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// A toy's tensor: matrices that keep the size of what they multiply, vectors around 1 or, for biases, 0; words,
/// bytes and 8-bit floats of quantised weights.
pub(crate) fn seeded(config: &Config, spec: &TensorSpec) -> Tensor {
    let scattered = config.0["quantization_config"]["desc_act"] == true;
    let (name, shape) = (spec.name.as_str(), &spec.shape[..]);
    let spread = (3.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
    let below = |i: usize, n: u64| (number(seed(name), i) % n) as f64;
    Tensor::of(shape, |i| match spec.stored.name() {
        // Which group of 16 an input is in.
        "I32" if name.ends_with("g_idx") && scattered => below(i, shape[0] as u64 / 16),
        "I32" if name.ends_with("g_idx") => (i / 16) as f64,
        "I32" => below(i, 1 << 32),
        // From an eighth to 8 on either side.
        "F8_E4M3" => below(i, 2) * 128.0 + 8.0 * (4.0 + below(2 * i, 5)) + below(3 * i, 8),
        "U8" if name.ends_with("scales") => 122.0 + below(i, 4),
        "U8" => below(i, 256),
        _ => match uniform(name, i) {
            u if name.ends_with("scales") || name.ends_with("scale_inv") => (1.5 + u) / 20.0,
            u if shape.len() > 1 => u * spread,
            u if name.ends_with("weight") => 1.0 + u / 2.0,
            u => u / 2.0,
        },
    })
}
