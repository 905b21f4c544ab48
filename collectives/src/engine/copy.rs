//! Copies between ranks.

/// Bytes from which a copy walks several pages at once.
const SIDE_BY_SIDE_FROM: usize = 64 << 10;
const LINE: usize = 64;
const LINES_A_PAGE: usize = 64;
const PAGES: usize = 4;

/// Bytes of a call's output from which they are written past the caches: more than a rank's share of most third-level
/// caches. What doesn't stay there need not be read from memory first only to be overwritten.
pub(super) const STREAM_FROM: usize = 8 << 20;

/// The same for what a rank copies from its own input, which no peer has just sent through those caches.
const STREAM_OWN_FROM: usize = 4 << 20;

/// How a call copies what a peer wrote into an output of `bytes` bytes.
pub(super) fn copy_for(bytes: usize) -> fn(&mut [u8], &[u8]) {
    if bytes >= STREAM_FROM { copy_past_caches } else { copy_from_peer }
}

/// How a call copies this rank's own into an output of `bytes` bytes.
pub(super) fn own_copy_for(bytes: usize) -> fn(&mut [u8], &[u8]) {
    if bytes >= STREAM_OWN_FROM { copy_past_caches } else { <[u8]>::copy_from_slice }
}

/// As [`copy_from_peer`], with non-temporal stores, where the processor has them.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn copy_past_caches(to: &mut [u8], from: &[u8]) {
    copy_from_peer(to, from);
}

/// As [`copy_from_peer`], with non-temporal stores, where the processor has them.
#[cfg(target_arch = "x86_64")]
pub(super) fn copy_past_caches(to: &mut [u8], from: &[u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    assert_eq!(to.len(), from.len());
    let before = to.as_ptr().align_offset(LINE).min(to.len());
    let ((to_first, to), (from_first, from)) = (to.split_at_mut(before), from.split_at(before));
    to_first.copy_from_slice(from_first);
    let (to_lines, to_rest) = to.as_chunks_mut::<LINE>();
    let (from_lines, from_rest) = from.as_chunks::<LINE>();
    let copy = |to: &mut [u8; LINE], from: &[u8; LINE]| {
        let (to, from) = (to.as_mut_ptr().cast::<__m128i>(), from.as_ptr().cast::<__m128i>());
        for part in 0..LINE / size_of::<__m128i>() {
            // SAFETY: (1) both are one line; (2) `to` is aligned to one; (3) every x86-64 has the instructions.
            unsafe { _mm_stream_si128(to.add(part), _mm_loadu_si128(from.add(part))) };
        }
    };
    to_lines.iter_mut().zip(from_lines).for_each(|(to, from)| copy(to, from));
    to_rest.copy_from_slice(from_rest);
    // SAFETY: every x86-64 has it. Orders these stores before whatever tells another thread of them.
    unsafe { _mm_sfence() };
}

/// Copies what a peer wrote. `copy_from_slice`, but for large copies a quarter faster: a processor fetches ahead
/// within a page, so that four pages at once keep it busier with what lies in another processor's cache.
pub(super) fn copy_from_peer(to: &mut [u8], from: &[u8]) {
    if to.len() < SIDE_BY_SIDE_FROM {
        to.copy_from_slice(from);
        return;
    }
    const GROUP: usize = PAGES * LINES_A_PAGE;
    let (to_groups, to_rest) = to.as_chunks_mut::<{ GROUP * LINE }>();
    let (from_groups, from_rest) = from.as_chunks::<{ GROUP * LINE }>();
    for (to, from) in to_groups.iter_mut().zip(from_groups) {
        let (to, from) = (to.as_chunks_mut::<LINE>().0, from.as_chunks::<LINE>().0);
        for line in 0..LINES_A_PAGE {
            for page in 0..PAGES {
                to[page * LINES_A_PAGE + line] = from[page * LINES_A_PAGE + line];
            }
        }
    }
    to_rest.copy_from_slice(from_rest);
}

/// Copies `from` to two places of its length, reading it once.
pub(super) fn copy_to_both(a: &mut [u8], b: &mut [u8], from: &[u8]) {
    assert!(a.len() == from.len() && b.len() == from.len());
    let (lines, rest) = from.as_chunks::<LINE>();
    let (a_lines, a_rest) = a.as_chunks_mut::<LINE>();
    let (b_lines, b_rest) = b.as_chunks_mut::<LINE>();
    for ((a, b), line) in a_lines.iter_mut().zip(b_lines).zip(lines) {
        *a = *line;
        *b = *line;
    }
    a_rest.copy_from_slice(rest);
    b_rest.copy_from_slice(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_copied() {
        for len in
            [0, 1, 63, 64, 200, SIDE_BY_SIDE_FROM - 1, SIDE_BY_SIDE_FROM, SIDE_BY_SIDE_FROM + 77, 200_001]
        {
            let from: Vec<u8> = (0..len).map(|i| ((i * 31) >> 3) as u8).collect();
            for copy in [copy_for(0), copy_for(STREAM_FROM)] {
                for before in [0, 1, 16, 63] {
                    let mut to = vec![0; len + before];
                    copy(&mut to[before..], &from);
                    assert!(to[before..] == from && to[..before].iter().all(|b| *b == 0));
                }
            }
        }
    }
}
