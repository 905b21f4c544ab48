//! The ranks of a job on this host: how to start them, and how their run ended.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::thread::sched_setaffinity;
use tensorwire_core::{Error, JOB_PROCESSORS_VAR, Result};

use super::agent::is_of_a_host;
use super::guard::{Guard, announce};
use super::hostfile::{Host, place};
use super::hosts::{RemoteShell, supervise_hosts};
use super::supervise::supervise;
use super::wire::Job;
use crate::processors::{Processors, shares};

/// The exit status of a rank that ends because *another* rank is gone. When both are seen to have ended at
/// the same moment, the other one is named as the first that failed.
pub const LOST_PEER_STATUS: i32 = 75;

/// Which of a rank's output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A line that a rank has written.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// The rank.
    pub rank: usize,
    /// Where it wrote it.
    pub stream: Stream,
    /// The bytes without the newline, valid UTF-8 or not. A line of more than 64 KiB comes in pieces.
    pub bytes: &'a [u8],
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// How each rank ended, in rank order. Ranks that the launcher ended after a failure show the signal
    /// it sent them.
    pub statuses: Vec<ExitStatus>,
    /// The rank that failed first, if one did.
    pub failure: Option<Failure>,
    /// The signal that the launcher was sent, and passed on to the ranks, if it was.
    pub forwarded: Option<i32>,
    /// Whether the run was given up because nobody reads our standard output any more.
    pub output_closed: bool,
}

impl Outcome {
    /// What the launcher's own process should exit with: 0 if all ranks succeeded; the status of the rank that
    /// failed first, or 128 and its signal; 141, as for `SIGPIPE`, if our reader went away.
    pub fn exit_code(&self) -> i32 {
        match &self.failure {
            _ if self.output_closed => 128 + libc::SIGPIPE,
            Some(failure) => exit_code(failure.status),
            None => 0,
        }
    }
}

/// The first rank that failed.
///
/// ```text
/// rank 1 exited with status 3: cannot open model.safetensors
/// rank 0 was killed by signal 9 (SIGKILL)
/// ```
#[derive(Debug)]
pub struct Failure {
    /// The rank.
    pub rank: usize,
    /// How it ended; where its host was lost, how the remote shell did.
    pub status: ExitStatus,
    /// The host that was lost with it, if it was.
    pub host: Option<String>,
    /// The last lines that it wrote to standard error, blank ones left out: at most 8, each cut to 1 KiB.
    pub stderr: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(host) = &self.host {
            let status = exit_code(self.status);
            write!(
                f,
                "rank {} was lost with host {host}: its remote shell ended with status {status}",
                self.rank
            )?;
            return self.stderr.last().map_or(Ok(()), |line| write!(f, ": {line}"));
        }
        match self.status.signal() {
            // `signal: 9 (SIGKILL)`, which the standard library knows the name of.
            Some(_) => {
                let status = self.status.to_string();
                write!(f, "rank {} was killed by {}", self.rank, status.replacen("signal: ", "signal ", 1))?;
            }
            None => write!(f, "rank {} exited with status {}", self.rank, exit_code(self.status))?,
        }
        // Rust ends a panic's message with a note on how to see more of it.
        match self.stderr.iter().rev().find(|line| !line.starts_with("note: ")) {
            Some(line) => write!(f, ": {line}"),
            None => Ok(()),
        }
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(1)
}

/// The environment variable that says whether a launcher binds its ranks to processors: `auto`, as it does without, or
/// `none`.
pub const BIND_VAR: &str = "TENSORWIRE_BIND";

type OnLine<'a> = Box<dyn FnMut(Line<'_>) -> ControlFlow<()> + 'a>;

/// Starts the ranks of a job on this host or [on several](Launcher::on_hosts), and watches over them until all have
/// ended.
///
/// Every rank finds its place in `TENSORWIRE_RANK`, `TENSORWIRE_WORLD`, `TENSORWIRE_LOCAL_RANK`,
/// `TENSORWIRE_LOCAL_WORLD` and `TENSORWIRE_STORE`, reads nothing on standard input, and leads a process group of its own.
///
/// Each rank may use its share of the processors that the launcher may use on that host: neighbours, as many for each as
/// there are, so that no two ranks meet on one. Where there are fewer than ranks, or `TENSORWIRE_BIND=none` is set, here
/// or by [`env`](Launcher::env), they may use all of them.
///
/// * When a rank ends unsuccessfully, the others are sent `SIGTERM` and, 300 ms later, their process groups
///   are killed.
/// * Processes that a rank has left behind in its group may write for another 300 ms after it has ended, then
///   they are killed. Only a process that has left the group (a daemon) can stay.
/// * If the launcher itself is killed, even with `SIGKILL`, the ranks and their groups are killed too.
///
/// ```no_run
/// use tensorwire_transports::launch::Launcher;
///
/// let outcome = Launcher::new("./my-program", 4, "unix:my-job").arg("--fast").run()?;
/// if let Some(failure) = &outcome.failure {
///     eprintln!("{failure}");
/// }
/// std::process::exit(outcome.exit_code());
/// # #[allow(unreachable_code)] Ok::<(), tensorwire_core::Error>(())
/// ```
pub struct Launcher<'a> {
    program: OsString,
    args: Vec<OsString>,
    ranks: usize,
    /// The number that the first of them has in the job, and how many the job has on all hosts.
    pub(super) first: usize,
    pub(super) world: usize,
    store: OsString,
    env: Vec<(OsString, OsString)>,
    rank_env: Vec<(usize, OsString, OsString)>,
    hosts: Option<(Vec<Host>, RemoteShell)>,
    inherited: Vec<(usize, OwnedFd)>,
    forward_signals: bool,
    on_line: Option<OnLine<'a>>,
}

impl<'a> Launcher<'a> {
    /// A launcher of `ranks` processes that run `program`. `store` is where they meet, as `TENSORWIRE_STORE`
    /// will tell them: `unix:NAME` or `file:DIR`.
    pub fn new(program: impl AsRef<OsStr>, ranks: usize, store: impl AsRef<OsStr>) -> Launcher<'a> {
        Launcher {
            program: program.as_ref().into(),
            args: Vec::new(),
            ranks,
            first: 0,
            world: ranks,
            store: store.as_ref().into(),
            env: Vec::new(),
            rank_env: Vec::new(),
            hosts: None,
            inherited: Vec::new(),
            forward_signals: false,
            on_line: None,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().into());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().into()));
        self
    }

    /// Sets an environment variable for every rank.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().into(), value.as_ref().into()));
        self
    }

    /// Sets an environment variable for one rank.
    pub fn rank_env(mut self, rank: usize, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.rank_env.push((rank, name.as_ref().into(), value.as_ref().into()));
        self
    }

    /// Hands an open descriptor to one rank, which finds its number in the environment variable `name`.
    pub fn inherit(self, rank: usize, name: impl AsRef<OsStr>, fd: impl Into<OwnedFd>) -> Self {
        let fd = fd.into();
        let mut this = self.rank_env(rank, name, fd.as_raw_fd().to_string());
        this.inherited.push((rank, fd));
        this
    }

    /// Starts the ranks on `hosts`, whose slots are filled in their order: over `shell`, or, on this host, without it.
    ///
    /// They run in this process's working directory and with its environment, but for what belongs to a host or a
    /// login ([`is_of_a_host`]). All of that, and what [`env`](Launcher::env) sets, travels over the remote shell's
    /// standard input, never among its arguments, which everybody can read. On each host an [agent](super::agent)
    /// watches over its ranks as this launcher does here. When the connection to it ends, or says nothing for 60 s,
    /// the agent ends its ranks, and this launcher the others.
    pub fn on_hosts(mut self, hosts: Vec<Host>, shell: RemoteShell) -> Self {
        self.hosts = Some((hosts, shell));
        self
    }

    /// Catches `SIGINT`, `SIGTERM` and `SIGHUP` during the run, and passes them on to the ranks' process groups.
    /// A second `SIGINT` kills them; so do 5 seconds after the first rank has ended. For the one launcher of a
    /// process that is its main job: the signals' handlers belong to the whole process.
    pub fn forward_signals(mut self) -> Self {
        self.forward_signals = true;
        self
    }

    /// Hands each line that a rank writes to `on_line`, on the thread that runs the launcher, instead of
    /// printing it. Where `on_line` breaks, the ranks are ended.
    ///
    /// Without this, lines are printed to our standard output and error, each behind `[rank N] `.
    pub fn on_line(mut self, on_line: impl FnMut(Line<'_>) -> ControlFlow<()> + 'a) -> Self {
        self.on_line = Some(Box::new(on_line));
        self
    }

    /// Starts the ranks and stays until all have ended. The calling thread is the ranks' parent for the kernel:
    /// they are killed when it ends, so it must not be one that something else may stop.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no ranks or a variable is for a rank that isn't there,
    /// [`Error::Os`] if a rank can't be started. Ranks that fail are no error: see [`Outcome`].
    pub fn run(mut self) -> Result<Outcome> {
        if self.ranks == 0 {
            return Err(Error::invalid("0 ranks: there must be at least one"));
        }
        if let Some((rank, name, _)) = self.rank_env.iter().find(|(rank, ..)| *rank >= self.ranks) {
            let (name, ranks) = (name.to_string_lossy(), self.ranks);
            return Err(Error::invalid(format!("{name} is for rank {rank}, but there are {ranks} ranks")));
        }
        let on_line = self.on_line.take();
        let Some((hosts, shell)) = self.hosts.take() else {
            return supervise(&self, self.ranks, self.forward_signals, on_line, None);
        };
        if !self.inherited.is_empty() {
            return Err(Error::invalid("an open descriptor can't be handed to a rank on another host"));
        }
        supervise_hosts(&place(&hosts, self.ranks)?, &shell, &self.job()?, self.forward_signals, on_line)
    }

    /// What hosts are told, but for which ranks are theirs.
    fn job(&self) -> Result<Job> {
        let directory = std::env::current_dir().map_err(|e| Error::os("finding the working directory", e))?;
        let own = std::env::vars_os().filter(|(name, _)| !is_of_a_host(name));
        Ok(Job {
            first: 0,
            ranks: self.ranks as u32,
            world: self.ranks as u32,
            directory: directory.into(),
            store: self.store.clone(),
            command: [&self.program].into_iter().chain(&self.args).cloned().collect(),
            env: own.chain(self.env.iter().cloned()).collect(),
            rank_env: self.rank_env.iter().map(|(r, n, v)| (*r as u32, n.clone(), v.clone())).collect(),
        })
    }

    /// The launcher of a host's part of a job.
    pub(super) fn of_job(job: &Job) -> Launcher<'static> {
        let mut launcher = Launcher::new(&job.command[0], job.ranks as usize, &job.store);
        (launcher.first, launcher.world) = (job.first as usize, job.world as usize);
        launcher.args = job.command[1..].to_vec();
        launcher.env = job.env.clone();
        let own = job.rank_env.iter().filter(|(rank, ..)| (job.first..job.first + job.ranks).contains(rank));
        launcher.rank_env = own.map(|(r, n, v)| ((*r - job.first) as usize, n.clone(), v.clone())).collect();
        launcher
    }

    /// Which processors each rank may use; `None` where it may use all.
    pub(super) fn binding(&self) -> Result<Option<Vec<Processors>>> {
        let given = self.env.iter().rfind(|(name, _)| name == BIND_VAR).map(|(_, value)| value.clone());
        match given.or_else(|| std::env::var_os(BIND_VAR)).unwrap_or_default().to_str() {
            Some("" | "auto") => Ok(shares(&Processors::allowed(), self.ranks)),
            Some("none") => Ok(None),
            other => {
                let other = other.unwrap_or("no text");
                Err(Error::Config(format!("{BIND_VAR} is '{other}': use auto or none")))
            }
        }
    }

    /// Starts one rank under the guard, on the processors that it may use.
    pub(super) fn spawn(&self, rank: usize, guard: &Guard, on: Option<&Processors>) -> Result<Child> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("TENSORWIRE_RANK", (self.first + rank).to_string())
            .env("TENSORWIRE_WORLD", self.world.to_string())
            .env("TENSORWIRE_LOCAL_RANK", rank.to_string())
            .env("TENSORWIRE_LOCAL_WORLD", self.ranks.to_string())
            .env("TENSORWIRE_STORE", &self.store)
            .stdin(Stdio::null());
        if on.is_some() {
            command.env(JOB_PROCESSORS_VAR, Processors::allowed().to_string());
        }
        for (of, name, value) in &self.rank_env {
            if *of == rank {
                command.env(name, value);
            }
        }
        let handed: Vec<_> =
            self.inherited.iter().filter(|(of, _)| *of == rank).map(|(_, fd)| fd.as_raw_fd()).collect();
        spawn_watched(&mut command, guard, handed, on).map_err(|e| {
            let rank = self.first + rank;
            Error::os(format!("cannot start rank {rank}, '{}'", self.program.to_string_lossy()), e)
        })
    }
}

/// Starts a process in a group of its own, with pipes for its output, that ends with this thread or the guard; `handed`
/// are the descriptors that it inherits, and `on` the processors that it may use, if not all.
pub(super) fn spawn_watched(
    command: &mut Command,
    guard: &Guard,
    handed: Vec<RawFd>,
    on: Option<&Processors>,
) -> io::Result<Child> {
    let (control, launcher) = (guard.control(), std::process::id());
    let mask = on.map(Processors::mask);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    // SAFETY: runs in the child between fork and exec, where only async-signal-safe calls are allowed:
    // prctl, getppid, sched_setaffinity, write and fcntl are, and nothing here allocates.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // A launcher that died before that call won't be noticed by the kernel any more.
            if libc::getppid() as u32 != launcher {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            if let Some(mask) = &mask {
                sched_setaffinity(None, mask)?;
            }
            announce(control)?;
            for &fd in &handed {
                if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command.spawn()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
