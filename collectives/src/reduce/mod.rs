//! Reduction kernels: corresponding elements of several buffers become one, in order.
//!
//! There is one kernel in source form, written so that the compiler vectorises it, compiled once for each
//! instruction set; the table for this processor is chosen at first use. As every instruction set runs the
//! same operations in the same order, without fused multiply-add, all give the same bits. Only the conversion of
//! types narrower than 32 bits is written for each instruction set: the compiler doesn't find the instructions for it.
//!
//! Types narrower than 32 bits are accumulated in f32 and rounded once, to nearest even. Subnormals are kept.
//! Any NaN result is the positive quiet NaN without payload, for which operand a processor's NaN comes from is
//! not specified. Integers wrap around.
//!
//! A second kernel, made in the same way, ends a row of an all-reduce with addition and RMSNorm: [`AddRmsNorm`].

mod convert;
mod kernel;
mod norm;
mod number;
mod op;
#[cfg(feature = "tcp")]
mod wire;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use tensorwire_core::{DType, ReduceOp};

pub use norm::AddRmsNorm;
#[cfg(feature = "tcp")]
pub(crate) use wire::Codec;

/// Reduces `count` elements of `n` buffers into `dst`: `dst[i] = sources[0][i] ∘ sources[1][i] ∘ ...`, each
/// element times `factor` first for [`ReduceOp::PreScaledSum`], which alone looks at it.
///
/// # Safety
/// 1. `sources` points to `n >= 1` pointers, each valid for reading `count` elements, aligned for the type.
/// 2. `dst` is valid for writing `count` elements and aligned; it may be one of the sources, but must not
///    overlap any in another way.
/// 3. The processor has the instruction set of the table that the kernel came from.
pub type Kernel = unsafe fn(dst: *mut u8, sources: *const *const u8, n: usize, count: usize, factor: f64);

const OPS: usize = ReduceOp::ALL.len();

/// The kernels of one instruction set.
#[derive(Debug)]
pub struct Kernels {
    name: &'static str,
    table: [[Option<Kernel>; OPS]; DType::ALL.len()],
    add_rms_norm: &'static norm::Table,
    /// Each divides by its factor what it has from one source; for floating-point types, in the order of their codes.
    #[cfg(feature = "tcp")]
    divide: [Kernel; 6],
    #[cfg(feature = "tcp")]
    wire: &'static wire::Table,
}

impl Kernels {
    /// The fastest that this processor runs.
    pub fn best() -> &'static Kernels {
        static BEST: OnceLock<&'static Kernels> = OnceLock::new();
        BEST.get_or_init(|| Kernels::available().last().copied().unwrap_or(&kernel::PORTABLE))
    }

    /// All that this processor runs, the fastest last.
    pub fn available() -> Vec<&'static Kernels> {
        let mut all = vec![&kernel::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                all.push(&kernel::AVX2);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vnni")
            {
                all.push(&kernel::AVX512);
            }
        }
        all
    }

    /// The instruction set: `portable`, `avx2` or `avx512`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The kernel for one type and operation; `None` where the operation isn't defined for the type
    /// ([`ReduceOp::supports`]).
    #[inline]
    pub fn get(&self, dtype: DType, op: ReduceOp) -> Option<Kernel> {
        self.table[dtype as usize - 1][usize::from(op.code()) - 1]
    }
}

/// Divides each of a buffer's elements by `n`, as [`ReduceOp::Average`] does at its end; not for integers.
///
/// # Panics
/// If the buffer isn't aligned for the type.
#[cfg(feature = "tcp")]
pub(crate) fn divide(dtype: DType, buffer: &mut [u8], n: usize) {
    let at = buffer.as_mut_ptr();
    assert!(at.addr().is_multiple_of(dtype.size()), "the buffer isn't aligned for {dtype}");
    let kernel = Kernels::best().divide[dtype as usize - 1];
    // SAFETY: (1) the source is the buffer, of so many elements, aligned by the check above; (2) it is the destination too;
    // (3) the table is for this processor.
    unsafe { kernel(at, &at.cast_const(), 1, buffer.len() / dtype.size(), n as f64) }
}

#[cfg(test)]
mod tests;
