//! One rank of a probe: checks and times each algorithm, in turn with the others, or measures the links to them.

use std::time::Duration;

use serde::Serialize;
use tensorwire::topology::table::fit::median;
use tensorwire::transports::launch::{Env, Rendezvous, Transport};
use tensorwire::transports::store::UnixStore;
use tensorwire::{Algorithm, Communicator, Deadline, Error, Options, ReduceOp, Result, Tuning};

use super::network;
use super::sample::{BLOCKS, CHUNKED, CHUNKS, SINGLE_COPY, SIZES, SLOTS, Sample, built_in_chunk};
use crate::bench::{Buffer, Case, Collective, batch};
use crate::failure::{Failure, print};

/// How long a batch is meant to take.
const BATCH: Duration = Duration::from_millis(3);

/// Batches of each, one of each in turn, so that what else the machine does meets all of them alike.
const ROUNDS: usize = 5;

/// How often everything is measured. What else the machine does may last longer than all rounds of one comparison;
/// it makes times longer, so the least of the passes counts.
const PASSES: usize = 3;

/// The most ranks that gather blocks.
const MOST_GATHERED: usize = 8;

pub(crate) fn main() -> Result<(), Failure> {
    match Transport::from_env().map_err(Failure::run)? {
        Transport::Shm => tell(measure().map_err(Failure::run)?.unwrap_or_default()),
        _ => {
            let comm = Communicator::from_env().map_err(Failure::run)?;
            let samples = network::measure(&comm).map_err(Failure::run)?;
            tell(if comm.rank() == 0 { samples } else { Vec::new() })
        }
    }
}

fn tell(samples: Vec<impl Serialize>) -> Result<(), Failure> {
    for sample in samples {
        let json = serde_json::to_string(&sample).map_err(Failure::run)?;
        print(format_args!("{json}\n"))?;
    }
    Ok(())
}

/// What rank 0 has measured.
fn measure() -> Result<Option<Vec<Sample>>> {
    let env = Env::read()?;
    let Rendezvous::Store(address) = &env.rendezvous else {
        return Err(Error::Config("a rank of topo --probe is started by it alone".into()));
    };
    let options = Options::default();
    let store = UnixStore::connect(address, Deadline::after(options.timeout))?;
    // Chunks are set, and which way blocks go, whatever table there is already.
    let join = |chunk: usize, single_copy_above: usize| {
        let tuning = vec![Tuning { chunk, single_copy_above, ..Tuning::built_in(env.world) }];
        Communicator::join(env.rank, env.world, &store, &Options { tuning, ..options.clone() })
    };
    let comm = join(built_in_chunk(), usize::MAX)?;
    let single_copy = join(built_in_chunk(), 0)?;
    let chunked = CHUNKS.map(|chunk| join(chunk, usize::MAX)).into_iter().collect::<Result<Vec<_>>>()?;
    let mut least = pass(&comm, &single_copy, &chunked)?;
    for _ in 1..PASSES {
        for (least, again) in least.iter_mut().zip(pass(&comm, &single_copy, &chunked)?) {
            least.median_us = least.median_us.min(again.median_us);
        }
    }
    comm.barrier()?;
    Ok((env.rank == 0).then_some(least))
}

/// Measures everything once: the algorithms over `comm`, the ways of blocks over it and over `single_copy`, and the chunks
/// over `chunked`, a communicator each.
fn pass(comm: &Communicator, single_copy: &Communicator, chunked: &[Communicator]) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for bytes in SIZES {
        for (buffer, large) in [(Buffer::User, Algorithm::TwoShot), (Buffer::Symmetric, Algorithm::Symmetric)]
        {
            let case = Case::new(comm, Collective::AllReduce, ReduceOp::Sum, buffer, bytes)?;
            let ways = [Algorithm::OneShot, large].map(|algorithm| {
                let name = algorithm.name();
                let sample = sample(comm, Collective::AllReduce, name, buffer, built_in_chunk(), bytes);
                Way { comm, algorithm, sample }
            });
            samples.extend(compare(case, ways)?);
        }
    }
    // Each rank of an all-gather has a block of every rank: of many ranks, more than memory may hold.
    let gathers = comm.world() <= MOST_GATHERED;
    for bytes in BLOCKS.into_iter().filter(|_| gathers) {
        for touched in [false, true] {
            let case = Case::new(comm, Collective::AllGather, ReduceOp::Sum, Buffer::User, bytes)?;
            let ways = [(comm, SLOTS), (single_copy, SINGLE_COPY)].map(|(comm, name)| {
                let sample = sample(comm, Collective::AllGather, name, Buffer::User, built_in_chunk(), bytes);
                Way { comm, algorithm: Algorithm::TwoShot, sample: Sample { touched, ..sample } }
            });
            samples.extend(compare(case, ways)?);
        }
    }
    let pipelined = [(Collective::AllReduce, Algorithm::TwoShot.name()), (Collective::AllGather, "direct")];
    let pipelined = if gathers { &pipelined[..] } else { &pipelined[..1] };
    for bytes in CHUNKED {
        for (collective, name) in pipelined {
            let case = Case::new(&chunked[0], *collective, ReduceOp::Sum, Buffer::User, bytes)?;
            let ways = CHUNKS.iter().zip(chunked).map(|(chunk, comm)| Way {
                comm,
                algorithm: Algorithm::TwoShot,
                sample: sample(comm, *collective, name, Buffer::User, *chunk, bytes),
            });
            samples.extend(compare(case, ways)?);
        }
    }
    Ok(samples)
}

/// One of several ways to make the same call.
struct Way<'a> {
    comm: &'a Communicator,
    algorithm: Algorithm,
    sample: Sample,
}

fn sample(
    comm: &Communicator,
    collective: Collective,
    algorithm: &str,
    buffer: Buffer,
    chunk: usize,
    bytes: usize,
) -> Sample {
    Sample {
        ranks: comm.world(),
        collective: collective.to_string(),
        algorithm: algorithm.to_owned(),
        buffer: if buffer == Buffer::Symmetric { "symmetric" } else { "user" }.to_owned(),
        chunk,
        bytes,
        touched: false,
        median_us: 0.0,
    }
}

/// Checks each way's result, then times them round by round.
fn compare<'a>(mut case: Case<'a, f32>, ways: impl IntoIterator<Item = Way<'a>>) -> Result<Vec<Sample>> {
    let mut ways: Vec<(Way<'a>, u32, Vec<f64>)> = ways.into_iter().map(|way| (way, 2, Vec::new())).collect();
    for (way, calls, _) in &mut ways {
        take(&mut case, way)?;
        if let Some(i) = case.first_wrong(1)? {
            let Sample { collective, algorithm, bytes, .. } = &way.sample;
            let rank = way.comm.rank();
            return Err(Error::invalid(format!(
                "rank {rank}: element {i} of {collective}'s result is wrong at {bytes} bytes by {algorithm}"
            )));
        }
        for _ in 0..2 {
            let fit = BATCH.as_secs_f64() / batch(&mut case, way.comm, way.sample.touched, *calls)?;
            *calls = fit.clamp(2.0, 100_000.0) as u32;
        }
    }
    for round in 0..ROUNDS {
        let count = ways.len();
        for i in 0..count {
            let (way, calls, times) = &mut ways[(i + round) % count];
            take(&mut case, way)?;
            times.push(batch(&mut case, way.comm, way.sample.touched, *calls)?);
        }
    }
    for (way, ..) in &ways {
        way.comm.set_algorithm(None)?;
    }
    let done = |(way, _, mut times): (Way<'a>, u32, Vec<f64>)| Sample {
        median_us: (median(&mut times).unwrap_or_default() * 1e9).round() / 1e3,
        ..way.sample
    };
    Ok(ways.into_iter().map(done).collect())
}

fn take<'a>(case: &mut Case<'a, f32>, way: &Way<'a>) -> Result<()> {
    case.over(way.comm);
    way.comm.set_algorithm(Some(way.algorithm))
}
