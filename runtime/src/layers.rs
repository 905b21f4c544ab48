//! The tensor-parallel layers. A column-parallel layer gives each rank some of the outputs and exchanges
//! nothing; a row-parallel layer takes each rank's part of the inputs and sums the products over the ranks.
//! Activations are `[tokens, width]` in f32.

use candle_core::{Device, Tensor};
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use tensorwire::topology::ModelSpec;
use tensorwire::topology::plan::{Plan, Span};

use crate::comm::{Comm, with_f32};
use crate::weights::Weights;
use crate::{Error, Result};

/// Reads what the plan gives one rank, and counts it. The plan has been checked against the model.
pub(crate) struct Loader<'a> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) weights: &'a Weights,
    pub(crate) plan: &'a Plan,
    pub(crate) rank: usize,
    /// Bytes of the tensors loaded so far.
    pub(crate) bytes: u64,
}

impl Loader<'_> {
    /// This rank's part of a tensor.
    pub(crate) fn tensor(&mut self, name: &str) -> Result<Tensor> {
        let missing = || Error::MissingTensor(name.to_owned());
        let tensor = self.spec.tensor(name).ok_or_else(missing)?;
        let shard = self.plan.tensor(name, self.rank).ok_or_else(missing)?;
        let (data, shape) = self.weights.read(tensor, &shard.slices)?;
        self.bytes += size_of_val(&data[..]) as u64;
        Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
    }

    /// `NAME.weight`.
    fn weight(&mut self, name: &str) -> Result<Tensor> {
        self.tensor(&format!("{name}.weight"))
    }

    /// `NAME.bias`, where the model has it.
    fn bias(&mut self, name: &str) -> Result<Option<Tensor>> {
        let name = format!("{name}.bias");
        self.spec.tensor(&name).is_some().then(|| self.tensor(&name)).transpose()
    }
}

/// A weight matrix `[outputs, inputs]`, as files store it.
struct Matrix(Tensor);

/// Bytes of weights from which a second thread is worth waking for one token.
const PARALLEL_FROM: usize = 1 << 20;

impl Matrix {
    /// `x [tokens, inputs]` times the transposed weights: `[tokens, outputs]`. The transpose is a view.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (outputs, inputs) = self.0.dims2()?;
        let threads = rayon::current_num_threads();
        if x.dim(0)? > 1 || threads == 1 || outputs * inputs * size_of::<f32>() < PARALLEL_FROM {
            return Ok(x.matmul(&self.0.t()?)?);
        }
        // candle multiplies a single row on one thread. It is bound by reading the weights: share them out.
        let rows = outputs.div_ceil(threads);
        let part = |start| x.matmul(&self.0.narrow(0, start, rows.min(outputs - start))?.t()?);
        let parts: candle_core::Result<Vec<Tensor>> =
            (0..outputs.div_ceil(rows)).into_par_iter().map(|i| part(i * rows)).collect();
        Ok(Tensor::cat(&parts?, 1)?)
    }
}

/// A linear layer whose outputs are split: each rank computes its own from the whole input.
pub(crate) struct ColumnLinear {
    weight: Matrix,
    bias: Option<Tensor>,
}

impl ColumnLinear {
    pub(crate) fn load(from: &mut Loader<'_>, name: &str) -> Result<ColumnLinear> {
        Ok(ColumnLinear { weight: Matrix(from.weight(name)?), bias: from.bias(name)? })
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
    pub(crate) fn load(from: &mut Loader<'_>, name: &str) -> Result<RowLinear> {
        Ok(RowLinear { weight: Matrix(from.weight(name)?), bias: from.bias(name)? })
    }

    pub(crate) fn forward(&self, x: &Tensor, comm: &Comm) -> Result<Tensor> {
        let product = self.weight.apply(x)?;
        comm.sum_tensor(&product)?;
        // After the sum: every rank adds it, so that it counts once.
        add_bias(product, self.bias.as_ref())
    }

    /// Adds the layer's output to `residual`, in place, and returns its norm: the addition and the norm are done
    /// while the sum arrives.
    pub(crate) fn add_to(
        &self,
        residual: &mut Tensor,
        x: &Tensor,
        norm: &RmsNorm,
        comm: &Comm,
    ) -> Result<Tensor> {
        if let Some(bias) = &self.bias {
            *residual = residual.broadcast_add(bias)?;
        }
        let product = self.weight.apply(x)?;
        comm.sum_add_rms_norm(&product, residual, &norm.weight, norm.eps)?;
        Ok(product)
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
        let tokens = from.plan.vocab.ranges[from.rank];
        let (vocab, width) = (from.spec.vocab_size, from.spec.hidden_size);
        Ok(Embedding { weight: from.weight(name)?, tokens, vocab, width })
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
        let weight = from.weight(name)?;
        Ok(Head::new(weight, from.plan))
    }

    /// A head that is the embedding: the memory is shared.
    pub(crate) fn tied(embedding: &Embedding, plan: &Plan) -> Head {
        Head::new(embedding.weight.clone(), plan)
    }

    fn new(weight: Tensor, plan: &Plan) -> Head {
        Head { weight: Matrix(weight), counts: plan.vocab.ranges.iter().map(Span::len).collect() }
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
        Ok(RmsNorm { weight: from.weight(name)?, eps: from.spec.norm_eps as f32 })
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
        let (weight, bias) = (from.weight(name)?, from.tensor(&format!("{name}.bias"))?);
        Ok(LayerNorm { weight, bias, eps: from.spec.norm_eps as f32 })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(candle_nn::ops::layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }
}
