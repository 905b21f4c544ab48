//! Encoders, which see all positions at once, and T5's decoder, which looks at its encoder's output.

use super::attention::{Scores, bucket};
use super::decoders::TOKENS;
use super::group::{Each, Group, Heads};
use super::tensor::{Tensor, gelu, relu};
use super::weights::uniform;

pub(crate) fn bert(g: &Group) -> Each {
    let c = g.config;
    let (heads, eps) = (c.get("num_attention_heads"), c.real("layer_norm_eps"));
    let dim = c.get("hidden_size") / heads;
    let positions: Vec<usize> = (0..TOKENS.len()).collect();
    let plain = |table: &str, rows: &[usize]| {
        g.each(|rank| g.tensor(rank, &format!("embeddings.{table}.weight")).select(0, rows))
    };
    let x = g.embed("embeddings.word_embeddings", &TOKENS);
    let x = x.add(&plain("position_embeddings", &positions));
    let segments: Vec<usize> = (0..TOKENS.len()).map(|i| i / 7).collect();
    let x = x.add(&plain("token_type_embeddings", &segments));
    let mut x = g.layer_norm("embeddings.LayerNorm", &x, eps);
    for n in 0..c.get("num_hidden_layers") {
        let of = |part: &str| format!("encoder.layer.{n}.{part}");
        let heads = Heads::new(format!("encoder.layer.{n}"), heads, heads, dim);
        let [q, k, v] = ["query", "key", "value"].map(|p| g.linear(&of(&format!("attention.self.{p}")), &x));
        let a = g.attention(&heads, &Scores::full(dim), (&q, &k, &v));
        let a = x.add(&g.row_linear(&of("attention.output.dense"), &a));
        x = g.layer_norm(&of("attention.output.LayerNorm"), &a, eps);
        let inner = g.linear(&of("intermediate.dense"), &x).map(|t| t.map(gelu));
        let outer = x.add(&g.row_linear(&of("output.dense"), &inner));
        x = g.layer_norm(&of("output.LayerNorm"), &outer, eps);
    }
    x
}

/// What the decoder of T5 has written.
pub(crate) const WRITTEN: [usize; 5] = [0, 59, 3, 141, 88];

pub(crate) fn t5(g: &Group) -> Each {
    let c = g.config;
    let seen = t5_stack(g, "encoder", &g.embed("shared", &TOKENS), None);
    let x = t5_stack(g, "decoder", &g.embed("shared", &WRITTEN), Some(&seen));
    if !c.is("tie_word_embeddings") {
        return g.logits("lm_head", "lm_head", &x);
    }
    let scale = (c.get("d_model") as f64).powf(-0.5);
    g.logits("lm_head", "shared", &x.map(|t| t.map(|v| v * scale)))
}

/// T5's encoder, or its decoder, which looks at what the encoder has `seen`.
fn t5_stack(g: &Group, stack: &str, x: &Each, seen: Option<&Each>) -> Each {
    let c = g.config;
    let eps = c.real("layer_norm_epsilon");
    let layers = c.find("num_decoder_layers").filter(|_| seen.is_some()).unwrap_or(c.get("num_layers"));
    let mut x = x.clone();
    for n in 0..layers {
        let of = |part: &str| format!("{stack}.block.{n}.layer.{part}");
        let normed = g.rms_norm(&of("0.layer_norm"), &x, eps, 0.0);
        let table = match g.has(&of("0.SelfAttention.relative_attention_bias.weight")) {
            true => of("0.SelfAttention.relative_attention_bias.weight"),
            false => format!("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        };
        x = x.add(&t5_attention(g, (stack, n), "0.SelfAttention", &normed, &normed, Some(&table)));
        let mut last = 1;
        if let Some(seen) = seen {
            let normed = g.rms_norm(&of("1.layer_norm"), &x, eps, 0.0);
            x = x.add(&t5_attention(g, (stack, n), "1.EncDecAttention", &normed, seen, None));
            last = 2;
        }
        let normed = g.rms_norm(&of(&format!("{last}.layer_norm")), &x, eps, 0.0);
        let of = |part: &str| of(&format!("{last}.DenseReluDense.{part}"));
        let inner = match g.has_module(&of("wi")) {
            true => g.linear(&of("wi"), &normed).map(|t| t.map(relu)),
            false => g.linear(&of("wi_0"), &normed).map(|t| t.map(gelu)).mul(&g.linear(&of("wi_1"), &normed)),
        };
        x = x.add(&g.row_linear(&of("wo"), &inner));
    }
    g.rms_norm(&format!("{stack}.final_layer_norm"), &x, eps, 0.0)
}

/// T5's attention of `x` to `seen`: no scale, and a bias that depends on the distance, a column a head.
fn t5_attention(
    g: &Group,
    (stack, n): (&str, usize),
    module: &str,
    x: &Each,
    seen: &Each,
    table: Option<&str>,
) -> Each {
    let c = g.config;
    let of = |part: &str| format!("{stack}.block.{n}.layer.{module}.{part}");
    let heads =
        Heads::new(format!("{stack}.block.{n}"), c.get("num_heads"), c.get("num_heads"), c.get("d_kv"));
    let heads = if table.is_none() { heads.cross() } else { heads };
    let (q, k, v) = (g.linear(&of("q"), x), g.linear(&of("k"), seen), g.linear(&of("v"), seen));
    let decodes = stack == "decoder";
    let bias = |rank, head, i: usize, j: usize| {
        table.map_or(0.0, |table| {
            let (buckets, farthest) =
                (c.get("relative_attention_num_buckets"), c.get("relative_attention_max_distance"));
            let row = bucket(j as i64 - i as i64, !decodes, buckets, farthest);
            let table = g.tensor(rank, table);
            assert_eq!(table.cols(), q.0[rank].cols() / c.get("d_kv"), "a column of the bias for each head");
            table.at(row, head)
        })
    };
    let scores = Scores { scale: 1.0, causal: decodes && table.is_some(), ..Scores::full(c.get("d_kv")) };
    g.row_linear(&of("o"), &g.attention_with(&heads, &scores, (&q, &k, &v), bias, |_| None))
}

/// Pixels, a row a patch.
fn patches(g: &Group) -> Each {
    let c = g.config;
    let side = c.get("image_size") / c.get("patch_size");
    let width = c.get("num_channels") * c.get("patch_size") * c.get("patch_size");
    g.same(&Tensor::of(&[side * side, width], |i| uniform("pixels", i)))
}

pub(crate) fn vit(g: &Group) -> Each {
    let c = g.config;
    let (heads, eps) = (c.get("num_attention_heads"), c.real("layer_norm_eps"));
    let dim = c.get("hidden_size") / heads;
    let x = g.linear("embeddings.patch_embeddings.projection", &patches(g));
    let class = |rank| g.tensor(rank, "embeddings.cls_token").reshape(&[1, c.get("hidden_size")]);
    let positions = |rank| {
        let table = g.tensor(rank, "embeddings.position_embeddings");
        table.reshape(&[table.cols() / c.get("hidden_size"), c.get("hidden_size")])
    };
    let mut x = g.each(|rank| Tensor::below(&[class(rank), x.0[rank].clone()]).add(&positions(rank)));
    for n in 0..c.get("num_hidden_layers") {
        let of = |part: &str| format!("encoder.layer.{n}.{part}");
        let heads = Heads::new(format!("encoder.layer.{n}"), heads, heads, dim);
        let normed = g.layer_norm(&of("layernorm_before"), &x, eps);
        let [q, k, v] =
            ["query", "key", "value"].map(|p| g.linear(&of(&format!("attention.attention.{p}")), &normed));
        let a = g.attention(&heads, &Scores::full(dim), (&q, &k, &v));
        x = x.add(&g.row_linear(&of("attention.output.dense"), &a));
        let normed = g.layer_norm(&of("layernorm_after"), &x, eps);
        let inner = g.linear(&of("intermediate.dense"), &normed).map(|t| t.map(gelu));
        x = x.add(&g.row_linear(&of("output.dense"), &inner));
    }
    g.layer_norm("layernorm", &x, eps)
}

/// SigLIP's picture encoder, which ends in one query's attention to all patches.
pub(crate) fn siglip(g: &Group) -> Each {
    let c = g.config;
    let (heads, eps) = (c.get("num_attention_heads"), c.real("layer_norm_eps"));
    let dim = c.get("hidden_size") / heads;
    let top = |part: &str| format!("vision_model.{part}");
    let x = g.linear(&top("embeddings.patch_embedding"), &patches(g));
    let mut x = g.each(|rank| x.0[rank].add(g.tensor(rank, &top("embeddings.position_embedding.weight"))));
    let mlp = |of: &dyn Fn(&str) -> String, x: &Each| {
        g.row_linear(&of("mlp.fc2"), &g.linear(&of("mlp.fc1"), x).map(|t| t.map(gelu)))
    };
    for n in 0..c.get("num_hidden_layers") {
        let of = |part: &str| top(&format!("encoder.layers.{n}.{part}"));
        let heads = Heads::new(top(&format!("encoder.layers.{n}")), heads, heads, dim);
        let normed = g.layer_norm(&of("layer_norm1"), &x, eps);
        let [q, k, v] =
            ["q_proj", "k_proj", "v_proj"].map(|p| g.linear(&of(&format!("self_attn.{p}")), &normed));
        let a = g.attention(&heads, &Scores::full(dim), (&q, &k, &v));
        x = x.add(&g.row_linear(&of("self_attn.out_proj"), &a));
        x = x.add(&mlp(&of, &g.layer_norm(&of("layer_norm2"), &x, eps)));
    }
    let x = g.layer_norm(&top("post_layernorm"), &x, eps);
    if !g.has(&top("head.probe")) {
        return x;
    }
    let of = |part: &str| top(&format!("head.{part}"));
    let heads = Heads::new(top("head"), heads, heads, dim);
    let probe = g.each(|rank| g.tensor(rank, &of("probe")).reshape(&[1, c.get("hidden_size")]));
    let fused = |x: &Each| {
        let product = |rank: usize| {
            let part = x.0[rank].times(g.tensor(rank, &of("attention.in_proj_weight")));
            part.add(g.tensor(rank, &of("attention.in_proj_bias")))
        };
        g.split_qkv(&heads, &g.each(product))
    };
    let ([q, ..], [_, k, v]) = (fused(&probe), fused(&x));
    let a = g.attention(&heads, &Scores::full(dim), (&q, &k, &v));
    let x = g.row_linear(&of("attention.out_proj"), &a);
    x.add(&mlp(&of, &g.layer_norm(&of("layernorm"), &x, eps)))
}
