//! Blocks of elements as what they are accumulated in, and back, on each instruction set.

use super::number::Number;

/// Elements that are accumulated at once: a few vector registers on any instruction set.
pub(super) const BLOCK: usize = 64;

/// How an instruction set converts blocks of elements. All convert to the same bits, but for which NaN a widened one
/// is; unless one has its own way, the compiler vectorises the conversion of an element.
///
/// The lanes of a wide block need not be in the order of the elements: what `load` does, `store` undoes.
pub(super) trait Convert<T: Number> {
    /// The lane of each element.
    const LANES: [usize; BLOCK] = interleaved(1, 1);

    /// # Safety
    /// 1. `from` is valid for reading [`BLOCK`] elements, and aligned.
    /// 2. The processor has the instruction set.
    #[inline(always)]
    unsafe fn load(from: *const T) -> [T::Wide; BLOCK] {
        // SAFETY: the caller vouches for the elements.
        std::array::from_fn(|j| unsafe { from.add(j).read() }.widen())
    }

    /// # Safety
    /// 1. `to` is valid for writing [`BLOCK`] elements, and aligned.
    /// 2. The processor has the instruction set.
    #[inline(always)]
    unsafe fn store(to: *mut T, block: [T::Wide; BLOCK]) {
        for (j, x) in block.into_iter().enumerate() {
            // SAFETY: the caller vouches for the elements.
            unsafe { to.add(j).write(T::narrow(x)) }
        }
    }

    /// What a block is when it has been narrowed and widened again.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    unsafe fn round(block: [T::Wide; BLOCK]) -> [T::Wide; BLOCK] {
        let mut narrow = [T::zeroed(); BLOCK];
        // SAFETY: (1) the array has `BLOCK` elements; (2) the caller vouches for the instruction set.
        unsafe {
            Self::store(narrow.as_mut_ptr(), block);
            Self::load(narrow.as_ptr())
        }
    }
}

/// Lanes where of each `ways * width` elements every `ways`th come first, then their successors, and so on.
pub(super) const fn interleaved(ways: usize, width: usize) -> [usize; BLOCK] {
    let mut lanes = [0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        let j = i % (ways * width);
        lanes[i] = i - j + j % ways * width + j / ways;
        i += 1;
    }
    lanes
}

/// What any processor has: the compiler's vectors.
pub(super) struct Portable;

impl<T: Number> Convert<T> for Portable {}
