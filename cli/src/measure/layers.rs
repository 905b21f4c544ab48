//! What a decoder's layers take, run by the runtime over ranks that are processes.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tensorwire::Communicator;
use tensorwire::topology::table::fit::median;
use tensorwire::topology::{ModelSpec, Planner};
use tensorwire::transports::launch::Transport;
use tensorwire_runtime::{Model, Runtime, Spent, builtin};

use crate::failure::{Failure, print};
use crate::launch::run_self;

/// The hidden command that one rank runs.
pub(crate) const RANK_COMMAND: &str = "__layers-rank";

/// Models by which a step is fitted: many small layers, few large ones, and between. None is the built-in one; each rank's
/// weights are more than its caches hold.
const SHAPES: [Shape; 3] = [
    Shape { hidden: 512, layers: 24, heads: 8, ffn: 1408 },
    Shape { hidden: 1024, layers: 6, heads: 16, ffn: 2816 },
    Shape { hidden: 2048, layers: 2, heads: 16, ffn: 5632 },
];

struct Shape {
    hidden: usize,
    layers: usize,
    heads: usize,
    ffn: usize,
}

/// What is run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Subject {
    /// A model's directory; the built-in model without it.
    #[arg(long)]
    model: Option<PathBuf>,

    /// One of the models by which steps are fitted.
    #[arg(long, conflicts_with = "model")]
    shape: Option<usize>,

    /// Tokens to generate.
    #[arg(long, default_value_t = 32)]
    tokens: usize,
}

/// What a step took on rank 0: medians over the tokens, in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Steps {
    /// From one token to the next.
    pub(crate) step_us: f64,
    /// The embedding, each layer and the head.
    pub(crate) parts: Vec<Part>,
}

/// What a part of the network took on rank 0, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) us: f64,
    /// In collectives, waiting included.
    pub(crate) comm_us: f64,
}

impl Subject {
    /// A model's directory, or the built-in model.
    pub(crate) fn model(model: Option<PathBuf>, tokens: usize) -> Subject {
        Subject { model, shape: None, tokens }
    }

    /// The models by which steps are fitted.
    pub(crate) fn shapes() -> impl Iterator<Item = Subject> {
        (0..SHAPES.len()).map(|shape| Subject { model: None, shape: Some(shape), tokens: 24 })
    }

    /// Opens it; reads no weights.
    pub(crate) fn open(&self) -> Result<Model, Failure> {
        let opened = match (&self.model, self.shape) {
            (Some(dir), _) => Model::open(dir),
            (None, None) => Model::built_in(),
            (None, Some(n)) => {
                let shape = SHAPES.get(n).ok_or_else(|| Failure::usage(format!("there is no shape {n}")))?;
                Model::seeded(&shape.config(), builtin::SEED)
            }
        };
        opened.map_err(Failure::usage)
    }

    fn args(&self) -> Vec<OsString> {
        let mut args = vec![OsString::from("--tokens"), self.tokens.to_string().into()];
        if let Some(dir) = &self.model {
            args.extend(["--model".into(), dir.into()]);
        }
        if let Some(n) = self.shape {
            args.extend(["--shape".into(), n.to_string().into()]);
        }
        args
    }

    /// Runs it over `ranks` that share the processors out, and returns what its steps took.
    pub(crate) fn run(&self, transport: Transport, ranks: usize) -> Result<Steps, Failure> {
        let mut steps = None;
        run_self(RANK_COMMAND, self.args(), ranks, transport, |line| {
            let read = serde_json::from_slice(line);
            steps =
                Some(read.map_err(|e| Failure::run(format!("rank 0 wrote what is no measurement: {e}")))?);
            Ok(())
        })?;
        steps.ok_or_else(|| Failure::run("the ranks ended without a measurement"))
    }
}

impl Shape {
    fn config(&self) -> String {
        let Shape { hidden, layers, heads, ffn } = self;
        let kv = heads / 2;
        format!(
            r#"{{"model_type": "llama", "hidden_size": {hidden}, "num_hidden_layers": {layers},
                "num_attention_heads": {heads}, "num_key_value_heads": {kv}, "intermediate_size": {ffn},
                "vocab_size": 512, "max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-5,
                "tie_word_embeddings": false, "torch_dtype": "float32"}}"#
        )
    }
}

/// One rank: rank 0 prints what its steps took.
pub(crate) fn rank_main(subject: &Subject) -> Result<(), Failure> {
    let comm = Arc::new(Communicator::from_env().map_err(Failure::run)?);
    let model = subject.open()?;
    let plan = Planner::new(model.spec()).plan(comm.world()).map_err(Failure::usage)?;
    let mut runtime = Runtime::load(&model, &plan, comm.clone()).map_err(Failure::run)?;
    let prompt = prompt(model.spec());
    let room = model.max_tokens().saturating_sub(prompt.len());
    let mut taken: Vec<(Duration, Vec<Spent>)> = Vec::new();
    let mut last = Instant::now();
    runtime
        .generate(&prompt, subject.tokens.min(room), |token| {
            taken.push((last.elapsed(), token.parts.to_vec()));
            last = Instant::now();
        })
        .map_err(Failure::run)?;
    // The first token's is the whole prompt's.
    let steps = taken.get(1..).filter(|steps| !steps.is_empty()).and_then(summary);
    let steps =
        steps.ok_or_else(|| Failure::run("the model ended its text at once: there is no step to measure"))?;
    if comm.rank() == 0 {
        let json = serde_json::to_string(&steps).map_err(Failure::run)?;
        print(format_args!("{json}\n"))?;
    }
    comm.barrier().map_err(Failure::run)
}

/// Some tokens that any vocabulary has.
fn prompt(spec: &ModelSpec) -> Vec<u32> {
    builtin::PROMPT.iter().map(|id| id % spec.vocab_size.max(1) as u32).collect()
}

fn summary(steps: &[(Duration, Vec<Spent>)]) -> Option<Steps> {
    type Step = (Duration, Vec<Spent>);
    let us = |of: &dyn Fn(&Step) -> Duration| {
        let mut all: Vec<f64> = steps.iter().map(|step| of(step).as_secs_f64() * 1e6).collect();
        median(&mut all).map(|us| (us * 1e3).round() / 1e3)
    };
    let part = |i: usize| Some(Part { us: us(&|s| s.1[i].total)?, comm_us: us(&|s| s.1[i].comm)? });
    let parts = (0..steps.first()?.1.len()).map(part).collect::<Option<Vec<_>>>()?;
    Some(Steps { step_us: us(&|s| s.0)?, parts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_models_whose_weights_no_cache_holds() {
        for subject in Subject::shapes() {
            let model = subject.open().unwrap();
            let plan = Planner::new(model.spec()).plan(2).unwrap();
            assert!(plan.ranks.iter().all(|r| r.weight_bytes > 100 << 20), "{subject:?}");
        }
        assert!(Subject { shape: Some(9), ..Subject::model(None, 1) }.open().is_err());
    }

    #[test]
    fn a_step_is_the_median_of_its_tokens() {
        let spent = |us| Spent { total: Duration::from_micros(us), comm: Duration::from_micros(us / 10) };
        let step = |us| (Duration::from_micros(3 * us), vec![spent(us), spent(2 * us)]);
        let steps = summary(&[step(100), step(9000), step(110)]).unwrap();
        assert_eq!(steps.step_us, 330.0);
        let parts = [Part { us: 110.0, comm_us: 11.0 }, Part { us: 220.0, comm_us: 22.0 }];
        assert_eq!(steps.parts, parts);
    }
}
