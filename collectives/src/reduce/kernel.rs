//! The kernel and its compilations.

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

use super::convert::{BLOCK, Convert, Portable};
use super::number::Number;
use super::op::{Average, BitAnd, BitOr, BitXor, Combine, Max, Min, PreScaledSum, Product, Sum};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};
use super::{Kernel, Kernels, OPS, norm};
#[cfg(feature = "tcp")]
use super::{op::Divide, wire};

/// As many elements left over are reduced as a block of their own; fewer take less time one by one.
const FEW: usize = 8;

/// # Safety
/// As for [`Kernel`], for elements of type `T`, with the instruction set `S`.
#[inline(always)]
unsafe fn body<S: Convert<T>, T: Number, C: Combine<T::Wide>>(
    dst: *mut T,
    sources: &[*const T],
    count: usize,
    factor: f64,
) {
    let whole = count - count % BLOCK;
    for at in (0..whole).step_by(BLOCK) {
        // SAFETY: (1) the caller vouches for `count` elements; (2) `at + BLOCK <= whole`; (3) the caller vouches for
        // the instruction set. All sources are read before the block is written, so that it may be one's.
        unsafe {
            let block = reduce::<T, C>(sources, factor, |source| S::load(source.add(at)));
            S::store(dst.add(at), block);
        }
    }
    let left = count - whole;
    if left >= FEW {
        let mut block = [T::zeroed(); BLOCK];
        // SAFETY: (1) `whole + left` is the count; (2) a block has more elements than are left; (3) as above.
        unsafe {
            let sum = reduce::<T, C>(sources, factor, |source| {
                let mut block = [T::zeroed(); BLOCK];
                block.as_mut_ptr().copy_from_nonoverlapping(source.add(whole), left);
                S::load(block.as_ptr())
            });
            S::store(block.as_mut_ptr(), sum);
            dst.add(whole).copy_from_nonoverlapping(block.as_ptr(), left);
        }
        return;
    }
    for i in whole..count {
        // SAFETY: `i < count`, as above.
        unsafe {
            let mut sum = C::load(sources[0].add(i).read().widen(), factor);
            for source in &sources[1..] {
                sum = C::combine(sum, C::load(source.add(i).read().widen(), factor));
            }
            dst.add(i).write(T::narrow(C::finish(sum, sources.len())));
        }
    }
}

/// Reduces a block that `load` takes from each source.
#[inline(always)]
fn reduce<T: Number, C: Combine<T::Wide>>(
    sources: &[*const T],
    factor: f64,
    load: impl Fn(*const T) -> [T::Wide; BLOCK],
) -> [T::Wide; BLOCK] {
    let first = load(sources[0]);
    let mut sum: [T::Wide; BLOCK] = std::array::from_fn(|j| C::load(first[j], factor));
    for source in &sources[1..] {
        let x = load(*source);
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum = C::combine(*sum, C::load(x, factor));
        }
    }
    for sum in &mut sum {
        *sum = C::finish(*sum, sources.len());
    }
    sum
}

/// Compiles the kernel for one instruction set and lists it for every type and operation, in the order of
/// their codes.
macro_rules! kernels {
    ($table:ident, $set:ident, $entry:ident, $name:literal $(, #[$feature:meta])?) => {
        /// # Safety
        /// As for [`Kernel`].
        $(#[$feature])?
        unsafe fn $entry<T: Number, C: Combine<T::Wide>>(
            dst: *mut u8,
            sources: *const *const u8,
            n: usize,
            count: usize,
            factor: f64,
        ) where
            $set: Convert<T>,
        {
            // SAFETY: the caller vouches for `n` pointers, whose type has the layout of `*const T`.
            let sources = unsafe { std::slice::from_raw_parts(sources.cast::<*const T>(), n) };
            // SAFETY: the caller vouches for the pointers and the instruction set.
            unsafe { body::<$set, T, C>(dst.cast(), sources, count, factor) }
        }

        pub(super) static $table: Kernels = {
            macro_rules! float {
                ($t:ty) => {
                    [
                        Some($entry::<$t, Sum> as Kernel),
                        Some($entry::<$t, Product>),
                        Some($entry::<$t, Min>),
                        Some($entry::<$t, Max>),
                        Some($entry::<$t, Average>),
                        Some($entry::<$t, PreScaledSum>),
                        None,
                        None,
                        None,
                    ]
                };
            }
            macro_rules! integer {
                ($t:ty) => {
                    [
                        Some($entry::<$t, Sum> as Kernel),
                        Some($entry::<$t, Product>),
                        Some($entry::<$t, Min>),
                        Some($entry::<$t, Max>),
                        None,
                        None,
                        Some($entry::<$t, BitAnd>),
                        Some($entry::<$t, BitOr>),
                        Some($entry::<$t, BitXor>),
                    ]
                };
            }
            const ROW: [Option<Kernel>; OPS] = [None; OPS];
            let mut table = [ROW; tensorwire_core::DType::ALL.len()];
            table[0] = float!(f32);
            table[1] = float!(f16);
            table[2] = float!(bf16);
            table[3] = float!(f64);
            table[4] = float!(F8E4M3);
            table[5] = float!(F8E5M2);
            table[6] = integer!(i8);
            table[7] = integer!(u8);
            table[8] = integer!(i32);
            table[9] = integer!(u32);
            table[10] = integer!(i64);
            table[11] = integer!(u64);
            Kernels {
                name: $name,
                table,
                add_rms_norm: &norm::$table,
                #[cfg(feature = "tcp")]
                divide: [
                    $entry::<f32, Divide>,
                    $entry::<f16, Divide>,
                    $entry::<bf16, Divide>,
                    $entry::<f64, Divide>,
                    $entry::<F8E4M3, Divide>,
                    $entry::<F8E5M2, Divide>,
                ],
                #[cfg(feature = "tcp")]
                wire: &wire::$table,
            }
        };
    };
}

kernels!(PORTABLE, Portable, portable, "portable");
#[cfg(target_arch = "x86_64")]
kernels!(AVX2, Avx2, avx2, "avx2", #[target_feature(enable = "avx2,f16c")]);
#[cfg(target_arch = "x86_64")]
kernels!(AVX512, Avx512, avx512, "avx512", #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]);
