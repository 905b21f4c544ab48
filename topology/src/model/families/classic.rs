//! GPT-2, GPT-NeoX and Falcon: fused q, k and v, GELU, LayerNorm.

use super::super::config::{Fields, LLAMA_NAMES, Names, standard};
use super::{
    Ax, BlockRule, ByGroup, Cut, Draft, FFN, Family, Form, HEADS, HIDDEN, LM_HEAD, Part, QKV, Rule, Stack,
    Use, VOCAB, When, Whole, embedding, linear, norm, tensor,
};
use crate::Result;
use crate::model::layer::Stream;
use crate::model::{Architecture, MAX_HEADS};

pub(in crate::model) const GPT2: Family = Family {
    architecture: Architecture::Gpt2,
    read: gpt2,
    prefixes: &["", "transformer."],
    stem: &[
        embedding("wte.weight"),
        tensor("wpe.weight", &[Whole("positions"), HIDDEN], Use::Lookup),
        norm("ln_f.weight"),
        norm("ln_f.bias"),
    ],
    stacks: &[Stack {
        name: "",
        list: "h",
        stream: Stream::Tokens,
        kinds: &[&[
            BlockRule {
                rules: &[
                    norm("ln_1.weight"),
                    norm("ln_1.bias"),
                    conv1d("attn.c_attn", QKV, HIDDEN),
                    conv1d("attn.c_proj", HIDDEN, HEADS),
                    unused("attn.bias"),
                    unused("attn.masked_bias"),
                ],
                sums: &[("attn.c_proj", Stream::Tokens)],
                cross: false,
            },
            BlockRule {
                rules: &[
                    norm("ln_2.weight"),
                    norm("ln_2.bias"),
                    conv1d("mlp.c_fc", FFN, HIDDEN),
                    conv1d("mlp.c_proj", HIDDEN, FFN),
                ],
                sums: &[("mlp.c_proj", Stream::Tokens)],
                cross: false,
            },
        ]],
    }],
    head: &[LM_HEAD],
    embeddings: &[("wte", Stream::Tokens)],
    logits: Some("lm_head"),
};

/// Queries, keys and values of each head together.
const QKV_BY_HEAD: Ax = Cut(&[Part { dim: "heads", each: "head_dim", times: 3 }]);

const NEOX_ATTENTION: &[Rule] = &[
    norm("input_layernorm.weight"),
    norm("input_layernorm.bias"),
    linear("attention.query_key_value", QKV_BY_HEAD, HIDDEN, When::If("qkv_bias")),
    linear("attention.dense", HIDDEN, HEADS, When::If("qkv_bias")),
    unused("attention.bias"),
    unused("attention.masked_bias"),
    unused("attention.rotary_emb.inv_freq"),
];

const NEOX_MLP: &[Rule] = &[
    norm("post_attention_layernorm.weight"),
    norm("post_attention_layernorm.bias"),
    linear("mlp.dense_h_to_4h", FFN, HIDDEN, When::Always),
    linear("mlp.dense_4h_to_h", HIDDEN, FFN, When::Always),
];

pub(in crate::model) const GPT_NEOX: Family = Family {
    architecture: Architecture::GptNeox,
    read: gpt_neox,
    prefixes: &["gpt_neox.", ""],
    stem: &[embedding("embed_in.weight"), norm("final_layer_norm.weight"), norm("final_layer_norm.bias")],
    stacks: &[Stack {
        name: "",
        list: "layers",
        stream: Stream::Tokens,
        kinds: &[
            // The two sums of a parallel block are added before they are exchanged.
            &[BlockRule {
                rules: &[Rule::group(NEOX_ATTENTION), Rule::group(NEOX_MLP)],
                sums: PARALLEL_SUM,
                cross: false,
            }],
            &[
                BlockRule {
                    rules: NEOX_ATTENTION,
                    sums: &[("attention.dense", Stream::Tokens)],
                    cross: false,
                },
                BlockRule { rules: NEOX_MLP, sums: &[("mlp.dense_4h_to_h", Stream::Tokens)], cross: false },
            ],
        ],
    }],
    head: &[tensor("embed_out.weight", &[VOCAB, HIDDEN], Use::Tokens).when(When::Unless("tied"))],
    embeddings: &[("embed_in", Stream::Tokens)],
    logits: Some("embed_out"),
};

const PARALLEL_SUM: &[(&str, Stream)] = &[("attention.dense + mlp.dense_4h_to_h", Stream::Tokens)];

const BIAS: When = When::If("bias");

const FALCON_NORMS: &[Rule] = &[
    norm("input_layernorm.weight").when(When::Unless("two_norms")),
    norm("input_layernorm.bias").when(When::Unless("two_norms")),
    norm("ln_attn.weight").when(When::If("two_norms")),
    norm("ln_attn.bias").when(When::If("two_norms")),
    norm("ln_mlp.weight").when(When::If("two_norms")),
    norm("ln_mlp.bias").when(When::If("two_norms")),
];

const FALCON_ATTENTION: &[Rule] = &[
    linear("self_attention.query_key_value", QKV, HIDDEN, BIAS).when(When::If("blocked")),
    linear("self_attention.query_key_value", QKV_BY_HEAD, HIDDEN, BIAS).when(When::If("by_head")),
    linear("self_attention.query_key_value", ByGroup, HIDDEN, BIAS).when(When::If("by_group")),
    linear("self_attention.dense", HIDDEN, HEADS, BIAS),
];

const FALCON_MLP: &[Rule] =
    &[linear("mlp.dense_h_to_4h", FFN, HIDDEN, BIAS), linear("mlp.dense_4h_to_h", HIDDEN, FFN, BIAS)];

pub(in crate::model) const FALCON: Family = Family {
    architecture: Architecture::Falcon,
    read: falcon,
    prefixes: &["transformer."],
    stem: &[embedding("word_embeddings.weight"), norm("ln_f.weight"), norm("ln_f.bias")],
    stacks: &[Stack {
        name: "",
        list: "h",
        stream: Stream::Tokens,
        kinds: &[
            &[BlockRule {
                rules: &[Rule::group(FALCON_NORMS), Rule::group(FALCON_ATTENTION), Rule::group(FALCON_MLP)],
                sums: &[("self_attention.dense + mlp.dense_4h_to_h", Stream::Tokens)],
                cross: false,
            }],
            &[
                BlockRule {
                    rules: &[Rule::group(FALCON_NORMS), Rule::group(FALCON_ATTENTION)],
                    sums: &[("self_attention.dense", Stream::Tokens)],
                    cross: false,
                },
                BlockRule {
                    rules: &[
                        norm("post_attention_layernorm.weight"),
                        norm("post_attention_layernorm.bias"),
                        Rule::group(FALCON_MLP),
                    ],
                    sums: &[("mlp.dense_4h_to_h", Stream::Tokens)],
                    cross: false,
                },
            ],
        ],
    }],
    head: &[LM_HEAD],
    embeddings: &[("word_embeddings", Stream::Tokens)],
    logits: Some("lm_head"),
};

/// GPT-2's linear layer, stored `[inputs, outputs]`.
const fn conv1d(name: &'static str, out: Ax, input: Ax) -> Rule {
    let form = Form::Linear { out, input, bias: When::Always, transposed: true, quantised: true };
    Rule { name, form, when: When::Always, used: Use::Tokens }
}

/// A table that is computed rather than learned.
const fn unused(name: &'static str) -> Rule {
    tensor(name, &[], Use::Vector).when(When::Unused)
}

fn gpt2(f: &Fields) -> Result<Draft> {
    let names = Names {
        hidden: "n_embd",
        layers: "n_layer",
        heads: "n_head",
        kv_heads: "",
        head_dim: "",
        ffn: "n_inner",
        ffn_times: 4,
        positions: "n_positions",
        default_positions: 1024,
        act: ("activation_function", "gelu_new"),
        eps: ("layer_norm_epsilon", 1e-5),
        rope: false,
        tied: true,
        ..LLAMA_NAMES
    };
    let mut draft = standard(f, Architecture::Gpt2, &names)?;
    draft.bias(true, true, true);
    Ok(draft)
}

fn gpt_neox(f: &Fields) -> Result<Draft> {
    let names = Names {
        kv_heads: "",
        head_dim: "",
        act: ("hidden_act", "gelu"),
        eps: ("layer_norm_eps", 1e-5),
        ..LLAMA_NAMES
    };
    let mut draft = standard(f, Architecture::GptNeox, &names)?;
    let bias = f.flag("attention_bias")?.unwrap_or(true);
    draft.bias(bias, bias, true);
    if !f.flag("use_parallel_residual")?.unwrap_or(true) {
        draft.kinds[0].fill(1);
    }
    Ok(draft)
}

fn falcon(f: &Fields) -> Result<Draft> {
    let newer = f.flag("new_decoder_architecture")?.unwrap_or(false);
    let multi_query = f.flag("multi_query")?.unwrap_or(true);
    let names = Names {
        kv_heads: if newer { "num_kv_heads" } else { "" },
        head_dim: "",
        ffn: "ffn_hidden_size",
        ffn_times: 4,
        act: ("activation", "gelu"),
        eps: ("layer_norm_epsilon", 1e-5),
        tied: true,
        ..LLAMA_NAMES
    };
    let mut draft = standard(f, Architecture::Falcon, &names)?;
    let bias = f.flag("bias")?.unwrap_or(false);
    draft.bias(bias, bias, bias);
    draft.flag("bias", bias);
    if !newer && multi_query {
        draft.sizes[0].set("kv_heads", 1, "multi_query");
        draft.spec.num_key_value_heads = 1;
    }
    draft.flag("by_group", newer);
    draft.flag("blocked", !newer && multi_query);
    draft.flag("by_head", !newer && !multi_query);
    let parallel = newer || f.flag("parallel_attn")?.unwrap_or(true);
    if !parallel {
        draft.kinds[0].fill(1);
    }
    let norms = f.size("num_ln_in_parallel_attn", MAX_HEADS)?.unwrap_or(2);
    draft.flag("two_norms", newer && norms == 2);
    Ok(draft)
}
