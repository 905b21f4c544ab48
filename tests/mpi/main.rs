//! The library over MPI: this program, started by `mpirun` at 2 to 5 ranks, once for each case.
//!
//! Without a case in its environment it is the test: it starts `mpirun` with itself, and looks at what the ranks say and how
//! the job ends. A name among the arguments picks the cases that contain it.

#[path = "../support/checks.rs"]
#[allow(dead_code, reason = "some are for other transports")]
mod checks;
mod job;
mod ranks;
#[path = "../support/values.rs"]
mod values;

use std::time::{Duration, Instant};

use job::Job;

/// What a job must do.
struct Case {
    name: &'static str,
    worlds: &'static [usize],
    check: fn(&'static str, usize),
}

const fn case(name: &'static str, worlds: &'static [usize], check: fn(&'static str, usize)) -> Case {
    Case { name, worlds, check }
}

const CASES: &[Case] = &[
    case("conformance", &[1, 2, 3, 4, 5], succeeds),
    case("groups", &[2, 3, 5], succeeds),
    case("algorithms", &[2, 4], succeeds),
    case("started", &[2, 3], succeeds),
    case("messages", &[2], succeeds),
    case("offload", &[1, 2, 3, 5], succeeds),
    case("owner", &[3], succeeds),
    case("raw", &[2], succeeds),
    case("funneled", &[2], succeeds),
    case("finalized", &[2], succeeds),
    case("tcp", &[3], tcp),
    case("scattered", &[4], scattered),
    case("alone", &[1], alone),
    case("torchrun", &[1], torchrun),
    case("mismatch", &[3], |name, world| {
        names(name, world, &["all_reduce(1000 x f32, sum)", "rank 2 called all_reduce(999 x f32, sum)"])
    }),
    case("abort", &[3], |name, world| names(name, world, &["rank 0 ended the group during", "pressed stop"])),
    case("leave", &[3], |name, world| {
        names(name, world - 1, &["lost rank 2 in barrier()", "it left the group"])
    }),
    case("shrink", &[2], |name, world| names(name, world, &["ULFM"])),
    case("panic", &[2], |name, _| names(name, 1, &["lost rank 1"])),
    case("stopped", &[3], stopped),
    case("killed", &[3], killed),
    case("killed_with_recovery", &[3], killed_with_recovery),
    case("offload_late", &[2], offload_late),
    case("offload_killed", &[3], offload_killed),
];

/// All ranks come to the end.
fn succeeds(name: &'static str, world: usize) {
    let done = Job::new(name, world).run();
    assert!(done.success(), "{done}");
    assert_eq!(done.stdout.matches("done").count(), world, "{done}");
}

/// So many ranks print an error with these parts; however the job ends, it ends at once.
fn names(name: &'static str, ranks: usize, parts: &[&str]) {
    let world = if name == "leave" { ranks + 1 } else { ranks.max(2) };
    let done = Job::new(name, world).run();
    for rank in 0..ranks {
        let said = done.said_by(rank);
        assert!(parts.iter().all(|part| said.contains(part)), "rank {rank}: {done}");
    }
    assert!(done.took < Duration::from_secs(20), "{done}");
}

/// Ranks over TCP need no secret where MPI carries it.
fn tcp(name: &'static str, world: usize) {
    let done = Job::new(name, world).env("TENSORWIRE_TRANSPORT", "tcp").run();
    assert!(done.success() && done.stdout.matches("done over tcp").count() == world, "{done}");
}

/// Ranks on several hosts, as they are told, know which ones share a host.
fn scattered(name: &'static str, world: usize) {
    let done = Job::new(name, world).run();
    assert!(done.success() && done.stdout.matches("done").count() == world, "{done}");
}

/// A program that nobody has started is a world of one.
fn alone(name: &'static str, _: usize) {
    let done = Job::alone(name).run();
    assert!(done.success() && done.stdout.contains("done"), "{done}");
}

/// Another launcher's ranks are told that MPI hasn't started them.
fn torchrun(name: &'static str, _: usize) {
    let place = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")];
    let done = place.into_iter().fold(Job::alone(name), |job, (name, value)| job.env(name, value)).run();
    assert!(
        done.stdout.contains("torchrun has started the ranks: for mpi, start them with mpirun"),
        "{done}"
    );
}

/// A rank that is stopped is named when the timeout is over.
fn stopped(name: &'static str, world: usize) {
    let done = Job::new(name, world).env("TENSORWIRE_TIMEOUT", "2").run();
    for rank in [0, 2] {
        let said = done.said_by(rank);
        assert!(said.contains("timed out after 2s waiting for rank(s) [1]"), "{done}");
    }
    assert!(done.took < Duration::from_secs(20), "{done}");
}

/// A rank that is killed ends the job, as mpirun does by default.
fn killed(name: &'static str, world: usize) {
    let done = Job::new(name, world).run();
    assert!(!done.success() && done.took < Duration::from_secs(20), "{done}");
}

/// Where mpirun leaves the others alive, they learn whom they have lost.
fn killed_with_recovery(_: &'static str, world: usize) {
    let done = Job::new("killed", world).option("--enable-recovery").run();
    for rank in 0..world - 1 {
        let said = done.said_by(rank);
        let lost = format!("rank {rank}: lost rank 2 in all_reduce(1048576 x f32, sum)");
        assert!(said.contains(&lost) && said.contains("its process ended"), "{done}");
    }
    assert!(done.took < Duration::from_secs(20), "{done}");
}

/// MPI's own collectives can't be called off: the job ends, and says why.
fn offload_late(name: &'static str, world: usize) {
    let done = Job::new(name, world).env("TENSORWIRE_TIMEOUT", "2").run();
    let why = "rank 0: timed out after 2s (the limit is TENSORWIRE_TIMEOUT) in all_reduce(1000 x f32, sum) (call 2)";
    assert!(!done.success() && done.stderr.contains(why), "{done}");
    assert!(done.took < Duration::from_secs(20), "{done}");
}

fn offload_killed(name: &'static str, world: usize) {
    let done = Job::new(name, world).option("--enable-recovery").run();
    assert!(
        !done.success() && done.stderr.contains("lost rank 2 in all_reduce(1048576 x f32, sum)"),
        "{done}"
    );
    assert!(done.took < Duration::from_secs(20), "{done}");
}

fn main() {
    if ranks::run() {
        return;
    }
    if let Err(why) = job::check_mpirun() {
        eprintln!("{why}");
        std::process::exit(1);
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(&**part));
    let (mut passed, mut failed) = (0, 0);
    for case in CASES {
        for world in case.worlds {
            let name = format!("{}_at_{world}", case.name);
            if !is_wanted(&name) {
                continue;
            }
            let begun = Instant::now();
            let good = std::panic::catch_unwind(|| (case.check)(case.name, *world)).is_ok();
            let took = begun.elapsed().as_secs_f64();
            println!("test {name} ... {} ({took:.1} s)", if good { "ok" } else { "FAILED" });
            *(if good { &mut passed } else { &mut failed }) += 1;
        }
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {verdict}. {passed} passed; {failed} failed");
    if failed > 0 {
        std::process::exit(1);
    }
}
