//! Attention heads: uneven shares, and the key/value heads that follow from them.

use std::cmp::Reverse;

use super::check_ranks;
use super::weighted::heads_by_speed;
use crate::model::{Dimension, gcd};
use crate::plan::Span;
use crate::{Error, Result};

/// How heads are shared.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadShares {
    /// Query heads of each rank; a partition.
    pub q: Vec<Span>,
    /// Key/value heads that each rank's query heads read; they overlap where a head is on several ranks.
    pub kv: Vec<Span>,
}

impl HeadShares {
    /// Copies of key/value heads beyond one each, over all ranks.
    pub fn duplicated_kv_heads(&self) -> usize {
        // A cut inside a group is a key/value head on both sides of it, so copies are overlaps of neighbours.
        self.kv.windows(2).map(|w| w[0].end - w[1].start).sum()
    }

    /// Whether another rank holds one of `rank`'s key/value heads too.
    pub fn shares_kv(&self, rank: usize) -> bool {
        let overlap = |a: usize, b: usize| match (self.kv.get(a), self.kv.get(b)) {
            (Some(a), Some(b)) => a.end > b.start,
            _ => false,
        };
        overlap(rank, rank + 1) || rank.checked_sub(1).is_some_and(|before| overlap(before, rank))
    }
}

/// The key/value heads that the query heads `q = [a, b)` of `q_heads` read, out of `kv_heads`:
/// `floor(a*k/h) ..= floor((b-1)*k/h)`. None for no query heads.
pub fn kv_heads(q_heads: usize, kv_heads: usize, q: Span) -> Span {
    if q.is_empty() || q_heads == 0 {
        return Span::default();
    }
    let of = |head: usize| (head as u128 * kv_heads as u128 / q_heads as u128) as usize;
    Span::new(of(q.start), of(q.end - 1) + 1)
}

/// What a key/value head costs a rank, where a query head costs 1.
///
/// A query head is `head_dim` rows of q and as many columns of o, a key/value head `head_dim` rows of k and
/// of v: the same weights. Each token also reads the head's keys and values of the whole context, which are
/// as much again once the context (of all sequences in a step together) is as long as the model is wide, a
/// few thousand tokens. (An encoder keeps no cache, but each of its heads is a group, so nothing is decided
/// by it.)
const KV_HEAD_COST: usize = 2;

/// The most query heads a rank may have: 1.15 times the mean, or as many as the evenest shares need.
const LARGEST_SHARE_PERCENT: usize = 115;

/// `q_heads` query heads, in groups that read one of `kv_heads` key/value heads each, over `world` ranks.
///
/// Among all ways to give each rank a range of at most `max(ceil(h/n), floor(1.15 h/n))` query heads (`h`
/// heads, `n` ranks), in this order:
/// 1. the largest `q + 2 kv` of a rank with `q` query and `kv` key/value heads is smallest, as the slowest
///    rank sets the pace: a key/value head is as many weights as a query head, and as much again in the KV
///    cache of a context of `hidden_size` tokens;
/// 2. the fewest key/value heads are on more than one rank: a cut that isn't between two groups puts one
///    there;
/// 3. the shares are most alike: the sum of their squares is smallest;
/// 4. larger shares come first.
///
/// The first is found by trying: a limit can be kept if ranges that are as long as it allows reach the last
/// head. The rest is dynamic programming from the last rank to the first, over where a rank may start, in
/// less than `q_heads * q_heads` steps.
///
/// ```
/// use tensorwire_topology::shard::heads;
///
/// // Llama 3.1 8B: [11, 11, 10] would cost up to 11 + 2 * 4 = 19, as rank 1 reads parts of 4 groups. Cuts
/// // between groups cost 12 + 2 * 3 = 18, and no key/value head is there twice.
/// let shares = heads(32, 8, 3)?;
/// assert_eq!(shares.q.iter().map(|s| s.len()).collect::<Vec<_>>(), [12, 12, 8]);
/// assert_eq!(shares.duplicated_kv_heads(), 0);
/// # Ok::<(), tensorwire_topology::Error>(())
/// ```
///
/// Errors: [`Error::HeadGroups`] if `q_heads` is no multiple of `kv_heads`, [`Error::NoRanks`],
/// [`Error::TooManyRanks`], [`Error::TooLarge`] above [`MAX_HEADS`](crate::model::MAX_HEADS).
pub fn heads(q_heads: usize, kv_heads: usize, world: usize) -> Result<HeadShares> {
    if kv_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
        return Err(Error::HeadGroups { q_heads, kv_heads });
    }
    check_ranks("num_attention_heads", q_heads, world)?;
    let limit = crate::model::MAX_HEADS;
    if q_heads > limit {
        let what = "the number of query heads".to_owned();
        return Err(Error::TooLarge { what, size: q_heads as u128, limit: limit as u128 });
    }
    let q = best_cuts(q_heads, q_heads / kv_heads, world);
    let kv = q.iter().map(|&q| self::kv_heads(q_heads, kv_heads, q)).collect();
    Ok(HeadShares { q, kv })
}

/// How many query heads are always together: those that one scale or packed word of a weight stands for.
/// Groups of one key/value head are a multiple of it, or it of them.
fn unit(q: &Dimension, kv: &Dimension) -> usize {
    let group = q.size / kv.size.max(1);
    if group.is_multiple_of(q.granule) || q.granule.is_multiple_of(group) {
        return q.granule;
    }
    q.granule / gcd(q.granule, group) * group
}

/// What there is to share of query heads.
pub(super) fn units(q: &Dimension, kv: &Dimension) -> usize {
    q.size.div_ceil(unit(q, kv))
}

/// [`heads`] in units that the weights can be cut in; over ranks of these speeds, or of one if there are none.
pub(super) fn of(q: &Dimension, kv: &Dimension, world: usize, speeds: &[f64]) -> Result<HeadShares> {
    let shared = |q: usize, kv: usize| match speeds {
        [] => heads(q, kv, world),
        speeds => heads_by_speed(q, kv, speeds),
    };
    let unit = unit(q, kv);
    if unit == 1 && kv.granule == 1 {
        return shared(q.size, kv.size);
    }
    let (units, group) = (units(q, kv), (q.size / kv.size.max(1) / unit).max(1));
    // A partial unit at the end leaves a group incomplete: cuts are then plainly even.
    let groups = if units.is_multiple_of(group) { units / group } else { 1 };
    let scale = |s: &Span| Span::new(s.start * unit, (s.end * unit).min(q.size));
    let shares: Vec<Span> = shared(units, groups)?.q.iter().map(scale).collect();
    // A rank holds whole granules of key/value heads, perhaps more than it needs.
    let widen = |s: Span| {
        let end = s.end.next_multiple_of(kv.granule).min(kv.size);
        Span::new(s.start / kv.granule * kv.granule, end)
    };
    let kv = shares.iter().map(|&s| widen(kv_heads(q.size, kv.size, s))).collect();
    Ok(HeadShares { q: shares, kv })
}

/// For each head, where the longest range that starts there ends, such that it has at most `share` heads and
/// costs at most `limit`; `group` divides `heads`.
fn reaches(heads: usize, group: usize, share: usize, limit: usize) -> Vec<usize> {
    let cost = |start: usize, end: usize| {
        let kv = (end - 1) / group - start / group + 1;
        end - start + KV_HEAD_COST * kv
    };
    // A range doesn't get dearer when it loses its first head, so the next one ends no earlier.
    let mut end = 0;
    (0..heads)
        .map(|start| {
            end = end.max(start);
            while end < heads && end - start < share && cost(start, end + 1) <= limit {
                end += 1;
            }
            end
        })
        .collect()
}

/// [`reaches`] for the lowest limit at which `world` ranges reach from the first head to the last.
fn lowest_reaches(heads: usize, group: usize, world: usize) -> Vec<usize> {
    let mean_up = heads.div_ceil(world);
    let share = mean_up.max(heads * LARGEST_SHARE_PERCENT / (100 * world));
    let suffices =
        |reach: &[usize]| (0..world).fold(0, |at, _| reach.get(at).copied().unwrap_or(heads)) == heads;
    // Some rank has this many query heads, and they read at least this many key/value heads. Wherever a range
    // of as many lies it reads at most one more, so even shares keep the last of these limits.
    let lowest = mean_up + KV_HEAD_COST * mean_up.div_ceil(group);
    let limits = lowest..lowest + KV_HEAD_COST;
    let found = limits.map(|limit| reaches(heads, group, share, limit)).find(|reach| suffices(reach));
    found.unwrap_or_else(|| reaches(heads, group, share, lowest + KV_HEAD_COST))
}

/// What is minimised once the slowest rank is as fast as can be: cuts inside a group, then the sum of squared
/// shares. Of equal costs, the range that ends last.
type Choice = (u32, u64, Reverse<usize>);

/// The best partition of `heads` into `world` ranges; 0 < world <= heads, and `group` divides `heads`.
fn best_cuts(heads: usize, group: usize, world: usize) -> Vec<Span> {
    let reach = lowest_reaches(heads, group, world);
    // Where rank r may start, if those before it and those from it on have a head at least and keep the
    // limit.
    let mut last = vec![0; world + 1];
    for r in 0..world {
        last[r + 1] = reach[last[r]].min(heads - (world - r - 1));
    }
    let mut first = vec![heads; world + 1];
    for r in (0..world).rev() {
        first[r] = reach.partition_point(|&end| end < first[r + 1]).max(r);
    }

    // best[r][start - first[r]]: the best choice for rank r, and what ranks r.. then cost. Every start looked
    // at can be completed, so there is one.
    let mut best: Vec<Vec<Choice>> = vec![Vec::new(); world];
    best.push(vec![(0, 0, Reverse(heads))]);
    for r in (0..world).rev() {
        let choice = |start: usize, end: usize| -> Choice {
            let (cuts, squares, _) = best[r + 1][end - first[r + 1]];
            let share = (end - start) as u64;
            (cuts + u32::from(!end.is_multiple_of(group)), squares + share * share, Reverse(end))
        };
        let best_from = |start: usize| {
            let (lowest, highest) = (first[r + 1].max(start + 1), last[r + 1].min(reach[start]));
            (lowest + 1..=highest).map(|end| choice(start, end)).fold(choice(start, lowest), Choice::min)
        };
        best[r] = (first[r]..=last[r]).map(best_from).collect();
    }

    let mut start = 0;
    (0..world)
        .map(|r| {
            let (_, _, Reverse(end)) = best[r][start - first[r]];
            let span = Span::new(start, end);
            start = end;
            span
        })
        .collect()
}
