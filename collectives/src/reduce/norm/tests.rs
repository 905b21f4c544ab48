//! The kernel of every instruction set against the definition, bit for bit.

use proptest::prelude::*;
use tensorwire_core::ReduceOp;

use super::super::Kernels;
use super::super::tests::{pack, pattern, reference, round, round64, unpack, value};
use super::*;

const DTYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// Bit patterns of one row: of each rank, of the residual, of the weight.
#[derive(Clone, Debug)]
struct Row {
    dtype: DType,
    sources: Vec<Vec<u64>>,
    residual: Vec<u64>,
    weight: Vec<u64>,
    eps: f32,
}

impl Row {
    /// The new residual and the output, by the definition.
    fn expected(&self) -> (Vec<u64>, Vec<u64>) {
        let sum =
            |i| reference(self.dtype, ReduceOp::Sum, &self.sources.iter().map(|s| s[i]).collect::<Vec<_>>());
        let add = |(i, r): (usize, &u64)| reference(self.dtype, ReduceOp::Sum, &[*r, sum(i)]);
        let residual: Vec<u64> = self.residual.iter().enumerate().map(add).collect();
        let values = |row: &[u64]| -> Vec<f64> { row.iter().map(|x| value(self.dtype, *x)).collect() };
        let (x, weight) = (values(&residual), values(&self.weight));
        let out = if self.dtype == DType::F64 {
            rms_norm(&x, &weight, self.eps).into_iter().map(round64).collect()
        } else {
            let narrow = |row: Vec<f64>| -> Vec<f32> { row.into_iter().map(|x| x as f32).collect() };
            let out = rms_norm(&narrow(x), &narrow(weight), self.eps);
            out.into_iter().map(|x| round(self.dtype, x)).collect()
        };
        (residual, out)
    }

    /// What a kernel makes of it, into a buffer of its own or in place of source `place`.
    fn run(&self, kernel: AddRmsNorm, place: Option<usize>) -> (Vec<u64>, Vec<u64>) {
        let width = self.weight.len();
        let pack = |row: &Vec<u64>| pack(self.dtype, row);
        let mut sources: Vec<Vec<u64>> = self.sources.iter().map(pack).collect();
        let (mut residual, weight) = (pack(&self.residual), pack(&self.weight));
        let mut own = vec![0; residual.len()];
        let out = place.map_or(own.as_mut_ptr(), |i| sources[i].as_mut_ptr());
        let pointers: Vec<*const u8> = (0..sources.len())
            .map(|i| if Some(i) == place { out.cast_const().cast() } else { sources[i].as_ptr().cast() })
            .collect();
        // SAFETY: (1), (2) every buffer has `width` elements; (3) they are apart, but for `out` in place;
        // (4) they are aligned to 8, and `available` listed the table.
        unsafe {
            let (residual, weight) = (residual.as_mut_ptr().cast(), weight.as_ptr().cast());
            kernel(out.cast(), residual, pointers.as_ptr(), pointers.len(), weight, width, self.eps);
        }
        let out = place.map_or(&own, |i| &sources[i]);
        (unpack(self.dtype, &residual, width), unpack(self.dtype, out, width))
    }

    fn check(&self, place: usize) {
        let expected = self.expected();
        for kernels in Kernels::available() {
            let kernel = kernels.add_rms_norm(self.dtype).unwrap();
            let what = format!("{} {} of {}", kernels.name(), self.dtype, self.weight.len());
            assert_eq!(self.run(kernel, None), expected, "{what}");
            assert_eq!(self.run(kernel, Some(place % self.sources.len())), expected, "{what} in place");
        }
    }
}

/// As [`AddRmsNorm`] documents it.
fn rms_norm<F: Real>(x: &[F], weight: &[F], eps: f32) -> Vec<F> {
    let mut lanes = [F::from_f32(0.0); 64];
    for (i, x) in x.iter().enumerate() {
        lanes[i % 64] = lanes[i % 64] + *x * *x;
    }
    for h in [32, 16, 8, 4, 2, 1] {
        for j in 0..h {
            lanes[j] = lanes[j] + lanes[j + h];
        }
    }
    let scale = F::from_f32(1.0) / (lanes[0] / F::from_count(x.len()) + F::from_f32(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| *x * scale * *w).collect()
}

/// Ordinary numbers around one, with zeros and subnormals among them: a row of theirs has ordinary results.
fn ordinary(dtype: DType) -> BoxedStrategy<u64> {
    let (exponent, mantissa) = match dtype {
        DType::F64 => (11, 52),
        DType::F32 => (8, 23),
        DType::F16 => (5, 10),
        _ => (8, 7),
    };
    let bias = (1u64 << (exponent - 1)) - 1;
    let number = move |(negative, e, m): (bool, u64, u64)| {
        u64::from(negative) << (exponent + mantissa) | e << mantissa | m & ((1 << mantissa) - 1)
    };
    prop_oneof![
        8 => (any::<bool>(), bias - 4..bias + 4, any::<u64>()).prop_map(number),
        1 => (any::<bool>(), Just(0), any::<u64>()).prop_map(number),
        1 => any::<bool>().prop_map(move |negative| number((negative, 0, 0))),
    ]
    .boxed()
}

fn row() -> impl Strategy<Value = Row> {
    let width = prop_oneof![6 => 1usize..200, 1 => 200usize..3000];
    let eps = prop_oneof![Just(1e-5f32), Just(0.0), Just(f32::MAX), 0f32..1e-3];
    let shape = (proptest::sample::select(&DTYPES[..]), width, 1usize..6, any::<bool>(), eps);
    shape.prop_flat_map(|(dtype, width, n, ordinary, eps)| {
        let element = if ordinary { self::ordinary(dtype) } else { pattern(dtype) };
        proptest::collection::vec(proptest::collection::vec(element, width..=width), n + 2).prop_map(
            move |mut rows| {
                let (weight, residual) = (rows.pop().unwrap(), rows.pop().unwrap());
                Row { dtype, sources: rows, residual, weight, eps }
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn every_kernel_is_bitwise_the_definition(row in row(), place in 0usize..6) {
        row.check(place);
    }
}

#[test]
fn what_is_not_finite_is_defined() {
    let bits = |row: &[f32]| -> Vec<u64> { row.iter().map(|x| u64::from(x.to_bits())).collect() };
    let norm = |x: &[f32], eps| {
        let row = Row {
            dtype: DType::F32,
            sources: vec![bits(x)],
            residual: bits(&vec![0.0; x.len()]),
            weight: bits(&vec![1.0; x.len()]),
            eps,
        };
        row.check(0);
        row.expected().1
    };
    let nan = u64::from(f32::NAN.to_bits());
    assert_eq!(norm(&[0.0, 0.0], 0.0), [nan; 2]);
    assert_eq!(norm(&[0.0, -0.0], 1e-5), bits(&[0.0, 0.0]));
    // The squares overflow.
    assert_eq!(norm(&[1e30, -1.0], 1e-5), bits(&[0.0, -0.0]));
    assert_eq!(norm(&[f32::NEG_INFINITY, -1.0], 1e-5), [nan, bits(&[-0.0])[0]]);
    assert_eq!(norm(&[-f32::NAN, -1.0], 1e-5), [nan; 2]);
}

#[test]
fn the_definition_is_the_root_mean_square_norm() {
    for width in [1, 3, 64, 100, 4096, 5001] {
        let x: Vec<f64> = (0..width).map(|i| ((i * i + 3) as f64).sin() * 3.0).collect();
        let weight: Vec<f64> = (0..width).map(|i| 1.0 + (i as f64).cos() / 2.0).collect();
        let root = (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + f64::from(1e-5f32)).sqrt();
        let narrow = |row: &[f64]| -> Vec<f32> { row.iter().map(|x| *x as f32).collect() };
        let out = rms_norm(&narrow(&x), &narrow(&weight), 1e-5);
        for ((x, w), out) in x.iter().zip(&weight).zip(out) {
            let exact = x / root * w;
            assert!((f64::from(out) - exact).abs() < 1e-6 * (1.0 + exact.abs()), "{out} is not {exact}");
        }
    }
}

#[test]
fn the_floating_point_types_of_models_have_a_kernel() {
    for kernels in Kernels::available() {
        for dtype in DType::ALL {
            assert_eq!(kernels.add_rms_norm(dtype).is_some(), DTYPES.contains(&dtype), "{dtype}");
        }
    }
}
