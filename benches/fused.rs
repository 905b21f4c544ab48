//! What all_reduce_add_rms_norm saves: two ranks, as threads, end a row-parallel layer by one call, by two
//! (all_reduce, then addition and norm fused), and by three (all_reduce, addition, norm).
//!
//! ```text
//! cargo bench --bench fused
//! ```
//!
//! Each way takes its turn in every round; the times are medians of the rounds, in microseconds a call. The
//! separate addition and norm are compiled for the same instruction set as the library's kernels. Without
//! `--bench`, as under `cargo test`, each is tried once and means nothing.

use std::cell::RefCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use half::bf16;
use tensorwire::collectives::reduce::{AddRmsNorm, Kernel, Kernels};
use tensorwire::{Communicator, Element, ReduceOp, Result};

const EPS: f32 = 1e-5;

/// How long to measure.
#[derive(Clone, Copy)]
struct Effort {
    batch: Duration,
    rounds: usize,
}

impl Effort {
    /// The median seconds of a call each way. `call(way)` makes one, `reset` comes before each batch.
    fn seconds(
        self,
        comm: &Communicator,
        mut reset: impl FnMut(),
        mut call: impl FnMut(usize) -> Result<()>,
    ) -> Result<[f64; 3]> {
        let mut batch = |way, calls| {
            reset();
            comm.barrier()?;
            let start = Instant::now();
            for _ in 0..calls {
                call(way)?;
            }
            let mut seconds = [start.elapsed().as_secs_f64() / f64::from(calls)];
            comm.all_reduce(&mut seconds, ReduceOp::Max)?;
            Result::Ok(seconds[0])
        };
        let mut calls = 4;
        for _ in 0..3 {
            calls = (self.batch.as_secs_f64() / batch(2, calls)?).clamp(1.0, 1e5) as u32;
        }
        let mut times = [(); 3].map(|()| Vec::with_capacity(self.rounds));
        for _ in 0..self.rounds {
            for (way, times) in times.iter_mut().enumerate() {
                times.push(batch(way, calls)?);
            }
        }
        Ok(times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        }))
    }
}

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

    fn in_one_call(&mut self) -> Result<()> {
        self.comm.all_reduce_add_rms_norm(&mut self.x, &mut self.residual, &self.weight, EPS)
    }

    fn in_two(&mut self) -> Result<()> {
        self.comm.all_reduce(&mut self.x, ReduceOp::Sum)?;
        let width = self.weight.len();
        for (x, residual) in self.x.chunks_exact_mut(width).zip(self.residual.chunks_exact_mut(width)) {
            let (x, residual) = (x.as_mut_ptr().cast::<u8>(), residual.as_mut_ptr().cast());
            let weight = self.weight.as_ptr().cast();
            // SAFETY: (1) each has `width` elements of `T`; (2) the output is the only source; (3) the kernel is
            // for this type and processor.
            unsafe { (self.add_rms_norm)(x, residual, &x.cast_const(), 1, weight, width, EPS) };
        }
        Ok(())
    }

    fn in_three(&mut self) -> Result<()> {
        let Layer { x, residual, weight, .. } = self;
        self.comm.all_reduce(x, ReduceOp::Sum)?;
        let to = residual.as_mut_ptr().cast::<u8>();
        let sources = [to.cast_const(), x.as_ptr().cast()];
        // SAFETY: (1) both have as many elements of `T`; (2) the destination is the first; (3) as above.
        unsafe { (self.add)(to, sources.as_ptr(), 2, x.len(), 1.0) };
        for (x, residual) in x.chunks_exact_mut(weight.len()).zip(residual.chunks_exact(weight.len())) {
            rms_norm_best(x, residual, weight);
        }
        Ok(())
    }
}

fn add_rms_norm<T: Number>(comm: &Communicator, effort: Effort, width: usize, tokens: usize) -> Result<()> {
    let layer = RefCell::new(Layer::<T>::new(comm, width, tokens));
    // The numbers begin anew, so that none grows beyond its type.
    let reset = || layer.borrow_mut().residual.fill(T::narrow(1.0));
    let [one, two, three] = effort.seconds(comm, reset, |way| {
        let mut layer = layer.borrow_mut();
        match way {
            0 => layer.in_one_call()?,
            1 => layer.in_two()?,
            _ => layer.in_three()?,
        }
        black_box(&mut layer.x);
        Ok(())
    })?;
    if comm.rank() == 0 {
        let (dtype, algorithm) = (T::DTYPE.name(), comm.algorithm(width * tokens * size_of::<T>())?);
        println!(
            "{dtype:>5} {width:>6} {tokens:>6} {:>9} {:>9.2} {:>9.2} {:>9.2} {:>8.2} {:>10.2}",
            algorithm.name(),
            one * 1e6,
            two * 1e6,
            three * 1e6,
            two / one,
            three / one,
        );
    }
    Ok(())
}

fn rank(comm: &Communicator, effort: Effort) -> Result<()> {
    for width in [768, 4096, 8192] {
        for tokens in [1, 16, 256] {
            add_rms_norm::<f32>(comm, effort, width, tokens)?;
            add_rms_norm::<bf16>(comm, effort, width, tokens)?;
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let effort = match args.iter().any(|a| a == "--bench") {
        true => Effort { batch: Duration::from_millis(8), rounds: 15 },
        false => Effort { batch: Duration::ZERO, rounds: 1 },
    };
    println!("two ranks, {} kernels", Kernels::best().name());
    println!("dtype  width tokens algorithm  one (us)       two     three  two/one  three/one");
    let start = |comm| std::thread::spawn(move || rank(&comm, effort));
    let ranks: Vec<_> = Communicator::in_process(2)?.into_iter().map(start).collect();
    for rank in ranks {
        rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    }
    Ok(())
}
