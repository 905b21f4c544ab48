//! Groups of some of the ranks, symmetric buffers and prepared calls.

use tensorwire::{Error, Options, ReduceOp};

use crate::common::{Over, assert_same, buffer, reduced, threads};

#[test]
fn groups_split_by_color_and_key_are_independent() {
    for over in Over::ALL {
        over.threads(5, &Options::default(), |comm| {
            // Ranks 4, 2, 0 in one group, in that order; 3 and 1 in the other; each renumbered.
            let color = comm.rank() as u32 % 2;
            let group = comm.split(Some(color), -(comm.rank() as i32)).unwrap().unwrap();
            assert_eq!(group.world(), if color == 0 { 3 } else { 2 });
            assert_eq!(group.rank(), [2, 1, 1, 0, 0][comm.rank()]);
            // The groups make different calls, and calls of the whole group go in between.
            for i in 0..50usize {
                let mut x = [comm.rank() as f32];
                if color == 0 {
                    group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                    assert_eq!(x, [6.0]);
                } else {
                    let mut all = [0f32; 2];
                    group.all_gather(&x, &mut all).unwrap();
                    assert_eq!(all, [3.0, 1.0]);
                }
                if i % 7 == 0 {
                    let mut x = buffer::<f32>(comm.rank(), 5000);
                    comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                    assert_same(&x, &reduced(ReduceOp::Sum, 5, 5000), "the whole group's");
                }
            }
        });
    }
}

#[test]
fn a_group_of_a_group_and_ranks_without_one() {
    for over in Over::ALL {
        over.threads(4, &Options::default(), |comm| {
            let three = comm.subgroup(&[3, 0, 2]).unwrap();
            assert_eq!(three.is_some(), comm.rank() != 1);
            if let Some(three) = three {
                assert_eq!(three.rank(), [1, 9, 2, 0][comm.rank()]);
                let two = three.subgroup(&[2, 1]).unwrap();
                assert_eq!(two.is_some(), comm.rank() != 3);
                if let Some(two) = two {
                    let mut x = [comm.rank() as f32];
                    two.broadcast(&mut x, 0).unwrap();
                    assert_eq!(x, [2.0]);
                }
                let one = three.split(Some(three.rank() as u32), 0).unwrap().unwrap();
                let mut x = [1f32];
                one.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                assert_eq!((one.world(), x), (1, [1.0]));
            }
            for wrong in [&[0, 0][..], &[4]] {
                let error = comm.subgroup(wrong).unwrap_err();
                assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
            }
            comm.barrier().unwrap();
        });
    }
}

#[test]
fn a_group_that_fails_leaves_the_others_alone() {
    for over in Over::ALL {
        over.threads(4, &Options::default(), |comm| {
            let pair = comm.split(Some(comm.rank() as u32 / 2), 0).unwrap().unwrap();
            if comm.rank() == 0 {
                drop(pair);
            } else if comm.rank() == 1 {
                let error = pair.barrier().unwrap_err();
                assert!(matches!(error, Error::PeerLost { peer: 0, .. }), "{error}");
            } else {
                pair.barrier().unwrap();
            }
            comm.barrier().unwrap();
        });
    }
}

#[test]
fn memory_goes_back_when_groups_and_buffers_are_dropped() {
    threads(2, &Options::default(), |comm| {
        // 32 GiB of buffers and slots in all, more than the machine has, one after the other.
        for i in 0..500 {
            let mut x = comm.symmetric::<f32>(8 << 20).unwrap();
            x[i] = 1.0;
            comm.all_reduce_symmetric(&mut x, ReduceOp::Sum).unwrap();
            assert_eq!((x[i], x[i + 1]), (2.0, 0.0));
            let group = comm.split(Some(0), 0).unwrap().unwrap();
            group.barrier().unwrap();
        }
    });
}

#[test]
fn too_large_a_buffer_is_refused_on_every_rank_and_nothing_breaks() {
    threads(3, &Options::default(), |comm| {
        let error = comm.symmetric::<f64>(1 << 40).unwrap_err();
        assert!(matches!(error, Error::Os { .. } | Error::Rendezvous { .. }), "{error}");
        assert!(matches!(comm.symmetric::<f64>(usize::MAX).unwrap_err(), Error::InvalidArgument(_)));
        comm.barrier().unwrap();
    });
}

#[test]
fn a_symmetric_buffer_belongs_to_its_communicator() {
    threads(2, &Options::default(), |comm| {
        let other = comm.split(Some(0), 0).unwrap().unwrap();
        let mut x = other.symmetric::<f32>(100_000).unwrap();
        let error = comm.all_reduce_symmetric(&mut x, ReduceOp::Sum).unwrap_err().to_string();
        assert!(error.contains("another communicator's"), "{error}");
        other.all_reduce_symmetric(&mut x, ReduceOp::Sum).unwrap();
    });
}

#[test]
fn prepared_calls_are_the_same_calls() {
    for over in Over::ALL {
        over.threads(3, &Options::default(), |comm| {
            for len in [2usize, 1000, 100_000] {
                let plan = comm.all_reduce_plan::<f32>(len, ReduceOp::Sum).unwrap();
                for _ in 0..3 {
                    let mut x = buffer::<f32>(comm.rank(), len);
                    // One rank calls it by its other name.
                    if comm.rank() == 1 {
                        comm.all_reduce(&mut x, ReduceOp::Sum).unwrap()
                    } else {
                        plan.run(&mut x).unwrap()
                    }
                    assert_same(&x, &reduced(ReduceOp::Sum, 3, len), "prepared");
                }
                assert!(matches!(plan.run(&mut vec![0f32; len + 1]).unwrap_err(), Error::InvalidArgument(_)));
            }
            assert!(comm.all_reduce_plan::<f32>(1, ReduceOp::BitOr).is_err());
        });
    }
}

#[test]
fn survivors_go_on_without_a_rank_that_left() {
    threads(4, &Options::default(), |comm| {
        comm.barrier().unwrap();
        if comm.rank() == 1 {
            return;
        }
        let error = comm.barrier().unwrap_err();
        assert!(matches!(error, Error::PeerLost { peer: 1, .. }), "{error}");
        let next = comm.shrink().unwrap();
        assert_eq!((next.rank(), next.world()), ([0, 9, 1, 2][comm.rank()], 3));
        let mut x = buffer::<f32>(next.rank(), 100_000);
        next.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert_same(&x, &reduced(ReduceOp::Sum, 3, 100_000), "after shrinking");
        assert!(matches!(comm.barrier().unwrap_err(), Error::Poisoned { .. }));
    });
}

#[test]
fn abort_ends_a_call_that_waits_on_every_rank() {
    for over in Over::ALL {
        over.threads(3, &Options::default(), |comm| {
            if comm.rank() == 2 {
                comm.barrier().unwrap();
                comm.abort("the user pressed stop");
            }
            // Some may still be in the first barrier.
            let error = std::iter::repeat_with(|| comm.barrier()).find_map(Result::err).unwrap();
            assert!(
                matches!(&error, Error::Aborted { by: 2, why, .. } if why.contains("pressed stop")),
                "{error}"
            );
        });
    }
    // From another thread of the rank that waits, for a peer that is there and doesn't come.
    for over in Over::ALL {
        let aborted = std::sync::Barrier::new(2);
        over.threads(2, &Options::default(), |comm| {
            if comm.rank() == 0 {
                std::thread::scope(|s| {
                    let waiting = s.spawn(|| comm.barrier());
                    // Most likely the call has begun by then; one that begins later must be told as well.
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    comm.abort("enough");
                    let error = waiting.join().unwrap().unwrap_err();
                    assert!(error.to_string().contains("enough"), "{error}");
                });
            }
            aborted.wait();
        });
    }
}

#[test]
fn messages_that_do_not_fit_are_named_on_both_sides() {
    for over in Over::ALL {
        over.threads(2, &Options::default(), |comm| {
            let result = match comm.rank() {
                0 => comm.send(&[1f32; 3], 1).and_then(|()| comm.barrier()),
                _ => comm.recv(&mut [0f32; 4], 0),
            };
            let error = result.unwrap_err().to_string();
            assert!(
                error.contains("send(3 x f32, to 1)") && error.contains("recv(4 x f32, from 0)"),
                "{error}"
            );
        });
        over.threads(3, &Options::default(), |comm| {
            let (sends, receives) = ([1; 3], if comm.rank() == 1 { [2, 1, 1] } else { [1; 3] });
            let mut out = vec![0f32; receives.iter().sum()];
            let error = comm.all_to_all_v(&[0f32; 3], &sends, &mut out, &receives).unwrap_err().to_string();
            assert!(error.contains("rank 0 sends 4 bytes to rank 1, which expects 8"), "{error}");
        });
    }
}
