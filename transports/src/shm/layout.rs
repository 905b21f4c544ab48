//! Where everything lies in a group's part of the memory. Arithmetic, but for taking the memory.
//!
//! ```text
//! | group header, one page | control page of each rank | flag lines of each rank | slots of each rank | lanes of each pair |
//! ```

use tensorwire_core::{Error, Result};

use super::memory::{About, Kind, Memory};

/// Steps whose data a rank keeps at once. A rank may write step `t` once every peer has published step
/// `t - DEPTH + 1`, which says that the peer has read step `t - DEPTH`, whose place `t` takes.
#[cfg(not(loom))]
pub const DEPTH: u64 = 8;
/// Fewer, so that fewer orders of events are to be tried.
#[cfg(loom)]
pub const DEPTH: u64 = 4;

/// Bytes of payload that fit into a flag's own cache line.
pub const INLINE: usize = 48;

/// Ranks that one group can hold.
pub const MAX_WORLD: usize = 1024;

/// Bytes of slots a rank by default.
pub const DEFAULT_SLOTS: usize = 4 << 20;

/// Bytes that wait in a lane between two ranks, and what the lane adds to them.
#[cfg(not(loom))]
pub(super) const LANE_DATA: usize = (64 << 10) - 256;
/// Room for one message without payload and the header of a second.
#[cfg(loom)]
pub(super) const LANE_DATA: usize = 64;
const LANE: usize = 64 << 10;

pub(super) const PAGE: usize = 4096;
/// Flag lines stand two cache lines apart: processors fetch lines in pairs.
pub(super) const FLAG: usize = 128;

/// Bytes of slots, over all ranks, that a call's steps walk through: a few times a second-level cache. A processor
/// writes a cache line much sooner that has left for the third-level cache, with nobody's copy of it to take back,
/// than one that its peer still has at hand.
const WALK: usize = 4 << 20;

/// Where within its slot a step's bytes lie: the same for all steps of a call, and for all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// How many the step uses.
    pub(super) bytes: usize,
    places: u64,
    /// How much further an odd step begins.
    odd: usize,
}

impl Span {
    /// Of steps that leave their slots alone.
    pub(super) const NONE: Span = Span { bytes: 0, places: 1, odd: 0 };

    /// How far into its slot `step` begins.
    #[inline]
    pub(super) fn start(&self, step: u64) -> usize {
        (step / DEPTH % self.places) as usize * self.bytes + (step % 2) as usize * self.odd
    }
}

/// The offsets of a group's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) world: usize,
    /// Bytes of one slot.
    pub(super) slot: usize,
    /// Bytes of header, control pages and flags: everything before the slots.
    pub(super) head: usize,
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
        // A slot must hold a cache line for each rank.
        let least = (64 * world).next_multiple_of(PAGE);
        if slot < least || slot > 1 << 30 {
            return Err(Error::Config(format!(
                "{slots} bytes of shared memory a rank: use {} to {}",
                least * DEPTH as usize,
                DEPTH << 30
            )));
        }
        let mut layout = Layout { world, slot, head: 0, len: 0 };
        layout.head = layout.slot(0, 0);
        layout.len = layout.lane(world, 0);
        Ok(layout)
    }

    /// Takes a group's part of the memory and reserves what isn't any one rank's. Returns where it starts.
    pub(super) fn take(&self, memory: &Memory) -> Result<u64> {
        let about = About { kind: Kind::Group, world: self.world, bytes: self.slots() };
        let start = memory.take(about, self.len)?;
        memory.reserve(start, self.head)?;
        #[cfg(loom)]
        super::loom::Model::make(memory, start, self);
        Ok(start)
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

    /// The span of steps that use `bytes` of their slot. Where half of it will do, odd steps use the second half: if all
    /// use the first, large calls take a tenth longer. Slots begin at multiples of a large power of two, so that the likely
    /// reason is that their pages then share half of the entries that a processor keeps of its page tables.
    #[inline]
    pub(super) fn span(&self, bytes: usize) -> Span {
        debug_assert!(bytes <= self.slot);
        let bytes = bytes.next_multiple_of(64);
        let walk = (WALK / self.world / DEPTH as usize).min(self.slot);
        let places = (walk / bytes.max(1)).max(1);
        let odd = if bytes * places <= self.slot / 2 { self.slot / 2 } else { 0 };
        Span { bytes, places: places as u64, odd }
    }

    /// Bytes of all slots of one rank, which lie together from its slot for step 0.
    pub(super) fn slots(&self) -> usize {
        self.slot * DEPTH as usize
    }

    /// The lane from rank `from` to rank `to`.
    #[inline]
    pub(super) fn lane(&self, from: usize, to: usize) -> usize {
        self.slot(self.world, 0) + LANE * (from * self.world + to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_fill_the_memory() {
        for world in [1, 2, 3, 7, 64] {
            let l = Layout::new(world, DEFAULT_SLOTS).unwrap();
            let mut parts = vec![(0, PAGE)];
            for r in 0..world {
                parts.push((l.control(r), PAGE));
                for s in 0..DEPTH {
                    parts.push((l.flag(r, s), FLAG));
                    parts.push((l.slot(r, s), l.slot));
                }
                assert_eq!(l.slot(r, 1), l.slot(r, 1 + DEPTH));
                parts.extend((0..world).map(|to| (l.lane(r, to), LANE)));
            }
            parts.sort_unstable();
            for pair in parts.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
            }
            let (last, size) = parts[parts.len() - 1];
            assert_eq!(last + size, l.len);
        }
    }

    #[test]
    fn steps_stay_within_their_slots_and_odd_ones_use_the_second_half_if_one_will_do() {
        for world in [2, 3, 64] {
            let l = Layout::new(world, DEFAULT_SLOTS).unwrap();
            for bytes in
                [0, 1, 64, 4000, PAGE, l.slot / 4, l.slot / 2 - 64, l.slot / 2, l.slot / 2 + 1, l.slot]
            {
                let span = l.span(bytes);
                for step in 1..10 * DEPTH {
                    assert!(span.start(step).is_multiple_of(64) && span.start(step) + span.bytes <= l.slot);
                    let second_half = bytes <= l.slot / 2 && step % 2 == 1;
                    assert_eq!(span.start(step) >= l.slot / 2, second_half, "{world} {bytes} {step}");
                }
            }
        }
    }

    #[test]
    fn a_rank_takes_no_more_than_documented() {
        for world in [1, 2, 3, 64, MAX_WORLD] {
            let l = Layout::new(world, DEFAULT_SLOTS).unwrap();
            assert_eq!(l.slots(), DEFAULT_SLOTS);
            assert!(l.head <= world * 2 * PAGE + 2 * PAGE);
            assert_eq!(l.len, l.head + world * l.slots() + world * world * (64 << 10));
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(Layout::new(0, DEFAULT_SLOTS).is_err());
        assert!(Layout::new(MAX_WORLD + 1, DEFAULT_SLOTS).is_err());
        assert!(Layout::new(2, 100).is_err());
        assert!(Layout::new(65, 4 * PAGE).is_err());
        assert!(Layout::new(2, usize::MAX).is_err());
    }
}
