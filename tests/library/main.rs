//! The library as its users see it: one binary, so that it links once.

#[path = "../support/checks.rs"]
mod checks;
mod common;
mod conformance;
#[cfg(feature = "tcp")]
mod cut;
#[cfg(feature = "nccl")]
mod devices;
mod faults;
mod fused;
mod groups;
#[cfg(feature = "tcp")]
mod impaired;
mod job;
#[cfg(feature = "tcp")]
mod launchers;
mod limits;
#[cfg(feature = "tcp")]
mod links;
mod mismatch;
#[cfg(feature = "tcp")]
mod mixed;
#[cfg(feature = "tcp")]
#[path = "../support/namespaces.rs"]
mod namespaces;
#[cfg(feature = "tcp")]
mod network;
mod processes;
#[cfg(feature = "quic")]
mod quic;
mod started;
#[cfg(feature = "tcp")]
mod strangers;
mod survivors;
#[cfg(feature = "tcp")]
mod tcp;
#[cfg(feature = "tls")]
mod tls;
mod tuning;
#[path = "../support/values.rs"]
mod values;
