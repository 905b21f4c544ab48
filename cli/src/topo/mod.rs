//! `tensorwire topo`: what the machine is, and which algorithms are fastest on it.

mod fabric;
mod network;
mod probe;
pub(crate) mod profile;
mod rank;
pub(crate) mod report;
mod sample;

use std::path::{Path, PathBuf};

use clap::value_parser;
use serde_json::json;
use tensorwire::topology::discover::{Fingerprint, Machine};
use tensorwire::topology::table::claims::disagreements;
use tensorwire::topology::table::{Absent, Table};
use tensorwire::transports::launch::Transport;

use crate::bench::size;
use crate::failure::{Failure, print, ranks};

pub(crate) use rank::main as rank_main;

/// The hidden command that one rank runs.
pub(crate) const RANK_COMMAND: &str = "__topo-rank";

const METHOD: &str = "\
The collectives choose their algorithm by size: how large an all-reduce is at most when it takes one step, for
ordinary and for symmetric buffers, and how many bytes a step of a longer one moves. Without a measurement they
use built-in constants. --probe times the algorithms in turn, over ranks that are processes, each result checked
first, for 2 ranks and more up to the processors that may be used, and keeps what it finds in a file: under
$XDG_CACHE_HOME/tensorwire or ~/.cache/tensorwire, or where TENSORWIRE_TABLE says. Programs that use the library
follow it from then on: rank 0 reads it, and tells the others. TENSORWIRE_TABLE=off is for the constants. Let
nothing else run meanwhile.

Over a network they choose by what messages cost: a latency, a bandwidth, and what each keeps a processor busy. With
--transport tcp, tls or quic, --probe measures that between ranks on this host; as a program of `tensorwire launch`, between
the ranks of its job, on one host and on several, and rank 0 keeps it in the same file, beside what was measured before.
Ranks send to each other around a ring, all at once; the line that the times of all sizes miss by the least product of
factors is what is kept. TENSORWIRE_INTRA and TENSORWIRE_INTER have precedence over it.

--fabric shows another machine than this one, or many: described by hand in TOML (docs/fabric.md is its reference, and
examples/fabrics has some), in the JSON that --json prints for a fabric, or as other tools write it: NCCL's topology
(NCCL_TOPO_DUMP_FILE), hwloc's (lstopo --of xml), and what nvidia-smi topo -m prints. Which one it is, is seen from the text.

Examples:
  tensorwire topo              what the machine is, and the table in force
  tensorwire topo --probe      measure, and keep the result
  tensorwire topo --probe --transport tcp
  tensorwire launch --hostfile hosts --ranks 8 -- tensorwire topo --probe --transport tcp
  tensorwire topo --json | jq .table
  tensorwire topo --svg here.svg
  tensorwire topo --fabric examples/fabrics/8-gpus-nvlink.toml --svg node.svg --export-nccl node.xml
  nvidia-smi topo -m | tensorwire topo --fabric /dev/stdin --json > fabric.json";

/// Show what the machine is, and measure which algorithms are fastest on it
#[derive(clap::Args)]
#[command(after_help = METHOD)]
pub(crate) struct Args {
    /// Measure, and keep the result for all programs of this user
    #[arg(long)]
    probe: bool,

    /// What --probe measures: shm, or the links of tcp, tls or quic [default: shm]
    #[arg(long, requires = "probe", value_parser = str::parse::<Transport>)]
    transport: Option<Transport>,

    /// Over how many ranks, on this host, --probe measures links [default: 2]
    #[arg(long, short = 'n', value_name = "N", requires = "transport", value_parser = ranks)]
    ranks: Option<usize>,

    /// Sizes at which --probe times every collective, separated by commas [default: 8 bytes to 64 MiB]
    #[arg(long, value_name = "BYTES", value_delimiter = ',', requires = "probe", value_parser = size)]
    bytes: Vec<usize>,

    /// How often --probe times every collective
    #[arg(long, value_name = "N", requires = "probe", default_value = "5", value_parser = value_parser!(u8).range(1..=100))]
    passes: u8,

    /// Probe also what a decoder's layers take, by three models of 300 MB and more
    #[arg(long, requires = "probe")]
    decode: bool,

    /// Probe all: --decode, up to 256 MiB, ranks that take turns, collectives beside a neighbour that keeps memory busy;
    /// takes minutes
    #[arg(long, requires = "probe")]
    full: bool,

    /// Show the fabric of a file instead: TOML, JSON, NCCL's or hwloc's XML, or what nvidia-smi topo -m prints
    #[arg(long, visible_alias = "import", value_name = "FILE", conflicts_with = "probe")]
    fabric: Option<PathBuf>,

    /// Draw the machine, or the fabric
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write the machine, or the fabric, as NCCL's topology
    #[arg(long, value_name = "FILE")]
    export_nccl: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let files = fabric::Files::open(args.svg.as_ref(), args.export_nccl.as_ref())?;
    if let Some(path) = &args.fabric {
        let fabric = fabric::load(path)?;
        files.write(&fabric)?;
        return print(if args.json { fabric.to_json() } else { fabric::text(&fabric) });
    }
    let root = Path::new("/");
    let fingerprint = Fingerprint::read(root);
    let over = probe::Over::new(args)?;
    if over.as_ref().is_some_and(|over| !over.is_rank_0()) {
        return probe::take_part();
    }
    // What can't be measured or kept is known before anything is printed.
    let path = over.as_ref().map(|over| probe::place(&fingerprint, over)).transpose()?;
    let machine = Machine::read(root);
    let fabric = fabric::here(&machine)?;
    files.write(&fabric)?;
    if !args.json {
        print(format_args!("{}{}", report::machine(&machine), report::accelerators(&machine)))?;
    }
    let mut samples = Vec::new();
    if let (Some(over), Some(path)) = (over, path) {
        let mut show = |text: String| if args.json { Ok(()) } else { print(text) };
        samples = probe::run(args, &over, &fingerprint, &path, &mut show)?;
    }
    let table = Table::in_force();
    let links = report::links(&table)?;
    let profiles = report::profiles(&table);
    let notes = table.as_ref().map(|table| disagreements(&machine, table)).unwrap_or_default();
    let known = table.as_ref().ok().cloned();
    // Of links alone, maybe.
    let table = table.and_then(|table| match table.tunings.is_empty() {
        true => Err(Absent::Missing),
        false => Ok(table),
    });
    if !args.json {
        return print(format_args!(
            "{}{}{profiles}{}",
            report::table(&table, &fingerprint),
            report::links_text(&links),
            report::notes(&notes)
        ));
    }
    let profiles = known.as_ref().map(|table| &table.profiles[..]).unwrap_or_default();
    let mut object = json!({
        "machine": machine,
        "fabric": fabric.to_value(),
        "table": report::table_json(&table, &fingerprint),
        "links": report::links_json(&links),
        "profiles": profiles,
        "disagreements": notes,
    });
    if args.probe {
        object["samples"] = json!(samples);
    }
    print(format_args!("{object:#}\n"))
}
