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
}

impl Architecture {
    /// What its configuration calls it: the first of [`model_types`](Architecture::model_types).
    pub const fn model_type(self) -> &'static str {
        self.model_types()[0]
    }

    /// Whether it generates tokens: it then has an output head and a KV cache.
    pub const fn is_decoder(self) -> bool {
        !matches!(self, Architecture::Bert)
    }
}
