//! A small tensor-parallel runtime on candle: what a runtime that links tensorwire looks like.
//!
//! Each rank is one process (or, in tests, one thread) with a [`Communicator`](tensorwire::Communicator). All
//! ranks open the same model, make the same plan and the same calls; each loads only the slices that the plan
//! gives it and gets the same result, bit for bit, as every other rank. It holds and computes everything in
//! f32: a model stored in f16 or bf16 takes twice the bytes in memory that its file and its plan count.
//!
//! ```
//! use tensorwire::Communicator;
//! use tensorwire::topology::Planner;
//! use tensorwire_runtime::{Error, Model, Runtime};
//!
//! let config = r#"{"model_type": "llama", "hidden_size": 36, "num_hidden_layers": 2,
//!     "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 64, "vocab_size": 101,
//!     "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32"}"#;
//! let model = Model::seeded(config, 7)?;
//! let plan = Planner::new(model.spec()).plan(2)?;
//! let ranks = Communicator::in_process(2)?;
//! let tokens = std::thread::scope(|scope| {
//!     let start = |comm| {
//!         let (model, plan) = (&model, &plan);
//!         scope.spawn(move || Ok(Runtime::load(model, plan, comm)?.generate(&[1, 2, 3], 8, |_| ())?.tokens))
//!     };
//!     let ranks: Vec<_> = ranks.into_iter().map(start).collect();
//!     ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Result<Vec<_>, Error>>()
//! })?;
//! assert_eq!(tokens[0], tokens[1]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod attention;
mod bert;
pub mod builtin;
mod comm;
mod error;
mod layers;
mod llama;
mod model;
mod runtime;
mod text;
pub mod weights;

pub use comm::Spent;
pub use error::{Error, Result};
pub use model::{Kind, Model};
pub use runtime::{Embeddings, Finish, Generation, Loaded, Runtime, Token};
