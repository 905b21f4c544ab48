//! What the ranks of `infer` tell their parent: one JSON object a line of standard output.

use serde::{Deserialize, Serialize};

/// The environment variable that tells rank 0 the descriptor of the memory file for its numbers.
pub(super) const NUMBERS_FD: &str = "TENSORWIRE_INFER_NUMBERS_FD";

/// A piece of text that surely fits the launcher's limit on lines, however it is escaped.
pub(super) const TEXT_PIECE: usize = 4096;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Event {
    /// Every rank: its weights are loaded.
    Loaded {
        /// Bytes of weights that it holds.
        weight_bytes: u64,
    },
    /// Rank 0: one generated token. Its logits are the next row of the memory file.
    Token {
        /// Its id.
        id: u32,
        /// The text that became complete with it.
        text: String,
    },
    /// Rank 0: the next piece of the whole generated text, where the model has a tokenizer.
    Text(String),
    /// Rank 0: the run is over; what it took.
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
