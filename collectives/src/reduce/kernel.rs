//! The kernel and its compilations.

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

use super::number::Number;
use super::op::{Average, BitAnd, BitOr, BitXor, Combine, Max, Min, PreScaledSum, Product, Sum};
use super::{Kernel, Kernels, OPS, norm};

/// Elements that are accumulated at once: a few vector registers on any instruction set. All sources of a
/// block are read before it is written, so the destination may be a source.
const BLOCK: usize = 64;

/// # Safety
/// As for [`Kernel`], for elements of type `T`.
#[inline(always)]
unsafe fn body<T: Number, C: Combine<T::Wide>>(dst: *mut T, sources: &[*const T], count: usize, factor: f64) {
    let blocks = count - count % BLOCK;
    for at in (0..blocks).step_by(BLOCK) {
        // SAFETY: (1) the caller vouches for `count` elements; (2) `at + BLOCK <= blocks`.
        unsafe { block::<T, C>(dst, sources, at, factor) }
    }
    for i in blocks..count {
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

/// Reduces the elements from `at` to `at + BLOCK`.
///
/// # Safety
/// As for [`Kernel`], of `at + BLOCK` elements of type `T`.
#[inline(always)]
unsafe fn block<T: Number, C: Combine<T::Wide>>(dst: *mut T, sources: &[*const T], at: usize, factor: f64) {
    // SAFETY: the caller vouches for these elements of each pointer.
    unsafe {
        let first = sources[0].add(at);
        let mut sum: [T::Wide; BLOCK] = std::array::from_fn(|j| C::load(first.add(j).read().widen(), factor));
        for source in &sources[1..] {
            let source = source.add(at);
            for (j, s) in sum.iter_mut().enumerate() {
                *s = C::combine(*s, C::load(source.add(j).read().widen(), factor));
            }
        }
        for (j, s) in sum.iter().enumerate() {
            dst.add(at + j).write(T::narrow(C::finish(*s, sources.len())));
        }
    }
}

/// Compiles the kernel for one instruction set and lists it for every type and operation, in the order of
/// their codes.
macro_rules! kernels {
    ($table:ident, $entry:ident, $name:literal $(, #[$feature:meta])?) => {
        /// # Safety
        /// As for [`Kernel`].
        $(#[$feature])?
        unsafe fn $entry<T: Number, C: Combine<T::Wide>>(
            dst: *mut u8,
            sources: *const *const u8,
            n: usize,
            count: usize,
            factor: f64,
        ) {
            // SAFETY: the caller vouches for `n` pointers, whose type has the layout of `*const T`.
            let sources = unsafe { std::slice::from_raw_parts(sources.cast::<*const T>(), n) };
            // SAFETY: the caller vouches for the pointers.
            unsafe { body::<T, C>(dst.cast(), sources, count, factor) }
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
            Kernels { name: $name, table, add_rms_norm: &norm::$table }
        };
    };
}

kernels!(PORTABLE, portable, "portable");
#[cfg(target_arch = "x86_64")]
kernels!(AVX2, avx2, "avx2", #[target_feature(enable = "avx2")]);
#[cfg(target_arch = "x86_64")]
kernels!(AVX512, avx512, "avx512", #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]);
