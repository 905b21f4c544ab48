//! `tensorwire plan`: how a model is sharded.

mod diff;
mod place;
pub(crate) mod verify;

use std::path::{Path, PathBuf};

use tensorwire::topology::place::Placement;
use tensorwire::topology::{ModelSpec, Planner};

use crate::failure::{Failure, print, ranks};
use crate::output::OutputFile;

const EXAMPLES: &str = "\
Examples:
  tensorwire plan --model ./Llama-3.2-1B --tp 4
  tensorwire plan --model ./config.json --tp 7 --json > plan.json
  tensorwire plan --model ./config.json --fabric machines.toml --for prefill --context 8192 --batch 16
  tensorwire plan --pipeline pipeline.toml --fabric machines.toml
  tensorwire plan --model ./config.json --tp 7 --explain --html plan.html
  tensorwire plan diff --model ./Llama-3.2-1B --tp 4 --tp 3
  tensorwire plan verify --tp 2";

/// Show how a model is sharded over ranks
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    one: One,
}

#[derive(clap::Subcommand)]
enum Command {
    Diff(diff::Args),
    Verify(verify::Args),
}

/// One plan.
#[derive(clap::Args)]
struct One {
    /// A model directory, or a config.json alone
    #[arg(long, value_name = "DIR|config.json", required_unless_present = "pipeline")]
    model: Option<PathBuf>,

    /// Tensor-parallel ranks
    #[arg(long, value_name = "N", value_parser = ranks, required_unless_present = "fabric")]
    tp: Option<usize>,

    #[command(flatten)]
    place: place::Where,

    /// Print the whole plan as JSON, schema tensorwire.plan/v1
    #[arg(long)]
    json: bool,

    /// Say what binds, what each note costs, and what else there was with its predicted cost; with --json in the
    /// field `explain`
    #[arg(long)]
    explain: bool,

    /// Draw the plan: ranks, what each holds, what they exchange
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write a page with the picture, tables and notes, which needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    match &args.command {
        Some(Command::Diff(args)) => diff::main(args),
        Some(Command::Verify(args)) => verify::main(args),
        None => one(&args.one),
    }
}

fn one(args: &One) -> Result<(), Failure> {
    let Some(model) = &args.model else { return args.place.pipeline(args.json) };
    let open = |option, path: &Option<PathBuf>| {
        path.as_deref().map(|path: &Path| OutputFile::open(option, path)).transpose()
    };
    let (svg, html) = (open("--svg", &args.svg)?, open("--html", &args.html)?);
    let spec = ModelSpec::load(model).map_err(Failure::usage)?;
    let placement = if args.tp.is_none() { Some(args.place.model(&spec)?) } else { None };
    let (planner, tp) = match (&placement, args.tp) {
        (Some(placement), _) => match place::planner(&spec, placement) {
            Some(found) => found,
            None => {
                let text = if args.json { placement.to_json() } else { placement.summary() };
                return print(format_args!("{}\n", text.trim_end()));
            }
        },
        (None, tp) => (Planner::new(&spec), tp.unwrap_or(1)),
    };
    let planner = planner.with_costs(args.place.costs(&spec, placement.as_ref(), tp)?);
    let plan = planner.plan(tp).map_err(|e| match planner.instead_of(tp) {
        Some(instead) => Failure::usage(format!("{e}. {instead}")),
        None => Failure::usage(e),
    })?;
    let explanation = if args.explain { Some(planner.explain(&plan).map_err(Failure::usage)?) } else { None };
    if svg.is_some() || html.is_some() {
        let picture = args.place.picture(&plan, placement.as_ref())?;
        if let Some(file) = svg {
            file.write(&picture)?;
        }
        if let Some(file) = html {
            file.write(&plan.html_with(&picture, explanation.as_ref()))?;
        }
    }
    let text = match (args.json, &placement, &explanation) {
        (true, Some(placement), why) => placement.to_json_with(&plan, why.as_ref()),
        (true, None, Some(why)) => plan.to_json_with(why),
        (true, None, None) => plan.to_json(),
        (false, placement, why) => {
            let plan = why.as_ref().map_or_else(|| plan.summary(), |why| plan.summary_with(why));
            placement.as_ref().map(Placement::summary).unwrap_or_default() + &plan
        }
    };
    print(format_args!("{}\n", text.trim_end()))
}
