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

#[test]
fn predictions_are_compared_with_this_machine() {
    let folder = tempfile::tempdir().unwrap();
    let table = folder.path().join("table.json");
    let with = |line: &str| {
        let output = tensorwire(line.split_whitespace()).env("TENSORWIRE_TABLE", &table).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    let verify = || -> Value { serde_json::from_str(&with("plan verify --passes 1 --json")).unwrap() };
    let found = verify();
    assert_eq!(found["schema"], "tensorwire.verify/v1");
    let notes = found["notes"].to_string();
    assert!(notes.contains("constants: nothing measured yet"), "{notes}");
    let rows = |found: &Value, which: &str| found["verified"][which].as_array().unwrap().clone();
    // Were the processors moved between two measurements, one of them may be of another distance.
    for row in rows(&found, "collectives") {
        let known = [("all_reduce", 3072, 25), ("all_gather", 64_000, 1)];
        assert!(
            known.iter().any(|k| row["what"] == k.0 && row["bytes"] == k.1 && row["calls"] == k.2),
            "{row}"
        );
    }
    let parts = rows(&found, "parts");
    if let Some(step) = parts.last() {
        let names: Vec<&str> = parts.iter().map(|row| row["what"].as_str().unwrap()).collect();
        assert_eq!((names.len(), names[0], names[12], names[13]), (15, "embedding", "layer 11", "head"));
        assert_eq!((&step["what"], &step["band"]), (&"step".into(), &Value::Null));
    }
    for row in rows(&found, "collectives").iter().chain(&parts) {
        let of = |name: &str| row[name].as_f64().unwrap();
        assert!(of("predicted_us") > 0.0 && of("measured_us") > 0.0 && of("ratio") > 0.0, "{row}");
    }
    if std::thread::available_parallelism().unwrap().get() < 2 {
        return;
    }
    with("topo --probe --bytes 1K,64K --passes 1");
    let found = verify();
    let source = found["verified"]["source"].as_str().unwrap();
    assert!(source.contains("curves measured on this machine over shm"), "{source}");
    let text = with("plan verify --passes 1");
    assert!(text.contains("predicted    measured   ratio    band"), "{text}");
    assert!(text.contains("note: the curves were measured "), "{text}");

    // What was measured of this machine is what a fabric that is this machine has.
    let here: Value = serde_json::from_str(&with("topo --json")).unwrap();
    let file = folder.path().join("here.json");
    std::fs::write(&file, here["fabric"].to_string()).unwrap();
    let (_dir, path) = model(&llama());
    let on = |fabric: &str| -> Value {
        let line = format!("plan --model {} --fabric {fabric} --json", path.display());
        serde_json::from_str(&with(&line)).unwrap()
    };
    let last = |notes: &Value| notes.as_array().unwrap().last().unwrap().as_str().unwrap().to_owned();
    let found = on(file.to_str().unwrap());
    assert!(last(&found["notes"]).contains("curves measured on this machine over shm"), "{found}");
    assert!(last(&found["placement"]["notes"]).contains("memory's bandwidth was measured"), "{found}");
    let found = on(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/fabrics/8-gpus-nvlink.toml"));
    assert!(
        last(&found["notes"]).ends_with("are from the links and devices of 8 x 80 GB, NVLink"),
        "{found}"
    );
}

#[test]
fn a_plan_on_a_fabric_is_predicted_as_its_placement() {
    let (dir, path) = model(&llama());
    let file = dir.path().join("fabric.toml");
    let toml = r#"
        name = "two cards"
        [[model]]
        name = "gpu"
        kind = "gpu"
        memory = "2 GiB"
        memory_gbps = 10
        [[host]]
        name = "host"
        device = [{ model = "gpu", count = 2 }]
        [links]
        host = { alpha_us = 7, gbps = 20 }
    "#;
    std::fs::write(&file, toml).unwrap();
    let planned = |more: &[&str]| -> Value {
        let args = [&["--fabric", file.to_str().unwrap(), "--json"], more].concat();
        let output = plan(&path, &args);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let found = planned(&[]);
    assert_eq!((&found["world"], &found["placement"]["chosen"]["degrees"]["tp"]), (&json!(2), &json!(2)));
    let of = |value: &Value| value.as_f64().unwrap();
    let exchanges: f64 = found["placement"]["chosen"]["predicted"]["step"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|cost| cost["of"] == "tp")
        .map(|cost| of(&cost["us"]))
        .sum();
    let planned_us = of(&found["predicted"]["comm_us_per_token"]);
    assert!((planned_us / exchanges - 1.0).abs() < 0.05, "{planned_us} and {exchanges}");
    // The same without a search.
    assert_eq!(planned(&["--tp", "2"])["predicted"], found["predicted"]);
    let constants: Value = serde_json::from_slice(&plan(&path, &["--tp", "2", "--json"]).stdout).unwrap();
    assert!(of(&constants["predicted"]["comm_us_per_token"]) < planned_us);
}

#[test]
fn what_can_not_be_compared_is_refused() {
    let with =
        |line: &str| tensorwire(line.split_whitespace()).env("TENSORWIRE_TABLE", "off").output().unwrap();
    for (line, why) in [
        ("plan verify --tp 0", "at least one rank"),
        ("plan verify --tp 99", "99 ranks are too many"),
        ("plan verify --passes 0", "0 is not in"),
        ("plan verify --model /nonexistent", "/nonexistent"),
        ("plan verify --refit", "TENSORWIRE_TABLE is off"),
        ("plan verify --refit --tp 1", "give --tp 2 or more"),
        ("plan", "not provided: --model"),
    ] {
        let refusal = refused(&with(line), 2);
        assert!(refusal.contains(why), "{line}: {refusal}");
    }
}

#[test]
fn an_explanation_is_text_and_data() {
    let (_dir, path) = model(&llama());
    let output = plan(&path, &["--tp", "2", "--explain"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for words in
        ["query heads      5, 4", "waits for", "limit: at most 9 ranks", "this plan", "pad to 12 query heads"]
    {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");

    let output = plan(&path, &["--tp", "2", "--explain", "--json"]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["world"], &json["explain"]["limit"]["most_ranks"]), (&json!(2), &json!(9)));
}

#[test]
fn what_is_refused_says_what_to_do_instead() {
    let (_dir, path) = model(&llama());
    let line = refused(&plan(&path, &["--tp", "18", "--explain"]), 2);
    for words in
        ["num_attention_heads = 9", "nearest legal number of ranks is 9", "tp 9 in 2 pipeline stages"]
    {
        assert!(line.contains(words), "{words}: {line}");
    }
}

#[test]
fn pictures_and_pages_are_files() {
    let (dir, path) = model(&llama());
    let (svg, html) = (dir.path().join("plan.svg"), dir.path().join("plan.html"));
    let files = ["--tp", "2", "--svg", svg.to_str().unwrap(), "--html", html.to_str().unwrap()];
    assert_eq!(plan(&path, &files).status.code(), Some(0));
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg ") && picture.contains(">rank 1<"));
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains(&picture) && !page.contains("Why"));
    let mut explained = files.to_vec();
    explained.push("--explain");
    assert_eq!(plan(&path, &explained).status.code(), Some(0));
    assert!(std::fs::read_to_string(&html).unwrap().contains("<h2>Why</h2>"));

    // On machines, with what joins the ranks.
    let fabric = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/fabrics/8-gpus-nvlink.toml");
    let mut on_fabric = files.to_vec();
    on_fabric.extend(["--fabric", fabric]);
    assert_eq!(plan(&path, &on_fabric).status.code(), Some(0));
    assert!(std::fs::read_to_string(&svg).unwrap().contains(" links<"));

    // What can't be planned leaves no file, and what can't be written is said.
    let new = dir.path().join("new.svg");
    refused(&plan(&path, &["--tp", "10", "--svg", new.to_str().unwrap()]), 2);
    assert!(!new.exists());
    assert!(refused(&plan(&path, &["--tp", "2", "--html", "/nonexistent/x.html"]), 2).contains("--html"));
}

#[test]
fn what_moves_is_the_same_from_files_and_from_the_model() {
    let (dir, path) = model(&llama());
    let file = |tp: &str| {
        let file = dir.path().join(format!("{tp}.json"));
        std::fs::write(&file, plan(&path, &["--tp", tp, "--json"]).stdout).unwrap();
        file
    };
    let (before, after) = (file("3"), file("2"));
    let (before, after) = (before.to_str().unwrap(), after.to_str().unwrap());
    let output = run(["plan", "diff", before, after, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["schema"], &json["worlds"]), (&json!("tensorwire.plan-diff/v1"), &json!([3, 2])));
    assert!(json["total_bytes"].as_u64().unwrap() > 0);

    let model = path.to_str().unwrap();
    let of_model = ["plan", "diff", "--model", model, "--tp", "3", "--tp", "2", "--json"];
    assert_eq!(run(of_model).stdout, output.stdout);
    assert!(stdout(&run(["plan", "diff", before, after])).contains("from 3 to 2 ranks"));
    assert!(stdout(&run(["plan", "diff", after, after])).contains(": 0 B of weights move"));

    assert!(refused(&run(["plan", "diff", before]), 2).contains("2 values"));
    assert!(refused(&run(["plan", "diff", "--model", model, "--tp", "3"]), 2).contains("--tp twice"));
    assert!(refused(&run(["plan", "diff", before, model]), 2).contains("config.json"));
}
