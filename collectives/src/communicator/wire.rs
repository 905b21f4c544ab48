//! All-reduce over slow links, in fewer bits.

use tensorwire_core::{Call, DType, Element, Error, Op, ReduceOp, Result, Wire};

use super::Communicator;
use super::collectives::{Blocks, call};
use crate::engine::{Buffers, Reduction, with_engine};
#[cfg(feature = "tcp")]
use crate::engine::{Either, Encoded};
#[cfg(feature = "tcp")]
use crate::select::Algorithm;

impl Communicator {
    /// As [`all_reduce`](Communicator::all_reduce), where the elements may be rounded on their way, to send fewer bytes:
    /// see [`Wire`] for how far that may take a result. Every rank gets the same bits. Where it would save nothing, the
    /// elements are sent as they are: over shared memory, and where they are as short already.
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # use tensorwire_core::{ReduceOp, Wire};
    /// # std::thread::scope(|s| {
    /// #     for comm in Communicator::in_process(2)? {
    /// #         s.spawn(move || {
    /// let mut gradient = vec![0.1f32; 1000];
    /// comm.all_reduce_wire(&mut gradient, ReduceOp::Average, Wire::Q8).unwrap();
    /// assert!(gradient.iter().all(|x| (x - 0.1).abs() < 2.0 * 0.1 / 252.0));
    /// #         });
    /// #     }
    /// #     Ok::<(), tensorwire_core::Error>(())
    /// # })?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As for [`all_reduce`](Communicator::all_reduce); [`Error::InvalidArgument`] but for sums and averages of f32, f16
    /// and bf16.
    pub fn all_reduce_wire<T: Element>(&self, buf: &mut [T], op: ReduceOp, wire: Wire) -> Result<()> {
        self.expect_wire::<T>("all_reduce_wire", op, wire)?;
        let call = Call { reduce: Some(op), wire: Some(wire), ..call::<T>(Op::AllReduce, buf.len()) };
        let reduction = Reduction::new(T::DTYPE, op)?;
        let data = Buffers::in_place(bytemuck::cast_slice_mut(buf));
        if self.world == 1 {
            return Ok(());
        }
        self.run(|state| {
            #[cfg(feature = "tcp")]
            if let (Some((encoded, algorithm)), Either::Tcp(engine)) =
                (state.encoded(wire, &reduction, data.len())?, &mut state.engine)
            {
                return engine.run(call, |engine| engine.all_reduce_encoded(data, &encoded, algorithm));
            }
            let algorithm = state.choose(data.len(), &reduction)?;
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.all_reduce(data, &reduction, algorithm, None)))
        })
    }

    /// As [`all_gather_v`](Communicator::all_gather_v), where the elements may be rounded on their way, to send fewer bytes:
    /// once, and so by half of what [`Wire`] says for a sum of one contribution. Every rank gets the same bits, of its own
    /// block too. Where it would save nothing, the elements are sent as they are.
    ///
    /// # Errors
    /// As for [`all_gather_v`](Communicator::all_gather_v); [`Error::InvalidArgument`] but for f32, f16 and bf16.
    pub fn all_gather_v_wire<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
        wire: Wire,
    ) -> Result<()> {
        self.expect_wire::<T>("all_gather_v_wire", ReduceOp::Sum, wire)?;
        let blocks = Blocks::new::<T>(self, "all_gather_v_wire", counts)?;
        self.expect("all_gather_v_wire: input", "counts[rank]", Some(counts[self.rank]), input.len())?;
        self.expect("all_gather_v_wire: output", "the sum of counts", Some(blocks.total), output.len())?;
        let call = call::<T>(Op::AllGather, output.len());
        let call = Call { layout: blocks.digest, wire: Some(wire), ..call };
        if self.world == 1 {
            output.copy_from_slice(input);
            return Ok(());
        }
        let (input, output) = (bytemuck::cast_slice(input), bytemuck::cast_slice_mut(output));
        let block = |r: usize| blocks.of(r);
        self.run(|state| {
            #[cfg(feature = "tcp")]
            if let (Some(encoded), Either::Tcp(engine)) =
                (Reduction::new(T::DTYPE, ReduceOp::Sum)?.encoded(wire), &mut state.engine)
            {
                return engine.run(call, |engine| engine.all_gather_encoded(input, output, block, &encoded));
            }
            with_engine!(state.engine, |engine| engine.run(call, |engine| engine.all_gather(
                Some(input),
                output,
                block,
                None
            )))
        })
    }

    /// Fails where nothing could be sent as `wire`.
    pub(super) fn expect_wire<T: Element>(&self, what: &str, op: ReduceOp, wire: Wire) -> Result<()> {
        let types = matches!(T::DTYPE, DType::F32 | DType::F16 | DType::BF16);
        if types && matches!(op, ReduceOp::Sum | ReduceOp::Average) {
            return Ok(());
        }
        let (rank, dtype) = (self.rank, T::DTYPE);
        Err(Error::invalid(format!(
            "rank {rank}: {what}: sums and averages of f32, f16 and bf16 can be sent as {wire}, not {op} of {dtype}"
        )))
    }
}

#[cfg(feature = "tcp")]
impl super::State {
    /// The reduction of `bytes` of elements in fewer bits, and its algorithm; `None` where that saves nothing.
    pub(super) fn encoded(
        &self,
        wire: Wire,
        r: &Reduction,
        bytes: usize,
    ) -> Result<Option<(Encoded, Algorithm)>> {
        let encoded = r.encoded(wire).filter(|_| matches!(self.engine, Either::Tcp(_)));
        let choose = |e: Encoded| Ok((e, self.choose_rooted(e.bytes(bytes), r)?));
        encoded.map(choose).transpose()
    }
}
