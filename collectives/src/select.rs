//! Which algorithm an all-reduce takes.

use std::fmt;
use std::str::FromStr;

use tensorwire_core::Error;
use tensorwire_transports::shm::{INLINE, Label};

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
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Algorithm; 3] = [Algorithm::Inline, Algorithm::OneShot, Algorithm::TwoShot];

    /// The name used on the command line and in reports: `inline`, `one_shot`, `two_shot`.
    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::Inline => "inline",
            Algorithm::OneShot => "one_shot",
            Algorithm::TwoShot => "two_shot",
        }
    }

    /// Its name for the flight record.
    #[inline]
    pub(crate) const fn label(self) -> Label {
        match self {
            Algorithm::Inline => const { Label::new(Algorithm::Inline.name()) },
            Algorithm::OneShot => const { Label::new(Algorithm::OneShot.name()) },
            Algorithm::TwoShot => const { Label::new(Algorithm::TwoShot.name()) },
        }
    }

    /// The most bytes it can carry.
    pub(crate) fn limit(self) -> usize {
        match self {
            Algorithm::Inline => INLINE,
            Algorithm::OneShot | Algorithm::TwoShot => usize::MAX,
        }
    }

    /// The algorithm for an all-reduce of `bytes` over `world` ranks.
    #[inline]
    pub(crate) fn all_reduce(bytes: usize, world: usize) -> Algorithm {
        let one_shot = if world == 2 { ONE_SHOT_BYTES_OF_TWO } else { ONE_SHOT_BYTES };
        if bytes <= INLINE {
            Algorithm::Inline
        } else if bytes.saturating_mul(world - 1) <= one_shot {
            Algorithm::OneShot
        } else {
            Algorithm::TwoShot
        }
    }
}

/// Bytes that a rank reads in a one-shot all-reduce, beyond which a second step costs less than reading
/// them.
const ONE_SHOT_BYTES: usize = 128 << 10;

/// The same where two ranks read as much in one shot as in two, and the second step saves no more than half of
/// the reduction: measured (see docs/measurements).
const ONE_SHOT_BYTES_OF_TWO: usize = 4 << 20;

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = Error;

    fn from_str(s: &str) -> Result<Algorithm, Error> {
        Algorithm::ALL.into_iter().find(|a| a.name() == s).ok_or_else(|| {
            Error::invalid(format!("unknown algorithm '{s}': use one of inline, one_shot, two_shot"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_always_fits() {
        for world in [2, 3, 16, 1024] {
            for bytes in [0, 4, 48, 49, 4096, 5000, 32 << 10, 1 << 20, 1 << 40] {
                assert!(bytes <= Algorithm::all_reduce(bytes, world).limit());
            }
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
