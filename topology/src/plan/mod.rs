//! The plan: which rank holds what, which collectives follow, and what that costs.
//!
//! [`Planner`] applies the [rules](crate::shard) and the [cost model](crate::cost) to a model. The [`Plan`]
//! it makes is plain data with a stable JSON form, so that a runtime needs nothing else: for every tensor
//! and rank it says which slice to read, and for every layer which heads and columns to compute and what to
//! exchange. [`Plan::check`] proves that the slices cover the model.

mod check;
pub(crate) mod json;
mod notes;
mod summary;
mod types;

use crate::cost::CostModel;
use crate::model::{Axis, ModelSpec, TensorSpec};
use crate::shard::Shares;
use crate::{Error, Result};

pub use types::{
    Attention, Collective, Layer, Mlp, ModelSummary, Plan, Predicted, RankShare, SCHEMA, Slice, Span,
    TensorShard, Vocab,
};

/// Entries of [`Plan::tensors`] at most. A 70-billion-parameter Llama over 64 ranks has 46 thousand.
pub const MAX_TENSOR_SHARDS: usize = 1 << 22;

/// Plans one model.
#[derive(Clone, Debug)]
pub struct Planner<'a> {
    spec: &'a ModelSpec,
    costs: CostModel,
}

impl<'a> Planner<'a> {
    /// A planner for `spec` that predicts with the default [`CostModel`].
    pub fn new(spec: &'a ModelSpec) -> Planner<'a> {
        Planner { spec, costs: CostModel::default() }
    }

    /// The same planner with other costs, such as measured ones.
    pub fn with_costs(self, costs: CostModel) -> Planner<'a> {
        Planner { costs, ..self }
    }

    /// Shards the model over `world` tensor-parallel ranks. The same input gives the same plan.
    ///
    /// Errors: [`Error::NoRanks`], [`Error::TooManyRanks`], and [`Error::TooLarge`] for a plan of more than
    /// [`MAX_TENSOR_SHARDS`] entries.
    pub fn plan(&self, world: usize) -> Result<Plan> {
        let spec = self.spec;
        let shares = Shares::of(spec, world)?;
        let entries = spec.tensors.len().saturating_mul(world);
        if entries > MAX_TENSOR_SHARDS {
            let what = format!("the number of tensors times {world} ranks");
            return Err(Error::TooLarge { what, size: entries as u128, limit: MAX_TENSOR_SHARDS as u128 });
        }

        let tensors = spec
            .tensors
            .iter()
            .flat_map(|t| {
                (0..world).map(|rank| shard(t, &shares, spec.head_dim, world, rank)).collect::<Vec<_>>()
            })
            .collect();
        let ranks: Vec<RankShare> = (0..world).map(|rank| rank_share(spec, &shares, rank)).collect();
        let layer = self.layer(&shares, world);
        let vocab = Vocab {
            ranges: shares.vocab.ranges.clone(),
            padded: shares.vocab.padded,
            collectives: self.vocab_collectives(&shares, world),
        };
        let predicted = self.predict(&shares, &layer, &vocab, world);
        let notes = notes::notes(spec, &shares, &self.costs, &predicted, self.one_rank_us());
        Ok(Plan {
            schema: SCHEMA.to_owned(),
            model: summarise(spec),
            world,
            layers: (0..spec.num_layers)
                .map(|n| Layer { name: spec.layer_name(n), ..layer.clone() })
                .collect(),
            vocab,
            ranks,
            tensors,
            predicted,
            notes,
        })
    }

    /// A layer's shares and collectives; all layers of these architectures are alike.
    fn layer(&self, shares: &Shares, world: usize) -> Layer {
        // A weight whose input axis is sharded gives partial sums, so an all-reduce follows it.
        let row_parallel = |axes: &[Axis]| axes.len() == 2 && axes[1].is_sharded();
        let rules = self.spec.architecture.rules().layers.iter().filter(|r| row_parallel(r.axes));
        let collectives =
            if world == 1 { Vec::new() } else { rules.map(|r| self.all_reduce(r.name, world)).collect() };
        Layer {
            name: String::new(),
            attention: Attention { q_heads: shares.heads.q.clone(), kv_heads: shares.heads.kv.clone() },
            mlp: Mlp { ffn: shares.ffn.clone() },
            collectives,
        }
    }

    /// After the embedding an all-reduce, as each token's row is on one rank and zero on the others; after
    /// the head an all-gather of the logits.
    fn vocab_collectives(&self, shares: &Shares, world: usize) -> Vec<Collective> {
        let architecture = self.spec.architecture;
        if world == 1 {
            return Vec::new();
        }
        let mut collectives = vec![self.all_reduce(architecture.rules().stem[0].name, world)];
        if architecture.is_decoder() {
            let bytes_per_token = (shares.vocab.padded * self.spec.dtype.size()) as u64;
            collectives.push(Collective {
                op: "all_gather".to_owned(),
                after: "lm_head".to_owned(),
                bytes_per_token,
                predicted_us: rounded(self.costs.all_gather_us(bytes_per_token, world)),
            });
        }
        collectives
    }

    /// The all-reduce of one token's residual stream after the module of this weight.
    fn all_reduce(&self, weight: &str, world: usize) -> Collective {
        let bytes_per_token = (self.spec.hidden_size * self.spec.dtype.size()) as u64;
        Collective {
            op: "all_reduce".to_owned(),
            after: weight.strip_suffix(".weight").unwrap_or(weight).to_owned(),
            bytes_per_token,
            predicted_us: rounded(self.costs.all_reduce_us(bytes_per_token, world)),
        }
    }

    fn predict(&self, shares: &Shares, layer: &Layer, vocab: &Vocab, world: usize) -> Predicted {
        let a_layer: f64 = layer.collectives.iter().map(|c| c.predicted_us).sum();
        let comm = a_layer * self.spec.num_layers as f64
            + vocab.collectives.iter().map(|c| c.predicted_us).sum::<f64>();
        // The slowest rank sets the pace.
        let read = (0..world).map(|rank| bytes_read_per_token(self.spec, shares, rank)).max().unwrap_or(0);
        Predicted {
            decode_us_per_token: rounded(self.costs.read_us(read) + comm),
            comm_us_per_token: rounded(comm),
        }
    }

    /// What one rank alone is predicted to take for a token.
    fn one_rank_us(&self) -> f64 {
        Shares::of(self.spec, 1)
            .map_or(0.0, |all| self.costs.read_us(bytes_read_per_token(self.spec, &all, 0)))
    }
}

impl Plan {
    /// What `rank` reads of the tensor `name`.
    ///
    /// A binary search: [`tensors`](Plan::tensors) is sorted by name, then rank.
    pub fn tensor(&self, name: &str, rank: usize) -> Option<&TensorShard> {
        let found = self.tensors.binary_search_by(|t| (t.name.as_str(), t.rank).cmp(&(name, rank)));
        found.ok().map(|i| &self.tensors[i])
    }
}

/// The part of one tensor that one rank reads.
fn shard(tensor: &TensorSpec, shares: &Shares, head_dim: usize, world: usize, rank: usize) -> TensorShard {
    let slices = slices(&tensor.axes, shares, head_dim, rank);
    let whole_everywhere = slices.is_empty();
    let shared_kv = tensor.axes.contains(&Axis::KvHeads) && shares.heads.shares_kv(rank);
    TensorShard {
        name: tensor.name.clone(),
        rank,
        slices,
        replicated: world > 1 && (whole_everywhere || shared_kv),
    }
}

fn slices(axes: &[Axis], shares: &Shares, head_dim: usize, rank: usize) -> Vec<Slice> {
    let slice = |(dim, &axis): (usize, &Axis)| {
        let range = shares.range(axis, head_dim, rank)?;
        Some(Slice { dim, range })
    };
    axes.iter().enumerate().filter_map(slice).collect()
}

/// Bytes of the part of one tensor that one rank reads.
fn shard_bytes(tensor: &TensorSpec, slices: &[Slice]) -> u64 {
    let part = |(dim, &size): (usize, &usize)| match slices.iter().find(|s| s.dim == dim) {
        Some(slice) => slice.range.len() as u64,
        None => size as u64,
    };
    tensor.shape.iter().enumerate().map(part).product::<u64>() * tensor.stored.size()
}

fn rank_share(spec: &ModelSpec, shares: &Shares, rank: usize) -> RankShare {
    let bytes = |t: &TensorSpec| shard_bytes(t, &slices(&t.axes, shares, spec.head_dim, rank));
    let weight_bytes = spec.tensors.iter().map(bytes).sum();
    let largest: u64 = spec.tensors.iter().map(bytes).max().unwrap_or(0);

    let (q, kv, ffn) = (&shares.heads.q[rank], &shares.heads.kv[rank], &shares.ffn[rank]);
    let kv_width = 2 * kv.len() * spec.head_dim;
    let kv_bytes =
        if spec.architecture.is_decoder() { spec.num_layers * kv_width * spec.dtype.size() } else { 0 };
    let logits = if spec.architecture.is_decoder() { shares.vocab.padded } else { 0 };
    // The residual stream and a block's input and output, queries, keys, values and the attention's result,
    // gate and up of the feed-forward layer, and the logits.
    let activations = 3 * spec.hidden_size + 2 * q.len() * spec.head_dim + kv_width + 2 * ffn.len() + logits;
    RankShare {
        rank,
        weight_bytes,
        kv_bytes_per_token: kv_bytes as u64,
        peak_bytes: weight_bytes + largest + (activations * spec.dtype.size()) as u64,
    }
}

/// Bytes of weights that one rank reads to decode one token: all but the embedding, of which it is one row,
/// unless that is the output head too.
fn bytes_read_per_token(spec: &ModelSpec, shares: &Shares, rank: usize) -> u64 {
    let embedding = format!("{}{}", spec.prefix, spec.architecture.rules().stem[0].name);
    spec.tensors
        .iter()
        .filter(|t| spec.tie_word_embeddings || t.name != embedding)
        .map(|t| shard_bytes(t, &slices(&t.axes, shares, spec.head_dim, rank)))
        .sum()
}

fn summarise(spec: &ModelSpec) -> ModelSummary {
    ModelSummary {
        model_type: spec.architecture.model_type().to_owned(),
        num_layers: spec.num_layers,
        hidden_size: spec.hidden_size,
        num_attention_heads: spec.num_attention_heads,
        num_key_value_heads: spec.num_key_value_heads,
        head_dim: spec.head_dim,
        intermediate_size: spec.intermediate_size,
        vocab_size: spec.vocab_size,
        dtype: spec.dtype.name().to_owned(),
        tie_word_embeddings: spec.tie_word_embeddings,
        parameters: spec.parameters(),
    }
}

/// To whole nanoseconds: more digits than a prediction has meaning for. Adding 0 turns the -0 of an empty sum
/// into 0.
fn rounded(us: f64) -> f64 {
    (us * 1000.0).round() / 1000.0 + 0.0
}
