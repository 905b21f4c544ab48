//! The architectures as tables: every tensor's name and its shape in symbols.
//!
//! The symbols are all that the shard rules need. A weight is stored `[output, input]`, so one whose first
//! axis is sharded is column-parallel and its bias is cut with it, and one whose second axis is sharded is
//! row-parallel: each rank computes a partial sum, an all-reduce follows, and the bias, whose one axis is
//! not sharded, is on every rank and added once after it.

use Axis::{Ffn, Hidden, KvHeads, Position, QueryHeads, TokenType, Vocab};
use When::{Always, AttentionOutputBias, MlpBias, QkvBias, UntiedHead, Unused};

/// What one dimension of a tensor counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Axis {
    /// The residual stream. Never sharded.
    Hidden,
    /// Query heads, `head_dim` elements each. Sharded by head.
    QueryHeads,
    /// Key or value heads, `head_dim` elements each. Sharded by the query heads that read them.
    KvHeads,
    /// The feed-forward layer's inner width. Sharded by element.
    Ffn,
    /// Tokens of the vocabulary. Sharded by row.
    Vocab,
    /// Positions of a learned position embedding. Never sharded.
    Position,
    /// Token types (BERT's segments). Never sharded.
    TokenType,
}

impl Axis {
    /// Whether ranks hold different parts of it.
    pub const fn is_sharded(self) -> bool {
        matches!(self, QueryHeads | KvHeads | Ffn | Vocab)
    }
}

/// The architectures that have sharding rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// BERT: an encoder with learned positions and LayerNorm after each block.
    Bert,
    /// Llama 2 and 3, SmolLM and others of the same shape: a decoder with grouped-query attention.
    Llama,
    /// Qwen2 and Qwen2.5: Llama's shape with biases on the query, key and value projections.
    Qwen2,
}

impl Architecture {
    /// Every architecture.
    pub const ALL: [Architecture; 3] = [Architecture::Bert, Architecture::Llama, Architecture::Qwen2];

    /// The `model_type` of its config.json.
    pub const fn model_type(self) -> &'static str {
        match self {
            Architecture::Bert => "bert",
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
        }
    }

    /// Whether it generates tokens: it then has an output head and a KV cache.
    pub const fn is_decoder(self) -> bool {
        !matches!(self, Architecture::Bert)
    }

    pub(crate) const fn rules(self) -> &'static Rules {
        match self {
            Architecture::Bert => &BERT,
            Architecture::Llama | Architecture::Qwen2 => &LLAMA,
        }
    }
}

/// Every tensor of an architecture. The first of `stem` is the word embedding.
pub(crate) struct Rules {
    /// What the names of `stem` and of the layers may start with; the first is the usual one.
    pub(crate) prefixes: &'static [&'static str],
    /// Tensors outside the layers.
    pub(crate) stem: &'static [Rule],
    /// The name of the list of layers.
    pub(crate) layer: &'static str,
    /// Tensors of each layer, in the order in which they are used.
    pub(crate) layers: &'static [Rule],
    /// Tensors without the prefix.
    pub(crate) head: &'static [Rule],
}

/// One tensor.
pub(crate) struct Rule {
    pub(crate) name: &'static str,
    pub(crate) axes: &'static [Axis],
    pub(crate) when: When,
}

/// Which models of an architecture need a tensor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Always,
    QkvBias,
    AttentionOutputBias,
    MlpBias,
    UntiedHead,
    /// Never needed here, though files may have it.
    Unused,
}

const fn rule(name: &'static str, axes: &'static [Axis], when: When) -> Rule {
    Rule { name, axes, when }
}

const LLAMA: Rules = Rules {
    prefixes: &["model."],
    stem: &[rule("embed_tokens.weight", &[Vocab, Hidden], Always), rule("norm.weight", &[Hidden], Always)],
    layer: "layers",
    layers: &[
        rule("input_layernorm.weight", &[Hidden], Always),
        rule("self_attn.q_proj.weight", &[QueryHeads, Hidden], Always),
        rule("self_attn.q_proj.bias", &[QueryHeads], QkvBias),
        rule("self_attn.k_proj.weight", &[KvHeads, Hidden], Always),
        rule("self_attn.k_proj.bias", &[KvHeads], QkvBias),
        rule("self_attn.v_proj.weight", &[KvHeads, Hidden], Always),
        rule("self_attn.v_proj.bias", &[KvHeads], QkvBias),
        rule("self_attn.o_proj.weight", &[Hidden, QueryHeads], Always),
        rule("self_attn.o_proj.bias", &[Hidden], AttentionOutputBias),
        rule("post_attention_layernorm.weight", &[Hidden], Always),
        rule("mlp.gate_proj.weight", &[Ffn, Hidden], Always),
        rule("mlp.gate_proj.bias", &[Ffn], MlpBias),
        rule("mlp.up_proj.weight", &[Ffn, Hidden], Always),
        rule("mlp.up_proj.bias", &[Ffn], MlpBias),
        rule("mlp.down_proj.weight", &[Hidden, Ffn], Always),
        rule("mlp.down_proj.bias", &[Hidden], MlpBias),
    ],
    head: &[rule("lm_head.weight", &[Vocab, Hidden], UntiedHead)],
};

const BERT: Rules = Rules {
    // A BertModel's own file has no prefix; inside a model with a head it is `bert`.
    prefixes: &["", "bert."],
    stem: &[
        rule("embeddings.word_embeddings.weight", &[Vocab, Hidden], Always),
        rule("embeddings.position_embeddings.weight", &[Position, Hidden], Always),
        rule("embeddings.token_type_embeddings.weight", &[TokenType, Hidden], Always),
        rule("embeddings.LayerNorm.weight", &[Hidden], Always),
        rule("embeddings.LayerNorm.bias", &[Hidden], Always),
        rule("pooler.dense.weight", &[Hidden, Hidden], Unused),
        rule("pooler.dense.bias", &[Hidden], Unused),
    ],
    layer: "encoder.layer",
    layers: &[
        rule("attention.self.query.weight", &[QueryHeads, Hidden], Always),
        rule("attention.self.query.bias", &[QueryHeads], QkvBias),
        rule("attention.self.key.weight", &[KvHeads, Hidden], Always),
        rule("attention.self.key.bias", &[KvHeads], QkvBias),
        rule("attention.self.value.weight", &[KvHeads, Hidden], Always),
        rule("attention.self.value.bias", &[KvHeads], QkvBias),
        rule("attention.output.dense.weight", &[Hidden, QueryHeads], Always),
        rule("attention.output.dense.bias", &[Hidden], AttentionOutputBias),
        rule("attention.output.LayerNorm.weight", &[Hidden], Always),
        rule("attention.output.LayerNorm.bias", &[Hidden], Always),
        rule("intermediate.dense.weight", &[Ffn, Hidden], Always),
        rule("intermediate.dense.bias", &[Ffn], MlpBias),
        rule("output.dense.weight", &[Hidden, Ffn], Always),
        rule("output.dense.bias", &[Hidden], MlpBias),
        rule("output.LayerNorm.weight", &[Hidden], Always),
        rule("output.LayerNorm.bias", &[Hidden], Always),
    ],
    // The masked-language-model head: like the pooler, no part of an embedding.
    head: &[
        rule("cls.predictions.decoder.weight", &[Vocab, Hidden], Unused),
        rule("cls.predictions.decoder.bias", &[Vocab], Unused),
        rule("cls.predictions.bias", &[Vocab], Unused),
    ],
};
