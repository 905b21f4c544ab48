//! Memory of which each rank has a block, mapped by all ranks of a group.

use std::sync::Arc;

use tensorwire_core::{Error, Result};

use super::layout::PAGE;
use super::memory::{About, HUGE, Kind, Memory, Part};
use crate::liveness::Liveness;

/// Equal blocks of memory, one a rank, that every rank of the group maps. The last rank to drop it returns
/// the memory to the system; one that has ended doesn't keep it.
#[derive(Debug)]
pub struct Region {
    part: Part,
    liveness: Liveness,
    world: usize,
    rank: usize,
    bytes: usize,
    /// Where its group's own part of the memory starts.
    group: u64,
}

/// Bytes from which a block is made of huge pages, and rounded up to them.
const HUGE_FROM: usize = 1 << 20;

impl Region {
    /// The size of the pages that blocks of `bytes` are made of.
    fn page(bytes: usize) -> usize {
        if bytes >= HUGE_FROM { HUGE as usize } else { PAGE }
    }

    /// Bytes of the whole, behind a page for the part's head.
    pub(super) fn len(world: usize, bytes: usize) -> Result<usize> {
        let page = Region::page(bytes);
        let len = bytes.checked_next_multiple_of(page).and_then(|s| s.checked_mul(world)?.checked_add(page));
        len.filter(|l| *l < 1 << 46).ok_or_else(|| {
            Error::invalid(format!(
                "{world} symmetric buffers of {bytes} bytes are more than can be addressed"
            ))
        })
    }

    /// Takes memory for `world` blocks. Returns where it starts.
    pub(super) fn take(memory: &Memory, world: usize, bytes: usize) -> Result<u64> {
        memory.take(About { kind: Kind::Region, world, bytes }, Region::len(world, bytes)?)
    }

    pub(super) fn map(
        group: &Part,
        start: u64,
        world: usize,
        rank: usize,
        bytes: usize,
        liveness: &Liveness,
    ) -> Result<Region> {
        let (memory, len) = (group.memory(), Region::len(world, bytes)?);
        let part = memory.map(start, len).inspect_err(|_| {
            // The others let go of it too, and the last one gives it back.
            if let Ok(head) = memory.map_head(start, len, PAGE) {
                head.leave(rank, world, |r| liveness.ended(r));
            }
        })?;
        let region = Region { part, liveness: liveness.clone(), world, rank, bytes, group: group.start() };
        if bytes > 0 {
            let (page, offset) = (Region::page(bytes), region.offset(rank));
            let reserved = bytes.next_multiple_of(page);
            memory.reserve(start + offset as u64, reserved)?;
            if page > PAGE {
                region.part.make_huge(offset, reserved);
            }
        }
        Ok(region)
    }

    pub(super) fn is_of(&self, group: &Part) -> bool {
        Arc::ptr_eq(self.part.memory(), group.memory()) && self.group == group.start()
    }

    /// A number that no other region of the memory has, the same on every rank.
    pub fn id(&self) -> u32 {
        (self.part.start() / HUGE) as u32
    }

    fn offset(&self, rank: usize) -> usize {
        let page = Region::page(self.bytes);
        page + rank * self.bytes.next_multiple_of(page)
    }

    /// The rank whose view this is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    /// Bytes of one block.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of a rank's block of [`bytes`](Region::bytes) bytes, aligned to a page.
    pub fn block(&self, rank: usize) -> *mut u8 {
        assert!(rank < self.world);
        self.part.at(self.offset(rank))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.part.leave(self.rank, self.world, |rank| self.liveness.ended(rank));
    }
}
