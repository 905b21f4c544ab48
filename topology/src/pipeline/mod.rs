//! Pipelines of several models: a graph of stages, placed on groups of devices.
//!
//! A [`Pipeline`] is read from JSON or TOML, schema [`SCHEMA`]; `examples/pipelines` has Cosmos-Predict1-7B's. Each
//! stage calls one model a number of times, after other stages. [`place`] gives each stage a group of devices and a
//! way to divide its model over them, such that all models' weights are resident together and one request takes the
//! least time that was found.
//!
//! ```
//! use tensorwire_topology::pipeline::Pipeline;
//!
//! let pipeline = Pipeline::from_toml(
//!     r#"
//!     schema = "tensorwire.pipeline/v1"
//!     name = "answer, and check the answer"
//!     [model.writer]
//!     config = { model_type = "llama", hidden_size = 576, num_hidden_layers = 30, num_attention_heads = 9,
//!         num_key_value_heads = 3, intermediate_size = 1536, vocab_size = 49152, torch_dtype = "bfloat16" }
//!     [model.guard]
//!     parameters = 100_000_000
//!     bytes_per_parameter = 2
//!     flops_per_item = 2e11
//!     whole_because = "it is small"
//!     [[stage]]
//!     name = "write"
//!     model = "writer"
//!     tokens = 128
//!     new_tokens = 512
//!     [[stage]]
//!     name = "check"
//!     model = "guard"
//!     after = ["write"]
//!     "#,
//! )?;
//! assert_eq!(pipeline.order()?, [0, 1]);
//! # Ok::<(), tensorwire_topology::Error>(())
//! ```

mod describe;
mod options;
mod plan;
mod solve;
mod summary;

pub use describe::{Height, MAX_STAGES, Model, Pipeline, SCHEMA, Stage};
pub use plan::{DeviceUse, ModelPlan, PLAN_SCHEMA, PipelinePlan, StagePlan, Transfer, place};
