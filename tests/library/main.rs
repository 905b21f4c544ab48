//! The library as its users see it: one binary, so that it links once.

mod common;
mod conformance;
mod faults;
mod fused;
mod groups;
mod job;
mod limits;
mod mismatch;
mod processes;
mod survivors;
#[cfg(feature = "tcp")]
mod tcp;
mod tuning;
