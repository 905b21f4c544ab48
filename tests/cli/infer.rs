//! `tensorwire infer`: the main job, over real rank processes.

#[path = "support/models.rs"]
mod models;
mod support;

use std::io::Read;
use std::path::Path;
use std::process::{Child, Output};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;
use support::*;

fn infer(args: &[&str]) -> Output {
    run([&["infer"], args].concat())
}

fn on(model: &Path, args: &[&str]) -> Output {
    infer(&[&["--model", model.to_str().unwrap()], args].concat())
}

/// The one object that `--json` prints.
#[track_caller]
fn object(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    assert_eq!(stderr(output), "");
    let text = stdout(output);
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[track_caller]
fn nothing_in_shared_memory() {
    let names: Vec<_> = std::fs::read_dir("/dev/shm").unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(!names.iter().any(|n| n.to_string_lossy().contains("tensorwire")), "{names:?}");
}

#[test]
fn the_built_in_model_gives_the_same_tokens_on_any_number_of_ranks() {
    let mut first: Option<Value> = None;
    for ranks in ["1", "2", "3"] {
        let json = object(&infer(&["--ranks", ranks, "--max-tokens", "3", "--json"]));
        let n: usize = ranks.parse().unwrap();
        assert_eq!(json["model_type"], "llama");
        assert_eq!(json["ranks"], n);
        let processors = std::thread::available_parallelism().unwrap().get();
        assert_eq!(json["threads_per_rank"], (processors / n).max(1));
        assert_eq!(json["verified"]["against"], "unsharded");
        assert_eq!(json["verified"]["equal_tokens"], true);
        let diff = json["verified"]["max_abs_diff"].as_f64().unwrap();
        assert!(diff < 1e-3 && (diff > 0.0 || n == 1), "{diff}");
        for field in ["prefill_s", "decode_tokens_per_s", "unsharded_decode_tokens_per_s"] {
            assert!(json["timing"][field].as_f64().unwrap() > 0.0, "{json}");
        }
        let share = json["timing"]["comm_share"].as_f64().unwrap();
        assert!(if n == 1 { share == 0.0 } else { share > 0.0 && share < 1.0 }, "{share}");
        let weights: Vec<u64> =
            json["weight_bytes_per_rank"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap()).collect();
        assert_eq!(weights.len(), n);
        let tokens = json["tokens"].as_array().unwrap();
        assert_eq!(tokens.len(), 3);
        match &first {
            None => first = Some(json),
            Some(one) => {
                assert_eq!(json["tokens"], one["tokens"]);
                // Little is held twice: norms, and at 3 ranks a key/value head or two a layer.
                let whole = one["weight_bytes_per_rank"][0].as_u64().unwrap();
                let sum: u64 = weights.iter().sum();
                assert!(sum >= whole && sum < whole + whole / 20, "{weights:?} of {whole}");
            }
        }
    }
    nothing_in_shared_memory();
}

#[test]
fn a_person_sees_the_plan_the_tokens_and_the_comparison() {
    let output = infer(&["--max-tokens", "3"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    let text = stdout(&output);
    for part in [
        "built-in model",
        "query heads",
        "all 3 tokens equal",
        "tokens/s unsharded",
        "communication",
        "MB by rank",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let ids = text.lines().find(|l| !l.is_empty() && l.split_whitespace().all(|w| w.parse::<u32>().is_ok()));
    assert_eq!(ids.unwrap().split_whitespace().count(), 3);
}

#[test]
fn a_decoder_continues_a_prompt() {
    let dir = models::decoder();
    let prompt = ["--prompt", "The sea is wide", "--max-tokens", "9", "--json"];
    let alone = object(&on(dir.path(), &[&prompt[..], &["--ranks", "1"]].concat()));
    assert_eq!(alone["prompt"], "The sea is wide");
    assert_eq!(alone["prompt_tokens"], serde_json::json!([1, 2, 3, 4]));
    assert!(alone["text"].is_string());
    for ranks in ["2", "4", "14"] {
        let json = object(&on(dir.path(), &[&prompt[..], &["--ranks", ranks]].concat()));
        assert_eq!(json["tokens"], alone["tokens"]);
        assert_eq!(json["text"], alone["text"]);
        assert_eq!(json["verified"]["equal_tokens"], true);
    }
    let unverified = object(&on(dir.path(), &[&prompt[..], &["--no-verify"]].concat()));
    assert_eq!(unverified["tokens"], alone["tokens"]);
    assert!(unverified["verified"].is_null());
}

#[test]
fn an_encoder_embeds_and_compares_texts() {
    let dir = models::encoder();
    let texts = ["--text", "a ship sails", "--text", "-the sea", "--text", "A ship  sails", "--ranks", "3"];
    let json = object(&on(dir.path(), &[&texts[..], &["--json"]].concat()));
    assert_eq!(json["model_type"], "bert");
    assert_eq!(json["texts"], serde_json::json!(["a ship sails", "-the sea", "A ship  sails"]));
    let embeddings: Vec<Vec<f64>> = serde_json::from_value(json["embeddings"].clone()).unwrap();
    assert_eq!(embeddings.len(), 3);
    for e in &embeddings {
        assert_eq!(e.len(), 48);
        assert!((e.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
    }
    assert_eq!(embeddings[0], embeddings[2]);
    assert_ne!(embeddings[0], embeddings[1]);
    assert!(json["verified"]["max_abs_diff"].as_f64().unwrap() < 1e-5);
    assert!(json["timing"]["decode_tokens_per_s"].is_null());

    let output = on(dir.path(), &texts);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(text.contains("1.000") && text.contains("3 A ship  sails"), "{text}");
    assert!(text.contains("same as the unsharded run"), "{text}");
}

/// A run of the built-in model that goes on until somebody ends it, and is under way.
fn under_way(mark: &str, more: &[&str]) -> (Child, impl Read + use<>) {
    let args = [&["infer", "--max-tokens", "2000", "--no-verify"], more].concat();
    let mut child = tensorwire(args).env("TEST_MARK", mark).spawn().unwrap();
    let mut out = reader(&mut child);
    read_until(&mut out, |line| line.trim().is_empty());
    // Tokens follow on one line.
    let mut some = [0; 16];
    out.read_exact(&mut some).unwrap();
    (child, out)
}

/// The process that is this rank of what `mark` marks.
fn process_of(mark: &str, rank: usize) -> u32 {
    let mine = marked("TEST_MARK", mark);
    let of_rank = marked("TENSORWIRE_RANK", &rank.to_string());
    *mine.iter().find(|pid| of_rank.contains(pid)).unwrap()
}

#[test]
fn a_rank_killed_in_the_middle_ends_the_command_and_is_named() {
    for rank in [0, 2] {
        let mark = format!("middle-{rank}-{}", std::process::id());
        let (child, out) = under_way(&mark, &["--ranks", "3"]);
        let start = Instant::now();
        send(process_of(&mark, rank), Signal::KILL);
        let output = child.wait_with_output().unwrap();
        assert!(start.elapsed() < SOON);
        drop(out);
        let line = refused(&output, 1);
        assert!(line.contains(&format!("rank {rank} was killed by signal 9 (SIGKILL)")), "{line}");
        eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
    }
    nothing_in_shared_memory();
}

#[test]
fn an_interrupt_ends_the_command() {
    let mark = format!("interrupt-{}", std::process::id());
    let (child, out) = under_way(&mark, &[]);
    send(child.id(), Signal::INT);
    let output = child.wait_with_output().unwrap();
    drop(out);
    assert!(refused(&output, 130).contains("interrupted by SIGINT"));
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
}

#[test]
fn nothing_survives_the_command_when_it_is_killed() {
    let mark = format!("gone-{}", std::process::id());
    let (mut child, _out) = under_way(&mark, &[]);
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
    nothing_in_shared_memory();
}

#[test]
fn a_reader_that_leaves_ends_the_command_quietly() {
    let mark = format!("leaves-{}", std::process::id());
    let (child, out) = under_way(&mark, &[]);
    drop(out);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(141), ""));
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
}

#[test]
fn a_request_that_makes_no_sense_is_one_line() {
    let (decoder, encoder) = (models::decoder(), models::encoder());
    let long = "sea ".repeat(40);
    let cases: &[(Option<&Path>, &[&str], &str)] = &[
        (None, &["--ranks", "0"], "at least one rank"),
        (None, &["--ranks", "13"], "num_attention_heads"),
        (None, &["--max-tokens", "0"], "--max-tokens"),
        (None, &["--max-tokens", "3000"], "2048 positions"),
        (None, &["--max-tokens", "many"], "many"),
        (None, &["--text", "a"], "--model"),
        (None, &["--prompt", "a"], "--model"),
        (None, &["--modell", "x"], "--modell"),
        (Some(Path::new("/nonexistent/model")), &[], "no such directory"),
        (Some(Path::new("/etc/passwd")), &[], "is a file"),
        (Some(Path::new("/proc")), &["--prompt", "a"], "config.json"),
        (Some(decoder.path()), &["--text", "a"], "is a decoder"),
        (Some(decoder.path()), &[], "--prompt"),
        (Some(decoder.path()), &["--prompt", ""], "empty"),
        (Some(decoder.path()), &["--prompt", &long], "positions"),
        (Some(decoder.path()), &["--prompt", "sea", "--max-tokens", "32"], "positions"),
        (Some(decoder.path()), &["--prompt", "sea", "--text", "a"], "--text"),
        (Some(decoder.path()), &["--prompt", "sea", "--ranks", "15"], "15 ranks are too many"),
        (Some(encoder.path()), &["--prompt", "a"], "is an encoder"),
        (Some(encoder.path()), &[], "--text"),
        (Some(encoder.path()), &["--text", "a", "--text", &long], "text 1 has 40 tokens"),
        (Some(encoder.path()), &["--text", "a", "--ranks", "4"], "4 ranks are too many"),
    ];
    for (model, args, says) in cases {
        for json in [&[][..], &["--json"]] {
            let args = [args, json].concat();
            let output = model.map_or_else(|| infer(&args), |model| on(model, &args));
            let line = refused(&output, 2);
            assert!(line.contains(says), "{args:?}: {line}");
        }
    }
}

#[test]
fn a_damaged_model_is_one_line() {
    type Damage = fn(&Path);
    let cases: &[(Damage, &str)] = &[
        (|dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap(), "safetensors"),
        (
            |dir| {
                let path = dir.join("model.safetensors");
                let whole = std::fs::read(&path).unwrap();
                std::fs::write(&path, &whole[..whole.len() - 100]).unwrap();
            },
            "model.safetensors",
        ),
        (|dir| std::fs::write(dir.join("model.safetensors"), b"junk").unwrap(), "model.safetensors"),
        (|dir| std::fs::write(dir.join("config.json"), b"{}").unwrap(), "model_type"),
        (|dir| std::fs::write(dir.join("config.json"), b"{\"model_type\": \"mamba\"}").unwrap(), "mamba"),
        (|dir| std::fs::write(dir.join("tokenizer.json"), b"{").unwrap(), "tokenizer.json"),
        (|dir| std::fs::remove_file(dir.join("tokenizer.json")).unwrap(), "tokenizer.json"),
    ];
    for (damage, says) in cases {
        let dir = models::decoder();
        damage(dir.path());
        let line = refused(&on(dir.path(), &["--prompt", "sea"]), 2);
        assert!(line.contains(says), "{says}: {line}");
    }
}
