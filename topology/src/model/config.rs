//! config.json: every field checked, every complaint names the field.

use std::path::PathBuf;

use serde_json::{Map, Value};
use tensorwire_core::DType;

use super::{Architecture, MAX_DIM, MAX_HEADS, MAX_LAYERS, ModelSpec, Rope, RopeScaling};
use crate::{Error, Result};

/// A config.json is a few kilobytes.
pub(super) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Parses the text of a config.json; `file` names it in errors.
pub(super) fn parse(json: &str, file: &str) -> Result<ModelSpec> {
    let root: Value =
        serde_json::from_str(json).map_err(|source| Error::Json { what: file.to_owned(), source })?;
    let Value::Object(map) = &root else {
        return Err(Error::Unsupported {
            file: file.to_owned(),
            what: "not a model's configuration: it must be a JSON object".to_owned(),
        });
    };
    let f = Fields { map, file, path: String::new() };
    let architecture = architecture(&f)?;
    refuse_what_the_rules_would_shard_wrongly(&f, architecture)?;

    let hidden_size = f.required("hidden_size", MAX_DIM)?;
    let num_attention_heads = f.required("num_attention_heads", MAX_HEADS)?;
    let decoder = architecture.is_decoder();
    let num_key_value_heads = if decoder {
        f.size("num_key_value_heads", MAX_HEADS)?.unwrap_or(num_attention_heads)
    } else {
        num_attention_heads
    };
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        return Err(f.error(
            "num_key_value_heads",
            format!("= {num_key_value_heads} must divide num_attention_heads = {num_attention_heads}"),
        ));
    }
    let head_dim = match f.size("head_dim", MAX_DIM)?.filter(|_| decoder) {
        Some(d) => d,
        None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
        None => {
            return Err(f.error(
                "hidden_size",
                format!("= {hidden_size} must be a multiple of num_attention_heads = {num_attention_heads}"),
            ));
        }
    };
    // Both factors are far below 2^32, so their product fits.
    if num_attention_heads * head_dim > MAX_DIM {
        return Err(f.error(
            "head_dim",
            format!("= {head_dim} times {num_attention_heads} heads is above {MAX_DIM}"),
        ));
    }
    let attention_bias = f.flag("attention_bias")?.unwrap_or(false);
    let mlp_bias = f.flag("mlp_bias")?.unwrap_or(false);
    let (qkv_bias, attention_output_bias, mlp_bias) = match architecture {
        Architecture::Bert => (true, true, true),
        Architecture::Llama => (attention_bias, attention_bias, mlp_bias),
        Architecture::Qwen2 => (true, false, false),
    };
    let (act, eps, default_eps, positions) = match architecture {
        Architecture::Bert => ("gelu", "layer_norm_eps", 1e-12, 512),
        Architecture::Llama => ("silu", "rms_norm_eps", 1e-6, 2048),
        Architecture::Qwen2 => ("silu", "rms_norm_eps", 1e-6, 32768),
    };
    let type_vocab_size = if decoder { 0 } else { f.size("type_vocab_size", MAX_DIM)?.unwrap_or(2) };
    let sliding_window = match f.flag("use_sliding_window")? {
        Some(true) => f.size("sliding_window", MAX_DIM)?,
        _ => None,
    };

    let mut spec = ModelSpec {
        architecture,
        num_layers: f.required("num_hidden_layers", MAX_LAYERS)?,
        hidden_size,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        intermediate_size: f.required("intermediate_size", MAX_DIM)?,
        vocab_size: f.required("vocab_size", MAX_DIM)?,
        max_position_embeddings: f.size("max_position_embeddings", MAX_DIM)?.unwrap_or(positions),
        type_vocab_size,
        hidden_act: f.text("hidden_act")?.unwrap_or(act).to_owned(),
        norm_eps: f.positive(eps)?.unwrap_or(default_eps),
        rope: if decoder { Some(rope(&f)?) } else { None },
        sliding_window,
        tie_word_embeddings: decoder && f.flag("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias,
        attention_output_bias,
        mlp_bias,
        eos_token_ids: f.tokens("eos_token_id")?,
        dtype: dtype(&f)?,
        prefix: architecture.rules().prefixes[0].to_owned(),
        tensors: Vec::new(),
        unused: Vec::new(),
        source: PathBuf::from(file),
        weight_files: Vec::new(),
    };
    spec.derive_tensors()?;
    Ok(spec)
}

fn architecture(f: &Fields) -> Result<Architecture> {
    let Some(model_type) = f.text("model_type")? else {
        return Err(f.error("model_type", "is missing"));
    };
    Architecture::ALL.into_iter().find(|a| a.model_type() == model_type).ok_or_else(|| {
        Error::UnknownArchitecture {
            file: f.file.to_owned(),
            model_type: model_type.to_owned(),
            supported: Architecture::ALL.iter().map(|a| a.model_type()).collect(),
        }
    })
}

fn refuse_what_the_rules_would_shard_wrongly(f: &Fields, architecture: Architecture) -> Result<()> {
    let unsupported = |what: String| Err(Error::Unsupported { file: f.file.to_owned(), what });
    if f.get("quantization_config").is_some() {
        return unsupported(
            "quantised weights (quantization_config) are not supported: use the f32, f16 or bf16 weights"
                .to_owned(),
        );
    }
    if architecture == Architecture::Bert {
        if let Some(kind) = f.text("position_embedding_type")?.filter(|k| *k != "absolute") {
            return unsupported(format!(
                "position_embedding_type \"{kind}\" is not supported, only \"absolute\""
            ));
        }
        if f.flag("is_decoder")? == Some(true) {
            return unsupported(
                "BERT as a decoder (is_decoder) is not supported, only as an encoder".to_owned(),
            );
        }
    }
    Ok(())
}

/// The type the weights are stored in, which newer files call `dtype`; float32 where none is named.
fn dtype(f: &Fields) -> Result<DType> {
    let field = if f.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
    match f.text(field)?.map(|name| name.strip_prefix("torch.").unwrap_or(name)) {
        None | Some("float32") => Ok(DType::F32),
        Some("float16") => Ok(DType::F16),
        Some("bfloat16") => Ok(DType::BF16),
        Some(other) => {
            Err(f.error(field, format!("= \"{other}\" is not supported: use float32, float16 or bfloat16")))
        }
    }
}

/// Rotary embedding: `rope_theta` and `rope_scaling`, or both inside the newer `rope_parameters`.
fn rope(f: &Fields) -> Result<Rope> {
    let newer = f.object("rope_parameters")?;
    let nested_theta = newer.as_ref().map(|p| p.positive("rope_theta")).transpose()?.flatten();
    let theta = nested_theta.or(f.positive("rope_theta")?).unwrap_or(10_000.0);
    let scaling = match newer.or(f.object("rope_scaling")?) {
        None => RopeScaling::None,
        Some(p) => scaling(&p)?,
    };
    Ok(Rope { theta, scaling })
}

fn scaling(p: &Fields) -> Result<RopeScaling> {
    // `type` is what `rope_type` used to be called.
    let kind = p.text("rope_type")?.or(p.text("type")?).unwrap_or("default");
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: p.required_positive("factor")? },
        "llama3" => {
            let (low, high) =
                (p.required_positive("low_freq_factor")?, p.required_positive("high_freq_factor")?);
            if low >= high {
                return Err(
                    p.error("low_freq_factor", format!("= {low} must be below high_freq_factor = {high}"))
                );
            }
            RopeScaling::Llama3 {
                factor: p.required_positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: p.required("original_max_position_embeddings", MAX_DIM)?,
            }
        }
        other => RopeScaling::Other(other.to_owned()),
    })
}

/// One JSON object of the file. A field that is null counts as absent.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    file: &'a str,
    /// Where the object is in the file: empty, or such as `rope_scaling.`.
    path: String,
}

impl<'a> Fields<'a> {
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    fn error(&self, field: &str, problem: impl Into<String>) -> Error {
        let field = format!("{}{field}", self.path);
        Error::Config { file: self.file.to_owned(), field, problem: problem.into() }
    }

    fn wrong(&self, field: &str, expected: &str, found: &Value) -> Error {
        let mut found = found.to_string();
        if found.len() > 60 {
            found = format!("{}...", found.chars().take(60).collect::<String>());
        }
        self.error(field, format!("must be {expected}, not {found}"))
    }

    /// A whole number from 1 to `limit`.
    fn size(&self, field: &str, limit: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=limit).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(self.wrong(field, &format!("a whole number from 1 to {limit}"), value)),
        }
    }

    fn required(&self, field: &str, limit: usize) -> Result<usize> {
        self.size(field, limit)?.ok_or_else(|| self.error(field, "is missing"))
    }

    fn positive(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
            Some(x) => Ok(Some(x)),
            None => Err(self.wrong(field, "a number above 0", value)),
        }
    }

    fn required_positive(&self, field: &str) -> Result<f64> {
        self.positive(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    fn flag(&self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(field, "true or false", value))
    }

    fn text(&self, field: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(field, "a string", value))
    }

    fn object(&self, field: &str) -> Result<Option<Fields<'a>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Fields { map, file: self.file, path: format!("{}{field}.", self.path) })),
            None => Err(self.wrong(field, "an object", value)),
        }
    }

    /// One token or a list of tokens.
    fn tokens(&self, field: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let tokens = match value {
            Value::Array(list) => list.iter().map(one).collect::<Option<Vec<u32>>>(),
            other => one(other).map(|t| vec![t]),
        };
        tokens.ok_or_else(|| self.wrong(field, "a token number or a list of them", value))
    }
}
