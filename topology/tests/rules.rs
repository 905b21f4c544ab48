//! How the awkward layouts are cut, each figure worked out by hand in the comment above it.

mod common;

use std::fs;

use common::{fixture, lengths, model, model_dir, plan, tensors_of};
use tensorwire_topology::model::Architecture;
use tensorwire_topology::plan::{Plan, Span};
use tensorwire_topology::shard::Experts;
use tensorwire_topology::{Error, ModelSpec, Planner};

fn shares(plan: &Plan, dimension: &str) -> Vec<usize> {
    lengths(&plan.dimension(dimension).unwrap().ranges)
}

/// What a rank holds of a tensor: `(dimension, start, end)` of each range; none if nothing.
fn held(plan: &Plan, name: &str, rank: usize) -> Option<Vec<(usize, usize, usize)>> {
    plan.tensor(name, rank).map(|t| t.slices.iter().map(|s| (s.dim, s.range.start, s.range.end)).collect())
}

fn exchanges(plan: &Plan, layer: usize) -> Vec<(&str, &str, u64)> {
    plan.layers[layer]
        .collectives
        .iter()
        .map(|c| (c.op.as_str(), c.after.as_str(), c.bytes_per_token))
        .collect()
}

fn has_note(plan: &Plan, words: &[&str]) -> bool {
    plan.notes.iter().any(|n| words.iter().all(|w| n.contains(w)))
}

#[test]
fn quantised_columns_are_shared_in_whole_groups() {
    // 29568 = 231 groups of 128. 231 = 2 * 115 + 1 = 4 * 57 + 3 = 8 * 28 + 7.
    let spec = model("qwen2.5-72b-gptq");
    let groups = |world| shares(&plan(&spec, world), "ffn").iter().map(|c| c / 128).collect::<Vec<_>>();
    assert_eq!(groups(2), [116, 115]);
    assert_eq!(groups(4), [58, 58, 58, 57]);
    assert_eq!(groups(8), [29, 29, 29, 29, 29, 29, 29, 28]);

    // Rank 1 of 2 has columns 116 * 128 = 14848 on. Of down_proj's inputs, eight are in a word of qweight and 128
    // have one scale; of gate_proj's outputs, eight are in a word of qzeros.
    let two = plan(&spec, 2);
    let name = |t: &str| format!("model.layers.3.mlp.{t}");
    assert_eq!(held(&two, &name("down_proj.qweight"), 1), Some(vec![(0, 1856, 3696)]));
    assert_eq!(held(&two, &name("down_proj.scales"), 1), Some(vec![(0, 116, 231)]));
    assert_eq!(held(&two, &name("down_proj.qzeros"), 1), Some(vec![(0, 116, 231)]));
    assert_eq!(held(&two, &name("down_proj.g_idx"), 1), Some(vec![(0, 14_848, 29_568)]));
    assert_eq!(held(&two, &name("gate_proj.qweight"), 1), Some(vec![(1, 14_848, 29_568)]));
    assert_eq!(held(&two, &name("gate_proj.qzeros"), 1), Some(vec![(1, 1856, 3696)]));
    assert_eq!(held(&two, &name("gate_proj.g_idx"), 1), Some(vec![]));
    assert!(has_note(&two, &["29568 feed-forward columns in 231 groups of 128", "from 14848 down to 14720"]));

    // With inputs ordered by activation, groups are scattered: every rank needs all scales, and only words of eight
    // inputs are never cut.
    let text = fs::read_to_string(fixture("qwen2.5-72b-gptq"))
        .unwrap()
        .replace("\"desc_act\": false", "\"desc_act\": true");
    let two = plan(&ModelSpec::from_config(&text).unwrap(), 2);
    assert_eq!(shares(&two, "ffn"), [14_784, 14_784]);
    assert_eq!(held(&two, &name("down_proj.scales"), 1), Some(vec![]));
    assert!(two.tensor(&name("down_proj.scales"), 1).unwrap().replicated);
    assert_eq!(held(&two, &name("down_proj.qweight"), 1), Some(vec![(0, 1848, 3696)]));
}

#[test]
fn qwen3_235b_in_fp8_at_8_shares_experts_whole() {
    let spec = model("qwen3-235b-a22b-fp8");
    // 1536 columns are 12 blocks of 128; 1536 / 8 = 192 is one and a half. The largest share would be two blocks,
    // 256 / 192 = 1.33 of the mean, and 128 experts are 16 each.
    let eight = plan(&spec, 8);
    assert_eq!(shares(&eight, "experts"), [16; 8]);
    assert!(!eight.dimension("expert_ffn").unwrap().shared);
    assert!(has_note(&eight, &["expert parallel", "192 columns", "256, 33% above the mean"]));
    assert_eq!(lengths(&eight.layers[5].mlp.experts), [16; 8]);
    assert!(eight.layers[5].mlp.ffn.is_empty());
    // Expert 17 is rank 1's alone, with its scales.
    for part in ["gate_proj.weight", "down_proj.weight", "down_proj.weight_scale_inv"] {
        let name = format!("model.layers.5.mlp.experts.17.{part}");
        assert_eq!((held(&eight, &name, 0), held(&eight, &name, 1)), (None, Some(vec![])));
        assert!(!eight.tensor(&name, 1).unwrap().replicated);
    }
    // A token of 4096 elements of 2 bytes goes to 8 experts and back, and then to every rank.
    let row = 8192;
    assert_eq!(
        exchanges(&eight, 5),
        [
            ("all_reduce", "self_attn.o_proj", row),
            ("all_to_all", "mlp: dispatch", 8 * row),
            ("all_to_all", "mlp: combine", 8 * row),
            ("all_gather", "mlp", row),
        ]
    );

    // Over four groups of two, each rank has half of 32 experts: 768 columns are six blocks.
    let mixed = Planner::new(&spec).experts(Experts::Grouped { groups: 4 }).plan(8).unwrap();
    mixed.check(&spec).unwrap();
    assert_eq!((shares(&mixed, "experts"), shares(&mixed, "expert_ffn")), (vec![32; 8], vec![768; 8]));
    let experts = mixed.dimension("experts").unwrap();
    assert_eq!((experts.ranges[2], experts.ranges[3]), (Span::new(32, 64), Span::new(32, 64)));
    assert_eq!(mixed.dimension("expert_ffn").unwrap().groups, 4);
    let down = "model.layers.5.mlp.experts.40.down_proj.weight";
    let of = |rank| held(&mixed, down, rank);
    assert_eq!(
        [of(1), of(2), of(3), of(4)],
        [None, Some(vec![(1, 0, 768)]), Some(vec![(1, 768, 1536)]), None]
    );
    assert!(!mixed.tensor(down, 2).unwrap().replicated);
    // Groups divide the tokens; each of a group's two ranks sends its half of each sum, and all add them up.
    assert_eq!(
        exchanges(&mixed, 5),
        [
            ("all_reduce", "self_attn.o_proj", row),
            ("all_to_all", "mlp: dispatch", 2 * 8 * row),
            ("all_to_all", "mlp: combine", 2 * 8 * row),
            ("all_reduce", "mlp", row),
        ]
    );
    assert_eq!(mixed.layers[5].collectives[1].among, 4);
    assert_eq!(mixed.ranks[0].weight_bytes, eight.ranks[0].weight_bytes);
    assert!(has_note(&mixed, &["128 experts are spread over 4 groups of 2 ranks", "as asked for"]));
    let refused =
        |groups| Planner::new(&spec).experts(Experts::Grouped { groups }).plan(8).unwrap_err().to_string();
    assert!(refused(3).contains("8 ranks don't make 3 equal groups"), "{}", refused(3));
    assert!(refused(0).contains("8 ranks don't make 0 equal groups"), "{}", refused(0));

    // Asked for, columns are shared as evenly as blocks allow; beyond 12 ranks there is no block for each.
    let columns = Planner::new(&spec).experts(Experts::Tensor);
    assert_eq!(shares(&columns.plan(8).unwrap(), "expert_ffn"), [256, 256, 256, 256, 128, 128, 128, 128]);
    let error = columns.plan(16).unwrap_err();
    assert!(matches!(
        error,
        Error::TooManyRanks { constraint: "moe_intermediate_size", size: 12, nearest: 12, .. }
    ));
    let text = error.to_string();
    assert!(text.contains("1536 is 12 groups of 128") && text.contains("(expert parallel)"), "{text}");

    // 64 blocks of up_proj's outputs cut at 4: columns 3 * 128 = 384 a rank, weights and scales alike.
    let four = plan(&spec, 4);
    assert_eq!(shares(&four, "expert_ffn"), [384; 4]);
    let of = |part: &str| held(&four, &format!("model.layers.5.mlp.experts.17.{part}"), 2).unwrap();
    assert_eq!(of("up_proj.weight"), [(0, 768, 1152)]);
    assert_eq!(of("up_proj.weight_scale_inv"), [(0, 6, 9)]);
    assert_eq!(of("down_proj.weight_scale_inv"), [(1, 6, 9)]);
}

#[test]
fn deepseek_v3_at_8_and_32() {
    let spec = model("deepseek-v3");
    // At 8: 2048 columns are 16 blocks of 128, two a rank. The dense layers' 18432 are 144 blocks, 18 a rank.
    let eight = plan(&spec, 8);
    assert_eq!((shares(&eight, "expert_ffn"), shares(&eight, "shared_ffn")), (vec![256; 8], vec![256; 8]));
    assert_eq!((shares(&eight, "ffn"), shares(&eight, "heads")), (vec![2304; 8], vec![16; 8]));
    assert_eq!(lengths(&eight.layers[2].mlp.ffn), [2304; 8]);
    assert_eq!(lengths(&eight.layers[3].mlp.ffn), [256; 8]);
    // Routed and shared experts are summed together.
    let row = 7168 * 2;
    assert_eq!(exchanges(&eight, 3), [("all_reduce", "self_attn.o_proj", row), ("all_reduce", "mlp", row)]);
    // A query head is 192 rows of q_b_proj, one and a half blocks, so heads are cut in pairs; 16 heads are 3072 rows
    // and 24 blocks. kv_b_proj has 256 rows a head.
    assert_eq!(eight.dimension("heads").unwrap().granule, 2);
    let of = |part: &str| held(&eight, &format!("model.layers.9.self_attn.{part}"), 1).unwrap();
    assert_eq!(of("q_b_proj.weight"), [(0, 3072, 6144)]);
    assert_eq!(of("q_b_proj.weight_scale_inv"), [(0, 24, 48)]);
    assert_eq!(of("kv_b_proj.weight"), [(0, 4096, 8192)]);
    assert_eq!(of("o_proj.weight"), [(1, 2048, 4096)]);
    assert_eq!((of("q_a_proj.weight"), of("kv_a_proj_with_mqa.weight")), (vec![], vec![]));
    // 512 + 64 elements of 2 bytes in 61 layers, on every rank however many there are.
    assert!(eight.ranks.iter().all(|r| r.kv_bytes_per_token == 576 * 2 * 61));
    assert!(has_note(&eight, &["latent KV cache", "70.3 kB"]));

    // At 32: 16 blocks are too few, so experts are whole, 256 / 32 = 8 each; the shared expert's 16 blocks are too few
    // as well, so it is on every rank. 144 = 32 * 4 + 16 blocks of the dense layers. Two pairs of heads each.
    let many = plan(&spec, 32);
    assert_eq!((shares(&many, "experts"), shares(&many, "heads")), (vec![8; 32], vec![4; 32]));
    assert_eq!(shares(&many, "ffn"), [[640; 16], [512; 16]].concat());
    assert!(!many.dimension("shared_ffn").unwrap().shared);
    // 3 * 7168 * 2048 bytes and a scale of 4 for each of 3 * 56 * 16 blocks in 58 layers: 2.555 GB a rank.
    assert!(has_note(&many, &["shared expert", "16 groups of 128 for 32 ranks", "2555.0 MB a rank"]));
    assert!(has_note(&many, &["2048 columns of each are only 16 groups of 128, fewer than 32 ranks"]));
    let kinds: Vec<_> = exchanges(&many, 3).into_iter().map(|(op, ..)| op).collect();
    assert_eq!(kinds, ["all_reduce", "all_to_all", "all_to_all", "all_gather"]);
    // Expert 255 is on the last rank.
    let name = "model.layers.60.mlp.experts.255.up_proj.weight";
    assert_eq!((held(&many, name, 30), held(&many, name, 31)), (None, Some(vec![])));

    // 128 heads are 64 pairs.
    let error = Planner::new(&spec).plan(65).unwrap_err();
    assert!(matches!(error, Error::TooManyRanks { size: 64, granule: 2, nearest: 64, .. }), "{error}");
}

#[test]
fn gpt2_xl_at_2_is_fused_and_transposed() {
    let plan = plan(&model("gpt2-xl"), 2);
    // 25 heads of 64. c_attn is [1600, 4800]: queries, keys and values of 1600 columns each, of which rank 0 has the
    // first 13 * 64 = 832.
    assert_eq!(shares(&plan, "heads"), [13, 12]);
    let of = |part: &str, rank| held(&plan, &format!("h.7.{part}"), rank).unwrap();
    assert_eq!(of("attn.c_attn.weight", 0), [(1, 0, 832), (1, 1600, 2432), (1, 3200, 4032)]);
    assert_eq!(of("attn.c_attn.weight", 1), [(1, 832, 1600), (1, 2432, 3200), (1, 4032, 4800)]);
    assert_eq!(of("attn.c_attn.bias", 1), [(0, 832, 1600), (0, 2432, 3200), (0, 4032, 4800)]);
    // Row-parallel, and stored with the inputs first; its bias is added after the sum.
    assert_eq!((of("attn.c_proj.weight", 1), of("attn.c_proj.bias", 1)), (vec![(0, 832, 1600)], vec![]));
    assert_eq!(
        (of("mlp.c_fc.weight", 1), of("mlp.c_proj.weight", 1)),
        (vec![(1, 3200, 6400)], vec![(0, 3200, 6400)])
    );
    // 50257 rows: the next multiple of lcm(64, 2) is 786 * 64 = 50304, 25152 each; the last has 47 fewer.
    assert_eq!((plan.vocab.padded, lengths(&plan.vocab.ranges)), (50_304, vec![25_152, 25_105]));
    assert!(has_note(&plan, &["padded from 50257 to 50304"]));
}

#[test]
fn mixtral_at_3_and_8() {
    let spec = model("mixtral-8x7b");
    // 8 experts over 3 ranks would be 3, 3, 2, 1.125 of the mean; 14336 = 3 * 4778 + 2 columns are nearly even.
    let three = plan(&spec, 3);
    assert_eq!(
        (shares(&three, "expert_ffn"), shares(&three, "heads")),
        (vec![4779, 4779, 4778], vec![12, 12, 8])
    );
    let name = "model.layers.0.block_sparse_moe.experts.6.w2.weight";
    assert_eq!(held(&three, name, 2), Some(vec![(1, 9558, 14_336)]));
    assert_eq!(held(&three, "model.layers.0.block_sparse_moe.gate.weight", 2), Some(vec![]));
    let eight = plan(&spec, 8);
    assert_eq!(shares(&eight, "expert_ffn"), [1792; 8]);
    assert_eq!(exchanges(&eight, 0).len(), 2);
    // Asked for, an expert a rank; a token goes to two of them.
    let experts = Planner::new(&spec).experts(Experts::Parallel);
    let eight = experts.plan(8).unwrap();
    eight.check(&spec).unwrap();
    assert_eq!(shares(&eight, "experts"), [1; 8]);
    assert_eq!((held(&eight, name, 5), held(&eight, name, 6)), (None, Some(vec![])));
    assert_eq!(exchanges(&eight, 0)[1], ("all_to_all", "block_sparse_moe: dispatch", 2 * 8192));
    assert_eq!(shares(&experts.plan(3).unwrap(), "experts"), [3, 3, 2]);
    let error = experts.plan(9).unwrap_err().to_string();
    assert!(error.contains("num_local_experts = 8") && error.contains("each expert's columns"), "{error}");
}

#[test]
fn falcon_sums_once_a_layer() {
    let spec = model("falcon-7b");
    // 71 heads of 64 that read one key/value head. query_key_value is [4672, 4544]: 71 * 64 = 4544 rows of queries,
    // then 64 of the key and 64 of the value, which every rank has. What follows on is one range.
    let two = plan(&spec, 2);
    assert_eq!(shares(&two, "heads"), [36, 35]);
    let name = "transformer.h.0.self_attention.query_key_value.weight";
    assert_eq!(held(&two, name, 0), Some(vec![(0, 0, 2304), (0, 4544, 4672)]));
    assert_eq!(held(&two, name, 1), Some(vec![(0, 2304, 4672)]));
    assert!((0..2).all(|rank| two.tensor(name, rank).unwrap().replicated));
    assert_eq!(shares(&plan(&spec, 8), "heads"), [9, 9, 9, 9, 9, 9, 9, 8]);
    for world in [2, 8] {
        let plan = plan(&spec, world);
        let after = "self_attention.dense + mlp.dense_4h_to_h";
        assert!((0..32).all(|n| exchanges(&plan, n) == [("all_reduce", after, 4544 * 2)]));
        // K and V of one head, on every rank.
        assert!(plan.ranks.iter().all(|r| r.kv_bytes_per_token == 2 * 64 * 2 * 32));
        assert!(has_note(&plan, &["key/value heads on more than one rank: 1 of 1"]));
    }

    // Falcon 40B: 8 groups of 16 query heads, each followed by its key and value: 18 * 64 = 1152 rows a group.
    let spec = model("falcon-40b");
    let name = "transformer.h.0.self_attention.query_key_value.weight";
    let eight = plan(&spec, 8);
    assert_eq!(held(&eight, name, 3), Some(vec![(0, 3 * 1152, 4 * 1152)]));
    assert!(!eight.tensor(name, 3).unwrap().replicated);
    // At 16, half a group's queries each: the first 8 * 64 = 512 rows and, from row 1024 on, the key and value; the
    // second half's end where these begin.
    let sixteen = plan(&spec, 16);
    assert_eq!(held(&sixteen, name, 0), Some(vec![(0, 0, 512), (0, 1024, 1152)]));
    assert_eq!(held(&sixteen, name, 1), Some(vec![(0, 512, 1152)]));
}

#[test]
fn other_fused_layouts() {
    // GPT-NeoX: queries, keys and values of a head together, 3 * 96 rows; 64 heads over 3: 22, 21, 21.
    let neox = plan(&model("gpt-neox-20b"), 3);
    let name = "gpt_neox.layers.0.attention.query_key_value";
    assert_eq!(held(&neox, &format!("{name}.weight"), 1), Some(vec![(0, 22 * 288, 43 * 288)]));
    assert_eq!(held(&neox, &format!("{name}.bias"), 1), Some(vec![(0, 22 * 288, 43 * 288)]));
    assert_eq!(exchanges(&neox, 0).len(), 1);
    // Phi 3: 8192 gates, then 8192 ups. 32 heads of 96: queries, keys, values of 3072 rows each.
    let phi = plan(&model("phi-3-mini"), 2);
    let of = |part: &str| held(&phi, &format!("model.layers.0.{part}.weight"), 1).unwrap();
    assert_eq!(of("mlp.gate_up_proj"), [(0, 4096, 8192), (0, 12_288, 16_384)]);
    assert_eq!(of("self_attn.qkv_proj"), [(0, 1536, 3072), (0, 4608, 6144), (0, 7680, 9216)]);
    // gpt-oss: gate and up of a column side by side; 2880 columns are 90 groups of 32, 45 a rank, of 16 bytes each.
    let oss = plan(&model("gpt-oss-20b"), 2);
    let of = |part: &str| held(&oss, &format!("model.layers.0.{part}"), 1).unwrap();
    assert_eq!(of("mlp.experts.gate_up_proj_blocks"), [(1, 2880, 5760)]);
    assert_eq!(of("mlp.experts.gate_up_proj_bias"), [(1, 2880, 5760)]);
    assert_eq!(of("mlp.experts.down_proj_blocks"), [(2, 45, 90)]);
    assert_eq!(of("mlp.experts.down_proj_scales"), [(2, 45, 90)]);
    assert_eq!(of("mlp.experts.down_proj_bias"), []);
    assert_eq!(of("self_attn.sinks"), [(0, 32, 64)]);
    // At 8, 90 groups would be 12 at most, 1.067 of the mean, and 32 experts are 4 each.
    let oss = plan(&model("gpt-oss-20b"), 8);
    assert_eq!(held(&oss, "model.layers.0.mlp.experts.gate_up_proj_blocks", 2), Some(vec![(0, 8, 12)]));
    assert_eq!(held(&oss, "model.layers.0.mlp.experts.down_proj_bias", 2), Some(vec![(0, 8, 12)]));
    // Flux's single blocks end with 24 * 128 = 3072 columns of attention, then 12288 of the feed-forward layer.
    let flux = plan(&model("flux-dev"), 2);
    let name = "single_transformer_blocks.0.proj_out.weight";
    assert_eq!(held(&flux, name, 1), Some(vec![(1, 1536, 3072), (1, 9216, 15_360)]));
    let streams: Vec<_> = flux.layers[0].collectives.iter().map(|c| c.stream.as_str()).collect();
    assert_eq!(streams, ["", "context", "", "context"]);
}

#[test]
fn encoders_and_decoders_of_t5() {
    let t5 = plan(&model("t5-small"), 2);
    assert_eq!(
        (t5.layers.len(), t5.layers[0].stream.as_str(), t5.layers[6].stream.as_str()),
        (12, "context", "")
    );
    // The bias by distance has a column a head, in the first layer of each stack.
    let bias = |n| held(&t5, &format!("{n}.layer.0.SelfAttention.relative_attention_bias.weight"), 1);
    assert_eq!(
        (bias("encoder.block.0"), bias("decoder.block.0")),
        (Some(vec![(1, 4, 8)]), Some(vec![(1, 4, 8)]))
    );
    assert_eq!(bias("encoder.block.1"), None);
    assert_eq!(t5.layers[6].cross_attention.as_ref().map(|a| lengths(&a.q_heads)), Some(vec![4, 4]));
    assert_eq!(exchanges(&t5, 6).len(), 3);
    // Keys and values of 4 heads of 64 in 6 decoder layers, 4 bytes each.
    assert_eq!(t5.ranks[0].kv_bytes_per_token, 2 * 4 * 64 * 6 * 4);
    // An encoder alone keeps nothing, and UMT5 has the bias in each layer.
    let umt5 = plan(&model("umt5-xxl-encoder"), 2);
    let name = "encoder.block.23.layer.0.SelfAttention.relative_attention_bias.weight";
    assert_eq!(held(&umt5, name, 1), Some(vec![(1, 32, 64)]));
    assert_eq!((umt5.ranks[0].kv_bytes_per_token, umt5.layers[0].stream.as_str()), (0, ""));
    assert_eq!(umt5.vocab.collectives.len(), 1);
}

#[test]
fn cosmos_exchanges_and_holds_what_its_readme_says() {
    let spec = model("cosmos-predict1-7b");
    let tokens = 56_320u64;
    for (world, gb, weights) in [(2, 77.5, 7.66), (4, 116.3, 4.26), (8, 135.6, 2.55)] {
        let plan = plan(&spec, world);
        // Three sums a block of 56320 * 4096 elements of 2 bytes; 28 blocks, with and without the prompt.
        let payloads: Vec<u64> =
            plan.layers.iter().flat_map(|l| &l.collectives).map(|c| c.bytes_per_token * tokens).collect();
        assert_eq!((payloads.len(), payloads[0]), (84, 461_373_440));
        let n = world as f64;
        let wire = 2.0 * (n - 1.0) / n * 2.0 * payloads.iter().sum::<u64>() as f64;
        assert!((wire / 1e9 - gb).abs() < 0.06, "{world}: {wire}");
        // 6,811,549,696 parameters are shared and 424,642,560 are not, of 2 bytes.
        assert_eq!(plan.ranks[0].weight_bytes, 2 * (6_811_549_696 / world as u64 + 424_642_560));
        assert!((plan.ranks[0].weight_bytes as f64 / 1e9 - weights).abs() < 0.006);
    }
    // 2.2094e15 operations a call, 0.659 of them self-attention's.
    let one = plan(&spec, 1);
    let sum = |of: fn(&tensorwire_topology::plan::LayerShare) -> u64| -> u64 {
        one.layers.iter().map(|l| of(&l.ranks[0])).sum()
    };
    let weights = sum(|s| s.flops_per_token) * tokens
        + sum(|s| s.flops_per_context_token) * 512
        + sum(|s| s.flops_per_call);
    // Both attentions have the same heads: half of the pairs' operations are for 56320 tokens, half for 512.
    let pairs = sum(|s| s.flops_per_pair) / 2 * tokens;
    let (own, text) = (pairs * tokens, pairs * 512);
    let all = (weights + own + text) as f64;
    assert!((all / 2.2094e15 - 1.0).abs() < 1e-3, "{all}");
    assert!((own as f64 / all - 0.659).abs() < 1e-3);
}

#[test]
fn norms_over_all_heads_exchange_sums_of_squares() {
    let plan = plan(&model("wan2.1-14b"), 4);
    // Queries' and keys' sums, 4 bytes each, before attention; 5120 elements of 2 bytes after it.
    let of =
        |layer| exchanges(&plan, layer).into_iter().map(|(op, _, bytes)| (op, bytes)).collect::<Vec<_>>();
    let sum = ("all_reduce", 10_240);
    assert_eq!(of(0), [("all_reduce", 8), sum, ("all_reduce", 8), sum, sum]);
    assert_eq!(held(&plan, "blocks.0.attn1.norm_q.weight", 1), Some(vec![(0, 1280, 2560)]));
}

#[test]
fn sequence_parallel_moves_the_same_bytes_in_halves() {
    let spec = model("llama-3.1-8b");
    let plan = Planner::new(&spec).sequence_parallel(true).plan(4).unwrap();
    plan.check(&spec).unwrap();
    let kinds: Vec<_> = exchanges(&plan, 0).into_iter().map(|(op, _, bytes)| (op, bytes)).collect();
    let half = |op| (op, 8192);
    assert_eq!(
        kinds,
        [half("reduce_scatter"), half("all_gather"), half("reduce_scatter"), half("all_gather")]
    );
}

#[test]
fn shares_are_nearly_even_wherever_shapes_allow() {
    let mut judged = 0;
    for entry in fs::read_dir(fixture("x").parent().unwrap()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let spec = model(&name);
        for world in [2usize, 3, 4, 8] {
            let Ok(plan) = Planner::new(&spec).outline(world) else { continue };
            for d in plan.dimensions.iter().filter(|d| d.shared && !d.name.ends_with("kv_heads")) {
                let limit = if d.name.ends_with("heads") { 1.15 } else { 1.03 };
                let units = d.size.div_ceil(d.granule);
                let least = (units.div_ceil(world) * world) as f64 / units as f64;
                let largest = *lengths(&d.ranges).iter().max().unwrap() as f64 * world as f64 / d.size as f64;
                assert!(largest <= f64::max(limit, least) + 1e-9, "{name} at {world}: {} {largest}", d.name);
                judged += 1;
            }
        }
    }
    assert!(judged > 200, "{judged}");
}

#[test]
fn shares_follow_speed_and_memory() {
    let spec = model("llama-3.1-8b");
    // A rank twice as fast as the other two: half of 14336 columns, and half of 128256 rows.
    let plan = Planner::new(&spec).speeds(vec![2.0, 1.0, 1.0]).plan(3).unwrap();
    plan.check(&spec).unwrap();
    assert_eq!(
        (shares(&plan, "ffn"), shares(&plan, "vocab")),
        (vec![7168, 3584, 3584], vec![64_128, 32_064, 32_064])
    );
    // 16 heads in 4 groups cost 16 + 2 * 4 = 24, over 2: 12. 8 heads in 2 groups cost 12.
    assert_eq!(shares(&plan, "heads"), [16, 8, 8]);
    assert!(has_note(&plan, &["shares follow the ranks' speeds (2, 1, 1)"]));

    // 16.06 GB over two ranks, of which one has room for 5 GB only.
    let plan = Planner::new(&spec).memory(vec![5_000_000_000, 24_000_000_000]).plan(2).unwrap();
    plan.check(&spec).unwrap();
    let held: Vec<u64> = plan.ranks.iter().map(|r| r.weight_bytes).collect();
    assert!(held[0] <= 5_000_000_000 && held[0] > 4_000_000_000, "{held:?}");
    assert!(has_note(&plan, &["shares follow the ranks' memory (5000.0 MB, 24.0 GB)"]));
    let error = Planner::new(&spec).memory(vec![5_000_000_000; 2]).plan(2).unwrap_err();
    assert!(matches!(error, Error::Memory { limit: 5_000_000_000, .. }), "{error}");
    for planner in [Planner::new(&spec).speeds(vec![1.0]), Planner::new(&spec).speeds(vec![1.0, f64::NAN])] {
        assert!(matches!(planner.plan(2), Err(Error::RankOptions(_))));
    }
}

#[test]
fn an_unknown_architecture_is_planned_from_its_tensors() {
    let known = r#"{"model_type": "qwen3", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 6, "vocab_size": 10, "torch_dtype": "float32"}"#;
    let unknown = known.replace("qwen3", "quokka");
    let expected = ModelSpec::from_config(known).unwrap();
    let mut tensors = tensors_of(&expected, "F32");
    let spec = ModelSpec::load(model_dir(&unknown, Some(&tensors)).path()).unwrap();
    assert_eq!(spec.architecture, Architecture::Unknown);
    let found = plan(&spec, 2);
    assert!(has_note(&found, &["\"quokka\" is not known", "names and shapes"]));
    assert_eq!(found.dimensions, plan(&expected, 2).dimensions);
    assert_eq!(found.tensors, plan(&expected, 2).tensors);

    // Without weights, or with a matrix that no rule knows, there is nothing to go by.
    assert!(matches!(ModelSpec::from_config(&unknown), Err(Error::UnknownArchitecture { .. })));
    tensors.push(("model.layers.0.mystery.weight".to_owned(), "F32", vec![3, 3]));
    let error = ModelSpec::load(model_dir(&unknown, Some(&tensors)).path()).unwrap_err().to_string();
    assert!(error.contains("mystery.weight (F32 [3, 3])") && error.contains("fits no rule"), "{error}");
}

#[test]
fn shapes_say_what_the_configuration_leaves_out() {
    let full = r#"{"model_type": "llama", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 5, "intermediate_size": 6, "vocab_size": 10, "torch_dtype": "float32"}"#;
    let tensors = tensors_of(&ModelSpec::from_config(full).unwrap(), "F32");
    let sparse = full.replace("\"num_key_value_heads\": 2, \"head_dim\": 5, ", "");
    let spec = ModelSpec::load(model_dir(&sparse, Some(&tensors)).path()).unwrap();
    assert_eq!((spec.head_dim, spec.num_key_value_heads), (5, 2));
    let plan = plan(&spec, 2);
    assert!(has_note(&plan, &["head_dim = 5, which config.json leaves out"]));
    assert!(has_note(&plan, &["kv_heads = 2, which config.json leaves out"]));
    // What it says is not overruled.
    let wrong = full.replace("\"head_dim\": 5", "\"head_dim\": 3");
    assert!(matches!(
        ModelSpec::load(model_dir(&wrong, Some(&tensors)).path()),
        Err(Error::TensorShape { .. })
    ));
}

#[test]
fn weights_that_cannot_be_cut_are_refused() {
    let config = |name: &str, quantised: &str| {
        let text = fs::read_to_string(fixture(name)).unwrap();
        let end = text.rfind('}').unwrap();
        ModelSpec::from_config(&format!("{}, \"quantization_config\": {quantised}}}", &text[..end]))
    };
    // The first 9 * 64 = 576 rows of a fused q, k, v end in the middle of a block of 128.
    let phi = r#"{"model_type": "phi3", "hidden_size": 576, "num_hidden_layers": 1, "num_attention_heads": 9,
        "intermediate_size": 1536, "vocab_size": 100,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}"#;
    let error = ModelSpec::from_config(phi).unwrap_err().to_string();
    assert!(error.contains("qkv_proj.weight_scale_inv") && error.contains("can't be cut"), "{error}");
    assert!(
        config("llama-3.1-8b", r#"{"quant_method": "bitsandbytes"}"#)
            .unwrap_err()
            .to_string()
            .contains("no rules")
    );
    assert!(
        config("llama-3.1-8b", r#"{"quant_method": "mxfp4"}"#)
            .unwrap_err()
            .to_string()
            .contains("no known layout")
    );
    assert!(config("llama-3.1-8b", r#"{"quant_method": "gptq", "bits": 3, "group_size": 128}"#).is_err());
    assert!(config("llama-3.1-8b", r#"{"quant_method": "gptq", "bits": 4, "group_size": 0}"#).is_err());
    assert!(config("llama-3.1-8b", r#"{"quant_method": "fp8", "weight_block_size": [128]}"#).is_err());
    assert!(config("llama-3.1-8b", r#"{"quant_method": "awq", "bits": 4, "group_size": 128}"#).is_ok());
}

#[test]
fn a_convolutional_autoencoder_is_whole_on_every_rank() {
    let config = r#"{"_class_name": "AutoencoderKLCosmos", "torch_dtype": "float32"}"#;
    let dir = model_dir(config, None);
    let tensors = [("decoder.conv_in.conv_s.weight".to_owned(), "F32", vec![8, 4, 1, 3, 3])];
    common::write_safetensors(&dir.path().join("diffusion_pytorch_model.safetensors"), &tensors);
    let plan = plan(&ModelSpec::load(dir.path()).unwrap(), 2);
    assert_eq!(held(&plan, &tensors[0].0, 1), Some(vec![]));
    assert!(plan.tensor(&tensors[0].0, 1).unwrap().replicated);
    assert!(has_note(&plan, &["convolutions", "halo"]));
}
