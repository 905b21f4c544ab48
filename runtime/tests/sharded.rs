//! A sharded run gives what the unsharded run gives, whatever the ratios.

mod common;

use common::{SEED, Shape, generate, max_diff, smallest_gap, write_model};
use safetensors::Dtype;
use tensorwire_runtime::Model;

const TOKENS: usize = 12;

/// Sums of a few dozen numbers of size one, in another order.
const TOLERANCE: f32 = 2e-5;

/// Every rank of every world gives the same bits as its peers, and the unsharded run's numbers and tokens.
fn same_at(model: &Model, worlds: &[usize]) {
    let whole = generate(model, 1, TOKENS).remove(0);
    let gap = smallest_gap(&whole.logits);
    assert!(gap > 4.0 * TOLERANCE, "the test's own model is undecided: {gap}");
    assert!(whole.tokens.iter().any(|t| *t != whole.tokens[0]), "{:?}", whole.tokens);
    for &world in worlds {
        let ranks = generate(model, world, TOKENS);
        assert_eq!(ranks.len(), world);
        for (rank, output) in ranks.iter().enumerate() {
            assert_eq!(output.tokens, whole.tokens, "rank {rank} of {world}");
            assert_eq!(output.logits.len(), TOKENS);
            for (step, (a, b)) in output.logits.iter().zip(&whole.logits).enumerate() {
                let diff = max_diff(a, b);
                assert!(diff < TOLERANCE, "rank {rank} of {world}, step {step}: {diff}");
                assert!(
                    *a == ranks[0].logits[step],
                    "rank {rank} of {world} differs from rank 0, step {step}"
                );
            }
        }
    }
}

fn seeded(shape: Shape) -> Model {
    Model::seeded(&shape.config(), SEED).unwrap()
}

const LLAMA: Shape =
    Shape { model_type: "llama", heads: 9, kv_heads: 3, head_dim: 8, ffn: 101, vocab: 1009, tied: true };

#[test]
fn nine_heads_three_kv() {
    same_at(&seeded(LLAMA), &[2, 3, 4, 5, 9]);
}

#[test]
fn untied_head() {
    same_at(&seeded(Shape { tied: false, ..LLAMA }), &[2, 4]);
}

#[test]
fn one_kv_head_for_all() {
    same_at(&seeded(Shape { heads: 8, kv_heads: 1, ..LLAMA }), &[3]);
}

#[test]
fn a_kv_head_for_each() {
    same_at(&seeded(Shape { heads: 6, kv_heads: 6, ..LLAMA }), &[4]);
}

#[test]
fn fourteen_heads_two_kv_with_biases() {
    same_at(&seeded(Shape { model_type: "qwen2", heads: 14, kv_heads: 2, ..LLAMA }), &[2, 4]);
}

#[test]
fn twenty_eight_heads_four_kv_with_biases() {
    let shape = Shape { model_type: "qwen2", heads: 28, kv_heads: 4, head_dim: 4, tied: false, ..LLAMA };
    same_at(&seeded(shape), &[3, 7]);
}

#[test]
fn biases_everywhere() {
    let biases = r#""attention_bias": true, "mlp_bias": true, "rope_theta""#;
    let config = LLAMA.config().replace(r#""rope_theta""#, biases);
    assert!(config.contains("mlp_bias"));
    same_at(&Model::seeded(&config, SEED).unwrap(), &[2, 4]);
}

#[test]
fn from_files_as_from_the_seed() {
    for shape in [LLAMA, Shape { model_type: "qwen2", heads: 14, kv_heads: 2, tied: false, ..LLAMA }] {
        for files in [1, 3] {
            let dir = tempfile::tempdir().unwrap();
            write_model(dir.path(), &shape.config(), Dtype::F32, files);
            let model = Model::open(dir.path()).unwrap();
            for world in [1, 4] {
                let (file, seed) = (generate(&model, world, 2), generate(&seeded(shape), world, 2));
                assert!(file[0].logits == seed[0].logits, "{shape:?}, {files} files, {world} ranks");
            }
            same_at(&model, &[2, 4]);
        }
    }
}

#[test]
fn from_files_in_half_precision() {
    for (dtype, files, rounding) in [(Dtype::F16, 1, 0.05), (Dtype::BF16, 2, 0.5)] {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &LLAMA.config(), dtype, files);
        let model = Model::open(dir.path()).unwrap();
        same_at(&model, &[2, 4]);
        // Near the full precision's logits, whose standard deviation is about one.
        let (half, full) = (generate(&model, 1, 1).remove(0), generate(&seeded(LLAMA), 1, 1).remove(0));
        let diff = max_diff(&half.logits[0], &full.logits[0]);
        assert!(diff > 0.0 && diff < rounding, "{dtype:?}: {diff}");
    }
}
