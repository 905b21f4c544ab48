//! What the tests share: small models, ranks as threads, and models written to files.
#![allow(dead_code)] // Each test file is a crate of its own and uses some of this.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use tensorwire::Communicator;
use tensorwire::topology::Planner;
use tensorwire_runtime::weights::Weights;
use tensorwire_runtime::{Error, Model, Runtime};

/// Dimensions of a small decoder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) model_type: &'static str,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) ffn: usize,
    pub(crate) vocab: usize,
    pub(crate) tied: bool,
}

impl Shape {
    /// Its config.json, with a hidden size that doesn't follow from the heads.
    pub(crate) fn config(&self) -> String {
        let Shape { model_type, heads, kv_heads, head_dim, ffn, vocab, tied } = self;
        format!(
            r#"{{"model_type": "{model_type}", "hidden_size": 60, "num_hidden_layers": 3,
            "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "head_dim": {head_dim},
            "intermediate_size": {ffn}, "vocab_size": {vocab}, "tie_word_embeddings": {tied},
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "hidden_act": "silu", "torch_dtype": "float32"}}"#
        )
    }
}

pub(crate) const PROMPT: [u32; 11] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8];
pub(crate) const SEED: u64 = 42;

/// What one rank of a decoder gave.
pub(crate) struct Output {
    pub(crate) tokens: Vec<u32>,
    /// One vector a token.
    pub(crate) logits: Vec<Vec<f32>>,
    pub(crate) weight_bytes: u64,
}

/// Runs `work` on each of `world` ranks, each a thread, and returns the results in rank order.
pub(crate) fn on_ranks<T: Send>(
    model: &Model,
    world: usize,
    work: impl Fn(&mut Runtime) -> Result<T, Error> + Sync,
) -> Result<Vec<T>, Error> {
    let plan = Planner::new(model.spec()).plan(world)?;
    let comms = Communicator::in_process(world)?;
    std::thread::scope(|scope| {
        let (plan, work) = (&plan, &work);
        let run = move |comm: Communicator| work(&mut Runtime::load(model, plan, comm)?);
        let ranks: Vec<_> = comms.into_iter().map(|comm| scope.spawn(move || run(comm))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Generates on each of `world` ranks.
pub(crate) fn generate(model: &Model, world: usize, max_tokens: usize) -> Vec<Output> {
    on_ranks(model, world, |runtime| {
        let mut logits = Vec::new();
        let done = runtime.generate(&PROMPT, max_tokens, |token| logits.push(token.logits.to_vec()))?;
        Ok(Output { tokens: done.tokens, logits, weight_bytes: runtime.loaded().weight_bytes })
    })
    .unwrap()
}

/// The largest absolute difference.
pub(crate) fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// The smallest distance between the two largest logits of a step: what a difference must stay below for the
/// tokens to be the same by more than luck.
pub(crate) fn smallest_gap(logits: &[Vec<f32>]) -> f32 {
    let gap = |step: &Vec<f32>| {
        let mut sorted = step.clone();
        sorted.sort_by(f32::total_cmp);
        sorted[sorted.len() - 1] - sorted[sorted.len() - 2]
    };
    logits.iter().map(gap).fold(f32::INFINITY, f32::min)
}

/// Writes a seeded model as a directory: config.json and its weights in `files` files.
pub(crate) fn write_model(dir: &Path, config: &str, dtype: Dtype, files: usize) {
    let model = Model::seeded(config, SEED).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = model
        .spec()
        .tensors
        .iter()
        .map(|t| {
            let (data, shape) = Weights::seeded(SEED).read(t, &[]).unwrap();
            let bytes = match dtype {
                Dtype::F32 => data.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::F16 => data.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
                Dtype::BF16 => data.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
                other => panic!("{other:?}"),
            };
            (t.name.clone(), shape, bytes)
        })
        .collect();
    std::fs::write(dir.join("config.json"), config).unwrap();
    let write = |name: &str, part: &[(String, Vec<usize>, Vec<u8>)]| {
        let views = part.iter().map(|(n, s, b)| (n, TensorView::new(dtype, s.clone(), b).unwrap()));
        serialize_to_file(views, None, &dir.join(name)).unwrap();
    };
    if files == 1 {
        return write("model.safetensors", &tensors);
    }
    let mut weight_map = BTreeMap::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(files)).enumerate() {
        let name = format!("model-{:05}-of-{files:05}.safetensors", i + 1);
        write(&name, part);
        weight_map.extend(part.iter().map(|(tensor, ..)| (tensor.clone(), name.clone())));
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
