//! All-reduce, addition to a residual and RMSNorm in one: each row is finished as soon as its sum is there, while
//! it is in the cache.

use tensorwire_core::{DType, Error, ReduceOp};
use tensorwire_transports::shm::Failure;

use super::{Buffers, Engine, Reduction};
use crate::reduce::{AddRmsNorm, Kernels};
use crate::select::Algorithm;

/// What follows an all-reduce, row by row of `width` elements: `residual += x; x = rms_norm(residual) * weight`.
#[derive(Debug)]
pub(crate) struct Epilogue<'a> {
    kernel: AddRmsNorm,
    sum: Reduction,
    residual: &'a mut [u8],
    weight: &'a [u8],
    width: usize,
    eps: f32,
}

impl<'a> Epilogue<'a> {
    /// For rows as long as `weight`, as many as `residual` has.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where it isn't defined for the type.
    pub(crate) fn new(
        dtype: DType,
        residual: &'a mut [u8],
        weight: &'a [u8],
        eps: f32,
    ) -> Result<Epilogue<'a>, Error> {
        let Some(kernel) = Kernels::best().add_rms_norm(dtype) else {
            return Err(Error::invalid(format!("rms_norm is not defined for {dtype}")));
        };
        let sum = Reduction::new(dtype, ReduceOp::Sum)?;
        Ok(Epilogue { kernel, sum, residual, weight, width: weight.len() / dtype.size(), eps })
    }

    /// The reduction that it follows.
    pub(crate) fn sum(&self) -> Reduction {
        self.sum
    }

    /// Finishes the rows of `x` whose sums are in it up to byte `arrived`, from byte `from` on; returns where the
    /// first that isn't finished begins.
    pub(crate) fn finish_arrived(&mut self, x: &mut [u8], from: usize, arrived: usize) -> usize {
        let row = self.weight.len();
        let end = arrived / row * row;
        for at in (from..end).step_by(row) {
            let out = x[at..at + row].as_mut_ptr();
            // SAFETY: it has a row's bytes, and is the only source.
            unsafe { self.finish(out, at, &[out.cast_const()]) };
        }
        end.max(from)
    }

    /// Finishes the row that begins at byte `at`: `out`, whose sum is that of `sources`.
    ///
    /// # Safety
    /// `out` is a row's bytes that may be written, each source as many that may be read; all are aligned for the
    /// type, and `out` is a source or overlaps none.
    #[inline]
    unsafe fn finish(&mut self, out: *mut u8, at: usize, sources: &[*const u8]) {
        let residual = self.residual[at..at + self.weight.len()].as_mut_ptr();
        let (weight, n) = (self.weight.as_ptr(), sources.len());
        // SAFETY: (1) the caller vouches for `out` and the sources; (2) so do the borrows for the residual, a row
        // of which begins at `at`, and the weight, both slices of elements; (3) the residual is borrowed mutably,
        // so that nothing else overlaps it; (4) the kernels were chosen for this processor.
        unsafe { (self.kernel)(out, residual, sources.as_ptr(), n, weight, self.width, self.eps) }
    }
}

impl Engine {
    /// Reduces every rank's `x` into every rank's, and finishes its rows.
    #[inline]
    pub(crate) fn all_reduce_add_rms_norm(
        &mut self,
        x: &mut [u8],
        mut epilogue: Epilogue<'_>,
        algorithm: Algorithm,
    ) -> Result<(), Failure> {
        // What isn't one step, or is much, comes in pieces: rows are finished as their last piece arrives.
        if algorithm == Algorithm::TwoShot || x.len() > self.chunk {
            let (sum, mut finished) = (epilogue.sum, 0);
            return self.all_reduce_then(Buffers::in_place(x), &sum, algorithm, None, |x, arrived| {
                finished = epilogue.finish_arrived(x, finished, arrived);
            });
        }
        // Else in one pass over everybody's.
        self.group.note(algorithm.label());
        let inline = algorithm == Algorithm::Inline;
        let step = self.group.next_step()?;
        if inline {
            self.group.publish_inline(x);
        } else {
            self.group.use_slots(x.len());
            self.write_slot(0, x);
            self.group.publish();
            self.prefetch_slot(x.len());
        }
        self.group.wait_all(step)?;
        let Engine { group, sources, .. } = self;
        let (rank, row) = (group.rank(), epilogue.weight.len());
        for at in (0..x.len()).step_by(row) {
            let out = x[at..at + row].as_mut_ptr();
            sources.gather(rank, out, row, |peer, _| match inline {
                true => &group.peer_inline(peer, step)[at..],
                false => &group.peer_slot(peer, step)[at..],
            });
            // SAFETY: (1) `out` is `row` bytes of `x`, and this rank's source; (2) `gather` checked the others'
            // length; (3) flags and slots are aligned to 16 bytes and more, and rows are whole elements.
            unsafe { epilogue.finish(out, at, &sources.0) };
        }
        Ok(())
    }
}
