//! T5 and UMT5: an encoder, and a decoder that looks at its output.

use serde_json::Value;

use super::super::config::{Fields, LLAMA_NAMES, Names, standard};
use super::{
    BlockRule, Cut, Draft, FFN, Family, HEADS, HIDDEN, KV, LM_HEAD, Rule, Stack, Use, VOCAB, When, Whole,
    embedding, linear, norm, part, tensor,
};
use crate::Result;
use crate::model::layer::Stream;
use crate::model::{Architecture, MAX_DIM, MAX_LAYERS};

pub(in crate::model) const T5: Family = Family {
    architecture: Architecture::T5,
    read: t5,
    prefixes: &[""],
    stem: &[
        embedding("shared.weight"),
        tensor("encoder.embed_tokens.weight", &[VOCAB, HIDDEN], Use::Lookup).when(When::Unused),
        tensor("decoder.embed_tokens.weight", &[VOCAB, HIDDEN], Use::Lookup).when(When::Unused),
        norm("encoder.final_layer_norm.weight"),
        norm("decoder.final_layer_norm.weight").when(When::Unless("encoder_only")),
    ],
    stacks: &[
        Stack {
            name: "encoder.",
            list: "encoder.block",
            stream: Stream::Context,
            kinds: &[&[
                BlockRule {
                    rules: SELF_ATTENTION,
                    sums: &[("layer.0.SelfAttention.o", Stream::Context)],
                    cross: false,
                },
                BlockRule {
                    rules: &[
                        norm("layer.1.layer_norm.weight"),
                        linear("layer.1.DenseReluDense.wi", FFN, HIDDEN, When::Unused)
                            .when(When::Unless("gated")),
                        linear("layer.1.DenseReluDense.wi_0", FFN, HIDDEN, When::Unused)
                            .when(When::If("gated")),
                        linear("layer.1.DenseReluDense.wi_1", FFN, HIDDEN, When::Unused)
                            .when(When::If("gated")),
                        linear("layer.1.DenseReluDense.wo", HIDDEN, FFN, When::Unused),
                    ],
                    sums: &[("layer.1.DenseReluDense.wo", Stream::Context)],
                    cross: false,
                },
            ]],
        },
        Stack {
            name: "decoder.",
            list: "decoder.block",
            stream: Stream::Tokens,
            kinds: &[&[
                BlockRule {
                    rules: SELF_ATTENTION,
                    sums: &[("layer.0.SelfAttention.o", Stream::Tokens)],
                    cross: false,
                },
                BlockRule {
                    rules: &[
                        norm("layer.1.layer_norm.weight"),
                        linear("layer.1.EncDecAttention.q", HEADS, HIDDEN, When::Unused),
                        linear("layer.1.EncDecAttention.k", KV, HIDDEN, When::Unused).used(Use::Context),
                        linear("layer.1.EncDecAttention.v", KV, HIDDEN, When::Unused).used(Use::Context),
                        linear("layer.1.EncDecAttention.o", HIDDEN, HEADS, When::Unused),
                        // In old files, of no use.
                        tensor(
                            "layer.1.EncDecAttention.relative_attention_bias.weight",
                            BIAS_AXES,
                            Use::Vector,
                        )
                        .when(When::Unused),
                    ],
                    sums: &[("layer.1.EncDecAttention.o", Stream::Tokens)],
                    cross: true,
                },
                BlockRule {
                    rules: &[
                        norm("layer.2.layer_norm.weight"),
                        linear("layer.2.DenseReluDense.wi", FFN, HIDDEN, When::Unused)
                            .when(When::Unless("gated")),
                        linear("layer.2.DenseReluDense.wi_0", FFN, HIDDEN, When::Unused)
                            .when(When::If("gated")),
                        linear("layer.2.DenseReluDense.wi_1", FFN, HIDDEN, When::Unused)
                            .when(When::If("gated")),
                        linear("layer.2.DenseReluDense.wo", HIDDEN, FFN, When::Unused),
                    ],
                    sums: &[("layer.2.DenseReluDense.wo", Stream::Tokens)],
                    cross: false,
                },
            ]],
        },
    ],
    head: &[LM_HEAD.when(When::If("untied_head"))],
    embeddings: &[("shared", Stream::Context), ("shared", Stream::Tokens)],
    logits: Some("lm_head"),
};

pub(in crate::model) const UMT5: Family = Family { architecture: Architecture::Umt5, read: umt5, ..T5 };

const BIAS_AXES: &[super::Ax] = &[Whole("buckets"), Cut(&[part("heads", "")])];

/// The bias by distance has a column a head; T5 has it in the first layer for all, UMT5 in each.
const RELATIVE_BIAS: Rule =
    tensor("layer.0.SelfAttention.relative_attention_bias.weight", BIAS_AXES, Use::Vector);

const SELF_ATTENTION: &[Rule] = &[
    norm("layer.0.layer_norm.weight"),
    linear("layer.0.SelfAttention.q", HEADS, HIDDEN, When::Unused),
    linear("layer.0.SelfAttention.k", KV, HIDDEN, When::Unused),
    linear("layer.0.SelfAttention.v", KV, HIDDEN, When::Unused),
    RELATIVE_BIAS.when(When::FirstLayerUnless("bias_in_each")),
    linear("layer.0.SelfAttention.o", HIDDEN, HEADS, When::Unused),
];

fn t5(f: &Fields) -> Result<Draft> {
    read(f, Architecture::T5)
}

fn umt5(f: &Fields) -> Result<Draft> {
    let mut draft = read(f, Architecture::Umt5)?;
    draft.flag("bias_in_each", true);
    Ok(draft)
}

fn read(f: &Fields, architecture: Architecture) -> Result<Draft> {
    let names = Names {
        hidden: "d_model",
        layers: "num_layers",
        heads: "num_heads",
        kv_heads: "",
        head_dim: "d_kv",
        default_head_dim: 64,
        ffn: "d_ff",
        positions: "n_positions",
        default_positions: 512,
        act: ("dense_act_fn", "relu"),
        eps: ("layer_norm_epsilon", 1e-6),
        rope: false,
        tied: true,
        ..LLAMA_NAMES
    };
    let mut draft = standard(f, architecture, &names)?;
    let form = f.text("feed_forward_proj")?.unwrap_or("relu");
    draft.flag("gated", form.starts_with("gated"));
    if f.get("dense_act_fn").is_none() {
        draft.spec.hidden_act = form.trim_start_matches("gated-").to_owned();
    }
    let buckets = f.size("relative_attention_num_buckets", MAX_DIM)?.unwrap_or(32);
    draft.sizes[0].set("buckets", buckets, "relative_attention_num_buckets");

    // Only the encoder, as of a text-to-image model: its tokens are then the model's own.
    let named = |v: &Value| v.as_str().is_some_and(|n| n.ends_with("EncoderModel"));
    let listed = f.get("architectures").and_then(Value::as_array).is_some_and(|l| l.iter().any(named));
    let encoder_only = listed || f.flag("is_encoder_decoder")? == Some(false);
    draft.flag("encoder_only", encoder_only);
    let decoder_layers = f.size("num_decoder_layers", MAX_LAYERS)?.unwrap_or(draft.kinds[0].len());
    draft.kinds.push(if encoder_only { Vec::new() } else { vec![0; decoder_layers] });
    draft.sizes.push(draft.sizes[0].clone());
    let tied = draft.spec.tie_word_embeddings && !encoder_only;
    draft.spec.tie_word_embeddings = tied;
    draft.flags.remove("tied");
    draft.flag("tied", tied);
    draft.flag("untied_head", !tied && !encoder_only);
    Ok(draft)
}
