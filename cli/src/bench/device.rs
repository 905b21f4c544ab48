//! A benchmark of collectives between GPUs, over NCCL.

use std::time::Instant;

use tensorwire::collectives::device::{
    Device, DeviceBuffer, DeviceCommunicator, DeviceOptions, EngineChoice, Stream,
};
use tensorwire::collectives::nccl::Library;
use tensorwire::transports::launch::Env;
use tensorwire::{Communicator, DType, Element, Error, ReduceOp, Result};

use super::Args;
use super::case::{float, next, previous, sample};
use super::collective::{Collective, Lengths};
use super::rank::{BATCH, SINGLE_CALLS, slowest};
use super::report::Row;
use crate::failure::Failure;

/// Refuses where there is no NCCL, or this host has fewer GPUs than ranks, before any rank is started.
pub(super) fn check(ranks: usize) -> Result<(), Failure> {
    let refuse = |why: String| Failure::usage(format!("--transport nccl: {why}"));
    let library = Library::find().map_err(|e| refuse(e.to_string()))?;
    if library.is_test() {
        return Err(refuse(format!(
            "{} is a test library, which runs on no GPU: there is nothing to measure",
            library.path().display()
        )));
    }
    let gpus = Device::cuda_count().map_err(|e| refuse(e.to_string()))?;
    if gpus < ranks {
        return Err(refuse(format!("{ranks} ranks take a GPU each, and there are {gpus}: see --ranks")));
    }
    Ok(())
}

/// This rank's part of a group over NCCL, and its stream.
pub(super) fn join(comm: &Communicator) -> Result<(Stream, DeviceCommunicator)> {
    let ordinal = Env::read()?.local_rank.unwrap_or(comm.rank());
    let device = Device::cuda(ordinal)?;
    let options = DeviceOptions { engine: EngineChoice::Nccl, ..Default::default() };
    Ok((device.stream()?, comm.on_device_with(&device, &options)?))
}

/// A collective with its buffers on a device.
struct Case<'a, T> {
    group: &'a DeviceCommunicator,
    stream: &'a Stream,
    collective: Collective,
    op: ReduceOp,
    input: DeviceBuffer<T>,
    /// Empty for a collective in place.
    output: DeviceBuffer<T>,
}

impl<T: Element> Case<'_, T> {
    fn call(&mut self) -> Result<()> {
        let (group, x, output) = (self.group, &mut self.input, &mut self.output);
        let (rank, world) = (group.rank(), group.world());
        match self.collective {
            Collective::AllReduce => group.all_reduce(x, self.op),
            Collective::AllGather => group.all_gather(&*x, output),
            Collective::ReduceScatter => group.reduce_scatter(&*x, output, self.op),
            Collective::Broadcast => group.broadcast(x, 0),
            Collective::Reduce => group.reduce(x, self.op, 0),
            Collective::Gather => group.gather(&*x, output, 0),
            Collective::Scatter => group.scatter(&*x, output, 0),
            Collective::AllToAll => group.all_to_all(&*x, output),
            Collective::SendRecv => {
                group.send_recv(&*x, (rank + 1) % world, output, (rank + world - 1) % world)
            }
            Collective::Barrier => group.barrier(self.stream),
        }
    }

    /// Calls on values that tell ranks and elements apart, and compares with what the ranks' processors make of them: the first
    /// element that is wrong, if any. Reductions may differ by their rounding, as NCCL's order is its own.
    fn first_wrong(&mut self, comm: &Communicator, round: u64) -> Result<Option<usize>> {
        let rank = comm.rank();
        let mut x: Vec<T> = (0..self.input.len()).map(|i| sample(round, rank, i)).collect();
        let mut output = vec![T::zeroed(); self.output.len()];
        self.input.write(&x)?;
        self.output.write(&output)?;
        self.call()?;
        self.group.synchronize()?;
        match self.collective {
            Collective::AllReduce => comm.all_reduce(&mut x, self.op)?,
            Collective::AllGather => comm.all_gather(&x, &mut output)?,
            Collective::ReduceScatter => comm.reduce_scatter(&x, &mut output, self.op)?,
            Collective::Broadcast => comm.broadcast(&mut x, 0)?,
            Collective::Reduce => comm.reduce(&mut x, self.op, 0)?,
            Collective::Gather => comm.gather(&x, &mut output, 0)?,
            Collective::Scatter => comm.scatter(&x, &mut output, 0)?,
            Collective::AllToAll => comm.all_to_all(&x, &mut output)?,
            Collective::SendRecv => comm.send_recv(&x, next(comm), &mut output, previous(comm))?,
            Collective::Barrier => comm.barrier()?,
        }
        let (got, right) = match output.is_empty() {
            true => (self.input.to_vec()?, x),
            false => (self.output.to_vec()?, output),
        };
        let slack = if self.collective.reduces() { slack(T::DTYPE, comm.world()) } else { 0.0 };
        let fits = |(a, b): (&T, &T)| {
            let same = bytemuck::bytes_of(a) == bytemuck::bytes_of(b);
            same || (slack > 0.0 && (float(a) - float(b)).abs() <= slack * float(b).abs())
        };
        Ok(got.iter().zip(&right).position(|pair| !fits(pair)))
    }
}

/// How far two orders of a reduction may be apart, as a part of it: each step rounds by half a unit in the last place.
fn slack(dtype: DType, world: usize) -> f64 {
    let unit = match dtype {
        DType::F64 => 53,
        DType::F32 => 24,
        DType::F16 => 11,
        DType::BF16 => 8,
        DType::F8E4M3 => 4,
        DType::F8E5M2 => 3,
        _ => return 0.0,
    };
    2.0 * world as f64 * 0.5f64.powi(unit)
}

/// Measures one size, or says why its result is wrong. A batch is calls that are launched one behind the other and waited
/// for together.
pub(super) fn measure<T: Element>(
    comm: &Communicator,
    stream: &Stream,
    group: &DeviceCommunicator,
    args: &Args,
    bytes: usize,
) -> Result<Result<Row, String>> {
    let count = bytes / size_of::<T>();
    let lengths = args.collective.lengths(count, comm.rank(), comm.world());
    let Lengths { input, output } =
        lengths.ok_or_else(|| Error::invalid(format!("{bytes} bytes are more than memory holds")))?;
    let (input, output) = (stream.zeros(input)?, stream.zeros(output)?);
    let (collective, op) = (args.collective, args.op);
    let mut case = Case::<T> { group, stream, collective, op, input, output };
    for round in 1..=2 {
        if let Some(i) = case.first_wrong(comm, round)? {
            let rank = comm.rank();
            return Ok(Err(format!(
                "rank {rank}: element {i} of {collective}'s result is wrong at {bytes} bytes"
            )));
        }
    }
    let mut batch = |calls: u32| {
        comm.barrier()?;
        let start = Instant::now();
        for _ in 0..calls {
            case.call()?;
        }
        group.synchronize()?;
        slowest(comm, start.elapsed().as_secs_f64() / f64::from(calls))
    };
    let mut calls = 4;
    for _ in 0..2 {
        calls = (BATCH.as_secs_f64() / batch(calls)?).clamp(3.0, 100_000.0) as u32;
    }
    let mut means = (0..args.batches).map(|_| batch(calls)).collect::<Result<Vec<_>>>()?;
    means.sort_by(f64::total_cmp);
    let median = means[means.len() / 2];
    let singles = SINGLE_CALLS.min(calls as usize);
    let mut times = (0..singles).map(|_| batch(1)).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    let percentile = |percent: usize| times[(singles * percent).div_ceil(100) - 1];

    let (moved, bus) = collective.traffic(bytes, comm.world());
    let rounded = |x: f64| (x * 1e6).round() / 1e6;
    let us = |seconds: f64| rounded(seconds * 1e6);
    Ok(Ok(Row {
        collective: collective.to_string(),
        transport: args.transport.to_string(),
        ranks: comm.world(),
        dtype: args.dtype.to_string(),
        op: if collective.reduces() { op.to_string() } else { "none".into() },
        bytes,
        algorithm: group.engine().to_string(),
        why: None,
        buffer: "device".into(),
        wire: None,
        touch: false,
        median_us: us(median),
        min_us: us(means[0]),
        p50_us: us(percentile(50)),
        p99_us: us(percentile(99)),
        algbw_gbps: rounded(moved / median / 1e9),
        busbw_gbps: rounded(moved * bus / median / 1e9),
        correct: true,
        floor_us: None,
    }))
}

#[cfg(test)]
mod tests {
    use clap::{Parser, ValueEnum};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    /// By way of the host, as there may be no GPU: what is measured is called and checked in the same way.
    #[test]
    fn every_collective_is_called_and_checked() {
        for collective in Collective::value_variants() {
            let name = collective.to_string();
            let args = Line::parse_from(["", "--collective", &name, "--batches", "1"]).args;
            std::thread::scope(|s| {
                for comm in Communicator::in_process(2).unwrap() {
                    let args = &args;
                    s.spawn(move || {
                        let stream = Device::host().stream().unwrap();
                        let options = DeviceOptions { engine: EngineChoice::Staged, ..Default::default() };
                        let group = comm.on_device_with(&stream.device(), &options).unwrap();
                        let row = measure::<f32>(&comm, &stream, &group, args, 4096).unwrap().unwrap();
                        assert!(row.median_us > 0.0 && row.p99_us >= row.p50_us, "{row:?}");
                        comm.barrier().unwrap();
                    });
                }
            });
        }
    }
}
