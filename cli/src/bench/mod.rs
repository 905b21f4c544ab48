//! `tensorwire bench`: how long the collectives take here.

mod case;
mod collective;
#[cfg(feature = "nccl")]
mod device;
mod machine;
mod over;
mod plot;
mod rank;
mod report;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{ValueEnum, value_parser};
use tensorwire::transports::launch::Transport;
use tensorwire::{Algorithm, DType, ReduceOp, Wire};

use crate::failure::{Failure, ranks};
use crate::form::Form;
use crate::job::launched;
use crate::launch::run_self;
use crate::output::OutputFile;
use collective::Lengths;
use over::Over;
use report::{Floor, Row, Table};

pub(crate) use case::Case;
pub(crate) use collective::Collective;
pub(crate) use rank::{batch, main as rank_main, percentiles};

/// The hidden command that one rank runs.
pub(crate) const RANK_COMMAND: &str = "__bench-rank";

const METHOD: &str = "\
Ranks are processes, on this host; as a program of `tensorwire launch`, those of its job. Every result is checked element by element before it is timed. A batch is a loop of
back-to-back calls between two barriers; its figure is the slowest rank's mean time a call; `median` and `min`
are over batches. `p50` and `p99` are over single calls timed one by one, on the slowest rank. With --touch,
all times include rewriting the input. all_reduce, reduce and broadcast work in place.

`bytes` is what one rank contributes: the buffer (all_reduce, reduce, broadcast, send_recv), one block
(all_gather, gather), the whole input (reduce_scatter, all_to_all, the root's of scatter; cut to equal
blocks). In send_recv every rank sends to the next while it receives from the one before. algbw is data over
time, busbw what that means for the busiest link, both in GB/s (10^9 bytes a second) and as nccl-tests defines
them. Both count the elements, in however few bits --wire sends them; such results, and those of algorithms that
reduce in another order than the ranks', are checked for being the same on every rank and within their bounds.

Examples:
  tensorwire bench --collective all_reduce --ranks 2
  tensorwire bench --collective all_gather --ranks 4 --bytes 8,4K,1M --dtype bf16 --json
  tensorwire bench --transport tcp --wire q8 --bytes 1M,16M
  tensorwire bench --collective all_to_all --touch --plot all_to_all.svg";

/// Measure a collective over ranks on this host
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = METHOD)]
pub(crate) struct Args {
    /// Which collective
    #[arg(long, value_enum, default_value = "all_reduce")]
    collective: Collective,

    /// What carries the bytes: shm, or tcp, tls or quic over this host's loopback, or mpi, of ranks that mpirun starts, or nccl
    /// between this host's GPUs
    #[arg(long, value_parser = str::parse::<Over>, default_value = "shm")]
    transport: Over,

    /// How many ranks to start
    #[arg(long, short = 'n', value_name = "N", value_parser = ranks, default_value = "2")]
    ranks: usize,

    /// Sizes, separated by commas; K, M and G stand for powers of 1024
    #[arg(long, value_delimiter = ',', value_parser = size, default_value = DEFAULT_SIZES)]
    bytes: Vec<usize>,

    /// Element type: f32, f16, bf16, f64, f8e4m3, f8e5m2, i8, u8, i32, u32, i64 or u64
    #[arg(long, default_value = "f32", value_parser = str::parse::<DType>)]
    dtype: DType,

    /// Reduction: sum, product, min, max, average, pre_scaled_sum:FACTOR, bit_and, bit_or or bit_xor
    #[arg(long, default_value = "sum", value_parser = str::parse::<ReduceOp>)]
    op: ReduceOp,

    /// What memory the data is in: ordinary process memory, or (all_reduce) memory that every rank maps
    #[arg(long, value_enum, default_value = "user")]
    buffer: Buffer,

    /// Rewrite the input before every call, inside the timed loop, as a producer would
    #[arg(long)]
    touch: bool,

    /// Force an algorithm of all_reduce and reduce: inline, one_shot, two_shot, or symmetric for such buffers; over tcp,
    /// of all_reduce also chain, ring, recursive_doubling, halving_doubling or hierarchical; over mpi also mpi, of any
    /// collective: MPI's own
    #[arg(long, default_value = "auto", value_parser = algorithm)]
    algorithm: Choice,

    /// Say why all_reduce takes its algorithm: over tcp, what each is expected to take, by which links, and where those
    /// are from
    #[arg(long)]
    explain: bool,

    /// How all_reduce sends its elements: f32, as they are; over tcp also bf16, or q8, scaled bytes
    #[arg(long, default_value = "f32", value_parser = str::parse::<Form>)]
    wire: Form,

    /// Batches a size
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1000), default_value = "5")]
    batches: u32,

    /// Print one JSON object a size
    #[arg(long)]
    json: bool,

    /// Draw time and bandwidth against size
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Compare with the floor that `cargo bench --bench limit -- --json` printed: f32 all_reduce, 2 ranks
    #[arg(long, value_name = "FILE")]
    limit: Option<PathBuf>,
}

const DEFAULT_SIZES: &str = "8,64,512,4K,16K,64K,256K,1M,4M,16M,64M";

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Buffer {
    /// Ordinary process memory.
    User,
    /// Memory that every rank maps.
    Symmetric,
}

#[derive(Clone, Copy, Debug)]
struct Choice(Option<Algorithm>);

fn algorithm(text: &str) -> Result<Choice, tensorwire::Error> {
    if text == "auto" { Ok(Choice(None)) } else { text.parse().map(|a| Choice(Some(a))) }
}

pub(crate) fn size(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let bytes = digits.parse::<usize>().ok().and_then(|n| n.checked_mul(1 << unit));
    match bytes {
        None | Some(0) => Err("give bytes, such as 8, 4096, 64K or 1M".into()),
        Some(n) if n > 1 << 36 => Err("64G is the most".into()),
        Some(n) => Ok(n),
    }
}

impl Args {
    /// The sizes that can be measured, cut to whole blocks, and those too small for one element a rank.
    fn measurable(&self) -> (Vec<usize>, Vec<usize>) {
        if self.collective == Collective::Barrier {
            return (vec![0], Vec::new());
        }
        let (mut fit, mut small) = (Vec::new(), Vec::new());
        for bytes in &self.bytes {
            match self.collective.whole_blocks(*bytes, self.dtype.size(), self.ranks) {
                Some(whole) => fit.push(whole),
                None => small.push(*bytes),
            }
        }
        (fit, small)
    }

    /// Refuses what can't be measured, or not as asked.
    fn check(&self) -> Result<(), Failure> {
        let refuse = |why: String| Err(Failure::usage(why));
        let (collective, dtype, op) = (self.collective, self.dtype, self.op);
        if let Some(bytes) = self.bytes.iter().find(|b| !b.is_multiple_of(dtype.size())) {
            return refuse(format!("{bytes} bytes are no whole number of {dtype} elements"));
        }
        if collective.reduces() && !op.supports(dtype) {
            return refuse(format!("{op} is not defined for {dtype}"));
        }
        if collective == Collective::SendRecv && self.ranks == 1 {
            return refuse("send_recv takes at least 2 ranks".into());
        }
        if collective == Collective::Barrier && self.plot.is_some() {
            return refuse("a barrier has no sizes to plot".into());
        }
        if self.transport == Over::Nccl {
            let asked = [
                (self.buffer != Buffer::User, "--buffer"),
                (self.algorithm.0.is_some(), "--algorithm"),
                (self.explain, "--explain"),
                (self.wire.0.is_some(), "--wire"),
                (self.touch, "--touch"),
            ];
            if let Some((_, what)) = asked.iter().find(|(asked, _)| *asked) {
                return refuse(format!("{what} is not for --transport nccl, which has ways of its own"));
            }
        }
        if self.buffer == Buffer::Symmetric && collective != Collective::AllReduce {
            return refuse(format!("{collective} has no form for symmetric buffers: all_reduce has"));
        }
        if self.buffer == Buffer::Symmetric && self.transport != Over::Host(Transport::Shm) {
            return refuse(format!(
                "symmetric buffers are in shared memory: --transport {} has none",
                self.transport
            ));
        }
        let chooses = matches!(collective, Collective::AllReduce | Collective::Reduce);
        if self.algorithm.0 == Some(Algorithm::Mpi) && self.transport != Over::Host(Transport::Mpi) {
            return refuse("mpi is an algorithm of ranks over MPI: it takes --transport mpi".into());
        }
        let ours = self.algorithm.0.filter(|a| *a != Algorithm::Mpi);
        if let (Some(algorithm), false) = (ours, chooses) {
            return refuse(format!(
                "{algorithm} is an algorithm of all_reduce and reduce, not of {collective}"
            ));
        }
        if let Some(algorithm) = ours.filter(|a| !a.is_shm()) {
            if self.transport == Over::Host(Transport::Shm) {
                return refuse(format!("{algorithm} is an algorithm for networks: it takes --transport tcp"));
            }
            if collective != Collective::AllReduce {
                return refuse(format!("{algorithm} is an algorithm of all_reduce, not of {collective}"));
            }
        }
        if self.explain
            && (collective != Collective::AllReduce
                || self.buffer == Buffer::Symmetric
                || self.wire.0.is_some())
        {
            return refuse("--explain is for all_reduce of ordinary memory, sent as it is".into());
        }
        if let Some(wire) = self.wire.0 {
            let sums = matches!(op, ReduceOp::Sum | ReduceOp::Average);
            let shorter =
                dtype == DType::F32 || (wire == Wire::Q8 && matches!(dtype, DType::F16 | DType::BF16));
            if self.transport == Over::Host(Transport::Shm)
                || collective != Collective::AllReduce
                || !sums
                || !shorter
            {
                return refuse(format!(
                    "--wire {wire} is for all_reduce of {} sums and averages over tcp",
                    if wire == Wire::Bf16 { "f32" } else { "f32, f16 and bf16" }
                ));
            }
        }
        if self.algorithm.0 == Some(Algorithm::Symmetric) && self.buffer != Buffer::Symmetric {
            return refuse("the algorithm symmetric takes --buffer symmetric".into());
        }
        let has_floor = collective == Collective::AllReduce
            && self.ranks == 2
            && self.transport == Over::Host(Transport::Shm);
        if self.limit.is_some() && !(has_floor && dtype == DType::F32 && op == ReduceOp::Sum) {
            return refuse("--limit holds for all_reduce of f32 sums at 2 ranks over shm alone".into());
        }
        self.check_memory()
    }

    /// Refuses GPUs that can't be had, for so many ranks on this host.
    #[cfg_attr(not(feature = "nccl"), expect(unused_variables, reason = "there are none"))]
    fn check_devices(&self, ranks: usize) -> Result<(), Failure> {
        match self.transport {
            #[cfg(feature = "nccl")]
            Over::Nccl => device::check(ranks),
            #[cfg(not(feature = "nccl"))]
            Over::Nccl => {
                Err(Failure::usage("--transport nccl: this program was built without the feature nccl"))
            }
            Over::Host(_) => Ok(()),
        }
    }

    /// Ranks that run out of memory are killed without a word: say so before.
    fn check_memory(&self) -> Result<(), Failure> {
        let needed = |bytes: usize| {
            let count = bytes / self.dtype.size();
            let mut all = 0u64;
            for rank in 0..self.ranks {
                let Lengths { input, output } = self.collective.lengths(count, rank, self.ranks)?;
                all = all.checked_add(input.checked_add(output)? as u64)?;
            }
            all.checked_mul(self.dtype.size() as u64)
        };
        let Some(available) = machine::available_memory() else { return Ok(()) };
        for bytes in self.measurable().0 {
            let needed = needed(bytes).unwrap_or(u64::MAX);
            if needed > available {
                return Err(Failure::usage(format!(
                    "{bytes} bytes take {needed} of memory over {} ranks, and {available} are available",
                    self.ranks
                )));
            }
        }
        Ok(())
    }
}

/// Starts the ranks and reports what they measure.
pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    crate::mpi::prepare(args.transport.host())?;
    let launched = launched()?;
    let args = &match &launched {
        Some((env, transport)) => {
            Args { ranks: env.world, transport: args.transport.launched(*transport), ..args.clone() }
        }
        None => args.clone(),
    };
    let is_reader = launched.as_ref().is_none_or(|(env, _)| env.rank == 0);
    args.check()?;
    let here = launched.as_ref().map_or(args.ranks, |(env, _)| env.local_world.unwrap_or(1));
    args.check_devices(here)?;
    let (sizes, small) = args.measurable();
    let least = args.dtype.size() * args.ranks;
    if sizes.is_empty() {
        let (what, ranks) = (args.collective, args.ranks);
        return Err(Failure::usage(format!("{what} takes at least {least} bytes at {ranks} ranks")));
    }
    for bytes in small.into_iter().filter(|_| is_reader) {
        // Where nobody reads it, measuring goes on.
        let _ = writeln!(
            io::stderr(),
            "tensorwire: note: {bytes} bytes are left out: {} takes at least {least} at {} ranks",
            args.collective,
            args.ranks
        );
    }
    let floor =
        args.limit.as_deref().map(|path| Floor::read(path, args.touch)).transpose()?.unwrap_or_default();
    let plot = args.plot.as_deref().filter(|_| is_reader);
    let plot = plot.map(|path| OutputFile::open("--plot", path)).transpose()?;
    let rows = run_ranks(args, &floor, launched.is_some())?;
    match plot {
        Some(file) => {
            let place = format!("{}, {}", machine::description(), machine::today());
            file.write(&plot::draw(&rows, &report::title(args), &place))
        }
        None => Ok(()),
    }
}

/// Runs the ranks to their end, or as one of them, and prints each row as it comes.
fn run_ranks(args: &Args, floor: &Floor, launched: bool) -> Result<Vec<Row>, Failure> {
    let mut table = Table::new(args);
    let mut rows = Vec::new();
    let mut take = |mut row: Row| {
        row.floor_us = floor.at(row.bytes);
        table.print(&row)?;
        rows.push(row);
        Ok(())
    };
    if launched {
        rank::run(args, &mut take)?;
        return Ok(rows);
    }
    // The ranks parse the same command line.
    run_self(RANK_COMMAND, std::env::args_os().skip(2), args.ranks, args.transport.host(), |line| {
        let row = serde_json::from_slice(line);
        take(row.map_err(|e| Failure::run(format!("rank 0 wrote what is no row: {e}")))?)
    })?;
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &str) -> Args {
        Line::try_parse_from(["bench"].into_iter().chain(line.split_whitespace())).unwrap().args
    }

    #[test]
    fn sizes() {
        assert_eq!(size("8"), Ok(8));
        assert_eq!(size("64K"), Ok(65536));
        assert_eq!(size("2m"), Ok(2 << 20));
        for bad in ["", "0", "K", "-1", "1T", "1.5M", "99999999999999999999", "99999999999G", "65G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_that_give_no_rank_an_element_are_left_out() {
        let line = "--collective reduce_scatter --ranks 4 --bytes 8,16,20,4K";
        assert_eq!(args(line).measurable(), (vec![16, 16, 4096], vec![8]));
        assert_eq!(args("--collective barrier").measurable(), (vec![0], vec![]));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "--bytes 6",
            "--bytes 4 --dtype f64",
            "--dtype i32 --op average",
            "--dtype f32 --op bit_and",
            "--collective send_recv --ranks 1",
            "--collective barrier --plot x.svg",
            "--collective all_gather --buffer symmetric",
            "--collective all_gather --algorithm two_shot",
            "--algorithm symmetric",
            "--limit x --ranks 3",
            "--limit x --transport tcp",
            "--transport tcp --buffer symmetric",
            "--limit x --dtype bf16",
            "--limit x --collective broadcast",
            "--algorithm ring",
            "--algorithm ring --transport tcp --collective reduce",
            "--algorithm mpi",
            "--algorithm mpi --transport tcp",
            "--wire q8",
            "--explain --collective all_gather",
            "--wire q8 --transport tcp --collective all_gather",
            "--wire q8 --transport tcp --op max",
            "--wire bf16 --transport tcp --dtype bf16",
            "--collective all_gather --ranks 4096 --bytes 64G",
        ] {
            assert!(args(line).check().is_err(), "{line}");
        }
        for line in [
            "",
            "--algorithm symmetric --buffer symmetric",
            "--transport tcp",
            "--transport tcp --algorithm hierarchical",
            "--transport mpi --algorithm mpi --collective all_gather",
            "--transport tcp --wire q8 --dtype bf16 --op average",
            "--collective all_gather --dtype i32 --op average",
            "--dtype u8 --op bit_xor --bytes 7",
        ] {
            assert!(args(line).check().is_ok(), "{line}");
        }
    }
}
