//! Small models in a directory, as they come from a hub.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::Path;

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tensorwire::topology::ModelSpec;

const WORDS: [&str; 12] =
    ["[UNK]", "the", "sea", "is", "wide", "and", "deep", "a", "ship", "sails", "under", "stars"];

/// A Qwen2-shaped decoder with awkward numbers: 14 query heads, 2 key/value heads, a vocabulary of 101.
pub(crate) fn decoder() -> TempDir {
    model(json!({
        "model_type": "qwen2", "hidden_size": 56, "num_hidden_layers": 2, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 99, "vocab_size": 101, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false,
        "torch_dtype": "float32",
    }))
}

/// A BERT-shaped encoder of 3 heads.
pub(crate) fn encoder() -> TempDir {
    model(json!({
        "model_type": "bert", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 50, "vocab_size": 31, "max_position_embeddings": 16, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu", "torch_dtype": "float32",
    }))
}

fn model(config: Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = config.to_string();
    std::fs::write(dir.path().join("config.json"), &config).unwrap();
    write_weights(&dir.path().join("model.safetensors"), &ModelSpec::from_config(&config).unwrap());
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    dir
}

/// Every tensor that the configuration means, with numbers that follow from its name.
fn write_weights(path: &Path, spec: &ModelSpec) {
    let (mut header, mut data) = (Map::new(), Vec::<u8>::new());
    for tensor in &spec.tensors {
        let start = data.len();
        let mut state =
            tensor.name.bytes().fold(1u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let norm = tensor.name.ends_with("norm.weight") || tensor.name.ends_with("LayerNorm.weight");
        for _ in 0..tensor.elements() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let unit = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            let value = if norm { 1.0 + unit } else { unit };
            data.extend(value.to_le_bytes());
        }
        let entry = json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(data);
    std::fs::write(path, file).unwrap();
}

fn tokenizer() -> Value {
    let vocab: Map<String, Value> = WORDS.iter().zip(0..).map(|(w, id)| (w.to_string(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    })
}
