//! Wrong rules: each must make the proof fail.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tensorwire_topology::plan::{Slice, Span, TensorShard};
use tensorwire_topology::shard::Experts;
use tensorwire_topology::{Plan, Planner};

use super::group::Fault;
use super::toys::{TOYS, Toy};
use super::{TOLERANCE, Whole};

/// Far above what the order of sums is worth, far below what any of these is.
const SEEN: f64 = 1e3 * TOLERANCE;

fn toy(name: &str) -> &'static Toy {
    TOYS.iter().find(|t| t.name == name).unwrap()
}

/// The number of ranks that toys are split over here.
fn world(toy: &Toy) -> usize {
    toy.worlds[0]
}

/// Whether a wrong plan gives wrong numbers.
fn is_seen(whole: &Whole, plan: &Plan, fault: Option<Fault>) -> bool {
    let apart = whole.difference(plan, fault);
    apart.is_nan() || apart > SEEN
}

/// Asserts that a wrong plan gives wrong numbers.
fn differs(whole: &Whole, plan: &Plan, fault: Option<Fault>, what: &str) {
    assert!(is_seen(whole, plan, fault), "{}: {what} goes unseen", whole.toy.name);
}

/// The same, or parts that don't fit each other.
fn is_refused_or_seen(whole: &Whole, plan: &Plan) -> bool {
    catch_unwind(AssertUnwindSafe(|| is_seen(whole, plan, None))).unwrap_or(true)
}

/// Asserts that a wrong plan gives wrong numbers, or parts that don't fit each other.
fn fails(whole: &Whole, plan: &Plan, what: &str) {
    assert!(is_refused_or_seen(whole, plan), "{}: {what} goes unseen", whole.toy.name);
}

/// The same number of elements, one further, or one less far where there is none further.
fn moved(span: Span, size: usize) -> Span {
    match span.end < size {
        true => Span::new(span.start + 1, span.end + 1),
        false => Span::new(span.start - 1, span.end - 1),
    }
}

/// What the result doesn't depend on, whichever part a rank has: a key's bias is the same summand in all scores
/// of a query, unless positions turn it, so that softmax drops it.
fn without_effect(toy: &Toy, tensor: &str, slice: &Slice) -> bool {
    match toy.name {
        "bert" | "vit" | "siglip" => tensor.ends_with("key.bias") || tensor.ends_with("k_proj.bias"),
        // The second of three parts of 20.
        "gpt2" => tensor.ends_with("c_attn.bias") && (20..40).contains(&slice.range.start),
        _ => false,
    }
}

#[test]
fn a_slice_that_is_one_off_is_seen_in_every_tensor() {
    let mut unseen = Vec::new();
    for toy in TOYS {
        let whole = Whole::of(toy);
        let mut moves = 0;
        for (name, plan) in
            whole.plans(world(toy)).into_iter().filter(|(name, _)| !name.contains("sequence true"))
        {
            for (i, t) in plan.tensors.iter().enumerate() {
                let shape = &whole.spec.tensor(&t.name).unwrap().shape;
                let is_read = |s: &Slice| s.range.len() < shape[s.dim] && !without_effect(toy, &t.name, s);
                for (s, slice) in t.slices.iter().enumerate().filter(|(_, s)| is_read(s)) {
                    let mut wrong = plan.clone();
                    wrong.tensors[i].slices[s].range = moved(slice.range, shape[slice.dim]);
                    moves += 1;
                    if !is_refused_or_seen(&whole, &wrong) {
                        unseen.push(format!("{name}: {}: {slice:?} of rank {}", t.name, t.rank));
                    }
                }
            }
        }
        assert!(moves > 0, "{} has no slices", toy.name);
    }
    assert!(unseen.is_empty(), "{unseen:#?}");
}

#[test]
fn ranks_with_each_others_slices_are_seen() {
    let mut swaps = 0;
    for toy in TOYS {
        let whole = Whole::of(toy);
        let plan = Planner::new(&whole.spec).plan(world(toy)).unwrap();
        for i in 0..plan.tensors.len() - 1 {
            let [a, b] = [&plan.tensors[i], &plan.tensors[i + 1]];
            let lengths =
                |t: &TensorShard| t.slices.iter().map(|s| (s.dim, s.range.len())).collect::<Vec<_>>();
            let same = a.name == b.name && lengths(a) == lengths(b) && a.slices != b.slices;
            if !same || a.slices.iter().all(|s| without_effect(toy, &a.name, s)) {
                continue;
            }
            let mut wrong = plan.clone();
            wrong.tensors[i].slices = b.slices.clone();
            wrong.tensors[i + 1].slices = a.slices.clone();
            swaps += 1;
            differs(
                &whole,
                &wrong,
                None,
                &format!("{}: rank {}'s slice with the next one's", a.name, a.rank),
            );
        }
    }
    assert!(swaps > 0);
}

#[test]
fn every_missing_exchange_is_seen() {
    for toy in TOYS {
        let whole = Whole::of(toy);
        for (name, plan) in whole.plans(world(toy)) {
            for layer in 0..plan.layers.len() {
                for i in 0..plan.layers[layer].collectives.len() {
                    let mut wrong = plan.clone();
                    let gone = wrong.layers[layer].collectives.remove(i);
                    fails(&whole, &wrong, &format!("{name}: layer {layer} without {gone:?}"));
                }
            }
            for i in 0..plan.vocab.collectives.len() {
                let mut wrong = plan.clone();
                let gone = wrong.vocab.collectives.remove(i);
                fails(&whole, &wrong, &format!("{name}: without {gone:?}"));
            }
        }
    }
}

#[test]
fn a_bias_on_every_rank_is_seen() {
    let biased = ["llama", "gpt_oss", "gpt2", "gpt_neox", "bert", "vit", "siglip", "flux", "wan"];
    for name in biased {
        let whole = Whole::of(toy(name));
        let plan = Planner::new(&whole.spec).plan(2).unwrap();
        differs(&whole, &plan, Some(Fault::BiasOnEveryRank), "a bias added by every rank");
    }
}

#[test]
fn a_vocabulary_without_mask_is_seen() {
    for toy in TOYS.iter().filter(|t| t.config.contains("vocab_size")) {
        let whole = Whole::of(toy);
        let plan = Planner::new(&whole.spec).plan(world(toy)).unwrap();
        differs(&whole, &plan, Some(Fault::NoMask), "a lookup without a mask");
        // Rows that are another part than the mask says.
        let mut wrong = plan.clone();
        wrong.vocab.ranges[1] = moved(wrong.vocab.ranges[1], wrong.model.vocab_size);
        fails(&whole, &wrong, "a mask that is one off");
        if !plan.vocab.collectives.iter().any(|c| c.op == "all_gather") || plan.vocab.padded == 190 {
            continue;
        }
        let mut wrong = plan.clone();
        wrong.vocab.padded += plan.world;
        differs(&whole, &wrong, None, "logits with other padding");
    }
}

#[test]
fn a_shared_expert_on_every_rank_is_seen() {
    let whole = Whole::of(toy("qwen2_moe fp8"));
    let plan = Planner::new(&whole.spec).experts(Experts::Tensor).plan(2).unwrap();
    assert!(plan.layers[0].mlp.shared_ffn.is_empty());
    differs(&whole, &plan, Some(Fault::SharedOnEveryRank), "a whole shared expert added by every rank");
}

#[test]
fn ranks_with_each_others_experts_are_seen() {
    for toy in TOYS {
        let whole = Whole::of(toy);
        for (name, plan) in whole.plans(world(toy)) {
            if plan.layers.iter().all(|l| l.mlp.experts.is_empty()) {
                continue;
            }
            let mut wrong = plan.clone();
            wrong.layers.iter_mut().for_each(|l| l.mlp.experts.reverse());
            fails(&whole, &wrong, &format!("{name}: the experts in reverse"));
        }
    }
}

/// Toys whose experts are over two groups of two ranks: with a shared expert, with stacked experts that only so are
/// enough, and in blocks.
fn grouped() -> impl Iterator<Item = (Whole, Plan)> {
    ["qwen2_moe", "gpt_oss", "qwen2_moe fp8", "mixtral"].into_iter().map(|name| {
        let whole = Whole::of(toy(name));
        let plan = Planner::new(&whole.spec).experts(Experts::Grouped { groups: 2 }).plan(4).unwrap();
        assert!(!plan.layers[0].mlp.experts.is_empty() && !plan.layers[0].mlp.ffn.is_empty(), "{name}");
        (whole, plan)
    })
}

#[test]
fn groups_of_experts_with_parts_of_others_are_seen() {
    for (whole, plan) in grouped() {
        let mut moves = 0;
        // What only an expert's first rank adds isn't read by the others.
        let read = |t: &TensorShard| !t.name.ends_with("down_proj_bias") || t.rank.is_multiple_of(2);
        let of_experts = |t: &TensorShard| t.name.contains("experts") && read(t);
        for (i, t) in plan.tensors.iter().enumerate().filter(|(_, t)| of_experts(t)) {
            let shape = &whole.spec.tensor(&t.name).unwrap().shape;
            for (s, slice) in t.slices.iter().enumerate().filter(|(_, s)| s.range.len() < shape[s.dim]) {
                let mut wrong = plan.clone();
                wrong.tensors[i].slices[s].range = moved(slice.range, shape[slice.dim]);
                moves += 1;
                fails(&whole, &wrong, &format!("{}: {slice:?} of rank {}, one off", t.name, t.rank));
            }
        }
        assert!(moves > 0, "{}", whole.toy.name);
        let mut wrong = plan.clone();
        wrong.layers[0].mlp.experts.swap(1, 2);
        fails(&whole, &wrong, "experts of another group");
    }
}

#[test]
fn groups_of_experts_with_other_exchanges_are_seen() {
    for (whole, plan) in grouped() {
        for (i, exchange) in plan.layers[0].collectives.iter().enumerate() {
            let mut wrong = plan.clone();
            wrong.layers[0].collectives.remove(i);
            fails(&whole, &wrong, &format!("{exchange:?} gone"));
            if exchange.op == "all_to_all" {
                assert_eq!(exchange.among, 2);
                let mut wrong = plan.clone();
                wrong.layers[0].collectives[i].among = 1;
                differs(&whole, &wrong, None, &format!("{exchange:?} with nobody"));
            }
        }
    }
    let (whole, plan) = grouped().nth(1).unwrap();
    differs(&whole, &plan, Some(Fault::BiasOnEveryRank), "an expert's bias added by each of its ranks");
}

#[test]
fn a_replica_that_is_dropped_or_shifted_is_seen() {
    let whole = Whole::of(toy("llama"));
    // Nine query heads over two ranks: both need the second of three key/value heads.
    let plan = Planner::new(&whole.spec).plan(2).unwrap();
    assert_eq!(plan.layers[0].attention.kv_heads, [Span::new(0, 2), Span::new(1, 3)]);
    let dim = plan.model.head_dim;
    let of_rank_1 = |t: &TensorShard| {
        t.rank == 1
            && t.name.starts_with("model.layers.0.")
            && (t.name.contains("k_proj") || t.name.contains("v_proj"))
    };
    let with = |heads: Span| {
        let mut wrong = plan.clone();
        wrong.layers[0].attention.kv_heads[1] = heads;
        for t in wrong.tensors.iter_mut().filter(|t| of_rank_1(t)) {
            t.slices[0].range = Span::new(heads.start * dim, heads.end * dim);
        }
        wrong
    };
    assert_eq!(with(Span::new(1, 3)), plan);
    fails(&whole, &with(Span::new(2, 3)), "a replica that isn't there");
    // A head further back, read as if it were the right one.
    let mut shifted = with(Span::new(0, 2));
    shifted.layers[0].attention.kv_heads[1] = Span::new(1, 3);
    differs(&whole, &shifted, None, "the key/value head before");
    // Query heads that take themselves for their neighbours read other key/value heads.
    let mut other = plan.clone();
    other.layers[0].attention.q_heads = vec![Span::new(1, 6), Span::new(5, 9)];
    differs(&whole, &other, None, "query heads that are one off");
}

#[test]
fn a_fused_layer_cut_in_another_order_is_seen() {
    let fused = [
        ("phi3", "self_attn.qkv_proj.weight"),
        ("phi3", "mlp.gate_up_proj.weight"),
        ("gpt2", "attn.c_attn.weight"),
        ("gpt2", "attn.c_attn.bias"),
        ("falcon 40b", "self_attention.query_key_value.weight"),
        ("flux", "proj_out.weight"),
    ];
    for (name, tensor) in fused {
        let whole = Whole::of(toy(name));
        // So many that cuts are inside groups too.
        let plan = Planner::new(&whole.spec).plan(*whole.toy.worlds.last().unwrap()).unwrap();
        let cut = plan.tensors.iter().position(|t| t.name.ends_with(tensor) && t.slices.len() > 1);
        let cut = cut.unwrap_or_else(|| panic!("{name} has no {tensor} of several parts"));
        let TensorShard { slices, rank, .. } = plan.tensors[cut].clone();
        let mut wrong = plan.clone();
        wrong.tensors[cut].slices.reverse();
        differs(&whole, &wrong, None, &format!("{tensor} of rank {rank} in reverse"));
        // As if it were one layer.
        let (dim, length) = (slices[0].dim, slices.iter().map(|s| s.range.len()).sum::<usize>());
        let size = whole.spec.tensor(&plan.tensors[cut].name).unwrap().shape[dim];
        let start = (rank * length).min(size - length);
        let mut wrong = plan.clone();
        wrong.tensors[cut].slices = vec![Slice { dim, range: Span::new(start, start + length) }];
        differs(&whole, &wrong, None, &format!("{tensor} of rank {rank} in one piece"));
    }
}

#[test]
fn a_cut_inside_a_group_is_seen() {
    // The columns of ranks 0 and 1 meet inside a group, and the scales of the last matrix, of which there is
    // one a group, stay where they were.
    for (name, by) in [("fp8", 1), ("awq", 8), ("gptq", 8)] {
        let whole = Whole::of(toy(name));
        let plan = Planner::new(&whole.spec).plan(2).unwrap();
        let mut wrong = plan.clone();
        for t in wrong.tensors.iter_mut().filter(|t| t.name.starts_with("model.layers.0.mlp.")) {
            let Some(Slice { dim, range }) = t.slices.first_mut() else { continue };
            let size = whole.spec.tensor(&t.name).unwrap().shape[*dim];
            let moved = by * size / plan.model.intermediate_size;
            if t.rank == 0 { range.end -= moved } else { range.start -= moved }
        }
        assert_ne!(wrong, plan);
        fails(&whole, &wrong, "a cut inside a group");
    }
}
