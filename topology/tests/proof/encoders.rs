//! Encoders: all positions at once.

use super::attention::Scores;
use super::decoders::TOKENS;
use super::group::{Each, Group};
use super::tensor::gelu;

pub(crate) fn bert(g: &Group) -> Each {
    let c = g.config;
    let (heads, eps) = (c.get("num_attention_heads"), c.real("layer_norm_eps"));
    let scores = Scores::full(c.get("hidden_size") / heads);
    let positions: Vec<usize> = (0..TOKENS.len()).collect();
    let plain = |table: &str, rows: &[usize]| {
        g.each(|rank| g.tensor(rank, &format!("embeddings.{table}.weight")).select(0, rows))
    };
    let x = g.embed("embeddings.word_embeddings", &TOKENS);
    let x = x.add(&plain("position_embeddings", &positions));
    let x = x.add(&plain("token_type_embeddings", &[0, 0, 0, 0, 1, 1, 1]));
    let mut x = g.layer_norm("embeddings.LayerNorm", &x, eps);
    for n in 0..c.get("num_hidden_layers") {
        let layer = format!("encoder.layer.{n}");
        let of = |part: &str| format!("{layer}.{part}");
        let [q, k, v] = ["query", "key", "value"].map(|p| g.linear(&of(&format!("attention.self.{p}")), &x));
        let a = g.attention(&layer, (heads, heads), &scores, (&q, &k, &v));
        let a = x.add(&g.row_linear(&of("attention.output.dense"), &a));
        x = g.layer_norm(&of("attention.output.LayerNorm"), &a, eps);
        let inner = g.linear(&of("intermediate.dense"), &x).map(|t| t.map(gelu));
        let outer = x.add(&g.row_linear(&of("output.dense"), &inner));
        x = g.layer_norm(&of("output.LayerNorm"), &outer, eps);
    }
    x
}
