//! What each rank of a tensor-parallel group gets of a [`Split`].

use std::collections::HashMap;

use super::workload::Split;
use crate::plan::Span;
use crate::shard;

/// A rank's part of what is cut, as exact fractions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Of what follows query heads, columns, rows or experts.
    pub cut: Fraction,
    /// Of what follows key and value heads.
    pub kv: Fraction,
}

/// `of` parts out of `all`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fraction {
    of: u64,
    all: u64,
}

impl Fraction {
    /// Everything.
    pub const ALL: Fraction = Fraction { of: 1, all: 1 };

    fn new(of: usize, all: usize) -> Fraction {
        Fraction { of: of as u64, all: all.max(1) as u64 }
    }

    /// The part of so many bytes, rounded up.
    pub fn bytes(self, of: u64) -> u64 {
        (u128::from(of) * u128::from(self.of)).div_ceil(u128::from(self.all)) as u64
    }

    /// As a number.
    pub fn value(self) -> f64 {
        self.of as f64 / self.all as f64
    }
}

/// Shares that were computed before.
pub type Memo = HashMap<(Split, usize), Option<Vec<Share>>>;

/// Each rank's share, all ranks alike; nothing if some rank would get nothing.
pub fn even(split: Split, ranks: usize, memo: &mut Memo) -> Option<Vec<Share>> {
    memo.entry((split, ranks)).or_insert_with(|| weighted(split, &vec![1.0; ranks])).clone()
}

/// Each rank's share, as large as its weight, so that the largest share over weight is least; nothing if some rank
/// would get nothing.
pub fn weighted(split: Split, weights: &[f64]) -> Option<Vec<Share>> {
    let ranks = weights.len();
    let alike = weights.windows(2).all(|w| w[0] == w[1]);
    let of = |sizes: Vec<usize>, all: usize| -> Option<Vec<Share>> {
        let share = |of: &usize| Share { cut: Fraction::new(*of, all), kv: Fraction::ALL };
        sizes.iter().all(|s| *s > 0).then(|| sizes.iter().map(share).collect())
    };
    match split {
        Split::Shared { units } if units >= ranks => of(apportion(units, weights), units),
        Split::Shared { .. } | Split::Whole => {
            Some(vec![Share { cut: Fraction::ALL, kv: Fraction::ALL }; ranks])
        }
        Split::Heads { q, kv } => {
            let spans = if alike { shard::heads(q, kv, ranks).ok()?.q } else { heads(q, kv, weights)? };
            let share = |s: &Span| Share {
                cut: Fraction::new(s.len(), q),
                kv: Fraction::new(shard::kv_heads(q, kv, *s).len(), kv),
            };
            Some(spans.iter().map(share).collect())
        }
        Split::Columns { units } | Split::Experts { units, .. } => of(apportion(units, weights), units),
        Split::Rows { rows } if alike => {
            // The share that a rank computes, padding and all.
            let padded = shard::vocab(rows, ranks).ok()?.padded;
            of(apportion(padded, weights), rows)
        }
        Split::Rows { rows } | Split::Height { rows } => of(apportion(rows, weights), rows),
    }
}

/// Each rank's part of experts that are spread over groups of `each` ranks, which share the `units` columns of every one:
/// whole experts where a group is a rank.
pub fn experts(count: usize, units: usize, weights: &[f64], each: usize) -> Option<Vec<Share>> {
    let groups: Vec<f64> = weights.chunks(each).map(|group| group.iter().sum()).collect();
    let mut shares = Vec::with_capacity(weights.len());
    for (experts, weights) in apportion(count, &groups).into_iter().zip(weights.chunks(each)) {
        let (columns, all) = if each == 1 { (vec![1], 1) } else { (apportion(units, weights), units) };
        if experts == 0 || columns.contains(&0) {
            return None;
        }
        let share = |of: usize| Share { cut: Fraction::new(experts * of, count * all), kv: Fraction::ALL };
        shares.extend(columns.into_iter().map(share));
    }
    Some(shares)
}

/// Query heads by weight: in whole groups of one key/value head where there are enough of them.
fn heads(q: usize, kv: usize, weights: &[f64]) -> Option<Vec<Span>> {
    if kv == 0 || !q.is_multiple_of(kv) {
        return None;
    }
    let group = if kv >= weights.len() { q / kv } else { 1 };
    let mut start = 0;
    let span = |units: usize| {
        let from = start;
        start += units * group;
        Span::new(from, start)
    };
    let spans: Vec<Span> = apportion(q / group, weights).into_iter().map(span).collect();
    spans.iter().all(|s| !s.is_empty()).then_some(spans)
}

/// `units` things by weight, such that the largest number over its weight is least.
///
/// Whatever a limit allows each weight is at least its whole part of the mean, so those come first; what is left goes
/// one by one to whoever is least over its weight with one more.
pub fn apportion(units: usize, weights: &[f64]) -> Vec<usize> {
    let total: f64 = weights.iter().sum();
    let mut shares: Vec<usize> = weights.iter().map(|w| (units as f64 * w / total) as usize).collect();
    let mut left = units.saturating_sub(shares.iter().sum());
    while left > 0 {
        let over = |r: usize| (shares[r] + 1) as f64 / weights[r];
        let next = (0..shares.len()).min_by(|a, b| over(*a).total_cmp(&over(*b))).unwrap_or(0);
        shares[next] += 1;
        left -= 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_weights() {
        // 10 over weights 3 and 1: 7.5 and 2.5; one more costs 8/3 = 2.67 on the first, 3/1 on the second.
        assert_eq!(apportion(10, &[3.0, 1.0]), [8, 2]);
        assert_eq!(apportion(231, &[1.0; 4]), [58, 58, 58, 57]);
        assert_eq!(apportion(1, &[1.0, 1.0]), [1, 0]);
    }

    #[test]
    fn experts_over_groups_and_their_columns_within() {
        let values = |shares: Vec<Share>| shares.iter().map(|s| s.cut.value()).collect::<Vec<_>>();
        // Five experts over two groups of two, three columns in each: 3/5 and 2/5, times 2/3 and 1/3.
        let shares = values(experts(5, 3, &[1.0; 4], 2).unwrap());
        assert_eq!(shares, [6.0 / 15.0, 3.0 / 15.0, 4.0 / 15.0, 2.0 / 15.0]);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        // A group of two fast devices takes twice as many experts.
        let unlike = values(experts(6, 8, &[2.0, 2.0, 1.0, 1.0], 2).unwrap());
        assert_eq!(unlike, [1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0, 1.0 / 6.0]);
        assert_eq!(values(experts(6, 8, &[1.0; 3], 1).unwrap()), [1.0 / 3.0; 3]);
        assert_eq!(experts(1, 8, &[1.0; 4], 2), None);
        assert_eq!(experts(4, 1, &[1.0; 4], 2), None);
    }

    #[test]
    fn heads_by_weight_keep_groups_whole() {
        // 32 query heads in 8 groups of 4, the second device three times as fast: 2 and 6 groups.
        let spans = heads(32, 8, &[1.0, 3.0]).unwrap();
        assert_eq!(spans, [Span::new(0, 8), Span::new(8, 32)]);
    }

    #[test]
    fn whoever_would_get_nothing_has_no_share() {
        assert_eq!(weighted(Split::Columns { units: 2 }, &[1.0; 3]), None);
        assert_eq!(weighted(Split::Heads { q: 8, kv: 3 }, &[1.0; 2]), None);
    }
}
