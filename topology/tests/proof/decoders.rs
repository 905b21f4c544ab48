//! Decoders: a token sees those before it.

use super::attention::{Pairs, Scores, rotate};
use super::group::{Each, Group, Heads};
use super::moe::{experts, gated_mlp};
use super::tensor::{Tensor, gelu, silu};

/// The tokens that every toy reads: so many that each expert gets some.
pub(crate) const TOKENS: [usize; 12] = [3, 141, 59, 26, 189, 0, 97, 150, 33, 72, 111, 165];

/// Llama and what has its frame: norms before (Gemma: and after) attention and feed-forward layer.
pub(crate) fn llama(g: &Group) -> Each {
    let c = g.config;
    let gemma = c.text("model_type").starts_with("gemma");
    let norm =
        |name: &str, x: &Each| g.rms_norm(name, x, c.real("rms_norm_eps"), if gemma { 1.0 } else { 0.0 });
    let mut x = g.embed("model.embed_tokens", &TOKENS);
    if gemma {
        let scale = (c.get("hidden_size") as f64).sqrt();
        x = x.map(|t| t.map(|v| v * scale));
    }
    for n in 0..c.get("num_hidden_layers") {
        let of = |part: &str| format!("model.layers.{n}.{part}");
        let a = norm(&of("input_layernorm"), &x);
        let a = if g.has(&of("self_attn.kv_b_proj.weight")) { latent(g, n, &a) } else { grouped(g, n, &a) };
        if gemma {
            x = x.add(&norm(&of("post_attention_layernorm"), &a));
            let m = feed_forward(g, n, &norm(&of("pre_feedforward_layernorm"), &x));
            x = x.add(&norm(&of("post_feedforward_layernorm"), &m));
        } else {
            x = x.add(&a);
            x = x.add(&feed_forward(g, n, &norm(&of("post_attention_layernorm"), &x)));
        }
    }
    let x = norm("model.norm", &x);
    let head = if c.is("tie_word_embeddings") { "model.embed_tokens" } else { "lm_head" };
    let logits = g.logits("lm_head", head, &x);
    match c.0["final_logit_softcapping"].as_f64() {
        Some(cap) => logits.map(|t| t.map(|v| cap * (v / cap).tanh())),
        None => logits,
    }
}

/// Multi-head, grouped-query or multi-query attention, and what models add to it.
fn grouped(g: &Group, n: usize, x: &Each) -> Each {
    let c = g.config;
    let of = |part: &str| format!("model.layers.{n}.self_attn.{part}");
    let heads = c.get("num_attention_heads");
    let dim = c.find("head_dim").unwrap_or(c.get("hidden_size") / heads);
    let heads = Heads::new(format!("model.layers.{n}"), heads, c.get("num_key_value_heads"), dim);
    let [q, k, v] = if g.has(&of("qkv_proj.weight")) || g.has(&of("qkv_proj.qweight")) {
        g.split_qkv(&heads, &g.linear(&of("qkv_proj"), x))
    } else {
        ["q_proj", "k_proj", "v_proj"].map(|part| g.linear(&of(part), x))
    };
    let local = c.0["layer_types"][n] == "sliding_attention";
    let theta = match c.0["rope_local_base_freq"].as_f64() {
        Some(theta) if local => theta,
        _ => c.real("rope_theta"),
    };
    let [q, k] = [(q, "q_norm"), (k, "k_norm")].map(|(x, norm)| {
        let gemma = c.text("model_type").starts_with("gemma");
        let x = match g.has(&of(&format!("{norm}.weight"))) {
            true => g.head_norm(&of(norm), &x, c.real("rms_norm_eps"), if gemma { 1.0 } else { 0.0 }),
            false => x,
        };
        x.map(|t| rotate(t, dim, dim, theta, Pairs::Halves))
    });
    let everywhere = c.0["layer_types"].is_null();
    let scores = Scores {
        scale: c.0["query_pre_attn_scalar"].as_f64().unwrap_or(dim as f64).powf(-0.5),
        cap: c.0["attn_logit_softcapping"].as_f64(),
        window: c.find("sliding_window").filter(|_| local || everywhere),
        ..Scores::causal(dim)
    };
    let sinks = of("sinks");
    let a = g.attention_with(
        &heads,
        &scores,
        (&q, &k, &v),
        |_, _, _, _| 0.0,
        |rank| g.has(&sinks).then(|| g.tensor(rank, &sinks).data.clone()),
    );
    g.row_linear(&of("o_proj"), &a)
}

/// DeepSeek's multi-head latent attention: queries, keys and values of all heads come from short vectors.
fn latent(g: &Group, n: usize, x: &Each) -> Each {
    let c = g.config;
    let of = |part: &str| format!("model.layers.{n}.self_attn.{part}");
    let (eps, theta) = (c.real("rms_norm_eps"), c.real("rope_theta"));
    let (plain, turned) = (c.get("qk_nope_head_dim"), c.get("qk_rope_head_dim"));
    let (dim, v_dim, rank_of_kv) = (plain + turned, c.get("v_head_dim"), c.get("kv_lora_rank"));
    let heads = c.get("num_attention_heads");
    let heads = Heads::new(format!("model.layers.{n}"), heads, heads, dim);
    let turn = |t: &Tensor| rotate(t, turned, turned, theta, Pairs::Neighbours);

    let q = match c.find("q_lora_rank") {
        Some(_) => {
            let short = g.rms_norm(&of("q_a_layernorm"), &g.linear(&of("q_a_proj"), x), eps, 0.0);
            g.linear(&of("q_b_proj"), &short)
        }
        None => g.linear(&of("q_proj"), x),
    };
    let q = q.map(|t| {
        let head = |h: usize| {
            let start = h * dim;
            let last = turn(&t.columns(start + plain..start + dim));
            [t.columns(start..start + plain), last]
        };
        Tensor::beside(&(0..t.cols() / dim).flat_map(head).collect::<Vec<_>>())
    });

    let short = g.linear(&of("kv_a_proj_with_mqa"), x);
    let shared_key = short.map(|t| turn(&t.columns(rank_of_kv..rank_of_kv + turned)));
    let short = short.map(|t| t.columns(0..rank_of_kv));
    let kv = g.linear(&of("kv_b_proj"), &g.rms_norm(&of("kv_a_layernorm"), &short, eps, 0.0));
    let each_head = plain + v_dim;
    let k = kv.with(&shared_key, |t, shared| {
        let head = |h: usize| [t.columns(h * each_head..h * each_head + plain), shared.clone()];
        Tensor::beside(&(0..t.cols() / each_head).flat_map(head).collect::<Vec<_>>())
    });
    let v = kv.map(|t| {
        let head = |h: usize| t.columns(h * each_head + plain..(h + 1) * each_head);
        Tensor::beside(&(0..t.cols() / each_head).map(head).collect::<Vec<_>>())
    });
    g.row_linear(&of("o_proj"), &g.attention(&heads, &Scores::causal(dim), (&q, &k, &v)))
}

fn feed_forward(g: &Group, n: usize, x: &Each) -> Each {
    let mlp = format!("model.layers.{n}.mlp");
    if g.has(&format!("{mlp}.gate_up_proj.weight")) {
        let half = |t: &Tensor| {
            let half = t.cols() / 2;
            t.columns(0..half).map(silu).mul(&t.columns(half..2 * half))
        };
        return g
            .row_linear(&format!("{mlp}.down_proj"), &g.linear(&format!("{mlp}.gate_up_proj"), x).map(half));
    }
    let gemma = g.config.text("model_type").starts_with("gemma");
    match g.has_module(&format!("{mlp}.gate_proj")) {
        true => {
            g.row_end(&format!("{mlp}.down_proj"), gated_mlp(g, &mlp, x, if gemma { gelu } else { silu }))
        }
        false => experts(g, &format!("model.layers.{n}"), x),
    }
}

/// GPT-2: learned positions, Conv1D weights `[input, output]`, a fused `[Q|K|V]`.
pub(crate) fn gpt2(g: &Group) -> Each {
    let c = g.config;
    let (eps, heads) = (c.real("layer_norm_epsilon"), c.get("n_head"));
    let dim = c.get("n_embd") / heads;
    let positions: Vec<usize> = (0..TOKENS.len()).collect();
    let mut x =
        g.embed("wte", &TOKENS).add(&g.each(|rank| g.tensor(rank, "wpe.weight").select(0, &positions)));
    for n in 0..c.get("n_layer") {
        let of = |part: &str| format!("h.{n}.{part}");
        let heads = Heads::new(format!("h.{n}"), heads, heads, dim);
        let normed = g.layer_norm(&of("ln_1"), &x, eps);
        let [q, k, v] = g.split_qkv(&heads, &g.linear(&of("attn.c_attn"), &normed));
        let a = g.attention(&heads, &Scores::causal(dim), (&q, &k, &v));
        x = x.add(&g.row_linear(&of("attn.c_proj"), &a));
        let inner = g.linear(&of("mlp.c_fc"), &g.layer_norm(&of("ln_2"), &x, eps)).map(|t| t.map(gelu));
        x = x.add(&g.row_linear(&of("mlp.c_proj"), &inner));
    }
    g.logits("lm_head", "wte", &g.layer_norm("ln_f", &x, eps))
}

/// GPT-NeoX: q, k and v fused by head, attention and feed-forward layer side by side.
pub(crate) fn gpt_neox(g: &Group) -> Each {
    let c = g.config;
    let (eps, heads) = (c.real("layer_norm_eps"), c.get("num_attention_heads"));
    let dim = c.get("hidden_size") / heads;
    let rotary = (dim as f64 * c.real("rotary_pct")) as usize;
    let mut x = g.embed("gpt_neox.embed_in", &TOKENS);
    for n in 0..c.get("num_hidden_layers") {
        let of = |part: &str| format!("gpt_neox.layers.{n}.{part}");
        let heads = Heads::new(format!("gpt_neox.layers.{n}"), heads, heads, dim);
        let fused =
            g.linear(&of("attention.query_key_value"), &g.layer_norm(&of("input_layernorm"), &x, eps));
        let [q, k, v] = [0, 1, 2].map(|part| every(&fused, 3 * dim, part * dim..(part + 1) * dim));
        let [q, k] = [q, k].map(|x| x.map(|t| rotate(t, dim, rotary, 10_000.0, Pairs::Halves)));
        let a = g.attention(&heads, &Scores::causal(dim), (&q, &k, &v));
        let mlp = |x: &Each| {
            let normed = g.layer_norm(&of("post_attention_layernorm"), x, eps);
            g.linear(&of("mlp.dense_h_to_4h"), &normed).map(|t| t.map(gelu))
        };
        if c.is("use_parallel_residual") {
            x = x.add(&parallel(g, &of(""), ["attention.dense", "mlp.dense_4h_to_h"], [&a, &mlp(&x)]));
        } else {
            x = x.add(&g.row_linear(&of("attention.dense"), &a));
            x = x.add(&g.row_linear(&of("mlp.dense_4h_to_h"), &mlp(&x)));
        }
    }
    g.logits("embed_out", "embed_out", &g.layer_norm("gpt_neox.final_layer_norm", &x, eps))
}

/// Falcon: attention and feed-forward layer side by side, with one key/value head (7B) or groups (40B); or one
/// after the other, with a key/value head for each query head (RW).
pub(crate) fn falcon(g: &Group) -> Each {
    let c = g.config;
    let (eps, heads) = (c.real("layer_norm_epsilon"), c.get("num_attention_heads"));
    let dim = c.get("hidden_size") / heads;
    let [grouped, beside] = ["new_decoder_architecture", "parallel_attn"].map(|flag| c.is(flag));
    let kv_heads = match (grouped, c.is("multi_query")) {
        (true, _) => c.get("num_kv_heads"),
        (_, true) => 1,
        _ => heads,
    };
    let norms = match (grouped, beside) {
        (true, _) => ["ln_attn", "ln_mlp"],
        (_, true) => ["input_layernorm"; 2],
        _ => ["input_layernorm", "post_attention_layernorm"],
    };
    let mut x = g.embed("transformer.word_embeddings", &TOKENS);
    for n in 0..c.get("num_hidden_layers") {
        let of = |part: &str| format!("transformer.h.{n}.{part}");
        let heads = Heads::new(format!("transformer.h.{n}"), heads, kv_heads, dim);
        let normed = g.layer_norm(&of(norms[0]), &x, eps);
        let fused = g.linear(&of("self_attention.query_key_value"), &normed);
        let [q, k, v] = g.split_groups(&heads, &fused);
        let [q, k] = [q, k].map(|x| x.map(|t| rotate(t, dim, dim, 10_000.0, Pairs::Halves)));
        let a = g.attention(&heads, &Scores::causal(dim), (&q, &k, &v));
        let mlp = |x: &Each| {
            let normed = g.layer_norm(&of(norms[1]), x, eps);
            g.linear(&of("mlp.dense_h_to_4h"), &normed).map(|t| t.map(gelu))
        };
        if beside {
            let modules = ["self_attention.dense", "mlp.dense_4h_to_h"];
            x = x.add(&parallel(g, &of(""), modules, [&a, &mlp(&x)]));
        } else {
            x = x.add(&g.row_linear(&of("self_attention.dense"), &a));
            x = x.add(&g.row_linear(&of("mlp.dense_4h_to_h"), &mlp(&x)));
        }
    }
    let head = if g.has("lm_head.weight") { "lm_head" } else { "transformer.word_embeddings" };
    g.logits("lm_head", head, &g.layer_norm("transformer.ln_f", &x, eps))
}

/// Two row-parallel layers that are summed by one exchange.
fn parallel(g: &Group, layer: &str, modules: [&str; 2], inputs: [&Each; 2]) -> Each {
    let [first, second] = modules.map(|m| format!("{layer}{m}"));
    let sum = g.product(&first, inputs[0]).add(&g.product(&second, inputs[1]));
    let both = format!("{layer}{} + {}", modules[0], modules[1]);
    g.row_end_with(&both, &[&first, &second], sum)
}

/// The columns `part` of each run of `width`.
fn every(x: &Each, width: usize, part: std::ops::Range<usize>) -> Each {
    x.map(|t| {
        let columns = (0..t.cols()).filter(|c| part.contains(&(c % width)));
        t.select(1, &columns.collect::<Vec<_>>())
    })
}
