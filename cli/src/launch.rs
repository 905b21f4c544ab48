//! `tensorwire launch`: ranks of any program on this host.

use std::ffi::OsString;
use std::io::ErrorKind::{NotFound, PermissionDenied};
use std::ops::ControlFlow;
use std::os::unix::process::ExitStatusExt;

use rustix::process::Signal;
use tensorwire::Error;
use tensorwire::transports::launch::{Outcome, Stream, Transport};

use crate::failure::{Failure, ranks};
use crate::job::Job;

const EXAMPLES: &str = "\
Each rank finds its place in TENSORWIRE_RANK, TENSORWIRE_WORLD, TENSORWIRE_LOCAL_WORLD and TENSORWIRE_STORE, and
what carries the bytes in TENSORWIRE_TRANSPORT and, a secret of this job, TENSORWIRE_SECRET; its output is printed line by line behind `[rank N]`. SIGINT, SIGTERM and SIGHUP are passed on; a second
SIGINT kills. When a rank fails, the others are ended within a second, and the exit status is that rank's
(128 and the signal's number, if a signal killed it).

Examples:
  tensorwire launch --ranks 4 -- ./my-program --fast
  tensorwire launch --ranks 2 -- sh -c 'echo rank $TENSORWIRE_RANK of $TENSORWIRE_WORLD'";

/// Start ranks of a program and watch over them
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// How many ranks to start
    #[arg(long, short = 'n', value_name = "N", value_parser = ranks)]
    ranks: usize,

    /// What carries the bytes between the ranks: shm or tcp [default: what TENSORWIRE_TRANSPORT says, or shm]
    #[arg(long, value_parser = str::parse::<Transport>)]
    transport: Option<Transport>,

    /// The program and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let Some((program, rest)) = args.command.split_first() else {
        return Err(Failure::usage("launch: no command given after --"));
    };
    let transport = args.transport.map_or_else(Transport::from_env, Ok).map_err(Failure::usage)?;
    let job = Job::new(args.ranks, transport)?;
    let launcher = job.launcher(program).args(rest).forward_signals();
    let outcome = launcher.run().map_err(|e| match &e {
        Error::Os { source, .. } if matches!(source.kind(), NotFound | PermissionDenied) => Failure::usage(e),
        _ => Failure::run(e),
    })?;
    match describe(&outcome, args.ranks) {
        Some(why) => Err(Failure::with_status(outcome.exit_code(), why)),
        None if outcome.output_closed => Err(Failure::output_closed()),
        None => Ok(()),
    }
}

/// Runs `command` of this program in `ranks` processes to their end, and gives what they print to `take`, line by
/// line.
pub(crate) fn run_self(
    command: &str,
    args: impl IntoIterator<Item = OsString>,
    ranks: usize,
    transport: Transport,
    mut take: impl FnMut(&[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let job = Job::new(ranks, transport)?;
    let program = std::env::current_exe().map_err(|e| Failure::run(format!("finding this program: {e}")))?;
    let mut broken = None;
    let outcome = job
        .launcher(program)
        .arg(command)
        .args(args)
        .forward_signals()
        .on_line(|line| {
            // What a failing rank says on standard error is part of the outcome.
            if line.stream == Stream::Stderr {
                return ControlFlow::Continue(());
            }
            match take(line.bytes) {
                Ok(()) => ControlFlow::Continue(()),
                Err(failure) => {
                    broken = Some(failure);
                    ControlFlow::Break(())
                }
            }
        })
        .run()
        .map_err(Failure::run)?;
    match (broken, describe(&outcome, ranks)) {
        (Some(failure), _) => Err(failure),
        (None, Some(why)) if outcome.exit_code() == 2 => Err(Failure::usage(why)),
        (None, Some(why)) => Err(Failure::run(why)),
        (None, None) => Ok(()),
    }
}

/// What went wrong in a run, if anything that is worth a line did.
pub(crate) fn describe(outcome: &Outcome, ranks: usize) -> Option<String> {
    let failure = outcome.failure.as_ref().filter(|_| !outcome.output_closed)?;
    if let Some(signal) = outcome.forwarded {
        return Some(format!("interrupted by {}: all ranks have ended", signal_name(signal)));
    }
    let mut why = failure.to_string();
    if failure.status.signal() == Some(Signal::KILL.as_raw()) {
        why.push_str(", by someone or by the kernel for lack of memory");
    }
    if ranks > 1 {
        why.push_str(" (the other ranks were ended)");
    }
    Some(why)
}

fn signal_name(signal: i32) -> String {
    match Signal::from_named_raw(signal) {
        Some(Signal::INT) => "SIGINT".into(),
        Some(Signal::TERM) => "SIGTERM".into(),
        Some(Signal::HUP) => "SIGHUP".into(),
        _ => format!("signal {signal}"),
    }
}
