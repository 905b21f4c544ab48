//! Shares of ranks that aren't alike: by speed, and within each one's memory.

use super::heads::{HeadShares, kv_heads};
use super::{Options, Shares, check_ranks};
use crate::model::ModelSpec;
use crate::plan::Span;
use crate::{Error, Result};

/// `size` things over ranks of these speeds: at least one each, and the largest share over speed as small as can
/// be. A rank's share is its part of all speeds rounded down; what is left goes one by one to whom it costs least.
pub(super) fn by_speed(what: &'static str, size: usize, speeds: &[f64]) -> Result<Vec<Span>> {
    check_ranks(what, size, speeds.len())?;
    let all: f64 = speeds.iter().sum();
    let mut shares: Vec<usize> =
        speeds.iter().map(|w| ((size as f64 * w / all) as usize).clamp(1, size)).collect();
    let cost = |share: usize, rank: usize| share as f64 / speeds[rank];
    let ranks = || 0..speeds.len();
    // Each loop runs at most once or twice a rank: rounding is all that is corrected.
    while shares.iter().sum::<usize>() > size {
        let most = ranks()
            .filter(|&r| shares[r] > 1)
            .max_by(|&a, &b| cost(shares[a], a).total_cmp(&cost(shares[b], b)));
        shares[most.unwrap_or(0)] -= 1;
    }
    while shares.iter().sum::<usize>() < size {
        let next = ranks().min_by(|&a, &b| cost(shares[a] + 1, a).total_cmp(&cost(shares[b] + 1, b)));
        shares[next.unwrap_or(0)] += 1;
    }
    let mut start = 0;
    Ok(shares
        .into_iter()
        .map(|share| {
            start += share;
            Span::new(start - share, start)
        })
        .collect())
}

/// Query heads over ranks of these speeds, such that the largest `q + 2 kv` over speed is least: see
/// [`heads`](super::heads). Ranks in order take as much as that allows.
pub(super) fn heads_by_speed(q_heads: usize, kv: usize, speeds: &[f64]) -> Result<HeadShares> {
    if kv == 0 || !q_heads.is_multiple_of(kv) {
        return Err(Error::HeadGroups { q_heads, kv_heads: kv });
    }
    check_ranks("num_attention_heads", q_heads, speeds.len())?;
    let group = q_heads / kv;
    let cost = |start: usize, end: usize| (end - start + 2 * ((end - 1) / group - start / group + 1)) as f64;
    let cut = |limit: f64| -> Option<Vec<Span>> {
        let mut start = 0;
        let mut spans = Vec::with_capacity(speeds.len());
        for (rank, speed) in speeds.iter().enumerate() {
            let most = q_heads - (speeds.len() - 1 - rank);
            let mut end = start + 1;
            while end < most && cost(start, end + 1) <= limit * speed {
                end += 1;
            }
            if cost(start, end) > limit * speed {
                return None;
            }
            spans.push(Span::new(start, end));
            start = end;
        }
        (start == q_heads).then_some(spans)
    };
    // Every limit that can matter is a rank's cost over its speed.
    let mut limits: Vec<f64> =
        (3..=q_heads + 2 * kv).flat_map(|cost| speeds.iter().map(move |speed| cost as f64 / speed)).collect();
    limits.sort_by(f64::total_cmp);
    let at = limits.partition_point(|&limit| cut(limit).is_none());
    let q = limits.get(at).and_then(|&limit| cut(limit)).unwrap_or_default();
    let kv = q.iter().map(|&span| kv_heads(q_heads, kv, span)).collect();
    Ok(HeadShares { q, kv })
}

/// Refuses speeds and limits that aren't one a rank.
pub(super) fn check(options: &Options, world: usize) -> Result<()> {
    let one_a_rank = |what: &str, n: usize| match n {
        0 => Ok(()),
        n if n == world => Ok(()),
        n => Err(Error::RankOptions(format!("{n} {what} were given for {world} ranks: give one for each"))),
    };
    one_a_rank("speeds", options.speeds.len())?;
    one_a_rank("memory limits", options.memory.len())?;
    // Beyond this ratio the slower rank's share is nothing.
    match options.speeds.iter().find(|s| !(1e-6..=1e6).contains(*s)) {
        Some(speed) => Err(Error::RankOptions(format!("a speed must be from 1e-6 to 1e6, not {speed}"))),
        None => Ok(()),
    }
}

/// Shares by speed that leave each rank's weights within its memory: ranks that would hold too much get less, and
/// the others what they can't hold.
pub(super) fn within_memory(
    spec: &ModelSpec,
    options: &Options,
    world: usize,
    shares_by: impl Fn(&[f64]) -> Result<Shares>,
) -> Result<Shares> {
    const ROUNDS: usize = 64;
    let mut speeds = if options.speeds.is_empty() { vec![1.0; world] } else { options.speeds.clone() };
    let mut worst = (0, 0);
    for _ in 0..ROUNDS {
        let shares = shares_by(&speeds)?;
        let held: Vec<u64> = (0..world).map(|rank| weight_bytes(spec, &shares, rank)).collect();
        let excess = |rank: usize| held[rank].saturating_sub(options.memory[rank]);
        if (0..world).all(|rank| excess(rank) == 0) {
            return Ok(shares);
        }
        worst =
            (0..world).map(|rank| (excess(rank), rank)).max().map_or((0, 0), |(_, rank)| (rank, held[rank]));
        for rank in (0..world).filter(|&rank| excess(rank) > 0) {
            // A little less than in proportion, as shares are whole heads and groups.
            let fits = options.memory[rank] as f64 / held[rank] as f64;
            speeds[rank] = (speeds[rank] * fits * 0.98).max(1e-9);
        }
    }
    let (rank, needed) = worst;
    Err(Error::Memory { rank, needed, limit: options.memory[rank] })
}

fn weight_bytes(spec: &ModelSpec, shares: &Shares, rank: usize) -> u64 {
    spec.tensors.iter().map(|t| shares.held(t, rank) * t.stored.size()).sum()
}
