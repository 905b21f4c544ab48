//! All-reduce with what a tensor-parallel model does next.

use tensorwire_core::{Call, Element, Error, Op, ReduceOp, Result, Wire};

use super::Communicator;
use super::collectives::call;
#[cfg(feature = "tcp")]
use crate::engine::{Buffers, Either};
use crate::engine::{Epilogue, with_engine};

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
        self.all_reduce_add_rms_norm_as(x, residual, weight, eps, None)
    }

    /// As [`all_reduce_add_rms_norm`](Communicator::all_reduce_add_rms_norm), where `x` may be rounded on its way as by
    /// [`all_reduce_wire`](Communicator::all_reduce_wire): both results are bitwise what that, an addition and the norm give
    /// one after the other.
    ///
    /// # Errors
    /// As for [`all_reduce_add_rms_norm`](Communicator::all_reduce_add_rms_norm); [`Error::InvalidArgument`] but for f32,
    /// f16 and bf16.
    pub fn all_reduce_add_rms_norm_wire<T: Element>(
        &self,
        x: &mut [T],
        residual: &mut [T],
        weight: &[T],
        eps: f32,
        wire: Wire,
    ) -> Result<()> {
        self.expect_wire::<T>("all_reduce_add_rms_norm_wire", ReduceOp::Sum, wire)?;
        self.all_reduce_add_rms_norm_as(x, residual, weight, eps, Some(wire))
    }

    #[inline]
    fn all_reduce_add_rms_norm_as<T: Element>(
        &self,
        x: &mut [T],
        residual: &mut [T],
        weight: &[T],
        eps: f32,
        wire: Option<Wire>,
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
            wire,
            ..call::<T>(Op::AllReduceAddRmsNorm, x.len())
        };
        let x: &mut [u8] = bytemuck::cast_slice_mut(x);
        if self.world == 1 {
            epilogue.finish_arrived(x, 0, x.len());
            return Ok(());
        }
        self.run(|state| {
            #[cfg(feature = "tcp")]
            if let Some(wire) = wire
                && let Some((encoded, algorithm)) = state.encoded(wire, &epilogue.sum(), x.len())?
                && let Either::Tcp(engine) = &mut state.engine
            {
                return engine.run(call, |engine| {
                    engine.all_reduce_encoded(Buffers::in_place(x), &encoded, algorithm)?;
                    epilogue.finish_arrived(x, 0, x.len());
                    Ok(())
                });
            }
            let algorithm = state.choose(x.len(), &epilogue.sum())?;
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.all_reduce_add_rms_norm(x, epilogue, algorithm)))
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

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;
    use tensorwire_transports::shm::Options;

    use super::*;
    use crate::select::Algorithm;

    /// Rounding as the `half` crate has it, and one NaN.
    trait Plain: Element {
        fn widen(self) -> f32;
        fn narrow(x: f32) -> Self;
    }

    impl Plain for f32 {
        fn widen(self) -> f32 {
            self
        }
        fn narrow(x: f32) -> f32 {
            if x.is_nan() { f32::NAN } else { x }
        }
    }

    impl Plain for f16 {
        fn widen(self) -> f32 {
            self.to_f32()
        }
        fn narrow(x: f32) -> f16 {
            if x.is_nan() { f16::NAN } else { f16::from_f32(x) }
        }
    }

    impl Plain for bf16 {
        fn widen(self) -> f32 {
            self.to_f32()
        }
        fn narrow(x: f32) -> bf16 {
            if x.is_nan() { bf16::NAN } else { bf16::from_f32(x) }
        }
    }

    /// An addition and a norm, each by itself.
    fn add_and_norm<T: Plain>(x: &mut [T], residual: &mut [T], weight: &[T], eps: f32) {
        for (residual, x) in residual.iter_mut().zip(&*x) {
            *residual = T::narrow(residual.widen() + x.widen());
        }
        let width = weight.len();
        for (x, residual) in x.chunks_mut(width).zip(residual.chunks(width)) {
            let mut lanes = [0f32; 64];
            for (i, r) in residual.iter().enumerate() {
                lanes[i % 64] += r.widen() * r.widen();
            }
            for h in [32, 16, 8, 4, 2, 1] {
                (0..h).for_each(|j| lanes[j] += lanes[j + h]);
            }
            let scale = 1.0 / (lanes[0] / width as f32 + eps).sqrt();
            for ((x, r), w) in x.iter_mut().zip(residual).zip(weight) {
                *x = T::narrow(r.widen() * scale * w.widen());
            }
        }
    }

    #[derive(Clone, Debug)]
    struct Case {
        world: usize,
        tokens: usize,
        width: usize,
        eps: f32,
        small_slots: bool,
        algorithm: Option<Algorithm>,
        /// Whether infinities, NaNs, zeros and subnormals are among the numbers.
        special: bool,
    }

    impl Case {
        fn numbers<T: Plain>(&self, seed: usize, len: usize) -> Vec<T> {
            let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40, 6e-8, f32::MAX];
            let number = |i: usize| {
                let h = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (seed as u64 * 0x85EB_CA6B);
                let h = (h ^ (h >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 20;
                match self.special && h.is_multiple_of(97) {
                    true => special[(h / 97) as usize % special.len()],
                    false => (h % 20_011) as f32 / 5000.0 - 2.0,
                }
            };
            (0..len).map(|i| T::narrow(number(i))).collect()
        }

        fn check<T: Plain>(&self, comm: &Communicator) {
            let (len, rank) = (self.tokens * self.width, comm.rank());
            let weight = self.numbers::<T>(200, self.width);
            let (mut x, mut residual) = (self.numbers::<T>(rank, len), self.numbers(100, len));
            let (mut fused, mut fused_residual) = (x.clone(), residual.clone());
            comm.set_algorithm(self.algorithm).unwrap();
            if comm.algorithm(len * size_of::<T>()).is_err() {
                comm.set_algorithm(None).unwrap();
            }
            comm.all_reduce_add_rms_norm(&mut fused, &mut fused_residual, &weight, self.eps).unwrap();
            comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
            add_and_norm(&mut x, &mut residual, &weight, self.eps);
            let bytes = |x: &[T]| bytemuck::cast_slice::<T, u8>(x).to_vec();
            assert!(bytes(&fused_residual) == bytes(&residual), "residual: {self:?} {}", T::DTYPE);
            assert!(bytes(&fused) == bytes(&x), "output: {self:?} {}", T::DTYPE);
        }
    }

    fn case() -> impl Strategy<Value = Case> {
        let width = prop_oneof![4 => 1usize..300, 1 => 300usize..5000];
        let algorithm = proptest::option::of(proptest::sample::select(&Algorithm::ALL[..]));
        let eps = prop_oneof![Just(1e-5f32), Just(0.0), 0f32..1.0];
        let numbers = (1usize..=5, 0usize..6, width, eps);
        (numbers, any::<bool>(), algorithm, any::<bool>()).prop_map(
            |((world, tokens, width, eps), small_slots, algorithm, special)| Case {
                world,
                tokens,
                width,
                eps,
                small_slots,
                algorithm,
                special,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]
        #[test]
        fn fused_is_bitwise_one_after_the_other(case in case()) {
            let slot_bytes = if case.small_slots { 8 * 4096 } else { Options::default().slot_bytes };
            let options = Options { slot_bytes, ..Options::default() };
            std::thread::scope(|s| {
                for comm in Communicator::in_process_with(case.world, &options).unwrap() {
                    let case = &case;
                    s.spawn(move || {
                        case.check::<f32>(&comm);
                        case.check::<bf16>(&comm);
                        case.check::<f16>(&comm);
                    });
                }
            });
        }
    }
}
