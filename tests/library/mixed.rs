//! Ranks that share memory on each of several hosts, with TCP between them: processes that die, stop, leave or differ.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Signal};
use tensorwire::transports::store::StoreServer;
use tensorwire::transports::tcp::Secret;
use tensorwire::{Algorithm, Communicator, Error, Options, ReduceOp};

use crate::common::{assert_same, buffer, mixed_threads, reduced};
use crate::job::Job;
use crate::limits::{limit, status};
use crate::namespaces::Hosts;

/// Long enough for a busy machine, and far below the default timeout of 30 s.
const SOON: Duration = Duration::from_secs(10);

/// Hosts by the letters of their ranks.
const HOSTS: [&str; 4] = ["aabb", "abab", "aaab", "aabbc"];

/// Starts `body` in one process a letter of `hosts`: ranks with the same one are said to be on the same host.
pub(crate) fn start(body: &str, hosts: &str, more: &[(&str, &str)]) -> (Job, StoreServer) {
    start_each(body, hosts, |_| more)
}

/// As [`start`], with variables for each rank.
pub(crate) fn start_each<'a>(
    body: &str,
    hosts: &str,
    more: impl Fn(usize) -> &'a [(&'a str, &'a str)],
) -> (Job, StoreServer) {
    let (secret, store) = (Secret::generate().unwrap().to_hex(), StoreServer::start().unwrap());
    let (address, world) = (store.address(), hosts.len().to_string());
    let ranks: Vec<String> = (0..hosts.len()).map(|rank| rank.to_string()).collect();
    let env = |rank: usize| {
        let mut env = vec![
            ("TENSORWIRE_RANK", &*ranks[rank]),
            ("TENSORWIRE_WORLD", &*world),
            ("TENSORWIRE_STORE", &*address),
            ("TENSORWIRE_TRANSPORT", "auto"),
            ("TENSORWIRE_SECRET", &*secret),
            ("TENSORWIRE_HOST", &hosts[rank..=rank]),
        ];
        env.extend_from_slice(more(rank));
        env
    };
    (Job::start_with(body, &(0..hosts.len()).map(env).collect::<Vec<_>>()), store)
}

/// Says what carries the data, also of the groups of one host and of one rank of each.
pub(crate) fn where_it_is() {
    let comm = Communicator::from_env().unwrap();
    let host = std::env::var("TENSORWIRE_HOST").unwrap().bytes().next().unwrap();
    let here = comm.split(Some(host.into()), 0).unwrap().unwrap();
    let mut places = vec![0; comm.world()];
    comm.all_gather(&[here.rank() as u32], &mut places).unwrap();
    let across = comm.split(Some(places[comm.rank()]), 0).unwrap().unwrap();
    let said = |comm: &Communicator| comm.transport().unwrap();
    println!("\nall: {}; here: {}; across: {};", said(&comm), said(&here), said(&across));
}

#[test]
fn memory_is_shared_where_ranks_are_on_one_host() {
    for (hosts, all, here, across) in [
        ("aaa", "shm;", "shm;", "shm;"),
        ("abc", "tcp ", "tcp ", "tcp "),
        ("abab", "shm between ranks [", "shm;", "tcp "),
        ("aab", "shm between ranks [0, 1], tcp", "shm;", "tcp "),
    ] {
        let (mut job, _store) = start("where it is", hosts, &[]);
        let (status, text) = job.join(0);
        let parts = [format!("all: {all}"), format!("here: {here}"), format!("across: {across}")];
        assert!(status.success() && parts.iter().all(|part| text.contains(part)), "{hosts}: {text}");
        for rank in 1..hosts.len() {
            let (status, text) = job.join(rank);
            assert!(status.success(), "{text}");
        }
    }
}

/// Says what carries the data where some ranks can't have the memory of their host, and that it arrives.
pub(crate) fn unproven() {
    if std::env::var_os("TENSORWIRE_TEST_CRAMPED").is_some() {
        limit(Resource::As, Some(status("VmSize") + (64 << 20)));
    }
    let comm = Communicator::from_env().unwrap();
    println!("\n{};", comm.transport().unwrap());
    for len in [0, 1, 1001, 300_007] {
        let mut x = buffer::<f32>(comm.rank(), len);
        comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert_same(&x, &reduced(ReduceOp::Sum, comm.world(), len), "all_reduce");
        let mut all = vec![0f32; len * comm.world()];
        comm.all_gather(&buffer::<f32>(comm.rank(), len), &mut all).unwrap();
        (0..comm.world()).for_each(|r| assert_same(&all[r * len..][..len], &buffer(r, len), "all_gather"));
        comm.broadcast(&mut x, comm.world() - 1).unwrap();
    }
    let part = comm.split(Some(comm.rank() as u32 % 2), 0).unwrap().unwrap();
    let mut x = buffer::<f32>(part.rank(), 1001);
    part.all_reduce(&mut x, ReduceOp::Sum).unwrap();
    assert_same(&x, &reduced(ReduceOp::Sum, part.world(), 1001), "of a part");
    comm.barrier().unwrap();
    println!("fine");
}

/// Ranks that are said to be on one host, and are in one network namespace, but can't all map the memory, or have none
/// to map: they use TCP, and those of other hosts what they have.
#[test]
fn where_memory_cannot_be_shared_tcp_does() {
    const SHM: &str = "TENSORWIRE_SHM_BYTES";
    const CRAMPED: &str = "TENSORWIRE_TEST_CRAMPED";
    // 64 MiB a rank are more than a cramped one may map; 2^50 bytes are more than anybody has.
    let (large, huge) = ((SHM, "67108864"), (SHM, "1125899906842624"));
    let (cramped, as_it_is) = (&[large, (CRAMPED, "1")][..], &[large][..]);
    for (hosts, ranks, expected) in [
        ("aa", [as_it_is, cramped, &[], &[]], ["tcp ", "tcp ", "", ""]),
        ("aa", [cramped, as_it_is, &[], &[]], ["tcp ", "tcp ", "", ""]),
        ("aa", [&[huge], &[], &[], &[]], ["tcp ", "tcp ", "", ""]),
        (
            "aabb",
            [as_it_is, cramped, &[], &[]],
            ["no shm with", "no shm with", "shm between ranks [2, 3]", "shm b"],
        ),
        (
            "abab",
            [&[], &[huge], &[], &[]],
            ["shm between ranks [0, 2]", "no shm with", "shm b", "no shm with"],
        ),
    ] {
        let (mut job, _store) = start_each("unproven", hosts, |rank| ranks[rank]);
        let begun = Instant::now();
        for (rank, expected) in expected.iter().enumerate().take(hosts.len()) {
            let (status, text) = job.join_within(rank, SOON);
            let says = text.contains(&format!("\n{expected}")) && text.contains("\nfine");
            assert!(status.success() && says, "{hosts}, rank {rank}: {text}");
        }
        println!("{hosts}: {:?}", begun.elapsed());
    }
}

/// What they are called doesn't count: ranks of two hosts that have one name, and those of two groups on a host.
#[test]
fn hosts_of_one_name_are_not_one() {
    let Some(net) = Hosts::new(2) else { return };
    let (secret, store) = (Secret::generate().unwrap().to_hex(), format!("tcp:{}:29600", Hosts::address(0)));
    let env = |rank| {
        vec![
            ("TENSORWIRE_RANK", rank),
            ("TENSORWIRE_WORLD", "3"),
            ("TENSORWIRE_STORE", &*store),
            ("TENSORWIRE_TRANSPORT", "auto"),
            ("TENSORWIRE_SECRET", &*secret),
            ("TENSORWIRE_HOST", "a"),
        ]
    };
    let places = [(net.name(0), "0"), (net.name(0), "1"), (net.name(1), "2")];
    let places: Vec<_> = places.map(|(host, rank)| (host.to_owned(), env(rank))).into();
    let mut job = Job::start_within("unproven", &places);
    for (rank, expected) in ["\nshm between ranks [0, 1], tcp", "\nshm between ranks [0, 1]", "\nno shm with"]
        .into_iter()
        .enumerate()
    {
        let (status, text) = job.join_within(rank, SOON);
        assert!(status.success() && text.contains(expected) && text.contains("fine"), "{rank}: {text}");
    }
}

#[test]
fn a_killed_rank_is_named_on_every_other() {
    for hosts in HOSTS {
        for victim in [0, 1, hosts.len() - 1] {
            let (mut job, _store) = start("endless", hosts, &[]);
            (0..hosts.len()).for_each(|rank| drop(job.wait_for(rank, "at work")));
            std::thread::sleep(Duration::from_millis(20));
            job.signal(victim, Signal::KILL);
            for rank in (0..hosts.len()).filter(|rank| *rank != victim) {
                let (status, text) = job.join_within(rank, SOON);
                let expected = format!("rank {rank}: lost rank {victim} in all_reduce(1048576 x f32, sum)");
                assert!(status.success() && text.contains(&expected), "{hosts}, {victim}: {text}");
            }
        }
    }
}

#[test]
fn a_stopped_rank_is_named_when_the_timeout_is_over() {
    for (hosts, victim) in [("aabb", 1), ("abab", 2), ("aaab", 3), ("aaab", 0)] {
        let (mut job, _store) = start("endless", hosts, &[("TENSORWIRE_TIMEOUT", "2")]);
        (0..4).for_each(|rank| drop(job.wait_for(rank, "at work")));
        job.signal(victim, Signal::STOP);
        for rank in (0..4).filter(|rank| *rank != victim) {
            let (status, text) = job.join_within(rank, SOON);
            let expected = format!("waiting for rank(s) [{victim}]");
            assert!(status.success() && text.contains(&expected), "{hosts}, {victim}, {rank}: {text}");
        }
        job.signal(victim, Signal::CONT);
        let (_, text) = job.join_within(victim, SOON);
        assert!(text.contains("timed out after") || text.contains("lost rank"), "{text}");
    }
}

#[test]
fn a_rank_that_leaves_or_differs_is_named() {
    for hosts in ["aabb", "abab", "aab"] {
        let last = hosts.len() - 1;
        let (mut job, _store) = start("leave", hosts, &[]);
        for rank in 0..last {
            let (status, text) = job.join_within(rank, SOON);
            let expected = format!("rank {rank}: lost rank {last} in barrier()");
            assert!(status.success() && text.contains(&expected), "{hosts}: {text}");
        }
        let (mut job, _store) = start("mismatch", hosts, &[]);
        for rank in 0..=last {
            let (status, text) = job.join_within(rank, SOON);
            let odd = format!("rank {last} called all_reduce(999 x f32, sum)");
            let both = ["all_reduce(1000 x f32, sum)", &odd];
            assert!(status.success() && both.iter().all(|call| text.contains(call)), "{hosts}: {text}");
        }
    }
}

#[test]
fn abort_from_another_thread_reaches_every_rank() {
    for hosts in ["aabb", "abab", "aab", "abb"] {
        let (mut job, _store) = start("abort", hosts, &[]);
        for rank in 0..hosts.len() {
            let (status, text) = job.join_within(rank, SOON);
            let expected = format!("rank {rank}: rank 0 ended the group during");
            assert!(status.success() && text.contains(&expected) && text.contains("pressed stop"), "{text}");
        }
    }
}

/// Rank 0 waits in memory for rank 1 of its host, which computes; nobody there listens to the network.
#[test]
fn an_abort_reaches_those_who_wait_in_memory_on_another_host() {
    const HANG: Duration = Duration::from_secs(60);
    for hosts in ["aab", "aabb", "aabbcc"] {
        let host = |rank: usize| usize::from(hosts.as_bytes()[rank]);
        let told = Barrier::new(hosts.len());
        mixed_threads(host, hosts.len(), &Options { timeout: HANG, ..Options::default() }, |comm| {
            comm.barrier().unwrap();
            let last = hosts.len() - 1;
            if comm.rank() == last {
                // Rank 0 has come to wait.
                std::thread::sleep(Duration::from_millis(100));
                comm.abort("pressed stop");
            }
            if comm.rank() == 1 {
                told.wait();
            }
            let error = comm.all_reduce(&mut [1f32; 1000], ReduceOp::Sum).unwrap_err();
            let named =
                matches!(&error, Error::Aborted { by, why, .. } if (*by, &**why) == (last, "pressed stop"));
            assert!(named, "{hosts}, rank {}: {error}", comm.rank());
            if comm.rank() != 1 {
                told.wait();
            }
        });
    }
}

#[test]
fn the_order_of_sums_holds_where_it_must() {
    for hosts in ["aabb", "abab", "aaab", "aabbcc", "abcabb"] {
        let host = |rank: usize| usize::from(hosts.as_bytes()[rank]);
        mixed_threads(host, hosts.len(), &Options::default(), |comm| {
            for len in [0, 1, 5, 1000, 100_003] {
                // A sum's bits depend on the order, a maximum's don't.
                for (op, algorithm) in
                    [(ReduceOp::Sum, None), (ReduceOp::Average, None), (ReduceOp::Max, Some(()))]
                {
                    let chosen = comm.algorithm_for(len * 4, tensorwire::DType::F32, op).unwrap();
                    assert_eq!(chosen == Algorithm::Hierarchical, algorithm.is_some());
                    let mut x = buffer::<f32>(comm.rank(), len);
                    comm.all_reduce(&mut x, op).unwrap();
                    assert_same(&x, &reduced(op, comm.world(), len), format_args!("{hosts}, {op} of {len}"));
                }
            }
            // In any order all ranks have the same.
            comm.set_algorithm(Some(Algorithm::Hierarchical)).unwrap();
            for op in [ReduceOp::Sum, ReduceOp::Average, ReduceOp::PreScaledSum(0.3)] {
                let len = 10_007;
                let mut x = buffer::<f32>(comm.rank(), len);
                comm.all_reduce(&mut x, op).unwrap();
                let mut all = vec![0f32; len * comm.world()];
                comm.all_gather(&x, &mut all).unwrap();
                all.chunks(len).for_each(|theirs| assert_same(theirs, &x, "ranks differ"));
                for (got, right) in x.iter().zip(reduced::<f32>(op, comm.world(), len)) {
                    assert!((got - right).abs() < 1e-5, "{got}, not {right}");
                }
            }
        });
    }
}

/// Reduce-scatters of sums in any order, which are those in rank order but for how they are rounded.
pub(crate) fn scattered() {
    let comm = Communicator::from_env().unwrap();
    let (me, world) = (comm.rank(), comm.world());
    for len in [0, 1, 1001, 60_000] {
        for op in [ReduceOp::Sum, ReduceOp::Average, ReduceOp::PreScaledSum(0.3)] {
            let right = &reduced::<f32>(op, world, world * len)[me * len..][..len];
            let input = buffer::<f32>(me, world * len);
            let (mut apart, mut in_place) = (vec![0f32; len], input.clone());
            comm.reduce_scatter(&input, &mut apart, op).unwrap();
            comm.reduce_scatter_in_place(&mut in_place, op).unwrap();
            assert_same(&in_place[me * len..][..len], &apart, format_args!("{op} of {len} in place"));
            assert!(apart.iter().zip(right).all(|(got, right)| (got - right).abs() < 1e-5), "{op} of {len}");
        }
    }
    comm.barrier().unwrap();
    println!("\nfine");
}

#[test]
fn reduce_scatters_in_any_order_are_right() {
    for hosts in ["aabb", "abab", "aabbcc", "aab"] {
        let (mut job, _store) = start("scattered", hosts, &[("TENSORWIRE_ANY_ORDER", "1")]);
        for rank in 0..hosts.len() {
            let (status, text) = job.join_within(rank, SOON);
            assert!(status.success() && text.contains("\nfine"), "{hosts}: {text}");
        }
    }
}
