//! Ranks that don't make the same call: every rank gets an error that names the two calls, and none gets data.

use crate::common::{Over, threads};
use half::f16;
use tensorwire::{Communicator, Error, Options, ReduceOp, Result};

type CallOnce = fn(&Communicator) -> Result<()>;

/// Rank 1 of 3 calls `odd`, the others `rest`; each must get the mismatch, whatever it called.
fn check(rest: CallOnce, odd: CallOnce) {
    for over in Over::ALL {
        over.threads(3, &options(), |comm| check_rank(&comm, "", rest, odd));
    }
}

/// The same over shared memory alone.
fn check_shm(what: &str, rest: CallOnce, odd: CallOnce) {
    threads(3, &options(), |comm| check_rank(&comm, what, rest, odd));
}

fn options() -> Options {
    Options { slot_bytes: 1 << 16, ..Options::default() }
}

fn check_rank(comm: &Communicator, what: &str, rest: CallOnce, odd: CallOnce) {
    comm.barrier().unwrap();
    let mut result = if comm.rank() == 1 { odd(comm) } else { rest(comm) };
    if result.is_ok() {
        // The root of a broadcast needs nobody: it learns at its next call, whatever that is.
        result = comm.barrier();
    }
    match result.expect_err(what) {
        Error::Mismatch { rank, a_call, b_call, .. } => {
            assert_eq!(rank, comm.rank());
            assert_ne!(a_call, b_call);
        }
        other => panic!("{other}"),
    }
    let after = comm.all_reduce(&mut [1f32], ReduceOp::Sum).unwrap_err();
    assert!(matches!(after, Error::Poisoned { .. }), "{after}");
}

/// Calls of which no two go together.
const CALLS: &[(&str, CallOnce)] = &[
    ("barrier", |c| c.barrier()),
    ("all_reduce", |c| c.all_reduce(&mut [0f32; 6], ReduceOp::Sum)),
    ("all_reduce, long", |c| c.all_reduce(&mut [0f32; 100_000], ReduceOp::Sum)),
    ("all_reduce, symmetric", |c| c.all_reduce_symmetric(&mut c.symmetric::<f32>(100_000)?, ReduceOp::Sum)),
    ("all_reduce, pre-scaled", |c| c.all_reduce(&mut [0f32; 6], ReduceOp::PreScaledSum(0.5))),
    ("reduce to 0", |c| c.reduce(&mut [0f32; 6], ReduceOp::Sum, 0)),
    ("reduce to 1", |c| c.reduce(&mut [0f32; 6], ReduceOp::Sum, 1)),
    ("all_gather", |c| c.all_gather(&[0f32; 2], &mut [0f32; 6])),
    ("all_gather, long", |c| c.all_gather_in_place(&mut [0f32; 60_000])),
    ("all_gather_v", |c| c.all_gather_v_in_place(&mut [0f32; 6], &[1, 2, 3])),
    ("gather to 0", |c| c.gather_in_place(&mut vec![0f32; if c.rank() == 0 { 6 } else { 2 }], 0)),
    ("gather to 1", |c| c.gather_in_place(&mut vec![0f32; if c.rank() == 1 { 6 } else { 2 }], 1)),
    ("gather_v to 1", |c| c.gather_v(&vec![0f32; c.rank()], &mut [0f32; 3], &[0, 1, 2], 1)),
    ("scatter from 0", |c| c.scatter(&[0f32; 6], &mut [0f32; 2], 0)),
    ("scatter from 1", |c| c.scatter(&[0f32; 6], &mut [0f32; 2], 1)),
    ("scatter_v from 1", |c| c.scatter_v(&[0f32; 3], &mut vec![0f32; c.rank()], &[0, 1, 2], 1)),
    ("reduce_scatter", |c| c.reduce_scatter_in_place(&mut [0f32; 6], ReduceOp::Sum)),
    ("reduce_scatter_v", |c| c.reduce_scatter_v_in_place(&mut [0f32; 6], &[1, 2, 3], ReduceOp::Sum)),
    ("broadcast from 0", |c| c.broadcast(&mut [0f32; 6], 0)),
    ("broadcast from 1", |c| c.broadcast(&mut [0f32; 6], 1)),
    ("broadcast from 1, long", |c| c.broadcast(&mut [0f32; 60_000], 1)),
    ("all_to_all", |c| c.all_to_all_in_place(&mut [0f32; 6])),
    ("all_to_all_v", |c| c.all_to_all_v_in_place(&mut [0f32; 6], &[2; 3])),
    ("split", |c| c.split(Some(0), 0).map(drop)),
    ("symmetric", |c| c.symmetric::<f32>(1000).map(drop)),
    ("symmetric, larger", |c| c.symmetric::<f32>(2000).map(drop)),
];

#[test]
fn any_two_calls_that_differ() {
    for (rest, call) in CALLS {
        for (odd, other) in CALLS.iter().filter(|(odd, _)| odd != rest) {
            check_shm(&format!("{odd} while the others call {rest}"), *call, *other);
        }
    }
}

#[test]
fn symmetric_buffers_in_another_order() {
    check_shm(
        "",
        |c| {
            let (mut a, mut b) = (c.symmetric::<f32>(100_000)?, c.symmetric::<f32>(100_000)?);
            c.all_reduce_symmetric(&mut a, ReduceOp::Sum)?;
            c.all_reduce_symmetric(&mut b, ReduceOp::Sum)
        },
        |c| {
            let (mut a, mut b) = (c.symmetric::<f32>(100_000)?, c.symmetric::<f32>(100_000)?);
            c.all_reduce_symmetric(&mut b, ReduceOp::Sum)?;
            c.all_reduce_symmetric(&mut a, ReduceOp::Sum)
        },
    );
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

fn fused(comm: &Communicator, width: usize, eps: f32) -> Result<()> {
    comm.all_reduce_add_rms_norm(&mut [0f32; 600], &mut [0f32; 600], &vec![1f32; width], eps)
}

#[test]
fn another_way_to_end_an_all_reduce() {
    check(|c| fused(c, 60, 1e-5), |c| c.all_reduce(&mut [0f32; 600], ReduceOp::Sum));
    check(|c| c.all_reduce(&mut [0f32; 600], ReduceOp::Sum), |c| fused(c, 60, 1e-5));
    check(|c| fused(c, 60, 1e-5), |c| fused(c, 100, 1e-5));
    check(|c| fused(c, 60, 1e-5), |c| fused(c, 60, 1e-6));
    threads(2, &Options::default(), |comm| {
        let error = fused(&comm, [60, 100][comm.rank()], 1e-5).unwrap_err().to_string();
        for called in ["(600 x f32, sum, width 60, eps 1e-5)", "(600 x f32, sum, width 100, eps 1e-5)"] {
            assert!(error.contains(&format!("called all_reduce_add_rms_norm{called}")), "{error}");
        }
        let record = comm.flight_record().to_string();
        assert!(record.contains("all_reduce_add_rms_norm(600 x f32, sum, width"), "{record}");
        assert!(record.contains("one_shot"), "{record}");
    });
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
