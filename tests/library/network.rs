//! All-reduces over TCP between ranks that are said to be on several hosts.

use half::bf16;
use tensorwire::collectives::network::{Link, NetworkOptions};
use tensorwire::transports::store::{StoreServer, UnixStore};
use tensorwire::transports::tcp::{Secret, TcpOptions};
use tensorwire::{Algorithm, Communicator, DType, Deadline, Element, Options, ReduceOp, Wire};

use crate::common::{Over, assert_same, buffer, reduced, threads};

/// Runs `body` once a rank, each in a thread of its own; rank `r` has options `of(r)`.
pub(crate) fn ranks(
    world: usize,
    of: impl Fn(usize) -> NetworkOptions + Sync,
    body: impl Fn(Communicator) + Sync,
) {
    let (secret, server) = (Secret::generate().unwrap(), StoreServer::start().unwrap());
    let tcp = TcpOptions::default();
    std::thread::scope(|s| {
        let (secret, server, tcp, of, body) = (&secret, &server, &tcp, &of, &body);
        let rank = |rank| {
            s.spawn(move || {
                let store = UnixStore::connect(&server.address(), Deadline::after(tcp.timeout)).unwrap();
                let comm =
                    Communicator::join_tcp_with(rank, world, &store, None, secret, tcp, &of(rank)).unwrap();
                body(comm);
            })
        };
        for rank in (0..world).map(rank).collect::<Vec<_>>() {
            rank.join().unwrap();
        }
    });
}

/// Each letter is a rank, on the host of that name.
fn on_hosts(names: &str, body: impl Fn(Communicator) + Sync) {
    let host = |rank: usize| Some(names[rank..=rank].to_owned());
    ranks(names.len(), |rank| NetworkOptions { host: host(rank), ..NetworkOptions::default() }, body);
}

const NETWORK: [Algorithm; 5] = [
    Algorithm::Chain,
    Algorithm::Ring,
    Algorithm::RecursiveDoubling,
    Algorithm::HalvingDoubling,
    Algorithm::Hierarchical,
];

/// A type whose values can be compared in f64.
trait Real: Element + Into<f64> {}
impl Real for f32 {}
impl Real for f64 {}
impl Real for bf16 {}

/// `epsilon` is half a unit in the last place of 1, in this type.
fn check<T: Real>(comm: &Communicator, algorithm: Algorithm, len: usize, op: ReduceOp, epsilon: f64) {
    let (world, what) =
        (comm.world(), format!("{algorithm} {op} of {len} {} over {}", T::DTYPE, comm.world()));
    let (input, mut apart) = (buffer::<T>(comm.rank(), len), vec![T::zeroed(); len]);
    let mut x = input.clone();
    comm.all_reduce(&mut x, op).unwrap();
    comm.all_reduce_into(&input, &mut apart, op).unwrap();
    assert_same(&apart, &x, format_args!("in place and not: {what}"));
    assert_same(&input, &buffer::<T>(comm.rank(), len), "the input");
    let expected = reduced::<T>(op, world, len);
    if algorithm.keeps_order(T::DTYPE, op) {
        assert_same(&x, &expected, &what);
    }
    // Any order: every rank has the same, and it is near.
    let mut all = vec![T::zeroed(); len * world];
    comm.all_gather(&x, &mut all).unwrap();
    for other in all.chunks(len.max(1)) {
        assert_same(other, &x, format_args!("ranks differ: {what}"));
    }
    for (i, (got, right)) in x.iter().zip(expected).enumerate() {
        let (got, right): (f64, f64) = ((*got).into(), right.into());
        // Each rank's rounding, and that of the expected value, of what is at most 4 a rank.
        let most = epsilon * 4.0 * (world * (world + 1)) as f64;
        assert!((got - right).abs() <= most, "{what}: element {i} is {got}, not {right}");
    }
}

#[test]
fn every_algorithm_reduces_over_any_hosts() {
    for names in ["ab", "aab", "aaaa", "abbab", "aabbc"] {
        on_hosts(names, |comm| {
            for algorithm in NETWORK {
                comm.set_algorithm(Some(algorithm)).unwrap();
                for len in [0, 1, 5, 1000, 100_003] {
                    check::<f32>(&comm, algorithm, len, ReduceOp::Sum, 2f64.powi(-24));
                    check::<bf16>(&comm, algorithm, len, ReduceOp::Average, 2f64.powi(-8));
                }
                check::<f32>(&comm, algorithm, 777, ReduceOp::Average, 2f64.powi(-24));
                check::<f32>(&comm, algorithm, 777, ReduceOp::PreScaledSum(0.3), 2f64.powi(-24));
                check::<f64>(&comm, algorithm, 777, ReduceOp::Average, 2f64.powi(-53));
                check::<bf16>(&comm, algorithm, 777, ReduceOp::Max, 0.0);
                let mut x = buffer::<i32>(comm.rank(), 5000);
                comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                assert_same(&x, &reduced(ReduceOp::Sum, comm.world(), 5000), "integers have no order");
                // To one rank it is a direct exchange, whatever is set.
                let mut x = buffer::<f32>(comm.rank(), 100);
                comm.reduce(&mut x, ReduceOp::Sum, 1).unwrap();
                let own = buffer(comm.rank(), 100);
                let expected = if comm.rank() == 1 { reduced(ReduceOp::Sum, comm.world(), 100) } else { own };
                assert_same(&x, &expected, "reduce");
            }
        });
    }
}

#[test]
fn rank_0_says_how_all_choose() {
    // Two hosts, and a link between them for which little pays but to cross it rarely.
    let slow = |any_order, rank: usize| {
        let link = |alpha_us, gbps| Link { alpha_us, gbps, overhead_us: 1.0 };
        // What the others think of it doesn't count.
        let own = (rank == 0).then(|| (link(5.0, 10.0), link(50.0, 0.01)));
        let (intra, inter) = own.unzip();
        let host = Some((rank / 3).to_string());
        NetworkOptions { intra, inter, any_order: any_order == (rank == 0), host, ..Default::default() }
    };
    for any_order in [false, true] {
        ranks(
            6,
            |rank| slow(any_order, rank),
            |comm| {
                let chosen: Vec<Algorithm> =
                    [8, 64 << 10, 4 << 20].iter().map(|bytes| comm.algorithm(*bytes).unwrap()).collect();
                let expected = match any_order {
                    true => [Algorithm::OneShot, Algorithm::Hierarchical, Algorithm::Hierarchical],
                    false => [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Chain],
                };
                assert_eq!(chosen, expected);
                let why = comm.explain(4 << 20, DType::F32, ReduceOp::Sum).unwrap();
                assert!(why.starts_with(&format!("{}: expected are {} ", expected[2], expected[2])), "{why}");
                assert!(why.contains("; intra links 5,10,1 (given); inter links 50,0.01,1 (given)"), "{why}");
                assert_eq!(why.contains("were any order allowed, hierarchical "), !any_order, "{why}");
                let mut x = buffer::<f32>(comm.rank(), 1 << 20);
                comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                let right = reduced::<f32>(ReduceOp::Sum, 6, 1 << 20);
                assert!(x.iter().zip(&right).all(|(a, b)| (a - b).abs() < 1e-5));
                if !any_order {
                    assert_same(&x, &right, "in the ranks' order");
                }
                // Where order makes no difference it need not be allowed.
                let plan = comm.all_reduce_plan::<i32>(1 << 20, ReduceOp::Sum).unwrap();
                assert!(format!("{plan:?}").contains("Hierarchical"), "{plan:?}");
                // A group of one host knows that it is, and a group of both what is between them.
                let half = comm.split(Some(comm.rank() as u32 / 3), 0).unwrap().unwrap();
                assert_eq!(half.algorithm(4 << 20).unwrap(), Algorithm::TwoShot);
                let across = comm.subgroup(&[5, 0, 1]).unwrap();
                if let Some(across) = across {
                    let mut x = buffer::<f32>(across.rank(), 1000);
                    across.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                    let right = reduced::<f32>(ReduceOp::Sum, 3, 1000);
                    assert!(x.iter().zip(&right).all(|(a, b)| (a - b).abs() < 1e-5));
                }
            },
        );
    }
}

/// What every rank must get: the sum of what each rank's elements are after rounding, rounded, which `round` does.
fn rounded(world: usize, len: usize, average: bool, round: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f32> {
    let mut sum = round(&buffer::<f32>(0, len));
    for rank in 1..world {
        sum.iter_mut().zip(round(&buffer::<f32>(rank, len))).for_each(|(sum, x)| *sum += x);
    }
    if average {
        sum.iter_mut().for_each(|x| *x /= world as f32);
    }
    round(&sum)
}

/// Block-scaled bytes as they are defined, in plain arithmetic.
fn q8(x: &[f32]) -> Vec<f32> {
    let block = |x: &[f32]| {
        let most = x.iter().fold(0f32, |m, x| m.max(x.abs()));
        let near = bf16::from_f32(most / 127.0);
        let scale =
            if near.to_f32() < most / 127.0 { bf16::from_bits(near.to_bits() + 1) } else { near }.to_f32();
        x.iter().map(|x| f32::from((x / scale).round_ties_even() as i8) * scale).collect::<Vec<f32>>()
    };
    x.chunks(32).flat_map(block).collect()
}

fn half(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

#[test]
fn fewer_bits_give_the_defined_result_whatever_the_algorithm() {
    for names in ["ab", "aab", "abcab"] {
        on_hosts(names, |comm| {
            for algorithm in [None, Some(Algorithm::OneShot), Some(Algorithm::TwoShot), Some(Algorithm::Ring)]
            {
                comm.set_algorithm(algorithm).unwrap();
                for len in [0, 1, 31, 32, 33, 1000, 200_003] {
                    for (op, average) in [(ReduceOp::Sum, false), (ReduceOp::Average, true)] {
                        let mut x = buffer::<f32>(comm.rank(), len);
                        comm.all_reduce_wire(&mut x, op, Wire::Bf16).unwrap();
                        assert_same(&x, &rounded(comm.world(), len, average, half), "bf16");
                        let mut x = buffer::<f32>(comm.rank(), len);
                        comm.all_reduce_wire(&mut x, op, Wire::Q8).unwrap();
                        assert_same(&x, &rounded(comm.world(), len, average, q8), "q8");
                    }
                }
                // As short already: as it is.
                let mut x = buffer::<bf16>(comm.rank(), 100);
                comm.set_algorithm(None).unwrap();
                comm.all_reduce_wire(&mut x, ReduceOp::Sum, Wire::Bf16).unwrap();
                assert_same(&x, &reduced(ReduceOp::Sum, comm.world(), 100), "bf16 as it is");
            }
            let error = comm.all_reduce_wire(&mut [1f64], ReduceOp::Sum, Wire::Q8).unwrap_err();
            assert!(error.to_string().contains("not sum of f64"), "{error}");
            let error = comm.all_reduce_wire(&mut [1f32], ReduceOp::Max, Wire::Q8).unwrap_err();
            assert!(error.to_string().contains("not max of f32"), "{error}");
            // Who doesn't send as many bits is told apart.
            let mut x = [1f32; 100];
            let error = match comm.rank() {
                0 => comm.all_reduce_wire(&mut x, ReduceOp::Sum, Wire::Q8),
                _ => comm.all_reduce(&mut x, ReduceOp::Sum),
            };
            let text = error.unwrap_err().to_string();
            assert!(text.contains("all_reduce(100 x f32, sum, wire q8)"), "{text}");
        });
    }
}

#[test]
fn shared_memory_sends_elements_as_they_are() {
    threads(3, &Options::default(), |comm| {
        for wire in Wire::ALL {
            let mut x = buffer::<f32>(comm.rank(), 1000);
            comm.all_reduce_wire(&mut x, ReduceOp::Sum, wire).unwrap();
            assert_same(&x, &reduced(ReduceOp::Sum, 3, 1000), wire);
        }
    });
}

/// The sum alone, then what the fused call does on one rank.
fn fused_in_fewer_bits(comm: &Communicator, wire: Wire, tokens: usize, width: usize) {
    let (rank, len, eps) = (comm.rank(), tokens * width, 1e-5);
    let (x, residual, weight) = (buffer::<f32>(rank, len), buffer::<f32>(100, len), buffer(200, width));
    let (mut fused, mut fused_residual) = (x.clone(), residual.clone());
    comm.all_reduce_add_rms_norm_wire(&mut fused, &mut fused_residual, &weight, eps, wire).unwrap();
    let (mut apart, mut apart_residual) = (x, residual);
    comm.all_reduce_wire(&mut apart, ReduceOp::Sum, wire).unwrap();
    let alone = &Communicator::in_process(1).unwrap()[0];
    alone.all_reduce_add_rms_norm(&mut apart, &mut apart_residual, &weight, eps).unwrap();
    assert_same(&fused, &apart, format_args!("{tokens} tokens of {width} as {wire}"));
    assert_same(&fused_residual, &apart_residual, "the residual");
}

fn gathered_in_fewer_bits(comm: &Communicator, wire: Wire, len: usize) {
    let counts: Vec<usize> = (0..comm.world()).map(|r| if r % 3 == 1 { 0 } else { len + r * 7 }).collect();
    let rounds = match wire {
        _ if comm.world() == 1 || comm.transport().unwrap() == "shm" => <[f32]>::to_vec,
        Wire::Bf16 => half,
        Wire::Q8 => q8,
    };
    let mut out = vec![0f32; counts.iter().sum()];
    comm.all_gather_v_wire(&buffer(comm.rank(), counts[comm.rank()]), &mut out, &counts, wire).unwrap();
    let expected: Vec<f32> = counts.iter().enumerate().flat_map(|(r, c)| rounds(&buffer(r, *c))).collect();
    assert_same(&out, &expected, format_args!("all_gather of {counts:?} as {wire}"));
}

#[test]
fn what_follows_a_sum_and_what_is_gathered_go_in_fewer_bits_too() {
    for (over, world) in Over::ALL.iter().flat_map(|over| [1, 2, 3, 5].map(|world| (over, world))) {
        over.threads(world, &Options::default(), |comm| {
            for wire in Wire::ALL {
                for (tokens, width) in [(0, 5), (1, 1), (1, 33), (3, 768), (5, 5003)] {
                    fused_in_fewer_bits(&comm, wire, tokens, width);
                }
                for len in [0, 1, 32, 1000, 50_001] {
                    gathered_in_fewer_bits(&comm, wire, len);
                }
            }
            let error = comm.all_gather_v_wire(&[0i32], &mut vec![0; world], &vec![1; world], Wire::Q8);
            assert!(error.unwrap_err().to_string().contains("all_gather_v_wire"));
            if world == 1 {
                return;
            }
            // Who doesn't send as many bits is told apart.
            let (mut x, mut residual, weight) = ([1f32; 8], [1f32; 8], [1f32; 8]);
            let error = match comm.rank() {
                0 => comm.all_reduce_add_rms_norm_wire(&mut x, &mut residual, &weight, 0.0, Wire::Bf16),
                _ => comm.all_reduce_add_rms_norm(&mut x, &mut residual, &weight, 0.0),
            };
            let text = error.unwrap_err().to_string();
            assert!(text.contains("(8 x f32, sum, width 8, eps 0e0, wire bf16)"), "{text}");
        });
    }
}

#[test]
fn shared_memory_refuses_a_networks_algorithms() {
    threads(2, &Options::default(), |comm| {
        for algorithm in NETWORK {
            comm.set_algorithm(Some(algorithm)).unwrap();
            let error = comm.all_reduce(&mut [1f32], ReduceOp::Sum).unwrap_err().to_string();
            assert!(error.contains("not for shared memory"), "{error}");
        }
        comm.set_algorithm(None).unwrap();
        comm.barrier().unwrap();
    });
}
