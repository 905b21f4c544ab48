//! The tensor-parallel layers. A column-parallel layer gives each rank some of the outputs and exchanges
//! nothing; a row-parallel layer takes each rank's part of the inputs and sums the products over the ranks.
//! Activations are `[tokens, width]` in f32.

use candle_core::{Device, Tensor};
use tensorwire::topology::ModelSpec;
use tensorwire::topology::plan::{Layer, Plan, Span};

use crate::comm::{Comm, with_f32};
use crate::weights::Weights;
use crate::{Error, Result};

/// Reads what the plan gives one rank, and counts it.
pub(crate) struct Loader<'a> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) weights: &'a Weights,
    pub(crate) plan: &'a Plan,
    pub(crate) rank: usize,
    /// Bytes of the tensors loaded so far.
    pub(crate) bytes: u64,
}

impl<'a> Loader<'a> {
    /// This rank's part of a tensor, which must be of the given shape: what the plan reads and what it computes
    /// with must agree.
    pub(crate) fn tensor(&mut self, name: &str, part: &[usize]) -> Result<Tensor> {
        let tensor = self.spec.tensor(name).ok_or_else(|| Error::MissingTensor(name.to_owned()))?;
        let shard = self.plan.tensor(name, self.rank);
        let shard =
            shard.ok_or_else(|| Error::Plan(format!("rank {} gets nothing of tensor {name}", self.rank)))?;
        let (data, found) = self.weights.read(tensor, &shard.slices)?;
        if found != part {
            let why = format!("rank {} gets {found:?} of tensor {name}, its layer needs {part:?}", self.rank);
            return Err(Error::Plan(why));
        }
        self.bytes += size_of_val(&data[..]) as u64;
        Ok(Tensor::from_vec(data, found, &Device::Cpu)?)
    }

    /// A bias, where the model has one.
    fn bias(&mut self, name: &str, part: usize) -> Result<Option<Tensor>> {
        let name = format!("{name}.bias");
        self.spec.tensor(&name).is_some().then(|| self.tensor(&name, &[part])).transpose()
    }

    /// A layer of the plan, and its share of the feed-forward columns.
    pub(crate) fn layer(&self, index: usize) -> Result<(&'a Layer, usize)> {
        let layer = self.plan.layers.get(index);
        let layer = layer.ok_or_else(|| Error::Plan(format!("it has no layer {index}")))?;
        Ok((layer, mine(&layer.mlp.ffn, self.rank, "feed-forward columns")?.len()))
    }
}

/// This rank's entry of a list that has one a rank.
pub(crate) fn mine<T: Copy>(list: &[T], rank: usize, what: &str) -> Result<T> {
    list.get(rank).copied().ok_or_else(|| Error::Plan(format!("it has no {what} for rank {rank}")))
}

/// A weight matrix `[outputs, inputs]`, as files store it.
struct Matrix(Tensor);

impl Matrix {
    /// `x [tokens, inputs]` times the transposed weights: `[tokens, outputs]`. The transpose is a view.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&self.0.t()?)?)
    }
}

/// A linear layer whose outputs are split: each rank computes its own from the whole input.
pub(crate) struct ColumnLinear {
    weight: Matrix,
    bias: Option<Tensor>,
}

impl ColumnLinear {
    /// From all `inputs` to this rank's `outputs`.
    pub(crate) fn load(
        from: &mut Loader<'_>,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<ColumnLinear> {
        let weight = from.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        Ok(ColumnLinear { weight: Matrix(weight), bias: from.bias(name, outputs)? })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        add_bias(self.weight.apply(x)?, self.bias.as_ref())
    }
}

/// A linear layer whose inputs are split: the ranks' products are summed.
pub(crate) struct RowLinear {
    weight: Matrix,
    bias: Option<Tensor>,
}

impl RowLinear {
    /// From this rank's `inputs` to all `outputs`.
    pub(crate) fn load(
        from: &mut Loader<'_>,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<RowLinear> {
        let weight = from.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        Ok(RowLinear { weight: Matrix(weight), bias: from.bias(name, outputs)? })
    }

    pub(crate) fn forward(&self, x: &Tensor, comm: &Comm) -> Result<Tensor> {
        let product = self.weight.apply(x)?;
        comm.sum_tensor(&product)?;
        // After the sum: every rank adds it, so that it counts once.
        add_bias(product, self.bias.as_ref())
    }
}

fn add_bias(x: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    Ok(match bias {
        Some(bias) => x.broadcast_add(bias)?,
        None => x,
    })
}

/// An embedding whose rows are split: a rank looks up the tokens it has, and the ranks' results are summed.
pub(crate) struct Embedding {
    weight: Tensor,
    /// The tokens whose rows this rank has.
    tokens: Span,
    vocab: usize,
    width: usize,
}

impl Embedding {
    pub(crate) fn load(from: &mut Loader<'_>, name: &str) -> Result<Embedding> {
        let (vocab, width) = (from.spec.vocab_size, from.spec.hidden_size);
        let tokens = mine(&from.plan.vocab.ranges, from.rank, "vocabulary")?;
        let weight = from.tensor(&format!("{name}.weight"), &[tokens.len(), width])?;
        Ok(Embedding { weight, tokens, vocab, width })
    }

    /// `[tokens, width]`.
    pub(crate) fn forward(&self, ids: &[u32], comm: &Comm) -> Result<Tensor> {
        let mut out = vec![0.0; ids.len() * self.width];
        with_f32(&self.weight, |rows| {
            for (&id, out) in ids.iter().zip(out.chunks_exact_mut(self.width)) {
                let index = id as usize;
                if index >= self.vocab {
                    return Err(Error::TokenOutOfRange { id, vocab: self.vocab });
                }
                if (self.tokens.start..self.tokens.end).contains(&index) {
                    let row = (index - self.tokens.start) * self.width;
                    out.copy_from_slice(&rows[row..row + self.width]);
                }
            }
            Ok(())
        })?;
        comm.sum(&mut out)?;
        Ok(Tensor::from_vec(out, (ids.len(), self.width), &Device::Cpu)?)
    }
}

/// The output head, its rows split as the embedding's are: each rank has the logits of its tokens, and the
/// ranks exchange them.
pub(crate) struct Head {
    weight: Matrix,
    counts: Vec<usize>,
}

impl Head {
    pub(crate) fn load(from: &mut Loader<'_>, name: &str) -> Result<Head> {
        let part = mine(&from.plan.vocab.ranges, from.rank, "vocabulary")?.len();
        let weight = from.tensor(&format!("{name}.weight"), &[part, from.spec.hidden_size])?;
        Head::new(from, weight)
    }

    /// A head that is the embedding: the memory is shared.
    pub(crate) fn tied(from: &Loader<'_>, embedding: &Embedding) -> Result<Head> {
        Head::new(from, embedding.weight.clone())
    }

    fn new(from: &Loader<'_>, weight: Tensor) -> Result<Head> {
        let (ranges, vocab) = (&from.plan.vocab.ranges, from.spec.vocab_size);
        let in_order = ranges.windows(2).all(|pair| pair[0].end == pair[1].start);
        let counts: Vec<usize> = ranges.iter().map(Span::len).collect();
        if !in_order || counts.iter().sum::<usize>() != vocab {
            return Err(Error::Plan(format!("its vocabulary ranges don't cover 0..{vocab} in order")));
        }
        Ok(Head { weight: Matrix(weight), counts })
    }

    /// The logits of one token `[1, width]` over the whole vocabulary.
    pub(crate) fn forward(&self, x: &Tensor, comm: &Comm) -> Result<Vec<f32>> {
        comm.gather(&self.weight.apply(x)?, &self.counts)
    }
}

/// Root-mean-square normalisation; replicated.
pub(crate) struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    pub(crate) fn load(from: &mut Loader<'_>, name: &str) -> Result<RmsNorm> {
        let width = from.spec.hidden_size;
        Ok(RmsNorm {
            weight: from.tensor(&format!("{name}.weight"), &[width])?,
            eps: from.spec.norm_eps as f32,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(candle_nn::ops::rms_norm(x, &self.weight, self.eps)?)
    }
}

/// Layer normalisation with a bias; replicated.
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    pub(crate) fn load(from: &mut Loader<'_>, name: &str) -> Result<LayerNorm> {
        let width = from.spec.hidden_size;
        let weight = from.tensor(&format!("{name}.weight"), &[width])?;
        let bias = from.tensor(&format!("{name}.bias"), &[width])?;
        Ok(LayerNorm { weight, bias, eps: from.spec.norm_eps as f32 })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(candle_nn::ops::layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }
}
