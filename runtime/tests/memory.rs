//! A rank holds its share and no more, while it loads and after.

mod common;

use std::process::Command;

use common::write_model;
use safetensors::Dtype;
use tensorwire::Communicator;
use tensorwire::topology::Planner;
use tensorwire_runtime::{Model, Runtime};

/// About 240 MB in f32, a third of it the head, which is read last: a rank that mapped its share of it whole
/// would hold a third too much.
const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 3072, "vocab_size": 18000,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    "torch_dtype": "float32"}"#;

const CHILD: &str = "TENSORWIRE_TEST_LOAD";

/// Loads rank 1 of 3 of the model in the directory and prints bytes: held, planned, resident growth, the
/// highest growth on the way. A process of its own, so that nothing else has touched its memory.
#[test]
fn child_loads_one_rank() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let model = Model::open(dir).unwrap();
    let plan = Planner::new(model.spec()).plan(3).unwrap();
    let comm = Communicator::in_process(3).unwrap().remove(1);
    let before = status("VmRSS:");
    let runtime = Runtime::load(&model, &plan, comm).unwrap();
    let (after, peak) = (status("VmRSS:"), status("VmHWM:"));
    let loaded = runtime.loaded();
    assert!(loaded.resident_bytes.unwrap().abs_diff(after - before) < 1 << 20);
    println!(
        "{} {} {} {} end",
        loaded.weight_bytes,
        plan.ranks[1].weight_bytes,
        after - before,
        peak - before
    );
}

/// A line of /proc/self/status, in bytes.
fn status(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

fn load_in_child(dtype: Dtype, files: usize) -> Vec<u64> {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), CONFIG, dtype, files);
    let test = std::env::current_exe().unwrap();
    let mut child = Command::new(test);
    child.args(["--exact", "child_loads_one_rank", "--nocapture", "--test-threads=1"]).env(CHILD, dir.path());
    let output = child.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let line =
        said.lines().find_map(|line| line.split_once(" end").map(|(line, _)| line)).expect("no figures");
    let figures = line.split_whitespace().filter_map(|n| n.parse().ok()).collect::<Vec<u64>>();
    assert_eq!(figures.len(), 4, "{said}");
    figures
}

#[test]
fn resident_memory_is_the_share() {
    for (dtype, files, size) in [(Dtype::F32, 2, 4), (Dtype::BF16, 1, 2)] {
        let [held, planned, growth, peak] = load_in_child(dtype, files)[..] else { unreachable!() };
        // The plan counts bytes as stored, the rank holds f32.
        assert_eq!(held, planned * 4 / size);
        assert!(held > 60 << 20, "{held}");
        for (what, resident) in [("after loading", growth), ("at the highest", peak)] {
            assert!(
                resident * 10 <= held * 12,
                "{dtype:?}: {resident} bytes resident {what}, the share is {held}"
            );
            assert!(resident * 10 >= held * 9, "{dtype:?}: {resident} bytes resident {what} can't be true");
        }
    }
}
