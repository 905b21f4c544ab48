//! Ranks as processes: this test binary, started again.
//!
//! The test `processes::rank_process` calls [`run_rank`], which does nothing unless a test started it.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tensorwire::transports::store::StoreServer;

const BODY: &str = "TENSORWIRE_TEST_BODY";

/// In a rank's process: runs the body that the test asked for, and ends.
pub(crate) fn run_rank(bodies: &[(&str, fn())]) {
    let Ok(name) = std::env::var(BODY) else { return };
    let (_, body) = bodies.iter().find(|(n, _)| *n == name).expect("a body of that name");
    body();
    std::process::exit(0);
}

/// Processes of one job; what is left of them ends with it.
pub(crate) struct Job {
    ranks: Vec<Child>,
    _store: StoreServer,
}

impl Job {
    /// Starts `body` in `world` processes that find each other through a store.
    pub(crate) fn start(body: &str, world: usize, env: &[(&str, &str)]) -> Job {
        let store = StoreServer::start().unwrap();
        let address = store.address();
        let start = |rank: usize| {
            let (rank, world) = (rank.to_string(), world.to_string());
            let place = [
                ("TENSORWIRE_RANK", rank.as_str()),
                ("TENSORWIRE_WORLD", &world),
                ("TENSORWIRE_STORE", &address),
            ];
            spawn(None, body, place.iter().chain(env).copied())
        };
        Job { ranks: (0..world).map(start).collect(), _store: store }
    }

    /// Starts `body` in one process for each set of variables.
    pub(crate) fn start_with(body: &str, envs: &[Vec<(&str, &str)>]) -> Job {
        let ranks = envs.iter().map(|env| spawn(None, body, env.iter().copied())).collect();
        Job { ranks, _store: StoreServer::start().unwrap() }
    }

    /// As [`start_with`](Job::start_with), each process in the network namespace given.
    #[cfg(feature = "tcp")]
    pub(crate) fn start_within(body: &str, places: &[(String, Vec<(&str, &str)>)]) -> Job {
        let ranks = places.iter().map(|(net, env)| spawn(Some(net), body, env.iter().copied())).collect();
        Job { ranks, _store: StoreServer::start().unwrap() }
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

fn spawn<'a>(within: Option<&str>, body: &'a str, env: impl Iterator<Item = (&'a str, &'a str)>) -> Child {
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
    // The test harness writes around the body's output; nobody looks at that.
    command.args(args).env(BODY, body).envs(env).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
}
