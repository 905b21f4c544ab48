//! The calls: each a check of its arguments, NCCL's operations that make it, and the host's call that makes it.

use std::ffi::c_void;

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};
use tensorwire_core::{Call, DType, Element, Error, Op, ReduceOp, Result};

use super::group::Planned;
use super::staged::Ends;
use super::{DeviceCommunicator, DeviceSlice, DeviceSliceMut, Stream};
use crate::communicator::Blocks;
use crate::engine::Reduction;
use crate::nccl::comm::{Operation, Primitive, Reducing};
use crate::nccl::sys;

impl DeviceCommunicator {
    /// Reduces every rank's `buf`, element by element, and leaves the result in it on every rank.
    ///
    /// # Errors
    /// See [`DeviceCommunicator`]; [`Error::InvalidArgument`] if the operation isn't defined for the type, or not by NCCL:
    /// bitwise ones aren't, and fp8 is reduced from NCCL 2.24 on, on devices of compute capability 9.0 and later.
    /// [`ReduceOp::PreScaledSum`]'s factor is rounded to the type by NCCL.
    pub fn all_reduce<'a, T: Element>(
        &self,
        buf: impl Into<DeviceSliceMut<'a, T>>,
        op: ReduceOp,
    ) -> Result<()> {
        self.run(self.plan_all_reduce(buf.into(), op)?)
    }

    pub(super) fn plan_all_reduce<'a, T: Element>(
        &self,
        buf: DeviceSliceMut<'a, T>,
        op: ReduceOp,
    ) -> Result<Planned<'a>> {
        let ends = Ends { from: buf.at, inputs: buf.len, to: buf.at, outputs: buf.len };
        self.reduced::<T>(buf.stream, ends, op)
    }

    /// Reduces every rank's `input`, element by element, into every rank's `output`, of the same length.
    ///
    /// # Errors
    /// As for [`all_reduce`](Self::all_reduce), and if the lengths differ.
    pub fn all_reduce_into<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        op: ReduceOp,
    ) -> Result<()> {
        let (input, output) = (input.into(), output.into());
        self.expect("all_reduce: output", "as many as input", Some(input.len), output.len)?;
        let ends = self.ends(&input, &output)?;
        self.run(self.reduced::<T>(output.stream, ends, op)?)
    }

    fn reduced<'a, T: Element>(&self, stream: &'a Stream, ends: Ends, op: ReduceOp) -> Result<Planned<'a>> {
        let count = ends.inputs;
        let call = Call { reduce: Some(op), ..call::<T>(Op::AllReduce, count) };
        let by = self.reducing::<T>(op)?;
        let primitives = vec![Primitive::AllReduce { from: ends.from, to: ends.to, count, by }];
        Ok(Planned::pieces::<T>(call, stream, primitives, ends, move |comm, x| comm.all_reduce(x, op)))
    }

    /// Reduces every rank's `buf`, element by element, and leaves the result in it on rank `root`; the others' stay as they
    /// are.
    ///
    /// # Errors
    /// As for [`all_reduce`](Self::all_reduce), and if `root` is no rank.
    pub fn reduce<'a, T: Element>(
        &self,
        buf: impl Into<DeviceSliceMut<'a, T>>,
        op: ReduceOp,
        root: usize,
    ) -> Result<()> {
        let buf = buf.into();
        let outputs = if self.rank() == root { buf.len } else { 0 };
        let ends = Ends { from: buf.at, inputs: buf.len, to: buf.at, outputs };
        self.run(self.reduced_to::<T>(buf.stream, ends, op, root)?)
    }

    /// As [`reduce`](Self::reduce), from `input` into rank `root`'s `output`, of the same length; the others' isn't looked
    /// at.
    ///
    /// # Errors
    /// As for [`reduce`](Self::reduce), and if the lengths differ.
    pub fn reduce_into<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        op: ReduceOp,
        root: usize,
    ) -> Result<()> {
        let (input, output) = (input.into(), output.into());
        let is_root = self.rank() == root;
        if is_root {
            self.expect("reduce_into: output", "as many as input", Some(input.len), output.len)?;
        }
        let ends = Ends { outputs: if is_root { output.len } else { 0 }, ..self.ends(&input, &output)? };
        self.run(self.reduced_to::<T>(output.stream, ends, op, root)?)
    }

    fn reduced_to<'a, T: Element>(
        &self,
        stream: &'a Stream,
        ends: Ends,
        op: ReduceOp,
        root: usize,
    ) -> Result<Planned<'a>> {
        let root = self.shared.control.root("reduce", root)?;
        let count = ends.inputs;
        let call = Call { reduce: Some(op), root: Some(root as u32), ..call::<T>(Op::Reduce, count) };
        let by = self.reducing::<T>(op)?;
        let primitives = vec![Primitive::Reduce { from: ends.from, to: ends.to, count, by, root }];
        Ok(Planned::pieces::<T>(call, stream, primitives, ends, move |comm, x| comm.reduce(x, op, root)))
    }

    /// Copies the `buf` of rank `root` into every rank's.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `root` is no rank; else see [`DeviceCommunicator`].
    pub fn broadcast<'a, T: Element>(
        &self,
        buf: impl Into<DeviceSliceMut<'a, T>>,
        root: usize,
    ) -> Result<()> {
        self.run(self.plan_broadcast(buf.into(), root)?)
    }

    pub(super) fn plan_broadcast<'a, T: Element>(
        &self,
        buf: DeviceSliceMut<'a, T>,
        root: usize,
    ) -> Result<Planned<'a>> {
        let ends = Ends { from: buf.at, inputs: buf.len, to: buf.at, outputs: buf.len };
        self.broadcasted::<T>(buf.stream, ends, root)
    }

    /// As [`broadcast`](Self::broadcast), from rank `root`'s `input` into every rank's `output`, the root's too, of the same
    /// length; the others' `input` isn't looked at.
    ///
    /// # Errors
    /// As for [`broadcast`](Self::broadcast), and if the lengths differ.
    pub fn broadcast_into<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        root: usize,
    ) -> Result<()> {
        let (input, output) = (input.into(), output.into());
        if self.rank() == root {
            self.expect("broadcast_into: output", "as many as input", Some(input.len), output.len)?;
        }
        let ends = self.ends(&input, &output)?;
        self.run(self.broadcasted::<T>(output.stream, ends, root)?)
    }

    fn broadcasted<'a, T: Element>(
        &self,
        stream: &'a Stream,
        ends: Ends,
        root: usize,
    ) -> Result<Planned<'a>> {
        let root = self.shared.control.root("broadcast", root)?;
        let call = Call { root: Some(root as u32), ..call::<T>(Op::Broadcast, ends.outputs) };
        let bytes = ends.outputs * size_of::<T>();
        let primitives = vec![Primitive::Broadcast { from: ends.from, to: ends.to, bytes, root }];
        let ends = if self.rank() == root { ends } else { Ends { inputs: 0, ..ends } };
        Ok(Planned::pieces::<T>(call, stream, primitives, ends, move |comm, x| comm.broadcast(x, root)))
    }

    /// Concatenates every rank's `input`, in rank order, into `output` on every rank: `output` has `world * input.len()`
    /// elements.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit; else see [`DeviceCommunicator`].
    pub fn all_gather<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
    ) -> Result<()> {
        self.run(self.plan_all_gather(input.into(), output.into())?)
    }

    pub(super) fn plan_all_gather<'b, T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: DeviceSliceMut<'b, T>,
    ) -> Result<Planned<'b>> {
        let whole = input.len.checked_mul(self.world());
        self.expect("all_gather: output", "world x input", whole, output.len)?;
        let ends = self.ends(&input, &output)?;
        Ok(self.gathered::<T>(output.stream, ends))
    }

    /// As [`all_gather`](Self::all_gather), where rank `r`'s input is block `r` of its `buf`, of `world` equal blocks:
    /// the other blocks are filled in.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the length isn't a multiple of the world; else see [`DeviceCommunicator`].
    pub fn all_gather_in_place<'a, T: Element>(&self, buf: impl Into<DeviceSliceMut<'a, T>>) -> Result<()> {
        let buf = buf.into();
        let block = buf.len / self.world();
        self.expect("all_gather_in_place", "a multiple of the world", Some(block * self.world()), buf.len)?;
        let from = buf.at.wrapping_byte_add(self.rank() * block * size_of::<T>());
        self.run(self.gathered::<T>(buf.stream, Ends { from, inputs: block, to: buf.at, outputs: buf.len }))
    }

    fn gathered<'a, T: Element>(&self, stream: &'a Stream, ends: Ends) -> Planned<'a> {
        let call = call::<T>(Op::AllGather, ends.outputs);
        let block = ends.inputs * size_of::<T>();
        let primitives = vec![Primitive::AllGather { from: ends.from, to: ends.to, block }];
        Planned::whole::<T>(call, stream, primitives, ends, |comm, input, output| {
            comm.all_gather(input, output)
        })
    }

    /// Concatenates every rank's `input`, in rank order, into `output` on every rank, where rank `r` contributes `counts[r]`
    /// elements. Every rank gives the same `counts`. Over NCCL each sends to each.
    ///
    /// # Errors
    /// As for [`all_gather`](Self::all_gather).
    pub fn all_gather_v<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        counts: &[usize],
    ) -> Result<()> {
        let (input, output) = (input.into(), output.into());
        let blocks = Blocks::new::<T>(&self.shared.control, "all_gather_v", counts)?;
        let own = Some(counts[self.rank()]);
        self.expect("all_gather_v: input", "counts[rank]", own, input.len)?;
        self.expect("all_gather_v: output", "the sum of counts", Some(blocks.total), output.len)?;
        let ends = self.ends(&input, &output)?;
        let call = Call { layout: blocks.digest, ..call::<T>(Op::AllGather, output.len) };
        let sends = (0..self.world()).map(|to| send(ends.from, blocks.of(self.rank()).len(), to));
        let receives = (0..self.world()).map(|from| recv(ends.to, blocks.of(from), from));
        let primitives = some(sends.chain(receives));
        let counts = counts.to_vec();
        self.run(Planned::whole::<T>(call, output.stream, primitives, ends, move |comm, input, output| {
            comm.all_gather_v(input, output, &counts)
        }))
    }

    /// Reduces every rank's `input`, of `world` equal blocks, element by element, and leaves block `r` in rank `r`'s `output`.
    ///
    /// # Errors
    /// As for [`all_reduce`](Self::all_reduce), and if the lengths don't fit.
    pub fn reduce_scatter<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        op: ReduceOp,
    ) -> Result<()> {
        self.run(self.plan_reduce_scatter(input.into(), output.into(), op)?)
    }

    pub(super) fn plan_reduce_scatter<'b, T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: DeviceSliceMut<'b, T>,
        op: ReduceOp,
    ) -> Result<Planned<'b>> {
        let whole = output.len.checked_mul(self.world());
        self.expect("reduce_scatter: input", "world x output", whole, input.len)?;
        let ends = self.ends(&input, &output)?;
        let call = Call { reduce: Some(op), ..call::<T>(Op::ReduceScatter, input.len) };
        let by = self.reducing::<T>(op)?;
        let (from, to, block) = (ends.from, ends.to, output.len);
        let primitives = vec![Primitive::ReduceScatter { from, to, block, by }];
        Ok(Planned::whole::<T>(call, output.stream, primitives, ends, move |comm, input, output| {
            comm.reduce_scatter(input, output, op)
        }))
    }

    /// As [`reduce_scatter`](Self::reduce_scatter), where block `r` has `counts[r]` elements. Every rank gives the same
    /// `counts`. Over NCCL each block is reduced to its rank.
    ///
    /// # Errors
    /// As for [`reduce_scatter`](Self::reduce_scatter).
    pub fn reduce_scatter_v<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        counts: &[usize],
        op: ReduceOp,
    ) -> Result<()> {
        let (input, output) = (input.into(), output.into());
        let blocks = Blocks::new::<T>(&self.shared.control, "reduce_scatter_v", counts)?;
        let own = Some(counts[self.rank()]);
        self.expect("reduce_scatter_v: output", "counts[rank]", own, output.len)?;
        self.expect("reduce_scatter_v: input", "the sum of counts", Some(blocks.total), input.len)?;
        let ends = self.ends(&input, &output)?;
        let call =
            Call { reduce: Some(op), layout: blocks.digest, ..call::<T>(Op::ReduceScatter, input.len) };
        let by = self.reducing::<T>(op)?;
        let block = |root: usize| {
            let to = if root == self.rank() { ends.to } else { std::ptr::null_mut() };
            let from = ends.from.wrapping_byte_add(blocks.of(root).start);
            Primitive::Reduce { from, to, count: counts[root], by, root }
        };
        let primitives = (0..self.world()).filter(|r| counts[*r] > 0).map(block).collect();
        let counts = counts.to_vec();
        self.run(Planned::whole::<T>(call, output.stream, primitives, ends, move |comm, input, output| {
            comm.reduce_scatter_v(input, output, &counts, op)
        }))
    }

    /// As [`all_gather`](Self::all_gather), on rank `root` alone; the others' `output` isn't looked at. Over NCCL each sends to
    /// the root.
    ///
    /// # Errors
    /// As for [`all_gather`](Self::all_gather), and if `root` is no rank.
    pub fn gather<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        root: usize,
    ) -> Result<()> {
        let input = input.into();
        self.gathered_to(input, output.into(), &vec![input.len; self.world()], root, true)
    }

    /// As [`gather`](Self::gather), where rank `r` contributes `counts[r]` elements. Every rank gives the same `counts`.
    ///
    /// # Errors
    /// As for [`gather`](Self::gather).
    pub fn gather_v<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        counts: &[usize],
        root: usize,
    ) -> Result<()> {
        self.gathered_to(input.into(), output.into(), counts, root, false)
    }

    fn gathered_to<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: DeviceSliceMut<'_, T>,
        counts: &[usize],
        root: usize,
        even: bool,
    ) -> Result<()> {
        let root = self.shared.control.root("gather", root)?;
        let blocks = Blocks::new::<T>(&self.shared.control, "gather", counts)?;
        self.expect("gather: input", "counts[rank]", Some(counts[self.rank()]), input.len)?;
        let is_root = self.rank() == root;
        if is_root {
            self.expect("gather: output", "the sum of counts", Some(blocks.total), output.len)?;
        }
        let ends = Ends { outputs: if is_root { output.len } else { 0 }, ..self.ends(&input, &output)? };
        let layout = if even { 0 } else { blocks.digest };
        let call = Call { root: Some(root as u32), layout, ..call::<T>(Op::Gather, blocks.total) };
        let mine = send(ends.from, input.len * size_of::<T>(), root);
        let receives = (0..self.world()).filter(|_| is_root).map(|from| recv(ends.to, blocks.of(from), from));
        let primitives = some(std::iter::once(mine).chain(receives));
        let counts = counts.to_vec();
        self.run(Planned::whole::<T>(call, output.stream, primitives, ends, move |comm, input, output| {
            match even {
                true => comm.gather(input, output, root),
                false => comm.gather_v(input, output, &counts, root),
            }
        }))
    }

    /// Copies block `r` of rank `root`'s `input`, of `world` equal blocks, into rank `r`'s `output`; the others' `input` isn't
    /// looked at. Over NCCL the root sends to each.
    ///
    /// # Errors
    /// As for [`gather`](Self::gather).
    pub fn scatter<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        root: usize,
    ) -> Result<()> {
        let output = output.into();
        let counts = vec![output.len; self.world()];
        self.scattered(input.into(), output, &counts, root, true)
    }

    /// As [`scatter`](Self::scatter), where block `r` has `counts[r]` elements. Every rank gives the same `counts`.
    ///
    /// # Errors
    /// As for [`scatter`](Self::scatter).
    pub fn scatter_v<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        counts: &[usize],
        root: usize,
    ) -> Result<()> {
        self.scattered(input.into(), output.into(), counts, root, false)
    }

    fn scattered<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: DeviceSliceMut<'_, T>,
        counts: &[usize],
        root: usize,
        even: bool,
    ) -> Result<()> {
        let root = self.shared.control.root("scatter", root)?;
        let blocks = Blocks::new::<T>(&self.shared.control, "scatter", counts)?;
        self.expect("scatter: output", "counts[rank]", Some(counts[self.rank()]), output.len)?;
        let is_root = self.rank() == root;
        if is_root {
            self.expect("scatter: input", "the sum of counts", Some(blocks.total), input.len)?;
        }
        let ends = Ends { inputs: if is_root { input.len } else { 0 }, ..self.ends(&input, &output)? };
        let layout = if even { 0 } else { blocks.digest };
        let call = Call { root: Some(root as u32), layout, ..call::<T>(Op::Scatter, blocks.total) };
        let block = |to: usize| {
            let block = blocks.of(to);
            send(ends.from.wrapping_byte_add(block.start), block.len(), to)
        };
        let sends = (0..self.world()).filter(|_| is_root).map(block);
        let mine = recv(ends.to, 0..output.len * size_of::<T>(), root);
        let primitives = some(sends.chain(std::iter::once(mine)));
        let counts = counts.to_vec();
        self.run(Planned::whole::<T>(call, output.stream, primitives, ends, move |comm, input, output| {
            match even {
                true => comm.scatter(input, output, root),
                false => comm.scatter_v(input, output, &counts, root),
            }
        }))
    }

    /// Sends block `r` of `input`'s `world` equal blocks to rank `r`, and receives rank `r`'s block for this rank as
    /// block `r` of `output`. Over NCCL each sends to each.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths differ or aren't a multiple of the world; else see
    /// [`DeviceCommunicator`].
    pub fn all_to_all<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
    ) -> Result<()> {
        let (input, output) = (input.into(), output.into());
        self.expect("all_to_all: output", "as many as input", Some(input.len), output.len)?;
        let count = input.len / self.world();
        let whole = Some(count * self.world());
        self.expect("all_to_all: input", "a multiple of the world", whole, input.len)?;
        let counts = vec![count; self.world()];
        let call = call::<T>(Op::AllToAll, input.len);
        self.exchanged(call, input, &counts, output, &counts, true)
    }

    /// Sends `send_counts[r]` elements of `input`, in rank order, to rank `r`, and receives `receive_counts[r]` elements of
    /// `output`, in rank order, from it. That ranks agree on what they send each other isn't checked over NCCL.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit; else see [`DeviceCommunicator`].
    pub fn all_to_all_v<'a, 'b, T: Element>(
        &self,
        input: impl Into<DeviceSlice<'a, T>>,
        send_counts: &[usize],
        output: impl Into<DeviceSliceMut<'b, T>>,
        receive_counts: &[usize],
    ) -> Result<()> {
        let call = Call { layout: 1, ..call::<T>(Op::AllToAll, 0) };
        self.exchanged(call, input.into(), send_counts, output.into(), receive_counts, false)
    }

    fn exchanged<T: Element>(
        &self,
        call: Call,
        input: DeviceSlice<'_, T>,
        send_counts: &[usize],
        output: DeviceSliceMut<'_, T>,
        receive_counts: &[usize],
        even: bool,
    ) -> Result<()> {
        let sent = Blocks::new::<T>(&self.shared.control, "all_to_all_v", send_counts)?;
        let received = Blocks::new::<T>(&self.shared.control, "all_to_all_v", receive_counts)?;
        self.expect("all_to_all_v: input", "the sum of send_counts", Some(sent.total), input.len)?;
        self.expect("all_to_all_v: output", "the sum of receive_counts", Some(received.total), output.len)?;
        let ends = self.ends(&input, &output)?;
        let block = |to: usize| {
            let block = sent.of(to);
            send(ends.from.wrapping_byte_add(block.start), block.len(), to)
        };
        let receives = (0..self.world()).map(|from| recv(ends.to, received.of(from), from));
        let primitives = some((0..self.world()).map(block).chain(receives));
        let (sends, receives) = (send_counts.to_vec(), receive_counts.to_vec());
        self.run(Planned::whole::<T>(call, output.stream, primitives, ends, move |comm, input, output| {
            match even {
                true => comm.all_to_all(input, output),
                false => comm.all_to_all_v(input, &sends, output, &receives),
            }
        }))
    }

    /// Sends `buf` to rank `to`, which must [`recv`](Self::recv) as many bytes. The stream goes on when the receiver has
    /// come. What goes both ways, or around a ring, is sent and received at once ([`send_recv`](Self::send_recv),
    /// [`group`](Self::group)).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `to` is no other rank; else see [`DeviceCommunicator`].
    pub fn send<'a, T: Element>(&self, buf: impl Into<DeviceSlice<'a, T>>, to: usize) -> Result<()> {
        self.run(self.plan_send(buf.into(), to)?)
    }

    pub(super) fn plan_send<'a, T: Element>(
        &self,
        buf: DeviceSlice<'a, T>,
        to: usize,
    ) -> Result<Planned<'a>> {
        let to = self.shared.control.other("send", to)?;
        let bytes = buf.len * size_of::<T>();
        let call = Call::message(Op::Send, T::DTYPE, bytes, to);
        let primitives = some(std::iter::once(send(buf.at, bytes, to)));
        let ends = Ends { from: buf.at, inputs: bytes, to: std::ptr::null_mut(), outputs: 0 };
        Ok(Planned::message(call, buf.stream, primitives, ends, to))
    }

    /// Receives into `buf` what rank `from` [sends](Self::send).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `from` is no other rank; else see [`DeviceCommunicator`].
    pub fn recv<'a, T: Element>(&self, buf: impl Into<DeviceSliceMut<'a, T>>, from: usize) -> Result<()> {
        self.run(self.plan_recv(buf.into(), from)?)
    }

    pub(super) fn plan_recv<'a, T: Element>(
        &self,
        buf: DeviceSliceMut<'a, T>,
        from: usize,
    ) -> Result<Planned<'a>> {
        let from = self.shared.control.other("recv", from)?;
        let bytes = buf.len * size_of::<T>();
        let call = Call::message(Op::Recv, T::DTYPE, bytes, from);
        let primitives = some(std::iter::once(recv(buf.at, 0..bytes, from)));
        let ends = Ends { from: std::ptr::null(), inputs: 0, to: buf.at, outputs: bytes };
        Ok(Planned::message(call, buf.stream, primitives, ends, from))
    }

    /// Sends and receives at once.
    ///
    /// # Errors
    /// As for [`send`](Self::send) and [`recv`](Self::recv).
    pub fn send_recv<'a, 'b, T: Element>(
        &self,
        send: impl Into<DeviceSlice<'a, T>>,
        to: usize,
        receive: impl Into<DeviceSliceMut<'b, T>>,
        from: usize,
    ) -> Result<()> {
        let (send, receive) = (send.into(), receive.into());
        self.run_all(vec![self.plan_send(send, to)?, self.plan_recv(receive, from)?])
    }

    /// Has the stream go on only when every rank's has come to it.
    ///
    /// # Errors
    /// See [`DeviceCommunicator`].
    pub fn barrier(&self, stream: &Stream) -> Result<()> {
        // Kept as long as the group: calls that use it are done or aborted by then.
        let at = DeviceSliceMut::from(&mut *self.scratch()).at;
        let by = Reducing { dtype: DType::U8, op: Operation::Known(sys::SUM) };
        let primitives = vec![Primitive::AllReduce { from: at, to: at, count: 1, by }];
        let ends = Ends { from: at, inputs: 0, to: at, outputs: 0 };
        let call = Call::bare(Op::Barrier);
        self.run(Planned::whole::<u8>(call, stream, primitives, ends, |comm, _, _| comm.barrier()))
    }

    fn run(&self, planned: Planned<'_>) -> Result<()> {
        self.run_all(vec![planned])
    }

    fn ends<T: Element>(&self, input: &DeviceSlice<'_, T>, output: &DeviceSliceMut<'_, T>) -> Result<Ends> {
        if !input.stream.is(output.stream) {
            return Err(Error::invalid(format!(
                "rank {}: input and output are on different streams: `DeviceBuffer::on` hands one over",
                self.rank()
            )));
        }
        Ok(Ends { from: input.at, inputs: input.len, to: output.at, outputs: output.len })
    }

    fn expect(&self, what: &str, rule: &str, expected: Option<usize>, got: usize) -> Result<()> {
        self.shared.control.expect(what, rule, expected, got)
    }

    /// How NCCL reduces, if that carries the data; else nothing that is used.
    fn reducing<T: Element>(&self, op: ReduceOp) -> Result<Reducing> {
        Reduction::new(T::DTYPE, op)?;
        let dtype = T::DTYPE;
        let Some(version) = self.nccl() else {
            return Ok(Reducing { dtype, op: Operation::Known(sys::SUM) });
        };
        if matches!(dtype, DType::F8E4M3 | DType::F8E5M2) && !version.reduces_fp8() {
            return Err(Error::invalid(format!("NCCL {version} doesn't reduce {dtype}: 2.24 and later do")));
        }
        let op = match (op, sys::reduce_op(op)) {
            (_, Some(op)) => Operation::Known(op),
            (ReduceOp::PreScaledSum(factor), None) => Operation::PreScaled(scalar(dtype, factor)),
            (op, None) => {
                return Err(Error::invalid(format!(
                    "NCCL has no {op}: a group that is formed with EngineChoice::Staged has"
                )));
            }
        };
        Ok(Reducing { dtype, op })
    }
}

/// A factor as an element.
fn scalar(dtype: DType, factor: f64) -> [u8; 8] {
    let bits = match dtype {
        DType::F32 => u64::from((factor as f32).to_bits()),
        DType::F16 => u64::from(f16::from_f64(factor).to_bits()),
        DType::BF16 => u64::from(bf16::from_f64(factor).to_bits()),
        DType::F8E4M3 => u64::from(F8E4M3::from_f64(factor).to_bits()),
        DType::F8E5M2 => u64::from(F8E5M2::from_f64(factor).to_bits()),
        _ => factor.to_bits(),
    };
    bits.to_le_bytes()
}

fn call<T: Element>(op: Op, count: usize) -> Call {
    Call { dtype: Some(T::DTYPE), count: count as u64, ..Call::bare(op) }
}

fn send(from: *const c_void, bytes: usize, to: usize) -> Primitive {
    Primitive::Send { from, bytes, to }
}

fn recv(to: *mut c_void, block: std::ops::Range<usize>, from: usize) -> Primitive {
    Primitive::Recv { to: to.wrapping_byte_add(block.start), bytes: block.len(), from }
}

/// Those messages that have bytes: both sides know which.
fn some(messages: impl Iterator<Item = Primitive>) -> Vec<Primitive> {
    let has_bytes =
        |p: &Primitive| !matches!(p, Primitive::Send { bytes: 0, .. } | Primitive::Recv { bytes: 0, .. });
    messages.filter(has_bytes).collect()
}
