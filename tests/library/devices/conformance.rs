//! Every collective, checked element by element against its definition, for every type and operation, with worlds of 1 to
//! 5 ranks. The test library reduces as the definition says, in rank order with one rounding, so that results can be
//! compared bit by bit; NCCL itself promises neither.

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};
use tensorwire::collectives::device::{DeviceCommunicator, Stream};
use tensorwire::{Deadline, Element, Error, ReduceOp};

use super::By;
use crate::common::{Over, assert_same, buffer, reduced};

/// Lengths around the test library's and the host's pieces, for elements of 4 bytes.
const LENGTHS: [usize; 8] = [0, 1, 3, 13, 1025, 20_011, 32_769, 300_001];

fn all_reduce<T: Element>(stream: &Stream, group: &DeviceCommunicator, len: usize, op: ReduceOp) {
    let (rank, world) = (group.rank(), group.world());
    let expected = reduced::<T>(op, world, len);
    let input = stream.upload(&buffer::<T>(rank, len)).unwrap();
    let mut x = stream.upload(&buffer::<T>(rank, len)).unwrap();
    let mut out = stream.zeros::<T>(len).unwrap();
    group.all_reduce(&mut x, op).unwrap();
    group.all_reduce_into(&input, &mut out, op).unwrap();
    group.synchronize().unwrap();
    assert_same(&x.to_vec().unwrap(), &expected, format_args!("all_reduce {op} of {len}"));
    assert_same(&out.to_vec().unwrap(), &expected, format_args!("all_reduce_into {op} of {len}"));
    assert_same(&input.to_vec().unwrap(), &buffer::<T>(rank, len), "the input of all_reduce_into");
}

fn reduce_scatter<T: Element>(stream: &Stream, group: &DeviceCommunicator, len: usize, op: ReduceOp) {
    let (rank, world) = (group.rank(), group.world());
    let input = stream.upload(&buffer::<T>(rank, len * world)).unwrap();
    let mut out = stream.zeros::<T>(len).unwrap();
    group.reduce_scatter(&input, &mut out, op).unwrap();
    group.synchronize().unwrap();
    let expected = reduced::<T>(op, world, len * world);
    assert_same(&out.to_vec().unwrap(), &expected[rank * len..][..len], format_args!("reduce_scatter {op}"));
}

fn rooted<T: Element>(stream: &Stream, group: &DeviceCommunicator, len: usize, op: ReduceOp) {
    let (rank, world) = (group.rank(), group.world());
    for root in [0, world - 1] {
        let is_root = rank == root;
        let own = buffer::<T>(rank, len);
        let mut x = stream.upload(&own).unwrap();
        group.reduce(&mut x, op, root).unwrap();
        let input = stream.upload(&own).unwrap();
        let mut out = stream.zeros::<T>(if is_root { len } else { 3 }).unwrap();
        group.reduce_into(&input, &mut out, op, root).unwrap();
        let mut sent = stream.upload(&own).unwrap();
        group.broadcast(&mut sent, root).unwrap();
        let mut copy = stream.zeros::<T>(len).unwrap();
        group.broadcast_into(input.slice(if is_root { 0..len } else { 0..0 }), &mut copy, root).unwrap();
        group.synchronize().unwrap();
        let expected = reduced::<T>(op, world, len);
        assert_same(&x.to_vec().unwrap(), if is_root { &expected } else { &own }, "reduce");
        let untouched = vec![T::zeroed(); 3];
        assert_same(&out.to_vec().unwrap(), if is_root { &expected } else { &untouched }, "reduce_into");
        assert_same(&sent.to_vec().unwrap(), &buffer::<T>(root, len), "broadcast");
        assert_same(&copy.to_vec().unwrap(), &buffer::<T>(root, len), "broadcast_into");
    }
}

/// Uneven counts, with an empty block for every third rank.
fn uneven(world: usize, len: usize) -> Vec<usize> {
    (0..world).map(|r| if r % 3 == 1 { 0 } else { len + r * 7 }).collect()
}

fn blocks<T: Element>(stream: &Stream, group: &DeviceCommunicator, len: usize) {
    let (rank, world) = (group.rank(), group.world());
    for counts in [vec![len; world], uneven(world, len)] {
        let even = counts == vec![len; world];
        let before = |r: usize| counts[..r].iter().sum::<usize>();
        let total = before(world);
        let whole: Vec<T> = (0..world).flat_map(|r| buffer::<T>(r, counts[r])).collect();
        let own = stream.upload(&buffer::<T>(rank, counts[rank])).unwrap();

        let mut gathered = stream.zeros::<T>(total).unwrap();
        match even {
            true => group.all_gather(&own, &mut gathered).unwrap(),
            false => group.all_gather_v(&own, &mut gathered, &counts).unwrap(),
        }
        let mut place = stream.zeros::<T>(if even { total } else { 0 }).unwrap();
        if even {
            let mut blocks = vec![T::zeroed(); total];
            blocks[before(rank)..][..len].copy_from_slice(&whole[before(rank)..][..len]);
            place.write(&blocks).unwrap();
        }
        group.all_gather_in_place(&mut place).unwrap();
        let input = stream.upload(&buffer::<T>(rank, total)).unwrap();
        let mut part = stream.zeros::<T>(counts[rank]).unwrap();
        group.reduce_scatter_v(&input, &mut part, &counts, ReduceOp::Sum).unwrap();
        group.synchronize().unwrap();
        assert_same(&gathered.to_vec().unwrap(), &whole, "all_gather");
        assert_same(&place.to_vec().unwrap(), if even { &whole } else { &[] }, "all_gather_in_place");
        let sums = reduced::<T>(ReduceOp::Sum, world, total);
        assert_same(&part.to_vec().unwrap(), &sums[before(rank)..][..counts[rank]], "reduce_scatter_v");

        for root in [0, world - 1] {
            let is_root = rank == root;
            let mut out = stream.zeros::<T>(if is_root { total } else { 0 }).unwrap();
            let mut back = stream.zeros::<T>(counts[rank]).unwrap();
            match even {
                true => group.gather(&own, &mut out, root).unwrap(),
                false => group.gather_v(&own, &mut out, &counts, root).unwrap(),
            }
            match even {
                true => group.scatter(&out, &mut back, root).unwrap(),
                false => group.scatter_v(&out, &mut back, &counts, root).unwrap(),
            }
            group.synchronize().unwrap();
            assert_same(&out.to_vec().unwrap(), if is_root { &whole } else { &[] }, "gather");
            assert_same(&back.to_vec().unwrap(), &own.to_vec().unwrap(), "scatter");
        }
    }
}

fn all_to_all<T: Element>(stream: &Stream, group: &DeviceCommunicator, len: usize) {
    let (rank, world) = (group.rank(), group.world());
    let input = stream.upload(&buffer::<T>(rank, len * world)).unwrap();
    let mut out = stream.zeros::<T>(len * world).unwrap();
    group.all_to_all(&input, &mut out).unwrap();
    // Rank `a` sends `b` this many: different for each pair, and none for some.
    let count = |a: usize, b: usize| if (a + b) % 4 == 3 { 0 } else { len + 3 * a + 11 * b };
    let message = |a: usize, b: usize| buffer::<T>(a * world + b, count(a, b));
    let sends: Vec<usize> = (0..world).map(|r| count(rank, r)).collect();
    let receives: Vec<usize> = (0..world).map(|r| count(r, rank)).collect();
    let uneven = stream.upload(&(0..world).flat_map(|r| message(rank, r)).collect::<Vec<T>>()).unwrap();
    let mut got = stream.zeros::<T>(receives.iter().sum()).unwrap();
    group.all_to_all_v(&uneven, &sends, &mut got, &receives).unwrap();
    group.synchronize().unwrap();
    let expected: Vec<T> =
        (0..world).flat_map(|r| buffer::<T>(r, len * world)[rank * len..][..len].to_vec()).collect();
    assert_same(&out.to_vec().unwrap(), &expected, "all_to_all");
    let expected: Vec<T> = (0..world).flat_map(|r| message(r, rank)).collect();
    assert_same(&got.to_vec().unwrap(), &expected, "all_to_all_v");
}

fn messages<T: Element>(stream: &Stream, group: &DeviceCommunicator, len: usize) {
    let (rank, world) = (group.rank(), group.world());
    if world == 1 {
        return;
    }
    let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
    let own = stream.upload(&buffer::<T>(rank, len)).unwrap();
    let mut got = stream.zeros::<T>(len).unwrap();
    group.send_recv(&own, next, &mut got, before).unwrap();
    group.synchronize().unwrap();
    assert_same(&got.to_vec().unwrap(), &buffer::<T>(before, len), "send_recv");
    // Everybody with everybody at once, in groups whose messages are added in different orders, and a collective with them.
    let mut all: Vec<_> = (0..world).map(|_| stream.zeros::<T>(len).unwrap()).collect();
    let mut sum = stream.upload(&buffer::<T>(rank, len)).unwrap();
    group
        .group(|g| {
            for (peer, buf) in all.iter_mut().enumerate().rev().filter(|(peer, _)| *peer != rank) {
                g.recv(buf, peer)?;
                g.send(&own, peer)?;
            }
            g.all_reduce(&mut sum, ReduceOp::Max)
        })
        .unwrap();
    group.synchronize().unwrap();
    for (peer, buf) in all.iter().enumerate().filter(|(peer, _)| *peer != rank) {
        assert_same(&buf.to_vec().unwrap(), &buffer::<T>(peer, len), "a group's messages");
    }
    assert_same(&sum.to_vec().unwrap(), &reduced(ReduceOp::Max, world, len), "a group's all_reduce");
    // In the order sent, of different lengths.
    match rank {
        0 => {
            group.send(&own, 1).unwrap();
            group.send(own.slice(..len / 2), 1).unwrap();
        }
        1 => {
            let (mut first, mut second) =
                (stream.zeros::<T>(len).unwrap(), stream.zeros::<T>(len / 2).unwrap());
            group.recv(&mut first, 0).unwrap();
            group.recv(&mut second, 0).unwrap();
            group.synchronize().unwrap();
            assert_same(&first.to_vec().unwrap(), &buffer::<T>(0, len), "the first message");
            assert_same(&second.to_vec().unwrap(), &buffer::<T>(0, len)[..len / 2], "the second message");
        }
        _ => {}
    }
    group.synchronize().unwrap();
}

fn everything<T: Element>(by: By, stream: &Stream, group: &DeviceCommunicator, lengths: &[usize]) {
    for &len in lengths {
        for op in ReduceOp::ALL.into_iter().filter(|op| op.supports(T::DTYPE)) {
            // A factor that every type has.
            let op = if let ReduceOp::PreScaledSum(_) = op { ReduceOp::PreScaledSum(0.25) } else { op };
            if by == By::Nccl && matches!(op, ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor) {
                let mut x = stream.zeros::<T>(len).unwrap();
                let error = group.all_reduce(&mut x, op).unwrap_err();
                assert!(
                    matches!(&error, Error::InvalidArgument(what) if what.contains("NCCL has no bit_")),
                    "{error}"
                );
                continue;
            }
            all_reduce::<T>(stream, group, len, op);
            reduce_scatter::<T>(stream, group, len, op);
        }
        rooted::<T>(stream, group, len, ReduceOp::Sum);
        blocks::<T>(stream, group, len);
        all_to_all::<T>(stream, group, len);
        messages::<T>(stream, group, len);
        group.barrier(stream).unwrap();
    }
    group.synchronize().unwrap();
}

#[test]
fn every_collective_and_length_at_1_to_5_ranks() {
    for (by, world) in [By::Nccl, By::Host].iter().flat_map(|by| (1..=5).map(move |world| (*by, world))) {
        by.threads(world, |stream, group| {
            let lengths = if world == 2 { &LENGTHS[..] } else { &LENGTHS[..6] };
            everything::<f32>(by, stream, &group, lengths);
            everything::<bf16>(by, stream, &group, &LENGTHS[..5]);
            group.close(Deadline::after(std::time::Duration::from_secs(60))).unwrap();
        });
    }
}

#[test]
fn every_type_and_operation() {
    for (by, world) in [By::Nccl, By::Host].iter().flat_map(|by| [1, 3].map(|world| (*by, world))) {
        by.threads(world, |stream, group| {
            let lengths = [0, 1, 257, 4099];
            everything::<f64>(by, stream, &group, &lengths);
            everything::<f16>(by, stream, &group, &lengths);
            everything::<F8E4M3>(by, stream, &group, &lengths);
            everything::<F8E5M2>(by, stream, &group, &lengths);
            everything::<i8>(by, stream, &group, &lengths);
            everything::<u8>(by, stream, &group, &lengths);
            everything::<i32>(by, stream, &group, &lengths);
            everything::<u32>(by, stream, &group, &lengths);
            everything::<i64>(by, stream, &group, &lengths);
            everything::<u64>(by, stream, &group, &lengths);
        });
    }
}

#[test]
fn over_every_transport() {
    for over in Over::ALL {
        By::Nccl.threads_over(*over, 3, |stream, group| {
            everything::<f32>(By::Nccl, stream, &group, &[0, 1025]);
        });
        By::Host.threads_over(*over, 3, |stream, group| {
            everything::<f32>(By::Host, stream, &group, &[0, 1025]);
        });
    }
}

#[test]
fn groups_of_some_of_the_ranks() {
    for by in [By::Nccl, By::Host] {
        by.threads(5, |stream, group| {
            let rank = group.rank();
            // The even ranks, in reverse order; the odd ones have none.
            let part = group.split((rank % 2 == 0).then_some(7), -(rank as i32)).unwrap();
            assert_eq!(part.is_some(), rank % 2 == 0);
            if let Some(part) = part {
                assert_eq!((part.rank(), part.world()), (2 - rank / 2, 3));
                assert_eq!(part.engine(), group.engine());
                everything::<f32>(by, stream, &part, &[13]);
                // A part of a part.
                let pair = part.split(Some((part.rank() == 0).into()), 0).unwrap().unwrap();
                everything::<i32>(by, stream, &pair, &[5]);
            }
            everything::<f32>(by, stream, &group, &[3]);
        });
    }
}

#[test]
fn buffers_go_from_stream_to_stream_and_calls_pile_up() {
    for by in [By::Nccl, By::Host] {
        by.threads(2, |stream, group| {
            let other = group.device().stream().unwrap();
            let mut x = stream.upload(&vec![1f32; 1000]).unwrap();
            for turn in 0..50 {
                group.all_reduce(&mut x, ReduceOp::Average).unwrap();
                x = x.on(if turn % 2 == 0 { &other } else { stream }).unwrap();
            }
            let mut counted = other.upload(&[0u32]).unwrap();
            counted.write(&[1]).unwrap();
            // More than may be under way.
            for _ in 0..1500 {
                group.broadcast(&mut counted, 0).unwrap();
            }
            group.synchronize().unwrap();
            assert_eq!(x.to_vec().unwrap(), vec![1f32; 1000]);
            assert_eq!(counted.to_vec().unwrap(), [1]);
            let record = group.flight_record();
            assert_eq!(record.ranks.len(), 2);
            assert!(record.to_string().contains("broadcast(1 x u32, root 0)"), "{record}");
        });
    }
}

#[test]
fn memory_is_registered_where_nccl_can() {
    for by in [By::Nccl, By::Host] {
        by.threads(2, |stream, group| {
            let mut x = group.alloc::<f32>(stream, 1000).unwrap();
            assert!(!group.register(&mut x).unwrap(), "it is registered, or can't be");
            x.write(&[2.0; 1000]).unwrap();
            group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
            let mut y = stream.upload(&[1i64; 5]).unwrap();
            assert_eq!(group.register(&mut y).unwrap(), by == By::Nccl);
            group.all_reduce(&mut y, ReduceOp::Sum).unwrap();
            group.synchronize().unwrap();
            assert_eq!(x.to_vec().unwrap(), [4.0; 1000]);
            assert_eq!(y.to_vec().unwrap(), [2; 5]);
        });
    }
}

#[test]
fn wrong_arguments_are_refused_before_anything_is_sent() {
    for by in [By::Nccl, By::Host] {
        by.threads(2, |stream, group| {
            let other = group.device().stream().unwrap();
            let of = |len| stream.zeros::<f32>(len).unwrap();
            let (mut five, mut elsewhere) = (of(5), other.zeros::<f32>(5).unwrap());
            let wrong = [
                group.all_gather(&of(3), &mut of(5)),
                group.all_gather_in_place(&mut five),
                group.all_gather_v(&of(3), &mut of(6), &[3, 3, 0]),
                group.all_gather_v(&of(3), &mut of(6), &[2, 4]),
                group.reduce_scatter(&of(5), &mut of(3), ReduceOp::Sum),
                group.reduce_scatter_v(&of(5), &mut of(3), &[3, 3], ReduceOp::Sum),
                group.broadcast(&mut five, 2),
                group.reduce(&mut five, ReduceOp::Sum, 2),
                group.all_reduce(&mut five, ReduceOp::BitAnd),
                group.all_reduce_into(&of(5), &mut of(4), ReduceOp::Sum),
                group.all_reduce_into(&of(5), &mut elsewhere, ReduceOp::Sum),
                group.gather(&of(5), &mut of(10), 2),
                group.scatter_v(&of(10), &mut of(5), &[5], 0),
                group.all_to_all(&of(5), &mut of(5)),
                group.all_to_all_v(&of(5), &[2, 2], &mut of(5), &[2, 3]),
                group.send(&of(5), group.rank()),
                group.recv(&mut five, 2),
                group.group(|g| {
                    g.all_reduce(&mut elsewhere, ReduceOp::Product).and_then(|()| g.send(&five, 7))
                }),
            ];
            for (i, error) in wrong.into_iter().enumerate() {
                let error = error.expect_err(&format!("the call of number {i}"));
                assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
            }
            all_reduce::<f32>(stream, &group, 100, ReduceOp::Sum);
        });
    }
}
