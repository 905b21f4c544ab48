//! How few bits may stand for an element while it is on its way.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// A shorter form in which an all-reduce, or an all-gather, may send floating-point elements, where links are slow.
///
/// What is gathered is rounded to it once. Each rank's contribution to a sum is rounded to it once; what a rank gets of all
/// is the f32 sum, in rank order, of the rounded contributions, rounded to it once more: the same bits on every rank,
/// whatever the algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Wire {
    /// Two bytes an element: [bfloat16](crate::DType::BF16), for f32. Its range is f32's.
    ///
    /// For an element with contributions `x_r` and sum `s`, the result is within `2^-8 (sum |x_r| + |s|)` of `s`, but
    /// for the rounding of f32 sums, which `sum |x_r| * n * 2^-24` bounds. Below 2^-126 and above 3.38e38, what bfloat16
    /// has there counts: steps of 2^-133, and infinity.
    Bf16 = 1,
    /// 34 bytes for 32 elements, from the buffer's first on: a scale and 32 signed bytes, for f32, f16 and bf16. The layout
    /// is that of ggml's `q8_0`, but for a scale in bfloat16, whose range is f32's, so that a block can't overflow; and
    /// its products with bytes are exact in f32.
    ///
    /// In a block where `m_r` is the largest magnitude that rank `r` contributes, and `m` that of the sums of what was
    /// rounded, an element of the result is within `(sum m_r + m) / 252` of its sum, but for the rounding of f32 sums as
    /// above and, in f16 and bf16, of the result. Blocks of less than 2^-126 / 127 are coarser; a block with an infinity
    /// or a NaN becomes all NaN.
    Q8 = 2,
}

impl Wire {
    /// Every form, in the order of its code.
    pub const ALL: [Wire; 2] = [Wire::Bf16, Wire::Q8];

    /// The name used on the command line and in messages: `bf16` or `q8`.
    pub const fn name(self) -> &'static str {
        match self {
            Wire::Bf16 => "bf16",
            Wire::Q8 => "q8",
        }
    }

    /// The form whose code (`self as u8`) this is.
    pub fn from_code(code: u8) -> Option<Wire> {
        Wire::ALL.into_iter().find(|w| *w as u8 == code)
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Wire {
    type Err = Error;

    fn from_str(s: &str) -> Result<Wire, Error> {
        let unknown = || Error::invalid(format!("unknown wire form '{s}': use bf16 or q8"));
        Wire::ALL.into_iter().find(|w| w.name() == s).ok_or_else(unknown)
    }
}
