//! What the ranks of the cases do.

use std::time::Duration;

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};
use rustix::process::{Signal, getpid, kill_process};
use tensorwire::collectives::network::NetworkOptions;
use tensorwire::transports::mpi::{MpiOptions, rsmpi};
use tensorwire::{Algorithm, Communicator, DType, Element, Error, Op, ReduceOp};

use crate::checks::{all_gather, all_to_all, broadcast, everything, everything_of, messages};
use crate::job::CASE;
use crate::values::{assert_same, buffer, reduced};

/// Runs the case that this process is a rank of; whether it is one.
pub(crate) fn run() -> bool {
    let Ok(name) = std::env::var(CASE) else { return false };
    let bodies: &[(&str, fn())] = &[
        ("conformance", conformance),
        ("groups", groups),
        ("algorithms", algorithms),
        ("started", started),
        ("messages", unreceived),
        ("offload", offload),
        ("owner", owner),
        ("raw", raw),
        ("funneled", funneled),
        ("finalized", finalized),
        ("tcp", tcp),
        ("scattered", scattered),
        ("alone", alone),
        ("torchrun", torchrun),
        ("mismatch", mismatch),
        ("abort", abort),
        ("leave", leave),
        ("shrink", shrink),
        ("panic", panics),
        ("stopped", || strike(Signal::STOP)),
        ("killed", || strike(Signal::KILL)),
        ("offload_late", offload_late),
        ("offload_killed", offload_killed),
    ];
    let (_, body) = bodies.iter().find(|(n, _)| *n == name).expect("a case of that name");
    body();
    true
}

fn comm() -> Communicator {
    Communicator::from_env().unwrap()
}

/// Prints a line that is told from the other ranks'.
fn say(comm: &Communicator, what: impl std::fmt::Display) {
    println!("[{}] {what}", comm.rank());
}

/// More than fits into the messages that may be on their way to a peer.
const LARGE: usize = 1_000_003;

fn conformance() {
    let comm = comm();
    everything_of::<f32>(&comm, &[0, 1, 13, 770, 1025, 20_011]);
    everything_of::<bf16>(&comm, &[0, 3, 4099]);
    everything_of::<f64>(&comm, &[5, 1025]);
    everything_of::<f16>(&comm, &[13, 1000]);
    everything_of::<F8E4M3>(&comm, &[13, 1000]);
    everything_of::<F8E5M2>(&comm, &[13, 1000]);
    everything_of::<i8>(&comm, &[13, 1000]);
    everything_of::<u8>(&comm, &[13, 1000]);
    everything_of::<i32>(&comm, &[13, 1000]);
    everything_of::<u32>(&comm, &[13, 1000]);
    everything_of::<i64>(&comm, &[13, 1000]);
    everything_of::<u64>(&comm, &[13, 1000]);
    let mut x = buffer::<f32>(comm.rank(), LARGE);
    comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
    assert_same(&x, &reduced(ReduceOp::Sum, comm.world(), LARGE), "a large all_reduce");
    for root in 0..comm.world() {
        let mut x = buffer::<f32>(comm.rank(), LARGE);
        comm.broadcast(&mut x, root).unwrap();
        assert_same(&x, &buffer::<f32>(root, LARGE), "a large broadcast");
    }
    messages::<f32>(&comm, 300_000);
    assert!(comm.transport().unwrap().starts_with("mpi ("), "{}", comm.transport().unwrap());
    let calls = &comm.flight_record().ranks[0].calls;
    assert!(comm.world() == 1 || calls.iter().any(|c| c.call.op == Op::Broadcast && c.took.is_some()));
    say(&comm, "done");
}

fn groups() {
    let comm = comm();
    let (rank, world) = (comm.rank(), comm.world());
    // Each in the other order.
    let half = comm.split(Some(rank as u32 % 2), -(rank as i32)).unwrap().unwrap();
    assert_eq!(half.world(), if rank % 2 == 0 { world.div_ceil(2) } else { world / 2 });
    everything_of::<f32>(&half, &[1, 1025]);
    let mut x = [rank as u32];
    half.broadcast(&mut x, 0).unwrap();
    let last = (0..world).rev().find(|r| r % 2 == rank % 2).unwrap();
    assert_eq!(x, [last as u32], "the last rank is the first of its group");
    let all_but_the_first: Vec<usize> = (1..world).rev().collect();
    let some = comm.subgroup(&all_but_the_first).unwrap();
    assert_eq!(some.is_some(), rank != 0);
    if let Some(some) = &some {
        everything_of::<i32>(some, &[1, 1025]);
        // A group of a group, and MPI's own collectives in it.
        let inner = some.split(Some(0), 0).unwrap().unwrap();
        inner.set_algorithm(Some(Algorithm::Mpi)).unwrap();
        everything_of::<i64>(&inner, &[1, 1025]);
    }
    // All of them go on beside each other.
    everything_of::<f32>(&comm, &[13]);
    half.barrier().unwrap();
    // Many, one behind the other.
    for i in 0..50 {
        let group = comm.split(Some((rank as u32 + i) % 2), 0).unwrap().unwrap();
        let mut x = [1u32];
        group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert_eq!(x[0] as usize, group.world());
    }
    say(&comm, "done");
}

fn algorithms() {
    let comm = comm();
    for len in [0, 1, 1000, 100_003] {
        for algorithm in Algorithm::ALL.into_iter().filter(|a| a.keeps_order(DType::F32, ReduceOp::Sum)) {
            comm.set_algorithm(Some(algorithm)).unwrap();
            if comm.algorithm(len * 4).is_ok() {
                crate::checks::all_reduce::<f32>(&comm, len, ReduceOp::Sum);
            }
        }
        for algorithm in Algorithm::ALL {
            comm.set_algorithm(Some(algorithm)).unwrap();
            if comm.algorithm(len * 4).is_ok() {
                crate::checks::all_reduce::<i32>(&comm, len, ReduceOp::Sum);
            }
        }
    }
    comm.set_algorithm(None).unwrap();
    let why = comm.explain(1 << 20, DType::F32, ReduceOp::Sum).unwrap();
    assert!(why.contains("expected are"), "{why}");
    assert_eq!(comm.network().unwrap().unwrap().transport, "mpi");
    say(&comm, "done");
}

fn started() {
    let comm = comm();
    let sum = |len| reduced::<f32>(ReduceOp::Sum, comm.world(), len);
    for _ in 0..20 {
        let works: Vec<_> = [10, 1000, 100_000]
            .map(|len| (len, comm.start_all_reduce(buffer::<f32>(comm.rank(), len), ReduceOp::Sum).unwrap()))
            .into();
        // Behind those.
        crate::checks::all_reduce::<f32>(&comm, 77, ReduceOp::Max);
        for (len, work) in works {
            assert_same(&work.wait().unwrap(), &sum(len), "a started all_reduce");
        }
    }
    say(&comm, "done");
}

/// Messages of up to 64 KiB need no receiver yet, in either direction.
fn unreceived() {
    let comm = comm();
    let (peer, message) = (1 - comm.rank(), buffer::<u8>(comm.rank(), 64 << 10));
    for _ in 0..20 {
        comm.send(&message, peer).unwrap();
        let mut got = vec![0u8; 64 << 10];
        comm.recv(&mut got, peer).unwrap();
        assert_same(&got, &buffer::<u8>(peer, 64 << 10), "a message");
    }
    // Behind a long row of small ones.
    for i in 0..200u32 {
        match comm.rank() {
            0 => comm.send(&[i; 10], 1).unwrap(),
            _ => {
                let mut got = [0; 10];
                comm.recv(&mut got, 0).unwrap();
                assert_eq!(got, [i; 10]);
            }
        }
    }
    say(&comm, "done");
}

/// As near as sums in another order are.
fn near<T: Element>(got: &[T], expected: &[T], scale: f64, f: impl Fn(T) -> f64) {
    for (g, e) in got.iter().zip(expected) {
        let (g, e) = (f(*g), f(*e));
        assert!((g - e).abs() <= 1e-5 * scale.max(e.abs()), "{g} for {e}");
    }
}

fn offload() {
    let comm = comm();
    comm.set_algorithm(Some(Algorithm::Mpi)).unwrap();
    if comm.world() > 1 {
        assert_eq!(comm.algorithm(4096).unwrap(), Algorithm::Mpi);
        // What MPI doesn't have goes by links.
        assert_ne!(comm.algorithm_for(4096, DType::BF16, ReduceOp::Sum).unwrap(), Algorithm::Mpi);
        assert_ne!(comm.algorithm_for(4096, DType::F32, ReduceOp::Average).unwrap(), Algorithm::Mpi);
    }
    everything_of::<i32>(&comm, &[0, 1, 13, 1025, 20_011]);
    everything_of::<u8>(&comm, &[0, 1, 1025]);
    everything_of::<i8>(&comm, &[1, 1025]);
    everything_of::<u32>(&comm, &[1, 1025]);
    everything_of::<i64>(&comm, &[1, 1025]);
    everything_of::<u64>(&comm, &[1, 1025]);
    everything_of::<bf16>(&comm, &[1, 1025]);
    everything_of::<F8E4M3>(&comm, &[13]);
    for len in [1, 1000, LARGE] {
        all_gather::<f32>(&comm, len);
        broadcast::<f64>(&comm, len);
        all_to_all::<f32>(&comm, len);
        messages::<f32>(&comm, len);
        comm.barrier().unwrap();
        for op in [ReduceOp::Sum, ReduceOp::Product, ReduceOp::Min, ReduceOp::Max] {
            let scale = if op == ReduceOp::Product { 1.0 } else { 4.0 * comm.world() as f64 };
            let (input, expected) = (buffer::<f32>(comm.rank(), len), reduced::<f32>(op, comm.world(), len));
            let mut x = input.clone();
            comm.all_reduce(&mut x, op).unwrap();
            near(&x, &expected, scale, f64::from);
            comm.all_reduce_into(&input, &mut x, op).unwrap();
            near(&x, &expected, scale, f64::from);
            let mut x = buffer::<f64>(comm.rank(), len);
            comm.reduce(&mut x, op, comm.world() - 1).unwrap();
            if comm.rank() == comm.world() - 1 {
                near(&x, &reduced::<f64>(op, comm.world(), len), scale, |x| x);
            }
        }
    }
    // Beside started calls, and by links again.
    let work = comm.start_all_reduce(vec![1i32; 1000], ReduceOp::Sum).unwrap();
    assert_eq!(work.wait().unwrap(), vec![comm.world() as i32; 1000]);
    comm.set_algorithm(None).unwrap();
    everything::<f32>(&comm);
    say(&comm, "done");
}

/// A program that has MPI already, and goes on with it.
fn owner() {
    use rsmpi::traits::{Communicator as _, CommunicatorCollectives as _};
    let (universe, level) =
        rsmpi::initialize_with_threading(rsmpi::Threading::Multiple).expect("nobody has initialised it");
    assert_eq!(level, rsmpi::Threading::Multiple);
    let world = universe.world();
    let ours = Communicator::from_mpi(&world).unwrap();
    assert_eq!((ours.rank(), ours.world()), (world.rank() as usize, world.size() as usize));
    let part = world.split_by_color(rsmpi::topology::Color::with_value(world.rank() % 2)).unwrap();
    let theirs = Communicator::from_mpi(&part).unwrap();
    assert_eq!(theirs.world(), part.size() as usize);
    for _ in 0..10 {
        let mut all = vec![0i32; world.size() as usize];
        world.all_gather_into(&world.rank(), &mut all[..]);
        everything_of::<f32>(&ours, &[13]);
        everything_of::<f32>(&theirs, &[13]);
        assert_eq!(all, (0..world.size()).collect::<Vec<_>>());
    }
    let rank = ours.rank();
    drop((ours, theirs));
    world.barrier();
    drop(part);
    drop(universe);
    println!("[{rank}] done");
}

fn raw() {
    let (universe, _) =
        rsmpi::initialize_with_threading(rsmpi::Threading::Multiple).expect("nobody has initialised it");
    let handle = rsmpi::raw::AsRaw::as_raw(&universe.world());
    // SAFETY: it is the world's.
    let ours = unsafe { Communicator::from_raw_mpi(handle) }.unwrap();
    everything_of::<f32>(&ours, &[13]);
    say(&ours, "done");
}

/// MPI for one thread: calls from it alone.
fn funneled() {
    let (universe, level) =
        rsmpi::initialize_with_threading(rsmpi::Threading::Funneled).expect("nobody has initialised it");
    if level != rsmpi::Threading::Funneled {
        // This MPI gives more than it is asked for.
        println!("[{}] done", rsmpi::traits::Communicator::rank(&universe.world()));
        return;
    }
    let ours = Communicator::from_mpi(&universe.world()).unwrap();
    everything_of::<f32>(&ours, &[13]);
    ours.set_algorithm(Some(Algorithm::Mpi)).unwrap();
    everything_of::<i32>(&ours, &[13]);
    let error = std::thread::scope(|s| s.spawn(|| ours.barrier()).join().unwrap()).unwrap_err().to_string();
    assert!(error.contains("MPI_THREAD_FUNNELED") && error.contains("need MPI_THREAD_MULTIPLE"), "{error}");
    say(&ours, "done");
    drop(ours);
    drop(universe);
}

/// MPI has ended, and can't be begun again.
fn finalized() {
    let (universe, _) =
        rsmpi::initialize_with_threading(rsmpi::Threading::Multiple).expect("nobody has initialised it");
    let comm = Communicator::from_mpi(&universe.world()).unwrap();
    comm.barrier().unwrap();
    drop(universe);
    let error = comm.barrier().unwrap_err().to_string();
    assert!(error.contains("MPI"), "{error}");
    let error = Communicator::from_env().unwrap_err().to_string();
    assert!(error.contains("finalised already"), "{error}");
    say(&comm, "done");
}

fn tcp() {
    let comm = comm();
    everything_of::<f32>(&comm, &[13, 1025]);
    let transport = comm.transport().unwrap();
    say(&comm, format_args!("done over {transport}"));
}

/// Two hosts, by what they are called.
fn scattered() {
    let place: usize = std::env::var("OMPI_COMM_WORLD_RANK").unwrap().parse().unwrap();
    let options = MpiOptions { host: Some(format!("host {}", place / 2)), ..MpiOptions::default() };
    let comm = Communicator::join_mpi(&options, &NetworkOptions::default()).unwrap();
    assert_eq!(comm.network().unwrap().unwrap().hosts, [0, 0, 2, 2]);
    everything_of::<f32>(&comm, &[13, 1025, 20_011]);
    comm.set_algorithm(Some(Algorithm::Hierarchical)).unwrap();
    crate::checks::all_reduce::<i64>(&comm, 10_000, ReduceOp::Sum);
    say(&comm, "done");
}

fn alone() {
    let comm = comm();
    assert_eq!((comm.rank(), comm.world()), (0, 1));
    everything_of::<f32>(&comm, &[13]);
    say(&comm, "done");
}

fn torchrun() {
    println!("{}", Communicator::from_env().unwrap_err());
}

/// The last rank calls something else.
fn mismatch() {
    let comm = comm();
    let mut x = [0f32; 1000];
    let result = match comm.rank() + 1 == comm.world() {
        true => comm.all_reduce(&mut x[1..], ReduceOp::Sum),
        false => comm.all_reduce(&mut x, ReduceOp::Sum),
    };
    say(&comm, result.unwrap_err());
}

/// Rank 0 aborts from another thread while all wait for the last rank.
fn abort() {
    let comm = comm();
    comm.barrier().unwrap();
    std::thread::scope(|s| {
        if comm.rank() == 0 {
            s.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                comm.abort("the user pressed stop");
            });
        }
        // The last rank is elsewhere.
        let last = comm.rank() + 1 == comm.world();
        let result = if last { comm.recv(&mut [0f32], 0) } else { comm.barrier() };
        say(&comm, result.unwrap_err());
    });
}

/// The last rank leaves before the barrier.
fn leave() {
    let comm = comm();
    if comm.rank() + 1 < comm.world() {
        say(&comm, comm.barrier().unwrap_err());
    }
}

fn shrink() {
    let comm = comm();
    comm.barrier().unwrap();
    say(&comm, comm.shrink().unwrap_err());
    assert!(comm.barrier().is_err());
}

/// Rank 1 panics between calls.
fn panics() {
    let comm = comm();
    comm.barrier().unwrap();
    assert_eq!(comm.rank(), 0, "rank 1 has had enough");
    say(&comm, comm.barrier().unwrap_err());
}

/// Large all-reduces, until one fails. In one of them a rank of three is struck.
fn strike(signal: Signal) {
    let comm = comm();
    let victim = if signal == Signal::STOP { 1 } else { 2 };
    let mut x = vec![0f32; 1 << 20];
    if comm.rank() == victim {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            kill_process(getpid(), signal).unwrap();
        });
    }
    let error = loop {
        if let Err(e) = comm.all_reduce(&mut x, ReduceOp::Sum) {
            break e;
        }
    };
    say(&comm, error);
    let again = comm.barrier().unwrap_err();
    assert!(matches!(again, Error::Poisoned { .. }), "{again}");
    // So that all are heard before mpirun ends the job.
    std::thread::sleep(Duration::from_millis(1500));
}

fn offload_late() {
    let comm = comm();
    comm.set_algorithm(Some(Algorithm::Mpi)).unwrap();
    comm.all_reduce(&mut [0f32; 1000], ReduceOp::Sum).unwrap();
    if comm.rank() == 0 {
        let _ = comm.all_reduce(&mut [0f32; 1000], ReduceOp::Sum);
    }
    std::thread::sleep(Duration::from_secs(60));
}

fn offload_killed() {
    let comm = comm();
    comm.set_algorithm(Some(Algorithm::Mpi)).unwrap();
    strike_in(&comm);
}

fn strike_in(comm: &Communicator) {
    let mut x = vec![0f32; 1 << 20];
    for i in 0.. {
        if comm.rank() == 2 && i == 10 {
            kill_process(getpid(), Signal::KILL).unwrap();
        }
        comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
    }
}
