//! Hints to the processor's caches.

/// Bytes that are worth asking for ahead of time: beyond, processors notice themselves what is being written.
pub(super) const FEW: usize = 16 << 10;

const LINE: usize = 64;

/// Asks for the cache lines of `bytes` from `at` on, to write them. Harmless for any address.
#[inline]
pub(super) fn fetch_for_writing(at: *const u8, bytes: usize) {
    for offset in (0..bytes).step_by(LINE) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: (1) the instruction changes no register, no flag and no memory; (2) it never faults, whatever
        // the address; (3) processors that don't have it do nothing instead.
        unsafe {
            std::arch::asm!(
                "prefetchw [{}]",
                in(reg) at.wrapping_add(offset),
                options(nostack, preserves_flags, readonly)
            );
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let _ = (at, offset);
    }
}
