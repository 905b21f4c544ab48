//! The kernel behind [`all_reduce_add_rms_norm`](crate::Communicator::all_reduce_add_rms_norm), and its
//! compilations.

use std::ops::{Add, Div, Mul};

use half::{bf16, f16};
use tensorwire_core::DType;

use super::convert::{BLOCK, Convert, Portable};
use super::number::Number;
use super::op::{Combine, Sum};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// Ends one row of `width` elements: sums `n` buffers as the kernel of [`Sum`](tensorwire_core::ReduceOp::Sum) does, adds the sum to
/// the residual, and normalises what that gives.
///
/// ```text
/// sum[i]      = round(sources[0][i] + sources[1][i] + ...)
/// residual[i] = round(residual[i] + sum[i])
/// out[i]      = round(residual[i] * (1 / sqrt(squares / width + eps)) * weight[i])
/// ```
///
/// `round` is to the type, to nearest even. All else is f32 arithmetic (f64 for f64), operation by operation from
/// left to right, without fused multiply-add. `squares` is the sum of the new residual's squares, in 64 lanes:
/// each begins with 0, lane `j` sums elements `j`, `j + 64`, `j + 128`, ... in this order; then lane `j` takes up
/// lane `j + h`, for all `j < h`, for `h` = 32, 16, 8, 4, 2 and 1, and lane 0 is the sum.
///
/// # Safety
/// 1. `sources` points to `n >= 1` pointers, each valid for reading `width` elements; so is `weight`.
/// 2. `residual` and `out` are valid for reading and writing `width` elements.
/// 3. `out` may be one of the sources. But for that, what is written overlaps nothing else.
/// 4. All are aligned for the type. The processor has the instruction set of the table that the kernel came from.
pub type AddRmsNorm = unsafe fn(
    out: *mut u8,
    residual: *mut u8,
    sources: *const *const u8,
    n: usize,
    weight: *const u8,
    width: usize,
    eps: f32,
);

/// A kernel for each of the types that have one, in the order of their codes.
pub(super) type Table = [AddRmsNorm; 4];

/// What rows are computed in.
trait Real: Copy + Add<Output = Self> + Mul<Output = Self> + Div<Output = Self> {
    fn from_f32(x: f32) -> Self;
    fn from_count(n: usize) -> Self;
    fn sqrt(self) -> Self;
}

macro_rules! reals {
    ($($t:ty),*) => {
        $(
            impl Real for $t {
                #[inline(always)]
                fn from_f32(x: f32) -> $t {
                    x.into()
                }

                #[inline(always)]
                fn from_count(n: usize) -> $t {
                    n as $t
                }

                #[inline(always)]
                fn sqrt(self) -> $t {
                    self.sqrt()
                }
            }
        )*
    };
}

reals!(f32, f64);

/// # Safety
/// As for [`AddRmsNorm`], for elements of type `T`, with the instruction set `S`.
#[inline(always)]
unsafe fn body<S: Convert<T>, T: Number<Wide: Real>>(
    out: *mut T,
    residual: *mut T,
    sources: &[*const T],
    weight: *const T,
    width: usize,
    eps: f32,
) where
    Sum: Combine<T::Wide>,
{
    // In the order that blocks are converted to.
    let mut squares = [T::Wide::from_f32(0.0); BLOCK];
    // What is of the type already need not be rounded to it.
    let one = sources.len() == 1;
    let whole = width - width % BLOCK;
    for at in (0..whole).step_by(BLOCK) {
        // SAFETY: (1) the caller vouches for `width` elements and the instruction set; (2) `at + BLOCK <= whole`.
        unsafe {
            let mut sum = S::load(sources[0].add(at));
            for source in &sources[1..] {
                for (sum, x) in sum.iter_mut().zip(S::load(source.add(at))) {
                    *sum = Sum::combine(*sum, x);
                }
            }
            let sum = if one { sum } else { S::round(sum) };
            let mut x = S::load(residual.add(at));
            for (x, sum) in x.iter_mut().zip(sum) {
                *x = *x + sum;
            }
            S::store(residual.add(at), x);
            for (square, x) in squares.iter_mut().zip(S::load(residual.add(at))) {
                *square = *square + x * x;
            }
        }
    }
    for i in whole..width {
        // SAFETY: `i < width`, as above.
        unsafe {
            let mut sum = sources[0].add(i).read().widen();
            for source in &sources[1..] {
                sum = Sum::combine(sum, source.add(i).read().widen());
            }
            let new = T::narrow(residual.add(i).read().widen() + T::narrow(sum).widen());
            residual.add(i).write(new);
            let (x, lane) = (new.widen(), S::LANES[i - whole]);
            squares[lane] = squares[lane] + x * x;
        }
    }
    let mut squares: [T::Wide; BLOCK] = std::array::from_fn(|j| squares[S::LANES[j]]);
    let mut half = BLOCK / 2;
    while half > 0 {
        for j in 0..half {
            squares[j] = squares[j] + squares[j + half];
        }
        half /= 2;
    }
    let mean = squares[0] / T::Wide::from_count(width);
    let scale = T::Wide::from_f32(1.0) / (mean + T::Wide::from_f32(eps)).sqrt();
    for at in (0..whole).step_by(BLOCK) {
        // SAFETY: as above.
        unsafe {
            let mut x = S::load(residual.add(at));
            for (x, weight) in x.iter_mut().zip(S::load(weight.add(at))) {
                *x = *x * scale * weight;
            }
            S::store(out.add(at), x);
        }
    }
    for i in whole..width {
        // SAFETY: `i < width`, as above.
        unsafe {
            let x = residual.add(i).read().widen() * scale * weight.add(i).read().widen();
            out.add(i).write(T::narrow(x));
        }
    }
}

/// Compiles the kernel for one instruction set and lists it for every type.
macro_rules! kernels {
    ($table:ident, $set:ident, $entry:ident $(, #[$feature:meta])?) => {
        /// # Safety
        /// As for [`AddRmsNorm`].
        $(#[$feature])?
        unsafe fn $entry<T: Number<Wide: Real>>(
            out: *mut u8,
            residual: *mut u8,
            sources: *const *const u8,
            n: usize,
            weight: *const u8,
            width: usize,
            eps: f32,
        ) where
            $set: Convert<T>,
            Sum: Combine<T::Wide>,
        {
            // SAFETY: the caller vouches for `n` pointers, whose type has the layout of `*const T`.
            let sources = unsafe { std::slice::from_raw_parts(sources.cast::<*const T>(), n) };
            // SAFETY: the caller vouches for the pointers and the instruction set.
            unsafe { body::<$set, T>(out.cast(), residual.cast(), sources, weight.cast(), width, eps) }
        }

        pub(super) static $table: Table = [$entry::<f32>, $entry::<f16>, $entry::<bf16>, $entry::<f64>];
    };
}

kernels!(PORTABLE, Portable, portable);
#[cfg(target_arch = "x86_64")]
kernels!(AVX2, Avx2, avx2, #[target_feature(enable = "avx2,f16c")]);
#[cfg(target_arch = "x86_64")]
kernels!(AVX512, Avx512, avx512, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]);

impl super::Kernels {
    /// The kernel that ends a row of an all-reduce with addition and RMSNorm; `None` but for f32, f16, bf16 and
    /// f64.
    #[inline]
    pub fn add_rms_norm(&self, dtype: DType) -> Option<AddRmsNorm> {
        self.add_rms_norm.get(dtype as usize - 1).copied()
    }
}

#[cfg(test)]
mod tests;
