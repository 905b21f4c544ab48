//! Starts the ranks of a probe and turns what they measure into a table.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tensorwire::topology::discover::Fingerprint;
use tensorwire::topology::table::fit::{crossover, fastest};
use tensorwire::topology::table::{Absent, Table};
use tensorwire::transports::launch::Transport;
use tensorwire::{Algorithm, Tuning};

use super::sample::{CHUNKS, SIZES, Sample, Samples};
use super::{RANK_COMMAND, report};
use crate::failure::Failure;
use crate::launch::run_self;

/// The most ranks that are measured: their slots and buffers take some 4 GiB.
const MOST: usize = 128;

/// Up to here every number of ranks is measured, and beyond it powers of two: thresholds change ever more slowly.
const EVERY: usize = 8;

/// Measured also where ranks must take turns: what a test of a larger job on a small machine runs.
const TAKING_TURNS: usize = 4;

/// The file that a probe writes, once it is known that it can measure and write.
pub(super) fn place(machine: &Fingerprint) -> Result<PathBuf, Failure> {
    if machine.processors < 2 {
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

/// Measures, tells what is chosen, and writes it.
pub(super) fn run(
    machine: &Fingerprint,
    path: &Path,
    show: &mut impl FnMut(String) -> Result<(), Failure>,
) -> Result<Vec<Sample>, Failure> {
    let mut samples = Vec::new();
    let mut tunings = Vec::new();
    for world in worlds(machine.processors) {
        let before = samples.len();
        run_self(RANK_COMMAND, [], world, Transport::Shm, |line| {
            let sample: Sample = serde_json::from_slice(line)
                .map_err(|e| Failure::run(format!("rank 0 wrote what is no measurement: {e}")))?;
            samples.push(sample);
            Ok(())
        })?;
        let of = Samples(&samples[before..]);
        let tuning = fit(world, &of).ok_or_else(|| {
            Failure::run(format!("the ranks measured less than asked for at {world} ranks"))
        })?;
        show(report::choice(&tuning, &of, machine.processors))?;
        tunings.push(tuning);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let table = Table { machine: machine.clone(), measured_at: now.as_secs(), tunings };
    table.save(path).map_err(|e| Failure::run(format!("topo --probe: {e}")))?;
    Ok(samples)
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

/// What is fastest, by these measurements; nothing if some are missing.
fn fit(world: usize, samples: &Samples<'_>) -> Option<Tuning> {
    let built_in = Tuning::built_in(world);
    let threshold = |buffer: &str, large: Algorithm, built_in: usize| {
        let (small, large) = (samples.by_size(Algorithm::OneShot, buffer), samples.by_size(large, buffer));
        let whole = small.len() == SIZES.len() && large.len() == SIZES.len();
        whole.then(|| crossover(&SIZES, &small, &large, built_in))
    };
    let by_chunk = samples.by_chunk();
    let whole = by_chunk.iter().all(|times| !times.is_empty() && times.len() == by_chunk[0].len());
    let known = CHUNKS.iter().position(|chunk| *chunk == built_in.chunk).filter(|_| whole)?;
    Some(Tuning {
        world,
        one_shot: threshold("user", Algorithm::TwoShot, built_in.one_shot)?,
        symmetric_one_shot: threshold("symmetric", Algorithm::Symmetric, built_in.symmetric_one_shot)?,
        chunk: CHUNKS[fastest(&by_chunk, known)],
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::topo::sample::CHUNKED;

    /// What ranks would measure where a step costs `alpha` microseconds and one shot loses above `crossing` bytes.
    pub(in crate::topo) fn measured(ranks: usize, crossing: usize, chunk: usize) -> Vec<Sample> {
        let sample = |collective: &str, algorithm: &str, buffer: &str, chunk, bytes, median_us| Sample {
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
        let expected = Tuning { world: 2, one_shot: 32 << 10, symmetric_one_shot: 32 << 10, chunk: 64 << 10 };
        assert_eq!(tuning, expected);
        assert!(tuning.is_sound());
        for missing in [0, 1, samples.len() - 1] {
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
    }
}
