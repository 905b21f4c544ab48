//! What goes wrong with a rank, its device or its call: a named error on every rank, within the deadline, and no stream left
//! hanging. Ranks are processes; the test library is told what to do by `TENSORWIRE_FAKE_NCCL`.

use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};
use tensorwire::collectives::device::{Device, DeviceCommunicator, DeviceOptions, EngineChoice};
use tensorwire::{Communicator, Deadline, Error, ReduceOp};

use super::test_library;
use crate::job::Job;

/// Long enough for a busy machine, and far below the deadline of a call that isn't meant to reach it.
const SOON: Duration = Duration::from_secs(25);

/// The call at which things happen.
const AT: usize = 3;

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// In a rank's process: five all-reduces, each waited for; what comes of them is printed. `CASE` says what rank 1 does
/// instead of the third.
pub(crate) fn device() {
    let comm = Communicator::from_env().unwrap();
    let case = variable("CASE").unwrap_or_default();
    let seconds =
        |name: &str| Duration::from_secs_f64(variable(name).map_or(60.0, |text| text.parse().unwrap()));
    let engine = match variable("STAGED") {
        Some(_) => EngineChoice::Staged,
        None => EngineChoice::Nccl,
    };
    let options = DeviceOptions { engine, library: None, timeout: seconds("FORM_WITHIN") };
    let stream = Device::host().stream().unwrap();
    let group = match comm.on_device_with(&stream.device(), &options) {
        Ok(group) => group,
        Err(e) => return println!("not formed: {e}"),
    };
    let mut x = stream.upload(&vec![1f32; 1000]).unwrap();
    for call in 1..=5 {
        let started = Instant::now();
        let other = comm.rank() == 1 && call == AT;
        let launched = match case.as_str() {
            "dies" if other => return kill_process(getpid(), Signal::KILL).unwrap(),
            "leaves" if other => return,
            "elsewhere" if other => {
                std::thread::sleep(Duration::from_secs(4));
                return;
            }
            "mismatch" if other => {
                let (given, mut taken) = (stream.zeros::<f32>(999).unwrap(), stream.zeros(999).unwrap());
                group.all_to_all(&given, &mut taken)
            }
            _ => group.all_reduce(&mut x, ReduceOp::Sum),
        };
        if case == "presses stop" && comm.rank() == 0 && call == AT {
            group.abort("the user pressed stop");
        }
        if case == "looks" && call == AT {
            // Not by `wait`: nobody of this thread looks for what becomes of the others.
            x.to_vec().unwrap();
        }
        let done = launched.and_then(|()| group.wait(Deadline::after(seconds("WAIT"))));
        if let Err(error) = done {
            println!("{error}");
            println!("after {} ms", started.elapsed().as_millis());
            println!("then: {}", group.all_reduce(&mut x, ReduceOp::Sum).unwrap_err());
            // Streams go on: the memory can be read, whatever is in it.
            x.to_vec().unwrap();
            if case == "dies" {
                drop(group);
                goes_on(&comm, &options);
            }
            return;
        }
    }
    println!("done");
}

/// Those that are left form a group again.
fn goes_on(comm: &Communicator, options: &DeviceOptions) {
    let left = comm.shrink().unwrap();
    let stream = Device::host().stream().unwrap();
    let group: DeviceCommunicator = left.on_device_with(&stream.device(), options).unwrap();
    let mut x = stream.upload(&[1u32]).unwrap();
    group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
    group.synchronize().unwrap();
    println!("{} went on", x.to_vec().unwrap()[0]);
}

/// Three ranks of a case; what each printed.
fn run(env: &[(&str, &str)]) -> Vec<String> {
    let library = test_library(&[]);
    let library = [("TENSORWIRE_NCCL_LIB", library.to_str().unwrap())];
    let mut job = Job::start("device", 3, &[&library, env].concat());
    (0..3).map(|rank| job.join_within(rank, SOON).1).collect()
}

#[track_caller]
fn contains(said: &str, texts: &[&str]) {
    for text in texts {
        assert!(said.contains(text), "no '{text}' in: {said}");
    }
}

const CALL: &str = "all_reduce(1000 x f32, sum) (call 3)";

#[test]
fn without_faults_all_is_done() {
    for said in run(&[]) {
        contains(&said, &["done"]);
    }
}

#[test]
fn an_error_of_nccls_is_the_ranks_and_told_to_the_others() {
    let said = run(&[("TENSORWIRE_FAKE_NCCL", "async_error@1:3")]);
    contains(
        &said[1],
        &["rank 1: a test library in NCCL's place", "failed in", CALL, "unhandled system error"],
    );
    for rank in [0, 2] {
        contains(
            &said[rank],
            &[&format!("rank {rank}: rank 1 ended the group during {CALL}"), "unhandled system error"],
        );
        contains(&said[rank], &["then: ", "this communicator failed earlier"]);
    }
}

#[test]
fn a_call_that_is_refused_ends_the_group() {
    let said = run(&[("TENSORWIRE_FAKE_NCCL", "launch_error@2:3")]);
    contains(&said[2], &["rank 2: ", CALL, "invalid usage (told to refuse this call)"]);
    contains(&said[0], &["rank 0: rank 2 ended the group", CALL]);
    contains(&said[1], &["rank 1: rank 2 ended the group", CALL]);
}

#[test]
fn a_call_that_is_stuck_is_given_up_at_the_deadline() {
    let said = run(&[("TENSORWIRE_FAKE_NCCL", "stuck@1:3"), ("WAIT", "1")]);
    for said in &said {
        contains(said, &[CALL, "timed out after 1s", "after "]);
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_at_the_deadline() {
    let said = run(&[("CASE", "elsewhere"), ("WAIT", "1")]);
    for rank in [0, 2] {
        contains(
            &said[rank],
            &[
                CALL,
                "timed out after 1s waiting for rank(s) [1]",
                "rank 1 has launched call 2 and done call 2",
            ],
        );
    }
}

#[test]
fn a_rank_that_dies_is_named_soon_and_the_others_go_on() {
    for staged in [&[][..], &[("STAGED", "1")]] {
        let said = run(&[&[("CASE", "dies")], staged].concat());
        for rank in [0, 2] {
            contains(&said[rank], &[&format!("rank {rank}: lost rank 1 in {CALL}"), "2 went on"]);
        }
    }
}

#[test]
fn a_rank_that_leaves_is_named() {
    let said = run(&[("CASE", "leaves")]);
    for rank in [0, 2] {
        contains(&said[rank], &[&format!("rank {rank}: lost rank 1 in {CALL}: it has left the group")]);
    }
}

#[test]
fn a_rank_that_makes_another_call_is_told_so_with_all_others() {
    for said in run(&[("CASE", "mismatch")]) {
        contains(
            &said,
            &[
                "call 3 differs between ranks: rank 0 called all_reduce(1000 x f32, sum), rank 1 called all_to_all(999 x f32)",
            ],
        );
    }
}

#[test]
fn a_group_that_one_rank_gives_up_ends_everywhere() {
    for said in run(&[("CASE", "presses stop"), ("TENSORWIRE_FAKE_NCCL", "stuck@2:3")]) {
        contains(&said, &["rank 0 ended the group during", CALL, "the user pressed stop"]);
    }
}

#[test]
fn a_stream_that_nobody_waits_for_is_not_left_hanging() {
    let said = run(&[("CASE", "looks"), ("TENSORWIRE_FAKE_NCCL", "launch_error@1:3")]);
    for rank in [0, 2] {
        contains(&said[rank], &[&format!("rank {rank}: rank 1 ended the group"), CALL]);
    }
}

#[test]
fn a_group_that_does_not_form_says_so_in_time() {
    let said = run(&[("TENSORWIRE_FAKE_NCCL", "init_never@1:0"), ("FORM_WITHIN", "1")]);
    for said in &said {
        contains(said, &["not formed: ", "wasn't formed within 1s"]);
    }
}

/// Ranks with GPUs and ranks without share a job: each part is a group of its own.
#[test]
fn ranks_with_devices_and_ranks_without_share_a_job() {
    use super::By;
    crate::common::threads(4, &tensorwire::Options::default(), |comm| {
        let has_device = comm.rank() >= 2;
        let part = comm.split(Some(has_device.into()), 0).unwrap().unwrap();
        let sum = if has_device {
            let stream = Device::host().stream().unwrap();
            let group = part.on_device_with(&stream.device(), &By::Nccl.options(SOON)).unwrap();
            let mut x = stream.upload(&[comm.rank() as u64]).unwrap();
            group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
            group.synchronize().unwrap();
            x.to_vec().unwrap()[0]
        } else {
            let mut x = [comm.rank() as u64];
            part.all_reduce(&mut x, ReduceOp::Sum).unwrap();
            x[0]
        };
        let mut sums = [0u64; 4];
        comm.all_gather(&[sum], &mut sums).unwrap();
        assert_eq!(sums, [1, 1, 5, 5]);
    });
}

/// A rank whose library won't do has all go by way of the host, and all say which rank and why.
#[test]
fn one_rank_without_nccl_has_all_go_by_way_of_the_host() {
    use super::By;
    crate::common::threads(2, &tensorwire::Options::default(), |comm| {
        let options = DeviceOptions { engine: EngineChoice::Auto, ..By::Nccl.options(SOON) };
        let options = if comm.rank() == 1 { DeviceOptions { library: None, ..options } } else { options };
        let stream = Device::host().stream().unwrap();
        let group = comm.on_device_with(&stream.device(), &options).unwrap();
        let engine = group.engine().to_string();
        assert!(engine.starts_with("by way of the host, since on rank 1 "), "{engine}");
        let demanding = DeviceOptions { engine: EngineChoice::Nccl, ..options };
        let error = comm.on_device_with(&stream.device(), &demanding).unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    });
}
