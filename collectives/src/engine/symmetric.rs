//! All-reduce in memory that every rank maps: nothing is copied to be sent.

use std::slice;

use tensorwire_transports::shm::{Failure, Region};

use super::{Engine, REDUCE_BLOCK, Reduction};
use crate::schedule::part;
use crate::select::Algorithm;

impl Engine {
    /// Each rank reduces its part of the first `bytes` of all blocks and writes it to all of them. Two steps;
    /// a rank reads `S`, writes `S`, and reduces `S / n`.
    pub(crate) fn all_reduce_symmetric(
        &mut self,
        region: &Region,
        bytes: usize,
        r: &Reduction,
    ) -> Result<(), Failure> {
        let (rank, world, size) = (self.group.rank(), self.group.world(), r.dtype.size());
        assert!(bytes <= region.bytes());
        self.group.note(Algorithm::Symmetric.label());
        // Every rank's block may be touched by its peers between these two steps, and only there.
        let step = self.group.next_step()?;
        self.group.publish();
        self.group.wait_all(step)?;
        let part = part(bytes / size, size, world, rank);
        let (start, end) = (part.start * size, part.end * size);
        for at in (start..end).step_by(REDUCE_BLOCK) {
            let len = REDUCE_BLOCK.min(end - at);
            for (who, source) in self.sources.0.iter_mut().enumerate() {
                // SAFETY: `at` is below `bytes`, which each block has.
                *source = unsafe { region.block(who).add(at) };
            }
            let mine = self.sources.0[rank].cast_mut();
            // SAFETY: (1) each block has `len` bytes from `at` on; (2) `mine` is this rank's source; (3) all
            // ranks are between the two steps, and this rank alone touches these bytes of any block.
            unsafe { r.run(mine, &self.sources.0, len) };
            for who in self.peers() {
                let theirs = self.sources.0[who].cast_mut();
                // SAFETY: as above; blocks don't overlap.
                let (to, from) =
                    unsafe { (slice::from_raw_parts_mut(theirs, len), slice::from_raw_parts(mine, len)) };
                self.writer.write(to, from);
            }
        }
        let step = self.group.next_step()?;
        self.group.publish();
        self.group.wait_all(step)
    }
}
