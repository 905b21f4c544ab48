//! Started calls: in order, any number of them, while the caller does something else; and what becomes of them when they
//! are cancelled, or a rank ends.

use std::pin::pin;
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tensorwire::{Algorithm, Communicator, Deadline, Error, Options, ReduceOp, Work};

use crate::common::{Over, assert_same, buffer, reduced};
use crate::faults::processor_time;
use crate::job::Job;

/// Long enough for a busy machine, and far below the timeout of the jobs here.
const SOON: Duration = Duration::from_secs(15);

/// The two ways in which an all-reduce is started, in turn.
fn sum(comm: &Communicator, len: usize) -> Work<Vec<f32>> {
    let x = buffer(comm.rank(), len);
    match len % 2 {
        0 => comm.start_all_reduce(x, ReduceOp::Sum).unwrap(),
        _ => comm.start(x, |comm, x| comm.all_reduce(x, ReduceOp::Sum)).unwrap(),
    }
}

#[test]
fn started_calls_run_in_order_and_give_their_buffers_back() {
    for over in Over::ALL {
        over.threads(2, &Options::default(), |comm| {
            let start = |len: usize| {
                comm.start(buffer::<f32>(comm.rank(), len), |comm, x| comm.all_reduce(x, ReduceOp::Sum))
                    .unwrap()
            };
            let works: Vec<_> = [10usize, 100_000, 3].into_iter().map(|len| (len, start(len))).collect();
            // A blocking call comes after those that were started.
            comm.barrier().unwrap();
            for (len, work) in works {
                assert!(work.is_done());
                assert_same(&work.wait().unwrap(), &reduced(ReduceOp::Sum, 2, len), "started");
            }
            let failed = comm.start((), |comm, ()| comm.broadcast(&mut [0f32], 9)).unwrap();
            assert!(matches!(failed.wait().unwrap_err(), Error::InvalidArgument(_)));
            let panicked = comm.start((), |_, ()| panic!("on purpose")).unwrap();
            assert!(panicked.wait().unwrap_err().to_string().contains("panicked"));
            // Dropping it lets it finish.
            drop(start(1000));
            comm.barrier().unwrap();
        });
    }
}

#[test]
fn many_calls_in_flight_are_done_in_order_while_the_caller_looks_on() {
    for over in Over::ALL {
        over.threads(3, &Options::default(), |comm| {
            let lens: Vec<usize> = (0..60).map(|i| [1, 0, 5000, 200_000, 17][i % 5]).collect();
            let works: Vec<_> = lens.iter().map(|len| sum(&comm, *len)).collect();
            loop {
                // From the last one on: whatever is done when it is looked at, what was started before it is.
                let done: Vec<bool> = works.iter().rev().map(Work::is_done).collect();
                assert!(done.is_sorted(), "{done:?}");
                if done[0] {
                    break;
                }
                std::thread::yield_now();
            }
            for (work, len) in works.into_iter().zip(lens) {
                assert_same(&work.wait().unwrap(), &reduced(ReduceOp::Sum, 3, len), "started");
            }
        });
    }
}

/// Some ranks make the calls one by one, some start them; all algorithms, of which some take several messages to and fro.
#[test]
fn whoever_starts_its_calls_and_whoever_makes_them_one_by_one_get_the_same() {
    for over in Over::ALL {
        over.threads(3, &Options::default(), |comm| {
            for algorithm in Algorithm::ALL.iter().copied().map(Some).chain([None]) {
                comm.set_algorithm(algorithm).unwrap();
                // Those of other transports, and those for few bytes.
                if comm.algorithm(2 << 20).is_err() {
                    continue;
                }
                for starts in [[true; 3], [true, false, true], [false, true, false]] {
                    let lens = [3usize, 40_000, 0, 5, 300_001, 4, 100, 50_000];
                    let ops = [ReduceOp::Max, ReduceOp::Sum, ReduceOp::Average];
                    let each = |i: usize| {
                        (buffer::<i32>(comm.rank(), lens[i]), [ReduceOp::Max, ReduceOp::Sum][i % 2])
                    };
                    let average = buffer::<f32>(comm.rank(), 1000);
                    let sums: Vec<Vec<i32>> = if starts[comm.rank()] {
                        let started: Vec<_> = (0..lens.len())
                            .map(each)
                            .map(|(x, op)| comm.start_all_reduce(x, op).unwrap())
                            .collect();
                        let averaged = comm.start_all_reduce(average, ops[2]).unwrap().wait().unwrap();
                        assert_eq!(averaged.len(), 1000);
                        started.into_iter().map(|work| work.wait().unwrap()).collect()
                    } else {
                        let reduced = |(mut x, op): (Vec<i32>, ReduceOp)| {
                            comm.all_reduce(&mut x, op).unwrap();
                            x
                        };
                        let all = (0..lens.len()).map(each).map(reduced).collect();
                        comm.all_reduce(&mut { average }, ops[2]).unwrap();
                        all
                    };
                    for (i, sum) in sums.iter().enumerate() {
                        assert_same(
                            sum,
                            &reduced(ops[i % 2], 3, lens[i]),
                            format!("{algorithm:?}, call {i}"),
                        );
                    }
                }
            }
        });
    }
}

#[cfg(feature = "tcp")]
#[test]
fn calls_go_out_over_tcp_while_the_first_waits() {
    for over in [Over::Tcp, Over::ALL[2.min(Over::ALL.len() - 1)]] {
        let begun = Barrier::new(2);
        over.threads(2, &Options::default(), |comm| {
            comm.barrier().unwrap();
            let lens = [10, 2000, 0, 6];
            if comm.rank() == 0 {
                let works = lens.map(|len| sum(&comm, len));
                // This rank's record says so of itself.
                let under_way = || {
                    let record = comm.flight_record();
                    let own = record.ranks.iter().find(|r| r.rank == 0).unwrap();
                    own.calls.iter().filter(|call| call.took.is_none()).count()
                };
                let end = Instant::now() + SOON;
                while under_way() < lens.len() {
                    assert!(Instant::now() < end, "{}", comm.flight_record());
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(works.iter().all(|work| !work.is_done()));
                begun.wait();
                for (work, len) in works.into_iter().zip(lens) {
                    assert_same(&work.wait().unwrap(), &reduced(ReduceOp::Sum, 2, len), "started");
                }
            } else {
                begun.wait();
                for len in lens {
                    let mut x = buffer::<f32>(1, len);
                    comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                    assert_same(&x, &reduced(ReduceOp::Sum, 2, len), "one by one");
                }
            }
        });
    }
}

#[test]
fn more_calls_than_may_be_under_way_are_started_when_there_is_room() {
    for over in [Over::ALL[0], Over::ALL[Over::ALL.len().min(2) - 1]] {
        let begin = Barrier::new(2);
        over.threads(2, &Options::default(), |comm| {
            // One rank begins when the other waits for room.
            if comm.rank() == 0 {
                begin.wait();
            }
            let start = |i: usize| {
                if comm.rank() == 1 && i == 1024 {
                    begin.wait();
                }
                sum(&comm, 1 + i % 3)
            };
            let works: Vec<_> = (0..2500).map(start).collect();
            for (i, work) in works.into_iter().enumerate() {
                assert_same(&work.wait().unwrap(), &reduced(ReduceOp::Sum, 2, 1 + i % 3), "started");
            }
        });
    }
}

#[test]
fn a_deadline_gives_the_work_back_and_the_call_goes_on() {
    for over in Over::ALL {
        let waited = Barrier::new(2);
        over.threads(2, &Options::default(), |comm| {
            if comm.rank() == 1 {
                waited.wait();
            }
            let work = sum(&comm, 3000);
            let work = match comm.rank() {
                0 => {
                    let work = work.wait_until(Deadline::after(Duration::from_millis(20))).unwrap_err();
                    assert!(!work.is_done());
                    waited.wait();
                    work
                }
                _ => work,
            };
            let sum = work.wait_until(Deadline::after(SOON)).expect("it is done by then").unwrap();
            assert_same(&sum, &reduced(ReduceOp::Sum, 2, 3000), "started");
        });
    }
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[test]
fn started_calls_are_futures() {
    for over in Over::ALL {
        over.threads(2, &Options::default(), |comm| {
            let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
            for work in [3, 100_000, 4].map(|len| sum(&comm, len)) {
                let mut work = pin!(work);
                let result = loop {
                    match work.as_mut().poll(&mut Context::from_waker(&waker)) {
                        Poll::Ready(result) => break result.unwrap(),
                        Poll::Pending => std::thread::park(),
                    }
                };
                assert_same(&result, &reduced(ReduceOp::Sum, 2, result.len()), "started");
            }
        });
    }
}

#[test]
fn results_come_also_when_the_communicator_is_gone() {
    for over in Over::ALL {
        over.threads(2, &Options::default(), |comm| {
            let works = [10, 50_000].map(|len| sum(&comm, len));
            drop(comm);
            for work in works {
                let sum = work.wait().unwrap();
                assert_same(&sum, &reduced(ReduceOp::Sum, 2, sum.len()), "started");
            }
        });
    }
}

#[test]
fn what_is_asked_of_the_communicator_comes_behind_started_calls() {
    for over in Over::ALL {
        over.threads(2, &Options::default(), |comm| {
            let first = sum(&comm, 100_000);
            let plan = comm.all_reduce_plan::<f32>(10, ReduceOp::Sum).unwrap();
            assert!(first.is_done());
            let second = sum(&comm, 100_000);
            plan.run(&mut [1f32; 10]).unwrap();
            assert!(second.is_done());
            let third = sum(&comm, 100_000);
            comm.set_algorithm(None).unwrap();
            assert!(third.is_done());
            let fourth = sum(&comm, 100_000);
            let half = comm.split(Some(0), 0).unwrap().unwrap();
            assert!(fourth.is_done());
            half.barrier().unwrap();
        });
    }
}

#[test]
fn a_call_that_is_done_can_not_be_cancelled() {
    for over in Over::ALL {
        over.threads(2, &Options::default(), |comm| {
            let work = sum(&comm, 100);
            comm.barrier().unwrap();
            assert_same(&work.cancel().unwrap(), &reduced(ReduceOp::Sum, 2, 100), "cancelled too late");
            comm.barrier().unwrap();
        });
    }
}

/// Whether a call ended because rank 0 cancelled one, or came behind one that did.
fn is_cancelled(error: &Error) -> bool {
    match error {
        Error::Aborted { by: 0, why, .. } => why.contains("cancelled a started call"),
        Error::Poisoned { cause, .. } => cause.contains("rank 0 ended the group"),
        _ => false,
    }
}

/// Also where others have begun it, or wait in it already: all learn who did it, and can go on.
#[test]
fn cancelling_ends_the_group_on_every_rank_and_all_can_go_on() {
    for over in Over::ALL {
        for which in [0, 1, 2] {
            over.threads(3, &Options::default(), |comm| {
                let token = Arc::new(());
                let start = |len| {
                    let held = (buffer::<f32>(comm.rank(), len), token.clone());
                    comm.start(held, |comm, (x, _)| comm.all_reduce(x, ReduceOp::Sum)).unwrap()
                };
                if comm.rank() == 2 {
                    // It makes none of the calls.
                    let error = comm.recv(&mut [0f32], 1).unwrap_err();
                    assert!(matches!(error, Error::Aborted { .. }) && is_cancelled(&error), "{error}");
                } else {
                    let mut works: Vec<_> = [100, 70_000, 3].map(start).into();
                    if comm.rank() == 0 {
                        let error = works.remove(which).cancel().unwrap_err();
                        assert!(is_cancelled(&error), "{error}");
                    }
                    for error in works.into_iter().map(|work| work.wait().unwrap_err()) {
                        assert!(is_cancelled(&error), "{error}");
                    }
                }
                assert_eq!(Arc::strong_count(&token), 1, "no buffer is left");
                let next = comm.shrink().unwrap();
                assert_eq!(next.world(), 3);
                assert_same(&sum(&next, 5000).wait().unwrap(), &reduced(ReduceOp::Sum, 3, 5000), "after it");
            });
        }
    }
}

// Ranks as processes.

const TRANSPORTS: &[&str] = &[
    "shm",
    #[cfg(feature = "tcp")]
    "tcp",
    #[cfg(feature = "tls")]
    "tls",
    #[cfg(feature = "tcp")]
    "mixed",
];

/// Starts `body` in four processes, and what they meet in.
fn start(over: &str, body: &str) -> (Job, Option<Box<dyn std::any::Any>>) {
    match over {
        "shm" => (Job::start(body, 4, &[]), None),
        #[cfg(feature = "tcp")]
        "tcp" => (crate::tcp::start(body, 4, &[]), None),
        #[cfg(feature = "tls")]
        "tls" => {
            let (job, store) = crate::tls::job(body, 4);
            (job, Some(Box::new(store)))
        }
        #[cfg(feature = "tcp")]
        "mixed" => {
            // Who waits in memory for a rank of its own host hears of another host's end when that wait ends.
            let (job, store) = crate::mixed::start(body, "aaab", &[]);
            (job, Some(Box::new(store)))
        }
        other => unreachable!("{other}"),
    }
}

/// Rank 0 comes a second late; the others say what share of a processor they used, with calls under way, meanwhile.
pub(crate) fn idle() {
    let comm = Communicator::from_env().unwrap();
    comm.barrier().unwrap();
    let (begin, before) = (Instant::now(), processor_time());
    if comm.rank() == 0 {
        std::thread::sleep(Duration::from_secs(1));
    }
    let mut works: Vec<_> = [1, 100, 30_000, 2, 500_000].map(|len| sum(&comm, len)).into();
    let first = works.remove(0).wait_until(Deadline::after(SOON)).expect("rank 0 has come").unwrap();
    let share = (processor_time() - before).as_secs_f64() / begin.elapsed().as_secs_f64();
    assert_same(&first, &reduced(ReduceOp::Sum, 4, 1), "started");
    works.into_iter().for_each(|work| drop(work.wait().unwrap()));
    println!("\nused {share}");
}

#[test]
fn the_background_uses_almost_no_processor_while_it_waits() {
    for over in TRANSPORTS {
        let (mut job, _store) = start(over, "idle");
        for rank in 0..4 {
            let (status, text) = job.join_within(rank, SOON);
            let used = text.lines().find_map(|line| line.strip_prefix("used "));
            let used: f64 = used.unwrap_or_else(|| panic!("{text}")).parse().unwrap();
            println!("{over}, rank {rank}: {:.2} % of a processor", used * 100.0);
            assert!(status.success() && used < 0.05, "{over}, rank {rank}: {text}");
        }
    }
}

/// The last rank is stopped while the others have calls under way, of which rank 0 cancels one.
pub(crate) fn cancels() {
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let before = ["task", "fd"].map(count);
    let comm = Communicator::from_env().unwrap();
    comm.barrier().unwrap();
    if comm.rank() + 1 == comm.world() {
        println!("\nstopping");
        rustix::process::kill_process(rustix::process::getpid(), Signal::STOP).unwrap();
        // It may be another thread that takes the signal: this one goes no further before.
        std::thread::sleep(Duration::from_millis(500));
    }
    let mut works: Vec<_> = [10, 100_000, 3, 1_000_000].map(|len| sum(&comm, len)).into();
    if comm.rank() + 1 == comm.world() {
        // What the others had sent before is a result.
        let errors: Vec<_> = works.into_iter().filter_map(|work| work.wait().err()).collect();
        assert!(!errors.is_empty() && errors.iter().all(is_cancelled), "{errors:?}");
        return;
    }
    if comm.rank() == 0 {
        let first = works.remove(0).wait_until(Deadline::after(Duration::from_millis(100))).unwrap_err();
        works.insert(0, first);
        let error = works.remove(1).cancel().unwrap_err();
        assert!(is_cancelled(&error), "{error}");
    }
    for error in works.into_iter().map(|work| work.wait().unwrap_err()) {
        assert!(is_cancelled(&error), "{error}");
    }
    drop(comm);
    let end = Instant::now() + SOON;
    while ["task", "fd"].map(count) != before {
        assert!(
            Instant::now() < end,
            "{:?} threads and descriptors, {before:?} before",
            ["task", "fd"].map(count)
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("\nnothing is left");
}

#[test]
fn cancelling_waits_for_no_stopped_rank_and_leaves_nothing() {
    for over in TRANSPORTS {
        let (mut job, _store) = start(over, "cancels");
        for rank in 0..3 {
            let (status, text) = job.join_within(rank, SOON);
            assert!(status.success() && text.contains("nothing is left"), "{over}, rank {rank}: {text}");
        }
        job.signal(3, Signal::CONT);
        let (status, text) = job.join_within(3, SOON);
        assert!(status.success(), "{over}: {text}");
    }
}

/// Rank 1 ends after two calls, while the others have more under way.
pub(crate) fn abandoned() {
    let comm = Communicator::from_env().unwrap();
    comm.barrier().unwrap();
    let lens = [1000, 1001, 1002, 100_003, 4];
    if comm.rank() == 1 {
        lens[..2].iter().for_each(|len| drop(sum(&comm, *len).wait().unwrap()));
        rustix::process::kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
    }
    let works = lens.map(|len| sum(&comm, len));
    let mut results = works.map(Work::wait).into_iter().zip(lens).peekable();
    // What it had sent for two calls, it may have taken with it.
    while let Some((Ok(_), len)) = results.peek() {
        assert!(*len < 1002);
        results.next();
    }
    match results.next() {
        Some((Err(Error::PeerLost { peer: 1, call, .. }), len)) if call.count == len as u64 => {}
        other => panic!("{other:?}"),
    }
    for (result, _) in results {
        assert!(
            matches!(&result, Err(Error::Poisoned { cause, .. }) if cause.contains("lost rank 1")),
            "{result:?}"
        );
    }
    let next = comm.shrink().unwrap();
    assert_eq!(next.world(), 3);
    for work in [10, 20_000].map(|len| sum(&next, len)) {
        let sum = work.wait().unwrap();
        assert_same(&sum, &reduced(ReduceOp::Sum, 3, sum.len()), "after it");
    }
    println!("\nwent on");
}

#[test]
fn a_rank_that_dies_is_named_by_the_first_call_it_spoils() {
    for over in TRANSPORTS {
        let (mut job, _store) = start(over, "abandoned");
        for rank in [0, 2, 3] {
            let (status, text) = job.join_within(rank, SOON);
            assert!(status.success() && text.contains("went on"), "{over}, rank {rank}: {text}");
        }
    }
}
