//! The one error type of the planner.

use std::io;
use std::path::PathBuf;

/// The result of reading a model or planning for it.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be read or planned for, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened or read.
    #[error("can't read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },

    /// A file could not be written.
    #[error("can't write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },

    /// Something that must be JSON isn't.
    #[error("{what} is not valid JSON: {source}")]
    Json {
        /// The file, or what it stands for.
        what: String,
        /// Where and how parsing stopped.
        source: serde_json::Error,
    },

    /// A field of a config.json is missing, of the wrong type, or makes no sense.
    #[error("{file}: `{field}` {problem}")]
    Config {
        /// The config.json.
        file: String,
        /// The field's name.
        field: String,
        /// What is wrong with it.
        problem: String,
    },

    /// The architecture has no sharding rules here.
    #[error("{file}: model_type \"{model_type}\" is not supported: use one of {}", supported.join(", "))]
    UnknownArchitecture {
        /// The config.json.
        file: String,
        /// The `model_type` it names.
        model_type: String,
        /// Every `model_type` that has rules.
        supported: Vec<&'static str>,
    },

    /// A model that these rules would shard wrongly.
    #[error("{file}: {what}")]
    Unsupported {
        /// The file that says so.
        file: String,
        /// What isn't supported, and what to use instead.
        what: String,
    },

    /// A directory holds no weights in a format that is read here.
    #[error(
        "{}: no model.safetensors and no model.safetensors.index.json: \
         give a model directory that holds its weights as safetensors",
        path.display()
    )]
    NoWeights {
        /// The directory or config.json that was given.
        path: PathBuf,
    },

    /// A safetensors file, or the index of several, is damaged.
    #[error("{}: {problem}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// The architecture needs a tensor that the weights don't hold.
    #[error("{}: tensor {tensor} is missing: is config.json another model's?", path.display())]
    MissingTensor {
        /// The weights.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },

    /// The weights and config.json contradict each other.
    #[error(
        "{}: tensor {tensor} has shape {found:?}, but config.json implies {expected:?}: \
         is config.json another model's?",
        path.display()
    )]
    TensorShape {
        /// The weights.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its shape in the weights.
        found: Vec<usize>,
        /// Its shape according to config.json.
        expected: Vec<usize>,
    },

    /// A description of machines and links contradicts itself or makes no sense.
    #[error("{what}: {problem}")]
    Fabric {
        /// The file, or what it stands for.
        what: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },

    /// A plan for no ranks was asked for.
    #[error("a plan needs at least 1 rank, not 0")]
    NoRanks,

    /// There are more ranks than there are things to share among them.
    #[error(
        "{world} ranks are too many for this model: {constraint} = {}{} and each rank needs at least one. \
         The nearest legal number of ranks is {nearest}; to use more, {alternatives}",
        size.saturating_mul(*granule),
        if *granule == 1 { String::new() } else { format!(" is {size} groups of {granule}, which are never cut,") }
    )]
    TooManyRanks {
        /// The ranks asked for.
        world: usize,
        /// What runs out first: a field of config.json.
        constraint: &'static str,
        /// How many of it there are, in groups of `granule`.
        size: usize,
        /// How many of it are never cut: the group or block of quantised weights; else 1.
        granule: usize,
        /// The largest number of ranks that can be planned for.
        nearest: usize,
        /// What can use more.
        alternatives: String,
    },

    /// What was given for each rank isn't one for each, or makes no sense.
    #[error("{0}")]
    RankOptions(String),

    /// The ranks together can't hold the model, or one can't hold what every rank needs.
    #[error(
        "rank {rank} would hold {needed} bytes of weights, but has room for {limit}, and the others have no room for \
         the rest: use more ranks, larger devices, or weights of fewer bits"
    )]
    Memory {
        /// The rank that lacks most.
        rank: usize,
        /// What it would hold.
        needed: u64,
        /// What it can.
        limit: u64,
    },

    /// Query heads that can't be grouped evenly by the key/value head they read.
    #[error(
        "{q_heads} query heads can't be grouped over {kv_heads} key/value heads: \
         num_attention_heads must be a multiple of num_key_value_heads"
    )]
    HeadGroups {
        /// Query heads.
        q_heads: usize,
        /// Key and value heads.
        kv_heads: usize,
    },

    /// A size is beyond what any real model has and this planner computes with.
    #[error("{what} is {size}, more than the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// How large it is.
        size: u128,
        /// The most allowed.
        limit: u128,
    },

    /// A model, or a pipeline of models, that can't be placed on the devices there are.
    #[error("{0}")]
    NoPlacement(String),

    /// A description of a pipeline of models contradicts itself or makes no sense.
    #[error("{what}: {problem}")]
    Pipeline {
        /// The pipeline, or the stage or model of it.
        what: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },

    /// A plan contradicts itself or the model it is for.
    #[error("this plan can't be used: {0}")]
    InvalidPlan(String),
}
