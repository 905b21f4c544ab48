//! A program that any launcher can start: each rank contributes its number, and all learn the sum.
//!
//! ```sh
//! cargo build --release --features tcp --example all_reduce
//! tensorwire launch --ranks 4 -- target/release/examples/all_reduce
//! ```
//!
//! `docs/launching.md` says how torchrun, mpirun, srun, Kubernetes and ssh start it on several hosts.

use tensorwire::{Communicator, ReduceOp};

fn main() {
    if let Err(e) = run() {
        eprintln!("all_reduce: {e}");
        std::process::exit(1);
    }
}

fn run() -> tensorwire::Result<()> {
    let comm = Communicator::from_env()?;
    let (rank, world) = (comm.rank(), comm.world());
    let mut sum = vec![rank as f32 + 1.0; 1 << 16];
    comm.all_reduce(&mut sum, ReduceOp::Sum)?;
    let expected = (world * (world + 1)) as f32 / 2.0;
    assert!(sum.iter().all(|x| *x == expected), "the sum is wrong");
    let (over, why) = (comm.transport()?, comm.transport_reason());
    println!("rank {rank} of {world}: the sum is {expected}, over {over}, since {why}");
    comm.barrier()
}
