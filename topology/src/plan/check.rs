//! Proof that a plan is consistent: with itself, and with the model it is for.

use std::collections::BTreeSet;

use super::share::elements;
use super::{DimensionPlan, Layer, Plan, SCHEMA, Slice, Span, TensorShard, shared_by, summarise};
use crate::model::{Cut, Dimension, MAX_HEADS, ModelSpec, TensorSpec};
use crate::shard::{DimensionShares, Experts, Shares, kv_heads};
use crate::{Error, Result};

/// The most bytes that a plan may tell of in all: far above what there is, and no sum of some of them overflows.
const MAX_SUM: u128 = 1 << 62;

impl Plan {
    /// Checks that the plan doesn't contradict itself, as far as that can be seen without the model: dimensions
    /// are shared without gaps and where they may be cut, layers refer to them, and tensors are in order.
    ///
    /// Error: [`Error::InvalidPlan`].
    pub fn validate(&self) -> Result<()> {
        self.find_contradiction().map_or(Ok(()), |what| Err(Error::InvalidPlan(what)))
    }

    /// Checks that the plan is right for `spec`: besides [`validate`](Plan::validate), that every element of
    /// every tensor that the model computes with is on exactly one rank, or on several that all declare it
    /// replicated; that tensors are cut where the dimensions say; that key/value heads are those that the query
    /// heads read; and that the bytes add up.
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
        if let Some(what) = self.dimensions.iter().find_map(|d| wrong_ranges(d, world)) {
            return Some(what);
        }
        if let Some(what) = self.layers.iter().find_map(|layer| self.unknown_ranges(layer)) {
            return Some(what);
        }
        let vocab = self.dimension("vocab");
        if self.vocab.ranges[..] != *vocab.map_or(&[][..], |d| &d.ranges) {
            return Some("vocab: ranges are not those of the dimension vocab".to_owned());
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
        // Readers add these up.
        let exchanges = self.layers.iter().flat_map(|l| &l.collectives).chain(&self.vocab.collectives);
        let of_ranks = self.ranks.iter().flat_map(|r| [r.weight_bytes, r.kv_bytes_per_token, r.peak_bytes]);
        let bytes =
            exchanges.map(|c| c.bytes_per_token).chain(of_ranks).chain(self.tensors.iter().map(|t| t.bytes));
        if bytes.map(u128::from).sum::<u128>() > MAX_SUM {
            return Some(format!("all its bytes are more than {MAX_SUM} together"));
        }
        self.tensors_out_of_order()
    }

    /// Why a layer's ranges aren't those of dimensions.
    fn unknown_ranges(&self, layer: &Layer) -> Option<String> {
        let Layer { name, attention, cross_attention, mlp, .. } = layer;
        let cross = cross_attention.as_ref();
        let lists = [
            ("q_heads", &attention.q_heads),
            ("kv_heads", &attention.kv_heads),
            ("ffn", &mlp.ffn),
            ("experts", &mlp.experts),
            ("shared_ffn", &mlp.shared_ffn),
        ];
        let of_cross = cross.map(|a| [("cross q_heads", &a.q_heads), ("cross kv_heads", &a.kv_heads)]);
        let known = |ranges: &[Span]| ranges.is_empty() || self.dimensions.iter().any(|d| d.ranges == ranges);
        let mut all = lists.into_iter().chain(of_cross.into_iter().flatten());
        let (what, _) = all.find(|(_, ranges)| !known(ranges))?;
        Some(format!("{name}: {what} are not the ranges of any dimension"))
    }

    /// `tensors` must be sorted by name and rank, for [`Plan::tensor`] to find them.
    fn tensors_out_of_order(&self) -> Option<String> {
        if let Some(shard) = self.tensors.iter().find(|s| s.rank >= self.world) {
            return Some(format!("tensor {} has an entry for rank {}", shard.name, shard.rank));
        }
        let pair = self.tensors.windows(2).find(|w| (&w[0].name, w[0].rank) >= (&w[1].name, w[1].rank))?;
        let TensorShard { name, rank, .. } = &pair[1];
        Some(format!(
            "tensor {name} of rank {rank} is not in its place: tensors must be sorted by name and rank"
        ))
    }

    fn find_mismatch(&self, spec: &ModelSpec) -> Option<String> {
        if self.model != summarise(spec) {
            return Some("it is for a model of other dimensions".to_owned());
        }
        let shares = match self.shares(spec) {
            Ok(shares) => shares,
            Err(what) => return Some(what),
        };
        for (n, layer) in self.layers.iter().enumerate() {
            let expected = shared_by(spec, &shares, n);
            let same = layer.name == spec.layers[n].name
                && layer.attention == expected.attention
                && layer.cross_attention == expected.cross_attention
                && layer.mlp == expected.mlp;
            if !same {
                return Some(format!("{}: its shares are not those of the model's layer {n}", layer.name));
            }
        }
        let mut bytes = vec![0u64; self.world];
        let mut rest = &self.tensors[..];
        for tensor in &spec.tensors {
            let (shards, after) = rest.split_at(rest.iter().take_while(|s| s.name == tensor.name).count());
            rest = after;
            if let Some(what) = self.wrong_shards(tensor, shards, &shares) {
                return Some(format!("tensor {}: {what}", tensor.name));
            }
            for shard in shards {
                let size = elements(tensor, &shard.slices) * tensor.stored.size();
                if shard.bytes != size {
                    let TensorShard { name, rank, bytes, .. } = shard;
                    return Some(format!("tensor {name}: rank {rank}'s part is {size} bytes, not {bytes}"));
                }
                bytes[shard.rank] += size;
            }
        }
        if let Some(shard) = rest.first() {
            return Some(format!("the model has no tensor {}", shard.name));
        }
        let wrong = self.ranks.iter().zip(&bytes).find(|(r, bytes)| r.weight_bytes != **bytes);
        wrong.map(|(r, bytes)| {
            format!("rank {} reads {bytes} bytes, not weight_bytes = {}", r.rank, r.weight_bytes)
        })
    }

    fn wrong_shards(&self, tensor: &TensorSpec, shards: &[TensorShard], shares: &Shares) -> Option<String> {
        if shards.is_empty() {
            return Some("no rank holds it".to_owned());
        }
        if let Some(what) = not_covered(tensor, shards) {
            return Some(what);
        }
        let mut listed = shards.iter().peekable();
        for rank in 0..self.world {
            let shard = listed.next_if(|s| s.rank == rank);
            match (shares.slices(tensor, rank), shard) {
                (Some(expected), Some(shard)) if expected == shard.slices => {}
                (None, None) => {}
                (Some(_), None) => return Some(format!("rank {rank} has no entry, but needs it")),
                _ => return Some(format!("rank {rank}'s slice is not what its heads, columns or rows need")),
            }
        }
        None
    }

    /// The shares that the plan's dimensions are, if they are the model's.
    fn shares(&self, spec: &ModelSpec) -> std::result::Result<Shares, String> {
        let same = |(p, d): (&DimensionPlan, &Dimension)| {
            (&p.name, p.size, p.granule) == (&d.name, d.size, d.granule)
        };
        if self.dimensions.len() != spec.dims.len() || !self.dimensions.iter().zip(&spec.dims).all(same) {
            return Err("its dimensions are not those of the model".to_owned());
        }
        let of = |cut: Cut| self.dimensions.iter().zip(&spec.dims).find(|(p, d)| d.cut == cut && p.shared);
        // How many groups of ranks have different experts.
        let groups = match (of(Cut::Experts), of(Cut::ExpertColumns)) {
            (None, _) => 1,
            (Some(_), None) => self.world,
            (Some(_), Some((columns, _))) => columns.groups,
        };
        for (p, d) in self.dimensions.iter().zip(&spec.dims) {
            if p.groups != if d.cut == Cut::ExpertColumns && p.shared { groups } else { 1 } {
                return Err(format!("{} is not shared by as many groups as the experts are", p.name));
            }
            let Cut::KvHeads { q } = d.cut else {
                // A partition; that cuts are where they may be was checked.
                if p.shared && !is_partition(p, if d.cut == Cut::Experts { groups } else { p.groups }) {
                    return Err(format!("{}: ranges of several ranks overlap", p.name));
                }
                continue;
            };
            let heads = &self.dimensions[q];
            for (rank, (q, kv)) in heads.ranges.iter().zip(&p.ranges).enumerate() {
                let needs = kv_heads(heads.size, p.size, *q);
                let widened = Span::new(
                    needs.start / p.granule * p.granule,
                    needs.end.next_multiple_of(p.granule).min(p.size),
                );
                if *kv != widened {
                    return Err(format!("{} of rank {rank} are not those that its query heads read", p.name));
                }
            }
        }
        let share = |p: &DimensionPlan| DimensionShares {
            ranges: p.ranges.clone(),
            shared: p.shared,
            padded: if p.name == "vocab" { self.vocab.padded } else { p.size },
        };
        Ok(Shares {
            world: self.world,
            dims: self.dimensions.iter().map(share).collect(),
            experts: Experts::in_groups(groups, self.world),
        })
    }
}

/// Whether a dimension's ranges are a partition: of experts, which so many groups of ranks have, that of the groups; of
/// other things, that in each of so many groups.
fn is_partition(d: &DimensionPlan, groups: usize) -> bool {
    let each = d.ranges.len() / groups.max(1);
    let ascends = |ranges: &[Span]| ranges.windows(2).all(|w| w[0].end == w[1].start);
    if d.groups == groups {
        return d.ranges.chunks(each).all(ascends);
    }
    let firsts: Vec<Span> = d.ranges.iter().step_by(each).copied().collect();
    ascends(&firsts) && d.ranges.chunks(each).all(|group| group.iter().all(|r| *r == group[0]))
}

/// Why a dimension's ranges don't cover it, or cut it where it mustn't be. Ranges may overlap here: which do is seen
/// with the model.
fn wrong_ranges(d: &DimensionPlan, world: usize) -> Option<String> {
    let DimensionPlan { name, size, ranges, granule, shared, groups } = d;
    if *groups == 0 || !world.is_multiple_of(*groups) {
        return Some(format!("{name} is shared by each of {groups} groups, which {world} ranks can't make"));
    }
    if ranges.len() != world {
        return Some(format!("{name} has {} ranges for {world} ranks", ranges.len()));
    }
    if *granule == 0 {
        return Some(format!("{name} has a granule of 0"));
    }
    let each = world / groups;
    let (mut start, mut end) = (0, 0);
    for (rank, r) in ranges.iter().enumerate() {
        if rank.is_multiple_of(each) && end == *size {
            (start, end) = (0, 0);
        }
        let of_rank = format!("{name} of rank {rank} is {}..{}", r.start, r.end);
        if !shared && (r.start, r.end) != (0, *size) {
            return Some(format!("{of_rank}, but it isn't shared: it must be 0..{size}"));
        }
        if r.is_empty() || r.start < start || r.start > end || r.end < end {
            return Some(format!("{of_rank}: it must start at {end} and hold something"));
        }
        if !r.start.is_multiple_of(*granule) || (r.end != *size && !r.end.is_multiple_of(*granule)) {
            return Some(format!("{of_rank}: it can only be cut at multiples of {granule}"));
        }
        (start, end) = (r.start, r.end);
    }
    (end != *size).then(|| format!("{name} ends at {end}, not {size}"))
}

/// Why the shards of a tensor don't hold each element once, or several times and declared so.
///
/// All shards cut the same dimensions: one, but for tensors of several experts whose columns are shared too. Sweeping over
/// the sorted ends of the ranges of each visits each stretch that the same ranks hold, or each field of stretches.
fn not_covered(tensor: &TensorSpec, shards: &[TensorShard]) -> Option<String> {
    let cuts = |shard: &TensorShard| shard.slices.iter().map(|s| s.dim).collect::<BTreeSet<usize>>();
    let dims = cuts(&shards[0]);
    if let Some(dim) = dims.iter().find(|dim| **dim >= tensor.shape.len()) {
        return Some(format!("it has no dimension {dim}"));
    }
    if shards.iter().any(|shard| cuts(shard) != dims) {
        return Some("its shards don't all cut the same dimensions".to_owned());
    }
    // Of each dimension that is cut, where any shard does.
    let mut ends: Vec<Vec<usize>> = Vec::new();
    for dim in &dims {
        let size = tensor.shape[*dim];
        let mut all = vec![0, size];
        for shard in shards {
            let mut end = 0;
            for Slice { range, .. } in shard.slices.iter().filter(|s| s.dim == *dim) {
                if range.is_empty() || range.start < end || range.end > size {
                    let (rank, start) = (shard.rank, range.start);
                    return Some(format!("rank {rank}: {start}..{} is not within {end}..{size}", range.end));
                }
                end = range.end;
                all.extend([range.start, range.end]);
            }
        }
        all.sort_unstable();
        all.dedup();
        ends.push(all);
    }
    // The fields that a shard holds, numbered with the last dimension running fastest.
    let fields = |shard: &TensorShard| {
        dims.iter().zip(&ends).fold(vec![0], |fields, (dim, ends)| {
            let at = |index: usize| ends.partition_point(|e| *e < index);
            let ranges =
                shard.slices.iter().filter(|s| s.dim == *dim).map(|s| at(s.range.start)..at(s.range.end));
            let along: Vec<usize> = ranges.flatten().collect();
            fields.iter().flat_map(|f| along.iter().map(move |i| f * (ends.len() - 1) + i)).collect()
        })
    };
    let mut holders = vec![0u32; ends.iter().map(|e| e.len() - 1).product()];
    for shard in shards {
        fields(shard).into_iter().for_each(|field| holders[field] += 1);
    }
    if let Some(mut field) = holders.iter().position(|count| *count == 0) {
        let mut place = Vec::new();
        for (dim, ends) in dims.iter().zip(&ends).rev() {
            let i = field % (ends.len() - 1);
            field /= ends.len() - 1;
            place.push(format!("{}..{} of dimension {dim}", ends[i], ends[i + 1]));
        }
        place.reverse();
        let place = if place.is_empty() { "it".to_owned() } else { place.join(" and ") };
        return Some(format!("no rank holds {place}"));
    }
    let shares = |shard: &TensorShard| fields(shard).into_iter().any(|field| holders[field] > 1);
    let undeclared = shards.iter().find(|shard| shard.replicated != shares(shard));
    undeclared.map(|shard| {
        let (is, says) = if shares(shard) {
            ("on other ranks too", "not replicated")
        } else {
            ("on no other rank", "replicated")
        };
        format!("what rank {} holds is {is}, but the plan says {says}", shard.rank)
    })
}
