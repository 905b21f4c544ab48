//! Where everything lies in a segment. Pure arithmetic.
//!
//! ```text
//! | group header, one page | control page of rank 0 | ... of rank n-1 | flag lines of rank 0 | ... | slots of rank 0 | ... |
//! ```

use tensorwire_core::{Error, Result};

/// Steps whose data a rank keeps at once. A rank may write step `t` once every peer has published step
/// `t - DEPTH + 1`, which says that the peer has read step `t - DEPTH`, whose place `t` takes.
pub const DEPTH: u64 = 4;

/// Bytes of payload that fit into a flag's own cache line.
pub const INLINE: usize = 48;

/// Ranks that one segment can hold.
pub const MAX_WORLD: usize = 1024;

/// Bytes of slots a rank by default: with its control page and flags, 4 MiB + 8 KiB of shared memory a rank.
pub const DEFAULT_SLOTS: usize = 4 << 20;

pub(super) const PAGE: usize = 4096;
/// Flag lines stand two cache lines apart: processors fetch lines in pairs.
pub(super) const FLAG: usize = 128;

/// The offsets of a segment's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) world: usize,
    /// Bytes of one slot.
    pub(super) slot: usize,
    /// Bytes in all.
    pub(super) len: usize,
}

impl Layout {
    /// The layout for `world` ranks with `slots` bytes of slots each.
    pub(super) fn new(world: usize, slots: usize) -> Result<Layout> {
        if world == 0 || world > MAX_WORLD {
            return Err(Error::Config(format!("a world of {world} ranks: one host holds 1 to {MAX_WORLD}")));
        }
        let slot = slots / DEPTH as usize / PAGE * PAGE;
        if slot == 0 || slot > 1 << 30 {
            return Err(Error::Config(format!(
                "{slots} bytes of shared memory a rank: use {} to {}",
                PAGE * DEPTH as usize,
                DEPTH << 30
            )));
        }
        let mut layout = Layout { world, slot, len: 0 };
        layout.len = layout.slot(world, 0);
        Ok(layout)
    }

    /// The control page of `rank`.
    pub(super) fn control(&self, rank: usize) -> usize {
        PAGE * (1 + rank)
    }

    /// The flag line of `rank` for `step`.
    #[inline]
    pub(super) fn flag(&self, rank: usize, step: u64) -> usize {
        self.control(self.world) + FLAG * (rank * DEPTH as usize + (step % DEPTH) as usize)
    }

    /// The slot of `rank` for `step`.
    #[inline]
    pub(super) fn slot(&self, rank: usize, step: u64) -> usize {
        let flags = (FLAG * DEPTH as usize * self.world).next_multiple_of(PAGE);
        self.control(self.world) + flags + self.slot * (rank * DEPTH as usize + (step % DEPTH) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_fill_the_segment() {
        for world in [1, 2, 3, 7, 64, MAX_WORLD] {
            let l = Layout::new(world, DEFAULT_SLOTS).unwrap();
            let mut parts = vec![(0, PAGE)];
            for r in 0..world {
                parts.push((l.control(r), PAGE));
                for s in 0..DEPTH {
                    parts.push((l.flag(r, s), FLAG));
                    parts.push((l.slot(r, s), l.slot));
                }
                assert_eq!(l.slot(r, 1), l.slot(r, 1 + DEPTH));
            }
            parts.sort_unstable();
            for pair in parts.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
            }
            let (last, size) = parts[parts.len() - 1];
            assert_eq!(last + size, l.len);
            assert!(l.len <= world * (DEFAULT_SLOTS + 2 * PAGE) + 2 * PAGE);
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(Layout::new(0, DEFAULT_SLOTS).is_err());
        assert!(Layout::new(MAX_WORLD + 1, DEFAULT_SLOTS).is_err());
        assert!(Layout::new(2, 100).is_err());
        assert!(Layout::new(2, usize::MAX).is_err());
    }
}
