//! What the elements of a buffer are, and how two of them are combined.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::Error;

/// The type of a buffer's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DType {
    /// IEEE 754 binary32. Accumulated in binary32.
    F32 = 1,
    /// IEEE 754 binary16. Accumulated in binary32 and rounded once, to nearest even.
    F16 = 2,
    /// bfloat16. Accumulated in binary32 and rounded once, to nearest even.
    BF16 = 3,
}

impl DType {
    /// Every type, in the order of its code.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// Bytes an element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name used on the command line and in messages: `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        }
    }

    /// The type whose code (`self as u8`) this is.
    pub fn from_code(code: u8) -> Option<DType> {
        DType::ALL.into_iter().find(|d| *d as u8 == code)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    fn from_str(s: &str) -> Result<DType, Error> {
        DType::ALL
            .into_iter()
            .find(|d| d.name() == s)
            .ok_or_else(|| Error::invalid(format!("unknown dtype '{s}': use one of f32, f16, bf16")))
    }
}

/// How corresponding elements of all ranks become one.
///
/// Element `i` of the result is `((x0[i] ∘ x1[i]) ∘ x2[i]) ∘ ...` in rank order, whatever the message size
/// or algorithm, so the result is the same bits on every rank and in every run. A result that is not a
/// number is always the positive quiet NaN with an empty payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ReduceOp {
    /// The sum.
    Sum = 1,
    /// The product.
    Product = 2,
    /// The smallest; a NaN anywhere gives NaN, and -0 is below +0 (IEEE 754-2019 `minimum`).
    Min = 3,
    /// The largest; a NaN anywhere gives NaN, and +0 is above -0 (IEEE 754-2019 `maximum`).
    Max = 4,
}

impl ReduceOp {
    /// Every operation, in the order of its code.
    pub const ALL: [ReduceOp; 4] = [ReduceOp::Sum, ReduceOp::Product, ReduceOp::Min, ReduceOp::Max];

    /// The name used on the command line and in messages: `sum`, `product`, `min`, `max`.
    pub const fn name(self) -> &'static str {
        match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Product => "product",
            ReduceOp::Min => "min",
            ReduceOp::Max => "max",
        }
    }

    /// The operation whose code (`self as u8`) this is.
    pub fn from_code(code: u8) -> Option<ReduceOp> {
        ReduceOp::ALL.into_iter().find(|o| *o as u8 == code)
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ReduceOp {
    type Err = Error;

    fn from_str(s: &str) -> Result<ReduceOp, Error> {
        ReduceOp::ALL
            .into_iter()
            .find(|o| o.name() == s)
            .ok_or_else(|| Error::invalid(format!("unknown op '{s}': use one of sum, product, min, max")))
    }
}

/// A Rust type that a collective can carry.
///
/// Sealed: the set of element types is the set of [`DType`]s.
pub trait Element: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// The code of this type.
    const DTYPE: DType;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_round_trip() {
        for d in DType::ALL {
            assert_eq!(DType::from_code(d as u8), Some(d));
            assert_eq!(d.name().parse::<DType>().unwrap(), d);
        }
        for o in ReduceOp::ALL {
            assert_eq!(ReduceOp::from_code(o as u8), Some(o));
            assert_eq!(o.name().parse::<ReduceOp>().unwrap(), o);
        }
        assert!("f33".parse::<DType>().unwrap_err().to_string().contains("f32, f16, bf16"));
        assert_eq!(DType::from_code(0), None);
        assert_eq!(ReduceOp::from_code(9), None);
    }
}
