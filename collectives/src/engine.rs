//! Moves and reduces the data of each collective through shared memory, step by step.
//!
//! Everything here works on bytes and on the step protocol of [`Group`]. Nothing allocates, locks or makes a
//! system call unless a peer is late.

use std::ops::Range;

use tensorwire_core::{Call, DType, Error, ReduceOp};
use tensorwire_transports::shm::{Failure, Group, INLINE};

use crate::reduce::{Kernel, Kernels};
use crate::schedule::{Pieces, part};
use crate::select::Algorithm;

/// Bytes of a two-shot all-reduce that travel in one step: small enough for the chunk's copies to stay in the
/// second-level cache, large enough for a step's latency not to matter.
const CHUNK: usize = 256 << 10;

/// Bytes that are reduced before their copy for the peers is made, while they are still in the first-level
/// cache.
const REDUCE_BLOCK: usize = 8 << 10;

#[derive(Debug)]
pub(crate) struct Engine {
    group: Group,
    /// Room for one pointer a rank, so that a call need not allocate.
    sources: Sources,
}

/// How elements are reduced: their type, the operation, and the kernel for both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reduction {
    dtype: DType,
    kernel: Kernel,
    factor: f64,
}

impl Reduction {
    /// # Errors
    /// [`Error::InvalidArgument`] where the operation isn't defined for the type.
    #[inline]
    pub(crate) fn new(dtype: DType, op: ReduceOp) -> Result<Reduction, Failure> {
        match Kernels::best().get(dtype, op) {
            Some(kernel) => Ok(Reduction { dtype, kernel, factor: op.factor() }),
            None => Err(Box::new(Error::invalid(format!("{op} is not defined for {dtype}")))),
        }
    }

    /// The reduction of one rank's buffer alone: its elements themselves, but for a factor.
    pub(crate) fn alone(&self, buf: &mut [u8]) {
        if self.factor != 1.0 {
            reduce(self, buf, 0, &mut Sources(vec![std::ptr::null()]), |_, _| &[]);
        }
    }
}

#[derive(Debug)]
struct Sources(Vec<*const u8>);

// SAFETY: the pointers are written before each use, within one call; between calls they are never read.
unsafe impl Send for Sources {}

impl Engine {
    pub(crate) fn new(group: Group) -> Engine {
        let sources = Sources(vec![std::ptr::null(); group.world()]);
        Engine { group, sources }
    }

    pub(crate) fn slot_bytes(&self) -> usize {
        self.group.slot_bytes()
    }

    /// Runs `body` as the call `call`.
    #[inline]
    pub(crate) fn run(
        &mut self,
        call: Call,
        body: impl FnOnce(&mut Engine) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.group.begin(call)?;
        body(self)?;
        self.group.end();
        Ok(())
    }

    #[inline]
    pub(crate) fn all_reduce(
        &mut self,
        buf: &mut [u8],
        r: &Reduction,
        algorithm: Algorithm,
    ) -> Result<(), Failure> {
        match algorithm {
            Algorithm::Inline => self.all_reduce_inline(buf, r),
            Algorithm::OneShot => self.all_reduce_one_shot(buf, r),
            Algorithm::TwoShot => self.all_reduce_two_shot(buf, r),
        }
    }

    #[inline]
    fn all_reduce_inline(&mut self, buf: &mut [u8], r: &Reduction) -> Result<(), Failure> {
        let step = self.group.next_step()?;
        self.group.publish_inline(buf);
        self.group.wait_all(step)?;
        let Engine { group, sources, .. } = self;
        reduce(r, buf, group.rank(), sources, |peer, _| &group.peer_inline(peer, step)[..]);
        Ok(())
    }

    fn all_reduce_one_shot(&mut self, buf: &mut [u8], r: &Reduction) -> Result<(), Failure> {
        let step = self.group.next_step()?;
        self.group.slot()[..buf.len()].copy_from_slice(buf);
        self.group.publish();
        self.group.wait_all(step)?;
        let Engine { group, sources, .. } = self;
        reduce(r, buf, group.rank(), sources, |peer, _| group.peer_slot(peer, step));
        Ok(())
    }

    /// In step `t`, counted from the call's first, each rank publishes chunk `t` (but for its own part) and
    /// its reduced part of chunk `t - 1`, and gathers the peers' reduced parts of chunk `t - 2`.
    fn all_reduce_two_shot(&mut self, buf: &mut [u8], r: &Reduction) -> Result<(), Failure> {
        let (rank, world, size) = (self.group.rank(), self.group.world(), r.dtype.size());
        // A slot holds a chunk and, behind it, a reduced part, which is at most half a chunk and a line.
        let chunk_bytes = CHUNK.min(self.group.slot_bytes() / 2) / 64 * 64;
        let chunks = Pieces::new(buf.len() / size, size, chunk_bytes);
        // The bytes of `buf` that are `who`'s part of chunk `i`.
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
                for who in (0..world).filter(|who| *who != rank) {
                    let part = part_of(t, who);
                    self.group.slot()[part.start - start..part.end - start].copy_from_slice(&buf[part]);
                }
            }
            if t > 0 {
                self.group.wait_all(before)?;
            }
            if t > 0 && t <= count {
                let start = chunks.range(t - 1).start * size;
                self.reduce_part(buf, r, part_of(t - 1, rank), start, before, chunk_bytes);
            }
            if t > 1 {
                for who in (0..world).filter(|who| *who != rank) {
                    let part = part_of(t - 2, who);
                    let reduced = &self.group.peer_slot(who, before)[chunk_bytes..][..part.len()];
                    buf[part].copy_from_slice(reduced);
                }
            }
            if t <= count {
                self.group.publish();
            }
        }
        Ok(())
    }

    /// Reduces this rank's part of the chunk at byte `start`, which the peers published in step `before`, into
    /// `buf` and into this rank's slot at `result`.
    fn reduce_part(
        &mut self,
        buf: &mut [u8],
        r: &Reduction,
        part: Range<usize>,
        start: usize,
        before: u64,
        result: usize,
    ) {
        let Engine { group, sources, .. } = self;
        for at in part.clone().step_by(REDUCE_BLOCK) {
            let block = at..(at + REDUCE_BLOCK).min(part.end);
            let out = &mut buf[block.clone()];
            reduce(r, out, group.rank(), sources, |peer, len| {
                &group.peer_slot(peer, before)[block.start - start..][..len]
            });
            let to = result + block.start - part.start;
            group.slot()[to..to + out.len()].copy_from_slice(out);
        }
    }

    /// `blocks[r]` are the bytes of `output` that rank `r` contributes; a rank's own are `input`.
    pub(crate) fn all_gather(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
    ) -> Result<(), Failure> {
        let (rank, world, slot) = (self.group.rank(), self.group.world(), self.group.slot_bytes());
        output[block(rank)].copy_from_slice(input);
        let longest = (0..world).map(|r| block(r).len()).max().unwrap_or(0);
        if longest <= INLINE {
            let step = self.group.next_step()?;
            self.group.publish_inline(input);
            self.group.wait_all(step)?;
            for who in (0..world).filter(|who| *who != rank) {
                let to = &mut output[block(who)];
                to.copy_from_slice(&self.group.peer_inline(who, step)[..to.len()]);
            }
            return Ok(());
        }
        let pieces = |who: usize| Pieces::new(block(who).len(), 1, CHUNK.min(slot));
        let count = Pieces::new(longest, 1, CHUNK.min(slot)).count();
        self.rounds(
            count,
            |engine, write| {
                let own = &input[pieces(rank).range(write)];
                engine.group.slot()[..own.len()].copy_from_slice(own);
            },
            |engine, read, step| {
                for who in (0..world).filter(|who| *who != rank) {
                    let piece = pieces(who).range(read);
                    let from = block(who).start;
                    output[from + piece.start..from + piece.end]
                        .copy_from_slice(&engine.group.peer_slot(who, step)[..piece.len()]);
                }
            },
        )
    }

    /// Block `r` of `input`'s `world` equal blocks is reduced into rank `r`'s `output`.
    pub(crate) fn reduce_scatter(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        r: &Reduction,
    ) -> Result<(), Failure> {
        let (rank, world, size) = (self.group.rank(), self.group.world(), r.dtype.size());
        let block = output.len();
        output.copy_from_slice(&input[rank * block..][..block]);
        // A slot holds a piece for each rank, each from a cache line of its own.
        let room = (CHUNK.min(self.group.slot_bytes()) / world / 64 * 64).max(64);
        let pieces = Pieces::new(block / size, size, room);
        let bytes = |i: usize| pieces.range(i).start * size..pieces.range(i).end * size;
        self.rounds(
            pieces.count(),
            |engine, write| {
                let piece = bytes(write);
                for who in (0..world).filter(|who| *who != rank) {
                    let from = &input[who * block..][piece.clone()];
                    engine.group.slot()[who * room..][..from.len()].copy_from_slice(from);
                }
            },
            |engine, read, step| {
                let Engine { group, sources, .. } = engine;
                let out = &mut output[bytes(read)];
                reduce(r, out, rank, sources, |peer, len| &group.peer_slot(peer, step)[rank * room..][..len]);
            },
        )
    }

    /// `count` rounds in which every rank writes its slot for the peers and reads theirs, the reading one
    /// round behind the writing. `write(i)` fills the slot for round `i`; `read(i, step)` uses what the peers
    /// wrote.
    fn rounds(
        &mut self,
        count: usize,
        mut write: impl FnMut(&mut Engine, usize),
        mut read: impl FnMut(&mut Engine, usize, u64),
    ) -> Result<(), Failure> {
        // An empty exchange is a step too: it shows whether the ranks agree.
        let count = count.max(1);
        let mut published = 0;
        for t in 0..=count {
            let step = if t < count { self.group.next_step()? } else { 0 };
            if t < count {
                write(self, t);
            }
            if t > 0 {
                self.group.wait_all(published)?;
                read(self, t - 1, published);
            }
            if t < count {
                self.group.publish();
                published = step;
            }
        }
        Ok(())
    }

    pub(crate) fn broadcast(&mut self, buf: &mut [u8], root: usize) -> Result<(), Failure> {
        let pieces = Pieces::new(buf.len(), 1, CHUNK.min(self.group.slot_bytes()));
        // An empty broadcast is a step too: it shows whether the ranks agree.
        for i in 0..pieces.count().max(1) {
            let piece = &mut buf[pieces.range(i)];
            let step = self.group.next_step()?;
            let inline = piece.len() <= INLINE;
            if self.group.rank() == root {
                if inline {
                    self.group.publish_inline(piece);
                } else {
                    self.group.slot()[..piece.len()].copy_from_slice(piece);
                    self.group.publish();
                }
            } else {
                self.group.publish();
                self.group.wait(root, step)?;
                let from = if inline {
                    &self.group.peer_inline(root, step)[..]
                } else {
                    self.group.peer_slot(root, step)
                };
                piece.copy_from_slice(&from[..piece.len()]);
            }
        }
        Ok(())
    }

    pub(crate) fn barrier(&mut self) -> Result<(), Failure> {
        let step = self.group.next_step()?;
        self.group.publish();
        self.group.wait_all(step)
    }
}

/// Reduces `out`, this rank's own contribution, with the peers' into `out`, in rank order. `theirs(peer, len)`
/// is at least `len` bytes, aligned for the type.
#[inline]
fn reduce<'a>(
    r: &Reduction,
    out: &mut [u8],
    rank: usize,
    sources: &mut Sources,
    theirs: impl Fn(usize, usize) -> &'a [u8],
) {
    let len = out.len();
    let dst = out.as_mut_ptr();
    for (who, source) in sources.0.iter_mut().enumerate() {
        *source = if who == rank { dst.cast_const() } else { theirs(who, len)[..len].as_ptr() };
        debug_assert!(source.addr().is_multiple_of(r.dtype.size()));
    }
    // SAFETY: (1) each source has `len` bytes, sliced above, and so has `dst`; slots and flags are aligned to
    // 16 bytes and more and are cut at whole elements, and `out` was a slice of elements; (2) `dst` is the
    // source of this rank and no peer's; (3) the kernels were chosen for this processor.
    unsafe { (r.kernel)(dst, sources.0.as_ptr(), sources.0.len(), len / r.dtype.size(), r.factor) }
}
