//! Every kernel of every instruction set against the definition, bit for bit.

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

/// The value of a floating-point element, exactly.
pub(super) fn value(dtype: DType, x: u64) -> f64 {
    match dtype {
        DType::F64 => f64::from_bits(x),
        DType::F32 => f64::from(f32::from_bits(x as u32)),
        DType::F16 => f16::from_bits(x as u16).to_f64(),
        DType::BF16 => bf16::from_bits(x as u16).to_f64(),
        DType::F8E4M3 => small(x, 4, 3, false),
        DType::F8E5M2 => small(x, 5, 2, true),
        _ => unreachable!("{dtype} is no floating-point type"),
    }
}

/// A small format by its definition: sign, exponent, mantissa.
fn small(x: u64, exponent: i32, mantissa: i32, infinity: bool) -> f64 {
    let sign = if x >> (exponent + mantissa) & 1 == 1 { -1.0 } else { 1.0 };
    let e = (x >> mantissa & ((1 << exponent) - 1)) as i32;
    let m = (x & ((1 << mantissa) - 1)) as f64 / f64::from(1 << mantissa);
    let bias = (1 << (exponent - 1)) - 1;
    let top = (1 << exponent) - 1;
    match (e, m) {
        (0, m) => sign * m * 2f64.powi(1 - bias),
        (e, m) if e == top && infinity => {
            if m == 0.0 {
                sign * f64::INFINITY
            } else {
                f64::NAN
            }
        }
        (e, _) if e == top && x & ((1 << mantissa) - 1) == (1 << mantissa) - 1 => f64::NAN,
        (e, m) => sign * (1.0 + m) * 2f64.powi(e - bias),
    }
}

/// The bits of the number of the format nearest to `r`, ties to even, found by looking at all of them.
fn nearest_small(dtype: DType, r: f32) -> u64 {
    let (nan, largest, next) = match dtype {
        DType::F8E4M3 => (0x7f, 0x7e, 480.0),
        _ => (0x7e, 0x7b, 65536.0),
    };
    if r.is_nan() {
        return nan;
    }
    let x = f64::from(r).abs();
    let sign = if r.is_sign_negative() { 0x80 } else { 0 };
    // What would come after the largest number, were there one, is the infinity, or NaN where there is none.
    let candidates = (0..=largest).map(|b| (b, value(dtype, b))).chain([(largest + 1, next)]);
    // Beyond it, distances would be too close to tell apart.
    let x = x.min(next);
    let distance = |v: f64| (v - x).abs();
    let best =
        candidates.min_by(|a, b| distance(a.1).total_cmp(&distance(b.1)).then((a.0 & 1).cmp(&(b.0 & 1))));
    match best.unwrap().0 {
        beyond if beyond > largest && dtype == DType::F8E4M3 => nan,
        beyond if beyond > largest => 0x7c | sign,
        b => b | sign,
    }
}

/// One element, by the definition.
pub(super) fn reference(dtype: DType, op: ReduceOp, xs: &[u64]) -> u64 {
    if dtype.is_integer() {
        return integer(dtype, op, xs);
    }
    if dtype == DType::F64 {
        return round64(fold(
            op,
            xs.iter().map(|x| f64::from_bits(*x)),
            f64::NAN,
            |a, b| a + b,
            |a, b| a * b,
        ));
    }
    round(dtype, fold(op, xs.iter().map(|x| value(dtype, *x) as f32), f32::NAN, |a, b| a + b, |a, b| a * b))
}

/// The bits of an f64, with one NaN for all.
pub(super) fn round64(r: f64) -> u64 {
    if r.is_nan() { 0x7ff8_0000_0000_0000 } else { r.to_bits() }
}

/// The bits of what an f32 is rounded to.
pub(super) fn round(dtype: DType, r: f32) -> u64 {
    match dtype {
        DType::F32 if r.is_nan() => 0x7fc0_0000,
        DType::F32 => u64::from(r.to_bits()),
        DType::F16 if r.is_nan() => 0x7e00,
        DType::F16 => u64::from(f16::from_f32(r).to_bits()),
        DType::BF16 if r.is_nan() => 0x7fc0,
        DType::BF16 => u64::from(bf16::from_f32(r).to_bits()),
        _ => nearest_small(dtype, r),
    }
}

trait Real: Copy + PartialOrd + From<f32> + std::ops::Div<Output = Self> {
    fn negative(self) -> bool;
    fn scaled(self, factor: f64) -> Self;
}

impl Real for f32 {
    fn negative(self) -> bool {
        self.is_sign_negative()
    }
    fn scaled(self, factor: f64) -> f32 {
        self * factor as f32
    }
}

impl Real for f64 {
    fn negative(self) -> bool {
        self.is_sign_negative()
    }
    fn scaled(self, factor: f64) -> f64 {
        self * factor
    }
}

fn fold<F: Real>(
    op: ReduceOp,
    xs: impl ExactSizeIterator<Item = F>,
    nan: F,
    add: fn(F, F) -> F,
    mul: fn(F, F) -> F,
) -> F {
    let n = xs.len() as f32;
    let pick = |a: F, b: F, smaller: bool| match a.partial_cmp(&b) {
        None => nan,
        Some(std::cmp::Ordering::Equal) if a.negative() == smaller => a,
        Some(std::cmp::Ordering::Less) if smaller => a,
        Some(std::cmp::Ordering::Greater) if !smaller => a,
        Some(_) => b,
    };
    let combine = |a, b| match op {
        ReduceOp::Product => mul(a, b),
        ReduceOp::Min => pick(a, b, true),
        ReduceOp::Max => pick(a, b, false),
        _ => add(a, b),
    };
    let r = xs.map(|x| x.scaled(op.factor())).reduce(combine).unwrap();
    if op == ReduceOp::Average { r / F::from(n) } else { r }
}

fn integer(dtype: DType, op: ReduceOp, xs: &[u64]) -> u64 {
    let bits = dtype.size() * 8;
    let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    let signed = matches!(dtype, DType::I8 | DType::I32 | DType::I64);
    // Order as numbers: a signed one's sign bit flipped orders like an unsigned one.
    let key = |x: u64| if signed { x ^ (1 << (bits - 1)) } else { x };
    let combine = |a: u64, b: u64| match op {
        ReduceOp::Sum => a.wrapping_add(b) & mask,
        ReduceOp::Product => a.wrapping_mul(b) & mask,
        ReduceOp::Min => std::cmp::min_by_key(a, b, |x| key(*x)),
        ReduceOp::Max => std::cmp::max_by_key(a, b, |x| key(*x)),
        ReduceOp::BitAnd => a & b,
        ReduceOp::BitOr => a | b,
        ReduceOp::BitXor => a ^ b,
        ReduceOp::Average | ReduceOp::PreScaledSum(_) => unreachable!("{op} of integers"),
    };
    xs.iter().copied().reduce(combine).unwrap()
}

/// Runs a kernel over rows of bit patterns, into a buffer of its own or in place of source `place`.
fn run(kernel: Kernel, dtype: DType, factor: f64, rows: &[Vec<u64>], place: Option<usize>) -> Vec<u64> {
    let (count, size) = (rows[0].len(), dtype.size());
    let mut buffers: Vec<Vec<u64>> = rows.iter().map(|row| pack(dtype, row)).collect();
    let mut out = vec![0u64; (count * size).div_ceil(8)];
    let dst = place.map_or(out.as_mut_ptr(), |i| buffers[i].as_mut_ptr());
    let sources: Vec<*const u8> = (0..buffers.len())
        .map(|i| if Some(i) == place { dst.cast_const().cast() } else { buffers[i].as_ptr().cast() })
        .collect();
    // SAFETY: (1) every buffer has `count` elements, aligned to 8; (2) `dst` is separate or a source itself;
    // (3) `available` listed the table.
    unsafe { kernel(dst.cast(), sources.as_ptr(), sources.len(), count, factor) };
    unpack(dtype, place.map_or(&out, |i| &buffers[i]), count)
}

/// Elements one after the other, in words and so aligned for every type.
pub(super) fn pack(dtype: DType, row: &[u64]) -> Vec<u64> {
    let size = dtype.size();
    let mut words = vec![0u64; (row.len() * size).div_ceil(8)];
    for (to, x) in bytemuck::cast_slice_mut::<u64, u8>(&mut words).chunks_mut(size).zip(row) {
        to.copy_from_slice(&x.to_le_bytes()[..size]);
    }
    words
}

/// The bits of `count` elements.
pub(super) fn unpack(dtype: DType, words: &[u64], count: usize) -> Vec<u64> {
    let elements = bytemuck::cast_slice::<u64, u8>(words).chunks(dtype.size()).take(count);
    let bits = |x: &[u8]| {
        let mut word = [0; 8];
        word[..x.len()].copy_from_slice(x);
        u64::from_le_bytes(word)
    };
    elements.map(bits).collect()
}

fn check(dtype: DType, factor: f64, rows: &[Vec<u64>], place: usize) {
    for op in ReduceOp::ALL.into_iter().filter(|op| op.supports(dtype)) {
        let op = ReduceOp::from_code(op.code(), factor).unwrap();
        let expected: Vec<u64> = (0..rows[0].len())
            .map(|i| reference(dtype, op, &rows.iter().map(|r| r[i]).collect::<Vec<_>>()))
            .collect();
        for kernels in Kernels::available() {
            let kernel = kernels.get(dtype, op).unwrap();
            let what = format!("{} {dtype} {op}", kernels.name());
            assert_eq!(run(kernel, dtype, op.factor(), rows, None), expected, "{what}");
            let place = Some(place % rows.len());
            assert_eq!(run(kernel, dtype, op.factor(), rows, place), expected, "{what} in place");
        }
    }
}

/// Bit patterns with the awkward values over-represented.
pub(super) fn pattern(dtype: DType) -> BoxedStrategy<u64> {
    let mask = if dtype.size() == 8 { u64::MAX } else { (1 << (dtype.size() * 8)) - 1 };
    let any = any::<u64>().prop_map(move |x| x & mask);
    // Exponent and mantissa bits; zero, subnormals, the smallest and largest numbers, infinity, NaNs, one.
    let special = |exponent: u32, mantissa: u32| -> Vec<u64> {
        let sign = 1u64 << (exponent + mantissa);
        let top = ((1u64 << exponent) - 1) << mantissa;
        let one = ((1u64 << (exponent - 1)) - 1) << mantissa;
        let least = 1u64 << mantissa;
        let all = [
            0,
            1,
            least - 1,
            least,
            least + 1,
            top - 1,
            top,
            top | 1,
            top | least >> 1,
            one,
            one + 1,
            one - 1,
        ];
        all.iter().flat_map(|x| [*x, *x | sign]).collect()
    };
    let special = match dtype {
        DType::F64 => special(11, 52),
        DType::F32 => special(8, 23),
        DType::F16 => special(5, 10),
        DType::BF16 => special(8, 7),
        DType::F8E4M3 => special(4, 3),
        DType::F8E5M2 => special(5, 2),
        _ => vec![0, 1, mask, mask >> 1, (mask >> 1) + 1],
    };
    prop_oneof![2 => any, 1 => proptest::sample::select(special)].boxed()
}

fn rows(dtype: DType) -> impl Strategy<Value = Vec<Vec<u64>>> {
    (1usize..6, 0usize..200).prop_flat_map(move |(n, len)| {
        proptest::collection::vec(proptest::collection::vec(pattern(dtype), len..=len), n..=n)
    })
}

fn case() -> impl Strategy<Value = (DType, Vec<Vec<u64>>)> {
    proptest::sample::select(&DType::ALL[..]).prop_flat_map(|dtype| (Just(dtype), rows(dtype)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn every_kernel_is_bitwise_the_definition(
        (dtype, rows) in case(),
        place in 0usize..6,
        factor in prop_oneof![Just(0.5), Just(-3.7), Just(1e-30), any::<f64>()],
    ) {
        check(dtype, factor, &rows, place);
    }
}

#[cfg(feature = "tcp")]
#[test]
fn a_sum_that_is_divided_is_the_average() {
    for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_integer()) {
        // Of one source, the sum is itself.
        let row: Vec<u64> = (0..4096)
            .map(|i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - 8 * dtype.size()))
            .collect();
        for n in [1, 3, 7, 8] {
            let right: Vec<u64> = row.iter().map(|x| quotient(dtype, *x, n)).collect();
            for kernels in Kernels::available() {
                let kernel = kernels.divide[dtype as usize - 1];
                assert_eq!(
                    run(kernel, dtype, n as f64, std::slice::from_ref(&row), Some(0)),
                    right,
                    "{} {dtype}",
                    kernels.name()
                );
            }
            let mut buffer = pack(dtype, &row);
            divide(dtype, &mut bytemuck::cast_slice_mut(&mut buffer)[..row.len() * dtype.size()], n);
            assert_eq!(unpack(dtype, &buffer, row.len()), right, "{dtype}");
        }
    }
}

/// An element divided by `n`, by the definition.
#[cfg(feature = "tcp")]
fn quotient(dtype: DType, x: u64, n: usize) -> u64 {
    match dtype {
        DType::F64 => round64(f64::from_bits(x) / n as f64),
        _ => round(dtype, value(dtype, x) as f32 / n as f32),
    }
}

#[test]
fn every_narrow_value_survives_a_round_trip() {
    for dtype in [DType::F16, DType::BF16, DType::F8E4M3, DType::F8E5M2] {
        let row: Vec<u64> = (0..1 << (dtype.size() * 8)).collect();
        check(dtype, 1.0, &[row], 0);
    }
}

#[test]
fn every_pair_of_8_bit_values() {
    for dtype in [DType::F8E4M3, DType::F8E5M2, DType::I8, DType::U8] {
        let (a, b) = (0..65536).map(|i| (i >> 8, i & 255)).unzip();
        check(dtype, 0.5, &[a, b], 0);
    }
}

#[test]
fn the_small_formats_agree_with_the_float8_crate() {
    for bits in 0..=255u8 {
        for (ours, theirs) in [
            (value(DType::F8E4M3, u64::from(bits)), F8E4M3::from_bits(bits).to_f64()),
            (value(DType::F8E5M2, u64::from(bits)), F8E5M2::from_bits(bits).to_f64()),
        ] {
            assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{bits:#x}: {ours} {theirs}");
        }
    }
}

#[test]
fn the_table_holds_what_the_operations_support() {
    for kernels in Kernels::available() {
        for dtype in DType::ALL {
            for op in ReduceOp::ALL {
                assert_eq!(kernels.get(dtype, op).is_some(), op.supports(dtype), "{dtype} {op}");
            }
        }
    }
}
