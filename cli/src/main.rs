//! The command line of tensorwire: run a model over several ranks, plan its sharding, measure the machine and the collectives,
//! start ranks of any program, look at jobs that hang.
//!
//! Failure is one line on standard error, `tensorwire: ...`, and an exit status: 2 for bad usage or an
//! impossible request, 1 for a run that failed (`launch`: the status of the rank that failed first).

mod bench;
mod doctor;
mod failure;
mod form;
mod infer;
mod job;
mod launch;
mod measure;
mod mpi;
mod output;
mod plan;
mod simulate;
mod topo;

use clap::{CommandFactory, Parser, Subcommand};

use failure::Failure;

const EXAMPLES: &str = "\
Examples:
  tensorwire infer --ranks 2                          a built-in model, sharded, checked against unsharded
  tensorwire infer --model DIR --prompt 'Once upon'   a Llama or Qwen2 model
  tensorwire infer --model DIR --text 'a' --text 'b'  a sentence encoder: pairwise similarities
  tensorwire plan --model DIR --tp 4                  who holds what, who exchanges what
  tensorwire topo --probe                             measures the machine; the collectives follow it
  tensorwire bench --collective all_reduce --ranks 4 --bytes 8,65536
  tensorwire simulate --ranks 1024 --hosts 128        what all-reduces would take there
  tensorwire launch --ranks 4 -- ./my-program         4 ranks of any program
  tensorwire doctor                                   why does it hang?

Exit status: 0 success; 2 bad usage or an impossible request; 1 a failed run (launch: the status of the
rank that failed first).";

/// Tensor-parallel inference over shared memory: collectives, and a planner that shards models.
#[derive(Parser)]
#[command(name = "tensorwire", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Infer(infer::Args),
    Plan(plan::Args),
    Topo(topo::Args),
    Bench(bench::Args),
    Simulate(simulate::Args),
    Launch(launch::Args),
    Doctor(doctor::Args),
    /// One rank of `infer`: started by it, not by hand.
    #[command(name = infer::RANK_COMMAND, hide = true)]
    InferRank(infer::Args),
    /// One rank of `bench`: started by it, not by hand.
    #[command(name = bench::RANK_COMMAND, hide = true)]
    BenchRank(bench::Args),
    /// One host's agent of `launch --hostfile`: started by it, not by hand.
    #[command(name = launch::AGENT_COMMAND, hide = true)]
    Agent,
    /// One rank of `topo --probe`: started by it, not by hand.
    #[command(name = topo::RANK_COMMAND, hide = true)]
    TopoRank,
    /// One rank that measures calls: started by `topo --probe` and `plan verify`, not by hand.
    #[command(name = measure::calls::RANK_COMMAND, hide = true)]
    CallsRank(measure::calls::RankArgs),
    /// One rank that measures a decoder's layers: started by `topo --probe` and `plan verify`, not by hand.
    #[command(name = measure::layers::RANK_COMMAND, hide = true)]
    LayersRank(measure::layers::Subject),
}

fn main() {
    std::panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let what = payload.downcast_ref::<&str>().copied();
        let what = what.or(payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        let place = panic.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        Failure::run(format!("a bug in tensorwire, please report it: {what}{place}")).exit()
    }));
    let done = parse().and_then(|cli| match cli.command {
        Command::Infer(args) => infer::main(&args),
        Command::Plan(args) => plan::main(&args),
        Command::Topo(args) => topo::main(&args),
        Command::TopoRank => topo::rank_main(),
        Command::CallsRank(args) => measure::calls::rank_main(&args),
        Command::LayersRank(subject) => measure::layers::rank_main(&subject),
        Command::Bench(args) => bench::main(&args),
        Command::Simulate(args) => simulate::main(&args),
        Command::BenchRank(args) => bench::rank_main(&args),
        Command::Agent => launch::agent_main(),
        Command::Launch(args) => launch::main(&args),
        Command::Doctor(args) => doctor::main(&args),
        Command::InferRank(args) => infer::rank_main(&args),
    });
    if let Err(failure) = done {
        failure.exit();
    }
}

/// The command line, or what is wrong with it in one line. Help and version are printed and end the process.
fn parse() -> Result<Cli, Failure> {
    use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    Cli::try_parse().map_err(|error| match error.kind() {
        DisplayHelp | DisplayVersion => {
            // Whoever asked for it may have closed the pipe.
            let _ = error.print();
            Failure::quiet(0)
        }
        DisplayHelpOnMissingArgumentOrSubcommand => {
            let names = Cli::command();
            let names: Vec<_> =
                names.get_subcommands().filter(|c| !c.is_hide_set()).map(|c| c.get_name()).collect();
            Failure::usage(format!("no command: use one of {} (see tensorwire --help)", names.join(", ")))
        }
        _ => Failure::usage(one_line(&error.render().to_string())),
    })
}

/// clap's message without its heading, its usage and its tips.
fn one_line(rendered: &str) -> String {
    let lines = rendered.lines().map(str::trim).take_while(|l| !l.is_empty() && !l.starts_with("Usage:"));
    let message = lines.collect::<Vec<_>>().join(" ");
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    let first = std::env::args_os().nth(1);
    let command = first.filter(|name| Cli::command().find_subcommand(name).is_some());
    let command = command.map(|name| format!("{} ", name.display())).unwrap_or_default();
    format!("{message} (see tensorwire {command}--help)")
}
