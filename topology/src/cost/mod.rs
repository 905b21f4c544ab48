//! What an exchange and a decode step are expected to take: the alpha-beta model.
//!
//! A step of an exchange costs `alpha + bytes / bandwidth`: a fixed latency, and the bytes a rank moves.
//! This is the model of Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations
//! in MPICH", 2005; NCCL's tuner chooses algorithms by the same formula. With `n` ranks and a payload of
//! `B` bytes (of the whole result), in shared memory, where a rank reads what each other rank has written:
//!
//! | exchange | steps | bytes a rank reads | time |
//! | --- | --- | --- | --- |
//! | all-reduce, each rank reads all | 1 | `(n-1) B` | `alpha + (n-1) B / bandwidth` |
//! | all-reduce as reduce-scatter and all-gather | 2 | `2 (n-1)/n B` | `2 alpha + 2 (n-1)/n B / bandwidth` |
//! | all-gather | 1 | `(n-1)/n B` | `alpha + (n-1)/n B / bandwidth` |
//!
//! An all-reduce takes the cheaper of its two forms: at the payloads of a decode step the first, as latency
//! decides there. The arithmetic of the reduction is counted in the bandwidth.
//!
//! Decoding one token reads every weight once and does two operations with it, far below what a processor can
//! compute in that time, so a rank's computing time is its bytes over its memory bandwidth.

/// What communication and memory cost.
///
/// The [`Default`] is a set of assumed constants and no measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct CostModel {
    /// Latency of one step of an exchange, in microseconds.
    pub alpha_us: f64,
    /// Bytes that one rank moves through shared memory in a microsecond (MB/s); 1000 is 1 GB/s.
    pub link_bytes_per_us: f64,
    /// Bytes of weights that one rank reads from memory in a microsecond.
    pub memory_bytes_per_us: f64,
    /// Where the figures come from, for the plan's notes.
    pub source: String,
}

impl Default for CostModel {
    /// Two processes on one host: 2 us for a write to be seen and answered between cores, 8 GB/s of copying
    /// and adding a core, 16 GB/s of reading a rank, about what one or two cores draw from DRAM. Round
    /// figures of the right order of magnitude for a present server.
    fn default() -> CostModel {
        CostModel {
            alpha_us: 2.0,
            link_bytes_per_us: 8_000.0,
            memory_bytes_per_us: 16_000.0,
            source: "built-in constants for shared memory on one host, not a measurement of this machine"
                .to_owned(),
        }
    }
}

impl CostModel {
    /// An all-reduce of `bytes` over `world` ranks, in microseconds.
    pub fn all_reduce_us(&self, bytes: u64, world: usize) -> f64 {
        if world < 2 {
            return 0.0;
        }
        let (n, wire) = (world as f64, bytes as f64 / self.link_bytes_per_us);
        let one_step = self.alpha_us + (n - 1.0) * wire;
        let two_steps = 2.0 * self.alpha_us + 2.0 * (n - 1.0) / n * wire;
        one_step.min(two_steps)
    }

    /// An all-gather whose result is `bytes` on each of `world` ranks, in microseconds.
    pub fn all_gather_us(&self, bytes: u64, world: usize) -> f64 {
        if world < 2 {
            return 0.0;
        }
        let n = world as f64;
        self.alpha_us + (n - 1.0) / n * bytes as f64 / self.link_bytes_per_us
    }

    /// Reading `bytes` of weights, in microseconds.
    pub fn read_us(&self, bytes: u64) -> f64 {
        bytes as f64 / self.memory_bytes_per_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> CostModel {
        CostModel {
            alpha_us: 2.0,
            link_bytes_per_us: 1_000.0,
            memory_bytes_per_us: 4_000.0,
            source: "test".to_owned(),
        }
    }

    #[test]
    fn one_rank_exchanges_nothing() {
        assert_eq!(model().all_reduce_us(1 << 30, 1), 0.0);
        assert_eq!(model().all_gather_us(1 << 30, 1), 0.0);
    }

    #[test]
    fn a_small_all_reduce_takes_one_step_and_a_large_one_two() {
        // 4 ranks, 1000 bytes (1 us on the link): 2 + 3 = 5 us in one step, 4 + 1.5 = 5.5 us in two.
        assert_eq!(model().all_reduce_us(1_000, 4), 5.0);
        // 100,000 bytes: 2 + 300 us in one step, 4 + 150 us in two.
        assert_eq!(model().all_reduce_us(100_000, 4), 154.0);
    }

    #[test]
    fn an_all_gather_reads_what_the_others_have() {
        // 4 ranks, 4000 bytes in all: each reads 3000.
        assert_eq!(model().all_gather_us(4_000, 4), 5.0);
        assert_eq!(model().read_us(8_000), 2.0);
    }
}
