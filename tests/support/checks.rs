//! Every collective on a communicator, checked element by element against its definition. The ranks of a group run these
//! alike, whatever carries their data.

use tensorwire::{Communicator, Element, ReduceOp};

use crate::values::{assert_same, buffer, reduced};

/// Lengths around the inline limit, cache lines, small slots and chunk boundaries.
pub(crate) const LENGTHS: [usize; 12] = [0, 1, 2, 3, 12, 13, 24, 25, 1000, 1025, 4099, 20_011];

pub(crate) fn all_reduce<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    let mut x = buffer::<T>(comm.rank(), len);
    comm.all_reduce(&mut x, op).unwrap();
    assert_same(&x, &reduced(op, comm.world(), len), format_args!("all_reduce {op} of {len}"));
}

pub(crate) fn all_gather<T: Element>(comm: &Communicator, len: usize) {
    let mut out = vec![T::zeroed(); len * comm.world()];
    comm.all_gather(&buffer::<T>(comm.rank(), len), &mut out).unwrap();
    let expected: Vec<T> = (0..comm.world()).flat_map(|r| buffer::<T>(r, len)).collect();
    assert_same(&out, &expected, "all_gather");
}

pub(crate) fn all_gather_v<T: Element>(comm: &Communicator, len: usize) {
    let counts = uneven(comm.world(), len);
    let mut out = vec![T::zeroed(); counts.iter().sum()];
    comm.all_gather_v(&buffer::<T>(comm.rank(), counts[comm.rank()]), &mut out, &counts).unwrap();
    let expected: Vec<T> = counts.iter().enumerate().flat_map(|(r, c)| buffer::<T>(r, *c)).collect();
    assert_same(&out, &expected, "all_gather_v");
}

pub(crate) fn reduce_scatter<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    let mut out = vec![T::zeroed(); len];
    comm.reduce_scatter(&buffer::<T>(comm.rank(), len * comm.world()), &mut out, op).unwrap();
    let expected = reduced(op, comm.world(), len * comm.world());
    assert_same(&out, &expected[comm.rank() * len..][..len], format_args!("reduce_scatter {op} of {len}"));
}

pub(crate) fn broadcast<T: Element>(comm: &Communicator, len: usize) {
    for root in 0..comm.world() {
        let mut x = buffer::<T>(comm.rank(), len);
        comm.broadcast(&mut x, root).unwrap();
        assert_same(&x, &buffer::<T>(root, len), "broadcast");
    }
}

pub(crate) fn all_reduce_into<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
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

pub(crate) fn reduce<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    for root in 0..comm.world() {
        let mut x = buffer::<T>(comm.rank(), len);
        comm.reduce(&mut x, op, root).unwrap();
        let expected =
            if comm.rank() == root { reduced(op, comm.world(), len) } else { buffer(comm.rank(), len) };
        assert_same(&x, &expected, format_args!("reduce {op} of {len} to {root}"));
    }
}

/// Uneven counts, with an empty block for every third rank.
pub(crate) fn uneven(world: usize, len: usize) -> Vec<usize> {
    (0..world).map(|r| if r % 3 == 1 { 0 } else { len + r * 7 }).collect()
}

pub(crate) fn gather_and_scatter<T: Element>(comm: &Communicator, len: usize) {
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

pub(crate) fn reduce_scatter_v<T: Element>(comm: &Communicator, len: usize) {
    let counts = uneven(comm.world(), len);
    let (start, total) = (counts[..comm.rank()].iter().sum::<usize>(), counts.iter().sum());
    let mut out = vec![T::zeroed(); counts[comm.rank()]];
    comm.reduce_scatter_v(&buffer::<T>(comm.rank(), total), &mut out, &counts, ReduceOp::Sum).unwrap();
    assert_same(&out, &reduced(ReduceOp::Sum, comm.world(), total)[start..][..out.len()], "reduce_scatter_v");
}

pub(crate) fn all_to_all<T: Element>(comm: &Communicator, len: usize) {
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
pub(crate) fn mutual(rank: usize, world: usize, len: usize) -> Vec<usize> {
    (0..world).map(|r| if (rank + r) % 4 == 3 { 0 } else { len + 5 * (rank + r) }).collect()
}

/// Each form that works in place gives what the other form gives, and half the ranks call that other form: the two
/// meet.
pub(crate) fn in_place<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
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
pub(crate) fn out_of_place<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
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

pub(crate) fn messages<T: Element>(comm: &Communicator, len: usize) {
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

pub(crate) fn everything<T: Element>(comm: &Communicator) {
    everything_of::<T>(comm, &LENGTHS);
}

pub(crate) fn everything_of<T: Element>(comm: &Communicator, lengths: &[usize]) {
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
