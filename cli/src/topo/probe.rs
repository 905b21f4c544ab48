//! Starts the ranks of a probe, or is one, and turns what they measure into a table.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tensorwire::collectives::network::LinkClass;
use tensorwire::topology::discover::Fingerprint;
use tensorwire::topology::table::fit::{crossover, fastest};
use tensorwire::topology::table::{Absent, Measured, Network, Table};
use tensorwire::transports::launch::Transport;
use tensorwire::{Algorithm, Communicator, Tuning};

use super::profile::{self, Effort};
use super::sample::{BLOCKS, CHUNKS, SINGLE_COPY, SIZES, SLOTS, Sample, Samples};
use super::{Args, RANK_COMMAND, network, report};
use crate::failure::Failure;
use crate::job::launched;
use crate::launch::run_self;
use crate::measure::Here;

/// The most ranks that are measured: their slots and buffers take some 4 GiB.
const MOST: usize = 128;

/// Up to here every number of ranks is measured, and beyond it powers of two: thresholds change ever more slowly.
const EVERY: usize = 8;

/// Measured also where ranks must take turns: what a test of a larger job on a small machine runs.
const TAKING_TURNS: usize = 4;

/// What is probed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Over {
    /// Shared memory.
    Shm,
    /// The links between so many ranks, which this process starts.
    Started(Transport, usize),
    /// The links between the ranks of a job that this process is a rank of.
    Launched { rank: usize },
}

impl Over {
    /// What a command line asks for; nothing if for no probe.
    pub(super) fn new(args: &Args) -> Result<Option<Over>, Failure> {
        let asked = args.transport.unwrap_or(Transport::Shm);
        match (args.probe, asked) {
            (false, _) => return Ok(None),
            (true, Transport::Shm) => return Ok(Some(Over::Shm)),
            _ => {}
        }
        match launched()? {
            Some((env, transport)) if transport != Transport::Shm => {
                Ok(Some(Over::Launched { rank: env.rank }))
            }
            Some(_) => Err(Failure::usage(format!(
                "topo --probe: this job has no network to measure: launch it with --transport {asked}"
            ))),
            None => match args.ranks.unwrap_or(2) {
                1 => Err(Failure::usage("topo --probe: a link takes 2 ranks or more")),
                ranks => Ok(Some(Over::Started(asked, ranks))),
            },
        }
    }

    /// What is measured of the collectives: between hosts nothing, as ranks are placed otherwise in every job.
    fn effort(&self, args: &Args, processors: usize) -> Option<(Transport, Effort)> {
        let (transport, worlds) = match *self {
            Over::Launched { .. } => return None,
            Over::Started(transport, ranks) => (transport, vec![ranks]),
            Over::Shm if args.full => (Transport::Shm, worlds(processors)),
            Over::Shm => (Transport::Shm, powers(processors)),
        };
        let sizes = if args.bytes.is_empty() { profile::sizes(args.full) } else { args.bytes.clone() };
        Some((transport, Effort { worlds, sizes, passes: args.passes.into(), contended: args.full }))
    }

    /// Whether this process is the one that keeps what is found.
    pub(super) fn is_rank_0(&self) -> bool {
        !matches!(self, Over::Launched { rank: 1.. })
    }
}

/// Measures links as one of the ranks that keep nothing.
pub(super) fn take_part() -> Result<(), Failure> {
    let comm = Communicator::from_env().map_err(Failure::run)?;
    network::measure(&comm).map(drop).map_err(Failure::run)
}

/// The file that a probe writes, once it is known that it can measure and write.
pub(super) fn place(machine: &Fingerprint, over: &Over) -> Result<PathBuf, Failure> {
    if *over == Over::Shm && machine.processors < 2 {
        return Err(Failure::usage(
            "topo --probe: this process may use 1 processor, on which ranks take turns: there is nothing to \
             measure, and the built-in constants hold; allow it 2 processors or more (taskset, the container's quota)",
        ));
    }
    let path = Table::path(machine).map_err(|e| {
        let instead = match e {
            Absent::Off => "unset it, or give it a file, to keep what is measured",
            _ => "set one of them",
        };
        Failure::usage(format!("topo --probe: {e}: {instead}"))
    })?;
    let advice = "TENSORWIRE_TABLE=FILE keeps the table elsewhere";
    Table::check_place(&path).map_err(|e| Failure::usage(format!("topo --probe: {e}: {advice}")))?;
    Ok(path)
}

/// Measures, tells what is found, and writes it beside what was found before; the measurements in JSON.
pub(super) fn run(
    args: &Args,
    over: &Over,
    machine: &Fingerprint,
    path: &Path,
    show: &mut impl FnMut(String) -> Result<(), Failure>,
) -> Result<Vec<Value>, Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    // What can't be used is replaced.
    let mut table = Table::load(path, machine).unwrap_or_else(|_| Table::empty(machine.clone()));
    let samples = match over {
        Over::Shm => {
            let (samples, tunings) = measure_tunings(machine, show)?;
            (table.measured_at, table.tunings) = (now, tunings);
            samples.iter().map(|s| json!(s)).collect()
        }
        _ => {
            let (transport, samples) = measure_links(over)?;
            let mut of = |class: LinkClass| -> Result<Option<Measured>, Failure> {
                let Some(fitted) = network::fit(&samples, class)? else { return Ok(None) };
                show(report::fitted(transport, class, &fitted, &samples))?;
                Ok(Some(Measured { link: fitted.link, measured_at: now }))
            };
            let (intra, inter) = (of(LinkClass::Intra)?, of(LinkClass::Inter)?);
            table.set_network(Network { transport: transport.to_owned(), intra, inter });
            samples.iter().map(|s| json!(s)).collect()
        }
    };
    let save = |table: &Table| table.save(path).map_err(|e| Failure::run(format!("topo --probe: {e}")));
    save(&table)?;
    // By the algorithms that are chosen from now on.
    if let Some((transport, effort)) = over.effort(args, machine.processors) {
        let meter = &mut Here(transport);
        let mut profiles = profile::measure(meter, &effort, now, show)?;
        if args.full || args.decode {
            let worlds: Vec<usize> = [1].into_iter().chain(powers(machine.processors)).collect();
            profile::steps(meter, &mut profiles, &worlds, 2, now)?;
        }
        for profile in profiles {
            table.set_profile(profile);
        }
        save(&table)?;
    }
    Ok(samples)
}

/// What is fastest over shared memory, by number of ranks.
fn measure_tunings(
    machine: &Fingerprint,
    show: &mut impl FnMut(String) -> Result<(), Failure>,
) -> Result<(Vec<Sample>, Vec<Tuning>), Failure> {
    let mut samples = Vec::new();
    let mut tunings = Vec::new();
    for world in worlds(machine.processors) {
        let before = samples.len();
        run_self(RANK_COMMAND, [], world, Transport::Shm, |line| {
            samples.push(measurement(line)?);
            Ok(())
        })?;
        let of = Samples(&samples[before..]);
        let tuning = fit(world, &of).ok_or_else(|| {
            Failure::run(format!("the ranks measured less than asked for at {world} ranks"))
        })?;
        show(report::choice(&tuning, &of, machine.processors))?;
        tunings.push(tuning);
    }
    Ok((samples, tunings))
}

/// What was measured of links, and over what.
fn measure_links(over: &Over) -> Result<(&'static str, Vec<network::Sample>), Failure> {
    let mut samples = Vec::new();
    let transport = match *over {
        Over::Started(transport, ranks) => {
            run_self(RANK_COMMAND, [], ranks, transport, |line| {
                samples.push(measurement(line)?);
                Ok(())
            })?;
            transport.name()
        }
        _ => {
            let comm = Communicator::from_env().map_err(Failure::run)?;
            samples = network::measure(&comm).map_err(Failure::run)?;
            comm.network().map_err(Failure::run)?.map_or("shm", |network| network.transport)
        }
    };
    if samples.is_empty() {
        return Err(Failure::usage(
            "topo --probe: these ranks are one, or share memory: there is no link to measure; launch 2 or more with \
             --transport tcp",
        ));
    }
    Ok((transport, samples))
}

fn measurement<T: DeserializeOwned>(line: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(line)
        .map_err(|e| Failure::run(format!("rank 0 wrote what is no measurement: {e}")))
}

/// The numbers of ranks to measure.
fn worlds(processors: usize) -> Vec<usize> {
    let most = processors.min(MOST);
    let powers = (0..).map(|i| 1usize << i).take_while(|n| *n <= most).filter(|n| *n > EVERY);
    let mut worlds: Vec<usize> = (2..=most.min(EVERY)).chain(powers).collect();
    worlds.extend([most, TAKING_TURNS]);
    worlds.sort_unstable();
    worlds.dedup();
    worlds
}

/// Those of them that are measured unless everything is: powers of two that needn't take turns.
fn powers(processors: usize) -> Vec<usize> {
    worlds(processors).into_iter().filter(|n| n.is_power_of_two() && *n <= processors).collect()
}

/// What is fastest, by these measurements; nothing if some are missing.
fn fit(world: usize, samples: &Samples<'_>) -> Option<Tuning> {
    let built_in = Tuning::built_in(world);
    let threshold = |buffer: &str, large: Algorithm, built_in: usize| {
        let (small, large) = (samples.by_size(Algorithm::OneShot, buffer), samples.by_size(large, buffer));
        let whole = small.len() == SIZES.len() && large.len() == SIZES.len();
        whole.then(|| crossover(&SIZES, &small, &large, built_in))
    };
    let (slots, single) = (samples.by_block(SLOTS), samples.by_block(SINGLE_COPY));
    let single_copy_above = match (slots.len(), single.len()) {
        // Of more ranks than gather blocks.
        (0, 0) => built_in.single_copy_above,
        (a, b) if a == BLOCKS.len() && b == BLOCKS.len() => {
            crossover(&BLOCKS, &slots, &single, built_in.single_copy_above)
        }
        _ => return None,
    };
    let by_chunk = samples.by_chunk();
    let whole = by_chunk.iter().all(|times| !times.is_empty() && times.len() == by_chunk[0].len());
    let known = CHUNKS.iter().position(|chunk| *chunk == built_in.chunk).filter(|_| whole)?;
    Some(Tuning {
        world,
        one_shot: threshold("user", Algorithm::TwoShot, built_in.one_shot)?,
        symmetric_one_shot: threshold("symmetric", Algorithm::Symmetric, built_in.symmetric_one_shot)?,
        chunk: CHUNKS[fastest(&by_chunk, known)],
        single_copy_above,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::topo::sample::CHUNKED;

    /// What ranks would measure where a step costs `alpha` microseconds and one shot loses above `crossing` bytes.
    pub(in crate::topo) fn measured(ranks: usize, crossing: usize, chunk: usize) -> Vec<Sample> {
        let sample = |collective: &str, algorithm: &str, buffer: &str, chunk, bytes, median_us| Sample {
            touched: false,
            ranks,
            collective: collective.into(),
            algorithm: algorithm.into(),
            buffer: buffer.into(),
            chunk,
            bytes,
            median_us,
        };
        let mut samples = Vec::new();
        for bytes in SIZES {
            let slower = if bytes > crossing { 1.2 } else { 0.8 };
            for (buffer, large) in [("user", "two_shot"), ("symmetric", "symmetric")] {
                samples.push(sample("all_reduce", "one_shot", buffer, 256 << 10, bytes, 10.0 * slower));
                samples.push(sample("all_reduce", large, buffer, 256 << 10, bytes, 10.0));
            }
        }
        // What was written anew takes longer, and twice as long in a single copy.
        for bytes in BLOCKS {
            let slower = if bytes > crossing { 1.2 } else { 0.8 };
            for touched in [false, true] {
                let [slots, single] = if touched { [20.0, 40.0] } else { [10.0, 5.0] };
                for (way, time) in [(SLOTS, slots * slower), (SINGLE_COPY, single)] {
                    samples.push(Sample {
                        touched,
                        ..sample("all_gather", way, "user", 256 << 10, bytes, time)
                    });
                }
            }
        }
        for bytes in CHUNKED {
            for candidate in CHUNKS {
                let time = 100.0 * (1.0 + (candidate as f64 / chunk as f64).ln().abs());
                samples.push(sample("all_reduce", "two_shot", "user", candidate, bytes, time));
                samples.push(sample("all_gather", "direct", "user", candidate, bytes, time));
            }
        }
        samples
    }

    #[test]
    fn the_fastest_is_chosen() {
        let samples = measured(2, 32 << 10, 64 << 10);
        let tuning = fit(2, &Samples(&samples)).unwrap();
        let expected = Tuning {
            world: 2,
            one_shot: 32 << 10,
            symmetric_one_shot: 32 << 10,
            chunk: 64 << 10,
            single_copy_above: 32 << 10,
        };
        assert_eq!(tuning, expected);
        assert!(tuning.is_sound());
        let block = samples.iter().position(|s| s.algorithm == SLOTS).unwrap();
        for missing in [0, 1, block, samples.len() - 1] {
            let mut fewer = samples.clone();
            fewer.remove(missing);
            assert_eq!(fit(2, &Samples(&fewer)), None, "{missing}");
        }
    }

    #[test]
    fn worlds_grow_with_the_processors() {
        assert_eq!(worlds(2), [2, 4]);
        assert_eq!(worlds(3), [2, 3, 4]);
        assert_eq!(worlds(6), [2, 3, 4, 5, 6]);
        assert_eq!(worlds(48), [2, 3, 4, 5, 6, 7, 8, 16, 32, 48]);
        assert_eq!(worlds(5000).last(), Some(&128));
        assert_eq!((powers(2), powers(48)), (vec![2], vec![2, 4, 8, 16, 32]));
    }
}
