//! Every collective, checked element by element against its definition, over worlds of 1 to 9 ranks, lengths
//! around every boundary, and every type and operation. Ranks are threads, over the same shared memory or TCP connections
//! that processes use.

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};
use tensorwire::{Algorithm, Communicator, DType, Element, Options, ReduceOp};

use crate::common::{Over, assert_same, buffer, reduced, threads};

/// Lengths around the inline limit, cache lines, small slots and chunk boundaries, for the small slots below.
const LENGTHS: [usize; 12] = [0, 1, 2, 3, 12, 13, 24, 25, 1000, 1025, 4099, 20_011];

/// Slots so small that a few thousand elements take many chunks.
fn small_slots() -> Options {
    Options { slot_bytes: 8 * 4096, ..Options::default() }
}

fn all_reduce<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    let mut x = buffer::<T>(comm.rank(), len);
    comm.all_reduce(&mut x, op).unwrap();
    assert_same(&x, &reduced(op, comm.world(), len), format_args!("all_reduce {op} of {len}"));
}

fn all_gather<T: Element>(comm: &Communicator, len: usize) {
    let mut out = vec![T::zeroed(); len * comm.world()];
    comm.all_gather(&buffer::<T>(comm.rank(), len), &mut out).unwrap();
    let expected: Vec<T> = (0..comm.world()).flat_map(|r| buffer::<T>(r, len)).collect();
    assert_same(&out, &expected, "all_gather");
}

fn all_gather_v<T: Element>(comm: &Communicator, len: usize) {
    let counts = uneven(comm.world(), len);
    let mut out = vec![T::zeroed(); counts.iter().sum()];
    comm.all_gather_v(&buffer::<T>(comm.rank(), counts[comm.rank()]), &mut out, &counts).unwrap();
    let expected: Vec<T> = counts.iter().enumerate().flat_map(|(r, c)| buffer::<T>(r, *c)).collect();
    assert_same(&out, &expected, "all_gather_v");
}

fn reduce_scatter<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    let mut out = vec![T::zeroed(); len];
    comm.reduce_scatter(&buffer::<T>(comm.rank(), len * comm.world()), &mut out, op).unwrap();
    let expected = reduced(op, comm.world(), len * comm.world());
    assert_same(&out, &expected[comm.rank() * len..][..len], format_args!("reduce_scatter {op} of {len}"));
}

fn broadcast<T: Element>(comm: &Communicator, len: usize) {
    for root in 0..comm.world() {
        let mut x = buffer::<T>(comm.rank(), len);
        comm.broadcast(&mut x, root).unwrap();
        assert_same(&x, &buffer::<T>(root, len), "broadcast");
    }
}

fn all_reduce_into<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    let (input, mut out) = (buffer::<T>(comm.rank(), len), vec![T::zeroed(); len]);
    comm.all_reduce_into(&input, &mut out, op).unwrap();
    assert_same(&out, &reduced(op, comm.world(), len), format_args!("all_reduce_into {op} of {len}"));
    assert_same(&input, &buffer::<T>(comm.rank(), len), "the input of all_reduce_into");
    if comm.transport().unwrap() != "shm" {
        let error = comm.symmetric::<T>(len).unwrap_err();
        assert!(error.to_string().contains("lies in shared memory"), "{error}");
        return;
    }
    let mut x = comm.symmetric::<T>(len).unwrap();
    x.copy_from_slice(&input);
    comm.all_reduce_symmetric(&mut x, op).unwrap();
    assert_same(&x, &out, format_args!("all_reduce_symmetric {op} of {len}"));
}

fn reduce<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    for root in 0..comm.world() {
        let mut x = buffer::<T>(comm.rank(), len);
        comm.reduce(&mut x, op, root).unwrap();
        let expected =
            if comm.rank() == root { reduced(op, comm.world(), len) } else { buffer(comm.rank(), len) };
        assert_same(&x, &expected, format_args!("reduce {op} of {len} to {root}"));
    }
}

/// Uneven counts, with an empty block for every third rank.
fn uneven(world: usize, len: usize) -> Vec<usize> {
    (0..world).map(|r| if r % 3 == 1 { 0 } else { len + r * 7 }).collect()
}

fn gather_and_scatter<T: Element>(comm: &Communicator, len: usize) {
    let (rank, world) = (comm.rank(), comm.world());
    for root in [0, world - 1] {
        for counts in [vec![len; world], uneven(world, len)] {
            let even = counts == vec![len; world];
            let whole: Vec<T> = counts.iter().enumerate().flat_map(|(r, c)| buffer::<T>(r, *c)).collect();
            let own = buffer::<T>(rank, counts[rank]);
            let mut out = vec![T::zeroed(); if rank == root { whole.len() } else { 0 }];
            match even {
                true => comm.gather(&own, &mut out, root).unwrap(),
                false => comm.gather_v(&own, &mut out, &counts, root).unwrap(),
            }
            let input = if rank == root { &whole[..] } else { &[] };
            assert_same(&out, input, "gather");
            let mut back = vec![T::zeroed(); counts[rank]];
            match even {
                true => comm.scatter(input, &mut back, root).unwrap(),
                false => comm.scatter_v(input, &mut back, &counts, root).unwrap(),
            }
            assert_same(&back, &own, "scatter");
        }
    }
}

fn reduce_scatter_v<T: Element>(comm: &Communicator, len: usize) {
    let counts = uneven(comm.world(), len);
    let (start, total) = (counts[..comm.rank()].iter().sum::<usize>(), counts.iter().sum());
    let mut out = vec![T::zeroed(); counts[comm.rank()]];
    comm.reduce_scatter_v(&buffer::<T>(comm.rank(), total), &mut out, &counts, ReduceOp::Sum).unwrap();
    assert_same(&out, &reduced(ReduceOp::Sum, comm.world(), total)[start..][..out.len()], "reduce_scatter_v");
}

fn all_to_all<T: Element>(comm: &Communicator, len: usize) {
    let (rank, world) = (comm.rank(), comm.world());
    let mut out = vec![T::zeroed(); len * world];
    comm.all_to_all(&buffer::<T>(rank, len * world), &mut out).unwrap();
    let expected: Vec<T> =
        (0..world).flat_map(|r| buffer::<T>(r, len * world)[rank * len..][..len].to_vec()).collect();
    assert_same(&out, &expected, "all_to_all");

    // Rank `a` sends `b` this many: different for each pair, and none for some.
    let count = |a: usize, b: usize| if (a + b) % 4 == 3 { 0 } else { len + 3 * a + 11 * b };
    let message = |a: usize, b: usize| buffer::<T>(a * world + b, count(a, b));
    let sends: Vec<usize> = (0..world).map(|r| count(rank, r)).collect();
    let receives: Vec<usize> = (0..world).map(|r| count(r, rank)).collect();
    let input: Vec<T> = (0..world).flat_map(|r| message(rank, r)).collect();
    let expected: Vec<T> = (0..world).flat_map(|r| message(r, rank)).collect();
    let mut out = vec![T::zeroed(); expected.len()];
    comm.all_to_all_v(&input, &sends, &mut out, &receives).unwrap();
    assert_same(&out, &expected, "all_to_all_v");
}

/// Uneven counts for blocks that change places: as many from `a` to `b` as from `b` to `a`.
fn mutual(rank: usize, world: usize, len: usize) -> Vec<usize> {
    (0..world).map(|r| if (rank + r) % 4 == 3 { 0 } else { len + 5 * (rank + r) }).collect()
}

/// Each form that works in place gives what the other form gives, and half the ranks call that other form: the two
/// meet.
fn in_place<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    let (rank, world) = (comm.rank(), comm.world());
    for counts in [vec![len; world], uneven(world, len)] {
        let even = counts == vec![len; world];
        let before = |r: usize| counts[..r].iter().sum::<usize>();
        let (start, total) = (before(rank), before(world));
        let own = start..start + counts[rank];
        let input = buffer::<T>(rank, total);
        let gathered: Vec<T> = (0..world).flat_map(|r| buffer::<T>(r, counts[r])).collect();
        // Where nothing is to be read there are other bytes than expected.
        let mut blocks: Vec<T> = buffer::<T>(world + 1, total);
        blocks[own.clone()].copy_from_slice(&gathered[own.clone()]);

        let mut x = blocks.clone();
        match (even, rank % 2 == 0) {
            (true, true) => comm.all_gather_in_place(&mut x),
            (false, true) => comm.all_gather_v_in_place(&mut x, &counts),
            (true, false) => comm.all_gather(&blocks[own.clone()], &mut x),
            (false, false) => comm.all_gather_v(&blocks[own.clone()], &mut x, &counts),
        }
        .unwrap();
        assert_same(&x, &gathered, "all_gather_in_place");

        let mut x = input.clone();
        let mut expected = input.clone();
        expected[own.clone()].copy_from_slice(&reduced::<T>(op, world, total)[own.clone()]);
        match (even, rank % 2 == 0) {
            (true, true) => comm.reduce_scatter_in_place(&mut x, op),
            (false, true) => comm.reduce_scatter_v_in_place(&mut x, &counts, op),
            (true, false) => comm.reduce_scatter(&input, &mut x[own.clone()], op),
            (false, false) => comm.reduce_scatter_v(&input, &mut x[own.clone()], &counts, op),
        }
        .unwrap();
        assert_same(&x, &expected, format_args!("reduce_scatter_in_place {op}"));

        for root in [0, world - 1] {
            let mut x = if rank == root { blocks.clone() } else { blocks[own.clone()].to_vec() };
            let as_it_was = x.clone();
            match even {
                true => comm.gather_in_place(&mut x, root).unwrap(),
                false => comm.gather_v_in_place(&mut x, &counts, root).unwrap(),
            }
            assert_same(&x, if rank == root { &gathered } else { &as_it_was }, "gather_in_place");
            match even {
                true => comm.scatter_in_place(&mut x, root).unwrap(),
                false => comm.scatter_v_in_place(&mut x, &counts, root).unwrap(),
            }
            assert_same(&x, if rank == root { &gathered } else { &as_it_was }, "scatter_in_place");
            if rank != root {
                x.fill(T::zeroed());
            }
            match even {
                true => comm.scatter_in_place(&mut x, root).unwrap(),
                false => comm.scatter_v_in_place(&mut x, &counts, root).unwrap(),
            }
            assert_same(&x, if rank == root { &gathered } else { &as_it_was }, "scatter_in_place");
        }
    }
    let block = |r: usize| buffer::<T>(r, len * world)[rank * len..][..len].to_vec();
    let mut x = buffer::<T>(rank, len * world);
    comm.all_to_all_in_place(&mut x).unwrap();
    assert_same(&x, &(0..world).flat_map(block).collect::<Vec<_>>(), "all_to_all_in_place");
    let (counts, message) =
        (mutual(rank, world, len), |a: usize, b: usize| buffer::<T>(a * world + b, mutual(a, world, len)[b]));
    let mut x: Vec<T> = (0..world).flat_map(|r| message(rank, r)).collect();
    comm.all_to_all_v_in_place(&mut x, &counts).unwrap();
    let expected: Vec<T> = (0..world).flat_map(|r| message(r, rank)).collect();
    assert_same(&x, &expected, "all_to_all_v_in_place");
}

/// The forms that leave their input as it is.
fn out_of_place<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    let (rank, world) = (comm.rank(), comm.world());
    for root in 0..world {
        let input = buffer::<T>(rank, len);
        let mut out = vec![T::zeroed(); if rank == root { len } else { 3 }];
        let untouched = out.clone();
        comm.reduce_into(&input, &mut out, op, root).unwrap();
        let expected = if rank == root { reduced::<T>(op, world, len) } else { untouched };
        assert_same(&out, &expected, format_args!("reduce_into {op} of {len} to {root}"));
        let mut out = vec![T::zeroed(); len];
        comm.broadcast_into(if rank == root { &input } else { &[] }, &mut out, root).unwrap();
        assert_same(&out, &buffer::<T>(root, len), "broadcast_into");
    }
}

fn messages<T: Element>(comm: &Communicator, len: usize) {
    let (rank, world) = (comm.rank(), comm.world());
    if world == 1 {
        return;
    }
    // Around the ring, everybody at once.
    let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
    let mut got = vec![T::zeroed(); len];
    comm.send_recv(&buffer::<T>(rank, len), next, &mut got, before).unwrap();
    assert_same(&got, &buffer::<T>(before, len), "send_recv");
    // One after the other, of different lengths, in the order sent.
    if rank == 0 {
        comm.send(&buffer::<T>(7, len), 1).unwrap();
        comm.send(&buffer::<T>(8, 3), 1).unwrap();
    } else if rank == 1 {
        comm.recv(&mut got, 0).unwrap();
        assert_same(&got, &buffer::<T>(7, len), "the first message");
        let mut three = vec![T::zeroed(); 3];
        comm.recv(&mut three, 0).unwrap();
        assert_same(&three, &buffer::<T>(8, 3), "the second message");
    }
}

fn everything<T: Element>(comm: &Communicator) {
    everything_of::<T>(comm, &LENGTHS);
}

fn everything_of<T: Element>(comm: &Communicator, lengths: &[usize]) {
    for &len in lengths {
        for op in ReduceOp::ALL.into_iter().filter(|op| op.supports(T::DTYPE)) {
            let op = if let ReduceOp::PreScaledSum(_) = op { ReduceOp::PreScaledSum(0.3) } else { op };
            all_reduce::<T>(comm, len, op);
            reduce_scatter::<T>(comm, len, op);
        }
        all_reduce_into::<T>(comm, len, ReduceOp::Sum);
        reduce::<T>(comm, len, ReduceOp::Sum);
        reduce_scatter_v::<T>(comm, len);
        in_place::<T>(comm, len, ReduceOp::Sum);
        out_of_place::<T>(comm, len, ReduceOp::Sum);
        all_gather::<T>(comm, len);
        all_gather_v::<T>(comm, len);
        gather_and_scatter::<T>(comm, len);
        all_to_all::<T>(comm, len);
        broadcast::<T>(comm, len);
        messages::<T>(comm, len);
        comm.barrier().unwrap();
    }
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
