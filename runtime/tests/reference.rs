//! The unsharded run against a reference of its own: the decoder written out in f64 loops, without a cache,
//! reading the same safetensors file with the safetensors crate.

mod common;

use std::collections::HashMap;

use common::{PROMPT, Shape, generate, write_model};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tensorwire_runtime::Model;

const TOKENS: usize = 6;

type Row = Vec<f64>;

struct Reference {
    config: Value,
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Reference {
    fn number(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap() as usize
    }

    /// `weight x + bias`, the bias where there is one.
    fn linear(&self, name: &str, x: &Row) -> Row {
        let (shape, weight) = &self.tensors[&format!("{name}.weight")];
        assert_eq!(shape[1], x.len(), "{name}");
        let bias = self.tensors.get(&format!("{name}.bias"));
        (0..shape[0])
            .map(|o| {
                let sum: f64 = (0..shape[1]).map(|i| weight[o * shape[1] + i] * x[i]).sum();
                sum + bias.map_or(0.0, |(_, b)| b[o])
            })
            .collect()
    }

    fn norm(&self, name: &str, x: &Row) -> Row {
        let weight = &self.tensors[&format!("{name}.weight")].1;
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + self.config["rms_norm_eps"].as_f64().unwrap()).sqrt();
        x.iter().zip(weight).map(|(v, w)| v * scale * w).collect()
    }

    /// Radians a place of each pair of elements.
    fn frequency(&self, pair: usize) -> f64 {
        let base = self.config["rope_theta"].as_f64().unwrap();
        let plain = 1.0 / base.powf(2.0 * pair as f64 / self.number("head_dim") as f64);
        let scaling = &self.config["rope_scaling"];
        if scaling.is_null() {
            return plain;
        }
        // As the Llama 3.1 model card's code has it: by wavelength, in three cases.
        let get = |key: &str| scaling[key].as_f64().unwrap();
        let old = get("original_max_position_embeddings");
        let wavelength = 2.0 * std::f64::consts::PI / plain;
        if wavelength < old / get("high_freq_factor") {
            plain
        } else if wavelength > old / get("low_freq_factor") {
            plain / get("factor")
        } else {
            let smooth = (old / wavelength - get("low_freq_factor"))
                / (get("high_freq_factor") - get("low_freq_factor"));
            (1.0 - smooth) * plain / get("factor") + smooth * plain
        }
    }

    /// Rotates one head's vector, elements `i` and `i + half` being a pair.
    fn rotate(&self, head: &[f64], place: usize) -> Row {
        let half = head.len() / 2;
        let mut out = head.to_vec();
        for i in 0..half {
            let (sin, cos) = (place as f64 * self.frequency(i)).sin_cos();
            out[i] = head[i] * cos - head[i + half] * sin;
            out[i + half] = head[i + half] * cos + head[i] * sin;
        }
        out
    }

    fn attention(&self, layer: &str, x: &[Row]) -> Vec<Row> {
        let (heads, kv_heads) = (self.number("num_attention_heads"), self.number("num_key_value_heads"));
        let d = self.number("head_dim");
        let project = |name: &str| -> Vec<Row> {
            x.iter().map(|row| self.linear(&format!("{layer}.self_attn.{name}_proj"), row)).collect()
        };
        let (q, k, v) = (project("q"), project("k"), project("v"));
        let mut out = Vec::new();
        for (t, queries) in q.iter().enumerate() {
            let mut row = Vec::new();
            for h in 0..heads {
                let g = h / (heads / kv_heads);
                let query = self.rotate(&queries[h * d..(h + 1) * d], t);
                let scores: Row = (0..=t)
                    .map(|s| {
                        let key = self.rotate(&k[s][g * d..(g + 1) * d], s);
                        query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt()
                    })
                    .collect();
                let top = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
                let all: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                for i in 0..d {
                    row.push((0..=t).map(|s| (scores[s] - top).exp() / all * v[s][g * d + i]).sum());
                }
            }
            out.push(self.linear(&format!("{layer}.self_attn.o_proj"), &row));
        }
        out
    }

    /// The logits after the last of `ids`.
    fn logits(&self, ids: &[u32]) -> Row {
        let width = self.number("hidden_size");
        let table = &self.tensors["model.embed_tokens.weight"].1;
        let row = |&id: &u32| table[id as usize * width..(id as usize + 1) * width].to_vec();
        let mut x: Vec<Row> = ids.iter().map(row).collect();
        for n in 0..self.number("num_hidden_layers") {
            let layer = format!("model.layers.{n}");
            let normed: Vec<Row> =
                x.iter().map(|row| self.norm(&format!("{layer}.input_layernorm"), row)).collect();
            for (row, new) in x.iter_mut().zip(self.attention(&layer, &normed)) {
                row.iter_mut().zip(new).for_each(|(a, b)| *a += b);
                let normed = self.norm(&format!("{layer}.post_attention_layernorm"), row);
                let gate = self.linear(&format!("{layer}.mlp.gate_proj"), &normed);
                let up = self.linear(&format!("{layer}.mlp.up_proj"), &normed);
                let inner = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                let down = self.linear(&format!("{layer}.mlp.down_proj"), &inner);
                row.iter_mut().zip(down).for_each(|(a, b)| *a += b);
            }
        }
        let tied = self.config["tie_word_embeddings"].as_bool().unwrap();
        let head = if tied { "model.embed_tokens" } else { "lm_head" };
        self.linear(head, &self.norm("model.norm", x.last().unwrap()))
    }
}

fn agrees(config: &str) {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), config, Dtype::F32, 1);
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = tensors.iter().map(|(name, view)| {
        let data = view.data().as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect();
        (name.to_owned(), (view.shape().to_vec(), data))
    });
    let reference = Reference { config: serde_json::from_str(config).unwrap(), tensors: tensors.collect() };

    let run = generate(&Model::open(dir.path()).unwrap(), 1, TOKENS).remove(0);
    let mut ids = PROMPT.to_vec();
    for (token, logits) in run.tokens.iter().zip(&run.logits) {
        let expected = reference.logits(&ids);
        assert_eq!(expected.len(), logits.len());
        let diff = expected.iter().zip(logits).map(|(e, &l)| (e - f64::from(l)).abs()).fold(0.0, f64::max);
        let best = (0..expected.len()).max_by(|&a, &b| expected[a].total_cmp(&expected[b])).unwrap();
        assert!(diff < 2e-5, "after {} tokens: {diff}", ids.len());
        assert_eq!(best as u32, *token, "after {} tokens", ids.len());
        ids.push(*token);
    }
    assert_eq!(ids.len(), PROMPT.len() + TOKENS);
}

const SHAPE: Shape =
    Shape { model_type: "llama", heads: 9, kv_heads: 3, head_dim: 8, ffn: 101, vocab: 503, tied: true };

#[test]
fn llama() {
    agrees(&SHAPE.config());
}

#[test]
fn llama_with_its_own_head_and_no_groups() {
    agrees(&Shape { heads: 4, kv_heads: 4, head_dim: 16, tied: false, ..SHAPE }.config());
}

#[test]
fn llama_with_stretched_positions() {
    // The frequencies of 16 elements and an original context of 64 fall into all three cases.
    let scaling = r#""rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, "rope_theta": 10000.0"#;
    let shape = Shape { heads: 4, kv_heads: 2, head_dim: 16, ..SHAPE };
    let config = shape.config().replace(r#""rope_theta": 10000.0"#, scaling);
    assert!(config.contains("llama3"));
    agrees(&config);
}

#[test]
fn qwen2_with_biases() {
    agrees(&Shape { model_type: "qwen2", heads: 14, kv_heads: 2, ..SHAPE }.config());
}

#[test]
fn llama_with_biases_everywhere() {
    let biases = r#""attention_bias": true, "mlp_bias": true, "rope_theta""#;
    let config = SHAPE.config().replace(r#""rope_theta""#, biases);
    assert!(config.contains("mlp_bias"));
    agrees(&config);
}
