//! Small models of every family, of any sizes.

use serde_json::{Value, json};

/// Sizes of a small model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Toy {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    /// Query heads of each key/value head.
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) ffn: usize,
    pub(crate) vocab: usize,
    pub(crate) experts: usize,
    /// Switches what a family leaves open: biases, shared experts, gates.
    pub(crate) variant: usize,
}

/// Every family.
pub(crate) const FAMILIES: [&str; 26] = [
    "bert",
    "llama",
    "qwen2",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "gpt2",
    "gpt_neox",
    "falcon",
    "t5",
    "umt5",
    "siglip_vision_model",
    "siglip",
    "vit",
    "CosmosTransformer3DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "AutoencoderKLCosmos",
];

impl Toy {
    /// Query heads of a model of this family: those without groups have one a key/value head.
    pub(crate) fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// The configuration.
    pub(crate) fn config(&self, family: &str) -> Value {
        let (heads, kv, d) = (self.heads(), self.kv_heads, self.head_dim);
        let (odd, per_token) = (self.variant % 2 == 1, self.experts.min(2));
        let hidden = heads * d;
        let dtype = ["float32", "float16", "bfloat16"][self.variant % 3];
        let mut c = json!({
            "model_type": family, "num_hidden_layers": self.layers, "hidden_size": hidden,
            "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": self.ffn,
            "vocab_size": self.vocab, "max_position_embeddings": 7, "tie_word_embeddings": odd,
            "attention_bias": self.variant % 3 == 1, "mlp_bias": self.variant % 3 == 2, "head_dim": d,
            "torch_dtype": dtype,
        });
        let mut set = |more: Value| c.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let vision = json!({"image_size": 6, "patch_size": 2, "hidden_size": hidden, "num_attention_heads": heads,
                            "num_hidden_layers": self.layers, "intermediate_size": self.ffn});
        match family {
            "mixtral" | "gpt_oss" => {
                set(json!({"num_local_experts": self.experts, "num_experts_per_tok": per_token}))
            }
            "qwen2_moe" | "qwen3_moe" => set(json!({
                "num_experts": self.experts, "num_experts_per_tok": per_token, "moe_intermediate_size": self.ffn,
                "shared_expert_intermediate_size": self.ffn + 1, "decoder_sparse_step": 1 + self.variant % 2,
            })),
            "deepseek_v2" | "deepseek_v3" => set(json!({
                "n_routed_experts": self.experts, "num_experts_per_tok": per_token,
                "moe_intermediate_size": self.ffn, "n_shared_experts": if odd { json!(2) } else { Value::Null },
                "first_k_dense_replace": self.variant % 2, "kv_lora_rank": 5, "qk_nope_head_dim": d,
                "qk_rope_head_dim": 2, "v_head_dim": d + 1, "q_lora_rank": if odd { json!(3) } else { Value::Null },
            })),
            "gpt2" => {
                set(json!({"n_embd": hidden, "n_layer": self.layers, "n_head": heads, "n_inner": self.ffn,
                                 "n_positions": 7}))
            }
            "gpt_neox" => set(json!({"use_parallel_residual": odd})),
            "falcon" => set(json!({
                "new_decoder_architecture": self.variant.is_multiple_of(4), "multi_query": self.variant % 4 == 1,
                "parallel_attn": self.variant % 4 != 2, "num_kv_heads": kv, "ffn_hidden_size": self.ffn,
                "bias": self.variant >= 4,
            })),
            "t5" | "umt5" => set(json!({
                "d_model": hidden + 1, "d_kv": d, "d_ff": self.ffn, "num_heads": heads, "num_layers": self.layers,
                "num_decoder_layers": self.layers + 1, "relative_attention_num_buckets": 4,
                "feed_forward_proj": if odd { "gated-gelu" } else { "relu" },
                "is_encoder_decoder": !self.variant.is_multiple_of(3),
            })),
            "siglip_vision_model" | "vit" => set(vision),
            "siglip" => set(json!({
                "vision_config": vision,
                "text_config": {"hidden_size": hidden, "num_attention_heads": heads, "vocab_size": self.vocab,
                                "num_hidden_layers": self.layers, "intermediate_size": self.ffn + 1},
            })),
            _ if family.starts_with(char::is_uppercase) => {
                c = json!({
                    "_class_name": family, "num_attention_heads": heads, "attention_head_dim": d,
                    "num_layers": self.layers, "num_single_layers": self.layers, "in_channels": 3,
                    "text_embed_dim": 5, "adaln_lora_dim": 2, "max_size": [2, 4, 4], "joint_attention_dim": 5,
                    "pooled_projection_dim": 4, "guidance_embeds": odd, "ffn_dim": self.ffn, "text_dim": 5,
                    "freq_dim": 4, "patch_size": if family.starts_with("Flux") { json!(1) } else { json!([1, 2, 2]) },
                    "image_dim": if odd { json!(3) } else { Value::Null },
                    "added_kv_proj_dim": if odd { json!(hidden) } else { Value::Null },
                });
            }
            _ => {}
        }
        c
    }
}
