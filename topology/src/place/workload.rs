//! One model as the search sees it: what each part of it weighs, computes, keeps and exchanges.
//!
//! A [`Workload`] is small and free of tensor names: the search looks at thousands of arrangements, and each needs
//! only sums. Bytes and operations are those of the whole model; the search cuts them.

use serde::Serialize;

/// One model as the search sees it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Workload {
    /// What people call it.
    pub name: String,
    /// What it does with its tokens.
    pub kind: Kind,
    /// Bits of an operand: 8, 16 or 32. They choose a device's figure for operations.
    pub bits: u32,
    /// Bytes of one token's residual stream.
    pub stream_bytes: u64,
    /// Blocks of different make; [`order`](Workload::order) refers to these.
    pub blocks: Vec<Block>,
    /// Every block in the order in which it runs, as places in [`blocks`](Workload::blocks). A pipeline is cut
    /// between two of them.
    pub order: Vec<usize>,
    /// Bytes of the tensor that the first and the last block share, as an embedding that is the output head too:
    /// held twice where they are on different devices. It is counted in the first.
    pub tied_bytes: u64,
}

/// What a model does with its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Kind {
    /// It reads a prompt and then makes one token after another, with a cache of keys and values.
    Decoder,
    /// It passes all tokens through at once, and keeps nothing: an encoder, a vision model, one denoising step.
    Forward {
        /// Passes that a step takes and that don't need each other: 2 with classifier-free guidance, otherwise 1.
        branches: usize,
        /// Bytes that those passes exchange when they are done: a latent.
        latent_bytes: u64,
    },
}

/// A piece of the model that isn't cut over pipeline stages, usually a layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Block {
    /// What it is, such as `layer` or `embedding`.
    pub name: String,
    /// What it computes, in order.
    pub parts: Vec<Part>,
}

/// A stretch of computing at whose end ranks wait for each other.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// What it is, such as `attention`.
    pub name: String,
    /// What tensor parallelism cuts.
    pub split: Split,
    /// What is cut along `split`: for attention, what follows query heads.
    pub cut: Work,
    /// What follows key and value heads, of which several ranks may hold one.
    pub kv: Work,
    /// What every rank of a tensor-parallel group has whole.
    pub whole: Work,
    /// Attention to other tokens, where there is any.
    pub attention: Option<Attention>,
    /// Bytes a token of the widest values between two products, cut along `split`.
    pub wide_bytes: u64,
    /// Bytes of activations of a sequence, however many tokens it has; cut along [`Split::Height`] alone.
    pub item_bytes: u64,
    /// The largest single tensor, in bytes, that is cut; and the largest that isn't.
    pub largest: [u64; 2],
    /// What the ranks of a tensor-parallel group exchange afterwards.
    pub after: Exchange,
}

/// What weights cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Bytes held.
    pub bytes: u64,
    /// Bytes read in each pass: none of an embedding's, of which a token needs one row, and of an output head's all,
    /// also where it is held as the embedding.
    pub reads: u64,
    /// Operations a token.
    pub flops_per_token: f64,
    /// Operations a sequence, whatever its length: a step's modulation, the text's keys and values.
    pub flops_per_sequence: f64,
}

/// What tensor parallelism cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case", tag = "by")]
pub enum Split {
    /// Query heads, in groups that read one key/value head each.
    Heads {
        /// Query heads.
        q: usize,
        /// Key and value heads.
        kv: usize,
    },
    /// Columns, in whole units: quantisation groups, or single ones.
    Columns {
        /// How many units.
        units: usize,
    },
    /// Columns that every rank has whole where there are fewer units than ranks: a shared expert's.
    Shared {
        /// How many units.
        units: usize,
    },
    /// Experts, whole (expert parallel), or each by its columns.
    Experts {
        /// How many there are.
        count: usize,
        /// How many a token goes to.
        per_token: usize,
        /// Units of columns of each.
        units: usize,
    },
    /// Vocabulary rows.
    Rows {
        /// How many.
        rows: usize,
    },
    /// Rows of a picture, with whole weights: what a convolutional model computes, and its activations.
    Height {
        /// Rows of the lowest activation.
        rows: usize,
    },
    /// Nothing: every rank has it all.
    Whole,
}

/// Attention to other tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Attention {
    /// Operations for one query token and one key token, over all query heads: twice two for each element of a head,
    /// with keys and with values.
    pub flops_per_pair: f64,
    /// Which tokens it attends to.
    pub keys: Keys,
    /// Bytes a token of the queries, all heads; the attention's result has as many.
    pub query_bytes: u64,
    /// Bytes a token of keys and values, all heads: what the cache keeps.
    pub kv_bytes: u64,
    /// Whether every rank keeps the whole cache, as with latent attention.
    pub kv_whole: bool,
}

/// Which tokens one attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "to")]
pub enum Keys {
    /// Itself and those before it, at most so many.
    Causal {
        /// The window, if there is one.
        window: Option<usize>,
    },
    /// All of the sequence.
    All,
    /// So many of another text.
    Other {
        /// How many.
        tokens: usize,
    },
}

/// What a tensor-parallel group exchanges after a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "op")]
pub enum Exchange {
    /// Nothing: the next part goes on with the same cut, or nothing was cut.
    None,
    /// The sum of the residual stream: an all-reduce of [`Workload::stream_bytes`] a token.
    Sum,
    /// Rows of a picture between neighbours, and sums of statistics, of each sequence.
    Halo {
        /// How often neighbours exchange rows: before each convolution that reaches beyond a rank's own.
        exchanges: usize,
        /// Bytes that a rank gets from one neighbour, in all of these.
        bytes: u64,
        /// How many sums of statistics there are, of group norms.
        sums: usize,
        /// Bytes of each.
        sum_bytes: u64,
        /// Bytes of the keys and values of all rows, which attention within the model gathers.
        gather_bytes: u64,
    },
    /// The logits of each sequence's last token: an all-gather.
    Gather {
        /// Bytes of one row.
        row_bytes: u64,
    },
}

impl Work {
    /// Weights that are read whole in each pass.
    pub fn dense(bytes: u64, flops_per_token: f64) -> Work {
        Work { bytes, reads: bytes, flops_per_token, flops_per_sequence: 0.0 }
    }
}

impl Part {
    /// A part that weighs and exchanges nothing yet.
    pub fn new(name: &str, split: Split) -> Part {
        let (cut, kv, whole) = (Work::default(), Work::default(), Work::default());
        let after = Exchange::None;
        Part {
            name: name.to_owned(),
            split,
            cut,
            kv,
            whole,
            attention: None,
            wide_bytes: 0,
            item_bytes: 0,
            largest: [0; 2],
            after,
        }
    }
}

impl Split {
    /// The most ranks that can share it, and what runs out.
    pub fn limit(&self) -> Option<(&'static str, usize)> {
        match *self {
            Split::Heads { q, .. } => Some(("query heads", q)),
            Split::Columns { units } => Some(("groups of feed-forward columns", units)),
            Split::Experts { units, .. } => Some(("groups of an expert's columns", units)),
            Split::Rows { rows } => Some(("vocabulary rows", rows)),
            Split::Height { rows } => Some(("rows of its lowest activation", rows)),
            Split::Shared { .. } | Split::Whole => None,
        }
    }
}

impl Workload {
    /// Every part of the model, each as often as it runs.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.order.iter().flat_map(|b| &self.blocks[*b].parts)
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        self.parts().map(|p| p.cut.bytes + p.kv.bytes + p.whole.bytes).sum()
    }

    /// Bytes of all keys and values of one token.
    pub fn kv_bytes_per_token(&self) -> u64 {
        match self.kind {
            Kind::Decoder => self.parts().filter_map(|p| p.attention).map(|a| a.kv_bytes).sum(),
            Kind::Forward { .. } => 0,
        }
    }

    /// Experts, if there are any, and how many a token goes to.
    pub fn experts(&self) -> Option<(usize, usize)> {
        self.blocks.iter().flat_map(|b| &b.parts).find_map(|p| match p.split {
            Split::Experts { count, per_token, .. } => Some((count, per_token)),
            _ => None,
        })
    }
}
