//! All-reduce with the addition and the RMSNorm that follow it, over worlds of 1 to 9 ranks.

use half::{bf16, f16};
use tensorwire::collectives::reduce::Kernels;
use tensorwire::{Algorithm, Communicator, Element, Error, Options, ReduceOp};

use crate::common::{assert_same, buffer, reduced, threads};

/// Slots of 4 KiB, chunks of 2: rows and chunks end at different places, and some rows are longer than a slot.
fn small_slots() -> Options {
    Options { slot_bytes: 8 * 4096, ..Options::default() }
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
