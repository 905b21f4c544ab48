//! Collectives between the ranks of a group: the [`Communicator`], the schedules it follows and the kernels
//! that reduce.
//!
//! The way of a call: [`Communicator`] checks the arguments, `select` picks an algorithm, `schedule` says
//! which part of the data is whose, `engine` moves and reduces it.

#[cfg(feature = "tcp")]
mod adapt;
mod communicator;
#[cfg(feature = "nccl")]
pub mod device;
mod engine;
#[cfg(feature = "nccl")]
pub mod nccl;
#[cfg(feature = "tcp")]
pub mod network;
pub mod reduce;
mod schedule;
mod select;

pub use communicator::{AllReducePlan, Communicator, Symmetric, Work};
pub use select::Algorithm;
