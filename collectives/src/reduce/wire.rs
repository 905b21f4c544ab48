//! Elements in fewer bits, for their way over a network: see [`Wire`].

use std::marker::PhantomData;

use half::{bf16, f16};
use tensorwire_core::{DType, ReduceOp, Wire};

use super::number::Number;
use super::{Kernel, Kernels};

/// Elements of a block of [`Wire::Q8`].
const BLOCK: usize = 32;

/// Its bytes: the scale, then an element each.
const BLOCK_BYTES: usize = 2 + BLOCK;

/// How the elements of one type go over a network in fewer bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Codec {
    form: Form,
    /// Bytes of a unit.
    pub(crate) unit: usize,
    /// Reduces units.
    pub(crate) kernel: Kernel,
}

/// Conversions to and from one form, of one instruction set.
#[derive(Clone, Copy, Debug)]
struct Form {
    /// Elements that become one unit, and the bytes of that.
    elements: usize,
    unit: usize,
    encode: Convert,
    decode: Convert,
}

/// Of elements to units, or the reverse.
///
/// # Safety
/// The processor has the instruction set of the table that it came from.
type Convert = unsafe fn(&[u8], &mut [u8]);

/// The forms of one instruction set.
#[derive(Debug)]
pub(super) struct Table {
    bf16: Form,
    q8_f32: Form,
    q8_f16: Form,
    q8_bf16: Form,
    sum_q8: Kernel,
    average_q8: Kernel,
}

impl Codec {
    /// `None` where it would save nothing, or isn't defined: for sums and averages it is, of floats of up to 32 bits.
    pub(crate) fn new(wire: Wire, dtype: DType, op: ReduceOp) -> Option<Codec> {
        Codec::of(Kernels::best(), wire, dtype, op)
    }

    /// With the instruction set of `kernels`, which the processor has.
    fn of(kernels: &Kernels, wire: Wire, dtype: DType, op: ReduceOp) -> Option<Codec> {
        let q8 = match op {
            ReduceOp::Sum => kernels.wire.sum_q8,
            ReduceOp::Average => kernels.wire.average_q8,
            _ => return None,
        };
        let (form, kernel) = match (wire, dtype) {
            (Wire::Bf16, DType::F32) => (kernels.wire.bf16, kernels.get(DType::BF16, op)?),
            (Wire::Q8, DType::F32) => (kernels.wire.q8_f32, q8),
            (Wire::Q8, DType::F16) => (kernels.wire.q8_f16, q8),
            (Wire::Q8, DType::BF16) => (kernels.wire.q8_bf16, q8),
            _ => return None,
        };
        Some(Codec { form, unit: form.unit, kernel })
    }

    /// Units that `len` elements become.
    pub(crate) fn units(&self, len: usize) -> usize {
        len.div_ceil(self.form.elements)
    }

    /// Encodes elements, aligned for their type, into as many units as they are.
    pub(crate) fn encode(&self, elements: &[u8], units: &mut [u8]) {
        // SAFETY: the processor has the instruction set of the table that the codec was made from.
        unsafe { (self.form.encode)(elements, units) }
    }

    /// The reverse.
    pub(crate) fn decode(&self, units: &[u8], elements: &mut [u8]) {
        // SAFETY: as above.
        unsafe { (self.form.decode)(units, elements) }
    }
}

/// A form in source, for every instruction set the same.
trait Encoding {
    const ELEMENTS: usize;
    const UNIT: usize;
    fn encode(elements: &[u8], units: &mut [u8]);
    fn decode(units: &[u8], elements: &mut [u8]);
}

/// [`Wire::Bf16`] of f32.
struct Bf16;

impl Encoding for Bf16 {
    const ELEMENTS: usize = 1;
    const UNIT: usize = 2;

    #[inline(always)]
    fn encode(elements: &[u8], units: &mut [u8]) {
        let (elements, units) =
            (bytemuck::cast_slice::<u8, f32>(elements), bytemuck::cast_slice_mut::<u8, bf16>(units));
        for (x, unit) in elements.iter().zip(units) {
            *unit = bf16::narrow(*x);
        }
    }

    #[inline(always)]
    fn decode(units: &[u8], elements: &mut [u8]) {
        let (units, elements) =
            (bytemuck::cast_slice::<u8, bf16>(units), bytemuck::cast_slice_mut::<u8, f32>(elements));
        for (unit, x) in units.iter().zip(elements) {
            *x = unit.widen();
        }
    }
}

/// [`Wire::Q8`] of `T`.
struct Q8<T>(PhantomData<T>);

impl<T: Number<Wide = f32>> Encoding for Q8<T> {
    const ELEMENTS: usize = BLOCK;
    const UNIT: usize = BLOCK_BYTES;

    #[inline(always)]
    fn encode(elements: &[u8], units: &mut [u8]) {
        let elements = bytemuck::cast_slice::<u8, T>(elements);
        for (elements, unit) in elements.chunks(BLOCK).zip(units.as_chunks_mut().0) {
            let mut x = [0f32; BLOCK];
            for (x, element) in x.iter_mut().zip(elements) {
                *x = element.widen();
            }
            encode_block(&x, unit);
        }
    }

    #[inline(always)]
    fn decode(units: &[u8], elements: &mut [u8]) {
        let elements = bytemuck::cast_slice_mut::<u8, T>(elements);
        for (unit, elements) in units.as_chunks().0.iter().zip(elements.chunks_mut(BLOCK)) {
            for (element, x) in elements.iter_mut().zip(decode_block(unit)) {
                *element = T::narrow(x);
            }
        }
    }
}

#[inline(always)]
fn encode_block(x: &[f32; BLOCK], unit: &mut [u8; BLOCK_BYTES]) {
    // The order of magnitudes is that of their bits, with infinity and NaN above all numbers.
    let most = x.iter().fold(0u32, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    let finite = most < 0x7f80_0000;
    // Rounded up, so that no byte is beyond 127.
    let scale = (f32::from_bits(most) / 127.0).to_bits().wrapping_add(0xffff) >> 16;
    let scale = if finite { scale as u16 } else { 0x7fc0 };
    let step = f32::from_bits(u32::from(scale) << 16);
    // A block of zeros, or one that is no numbers, has bytes of zero.
    let step = if finite && step > 0.0 { step } else { f32::INFINITY };
    unit[..2].copy_from_slice(&scale.to_le_bytes());
    for (byte, x) in unit[2..].iter_mut().zip(x) {
        let x = if finite { *x } else { 0.0 };
        // Adding it rounds to a whole number, ties to even, which is what the lowest bits then are.
        *byte = (x / step + 12_582_912.0).to_bits() as u8;
    }
}

#[inline(always)]
fn decode_block(unit: &[u8; BLOCK_BYTES]) -> [f32; BLOCK] {
    let step = f32::from_bits(u32::from(u16::from_le_bytes([unit[0], unit[1]])) << 16);
    std::array::from_fn(|i| f32::from(unit[2 + i] as i8) * step)
}

/// Sums or averages blocks of [`Wire::Q8`].
///
/// # Safety
/// As for [`Kernel`], for elements of [`BLOCK_BYTES`] bytes, aligned to one.
#[inline(always)]
unsafe fn reduce_q8<const AVERAGE: bool>(dst: *mut u8, sources: *const *const u8, n: usize, count: usize) {
    // SAFETY: the caller vouches for `n` pointers, of which there is at least one.
    let sources = unsafe { std::slice::from_raw_parts(sources, n) };
    for i in 0..count {
        // SAFETY: the caller vouches for `count` blocks; whole blocks are read before one is written, so that the
        // destination may be a source.
        let block =
            |source: *const u8| unsafe { decode_block(&source.cast::<[u8; BLOCK_BYTES]>().add(i).read()) };
        let mut sum = block(sources[0]);
        for source in &sources[1..] {
            for (sum, x) in sum.iter_mut().zip(block(*source)) {
                *sum += x;
            }
        }
        if AVERAGE {
            sum.iter_mut().for_each(|x| *x /= n as f32);
        }
        let mut unit = [0; BLOCK_BYTES];
        encode_block(&sum, &mut unit);
        // SAFETY: as above.
        unsafe { dst.cast::<[u8; BLOCK_BYTES]>().add(i).write(unit) }
    }
}

/// Compiles the forms for one instruction set and lists them.
macro_rules! forms {
    ($table:ident, $encode:ident, $decode:ident, $reduce:ident $(, #[$feature:meta])?) => {
        /// # Safety
        /// As for [`Convert`].
        $(#[$feature])?
        unsafe fn $encode<E: Encoding>(elements: &[u8], units: &mut [u8]) {
            E::encode(elements, units);
        }

        /// # Safety
        /// As for [`Convert`].
        $(#[$feature])?
        unsafe fn $decode<E: Encoding>(units: &[u8], elements: &mut [u8]) {
            E::decode(units, elements);
        }

        /// # Safety
        /// As for [`Kernel`], for elements of [`BLOCK_BYTES`] bytes, aligned to one.
        $(#[$feature])?
        unsafe fn $reduce<const AVERAGE: bool>(
            dst: *mut u8,
            sources: *const *const u8,
            n: usize,
            count: usize,
            _factor: f64,
        ) {
            // SAFETY: the caller vouches for the pointers.
            unsafe { reduce_q8::<AVERAGE>(dst, sources, n, count) }
        }

        pub(super) static $table: Table = {
            macro_rules! form {
                ($e:ty) => {
                    Form {
                        elements: <$e>::ELEMENTS,
                        unit: <$e>::UNIT,
                        encode: $encode::<$e>,
                        decode: $decode::<$e>,
                    }
                };
            }
            Table {
                bf16: form!(Bf16),
                q8_f32: form!(Q8<f32>),
                q8_f16: form!(Q8<f16>),
                q8_bf16: form!(Q8<bf16>),
                sum_q8: $reduce::<false>,
                average_q8: $reduce::<true>,
            }
        };
    };
}

forms!(PORTABLE, encode, decode, reduce);
#[cfg(target_arch = "x86_64")]
forms!(AVX2, encode_avx2, decode_avx2, reduce_avx2, #[target_feature(enable = "avx2,f16c")]);
#[cfg(target_arch = "x86_64")]
forms!(
    AVX512,
    encode_avx512,
    decode_avx512,
    reduce_avx512,
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn codec(wire: Wire, dtype: DType) -> Codec {
        Codec::new(wire, dtype, ReduceOp::Sum).unwrap()
    }

    fn round_trip<T: bytemuck::Pod>(codec: &Codec, x: &[T]) -> Vec<T> {
        let mut units = vec![0u64; (codec.units(x.len()) * codec.unit).div_ceil(8)];
        let units = &mut bytemuck::cast_slice_mut(&mut units)[..codec.units(x.len()) * codec.unit];
        codec.encode(bytemuck::cast_slice(x), units);
        let mut out = vec![T::zeroed(); x.len()];
        codec.decode(units, bytemuck::cast_slice_mut(&mut out));
        out
    }

    /// What all ranks get, by the definition.
    fn all_reduce(codec: &Codec, ranks: &[Vec<f32>]) -> Vec<f32> {
        let (len, bytes) = (ranks[0].len(), codec.units(ranks[0].len()) * codec.unit);
        let encode = |x: &Vec<f32>| {
            let mut units = vec![0u64; bytes.div_ceil(8)];
            codec.encode(bytemuck::cast_slice(x), &mut bytemuck::cast_slice_mut(&mut units)[..bytes]);
            units
        };
        let encoded: Vec<Vec<u64>> = ranks.iter().map(encode).collect();
        let sources: Vec<*const u8> = encoded.iter().map(|e| e.as_ptr().cast()).collect();
        let mut sum = vec![0u64; bytes.div_ceil(8)];
        // SAFETY: (1) every source has `units` units; (2) so has the destination, which is none of them; (3) the kernel
        // is one for this processor.
        unsafe {
            (codec.kernel)(sum.as_mut_ptr().cast(), sources.as_ptr(), sources.len(), codec.units(len), 1.0);
        }
        let mut out = vec![0f32; len];
        codec.decode(&bytemuck::cast_slice(&sum)[..bytes], bytemuck::cast_slice_mut(&mut out));
        out
    }

    /// Every instruction set's conversions and sums give the portable ones' bits.
    fn same_everywhere(x: &[f32]) {
        for (wire, dtype) in [
            (Wire::Bf16, DType::F32),
            (Wire::Q8, DType::F32),
            (Wire::Q8, DType::F16),
            (Wire::Q8, DType::BF16),
        ] {
            for op in [ReduceOp::Sum, ReduceOp::Average] {
                let all = Kernels::available().into_iter().map(|kernels| {
                    let codec = Codec::of(kernels, wire, dtype, op).unwrap();
                    // What is no f32 is its bits, as twice as many elements.
                    let elements: &[u8] = bytemuck::cast_slice(x);
                    let bytes = codec.units(elements.len() / dtype.size()) * codec.unit;
                    let (mut units, mut sum) = (vec![0u64; bytes.div_ceil(8)], vec![0u64; bytes.div_ceil(8)]);
                    codec.encode(elements, &mut bytemuck::cast_slice_mut(&mut units)[..bytes]);
                    let source = units.as_ptr().cast();
                    // SAFETY: (1) each source has so many units; (2) so has the destination, which is none of them;
                    // (3) the table is available.
                    unsafe {
                        let sources = [source, source, source];
                        (codec.kernel)(sum.as_mut_ptr().cast(), sources.as_ptr(), 3, bytes / codec.unit, 1.0);
                    }
                    let mut out = vec![0f32; x.len()];
                    codec.decode(&bytemuck::cast_slice(&sum)[..bytes], bytemuck::cast_slice_mut(&mut out));
                    let out: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                    (kernels.name(), (units, sum, out))
                });
                let all: Vec<_> = all.collect();
                for (name, bits) in &all {
                    assert!(*bits == all[0].1, "{name} {wire} {dtype} {op}");
                }
            }
        }
    }

    /// Numbers of magnitudes that differ a lot, or not.
    fn numbers(len: usize) -> impl Strategy<Value = Vec<f32>> {
        let number = prop_oneof![
            4 => -2f32..2.0,
            1 => Just(0.0),
            2 => (any::<bool>(), -100i32..100, 1f32..2.0)
                .prop_map(|(sign, e, m)| m * 2f32.powi(e) * if sign { -1.0 } else { 1.0 }),
        ];
        proptest::collection::vec(number, len)
    }

    proptest! {
        #[test]
        fn results_are_within_the_documented_bounds(
            ranks in (1usize..150).prop_flat_map(|len| proptest::collection::vec(numbers(len), 1..6)),
        ) {
            let (n, len) = (ranks.len(), ranks[0].len());
            let exact = |i: usize| ranks.iter().map(|x| f64::from(x[i])).sum::<f64>();
            let magnitudes = |i: usize| ranks.iter().map(|x| f64::from(x[i].abs())).sum::<f64>();
            let f32s = |i: usize| magnitudes(i) * 1.02 * n as f64 * 2f64.powi(-24);
            let got = all_reduce(&codec(Wire::Bf16, DType::F32), &ranks);
            for (i, got) in got.iter().enumerate() {
                let most = 2f64.powi(-8) * (magnitudes(i) + exact(i).abs()) + f32s(i);
                prop_assert!((f64::from(*got) - exact(i)).abs() <= most, "bf16: {} not {}", got, exact(i));
            }
            let got = all_reduce(&codec(Wire::Q8, DType::F32), &ranks);
            for start in (0..len).step_by(BLOCK) {
                let block = start..(start + BLOCK).min(len);
                let largest = |x: &[f32]| x[block.clone()].iter().fold(0f64, |m, x| m.max(f64::from(x.abs())));
                let each: f64 = ranks.iter().map(|x| largest(x)).sum();
                // Of the sums of what was rounded, which the exact ones and the bound tell at most.
                let sum = block.clone().fold(0f64, |m, i| m.max(exact(i).abs())) + each / 252.0;
                for i in block.clone() {
                    let most = (each + sum) / 252.0 + f32s(i) + each * 1e-6;
                    prop_assert!((f64::from(got[i]) - exact(i)).abs() <= most, "q8: {} not {}", got[i], exact(i));
                }
            }
        }

        #[test]
        fn every_instruction_set_gives_the_same_bits(
            numbers in (1usize..150).prop_flat_map(numbers),
            bits in proptest::collection::vec(any::<u32>(), 1..150),
        ) {
            same_everywhere(&numbers);
            same_everywhere(&bits.into_iter().map(f32::from_bits).collect::<Vec<_>>());
        }

        #[test]
        fn what_was_rounded_once_stays(x in (1usize..100).prop_flat_map(numbers)) {
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let codec = codec(Wire::Bf16, DType::F32);
            let once = round_trip(&codec, &x);
            prop_assert_eq!(bits(&round_trip(&codec, &once)), bits(&once));
        }

        #[test]
        fn halves_are_sent_as_the_floats_that_they_are(x in (1usize..100).prop_flat_map(numbers)) {
            let bf: Vec<bf16> = x.iter().map(|x| bf16::narrow(*x)).collect();
            let wide: Vec<f32> = bf.iter().map(|x| Number::widen(*x)).collect();
            let right: Vec<bf16> = round_trip(&codec(Wire::Q8, DType::F32), &wide).iter().map(|x| bf16::narrow(*x)).collect();
            prop_assert_eq!(round_trip(&codec(Wire::Q8, DType::BF16), &bf), right);
        }
    }

    #[test]
    fn a_block_is_laid_out_as_documented() {
        let mut x = [0f32; 33];
        (x[0], x[1], x[2], x[32]) = (127.0, -127.0, 0.4, 2.0 * 127.0);
        let codec = codec(Wire::Q8, DType::F32);
        let mut units = [0u8; 68];
        codec.encode(bytemuck::cast_slice(&x), &mut units);
        let mut expected = [0u8; 68];
        // A scale of 1 is 0x3f80, of 2 is 0x4000, in bfloat16.
        expected[..5].copy_from_slice(&[0x80, 0x3f, 127, -127i8 as u8, 0]);
        expected[34..37].copy_from_slice(&[0x00, 0x40, 127]);
        assert_eq!(units, expected);
    }

    #[test]
    fn extremes_come_out_as_documented() {
        let codec = codec(Wire::Q8, DType::F32);
        for spoiler in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1f32; 64];
            x[40] = spoiler;
            let out = round_trip(&codec, &x);
            assert!(out[..32].iter().all(|x| (x - 1.0).abs() < 1.0 / 252.0));
            assert!(out[32..].iter().all(|x| x.to_bits() == 0x7fc0_0000), "{out:?}");
        }
        let zeros = round_trip(&codec, &[0f32, -0.0, 0.0]);
        assert!(zeros.iter().all(|x| *x == 0.0));
        for big in [1e38f32, 3.3e38, 2f32.powi(-120), 1e-30] {
            let out = round_trip(&codec, &[big, -big, big / 3.0]);
            for (got, right) in out.iter().zip([big, -big, big / 3.0]) {
                assert!(((got - right) / big).abs() <= 1.0 / 252.0, "{got} not {right}");
            }
        }
        // The smallest have steps as coarse as bfloat16's.
        let out = round_trip(&codec, &[1e-45f32, 1e-40]);
        assert!(out.iter().zip([1e-45f32, 1e-40]).all(|(got, right)| (got - right).abs() <= 2f32.powi(-133)));
    }

    #[test]
    fn what_saves_nothing_or_has_no_sum_has_no_codec() {
        for (wire, dtype, op) in [
            (Wire::Bf16, DType::BF16, ReduceOp::Sum),
            (Wire::Bf16, DType::F16, ReduceOp::Sum),
            (Wire::Q8, DType::F64, ReduceOp::Sum),
            (Wire::Q8, DType::I8, ReduceOp::Sum),
            (Wire::Q8, DType::F32, ReduceOp::Max),
            (Wire::Bf16, DType::F32, ReduceOp::PreScaledSum(2.0)),
        ] {
            assert!(Codec::new(wire, dtype, op).is_none(), "{wire} {dtype} {op}");
        }
    }
}
