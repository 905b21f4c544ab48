//! The plan as data. Its JSON form is a contract: fields are added, never renamed.

use serde::{Deserialize, Serialize};

/// The schema that [`Plan::schema`] names.
pub const SCHEMA: &str = "tensorwire.plan/v1";

/// A half-open range `[start, end)`, written as a JSON array of two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "[usize; 2]", into = "[usize; 2]")]
pub struct Span {
    /// The first index inside.
    pub start: usize,
    /// The first index past the end.
    pub end: usize,
}

impl Span {
    /// The range `[start, end)`.
    pub const fn new(start: usize, end: usize) -> Span {
        Span { start, end }
    }

    /// How many indices it holds.
    pub const fn len(&self) -> usize {
        self.end.saturating_sub(self.start)
    }

    /// Whether it holds none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it holds an index.
    pub const fn contains(&self, index: usize) -> bool {
        self.start <= index && index < self.end
    }

    /// What both hold; empty if nothing.
    pub fn intersection(&self, other: Span) -> Span {
        let start = self.start.max(other.start);
        Span { start, end: self.end.min(other.end).max(start) }
    }
}

impl From<[usize; 2]> for Span {
    fn from([start, end]: [usize; 2]) -> Span {
        Span { start, end }
    }
}

impl From<Span> for [usize; 2] {
    fn from(s: Span) -> [usize; 2] {
        [s.start, s.end]
    }
}

/// How one model is sharded over `world` tensor-parallel ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// What is sharded.
    pub model: ModelSummary,
    /// Tensor-parallel ranks.
    pub world: usize,
    /// One entry a transformer layer, in order.
    pub layers: Vec<Layer>,
    /// Everything that is shared, and who has what of it. Layers refer to these.
    pub dimensions: Vec<DimensionPlan>,
    /// How the vocabulary (embedding and output head) is split.
    pub vocab: Vocab,
    /// What each rank carries, in rank order.
    pub ranks: Vec<RankShare>,
    /// One entry a tensor and rank, sorted by both: exactly what that rank reads from the file. A rank without an
    /// entry holds nothing of that tensor (another rank's expert). What the files hold besides, the notes name and
    /// no rank reads.
    pub tensors: Vec<TensorShard>,
    /// What a decode step is expected to cost.
    pub predicted: Predicted,
    /// Every replication, padding and imbalance, with its cost.
    pub notes: Vec<String>,
}

/// The dimensions that the plan follows from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSummary {
    /// `model_type` of the model's config.json.
    pub model_type: String,
    /// Layers, of all stacks.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; fewer than query heads for grouped-query attention.
    pub num_key_value_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// The type of the weights as stored: `f32`, `f16` or `bf16`.
    pub dtype: String,
    /// How the weights are quantised: `gptq`, `awq`, `fp8` or `mxfp4`; not written where they aren't.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub quantization: String,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Parameters in all.
    pub parameters: u64,
}

/// Something that ranks share: heads, feed-forward columns, experts, vocabulary rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DimensionPlan {
    /// Its name, such as `heads`, `ffn` or `encoder.heads`.
    pub name: String,
    /// How many there are.
    pub size: usize,
    /// It is cut at multiples of this alone: the group or block that one scale of quantised weights stands for.
    pub granule: usize,
    /// What each rank has: a partition, but for key/value heads that several ranks have, and for experts of which a
    /// group of ranks has the same.
    pub ranges: Vec<Span>,
    /// Whether it is shared; else each rank has all of it.
    pub shared: bool,
    /// Groups of neighbours of which each shares it by itself: the columns of experts that groups of ranks have. Not
    /// written where it is one.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub groups: usize,
}

fn one() -> usize {
    1
}

fn is_one(n: &usize) -> bool {
    *n == 1
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// One transformer layer's shares, one span a rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// The prefix of its tensors' names, such as `model.layers.0`.
    pub name: String,
    /// Which tokens flow through it: `context` for the encoder of a model that also decodes; not written for its
    /// own tokens.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stream: String,
    /// The attention block.
    #[serde(default)]
    pub attention: Attention,
    /// The attention to the context, where there is one besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cross_attention: Option<Attention>,
    /// The feed-forward block.
    #[serde(default)]
    pub mlp: Mlp,
    /// What the ranks exchange, in order.
    pub collectives: Vec<Collective>,
    /// What each rank carries of it, in rank order.
    #[serde(default)]
    pub ranks: Vec<LayerShare>,
}

/// Which heads each rank computes. Empty where a layer has no attention.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// Query heads, one span a rank; a partition.
    pub q_heads: Vec<Span>,
    /// Key/value heads that those query heads read; spans overlap where a head is replicated.
    pub kv_heads: Vec<Span>,
}

/// Which part of the feed-forward layer each rank computes. What a layer hasn't, or every rank has whole, is empty
/// and not written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mlp {
    /// Columns, one span a rank; a partition. Of each routed expert where the layer has experts, and where groups of
    /// ranks have the experts a partition in each group.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ffn: Vec<Span>,
    /// Routed experts, one span a rank: a partition, and their columns are then whole; or the same for each rank of a
    /// group, and `ffn` says which columns of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<Span>,
    /// Columns of the shared expert, one span a rank; a partition.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_ffn: Vec<Span>,
}

/// What one rank carries of a layer. Operations count a multiplication and an addition as two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerShare {
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of weights that one token reads: of routed experts those it is routed to.
    pub read_bytes: u64,
    /// Bytes of cache a token of context.
    pub kv_bytes_per_token: u64,
    /// Operations with weights a token.
    pub flops_per_token: u64,
    /// Operations with weights a token of the context that cross-attention sees.
    pub flops_per_context_token: u64,
    /// Operations with weights a call, whatever the tokens.
    pub flops_per_call: u64,
    /// Operations of attention for each pair of tokens that see each other.
    pub flops_per_pair: u64,
}

/// One collective of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Collective {
    /// The operation: `all_reduce`, `all_gather`, `reduce_scatter` or `all_to_all`.
    pub op: String,
    /// The tensor whose product is exchanged, such as `self_attn.o_proj`.
    pub after: String,
    /// Payload a token. Of an all-reduce and an all-gather the bytes of the whole result, as every rank has it
    /// afterwards; of a reduce-scatter those of a rank's whole input; of an all-to-all those of all ranks' inputs
    /// together.
    pub bytes_per_token: u64,
    /// Expected time for one token, in microseconds.
    pub predicted_us: f64,
    /// How many ranks exchange with each other, `world / among` apart: such as 0, 2, 4 and 1, 3, 5 where 3 of 6 do. Not
    /// written, and 0, where all do.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub among: usize,
    /// Which tokens it has a row for: `context` for the other stream's; not written for the layer's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stream: String,
}

/// How embedding and output head are split over the vocabulary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vocab {
    /// Rows that each rank holds; a partition of the real vocabulary. Empty where the model has none.
    pub ranges: Vec<Span>,
    /// Rows after padding; the vocabulary's size where none is padded.
    pub padded: usize,
    /// What the ranks exchange after the embedding and after the output head, in that order.
    #[serde(default)]
    pub collectives: Vec<Collective>,
}

/// What one rank carries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankShare {
    /// The rank.
    pub rank: usize,
    /// Bytes of the weights that it reads, as stored in the file.
    pub weight_bytes: u64,
    /// Bytes of KV cache a token of context, over all layers; 0 for an encoder, which keeps none.
    pub kv_bytes_per_token: u64,
    /// Bytes at the highest point: weights, the largest tensor being loaded, and one token's activations.
    pub peak_bytes: u64,
}

/// What one rank reads of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorShard {
    /// The tensor's name in the file.
    pub name: String,
    /// The rank.
    pub rank: usize,
    /// The part of each sharded dimension; a dimension that isn't listed is whole, no entry means all of it.
    pub slices: Vec<Slice>,
    /// Whether other ranks hold the same elements, or some of them.
    pub replicated: bool,
    /// How many bytes it is, as stored in the file.
    pub bytes: u64,
}

/// A part of one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slice {
    /// The dimension, from 0.
    pub dim: usize,
    /// The part of it.
    pub range: Span,
}

/// What one decode step is expected to cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// A token, computing and communicating, in microseconds.
    pub decode_us_per_token: f64,
    /// The communication in it.
    pub comm_us_per_token: f64,
}
