//! What each collective needs and moves.

use std::fmt;

use clap::ValueEnum;

/// A collective that can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Collective {
    AllReduce,
    AllGather,
    ReduceScatter,
    Broadcast,
    Reduce,
    Gather,
    Scatter,
    AllToAll,
    SendRecv,
    Barrier,
}

/// Elements of one rank's buffers.
#[derive(Debug, PartialEq)]
pub(super) struct Lengths {
    pub(super) input: usize,
    /// 0 where the result takes the input's place, or there is none.
    pub(super) output: usize,
}

impl Collective {
    pub(super) fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
    }

    /// Whether data is reduced.
    pub(super) fn reduces(self) -> bool {
        matches!(self, Collective::AllReduce | Collective::ReduceScatter | Collective::Reduce)
    }

    /// Whether the size is cut into a block for each rank.
    fn splits(self) -> bool {
        matches!(self, Collective::ReduceScatter | Collective::Scatter | Collective::AllToAll)
    }

    /// The bytes that a measurement of `bytes` moves: as many as make equal blocks; `None` for too few.
    pub(crate) fn whole_blocks(self, bytes: usize, element: usize, ranks: usize) -> Option<usize> {
        let blocks = if self.splits() { ranks } else { 1 };
        let unit = element.checked_mul(blocks)?;
        Some(bytes / unit * unit).filter(|b| *b > 0 || self == Collective::Barrier)
    }

    /// What `rank` needs for `count` elements; `None` for more than can be counted.
    pub(super) fn lengths(self, count: usize, rank: usize, ranks: usize) -> Option<Lengths> {
        let all = count.checked_mul(ranks)?;
        let at_root = |count| if rank == 0 { count } else { 0 };
        let (input, output) = match self {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => (count, 0),
            Collective::AllGather => (count, all),
            Collective::Gather => (count, at_root(all)),
            Collective::ReduceScatter => (count, count / ranks),
            Collective::Scatter => (at_root(count), count / ranks),
            Collective::AllToAll | Collective::SendRecv => (count, count),
            Collective::Barrier => (0, 0),
        };
        Some(Lengths { input, output })
    }

    /// Bytes that count as moved, and the part of them that the busiest link carries: as nccl-tests has it,
    /// an all_gather's or a gather's size is its whole output, and nobody's own block crosses a link.
    pub(super) fn traffic(self, bytes: usize, ranks: usize) -> (f64, f64) {
        let (size, n) = (bytes as f64, ranks as f64);
        let others = (n - 1.0) / n;
        match self {
            Collective::AllReduce => (size, 2.0 * others),
            Collective::AllGather | Collective::Gather => (size * n, others),
            Collective::ReduceScatter | Collective::Scatter | Collective::AllToAll => (size, others),
            Collective::Broadcast | Collective::Reduce | Collective::SendRecv => {
                (size, if ranks > 1 { 1.0 } else { 0.0 })
            }
            Collective::Barrier => (0.0, 0.0),
        }
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_cut_to_whole_blocks() {
        assert_eq!(Collective::AllReduce.whole_blocks(12, 4, 8), Some(12));
        assert_eq!(Collective::ReduceScatter.whole_blocks(20, 4, 2), Some(16));
        assert_eq!(Collective::AllToAll.whole_blocks(8, 4, 3), None);
        assert_eq!(Collective::Barrier.whole_blocks(0, 4, 3), Some(0));
        assert_eq!(Collective::Scatter.whole_blocks(8, 4, usize::MAX), None);
    }

    #[test]
    fn every_rank_has_what_its_part_takes() {
        let of = |c: Collective, rank| {
            let Lengths { input, output } = c.lengths(12, rank, 4).unwrap();
            (input, output)
        };
        assert_eq!(of(Collective::AllReduce, 1), (12, 0));
        assert_eq!(of(Collective::AllGather, 1), (12, 48));
        assert_eq!((of(Collective::Gather, 0), of(Collective::Gather, 1)), ((12, 48), (12, 0)));
        assert_eq!((of(Collective::Scatter, 0), of(Collective::Scatter, 1)), ((12, 3), (0, 3)));
        assert_eq!(of(Collective::ReduceScatter, 2), (12, 3));
        assert_eq!(of(Collective::AllToAll, 3), (12, 12));
        assert_eq!(Collective::AllGather.lengths(usize::MAX, 0, 2), None);
    }

    #[test]
    fn the_bus_carries_what_leaves_a_rank() {
        assert_eq!(Collective::AllReduce.traffic(100, 2), (100.0, 1.0));
        assert_eq!(Collective::AllGather.traffic(100, 4), (400.0, 0.75));
        assert_eq!(Collective::AllToAll.traffic(100, 4), (100.0, 0.75));
        for collective in Collective::value_variants() {
            assert_eq!(collective.traffic(100, 1).1, 0.0, "{collective}: one rank has no link");
        }
    }
}
