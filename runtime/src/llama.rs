//! The Llama decoder, and Qwen2's, which differs by biases on q, k and v.

use std::f64::consts::TAU;

use candle_core::{DType, Device, Tensor};
use tensorwire::topology::model::{Rope, RopeScaling};

use crate::attention::{Heads, split_heads};
use crate::comm::{Comm, Spent, StopWatch};
use crate::layers::{ColumnLinear, Embedding, Head, Loader, RmsNorm, RowLinear};
use crate::{Error, Result};

/// One rank of the decoder.
pub(crate) struct Llama {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Head,
    /// Rotary frequencies, half as many as a head has elements.
    frequencies: Vec<f64>,
}

struct Layer {
    attention_norm: RmsNorm,
    heads: Heads,
    q: ColumnLinear,
    k: ColumnLinear,
    v: ColumnLinear,
    o: RowLinear,
    mlp_norm: RmsNorm,
    gate: ColumnLinear,
    up: ColumnLinear,
    down: RowLinear,
}

/// The keys and values of the tokens so far, with room for a fixed number of them, and the rotations of all
/// places up to there.
pub(crate) struct Cache {
    tokens: usize,
    /// A layer's keys and values, `[kv heads, room, width]` each.
    layers: Vec<(Tensor, Tensor)>,
    cos: Tensor,
    sin: Tensor,
}

impl Llama {
    pub(crate) fn load(from: &mut Loader<'_>) -> Result<Llama> {
        let spec = from.spec;
        let rope = spec.rope.as_ref().ok_or_else(|| unsupported_rope("none"))?;
        let embedding = Embedding::load(from, &format!("{}embed_tokens", spec.prefix))?;
        Ok(Llama {
            layers: (0..spec.num_layers).map(|n| Layer::load(from, n)).collect::<Result<_>>()?,
            norm: RmsNorm::load(from, &format!("{}norm", spec.prefix))?,
            head: if spec.tie_word_embeddings {
                Head::tied(&embedding, from.plan)
            } else {
                Head::load(from, "lm_head")?
            },
            embedding,
            frequencies: frequencies(rope, spec.head_dim)?,
        })
    }

    /// An empty cache with room for `room` tokens.
    pub(crate) fn cache(&self, room: usize) -> Result<Cache> {
        let half = self.frequencies.len();
        let zeros = |heads| Tensor::zeros((heads, room, 2 * half), DType::F32, &Device::Cpu);
        let layers = self.layers.iter().map(|l| Ok((zeros(l.heads.kv)?, zeros(l.heads.kv)?)));
        let table = |f: fn(f64) -> f64| {
            let angles =
                (0..room).flat_map(|place| self.frequencies.iter().map(move |w| f(place as f64 * w) as f32));
            Tensor::from_iter(angles, &Device::Cpu)?.reshape((room, half))
        };
        Ok(Cache {
            tokens: 0,
            layers: layers.collect::<Result<_>>()?,
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
        })
    }

    /// Runs the tokens that follow those in the cache, adds them to it; returns the logits after the last, and what the
    /// embedding, each layer and the head took.
    pub(crate) fn forward(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        comm: &Comm,
    ) -> Result<(Vec<f32>, Vec<Spent>)> {
        let mut watch = StopWatch::start(comm);
        let mut x = self.embedding.forward(ids, comm)?;
        watch.lap();
        // Each norm but the first is made where its input is: at the end of what comes before it.
        let mut norms = self.layers.iter().map(|l| &l.attention_norm).chain([&self.norm]);
        let first = norms.next().unwrap_or(&self.norm);
        let mut normed = first.forward(&x)?;
        for ((index, layer), next_norm) in self.layers.iter().enumerate().zip(norms) {
            normed = layer.forward(&mut x, &normed, next_norm, cache, index, comm)?;
            watch.lap();
        }
        cache.tokens += ids.len();
        let logits = self.head.forward(&normed.narrow(0, ids.len() - 1, 1)?, comm)?;
        watch.lap();
        Ok((logits, watch.laps))
    }
}

impl Layer {
    fn load(from: &mut Loader<'_>, n: usize) -> Result<Layer> {
        let layer = from.spec.layer_name(n);
        let name = |part: &str| format!("{layer}.{part}");
        Ok(Layer {
            attention_norm: RmsNorm::load(from, &name("input_layernorm"))?,
            heads: Heads::new(&from.plan.layers[n].attention, from.rank, from.spec),
            q: ColumnLinear::load(from, &name("self_attn.q_proj"))?,
            k: ColumnLinear::load(from, &name("self_attn.k_proj"))?,
            v: ColumnLinear::load(from, &name("self_attn.v_proj"))?,
            o: RowLinear::load(from, &name("self_attn.o_proj"))?,
            mlp_norm: RmsNorm::load(from, &name("post_attention_layernorm"))?,
            gate: ColumnLinear::load(from, &name("mlp.gate_proj"))?,
            up: ColumnLinear::load(from, &name("mlp.up_proj"))?,
            down: RowLinear::load(from, &name("mlp.down_proj"))?,
        })
    }

    /// Adds to `x`, whose attention norm is `normed`, what the layer makes of it; returns the next layer's norm
    /// of that.
    fn forward(
        &self,
        x: &mut Tensor,
        normed: &Tensor,
        next_norm: &RmsNorm,
        cache: &Cache,
        index: usize,
        comm: &Comm,
    ) -> Result<Tensor> {
        let q = cache.rotate(&split_heads(&self.q.forward(normed)?, self.heads.q)?)?;
        let k = cache.rotate(&split_heads(&self.k.forward(normed)?, self.heads.kv)?)?;
        let v = split_heads(&self.v.forward(normed)?, self.heads.kv)?;
        let (k, v) = cache.append(index, &k, &v)?;
        let normed = self.o.add_to(x, &self.heads.attend(&q, &k, &v, true)?, &self.mlp_norm, comm)?;
        let inner = (self.gate.forward(&normed)?.silu()? * self.up.forward(&normed)?)?;
        self.down.add_to(x, &inner, next_norm, comm)
    }
}

impl Cache {
    /// Rotates `x [heads, tokens, width]` by the places that follow the tokens in the cache.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = x.dim(1)?;
        let (cos, sin) = (self.cos.narrow(0, self.tokens, tokens)?, self.sin.narrow(0, self.tokens, tokens)?);
        Ok(candle_nn::rotary_emb::rope(&x.unsqueeze(0)?, &cos, &sin)?.squeeze(0)?)
    }

    /// Writes new keys and values behind a layer's old ones; returns views of all of them.
    fn append(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (keys, values) = &self.layers[layer];
        keys.slice_set(k, 1, self.tokens)?;
        values.slice_set(v, 1, self.tokens)?;
        let context = self.tokens + k.dim(1)?;
        Ok((keys.narrow(1, 0, context)?, values.narrow(1, 0, context)?))
    }
}

/// Radians a place, one for each pair of a head's elements. An error for a scaling that isn't known here.
pub(crate) fn frequencies(rope: &Rope, head_dim: usize) -> Result<Vec<f64>> {
    let plain = (0..head_dim / 2).map(|i| rope.theta.powf(-2.0 * i as f64 / head_dim as f64));
    let scaled = |w: f64| match &rope.scaling {
        RopeScaling::None => Ok(w),
        RopeScaling::Linear { factor } => Ok(w / factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            // How often the pair turns within the original context: few turns are stretched, many are kept.
            let turns = *original_max_position_embeddings as f64 * w / TAU;
            let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            Ok(keep * w + (1.0 - keep) * w / factor)
        }
        RopeScaling::Other(name) => Err(unsupported_rope(name)),
        _ => Err(unsupported_rope("unknown")),
    };
    plain.map(scaled).collect()
}

fn unsupported_rope(kind: &str) -> Error {
    Error::Unsupported { key: "rope_type", value: kind.to_owned(), supported: "default, linear and llama3" }
}
