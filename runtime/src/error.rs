//! What can go wrong, and what to do about it.

use std::io;
use std::path::PathBuf;

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Each message is one line that says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },

    /// A file is not what its name says.
    #[error("{}: {why}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },

    /// A weight file ends before a tensor that its header describes.
    #[error("{}: it has shrunk to {bytes} bytes while it was used: restore the file", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length now.
        bytes: u64,
    },

    /// The model lacks a tensor that its architecture needs.
    #[error("the model has no tensor {0}: are its weights complete?")]
    MissingTensor(String),

    /// A tensor's element type can't be computed with.
    #[error("tensor {name} holds {dtype}: this runtime reads F32, F16 and BF16")]
    DType {
        /// The tensor's name.
        name: String,
        /// Its type.
        dtype: &'static str,
    },

    /// The planner knows the model, but this runtime can't run it.
    #[error("{key} = {value} is not supported: this runtime knows {supported}")]
    Unsupported {
        /// The option.
        key: &'static str,
        /// What the model sets it to.
        value: String,
        /// What it may be.
        supported: &'static str,
    },

    /// The plan is for another number of ranks, or slices a tensor that can't be sliced so.
    #[error("the plan doesn't fit: {0}")]
    Plan(String),

    /// The model does something else.
    #[error("this model {does}: {instead}")]
    WrongKind {
        /// What it does.
        does: &'static str,
        /// What to ask of it.
        instead: &'static str,
    },

    /// The model has no tokenizer, so it can't read or write text.
    #[error("the model has no tokenizer.json: give token ids, or a directory that holds one")]
    NoTokenizer,

    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    /// A text to embed has more tokens than the model can take.
    #[error("text {index} has {tokens} tokens, the model takes at most {limit}: shorten or split it")]
    TextTooLong {
        /// Which text, from 0.
        index: usize,
        /// Its tokens, special ones included.
        tokens: usize,
        /// The model's limit.
        limit: usize,
    },

    /// A prompt and what should follow it don't fit the model's context.
    #[error(
        "{prompt} tokens of prompt and {max_tokens} to generate are more than the model's {limit} positions: \
         shorten the prompt or ask for fewer tokens"
    )]
    ContextTooLong {
        /// Tokens in the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// The model's limit (`max_position_embeddings`).
        limit: usize,
    },

    /// Nothing to continue.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,

    /// A token id outside the vocabulary.
    #[error("token {id} is outside the model's vocabulary of {vocab}: is the tokenizer another model's?")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },

    /// The computation gave infinities or NaN.
    #[error("the model's output is not a finite number: the weights are damaged or overflow f32")]
    NotFinite,

    /// Memory ran out.
    #[error("no memory for {bytes} bytes of {what}: use more ranks or a smaller model")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// How much.
        bytes: usize,
    },

    /// The system gave no threads to compute on.
    #[error("can't start threads to compute on: {0}: lower RAYON_NUM_THREADS")]
    Threads(#[from] rayon::ThreadPoolBuildError),

    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] tensorwire::Error),

    /// The planner refused.
    #[error(transparent)]
    Planner(#[from] tensorwire::topology::Error),

    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Compute(#[from] candle_core::Error),
}
