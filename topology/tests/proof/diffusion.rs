//! Diffusion transformers: patches that look at each other and at a text, modulated by a point in time.

use super::attention::{Pairs, Scores, rotate_by};
use super::group::{Each, Group, Heads};
use super::tensor::{Tensor, gelu, silu, standardise};
use super::weights::uniform;

/// Patches of the toy's video or picture: frames, rows, columns.
const GRID: [usize; 3] = [2, 2, 3];
/// Tokens of the text.
const TEXT: usize = 5;
/// The point in time.
const TIME: f64 = 0.3;

fn input(g: &Group, name: &str, rows: usize, cols: usize) -> Each {
    g.same(&Tensor::of(&[rows, cols], |i| uniform(name, i)))
}

/// Where each patch is: frame, row, column.
fn positions() -> impl Iterator<Item = [usize; 3]> {
    let [frames, rows, cols] = GRID;
    (0..frames * rows * cols).map(move |i| [i / (rows * cols), i / cols % rows, i % cols])
}

/// The angles of one head's pairs at a position, of which `widths` elements belong to each axis.
fn angles(position: [usize; 3], widths: [usize; 3], theta: [f64; 3]) -> Vec<f64> {
    let axis = |a: usize| {
        (0..widths[a] / 2)
            .map(move |i| position[a] as f64 * theta[a].powf(-2.0 * i as f64 / widths[a] as f64))
    };
    (0..3).flat_map(axis).collect()
}

/// Cosines, then sines, of a point in time.
fn time_features(g: &Group, time: f64, width: usize) -> Each {
    let half = width / 2;
    let angle = |i: usize| time * 10_000f64.powf(-((i % half) as f64) / half as f64);
    g.same(&Tensor::matrix(1, width, |_, i| if i < half { angle(i).cos() } else { angle(i).sin() }))
}

/// The `i`-th of `n` runs of columns.
fn chunk(x: &Each, n: usize, i: usize) -> Each {
    x.map(|t| t.columns(t.cols() / n * i..t.cols() / n * (i + 1)))
}

/// LayerNorm without weights, then scaled and shifted by one row for all.
fn modulate(x: &Each, eps: f64, shift: &Each, scale: &Each) -> Each {
    let scaled = x.with(scale, |t, scale| standardise(t, eps).mul(&scale.map(|s| 1.0 + s)));
    scaled.add(shift)
}

fn activated(x: &Each, f: fn(f64) -> f64) -> Each {
    x.map(|t| t.map(f))
}

/// Two linear layers that every rank computes whole.
fn two(g: &Group, module: &str, x: &Each, f: fn(f64) -> f64) -> Each {
    g.linear(&format!("{module}.linear_2"), &activated(&g.linear(&format!("{module}.linear_1"), x), f))
}

/// The feed-forward layer of diffusers.
fn feed_forward(g: &Group, module: &str, x: &Each) -> Each {
    g.row_linear(&format!("{module}.net.2"), &activated(&g.linear(&format!("{module}.net.0.proj"), x), gelu))
}

fn tokens() -> usize {
    GRID.iter().product()
}

/// Cosmos: self-attention, cross-attention to the text, feed-forward layer, each modulated through a narrow
/// matrix.
pub(crate) fn cosmos(g: &Group) -> Each {
    let c = g.config;
    let (heads, dim) = (c.get("num_attention_heads"), c.get("attention_head_dim"));
    let hidden = heads * dim;
    let patch: usize = c.list("patch_size").iter().product();
    // The last channel is a mask of padding, of which there is none.
    let mask = Tensor::matrix(tokens(), patch, |_, _| 0.0);
    let latents = input(g, "latents", tokens(), c.get("in_channels") * patch);
    let latents = latents.map(|t| Tensor::beside(&[t.clone(), mask.clone()]));
    let text = input(g, "text", TEXT, c.get("text_embed_dim"));
    let mut x = g.linear("patch_embed.proj", &latents);

    let features = time_features(g, TIME, hidden);
    let temb = two(g, "time_embed.t_embedder", &features, silu);
    let time = activated(&g.rms_norm("time_embed.norm", &features, 1e-6, 0.0), silu);
    let place = g.each(|rank| {
        let table = |axis: &str| g.tensor(rank, &format!("learnable_pos_embed.pos_emb_{axis}"));
        let (t, h, w) = (table("t"), table("h"), table("w"));
        let row = |[f, r, c]: [usize; 3]| {
            let sum: Vec<f64> = (0..hidden).map(|i| t.at(f, i) + h.at(r, i) + w.at(c, i)).collect();
            let norm = sum.iter().map(|v| v * v).sum::<f64>().sqrt() / (hidden as f64).sqrt() + 1e-6;
            sum.into_iter().map(move |v| v / norm)
        };
        Tensor::new(&[tokens(), hidden], positions().flat_map(row).collect())
    });
    let side = dim / 6 * 2;
    let widths = [dim - 2 * side, side, side];
    let stretched = c.reals("rope_scale");
    let theta = [0, 1, 2].map(|a| {
        let width = widths[a] as f64;
        10_000.0 * stretched[a].powf(width / (width - 2.0))
    });
    let turned: Vec<Vec<f64>> = positions().map(|p| angles(p, widths, theta)).collect();

    for n in 0..c.get("num_layers") {
        let layer = format!("transformer_blocks.{n}");
        let of = |part: &str| format!("{layer}.{part}");
        let heads = || Heads::new(layer.clone(), heads, heads, dim);
        x = x.add(&place);
        let modulated = |norm: &str, x: &Each| {
            let m = g
                .linear(&of(&format!("{norm}.linear_2")), &g.linear(&of(&format!("{norm}.linear_1")), &time));
            let m = m.add(&temb);
            (modulate(x, 1e-6, &chunk(&m, 3, 0), &chunk(&m, 3, 1)), chunk(&m, 3, 2))
        };
        let attention = |module: &str, x: &Each, seen: &Each, turned: Option<&Vec<Vec<f64>>>| {
            let of = |part: &str| of(&format!("{module}.{part}"));
            let [q, k] = [("q", x), ("k", seen)].map(|(p, x)| {
                let normed =
                    g.head_norm(&of(&format!("norm_{p}")), &g.linear(&of(&format!("to_{p}")), x), 1e-6, 0.0);
                turned.map_or(normed.clone(), |by| normed.map(|t| rotate_by(t, dim, by, Pairs::Halves)))
            });
            let v = g.linear(&of("to_v"), seen);
            let heads = if turned.is_some() { heads() } else { heads().cross() };
            g.row_linear(&of("to_out.0"), &g.attention(&heads, &Scores::full(dim), (&q, &k, &v)))
        };
        let (normed, gate) = modulated("norm1", &x);
        x = x.add(&attention("attn1", &normed, &normed, Some(&turned)).mul(&gate));
        let (normed, gate) = modulated("norm2", &x);
        x = x.add(&attention("attn2", &normed, &text, None).mul(&gate));
        let (normed, gate) = modulated("norm3", &x);
        x = x.add(&feed_forward(g, &of("ff"), &normed).mul(&gate));
    }
    let m = g.linear("norm_out.linear_2", &g.linear("norm_out.linear_1", &time));
    let m = m.with(&temb, |m, t| m.add(&t.columns(0..2 * hidden)));
    g.linear("proj_out", &modulate(&x, 1e-6, &chunk(&m, 2, 0), &chunk(&m, 2, 1)))
}

/// Flux: blocks of two streams (picture and text, with their own weights, in one attention), then blocks of
/// one stream whose attention and feed-forward layer share the last matrix.
pub(crate) fn flux(g: &Group) -> Each {
    let c = g.config;
    let (heads, dim) = (c.get("num_attention_heads"), c.get("attention_head_dim"));
    let mut x = g.linear("x_embedder", &input(g, "latents", tokens(), c.get("in_channels")));
    let mut y = g.linear("context_embedder", &input(g, "text", TEXT, c.get("joint_attention_dim")));
    let pooled = input(g, "pooled", 1, c.get("pooled_projection_dim"));
    let mut time = two(g, "time_text_embed.timestep_embedder", &time_features(g, TIME * 1000.0, 256), silu);
    if c.is("guidance_embeds") {
        let guidance = time_features(g, 3500.0, 256);
        time = time.add(&two(g, "time_text_embed.guidance_embedder", &guidance, silu));
    }
    let time = activated(&time.add(&two(g, "time_text_embed.text_embedder", &pooled, silu)), silu);
    let widths: [usize; 3] = c.list("axes_dims_rope").try_into().unwrap();
    let text = std::iter::repeat_n([0, 0, 0], TEXT);
    let turned: Vec<Vec<f64>> = text.chain(positions()).map(|p| angles(p, widths, [10_000.0; 3])).collect();
    let turn = |x: &Each| x.map(|t| rotate_by(t, dim, &turned, Pairs::Neighbours));
    let first = |x: &Each| x.map(|t| t.select(0, &(0..TEXT).collect::<Vec<_>>()));
    let rest = |x: &Each| x.map(|t| t.select(0, &(TEXT..t.rows()).collect::<Vec<_>>()));
    let both = |y: &Each, x: &Each| y.with(x, |y, x| Tensor::below(&[y.clone(), x.clone()]));

    for n in 0..c.get("num_layers") {
        let layer = format!("transformer_blocks.{n}");
        let of = |part: &str| format!("{layer}.{part}");
        let heads = Heads::new(layer.clone(), heads, heads, dim);
        let m = g.linear(&of("norm1.linear"), &time);
        let w = g.linear(&of("norm1_context.linear"), &time);
        let normed = modulate(&x, 1e-6, &chunk(&m, 6, 0), &chunk(&m, 6, 1));
        let worded = modulate(&y, 1e-6, &chunk(&w, 6, 0), &chunk(&w, 6, 1));
        let joined = |word: &str, patch: &str, norms: Option<[&str; 2]>| {
            let part = |module: &str, x: &Each, norm: Option<&str>| {
                let x = g.linear(&of(&format!("attn.{module}")), x);
                norm.map_or(x.clone(), |norm| g.head_norm(&of(&format!("attn.{norm}")), &x, 1e-6, 0.0))
            };
            both(&part(word, &worded, norms.map(|n| n[0])), &part(patch, &normed, norms.map(|n| n[1])))
        };
        let q = turn(&joined("add_q_proj", "to_q", Some(["norm_added_q", "norm_q"])));
        let k = turn(&joined("add_k_proj", "to_k", Some(["norm_added_k", "norm_k"])));
        let v = joined("add_v_proj", "to_v", None);
        let a = g.attention(&heads, &Scores::full(dim), (&q, &k, &v));
        x = x.add(&g.row_linear(&of("attn.to_out.0"), &rest(&a)).mul(&chunk(&m, 6, 2)));
        y = y.add(&g.row_linear(&of("attn.to_add_out"), &first(&a)).mul(&chunk(&w, 6, 2)));
        let normed = modulate(&x, 1e-6, &chunk(&m, 6, 3), &chunk(&m, 6, 4));
        x = x.add(&feed_forward(g, &of("ff"), &normed).mul(&chunk(&m, 6, 5)));
        let worded = modulate(&y, 1e-6, &chunk(&w, 6, 3), &chunk(&w, 6, 4));
        y = y.add(&feed_forward(g, &of("ff_context"), &worded).mul(&chunk(&w, 6, 5)));
    }
    let mut x = both(&y, &x);
    for n in 0..c.get("num_single_layers") {
        let layer = format!("single_transformer_blocks.{n}");
        let of = |part: &str| format!("{layer}.{part}");
        let heads = Heads::new(layer.clone(), heads, heads, dim);
        let m = g.linear(&of("norm.linear"), &time);
        let normed = modulate(&x, 1e-6, &chunk(&m, 3, 0), &chunk(&m, 3, 1));
        let [q, k] = ["q", "k"].map(|p| {
            let x = g.linear(&of(&format!("attn.to_{p}")), &normed);
            turn(&g.head_norm(&of(&format!("attn.norm_{p}")), &x, 1e-6, 0.0))
        });
        let v = g.linear(&of("attn.to_v"), &normed);
        let a = g.attention(&heads, &Scores::full(dim), (&q, &k, &v));
        let inner = activated(&g.linear(&of("proj_mlp"), &normed), gelu);
        let beside = a.with(&inner, |a, m| Tensor::beside(&[a.clone(), m.clone()]));
        x = x.add(&g.row_linear(&of("proj_out"), &beside).mul(&chunk(&m, 3, 2)));
    }
    let m = g.linear("norm_out.linear", &time);
    g.linear("proj_out", &modulate(&rest(&x), 1e-6, &chunk(&m, 2, 1), &chunk(&m, 2, 0)))
}

/// Wan: as Cosmos, but q and k are normed over all heads together.
pub(crate) fn wan(g: &Group) -> Each {
    let c = g.config;
    let (heads, dim, eps) = (c.get("num_attention_heads"), c.get("attention_head_dim"), c.real("eps"));
    let hidden = heads * dim;
    let patch: usize = c.list("patch_size").iter().product();
    let mut x = g.linear("patch_embedding", &input(g, "latents", tokens(), c.get("in_channels") * patch));
    let temb = two(g, "condition_embedder.time_embedder", &time_features(g, TIME, c.get("freq_dim")), silu);
    let time = g.linear("condition_embedder.time_proj", &activated(&temb, silu));
    let text = two(g, "condition_embedder.text_embedder", &input(g, "text", TEXT, c.get("text_dim")), gelu);
    let side = dim / 6 * 2;
    let widths = [dim - 2 * side, side, side];
    let turned: Vec<Vec<f64>> = positions().map(|p| angles(p, widths, [10_000.0; 3])).collect();

    for n in 0..c.get("num_layers") {
        let layer = format!("blocks.{n}");
        let of = |part: &str| format!("{layer}.{part}");
        let heads = || Heads::new(layer.clone(), heads, heads, dim);
        let table = |rank| g.tensor(rank, &of("scale_shift_table")).reshape(&[1, 6 * hidden]);
        let m = g.each(|rank| time.0[rank].add(&table(rank)));
        let attention = |module: &str, x: &Each, seen: &Each, turned: Option<&Vec<Vec<f64>>>| {
            let of = |part: &str| of(&format!("{module}.{part}"));
            let qk = [g.linear(&of("to_q"), x), g.linear(&of("to_k"), seen)];
            let [q, k] = g.norm_across(&format!("{layer}.{module}"), &layer, qk, hidden, eps).map(|normed| {
                turned.map_or(normed.clone(), |by| normed.map(|t| rotate_by(t, dim, by, Pairs::Neighbours)))
            });
            let v = g.linear(&of("to_v"), seen);
            let heads = if turned.is_some() { heads() } else { heads().cross() };
            g.row_linear(&of("to_out.0"), &g.attention(&heads, &Scores::full(dim), (&q, &k, &v)))
        };
        let normed = modulate(&x, eps, &chunk(&m, 6, 0), &chunk(&m, 6, 1));
        x = x.add(&attention("attn1", &normed, &normed, Some(&turned)).mul(&chunk(&m, 6, 2)));
        let normed = g.layer_norm(&of("norm2"), &x, eps);
        x = x.add(&attention("attn2", &normed, &text, None));
        let normed = modulate(&x, eps, &chunk(&m, 6, 3), &chunk(&m, 6, 4));
        x = x.add(&feed_forward(g, &of("ffn"), &normed).mul(&chunk(&m, 6, 5)));
    }
    let row = |rank, i| g.tensor(rank, "scale_shift_table").reshape(&[2, hidden]).index(i);
    let [shift, scale] = [0, 1].map(|i| g.each(|rank| temb.0[rank].add(&row(rank, i))));
    g.linear("proj_out", &modulate(&x, eps, &shift, &scale))
}
