//! Explanations: what binds, what else there was, what notes cost. Figures are worked out by hand in the comments.

mod common;

use common::{model, plan};
use tensorwire_topology::plan::{Alternative, Explanation};
use tensorwire_topology::{ModelSpec, Plan, Planner};

fn explained(name: &str, world: usize) -> (Plan, Explanation) {
    let spec = model(name);
    let plan = plan(&spec, world);
    let why = Planner::new(&spec).explain(&plan).unwrap();
    (plan, why)
}

fn alternative<'a>(why: &'a Explanation, what: &str) -> &'a Alternative {
    why.alternatives
        .iter()
        .find(|a| a.what == what)
        .unwrap_or_else(|| panic!("no {what}: {:#?}", why.alternatives))
}

#[test]
fn other_numbers_of_ranks_cost_what_their_plans_say() {
    let (chosen, why) = explained("llama-3.1-8b", 3);
    let limit = why.limit.as_ref().unwrap();
    assert_eq!((limit.constraint.as_str(), limit.size, limit.most_ranks), ("num_attention_heads", 32, 32));
    for world in 1..=8 {
        let other = plan(&model("llama-3.1-8b"), world);
        let said = alternative(&why, &format!("tp {world}"));
        assert_eq!(said.chosen, world == 3);
        assert_eq!(said.decode_us_per_token, Some(other.predicted.decode_us_per_token));
        assert_eq!(said.comm_us_per_token, Some(other.predicted.comm_us_per_token));
        assert_eq!(said.weight_bytes, other.ranks.iter().map(|r| r.weight_bytes).max());
        assert_eq!(said.kv_bytes_per_token, other.ranks.iter().map(|r| r.kv_bytes_per_token).max());
    }
    assert_eq!(why.alternatives.iter().filter(|a| a.chosen).count(), 1);
    assert!(alternative(&why, "tp 2").why.starts_with("slower, 1.47 x"), "938.1 / 2 over 320.0 ms");
    // Reading is what takes the time: the 5.47 GB of rank 0.
    assert!(why.binding.starts_with("reading weights, 100%") && why.binding.contains("(rank 0, 5466.0 MB)"));

    // Three stages hold a third of the weights each, and a token still passes all: as on one rank, and twice a row
    // of 8192 bytes, 2 + 8192/8000 us.
    let (one, stages) = (alternative(&why, "tp 1"), alternative(&why, "3 pipeline stages"));
    let hops = stages.decode_us_per_token.unwrap() - one.decode_us_per_token.unwrap();
    assert!((hops - 2.0 * (2.0 + 8192.0 / 8000.0)).abs() < 0.01, "{hops}");
    assert_eq!(stages.weight_bytes, one.weight_bytes.map(|b| b / 3));
    assert_eq!(alternative(&why, "3 copies").decode_us_per_token, one.decode_us_per_token);
    let none = alternative(&why, "expert parallel");
    assert_eq!((none.decode_us_per_token, none.why.as_str()), (None, "the model has no experts"));
    assert_eq!(chosen.predicted.decode_us_per_token, alternative(&why, "tp 3").decode_us_per_token.unwrap());
}

#[test]
fn experts_have_two_ways_and_the_limit_is_that_of_both() {
    // 1536 columns of each expert are 12 blocks of 128, so that 16 ranks share whole experts; of these there are 128,
    // and the 64 heads of 128 elements, which are a block each, run out first.
    let spec = model("qwen3-235b-a22b-fp8");
    let planner = Planner::new(&spec);
    let plan = planner.outline(16).unwrap();
    let why = planner.explain(&plan).unwrap();
    let limit = why.limit.as_ref().unwrap();
    assert_eq!((limit.constraint.as_str(), limit.size, limit.most_ranks), ("num_attention_heads", 64, 64));
    assert!(alternative(&why, "tp 16").chosen);
    let columns = alternative(&why, "experts' columns shared");
    assert_eq!(
        (columns.decode_us_per_token, columns.why.as_str()),
        (None, "moe_intermediate_size = 12 groups of 128")
    );
}

#[test]
fn padded_heads_are_whole_groups_a_rank() {
    // 8 groups over 3 ranks: 9 groups of 4, 3 a rank, 12 query heads as the largest share has now. A query head
    // is 128 rows of q and 128 columns of o, a key/value head 128 rows of k and of v, of 4096 elements of 2 bytes
    // in 32 layers, 67,108,864 bytes either way: four query heads and one key/value head more.
    let (plan, why) = explained("llama-3.1-8b", 3);
    let padded = alternative(&why, "pad to 36 query heads");
    assert_eq!(padded.decode_us_per_token, Some(plan.predicted.decode_us_per_token));
    assert!(padded.why.contains("as fast; 335.5 MB of weights more in all"), "{}", padded.why);

    // Qwen 7B over 8: 4 groups of 7, two ranks a group: 4 heads each, 32 in all.
    let (_, why) = explained("qwen2.5-7b", 8);
    assert!(alternative(&why, "pad to 32 query heads").why.starts_with("as fast"));

    // Over 6, no group can be on two ranks if each rank has heads of one alone: 7 each, 42 in all.
    let (_, why) = explained("qwen2.5-7b", 6);
    assert!(alternative(&why, "pad to 42 query heads").why.starts_with("slower"));

    // Llama 70B over 6: 8 groups of 8, so 2 groups each, 16 heads, 96 in all, while the largest share now is 11 heads of 2 groups. 5 heads of 2 * 128 * 8192 * 2 bytes in 80 layers more
    // to read, 1677.7 MB at 16 GB/s.
    let (plan, why) = explained("llama-3.1-70b", 6);
    let more = alternative(&why, "pad to 96 query heads").decode_us_per_token.unwrap()
        - plan.predicted.decode_us_per_token;
    assert!((more - 5.0 * 2.0 * 128.0 * 8192.0 * 2.0 * 80.0 / 16_000.0).abs() < 1.0, "{more}");

    // What divides needs no padding.
    let (_, why) = explained("llama-3.1-8b", 8);
    assert!(!why.alternatives.iter().any(|a| a.what.starts_with("pad")));
}

#[test]
fn notes_have_their_costs() {
    for (name, world) in
        [("llama-3.1-70b", 3), ("qwen2.5-7b", 7), ("smollm2-135m", 2), ("all-minilm-l6-v2", 5)]
    {
        let (plan, why) = explained(name, world);
        assert_eq!(
            why.notes.iter().map(|n| &n.note).collect::<Vec<_>>(),
            plan.notes.iter().collect::<Vec<_>>()
        );
    }
    let (_, why) = explained("llama-3.1-70b", 3);
    let note = |words: &str| why.notes.iter().find(|n| n.note.contains(words)).unwrap();
    // Two copies of a head of k and v: 2 * 2 * 128 * 8192 elements of 2 bytes in 80 layers, and 2 * 2 * 128
    // elements of 2 bytes in 80 layers a token.
    let copies = note("on more than one rank");
    assert_eq!((copies.weight_bytes, copies.kv_bytes_per_token), (671_088_640, 81_920));
    assert!((copies.us_per_token - 671_088_640.0 / 3.0 / 16_000.0).abs() < 1.0);
    // 161 norms of 8192 elements of 2 bytes, on two ranks besides the first.
    assert_eq!(note("norms").weight_bytes, 2 * 161 * 8192 * 2);
    // Where the predictions come from costs nothing.
    let free = note("predicted times are from");
    assert_eq!((free.weight_bytes, free.kv_bytes_per_token, free.us_per_token), (0, 0, 0.0));
}

#[test]
fn a_small_model_waits_for_its_exchanges() {
    let config = r#"{"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 8,
        "intermediate_size": 32, "vocab_size": 64}"#;
    let spec = ModelSpec::from_config(config).unwrap();
    let planner = Planner::new(&spec);
    let why = planner.explain(&planner.plan(8).unwrap()).unwrap();
    assert!(why.binding.starts_with("exchanges, "), "{}", why.binding);
    assert!(alternative(&why, "tp 1").why.starts_with("faster"));
    assert_eq!(alternative(&why, "8 pipeline stages").why, "the model has 2 layers");
    assert!(planner.explain(&planner.plan(1).unwrap()).unwrap().text().contains("this plan"));
}

#[test]
fn what_is_refused_has_a_way_out() {
    let spec = model("llama-3.1-8b");
    let planner = Planner::new(&spec);
    assert_eq!(planner.instead_of(32), None);
    assert_eq!(planner.instead_of(0), None);
    let line = planner.instead_of(40).unwrap();
    // 40 = 20 x 2, the largest legal divisor; 40 heads are a quarter more than 32.
    for words in ["tp 32 ", "tp 20 in 2 pipeline stages ", "num_attention_heads padded to 40", "25% more"] {
        assert!(line.contains(words), "{words}: {line}");
    }
    assert!(!line.contains('\n'));
}

#[test]
fn the_text_fits_a_terminal_and_the_json_has_it_all() {
    for (name, world) in
        [("llama-3.1-8b", 1), ("llama-3.1-70b", 6), ("llama-3.1-70b", 64), ("all-minilm-l6-v2", 5)]
    {
        let (plan, why) = explained(name, world);
        let text = plan.summary_with(&why);
        for line in text.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
        let plain: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for note in &plan.notes {
            assert!(plain.contains(note), "{note}");
        }
        let json = plan.to_json_with(&why);
        assert_eq!(Plan::from_json(&json).unwrap(), plan);
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(serde_json::from_value::<Explanation>(value["explain"].clone()).unwrap(), why);
    }
    // Of 64 numbers of ranks a person sees a few.
    let (_, why) = explained("llama-3.1-70b", 64);
    let shown = why.text().lines().filter(|l| l.starts_with("  tp ")).count();
    assert!((7..=12).contains(&shown), "{shown}");
}
