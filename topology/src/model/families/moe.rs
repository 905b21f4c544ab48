//! Decoders with routed experts.

use serde_json::Value;

use super::super::config::{Fields, LLAMA_NAMES, Names, standard};
use super::llama::{ATTENTION, LLAMA, MLP, QKV_BIAS};
use super::{
    Ax, BlockRule, Cut, Draft, EXPERT_FFN, EXPERTS, Family, Form, HEADS, HIDDEN, KV, Part, Rule, SHARED_FFN,
    Stack, Use, When, Whole, linear, norm, part, plain, tensor,
};
use crate::Result;
use crate::model::layer::Stream;
use crate::model::{Architecture, MAX_DIM, MAX_HEADS};

pub(in crate::model) const MIXTRAL: Family = Family {
    architecture: Architecture::Mixtral,
    read: mixtral,
    stacks: &[Stack {
        name: "",
        list: "layers",
        stream: Stream::Tokens,
        kinds: &[&[
            ATTENTION,
            BlockRule {
                rules: &[
                    norm("post_attention_layernorm.weight"),
                    plain("block_sparse_moe.gate", Whole("experts"), HIDDEN, When::Unused),
                    routed("block_sparse_moe.experts.{e}.w1", EXPERT_FFN, HIDDEN),
                    routed("block_sparse_moe.experts.{e}.w3", EXPERT_FFN, HIDDEN),
                    routed("block_sparse_moe.experts.{e}.w2", HIDDEN, EXPERT_FFN),
                ],
                sums: &[("block_sparse_moe", Stream::Tokens)],
                cross: false,
            },
        ]],
    }],
    ..LLAMA
};

const QWEN_STACK: Stack = Stack {
    name: "",
    list: "layers",
    stream: Stream::Tokens,
    kinds: &[&[ATTENTION, QWEN_MOE], &[ATTENTION, MLP]],
};

const QWEN_MOE: BlockRule = BlockRule {
    rules: &[
        norm("post_attention_layernorm.weight"),
        plain("mlp.gate", Whole("experts"), HIDDEN, When::Unused),
        routed("mlp.experts.{e}.gate_proj", EXPERT_FFN, HIDDEN),
        routed("mlp.experts.{e}.up_proj", EXPERT_FFN, HIDDEN),
        routed("mlp.experts.{e}.down_proj", HIDDEN, EXPERT_FFN),
        linear("mlp.shared_expert.gate_proj", SHARED_FFN, HIDDEN, When::Unused).when(SHARED),
        linear("mlp.shared_expert.up_proj", SHARED_FFN, HIDDEN, When::Unused).when(SHARED),
        linear("mlp.shared_expert.down_proj", HIDDEN, SHARED_FFN, When::Unused).when(SHARED),
        plain("mlp.shared_expert_gate", Whole(""), HIDDEN, When::Unused).when(SHARED),
    ],
    sums: &[("mlp", Stream::Tokens)],
    cross: false,
};

const SHARED: When = When::If("shared");

pub(in crate::model) const QWEN2_MOE: Family =
    Family { architecture: Architecture::Qwen2Moe, read: qwen2_moe, stacks: &[QWEN_STACK], ..LLAMA };

pub(in crate::model) const QWEN3_MOE: Family =
    Family { architecture: Architecture::Qwen3Moe, read: qwen3_moe, stacks: &[QWEN_STACK], ..LLAMA };

const Q_LORA: When = When::If("q_lora");
const Q_HEADS: Ax = HEADS;

/// Multi-head latent attention: queries and keys/values are made from latent vectors, whose projections every rank
/// has, as they are small and all heads read them.
const LATENT_ATTENTION: BlockRule = BlockRule {
    rules: &[
        norm("input_layernorm.weight"),
        linear("self_attn.q_proj", Q_HEADS, HIDDEN, When::Unused).when(When::Unless("q_lora")),
        linear("self_attn.q_a_proj", Whole("q_lora"), HIDDEN, QKV_BIAS).when(Q_LORA),
        tensor("self_attn.q_a_layernorm.weight", &[Whole("q_lora")], Use::Vector).when(Q_LORA),
        linear("self_attn.q_b_proj", Q_HEADS, Whole("q_lora"), When::Unused).when(Q_LORA),
        linear("self_attn.kv_a_proj_with_mqa", Whole("latent"), HIDDEN, QKV_BIAS),
        tensor("self_attn.kv_a_layernorm.weight", &[Whole("kv_lora")], Use::Vector),
        linear("self_attn.kv_b_proj", Cut(&[part("heads", "nope_and_v")]), Whole("kv_lora"), When::Unused),
        linear("self_attn.o_proj", HIDDEN, Cut(&[part("heads", "v_head_dim")]), super::llama::O_BIAS),
    ],
    sums: &[("self_attn.o_proj", Stream::Tokens)],
    cross: false,
};

const DEEPSEEK_MOE: BlockRule = BlockRule {
    rules: &[
        norm("post_attention_layernorm.weight"),
        plain("mlp.gate", Whole("experts"), HIDDEN, When::Unused),
        tensor("mlp.gate.e_score_correction_bias", &[Whole("experts")], Use::Vector)
            .when(When::If("score_bias")),
        routed("mlp.experts.{e}.gate_proj", EXPERT_FFN, HIDDEN),
        routed("mlp.experts.{e}.up_proj", EXPERT_FFN, HIDDEN),
        routed("mlp.experts.{e}.down_proj", HIDDEN, EXPERT_FFN),
        linear("mlp.shared_experts.gate_proj", SHARED_FFN, HIDDEN, When::Unused).when(SHARED),
        linear("mlp.shared_experts.up_proj", SHARED_FFN, HIDDEN, When::Unused).when(SHARED),
        linear("mlp.shared_experts.down_proj", HIDDEN, SHARED_FFN, When::Unused).when(SHARED),
    ],
    sums: &[("mlp", Stream::Tokens)],
    cross: false,
};

pub(in crate::model) const DEEPSEEK_V2: Family = Family {
    architecture: Architecture::DeepseekV2,
    read: deepseek_v2,
    stacks: &[Stack {
        name: "",
        list: "layers",
        stream: Stream::Tokens,
        kinds: &[&[LATENT_ATTENTION, DEEPSEEK_MOE], &[LATENT_ATTENTION, MLP]],
    }],
    ..LLAMA
};

pub(in crate::model) const DEEPSEEK_V3: Family =
    Family { architecture: Architecture::DeepseekV3, read: deepseek_v3, ..DEEPSEEK_V2 };

/// Gate and up of each column side by side.
const GATE_UP_PAIRS: Ax = Cut(&[Part { dim: "expert_ffn", each: "", times: 2 }]);

pub(in crate::model) const GPT_OSS: Family = Family {
    architecture: Architecture::GptOss,
    read: gpt_oss,
    stacks: &[Stack {
        name: "",
        list: "layers",
        stream: Stream::Tokens,
        kinds: &[&[
            BlockRule {
                rules: &[
                    norm("input_layernorm.weight"),
                    plain("self_attn.q_proj", HEADS, HIDDEN, QKV_BIAS),
                    plain("self_attn.k_proj", KV, HIDDEN, QKV_BIAS),
                    plain("self_attn.v_proj", KV, HIDDEN, QKV_BIAS),
                    tensor("self_attn.sinks", &[Cut(&[part("heads", "")])], Use::Vector),
                    plain("self_attn.o_proj", HIDDEN, HEADS, QKV_BIAS),
                ],
                sums: &[("self_attn.o_proj", Stream::Tokens)],
                cross: false,
            },
            BlockRule {
                rules: &[
                    norm("post_attention_layernorm.weight"),
                    plain("mlp.router", Whole("experts"), HIDDEN, When::Always),
                    stacked("mlp.experts.gate_up_proj", GATE_UP_PAIRS, HIDDEN),
                    stacked("mlp.experts.down_proj", HIDDEN, EXPERT_FFN),
                ],
                sums: &[("mlp.experts", Stream::Tokens)],
                cross: false,
            },
        ]],
    }],
    ..LLAMA
};

/// A linear layer of each expert.
const fn routed(name: &'static str, out: Ax, input: Ax) -> Rule {
    linear(name, out, input, When::Unused).used(Use::Routed)
}

/// A linear layer of all experts in one tensor.
const fn stacked(name: &'static str, out: Ax, input: Ax) -> Rule {
    Rule { name, form: Form::Stacked { experts: EXPERTS, out, input }, when: When::Always, used: Use::Routed }
}

impl Draft {
    /// Sets the sizes of the experts: their number, those of a token, and each one's columns.
    fn experts(&mut self, f: &Fields, count: &'static str, ffn: &'static str) -> Result<()> {
        let experts = f.required(count, MAX_HEADS)?;
        let per_token = f.required("num_experts_per_tok", MAX_HEADS)?;
        if per_token > experts {
            return Err(
                f.error("num_experts_per_tok", format!("= {per_token} must be at most {count} = {experts}"))
            );
        }
        let sizes = &mut self.sizes[0];
        sizes.set("experts", experts, count);
        sizes.set("experts_per_token", per_token, "num_experts_per_tok");
        sizes.set("expert_ffn", f.required(ffn, MAX_DIM)?, ffn);
        Ok(())
    }
}

fn mixtral(f: &Fields) -> Result<Draft> {
    let names = Names { default_positions: 131_072, eps: ("rms_norm_eps", 1e-5), ..LLAMA_NAMES };
    let mut draft = standard(f, Architecture::Mixtral, &names)?;
    draft.experts(f, "num_local_experts", "intermediate_size")?;
    draft.slide_all(f)?;
    Ok(draft)
}

/// Layers with experts are kind 0, dense ones 1.
fn qwen_kinds(draft: &mut Draft, f: &Fields) -> Result<()> {
    let step = f.size("decoder_sparse_step", MAX_DIM)?.unwrap_or(1);
    let dense: Vec<u64> = match f.get("mlp_only_layers") {
        None => Vec::new(),
        Some(value) => {
            let list = value.as_array().and_then(|l| l.iter().map(Value::as_u64).collect());
            list.ok_or_else(|| f.wrong("mlp_only_layers", "a list of layers", value))?
        }
    };
    for (layer, kind) in draft.kinds[0].iter_mut().enumerate() {
        *kind = usize::from(!(layer + 1).is_multiple_of(step) || dense.contains(&(layer as u64)));
    }
    Ok(())
}

fn qwen2_moe(f: &Fields) -> Result<Draft> {
    let names = Names { default_positions: 32768, ..LLAMA_NAMES };
    let mut draft = standard(f, Architecture::Qwen2Moe, &names)?;
    draft.bias(true, false, false);
    draft.experts(f, "num_experts", "moe_intermediate_size")?;
    let shared = f.required("shared_expert_intermediate_size", MAX_DIM)?;
    draft.sizes[0].set("shared_ffn", shared, "shared_expert_intermediate_size");
    draft.flag("shared", true);
    qwen_kinds(&mut draft, f)?;
    draft.slide_from(f)?;
    Ok(draft)
}

fn qwen3_moe(f: &Fields) -> Result<Draft> {
    let names = Names { default_positions: 32768, ..LLAMA_NAMES };
    let mut draft = standard(f, Architecture::Qwen3Moe, &names)?;
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    draft.bias(bias, bias, false);
    draft.flag("qk_norm", true);
    draft.experts(f, "num_experts", "moe_intermediate_size")?;
    qwen_kinds(&mut draft, f)?;
    draft.slide_from(f)?;
    Ok(draft)
}

fn deepseek_v2(f: &Fields) -> Result<Draft> {
    deepseek(f, Architecture::DeepseekV2)
}

fn deepseek_v3(f: &Fields) -> Result<Draft> {
    let mut draft = deepseek(f, Architecture::DeepseekV3)?;
    let method = f.text("topk_method")?.unwrap_or("noaux_tc");
    draft.flag("score_bias", method == "noaux_tc");
    Ok(draft)
}

fn deepseek(f: &Fields, architecture: Architecture) -> Result<Draft> {
    // A head's width is that of its parts below; every head has its own key and value.
    let names =
        Names { kv_heads: "", head_dim: "", any_head_dim: true, default_positions: 2048, ..LLAMA_NAMES };
    let mut draft = standard(f, architecture, &names)?;
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    draft.bias(bias, bias, false);
    let nope = f.required("qk_nope_head_dim", MAX_DIM)?;
    let rope = f.required("qk_rope_head_dim", MAX_DIM)?;
    let v = f.required("v_head_dim", MAX_DIM)?;
    let kv_lora = f.required("kv_lora_rank", MAX_DIM)?;
    f.check_heads("qk_nope_head_dim", nope + rope.max(v), draft.spec.num_attention_heads)?;
    draft.spec.head_dim = nope + rope;
    let sizes = &mut draft.sizes[0];
    sizes.set("head_dim", nope + rope, "qk_nope_head_dim");
    sizes.set("v_head_dim", v, "v_head_dim");
    sizes.set("nope_and_v", nope + v, "qk_nope_head_dim");
    sizes.set("kv_lora", kv_lora, "kv_lora_rank");
    // What is cached of a token: the latent vector and the part of the key that has the position in it.
    sizes.set("latent", kv_lora + rope, "kv_lora_rank");
    if let Some(q_lora) = f.size("q_lora_rank", MAX_DIM)? {
        sizes.set("q_lora", q_lora, "q_lora_rank");
        draft.flag("q_lora", true);
    }
    if f.get("n_routed_experts").is_none() {
        draft.kinds[0].fill(1);
        return Ok(draft);
    }
    draft.experts(f, "n_routed_experts", "moe_intermediate_size")?;
    if let Some(shared) = f.size("n_shared_experts", MAX_HEADS)? {
        let width = shared * draft.sizes[0].value("expert_ffn");
        draft.sizes[0].set("shared_ffn", width, "n_shared_experts");
        draft.flag("shared", true);
    }
    let first = f.count("first_k_dense_replace", MAX_DIM)?.unwrap_or(0);
    let every = f.size("moe_layer_freq", MAX_DIM)?.unwrap_or(1);
    for (layer, kind) in draft.kinds[0].iter_mut().enumerate() {
        *kind = usize::from(layer < first || !layer.is_multiple_of(every));
    }
    // Layers that predict further tokens follow the others in the file; a decode step doesn't run them.
    let extra = f.count("num_nextn_predict_layers", MAX_HEADS)?.unwrap_or(0);
    let layers = draft.spec.num_layers;
    draft.ignored = (layers..layers + extra).map(|n| format!("model.layers.{n}.")).collect();
    Ok(draft)
}

fn gpt_oss(f: &Fields) -> Result<Draft> {
    let names = Names {
        default_head_dim: 64,
        default_positions: 131_072,
        eps: ("rms_norm_eps", 1e-5),
        ..LLAMA_NAMES
    };
    let mut draft = standard(f, Architecture::GptOss, &names)?;
    let bias = f.flag("attention_bias")?.unwrap_or(true);
    draft.bias(bias, bias, true);
    draft.experts(f, "num_local_experts", "intermediate_size")?;
    draft.slide(f, |layer| layer.is_multiple_of(2))?;
    Ok(draft)
}
