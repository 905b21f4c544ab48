//! One rank of a benchmark: checks a collective's result, then times it.

use std::time::{Duration, Instant};

use tensorwire::{Communicator, DType, Element, Op, ReduceOp, collectives::reduce::Kernels};

use super::{Args, Row};
use crate::failure::{Failure, print};

/// How long a batch is meant to take.
const BATCH: Duration = Duration::from_millis(60);

/// Most single calls that are timed for the 99th percentile.
const SINGLE_CALLS: usize = 10_000;

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let comm = Communicator::from_env().map_err(Failure::run)?;
    comm.set_algorithm(args.algorithm.0).map_err(Failure::run)?;
    let sizes: &[usize] = if args.collective == Op::Barrier { &[0] } else { &args.bytes };
    for bytes in sizes {
        let row = match args.dtype {
            DType::F32 => measure::<f32>(&comm, args, *bytes),
            DType::F16 => measure::<half::f16>(&comm, args, *bytes),
            DType::BF16 => measure::<half::bf16>(&comm, args, *bytes),
            DType::F64 => measure::<f64>(&comm, args, *bytes),
            DType::F8E4M3 => measure::<float8::F8E4M3>(&comm, args, *bytes),
            DType::F8E5M2 => measure::<float8::F8E5M2>(&comm, args, *bytes),
            DType::I8 => measure::<i8>(&comm, args, *bytes),
            DType::U8 => measure::<u8>(&comm, args, *bytes),
            DType::I32 => measure::<i32>(&comm, args, *bytes),
            DType::U32 => measure::<u32>(&comm, args, *bytes),
            DType::I64 => measure::<i64>(&comm, args, *bytes),
            DType::U64 => measure::<u64>(&comm, args, *bytes),
        };
        let row = row.map_err(|e| Failure::run(format!("{bytes} bytes: {e}")))?;
        if let (0, Some(row)) = (comm.rank(), row) {
            let json = serde_json::to_string(&row).map_err(Failure::run)?;
            print(format_args!("{json}\n"))?;
        }
    }
    comm.barrier().map_err(Failure::run)
}

/// A collective with its buffers.
struct Case<'a, T> {
    comm: &'a Communicator,
    op: Op,
    reduce: ReduceOp,
    input: Vec<T>,
    /// Empty for a collective in place.
    output: Vec<T>,
}

impl<'a, T: Element> Case<'a, T> {
    fn new(comm: &'a Communicator, args: &Args, bytes: usize) -> Case<'a, T> {
        let (n, count) = (comm.world(), bytes / size_of::<T>());
        let (input, output) = match args.collective {
            Op::AllReduce | Op::Broadcast => (count, 0),
            Op::AllGather => (count, count * n),
            Op::ReduceScatter => (count / n * n, count / n),
            _ => (0, 0),
        };
        let zeros = |len| vec![T::zeroed(); len];
        Case { comm, op: args.collective, reduce: args.op, input: zeros(input), output: zeros(output) }
    }

    #[inline]
    fn call(&mut self) -> tensorwire::Result<()> {
        match self.op {
            Op::AllReduce => self.comm.all_reduce(&mut self.input, self.reduce),
            Op::AllGather => self.comm.all_gather(&self.input, &mut self.output),
            Op::ReduceScatter => self.comm.reduce_scatter(&self.input, &mut self.output, self.reduce),
            Op::Broadcast => self.comm.broadcast(&mut self.input, 0),
            _ => self.comm.barrier(),
        }
    }

    /// Calls once on values that tell ranks and elements apart, and compares with the definition.
    fn check(&mut self) -> tensorwire::Result<bool> {
        let (rank, n) = (self.comm.rank(), self.comm.world());
        let len = self.input.len();
        for (i, x) in self.input.iter_mut().enumerate() {
            *x = sample(rank, i);
        }
        self.call()?;
        let reduced = |i: usize| {
            let values: Vec<T> = (0..n).map(|r| sample(r, i)).collect();
            let sources: Vec<*const u8> = values.iter().map(|v| std::ptr::from_ref(v).cast()).collect();
            let mut out = T::zeroed();
            if let Some(kernel) = Kernels::available()[0].get(T::DTYPE, self.reduce) {
                let dst = std::ptr::from_mut(&mut out).cast();
                // SAFETY: (1) each source and the destination is one element of `T`; (2) they don't overlap;
                // (3) the portable kernels run anywhere.
                unsafe { kernel(dst, sources.as_ptr(), n, 1, self.reduce.factor()) };
            }
            out
        };
        let same = |a: &T, b: T| bytemuck::bytes_of(a) == bytemuck::bytes_of(&b);
        let ok = match self.op {
            Op::AllReduce => self.input.iter().enumerate().all(|(i, x)| same(x, reduced(i))),
            Op::AllGather => self.output.iter().enumerate().all(|(i, x)| same(x, sample(i / len, i % len))),
            Op::ReduceScatter => {
                let first = rank * self.output.len();
                self.output.iter().enumerate().all(|(i, x)| same(x, reduced(first + i)))
            }
            Op::Broadcast => self.input.iter().enumerate().all(|(i, x)| same(x, sample(0, i))),
            _ => true,
        };
        self.input.fill(T::zeroed());
        Ok(ok)
    }
}

/// Rank `rank`'s element `i`: an integer, or a number from 1 up to 2.
fn sample<T: Element>(rank: usize, i: usize) -> T {
    let h = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (rank as u64 + 1).wrapping_mul(0x85EB_CA6B);
    let h = (h ^ (h >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 11;
    // The exponent of 1 in the type's own format, and random mantissa bits.
    let bits = match T::DTYPE {
        DType::F64 => 0x3ff0_0000_0000_0000 | h & 0x000f_ffff_ffff_ffff,
        DType::F32 => 0x3f80_0000 | h & 0x007f_ffff,
        DType::F16 => 0x3c00 | h & 0x03ff,
        DType::BF16 => 0x3f80 | h & 0x007f,
        DType::F8E4M3 => 0x38 | h & 0x07,
        DType::F8E5M2 => 0x3c | h & 0x03,
        _ => h,
    };
    bytemuck::pod_read_unaligned(&bits.to_le_bytes()[..size_of::<T>()])
}

/// Measures one size; `None` where it is too small to give every rank an element.
fn measure<T: Element>(comm: &Communicator, args: &Args, bytes: usize) -> tensorwire::Result<Option<Row>> {
    let mut case = Case::<T>::new(comm, args, bytes);
    if args.collective == Op::ReduceScatter && case.output.is_empty() {
        return Ok(None);
    }
    let algorithm = match args.collective {
        Op::AllReduce => comm.algorithm(bytes)?.name(),
        _ => "direct",
    };
    if !case.check()? {
        let what = format!("rank {}: the result of {} is wrong", comm.rank(), args.collective);
        return Err(tensorwire::Error::InvalidArgument(what));
    }
    let mut iterations = 4;
    let mut means = Vec::new();
    for batch in -2..args.batches as i32 {
        comm.barrier()?;
        let start = Instant::now();
        for _ in 0..iterations {
            if args.touch {
                case.input.fill(T::zeroed());
            }
            case.call()?;
        }
        let mean = slowest(comm, start.elapsed().as_secs_f64() / f64::from(iterations))?;
        if batch < 0 {
            iterations = (BATCH.as_secs_f64() / mean).clamp(3.0, 100_000.0) as u32;
        } else {
            means.push(mean);
        }
    }
    let singles = SINGLE_CALLS.min(iterations as usize);
    let mut single = Vec::with_capacity(singles);
    for _ in 0..singles {
        if args.touch {
            case.input.fill(T::zeroed());
        }
        let start = Instant::now();
        case.call()?;
        single.push(start.elapsed().as_secs_f64());
    }
    single.sort_by(f64::total_cmp);
    let p99 = slowest(comm, single[(singles * 99).div_ceil(100) - 1])?;
    means.sort_by(f64::total_cmp);
    let median = means[means.len() / 2];

    // As nccl-tests: the size is the whole output of an all_gather; the bus carries all but a rank's own part.
    let n = comm.world() as f64;
    let (data, bus) = match args.collective {
        Op::AllReduce => (bytes as f64, 2.0 * (n - 1.0) / n),
        Op::AllGather => (bytes as f64 * n, (n - 1.0) / n),
        Op::ReduceScatter => (bytes as f64, (n - 1.0) / n),
        Op::Broadcast => (bytes as f64, 1.0),
        _ => (0.0, 0.0),
    };
    let algbw = data / median / 1e9;
    let rounded = |x: f64| (x * 1e6).round() / 1e6;
    Ok(Some(Row {
        collective: args.collective.to_string(),
        transport: "shm".into(),
        ranks: comm.world(),
        dtype: args.dtype.to_string(),
        op: args.op.to_string(),
        bytes,
        algorithm: if comm.world() == 1 { "none" } else { algorithm }.into(),
        buffer: "user".into(),
        median_us: rounded(median * 1e6),
        p99_us: rounded(p99 * 1e6),
        min_us: rounded(means[0] * 1e6),
        algbw_gbps: rounded(algbw),
        busbw_gbps: rounded(algbw * bus),
        correct: true,
    }))
}

/// The largest of all ranks' times, in seconds.
fn slowest(comm: &Communicator, seconds: f64) -> tensorwire::Result<f64> {
    // f32 keeps seven digits, more than a clock is worth.
    let mut x = [seconds as f32];
    comm.all_reduce(&mut x, ReduceOp::Max)?;
    Ok(f64::from(x[0]))
}
