//! Reads a model's own files and plans how to shard it over tensor-parallel ranks; knows the machine they run on.
//!
//! ```text
//! config.json, *.safetensors ──> model ──> shard (rules) ──> plan ──> JSON, a runtime
//!                                            cost (alpha-beta) ──┘
//! ```
//!
//! * [`model`]: what is sharded. [`ModelSpec`] holds the dimensions and every tensor's name and shape.
//! * [`shard`]: the rules. Pure functions from (sizes, ranks) to ranges.
//! * [`cost`]: what an exchange and a decode step are expected to take.
//! * [`plan`]: which rank holds what. [`Planner`] makes a [`Plan`]; a [`Plan`] is plain data.
//!
//! * [`fabric`]: what a plan runs on: hosts, devices, and what messages between them cost.
//! * [`discover`]: what the machine is, read from procfs and sysfs.
//! * [`table`]: what was measured on the machine about the collectives, kept in a file.
//! * [`mod@svg`]: a writer of pictures.
//!
//! Nothing here talks to a peer. Reading `config.json` and the safetensors headers, [`discover`] and [`table`]'s
//! file are all its I/O.
//!
//! ```
//! use tensorwire_topology::{ModelSpec, Planner};
//!
//! let spec = ModelSpec::from_config(
//!     r#"{"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
//!         "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
//!         "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#,
//! )?;
//! let plan = Planner::new(&spec).plan(2)?;
//!
//! // Nine query heads don't divide by two, so rank 0 takes five of them ...
//! let attention = &plan.layers[0].attention;
//! assert_eq!(attention.q_heads.iter().map(|s| s.len()).collect::<Vec<_>>(), [5, 4]);
//! // ... and both ranks need the second of the three key/value heads.
//! assert_eq!((attention.kv_heads[0].end, attention.kv_heads[1].start), (2, 1));
//!
//! // What rank 1 reads of one tensor: rows 320..576, the heads 5..9 of 64 rows each.
//! let q = plan.tensor("model.layers.0.self_attn.q_proj.weight", 1).unwrap();
//! assert_eq!((q.slices[0].dim, q.slices[0].range.start, q.slices[0].range.end), (0, 320, 576));
//!
//! println!("{}", plan.summary());
//! # Ok::<(), tensorwire_topology::Error>(())
//! ```
#![forbid(unsafe_code)]

pub mod cost;
pub mod discover;
mod error;
pub mod fabric;
pub mod model;
pub mod pipeline;
pub mod place;
pub mod plan;
pub mod shard;
pub mod svg;
pub mod table;

pub use error::{Error, Result};
pub use fabric::Fabric;
pub use model::ModelSpec;
pub use plan::{Plan, Planner};
