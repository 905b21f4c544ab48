//! Every collective, checked element by element against its definition, over worlds of 1 to 9 ranks, lengths
//! around every boundary, and every type and operation. Ranks are threads, over the same shared memory or TCP connections
//! that processes use.

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};
use tensorwire::{Algorithm, Communicator, DType, Options, ReduceOp};

use crate::checks::*;
use crate::common::{Over, threads};

/// Slots so small that a few thousand elements take many chunks.
fn small_slots() -> Options {
    Options { slot_bytes: 8 * 4096, ..Options::default() }
}

#[test]
fn every_collective_and_length_at_1_to_9_ranks() {
    for world in 1..=9 {
        threads(world, &small_slots(), |comm| {
            everything::<f32>(&comm);
            everything::<bf16>(&comm);
        });
    }
}

/// Every result is compared with the definition's, bit by bit, as those over shared memory are: the transports agree.
#[cfg(feature = "tcp")]
#[test]
fn every_collective_at_1_to_9_ranks_over_networks() {
    for (over, world) in Over::ALL[1..].iter().flat_map(|over| (1..=9).map(move |world| (over, world))) {
        over.threads(world, &Options::default(), |comm| {
            everything_of::<f32>(&comm, &[0, 1, 13, 1025, 20_011]);
            everything_of::<bf16>(&comm, &[0, 3, 4099]);
        });
    }
}

#[cfg(feature = "tcp")]
#[test]
fn every_collective_over_several_hosts_that_share_memory() {
    use crate::common::Layout::{AllButOne, Alternating, Halves};
    for (layout, world) in [Halves, Alternating, AllButOne].iter().flat_map(|l| (2..=6).map(move |w| (l, w)))
    {
        Over::Mixed(*layout).threads(world, &small_slots(), |comm| {
            everything_of::<f32>(&comm, &[0, 1, 13, 1025, 20_011]);
            everything_of::<bf16>(&comm, &[0, 3, 4099]);
        });
    }
}

#[test]
fn every_type_and_operation() {
    for (over, world) in Over::ALL.iter().flat_map(|over| [1, 2, 3].map(|world| (over, world))) {
        over.threads(world, &small_slots(), |comm| {
            everything::<f64>(&comm);
            everything::<f16>(&comm);
            everything::<F8E4M3>(&comm);
            everything::<F8E5M2>(&comm);
            everything::<i8>(&comm);
            everything::<u8>(&comm);
            everything::<i32>(&comm);
            everything::<u32>(&comm);
            everything::<i64>(&comm);
            everything::<u64>(&comm);
        });
    }
}

#[test]
fn an_operation_that_a_type_lacks_is_refused_before_anything_is_sent() {
    threads(2, &small_slots(), |comm| {
        for error in [
            comm.all_reduce(&mut [1i32], ReduceOp::Average).unwrap_err(),
            comm.all_reduce(&mut [1f32], ReduceOp::BitAnd).unwrap_err(),
            comm.reduce_scatter(&[1u8; 2], &mut [0u8], ReduceOp::PreScaledSum(2.0)).unwrap_err(),
        ] {
            assert!(error.to_string().contains("is not defined for"), "{error}");
        }
        all_reduce::<i32>(&comm, 5, ReduceOp::Sum);
    });
}

#[test]
fn large_buffers_with_the_default_slots() {
    for (over, world) in Over::ALL.iter().flat_map(|over| [2, 3].map(|world| (over, world))) {
        over.threads(world, &Options::default(), |comm| {
            let len = (3 << 20) + 5;
            all_reduce::<f32>(&comm, len, ReduceOp::Sum);
            all_gather::<f32>(&comm, len / 4);
            reduce_scatter::<bf16>(&comm, len / 2, ReduceOp::Sum);
            broadcast::<f16>(&comm, len);
            reduce::<f32>(&comm, len, ReduceOp::Sum);
            all_reduce_into::<bf16>(&comm, len, ReduceOp::Sum);
            all_to_all::<u8>(&comm, len / 2);
            in_place::<f32>(&comm, len / 4, ReduceOp::Average);
            out_of_place::<bf16>(&comm, len, ReduceOp::Max);
            messages::<f32>(&comm, len);
        });
    }
}

#[test]
fn every_algorithm_gives_the_same_bits() {
    for (over, world) in Over::ALL.iter().flat_map(|over| [2, 3, 5].map(|world| (over, world))) {
        over.threads(world, &small_slots(), |comm| {
            for len in [1usize, 7, 12, 500, 1024] {
                for algorithm in Algorithm::ALL.iter().filter(|a| a.keeps_order(DType::F32, ReduceOp::Sum)) {
                    comm.set_algorithm(Some(*algorithm)).unwrap();
                    if comm.algorithm(len * 4).is_ok() {
                        all_reduce::<f32>(&comm, len, ReduceOp::Sum);
                    }
                }
            }
            comm.set_algorithm(Some(Algorithm::Inline)).unwrap();
            let error = comm.all_reduce(&mut [0f32; 13], ReduceOp::Sum).unwrap_err().to_string();
            assert!(error.contains("inline carries at most 48 bytes, not 52"), "{error}");
            comm.set_algorithm(None).unwrap();
            all_reduce::<f32>(&comm, 13, ReduceOp::Sum);
        });
    }
}

#[test]
fn special_values_come_out_alike_on_every_rank() {
    let specials =
        [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MIN_POSITIVE / 4.0, f32::MAX, 1.0];
    for (over, world) in Over::ALL.iter().flat_map(|over| [2, 3, 4].map(|world| (over, world))) {
        over.threads(world, &small_slots(), |comm| {
            for len in [8usize, 3000] {
                for algorithm in [None, Some(Algorithm::TwoShot)] {
                    comm.set_algorithm(algorithm).unwrap();
                    let mut x: Vec<f32> = (0..len).map(|i| specials[(i + i / 8 * comm.rank()) % 8]).collect();
                    comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                    let bits: Vec<u32> = x.iter().map(|x| x.to_bits()).collect();
                    // Each rank compares its bits with rank 0's, carried as f32 without arithmetic.
                    let mut theirs = x.clone();
                    comm.broadcast(&mut theirs, 0).unwrap();
                    assert_eq!(theirs.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), bits);
                    assert!(bits.iter().all(|b| !f32::from_bits(*b).is_nan() || *b == 0x7fc0_0000));
                }
            }
        });
    }
}

#[test]
fn a_million_small_calls_in_a_row() {
    threads(2, &Options::default(), |comm| {
        for i in 0..500_000u32 {
            let mut x = [comm.rank() as f32, i as f32];
            comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
            assert_eq!(x, [1.0, 2.0 * i as f32]);
            let mut y = [if comm.rank() == i as usize % 2 { i as f32 } else { -1.0 }];
            comm.broadcast(&mut y, i as usize % 2).unwrap();
            assert_eq!(y, [i as f32]);
        }
    });
}

#[test]
fn wrong_arguments_are_refused_before_anything_is_sent() {
    for over in Over::ALL {
        over.threads(2, &small_slots(), wrong_arguments);
    }
    assert!(Communicator::in_process(0).is_err());
}

fn wrong_arguments(comm: Communicator) {
    let wrong = [
        comm.all_gather(&[0f32; 3], &mut [0f32; 5]),
        comm.all_gather_v(&[0f32; 3], &mut [0f32; 6], &[3, 3, 0]),
        comm.all_gather_v(&[0f32; 3], &mut [0f32; 6], &[2, 4]),
        comm.all_gather_v(&[0f32; 3], &mut [0f32; 5], &[3, 3]),
        comm.reduce_scatter(&[0f32; 5], &mut [0f32; 3], ReduceOp::Sum),
        comm.broadcast(&mut [0f32; 5], 2),
        comm.all_reduce_into(&[0f32; 5], &mut [0f32; 4], ReduceOp::Sum),
        comm.reduce(&mut [0f32; 5], ReduceOp::Sum, 2),
        comm.gather(&[0f32; 5], &mut [0f32; 10], 2),
        comm.scatter_v(&[0f32; 10], &mut [0f32; 5], &[5], 0),
        comm.reduce_scatter_v(&[0f32; 5], &mut [0f32; 3], &[3, 3], ReduceOp::Sum),
        comm.all_to_all(&[0f32; 5], &mut [0f32; 5]),
        comm.all_to_all_v(&[0f32; 5], &[2, 2], &mut [0f32; 5], &[2, 3]),
        comm.all_gather_v(&[0f32; 3], &mut [0f32; 6], &[3, usize::MAX]),
        comm.send(&[0f32; 5], comm.rank()),
        comm.recv(&mut [0f32; 5], 2),
        comm.all_gather_in_place(&mut [0f32; 5]),
        comm.all_gather_v_in_place(&mut [0f32; 5], &[2, 2]),
        comm.reduce_scatter_in_place(&mut [0f32; 5], ReduceOp::Sum),
        comm.reduce_scatter_v_in_place(&mut [0f32; 5], &[5], ReduceOp::Sum),
        comm.all_to_all_in_place(&mut [0f32; 5]),
        comm.all_to_all_v_in_place(&mut [0f32; 5], &[2, 2]),
        comm.gather_in_place(&mut [0f32; 5], 2),
        comm.scatter_in_place(&mut [0f32; 5], 2),
        comm.reduce_into(&[0f32; 5], &mut [0f32; 4], ReduceOp::Sum, comm.rank()),
        comm.broadcast_into(&[0f32; 5], &mut [0f32; 4], comm.rank()),
    ];
    for error in wrong {
        let error = error.unwrap_err();
        assert!(matches!(error, tensorwire::Error::InvalidArgument(_)), "{error}");
    }
    all_reduce::<f32>(&comm, 100, ReduceOp::Sum);
}
