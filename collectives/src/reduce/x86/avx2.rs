//! Conversions with AVX2 and F16C.
//!
//! A block is eight registers of f32.

use std::arch::x86_64::*;

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

use super::super::convert::{BLOCK, Convert, interleaved};
use super::{Avx2, convert};

convert!(Avx2, f16, [__m128i; 8], [__m256; 8], widen_f16, narrow_f16, interleaved(1, 1));
convert!(Avx2, bf16, [__m256i; 4], [__m256; 8], widen_bf16, narrow_bf16, interleaved(2, 8));
convert!(Avx2, F8E4M3, [__m128i; 4], [__m256; 8], widen_e4m3, narrow_e4m3, interleaved(1, 1));
convert!(Avx2, F8E5M2, [__m128i; 4], [__m256; 8], widen_e5m2, narrow_e5m2, interleaved(1, 1));

/// `x`, with `nan` in the place of NaNs.
#[target_feature(enable = "avx2")]
#[inline]
fn replace_nan(x: __m256, nan: f32) -> __m256 {
    _mm256_blendv_ps(x, _mm256_set1_ps(nan), _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn widen_f16(x: [__m128i; 8]) -> [__m256; 8] {
    let mut wide = [_mm256_setzero_ps(); 8];
    for (wide, x) in wide.iter_mut().zip(x) {
        *wide = _mm256_cvtph_ps(x);
    }
    wide
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn narrow_f16(x: [__m256; 8]) -> [__m128i; 8] {
    let mut narrow = [_mm_setzero_si128(); 8];
    for (narrow, x) in narrow.iter_mut().zip(x) {
        *narrow = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(replace_nan(x, f32::NAN));
    }
    narrow
}

/// Even elements, then odd ones.
#[target_feature(enable = "avx2")]
#[inline]
fn widen_bf16(x: [__m256i; 4]) -> [__m256; 8] {
    let even = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
    let odd = |x| _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
    let [a, b, c, d] = x;
    [even(a), odd(a), even(b), odd(b), even(c), odd(c), even(d), odd(d)]
}

#[target_feature(enable = "avx2")]
#[inline]
fn narrow_bf16(x: [__m256; 8]) -> [__m256i; 4] {
    // The upper half is what rounding leaves, as in the portable conversion.
    let round = |x| {
        let bits = _mm256_castps_si256(replace_nan(x, f32::NAN));
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd)
    };
    let pair =
        |even, odd| _mm256_blend_epi16::<0b1010_1010>(_mm256_srli_epi32::<16>(round(even)), round(odd));
    let [a, b, c, d, e, f, g, h] = x;
    [pair(a, b), pair(c, d), pair(e, f), pair(g, h)]
}

/// Both halves of 16 f16s.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn widen_halves(x: __m256i) -> [__m256; 2] {
    [_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(x))]
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn widen_e4m3(x: [__m128i; 4]) -> [__m256; 8] {
    let mut wide = [[_mm256_setzero_ps(); 2]; 4];
    for (wide, x) in wide.iter_mut().zip(x) {
        let x = _mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(x));
        // With its exponent and mantissa one place lower it is 256th of it as an f16, which has the same subnormals then.
        let half = _mm256_and_si256(_mm256_srai_epi16::<1>(x), _mm256_set1_epi16(0xbfff_u16 as i16));
        let ones = _mm256_set1_epi16(0x3f80);
        let nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, ones), ones);
        let half = _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7c00)));
        let [a, b] = widen_halves(half);
        let scale = _mm256_set1_ps(256.0);
        *wide = [_mm256_mul_ps(a, scale), _mm256_mul_ps(b, scale)];
    }
    bytemuck::cast(wide)
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn widen_e5m2(x: [__m128i; 4]) -> [__m256; 8] {
    let mut wide = [[_mm256_setzero_ps(); 2]; 4];
    for (wide, x) in wide.iter_mut().zip(x) {
        // It is an f16's upper byte.
        *wide = widen_halves(_mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(x)));
    }
    bytemuck::cast(wide)
}

#[target_feature(enable = "avx2")]
#[inline]
fn narrow_e4m3(x: [__m256; 8]) -> [__m128i; 4] {
    // 480, which the format lacks, would have the bits that are NaN. 464, in the middle between it and the largest number,
    // goes to the latter, which is even; what is above goes to 480. Where one is NaN, the minimum is the second.
    let limit = |x| _mm256_min_ps(x, _mm256_set1_ps(480.0));
    narrow_small::<20, 0x7e>(x, limit, 1.0 / 64.0)
}

#[target_feature(enable = "avx2")]
#[inline]
fn narrow_e5m2(x: [__m256; 8]) -> [__m128i; 4] {
    // 65536 would have the bits that are infinity, and half as much again the NaN's.
    let limit = |x| replace_nan(_mm256_min_ps(_mm256_set1_ps(65536.0), x), 98304.0);
    narrow_small::<21, 0x7c>(x, limit, 1.0 / 16384.0)
}

/// Narrows to the 8-bit format that has `CUT` bits of mantissa less than f32, whose largest magnitude with a sign is `LARGEST`
/// and whose least normal number is `least`. `limit` makes of a magnitude one of which the format has, or would have, the
/// bits.
#[target_feature(enable = "avx2")]
#[inline]
fn narrow_small<const CUT: i32, const LARGEST: i8>(
    x: [__m256; 8],
    limit: impl Fn(__m256) -> __m256,
    least: f32,
) -> [__m128i; 4] {
    let least = least.to_bits() as i32;
    let magnitude = |x| {
        let magnitude = limit(_mm256_andnot_ps(_mm256_set1_ps(-0.0), x));
        // The power of two that its mantissa counts from; that of subnormals is the least normal number's.
        let power = _mm256_and_si256(_mm256_castps_si256(magnitude), _mm256_set1_epi32(0x7f80_0000));
        let power = _mm256_max_epi32(power, _mm256_set1_epi32(least));
        // Adding a number whose last place is the last that the format has rounds to that. The lowest bits of the sum
        // count the places; to them comes the exponent, and what is too much of it is taken off below.
        let place = _mm256_add_epi32(power, _mm256_set1_epi32(CUT << 23));
        let sum = _mm256_castps_si256(_mm256_add_ps(magnitude, _mm256_castsi256_ps(place)));
        let bits = _mm256_add_epi32(sum, _mm256_srli_epi32::<CUT>(power));
        _mm256_and_si256(bits, _mm256_set1_epi32(0xff))
    };
    // Packing keeps to the halves of registers, so that groups of four elements are to be put in order.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let pack = |a, b, c, d| {
        let magnitudes = _mm256_packus_epi16(
            _mm256_packus_epi32(magnitude(a), magnitude(b)),
            _mm256_packus_epi32(magnitude(c), magnitude(d)),
        );
        let magnitudes = _mm256_sub_epi8(magnitudes, _mm256_set1_epi8((least >> CUT) as i8));
        // Integers that are too large keep their sign.
        let signs = _mm256_packs_epi16(
            _mm256_packs_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)),
            _mm256_packs_epi32(_mm256_castps_si256(c), _mm256_castps_si256(d)),
        );
        let unsigned = _mm256_cmpgt_epi8(magnitudes, _mm256_set1_epi8(LARGEST));
        let signs = _mm256_andnot_si256(unsigned, _mm256_and_si256(signs, _mm256_set1_epi8(i8::MIN)));
        _mm256_permutevar8x32_epi32(_mm256_or_si256(magnitudes, signs), order)
    };
    let [a, b, c, d, e, f, g, h] = x;
    bytemuck::cast([pack(a, b, c, d), pack(e, f, g, h)])
}
