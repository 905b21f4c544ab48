//! The layers of a model: what is computed between two exchanges, and what is exchanged.

/// One layer: blocks, one after the other.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerSpec {
    /// What its tensors' names start with, such as `model.layers.0`.
    pub name: String,
    /// Which tokens flow through it.
    pub stream: Stream,
    /// Its blocks, in order.
    pub blocks: Vec<Block>,
}

/// What is computed between two exchanges. A parallel block (Falcon, GPT-NeoX) has attention and feed-forward
/// layer at once.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Block {
    /// Its attention.
    pub attention: Option<AttentionSpec>,
    /// The dimension of its feed-forward columns, where it has a dense feed-forward layer.
    pub ffn: Option<usize>,
    /// Its routed experts.
    pub experts: Option<ExpertsSpec>,
    /// The row-parallel products that are summed over the ranks at its end, each by one collective.
    pub sums: Vec<Sum>,
}

/// A product of which each rank has a part of the sum.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sum {
    /// The module that makes it, such as `self_attn.o_proj`.
    pub after: String,
    /// The tokens it has a row for.
    pub stream: Stream,
}

/// One attention. Sizes are elements a head.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionSpec {
    /// The dimension of its query heads.
    pub heads: usize,
    /// The dimension of its key/value heads.
    pub kv_heads: usize,
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub v_head_dim: usize,
    /// What it keeps of each token.
    pub cache: Cache,
    /// The context of which it looks at most this many tokens back; all where there is none.
    pub window: Option<usize>,
    /// Whether keys and values are made from the context (a text, an encoder's output) instead of the tokens.
    pub cross: bool,
    /// Whether queries and keys are normed over all heads together, so that ranks exchange the sum of squares.
    pub norm_across_heads: bool,
}

/// What an attention keeps of each token of context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cache {
    /// Nothing: it sees all tokens at once.
    None,
    /// Keys and values of each key/value head.
    Heads,
    /// One latent vector for all heads (multi-head latent attention), on every rank.
    Latent {
        /// Its elements.
        elements: usize,
    },
}

/// Routed experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpertsSpec {
    /// The dimension of the experts.
    pub experts: usize,
    /// The dimension of each expert's columns.
    pub ffn: usize,
    /// Experts that a token is routed to.
    pub per_token: usize,
    /// The dimension of the shared expert's columns, where there is one.
    pub shared: Option<usize>,
}

/// Which tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Stream {
    /// Those that the model is about: a decoder's, an encoder's, a picture's patches.
    #[default]
    Tokens,
    /// Those that it looks at besides: an encoder's input, the text of a diffusion model.
    Context,
    /// Both, one after the other.
    Both,
}

/// How a tensor is used in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Use {
    /// Read, and no matrix: norms, biases, scales, position embeddings.
    Vector,
    /// One row is read for each token.
    Lookup,
    /// Multiplied with every token.
    Tokens,
    /// Multiplied with the tokens that are routed to its expert.
    Routed,
    /// Multiplied with every token of the context.
    Context,
    /// Multiplied once a call, whatever the tokens: the modulation of a diffusion transformer.
    Call,
}
