//! All-reduce over slow links, in fewer bits.

use tensorwire_core::{Call, DType, Element, Error, Op, ReduceOp, Result, Wire};

use super::Communicator;
use super::collectives::call;
#[cfg(feature = "tcp")]
use crate::engine::Either;
use crate::engine::{Buffers, Reduction, with_engine};

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
        let types = matches!(T::DTYPE, DType::F32 | DType::F16 | DType::BF16);
        if !types || !matches!(op, ReduceOp::Sum | ReduceOp::Average) {
            let (rank, dtype) = (self.rank, T::DTYPE);
            return Err(Error::invalid(format!(
                "rank {rank}: all_reduce_wire: sums and averages of f32, f16 and bf16 can be sent as {wire}, not {op} of \
                 {dtype}"
            )));
        }
        let call = call::<T>(Op::AllReduce, buf.len());
        let call = Call { reduce: Some(op), layout: wire as u32, ..call };
        let reduction = Reduction::new(T::DTYPE, op)?;
        let data = Buffers::in_place(bytemuck::cast_slice_mut(buf));
        if self.world == 1 {
            return Ok(());
        }
        self.run(|state| {
            #[cfg(feature = "tcp")]
            if let (Some(codec), Either::Tcp(_)) =
                (crate::reduce::Codec::new(wire, T::DTYPE, op), &state.engine)
            {
                let encoded = reduction.encoded(&codec);
                let bytes = codec.units(data.len() / size_of::<T>()) * codec.unit;
                let algorithm = state.choose_rooted(bytes, &encoded)?;
                if let Either::Tcp(engine) = &mut state.engine {
                    return engine
                        .run(call, |engine| engine.all_reduce_encoded(data, &codec, &encoded, algorithm));
                }
            }
            let algorithm = state.choose(data.len(), &reduction)?;
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.all_reduce(data, &reduction, algorithm, None)))
        })
    }
}
