//! All-reduce with what comes before it (`all_reduce_from`) and behind it (`all_reduce_add_rms_norm`), over worlds
//! of 1 to 9 ranks.

use std::panic::{AssertUnwindSafe, catch_unwind};

use half::{bf16, f16};
use tensorwire::collectives::reduce::Kernels;
use tensorwire::{Algorithm, Communicator, Element, Error, Options, ReduceOp};

use crate::common::{assert_same, buffer, reduced, threads};

/// Slots of 4 KiB, chunks of 2: rows and chunks end at different places, and some rows are longer than a slot.
fn small_slots() -> Options {
    Options { slot_bytes: 4 * 4096, ..Options::default() }
}

/// Tokens and width.
const SHAPES: [(usize, usize); 12] = [
    (0, 5),
    (1, 1),
    (3, 1),
    (1, 12),
    (2, 3),
    (1, 64),
    (4, 65),
    (1, 768),
    (7, 127),
    (5, 1000),
    (3, 2500),
    (2, 5003),
];

const EPS: f32 = 1e-5;

/// The new residual and the output, by the portable kernels, which are tested against their definitions where
/// they live: the reduction of all ranks' elements, then each row's end, of one source.
fn expected<T: Element>(world: usize, tokens: usize, width: usize) -> (Vec<T>, Vec<T>) {
    let mut x = reduced::<T>(ReduceOp::Sum, world, tokens * width);
    let mut residual = buffer::<T>(100, tokens * width);
    let weight = buffer::<T>(200, width);
    let kernel = Kernels::available()[0].add_rms_norm(T::DTYPE).expect("a type that models compute in");
    for (x, residual) in x.chunks_mut(width).zip(residual.chunks_mut(width)) {
        let x = x.as_mut_ptr().cast::<u8>();
        // SAFETY: (1) all have `width` elements of `T`; (2) the output is the only source; (3) the portable kernels
        // run anywhere.
        unsafe {
            let (residual, weight) = (residual.as_mut_ptr().cast(), weight.as_ptr().cast());
            kernel(x, residual, &x.cast_const(), 1, weight, width, EPS);
        }
    }
    (residual, x)
}

fn add_rms_norm<T: Element>(comm: &Communicator, tokens: usize, width: usize) {
    let (rank, len) = (comm.rank(), tokens * width);
    let (mut x, mut residual, weight) = (buffer(rank, len), buffer(100, len), buffer(200, width));
    comm.all_reduce_add_rms_norm::<T>(&mut x, &mut residual, &weight, EPS).unwrap();
    let (new_residual, normed) = expected(comm.world(), tokens, width);
    let what = format_args!("{tokens} tokens of {width}, {} ranks", comm.world()).to_string();
    assert_same(&residual, &new_residual, format_args!("the residual of {what}"));
    assert_same(&x, &normed, what);
}

#[test]
fn every_shape_and_type_at_1_to_9_ranks() {
    for world in 1..=9 {
        threads(world, &small_slots(), |comm| {
            for (tokens, width) in SHAPES {
                add_rms_norm::<f32>(&comm, tokens, width);
                add_rms_norm::<bf16>(&comm, tokens, width);
                add_rms_norm::<f16>(&comm, tokens, width);
                add_rms_norm::<f64>(&comm, tokens, width);
            }
        });
    }
}

#[test]
fn every_algorithm_gives_the_same_bits() {
    for world in [2, 3, 5] {
        threads(world, &small_slots(), |comm| {
            for (tokens, width) in SHAPES {
                for algorithm in Algorithm::ALL {
                    comm.set_algorithm(Some(algorithm)).unwrap();
                    if comm.algorithm(tokens * width * 4).is_ok() {
                        add_rms_norm::<f32>(&comm, tokens, width);
                    }
                }
            }
        });
    }
}

#[test]
fn rows_of_real_models_with_the_default_slots() {
    for world in [1, 2, 3] {
        threads(world, &Options::default(), |comm| {
            for (tokens, width) in [(1, 4096), (16, 768), (100, 4096), (33, 8192), (2, 300_001)] {
                add_rms_norm::<f32>(&comm, tokens, width);
                add_rms_norm::<bf16>(&comm, tokens, width);
            }
        });
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused_before_anything_is_sent() {
    for world in [1, 2] {
        threads(world, &small_slots(), |comm| {
            let fused = |len: usize, residual: usize, width: usize, eps: f32| {
                let (mut x, mut residual) = (vec![1f32; len], vec![2f32; residual]);
                let weight = vec![1f32; width];
                let refused = comm.all_reduce_add_rms_norm(&mut x, &mut residual, &weight, eps).unwrap_err();
                assert!(matches!(refused, Error::InvalidArgument(_)), "{refused}");
                assert!(x.iter().all(|x| *x == 1.0) && residual.iter().all(|r| *r == 2.0));
                refused.to_string()
            };
            let rank = comm.rank();
            assert_eq!(
                fused(8, 7, 4, EPS),
                format!(
                    "rank {rank}: all_reduce_add_rms_norm: residual has 7 elements, not 8 (as many as x)"
                )
            );
            assert_eq!(
                fused(8, 8, 3, EPS),
                format!(
                    "rank {rank}: all_reduce_add_rms_norm: x has 8 elements, which aren't rows of weight's 3"
                )
            );
            assert!(fused(8, 8, 0, EPS).contains("rows of weight's 0"));
            assert!(fused(0, 0, 0, EPS).contains("rows of weight's 0"));
            for eps in [-1e-5, f32::NAN, f32::INFINITY] {
                assert!(fused(8, 8, 4, eps).contains("give a finite number from 0 up"));
            }
            let refused = comm.all_reduce_add_rms_norm(&mut [1i32], &mut [1], &[1], EPS).unwrap_err();
            assert!(refused.to_string().contains("rms_norm is not defined for i32"), "{refused}");
            // Nothing was lost.
            add_rms_norm::<f32>(&comm, 3, 40);
        });
    }
}

fn all_reduce_from<T: Element>(comm: &Communicator, len: usize, op: ReduceOp) {
    let mut out = vec![T::zeroed(); len];
    let contribution = buffer::<T>(comm.rank(), len);
    comm.all_reduce_from(&mut out, op, |to| to.copy_from_slice(&contribution)).unwrap();
    assert_same(&out, &reduced(op, comm.world(), len), format_args!("all_reduce_from {op} of {len}"));
}

#[test]
fn what_a_function_writes_is_reduced() {
    for world in 1..=9 {
        threads(world, &small_slots(), |comm| {
            for len in [0, 1, 12, 13, 1000, 1024, 1025, 20_011] {
                all_reduce_from::<f32>(&comm, len, ReduceOp::Sum);
                all_reduce_from::<bf16>(&comm, len, ReduceOp::Average);
                all_reduce_from::<u8>(&comm, len, ReduceOp::BitXor);
            }
            // It is an all_reduce also for those who call that.
            for len in [3, 500, 5000] {
                if comm.rank() % 2 == 0 {
                    all_reduce_from::<f32>(&comm, len, ReduceOp::Max);
                } else {
                    let mut x = buffer::<f32>(comm.rank(), len);
                    comm.all_reduce(&mut x, ReduceOp::Max).unwrap();
                    assert_same(&x, &reduced(ReduceOp::Max, comm.world(), len), "all_reduce beside it");
                }
            }
        });
    }
}

#[test]
fn a_one_shot_contribution_is_written_where_peers_read_it() {
    threads(2, &Options::default(), |comm| {
        for (len, directly) in [(4, false), (1000, true), (1 << 20, false)] {
            let mut out = vec![0f32; len];
            let place = out.as_ptr();
            comm.all_reduce_from(&mut out, ReduceOp::Sum, |to| {
                assert_eq!(to.as_ptr() != place, directly, "{len}");
                to.fill(1.0);
            })
            .unwrap();
            assert!(out.iter().all(|x| *x == 2.0));
        }
    });
}

#[test]
fn a_function_that_panics_ends_the_group_and_says_so() {
    for len in [4, 1000, 100_000] {
        threads(3, &Options::default(), |comm| {
            all_reduce_from::<f32>(&comm, len, ReduceOp::Sum);
            let mut out = vec![0f32; len];
            if comm.rank() == 1 {
                let call = || comm.all_reduce_from(&mut out, ReduceOp::Sum, |_| panic!("no product"));
                let panic = catch_unwind(AssertUnwindSafe(call)).unwrap_err();
                assert_eq!(panic.downcast_ref::<&str>(), Some(&"no product"));
            } else {
                let error = comm.all_reduce_from(&mut out, ReduceOp::Sum, |to| to.fill(1.0)).unwrap_err();
                let Error::Aborted { by: 1, seq: 2, why, .. } = &error else { panic!("{error}") };
                assert!(why.contains("the function that writes its contribution panicked"), "{why}");
            }
            assert!(comm.barrier().unwrap_err().ends_group());
            // The survivors, and the rank whose function panicked is one, go on.
            let comm = comm.shrink().unwrap();
            assert_eq!(comm.world(), 3);
            all_reduce_from::<f32>(&comm, len, ReduceOp::Sum);
            add_rms_norm::<f32>(&comm, 3, 100);
        });
    }
}

#[test]
fn a_function_that_calls_its_communicator_is_refused() {
    threads(2, &Options::default(), |comm| {
        let mut out = [0f32; 100];
        comm.all_reduce_from(&mut out, ReduceOp::Sum, |to| {
            assert!(matches!(comm.barrier(), Err(Error::ConcurrentUse { .. })));
            to.fill(1.0);
        })
        .unwrap();
        assert_eq!(out, [2.0; 100]);
        // Wrong arguments: it isn't called.
        let called = comm.all_reduce_from(&mut [0i32], ReduceOp::Average, |_| unreachable!("it is called"));
        assert!(called.is_err());
    });
}
