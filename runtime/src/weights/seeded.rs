//! Weights from a seed: a counter-based generator, so any element can be made without those before it.

use tensorwire::topology::model::TensorSpec;

use super::Region;

/// Appends the region's elements to `out`.
///
/// A matrix is uniform with variance `1 / columns`, so that a product keeps its input's scale. A vector is a
/// bias (about 0) or the weight of a norm (about 1).
pub(super) fn fill(seed: u64, tensor: &TensorSpec, region: &Region, out: &mut Vec<f32>) {
    let (offset, scale) = match (tensor.shape.len(), tensor.name.ends_with("bias")) {
        (1, true) => (0.0, 0.1),
        (1, false) => (1.0, 0.1),
        _ => (0.0, (3.0 / region.width as f64).sqrt() as f32),
    };
    let key = tensor.name.bytes().fold(mix64(seed), |h, b| mix64(h ^ u64::from(b)));
    for row in region.rows.0..region.rows.1 {
        let key = mix64(key ^ row as u64);
        // Columns of a real tensor fit 32 bits; the row's key has 64, so rows don't share a sequence.
        let (low, high) = (key as u32, (key >> 32) as u32);
        out.extend((region.cols.0..region.cols.1).map(|col| offset + scale * unit(col as u32, low, high)));
    }
}

/// A number in [-1, 1) that follows from all its arguments, in steps of 2^-23. Only 32-bit integer operations
/// and exact conversions: the compiler vectorises it, and every machine gets the same bits.
#[inline]
fn unit(x: u32, low: u32, high: u32) -> f32 {
    let x = (x ^ low).wrapping_mul(0x9E37_79B1);
    let x = (x ^ (x >> 16) ^ high).wrapping_mul(0x85EB_CA77);
    let x = (x ^ (x >> 15)).wrapping_mul(0xC2B2_AE3D);
    let x = x ^ (x >> 16);
    ((x >> 8) as i32 - (1 << 23)) as f32 * (1.0 / (1 << 23) as f32)
}

/// A bijection of 64 bits: each bit of the input changes about half of the output's (as in splitmix64).
fn mix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::super::Weights;
    use tensorwire::topology::ModelSpec;
    use tensorwire::topology::plan::{Slice, Span};

    fn read(seed: u64, name: &str, slices: &[Slice]) -> (Vec<f32>, Vec<usize>) {
        let config = r#"{"model_type": "llama", "hidden_size": 400, "num_hidden_layers": 1, "vocab_size": 10,
            "num_attention_heads": 10, "intermediate_size": 300}"#;
        let spec = ModelSpec::from_config(config).unwrap();
        let name = format!("model.layers.0.mlp.{name}.weight");
        Weights::seeded(seed).read(spec.tensor(&name).unwrap(), slices).unwrap()
    }

    #[test]
    fn a_slice_holds_what_the_whole_holds() {
        let (whole, _) = read(3, "up_proj", &[]);
        let slices = [Slice { dim: 0, range: Span::new(4, 9) }, Slice { dim: 1, range: Span::new(2, 6) }];
        let (part, shape) = read(3, "up_proj", &slices);
        assert_eq!(shape, [5, 4]);
        let expected: Vec<f32> = (4..9).flat_map(|r| whole[r * 400 + 2..r * 400 + 6].to_vec()).collect();
        assert_eq!(part, expected);
    }

    #[test]
    fn elements_are_uniform_and_uncorrelated() {
        let (w, shape) = read(1, "up_proj", &[]);
        assert_eq!(shape, [300, 400]);
        let n = w.len() as f64;
        let mean = w.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let var = w.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
        // Standard errors are 1.4e-4 of the mean and 0.26% of the variance.
        assert!(mean.abs() < 1e-3, "{mean}");
        assert!((var * 400.0 - 1.0).abs() < 0.02, "{var}");
        for lag in [1, 2, 8, 400, 401, 800] {
            let c = w.iter().zip(&w[lag..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
            assert!((c / n / var).abs() < 0.02, "lag {lag}: {}", c / n / var);
        }
        for (other, _) in [read(2, "up_proj", &[]), read(1, "gate_proj", &[])] {
            assert!(w.iter().zip(&other).filter(|(a, b)| a == b).count() < 10);
        }
    }
}
