//! The rules: which part of each axis a rank holds. Pure functions from sizes and ranks to ranges.
//!
//! With `n` ranks, `h` query heads, `k` key/value heads, `F` feed-forward columns and `V` vocabulary rows:
//!
//! * [`heads`]: query heads, in `n` ranges such that the most that a rank has of query heads and (twice) the
//!   key/value heads they read is least, cut between key/value groups where that costs nothing.
//! * [`kv_heads`]: a rank with query heads `[a, b)` needs key/value heads
//!   `floor(a*k/h) ..= floor((b-1)*k/h)`, which other ranks may need too.
//! * [`even`]: feed-forward columns, in `n` ranges of `ceil(F/n)` or `floor(F/n)`, larger first. That
//!   a rank has fewer heads is no reason to give it more columns: each block ends in an all-reduce, so ranks
//!   wait for the slowest of each block by itself.
//! * [`vocab`]: vocabulary rows, padded to a multiple of `lcm(64, n)` and cut evenly; unpadded where that
//!   would unbalance them.
//!
//! Everything else (norms, position embeddings, biases of row-parallel layers) is whole on every rank.
//! Column- and row-parallel layers are those of Shoeybi et al., "Megatron-LM: Training Multi-Billion
//! Parameter Language Models Using Model Parallelism", 2019: with `Y = X A` cut by A's columns and `Z = Y B`
//! by B's rows, the two need one all-reduce, of `Z`.

mod even;
mod heads;

pub use even::{VocabShares, even, vocab};
pub use heads::{HeadShares, heads, kv_heads};

use crate::model::{Axis, ModelSpec};
use crate::plan::Span;
use crate::{Error, Result};

/// Each rank's part of every sharded axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Shares {
    /// Query and key/value heads.
    pub heads: HeadShares,
    /// Columns of the feed-forward layer.
    pub ffn: Vec<Span>,
    /// Rows of embedding and output head.
    pub vocab: VocabShares,
}

impl Shares {
    /// The shares of `world` ranks.
    ///
    /// Errors: [`Error::NoRanks`], [`Error::TooManyRanks`].
    pub fn of(spec: &ModelSpec, world: usize) -> Result<Shares> {
        let limits = [
            ("num_attention_heads", spec.num_attention_heads),
            ("intermediate_size", spec.intermediate_size),
            ("vocab_size", spec.vocab_size),
        ];
        // The first of equals: heads are what runs out in any real model.
        let (constraint, size) = limits.into_iter().min_by_key(|(_, size)| *size).unwrap_or(limits[0]);
        if world > size {
            return Err(Error::TooManyRanks { world, constraint, size, nearest: size });
        }
        Ok(Shares {
            heads: heads(spec.num_attention_heads, spec.num_key_value_heads, world)?,
            ffn: even("intermediate_size", spec.intermediate_size, world)?,
            vocab: vocab(spec.vocab_size, world)?,
        })
    }

    /// The elements along `axis` that `rank` holds; none where the axis isn't sharded.
    ///
    /// `head_dim` is the number of elements a head.
    pub fn range(&self, axis: Axis, head_dim: usize, rank: usize) -> Option<Span> {
        let of_heads =
            |heads: &[Span]| heads.get(rank).map(|s| Span::new(s.start * head_dim, s.end * head_dim));
        match axis {
            Axis::QueryHeads => of_heads(&self.heads.q),
            Axis::KvHeads => of_heads(&self.heads.kv),
            Axis::Ffn => self.ffn.get(rank).copied(),
            Axis::Vocab => self.vocab.ranges.get(rank).copied(),
            Axis::Hidden | Axis::Position | Axis::TokenType => None,
        }
    }
}

/// Refuses 0 ranks, and more ranks than there is something to share.
fn check_ranks(constraint: &'static str, size: usize, world: usize) -> Result<()> {
    match world {
        0 => Err(Error::NoRanks),
        _ if world > size => Err(Error::TooManyRanks { world, constraint, size, nearest: size }),
        _ => Ok(()),
    }
}
