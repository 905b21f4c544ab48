//! What is sharded: a model's dimensions and its tensors, read from the model's own files.
//!
//! [`ModelSpec::load`] takes a directory as Hugging Face lays it out (`config.json` next to
//! `model.safetensors`, or next to `model.safetensors.index.json` and the shards it names) or a `config.json`
//! alone. The tensors are those that the architecture and the configuration imply. With weights, one that is
//! missing or of another shape is an error, and what else the files hold is listed as unused.

mod arch;
mod config;
mod dimension;
mod expand;
mod families;
mod layer;
mod quantization;
mod safetensors;
mod tensors;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use tensorwire_core::DType;

use crate::{Error, Result};

pub use arch::Architecture;
pub use dimension::{Axis, Cut, Dimension, Segment};
pub use layer::{AttentionSpec, Block, Cache, ExpertsSpec, LayerSpec, Stream, Sum, Use};
pub use quantization::{QuantFormat, Quantization};
pub use safetensors::StoredType;
pub use tensors::{Location, Owner, TensorSpec, UnusedTensor};

pub(crate) use expand::gcd;

/// Transformer layers at most; real models have about a hundred.
pub const MAX_LAYERS: usize = 4096;
/// Attention heads at most; real models have at most a few hundred.
pub const MAX_HEADS: usize = 4096;
/// The largest width, vocabulary or context.
pub const MAX_DIM: usize = 1 << 28;
/// Bytes of weights at most (1 PiB): no sum of a few thousand of these overflows 64 bits.
pub const MAX_BYTES: u64 = 1 << 50;

/// A model as its own files describe it.
///
/// Where config.json leaves a field out, it has the default that the transformers library gives it for this
/// `model_type`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelSpec {
    /// What config.json calls it.
    pub model_type: String,
    /// Which rules apply.
    pub architecture: Architecture,
    /// Layers, of all stacks.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer; of the dense one where others have experts.
    pub intermediate_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Positions that the model was made for; for BERT, rows of the position embedding.
    pub max_position_embeddings: usize,
    /// Rows of the token type embedding; 0 where there is none.
    pub type_vocab_size: usize,
    /// The feed-forward layer's activation, as config.json names it: `silu`, `gelu`, ...
    pub hidden_act: String,
    /// What is added to the variance in RMSNorm (`rms_norm_eps`) or LayerNorm (`layer_norm_eps`).
    pub norm_eps: f64,
    /// Rotary position embedding; none for BERT, whose positions are learned.
    pub rope: Option<Rope>,
    /// The attention window in tokens, where the model limits it.
    pub sliding_window: Option<usize>,
    /// Whether the output head is the embedding. Always false for an encoder, which has no head.
    pub tie_word_embeddings: bool,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub attention_output_bias: bool,
    /// Whether the feed-forward projections have a bias.
    pub mlp_bias: bool,
    /// Tokens that end a text, from config.json.
    pub eos_token_ids: Vec<u32>,
    /// The type that most weight bytes are stored in; activations have it too.
    pub dtype: DType,
    /// What every name in `tensors` but the head's starts with: `model.`, `bert.` or nothing.
    pub prefix: String,
    /// How the linear layers are quantised.
    pub quantization: Option<Quantization>,
    /// What ranks may share.
    pub dims: Vec<Dimension>,
    /// The dimension of the vocabulary, where the model has one.
    pub vocab: Option<usize>,
    /// The modules that look up vocabulary rows: a rank has some rows, and the ranks' results are summed.
    pub embeddings: Vec<Sum>,
    /// The module that makes logits, where there is one.
    pub logits: Option<String>,
    /// The layers, of all stacks.
    pub layers: Vec<LayerSpec>,
    /// Every tensor that the model computes with, sorted by name.
    pub tensors: Vec<TensorSpec>,
    /// What a plan must say of how the model was read.
    pub notes: Vec<String>,
    /// What else the files hold, sorted by name: no rank reads it.
    pub unused: Vec<UnusedTensor>,
    source: PathBuf,
    weight_files: Vec<PathBuf>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched for contexts longer than the model was trained on.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies are divided by `factor`, high ones kept, those between interpolated.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context the model was first trained on.
        original_max_position_embeddings: usize,
    },
    /// Another method, named as in config.json. It doesn't change the plan, but a runtime must know it.
    Other(String),
}

impl ModelSpec {
    /// Reads a model directory, or a config.json alone.
    ///
    /// A directory without weights is read as its config.json alone would be; [`weight_files`] is then an
    /// error. With weights, also a model of an unknown architecture can be planned if its tensors have a Llama's
    /// names and shapes.
    ///
    /// [`weight_files`]: ModelSpec::weight_files
    pub fn load(path: &Path) -> Result<ModelSpec> {
        let meta = std::fs::metadata(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let config = if meta.is_dir() { path.join("config.json") } else { path.to_owned() };
        let json = read_text(&config, config::MAX_CONFIG_BYTES)?;
        let weights = if meta.is_dir() { safetensors::open(path)? } else { None };
        let (family, mut draft) = config::parse(&json, &config.display().to_string(), weights.as_ref())?;
        draft.spec.source = path.to_owned();
        match weights {
            Some(weights) => draft.with_weights(family, weights),
            None => draft.derive(family),
        }
    }

    /// Reads the text of a config.json. The tensors are those the architecture implies.
    pub fn from_config(json: &str) -> Result<ModelSpec> {
        let (family, draft) = config::parse(json, "config.json", None)?;
        draft.derive(family)
    }

    /// The files that hold the weights; [`Location::file`] counts in these.
    ///
    /// An error if the spec was made from a config.json alone.
    pub fn weight_files(&self) -> Result<&[PathBuf]> {
        match self.weight_files.as_slice() {
            [] => Err(Error::NoWeights { path: self.source.clone() }),
            files => Ok(files),
        }
    }

    /// Whether the tensors are those of real files rather than derived from config.json.
    pub fn has_weights(&self) -> bool {
        !self.weight_files.is_empty()
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorSpec> {
        self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok().map(|i| &self.tensors[i])
    }

    /// The prefix of layer `n`'s tensors, such as `model.layers.0`; empty if there is no such layer.
    pub fn layer_name(&self, n: usize) -> &str {
        self.layers.get(n).map_or("", |l| &l.name)
    }

    /// Parameters in all, of the tensors that the model computes with.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(TensorSpec::parameters).sum()
    }

    /// Bytes of the tensors that the model computes with, as stored.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorSpec::bytes).sum()
    }
}

impl ModelSpec {
    /// A model of nothing, for a family to fill.
    fn empty(architecture: Architecture) -> ModelSpec {
        ModelSpec {
            model_type: String::new(),
            architecture,
            num_layers: 0,
            hidden_size: 0,
            num_attention_heads: 0,
            num_key_value_heads: 0,
            head_dim: 0,
            intermediate_size: 0,
            vocab_size: 0,
            max_position_embeddings: 0,
            type_vocab_size: 0,
            hidden_act: String::new(),
            norm_eps: 0.0,
            rope: None,
            sliding_window: None,
            tie_word_embeddings: false,
            qkv_bias: false,
            attention_output_bias: false,
            mlp_bias: false,
            eos_token_ids: Vec::new(),
            dtype: DType::F32,
            prefix: String::new(),
            quantization: None,
            dims: Vec::new(),
            vocab: None,
            embeddings: Vec::new(),
            logits: None,
            layers: Vec::new(),
            tensors: Vec::new(),
            notes: Vec::new(),
            unused: Vec::new(),
            source: PathBuf::new(),
            weight_files: Vec::new(),
        }
    }
}

/// Reads a text file of at most `limit` bytes, so that a wrong path can't fill the memory.
fn read_text(path: &Path, limit: u64) -> Result<String> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut text = String::new();
    File::open(path).map_err(io)?.take(limit + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > limit {
        return Err(Error::TooLarge {
            what: format!("the size of {} in bytes", path.display()),
            size: text.len() as u128,
            limit: limit as u128,
        });
    }
    Ok(text)
}
