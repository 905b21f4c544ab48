//! `tensorwire plan`: how a model is sharded.

use std::path::PathBuf;

use tensorwire::topology::{ModelSpec, Planner};

use crate::failure::{Failure, print, ranks};

const EXAMPLES: &str = "\
Examples:
  tensorwire plan --model ./Llama-3.2-1B --tp 4
  tensorwire plan --model ./config.json --tp 7 --json > plan.json
  tensorwire plan verify --tp 2";

/// Show how a model is sharded over ranks
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    one: Option<One>,
}

#[derive(clap::Subcommand)]
enum Command {
    Verify(crate::plan_verify::Args),
}

/// One plan.
#[derive(clap::Args)]
struct One {
    /// A model directory, or a config.json alone
    #[arg(long, value_name = "DIR|config.json")]
    model: PathBuf,

    /// Tensor-parallel ranks
    #[arg(long, value_name = "N", value_parser = ranks)]
    tp: usize,

    /// Print the whole plan as JSON, schema tensorwire.plan/v1
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    match (&args.command, &args.one) {
        (Some(Command::Verify(args)), _) => crate::plan_verify::main(args),
        (None, Some(args)) => one(args),
        (None, None) => Err(Failure::usage("plan needs --model and --tp (see tensorwire plan --help)")),
    }
}

fn one(args: &One) -> Result<(), Failure> {
    let spec = ModelSpec::load(&args.model).map_err(Failure::usage)?;
    let plan = Planner::new(&spec).plan(args.tp).map_err(Failure::usage)?;
    let text = if args.json { plan.to_json() } else { plan.summary() };
    print(format_args!("{}\n", text.trim_end()))
}
