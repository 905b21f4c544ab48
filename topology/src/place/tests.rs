//! Golden cases, with the answers reasoned out, and properties.

use proptest::prelude::*;

use super::arrange::{Arranger, Task};
use super::search::search;
use super::workload::{Attention, Block, Exchange, Keys, Kind, Part, Split, Work, Workload};
use super::{
    Alternative, Degrees, Goal, Machine, Placement, Portion, RankPlace, Reason, Request, alternative, place,
};
use crate::fabric::{self, Class, Device, DeviceModel, Fabric, Host, Link, Parts, Tflops};
use crate::{Error, ModelSpec};

/// A decoder as Llama's: bf16, an output head of its own.
fn llama(layers: usize, hidden: u64, heads: [usize; 2], ffn: u64, vocab: u64) -> Workload {
    let [q, kv] = heads;
    let head_dim = hidden / q as u64;
    let kv_width = 2 * kv as u64 * head_dim;
    let dense = |elements: u64| Work::dense(2 * elements, 2.0 * elements as f64);
    let attention = Part {
        cut: dense(2 * hidden * hidden),
        kv: dense(hidden * kv_width),
        whole: Work::dense(2 * hidden, 0.0),
        attention: Some(Attention {
            flops_per_pair: 4.0 * hidden as f64,
            keys: Keys::Causal { window: None },
            query_bytes: 2 * hidden,
            kv_bytes: 2 * kv_width,
            kv_whole: false,
        }),
        wide_bytes: 2 * (2 * hidden + kv_width),
        largest: [2 * hidden * hidden, 2 * hidden],
        after: Exchange::Sum,
        ..Part::new("attention", Split::Heads { q, kv })
    };
    let mlp = Part {
        cut: dense(3 * hidden * ffn),
        whole: Work::dense(2 * hidden, 0.0),
        wide_bytes: 4 * ffn,
        largest: [2 * hidden * ffn, 2 * hidden],
        after: Exchange::Sum,
        ..Part::new("mlp", Split::Columns { units: ffn as usize })
    };
    let rows = Split::Rows { rows: vocab as usize };
    let embedding = Part {
        cut: Work { bytes: 2 * vocab * hidden, ..Work::default() },
        largest: [2 * vocab * hidden, 0],
        after: Exchange::Sum,
        ..Part::new("embedding", rows)
    };
    let head = Part {
        cut: dense(vocab * hidden),
        largest: [2 * vocab * hidden, 0],
        after: Exchange::Gather { row_bytes: 2 * vocab },
        ..Part::new("head", rows)
    };
    let block = |name: &str, parts| Block { name: name.to_owned(), parts };
    Workload {
        name: "llama".to_owned(),
        kind: Kind::Decoder,
        bits: 16,
        stream_bytes: 2 * hidden,
        blocks: vec![
            block("embedding", vec![embedding]),
            block("layer", vec![attention, mlp]),
            block("head", vec![head]),
        ],
        order: [vec![0], vec![1; layers], vec![2]].concat(),
        tied_bytes: 0,
    }
}

fn llama_8b() -> Workload {
    llama(32, 4096, [32, 8], 14336, 128_256)
}

/// `hosts` hosts of `per_host` devices, which share a NUMA node, and a network interface for each.
fn cluster(hosts: u32, per_host: u32) -> Fabric {
    cluster_of(hosts, per_host, 80, [(3.0, 300.0), (10.0, 50.0)])
}

fn cluster_of(hosts: u32, per_host: u32, gib: u64, links: [(f64, f64); 2]) -> Fabric {
    let gpu = DeviceModel {
        memory_gbps: Some(3000.0),
        tflops: Tflops { f16: Some(900.0), ..Tflops::default() },
        ..DeviceModel::new("gpu", fabric::Kind::Gpu, Some(gib << 30))
    };
    let nic = |n| fabric::Nic { name: format!("nic{n}"), ..serde_json::from_str(r#"{"name": ""}"#).unwrap() };
    let host = |h| Host { nics: (0..per_host).map(nic).collect(), ..Host::new(format!("host{h}")) };
    let device = |h: u32, d: u32| Device { numa: Some(0), ..Device::new(format!("host{h}.{d}"), h, 0) };
    let [near, far] = links.map(|(alpha, gbps)| Link::rated(alpha, gbps));
    Fabric::new(Parts {
        name: "cluster".to_owned(),
        models: vec![gpu],
        hosts: (0..hosts).map(host).collect(),
        devices: (0..hosts).flat_map(|h| (0..per_host).map(move |d| device(h, d))).collect(),
        links: [(Class::Numa, near), (Class::Network, far)].into(),
        pairs: vec![],
    })
    .unwrap()
}

fn machine(fabric: &Fabric) -> Machine {
    Machine::of(fabric, &fabric.workers(), 16).0
}

/// Cosmos-Predict1-7B's diffusion transformer: 28 blocks of self-attention, cross-attention to 512 x 1024 text states
/// and a GELU layer; hidden 4096, 32 heads, 16384 columns; 424,642,560 parameters that are whole on every rank.
fn dit() -> Workload {
    let hidden = 4096u64;
    let square = hidden * hidden;
    let dense = |elements: u64| Work::dense(2 * elements, 2.0 * elements as f64);
    let attention = |keys| Attention {
        flops_per_pair: 4.0 * hidden as f64,
        keys,
        query_bytes: 2 * hidden,
        kv_bytes: 4 * hidden,
        kv_whole: false,
    };
    let heads = Split::Heads { q: 32, kv: 32 };
    let own = Part {
        cut: dense(2 * square),
        kv: dense(2 * square),
        attention: Some(attention(Keys::All)),
        wide_bytes: 8 * hidden,
        largest: [2 * square, 0],
        after: Exchange::Sum,
        ..Part::new("attn1", heads)
    };
    let of_text = 2 * hidden * 1024;
    let text_flops = 2.0 * of_text as f64 * 512.0;
    let cross = Part {
        cut: dense(2 * square),
        kv: Work { flops_per_token: 0.0, flops_per_sequence: text_flops, ..dense(of_text) },
        attention: Some(attention(Keys::Other { tokens: 512 })),
        wide_bytes: 4 * hidden,
        largest: [2 * square, 0],
        after: Exchange::Sum,
        ..Part::new("attn2", heads)
    };
    let ff = Part {
        cut: dense(8 * square),
        wide_bytes: 8 * hidden,
        largest: [8 * square, 0],
        after: Exchange::Sum,
        ..Part::new("ff", Split::Columns { units: 16384 })
    };
    let outside = Part { whole: Work::dense(2 * 424_642_560, 0.0), ..Part::new("outside", Split::Whole) };
    let block = |name: &str, parts| Block { name: name.to_owned(), parts };
    Workload {
        name: "dit".to_owned(),
        kind: Kind::Forward { branches: 2, latent_bytes: 7_208_960 },
        bits: 16,
        stream_bytes: 2 * hidden,
        blocks: vec![block("outside", vec![outside]), block("layer", vec![own, cross, ff])],
        order: [vec![0], vec![1; 28]].concat(),
        tied_bytes: 0,
    }
}

/// One of the presets in `examples/fabrics`.
fn preset(name: &str) -> Fabric {
    let path = format!("{}/../examples/fabrics/{name}.toml", env!("CARGO_MANIFEST_DIR"));
    Fabric::from_toml(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn video() -> Request {
    Request { context: 56_320, ..Request::default() }
}

fn alternative_of(fabric: &Fabric, degrees: Degrees) -> Alternative {
    alternative(&dit(), fabric, &video(), &degrees).unwrap()
}

fn tp(tp: usize) -> Degrees {
    Degrees { tp, ..Degrees::ONE }
}

fn portion<'a>(a: &'a Alternative, of: &str) -> &'a Portion {
    a.predicted.step.iter().find(|p| p.of == of).unwrap()
}

#[test]
fn bytes_of_a_diffusion_step_follow_from_its_sums() {
    // 56,320 tokens x 4096 x 2 bytes are 461,373,440; three sums a block, 28 blocks, two passes: 168 all-reduces of
    // 2 (n-1)/n times that.
    let fabric = preset("8-accelerators");
    for (n, wire) in [(2, 77_510_737_920), (4, 116_266_106_880), (8, 135_643_791_360)] {
        let a = alternative_of(&fabric, tp(n));
        assert_eq!(
            (a.predicted.wire_bytes_per_rank_step, portion(&a, "tp").wire_bytes),
            (wire, wire),
            "tp {n}"
        );
    }
    // With guidance divided, half as many sums, and the latent of 16 x 16 x 88 x 160 x 2 bytes once.
    let a = alternative_of(&fabric, Degrees { cfg: 2, ..tp(4) });
    assert_eq!(portion(&a, "tp").wire_bytes, 58_133_053_440);
    assert_eq!(portion(&a, "cfg").wire_bytes, 7_208_960);
    // Ulysses: q, k, v and the result of a rank's n-th of the tokens, of which the n-th part stays: 4 (n-1)/n^2 of
    // 461,373,440, in 28 self-attentions and two passes. Whole weights: 2 x 7,236,192,256 bytes.
    for (n, wire) in [(4, 19_377_684_480), (8, 11_303_649_280)] {
        let a = alternative_of(&fabric, Degrees { cp: n, ..Degrees::ONE });
        assert_eq!(a.predicted.wire_bytes_per_rank_step, wire, "ulysses {n}");
        assert_eq!(a.tightest.of.weights, 14_472_384_512);
    }
}

#[test]
fn weights_of_a_diffusion_rank_are_its_share_and_all_that_is_not_shared() {
    // 2 x (6,811,549,696 / 4 + 424,642,560) bytes.
    assert_eq!(alternative_of(&preset("8-accelerators"), tp(4)).tightest.of.weights, 4_255_059_968);
}

#[test]
fn a_diffusion_pass_computes_what_its_products_and_its_attention_do() {
    // A token's products: 28 x 2 x (4 + 2 + 8) 4096^2 (the text's keys and values are made once); its attention
    // 28 x 4 x 4096 for each of 56,320 and 512 tokens. In all 2.2094e15, twice a step, at 32e6 operations a microsecond.
    let a = alternative_of(&preset("8-accelerators"), tp(1));
    let flops = portion(&a, "compute").us * 32e6 / 2.0;
    assert!((flops / 2.2094e15 - 1.0).abs() < 1e-3, "{flops}");
    // Alone on a device of 15.7 GiB: 14.47 GB of weights leave too little for 56,320 tokens' activations.
    assert!(a.tightest.needs_bytes > a.tightest.has_bytes.unwrap());
}

#[test]
fn sums_stay_on_a_card_and_guidance_goes_across() {
    // A step's sums move 58 GB a rank, and guidance 7 MB: so sums go over the nearest links and guidance over what
    // is left. Flat over two cards, sums take the links between them too.
    let fabric = preset("32-accelerators");
    let placement = place(&dit(), &fabric, &video()).unwrap();
    let card = |rank: &RankPlace| fabric.devices()[rank.device].card;
    assert_eq!(placement.chosen.degrees.cfg, 2);
    for rank in &placement.ranks {
        let same = |o: &&RankPlace| (o.tp, o.cp, o.pp) == (rank.tp, rank.cp, rank.pp) && o.cfg != rank.cfg;
        assert_ne!(card(rank), card(placement.ranks.iter().find(same).unwrap()));
    }
    // Of those whose weights are divided by four, the best has guidance across the cards too.
    let of_tp = |n: usize| placement.rejected.iter().map(|r| &r.alternative).find(|a| a.degrees.tp == n);
    let best = of_tp(4).unwrap();
    assert_eq!(best.degrees.cfg, 2, "{}", best.name);
    assert_eq!(portion(best, "tp").links.as_deref(), Some("card"));
    assert_ne!(portion(best, "cfg").links.as_deref(), Some("card"));
    let flat = placement.rejected.iter().find(|r| r.alternative.degrees == tp(8)).unwrap();
    assert!(matches!(&flat.reason, Reason::Slower { .. }), "{flat}");
    // On eight devices of the same cards, each computes an eighth: 17.26 s. Guidance across takes 84 sums of 461 MB on a
    // card, 2 x 3/4 of them at 24 GB/s: 2.42 s. Flat, 168 sums take that and a fourth of 461 MB between the cards at 12
    // GB/s: 38.4 ms each, 6.46 s. All at latencies of microseconds.
    let seconds = |d| alternative_of(&preset("8-accelerators"), d).predicted.step_us / 1e6;
    assert!((seconds(Degrees { cfg: 2, ..tp(4) }) - 19.7).abs() < 0.05);
    assert!((seconds(tp(8)) - 23.7).abs() < 0.05);
}

#[test]
fn one_device_may_win_and_it_is_said() {
    // A step of a small model reads 2 x 134.5e6 bytes at 3 TB/s: 90 us. Two devices would save half, and pay 61 sums at
    // 50 us.
    let small = llama(30, 576, [9, 3], 1536, 49_152);
    let fabric = cluster_of(1, 8, 80, [(50.0, 20.0), (50.0, 20.0)]);
    let placement = place(&small, &fabric, &Request::default()).unwrap();
    assert_eq!(placement.chosen.degrees, Degrees::ONE);
    assert!(placement.notes[0].starts_with("one device is best"), "{:?}", placement.notes);
    let two = placement.rejected.iter().find(|r| r.alternative.degrees == tp(2)).unwrap();
    let Reason::Slower { because, .. } = &two.reason else { panic!("{two}") };
    assert_eq!(because, "tp exchanges over numa links");
}

#[test]
fn more_devices_win_where_links_are_fast() {
    // 16 GB read at 3 TB/s are 5.4 ms; eight devices read an eighth, and 65 sums of 8 KiB take 65 x 3.2 us.
    let placement = place(&llama_8b(), &cluster(1, 8), &Request::default()).unwrap();
    assert_eq!(placement.chosen.degrees.tp, 8);
    let step = placement.chosen.predicted.step_us;
    assert!((700.0..1100.0).contains(&step), "{step}");
}

#[test]
fn a_model_that_fits_nowhere_is_refused_with_the_numbers() {
    // 141 GB of weights on two devices of 8 GiB: half each lacks most.
    let big = llama(80, 8192, [64, 8], 28672, 128_256);
    let error =
        place(&big, &cluster_of(1, 2, 8, [(3.0, 300.0); 2]), &Request::default()).unwrap_err().to_string();
    assert!(
        error.contains("doesn't fit on 2 devices") && error.contains("has 8589.9 MB and needs"),
        "{error}"
    );
    assert!(error.contains("weights"), "{error}");
}

#[test]
fn a_context_that_does_not_fit_is_divided_or_refused() {
    // 8 kv heads x 128 x 2 x 2 bytes x 32 layers: 131,072 bytes a token, 137 GB for 2^20 tokens. One device of 80 GiB is
    // too small, two are enough for that and 16 GB of weights.
    let request = Request { context: 1 << 20, ..Request::default() };
    let fabric = cluster(1, 8);
    let alone = alternative(&llama_8b(), &fabric, &request, &Degrees::ONE).unwrap();
    assert_eq!(alone.tightest.of.kv_cache, 131_072 << 20);
    assert!(alone.tightest.needs_bytes > alone.tightest.has_bytes.unwrap());
    let two = alternative(&llama_8b(), &fabric, &request, &tp(2)).unwrap();
    assert_eq!(two.tightest.of.kv_cache, 131_072 << 19);
    assert!(two.tightest.needs_bytes <= two.tightest.has_bytes.unwrap());
    let few = Request { devices: Some(vec![0]), ..request };
    assert!(place(&llama_8b(), &fabric, &few).is_err());
}

#[test]
fn nonsense_is_refused() {
    let fabric = cluster(1, 2);
    let refused = |request: Request| place(&llama_8b(), &fabric, &request).unwrap_err().to_string();
    assert_eq!(refused(Request { context: 0, ..Request::default() }), "the context is 0: give at least 1");
    assert_eq!(refused(Request { batch: 0, ..Request::default() }), "the batch is 0: give at least 1");
    assert!(refused(Request { batch: usize::MAX, ..Request::default() }).contains("more than the limit"));
    assert!(refused(Request { devices: Some(vec![7]), ..Request::default() }).contains("no such devices"));
    let many = Degrees { tp: 64, ..Degrees::ONE };
    let error = alternative(&llama_8b(), &fabric, &Request::default(), &many).unwrap_err().to_string();
    assert_eq!(error, "tp 64 needs 64 devices with a path between them");
}

#[test]
fn islands_without_a_path_are_never_crossed() {
    // Two hosts, as they are but for the network.
    let fabric = cluster(2, 2);
    let mut machine = machine(&fabric);
    machine.levels.retain(|l| !l.network);
    let task = Task { workload: &llama_8b(), machine: &machine, goal: Goal::Decode, context: 2048, batch: 4 };
    let found = search(task);
    assert!(found.tried.iter().all(|t| t.degrees.ranks() / t.degrees.dp <= 2));
    let best = found.best.unwrap();
    assert_eq!((best.degrees.tp, best.degrees.dp), (2, 2));
}

#[test]
fn shares_follow_speed() {
    // The second device reads half as fast, so it takes a third: of the columns 9558 and 4778, and of 8 groups of heads 6
    // and 2, as a sixth costs the first as much as a third the second.
    let mut parts = cluster(1, 2).into_parts();
    let slow = DeviceModel { name: "slow".to_owned(), memory_gbps: Some(1500.0), ..parts.models[0].clone() };
    parts.models.push(slow);
    parts.devices[1].model = 1;
    let fabric = Fabric::new(parts).unwrap();
    let placement = place(&llama_8b(), &fabric, &Request::default()).unwrap();
    assert_eq!(placement.chosen.degrees.tp, 2);
    let speeds: Vec<f64> = placement.ranks.iter().map(|r| r.speed).collect();
    assert_eq!(speeds, [1.0, 0.5]);
    let [fast, slow] = [0, 1].map(|r| placement.ranks[r].memory.weights as f64);
    assert!((2.0..2.3).contains(&(fast / slow)), "{}", fast / slow);
    // Even shares would take as long as the slow device with a half.
    let even = alternative(&llama_8b(), &cluster(1, 2), &Request::default(), &tp(2)).unwrap();
    assert!(placement.chosen.predicted.step_us < 1.5 * even.predicted.step_us);
}

#[test]
fn a_thousand_devices_take_a_few_thousand_states() {
    // What is tried doesn't grow with devices but with the powers of two that they allow; replicas that are alike cost
    // once. A search takes about as long as its states, so this bounds it without a clock.
    let workload = llama(80, 8192, [64, 8], 28672, 128_256);
    let machine = machine(&cluster(128, 8));
    for (goal, states) in [(Goal::Decode, 5000), (Goal::Prefill, 6000), (Goal::Memory, 5000)] {
        let task = Task { workload: &workload, machine: &machine, goal, context: 8192, batch: 256 };
        let found = search(task);
        assert!(found.tried.len() < states, "{goal:?}: {}", found.tried.len());
        let best = found.best.unwrap();
        assert_eq!(best.lacks(&machine), 0);
        if goal == Goal::Decode {
            // Sums of 8 sequences are small: they cross hosts only if that pays, and all devices read.
            assert_eq!(best.degrees.ranks(), 1024);
        }
    }
}

#[test]
fn what_an_arrangement_costs_does_not_depend_on_what_was_tried_before() {
    // Experts whole, by columns, over groups and over several data-parallel ranks lie on the same devices.
    let spec = ModelSpec::from_config(
        r#"{"model_type": "mixtral", "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2,
            "vocab_size": 32000, "torch_dtype": "bfloat16"}"#,
    )
    .unwrap();
    let workload = Workload::of(&spec);
    // The last host is slower, so that replicas differ.
    let mut parts = cluster(3, 4).into_parts();
    parts.models.push(DeviceModel {
        name: "slow".into(),
        memory_gbps: Some(2000.0),
        ..parts.models[0].clone()
    });
    parts.devices[8..].iter_mut().for_each(|device| device.model = 1);
    let machine = machine(&Fabric::new(parts).unwrap());
    let task = Task { workload: &workload, machine: &machine, goal: Goal::Decode, context: 2048, batch: 12 };
    let found = search(task);
    assert!(found.tried.iter().any(|t| t.degrees.sharing_experts() > 1 && t.degrees.etp > 1));
    for tried in &found.tried {
        let alone = Arranger::new(task).arrange(&tried.degrees).unwrap();
        let (cost, lacks) = (alone.cost(task.goal), alone.lacks(&machine));
        assert_eq!(
            (tried.cost, tried.lacks, tried.peak),
            (cost, lacks, alone.peak_bytes()),
            "{}",
            tried.degrees
        );
    }
}

/// Every block of each replica is on one stage, and every rank has a device of its own and its memory.
fn check(placement: &Placement, workload: &Workload, fabric: &Fabric) {
    let d = placement.chosen.degrees;
    assert_eq!(placement.ranks.len(), d.ranks());
    let mut devices: Vec<usize> = placement.ranks.iter().map(|r| r.device).collect();
    devices.sort_unstable();
    devices.dedup();
    assert_eq!(devices.len(), d.ranks(), "a device for each rank");
    let mut covered = vec![0; workload.order.len()];
    for rank in &placement.ranks {
        let has = fabric.model(rank.device).memory_bytes.unwrap();
        assert!(rank.peak_bytes <= has, "rank {} needs {} of {has}", rank.rank, rank.peak_bytes);
        (rank.blocks.start..rank.blocks.end).for_each(|b| covered[b] += 1);
    }
    let times = d.ranks() / d.pp;
    assert!(covered.iter().all(|c| *c == times), "each block {times} times: {covered:?}");
    let sequences: usize = placement
        .ranks
        .iter()
        .filter(|r| (r.tp, r.cp, r.cfg, r.pp) == (0, 0, 0, 0))
        .map(|r| r.sequences)
        .sum();
    assert!(sequences >= placement.batch);
    for one in &placement.rejected {
        if let Reason::Memory { short_bytes } = one.reason {
            let tightest = &one.alternative.tightest;
            assert_eq!(tightest.needs_bytes - tightest.has_bytes.unwrap(), short_bytes);
        }
    }
}

fn goals() -> impl Strategy<Value = Goal> {
    prop_oneof![
        Just(Goal::Decode),
        Just(Goal::Prefill),
        Just(Goal::Memory),
        (0usize..512).prop_map(|new_tokens| Goal::Request { new_tokens })
    ]
}

prop_compose! {
    fn models()(layers in 1usize..24, groups in 1usize..5, kv in 1usize..9, ffn in 64u64..20_000, vocab in 500u64..50_000)
        -> Workload
    {
        let q = groups * kv;
        llama(layers, 128 * q as u64, [q, kv], ffn, vocab)
    }
}

prop_compose! {
    fn fabrics()(hosts in 1u32..4, per_host in 1u32..6, gib in 1u64..24, near in 1.0f64..400.0, far in 0.5f64..60.0,
        alpha in 0.5f64..40.0, slower in prop::option::of((0usize..4, 0.2f64..1.0))) -> Fabric
    {
        let fabric = cluster_of(hosts, per_host, gib, [(alpha, near), (3.0 * alpha, far.min(near))]);
        let Some((device, speed)) = slower else { return fabric };
        let mut parts = fabric.into_parts();
        let slow = DeviceModel {
            name: "slow".to_owned(),
            memory_gbps: Some(3000.0 * speed),
            tflops: Tflops { f16: Some(900.0 * speed), ..Tflops::default() },
            ..parts.models[0].clone()
        };
        parts.models.push(slow);
        if let Some(device) = parts.devices.get_mut(device) {
            device.model = 1;
        }
        Fabric::new(parts).unwrap()
    }
}

/// The same machine with everything better: faster links and devices, and more memory.
fn better(fabric: &Fabric, by: f64) -> Fabric {
    let mut parts = fabric.clone().into_parts();
    for model in &mut parts.models {
        model.memory_gbps = model.memory_gbps.map(|g| g * by);
        model.tflops.f16 = model.tflops.f16.map(|t| t * by);
        model.memory_bytes = model.memory_bytes.map(|b| (b as f64 * by) as u64);
    }
    for link in parts.links.values_mut() {
        *link = Link::rated(link.alpha_us / by, link.gbps * by);
    }
    Fabric::new(parts).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn placements_keep_their_promises(
        workload in models(), fabric in fabrics(), goal in goals(), context in 1usize..9000, batch in 1usize..40,
        by in 1.0f64..3.0,
    ) {
        let request = Request { goal, context, batch, devices: None };
        let placed = place(&workload, &fabric, &request);
        let improved = place(&workload, &better(&fabric, by), &request);
        match placed {
            Ok(placement) => {
                check(&placement, &workload, &fabric);
                let again = place(&workload, &fabric, &request).unwrap();
                prop_assert_eq!(serde_json::to_string(&placement).unwrap(), serde_json::to_string(&again).unwrap());
                let cost = |p: &Placement| match goal {
                    Goal::Decode => p.chosen.predicted.step_us,
                    Goal::Prefill => p.chosen.predicted.prefill_us,
                    Goal::Memory => p.chosen.predicted.peak_bytes as f64,
                    Goal::Request { new_tokens } => {
                        p.chosen.predicted.prefill_us + new_tokens as f64 * p.chosen.predicted.step_us
                    }
                };
                let improved = improved.expect("what fits still does");
                // Times are rounded to nanoseconds, which a request adds up.
                prop_assert!(cost(&improved) <= cost(&placement) * (1.0 + 1e-9) + 1.0, "{} then {}",
                    placement.chosen.name, improved.chosen.name);
            }
            Err(error) => prop_assert!(matches!(error, Error::NoPlacement(_)), "{error}"),
        }
    }
}
