//! All-reduce of what a function writes.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use tensorwire_core::{Call, Element, Op, ReduceOp, Result};

use super::Communicator;
use super::collectives::call;
use crate::engine::{Buffers, Reduction};

impl Communicator {
    /// Reduces, element by element, what every rank's `write` writes into a slice of `out`'s length, and leaves
    /// the result in `out` on every rank: as [`all_reduce`](Communicator::all_reduce), also for peers that call
    /// that.
    ///
    /// Where the [algorithm](Communicator::algorithm) is [one-shot](crate::Algorithm::OneShot), the slice is the
    /// shared memory that the peers read, and a copy is saved. Else it is `out`, and nothing is saved: for what is
    /// large, [`symmetric`](Communicator::symmetric) memory does without copies.
    ///
    /// `write` must write all elements. What they are before is any value. Peers wait while it runs; a call of
    /// this communicator in it is [`ConcurrentUse`](tensorwire_core::Error::ConcurrentUse). If it panics, the
    /// group ends, with [`Aborted`](tensorwire_core::Error::Aborted) on every other rank, and the panic goes on.
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # use tensorwire_core::ReduceOp;
    /// # std::thread::scope(|s| {
    /// #     for comm in Communicator::in_process(2)? {
    /// #         s.spawn(move || {
    /// let mut y = vec![0f32; 1000];
    /// comm.all_reduce_from(&mut y, ReduceOp::Sum, |partial| {
    ///     partial.iter_mut().enumerate().for_each(|(i, p)| *p = i as f32);
    /// })
    /// .unwrap();
    /// assert_eq!(y[7], 14.0);
    /// #         });
    /// #     }
    /// #     Ok::<(), tensorwire_core::Error>(())
    /// # })?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As for [`all_reduce`](Communicator::all_reduce). If the arguments are wrong, `write` isn't called.
    pub fn all_reduce_from<T: Element>(
        &self,
        out: &mut [T],
        op: ReduceOp,
        write: impl FnOnce(&mut [T]),
    ) -> Result<()> {
        let reduction = Reduction::new(T::DTYPE, op)?;
        if self.world == 1 {
            write(out);
            reduction.alone(Buffers::in_place(bytemuck::cast_slice_mut(out)));
            return Ok(());
        }
        let call = Call { reduce: Some(op), ..call::<T>(Op::AllReduce, out.len()) };
        let mut panic = None;
        // Whoever catches the panic finds `out` half-written, and no more than that.
        let write = |to: &mut [u8]| {
            let write = AssertUnwindSafe(|| write(bytemuck::cast_slice_mut(to)));
            catch_unwind(write).map_err(|payload| panic = Some(payload)).is_ok()
        };
        let done = self.run(|state| {
            let algorithm = state.choose(size_of_val(out), self.world)?;
            let out = bytemuck::cast_slice_mut(out);
            state.engine.run(call, |engine| engine.all_reduce_from(out, &reduction, algorithm, write))
        });
        match panic {
            Some(payload) => resume_unwind(payload),
            None => done,
        }
    }
}
