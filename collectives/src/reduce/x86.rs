//! Conversions with the instruction sets of x86-64.

mod avx2;
mod avx512;
#[cfg(test)]
mod tests;

use super::convert::Convert;

/// AVX2 and F16C, which every processor with AVX2 has.
pub(super) struct Avx2;

/// AVX-512 as Ice Lake and Zen 4 were the first to have it: with permutations of bytes (VBMI) and sums of products (VNNI).
pub(super) struct Avx512;

/// The types that need no conversion.
macro_rules! same {
    ($($t:ty),*) => {
        $(
            impl Convert<$t> for Avx2 {}
            impl Convert<$t> for Avx512 {}
        )*
    };
}

same!(f32, f64, i8, u8, i32, u32, i64, u64);

/// Implements [`Convert`] by two functions: from the registers that a block fills to those of its wide form, and back.
macro_rules! convert {
    ($set:ty, $t:ty, $registers:ty, $wide:ty, $widen:expr, $narrow:expr, $lanes:expr) => {
        impl Convert<$t> for $set {
            const LANES: [usize; BLOCK] = $lanes;

            #[inline(always)]
            unsafe fn load(from: *const $t) -> [f32; BLOCK] {
                // SAFETY: (1) the caller vouches for a block, which is as large as its registers; (2) and for the
                // instruction set; (3) registers are bits of any kind, as are f32s, and a wide block's are as large as it.
                unsafe {
                    let block = $widen(from.cast::<$registers>().read_unaligned());
                    std::mem::transmute::<$wide, [f32; BLOCK]>(block)
                }
            }

            #[inline(always)]
            unsafe fn store(to: *mut $t, block: [f32; BLOCK]) {
                // SAFETY: as above; and so are elements.
                unsafe {
                    let block = std::mem::transmute::<[f32; BLOCK], $wide>(block);
                    to.cast::<$registers>().write_unaligned($narrow(block));
                }
            }
        }
    };
}
use convert;
