//! A model as it lies on disk (or is made from a seed): its configuration, its files, its tokenizer.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tensorwire::topology::ModelSpec;
use tensorwire::topology::model::Architecture;

use crate::text::Text;
use crate::weights::Weights;
use crate::{Error, Result, builtin, llama};

/// What a model does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Turns texts into vectors: [`Runtime::embed`](crate::Runtime::embed).
    Encoder,
    /// Continues a prompt: [`Runtime::generate`](crate::Runtime::generate).
    Decoder,
}

/// A model, opened but not loaded.
pub struct Model {
    spec: ModelSpec,
    pub(crate) weights: Weights,
    pub(crate) text: Option<Arc<Text>>,
    max_tokens: usize,
    /// Tokens that end a generated text.
    pub(crate) eos: Vec<u32>,
}

impl Model {
    /// Opens a model directory: `config.json`, `model.safetensors` or its sharded index, `tokenizer.json`.
    pub fn open(dir: impl AsRef<Path>) -> Result<Model> {
        let dir = dir.as_ref();
        let spec = ModelSpec::load(dir)?;
        let weights = Weights::open(&spec)?;
        let mut model = Model::new(spec, weights)?;
        let tokenizer = dir.join("tokenizer.json");
        if tokenizer.exists() {
            model.text = Some(Arc::new(Text::open(&tokenizer)?));
        }
        match model.kind() {
            Kind::Encoder => {
                let settings: SentenceSettings = read_json(&dir.join("sentence_bert_config.json"))?;
                model.max_tokens =
                    settings.max_seq_length.map_or(model.max_tokens, |n| n.min(model.max_tokens));
            }
            Kind::Decoder => {
                let settings: GenerationSettings = read_json(&dir.join("generation_config.json"))?;
                model.eos = match settings.eos_token_id {
                    Some(OneOrMany::One(id)) => vec![id],
                    Some(OneOrMany::Many(ids)) => ids,
                    None => model.eos,
                };
            }
        }
        Ok(model)
    }

    /// The built-in model: see [`crate::builtin`].
    pub fn built_in() -> Result<Model> {
        Model::seeded(builtin::CONFIG, builtin::SEED)
    }

    /// A model of the given `config.json` text whose weights follow from `seed`. It has no tokenizer.
    pub fn seeded(config: &str, seed: u64) -> Result<Model> {
        Model::new(ModelSpec::from_config(config)?, Weights::seeded(seed))
    }

    fn new(spec: ModelSpec, weights: Weights) -> Result<Model> {
        let unsupported =
            |key, value: &str, supported| Error::Unsupported { key, value: value.to_owned(), supported };
        let activation = match spec.architecture {
            Architecture::Bert => "gelu",
            Architecture::Llama | Architecture::Qwen2 => "silu",
            _ => return Err(unsupported("model_type", &spec.model_type, "bert, llama and qwen2")),
        };
        if let Some(q) = &spec.quantization {
            return Err(unsupported("quantization_config", q.format.name(), "unquantised weights"));
        }
        if spec.hidden_act != activation {
            return Err(unsupported("hidden_act", &spec.hidden_act, activation));
        }
        // Refused here, not later on each rank.
        spec.rope.as_ref().map(|rope| llama::frequencies(rope, spec.head_dim)).transpose()?;
        // Within its window, attention that slides sees what attention that doesn't would.
        let max_tokens = spec.sliding_window.unwrap_or(usize::MAX).min(spec.max_position_embeddings);
        let eos = spec.eos_token_ids.clone();
        Ok(Model { spec, weights, text: None, max_tokens, eos })
    }

    /// What the planner needs.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Whether it embeds or generates.
    pub fn kind(&self) -> Kind {
        if self.spec.architecture.is_decoder() { Kind::Decoder } else { Kind::Encoder }
    }

    /// The most tokens of a text to embed, or of a prompt and its continuation together.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The text's token ids, as the model's tokenizer makes them (special tokens included).
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        self.text.as_ref().ok_or(Error::NoTokenizer)?.encode(text)
    }
}

/// What matters here of `sentence_bert_config.json`.
#[derive(Default, Deserialize)]
struct SentenceSettings {
    max_seq_length: Option<usize>,
}

/// What matters here of `generation_config.json`.
#[derive(Default, Deserialize)]
struct GenerationSettings {
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// An optional file's JSON; the default where there is no such file.
fn read_json<T: Default + DeserializeOwned>(path: &Path) -> Result<T> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let malformed =
                |e: serde_json::Error| Error::Malformed { path: path.to_owned(), why: e.to_string() };
            serde_json::from_str(&text).map_err(malformed)
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(T::default()),
        Err(source) => Err(Error::Io { path: path.to_owned(), source }),
    }
}
