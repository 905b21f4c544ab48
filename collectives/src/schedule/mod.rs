//! Who handles which part of a buffer, when. Pure arithmetic on element counts.

#[cfg(feature = "tcp")]
pub(crate) mod around;
#[cfg(feature = "tcp")]
pub(crate) mod cost;
#[cfg(feature = "tcp")]
pub(crate) mod direct;
#[cfg(feature = "tcp")]
mod doubling;
#[cfg(feature = "tcp")]
pub(crate) mod hierarchy;
#[cfg(feature = "tcp")]
mod ring;
#[cfg(feature = "tcp")]
pub(crate) mod steps;
#[cfg(feature = "tcp")]
pub(crate) mod timed;
#[cfg(feature = "tcp")]
pub(crate) mod tree;

#[cfg(all(test, feature = "tcp"))]
mod properties;

use std::ops::Range;

#[cfg(feature = "tcp")]
use crate::select::Algorithm;

/// Bytes of a cache line: parts of different ranks don't share one.
const LINE: usize = 64;

/// Bytes that are sent, or reduced, while the next are on their way. From each peer two pieces may be held.
#[cfg(feature = "tcp")]
pub(crate) const PIECE: usize = 128 << 10;

/// [`PIECE`] for a direct exchange between `world` ranks: larger where they are few, up to what a connection's send buffer
/// takes, for the fewer times two ranks of a host wait for each other's system calls, the less they wait.
#[cfg(feature = "tcp")]
pub(crate) fn direct_piece(world: usize) -> usize {
    ((1 << 20) / world.next_power_of_two()).clamp(PIECE, 512 << 10)
}

/// The steps of an all-reduce of `len` elements of `size` bytes between ranks on these hosts, in pieces of at most
/// `piece` bytes. But for the direct exchanges, it works in place, on the output.
#[cfg(feature = "tcp")]
pub(crate) fn all_reduce(
    steps: &mut steps::Steps,
    rank: usize,
    hosts: &hierarchy::Hosts,
    algorithm: Algorithm,
    len: usize,
    size: usize,
    piece: usize,
) {
    let me = steps::Rank { rank, world: hosts.world() };
    match algorithm {
        // A small message travels in one segment with its header whatever it is called.
        Algorithm::Inline | Algorithm::OneShot => direct::one_shot(steps, me, len, size, piece, None),
        // Where MPI has no collective of its own, it is chosen anew.
        Algorithm::TwoShot | Algorithm::Symmetric | Algorithm::Mpi => {
            direct::two_shot(steps, me, len, size, piece, None)
        }
        Algorithm::Chain => ring::chain(steps, me, len, size, piece),
        Algorithm::Ring => ring::ring(steps, me, len, size, piece),
        Algorithm::RecursiveDoubling => doubling::recursive_doubling(steps, me, len, size),
        Algorithm::HalvingDoubling => doubling::halving_doubling(steps, me, len, size),
        Algorithm::Hierarchical => hierarchy::all_reduce(steps, me, hosts, len, size, piece),
    }
}

/// The part of `len` elements of `size` bytes that `rank` of `world` handles: equal parts up to a cache line,
/// the first ones larger, the last ones possibly empty.
#[inline]
pub(crate) fn part(len: usize, size: usize, world: usize, rank: usize) -> Range<usize> {
    let unit = LINE / size;
    let units = len.div_ceil(unit);
    let (each, more) = (units / world, units % world);
    let start = (rank * each + rank.min(more)) * unit;
    let end = start + (each + usize::from(rank < more)) * unit;
    start.min(len)..end.min(len)
}

/// `len` elements in pieces of at most `piece`, numbered from 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pieces {
    len: usize,
    piece: usize,
}

impl Pieces {
    /// Pieces of at most `bytes` bytes, at least one element each, for elements of `size` bytes.
    #[inline]
    pub(crate) fn new(len: usize, size: usize, bytes: usize) -> Pieces {
        Pieces { len, piece: (bytes / size).max(1) }
    }

    /// How many pieces there are.
    #[inline]
    pub(crate) fn count(&self) -> usize {
        self.len.div_ceil(self.piece)
    }

    /// The elements of piece `i`; empty for a piece beyond the last.
    #[inline]
    pub(crate) fn range(&self, i: usize) -> Range<usize> {
        let start = (i * self.piece).min(self.len);
        start..(start + self.piece).min(self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_partition_and_balance(len in 0usize..100_000, world in 1usize..70, two in any::<bool>()) {
            let size = if two { 2 } else { 4 };
            let mut next = 0;
            for rank in 0..world {
                let p = part(len, size, world, rank);
                prop_assert_eq!(p.start, next);
                prop_assert!(p.len() <= len.div_ceil(world).next_multiple_of(LINE / size) + LINE / size);
                prop_assert!(p.is_empty() || (p.start * size).is_multiple_of(LINE));
                next = p.end;
            }
            prop_assert_eq!(next, len);
        }

        #[test]
        fn pieces_partition(len in 0usize..100_000, bytes in 0usize..5000) {
            let pieces = Pieces::new(len, 4, bytes);
            let mut next = 0;
            for i in 0..pieces.count() {
                let r = pieces.range(i);
                prop_assert_eq!(r.start, next);
                prop_assert!(!r.is_empty() && r.len() * 4 <= bytes.max(4));
                next = r.end;
            }
            prop_assert_eq!(next, len);
            prop_assert!(pieces.range(pieces.count()).is_empty());
        }
    }
}
