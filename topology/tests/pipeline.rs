//! Pipelines: Cosmos-Predict1-7B with all its models on the presets, and what is refused.

use proptest::prelude::*;
use tensorwire_topology::Error;
use tensorwire_topology::fabric::Fabric;
use tensorwire_topology::pipeline::{self, Pipeline, PipelinePlan};
use tensorwire_topology::place::{Degrees, Reason};

fn read(path: &str) -> String {
    std::fs::read_to_string(format!("{}/../examples/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn cosmos() -> Pipeline {
    Pipeline::from_toml(&read("pipelines/cosmos-predict1-7b.toml")).unwrap()
}

fn preset(name: &str) -> Fabric {
    Fabric::from_toml(&read(&format!("fabrics/{name}.toml"))).unwrap()
}

/// Every stage once and after those it needs, every model on as many devices as it has ranks, no device too full.
fn check(plan: &PipelinePlan, pipeline: &Pipeline, fabric: &Fabric) {
    let at = |name: &str| plan.stages.iter().position(|s| s.name == name).unwrap();
    assert_eq!(plan.stages.len(), pipeline.stages.len());
    for stage in &pipeline.stages {
        let this = &plan.stages[at(&stage.name)];
        for before in &stage.after {
            let before = &plan.stages[at(before)];
            assert!(
                before.start_us + before.us <= this.start_us + 0.01,
                "{} before {}",
                before.name,
                this.name
            );
        }
    }
    for model in &plan.models {
        let mut devices: Vec<usize> = model.ranks.iter().map(|r| r.device).collect();
        devices.sort_unstable();
        devices.dedup();
        assert_eq!(devices.len(), model.chosen.degrees.ranks(), "{}", model.name);
    }
    for device in &plan.devices {
        let held = plan.models.iter().flat_map(|m| m.ranks.iter().filter(|r| r.device == device.device));
        let held: Vec<_> = held.map(|r| r.memory).collect();
        let weights: u64 = held.iter().map(|m| m.weights).sum();
        let beside =
            held.iter().map(|m| m.loading.max(m.kv_cache + m.activations + m.buffers)).max().unwrap();
        assert_eq!((device.weight_bytes, device.peak_bytes), (weights, weights + beside), "{}", device.name);
        assert!(device.peak_bytes <= fabric.model(device.device).memory_bytes.unwrap(), "{}", device.name);
    }
}

#[test]
fn cosmos_fits_on_eight_small_devices() {
    let (pipeline, fabric) = (cosmos(), preset("8-accelerators"));
    let plan = pipeline::place(&pipeline, &fabric).unwrap();
    check(&plan, &pipeline, &fabric);
    // Guard, upsampler, encoder, transformer, decoder and the frames' three.
    assert_eq!(plan.models.len(), 8);
    let dit = plan.models.iter().find(|m| m.name == "dit-7b").unwrap();
    assert_eq!(dit.weight_bytes, 2 * 7_236_192_256);

    // The bytes that a rank sends in a step, from three sums of 461,373,440 bytes in each of 28 blocks and two passes.
    let wire = |degrees: Degrees| {
        let chosen = std::iter::once(&dit.chosen).chain(dit.rejected.iter().map(|r| &r.alternative));
        let found = chosen.into_iter().find(|a| a.degrees == degrees);
        found.map(|a| (a.predicted.wire_bytes_per_rank_step, a.tightest.of.weights))
    };
    let tp = |tp| Degrees { tp, ..Degrees::ONE };
    assert_eq!(wire(tp(2)).unwrap().0, 77_510_737_920);
    assert_eq!(wire(tp(4)).unwrap(), (116_266_106_880, 4_255_059_968));
    assert_eq!(wire(tp(8)).unwrap().0, 135_643_791_360);
    assert_eq!(wire(Degrees { cfg: 2, ..tp(4) }).unwrap(), (58_133_053_440 + 7_208_960, 4_255_059_968));
    assert_eq!(wire(Degrees { cp: 4, ..Degrees::ONE }).unwrap(), (19_377_684_480, 14_472_384_512));
    assert_eq!(wire(Degrees { cp: 8, ..Degrees::ONE }).unwrap().0, 11_303_649_280);

    // 35 steps of 2 x 2.2094e15 operations on eight devices of 32e12 are 604 s at the least.
    let denoising = plan.stages.iter().find(|s| s.name == "denoising").unwrap();
    assert!((604e6..1300e6).contains(&denoising.us), "{}", denoising.us);
    // The same input, the same bytes; and they can be read back.
    let json = plan.to_json();
    assert_eq!(json, pipeline::place(&pipeline, &fabric).unwrap().to_json());
    assert_eq!(serde_json::from_str::<PipelinePlan>(&json).unwrap(), plan);
}

#[test]
fn a_decoder_of_films_is_divided_by_height() {
    let (mut pipeline, fabric) = (cosmos(), preset("8-accelerators"));
    let whole = pipeline::place(&pipeline, &fabric).unwrap();
    let note = whole.notes.iter().find(|n| n.starts_with("vae-decoder is whole on 1 device: ")).unwrap();
    assert!(note.contains("; by height over 8 devices a call is predicted to take "), "{note}");
    assert!(note.ends_with(" instead of 1915.6 ms"), "{note}");
    pipeline.models.get_mut("vae-decoder").unwrap().whole_because = None;
    let plan = pipeline::place(&pipeline, &fabric).unwrap();
    check(&plan, &pipeline, &fabric);
    let vae = plan.models.iter().find(|m| m.name == "vae-decoder").unwrap();
    let all: Vec<_> =
        std::iter::once(&vae.chosen).chain(vae.rejected.iter().map(|r| &r.alternative)).collect();
    let of = |tp| *all.iter().find(|a| a.degrees == Degrees { tp, ..Degrees::ONE }).unwrap();
    // Between two neighbours, rows of both; 25 sums of 248 bytes; of all keys and values, those that others have.
    let (halo, gather) = (92_815_360.0, 461_373_440.0);
    let sent = |n: f64, sides: f64| sides * halo + (n - 1.0) / n * (gather + 25.0 * 2.0 * 248.0);
    assert_eq!(of(8).predicted.wire_bytes_per_rank_step, sent(8.0, 2.0) as u64);
    assert_eq!(of(2).predicted.wire_bytes_per_rank_step, sent(2.0, 1.0) as u64);
    // 6.13e13 operations at 32e12 a second; whole weights, and a part of the activations.
    assert!((of(1).predicted.step_us / 1_915_625.0 - 1.0).abs() < 1e-6);
    assert!(of(8).predicted.step_us < 0.2 * of(1).predicted.step_us, "{}", of(8).predicted.step_us);
    assert_eq!(of(8).tightest.of.weights, 2 * 62_738_832);
    assert_eq!(of(8).tightest.of.activations, 3_575_644_160 / 8);
    // It pays.
    assert!(vae.chosen.degrees.tp > 1, "{}", vae.chosen.name);
    assert!(
        plan.notes.iter().any(|n| n.contains("vae-decoder is divided by height over")),
        "{:#?}",
        plan.notes
    );
}

#[test]
fn on_thirty_two_devices_sums_stay_on_a_card_and_guidance_goes_across() {
    let (pipeline, fabric) = (cosmos(), preset("32-accelerators"));
    let plan = pipeline::place(&pipeline, &fabric).unwrap();
    check(&plan, &pipeline, &fabric);
    let dit = plan.models.iter().find(|m| m.name == "dit-7b").unwrap();
    let d = dit.chosen.degrees;
    assert!(d.cfg == 2 && (2..=4).contains(&d.tp), "{d}");
    let card = |device: usize| fabric.devices()[device].card;
    for group in dit.ranks.chunks(d.tp) {
        assert!(group.iter().all(|r| card(r.device) == card(group[0].device)), "{d}");
    }
    for rank in dit.ranks.iter().filter(|r| r.cfg == 0) {
        let same = |r: &&_| {
            let r: &tensorwire_topology::place::RankPlace = r;
            r.cfg == 1 && (r.tp, r.cp, r.pp, r.dp) == (rank.tp, rank.cp, rank.pp, rank.dp)
        };
        assert_ne!(card(dit.ranks.iter().find(same).unwrap().device), card(rank.device));
    }
    let flat =
        dit.rejected.iter().find(|r| r.alternative.degrees == Degrees { tp: 8, ..Degrees::ONE }).unwrap();
    assert!(matches!(flat.reason, Reason::Slower { .. }), "{flat}");
}

#[test]
fn models_that_do_not_fit_together_are_refused_with_the_numbers() {
    // 67 GB of weights: two devices of 15.7 GiB hold none of the larger models beside the others.
    let mut parts = preset("8-accelerators").into_parts();
    parts.devices.truncate(4);
    let error = pipeline::place(&cosmos(), &Fabric::new(parts).unwrap()).unwrap_err().to_string();
    assert!(error.contains("don't fit together on 4 devices"), "{error}");
    assert!(error.contains("mistral-nemo-12b 24.5 GB"), "{error}");
}

fn refused(text: &str) -> String {
    let head = "schema = \"tensorwire.pipeline/v1\"\nname = \"p\"\n";
    let model = "[model.m]\nparameters = 1000\nbytes_per_parameter = 2\nflops_per_item = 1.0\nwhole_because = \"small\"\n";
    Pipeline::from_toml(&format!("{head}{text}\n{model}")).unwrap_err().to_string()
}

#[test]
fn what_is_no_pipeline_is_refused() {
    let cycle = "[[stage]]\nname = \"a\"\nmodel = \"m\"\nafter = [\"c\"]\n[[stage]]\nname = \"b\"\nafter = [\"a\"]\n\
                 [[stage]]\nname = \"c\"\nafter = [\"b\"]\n";
    assert_eq!(
        refused(cycle),
        "the pipeline: its stages wait for each other: a, which comes after c, which comes after b, which comes after a"
    );
    let one = |rest: &str| refused(&format!("[[stage]]\nname = \"a\"\nmodel = \"m\"\n{rest}"));
    assert_eq!(
        one("after = [\"a\"]"),
        "the pipeline: its stages wait for each other: a, which comes after a"
    );
    assert_eq!(one("after = [\"z\"]"), "stage \"a\": there is no stage \"z\" to come after");
    assert_eq!(one("[[stage]]\nname = \"a\"\n"), "the pipeline: two stages are called \"a\"");
    assert!(one("calls = 0").contains("calls is 0: 1 to"));
    assert!(one("tokens = -3").contains("tokens"), "{}", one("tokens = -3"));
    assert!(one("branches = 3").contains("branches is 3: 1 to 2"));
    assert!(one("colour = 3").contains("unknown field `colour`"));
    assert_eq!(refused("[[stage]]\nname = \"a\"\nmodel = \"n\"\n"), "stage \"a\": there is no model \"n\"");
    assert!(refused("stage = []").contains("0 stages"));
    let model = |fields: &str| {
        let head = "schema = \"tensorwire.pipeline/v1\"\nname = \"p\"\n[[stage]]\nname = \"a\"\n[model.m]\n";
        Pipeline::from_toml(&format!("{head}{fields}")).unwrap_err().to_string()
    };
    let why = "bytes_per_parameter = 2\nflops_per_item = 1.0\nwhole_because = \"small\"\n";
    assert_eq!(model("parameters = 1"), "model \"m\": it has no config, so it needs bytes_per_parameter");
    let height = "height = { rows = 8, exchanges = 1, halo_bytes = 1 }";
    let with =
        |height: &str| format!("parameters = 1\nbytes_per_parameter = 2\nflops_per_item = 1.0\n{height}\n");
    assert!(model(&with("")).contains("it needs whole_because or height"));
    assert!(model(&with(&height.replace("rows = 8", "rows = 0"))).contains("its height makes no sense"));
    assert!(
        model(&with(&height.replace("halo_bytes = 1", "halo_bytes = 9_000_000_000_000_000_000")))
            .contains("no sense")
    );
    assert_eq!(model("parameters = 1\nconfig = {}"), "model \"m\": parameters follows from its config");
    assert!(model(&format!("parameters = 9_000_000_000_000_000_000\n{why}")).contains("make no sense"));
    assert!(model(&why.replace("1.0", "nan")).contains("needs parameters"));
    assert!(model(&format!("parameters = 1\n{}", why.replace("1.0", "nan"))).contains("make no sense"));
    let other = Pipeline::from_json(r#"{"schema": "x", "name": "", "model": {}, "stage": []}"#).unwrap_err();
    assert!(other.to_string().contains("its schema is \"x\""));
}

#[test]
fn a_configuration_that_makes_no_sense_is_refused_by_its_model() {
    let text = "schema = \"tensorwire.pipeline/v1\"\nname = \"p\"\n[[stage]]\nname = \"a\"\nmodel = \"m\"\n\
                [model.m]\nconfig = { model_type = \"llama\", hidden_size = -1 }\n";
    let pipeline = Pipeline::from_toml(text).unwrap();
    let error = pipeline::place(&pipeline, &preset("8-accelerators")).unwrap_err().to_string();
    assert!(error.starts_with("model \"m\": "), "{error}");
}

#[test]
fn a_model_that_fits_on_no_group_is_refused_with_the_numbers() {
    let mut parts = preset("8-accelerators").into_parts();
    parts.devices.truncate(1);
    let error = pipeline::place(&cosmos(), &Fabric::new(parts).unwrap()).unwrap_err().to_string();
    assert!(error.contains("doesn't fit on 1 devices") && error.contains("has 16.9 GB and needs"), "{error}");
}

#[test]
fn stages_of_one_model_share_its_weights() {
    let plan = pipeline::place(&cosmos(), &preset("8-accelerators")).unwrap();
    let guard = plan.models.iter().filter(|m| m.name == "llama-guard-3-8b").count();
    assert_eq!(
        (guard, plan.stages.iter().filter(|s| s.model.as_deref() == Some("llama-guard-3-8b")).count()),
        (1, 2)
    );
    assert!(plan.notes.iter().any(|n| n.starts_with("llama-guard-3-8b is loaded once for text guard and")));
}

#[test]
fn stages_that_do_not_need_each_other_run_at_once() {
    // Two models of 10 GB, one device of 15.7 GiB each: an item's 32e12 operations take a second on either.
    let text = r#"
        schema = "tensorwire.pipeline/v1"
        name = "two at once"
        [model.a]
        parameters = 5_000_000_000
        bytes_per_parameter = 2
        flops_per_item = 32e12
        whole_because = "it is one"
        [model.b]
        parameters = 5_000_000_000
        bytes_per_parameter = 2
        flops_per_item = 32e12
        whole_because = "it is one"
        [[stage]]
        name = "first"
        model = "a"
        [[stage]]
        name = "second"
        model = "b"
    "#;
    let (pipeline, fabric) = (
        Pipeline::from_toml(&text.replace("5_000_000_000", "3_000_000_000")).unwrap(),
        preset("8-accelerators"),
    );
    let plan = pipeline::place(&pipeline, &fabric).unwrap();
    check(&plan, &pipeline, &fabric);
    assert_eq!(plan.request_us, 1e6);
    assert_eq!(plan.devices.len(), 2);
    // 10 GB beside 10 GB while it is read are more than any device has.
    let error = pipeline::place(&Pipeline::from_toml(text).unwrap(), &fabric).unwrap_err().to_string();
    assert!(error.contains("a doesn't fit on 8 devices"), "{error}");
}

#[test]
fn what_is_damaged_is_refused_or_placed() {
    // Each of these has one byte of the example changed; whatever is then still a pipeline has workloads or is refused.
    let text = read("pipelines/cosmos-predict1-7b.toml").into_bytes();
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let mut read = 0;
    for _ in 0..400 {
        let mut bytes = text.clone();
        let at = next(bytes.len());
        bytes[at] = b"09-.=\"[]{}ax\n"[next(13)];
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let Ok(pipeline) = Pipeline::from_toml(&text) else { continue };
        for stage in &pipeline.stages {
            read += usize::from(pipeline.workload(stage).is_ok());
        }
    }
    assert!(read > 100, "{read}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn plans_keep_their_promises(
        sizes in prop::collection::vec((1u64..4_000_000_000, 1usize..40, 0u64..2_000_000_000, any::<u16>()), 1..6),
        devices in 1usize..9,
    ) {
        let mut text = "schema = \"tensorwire.pipeline/v1\"\nname = \"any\"\n".to_owned();
        for (i, (parameters, items, activation_bytes, after)) in sizes.iter().enumerate() {
            let after: Vec<String> = (0..i).filter(|j| after >> j & 1 == 1).map(|j| format!("\"s{j}\"")).collect();
            text += &format!(
                "[model.m{i}]\nparameters = {parameters}\nbytes_per_parameter = 2\nflops_per_item = 1e12\n\
                 activation_bytes = {activation_bytes}\nwhole_because = \"\"\n\
                 [[stage]]\nname = \"s{i}\"\nmodel = \"m{i}\"\nitems = {items}\nsends_bytes = 1000\nafter = [{}]\n",
                after.join(", ")
            );
        }
        let pipeline = Pipeline::from_toml(&text).unwrap();
        let mut parts = preset("8-accelerators").into_parts();
        parts.devices.truncate(devices);
        let fabric = Fabric::new(parts).unwrap();
        match pipeline::place(&pipeline, &fabric) {
            Ok(plan) => {
                check(&plan, &pipeline, &fabric);
                prop_assert_eq!(plan.to_json(), pipeline::place(&pipeline, &fabric).unwrap().to_json());
            }
            Err(error) => prop_assert!(matches!(error, Error::NoPlacement(_)), "{error}"),
        }
    }
}
