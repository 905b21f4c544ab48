//! `tensorwire topo`: what the machine is, and which algorithms are fastest on it.

mod probe;
mod rank;
mod report;
mod sample;

use std::path::Path;

use serde_json::json;
use tensorwire::topology::discover::{Fingerprint, Machine};
use tensorwire::topology::table::Table;

use crate::failure::{Failure, print};

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

Examples:
  tensorwire topo              what the machine is, and the table in force
  tensorwire topo --probe      measure, and keep the result
  tensorwire topo --json | jq .table";

/// Show what the machine is, and measure which algorithms are fastest on it
#[derive(clap::Args)]
#[command(after_help = METHOD)]
pub(crate) struct Args {
    /// Measure, and keep the result for all programs of this user
    #[arg(long)]
    probe: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let root = Path::new("/");
    let fingerprint = Fingerprint::read(root);
    // What can't be measured or kept is known before anything is printed.
    let path = if args.probe { Some(probe::place(&fingerprint)?) } else { None };
    let machine = Machine::read(root);
    if !args.json {
        print(report::machine(&machine))?;
    }
    let mut samples = Vec::new();
    if let Some(path) = path {
        let mut show = |text: String| if args.json { Ok(()) } else { print(text) };
        samples = probe::run(&fingerprint, &path, &mut show)?;
    }
    let table = Table::in_force();
    if !args.json {
        return print(report::table(&table, &fingerprint));
    }
    let mut object = json!({ "machine": machine, "table": report::table_json(&table, &fingerprint) });
    if args.probe {
        object["samples"] = serde_json::to_value(samples).map_err(Failure::run)?;
    }
    print(format_args!("{object:#}\n"))
}
