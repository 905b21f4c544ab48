//! What one rank asked for: compared between ranks, and named in errors.

use std::fmt;

use crate::{DType, ReduceOp, Wire};

/// A collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Every rank gets the reduction of all ranks' buffers.
    AllReduce = 1,
    /// Every rank gets the concatenation of all ranks' blocks.
    AllGather = 2,
    /// Rank `r` gets block `r` of the reduction.
    ReduceScatter = 3,
    /// Every rank gets the root's buffer.
    Broadcast = 4,
    /// No rank leaves before every rank has arrived.
    Barrier = 5,
    /// The root gets the reduction of all ranks' buffers.
    Reduce = 6,
    /// The root gets the concatenation of all ranks' blocks.
    Gather = 7,
    /// Rank `r` gets block `r` of the root's buffer.
    Scatter = 8,
    /// Rank `r` gets, from each rank, that rank's block `r`.
    AllToAll = 9,
    /// One rank's buffer goes to another's [`Recv`](Op::Recv).
    Send = 10,
    /// Takes what another rank sends.
    Recv = 11,
    /// The ranks form smaller groups.
    Split = 12,
    /// The ranks take memory that all of them map.
    Symmetric = 13,
    /// All-reduce, addition to a residual and RMSNorm in one.
    AllReduceAddRmsNorm = 14,
    /// The ranks send each other what is timed.
    MeasureLink = 15,
}

impl Op {
    /// Every operation, in the order of its code.
    pub const ALL: [Op; 15] = [
        Op::AllReduce,
        Op::AllGather,
        Op::ReduceScatter,
        Op::Broadcast,
        Op::Barrier,
        Op::Reduce,
        Op::Gather,
        Op::Scatter,
        Op::AllToAll,
        Op::Send,
        Op::Recv,
        Op::Split,
        Op::Symmetric,
        Op::AllReduceAddRmsNorm,
        Op::MeasureLink,
    ];

    /// The name used on the command line and in messages, such as `all_reduce`.
    pub const fn name(self) -> &'static str {
        match self {
            Op::AllReduce => "all_reduce",
            Op::AllGather => "all_gather",
            Op::ReduceScatter => "reduce_scatter",
            Op::Broadcast => "broadcast",
            Op::Barrier => "barrier",
            Op::Reduce => "reduce",
            Op::Gather => "gather",
            Op::Scatter => "scatter",
            Op::AllToAll => "all_to_all",
            Op::Send => "send",
            Op::Recv => "recv",
            Op::Split => "split",
            Op::Symmetric => "symmetric",
            Op::AllReduceAddRmsNorm => "all_reduce_add_rms_norm",
            Op::MeasureLink => "measure_link",
        }
    }

    /// The operation whose code (`self as u8`) this is.
    pub fn from_code(code: u8) -> Option<Op> {
        Op::ALL.into_iter().find(|o| *o as u8 == code)
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One call of a collective, as every rank must make it alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Call {
    /// Which collective.
    pub op: Op,
    /// The element type; `None` where nothing is carried (barrier).
    pub dtype: Option<DType>,
    /// The reduction; `None` where nothing is reduced.
    pub reduce: Option<ReduceOp>,
    /// Elements: the buffer of all_reduce, all_reduce_add_rms_norm, reduce, broadcast, send and recv; a message of
    /// measure_link; the whole output of all_gather and gather; the whole input of reduce_scatter, scatter and all_to_all.
    pub count: u64,
    /// The root rank, the other rank of send and recv, the width of all_reduce_add_rms_norm, or the messages of an
    /// exchange of measure_link; `None` where there is none.
    pub root: Option<u32>,
    /// A digest of per-rank counts where they differ (all_gather_v and the like), or the bits of
    /// all_reduce_add_rms_norm's epsilon; 0 otherwise.
    pub layout: u32,
    /// In how few bits elements may be sent; `None` for as they are.
    pub wire: Option<Wire>,
}

impl Call {
    /// A call that moves no elements of the caller's, or is none: a barrier, or a split.
    pub const fn bare(op: Op) -> Call {
        Call { op, dtype: None, reduce: None, count: 0, root: None, layout: 0, wire: None }
    }

    /// The sending or receiving, as `op` says, of a message of `bytes` with `peer`.
    pub fn message(op: Op, dtype: DType, bytes: usize, peer: usize) -> Call {
        let (count, root) = ((bytes / dtype.size()) as u64, Some(peer as u32));
        Call { op, dtype: Some(dtype), reduce: None, count, root, layout: 0, wire: None }
    }

    /// The call in four words, for memory that ranks share.
    #[inline]
    pub fn to_words(&self) -> [u64; 4] {
        let head = self.op as u64
            | (self.dtype.map_or(0, |d| d as u64) << 8)
            | (self.reduce.map_or(0, |r| u64::from(r.code())) << 16)
            | (self.wire.map_or(0, |w| w as u64) << 24)
            | (u64::from(self.layout) << 32);
        let factor = self.reduce.map_or(1.0, ReduceOp::factor).to_bits();
        [head, self.count, self.root.map_or(0, |r| u64::from(r) + 1), factor]
    }

    /// The call that [`to_words`](Call::to_words) wrote; `None` where the words are no call.
    pub fn from_words([head, count, root, factor]: [u64; 4]) -> Option<Call> {
        let byte = |shift: u32| (head >> shift) as u8;
        Some(Call {
            op: Op::from_code(byte(0))?,
            dtype: if byte(8) == 0 { None } else { Some(DType::from_code(byte(8))?) },
            reduce: if byte(16) == 0 {
                None
            } else {
                Some(ReduceOp::from_code(byte(16), f64::from_bits(factor))?)
            },
            count,
            root: root.checked_sub(1).map(|r| r as u32),
            layout: (head >> 32) as u32,
            wire: if byte(24) == 0 { None } else { Some(Wire::from_code(byte(24))?) },
        })
    }

    /// A digest that differs, but for a 1 in 2^32 chance, when two ranks' calls differ.
    #[inline]
    pub fn fingerprint(&self) -> u32 {
        let [head, count, root, factor] = self.to_words();
        let mut h = head.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        h ^= h >> 29;
        h = (h ^ count).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        h ^= h >> 32;
        h = (h ^ root ^ factor.rotate_left(7)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (h ^ (h >> 32)) as u32
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.op)?;
        let mut sep = "";
        if let Some(d) = self.dtype {
            write!(f, "{} x {d}", self.count)?;
            sep = ", ";
        }
        if let Some(r) = self.reduce {
            write!(f, "{sep}{r}")?;
            sep = ", ";
        }
        if let Some(r) = self.root {
            let role = match self.op {
                Op::Send => "to",
                Op::Recv => "from",
                Op::AllReduceAddRmsNorm => "width",
                Op::MeasureLink => "messages",
                _ => "root",
            };
            write!(f, "{sep}{role} {r}")?;
            sep = ", ";
        }
        if self.op == Op::AllReduceAddRmsNorm {
            write!(f, "{sep}eps {:e}", f32::from_bits(self.layout))?;
        } else if self.layout != 0 {
            write!(f, "{sep}layout {:08x}", self.layout)?;
        }
        if let Some(wire) = self.wire {
            write!(f, ", wire {wire}")?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        Call {
            op: Op::AllReduce,
            dtype: Some(DType::F32),
            reduce: Some(ReduceOp::Sum),
            count: 4096,
            root: None,
            layout: 0,
            wire: None,
        }
    }

    #[test]
    fn any_field_changes_the_fingerprint() {
        let base = call();
        let others = [
            Call { op: Op::Broadcast, ..base },
            Call { dtype: Some(DType::BF16), ..base },
            Call { dtype: None, ..base },
            Call { reduce: Some(ReduceOp::Max), ..base },
            Call { reduce: Some(ReduceOp::PreScaledSum(1.0)), ..base },
            Call { reduce: Some(ReduceOp::PreScaledSum(0.5)), ..base },
            Call { count: 4097, ..base },
            Call { root: Some(0), ..base },
            Call { root: Some(1), ..base },
            Call { layout: 1, ..base },
            Call { wire: Some(Wire::Bf16), ..base },
            Call { wire: Some(Wire::Q8), ..base },
        ];
        let mut seen = vec![base.fingerprint()];
        for other in others {
            assert!(!seen.contains(&other.fingerprint()), "{other}");
            assert_eq!(Call::from_words(other.to_words()), Some(other));
            seen.push(other.fingerprint());
        }
    }

    #[test]
    fn words_that_are_no_call_are_refused() {
        for words in [
            [0; 4],
            [99, 0, 0, 0],
            [1 | 99 << 8, 0, 0, 0],
            [1 | 1 << 8 | 99 << 16, 0, 0, 0],
            [1 | 99 << 24, 0, 0, 0],
        ] {
            assert_eq!(Call::from_words(words), None);
        }
    }

    #[test]
    fn reads_as_a_call() {
        assert_eq!(call().to_string(), "all_reduce(4096 x f32, sum)");
        let barrier = Call { op: Op::Barrier, dtype: None, reduce: None, count: 0, ..call() };
        assert_eq!(barrier.to_string(), "barrier()");
        let bcast = Call { op: Op::Broadcast, reduce: None, root: Some(3), ..call() };
        assert_eq!(bcast.to_string(), "broadcast(4096 x f32, root 3)");
        let short = Call { wire: Some(Wire::Q8), ..call() };
        assert_eq!(short.to_string(), "all_reduce(4096 x f32, sum, wire q8)");
        let eps = 1e-5f32.to_bits();
        let fused = Call { op: Op::AllReduceAddRmsNorm, root: Some(256), layout: eps, ..call() };
        assert_eq!(fused.to_string(), "all_reduce_add_rms_norm(4096 x f32, sum, width 256, eps 1e-5)");
        let short = Call { wire: Some(Wire::Bf16), ..fused };
        assert!(short.to_string().ends_with(", eps 1e-5, wire bf16)"), "{short}");
    }
}
