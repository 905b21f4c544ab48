//! The architectures that have sharding rules.

macro_rules! architectures {
    ($($(#[doc = $doc:literal])* $name:ident: $($model_type:literal),+;)*) => {
        /// The architectures that have sharding rules.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Architecture {
            $($(#[doc = $doc])* $name,)*
        }

        impl Architecture {
            /// Every architecture.
            pub const ALL: &[Architecture] = &[$(Architecture::$name),*];

            /// What its configuration may call it: a `model_type` or a diffusers `_class_name`.
            pub const fn model_types(self) -> &'static [&'static str] {
                match self {
                    $(Architecture::$name => &[$($model_type),+],)*
                }
            }
        }
    };
}

architectures! {
    /// BERT: an encoder with learned positions and LayerNorm after each block.
    Bert: "bert";
    /// Llama 2 and 3, SmolLM and others of the same shape: a decoder with grouped-query attention.
    Llama: "llama";
    /// Qwen2 and Qwen2.5: Llama's shape with biases on the query, key and value projections.
    Qwen2: "qwen2";
    /// Mistral and Mistral NeMo: Llama's shape, perhaps with an attention window.
    Mistral: "mistral";
    /// Qwen3: Llama's shape with a norm of each head's queries and keys.
    Qwen3: "qwen3";
    /// Gemma 2: norms before and after each block, an attention window in every other layer.
    Gemma2: "gemma2";
    /// Gemma 3, with or without its vision tower.
    Gemma3: "gemma3", "gemma3_text";
    /// Phi 3 and 4: fused q, k and v; packed gate and up.
    Phi3: "phi3";
    /// Mixtral: routed experts in every layer.
    Mixtral: "mixtral";
    /// Qwen1.5-MoE and Qwen2-MoE: routed experts and a gated shared one.
    Qwen2Moe: "qwen2_moe";
    /// Qwen3-MoE: routed experts.
    Qwen3Moe: "qwen3_moe";
    /// DeepSeek-V2: multi-head latent attention, routed and shared experts.
    DeepseekV2: "deepseek_v2";
    /// DeepSeek-V3 and R1: as V2.
    DeepseekV3: "deepseek_v3";
    /// gpt-oss: attention sinks, experts in one tensor, in MXFP4.
    GptOss: "gpt_oss";
    /// GPT-2: fused and transposed q, k and v.
    Gpt2: "gpt2";
    /// GPT-NeoX and Pythia: attention and feed-forward layer at once, q, k and v fused by head.
    GptNeox: "gpt_neox";
    /// Falcon: attention and feed-forward layer at once, one key/value head or groups.
    Falcon: "falcon", "RefinedWeb", "RefinedWebModel";
    /// T5: an encoder and a decoder, or the encoder alone; relative positions.
    T5: "t5", "mt5";
    /// UMT5: T5 with relative positions in each layer.
    Umt5: "umt5";
    /// SigLIP's vision tower.
    SiglipVision: "siglip_vision_model";
    /// SigLIP: a vision tower and a text tower.
    Siglip: "siglip";
    /// The vision transformer.
    Vit: "vit";
    /// Cosmos-Predict1's diffusion transformer.
    CosmosTransformer: "CosmosTransformer3DModel";
    /// Flux's diffusion transformer.
    FluxTransformer: "FluxTransformer2DModel";
    /// Wan's diffusion transformer.
    WanTransformer: "WanTransformer3DModel";
    /// Cosmos's autoencoder, of convolutions.
    CosmosAutoencoder: "AutoencoderKLCosmos";
    /// Another, whose tensors have the names and shapes of a known one.
    Unknown: "unknown";
}

impl Architecture {
    /// What its configuration calls it: the first of [`model_types`](Architecture::model_types).
    pub const fn model_type(self) -> &'static str {
        self.model_types()[0]
    }

    /// Whether it generates tokens: it then has an output head and a KV cache. (T5's encoder alone is told by
    /// [`ModelSpec::logits`](super::ModelSpec::logits).)
    pub const fn is_decoder(self) -> bool {
        use Architecture::*;
        !matches!(
            self,
            Bert | SiglipVision
                | Siglip
                | Vit
                | CosmosTransformer
                | FluxTransformer
                | WanTransformer
                | CosmosAutoencoder
        )
    }
}
