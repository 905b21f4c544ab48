//! From one plan to another: which bytes each rank must fetch, and from whom.
//!
//! A rank keeps its number: rank 2 of the first plan is rank 2 of the second, where there is one. What it holds
//! and needs again stays where it is; everything else that it needs comes from a rank that holds it. So the bytes
//! that move are the least there can be. Where several ranks hold something, the one that has been asked for
//! least so far sends it, so that no rank sends much more than others.
//!
//! A tensor's elements are looked at in the pieces into which both plans cut it: within a piece, all elements are
//! on the same ranks, before and after.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::notes::size;
use super::{Plan, Slice, Span, TensorShard, json};
use crate::{Error, Result};

/// The schema that [`Diff::schema`] names.
pub const DIFF_SCHEMA: &str = "tensorwire.plan-diff/v1";

/// What must move to go from one plan to another of the same model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diff {
    /// Always [`DIFF_SCHEMA`].
    pub schema: String,
    /// Ranks before and after.
    pub worlds: [usize; 2],
    /// Bytes that move, over all ranks.
    pub total_bytes: u64,
    /// One entry a rank of either plan, in order.
    pub ranks: Vec<RankDiff>,
    /// The bytes that move by kind of tensor: names with `*` in the place of numbers, sorted.
    pub classes: Vec<ClassDiff>,
    /// Every piece that moves, by tensor and by the rank that needs it.
    pub moves: Vec<Move>,
}

/// What one rank keeps, fetches, sends and drops, in bytes of weights.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankDiff {
    /// The rank.
    pub rank: usize,
    /// What it holds before and after.
    pub keeps_bytes: u64,
    /// What it must get.
    pub fetches_bytes: u64,
    /// What others get from it.
    pub sends_bytes: u64,
    /// What it holds before and not after.
    pub drops_bytes: u64,
    /// Whom it gets how much from, by rank.
    pub from: Vec<Source>,
}

/// How much comes from one rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// The rank that sends.
    pub rank: usize,
    /// How many bytes.
    pub bytes: u64,
}

/// What moves of one kind of tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassDiff {
    /// Such as `model.layers.*.self_attn.q_proj.weight`.
    pub class: String,
    /// How many bytes.
    pub bytes: u64,
}

/// A piece of a tensor that one rank gets from another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Move {
    /// The tensor's name.
    pub tensor: String,
    /// The rank that needs it.
    pub to: usize,
    /// The rank that sends it.
    pub from: usize,
    /// The part of each dimension that is cut; a dimension that isn't listed is whole.
    pub slices: Vec<Slice>,
    /// How many bytes.
    pub bytes: u64,
}

impl Plan {
    /// What must move to go from this plan to another of the same model.
    ///
    /// ```
    /// use tensorwire_topology::{ModelSpec, Planner};
    ///
    /// let spec = ModelSpec::from_config(
    ///     r#"{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    ///         "intermediate_size": 96, "vocab_size": 128, "torch_dtype": "bfloat16"}"#,
    /// )?;
    /// let planner = Planner::new(&spec);
    /// let (two, four) = (planner.plan(2)?, planner.plan(4)?);
    /// let diff = two.diff(&four)?;
    /// // Rank 0 had the first half of everything and needs its first quarter: it fetches nothing.
    /// assert_eq!(diff.ranks[0].fetches_bytes, 0);
    /// // Rank 3 is new: it fetches all that it needs, from rank 1 but for what everybody has.
    /// assert_eq!(diff.ranks[3].fetches_bytes, four.ranks[3].weight_bytes);
    /// assert_eq!(two.diff(&two)?.total_bytes, 0);
    /// # Ok::<(), tensorwire_topology::Error>(())
    /// ```
    ///
    /// Error: [`Error::InvalidPlan`] if the two are of different models, or one doesn't list its tensors.
    pub fn diff(&self, to: &Plan) -> Result<Diff> {
        if self.model != to.model {
            return Err(different("their models have other dimensions"));
        }
        if let Some(rank) = self.not_listed().or_else(|| to.not_listed()) {
            let what = format!("its tensors aren't all that rank {rank} holds: make it again");
            return Err(Error::InvalidPlan(what));
        }
        let (before, after) = (by_tensor(&self.tensors), by_tensor(&to.tensors));
        if !before.keys().eq(after.keys()) {
            return Err(different("they don't name the same tensors"));
        }
        let world = self.world.max(to.world);
        let mut tally = Tally {
            ranks: (0..world).map(|rank| RankDiff { rank, ..RankDiff::default() }).collect(),
            pairs: BTreeMap::new(),
            classes: BTreeMap::new(),
            moves: Vec::new(),
        };
        for ((name, before), after) in before.iter().zip(after.values()) {
            tally.tensor(name, before, after)?;
        }
        for ((to, from), bytes) in tally.pairs {
            tally.ranks[to].from.push(Source { rank: from, bytes });
        }
        Ok(Diff {
            schema: DIFF_SCHEMA.to_owned(),
            worlds: [self.world, to.world],
            total_bytes: tally.ranks.iter().map(|r| r.fetches_bytes).sum(),
            ranks: tally.ranks,
            classes: tally.classes.into_iter().map(|(class, bytes)| ClassDiff { class, bytes }).collect(),
            moves: tally.moves,
        })
    }
}

impl Plan {
    /// The first rank whose tensors don't add up to its weights, as in an outline, which lists none.
    fn not_listed(&self) -> Option<usize> {
        let mut bytes = vec![0; self.world];
        self.tensors.iter().for_each(|t| bytes[t.rank] += t.bytes);
        self.ranks.iter().zip(bytes).find(|(r, bytes)| r.weight_bytes != *bytes).map(|(r, _)| r.rank)
    }
}

impl Diff {
    /// As JSON, schema [`DIFF_SCHEMA`]. The same plans give the same bytes.
    pub fn to_json(&self) -> String {
        json::lines(self)
    }

    /// For a person: who fetches how much from whom, and of what.
    pub fn summary(&self) -> String {
        let mut out = String::new();
        // Writing to a string can't fail, so these results say nothing.
        let _ = writeln!(
            out,
            "from {} to {} ranks: {} of weights move, the least that can",
            self.worlds[0],
            self.worlds[1],
            size(self.total_bytes)
        );
        let _ = writeln!(
            out,
            "{:>6} {:>10} {:>10} {:>10} {:>10}  from",
            "rank", "keeps", "fetches", "sends", "drops"
        );
        for r in &self.ranks {
            let from = r.from.iter().map(|s| format!("{}: {}", s.rank, size(s.bytes)));
            let _ = writeln!(
                out,
                "{:>6} {:>10} {:>10} {:>10} {:>10}  {}",
                r.rank,
                size(r.keeps_bytes),
                size(r.fetches_bytes),
                size(r.sends_bytes),
                size(r.drops_bytes),
                some(from, 4)
            );
        }
        for class in &self.classes {
            let _ = writeln!(out, "{:>10} of {}", size(class.bytes), class.class);
        }
        out
    }
}

/// The first few of many, with how many more there are.
fn some(items: impl ExactSizeIterator<Item = String>, shown: usize) -> String {
    let more = items.len().saturating_sub(shown);
    let list = items.take(shown).collect::<Vec<_>>().join(", ");
    if more == 0 { list } else { format!("{list} and {more} more") }
}

fn different(why: &str) -> Error {
    Error::InvalidPlan(format!("the two plans are of different models: {why}"))
}

/// The shards of each tensor, by name.
fn by_tensor(shards: &[TensorShard]) -> BTreeMap<&str, &[TensorShard]> {
    shards.chunk_by(|a, b| a.name == b.name).map(|of_one| (of_one[0].name.as_str(), of_one)).collect()
}

/// What has been found to move.
struct Tally {
    ranks: Vec<RankDiff>,
    /// Bytes by the rank that needs them and the rank that sends them.
    pairs: BTreeMap<(usize, usize), u64>,
    classes: BTreeMap<String, u64>,
    moves: Vec<Move>,
}

impl Tally {
    fn tensor(&mut self, name: &str, before: &[TensorShard], after: &[TensorShard]) -> Result<()> {
        let pieces = Pieces::new(before.iter().chain(after));
        let bytes = |piece| pieces.bytes(piece);
        // The ranks that hold each piece, ascending.
        let mut holders: Vec<Vec<usize>> = vec![Vec::new(); pieces.count()];
        for shard in before {
            for piece in pieces.of(shard) {
                holders[piece].push(shard.rank);
                self.ranks[shard.rank].drops_bytes += bytes(piece);
            }
        }
        for shard in after {
            let to = shard.rank;
            for piece in pieces.of(shard) {
                let bytes = bytes(piece);
                let had = holders[piece].binary_search(&to).is_ok();
                if had {
                    self.ranks[to].keeps_bytes += bytes;
                    self.ranks[to].drops_bytes -= bytes;
                    continue;
                }
                let from = holders[piece].iter().copied().min_by_key(|r| self.ranks[*r].sends_bytes);
                let Some(from) = from else {
                    let what = format!("no rank of the first plan holds all that rank {to} needs of {name}");
                    return Err(Error::InvalidPlan(what));
                };
                self.ranks[to].fetches_bytes += bytes;
                self.ranks[from].sends_bytes += bytes;
                *self.pairs.entry((to, from)).or_default() += bytes;
                *self.classes.entry(class(name)).or_default() += bytes;
                self.add(Move { tensor: name.to_owned(), to, from, slices: pieces.slices(piece), bytes });
            }
        }
        Ok(())
    }

    /// Adds a piece, to the one before it where that is its neighbour.
    fn add(&mut self, new: Move) {
        if let Some(last) = self.moves.last_mut()
            && (&last.tensor, last.to, last.from) == (&new.tensor, new.to, new.from)
            && let ([before], [slice]) = (last.slices.as_mut_slice(), new.slices.as_slice())
            && (before.dim, before.range.end) == (slice.dim, slice.range.start)
        {
            before.range.end = slice.range.end;
            last.bytes += new.bytes;
        } else {
            self.moves.push(new);
        }
    }
}

/// A tensor cut into the pieces that two plans tell apart.
struct Pieces {
    /// The dimensions that either plan cuts, each with the places where it does, from 0 to its size.
    cuts: Vec<(usize, Vec<usize>)>,
    /// Bytes for one index of each of these dimensions.
    unit: u64,
}

impl Pieces {
    fn new<'a>(shards: impl Iterator<Item = &'a TensorShard> + Clone) -> Pieces {
        let mut cuts: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for slice in shards.clone().flat_map(|s| &s.slices) {
            cuts.entry(slice.dim).or_insert_with(|| vec![0]).extend([slice.range.start, slice.range.end]);
        }
        for ends in cuts.values_mut() {
            ends.sort_unstable();
            ends.dedup();
        }
        let mut pieces = Pieces { cuts: cuts.into_iter().collect(), unit: 1 };
        let whole = |shard: &TensorShard| -> u64 {
            pieces.of(shard).into_iter().map(|piece| pieces.bytes(piece)).sum()
        };
        let unit = shards.map(|s| (s.bytes, whole(s))).find(|(_, indices)| *indices > 0);
        pieces.unit = unit.map_or(0, |(bytes, indices)| bytes / indices);
        pieces
    }

    fn count(&self) -> usize {
        self.cuts.iter().map(|(_, ends)| ends.len() - 1).product()
    }

    /// The pieces that a shard holds, ascending. They are numbered with the last dimension running fastest.
    fn of(&self, shard: &TensorShard) -> Vec<usize> {
        let mut pieces = vec![0];
        for (dim, ends) in &self.cuts {
            let at = |index: usize| ends.partition_point(|end| *end < index);
            let sliced = shard.slices.iter().filter(|s| s.dim == *dim);
            let mut along: Vec<usize> =
                sliced.clone().flat_map(|s| at(s.range.start)..at(s.range.end)).collect();
            if sliced.count() == 0 {
                along = (0..ends.len() - 1).collect();
            }
            let stretches = ends.len() - 1;
            pieces = pieces.iter().flat_map(|p| along.iter().map(move |i| p * stretches + i)).collect();
        }
        pieces
    }

    /// The stretch of each dimension that a piece is.
    fn slices(&self, mut piece: usize) -> Vec<Slice> {
        let mut slices: Vec<Slice> = Vec::with_capacity(self.cuts.len());
        for (dim, ends) in self.cuts.iter().rev() {
            let i = piece % (ends.len() - 1);
            piece /= ends.len() - 1;
            slices.push(Slice { dim: *dim, range: Span::new(ends[i], ends[i + 1]) });
        }
        slices.reverse();
        slices
    }

    fn bytes(&self, piece: usize) -> u64 {
        self.unit * self.slices(piece).iter().map(|s| s.range.len() as u64).product::<u64>()
    }
}

/// A tensor's name without its numbers.
fn class(tensor: &str) -> String {
    let part = |part: &'_ str| {
        if part.bytes().all(|b| b.is_ascii_digit()) { "*".to_owned() } else { part.to_owned() }
    };
    tensor.split('.').map(part).collect::<Vec<_>>().join(".")
}
