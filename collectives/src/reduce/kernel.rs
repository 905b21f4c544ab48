//! The kernel and its compilations.

use half::{bf16, f16};

use super::Kernels;
use super::float::{Combine, Float, Max, Min, Product, Sum};

/// Elements that are accumulated at once: a few vector registers on any instruction set. All sources of a
/// block are read before it is written, so the destination may be a source.
const BLOCK: usize = 64;

/// # Safety
/// As for [`Kernel`](super::Kernel), for elements of type `T`.
#[inline(always)]
unsafe fn body<T: Float, C: Combine>(dst: *mut T, sources: &[*const T], count: usize) {
    let (first, rest) = (sources[0], &sources[1..]);
    let blocks = count / BLOCK;
    for block in 0..blocks {
        let at = block * BLOCK;
        let mut sum = [0f32; BLOCK];
        // SAFETY: `at + BLOCK <= count`, and the caller vouches for `count` elements of each pointer.
        unsafe {
            for (j, s) in sum.iter_mut().enumerate() {
                *s = first.add(at + j).read().widen();
            }
            for source in rest {
                for (j, s) in sum.iter_mut().enumerate() {
                    *s = C::combine(*s, source.add(at + j).read().widen());
                }
            }
            for (j, s) in sum.iter().enumerate() {
                dst.add(at + j).write(T::narrow(*s));
            }
        }
    }
    for i in blocks * BLOCK..count {
        // SAFETY: `i < count`, as above.
        unsafe {
            let mut sum = first.add(i).read().widen();
            for source in rest {
                sum = C::combine(sum, source.add(i).read().widen());
            }
            dst.add(i).write(T::narrow(sum));
        }
    }
}

/// Compiles the kernel for one instruction set and lists it for every type and operation, in the order of
/// their codes.
macro_rules! kernels {
    ($table:ident, $entry:ident, $name:literal $(, #[$feature:meta])?) => {
        /// # Safety
        /// As for [`Kernel`](super::Kernel).
        $(#[$feature])?
        unsafe fn $entry<T: Float, C: Combine>(dst: *mut u8, sources: *const *const u8, n: usize, count: usize) {
            // SAFETY: the caller vouches for `n` pointers, whose type has the layout of `*const T`.
            let sources = unsafe { std::slice::from_raw_parts(sources.cast::<*const T>(), n) };
            // SAFETY: the caller vouches for the pointers.
            unsafe { body::<T, C>(dst.cast(), sources, count) }
        }

        pub(super) static $table: Kernels = Kernels {
            name: $name,
            table: [
                [$entry::<f32, Sum>, $entry::<f32, Product>, $entry::<f32, Min>, $entry::<f32, Max>],
                [$entry::<f16, Sum>, $entry::<f16, Product>, $entry::<f16, Min>, $entry::<f16, Max>],
                [$entry::<bf16, Sum>, $entry::<bf16, Product>, $entry::<bf16, Min>, $entry::<bf16, Max>],
            ],
        };
    };
}

kernels!(PORTABLE, portable, "portable");
#[cfg(target_arch = "x86_64")]
kernels!(AVX2, avx2, "avx2", #[target_feature(enable = "avx2")]);
#[cfg(target_arch = "x86_64")]
kernels!(AVX512, avx512, "avx512", #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]);
