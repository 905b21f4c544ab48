//! Configurations and plans that make no sense are errors that say what is wrong. Nothing panics.

mod common;

use common::toys::{FAMILIES, Toy};
use common::{fixture, model, plan};
use serde_json::{Value, json};
use tensorwire_core::DType;
use tensorwire_topology::model::{Architecture, RopeScaling};
use tensorwire_topology::plan::{Plan, Slice, Span};
use tensorwire_topology::{Error, ModelSpec, Planner};

fn base() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture("llama-3.1-8b")).unwrap()).unwrap()
}

/// The Llama configuration with one field replaced, or without it.
fn with(field: &str, value: Option<Value>) -> Result<ModelSpec, Error> {
    let mut config = base();
    match value {
        Some(value) => config[field] = value,
        None => drop(config.as_object_mut().unwrap().shift_remove(field)),
    }
    ModelSpec::from_config(&config.to_string())
}

fn refusal(field: &str, value: Value) -> String {
    with(field, Some(value)).unwrap_err().to_string()
}

#[test]
fn a_missing_field_is_named() {
    let needed = [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ];
    for field in needed {
        let text = with(field, None).unwrap_err().to_string();
        assert_eq!(text, format!("config.json: `{field}` is missing"));
        assert_eq!(refusal(field, Value::Null), text);
    }
}

#[test]
fn defaults_are_those_of_the_architecture() {
    let spec = |json: Value| ModelSpec::from_config(&json.to_string()).unwrap();
    let sizes = |model_type: &str| {
        json!({"model_type": model_type, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "intermediate_size": 96, "vocab_size": 100})
    };
    let llama = spec(sizes("llama"));
    assert_eq!((llama.num_key_value_heads, llama.head_dim, llama.max_position_embeddings), (4, 16, 2048));
    assert_eq!((llama.hidden_act.as_str(), llama.norm_eps, llama.dtype), ("silu", 1e-6, DType::F32));
    assert_eq!(
        llama.rope.as_ref().map(|r| (r.theta, r.scaling.clone())),
        Some((10_000.0, RopeScaling::None))
    );
    assert!(!llama.tie_word_embeddings && !llama.qkv_bias && !llama.attention_output_bias && !llama.mlp_bias);
    let qwen = spec(sizes("qwen2"));
    assert!(qwen.qkv_bias && !qwen.attention_output_bias && qwen.sliding_window.is_none());
    let bert = spec(sizes("bert"));
    assert_eq!((bert.architecture, bert.type_vocab_size, bert.norm_eps), (Architecture::Bert, 2, 1e-12));
    assert!(bert.qkv_bias && bert.mlp_bias && bert.rope.is_none() && bert.hidden_act == "gelu");

    // A head may be wider than its part of the hidden size.
    let mut wide = sizes("llama");
    wide["head_dim"] = json!(32);
    wide["attention_bias"] = json!(true);
    wide["mlp_bias"] = json!(true);
    let wide = spec(wide);
    let shape = |name: &str| wide.tensor(&format!("model.layers.1.{name}")).unwrap().shape.clone();
    assert_eq!(
        (shape("self_attn.q_proj.weight"), shape("self_attn.o_proj.weight")),
        (vec![128, 64], vec![64, 128])
    );
    assert_eq!((shape("self_attn.o_proj.bias"), shape("mlp.up_proj.bias")), (vec![64], vec![96]));
    plan(&wide, 3);
}

#[test]
fn newer_and_older_spellings_mean_the_same() {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let fields = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    let older = with("rope_scaling", Some(fields.clone())).unwrap().rope.unwrap();
    assert_eq!((older.theta, &older.scaling), (500_000.0, &llama3));
    let mut newer = fields;
    newer["rope_theta"] = json!(250_000.0);
    let newer = with("rope_parameters", Some(newer)).unwrap().rope.unwrap();
    assert_eq!((newer.theta, &newer.scaling), (250_000.0, &llama3));

    let scaling = |value: Value| with("rope_scaling", Some(value)).map(|s| s.rope.unwrap().scaling);
    assert_eq!(scaling(json!({"type": "linear", "factor": 2})).unwrap(), RopeScaling::Linear { factor: 2.0 });
    assert_eq!(scaling(json!({"rope_type": "default"})).unwrap(), RopeScaling::None);
    assert_eq!(scaling(json!({"type": "yarn", "factor": 4})).unwrap(), RopeScaling::Other("yarn".to_owned()));
    let text = scaling(json!({"rope_type": "llama3", "factor": 8.0})).unwrap_err().to_string();
    assert_eq!(text, "config.json: `rope_scaling.low_freq_factor` is missing");
    let swapped = json!({"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    let text = scaling(swapped).unwrap_err().to_string();
    assert!(text.contains("`rope_scaling.low_freq_factor` = 4 must be below high_freq_factor = 1"), "{text}");

    assert_eq!(with("torch_dtype", None).unwrap().dtype, DType::F32);
    assert_eq!(with("torch_dtype", Some(json!("torch.float16"))).unwrap().dtype, DType::F16);
    let mut config = base();
    config.as_object_mut().unwrap().shift_remove("torch_dtype");
    config["dtype"] = json!("bfloat16");
    assert_eq!(ModelSpec::from_config(&config.to_string()).unwrap().dtype, DType::BF16);

    assert_eq!(with("eos_token_id", Some(json!(2))).unwrap().eos_token_ids, [2]);
    assert_eq!(with("eos_token_id", Some(json!([1, 2]))).unwrap().eos_token_ids, [1, 2]);
}

#[test]
fn a_field_that_makes_no_sense_is_named_with_what_it_is() {
    assert_eq!(
        refusal("hidden_size", json!(-3)),
        "config.json: `hidden_size` must be a whole number from 1 to 268435456, not -3"
    );
    assert!(
        refusal("num_hidden_layers", json!(0))
            .contains("`num_hidden_layers` must be a whole number from 1 to 4096")
    );
    assert!(refusal("num_attention_heads", json!(1_000_000_007)).contains("`num_attention_heads`"));
    assert!(refusal("num_key_value_heads", json!(5)).contains("= 5 must divide num_attention_heads = 32"));
    assert!(refusal("num_key_value_heads", json!(64)).contains("must divide"));
    assert!(refusal("head_dim", json!(1 << 27)).contains("`head_dim` = 134217728 times 32 heads is above"));
    assert!(refusal("torch_dtype", json!("int4")).contains("\"int4\" is not supported: use float32"));
    assert!(refusal("rms_norm_eps", json!(-1e-5)).contains("`rms_norm_eps` must be a number above 0"));
    assert!(
        refusal("rope_theta", json!("big")).contains("`rope_theta` must be a number above 0, not \"big\"")
    );
    assert!(refusal("tie_word_embeddings", json!(1)).contains("must be true or false, not 1"));
    assert!(refusal("eos_token_id", json!([1, -1])).contains("`eos_token_id`"));
    assert!(
        refusal("quantization_config", json!({"quant_method": "hqq"})).contains("\"hqq\" is not supported")
    );
    assert!(
        refusal("quantization_config", json!({"bits": 4})).contains("`quantization_config.quant_method` is")
    );
    let long = "x".repeat(10_000);
    assert!(refusal("vocab_size", json!(long)).len() < 300);

    let mut config = base();
    config.as_object_mut().unwrap().shift_remove("head_dim");
    config["hidden_size"] = json!(4097);
    let text = ModelSpec::from_config(&config.to_string()).unwrap_err().to_string();
    assert!(text.contains("= 4097 must be a multiple of num_attention_heads = 32"), "{text}");

    let bert = |field: &str, value: Value| {
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(fixture("all-minilm-l6-v2")).unwrap()).unwrap();
        config[field] = value;
        ModelSpec::from_config(&config.to_string()).unwrap_err().to_string()
    };
    assert!(
        bert("position_embedding_type", json!("relative_key")).contains("\"relative_key\" is not supported")
    );
    assert!(bert("is_decoder", json!(true)).contains("is_decoder"));
}

#[test]
fn an_unknown_architecture_is_named_with_those_that_are_known() {
    let error = with("model_type", Some(json!("mamba"))).unwrap_err();
    assert!(matches!(&error, Error::UnknownArchitecture { .. }));
    let text = error.to_string();
    assert!(text.contains("\"mamba\"") && text.contains("use one of bert, llama, qwen2"), "{text}");
    assert!(text.contains("config.json: "), "{text}");
}

#[test]
fn text_that_is_no_config_is_refused() {
    assert!(matches!(ModelSpec::from_config(""), Err(Error::Json { .. })));
    assert!(matches!(ModelSpec::from_config("{\"model_type\": "), Err(Error::Json { .. })));
    for text in ["[]", "3", "null", "\"llama\""] {
        assert!(ModelSpec::from_config(text).unwrap_err().to_string().contains("must be a JSON object"));
    }
    let deep = "[".repeat(100_000);
    assert!(matches!(ModelSpec::from_config(&deep), Err(Error::Json { .. })));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert!(matches!(ModelSpec::load(dir.path()), Err(Error::Io { path: p, .. }) if p == path));
    std::fs::write(&path, vec![b' '; (16 << 20) + 1]).unwrap();
    assert!(matches!(ModelSpec::load(dir.path()), Err(Error::TooLarge { .. })));
}

#[test]
fn no_value_of_any_field_causes_a_panic() {
    let values = [
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(7.5),
        json!(1e300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(4096),
        json!(1u64 << 28),
        json!(1u64 << 32),
        json!("x"),
        json!(""),
        json!(true),
        json!([]),
        json!([1, "a"]),
        json!({}),
        json!({"rope_type": 3}),
        json!({"rope_type": "llama3"}),
        Value::Null,
    ];
    for name in ["llama-3.1-8b", "qwen2.5-7b", "all-minilm-l6-v2"] {
        let config: Value = serde_json::from_str(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap();
        let known = config.as_object().unwrap().keys().cloned();
        let others = [
            "rope_scaling",
            "rope_parameters",
            "dtype",
            "sliding_window",
            "use_sliding_window",
            "is_decoder",
        ];
        for field in known.chain(others.map(str::to_owned)) {
            for value in &values {
                let mut config = config.clone();
                config[&field] = value.clone();
                if let Ok(spec) = ModelSpec::from_config(&config.to_string())
                    && let Ok(plan) = Planner::new(&spec).plan(2)
                {
                    plan.check(&spec).unwrap();
                }
            }
        }
    }
}

#[test]
fn no_value_of_any_field_of_any_family_causes_a_panic() {
    let values = [
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(7.5),
        json!(u64::MAX),
        json!(1u64 << 28),
        json!("x"),
        json!(true),
        json!([1, "a"]),
        json!([1, 2, 3]),
        json!({}),
        Value::Null,
    ];
    for (n, family) in FAMILIES.into_iter().enumerate() {
        let toy =
            Toy { layers: 2, kv_heads: 2, group: 2, head_dim: 4, ffn: 12, vocab: 20, experts: 3, variant: n };
        let config = toy.config(family);
        let others =
            ["layer_types", "sliding_window", "quantization_config", "mlp_only_layers", "text_config"];
        let known: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for field in known.into_iter().chain(others.map(str::to_owned)) {
            for value in &values {
                let mut config = config.clone();
                config[&field] = value.clone();
                if let Ok(spec) = ModelSpec::from_config(&config.to_string())
                    && let Ok(plan) = Planner::new(&spec).plan(2)
                {
                    plan.check(&spec).unwrap();
                }
            }
        }
    }
}

#[test]
fn the_largest_sizes_are_refused_before_anything_overflows() {
    let most = 1u64 << 28;
    let mut config = base();
    for field in ["hidden_size", "intermediate_size", "vocab_size"] {
        config[field] = json!(most);
    }
    config["num_hidden_layers"] = json!(4096);
    let error = ModelSpec::from_config(&config.to_string()).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");

    // A plan of more entries than anyone could read: 4096 layers of 9 tensors over 4096 ranks.
    let json = r#"{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 4096,
                   "num_attention_heads": 4096, "intermediate_size": 4096, "vocab_size": 4096}"#;
    let error = Planner::new(&ModelSpec::from_config(json).unwrap()).plan(4096).unwrap_err();
    assert!(error.to_string().contains("more than the limit of 4194304"), "{error}");
}

#[test]
fn impossible_worlds_are_refused_with_the_nearest_possible() {
    let minilm = model("all-minilm-l6-v2");
    assert_eq!(Planner::new(&minilm).plan(0).unwrap_err().to_string(), "a plan needs at least 1 rank, not 0");
    for world in [13, 4096, usize::MAX] {
        let error = Planner::new(&minilm).plan(world).unwrap_err();
        assert!(
            matches!(
                error,
                Error::TooManyRanks { constraint: "num_attention_heads", size: 12, nearest: 12, .. }
            ),
            "{error}"
        );
    }
    plan(&minilm, 12);
    // The binding constraint isn't always the heads.
    let narrow = r#"{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1,
                     "num_attention_heads": 8, "intermediate_size": 3, "vocab_size": 100}"#;
    let narrow = ModelSpec::from_config(narrow).unwrap();
    for world in [4, 9] {
        let error = Planner::new(&narrow).plan(world).unwrap_err();
        let of_columns = |e: &Error| matches!(e, Error::TooManyRanks { constraint: "intermediate_size", .. });
        assert!(
            of_columns(&error) && error.to_string().contains("nearest legal number of ranks is 3"),
            "{error}"
        );
    }
    plan(&narrow, 3);
}

/// What `check` says about a SmolLM2 plan over two ranks after a change.
fn changed(change: impl FnOnce(&mut Plan)) -> String {
    let spec = model("smollm2-135m");
    let mut plan = plan(&spec, 2);
    change(&mut plan);
    // Through JSON as well, where what can be seen without the model must be refused on reading.
    let read = Plan::from_json(&plan.to_json());
    let error = plan.check(&spec).unwrap_err();
    assert!(matches!(error, Error::InvalidPlan(_)));
    assert!(read.is_err() || plan.validate().is_ok());
    error.to_string()
}

fn shard<'a>(plan: &'a mut Plan, name: &str, rank: usize) -> &'a mut tensorwire_topology::plan::TensorShard {
    plan.tensors.iter_mut().find(|t| t.name.ends_with(name) && t.rank == rank).unwrap()
}

#[test]
fn a_plan_that_leaves_elements_out_or_doubles_them_fails_its_check() {
    let of_q = "layers.3.self_attn.q_proj.weight";
    let set = |name: &'static str, rank: usize, start: usize, end: usize| {
        move |plan: &mut Plan| shard(plan, name, rank).slices[0].range = Span::new(start, end)
    };
    // Rank 0 has rows 0..320 and rank 1 rows 320..576.
    assert!(changed(set(of_q, 0, 0, 319)).contains("no rank holds 319..320 of dimension 0"));
    assert!(changed(set(of_q, 1, 320, 575)).contains("no rank holds 575..576"));
    assert!(changed(set(of_q, 1, 319, 576)).contains("on other ranks too, but the plan says not replicated"));
    assert!(changed(set(of_q, 1, 320, 577)).contains("320..577 is not within 0..576"));
    assert!(changed(set(of_q, 1, 400, 400)).contains("400..400 is not within"));
    assert!(changed(set(of_q, 1, 500, 400)).contains("500..400 is not within"));
    let flag = |name: &'static str| move |plan: &mut Plan| shard(plan, name, 1).replicated ^= true;
    assert!(changed(flag(of_q)).contains("on no other rank, but the plan says replicated"));
    assert!(changed(flag("layers.3.self_attn.k_proj.weight")).contains("says not replicated"));
    assert!(changed(flag("layers.3.input_layernorm.weight")).contains("says not replicated"));
    assert!(changed(|p| shard(p, of_q, 1).slices[0].dim = 1).contains("the same dimensions"));
    assert!(changed(|p| shard(p, of_q, 1).slices.clear()).contains("the same dimensions"));
    let push = |dim: usize, start: usize, end: usize| {
        move |p: &mut Plan| shard(p, of_q, 0).slices.push(Slice { dim, range: Span::new(start, end) })
    };
    assert!(changed(push(1, 0, 1)).contains("the same dimensions"));
    // A second range of the same dimension follows the first: before it, or over it, makes no sense.
    assert!(changed(push(0, 0, 1)).contains("0..1 is not within 320..576"));
    assert!(changed(push(0, 570, 576)).contains("on other ranks too"));
    let both = |p: &mut Plan| (0..2).for_each(|r| shard(p, of_q, r).slices[0].dim = 2);
    assert!(changed(both).contains("it has no dimension 2"));
    let gone = |p: &mut Plan| p.tensors.retain(|t| !t.name.ends_with(of_q));
    assert!(changed(gone).contains("self_attn.q_proj.weight: no rank holds it"));
    let not_there = |p: &mut Plan| {
        p.tensors.retain(|t| t.rank == 0 || !t.name.ends_with("layers.3.input_layernorm.weight"))
    };
    assert!(changed(not_there).contains("what rank 0 holds is on no other rank"));
    // Covered, but not where the heads are.
    let moved = |p: &mut Plan| {
        shard(p, of_q, 0).slices[0].range.end = 256;
        shard(p, of_q, 1).slices[0].range.start = 256;
    };
    assert!(changed(moved).contains("rank 0's slice is not what its heads, columns or rows need"));
}

fn dimension<'a>(plan: &'a mut Plan, name: &str) -> &'a mut tensorwire_topology::plan::DimensionPlan {
    plan.dimensions.iter_mut().find(|d| d.name == name).unwrap()
}

#[test]
fn a_plan_that_contradicts_itself_is_not_read() {
    assert!(changed(|p| p.schema = "tensorwire.plan/v9".to_owned()).contains("tensorwire.plan/v9"));
    assert!(changed(|p| p.world = 0).contains("world = 0"));
    assert!(changed(|p| p.world = usize::MAX).contains("is not between 1 and"));
    assert!(changed(|p| p.world = 3).contains("2 ranges for 3 ranks"));
    assert!(changed(|p| drop(p.layers.pop())).contains("29 layers for a model of 30"));
    assert!(
        changed(|p| dimension(p, "heads").ranges[0].end = 4)
            .contains("heads of rank 1 is 5..9: it must start at 4")
    );
    assert!(changed(|p| dimension(p, "heads").ranges[1].end = 10).contains("heads ends at 10, not 9"));
    assert!(changed(|p| dimension(p, "ffn").ranges[0] = Span::new(0, 0)).contains("ffn of rank 0"));
    assert!(changed(|p| dimension(p, "ffn").shared = false).contains("it must be 0..1536"));
    assert!(changed(|p| dimension(p, "ffn").granule = 0).contains("granule of 0"));
    assert!(
        changed(|p| dimension(p, "ffn").granule = 512)
            .contains("ffn of rank 0 is 0..768: it can only be cut at")
    );
    assert!(changed(|p| drop(p.dimensions.pop())).contains("vocab: ranges are not those"));
    assert!(
        changed(|p| p.layers[2].attention.q_heads[0].end = 4)
            .contains("model.layers.2: q_heads are not the ranges")
    );
    assert!(changed(|p| p.layers[2].mlp.ffn.swap(0, 1)).contains("model.layers.2: ffn are not the ranges"));
    assert!(changed(|p| p.layers[2].mlp.ffn.clear()).contains("model.layers.2: its shares are not those"));
    assert!(changed(|p| p.layers[2].name.push('x')).contains("model.layers.2x: its shares are not those"));
    let fewer = |p: &mut Plan| {
        dimension(p, "kv_heads").ranges[1].start = 2;
        p.layers.iter_mut().for_each(|l| l.attention.kv_heads[1].start = 2);
    };
    assert!(changed(fewer).contains("kv_heads of rank 1 are not those that its query heads read"));
    let overlap = |p: &mut Plan| {
        dimension(p, "ffn").ranges[1].start = 700;
        p.layers.iter_mut().for_each(|l| l.mlp.ffn[1].start = 700);
    };
    assert!(changed(overlap).contains("ffn: ranges of several ranks overlap"));
    assert!(changed(|p| dimension(p, "ffn").name.push('x')).contains("not those of the model"));
    assert!(changed(|p| p.vocab.ranges.swap(0, 1)).contains("vocab: ranges are not those"));
    assert!(changed(|p| p.vocab.padded = 7).contains("padded to 7"));
    assert!(changed(|p| p.ranks.swap(0, 1)).contains("ranks are not 0 to 1"));
    assert!(changed(|p| p.ranks[1].weight_bytes += 1).contains("rank 1 reads 134"));
    assert!(changed(|p| p.tensors.swap(0, 1)).contains("must be sorted by name and rank"));
    assert!(changed(|p| p.tensors.swap(1, 3)).contains("must be sorted by name and rank"));
    assert!(changed(|p| p.tensors.rotate_left(2)).contains("is not in its place"));
    assert!(changed(|p| p.tensors[1].rank = 7).contains("has an entry for rank 7"));
    assert!(
        changed(|p| drop(p.tensors.pop())).contains("norm.weight: what rank 0 holds is on no other rank")
    );
    assert!(changed(|p| p.tensors.truncate(10)).contains("no rank holds it"));
    assert!(changed(|p| p.model.hidden_size += 1).contains("other dimensions"));
    let renamed = |p: &mut Plan| (0..2).for_each(|i| p.tensors[i].name = "a".to_owned());
    assert!(changed(renamed).contains("tensor model.embed_tokens.weight: no rank holds it"));
    let more = |p: &mut Plan| {
        let mut last = p.tensors[p.tensors.len() - 1].clone();
        last.name.push('x');
        p.tensors.push(last);
    };
    assert!(changed(more).contains("the model has no tensor model.norm.weightx"));

    assert!(matches!(Plan::from_json("{}"), Err(Error::Json { .. })));
    assert!(matches!(Plan::from_json("nothing"), Err(Error::Json { .. })));
    let other = plan(&model("qwen2.5-7b"), 2);
    assert!(other.check(&model("smollm2-135m")).is_err());
}
