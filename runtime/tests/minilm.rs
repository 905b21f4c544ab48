//! Real weights: all-MiniLM-L6-v2, from the Python package that carries it, sharded over 1 to 12 ranks and
//! against a reference in numpy.

mod common;
#[path = "../../tests/support/minilm.rs"]
mod minilm;

use std::path::Path;

use common::{max_diff, on_ranks};
use minilm::{cached, model_dir, python, run};
use tensorwire::topology::Planner;
use tensorwire_runtime::{Error, Kind, Model};

const TEXTS: [&str; 7] = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Two men pushed carts through the woods.",
    "Café Zürich: naïve piñata, 東京 & \u{1F980}!  Antidisestablishmentarianism\tco-operates (1,234.5)",
    "",
    LONG,
];

/// About 200 tokens.
const LONG: &str = "\
    When a matrix is too large for one processor, its columns or its rows are shared out among several. \
    Each of them multiplies its own part, and where parts of one sum lie on different processors, the \
    partial sums have to be exchanged and added. A transformer does this twice in each layer: once after \
    attention, whose heads are independent of one another, and once after the feed-forward block, whose \
    hidden columns are. Everything else, such as the normalisation and the residual stream, is computed by \
    every processor alike, because exchanging it would take longer than computing it again. The numbers \
    that come out are not quite the same as those from one processor, for the order of additions differs, \
    and the rounding of binary fractions depends on that order; but the difference is as small as the \
    rounding itself. What must not differ is the result between the processors, or they would drift apart \
    token by token until one of them chose another word than its neighbours.";

/// The reference's token ids and embedding of each text.
fn reference(model: &Path) -> Vec<(Vec<u32>, Vec<f64>)> {
    let mut script = python();
    let has_numpy = python().args(["-c", "import numpy"]).output().is_ok_and(|o| o.status.success());
    if !has_numpy {
        let numpy = cached("numpy", |dir| {
            let mut pip = python();
            pip.args(["-m", "pip", "install", "--quiet", "--target"]).arg(dir).arg("numpy");
            run("installing numpy with pip", &mut pip, "");
        });
        script.env("PYTHONPATH", numpy);
    }
    script.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/minilm_reference.py")).arg(model);
    let output = run("the numpy reference", &mut script, &serde_json::to_string(&TEXTS).unwrap());
    let output: serde_json::Value = serde_json::from_slice(&output).unwrap();
    let text = |entry: &serde_json::Value| {
        let ids = entry["ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
        let embedding = entry["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        (ids, embedding)
    };
    output.as_array().unwrap().iter().map(text).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

#[test]
fn embeddings_on_any_number_of_ranks() {
    let dir = model_dir();
    let model = Model::open(&dir).unwrap();
    assert_eq!((model.kind(), model.max_tokens()), (Kind::Encoder, 256));
    let embed = |world| on_ranks(&model, world, |runtime| Ok(runtime.embed(&TEXTS)?.vectors)).unwrap();

    let whole = embed(1).remove(0);
    let expected = reference(&dir);
    assert_eq!((whole.len(), expected.len()), (TEXTS.len(), TEXTS.len()));
    for ((text, ours), (ids, theirs)) in TEXTS.iter().zip(&whole).zip(&expected) {
        assert_eq!(model.tokenize(text).unwrap(), *ids, "{text}");
        let diff = ours.iter().zip(theirs).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
        assert!(diff < 1e-4 && ours.len() == theirs.len(), "{text}: {diff}");
    }
    assert!(expected[6].0.len() > 150, "the long text has {} tokens", expected[6].0.len());
    assert!(dot(&whole[0], &whole[1]) > 0.7 && dot(&whole[0], &whole[2]) < 0.3);

    for world in [2, 3, 4, 5, 12] {
        let ranks = embed(world);
        for (rank, vectors) in ranks.iter().enumerate() {
            assert!(*vectors == ranks[0], "rank {rank} of {world} differs from rank 0");
            for ((text, a), b) in TEXTS.iter().zip(vectors).zip(&whole) {
                let diff = max_diff(a, b);
                assert!(diff < 1e-5, "rank {rank} of {world}: {text}: {diff}");
            }
        }
    }
}

#[test]
fn a_text_alone_or_among_others_is_the_same() {
    let model = Model::open(model_dir()).unwrap();
    let (alone, among) = on_ranks(&model, 1, |runtime| {
        Ok((runtime.embed(&TEXTS[1..2])?.vectors.remove(0), runtime.embed(&TEXTS)?.vectors.remove(1)))
    })
    .unwrap()
    .remove(0);
    assert!(alone == among);
}

#[test]
fn a_rank_holds_its_share() {
    let model = Model::open(model_dir()).unwrap();
    for world in [1, 2, 3, 5, 12] {
        let plan = Planner::new(model.spec()).plan(world).unwrap();
        let held = on_ranks(&model, world, |runtime| Ok(runtime.loaded().weight_bytes)).unwrap();
        let planned: Vec<u64> = plan.ranks.iter().map(|r| r.weight_bytes).collect();
        assert_eq!(held, planned);
    }
    // The pooler and the position numbers are in the file but no part of a sentence's embedding.
    let unused: Vec<_> = model.spec().unused.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(unused, ["embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"]);
}

#[test]
fn a_text_beyond_the_limit_is_refused_not_cut() {
    let model = Model::open(model_dir()).unwrap();
    let long = "word ".repeat(300);
    let texts = ["short", &long];
    for world in [1, 2] {
        let error = on_ranks(&model, world, |runtime| runtime.embed(&texts)).unwrap_err();
        assert!(matches!(error, Error::TextTooLong { index: 1, tokens: 302, limit: 256 }), "{error}");
        let said = error.to_string();
        assert!(said.contains("302") && said.contains("256"), "{said}");
    }
    // 254 words and the two special tokens just fit.
    let fits = "word ".repeat(254);
    assert_eq!(on_ranks(&model, 1, |runtime| runtime.embed(&[&fits])).unwrap()[0].tokens, 256);
}

#[test]
fn an_encoder_does_not_generate() {
    let model = Model::open(model_dir()).unwrap();
    let error = on_ranks(&model, 1, |runtime| runtime.generate(&[1], 1, |_| ())).unwrap_err();
    assert!(matches!(error, Error::WrongKind { .. }), "{error}");
}
