//! Ranks that don't make the same call: every rank gets an error that names the two calls, and none gets data.

use crate::common::Over;
use half::f16;
use tensorwire::{Communicator, Error, Options, ReduceOp, Result};

type CallOnce = fn(&Communicator) -> Result<()>;

/// Rank 1 of 3 calls `odd`, the others `rest`; each must get the mismatch, whatever it called.
fn check(rest: CallOnce, odd: CallOnce) {
    for over in Over::ALL {
        over.threads(3, &Options::default(), |comm| check_rank(&comm, rest, odd));
    }
}

fn check_rank(comm: &Communicator, rest: CallOnce, odd: CallOnce) {
    comm.barrier().unwrap();
    let mut result = if comm.rank() == 1 { odd(comm) } else { rest(comm) };
    if result.is_ok() {
        // The root of a broadcast needs nobody: it learns at its next call, whatever that is.
        result = comm.barrier();
    }
    match result.unwrap_err() {
        Error::Mismatch { rank, a_call, b_call, .. } => {
            assert_eq!(rank, comm.rank());
            assert_ne!(a_call, b_call);
        }
        other => panic!("{other}"),
    }
    let after = comm.all_reduce(&mut [1f32], ReduceOp::Sum).unwrap_err();
    assert!(matches!(after, Error::Poisoned { .. }), "{after}");
}

#[test]
fn another_operation() {
    check(|c| c.barrier(), |c| c.all_reduce(&mut [0f32; 4], ReduceOp::Sum));
    check(|c| c.all_reduce(&mut [0f32; 4], ReduceOp::Sum), |c| c.barrier());
    check(|c| c.all_gather(&[0f32; 2], &mut [0f32; 6]), |c| c.all_reduce(&mut [0f32; 6], ReduceOp::Sum));
    check(|c| c.all_reduce(&mut [0f32; 100_000], ReduceOp::Sum), |c| c.broadcast(&mut [0f32; 100_000], 1));
    check(|c| c.broadcast(&mut [0f32; 4], 0), |c| c.barrier());
}

#[test]
fn another_size() {
    check(|c| c.all_reduce(&mut [0f32; 4], ReduceOp::Sum), |c| c.all_reduce(&mut [0f32; 5], ReduceOp::Sum));
    check(
        |c| c.all_reduce(&mut vec![0f32; 1 << 20], ReduceOp::Sum),
        |c| c.all_reduce(&mut vec![0f32; (1 << 20) + 1], ReduceOp::Sum),
    );
    check(
        |c| c.all_reduce(&mut [0f32; 4], ReduceOp::Sum),
        |c| c.all_reduce(&mut vec![0f32; 1 << 20], ReduceOp::Sum),
    );
    check(
        |c| c.reduce_scatter(&[0f32; 30], &mut [0f32; 10], ReduceOp::Sum),
        |c| c.reduce_scatter(&[0f32; 33], &mut [0f32; 11], ReduceOp::Sum),
    );
    check(
        |c| c.all_gather_v(&vec![0f32; [1, 2, 3][c.rank()]], &mut [0f32; 6], &[1, 2, 3]),
        |c| c.all_gather_v(&[0f32; 2], &mut [0f32; 6], &[3, 2, 1]),
    );
}

#[test]
fn another_type_reduction_or_root() {
    check(
        |c| c.all_reduce(&mut [0f32; 4], ReduceOp::Sum),
        |c| c.all_reduce(&mut [f16::ZERO; 4], ReduceOp::Sum),
    );
    check(|c| c.all_reduce(&mut [0f32; 4], ReduceOp::Sum), |c| c.all_reduce(&mut [0f32; 4], ReduceOp::Max));
    check(|c| c.broadcast(&mut [0f32; 4], 0), |c| c.broadcast(&mut [0f32; 4], 2));
}

#[test]
fn another_order() {
    check(
        |c| {
            c.all_reduce(&mut [0f32; 4], ReduceOp::Sum)?;
            c.all_gather(&[0f32; 2], &mut [0f32; 6])
        },
        |c| {
            c.all_gather(&[0f32; 2], &mut [0f32; 6])?;
            c.all_reduce(&mut [0f32; 4], ReduceOp::Sum)
        },
    );
}

#[test]
fn two_threads_at_once_are_refused() {
    let mut ranks = Communicator::in_process(2).unwrap();
    let (one, zero) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    std::thread::scope(|s| {
        // The looks below may themselves keep the first thread out, for a moment.
        let waiting = s.spawn(|| {
            loop {
                match zero.barrier() {
                    Err(Error::ConcurrentUse { .. }) => std::thread::yield_now(),
                    done => return done,
                }
            }
        });
        // Until rank 1 comes, the first thread is inside its call.
        let refused = loop {
            match zero.set_algorithm(None) {
                Ok(()) => std::thread::yield_now(),
                Err(e) => break e,
            }
        };
        assert!(matches!(refused, Error::ConcurrentUse { rank: 0 }), "{refused}");
        assert!(matches!(zero.barrier(), Err(Error::ConcurrentUse { rank: 0 })));
        one.barrier().unwrap();
        waiting.join().unwrap().unwrap();
        // The refusal changed nothing.
        let other = s.spawn(|| one.barrier());
        zero.barrier().unwrap();
        other.join().unwrap().unwrap();
    });
}
