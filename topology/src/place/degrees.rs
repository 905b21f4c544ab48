//! The axes along which a model's work is divided, and the degrees worth trying.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::machine::{Level, Machine};
use super::pass::Goal;
use super::workload::{Keys, Kind, Split, Workload};

/// How many ways each axis divides the work. The product of all but `ep` and `etp` is the number of ranks.
///
/// Ranks are numbered with the innermost axis running fastest: tp, cp, cfg, the part of dp that shares experts, pp, and
/// the rest of dp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Degrees {
    /// Tensor parallel: heads, columns and vocabulary rows.
    pub tp: usize,
    /// Context parallel: the tokens of a sequence, with whole weights on each rank.
    pub cp: usize,
    /// Classifier-free guidance: the conditional and the unconditional pass.
    pub cfg: usize,
    /// Pipeline parallel: blocks.
    pub pp: usize,
    /// Data parallel: sequences.
    pub dp: usize,
    /// Groups that the experts are spread over: 1 where each expert is cut like other feed-forward layers. `ep` times
    /// `etp` is `tp`, or `tp` times a divisor of `dp`.
    pub ep: usize,
    /// Ranks of such a group, which share each expert's columns: 1 where experts are whole, and a divisor of `tp`. Without
    /// meaning where `ep` is 1. The search mixes at will within a tensor-parallel group; over several, `etp` is 1, or over all `tp`.
    #[serde(default = "one")]
    pub etp: usize,
    /// Sequence parallel: whether a tensor-parallel group divides the tokens between its sums.
    pub sp: bool,
    /// How context parallelism gets each query its keys.
    pub cp_by: ContextBy,
}

fn one() -> usize {
    1
}

/// How context parallelism gets each query its keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContextBy {
    /// All-to-alls exchange tokens for heads before and after attention (Jacobs et al., "DeepSpeed Ulysses", 2023).
    #[default]
    Ulysses,
    /// Keys and values go around in a ring (Liu, Zaharia and Abbeel, "Ring Attention", 2023).
    Ring,
}

impl Degrees {
    /// One rank.
    pub const ONE: Degrees =
        Degrees { tp: 1, cp: 1, cfg: 1, pp: 1, dp: 1, ep: 1, etp: 1, sp: false, cp_by: ContextBy::Ulysses };

    /// Ranks in all.
    pub fn ranks(&self) -> usize {
        self.tp * self.cp * self.cfg * self.pp * self.dp
    }

    /// Data-parallel ranks that share one set of experts.
    pub fn sharing_experts(&self) -> usize {
        if self.ep == 1 { 1 } else { (self.ep * self.etp / self.tp).max(1) }
    }

    /// Groups of a tensor-parallel group that have different experts, if any have: they divide its tokens.
    pub fn expert_groups(&self) -> usize {
        self.tp / self.etp
    }

    /// The degrees from the innermost axis outwards, as ranks are numbered.
    pub fn nested(&self) -> [usize; 6] {
        let sharing = self.sharing_experts();
        [self.tp, self.cp, self.cfg, sharing, self.pp, self.dp / sharing]
    }

    /// What a tensor-parallel group's costs depend on, besides its devices and its sequences.
    pub(super) fn of_group(&self) -> (usize, usize, ContextBy, usize, usize, bool) {
        (self.tp, self.cp, self.cp_by, self.ep, self.etp, self.sp)
    }

    /// Axes that divide anything.
    pub fn axes(&self) -> usize {
        [self.tp, self.cp, self.cfg, self.pp, self.dp].iter().filter(|d| **d > 1).count()
    }
}

impl fmt::Display for Degrees {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cp = match self.cp_by {
            ContextBy::Ulysses => "ulysses",
            ContextBy::Ring => "ring",
        };
        write!(f, "tp {}", self.tp)?;
        let axes = [
            (cp, self.cp),
            ("cfg", self.cfg),
            ("pp", self.pp),
            ("dp", self.dp),
            ("ep", self.ep),
            ("etp", self.etp),
        ];
        for (name, degree) in axes.iter().filter(|(_, d)| *d > 1) {
            write!(f, " x {name} {degree}")?;
        }
        if self.sp { f.write_str(" + sp") } else { Ok(()) }
    }
}

/// All degrees that are tried on a machine for `batch` sequences, in ascending order.
///
/// Tensor-parallel degrees are all up to 8, and above that those that divide the number of devices of an island, as
/// others leave devices idle. The other axes go by powers of two, besides those that use a machine's devices up.
/// While decoding, a ring exchanges what Ulysses does, so it is tried only where heads don't allow Ulysses.
pub fn candidates(workload: &Workload, machine: &Machine, batch: usize, goal: Goal) -> Vec<Degrees> {
    let devices = machine.workers.len();
    let branches = match workload.kind {
        Kind::Decoder => 1,
        Kind::Forward { branches, .. } => branches,
    };
    let mut sizes: Vec<usize> = machine.levels.iter().flat_map(island_sizes).chain([devices]).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let divides = |n: usize| sizes.iter().any(|s| s.is_multiple_of(n));
    let tp_limit = tp_limit(workload).map_or(1, |(_, most)| most.min(devices));

    let rings = workload.kind != Kind::Decoder || !matches!(goal, Goal::Decode | Goal::Memory);
    let mut found = Vec::new();
    for tp in (1..=tp_limit).filter(|tp| *tp <= 8 || divides(*tp)) {
        for (cp, cp_by) in contexts(workload, tp, devices / tp, rings) {
            for cfg in powers(branches.min(devices / (tp * cp))) {
                let inner = tp * cp * cfg;
                for pp in degrees(workload.order.len().min(devices / inner)) {
                    for dp in degrees(batch.min(devices / (inner * pp))) {
                        let plain = Degrees { tp, cp, cfg, pp, dp, cp_by, ..Degrees::ONE };
                        for (ep, etp) in expert_degrees(workload, &plain) {
                            found.push(Degrees { ep, etp, ..plain });
                            if tp > 1 {
                                found.push(Degrees { ep, etp, sp: true, ..plain });
                            }
                        }
                    }
                }
            }
        }
    }
    found.sort_unstable();
    found
}

/// The most tensor-parallel ranks a model can use, and what runs out; nothing if it can't be cut at all.
pub fn tp_limit(workload: &Workload) -> Option<(&'static str, usize)> {
    // Experts can be spread whole, so their columns limit nothing: arrangements that cut them finer are refused later.
    let parts = workload.blocks.iter().flat_map(|b| &b.parts);
    let limits = parts.filter(|p| !matches!(p.split, Split::Experts { .. }));
    limits.filter_map(|p| p.split.limit()).min_by_key(|(_, most)| *most)
}

fn island_sizes(level: &Level) -> Vec<usize> {
    let mut sizes = vec![0; level.links.len()];
    level.island_of.iter().for_each(|i| sizes[*i] += 1);
    sizes
}

/// 1, 2, 4, ... up to `most`.
fn powers(most: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1usize), |n| n.checked_mul(2)).take_while(move |n| *n <= most)
}

/// Powers of two, 3, and `most` itself.
fn degrees(most: usize) -> Vec<usize> {
    let mut all: Vec<usize> = powers(most).chain([3, most]).filter(|n| (1..=most).contains(n)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Ways to divide the context; Ulysses only where each rank gets as many query heads.
fn contexts(workload: &Workload, tp: usize, most: usize, rings: bool) -> Vec<(usize, ContextBy)> {
    let attends = |keys: Keys| !matches!(keys, Keys::Other { .. });
    let mut parts = workload.blocks.iter().flat_map(|b| &b.parts);
    let heads = parts.find_map(|p| match (p.split, p.attention) {
        (Split::Heads { q, .. }, Some(a)) if attends(a.keys) => Some(q),
        _ => None,
    });
    let mut found = vec![(1, ContextBy::Ulysses)];
    if let Some(q) = heads {
        for cp in powers(most).skip(1) {
            let ulysses = q.is_multiple_of(tp * cp);
            if ulysses {
                found.push((cp, ContextBy::Ulysses));
            }
            if rings || !ulysses {
                found.push((cp, ContextBy::Ring));
            }
        }
    }
    found
}

/// Groups to spread experts over, and the ranks of each. Those of several data-parallel ranks share them only where
/// nothing else divides a rank's tokens.
fn expert_degrees(workload: &Workload, d: &Degrees) -> Vec<(usize, usize)> {
    let Some((count, _)) = workload.experts() else { return vec![(1, 1)] };
    let mut sharing = vec![1];
    if d.cp == 1 && d.cfg == 1 {
        sharing.extend(powers(d.dp).skip(1).filter(|s| d.dp.is_multiple_of(*s)));
    }
    // Within a tensor-parallel group any mixture; over several, whole experts, and over all each cut over one of the groups:
    // all mixtures of large machines would take the search seconds.
    let within =
        |s: usize, etp: usize| d.tp.is_multiple_of(etp) && (s == 1 || etp == 1 || (etp == d.tp && s == d.dp));
    let of = |s: usize| (1..=d.tp).filter(move |etp| within(s, *etp)).map(move |etp| (d.tp / etp * s, etp));
    let spread = sharing.into_iter().flat_map(of).filter(|(ep, _)| (2..=count).contains(ep));
    std::iter::once((1, 1)).chain(spread).collect()
}
