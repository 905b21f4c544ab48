//! config.json: every field checked, every complaint names the field.

use std::path::PathBuf;

use serde_json::{Map, Value};
use tensorwire_core::DType;

use super::families::{Draft, FAMILIES, Family, Sizes, UNKNOWN};
use super::quantization::quantization;
use super::safetensors::Weights;
use super::{Architecture, MAX_DIM, MAX_HEADS, MAX_LAYERS, ModelSpec, Rope, RopeScaling};
use crate::{Error, Result};

/// A config.json is a few kilobytes.
pub(super) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Parses the text of a config.json; `file` names it in errors. A model of unknown architecture is known by its
/// `weights`.
pub(super) fn parse(json: &str, file: &str, weights: Option<&Weights>) -> Result<(&'static Family, Draft)> {
    let root: Value =
        serde_json::from_str(json).map_err(|source| Error::Json { what: file.to_owned(), source })?;
    let Value::Object(map) = &root else {
        return Err(Error::Unsupported {
            file: file.to_owned(),
            what: "not a model's configuration: it must be a JSON object".to_owned(),
        });
    };
    let f = Fields { map, file, path: String::new() };
    // transformers' name for it, or diffusers'.
    let Some(model_type) = f.text("model_type")?.or(f.text("_class_name")?) else {
        return Err(f.error("model_type", "is missing"));
    };
    let unknown = || Error::UnknownArchitecture {
        file: file.to_owned(),
        model_type: model_type.to_owned(),
        supported: FAMILIES.iter().flat_map(|x| x.architecture.model_types()).copied().collect(),
    };
    let family = match FAMILIES.iter().find(|x| x.architecture.model_types().contains(&model_type)) {
        Some(family) => family,
        None if weights.is_some_and(|w| w.has_suffix(".0.self_attn.q_proj.weight")) => &UNKNOWN,
        None => return Err(unknown()),
    };
    let mut draft = match (family.read)(&f) {
        // It hasn't the fields of the models that it resembles either.
        Err(_) if family.architecture == Architecture::Unknown => return Err(unknown()),
        draft => draft?,
    };
    if let Some(weights) = weights.filter(|_| family.architecture == Architecture::Unknown) {
        let has = |suffix: &str| weights.has_suffix(suffix);
        let mlp = has("gate_proj.bias") || has("up_proj.bias") || has("down_proj.bias");
        draft.bias(has("q_proj.bias"), has("o_proj.bias"), mlp);
        draft.flag("qk_norm", has("q_norm.weight"));
        let tied = !has("lm_head.weight");
        draft.flags.remove("tied");
        draft.flag("tied", tied);
        draft.spec.tie_word_embeddings = tied;
    }
    draft.spec.model_type = model_type.to_owned();
    draft.spec.quantization = quantization(&f)?;
    Ok((family, draft))
}

/// The fields that most decoders and encoders have, under the names that a family gives them.
pub(super) struct Names {
    pub(super) hidden: &'static str,
    pub(super) layers: &'static str,
    pub(super) heads: &'static str,
    /// No name: as many as query heads.
    pub(super) kv_heads: &'static str,
    /// No name: the hidden size over the heads.
    pub(super) head_dim: &'static str,
    /// The width of a head where the field is absent; 0: the hidden size over the heads.
    pub(super) default_head_dim: usize,
    /// Whether the family works out the width of a head itself.
    pub(super) any_head_dim: bool,
    pub(super) ffn: &'static str,
    /// What the feed-forward width is where the field is absent, in hidden sizes; 0: it is needed.
    pub(super) ffn_times: usize,
    pub(super) positions: &'static str,
    pub(super) default_positions: usize,
    /// The field and its default.
    pub(super) act: (&'static str, &'static str),
    /// The field and its default.
    pub(super) eps: (&'static str, f64),
    pub(super) rope: bool,
    pub(super) tied: bool,
    /// No name: there is no vocabulary.
    pub(super) vocab: &'static str,
    /// The vocabulary where the field is absent; 0: it is needed.
    pub(super) default_vocab: usize,
}

pub(super) const LLAMA_NAMES: Names = Names {
    hidden: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    kv_heads: "num_key_value_heads",
    head_dim: "head_dim",
    default_head_dim: 0,
    any_head_dim: false,
    ffn: "intermediate_size",
    ffn_times: 0,
    positions: "max_position_embeddings",
    default_positions: 2048,
    act: ("hidden_act", "silu"),
    eps: ("rms_norm_eps", 1e-6),
    rope: true,
    tied: false,
    vocab: "vocab_size",
    default_vocab: 0,
};

/// Reads those fields. The dimensions are the stack's `heads`, `kv_heads`, `ffn` and `vocab`; the other sizes
/// `hidden`, `head_dim` and `positions`.
pub(super) fn standard(f: &Fields, architecture: Architecture, names: &Names) -> Result<Draft> {
    let mut sizes = Sizes::default();
    let hidden_size = f.required(names.hidden, MAX_DIM)?;
    let num_attention_heads = f.required(names.heads, MAX_HEADS)?;
    sizes.set("hidden", hidden_size, names.hidden);
    sizes.set("heads", num_attention_heads, names.heads);
    let kv_heads = if names.kv_heads.is_empty() { None } else { f.size(names.kv_heads, MAX_HEADS)? };
    let num_key_value_heads = kv_heads.unwrap_or(num_attention_heads);
    sizes.set_or_assume("kv_heads", kv_heads, num_attention_heads, names.kv_heads);
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        return Err(f.error(
            names.kv_heads,
            format!("= {num_key_value_heads} must divide {} = {num_attention_heads}", names.heads),
        ));
    }
    let head_dim = if names.head_dim.is_empty() { None } else { f.size(names.head_dim, MAX_DIM)? };
    let derived = head_dim.is_none() && names.default_head_dim == 0 && !names.any_head_dim;
    if derived && !hidden_size.is_multiple_of(num_attention_heads) {
        return Err(f.error(
            names.hidden,
            format!("= {hidden_size} must be a multiple of {} = {num_attention_heads}", names.heads),
        ));
    }
    let default_head_dim = match names.default_head_dim {
        0 => (hidden_size / num_attention_heads).max(1),
        width => width,
    };
    sizes.set_or_assume("head_dim", head_dim, default_head_dim, names.head_dim);
    let head_dim = sizes.value("head_dim");
    f.check_heads(names.head_dim, head_dim, num_attention_heads)?;
    let ffn = f.size(names.ffn, MAX_DIM)?;
    if ffn.is_none() && names.ffn_times == 0 {
        return Err(f.error(names.ffn, "is missing"));
    }
    sizes.set_or_assume("ffn", ffn, hidden_size * names.ffn_times, names.ffn);
    let positions = f.size(names.positions, MAX_DIM)?;
    sizes.set_or_assume("positions", positions, names.default_positions, names.positions);
    if !names.vocab.is_empty() {
        let rows = f.size(names.vocab, MAX_DIM)?;
        if rows.is_none() && names.default_vocab == 0 {
            return Err(f.error(names.vocab, "is missing"));
        }
        sizes.set_or_assume("vocab", rows, names.default_vocab, names.vocab);
    }
    let num_layers = f.required(names.layers, MAX_LAYERS)?;
    let tied = f.flag("tie_word_embeddings")?.unwrap_or(names.tied);
    let sliding_window = match f.flag("use_sliding_window")? {
        Some(true) => f.size("sliding_window", MAX_DIM)?,
        _ => None,
    };
    let spec = ModelSpec {
        architecture,
        num_layers,
        hidden_size,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        intermediate_size: sizes.value("ffn"),
        vocab_size: sizes.get("vocab").map_or(0, |s| s.value),
        max_position_embeddings: sizes.value("positions"),
        hidden_act: f.text(names.act.0)?.unwrap_or(names.act.1).to_owned(),
        norm_eps: f.positive(names.eps.0)?.unwrap_or(names.eps.1),
        rope: if names.rope { Some(rope(f)?) } else { None },
        sliding_window,
        tie_word_embeddings: tied,
        eos_token_ids: f.tokens("eos_token_id")?,
        dtype: dtype(f)?,
        source: PathBuf::from(f.file),
        ..ModelSpec::empty(architecture)
    };
    let mut draft = Draft::new(spec, sizes, num_layers);
    draft.flag("tied", tied);
    Ok(draft)
}

impl Sizes {
    /// The configured value, or a default that the weights may correct.
    pub(super) fn set_or_assume(
        &mut self,
        name: &'static str,
        value: Option<usize>,
        default: usize,
        field: &'static str,
    ) {
        match value {
            Some(value) => self.set(name, value, field),
            None => self.assume(name, default, field),
        }
    }
}

impl Draft {
    pub(super) fn flag(&mut self, name: &'static str, on: bool) {
        if on {
            self.flags.insert(name);
        }
    }

    /// Which linear layers have a bias.
    pub(super) fn bias(&mut self, qkv: bool, attention_output: bool, mlp: bool) {
        self.flag("qkv_bias", qkv);
        self.flag("attention_output_bias", attention_output);
        self.flag("mlp_bias", mlp);
        self.spec.qkv_bias = qkv;
        self.spec.attention_output_bias = attention_output;
        self.spec.mlp_bias = mlp;
    }
}

/// The type the weights are stored in, which newer files call `dtype`; float32 where none is named.
pub(super) fn dtype(f: &Fields) -> Result<DType> {
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
pub(super) struct Fields<'a> {
    pub(super) map: &'a Map<String, Value>,
    pub(super) file: &'a str,
    /// Where the object is in the file: empty, or such as `rope_scaling.`.
    path: String,
}

impl<'a> Fields<'a> {
    /// Something that the rules would shard wrongly.
    pub(super) fn unsupported(&self, what: impl Into<String>) -> Error {
        Error::Unsupported { file: self.file.to_owned(), what: what.into() }
    }

    /// Refuses heads that are together wider than any model.
    pub(super) fn check_heads(&self, field: &str, head_dim: usize, heads: usize) -> Result<()> {
        // Both factors are far below 2^32, so their product fits.
        if head_dim * heads > MAX_DIM {
            return Err(self.error(field, format!("= {head_dim} times {heads} heads is above {MAX_DIM}")));
        }
        Ok(())
    }

    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    pub(super) fn error(&self, field: &str, problem: impl Into<String>) -> Error {
        let field = format!("{}{field}", self.path);
        Error::Config { file: self.file.to_owned(), field, problem: problem.into() }
    }

    pub(super) fn wrong(&self, field: &str, expected: &str, found: &Value) -> Error {
        let mut found = found.to_string();
        if found.len() > 60 {
            found = format!("{}...", found.chars().take(60).collect::<String>());
        }
        self.error(field, format!("must be {expected}, not {found}"))
    }

    /// A whole number from 1 to `limit`.
    pub(super) fn size(&self, field: &str, limit: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=limit).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(self.wrong(field, &format!("a whole number from 1 to {limit}"), value)),
        }
    }

    /// A whole number from 0 to `limit`.
    pub(super) fn count(&self, field: &str, limit: usize) -> Result<Option<usize>> {
        match self.get(field) {
            Some(value) if value.as_u64() == Some(0) => Ok(Some(0)),
            _ => self.size(field, limit),
        }
    }

    /// Three whole numbers from 1 to `limit`.
    pub(super) fn sizes(&self, field: &str, limit: usize) -> Result<Option<[usize; 3]>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let one =
            |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=limit).contains(n));
        let three: Option<Vec<usize>> = value.as_array().and_then(|list| list.iter().map(one).collect());
        match three.as_deref() {
            Some(&[a, b, c]) => Ok(Some([a, b, c])),
            _ => Err(self.wrong(field, &format!("three whole numbers from 1 to {limit}"), value)),
        }
    }

    pub(super) fn required(&self, field: &str, limit: usize) -> Result<usize> {
        self.size(field, limit)?.ok_or_else(|| self.error(field, "is missing"))
    }

    pub(super) fn positive(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
            Some(x) => Ok(Some(x)),
            None => Err(self.wrong(field, "a number above 0", value)),
        }
    }

    pub(super) fn required_positive(&self, field: &str) -> Result<f64> {
        self.positive(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(field, "true or false", value))
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(field, "a string", value))
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Fields<'a>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Fields { map, file: self.file, path: format!("{}{field}.", self.path) })),
            None => Err(self.wrong(field, "an object", value)),
        }
    }

    /// One token or a list of tokens.
    pub(super) fn tokens(&self, field: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let tokens = match value {
            Value::Array(list) => list.iter().map(one).collect::<Option<Vec<u32>>>(),
            other => one(other).map(|t| vec![t]),
        };
        tokens.ok_or_else(|| self.wrong(field, "a token number or a list of them", value))
    }
}
