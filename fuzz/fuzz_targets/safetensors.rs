#![no_main]

use tensorwire_topology::ModelSpec;

const CONFIG: &str = r#"{"model_type":"llama","hidden_size":64,"intermediate_size":128,"num_attention_heads":4,
    "num_hidden_layers":1,"vocab_size":64,"rms_norm_eps":1e-5,"max_position_embeddings":64}"#;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(dir.path().join("config.json"), CONFIG).expect("written");
    std::fs::write(dir.path().join("model.safetensors"), bytes).expect("written");
    let _ = ModelSpec::load(dir.path());
});
