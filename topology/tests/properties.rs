//! What holds for every model and every number of ranks, checked without the planner's own checks.

mod common;

use std::ops::Range;

use common::toys::{FAMILIES, Toy};
use common::{lengths, pairs};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use serde_json::json;
use tensorwire_topology::model::Cut;
use tensorwire_topology::plan::{Plan, Span};
use tensorwire_topology::shard::{even, heads, kv_heads, vocab};
use tensorwire_topology::{Error, ModelSpec, Planner};

/// The same cases in each run.
fn cases(count: u32) -> ProptestConfig {
    ProptestConfig {
        cases: count,
        rng_seed: RngSeed::Fixed(20_050_219),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Every way to cut `size` into `parts` ranges that hold something.
fn partitions(size: usize, parts: usize) -> Vec<Vec<Range<usize>>> {
    fn extend(
        start: usize,
        size: usize,
        parts: usize,
        so_far: &mut Vec<Range<usize>>,
        all: &mut Vec<Vec<Range<usize>>>,
    ) {
        if parts == 0 {
            if start == size {
                all.push(so_far.clone());
            }
            return;
        }
        for end in start + 1..=size {
            so_far.push(start..end);
            extend(end, size, parts - 1, so_far, all);
            so_far.pop();
        }
    }
    let mut all = Vec::new();
    extend(0, size, parts, &mut Vec::new(), &mut all);
    all
}

/// 1.15 times the mean, or as many as some rank must have.
fn largest_share(heads: usize, world: usize) -> usize {
    heads.div_ceil(world).max((1.15 * heads as f64 / world as f64 + 1e-9) as usize)
}

#[test]
fn heads_are_the_best_of_all_partitions() {
    // Every number of ranks for few heads, and few ranks for so many heads that 1.15 times the mean allows
    // more than the evenest shares.
    let sizes = (1..=12usize).map(|h| (h, h)).chain([16, 18, 24, 28, 32, 40].map(|h| (h, 4)));
    for (q_heads, most_ranks) in sizes {
        for kv in (1..=q_heads).filter(|k| q_heads.is_multiple_of(*k)) {
            for world in 1..=most_ranks {
                // The rule, word for word, over every partition there is. A rank's key/value heads are those
                // that one of its query heads reads: another one wherever a group starts.
                let group = q_heads / kv;
                let held =
                    |r: &Range<usize>| 1 + (r.start + 1..r.end).filter(|q| q.is_multiple_of(group)).count();
                let rank_of = |cuts: &Vec<Range<usize>>| {
                    let slowest = cuts.iter().map(|r| r.len() + 2 * held(r)).max();
                    let copies = cuts.iter().map(held).sum::<usize>() - kv;
                    let squares: usize = cuts.iter().map(|r| r.len() * r.len()).sum();
                    let order: Vec<_> = cuts.iter().map(|r| std::cmp::Reverse(r.len())).collect();
                    (slowest, copies, squares, order)
                };
                let fits =
                    |cuts: &Vec<Range<usize>>| cuts.iter().all(|r| r.len() <= largest_share(q_heads, world));
                let all = partitions(q_heads, world).into_iter().filter(fits);
                let best = all.min_by_key(rank_of).unwrap();
                let found = heads(q_heads, kv, world).unwrap();
                assert_eq!(
                    lengths(&found.q),
                    best.iter().map(|r| r.len()).collect::<Vec<_>>(),
                    "{q_heads} query and {kv} key/value heads over {world}"
                );
                assert_eq!(found.duplicated_kv_heads(), rank_of(&best).1);
            }
        }
    }
}

#[test]
fn heads_of_known_awkward_ratios() {
    let shares = |h, k, n| lengths(&heads(h, k, n).unwrap().q);
    assert_eq!(shares(9, 3, 2), [5, 4]);
    // The middle cut is between the two groups: no rank has two.
    assert_eq!(shares(14, 2, 4), [4, 3, 4, 3]);
    assert_eq!(shares(28, 4, 7), [4; 7]);
    // A group a head, so every cut is free: plainly even, at 3 + 2 * 3 = 9.
    assert_eq!(shares(12, 12, 5), [3, 3, 2, 2, 2]);
    // One key/value head for all (multi-query): every cut is inside its group, so shares are plainly even.
    assert_eq!(shares(71, 1, 2), [36, 35]);
    assert_eq!(shares(71, 1, 8), [9, 9, 9, 9, 9, 9, 9, 8]);
    assert_eq!(shares(71, 1, 4), [18, 18, 18, 17]);
    // 8 each would be even, but the second rank would have heads 8 to 15, of the groups 2 to 5 of three heads
    // each: 8 + 2 * 4 = 16. Whole groups cost 9 + 2 * 3 = 15 (and 9 is within 1.15 * 8 = 9.2), without
    // copies.
    assert_eq!(shares(48, 16, 6), [9, 9, 9, 9, 6, 6]);
    assert_eq!(pairs(&heads(71, 1, 4).unwrap().kv), [[0, 1]; 4]);
    assert!((0..4).all(|r| heads(71, 1, 4).unwrap().shares_kv(r)));
    // A cut on each group boundary is worth a share of 1: any other way needs another copy.
    assert_eq!(shares(9, 3, 4), [3, 3, 2, 1]);
    // Exactly one rank between two boundaries shares nothing.
    let mixed = heads(9, 3, 4).unwrap();
    assert_eq!((0..4).map(|r| mixed.shares_kv(r)).collect::<Vec<_>>(), [false, false, true, true]);
}

#[test]
fn many_heads_and_ranks_are_no_work() {
    // The largest sizes there are, at the ratios with the most choices.
    let sizes = [
        (4096, 1, 2000),
        (4096, 4096, 2049),
        (4096, 2048, 3000),
        (4096, 512, 3),
        (4096, 16, 100),
        (4095, 65, 63),
        (4096, 512, 4095),
        (4096, 64, 4096),
        (512, 8, 511),
    ];
    for (h, k, n) in sizes {
        let found = heads(h, k, n).unwrap();
        assert_eq!(found.q.len(), n);
        assert!(lengths(&found.q).into_iter().max() <= Some(largest_share(h, n)));
        assert_eq!(lengths(&found.q).iter().sum::<usize>(), h);
    }
}

#[test]
fn a_vocabulary_is_padded_up_to_a_share_of_1_03_times_the_mean() {
    // Both round up to 2048 = 32 * 64: 2048 / 1990 = 1.0291, 2048 / 1985 = 1.0317.
    assert_eq!(vocab(1990, 2).unwrap().padded, 2048);
    assert_eq!(vocab(1985, 2).unwrap().padded, 1985);
    // lcm(64, 127) = 8128, and 41 * 8128 is only 1.025 times 40 * 8128 + 1. But in shares of 41 * 64 the last
    // three ranks would have no row.
    assert_eq!(vocab(40 * 8128 + 1, 127).unwrap().padded, 40 * 8128 + 1);
}

#[test]
fn what_cannot_be_shared_is_refused_with_a_way_out() {
    assert!(matches!(heads(12, 12, 0), Err(Error::NoRanks)));
    assert!(matches!(heads(14, 4, 2), Err(Error::HeadGroups { q_heads: 14, kv_heads: 4 })));
    assert!(matches!(heads(4, 8, 2), Err(Error::HeadGroups { .. })));
    assert!(matches!(heads(4, 0, 2), Err(Error::HeadGroups { .. })));
    assert!(matches!(heads(1 << 20, 1, 2), Err(Error::TooLarge { .. })));
    let text = heads(12, 12, 13).unwrap_err().to_string();
    for part in
        ["13 ranks", "num_attention_heads = 12", "nearest legal number of ranks is 12", "data parallel"]
    {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    assert!(matches!(
        even("groups", 3, 4),
        Err(Error::TooManyRanks { constraint: "groups", nearest: 3, .. })
    ));
    assert!(matches!(even("groups", 3, 0), Err(Error::NoRanks)));
    assert!(matches!(vocab(63, 64), Err(Error::TooManyRanks { constraint: "vocab_size", nearest: 63, .. })));
}

fn assert_partition(spans: &[Span], size: usize, world: usize) {
    assert_eq!(spans.len(), world);
    assert_eq!((spans[0].start, spans[world - 1].end), (0, size));
    assert!(spans.windows(2).all(|w| w[0].end == w[1].start));
    assert!(spans.iter().all(|s| s.start < s.end));
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn heads_are_balanced_with_the_kv_heads_they_read(k in 1usize..40, g in 1usize..20, n in 1usize..300) {
        let h = k * g;
        prop_assume!(n <= h);
        let shares = heads(h, k, n).unwrap();
        assert_partition(&shares.q, h, n);
        prop_assert!(lengths(&shares.q).into_iter().max() <= Some(largest_share(h, n)));
        // The slowest rank is no slower than with the evenest shares.
        let slowest = |q: &[Span]| q.iter().map(|q| q.len() + 2 * kv_heads(h, k, *q).len()).max();
        prop_assert!(slowest(&shares.q) <= slowest(&even("heads", h, n).unwrap()));
        for (rank, (q, kv)) in shares.q.iter().zip(&shares.kv).enumerate() {
            // Head by head: exactly the key/value heads of the query heads that are there.
            prop_assert_eq!((q.start / g, (q.end - 1) / g + 1), (kv.start, kv.end));
            let holds = |r: usize, head: usize| (shares.kv[r].start..shares.kv[r].end).contains(&head);
            let elsewhere = |head: usize| (0..n).any(|r| r != rank && holds(r, head));
            prop_assert_eq!(shares.shares_kv(rank), (kv.start..kv.end).any(elsewhere));
        }
        let held: usize = lengths(&shares.kv).iter().sum();
        prop_assert_eq!(shares.duplicated_kv_heads(), held - k);
        prop_assert_eq!(heads(h, k, n).unwrap(), shares);
    }

    #[test]
    fn the_kv_rule_holds_for_any_range(k in 1usize..64, g in 1usize..64, a in 0usize..4096, l in 1usize..64) {
        let h = k * g;
        let (a, b) = (a % h, (a % h + l).min(h));
        prop_assert_eq!(kv_heads(h, k, Span::new(a, b)), Span::new(a * k / h, (b - 1) * k / h + 1));
    }

    #[test]
    fn even_shares_differ_by_one_at_most(size in 1usize..1_000_000, n in 1usize..600) {
        prop_assume!(n <= size);
        let spans = even("things", size, n).unwrap();
        assert_partition(&spans, size, n);
        let lens = lengths(&spans);
        prop_assert!(lens.windows(2).all(|w| w[0] >= w[1]));
        prop_assert_eq!((lens[0], lens[n - 1]), (size.div_ceil(n), size / n));
    }

    #[test]
    fn vocabularies_are_padded_only_where_that_is_nearly_even(size in 1usize..400_000, n in 1usize..130) {
        prop_assume!(n <= size);
        let found = vocab(size, n).unwrap();
        assert_partition(&found.ranges, size, n);
        let largest = lengths(&found.ranges).into_iter().max().unwrap();
        if found.padded == size {
            prop_assert_eq!(largest, size.div_ceil(n));
        } else {
            prop_assert!(found.padded > size);
            prop_assert!(found.padded.is_multiple_of(64) && found.padded.is_multiple_of(n));
            prop_assert_eq!(largest, found.padded / n);
            prop_assert!(largest as f64 * n as f64 <= 1.03 * size as f64 + 1e-6);
        }
    }
}

/// Some model of any family, and a number of ranks. Sizes are small and awkward; some are quantised.
fn models() -> impl Strategy<Value = (ModelSpec, usize)> {
    let sizes = (1usize..6, 1usize..6, 1usize..9, 1usize..4, 1usize..200, 1usize..700);
    (sizes, 0usize..FAMILIES.len(), 1usize..7, 0usize..12, 0usize..10_000).prop_map(
        |((kv_heads, group, head_dim, layers, ffn, vocab), family, experts, variant, n)| {
            let toy = Toy { layers, kv_heads, group, head_dim, ffn, vocab, experts, variant };
            let mut config = toy.config(FAMILIES[family]);
            let quantised = match n % 7 {
                0 => {
                    Some(json!({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": n % 2 == 1}))
                }
                1 => Some(json!({"quant_method": "awq", "bits": 4, "group_size": 16})),
                2 => Some(json!({"quant_method": "fp8", "weight_block_size": [8, 16]})),
                3 => Some(json!({"quant_method": "mxfp4"})),
                _ => None,
            };
            if let Some(quantised) = quantised {
                config["quantization_config"] = quantised;
            }
            // Some layouts have no quantised form, and some parts don't begin where a scale does.
            let spec = ModelSpec::from_config(&config.to_string()).unwrap_or_else(|_| {
                ModelSpec::from_config(&toy.config(FAMILIES[family]).to_string()).unwrap()
            });
            let most = match Planner::new(&spec).outline(10_000) {
                Err(Error::TooManyRanks { nearest, .. }) => nearest,
                // Nothing of it is shared: any number of ranks will do.
                Ok(_) => 3,
                Err(e) => panic!("{e}"),
            };
            (spec, n % most + 1)
        },
    )
}

/// What notes call the key/value heads of this name.
fn label(name: &str) -> String {
    match name.split_once('.') {
        Some((stack, _)) => format!("{stack} key/value heads"),
        None => "key/value heads".to_owned(),
    }
}

/// Counts, for each element along the cut dimension, the ranks that hold it: element by element. With the ranks
/// that hold any, and which elements those are.
fn holders(plan: &Plan, name: &str, shape: &[usize]) -> (Vec<usize>, Vec<(usize, Vec<usize>)>) {
    let shards: Vec<_> = (0..plan.world).filter_map(|r| plan.tensor(name, r)).collect();
    let dim = shards[0].slices.first().map_or(0, |s| s.dim);
    // A number alone has one element.
    let along = shape.get(dim).copied().unwrap_or(1);
    let mut count = vec![0; along];
    let mut held = Vec::new();
    for shard in shards {
        assert!(shard.slices.iter().all(|s| s.dim == dim), "{name}: {:?}", shard.slices);
        let own: Vec<usize> = match shard.slices.as_slice() {
            [] => (0..along).collect(),
            ranges => ranges.iter().flat_map(|s| s.range.start..s.range.end).collect(),
        };
        own.iter().for_each(|&i| count[i] += 1);
        held.push((shard.rank, own));
    }
    (count, held)
}

proptest! {
    #![proptest_config(cases(192))]

    #[test]
    fn every_element_is_somewhere_and_twice_only_where_that_is_said((spec, world) in models()) {
        let plan = Planner::new(&spec).plan(world).unwrap();
        let mut bytes = vec![0; world];
        for tensor in &spec.tensors {
            let (count, held) = holders(&plan, &tensor.name, &tensor.shape);
            prop_assert!(count.iter().all(|c| *c > 0), "{}: {:?}", tensor.name, count);
            for (rank, own) in held {
                let shared = own.iter().any(|&i| count[i] > 1);
                let declared = plan.tensor(&tensor.name, rank).unwrap().replicated;
                prop_assert_eq!(declared, shared, "{}", &tensor.name);
                bytes[rank] += tensor.bytes() / count.len() as u64 * own.len() as u64;
            }
        }
        prop_assert_eq!(plan.ranks.iter().map(|r| r.weight_bytes).collect::<Vec<_>>(), bytes);
        plan.check(&spec).unwrap();
    }

    #[test]
    fn shares_are_as_even_as_can_be_and_every_unevenness_is_noted((spec, world) in models()) {
        let plan = Planner::new(&spec).plan(world).unwrap();
        let noted = |words: &str| plan.notes.iter().any(|n| n.contains(words));
        for (d, p) in spec.dims.iter().zip(&plan.dimensions) {
            let shares = lengths(&p.ranges);
            let (least, most) = (*shares.iter().min().unwrap(), *shares.iter().max().unwrap());
            let units = d.size.div_ceil(d.granule);
            match d.cut {
                _ if !p.shared => prop_assert!(shares.iter().all(|s| *s == d.size)),
                Cut::Heads { .. } => {
                    if d.granule == 1 {
                        prop_assert!(most <= largest_share(d.size, world));
                    }
                    prop_assert!(least == most || noted("query heads"));
                }
                Cut::KvHeads { .. } => {
                    let copied = noted(&format!("{} on more than one", label(&p.name)));
                    prop_assert_eq!(shares.iter().sum::<usize>() > d.size, copied);
                }
                Cut::Vocabulary => {
                    prop_assert_eq!(plan.vocab.padded > d.size, noted("vocabulary padded"));
                    prop_assert!(least == most || noted("vocabulary"));
                }
                // Columns and experts: as even as granules allow.
                _ => {
                    prop_assert!(most <= units.div_ceil(world) * d.granule);
                    prop_assert!(least == most || noted("are shared unevenly"), "{}", p.name);
                }
            }
        }
        for (layer, planned) in spec.layers.iter().zip(&plan.layers) {
            let sums: usize = layer.blocks.iter().map(|b| b.sums.len()).sum();
            let exchanges = planned.collectives.len();
            let expected = if world == 1 { exchanges == 0 } else { exchanges >= sums };
            prop_assert!(expected);
            // Every block that shares anything ends in a sum.
            prop_assert!(layer.blocks.iter().all(|b| !b.sums.is_empty()));
        }
        let whole = spec.tensors.iter().any(|t| !t.is_shared());
        prop_assert_eq!(world > 1 && whole, noted("whole on every rank: norms") || noted("whole on every rank: matr"));
        prop_assert!(plan.predicted.decode_us_per_token >= plan.predicted.comm_us_per_token);
        prop_assert_eq!(plan.predicted.comm_us_per_token > 0.0, world > 1 && !spec.dims.is_empty());
    }

    #[test]
    fn plans_are_the_same_each_time_and_survive_json((spec, world) in models()) {
        let plan = Planner::new(&spec).plan(world).unwrap();
        let json = plan.to_json();
        prop_assert_eq!(&json, &Planner::new(&spec).plan(world).unwrap().to_json());
        let read = Plan::from_json(&json).unwrap();
        prop_assert_eq!(&read, &plan);
        prop_assert_eq!(read.to_json(), json);
        prop_assert!(!plan.summary().is_empty());
    }
}
