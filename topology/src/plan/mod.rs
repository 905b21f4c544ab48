//! The plan: which rank holds what, which collectives follow, and what that costs.

mod types;

pub use types::{
    Attention, Collective, Layer, Mlp, ModelSummary, Plan, Predicted, RankShare, SCHEMA, Slice, Span, TensorShard,
    Vocab,
};
