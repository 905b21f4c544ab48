//! All-reduce, and reduce to a root, which is the same without telling the others.

use std::ops::Range;

use tensorwire_transports::shm::Failure;

use super::copy::copy_from_peer;
use super::{Buffers, Engine, REDUCE_BLOCK, Reduction};
use crate::schedule::{Pieces, part};
use crate::select::Algorithm;

impl Engine {
    /// Reduces every rank's input into every rank's output, or into `root`'s alone.
    #[inline(always)]
    pub(crate) fn all_reduce(
        &mut self,
        data: Buffers<'_>,
        r: &Reduction,
        algorithm: Algorithm,
        root: Option<usize>,
    ) -> Result<(), Failure> {
        self.all_reduce_then(data, r, algorithm, root, |_, _| {})
    }

    /// As [`all_reduce`](Engine::all_reduce). Calls `arrived` with the output and how many of its bytes are the
    /// result, whenever there are more.
    #[inline(always)]
    pub(super) fn all_reduce_then(
        &mut self,
        data: Buffers<'_>,
        r: &Reduction,
        algorithm: Algorithm,
        root: Option<usize>,
        arrived: impl FnMut(&mut [u8], usize),
    ) -> Result<(), Failure> {
        self.group.note(algorithm.label());
        match algorithm {
            Algorithm::Inline => self.all_reduce_inline(data, r, root, arrived),
            Algorithm::OneShot => self.all_reduce_one_shot(data, r, root, arrived),
            // Memory that no peer maps goes through the slots.
            // The rest are refused where an algorithm is set.
            _ => self.all_reduce_two_shot(data, r, root, arrived),
        }
    }

    fn wants(&self, root: Option<usize>) -> bool {
        root.is_none_or(|root| root == self.group.rank())
    }

    /// Each rank publishes its whole input in the flag's cache line, and reduces everybody's.
    #[inline(always)]
    fn all_reduce_inline(
        &mut self,
        mut data: Buffers<'_>,
        r: &Reduction,
        root: Option<usize>,
        mut arrived: impl FnMut(&mut [u8], usize),
    ) -> Result<(), Failure> {
        let step = self.group.next_step()?;
        self.group.publish_inline(data.input());
        if self.wants(root) {
            self.group.wait_all(step)?;
            let Engine { group, sources, .. } = self;
            let len = data.len();
            data.reduce(r, 0..len, group.rank(), sources, |peer, _| &group.peer_inline(peer, step)[..]);
            arrived(data.output, len);
        }
        Ok(())
    }

    /// Each rank publishes its whole input, a chunk a step, and reduces everybody's, one step behind.
    fn all_reduce_one_shot(
        &mut self,
        mut data: Buffers<'_>,
        r: &Reduction,
        root: Option<usize>,
        mut arrived: impl FnMut(&mut [u8], usize),
    ) -> Result<(), Failure> {
        let (rank, size) = (self.group.rank(), r.dtype.size());
        // The first chunk is reduced alone and the last one published alone: a few of them are worth more than few
        // steps.
        let chunk_bytes = (data.len() / 4).clamp(self.chunk / 2, self.chunk);
        let chunks = Pieces::new(data.len() / size, size, chunk_bytes);
        self.group.use_slots(chunks.range(0).len() * size);
        // An empty exchange is a step too: it shows whether the ranks agree.
        let count = chunks.count().max(1);
        let bytes = |i: usize| {
            let chunk = chunks.range(i);
            chunk.start * size..chunk.end * size
        };
        let mut last = 0;
        for t in 0..=count {
            let before = last;
            if t < count {
                last = self.group.next_step()?;
                let chunk = bytes(t);
                self.write_slot(0, &data.input()[chunk]);
                if t == 0 {
                    self.group.publish();
                    self.prefetch_slot(chunks.range(0).len() * size);
                }
            }
            if t > 0 && self.wants(root) {
                self.group.wait_all(before)?;
                let Engine { group, sources, .. } = self;
                data.reduce(r, bytes(t - 1), rank, sources, |peer, len| {
                    &group.peer_slot(peer, before)[..len]
                });
            }
            if t > 0 && t < count {
                self.group.publish();
            }
            if t > 0 && self.wants(root) {
                arrived(data.output, bytes(t - 1).end);
            }
        }
        Ok(())
    }

    /// In step `t`, counted from the call's first, each rank publishes chunk `t` (but for its own part) and
    /// its reduced part of chunk `t - 1`, and gathers the peers' reduced parts of chunk `t - 2`.
    fn all_reduce_two_shot(
        &mut self,
        mut data: Buffers<'_>,
        r: &Reduction,
        root: Option<usize>,
        mut arrived: impl FnMut(&mut [u8], usize),
    ) -> Result<(), Failure> {
        let (rank, world, size) = (self.group.rank(), self.group.world(), r.dtype.size());
        let wanted = self.wants(root);
        // A slot holds a chunk and, behind it, a reduced part, which is at most half a chunk and a line. Both together
        // are what a step moves.
        let chunk_bytes = (self.chunk / 2).min(self.group.slot_bytes() / 2) / 64 * 64;
        let chunks = Pieces::new(data.len() / size, size, chunk_bytes);
        let reduced_bytes = part(chunks.range(0).len(), size, world, 0).len() * size;
        self.group.use_slots(chunk_bytes + reduced_bytes);
        // The bytes of the buffer that are `who`'s part of chunk `i`.
        let part_of = |i: usize, who: usize| {
            let chunk = chunks.range(i);
            let p = part(chunk.len(), size, world, who);
            (chunk.start + p.start) * size..(chunk.start + p.end) * size
        };
        let count = chunks.count();
        let mut last = 0;
        for t in 0..count + 2 {
            if t <= count {
                last = self.group.next_step()?;
            }
            // The peers' data of the step before: in the last round, this rank's last published one.
            let before = if t <= count { last - 1 } else { last };
            if t < count {
                let start = chunks.range(t).start * size;
                for who in self.peers() {
                    let part = part_of(t, who);
                    self.write_slot(part.start - start, &data.input()[part]);
                }
            }
            if t > 0 && (t <= count || wanted) {
                self.group.wait_all(before)?;
            }
            if t > 0 && t <= count {
                let chunk = chunks.range(t - 1).start * size;
                self.reduce_part(&mut data, r, part_of(t - 1, rank), chunk, before, chunk_bytes, root);
            }
            if t > 1 && wanted {
                for who in self.peers() {
                    let part = part_of(t - 2, who);
                    let reduced = &self.group.peer_slot(who, before)[chunk_bytes..][..part.len()];
                    copy_from_peer(&mut data.output[part], reduced);
                }
            }
            if t <= count {
                self.group.publish();
            }
            if t > 1 && wanted {
                arrived(data.output, chunks.range(t - 2).end * size);
            }
        }
        Ok(())
    }

    /// Reduces this rank's part of the chunk at byte `chunk`, which the peers published in step `before`, into
    /// the output and into this rank's slot at `result`, as far as this rank and its peers want it.
    #[expect(clippy::too_many_arguments, reason = "one step of the loop above, which is long enough")]
    fn reduce_part(
        &mut self,
        data: &mut Buffers<'_>,
        r: &Reduction,
        part: Range<usize>,
        chunk: usize,
        before: u64,
        result: usize,
        root: Option<usize>,
    ) {
        let wanted = self.wants(root);
        let Engine { group, sources, writer, .. } = self;
        let rank = group.rank();
        for at in part.clone().step_by(REDUCE_BLOCK) {
            let block = at..(at + REDUCE_BLOCK).min(part.end);
            let to = result + block.start - part.start;
            let theirs = |peer, len| &group.peer_slot(peer, before)[block.start - chunk..][..len];
            if wanted {
                data.reduce(r, block.clone(), rank, sources, theirs);
                if root.is_none() {
                    writer.write(&mut group.slot()[to..to + block.len()], &data.output[block]);
                }
            } else {
                sources.gather(rank, data.input()[block.clone()].as_ptr(), block.len(), theirs);
                let dst = group.slot()[to..to + block.len()].as_mut_ptr();
                // SAFETY: all have the block's length; this rank's slot for the step being written overlaps
                // neither its own buffer nor any peer's slot.
                unsafe { r.run(dst, &sources.0, block.len()) }
            }
        }
    }
}
