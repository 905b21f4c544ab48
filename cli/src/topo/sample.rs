//! What a probe measures.

use serde::{Deserialize, Serialize};
use tensorwire::{Algorithm, Tuning};

/// Sizes at which an all-reduce's algorithms are compared.
pub(super) const SIZES: [usize; 12] = [
    512,
    1 << 10,
    2 << 10,
    4 << 10,
    8 << 10,
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
];

/// Chunks of pipelined collectives that are compared: two of the largest fill a slot.
pub(super) const CHUNKS: [usize; 5] = [32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10];

/// Sizes at which they are, all larger than [`SIZES`].
pub(super) const CHUNKED: [usize; 2] = [2 << 20, 4 << 20];

/// Blocks of an all-gather that go through slots and in a single copy, to be compared.
pub(super) const BLOCKS: [usize; 7] = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10];

/// The names of these two ways.
pub(super) const SLOTS: &str = "slots";
pub(super) const SINGLE_COPY: &str = "single_copy";

/// The chunk that algorithms are compared with.
pub(super) fn built_in_chunk() -> usize {
    Tuning::built_in(2).chunk
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) ranks: usize,
    pub(super) collective: String,
    pub(super) algorithm: String,
    /// `user` or `symmetric`.
    pub(super) buffer: String,
    /// Bytes that a step moves, where there are several.
    pub(super) chunk: usize,
    pub(super) bytes: usize,
    /// Whether the input was written anew before each call.
    pub(super) touched: bool,
    /// Of the slowest rank's mean times a call, the median of the rounds, and the least of the passes.
    pub(super) median_us: f64,
}

/// What was measured at one number of ranks.
pub(super) struct Samples<'a>(pub(super) &'a [Sample]);

impl Samples<'_> {
    /// An all-reduce's times at [`SIZES`]; fewer if some are missing.
    pub(super) fn by_size(&self, algorithm: Algorithm, buffer: &str) -> Vec<f64> {
        let at = |bytes: &usize| {
            self.0.iter().find(|s| {
                s.collective == "all_reduce"
                    && s.algorithm == algorithm.name()
                    && s.buffer == buffer
                    && s.chunk == built_in_chunk()
                    && s.bytes == *bytes
            })
        };
        SIZES.iter().filter_map(at).map(|s| s.median_us).collect()
    }

    /// An all-gather's times at [`BLOCKS`], of one of the two ways: of blocks that are the same as in the call before and of
    /// such as were written anew, the mean of both. Fewer if some are missing.
    pub(super) fn by_block(&self, way: &str) -> Vec<f64> {
        let time = |bytes: usize, touched: bool| {
            self.0
                .iter()
                .find(|s| s.algorithm == way && s.bytes == bytes && s.touched == touched)
                .map(|s| s.median_us)
        };
        BLOCKS.iter().filter_map(|b| Some((time(*b, false)? * time(*b, true)?).sqrt())).collect()
    }

    /// The times of what is pipelined, in the same order for each of [`CHUNKS`].
    pub(super) fn by_chunk(&self) -> Vec<Vec<f64>> {
        let of = |chunk: &usize| {
            let samples = self.0.iter().filter(|s| s.chunk == *chunk && CHUNKED.contains(&s.bytes));
            samples.map(|s| s.median_us).collect()
        };
        CHUNKS.iter().map(of).collect()
    }
}
