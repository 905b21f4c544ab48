//! Plans of public models, each figure worked out by hand in the comment above it.

mod common;

use common::{lengths, model, pairs, plan};
use tensorwire_topology::Planner;
use tensorwire_topology::plan::{Plan, TensorShard};

fn q(plan: &Plan) -> Vec<usize> {
    lengths(&plan.layers[0].attention.q_heads)
}

fn kv(plan: &Plan) -> Vec<[usize; 2]> {
    pairs(&plan.layers[0].attention.kv_heads)
}

fn ffn(plan: &Plan) -> Vec<usize> {
    lengths(&plan.layers[0].mlp.ffn)
}

/// A shard as (dim, start, end) of its slices, and whether it is replicated.
fn cut(shard: Option<&TensorShard>) -> (Vec<(usize, usize, usize)>, bool) {
    let shard = shard.unwrap();
    (shard.slices.iter().map(|s| (s.dim, s.range.start, s.range.end)).collect(), shard.replicated)
}

fn has_note(plan: &Plan, words: &[&str]) -> bool {
    plan.notes.iter().any(|n| words.iter().all(|w| n.contains(w)))
}

#[test]
fn parameters_are_those_the_models_are_known_for() {
    // The counts their model cards and checkpoints give.
    assert_eq!(model("llama-3.1-8b").parameters(), 8_030_261_248);
    assert_eq!(model("llama-3.1-70b").parameters(), 70_553_706_496);
    assert_eq!(model("qwen2.5-7b").parameters(), 7_615_616_512);
    assert_eq!(model("smollm2-135m").parameters(), 134_515_008);
    // 22,713,216 with the pooler's 384 * 384 + 384 = 147,840, which embeddings are computed without.
    assert_eq!(model("all-minilm-l6-v2").parameters(), 22_713_216 - 147_840);
}

#[test]
fn llama_8b_divides_by_2_4_and_8() {
    let spec = model("llama-3.1-8b");
    for world in [2, 4, 8] {
        // 32 query heads, 8 groups of 4, F = 14336 = 2^11 * 7, V = 128256 = 64 * 2004: all divide by 8.
        let plan = plan(&spec, world);
        assert_eq!(q(&plan), vec![32 / world; world]);
        let share = 8 / world;
        assert_eq!(kv(&plan), (0..world).map(|r| [r * share, (r + 1) * share]).collect::<Vec<_>>());
        assert_eq!(ffn(&plan), vec![14336 / world; world]);
        // lcm(64, 8) = 64, of which 128256 is a multiple: no padding.
        assert_eq!((plan.vocab.padded, lengths(&plan.vocab.ranges)), (128_256, vec![128_256 / world; world]));
        assert!(!has_note(&plan, &["unevenly"]) && !has_note(&plan, &["padded"]));
        assert!(!has_note(&plan, &["key/value heads on more than one rank"]));
        assert!(!cut(plan.tensor("model.layers.7.self_attn.k_proj.weight", 0)).1);
    }
}

#[test]
fn llama_8b_at_3_is_uneven_everywhere_but_in_the_vocabulary() {
    let plan = plan(&model("llama-3.1-8b"), 3);
    // floor(1.15 * 32 / 3) = 12 query heads at most. Without copies all ranks cost 32 + 2 * 8 = 48 together,
    // 16 on average, and shares of whole groups cost 8 + 2 * 2 = 12 or 12 + 2 * 3 = 18. Could 17 be the most?
    // Then rank 0 has 11 heads at most, as the 12th makes it 18. From head 11, in the last quarter of group
    // 2, rank 1 has 9 at most: heads 11 to 19 are in 3 groups and cost 15, with head 20 it is 10 in 4 groups,
    // 18. That leaves 12 heads in 3 groups for rank 2: 18. (Starting earlier, rank 1 ends no later.) So 18 is
    // least, and shares of whole groups do it without copies; the larger ones come first.
    assert_eq!(q(&plan), [12, 12, 8]);
    assert_eq!(kv(&plan), [[0, 3], [3, 6], [6, 8]]);
    assert!(!has_note(&plan, &["key/value heads on more than one rank"]));
    // 14336 = 3 * 4778 + 2.
    assert_eq!(ffn(&plan), [4779, 4779, 4778]);
    // lcm(64, 3) = 192 and 128256 = 668 * 192.
    assert_eq!((plan.vocab.padded, lengths(&plan.vocab.ranges)), (128_256, vec![42_752; 3]));
    assert!(has_note(
        &plan,
        &["32 query heads are shared unevenly over 3 ranks", "from 12 down to 8", "12.5%", "evener shares"]
    ));
    assert!(has_note(&plan, &["14336 feed-forward columns are shared unevenly over 3 ranks"]));

    let name = |t: &str| format!("model.layers.31.{t}.weight");
    // A head is 128 rows of q, k and v and 128 columns of o.
    assert_eq!(cut(plan.tensor(&name("self_attn.q_proj"), 0)), (vec![(0, 0, 1536)], false));
    assert_eq!(cut(plan.tensor(&name("self_attn.q_proj"), 1)), (vec![(0, 12 * 128, 24 * 128)], false));
    assert_eq!(cut(plan.tensor(&name("self_attn.k_proj"), 1)), (vec![(0, 3 * 128, 6 * 128)], false));
    assert_eq!(cut(plan.tensor(&name("self_attn.v_proj"), 2)), (vec![(0, 6 * 128, 8 * 128)], false));
    assert_eq!(cut(plan.tensor(&name("self_attn.o_proj"), 2)), (vec![(1, 24 * 128, 32 * 128)], false));
    assert_eq!(cut(plan.tensor(&name("mlp.gate_proj"), 0)), (vec![(0, 0, 4779)], false));
    assert_eq!(cut(plan.tensor(&name("mlp.up_proj"), 1)), (vec![(0, 4779, 9558)], false));
    assert_eq!(cut(plan.tensor(&name("mlp.down_proj"), 2)), (vec![(1, 9558, 14336)], false));
    assert_eq!(cut(plan.tensor(&name("input_layernorm"), 2)), (vec![], true));
    assert_eq!(cut(plan.tensor("model.embed_tokens.weight", 1)), (vec![(0, 42_752, 85_504)], false));
    assert_eq!(cut(plan.tensor("lm_head.weight", 2)), (vec![(0, 85_504, 128_256)], false));
    assert_eq!(plan.tensor("lm_head.weight", 3), None);
    assert_eq!(plan.tensor("model.layers.32.input_layernorm.weight", 0), None);
}

#[test]
fn llama_8b_at_16_holds_each_kv_head_twice() {
    let plan = plan(&model("llama-3.1-8b"), 16);
    // Two query heads a rank, so half a group of four: ranks 2g and 2g + 1 both need key/value head g.
    assert_eq!(q(&plan), [2; 16]);
    assert_eq!(kv(&plan), (0..16).map(|r| [r / 2, r / 2 + 1]).collect::<Vec<_>>());
    // 14336 = 16 * 896; 128256 = 16 * 8016, and a multiple of lcm(64, 16) = 64.
    assert_eq!(ffn(&plan), [896; 16]);
    assert_eq!(lengths(&plan.vocab.ranges), [8016; 16]);
    assert!((0..16).all(|r| cut(plan.tensor("model.layers.0.self_attn.v_proj.weight", r)).1));
    // A token of one head: K and V of 128 elements of 2 bytes in 32 layers.
    assert!(plan.ranks.iter().all(|r| r.kv_bytes_per_token == 2 * 128 * 2 * 32));
    assert!(has_note(&plan, &["8 of 8", "8 copies", "131.1 kB of KV cache"]));
}

#[test]
fn llama_70b_at_3_and_6() {
    let spec = model("llama-3.1-70b");
    // 64 heads in groups of 8. At 3 a rank has 24 at most. Whole groups, 24 and 24 and 16, cost 24 + 2 * 3 =
    // 30. Below that an outer rank with 17 heads or more has 3 groups, so 22 heads cost 28 and 21 cost 27.
    // With 22, rank 1 has heads 22 to 41 of groups 2 to 5: 20 + 2 * 4 = 28. One fewer on an outer rank is one
    // more on rank 1: 29. So 28 is least, in this one way, with a copy of groups 2 and 5.
    let three = plan(&spec, 3);
    assert_eq!(q(&three), [22, 20, 22]);
    assert_eq!(kv(&three), [[0, 3], [2, 6], [5, 8]]);
    // Two copies of a head of k and v: 2 * 2 * 128 * 8192 elements of 2 bytes in 80 layers = 671.1 MB. The
    // same heads in the cache: 2 * 2 * 128 elements of 2 bytes in 80 layers = 81.9 kB a token.
    assert!(has_note(&three, &["2 of 8 (2, 5), 2 copies", "671.1 MB of weights and 81.9 kB of KV cache"]));

    // At 6 some rank has 11 heads, at least 2 groups: 11 + 2 * 2 = 15. At that limit a rank with 2 groups has
    // 11 heads at most, with 3 groups 9, with 1 group 8. So each has 11 at most and cut i is at 11i - 2 to
    // 11i: 9-11, 20-22, 31-33, 42-44, 53-55. Only the third can be on a multiple of 8, at 32, and costs
    // nothing there: two of six ranks have 10 heads in any case.
    let six = plan(&spec, 6);
    assert_eq!(q(&six), [11, 11, 10, 11, 11, 10]);
    // 10/8 = 1; 11/8 = 1, 21/8 = 2; 22/8 = 2, 31/8 = 3; then the same four heads further on.
    assert_eq!(kv(&six), [[0, 2], [1, 3], [2, 4], [4, 6], [5, 7], [6, 8]]);
    // Heads 1, 2, 5 and 6 twice. Ranks 2 and 3 share none with each other, but each with another neighbour.
    assert!(has_note(&six, &["4 of 8 (1, 2, 5, 6), 4 copies"]));
    assert!((0..6).all(|r| cut(six.tensor("model.layers.79.self_attn.k_proj.weight", r)).1));
    // 28672 = 6 * 4778 + 4. 128256 = 6 * 21376, and a multiple of lcm(64, 6) = 192.
    assert_eq!(ffn(&six), [4779, 4779, 4779, 4779, 4778, 4778]);
    assert_eq!(lengths(&six.vocab.ranges), [21_376; 6]);
}

#[test]
fn qwen_7b_at_4_7_and_8() {
    let spec = model("qwen2.5-7b");
    // 28 heads in 4 groups of 7. At 4, a group a rank: 7 + 2 * 1 = 9, the least that 7 heads cost.
    let four = plan(&spec, 4);
    assert_eq!((q(&four), kv(&four)), (vec![7; 4], vec![[0, 1], [1, 2], [2, 3], [3, 4]]));
    // Biases of q, k and v are cut like their weights' rows.
    assert_eq!(
        cut(four.tensor("model.layers.0.self_attn.q_proj.bias", 1)),
        (vec![(0, 7 * 128, 14 * 128)], false)
    );
    assert_eq!(cut(four.tensor("model.layers.0.self_attn.k_proj.bias", 3)), (vec![(0, 384, 512)], false));
    assert_eq!(four.tensor("model.layers.0.self_attn.o_proj.bias", 0), None);

    // At 7, four heads each, as floor(1.15 * 4) = 4: cuts at 4, 8, ..., 24, none a multiple of 7, so six
    // copies. First heads / 7: 0, 0, 1, 1, 2, 2, 3; last heads 3, 7, 11, 15, 19, 23, 27 / 7: 0, 1, 1, 2, 2,
    // 3, 3.
    let seven = plan(&spec, 7);
    assert_eq!(q(&seven), [4; 7]);
    assert_eq!(kv(&seven), [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3], [2, 4], [3, 4]]);
    assert!(has_note(&seven, &["4 of 4 (0, 1, 2, 3), 6 copies"]));
    // 18944 = 7 * 2706 + 2.
    assert_eq!(ffn(&seven), [2707, 2707, 2706, 2706, 2706, 2706, 2706]);
    // lcm(64, 7) = 448: 152064 / 448 = 339.43, so 340 * 448 = 152320 = 7 * 21760; the last has 256 fewer.
    assert_eq!(seven.vocab.padded, 152_320);
    assert_eq!(lengths(&seven.vocab.ranges), [21_760, 21_760, 21_760, 21_760, 21_760, 21_760, 21_504]);
    assert!(has_note(&seven, &["padded from 152064 to 152320", "256 rows"]));

    // At 8, a rank has 4 at most, and each group of 7 is 4 + 3, so that every second cut is between groups
    // and no rank has two: 4 + 2 * 1 = 6.
    let eight = plan(&spec, 8);
    assert_eq!(q(&eight), [4, 3, 4, 3, 4, 3, 4, 3]);
    assert_eq!(kv(&eight), (0..8).map(|r| [r / 2, r / 2 + 1]).collect::<Vec<_>>());
}

#[test]
fn smollm_at_2_with_every_byte_counted() {
    let plan = plan(&model("smollm2-135m"), 2);
    // 9 heads in groups of 3: floor(1.15 * 4.5) = 5, so the cut is at 4 or 5, both inside the second group.
    assert_eq!(q(&plan), [5, 4]);
    assert_eq!(kv(&plan), [[0, 2], [1, 3]]);
    // A layer of rank 0, H = 576: q and o 5 * 64 * 576 = 184320 each; k and v 2 * 64 * 576 = 73728 each; two
    // norms 1152; gate, up and down 768 * 576 = 442368 each: 1844352. Rank 1 has a head less in q and o:
    // 2 * 36864 fewer = 1770624. 30 layers; the tied embedding's half, 24576 * 576 = 14155776; the last
    // norm's 576. Two bytes each.
    let bytes = |layer: u64| 2 * (30 * layer + 14_155_776 + 576);
    assert_eq!(plan.ranks[0].weight_bytes, bytes(1_844_352));
    assert_eq!(plan.ranks[1].weight_bytes, bytes(1_770_624));
    // Two heads of K and V, 64 elements of 2 bytes, 30 layers.
    assert_eq!(plan.ranks[0].kv_bytes_per_token, 2 * 2 * 64 * 2 * 30);
    // At the peak, its largest tensor is the embedding. One token's activations, of 2 bytes each: 3 * 576,
    // twice 5 heads of 64, K and V of 2 heads, twice 768 columns, and 49152 logits.
    let activations = 3 * 576 + 2 * 5 * 64 + 2 * 2 * 64 + 2 * 768 + 49_152;
    assert_eq!(plan.ranks[0].peak_bytes, bytes(1_844_352) + 2 * 14_155_776 + 2 * activations);

    // The head is the embedding: one entry, sharded by row.
    assert_eq!(plan.tensor("lm_head.weight", 0), None);
    assert!(has_note(&plan, &["output head is the embedding"]));

    // A token is 576 elements of 2 bytes. At 2 us a step and 8000 bytes a microsecond, one step of an
    // all-reduce over two ranks is 2 + 1152/8000 = 2.144 us; 60 in the layers and one of the embedding. The
    // all-gather: 2 + half of 49152 * 2 bytes / 8000 = 8.144 us.
    let layer = &plan.layers[29];
    assert_eq!(layer.name, "model.layers.29");
    let names: Vec<_> = layer.collectives.iter().map(|c| (c.op.as_str(), c.after.as_str())).collect();
    assert_eq!(names, [("all_reduce", "self_attn.o_proj"), ("all_reduce", "mlp.down_proj")]);
    assert!(layer.collectives.iter().all(|c| c.bytes_per_token == 1152 && c.predicted_us == 2.144));
    let vocab: Vec<_> =
        plan.vocab.collectives.iter().map(|c| (c.after.as_str(), c.bytes_per_token)).collect();
    assert_eq!(vocab, [("embed_tokens", 1152), ("lm_head", 98_304)]);
    assert_eq!(plan.predicted.comm_us_per_token, 138.928); // 61 * 2.144 + 8.144 = 138.928
    // Rank 0's bytes at 16000 a microsecond: 138973824 / 16000 = 8685.864.
    assert_eq!(plan.predicted.decode_us_per_token, 8_824.792);
    assert!(has_note(&plan, &["predicted times", "not a measurement"]));
}

#[test]
fn minilm_at_1_to_12() {
    let spec = model("all-minilm-l6-v2");
    // 12 heads, each its own group, so every cut is free. F = 1536. V = 30522.
    type Case<'a> = (usize, &'a [usize], &'a [usize], usize, &'a [usize]);
    let expected: [Case; 6] = [
        (1, &[12], &[1536], 30_522, &[30_522]),
        // 477 * 64 = 30528 = 2 * 15264.
        (2, &[6, 6], &[768, 768], 30_528, &[15_264, 15_258]),
        // lcm 192: 159 * 192 = 30528 = 3 * 10176.
        (3, &[4, 4, 4], &[512, 512, 512], 30_528, &[10_176, 10_176, 10_170]),
        (4, &[3, 3, 3, 3], &[384, 384, 384, 384], 30_528, &[7632, 7632, 7632, 7626]),
        // lcm 320: 96 * 320 = 30720 = 5 * 6144, 1.0065 times the mean. 1536 = 5 * 307 + 1.
        (5, &[3, 3, 2, 2, 2], &[308, 307, 307, 307, 307], 30_720, &[6144, 6144, 6144, 6144, 5946]),
        // lcm 192 again: 12 * 2544.
        (
            12,
            &[1; 12],
            &[128; 12],
            30_528,
            &[2544, 2544, 2544, 2544, 2544, 2544, 2544, 2544, 2544, 2544, 2544, 2538],
        ),
    ];
    for (world, heads, columns, padded, rows) in expected {
        let plan = plan(&spec, world);
        assert_eq!(q(&plan), heads);
        assert_eq!(plan.layers[0].attention.kv_heads, plan.layers[0].attention.q_heads);
        assert_eq!(ffn(&plan), columns);
        assert_eq!((plan.vocab.padded, lengths(&plan.vocab.ranges)), (padded, rows.to_vec()));
        assert_eq!(plan.layers[5].name, "encoder.layer.5");
        assert!(plan.ranks.iter().all(|r| r.kv_bytes_per_token == 0));
        assert_eq!(has_note(&plan, &["padded"]), world > 1);
        assert_eq!(has_note(&plan, &["position and token type embeddings"]), world > 1);
    }

    let five = plan(&spec, 5);
    let names: Vec<_> =
        five.layers[0].collectives.iter().map(|c| (c.after.as_str(), c.bytes_per_token)).collect();
    assert_eq!(names, [("attention.output.dense", 1536), ("output.dense", 1536)]);
    // An encoder has no head: only the embedding's all-reduce.
    let names: Vec<_> = five.vocab.collectives.iter().map(|c| c.after.as_str()).collect();
    assert_eq!(names, ["embeddings.word_embeddings"]);

    let name = |t: &str| format!("encoder.layer.0.{t}");
    // Heads 6 and 7 of 32 rows each.
    assert_eq!(cut(five.tensor(&name("attention.self.query.weight"), 2)), (vec![(0, 192, 256)], false));
    assert_eq!(cut(five.tensor(&name("attention.self.value.bias"), 2)), (vec![(0, 192, 256)], false));
    assert_eq!(cut(five.tensor(&name("attention.output.dense.weight"), 2)), (vec![(1, 192, 256)], false));
    assert_eq!(cut(five.tensor(&name("attention.output.dense.bias"), 2)), (vec![], true));
    assert_eq!(cut(five.tensor(&name("intermediate.dense.bias"), 1)), (vec![(0, 308, 615)], false));
    assert_eq!(cut(five.tensor(&name("output.dense.weight"), 1)), (vec![(1, 308, 615)], false));
    assert_eq!(cut(five.tensor(&name("output.dense.bias"), 1)), (vec![], true));
    assert_eq!(cut(five.tensor("embeddings.word_embeddings.weight", 4)), (vec![(0, 24_576, 30_522)], false));
    assert_eq!(cut(five.tensor("embeddings.position_embeddings.weight", 4)), (vec![], true));
}

#[test]
fn one_rank_holds_everything_and_exchanges_nothing() {
    for name in ["llama-3.1-8b", "qwen2.5-7b", "smollm2-135m", "all-minilm-l6-v2"] {
        let spec = model(name);
        let plan = plan(&spec, 1);
        assert_eq!(plan.ranks[0].weight_bytes, spec.weight_bytes());
        assert!(plan.tensors.iter().all(|t| !t.replicated));
        assert!(plan.layers.iter().all(|l| l.collectives.is_empty()) && plan.vocab.collectives.is_empty());
        assert_eq!(plan.predicted.comm_us_per_token.to_bits(), 0.0f64.to_bits());
        assert!(has_note(&plan, &["one rank"]));
    }
}

#[test]
fn a_model_for_which_one_rank_is_fastest_says_so() {
    // A layer is 4 * 32 * 32 + 3 * 32 * 64 + 64 = 10304 elements of 4 bytes, 2.6 us to read; its two
    // all-reduces take at least 2 us each.
    let json = r#"{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "intermediate_size": 64, "vocab_size": 256}"#;
    let spec = tensorwire_topology::ModelSpec::from_config(json).unwrap();
    let plan = Planner::new(&spec).plan(4).unwrap();
    assert!(has_note(&plan, &["one rank alone is predicted to be as fast"]));
}

#[test]
fn a_small_vocabulary_is_shared_unpadded() {
    let json = r#"{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                   "intermediate_size": 128, "vocab_size": 301}"#;
    let spec = tensorwire_topology::ModelSpec::from_config(json).unwrap();
    // Padding to 320 would give 107 of 100.3: 320/3 isn't whole either, so 384 = 3 * 128.
    let plan = plan(&spec, 3);
    assert_eq!((plan.vocab.padded, lengths(&plan.vocab.ranges)), (301, vec![101, 100, 100]));
    assert!(has_note(&plan, &["301 vocabulary rows are shared unevenly over 3", "not padded"]));
}

#[test]
fn the_summary_says_what_matters() {
    let text = plan(&model("smollm2-135m"), 2).summary();
    for part in
        ["over 2 ranks", "5, 4", "768 x2", "24576 x2", "139.0 MB, 134.6 MB", "61 all_reduce of 1152 B"]
    {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    assert!(text.contains("1 all_gather of 98.3 kB") && text.contains("note: "));
}

#[test]
fn json_has_the_contracts_fields_and_is_the_same_each_time() {
    let spec = model("smollm2-135m");
    let json = plan(&spec, 2).to_json();
    assert_eq!(json, plan(&spec, 2).to_json());
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let keys = |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(
        keys(&value),
        [
            "schema",
            "model",
            "world",
            "layers",
            "dimensions",
            "vocab",
            "ranks",
            "tensors",
            "predicted",
            "notes"
        ]
    );
    assert_eq!(value["schema"], "tensorwire.plan/v1");
    assert_eq!(value["layers"][0]["attention"]["q_heads"], serde_json::json!([[0, 5], [5, 9]]));
    assert_eq!(value["layers"][0]["mlp"]["ffn"], serde_json::json!([[0, 768], [768, 1536]]));
    assert_eq!(
        keys(&value["layers"][0]["collectives"][0]),
        ["op", "after", "bytes_per_token", "predicted_us"]
    );
    assert_eq!(value["vocab"]["ranges"], serde_json::json!([[0, 24576], [24576, 49152]]));
    assert_eq!(keys(&value["ranks"][0]), ["rank", "weight_bytes", "kv_bytes_per_token", "peak_bytes"]);
    assert_eq!(
        value["tensors"][0],
        serde_json::json!({"name": "model.embed_tokens.weight", "rank": 0,
                           "slices": [{"dim": 0, "range": [0, 24576]}], "replicated": false,
                           "bytes": 24576 * 576 * 2})
    );
    assert_eq!(keys(&value["predicted"]), ["decode_us_per_token", "comm_us_per_token"]);
    assert!(value["notes"].as_array().unwrap().iter().all(|n| n.is_string()));
}
