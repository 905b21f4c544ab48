//! The built-in model: Llama-shaped, its weights made from a seed, so that there is something to run on a
//! machine that has no model. It has no tokenizer: its prompt and its output are token ids.

/// Its `config.json`: 125 million parameters in f32, 25 million of them the embedding and as many the head.
pub const CONFIG: &str = r#"{
  "model_type": "llama",
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "num_key_value_heads": 4,
  "intermediate_size": 2048,
  "vocab_size": 32000,
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "hidden_act": "silu",
  "tie_word_embeddings": false,
  "torch_dtype": "float32"
}"#;

/// The seed of its weights.
pub const SEED: u64 = 0x7E45_0217_13E5;

/// A prompt for it.
pub const PROMPT: [u32; 16] =
    [1, 733, 16289, 28793, 1824, 349, 272, 5565, 302, 4843, 28804, 733, 28748, 16289, 28793, 28705];
