//! Diffusion transformers as diffusers stores them: Cosmos, Flux, Wan. The tokens are the latent picture's or
//! video's patches, the context is the text. What only depends on the step (modulation, time embedding) is whole on
//! every rank: it is multiplied once a call.

use super::super::config::{Fields, dtype};
use super::{
    Ax, BlockRule, Cut, Draft, FFN, Family, HEAD_DIM, HEADS, HIDDEN, KV, Rule, Sizes, Stack, Use, When,
    Whole, linear, norm, part, plain, tensor,
};
use crate::Result;
use crate::model::layer::Stream;
use crate::model::{Architecture, MAX_DIM, MAX_HEADS, MAX_LAYERS, ModelSpec};

const NO_BIAS: When = When::Unused;

pub(in crate::model) const COSMOS: Family = Family {
    architecture: Architecture::CosmosTransformer,
    read: cosmos,
    prefixes: &[""],
    stem: &[
        plain("patch_embed.proj", HIDDEN, Whole("patch_in"), NO_BIAS),
        tensor("learnable_pos_embed.pos_emb_t", &[Whole("pos_t"), HIDDEN], Use::Vector).when(POSITIONS),
        tensor("learnable_pos_embed.pos_emb_h", &[Whole("pos_h"), HIDDEN], Use::Vector).when(POSITIONS),
        tensor("learnable_pos_embed.pos_emb_w", &[Whole("pos_w"), HIDDEN], Use::Vector).when(POSITIONS),
        norm("time_embed.norm.weight"),
        once("time_embed.t_embedder.linear_1", HIDDEN, HIDDEN, NO_BIAS),
        once("time_embed.t_embedder.linear_2", Whole("three_hidden"), HIDDEN, NO_BIAS),
        once("norm_out.linear_1", Whole("adaln"), HIDDEN, NO_BIAS),
        once("norm_out.linear_2", Whole("two_hidden"), Whole("adaln"), NO_BIAS),
        plain("proj_out", Whole("patch_out"), HIDDEN, NO_BIAS),
    ],
    stacks: &[Stack {
        name: "",
        list: "transformer_blocks",
        stream: Stream::Tokens,
        kinds: &[&[
            BlockRule {
                rules: &[
                    once("norm1.linear_1", Whole("adaln"), HIDDEN, NO_BIAS),
                    once("norm1.linear_2", Whole("three_hidden"), Whole("adaln"), NO_BIAS),
                    linear("attn1.to_q", HEADS, HIDDEN, NO_BIAS),
                    linear("attn1.to_k", KV, HIDDEN, NO_BIAS),
                    linear("attn1.to_v", KV, HIDDEN, NO_BIAS),
                    head_norm("attn1.norm_q.weight"),
                    head_norm("attn1.norm_k.weight"),
                    linear("attn1.to_out.0", HIDDEN, HEADS, NO_BIAS),
                ],
                sums: &[("attn1.to_out.0", Stream::Tokens)],
                cross: false,
            },
            BlockRule {
                rules: &[
                    once("norm2.linear_1", Whole("adaln"), HIDDEN, NO_BIAS),
                    once("norm2.linear_2", Whole("three_hidden"), Whole("adaln"), NO_BIAS),
                    linear("attn2.to_q", HEADS, HIDDEN, NO_BIAS),
                    linear("attn2.to_k", KV, Whole("text"), NO_BIAS).used(Use::Context),
                    linear("attn2.to_v", KV, Whole("text"), NO_BIAS).used(Use::Context),
                    head_norm("attn2.norm_q.weight"),
                    head_norm("attn2.norm_k.weight"),
                    linear("attn2.to_out.0", HIDDEN, HEADS, NO_BIAS),
                ],
                sums: &[("attn2.to_out.0", Stream::Tokens)],
                cross: true,
            },
            BlockRule {
                rules: &[
                    once("norm3.linear_1", Whole("adaln"), HIDDEN, NO_BIAS),
                    once("norm3.linear_2", Whole("three_hidden"), Whole("adaln"), NO_BIAS),
                    linear("ff.net.0.proj", FFN, HIDDEN, NO_BIAS),
                    linear("ff.net.2", HIDDEN, FFN, NO_BIAS),
                ],
                sums: &[("ff.net.2", Stream::Tokens)],
                cross: false,
            },
        ]],
    }],
    head: &[],
    embeddings: &[],
    logits: None,
};

const POSITIONS: When = When::If("learned_positions");

/// What Flux's single blocks end with: attention's result and feed-forward columns side by side.
const HEADS_AND_FFN: Ax = Cut(&[part("heads", "head_dim"), part("ffn", "")]);

pub(in crate::model) const FLUX: Family = Family {
    architecture: Architecture::FluxTransformer,
    read: flux,
    prefixes: &[""],
    stem: &[
        plain("x_embedder", HIDDEN, Whole("patch_in"), When::Always),
        plain("context_embedder", HIDDEN, Whole("text"), When::Always).used(Use::Context),
        once("time_text_embed.timestep_embedder.linear_1", HIDDEN, Whole("frequencies"), When::Always),
        once("time_text_embed.timestep_embedder.linear_2", HIDDEN, HIDDEN, When::Always),
        once("time_text_embed.guidance_embedder.linear_1", HIDDEN, Whole("frequencies"), When::Always)
            .when(When::If("guidance")),
        once("time_text_embed.guidance_embedder.linear_2", HIDDEN, HIDDEN, When::Always)
            .when(When::If("guidance")),
        once("time_text_embed.text_embedder.linear_1", HIDDEN, Whole("pooled"), When::Always),
        once("time_text_embed.text_embedder.linear_2", HIDDEN, HIDDEN, When::Always),
        once("norm_out.linear", Whole("two_hidden"), HIDDEN, When::Always),
        plain("proj_out", Whole("patch_out"), HIDDEN, When::Always),
    ],
    stacks: &[
        Stack {
            name: "",
            list: "transformer_blocks",
            stream: Stream::Tokens,
            kinds: &[&[
                // The picture and the text have weights of their own, and attend to both together.
                BlockRule {
                    rules: &[
                        once("norm1.linear", Whole("six_hidden"), HIDDEN, When::Always),
                        once("norm1_context.linear", Whole("six_hidden"), HIDDEN, When::Always),
                        linear("attn.to_q", HEADS, HIDDEN, When::Always),
                        linear("attn.to_k", KV, HIDDEN, When::Always),
                        linear("attn.to_v", KV, HIDDEN, When::Always),
                        linear("attn.add_q_proj", HEADS, HIDDEN, When::Always).used(Use::Context),
                        linear("attn.add_k_proj", KV, HIDDEN, When::Always).used(Use::Context),
                        linear("attn.add_v_proj", KV, HIDDEN, When::Always).used(Use::Context),
                        head_norm("attn.norm_q.weight"),
                        head_norm("attn.norm_k.weight"),
                        head_norm("attn.norm_added_q.weight"),
                        head_norm("attn.norm_added_k.weight"),
                        linear("attn.to_out.0", HIDDEN, HEADS, When::Always),
                        linear("attn.to_add_out", HIDDEN, HEADS, When::Always).used(Use::Context),
                    ],
                    sums: &[("attn.to_out.0", Stream::Tokens), ("attn.to_add_out", Stream::Context)],
                    cross: false,
                },
                BlockRule {
                    rules: &[
                        linear("ff.net.0.proj", FFN, HIDDEN, When::Always),
                        linear("ff.net.2", HIDDEN, FFN, When::Always),
                        linear("ff_context.net.0.proj", FFN, HIDDEN, When::Always).used(Use::Context),
                        linear("ff_context.net.2", HIDDEN, FFN, When::Always).used(Use::Context),
                    ],
                    sums: &[("ff.net.2", Stream::Tokens), ("ff_context.net.2", Stream::Context)],
                    cross: false,
                },
            ]],
        },
        Stack {
            name: "single.",
            list: "single_transformer_blocks",
            stream: Stream::Both,
            kinds: &[&[BlockRule {
                rules: &[
                    once("norm.linear", Whole("three_hidden"), HIDDEN, When::Always),
                    linear("attn.to_q", HEADS, HIDDEN, When::Always),
                    linear("attn.to_k", KV, HIDDEN, When::Always),
                    linear("attn.to_v", KV, HIDDEN, When::Always),
                    head_norm("attn.norm_q.weight"),
                    head_norm("attn.norm_k.weight"),
                    linear("proj_mlp", FFN, HIDDEN, When::Always),
                    linear("proj_out", HIDDEN, HEADS_AND_FFN, When::Always),
                ],
                sums: &[("proj_out", Stream::Both)],
                cross: false,
            }]],
        },
    ],
    head: &[],
    embeddings: &[],
    logits: None,
};

pub(in crate::model) const WAN: Family = Family {
    architecture: Architecture::WanTransformer,
    read: wan,
    prefixes: &[""],
    stem: &[
        tensor(
            "patch_embedding.weight",
            &[HIDDEN, Whole("channels"), Whole("patch_t"), Whole("patch_h"), Whole("patch_w")],
            Use::Tokens,
        ),
        norm("patch_embedding.bias"),
        once("condition_embedder.time_embedder.linear_1", HIDDEN, Whole("frequencies"), When::Always),
        once("condition_embedder.time_embedder.linear_2", HIDDEN, HIDDEN, When::Always),
        once("condition_embedder.time_proj", Whole("six_hidden"), HIDDEN, When::Always),
        plain("condition_embedder.text_embedder.linear_1", HIDDEN, Whole("text"), When::Always)
            .used(Use::Context),
        plain("condition_embedder.text_embedder.linear_2", HIDDEN, HIDDEN, When::Always).used(Use::Context),
        tensor("condition_embedder.image_embedder.norm1.weight", &[Whole("image")], Use::Vector).when(IMAGE),
        tensor("condition_embedder.image_embedder.norm1.bias", &[Whole("image")], Use::Vector).when(IMAGE),
        plain(
            "condition_embedder.image_embedder.ff.net.0.proj",
            Whole("image"),
            Whole("image"),
            When::Always,
        )
        .used(Use::Context)
        .when(IMAGE),
        plain("condition_embedder.image_embedder.ff.net.2", HIDDEN, Whole("image"), When::Always)
            .used(Use::Context)
            .when(IMAGE),
        norm("condition_embedder.image_embedder.norm2.weight").when(IMAGE),
        norm("condition_embedder.image_embedder.norm2.bias").when(IMAGE),
        tensor("scale_shift_table", &[Whole(""), Whole("two"), HIDDEN], Use::Vector),
        plain("proj_out", Whole("patch_out"), HIDDEN, When::Always),
    ],
    stacks: &[Stack {
        name: "",
        list: "blocks",
        stream: Stream::Tokens,
        kinds: &[&[
            BlockRule {
                rules: &[
                    tensor("scale_shift_table", &[Whole(""), Whole("six"), HIDDEN], Use::Vector),
                    linear("attn1.to_q", HEADS, HIDDEN, When::Always),
                    linear("attn1.to_k", KV, HIDDEN, When::Always),
                    linear("attn1.to_v", KV, HIDDEN, When::Always),
                    tensor("attn1.norm_q.weight", &[HEADS], Use::Vector),
                    tensor("attn1.norm_k.weight", &[KV], Use::Vector),
                    linear("attn1.to_out.0", HIDDEN, HEADS, When::Always),
                ],
                sums: &[("attn1.to_out.0", Stream::Tokens)],
                cross: false,
            },
            BlockRule {
                rules: &[
                    norm("norm2.weight").when(When::If("cross_norm")),
                    norm("norm2.bias").when(When::If("cross_norm")),
                    linear("attn2.to_q", HEADS, HIDDEN, When::Always),
                    linear("attn2.to_k", KV, HIDDEN, When::Always).used(Use::Context),
                    linear("attn2.to_v", KV, HIDDEN, When::Always).used(Use::Context),
                    tensor("attn2.norm_q.weight", &[HEADS], Use::Vector),
                    tensor("attn2.norm_k.weight", &[KV], Use::Vector),
                    linear("attn2.add_k_proj", KV, HIDDEN, When::Always).used(Use::Context).when(ADDED),
                    linear("attn2.add_v_proj", KV, HIDDEN, When::Always).used(Use::Context).when(ADDED),
                    tensor("attn2.norm_added_k.weight", &[KV], Use::Vector).when(ADDED),
                    linear("attn2.to_out.0", HIDDEN, HEADS, When::Always),
                ],
                sums: &[("attn2.to_out.0", Stream::Tokens)],
                cross: true,
            },
            BlockRule {
                rules: &[
                    linear("ffn.net.0.proj", FFN, HIDDEN, When::Always),
                    linear("ffn.net.2", HIDDEN, FFN, When::Always),
                ],
                sums: &[("ffn.net.2", Stream::Tokens)],
                cross: false,
            },
        ]],
    }],
    head: &[],
    embeddings: &[],
    logits: None,
};

const IMAGE: When = When::If("image");
const ADDED: When = When::If("added");

/// A linear layer of what depends on the step alone.
const fn once(name: &'static str, out: Ax, input: Ax, bias: When) -> Rule {
    plain(name, out, input, bias).used(Use::Call)
}

/// A norm of each head by itself.
const fn head_norm(name: &'static str) -> Rule {
    tensor(name, &[HEAD_DIM], Use::Vector)
}

/// The heads, from which the width follows, and the layers.
fn transformer(f: &Fields, architecture: Architecture) -> Result<Draft> {
    let heads = f.required("num_attention_heads", MAX_HEADS)?;
    let head_dim = f.required("attention_head_dim", MAX_DIM)?;
    let layers = f.required("num_layers", MAX_LAYERS)?;
    f.check_heads("attention_head_dim", head_dim, heads)?;
    let hidden = heads * head_dim;
    let mut sizes = Sizes::default();
    for (name, value, field) in [
        ("heads", heads, "num_attention_heads"),
        ("kv_heads", heads, "num_attention_heads"),
        ("head_dim", head_dim, "attention_head_dim"),
        ("hidden", hidden, "attention_head_dim"),
        ("two", 2, ""),
        ("six", 6, ""),
        ("two_hidden", 2 * hidden, "attention_head_dim"),
        ("three_hidden", 3 * hidden, "attention_head_dim"),
        ("six_hidden", 6 * hidden, "attention_head_dim"),
        ("frequencies", 256, "freq_dim"),
    ] {
        sizes.set(name, value, field);
    }
    let spec = ModelSpec {
        num_layers: layers,
        hidden_size: hidden,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim,
        hidden_act: "gelu".to_owned(),
        norm_eps: f.positive("eps")?.unwrap_or(1e-6),
        dtype: dtype(f)?,
        source: f.file.into(),
        ..ModelSpec::empty(architecture)
    };
    Ok(Draft::new(spec, sizes, layers))
}

impl Draft {
    fn ffn(&mut self, ffn: usize, field: &'static str) {
        self.spec.intermediate_size = ffn;
        self.sizes[0].set("ffn", ffn, field);
    }
}

/// The hidden size times the field, 4 where it is absent.
fn times(f: &Fields, hidden: usize, field: &'static str) -> Result<usize> {
    let ffn = hidden as f64 * f.positive(field)?.unwrap_or(4.0);
    if !(1.0..=MAX_DIM as f64).contains(&ffn) {
        return Err(f.error(field, format!("makes feed-forward layers {ffn} wide")));
    }
    Ok(ffn as usize)
}

/// The three sizes of a patch: time, height, width.
fn patch(f: &Fields) -> Result<[usize; 3]> {
    Ok(f.sizes("patch_size", MAX_DIM)?.unwrap_or([1, 2, 2]))
}

fn product(f: &Fields, field: &str, factors: &[usize]) -> Result<usize> {
    let all = factors.iter().try_fold(1usize, |n, &x| n.checked_mul(x)).filter(|&n| n <= MAX_DIM);
    all.ok_or_else(|| f.error(field, "makes patches larger than any model has"))
}

fn cosmos(f: &Fields) -> Result<Draft> {
    let mut draft = transformer(f, Architecture::CosmosTransformer)?;
    let hidden = draft.spec.hidden_size;
    draft.ffn(times(f, hidden, "mlp_ratio")?, "mlp_ratio");
    let (patch, size) = (patch(f)?, f.sizes("max_size", MAX_DIM)?.unwrap_or([128, 240, 240]));
    let input = f.size("in_channels", MAX_DIM)?.unwrap_or(16);
    // A mask of what is padding is one channel more.
    let channels = input + usize::from(f.flag("concat_padding_mask")?.unwrap_or(true));
    let output = f.size("out_channels", MAX_DIM)?.unwrap_or(input);
    let [t, h, w] = patch;
    let sizes = &mut draft.sizes[0];
    sizes.set("patch_in", product(f, "in_channels", &[channels, t, h, w])?, "in_channels");
    sizes.set("patch_out", product(f, "out_channels", &[output, t, h, w])?, "out_channels");
    sizes.set("text", f.size("text_embed_dim", MAX_DIM)?.unwrap_or(1024), "text_embed_dim");
    sizes.set("adaln", f.size("adaln_lora_dim", MAX_DIM)?.unwrap_or(256), "adaln_lora_dim");
    for (name, size, patch) in [("pos_t", size[0], t), ("pos_h", size[1], h), ("pos_w", size[2], w)] {
        sizes.set(name, (size / patch).max(1), "max_size");
    }
    let learned = f.text("extra_pos_embed_type")?.unwrap_or("learnable") == "learnable";
    draft.flag("learned_positions", learned);
    Ok(draft)
}

fn flux(f: &Fields) -> Result<Draft> {
    let mut draft = transformer(f, Architecture::FluxTransformer)?;
    let hidden = draft.spec.hidden_size;
    draft.ffn(times(f, hidden, "mlp_ratio")?, "num_attention_heads");
    let input = f.size("in_channels", MAX_DIM)?.unwrap_or(64);
    let patch = f.size("patch_size", MAX_DIM)?.unwrap_or(1);
    let output = f.size("out_channels", MAX_DIM)?.unwrap_or(input);
    let sizes = &mut draft.sizes[0];
    sizes.set("patch_in", input, "in_channels");
    sizes.set("patch_out", product(f, "out_channels", &[output, patch, patch])?, "out_channels");
    sizes.set("text", f.size("joint_attention_dim", MAX_DIM)?.unwrap_or(4096), "joint_attention_dim");
    sizes.set("pooled", f.size("pooled_projection_dim", MAX_DIM)?.unwrap_or(768), "pooled_projection_dim");
    draft.sizes.push(draft.sizes[0].clone());
    draft.kinds.push(vec![0; f.required("num_single_layers", MAX_LAYERS)?]);
    let guidance = f.flag("guidance_embeds")?.unwrap_or(false);
    draft.flag("guidance", guidance);
    Ok(draft)
}

fn wan(f: &Fields) -> Result<Draft> {
    let mut draft = transformer(f, Architecture::WanTransformer)?;
    draft.ffn(f.required("ffn_dim", MAX_DIM)?, "ffn_dim");
    let input = f.size("in_channels", MAX_DIM)?.unwrap_or(16);
    let output = f.size("out_channels", MAX_DIM)?.unwrap_or(input);
    let [t, h, w] = patch(f)?;
    let sizes = &mut draft.sizes[0];
    for (name, value, field) in [
        ("channels", input, "in_channels"),
        ("patch_t", t, "patch_size"),
        ("patch_h", h, "patch_size"),
        ("patch_w", w, "patch_size"),
        ("patch_out", product(f, "out_channels", &[output, t, h, w])?, "out_channels"),
        ("text", f.size("text_dim", MAX_DIM)?.unwrap_or(4096), "text_dim"),
        ("frequencies", f.size("freq_dim", MAX_DIM)?.unwrap_or(256), "freq_dim"),
    ] {
        sizes.set(name, value, field);
    }
    if let Some(image) = f.size("image_dim", MAX_DIM)? {
        sizes.set("image", image, "image_dim");
        draft.flag("image", true);
    }
    if f.size("added_kv_proj_dim", MAX_DIM)?.is_some() {
        draft.flag("added", true);
    }
    let cross_norm = f.flag("cross_attn_norm")?.unwrap_or(true);
    draft.flag("cross_norm", cross_norm);
    match f.text("qk_norm")?.unwrap_or("rms_norm_across_heads") {
        "rms_norm_across_heads" => draft.flag("norm_across_heads", true),
        other => {
            return Err(f.unsupported(format!(
                "qk_norm \"{other}\" is not supported, only \"rms_norm_across_heads\""
            )));
        }
    }
    Ok(draft)
}
