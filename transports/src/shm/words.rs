//! A group's shared words and bytes, found in its part of the memory.

use super::control::{Control, Flag, Header, LaneHead};
use super::layout::Layout;
#[cfg(not(loom))]
use super::layout::Span;
use super::memory::Part;

#[derive(Debug)]
pub(super) struct Words {
    pub(super) part: Part,
    pub(super) layout: Layout,
    #[cfg(loom)]
    pub(super) model: std::sync::Arc<super::loom::Model>,
}

impl Words {
    pub(super) fn header(&self) -> &Header {
        // SAFETY: (1) the layout puts a header here; (2) all its fields are atomics, or guarded by one, or
        // written before anybody maps the part, and valid from any bytes.
        unsafe { self.at(0) }
    }

    pub(super) fn control(&self, rank: usize) -> &Control {
        debug_assert!(rank < self.layout.world);
        // SAFETY: as for `header`; `verdict` is guarded by `Header::failed`.
        unsafe { self.at(self.layout.control(rank)) }
    }

    #[inline]
    pub(super) fn flag(&self, rank: usize, step: u64) -> &Flag {
        debug_assert!(rank < self.layout.world);
        // SAFETY: as for `header`; `payload` is guarded by `step`.
        unsafe { self.at(self.layout.flag(rank, step)) }
    }

    pub(super) fn lane(&self, from: usize, to: usize) -> &LaneHead {
        debug_assert!(from < self.layout.world && to < self.layout.world);
        // SAFETY: as for `header`.
        unsafe { self.at(self.layout.lane(from, to)) }
    }

    /// Where a lane's bytes are, from `at` on.
    pub(super) fn lane_bytes(&self, from: usize, to: usize, at: usize) -> usize {
        self.layout.lane(from, to) + size_of::<LaneHead>() + at
    }
}

/// Under loom the words don't lie in the memory: see `loom`.
#[cfg(not(loom))]
impl Words {
    pub(super) fn new(part: Part, layout: Layout) -> Words {
        Words { part, layout }
    }

    /// What is at `offset`.
    ///
    /// # Safety
    /// The layout puts a `T` there, valid from any bytes, of which nothing is written that isn't in a cell.
    #[inline]
    unsafe fn at<T>(&self, offset: usize) -> &T {
        // SAFETY: (1) see above; (2) a part begins at a page, and the layout aligns what it puts into it; (3) the
        // part outlives `self`.
        unsafe { &*self.part.at(offset).cast() }
    }

    /// Counts a rank as gone; the last one returns the memory to the system.
    pub(super) fn leave(&self, rank: usize, ended: impl Fn(usize) -> bool) {
        self.part.leave(rank, self.layout.world, ended);
    }

    /// The bytes of this rank's slot for a step, to be written.
    #[inline]
    pub(super) fn slot(&self, rank: usize, step: u64, span: Span) -> *mut u8 {
        self.part.at(self.layout.slot(rank, step) + span.start(step))
    }

    /// The bytes of a peer's slot for a step, to be read.
    #[inline]
    pub(super) fn peer_slot(&self, peer: usize, step: u64, span: Span) -> *const u8 {
        self.part.at(self.layout.slot(peer, step) + span.start(step))
    }

    /// Copies `bytes` into a lane's bytes at `at`.
    ///
    /// # Safety
    /// They fit in there, and nobody else looks at these bytes meanwhile.
    pub(super) unsafe fn write_lane(&self, from: usize, to: usize, at: usize, bytes: &[u8]) {
        let place = self.part.at(self.lane_bytes(from, to, at));
        // SAFETY: (1) the place lies in the mapping, and in no slice; (2) see above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
    }

    /// Copies a lane's bytes at `at` into `bytes`.
    ///
    /// # Safety
    /// As many are there, and nobody writes them meanwhile.
    pub(super) unsafe fn read_lane(&self, from: usize, to: usize, at: usize, bytes: &mut [u8]) {
        let place = self.part.at(self.lane_bytes(from, to, at));
        // SAFETY: as for `write_lane`.
        unsafe { std::ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), bytes.len()) };
    }
}
