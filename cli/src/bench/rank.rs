//! One rank of a benchmark: checks a collective's result, then times it.

use std::time::{Duration, Instant};

use tensorwire::{Algorithm, Communicator, DType, Element, Error};

use super::case::Case;
use super::collective::Collective;
use super::report::Row;
use super::{Args, Buffer};
#[cfg(feature = "nccl")]
use super::{Over, device};
use crate::failure::{Failure, print};

/// How long a batch is meant to take.
pub(super) const BATCH: Duration = Duration::from_millis(60);

/// Most single calls that are timed for the percentiles.
pub(super) const SINGLE_CALLS: usize = 10_000;

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    run(args, |row| {
        let json = serde_json::to_string(&row).map_err(Failure::run)?;
        print(format_args!("{json}\n"))
    })
}

/// Measures as one of the ranks; rank 0 has the rows.
pub(super) fn run(args: &Args, mut take: impl FnMut(Row) -> Result<(), Failure>) -> Result<(), Failure> {
    let comm = Communicator::from_env().map_err(|e| match e {
        Error::Config(_) => Failure::usage(e),
        _ => Failure::run(e),
    })?;
    comm.set_algorithm(args.algorithm.0).map_err(Failure::run)?;
    #[cfg(feature = "nccl")]
    let group = match args.transport {
        Over::Nccl => Some(device::join(&comm).map_err(|e| match e {
            Error::Unavailable { .. } => Failure::usage(e),
            _ => Failure::run(e),
        })?),
        Over::Host(_) => None,
    };
    // Over whatever carries the data.
    macro_rules! measure {
        ($type:ty, $bytes:expr) => {{
            #[cfg(feature = "nccl")]
            let row = match &group {
                Some((stream, group)) => device::measure::<$type>(&comm, stream, group, args, $bytes),
                None => measure::<$type>(&comm, args, $bytes),
            };
            #[cfg(not(feature = "nccl"))]
            let row = measure::<$type>(&comm, args, $bytes);
            row
        }};
    }
    for bytes in args.measurable().0 {
        let row = match args.dtype {
            DType::F32 => measure!(f32, bytes),
            DType::F16 => measure!(half::f16, bytes),
            DType::BF16 => measure!(half::bf16, bytes),
            DType::F64 => measure!(f64, bytes),
            DType::F8E4M3 => measure!(float8::F8E4M3, bytes),
            DType::F8E5M2 => measure!(float8::F8E5M2, bytes),
            DType::I8 => measure!(i8, bytes),
            DType::U8 => measure!(u8, bytes),
            DType::I32 => measure!(i32, bytes),
            DType::U32 => measure!(u32, bytes),
            DType::I64 => measure!(i64, bytes),
            DType::U64 => measure!(u64, bytes),
        };
        let row = row.map_err(|e| match e {
            // Such as a size that the algorithm asked for can't carry.
            Error::InvalidArgument(what) => Failure::usage(format!("{bytes} bytes: {what}")),
            other => Failure::run(format!("{bytes} bytes: {other}")),
        })?;
        let row = row.map_err(Failure::run)?;
        if comm.rank() == 0 {
            take(row)?;
        }
    }
    comm.barrier().map_err(Failure::run)
}

/// Measures one size, or says why its result is wrong.
fn measure<T: Element>(
    comm: &Communicator,
    args: &Args,
    bytes: usize,
) -> tensorwire::Result<Result<Row, String>> {
    // What it can't carry is refused before anything is measured.
    algorithm(comm, args, bytes)?;
    let mut case = Case::<T>::new(comm, args.collective, args.op, args.buffer, bytes)?.sent_as(args.wire.0);
    for round in 1..=2 {
        if let Some(i) = case.first_wrong(round)? {
            let (rank, what) = (comm.rank(), args.collective);
            return Ok(Err(format!("rank {rank}: element {i} of {what}'s result is wrong at {bytes} bytes")));
        }
    }
    let mut calls = 4;
    for _ in 0..2 {
        let fit = BATCH.as_secs_f64() / batch(&mut case, comm, args.touch, calls)?;
        calls = fit.clamp(3.0, 100_000.0) as u32;
    }
    let batches = (0..args.batches).map(|_| batch(&mut case, comm, args.touch, calls));
    let mut means = batches.collect::<tensorwire::Result<Vec<_>>>()?;
    means.sort_by(f64::total_cmp);
    let median = means[means.len() / 2];
    let [p50, p99] = percentiles(&mut case, comm, args.touch, 1, SINGLE_CALLS.min(calls as usize), [50, 99])?;

    let (moved, bus) = args.collective.traffic(bytes, comm.world());
    let rounded = |x: f64| (x * 1e6).round() / 1e6;
    let us = |seconds: f64| rounded(seconds * 1e6);
    Ok(Ok(Row {
        collective: args.collective.to_string(),
        transport: args.transport.to_string(),
        ranks: comm.world(),
        dtype: args.dtype.to_string(),
        op: if args.collective.reduces() { args.op.to_string() } else { "none".into() },
        bytes,
        // As it is now: links may have been measured meanwhile.
        algorithm: algorithm(comm, args, bytes)?.into(),
        why: match args.explain && comm.world() > 1 {
            true => Some(comm.explain(bytes, args.dtype, args.op)?),
            false => None,
        },
        buffer: match args.buffer {
            Buffer::User => "user".into(),
            Buffer::Symmetric => "symmetric".into(),
        },
        wire: args.wire.0.map(|w| w.to_string()),
        touch: args.touch,
        median_us: us(median),
        min_us: us(means[0]),
        p50_us: us(p50),
        p99_us: us(p99),
        algbw_gbps: rounded(moved / median / 1e9),
        busbw_gbps: rounded(moved * bus / median / 1e9),
        correct: true,
        floor_us: None,
    }))
}

/// What a collective of `bytes` is done by.
fn algorithm(comm: &Communicator, args: &Args, bytes: usize) -> tensorwire::Result<&'static str> {
    Ok(match args.collective {
        _ if comm.world() == 1 => "none",
        Collective::AllReduce if args.buffer == Buffer::Symmetric => comm.algorithm_symmetric(bytes)?.name(),
        Collective::AllReduce | Collective::Reduce
            if args.algorithm.0 == Some(Algorithm::Mpi) && args.wire.0.is_none() =>
        {
            comm.algorithm_for(bytes, args.dtype, args.op)?.name()
        }
        Collective::SendRecv | Collective::Gather | Collective::Scatter => "direct",
        _ if args.algorithm.0 == Some(Algorithm::Mpi) => "mpi",
        // What is sent in fewer bits, or to one rank, is a direct exchange.
        Collective::AllReduce | Collective::Reduce => match comm.algorithm_for(bytes, args.dtype, args.op)? {
            a if !a.is_shm() && (args.wire.0.is_some() || args.collective == Collective::Reduce) => "direct",
            a => a.name(),
        },
        _ => "direct",
    })
}

/// The slowest rank's mean seconds a call.
pub(crate) fn batch<T: Element>(
    case: &mut Case<'_, T>,
    comm: &Communicator,
    touch: bool,
    calls: u32,
) -> tensorwire::Result<f64> {
    comm.barrier()?;
    let start = Instant::now();
    for _ in 0..calls {
        if touch {
            case.touch();
        }
        case.call()?;
    }
    slowest(comm, start.elapsed().as_secs_f64() / f64::from(calls))
}

/// Percentiles of what a call takes, in seconds, over `batches` of `calls` that are timed together, each the slowest rank's.
pub(crate) fn percentiles<T: Element, const N: usize>(
    case: &mut Case<'_, T>,
    comm: &Communicator,
    touch: bool,
    calls: usize,
    batches: usize,
    wanted: [usize; N],
) -> tensorwire::Result<[f64; N]> {
    let mut times = Vec::with_capacity(batches);
    comm.barrier()?;
    for _ in 0..batches {
        let start = Instant::now();
        for _ in 0..calls {
            if touch {
                case.touch();
            }
            case.call()?;
        }
        times.push(start.elapsed().as_secs_f64() / calls as f64);
    }
    times.sort_by(f64::total_cmp);
    let mut found = wanted.map(|percent| times[(batches * percent).div_ceil(100) - 1]);
    for time in &mut found {
        *time = slowest(comm, *time)?;
    }
    Ok(found)
}

/// The largest of all ranks' times, in seconds: gathered, as a forced algorithm might not carry it.
pub(super) fn slowest(comm: &Communicator, seconds: f64) -> tensorwire::Result<f64> {
    let mut all = vec![0.0; comm.world()];
    comm.all_gather(&[seconds], &mut all)?;
    Ok(all.into_iter().fold(seconds, f64::max))
}
