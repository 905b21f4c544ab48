//! The BERT encoder, and sentence embeddings from it.

use candle_core::Tensor;

use crate::attention::{Heads, split_heads};
use crate::comm::Comm;
use crate::layers::{ColumnLinear, Embedding, LayerNorm, Loader, RowLinear};
use crate::{Error, Result};

/// One rank of the encoder.
pub(crate) struct Bert {
    words: Embedding,
    /// Position embeddings `[max positions, width]`, that of token type 0 added: a single text is all type 0.
    positions: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    heads: Heads,
    query: ColumnLinear,
    key: ColumnLinear,
    value: ColumnLinear,
    output: RowLinear,
    attention_norm: LayerNorm,
    up: ColumnLinear,
    down: RowLinear,
    norm: LayerNorm,
}

impl Bert {
    pub(crate) fn load(from: &mut Loader<'_>) -> Result<Bert> {
        let spec = from.spec;
        let name = |part: &str| format!("{}embeddings.{part}", spec.prefix);
        let positions = from.tensor(&name("position_embeddings.weight"))?;
        let types = from.tensor(&name("token_type_embeddings.weight"))?;
        Ok(Bert {
            words: Embedding::load(from, &name("word_embeddings"))?,
            positions: positions.broadcast_add(&types.get(0)?)?,
            norm: LayerNorm::load(from, &name("LayerNorm"))?,
            layers: (0..spec.num_layers).map(|n| Layer::load(from, n)).collect::<Result<_>>()?,
        })
    }

    /// The mean of the last hidden states of one text, scaled to unit length.
    pub(crate) fn embed(&self, ids: &[u32], comm: &Comm) -> Result<Vec<f32>> {
        let words = self.words.forward(ids, comm)?;
        let mut x = self.norm.forward(&(words + self.positions.narrow(0, 0, ids.len())?)?)?;
        for layer in &self.layers {
            x = layer.forward(&x, comm)?;
        }
        // One text at a time: there is no padding for an attention mask to leave out.
        let mean: Vec<f32> = x.mean(0)?.to_vec1()?;
        let norm = mean.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Err(Error::NotFinite);
        }
        Ok(mean.iter().map(|&v| (f64::from(v) / norm.max(1e-12)) as f32).collect())
    }
}

impl Layer {
    fn load(from: &mut Loader<'_>, n: usize) -> Result<Layer> {
        let layer = from.spec.layer_name(n);
        let name = |part: &str| format!("{layer}.{part}");
        Ok(Layer {
            heads: Heads::new(&from.plan.layers[n].attention, from.rank, from.spec),
            query: ColumnLinear::load(from, &name("attention.self.query"))?,
            key: ColumnLinear::load(from, &name("attention.self.key"))?,
            value: ColumnLinear::load(from, &name("attention.self.value"))?,
            output: RowLinear::load(from, &name("attention.output.dense"))?,
            attention_norm: LayerNorm::load(from, &name("attention.output.LayerNorm"))?,
            up: ColumnLinear::load(from, &name("intermediate.dense"))?,
            down: RowLinear::load(from, &name("output.dense"))?,
            norm: LayerNorm::load(from, &name("output.LayerNorm"))?,
        })
    }

    fn forward(&self, x: &Tensor, comm: &Comm) -> Result<Tensor> {
        let q = split_heads(&self.query.forward(x)?, self.heads.q)?;
        let k = split_heads(&self.key.forward(x)?, self.heads.kv)?;
        let v = split_heads(&self.value.forward(x)?, self.heads.kv)?;
        let mixed = self.output.forward(&self.heads.attend(&q, &k, &v, false)?, comm)?;
        let x = self.attention_norm.forward(&(mixed + x)?)?;
        let fed = self.down.forward(&self.up.forward(&x)?.gelu_erf()?, comm)?;
        self.norm.forward(&(fed + x)?)
    }
}
