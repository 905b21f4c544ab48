//! Collectives for tensor-parallel inference, and the planner that says what to shard.
//!
//! A runtime links this crate and asks it two things:
//!
//! * **How do I shard this model?** [`topology`] reads a model's own files and plans which heads, columns and
//!   rows each rank holds, and which collectives follow.
//! * **Exchange this.** A [`Communicator`] carries all-reduce, all-gather, reduce-scatter, broadcast and
//!   barrier between the ranks, over shared memory. The result is the same bits on every rank; a peer that
//!   dies, stalls or makes another call is an [`Error`] that names it.
//!
//! ```
//! use tensorwire::{Communicator, ReduceOp};
//!
//! // A row-parallel linear layer: each rank multiplies its columns, the partial products are summed.
//! fn row_parallel(comm: &Communicator, x: &[f32], w: &[Vec<f32>]) -> tensorwire::Result<Vec<f32>> {
//!     let mut y: Vec<f32> = w.iter().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
//!     comm.all_reduce(&mut y, ReduceOp::Sum)?;
//!     Ok(y)
//! }
//!
//! // Under a launcher a rank says `Communicator::from_env()?`; here the ranks are threads.
//! std::thread::scope(|s| {
//!     for comm in Communicator::in_process(2)? {
//!         s.spawn(move || {
//!             let (x, w) = match comm.rank() {
//!                 0 => (vec![1.0], vec![vec![2.0], vec![3.0]]),
//!                 _ => (vec![10.0], vec![vec![4.0], vec![5.0]]),
//!             };
//!             assert_eq!(row_parallel(&comm, &x, &w).unwrap(), [42.0, 53.0]);
//!         });
//!     }
//!     Ok::<(), tensorwire::Error>(())
//! })?;
//! # Ok::<(), tensorwire::Error>(())
//! ```
//!
//! The crates behind it: `tensorwire-core` (types, errors), [`topology`], [`transports`], [`collectives`].

pub use tensorwire_collectives as collectives;
#[cfg(feature = "nccl")]
pub use tensorwire_collectives::device;
pub use tensorwire_topology as topology;
pub use tensorwire_transports as transports;

pub use tensorwire_collectives::{Algorithm, AllReducePlan, Communicator, Symmetric, Work};
pub use tensorwire_core::{
    Call, DEFAULT_TIMEOUT, DType, Deadline, Element, Error, Link, Op, ReduceOp, Result, Tuning, Wire,
};
pub use tensorwire_transports::shm::{FlightRecord, Options};

/// The README's example, so that it compiles.
#[doc = include_str!("../README.md")]
#[cfg(doctest)]
pub struct Readme;
