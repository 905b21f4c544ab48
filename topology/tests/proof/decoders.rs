//! Decoders: one token after the other.

use super::attention::{Pairs, Scores, rotate};
use super::group::{Each, Group};
use super::tensor::silu;

/// The tokens that every toy reads.
pub(crate) const TOKENS: [usize; 7] = [3, 141, 59, 26, 150, 0, 97];

/// Llama and what has its shape.
pub(crate) fn llama(g: &Group) -> Each {
    let c = g.config;
    let eps = c.real("rms_norm_eps");
    let mut x = g.embed("model.embed_tokens", &TOKENS);
    for n in 0..c.get("num_hidden_layers") {
        let layer = format!("model.layers.{n}");
        let normed = g.rms_norm(&format!("{layer}.input_layernorm"), &x, eps, 0.0);
        x = x.add(&llama_attention(g, &layer, &normed));
        let normed = g.rms_norm(&format!("{layer}.post_attention_layernorm"), &x, eps, 0.0);
        x = x.add(&gated_mlp(g, &format!("{layer}.mlp"), &normed, silu));
    }
    let x = g.rms_norm("model.norm", &x, eps, 0.0);
    let head = if c.is("tie_word_embeddings") { "model.embed_tokens" } else { "lm_head" };
    g.logits("lm_head", head, &x)
}

fn llama_attention(g: &Group, layer: &str, x: &Each) -> Each {
    let c = g.config;
    let heads = c.get("num_attention_heads");
    let kv_heads = c.find("num_key_value_heads").unwrap_or(heads);
    let dim = c.find("head_dim").unwrap_or(c.get("hidden_size") / heads);
    let of = |part: &str| format!("{layer}.self_attn.{part}");
    let turned = |x: Each| x.map(|t| rotate(t, dim, dim, c.real("rope_theta"), Pairs::Halves));
    let q = turned(g.linear(&of("q_proj"), x));
    let k = turned(g.linear(&of("k_proj"), x));
    let v = g.linear(&of("v_proj"), x);
    let scores = Scores { window: c.find("sliding_window"), ..Scores::causal(dim) };
    g.row_linear(&of("o_proj"), &g.attention(layer, (heads, kv_heads), &scores, (&q, &k, &v)))
}

fn gated_mlp(g: &Group, mlp: &str, x: &Each, activation: fn(f64) -> f64) -> Each {
    let gate = g.linear(&format!("{mlp}.gate_proj"), x).map(|t| t.map(activation));
    let up = g.linear(&format!("{mlp}.up_proj"), x);
    g.row_linear(&format!("{mlp}.down_proj"), &gate.mul(&up))
}
