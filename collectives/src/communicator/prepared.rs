//! Calls that are checked once and made many times.

use tensorwire_core::{Call, Element, Error, Op, ReduceOp, Result};

use super::Communicator;
use super::collectives::call;
use crate::engine::{Buffers, Reduction, with_engine};
use crate::select::Algorithm;

/// An all-reduce of one length, type and operation, whose checks and choices are made: see
/// [`Communicator::all_reduce_plan`].
#[derive(Debug)]
pub struct AllReducePlan<'a, T> {
    comm: &'a Communicator,
    len: usize,
    call: Call,
    reduction: Reduction,
    algorithm: Algorithm,
    elements: std::marker::PhantomData<fn(T)>,
}

impl Communicator {
    /// Prepares an all-reduce of `len` elements. It talks to nobody; running it counts as an
    /// [`all_reduce`](Communicator::all_reduce), also for peers that call that. Over a network the algorithm is chosen
    /// when it runs, as for those: the links may have changed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the operation isn't defined for the type, or the algorithm that was set
    /// can't carry the length; [`Error::ConcurrentUse`].
    pub fn all_reduce_plan<T: Element>(&self, len: usize, op: ReduceOp) -> Result<AllReducePlan<'_, T>> {
        let reduction = Reduction::new(T::DTYPE, op)?;
        let state = self.state()?;
        Ok(AllReducePlan {
            comm: self,
            len,
            call: Call { reduce: Some(op), ..call::<T>(Op::AllReduce, len) },
            reduction,
            algorithm: state.choose(len.saturating_mul(size_of::<T>()), &reduction)?,
            elements: std::marker::PhantomData,
        })
    }
}

impl<T: Element> AllReducePlan<'_, T> {
    /// Reduces every rank's `buf`, and leaves the result in it on every rank.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `buf` has another length than was prepared; else see [`Communicator`].
    #[inline]
    pub fn run(&self, buf: &mut [T]) -> Result<()> {
        if buf.len() != self.len {
            return Err(wrong_length(self.comm.rank, self.len, buf.len()));
        }
        let data = Buffers::in_place(bytemuck::cast_slice_mut(buf));
        if self.comm.world == 1 {
            self.reduction.alone(data);
            return Ok(());
        }
        self.comm.run(|state| {
            let algorithm = state.prepared(self.algorithm, data.len(), &self.reduction)?;
            with_engine!(state.engine, |engine| engine
                .run(self.call, |engine| { engine.all_reduce(data, &self.reduction, algorithm, None) }))
        })
    }
}

#[cold]
fn wrong_length(rank: usize, prepared: usize, got: usize) -> Error {
    Error::invalid(format!("rank {rank}: an all_reduce prepared for {prepared} elements was given {got}"))
}
