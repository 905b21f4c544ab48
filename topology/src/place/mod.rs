//! Placement: along which axes to divide a model, on which devices of a fabric, and what that costs.
//!
//! ```text
//! ModelSpec ──> Workload ─┐
//!                         ├─> search: candidates ─> layout ─> cost, memory ──> Placement
//! Fabric ─────> Machine ──┘
//! ```
//!
//! | axis | divides | exchanges, a rank |
//! | --- | --- | --- |
//! | tensor (`tp`) | heads, columns, vocabulary rows | all-reduces of `T H e`, two a layer of most models |
//! | | rows of a convolutional model's pictures | halos between neighbours, sums for group norms |
//! | sequence (`sp`) | the tokens between a tensor-parallel group's sums | the same bytes; activations are divided |
//! | expert (`ep`, `etp`) | experts over `ep` groups, each one's columns over a group's `etp` ranks | all-to-alls of `k T H e etp / tp`, there and back |
//! | context (`cp`) | a sequence's tokens, or its cache while decoding | Ulysses: 4 all-to-alls of `T H e / cp` an attention; a ring: keys and values |
//! | guidance (`cfg`) | the two passes of a diffusion step | a latent a step |
//! | pipeline (`pp`) | layers | `T H e` a stage |
//! | data (`dp`) | sequences | nothing |
//!
//! (`T` tokens, `H` hidden size, `e` bytes an element, `k` experts a token.) What exchanges most lies nearest: `tp`
//! innermost on the nearest islands, then `cp`, `cfg`, `pp` and `dp`. Each combination of degrees that is
//! [worth trying](degrees::candidates) is laid on the devices, its blocks are cut into stages such that the slowest is
//! as fast as can be under each device's memory, and its time is predicted: see [`predict`] and [`exchange`]. A
//! device's memory is a hard limit, for [weights, cache, activations, buffers and the peak while
//! loading](arrange::Memory). Shares of devices of different speed follow their speed.
//!
//! The same input gives the same answer, byte for byte. One device may win, and the answer says so.
//!
//! ```
//! use tensorwire_topology::fabric::Fabric;
//! use tensorwire_topology::place::{Request, Workload, place};
//! use tensorwire_topology::ModelSpec;
//!
//! let spec = ModelSpec::from_config(
//!     r#"{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
//!         "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "torch_dtype": "bfloat16"}"#,
//! )?;
//! let fabric = Fabric::from_toml(
//!     r#"
//!     name = "four cards"
//!     [[model]]
//!     name = "gpu"
//!     kind = "gpu"
//!     memory = "24 GiB"
//!     memory_gbps = 1000
//!     tflops = { f16 = 100 }
//!     [[host]]
//!     name = "host"
//!     device = [{ model = "gpu", count = 4 }]
//!     [links]
//!     host = { alpha_us = 5, gbps = 20 }
//!     "#,
//! )?;
//! let placement = place(&Workload::of(&spec), &fabric, &Request { context: 4096, ..Request::default() })?;
//! assert_eq!(placement.chosen.degrees.tp, 4);
//! // A device alone would take longer, as it reads four times the weights.
//! let alone = placement.rejected.iter().find(|r| r.alternative.devices == 1).unwrap();
//! assert!(alone.alternative.predicted.step_us > 2.0 * placement.chosen.predicted.step_us);
//! # Ok::<(), tensorwire_topology::Error>(())
//! ```

pub mod arrange;
pub mod degrees;
mod derive;
pub mod exchange;
mod groups;
pub mod layout;
pub mod machine;
pub mod pass;
pub mod predict;
mod report;
pub mod search;
pub mod share;
mod stages;
mod summary;
#[cfg(test)]
mod tests;
pub mod workload;

use crate::fabric::Fabric;
use crate::{Error, Result};

pub use arrange::Memory;
pub use degrees::{ContextBy, Degrees};
pub use machine::Machine;
pub use pass::Goal;
pub use report::{Alternative, Cost, DeviceMemory, Placement, Portion, RankPlace, Reason, Rejected, SCHEMA};
pub use workload::Workload;

pub(crate) use report::{Reporter, rounded};

use arrange::{Arranger, Misfit, Task};

/// Tokens in a sequence, and sequences at a time, at most.
pub const MAX_CONTEXT: usize = 1 << 28;
/// See [`MAX_CONTEXT`].
pub const MAX_BATCH: usize = 1 << 20;

/// What to place a model for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is to be best.
    pub goal: Goal,
    /// Tokens in each sequence: those of the prompt, and those that the cache has to hold.
    pub context: usize,
    /// Sequences at a time.
    pub batch: usize,
    /// The devices that may be used, as places in the fabric; none for all that models run on.
    pub devices: Option<Vec<usize>>,
}

impl Default for Request {
    /// The time of a token of one sequence with a context of 2048, on all devices.
    fn default() -> Request {
        Request { goal: Goal::Decode, context: 2048, batch: 1, devices: None }
    }
}

/// Places a model on a fabric.
///
/// # Errors
/// [`Error::NoPlacement`] if it fits in no arrangement, with the nearest one's numbers, and for a request of nothing or
/// of devices that aren't there; [`Error::TooLarge`] above [`MAX_CONTEXT`] and [`MAX_BATCH`].
pub fn place(workload: &Workload, fabric: &Fabric, request: &Request) -> Result<Placement> {
    with_task(workload, fabric, request, |task, assumed| {
        let found = search::search(task);
        let mut reporter = Reporter { task, arranger: Arranger::new(task) };
        let Some(best) = &found.best else {
            return Err(Error::NoPlacement(reporter.nothing_fits(&found)));
        };
        Ok(Placement {
            schema: SCHEMA.to_owned(),
            model: workload.name.clone(),
            fabric: fabric.name().to_owned(),
            goal: request.goal,
            context: request.context,
            batch: request.batch,
            explored: found.tried.len(),
            chosen: reporter.alternative(best),
            ranks: reporter.ranks(best),
            rejected: reporter.rejected(&found, best),
            notes: reporter.notes(&found, best, assumed),
        })
    })
}

/// What one arrangement would cost, whether it fits or not.
///
/// # Errors
/// As [`place`], and [`Error::NoPlacement`] for degrees that are no arrangement at all.
pub fn alternative(
    workload: &Workload,
    fabric: &Fabric,
    request: &Request,
    degrees: &Degrees,
) -> Result<Alternative> {
    with_task(workload, fabric, request, |task, _| {
        let mut reporter = Reporter { task, arranger: Arranger::new(task) };
        let arranged: Result<_, Misfit> = reporter.arranger.arrange(degrees);
        match arranged {
            Ok(a) => Ok(reporter.alternative(&a)),
            Err(why) => Err(Error::NoPlacement(reporter.misfit(degrees, &why))),
        }
    })
}

fn with_task<T>(
    workload: &Workload,
    fabric: &Fabric,
    request: &Request,
    run: impl FnOnce(Task<'_>, Vec<String>) -> Result<T>,
) -> Result<T> {
    let Request { goal, context, batch, devices } = request;
    for (what, size, limit) in [("the context", *context, MAX_CONTEXT), ("the batch", *batch, MAX_BATCH)] {
        if size == 0 {
            return Err(Error::NoPlacement(format!("{what} is 0: give at least 1")));
        }
        if size > limit {
            let what = what.to_owned();
            return Err(Error::TooLarge { what, size: size as u128, limit: limit as u128 });
        }
    }
    let mut devices = devices.clone().unwrap_or_else(|| fabric.workers());
    devices.sort_unstable();
    devices.dedup();
    if devices.last().is_none_or(|last| *last >= fabric.devices().len()) {
        let there = fabric.devices().len();
        return Err(Error::NoPlacement(format!("no such devices: {} has {there}", fabric.name())));
    }
    let (machine, assumed) = Machine::of(fabric, &devices, workload.bits);
    run(Task { workload, machine: &machine, goal: *goal, context: *context, batch: *batch }, assumed)
}
