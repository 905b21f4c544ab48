//! From plan to plan: after the moves, each rank holds exactly what it needs, and nothing moved that it had.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{model, plan};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tensorwire_topology::plan::{Diff, Slice};
use tensorwire_topology::{ModelSpec, Plan};

/// The elements of a tensor that slices hold, by their place in it.
fn elements(shape: &[usize], slices: &[Slice]) -> BTreeSet<usize> {
    let holds = |dim: usize, index: usize| {
        let mut ranges = slices.iter().filter(|s| s.dim == dim).peekable();
        ranges.peek().is_none() || ranges.any(|s| s.range.start <= index && index < s.range.end)
    };
    let inside = |place: &usize| {
        let mut rest = *place;
        shape.iter().enumerate().rev().all(|(dim, size)| {
            let index = rest % size;
            rest /= size;
            holds(dim, index)
        })
    };
    (0..shape.iter().product()).filter(inside).collect()
}

/// Makes the moves, element by element, and looks at everything that a diff says.
fn check(spec: &ModelSpec, before: &Plan, after: &Plan, diff: &Diff) {
    let world = before.world.max(after.world);
    assert_eq!(diff.worlds, [before.world, after.world]);
    let mut moved = vec![vec![0u64; world]; world];
    let (mut keeps, mut drops) = (vec![0u64; world], vec![0u64; world]);
    let mut classes = 0;
    for tensor in &spec.tensors {
        let size = tensor.stored.size();
        let held = |plan: &Plan, rank: usize| {
            let shard = plan.tensor(&tensor.name, rank);
            shard.map_or_else(BTreeSet::new, |s| elements(&tensor.shape, &s.slices))
        };
        let mut got: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for m in diff.moves.iter().filter(|m| m.tensor == tensor.name) {
            let piece = elements(&tensor.shape, &m.slices);
            assert_eq!(m.bytes, piece.len() as u64 * size);
            assert!(piece.is_subset(&held(before, m.from)), "rank {} sends what it hasn't: {m:?}", m.from);
            let mut new = got.remove(&m.to).unwrap_or_default();
            for element in piece {
                assert!(new.insert(element), "{m:?} comes twice");
            }
            got.insert(m.to, new);
            moved[m.to][m.from] += m.bytes;
            classes += m.bytes;
        }
        for rank in 0..world {
            let (had, needs) = (held(before, rank), held(after, rank));
            // Nothing that it had, and nothing that it doesn't need: the least that can move.
            let missing: BTreeSet<usize> = needs.difference(&had).copied().collect();
            assert_eq!(got.remove(&rank).unwrap_or_default(), missing, "{} on rank {rank}", tensor.name);
            keeps[rank] += needs.intersection(&had).count() as u64 * size;
            drops[rank] += had.difference(&needs).count() as u64 * size;
        }
    }
    assert_eq!(diff.classes.iter().map(|c| c.bytes).sum::<u64>(), classes);
    assert_eq!(diff.ranks.len(), world);
    for (rank, said) in diff.ranks.iter().enumerate() {
        let from: Vec<_> = said.from.iter().map(|s| (s.rank, s.bytes)).collect();
        let seen: Vec<_> = moved[rank].iter().copied().enumerate().filter(|(_, bytes)| *bytes > 0).collect();
        assert_eq!(from, seen);
        assert_eq!(said.fetches_bytes, moved[rank].iter().sum::<u64>());
        assert_eq!(said.sends_bytes, moved.iter().map(|to| to[rank]).sum::<u64>());
        assert_eq!((said.keeps_bytes, said.drops_bytes), (keeps[rank], drops[rank]));
    }
    assert_eq!(diff.total_bytes, diff.ranks.iter().map(|r| r.fetches_bytes).sum::<u64>());
    assert!(diff.total_bytes <= after.ranks.iter().map(|r| r.weight_bytes).sum());
}

fn diff(before: &Plan, after: &Plan) -> Diff {
    let diff = before.diff(after).unwrap();
    assert_eq!(serde_json::from_str::<Diff>(&diff.to_json()).unwrap(), diff);
    assert!(!diff.summary().is_empty());
    diff
}

prop_compose! {
    /// A small model of uneven sizes.
    fn models()(
        group in 1usize..4,
        kv in 1usize..6,
        ffn in 9usize..24,
        vocab in 9usize..40,
        layers in 1usize..3,
        tied in any::<bool>(),
        qwen in any::<bool>(),
    ) -> ModelSpec {
        let heads = kv * group;
        let config = serde_json::json!({
            "model_type": if qwen { "qwen2" } else { "llama" }, "hidden_size": heads * 2, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn,
            "vocab_size": vocab, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        });
        ModelSpec::from_config(&config.to_string()).unwrap()
    }
}

proptest! {
    // The same cases in each run.
    #![proptest_config(ProptestConfig {
        cases: 64,
        rng_seed: RngSeed::Fixed(20_261_126),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn after_the_moves_each_rank_holds_its_part(spec in models(), from in 1usize..9, to in 1usize..9) {
        let most = spec.num_attention_heads;
        let (before, after) = (plan(&spec, from.min(most)), plan(&spec, to.min(most)));
        check(&spec, &before, &after, &diff(&before, &after));
        prop_assert_eq!(diff(&before, &before).total_bytes, 0);
        prop_assert!(diff(&before, &before).moves.is_empty());
    }
}

#[test]
fn halves_come_from_where_they_were() {
    // Everything of Llama 8B divides by four. From 4 ranks to 2, rank 0 has the first quarter and gets the second
    // from rank 1; rank 1 has the second quarter and gets the third and fourth from ranks 2 and 3.
    let spec = model("llama-3.1-8b");
    let (four, two) = (plan(&spec, 4), plan(&spec, 2));
    let diff = diff(&four, &two);
    // Two norms a layer and one at the end, 4096 elements of 2 bytes, are on every rank.
    let norms = 65 * 4096 * 2;
    let quarter = (spec.weight_bytes() - norms) / 4;
    let from = |rank: usize| diff.ranks[rank].from.iter().map(|s| (s.rank, s.bytes)).collect::<Vec<_>>();
    assert_eq!(from(0), [(1, quarter)]);
    assert_eq!(from(1), [(2, quarter), (3, quarter)]);
    assert_eq!((from(2), from(3)), (vec![], vec![]));
    assert_eq!(diff.total_bytes, 3 * quarter);
    let rank_1 = &diff.ranks[1];
    assert_eq!((rank_1.keeps_bytes, rank_1.drops_bytes), (norms, quarter));
    assert_eq!(diff.ranks[3].drops_bytes, quarter + norms);
    // By kind: three quarters of the 4096 x 4096 of each layer's queries.
    let q = diff.classes.iter().find(|c| c.class == "model.layers.*.self_attn.q_proj.weight").unwrap();
    assert_eq!(q.bytes, 32 * 4096 * 4096 * 2 / 4 * 3);
    // The last quarter of the rows of the last layer's: rank 1 needs it, rank 3 has it.
    let name = "model.layers.31.self_attn.q_proj.weight";
    let last = diff.moves.iter().find(|m| m.tensor == name && m.from == 3).unwrap();
    assert_eq!(
        (last.to, last.slices[0].dim, last.slices[0].range.start, last.slices[0].range.end),
        (1, 0, 3072, 4096)
    );
}

#[test]
fn what_many_hold_is_sent_by_different_ranks() {
    // From 8 ranks to 16, eight new ones: each needs the halves that one old rank has, and the norms, which any
    // has. That rank sends its half; who sends norms has sent least, so all send some.
    let spec = model("llama-3.1-8b");
    let diff = diff(&plan(&spec, 8), &plan(&spec, 16));
    let sends: Vec<u64> = diff.ranks.iter().map(|r| r.sends_bytes).collect();
    let (most, least) = (sends[..8].iter().max().unwrap(), sends[..8].iter().min().unwrap());
    assert!(*least > 0 && (*most as f64) < 2.5 * *least as f64, "{sends:?}");
    assert!(sends[8..].iter().all(|s| *s == 0));
}

#[test]
fn plans_of_two_models_have_no_diff() {
    let (llama, qwen) = (plan(&model("llama-3.1-8b"), 2), plan(&model("qwen2.5-7b"), 2));
    let error = llama.diff(&qwen).unwrap_err().to_string();
    assert!(error.contains("of different models"), "{error}");
    // One whose tensors aren't all there.
    let mut cut = llama.clone();
    cut.tensors.truncate(cut.tensors.len() - 2);
    for (a, b) in [(&llama, &cut), (&cut, &llama)] {
        assert!(a.diff(b).unwrap_err().to_string().contains("aren't all that rank 0 holds"));
    }
    let mut other = llama.clone();
    other.tensors.iter_mut().filter(|t| t.name == "lm_head.weight").for_each(|t| t.name += "_2");
    assert!(llama.diff(&other).unwrap_err().to_string().contains("don't name the same tensors"));
}
