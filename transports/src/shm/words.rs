//! A group's shared words and bytes, found in its part of the memory.

use super::control::{Control, Flag, Header, LaneHead};
use super::layout::Layout;
use super::memory::Part;

#[derive(Debug)]
pub(super) struct Words {
    pub(super) part: Part,
    pub(super) layout: Layout,
}

impl Words {
    pub(super) fn header(&self) -> &Header {
        // SAFETY: (1) the layout puts a header here, aligned to a page; (2) all its fields are atomics, or
        // guarded by one, or written before anybody maps the part, and valid from any bytes; (3) the part
        // outlives `self`.
        unsafe { &*self.part.at(0).cast() }
    }

    pub(super) fn control(&self, rank: usize) -> &Control {
        debug_assert!(rank < self.layout.world);
        // SAFETY: as for `header`; `verdict` is guarded by `Header::failed`.
        unsafe { &*self.part.at(self.layout.control(rank)).cast() }
    }

    #[inline]
    pub(super) fn flag(&self, rank: usize, step: u64) -> &Flag {
        debug_assert!(rank < self.layout.world);
        // SAFETY: as for `header`; `payload` is guarded by `step`.
        unsafe { &*self.part.at(self.layout.flag(rank, step)).cast() }
    }

    pub(super) fn lane(&self, from: usize, to: usize) -> &LaneHead {
        debug_assert!(from < self.layout.world && to < self.layout.world);
        // SAFETY: as for `header`.
        unsafe { &*self.part.at(self.layout.lane(from, to)).cast() }
    }

    /// Counts one rank as gone; the last one returns the memory to the system.
    pub(super) fn leave(&self) {
        self.part.leave(self.layout.world);
    }

    /// The bytes of a rank's slot for a step.
    #[inline]
    pub(super) fn slot(&self, rank: usize, step: u64) -> *mut u8 {
        self.part.at(self.layout.slot(rank, step))
    }

    /// Copies `bytes` into a lane's bytes at `at`.
    ///
    /// # Safety
    /// They fit in there, and nobody else looks at these bytes meanwhile.
    pub(super) unsafe fn write_lane(&self, from: usize, to: usize, at: usize, bytes: &[u8]) {
        let place = self.layout.lane(from, to) + size_of::<LaneHead>() + at;
        // SAFETY: (1) the place lies in the mapping, and in no slice; (2) see above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.part.at(place), bytes.len()) };
    }

    /// Copies a lane's bytes at `at` into `bytes`.
    ///
    /// # Safety
    /// As many are there, and nobody writes them meanwhile.
    pub(super) unsafe fn read_lane(&self, from: usize, to: usize, at: usize, bytes: &mut [u8]) {
        let place = self.layout.lane(from, to) + size_of::<LaneHead>() + at;
        // SAFETY: as for `write_lane`.
        unsafe { std::ptr::copy_nonoverlapping(self.part.at(place), bytes.as_mut_ptr(), bytes.len()) };
    }
}
