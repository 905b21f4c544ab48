//! What rank 0 of `infer` tells its parent: one JSON object a line of standard output.

use serde::{Deserialize, Serialize};

/// The environment variable that tells rank 0 the descriptor of the memory file for its numbers.
pub(super) const NUMBERS_FD: &str = "TENSORWIRE_INFER_NUMBERS_FD";

/// A piece of text that surely fits the launcher's limit on lines, however it is escaped.
pub(super) const TEXT_PIECE: usize = 4096;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Event {
    /// All ranks have loaded their weights.
    Loaded {
        /// Bytes of weights that each of them holds, in rank order.
        weight_bytes: Vec<u64>,
    },
    /// One generated token. Its logits are the next row of the memory file.
    Token {
        /// Its id.
        id: u32,
        /// The text that became complete with it.
        text: String,
    },
    /// The next piece of the whole generated text, where the model has a tokenizer.
    Text(String),
    /// The run is over; what it took.
    Done {
        /// Numbers in each row of the memory file: the vocabulary, or the width of an embedding.
        width: usize,
        /// Rows in the memory file; fewer than tokens where it would have grown too large.
        rows: usize,
        /// Seconds to the first token, or for all embeddings.
        prefill_s: f64,
        /// Tokens a second after the first, where there are any.
        decode_tokens_per_s: Option<f64>,
        /// Part of the time that was spent in collectives, from 0 to 1.
        comm_share: f64,
    },
}
