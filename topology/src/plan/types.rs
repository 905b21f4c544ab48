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
    /// How the vocabulary (embedding and output head) is split.
    pub vocab: Vocab,
    /// What each rank carries, in rank order.
    pub ranks: Vec<RankShare>,
    /// One entry a tensor and rank, sorted by both: exactly what that rank reads from the file. What the
    /// files hold besides, the notes name and no rank reads.
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
    /// Transformer layers.
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
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Parameters in all.
    pub parameters: u64,
}

/// One transformer layer's shares, one span a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// The prefix of its tensors' names, such as `model.layers.0`.
    pub name: String,
    /// The attention block.
    pub attention: Attention,
    /// The feed-forward block.
    pub mlp: Mlp,
    /// What the ranks exchange, in order.
    pub collectives: Vec<Collective>,
}

/// Which heads each rank computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// Query heads, one span a rank; a partition.
    pub q_heads: Vec<Span>,
    /// Key/value heads that those query heads read; spans overlap where a head is replicated.
    pub kv_heads: Vec<Span>,
}

/// Which columns of the feed-forward layer each rank computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mlp {
    /// Columns, one span a rank; a partition.
    pub ffn: Vec<Span>,
}

/// One collective of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Collective {
    /// The operation, such as `all_reduce`.
    pub op: String,
    /// The tensor whose product is reduced, such as `self_attn.o_proj`.
    pub after: String,
    /// Payload a token: the bytes of the whole result, as every rank has it afterwards.
    pub bytes_per_token: u64,
    /// Expected time for one token, in microseconds.
    pub predicted_us: f64,
}

/// How embedding and output head are split over the vocabulary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vocab {
    /// Rows that each rank holds; a partition of the real vocabulary.
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
