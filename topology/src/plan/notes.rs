//! The plan's notes: every replication, padding and imbalance, and what it costs.

use super::{Predicted, Span};
use crate::cost::CostModel;
use crate::model::{Axis, ModelSpec, TensorSpec};
use crate::shard::Shares;

/// Notes for a plan with these shares; `one_rank_us` is the predicted time of one rank alone.
pub(super) fn notes(
    spec: &ModelSpec,
    shares: &Shares,
    costs: &CostModel,
    predicted: &Predicted,
    one_rank_us: f64,
) -> Vec<String> {
    let world = shares.ffn.len();
    let about = About { spec, shares, costs, world };
    let mut notes = Vec::new();
    if world == 1 {
        notes.push("one rank: nothing is sharded and nothing exchanged".to_owned());
    } else {
        notes.extend(about.heads());
        notes.extend(about.kv_heads());
        notes.extend(about.ffn());
        notes.extend(about.vocabulary());
        notes.extend(about.replicated());
        if one_rank_us <= predicted.decode_us_per_token {
            notes.push(format!(
                "one rank alone is predicted to be as fast: {} a token instead of {}",
                time(one_rank_us),
                time(predicted.decode_us_per_token)
            ));
        }
    }
    notes.extend(about.unused());
    if spec.tie_word_embeddings {
        notes.push("the output head is the embedding: one tensor, sharded by vocabulary row".to_owned());
    }
    if !spec.has_weights() {
        notes.push(format!("planned from config.json alone, every tensor taken to be {}", spec.dtype));
    }
    notes.push(format!("predicted times are from {}", costs.source));
    notes
}

struct About<'a> {
    spec: &'a ModelSpec,
    shares: &'a Shares,
    costs: &'a CostModel,
    world: usize,
}

impl About<'_> {
    fn heads(&self) -> Option<String> {
        let q = &self.shares.heads.q;
        let note = self.uneven("query heads", q, &[Axis::QueryHeads])?;
        let evenest = self.spec.num_attention_heads.div_ceil(self.world);
        let why =
            if extremes(q).0 > evenest { "; evener shares would hold more key/value heads" } else { "" };
        Some(note + why)
    }

    fn ffn(&self) -> Option<String> {
        self.uneven("feed-forward columns", &self.shares.ffn, &[Axis::Ffn])
    }

    /// A note where the largest share is above the mean, with the time the others wait for it.
    fn uneven(&self, things: &str, spans: &[Span], axes: &[Axis]) -> Option<String> {
        let (largest, smallest) = extremes(spans);
        if largest == smallest {
            return None;
        }
        let total: usize = spans.iter().map(Span::len).sum();
        let mean = total as f64 / self.world as f64;
        let cut_by = |t: &&TensorSpec| t.axes.iter().any(|a| axes.contains(a));
        let bytes: u64 = self.spec.tensors.iter().filter(cut_by).map(TensorSpec::bytes).sum();
        let excess = (bytes as f64 / total as f64 * (largest as f64 - mean)) as u64;
        Some(format!(
            "{total} {things} are shared unevenly over {} ranks, from {largest} down to {smallest}: the \
             largest share is {:.1}% above the mean, {} more to read, about {} a token",
            self.world,
            (largest as f64 / mean - 1.0) * 100.0,
            size(excess),
            time(self.costs.read_us(excess)),
        ))
    }

    fn kv_heads(&self) -> Option<String> {
        let copies = self.shares.heads.duplicated_kv_heads();
        if copies == 0 {
            return None;
        }
        let spec = self.spec;
        // Every duplicated head is one that two neighbours both need.
        let mut twice: Vec<usize> =
            self.shares.heads.kv.windows(2).flat_map(|w| w[1].start..w[0].end).collect::<Vec<_>>();
        twice.dedup();
        let of_kv = spec.tensors.iter().filter(|t| t.axes.contains(&Axis::KvHeads));
        let bytes =
            of_kv.map(TensorSpec::bytes).sum::<u64>() / spec.num_key_value_heads as u64 * copies as u64;
        let cache = if spec.architecture.is_decoder() {
            let per_head = 2 * spec.head_dim * spec.dtype.size() * spec.num_layers;
            format!(" and {} of KV cache a token of context", size((copies * per_head) as u64))
        } else {
            String::new()
        };
        Some(format!(
            "key/value heads on more than one rank: {} of {} ({}), {}: {} of weights{cache} more over \
             all ranks",
            twice.len(),
            spec.num_key_value_heads,
            list(twice.iter()),
            count(copies, "copy", "copies"),
            size(bytes),
        ))
    }

    fn vocabulary(&self) -> Option<String> {
        let vocab = &self.shares.vocab;
        let rows = self.spec.vocab_size;
        if vocab.padded > rows {
            let share = vocab.padded / self.world;
            let extra = vocab.padded - rows;
            return Some(format!(
                "vocabulary padded from {rows} to {} rows, {share} a rank, as a multiple of lcm(64, {}): \
                 {extra} rows of zeros ({:.2}%) that no file holds",
                vocab.padded,
                self.world,
                extra as f64 / rows as f64 * 100.0
            ));
        }
        let uneven = self.uneven("vocabulary rows", &vocab.ranges, &[Axis::Vocab])?;
        Some(format!("{uneven}; not padded, as a multiple of lcm(64, {}) would cost more", self.world))
    }

    /// One note for each kind of tensor that is whole on every rank.
    fn replicated(&self) -> Vec<String> {
        let kinds = ["norms and biases added after a reduction", "position and token type embeddings"];
        let kind_of = |t: &TensorSpec| match t.axes.as_slice() {
            [Axis::Hidden] => Some(kinds[0]),
            [Axis::Position | Axis::TokenType, _] => Some(kinds[1]),
            _ => None,
        };
        let note = |kind: &&str| {
            let of_kind = self.spec.tensors.iter().filter(|t| kind_of(t) == Some(*kind));
            let (found, bytes) = of_kind.fold((0, 0), |(found, bytes), t| (found + 1, bytes + t.bytes()));
            (found > 0).then(|| {
                format!(
                    "whole on every rank: {kind}, {} in {}",
                    size(bytes),
                    count(found, "tensor", "tensors")
                )
            })
        };
        kinds.iter().filter_map(note).collect()
    }

    fn unused(&self) -> Option<String> {
        let unused = &self.spec.unused;
        if unused.is_empty() {
            return None;
        }
        let bytes = unused.iter().map(|t| t.bytes).fold(0, u64::saturating_add);
        let result = if self.spec.architecture.is_decoder() { "logits" } else { "embeddings" };
        Some(format!(
            "on no rank, as {result} are computed without: {} ({}), {} in the file",
            count(unused.len(), "tensor", "tensors"),
            list(unused.iter().map(|t| &t.name)),
            size(bytes),
        ))
    }
}

/// The largest and the smallest share.
fn extremes(spans: &[Span]) -> (usize, usize) {
    let shares = spans.iter().map(Span::len);
    (shares.clone().max().unwrap_or(0), shares.min().unwrap_or(0))
}

/// `0, 2, 3`; the first few where they are many.
fn list(items: impl ExactSizeIterator<Item: ToString>) -> String {
    const SHOWN: usize = 16;
    let more = if items.len() > SHOWN { ", ..." } else { "" };
    items.take(SHOWN).map(|item| item.to_string()).collect::<Vec<_>>().join(", ") + more
}

fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// A time for a person.
pub(super) fn time(us: f64) -> String {
    if us < 10_000.0 { format!("{us:.1} us") } else { format!("{:.1} ms", us / 1e3) }
}

/// Bytes for a person, in powers of 1000.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..10_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
