//! Element types as f32 and back, and the operations on f32, all without branches, so that loops over them
//! vectorise.

use half::{bf16, f16};

/// A type that is accumulated in f32.
pub(super) trait Float: Copy {
    fn widen(self) -> f32;
    /// Rounds to nearest even; any NaN becomes the canonical one.
    fn narrow(x: f32) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> f32 {
        if x.is_nan() { f32::from_bits(0x7fc0_0000) } else { x }
    }
}

impl Float for bf16 {
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

impl Float for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let sign = (bits & 0x8000) << 16;
        let magnitude = (bits & 0x7fff) << 13;
        // 112 is the difference of the exponents' biases.
        let normal = magnitude + (112 << 23);
        // A subnormal is its mantissa in units of 2^-24: with the exponent of 2^-14, less that 2^-14.
        let subnormal = (f32::from_bits(magnitude + (113 << 23)) - f32::from_bits(113 << 23)).to_bits();
        let infinite_or_nan = magnitude | 0x7f80_0000;
        let value = if magnitude < 0x0080_0000 {
            subnormal
        } else if magnitude < 0x0f80_0000 {
            normal
        } else {
            infinite_or_nan
        };
        f32::from_bits(value | sign)
    }

    #[inline(always)]
    fn narrow(x: f32) -> f16 {
        let bits = x.to_bits();
        let sign = ((bits >> 16) & 0x8000) as u16;
        let magnitude = bits & 0x7fff_ffff;
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0x0fff + ((magnitude >> 13) & 1)) >> 13;
        // Adding 1/2, whose last place is 2^-24, rounds to a multiple of it: the unit of f16's subnormals.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
        let value = if magnitude > 0x7f80_0000 {
            0x7e00
        } else if magnitude >= 0x477f_f000 {
            0x7c00 | sign
        } else if magnitude >= 0x3880_0000 {
            normal as u16 | sign
        } else {
            subnormal as u16 | sign
        };
        f16::from_bits(value)
    }
}

/// A reduction of two values. NaNs may come out in any form: [`Float::narrow`] makes them one.
pub(super) trait Combine {
    fn combine(a: f32, b: f32) -> f32;
}

pub(super) struct Sum;
pub(super) struct Product;
pub(super) struct Min;
pub(super) struct Max;

impl Combine for Sum {
    #[inline(always)]
    fn combine(a: f32, b: f32) -> f32 {
        a + b
    }
}

impl Combine for Product {
    #[inline(always)]
    fn combine(a: f32, b: f32) -> f32 {
        a * b
    }
}

impl Combine for Min {
    #[inline(always)]
    fn combine(a: f32, b: f32) -> f32 {
        // Equal values differ at most in the sign of zero: or-ing the bits gives -0.
        let tie = f32::from_bits(a.to_bits() | b.to_bits());
        let least = if a < b {
            a
        } else if b < a {
            b
        } else {
            tie
        };
        if a.is_nan() | b.is_nan() { f32::NAN } else { least }
    }
}

impl Combine for Max {
    #[inline(always)]
    fn combine(a: f32, b: f32) -> f32 {
        // And-ing the bits of equal values gives +0.
        let tie = f32::from_bits(a.to_bits() & b.to_bits());
        let most = if a > b {
            a
        } else if b > a {
            b
        } else {
            tie
        };
        if a.is_nan() | b.is_nan() { f32::NAN } else { most }
    }
}
