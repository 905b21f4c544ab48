//! The rules: which part of each dimension a rank holds. Pure functions from sizes and ranks to ranges.
//!
//! With `n` ranks, `h` query heads, `k` key/value heads, `F` feed-forward columns and `V` vocabulary rows:
//!
//! * [`heads`]: query heads, in `n` ranges such that the most that a rank has of query heads and (twice) the
//!   key/value heads they read is least, cut between key/value groups where that costs nothing.
//! * [`kv_heads`]: a rank with query heads `[a, b)` needs key/value heads
//!   `floor(a*k/h) ..= floor((b-1)*k/h)`, which other ranks may need too.
//! * [`even`]: feed-forward columns, in `n` ranges of `ceil(F/n)` or `floor(F/n)`, larger first. That
//!   a rank has fewer heads is no reason to give it more columns: each block ends in an all-reduce, so ranks
//!   wait for the slowest of each block by itself. Where weights are quantised, whole groups are shared.
//! * [`vocab`]: vocabulary rows, padded to a multiple of `lcm(64, n)` and cut evenly; unpadded where that
//!   would unbalance them.
//! * routed experts: the columns of each ([`Experts::Tensor`]), whole experts ([`Experts::Parallel`]), or whole experts
//!   among groups of ranks and their columns within each ([`Experts::Grouped`]). By default columns, unless their
//!   shares would be illegal or more uneven than 1.03 times the mean and whole experts are shared more evenly; groups
//!   where there are neither columns nor experts for every rank.
//!
//! * [`by_height`]: rows of a picture, and the halos that convolutions need of neighbours' rows.
//!
//! Ranks that aren't alike have speeds and memory limits ([`Options`]): then each has a share such that the largest
//! share over speed is least, of which a rank that couldn't hold it gives some to the others.
//!
//! [`Shares`] are all of these for one model. Everything else (norms, position embeddings, biases of row-parallel
//! layers) is whole on every rank. Column- and row-parallel layers are those of Shoeybi et al., "Megatron-LM:
//! Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019: with `Y = X A` cut by A's
//! columns and `Z = Y B` by B's rows, the two need one all-reduce, of `Z`.

mod even;
mod halo;
mod heads;
mod weighted;

pub use even::{VocabShares, even, vocab};
pub use halo::{Step, StepRows, by_height};
pub use heads::{HeadShares, heads, kv_heads};

use crate::model::{Cut, Dimension, ModelSpec, TensorSpec};
use crate::plan::{Slice, Span};
use crate::{Error, Result};

/// What a plan may choose besides the number of ranks.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Options {
    /// How routed experts are shared.
    pub experts: Experts,
    /// Whether each rank keeps a part of the tokens between blocks: reduce-scatter and all-gather instead of
    /// all-reduce, the same bytes, and activations are shared too.
    pub sequence_parallel: bool,
    /// How fast each rank is, in any unit: shares follow. Empty where all are alike.
    pub speeds: Vec<f64>,
    /// How many bytes of weights each rank can hold. Empty where there is no limit.
    pub memory: Vec<u64>,
}

/// How routed experts are shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Experts {
    /// As the rules choose.
    #[default]
    Auto,
    /// Each rank has some columns of every expert.
    Tensor,
    /// Each rank has some experts; tokens travel to them and back.
    Parallel,
    /// Ranks stand in groups of neighbours. Each group has some experts, and each of its ranks some columns of every one
    /// of these; tokens travel to a group and back.
    Grouped {
        /// How many groups: a divisor of the number of ranks.
        groups: usize,
    },
}

impl Experts {
    /// How many groups of ranks have different experts, of `world` ranks.
    pub fn groups(self, world: usize) -> usize {
        match self {
            Experts::Auto | Experts::Tensor => 1,
            Experts::Parallel => world,
            Experts::Grouped { groups } => groups,
        }
    }

    /// So many groups of `world` ranks, by the plainest name that it has.
    pub fn in_groups(groups: usize, world: usize) -> Experts {
        match groups {
            1 => Experts::Tensor,
            n if n == world => Experts::Parallel,
            groups => Experts::Grouped { groups },
        }
    }
}

/// Each rank's part of every dimension.
#[derive(Clone, Debug, PartialEq)]
pub struct Shares {
    /// How many ranks.
    pub world: usize,
    /// As [`ModelSpec::dims`].
    pub dims: Vec<DimensionShares>,
    /// How routed experts are shared: never [`Experts::Auto`].
    pub experts: Experts,
}

/// Each rank's part of one dimension.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DimensionShares {
    /// One range a rank: a partition, but for key/value heads, which overlap where one is on several ranks, and
    /// for dimensions that aren't shared.
    pub ranges: Vec<Span>,
    /// Whether it is shared; else it is whole on every rank.
    pub shared: bool,
    /// Its size after padding.
    pub padded: usize,
}

/// The largest share of columns that isn't worth sharing experts instead, in percent of the mean.
const LARGEST_COLUMNS_PERCENT: usize = 103;

impl Shares {
    /// The shares of `world` ranks.
    ///
    /// Errors: [`Error::NoRanks`], [`Error::TooManyRanks`]; [`Error::RankOptions`] and [`Error::Memory`] where
    /// ranks aren't alike.
    pub fn of(spec: &ModelSpec, world: usize, options: &Options) -> Result<Shares> {
        if world == 0 {
            return Err(Error::NoRanks);
        }
        let experts = experts(spec, world, options.experts);
        if let Experts::Grouped { groups } = experts
            && (groups == 0 || !world.is_multiple_of(groups))
        {
            return Err(Error::RankOptions(format!(
                "{world} ranks don't make {groups} equal groups of experts: give a divisor of {world}"
            )));
        }
        if let Some((d, units, ranks)) = binding(spec, world, experts).filter(|(_, _, ranks)| *ranks < world)
        {
            let legal = |n: usize| {
                let experts = self::experts(spec, n, options.experts);
                let whole = n.is_multiple_of(experts.groups(n));
                whole && binding(spec, n, experts).is_none_or(|(_, _, ranks)| n <= ranks)
            };
            return Err(Error::TooManyRanks {
                world,
                constraint: d.field,
                size: units,
                granule: d.size.div_ceil(units),
                nearest: (1..=ranks).rev().find(|&n| legal(n)).unwrap_or(1),
                alternatives: alternatives(spec, world, experts, d.cut),
            });
        }

        weighted::check(options, world)?;
        if !options.memory.is_empty() {
            return weighted::within_memory(spec, options, world, |speeds| {
                Shares::by(spec, world, experts, speeds)
            });
        }
        Shares::by(spec, world, experts, &options.speeds)
    }

    /// The shares of ranks of these speeds; all alike if there are none.
    fn by(spec: &ModelSpec, world: usize, experts: Experts, speeds: &[f64]) -> Result<Shares> {
        let speeds = if speeds.windows(2).all(|w| w[0] == w[1]) { &[] } else { speeds };
        let mut dims: Vec<DimensionShares> = Vec::with_capacity(spec.dims.len());
        for d in &spec.dims {
            let whole =
                DimensionShares { ranges: vec![Span::new(0, d.size); world], shared: false, padded: d.size };
            let of = |ranges| DimensionShares { ranges, shared: true, padded: d.size };
            dims.push(match d.cut {
                _ if !is_shared(d, world, experts) => whole,
                Cut::Heads { kv } => of(heads::of(d, &spec.dims[kv], world, speeds)?.q),
                Cut::KvHeads { q } => of(heads::of(&spec.dims[q], d, world, speeds)?.kv),
                Cut::Vocabulary if speeds.is_empty() => {
                    let VocabShares { ranges, padded } = vocab(d.size, world)?;
                    DimensionShares { ranges, shared: true, padded }
                }
                Cut::Experts => of(among_groups(d, world, experts.groups(world), speeds)?),
                Cut::ExpertColumns => of(within_groups(d, world, world / experts.groups(world), speeds)?),
                _ => of(even::in_granules(d, world, speeds)?),
            });
        }
        Ok(Shares { world, dims, experts })
    }

    /// How many different parts of a dimension of this kind there are, of which each rank has one.
    pub fn parts(&self, cut: Cut) -> usize {
        let groups = self.experts.groups(self.world);
        match cut {
            Cut::Experts => groups,
            Cut::ExpertColumns => self.world / groups,
            _ => self.world,
        }
    }

    /// What `rank` holds of a dimension.
    pub fn share(&self, dim: usize, rank: usize) -> Span {
        self.dims.get(dim).and_then(|d| d.ranges.get(rank)).copied().unwrap_or_default()
    }

    /// The part of a tensor that `rank` holds: the ranges of each dimension that is cut, in order; none if it
    /// holds nothing.
    pub fn slices(&self, tensor: &TensorSpec, rank: usize) -> Option<Vec<Slice>> {
        if tensor.owner.is_some_and(|o| !self.share(o.dim, rank).contains(o.index)) {
            return None;
        }
        let mut slices = Vec::new();
        for (dim, axis) in tensor.axes.iter().enumerate() {
            if axis.segments.iter().any(|s| self.dims[s.dim].shared) {
                let ranges = axis.ranges(|d| self.share(d, rank));
                slices.extend(ranges.into_iter().map(|range| Slice { dim, range }));
            }
        }
        Some(slices)
    }

    /// Whether other ranks hold some of what `rank` holds of a tensor.
    pub fn is_replicated(&self, tensor: &TensorSpec, rank: usize) -> bool {
        if self.world == 1 {
            return false;
        }
        // Whoever has some of the same is a neighbour.
        let before = rank.checked_sub(1);
        before
            .into_iter()
            .chain([rank + 1])
            .any(|other| other < self.world && self.overlap(tensor, rank, other))
    }

    /// Whether two ranks hold some of the same elements: along each axis that is cut, and of what a tensor is part of.
    fn overlap(&self, tensor: &TensorSpec, a: usize, b: usize) -> bool {
        let both = |dim: usize| self.share(dim, a).intersection(self.share(dim, b));
        let mut axes =
            tensor.axes.iter().filter(|axis| axis.segments.iter().any(|s| self.dims[s.dim].shared));
        tensor.owner.is_none_or(|o| both(o.dim).contains(o.index))
            && axes.all(|axis| axis.segments.iter().any(|s| !both(s.dim).intersection(s.indices).is_empty()))
    }
}

/// Experts among groups of ranks: those of a group have the same.
fn among_groups(d: &Dimension, world: usize, groups: usize, speeds: &[f64]) -> Result<Vec<Span>> {
    let each = world / groups;
    let of_group: Vec<f64> = speeds.chunks(each).map(|group| group.iter().sum()).collect();
    let experts = even::in_granules(d, groups, &of_group)?;
    Ok(experts.into_iter().flat_map(|span| std::iter::repeat_n(span, each)).collect())
}

/// Columns within each group of `each` ranks.
fn within_groups(d: &Dimension, world: usize, each: usize, speeds: &[f64]) -> Result<Vec<Span>> {
    if speeds.is_empty() {
        let columns = even::in_granules(d, each, &[])?;
        return Ok(columns.iter().copied().cycle().take(world).collect());
    }
    let of_group = |speeds: &[f64]| even::in_granules(d, each, speeds);
    Ok(speeds.chunks(each).map(of_group).collect::<Result<Vec<_>>>()?.concat())
}

/// How routed experts are shared where the choice is open.
fn experts(spec: &ModelSpec, world: usize, wish: Experts) -> Experts {
    if wish != Experts::Auto {
        return wish;
    }
    let of = |cut: Cut| spec.dims.iter().filter(move |d| d.cut == cut);
    // The largest share over the mean, in percent; none if there isn't one for each rank.
    let largest =
        |d: &Dimension| (world <= d.units()).then(|| d.units().div_ceil(world) * world * 100 / d.units());
    let worst = |cut: Cut| of(cut).map(largest).try_fold(100, |worst, x| x.map(|x| x.max(worst)));
    match (worst(Cut::ExpertColumns), worst(Cut::Experts)) {
        (Some(columns), _) if columns <= LARGEST_COLUMNS_PERCENT => Experts::Tensor,
        (Some(columns), Some(whole)) if whole < columns => Experts::Parallel,
        (None, Some(_)) => Experts::Parallel,
        (None, None) => in_groups(spec, world).unwrap_or(Experts::Tensor),
        _ => Experts::Tensor,
    }
}

/// The most groups for which there are experts, and columns for the ranks of each.
fn in_groups(spec: &ModelSpec, world: usize) -> Option<Experts> {
    let least = |cut: Cut| spec.dims.iter().filter(|d| d.cut == cut).map(Dimension::units).min();
    let (experts, columns) = (least(Cut::Experts)?, least(Cut::ExpertColumns)?);
    let fits = |groups: &usize| world.is_multiple_of(*groups) && world / groups <= columns;
    (1..=experts.min(world)).rev().find(fits).map(|groups| Experts::in_groups(groups, world))
}

/// Whether ranks have different parts of a dimension.
fn is_shared(d: &Dimension, world: usize, experts: Experts) -> bool {
    match d.cut {
        Cut::SharedColumns => world <= d.units(),
        Cut::ExpertColumns => experts != Experts::Parallel,
        Cut::Experts => experts != Experts::Tensor,
        _ => true,
    }
}

/// The dimension that there is least of to share, how much of it, and for how many ranks that is enough. The first of
/// equals: heads are what runs out in most models.
fn binding(spec: &ModelSpec, world: usize, experts: Experts) -> Option<(&Dimension, usize, usize)> {
    let groups = experts.groups(world);
    let enough = |d: &Dimension| match d.cut {
        Cut::Heads { kv } => (heads::units(d, &spec.dims[kv]), 1),
        // Each group shares the columns, and each expert is on so many ranks.
        Cut::ExpertColumns => (d.units(), groups),
        Cut::Experts => (d.units(), world / groups),
        _ => (d.units(), 1),
    };
    let limits = spec.dims.iter().filter(|d| match d.cut {
        // Key/value heads follow from the query heads and may be on several ranks; a shared expert may be on all.
        Cut::KvHeads { .. } | Cut::SharedColumns => false,
        _ => is_shared(d, 1, experts),
    });
    let of = |d| {
        let (units, times) = enough(d);
        (d, units, units.saturating_mul(times))
    };
    limits.map(of).min_by_key(|(_, _, ranks)| *ranks)
}

/// What else could use that many ranks.
fn alternatives(spec: &ModelSpec, world: usize, experts: Experts, binding: Cut) -> String {
    let enough = |cut: Cut| spec.dims.iter().any(|d| d.cut == cut && d.units() >= world);
    let mut ways = Vec::new();
    if binding == Cut::ExpertColumns && experts != Experts::Parallel && enough(Cut::Experts) {
        ways.push("share whole experts (expert parallel)");
    }
    if binding == Cut::Experts && enough(Cut::ExpertColumns) {
        ways.push("share each expert's columns (tensor parallel)");
    }
    ways.push("run several copies of the model (data parallel)");
    ways.push("cut it by layers (pipeline parallel)");
    let last = ways.pop().unwrap_or_default();
    format!("{} or {last}", ways.join(", "))
}

/// Refuses 0 ranks, and more ranks than there is something to share.
fn check_ranks(constraint: &'static str, size: usize, world: usize) -> Result<()> {
    match world {
        0 => Err(Error::NoRanks),
        _ if world > size => Err(Error::TooManyRanks {
            world,
            constraint,
            size,
            granule: 1,
            nearest: size,
            alternatives:
                "run several copies of the model (data parallel) or cut it by layers (pipeline parallel)"
                    .to_owned(),
        }),
        _ => Ok(()),
    }
}
