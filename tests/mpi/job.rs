//! A job that mpirun starts, and how it ends.

use std::fmt;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// In a rank's environment: what it is to do.
pub(crate) const CASE: &str = "TENSORWIRE_TEST_CASE";

/// Far more than any job takes: what hangs is ended.
const PATIENCE: Duration = Duration::from_secs(120);

/// Fails, saying what to do, unless there is an mpirun.
pub(crate) fn check_mpirun() -> Result<(), String> {
    let found = Command::new("mpirun").arg("--version").stdout(Stdio::null()).status();
    found.map(drop).map_err(|e| format!("mpirun: {e}: install it (apt-get install openmpi-bin)"))
}

pub(crate) struct Job {
    command: Command,
    /// What comes before the program.
    options: Vec<String>,
    within: bool,
    world: usize,
}

impl Job {
    pub(crate) fn new(case: &str, world: usize) -> Job {
        let mut command = Command::new("mpirun");
        // As variables, so that they are options of Open MPI's alone; the last one has ranks wait in turn on few processors.
        command
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMPI_MCA_rmaps_base_oversubscribe", "1");
        Job { command, options: Vec::new(), within: true, world }.case(case)
    }

    /// One process, which no mpirun has started.
    pub(crate) fn alone(case: &str) -> Job {
        let command = Command::new(std::env::current_exe().unwrap());
        Job { command, options: Vec::new(), within: false, world: 1 }.case(case)
    }

    fn case(self, case: &str) -> Job {
        self.env(CASE, case).env("TENSORWIRE_TRANSPORT", "mpi")
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Job {
        self.command.env(name, value);
        self
    }

    pub(crate) fn option(mut self, option: &str) -> Job {
        self.options.push(option.to_owned());
        self
    }

    pub(crate) fn run(mut self) -> Done {
        if self.within {
            self.command.args(&self.options).args(["-n", &self.world.to_string()]);
            self.command.arg(std::env::current_exe().unwrap());
        }
        let begun = Instant::now();
        let piped = self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().unwrap();
        let out = collect(child.stdout.take().unwrap());
        let err = collect(child.stderr.take().unwrap());
        let status = wait(&mut child);
        let took = begun.elapsed();
        let [stdout, stderr] = [out, err].map(|text| text.join().unwrap());
        Done { status, stdout, stderr, took }
    }
}

fn collect(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// `None` if it had to be ended.
fn wait(child: &mut Child) -> Option<ExitStatus> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if begun.elapsed() > PATIENCE {
            // mpirun ends its ranks when it is asked to end.
            let pid = rustix::process::Pid::from_child(child);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            std::thread::sleep(Duration::from_secs(5));
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) struct Done {
    pub(crate) status: Option<ExitStatus>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Done {
    pub(crate) fn success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// The lines that a rank has printed behind its number.
    pub(crate) fn said_by(&self, rank: usize) -> String {
        let prefix = format!("[{rank}] ");
        self.stdout.lines().filter_map(|line| line.strip_prefix(&prefix)).collect()
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "after {:?}: {:?}", self.took, self.status)?;
        write!(f, "standard output:\n{}standard error:\n{}", self.stdout, self.stderr)
    }
}
