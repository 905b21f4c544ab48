//! The plan: which rank holds what, which collectives follow, and what that costs.
//!
//! [`Planner`] applies the [rules](crate::shard) and the [cost model](crate::cost) to a model. The [`Plan`]
//! it makes is plain data with a stable JSON form, so that a runtime needs nothing else: for every tensor
//! and rank it says which slice to read, and for every layer which heads and columns to compute and what to
//! exchange. [`Plan::check`] proves that the slices cover the model.

mod check;
mod collectives;
mod diff;
mod explain;
mod html;
pub(crate) mod json;
pub(crate) mod notes;
mod share;
mod summary;
mod svg;
mod types;
mod view;

use crate::cost::CostModel;
use crate::model::{Cut, Dimension, ModelSpec, Stream, TensorSpec};
use crate::shard::{DimensionShares, Experts, Options, Shares};
use crate::{Error, Result};

pub use diff::{ClassDiff, DIFF_SCHEMA, Diff, Move, RankDiff, Source};
pub use explain::{Alternative, Explanation, Limit, NoteCost};
pub use types::{
    Attention, Collective, DimensionPlan, Layer, LayerShare, Mlp, ModelSummary, Plan, Predicted, RankShare,
    SCHEMA, Slice, Span, TensorShard, Vocab,
};

/// Entries of [`Plan::tensors`] at most. A 70-billion-parameter Llama over 64 ranks has 46 thousand, DeepSeek-V3
/// over 32 less than 200 thousand.
pub const MAX_TENSOR_SHARDS: usize = 1 << 22;

/// Plans one model.
#[derive(Clone, Debug)]
pub struct Planner<'a> {
    spec: &'a ModelSpec,
    costs: CostModel,
    options: Options,
}

impl<'a> Planner<'a> {
    /// A planner for `spec` that predicts with the default [`CostModel`].
    pub fn new(spec: &'a ModelSpec) -> Planner<'a> {
        Planner { spec, costs: CostModel::default(), options: Options::default() }
    }

    /// The same planner with other costs, such as measured ones.
    pub fn with_costs(self, costs: CostModel) -> Planner<'a> {
        Planner { costs, ..self }
    }

    /// The same planner with other options.
    pub fn with_options(self, options: Options) -> Planner<'a> {
        Planner { options, ..self }
    }

    /// The same planner, with routed experts shared so.
    pub fn experts(mut self, experts: Experts) -> Planner<'a> {
        self.options.experts = experts;
        self
    }

    /// The same planner, with tokens shared between blocks or not: see [`Options::sequence_parallel`].
    pub fn sequence_parallel(mut self, on: bool) -> Planner<'a> {
        self.options.sequence_parallel = on;
        self
    }

    /// The same planner for ranks of these speeds, in any unit: see [`Options::speeds`].
    pub fn speeds(mut self, speeds: Vec<f64>) -> Planner<'a> {
        self.options.speeds = speeds;
        self
    }

    /// The same planner for ranks that can hold so many bytes of weights: see [`Options::memory`].
    pub fn memory(mut self, bytes: Vec<u64>) -> Planner<'a> {
        self.options.memory = bytes;
        self
    }

    /// Shards the model over `world` tensor-parallel ranks. The same input gives the same plan.
    ///
    /// Errors: [`Error::NoRanks`], [`Error::TooManyRanks`], and [`Error::TooLarge`] for a plan of more than
    /// [`MAX_TENSOR_SHARDS`] entries.
    pub fn plan(&self, world: usize) -> Result<Plan> {
        let shares = Shares::of(self.spec, world, &self.options)?;
        let mut tensors = Vec::new();
        for tensor in &self.spec.tensors {
            if tensors.len().saturating_add(world) > MAX_TENSOR_SHARDS {
                let what = format!("the number of tensors times {world} ranks");
                let size = self.spec.tensors.len() as u128 * world as u128;
                return Err(Error::TooLarge { what, size, limit: MAX_TENSOR_SHARDS as u128 });
            }
            tensors.extend((0..world).filter_map(|rank| shard(tensor, &shares, rank)));
        }
        Ok(Plan { tensors, ..self.plan_without_tensors(&shares) })
    }

    /// [`plan`](Planner::plan) with [`Plan::tensors`] left empty, which is much less work: to compare many.
    ///
    /// Errors: [`Error::NoRanks`], [`Error::TooManyRanks`].
    pub fn outline(&self, world: usize) -> Result<Plan> {
        Ok(self.plan_without_tensors(&Shares::of(self.spec, world, &self.options)?))
    }

    fn plan_without_tensors(&self, shares: &Shares) -> Plan {
        let (spec, world) = (self.spec, shares.world);
        let carried = share::Carried::of(spec, shares);
        let layers: Vec<Layer> = (0..spec.layers.len()).map(|n| self.layer(n, shares, &carried)).collect();
        let vocab = self.vocab(shares);
        let predicted = self.predict(&carried, &layers, &vocab, world);
        let notes = self.notes(shares, &predicted).into_iter().map(|n| n.text).collect();
        Plan {
            schema: SCHEMA.to_owned(),
            model: summarise(spec),
            world,
            dimensions: spec.dims.iter().zip(&shares.dims).map(|d| dimension(d, shares)).collect(),
            layers,
            vocab,
            ranks: (0..world).map(|rank| carried.rank(spec, shares, rank)).collect(),
            tensors: Vec::new(),
            predicted,
            notes,
        }
    }

    /// A layer's shares and collectives.
    fn layer(&self, n: usize, shares: &Shares, carried: &share::Carried) -> Layer {
        let spec = &self.spec.layers[n];
        let collectives = self.layer_collectives(n, shares);
        let ranks = carried.layers[n].clone();
        let stream = stream_name(spec.stream);
        Layer { name: spec.name.clone(), stream, collectives, ranks, ..shared_by(self.spec, shares, n) }
    }

    fn vocab(&self, shares: &Shares) -> Vocab {
        let rows = self.spec.vocab.map(|dim| &shares.dims[dim]);
        Vocab {
            ranges: rows.map_or_else(Vec::new, |d| d.ranges.clone()),
            padded: rows.map_or(0, |d| d.padded),
            collectives: self.vocab_collectives(shares),
        }
    }

    fn predict(&self, carried: &share::Carried, layers: &[Layer], vocab: &Vocab, world: usize) -> Predicted {
        // A step is one token: what the context needs was done before.
        let own = |c: &&Collective| c.stream != "context";
        let in_layers = layers.iter().filter(|l| l.stream != "context").flat_map(|l| &l.collectives);
        let comm: f64 = in_layers.chain(&vocab.collectives).filter(own).map(|c| c.predicted_us).sum();
        // The slowest rank sets the pace.
        let read = (0..world).map(|rank| carried.read_bytes(self.spec, rank)).max().unwrap_or(0);
        let blocks = layers.iter().filter(|l| l.stream.is_empty()).count() + 1;
        Predicted {
            decode_us_per_token: rounded(self.costs.step(blocks, read, world).us + comm),
            comm_us_per_token: rounded(comm),
        }
    }

    fn notes(&self, shares: &Shares, predicted: &Predicted) -> Vec<notes::Note> {
        notes::notes(self.spec, shares, &self.options, &self.costs, predicted, self.one_rank_us())
    }

    /// What one rank alone is predicted to take for a token.
    fn one_rank_us(&self) -> f64 {
        let all = Shares::of(self.spec, 1, &Options::default());
        all.map_or(0.0, |all| {
            let read = share::Carried::of(self.spec, &all).read_bytes(self.spec, 0);
            self.costs.step(self.spec.layers.len() + 1, read, 1).us
        })
    }
}

impl Plan {
    /// What `rank` reads of the tensor `name`; none if it reads nothing of it.
    ///
    /// A binary search: [`tensors`](Plan::tensors) is sorted by name, then rank.
    pub fn tensor(&self, name: &str, rank: usize) -> Option<&TensorShard> {
        let found = self.tensors.binary_search_by(|t| (t.name.as_str(), t.rank).cmp(&(name, rank)));
        found.ok().map(|i| &self.tensors[i])
    }

    /// The dimension of that name.
    pub fn dimension(&self, name: &str) -> Option<&DimensionPlan> {
        self.dimensions.iter().find(|d| d.name == name)
    }
}

/// The part of one tensor that one rank reads.
fn shard(tensor: &TensorSpec, shares: &Shares, rank: usize) -> Option<TensorShard> {
    let slices = shares.slices(tensor, rank)?;
    let replicated = shares.is_replicated(tensor, rank);
    let bytes = share::elements(tensor, &slices) * tensor.stored.size();
    Some(TensorShard { name: tensor.name.clone(), rank, slices, replicated, bytes })
}

/// Which of a layer's dimensions each rank has what of; its name and what follows from that are left empty.
fn shared_by(spec: &ModelSpec, shares: &Shares, n: usize) -> Layer {
    let ranges = |dim: usize| shares.dims[dim].ranges.clone();
    let if_shared = |dim: usize| if shares.dims[dim].shared { ranges(dim) } else { Vec::new() };
    let mut layer = Layer::default();
    for block in &spec.layers[n].blocks {
        if let Some(a) = &block.attention {
            let attention = Attention { q_heads: ranges(a.heads), kv_heads: ranges(a.kv_heads) };
            if a.cross {
                layer.cross_attention = Some(attention);
            } else {
                layer.attention = attention;
            }
        }
        if let Some(ffn) = block.ffn {
            layer.mlp.ffn = if_shared(ffn);
        }
        if let Some(e) = block.experts {
            layer.mlp = Mlp {
                ffn: if_shared(e.ffn),
                experts: if_shared(e.experts),
                shared_ffn: e.shared.map_or_else(Vec::new, if_shared),
            };
        }
    }
    layer
}

fn dimension((d, of): (&Dimension, &DimensionShares), shares: &Shares) -> DimensionPlan {
    let (name, ranges) = (d.name.clone(), of.ranges.clone());
    let groups = if d.cut == Cut::ExpertColumns { shares.world / shares.parts(d.cut) } else { 1 };
    let groups = if of.shared { groups } else { 1 };
    DimensionPlan { name, size: d.size, granule: d.granule, ranges, shared: of.shared, groups }
}

/// How a plan writes a stream: not at all for the model's own tokens.
fn stream_name(stream: Stream) -> String {
    match stream {
        Stream::Tokens => String::new(),
        Stream::Context => "context".to_owned(),
        Stream::Both => "both".to_owned(),
    }
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
        quantization: spec.quantization.as_ref().map_or("", |q| q.format.name()).to_owned(),
        tie_word_embeddings: spec.tie_word_embeddings,
        parameters: spec.parameters(),
    }
}

/// To whole nanoseconds: more digits than a prediction has meaning for. Adding 0 turns the -0 of an empty sum
/// into 0.
fn rounded(us: f64) -> f64 {
    (us * 1000.0).round() / 1000.0 + 0.0
}
