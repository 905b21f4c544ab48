//! Reads a model's own files and plans how to shard it over tensor-parallel ranks.
//!
//! Pure: nothing here talks to a peer, and apart from reading the model's `config.json` and safetensors
//! headers nothing does I/O.
#![forbid(unsafe_code)]

pub mod plan;

pub use plan::Plan;
