//! Ranks over MPI: `mpirun` starts them.

use std::ffi::OsString;

use tensorwire::transports::launch::{Env, Transport};

use crate::failure::Failure;

/// What the ranks' environment says of their transport.
const TRANSPORT_VAR: &str = "TENSORWIRE_TRANSPORT";

/// This process's place among those that mpirun has started, if it has started this one.
pub(crate) fn place() -> Option<Env> {
    Env::read().ok().filter(|env| matches!(env.source, "Open MPI" | "PMI" | "Slurm"))
}

/// Sees to it, before anything else, that this program can use a transport, if it is MPI, and that as one of mpirun's ranks
/// it has that transport in its environment.
pub(crate) fn prepare(transport: Transport) -> Result<(), Failure> {
    if transport != Transport::Mpi {
        return Ok(());
    }
    if !cfg!(feature = "mpi") {
        return Err(Failure::usage(
            "this tensorwire was built without MPI: build it with `cargo build --release -p tensorwire-cli --features mpi`, \
             which needs an MPI and libclang (apt-get install libopenmpi-dev openmpi-bin libclang-14-dev)",
        ));
    }
    let said = std::env::var(TRANSPORT_VAR).is_ok_and(|said| said.trim() == transport.name());
    if place().is_none() || said {
        return Ok(());
    }
    use std::os::unix::process::CommandExt;
    let program = std::env::current_exe().map_err(|e| Failure::run(format!("finding this program: {e}")))?;
    let mut again = std::process::Command::new(program);
    let failed = again.args(std::env::args_os().skip(1)).env(TRANSPORT_VAR, transport.name()).exec();
    Err(Failure::run(format!("starting this program anew: {failed}")))
}

/// Why this program's own launcher doesn't start ranks over MPI.
pub(crate) fn not_ours() -> Failure {
    Failure::usage(
        "ranks over MPI are started by mpirun: `mpirun -n N COMMAND`, with TENSORWIRE_TRANSPORT=mpi, or for this program \
         `mpirun -n N tensorwire infer --transport mpi`; bench starts mpirun itself",
    )
}

/// Runs `command` of this program in `ranks` processes of mpirun's to their end, and gives what they print to `take`, line
/// by line.
#[cfg(feature = "mpi")]
pub(crate) fn run_ranks(
    command: &str,
    args: impl IntoIterator<Item = OsString>,
    ranks: usize,
    mut take: impl FnMut(&[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    use std::io::{BufRead, BufReader, ErrorKind};
    use std::process::{Command, Stdio};

    use rustix::process::{Pid, Signal, getuid, kill_process};

    let program = std::env::current_exe().map_err(|e| Failure::run(format!("finding this program: {e}")))?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut mpirun = Command::new("mpirun");
    mpirun.args(["-n", &ranks.to_string()]).arg(program).arg(command).args(args);
    mpirun.env(TRANSPORT_VAR, Transport::Mpi.name());
    mpirun.env("RAYON_NUM_THREADS", (processors / ranks).max(1).to_string());
    if getuid().is_root() {
        // Whoever runs this as root means it; mpirun asks twice.
        mpirun.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    }
    if ranks > processors {
        mpirun.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    }
    let mut mpirun =
        mpirun.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(|e| match e.kind() {
            ErrorKind::NotFound => Failure::usage(
                "mpirun isn't on the PATH: ranks over MPI are started by it (apt-get install openmpi-bin)",
            ),
            _ => Failure::run(format!("starting mpirun: {e}")),
        })?;
    let pid = Pid::from_child(&mpirun);
    let mut broken = None;
    if let Some(out) = mpirun.stdout.take() {
        for line in BufReader::new(out).split(b'\n') {
            let taken = line.map_err(|e| Failure::run(format!("reading what mpirun prints: {e}")));
            if let Err(failure) = taken.and_then(|line| take(&line)) {
                broken = Some(failure);
                let _ = kill_process(pid, Signal::TERM);
                break;
            }
        }
    }
    let status = mpirun.wait().map_err(|e| Failure::run(format!("waiting for mpirun: {e}")))?;
    match (broken, status.code()) {
        (Some(failure), _) => Err(failure),
        (None, Some(0)) => Ok(()),
        (None, Some(2)) => Err(Failure::usage("the ranks were asked for what can't be: see above")),
        (None, _) => Err(Failure::run(format!("mpirun ended with {status}"))),
    }
}

#[cfg(not(feature = "mpi"))]
pub(crate) fn run_ranks(
    _: &str,
    _: impl IntoIterator<Item = OsString>,
    _: usize,
    _: impl FnMut(&[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    prepare(Transport::Mpi)
}
