//! The collectives, each a check of its arguments and a call of the engine.

use std::ops::Range;

use tensorwire_core::{Call, Element, Error, Op, ReduceOp, Result};
use tensorwire_transports::shm::{Incoming, Outgoing};

use super::Communicator;
use crate::engine::{Buffers, Reduction, with_engine};

impl Communicator {
    /// Reduces every rank's `buf`, element by element, and leaves the result in it on every rank.
    ///
    /// # Errors
    /// See [`Communicator`]; [`Error::InvalidArgument`] if the operation isn't defined for the type.
    #[inline]
    pub fn all_reduce<T: Element>(&self, buf: &mut [T], op: ReduceOp) -> Result<()> {
        self.all_reduce_bytes::<T>(Buffers::in_place(bytemuck::cast_slice_mut(buf)), op)
    }

    /// Reduces every rank's `input`, element by element, into every rank's `output`, of the same length.
    ///
    /// # Errors
    /// As for [`all_reduce`](Communicator::all_reduce), and if the lengths differ.
    pub fn all_reduce_into<T: Element>(&self, input: &[T], output: &mut [T], op: ReduceOp) -> Result<()> {
        self.expect("all_reduce: output", "as many as input", Some(input.len()), output.len())?;
        let input = Some(bytemuck::cast_slice(input));
        self.all_reduce_bytes::<T>(Buffers { input, output: bytemuck::cast_slice_mut(output) }, op)
    }

    #[inline]
    fn all_reduce_bytes<T: Element>(&self, data: Buffers<'_>, op: ReduceOp) -> Result<()> {
        let bytes = data.output.len();
        let call = Call { reduce: Some(op), ..call::<T>(Op::AllReduce, bytes / size_of::<T>()) };
        let reduction = Reduction::new(T::DTYPE, op)?;
        if self.world == 1 {
            reduction.alone(data);
            return Ok(());
        }
        self.run(|state| {
            let algorithm = state.choose(bytes, &reduction)?;
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.all_reduce(data, &reduction, algorithm, None)))
        })
    }

    /// Reduces every rank's `buf`, element by element, and leaves the result in it on rank `root`; the others'
    /// stay as they are.
    ///
    /// # Errors
    /// As for [`all_reduce`](Communicator::all_reduce), and if `root` is no rank.
    pub fn reduce<T: Element>(&self, buf: &mut [T], op: ReduceOp, root: usize) -> Result<()> {
        let root = self.root("reduce", root)?;
        self.reduce_bytes::<T>(Buffers::in_place(bytemuck::cast_slice_mut(buf)), op, root)
    }

    pub(super) fn reduce_bytes<T: Element>(
        &self,
        data: Buffers<'_>,
        op: ReduceOp,
        root: usize,
    ) -> Result<()> {
        let count = data.len() / size_of::<T>();
        let call = Call { reduce: Some(op), root: Some(root as u32), ..call::<T>(Op::Reduce, count) };
        let reduction = Reduction::new(T::DTYPE, op)?;
        if self.world == 1 {
            reduction.alone(data);
            return Ok(());
        }
        self.run(|state| {
            let algorithm = state.choose_rooted(data.len(), &reduction)?;
            with_engine!(state.engine, |engine| engine.run(call, |engine| engine.all_reduce(
                data,
                &reduction,
                algorithm,
                Some(root)
            )))
        })
    }

    /// Concatenates every rank's `input`, in rank order, into `output` on every rank: `output` has
    /// `world * input.len()` elements.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit; else see [`Communicator`].
    pub fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.expect(
            "all_gather: output",
            "world x input",
            input.len().checked_mul(self.world),
            output.len(),
        )?;
        let call = call::<T>(Op::AllGather, output.len());
        self.gather_bytes(call, input, output, equal::<T>(input.len()), None)
    }

    /// Concatenates every rank's `input`, in rank order, into `output` on every rank, where rank `r`
    /// contributes `counts[r]` elements. Every rank gives the same `counts`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit; else see [`Communicator`].
    pub fn all_gather_v<T: Element>(&self, input: &[T], output: &mut [T], counts: &[usize]) -> Result<()> {
        let blocks = Blocks::new::<T>(self, "all_gather_v", counts)?;
        self.expect("all_gather_v: input", "counts[rank]", Some(counts[self.rank]), input.len())?;
        self.expect("all_gather_v: output", "the sum of counts", Some(blocks.total), output.len())?;
        let call = Call { layout: blocks.digest, ..call::<T>(Op::AllGather, output.len()) };
        self.gather_bytes(call, input, output, |r| blocks.of(r), None)
    }

    /// As [`all_gather`](Communicator::all_gather), on rank `root` alone; the others' `output` isn't looked at.
    ///
    /// # Errors
    /// As for [`all_gather`](Communicator::all_gather), and if `root` is no rank.
    pub fn gather<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        let root = self.root("gather", root)?;
        let total = input.len().checked_mul(self.world);
        if self.rank == root {
            self.expect("gather: output", "world x input", total, output.len())?;
        }
        let call = Call { root: Some(root as u32), ..call::<T>(Op::Gather, total.unwrap_or(0)) };
        self.gather_bytes(call, input, output, equal::<T>(input.len()), Some(root))
    }

    /// As [`all_gather_v`](Communicator::all_gather_v), on rank `root` alone; the others' `output` isn't looked
    /// at.
    ///
    /// # Errors
    /// As for [`all_gather_v`](Communicator::all_gather_v), and if `root` is no rank.
    pub fn gather_v<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
        root: usize,
    ) -> Result<()> {
        let root = self.root("gather_v", root)?;
        let blocks = Blocks::new::<T>(self, "gather_v", counts)?;
        self.expect("gather_v: input", "counts[rank]", Some(counts[self.rank]), input.len())?;
        if self.rank == root {
            self.expect("gather_v: output", "the sum of counts", Some(blocks.total), output.len())?;
        }
        let call = call::<T>(Op::Gather, blocks.total);
        let call = Call { layout: blocks.digest, root: Some(root as u32), ..call };
        self.gather_bytes(call, input, output, |r| blocks.of(r), Some(root))
    }

    fn gather_bytes<T: Element>(
        &self,
        call: Call,
        input: &[T],
        output: &mut [T],
        block: impl Fn(usize) -> Range<usize>,
        root: Option<usize>,
    ) -> Result<()> {
        if self.world == 1 {
            output.copy_from_slice(input);
            return Ok(());
        }
        let (input, output) = (Some(bytemuck::cast_slice(input)), bytemuck::cast_slice_mut(output));
        self.run(|state| {
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.all_gather(input, output, block, root)))
        })
    }

    /// Gives rank `r` block `r`, of `output.len()` elements, of rank `root`'s `input`, which has
    /// `world * output.len()`; the others' `input` isn't looked at.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit or `root` is no rank; else see [`Communicator`].
    pub fn scatter<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        let root = self.root("scatter", root)?;
        let total = output.len().checked_mul(self.world);
        if self.rank == root {
            self.expect("scatter: input", "world x output", total, input.len())?;
        }
        let call = Call { root: Some(root as u32), ..call::<T>(Op::Scatter, total.unwrap_or(0)) };
        let block = equal::<T>(output.len());
        self.scatter_bytes(call, input, output, block, root)
    }

    /// As [`scatter`](Communicator::scatter), with `counts[r]` elements for rank `r`. Every rank gives the same
    /// `counts`.
    ///
    /// # Errors
    /// As for [`scatter`](Communicator::scatter).
    pub fn scatter_v<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
        root: usize,
    ) -> Result<()> {
        let root = self.root("scatter_v", root)?;
        let blocks = Blocks::new::<T>(self, "scatter_v", counts)?;
        self.expect("scatter_v: output", "counts[rank]", Some(counts[self.rank]), output.len())?;
        if self.rank == root {
            self.expect("scatter_v: input", "the sum of counts", Some(blocks.total), input.len())?;
        }
        let call = call::<T>(Op::Scatter, blocks.total);
        let call = Call { layout: blocks.digest, root: Some(root as u32), ..call };
        self.scatter_bytes(call, input, output, |r| blocks.of(r), root)
    }

    fn scatter_bytes<T: Element>(
        &self,
        call: Call,
        input: &[T],
        output: &mut [T],
        block: impl Fn(usize) -> Range<usize>,
        root: usize,
    ) -> Result<()> {
        if self.world == 1 {
            output.copy_from_slice(input);
            return Ok(());
        }
        let (input, output) = (Some(bytemuck::cast_slice(input)), bytemuck::cast_slice_mut(output));
        self.run(|state| {
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.scatter(input, output, block, root)))
        })
    }

    /// Reduces every rank's `input`, element by element, and leaves block `rank` of the result, of its `world`
    /// equal blocks, in `output`: `input` has `world * output.len()` elements.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit or the operation isn't defined for the type; else see
    /// [`Communicator`].
    pub fn reduce_scatter<T: Element>(&self, input: &[T], output: &mut [T], op: ReduceOp) -> Result<()> {
        self.expect(
            "reduce_scatter: input",
            "world x output",
            output.len().checked_mul(self.world),
            input.len(),
        )?;
        let call = Call { reduce: Some(op), ..call::<T>(Op::ReduceScatter, input.len()) };
        let block = equal::<T>(output.len());
        self.reduce_scatter_bytes(call, input, output, op, block)
    }

    /// As [`reduce_scatter`](Communicator::reduce_scatter), where block `r` has `counts[r]` elements. Every rank
    /// gives the same `counts`.
    ///
    /// # Errors
    /// As for [`reduce_scatter`](Communicator::reduce_scatter).
    pub fn reduce_scatter_v<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
        op: ReduceOp,
    ) -> Result<()> {
        let blocks = Blocks::new::<T>(self, "reduce_scatter_v", counts)?;
        self.expect("reduce_scatter_v: output", "counts[rank]", Some(counts[self.rank]), output.len())?;
        self.expect("reduce_scatter_v: input", "the sum of counts", Some(blocks.total), input.len())?;
        let call =
            Call { reduce: Some(op), layout: blocks.digest, ..call::<T>(Op::ReduceScatter, input.len()) };
        self.reduce_scatter_bytes(call, input, output, op, |r| blocks.of(r))
    }

    fn reduce_scatter_bytes<T: Element>(
        &self,
        call: Call,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
        block: impl Fn(usize) -> Range<usize>,
    ) -> Result<()> {
        let reduction = Reduction::new(T::DTYPE, op)?;
        let (input, output) = (Some(bytemuck::cast_slice(input)), bytemuck::cast_slice_mut(output));
        if self.world == 1 {
            reduction.alone(Buffers { input, output });
            return Ok(());
        }
        self.run(|state| {
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.reduce_scatter(input, output, block, &reduction)))
        })
    }

    /// Copies the `buf` of rank `root` into every rank's.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `root` is no rank; else see [`Communicator`].
    pub fn broadcast<T: Element>(&self, buf: &mut [T], root: usize) -> Result<()> {
        let root = self.root("broadcast", root)?;
        if self.world == 1 {
            return Ok(());
        }
        self.broadcast_bytes::<T>(None, bytemuck::cast_slice_mut(buf), root)
    }

    pub(super) fn broadcast_bytes<T: Element>(
        &self,
        input: Option<&[u8]>,
        output: &mut [u8],
        root: usize,
    ) -> Result<()> {
        let call =
            Call { root: Some(root as u32), ..call::<T>(Op::Broadcast, output.len() / size_of::<T>()) };
        self.run(|state| {
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.broadcast(input, output, root)))
        })
    }

    /// Sends block `r` of `input`'s `world` equal blocks to rank `r`, and receives rank `r`'s block for this
    /// rank as block `r` of `output`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths differ or aren't a multiple of the world; else see
    /// [`Communicator`].
    pub fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.expect("all_to_all: output", "as many as input", Some(input.len()), output.len())?;
        let count = input.len() / self.world;
        self.expect("all_to_all: input", "a multiple of the world", Some(count * self.world), input.len())?;
        let call = call::<T>(Op::AllToAll, input.len());
        let (input, output) = (Some(bytemuck::cast_slice(input)), bytemuck::cast_slice_mut(output));
        let block = equal::<T>(count);
        self.run(|state| {
            let longest = count * size_of::<T>();
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.all_to_all(input, output, &block, &block, longest)))
        })
    }

    /// Sends `send_counts[r]` elements of `input`, in rank order, to rank `r`, and receives `receive_counts[r]`
    /// elements of `output`, in rank order, from it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit; [`Error::Aborted`], on every rank, if a rank sends
    /// another what that one doesn't expect; else see [`Communicator`].
    pub fn all_to_all_v<T: Element>(
        &self,
        input: &[T],
        send_counts: &[usize],
        output: &mut [T],
        receive_counts: &[usize],
    ) -> Result<()> {
        let sends = Blocks::new::<T>(self, "all_to_all_v", send_counts)?;
        let receives = Blocks::new::<T>(self, "all_to_all_v", receive_counts)?;
        self.expect("all_to_all_v: input", "the sum of send_counts", Some(sends.total), input.len())?;
        self.expect("all_to_all_v: output", "the sum of receive_counts", Some(receives.total), output.len())?;
        // The counts differ between ranks: the engine compares them pair by pair.
        let call = Call { layout: 1, ..call::<T>(Op::AllToAll, 0) };
        let (input, output) = (Some(bytemuck::cast_slice(input)), bytemuck::cast_slice_mut(output));
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.run(call, |engine| {
                let longest = engine.agree_on_counts(&sends.lengths(), &receives.lengths())? as usize;
                engine.all_to_all(input, output, |r| sends.of(r), |r| receives.of(r), longest)
            }))
        })
    }

    /// Sends `buf` to rank `to`, which must [`recv`](Communicator::recv) as many elements of the same type.
    /// Messages between two ranks arrive in the order in which they were sent. Up to 64 KiB are taken before
    /// the receiver has come.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `to` is no other rank; else see [`Communicator`].
    pub fn send<T: Element>(&self, buf: &[T], to: usize) -> Result<()> {
        let out = Outgoing { to: self.other("send", to)?, data: bytemuck::cast_slice(buf) };
        self.run(|state| with_engine!(state.engine, |engine| engine.send_recv(T::DTYPE, Some(out), None)))
    }

    /// Receives into `buf` what rank `from` [sends](Communicator::send).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `from` is no other rank; [`Error::Mismatch`] if it sends another count or
    /// type; else see [`Communicator`].
    pub fn recv<T: Element>(&self, buf: &mut [T], from: usize) -> Result<()> {
        let into = Incoming { from: self.other("recv", from)?, data: bytemuck::cast_slice_mut(buf) };
        self.run(|state| with_engine!(state.engine, |engine| engine.send_recv(T::DTYPE, None, Some(into))))
    }

    /// Sends and receives at once, so that ranks which send to each other, or around a ring, don't wait for
    /// each other's receive.
    ///
    /// # Errors
    /// As for [`send`](Communicator::send) and [`recv`](Communicator::recv).
    pub fn send_recv<T: Element>(&self, send: &[T], to: usize, receive: &mut [T], from: usize) -> Result<()> {
        let out = Outgoing { to: self.other("send_recv", to)?, data: bytemuck::cast_slice(send) };
        let into = Incoming { from: self.other("send_recv", from)?, data: bytemuck::cast_slice_mut(receive) };
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.send_recv(T::DTYPE, Some(out), Some(into)))
        })
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// See [`Communicator`].
    pub fn barrier(&self) -> Result<()> {
        let call = Call::bare(Op::Barrier);
        self.run(|state| with_engine!(state.engine, |engine| engine.run(call, |engine| engine.barrier())))
    }

    pub(crate) fn expect(&self, what: &str, rule: &str, expected: Option<usize>, got: usize) -> Result<()> {
        if expected == Some(got) {
            return Ok(());
        }
        let expected = expected.map_or("more than memory holds".to_owned(), |e| e.to_string());
        Err(Error::invalid(format!("rank {}: {what} has {got} elements, not {expected} ({rule})", self.rank)))
    }

    pub(crate) fn root(&self, what: &str, root: usize) -> Result<usize> {
        if root < self.world {
            return Ok(root);
        }
        let (rank, world) = (self.rank, self.world);
        Err(Error::invalid(format!("rank {rank}: {what}: root {root} is outside the world of {world}")))
    }

    pub(crate) fn other(&self, what: &str, peer: usize) -> Result<usize> {
        if peer < self.world && peer != self.rank {
            return Ok(peer);
        }
        let (rank, world) = (self.rank, self.world);
        Err(Error::invalid(format!(
            "rank {rank}: {what}: rank {peer} is no other rank of the world of {world}"
        )))
    }
}

#[inline]
pub(super) fn call<T: Element>(op: Op, count: usize) -> Call {
    Call { op, dtype: Some(T::DTYPE), reduce: None, count: count as u64, root: None, layout: 0, wire: None }
}

/// The bytes of block `r` of equal blocks of `count` elements.
pub(super) fn equal<T: Element>(count: usize) -> impl Fn(usize) -> Range<usize> {
    let bytes = count * size_of::<T>();
    move |r| r * bytes..(r + 1) * bytes
}

/// Blocks of differing lengths, one a rank, one after the other.
pub(crate) struct Blocks {
    /// Where each ends, in bytes.
    ends: Vec<usize>,
    /// Elements in all.
    pub(crate) total: usize,
    /// Never 0, so that ranks that disagree on the counts are found out.
    pub(crate) digest: u32,
}

impl Blocks {
    pub(crate) fn new<T: Element>(comm: &Communicator, what: &str, counts: &[usize]) -> Result<Blocks> {
        comm.expect(&format!("{what}: counts"), "one a rank", Some(comm.world), counts.len())?;
        let mut digest: u64 = 0xcbf2_9ce4_8422_2325;
        let (mut ends, mut total) = (Vec::with_capacity(counts.len()), 0usize);
        for count in counts {
            digest = (digest ^ *count as u64).wrapping_mul(0x0000_0100_0000_01b3);
            digest ^= digest >> 32;
            total = total
                .checked_add(*count)
                .filter(|t| t.checked_mul(size_of::<T>()).is_some())
                .ok_or_else(|| {
                    Error::invalid(format!(
                        "rank {}: {what}: the counts' sum is more than memory holds",
                        comm.rank
                    ))
                })?;
            ends.push(total * size_of::<T>());
        }
        Ok(Blocks { ends, total, digest: (digest as u32).max(1) })
    }

    /// The bytes of block `r`.
    pub(crate) fn of(&self, r: usize) -> Range<usize> {
        if r == 0 { 0..self.ends[0] } else { self.ends[r - 1]..self.ends[r] }
    }

    pub(super) fn lengths(&self) -> Vec<u64> {
        (0..self.ends.len()).map(|r| self.of(r).len() as u64).collect()
    }
}
