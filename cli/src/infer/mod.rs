//! `tensorwire infer`: the main job. Runs a model over several rank processes and checks the result against
//! the same model unsharded.
//!
//! The parent process reads the model's configuration and plans, so that bad input fails before anything is
//! started. Then it starts itself as the ranks ([`rank`]), which load and run their shares; rank 0 reports what
//! comes out as [`event`]s on its standard output and puts the numbers that are compared into a memory file.

mod event;
mod group;
mod input;
mod progress;
mod rank;
mod report;
mod verify;

use std::path::PathBuf;

use tensorwire::topology::Planner;
use tensorwire::transports::launch::Transport;

use crate::failure::{Failure, print, ranks};
use crate::form::Form;
use crate::job::launched;
use group::Group;
use input::Input;
use progress::{Progress, Style};
use report::{Report, count};

pub(crate) use rank::main as rank_main;

/// The hidden subcommand that a rank of `infer` runs.
pub(crate) const RANK_COMMAND: &str = "__infer-rank";

const EXAMPLES: &str = "\
Without --model, a built-in Llama-shaped model runs: its weights come from a seed, it has no tokenizer, and
its prompt and output are token ids.

The same model then runs unsharded, in one process with all processors, and the results are compared: tokens
must be equal. --no-verify leaves that out. With --wire bf16 or q8 they need not be: it is told how many are, and
by how much the logits differ.

As a program of `tensorwire launch`, it runs over the ranks of its job, on any hosts; rank 0 prints.

Examples:
  tensorwire infer --ranks 2
  tensorwire infer --model ./SmolLM2-135M --ranks 3 --prompt 'The sea is' --max-tokens 40
  tensorwire infer --model ./all-MiniLM-L6-v2 --ranks 2 --text 'a cat' --text 'a kitten' --text 'a train'";

/// Run a model over several ranks, checked against the unsharded run
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A model directory: config.json, model.safetensors (or its index), tokenizer.json
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// Ranks to shard the model over
    #[arg(long, short = 'n', value_name = "N", default_value = "2", value_parser = ranks)]
    ranks: usize,

    /// What carries the bytes between the ranks: shm, or tcp, tls or quic over this host's loopback
    #[arg(long, value_parser = str::parse::<Transport>, default_value = "shm")]
    transport: Transport,

    /// A text to embed (encoders); give it several times to compare texts
    #[arg(long = "text", value_name = "TEXT", allow_hyphen_values = true)]
    texts: Vec<String>,

    /// A text to continue (decoders)
    #[arg(long, value_name = "TEXT", conflicts_with = "texts", allow_hyphen_values = true)]
    prompt: Option<String>,

    /// Tokens to generate at most (decoders) [default: 64, or what the model's context allows]
    #[arg(long, value_name = "N", conflicts_with = "texts", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,

    /// What stands for the elements that ranks exchange over a network, for slow links: f32, as they are; bf16, half as
    /// long; or q8, a byte each and two for 32 of them. Results are then near the unsharded run's, not those
    #[arg(long, default_value = "f32", value_name = "FORM", value_parser = str::parse::<Form>)]
    wire: Form,

    /// Don't run the model unsharded, don't compare
    #[arg(long)]
    no_verify: bool,

    /// Print one JSON object and nothing else
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    crate::mpi::prepare(args.transport)?;
    let launched = launched()?;
    let place = launched.as_ref().map(|(env, _)| env);
    let ranks = place.map_or(args.ranks, |place| place.world);
    let transport = launched.as_ref().map_or(args.transport, |(_, transport)| *transport);
    if args.wire.0.is_some() && transport == Transport::Shm {
        let wire = args.wire;
        return Err(Failure::usage(format!(
            "--wire {wire} is for networks: it takes --transport tcp or tls"
        )));
    }
    let input = Input::of(args)?;
    let plan = Planner::new(input.model.spec()).plan(ranks).map_err(Failure::usage)?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let here = place.map_or(ranks, |place| place.local_world.unwrap_or(1));
    let sharded = Group { args, ranks, threads: (processors / here).max(1), place };
    if place.is_some_and(|place| place.rank != 0) {
        return sharded.run(Progress::new(Style::Quiet, "", &input, false)).map(drop);
    }
    if !args.json {
        print(format_args!("{}{}\n\n", input.heading(), plan.summary().trim_end()))?;
    }

    let style = Style::new(args.json);
    let run = sharded.run(Progress::new(style, &count(ranks, "rank"), &input, true))?;

    let unsharded = Group { args, ranks: 1, threads: processors, place: None };
    let reference = match args.no_verify {
        true => None,
        false => Some(unsharded.run(Progress::new(style, "unsharded", &input, false))?),
    };
    let verified =
        reference.as_ref().map(|reference| verify::compare(&run, reference, args.wire.0)).transpose()?;

    let report = Report {
        input: &input,
        group: &sharded,
        run: &run,
        reference: reference.as_ref().zip(verified.as_ref()),
        processors,
    };
    print(if args.json { report.json()? } else { report.text()? })?;
    verified.map_or(Ok(()), |verified| verified.verdict())
}
