//! What a call of ours costs over the call of MPI's that it makes: `all_reduce_into` of f32 sums by MPI's own collective
//! (`Algorithm::Mpi`), beside `MPI_Allreduce` itself and beside our schedule over MPI's messages, in turn in one process.
//!
//! `cargo bench --features mpi --bench mpi [-- RANKS]` starts itself with mpirun, at 2 ranks unless told otherwise. Each
//! figure is the median over rounds of the mean over a round's calls, on the slowest rank of each round; the overhead is the
//! median of the differences within rounds.

use std::process::Command;
use std::time::Instant;

use tensorwire::collectives::network::NetworkOptions;
use tensorwire::transports::mpi::MpiOptions;
use tensorwire::transports::mpi::rsmpi::ffi;
use tensorwire::{Algorithm, Communicator, ReduceOp};

const RANK: &str = "TENSORWIRE_BENCH_RANK";
const ROUNDS: usize = 101;
const SIZES: [usize; 7] = [8, 64, 1 << 10, 4 << 10, 64 << 10, 1 << 20, 16 << 20];

fn main() {
    if std::env::var_os(RANK).is_some() {
        return rank();
    }
    let ranks = std::env::args().skip(1).find(|arg| arg.parse::<usize>().is_ok()).unwrap_or("2".into());
    let status = Command::new("mpirun")
        .args(["-n", &ranks])
        .arg(std::env::current_exe().expect("this program has a path"))
        .env(RANK, "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .status();
    match status {
        Ok(status) => std::process::exit(status.code().unwrap_or(1)),
        Err(e) => eprintln!("mpirun: {e}: install it (apt-get install openmpi-bin)"),
    }
    std::process::exit(1);
}

fn rank() {
    let (options, network) = (MpiOptions::default(), NetworkOptions::default());
    let ours = Communicator::join_mpi(&options, &network).unwrap();
    let links = ours.split(Some(0), ours.rank() as i32).unwrap().unwrap();
    ours.set_algorithm(Some(Algorithm::Mpi)).unwrap();
    if ours.rank() == 0 {
        println!("{} ranks, {}", ours.world(), ours.transport().unwrap());
        println!(
            "{:>10} {:>12} {:>12} {:>12} {:>12}",
            "bytes", "MPI us", "ours us", "overhead ns", "by links us"
        );
    }
    for bytes in SIZES {
        let input: Vec<f32> = (0..bytes / 4).map(|i| (i % 13) as f32).collect();
        let mut output = vec![0f32; input.len()];
        let calls = (2_000_000 / (bytes + 500)).clamp(1, 2000);
        let mut rounds = Vec::new();
        for round in 0..ROUNDS {
            let raw = |input: &[f32], output: &mut [f32]| {
                // SAFETY: (1) MPI is initialised; (2) both buffers have as many elements as is said, apart.
                let code = unsafe {
                    ffi::MPI_Allreduce(
                        input.as_ptr().cast(),
                        output.as_mut_ptr().cast(),
                        input.len() as i32,
                        ffi::RSMPI_FLOAT,
                        ffi::RSMPI_SUM,
                        ffi::RSMPI_COMM_WORLD,
                    )
                };
                assert_eq!(code, 0);
            };
            let theirs = time(&ours, calls, || raw(&input, &mut output));
            let by_mpi =
                time(&ours, calls, || ours.all_reduce_into(&input, &mut output, ReduceOp::Sum).unwrap());
            let by_links =
                time(&ours, calls, || links.all_reduce_into(&input, &mut output, ReduceOp::Sum).unwrap());
            // The first one makes what is made once.
            if round > 0 {
                rounds.push([theirs, by_mpi, by_links]);
            }
        }
        let mut all: Vec<f64> = rounds.concat();
        ours.all_reduce(&mut all, ReduceOp::Max).unwrap();
        let rounds: Vec<&[f64]> = all.chunks(3).collect();
        let of = |f: &dyn Fn(&[f64]) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(|round| f(round)).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        if ours.rank() == 0 {
            println!(
                "{bytes:>10} {:>12.3} {:>12.3} {:>12.0} {:>12.3}",
                of(&|r| r[0]) * 1e6,
                of(&|r| r[1]) * 1e6,
                of(&|r| r[1] - r[0]) * 1e9,
                of(&|r| r[2]) * 1e6,
            );
        }
    }
}

/// The mean seconds of a call, all ranks beginning together.
fn time(comm: &Communicator, calls: usize, mut call: impl FnMut()) -> f64 {
    comm.barrier().unwrap();
    let begun = Instant::now();
    (0..calls).for_each(|_| call());
    begun.elapsed().as_secs_f64() / calls as f64
}
