//! The vocabulary that every part of tensorwire shares: data types, reduce operations, ranks, calls,
//! deadlines, tunings, links and errors. Nothing here does I/O.

mod call;
mod deadline;
mod dtype;
mod error;
mod link;
mod tuning;
mod wire;

pub use call::{Call, Op};
pub use deadline::{DEFAULT_TIMEOUT, Deadline};
pub use dtype::{DType, Element, ReduceOp};
pub use error::{Error, Result};
pub use link::Link;
pub use tuning::Tuning;
pub use wire::Wire;

/// The environment variable in which a launcher tells the ranks that it binds which processors those of their host have
/// together, as `0-3,8`.
pub const JOB_PROCESSORS_VAR: &str = "TENSORWIRE_JOB_PROCESSORS";
