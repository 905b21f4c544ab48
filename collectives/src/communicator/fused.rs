//! All-reduce with what a tensor-parallel model does next.

use tensorwire_core::{Call, Element, Error, Op, ReduceOp, Result};

use super::Communicator;
use super::collectives::call;
use crate::engine::Epilogue;

impl Communicator {
    /// All-reduce, addition to the residual and RMSNorm in one pass: what follows a row-parallel product in a
    /// transformer.
    ///
    /// `x` is this rank's partial product, `[tokens, width]`; `residual`, of the same shape, and `weight`, of
    /// `width` elements, are alike on every rank. On every rank it leaves
    ///
    /// ```text
    /// residual = residual + all_reduce(x, sum)
    /// x        = residual / sqrt(mean(residual^2) + eps) * weight      row by row
    /// ```
    ///
    /// Both are bitwise what [`all_reduce`](Communicator::all_reduce), an addition rounded to `T`, and the
    /// RMSNorm that [`AddRmsNorm`](crate::reduce::AddRmsNorm) defines to the bit give one after the other, and so
    /// the same on every rank, whatever the algorithm, the number of tokens and the processor. As there, a NaN is
    /// always the same NaN; a row whose squares overflow becomes zeros, and NaN where it is infinite; with an
    /// `eps` of 0 a row of zeros becomes NaN.
    ///
    /// It is defined for f32, f16, bf16 and f64; 16-bit types are normalised in f32 and rounded once. It moves
    /// the bytes that the all-reduce moves. TensorRT-LLM knows it as `RESIDUAL_RMS_NORM`, vLLM as
    /// `AllReduceFusedAddRMSNorm`; the norm is that of Zhang and Sennrich, "Root Mean Square Layer Normalization"
    /// (2019).
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # std::thread::scope(|s| {
    /// #     for comm in Communicator::in_process(2)? {
    /// #         s.spawn(move || {
    /// // Two tokens of width 2; each rank has half of the sums.
    /// let mut x = [0.5f32, 1.0, 3.0, -2.0];
    /// let mut residual = [2.0, 2.0, 0.0, 0.0];
    /// comm.all_reduce_add_rms_norm(&mut x, &mut residual, &[1.0, 10.0], 0.0).unwrap();
    /// assert_eq!(residual, [3.0, 4.0, 6.0, -4.0]);
    /// let rms = 12.5f32.sqrt(); // of 3 and 4
    /// assert!((x[0] - 3.0 / rms).abs() < 1e-6 && (x[1] - 40.0 / rms).abs() < 1e-5);
    /// #         });
    /// #     }
    /// #     Ok::<(), tensorwire_core::Error>(())
    /// # })?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `residual` isn't as long as `x`, `weight` is empty or `x` isn't whole rows of
    /// its length, `eps` is negative or not finite, or the type is another; [`Error::Mismatch`] also if the ranks
    /// give another width or `eps`, or some call [`all_reduce`](Communicator::all_reduce); else see
    /// [`Communicator`].
    #[inline]
    pub fn all_reduce_add_rms_norm<T: Element>(
        &self,
        x: &mut [T],
        residual: &mut [T],
        weight: &[T],
        eps: f32,
    ) -> Result<()> {
        self.expect("all_reduce_add_rms_norm: residual", "as many as x", Some(x.len()), residual.len())?;
        let width = self.width(x.len(), weight.len())?;
        if !(eps.is_finite() && eps >= 0.0) {
            return Err(self.refuse(format!("eps is {eps}: give a finite number from 0 up")));
        }
        let (residual, weight) = (bytemuck::cast_slice_mut(residual), bytemuck::cast_slice(weight));
        let mut epilogue = Epilogue::new(T::DTYPE, residual, weight, eps)?;
        let call = Call {
            reduce: Some(ReduceOp::Sum),
            root: Some(width),
            layout: eps.to_bits(),
            ..call::<T>(Op::AllReduceAddRmsNorm, x.len())
        };
        let x: &mut [u8] = bytemuck::cast_slice_mut(x);
        if self.world == 1 {
            epilogue.finish_arrived(x, 0, x.len());
            return Ok(());
        }
        self.run(|state| {
            let algorithm = state.choose(x.len(), self.world)?;
            state.engine.run(call, |engine| engine.all_reduce_add_rms_norm(x, epilogue, algorithm))
        })
    }

    /// The length of a row, if `len` elements are whole rows.
    #[inline]
    fn width(&self, len: usize, width: usize) -> Result<u32> {
        match u32::try_from(width) {
            Ok(width @ 1..) if len.is_multiple_of(width as usize) => Ok(width),
            Ok(_) => Err(self.refuse(format!("x has {len} elements, which aren't rows of weight's {width}"))),
            Err(_) => Err(self.refuse(format!("weight has {width} elements, the most is {}", u32::MAX))),
        }
    }

    #[cold]
    fn refuse(&self, what: String) -> Error {
        Error::invalid(format!("rank {}: all_reduce_add_rms_norm: {what}", self.rank))
    }
}
