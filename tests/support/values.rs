//! Values whose reduction is known.

use tensorwire::collectives::reduce::Kernels;
use tensorwire::{DType, Element, ReduceOp};

/// Rank `rank`'s element `i`: any integer, or a number of magnitude 1 to 4 of either sign, with all mantissa
/// bits in use, so that sums round and their order shows.
pub(crate) fn value<T: Element>(rank: usize, i: usize) -> T {
    let h = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
        ^ (rank as u64 + 1).wrapping_mul(0x85EB_CA6B_2545_F491);
    let h = (h ^ (h >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let h = h ^ (h >> 32);
    // The exponents of 1 and 2 in the type's own format, random sign and mantissa.
    let float = |exponent: u32, mantissa: u32| {
        let one = ((1u64 << (exponent - 1)) - 1) << mantissa;
        let sign = (h >> 63) << (exponent + mantissa);
        (one + (h & ((2 << mantissa) - 1))) | sign
    };
    let bits = match T::DTYPE {
        DType::F64 => float(11, 52),
        DType::F32 => float(8, 23),
        DType::F16 => float(5, 10),
        DType::BF16 => float(8, 7),
        DType::F8E4M3 => float(4, 3),
        DType::F8E5M2 => float(5, 2),
        _ => h,
    };
    bytemuck::pod_read_unaligned(&bits.to_le_bytes()[..size_of::<T>()])
}

/// `len` elements of rank `rank`.
pub(crate) fn buffer<T: Element>(rank: usize, len: usize) -> Vec<T> {
    (0..len).map(|i| value(rank, i)).collect()
}

/// The reduction of `len` elements over `world` ranks by the portable kernel, which is tested against the
/// definition where it lives.
pub(crate) fn reduced<T: Element>(op: ReduceOp, world: usize, len: usize) -> Vec<T> {
    let buffers: Vec<Vec<T>> = (0..world).map(|r| buffer(r, len)).collect();
    let sources: Vec<*const u8> = buffers.iter().map(|b| b.as_ptr().cast()).collect();
    let mut out = vec![T::zeroed(); len];
    let kernel = Kernels::available()[0].get(T::DTYPE, op).expect("an operation that the type supports");
    // SAFETY: (1) every buffer has `len` elements of `T`; (2) the output is none of them; (3) the portable
    // kernels run anywhere.
    unsafe { kernel(out.as_mut_ptr().cast(), sources.as_ptr(), world, len, op.factor()) };
    out
}

/// Fails unless both hold the same bits.
#[track_caller]
pub(crate) fn assert_same<T: Element>(got: &[T], expected: &[T], what: impl std::fmt::Display) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let size = size_of::<T>();
    let (got, expected) = (bytemuck::cast_slice::<T, u8>(got), bytemuck::cast_slice::<T, u8>(expected));
    if let Some(i) = got.chunks(size).zip(expected.chunks(size)).position(|(g, e)| g != e) {
        let at = i * size..(i + 1) * size;
        panic!("{} {what}: element {i} is {:?}, not {:?}", T::DTYPE, &got[at.clone()], &expected[at]);
    }
}
