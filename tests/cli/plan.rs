//! `tensorwire plan` as a person and as a script use it.

mod support;

use std::path::PathBuf;

use serde_json::{Value, json};
use support::*;

/// A directory with this config.json.
fn model(config: &Value) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    (dir, path)
}

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 3, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    })
}

fn plan(path: &std::path::Path, more: &[&str]) -> std::process::Output {
    let mut args = vec!["plan", "--model", path.to_str().unwrap()];
    args.extend(more);
    run(args)
}

#[test]
fn json_has_the_fields_of_the_contract() {
    let (dir, path) = model(&llama());
    let output = plan(&path, &["--tp", "2", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let plan_json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan_json["schema"], "tensorwire.plan/v1");
    assert_eq!(plan_json["world"], 2);
    assert_eq!(plan_json["model"]["model_type"], "llama");
    let layers = plan_json["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 3);
    for layer in layers {
        assert_eq!(layer["attention"]["q_heads"], json!([[0, 5], [5, 9]]));
        assert_eq!(layer["attention"]["kv_heads"], json!([[0, 2], [1, 3]]));
        assert_eq!(layer["mlp"]["ffn"], json!([[0, 768], [768, 1536]]));
        for collective in layer["collectives"].as_array().unwrap() {
            assert_eq!(collective["op"], "all_reduce");
            assert!(collective["after"].is_string() && collective["predicted_us"].is_number());
            assert_eq!(collective["bytes_per_token"], 576 * 2);
        }
    }
    assert_eq!(plan_json["vocab"]["ranges"].as_array().unwrap().len(), 2);
    assert_eq!(plan_json["ranks"].as_array().unwrap().len(), 2);
    assert!(plan_json["ranks"][1]["weight_bytes"].as_u64().unwrap() > 0);
    assert!(
        plan_json["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .all(|t| t["name"].is_string() && t["slices"].is_array())
    );
    assert!(plan_json["predicted"]["decode_us_per_token"].is_number());
    assert!(!plan_json["notes"].as_array().unwrap().is_empty());

    // The same for the directory, and every time.
    assert_eq!(plan(dir.path(), &["--tp", "2", "--json"]).stdout, output.stdout);
}

#[test]
fn the_summary_says_what_each_rank_gets() {
    let (_dir, path) = model(&llama());
    let output = plan(&path, &["--tp", "2"]);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    for word in ["llama", "5, 4", "all_reduce", "note:"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn what_cannot_be_planned_is_one_line() {
    let (_dir, path) = model(&llama());
    assert!(refused(&plan(&path, &["--tp", "10"]), 2).contains("10 ranks are too many"));
    assert!(refused(&plan(&path, &["--tp", "0"]), 2).contains("at least one rank"));
    assert!(refused(&plan(&path, &[]), 2).contains("--tp <N>"));
    assert!(refused(&plan("/nonexistent/model".as_ref(), &["--tp", "2"]), 2).contains("/nonexistent/model"));

    let mut unknown = llama();
    unknown["model_type"] = json!("mamba");
    let (_dir, path) = model(&unknown);
    assert!(refused(&plan(&path, &["--tp", "2", "--json"]), 2).contains("mamba"));

    let mut huge = llama();
    huge["vocab_size"] = json!(u64::MAX);
    let (_dir, path) = model(&huge);
    refused(&plan(&path, &["--tp", "2"]), 2);

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(refused(&plan(dir.path(), &["--tp", "2"]), 2).contains("not valid JSON"));
    let empty = tempfile::tempdir().unwrap();
    assert!(refused(&plan(empty.path(), &["--tp", "2"]), 2).contains("config.json"));
}
