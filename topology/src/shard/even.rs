//! Axes whose elements are all alike: feed-forward columns and vocabulary rows.

use super::check_ranks;
use super::weighted::by_speed;
use crate::Result;
use crate::model::{Dimension, gcd};
use crate::plan::Span;

/// The share of the mean, in percent, that the largest vocabulary share may be for the sake of even padding.
const LARGEST_VOCAB_SHARE_PERCENT: u128 = 103;

/// `size` things over `world` ranks: shares of `ceil(size/world)`, then of `floor(size/world)`.
///
/// `what` names the things in errors: the field of config.json that counts them.
///
/// ```
/// use tensorwire_topology::shard::even;
///
/// let shares: Vec<usize> = even("groups", 231, 4)?.iter().map(|s| s.len()).collect();
/// assert_eq!(shares, [58, 58, 58, 57]);
/// # Ok::<(), tensorwire_topology::Error>(())
/// ```
pub fn even(what: &'static str, size: usize, world: usize) -> Result<Vec<Span>> {
    check_ranks(what, size, world)?;
    let (share, larger) = (size / world, size % world);
    let start = |rank: usize| rank * share + rank.min(larger);
    Ok((0..world).map(|rank| Span::new(start(rank), start(rank + 1))).collect())
}

/// The indices of a dimension in whole granules, of which the last may be partial.
pub(super) fn in_granules(d: &Dimension, world: usize, speeds: &[f64]) -> Result<Vec<Span>> {
    let units = match speeds {
        [] => even(d.field, d.units(), world)?,
        speeds => by_speed(d.field, d.units(), speeds)?,
    };
    let scale = |s: Span| Span::new(s.start * d.granule, (s.end * d.granule).min(d.size));
    Ok(units.into_iter().map(scale).collect())
}

/// How a vocabulary is shared.
#[derive(Clone, Debug, PartialEq)]
pub struct VocabShares {
    /// The real rows of each rank; a partition.
    pub ranges: Vec<Span>,
    /// Rows after padding; the real number where none is padded.
    pub padded: usize,
}

/// The `size` rows of a vocabulary over `world` ranks.
///
/// Padded to the next multiple of `lcm(64, world)`, so that every rank computes the same number of logits
/// and that number is a multiple of 64 wherever `world` is a power of two up to 64. The ranges hold the real
/// rows alone, so the last may be shorter. Where padding would make the largest share more than 1.03 times
/// the mean or leave a rank empty, as in small vocabularies, rows are shared by [`even`] without padding. One
/// rank alone holds them all, unpadded.
///
/// ```
/// use tensorwire_topology::shard::vocab;
///
/// let bert = vocab(30522, 2)?; // 477 * 64 = 30528 = 2 * 15264
/// assert_eq!((bert.padded, bert.ranges[1].start, bert.ranges[1].end), (30528, 15264, 30522));
/// # Ok::<(), tensorwire_topology::Error>(())
/// ```
pub fn vocab(size: usize, world: usize) -> Result<VocabShares> {
    check_ranks("vocab_size", size, world)?;
    let unpadded = VocabShares { ranges: even("vocab_size", size, world)?, padded: size };
    // world is at most size, but 64 * world may still be beyond the machine's word.
    let Some(padded) = lcm(64, world).and_then(|step| size.checked_next_multiple_of(step)) else {
        return Ok(unpadded);
    };
    let share = padded / world;
    let largest_fits = share as u128 * world as u128 * 100 <= size as u128 * LARGEST_VOCAB_SHARE_PERCENT;
    let none_empty = share * (world - 1) < size;
    if world == 1 || !largest_fits || !none_empty {
        return Ok(unpadded);
    }
    let ranges = (0..world).map(|r| Span::new(r * share, ((r + 1) * share).min(size))).collect();
    Ok(VocabShares { ranges, padded })
}

fn lcm(a: usize, b: usize) -> Option<usize> {
    (a / gcd(a, b)).checked_mul(b)
}
