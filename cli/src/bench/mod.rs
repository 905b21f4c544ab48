//! `tensorwire bench`: how long the collectives take here.

mod rank;

use std::io::{self, Write};
use std::ops::ControlFlow;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tensorwire::transports::launch::{Launcher, Stream};
use tensorwire::transports::store::StoreServer;
use tensorwire::{Algorithm, DType, Op, ReduceOp};

use crate::failure::{Failure, print, ranks};
use crate::launch::describe;

pub(crate) use rank::main as rank_main;

/// The hidden command that one rank runs.
pub(crate) const RANK_COMMAND: &str = "__bench-rank";

const METHOD: &str = "\
Ranks are processes. Every result is checked element by element before it is timed. A batch is a loop of
back-to-back calls between two barriers; its figure is the slowest rank's mean time a call; `median` and `min`
are over batches. `p99` is over single calls timed one by one, on the slowest rank. Buffers are ordinary
process memory, all_reduce and broadcast in place.

`bytes` is what one rank contributes: the buffer (all_reduce, broadcast), one block (all_gather), the whole
input (reduce_scatter; sizes that don't divide are cut to the next that does). algbw is data over time, busbw
what that means for the busiest link, both in GB/s (10^9 bytes a second) and as nccl-tests defines them.

Examples:
  tensorwire bench --collective all_reduce --ranks 2
  tensorwire bench --collective all_gather --ranks 4 --bytes 8,4K,1M --dtype bf16 --json";

/// Measure a collective over ranks on this host
#[derive(clap::Args, Clone)]
#[command(after_help = METHOD)]
pub(crate) struct Args {
    /// Which collective: all_reduce, all_gather, reduce_scatter, broadcast or barrier
    #[arg(long, value_parser = collective, default_value = "all_reduce")]
    collective: Op,

    /// What carries the bytes
    #[arg(long, value_enum, default_value = "shm")]
    transport: Transport,

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

    /// What memory the data is in
    #[arg(long, value_enum, default_value = "user")]
    buffer: Buffer,

    /// Rewrite the input before every call, inside the timed loop, as a producer would
    #[arg(long)]
    touch: bool,

    /// Force an all-reduce algorithm: inline, one_shot or two_shot
    #[arg(long, default_value = "auto", value_parser = algorithm)]
    algorithm: Choice,

    /// Batches a size
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u32).range(1..=1000))]
    batches: u32,

    /// Print one JSON object a size
    #[arg(long)]
    json: bool,
}

const DEFAULT_SIZES: &str = "8,64,512,4K,16K,64K,256K,1M,4M,16M,64M";

#[derive(Clone, Copy, ValueEnum)]
enum Transport {
    /// Shared memory.
    Shm,
}

#[derive(Clone, Copy, ValueEnum)]
enum Buffer {
    /// Ordinary process memory.
    User,
}

#[derive(Clone, Copy)]
struct Choice(Option<Algorithm>);

fn algorithm(text: &str) -> Result<Choice, tensorwire::Error> {
    if text == "auto" { Ok(Choice(None)) } else { text.parse().map(|a| Choice(Some(a))) }
}

/// The collectives that can be measured.
const MEASURED: [Op; 5] = [Op::AllReduce, Op::AllGather, Op::ReduceScatter, Op::Broadcast, Op::Barrier];

fn collective(text: &str) -> Result<Op, String> {
    MEASURED.into_iter().find(|op| op.name() == text).ok_or_else(|| {
        let names: Vec<_> = MEASURED.iter().map(|op| op.name()).collect();
        format!("use one of {}", names.join(", "))
    })
}

fn size(text: &str) -> Result<usize, String> {
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

/// One line of the report. Its JSON form is a contract: fields are added, never renamed.
#[derive(Serialize, Deserialize)]
struct Row {
    collective: String,
    transport: String,
    ranks: usize,
    dtype: String,
    op: String,
    bytes: usize,
    algorithm: String,
    buffer: String,
    median_us: f64,
    p99_us: f64,
    min_us: f64,
    algbw_gbps: f64,
    busbw_gbps: f64,
    correct: bool,
}

/// Starts the ranks and reports what they measure.
pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    for bytes in &args.bytes {
        if bytes % args.dtype.size() != 0 {
            return Err(Failure::usage(format!(
                "{bytes} bytes are no whole number of {} elements",
                args.dtype
            )));
        }
    }
    if !args.op.supports(args.dtype) {
        return Err(Failure::usage(format!("{} is not defined for {}", args.op, args.dtype)));
    }
    let store = StoreServer::start().map_err(Failure::run)?;
    let program = std::env::current_exe().map_err(|e| Failure::run(format!("finding this program: {e}")))?;
    // The ranks parse the same command line.
    let own: Vec<_> = std::env::args_os().skip(2).collect();
    let mut broken = None;
    let mut heading = true;
    let outcome = Launcher::new(program, args.ranks, store.address())
        .arg(RANK_COMMAND)
        .args(own)
        .forward_signals()
        .on_line(|line| {
            if line.stream == Stream::Stderr {
                return ControlFlow::Continue(());
            }
            match report(line.bytes, args, &mut heading) {
                Ok(()) => ControlFlow::Continue(()),
                Err(failure) => {
                    broken = Some(failure);
                    ControlFlow::Break(())
                }
            }
        })
        .run()
        .map_err(Failure::run)?;
    match (broken, describe(&outcome, args.ranks)) {
        (Some(failure), _) => Err(failure),
        (None, Some(why)) => Err(Failure::run(why)),
        (None, None) => Ok(()),
    }
}

/// Prints a row as it comes: as it is, or as a line of a table.
fn report(line: &[u8], args: &Args, heading: &mut bool) -> Result<(), Failure> {
    if args.json {
        let mut out = io::stdout().lock();
        out.write_all(line)?;
        out.write_all(b"\n")?;
        return Ok(out.flush()?);
    }
    let row: Row = serde_json::from_slice(line)
        .map_err(|e| Failure::run(format!("rank 0 wrote what is no row: {e}")))?;
    if std::mem::take(heading) {
        let what = if args.collective == Op::Barrier {
            String::new()
        } else {
            format!(" {} {}", args.dtype, args.op)
        };
        print(format_args!("{}{what} over shm, {} ranks\n", args.collective, args.ranks))?;
        let names = ["algorithm", "median us", "min us", "p99 us", "algbw GB/s", "busbw GB/s"];
        print(format_args!("{:>12}{}\n", "bytes", names.map(|n| format!("{n:>12}")).concat()))?;
    }
    let us = |x: f64| format!("{x:>12.*}", if x < 100.0 { 2 } else { 0 });
    print(format_args!(
        "{:>12}{:>12}{}{}{}{:>12.2}{:>12.2}\n",
        row.bytes,
        row.algorithm,
        us(row.median_us),
        us(row.min_us),
        us(row.p99_us),
        row.algbw_gbps,
        row.busbw_gbps
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("8"), Ok(8));
        assert_eq!(size("64K"), Ok(65536));
        assert_eq!(size("2m"), Ok(2 << 20));
        for bad in ["", "0", "K", "-1", "1T", "1.5M", "99999999999999999999", "99999999999G", "65G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
