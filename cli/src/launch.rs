//! `tensorwire launch`: ranks of any program, on this host or on several.

use std::ffi::OsString;
use std::io::ErrorKind::{NotFound, PermissionDenied};
use std::io::Read;
use std::ops::ControlFlow;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use tensorwire::Error;
use tensorwire::transports::launch::{Host, Outcome, RemoteShell, Stream, Transport, parse_hostfile};

use crate::failure::{Failure, ranks};
use crate::job::Job;

/// The hidden subcommand that is started on each host of a host file.
pub(crate) const AGENT_COMMAND: &str = "__agent";

/// The remote shell, unless another is named: it asks for nothing, and notices within 30 s that the other end is gone.
const SSH: &str = "ssh -T -x -o BatchMode=yes -o ServerAliveInterval=10";

/// Bytes of a host file at most.
const MAX_HOSTFILE: u64 = 1 << 20;

const EXAMPLES: &str = "\
Each rank finds its place in TENSORWIRE_RANK, TENSORWIRE_WORLD, TENSORWIRE_LOCAL_RANK, TENSORWIRE_LOCAL_WORLD and
TENSORWIRE_STORE, and what carries the bytes in TENSORWIRE_TRANSPORT and, a secret of this job, TENSORWIRE_SECRET;
over tls and quic, its own certificate for this job is in TENSORWIRE_TLS_CERT, unless that is set already; its output is
printed line by line behind `[rank N]`. Where a host has as many processors as ranks, each rank may use its share of them
alone, unless TENSORWIRE_BIND=none. SIGINT, SIGTERM and SIGHUP are passed on; a second SIGINT kills. When a rank fails,
the others are ended within a second, and the exit status is that rank's (128 and the signal's number, if a signal killed
it).

A host file has one host a line, `HOST slots=N`, and `#` before comments. Its ranks run over tcp, tls or quic, in this working
directory and with this environment, which must be there on every host, as must this program.

Examples:
  tensorwire launch --ranks 4 -- ./my-program --fast
  tensorwire launch --hostfile hosts --ranks 16 -- ./my-program
  tensorwire launch --ranks 2 -- sh -c 'echo rank $TENSORWIRE_RANK of $TENSORWIRE_WORLD'";

/// Start ranks of a program and watch over them
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// How many ranks to start
    #[arg(long, short = 'n', value_name = "N", value_parser = ranks)]
    ranks: usize,

    /// What carries the bytes between the ranks: shm, tcp, tls, quic or auto, or, of ranks that mpirun starts, mpi [default: what TENSORWIRE_TRANSPORT says, or shm]
    #[arg(long, value_parser = str::parse::<Transport>)]
    transport: Option<Transport>,

    /// The hosts to start the ranks on, the slots of the first one first
    #[arg(long, value_name = "FILE")]
    hostfile: Option<PathBuf>,

    /// The remote shell, a command to which the host and what to run there are added
    #[arg(long, value_name = "COMMAND", default_value = SSH, requires = "hostfile")]
    ssh: String,

    /// Where this program is on the other hosts [default: where it is on this one]
    #[arg(long, value_name = "PATH", requires = "hostfile")]
    agent: Option<PathBuf>,

    /// Where the ranks meet: tcp:HOST:PORT, which rank 0 then serves, or file:DIR [default: this program serves it, at an
    /// address that leads to the other hosts]
    #[arg(long, value_name = "PLACE", requires = "hostfile")]
    store: Option<String>,

    /// The program and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let Some((program, rest)) = args.command.split_first() else {
        return Err(Failure::usage("launch: no command given after --"));
    };
    let launcher = match &args.hostfile {
        None => {
            let transport = args.transport.map_or_else(Transport::from_env, Ok).map_err(Failure::usage)?;
            let job = Job::new(args.ranks, transport)?;
            (job.launcher(program), job)
        }
        Some(file) => {
            let hosts = hosts(file)?;
            if args.transport == Some(Transport::Shm) {
                return Err(Failure::usage("--transport shm is for ranks on one host: leave --hostfile out"));
            }
            let over = match args.transport.map_or_else(Transport::from_env, Ok).map_err(Failure::usage)? {
                Transport::Shm => Transport::Tcp,
                over => over,
            };
            let job = Job::on_hosts(args.ranks, &hosts, over, args.store.as_deref())?;
            (job.launcher(program).on_hosts(hosts, args.remote_shell()?), job)
        }
    };
    let (launcher, _job) = launcher;
    let outcome = launcher.args(rest).forward_signals().run().map_err(|e| match &e {
        Error::Os { source, .. } if matches!(source.kind(), NotFound | PermissionDenied) => Failure::usage(e),
        Error::Config(_) => Failure::usage(e),
        _ => Failure::run(e),
    })?;
    match describe(&outcome, args.ranks) {
        Some(why) => Err(Failure::with_status(outcome.exit_code(), why)),
        None if outcome.output_closed => Err(Failure::output_closed()),
        None => Ok(()),
    }
}

/// The hosts in a host file.
fn hosts(file: &Path) -> Result<Vec<Host>, Failure> {
    let at = |what: &dyn std::fmt::Display| Failure::usage(format!("{}: {what}", file.display()));
    let mut text = String::new();
    let read = std::fs::File::open(file).and_then(|f| f.take(MAX_HOSTFILE + 1).read_to_string(&mut text));
    if read.map_err(|e| at(&e))? as u64 > MAX_HOSTFILE {
        return Err(at(&"too long for a host file"));
    }
    parse_hostfile(&text).map_err(|e| at(&e))
}

impl Args {
    fn remote_shell(&self) -> Result<RemoteShell, Failure> {
        let shell: Vec<OsString> = self.ssh.split_whitespace().map(OsString::from).collect();
        if shell.is_empty() {
            return Err(Failure::usage("--ssh names no command"));
        }
        let here = std::env::current_exe().map_err(|e| Failure::run(format!("finding this program: {e}")))?;
        let there = self.agent.as_ref().unwrap_or(&here);
        let command = |program: &PathBuf| vec![program.into(), AGENT_COMMAND.into()];
        Ok(RemoteShell { shell, agent: command(there), local_agent: command(&here) })
    }
}

/// One host's agent: started by `launch`, not by hand.
pub(crate) fn agent_main() -> Result<(), Failure> {
    tensorwire::transports::launch::agent().map_err(Failure::run)
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
    if transport == Transport::Mpi {
        return crate::mpi::run_ranks(command, args, ranks, take);
    }
    let job = Job::new(ranks, transport)?;
    let program = std::env::current_exe().map_err(|e| Failure::run(format!("finding this program: {e}")))?;
    // Ranks that compute share the processors out.
    let threads = std::thread::available_parallelism().map_or(1, usize::from) / ranks;
    let mut broken = None;
    let outcome = job
        .launcher(program)
        .arg(command)
        .args(args)
        .env("RAYON_NUM_THREADS", threads.max(1).to_string())
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
    if failure.host.is_none() && failure.status.signal() == Some(Signal::KILL.as_raw()) {
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
