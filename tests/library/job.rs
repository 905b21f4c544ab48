//! Ranks as processes: this test binary, started again.
//!
//! The test `processes::rank_process` calls [`run_rank`], which does nothing unless a test started it. The processes of
//! a job begin together, once all of them run, so that how long a machine takes to start them counts for no timeout.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tensorwire::Deadline;
use tensorwire::transports::store::{Store, StoreServer, UnixStore};

const BODY: &str = "TENSORWIRE_TEST_BODY";
/// Where a job's processes meet each other and the test, apart from what they test.
const MEETING: &str = "TENSORWIRE_TEST_MEETING";
const PROCESSES: &str = "TENSORWIRE_TEST_PROCESSES";

/// Far more than it takes to start processes, on any machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// In a rank's process: the place where the processes and the test meet.
fn meeting(address: &str) -> UnixStore {
    UnixStore::connect(address, Deadline::after(PATIENCE)).unwrap()
}

/// In a rank's process: says that it has come to `point`, for [`await_point`] in another.
pub(crate) fn reach(point: &str) {
    meeting(&std::env::var(MEETING).unwrap()).set(point, b"", Deadline::after(PATIENCE)).unwrap();
}

/// In a rank's process: waits until another rank, or the test, has come to `point`.
pub(crate) fn await_point(point: &str) {
    meeting(&std::env::var(MEETING).unwrap()).get(point, Deadline::after(PATIENCE)).unwrap();
}

/// Waits until all processes of the job are here.
fn begin_together() {
    let (Ok(address), Ok(processes)) = (std::env::var(MEETING), std::env::var(PROCESSES)) else { return };
    let (store, deadline) = (meeting(&address), Deadline::after(PATIENCE));
    if store.add("here", 1, deadline).unwrap().to_string() == processes {
        store.set("all are here", b"", deadline).unwrap();
    }
    store.get("all are here", deadline).unwrap();
}

/// In a rank's process: runs the body that the test asked for, and ends.
pub(crate) fn run_rank(bodies: &[(&str, fn())]) {
    let Ok(name) = std::env::var(BODY) else { return };
    let (_, body) = bodies.iter().find(|(n, _)| *n == name).expect("a body of that name");
    begin_together();
    body();
    std::process::exit(0);
}

/// Processes of one job; what is left of them ends with it.
pub(crate) struct Job {
    ranks: Vec<Child>,
    store: StoreServer,
}

impl Job {
    /// Starts `body` in `world` processes that find each other through a store.
    pub(crate) fn start(body: &str, world: usize, env: &[(&str, &str)]) -> Job {
        Job::start_each(body, world, |_| env.to_vec())
    }

    /// As [`start`](Job::start), rank `r` with the variables `env(r)`.
    pub(crate) fn start_each<'a>(
        body: &str,
        world: usize,
        env: impl Fn(usize) -> Vec<(&'a str, &'a str)>,
    ) -> Job {
        let store = StoreServer::start().unwrap();
        let address = store.address();
        let start = |rank: usize| {
            let (own, all) = (rank.to_string(), world.to_string());
            let place =
                [("TENSORWIRE_RANK", &*own), ("TENSORWIRE_WORLD", &all), ("TENSORWIRE_STORE", &address)];
            spawn(None, body, &[&place[..], &env(rank)].concat(), Some((&address, world)))
        };
        Job { ranks: (0..world).map(start).collect(), store }
    }

    /// Starts `body` in one process for each set of variables.
    pub(crate) fn start_with(body: &str, envs: &[Vec<(&str, &str)>]) -> Job {
        let store = StoreServer::start().unwrap();
        let address = store.address();
        let ranks = envs.iter().map(|env| spawn(None, body, env, Some((&address, envs.len())))).collect();
        Job { ranks, store }
    }

    /// As [`start_with`](Job::start_with), each process in the network namespace given, where no meeting place is to be
    /// reached: each begins at once.
    #[cfg(feature = "tcp")]
    pub(crate) fn start_within(body: &str, places: &[(String, Vec<(&str, &str)>)]) -> Job {
        let ranks = places.iter().map(|(net, env)| spawn(Some(net), body, env, None)).collect();
        Job { ranks, store: StoreServer::start().unwrap() }
    }

    /// Says to the ranks that wait for it that the test has come to `point`.
    pub(crate) fn reach(&self, point: &str) {
        meeting(&self.store.address()).set(point, b"", Deadline::after(PATIENCE)).unwrap();
    }

    /// Waits until a signal has stopped every thread of `rank`.
    pub(crate) fn await_stop(&self, rank: usize) {
        let start = Instant::now();
        let task = format!("/proc/{}/task", self.ranks[rank].id());
        let stopped = |thread: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
        };
        while !std::fs::read_dir(&task).unwrap().flatten().all(stopped) {
            assert!(start.elapsed() < PATIENCE, "rank {rank} isn't stopped");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn signal(&self, rank: usize, signal: Signal) {
        kill_process(Pid::from_child(&self.ranks[rank]), signal).unwrap();
    }

    #[cfg(feature = "tcp")]
    pub(crate) fn pid(&self, rank: usize) -> u32 {
        self.ranks[rank].id()
    }

    /// Waits until `rank` has written `text` to its standard output: all it has written until then.
    pub(crate) fn wait_for(&mut self, rank: usize, text: &str) -> String {
        let mut seen = Vec::new();
        let out = self.ranks[rank].stdout.as_mut().unwrap();
        while !String::from_utf8_lossy(&seen).contains(text) {
            let mut byte = [0];
            assert_eq!(out.read(&mut byte).unwrap(), 1, "rank {rank} ended without writing '{text}'");
            seen.push(byte[0]);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Waits for `rank` to end: its status and what it wrote to standard output.
    pub(crate) fn join(&mut self, rank: usize) -> (ExitStatus, String) {
        let mut text = String::new();
        self.ranks[rank].stdout.take().unwrap().read_to_string(&mut text).unwrap();
        (self.ranks[rank].wait().unwrap(), text)
    }

    /// As [`join`](Job::join), and fails if it takes longer than `limit`: for what must not wait for a timeout.
    pub(crate) fn join_within(&mut self, rank: usize, limit: Duration) -> (ExitStatus, String) {
        let start = Instant::now();
        while self.ranks[rank].try_wait().unwrap().is_none() {
            assert!(start.elapsed() < limit, "rank {rank} is still running after {limit:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.join(rank)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}

/// What a launcher runs as a rank, with the body's name in its environment.
pub(crate) fn own_command() -> (std::path::PathBuf, [&'static str; 4]) {
    let args = ["--exact", "processes::rank_process", "--nocapture", "--test-threads=1"];
    (std::env::current_exe().unwrap(), args)
}

/// One process; `job` is where it meets how many others.
fn spawn(within: Option<&str>, body: &str, env: &[(&str, &str)], job: Option<(&str, usize)>) -> Child {
    let (this, args) = own_command();
    let mut command = match within {
        None => Command::new(this),
        Some(net) => {
            // It becomes the process that it starts.
            let mut ip = Command::new("ip");
            ip.args(["netns", "exec", net]).arg(this);
            ip
        }
    };
    if let Some((address, processes)) = job {
        command.env(MEETING, address).env(PROCESSES, processes.to_string());
    }
    // The test harness writes around the body's output; nobody looks at that.
    command
        .args(args)
        .env(BODY, body)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}
