//! What can be shared: dimensions, and how the axes of tensors are made of them.
//!
//! A [`Dimension`] is something a model has a number of: heads, feed-forward columns, experts, vocabulary rows.
//! The rules share dimensions, never tensors. How a rank's share cuts a tensor follows from the tensor's axes:
//! an [`Axis`] is a row of [`Segment`]s, each of which lays out some indices of one dimension.
//!
//! | tensor | axis |
//! | --- | --- |
//! | `q_proj` `[heads * 64, hidden]` | 64 elements a head; whole |
//! | fused `[Q\|K\|V]` | three segments: 64 a head, then twice 64 a key/value head |
//! | fused by head (GPT-NeoX) | 3 * 64 a head |
//! | fused by group (Falcon 40B) | for each group its query heads, then its key/value head with 2 * 64 |
//! | packed gate\|up | two segments, 1 a column; interleaved: one segment, 2 a column |
//! | GPTQ's `scales` of a row-parallel weight | 1 for each 128 columns |
//!
//! A segment that has fewer elements than indices can only be cut where an element begins, so
//! [`Dimension::granule`] is a multiple of the indices an element.

use crate::plan::Span;

/// Something that ranks may share.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Dimension {
    /// What it is called in a plan, such as `heads`, `ffn` or `encoder.heads`; unique in the model.
    pub name: String,
    /// The field of config.json that counts it, for errors.
    pub field: &'static str,
    /// How many there are.
    pub size: usize,
    /// It is cut at multiples of this alone: the indices that one scale, or one packed word, stands for.
    pub granule: usize,
    /// How it is shared.
    pub cut: Cut,
}

impl Dimension {
    /// What there is to share: whole granules, of which the last may be partial.
    pub fn units(&self) -> usize {
        self.size.div_ceil(self.granule)
    }
}

/// How ranks share a dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cut {
    /// Query heads, which read the key/value heads of the dimension `kv`.
    Heads {
        /// Which of [`ModelSpec::dims`](super::ModelSpec::dims).
        kv: usize,
    },
    /// Key/value heads: a rank has those that its query heads, of the dimension `q`, read.
    KvHeads {
        /// Which of [`ModelSpec::dims`](super::ModelSpec::dims).
        q: usize,
    },
    /// Feed-forward columns: as evenly as granules allow.
    Columns,
    /// Columns of a shared expert: as [`Columns`](Cut::Columns), but whole on every rank where there are
    /// fewer granules than ranks.
    SharedColumns,
    /// Columns of each routed expert: shared where experts are tensor-parallel, whole where they are
    /// expert-parallel.
    ExpertColumns,
    /// Routed experts: the other way round.
    Experts,
    /// Vocabulary rows: padded.
    Vocabulary,
}

/// One axis of a tensor: segments, one after the other. Without segments it isn't shared.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Axis {
    /// The segments, in order; they fill the axis.
    pub segments: Vec<Segment>,
}

/// Some indices of a dimension, laid out along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Segment {
    /// Which of [`ModelSpec::dims`](super::ModelSpec::dims).
    pub dim: usize,
    /// The indices that it lays out.
    pub indices: Span,
    /// Elements for every `per` indices.
    pub elements: usize,
    /// 1 but for scales and packed weights, of which one element stands for several indices.
    pub per: usize,
}

impl Segment {
    /// Elements along the axis. A partial granule at the end has an element of its own.
    pub const fn len(&self) -> usize {
        self.offset(self.indices.end)
    }

    /// Whether it has none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How far from its start an index begins.
    const fn offset(&self, index: usize) -> usize {
        ((index - self.indices.start) * self.elements).div_ceil(self.per)
    }

    /// The elements of those of its indices that are in `share`, counted from its start.
    fn range(&self, share: Span) -> Span {
        let start = share.start.clamp(self.indices.start, self.indices.end);
        let end = share.end.clamp(start, self.indices.end);
        Span::new(self.offset(start), self.offset(end))
    }
}

impl Axis {
    /// An axis that isn't shared.
    pub const WHOLE: Axis = Axis { segments: Vec::new() };

    /// Whether it isn't shared, by any plan.
    pub fn is_whole(&self) -> bool {
        self.segments.is_empty()
    }

    /// Whether it lays out indices of this dimension.
    pub fn has(&self, dim: usize) -> bool {
        self.segments.iter().any(|s| s.dim == dim)
    }

    /// What a rank has of it, given its share of each dimension: ascending ranges that don't touch.
    pub fn ranges(&self, share: impl Fn(usize) -> Span) -> Vec<Span> {
        let mut ranges: Vec<Span> = Vec::new();
        let mut start = 0;
        for segment in &self.segments {
            let part = segment.range(share(segment.dim));
            let part = Span::new(start + part.start, start + part.end);
            start += segment.len();
            match ranges.last_mut() {
                _ if part.is_empty() => {}
                Some(last) if last.end == part.start => last.end = part.end,
                _ => ranges.push(part),
            }
        }
        ranges
    }
}
