//! Llama and the dense decoders of its shape.

use super::super::config::{Fields, LLAMA_NAMES, Names, standard};
use super::{
    BlockRule, Draft, FFN, Family, HEAD_DIM, HEADS, HIDDEN, KV, LM_HEAD, Rule, Stack, Use, When, embedding,
    linear, norm, tensor,
};
use crate::Result;
use crate::model::layer::Stream;
use crate::model::{Architecture, MAX_DIM};

pub(super) const QKV_BIAS: When = When::If("qkv_bias");
pub(super) const O_BIAS: When = When::If("attention_output_bias");
pub(super) const MLP_BIAS: When = When::If("mlp_bias");

pub(in crate::model) const LLAMA: Family = Family {
    architecture: Architecture::Llama,
    read: llama,
    prefixes: &["model."],
    stem: STEM,
    stacks: &[Stack { name: "", list: "layers", stream: Stream::Tokens, kinds: &[&[ATTENTION, MLP]] }],
    head: &[LM_HEAD],
    embeddings: &[("embed_tokens", Stream::Tokens)],
    logits: Some("lm_head"),
};

/// A model of which nothing is known but that its tensors have Llama's names. Which it has, its files say.
pub(in crate::model) const UNKNOWN: Family =
    Family { architecture: Architecture::Unknown, read: unknown, ..LLAMA };

pub(in crate::model) const MISTRAL: Family =
    Family { architecture: Architecture::Mistral, read: mistral, ..LLAMA };

pub(in crate::model) const QWEN2: Family = Family { architecture: Architecture::Qwen2, read: qwen2, ..LLAMA };

pub(in crate::model) const QWEN3: Family = Family { architecture: Architecture::Qwen3, read: qwen3, ..LLAMA };

pub(in crate::model) const GEMMA2: Family = Family {
    architecture: Architecture::Gemma2,
    read: gemma2,
    stacks: &[Stack {
        name: "",
        list: "layers",
        stream: Stream::Tokens,
        kinds: &[&[ATTENTION_WITH_NORM_AFTER, MLP_WITH_NORMS]],
    }],
    ..LLAMA
};

pub(in crate::model) const GEMMA3: Family = Family {
    architecture: Architecture::Gemma3,
    read: gemma3,
    // Inside a model that sees pictures it has a name.
    prefixes: &["model.", "language_model.model.", "model.language_model."],
    ..GEMMA2
};

pub(in crate::model) const PHI3: Family = Family {
    architecture: Architecture::Phi3,
    read: phi3,
    stacks: &[Stack {
        name: "",
        list: "layers",
        stream: Stream::Tokens,
        kinds: &[&[
            BlockRule {
                rules: &[
                    norm("input_layernorm.weight"),
                    linear("self_attn.qkv_proj", super::QKV, HIDDEN, When::Unused),
                    linear("self_attn.o_proj", HIDDEN, HEADS, When::Unused),
                ],
                sums: &[("self_attn.o_proj", Stream::Tokens)],
                cross: false,
            },
            BlockRule {
                rules: &[
                    norm("post_attention_layernorm.weight"),
                    linear("mlp.gate_up_proj", super::GATE_UP, HIDDEN, When::Unused),
                    linear("mlp.down_proj", HIDDEN, FFN, When::Unused),
                ],
                sums: &[("mlp.down_proj", Stream::Tokens)],
                cross: false,
            },
        ]],
    }],
    ..LLAMA
};

pub(super) const STEM: &[Rule] = &[embedding("embed_tokens.weight"), norm("norm.weight")];

pub(super) const Q_NORM: Rule =
    tensor("self_attn.q_norm.weight", &[HEAD_DIM], Use::Vector).when(When::If("qk_norm"));
pub(super) const K_NORM: Rule =
    tensor("self_attn.k_norm.weight", &[HEAD_DIM], Use::Vector).when(When::If("qk_norm"));

pub(super) const ATTENTION: BlockRule = BlockRule {
    rules: &[
        norm("input_layernorm.weight"),
        linear("self_attn.q_proj", HEADS, HIDDEN, QKV_BIAS),
        linear("self_attn.k_proj", KV, HIDDEN, QKV_BIAS),
        linear("self_attn.v_proj", KV, HIDDEN, QKV_BIAS),
        Q_NORM,
        K_NORM,
        linear("self_attn.o_proj", HIDDEN, HEADS, O_BIAS),
    ],
    sums: &[("self_attn.o_proj", Stream::Tokens)],
    cross: false,
};

pub(super) const MLP: BlockRule = BlockRule {
    rules: &[
        norm("post_attention_layernorm.weight"),
        linear("mlp.gate_proj", FFN, HIDDEN, MLP_BIAS),
        linear("mlp.up_proj", FFN, HIDDEN, MLP_BIAS),
        linear("mlp.down_proj", HIDDEN, FFN, MLP_BIAS),
    ],
    sums: &[("mlp.down_proj", Stream::Tokens)],
    cross: false,
};

/// Gemma's norm of the attention's output is after the sum.
const ATTENTION_WITH_NORM_AFTER: BlockRule = BlockRule {
    rules: &[
        norm("input_layernorm.weight"),
        linear("self_attn.q_proj", HEADS, HIDDEN, QKV_BIAS),
        linear("self_attn.k_proj", KV, HIDDEN, QKV_BIAS),
        linear("self_attn.v_proj", KV, HIDDEN, QKV_BIAS),
        Q_NORM,
        K_NORM,
        linear("self_attn.o_proj", HIDDEN, HEADS, O_BIAS),
        norm("post_attention_layernorm.weight"),
    ],
    ..ATTENTION
};

const MLP_WITH_NORMS: BlockRule = BlockRule {
    rules: &[
        norm("pre_feedforward_layernorm.weight"),
        linear("mlp.gate_proj", FFN, HIDDEN, MLP_BIAS),
        linear("mlp.up_proj", FFN, HIDDEN, MLP_BIAS),
        linear("mlp.down_proj", HIDDEN, FFN, MLP_BIAS),
        norm("post_feedforward_layernorm.weight"),
    ],
    ..MLP
};

fn llama(f: &Fields) -> Result<Draft> {
    let mut draft = standard(f, Architecture::Llama, &LLAMA_NAMES)?;
    let (attention, mlp) = (f.flag("attention_bias")?, f.flag("mlp_bias")?);
    draft.bias(attention.unwrap_or(false), attention.unwrap_or(false), mlp.unwrap_or(false));
    Ok(draft)
}

fn unknown(f: &Fields) -> Result<Draft> {
    let mut draft = standard(f, Architecture::Unknown, &LLAMA_NAMES)?;
    let name = f.text("model_type")?.unwrap_or_default().to_owned();
    draft.spec.notes.push(format!(
        "model_type \"{name}\" is not known: planned from the names and shapes of its tensors, which are those of a \
         llama; a runtime must know what it computes"
    ));
    Ok(draft)
}

fn mistral(f: &Fields) -> Result<Draft> {
    let names = Names { default_positions: 131_072, ..LLAMA_NAMES };
    let mut draft = standard(f, Architecture::Mistral, &names)?;
    draft.slide_all(f)?;
    Ok(draft)
}

fn qwen2(f: &Fields) -> Result<Draft> {
    let names = Names { default_positions: 32768, ..LLAMA_NAMES };
    let mut draft = standard(f, Architecture::Qwen2, &names)?;
    draft.bias(true, false, false);
    draft.slide_from(f)?;
    Ok(draft)
}

fn qwen3(f: &Fields) -> Result<Draft> {
    let names = Names { default_positions: 32768, ..LLAMA_NAMES };
    let mut draft = standard(f, Architecture::Qwen3, &names)?;
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    draft.bias(bias, bias, false);
    draft.flag("qk_norm", true);
    draft.slide_from(f)?;
    Ok(draft)
}

const GEMMA_NAMES: Names = Names {
    default_head_dim: 256,
    default_positions: 8192,
    act: ("hidden_activation", "gelu_pytorch_tanh"),
    tied: true,
    ..LLAMA_NAMES
};

fn gemma2(f: &Fields) -> Result<Draft> {
    let mut draft = standard(f, Architecture::Gemma2, &GEMMA_NAMES)?;
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    draft.bias(bias, bias, false);
    draft.slide(f, |layer| layer.is_multiple_of(2))?;
    Ok(draft)
}

fn gemma3(f: &Fields) -> Result<Draft> {
    let text = f.object("text_config")?;
    let f = text.as_ref().unwrap_or(f);
    let mut draft = standard(f, Architecture::Gemma3, &GEMMA_NAMES)?;
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    draft.bias(bias, bias, false);
    draft.flag("qk_norm", true);
    let pattern = f.size("sliding_window_pattern", MAX_DIM)?.unwrap_or(6);
    draft.slide(f, |layer| !(layer + 1).is_multiple_of(pattern))?;
    // What sees pictures is small beside the decoder.
    draft.whole =
        &["vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."];
    Ok(draft)
}

fn phi3(f: &Fields) -> Result<Draft> {
    let names = Names { default_positions: 4096, eps: ("rms_norm_eps", 1e-5), ..LLAMA_NAMES };
    let mut draft = standard(f, Architecture::Phi3, &names)?;
    draft.slide_all(f)?;
    Ok(draft)
}
