//! Ranks as processes: they find each other, and whatever happens to one of them, every other one is told.

use std::time::{Duration, Instant};

use crate::job::{Job, await_point, run_rank};
use crate::{faults, limits, started, survivors, tuning};
use rustix::process::Signal;
use tensorwire::{Communicator, Error, ReduceOp};

/// Long enough for a busy machine, and far below the default timeout of 30 s.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn rank_process() {
    run_rank(&[
        ("sum", sum),
        ("abort", abort),
        #[cfg(feature = "tcp")]
        ("busy", crate::tcp::busy),
        #[cfg(feature = "tcp")]
        ("cut", crate::cut::cut),
        #[cfg(feature = "tcp")]
        ("goes on", crate::tcp::goes_on),
        #[cfg(feature = "tcp")]
        ("where it is", crate::mixed::where_it_is),
        #[cfg(feature = "tcp")]
        ("adapts", crate::links::adapts),
        #[cfg(feature = "tcp")]
        ("linked", crate::links::linked),
        #[cfg(feature = "tcp")]
        ("unproven", crate::mixed::unproven),
        #[cfg(feature = "tcp")]
        ("scattered", crate::mixed::scattered),
        #[cfg(feature = "nccl")]
        ("device", crate::devices::device),
        ("endless", endless),
        ("leave", leave),
        ("mismatch", mismatch),
        ("struck", faults::struck),
        ("late", faults::late),
        ("many_calls", limits::many_calls),
        ("tiny_dev_shm", limits::tiny_dev_shm),
        ("cramped", limits::cramped),
        ("few_files", limits::few_files),
        ("bystander", survivors::bystander),
        ("dwindle", survivors::dwindle),
        ("undecided", survivors::undecided),
        ("indirect", survivors::indirect),
        ("idle", started::idle),
        ("cancels", started::cancels),
        ("abandoned", started::abandoned),
        ("tuned", tuning::tuned),
        ("tuned threads", tuning::tuned_threads),
        #[cfg(feature = "tcp")]
        ("strangers", crate::strangers::strangers),
        #[cfg(feature = "tls")]
        ("reason", crate::tls::reason),
        ("join", || {
            if let Ok(point) = std::env::var("TENSORWIRE_TEST_AWAIT") {
                await_point(&point);
            }
            println!("{}", Communicator::from_env().map_or_else(|e| e.to_string(), |_| "joined".into()))
        }),
    ]);
}

/// Rank 0 aborts from another thread while all wait for the last rank.
fn abort() {
    let comm = Communicator::from_env().unwrap();
    comm.barrier().unwrap();
    std::thread::scope(|s| {
        if comm.rank() == 0 {
            s.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                comm.abort("the user pressed stop");
            });
        }
        // The last rank is elsewhere.
        let last = comm.rank() + 1 == comm.world();
        let result = if last { comm.recv(&mut [0f32], 0) } else { comm.barrier() };
        println!("{}", result.unwrap_err());
    });
}

fn sum() {
    let comm = Communicator::from_env().unwrap();
    let mut x = vec![comm.rank() as f32 + 1.0; 100_000];
    for _ in 0..10 {
        comm.all_reduce(&mut x, ReduceOp::Max).unwrap();
    }
    println!("rank {} of {}: {}", comm.rank(), comm.world(), x.iter().sum::<f32>());
}

/// Large all-reduces until one fails.
fn endless() {
    let comm = Communicator::from_env().unwrap();
    let mut x = vec![0f32; 1 << 20];
    println!("at work");
    let error = loop {
        if let Err(e) = comm.all_reduce(&mut x, ReduceOp::Sum) {
            break e;
        }
    };
    let again = comm.barrier().unwrap_err();
    assert!(matches!(&again, Error::Poisoned { .. }), "{again}");
    println!("{error}");
}

/// The last rank leaves before the barrier.
fn leave() {
    let comm = Communicator::from_env().unwrap();
    if comm.rank() + 1 < comm.world() {
        println!("{}", comm.barrier().unwrap_err());
    }
}

/// The last rank calls something else.
fn mismatch() {
    let comm = Communicator::from_env().unwrap();
    let mut x = [0f32; 1000];
    let result = match comm.rank() + 1 == comm.world() {
        true => comm.all_reduce(&mut x[1..], ReduceOp::Sum),
        false => comm.all_reduce(&mut x, ReduceOp::Sum),
    };
    println!("{}", result.unwrap_err());
}

#[test]
fn processes_find_each_other_and_agree() {
    for world in 1..=4 {
        let mut job = Job::start("sum", world, &[]);
        for rank in 0..world {
            let (status, text) = job.join(rank);
            assert!(status.success(), "{text}");
            let expected = format!("rank {rank} of {world}: {}", 100_000.0 * world as f32);
            assert!(text.contains(&expected), "{text}");
        }
    }
}

#[test]
fn other_launchers_variables_work_too() {
    let job = std::process::id().to_string();
    let torchrun = |rank| {
        vec![
            ("RANK", rank),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RUN_ID", &*job),
        ]
    };
    let open_mpi = |rank| {
        vec![
            ("OMPI_COMM_WORLD_RANK", rank),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", rank),
            ("PMIX_NAMESPACE", &*job),
        ]
    };
    let slurm = |rank| {
        vec![("SLURM_PROCID", rank), ("SLURM_NTASKS", "2"), ("SLURM_JOB_ID", &*job), ("SLURM_STEP_ID", "0")]
    };
    let pmi = |rank| vec![("PMI_RANK", rank), ("PMI_SIZE", "2")];
    for envs in [
        [torchrun("0"), torchrun("1")],
        [open_mpi("0"), open_mpi("1")],
        [slurm("0"), slurm("1")],
        [pmi("0"), pmi("1")],
    ] {
        let mut job = Job::start_with("sum", &envs);
        for rank in 0..2 {
            let (status, text) = job.join(rank);
            assert!(
                status.success() && text.contains(&format!("rank {rank} of 2: 200000")),
                "{envs:?}: {text}"
            );
        }
    }
}

/// Whoever is killed in the middle of a job's calls is named on every other rank. `start` starts a job, and gives what it
/// needs besides.
pub(crate) fn assert_killed_is_named<S>(worlds: &[usize], start: impl Fn(&str, usize) -> (Job, S)) {
    for world in worlds.iter().copied() {
        let (mut job, _store) = start("endless", world);
        let victim = world - 1;
        (0..world).for_each(|rank| drop(job.wait_for(rank, "at work")));
        std::thread::sleep(Duration::from_millis(20));
        job.signal(victim, Signal::KILL);
        let killed = Instant::now();
        for rank in 0..victim {
            let (status, text) = job.join_within(rank, SOON);
            println!("rank {rank} of {world} knew it, and ended, within {:?}", killed.elapsed());
            assert!(status.success(), "{text}");
            let expected = format!("rank {rank}: lost rank {victim} in all_reduce(1048576 x f32, sum)");
            assert!(text.contains(&expected) && text.contains("its process ended"), "{text}");
        }
    }
}

/// So is a rank that leaves early, one that makes another call, and one that aborts.
pub(crate) fn assert_others_are_named<S>(start: impl Fn(&str, usize) -> (Job, S)) {
    let said = |rank: usize| {
        [
            ("leave", vec![format!("rank {rank}: lost rank 2 in barrier()")]),
            (
                "mismatch",
                vec![
                    "all_reduce(1000 x f32, sum)".to_owned(),
                    "rank 2 called all_reduce(999 x f32, sum)".to_owned(),
                ],
            ),
            ("abort", vec![format!("rank {rank}: rank 0 ended the group during"), "pressed stop".to_owned()]),
        ]
    };
    for (i, (body, _)) in said(0).into_iter().enumerate() {
        let (mut job, _store) = start(body, 3);
        // Who leaves has nothing to say.
        for rank in 0..if body == "leave" { 2 } else { 3 } {
            let (status, text) = job.join_within(rank, SOON);
            assert!(status.success() && said(rank)[i].1.iter().all(|part| text.contains(part)), "{text}");
        }
    }
}

#[test]
fn a_killed_rank_is_named_on_every_other() {
    assert_killed_is_named(&[2, 3, 4], |body, world| (Job::start(body, world, &[]), ()));
}

#[test]
fn a_rank_that_leaves_differs_or_aborts_is_named() {
    assert_others_are_named(|body, world| (Job::start(body, world, &[]), ()));
}

#[test]
fn a_stopped_rank_is_named_when_the_timeout_is_over() {
    let mut job = Job::start("endless", 3, &[("TENSORWIRE_TIMEOUT", "2")]);
    (0..3).for_each(|rank| drop(job.wait_for(rank, "at work")));
    job.signal(1, Signal::STOP);
    for rank in [0, 2] {
        let (status, text) = job.join_within(rank, SOON);
        assert!(status.success(), "{text}");
        assert!(text.contains("timed out after 2s waiting for rank(s)") && text.contains('1'), "{text}");
    }
    // The stopped rank learns of it as soon as it runs again.
    job.signal(1, Signal::CONT);
    let (_, text) = job.join_within(1, SOON);
    assert!(text.contains("timed out after 2s waiting for rank(s)"), "{text}");
}

#[test]
fn ranks_that_do_not_fit_together_are_told_so() {
    let timeout = ("TENSORWIRE_TIMEOUT", "2");
    let torchrun = |rank, world, job| {
        let place =
            [("RANK", rank), ("WORLD_SIZE", world), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")];
        place.into_iter().chain([("TORCHELASTIC_RUN_ID", job), timeout]).collect()
    };
    let (a, b) = (format!("{}1", std::process::id()), format!("{}2", std::process::id()));

    let mut job = Job::start_with("join", &[torchrun("0", "3", &a), torchrun("1", "2", &a)]);
    let (zero, one) = (job.join(0).1, job.join(1).1);
    assert!(one.contains("rank 0 refused: rank 1 was started for a world of 2, rank 0 for 3"), "{one}");
    assert!(
        zero.contains("rank(s) [1, 2] did not come within 2s; refused: rank 1 was started for a world of 2"),
        "{zero}"
    );

    let mut job = Job::start_with("join", &[torchrun("1", "2", &b)]);
    let text = job.join(0).1;
    assert!(text.contains("is its launcher or rank 0 running?"), "{text}");

    let mut job = Job::start_with(
        "join",
        &[vec![("TENSORWIRE_RANK", "2"), ("TENSORWIRE_WORLD", "2"), ("TENSORWIRE_STORE", "unix:x")]],
    );
    let text = job.join(0).1;
    assert!(text.contains("TENSORWIRE_RANK"), "{text}");
}
