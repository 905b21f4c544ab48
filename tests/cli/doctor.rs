//! `tensorwire doctor` as a person uses it: on jobs that hang, are stopped, or make no sense.

mod support;

use std::process::{Child, Command, Stdio};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use support::*;
use tensorwire::{Communicator, ReduceOp};

const BODY: &str = "TENSORWIRE_TEST_BODY";

/// A rank, in a process that a test started: rank 1 stops itself after its 17th all-reduce.
#[test]
fn rank_process() {
    if std::env::var_os(BODY).is_none() {
        return;
    }
    let comm = Communicator::from_env().unwrap();
    let mut x = [1f32; 1000];
    for i in 0..20 {
        if i == 17 && comm.rank() == 1 {
            // To this thread: it must not go on until another one gets the signal.
            // SAFETY: a system call.
            assert_eq!(unsafe { libc::raise(libc::SIGSTOP) }, 0);
        }
        comm.all_reduce(&mut x, ReduceOp::Max).unwrap();
    }
    let half = comm.split((comm.rank() < 2).then_some(0), 0).unwrap();
    if let Some(half) = half {
        half.barrier().unwrap();
    }
}

/// A job of three such ranks; what is left of it ends with this.
struct Job(Child);

impl Job {
    fn start() -> Job {
        let exe = std::env::current_exe().unwrap();
        let args = ["launch", "--ranks", "3", "--", exe.to_str().unwrap()];
        let rank = ["--exact", "rank_process", "--nocapture", "--test-threads=1"];
        Job(tensorwire(args.iter().chain(&rank)).env(BODY, "1").spawn().unwrap())
    }

    fn doctor(&self) -> Value {
        serde_json::from_str(&stdout(&run(["doctor", "--json", &self.pid()]))).unwrap_or_default()
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // The launcher ends its ranks, also stopped ones.
        let _ = kill_process(rustix::process::Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

#[test]
fn says_who_is_behind_and_who_waits_in_a_job_that_hangs() {
    let mut job = Job::start();
    let mut seen = Value::Null;
    eventually("the job comes to hang", || {
        seen = job.doctor().pointer("/jobs/0/groups/0").cloned().unwrap_or_default();
        let ranks = &seen["ranks"];
        ranks[1]["state"] == "stopped" && ranks[0]["waits_for"] == 1 && ranks[2]["waits_for"] == 1
    });
    let said = seen["difference"].as_str().unwrap();
    assert!(said.starts_with("rank 1 is stopped; rank 1 is 1 call behind, done with all_reduce("), "{said}");
    assert!(said.contains("(call 17) since"), "{said}");
    assert!(said.contains("; ranks 0, 2 are in all_reduce(1000 x f32, max) (call 18) since"), "{said}");
    assert!(said.ends_with("; ranks 0, 2 wait for rank 1"), "{said}");
    for (rank, calls) in [(0, 18), (1, 17), (2, 18)] {
        let record = &seen["ranks"][rank];
        assert_eq!(record["calls"].as_array().unwrap().len(), calls, "{record}");
        assert_eq!(record["calls"][16]["what"], "all_reduce(1000 x f32, max)");
        assert_eq!(record["calls"][16]["algorithm"], "one_shot");
        assert!(record["calls"][16]["took"].as_f64().unwrap() > 0.0);
    }

    // By a rank's own number, and for a person.
    let stopped = seen["ranks"][1]["pid"].to_string();
    let output = run(["doctor", &stopped]);
    let text = stdout(&output);
    assert!(output.status.success() && text.contains("group 1 of 1, 3 ranks"), "{text}");
    assert!(text.contains("in it, waits for rank 1") && text.contains(said.split(" since").next().unwrap()));
    assert!(stdout(&run(["doctor"])).contains(&format!("{stopped},")));

    // Looking does no harm.
    send(stopped.parse().unwrap(), Signal::CONT);
    assert!(job.0.wait().unwrap().success());
}

#[test]
fn what_is_no_job_is_said() {
    let line = refused(&run(["doctor", "4194305"]), 2);
    assert!(line.contains("there is no process 4194305"), "{line}");
    assert!(refused(&run(["doctor", "soon"]), 2).contains("soon"));
    let mut other = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let line = refused(&run(["doctor", &other.id().to_string()]), 2);
    assert!(line.contains(&format!("process {} has no shared memory", other.id())), "{line}");
    drop(other.stdin.take());
    other.wait().unwrap();
}

#[test]
fn memory_that_pretends_is_named_and_harms_nobody() {
    let file = memfd_create("tensorwire", MemfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&file, &[0xff; 10_000]).unwrap();
    let output = run(["doctor", &std::process::id().to_string()]);
    let text = stdout(&output);
    assert!(output.status.success() && text.contains("can't be read: "), "{text}");
}
