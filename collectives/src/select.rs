//! Which algorithm an all-reduce takes.

use std::fmt;
use std::str::FromStr;

use tensorwire_core::{DType, Error, ReduceOp, Tuning};
use tensorwire_topology::table::Table;
use tensorwire_transports::shm::{INLINE, Label, Options};

/// How an all-reduce of `S` bytes over `n` ranks moves its data. Over shared memory: [`Inline`](Algorithm::Inline),
/// [`OneShot`](Algorithm::OneShot), [`TwoShot`](Algorithm::TwoShot), [`Symmetric`](Algorithm::Symmetric). Over a network:
/// [`OneShot`](Algorithm::OneShot), [`TwoShot`](Algorithm::TwoShot) and the rest.
///
/// Every rank gets the same bits from any of them, and from those that reduce in rank order all get the same ones. The
/// others pass sums of some ranks on, rounded to the elements' type: see [`keeps_order`](Algorithm::keeps_order).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// The payload rides in the flag's own cache line, up to 48 bytes. One step; a rank writes one cache line
    /// and reads `n - 1`.
    Inline,
    /// Each rank publishes its whole buffer and reduces everybody's itself, pipelined in chunks. `chunks` steps; a
    /// rank writes `S`, reads `(n - 1) S` and reduces `S`.
    OneShot,
    /// Reduce-scatter, then all-gather, pipelined in chunks: while chunk `i` is published, chunk `i - 1` is
    /// reduced and chunk `i - 2` gathered. `chunks + 1` steps; a rank writes `S`, reads `2 (n - 1) / n S`,
    /// reduces `S / n`.
    TwoShot,
    /// Of symmetric buffers alone: each rank reduces its part of all ranks' buffers where they are, and writes it
    /// to all of them. Two steps; a rank reads `S`, writes `S`, reduces `S / n`.
    Symmetric,
    /// Pieces are reduced from rank to rank, from the first to the last, and their results go around. `2 n + p - 3` steps
    /// for `p` pieces; a rank sends at most `2 S` and reduces `S`.
    Chain,
    /// Reduce-scatter around a ring, then all-gather around it. `2 (n - 1)` steps; a rank sends `2 (n - 1) / n S` and
    /// reduces `S (n - 1) / n`.
    Ring,
    /// Pairs exchange their sums, then pairs of pairs, and so on. `log2 n` steps, 2 more unless `n` is a power of two; a
    /// rank sends and reduces `S` in each.
    RecursiveDoubling,
    /// Reduce-scatter by halves, then all-gather by doubling. `2 log2 n` steps, 2 more unless `n` is a power of two; a rank
    /// sends `2 (n - 1) / n S` and reduces `S (n - 1) / n`.
    HalvingDoubling,
    /// Reduce-scatter on each host, all-reduce of each part between hosts, all-gather on each host. 4 steps; with `l`
    /// ranks on each of `h` hosts, a rank sends `2 (l - 1) / l S` on its host and `2 (h - 1) / h S / l` to others.
    Hierarchical,
    /// Over MPI, its own collectives, for types and operations that it has; the others as without. What they cost, and in
    /// which order they reduce, is MPI's affair: nothing is promised about the order, nor that every rank has the same bits.
    /// Not one of [`ALL`](Algorithm::ALL).
    Mpi,
}

impl Algorithm {
    /// Every algorithm of this library's own.
    pub const ALL: [Algorithm; 9] = [
        Algorithm::Inline,
        Algorithm::OneShot,
        Algorithm::TwoShot,
        Algorithm::Symmetric,
        Algorithm::Chain,
        Algorithm::Ring,
        Algorithm::RecursiveDoubling,
        Algorithm::HalvingDoubling,
        Algorithm::Hierarchical,
    ];

    /// The name used on the command line and in reports, such as `one_shot` or `halving_doubling`.
    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::Inline => "inline",
            Algorithm::OneShot => "one_shot",
            Algorithm::TwoShot => "two_shot",
            Algorithm::Symmetric => "symmetric",
            Algorithm::Chain => "chain",
            Algorithm::Ring => "ring",
            Algorithm::RecursiveDoubling => "recursive_doubling",
            Algorithm::HalvingDoubling => "halving_doubling",
            Algorithm::Hierarchical => "hierarchical",
            Algorithm::Mpi => "mpi",
        }
    }

    /// Whether it is one for shared memory.
    pub const fn is_shm(self) -> bool {
        use Algorithm::{Inline, OneShot, Symmetric, TwoShot};
        matches!(self, Inline | OneShot | TwoShot | Symmetric)
    }

    /// Whether its result has the bits of the reduction in rank order, as [`ReduceOp`] defines it.
    ///
    /// The direct exchanges' always has: [`OneShot`](Algorithm::OneShot) and [`TwoShot`](Algorithm::TwoShot), and what
    /// shared memory has. So has any algorithm's where order and grouping make no difference: for integers, and for
    /// minimum and maximum. The [`Chain`](Algorithm::Chain) keeps the order too, and so the bits for f32 and f64; sums of
    /// narrower types are rounded at each rank. The others' differs from it as sums in another order do: an element is
    /// rounded up to `n + 1` times, by half a unit in the last place of the type each.
    pub fn keeps_order(self, dtype: DType, op: ReduceOp) -> bool {
        // Which of several NaNs comes out is not for us to say over MPI.
        let extreme = matches!(op, ReduceOp::Min | ReduceOp::Max) && self != Algorithm::Mpi;
        let associative = dtype.is_integer() || extreme;
        let wide = matches!(dtype, DType::F32 | DType::F64);
        self.is_shm() || associative || (self == Algorithm::Chain && wide)
    }

    /// Its name for the flight record.
    #[inline]
    pub(crate) const fn label(self) -> Label {
        match self {
            Algorithm::Inline => const { Label::new(Algorithm::Inline.name()) },
            Algorithm::OneShot => const { Label::new(Algorithm::OneShot.name()) },
            Algorithm::TwoShot => const { Label::new(Algorithm::TwoShot.name()) },
            Algorithm::Symmetric => const { Label::new(Algorithm::Symmetric.name()) },
            // Those of a network have no record in shared memory.
            _ => const { Label::new("network") },
        }
    }

    /// The most bytes it can carry.
    pub(crate) fn limit(self) -> usize {
        match self {
            Algorithm::Inline => INLINE,
            _ => usize::MAX,
        }
    }
}

/// The choices of one group: the same on every rank, as the tuning and the slots are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Selection {
    one_shot: usize,
    symmetric_one_shot: usize,
}

impl Selection {
    /// The choices by a tuning.
    pub(crate) fn new(tuning: &Tuning) -> Selection {
        Selection { one_shot: tuning.one_shot, symmetric_one_shot: tuning.symmetric_one_shot }
    }

    /// The algorithm for an all-reduce of `bytes` of ordinary memory.
    #[inline]
    pub(crate) fn all_reduce(&self, bytes: usize) -> Algorithm {
        Selection::pick(bytes, self.one_shot, Algorithm::TwoShot)
    }

    /// The algorithm for an all-reduce of `bytes` in a symmetric buffer.
    #[inline]
    pub(crate) fn symmetric(&self, bytes: usize) -> Algorithm {
        Selection::pick(bytes, self.symmetric_one_shot, Algorithm::Symmetric)
    }

    #[inline]
    fn pick(bytes: usize, one_shot: usize, larger: Algorithm) -> Algorithm {
        if bytes <= INLINE {
            Algorithm::Inline
        } else if bytes <= one_shot {
            Algorithm::OneShot
        } else {
            larger
        }
    }
}

/// Options for a group that this rank forms: rank 0 fills in what was measured on the machine, unless it was
/// given something else. The others get that from rank 0.
pub(crate) fn tuned(options: &Options, rank: usize) -> Options {
    let mut options = options.clone();
    if rank == 0 && options.tuning.is_empty() {
        options.tuning = Table::tunings_in_force();
    }
    options
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = Error;

    fn from_str(s: &str) -> Result<Algorithm, Error> {
        Algorithm::ALL.into_iter().chain([Algorithm::Mpi]).find(|a| a.name() == s).ok_or_else(|| {
            let names = Algorithm::ALL.map(Algorithm::name).join(", ");
            Error::invalid(format!("unknown algorithm '{s}': use one of {names}, mpi"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    proptest! {
        /// Whatever a table says: the choice carries the bytes, and more bytes never mean fewer steps.
        #[test]
        fn the_choice_fits_and_is_monotone(
            one_shot in any::<usize>(),
            symmetric_one_shot in 0usize..4 << 20,
            bytes in proptest::collection::vec(0usize..8 << 20, 2..20),
        ) {
            let tuning = Tuning { one_shot, symmetric_one_shot, ..Tuning::built_in(2) };
            let selection = Selection::new(&tuning);
            let mut bytes = bytes;
            bytes.extend([0, 48, 49, usize::MAX]);
            bytes.sort_unstable();
            let order = |a: Algorithm| Algorithm::ALL.iter().position(|b| *b == a);
            for choose in [Selection::all_reduce, Selection::symmetric] {
                for pair in bytes.windows(2) {
                    let (a, b) = (choose(&selection, pair[0]), choose(&selection, pair[1]));
                    prop_assert!(pair[0] <= a.limit() && pair[1] <= b.limit());
                    prop_assert!(order(a) <= order(b));
                }
            }
            prop_assert!(bytes.iter().all(|b| selection.all_reduce(*b) != Algorithm::Symmetric));
            prop_assert!(bytes.iter().all(|b| selection.symmetric(*b) != Algorithm::TwoShot));
        }
    }

    #[test]
    fn without_a_table_more_than_two_ranks_read_128_kib_at_most_in_one_shot() {
        for (world, most) in [(2, 4 << 20), (5, 32 << 10)] {
            let selection = Selection::new(&Tuning::built_in(world));
            assert_eq!(selection.all_reduce(most), Algorithm::OneShot);
            assert_eq!(selection.all_reduce(most + 1), Algorithm::TwoShot);
            assert_eq!(selection.symmetric(1 << 10), Algorithm::OneShot);
            assert_eq!(selection.symmetric(most + 1), Algorithm::Symmetric);
        }
    }

    #[test]
    fn names_round_trip() {
        for a in Algorithm::ALL.into_iter().chain([Algorithm::Mpi]) {
            assert_eq!(a.name().parse::<Algorithm>().unwrap(), a);
        }
        assert!("rings".parse::<Algorithm>().unwrap_err().to_string().contains("one_shot"));
    }
}
