//! `tensorwire plan diff`: what must move between two plans.

use std::path::{Path, PathBuf};

use tensorwire::topology::{ModelSpec, Plan, Planner};

use crate::failure::{Failure, print, ranks};

const EXAMPLES: &str = "\
Examples:
  tensorwire plan diff before.json after.json
  tensorwire plan diff --model ./Llama-3.2-1B --tp 4 --tp 3 --json";

/// Show which bytes each rank must fetch, and from whom, to go from one plan to another
///
/// What a rank holds and needs again isn't moved, so this is the least that can. It is weights: a KV cache that is
/// to be kept moves like the key and value projections' rows.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Two plans, as `plan --json` prints them
    #[arg(value_names = ["BEFORE", "AFTER"], num_args = 2, required_unless_present = "model")]
    plans: Vec<PathBuf>,

    /// A model directory, or a config.json alone, to be planned for both
    #[arg(long, value_name = "DIR|config.json", conflicts_with = "plans")]
    model: Option<PathBuf>,

    /// Tensor-parallel ranks: twice, before and after
    #[arg(long, value_name = "N", value_parser = ranks, requires = "model")]
    tp: Vec<usize>,

    /// Print every piece that moves as JSON, schema tensorwire.plan-diff/v1
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let (before, after) = match (&args.model, args.plans.as_slice(), args.tp.as_slice()) {
        (Some(model), _, &[before, after]) => {
            let spec = ModelSpec::load(model).map_err(Failure::usage)?;
            let plan = |world| Planner::new(&spec).plan(world).map_err(Failure::usage);
            (plan(before)?, plan(after)?)
        }
        (None, [before, after], _) => (read(before)?, read(after)?),
        _ => return Err(Failure::usage("give --tp twice, for before and after: --tp 4 --tp 3")),
    };
    let diff = before.diff(&after).map_err(Failure::usage)?;
    let text = if args.json { diff.to_json() } else { diff.summary() };
    print(format_args!("{}\n", text.trim_end()))
}

/// The plan in a file.
fn read(path: &Path) -> Result<Plan, Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::usage(format!("{}: {e}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| failed(&e))?;
    Plan::from_json(&text).map_err(|e| failed(&e))
}
