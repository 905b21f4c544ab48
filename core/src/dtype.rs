//! What the elements of a buffer are, and how two of them are combined.

use std::fmt;
use std::str::FromStr;

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

use crate::Error;

/// The type of a buffer's elements.
///
/// Sums and products of integers wrap around. Floating-point types narrower than 32 bits are accumulated in
/// binary32 and rounded once, to nearest even; a result beyond the largest finite number is infinity, or NaN
/// where the type has none (`F8E4M3`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DType {
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary16.
    F16 = 2,
    /// bfloat16: the upper half of a binary32.
    BF16 = 3,
    /// IEEE 754 binary64, accumulated in binary64.
    F64 = 4,
    /// 8 bits with 4 of exponent, no infinity: OCP's E4M3 (`float8_e4m3fn`).
    F8E4M3 = 5,
    /// 8 bits with 5 of exponent: OCP's E5M2, the upper half of a binary16.
    F8E5M2 = 6,
    /// Signed 8 bits.
    I8 = 7,
    /// Unsigned 8 bits.
    U8 = 8,
    /// Signed 32 bits.
    I32 = 9,
    /// Unsigned 32 bits.
    U32 = 10,
    /// Signed 64 bits.
    I64 = 11,
    /// Unsigned 64 bits.
    U64 = 12,
}

impl DType {
    /// Every type, in the order of its code.
    pub const ALL: [DType; 12] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::F64,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::I8,
        DType::U8,
        DType::I32,
        DType::U32,
        DType::I64,
        DType::U64,
    ];

    /// Bytes an element.
    pub const fn size(self) -> usize {
        match self {
            DType::F8E4M3 | DType::F8E5M2 | DType::I8 | DType::U8 => 1,
            DType::F16 | DType::BF16 => 2,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F64 | DType::I64 | DType::U64 => 8,
        }
    }

    /// Whether it is one of the integers.
    pub const fn is_integer(self) -> bool {
        matches!(self, DType::I8 | DType::U8 | DType::I32 | DType::U32 | DType::I64 | DType::U64)
    }

    /// The name used on the command line and in messages, such as `f32` or `f8e4m3`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F64 => "f64",
            DType::F8E4M3 => "f8e4m3",
            DType::F8E5M2 => "f8e5m2",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::I64 => "i64",
            DType::U64 => "u64",
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
        DType::ALL.into_iter().find(|d| d.name() == s).ok_or_else(|| {
            let names = DType::ALL.map(DType::name).join(", ");
            Error::invalid(format!("unknown dtype '{s}': use one of {names}"))
        })
    }
}

/// How corresponding elements of all ranks become one.
///
/// Element `i` of the result is `((x0[i] ∘ x1[i]) ∘ x2[i]) ∘ ...` in rank order, whatever the message size
/// or algorithm, so the result is the same bits on every rank and in every run. A result that is not a
/// number is always the positive quiet NaN with an empty payload.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The product.
    Product,
    /// The smallest; a NaN anywhere gives NaN, and -0 is below +0 (IEEE 754-2019 `minimum`).
    Min,
    /// The largest; a NaN anywhere gives NaN, and +0 is above -0 (IEEE 754-2019 `maximum`).
    Max,
    /// The sum divided by the number of ranks, before rounding. Floating-point types only.
    Average,
    /// The sum of each element times this factor, which every rank gives alike. Floating-point types only.
    PreScaledSum(f64),
    /// Bitwise and. Integers only, as the next two.
    BitAnd,
    /// Bitwise or.
    BitOr,
    /// Bitwise exclusive or.
    BitXor,
}

impl ReduceOp {
    /// Every operation, in the order of its code; the factor of [`PreScaledSum`](ReduceOp::PreScaledSum) is 1.
    pub const ALL: [ReduceOp; 9] = [
        ReduceOp::Sum,
        ReduceOp::Product,
        ReduceOp::Min,
        ReduceOp::Max,
        ReduceOp::Average,
        ReduceOp::PreScaledSum(1.0),
        ReduceOp::BitAnd,
        ReduceOp::BitOr,
        ReduceOp::BitXor,
    ];

    /// A number from 1 that stands for the operation where ranks compare their calls.
    #[inline]
    pub const fn code(self) -> u8 {
        match self {
            ReduceOp::Sum => 1,
            ReduceOp::Product => 2,
            ReduceOp::Min => 3,
            ReduceOp::Max => 4,
            ReduceOp::Average => 5,
            ReduceOp::PreScaledSum(_) => 6,
            ReduceOp::BitAnd => 7,
            ReduceOp::BitOr => 8,
            ReduceOp::BitXor => 9,
        }
    }

    /// The factor of [`PreScaledSum`](ReduceOp::PreScaledSum); 1 for any other.
    #[inline]
    pub const fn factor(self) -> f64 {
        match self {
            ReduceOp::PreScaledSum(factor) => factor,
            _ => 1.0,
        }
    }

    /// The operation with this code and factor.
    pub fn from_code(code: u8, factor: f64) -> Option<ReduceOp> {
        let op = ReduceOp::ALL.into_iter().find(|o| o.code() == code)?;
        Some(if let ReduceOp::PreScaledSum(_) = op { ReduceOp::PreScaledSum(factor) } else { op })
    }

    /// Whether it is defined for a type.
    pub const fn supports(self, dtype: DType) -> bool {
        match self {
            ReduceOp::Sum | ReduceOp::Product | ReduceOp::Min | ReduceOp::Max => true,
            ReduceOp::Average | ReduceOp::PreScaledSum(_) => !dtype.is_integer(),
            ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor => dtype.is_integer(),
        }
    }

    /// The name used on the command line and in messages, such as `sum` or `bit_and`.
    pub const fn name(self) -> &'static str {
        match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Product => "product",
            ReduceOp::Min => "min",
            ReduceOp::Max => "max",
            ReduceOp::Average => "average",
            ReduceOp::PreScaledSum(_) => "pre_scaled_sum",
            ReduceOp::BitAnd => "bit_and",
            ReduceOp::BitOr => "bit_or",
            ReduceOp::BitXor => "bit_xor",
        }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReduceOp::PreScaledSum(factor) => write!(f, "pre_scaled_sum:{factor}"),
            other => f.write_str(other.name()),
        }
    }
}

impl FromStr for ReduceOp {
    type Err = Error;

    /// Reads what [`Display`](fmt::Display) writes.
    fn from_str(s: &str) -> Result<ReduceOp, Error> {
        let (name, factor) = match s.split_once(':') {
            Some((name @ "pre_scaled_sum", factor)) => (name, factor.parse().ok()),
            _ => (s, Some(1.0)),
        };
        let op = ReduceOp::ALL.into_iter().find(|o| o.name() == name);
        op.zip(factor).and_then(|(op, factor)| ReduceOp::from_code(op.code(), factor)).ok_or_else(|| {
            let names = ReduceOp::ALL.map(ReduceOp::name).join(", ");
            Error::invalid(format!("unknown op '{s}': use one of {names} (pre_scaled_sum:0.5 for a factor)"))
        })
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
}

macro_rules! elements {
    ($($type:ty => $dtype:ident),* $(,)?) => {
        $(
            impl sealed::Sealed for $type {}
            impl Element for $type {
                const DTYPE: DType = DType::$dtype;
            }
        )*
    };
}

elements! {
    f32 => F32,
    f16 => F16,
    bf16 => BF16,
    f64 => F64,
    F8E4M3 => F8E4M3,
    F8E5M2 => F8E5M2,
    i8 => I8,
    u8 => U8,
    i32 => I32,
    u32 => U32,
    i64 => I64,
    u64 => U64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_round_trip() {
        for (i, d) in DType::ALL.into_iter().enumerate() {
            assert_eq!(d as usize, i + 1);
            assert_eq!(DType::from_code(d as u8), Some(d));
            assert_eq!(d.name().parse::<DType>().unwrap(), d);
        }
        for (i, o) in ReduceOp::ALL.into_iter().enumerate() {
            assert_eq!(o.code() as usize, i + 1);
            assert_eq!(ReduceOp::from_code(o.code(), 1.0), Some(o));
            assert_eq!(o.name().parse::<ReduceOp>().unwrap(), o);
            assert_eq!(o.to_string().parse::<ReduceOp>().unwrap(), o);
        }
        assert_eq!("pre_scaled_sum:0.5".parse::<ReduceOp>().unwrap(), ReduceOp::PreScaledSum(0.5));
        for bad in ["pre_scaled_sum:x", "sum:1", "plus"] {
            assert!(bad.parse::<ReduceOp>().unwrap_err().to_string().contains("bit_xor"));
        }
        assert!("f33".parse::<DType>().unwrap_err().to_string().contains("f32, f16, bf16"));
        assert_eq!(DType::from_code(0), None);
        assert_eq!(ReduceOp::from_code(10, 1.0), None);
    }

    #[test]
    fn sizes_are_the_types_sizes() {
        fn check<T: Element>() {
            assert_eq!(T::DTYPE.size(), size_of::<T>());
        }
        check::<f32>();
        check::<f16>();
        check::<bf16>();
        check::<f64>();
        check::<F8E4M3>();
        check::<F8E5M2>();
        check::<i8>();
        check::<u8>();
        check::<i32>();
        check::<u32>();
        check::<i64>();
        check::<u64>();
    }
}
