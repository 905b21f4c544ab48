//! What calls of collectives take, over ranks that are processes.

use std::ffi::OsString;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tensorwire::transports::launch::Transport;
use tensorwire::{Communicator, Error, ReduceOp, Result};

use crate::bench::{Buffer, Case, Collective, percentiles, size};
use crate::failure::{Failure, print};
use crate::launch::run_self;

/// The hidden command that one rank runs.
pub(crate) const RANK_COMMAND: &str = "__calls-rank";

/// How long a call is repeated to warm up, in seconds, and how often at least and at most.
const WARM_S: f64 = 0.004;
const WARM: RangeInclusive<usize> = 2..=2000;

/// How long it is repeated then, in seconds; how many batches that is at least and at most, and how many single calls.
const REPEATED_S: f64 = 0.012;
const BATCHES: RangeInclusive<usize> = 7..=1000;
const SINGLE: RangeInclusive<usize> = 7..=2000;

/// What a batch takes about, in seconds, some hundred times what reading the clock does; and the most calls in one. The
/// shorter it is, the fewer of them does something come between.
const BATCH_S: f64 = 10e-6;
const BATCHED: RangeInclusive<usize> = 1..=64;

/// Results up to this size are checked: larger ones are made in the same ways, and take longer to check than to measure.
const CHECKED: usize = 4 << 20;

/// A call of a collective, by the bytes that one rank contributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) collective: Collective,
    pub(crate) bytes: usize,
}

/// What a call was measured to take, in microseconds, each of the slowest rank.
///
/// Calls follow each other at once, and each waits for the one before, as those of a plan do; a broadcast's root goes round
/// for that, since one that stays only fills its slots ahead of the others. A call of less than a microsecond is a few
/// readings of the clock, so that several are timed together; which takes nothing from the percentile of slow ones, as
/// calls are timed singly for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Taken {
    pub(crate) collective: String,
    pub(crate) bytes: usize,
    /// The median over short batches of calls, of a call.
    pub(crate) p50_us: f64,
    /// The call that one in a hundred is slower than.
    pub(crate) p99_us: f64,
}

/// The rank's command line.
#[derive(clap::Args)]
pub(crate) struct RankArgs {
    calls: Vec<Call>,
}

impl Call {
    /// A call of f32 elements of about so many bytes, cut to whole blocks over so many ranks; nothing where they are too few
    /// for that.
    pub(crate) fn new(collective: Collective, bytes: usize, ranks: usize) -> Option<Call> {
        let bytes = if collective == Collective::Barrier { 0 } else { bytes };
        let bytes = collective.whole_blocks(bytes, size_of::<f32>(), ranks)?;
        Some(Call { collective, bytes })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.collective, self.bytes)
    }
}

impl FromStr for Call {
    type Err = String;

    fn from_str(text: &str) -> Result<Call, String> {
        let (name, bytes) = text.split_once(':').ok_or("give COLLECTIVE:BYTES")?;
        let collective = Collective::from_str(name, false)?;
        let bytes = if bytes == "0" { 0 } else { size(bytes)? };
        Ok(Call { collective, bytes })
    }
}

/// Measures each call once, over ranks that it starts and ends.
pub(crate) fn take(transport: Transport, ranks: usize, calls: &[Call]) -> Result<Vec<Taken>, Failure> {
    let mut taken = Vec::new();
    let args = calls.iter().map(|call| OsString::from(call.to_string()));
    run_self(RANK_COMMAND, args, ranks, transport, |line| {
        let read = serde_json::from_slice(line);
        taken.push(read.map_err(|e| Failure::run(format!("rank 0 wrote what is no measurement: {e}")))?);
        Ok(())
    })?;
    if taken.len() != calls.len() {
        return Err(Failure::run(format!("the ranks measured {} of {} calls", taken.len(), calls.len())));
    }
    Ok(taken)
}

/// One rank: rank 0 prints what it measures.
pub(crate) fn rank_main(args: &RankArgs) -> Result<(), Failure> {
    let comm = Communicator::from_env().map_err(Failure::run)?;
    for call in &args.calls {
        let taken = measure(&comm, call).map_err(Failure::run)?;
        if comm.rank() == 0 {
            let json = serde_json::to_string(&taken).map_err(Failure::run)?;
            print(format_args!("{json}\n"))?;
        }
    }
    comm.barrier().map_err(Failure::run)
}

fn measure(comm: &Communicator, call: &Call) -> Result<Taken> {
    let &Call { collective, bytes } = call;
    let mut case = Case::<f32>::new(comm, collective, ReduceOp::Sum, Buffer::User, bytes)?;
    if bytes <= CHECKED
        && let Some(i) = case.first_wrong(1)?
    {
        let rank = comm.rank();
        return Err(Error::invalid(format!(
            "rank {rank}: element {i} of {collective}'s result is wrong at {bytes} bytes"
        )));
    }
    let mut case = case.with_roots_in_turn();
    let within = |seconds: f64, a_call: f64, range: &RangeInclusive<usize>| {
        ((seconds / a_call) as usize).clamp(*range.start(), *range.end())
    };
    // The same on every rank, for each gets the slowest one's time. The first calls are to warm up.
    let [cold] = percentiles(&mut case, comm, false, 1, 2, [50])?;
    let [warm] = percentiles(&mut case, comm, false, 1, within(WARM_S, cold, &WARM), [50])?;
    let batch = within(BATCH_S, warm, &BATCHED);
    let batches = within(REPEATED_S, warm * batch as f64, &BATCHES);
    let [p50, mut p99] = percentiles(&mut case, comm, false, batch, batches, [50, 99])?;
    if batch > 1 {
        [p99] = percentiles(&mut case, comm, false, 1, within(REPEATED_S, p50, &SINGLE), [99])?;
    }
    let us = |seconds: f64| (seconds * 1e9).round() / 1e3;
    Ok(Taken { collective: collective.to_string(), bytes, p50_us: us(p50), p99_us: us(p99) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_round_trip() {
        for collective in Collective::value_variants().iter().copied() {
            let call = Call::new(collective, 1 << 20, 3).unwrap();
            assert_eq!(call.to_string().parse(), Ok(call));
        }
        assert_eq!(Call::new(Collective::ReduceScatter, 8, 4), None);
        assert_eq!(Call::new(Collective::AllToAll, 1000, 3).unwrap().bytes, 996);
        for bad in ["", "all_reduce", "all_reduce:", "all_reduce:-1", "reduce_all:8"] {
            assert!(bad.parse::<Call>().is_err(), "{bad}");
        }
    }
}
