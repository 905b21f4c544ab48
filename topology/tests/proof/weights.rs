//! Weights made from a tensor's name, so that a test needs no files and another program can make the same.

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

/// A toy's tensor: matrices that keep the size of what they multiply, vectors around 1 or, for biases, 0.
pub(crate) fn seeded(name: &str, shape: &[usize]) -> Tensor {
    let matrix = shape.len() > 1;
    let spread = (3.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
    let value = |i: usize| match uniform(name, i) {
        u if matrix => u * spread,
        u if name.ends_with("weight") => 1.0 + u / 2.0,
        u => u / 2.0,
    };
    Tensor::of(shape, value)
}
