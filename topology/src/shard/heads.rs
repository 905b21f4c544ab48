//! Attention heads: uneven shares, and the key/value heads that follow from them.

use super::check_ranks;
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

/// `q_heads` query heads, in groups that read one of `kv_heads` key/value heads each, over `world` ranks.
///
/// Among all ways to give each rank a range, in this order:
/// 1. the largest share is smallest: `ceil(q_heads / world)`, as the slowest rank sets the pace;
/// 2. the fewest key/value heads are on more than one rank: a cut that isn't between two groups puts one
///    there;
/// 3. the shares are most alike: the sum of their squares is smallest;
/// 4. larger shares come first.
///
/// Found by dynamic programming from the last rank to the first, over how many ranks are left and where they
/// start: at most `q_heads * world` steps, as only starts that the ranks before and after can reach are
/// looked at.
///
/// ```
/// use tensorwire_topology::shard::heads;
///
/// // Fourteen query heads in two groups of seven: the middle cut can be between the groups for nothing.
/// let shares = heads(14, 2, 4)?;
/// assert_eq!(shares.q.iter().map(|s| s.len()).collect::<Vec<_>>(), [4, 3, 4, 3]);
/// assert_eq!(shares.duplicated_kv_heads(), 2);
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

/// What is minimised: cuts inside a group, then the sum of squared shares.
type Cost = (u32, u64);

/// The best partition of `heads` into `world` ranges; 0 < world <= heads, and `group` divides `heads`.
fn best_cuts(heads: usize, group: usize, world: usize) -> Vec<Span> {
    let largest = heads.div_ceil(world);
    // Where rank r may start: the ranks before it have 1 to `largest` heads each, and so do those from it on.
    let first = |r: usize| r.max(heads.saturating_sub(largest * (world - r)));
    let last = |r: usize| (largest * r).min(heads - (world - r));
    // Of a range [start, end): its share, and its right cut if that is inside a group.
    let cost = |start: usize, end: usize| -> Cost {
        let share = (end - start) as u64;
        (u32::from(!end.is_multiple_of(group)), share * share)
    };

    // best[r][start - first(r)]: the least cost of ranks r.. covering [start, heads).
    let mut best: Vec<Vec<Cost>> = vec![Vec::new(); world];
    let rest = |best: &[Vec<Cost>], r: usize, start: usize| -> Option<Cost> {
        if r == world {
            return (start == heads).then_some((0, 0));
        }
        best[r].get(start.checked_sub(first(r))?).copied()
    };
    let choices = |best: &[Vec<Cost>], r: usize, start: usize| -> Option<(Cost, usize)> {
        (start + 1..=(start + largest).min(heads))
            .filter_map(|end| {
                let (a, b) = (cost(start, end), rest(best, r + 1, end)?);
                Some(((a.0 + b.0, a.1 + b.1), end))
            })
            // Of equal costs the one that ends last: larger shares first.
            .min_by_key(|&(cost, end)| (cost, std::cmp::Reverse(end)))
    };
    for r in (0..world).rev() {
        best[r] = (first(r)..=last(r))
            .map(|start| choices(&best, r, start).map_or((u32::MAX, u64::MAX), |(cost, _)| cost))
            .collect();
    }

    let mut start = 0;
    (0..world)
        .map(|r| {
            // Every start looked at can be completed, so there is a choice.
            let end = choices(&best, r, start).map_or(heads, |(_, end)| end);
            let span = Span::new(start, end);
            start = end;
            span
        })
        .collect()
}
