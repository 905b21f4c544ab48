//! Llama and those of its shape.

use super::super::config::{Fields, LLAMA_NAMES, Names, standard};
use super::{
    BlockRule, Draft, FFN, Family, HEADS, HIDDEN, KV, LM_HEAD, Rule, Stack, When, embedding, linear, norm,
};
use crate::Result;
use crate::model::Architecture;
use crate::model::layer::Stream;

const QKV_BIAS: When = When::If("qkv_bias");
const O_BIAS: When = When::If("attention_output_bias");
const MLP_BIAS: When = When::If("mlp_bias");

pub(in crate::model) const LLAMA: Family = Family {
    architecture: Architecture::Llama,
    read: llama,
    prefixes: &["model."],
    stem: STEM,
    stacks: &[STACK],
    head: &[LM_HEAD],
    embeddings: &[("embed_tokens", Stream::Tokens)],
    logits: Some("lm_head"),
};

pub(in crate::model) const QWEN2: Family = Family { architecture: Architecture::Qwen2, read: qwen2, ..LLAMA };

pub(super) const STEM: &[Rule] = &[embedding("embed_tokens.weight"), norm("norm.weight")];

const STACK: Stack = Stack { name: "", list: "layers", stream: Stream::Tokens, kinds: &[&[ATTENTION, MLP]] };

pub(super) const ATTENTION: BlockRule = BlockRule {
    rules: &[
        norm("input_layernorm.weight"),
        linear("self_attn.q_proj", HEADS, HIDDEN, QKV_BIAS),
        linear("self_attn.k_proj", KV, HIDDEN, QKV_BIAS),
        linear("self_attn.v_proj", KV, HIDDEN, QKV_BIAS),
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

fn llama(f: &Fields) -> Result<Draft> {
    let mut draft = standard(f, Architecture::Llama, &LLAMA_NAMES)?;
    let (attention, mlp) = (f.flag("attention_bias")?, f.flag("mlp_bias")?);
    draft.bias(attention.unwrap_or(false), attention.unwrap_or(false), mlp.unwrap_or(false));
    Ok(draft)
}

fn qwen2(f: &Fields) -> Result<Draft> {
    let mut draft = standard(f, Architecture::Qwen2, &Names { default_positions: 32768, ..LLAMA_NAMES })?;
    draft.bias(true, false, false);
    Ok(draft)
}
