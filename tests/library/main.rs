//! The library as its users see it: one binary, so that it links once.

mod common;
mod conformance;
mod faults;
mod groups;
mod job;
mod mismatch;
mod processes;
#[cfg(feature = "tcp")]
mod tcp;
