//! The list of a model's tensors: as the architecture implies it, or matched against real files.

use std::collections::BTreeMap;

use super::expand::{Expanded, expand};
use super::families::{Draft, Family, Form};
use super::layer::Use;
use super::safetensors::{Stored, Weights};
use super::{Architecture, Axis, MAX_BYTES, ModelSpec, StoredType};
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
    /// What each dimension is made of.
    pub axes: Vec<Axis>,
    /// The type of its elements as stored.
    pub stored: StoredType,
    /// Where its bytes are; none if the spec was made from a config.json alone.
    pub location: Option<Location>,
    /// What it is part of as a whole, such as one expert: only ranks that have that hold anything of it.
    pub owner: Option<Owner>,
    /// Which of [`ModelSpec::layers`] it is in; none for embeddings, heads and the like.
    pub layer: Option<usize>,
    /// How it is used.
    pub used: Use,
    /// How many of the model's parameters an element holds: 1, more where they are packed, 0 for scales and the
    /// like.
    pub weights_an_element: u32,
}

/// One index of a dimension, such as expert 17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Owner {
    /// Which of [`ModelSpec::dims`].
    pub dim: usize,
    /// Which index of it.
    pub index: usize,
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

    /// The model's parameters that it holds.
    pub fn parameters(&self) -> u64 {
        self.elements() * u64::from(self.weights_an_element)
    }

    /// Whether ranks may hold different parts of it.
    pub fn is_shared(&self) -> bool {
        self.owner.is_some() || self.axes.iter().any(|a| !a.is_whole())
    }
}

impl Draft {
    /// The model with the tensors that the architecture implies.
    pub(super) fn derive(self, family: &Family) -> Result<ModelSpec> {
        let prefix = family.prefixes[0];
        let expanded = expand(family, &self, prefix)?;
        let tensors = expanded.tensors.into_iter().filter(|t| t.needed);
        let tensors = tensors
            .map(|t| TensorSpec {
                name: t.name,
                shape: t.shape,
                axes: t.axes,
                stored: t.stored,
                location: None,
                owner: t.owner,
                layer: t.layer,
                used: t.used,
                weights_an_element: t.weights_an_element,
            })
            .collect();
        let Expanded { dims, layers, .. } = expanded;
        self.finish(family, prefix, dims, layers, tensors)
    }

    /// The model with the tensors of real files, each checked against the architecture. Where the configuration
    /// leaves a size out, the shapes say it.
    pub(super) fn with_weights(mut self, family: &Family, mut weights: Weights) -> Result<ModelSpec> {
        let marker = |prefix: &str| {
            let rule = family.stem.first();
            let suffix =
                if rule.is_some_and(|r| matches!(r.form, Form::Linear { .. })) { ".weight" } else { "" };
            format!("{prefix}{}{suffix}", rule.map_or("", |r| r.name))
        };
        let found = |p: &&&str| family.stem.is_empty() || weights.tensors.contains_key(&marker(p));
        let Some(prefix) = family.prefixes.iter().find(found) else {
            return Err(Error::MissingTensor { path: weights.root, tensor: marker(family.prefixes[0]) });
        };
        let Expanded { dims, layers, tensors: mut expected } = loop {
            let expanded = expand(family, &self, prefix)?;
            // Each round settles a size, so that there are few.
            if !self.learn_size(&expanded, &weights) {
                break expanded;
            }
        };
        // A name may be that of a tensor in a form that another model has.
        expected.sort_by_key(|t| !t.needed);

        let (mut tensors, mut unused) = (Vec::new(), Vec::new());
        for t in expected {
            let Some(Stored { dtype, shape, location }) = weights.tensors.remove(&t.name) else {
                if t.needed {
                    return Err(Error::MissingTensor { path: weights.root, tensor: t.name });
                }
                continue;
            };
            if !t.needed {
                unused.push(UnusedTensor { name: t.name, bytes: location.bytes });
                continue;
            }
            let path = &weights.files[location.file];
            if shape != t.shape {
                return Err(Error::TensorShape {
                    path: path.clone(),
                    tensor: t.name,
                    found: shape,
                    expected: t.shape,
                });
            }
            // What is expected in the model's own type may be in another that it can be computed with.
            let fits = if t.stored.dtype().is_some() { dtype.dtype().is_some() } else { dtype == t.stored };
            if !fits {
                let what = format!(
                    "tensor {} is stored as {dtype}: only F32, F16 and BF16 weights are supported, and what \
                     quantization_config describes",
                    t.name
                );
                return Err(Error::Unsupported { file: path.display().to_string(), what });
            }
            tensors.push(TensorSpec {
                name: t.name,
                shape,
                axes: t.axes,
                stored: dtype,
                location: Some(location),
                owner: t.owner,
                layer: t.layer,
                used: t.used,
                weights_an_element: t.weights_an_element,
            });
        }
        let known: u64 = tensors.iter().map(TensorSpec::bytes).fold(0, u64::saturating_add);
        if self.spec.quantization.is_none() {
            self.spec.dtype = most_common_type(&tensors).unwrap_or(self.spec.dtype);
        }

        for (name, Stored { dtype, shape, location }) in weights.tensors {
            if self.whole.iter().any(|start| name.starts_with(start)) {
                tensors.push(TensorSpec {
                    axes: vec![Axis::WHOLE; shape.len()],
                    name,
                    shape,
                    stored: dtype,
                    location: Some(location),
                    owner: None,
                    layer: None,
                    used: Use::Call,
                    weights_an_element: 1,
                });
                continue;
            }
            if self.spec.architecture == Architecture::Unknown {
                let what = format!(
                    "tensor {name} ({dtype} {shape:?}) of an unknown architecture fits no rule, so the model can't be \
                     planned: how it is computed decides how it may be cut"
                );
                return Err(Error::Unsupported {
                    file: weights.files[location.file].display().to_string(),
                    what,
                });
            }
            let ignored = self.ignored.iter().any(|start| name.starts_with(start));
            if !ignored && location.bytes > MAX_UNKNOWN_BYTES.max(known / 100) {
                let what = format!(
                    "tensor {name} ({dtype} {shape:?}) is not part of a {} model of {} layers: \
                     is config.json another model's?",
                    self.spec.architecture.model_type(),
                    layers.len()
                );
                return Err(Error::Unsupported {
                    file: weights.files[location.file].display().to_string(),
                    what,
                });
            }
            unused.push(UnusedTensor { name, bytes: location.bytes });
        }
        unused.sort_by(|a, b| a.name.cmp(&b.name));
        self.spec.unused = unused;
        self.spec.weight_files = weights.files;
        self.finish(family, prefix, dims, layers, tensors)
    }

    /// Corrects one size that was a default by the shape of a tensor, if there is one to correct.
    fn learn_size(&mut self, expanded: &Expanded, weights: &Weights) -> bool {
        for t in expanded.tensors.iter().filter(|t| t.needed) {
            let Some(stored) = weights.tensors.get(&t.name).filter(|s| s.shape.len() == t.shape.len()) else {
                continue;
            };
            let differs = |&i: &usize| stored.shape[i] != t.shape[i];
            let Some(i) = (0..t.shape.len()).find(differs) else { continue };
            let Some(first) = t.axes[i].segments.first() else { continue };
            // The dimension's own size, or the width of a head, of which there are as many as configured.
            let dim = &expanded.dims[first.dim];
            let of_heads = if matches!(dim.cut, super::Cut::Heads { .. }) { "head_dim" } else { "" };
            for (name, each) in [(dim.name.as_str(), first.elements), (of_heads, dim.size)] {
                let sizes = &mut self.sizes[0];
                let value = stored.shape[i] / each;
                let plain = t.axes[i].segments.len() == 1 && first.per == 1;
                if plain && value > 0 && value * each == stored.shape[i] && sizes.learn(name, value) {
                    self.spec
                        .notes
                        .push(format!("{name} = {value}, which config.json leaves out, is from {}", t.name));
                    self.take_sizes();
                    return true;
                }
            }
        }
        false
    }

    /// Sets the spec's fields from the sizes.
    fn take_sizes(&mut self) {
        let value = |name: &str| self.sizes[0].get(name).map(|s| s.value);
        let spec = &mut self.spec;
        spec.num_key_value_heads = value("kv_heads").unwrap_or(spec.num_key_value_heads);
        spec.head_dim = value("head_dim").unwrap_or(spec.head_dim);
        spec.intermediate_size = value("ffn").unwrap_or(spec.intermediate_size);
    }

    fn finish(
        self,
        family: &Family,
        prefix: &str,
        dims: Vec<super::Dimension>,
        layers: Vec<super::LayerSpec>,
        mut tensors: Vec<TensorSpec>,
    ) -> Result<ModelSpec> {
        let total: u128 = tensors
            .iter()
            .map(|t| t.shape.iter().map(|&d| d as u128).fold(t.stored.size() as u128, u128::saturating_mul))
            .fold(0, u128::saturating_add);
        if total > MAX_BYTES as u128 {
            let what = "the size of the weights in bytes".to_owned();
            return Err(Error::TooLarge { what, size: total, limit: MAX_BYTES as u128 });
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let encoder_only = self.flags.contains("encoder_only");
        let own = |&(module, stream): &(&str, _)| {
            // Of an encoder alone, what the decoder looks up isn't looked up.
            let gone = encoder_only && stream == super::Stream::Tokens;
            let stream = if encoder_only { super::Stream::Tokens } else { stream };
            (!gone).then(|| super::Sum { after: module.to_owned(), stream })
        };
        let mut spec = self.spec;
        spec.num_layers = layers.len();
        spec.vocab = dims.iter().position(|d| d.cut == super::Cut::Vocabulary);
        spec.embeddings = family.embeddings.iter().filter_map(own).collect();
        spec.logits = family.logits.filter(|_| !encoder_only).map(str::to_owned);
        spec.prefix = prefix.to_owned();
        (spec.dims, spec.layers, spec.tensors) = (dims, layers, tensors);
        Ok(spec)
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
