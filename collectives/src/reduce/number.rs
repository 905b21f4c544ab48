//! Element types and what they are accumulated in, all without branches, so that loops over them vectorise.

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

/// A type of elements.
pub(super) trait Number: bytemuck::Pod {
    /// What sums of it are kept in.
    type Wide: Copy;
    fn widen(self) -> Self::Wide;
    /// Rounds to nearest even; any NaN becomes the canonical one.
    fn narrow(x: Self::Wide) -> Self;
}

impl Number for f64 {
    type Wide = f64;

    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }

    #[inline(always)]
    fn narrow(x: f64) -> f64 {
        if x.is_nan() { f64::from_bits(0x7ff8_0000_0000_0000) } else { x }
    }
}

impl Number for f32 {
    type Wide = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> f32 {
        if x.is_nan() { f32::from_bits(0x7fc0_0000) } else { x }
    }
}

impl Number for bf16 {
    type Wide = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> bf16 {
        let bits = x.to_bits();
        // Half a unit in the last place, less one where the kept part is even: ties go to even.
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        bf16::from_bits(if x.is_nan() { 0x7fc0 } else { rounded as u16 })
    }
}

/// A format of `EXPONENT` and `MANTISSA` bits and a sign, with the value of `bits` as IEEE 754 would read it.
#[inline(always)]
const fn widen_small<const EXPONENT: u32, const MANTISSA: u32>(bits: u32) -> f32 {
    let width = EXPONENT + MANTISSA;
    let sign = (bits >> width) << 31;
    let magnitude = (bits & ((1 << width) - 1)) << (23 - MANTISSA);
    // The difference of the exponents' biases.
    let bias = 127 - ((1 << (EXPONENT - 1)) - 1);
    let normal = magnitude + (bias << 23);
    // A subnormal is its mantissa in the smallest normal's scale: with that exponent, less that number.
    let smallest = (bias + 1) << 23;
    let subnormal = (f32::from_bits(magnitude + smallest) - f32::from_bits(smallest)).to_bits();
    let value = if magnitude < 1 << 23 { subnormal } else { normal };
    f32::from_bits(value | sign)
}

/// The bits of `x`, which is finite or NaN's and infinity's magnitude, rounded to nearest even. What lies
/// beyond the format's largest exponent comes out as an exponent beyond it: the caller puts it right.
#[inline(always)]
fn narrow_small<const EXPONENT: u32, const MANTISSA: u32>(magnitude: u32) -> u32 {
    let bias = 127 - ((1 << (EXPONENT - 1)) - 1);
    let cut = 23 - MANTISSA;
    let half = (1 << (cut - 1)) - 1;
    let normal = magnitude.wrapping_sub(bias << 23).wrapping_add(half + ((magnitude >> cut) & 1)) >> cut;
    // Adding a number whose last place is the unit of the format's subnormals rounds to a multiple of it.
    let unit = (bias + 1 + cut) << 23;
    let subnormal = (f32::from_bits(magnitude) + f32::from_bits(unit)).to_bits().wrapping_sub(unit);
    if magnitude >= (bias + 1) << 23 { normal } else { subnormal }
}

impl Number for f16 {
    type Wide = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let special = bits & 0x7c00 == 0x7c00;
        let value = widen_small::<5, 10>(bits).to_bits();
        f32::from_bits(if special { value | 0x7f80_0000 } else { value })
    }

    #[inline(always)]
    fn narrow(x: f32) -> f16 {
        let magnitude = x.to_bits() & 0x7fff_ffff;
        let sign = (x.to_bits() >> 16) & 0x8000;
        let finite = narrow_small::<5, 10>(magnitude);
        // From halfway between the largest number and the next power of two on, it rounds to infinity.
        let value = if magnitude >= 0x477f_f000 { 0x7c00 } else { finite } | sign;
        f16::from_bits(if x.is_nan() { 0x7e00 } else { value as u16 })
    }
}

/// The value of an [`F8E5M2`] of these bits.
#[inline(always)]
pub(super) const fn widen_e5m2(bits: u8) -> f32 {
    let special = bits & 0x7c == 0x7c;
    let value = widen_small::<5, 2>(bits as u32).to_bits();
    f32::from_bits(if special { value | 0x7f80_0000 } else { value })
}

/// The value of an [`F8E4M3`] of these bits.
#[inline(always)]
pub(super) const fn widen_e4m3(bits: u8) -> f32 {
    // All ones is NaN; the rest of the highest exponent are numbers.
    let nan = bits & 0x7f == 0x7f;
    let value = widen_small::<4, 3>(bits as u32).to_bits();
    f32::from_bits(if nan { 0x7fc0_0000 } else { value })
}

impl Number for F8E5M2 {
    type Wide = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        widen_e5m2(self.to_bits())
    }

    #[inline(always)]
    fn narrow(x: f32) -> F8E5M2 {
        let magnitude = x.to_bits() & 0x7fff_ffff;
        let sign = (x.to_bits() >> 24) & 0x80;
        let finite = narrow_small::<5, 2>(magnitude);
        // 61440, halfway between 57344 and 65536.
        let value = if magnitude >= 0x4770_0000 { 0x7c } else { finite } | sign;
        F8E5M2::from_bits(if x.is_nan() { 0x7e } else { value as u8 })
    }
}

impl Number for F8E4M3 {
    type Wide = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        widen_e4m3(self.to_bits())
    }

    #[inline(always)]
    fn narrow(x: f32) -> F8E4M3 {
        let magnitude = x.to_bits() & 0x7fff_ffff;
        let sign = (x.to_bits() >> 24) & 0x80;
        let finite = narrow_small::<4, 3>(magnitude);
        // Above 464, halfway between 448 and the 480 that the format lacks; 464 itself is a tie and goes to
        // 448, which is even. There is no infinity.
        let value = if magnitude > 0x43e8_0000 { 0x7f } else { finite | sign };
        F8E4M3::from_bits(value as u8)
    }
}

macro_rules! integers {
    ($($t:ty),*) => {
        $(
            impl Number for $t {
                type Wide = $t;

                #[inline(always)]
                fn widen(self) -> $t {
                    self
                }

                #[inline(always)]
                fn narrow(x: $t) -> $t {
                    x
                }
            }
        )*
    };
}

integers!(i8, u8, i32, u32, i64, u64);
