//! NCCL, loaded at run time: found, checked, and called through a table of our own.
//!
//! | file | what |
//! | --- | --- |
//! | `sys` | the C interface: types, numbers and the table of functions |
//! | `library` | where NCCL is looked for, and what is asked of it |
//! | `comm` | one NCCL communicator: nonblocking, with a deadline for whatever it does |
//!
//! [`DeviceCommunicator`](crate::device::DeviceCommunicator) is made of these.

pub(crate) mod comm;
mod library;
pub(crate) mod sys;

pub use library::{Library, MINIMUM, Version};
