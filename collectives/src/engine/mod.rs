//! Moves and reduces the data of each collective: through shared memory, step by step, or (`net`) over TCP or MPI.
//!
//! What is for shared memory works on bytes and on the step protocol of [`Group`]. Nothing allocates, locks or makes a
//! system call unless a peer is late, but for `single_copy`, whose copies are system calls.

mod all_reduce;
mod blocks;
#[cfg(feature = "mpi")]
mod by_mpi;
mod copy;
mod either;
mod fused;
#[cfg(feature = "tcp")]
mod lanes;
#[cfg(feature = "tcp")]
mod links;
#[cfg(feature = "tcp")]
mod mixed;
#[cfg(feature = "tcp")]
mod net;
#[cfg(feature = "tcp")]
mod network;
#[cfg(feature = "tcp")]
mod pipeline;
mod single_copy;
mod symmetric;
mod writer;

#[cfg(feature = "tcp")]
use tensorwire_core::Wire;
use tensorwire_core::{Call, DType, Error, ReduceOp};
use tensorwire_transports::shm::{Failure, Group, Incoming, Outgoing};

#[cfg(feature = "tcp")]
use crate::reduce;
use crate::reduce::{Kernel, Kernels};
#[cfg(feature = "tcp")]
use crate::select::Algorithm;
use crate::select::Selection;

use writer::Writer;

pub(crate) use either::{Either, with_engine};
pub(crate) use fused::Epilogue;
#[cfg(feature = "tcp")]
pub(crate) use lanes::Lanes;
#[cfg(feature = "tcp")]
pub(crate) use net::NetEngine;
#[cfg(feature = "tcp")]
pub(crate) use network::{Network, Rules};
#[cfg(feature = "tcp")]
pub(crate) use pipeline::{Owned, Progress, Request};

/// Bytes that are reduced before they are copied on, while they are still in the first-level cache.
const REDUCE_BLOCK: usize = 16 << 10;

#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) group: Group,
    pub(crate) selection: Selection,
    /// Bytes that a rank puts into one step of a pipelined collective, at most; the same on every rank.
    chunk: usize,
    /// Bytes of a block above which ranks read it where it lies.
    single_copy_above: usize,
    /// Whether they can, and it pays; and after how many such calls it is tried again.
    single_copy_pays: bool,
    until_trial: u32,
    writer: Writer,
    /// Room for one pointer a rank, so that a call need not allocate.
    sources: Sources,
    /// The same for what a rank offers each to be read.
    offers: Vec<u64>,
}

/// How elements are reduced: their type, the operation, and the kernel for both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reduction {
    dtype: DType,
    op: ReduceOp,
    kernel: Kernel,
    /// Bytes of an element.
    size: usize,
}

impl Reduction {
    /// # Errors
    /// [`Error::InvalidArgument`] where the operation isn't defined for the type.
    #[inline]
    pub(crate) fn new(dtype: DType, op: ReduceOp) -> Result<Reduction, Error> {
        match Kernels::best().get(dtype, op) {
            Some(kernel) => Ok(Reduction { dtype, op, kernel, size: dtype.size() }),
            None => Err(Error::invalid(format!("{op} is not defined for {dtype}"))),
        }
    }

    /// Whether an algorithm gives the bits of this reduction in rank order.
    #[cfg(feature = "tcp")]
    pub(crate) fn keeps_order(&self, algorithm: Algorithm) -> bool {
        algorithm.keeps_order(self.dtype, self.op)
    }

    /// The same of elements in fewer bits; `None` where that saves nothing, or isn't defined.
    #[cfg(feature = "tcp")]
    pub(crate) fn encoded(&self, wire: Wire) -> Option<Encoded> {
        let codec = reduce::Codec::new(wire, self.dtype, self.op)?;
        let reduction = Reduction { kernel: codec.kernel, size: codec.unit, ..*self };
        Some(Encoded { codec, reduction, element: self.size })
    }

    /// The reduction of sums of some ranks: what each rank contributes to it is [alone](Reduction::alone), and what comes
    /// out is to be [finished](Reduction::finish).
    #[cfg(feature = "tcp")]
    fn partial(&self) -> Reduction {
        match self.op {
            ReduceOp::Average | ReduceOp::PreScaledSum(_) => {
                Reduction::new(self.dtype, ReduceOp::Sum).expect("a sum is defined for every type")
            }
            _ => *self,
        }
    }

    /// Makes the reduction of `world` ranks' contributions of their [partial](Reduction::partial) one.
    #[cfg(feature = "tcp")]
    fn finish(&self, output: &mut [u8], world: usize) {
        if self.op == ReduceOp::Average {
            reduce::divide(self.dtype, output, world);
        }
    }

    /// Reduces `sources`, in order, into `output`; all of one length, and aligned for the type.
    #[cfg(feature = "tcp")]
    fn reduce_all(&self, output: &mut [u8], sources: &[&[u8]]) {
        assert!(sources.iter().all(|s| s.len() == output.len()));
        let sources: Vec<*const u8> = sources.iter().map(|s| s.as_ptr()).collect();
        // SAFETY: 1. each source has the output's length, checked above; 2. the borrows say that it overlaps none.
        unsafe { self.run(output.as_mut_ptr(), &sources, output.len()) }
    }

    /// The reduction of one rank's buffer alone: its elements themselves, but for a factor.
    pub(crate) fn alone(&self, mut data: Buffers<'_>) {
        if self.op.factor() != 1.0 {
            let len = data.output.len();
            data.reduce(self, 0..len, 0, &mut Sources(vec![std::ptr::null()]), |_, _| &[]);
        } else if let Some(input) = data.input {
            data.output.copy_from_slice(input);
        }
    }
}

/// A reduction of elements that are sent in fewer bits.
#[cfg(feature = "tcp")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Encoded {
    codec: reduce::Codec,
    /// Of what is sent.
    reduction: Reduction,
    /// Bytes of an element.
    element: usize,
}

#[cfg(feature = "tcp")]
impl Encoded {
    /// What `bytes` of elements become.
    pub(crate) fn bytes(&self, bytes: usize) -> usize {
        self.codec.units(bytes / self.element) * self.codec.unit
    }
}

/// A rank's contribution and where its result goes: two buffers of one length, or one for both. Where a rank gets
/// no result, its output isn't looked at unless it is the contribution.
#[derive(Debug)]
pub(crate) struct Buffers<'a> {
    pub(crate) input: Option<&'a [u8]>,
    pub(crate) output: &'a mut [u8],
}

impl Buffers<'_> {
    pub(crate) fn in_place(buf: &mut [u8]) -> Buffers<'_> {
        Buffers { input: None, output: buf }
    }

    #[inline]
    fn input(&self) -> &[u8] {
        self.input.unwrap_or(self.output)
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.input().len()
    }

    /// Reduces the bytes `range` of this rank's contribution with the peers', in rank order, into the same
    /// bytes of the output. `theirs(peer, len)` is at least `len` bytes, aligned for the type.
    #[inline]
    fn reduce<'b>(
        &mut self,
        r: &Reduction,
        range: std::ops::Range<usize>,
        rank: usize,
        sources: &mut Sources,
        theirs: impl Fn(usize, usize) -> &'b [u8],
    ) {
        let output = &mut self.output[range.clone()];
        let dst = output.as_mut_ptr();
        let own = self.input.map_or(dst.cast_const(), |input| input[range].as_ptr());
        sources.gather(rank, own, output.len(), theirs);
        // SAFETY: `own` and `dst` have the output's length, and are one or don't overlap.
        unsafe { r.run(dst, &sources.0, output.len()) }
    }
}

/// One pointer a rank, to what the ranks contribute to a reduction.
#[derive(Debug)]
struct Sources(Vec<*const u8>);

// SAFETY: the pointers are written before each use, within one call; between calls they are never read.
unsafe impl Send for Sources {}

impl Sources {
    /// Points to `own` for this rank and to `len` bytes of `theirs` for each peer.
    #[inline]
    fn gather<'b>(
        &mut self,
        rank: usize,
        own: *const u8,
        len: usize,
        theirs: impl Fn(usize, usize) -> &'b [u8],
    ) {
        for (who, source) in self.0.iter_mut().enumerate() {
            *source = if who == rank { own } else { theirs(who, len)[..len].as_ptr() };
        }
    }
}

impl Reduction {
    /// Reduces `len` bytes of each of `sources` into `dst`.
    ///
    /// # Safety
    /// Each source is valid for reading `len` bytes and `dst` for writing them; `dst` is a source or overlaps
    /// none.
    #[inline]
    unsafe fn run(&self, dst: *mut u8, sources: &[*const u8], len: usize) {
        debug_assert!(sources.iter().all(|s| s.addr().trailing_zeros() >= self.size.trailing_zeros()));
        // SAFETY: (1) the caller vouches for the pointers; slots, flags and symmetric blocks are aligned to 16
        // bytes and more and are cut at whole elements, and the rank's own buffers were slices of elements;
        // (2) so does it for `dst`; (3) the kernels were chosen for this processor.
        unsafe { (self.kernel)(dst, sources.as_ptr(), sources.len(), len / self.size, self.op.factor()) }
    }
}

impl Engine {
    pub(crate) fn new(group: Group) -> Engine {
        let sources = Sources(vec![std::ptr::null(); group.world()]);
        let tuning = group.tuning();
        let selection = Selection::new(&tuning);
        Engine {
            chunk: tuning.chunk.min(group.slot_bytes()),
            single_copy_above: tuning.single_copy_above,
            single_copy_pays: false,
            until_trial: 0,
            selection,
            offers: Vec::with_capacity(group.world()),
            group,
            writer: Writer::new(),
            sources,
        }
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

    /// See [`Group::send_recv`].
    #[inline]
    pub(crate) fn send_recv(
        &mut self,
        dtype: DType,
        out: Option<Outgoing<'_>>,
        into: Option<Incoming<'_>>,
    ) -> Result<(), Failure> {
        self.group.send_recv(dtype, out, into)
    }

    pub(crate) fn barrier(&mut self) -> Result<(), Failure> {
        let step = self.group.next_step()?;
        self.group.publish();
        self.group.wait_all(step)
    }

    /// Copies `from` into the slot of the step that the rank is in, from byte `at` on.
    #[inline]
    fn write_slot(&mut self, at: usize, from: &[u8]) {
        self.writer.write(&mut self.group.slot()[at..at + from.len()], from);
    }

    /// Asks for the `bytes` of the slot that the next step will write, if it helps.
    #[inline]
    fn prefetch_slot(&self, bytes: usize) {
        if self.writer.through_caches() {
            self.group.prefetch(bytes);
        }
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world) = (self.group.rank(), self.group.world());
        (0..world).filter(move |who| *who != rank)
    }

    /// `count` rounds in which ranks write their slots and read their peers', the reading one round behind the
    /// writing. `write(output, i)` fills this rank's slot for round `i`; `meanwhile(i)` does what needs no peer
    /// once it is published; `read(i, step)` uses what the ranks in `sources` wrote for it. What round `i` reads
    /// may lie where round `i` wrote from, which is how blocks are exchanged in place.
    fn rounds(
        &mut self,
        count: usize,
        sources: impl Fn(usize) -> bool,
        mut write: impl FnMut(&mut Engine, &mut [u8], usize),
        mut meanwhile: impl FnMut(&mut [u8], usize),
        mut read: impl FnMut(&mut Engine, &mut [u8], usize, u64),
        output: &mut [u8],
    ) -> Result<(), Failure> {
        // An empty exchange is a step too: it shows whether the ranks agree.
        let count = count.max(1);
        let mut published = 0;
        for t in 0..=count {
            let step = if t < count { self.group.next_step()? } else { 0 };
            if t < count {
                write(self, output, t);
            }
            if t > 0 {
                for who in self.peers().filter(|who| sources(*who)) {
                    self.group.wait(who, published)?;
                }
                read(self, output, t - 1, published);
            }
            if t < count {
                self.group.publish();
                published = step;
                self.prefetch_slot(usize::MAX);
                meanwhile(output, t);
            }
        }
        Ok(())
    }
}
