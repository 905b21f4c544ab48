//! The list of a model's tensors: derived from the architecture, or matched against real files.

use std::collections::BTreeMap;

use super::arch::{Rule, When};
use super::safetensors::{Stored, Weights};
use super::{Axis, MAX_BYTES, ModelSpec, StoredType};
use crate::{Error, Result};

/// A tensor that the architecture doesn't know may be this large, or a hundredth of the model: it is then
/// left out. A larger one means that the model isn't what config.json says.
const MAX_UNKNOWN_BYTES: u64 = 1 << 20;

/// One tensor of the model.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// What each dimension counts.
    pub axes: Vec<Axis>,
    /// The type of its elements as stored.
    pub stored: StoredType,
    /// Where its bytes are; none if the spec was made from a config.json alone.
    pub location: Option<Location>,
}

/// A tensor that a file holds and the model computes without, such as a pooler or a table of position
/// numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnusedTensor {
    /// Its name in the file.
    pub name: String,
    /// How many bytes it has.
    pub bytes: u64,
}

/// Where a tensor's bytes are: row-major, little endian, without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Which of [`ModelSpec::weight_files`].
    pub file: usize,
    /// The first byte, counted from the start of the file.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
}

impl TensorSpec {
    /// Elements in all.
    pub fn elements(&self) -> u64 {
        // Checked when the list was made: the bytes of all tensors together are below MAX_BYTES.
        self.shape.iter().map(|&dim| dim as u64).product()
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.stored.size()
    }
}

impl ModelSpec {
    /// Fills `tensors` with those the architecture implies.
    pub(super) fn derive_tensors(&mut self) -> Result<()> {
        let Some(stored) = StoredType::of(self.dtype) else {
            let what = format!("{} weights are not supported: use F32, F16 or BF16", self.dtype);
            return Err(Error::Unsupported { file: self.source.display().to_string(), what });
        };
        let mut tensors = Vec::new();
        for (name, rule) in self.expected(&self.prefix) {
            if self.requires(rule.when) {
                let shape = self.shape(rule.axes);
                tensors.push(TensorSpec { name, shape, axes: rule.axes.to_vec(), stored, location: None });
            }
        }
        self.set_tensors(tensors)
    }

    /// Replaces `tensors` by those of real files, each checked against the architecture.
    pub(super) fn use_weights(&mut self, mut weights: Weights) -> Result<()> {
        let rules = self.architecture.rules();
        let embedding = |prefix: &str| format!("{prefix}{}", rules.stem[0].name);
        let Some(prefix) = rules.prefixes.iter().find(|p| weights.tensors.contains_key(&embedding(p))) else {
            return Err(Error::MissingTensor { path: weights.root, tensor: embedding(rules.prefixes[0]) });
        };
        self.prefix = (*prefix).to_owned();

        let (mut tensors, mut unused) = (Vec::new(), Vec::new());
        for (name, rule) in self.expected(prefix) {
            let needed = self.requires(rule.when);
            let Some(Stored { dtype, shape, location }) = weights.tensors.remove(&name) else {
                if needed {
                    return Err(Error::MissingTensor { path: weights.root, tensor: name });
                }
                continue;
            };
            if !needed {
                unused.push(UnusedTensor { name, bytes: location.bytes });
                continue;
            }
            let path = &weights.files[location.file];
            let expected = self.shape(rule.axes);
            if shape != expected {
                return Err(Error::TensorShape { path: path.clone(), tensor: name, found: shape, expected });
            }
            if dtype.dtype().is_none() {
                let what = format!(
                    "tensor {name} is stored as {dtype}: only F32, F16 and BF16 weights are supported"
                );
                return Err(Error::Unsupported { file: path.display().to_string(), what });
            }
            let location = Some(location);
            tensors.push(TensorSpec { name, shape, axes: rule.axes.to_vec(), stored: dtype, location });
        }
        let known: u64 = tensors.iter().map(TensorSpec::bytes).fold(0, u64::saturating_add);
        self.dtype = most_common_type(&tensors).unwrap_or(self.dtype);

        for (name, Stored { dtype, shape, location }) in weights.tensors {
            if location.bytes > MAX_UNKNOWN_BYTES.max(known / 100) {
                let model_type = self.architecture.model_type();
                let what = format!(
                    "tensor {name} ({dtype} {shape:?}) is not part of a {model_type} model of {} layers: \
                     is config.json another model's?",
                    self.num_layers
                );
                return Err(Error::Unsupported {
                    file: weights.files[location.file].display().to_string(),
                    what,
                });
            }
            unused.push(UnusedTensor { name, bytes: location.bytes });
        }
        unused.sort_by(|a, b| a.name.cmp(&b.name));
        self.unused = unused;
        self.weight_files = weights.files;
        self.set_tensors(tensors)
    }

    fn set_tensors(&mut self, mut tensors: Vec<TensorSpec>) -> Result<()> {
        let total: u128 = tensors
            .iter()
            .map(|t| t.shape.iter().map(|&d| d as u128).fold(t.stored.size() as u128, u128::saturating_mul))
            .fold(0, u128::saturating_add);
        if total > MAX_BYTES as u128 {
            let what = "the size of the weights in bytes".to_owned();
            return Err(Error::TooLarge { what, size: total, limit: MAX_BYTES as u128 });
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        self.tensors = tensors;
        Ok(())
    }

    /// Every tensor that the architecture knows, by name.
    fn expected(&self, prefix: &str) -> Vec<(String, &'static Rule)> {
        let rules = self.architecture.rules();
        let layers = (0..self.num_layers).flat_map(|n| {
            let layer = format!("{prefix}{}.{n}", rules.layer);
            rules.layers.iter().map(move |rule| (format!("{layer}.{}", rule.name), rule))
        });
        let stem = rules.stem.iter().map(|rule| (format!("{prefix}{}", rule.name), rule));
        let head = rules.head.iter().map(|rule| (rule.name.to_owned(), rule));
        stem.chain(layers).chain(head).collect()
    }

    fn requires(&self, when: When) -> bool {
        match when {
            When::Always => true,
            When::QkvBias => self.qkv_bias,
            When::AttentionOutputBias => self.attention_output_bias,
            When::MlpBias => self.mlp_bias,
            When::UntiedHead => !self.tie_word_embeddings,
            When::Unused => false,
        }
    }

    fn shape(&self, axes: &[Axis]) -> Vec<usize> {
        axes.iter().map(|&axis| self.axis_size(axis)).collect()
    }

    /// Elements along an axis. Heads are at most 4096 and their product with `head_dim` is checked on
    /// parsing.
    fn axis_size(&self, axis: Axis) -> usize {
        match axis {
            Axis::Hidden => self.hidden_size,
            Axis::QueryHeads => self.num_attention_heads * self.head_dim,
            Axis::KvHeads => self.num_key_value_heads * self.head_dim,
            Axis::Ffn => self.intermediate_size,
            Axis::Vocab => self.vocab_size,
            Axis::Position => self.max_position_embeddings,
            Axis::TokenType => self.type_vocab_size,
        }
    }
}

/// The type that most bytes are stored in.
fn most_common_type(tensors: &[TensorSpec]) -> Option<tensorwire_core::DType> {
    let mut bytes: BTreeMap<u8, u64> = BTreeMap::new();
    for t in tensors {
        if let Some(dtype) = t.stored.dtype() {
            let sum = bytes.entry(dtype as u8).or_default();
            *sum = sum.saturating_add(t.bytes());
        }
    }
    let (code, _) = bytes.into_iter().max_by_key(|(_, n)| *n)?;
    tensorwire_core::DType::from_code(code)
}
