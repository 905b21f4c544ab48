//! Buffers that every rank of the host maps.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use tensorwire_core::{Call, Element, Error, Op, ReduceOp, Result};
use tensorwire_transports::shm::{Failure, Region};

use super::collectives::call;
use super::{Communicator, State};
use crate::engine::{Buffers, Either, Engine, Reduction};
use crate::select::Algorithm;

/// A rank's block of memory that every rank of its communicator maps, so that a collective on it need not copy
/// to send. It reads and writes as a slice. The memory is freed when all ranks have dropped theirs.
pub struct Symmetric<T> {
    region: Region,
    len: usize,
    elements: PhantomData<T>,
}

impl<T> fmt::Debug for Symmetric<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Symmetric").field("len", &self.len).field("region", &self.region).finish()
    }
}

impl<T: Element> Deref for Symmetric<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        let block = self.region.block(self.region.rank()).cast::<T>();
        // SAFETY: (1) the block has `len` elements, is aligned to a page, and any bytes are a `T`, which is Pod;
        // (2) peers write to it only between two steps of a collective, for which this rank's call borrows
        // `self` mutably.
        unsafe { std::slice::from_raw_parts(block, self.len) }
    }
}

impl<T: Element> DerefMut for Symmetric<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        let block = self.region.block(self.region.rank()).cast::<T>();
        // SAFETY: as for `deref`; peers don't read it either but in such a collective.
        unsafe { std::slice::from_raw_parts_mut(block, self.len) }
    }
}

impl Communicator {
    /// A buffer of `len` zeros that every rank of the host maps. Every rank calls it with the same length. From 1 MiB
    /// on it is made of huge pages where the system has them, and takes a multiple of 2 MiB.
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # use tensorwire_core::ReduceOp;
    /// # std::thread::scope(|s| {
    /// #     for comm in Communicator::in_process(2)? {
    /// #         s.spawn(move || {
    /// let mut x = comm.symmetric::<f32>(1 << 16).unwrap();
    /// x.fill(comm.rank() as f32 + 1.0);
    /// comm.all_reduce_symmetric(&mut x, ReduceOp::Sum).unwrap();
    /// assert!(x.iter().all(|x| *x == 3.0));
    /// #         });
    /// #     }
    /// #     Ok::<(), tensorwire_core::Error>(())
    /// # })?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Os`] or [`Error::Rendezvous`], on every rank, if the memory can't be had; [`Error::InvalidArgument`]
    /// in a group that uses a network, also where some of its ranks share memory; else see [`Communicator`].
    pub fn symmetric<T: Element>(&self, len: usize) -> Result<Symmetric<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| {
            Error::invalid(format!("rank {}: {len} elements are more than memory holds", self.rank))
        })?;
        let region = self.run(|state| self.shared_memory(state)?.group.region(bytes))?;
        Ok(Symmetric { region, len, elements: PhantomData })
    }

    /// Reduces every rank's `buf`, element by element, and leaves the result in it on every rank: as
    /// [`all_reduce`](Communicator::all_reduce), without copies.
    ///
    /// # Errors
    /// As for [`all_reduce`](Communicator::all_reduce); [`Error::InvalidArgument`] if the buffer is another
    /// communicator's.
    pub fn all_reduce_symmetric<T: Element>(&self, buf: &mut Symmetric<T>, op: ReduceOp) -> Result<()> {
        let reduction = Reduction::new(T::DTYPE, op)?;
        let bytes = buf.len * size_of::<T>();
        if self.world == 1 {
            return self.all_reduce(buf, op);
        }
        let call = Call { reduce: Some(op), ..call::<T>(Op::AllReduce, buf.len) };
        self.run(|state| {
            let algorithm = state.choose_symmetric(bytes)?;
            let engine = self.shared_memory(state)?;
            if !engine.group.owns(&buf.region) {
                let what = format!("rank {}: the symmetric buffer is another communicator's", self.rank);
                return Err(Error::invalid(what).into());
            }
            if algorithm == Algorithm::Symmetric {
                // Two ranks with different buffers don't make the same call.
                let call = Call { layout: buf.region.id(), ..call };
                let run = |engine: &mut Engine| engine.all_reduce_symmetric(&buf.region, bytes, &reduction);
                return engine.run(call, run);
            }
            // It travels in the flag or the slots, as from any other memory.
            let data = Buffers::in_place(bytemuck::cast_slice_mut(buf));
            engine.run(call, |engine| engine.all_reduce(data, &reduction, algorithm, None))
        })
    }

    /// The engine over shared memory, which symmetric buffers are a part of.
    fn shared_memory<'a>(&self, state: &'a mut State) -> Result<&'a mut Engine, Failure> {
        match &mut state.engine {
            Either::Shm(engine) => Ok(engine),
            #[cfg(feature = "tcp")]
            Either::Tcp(_) => Err(Box::new(Error::invalid(format!(
                "rank {}: a symmetric buffer lies in shared memory, and this group uses a network: use ordinary memory, or a \
                 group of ranks that share a host's",
                self.rank
            )))),
        }
    }
}
