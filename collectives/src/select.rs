//! Which algorithm an all-reduce takes.

use std::fmt;
use std::str::FromStr;

use tensorwire_core::{Error, Tuning};
use tensorwire_topology::table::Table;
use tensorwire_transports::shm::{INLINE, Label, Options};

/// How an all-reduce of `S` bytes over `n` ranks moves its data through shared memory. All of them give the
/// same bits.
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
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Algorithm; 4] =
        [Algorithm::Inline, Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Symmetric];

    /// The name used on the command line and in reports: `inline`, `one_shot`, `two_shot`,
    /// `symmetric`.
    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::Inline => "inline",
            Algorithm::OneShot => "one_shot",
            Algorithm::TwoShot => "two_shot",
            Algorithm::Symmetric => "symmetric",
        }
    }

    /// Its name for the flight record.
    #[inline]
    pub(crate) const fn label(self) -> Label {
        match self {
            Algorithm::Inline => const { Label::new(Algorithm::Inline.name()) },
            Algorithm::OneShot => const { Label::new(Algorithm::OneShot.name()) },
            Algorithm::TwoShot => const { Label::new(Algorithm::TwoShot.name()) },
            Algorithm::Symmetric => const { Label::new(Algorithm::Symmetric.name()) },
        }
    }

    /// The most bytes it can carry.
    pub(crate) fn limit(self) -> usize {
        match self {
            Algorithm::Inline => INLINE,
            Algorithm::OneShot | Algorithm::TwoShot | Algorithm::Symmetric => usize::MAX,
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
        Algorithm::ALL.into_iter().find(|a| a.name() == s).ok_or_else(|| {
            Error::invalid(format!(
                "unknown algorithm '{s}': use one of inline, one_shot, two_shot, symmetric"
            ))
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
        for a in Algorithm::ALL {
            assert_eq!(a.name().parse::<Algorithm>().unwrap(), a);
        }
        assert!("ring".parse::<Algorithm>().unwrap_err().to_string().contains("one_shot"));
    }
}
