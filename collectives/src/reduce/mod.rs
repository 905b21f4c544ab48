//! Reduction kernels: corresponding elements of several buffers become one, in order.
//!
//! There is one kernel in source form, written so that the compiler vectorises it, compiled once for each
//! instruction set; the table for this processor is chosen at first use. As every instruction set runs the
//! same operations in the same order, without fused multiply-add, all give the same bits.
//!
//! f16 and bf16 are accumulated in f32 and rounded once, to nearest even. Subnormals are kept. Any NaN result
//! is the positive quiet NaN without payload, for which operand a processor's NaN comes from is not specified.

mod float;
mod kernel;

use std::sync::OnceLock;

use tensorwire_core::{DType, ReduceOp};

/// Reduces `count` elements of `sources` buffers into `dst`: `dst[i] = sources[0][i] ∘ sources[1][i] ∘ ...`.
///
/// # Safety
/// 1. `sources` points to `n >= 1` pointers, each valid for reading `count` elements, aligned for the type.
/// 2. `dst` is valid for writing `count` elements and aligned; it may be one of the sources, but must not
///    overlap any in another way.
/// 3. The processor has the instruction set of the table that the kernel came from.
pub type Kernel = unsafe fn(dst: *mut u8, sources: *const *const u8, n: usize, count: usize);

/// The kernels of one instruction set.
#[derive(Debug)]
pub struct Kernels {
    name: &'static str,
    table: [[Kernel; ReduceOp::ALL.len()]; DType::ALL.len()],
}

impl Kernels {
    /// The fastest that this processor runs.
    pub fn best() -> &'static Kernels {
        static BEST: OnceLock<&'static Kernels> = OnceLock::new();
        BEST.get_or_init(|| Kernels::available().last().copied().unwrap_or(&kernel::PORTABLE))
    }

    /// All that this processor runs, the fastest last.
    pub fn available() -> Vec<&'static Kernels> {
        let mut all = vec![&kernel::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                all.push(&kernel::AVX2);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                all.push(&kernel::AVX512);
            }
        }
        all
    }

    /// The instruction set: `portable`, `avx2` or `avx512`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The kernel for one type and operation.
    #[inline]
    pub fn get(&self, dtype: DType, op: ReduceOp) -> Kernel {
        self.table[dtype as usize - 1][op as usize - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use proptest::prelude::*;

    /// One element at a time, by the definition, with the half crate's conversions.
    fn reference(dtype: DType, op: ReduceOp, xs: &[u32]) -> u32 {
        let widen = |x: u32| match dtype {
            DType::F32 => f32::from_bits(x),
            DType::F16 => f16::from_bits(x as u16).to_f32(),
            DType::BF16 => bf16::from_bits(x as u16).to_f32(),
        };
        let pick = |a: f32, b: f32, smaller: bool| {
            if a.is_nan() || b.is_nan() {
                f32::NAN
            } else if a == b {
                if a.is_sign_negative() == smaller { a } else { b }
            } else if (a < b) == smaller {
                a
            } else {
                b
            }
        };
        let combine = |a: f32, b: f32| match op {
            ReduceOp::Sum => a + b,
            ReduceOp::Product => a * b,
            ReduceOp::Min => pick(a, b, true),
            ReduceOp::Max => pick(a, b, false),
        };
        let r = xs[1..].iter().fold(widen(xs[0]), |acc, x| combine(acc, widen(*x)));
        match dtype {
            DType::F32 if r.is_nan() => 0x7fc0_0000,
            DType::F32 => r.to_bits(),
            DType::F16 if r.is_nan() => 0x7e00,
            DType::F16 => u32::from(f16::from_f32(r).to_bits()),
            DType::BF16 if r.is_nan() => 0x7fc0,
            DType::BF16 => u32::from(bf16::from_f32(r).to_bits()),
        }
    }

    /// Runs a kernel over rows of bit patterns, into a buffer of its own or in place of source `place`.
    fn run(
        kernels: &Kernels,
        dtype: DType,
        op: ReduceOp,
        rows: &[Vec<u32>],
        place: Option<usize>,
    ) -> Vec<u32> {
        let count = rows[0].len();
        let mut buffers: Vec<Vec<u32>> = rows
            .iter()
            .map(|row| match dtype.size() {
                4 => row.clone(),
                _ => {
                    row.chunks(2).map(|c| u32::from(c[0] as u16) | c.get(1).map_or(0, |h| h << 16)).collect()
                }
            })
            .collect();
        let mut out = vec![0u32; buffers[0].len()];
        let dst = match place {
            Some(i) => buffers[i].as_mut_ptr(),
            None => out.as_mut_ptr(),
        };
        let sources: Vec<*const u8> = buffers.iter().map(|b| b.as_ptr().cast()).collect();
        // SAFETY: (1) every buffer has `count` elements, aligned to 4; (2) `dst` is separate or a source
        // itself; (3) `available` listed the table.
        unsafe { kernels.get(dtype, op)(dst.cast(), sources.as_ptr(), sources.len(), count) };
        let result = place.map_or(&out, |i| &buffers[i]);
        (0..count)
            .map(|i| match dtype.size() {
                4 => result[i],
                _ => (result[i / 2] >> (16 * (i % 2))) & 0xffff,
            })
            .collect()
    }

    /// Bit patterns with the awkward values over-represented.
    fn pattern(dtype: DType) -> impl Strategy<Value = u32> {
        let special: Vec<u32> = match dtype {
            DType::F32 => vec![
                0,
                0x8000_0000,
                1,
                0x8000_0001,
                0x007f_ffff,
                0x0080_0000,
                0x7f7f_ffff,
                0xff7f_ffff,
                0x7f80_0000,
                0xff80_0000,
                0x7fc0_0000,
                0xffc0_1234,
                0x7f80_0001,
                0x3f80_0000,
                0x3380_0000,
                0x3f80_0001,
            ],
            DType::F16 => vec![
                0, 0x8000, 1, 0x8001, 0x03ff, 0x0400, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00, 0xfe12, 0x7c01,
                0x3c00, 0x1000, 0x3c01,
            ],
            DType::BF16 => vec![
                0, 0x8000, 1, 0x8001, 0x007f, 0x0080, 0x7f7f, 0xff7f, 0x7f80, 0xff80, 0x7fc0, 0xffc1, 0x7f81,
                0x3f80, 0x3380, 0x3f81,
            ],
        };
        let mask = if dtype.size() == 4 { u32::MAX } else { 0xffff };
        prop_oneof![2 => any::<u32>().prop_map(move |x| x & mask), 1 => proptest::sample::select(special)]
    }

    fn rows(dtype: DType) -> impl Strategy<Value = Vec<Vec<u32>>> {
        (1usize..6, 0usize..200).prop_flat_map(move |(n, len)| {
            proptest::collection::vec(proptest::collection::vec(pattern(dtype), len..=len), n..=n)
        })
    }

    fn check(dtype: DType, rows: &[Vec<u32>], place: usize) {
        for op in ReduceOp::ALL {
            let expected: Vec<u32> = (0..rows[0].len())
                .map(|i| reference(dtype, op, &rows.iter().map(|r| r[i]).collect::<Vec<_>>()))
                .collect();
            for kernels in Kernels::available() {
                assert_eq!(run(kernels, dtype, op, rows, None), expected, "{} {dtype} {op}", kernels.name());
                let in_place = run(kernels, dtype, op, rows, Some(place % rows.len()));
                assert_eq!(in_place, expected, "{} {dtype} {op} in place", kernels.name());
            }
        }
    }

    proptest! {
        #[test]
        fn f32_is_bitwise_the_definition(rows in rows(DType::F32), place in 0usize..6) {
            check(DType::F32, &rows, place);
        }

        #[test]
        fn f16_is_bitwise_the_definition(rows in rows(DType::F16), place in 0usize..6) {
            check(DType::F16, &rows, place);
        }

        #[test]
        fn bf16_is_bitwise_the_definition(rows in rows(DType::BF16), place in 0usize..6) {
            check(DType::BF16, &rows, place);
        }
    }

    #[test]
    fn every_16_bit_value_keeps_its_bits() {
        for dtype in [DType::F16, DType::BF16] {
            let row: Vec<u32> = (0..=0xffff).collect();
            check(dtype, &[row], 0);
        }
    }
}
