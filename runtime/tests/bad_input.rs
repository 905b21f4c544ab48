//! Bad input is an error that says what to do, never a panic or a crash.

mod common;

use std::fs::{self, File};
use std::path::Path;

use common::{PROMPT, SEED, Shape, generate, on_ranks, write_model};
use safetensors::Dtype;
use tensorwire::Communicator;
use tensorwire::topology::{self, Planner};
use tensorwire_runtime::{Error, Model, Runtime};

const SHAPE: Shape =
    Shape { model_type: "llama", heads: 4, kv_heads: 2, head_dim: 8, ffn: 96, vocab: 257, tied: false };

fn directory(files: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &SHAPE.config(), Dtype::F32, files);
    dir
}

/// Opening fails with a message that has all of `parts`.
fn refuses(dir: &Path, parts: &[&str]) -> Error {
    let error = Model::open(dir).err().expect("opened");
    let said = error.to_string();
    assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    assert!(!said.contains('\n'), "{said}");
    error
}

fn edit_config(dir: &Path, from: &str, to: &str) {
    let path = dir.join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    assert!(config.contains(from));
    fs::write(path, config.replace(from, to)).unwrap();
}

#[test]
fn missing_files() {
    refuses(Path::new("/nowhere/at/all"), &["/nowhere/at/all"]);
    let dir = tempfile::tempdir().unwrap();
    refuses(dir.path(), &["config.json"]);
    fs::write(dir.path().join("config.json"), SHAPE.config()).unwrap();
    refuses(dir.path(), &["model.safetensors"]);
    let dir = directory(2);
    fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    refuses(dir.path(), &["model-00002-of-00002.safetensors"]);
}

#[test]
fn truncated_at_any_place() {
    let dir = directory(1);
    let path = dir.path().join("model.safetensors");
    let length = fs::metadata(&path).unwrap().len();
    for keep in [length - 1, length / 2, 4096, 100, 8, 7, 0] {
        File::options().write(true).open(&path).unwrap().set_len(keep).unwrap();
        let error = refuses(dir.path(), &["model.safetensors", "truncated"]);
        assert!(matches!(error, Error::Planner(topology::Error::Safetensors { .. })), "{error:?}");
    }
}

#[test]
fn truncated_after_it_was_opened() {
    let dir = directory(1);
    let model = Model::open(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    let length = fs::metadata(&path).unwrap().len();
    File::options().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
    let error = on_ranks(&model, 2, |_| Ok(())).unwrap_err();
    assert!(matches!(error, Error::Truncated { bytes, .. } if bytes == length / 2), "{error}");
}

#[test]
fn shapes_that_contradict_the_config() {
    let dir = directory(1);
    edit_config(dir.path(), r#""intermediate_size": 96"#, r#""intermediate_size": 97"#);
    refuses(dir.path(), &["gate_proj", "96", "97"]);
    let dir = directory(1);
    edit_config(dir.path(), r#""num_hidden_layers": 3"#, r#""num_hidden_layers": 4"#);
    refuses(dir.path(), &["model.layers.3."]);
}

#[test]
fn what_it_cannot_run() {
    let dir = directory(1);
    edit_config(dir.path(), r#""llama""#, r#""mamba""#);
    refuses(dir.path(), &["mamba", "llama"]);
    let dir = directory(1);
    edit_config(dir.path(), r#""silu""#, r#""relu""#);
    let error = refuses(dir.path(), &["hidden_act", "relu", "silu"]);
    assert!(matches!(error, Error::Unsupported { key: "hidden_act", .. }), "{error:?}");
    let dir = directory(1);
    let yarn = r#""rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "hidden_act""#;
    edit_config(dir.path(), r#""hidden_act""#, yarn);
    refuses(dir.path(), &["yarn", "llama3"]);
}

#[test]
fn a_damaged_tokenizer() {
    let dir = directory(1);
    fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    let error = refuses(dir.path(), &["tokenizer.json"]);
    assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
}

#[test]
fn prompts() {
    let model = Model::seeded(&SHAPE.config(), SEED).unwrap();
    let run = |prompt: &[u32], max_tokens| {
        on_ranks(&model, 2, |runtime| runtime.generate(prompt, max_tokens, |_| ()))
            .map(|mut ranks| ranks.remove(0))
    };
    assert!(matches!(run(&[], 1), Err(Error::EmptyPrompt)));
    assert!(matches!(run(&[5, 257], 1), Err(Error::TokenOutOfRange { id: 257, vocab: 257 })));
    for max_tokens in [118, usize::MAX] {
        let error = run(&PROMPT, max_tokens).unwrap_err();
        assert!(matches!(error, Error::ContextTooLong { prompt: 11, limit: 128, .. }), "{error}");
    }
    assert_eq!(run(&PROMPT, 117).unwrap().tokens.len(), 117);
    assert_eq!(run(&PROMPT, 0).unwrap().tokens.len(), 0);
    assert!(matches!(model.tokenize("text"), Err(Error::NoTokenizer)));
    let error = on_ranks(&model, 1, |runtime| runtime.embed(&["text"])).unwrap_err();
    assert!(matches!(error, Error::WrongKind { .. }), "{error}");
}

#[test]
fn weights_that_overflow_are_noticed() {
    let dir = directory(1);
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let model = Model::open(dir.path()).unwrap();
    let error = on_ranks(&model, 2, |runtime| runtime.generate(&PROMPT, 1, |_| ())).unwrap_err();
    assert!(matches!(error, Error::NotFinite), "{error}");
}

#[test]
fn a_plan_for_another_world_or_model() {
    let model = Model::seeded(&SHAPE.config(), SEED).unwrap();
    let alone = || Communicator::in_process(1).unwrap().remove(0);
    let plan = Planner::new(model.spec()).plan(2).unwrap();
    let error = Runtime::load(&model, &plan, alone()).err().unwrap();
    assert!(matches!(error, Error::Plan(_)), "{error}");
    let other = Model::seeded(&Shape { ffn: 95, ..SHAPE }.config(), SEED).unwrap();
    let plan = Planner::new(other.spec()).plan(1).unwrap();
    let error = Runtime::load(&model, &plan, alone()).err().unwrap();
    assert!(matches!(error, Error::Planner(topology::Error::InvalidPlan(_))), "{error}");
}

#[test]
fn a_lost_rank_is_named() {
    let model = Model::seeded(&SHAPE.config(), SEED).unwrap();
    let plan = Planner::new(model.spec()).plan(2).unwrap();
    let mut comms = Communicator::in_process(2).unwrap();
    drop(comms.remove(1));
    let mut runtime = Runtime::load(&model, &plan, comms.remove(0)).unwrap();
    let error = runtime.generate(&PROMPT, 1, |_| ()).err().unwrap();
    assert!(matches!(error, Error::Comm(tensorwire::Error::PeerLost { rank: 0, peer: 1, .. })), "{error}");
}

#[test]
fn the_end_of_a_text() {
    let dir = directory(1);
    let model = Model::open(dir.path()).unwrap();
    let tokens = generate(&model, 1, 6).remove(0).tokens;
    // Make the third token the end, first in config.json, then by the file that has the last word on it.
    let (other, end) = (tokens.iter().position(|t| *t == tokens[2]).unwrap(), tokens[2]);
    edit_config(dir.path(), r#""hidden_act""#, &format!(r#""eos_token_id": {end}, "hidden_act""#));
    let model = Model::open(dir.path()).unwrap();
    assert_eq!(generate(&model, 2, 6).remove(1).tokens, tokens[..=other]);
    let last = tokens[0];
    fs::write(dir.path().join("generation_config.json"), format!(r#"{{"eos_token_id": [999, {last}]}}"#))
        .unwrap();
    let model = Model::open(dir.path()).unwrap();
    assert_eq!(generate(&model, 2, 6).remove(1).tokens, tokens[..1]);
}
