//! Proof that a plan is consistent: with itself, and with the model it is for.

use super::{Layer, Plan, SCHEMA, Span, TensorShard, shard_bytes, slices, summarise};
use crate::model::{MAX_HEADS, ModelSpec, TensorSpec};
use crate::shard::{HeadShares, Shares, VocabShares, kv_heads};
use crate::{Error, Result};

impl Plan {
    /// Checks that the plan doesn't contradict itself, as far as that can be seen without the model: shares
    /// are partitions, key/value heads those that the query heads read, and every tensor has an entry a rank
    /// that cuts at most one dimension.
    ///
    /// Error: [`Error::InvalidPlan`].
    pub fn validate(&self) -> Result<()> {
        self.find_contradiction().map_or(Ok(()), |what| Err(Error::InvalidPlan(what)))
    }

    /// Checks that the plan is right for `spec`: besides [`validate`](Plan::validate), that every element of
    /// every tensor that the model computes with is on exactly one rank, or on several that all declare it
    /// replicated; that tensors are cut where the layers say; and that the bytes add up.
    ///
    /// Error: [`Error::InvalidPlan`].
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        self.validate()?;
        self.find_mismatch(spec).map_or(Ok(()), |what| Err(Error::InvalidPlan(what)))
    }

    fn find_contradiction(&self) -> Option<String> {
        let (model, world) = (&self.model, self.world);
        if self.schema != SCHEMA {
            return Some(format!("its schema is {:?}, not {SCHEMA:?}", self.schema));
        }
        if world == 0 || world > MAX_HEADS {
            return Some(format!("world = {world} is not between 1 and {MAX_HEADS}"));
        }
        if self.layers.len() != model.num_layers {
            return Some(format!("it has {} layers for a model of {}", self.layers.len(), model.num_layers));
        }
        for layer in &self.layers {
            let Layer { name, attention, mlp, .. } = layer;
            if let Some(what) = not_a_partition(&attention.q_heads, model.num_attention_heads, world) {
                return Some(format!("{name}: q_heads {what}"));
            }
            let needs = |q: &Span| kv_heads(model.num_attention_heads, model.num_key_value_heads, *q);
            if !attention.kv_heads.iter().copied().eq(attention.q_heads.iter().map(needs)) {
                return Some(format!("{name}: kv_heads are not those that q_heads read"));
            }
            if let Some(what) = not_a_partition(&mlp.ffn, model.intermediate_size, world) {
                return Some(format!("{name}: ffn {what}"));
            }
        }
        if let Some(what) = not_a_partition(&self.vocab.ranges, model.vocab_size, world) {
            return Some(format!("vocab {what}"));
        }
        if self.vocab.padded < model.vocab_size {
            return Some(format!(
                "vocab is padded to {}, below its {} rows",
                self.vocab.padded, model.vocab_size
            ));
        }
        if !self.ranks.iter().map(|r| r.rank).eq(0..world) {
            return Some(format!("ranks are not 0 to {}", world - 1));
        }
        self.tensors_out_of_order()
    }

    /// `tensors` must hold each name once for each rank, sorted by both, for [`Plan::tensor`] to find them.
    fn tensors_out_of_order(&self) -> Option<String> {
        if !self.tensors.len().is_multiple_of(self.world) {
            return Some(format!(
                "{} tensor shards are not a multiple of {} ranks",
                self.tensors.len(),
                self.world
            ));
        }
        let mut before: Option<&str> = None;
        for shards in self.tensors.chunks(self.world) {
            let name = &shards[0].name;
            if before.is_some_and(|b| b >= name.as_str()) {
                return Some(format!("tensor {name} is not in its place: tensors must be sorted by name"));
            }
            if !shards.iter().map(|s| s.rank).eq(0..self.world) || shards.iter().any(|s| s.name != *name) {
                return Some(format!("tensor {name} doesn't have one entry for each rank in order"));
            }
            before = Some(name);
        }
        None
    }

    fn find_mismatch(&self, spec: &ModelSpec) -> Option<String> {
        if self.model != summarise(spec) {
            return Some("it is for a model of other dimensions".to_owned());
        }
        if self.tensors.len() != spec.tensors.len() * self.world {
            return Some(format!(
                "it has {} tensors for a model of {}",
                self.tensors.len() / self.world,
                spec.tensors.len()
            ));
        }
        let mut bytes = vec![0u64; self.world];
        for (tensor, shards) in spec.tensors.iter().zip(self.tensors.chunks(self.world)) {
            if shards[0].name != tensor.name {
                return Some(format!("it has no tensor {}", tensor.name));
            }
            if let Some(what) = not_covered(tensor, shards) {
                return Some(format!("tensor {}: {what}", tensor.name));
            }
            let Some(shares) = self.shares_for(spec, tensor) else {
                return Some(format!("tensor {} is of no layer", tensor.name));
            };
            for shard in shards {
                if shard.slices != slices(&tensor.axes, &shares, spec.head_dim, shard.rank) {
                    return Some(format!(
                        "tensor {}: rank {}'s slice is not what its heads, columns or rows need",
                        tensor.name, shard.rank
                    ));
                }
                bytes[shard.rank] += shard_bytes(tensor, &shard.slices);
            }
        }
        let wrong = self.ranks.iter().zip(&bytes).find(|(r, bytes)| r.weight_bytes != **bytes);
        wrong.map(|(r, bytes)| {
            format!("rank {} reads {bytes} bytes, not weight_bytes = {}", r.rank, r.weight_bytes)
        })
    }

    /// The shares that apply to a tensor: those of its layer, or of any where it is in none.
    fn shares_for(&self, spec: &ModelSpec, tensor: &TensorSpec) -> Option<Shares> {
        let layer = self.layers.get(spec.layer_of(&tensor.name).unwrap_or(0))?;
        Some(Shares {
            heads: HeadShares { q: layer.attention.q_heads.clone(), kv: layer.attention.kv_heads.clone() },
            ffn: layer.mlp.ffn.clone(),
            vocab: VocabShares { ranges: self.vocab.ranges.clone(), padded: self.vocab.padded },
        })
    }
}

/// Why `spans` aren't `world` non-empty ranges that follow each other from 0 to `size`.
fn not_a_partition(spans: &[Span], size: usize, world: usize) -> Option<String> {
    if spans.len() != world {
        return Some(format!("has {} ranges for {world} ranks", spans.len()));
    }
    let mut end = 0;
    for (rank, span) in spans.iter().enumerate() {
        if span.start != end || span.is_empty() {
            return Some(format!(
                "of rank {rank} is {}..{}: it must start at {end} and hold something",
                span.start, span.end
            ));
        }
        end = span.end;
    }
    (end != size).then(|| format!("ends at {end}, not {size}"))
}

/// Why the shards of a tensor don't hold each element once, or several times and declared so.
///
/// A shard cuts one dimension at most and all cut the same, so elements are the indices of that dimension.
/// Sweeping over the sorted ends of the ranges visits each stretch that the same ranks hold.
fn not_covered(tensor: &TensorSpec, shards: &[TensorShard]) -> Option<String> {
    let cut = shards[0].slices.first().map(|s| s.dim);
    let size = match cut {
        Some(dim) => match tensor.shape.get(dim) {
            Some(&size) => size,
            None => return Some(format!("it has no dimension {dim}")),
        },
        None => 1,
    };
    let mut ranges = Vec::with_capacity(shards.len());
    for shard in shards {
        let range = match (cut, shard.slices.as_slice()) {
            (None, []) => Span::new(0, 1),
            (Some(dim), [slice]) if slice.dim == dim => slice.range,
            _ => return Some("its shards don't all cut one and the same dimension".to_owned()),
        };
        if range.is_empty() || range.end > size {
            return Some(format!(
                "rank {}: {}..{} is not within 0..{size}",
                shard.rank, range.start, range.end
            ));
        }
        ranges.push(range);
    }

    let mut ends: Vec<usize> = ranges.iter().flat_map(|r| [r.start, r.end]).chain([0, size]).collect();
    ends.sort_unstable();
    ends.dedup();
    let stretches = |r: &Span| ends.partition_point(|e| *e < r.start)..ends.partition_point(|e| *e < r.end);
    let mut holders = vec![0u32; ends.len() - 1];
    for range in &ranges {
        holders[stretches(range)].iter_mut().for_each(|count| *count += 1);
    }
    if let Some(i) = holders.iter().position(|count| *count == 0) {
        return Some(format!("no rank holds {}..{} of dimension {}", ends[i], ends[i + 1], cut.unwrap_or(0)));
    }
    let shares_something: Vec<bool> =
        ranges.iter().map(|range| holders[stretches(range)].iter().any(|count| *count > 1)).collect();
    let undeclared = shards.iter().zip(&shares_something).find(|(s, shares)| s.replicated != **shares);
    undeclared.map(|(s, shares)| {
        let (is, says) = if *shares {
            ("on other ranks too", "not replicated")
        } else {
            ("on no other rank", "replicated")
        };
        format!("what rank {} holds is {is}, but the plan says {says}", s.rank)
    })
}
