//! Conversions with AVX-512.
//!
//! A block is four registers of f32.

use std::arch::x86_64::*;

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

use super::super::convert::{BLOCK, Convert, interleaved};
use super::super::number;
use super::{Avx512, convert};

convert!(Avx512, f16, [__m256i; 4], [__m512; 4], widen_f16, narrow_f16, interleaved(1, 1));
convert!(Avx512, bf16, [__m512i; 2], [__m512; 4], widen_bf16, narrow_bf16, interleaved(2, 16));
convert!(Avx512, F8E4M3, __m512i, [__m512; 4], widen_e4m3, narrow_e4m3, interleaved(4, 16));
convert!(Avx512, F8E5M2, __m512i, [__m512; 4], widen_e5m2, narrow_e5m2, interleaved(4, 16));

/// `x`, with `nan` in the place of NaNs.
#[target_feature(enable = "avx512f")]
#[inline]
fn replace_nan(x: __m512, nan: f32) -> __m512 {
    // Four bits for each kind of number say what it becomes: the first two are the NaNs, which become the first operand (0),
    // as all others do the second (1).
    _mm512_fixupimm_ps::<0>(_mm512_set1_ps(nan), x, _mm512_set1_epi32(0x1111_1100))
}

/// A register from its halves, as which constants can be made without AVX-512.
#[target_feature(enable = "avx512f")]
#[inline]
fn register([low, high]: [__m256i; 2]) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn widen_f16(x: [__m256i; 4]) -> [__m512; 4] {
    let [a, b, c, d] = x;
    [_mm512_cvtph_ps(a), _mm512_cvtph_ps(b), _mm512_cvtph_ps(c), _mm512_cvtph_ps(d)]
}

#[target_feature(enable = "avx512f")]
#[inline]
fn narrow_f16(x: [__m512; 4]) -> [__m256i; 4] {
    let mut narrow = [_mm256_setzero_si256(); 4];
    for (narrow, x) in narrow.iter_mut().zip(x) {
        *narrow = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(replace_nan(x, f32::NAN));
    }
    narrow
}

/// Even elements, then odd ones.
#[target_feature(enable = "avx512f")]
#[inline]
fn widen_bf16(x: [__m512i; 2]) -> [__m512; 4] {
    let even = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
    let odd = |x| _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
    let [a, b] = x;
    [even(a), odd(a), even(b), odd(b)]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn narrow_bf16(x: [__m512; 4]) -> [__m512i; 2] {
    // The upper half is what rounding leaves, as in the portable conversion. To the bits are added both halves of
    // another number: half a place less one, and one where the kept part is odd.
    let round = |x| {
        let bits = _mm512_castps_si512(replace_nan(x, f32::NAN));
        let odd = _mm512_and_si512(bits, _mm512_set1_epi32(0x1_0000));
        let halves = _mm512_or_si512(odd, _mm512_set1_epi32(0x7fff));
        _mm512_dpwssd_epi32(bits, halves, _mm512_set1_epi16(1))
    };
    let pair =
        |even, odd| _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(round(even)), round(odd));
    let [a, b, c, d] = x;
    [pair(a, b), pair(c, d)]
}

/// The upper halves of what the 128 magnitudes of an 8-bit format are in f32, whose lower halves are 0: lower bytes
/// and upper bytes.
type Magnitudes = [[u8; 128]; 2];

macro_rules! magnitudes {
    ($widen:path) => {{
        let mut bytes: Magnitudes = [[0; 128]; 2];
        let mut i = 0;
        while i < 128 {
            let [_, _, low, high] = $widen(i as u8).to_bits().to_le_bytes();
            (bytes[0][i], bytes[1][i]) = (low, high);
            i += 1;
        }
        bytes
    }};
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn widen_e4m3(x: __m512i) -> [__m512; 4] {
    static MAGNITUDES: Magnitudes = magnitudes!(number::widen_e4m3);
    widen_small(x, &MAGNITUDES)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn widen_e5m2(x: __m512i) -> [__m512; 4] {
    static MAGNITUDES: Magnitudes = magnitudes!(number::widen_e5m2);
    widen_small(x, &MAGNITUDES)
}

/// Every fourth element, then their successors, and so on.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn widen_small(x: __m512i, magnitudes: &Magnitudes) -> [__m512; 4] {
    let look_up = |table: [u8; 128]| {
        let [first, second] = bytemuck::cast(table);
        // Looks at the lowest seven bits of each byte of `x` alone.
        _mm512_permutex2var_epi8(register(first), x, register(second))
    };
    let low = look_up(magnitudes[0]);
    let sign = _mm512_and_si512(x, _mm512_set1_epi8(i8::MIN));
    let high = _mm512_or_si512(look_up(magnitudes[1]), sign);
    // Two bytes each of elements 0, 2, 4, ... and of 1, 3, 5, ...
    let low_byte = _mm512_set1_epi16(0xff);
    let even = _mm512_or_si512(_mm512_slli_epi16::<8>(high), _mm512_and_si512(low, low_byte));
    let odd = _mm512_or_si512(_mm512_andnot_si512(low_byte, high), _mm512_srli_epi16::<8>(low));
    let first = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
    let second = |x| _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
    [first(even), first(odd), second(even), second(odd)]
}

/// What to add to a number so that the sum's last byte is the number in an 8-bit format, by the lowest five bits of its
/// exponent.
///
/// A power of two whose last place is the last that the format has: the sum is rounded to it. The lowest bits then count the
/// places, from `1 << MANTISSA` on if it is a normal number; to that comes the exponent, from 0 for the least normal number's.
type Places = [u32; 32];

const fn places<const MANTISSA: u32>(least: f32, limit: f32) -> Places {
    let mut places = [0; 32];
    let (first, last) = (least.to_bits() >> 23, limit.to_bits() >> 23);
    let mut exponent = first;
    while exponent <= last {
        places[exponent as usize % 32] = (exponent + 23 - MANTISSA) << 23 | (exponent - first) << MANTISSA;
        exponent += 1;
    }
    places
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn narrow_e4m3(x: [__m512; 4]) -> __m512i {
    const LEAST: f32 = 1.0 / 64.0;
    static PLACES: Places = places::<3>(LEAST, 480.0);
    // 480, which the format lacks, would have the bits that are NaN. 464, in the middle between it and the largest number,
    // goes to the latter, which is even; what is above goes to 480. Where one is NaN, the minimum is the second.
    let limit = |x| _mm512_min_ps(x, _mm512_set1_ps(480.0));
    narrow_small::<0x7e>(x, limit, LEAST, &PLACES)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn narrow_e5m2(x: [__m512; 4]) -> __m512i {
    const LEAST: f32 = 1.0 / 16384.0;
    static PLACES: Places = places::<2>(LEAST, 98304.0);
    // 65536 would have the bits that are infinity, and half as much again the NaN's.
    let limit = |x| replace_nan(_mm512_min_ps(_mm512_set1_ps(65536.0), x), 98304.0);
    narrow_small::<0x7c>(x, limit, LEAST, &PLACES)
}

/// Narrows to an 8-bit format, whose largest magnitude with a sign is `LARGEST`, and whose least normal number is `least`.
/// `limit` makes of a magnitude one of which the format has, or would have, the bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn narrow_small<const LARGEST: u8>(
    x: [__m512; 4],
    limit: impl Fn(__m512) -> __m512,
    least: f32,
    places: &Places,
) -> __m512i {
    let [first, second] = bytemuck::cast(*places);
    let (first, second) = (register(first), register(second));
    let magnitude = |x| {
        let magnitude = limit(_mm512_abs_ps(x));
        // Subnormals count in the places of the least normal number. Magnitudes are in the order of their bits.
        let normal =
            _mm512_max_epu32(_mm512_castps_si512(magnitude), _mm512_set1_epi32(least.to_bits() as i32));
        let exponent = _mm512_srli_epi32::<23>(normal);
        let place = _mm512_permutex2var_epi32(first, exponent, second);
        _mm512_castps_si512(_mm512_add_ps(magnitude, _mm512_castsi512_ps(place)))
    };
    let [a, b, c, d] = x;
    let magnitudes = bytes::<0>([magnitude(a), magnitude(b), magnitude(c), magnitude(d)]);
    let bits = |x| _mm512_castps_si512(x);
    let signs = bytes::<3>([bits(a), bits(b), bits(c), bits(d)]);
    let signed = _mm512_cmple_epu8_mask(magnitudes, _mm512_set1_epi8(LARGEST as i8));
    let negative = signed & _mm512_movepi8_mask(signs);
    _mm512_mask_add_epi8(magnitudes, negative, magnitudes, _mm512_set1_epi8(i8::MIN))
}

/// Byte `N` of every first element, every second one, and so on, next to each other.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn bytes<const N: u8>(x: [__m512i; 4]) -> __m512i {
    // Of the second register, numbered from 64 on, at odd places.
    let places: [u8; BLOCK] = std::array::from_fn(|i| (i / 4 * 4) as u8 + N + (i % 2 * 64) as u8);
    let places = register(bytemuck::cast(places));
    let [a, b, c, d] = x;
    let first = _mm512_permutex2var_epi8(a, places, b);
    let second = _mm512_permutex2var_epi8(c, places, d);
    _mm512_mask_blend_epi16(0xaaaa_aaaa, first, second)
}
