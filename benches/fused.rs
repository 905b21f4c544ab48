//! What all_reduce_add_rms_norm saves: two ranks, as threads, end a row-parallel layer by one call, by two
//! (all_reduce, then addition and norm fused), and by three (all_reduce, addition, norm).
//!
//! ```text
//! cargo bench --bench fused
//! ```
//!
//! Each way takes its turn in every round; the times are medians of the rounds, in microseconds a call. The
//! separate addition and norm are compiled for the same instruction set as the library's kernels.

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::bf16;
use tensorwire::collectives::reduce::{AddRmsNorm, Kernel, Kernels};
use tensorwire::{Communicator, Element, ReduceOp, Result};

const ROUNDS: usize = 15;
const BATCH: Duration = Duration::from_millis(8);
const EPS: f32 = 1e-5;

#[derive(Clone, Copy)]
enum Way {
    OneCall,
    TwoCalls,
    ThreeCalls,
}

const WAYS: [Way; 3] = [Way::OneCall, Way::TwoCalls, Way::ThreeCalls];

trait Number: Element {
    fn widen(self) -> f32;
    fn narrow(x: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> f32 {
        x
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> bf16 {
        let bits = x.to_bits();
        bf16::from_bits((bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
    }
}

/// `out = rms_norm(x) * weight`, for one row.
#[inline(always)]
fn rms_norm<T: Number>(out: &mut [T], x: &[T], weight: &[T]) {
    let mut squares = [0f32; 64];
    let (blocks, rest) = x.as_chunks::<64>();
    for block in blocks {
        for (s, x) in squares.iter_mut().zip(block) {
            *s += x.widen() * x.widen();
        }
    }
    for (s, x) in squares.iter_mut().zip(rest) {
        *s += x.widen() * x.widen();
    }
    let scale = 1.0 / (squares.iter().sum::<f32>() / x.len() as f32 + EPS).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = T::narrow(x.widen() * scale * weight.widen());
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn rms_norm_avx512<T: Number>(out: &mut [T], x: &[T], weight: &[T]) {
    rms_norm(out, x, weight);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn rms_norm_avx2<T: Number>(out: &mut [T], x: &[T], weight: &[T]) {
    rms_norm(out, x, weight);
}

fn rms_norm_best<T: Number>(out: &mut [T], x: &[T], weight: &[T]) {
    match Kernels::best().name() {
        // SAFETY: the library chose these kernels because the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        "avx512" => unsafe { rms_norm_avx512(out, x, weight) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        "avx2" => unsafe { rms_norm_avx2(out, x, weight) },
        _ => rms_norm(out, x, weight),
    }
}

/// One rank's part of a layer's end.
struct Layer<'a, T> {
    comm: &'a Communicator,
    x: Vec<T>,
    residual: Vec<T>,
    weight: Vec<T>,
    add: Kernel,
    add_rms_norm: AddRmsNorm,
}

impl<'a, T: Number> Layer<'a, T> {
    fn new(comm: &'a Communicator, width: usize, tokens: usize) -> Layer<'a, T> {
        let numbers = |len: usize| (0..len).map(|i| T::narrow(1.0 + (i % 13) as f32 / 8.0)).collect();
        let kernels = Kernels::best();
        let (Some(add), Some(add_rms_norm)) =
            (kernels.get(T::DTYPE, ReduceOp::Sum), kernels.add_rms_norm(T::DTYPE))
        else {
            unreachable!("both types have both kernels")
        };
        let (x, residual) = (numbers(width * tokens), numbers(width * tokens));
        Layer { comm, x, residual, weight: numbers(width), add, add_rms_norm }
    }

    fn call(&mut self, way: Way) -> Result<()> {
        let Layer { comm, x, residual, weight, .. } = self;
        let width = weight.len();
        if let Way::OneCall = way {
            return comm.all_reduce_add_rms_norm(x, residual, weight, EPS);
        }
        comm.all_reduce(x, ReduceOp::Sum)?;
        if let Way::TwoCalls = way {
            for (x, residual) in x.chunks_exact_mut(width).zip(residual.chunks_exact_mut(width)) {
                let (x, residual, weight) =
                    (x.as_mut_ptr().cast::<u8>(), residual.as_mut_ptr(), weight.as_ptr());
                // SAFETY: (1) each has `width` elements of `T`; (2) the output is the only source; (3) the kernel
                // is for this type and processor.
                unsafe {
                    let sources = &x.cast_const();
                    (self.add_rms_norm)(x, residual.cast(), sources, 1, weight.cast(), width, EPS);
                }
            }
            return Ok(());
        }
        let sources = [residual.as_ptr().cast(), x.as_ptr().cast()];
        // SAFETY: (1) both have as many elements of `T`; (2) the destination is the first; (3) as above.
        unsafe { (self.add)(residual.as_mut_ptr().cast(), sources.as_ptr(), 2, x.len(), 1.0) };
        for (x, residual) in x.chunks_exact_mut(width).zip(residual.chunks_exact(width)) {
            rms_norm_best(x, residual, weight);
        }
        Ok(())
    }

    /// Seconds a call, of `calls` of them. The numbers begin anew, so that none grows beyond its type.
    fn batch(&mut self, way: Way, calls: u32) -> Result<f64> {
        self.residual.fill(T::narrow(1.0));
        self.comm.barrier()?;
        let start = Instant::now();
        for _ in 0..calls {
            self.call(way)?;
            black_box(&mut self.x);
        }
        let mut seconds = [start.elapsed().as_secs_f64() / f64::from(calls)];
        self.comm.all_reduce(&mut seconds, ReduceOp::Max)?;
        Ok(seconds[0])
    }
}

/// The median seconds of a call each way.
fn measure<T: Number>(comm: &Communicator, width: usize, tokens: usize) -> Result<[f64; 3]> {
    let mut layer = Layer::<T>::new(comm, width, tokens);
    let mut calls = 8;
    for _ in 0..3 {
        let once = layer.batch(Way::ThreeCalls, calls)?;
        calls = (BATCH.as_secs_f64() / once).clamp(4.0, 1e5) as u32;
    }
    let mut times = [(); 3].map(|()| Vec::with_capacity(ROUNDS));
    for _ in 0..ROUNDS {
        for (way, times) in WAYS.into_iter().zip(&mut times) {
            times.push(layer.batch(way, calls)?);
        }
    }
    Ok(times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }))
}

fn row<T: Number>(comm: &Communicator, width: usize, tokens: usize) -> Result<()> {
    let [one, two, three] = measure::<T>(comm, width, tokens)?;
    if comm.rank() == 0 {
        let algorithm = comm.algorithm(width * tokens * size_of::<T>())?.name();
        println!(
            "{:>5} {width:>6} {tokens:>6} {algorithm:>9} {:>9.2} {:>9.2} {:>9.2} {:>8.2} {:>8.2}",
            T::DTYPE.name(),
            one * 1e6,
            two * 1e6,
            three * 1e6,
            two / one,
            three / one,
        );
    }
    Ok(())
}

fn rank(comm: &Communicator) -> Result<()> {
    for width in [768, 4096, 8192] {
        for tokens in [1, 16, 256] {
            row::<f32>(comm, width, tokens)?;
            row::<bf16>(comm, width, tokens)?;
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    println!(
        "dtype  width tokens algorithm  one (us)       two     three  two/one  three/one  ({} kernels)",
        Kernels::best().name()
    );
    let ranks = Communicator::in_process(2)?.into_iter().map(|comm| std::thread::spawn(move || rank(&comm)));
    let ranks: Vec<_> = ranks.collect();
    for rank in ranks {
        rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    }
    Ok(())
}
