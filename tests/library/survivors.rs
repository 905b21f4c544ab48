//! Ranks that die one after the other, or stop while the others decide how to go on; and groups that are used at
//! once.

use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use tensorwire::{Communicator, Error, Options, ReduceOp};

use crate::common::{Over, threads};
use crate::job::{Job, await_point, reach};

/// Far more than anything here takes, and far less than a timeout that isn't set.
const SOON: Duration = Duration::from_secs(20);

/// Sends this process a signal that ends or stops it.
fn end(signal: Signal) {
    kill_process(getpid(), signal).unwrap();
    // Sent to the process, it may reach other threads before this one.
    loop {
        std::thread::park();
    }
}

/// Waits until `rank` is seen to wait for `peer`.
fn await_wait(comm: &Communicator, rank: usize, peer: usize) {
    while comm.flight_record().ranks[rank].waits_for != Some(peer) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Rank 1 dies while rank 0 is busy elsewhere and rank 2 waits for rank 0.
pub(crate) fn bystander() {
    let comm = Communicator::from_env().unwrap();
    comm.barrier().unwrap();
    match comm.rank() {
        0 => await_point("rank 2 knows"),
        1 => {
            await_wait(&comm, 2, 0);
            end(Signal::KILL);
        }
        _ => {}
    }
    let error = comm.all_reduce(&mut [1f32; 1000], ReduceOp::Sum).unwrap_err();
    assert!(matches!(error, Error::PeerLost { peer: 1, .. }), "{error}");
    println!("\nknown");
}

#[test]
fn a_death_is_known_while_waiting_for_one_that_is_slow() {
    let mut job = Job::start("bystander", 3, &[]);
    for rank in [2, 0] {
        let (status, text) = job.join_within(rank, SOON);
        assert!(status.success() && text.contains("known"), "{text}");
        job.reach("rank 2 knows");
    }
}

/// All but one rank are killed, one after the other, each at a moment of its own, wherever it is then; the rest go
/// on each time.
pub(crate) fn dwindle() {
    let mut comm = Communicator::from_env().unwrap();
    let (me, ranks) = (comm.rank(), comm.world());
    let seed: usize = std::env::var("FAULT_SEED").unwrap().parse().unwrap();
    if me != seed % ranks {
        let moment = 1 + (me * 7919 + seed * 104_729) % 60;
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20 + moment as u64));
            end(Signal::KILL);
        });
    }
    while comm.world() > 1 {
        // Each rank's bit once: whose is missing is gone.
        let mut x = vec![1u32 << me; 10_000];
        match comm.all_reduce(&mut x, ReduceOp::Sum) {
            Ok(()) => {
                assert!(x.iter().all(|bits| *bits == x[0]) && x[0].count_ones() as usize == comm.world());
                assert!(x[0] >> me & 1 == 1 && x[0] >> ranks == 0);
            }
            Err(error) => {
                assert!(matches!(error, Error::PeerLost { .. }), "{error}");
                comm = comm.shrink().unwrap();
            }
        }
    }
    println!("alone");
}

#[test]
fn ranks_that_die_one_after_the_other_leave_one_that_goes_on() {
    for seed in 0..8 {
        let text = seed.to_string();
        let mut job = Job::start("dwindle", 5, &[("FAULT_SEED", &text)]);
        let (status, text) = job.join_within(seed % 5, SOON);
        assert!(status.success() && text.contains("alone"), "seed {seed}: {text}");
    }
}

/// Rank 2 leaves. Rank 0 waits for rank 1 to go on with it, as the one who would decide, and is stopped there; then rank
/// 1 comes.
pub(crate) fn undecided() {
    let comm = Communicator::from_env().unwrap();
    comm.barrier().unwrap();
    if comm.rank() == 2 {
        return;
    }
    assert!(comm.barrier().is_err());
    std::thread::scope(|s| {
        match comm.rank() {
            0 => drop(s.spawn(|| {
                await_wait(&comm, 0, 1);
                kill_process(getpid(), Signal::STOP).unwrap();
            })),
            _ => await_point("rank 0 is stopped"),
        }
        match comm.shrink() {
            Ok(next) => println!("rank {} goes on as one of {}", comm.rank(), next.world()),
            Err(error) => println!("{error}"),
        }
    });
}

#[test]
fn a_rank_that_stops_while_it_decides_is_left_behind() {
    let mut job = Job::start("undecided", 3, &[("TENSORWIRE_TIMEOUT", "2")]);
    job.await_stop(0);
    job.reach("rank 0 is stopped");
    let (status, text) = job.join_within(1, SOON);
    assert!(status.success() && text.contains("rank 1 goes on as one of 1"), "{text}");
    job.signal(0, Signal::CONT);
    let (_, text) = job.join_within(0, SOON);
    assert!(text.contains("ranks [1] went on without this one"), "{text}");
}

#[test]
fn a_group_is_shrunk_once() {
    for over in Over::ALL {
        over.threads(2, &Options::default(), |comm| {
            let next = comm.shrink().unwrap();
            next.barrier().unwrap();
            let error = comm.shrink().unwrap_err();
            assert!(
                matches!(&error, Error::InvalidArgument(why) if why.contains("shrunk before")),
                "{error}"
            );
            next.barrier().unwrap();
        });
    }
}

/// Rank 2 goes in the middle of calls that the others have sent for already: nothing of those calls is taken for the
/// next group's, whose calls are the same.
#[test]
fn what_was_sent_before_the_end_is_no_data_of_the_next_group() {
    for over in Over::ALL {
        over.threads(4, &Options::default(), |comm| {
            comm.barrier().unwrap();
            if comm.rank() == 2 {
                return;
            }
            for round in 1.. {
                let mut x = vec![round << 8 | 1u32 << comm.rank(); 5000];
                // Messages that nobody has asked for yet, and a part in a sum that can't be had.
                let told = comm.send(&[round], (comm.rank() + 1) % 4);
                if told.and_then(|()| comm.all_reduce(&mut x, ReduceOp::Sum)).is_err() {
                    break;
                }
            }
            let next = comm.shrink().unwrap();
            assert_eq!((next.world(), next.rank()), (3, [0, 1, 9, 2][comm.rank()]));
            let mut x = vec![1u32 << comm.rank(); 5000];
            next.all_reduce(&mut x, ReduceOp::Sum).unwrap();
            assert!(x.iter().all(|bits| *bits == 0b1011));
            let (to, from) = ((next.rank() + 1) % 3, (next.rank() + 2) % 3);
            let mut y = [0u32];
            next.send_recv(&[77 + next.rank() as u32], to, &mut y, from).unwrap();
            assert_eq!(y, [77 + from as u32]);
            // Also where the old group is let go of, and others are made of the new one.
            drop(comm);
            let pair = next.split(Some(next.rank() as u32 / 2), 0).unwrap().unwrap();
            pair.barrier().unwrap();
            next.barrier().unwrap();
        });
    }
}

/// Rank 2 is stopped in its turn of a group of two. The other of the two waits for it there, and is waited for itself by
/// the whole group.
pub(crate) fn indirect() {
    let comm = Communicator::from_env().unwrap();
    let pair = comm.split(Some((comm.rank() % 2) as u32), 0).unwrap().unwrap();
    comm.barrier().unwrap();
    match comm.rank() {
        0 => reach("rank 0 waits"),
        1 => await_point("rank 0 waits"),
        _ => end(Signal::STOP),
    }
    let in_pair = pair.barrier();
    let in_all = comm.barrier();
    for error in [in_pair.err(), in_all.err()].into_iter().flatten() {
        assert!(matches!(&error, Error::Timeout { waiting_for, .. } if !waiting_for.contains(&0)), "{error}");
    }
    if comm.rank() != 2 {
        assert_eq!(comm.shrink().unwrap().world(), 2);
    }
    println!("told");
}

#[test]
fn who_waits_in_another_group_is_not_blamed() {
    // Where rank 0's own timeout is later than rank 1's, rank 1 must find out who it is, and wait until rank 0 gives up
    // as well: for longer than it would otherwise.
    for late in ["2", "5"] {
        let timeout = |rank| if rank == 0 { late } else { "2" };
        let mut job = Job::start_each("indirect", 3, |rank| vec![("TENSORWIRE_TIMEOUT", timeout(rank))]);
        for rank in [0, 1] {
            let (status, text) = job.join_within(rank, SOON);
            assert!(status.success() && text.contains("told"), "{text}");
        }
    }
}

#[test]
fn two_groups_of_the_same_ranks_are_used_at_once() {
    threads(2, &Options::default(), |comm| {
        let groups = [0, 1].map(|_| comm.split(Some(0), 0).unwrap().unwrap());
        std::thread::scope(|s| {
            for (which, group) in groups.iter().enumerate() {
                s.spawn(move || {
                    for i in 0..3000usize {
                        // Both carry the same kinds of calls, at other moments and with other data.
                        let len = [2, 500, 40_000][(i + which) % 3];
                        let mut x = vec![(i + which + group.rank()) as u32; len];
                        group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                        assert!(x.iter().all(|x| *x as usize == 2 * (i + which) + 1));
                    }
                });
            }
        });
        comm.barrier().unwrap();
    });
}
