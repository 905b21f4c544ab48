//! Vision transformers: SigLIP and ViT. Every rank has the patch embedding and the pooling head whole, which are
//! small.

use super::super::config::{Fields, LLAMA_NAMES, Names, standard};
use super::{
    Ax, BlockRule, Draft, FFN, Family, HEADS, HIDDEN, KV, Rule, Stack, Use, When, Whole, embedding, linear,
    norm, tensor,
};
use crate::Result;
use crate::model::layer::Stream;
use crate::model::{Architecture, MAX_DIM};

const SIGLIP_LAYER: &[BlockRule] = &[
    BlockRule {
        rules: &[
            norm("layer_norm1.weight"),
            norm("layer_norm1.bias"),
            linear("self_attn.q_proj", HEADS, HIDDEN, When::Always),
            linear("self_attn.k_proj", KV, HIDDEN, When::Always),
            linear("self_attn.v_proj", KV, HIDDEN, When::Always),
            linear("self_attn.out_proj", HIDDEN, HEADS, When::Always),
        ],
        sums: &[("self_attn.out_proj", Stream::Tokens)],
        cross: false,
    },
    BlockRule {
        rules: &[
            norm("layer_norm2.weight"),
            norm("layer_norm2.bias"),
            linear("mlp.fc1", FFN, HIDDEN, When::Always),
            linear("mlp.fc2", HIDDEN, FFN, When::Always),
        ],
        sums: &[("mlp.fc2", Stream::Tokens)],
        cross: false,
    },
];

const SIGLIP_STEM: &[Rule] = &[
    patches("vision_model.embeddings.patch_embedding.weight"),
    norm("vision_model.embeddings.patch_embedding.bias"),
    tensor("vision_model.embeddings.position_embedding.weight", &[Whole("patches"), HIDDEN], Use::Lookup),
    norm("vision_model.post_layernorm.weight"),
    norm("vision_model.post_layernorm.bias"),
    head("vision_model.head.probe", &[Whole(""), Whole(""), HIDDEN], Use::Vector),
    head("vision_model.head.attention.in_proj_weight", &[Whole("three_hidden"), HIDDEN], Use::Call),
    head("vision_model.head.attention.in_proj_bias", &[Whole("three_hidden")], Use::Vector),
    head("vision_model.head.attention.out_proj.weight", &[HIDDEN, HIDDEN], Use::Call),
    head("vision_model.head.attention.out_proj.bias", &[HIDDEN], Use::Vector),
    head("vision_model.head.layernorm.weight", &[HIDDEN], Use::Vector),
    head("vision_model.head.layernorm.bias", &[HIDDEN], Use::Vector),
    head("vision_model.head.mlp.fc1.weight", &[Whole("ffn"), HIDDEN], Use::Call),
    head("vision_model.head.mlp.fc1.bias", &[Whole("ffn")], Use::Vector),
    head("vision_model.head.mlp.fc2.weight", &[HIDDEN, Whole("ffn")], Use::Call),
    head("vision_model.head.mlp.fc2.bias", &[HIDDEN], Use::Vector),
];

pub(in crate::model) const SIGLIP_VISION: Family = Family {
    architecture: Architecture::SiglipVision,
    read: siglip_vision,
    prefixes: &[""],
    stem: SIGLIP_STEM,
    stacks: &[Stack {
        name: "",
        list: "vision_model.encoder.layers",
        stream: Stream::Tokens,
        kinds: &[SIGLIP_LAYER],
    }],
    head: &[],
    embeddings: &[],
    logits: None,
};

/// Both towers: pictures and texts.
pub(in crate::model) const SIGLIP: Family = Family {
    architecture: Architecture::Siglip,
    read: siglip,
    stacks: &[
        Stack {
            name: "vision.",
            list: "vision_model.encoder.layers",
            stream: Stream::Tokens,
            kinds: &[SIGLIP_LAYER],
        },
        Stack {
            name: "text.",
            list: "text_model.encoder.layers",
            stream: Stream::Tokens,
            kinds: &[SIGLIP_LAYER],
        },
    ],
    head: &[
        embedding("text_model.embeddings.token_embedding.weight"),
        tensor(
            "text_model.embeddings.position_embedding.weight",
            &[Whole("text_positions"), TEXT],
            Use::Lookup,
        ),
        tensor("text_model.final_layer_norm.weight", &[TEXT], Use::Vector),
        tensor("text_model.final_layer_norm.bias", &[TEXT], Use::Vector),
        tensor("text_model.head.weight", &[Whole("projection"), TEXT], Use::Call),
        tensor("text_model.head.bias", &[Whole("projection")], Use::Vector),
        tensor("logit_scale", &[Whole("")], Use::Vector),
        tensor("logit_bias", &[Whole("")], Use::Vector),
    ],
    embeddings: &[("text_model.embeddings.token_embedding", Stream::Tokens)],
    ..SIGLIP_VISION
};

const TEXT: Ax = Whole("hidden");

pub(in crate::model) const VIT: Family = Family {
    architecture: Architecture::Vit,
    read: vit,
    prefixes: &["", "vit."],
    stem: &[
        patches("embeddings.patch_embeddings.projection.weight"),
        norm("embeddings.patch_embeddings.projection.bias"),
        tensor("embeddings.cls_token", &[Whole(""), Whole(""), HIDDEN], Use::Vector),
        tensor("embeddings.position_embeddings", &[Whole(""), Whole("patches"), HIDDEN], Use::Lookup),
        norm("layernorm.weight"),
        norm("layernorm.bias"),
        tensor("pooler.dense.weight", &[HIDDEN, HIDDEN], Use::Call).when(When::Unused),
        norm("pooler.dense.bias").when(When::Unused),
    ],
    stacks: &[Stack {
        name: "",
        list: "encoder.layer",
        stream: Stream::Tokens,
        kinds: &[&[
            BlockRule {
                rules: &[
                    norm("layernorm_before.weight"),
                    norm("layernorm_before.bias"),
                    linear("attention.attention.query", HEADS, HIDDEN, When::If("qkv_bias")),
                    linear("attention.attention.key", KV, HIDDEN, When::If("qkv_bias")),
                    linear("attention.attention.value", KV, HIDDEN, When::If("qkv_bias")),
                    linear("attention.output.dense", HIDDEN, HEADS, When::Always),
                ],
                sums: &[("attention.output.dense", Stream::Tokens)],
                cross: false,
            },
            BlockRule {
                rules: &[
                    norm("layernorm_after.weight"),
                    norm("layernorm_after.bias"),
                    linear("intermediate.dense", FFN, HIDDEN, When::Always),
                    linear("output.dense", HIDDEN, FFN, When::Always),
                ],
                sums: &[("output.dense", Stream::Tokens)],
                cross: false,
            },
        ]],
    }],
    head: &[
        tensor("classifier.weight", &[], Use::Call).when(When::Unused),
        tensor("classifier.bias", &[], Use::Vector).when(When::Unused),
    ],
    embeddings: &[],
    logits: None,
};

/// A convolution that makes a token of each patch.
const fn patches(name: &'static str) -> Rule {
    tensor(name, &[HIDDEN, Whole("channels"), Whole("patch"), Whole("patch")], Use::Tokens)
}

/// A part of the pooling head, which some files leave out.
const fn head(name: &'static str, axes: &'static [Ax], used: Use) -> Rule {
    tensor(name, axes, used).when(When::If("pooling"))
}

const NAMES: Names = Names {
    kv_heads: "",
    head_dim: "",
    eps: ("layer_norm_eps", 1e-6),
    rope: false,
    vocab: "",
    default_positions: 1,
    ..LLAMA_NAMES
};

/// Sets what pictures are cut into; `extra` tokens come before the patches.
fn pictures(draft: &mut Draft, f: &Fields, image: usize, patch: usize, extra: usize) -> Result<()> {
    let image = f.size("image_size", MAX_DIM)?.unwrap_or(image);
    let patch = f.size("patch_size", MAX_DIM)?.unwrap_or(patch);
    if patch > image {
        return Err(f.error("patch_size", format!("= {patch} must be at most image_size = {image}")));
    }
    let sizes = &mut draft.sizes[0];
    sizes.set("channels", f.size("num_channels", MAX_DIM)?.unwrap_or(3), "num_channels");
    sizes.set("patch", patch, "patch_size");
    sizes.set("patches", (image / patch).saturating_pow(2).min(MAX_DIM) + extra, "image_size");
    sizes.set("three_hidden", 3 * sizes.value("hidden"), "hidden_size");
    Ok(())
}

fn siglip_vision(f: &Fields) -> Result<Draft> {
    // A file of the vision tower alone may have the configuration of both.
    let inner = f.object("vision_config")?;
    vision_tower(inner.as_ref().unwrap_or(f), Architecture::SiglipVision)
}

fn vision_tower(f: &Fields, architecture: Architecture) -> Result<Draft> {
    // The defaults are those of siglip-base-patch16-224.
    let names = Names { act: ("hidden_act", "gelu_pytorch_tanh"), ..NAMES };
    let mut draft = standard(f, architecture, &names)?;
    draft.bias(true, true, true);
    pictures(&mut draft, f, 224, 16, 0)?;
    let pooling = f.flag("vision_use_head")?.unwrap_or(true);
    draft.flag("pooling", pooling);
    Ok(draft)
}

fn siglip(f: &Fields) -> Result<Draft> {
    let vision = f.object("vision_config")?.ok_or_else(|| f.error("vision_config", "is missing"))?;
    let text = f.object("text_config")?.ok_or_else(|| f.error("text_config", "is missing"))?;
    let mut draft = vision_tower(&vision, Architecture::Siglip)?;
    let names = Names {
        act: ("hidden_act", "gelu_pytorch_tanh"),
        vocab: "vocab_size",
        default_vocab: 32000,
        default_positions: 64,
        ..NAMES
    };
    let other = standard(&text, Architecture::Siglip, &names)?;
    if other.spec.hidden_size != draft.spec.hidden_size {
        return Err(text.error(
            "hidden_size",
            format!("= {} must be vision_config's, {}", other.spec.hidden_size, draft.spec.hidden_size),
        ));
    }
    let (rows, positions) = (other.sizes[0].value("vocab"), other.sizes[0].value("positions"));
    let projection = text.size("projection_size", MAX_DIM)?.unwrap_or(other.spec.hidden_size);
    let sizes = &mut draft.sizes[0];
    sizes.set("vocab", rows, "vocab_size");
    sizes.set("text_positions", positions, "max_position_embeddings");
    sizes.set("projection", projection, "projection_size");
    draft.spec.vocab_size = rows;
    draft.sizes.extend(other.sizes);
    draft.kinds.extend(other.kinds);
    Ok(draft)
}

fn vit(f: &Fields) -> Result<Draft> {
    let names = Names { act: ("hidden_act", "gelu"), eps: ("layer_norm_eps", 1e-12), ..NAMES };
    let mut draft = standard(f, Architecture::Vit, &names)?;
    draft.bias(f.flag("qkv_bias")?.unwrap_or(true), true, true);
    pictures(&mut draft, f, 224, 16, 1)?;
    Ok(draft)
}
